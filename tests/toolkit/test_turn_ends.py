"""Where answers end: by the chat template, by what a run has learned, in generation, and in the merged folder."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import inference_example
import train_qlora
from config import ConfigError, DataConfig, load_config
from toolkit.data_blocks import make_blocks
from toolkit.turn_ends import adapter_ends, adopt_end, ends_of_template, learned_ends, teach_ends, with_end

DOCUMENT, START, END = 0, 1, 2  # ids of the tiny tokenizer: <|endoftext|>, <|im_start|>, <|im_end|>
ANSWERED = "{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: {{ m.content }}{% endif %}"
EACH = "{% for m in messages %}" + ANSWERED + "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
# name: (template, the tokens after an answer within a chat and after a last one)
TEMPLATES: dict[str, tuple[str, list[int | None]]] = {
    "after each": (EACH.replace("A: {{ m.content }}", "A: {{ m.content | trim }}<|im_end|>\n"), [END, END]),
    "after a space": (EACH.replace("A: {{ m.content }}", "A: {{ m.content }} \n<|endoftext|>"), [DOCUMENT, DOCUMENT]),
    "the next turn": (EACH.replace("Q:", "<|im_start|>Q:"), [START, None]),
    "none": (EACH.replace("A: {{ m.content }}", "A: {{ m.content }}\n\n"), [None, None]),
    "with a system message only": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
        + EACH.replace("A: {{ m.content }}", "A: {{ m.content }}<|im_end|>"),
        [END, END],
    ),
    "refuses": ("{{ raise_exception('never') }}", []),
}
CHAT = [("user", "Which bird waits?"), ("assistant", "The heron."), ("user", "And?"), ("assistant", "No other.")]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


def show(tokenizer: PreTrainedTokenizerFast, messages: list[dict], **how: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **how)


# ------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ends_that_a_template_writes(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template, expected = TEMPLATES[name]
    assert ends_of_template(tokenizer) == expected


def test_a_template_without_an_end_gets_the_models_own(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES["none"][0]
    before = show(tokenizer, MESSAGES)
    assert teach_ends(tokenizer) == [
        "the chat template writes no end token after an answer: each answer ends with <|im_end|>, the model's own"
    ]
    expected = before.replace("The heron.", "The heron.<|im_end|>").replace("No other.", "No other.<|im_end|>")
    assert show(tokenizer, MESSAGES) == expected
    prompt = show(tokenizer, MESSAGES[:3], add_generation_prompt=True)  # what training showed before the answer
    assert prompt == expected.partition("No other.")[0]
    assert ends_of_template(tokenizer) == [END, END] and teach_ends(tokenizer) == []


def test_only_a_last_answer_without_an_end_gets_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES["the next turn"][0]
    before = show(tokenizer, MESSAGES)
    teach_ends(tokenizer)
    assert show(tokenizer, MESSAGES) == before + "<|im_end|>"
    assert ends_of_template(tokenizer) == [START, END]


@pytest.mark.parametrize("name", ["after each", "refuses", "with a system message only"])
def test_other_templates_stay(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES[name][0]
    assert with_end(tokenizer) is None and teach_ends(tokenizer) == []
    assert tokenizer.chat_template == TEMPLATES[name][0]


def test_the_first_line_break_of_a_template_stays_as_it_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "\n  {% if true %}\n{% endif %} " + TEMPLATES["none"][0]
    before = show(tokenizer, MESSAGES[:1])
    teach_ends(tokenizer)
    assert show(tokenizer, MESSAGES[:1]) == before


def test_inference_adopts_the_end_only_of_a_run_that_taught_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = tokenizer.chat_template = TEMPLATES["none"][0]
    taught = with_end(tokenizer)
    for left, expected in ((None, own), ("{{ messages }}", own), (own, own), (taught, taught)):
        tokenizer.chat_template = own
        if left is not None:
            (tmp_path / "chat_template.jinja").write_text(left, encoding="utf-8", newline="")
        adopt_end(tokenizer, tmp_path)
        assert tokenizer.chat_template == expected


# ------------------------------------------------------------------------------------------------ what was learned


def test_learned_ends_are_the_added_tokens_where_learned_parts_end(tokenizer: PreTrainedTokenizerFast) -> None:
    # Row 1: two answers, of which one ends with START and one with a word. Row 2: all learned, the end is the last token.
    rows = {
        "input_ids": [[1, 50, 51, 1, 52, 53, 54], [60, 61, 2], [70, 0, 71]],
        "labels": [[-100, -100, 51, 1, -100, 53, 54], [60, 61, 2], [-100, 0, 71]],
    }
    data = DataConfig(validation_fraction=0.0, max_length=8)
    blocks = make_blocks(DatasetDict(train=Dataset.from_dict(rows)), tokenizer, data, 0)["train"]
    assert learned_ends(blocks, tokenizer) == {START, END}  # 0 is followed by a learned token, 54 and 71 are words
    text = DatasetDict(train=Dataset.from_dict({"input_ids": rows["input_ids"]}))
    assert learned_ends(make_blocks(text, tokenizer, data, 0)["train"], tokenizer) == set()


def test_an_adapters_end_tokens_are_checked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert adapter_ends(tmp_path, tokenizer) == adapter_ends(None, tokenizer) == []
    for content, expected in (('{"eos_token_id": 7}', [7]), ('{"eos_token_id": [2, 9]}', [2, 9]), ("{}", [])):
        path.write_text(content)
        assert adapter_ends(tmp_path, tokenizer) == expected
        (tmp_path / "checkpoint-3").mkdir(exist_ok=True)
        assert adapter_ends(tmp_path / "checkpoint-3", tokenizer) == expected
    for content, problem in (
        ('{"eos_token_id": [2, 4096]}', "expected ids of the tokenizer, got 4096"),
        ('{"eos_token_id": [true]}', "expected at most 100 token ids, got"),
        ('{"eos_token_id": "2"}', "expected at most 100 token ids, got '2'"),
        ('{"eos_token_id": -1}', "expected at most 100 token ids, got -1"),
        (json.dumps({"eos_token_id": list(range(101))}), "expected at most 100 token ids"),
        ("[2]", "cannot read"),
        ("[" * 100_000, "cannot read"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"^--adapter: .*generation_config.json.*") as caught:
            adapter_ends(tmp_path, tokenizer)
        assert problem in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ a whole run


@pytest.fixture
def odd_base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model whose turns end with a token of another name, which is not its end of sequence token."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_end|>", "<end_of_turn>"), encoding="utf-8")
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<end_of_turn>"]}),
        ("config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(found | changes), encoding="utf-8")
    return folder


def test_answers_stop_where_training_ended_them(
    odd_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "messages": [{"role": "user", "content": "Which bird waits?"}, {"role": "assistant", "content": "The heron."}]
    }
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 24)
    flags = ["--config", str(train_qlora.Path(train_qlora.__file__).parent / "tiny" / "config.yaml")]
    flags += ["--model_name", str(odd_base), "--dataset", str(tmp_path / "chats.jsonl"), "--max_length", "64"]
    flags += ["--batch_size", "4", "--max_steps", "15", "--output_dir", str(tmp_path / "out"), "--eval_steps", "15"]
    assert train_qlora.main(flags) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [DOCUMENT, END]}
    # our own generation, alone and in batches
    adapter = ["--adapter", str(tmp_path / "out")]
    (tmp_path / "q.txt").write_text("Which bird waits?\n" * 3)
    how = ["--temperature", "0", "--max_new_tokens", "20"]
    capfd.readouterr()
    text = ["--mode", "text", "--prompt", "Which bird waits?"]
    assert inference_example.main([*adapter, *text, *how]) == 0
    answer = capfd.readouterr().out.strip()
    assert answer == "The heron."
    batch = ["--mode", "text", "--prompts", str(tmp_path / "q.txt"), "--output", str(tmp_path / "a.jsonl")]
    assert inference_example.main([*adapter, *batch, *how]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == [answer] * 3
    # plain transformers on the merged folder
    assert inference_example.main([*adapter, "--mode", "merge", "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [DOCUMENT, END]
    ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    new = merged.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert new == [*tokenizer(answer)["input_ids"], END]
    # with the adapter's file alone, the fast decoder stops there too
    config = load_config(
        tmp_path / "out" / "config.yaml", {"generation.temperature": 0, "generation.max_new_tokens": 20}
    )
    live, tokenizer = inference_example.load(config, tmp_path / "out")
    model = inference_example.attach(live, tmp_path / "out", config.model.name)
    fast = inference_example.Generator(model, print, fast=True)
    monkeypatch.setattr(inference_example, "Generator", lambda *_: fast)
    engine = inference_example.create_engine(model, tokenizer, False, tmp_path / "out")
    watch = inference_example.Watch()
    assert fast.decoder and engine.ends == [DOCUMENT, END]
    rows = [ids[0].tolist(), ids[0].tolist()]
    assert inference_example.generate_ids(engine, rows, config.generation, watch, batch=2) == [new, new]
