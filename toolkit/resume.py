"""From which checkpoint a run continues, and whether its state is one that this run could have written.

The checksums beside a checkpoint's files show damage, but not who wrote the files, and bitsandbytes hands the tensors of
its optimizers to C code without looking at them. So every number is compared with its range, and every tensor with that
of a fresh state, before anything uses them.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from config import Config, ConfigError, TrainingConfig
from fast_path.optimizers import state_after_a_step
from fast_path.packed_weights import PIECES
from fast_path.sharding import whole_parameters
from toolkit.checkpoints import Progress, latest_checkpoint, read_checkpoint, refusing
from toolkit.data_blocks import Blocks
from toolkit.earlier_run import (
    all_damaged,
    changed_line,
    changed_settings,
    checkpoints,
    is_shallow,
    other_run,
    settings,
)

STATE = {"progress", "optimizer", "scheduler", "scaler", "best_adapter", "config", "fingerprint", "shape"}
SINCE = {"held_out", "effective"}  # not in the checkpoints of earlier versions
MOST = 2**31 - 1  # of a count: bitsandbytes' C code takes the step as a 32-bit number
FIRST_SCALE = 2.0**6  # of gradients in float16
Found = tuple[Path, dict[str, torch.Tensor], dict]  # a checkpoint: its folder, adapter and state

# ------------------------------------------------------------------------------------------------ the checkpoint


def find_checkpoint(training: TrainingConfig, overwrite: bool, say: Callable[[str], None]) -> Found | None:
    """Return the checkpoint to continue from as (folder, adapter, state), or None to start at step 0.

    The numbers in its state are checked, its tensors are not: see check_tensors.
    """
    if overwrite or training.resume == "never":
        return None
    output_dir, folder = Path(training.output_dir), Path(training.resume)
    if training.resume == "auto":
        if (found := latest_checkpoint(output_dir, say)) is None and checkpoints(output_dir):
            raise all_damaged(output_dir)
    else:
        with refusing(f"training.resume: cannot continue from {folder}", ValueError):
            found = (folder, *read_checkpoint(folder))
    if found is not None:
        with from_elsewhere(found[0]):
            check_numbers(found[2])
    return found


EXPERTS = "quantization.experts"
# Inputs of a run: their name, their keys in `fingerprint`, and the settings that change them.
CONTENTS = (
    # an adapter renames the weights it is attached to
    ("model.name", ("model", "weights"), ("model.", "quantization.", "lora.")),
    ("data.dataset", ("data",), ("data.", "training.seed", "model.")),  # the tokens depend on the tokenizer
    ("the tokenizer", ("tokenizer",), ("model.",)),
)


def check_resumable(state: dict, config: Config, prints: dict[str, str], sequences_per_step: int, name: str) -> None:
    """Raise a ConfigError if something has changed that a resumed run must not change.

    It names each changed setting with its value in checkpoint `name` and now. Changed content (model, data, tokenizer)
    is named only if no changed setting explains it. A hash that the checkpoint lacks, since it is older, is not compared.
    """
    before, now, then = state["config"], settings(config), state["fingerprint"]
    changes = changed_settings(before, config, (state["shape"]["window"], sequences_per_step), name)
    contents = {}
    for key, parts, causes in CONTENTS:
        same = all(then.get(part, prints[part]) == prints[part] for part in parts)
        if same or any(changed.startswith(causes) for changed in changes):
            continue
        if key == "model.name" and "16bit" in {before.get(EXPERTS, now[EXPERTS])} ^ {now[EXPERTS]}:
            key = EXPERTS  # it may change where a model has no experts, or had them in 16 bit before there was this setting
        if key in now and before.get(key) != now[key]:
            changes[key] = changed_line(key, before.get(key), now[key], name)
        else:
            # A mixture's experts were in 16 bit before 2026-11-29.
            packing = (
                ", or an older version left its experts in 16 bit (--experts 16bit)" if key == "model.name" else ""
            )
            contents[key] = f"{key}: its content has changed since {name} was written{packing}"
    if changes or contents:
        raise other_run([*changes.values(), *contents.values()], config.training)


def restore_schedule(scheduler: Any, optimizer: Any, step: int) -> None:
    """Set the learning rate to that of a step of this run's schedule, which may be longer than the checkpoint's."""
    rates = [rate * schedule(step) for rate, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    now = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | now)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ------------------------------------------------------------------------------------------------ fingerprints


def fingerprint(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, blocks: dict[str, Blocks | None]
) -> dict[str, str]:
    """Return hashes of the base's weights, the tokenizer and the blocks, to detect changes.

    model: of the first 256 elements of each weight, which is all that checkpoints from before 2026-11-29 have. weights:
    of a sum over all of each weight and of a sample spread over it. Another format of the hash gets another name, and
    the ones before it stay, so that older runs can continue.
    """
    first, whole, tokens = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for name, parameter in whole_parameters(model):
        if not parameter.requires_grad:
            first.update(name.encode() + _bytes_of(parameter.detach().flatten()[:256]))
            state = getattr(parameter, "quant_state", None)
            scales = (state.absmax, getattr(state.state2, "absmax", None)) if state is not None else ()
            for tensor in (parameter.detach(), *scales):
                if tensor is not None:
                    whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _summary(tensor))
    for split in blocks.values():
        for part in split.parts if split is not None else ():
            for array in (*part.pieces, part.cuts):
                tokens.update(np.ascontiguousarray(array))
    vocabulary = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    found = {"model": first, "weights": whole, "data": tokens, "tokenizer": vocabulary}
    return {name: value.hexdigest() for name, value in found.items()}


def _bytes_of(tensor: torch.Tensor) -> bytes:
    # A copy, since the memory of what numpy has seen cannot be resized any more, as FSDP2 does.
    own = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return own.view(torch.uint8).numpy().tobytes()


def _summary(tensor: torch.Tensor) -> bytes:
    """Return the sum of a tensor's bytes, read as 64-bit integers, and some 4,096 of its elements.

    The sum notices any change of a single element, and reads about 10 GB per second on two CPU cores. The sample
    notices elements that changed places. Its stride is odd, so that it does not stay in one column of a matrix.
    """
    flat = tensor.flatten()
    content = flat.view(torch.uint8)
    if content.storage_offset() % 8:  # a view into stacked weights
        content = content.clone()
    whole = len(content) // 8 * 8
    total = content[:whole].view(torch.int64).sum()  # integers wrap around: the order of the sum does not matter
    sample = flat[:: max(1, len(flat) // 4096) | 1]
    return _bytes_of(total.reshape(1)) + _bytes_of(content[whole:]) + _bytes_of(sample)


# ------------------------------------------------------------------------------------------------ numbers


class Unfit(ValueError):
    """Part of a state that this run cannot have written: what it is, what was expected and what came."""


@contextlib.contextmanager
def from_elsewhere(folder: Path) -> Iterator[None]:
    """Turn an Unfit into the error that refuses to continue from `folder`."""
    try:
        yield
    except Unfit as error:
        raise ConfigError(
            f"training.resume: {folder} is of another model or version, or was edited: {error}; give --resume the "
            "folder of another checkpoint, or use --overwrite to start over"
        ) from None


def expect(holds: bool, name: str, expected: str, got: Any) -> None:
    """Raise Unfit unless a condition holds."""
    if not holds:
        raise Unfit(f"{name}: expected {expected}, got {got if isinstance(got, str) else reprlib.repr(got)}")


def expect_count(value: Any, name: str, least: int = 0, most: int = MOST) -> None:
    whole = type(value) is int and least <= value <= most
    expect(whole, name, f"a whole number from {least} to {most}", reprlib.repr(value))


def expect_number(value: Any, name: str) -> None:
    expect(type(value) in (int, float) and abs(value) <= 1e308, name, "a finite number", reprlib.repr(value))


def check_numbers(state: Any) -> None:
    """Raise Unfit unless everything in a state that is no tensor has its type and range."""
    expect(isinstance(state, dict), "its state", "a mapping", state)
    missing, unknown = STATE - state.keys(), state.keys() - STATE - SINCE
    expect(not missing, "its state", f"{', '.join(sorted(missing))}", "none")
    expect(not unknown, "its state", f"only {', '.join(sorted(STATE | SINCE))}", sorted(map(str, unknown)))
    for name in STATE | SINCE & state.keys():
        expect(isinstance(state[name], dict), name, "a mapping", state[name])
    for name in ("config", "effective", "fingerprint", "shape"):
        texts = all(isinstance(key, str) for key in state.get(name, {}))
        expect(texts and is_shallow(state.get(name, {})), name, "settings by their name", "other content")
    for name in ("model", "data", "tokenizer"):
        value = state["fingerprint"].get(name)
        expect(isinstance(value, str), f"fingerprint.{name}", "a hash", value)
    shape = state["shape"]
    for name, least in (("window", 1), ("micro_batch", 1), ("checkpointed", 0), ("processes", 1)):
        expect_count(shape.get(name), f"shape.{name}", least)
    expect_count(shape.get("logit_chunk") or 1, "shape.logit_chunk", 1)
    expect_count(pieces := shape.get("pieces", 1), "shape.pieces", 1)
    expect(pieces in (1, *PIECES), "shape.pieces", f"one of {', '.join(map(str, (1, *PIECES)))}", pieces)
    expect_count(shape.get("kept", 0), "shape.kept")
    expect_count(shape.get("kept_attention", 0), "shape.kept_attention")
    expect_count(shape.get("swapped", 0), "shape.swapped")
    expect(type(shape.get("offload", False)) is bool, "shape.offload", "true or false", shape.get("offload"))
    check_progress(state["progress"])
    step, done = state["progress"]["step"], state["scheduler"].get("last_epoch")
    expect(type(done) is int and done == step, "scheduler.last_epoch", f"progress.step, {step}", done)


def check_progress(found: dict) -> None:
    """Raise Unfit unless the numbers of the loop are possible and agree with the history of evaluations."""
    known = {field.name for field in dataclasses.fields(Progress)}
    expect(found.keys() <= known, "progress", f"only {', '.join(sorted(known))}", list(found))
    progress = Progress(**found)
    expect_count(progress.step, "progress.step", 1)
    expect_count(progress.tokens, "progress.tokens", most=2**62)
    expect_count(progress.loss_tokens, "progress.loss_tokens", most=progress.tokens)
    expect_count(progress.positions, "progress.positions", most=2**62)
    for name in ("loss_sum", "seconds"):
        expect_number(getattr(progress, name), f"progress.{name}")
    expect(progress.seconds >= 0, "progress.seconds", "0 or more", progress.seconds)
    expect(isinstance(progress.history, list), "progress.history", "a list of rows", progress.history)
    for number, row in enumerate(progress.history):
        check_row(row, f"progress.history[{number}]", progress.step)
    losses = [row["eval_loss"] for row in progress.evaluations]
    best = losses.index(min(losses)) if losses else 0
    expected = (losses[best], progress.evaluations[best]["step"], len(losses) - 1 - best) if losses else (None, 0, 0)
    got = (progress.best_loss, progress.best_step, progress.worse)
    expect(got == expected, "progress.best_loss, best_step, worse", f"{expected} as in its history", got)


def check_row(row: Any, name: str, last: int) -> None:
    """Raise Unfit unless this is a row of metrics.jsonl, of step `last` or one before it."""
    expect(isinstance(row, dict) and all(isinstance(key, str) for key in row), name, "a row of metrics", row)
    needed = {"step", "perplexity"} if "eval_loss" in row else {"step", "loss", "learning_rate"}
    expect(needed <= row.keys(), name, f"a row of metrics with {', '.join(sorted(needed))}", row)
    expect_count(row["step"], f"{name}.step", most=last)
    for key, value in row.items():
        if not (key == "grad_norm" and value is None):  # a step that the scaler left out
            expect_number(value, f"{name}.{key}")


# ------------------------------------------------------------------------------------------------ tensors


def check_tensors(found: Found, model: PeftModel, optimizer: Any, scaler: Any, held_out: Blocks | None) -> None:
    """Raise a ConfigError unless every tensor of a checkpoint has the name, shape and dtype that it has in this run.

    They also have to be finite. held_out: the validation blocks.
    """
    folder, adapter, state = found
    with from_elsewhere(folder):
        like = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {name: torch.empty(tensor.shape, device="meta") for name, tensor in like.items()}
        same_tensors(adapter, weights, "adapter")
        evaluated = state["progress"].get("best_loss") is not None
        same_tensors(state["best_adapter"], weights if evaluated else {}, "best_adapter")
        sums = state.get("held_out", {})
        expect(sums.keys() <= {"base", "start", "adapter"}, "held_out", "base, start and adapter", list(sums))
        rows = torch.empty(len(held_out) if held_out is not None else 0, 2, dtype=torch.float64, device="meta")
        same_tensors(sums, dict.fromkeys(sums, rows), "held_out")
        for name, sums_of in sums.items():
            expect(bool((sums_of >= 0).all() and sums_of[:, 1].any()), f"held_out.{name}", "sums of losses", "others")
        check_scaler(state["scaler"], scaler)
        check_optimizer(state, optimizer)


def same_tensors(found: Any, like: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise Unfit unless `found` has the tensors of `like`: names, shapes and dtypes, and only finite numbers."""
    expect(isinstance(found, dict) and found.keys() == like.keys(), name, *_names(found, like))
    for key, expected in like.items():
        tensor = found[key]
        expect(isinstance(tensor, torch.Tensor), f"{name}.{key}", "a tensor", tensor)
        fits = tensor.shape == expected.shape and tensor.dtype == expected.dtype
        expect(fits, f"{name}.{key}", _form(expected), _form(tensor))
        if tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor)  # either is NaN if any element is
            expect(math.isfinite(least) and math.isfinite(most), f"{name}.{key}", "finite numbers", "NaN or infinity")


