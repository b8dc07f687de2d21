"""GPU memory of a run: choose its shape, print the plan, measure what is used, and limit it.

The shape of a run is as in memory_plan.py.
"""

import bisect
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from config import Config, ConfigError, QuantizationConfig, counted
from fast_path.fp8 import refuse
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from quantization_utils import compute_dtype_of
from toolkit.base_lines import beyond_positions
from toolkit.cards import BEST_ERROR, CARDS, RATES_ERROR, Card, Rates, find_card
from toolkit.control_groups import free_in_groups
from toolkit.expert_plan import ExpertShape
from toolkit.memory_plan import (
    COMPILED,
    CONTEXT_BYTES,
    GIB,
    NCCL_BYTES,
    PCIE,
    SHAPE_KNOBS,
    MemoryPlan,
    configured_shape,
    expected_path,
    fit,
    gather_seconds,
    longest_length,
    most_swapped,
    pinned_layers,
    plan_memory,
    sequences_per_step,
    step_seconds,
    swapping_obstacle,
    wants_offload,
)
from toolkit.model_shape import ModelShape, adapted, adapter_parameters
from toolkit.processes import gathered, name_of, several
from toolkit.text_width import for_stdout

FP8_FROM = 8.9  # compute capability
# Of the main memory that is free: loading the base has not begun, and pinned memory is taken from all other programs.
MAIN_MEMORY_SHARE = 0.5

# ------------------------------------------------------------------------------------------------ decide and print


class NoFit(Exception):
    """No shape of the run fits into memory; the text says so and names what would help."""


def choose_plan(
    shape: ModelShape,
    config: Config,
    sequences: int,
    device: torch.device | None,
    limit: float | None,
    saved: dict,
    rates: Rates | None = None,
) -> MemoryPlan:
    """Return the plan of the shape that a run uses: from its checkpoint, auto_fit or config, in this order.

    sequences: per optimizer step of one process. saved: the checkpoint's shape, empty without a checkpoint; a flag
    overrides it. rates: of a card that is not at hand.
    """
    auto_fit = config.performance.auto_fit
    if saved and auto_fit and not config.flags & set(SHAPE_KNOBS):
        taken = saved["micro_batch"], min(saved["checkpointed"], shape.layers), None, limit
        rest = saved.get("offload", False), saved.get("logit_chunk"), saved.get("rows_apart", False)
        last = saved.get("pieces", 1), kept_before(saved) or NOTHING_KEPT, swapped_before(shape, config, saved)
        return plan_memory(shape, config, *taken, *rest, *last)
    if auto_fit and limit is not None:
        # Measured rates vary from day to day, and so would the shape.
        rates = rates or (Rates() if config.performance.deterministic else rates_here(device, config, shape))
        return fit(shape, config, sequences, limit, rates)
    micro_batch = min(config.training.batch_size, sequences)
    checkpointed, offload = pinned_layers(shape.layers, config), wants_offload(config)
    chunk, kept = saved.get("logit_chunk"), kept_before(saved)
    swapped = most_swapped(shape, config, Rates(), micro_batch, checkpointed)  # as configured, or none
    return plan_memory(
        shape, config, micro_batch, checkpointed, None, limit, offload, chunk, kept=kept, swapped=swapped
    )


def kept_before(saved: dict) -> Kept | None:
    """Return the kept outputs of a checkpoint's shape; None where it says nothing about them."""
    return Kept(saved["kept"], saved.get("kept_attention", 0)) if "kept" in saved else None


def swapped_before(shape: ModelShape, config: Config, saved: dict) -> int:
    """Return how many layers of a checkpoint's shape are swapped: as then, as configured now, or what main memory allows."""
    before, checkpointed = saved.get("swapped", 0), saved["checkpointed"]
    if config.performance.swap_activations != "auto":
        return most_swapped(shape, config, Rates(), saved["micro_batch"], checkpointed)
    if not before or swapping_obstacle(shape, config):
        return 0
    each = plan_memory(shape, config, saved["micro_batch"], checkpointed, swapped=1).waiting
    return min(before, int(main_memory() / each)) if each else 0


