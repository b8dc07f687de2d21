"""GPU memory that a run needs, computed from the model's config.json alone: the plan, and the shape that fits best.

The shape of a run is its micro-batch, its number of checkpointed layers, how many of them are swapped to main memory
instead of recomputed, and whether the layers' inputs are offloaded.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator

import torch
from transformers import AutoConfig

from config import Config, ConfigError, LoraSettings, TrainingConfig
from fast_path import families
from fast_path.choice import FastPath
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from fast_path.loss import default_logit_chunk
from fast_path.model_targets import resolved_targets
from fast_path.nf4 import lacks_triton
from fast_path.optimizers import OPTIMIZERS
from fast_path.packed_weights import PIECES, adapter_columns, divides, operand_columns, operand_numbers, pieces_each
from fast_path.scratch import MOST
from fast_path.swapping import SMALL, swapped_layers
from quantization_utils import (
    LOADING_ERRORS,
    count_parameters,
    create_lora_config,
    prepare_model_for_training,
)
from toolkit.cards import Rates
from toolkit.expert_plan import NESTED_BLOCK, check_experts, expert_shape, experts_each
from toolkit.model_shape import ModelShape, adapted, adapter_parameters, model_skeleton, shape_of

GIB = 2**30
BLOCK = (
    families.BLOCK
)  # weights per quantisation constant; NESTED_BLOCK: constants per second-level one (QLoRA, section 3)
CONTEXT_BYTES = int(0.5 * GIB)  # CUDA context with cuBLAS, measured (docs/measurements.md)
WORKSPACE_BYTES = 2**25  # cuBLAS keeps it per stream, on Hopper: the default, the warm-up and the graph stream
# Memory that the allocator has reserved but cannot use, and all that the plan does not list. Fitted to measurements:
# docs/measurements.md, tests/benchmarks/bench_memory.py.
SLACK_BYTES, SLACK_SHARE = int(0.26 * GIB), 0.045  # constant, and as a share of what a step allocates and frees
# The constant of a captured step, before which what the warm-ups need is returned. How much less it reserves since was not
# measured: with this value the plan is what was measured before.
GRAPH_SLACK_BYTES = int(0.18 * GIB)
# The same where weights are unpacked in pieces: fitted to the one such run that was measured, Llama-3.1-8B's shape on an H200
# (docs/measurements.md). Logits need no more than a piece, so the memory that they share does not move to a larger place; of
# the workspaces the graph's stream alone has one; and the states of small tensors, which the plan counts, are paged.
PIECES_SLACK_BYTES = int(0.145 * GIB)

UNPAGED = 100_000  # weights of a tensor below which bitsandbytes does not page its states (Optimizer.get_state_buffer)
# What NCCL keeps of a card for its buffers, outside of torch's allocator: a guess for cards without NVLink. Two H200, whose
# NVLink takes more channels, had 2.05 to 2.65 GiB outside the allocator (docs/more_gpus.md), context and paged states included.
NCCL_BYTES = int(0.5 * GIB)
# Layers of a divided base that a card holds whole at the same time: the one that runs and the next one, two buffers of the
# gathering, and one for gaps, since the gathering has memory of its own. Fitted to one run on two H200 (docs/more_gpus.md).
GATHERED = 5

# Where a norm follows the MLP, one checkpointed layer in so many keeps the MLP's output for the backward pass, which then
# does not repeat the product of the down projection. A half adds 5 to 7 % to the memory of such a run (docs/fast_path.md).
ONE_KEEPS_IN = 2
# Tokens per sequence from which checkpointed layers keep what attention returns, as many as fit: attention's time grows with
# the square of the length and what it returns does not. At 512 tokens fewer checkpointed layers are worth more per byte.
LONG = 2048
# Gaps in the allocator's memory where layers are swapped, as a share of what a layer keeps: its tensors come and go at other
# times than the GPU's own. Fitted to measurements (docs/measurements.md, "Swapped layers").
SWAP_GAPS = 0.15
# The share of the fastest other shape's time that swapping must save by estimate: it takes main memory from other programs.
WORTH_SWAPPING = 0.1

PCIE = 20e9  # bytes per second to a card from others or from main memory, of a slot with 16 lanes of PCIe 4

# ------------------------------------------------------------------------------------------------ activations

COMPILED, FUSED, PLAIN = "compiled", "fused", "plain"


def expected_path(config: Config) -> str:
    """Return the path that a run on a GPU with Triton would take."""
    if config.performance.fused_lora == "off" or config.lora.use_dora or not config.quantization.load_in_4bit:
        return PLAIN
    return FUSED if config.performance.compile == "off" or lacks_triton() else COMPILED


def plain_layers(shape: ModelShape, path: str) -> bool:
    """Return whether attention, MLP and norms are transformers' own on this path: families.py has none of the model's.

    Its linears are fused all the same. What such layers keep for their backward is what plain layers keep, without the
    copies that dropout makes for each adapter; a compiler drops from it what it can make again, and leaves what a fused
    layer keeps (tests compare both).
    """
    return path == PLAIN or bool(shape.family.plain_attention or shape.family.plain_mlp)


def saved_bytes(shape: ModelShape, config: Config, path: str) -> int:
    """Return the bytes per token that a layer without checkpointing keeps for its backward pass.

    These are the tensors that autograd saves in bfloat16: inputs of the products, q, k and v as attention reads them,
    the output of attention. Tests compare the number with what autograd saves.
    """
    h, q, kv, inner = shape.hidden, shape.query, shape.key_value, shape.inner
    rank = config.lora.rank
    attention = 2 * (2 * q + kv) + 4 * shape.heads
    if shape.head_norms:  # the norms' inputs in fp32 (compiled: the product, with v) and a number per head
        attention += 2 * (q + kv) if path == COMPILED else 4 * (q + kv // 2)
        attention += 8 if shape.family.qk_norms == "all" else 4 * (q + kv // 2) * shape.heads // q
    if path == COMPILED or not plain_layers(shape, path):
        # A norm is made again from its input, the layer's or the sum after attention, and a number. Norms after attention
        # and MLP read what a product writes, which is kept for them: attention's (uncompiled in fp32; compiled, the sum is
        # made again from it) and 8 bits of the MLP's.
        family = shape.family
        first = (2 if path == COMPILED else 4) * h + 4
        further = sum(
            size for size, name in zip((first, normed_bytes(shape, config)), family.norms_after, strict=True) if name
        )
        summed = 0 if further and path == COMPILED else 2 * h
        numbers = 4 * (family.layer_norms - family.further_norms)
        kept = attention + 2 * h + summed + 4 * inner + 2 * fused_columns(shape, config) + numbers + further
        return kept + shape.experts.saved_bytes()
    norms = shape.family.layer_norms * (4 * h + 4)  # in fp32
    # With dropout each adapter of peft keeps its own copy of its input, and each group of readers a mask.
    family, dropped = shape.family, config.lora.dropout > 0 and path == PLAIN
    inputs = len(family.qkv) * h + q + len(family.gate_up) * h + inner if dropped else 2 * h + inner
    masks = 2 * h + q + inner if dropped else 0
    ranks = sum(map(len, family.groups)) * 2 * rank
    together = 2 * (q + kv // 2) if len(family.qkv) == 1 else 0  # v is a part of one tensor with q and k
    kept = attention + norms + 2 * inputs + 3 * 2 * inner + masks + ranks + together
    return kept + shape.experts.saved_bytes()


def normed_bytes(shape: ModelShape, config: Config) -> int:
    """Return the bytes per token that a norm after the MLP keeps: 8 bits of each number, its row's largest, and 1 / rms."""
    return shape.hidden + 8 if config.quantization.compute_dtype != "float32" else 4 * shape.hidden + 4