def _names(found: Any, like: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Return, for the message, the first name that only one of two groups of tensors has."""
    if not isinstance(found, dict):
        return "tensors by their name", reprlib.repr(found)
    missing, unknown = [key for key in like if key not in found], [key for key in found if key not in like]
    if missing:
        return f"{len(like)} tensors, of them {missing[0]}", f"{len(found)} without it"
    return f"{len(like)} tensors", f"another one, {reprlib.repr(unknown[0])}" if unknown else "others"


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_scaler(found: dict, scaler: Any) -> None:
    """Raise Unfit unless the state of the gradient scaler fits this run's, which exists in float16 only."""
    like = scaler.state_dict()
    expect(found.keys() == like.keys(), "scaler", f"the keys {list(like)}", list(found))
    for name, value in found.items():
        expect_number(value, f"scaler.{name}")
        if name == "_growth_tracker":
            expect_count(value, f"scaler.{name}")
        else:
            usual = 0 < value <= 2.0**40 if name == "scale" else value == like[name]
            expect(usual, f"scaler.{name}", "0 to 2**40" if name == "scale" else f"{like[name]}", value)


# As bitsandbytes and torch name them: what is the root of a sum of squares, or a scale, is not negative.
NOT_NEGATIVE = ("state2", "exp_avg_sq", "absmax1", "absmax2")


def check_optimizer(state: dict, optimizer: Any) -> None:
    """Raise Unfit unless the optimizer's states are those of this run's parameters after as many steps as were made."""
    found, like, made = state["optimizer"].get("state"), state_after_a_step(optimizer), state["progress"]["step"]
    expect(isinstance(found, dict), "optimizer.state", "a mapping", found)
    scale = state["scaler"].get("scale")  # each overflow so far has halved it and left a step out
    if not found and scale is not None and scale == FIRST_SCALE * 0.5**made:
        return
    numbers = all(type(key) is int for key in found)
    expect(numbers and found.keys() == like.keys(), "optimizer.state", f"{len(like)} parameters", f"{len(found)}")
    for number, expected in like.items():
        name = f"optimizer.state.{number}"
        got = flat_state(found[number], name)
        step, first = got.pop("step", None), expected.pop("step")
        expect(type(step) is type(first), f"{name}.step", f"{type(first).__name__}", step)
        if isinstance(first, torch.Tensor):
            same_tensors({"step": step}, {"step": first}, name)
        counted = int(step) == made if scale is None else 1 <= int(step) <= made
        expect(counted and int(step) == step, f"{name}.step", f"progress.step, {made}", step)
        same_tensors(got, expected, name)
        for key in NOT_NEGATIVE & got.keys():
            expect(bool((got[key] >= 0).all()), f"{name}.{key}", "no negative numbers", "some")
        for key in {"qmap1", "qmap2"} & got.keys():  # a table of bitsandbytes
            expect(torch.equal(got[key], expected[key].cpu()), f"{name}.{key}", "bitsandbytes' table", "another one")


def flat_state(found: Any, name: str) -> dict:
    """Return a parameter's state without bitsandbytes' inner mapping, which not every version of it makes."""
    expect(isinstance(found, dict), name, "a mapping", found)
    inner = found.get("__bnb_optimizer_quant_state__", {})
    expect(isinstance(inner, dict), name, "a mapping", inner)
    return {key: value for key, value in found.items() if value is not inner} | inner
