"""Checkpoints that are complete or absent, what resume finds, and the two signals that end a run at a step boundary.

A checkpoint folder holds `adapter_model.safetensors`, `adapter_config.json` (so it is a peft adapter), `training_state.safetensors`
(optimizer states, best adapter), `training_state.json` (everything else) and, last, `checksums.json`. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TEMPORARY, REPLACED = ".writing-", ".replaced-"
FILES = ("adapter_model.safetensors", "adapter_config.json", "training_state.safetensors", "training_state.json")


# ------------------------------------------------------------------------------------------------ atomic files


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk and rename it, so that it is the old one or the new one."""
    temporary = path.with_name(TEMPORARY + path.name)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def clean_up(output_dir: Path) -> None:
    """Remove what a killed run left half written, and put back a checkpoint that it was about to replace."""
    for leftover in output_dir.glob(REPLACED + "*"):
        original = output_dir / leftover.name.removeprefix(REPLACED)
        if original.exists():
            shutil.rmtree(leftover)
        else:
            os.rename(leftover, original)
    for leftover in output_dir.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def flatten_state(state: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `state` as JSON can hold it, with each tensor moved to `tensors` and replaced by {"tensor": its name}."""
    if isinstance(state, torch.Tensor):
        name = f"{len(tensors)} {prefix}"  # numbered, since the keys 1 and "1", or "a.b" and b of a, read alike
        tensors[name] = (
            state.detach().cpu().clone().contiguous()
        )  # a copy: safetensors refuses two views of one storage
        return {"tensor": name}
    if isinstance(state, dict):
        return {"items": [[key, flatten_state(value, f"{prefix}.{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return [flatten_state(value, f"{prefix}.{i}", tensors) for i, value in enumerate(state)]
    return state


def restore_state(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo flatten_state; dictionaries keep the types of their keys, tuples come back as lists."""
    if isinstance(state, dict):
        if "tensor" in state:
            return tensors[state["tensor"]]
        return {key: restore_state(value, tensors) for key, value in state["items"]}
    if isinstance(state, list):
        return [restore_state(value, tensors) for value in state]
    return state


# ------------------------------------------------------------------------------------------------ checkpoints


def write_checkpoint(
    output_dir: Path, step: int, adapter: dict[str, torch.Tensor], adapter_config: dict, state: dict, keep: int
) -> Path:
    """Write output_dir/checkpoint-<step> and delete all but the newest `keep` complete ones; return its folder.

    state: nested dicts, lists, numbers, texts and tensors. The folder appears under its name only when all is on the disk.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f"{TEMPORARY}checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten_state(state, "state", tensors)
    contents = (
        save(adapter, metadata={"format": "pt"}),
        json.dumps(adapter_config, indent=2, sort_keys=True).encode(),
        save(tensors),
        json.dumps(tree).encode(),
    )
    files = dict(zip(FILES, contents, strict=True))
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["checksums.json"] = json.dumps(sums).encode()
    for name, content in files.items():
        write_atomically(temporary / name, content)
    replaced = output_dir / f"{REPLACED}checkpoint-{step}"
    if (
        final.exists()
    ):  # an earlier attempt at this step; no system's every file system can replace a folder in one call
        os.rename(final, replaced)
    os.rename(temporary, final)
    _flush_folder(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    found = checkpoints(output_dir)
    future = [
        folder for folder in found if step_of(folder) > step
    ]  # of a course that going back to this step abandoned
    for old in future + [folder for folder in found if folder not in future][keep:]:
        doomed = old.with_name(TEMPORARY + old.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)  # a half-deleted checkpoint must not look like one
        shutil.rmtree(doomed)
    return final


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # the rename itself is on the disk only then; Windows has no call for it
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name."""
    return int(CHECKPOINT.fullmatch(folder.name)[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in output_dir, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return (adapter, state) of a checkpoint; ValueError says what is damaged or missing."""
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        for name in FILES:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums[name]:
                raise ValueError(f"{name} does not match its checksum")
        tree = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        state = restore_state(tree, load_file(folder / "training_state.safetensors"))
        return load_file(folder / "adapter_model.safetensors"), state
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


def latest_checkpoint(
    output_dir: Path, say: Callable[[str], None]
) -> tuple[Path, dict[str, torch.Tensor], dict] | None:
    """Return the newest undamaged checkpoint as (folder, adapter, state); `say` gets a line for each that is skipped."""
    for folder in checkpoints(output_dir):
        try:
            return (folder, *read_checkpoint(folder))
        except ValueError as error:
            say(f"{folder.name} is damaged ({error}): skipped")
    return None


# ------------------------------------------------------------------------------------------------ signals


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or Ctrl-Break into a request that the loop reads at a step boundary; a second one exits at once."""
    request = StopRequest()

    def handle(signum: int, frame: Any) -> None:
        if request.signum is not None:
            os._exit(128 + signum)  # what was written is complete: files are renamed into place
        request.signum = signum
        say("stopping after this step; once more to exit at once")

    names = ("SIGINT", "SIGTERM", "SIGBREAK") if threading.current_thread() is threading.main_thread() else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
