"""Run folders that a stranger could send: checkpoints whose checksums fit what was done to them, and odd files."""

import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.adversary import LAST, ROOT, Attack, Ground, train
from toolkit.checkpoints import read_checkpoint, write_checkpoint
from toolkit.earlier_run import FILES

Build = Callable[[Path, Ground], Attack]
DAMAGED, REFUSED = "checkpoint-2 is damaged", "training.resume: "


def same_adapter(ground: Ground) -> Callable:
    """Return a check that the run ended in the adapter of the undisturbed one."""

    def check(folder: Path, ended: Any) -> list[str]:
        adapter = folder / "output" / "adapter_model.safetensors"
        return [] if adapter.is_file() and adapter.read_bytes() == ground.expected else ["another adapter"]

    return check


def on_files(change: Callable[[Path], object], *, says: str = DAMAGED, harmless: bool = True) -> Build:
    """Return an attack that changes files below output. harmless: whether the run still has to end as undisturbed."""

    def build(folder: Path, ground: Ground) -> Attack:
        change(ground.copy("unfinished", folder / "output"))
        if harmless:
            return train(*LAST, says=says, codes=(0,), check=same_adapter(ground))
        return train(*LAST, says=says, codes=(2,))

    return build


def rewrite(output: Path, change: Callable[[dict, dict], object]) -> None:
    """Change adapter and state of checkpoint-2, with checksums that fit afterwards."""
    checkpoint = output / "checkpoint-2"
    adapter, state = read_checkpoint(checkpoint)
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    change(adapter, state)
    write_checkpoint(output, 2, adapter, config, state, 9)


def on_state(change: Callable[[dict, dict], object], says: str = REFUSED, harmless: bool = False) -> Build:
    """Return an attack that changes the adapter and the state of checkpoint-2."""
    return on_files(lambda output: rewrite(output, change), says=says, harmless=harmless)


