"""Fine-tune a causal language model in 4 bit with a LoRA adapter.

python train_qlora.py                                     config.yaml: Qwen2.5-3B-Instruct on Wikitext-2, 8 GB GPU
python train_qlora.py --config tiny/config.yaml           a small model on a CPU, in minutes, without a network
python train_qlora.py --rank 8 --alpha 16 --output_dir output_r8
python train_qlora.py --plan                              the GPU memory that a run would need, without the weights
python train_qlora.py --evaluate --adapter output_r8      loss and perplexity of base and adapter
python train_qlora.py --compare output_r8 output_r16      a table and a picture of finished runs
python train_qlora.py --runs                              a list of the runs below the current folder
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import toolkit.startup

sys.excepthook = toolkit.startup.in_one_line  # a package that is not installed is named in one line

from config import Config, ConfigError, counted, load_config
from toolkit.cards import find_card
from toolkit.earlier_run import config_with_adapter, refuse_other_run
from toolkit.encodings import check_config
from toolkit.flags import build_parser, parse_arguments
from toolkit.local_paths import MODEL_PARTS, missing_model, missing_sources
from toolkit.run_commands import add_flags, answer, commands_of, is_asked
from toolkit.start_adapter import with_start_adapter
from toolkit.startup import before_heavy_imports, reader_gone, report, run_and_exit, unusable, visible, wake_gpu
from toolkit.template_files import check_template_files

# What --help shows first.
EVERYDAY = ["config", "model_name", "dataset", "output_dir", "num_epochs", "learning_rate", "rank"]
EVERYDAY += ["max_length", "plan", "overwrite"]


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the script's own options and the configuration: schema < config.yaml < flags. Raises ConfigError."""
    parser = build_parser(__doc__, everyday=[f"--{name}" for name in EVERYDAY])
    add = parser.add_argument
    add("--plan", action="store_true", help="print the memory plan and exit: 0 fits, 3 does not")
    add("--card", metavar="NAME", help="with --plan: for this card, such as 'RTX 3060', and not the one at hand")
    add("--processes", type=int, metavar="N", help="with --plan: for a run of N processes, each on a card of its own")
    add("--evaluate", action="store_true", help="evaluate instead of training")
    add("--adapter", metavar="DIR", help="with --evaluate: the adapter's folder")
    add("--stride", type=int, metavar="N", help="with --evaluate: windows of max_length over the text, N tokens apart")
    add(
        "--generate",
        type=int,
        metavar="N",
        help="with --evaluate: answer N held-out prompts too, and score the answers",
    )
    add("--compare", nargs="+", metavar="DIR", help="print a table of finished runs and draw their curves")
    add("--output", metavar="FILE", help="with --compare: the picture (default: compare.png)")
    add("--overwrite", action="store_true", help="replace the run in output_dir; with --push: the files in NAME")
    add_flags(parser)
    options, overrides = parse_arguments(parser, argv)
    if problems := unusable(vars(options)):
        raise ConfigError(*problems)
    options.notes = []
    owners = {"adapter": "evaluate", "stride": "evaluate", "generate": "evaluate", "output": "compare"}
    owners |= {"card": "plan", "processes": "plan"}
    for name, owner in owners.items():
        if getattr(options, name) is not None and not getattr(options, owner):
            hint = "; to go on from an adapter, use --init_adapter" if name == "adapter" else ""
            raise ConfigError(f"--{name}: goes with --{owner}{hint}")
    if options.card is not None:
        find_card(options.card)
    if options.processes is not None and options.processes < 1:
        raise ConfigError(f"--processes: expected a number of processes >= 1, got {options.processes}")
    if is_asked(options, overrides) or options.compare:
        return options, Config()
    if options.adapter and not (Path(options.adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter: no adapter_config.json in {options.adapter}")
    given = [Path(options.config)] if options.config else []
    beside = Path(__file__).with_name("config.yaml")
    for path in given or [beside]:
        check_config(path)
    if options.adapter:
        config, options.notes = config_with_adapter(Path(options.adapter), given, beside, overrides, evaluate=True)
    else:
        config = load_config(given or [beside], overrides)
    if not options.evaluate:
        config = with_start_adapter(config, writes=not options.plan)
    elif "lora.init_adapter" in config.flags:
        raise ConfigError("lora.init_adapter: is for training; --evaluate takes an adapter as --adapter")
    if options.stride is not None and not 1 <= options.stride <= config.data.max_length:
        raise ConfigError(f"--stride: expected 1 to data.max_length ({config.data.max_length}), got {options.stride}")
    if options.generate is not None and options.generate < 1:
        raise ConfigError(f"--generate: expected a number of prompts >= 1, got {options.generate}")
    problems = [] if options.plan else missing_sources(config.data)
    problems += missing_model(config.model.name, MODEL_PARTS[:1] if options.plan else MODEL_PARTS)
    if not (options.plan or options.evaluate) and os.path.isfile(config.training.output_dir):
        problems.append(f"training.output_dir: expected a folder, got the file {config.training.output_dir}")
    if problems:
        raise ConfigError(*problems)
    check_template_files(config.model.name)
    if not (options.plan or options.evaluate or toolkit.startup.launched()):  # see as_of_this_start
        refuse_other_run(config, options.overwrite)
    return options, config


if __name__ == "__main__":  # --help and every error in the configuration answer before torch is imported
    try:
        if (code := answer(parse(sys.argv[1:])[0])) is not None:
            sys.exit(code)
    except ConfigError as error:
        if not toolkit.startup.announced():  # several processes tell each other of it, and then one of them says it
            sys.exit(report(error))
    before_heavy_imports(announce=True)
    wake_gpu()
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import DatasetDict, load_dataset  # noqa: F401  (load_dataset: for a prepare_dataset of your own)
from peft import PeftModel
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import quantization_utils
from config import TrainingConfig, flatten
from fast_path import attention, choice, compiled, dropout, families, layers, sharding, token_rows
from fast_path.loss import CausalLMLoss, compiled_chunk_loss, default_logit_chunk, kernel_chunk_loss, perplexity
from fast_path.micro_step import Learner, be_deterministic
from fast_path.optimizers import create_optimizer
from fast_path.swapping import NoMainMemory
from quantization_utils import compute_dtype_of, create_lora_config, prepare_model_for_training, with_tokens
from toolkit import checkpoints, data_sources, earlier_run, evaluation, machine, memory, memory_plan, processes
from toolkit.adapters import put_weights, start_from_adapter
from toolkit.base_lines import base_lines, check_length
from toolkit.chat_templates import adopt_template, prepare_child
from toolkit.compare import compare_runs
from toolkit.curves import call_plot, plot_training_curves, rates_of
from toolkit.data_blocks import Blocks, sample_counts, step_windows
from toolkit.data_files import quiet_datasets
from toolkit.data_formats import untrained_chat_tokens
from toolkit.data_sources import SourceRows, make_blocks, read_sources
from toolkit.evaluation import mean_loss, of_each
from toolkit.memory import peak_gib
from toolkit.memory_plan import MemoryPlan, sequences_per_step
from toolkit.resume import Found, check_resumable, check_tensors, find_checkpoint, fingerprint, restore_schedule
from toolkit.run_lines import data_lines, end_lines, next_command, resume_lines, step_line
from toolkit.run_state import after_failure, as_of_this_start, refuse_other_start, share_output, write_state
from toolkit.sharding import cannot_repeat, load_base, own_batches
from toolkit.text_width import for_stdout
from toolkit.turn_ends import left_beside, load_tokenizer, teach_ends

# ------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    doing, output_dir, again = "loading", "", ""  # for the messages of errors
    try:
        processes.join()
        with processes.together(processes.ENDING):
            options, config = parse(argv)
            processes.refuse_differences(commands_of(options))
            if (code := answer(options)) is not None:
                return code
            if (options.plan or options.compare) and not processes.is_first():
                return 0
            quantization_utils.quiet_libraries()
            quiet_datasets()
            if options.plan:
                return memory.print_plan(config, epoch_size, options.card, options.processes)
            if options.compare:
                return compare_runs(options.compare, options.output or "compare.png")
            for line in options.notes:
                print(visible(line), file=sys.stderr)
            processes.refuse_differences(earlier_run.common_settings(config))
            if options.evaluate:
                doing = "evaluating"
                return evaluate_adapter(config, options.adapter, options.stride, options.generate)
            output_dir = config.training.output_dir
            again = earlier_run.continuing_command(argv, config.training.resume)
            return fine_tune(*as_of_this_start(config, options.overwrite), again)
    except memory.NoFit as error:
        print(visible(str(error)), file=sys.stderr)
        return 3
    except torch.OutOfMemoryError as error:
        report(ConfigError(f"out of GPU memory while {doing}: {str(error).splitlines()[0]}"))
        return 3
    except ConfigError as error:
        return report(error)
    except (MemoryError, OSError, RuntimeError, SafetensorError, torch.AcceleratorError) as error:
        return machine.failed(error, earlier_run.continues(output_dir, again))
    finally:
        reader_gone()


# ------------------------------------------------------------------------------------------------ the commands


def fine_tune(config: Config, overwrite: bool, again: str) -> int:
    """Set a run up, train, leave the results in the output folder, and return the exit code.

    again: the command that continues the run if it is stopped.
    """
    processes.first_alone(lambda: checkpoints.check_output(config.training))
    accelerator = machine.create_accelerator(config.training, config.performance.shard_base)
    device = accelerator.device
    log = checkpoints.Log(silent=not accelerator.is_main_process)
    machine.refuse_without_gpu(config, device)
    with checkpoints.interrupted_early(log.say), contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(checkpoints.locked(Path(config.training.output_dir), log.say))
        share_output(Path(config.training.output_dir))
        log.say(machine.device_block(device, compute_dtype_of(config), accelerator.num_processes))
        if quantization_utils.replaces_bf16(config):
            log.say(quantization_utils.SLOW_BF16)
        memory.cap_memory(device, config.performance.memory_limit_gib)
        found = find_checkpoint(config.training, overwrite, log.say)
        run = build_run(config, accelerator, log, found)
        for line in data_lines(run.blocks, config, run.tokenizer, run.total_steps, run.sequences_per_step):
            log.say(line)
        start_run(run, found)
        last = functools.partial(checkpoints.stopped_at_once, run.output_dir, again)
        return execute(run, held.enter_context(checkpoints.stop_on_signal(log.say, last)), again)
    return 130  # Ctrl-C before the first step


def execute(run: Run, request: checkpoints.StopRequest, again: str) -> int:
    """Train, write the adapter and the curves, and return the exit code. again: the command that continues the run."""
    say, accelerator, progress = run.log.say, run.accelerator, run.progress
    accelerator.init_trackers("qlora", config={key: str(value) for key, value in flatten(run.effective).items()})
    done = False
    try:
        done = train(run, request)
        if done:
            finish(run)
    except NumbersWentWrong as error:
        say(f"error: {error}; {checkpoints.last_good(run.output_dir)}")
        return 1
    except processes.RankFailed as error:
        return after_failure(run, error, again)
    except torch.OutOfMemoryError as error:
        peak = f"a peak of {peak_gib(accelerator.device):.2f} GiB with {run.plan.shape}"
        good = checkpoints.last_good(run.output_dir)
        say(f"error: out of GPU memory at {peak}; {good}: {str(error).splitlines()[0]}")
        for line in memory.ran_out(run.config, run.plan, accelerator.device):
            say(line)
        return 3
    except RuntimeError as error:
        if request.signum is None or type(error).__name__ != "InductorError":  # Ctrl-C ends its compiler too
            raise
    finally:
        unwritten = curves_and_log(run)
        if run.config.training.report_to != "none":
            accelerator.end_training()
    for problem in filter(None, (run.unsaved, unwritten)):
        advice = "the adapter is complete" if done else f"free some disk space and continue with: {again}"
        say(f"error: step {progress.step}: {problem}; {advice}")
    if run.unsaved or unwritten:
        return 1
    if not done:
        say(f"stopped after step {progress.step} of {run.total_steps}; to continue:\n  {again}")
    return 0 if done else 128 + (request.signum or 2)


def curves_and_log(run: Run) -> str:
    """Draw the curves and write what the log still holds; return why that failed, or an empty text."""
    try:
        if run.accelerator.is_main_process and run.progress.history:
            rates = rates_of(run.scheduler, run.progress.step)
            path = run.output_dir / "training_curves.png"
            call_plot(plot_training_curves, run.progress.history, path, rates)
        run.log.flush()
    except OSError as error:
        return f"the curves or the log cannot be written ({error})"
    return ""


def epoch_size(config: Config) -> tuple[int, int] | str:
    """Return (tokens, sequences) of one epoch for --plan, which works without data and tokenizer: then what is missing."""
    try:
        tokenizer = load_tokenizer(config)
        blocks = make_blocks(prepare_dataset(config, tokenizer), tokenizer, config.data, config.training.seed)["train"]
        return blocks.tokens, len(blocks)
    except ConfigError as error:
        return error.problems[0]


def evaluate_adapter(config: Config, adapter: str | None, stride: int | None, prompts: int | None = None) -> int:
    """Print loss and perplexity of the base and, given an adapter, of both with their difference; return 0.

    The adapter's folder gets evaluation.json. stride: of windows over the whole text, as perplexities on Wikitext are
    reported; None evaluates on the validation blocks. prompts: how many of the held-out ones are answered too.
    """
    accelerator = machine.create_accelerator(config.training, config.performance.shard_base)
    machine.refuse_without_gpu(config, accelerator.device)
    say = (lambda line: print(for_stdout(visible(line)))) if accelerator.is_main_process else (lambda line: None)
    if quantization_utils.replaces_bf16(config):
        say(quantization_utils.SLOW_BF16)
    prepare_child(config.model)  # it imports what it needs while the weights are read
    model, tokenizer = load_base(config, accelerator.device)
    adopt_template(tokenizer, Path(adapter) if adapter else None)
    effective = checkpoints.effective(config, model)
    lines = [*checkpoints.edited_line(config, effective), *teach_ends(tokenizer)]
    for line in (*lines, *check_length(config.data.max_length, model.config)):
        say(line)
    rows = processes.first_alone(lambda: prepare_dataset(config, tokenizer))
    blocks: Any = make_blocks(rows, tokenizer, config.data, config.training.seed, close=stride is None)["validation"]
    if blocks is None:
        raise ConfigError("data.validation_fraction: nothing is held out to evaluate on")
    task = evaluation.Task(Path(adapter) if adapter else None, stride, prompts)
    base = [model]
    del model  # evaluate() must hold the only one: it lets go of it before answers load theirs
    evaluation.evaluate(task, effective, base, tokenizer, blocks, accelerator, say)
    return 0


# ------------------------------------------------------------------------------------------------ set-up


@dataclasses.dataclass
class Run:
    """A run in its output folder: what it trains with, and how far it is."""

    config: Config
    effective: Config  # with the quantisation and the adapter that the model really has: this is what gets recorded
    accelerator: Accelerator
    log: checkpoints.Log
    tokenizer: PreTrainedTokenizerBase
    blocks: dict[str, Blocks | None]
    learner: Learner
    optimizer: Any
    scheduler: Any
    plan: MemoryPlan  # the micro-batch and checkpointed layers that run now, with the GPU memory planned for them
    sequences_per_step: int  # over all micro-batches and processes
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
        return math.ceil(len(self.blocks["train"]) / self.sequences_per_step)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.training.output_dir)

    def note(self, row: dict) -> None:
        """Keep a row of metrics: in the history, in metrics.jsonl and in the tracker."""
        self.progress.history.append(row)
        self.log.row(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def build_run(config: Config, accelerator: Accelerator, log: checkpoints.Log, found: Found | None) -> Run:
    """Load the model, prepare the adapter and the data, and return the run at step 0."""
    device, training, say = accelerator.device, config.training, log.say
    if config.performance.deterministic:
        be_deterministic()
    per_step = sequences_per_step(training, accelerator.num_processes)
    sequences, plan = per_step // accelerator.num_processes, None  # of this process
    if device.type == "cuda":  # before the weights are downloaded; a CPU runs the configured shape
        plan = memory.plan_run(config, accelerator, sequences, found[2]["shape"] if found else {}, say)
    else:
        memory_plan.check_mixture(config)
    tokenizer = load_tokenizer(config, say)
    blocks = processes.first_alone(
        lambda: make_blocks(prepare_dataset(config, tokenizer), tokenizer, config.data, training.seed)
    )
    rows_apart = plan is not None and plan.rows_apart > 0
    model, _ = load_base(config, device, tokenizer=tokenizer, rows_apart=rows_apart)
    say(memory.memory_line(device))
    for line in base_lines(config, model):
        say(line)
    if (samples := data_sources.first_samples(blocks["train"])) is not None:
        for line in untrained_chat_tokens(model, tokenizer, samples, config.lora.train_tokens):
            say(line)
    plan = plan or memory_plan.unplanned(config, sequences, len(families.decoder_layers(model)))
    learner = build_learner(config, model, plan, say, sample_counts(*blocks.values())[:per_step], tokenizer)
    processes.take_from_first(learner.parameters)
    optimizer = create_optimizer(learner.parameters, training, device, say, learner.memory)
    effective = checkpoints.effective(config, learner.model)
    for line in checkpoints.edited_line(config, effective):
        say(f"{line}; the run's config.yaml and model card record what the model has")
    steps_per_epoch = math.ceil(len(blocks["train"]) / per_step)
    total_steps = training.max_steps or max(1, math.ceil(training.num_epochs * steps_per_epoch))
    return Run(
        config=config,
        effective=checkpoints.with_options_of(effective, blocks["train"]),
        accelerator=accelerator,
        log=log,
        tokenizer=tokenizer,
        blocks=blocks,
        learner=layers.guard(learner, blocks["train"][0], say),
        optimizer=optimizer,
        scheduler=create_scheduler(optimizer, training, total_steps),
        plan=plan,
        sequences_per_step=per_step,
        total_steps=total_steps,
        fingerprint=fingerprint(learner.model, tokenizer, blocks),
    )


def prepare_dataset(config: Config, tokenizer: PreTrainedTokenizerBase) -> DatasetDict | SourceRows:
    """Return the tokenised rows: a DatasetDict with the split train, perhaps validation, and a column input_ids.

    You may write your own function here: packing and holding out a part come after it, and `load_dataset` is imported.
    Each row is a document; with a column labels it is a sample, and tokens labelled -100 are read but not learned.
    If data.dataset is a list, there is such a DatasetDict for each source.
    """
    return read_sources(config.data, tokenizer)


def build_learner(
    config: Config, model: PreTrainedModel, plan: MemoryPlan, say: Callable[[str], None], samples: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Learner:  # fmt: skip
    """Attach the adapter, a fresh one or lora.init_adapter, to the base model and set up how its micro-batches are computed.

    plan: the shape of a micro-batch. samples: how many samples the fullest blocks hold, in descending order; the samples
    of one block must not see each other. tokenizer: for lora.train_tokens.
    """
    seed, device = config.training.seed, model.device
    transformers.set_seed(seed)  # for the fresh adapter
    peft_model = start_from_adapter(model, config, plan.checkpointed, say)
    if peft_model is None:
        fresh = with_tokens(create_lora_config(**config.lora.arguments), config.lora.train_tokens, tokenizer)
        peft_model = prepare_model_for_training(model, fresh, plan.checkpointed)
    config = checkpoints.effective(config, peft_model)  # somebody may have edited the functions that made it
    p, dtype, products = config.lora.dropout, compute_dtype_of(config), config.quantization.products
    attention_lines = attention.prepare_attention(model, config.data, samples, config.model.attn_implementation)
    clock = dropout.DropoutClock(seed, device)
    dropout.use_stateless_dropout(peft_model, p, clock)
    token_rows.use_token_rows(peft_model)
    fast = choice.choose_fast_path(config.performance, peft_model, dtype, device, plan.offload, products)
    attention_lines += memory_plan.without_compiled_layers(plan, fast)
    if fast.fused_lora:
        attention_lines += layers.fuse_for_training(peft_model, clock, p, fast.kernels, fast.fp8, plan.pieces)
    objective = CausalLMLoss(sharding.divide_base(peft_model), dtype)
    if fast.compile:
        compiled.compile_layers(peft_model, plan.kept, plan.swapped)
        objective.chunk_loss = compiled_chunk_loss()
    if fast.fused_lora and fast.kernels:
        objective.chunk_loss = kernel_chunk_loss
    if device.type == "cuda":
        free = memory.free_bytes(device, config.performance.memory_limit_gib)  # for a shape that has no plan
        objective.logit_chunk = plan.logit_chunk or default_logit_chunk(len(objective.head.weight), free)
    for line in (*quantization_utils.adapter_lines(peft_model), fast.line, *attention_lines):
        say(line)
    # The losses are sums over tokens, so the gradients are large already: torch's first scale, 2**16, would make them
    # overflow in fp16 at once.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, enabled=dtype is torch.float16)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    batch_shape = plan.micro_batch, config.data.max_length
    return Learner(peft_model, trained, objective, clock, scaler, fast, batch_shape, plan.offload)


def create_scheduler(optimizer: Any, training: TrainingConfig, total_steps: int) -> Any:
    """Return the schedule of the learning rate: a warm-up, then transformers' own cosine, linear or constant.

    Step k of a warm-up of W steps has k / W of learning_rate. In transformers it would have (k - 1) / W, so that the
    first step, and a run of a single step, would learn nothing.
    """
    name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
    warmup = math.ceil(training.warmup_ratio * total_steps)
    theirs = get_scheduler(name, optimizer, warmup, total_steps).lr_lambdas[0]
    return LambdaLR(optimizer, lambda done: (done + 1) / warmup if done < warmup else theirs(done))


def start_run(run: Run, found: Found | None) -> None:
    """Restore the checkpoint, if there is one, and open the output folder. A refusal comes before anything is written."""
    log = run.log
    refuse_other_start(run.fingerprint, found)
    if found is not None:
        folder, _, state = found
        # A checkpoint from before 2026-11-29 has the configured settings only.
        before, now = (state["effective"], run.effective) if "effective" in state else (state["config"], run.config)
        known = {**state, "config": before}
        check_resumable(known, now, run.fingerprint, run.sequences_per_step, folder.name)
        check_tensors(found, run.model, run.optimizer, run.learner.scaler, run.blocks["validation"])
        restore(run, found)
    with processes.together():
        checkpoints.check_space(run.config.training, [p.numel() for p in run.learner.parameters])
    if run.accelerator.is_main_process:
        files = left_beside(run.model.get_base_model(), run.tokenizer, run.blocks["train"])
        log.open(checkpoints.open_output(run.effective, run.progress.history, found is None, files))
    for line in checkpoints.secrets_line(run.effective):
        log.say(line)
    if found is not None:
        for line in resume_lines(folder, run.progress.step, run.total_steps, state["config"], run.config):
            log.say(line)


def restore(run: Run, found: Found) -> None:
    """Put the run into the state that the checkpoint holds. What the configuration decides is not read from it."""
    _, adapter, state = found
    # A checkpoint from before 2026-11-29 has no positions: the next logged speed counts its learned tokens only.
    run.progress = checkpoints.Progress(**{"positions": state["progress"]["loss_tokens"]} | state["progress"])
    run.best_adapter = state["best_adapter"] or None
    run.held_out = state.get("held_out", {})  # a checkpoint from before 2026-11-24 has none
    put_weights(run.model, adapter)
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    run.learner.scaler.load_state_dict(state["scaler"])
    restore_schedule(run.scheduler, run.optimizer, run.progress.step)


# ------------------------------------------------------------------------------------------------ the loop


def train(run: Run, request: checkpoints.StopRequest) -> bool:
    """Train until the last step or until early stopping; return False if a signal stopped the run before that.

    Every turn of the loop is an optimizer step, then whatever is due of log, evaluation and checkpoint.
    """
    training, progress, first_step = run.config.training, run.progress, run.progress.step
    if evaluation_due(run):  # at step 0, or where a signal stopped the run before this evaluation
        evaluate_and_keep_best(run)
    if request.signum is not None and run.accelerator.num_processes == 1:  # no step is begun any more
        return False
    windows = step_windows(len(run.blocks["train"]), run.sequences_per_step, training.seed, first_step)
    with progress_bar(run) as bar:
        while progress.step < run.total_steps and not out_of_patience(run):
            start, learning_rate = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
            _, numbers = next(windows)
            result = training_step(run, progress.step, numbers, request)
            seconds = time.perf_counter() - start
            positions = run.blocks["train"].positions(numbers)
            progress.count(result.loss_sum, result.tokens, positions, seconds)
            mean = run.learner.objective.mean(result.loss_sum, result.tokens)
            bar.set_postfix(loss=f"{mean:.4f}", tokens_s=f"{positions / seconds:,.0f}", refresh=False)
            bar.update()
            if progress.step == first_step + 1 and (reason := compiled.compiled_in_pieces()):
                run.log.say(f"fast path: the layers are compiled in pieces, which costs speed and memory: {reason}")

            last, epoch_end = progress.step == run.total_steps, progress.step % run.steps_per_epoch == 0
            if last or progress.step % training.logging_steps == 0:
                log_step(run, result, learning_rate)
            # Several processes must agree, by the sums of the step; one alone sees the signal at once.
            stop = result.stop or (run.accelerator.num_processes == 1 and request.signum is not None)
            if evaluation_due(run) and not stop:
                evaluate_and_keep_best(run)
            if last or epoch_end or stop or out_of_patience(run) or result.due or saving_step(run):
                save_state(run)
            if stop:
                return False
    if out_of_patience(run):
        patience, best = training.early_stopping_patience, progress.best_step
        run.log.say(f"stopping early: {counted(patience, 'evaluation')} without a better loss than that of step {best}")
    return True


def progress_bar(run: Run) -> tqdm:
    """Return the bar that shows the steps; hidden without a terminal or steps, and in all processes but the first."""
    hidden = run.log.silent or not sys.stderr.isatty() or run.progress.step >= run.total_steps
    return tqdm(total=run.total_steps, initial=run.progress.step, unit="step", disable=hidden)


def evaluation_due(run: Run) -> bool:
    """Return whether an evaluation belongs to this step; it does to step 0 and to the last one, or one beyond it."""
    every = run.config.training.eval_steps or run.steps_per_epoch
    return run.progress.step % every == 0 or run.progress.step >= run.total_steps


def minutes_are_up(run: Run) -> bool:
    """Return whether save_minutes asks for a checkpoint now."""
    minutes = run.config.training.save_minutes
    return minutes is not None and time.monotonic() - run.saved_time >= 60 * minutes


def saving_step(run: Run) -> bool:
    """Return whether save_steps asks for a checkpoint after this step."""
    every = run.config.training.save_steps
    return every is not None and run.progress.step % every == 0


def out_of_patience(run: Run) -> bool:
    """Return whether early stopping ends the run: its patience, if there is one, is used up."""
    patience = run.config.training.early_stopping_patience
    return patience is not None and run.progress.worse >= patience


def log_step(run: Run, result: StepResult, learning_rate: float) -> None:
    """Note the mean loss of the steps since the last logged one, and their speed."""
    progress, lost, peaks = run.progress, None, [peak_gib(run.accelerator.device)]
    try:
        peaks = processes.gathered(peaks[0])
    except processes.RankFailed as error:  # the step is complete, and the checkpoint that follows needs its row
        lost = error
    row = {
        "step": progress.step,
        "epoch": round(progress.step / run.steps_per_epoch, 4),
        "loss": run.learner.objective.mean(progress.loss_sum, progress.loss_tokens),
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,  # a step that the scaler left out
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.positions / progress.seconds, 1),
        "learned_tokens_per_second": round(progress.loss_tokens / progress.seconds, 1),
        "peak_gib": round(max(peaks), 3),
    }
    progress.loss_sum, progress.loss_tokens, progress.positions, progress.seconds = 0.0, 0, 0, 0.0
    run.note(row)
    run.log.say(step_line(row, run.total_steps))
    if lost:
        raise lost


# ------------------------------------------------------------------------------------------------ one optimizer step


class NumbersWentWrong(RuntimeError):
    """A loss or gradient that is not finite: the run stops there, with exit code 1."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss_sum: float
    tokens: int
    grad_norm: float
    stop: bool  # some process was asked to stop
    due: bool  # save_minutes asks for a checkpoint


def training_step(run: Run, step: int, numbers: np.ndarray, request: checkpoints.StopRequest) -> StepResult:
    """Learn from the blocks of these numbers: sum loss and gradients over all of them, divide once, clip, update.

    request: whether this process was asked to stop, which all processes learn from the result.
    """
    learner, scaler = run.learner, run.learner.scaler
    learner.train()
    while True:  # once, or again with a smaller shape where memory runs out
        learner.zero_gradients()
        loss_sum, tokens = torch.zeros((), device=run.accelerator.device), 0
        try:
            with processes.together():  # one process that runs out of memory has all of them repeat the step
                for batch, count, sequences in micro_batches(run, numbers):
                    loss_sum += learner.micro_step(step, sequences, batch)
                    tokens += count
                processes.wait_for_gpu()
            break
        except torch.OutOfMemoryError as error:
            problem = error.with_traceback(None)  # its frames hold the tensors of the micro-batch that failed
        use_less_memory(run, problem)
    for gradients in learner.memory.all_gradients():
        processes.sum_in_place(gradients)
    asked = [request.signum is not None, minutes_are_up(run)]
    sums = processes.sum_numbers([loss_sum, tokens, *asked], run.accelerator.device)
    scaler.unscale_(run.optimizer)
    torch._foreach_mul_(learner.memory.all_gradients(), learner.objective.mean(1, sums[1].float()))
    norm = learner.memory.clip(run.config.training.max_grad_norm)
    if step == 0 and sums[1] and not any(p.grad.any() for n, p in learner.model.named_parameters() if "lora_B" in n):
        raise NumbersWentWrong("step 1: every gradient of lora_B is zero: the loss does not reach the adapter")
    # The update is launched before any number is read: the GPU still computes the micro-batches and never waits for a
    # launch.
    scaler.step(run.optimizer)
    total, tokens, stops, due = sums.tolist()
    grad_norm = norm.item()
    # An overflow in float16 is left to the scaler: it skips the step and halves its scale, from 2**6 down to 2**-10.
    overflow = scaler.is_enabled() and not math.isfinite(grad_norm) and scaler.get_scale() > 2.0**-10
    if not (math.isfinite(total) and (math.isfinite(grad_norm) or overflow)):
        raise NumbersWentWrong(
            f"step {step + 1}: loss {learner.objective.mean(total, tokens)}, gradient norm {grad_norm} (compute type "
            f"{learner.objective.dtype}): try a lower learning_rate, or look at its blocks: "
            + data_sources.show_blocks(run.blocks["train"], numbers, run.tokenizer, run.config.data)
        )
    scaler.update()
    run.scheduler.step()
    processes.settle()
    return StepResult(total, int(tokens), grad_norm, bool(stops), bool(due))


def micro_batches(run: Run, numbers: np.ndarray) -> Iterator[tuple[dict[str, torch.Tensor], int, torch.Tensor]]:
    """Yield this process's share of a step: (batch on the device, its supervised tokens, numbers of its sequences).

    Sequences are numbered within the optimizer step, over all processes.
    """
    blocks, pad = run.blocks["train"], run.tokenizer.pad_token_id
    for batch, tokens, places in own_batches(blocks, numbers, run.plan.micro_batch, pad, run.accelerator):
        yield batch, int(tokens.sum()), torch.from_numpy(places)


def use_less_memory(run: Run, problem: torch.OutOfMemoryError) -> None:
    """Change to the next smaller shape, which repeats the step from its start; raise `problem` where there is none."""
    sequences = run.sequences_per_step // run.accelerator.num_processes
    kind = "main" if (main := isinstance(problem, NoMainMemory)) else "GPU"
    smaller = memory_plan.step_down(run.plan, sequences, run.learner.fast.compile, main)
    if sharding.is_divided():
        raise cannot_repeat(problem)
    if smaller is None:
        raise problem
    run.log.say(
        f"out of {kind} memory{processes.where(problem)} with {run.plan.shape}: repeating the step with {smaller.shape}; "
        "the effective batch size, and so the training result, does not change"
    )
    run.plan = smaller
    processes.settle(False)  # a graph is captured again
    run.learner.reshape(smaller.micro_batch, smaller.checkpointed, smaller.offload, smaller.kept, smaller.swapped)


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate_and_keep_best(run: Run) -> None:
    """Evaluate on the held-out blocks, note the result, and keep a copy of the adapter if it is the best so far."""
    progress, blocks, say = run.progress, run.blocks["validation"], run.log.say
    if blocks is None or any(row["step"] == progress.step for row in progress.evaluations):
        return
    pad = run.tokenizer.pad_token_id
    sums = evaluation.evaluate_in_memory(run.learner, blocks, run.accelerator, run.plan.micro_batch, pad, say)
    loss = mean_loss(sums)
    if not math.isfinite(loss):
        hint = "" if progress.step else ", before anything was learned: look at model.name's weights and compute_dtype"
        raise NumbersWentWrong(f"step {progress.step}: the validation loss is {loss}{hint}")
    if progress.step == 0:
        run.held_out |= evaluation.first_sums(run.learner, blocks, run.accelerator, sums, run.config.lora, pad, say)
    base = {"base_loss": mean_loss(run.held_out["base"])} if progress.step == 0 and "start" in run.held_out else {}
    run.note({"step": progress.step, "eval_loss": loss, "perplexity": perplexity(loss)} | base)
    progress.worse += 1
    line = (
        f"step {progress.step}: validation loss {loss:.4f}{of_each(blocks, sums)} | perplexity {perplexity(loss):.2f}"
    )
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        run.best_adapter, run.held_out["adapter"] = checkpoints.adapter_tensors(run.model), sums
        line += " | best"
    say(line)


# ------------------------------------------------------------------------------------------------ checkpoints


def save_state(run: Run) -> None:
    """Write a checkpoint, which the first process does for all: everything that a resumed run needs."""
    run.saved_time = time.monotonic()
    if run.accelerator.is_main_process:
        write_state(run)
    processes.gathered(None, processes.WRITING)


# ------------------------------------------------------------------------------------------------ the end of a run


def finish(run: Run) -> None:
    """Write the best adapter and its model card into the output folder and say how the run ended."""
    progress, say = run.progress, run.log.say
    if run.best_adapter is not None:
        put_weights(run.model, run.best_adapter)
    if run.accelerator.is_main_process:
        part = run.blocks["train"]
        checkpoints.save_adapter(run.output_dir, run.model, run.tokenizer, run.effective, progress, part)
    peak = max(processes.gathered(peak_gib(run.accelerator.device), processes.WRITING))
    for line in end_lines(progress, run.blocks["validation"], run.held_out, peak, run.plan):
        say(line)
    say(f"adapter, curves and log are in {run.output_dir}")
    say(next_command(run.output_dir, run.blocks["train"].source))


if __name__ == "__main__":
    run_and_exit(main)
