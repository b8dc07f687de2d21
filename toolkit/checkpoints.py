"""What a run writes to disk: checkpoints, log, model card, adapter; the lock of its folder, and signals.

A checkpoint folder holds `adapter_model.safetensors`, `adapter_config.json` (so it is a peft adapter),
`training_state.safetensors` (optimizer states, best adapter), `training_state.json` (all the rest) and, last,
`checksums.json`. Nothing is pickled.
"""

import contextlib
import copy
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

from config import Config, ConfigError, LoraSettings, TrainingConfig, counted, flatten, save_config, shown
from fast_path.optimizers import OPTIMIZERS
from quantization_utils import auto_class, compute_dtype_of, create_lora_config
from toolkit.earlier_run import FILES, GENERATION, checkpoints, read_tree, step_of
from toolkit.locks import exclusive
from toolkit.merged_folder import for_older_readers
from toolkit.startup import redact, visible
from toolkit.text_width import for_stdout

if TYPE_CHECKING:  # it imports datasets, which inference does not need
    from toolkit.data_blocks import Blocks

TEMPORARY, REPLACED, LOCK = ".writing-", ".replaced-", ".lock"
RESULTS = ["metrics.jsonl", "training_log.txt", "training_curves.png", "adapter_model.safetensors", "evaluation.json"]
RESULTS += [CHAT_TEMPLATE_FILE, GENERATION, "tokenizer.json", "tokenizer_config.json"]
APPENDED = (LOCK, "training_log.txt")
REPLACED_FILES = (*RESULTS, "config.yaml", "README.md", "adapter_config.json")


@contextlib.contextmanager
def refusing(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of these types into a ConfigError of one line that begins with `problem`."""
    try:
        yield
    except ConfigError:
        raise
    except errors as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())[:250]
        raise ConfigError(f"{problem}: {reason}") from None


# ------------------------------------------------------------------------------------------------ atomic files


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to disk and rename it, so that `path` is always a complete file."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk the incomplete file would use space
            temporary.unlink(missing_ok=True)
        raise


def write_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomically(path, picture.getvalue())


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder with its content, also if it is read-only."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        path.chmod(stat.S_IRWXU)
        shutil.rmtree(path)


def clean_up(output_dir: Path) -> None:
    """Remove incomplete files of a killed run, and put back a checkpoint that it was about to replace."""
    for leftover in output_dir.glob(f"{REPLACED}checkpoint-*"):
        original = output_dir / leftover.name.removeprefix(REPLACED)
        remove(leftover) if os.path.lexists(original) else os.rename(leftover, original)
    for leftover in output_dir.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):  # such as one of another user: it only uses space
            remove(leftover)


# ------------------------------------------------------------------------------------------------ run state


@dataclasses.dataclass
class Progress:
    """The numbers that the training loop keeps."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last logged row, like the next three
    loss_tokens: int = 0
    positions: int = 0  # tokens computed: those that are learned and those that are only read, without padding
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    history: list[dict] = dataclasses.field(default_factory=list)

    def count(self, loss_sum: float, tokens: int, positions: int, seconds: float) -> None:
        """Add one optimizer step. tokens: supervised ones. positions: tokens computed."""
        self.step += 1
        self.tokens += tokens
        self.loss_sum += loss_sum
        self.loss_tokens += tokens
        self.positions += positions
        self.seconds += seconds

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.history if "eval_loss" in row]


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's weights in fp32 on the CPU, under the names that they have in peft's file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in state.items()}


def adapter_settings(model: PeftModel, model_name: str) -> dict[str, Any]:
    """Return the content of peft's adapter_config.json for a base with this name.

    It lists modules instead of regular expressions, which peft would match again each time the adapter is loaded.
    """
    found = model.peft_config["default"].to_dict()
    if isinstance(found["target_modules"], str) or isinstance(found.get("exclude_modules"), str):
        found |= {"target_modules": set(model.base_model.targeted_module_names), "exclude_modules": None}
    plain = {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in found.items()}
    return plain | {"inference_mode": True, "base_model_name_or_path": model_name}


