"""Experts in main memory, in whole runs on a GPU: they train, resume, evaluate, answer and merge as experts on the GPU do."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import inference_example
import train_qlora
from tests.families import build
from toolkit.checkpoints import checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU the experts lie in main memory anyway"),
]
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four layers, whose sizes the kernels and torch's grouped product take."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, eos_token_id=2, pad_token_id=0,
        initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]


def distance(one: Path, other: Path) -> float:
    """Return how far two adapters are apart, of the size of the first one's B, which begin at 0."""
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    apart = sum(float((mine[name] - theirs[name]).norm() ** 2) for name in mine)
    return (apart / sum(float(tensor.norm() ** 2) for name, tensor in mine.items() if "lora_B" in name)) ** 0.5


FLAGS = ("--target_modules", ATTENTION, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1)


@pytest.mark.parametrize("parts", ["on", "off"])
def test_a_run_with_experts_in_main_memory_is_the_one_with_experts_on_the_gpu(mixture, train, tmp_path, parts, capfd):
    """parts: compiled and captured with the copies of experts, or neither. With adapters on attention and dropout."""
    switches = ("--compile", parts, "--cuda_graphs", parts)
    flags = ("--model_name", mixture, *FLAGS, *switches, "--lora.dropout", 0.05)
    flags = (*flags, "--deterministic", "true")
    here, apart = tmp_path / "gpu", tmp_path / "cpu"
    for place, output in (("gpu", here), ("cpu", apart)):
        assert train(*flags, "--experts", place, output_dir=output)[0] == 0, capfd.readouterr().err
    print("losses", losses(here), losses(apart), "adapters apart", distance(here, apart))
    assert losses(apart) == pytest.approx(losses(here), rel=1e-3) and distance(here, apart) < 0.02
    found = []
    for place in ("gpu", "cpu"):
        assert train_qlora.main(["--evaluate", "--adapter", str(apart), "--experts", place]) == 0
        found.append(json.loads((apart / "evaluation.json").read_text())["adapter"]["loss"])
    print("evaluated", found)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_it_answers_and_merges_the_same(mixture, train, tmp_path, capfd):
    flags = ("--model_name", mixture, *FLAGS, "--compile", "off")
    code, output = train(*flags, "--experts", "cpu")
    assert code == 0, capfd.readouterr().err
    answers = []
    for place in ("gpu", "cpu"):
        capfd.readouterr()
        command = [
            "--mode",
            "text",
            "--adapter",
            output,
            "--experts",
            place,
            "--temperature",
            0,
            "--max_new_tokens",
            24,
        ]
        assert inference_example.main(list(map(str, [*command, "--prompt", "What is it?", "--raw"]))) == 0
        answers.append(capfd.readouterr().out)
        command = ["--mode", "merge", "--adapter", output, "--experts", place, "--output", tmp_path / f"merged-{place}"]
        assert inference_example.main(list(map(str, command))) == 0
    assert answers[0] == answers[1] and answers[0].strip()
    here, apart = (load_file(tmp_path / f"merged-{place}" / "model.safetensors") for place in ("gpu", "cpu"))
    assert here.keys() == apart.keys() and all(torch.equal(here[name], apart[name]) for name in here)


@pytest.mark.parametrize(
    "family, flags",
    [
        ("mixture", ("--experts", "cpu", "--target_modules", ATTENTION)),
        ("mixture", ("--experts", "gpu", "--target_modules", "all-linear", "--dropout", 0)),
        ("llama4_text", ("--experts", "16bit", "--target_modules", ATTENTION)),
        ("mixture", ("--experts", "16bit", "--target_modules", ATTENTION)),
    ],
)
def test_a_run_that_was_stopped_goes_on(family, flags, mixture, train, tmp_path, monkeypatch):
    """Experts in main memory, adapters on experts, experts in 16 bit: as the run without a stop."""
    folder = mixture if family == "mixture" else build(family, tmp_path / "model")
    flags = ("--model_name", folder, *flags, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1)
    flags = (*flags, "--deterministic", "true")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(*flags, output_dir=whole)[0] == 0
    step = train_qlora.training_step

    def stopping(*given, **named):
        result = step(*given, **named)
        stopping.calls += 1
        if stopping.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    stopping.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "training_step", stopping)
        assert train(*flags, output_dir=halves)[0] == 130
    assert [path.name for path in checkpoints(halves)] == ["checkpoint-3"]
    assert train(*flags, output_dir=halves)[0] == 0
    print("losses", losses(whole), losses(halves), "adapters apart", distance(whole, halves))
    assert distance(whole, halves) < 1e-3
