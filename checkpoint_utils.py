"""What a run leaves on disk and how it goes on from there: checkpoints, resume, log and model card, signals.

A checkpoint folder holds `adapter_model.safetensors`, `adapter_config.json` (so it is a peft adapter),
`training_state.safetensors` (optimizer states, best adapter), `training_state.json` (everything else) and, last,
`checksums.json`. Nothing is pickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from config import LEAVES, Config, ConfigError, TrainingConfig, flatten, save_config
from data_utils import Blocks

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TEMPORARY, REPLACED = ".writing-", ".replaced-"
FILES = ("adapter_model.safetensors", "adapter_config.json", "training_state.safetensors", "training_state.json")
RESULTS = ("metrics.jsonl", "training_log.txt", "training_curves.png", "adapter_model.safetensors", "evaluation.json")


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


# ------------------------------------------------------------------------------------------------ run state


@dataclasses.dataclass
class Progress:
    """What the loop counts."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last logged row, as the next two
    loss_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    history: list[dict] = dataclasses.field(default_factory=list)

    def count(self, loss_sum: float, tokens: int, seconds: float) -> None:
        """Add an optimizer step."""
        self.step += 1
        self.tokens += tokens
        self.loss_sum += loss_sum
        self.loss_tokens += tokens
        self.seconds += seconds

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.history if "eval_loss" in row]


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's weights on the CPU, fp32, under the names that peft gives them in its file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in state.items()}


def adapter_settings(model: PeftModel, model_name: str) -> dict[str, Any]:
    """Return what peft writes into adapter_config.json, for a base of this name."""
    found = model.peft_config["default"].to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in found.items()}
    return plain | {"inference_mode": True, "base_model_name_or_path": model_name}


def settings(config: Config) -> dict[str, Any]:
    """Return every leaf of the configuration as JSON gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config).items()}


def fingerprint(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, blocks: dict[str, Blocks | None]
) -> dict[str, str]:
    """Return hashes of what a run learns from: the base's weights (a sample of each), the tokenizer and the blocks."""
    weights, tokens = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            sample = parameter.detach().flatten()[:256].cpu().contiguous().view(torch.uint8).numpy()
            weights.update(name.encode() + sample.tobytes())
    for part in blocks.values():
        for array in (*part.pieces, part.cuts) if part is not None else ():
            tokens.update(np.ascontiguousarray(array))
    vocabulary = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return {"model": weights.hexdigest(), "data": tokens.hexdigest(), "tokenizer": vocabulary.hexdigest()}


