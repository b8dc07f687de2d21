"""A base divided among processes learns what a whole one does: two gloo processes and one, through the real entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fast_path import sharding
from tests.benchmarks import bench_sharding

ROOT = Path(__file__).resolve().parents[2]
# Blocks of 34 tokens, five of them: the last step of an epoch has one block, so one process has none.
FLAGS = ["--compute_dtype", "float32", "--max_length", 34, "--batch_size", 1, "--gradient_accumulation_steps", 4]
FLAGS += ["--logging_steps", 1, "--compile", "off", "--dropout", 0.05, "--max_steps", 3, "--max_train_samples", 13]


# Forks the processes of each run, as torchrun starts them, from one that has imported the script: imports take most of the time.
PROGRAM = """
import json, os, socket, sys
import train_qlora
for processes, argv in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                if rank and "DIES" in os.environ:
                    own = train_qlora.Learner.micro_step
                    dies = lambda self, step, *rest: own(self, step, *rest) if step < 2 else os.kill(os.getpid(), 9)
                    train_qlora.Learner.micro_step = dies
            code = 1
            try:
                code = train_qlora.main(argv)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
"""


def run(*runs, dies=False):
    """Run train_qlora.py for each (processes, flags), one after the other, and return what all printed.

    dies: the second process kills itself in its third step.
    """
    config = ["--config", ROOT / "tiny" / "config.yaml"]
    argvs = [(processes, list(map(str, [*config, *FLAGS, *flags]))) for processes, flags in runs]
    command = [sys.executable, "-c", PROGRAM, json.dumps(argvs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"DIES": "1"} if dies else {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", timeout=600)
    assert (done.returncode == 0) != dies, done.stdout + done.stderr
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


DIVIDED = ("--shard_base", "true")


def test_a_divided_base_learns_what_a_whole_one_does(corpus, tmp_path):
    """Fused operators and checkpointed layers, packed blocks, evaluation, dropout; a process without a block in one step."""
    flags = ["--dataset", corpus, "--fused_lora", "on", "--gradient_checkpointing", "true", "--output_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    said = run((1, [*flags, one]), (2, [*flags, two, *DIVIDED]))
    assert said.count("fused_lora") == 2 and said.count("base divided among 2 processes") == 1, said
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert adapters_apart(one, two) < 1e-3  # AdamW in 8 bit rounds differences up
    (blocks,) = set(re.findall(r"tokens in (\d+) blocks of 34", said))
    assert int(blocks) < 12 and int(blocks) % 4 == 1, "the test needs a step of one block"
    files = [{path.name for path in folder.iterdir()} for folder in (one, two)]
    assert files[0] == files[1]


@pytest.mark.long
def test_a_divided_run_continues_whole_and_a_whole_one_divided(corpus, tmp_path):
    """The checkpoints are the same: weights, fingerprint, optimizer. Plain layers, and --evaluate of the result."""
    flags = ["--dataset", corpus, "--save_steps", 2, "--output_dir"]
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    run((1, [*flags, one]), (2, [*flags, two, *DIVIDED]), (2, [*flags, three]))
    assert losses(two) == losses(three) and adapters_apart(two, three) == 0, (
        "two whole bases and a divided one: the same bits"
    )
    found = []
    for folder, processes, more in ((one, 2, DIVIDED), (two, 1, ())):
        again = tmp_path / f"{folder.name}_again"
        said = run((processes, [*flags, again, "--resume", folder / "checkpoint-2", *more]))
        assert "at step 2" in said, said
        assert losses(again) == pytest.approx(losses(one), rel=1e-5)
        assert adapters_apart(one, again) < 1e-3
        run((processes, ["--evaluate", "--adapter", two, "--dataset", corpus, *more]))
        found.append(json.loads((two / "evaluation.json").read_text(encoding="utf-8")))
    for name in ("base", "adapter"):
        assert found[1][name]["loss"] == pytest.approx(found[0][name]["loss"], rel=1e-6)


@pytest.mark.long
def test_a_process_that_dies_inside_a_layer_leaves_a_checkpoint(corpus, tmp_path):
    """The others notice it while they gather a layer, name it, and write the last complete step."""
    said = run((2, ["--dataset", corpus, "--output_dir", tmp_path / "out", *DIVIDED]), dies=True)
    assert re.search(r"^error: rank 1 \(.*\) has ended; checkpoint-2 is intact; to continue: ", said, re.M), said
    assert "Traceback" not in said and (tmp_path / "out" / "checkpoint-2").is_dir()


@pytest.mark.long
def test_a_base_stored_in_4_bit_is_divided_while_it_is_read(tmp_path, corpus):
    """Its layers' weights are cut before the next is read; the steps are those of two whole bases, bit for bit."""
    folder = tmp_path / "packed"
    folder.mkdir()
    sizes = {**bench_sharding.LLAMA_70B, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
    assert bench_sharding.write_packed(folder, sizes, 3, 60, "cpu") == 3
    flags = ["--model_name", folder, "--dataset", corpus, "--fused_lora", "on", "--output_dir"]
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    run((2, [*flags, whole]), (2, [*flags, divided, *DIVIDED]))
    assert losses(divided) == losses(whole) and adapters_apart(whole, divided) == 0


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


@pytest.mark.parametrize("plugin", ["fsdp", "deepspeed"])
def test_a_plugin_of_accelerate_is_refused(train, capsys, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin.upper()}", "true")
    code, folder = train()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and not folder.exists()
    assert line.startswith(f"error: accelerate launch --use_{plugin}: expected a launch without it; to divide the base")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which copies in another way than a CPU")
def test_a_gpu_copies_every_pattern_of_bytes_as_fsdp2_does():
    """With the operators that FSDP2 gathers with; as bfloat16 each NaN would become the same one."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).repeat_interleave(2).view(torch.uint8)
    codes = torch.cat([codes, codes.flip(0)]).cuda()
    changed = {}
    for dtype in (sharding.STORED, torch.bfloat16):
        share = codes.view(dtype)
        copied, halves = torch.empty_like(share), torch.empty(2, len(share) // 2, dtype=dtype, device="cuda")
        torch._foreach_copy_([copied], [share])
        torch.ops.fsdp.split_with_sizes_copy(
            share.view(1, -1), [len(share) // 2] * 2, dim=1, out=list(halves.unsqueeze(1))
        )
        changed[dtype] = [int((found.view(torch.uint8).view(-1) != codes).sum()) for found in (copied, halves)]
    assert changed[sharding.STORED] == [0, 0], changed
    assert changed[torch.bfloat16][0] > 0, "if no type changes bytes any more, the float32 is not needed"
