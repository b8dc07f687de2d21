"""What a run and a merge leave, in the hands of other engines: llama.cpp, transformers serve, lm-evaluation-harness, peft.

    QLORA_INTEROP=/tmp/interop QLORA_INTEROP_MODELS=/models/smollm2:/models/qwen-coder-0.5b \
        python -m pytest -m interop -s -n 0 tests/interop

QLORA_INTEROP names a folder for the engines' environments, which needs the package registries and node, and is made
once. Lines that begin with "interop:" are the result; docs/deploy.md has them. Not part of CI.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.interop import environments
from tests.interop.environments import run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("QLORA_INTEROP", ""))
MODELS = [Path(name) for name in os.environ.get("QLORA_INTEROP_MODELS", "").split(os.pathsep) if name]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not MODELS or Path("") == FOLDER, reason="QLORA_INTEROP and QLORA_INTEROP_MODELS are not set"),
]
TOKENS = 32
TEXTS = ["The lighthouse stood on a cliff above the sea, and", "def add(a, b):\n    return"]
QUESTIONS = ["What is the capital of France?", "Say hello."]
CHATS = [
    ("What is the capital of France?", "Paris."),
    ("Say hello.", "Hello!"),
    ("What is 2 + 2?", "4."),
    ("Name a colour.", "Blue."),
]
FLAGS = ["--compute_dtype", "float32", "--max_length", "64", "--batch_size", "1", "--gradient_accumulation_steps", "1"]
FLAGS += ["--optim", "adamw_torch", "--learning_rate", "1e-3", "--max_steps", "3", "--max_eval_samples", "1"]


def say(line: str) -> None:
    print(f"\ninterop: {line}", flush=True)


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def model(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def made(model) -> dict[str, Path]:
    """Two adapters of a model, trained by the toolkit, and the first of them merged; kept for the next call."""
    place = FOLDER / "made" / model.name
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CHATS * 5]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "empty.yaml").write_text("{}\n")
    folders = {name: place / name for name in ("r8", "r16", "merged")}
    start = [sys.executable, ROOT / "train_qlora.py", "--config", place / "empty.yaml", "--model_name", model, *FLAGS]
    for name in ("r8", "r16"):
        if not (folders[name] / "adapter_model.safetensors").is_file():
            data = [
                "--dataset",
                place / "chats.jsonl",
                "--rank",
                name[1:],
                "--seed",
                name[1:],
                "--output_dir",
                folders[name],
            ]
            run(*start, *data, cwd=place)
    if not folders["merged"].is_dir():
        words = [
            "--mode",
            "merge",
            "--merge_base",
            "original",
            "--adapter",
            folders["r8"],
            "--output",
            folders["merged"],
        ]
        run(sys.executable, ROOT / "inference_example.py", *words, "--compute_dtype", "float32", cwd=place)
    return folders


def prompts(folder: Path) -> list[list[int]]:
    """Return the tokens of plain texts, then those of chats up to where the answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return found + [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


@torch.inference_mode()
def ours(model, ids: list[int]) -> tuple[list[int], list[int]]:
    """Return TOKENS greedy tokens after a prompt, up to an end token, and the ids of the end tokens."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    # generate() fills what is not given from the model's file, and Qwen's has a repetition penalty.
    model.generation_config = GenerationConfig(eos_token_id=ends)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0)
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return model.generate(torch.tensor([ids]), attention_mask=mask, generation_config=config)[
        0, len(ids) :
    ].tolist(), ends


@torch.inference_mode()
def gap(model, ids: list[int]) -> tuple[float, float]:
    """Return how far the two likeliest logits after these tokens are apart, and the error that f16 makes in logits there."""
    exact = model.float()(torch.tensor([ids])).logits[0, -1].float()
    half = model.half()(torch.tensor([ids])).logits[0, -1].float()
    top = exact.topk(2).values
    return float(top[0] - top[1]), float((half - exact).abs().max())


def compare(name: str, model, asked: list[list[int]], found: dict) -> None:
    """Fail where llama.cpp's tokens are not ours, unless they part where f16 cannot tell the two likeliest ones apart."""
    for number, (ids, theirs) in enumerate(zip(asked, found["answers"], strict=True)):
        expected, ends = ours(model, ids)
        mine = expected[:-1] if expected[-1] in ends else expected
        same = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
        )
        ended = f", ends by itself after {len(theirs)}" if found["ended"][number] else ""
        if mine == theirs:
            say(f"{name}, prompt {number + 1}: {len(theirs)} greedy tokens equal to ours{ended}")
            continue
        apart, error = gap(model, ids + mine[:same])
        say(
            f"{name}, prompt {number + 1}: {same} tokens equal; then the two likeliest are {apart:.4f} apart, f16's error is {error:.4f}"
        )
        assert apart < 2 * error, (mine, theirs)


def to_gguf(script: str, folder: Path, target: Path, *more: object) -> Path:
    if not target.is_file():
        program = environments.python(FOLDER)
        run(program, environments.converters(FOLDER) / script, folder, "--outtype", "f16", "--outfile", target, *more)
    return target


