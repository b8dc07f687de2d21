"""What a run needs of the GPU's memory, by arithmetic from the model's config.json alone: sizes, the plan, and the
shape that fits best.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config, ConfigError
from fast_path import families
from fast_path.families import Family
from fast_path.loss import chunk_rows
from fast_path.nf4 import HAS_TRITON
from fast_path.packed_weights import adapter_columns, operand_columns
from quantization_utils import LOADING_ERRORS, cannot_load, known_positions

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
    family: Family = families.UNKNOWN  # what the fast path knows about it

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
        family=families.of(model),
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


def plain_layers(shape: ModelShape, path: str) -> bool:
    """Return whether attention, MLP and norms are transformers' own on this path: families.py has none of the model's.

    Its linears are fused all the same. What such layers keep for their backward is what plain layers keep, without the
    copies that dropout makes for each adapter; a compiler drops from it what it can make again, and leaves what a fused
    layer keeps (tests compare both).
    """
    return path == PLAIN or bool(shape.family.plain_attention or shape.family.plain_mlp)


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
    if path == COMPILED or not plain_layers(shape, path):
        # A norm is made again from its input, the layer's or the sum after attention, and two numbers. Further norms
        # read what a product writes, which is kept for them.
        further = (shape.family.layer_norms - 2) * (2 * h + 4)
        return attention + 2 * (2 * h + 2 * inner) + 2 * fused_columns(shape.family, config) + 8 + further
    norms = shape.family.layer_norms * (4 * h + 4)  # in fp32
    # With dropout peft's linears have a copy of their input for each adapter, and a mask for each group.
    dropped = config.lora.dropout > 0 and path == PLAIN
    inputs = 3 * h + q + 2 * h + inner if dropped else 2 * h + inner
    masks = 2 * h + q + inner if dropped else 0
    return attention + norms + 2 * inputs + 3 * 2 * inner + masks + 7 * 2 * rank


def fused_columns(family: Family, config: Config) -> int:
    """Return the columns of u = x A^T that the four operators of a layer keep."""
    targets, rank = config.lora.target_modules, config.lora.rank
    members = [sum(name in targets or targets == "all-linear" for name in group) for group in family.groups]
    return sum(adapter_columns(rank, count) for count in members)


def transient_bytes(shape: ModelShape, config: Config, path: str, tokens: int) -> int:
    """Return the most that lives for a moment in a layer's backward: gradients on their way, and a dequantised operand
    beside them.
    """
    h, inner, rank = shape.hidden, shape.inner, config.lora.rank
    width = 2 if config.quantization.compute_dtype != "float32" else 4
    if plain_layers(shape, path):  # the gradients of SwiGLU's three factors, and peft's fp32 copy of an adapter's input
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
    norms = 2 * hidden if plain_layers(shape, path) else 0  # a recompute makes their outputs too
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