def flatten_state(state: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `state` in a form that JSON can hold; each tensor moves to `tensors`, {"tensor": its name} stays."""
    if isinstance(state, torch.Tensor):
        name = f"{len(tensors)} {prefix}"  # numbered, since the keys 1 and "1" give the same name
        tensors[name] = state.detach().cpu().clone().contiguous()  # safetensors refuses two views of one storage
        return {"tensor": name}
    if isinstance(state, dict):
        return {"items": [[key, flatten_state(value, f"{prefix}.{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return [flatten_state(value, f"{prefix}.{i}", tensors) for i, value in enumerate(state)]
    return state


def restore_state(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo flatten_state, which empties `tensors`. Dictionaries keep the types of their keys; tuples become lists."""
    if isinstance(state, dict):
        if "tensor" in state:
            return tensors.pop(state["tensor"])  # a second mention is an error: two states would share their memory
        return {key: restore_state(value, tensors) for key, value in state["items"]}
    if isinstance(state, list):
        return [restore_state(value, tensors) for value in state]
    return state


# ------------------------------------------------------------------------------------------------ checkpoints


def write_checkpoint(
    output_dir: Path, step: int, adapter: dict[str, torch.Tensor], adapter_config: dict, state: dict, keep: int
) -> Path:
    """Write output_dir/checkpoint-<step> and delete all but the newest `keep` complete ones; return its folder.

    state: nested dicts, lists, numbers, texts and tensors. The folder gets its name only after all files are on disk.
    """
    final, temporary, replaced = (output_dir / f"{mark}checkpoint-{step}" for mark in ("", TEMPORARY, REPLACED))
    if os.path.lexists(temporary):
        remove(temporary)
    temporary.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten_state(state, "state", tensors)
    files = {
        "adapter_model.safetensors": save(adapter, metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(adapter_config, indent=2, sort_keys=True).encode(),
        "training_state.safetensors": save(tensors),
        "training_state.json": json.dumps(tree).encode(),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["checksums.json"] = json.dumps(sums).encode()
    try:
        for name, content in files.items():
            write_atomically(temporary / name, content)
        if os.path.lexists(final):  # from an earlier attempt; not every file system can replace a folder in one call
            os.rename(final, replaced)
        os.rename(temporary, final)
        _flush_folder(output_dir)
    except OSError:  # a full disk, a quota, a lost drive: earlier checkpoints stay
        with contextlib.suppress(OSError):
            clean_up(output_dir)
        raise
    with contextlib.suppress(OSError):  # Windows deletes no file that is being read; that does not matter
        if os.path.lexists(replaced):
            remove(replaced)
        _delete_old(output_dir, step, keep)
    return final


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # only this puts the rename on disk; Windows has no such call
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _delete_old(output_dir: Path, step: int, keep: int) -> None:
    """Delete the checkpoints after `step`, left by a run that was set back to it, and all but the newest `keep`.

    A folder that is read-only stays: somebody has protected it.
    """
    found = checkpoints(output_dir)
    future = [folder for folder in found if step_of(folder) > step]
    for old in future + found[len(future) :][keep:]:
        if not os.access(old, os.W_OK) and not old.is_symlink():
            continue
        doomed = old.with_name(TEMPORARY + old.name)
        if os.path.lexists(doomed):
            remove(doomed)
        os.rename(old, doomed)  # a half-deleted checkpoint must not look like one
        remove(doomed)


def last_good(output_dir: Path) -> str:
    """Return, for the message about a failed run, which checkpoint it can continue from."""
    found = checkpoints(output_dir)
    return f"{found[0].name} is intact" if found else "there is no checkpoint yet"


def stopped_at_once(output_dir: Path, again: str) -> str:
    """Return the line after a second signal, which ends a run within a step. again: the command that continues it."""
    found = checkpoints(output_dir)
    where = f"to continue from {found[0]}" if found else "there is no checkpoint yet; to start again"
    return f"stopped at once; {where}:\n  {again}"


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return (adapter, state) of a checkpoint; raise a ValueError that says what is damaged or missing."""
    try:
        sums, tree = read_tree(folder)
        for name in FILES:
            if _sha256(folder / name) != sums[name]:
                raise ValueError(f"{name} does not match its checksum")
        tensors = load_file(folder / "training_state.safetensors")
        state = restore_state(tree, tensors)
        if tensors:
            raise ValueError("training_state.safetensors holds tensors that training_state.json does not name")
        return load_file(folder / "adapter_model.safetensors"), state
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def latest_checkpoint(
    output_dir: Path, say: Callable[[str], None]
) -> tuple[Path, dict[str, torch.Tensor], dict] | None:
    """Return the newest undamaged checkpoint as (folder, adapter, state); log a line for each one that is skipped."""
    for folder in checkpoints(output_dir):
        try:
            return (folder, *read_checkpoint(folder))
        except ValueError as error:
            say(f"{folder.name} is damaged ({error}): skipped")
    return None


# ------------------------------------------------------------------------------------------------ the output folder


def check_output(training: TrainingConfig) -> None:
    """Raise ConfigError if another run is using the output folder, or if it cannot be written."""
    output_dir = Path(training.output_dir)
    parent = next(p for p in (output_dir, *output_dir.parents) if os.path.exists(p))
    with refusing(f"training.output_dir: cannot write in {parent}", OSError):
        _refuse_odd_files(output_dir)
        if os.path.exists(output_dir / LOCK):
            with exclusive(output_dir / LOCK, _busy(output_dir)):
                pass  # an early check; `locked` takes the lock for the run
        # a trial, since os.access checks neither Windows' permissions nor read-only file systems
        trial = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY))
        try:
            (trial / output_dir.name).mkdir(exist_ok=True)  # the name may be too long, or empty (`.`)
        finally:  # tempfile's own way of deleting never ends where a folder lets nobody delete
            for folder in (*trial.iterdir(), trial):
                folder.rmdir()


def _refuse_odd_files(output_dir: Path) -> None:
    """Raise ConfigError if one of a run's files is a folder, or if one that a run appends to is a link or a pipe.

    A link may lead out of the output folder, and opening a pipe waits for ever.
    """
    for name in (*APPENDED, *REPLACED_FILES):
        if os.path.lexists(path := output_dir / name):
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode) or (name in APPENDED and not stat.S_ISREG(mode)):
                kind = "a folder" if stat.S_ISDIR(mode) else "a link or a pipe"
                raise ConfigError(f"training.output_dir: expected a file, got {kind}: {path}; remove it")


def _busy(output_dir: Path) -> str:
    return f"training.output_dir: another run is writing in {output_dir}; wait until it ends, or stop it"


@contextlib.contextmanager
def locked(output_dir: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Lock the output folder, creating it if needed, against other runs; raise ConfigError if one is using it.

    At the end the folder is removed if it is new and still empty. say: as in `locks.exclusive`.
    """
    with contextlib.ExitStack() as held:
        with refusing(f"training.output_dir: cannot write in {output_dir}", OSError):
            held.enter_context(exclusive(output_dir / LOCK, _busy(output_dir), say))
            clean_up(output_dir)  # now, since it may put back the checkpoint to continue from
        yield


def check_space(training: TrainingConfig, sizes: list[int]) -> None:
    """Raise ConfigError if the disk has no space for the adapter and the checkpoints (one more than are kept).

    sizes: the weights of each tensor of the adapter. A checkpoint holds the adapter twice in fp32 (the best one too),
    the states of the optimizer and, for each tensor, less than 3 KiB of 8-bit tables and names.
    """
    states = sum(OPTIMIZERS[training.optim].saved_bytes(size) for size in sizes)
    checkpoint = sum(sizes) * 8 + states + len(sizes) * 3072 + 2**20  # 2**20: the metrics so far, and headers
    output_dir, kept = Path(training.output_dir), training.save_total_limit + 1
    there = sum(file.stat().st_size for file in output_dir.glob("checkpoint-*/*") if file.is_file())
    needed = kept * checkpoint + sum(sizes) * 4 - there
    parent = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ConfigError(
            f"training.output_dir: expected {needed / 1e6:,.0f} MB free in {parent} for the adapter and "
            f"{kept} checkpoints (training.save_total_limit and one being written), got {free / 1e6:,.0f} MB"
        )


def open_output(config: Config, history: list[dict], fresh: bool, files: Mapping[str, str] | None = None) -> Path:
    """Return the output folder, ready for the run, with metrics.jsonl cut back to `history`.

    fresh: remove the results of an earlier run. files: their names and texts, such as the chat template used for a model
    without one, which inference must use too.
    """
    output_dir = Path(config.training.output_dir)
    if os.path.realpath(config.model.name) == os.path.realpath(output_dir):  # its tokenizer would be overwritten
        raise ConfigError(f"training.output_dir: {output_dir} is the folder of model.name; choose another folder")
    saved = dataclasses.replace(config.training, resume="auto", output_dir=os.path.abspath(output_dir))
    with refusing(f"training.output_dir: cannot write in {output_dir}", OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in RESULTS if fresh else ():
            (output_dir / name).unlink(missing_ok=True)
        for folder in checkpoints(output_dir) if fresh else ():
            os.rename(folder, folder.with_name(TEMPORARY + folder.name))
        clean_up(output_dir)
        write_atomically(output_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
        for name, text in (files or {}).items():
            write_atomically(output_dir / name, text.encode())
        save_config(dataclasses.replace(config, training=saved), output_dir / f"{TEMPORARY}config.yaml")
        os.replace(output_dir / f"{TEMPORARY}config.yaml", output_dir / "config.yaml")
    return output_dir


class Log:
    """Write lines to the console and training_log.txt, and rows to metrics.jsonl. The files exist after `open`.

    Text that a full disk refuses is kept and written with the next line; `flush` raises an error if that fails too.
    """

    def __init__(self, silent: bool):
        self.silent = silent
        self.waiting = {"training_log.txt": "", "metrics.jsonl": ""}
        self.folder: Path | None = None

    def say(self, line: str) -> None:
        if self.silent:
            return
        line = visible(redact(line))
        with contextlib.suppress(OSError), tqdm.external_write_mode():  # a closed console must not end the run
            print(for_stdout(line), flush=True)
        self._add("training_log.txt", line + "\n")

    def open(self, folder: Path) -> None:
        self.folder = folder
        self._add("training_log.txt", "")

    def row(self, row: dict) -> None:
        if self.folder is not None:
            self._add("metrics.jsonl", json.dumps(row) + "\n")

    def _add(self, name: str, text: str) -> None:
        self.waiting[name] += text
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        for name in self.waiting if self.folder is not None else ():
            text, self.waiting[name] = self.waiting[name], ""  # first, since a signal handler may add a line meanwhile
            if not text:
                continue
            try:
                with open(self.folder / name, "ab", buffering=0) as file:
                    end, content = file.tell(), text.encode()
                    if file.write(content) < len(content):  # a full disk writes what fits
                        file.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self.waiting[name] = text + self.waiting[name]
                raise


CARD = """{header}

# LoRA adapter for {model.name}

| | |
|---|---|
| base | `{model.name}`, {precision}; its licence holds for this adapter too |
| data | {dataset}: {tokens:,} tokens in blocks of {data.max_length} |
| adapter | rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}, on {targets} |
| training | {steps} of {sequences}, learning rate {training.learning_rate} ({training.lr_scheduler}), \
{training.optim} |
| validation perplexity | {results} |
| made with | `train_qlora.py`, {packages} |

Every setting is in `config.yaml`, every logged step in `metrics.jsonl`. To use it:

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer, BitsAndBytesConfig

base = {auto}.from_pretrained({model.name!r}, {how})
model = PeftModel.from_pretrained(base, ".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


IN_4_BIT = """dtype={compute_dtype!r}, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type={quant_type!r}, bnb_4bit_compute_dtype={compute_dtype!r},
    bnb_4bit_use_double_quant={use_double_quant})"""


def save_adapter(
    output_dir: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    progress: Progress,
    blocks: "Blocks",
) -> None:
    """Write the adapter as peft does, its model card and the tokenizer; files get their names after all are on disk.

    The card has the header of peft's card, and below it what this run did instead of peft's blanks to fill in.
    blocks: those of the training part.
    """
    folder = output_dir / f"{TEMPORARY}adapter"
    try:
        model.save_pretrained(folder, save_embedding_layers=False)
        card = model_card((folder / "README.md").read_text(encoding="utf-8"), model, config, progress, blocks)
        (folder / "README.md").write_text(redact(card), encoding="utf-8")  # the card is made to be shared
        # In peft's own file the order of a set differs from run to run. Only the owner can read safetensors' file.
        described = json.dumps(adapter_settings(model, config.model.name), indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(described, encoding="utf-8")
        shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")
        save_tokenizer(folder, tokenizer, blocks.template)
        for path in sorted(
            folder.iterdir(), key=lambda path: (path.suffix == ".safetensors", path)
        ):  # the weights last
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(path, output_dir / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def secrets_line(config: Config) -> list[str]:
    """Return a list with a line that names the settings in which config.yaml holds a secret in clear, or []."""
    held = [name for name, value in flatten(config).items() if redact(str(value)) != str(value)]
    if not held:
        return []
    return [
        f"config.yaml and the checkpoints in {config.training.output_dir} hold what looks like a secret, in "
        f"{', '.join(held)}: take it out before you share the folder"
    ]


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Write the tokenizer so that AutoTokenizer loads the same one, with the chat template used in training.

    template: used if the tokenizer has none. It is written into tokenizer_config.json, because a chat_template.jinja in
    an output folder means that the model has no template of its own.
    """
    exact = copy.deepcopy(tokenizer)
    exact.chat_template = template if tokenizer.chat_template is None else tokenizer.chat_template
    if not exact.is_fast:
        exact.save_pretrained(folder, save_jinja_files=False)
        return
    exact.backend_tokenizer.no_truncation()  # settings of earlier calls would be saved too
    exact.backend_tokenizer.no_padding()
    exact.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    found = for_older_readers(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(card: str, model: PeftModel, config: Config, progress: Progress, blocks: "Blocks") -> str:
    """Return the model card of this run, with the YAML header of peft's `card`."""
    results = "not evaluated (no held-out part)"
    if evaluations := progress.evaluations:
        best = min(evaluations, key=lambda row: row["eval_loss"])
        before, after = evaluations[0]["perplexity"], best["perplexity"]
        start = "before" if config.lora.init_adapter is None else f"with the adapter in `{config.lora.init_adapter}`"
        results = f"{before:.3f} {start}, {after:.3f} with this adapter (step {best['step']})"
    quantization = config.quantization
    precision, how = f"unquantised, in {quantization.compute_dtype}", f"dtype={quantization.compute_dtype!r}"
    if quantization.load_in_4bit:
        double = "with" if quantization.use_double_quant else "without"
        precision = f"in 4 bit ({quantization.quant_type}, {double} double quantisation)"
        how = IN_4_BIT.format(**vars(quantization))
    return CARD.format(
        **vars(config),
        header=card[: card.index("\n---", 3) + 4] if card.startswith("---") else "",
        precision=precision,
        how=how,
        auto=auto_class(model.get_base_model().config).__name__,
        dataset=blocks.shown_dataset,
        targets=targets_text(config.lora),
        tokens=blocks.tokens,
        steps=counted(progress.step, "optimizer step"),
        sequences=counted(config.training.batch_size * config.training.gradient_accumulation_steps, "sequence"),
        results=results,
        packages=", ".join(f"{package} {version(package)}" for package in ("peft", "transformers", "torch")),
    )


def targets_text(lora: LoraSettings) -> str:
    """Return in words which layers have an adapter, for the model card."""
    text = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules))
    without = f", without {shown(lora.exclude_modules)}" if lora.exclude_modules else ""
    layers = f", in layers {shown(lora.layers_to_transform)}" if lora.layers_to_transform is not None else ""
    layers += f", and the embedding rows of {shown(lora.train_tokens)}" if lora.train_tokens else ""
    return (text + without + layers).replace("|", "\\|")  # it stands in a table


# ------------------------------------------------------------------------------------------------ signals


class StopRequest:
    """Tells whether the run was asked to stop, and by which signal (None: not asked)."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal(say: Callable[[str], None], last: Callable[[], str] | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM, SIGHUP or Ctrl-Break into a request that the loop reads after each step.

    A second signal exits at once, except SIGHUP: when a terminal closes, the kernel and the shell both send it. A
    signal that is ignored at the start, such as SIGHUP under nohup, stays ignored. last: makes the line for the second signal.
    """
    request, hangup = StopRequest(), getattr(signal, "SIGHUP", None)

    def handle(signum: int, frame: Any) -> None:
        if request.signum is not None:
            if signum == hangup:
                return
            with contextlib.suppress(RuntimeError):
                if last:
                    say(last())
                if sys.stderr is not None and sys.stderr.isatty():  # what comes next would stand beside the bar
                    print(file=sys.stderr, flush=True)
            os._exit(128 + signum)  # safe: every file is renamed only when it is complete
        request.signum = signum
        with contextlib.suppress(RuntimeError):  # raised if the signal interrupted another print
            say("stopping after this step; a second signal (Ctrl-C) exits at once")

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if threading.current_thread() is threading.main_thread() else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_early(say: Callable[[str], None]) -> Iterator[None]:
    """Let Ctrl-C end a run that has not made a step yet: say so and leave the block, whose locks are released.

    The imports of a script have made Ctrl-C end the process at once; `stop_on_signal` takes over before the first step.
    """
    script = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    if script:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        say("stopped before the first step; the same command starts again")
    finally:
        if script:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def effective(config: Config, model: nn.Module) -> Config:
    """Return the configuration with the quantisation (and the adapter, if there is one) that the model really has.

    They differ if a user edited create_bnb_config or create_lora_config, or if the base is stored in 4 bit.
    """
    quantized = next((module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)), None)
    found: dict[str, Any] = {"load_in_4bit": quantized is not None}
    flags = config.flags
    if quantized is not None:
        state = quantized.weight.quant_state
        found |= {"quant_type": state.quant_type, "use_double_quant": state.nested}
        # If this machine replaced the type (such as bfloat16 on a CPU without AVX-512), keep the configured one.
        if quantized.compute_dtype is not compute_dtype_of(config):
            found["compute_dtype"] = str(quantized.compute_dtype).removeprefix("torch.")
            flags |= {"quantization.compute_dtype"}  # like a flag, so that compute_dtype_of keeps it
    quantization, lora = dataclasses.replace(config.quantization, **found), config.lora
    if isinstance(model, PeftModel):
        lora = _effective_lora(config.lora, model)
    return dataclasses.replace(config, quantization=quantization, lora=lora, flags=flags)


def with_options_of(config: Config, blocks: "Blocks") -> Config:
    """Return the configuration with the options of the chat template that the blocks' chats were rendered with."""
    options = blocks.template_options or config.data.template_options
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_options=options))


