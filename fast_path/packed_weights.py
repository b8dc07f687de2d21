"""4-bit weights for the operators: find the modules that have them, stack and dequantise them."""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import bitsandbytes as bnb  # (also registers the operators that dequantise without Triton)
import torch
import torch.nn.functional as F
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn

from fast_path import training_kernels
from fast_path.nf4 import SHUFFLE, Launch, triton
from fast_path.scratch import take

# ------------------------------------------------------------------------------------------------ as operands


DEQUANTIZE = Launch(block_m=128, block_k=64, warps=2)


def dot_size(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())  # tl.dot needs sizes that are powers of two, 16 or more


def adapter_columns(rank: int, members: int) -> int:
    """Return how many columns the adapters have in the wide operands: a multiple of 16, so that rows are aligned."""
    return -(-rank * members // 16) * 16


PIECES = (4, 8)  # in which gate and up are unpacked where memory is short; 8 only where 4 do not fit: they are slower


def pieces_each(pieces: int) -> tuple[int, int, int]:
    """Return the pieces of gate and up, of down, half as large, and of q, k and v, about a quarter as large.

    The output projection stays whole. Where Llama-3.1-8B is cut in 8 it is the largest, 34 MB, but a chunk of logits in the
    same memory takes 33.
    """
    return pieces, max(1, pieces // 2), max(1, pieces // 4)


# The rows of the wide operands are filled with zeros up to a multiple of 128 bytes (64 numbers of 16 bits), a line of
# memory. Matrix products are slower if rows end within a line.
LINE = 64


def operand_columns(columns: int, extra: int) -> int:
    """Return how many columns the wide operands have. columns: of x; extra: the adapter columns."""
    return -(-(columns + extra) // LINE) * LINE if extra else columns


def divides(outputs: int, columns: int, pieces: int, blocksizes: Sequence[int], nested: bool) -> bool:
    """Return whether a weight can be unpacked in this number of equal pieces: each has whole blocks of constants.

    blocksizes: weights per constant, and constants per second-level constant. A weight with no more outputs than columns
    is also cut across (`operand_numbers`).
    """
    block, across = blocksizes[0] * (blocksizes[1] if nested else 1), outputs <= columns
    rows_end = outputs * columns % (pieces * math.lcm(block, columns)) == 0
    return rows_end and not (across and columns % (pieces * blocksizes[0]))


def operand_numbers(outputs: int, columns: int, extra: int, pieces: int = 1) -> int:
    """Return how many numbers the largest piece of an unpacked operand has, forward and backward.

    The backward pass takes pieces across where there are no more outputs than columns (`Piece`).
    """
    along = outputs // pieces * operand_columns(columns, extra)
    across = 0 if outputs > columns else outputs * operand_columns(columns // pieces, extra)
    return max(along, across)


def stack_adapters(A: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the A of all members, one below the other and then rows of zeros, [adapter columns, columns]."""
    stacked = (torch.cat(A) if len(A) > 1 else A[0]).to(dtype)
    missing = adapter_columns(len(A[0]), len(A)) - len(stacked)
    return F.pad(stacked, (0, 0, 0, missing)) if missing else stacked


class Packed(NamedTuple):
    """The 4-bit weights of one or more linears (the members), stacked along their outputs.

    codes: uint8, two weights per byte. lut: fp32 [16], the level of each code. constants: [absmax] in fp32, or with
    double quantisation [absmax in uint8, second-level absmax, offset, code]. Second-level absmax and offset hold one
    value for each `blocksizes[1]` values of absmax. row_scales: fp32 [out features], one per output row where
    products are in FP8 (fp8.py); else None.
    """

    codes: torch.Tensor
    constants: list[torch.Tensor]
    lut: torch.Tensor
    columns: int
    blocksizes: list[int]
    quant_type: str
    row_scales: torch.Tensor | None = None

    def divides_by(self, pieces: int) -> bool:
        """Return whether each of `pieces` equal pieces ends where blocks of constants end, forward and backward."""
        return divides(self.codes.numel() * 2 // self.columns, self.columns, pieces, self.blocksizes, self.nested)

    @property
    def nested(self) -> bool:
        return len(self.constants) > 1

    @property
    def is_tall(self) -> bool:
        """Return whether there are more outputs than columns."""
        return self.codes.numel() * 2 > self.columns**2

    def piece(self, number: int, pieces: int) -> "Packed":
        """Return piece `number` of `pieces` equal pieces of the outputs."""
        codes, absmax, *second = (part.chunk(pieces)[number] for part in (self.codes, *self.constants[:3]))
        return self._replace(codes=codes, constants=[absmax, *second, *self.constants[3:]], row_scales=None)


class Piece(NamedTuple):
    """Piece `number` of `pieces` equal pieces of an operand: some of its rows, or with `across` some of W's columns.

    Of pieces across, the last one has the columns of the adapters.
    """

    number: int = 0
    pieces: int = 1
    across: bool = False

    @property
    def last(self) -> bool:
        return self.number == self.pieces - 1

    def own_rows(self, B: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return of each member's B the rows that are in this piece, perhaps none."""
        size, end = sum(map(len, B)) // self.pieces, 0
        start, own = self.number * size, []
        for b in B:
            own.append(b[max(0, start - end) : max(0, start + size - end)])
            end += len(b)
        return own


WHOLE = Piece()


def operands(
    W: Packed, A: list[torch.Tensor], B: list[torch.Tensor], scale: float, dtype: torch.dtype, kernels: bool,
    only_adapters: bool = False, piece: Piece = WHOLE,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return [W | scale B | 0], [out features, operand columns], or a piece of it, and `stack_adapters` of A.

    Each member's B fills its own rows and its own columns (block diagonal). A may be empty although B is not. The next
    call overwrites the first tensor while a fused model lives (scratch.py). only_adapters: without W, so [scale B | 0],
    [out features, adapter columns], in memory of its own.
    """
    if piece.pieces > 1 and not piece.across:
        W, B = W.piece(piece.number, piece.pieces), piece.own_rows(B)
    rows, rank = W.codes.numel() * 2 // W.columns, B[0].shape[1] if B else 0
    width = W.columns // piece.pieces if piece.across else W.columns
    extra, before = adapter_columns(rank, len(B)), 0 if only_adapters else width
    stride = extra if only_adapters else operand_columns(width, 0 if piece.across and not piece.last else extra)
    out = W.lut.new_empty(rows, stride, dtype=dtype) if only_adapters else take(rows, stride, dtype, W.codes.device)
    behind = stride - before
    absmax, nested = W.constants[0], len(W.constants) > 1
    if only_adapters and not B:
        return out, out.new_empty(0, W.columns)
    if kernels:
        stacked, none = out.new_empty(extra if A else 0, W.columns), [W.lut] * 3
        absmax2, offset, code2 = W.constants[1:] if nested else (absmax,) * 3
        row_blocks = width // W.blocksizes[0]
        block_r = dot_size(behind or 1)
        b_rows = max(1, 1024 // block_r)  # of B per program: more rows would need more registers than W
        programs = [
            0 if only_adapters else triton.cdiv(rows * row_blocks, DEQUANTIZE.block_m),
            triton.cdiv(rows, b_rows) if B and behind else 0,
            triton.cdiv(stacked.numel(), 1024),
        ]  # fmt: skip
        training_kernels.dequantize_kernel[(sum(programs),)](
            W.codes.view(torch.int32), absmax, absmax2, offset, code2, W.lut, *[*A, *none][:3], *[*B, *none][:3], out,
            stacked, rows * row_blocks, rows, len(B[0]) if B else 0, len(B[1]) if len(B) > 1 else rows, stride,
            before, rank, len(A), rank * W.columns, extra, behind, scale, programs[0], programs[0] + programs[1], NESTED=nested,
            BLOCKSIZE=W.blocksizes[0], BLOCKSIZE2=W.blocksizes[1], ROW_BLOCKS=row_blocks,
            FIRST=piece.number * row_blocks if piece.across else 0, SKIPPED=W.columns // W.blocksizes[0] - row_blocks,
            BLOCKS=DEQUANTIZE.block_m, ROWS=b_rows, BLOCK_R=block_r, BLOCK_A=1024, SHUFFLE=SHUFFLE,
            num_warps=DEQUANTIZE.warps,
        )  # fmt: skip
        return out, stacked
    if not only_adapters:
        start = piece.number * width if piece.across else 0
        out[:, :width] = dequantize(W, dtype)[:, start : start + width]
    out[:, before:] = F.pad(torch.block_diag(*B) * scale, (0, behind - rank * len(B))) if B and behind else 0
    return out, stack_adapters(A, dtype) if A else out.new_empty(0, W.columns)


def absmax_of(W: Packed) -> torch.Tensor:
    """Return the constant of each quantisation block, fp32 [blocks]."""
    if len(W.constants) == 1:
        return W.constants[0]
    codes, absmax2, offset, code2 = W.constants
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax2, code2, W.blocksizes[1], torch.float32)
    return absmax + offset.repeat_interleave(W.blocksizes[1])[: len(absmax)]


def dequantize(W: Packed, dtype: torch.dtype) -> torch.Tensor:
    """Return W, [out features, columns], by torch calls."""
    shape = [W.codes.numel() * 2 // W.columns, W.columns]
    return torch.ops.bitsandbytes.dequantize_4bit(W.codes, absmax_of(W), W.blocksizes[0], W.quant_type, shape, dtype)


# ------------------------------------------------------------------------------------------------ in a model's modules


def is_plain_lora(module: nn.Module) -> bool:
    """Return whether a module is peft's 4-bit linear and computes just W x + scale B A x: no DoRA, no bias in B."""
    return isinstance(module, LoraLinear4bit) and not module.lora_variant and not any(module.lora_bias.values())


def fusable(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit linear without an adapter or with one plain LoRA adapter that is active."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, bnb.nn.Linear4bit) or getattr(base.weight, "quant_state", None) is None:
        return False
    if module is base:
        return True
    return is_plain_lora(module) and module.active_adapters == list(module.lora_A) and len(module.lora_A) == 1


def stack_weights(bases: list[bnb.nn.Linear4bit]) -> Packed:
    """Move the packed weights of linears that read the same x into one tensor, so that one launch dequantises all.

    The modules get views of their parts, so nothing is stored twice.
    """
    states = [base.weight.quant_state for base in bases]
    codes = torch.cat([base.weight.data.view(torch.uint8).flatten() for base in bases])
    absmax, nested, start = torch.cat([state.absmax for state in states]), states[0].nested, 0
    blocksizes = [states[0].blocksize, states[0].state2.blocksize if nested else 1]
    whole = nested and all(len(state.absmax) % blocksizes[1] == 0 for state in states[:-1])
    if whole:
        absmax2 = torch.cat([state.state2.absmax for state in states])
        offset = torch.cat([state.offset.expand_as(state.state2.absmax) for state in states])
        constants = [absmax, absmax2, offset, states[0].state2.code]
    elif nested:  # tiny layers: a second-level block would cross two members
        constants = [torch.cat([_first_level(state) for state in states])]
    else:
        constants = [absmax]
    for base, state, part in zip(bases, states, absmax.split([len(s.absmax) for s in states]), strict=True):
        size = base.weight.data.nbytes
        base.weight.data = codes[start : start + size].view(base.weight.dtype).view_as(base.weight)
        start += size
        state.absmax = part
    return Packed(codes, constants, states[0].code, bases[0].in_features, blocksizes, states[0].quant_type)


def _first_level(state: bnb.functional.QuantState) -> torch.Tensor:
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def keep_packing(model: nn.Module, keep: bool = True) -> None:
    """Stop bitsandbytes from repacking its 4-bit weights; keep=False allows it again, which is its default.

    On a CPU with AVX512-BF16 one forward pass in eval mode repacks them permanently. Training after that would be
    wrong, but generation is faster (docs/measurements.md). Weights whose rows are not whole blocks, or whose rows are
    not whole groups of 32, cannot be repacked: bitsandbytes 0.50 fails there.
    """
    unpack_by_blocks()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            whole = state is not None and module.in_features % state.blocksize == module.out_features % 32 == 0
            module.support_avx512bf16_for_cpu = not keep and whole and bnb.functional.has_avx512bf16()


@functools.cache
def unpack_by_blocks() -> torch.library.Library:
    """Have bitsandbytes unpack 4-bit weights on a CPU as rows of one block each, whatever their shape, in this process.

    Version 0.50 takes wrong constants on a CPU with AVX-512 where rows are not whole blocks of 64 weights but divide by
    16, such as the 4,304 of SigLIP's MLP: the values are wrong, without an error.
    """
    name, own = "dequantize_4bit", torch.library.Library("bitsandbytes", "IMPL")
    theirs = torch.library.get_kernel(f"bitsandbytes::{name}", "CPU")

    def by_blocks(keys, codes, absmax, blocksize, quant_type, shape, dtype):
        count = math.prod(shape)
        rows = [count // blocksize, blocksize] if count % blocksize == 0 else [1, count]
        return theirs.call_boxed(keys, codes, absmax, blocksize, quant_type, rows, dtype).view(shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this replaces bitsandbytes' own
        own.impl(name, by_blocks, "CPU", with_keyset=True, allow_override=True)
    return own  # which holds what it registered for as long as it lives
