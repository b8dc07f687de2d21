"""inference_example.py through its entry point, on the tiny model in real NF4 with a random adapter."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

import inference_example
import quantization_utils
from config import ConfigError, load_config, save_config
from fast_path.decoder import Watch
from fast_path.families import decoder_layers
from inference_example import Conversation, Engine, attach, create_engine, encode, fitted, generate_ids, load, take_turn
from quantization_utils import create_lora_config, keep_packing, load_model_and_tokenizer
from toolkit import locks, merge
from toolkit.data_files import load_rows
from toolkit.data_formats import IGNORED, PLAIN_TEMPLATE, tokenize_rows
from toolkit.generation import COVERED, Generator
from toolkit.prompt_files import finished_rows

TEXT = "A lighthouse is a tower that shows sailors where they are. In 1822 Fresnel built a lens."
PROMPTS = ["Hello there.", "Who are you?", "Tell me about a town in the north of France.", "Is it late?"]
PROMPTS += [f"What is {word}?" for word in ("rain", "a hill", "glass", "the sea", "bread", "snow")]


def make_adapter(model_folder: Path, folder: Path, **lora: object) -> Path:
    """Leave in `folder` what a run leaves for inference: an adapter whose B is not zero, and config.yaml."""
    model, _ = load_model_and_tokenizer(str(model_folder), compute_dtype="float32", device="cpu")
    torch.manual_seed(1)
    peft_model = get_peft_model(model, create_lora_config(rank=8, **lora))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    config = load_config((), {"model.name": str(model_folder), "generation.max_new_tokens": 10})
    save_config(config, folder / "config.yaml")
    return folder


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """An adapter's folder that a test may spoil."""
    return shutil.copytree(adapter, tmp_path / "copy")


@pytest.fixture(scope="session")
def engine(adapter: Path) -> Engine:
    """The model with the adapter, as the script loads it, in fp32, where no two tokens are as good as equal."""
    config = load_config(adapter / "config.yaml", {"quantization.compute_dtype": "float32"})
    model, tokenizer = load(config)
    return create_engine(attach(model, adapter, config.model.name), tokenizer, raw=False)