def test_llama_cpp_runs_the_merged_model(model, made):
    gguf = to_gguf("convert_hf_to_gguf.py", made["merged"], made["merged"].with_suffix(".gguf"))
    asked = prompts(made["merged"])
    found = environments.llama(FOLDER, gguf, asked, TOKENS)
    plain = AutoModelForCausalLM.from_pretrained(made["merged"], dtype=torch.float16)
    compare(f"llama.cpp, merged {model.name}", plain, asked, found)
    assert any(found["ended"][len(TEXTS) :]), "no chat ended by itself"


def test_llama_cpp_runs_the_adapter_as_lora(model, made):
    base = to_gguf("convert_hf_to_gguf.py", model, made["r8"].with_name("base.gguf"))
    lora = to_gguf("convert_lora_to_gguf.py", made["r8"], made["r8"].with_suffix(".gguf"), "--base", model)
    asked = prompts(model)
    found = environments.llama(FOLDER, base, asked, TOKENS, lora)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    without = [ours(plain, ids)[0] for ids in asked]
    both = PeftModel.from_pretrained(plain, made["r8"]).half().eval()
    assert [ours(both, ids)[0] for ids in asked] != without, "the adapter changes nothing here, so it proves nothing"
    compare(f"llama.cpp, {model.name} + LoRA", both, asked, found)


def test_transformers_serve_answers_an_openai_client(model, made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = environments.python(FOLDER)
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    start = "from transformers.cli.transformers import main; main()"  # what the command `transformers` runs
    command = [str(program), "-c", start, "serve", str(made["merged"]), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    client = (
        "import sys, openai\n"
        f"client = openai.OpenAI(base_url='http://127.0.0.1:{port}/v1', api_key='none', max_retries=0, timeout=240)\n"
        f"chat = client.chat.completions.create(model={str(made['merged'])!r}, max_tokens={TOKENS}, temperature=0, "
        f"messages=[{{'role': 'user', 'content': {QUESTIONS[0]!r}}}])\n"
        "print(chat.choices[0].message.content)"
    )
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        answer = run(program, "-c", client).strip()
    finally:
        server.terminate()
        server.wait(30)
    plain = AutoModelForCausalLM.from_pretrained(made["merged"])
    tokenizer = AutoTokenizer.from_pretrained(made["merged"])
    expected = tokenizer.decode(ours(plain, prompts(made["merged"])[len(TEXTS)])[0], skip_special_tokens=True).strip()
    say(f"transformers serve, merged {model.name}: {answer!r}, ours in bf16 {expected!r}")
    assert answer and answer[:5] == expected[:5]


TASK = """task: interop_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_the_evaluation_harness_runs_both(model, made, tmp_path):
    rows = [
        ("What is the capital of France?", [" Paris.", " Rome."], 0),
        ("What is 2 + 2?", [" 7.", " 4."], 1),
        ("What colour is grass?", [" Green.", " Purple."], 0),
    ]
    lines = [json.dumps({"question": q, "choices": c, "label": i}) + "\n" for q, c, i in rows]
    (tmp_path / "capitals.jsonl").write_text("".join(lines))
    (tmp_path / "interop_capitals.yaml").write_text(TASK.format(data=tmp_path / "capitals.jsonl"))
    program = environments.python(FOLDER)
    kinds = {"merged": f"pretrained={made['merged']}", "base + adapter": f"pretrained={model},peft={made['r8']}"}
    scores = {}
    for kind, arguments in kinds.items():
        out = tmp_path / kind.replace(" ", "")
        words = ["--model", "hf", "--model_args", f"{arguments},dtype=float32", "--tasks", "interop_capitals"]
        words += ["--include_path", tmp_path, "--device", "cpu", "--batch_size", "1", "--output_path", out]
        run(
            program.with_name("lm_eval"),
            "run",
            *words,
            cwd=tmp_path,
            env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        )
        [result] = out.rglob("results*.json")
        scores[kind] = json.loads(result.read_text())["results"]["interop_capitals"]["acc,none"]
    say(
        f"lm-evaluation-harness, {model.name}: "
        + ", ".join(f"{kind} acc {score:.2f}" for kind, score in scores.items())
    )
    assert scores["merged"] == scores["base + adapter"]


@torch.inference_mode()
def test_plain_peft_loads_mixes_and_merges_our_adapters(model, made):
    ids = torch.tensor([prompts(model)[0]])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = base(ids).logits
    both = PeftModel.from_pretrained(base, made["r8"], adapter_name="r8").eval()
    one = both(ids).logits
    both.load_adapter(made["r16"], adapter_name="r16")
    both.set_adapter("r16")
    two = both(ids).logits
    both.add_weighted_adapter(["r8", "r16"], [0.5, 0.5], "mix", combination_type="cat")
    both.set_adapter("mix")
    mixed = both(ids).logits
    layer = both.base_model.model.model.layers[0].self_attn.q_proj
    expected = 0.5 * layer.get_delta_weight("r8") + 0.5 * layer.get_delta_weight("r16")
    assert torch.allclose(layer.get_delta_weight("mix"), expected, atol=1e-6)
    weight = layer.base_layer.weight + expected
    merged = both.merge_and_unload()
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, weight, atol=1e-6)
    error = float((merged(ids).logits - mixed).abs().max() / mixed.abs().max())
    say(
        f"peft, {model.name}: load_adapter, add_weighted_adapter, merge_and_unload; logits {error:.1e} of the largest apart"
    )
    assert error < 1e-2 and min(float((a - b).abs().max()) for a, b in ((plain, one), (one, two), (one, mixed))) > 1e-2