def flatten_state(state: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `state` as JSON can hold it, with each tensor moved to `tensors` and replaced by {"tensor": its name}."""
    if isinstance(state, torch.Tensor):
        name = f"{len(tensors)} {prefix}"  # numbered, since the keys 1 and "1", or "a.b" and b of a, read alike
        tensors[name] = state.detach().cpu().clone().contiguous()  # safetensors refuses two views of one storage
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

    state: nested dicts, lists, numbers, texts and tensors. The folder appears under its name only when all is on disk.
    """
    final, temporary, replaced = (output_dir / f"{mark}checkpoint-{step}" for mark in ("", TEMPORARY, REPLACED))
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
    if final.exists():  # an earlier attempt at this step; not every file system replaces a folder in one call
        os.rename(final, replaced)
    os.rename(temporary, final)
    _flush_folder(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    _delete_old(output_dir, step, keep)
    return final


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # the rename itself is on the disk only then; Windows has no call for it
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _delete_old(output_dir: Path, step: int, keep: int) -> None:
    """Delete the checkpoints after `step`, whose course going back to it abandoned, and all but the newest `keep`."""
    found = checkpoints(output_dir)
    future = [folder for folder in found if step_of(folder) > step]
    for old in future + found[len(future) :][keep:]:
        doomed = old.with_name(TEMPORARY + old.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)  # a half-deleted checkpoint must not look like one
        shutil.rmtree(doomed)


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
    """Return the newest undamaged checkpoint as (folder, adapter, state); `say` gets a line for each one skipped."""
    for folder in checkpoints(output_dir):
        try:
            return (folder, *read_checkpoint(folder))
        except ValueError as error:
            say(f"{folder.name} is damaged ({error}): skipped")
    return None


# ------------------------------------------------------------------------------------------------ resume


def find_checkpoint(
    training: TrainingConfig, overwrite: bool, say: Callable[[str], None]
) -> tuple[Path, dict[str, torch.Tensor], dict] | None:
    """Return the checkpoint to go on from as (folder, adapter, state), or None to start at step 0."""
    if overwrite or training.resume == "never":
        return None
    if training.resume == "auto":
        return latest_checkpoint(Path(training.output_dir), say)
    try:
        return (Path(training.resume), *read_checkpoint(Path(training.resume)))
    except ValueError as error:
        raise ConfigError(f"training.resume: cannot go on from {training.resume}: {error}") from None


def check_resumable(state: dict, config: Config, prints: dict[str, str], window: int, name: str) -> None:
    """Raise a ConfigError that names what a resumed run may not change, with the value in checkpoint `name` and now."""
    before, now = state["config"], settings(config)
    contents = {"model.name": "model", "data.dataset": "data", "the tokenizer": "tokenizer"}  # whatever their paths
    fixed = [key for key in now if not LEAVES[key].field.metadata["resumable"] and key not in contents]
    problems = [
        f"{key}: was {before.get(key)!r} in {name}, is {now[key]!r} now; change it back or use --resume never"
        for key in fixed
        if before.get(key) != now[key]
    ]
    problems += [
        f"{key}: its content is not what {name} was trained on; use --resume never"
        for key, part in contents.items()
        if state["fingerprint"][part] != prints[part]
    ]
    if state["shape"]["window"] != window:
        problems.append(
            f"training.batch_size x training.gradient_accumulation_steps: was {state['shape']['window']} in {name}, "
            f"is {window} now; keep the product or use --resume never"
        )
    if problems:
        raise ConfigError(*problems)


# ------------------------------------------------------------------------------------------------ the output folder


def check_output(training: TrainingConfig, overwrite: bool) -> None:
    """Refuse an output folder that holds a finished run nobody said to overwrite, or that cannot be written in."""
    output_dir = Path(training.output_dir)
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")  # unlike Path's, no error for a name too long
    if finished and not overwrite and (training.resume == "never" or not checkpoints(output_dir)):
        raise ConfigError(
            f"training.output_dir: {output_dir} holds a finished run; choose another folder or give --overwrite"
        )
    parent = next(p for p in (output_dir, *output_dir.parents) if os.path.exists(p))
    try:  # os.access knows neither Windows' rights nor a read-only file system
        with tempfile.TemporaryDirectory(dir=parent, prefix=TEMPORARY) as trial:
            (Path(trial) / output_dir.name).mkdir(exist_ok=True)  # the name may be too long, or empty (`.`)
    except OSError as error:
        raise ConfigError(f"training.output_dir: cannot write in {parent}: {error.strerror}") from None


def open_output(config: Config, history: list[dict], fresh: bool) -> Path:
    """Return the output folder, its metrics.jsonl cut back to `history`; fresh: without the results of a run before."""
    output_dir = Path(config.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    clean_up(output_dir)
    if fresh:
        for name in RESULTS:
            (output_dir / name).unlink(missing_ok=True)
        for folder in checkpoints(output_dir):
            os.rename(folder, folder.with_name(TEMPORARY + folder.name))
        clean_up(output_dir)
    rows = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(output_dir / "metrics.jsonl", rows.encode())
    saved = dataclasses.replace(config.training, resume="auto", output_dir=os.path.abspath(output_dir))
    save_config(dataclasses.replace(config, training=saved), output_dir / "config.yaml")
    return output_dir


class Log:
    """Lines for the console and training_log.txt, rows for metrics.jsonl; the files open once the run is sound."""

    def __init__(self, silent: bool):
        self.silent, self.waiting, self.folder = silent, "", None

    def say(self, line: str) -> None:
        if self.silent:
            return
        with tqdm.external_write_mode():
            print(line, flush=True)
        self.waiting += line + "\n"
        self._write()

    def open(self, folder: Path) -> None:
        self.folder = folder
        self._write()

    def _write(self) -> None:
        if self.folder is not None:
            _append(self.folder / "training_log.txt", self.waiting)
            self.waiting = ""

    def row(self, row: dict) -> None:
        if self.folder is not None:
            _append(self.folder / "metrics.jsonl", json.dumps(row) + "\n")


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


CARD = """{header}

# LoRA adapter for {model.name}

| | |
|---|---|
| base | `{model.name}`, {bits}; its licence holds for this adapter too |
| data | `{data.dataset}`: {tokens:,} tokens in blocks of {data.max_length} |
| adapter | rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}, on {targets} |
| training | {steps} optimizer steps of {sequences} sequences, {schedule} |
| validation perplexity | {results} |
| made with | `train_qlora.py`, {packages} |

Every setting is in `config.yaml`, every logged step in `metrics.jsonl`. To use it:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base = AutoModelForCausalLM.from_pretrained({model.name!r}, quantization_config=BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type={quantization.quant_type!r}, bnb_4bit_use_double_quant={quantization.use_double_quant}))
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def complete_model_card(output_dir: Path, model: PeftModel, config: Config, progress: Progress, tokens: int) -> None:
    """Replace the questions that peft's model card leaves open by what this run did, and keep its header.

    tokens: of the training part.
    """
    path = output_dir / "README.md"
    card = path.read_text(encoding="utf-8")
    results = "not evaluated (no held-out part)"
    if evaluations := progress.evaluations:
        best = min(evaluations, key=lambda row: row["eval_loss"])
        before, after = evaluations[0]["perplexity"], best["perplexity"]
        results = f"{before:.3f} before, {after:.3f} with this adapter (step {best['step']})"
    training, quantization = config.training, config.quantization
    packages = ("peft", "transformers", "torch")
    text = CARD.format(
        **vars(config),
        header=card[: card.index("\n---", 3) + 4] if card.startswith("---") else "",
        bits=f"4 bit: {quantization.load_in_4bit} ({quantization.quant_type})",
        targets=", ".join(sorted(model.peft_config["default"].target_modules)),
        tokens=tokens,
        steps=progress.step,
        sequences=training.batch_size * training.gradient_accumulation_steps,
        schedule=f"learning rate {training.learning_rate} ({training.lr_scheduler}), {training.optim}",
        results=results,
        packages=", ".join(f"{package} {version(package)}" for package in packages),
    )
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ signals


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or Ctrl-Break into a request that the loop reads at a step boundary.

    A second one exits at once.
    """
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
