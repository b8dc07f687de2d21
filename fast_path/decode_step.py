"""The decode step: from one token per sequence to their logits, in Triton kernels that a CUDA graph can hold.

A step reads every weight once, so memory traffic is its limit. Therefore 4-bit weights are dequantised in registers on
their way into the product, and norms, adapters, biases, SwiGLU and residuals are computed inside the kernels of the
products. Exceptions are the adapters of q, k and v, and the first and the last norm, which have kernels of their own.

For one sequence the products are matrix times vector, with seven kernels per layer. For a batch they are matrix
products on tensor cores; all norms and the adapter of down_proj then have kernels of their own, nine kernels per layer.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from fast_path import decode_batch_kernels, decode_products, families
from fast_path import decode_kernels as kernels
from fast_path.head import head_product, padded
from fast_path.layers import ACTIVATIONS, norm_of
from fast_path.loss import AS_THEY_ARE, logit_form
from fast_path.nf4 import HAS_TRITON, INTERPRETED, SHUFFLE, runs_on, tl, triton
from fast_path.packed_weights import is_plain_lora


class Unsupported(ValueError):
    """The kernels cannot run a model's decode step. The message says why, in one line."""


class Tile(NamedTuple):
    """The part of a matrix that one program of a batch's product processes at a time."""

    rows: int  # outputs; with SwiGLU this many of gate and this many of up
    words: int  # words per row, of eight weights each
    warps: int


@dataclasses.dataclass
class Layout:
    """How the work of the kernels is divided among the programs and warps of a GPU."""

    warps: int = 8  # per program of a product: 256 threads, of which each fills a row of the program's table
    # Programs of a product per multiprocessor, among which the outputs are divided. 128 registers per thread allow two.
    resident: int = 2
    ending: float = 0.75  # how long adding up, adapter and output of a row take, in slices (docs/measurements.md)
    positions: int = 32  # positions in a tile of the cache
    # On sm_90 and later a kernel may start, and load its weights, before the previous kernel has ended.
    overlap: bool = True
    programs: int = 128  # programs of attention for one sequence, about one per multiprocessor of an H100 (132)
    tile: Tile = Tile(64, 32, 4)
    swiglu_tile: Tile = Tile(16, 32, 2)  # for two matrices; the fastest of nine at 32 sequences (docs/measurements.md)
    batch_programs: int = 512  # about this many programs for a batch's product (its inputs are split) or attention


LAYOUT = Layout()
RUN = 64  # weights of a row that a thread processes at a time; they share one quantisation constant
SLICE = 4 * RUN  # weights of a row that a warp processes at a time
CHUNK = 2048  # inputs per program of u = A x in down_proj
ADAPTERS = 48  # warps per launch that compute u = A x; more only where each program would have over TAKE rows of A
TAKE = 8
BATCH_CHUNK = 256  # CHUNK for a batch, where a program takes all rows of A and all sequences
BATCH = 64  # most sequences: with more, each weight should be dequantised once for several tiles of sequences

# ------------------------------------------------------------------------------------------------ what a model has


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(f"no decode kernels: {reason}")


class Member:
    """A 4-bit linear and its adapter as the kernels read them, from the modules' own memory.

    A, B: None if there is no active adapter. factor: of its output; scales of the weights, of B and the bias take it in, so
    that no kernel knows it. halves, half: the member has the outputs of this part of the linear, of so many equal ones.
    Raises Unsupported.
    """

    def __init__(self, module: nn.Module, name: str, factor: float = 1.0, halves: int = 1, half: int = 0):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        _check(type(base) is bnb.nn.Linear4bit and state is not None, f"{name} is not a 4-bit linear of bitsandbytes")
        nested, self.columns, self.rows = state.nested, base.in_features, base.out_features
        _check(self.columns % RUN == 0, f"{name} has {self.columns} inputs, no multiple of {RUN}")
        _check(state.blocksize % RUN == 0, f"{name} has quantisation blocks of {state.blocksize} weights")
        self.codes = base.weight.data.view(torch.uint8).flatten().view(torch.int32)
        self.absmax, self.lut, self.bias = state.absmax, state.code, base.bias
        self.second = state.state2.absmax if nested else self.absmax
        self.offset = state.offset if nested else self.absmax
        self.code2 = state.state2.code if nested else self.absmax
        self.kind = nested, state.blocksize, state.state2.blocksize if nested else 1, state.quant_type
        self.A: torch.Tensor | None = None
        self.B: torch.Tensor | None = None
        self.rank, self.scale = 0, 0.0
        if module is not base:
            self._adapter(module, name)
        if halves > 1:
            self._take_part(name, halves, half)
        if factor != 1:
            self.absmax = self.absmax if nested else self.absmax * factor
            self.second, self.offset = (x * factor for x in (self.second, self.offset)) if nested else [self.absmax] * 2
            self.bias, self.scale = None if self.bias is None else self.bias * factor, self.scale * factor

    def _take_part(self, name: str, parts: int, part: int) -> None:
        """Keep one of some equal parts of the outputs: views of the same memory."""
        nested, size, size2, _ = self.kind
        whole = parts * size * size2 if nested else parts * size
        _check(self.rows * self.columns % whole == 0, f"{name} does not divide into {parts} parts of whole blocks")
        self.rows //= parts
        names = ["codes", "absmax", *(["second"] if nested else []), *([] if self.bias is None else ["bias"])]
        for own in names + (["B"] if self.rank else []):
            setattr(self, own, getattr(self, own).chunk(parts)[part])
        if not nested:
            self.second = self.offset = self.code2 = self.absmax

    def _adapter(self, module: nn.Module, name: str) -> None:
        _check(is_plain_lora(module), f"the adapter of {name} is no plain LoRA")
        _check(not module.merged, f"the adapter of {name} is merged")
        active = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.lora_A]
        _check(len(active) < 2, f"{name} has {len(active)} active adapters: {', '.join(active)}")
        for adapter in active:
            self.A, self.B = (part[adapter].weight.detach().contiguous() for part in (module.lora_A, module.lora_B))
            self.rank, self.scale = len(self.A), float(module.scaling[adapter])


