"""Fine-tune a causal language model in 4 bit with a LoRA adapter.

python train_qlora.py                                     config.yaml: Qwen2.5-3B-Instruct on Wikitext-2, 8 GB GPU
python train_qlora.py --config tiny/config.yaml           a small model on a CPU, in a minute, without a network
python train_qlora.py --rank 8 --alpha 16 --output_dir output_r8
python train_qlora.py --plan                              what it would take of memory, without the weights
python train_qlora.py --evaluate --adapter output_r8      loss and perplexity of base and adapter
python train_qlora.py --compare output_r8 output_r16      a table and a picture of finished runs
"""

import argparse
import os
import sys
from pathlib import Path

from config import (
    MODEL_PARTS,
    Config,
    ConfigError,
    build_parser,
    counted,
    load_config,
    missing_data,
    missing_model,
    parse_arguments,
)
from toolkit.earlier_run import config_with_adapter, refuse_other_run
from toolkit.startup import before_heavy_imports, reader_gone, report

# What --help shows first.
EVERYDAY = ("config", "model_name", "dataset", "output_dir", "num_epochs", "learning_rate", "rank", "max_length")
EVERYDAY += ("plan", "overwrite")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the script's own options and the configuration: schema < config.yaml < flags. Raises ConfigError."""
    parser = build_parser(__doc__, everyday=[f"--{name}" for name in EVERYDAY])
    add = parser.add_argument
    add("--plan", action="store_true", help="print the memory plan and exit: 0 fits, 3 does not")
    add("--evaluate", action="store_true", help="evaluate instead of training")
    add("--adapter", metavar="DIR", help="with --evaluate: the adapter's folder")
    add("--stride", type=int, metavar="N", help="with --evaluate: windows of max_length over the text, N tokens apart")
    add("--compare", nargs="+", metavar="DIR", help="print a table of finished runs and draw their curves")
    add("--output", metavar="FILE", help="with --compare: the picture (default: compare.png)")
    add("--overwrite", action="store_true", help="start over in an output_dir that holds a run, and replace it")
    options, overrides = parse_arguments(parser, argv)
    options.notes = []
    for name, owner in (("adapter", "evaluate"), ("stride", "evaluate"), ("output", "compare")):
        if getattr(options, name) and not getattr(options, owner):
            raise ConfigError(f"--{name}: goes with --{owner}")
    if options.compare:
        return options, Config()
    if options.adapter and not (Path(options.adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter: no adapter_config.json in {options.adapter}")
    given, beside = [Path(options.config)] if options.config else [], Path(__file__).with_name("config.yaml")
    if options.adapter:
        config, options.notes = config_with_adapter(Path(options.adapter), given, beside, overrides)
    else:
        config = load_config(given or [beside], overrides)
    if options.stride is not None and not 1 <= options.stride <= config.data.max_length:
        raise ConfigError(f"--stride: expected 1 to data.max_length ({config.data.max_length}), got {options.stride}")
    problems = [] if options.plan else missing_data(config.data.dataset)
    problems += missing_model(config.model.name, MODEL_PARTS[:1] if options.plan else MODEL_PARTS)
    if not (options.plan or options.evaluate) and os.path.isfile(config.training.output_dir):
        problems.append(f"training.output_dir: expected a folder, got the file {config.training.output_dir}")
    if problems:
        raise ConfigError(*problems)
    if not (options.plan or options.evaluate):
        refuse_other_run(config, options.overwrite)
    return options, config


if __name__ == "__main__":  # --help and every error in the configuration answer before torch is imported
    try:
        parse(sys.argv[1:])
    except ConfigError as error:
        sys.exit(report(error))
    before_heavy_imports()

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType
from datasets import DatasetDict, load_dataset  # noqa: F401  (load_dataset: for a prepare_dataset of your own)
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import quantization_utils
from config import TrainingConfig, flatten
from fast_path import attention, choice, compiled, dropout, layers
from fast_path.loss import SummedLoss, chunk_rows, compiled_chunk_loss, kernel_chunk_loss
from fast_path.micro_step import Learner, let_go
from fast_path.optimizers import create_optimizer
from quantization_utils import (
    compute_dtype_of,
    create_lora_config,
    load_base,
    load_tokenizer,
    prepare_model_for_training,
)
from toolkit import checkpoints, data_blocks, data_formats, earlier_run, evaluation, machine, memory, memory_plan
from toolkit.checkpoints import Found
from toolkit.data_blocks import Blocks, batches, make_blocks, sample_counts, step_windows
from toolkit.data_formats import load_rows, tokenize_rows
from toolkit.evaluation import block_losses, comparison, difference_line, mean_loss, perplexity, plot_training_curves
from toolkit.memory import peak_gib
from toolkit.memory_plan import GIB, MemoryPlan

# ------------------------------------------------------------------------------------------------ data


def prepare_dataset(config: Config, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Return the tokenised rows: a DatasetDict with the split train, maybe validation, and in them a column input_ids.

    Put your own in its place; packing and the held-out part come after it. Its rows are documents, or samples where it
    returns a column labels with -100 for the tokens that are read and not learned. `load_dataset` is imported for it.
    """
    return tokenize_rows(load_rows(config.data), tokenizer, config.data)


# ------------------------------------------------------------------------------------------------ one optimizer step


class NumbersWentWrong(RuntimeError):
    """A loss or gradient that is not finite: the run stops there, exit code 1."""


def create_scheduler(optimizer: Any, training: TrainingConfig, total_steps: int) -> Any:
    """Return the schedule: step k of a warm-up of W steps takes k / W of learning_rate, those after it transformers' own
    cosine, linear or constant.

    transformers' warm-up begins at 0, so that its first step would teach nothing, and a run of one step neither.
    """
    name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
    warmup = math.ceil(training.warmup_ratio * total_steps)
    theirs = get_scheduler(name, optimizer, warmup, total_steps).lr_lambdas[0]
    return LambdaLR(optimizer, lambda done: (done + 1) / warmup if done < warmup else theirs(done))


@dataclasses.dataclass
class Run:
    """A run in its output folder: what it learns with, and how far it is."""

    config: Config
    effective: Config  # with the quantisation and the adapter that the model really has: what is recorded
    accelerator: Accelerator
    log: checkpoints.Log
    tokenizer: PreTrainedTokenizerBase
    blocks: dict[str, Blocks | None]
    learner: Learner
    optimizer: Any
    scheduler: Any
    plan: MemoryPlan  # the shape that runs: micro-batch and checkpointed layers
    window: int  # sequences an optimizer step, over all micro-batches and processes
    total_steps: int
    fingerprint: dict[str, str]
    progress: checkpoints.Progress = dataclasses.field(default_factory=checkpoints.Progress)
    best_adapter: dict[str, torch.Tensor] | None = None
    held_out: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # block_losses of base and best adapter
    saved_time: float = dataclasses.field(default_factory=time.monotonic)
    unsaved: str = ""  # why the newest checkpoint could not be written

    @property
    def model(self) -> PeftModel:
        return self.learner.model

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.blocks["train"]) / self.window)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.training.output_dir)

    def note(self, row: dict) -> None:
        """Keep a row of metrics: in the history, in metrics.jsonl and in the tracker."""
        self.progress.history.append(row)
        self.log.row(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def sum_over_processes(run: Run, extra: list[float | torch.Tensor]) -> torch.Tensor:
    """Sum the gradients, in place, and the numbers in `extra` over all processes; return the latter, fp64."""
    device, gradients = run.accelerator.device, [p.grad for p in run.learner.parameters]
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in extra])
    if run.accelerator.num_processes == 1:
        return numbers
    flat = run.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return run.accelerator.reduce(numbers, "sum")


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss_sum: float
    tokens: int
    grad_norm: float
    stop: bool  # some process was asked to stop


def accumulate(run: Run, step: int, window: np.ndarray) -> tuple[torch.Tensor, int]:
    """Return (loss, tokens) summed over this process's part of a window, and leave the sum of the gradients in .grad."""
    learner, device, pad = run.learner, run.accelerator.device, run.tokenizer.pad_token_id
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    learner.zero_gradients()
    total, tokens = torch.zeros((), device=device), 0
    todo = batches(run.blocks["train"], window[rank::processes], run.plan.micro_batch, pad, device)
    for batch, count, positions in todo:
        total += learner.micro_step(step, torch.from_numpy(rank + processes * positions), batch)
        tokens += count
    return total, tokens


def accumulate_in_memory(run: Run, step: int, window: np.ndarray) -> tuple[torch.Tensor, int]:
    """Accumulate a window; where memory runs out, again from its start in the next smaller shape, which learns the
    same.
    """
    while True:
        try:
            return accumulate(run, step, window)
        except torch.OutOfMemoryError as error:
            problem = error.with_traceback(None)  # its frames hold the tensors of the micro-batch that failed
        smaller = memory_plan.step_down(run.plan, run.window // run.accelerator.num_processes, run.learner.fast.compile)
        if smaller is None:
            raise problem
        run.log.say(f"out of GPU memory with {run.plan.shape}: on with {smaller.shape}, which learns the same")
        run.plan = smaller
        run.learner.reshape(smaller.micro_batch, smaller.checkpointed, smaller.offload)


def show_blocks(run: Run, numbers: np.ndarray) -> str:
    """Return training blocks by number, each with its files and rows and the start of its text."""
    blocks = run.blocks["train"]
    shown = (data_blocks.show_block(blocks[i], run.tokenizer, 40) for i in numbers)
    try:
        places = data_blocks.places_of(numbers, blocks, run.config.data)
    except (ConfigError, OSError, ValueError) as error:  # files that are gone must not hide what went wrong
        places = [f"its rows are out of reach, {error}" for _ in numbers]
    return ", ".join(f"{i} ({place}: {text})" for i, place, text in zip(numbers, places, shown, strict=True))


def training_step(run: Run, step: int, window: np.ndarray, stop: bool) -> StepResult:
    """Learn from the blocks of one window: sum loss and gradients over all of them, divide once, clip, step."""
    learner, scaler = run.learner, run.learner.scaler
    learner.model.train()
    total, tokens = accumulate_in_memory(run, step, window)
    sums = sum_over_processes(run, [total, tokens, stop])
    scaler.unscale_(run.optimizer)
    torch._foreach_mul_([p.grad for p in learner.parameters], 1 / sums[1].float().clamp_min(1))
    norm = nn.utils.clip_grad_norm_(learner.parameters, run.config.training.max_grad_norm)
    if step == 0 and tokens and not any(p.grad.any() for n, p in learner.model.named_parameters() if "lora_B" in n):
        raise NumbersWentWrong("step 1: every gradient of lora_B is zero: the loss does not reach the adapter")
    # All of it is launched before the numbers are read: the GPU still works on the micro-batches, and waits for no
    # launch.
    scaler.step(run.optimizer)
    loss_sum, tokens, stops, grad_norm = *sums.tolist(), norm.item()
    # An overflow in float16 is the scaler's business: it leaves out the step and halves its scale, from 2**6 on.
    overflow = scaler.is_enabled() and not math.isfinite(grad_norm) and scaler.get_scale() > 2.0**-10
    if not (math.isfinite(loss_sum) and (math.isfinite(grad_norm) or overflow)):
        raise NumbersWentWrong(
            f"step {step + 1}: loss {loss_sum / max(tokens, 1)}, gradient norm {grad_norm} (compute type "
            f"{learner.loss.dtype}): try a lower learning_rate, or look at its blocks: {show_blocks(run, window)}"
        )
    scaler.update()
    run.scheduler.step()
    return StepResult(loss_sum, int(tokens), grad_norm, bool(stops))


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate_in_memory(run: Run, blocks: Blocks) -> torch.Tensor:
    """Return block_losses; where memory runs out, in half the micro-batch and without a graph. Training keeps its
    shape.
    """
    learner, size, loss = run.learner, run.plan.micro_batch, run.learner.evaluation_loss
    learner.model.eval()
    while True:
        try:
            return block_losses(loss, blocks, run.accelerator, size, run.tokenizer.pad_token_id).cpu()
        except torch.OutOfMemoryError:
            if size == 1 and loss is learner.loss:
                raise
        size, loss = max(1, size // 2), learner.loss
        run.log.say(f"out of GPU memory in an evaluation: {counted(size, 'sequence')} at a time, without a graph")
        learner.captured_evaluation = None
        let_go()


# ------------------------------------------------------------------------------------------------ checkpoints


def save_state(run: Run) -> None:
    """Write a checkpoint of everything that going on needs."""
    if not run.accelerator.is_main_process:
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged optimizer states are managed memory that the CPU is about to read
    state = {
        "progress": dataclasses.asdict(run.progress),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.learner.scaler.state_dict(),
        "best_adapter": run.best_adapter or {},
        "held_out": run.held_out,
        "config": earlier_run.settings(run.config),
        "effective": earlier_run.settings(run.effective),
        "fingerprint": run.fingerprint,
        "shape": {
            "micro_batch": run.plan.micro_batch,
            "checkpointed": run.plan.checkpointed,
            "offload": run.plan.offload,
            "logit_chunk": run.plan.logit_chunk,
            "window": run.window,
            "processes": run.accelerator.num_processes,
        },
    }
    adapter = checkpoints.adapter_tensors(run.model)
    peft_config = checkpoints.adapter_settings(run.model, run.config.model.name)
    step, keep = run.progress.step, run.config.training.save_total_limit
    run.saved_time = time.monotonic()
    try:
        folder = checkpoints.write_checkpoint(run.output_dir, step, adapter, peft_config, state, keep)
        run.unsaved, line = "", f"checkpoint written to {folder}"
    except OSError as error:  # stopping here would save nothing more, and the disk may have room by the next one
        run.unsaved = line = f"checkpoint not written ({error}); {checkpoints.last_good(run.output_dir)}"
    run.log.say(f"step {step}: {line}")


def restore(run: Run, adapter: dict[str, torch.Tensor], state: dict) -> None:
    """Put the run where the checkpoint left it."""
    run.progress = checkpoints.Progress(**state["progress"])
    run.best_adapter = state["best_adapter"] or None
    run.held_out = state.get("held_out", {})  # a checkpoint of before 2026-11-24 has none
    set_peft_model_state_dict(run.model, adapter)
    run.optimizer.load_state_dict(state["optimizer"])
    run.learner.scaler.load_state_dict(state["scaler"])
    schedule = run.scheduler.lr_lambdas  # of the steps that this run is to make, which may be more than before
    run.scheduler.load_state_dict(state["scheduler"])
    run.scheduler.lr_lambdas = schedule
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.base_lrs, strict=True):
        group["lr"] = rate * schedule[0](run.progress.step)


def start_run(run: Run, found: Found | None) -> None:
    """Put the run where its checkpoint left it, if there is one, and open its output folder; refuse before any write."""
    log = run.log
    if found is not None:
        folder, adapter, state = found
        errors = (KeyError, TypeError, ValueError, AttributeError, RuntimeError)
        with checkpoints.refusing(f"training.resume: {folder} is of another model or version", *errors):
            # A checkpoint of before 2026-11-29 kept what was configured alone.
            before, now = (state["effective"], run.effective) if "effective" in state else (state["config"], run.config)
            known = {**state, "config": before}
            checkpoints.check_resumable(known, now, run.fingerprint, run.window, folder.name)
            restore(run, adapter, state)
    checkpoints.check_space(run.config.training, [p.numel() for p in run.learner.parameters])
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        history, template = run.progress.history, run.blocks["train"].template
        log.open(checkpoints.open_output(run.effective, history, found is None, template))
    if found is not None:
        log.say(f"resuming from {folder} at step {run.progress.step} of {run.total_steps}")
        now = earlier_run.settings(run.config)
        if any(state["config"][key] != now[key] for key in ("training.num_epochs", "training.max_steps")):
            log.say(f"the learning rate follows the schedule of {counted(run.total_steps, 'step')} from here on")


# ------------------------------------------------------------------------------------------------ the loop


def log_step(run: Run, result: StepResult, rate: float) -> None:
    """Note the mean loss since the last row and how fast it went."""
    progress = run.progress
    row = {
        "step": progress.step,
        "epoch": round(progress.step / run.steps_per_epoch, 4),
        "loss": progress.loss_sum / max(progress.loss_tokens, 1),
        "learning_rate": rate,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,  # a step that the scaler skipped
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.loss_tokens / progress.seconds, 1),
        "peak_gib": round(peak_gib(run.accelerator.device), 3),
    }
    progress.loss_sum, progress.loss_tokens, progress.seconds = 0.0, 0, 0.0
    run.note(row)
    run.log.say(
        f"step {row['step']}/{run.total_steps} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | lr {rate:.2e} | "
        f"grad norm {result.grad_norm:.3f} | {row['tokens_per_second']:,.0f} tokens/s | peak {row['peak_gib']:.2f} GiB"
    )


def evaluate_and_keep_best(run: Run) -> None:
    """Evaluate on the held-out blocks, note it, and keep a copy of the adapter if none was better."""
    progress, blocks = run.progress, run.blocks["validation"]
    if blocks is None or any(row["step"] == progress.step for row in progress.evaluations):
        return
    sums = evaluate_in_memory(run, blocks)
    loss = mean_loss(sums)
    if not math.isfinite(loss):
        hint = "" if progress.step else ", before anything was learned: look at model.name's weights and compute_dtype"
        raise NumbersWentWrong(f"step {progress.step}: the validation loss is {loss}{hint}")
    if progress.step == 0:
        run.held_out["base"] = sums
    run.note({"step": progress.step, "eval_loss": loss, "perplexity": perplexity(loss)})
    progress.worse += 1
    line = f"step {progress.step}: validation loss {loss:.4f} | perplexity {perplexity(loss):.2f}"
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        run.best_adapter, run.held_out["adapter"] = checkpoints.adapter_tensors(run.model), sums
        line += " | best"
    run.log.say(line)


def checkpoint_due(run: Run) -> bool:
    """Return whether save_steps or save_minutes asks for a checkpoint now."""
    training = run.config.training
    minutes = (time.monotonic() - run.saved_time) / 60
    timed = training.save_minutes is not None and minutes >= training.save_minutes
    return timed or (training.save_steps is not None and run.progress.step % training.save_steps == 0)


def evaluation_due(run: Run) -> bool:
    """Return whether this step ends with an evaluation, as step 0 and the last one do."""
    every = run.config.training.eval_steps or run.steps_per_epoch
    return run.progress.step % every == 0 or run.progress.step == run.total_steps


def stale(run: Run) -> bool:
    """Return whether early stopping's patience is at its end."""
    patience = run.config.training.early_stopping_patience
    return patience is not None and run.progress.worse >= patience


def train(run: Run, request: checkpoints.StopRequest) -> bool:
    """Train until the last step or early stopping's patience ends; return False if a signal stopped it before.

    Each turn: step → log → evaluate → save.
    """
    training, progress = run.config.training, run.progress
    if evaluation_due(run):  # at step 0, or where a signal stopped the run before it
        evaluate_and_keep_best(run)
    first, windows = progress.step, step_windows(len(run.blocks["train"]), run.window, training.seed, progress.step)
    hidden = run.log.silent or not sys.stderr.isatty()
    with tqdm(total=run.total_steps, initial=progress.step, unit="step", disable=hidden) as bar:
        while progress.step < run.total_steps and not stale(run):
            start, rate = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
            _, window = next(windows)
            result = training_step(run, progress.step, window, request.signum is not None)
            seconds = time.perf_counter() - start
            progress.count(result.loss_sum, result.tokens, seconds)
            if progress.step == first + 1 and (reason := compiled.compiled_in_pieces()):
                run.log.say(f"fast path: the layers are compiled in pieces, which costs speed and memory: {reason}")
            loss, speed = result.loss_sum / max(result.tokens, 1), result.tokens / seconds
            bar.set_postfix(loss=f"{loss:.4f}", tokens_s=f"{speed:,.0f}", refresh=False)
            bar.update()
            last, epoch_end = progress.step == run.total_steps, progress.step % run.steps_per_epoch == 0
            if last or progress.step % training.logging_steps == 0:
                log_step(run, result, rate)
            # Processes must agree; one alone need not wait for the next step's sums to see the signal.
            stop = result.stop or (run.accelerator.num_processes == 1 and request.signum is not None)
            if evaluation_due(run) and not stop:
                evaluate_and_keep_best(run)
            if last or epoch_end or stop or stale(run) or checkpoint_due(run):
                save_state(run)
            if stop:
                return False
    if stale(run):
        patience, best = training.early_stopping_patience, progress.best_step
        run.log.say(f"stopping early: {counted(patience, 'evaluation')} without a better loss than that of step {best}")
    return True


# ------------------------------------------------------------------------------------------------ what a run leaves


def finish(run: Run) -> None:
    """Leave the best adapter with its model card in the output folder and say what came out."""
    progress, say, device = run.progress, run.log.say, run.accelerator.device
    if run.best_adapter is not None:
        set_peft_model_state_dict(run.model, run.best_adapter)
    if run.accelerator.is_main_process:
        part = run.blocks["train"]
        checkpoints.save_adapter(run.output_dir, run.model, run.tokenizer, run.effective, progress, part)
    if progress.evaluations:
        before, after = progress.evaluations[0]["perplexity"], perplexity(progress.best_loss)
        best = f"the adapter of step {progress.best_step}, the best by validation loss"
        say(f"perplexity {before:.2f} before, {after:.2f} after ({best})")
    if len(run.held_out) == 2:
        held = run.blocks["validation"]
        say(difference_line(comparison(held.dataset, held, None, run.held_out)))
    planned = f" | planned {run.plan.reserved / GIB:.2f} for {run.plan.shape}" if run.plan.parts else ""
    say(f"peak memory {peak_gib(device):.2f} GiB{planned}")
    say(f"adapter, curves and log are in {run.output_dir}")


# ------------------------------------------------------------------------------------------------ setting up


def create_accelerator(training: TrainingConfig) -> Accelerator:
    """Return accelerate's view of devices, processes and trackers; ConfigError where they cannot work."""
    tracker = None if training.report_to == "none" else training.report_to
    known = [kind.value for kind in LoggerType if kind.value != "all"]
    if tracker is not None and tracker not in known:
        raise ConfigError(f"training.report_to: expected none or one of {', '.join(known)}, got {tracker!r}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    hint = f"use torchrun --nproc_per_node {launched}"
    alone = ConfigError(f"the launcher announces {launched} processes, but this one runs alone: {hint}")
    if launched > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise alone  # torch would wait for the others
    cpu = not torch.cuda.is_available()  # without it accelerate starts no gloo group on a machine without a GPU
    runs = os.path.join(training.output_dir, "runs")
    try:
        accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=1, log_with=tracker, project_dir=runs)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"training.report_to: {tracker}: {' '.join(str(error).split())[:200]}") from None
    if tracker is not None and not accelerator.log_with:
        raise ConfigError(f"training.report_to: the package of {tracker} is not installed")
    if launched != accelerator.num_processes:
        raise alone
    return accelerator


def sequences_a_step(training: TrainingConfig, processes: int) -> int:
    """Return the sequences of an optimizer step over all micro-batches and processes."""
    window = training.batch_size * training.gradient_accumulation_steps
    if window % processes:
        name = "training.batch_size x training.gradient_accumulation_steps"
        raise ConfigError(f"{name}: expected a multiple of {processes} processes, got {window}")
    return window


def build_learner(
    config: Config,
    model: PreTrainedModel,
    plan: MemoryPlan,
    say: Callable[[str], None],
    samples: Sequence[int] = (),
) -> Learner:
    """Attach a fresh adapter to the base model and set up the path that its micro-batches take.

    plan: their shape. samples: how many the fullest blocks hold that must not see each other, in descending order.
    """
    seed, device = config.training.seed, model.device
    transformers.set_seed(seed)  # of the fresh adapter
    peft_model = prepare_model_for_training(model, create_lora_config(**vars(config.lora)), plan.checkpointed)
    config = checkpoints.effective(config, peft_model)  # of functions that somebody may have edited
    p, dtype = config.lora.dropout, compute_dtype_of(config)
    say(quantization_utils.parameter_line(peft_model))
    attention.use_causal_attention(model)
    apart = [attention.keep_samples_apart(model, config.data.max_length, samples)] if samples else []
    clock = dropout.DropoutClock(seed, device)
    dropout.use_stateless_dropout(peft_model, p, clock)
    loss = SummedLoss(peft_model, dtype)
    fast = choice.choose_fast_path(config.performance, peft_model, dtype, device, plan.offload)
    if plan.offload and not fast.compile:
        raise ConfigError(f"training.gradient_checkpointing: offload needs compiled layers; {fast.line}")
    if fast.fused_lora:
        layers.fuse(peft_model, clock, p, fast.kernels)
    if fast.compile:
        compiled.compile_layers(peft_model)
        loss.options["chunk_loss"] = compiled_chunk_loss()
    if fast.fused_lora and fast.kernels:
        loss.options["chunk_loss"] = kernel_chunk_loss
    if device.type == "cuda":
        free = memory.free_bytes(device, config.performance.memory_limit_gib)  # for a shape that nobody planned
        loss.options["chunk"] = plan.logit_chunk or chunk_rows(len(loss.head.weight), free)
    for line in (fast.line, *apart):
        say(line)
    # Losses are sums over tokens, so gradients are large already: 2**16, torch's start, would overflow fp16 at once.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, enabled=dtype is torch.float16)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    shape = plan.micro_batch, config.data.max_length
    return Learner(peft_model, trained, loss, clock, scaler, fast, shape, plan.offload)


def be_deterministic() -> None:
    """Have torch take only algorithms that give the same bits each time, and raise where an operator has none.

    warn_only would leave FlashAttention's backward as it is: it asks for an error, not for a warning.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first product makes cuBLAS's handle
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that was not written
    import torch._inductor.config as inductor  # seconds to import, for this setting alone

    inductor.deterministic = True  # no kernel is chosen by a stopwatch


def build_run(config: Config, accelerator: Accelerator, log: checkpoints.Log, found: Found | None) -> Run:
    """Load the model, prepare the adapter and the data, and return the run at step 0."""
    device, training, say = accelerator.device, config.training, log.say
    if config.performance.deterministic:
        be_deterministic()
    window = sequences_a_step(training, accelerator.num_processes)
    sequences, plan = window // accelerator.num_processes, None
    if device.type == "cuda":  # before the weights are fetched; a CPU takes the shape that is configured
        plan = memory.plan_run(config, accelerator, sequences, found[2]["shape"] if found else {}, say)
    tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
    with accelerator.main_process_first():
        blocks = make_blocks(prepare_dataset(config, tokenizer), tokenizer, config.data, training.seed)
    model, _ = load_base(config, device)
    for line in (
        memory.memory_line(device),
        *quantization_utils.check_length(config.data.max_length, model.config),
    ):
        say(line)
    if isinstance(blocks["train"], data_blocks.SampleBlocks):
        for line in data_formats.untrained_chat_tokens(model, tokenizer):
            say(line)
    plan = plan or memory_plan.unplanned(config, sequences, len(model.get_decoder().layers))
    samples = sample_counts(*blocks.values())[:window]
    learner = build_learner(config, model, plan, say, samples)
    optimizer = create_optimizer(learner.parameters, training, device, say)
    found_config = checkpoints.effective(config, learner.model)
    for line in checkpoints.edited_line(config, found_config):
        say(f"{line}; the run's config.yaml and model card record what the model has")
    steps = training.max_steps or max(1, math.ceil(training.num_epochs * math.ceil(len(blocks["train"]) / window)))
    scheduler = create_scheduler(optimizer, training, steps)
    prints = checkpoints.fingerprint(learner.model, tokenizer, blocks)
    parts = accelerator, log, tokenizer, blocks, learner, optimizer, scheduler, plan, window, steps, prints
    return Run(config, found_config, *parts)


def describe_data(run: Run) -> None:
    """Say how many blocks there are and how many optimizer steps that makes, packed and unpacked."""
    part, held, say = run.blocks["train"], run.blocks["validation"], run.log.say
    held_out = f"{counted(held.tokens, 'token')} in {counted(len(held), 'block')}" if held else "nothing"
    say(
        f"data: {counted(part.rows, 'row')}, {counted(part.documents, 'document')}, {counted(part.tokens, 'token')} in "
        f"{counted(len(part), 'block')} of {part.length}; held out: {held_out}"
    )
    say(
        f"steps: {counted(run.total_steps, 'optimizer step')} of {counted(run.window, 'sequence')} ({run.steps_per_epoch:,} an epoch; "
        f"one row a sequence would make {math.ceil(part.rows / run.window):,})"
    )
    for line in (f"read as {part.source}", *part.notes, *(held.notes if held else ())):
        say(f"data: {line}")
    say(f"first block: {data_blocks.show_block(part[0], run.tokenizer)}")


# ------------------------------------------------------------------------------------------------ commands


def corpus_line(config: Config, sequences: int) -> str:
    """Return tokens and optimizer steps an epoch, or that they are unknown where data or tokenizer is out of reach."""
    try:
        tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
        blocks = make_blocks(prepare_dataset(config, tokenizer), tokenizer, config.data, config.training.seed)["train"]
    except ConfigError:
        return "an epoch: unknown, the tokenizer or data.dataset is out of reach"
    steps = counted(math.ceil(len(blocks) / sequences), "optimizer step")
    return f"an epoch: {counted(blocks.tokens, 'token')}, {steps} of {counted(sequences, 'sequence')}"


def evaluate_adapter(config: Config, adapter: str | None, stride: int | None) -> int:
    """Print loss and perplexity of the base and, given an adapter, of both and their difference; evaluation.json keeps
    them.

    stride: of windows over the text as it is, as perplexities on Wikitext are reported; None takes the validation
    blocks.
    """
    accelerator = create_accelerator(config.training)
    machine.refuse_without_gpu(config, accelerator.device)
    say = print if accelerator.is_main_process else (lambda line: None)
    if quantization_utils.replaces_bf16(config):
        say(quantization_utils.SLOW_BF16)
    model, tokenizer = load_base(config, accelerator.device)
    found_config = checkpoints.effective(config, model)
    lines = checkpoints.edited_line(config, found_config)
    for line in (*lines, *quantization_utils.check_length(config.data.max_length, model.config)):
        say(line)
    rows = prepare_dataset(config, tokenizer)
    blocks = make_blocks(rows, tokenizer, config.data, config.training.seed, close=stride is None)["validation"]
    if blocks is None:
        raise ConfigError("data.validation_fraction: nothing is held out to evaluate on")
    dataset, blocks = blocks.dataset, blocks if stride is None else data_blocks.windows_of(blocks, stride)
    if adapter is not None:
        model = quantization_utils.load_adapter(model, adapter)
    attention.use_causal_attention(model)
    if samples := sample_counts(blocks)[:1]:
        attention.keep_samples_apart(model, config.data.max_length, samples)
    loss = SummedLoss(model.eval(), compute_dtype_of(found_config))
    names, sums = ["base"] if adapter is None else ["base", "adapter"], {}
    for name in names:
        with contextlib.nullcontext() if name == names[-1] else model.disable_adapter():
            sums[name] = block_losses(loss, blocks, accelerator, 1, tokenizer.pad_token_id).cpu()
        value = mean_loss(sums[name])
        say(f"{name:<8} loss {value:.4f} | perplexity {perplexity(value):.3f} | {counted(blocks.supervised, 'token')}")
    result = comparison(dataset, blocks, stride, sums)
    if adapter is not None:
        say(difference_line(result))
        if accelerator.is_main_process:
            content = json.dumps(result, indent=2) + "\n"
            checkpoints.write_atomically(Path(adapter) / "evaluation.json", content.encode())
    return 0


def execute(run: Run, request: checkpoints.StopRequest) -> int:
    """Train, leave the results, and return the exit code."""
    say, accelerator, progress = run.log.say, run.accelerator, run.progress
    if progress.step >= run.total_steps:
        say(f"nothing left to train: {run.output_dir} is at step {progress.step} of {run.total_steps}")
    accelerator.init_trackers("qlora", config={key: str(value) for key, value in flatten(run.effective).items()})
    try:
        done = train(run, request)
        if done:
            finish(run)
    except NumbersWentWrong as error:
        say(f"error: {error}; {checkpoints.last_good(run.output_dir)}")
        return 1
    except torch.OutOfMemoryError as error:
        peak = f"a peak of {peak_gib(accelerator.device):.2f} GiB with {run.plan.shape}"
        good = checkpoints.last_good(run.output_dir)
        say(f"error: out of GPU memory at {peak}; {good}: {str(error).splitlines()[0]}")
        for line in memory.ran_out(run.config, run.plan, accelerator.device):
            say(line)
        return 3
    finally:
        if accelerator.is_main_process and progress.history:
            plot_training_curves(progress.history, run.output_dir / "training_curves.png")
        if run.config.training.report_to != "none":
            accelerator.end_training()
    run.log.flush()
    if run.unsaved:
        rest = "the adapter is whole" if done else "make room and start the same command again"
        say(f"error: step {progress.step}: {run.unsaved}; {rest}")
        return 1
    return 0 if done else 128 + (request.signum or 2)


def quiet_datasets() -> None:
    """Keep datasets from logging what it also raises and we report, and from drawing bars without a terminal."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: parse → load → data → train → save → plot."""
    held, rest = contextlib.ExitStack(), ""  # the lock on the output folder; what helps after an error
    doing = "loading"  # when memory runs out; training and its evaluations say so themselves, with their shape
    try:
        options, config = parse(argv)
        quantization_utils.quiet_libraries()
        quiet_datasets()
        if options.plan:
            return memory.print_plan(config, corpus_line)
        for line in options.notes:
            print(line, file=sys.stderr)
        if options.evaluate:
            doing = "evaluating"
            return evaluate_adapter(config, options.adapter, options.stride)
        if options.compare:
            return evaluation.compare_runs(options.compare, options.output or "compare.png")
        rest = "; the same command goes on from the last checkpoint"
        checkpoints.check_output(config.training)
        accelerator = create_accelerator(config.training)
        device, dtype = accelerator.device, compute_dtype_of(config)
        log = checkpoints.Log(silent=not accelerator.is_main_process)
        machine.refuse_without_gpu(config, device)
        if accelerator.is_main_process:
            held.enter_context(checkpoints.locked(Path(config.training.output_dir)))
        log.say(machine.device_block(device, dtype, accelerator.num_processes))
        if quantization_utils.replaces_bf16(config):
            log.say(quantization_utils.SLOW_BF16)
        memory.cap_memory(device, config.performance.memory_limit_gib)
        found = checkpoints.find_checkpoint(config.training, options.overwrite, log.say)
        run = build_run(config, accelerator, log, found)
        describe_data(run)
        start_run(run, found)
        return execute(run, held.enter_context(checkpoints.stop_on_signal(log.say)))
    except memory.NoFit as error:
        print(error, file=sys.stderr)
        return 3
    except torch.OutOfMemoryError as error:
        report(ConfigError(f"out of GPU memory while {doing}: {str(error).splitlines()[0]}"))
        return 3
    except ConfigError as error:
        return report(error)
    except (OSError, SafetensorError, torch.AcceleratorError) as error:  # a full disk, a driver that was reset
        if isinstance(error, BrokenPipeError) and reader_gone("\n"):
            return 1
        report(ConfigError(f"{type(error).__name__}: {str(error).splitlines()[0]}{rest}"))
        return 1
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = str(error).split()[0]
        return report(
            ConfigError(
                f"performance.deterministic: {operator} has no form that gives the same bits each time; use false"
            )
        )
    finally:
        held.close()
        reader_gone()


if __name__ == "__main__":
    sys.exit(main())