def _effective_lora(asked: LoraSettings, model: PeftModel) -> LoraSettings:
    """Return the settings under `lora` that an adapter's own configuration has."""
    found = model.peft_config["default"]
    own = getattr(found, "asked", found)  # as it was before patterns and numbers of layers became names of modules
    created = create_lora_config(**asked.arguments)
    lists: dict[str, Any] = {}
    for key in ("target_modules", "exclude_modules", "layers_to_transform"):
        has = getattr(own, key)
        has = sorted(has) if isinstance(has, set) else [has] if isinstance(has, int) else has
        made = getattr(created, key)
        same = has == (sorted(made) if isinstance(made, set) else made)
        lists[key] = asked[key] if same else tuple(has) if isinstance(has, list) else has
    return dataclasses.replace(
        asked,
        rank=found.r,
        alpha=float(found.lora_alpha),
        dropout=float(found.lora_dropout),
        use_rslora=found.use_rslora,
        use_dora=found.use_dora,
        **lists,
    )


def edited_line(config: Config, found: Config) -> list[str]:
    """Return a list with a line that names what differs from the configuration, or []. found: from `effective`."""
    asked, has = flatten(config), flatten(found)
    odd = [f"{name} is {has[name]} (configured: {asked[name]})" for name in asked if asked[name] != has[name]]
    who = "create_bnb_config, create_lora_config or a base stored in 4 bit caused this"
    return [f"not as configured: {', '.join(odd)}; {who}"] if odd else []
