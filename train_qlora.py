"""Fine-tune a causal language model in 4 bit with a LoRA adapter.

python train_qlora.py                                     config.yaml: Qwen2.5-3B-Instruct on Wikitext-2, 8 GB GPU
python train_qlora.py --config tiny/config.yaml           a small model on a CPU, in a minute, without a network
python train_qlora.py --rank 8 --alpha 16 --output_dir output_r8
python train_qlora.py --plan                              what it would take of memory, without the weights
python train_qlora.py --evaluate --adapter output_r8      loss and perplexity of base and adapter
"""

import argparse
import sys
from pathlib import Path

from config import Config, ConfigError, before_heavy_imports, build_parser, load_config, parse_arguments, report


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the script's own options and the configuration: schema < config.yaml < flags."""
    parser = build_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print the memory plan and exit: 0 fits, 3 does not")
    parser.add_argument("--evaluate", action="store_true", help="evaluate instead of training")
    parser.add_argument("--adapter", metavar="DIR", help="with --evaluate: the adapter's folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="start over in an output_dir that holds a finished run"
    )
    options, overrides = parse_arguments(parser, argv)
    if options.adapter and not options.evaluate:
        raise ConfigError("--adapter: goes with --evaluate")
    if options.adapter and not (Path(options.adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter: no adapter_config.json in {options.adapter}")
    paths = [options.config] if options.config else []
    if options.adapter and (Path(options.adapter) / "config.yaml").is_file():
        paths.insert(0, Path(options.adapter) / "config.yaml")
    elif not paths:
        paths = [Path(__file__).with_name("config.yaml")]
    return options, load_config(paths, overrides)


if __name__ == "__main__":  # --help and every error in the configuration answer before torch is imported
    try:
        parse(sys.argv[1:])
    except ConfigError as error:
        sys.exit(report(error))
    before_heavy_imports()

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import bitsandbytes as bnb
import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType
from datasets import DatasetDict
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from checkpoint_utils import (
    TEMPORARY,
    StopRequest,
    checkpoints,
    clean_up,
    latest_checkpoint,
    read_checkpoint,
    stop_on_signal,
    write_atomically,
    write_checkpoint,
)
from config import LEAVES, TrainingConfig, flatten, save_config
from data_utils import IGNORED, Blocks, collate, load_rows, make_blocks, step_windows, tokenize_rows
from fused_ops import (
    CapturedStep,
    DropoutClock,
    FastPath,
    choose_fast_path,
    chunk_rows,
    chunked_cross_entropy,
    compile_layers,
    compiled_chunk_loss,
    fuse,
    shift_labels,
    use_causal_attention,
    use_stateless_dropout,
)
from memory_utils import GIB, MemoryPlan, cap_memory, memory_line, peak_gib, plan_for
from quantization_utils import (
    create_lora_config,
    load_adapter,
    load_base,
    load_tokenizer,
    no_gpu_reason,
    parameter_line,
    prepare_model_for_training,
    quiet_libraries,
    usable_dtype,
)

# ------------------------------------------------------------------------------------------------ data


def prepare_dataset(config: Config, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Return the tokenised rows: a DatasetDict with the split train, perhaps validation, and in them a column input_ids.

    Put your own in its place; packing, labels and the held-out part come after it.
    """
    return tokenize_rows(load_rows(config.data), tokenizer, config.data)


# ------------------------------------------------------------------------------------------------ loss


class SummedLoss:
    """The summed cross entropy of a batch, fp32: decoder, then the frozen head chunk by chunk.

    A head with an adapter, or a model that does something to its logits (soft-capping, scaling), takes the model's own logits.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, dtype: torch.dtype):
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device, self.dtype = next(model.parameters()).device, dtype
        self.decoder, self.head = self.base.get_decoder(), self.base.get_output_embeddings()
        self.options: dict[str, Any] = {}  # of chunked_cross_entropy
        self.chunked = self._head_is_plain()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Return whether the logits are the frozen head's product and nothing else, tried on eight tokens."""
        if type(self.head) is not nn.Linear or self.head.weight.requires_grad:
            return False
        training, probe = self.base.training, torch.arange(1, 9, device=self.device)[None]
        self.base.eval()
        with self.autocast():
            hidden = self.decoder(input_ids=probe, use_cache=False).last_hidden_state
            same = torch.equal(self.head(hidden), self.base(input_ids=probe, use_cache=False).logits)
        self.base.train(training)
        return same

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """input_ids, labels: [batch, length] on the model's device; labels are not shifted, -100 where unsupervised."""
        targets = shift_labels(labels).flatten()
        with self.autocast():
            if self.chunked:
                hidden = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
                return chunked_cross_entropy(
                    hidden.flatten(0, 1), self.head.weight, targets, self.head.bias, **self.options
                )
            logits = self.base(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


# ------------------------------------------------------------------------------------------------ one optimizer step


class NumbersWentWrong(RuntimeError):
    """A loss or gradient that is not finite: the run stops there, exit code 1."""


def create_optimizer(
    parameters: list[nn.Parameter], training: TrainingConfig, device: torch.device, say: Callable
) -> Any:
    """Return AdamW over the adapter; a paged one falls back to its plain form, with a line, where there is no GPU to page from."""
    name = training.optim
    if name.startswith("paged") and device.type != "cuda":
        say(f"training.optim: {name} needs a GPU to page from; its states stay in memory here")
    kinds = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit if device.type == "cuda" else bnb.optim.AdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit if device.type == "cuda" else bnb.optim.AdamW32bit,
        "adamw_torch": torch.optim.AdamW,
    }
    return kinds[name](parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def create_scheduler(optimizer: Any, training: TrainingConfig, total_steps: int) -> Any:
    """Return transformers' schedule: a linear warm-up, then cosine, linear or constant over the steps that are left."""
    name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
    return get_scheduler(name, optimizer, math.ceil(training.warmup_ratio * total_steps), total_steps)


@dataclasses.dataclass
class Learner:
    """The model with its adapter, and how a micro-batch runs forward and backward through it."""

    model: PeftModel
    loss: SummedLoss
    clock: DropoutClock
    scaler: torch.amp.GradScaler
    fast: FastPath
    shape: tuple[int, int]  # a full micro-batch: (sequences, tokens)
    captured: CapturedStep | None = None

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward_backward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a batch's summed loss to the parameters' and return the loss; no host synchronisation."""
        loss = self.loss(input_ids, labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def micro_step(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one micro-batch: as the captured graph where there is one, with the same numbers either way."""
        if self.fast.cuda_graphs and self.captured is None:
            self.captured = CapturedStep(self.forward_backward, self.clock, *self.shape, self.parameters)
        if self.captured is not None:
            sequences = F.pad(sequences, (0, self.shape[0] - len(sequences)))
        self.clock.set(step, sequences)
        return (self.captured or self.forward_backward)(**batch)

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in place: a captured graph adds to this memory."""
        if self.parameters[0].grad is None:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([p.grad for p in self.parameters])


@dataclasses.dataclass
class Session:
    """What training works on; nothing in it is configuration."""

    accelerator: Accelerator
    learner: Learner
    tokenizer: PreTrainedTokenizerBase
    blocks: dict[str, Blocks | None]
    optimizer: Any
    scheduler: Any
    micro_batch: int
    window: int  # sequences an optimizer step, over all micro-batches and processes

    @property
    def model(self) -> PeftModel:
        return self.learner.model

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.blocks["train"]) // self.window)


def batches(
    blocks: Blocks, numbers: np.ndarray, size: int, pad: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], int, np.ndarray]]:
    """Yield (batch on the device, its supervised tokens, positions within `numbers`) for the blocks that `numbers` names."""
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = collate([blocks[i] for i in part], pad)
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        if device.type == "cuda":  # from pinned memory the copy waits for nothing, and the GPU for no copy
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        yield on_device, tokens, np.arange(start, start + len(part))


def sum_over_processes(session: Session, extra: list[float | torch.Tensor]) -> torch.Tensor:
    """Sum the gradients, in place, and the numbers in `extra` over all processes; return the latter, fp64 on the device."""
    device = session.accelerator.device
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in extra])
    if session.accelerator.num_processes == 1:
        return numbers
    gradients = [p.grad for p in session.learner.parameters]
    flat = session.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return session.accelerator.reduce(numbers, "sum")


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss_sum: float
    tokens: int
    grad_norm: float
    stop: bool  # some process was asked to stop


def training_step(session: Session, step: int, window: np.ndarray, max_grad_norm: float, stop: bool) -> StepResult:
    """Learn from the blocks of one window: sum loss and gradients over all of them, divide once, clip, step."""
    learner, device = session.learner, session.accelerator.device
    learner.model.train()
    learner.zero_gradients()
    loss_sum, tokens = torch.zeros((), device=device), 0
    rank, processes = session.accelerator.process_index, session.accelerator.num_processes
    mine, pad = window[rank::processes], session.tokenizer.pad_token_id
    for batch, count, positions in batches(session.blocks["train"], mine, session.micro_batch, pad, device):
        loss_sum += learner.micro_step(step, torch.from_numpy(rank + processes * positions), batch)
        tokens += count
    numbers = sum_over_processes(session, [loss_sum, tokens, stop])
    learner.scaler.unscale_(session.optimizer)
    torch._foreach_mul_([p.grad for p in learner.parameters], 1 / numbers[1].float().clamp_min(1))
    norm = nn.utils.clip_grad_norm_(learner.parameters, max_grad_norm)
    loss_value, token_count, stops, grad_norm = (*numbers.tolist(), norm.item())
    scaling = learner.scaler.is_enabled() and not math.isfinite(
        grad_norm
    )  # the scaler skips such a step and lowers its scale
    if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or scaling):
        raise NumbersWentWrong(
            f"step {step + 1}: loss {loss_value / max(token_count, 1)}, gradient norm {grad_norm} (compute type {learner.loss.dtype}), "
            f"blocks {', '.join(map(str, window))}; the last checkpoint is intact: try a lower learning_rate"
        )
    learner.scaler.step(session.optimizer)
    learner.scaler.update()
    session.scheduler.step()
    return StepResult(loss_value, int(token_count), grad_norm, bool(stops))


@torch.no_grad()
def evaluate(loss: SummedLoss, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int) -> float:
    """Return the mean loss of the supervised tokens of all blocks: one sum over every block and process, divided once."""
    loss.base.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    mine = np.arange(accelerator.process_index, len(blocks), accelerator.num_processes)
    for batch, tokens, _ in batches(blocks, mine, micro_batch, pad, accelerator.device):
        total[0] += loss(**batch)
        total[1] += tokens
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def perplexity(loss: float) -> float:
    """Return exp(loss), held below infinity, which JSON cannot say."""
    return math.exp(min(loss, 700.0))


# ------------------------------------------------------------------------------------------------ what a run remembers


@dataclasses.dataclass
class Progress:
    """What the loop knows and a checkpoint keeps."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last logged row
    loss_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    history: list[dict] = dataclasses.field(default_factory=list)


class Log:
    """Lines for the console and for training_log.txt, which opens once the run is known to be sound; rows for metrics.jsonl."""

    def __init__(self, silent: bool):
        self.silent, self.lines, self.folder = silent, [], None

    def say(self, line: str) -> None:
        if self.silent:
            return
        with tqdm.external_write_mode():
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(line.encode(encoding, "replace").decode(encoding), flush=True)
        self.lines.append(line)
        self._write()

    def open(self, folder: Path) -> None:
        self.folder = folder
        self._write()

    def _write(self) -> None:
        if self.folder is not None and self.lines:
            with open(self.folder / "training_log.txt", "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self.lines))
            self.lines.clear()

    def row(self, row: dict) -> None:
        if not self.silent and self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def fingerprint(session: Session) -> dict[str, str]:
    """Return hashes of what the run learns from: the model's weights (a sample of each), the tokenizer and the blocks."""
    weights, tokens = hashlib.sha256(), hashlib.sha256()
    for name, parameter in session.model.named_parameters():
        if not parameter.requires_grad:
            sample = parameter.detach().flatten()[:256].cpu().contiguous().view(torch.uint8).numpy()
            weights.update(name.encode() + sample.tobytes())
    for part in session.blocks.values():
        for array in (*part.pieces, part.cuts) if part is not None else ():
            tokens.update(np.ascontiguousarray(array))
    vocabulary = json.dumps(session.tokenizer.get_vocab(), sort_keys=True).encode()
    return {
        "model": weights.hexdigest(),
        "data": tokens.hexdigest(),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
    }


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's weights on the CPU, fp32, under the names that peft gives them in its file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in state.items()}


def save_state(run: "Run") -> None:
    """Write a checkpoint of everything that going on needs."""
    session, config = run.session, run.config
    if not session.accelerator.is_main_process:
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged optimizer states are managed memory that the CPU is about to read
    state = {
        "progress": dataclasses.asdict(run.progress),
        "optimizer": session.optimizer.state_dict(),
        "scheduler": session.scheduler.state_dict(),
        "scaler": session.learner.scaler.state_dict(),
        "best_adapter": run.best_adapter or {},
        "config": {name: list(v) if isinstance(v, tuple) else v for name, v in flatten(config).items()},
        "fingerprint": run.fingerprint,
        "shape": {
            "micro_batch": session.micro_batch,
            "window": session.window,
            "processes": session.accelerator.num_processes,
        },
    }
    peft_config = session.model.peft_config["default"].to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in peft_config.items()}
    plain |= {"inference_mode": True, "base_model_name_or_path": config.model.name}
    folder = write_checkpoint(
        run.output_dir,
        run.progress.step,
        adapter_tensors(session.model),
        plain,
        state,
        config.training.save_total_limit,
    )
    run.saved_step, run.saved_time = run.progress.step, time.monotonic()
    run.log.say(f"step {run.progress.step}: checkpoint written to {folder}")


def check_resumable(saved: dict, config: Config, prints: dict[str, str], window: int, folder: Path) -> None:
    """Raise a ConfigError that names what a resumed run may not change, with the value before and now."""
    now = {name: list(v) if isinstance(v, tuple) else v for name, v in flatten(config).items()}
    contents = {"model.name": "model", "data.dataset": "data"}  # another path is fine where the content is the same
    problems = [
        f"{name}: was {saved['config'].get(name)!r} in {folder.name}, is {value!r} now; change it back or use --resume never"
        for name, value in now.items()
        if not LEAVES[name].field.metadata["resumable"] and name not in contents and saved["config"].get(name) != value
    ]
    for name, part in {**contents, "the tokenizer": "tokenizer"}.items():
        if saved["fingerprint"][part] != prints[part]:
            problems.append(f"{name}: its content is not what {folder.name} was trained on; use --resume never")
    if saved["shape"]["window"] != window:
        problems.append(
            f"training.batch_size x training.gradient_accumulation_steps: was {saved['shape']['window']} in {folder.name}, "
            f"is {window} now; keep the product or use --resume never"
        )
    if problems:
        raise ConfigError(*problems)


def restore(run: "Run", adapter: dict[str, torch.Tensor], state: dict) -> None:
    """Put the run where the checkpoint left it."""
    session = run.session
    set_peft_model_state_dict(session.model, adapter)
    session.optimizer.load_state_dict(state["optimizer"])
    before = session.scheduler.lr_lambdas
    session.scheduler.load_state_dict(state["scheduler"])
    session.scheduler.lr_lambdas = before  # the schedule of the steps that this run is to make
    for group, rate in zip(session.optimizer.param_groups, session.scheduler.base_lrs, strict=True):
        group["lr"] = rate * before[0](state["progress"]["step"])
    session.learner.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    run.best_adapter = state["best_adapter"] or None


# ------------------------------------------------------------------------------------------------ the loop


@dataclasses.dataclass
class Run:
    """A run in its output folder."""

    config: Config
    session: Session
    log: Log
    output_dir: Path
    total_steps: int
    fingerprint: dict[str, str]
    progress: Progress = dataclasses.field(default_factory=Progress)
    best_adapter: dict[str, torch.Tensor] | None = None
    saved_step: int = -1
    saved_time: float = dataclasses.field(default_factory=time.monotonic)

    def note(self, row: dict) -> None:
        """Keep a row of metrics: in the history, in metrics.jsonl and in the tracker."""
        self.progress.history.append(row)
        self.log.row(row)
        self.session.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def total_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a run."""
    return training.max_steps or max(1, math.ceil(training.num_epochs * steps_per_epoch))


def log_step(run: Run, result: StepResult, rate: float) -> None:
    """Note the mean loss since the last row and how fast it went."""
    progress = run.progress
    row = {
        "step": progress.step,
        "epoch": round(progress.step / run.session.steps_per_epoch, 4),
        "loss": progress.loss_sum / max(progress.loss_tokens, 1),
        "learning_rate": rate,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,  # a step that the scaler skipped
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.loss_tokens / progress.seconds, 1),
        "peak_gib": round(peak_gib(run.session.accelerator.device), 3),
    }
    progress.loss_sum, progress.loss_tokens, progress.seconds = 0.0, 0, 0.0
    run.note(row)
    run.log.say(
        f"step {row['step']}/{run.total_steps} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | lr {rate:.2e} | "
        f"grad norm {result.grad_norm:.3f} | {row['tokens_per_second']:,.0f} tokens/s | peak {row['peak_gib']:.2f} GiB"
    )


def evaluate_and_keep_best(run: Run) -> None:
    """Evaluate on the held-out blocks, note it, and keep a copy of the adapter if none was better."""
    progress, blocks = run.progress, run.session.blocks["validation"]
    if blocks is None or any(row["step"] == progress.step and "eval_loss" in row for row in progress.history):
        return
    session = run.session
    loss = evaluate(
        session.learner.loss, blocks, session.accelerator, session.micro_batch, session.tokenizer.pad_token_id
    )
    if not math.isfinite(loss):
        raise NumbersWentWrong(f"step {progress.step}: the validation loss is {loss}; the last checkpoint is intact")
    run.note({"step": progress.step, "eval_loss": loss, "perplexity": perplexity(loss)})
    better = progress.best_loss is None or loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        run.best_adapter = adapter_tensors(run.session.model)
    else:
        progress.worse += 1
    run.log.say(
        f"step {progress.step}: validation loss {loss:.4f} | perplexity {perplexity(loss):.2f}{' | best' if better else ''}"
    )


def train(run: Run, request: StopRequest) -> bool:
    """Train until the last step or early stopping's patience ends; return False if a signal stopped it before.

    Each turn: step → log → evaluate → save.
    """
    session, training, progress = run.session, run.config.training, run.progress
    if progress.step == 0:
        evaluate_and_keep_best(run)
    bar = tqdm(
        total=run.total_steps, initial=progress.step, unit="step", disable=run.log.silent or not sys.stderr.isatty()
    )
    windows = step_windows(len(session.blocks["train"]), session.window, training.seed, progress.step)
    while progress.step < run.total_steps:
        start = time.perf_counter()
        _, window = next(windows)
        rate = session.scheduler.get_last_lr()[0]
        result = training_step(session, progress.step, window, training.max_grad_norm, request.signum is not None)
        seconds = time.perf_counter() - start
        progress.step += 1
        progress.tokens += result.tokens
        progress.loss_sum += result.loss_sum
        progress.loss_tokens += result.tokens
        progress.seconds += seconds
        bar.set_postfix(
            loss=f"{result.loss_sum / max(result.tokens, 1):.4f}",
            tokens_s=f"{result.tokens / seconds:,.0f}",
            refresh=False,
        )
        bar.update()
        last, epoch_end = progress.step == run.total_steps, progress.step % session.steps_per_epoch == 0
        if last or progress.step % training.logging_steps == 0:
            log_step(run, result, rate)
        if last or (progress.step % training.eval_steps == 0 if training.eval_steps else epoch_end):
            evaluate_and_keep_best(run)
        patience = training.early_stopping_patience
        stale = patience is not None and progress.worse >= patience
        minutes = (time.monotonic() - run.saved_time) / 60
        timed = training.save_minutes is not None and minutes >= training.save_minutes
        counted = training.save_steps is not None and progress.step % training.save_steps == 0
        if last or epoch_end or timed or counted or result.stop or stale:
            save_state(run)
        if result.stop or stale:
            bar.close()
            if stale and not result.stop:
                run.log.say(
                    f"stopping early: {patience} evaluations without a better loss than that of step {progress.best_step}"
                )
            return not result.stop
    bar.close()
    return True


# ------------------------------------------------------------------------------------------------ what a run leaves


def plot_training_curves(history: list[dict], path: str | Path) -> None:
    """Write a picture of the run: training and validation loss on the left, the learning rate on the right.

    history: rows of metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state; 1 s to import
    from matplotlib.figure import Figure

    steps = [row for row in history if "loss" in row]
    evaluations = [row for row in history if "eval_loss" in row]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training", linewidth=1.2)
    left.plot(
        [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations], "o-", label="validation", markersize=4
    )
    left.set(xlabel="optimizer step", ylabel="loss per token (nats)", title="Loss")
    left.legend()
    right.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color="tab:green", linewidth=1.2)
    right.set(xlabel="optimizer step", ylabel="learning rate", title="Learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    buffer = Path(path).with_suffix(".tmp.png")
    figure.savefig(buffer, dpi=120)
    os.replace(buffer, path)


def model_card(run: Run, card: str) -> str:
    """Return peft's model card, its header kept, with what this run did in place of the questions it leaves open."""
    config, evaluations = run.config, [row for row in run.progress.history if "eval_loss" in row]
    results = "not evaluated (no held-out part)"
    if evaluations:
        best = min(evaluations, key=lambda row: row["eval_loss"])
        results = f"{evaluations[0]['perplexity']:.3f} before, {best['perplexity']:.3f} with this adapter (step {best['step']})"
    header = card[: card.index("\n---", 3) + 4] if card.startswith("---") else ""
    return f"""{header}

# LoRA adapter for {config.model.name}

| | |
|---|---|
| base | `{config.model.name}`, 4 bit: {config.quantization.load_in_4bit} ({config.quantization.quant_type}); its licence holds for this adapter too |
| data | `{config.data.dataset}`: {run.session.blocks["train"].tokens:,} tokens in blocks of {config.data.max_length} |
| adapter | rank {config.lora.rank}, alpha {config.lora.alpha}, dropout {config.lora.dropout}, on {", ".join(sorted(run.session.model.peft_config["default"].target_modules))} |
| training | {run.progress.step} optimizer steps of {run.session.window} sequences, learning rate {config.training.learning_rate} ({config.training.lr_scheduler}), {config.training.optim} |
| validation perplexity | {results} |
| made with | `train_qlora.py`, peft {version("peft")}, transformers {version("transformers")}, torch {version("torch")} |

Every setting is in `config.yaml`, every logged step in `metrics.jsonl`. To use it:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base = AutoModelForCausalLM.from_pretrained({config.model.name!r}, quantization_config=BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type={config.quantization.quant_type!r}, bnb_4bit_use_double_quant={config.quantization.use_double_quant}))
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def finish(run: Run, plan: MemoryPlan | None) -> None:
    """Leave the best adapter with its model card in the output folder and say what came out."""
    session, progress = run.session, run.progress
    if run.best_adapter is not None:
        set_peft_model_state_dict(session.model, run.best_adapter)
    if session.accelerator.is_main_process:
        session.model.save_pretrained(run.output_dir, save_embedding_layers=False)
        card = run.output_dir / "README.md"
        card.write_text(model_card(run, card.read_text(encoding="utf-8")), encoding="utf-8")
    evaluations = [row for row in progress.history if "eval_loss" in row]
    if evaluations:
        before = evaluations[0]
        run.log.say(
            f"perplexity {before['perplexity']:.2f} before, {perplexity(progress.best_loss):.2f} after "
            f"(the adapter of step {progress.best_step}, the best by validation loss)"
        )
    device = session.accelerator.device
    planned = (
        f" | planned {(plan.total - plan.parts['CUDA context']) / GIB:.2f}" if plan and device.type == "cuda" else ""
    )
    run.log.say(f"peak memory {peak_gib(device):.2f} GiB{planned}")
    run.log.say(f"adapter, curves and log are in {run.output_dir}")


# ------------------------------------------------------------------------------------------------ phases


def device_block(accelerator: Accelerator, dtype: torch.dtype) -> str:
    """Return the lines that say what the run computes on."""
    device = accelerator.device
    lines = ["=" * 60, f"Device: {device}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lines.append(
            f"GPU: {properties.name} | {properties.total_memory / GIB:.1f} GiB | {properties.multi_processor_count} SMs"
        )
    else:
        lines.append(f"GPU: none | CPU threads: {torch.get_num_threads()}")
    names = ("torch", "transformers", "peft", "bitsandbytes")
    lines.append(f"Python {platform.python_version()}" + "".join(f" | {name} {version(name)}" for name in names))
    lines += [f"Compute type: {dtype} | processes: {accelerator.num_processes}", "=" * 60]
    return "\n".join(lines)


def create_accelerator(config: Config, output_dir: Path) -> Accelerator:
    """Return accelerate's view of devices, processes and trackers; raises ConfigError for a launch or tracker that cannot work."""
    tracker = None if config.training.report_to == "none" else config.training.report_to
    known = [kind.value for kind in LoggerType if kind.value != "all"]
    if tracker is not None and tracker not in known:
        raise ConfigError(f"training.report_to: expected none or one of {', '.join(known)}, got {tracker!r}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    alone = ConfigError(
        f"the launcher announces {launched} processes, but this one runs alone: use torchrun --nproc_per_node {launched}"
    )
    if launched > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise alone  # torch would wait for the others
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # without it accelerate starts no gloo group on a machine without a GPU
            gradient_accumulation_steps=1,
            log_with=tracker,
            project_dir=str(output_dir / "runs"),
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"training.report_to: {tracker}: {' '.join(str(error).split())[:200]}") from None
    if tracker is not None and not accelerator.log_with:
        raise ConfigError(f"training.report_to: the package of {tracker} is not installed")
    if launched != accelerator.num_processes:
        raise alone
    return accelerator


def refuse_without_gpu(config: Config, device: torch.device) -> None:
    """Refuse the 3B default where there is no GPU, saying why there is none and how long it would take."""
    if device.type == "cuda" or config.model.name != LEAVES["model.name"].field.default:
        return
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(8):
        a @ a
    rate = 8 * 2 * 1024**3 / (time.perf_counter() - start)
    # 6 FLOP a weight and token: forward, recompute, and the backward through frozen weights; 2.77e9 weights in linear layers.
    step_hours = (
        6
        * 2.77e9
        * config.training.batch_size
        * config.training.gradient_accumulation_steps
        * config.data.max_length
        / rate
        / 3600
    )
    raise ConfigError(
        f"model.name: {config.model.name} needs a GPU: {no_gpu_reason()}. On this CPU one optimizer step would take about "
        f"{step_hours:.1f} hours; try --config tiny/config.yaml"
    )


def sequences_a_step(training: TrainingConfig, processes: int) -> int:
    """Return the sequences of an optimizer step over all micro-batches and processes."""
    window = training.batch_size * training.gradient_accumulation_steps
    if window % processes:
        raise ConfigError(
            f"training.batch_size x training.gradient_accumulation_steps: expected a multiple of {processes} processes, got {window}"
        )
    return window


def build_session(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Session:
    """Load the model, prepare the adapter and the data, and return what training works on."""
    device, training = accelerator.device, config.training
    window = sequences_a_step(training, accelerator.num_processes)
    if config.performance.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
    with accelerator.main_process_first():
        tokenized = prepare_dataset(config, tokenizer)
        blocks = make_blocks(tokenized, tokenizer, config.data, training.seed)
    model, _ = load_base(config, device)
    say(memory_line(device))
    micro_batch = min(training.batch_size, window // accelerator.num_processes)
    learner = build_learner(config, model, micro_batch, say)
    optimizer = create_optimizer(learner.parameters, training, device, say)
    steps = total_steps(training, -(-len(blocks["train"]) // window))
    scheduler = create_scheduler(optimizer, training, steps)
    return Session(accelerator, learner, tokenizer, blocks, optimizer, scheduler, micro_batch, window)


def build_learner(config: Config, model: PreTrainedModel, micro_batch: int, say: Callable[[str], None]) -> Learner:
    """Attach a fresh adapter to the base model and set up the path that its micro-batches take."""
    training, p = config.training, config.lora.dropout
    checkpointing = True if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    transformers.set_seed(training.seed)  # of the fresh adapter
    peft_model = prepare_model_for_training(model, create_lora_config(**vars(config.lora)), checkpointing)
    say(parameter_line(peft_model))
    device, dtype = model.device, usable_dtype(config.quantization.compute_dtype)
    use_causal_attention(model)
    clock = DropoutClock(training.seed, device)
    use_stateless_dropout(peft_model, p, clock)
    loss = SummedLoss(peft_model, dtype)
    fast = choose_fast_path(config.performance, peft_model, dtype, device)
    if fast.fused_lora:
        fuse(peft_model, clock, p, fast.kernels)
    if fast.compile:
        compile_layers(peft_model)
        loss.options["chunk_loss"] = compiled_chunk_loss
    if device.type == "cuda":
        loss.options["chunk"] = chunk_rows(len(loss.head.weight), torch.cuda.mem_get_info(device)[0])
    say(fast.line)
    # Losses are sums over tokens, so gradients are large already: 2**16, torch's start, would overflow fp16 at once.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, enabled=dtype is torch.float16)
    return Learner(peft_model, loss, clock, scaler, fast, (micro_batch, config.data.max_length))


def describe_data(session: Session, config: Config, say: Callable[[str], None]) -> None:
    """Say how many blocks there are and how many optimizer steps that makes, packed and unpacked."""
    train_part, held = session.blocks["train"], session.blocks["validation"]
    per_epoch, rows = session.steps_per_epoch, train_part.rows
    say(
        f"data: {rows:,} rows, {train_part.documents:,} documents, {train_part.tokens:,} tokens in {len(train_part):,} blocks of "
        f"{config.data.max_length}; held out: {f'{held.tokens:,} tokens in {len(held):,} blocks' if held else 'nothing'}"
    )
    say(
        f"steps: {total_steps(config.training, per_epoch):,} optimizer steps of {session.window} sequences ({per_epoch:,} an epoch; "
        f"one row a sequence would make {-(-rows // session.window):,})"
    )
    first = session.tokenizer.decode(train_part[0][:40]).replace("\n", "\\n")
    say(f"first block: {first} …")


def open_output(config: Config, output_dir: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be one, or that holds a finished run nobody said to overwrite."""
    if os.path.isfile(output_dir):  # unlike Path's, no error for a name too long
        raise ConfigError(f"training.output_dir: expected a folder, got the file {output_dir}")
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")
    if finished and not overwrite and (config.training.resume == "never" or not checkpoints(output_dir)):
        raise ConfigError(
            f"training.output_dir: {output_dir} holds a finished run; choose another folder or give --overwrite"
        )
    parent = next(p for p in (output_dir, *output_dir.parents) if os.path.exists(p))
    try:  # os.access knows neither Windows' rights nor a read-only file system
        with tempfile.TemporaryDirectory(dir=parent, prefix=TEMPORARY) as trial:
            (Path(trial) / output_dir.name).mkdir(exist_ok=True)  # the name may be too long, or empty (`.`)
    except OSError as error:
        raise ConfigError(f"training.output_dir: cannot write in {parent}: {error.strerror}") from None


def find_checkpoint(config: Config, output_dir: Path, overwrite: bool, say: Callable) -> tuple[Path, dict, dict] | None:
    """Return the checkpoint to go on from, or None to start at step 0."""
    resume = config.training.resume
    if overwrite or resume == "never":
        return None
    if resume == "auto":
        return latest_checkpoint(output_dir, say)
    try:
        return (Path(resume), *read_checkpoint(Path(resume)))
    except ValueError as error:
        raise ConfigError(f"training.resume: cannot go on from {resume}: {error}") from None


def start_run(config: Config, session: Session, log: Log, overwrite: bool) -> Run:
    """Return the run, at step 0 or where its checkpoint left it, with its output folder open. Refusals come before any write."""
    output_dir = Path(config.training.output_dir)
    steps = total_steps(config.training, session.steps_per_epoch)
    run = Run(config, session, log, output_dir, steps, fingerprint(session))
    found = find_checkpoint(config, output_dir, overwrite, log.say)
    if found is not None:
        folder, adapter, state = found
        check_resumable(state, config, run.fingerprint, session.window, folder)
        restore(run, adapter, state)
    session.accelerator.wait_for_everyone()
    if not session.accelerator.is_main_process:
        return run
    output_dir.mkdir(parents=True, exist_ok=True)
    clean_up(output_dir)
    if found is None:
        for name in (
            "metrics.jsonl",
            "training_log.txt",
            "training_curves.png",
            "adapter_model.safetensors",
            "evaluation.json",
        ):
            (output_dir / name).unlink(missing_ok=True)
        for folder in checkpoints(output_dir):
            os.rename(folder, output_dir / (".writing-" + folder.name))
        clean_up(output_dir)
    rows = "".join(json.dumps(row) + "\n" for row in run.progress.history)
    write_atomically(output_dir / "metrics.jsonl", rows.encode())  # cut back to the checkpoint's step
    saved = dataclasses.replace(config.training, resume="auto", output_dir=os.path.abspath(output_dir))
    save_config(dataclasses.replace(config, training=saved), output_dir / "config.yaml")
    log.open(output_dir)
    if found is not None:
        log.say(f"resuming from {found[0]} at step {run.progress.step} of {steps}")
        if (
            state["config"]["training.num_epochs"] != config.training.num_epochs
            or state["config"]["training.max_steps"] != config.training.max_steps
        ):
            log.say(f"the learning rate follows the schedule of {steps} steps from here on")
    return run


def print_plan(config: Config) -> int:
    """Print the memory plan; return 3 where it exceeds performance.memory_limit_gib or the GPU, else 0."""
    shape, plan = plan_for(config)
    print(f"{config.model.name}: {shape.parameters:,} parameters")
    print(plan.table())
    limit = config.performance.memory_limit_gib
    if limit is None and torch.cuda.is_available():
        limit = torch.cuda.mem_get_info()[0] / GIB
    if limit is None:
        return 0
    fits = plan.total <= limit * GIB
    print(f"{'fits' if fits else 'does not fit'} in {limit:.2f} GiB")
    return 0 if fits else 3


def evaluate_adapter(config: Config, adapter: str | None) -> int:
    """Print the loss and perplexity of the base and, with an adapter, of both on the same blocks; evaluation.json keeps them."""
    accelerator = create_accelerator(config, Path(config.training.output_dir))
    refuse_without_gpu(config, accelerator.device)
    model, tokenizer = load_base(config, accelerator.device)
    blocks = make_blocks(prepare_dataset(config, tokenizer), tokenizer, config.data, config.training.seed)["validation"]
    if blocks is None:
        raise ConfigError("data.validation_fraction: nothing is held out to evaluate on")
    if adapter is not None:
        model = load_adapter(model, adapter)
    use_causal_attention(model)
    loss = SummedLoss(model, usable_dtype(config.quantization.compute_dtype))
    measure = functools.partial(evaluate, loss, blocks, accelerator, config.training.batch_size, tokenizer.pad_token_id)
    result: dict[str, Any] = {"dataset": config.data.dataset, "tokens": blocks.supervised, "blocks": len(blocks)}
    with model.disable_adapter() if adapter is not None else contextlib.nullcontext():
        result["base"] = {"loss": (value := measure()), "perplexity": perplexity(value)}
    if adapter is not None:
        result["adapter"] = {"loss": (value := measure()), "perplexity": perplexity(value)}
    for name in ("base", "adapter"):
        if name in result and accelerator.is_main_process:
            print(
                f"{name:<8} loss {result[name]['loss']:.4f} | perplexity {result[name]['perplexity']:.3f} | {result['tokens']:,} tokens"
            )
    if adapter is not None and accelerator.is_main_process:
        write_atomically(Path(adapter) / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
    return 0


def quiet_datasets() -> None:
    """Keep datasets from logging what it also raises and we report, and from drawing bars where there is no terminal."""
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: parse → load → data → train → save → plot."""
    try:
        options, config = parse(argv)
        quiet_libraries()
        quiet_datasets()
        if options.plan:
            return print_plan(config)
        if options.evaluate:
            return evaluate_adapter(config, options.adapter)
        output_dir = Path(config.training.output_dir)
        open_output(config, output_dir, options.overwrite)
        accelerator = create_accelerator(config, output_dir)
        log = Log(silent=not accelerator.is_main_process)
        refuse_without_gpu(config, accelerator.device)
        log.say(device_block(accelerator, usable_dtype(config.quantization.compute_dtype)))
        plan = plan_for(config)[1] if accelerator.device.type == "cuda" else None
        if plan is not None:
            log.say(plan.table())
        cap_memory(accelerator.device, config.performance.memory_limit_gib)
        session = build_session(config, accelerator, log.say)
        describe_data(session, config, log.say)
        run = start_run(config, session, log, options.overwrite)
    except ConfigError as error:
        return report(error)
    return execute(run, plan)


def execute(run: Run, plan: MemoryPlan | None) -> int:
    """Train, leave the results, and return the exit code."""
    if run.progress.step >= run.total_steps:
        run.log.say(f"nothing left to train: {run.output_dir} is at step {run.progress.step} of {run.total_steps}")
    tracker = run.config.training.report_to != "none"
    if tracker:
        run.session.accelerator.init_trackers("qlora", config={k: str(v) for k, v in flatten(run.config).items()})
    try:
        with stop_on_signal(run.log.say) as request:
            done = train(run, request)
            if done:
                finish(run, plan)
    except NumbersWentWrong as error:
        run.log.say(f"error: {error}")
        return 1
    except torch.OutOfMemoryError as error:
        if plan is not None:
            run.log.say(plan.table())
        run.log.say(
            f"error: out of GPU memory at a peak of {peak_gib(run.session.accelerator.device):.2f} GiB: {str(error).splitlines()[0]}"
        )
        run.log.say(
            "try a shorter data.max_length, a smaller training.batch_size, or training.gradient_checkpointing true"
        )
        return 3
    finally:
        if run.session.accelerator.is_main_process and run.progress.history:
            plot_training_curves(run.progress.history, run.output_dir / "training_curves.png")
        if tracker:
            run.session.accelerator.end_training()
    return 0 if done else 128 + (request.signum or 2)


if __name__ == "__main__":
    sys.exit(main())
