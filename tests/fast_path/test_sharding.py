"""A base divided among processes learns what a whole one does: two gloo processes and one, through the real entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# Blocks of 34 tokens, five of them: the last step of an epoch has one block, so one process has none.
FLAGS = ["--compute_dtype", "float32", "--max_length", 34, "--batch_size", 1, "--gradient_accumulation_steps", 4]
FLAGS += ["--logging_steps", 1, "--compile", "off", "--dropout", 0.05, "--max_steps", 3, "--max_train_samples", 13]


def run(*flags, processes=2, code=0):
    """Run train_qlora.py in some processes and return what it printed on both streams."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    argv = [ROOT / "train_qlora.py", "--config", ROOT / "tiny" / "config.yaml", *flags]
    command = [*(launch if processes > 1 else [sys.executable]), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row.get("loss", row.get("eval_loss")) for row in rows]


def adapters_apart(one, two):
    """Return the distance of two adapters, relative to the size of the first."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    squares = sum((a[name] - b[name]).double().square().sum() for name in a)
    return (squares / sum(a[name].double().square().sum() for name in a)).sqrt().item()


def test_a_divided_base_learns_what_a_whole_one_does(train, corpus, tmp_path):
    """Fused operators and checkpointed layers, packed blocks, evaluation, dropout; a process without a block in one step."""
    flags = [*FLAGS, "--dataset", corpus, "--fused_lora", "on", "--gradient_checkpointing", "true"]
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    said = run(*flags, "--shard_base", "true", "--output_dir", tmp_path / "two")
    assert "fused_lora" in said and "base divided among 2 processes" in said and "Warning" not in said, said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert adapters_apart(tmp_path / "one", tmp_path / "two") < 1e-3  # AdamW in 8 bit rounds differences up
    blocks = int(re.search(r"tokens in (\d+) blocks of 34", said)[1])
    assert blocks < 16 and blocks % 4 == 1, "the test needs steps of one block"
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.long
def test_a_divided_run_continues_whole_and_a_whole_one_divided(corpus, tmp_path):
    """The checkpoints are the same: weights, fingerprint, optimizer. Plain layers, and --evaluate of the result."""
    flags = [*FLAGS, "--dataset", corpus, "--save_steps", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags, "--output_dir", one, processes=1)
    run(*flags, "--output_dir", two, "--shard_base", "true")
    for folder, processes, sharded in ((one, 2, "true"), (two, 1, "false")):
        again = tmp_path / f"{folder.name}_again"
        start = folder / "checkpoint-2"
        said = run(*flags, "--output_dir", again, "--resume", start, "--shard_base", sharded, processes=processes)
        assert "at step 2" in said, said
        assert losses(again) == pytest.approx(losses(one), rel=1e-5)
        assert adapters_apart(one, again) < 1e-3
    found = []
    for processes, sharded in ((1, "false"), (2, "true")):
        again = ["--evaluate", "--adapter", two, "--dataset", corpus, "--shard_base", sharded]
        run(*again, "--compute_dtype", "float32", processes=processes)
        found.append(json.loads((two / "evaluation.json").read_text(encoding="utf-8")))
    assert found[1]["adapter"]["loss"] == pytest.approx(found[0]["adapter"]["loss"], rel=1e-6)
    assert found[1]["base"]["loss"] == pytest.approx(found[0]["base"]["loss"], rel=1e-6)


def test_one_process_cannot_divide_a_base(train, capsys):
    code, folder = train("--shard_base", "true")
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 2 and not folder.exists()
    assert line.startswith(
        "error: performance.shard_base: expected two or more processes, got one: start them with torchrun"
    )


@pytest.mark.parametrize("flags", [("--use_dora", "true"), ("--load_in_4bit", "false"), ("--experts", "cpu")])
def test_what_a_divided_base_cannot_be_combined_with(train, capsys, flags):
    assert train("--shard_base", "true", *flags)[0] == 2
    assert "error: performance.shard_base: expected false with use_dora: true" in capsys.readouterr().err
