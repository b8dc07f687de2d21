"""What a run needs of the GPU's memory: a plan from the model's config.json alone, the shape that fits best, and what
was measured.
"""

import dataclasses
import functools
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config, ConfigError
from linear_ops import adapter_columns, operand_columns
from loss_ops import chunk_rows
from nf4_lookup import HAS_TRITON
from quantization_utils import LOADING_ERRORS, beyond_positions, cannot_load, known_positions

GIB = 2**30
BLOCK, NESTED_BLOCK = 64, 256  # weights a quantisation constant, constants a second-level constant (QLoRA, section 3)
CONTEXT_BYTES = int(0.5 * GIB)  # CUDA context with cuBLAS; 0.45-0.55 GiB measured on an H100, CUDA 13
WORKSPACE_BYTES = 3 * 2**25  # cuBLAS keeps 32 MiB for each of the streams: the default one, the warm-up's, the graph's
# What the allocator has reserved and cannot hand out, and what the table lacks; measured on an H100, see
# tests/benchmarks/bench_memory.py.
SLACK_BYTES, SLACK_SHARE = int(0.26 * GIB), 0.045  # at all times, and of what comes and goes with a step

# ------------------------------------------------------------------------------------------------ the model's shape


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the plan reads of a model: sizes only, so it comes from config.json."""

    linears: tuple[tuple[str, int, int], ...]  # (name, out_features, in_features) of every layer that is quantised
    embedding: int  # parameters of embedding and head, tied ones once
    other_parameters: int  # norms and biases; like the embedding they keep the compute dtype
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    head_norms: bool  # q and k are normalised, as in Qwen3
    positions: int | None  # that the model knows, where it says so

    @property
    def parameters(self) -> int:
        return sum(out * into for _, out, into in self.linears) + self.embedding + self.other_parameters

    def width(self, *names: str) -> int:
        """Return the summed output width of the named linears of one layer, 0 for what the model lacks."""
        total = sum(out for name, out, _ in self.linears if name.rpartition(".")[2] in names)
        return total // self.layers

    @property
    def query(self) -> int:
        return self.width("q_proj") or self.hidden

    @property
    def key_value(self) -> int:
        return self.width("k_proj", "v_proj") or 2 * self.hidden

    @property
    def inner(self) -> int:
        """The width between the two halves of the MLP."""
        return max(into for _, _, into in self.linears)


def model_shape(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of the model that a hub id or folder names, reading config.json (a few kB) and no weights."""
    try:
        model_config = AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise cannot_load(model_name, error) from None
    return shape_of(model)