def kept_bytes(shape: ModelShape, config: Config) -> dict[str, int]:
    """Return the bytes per token that a checkpointed layer keeps with an output, by the names in `Kept.named`.

    With that of the MLP, 8 bits of each number, it keeps u; with attention's a logarithm per head.
    """
    names = {name.rpartition(".")[2] for name, _, _ in adapted(shape, config.lora)}
    u = 2 * adapter_columns(config.lora.rank, shape.family.down in names)
    return {"MLP": normed_bytes(shape, config) - 4 + u, "attention": 2 * shape.query + 4 * shape.heads}


def most_kept(shape: ModelShape, config: Config, checkpointed: int) -> Kept:
    """Return how many checkpointed layers keep outputs where there is room for all that are worth it."""
    known = config.model.attn_implementation in ("auto", "sdpa")  # of other attentions nothing is kept (ATTENTIONS)
    long = known and config.data.max_length >= LONG
    return Kept(checkpointed // ONE_KEEPS_IN * bool(shape.family.norms_after[1]), checkpointed * long)


def fused_columns(shape: ModelShape, config: Config) -> int:
    """Return the columns of u = x A^T that the four operators of a layer keep."""
    names = {name.rpartition(".")[2] for name, _, _ in adapted(shape, config.lora)}
    members = [sum(name in names for name in group) for group in shape.family.groups]
    return sum(adapter_columns(config.lora.rank, count) for count in members)


def transient_bytes(
    shape: ModelShape, config: Config, path: str, tokens: int, recomputed: bool = False, pieces: int = 1
) -> int:
    """Return the largest amount that a layer's backward pass needs for a moment, in bytes: gradients of activations.

    recomputed: the layer is checkpointed; where it is compiled, the gradients of gate and up then take their place.
    pieces: as in `plan_memory`; the products of gate and up's pieces are then summed in fp32.
    Without the fast path one dequantised operand comes on top; with it, `scratch_bytes` has it.
    """
    h, inner, rank = shape.hidden, shape.inner, config.lora.rank
    width = 2 if config.quantization.compute_dtype != "float32" else 4
    experts = shape.experts.transient_bytes(tokens, width, loss_kernel(config, path))
    if plain_layers(shape, path):  # the gradients of SwiGLU's three factors, and peft's fp32 copy of an adapter's input
        unpacked = inner * h * width if path == PLAIN else 0
        return max(tokens * (2 * (4 * inner + 2 * h) + 4 * inner) + unpacked, experts)
    wide_down, wide = operand_columns(inner, adapter_columns(rank, 1)), operand_columns(h, adapter_columns(rank, 2))
    narrow = config.quantization.products == "fp8"  # a copy of the product's gradient in 8 bit
    over = recomputed and path == COMPILED
    down = tokens * (2 * (2 * h + (0 if over else 2 * inner) + wide_down) + narrow * h)
    sums = 4 * wide if pieces > 1 else 0
    return max(down, tokens * (2 * (2 * h + wide) + sums + narrow * 2 * inner), experts)


def pieces_of(shape: ModelShape, config: Config, path: str) -> tuple[int, ...]:
    """Return in how many pieces gate and up can be unpacked: 1, and those of PIECES that a run short of memory may use.

    That takes fused operators with kernels and products in bf16 or fp16, and weights that can be cut. The smallest chunk of
    logits must be no larger than the largest piece: the buffer that they share then has its size before the first step and
    stays where it is, as in the run that PIECES_SLACK_BYTES was fitted to.
    """
    plain = plain_layers(shape, path) or shape.experts.all > 0 or config.quantization.products == "fp8"
    if plain or not loss_kernel(config, path):
        return (1,)
    chunk = default_logit_chunk(shape.vocabulary, 0)
    logits = logit_bytes(shape, config, path, chunk, chunk)
    held = (n for n in PIECES if logits <= scratch_bytes(shape, config, path, 0, 0, n))
    return 1, *(pieces for pieces in held if can_cut(shape, config, pieces))


def can_cut(shape: ModelShape, config: Config, pieces: int) -> bool:
    """Return whether the weights that `pieces_each` cuts are one operator in each layer and each piece has whole blocks.

    Linears that read the same x are one operator where all of them have adapters or none has.
    """
    family, blocks = shape.family, ((BLOCK, NESTED_BLOCK), config.quantization.use_double_quant)
    names = [name.rpartition(".") for name, _, _ in adapted(shape, config.lora)]
    h, inner = shape.hidden, shape.inner
    sizes = (2 * inner, h, family.gate_up), (h, inner, ()), (shape.query + shape.key_value, h, family.qkv)
    for (out, into, members), count in zip(sizes, pieces_each(pieces), strict=True):
        layers = [{before for before, _, name in names if name == member} for member in members]
        if count > 1 and not (divides(out, into, count, *blocks) and all(each == layers[0] for each in layers)):
            return False
    return True


def scratch_bytes(shape: ModelShape, config: Config, path: str, tokens: int, chunk: int, pieces: int = 1) -> int:
    """Return the bytes that unpacked weights and, where a kernel computes the loss, logits share (fast_path/scratch.py).

    pieces: as in `plan_memory`.
    """
    if path == PLAIN:
        return 0
    h, inner, rank = shape.hidden, shape.inner, config.lora.rank
    width = 2 if config.quantization.compute_dtype != "float32" else 4
    together = 1 if plain_layers(shape, path) else 2  # gate and up are one operand
    of_gate_up, of_down, of_qkv = pieces_each(pieces)
    gate_up = operand_numbers(together * inner, h, adapter_columns(rank, 2), of_gate_up)
    down = operand_numbers(h, inner, adapter_columns(rank, 1), of_down)
    qkv = operand_numbers(shape.query + shape.key_value, h, adapter_columns(rank, 3), of_qkv)
    out = operand_numbers(h, shape.query, adapter_columns(rank, 1))
    weights = max(down, gate_up, qkv, out) * width
    if loss_kernel(config, path):
        weights = max(weights, shape.experts.whole_bytes(width))
    logits = logit_bytes(shape, config, path, tokens, chunk)
    return max(weights, logits) if loss_kernel(config, path) and logits <= MOST * weights else weights


def loss_kernel(config: Config, path: str) -> bool:
    """Return whether kernels compute the loss, and unpack weights into memory that these share."""
    return path != PLAIN and config.quantization.compute_dtype != "float32" and not lacks_triton()


def logit_bytes(shape: ModelShape, config: Config, path: str, tokens: int, chunk: int) -> int:
    """Return the bytes of a chunk of logits.

    The kernel overwrites them with their gradient. Without the kernel, compiled code keeps fp32 logits and their gradient
    at the same time; uncompiled code the slope of a cap, too.
    """
    width = 2 if loss_kernel(config, path) else 8 if path == COMPILED else 15 if shape.capped else 11
    return min(chunk, tokens) * shape.vocabulary * width


def loss_bytes(shape: ModelShape, config: Config, path: str, tokens: int, chunk: int, pieces: int = 1) -> int:
    """Return the bytes that the loss needs: input of the last norm in fp32, its output and gradient, a chunk of logits.

    Logits that are in `scratch_bytes` do not count.
    """
    logits = logit_bytes(shape, config, path, tokens, chunk)
    shared = loss_kernel(config, path) and logits <= scratch_bytes(shape, config, path, tokens, chunk, pieces)
    return tokens * 8 * shape.hidden + (0 if shared else logits)


def token_rows_bytes(shape: ModelShape, config: Config) -> int:
    """Return the bytes that lora.train_tokens needs: where the head is tied, the loss copies it with the trained rows.

    The embedding looks the rows up instead (fast_path/token_rows.py), and the rows' gradients need next to nothing.
    """
    width = 4 if config.quantization.compute_dtype == "float32" else 2
    table = shape.vocabulary * shape.hidden
    return table * width if shape.embedding <= table else 0


# ------------------------------------------------------------------------------------------------ the plan


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, for one shape of a run. The total excludes paged optimizer states, which can leave the GPU."""

    parts: dict[str, int]
    micro_batch: int
    checkpointed: int
    layers: int
    paged: int = 0
    offload: bool = False  # whether the inputs of checkpointed layers are kept in main memory
    logit_chunk: int | None = None  # positions whose logits exist at the same time; None: default_logit_chunk
    rows_apart: int = 0  # bytes of the input embedding, if it is in main memory
    pieces: int = 1  # in which gate and up are unpacked, one after the other
    kept: Kept = NOTHING_KEPT  # how many checkpointed layers keep outputs
    swapped: int = 0  # how many of them are swapped instead of recomputed (fast_path/swapping.py)
    waiting: int = 0  # bytes of main memory that these take

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """The bytes that torch's allocator will report: the total without the CUDA context."""
        return self.total - self.parts["CUDA context"]

    @property
    def shape(self) -> str:
        where = ", their inputs in main memory" if self.offload else ""
        where += f", {self.swapped} of them swapped" if self.swapped else ""
        for n, name in self.kept.named():
            where += f", {n} of these {'keeps its' if n == 1 else 'keep their'} {name}'s output" if n else ""
        where += ", the embedding in main memory" if self.rows_apart else ""
        where += f", the MLP's weights unpacked in {self.pieces} pieces" if self.pieces > 1 else ""
        return f"micro-batch {self.micro_batch}, {self.checkpointed} of {self.layers} layers checkpointed{where}"

    def saved(self) -> dict[str, int | bool | None]:
        """Return what a checkpoint keeps of the shape."""
        names = ("micro_batch", "checkpointed", "offload", "logit_chunk", "pieces", "swapped")
        kept = {"kept": self.kept.mlp, "kept_attention": self.kept.attention}
        return {name: getattr(self, name) for name in names} | kept | {"rows_apart": self.rows_apart > 0}

    def table(self) -> str:
        """Return the plan in GiB, one line per purpose."""
        rows = [f"  {name:<38}{size / GIB:8.3f}" for name, size in self.parts.items()]
        paged = [f"  (paged, to main memory when needed {self.paged / GIB:8.3f})"] if self.paged else []
        paged += [f"  (embedding, in pinned main memory  {self.rows_apart / GIB:8.3f})"] if self.rows_apart else []
        paged += [f"  (swapped, in pinned main memory    {self.waiting / GIB:8.3f})"] if self.waiting else []
        return "\n".join([f"memory plan, GiB: {self.shape}", *rows, *paged, f"  {'total':<38}{self.total / GIB:8.3f}"])


def small_states(shape: ModelShape, config: Config) -> int:
    """Return the bytes of a paged optimizer's states that bitsandbytes does not page: those of small tensors."""
    rank, each = config.lora.rank, OPTIMIZERS[config.training.optim].state_bytes
    tensors = (rank * width for _, out, into in adapted(shape, config.lora) for width in (out, into))
    return each * sum(size for size in tensors if size < UNPAGED)


def of_this_process(shape: ModelShape, config: Config) -> float:
    """Return the share of the packed weights that one process keeps."""
    return 1 / shape.processes if config.performance.shard_base else 1.0


def layer_bytes(shape: ModelShape) -> int:
    """Return the bytes of a decoder layer's packed weights."""
    return (sum(out * into for _, out, into in shape.linears) + shape.experts.packed) // 2 // shape.layers


def gather_seconds(shape: ModelShape, config: Config) -> float:
    """Return how long a micro-batch takes to gather all layers of a divided base twice, forward and backward, over PCIe."""
    others = 1 - of_this_process(shape, config)
    return 2 * shape.layers * layer_bytes(shape) * others / PCIE


def static_parts(shape: ModelShape, config: Config, path: str, rows_apart: bool = False) -> tuple[dict[str, int], int]:
    """Return (bytes by purpose that do not depend on a step's sequences, bytes of paged optimizer states)."""
    quantization, optimizer = config.quantization, OPTIMIZERS[config.training.optim]
    width = 4 if quantization.compute_dtype == "float32" else 2
    weights, trainable = sum(out * into for _, out, into in shape.linears), adapter_parameters(shape, config)
    experts, double = shape.experts, quantization.use_double_quant
    constants = weights / BLOCK * (4 if not double else 1)
    if double:  # fp32: a second-level constant each, and if fused an offset each
        constants += weights / BLOCK / NESTED_BLOCK * (8 if path != PLAIN else 4)
    if quantization.products == "fp8":
        constants += 4 * sum(out for _, out, _ in shape.linears)  # a scale per output row
    codes, further = experts.packed_bytes(experts.packed, double)
    here = {"experts, in 4 bit": codes}
    if quantization.experts == "cpu":
        here, further = {"experts of two layers, in 4 bit": experts.slots(double)}, 0
    constants += further
    states = trainable * (optimizer.state_bytes + optimizer.step_bytes)
    paged = max(0, states - small_states(shape, config)) if optimizer.paged else 0
    quantised = quantization.load_in_4bit
    kept = of_this_process(shape, config)
    plain = experts.plain if quantised else experts.all
    parts = {
        "packed weights": int(weights // 2 * kept) if quantised else weights * width,
        **({"packed weights, gathered": GATHERED * layer_bytes(shape)} if kept < 1 else {}),
        "quantisation constants": int(constants) if quantised else 0,
        "head" if rows_apart else "embedding and head": (shape.embedding - rows_apart * shape.rows) * width,
        "norms and biases": shape.other_parameters * width,
        **({name: int(size * kept) for name, size in here.items()} if experts.packed and quantised else {}),
        **({"experts, not in 4 bit": plain * width} if plain else {}),
        "adapters (fp32)": trainable * 4,
        "gradients (fp32)": trainable * 4,
        "optimizer states": states - paged,
    }
    return parts, paged


def add_allowances(
    parts: dict[str, int], moving: int, shape: ModelShape, config: Config, graphs: bool, pieces: int
) -> None:
    """Add what no tensor accounts for to the parts of a plan: workspaces, the allocator's slack and the CUDA context.

    moving: bytes of the parts that come and go in a step. graphs: whether the shape's steps can be captured.
    """
    captured = graphs and config.performance.cuda_graphs != "off" and not config.lora.train_tokens
    slack = PIECES_SLACK_BYTES if pieces > 1 else GRAPH_SLACK_BYTES
    parts["workspaces of cuBLAS"] = workspaces = WORKSPACE_BYTES * (1 if captured and pieces > 1 else 3)
    parts["allocator slack"] = (slack if captured else SLACK_BYTES) + int(SLACK_SHARE * (moving + workspaces))
    parts["CUDA context"] = CONTEXT_BYTES + (NCCL_BYTES if shape.processes > 1 else 0)


def plan_memory(
    shape: ModelShape,
    config: Config,
    micro_batch: int,
    checkpointed: int,
    path: str | None = None,
    limit: float | None = None,
    offload: bool = False,
    logit_chunk: int | None = None,
    rows_apart: bool = False,
    pieces: int = 1,
    kept: Kept | None = None,
    swapped: int = 0,
) -> MemoryPlan:
    """Return the GPU memory that training needs if the first `checkpointed` layers recompute their activations.

    offload: their inputs are kept in main memory; the GPU holds only the one in use and the next one.
    rows_apart: so are the rows of the input embedding, unless the head shares them.
    pieces: in which gate and up are unpacked (`pieces_each`); the chunk of logits is then as small as it can be.
    limit: bytes that the process may use, from which the chunk of logits is chosen; None: more than enough.
    logit_chunk: the chunk of a run that is continued, since its sums must be added in the same order.
    kept: checkpointed layers that keep outputs; by default of the MLP a half, of attention all, or as many as fit into the limit.
    swapped: how many of them are swapped instead, of which the GPU holds two at a time.
    """
    path, rows_apart = path or expected_path(config), rows_apart and shape.rows > 0
    parts, paged = static_parts(shape, config, path, rows_apart)
    rows = rows_apart * shape.rows * (4 if config.quantization.compute_dtype == "float32" else 2)
    fixed = sum(parts.values())
    tokens, free_layers = micro_batch * config.data.max_length, shape.layers - checkpointed
    swapped = len(swapped_layers(checkpointed, 0 if offload else swapped, shape.layers))
    recomputed = checkpointed - swapped
    most = most_kept(shape, config, recomputed) if path == COMPILED and not offload else NOTHING_KEPT
    keeping, each = most.at_most(most if kept is None else kept), kept_bytes(shape, config)
    saved = saved_bytes(shape, config, path) * tokens
    at_once, recomputing = (transient_bytes(shape, config, path, tokens, again, pieces) for again in (False, True))
    if path == PLAIN and free_layers:
        saved += 2 * adapter_parameters(shape, config) // shape.layers  # copies of the adapters in the compute dtype
    hidden = tokens * shape.hidden * 2
    room = int(limit - CONTEXT_BYTES - fixed) if limit else 2**36
    chunk = logit_chunk or default_logit_chunk(shape.vocabulary, room if pieces == 1 else 0)
    loss = loss_bytes(shape, config, path, tokens, chunk, pieces)
    if config.lora.train_tokens:
        loss += token_rows_bytes(shape, config)
    # The backward pass starts at the last layer. When it reaches the checkpointed layers, which are the first ones, the
    # activations of the other layers are gone already.
    norms = 2 * hidden if plain_layers(shape, path) else 0  # recomputing makes the outputs of the norms too
    most_live = max(recomputing + norms, at_once) + saved if swapped else recomputing + norms  # the next one comes
    live = most_live + saved - free_layers * saved if checkpointed else 0
    live = max(live, at_once if free_layers else 0)
    parts |= {
        "checkpointed hidden states": (2 if offload else recomputed) * hidden,
        **{f"kept outputs of {name}": n * each[name] * tokens for n, name in keeping.named() if n},
        "layers not checkpointed": free_layers * saved,
        "unpacked weights, chunk of logits": scratch_bytes(shape, config, path, tokens, chunk, pieces),
        "one live layer, forward and backward": live,
        "loss, beyond the live layer": max(0, loss - live),
    }
    add_allowances(parts, sum(parts.values()) - fixed, shape, config, path == COMPILED and not offload, pieces)
    parts["allocator slack"] += int(SWAP_GAPS * saved) if swapped else 0
    more = keeping, swapped, swapped * saved
    plan = MemoryPlan(parts, micro_batch, checkpointed, shape.layers, paged, offload, chunk, rows, pieces, *more)
    if kept is None and any(keeping) and limit and plan.total > limit:
        # One byte more, since the slack is rounded.
        over = math.ceil((plan.total - limit + 1) / (1 + SLACK_SHARE))
        fewer = keeping.without(over, {name: size * tokens for name, size in each.items()})
        rest = path, limit, offload, logit_chunk, rows_apart, pieces, fewer, swapped
        return plan_memory(shape, config, micro_batch, checkpointed, *rest)
    return plan


def sequences_per_step(training: TrainingConfig, processes: int) -> int:
    """Return the sequences of an optimizer step over all micro-batches and processes."""
    count = training.batch_size * training.gradient_accumulation_steps
    if count % processes:
        name = "training.batch_size x training.gradient_accumulation_steps"
        raise ConfigError(f"{name}: expected a multiple of {processes} processes, got {count}")
    return count


SHAPE_KNOBS = ("training.batch_size", "training.gradient_accumulation_steps", "training.gradient_checkpointing")


def configured_shape(config: Config, processes: int | None = None) -> ModelShape:
    """Return the sizes of the configured model; raise ConfigError if it lacks a target module or experts asked for.

    processes: by default those of the launcher.
    """
    model = model_skeleton(config.model.name, config.model.revision, config.model.trust_remote_code)
    check_experts(config, model, experts := expert_shape(model))
    resolved_targets(model, create_lora_config(**config.lora.arguments))
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    shape = dataclasses.replace(shape_of(model), processes=processes)
    if not experts.all:
        return shape
    if config.quantization.experts == "16bit":
        shape = dataclasses.replace(shape, experts=experts.in_16_bit())
    with torch.device("meta"):
        adapted_model = prepare_model_for_training(model, create_lora_config(**config.lora.arguments), False)
    return dataclasses.replace(shape, trainable=count_parameters(adapted_model)[0])


def check_mixture(config: Config) -> None:
    """Raise ConfigError before the weights of a mixture of experts are read, as `configured_shape` does for any model.

    For a run on a CPU, which has no plan. Where quantization.experts is not set, a model that is not on this machine yet
    is left to the loading, so that no other model asks the hub once more.
    """
    if config.quantization.experts != "gpu":
        configured_shape(config)
        return
    source = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    try:
        model = AutoConfig.from_pretrained(config.model.name, local_files_only=True, **source)
    except LOADING_ERRORS:  # loading says what is wrong
        return
    if experts_each(model):
        configured_shape(config)


def pinned_layers(layers: int, config: Config) -> int:
    """Return how many of `layers` layers training.gradient_checkpointing asks to checkpoint."""
    wanted = config.training.gradient_checkpointing
    return layers if wanted is True or wanted in ("auto", "offload") else min(int(wanted), layers)


def wants_offload(config: Config) -> bool:
    """Return whether training.gradient_checkpointing asks to keep the layers' inputs in main memory."""
    return config.training.gradient_checkpointing == "offload"


# ------------------------------------------------------------------------------------------------ the fit


def weights_read(shape: ModelShape, checkpointed: int) -> float:
    """Return how many weights the products of one micro-batch read: forward, backward and where layers are recomputed.

    A checkpointed layer repeats its forward pass up to its last product, whose output nothing needs. Of routed experts
    all are read, since a micro-batch has tokens for each.
    """
    experts = shape.experts.all * (2 + checkpointed / shape.layers)
    every = adapted(shape, LoraSettings(target_modules="all-linear"))
    weights, (_, out, into) = sum(out * into for _, out, into in shape.linears), every[-1]
    return 2 * weights + (weights - shape.layers * out * into) * checkpointed / shape.layers + experts


def step_flops(
    shape: ModelShape, config: Config, micro_batch: int, checkpointed: int, kept: Kept = NOTHING_KEPT
) -> float:
    """Return the FLOP of the products of one micro-batch. Those of adapters, about a hundredth of them, are left out.

    A product with N weights takes 2 N FLOP per token in the forward pass and 2 N in the backward pass, which needs no
    gradients of frozen weights (with them: 4 N; Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Causal attention
    takes 2 x length x width FLOP per token and layer forward, and 2.5 times that backward (FlashAttention-2,
    arXiv:2307.08691, section 4.1).
    """
    passes = 3.5 + (checkpointed - kept.attention) / shape.layers
    attention = 2 * config.data.max_length * shape.query * shape.layers * passes
    head = 2 * shape.vocabulary * shape.hidden
    idle = (shape.experts.all - shape.experts.active) * (2 + checkpointed / shape.layers)
    weights = weights_read(shape, checkpointed) - idle + head
    return micro_batch * config.data.max_length * (2 * weights + attention)


def step_seconds(
    shape: ModelShape, config: Config, rates: Rates, micro_batch: int, checkpointed: int, rows_apart: bool = False,
    kept: Kept = NOTHING_KEPT, swapped: int = 0,
) -> float:  # fmt: skip
    """Return an estimated time for one micro-batch: matrix products, dequantisation and passes over activations.

    rates.link: at which experts in main memory come, while the layer before computes. swapped: how many of the checkpointed
    layers are not recomputed; their copies out must end within the forward pass, and those back within the backward pass.
    """
    checkpointed -= swapped
    tokens, passes = micro_batch * config.data.max_length, 2 + checkpointed / shape.layers
    of_experts = 2 * tokens * shape.experts.active * passes
    flops = step_flops(shape, config, micro_batch, checkpointed, kept) - of_experts
    products = flops / rates.of_products(tokens) + of_experts / rates.of_products(shape.experts.rows_each(tokens))
    unpacked = weights_read(shape, checkpointed) - shape.experts.plain * passes
    read = unpacked if config.quantization.load_in_4bit else 0
    activations = tokens * shape.layers * passes * 12 * (shape.hidden + shape.inner)
    fetched = 2 * shape.experts.packed / 2 / rates.link if config.quantization.experts == "cpu" else 0  # up and down
    rows = tokens * shape.hidden * 2 / PCIE if rows_apart else 0
    computing = products + (2.5 * read + activations) / rates.bytes
    copying = swapped * saved_bytes(shape, config, COMPILED) * tokens / rates.link if swapped else 0
    forward = computing / passes
    computing = max(forward, copying) + max(computing - forward, copying)
    return max(computing, fetched, gather_seconds(shape, config)) + rows


def swapping_obstacle(shape: ModelShape, config: Config) -> str | None:
    """Return why a run on a GPU cannot swap layers of this model; None if it can.

    Of layers that families.py does not have it is not known which tensors they save.
    """
    path = expected_path(config)
    if path != COMPILED:
        return "it needs compiled layers (performance.compile and what that needs)"
    if plain_layers(shape, path):
        return "fast_path/families.py has no layers of this model"
    if shape.experts.all:
        return "it is not for mixtures of experts"
    if wants_offload(config):
        return "training.gradient_checkpointing: offload already keeps the layers' inputs in main memory"
    return "it is for one process" if shape.processes > 1 else None


def most_swapped(shape: ModelShape, config: Config, rates: Rates, micro_batch: int, checkpointed: int) -> int:
    """Return how many of the checkpointed layers to swap: N as configured, or what bus and main memory carry.

    The copies of a forward pass must end within it. It takes at least as long as recomputing does, which leaves out a
    layer's last product.
    """
    wanted, obstacle = config.performance.swap_activations, swapping_obstacle(shape, config)
    if isinstance(wanted, int):
        if wanted and obstacle:
            raise ConfigError(f"performance.swap_activations: expected auto or 0, got {wanted}: {obstacle}")
        return min(wanted, checkpointed)
    if not (rates.main_memory and checkpointed) or obstacle:
        return 0
    tokens = micro_batch * config.data.max_length
    if 4 * shape.inner * tokens < SMALL:  # gate and up, the largest of what a layer saves
        return 0
    each = saved_bytes(shape, config, COMPILED) * tokens
    free, all_of_them = (step_seconds(shape, config, rates, micro_batch, n) for n in (0, checkpointed))
    return min(checkpointed, int(min((all_of_them - free) * rates.link, rates.main_memory) / each))


def shapes(shape: ModelShape, config: Config, sequences: int) -> Iterator[tuple[int, int]]:
    """Yield each (micro-batch, checkpointed layers) that keeps the number of sequences per optimizer step.

    sequences: per step of one process. A value given as a flag is not changed.
    """
    batches = [n for n in range(1, sequences + 1) if sequences % n == 0]
    layers: Iterable[int] = range(shape.layers + 1)
    if config.flags & set(SHAPE_KNOBS[:2]):
        batches = [min(config.training.batch_size, sequences)]
    if "training.gradient_checkpointing" in config.flags and config.training.gradient_checkpointing != "auto":
        layers = [pinned_layers(shape.layers, config)]
    yield from itertools.product(batches, layers)


def shapes_and_swaps(shape: ModelShape, config: Config, sequences: int, rates: Rates) -> Iterator[tuple[int, int, int]]:
    """Yield each of `shapes` without swapped layers, and with `most_swapped`, or with those configured alone."""
    for micro_batch, checkpointed in shapes(shape, config, sequences):
        most = most_swapped(shape, config, rates, micro_batch, checkpointed)
        configured = config.performance.swap_activations != "auto"
        for swapped in [most] if configured else sorted({0, most}):
            yield micro_batch, checkpointed, swapped


def fit(shape: ModelShape, config: Config, sequences: int, limit: float, rates: Rates) -> MemoryPlan:
    """Return the plan of the fastest shape that needs at most `limit` bytes with the CUDA context, or of the smallest.

    An embedding that is not tied goes to main memory only if nothing else fits, where a GB is pinned for it. If that is not
    enough, weights are unpacked in pieces, whose products are smaller. Offloading is used only if that is not enough
    either: the copies need time, and no CUDA graph can be captured. Layers are swapped only where that is clearly faster.
    """
    best, smallest = None, None
    pinned = "training.gradient_checkpointing" in config.flags and wants_offload(config)
    ways = pieces_of(shape, config, expected_path(config))
    for pieces, apart in itertools.product(ways, sorted({False, shape.rows > 0})):
        for micro_batch, checkpointed, swapped in shapes_and_swaps(shape, config, sequences, rates):
            how = None, limit, pinned, None, apart, pieces, None, swapped
            plan = plan_memory(shape, config, micro_batch, checkpointed, *how)
            if smallest is None or plan.total < smallest.total:
                smallest = plan
            rest = apart, plan.kept, plan.swapped
            seconds = step_seconds(shape, config, rates, micro_batch, checkpointed, *rest) / micro_batch
            seconds /= 1 - WORTH_SWAPPING * (plan.swapped > 0)
            if plan.total <= limit and (best is None or seconds < best[0]):
                best = (seconds, plan)
        if best:
            return best[1]
    every = smallest.micro_batch, shape.layers
    if expected_path(config) == COMPILED and every in shapes(shape, config, sequences):
        offloaded = plan_memory(shape, config, *every, None, limit, True, None, True, ways[-1])
        return min(smallest, offloaded, key=lambda plan: plan.total)
    return smallest


def unplanned(config: Config, sequences: int, layers: int) -> MemoryPlan:
    """Return the configured shape of a run on a CPU, without an estimate: parts is empty."""
    if config.performance.swap_activations not in ("auto", 0):
        wanted = config.performance.swap_activations
        raise ConfigError(f"performance.swap_activations: expected auto or 0, got {wanted}: there is no CUDA GPU")
    micro_batch, checkpointed = min(config.training.batch_size, sequences), pinned_layers(layers, config)
    return MemoryPlan({}, micro_batch, checkpointed, layers, offload=wants_offload(config))


def without_compiled_layers(plan: MemoryPlan, fast: FastPath) -> list[str]:
    """Return a line if layers of the plan are not swapped since they are not compiled; raise ConfigError for offload."""
    if fast.compile:
        return []
    if plan.offload:
        raise ConfigError(f"training.gradient_checkpointing: offload needs compiled layers; {fast.line}")
    return [f"the {plan.swapped} swapped layers are recomputed: they are not compiled"] if plan.swapped else []


def step_down(plan: MemoryPlan, sequences: int, compiled: bool, in_main_memory: bool = False) -> MemoryPlan | None:
    """Return the next smaller shape after a run ran out of memory; None if there is no smaller one.

    in_main_memory: it was main memory that swapped layers did not get; then none is swapped any more.

    First no checkpointed layer keeps an output any more, then a quarter more of the layers are checkpointed. If all are, the
    micro-batch becomes the next smaller one that divides the sequences. With one sequence the layers' inputs go to main
    memory, which needs compiled layers. It carries no estimate (parts is empty), since the estimate of the larger shape
    has just proved wrong.
    """
    if in_main_memory and plan.swapped:
        return dataclasses.replace(plan, parts={}, swapped=0, waiting=0)
    if any(plan.kept):
        return dataclasses.replace(plan, parts={}, kept=NOTHING_KEPT)
    more = min(plan.layers, plan.checkpointed + max(1, plan.layers // 4))
    if more > plan.checkpointed:
        return dataclasses.replace(plan, parts={}, checkpointed=more)
    smaller = [n for n in range(1, plan.micro_batch) if sequences % n == 0]
    if smaller:
        return dataclasses.replace(plan, parts={}, micro_batch=max(smaller))
    if not compiled or plan.offload:
        return None
    return dataclasses.replace(plan, parts={}, offload=True, swapped=0, waiting=0)


def longest_length(shape: ModelShape, config: Config, limit: float) -> int:
    """Return the longest data.max_length that fits: a multiple of 128, or all positions that the model supports.

    It is computed for one sequence per micro-batch with all layers checkpointed, an embedding that is not tied in main
    memory and, if layers are compiled, the inputs of layers too; weights in pieces where that needs less.
    """
    path, low, high = expected_path(config), 0, 2**14  # in units of 128 tokens
    ways = [*itertools.product({False, path == COMPILED}, pieces_of(shape, config, path))]
    while high - low > 1:
        middle = (low + high) // 2
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=middle * 128))
        plans = (plan_memory(shape, other, 1, shape.layers, None, limit, off, None, True, n) for off, n in ways)
        low, high = (middle, high) if min(plan.total for plan in plans) <= limit else (low, middle)
    return min(low * 128, shape.positions or low * 128)