def main_memory() -> int:
    """Return how many bytes of what is free in main memory activations may take.

    A container or a job of a cluster may have less than its machine.
    """
    return int(MAIN_MEMORY_SHARE * max(0, min(psutil.virtual_memory().available, *free_in_groups(Path("/")), math.inf)))


def plan_run(
    config: Config, accelerator: Accelerator, sequences: int, saved: dict, say: Callable[[str], None]
) -> MemoryPlan:
    """Return the plan of a run on a GPU, the same for all processes, and print it.

    Raise NoFit if even the smallest shape is too large. sequences, saved: as in choose_plan; a shape saved by another
    number of processes is ignored.
    """
    device = accelerator.device
    refuse(config.quantization.products, device, compute_dtype_of(config))  # before the weights are downloaded
    shape = configured_shape(config)
    limits = gathered(memory_limit(device, config.performance.memory_limit_gib, config.performance.deterministic))
    limit, least = min(limits), limits.index(min(limits))
    saved = saved if saved.get("processes") == accelerator.num_processes else {}
    chosen = choose_plan(shape, config, sequences, device, limit, saved)
    first = gathered(dataclasses.asdict(chosen))[0]
    plan = MemoryPlan(**first | {"kept": Kept(*first["kept"])})  # JSON knows no named tuples
    if max(limits) - min(limits) > GIB:
        say(f"memory: {name_of(least)} has least, {limits[least] / GIB:.2f} GiB of at most {max(limits) / GIB:.2f}")
    for line in chosen_lines(config, plan, limit):
        say(line)
    if plan.total > limit:
        sizes = f"the run needs {plan.total / GIB:.2f} GiB, but only {limit / GIB:.2f} GiB are available"
        lines = [f"error: performance.memory_limit_gib: {sizes}", *savings_lines(shape, config, plan, limit, count=3)]
        raise NoFit("\n".join(lines))
    return plan