def shape_of(model: nn.Module) -> ModelShape:
    """Return the shape of a model that was not quantised yet; its weights may be on the meta device."""
    model.tie_weights()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    linears = tuple(
        (name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    embedding = sum(p.numel() for p in {head.weight, table.weight})
    total = sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config()
    return ModelShape(
        linears=linears,
        embedding=embedding,
        other_parameters=total - embedding - sum(out * into for _, out, into in linears),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        heads=text.num_attention_heads,
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        positions=known_positions(model.config),
    )


def adapted(shape: ModelShape, targets: tuple[str, ...] | str) -> list[tuple[str, int, int]]:
    """Return the linear layers that get an adapter."""
    if isinstance(targets, str):
        return list(shape.linears)
    return [linear for linear in shape.linears if any(linear[0] == t or linear[0].endswith("." + t) for t in targets)]


def adapter_parameters(shape: ModelShape, config: Config) -> int:
    """Return the trainable parameters."""
    chosen = adapted(shape, config.lora.target_modules)
    dora = sum(out for _, out, _ in chosen) if config.lora.use_dora else 0
    return config.lora.rank * sum(out + into for _, out, into in chosen) + dora


# ------------------------------------------------------------------------------------------------ activations

COMPILED, FUSED, PLAIN = "compiled", "fused", "plain"


def expected_path(config: Config) -> str:
    """Return the path that a run on a GPU with Triton would take."""
    if config.performance.fused_lora == "off" or config.lora.use_dora or not config.quantization.load_in_4bit:
        return PLAIN
    return FUSED if config.performance.compile == "off" or lacks_triton() else COMPILED


def lacks_triton() -> bool:
    """Return whether the kernels cannot run; without a card one with Triton is meant."""
    return torch.cuda.is_available() and not HAS_TRITON


def saved_bytes(shape: ModelShape, config: Config, path: str) -> int:
    """Return what a layer that is not checkpointed keeps for its backward, bytes a token.

    Counted from what autograd saves (tests compare) in bfloat16: the products' inputs, q, k and v as attention reads
    them, its output.
    """
    h, q, kv, inner = shape.hidden, shape.query, shape.key_value, shape.inner
    rank = config.lora.rank
    attention = 2 * (2 * q + kv) + 4 * shape.heads
    if shape.head_norms:  # their inputs in fp32, or, compiled, with them the whole product, v too; and a number a head
        attention += 2 * (q + kv) if path == COMPILED else 4 * (q + kv // 2)
        attention += 4 * (q + kv // 2) * shape.heads // q
    if path != PLAIN:  # a norm is made again from its input, the layer's or the sum after attention, and two numbers
        return attention + 2 * (2 * h + 2 * inner) + 2 * fused_columns(config) + 8
    norms = 2 * 4 * h + 8  # in fp32
    dropped = config.lora.dropout > 0  # then each adapter has its own copy of its input, and a group its mask
    inputs = 3 * h + q + 2 * h + inner if dropped else 2 * h + inner
    masks = 2 * h + q + inner if dropped else 0
    return attention + norms + 2 * inputs + 3 * 2 * inner + masks + 7 * 2 * rank


def fused_columns(config: Config) -> int:
    """Return the columns of u = x A^T that the four operators of a layer keep."""
    targets, rank = config.lora.target_modules, config.lora.rank
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    members = [sum(name in targets or targets == "all-linear" for name in group) for group in groups]
    return sum(adapter_columns(rank, count) for count in members)


def transient_bytes(shape: ModelShape, config: Config, path: str, tokens: int) -> int:
    """Return the most that lives for a moment in a layer's backward: gradients on their way, and a dequantised operand
    beside them.
    """
    h, inner, rank = shape.hidden, shape.inner, config.lora.rank
    width = 2 if config.quantization.compute_dtype != "float32" else 4
    if path == PLAIN:  # the gradients of SwiGLU's three factors, and peft's fp32 copy of an adapter's input
        return tokens * (2 * (4 * inner + 2 * h) + 4 * inner) + inner * h * width
    wide_down, wide = operand_columns(inner, adapter_columns(rank, 1)), operand_columns(h, adapter_columns(rank, 2))
    down = tokens * 2 * (2 * h + 2 * inner + wide_down) + h * wide_down * width
    gate_up = tokens * 2 * (2 * h + wide) + 2 * inner * wide * width
    return max(down, gate_up)


def loss_bytes(shape: ModelShape, config: Config, path: str, tokens: int, chunk: int) -> int:
    """Return what the loss takes: the last norm's input in fp32, its output and its gradient, and a chunk of logits.

    The kernel writes their gradient in their memory; compiled, fp32 logits and their gradient lie side by side.
    """
    width = 8 if path == COMPILED else 11
    if path != PLAIN and config.quantization.compute_dtype != "float32" and not lacks_triton():
        width = 2
    return tokens * 8 * shape.hidden + min(chunk, tokens) * shape.vocabulary * width


# ------------------------------------------------------------------------------------------------ the plan


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, for one shape of a run. Paged optimizer states are managed memory and no part of the total."""

    parts: dict[str, int]
    micro_batch: int
    checkpointed: int
    layers: int
    paged: int = 0
    offload: bool = False  # whether the inputs of checkpointed layers wait for the backward in main memory
    logit_chunk: int | None = (
        None  # positions whose logits the loss holds at once; None: what chunk_rows says by itself
    )

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """What torch's allocator will report: the total without the CUDA context."""
        return self.total - self.parts["CUDA context"]

    @property
    def shape(self) -> str:
        where = ", their inputs in main memory" if self.offload else ""
        return f"micro-batch {self.micro_batch}, {self.checkpointed} of {self.layers} layers checkpointed{where}"

    def table(self) -> str:
        """Return the plan in GiB, a line a purpose."""
        rows = [f"  {name:<38}{size / GIB:8.3f}" for name, size in self.parts.items()]
        paged = [f"  (paged, to main memory when needed {self.paged / GIB:8.3f})"] if self.paged else []
        return "\n".join([f"memory plan, GiB: {self.shape}", *rows, *paged, f"  {'total':<38}{self.total / GIB:8.3f}"])


def static_parts(shape: ModelShape, config: Config, path: str) -> tuple[dict[str, int], int]:
    """Return (what does not depend on the shape of a step, paged optimizer states), bytes."""
    quantization, optim = config.quantization, config.training.optim
    width = 4 if quantization.compute_dtype == "float32" else 2
    weights, trainable = sum(out * into for _, out, into in shape.linears), adapter_parameters(shape, config)
    constants = weights / BLOCK * (4 if not quantization.use_double_quant else 1)
    if quantization.use_double_quant:  # fp32: a second-level constant each, and an offset each where fused
        constants += weights / BLOCK / NESTED_BLOCK * (8 if path != PLAIN else 4)
    states = trainable * (2 if "8bit" in optim else 12 if optim == "adamw_torch" else 8)  # torch's holds a copy more
    paged = states if optim.startswith("paged") else 0
    quantised = quantization.load_in_4bit
    parts = {
        "packed weights": weights // 2 if quantised else weights * width,
        "quantisation constants": int(constants) if quantised else 0,
        "embedding and head": shape.embedding * width,
        "norms and biases": shape.other_parameters * width,
        "adapters (fp32)": trainable * 4,
        "gradients (fp32)": trainable * 4,
        "optimizer states": states - paged,
    }
    return parts, paged


def plan_memory(
    shape: ModelShape,
    config: Config,
    micro_batch: int,
    checkpointed: int,
    path: str | None = None,
    limit: float | None = None,
    offload: bool = False,
    logit_chunk: int | None = None,
) -> MemoryPlan:
    """Return what training takes of GPU memory with the first `checkpointed` layers recomputing their activations.

    offload: from inputs in main memory; the GPU has the one in use and the next.
    limit: bytes that the process may take, which the chunk of logits is chosen by; None: a card with more than enough.
    logit_chunk: the chunk of a run that continues, whose sums must be added in the same order.
    """
    path = path or expected_path(config)
    parts, paged = static_parts(shape, config, path)
    fixed = sum(parts.values())
    tokens, free_layers = micro_batch * config.data.max_length, shape.layers - checkpointed
    saved, transient = saved_bytes(shape, config, path) * tokens, transient_bytes(shape, config, path, tokens)
    if path == PLAIN and free_layers:
        saved += 2 * adapter_parameters(shape, config) // shape.layers  # the adapters' copies in the compute type
    hidden = tokens * shape.hidden * 2
    chunk = logit_chunk or chunk_rows(shape.vocabulary, int(limit - CONTEXT_BYTES - fixed) if limit else 2**36)
    loss = loss_bytes(shape, config, path, tokens, chunk)
    # The backward starts at the last layer. Checkpointed layers come after the others, whose activations are gone by
    # then.
    norms = 2 * hidden if path == PLAIN else 0  # a recompute makes their outputs too
    live = transient + (saved + norms if checkpointed else 0)
    relief = free_layers * saved if checkpointed else 0
    live = max(live - relief, transient if free_layers else live)
    parts |= {
        "checkpointed hidden states": (2 if offload else checkpointed) * hidden,
        "layers not checkpointed": free_layers * saved,
        "one live layer, forward and backward": live,
        "loss, beyond the live layer": max(0, loss - live),
        "workspaces of cuBLAS": WORKSPACE_BYTES,
    }
    parts["allocator slack"] = SLACK_BYTES + int(SLACK_SHARE * (sum(parts.values()) - fixed))
    parts["CUDA context"] = CONTEXT_BYTES
    return MemoryPlan(parts, micro_batch, checkpointed, shape.layers, paged, offload, chunk)


SHAPE_KNOBS = ("training.batch_size", "training.gradient_accumulation_steps", "training.gradient_checkpointing")


def configured_shape(config: Config) -> ModelShape:
    """Return the shape of the configured model; ConfigError where it has none of the target modules."""
    shape = model_shape(config.model.name, config.model.revision, config.model.trust_remote_code)
    if not adapted(shape, config.lora.target_modules):
        raise ConfigError(f"lora.target_modules: the model has none of {', '.join(config.lora.target_modules)}")
    return shape


def pinned_layers(layers: int, config: Config) -> int:
    """Return the checkpointed layers, of `layers`, that training.gradient_checkpointing asks for."""
    wanted = config.training.gradient_checkpointing
    return layers if wanted is True or wanted in ("auto", "offload") else min(int(wanted), layers)


def wants_offload(config: Config) -> bool:
    """Return whether training.gradient_checkpointing asks for the layers' inputs in main memory."""
    return config.training.gradient_checkpointing == "offload"


# ------------------------------------------------------------------------------------------------ the fit


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the card does: FLOP/s of a large product, bytes/s of a large copy. An RTX 4060's, unless measured."""

    flops: float = 55e12
    bytes: float = 0.25e12


def step_seconds(shape: ModelShape, config: Config, rates: Rates, micro_batch: int, checkpointed: int) -> float:
    """Return an estimate of the time of one micro-batch, for choosing between shapes: products, dequantisation, passes.

    Each product is made forward, backward and, in checkpointed layers, once more (but the last of a layer); W is
    dequantised as often.
    """
    weights, tokens = sum(out * into for _, out, into in shape.linears), micro_batch * config.data.max_length
    passes, share = 2 + checkpointed / shape.layers, tokens / (tokens + 256)  # small products leave the units half idle
    products = 2 * tokens * (weights * passes + 2 * shape.vocabulary * shape.hidden) / (rates.flops * share)
    dequantise = weights * passes * 2.5 / rates.bytes if config.quantization.load_in_4bit else 0.0
    activations = tokens * shape.layers * passes * 12 * (shape.hidden + shape.inner) / rates.bytes
    return products + dequantise + activations


def shapes(shape: ModelShape, config: Config, sequences: int) -> Iterator[tuple[int, int]]:
    """Yield (micro-batch, checkpointed layers) that a run may take without changing the sequences of an optimizer step.

    sequences: of one process. A value given as a flag is kept.
    """
    batches, layers = [n for n in range(1, sequences + 1) if sequences % n == 0], range(shape.layers + 1)
    if config.flags & set(SHAPE_KNOBS[:2]):
        batches = [min(config.training.batch_size, sequences)]
    if "training.gradient_checkpointing" in config.flags and config.training.gradient_checkpointing != "auto":
        layers = [pinned_layers(shape.layers, config)]
    yield from itertools.product(batches, layers)


def fit(shape: ModelShape, config: Config, sequences: int, limit: float, rates: Rates) -> MemoryPlan:
    """Return the plan of the fastest shape that takes no more than `limit` bytes, context included, or the smallest.

    Main memory is for what fits in no other way: copies cost time, and a graph cannot be captured.
    """
    best, smallest = None, None
    pinned = "training.gradient_checkpointing" in config.flags and wants_offload(config)
    for micro_batch, checkpointed in shapes(shape, config, sequences):
        plan = plan_memory(shape, config, micro_batch, checkpointed, limit=limit, offload=pinned)
        if smallest is None or plan.total < smallest.total:
            smallest = plan
        seconds = step_seconds(shape, config, rates, micro_batch, checkpointed) / micro_batch
        if plan.total <= limit and (best is None or seconds < best[0]):
            best = (seconds, plan)
    if best:
        return best[1]
    every = smallest.micro_batch, shape.layers
    if expected_path(config) == COMPILED and every in shapes(shape, config, sequences):
        return plan_memory(shape, config, *every, limit=limit, offload=True)
    return smallest


def unplanned(config: Config, sequences: int, layers: int) -> MemoryPlan:
    """Return the configured shape of a run on a CPU, which has no plan."""
    micro_batch, checkpointed = min(config.training.batch_size, sequences), pinned_layers(layers, config)
    return MemoryPlan({}, micro_batch, checkpointed, layers, offload=wants_offload(config))


def step_down(plan: MemoryPlan, sequences: int, compiled: bool) -> MemoryPlan | None:
    """Return the next smaller shape after running out of memory, which has no plan: that of the larger was wrong.

    A quarter more of the layers checkpointed; where all are, the next smaller micro-batch that divides the sequences; at
    one sequence the layers' inputs in main memory, for which layers must be compiled.
    """
    more = min(plan.layers, plan.checkpointed + max(1, plan.layers // 4))
    if more > plan.checkpointed:
        return dataclasses.replace(plan, parts={}, checkpointed=more)
    smaller = [n for n in range(1, plan.micro_batch) if sequences % n == 0]
    if smaller:
        return dataclasses.replace(plan, parts={}, micro_batch=max(smaller))
    return dataclasses.replace(plan, parts={}, offload=True) if compiled and not plan.offload else None


def longest_length(shape: ModelShape, config: Config, limit: float) -> int:
    """Return the longest max_length, a multiple of 128 or the model's last position, that trains with one sequence at a
    time, all layers checkpointed and, where they are compiled, their inputs in main memory.
    """
    low, high, offload = 0, 2**14, expected_path(config) == COMPILED  # in units of 128 tokens
    while high - low > 1:
        middle = (low + high) // 2
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=middle * 128))
        fits = plan_memory(shape, other, 1, shape.layers, limit=limit, offload=offload).total <= limit
        low, high = (middle, high) if fits else (low, middle)
    return min(low * 128, shape.positions or low * 128)


# ------------------------------------------------------------------------------------------------ what is decided and said


class NoFit(Exception):
    """No shape of the run fits the memory: the lines that say so, and what would help."""


def choose_plan(
    shape: ModelShape, config: Config, sequences: int, device: torch.device | None, limit: float | None, saved: dict
) -> MemoryPlan:
    """Return the plan of the shape that a run takes: its checkpoint's, else auto_fit's, else the configured one.

    sequences: an optimizer step's, of one process. saved: the checkpoint's shape, empty without one; a flag goes
    before it.
    """
    auto_fit = config.performance.auto_fit
    if saved and auto_fit and not config.flags & set(SHAPE_KNOBS):
        offload = saved.get("offload", False)
        taken = saved["micro_batch"], saved["checkpointed"]
        return plan_memory(shape, config, *taken, limit=limit, offload=offload, logit_chunk=saved.get("logit_chunk"))
    if auto_fit and limit is not None:
        # A stopwatch would choose another shape on another day.
        rates = Rates() if config.performance.deterministic else measure_rates(device)
        return fit(shape, config, sequences, limit, rates)
    micro_batch = min(config.training.batch_size, sequences)
    checkpointed, offload = pinned_layers(shape.layers, config), wants_offload(config)
    chunk = saved.get("logit_chunk")
    return plan_memory(shape, config, micro_batch, checkpointed, limit=limit, offload=offload, logit_chunk=chunk)


def plan_run(
    config: Config, accelerator: Accelerator, sequences: int, saved: dict, say: Callable[[str], None]
) -> MemoryPlan:
    """Return the plan of a run on a GPU, one for all processes, and say it. Raises NoFit where even the smallest shape
    is too large.

    sequences, saved: as in choose_plan; what another number of processes saved does not count.
    """
    shape, device = configured_shape(config), accelerator.device
    limit = memory_limit(device, config.performance.memory_limit_gib, config.performance.deterministic)
    saved = saved if saved.get("processes") == accelerator.num_processes else {}
    plan = broadcast_object_list([choose_plan(shape, config, sequences, device, limit, saved)])[0]
    for line in chosen_lines(config, plan, limit):
        say(line)
    if plan.total > limit:
        sizes = f"the run takes {plan.total / GIB:.2f} GiB, there are {limit / GIB:.2f}"
        lines = [f"error: performance.memory_limit_gib: {sizes}", *savings_lines(shape, config, plan, limit, count=3)]
        raise NoFit("\n".join(lines))
    return plan


def print_plan(config: Config, about_data: Callable[[Config, int], str]) -> int:
    """Print the plan of the shape that a run would take; return 3 where it exceeds the limit or the GPU, else 0.

    about_data: gives the line on an epoch, of the configuration and the sequences of an optimizer step.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    shape, limit = configured_shape(config), memory_limit(device, config.performance.memory_limit_gib)
    sequences = config.training.batch_size * config.training.gradient_accumulation_steps
    plan = choose_plan(shape, config, sequences, device, limit, saved={})
    print(*chosen_lines(config, plan, limit), *facts(shape, config, plan, device), sep="\n")
    print(about_data(config, sequences), *savings_lines(shape, config, plan, limit), sep="\n")
    if limit is None:
        return 0
    longest = longest_length(shape, config, limit)
    offload = ", their inputs in main memory" if expected_path(config) == COMPILED else ""
    last = ", the model's last position" if longest == shape.positions else ""
    print(
        f"longest data.max_length that fits, one sequence at a time, all layers checkpointed{offload}: {longest:,}{last}"
    )
    print(f"{'fits' if plan.total <= limit else 'does not fit'} in {limit / GIB:.2f} GiB")
    return 0 if plan.total <= limit else 3


def chosen_lines(config: Config, plan: MemoryPlan, limit: float | None) -> list[str]:
    """Return the plan's table, and the shape of the run with the reason for it."""
    if not config.performance.auto_fit:
        reason = "as configured (performance.auto_fit is off)"
    elif limit is None:
        reason = "as configured"
    elif plan.total > limit:
        reason = f"the smallest there is, and more than {limit / GIB:.2f} GiB"
    else:
        pinned = [name for name in sorted(config.flags) if name in SHAPE_KNOBS]
        kept = f", {' and '.join(pinned)} as the flag says" if pinned else ""
        reason = f"the fastest within {limit / GIB:.2f} GiB by estimate{kept}; the same is learned in any"
    return [plan.table(), f"shape: {plan.shape}; {reason}"]


def facts(shape: ModelShape, config: Config, plan: MemoryPlan, device: torch.device | None) -> list[str]:
    """Return what else there is to know before a download; times are computed, not measured."""
    trainable = adapter_parameters(shape, config)
    quantised = sum(out * into for _, out, into in shape.linears)
    loaded = (quantised // 2 if config.quantization.load_in_4bit else 2 * quantised) + 2 * shape.embedding
    seconds = step_seconds(shape, config, measure_rates(device), plan.micro_batch, plan.checkpointed)
    tokens = plan.micro_batch * config.data.max_length / seconds
    card = "this card's rates" if device else "the rates of an RTX 4060"
    return [
        f"parameters: {shape.parameters:,}; trainable {trainable:,}, adapter {trainable * 4 / 1e6:.1f} MB",
        f"download {2 * shape.parameters / 1e9:.2f} GB in 16 bit; main memory while loading about {loaded / 1e9 + 3:.1f} GB",
        f"computed with {card}: {tokens:,.0f} tokens/s, {1e6 / tokens / 3600:.2f} hours for a million tokens",
        *beyond_positions(config.data.max_length, shape.positions),
    ]


def savings(shape: ModelShape, config: Config, plan: MemoryPlan, limit: float | None = None) -> list[tuple[int, str]]:
    """Return (bytes saved, what would save them), the largest first."""

    def without(section: str, micro_batch: int = plan.micro_batch, checkpointed: int = plan.checkpointed, **changes):
        other = dataclasses.replace(config, **{section: dataclasses.replace(config[section], **changes)})
        return plan.total - plan_memory(shape, other, micro_batch, checkpointed, None, limit, plan.offload).total

    length, rank = max(8, config.data.max_length // 2), max(1, config.lora.rank // 2)
    attention, smaller = ("q_proj", "k_proj", "v_proj", "o_proj"), plan.micro_batch // 2
    found = [(without("data", max_length=length), f"data.max_length {length}")]
    found.append((without("lora", rank=rank), f"lora.rank {rank}"))
    if set(config.lora.target_modules) > set(attention):
        found.append((without("lora", target_modules=attention), f"lora.target_modules [{', '.join(attention)}]"))
    if plan.checkpointed < plan.layers:
        found.append((without("training", checkpointed=plan.layers), "training.gradient_checkpointing true"))
    if plan.micro_batch > 1:
        line = f"training.batch_size {smaller} and twice the accumulation"
        found.append((without("training", micro_batch=smaller), line))
    if config.training.optim != "paged_adamw_8bit":
        found.append((without("training", optim="paged_adamw_8bit"), "training.optim paged_adamw_8bit"))
    if not config.quantization.use_double_quant:
        found.append((without("quantization", use_double_quant=True), "quantization.use_double_quant true"))
    return sorted((pair for pair in found if pair[0] > 0), reverse=True)


def savings_lines(
    shape: ModelShape, config: Config, plan: MemoryPlan, limit: float | None, count: int = 5
) -> list[str]:
    """Return a line for each of the settings that would save most."""
    return [f"{name} would save {saved / GIB:.2f} GiB" for saved, name in savings(shape, config, plan, limit)[:count]]


def ran_out(config: Config, plan: MemoryPlan, device: torch.device) -> list[str]:
    """Return the plan of a shape that ran out of memory and the three settings that save most, each with its saving."""
    shape, limit = configured_shape(config), memory_limit(device, config.performance.memory_limit_gib)
    plan = plan_memory(shape, config, plan.micro_batch, plan.checkpointed, limit=limit, offload=plan.offload)
    return [plan.table(), *savings_lines(shape, config, plan, limit, count=3)]


# ------------------------------------------------------------------------------------------------ what was measured


@functools.cache
def measure_rates(device: torch.device | None) -> Rates:
    """Return the card's own rates, measured in some 20 ms; an RTX 4060's without one."""
    if device is None:
        return Rates()
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    b = torch.empty(2**27, dtype=torch.uint8, device=device)

    def seconds(call) -> float:
        call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 4e3

    copy = seconds(lambda: b[: 2**26].copy_(b[2**26 :]))  # reads 64 MiB and writes them
    return Rates(flops=2 * 4096**3 / seconds(lambda: a @ a), bytes=b.numel() / copy)


def let_go() -> None:
    """Free what nothing refers to any more, for the driver to hand out anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_line(device: torch.device) -> str:
    """Return the tutorial's line about GPU memory, or the process's memory where there is no GPU."""
    if device.type != "cuda":
        return f"Memory: {psutil.Process().memory_info().rss / GIB:.2f} GiB in this process (no GPU)"
    free, _ = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return f"GPU Memory: Allocated={allocated / GIB:.2f}GB | Reserved={reserved / GIB:.2f}GB | Free={free / GIB:.2f}GB"


def peak_gib(device: torch.device) -> float:
    """Return the most memory taken so far, GiB: reserved by the allocator on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2**20)


def memory_limit(device: torch.device | None, limit_gib: float | None, fixed: bool = False) -> float | None:
    """Return the bytes that this process may take, its CUDA context included; None where there is neither card nor
    limit.

    fixed: of all of the card's memory, not of what is free at the moment. Raises ConfigError for a limit below the context.
    """
    limit = None if limit_gib is None else limit_gib * GIB
    if limit is not None and limit <= CONTEXT_BYTES:
        raise ConfigError(
            f"performance.memory_limit_gib: expected more than the context's {CONTEXT_BYTES / GIB} GiB, got {limit_gib}"
        )
    if device is None or device.type != "cuda":
        return limit
    if fixed:
        return min(torch.cuda.get_device_properties(device).total_memory, limit or math.inf)
    # Our own context is open by now.
    free = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES + torch.cuda.memory_reserved(device)
    return free if limit is None else min(free, limit)


def free_bytes(device: torch.device, limit_gib: float | None) -> int:
    """Return what this process may still take."""
    return int(memory_limit(device, limit_gib) - CONTEXT_BYTES - torch.cuda.memory_reserved(device))


def cap_memory(device: torch.device, limit_gib: float | None) -> None:
    """Let this process take what is free now, or `limit_gib` with the context: a Windows driver would spill into system
    memory.
    """
    limit = memory_limit(device, limit_gib)
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - CONTEXT_BYTES) / total), device.index or 0)