def put(*keys: object, value: object, says: str = REFUSED) -> Build:
    """Return an attack that sets one value of the state, given by its keys."""

    def change(adapter: dict, state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return on_state(change, says)


@functools.cache
def in_8_bit(unfinished: Path) -> Path:
    """Return the folder of a run of 2 steps whose optimizer has 8-bit states, which small tensors do not get."""
    folder = unfinished.parent / "in 8 bit"
    flags = [str(flag) for flag in train("--rank", 64, "--output_dir", folder).flags]
    subprocess.run([sys.executable, str(ROOT / "train_qlora.py"), *flags], check=True, capture_output=True)
    (folder / "adapter_model.safetensors").unlink()
    return folder


def on_8_bit(change: Callable[[dict], object]) -> Build:
    """Return an attack that changes the state of each 8-bit parameter."""

    def build(folder: Path, ground: Ground) -> Attack:
        output = shutil.copytree(in_8_bit(ground.unfinished), folder / "output")

        def each(adapter: dict, state: dict) -> None:
            found = [kept["__bnb_optimizer_quant_state__"] for kept in state["optimizer"]["state"].values()]
            for kept in (kept for kept in found if "qmap1" in kept):
                change(kept)

        rewrite(output, each)
        return train(*LAST, "--rank", 64, says=f"{REFUSED}.*optimizer.state", codes=(2,))

    return build


def first(state: dict) -> dict:
    """Return the tensors of the optimizer's first parameter."""
    return state["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]


def first_name(adapter: dict) -> str:
    return next(iter(adapter))


def sums_fit(checkpoint: Path) -> None:
    """Make the checksums fit the files."""
    sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES}
    (checkpoint / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")


def tree(text: str) -> Build:
    """Return an attack that replaces checkpoint-2's training_state.json, checksum and all."""

    def change(output: Path) -> None:
        (output / "checkpoint-2" / "training_state.json").write_text(text, encoding="utf-8")
        sums_fit(output / "checkpoint-2")

    return on_files(change)


def instead(name: str, make: Callable[[Path], object], **keywords: Any) -> Build:
    """Return an attack that puts something else in the place of a file or folder of the run."""

    def change(output: Path) -> None:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return on_files(change, **keywords)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def renamed(to: str) -> Build:
    return on_files(lambda output: os.rename(output / "checkpoint-2", output / to), says="resuming from")


def beside(name: str, says: str) -> Build:
    """Return an attack with an empty folder that has a checkpoint's name or almost."""
    return on_files(lambda output: (output / name).mkdir(), says=says)


def cast(adapter: dict, dtype: torch.dtype) -> None:
    for name, tensor in adapter.items():
        adapter[name] = tensor.to(dtype)


def row(**values: object) -> Build:
    """Return an attack that changes the last row of the history."""
    return on_state(lambda adapter, state: state["progress"]["history"][-1].update(values))


PARAMETER = ("optimizer", "state", 0)
MOMENTS = (*PARAMETER, "__bnb_optimizer_quant_state__")

ATTACKS: dict[str, Build] = {
    # 8-bit states, which bitsandbytes' C code reads and writes as they are
    "absmax emptied": on_8_bit(lambda kept: kept.update(absmax1=torch.zeros(0), absmax2=torch.zeros(0))),
    "qmap emptied": on_8_bit(lambda kept: kept.update(qmap1=torch.zeros(0), qmap2=torch.zeros(0))),
    "qmap of other values": on_8_bit(lambda kept: kept.update(qmap1=kept["qmap1"].flip(0))),
    "8-bit state too short": on_8_bit(lambda kept: kept.update(state1=kept["state1"].flatten()[:1].clone())),
    "8-bit state as float": on_8_bit(lambda kept: kept.update(state1=kept["state1"].float())),
    "absmax too long": on_8_bit(lambda kept: kept.update(absmax1=torch.zeros(10**6))),
    "absmax negative": on_8_bit(lambda kept: kept.update(absmax2=-kept["absmax2"] - 1)),
    "absmax missing": on_8_bit(lambda kept: kept.pop("absmax1")),
    # other tensors of the optimizer
    "moment emptied": put(*MOMENTS, "state1", value=torch.zeros(0)),
    "moment of another shape": put(*MOMENTS, "state2", value=torch.zeros(3, 5)),
    "moment int64": on_state(lambda a, s: first(s).update(state1=first(s)["state1"].long())),
    "moment float64": on_state(lambda a, s: first(s).update(state1=first(s)["state1"].double())),
    "moment NaN": on_state(lambda a, s: first(s)["state1"].fill_(math.nan)),
    "moment infinite": on_state(lambda a, s: first(s)["state2"].view(-1)[-1:].fill_(math.inf)),
    "second moment negative": on_state(lambda a, s: first(s)["state2"].fill_(-1.0)),
    "moment a number": put(*MOMENTS, "state1", value=5),
    "moment a list": put(*MOMENTS, "state1", value=[1.0, 2.0]),
    "moment unheard of": put(*MOMENTS, "state3", value=torch.zeros(3)),
    "moments missing": on_state(lambda a, s: s["optimizer"]["state"][0].pop("__bnb_optimizer_quant_state__")),
    "moments not a mapping": put(*MOMENTS, value=7),
    "parameter missing": on_state(lambda a, s: s["optimizer"]["state"].pop(0)),
    "parameter too many": put("optimizer", "state", 10**6, value={"step": 2}),
    "parameter true": on_state(lambda a, s: s["optimizer"]["state"].update({True: s["optimizer"]["state"].pop(1)})),
    "optimizer without state": put("optimizer", "state", value={}),
    "optimizer a list": put("optimizer", value=[]),
    "optimizer's step huge": put(*PARAMETER, "step", value=2**40),
    "optimizer's step of another": put(*PARAMETER, "step", value=1),
    "optimizer's step a tensor": put(*PARAMETER, "step", value=torch.tensor(2)),
    # what the configuration decides is not read from a checkpoint
    "betas of the groups": on_state(
        lambda a, s: s["optimizer"]["param_groups"][0].update(betas=[9.0, "x"], eps=math.nan, lr=1e30),
        says="resuming from",
        harmless=True,
    ),
    "no groups": on_state(lambda a, s: s["optimizer"].pop("param_groups"), says="resuming from", harmless=True),
    "rates of the schedule": on_state(
        lambda a, s: s["scheduler"].update(base_lrs=[1e30], lr_lambdas=[{"__class__": 5}], _step_count="x"),
        says="resuming from",
        harmless=True,
    ),
    # the adapter
    "adapter tensor missing": on_state(lambda a, s: a.pop(first_name(a))),
    "adapter tensor renamed": on_state(lambda a, s: a.update(x=a.pop(first_name(a)))),
    "adapter tensor too many": on_state(lambda a, s: a.update(x=torch.zeros(2))),
    "adapter of another shape": on_state(lambda a, s: a.update({first_name(a): torch.zeros(2, 2)})),
    "adapter int8": on_state(lambda a, s: cast(a, torch.int8)),
    "adapter bfloat16": on_state(lambda a, s: cast(a, torch.bfloat16)),
    "adapter NaN": on_state(lambda a, s: a[first_name(a)].fill_(math.nan)),
    "best adapter empty": put("best_adapter", value={}),
    "best adapter of other shapes": on_state(lambda a, s: s["best_adapter"].update({first_name(a): torch.zeros(1, 1)})),
    "best adapter of numbers": put("best_adapter", value={"x": 5}),
    "held-out losses of another shape": put("held_out", "base", value=torch.zeros(1, 2, dtype=torch.float64)),
    "held-out losses NaN": on_state(lambda a, s: s["held_out"]["base"].fill_(math.nan)),
    "held-out losses zero": on_state(lambda a, s: s["held_out"]["base"].zero_()),
    "held-out losses of a third": on_state(lambda a, s: s["held_out"].update(x=s["held_out"]["base"].clone())),
    # numbers of the loop
    "step of another": put("progress", "step", value=1),
    "step huge": put("progress", "step", value=10**30),
    "step negative": put("progress", "step", value=-2),
    "step true": put("progress", "step", value=True),
    "step a text": put("progress", "step", value="2"),
    "step null": put("progress", "step", value=None),
    "tokens negative": put("progress", "tokens", value=-1),
    "loss NaN": put("progress", "loss_sum", value=math.nan),
    "seconds negative": put("progress", "seconds", value=-1e9),
    "best loss of no evaluation": put("progress", "best_loss", value=-5.0),
    "best step in the future": put("progress", "best_step", value=99),
    "worse huge": put("progress", "worse", value=10**9),
    "history null": put("progress", "history", value=None),
    "history of numbers": put("progress", "history", value=[1, 2]),
    "history from the future": row(step=3),
    "history with text": row(tokens="many"),
    "history with NaN": row(learning_rate=math.nan),
    "history with a list": row(epoch=[[]]),
    "evaluation NaN": on_state(lambda a, s: s["progress"]["history"][0].update(eval_loss=math.nan)),
    "unknown progress": put("progress", "__class__", value="x"),
    "schedule elsewhere": put("scheduler", "last_epoch", value=-7),
    "scaler of float16": put("scaler", value={"scale": math.inf}),
    "scaler null": put("scaler", value=None),
    "unknown part": put("plugins", value={"import": "os"}),
    "shape of text": put("shape", "window", value="4"),
    "shape huge": put("shape", "micro_batch", value=10**30),
    "settings nested": put("config", "lora.rank", value=[[[[[[[[[[4]]]]]]]]]]),
    "settings of numbers": put("config", value={1: 2}),
    "fingerprint empty": put("fingerprint", value={}),
    "fingerprint of another base": put(
        "fingerprint", "weights", value="0" * 64, says="model.name: its content has changed"
    ),
    "fingerprint of other data": put(
        "fingerprint", "data", value="0" * 64, says="data.dataset: its content has changed"
    ),
    "fingerprint of numbers": put("fingerprint", "model", value=5),
    # JSON
    "state of 100,000 brackets": tree("[" * 100_000),
    "state of 100,000 objects": tree('{"a":[],"b":' * 100_000),
    "state empty": tree(""),
    "state a number": tree("7"),
    "state NaN": tree("NaN"),
    "state a huge number": tree("9" * 10_000),
    "state names a tensor twice": tree('{"items": [["a", {"tensor": "0 state.x"}], ["b", {"tensor": "0 state.x"}]]}'),
    "state names a list as a tensor": tree('{"tensor": [1]}'),
    "state with odd items": tree('{"items": [[[1], 2]]}'),
    "state with control characters": tree('{"\x1b[2J": 1}'),
    "checksums of 100,000 brackets": instead("checkpoint-2/checksums.json", lambda p: p.write_text("[" * 100_000)),
    "checksums null": instead("checkpoint-2/checksums.json", lambda p: p.write_text("null")),
    "checksums large": instead("checkpoint-2/checksums.json", lambda p: p.write_text("[" + "1," * 10**6 + "1]")),
    "tensors not named": on_files(
        lambda output: (
            shutil.copy(
                output / "checkpoint-2" / "adapter_model.safetensors",
                output / "checkpoint-2" / "training_state.safetensors",
            ),
            sums_fit(output / "checkpoint-2"),
        )
    ),
    # links, pipes and folders
    "broken link to the adapter": instead("checkpoint-2/adapter_model.safetensors", link("/nonexistent")),
    "broken link to the state": instead("checkpoint-2/training_state.json", link("/nonexistent")),
    "broken link to the checksums": instead("checkpoint-2/checksums.json", link("/nonexistent")),
    "link to a device": instead("checkpoint-2/training_state.json", link("/dev/zero")),
    "pipe as state": instead("checkpoint-2/training_state.json", os.mkfifo),
    "pipe as tensors": instead("checkpoint-2/training_state.safetensors", os.mkfifo),
    "pipe as checksums": instead("checkpoint-2/checksums.json", os.mkfifo),
    "folder as the adapter": instead("checkpoint-2/adapter_model.safetensors", Path.mkdir),
    "checkpoint a file": instead("checkpoint-2", lambda path: path.write_text("x")),
    "checkpoint a pipe": instead("checkpoint-2", os.mkfifo),
    "checkpoint a link to nowhere": instead("checkpoint-2", link("/nonexistent")),
    "checkpoint a link to itself": instead("checkpoint-2", link("checkpoint-2")),
    "lock a pipe": instead(".lock", os.mkfifo, says="training.output_dir: ", harmless=False),
    "lock a link out": instead(".lock", link("../outside"), says="training.output_dir: ", harmless=False),
    "lock a folder": instead(".lock", Path.mkdir, says="training.output_dir: ", harmless=False),
    "log a pipe": instead("training_log.txt", os.mkfifo, says="training.output_dir: ", harmless=False),
    "log a link out": instead("training_log.txt", link("../outside"), says="training.output_dir: ", harmless=False),
    "log a folder": instead("training_log.txt", Path.mkdir, says="training.output_dir: ", harmless=False),
    "metrics a link out": instead("metrics.jsonl", link("../outside"), says="resuming from"),
    "metrics a folder": instead("metrics.jsonl", Path.mkdir, says="training.output_dir: ", harmless=False),
    "metrics hostile": instead("metrics.jsonl", lambda path: path.write_text("[" * 10**6), says="resuming from"),
    "config.yaml hostile": instead(
        "config.yaml", lambda path: path.write_text("a: !!python/object:os.system {}"), says="resuming from"
    ),
    "curves a folder": instead("training_curves.png", Path.mkdir, says="training.output_dir: ", harmless=False),
    "card a link out": instead("README.md", link("../outside"), says="resuming from"),
    "leftover a link out": instead(".writing-adapter", link(".."), says="resuming from"),
    "leftover a link of a checkpoint": instead(".writing-checkpoint-3", link(".."), says="resuming from"),
    "leftover to put back": instead(".replaced-checkpoint-1", link(".."), says="resuming from"),
    "leftover a pipe": instead(".writing-metrics.jsonl", os.mkfifo, says="resuming from"),
    # names
    "checkpoint-0": beside("checkpoint-0", "resuming from .*checkpoint-2"),
    "checkpoint--1": beside("checkpoint--1", "resuming from .*checkpoint-2"),
    "checkpoint of a huge step": beside("checkpoint-99999999999999999999", "checkpoint-9+ is damaged"),
    "checkpoint of 200 digits": beside(f"checkpoint-{'9' * 200}", "is damaged"),
    "renamed to a huge step": renamed("checkpoint-99999999999999999999"),
    "renamed with zeros": renamed("checkpoint-002"),
}