def print_plan(
    config: Config,
    epoch_size: Callable[[Config], tuple[int, int] | str],
    name: str | None = None,
    processes: int | None = None,
) -> int:
    """Print the plan of the shape that a run would use; return 3 if it exceeds the limit or the GPU, otherwise 0.

    epoch_size: returns (tokens, sequences) of an epoch, or why the data cannot be read from here. name: of a card that
    is not at hand, for which the plan is made. processes: of the run, each on such a card; by default one.
    """
    card = find_card(name) if name else None
    device = torch.device("cuda", 0) if torch.cuda.is_available() and card is None else None
    if card and config.quantization.products == "fp8" and card.capability < FP8_FROM:
        lacks = f"{card.name} has no FP8 (compute capability {card.capability}; {FP8_FROM} and above have it)"
        raise ConfigError(f"quantization.products: fp8 cannot run there, use bf16: {lacks}")
    if device and config.quantization.products == "fp8":
        refuse("fp8", device, compute_dtype_of(config))
    shape = configured_shape(config, processes)
    if config.performance.shard_base and shape.processes == 1:
        raise ConfigError("performance.shard_base: expected --processes 2 or more beside --plan, got one process")
    limit = memory_limit(device, config.performance.memory_limit_gib)
    if card:
        limit = min(limit or math.inf, card.free_gib * GIB)
    sequences = sequences_per_step(config.training, shape.processes)
    rates = card.rates if card else rates_here(device, config, shape)
    plan = choose_plan(shape, config, sequences // shape.processes, device, limit, {}, card.rates if card else None)
    if card:
        print(for_stdout("\n".join(card_lines(card))))
    elif device is None:
        print("this machine has no GPU: the plan is that of a run on an NVIDIA GPU")
        if limit is None:
            print("  of any memory, in the shape as configured; --card NAME fits the shape to a card, as auto_fit does")
    lines = [*chosen_lines(config, plan, limit), *facts(shape, config, sequences // shape.processes)]
    tokens = plan.micro_batch * config.data.max_length
    how = plan.checkpointed, plan.rows_apart > 0, plan.kept, plan.swapped
    seconds = step_seconds(shape, config, rates, plan.micro_batch, *how)
    speed = shape.processes * tokens / seconds
    lines += process_lines(shape, config, plan, rates)
    lines += speed_lines(rates, speed, device, card, mixture=shape.experts.routed)
    if config.quantization.products == "fp8":
        lines.append(
            "  that is with products in bf16; fp8 was 1.27 to 1.50 times as fast on an H200, with 512 tokens per "
            "micro-batch no faster (docs/measurements.md)"
        )
    if config.quantization.experts == "cpu":
        lines.append(link_line("experts come from main memory", rates, device, card))
    lines += swap_lines(shape, config, plan, rates, device, card)
    lines += epoch_lines(config, epoch_size(config), sequences, speed)
    print(for_stdout("\n".join([*lines, *savings_lines(shape, config, plan, limit)])))
    if limit is None:
        return 0
    longest = longest_length(shape, config, limit)
    apart = ["their inputs"] * (expected_path(config) == COMPILED) + ["the embedding"] * (shape.rows > 0)
    where = f" with {' and '.join(apart)} in main memory" if apart else ""
    last = ", all positions that the model supports" if longest == shape.positions else ""
    line = "longest data.max_length that fits, with one sequence per micro-batch and all layers checkpointed"
    print(for_stdout(f"{line}{where}: {f'{longest:,}' if longest else 'none'}{last}"))
    print(f"{'fits' if plan.total <= limit else 'does not fit'} in {limit / GIB:.2f} GiB")
    if plan.total > limit and shape.processes == 1 and config.quantization.load_in_4bit:
        print("more than one card: --plan --processes 2 --shard_base true divides the base among them")
    return 0 if plan.total <= limit else 3


def process_lines(shape: ModelShape, config: Config, plan: MemoryPlan, rates: Rates) -> list[str]:
    """Return lines about a run of several processes: what of the plan each card has, and what a divided base must move."""
    if shape.processes == 1:
        return []
    lines = [f"processes: {shape.processes}, each on a card of its own; the plan is that of one card"]
    if not config.performance.shard_base:
        return lines
    computing = step_seconds(
        dataclasses.replace(shape, processes=1), config, rates, plan.micro_batch, plan.checkpointed
    )
    moved, seconds = gather_seconds(shape, config) * PCIE, gather_seconds(shape, config)
    line = f"divided base: each card receives {moved / 1e9:.1f} GB per micro-batch, {duration(seconds)} at {PCIE / 1e9:.0f} GB/s"
    line = f"{line} (PCIe 4.0 x16), while it computes for {duration(computing)}; NVLink is faster"
    return [
        *lines,
        line,
        "  the memory of a divided base is computed; docs/more_gpus.md has what two H200 reserved beside it",
    ]


def card_lines(card: Card) -> list[str]:
    """Return lines about a card that is not at hand: what is known of it, and what it lacks."""
    size = f"{card.memory_mib / 1024:.1f} GiB, of which a run can expect {card.free_gib:.1f}"
    speed = f"{card.bandwidth:,.0f} GB/s, {card.tensor:,.0f} TFLOP/s, {card.multiprocessors} multiprocessors"
    lines = [f"card: {card.name}, not at hand: {size}; {speed}, compute capability {card.capability}"]
    if card.capability < 8:
        lines.append(
            "it has no bfloat16: a run uses float16 with a loss scaler, and a mask where samples share a block"
        )
    return lines


def chosen_lines(config: Config, plan: MemoryPlan, limit: float | None) -> list[str]:
    """Return the table of the plan, whose title is the shape of the run, and a line with the reason for this shape."""
    if not config.performance.auto_fit:
        reason = "as configured (performance.auto_fit is off)"
    elif limit is None:
        reason = "as configured"
    elif plan.total > limit:
        reason = f"the smallest possible, but it needs more than {limit / GIB:.2f} GiB"
    else:
        pinned = [name for name in sorted(config.flags) if name in SHAPE_KNOBS]
        kept = f" with {' and '.join(pinned)} as given by flag" if pinned else ""
        reason = f"the fastest estimated in {limit / GIB:.2f} GiB{kept}; the training result stays the same"
    lines, asked = [plan.table(), f"shape: {reason}"], config.performance.swap_activations
    if isinstance(asked, int) and plan.swapped < asked:
        fewer = f"swap_activations: {asked} asked, {plan.swapped} swapped"
        lines.append(f"{fewer}: only checkpointed layers are, and never the model's last one")
    return lines


def facts(shape: ModelShape, config: Config, sequences: int) -> list[str]:
    """Return lines with other facts that help before a download. sequences: as in choose_plan."""
    trainable = adapter_parameters(shape, config)
    quantised = sum(out * into for _, out, into in shape.linears) + shape.experts.packed
    loaded = quantised // 2 if config.quantization.load_in_4bit else 2 * quantised
    loaded += 2 * (shape.embedding + shape.experts.plain)
    return [
        f"parameters: {shape.parameters:,}; trainable {trainable:,}, adapter {trainable * 4 / 1e6:.1f} MB",
        f"download: {2 * shape.parameters / 1e9:.2f} GB in 16 bit; loading uses about {loaded / 1e9 + 3:.1f} GB of RAM",
        *expert_facts(shape.experts, config.quantization),
        *(card_facts(shape, config, sequences) if shape.experts.routed else []),
        *beyond_positions(config.data.max_length, shape.positions),
    ]


def expert_facts(experts: ExpertShape, quantization: QuantizationConfig) -> list[str]:
    """Return lines about routed experts: how many of their weights are in 4 bit, where, and which have another layout."""
    if not (experts.routed and quantization.load_in_4bit):
        return []
    main = sum(experts.packed_bytes(experts.packed, quantization.use_double_quant))
    there = f"experts in main memory: {main / GIB:.2f} GiB, pinned; the GPU holds those of two layers at a time"
    why = "which are not whole blocks" if experts.uneven else "whose layout is not known"
    unknown = f" of {', '.join(experts.unknown)}, {why}" if experts.unknown else ""
    kept = f"; in 16 bit: {experts.plain:,}{unknown}"
    line = f"experts: {experts.packed:,} weights in 4 bit{kept if experts.plain else ''}"
    return [line, there] if quantization.experts == "cpu" else [line]


def card_facts(shape: ModelShape, config: Config, sequences: int) -> list[str]:
    """Return a line with the smallest of the known cards for which `--plan --card` finds a shape that fits.

    Whatever shape this plan has: each card gets one of its own. A larger card has one too where a smaller one has.
    """

    def holds(card: Card) -> bool:
        limit = card.free_gib * GIB
        return choose_plan(shape, config, sequences, None, limit, {}, card.rates).total <= limit

    able = [card for card in CARDS if config.quantization.products != "fp8" or card.capability >= FP8_FROM]
    by_room = sorted(able, key=lambda card: card.free_gib)
    holding = by_room[bisect.bisect_left(by_room, True, key=holds) :]
    if not holding:
        return ["no single card that the toolkit knows holds this"]
    least = min(card.sold_gb for card in holding)
    names = ", ".join(card.name for card in CARDS if card in holding and card.sold_gb == least)
    return [f"cards that hold this: from {least} GB ({names})"]


def link_line(what: str, rates: Rates, device: torch.device | None, card: Card | None) -> str:
    """Return the line about what a step copies from main memory, or to it and back."""
    generation, lanes = (card or find_card("RTX 4060")).pcie
    where = "measured now" if device else f"PCIe {generation}.0 x{lanes}, if the slot has it"
    return f"  {what} at {rates.link / 1e9:.1f} GB/s ({where})"


def swap_lines(
    shape: ModelShape, config: Config, plan: MemoryPlan, rates: Rates, device: torch.device | None, card: Card | None
) -> list[str]:
    """Return a line about layers that are swapped to main memory, or that could be where a plan cannot know it."""
    if plan.swapped:
        return [link_line("swapped layers leave and come back", rates, device, card)]
    performance = config.performance
    chosen = performance.swap_activations == "auto" and performance.auto_fit and not performance.deterministic
    if device is not None or not plan.checkpointed or not chosen or swapping_obstacle(shape, config):
        return []
    return [
        "  a run may be faster: it swaps layers to main memory instead of recomputing them where the bus is fast enough"
    ]


def speed_lines(
    rates: Rates, speed: float, device: torch.device | None, card: Card | None, mixture: bool = False
) -> list[str]:
    """Return lines about the tokens per second of training, and where they come from."""
    line = f"estimated, not measured: {speed:,.0f} tokens/s, {duration(1e6 / speed)} per million tokens"
    if device:
        measured = f"products {rates.flops / 1e12:.1f} TFLOP/s, copies {rates.bytes / 1e9:,.0f} GB/s"
        return [f"{line} (this GPU, measured now: {measured})"]
    name = card.name if card else "RTX 4060, by default; --card NAME for another"
    error = f"such estimates are within {RATES_ERROR:.0%} of what was measured on an H100 and an H200; no other card was measured"
    if mixture:
        error = (
            f"of mixtures of experts only Qwen3-30B-A3B's shape on an H200 was measured, and this estimate is within {BEST_ERROR:.0%} "
            "there with 12 and 48 layers; with experts: 16bit it is too high"
        )
    return [f"{line} ({name})", f"  from data sheets; {error} (docs/measurements.md)"]


def epoch_lines(config: Config, size: tuple[int, int] | str, sequences: int, speed: float) -> list[str]:
    """Return lines about one epoch and about the time of the whole run at `speed` tokens per second."""
    if isinstance(size, str):
        return [f"one epoch: unknown: {size}"]
    training, tokens, steps = config.training, size[0], math.ceil(size[1] / sequences)
    each = f"{counted(steps, 'optimizer step')} of {counted(sequences, 'sequence')}"
    total = training.max_steps or max(1, math.ceil(training.num_epochs * steps))
    run = f"{counted(total, 'step')} ({total / steps:.3g} epochs)"
    seconds = duration(tokens * total / steps / speed)
    return [
        f"one epoch: {counted(tokens, 'token')}, {each}",
        f"the whole run: {run}, about {seconds} of training (estimated); evaluations and the start come on top",
    ]


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: 1.3 s, 4.2 min or 2.5 hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def savings(shape: ModelShape, config: Config, plan: MemoryPlan, limit: float | None = None) -> list[tuple[int, str]]:
    """Return (bytes saved, setting that would save them), the largest first."""

    def without(section: str, micro_batch: int = plan.micro_batch, checkpointed: int = plan.checkpointed, **changes):
        other = dataclasses.replace(config, **{section: dataclasses.replace(config[section], **changes)})
        rest = None, limit, plan.offload, None, plan.rows_apart > 0, plan.pieces, plan.kept, plan.swapped
        changed = with_lora_of(other, shape, config)
        return plan.total - plan_memory(changed, other, micro_batch, checkpointed, *rest).total

    length, rank = max(8, config.data.max_length // 2), max(1, config.lora.rank // 2)
    attention, smaller = ("q_proj", "k_proj", "v_proj", "o_proj"), plan.micro_batch // 2
    found = [(without("data", max_length=length), f"data.max_length {length}")]
    found.append((without("lora", rank=rank), f"lora.rank {rank}"))
    if narrows(shape, config.lora.target_modules, attention):
        found.append((without("lora", target_modules=attention), f"lora.target_modules [{', '.join(attention)}]"))
    way = "--" if config.performance.auto_fit else "training."  # auto_fit heeds the flags of a shape, not config.yaml
    if plan.checkpointed < plan.layers:
        found.append((without("training", checkpointed=plan.layers), f"{way}gradient_checkpointing true"))
    if plan.micro_batch > 1:
        line = f"{way}batch_size {smaller} with twice the {way}gradient_accumulation_steps"
        found.append((without("training", micro_batch=smaller), line))
    if config.training.optim != "paged_adamw_8bit":
        found.append((without("training", optim="paged_adamw_8bit"), "training.optim paged_adamw_8bit"))
    if shape.experts.packed and config.quantization.load_in_4bit and config.quantization.experts == "gpu":
        found.append((without("quantization", experts="cpu"), "quantization.experts cpu"))
    if shape.processes > 1 and config.quantization.load_in_4bit and not config.performance.shard_base:
        found.append((without("performance", shard_base=True), "performance.shard_base true"))
    if not config.quantization.use_double_quant:
        found.append((without("quantization", use_double_quant=True), "quantization.use_double_quant true"))
    return sorted((pair for pair in found if pair[0] > 0), reverse=True)


def narrows(shape: ModelShape, targets: str | tuple[str, ...], attention: tuple[str, ...]) -> bool:
    """Return whether the names of attention are fewer than the targets, and all in the model."""
    if isinstance(targets, str):
        own = {name.rpartition(".")[2] for name, _, _ in (*shape.linears, *shape.plain_linears)}
        return targets == "all-linear" and set(attention) <= own
    return set(targets) > set(attention)


def with_lora_of(other: Config, shape: ModelShape, config: Config) -> ModelShape:
    """Return the sizes with the trainable parameters of another rank or of targets that mean no experts.

    Adapters on experts have as many parameters per rank as peft counts at the configured one.
    """
    if shape.trainable is None or other.lora == config.lora:
        return shape
    if other.lora.target_modules != config.lora.target_modules:
        return dataclasses.replace(shape, trainable=None)
    magnitudes = sum(out for _, out, _ in adapted(shape, config.lora)) if config.lora.use_dora else 0
    by_rank = (shape.trainable - magnitudes) * other.lora.rank // config.lora.rank
    return dataclasses.replace(shape, trainable=by_rank + magnitudes)


def savings_lines(
    shape: ModelShape, config: Config, plan: MemoryPlan, limit: float | None, count: int = 5
) -> list[str]:
    """Return a line for each of the `count` settings that would save most."""
    found = savings(shape, config, plan, limit)[:count]
    sizes = [f"{saved / GIB:.2f} GiB" if saved > 0.1 * GIB else f"{saved / 2**20:.1f} MiB" for saved, _ in found]
    return [f"{name} would save {size}" for size, (_, name) in zip(sizes, found, strict=True)]


def ran_out(config: Config, plan: MemoryPlan, device: torch.device) -> list[str]:
    """Return the table of a shape that ran out of memory, and lines with the three settings that would save most."""
    shape, limit = configured_shape(config), memory_limit(device, config.performance.memory_limit_gib)
    rest = None, limit, plan.offload, None, plan.rows_apart > 0, plan.pieces, plan.kept, plan.swapped
    plan = plan_memory(shape, config, plan.micro_batch, plan.checkpointed, *rest)
    return [plan.table(), *savings_lines(shape, config, plan, limit, count=3)]


# ------------------------------------------------------------------------------------------------ measure and limit


def rates_here(device: torch.device | None, config: Config, shape: ModelShape) -> Rates:
    """Return measure_rates and, where they count, the speed of copies from and to main memory and how much it may take.

    Where no main memory can be pinned to measure with, no layer is swapped.
    """
    rates = measure_rates(device)
    if device is not None and config.quantization.experts == "cpu":
        return dataclasses.replace(rates, link=measure_link(device))
    if device is None or config.performance.swap_activations == 0 or swapping_obstacle(shape, config):
        return rates
    try:
        link = min(measure_link(device), measure_link(device, away=True))
    except RuntimeError:
        return rates
    return dataclasses.replace(rates, link=link, main_memory=main_memory())


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a GPU takes for a call, the mean of four after a first one."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(4):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 4e3


@functools.cache
def measure_link(device: torch.device, away: bool = False) -> float:
    """Return the bytes per second of copies from pinned main memory to this GPU, or away from it."""
    rows = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(rows, device=device, pin_memory=False)
    to, source = (rows, here) if away else (here, rows)
    return rows.numel() / timed(lambda: to.copy_(source, non_blocking=True))


@functools.cache
def measure_rates(device: torch.device | None) -> Rates:
    """Return the speed of this GPU, measured in a moment; without a GPU that of an RTX 4060."""
    if device is None:
        return Rates()
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    b = torch.empty(2**27, dtype=torch.uint8, device=device)
    copy = timed(lambda: b[: 2**26].copy_(b[2**26 :]))  # reads and writes 64 MiB
    return Rates(flops=2 * 4096**3 / timed(lambda: a @ a), bytes=b.numel() / copy)


def memory_line(device: torch.device) -> str:
    """Return the tutorial's line about GPU memory; without a GPU a line about the memory of this process."""
    if device.type != "cuda":
        return f"Memory: {psutil.Process().memory_info().rss / GIB:.2f} GiB in this process (no GPU)"
    free, _ = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    sizes = {"Allocated": allocated, "Reserved": reserved, "Free": free}
    return "GPU Memory: " + " | ".join(f"{name}={size / GIB:.2f} GiB" for name, size in sizes.items())


def peak_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: reserved by torch's allocator on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2**20)


def outside_torch() -> int:
    """Return the bytes of a GPU that a process has outside of torch's allocator: CUDA's context and NCCL's buffers."""
    return CONTEXT_BYTES + (NCCL_BYTES if several() else 0)


def memory_limit(device: torch.device | None, limit_gib: float | None, fixed: bool = False) -> float | None:
    """Return the bytes that this process may use, with its CUDA context; None if there is neither GPU nor limit.

    fixed: count all memory of the GPU and not only what is free now. Raise ConfigError for a limit below the context.
    """
    limit = None if limit_gib is None else limit_gib * GIB
    if limit is not None and limit <= CONTEXT_BYTES:
        raise ConfigError(
            f"performance.memory_limit_gib: expected more than {CONTEXT_BYTES / GIB} (CUDA context), got {limit_gib}"
        )
    if device is None or device.type != "cuda":
        return limit
    if fixed:
        return min(torch.cuda.get_device_properties(device).total_memory, limit or math.inf)
    # The CUDA context and the buffers of this process exist already, so they are not part of the free memory.
    free = torch.cuda.mem_get_info(device)[0] + outside_torch() + torch.cuda.memory_reserved(device)
    return free if limit is None else min(free, limit)


def free_bytes(device: torch.device, limit_gib: float | None) -> int:
    """Return the bytes that this process may still allocate."""
    return int(memory_limit(device, limit_gib) - outside_torch() - torch.cuda.memory_reserved(device))


def cap_memory(device: torch.device, limit_gib: float | None) -> None:
    """Limit this process to the memory that is free now, or to `limit_gib` including the CUDA context.

    Without a limit a Windows driver would silently use the much slower main memory.
    """
    limit = memory_limit(device, limit_gib)
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - outside_torch()) / total), device.index or 0)
