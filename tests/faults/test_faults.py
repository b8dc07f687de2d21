"""Runs that are killed, stopped, starved of disk or of sound numbers: what they leave and how they go on."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import config
import train_qlora
from toolkit import checkpoints as checkpoints_module
from toolkit import startup
from toolkit.checkpoints import LOCK, Log, locked, read_checkpoint, save_adapter
from toolkit.earlier_run import checkpoints
from toolkit.plain_values import PlainLoader

ROOT = Path(__file__).resolve().parents[2]
STEP = train_qlora.training_step
SHORT = ("--max_length", 32, "--rank", 4, "--logging_steps", 1)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ kills


@pytest.mark.faults
@pytest.mark.minutes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_broken_runs_leave_what_unbroken_ones_leave():
    """Killed, stopped and starved of disk, on the plain and the fused path; see campaign.py for a hundred."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "campaign.py"), "--steps", "6", "--most", "1"]
    halves = [["--runs", "4", "--signal", "KILL"], ["--runs", "1", "--signal", "TERM", "INT", "FSIZE"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    running = [subprocess.Popen([*command, *half], **pipes) for half in halves]  # one a core
    for campaign, runs, kinds in zip(running, (4, 1), (1, 3), strict=True):
        out, err = campaign.communicate(timeout=300)
        counts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert campaign.returncode == 0 and len(counts) == kinds, out + err
        for found in counts:
            assert (found["identical"], found["damaged"], found["tracebacks"], found["problems"]) == (runs, 0, 0, [])
            assert found.get("signals", runs) >= runs


# ------------------------------------------------------------------------------------------------ one run a folder


def test_second_run_in_a_folder_is_refused_and_the_first_goes_on(train, capsys, monkeypatch):
    """From within a step of the first, another one is started there."""
    codes = []

    def step(session, number, *rest):
        if not codes:
            before = capsys.readouterr()
            monkeypatch.setattr(train_qlora, "training_step", STEP)
            codes.append(train(*SHORT)[0])
            found = capsys.readouterr()
            codes.append(found.err.splitlines())
            assert before and "Device" not in found.out  # before anything is loaded
        return STEP(session, number, *rest)

    monkeypatch.setattr(train_qlora, "training_step", step)
    code, folder = train(*SHORT)
    assert code == 0 and codes[0] == 2
    assert codes[1] == [
        f"error: training.output_dir: another run is writing in {folder}; wait until it ends, or stop it"
    ]
    assert not (folder / LOCK).exists()


def test_refused_run_lets_go_of_the_folder(train, tmp_path):
    assert train("--target_modules", "[query]", output_dir=tmp_path / "a" / "b")[0] == 2
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a"):
        pass


# ------------------------------------------------------------------------------------------------ disk


@pytest.fixture
def limited() -> Callable[[int], None]:
    """A function that lets no file grow past a size, until the end of the test or 0."""
    resource = pytest.importorskip("resource")  # Windows has no such limits
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or hard, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_periodic_checkpoint_that_cannot_be_written_does_not_end_the_run(train, monkeypatch, capsys, limited):
    """The disk is full at step 2 and has room again at step 3: said, the old one kept, and a whole run in the end."""

    def step(session, number, *rest):
        limited(20_000 if number == 1 else 0)
        return STEP(session, number, *rest)

    monkeypatch.setattr(train_qlora, "training_step", step)
    code, folder = train(*SHORT, "--save_steps", 1, "--validation_fraction", 0)
    assert code == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "not written" in line]
    assert line.startswith("step 2: checkpoint not written (") and line.endswith("; checkpoint-1 is intact")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-1"]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("size", [1, 20_000, 400_000])
def test_run_that_the_disk_ends_can_go_on(train, tmp_path, monkeypatch, capsys, limited, size):
    """No file may pass this size from step 2 on: log, picture, adapter or state fail; exit 1, and then bit for bit."""
    flags = (*SHORT, "--max_steps", 4, "--save_steps", 1)
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0

    def step(session, number, *rest):
        limited(size if number else 0)
        return STEP(session, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "training_step", step)
        capsys.readouterr()
        code, folder = train(*flags)
    limited(0)
    found = capsys.readouterr()
    printed = found.out + found.err
    assert code == 1 and "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1, printed
    assert not list(folder.glob(".*")), "no half files, no lock"
    for checkpoint in checkpoints(folder):
        read_checkpoint(checkpoint)
    assert checkpoints(folder)[0].name == "checkpoint-1"
    assert train(*flags)[0] == 0
    assert f"resuming from {folder / 'checkpoint-1'}" in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "checkpoint-4/training_state.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_stop_whose_checkpoint_cannot_be_written_is_a_failure(train, monkeypatch, capsys, limited):
    """Exit codes 130 and 143 promise a checkpoint to go on from."""

    def step(session, number, *rest):
        if number == 1:
            limited(100_000)  # which the picture and the log do not reach
            os.kill(os.getpid(), 2)
        return STEP(session, number, *rest)

    monkeypatch.setattr(train_qlora, "training_step", step)
    code, folder = train(*SHORT, "--save_steps", 1)
    assert code == 1
    assert said(capsys).startswith("step 2: checkpoint not written")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1"]


def test_finished_run_without_room_for_a_checkpoint_has_its_adapter(train, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    assert train(*SHORT, output_dir=tmp_path / "whole")[0] == 0
    monkeypatch.setattr(checkpoints_module, "write_checkpoint", full)
    code, folder = train(*SHORT)
    assert code == 1 and said(capsys).endswith("there is no checkpoint yet; the adapter is complete")
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_adapter_of_before_stays_until_the_new_one_is_whole(train, monkeypatch, limited):
    """A longer run over a finished one, and no room for its adapter."""
    code, folder = train(*SHORT)
    before = (folder / "adapter_model.safetensors").read_bytes()
    real = save_adapter

    def save(*arguments):
        limited(200_000)
        real(*arguments)

    monkeypatch.setattr(checkpoints_module, "save_adapter", save)
    assert code == 0 and train(*SHORT, "--max_steps", 4)[0] == 1
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    limited(0)
    monkeypatch.setattr(checkpoints_module, "save_adapter", real)
    assert train(*SHORT, "--max_steps", 4)[0] == 0
    assert (folder / "adapter_model.safetensors").read_bytes() != before


# ------------------------------------------------------------------------------------------------ numbers


def said(capsys) -> str:
    """The one line about what went wrong."""
    found = capsys.readouterr()
    assert "Traceback" not in found.out + found.err
    (line,) = [line for line in (found.out + found.err).splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_gradients_that_do_not_reach_the_adapter_are_an_error(train, monkeypatch, capsys):
    def step(session, number, *rest):
        for name, parameter in session.model.named_parameters():
            if "lora_B" in name:
                parameter.register_hook(torch.zeros_like)
        return STEP(session, number, *rest)

    monkeypatch.setattr(train_qlora, "training_step", step)
    code, folder = train(*SHORT)
    assert code == 1 and not (folder / "adapter_model.safetensors").exists()
    line = said(capsys)
    assert line.startswith("step 1: every gradient of lora_B is zero") and line.endswith("no checkpoint yet")


def test_weights_that_are_not_finite_are_said_to_be_the_bases(train, tiny_model, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _ = train(*SHORT, "--model_name", model)
    assert code == 1
    assert said(capsys).startswith(
        "step 0: the validation loss is nan, before anything was learned: look at model.name"
    )
    flags = ("--model_name", model, "--validation_fraction", 0, "--compute_dtype", "bfloat16")
    code, _ = train(*SHORT, *flags, output_dir=tmp_path / "two")
    line = said(capsys)
    assert code == 1 and line.startswith("step 1: loss nan") and "torch.bfloat16" in line
    # each with its place and text
    assert len(re.findall(r"\d+ \(\w+\.txt rows? \d+.*?: .*? …\)", line.split("look at its blocks: ")[1])) == 4


def test_float16_that_overflows_at_every_scale_stops(train, monkeypatch, capsys):
    """The scaler halves its scale and leaves out the step, but not for ever."""

    def step(session, number, *rest):
        if number == 0:
            session.learner.parameters[-1].register_hook(lambda gradient: gradient * math.inf)
        return STEP(session, number, *rest)

    monkeypatch.setattr(train_qlora, "training_step", step)
    flags = ("--compute_dtype", "float16", "--max_length", 8, "--validation_fraction", 0, "--batch_size", 1)
    code, _ = train(*flags, "--gradient_accumulation_steps", 1, "--max_steps", 30)
    assert code == 1
    assert said(capsys).startswith("step 17: loss")  # 2**6 halved 16 times


# ------------------------------------------------------------------------------------------------ trust


def test_nothing_in_the_toolkit_reads_a_pickle_or_unsafe_yaml():
    """No module imports pickle or its like, calls torch.load, eval or exec, or reads YAML by an unsafe loader."""
    for path in [path for folder in (".", "toolkit", "fast_path", "tiny") for path in ROOT.glob(f"{folder}/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"torch.load", "eval", "exec", "yaml.unsafe_load", "yaml.full_load"}, (path, name)
                if name == "yaml.load":
                    assert ast.unparse(node.args[1]) == "PlainLoader" and issubclass(PlainLoader, yaml.SafeLoader)


WATCHED: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    if WATCHED is not None and event == "pickle.find_class":
        WATCHED.append(f"{arguments[0]}.{arguments[1]}")


def test_resuming_and_loading_unpickle_nothing(train, tmp_path):
    """Seen by Python's own audit of every class that a pickle looks up."""
    global WATCHED
    code, folder = train(*SHORT)
    sys.addaudithook(watch)
    WATCHED = []
    try:
        assert code == 0 and train(*SHORT, "--max_steps", 4)[0] == 0
        assert train_qlora.main(["--evaluate", "--adapter", str(folder)]) == 0
    finally:
        found, WATCHED = WATCHED, None
    assert not found


TOKEN = "hf_" + "aB3dE5gH" * 4


def test_tokens_are_in_no_line_and_no_file(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
    secrets = (TOKEN, "0123456789abcdef", "not-of-the-usual-form", "user:password")
    text = " ".join(secrets[:3]) + " at https://user:password@example.org/data"
    log = Log(silent=False)
    log.open(tmp_path)
    log.say(text)
    startup.report(config.ConfigError(text))
    found = capsys.readouterr()
    for place in (found.out, found.err, (tmp_path / "training_log.txt").read_text(encoding="utf-8")):
        assert "https://***@example.org/data" in place
        assert not any(secret in place for secret in secrets)
    code, folder = train(*SHORT)
    assert code == 0
    for content in files_of(folder).values():
        assert not any(secret.encode() in content for secret in secrets)


def test_redacting_leaves_other_words_alone():
    for text in ("hf_hub", "step 4/4 | loss 5.95", "/home/me/hf_cache/models", "https://huggingface.co/a@b", "a@b.c"):
        assert startup.redact(text) == text
