"""The processes of one launch: what two of them do that one does not."""

import dataclasses
import json
import math
import os
import random
import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from config import Config, ConfigError
from tests.faults.launches import LAUNCH, ROOT, launch, left_running
from toolkit import processes, run_state
from toolkit.earlier_run import checkpoints, common_settings, step_of
from toolkit.machine import create_accelerator, device_block
from toolkit.run_commands import answer, commands_of
from toolkit.startup import launcher_started

SHORT = ["--max_length", 32, "--rank", 4, "--compute_dtype", "float32", "--optim", "adamw_torch", "--logging_steps", 1]
SHORT += ["--batch_size", 2, "--gradient_accumulation_steps", 2, "--compile", "off"]


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row.get("loss", row.get("eval_loss")) for row in rows]


def distance(folder: Path, other: Path) -> float:
    """Return how far two adapters are apart, relative to their size."""
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert mine.keys() == theirs.keys()
    apart = sum((mine[name] - theirs[name]).square().sum().item() for name in mine)
    return (apart / sum(tensor.square().sum().item() for tensor in theirs.values())) ** 0.5


# ------------------------------------------------------------------------------------------------ alone


def test_alone_every_function_is_a_plain_call():
    tensor, error = torch.ones(3), ValueError("own")
    assert processes.gathered((7,)) == [[7]]  # as JSON reads it back, so that one process sees what several do
    assert processes.is_first() and not processes.several()
    assert processes.first_alone(lambda: 5) == 5
    assert processes.sum_in_place(tensor) is tensor and tensor.tolist() == [1, 1, 1]
    processes.take_from_first([tensor])
    processes.refuse_differences({"lora.rank": 4})
    with pytest.raises(ValueError, match="own") as found, processes.together():
        raise error
    assert found.value is error
    assert tensor.tolist() == [1, 1, 1]


def test_what_processes_say_is_said_once_and_names_the_rank():
    failures = {0: ("refused", ["lora.rank: 5"]), 2: ("refused", ["lora.rank: 6", "data.dataset: gone"])}
    assert processes._lines(failures) == ["lora.rank: 5", "rank 2: data.dataset: gone"]
    assert processes._lines({1: ("refused", ["lora.rank: 5"])}) == ["rank 1: lora.rank: 5"]


def test_the_rank_that_ran_out_of_memory_is_named():
    assert processes.where(torch.OutOfMemoryError("rank 3: CUDA out of memory")) == " on rank 3"
    assert processes.where(torch.OutOfMemoryError("CUDA out of memory")) == ""


def test_a_launch_whose_processes_do_not_come_is_refused(monkeypatch):
    with_port = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in with_port.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOIN", 1)
    with pytest.raises(ConfigError, match="rank 1 of 2 announced processes cannot reach the others at 127.0.0.1"):
        processes.join()


# ------------------------------------------------------------------------------------------------ restarts


def test_a_restart_meets_nothing_of_the_start_before_it():
    """torchrun keeps its store; what earlier processes wrote there, under whatever names, reaches nobody."""
    store = dist.HashStore()
    store.set("start", "old")
    for rank in (1, 2):
        dist.PrefixStore("old", store).set(f"here/{rank}", f"old {rank}")
        dist.PrefixStore("old", store).set(f"greeted/old {rank}", "1")
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(processes._without_what_has_been, store, rank, 3) for rank in (1, 2)]
        time.sleep(0.3)  # both have found the old start, which greets neither
        assert not any(found.done() for found in late)
        found = [pool.submit(processes._without_what_has_been, store, 0, 3), *late]
        parts = [each.result(timeout=10) for each in found]
    parts[0].set("address", "new")
    assert [part.get("address") for part in parts] == [b"new"] * 3
    assert not store.check(["address"]) and not dist.PrefixStore("old", store).check(["address"])


@pytest.mark.parametrize(("since_launch", "resume"), [(-5.0, "never"), (5.0, "never"), (5.0, "checkpoint-1")])
def test_overwrite_and_resume_count_for_the_first_start(since_launch, resume, tmp_path, monkeypatch):
    """Where a machine joins, torchrun starts all again and counts no restart: the run that is under way must go on."""
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setattr(
        run_state, "launcher_started", lambda: (tmp_path / "config.yaml").stat().st_mtime - since_launch
    )
    training = dataclasses.replace(Config().training, output_dir=str(tmp_path), resume=resume)
    config, overwrite = run_state.as_of_this_start(dataclasses.replace(Config(), training=training), True)
    begun = since_launch > 0
    assert (config.training.resume, overwrite) == (("auto", False) if begun else (resume, True))