@pytest.fixture
def run(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """A function that runs main in this process: run(*flags, stdin="") -> (exit code, stdout, stderr)."""

    def call(*flags: object, stdin: str = "", adapter: object = adapter) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = inference_example.main([str(word) for word in ("--adapter", adapter, "--max_new_tokens", 10, *flags)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT at the third token of every answer."""
    plain = Watch.count

    def pressed(watch: Watch) -> None:
        if watch.tokens == 2:
            signal.raise_signal(signal.SIGINT)
        plain(watch)

    monkeypatch.setattr(Watch, "count", pressed)


def answer(engine: Engine, prompt: object, **settings: object) -> str:
    """Return the likeliest answer, by one call on one prompt."""
    talk = load_config((), {"generation.max_new_tokens": 10, "generation.temperature": 0}).generation
    talk = dataclasses.replace(talk, **settings)
    return engine.tokenizer.decode(
        generate_ids(engine, [encode(engine, prompt, talk.system_prompt)], talk, Watch())[0], skip_special_tokens=True
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ loading and tokens


def plain_model(tiny_model: Path, adapter: Path) -> PeftModel:
    """The tutorial's own loading."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization, dtype=torch.bfloat16)
    keep_packing(base)
    return PeftModel.from_pretrained(base, adapter)


def test_logits_and_answer_are_those_of_the_tutorials_loading(run: Callable, tiny_model: Path, adapter: Path) -> None:
    plain, tokenizer = plain_model(tiny_model, adapter), AutoTokenizer.from_pretrained(tiny_model)
    config = load_config(adapter / "config.yaml", {"quantization.compute_dtype": "bfloat16"})
    ours = attach(load(config)[0], adapter, config.model.name)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(ours.device)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    keep_packing(plain, keep=False)
    chat = [{"role": "user", "content": TEXT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = ids["input_ids"].to(plain.device)
    greedy = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[0, ids.shape[1] :]
    code, out, _ = run("--mode", "text", "--prompt", TEXT, "--temperature", 0, "--compute_dtype", "bfloat16")
    assert (code, out) == (0, tokenizer.decode(expected, skip_special_tokens=True) + "\n")


def test_greedy_ignores_the_seed_and_sampling_follows_it(run: Callable) -> None:
    def text(*flags: object) -> str:
        return run("--mode", "text", "--prompt", TEXT, *flags)[1]

    assert text("--temperature", 0) == text("--temperature", 0, "--seed", 7)
    assert text("--temperature", 2) == text("--temperature", 2)
    assert text("--temperature", 2) != text("--temperature", 2, "--seed", 7)
    assert text("--temperature", 2, "--top_k", 1) == text("--temperature", 0)


def test_the_fast_decoder_takes_all_settings_but_beams(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []
    monkeypatch.setattr(Generator, "generate", lambda self, rows, how, *rest: asked.append(how) or [[2]])
    for flags in ({}, {"generation.temperature": 0.5, "generation.top_k": 3}, {"generation.repetition_penalty": 1.5}):
        settings = load_config((), flags).generation
        inference_example.generate_ids(engine, [[5, 6]], settings, Watch())
        assert set(asked[-1].to_diff_dict()) <= COVERED
    settings = load_config((), {"generation.num_beams": 3}).generation
    inference_example.generate_ids(engine, [[5, 6]], settings, Watch())
    assert set(asked[-1].to_diff_dict()) - COVERED == {"num_beams"}


@pytest.mark.parametrize(
    "text, kind", [("strides", ConfigError), ("DefaultCPUAllocator: can't allocate memory", RuntimeError)]
)
def test_what_the_models_own_code_raises_is_one_line(engine: Engine, text: str, kind: type[Exception]) -> None:
    """Exhausted memory has a line and an exit code of its own."""

    def fail(*inputs: object) -> None:
        raise RuntimeError(text)

    hook = decoder_layers(engine.model.get_base_model())[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(kind, match=text) as caught:
            generate_ids(engine, [[5, 6]], load_config(()).generation, Watch())
        assert type(caught.value) is kind
    finally:
        hook.remove()


def test_beams_are_those_of_generate_and_are_printed_at_the_end(run: Callable, engine: Engine) -> None:
    flags = ("--mode", "text", "--prompt", TEXT, "--temperature", 0, "--num_beams", 3, "--max_new_tokens", 10)
    code, out, _ = run(*flags)
    ids = torch.tensor([encode(engine, TEXT, None)])
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "eos_token_id": engine.ends, "pad_token_id": 0}
    new = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
    assert code == 0 and out == engine.tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert out != run(*flags, "--num_beams", 1)[1]


def test_the_models_own_generation_config_does_not_leak_in(
    run: Callable, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    own = {"eos_token_id": [2, 0], "do_sample": True, "repetition_penalty": 9.0, "top_k": 1, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    for temperature in (0, 1):
        flags = ("--mode", "text", "--prompt", TEXT, "--temperature", temperature, "--max_new_tokens", 24)
        assert run(*flags, "--model_name", folder)[1] == run(*flags)[1]


def test_an_answer_ends_at_every_end_token(engine: Engine) -> None:
    names = engine.tokenizer.get_vocab()
    assert engine.ends == sorted([names["<|endoftext|>"], names["<|im_end|>"]])
    base, plain = engine.model.get_base_model(), GenerationConfig()
    base.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert inference_example.end_tokens(base, engine.tokenizer) == sorted([*engine.ends, 7, 9])
    base.generation_config = plain
    settings = load_config((), {"generation.max_new_tokens": 10, "generation.temperature": 0}).generation
    ids = encode(engine, TEXT, None)
    whole = generate_ids(engine, [ids], settings, Watch())[0]
    for end in whole[:4]:
        cut = generate_ids(dataclasses.replace(engine, ends=[end]), [ids, ids + ids], settings, Watch())[0]
        assert cut == whole[: whole.index(end) + 1]


@pytest.fixture
def without_template(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that has no chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_a_model_without_a_chat_template_continues_text(run: Callable, without_template: Path) -> None:
    folder = without_template
    flags = ("--mode", "text", "--prompt", "The river rises in", "--temperature", 0)
    _, out, err = run(*flags, "--model_name", folder)
    assert "no chat template" in err
    assert out == run(*flags, "--raw")[1] != run(*flags)[1]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A lighthouse."},
    {"role": "user", "content": " And where?\n"},
    {"role": "assistant", "content": "By the sea, in 1822."},
]


def test_an_adapter_of_chats_is_asked_as_it_was_trained(
    run: Callable, train: Callable, without_template: Path, tmp_path: Path
) -> None:
    """A prompt's tokens are the beginning of the training sample's, up to the first that was learned."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text(f"{json.dumps({'messages': CHAT})}\n" * 40, encoding="utf-8")
    code, folder = train("--model_name", without_template, "--dataset", rows, "--max_steps", 1)
    config = load_config(folder / "config.yaml")
    model, tokenizer = load(config)
    assert code == 0 and tokenizer.chat_template is None
    sample = tokenize_rows(load_rows(config.data), tokenizer, config.data)["train"][0]
    for adapter in (folder, folder / "checkpoint-1"):
        engine = create_engine(model, load(config, adapter)[1], raw=False)
        for turn in (2, 4):
            ids = encode(engine, CHAT[:turn], None)
            assert ids == sample["input_ids"][: len(ids)] and sample["labels"][len(ids)] != IGNORED
            assert sample["labels"][len(ids) - 1] == IGNORED
        assert encode(engine, CHAT[1]["content"], "Be brief.") == encode(engine, CHAT[:2], None)
    _, out, err = run("--mode", "text", "--prompt", "Hello", "--temperature", 0, adapter=folder)
    assert "no chat template" not in err and out
    assert run("--mode", "merge", "--output", tmp_path / "merged", adapter=folder)[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == PLAIN_TEMPLATE


def test_the_template_goes_with_the_chats(train: Callable, without_template: Path, tmp_path: Path) -> None:
    """Text, and a tokenizer with its own template, leave none; a run over another in the same folder takes it away."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text(f"{json.dumps({'messages': CHAT})}\n" * 40, encoding="utf-8")
    left = []
    for flags in (("--dataset", rows, "--model_name", without_template), ("--model_name", without_template), ()):
        code, folder = train(*flags, "--max_steps", 1, "--overwrite")
        assert code == 0
        left.append((folder / "chat_template.jinja").is_file())
    assert left == [True, False, False]


def test_a_base_other_than_the_adapters_is_told(
    run: Callable, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with an edited create_bnb_config is answered on the same base; without the edit too, since it is recorded."""
    made = quantization_utils.create_bnb_config
    flags = ("--mode", "text", "--prompt", "To be", "--temperature", 0)
    with monkeypatch.context() as patch:
        patch.setattr(quantization_utils, "create_bnb_config", lambda **asked: made(**asked | {"quant_type": "fp4"}))
        code, folder = train("--max_steps", 1)
        _, edited, err = run(*flags, adapter=folder)
        assert code == 0 and "not as configured" not in err
    _, plain, err = run(*flags, adapter=folder)
    assert plain == edited and "not as configured" not in err
    _, _, err = run(*flags, "--quant_type", "nf4", adapter=folder)
    assert "not as configured" not in err  # asked for by a flag
    with monkeypatch.context() as patch:
        patch.setattr(quantization_utils, "create_bnb_config", lambda **asked: made(**asked | {"quant_type": "nf4"}))
        _, _, err = run(*flags, adapter=folder)
    assert "not as configured: quantization.quant_type is nf4 (configured: fp4)" in err


def test_an_empty_system_prompt_replaces_the_templates_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine.tokenizer.chat_template
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", own + plain)

    def shown(system_prompt: str | None) -> str:
        return engine.tokenizer.decode(encode(engine, "Hello", system_prompt))

    turn = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert shown(None) == "<|im_start|>system\nYou are Q.<|im_end|>\n" + turn
    assert shown("") == "<|im_start|>system\n<|im_end|>\n" + turn


# ------------------------------------------------------------------------------------------------ text


def test_text_mode_as_a_user_runs_it(run_cli: Callable, run: Callable, adapter: Path) -> None:
    flags = ("--mode", "text", "--temperature", 0, "--compute_dtype", "bfloat16", "--max_new_tokens", 10)
    child = run_cli("inference_example.py", "--adapter", adapter, *flags, "--prompt", "-", input="Grüße, 你好\n")
    assert child.returncode == 0
    assert child.stderr.startswith("[") and child.stderr.count("\n") == 1 and "tokens/s" in child.stderr
    assert " GB/s read | peak " in child.stderr
    assert child.stdout == run(*flags, "--prompt", "Grüße, 你好")[1]


def test_a_file_of_prompts_gets_the_answers_of_single_runs(run: Callable, engine: Engine, tmp_path: Path) -> None:
    questions, rows, output = tmp_path / "q.txt", tmp_path / "q.jsonl", tmp_path / "new" / "a.jsonl"
    questions.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8-sig")
    flags = ("--mode", "text", "--temperature", 0, "--compute_dtype", "float32", "--prompts")
    code, out, err = run(*flags, questions, "--output", output)
    assert (code, out) == (0, "") and "10 answers" in err
    expected = [{"prompt": prompt, "completion": answer(engine, prompt)} for prompt in PROMPTS]
    assert rows_of(output) == expected

    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "So?"},
    ]
    lines = [{"prompt": PROMPTS[2]}, {"messages": chat}, {"messages": [*chat, {"role": "assistant", "content": "!"}]}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert run(*flags, rows, "--output", tmp_path / "b.jsonl", "--system_prompt", "Be brief.")[0] == 0
    first, *others = rows_of(tmp_path / "b.jsonl")
    assert first == {"prompt": PROMPTS[2], "completion": answer(engine, PROMPTS[2], system_prompt="Be brief.")}
    assert others == [{"prompt": chat, "completion": answer(engine, chat, system_prompt="Be brief.")}] * 2


def test_a_second_call_goes_on_where_the_first_stopped(run: Callable, tmp_path: Path) -> None:
    questions, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text("\n".join(PROMPTS), encoding="utf-8")
    flags = ("--mode", "text", "--temperature", 1, "--prompts", questions, "--output", output)
    run(*flags)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:8]) + lines[8][:20])  # killed while it wrote the ninth row
    code, _, err = run(*flags)
    assert code == 0 and "2 answers" in err and output.read_bytes() == whole
    assert f"continuing {output} after 8 answers, which keep the settings of the call that made them" in err
    code, _, err = run(*flags)
    assert code == 0 and "nothing left to do" in err and output.read_bytes() == whole
    assert "made with the adapter and settings of an earlier call; choose another --output" in err
    for foreign in (b"my notes, without an end", b'{"prompt": "another", "completion": ""}\n', whole + lines[0]):
        output.write_bytes(foreign)
        assert run(*flags)[0] == 2 and output.read_bytes() == foreign


def test_what_another_call_is_writing_is_refused(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and also where the other one began after this one had looked."""
    questions, output = tmp_path / "q.txt", tmp_path / "new" / "a.jsonl"
    questions.write_text("\n".join(PROMPTS), encoding="utf-8")
    flags = ("--mode", "text", "--prompts", questions, "--output", output)
    busy = f"error: --output: another call is writing {output}; wait until it ends, or choose another --output\n"
    with locks.exclusive(locks.lock_of(output), "held"):
        assert run(*flags) == (2, "", busy)
        assert run("--mode", "merge", "--output", output)[0] == 2
    assert not output.parent.exists()
    real = locks.exclusive

    @contextlib.contextmanager
    def after_the_other(*arguments: object) -> Iterator[None]:
        with real(*arguments):
            output.write_bytes(b"of the other\n")
            yield

    monkeypatch.setattr(inference_example, "exclusive", after_the_other)
    assert run(*flags)[0] == 2 and output.read_bytes() == b"of the other\n"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_escapes_of_the_model_reach_no_terminal(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Text mode into a pipe stays as generated; newlines and tabs stay everywhere."""
    decode = transformers.PreTrainedTokenizerFast.decode

    def hostile(*arguments: object, **keywords: object) -> str:
        return re.sub("[a-z]", "\x1b", re.sub("[A-Z ]", "\t", decode(*arguments, **keywords)))

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "decode", hostile)
    text = ("--mode", "text", "--prompt", "To be", "--temperature", 0)
    code, piped, _ = run(*text)
    assert code == 0 and "\x1b" in piped and "\\x1b" not in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, shown, _ = run(*text)
    assert code == 0 and shown == piped.replace("\x1b", "\\x1b") and "\t" in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    for code, out, err in (run("--mode", "demo"), run(stdin="Hello\n/set \x1b[2J\n/quit\n")):
        assert code == 0 and "\x1b" not in out + err and "\\x1b" in out


def test_a_second_call_goes_on_within_a_window(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_example, "WINDOW", 4)
    monkeypatch.setattr(inference_example, "CPU_ROWS", 2)
    questions, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text("\n".join(PROMPTS), encoding="utf-8")
    flags = ("--mode", "text", "--temperature", 1, "--prompts", questions, "--output", output)
    run(*flags)
    whole = output.read_bytes()
    assert [row["prompt"] for row in rows_of(output)] == PROMPTS
    for done in (1, 3, 6, 9):
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:done]))
        code, _, err = run(*flags)
        assert code == 0 and f"{10 - done} answer{'s'[: done < 9]} in " in err and output.read_bytes() == whole


def test_the_decoder_answers_as_generate_does(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, run here without graphs."""
    (tmp_path / "q.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    flags = ("--temperature", 0, "--compute_dtype", "float32", "--repetition_penalty", 1.1)
    talk = "\n".join(["Hello", "And then?", "/set temperature 2", "So?", f"/save {tmp_path / 'TALK'}", "/quit"])

    def all_modes(name: str) -> tuple[list[dict], str, list[dict]]:
        run("--mode", "text", *flags, "--prompts", tmp_path / "q.txt", "--output", tmp_path / f"{name}.jsonl")
        demo = run("--mode", "demo", *flags)[1]
        run(*flags, stdin=talk.replace("TALK", f"{name}.talk"))
        demo = [line for line in demo.splitlines() if "tokens/s" not in line]
        return rows_of(tmp_path / f"{name}.jsonl"), demo, rows_of(tmp_path / f"{name}.talk")[0]["messages"][:5]

    expected = all_modes("generate")
    monkeypatch.setattr(inference_example, "Generator", functools.partial(Generator, fast=True))
    assert all_modes("decoder") == expected


def test_ctrl_c_ends_text_and_demo(run: Callable, ctrl_c: None, tmp_path: Path) -> None:
    code, out, err = run("--mode", "text", "--prompt", TEXT)
    assert code == 130 and out.endswith("\n") and "3 tokens, stopped" in err
    assert run("--mode", "demo")[0] == 130
    (tmp_path / "q.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    code, _, err = run("--mode", "text", "--prompts", tmp_path / "q.txt", "--output", tmp_path / "a.jsonl")
    assert code == 130 and "0 of 10 answers" in err and (tmp_path / "a.jsonl").read_bytes() == b""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------------------------------------ interactive and demo


def test_a_conversation(run: Callable, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ["Hello", "And then?", f"/save {file}", "/reset", f"/save {file}", "Hello", "/system Be brief.", "Hello"]
    lines += [" /is no command", f"/save {file}", "/quit", "never read"]
    code, out, err = run("--temperature", 0, "--compute_dtype", "float32", stdin="\n".join(lines))
    assert (code, err) == (0, "") and "the conversation is still empty" in out
    first, second = [row["messages"] for row in rows_of(file)]
    assert [m["role"] for m in first] == ["user", "assistant"] * 2
    assert first[0]["content"] == "Hello" and first[1]["content"] == answer(engine, "Hello")
    assert first[3]["content"] == answer(engine, first[:3])  # the history counts
    assert second[:2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert second[2]["content"] == first[1]["content"]  # /reset forgot
    assert second[-2]["content"] == " /is no command"
    assert second[-1]["content"] == answer(engine, second[:-1])
    assert out.count(" tokens/s | first token after ") == 5


def test_settings_are_checked_as_flags_are_and_the_end_of_input_leaves(run: Callable) -> None:
    lines = [
        "/set temperature 0",
        "/set max_new_tokens 3",
        "Hello",
        "/set top_k null",
        "/set repetition_penalty",
        '/set system_prompt ""',
        "/set top_p 2",
        "/set nonsense 1",
    ]
    code, out, _ = run(stdin="\n".join([*lines, "/set", "/help", "/what", "/save", "/save /nowhere/at/all", "", ""]))
    assert code == 0
    for part in (
        "temperature = 0.0",
        "[3 tokens, cut at max_new_tokens",
        "generation.top_p: expected a number > 0 and <= 1, got 2",
        "repetition_penalty = 1.0\n\n",
        'system_prompt = ""\n\n',
        "/set: there is no key nonsense",
        "top_p = 0.9",
        "/system TEXT",
        "/what: no such command",
        "/save: expected the name of a file",
        "/save: [Errno 2]",
    ):
        assert part in out


def test_raw_lines_are_continued_without_history(run: Callable, engine: Engine) -> None:
    flags = ("--raw", "--temperature", 0, "--compute_dtype", "float32")
    _, out, _ = run(*flags, stdin="The river\nThe river\n")
    expected = answer(dataclasses.replace(engine, raw=True), "The river")
    assert out.count(f"> {expected}\n[") == 2


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(run: Callable, ctrl_c: None, tmp_path: Path) -> None:
    code, out, _ = run(stdin=f"Hello\nStill there?\n/save {tmp_path / 'talk.jsonl'}\n/quit\n")
    assert code == 0 and out.count("[3 tokens, stopped") == 2
    assert len(rows_of(tmp_path / "talk.jsonl")[0]["messages"]) == 4


def test_a_chat_in_a_terminal(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Loading is announced at once; pasted lines, Chinese in the C locale, and Ctrl-C, which ends only the answer."""
    if "libedit" in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("Python has no GNU readline here")
    from tests.terminal import BACKSPACE, CTRL_C, Terminal, environment

    flags = [
        "--adapter",
        str(adapter),
        "--max_new_tokens",
        "900",
        "--temperature",
        "9",
        "--top_p",
        "1",
    ]  # which does not end soon
    command = [sys.executable, inference_example.__file__, *flags]
    five, file = "one\ntwo: 你好\n\n/four\nfive", tmp_path / "talk.jsonl"
    with Terminal(command, environment(tmp_path, LC_ALL="C"), columns=200) as screen:
        assert screen.wait(f"loading {tiny_model} ...\n") == ""
        assert screen.wait("\n\n> ", 300) == f"{tiny_model} | adapter: {adapter} | chat | /help lists the commands"
        for message in (screen.pasted(five), f"吗你{BACKSPACE}x"):
            screen.type(message, "\r", then="\n")
            screen.wait(" ")  # within the answer
            screen.type(CTRL_C, then=", stopped in ")
            screen.wait("\n\n> ")
            assert screen.raw.decode().rindex("\x1b[36m[") < screen.raw.decode().rindex(", stopped in ")
        screen.enter("/set max_new_tokens 1", then="max_new_tokens = 1\n")
        screen.enter("/retry", then="[1 token, cut at max_new_tokens in ")
        screen.enter(f"/save {file}", then="added the conversation (4 messages) to ")
        assert screen.left("/bye\r") == 0 and "Traceback" not in screen.text
    assert [message["content"] for message in rows_of(file)[0]["messages"][::2]] == [five, "吗x"]


def test_ctrl_c_at_the_prompt_leaves(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    assert run()[0] == 0


def test_the_oldest_turns_go_when_the_positions_are_full(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_config((), {"generation.max_new_tokens": 10, "generation.system_prompt": "Be brief."}).generation
    turns = [{"role": role, "content": f"{TEXT} {n}"} for n in range(3) for role in ("user", "assistant")][:-1]
    last = encode(engine, turns[-1:], "Be brief.")
    kept = list(turns)
    assert fitted(dataclasses.replace(engine, limit=len(last) + 10), kept, settings) == last
    assert kept == turns[-1:] and "[dropped the 2 oldest turns: " in capsys.readouterr().out
    whole = encode(engine, turns, "Be brief.")
    limit = len(whole) + 9
    assert len(fitted(dataclasses.replace(engine, limit=limit), list(turns), settings)) + 10 <= 0.75 * limit
    assert fitted(dataclasses.replace(engine, limit=limit + 1), list(turns), settings) == whole
    capsys.readouterr()
    talk = Conversation(settings, turns[:2])
    with pytest.raises(ConfigError, match="positions"):
        take_turn(dataclasses.replace(engine, limit=20), TEXT, talk)
    assert talk.messages == turns[:2] and not capsys.readouterr().out


def test_demo_shows_base_and_adapter_under_each_prompt(run: Callable, adapter: Path, tiny_model: Path) -> None:
    flags = ("--mode", "demo", "--temperature", 0, "--max_new_tokens", 10)
    code, both, _ = run(*flags)
    _, base, _ = run(*flags, "--model_name", tiny_model, adapter="none")
    assert code == 0

    def answers(out: str, label: str) -> list[str]:
        return [part.split("\n")[1] for part in out.split("--- ") if part.startswith(label)]

    assert len(answers(both, f"base: {tiny_model}")) == len(answers(both, f"adapter: {adapter}")) == 4
    assert answers(both, "base") == answers(base, "base") != answers(both, "adapter")
    assert "adapter: " not in base


# ------------------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_in_fp32_the_logits_are_the_live_ones(lora: dict, tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **lora)
    config = load_config(adapter / "config.yaml", {"quantization.compute_dtype": "float32"})
    live, tokenizer = load(config)
    plain = merge.plain_copy(live)
    ids = tokenizer(TEXT)["input_ids"]
    base = merge.logits_on(live, ids)
    assert (merge.logits_on(plain, ids) - base).norm() < 1e-5 * base.norm()
    expected = merge.logits_on(attach(live, adapter, config.model.name), ids)
    merged = merge.merge_adapter(attach(plain, adapter, config.model.name), torch.float32)
    found = merge.logits_on(merged, ids)
    assert (found - expected).norm() < 1e-4 * expected.norm() < (expected - base).norm()


def test_each_merged_weight_is_rounded_once(tiny_model: Path, adapter: Path) -> None:
    live, _ = load(load_config(adapter / "config.yaml"))
    plain = merge.plain_copy(live)
    before = plain.model.layers[1].mlp.up_proj.weight.detach().clone()
    merged = merge.merge_adapter(attach(plain, adapter, str(tiny_model)))
    tensors, name = (
        load_file(adapter / "adapter_model.safetensors"),
        "base_model.model.model.layers.1.mlp.up_proj.lora_",
    )
    update = 32 / 8 * (tensors[name + "B.weight"] @ tensors[name + "A.weight"])  # alpha / rank
    found = merged.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, (before.float() + update).bfloat16().to(before.dtype))


def test_a_merged_folder_is_a_plain_model(run: Callable, tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "merged"
    code, out, _ = run("--mode", "merge", "--output", folder)
    assert code == 0 and "largest logit difference" in out and f"\n  vllm serve {folder}\n" in out
    assert (folder / "Modelfile").read_text(encoding="utf-8").splitlines()[1] == "FROM ./model.gguf"
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "whoever may read one file may read all"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [2, 0]
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny_model)(TEXT)["input_ids"]
    expected = merge.logits_on(plain_model(tiny_model, adapter), ids)
    difference = (merge.logits_on(model, ids) - expected).abs().max()
    assert difference < 0.02 * expected.abs().max()  # 0.0075 measured: bfloat16 keeps 8 bits

    code, out, _ = run("--mode", "merge", "--output", tmp_path / "original", "--merge_base", "original")
    assert code == 0 and "original base" in out
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert (merge.logits_on(original, ids) - expected).abs().max() > 4 * difference  # NF4's own error
    before = sorted(folder.iterdir())
    assert run("--mode", "merge", "--output", folder)[0] == 2 and sorted(folder.iterdir()) == before


def test_a_merge_that_fails_leaves_nothing(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "merged").mkdir()
    monkeypatch.setattr("os.rename", full)
    code, _, err = run("--mode", "merge", "--output", tmp_path / "merged")
    assert (code, err) == (1, "error: no space left on device\n")
    assert not any(p.name.startswith(".writing-") for p in tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ command line

ERRORS = {
    "no such adapter": (["--adapter", "nowhere"], "--adapter: no such folder: nowhere"),
    "folder without adapter": (["--adapter", "."], "--adapter: no adapter_config.json in ."),
    "output_dir without adapter": (["--config", "fresh.yaml"], "no such folder: fresh; train one with train_qlora.py"),
    "a flag of training": (["--adapter", "none", "--rank", "99"], "--rank: belongs to train_qlora.py"),
    "output_dir": (["--output_dir", "out"], "--output_dir: belongs to train_qlora.py; here it is --adapter"),
    "bad seed": (["--adapter", "none", "--seed", "x"], "training.seed: expected an integer"),
    "unknown flag": (["--temprature", "1"], "--temprature: unknown flag; did you mean --temperature?"),
    "unknown mode": (["--mode", "chat"], "--mode: invalid choice"),
    "bad value": (
        ["--temperature", "-1"],
        "generation.temperature: expected a number 0, or >= 0.001 and <= 100, got -1",
    ),
    "prompt in another mode": (["--prompt", "hi"], "--prompt: only works with --mode text"),
    "no prompt": (["--mode", "text"], "--mode text: expected one of"),
    "empty prompt": (["--mode", "text", "--prompt", " "], "--prompt: expected a text"),
    "history": (["--mode", "demo", "--no_history"], "--no_history: only works with --mode interactive"),
    "prompts without output": (["--mode", "text", "--prompts", "q.txt"], "--output: needed by"),
    "prompts as output": (["--mode", "text", "--prompts", "q.jsonl", "--output", "q.jsonl"], "--output: expected"),
    "no such prompts": (["--mode", "text", "--prompts", "no.txt", "--output", "a.jsonl"], "--prompts: no.txt"),
    "no prompts": (["--mode", "text", "--prompts", "empty.txt", "--output", "a.jsonl"], "has no prompts"),
    "bad row": (
        ["--mode", "text", "--prompts", "q.jsonl", "--output", "a.jsonl"],
        "q.jsonl, line 2: expected an object",
    ),
    "merge without output": (["--mode", "merge"], "--output: needed by"),
    "merge onto a file": (["--mode", "merge", "--output", "q.txt"], "--output: q.txt already exists"),
    "merge without adapter": (["--mode", "merge", "--output", "m", "--adapter", "none"], "expected an adapter"),
    "merge_base elsewhere": (["--merge_base", "original"], "--merge_base: only works with --mode merge"),
}


@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_what_is_wrong_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.txt").write_text("hi\n", encoding="utf-8")
    (tmp_path / "q.jsonl").write_text('{"prompt": "hi"}\n{"messages": []}\n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "fresh.yaml").write_text("training: {output_dir: fresh}\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    flags, expected = ERRORS[case]
    assert inference_example.main(flags) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert sorted(tmp_path.iterdir()) == before


def test_help_and_errors_answer_before_torch_is_imported(run_cli: Callable) -> None:
    start = time.perf_counter()
    child = run_cli("inference_example.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"}, fresh=True)
    assert time.perf_counter() - start < 1
    assert child.returncode == 0 and "--merge_base" in child.stdout and "| torch\n" not in child.stderr
    child = run_cli("inference_example.py", "--adapter", "nowhere", env={"PYTHONPROFILEIMPORTTIME": "1"}, fresh=True)
    assert child.returncode == 2 and "| torch\n" not in child.stderr and "Traceback" not in child.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_an_adapter_of_another_model_is_refused(run: Callable, random_models: Callable, family: str) -> None:
    code, _, err = run("--mode", "text", "--prompt", "hi", "--model_name", random_models(family))
    *warning, error = err.splitlines()
    assert code == 2 and "does not fit" in error and "Traceback" not in err
    assert all("was trained on" in line for line in warning)


@pytest.mark.parametrize("layer", ["layers.3.", "layers.9."], ids=["too few layers", "too many layers"])
def test_an_adapter_of_another_depth_is_refused(run: Callable, copy: Path, layer: str) -> None:
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors = {name.replace("layers.3.", layer): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if layer != "layers.3." or layer not in name}
    save_file(tensors, copy / "adapter_model.safetensors")
    code, _, err = run("--mode", "text", "--prompt", "hi", adapter=copy)
    assert code == 2 and err.count("\n") == 1 and "layers.3." in err and "does not fit" in err


def test_spoilt_adapters_are_refused(run: Callable, copy: Path) -> None:
    path, flags = copy / "adapter_model.safetensors", ("--mode", "text", "--prompt", "hi")
    tensors = load_file(path)
    name = sorted(tensors)[5]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    code, _, err = run(*flags, adapter=copy)
    assert code == 2 and err.count("\n") == 1 and name in err
    path.write_bytes(path.read_bytes()[:1000])
    assert run(*flags, adapter=copy)[0] == 2
    (copy / "adapter_config.json").write_text("{", encoding="utf-8")
    code, _, err = run(*flags, adapter=copy)
    assert code == 2 and err.count("\n") == 1


def test_a_base_of_another_name_gets_a_line(run: Callable, tiny_model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    code, _, err = run("--mode", "text", "--prompt", "hi", "--model_name", moved)
    assert code == 0 and "warning" in err and str(tiny_model) in err and str(moved) in err


def test_flags_go_before_the_given_config_before_the_runs_own(adapter: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("generation: {temperature: 0.3, top_p: 0.4}\ntraining: {output_dir: out}\n", encoding="utf-8")
    options, config = inference_example.parse(
        ["--adapter", str(adapter), "--config", str(given), "--top_p", "0.5", "--raw"]
    )
    generation = config.generation
    assert (generation.top_p, generation.temperature, generation.max_new_tokens) == (0.5, 0.3, 128)  # not the run's 10
    assert options.mode == "interactive" and options.raw
    _, config = inference_example.parse(["--adapter", "none", "--config", str(given)])
    assert config.generation.max_new_tokens == 128  # nothing of a run


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config.yaml beside the script, which a test may write."""
    (tmp_path / "script").mkdir()
    monkeypatch.setattr(inference_example, "__file__", str(tmp_path / "script" / "inference_example.py"))
    return tmp_path / "script" / "config.yaml"


def test_generation_is_read_from_the_config_yaml_beside_the_script(
    adapter: Path, beside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tutorial's way: the run's own copy says 10 tokens, sampled."""
    beside.write_text("generation: {max_new_tokens: 3, temperature: 0}\nlora: {rank: 3}\n", encoding="utf-8")
    said = []
    for _ in range(2):
        assert inference_example.main(["--adapter", str(adapter), "--mode", "text", "--prompt", TEXT]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out and all(one.err.startswith("[3 tokens, cut") for one in said)
    given = beside.with_name("given.yaml")
    given.write_text("generation: {temperature: 0.5}\n", encoding="utf-8")
    for flags, expected in (
        ((), (3, 0.0)),
        (("--config", str(given)), (3, 0.5)),
        (("--config", str(given), "--max_new_tokens", "7"), (7, 0.5)),
    ):
        found = inference_example.parse(["--adapter", str(adapter), *flags])[1]
        assert (found.generation.max_new_tokens, found.generation.temperature) == expected
        assert found.lora.rank == 16 and found.model == load_config(adapter / "config.yaml").model


def test_edits_that_cannot_count_are_said_in_one_line(
    copy: Path, beside: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(text: str, *flags: str, folder: Path = copy) -> list[str]:
        beside.write_text(text, encoding="utf-8")
        return inference_example.parse(["--adapter", str(folder), *flags])[0].notes

    same = f"model: {{name: {tiny_model}}}\ntraining: {{output_dir: {copy}, num_epochs: 9}}\n"
    edits = "lora: {rank: 4}\ndata: {max_length: 64}\nquantization: {quant_type: fp4}\n"
    differing = "quantization.quant_type nf4 (not fp4), lora.rank 16 (not 4), data.max_length 512 (not 64)"
    line = f"the adapter is used with the settings of its run, {copy / 'config.yaml'}: {differing}; "
    line += "your edits in config.yaml take effect when you train again"
    assert said(same + edits) == [line]
    (copy / "checkpoint-1").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(copy / name, copy / "checkpoint-1")
    assert said(same + edits, folder=copy / "checkpoint-1") == [line]
    assert said(same) == said(same + "generation: {top_k: 3}\n") == []
    assert said(same + "quantization: {quant_type: fp4}\n", "--quant_type", "nf4") == []  # a flag counts
    assert said(same.replace(str(copy), "elsewhere") + edits) == []  # another run's
    assert said(same.replace(str(tiny_model), "some/other") + edits) == []
    (copy / "given.yaml").write_text(same + edits, encoding="utf-8")
    assert said(same + edits, "--config", str(copy / "given.yaml")) == []
    said(same + edits)
    flags = ["--mode", "text", "--prompt", TEXT, "--max_new_tokens", "2"]
    assert inference_example.main(["--adapter", str(copy), *flags]) == 0
    assert capsys.readouterr().err.splitlines()[0] == line


def test_an_evaluation_takes_the_runs_settings_and_says_so(
    train: Callable, beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_qlora

    code, folder = train("--max_steps", 1, "--max_eval_samples", 3)
    assert code == 0
    monkeypatch.setattr(train_qlora, "__file__", str(beside))
    text = (folder / "config.yaml").read_text(encoding="utf-8").replace("max_length: 64", "max_length: 32")
    beside.write_text(text.replace("max_new_tokens: 128", "max_new_tokens: 5"), encoding="utf-8")
    for adapter in (folder, folder / "checkpoint-1"):
        _, config = train_qlora.parse(["--evaluate", "--adapter", str(adapter)])
        assert (config.data.max_length, config.generation.max_new_tokens) == (64, 5)
    capsys.readouterr()
    assert train_qlora.main(["--evaluate", "--adapter", str(folder)]) == 0
    found = capsys.readouterr()
    assert found.err.splitlines()[0].startswith("the adapter is used with the settings of its run, ")
    assert "data.max_length 64 (not 32);" in found.err and "adapter - base" in found.out


def test_the_adapter_is_found_in_output_dir_and_in_checkpoints(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder = tmp_path / "out"
    shutil.copytree(adapter, run_folder / "checkpoint-5")
    (run_folder / "checkpoint-5" / "config.yaml").rename(run_folder / "config.yaml")
    (tmp_path / "own.yaml").write_text("training: {output_dir: out}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--adapter out/checkpoint-5"):
        inference_example.parse(["--config", "own.yaml"])
    _, config = inference_example.parse(["--adapter", "out/checkpoint-5"])
    assert config.model.name == load_config(adapter / "config.yaml").model.name
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, run_folder)
    options, config = inference_example.parse(["--config", "own.yaml"])
    assert options.folders == [Path("out")] and config.model.name == load_config(adapter / "config.yaml").model.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_the_default_model_without_a_gpu_is_announced_as_slow(run: Callable) -> None:
    code, _, err = run("--mode", "text", "--prompt", "hi", adapter="none")
    assert (
        code == 2 and "will be slow on this CPU" in err.splitlines()[0] and "error: model.name" in err.splitlines()[1]
    )


def test_options_of_the_template_reach_the_prompt(tiny_model):
    """As an adapter's config.yaml has them: asked as it was taught."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}<|im_end|>{% endif %}"
    for options, ending in (({}, "heron"), ({"enable_thinking": False}, "heron<|im_end|>")):
        engine = inference_example.Engine(None, tokenizer, [], 64, False, None, options)
        assert tokenizer.decode(inference_example.encode(engine, "heron", None)) == ending


# ------------------------------------------------------------------------------------------------ several adapters


@pytest.fixture(scope="session")
def second(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the same base: other weights and another rank."""
    folder = make_adapter(tiny_model, tmp_path_factory.mktemp("more") / "second")
    tensors = load_file(folder / "adapter_model.safetensors")
    halved = {n: (-3 * t[:, :4] if "lora_B" in n else t[:4]).contiguous() for n, t in tensors.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 4}), encoding="utf-8")
    return folder


def main_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: object, stdin: str = ""
) -> tuple:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    capsys.readouterr()
    code = inference_example.main([str(word) for word in ("--max_new_tokens", 10, "--temperature", 0, *flags)])
    return (code, *capsys.readouterr())


def test_prompts_get_an_answer_of_each_adapter(adapter, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("The sea\nHello there\nOnce\n", encoding="utf-8")
    ask = ("--mode", "text", "--prompts", "q.txt", "--raw")
    found = []
    for number, folder in enumerate((adapter, second)):
        assert main_with(monkeypatch, capsys, "--adapter", folder, *ask, "--output", f"{number}.jsonl")[0] == 0
        found.append([row["completion"] for row in rows_of(Path(f"{number}.jsonl"))])
    several = ("--adapter", adapter, second, *ask, "--output", "both.jsonl")
    assert main_with(monkeypatch, capsys, *several)[0] == 0
    both = rows_of(Path("both.jsonl"))
    assert [[*row["completions"].values()] for row in both] == [list(pair) for pair in zip(*found, strict=True)]
    assert [*both[0]["completions"]] == [adapter.name, second.name] and found[0] != found[1]
    Path("both.jsonl").write_bytes(Path("both.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    assert main_with(monkeypatch, capsys, *several)[0] == 0 and rows_of(Path("both.jsonl")) == both
    for other in (("--adapter", adapter), ("--adapter", second, adapter)):  # whose rows are not these
        before = Path("both.jsonl").read_bytes()
        code, _, err = main_with(monkeypatch, capsys, *other, *ask, "--output", "both.jsonl")
        assert code == 2 and "was not written for these prompts" in err and Path("both.jsonl").read_bytes() == before


def test_an_output_that_is_a_pipe_or_nested_too_deep_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    for name in ("pipe.jsonl", "deep.jsonl"):
        with pytest.raises(ConfigError, match=f"{name} already exists and was not written for these prompts"):
            finished_rows(tmp_path / name, ["Hello"], ["r8"])


def test_a_link_is_no_folder_for_a_merged_model(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for target in ("empty", "nowhere"):  # the finished folder could not be renamed to either
        os.symlink(target, f"to {target}")
        flags = ("--adapter", adapter, "--mode", "merge", "--output", f"to {target}")
        code, _, err = main_with(monkeypatch, capsys, *flags)
        assert code == 2 and err.count("\n") == 1 and "is not an empty folder" in err


def test_demo_shows_columns_of_several_adapters(adapter, second, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(inference_example, "DEMO_PROMPTS", ("The sea",))
    code, out, _ = main_with(monkeypatch, capsys, "--adapter", adapter, second, "--mode", "demo")
    table = out[out.index("\nbase ") + 1 :].splitlines()
    assert code == 0 and table[0].split() == ["base", adapter.name, second.name]
    assert table[1] == "  ".join(["-" * 25] * 3) and max(map(len, table)) <= 80


def test_a_chat_switches_adapters_and_keeps_the_conversation(adapter, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    talk = f"hello\n/adapters\n/adapter {second.name}\nmore\n/save c.jsonl\n/ab\nwhich\n1\n/exit\n"
    code, out, _ = main_with(monkeypatch, capsys, "--adapter", adapter, second, stdin=talk)
    assert (
        code == 0 and f"* {adapter.name} (adapter: {adapter})" in out and f"  {second.name} (adapter: {second})" in out
    )
    assert f"{second.name} answers from here on" in out and "--- answer 2" in out and "sign test p = 1" in out
    assert len(rows_of(Path("c.jsonl"))[0]["messages"]) == 4 and len(rows_of(Path("ab.jsonl"))) == 1


def test_a_stopped_answer_is_not_compared(ctrl_c, adapter, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = main_with(monkeypatch, capsys, "--adapter", adapter, second, stdin="/ab\nwhich\n/exit\n")
    assert code == 0 and "answer 1" in out and "[stopped]" in out and "answer 2" not in out
    assert "no comparison was made" in out and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": {"name": "another/base"}}, "model.name is "),
        ({"quantization": {"quant_type": "fp4"}}, "quantization.quant_type is nf4 in "),
        ({"quantization": {"load_in_4bit": False}}, "quantization.load_in_4bit is true in "),
        ({"data": {"template_options": {"enable_thinking": False}}}, "data.template_options is "),
    ],
)
def test_adapters_of_another_base_are_refused_in_one_line(adapter, second, tmp_path, monkeypatch, capsys, change, says):
    odd = shutil.copytree(second, tmp_path / "odd")
    tree = yaml.safe_load((odd / "config.yaml").read_text(encoding="utf-8"))
    for section, values in change.items():
        tree[section] |= values
    (odd / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    if "model" in change:
        settings = json.loads((odd / "adapter_config.json").read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = "another/base"
        (odd / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code, _, err = main_with(monkeypatch, capsys, "--adapter", adapter, odd, "--mode", "demo")
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith("error: --adapter: expected adapters of one base: ") and says in err and str(odd) in err


def test_adapters_taught_with_different_templates_are_refused(adapter, second, tmp_path, monkeypatch, capsys):
    odd = shutil.copytree(second, tmp_path / "odd")
    (odd / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    code, _, err = main_with(monkeypatch, capsys, "--adapter", adapter, odd, "--mode", "demo")
    assert code == 2 and err.count("\n") == 1 and "taught with one chat template" in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--adapter", "A", "A", "--mode", "demo"), "expected different folders"),
        (("--adapter", "A", "none", "--mode", "demo"), "goes with no other adapter"),
        (("--adapter", "A", "nowhere", "--mode", "demo"), "no such folder: nowhere"),
        (("--adapter", "A", "n" * 5000, "--mode", "demo"), "no such folder: nnn"),
        (("--adapter", "A", "B", "--mode", "merge", "--output", "m"), "several only work with"),
        (("--adapter", "A", "B", "--mode", "text", "--prompt", "x"), "several only work with"),
    ],
)
def test_several_adapters_that_cannot_be_used(adapter, second, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    named = [{"A": adapter, "B": second}.get(word, word) for word in flags]
    code, out, err = main_with(monkeypatch, capsys, *named)
    assert (code, out) == (2, "") and err.count("\n") == 1 and says in err and not any(tmp_path.iterdir())