class Norm:
    """An RMS norm as the kernels read it. Raises Unsupported.

    Its weight is `scale` times `factor`. Kernels store hidden times `factor`; with a smaller factor this does not
    overflow in float16.
    """

    def __init__(self, module: nn.Module):
        family = families.of(module)
        _check(type(module).__name__ == family.norm != "", f"{type(module).__name__} is unknown")
        weight, self.eps = norm_of(module)
        self.weight, self.scale = weight.detach(), 1.0
        if self.weight.dtype is torch.float16:
            self.scale = 2.0 ** max(0, math.ceil(math.log2(max(self.weight.abs().max().item(), 1.0))))
        self.factor = self.weight / self.scale if self.scale > 1 else self.weight


def _options() -> dict[str, bool]:
    """Return the options of every launch.

    From Triton 3.10 on a multiplication and an addition are fused only if `enable_fp_fusion` asks for it.
    """
    overlap = LAYOUT.overlap and not INTERPRETED and torch.cuda.is_available()
    overlap = overlap and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAP": overlap, "enable_fp_fusion": True, **({"launch_pdl": True} if overlap else {})}


def level_pairs(lut: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the two levels of each byte of codes, in a 16-bit dtype, as one number: int32 [256]."""
    byte = torch.arange(256, device=lut.device)
    return torch.stack([lut[byte >> 4], lut[byte & 15]], 1).to(dtype).view(torch.int32).flatten()


class Linears:
    """Up to three linears that read the same x, as the kernels of one launch read them. Subclasses launch the kernels.

    The previous launch writes the attribute x, in the order of `input_place`, and this launch reads it. mode: see
    `linear_kernel`. norm: the norm of x, if x is only hidden times this norm's factor. parts: the number of sums that
    u = A x is split into. alone: whether the previous launch writes u as well; otherwise this object computes it. m:
    the M of the kernels. factor: of the outputs. activation: of gate.
    """

    splits = 1  # the number of parts in which the launch writes its sums

    def __init__(
        self, modules: dict[str, nn.Module], mode: str, dtype: torch.dtype, norm: Norm | None = None, parts: int = 1,
        alone: bool = False, m: int = 1, factor: float = 1.0, activation: str = "silu",
    ):  # fmt: skip
        self.activation = activation
        self.members = [Member(module, name, factor) for name, module in modules.items()]
        if mode == "swiglu" and len(modules) == 1:  # gate and up are one linear
            ((name, module),) = modules.items()
            self.members = [Member(module, name, halves=2, half=half) for half in (0, 1)]
        first, adapted = self.members[0], [member for member in self.members if member.rank]
        for what in ("kind", "columns"):
            same = len({getattr(member, what) for member in self.members}) == 1
            _check(same, f"{', '.join(modules)} differ in their {'quantisation' if what == 'kind' else 'inputs'}")
        biases = {None if member.bias is None else member.bias.dtype for member in self.members}
        types = {factor.dtype for member in adapted for factor in (member.A, member.B)}
        _check(len(biases) == 1 and len(types) < 2, f"{', '.join(modules)} differ in their biases or adapters' dtypes")
        self.mode, self.norm, self.parts, self.alone, self.m = mode, norm, parts, alone, m
        self.ranks = [member.rank for member in self.members]
        smallest = 16 if m > 1 else 1  # the smallest size that tl.dot accepts
        self.rank = max(smallest, triton.next_power_of_2(max(self.ranks))) if adapted else 0
        self.columns, self.rows = first.columns, [member.rows for member in self.members]
        room = self.columns * m if m > 1 else triton.cdiv(self.columns, SLICE) * SLICE  # behind the inputs are zeros
        self.x = torch.zeros(room, dtype=dtype, device=first.codes.device)
        self.u = torch.zeros(parts, m, len(self.members), max(self.rank, 1), dtype=torch.float32, device=self.x.device)
        self.inverse, self.count = self.u.new_zeros(1), self.u.new_zeros(1, dtype=torch.int32)
        nothing = adapted[0].A if adapted else self.x
        self.A = [member.A if member.rank else nothing for member in self.members]
        arguments = [
            (
                member.codes, member.absmax, member.second, member.offset,
                self.x if member.bias is None else member.bias, member.B if member.rank else nothing,
                member.rows, member.rank, member.scale,
            )
            for member in self.members
        ]  # fmt: skip
        arguments += [(*arguments[0][:6], 0, 0, 0.0)] * (3 - len(arguments))
        self.arguments = [first.lut, first.code2, *sum(arguments, ())]
        gpu = self.x.is_cuda and torch.cuda.get_device_properties(self.x.device)
        self.multiprocessors = gpu.multi_processor_count if gpu else 1
        nested, blocksize, blocksize2, _ = first.kind
        self.constants = dict(
            MEMBERS=len(self.members), K=self.columns, RANK=self.rank, PARTS=parts, BIAS=None not in biases, NESTED=nested,
            BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, SHUFFLE=SHUFFLE,
            HALF=tl.bfloat16 if dtype is torch.bfloat16 else tl.float16, **_options(),
        )  # fmt: skip


class SingleLinears(Linears):
    """Linears for one sequence: products of a matrix and a vector."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.pairs = level_pairs(self.members[0].lut, self.x.dtype)
        self.turing = self.x.is_cuda and torch.cuda.get_device_capability(self.x.device) < (8, 0)

    def adapters(self, warps: int, most: float) -> dict[str, int]:
        """Return the layout of the programs that compute u = A x, and 1 / root mean square if x still needs the norm.

        They use `most` warps at most, unless each program would then have more than TAKE rows of A.
        """
        chunk = triton.cdiv(self.columns, self.parts)
        rows, take = max(self.rank, 1) * len(self.members) * self.parts, 1
        while rows * warps > take * most and take < min(TAKE, self.rank):
            take *= 2
        block = min(triton.next_power_of_2(chunk), 2048 * warps // take)  # 64 numbers per thread
        return dict(ADAPTERS=rows // take, TAKE=take, BLOCK=block, CHUNK=triton.cdiv(chunk, block) * block)

    def sharing(self) -> tuple[int, int]:
        """Return how many warps share a row, and how often a program takes new rows: what ends first by the count of slices.

        The more share one, the more rows a program has to add up and to finish; the fewer, the more slices each has to take.
        """
        slices, warps = triton.cdiv(self.columns, SLICE), LAYOUT.warps
        rows = self.rows if self.mode == "stack" else self.rows[:1]

        def taken(wide: int) -> tuple[float, int, int]:
            each = self.outputs_of(wide)
            loop = triton.cdiv(sum(triton.cdiv(n, each) for n in rows), self.multiprocessors * LAYOUT.resident)
            return loop * (triton.cdiv(slices, wide) + LAYOUT.ending), -wide, loop

        most = min(warps, triton.next_power_of_2(slices))
        _, wide, loop = min(taken(2**n) for n in range(most.bit_length()))
        return -wide, loop

    def outputs_of(self, wide: int) -> int:
        """Return the outputs of a program at a time, if `wide` of its warps share a row."""
        return (8 if self.mode == "swiglu" else 16) * LAYOUT.warps // wide

    def layout(self) -> tuple[int, bool, dict[str, Any]]:
        """Return the number of programs, whether u = A x gets a launch of its own, and the layout as kernel options.

        If the programs of a product are short, all of them would need u before it is ready. Then u is computed in a
        launch of its own, ahead of the product.
        """
        (wide, loop), warps = self.sharing(), LAYOUT.warps
        some, short = not self.alone and bool(self.norm or self.rank), loop == 1 and self.columns <= wide * SLICE
        adapters = self.adapters(warps, ADAPTERS)
        apart = adapters["ADAPTERS"] if some and not short else 0
        registers = {} if INTERPRETED else {"maxnreg": 65536 // (32 * warps * LAYOUT.resident) // 8 * 8}
        options = dict(LOOP=loop, WARPS=warps, WIDE=wide, num_warps=warps, num_stages=1, **registers)
        rows = self.rows if self.mode == "stack" else self.rows[:1]
        programs = apart + sum(triton.cdiv(n, self.outputs_of(wide) * loop) for n in rows)
        return programs, some and short, adapters | options | {"ADAPTERS": apart}

    def __call__(
        self, hidden: torch.Tensor, out: torch.Tensor, before: "SingleLinears", follow: "SingleLinears | None" = None
    ) -> None:
        """Launch the kernels.

        before: the product of an earlier launch, whose count is set back to 0 here. follow: the product that reads
        hidden next, or None after the last layer.
        """
        norm, A = self.norm, self.A * 3
        programs, ahead, options = self.layout()
        reads: tuple[Any, ...] = self.x, hidden, *((norm.weight, norm.eps, norm.scale) if norm else (self.x, 0.0, 1.0))
        reads += self.u, self.inverse, self.count, before.count
        if ahead:
            adapters, ranks = self.adapters(4, math.inf), (self.ranks + [0, 0])[:3]
            decode_products.adapter_kernel[(adapters.pop("ADAPTERS"),)](
                *reads, *A[:3], *ranks, **adapters, NORM=norm is not None, num_warps=4, **_options(),
                **{name: self.constants[name] for name in ("K", "MEMBERS", "RANK")},
            )  # fmt: skip
        decode_products.linear_kernel[(programs,)](
            *reads, out, follow.norm.factor if follow else self.x, self.pairs, *self.arguments[:2], *A[:3], *self.arguments[2:],
            **self.constants, **options, MODE=self.mode, NORM=norm is not None, NEXT=follow is not None, TURING=self.turing,
            OUTPUTS=self.rows[0], ACTIVATION=self.activation,
        )  # fmt: skip


class BatchLinears(Linears):
    """Linears for a batch: matrix products on tensor cores.

    Unless the mode is "swiglu", it writes `splits` parts of its sums, [splits, m, outputs]; the next kernel adds them
    up.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        swiglu = self.mode == "swiglu"
        self.tile, self.outputs = (LAYOUT.swiglu_tile, self.rows[0]) if swiglu else (LAYOUT.tile, sum(self.rows))
        self.tiles = sum(triton.cdiv(n, self.tile.rows) for n in (self.rows[:1] if swiglu else self.rows))
        steps = triton.cdiv(self.columns, 8 * self.tile.words)
        splits = 1 if swiglu else min(steps, max(1, LAYOUT.batch_programs // self.tiles))
        self.splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # so that no part is empty

    def __call__(self, out: torch.Tensor) -> None:
        rows, words, warps = self.tile
        decode_batch_kernels.batch_linear_kernel[(self.tiles, self.splits)](
            self.x, self.u, out, *self.arguments, **self.constants, SWIGLU=self.mode == "swiglu", OUTPUTS=self.outputs,
            M=self.m, SPLITS=self.splits, ROWS=rows, STEP=words, ACTIVATION=self.activation, num_warps=warps,
            num_stages=1,  # with more stages Triton would load x before the kernel waits for it
        )  # fmt: skip


def _norm(x: torch.Tensor, norm: Norm, out: torch.Tensor, first: bool = False) -> None:
    """Write norm(x) to out; with `first`, write x times the norm's factor instead, as the first product reads it."""
    kernels.norm_kernel[(1,)](
        x, norm.factor if first else norm.weight, out, norm.eps, K=x.numel(), FIRST=first,
        BLOCK=triton.next_power_of_2(x.numel()), num_warps=4 if x.numel() <= 4096 else 8, **_options(),
    )  # fmt: skip


def _batch_norm(
    x: torch.Tensor, parts: torch.Tensor, total: torch.Tensor, norm: Norm | None, out: torch.Tensor,
    linears: Linears | None = None, after: Norm | None = None, ordered: bool = False,
) -> None:  # fmt: skip
    """Write total = x + parts, or x + after(parts), and the norm of total to out, or total itself if there is no norm.

    With `linears`, out is in the order in which they read it, and u of their adapters is computed too; with `ordered`, it
    is in that order without u. x, total: [sequences, width]; parts: [parts, m, width].
    """
    sequences, width = x.shape
    adapters: tuple[Any, ...] = (x, *[x] * 3, 0, 0, 0)
    rank, members = 0, 1
    if linears is not None and linears.rank:
        A, ranks, rank, members = linears.A * 3, linears.ranks + [0, 0], linears.rank, len(linears.A)
        adapters = linears.u, *A[:3], *ranks[:3]
    block = triton.next_power_of_2(width)
    tile = min(max(rank, 1), max(1, 16384 // block))  # rows of A at a time: 64 numbers per thread
    decode_batch_kernels.batch_norm_kernel[(sequences, members)](
        x, parts, after.weight if after else x, norm.weight if norm else x, total, out, *adapters,
        after.eps if after else 0.0, norm.eps if norm else 0.0, AFTER=after is not None, NORM=norm is not None, K=width, M=parts.shape[1],
        PARTS=len(parts), MEMBERS=members, RANK=rank, ORDERED=ordered or linears is not None, BLOCK=block, TILE=tile,
        num_warps=8, **_options(),
    )  # fmt: skip


def _check_layer(layer: nn.Module, cache: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    _check(families.fused("attention", attention), f"{type(attention).__name__} is unknown")
    _check(families.fused("mlp", mlp), f"{type(mlp).__name__} is unknown")
    _check(hasattr(attention, "q_norm") == bool(families.of(attention).qk_norms), "other norms of q and k")
    activation = getattr(mlp, families.of(mlp).act)
    known = ACTIVATIONS[families.of(mlp).activation]
    _check(isinstance(activation, known), f"an MLP with {type(activation).__name__}")
    _check(type(cache) is StaticLayer, "no plain static cache")
    _check(cache.is_initialized, "the cache has no tensors yet; see its early_initialization")
    _check(cache.keys.shape[0] <= BATCH, f"a cache of {cache.keys.shape[0]} sequences, more than {BATCH}")
    _check(cache.keys.shape[3] == attention.head_dim, "the cache has other heads than the model")
    _check(attention.head_dim % 16 == 0 and 32 <= attention.head_dim <= 256, f"heads of {attention.head_dim}")


class Rotary(NamedTuple):
    """The rotary embedding of all positions, as the attention kernel reads it."""

    cos: torch.Tensor  # [positions, head size]
    sin: torch.Tensor
    turn: int  # half of the features of a head that are rotated


def _rotary(cos: torch.Tensor, sin: torch.Tensor, size: int) -> Rotary:
    """Take a model's tables, [positions, rotated features]; the features of a head behind these are not rotated."""
    turn, rest = cos.shape[1] // 2, size - cos.shape[1]
    if rest:
        sin = torch.cat([-sin[:, :turn], sin[:, turn:]], 1)
    pad = functools.partial(nn.functional.pad, pad=(0, rest))
    return Rotary(pad(cos, value=1.0).contiguous(), pad(sin, value=0.0).contiguous(), turn)


class Scratch(NamedTuple):
    """Buffers between the kernels of one layer. All layers share them, since they run one after another."""

    qkv: torch.Tensor  # fp32 [splits, m, outputs of q, k and v]
    mixed: torch.Tensor  # fp32 [sequences, heads, splits, head size]
    logs: torch.Tensor  # fp32 [sequences, heads, splits]
    roots: torch.Tensor  # fp32 [sequences, 2], for norms of q and k as wide as all heads
    parts: torch.Tensor  # fp32 [splits, m, width]; used for a batch only


Kind = TypeVar("Kind", bound=Linears)


class Layer(Generic[Kind]):
    """A decoder layer: its weights, its part of the cache, and its attention. Subclasses launch a whole layer."""

    kind: type[Kind]  # the class of its linears
    chunk: int  # inputs per program of u = A x in down_proj
    norms_apart: bool  # whether its norms are launches of their own, which also add to the residual

    def __init__(self, layer: nn.Module, cache: Any, dtype: torch.dtype):
        _check_layer(layer, cache)
        attention, mlp, family = layer.self_attn, layer.mlp, families.of(layer.self_attn)
        sequences, kv_heads, length, size = cache.keys.shape
        self.m = m = 1 if self.kind is SingleLinears else max(16, triton.next_power_of_2(sequences))

        def linears(
            owner: nn.Module, names: Iterable[str], mode: str, norm: Norm | None = None, parts: int = 1,
            alone: bool = False,
        ) -> Kind:  # fmt: skip
            modules, scale = {name: getattr(owner, name) for name in names}, factor if mode == "residual" else 1.0
            if self.norms_apart:
                norm, mode = None, "stack" if mode == "residual" else mode
            return self.kind(modules, mode, dtype, norm, parts, alone, m, scale, family.activation)

        factor = float(getattr(layer, family.residual_factor)) if family.residual_factor else 1.0
        self.turns = bool(getattr(attention, family.rotates)) if family.rotates else True

        self.norms, self.after = (
            tuple(Norm(getattr(layer, name)) if name else None for name in names)
            for names in (family.norms_before, family.norms_after)
        )
        # Qwen's attention has an attribute for its sliding window, Mistral's reads its config.
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.window = window or length
        cap = (family.score_cap and attention.attn_logit_softcapping) or 0.0
        self.keys, self.values = cache.keys, cache.values
        self.qkv = linears(attention, family.qkv, "stack", self.norms[0])
        heads = sum(self.qkv.rows) // size - 2 * kv_heads
        self.out = linears(attention, (family.out,), "residual", parts=heads, alone=True)
        self.gate_up = linears(mlp, family.gate_up, "swiglu", self.norms[1])
        self.down = linears(mlp, (family.down,), "residual", parts=triton.cdiv(self.gate_up.rows[0], self.chunk))
        programs = LAYOUT.programs if m == 1 else LAYOUT.batch_programs // sequences
        splits = min(
            triton.next_power_of_2(max(4, programs // kv_heads)),
            triton.next_power_of_2(triton.cdiv(length, LAYOUT.positions)),
        )
        self.head_norms, eps = (cache.keys, cache.keys), 0.0  # without norms of q and k nothing reads them
        if family.qk_norms:
            (q_norm, eps), (k_norm, _) = (norm_of(getattr(attention, name)) for name in ("q_norm", "k_norm"))
            self.head_norms = q_norm, k_norm
        self.numbers = eps, attention.scaling, length, cap, self.window
        self.shape = dict(
            HEADS=heads, KV_HEADS=kv_heads, HALF=size // 2, GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
            SPLITS=splits, POSITIONS=LAYOUT.positions, NORM=family.qk_norms, M=m, PARTS=self.qkv.splits, CAPPED=cap > 0,
        )  # fmt: skip

    def scratch(self) -> Scratch:
        new = functools.partial(torch.zeros, device=self.keys.device, dtype=torch.float32)
        sequences, shares = len(self.keys), (self.shape["HEADS"], self.shape["SPLITS"])
        return Scratch(
            qkv=new(self.shape["PARTS"], self.m, sum(self.qkv.rows)),
            mixed=new(sequences, *shares, self.keys.shape[3]),
            logs=new(sequences, *shares),
            roots=new(sequences, 2),
            parts=new(max(self.out.splits, self.down.splits), self.m, self.out.rows[0]),
        )

    def attend(self, position: torch.Tensor, starts: torch.Tensor, rotary: Rotary, scratch: Scratch) -> None:
        """Compute x of o_proj from the sums of q, k and v, and write k and v into the cache.

        position, starts: as in DecodeStep; rotary: see `Rotary`.
        """
        out, shape, sequences = self.out, self.shape, len(self.keys)
        if shape["NORM"] == "all":
            q, kv = (shape[name] * self.keys.shape[3] for name in ("HEADS", "KV_HEADS"))
            decode_batch_kernels.roots_kernel[(sequences, 2)](
                scratch.qkv, scratch.roots, self.numbers[0], Q=q, KV=kv, M=self.m, PARTS=shape["PARTS"],
                BLOCK=triton.next_power_of_2(max(q, kv)), num_warps=8, **_options(),
            )  # fmt: skip
        kernels.attention_kernel[(shape["KV_HEADS"], shape["SPLITS"], sequences)](
            scratch.qkv, self.keys, self.values, position, starts, rotary.cos, rotary.sin, *self.head_norms,
            scratch.roots, scratch.mixed, scratch.logs, *self.numbers, TURN=rotary.turn,
            PAD=triton.next_power_of_2(shape["HALF"]), **shape, num_warps=4, **_options(),
        )  # fmt: skip
        kernels.combine_kernel[(shape["HEADS"], sequences)](
            scratch.mixed, scratch.logs, position, starts, out.x, out.A[0], out.u, out.ranks[0], self.window, K=out.columns, M=self.m,
            SIZE=self.keys.shape[3], SPLITS=shape["SPLITS"], POSITIONS=shape["POSITIONS"], RANK=out.rank,
            TILE=min(max(out.rank, 1), 16), PAD=triton.next_power_of_2(self.keys.shape[3]), num_warps=4, **_options(),
        )  # fmt: skip


class SingleLayer(Layer[SingleLinears]):
    """A decoder layer for one sequence, in seven launches."""

    kind, chunk, norms_apart = SingleLinears, CHUNK, False

    def __call__(
        self, hidden: torch.Tensor, position: torch.Tensor, rotary: Rotary, scratch: Scratch,
        before: SingleLinears, follow: SingleLinears | None,
    ) -> None:  # fmt: skip
        """Add the layer's output to hidden, [width], in place.

        rotary: see `Rotary`. before, follow: the last product of the layer before and the first
        one of the layer after; follow is None for the last layer.
        """
        self.qkv(hidden, scratch.qkv, before)
        self.attend(position, position, rotary, scratch)
        self.out(hidden, self.gate_up.x, self.qkv, self.gate_up)
        self.gate_up(hidden, self.down.x, self.out)
        self.down(hidden, follow.x if follow else hidden, self.gate_up, follow)


class ApartLayer(Layer[Kind], abc.ABC):
    """A decoder layer whose norms are launches of their own: for a batch, or where norms follow attention and the MLP."""

    norms_apart = True

    @abc.abstractmethod
    def __call__(
        self, hidden: torch.Tensor, other: torch.Tensor, known: torch.Tensor, position: torch.Tensor,
        starts: torch.Tensor, rotary: Rotary, scratch: Scratch, before: Norm | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Compute the layer on hidden + known; its output is hidden plus the returned parts.

        hidden: [sequences, width], overwritten; other: a buffer of the same shape; known and returned: fp32 [parts, m,
        width], parts that are still to be added, through the norm `before` if there is one; starts: int64 [sequences, 1].
        """


class SingleApartLayer(ApartLayer[SingleLinears]):
    """A decoder layer for one sequence, in eight launches, or nine with norms of q and k as wide as all heads."""

    kind, chunk = SingleLinears, CHUNK
    before: SingleLinears  # the last product of the layer before, of the last layer for the first one

    def __call__(self, hidden, other, known, position, starts, rotary, scratch, before=None):
        gate_up, down, parts = self.gate_up, self.down, scratch.parts
        _batch_norm(hidden, known, other, self.norms[0], self.qkv.x, after=before, ordered=True)
        self.qkv(other, scratch.qkv, self.before)
        self.attend(position, position, rotary, scratch)
        self.out(other, parts, self.qkv)
        _batch_norm(other, parts, hidden, self.norms[1], gate_up.x, after=self.after[0], ordered=True)
        gate_up(hidden, down.x, self.out)
        down(hidden, parts, gate_up)
        return parts


class BatchLayer(ApartLayer[BatchLinears]):
    """A decoder layer for a batch, in nine launches."""

    kind, chunk = BatchLinears, BATCH_CHUNK

    def __call__(self, hidden, other, known, position, starts, rotary, scratch, before=None):
        down, parts = self.down, scratch.parts
        _batch_norm(hidden, known, other, self.norms[0], self.qkv.x, self.qkv, before)
        self.qkv(scratch.qkv)
        self.attend(position, starts, rotary, scratch)
        self.out(parts)
        _batch_norm(other, parts[: self.out.splits], hidden, self.norms[1], self.gate_up.x, self.gate_up, self.after[0])
        self.gate_up(down.x)
        if down.rank:
            decode_batch_kernels.batch_inner_kernel[(down.parts,)](
                down.x, down.A[0], down.u, down.ranks[0], K=down.columns, M=self.m, RANK=down.rank, BLOCK=BATCH_CHUNK,
                num_warps=4, **_options(),
            )  # fmt: skip
        down(parts)
        return parts[: down.splits]


class DecodeStep:
    """Runs one token of each sequence through a 4-bit model with at most one active LoRA adapter.

    A call returns the logits, fp32 [sequences, vocabulary]. ids: int64 [sequences, 1]. position: int64 [1] on the
    model's device, the slot of the cache where all sequences write their new keys and values. starts: int64 [sequences,
    1], the slot of each sequence's first token, with padding before it; None means 0, and with one sequence it is
    always 0. Attention covers the slots from starts to `position`. The cache's own count of tokens does not change.

    A call reads nothing on the host, so a CUDA graph can capture it after a first call has compiled the kernels.
    Weights are read from the modules' own memory; which adapter is active is decided when the object is made.
    families.py says which models are supported; making the object for another one raises Unsupported.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, cache: StaticCache):
        _check(HAS_TRITON, "Triton is not installed (Windows: pip install triton-windows)")
        if isinstance(model, PeftModel):
            _check(not model.active_peft_config.is_prompt_learning, "the adapter is a learned prompt")
            model = model.get_base_model()
        _check(families.fused("model", model), f"{type(model).__name__}: {families.of(model).plain_decode}")
        decoder, dtype, device = families.decoder_of(model), model.dtype, model.device
        _check(dtype in (torch.bfloat16, torch.float16), f"the model computes in {dtype}")
        rope = decoder.rotary_emb.rope_type  # Gemma 3 and OLMo 3 have one of its own for each type of layer
        for name in rope.values() if isinstance(rope, dict) else [rope]:
            _check(name not in ("dynamic", "longrope"), f"rotary embedding {name} depends on the length")
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.norm = Norm(decoder.norm)
        _check(len(decoder.layers) == len(cache.layers), "the cache has another number of layers than the model")
        _check(cache.layers[0].is_initialized, "the cache has no tensors yet; see its early_initialization")
        sequences = len(cache.layers[0].keys)
        pairs = list(zip(decoder.layers, cache.layers, strict=True))
        # One of these is empty.
        alone, apart = sequences == 1, families.of(model).decodes_with_norms_apart
        self.single_layers = [SingleLayer(*pair, dtype) for pair in pairs] if alone and not apart else []
        self.apart_layers: list[ApartLayer] = []
        if alone and apart:
            layers = [SingleApartLayer(*pair, dtype) for pair in pairs]
            for layer, previous in zip(layers, layers[-1:] + layers[:-1], strict=True):
                layer.before = previous.down
            self.apart_layers = [*layers]
        elif not alone:
            self.apart_layers = [BatchLayer(*pair, dtype) for pair in pairs]
        self.layers: list[Layer] = [*self.single_layers, *self.apart_layers]
        kinds = {(layer.keys.shape, layer.keys.dtype, layer.keys.device, layer.qkv.x.device) for layer in self.layers}
        _check(
            kinds == {(self.layers[0].keys.shape, dtype, device, device)},
            "layers or the cache differ in shape, dtype or device",
        )
        self.last = torch.zeros(sequences, 1, model.config.hidden_size, dtype=dtype, device=device)
        self.starts = torch.zeros(sequences, 1, dtype=torch.long, device=device)
        self.angles = self._angles(decoder, rope)
        family = families.of(model)
        self.factor = float(getattr(decoder, family.embedding_factor)) if family.embedding_factor else 1.0
        form = logit_form(model) if family.shapes_logits else AS_THEY_ARE
        _check(form is not None, "the model changes its logits in an unknown way")
        self.form = form or AS_THEY_ARE
        _check(runs_on(device), f"the model is on {device}")
        self.scratch = self.layers[0].scratch()

    @torch.no_grad()
    def _angles(self, decoder: nn.Module, rope: str | dict[str, str]) -> list[Rotary]:
        """Return the rotary embedding of each layer; one that turns nothing for a layer that does not rotate."""
        _, _, length, size = self.layers[0].keys.shape
        positions, each = torch.arange(length, device=self.last.device)[None], isinstance(rope, dict)
        kinds = decoder.config.layer_types if each else [""] * len(self.layers)
        tables = {}
        for kind in set(kinds):
            cos, sin = decoder.rotary_emb(self.last, positions, *([kind] if each else []))
            tables[kind] = _rotary(cos[0], sin[0], size)
        one = tables[kinds[0]].cos
        still = Rotary(torch.ones_like(one), torch.zeros_like(one), size // 2)
        return [tables[kind] if layer.turns else still for kind, layer in zip(kinds, self.layers, strict=True)]

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, position: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embedding(ids)[:, 0] * self.factor if self.factor != 1 else self.embedding(ids)[:, 0]
        if self.single_layers:
            first, before = self.single_layers[0].qkv, self.single_layers[-1].down
            _norm(hidden, first.norm, first.x, first=True)
            following = itertools.zip_longest(self.single_layers, self.single_layers[1:])
            for (layer, follow), angles in zip(following, self.angles, strict=True):
                layer(hidden[0], position, angles, self.scratch, before, follow.qkv if follow else None)
                before = layer.down
            _norm(hidden, self.norm, self.last)
        else:
            other, parts = torch.empty_like(hidden), self.scratch.parts[:0]
            starts = self.starts if starts is None else starts
            after = None
            for apart_layer, angles in zip(self.apart_layers, self.angles, strict=True):
                parts = apart_layer(hidden, other, parts, position, starts, angles, self.scratch, after)
                after = apart_layer.after[1]
            _batch_norm(hidden, parts, other, self.norm, self.last, after=after)
        return self.form.apply_(self._logits().float())

    def _logits(self) -> torch.Tensor:
        """Return the head's product with the last norm's output, [sequences, vocabulary]."""
        if type(self.head) is not nn.Linear:  # it has an adapter, or trained rows
            return self.head(self.last)[:, 0]
        rows, weight = self.last[:, 0], self.head.weight
        logits = rows.new_empty(len(rows), padded(len(weight)))[:, : len(weight)]
        return head_product(rows, weight, self.head.bias, logits)