def test_a_process_without_torchrun_overwrites(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    training = dataclasses.replace(Config().training, output_dir=str(tmp_path))
    config = dataclasses.replace(Config(), training=training)
    assert launcher_started() == math.inf and run_state.as_of_this_start(config, True) == (config, True)


def test_the_launcher_is_the_process_that_started_this_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    assert launcher_started() == psutil.Process(os.getppid()).create_time() < time.time()


# ------------------------------------------------------------------------------------------------ launches


def test_accelerate_that_starts_one_of_several_is_refused(monkeypatch):
    """`accelerate launch --num_processes 2` without two GPUs starts one process, and says so by nothing but an address."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="starts one without --multi_gpu: add --multi_gpu"):
        create_accelerator(Config().training)


def test_what_accelerate_launch_asks_for_in_vain_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert "not used" not in device_block(torch.device("cpu"), torch.float32, 2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    said = device_block(torch.device("cpu"), torch.float32, 2)
    assert "--mixed_precision fp16 is not used: quantization.compute_dtype decides" in said
    assert "--dynamo_backend inductor is not used: performance.compile decides" in said


def test_processes_that_do_different_things_are_refused(monkeypatch):
    """The commands that are no settings are compared too; two with one list of flags are the same."""
    import train_qlora

    tiny = ["--config", str(ROOT / "tiny" / "config.yaml")]
    train, evaluate, plan = (
        commands_of(train_qlora.parse([*tiny, *more])[0])
        for more in ([], ["--evaluate"], ["--plan", "--processes", "2"])
    )
    assert train == commands_of(train_qlora.parse(["--rank", "5", *tiny])[0]) and json.loads(json.dumps(train)) == train
    for other, problem in ((evaluate, "--evaluate"), (plan, "--plan")):
        monkeypatch.setattr(processes, "gathered", lambda value, other=other: [value, other])
        with pytest.raises(ConfigError, match=f"{problem}: expected the same for all processes, got False for rank 0"):
            processes.refuse_differences(train)


def test_one_folder_may_have_two_paths():
    """Machines may mount it at different places: whether it is one folder is tried, not read."""
    names = common_settings(Config())
    assert "training.output_dir" not in names and "model.name" not in names and "training.resume" in names


def test_of_several_processes_one_lists_and_uploads_runs(tmp_path, monkeypatch, capsys):
    options = SimpleNamespace(runs=str(tmp_path), push=None)
    monkeypatch.setenv("RANK", "1")
    assert answer(options) == 0 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--runs: no run"):
        answer(options)


def test_inference_is_one_process(monkeypatch):
    import inference_example

    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="expected to be the only process, got one of 2"):
        inference_example.refuse_launcher()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        inference_example.refuse_launcher()
    assert ended.value.code == 2


# ------------------------------------------------------------------------------------------------ two

# What is done to the second process, or to the first, at the third step; tests/faults/launches.py runs it.
FAILURES = {
    "config": ("", 2, r"^error: training.learning_rate: expected the same .* 0.004 for rank 0 and 0.1 for rank 1$"),
    "folder": ("", 2, r"^error: rank 1: training.output_dir: expected one folder that all processes see"),
    "data": ("", 2, r"^error: data.dataset: content: expected the same for all processes"),
    "full": ("", 3, r"^error: out of GPU memory .*checkpoint-2 is intact.*rank 1: made up"),
    "error": ("checkpoint-2", 1, r"^error: rank 1 \(.*, process \d+\) has failed: RuntimeError: made up; checkpoint-2"),
}


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault",
    ["folder", *(pytest.param(name, marks=pytest.mark.long) for name in FAILURES if name != "folder")],
)
def test_what_one_of_two_meets_ends_both(fault, corpus, tmp_path):
    left, code, says = FAILURES[fault]
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 4, "--save_steps", 2]
    done = launch(fault, flags, tmp_path / "output")
    text = done.stdout + done.stderr
    assert len(re.findall(says, text, re.M)) == 1, text
    assert re.findall(r"exitcode  : (-?\d+)", text) == [str(code)] * 2, text
    assert len(re.findall("^error: ", text, re.M)) == 1, text
    assert (tmp_path / "output").exists() == (code != 2)
    if left:
        assert [folder.name for folder in checkpoints(tmp_path / "output")] == [left]
    assert not left_running(tmp_path)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes that are forked, since imports take long")
def test_a_random_process_is_killed_at_a_random_time(corpus, tmp_path, train, forker):
    """Twice; the other one ends within a minute and leaves the last step, from which the next launch goes on."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 20, "--save_steps", 9, "--eval_steps", 20]
    argv = ["--config", ROOT / "tiny" / "config.yaml", *flags]
    output, seed, reached = tmp_path / "output", time.time_ns(), 0
    chance = random.Random(seed)
    for _ in range(2):
        rank, after = chance.randrange(2), chance.uniform(0, 0.1)
        ended = forker.run(
            "kill_one_of_two", list(map(str, [rank, after, output, *argv])), tmp_path, dict(os.environ), None, 120
        )
        codes, seconds = json.loads(ended.stdout.splitlines()[-1])
        said = f"seed {seed}: {ended.stdout}{ended.stderr}"
        assert codes[rank] == -9 and codes[1 - rank] == 1 and seconds < 60, said
        assert re.search(
            rf"^error: rank {rank} \(.*\) has ended; checkpoint-\d+ is intact", ended.stdout + ended.stderr, re.M
        )
        found = step_of(checkpoints(output)[0])
        shown = max(int(step) for step in re.findall(r"^step (\d+)/20", ended.stdout, re.M))
        assert found >= shown > reached, said
        reached = found
    assert train(*flags, output_dir=output)[0] == 0
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    assert losses_of(output) == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    assert distance(output, tmp_path / "whole") < 1e-4


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize(("fault", "rank"), [("full", 1), ("full", 0), ("error", 1), ("hang", 1), ("die", 0)])
def test_what_one_of_two_meets_within_a_divided_layer_ends_both(fault, rank, corpus, tmp_path):
    """The other one waits in a layer for weights; it is told, names the reason and writes the last step."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 4, "--shard_base", "true"]
    start = time.monotonic()
    done = launch(fault, flags, tmp_path / "output", rank, SILENT="5")
    text = done.stdout + done.stderr
    assert time.monotonic() - start < 100
    why = {
        "full": "ran out of GPU memory with a divided base, use .*: made up",
        "error": "has failed: RuntimeError: made up",
    }
    why |= {"hang": "has not answered for 5 s", "die": "has ended"}
    assert (
        len(re.findall(rf"^error: rank {rank} \(.*\) {why[fault]}; checkpoint-2 is intact; to continue", text, re.M))
        == 1
    )
    assert len(re.findall("^error: ", text, re.M)) == 1, text
    assert [folder.name for folder in checkpoints(tmp_path / "output")] == ["checkpoint-2"]
    assert not left_running(tmp_path)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize(("fault", "rank"), [("hang", 1), ("hang", 0)])
def test_a_process_that_hangs_ends_all_within_a_minute(fault, rank, corpus, tmp_path, train):
    """It is named and killed, and the other one leaves a checkpoint of the last step, from which one process continues."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 4]
    start = time.monotonic()
    done = launch(fault, flags, tmp_path / "output", rank, ANSWER="2")
    assert time.monotonic() - start < 100  # of it the imports on a busy core; see ANSWER and ROLL_CALL for the rest
    assert re.search(
        rf"^error: rank {rank} \(.*\) has not answered for \d+ s; checkpoint-2 is intact",
        done.stdout + done.stderr,
        re.M,
    )
    assert [folder.name for folder in checkpoints(tmp_path / "output")] == ["checkpoint-2"] and not left_running(
        tmp_path
    )
    assert train(*flags, output_dir=tmp_path / "output")[0] == 0
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    assert losses_of(tmp_path / "output") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    assert distance(tmp_path / "output", tmp_path / "whole") < 1e-4


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes that are forked, since imports take long")
def test_out_of_memory_on_one_reshapes_both(corpus, tmp_path, train, forker):
    """In training and in an evaluation; losses and adapter are those of one process, with dropout."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 3, "--lora.dropout", 0.05]
    argv = ["reshape", 1, tmp_path / "two", "--config", ROOT / "tiny" / "config.yaml", *flags]
    done = forker.run("forked", list(map(str, argv)), tmp_path, dict(os.environ), None, 120)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert (
        "out of GPU memory on rank 1 with micro-batch 2, " in text and "repeating the step with micro-batch 1" in text
    )
    assert "an evaluation ran out of memory; repeating it with 1 sequence at a time" in text
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_packed_chats_and_a_resume_with_another_number_of_processes(dropout, chats, tmp_path, train):
    """Two processes, and two of which the run is continued by one, learn what one learns."""
    flags = [*SHORT, "--dataset", chats, "--lora.dropout", dropout, "--max_length", 64, "--save_steps", 1]
    assert train(*flags, "--max_steps", 5, output_dir=tmp_path / "whole")[0] == 0
    done = launch("none", [*flags, "--max_steps", 5], tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    again = tmp_path / "again"
    assert launch("signal", [*flags, "--max_steps", 5], again).returncode != 0  # two, stopped after the third step
    assert [folder.name for folder in checkpoints(again)] == ["checkpoint-3", "checkpoint-2"]
    assert train(*flags, "--max_steps", 5, output_dir=again)[0] == 0
    for other in ("two", "again"):
        assert losses_of(tmp_path / other) == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
        assert distance(tmp_path / other, tmp_path / "whole") < 1e-4


@pytest.mark.long
def test_two_processes_evaluate_as_one(chats, tmp_path, train):
    flags = ["--dataset", chats, "--max_length", 64, "--compute_dtype", "float32"]
    assert train(*SHORT, *flags, "--max_steps", 1, output_dir=tmp_path / "one")[0] == 0
    found = []
    for count in (1, 2):
        done = launch("none", [*flags, "--evaluate", "--adapter", tmp_path / "one"], tmp_path / "one", count=count)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("adapter - base: loss") == 1
        found.append(json.loads((tmp_path / "one" / "evaluation.json").read_text(encoding="utf-8")))
    for name in ("base", "adapter", "difference"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


@pytest.mark.long
def test_a_restart_goes_on_from_the_last_checkpoint(corpus, tmp_path, train):
    """torchrun --max-restarts: also where --overwrite was given, which counts for the first start."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 4]
    done = launch("restart", [*flags, "--overwrite"], tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("at step 2 of 4") == 1, done.stdout
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


@pytest.mark.long
def test_two_machines_on_loopback(corpus, tmp_path, train):
    """Two launchers of one process each, which meet at a port."""
    flags = [*SHORT, "--dataset", corpus, "--max_steps", 3]
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [
        ROOT / "train_qlora.py",
        "--config",
        ROOT / "tiny" / "config.yaml",
        *flags,
        "--output_dir",
        tmp_path / "two",
    ]
    command = [*LAUNCH, *meet, "--rdzv_endpoint", f"127.0.0.1:{port}", *argv]
    machines = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert sum("processes: 2" in text for text in said) == 1
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-4


# ------------------------------------------------------------------------------------------------ one GPU, two processes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which two processes share")
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_one_gpu_shared_by_two_processes_learns_what_one_does(path, corpus, tmp_path, random_models):
    """gloo sums the gradients, since NCCL refuses two processes on one GPU; each has its own graph and fused layers."""
    plain = ["--fused_lora", "off", "--compile", "off", "--cuda_graphs", "off"]
    flags = ["--dataset", corpus, "--model_name", random_models("qwen2"), "--max_length", 64, "--max_steps", 6]
    flags += ["--batch_size", 4, "--gradient_accumulation_steps", 2, "--logging_steps", 1, "--lora.dropout", 0.05]
    flags += ["--memory_limit_gib", 6, "--auto_fit", "false", *(plain if path == "plain" else [])]
    folders = [tmp_path / name for name in ("one", "two", "again")]
    for folder, count in zip(folders, (1, 2, 1), strict=True):
        done = launch("shared", flags, folder, count=count)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        line = re.search("^fast path: .*", text, re.M)[0]
        print(path, count, line, losses_of(folder), flush=True)
        assert path == "plain" or "cuda_graphs" in line.split("|")[0], line
        assert f"processes: {count}" in text
    print(path, "adapters apart:", distance(folders[1], folders[0]), "twice one:", distance(folders[2], folders[0]))
    assert losses_of(folders[1]) == pytest.approx(losses_of(folders[0]), rel=2e-3)  # bf16 products
    assert distance(folders[1], folders[0]) < 0.05
