"""The decode step of one sequence, one token in and its logits out, as nine kernels a layer that a CUDA graph can hold.

A token reads every weight once, so the step is bound by memory: 4-bit weights are dequantised in registers on their way
into the product, and adapters, biases, SwiGLU and residuals ride in the kernels that are there anyway.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, StaticCache
from transformers.activations import SiLUActivation
from transformers.cache_utils import StaticLayer

from fused_ops import ATTENTIONS, MLPS

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows without triton-windows: DecodeStep says that it is missing
    triton = None


class Unsupported(ValueError):
    """Says in one line why a model's decode step has no kernels."""


@dataclasses.dataclass
class Layout:
    """How the kernels are laid on a GPU."""

    # Outputs of a program of a product (with SwiGLU of gate and of up): 2 took 1.2x as long, 4 1.5x, each with its own x.
    rows: int = 1
    positions: int = 32  # of a tile of the cache
    # A kernel starts, and loads weights, before the one before has ended (sm_90 and later): 1,832 us a token of a 3B on an
    # H100 in place of 2,152.
    overlap: bool = True
    programs: int = 128  # that attention is split into, about one for each of the 132 multiprocessors of an H100


LAYOUT = Layout()
MODELS = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"}
RUN = 64  # weights of a row that a thread takes at a time; constants of quantisation change at its ends only
CHUNK = 2048  # inputs of a program of the adapter's first product before down_proj

# ------------------------------------------------------------------------------------------------ kernels
#
# Products read x as the 4-bit words want it: a thread takes 64 inputs, whose 32 pairs lie where 32 threads' loads of
# 16 bytes are consecutive: pair p of the words of half h is at [h, p, run of 64, word], each [2, 4, inputs / 64, 4].

if triton is not None:

    @triton.jit
    def _begin(OVERLAP: tl.constexpr):
        """Let the next kernel start as soon as there is room for it: it loads weights, and waits in `_wait`."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _wait(OVERLAP: tl.constexpr):
        """Wait until all that earlier kernels wrote is there; what stands before it may be weights only."""
        if OVERLAP:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _place(k, K: tl.constexpr):
        """Return where input k lies in the order above."""
        return ((((k // 32) % 2 * 4 + (k // 2) % 4) * (K // 64) + k // 64) * 4 + (k // 8) % 4) * 2 + k % 2

    @triton.jit
    def _lane_level(lut, SHUFFLE: tl.constexpr):
        """Return the level that a lane holds for its warp: that of code lane % 16. A scalar, which differs by lane."""
        if SHUFFLE:
            return tl.inline_asm_elementwise(
                """{
                .reg .u32 lane; .reg .u64 place;
                mov.u32 lane, %laneid;
                and.b32 lane, lane, 15;
                mad.wide.u32 place, lane, 4, $1;
                ld.global.nc.f32 $0, [place];
                }""",
                "=f,l", [lut.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return 0.0

    @triton.jit
    def _levels(words, lut, level, SHUFFLE: tl.constexpr):
        """Return the levels of the eight codes of each word, in the order of the weights: high half of a byte first.

        A shuffle looks a code up in 2 instructions (it reads 5 bits of its index, so nothing is masked: lanes 16 to 31
        hold the levels once more); a load from the table takes 4 and its address.
        """
        if SHUFFLE:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                shr.u32 t, $8, 4;  shfl.sync.idx.b32 $0, $9, t, 31, -1;
                shfl.sync.idx.b32 $1, $9, $8, 31, -1;
                shr.u32 t, $8, 12; shfl.sync.idx.b32 $2, $9, t, 31, -1;
                shr.u32 t, $8, 8;  shfl.sync.idx.b32 $3, $9, t, 31, -1;
                shr.u32 t, $8, 20; shfl.sync.idx.b32 $4, $9, t, 31, -1;
                shr.u32 t, $8, 16; shfl.sync.idx.b32 $5, $9, t, 31, -1;
                shr.u32 t, $8, 28; shfl.sync.idx.b32 $6, $9, t, 31, -1;
                shr.u32 t, $8, 24; shfl.sync.idx.b32 $7, $9, t, 31, -1;
                }""",
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f", [words, level],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return (
                tl.load(lut + ((words >> 4) & 15)), tl.load(lut + (words & 15)),
                tl.load(lut + ((words >> 12) & 15)), tl.load(lut + ((words >> 8) & 15)),
                tl.load(lut + ((words >> 20) & 15)), tl.load(lut + ((words >> 16) & 15)),
                tl.load(lut + ((words >> 28) & 15)), tl.load(lut + ((words >> 24) & 15)),
            )  # fmt: skip

    @triton.jit
    def _pair(x, dtype: tl.constexpr):
        """Return the two numbers of half precision in each 32-bit word, as fp32."""
        x = x.to(tl.uint32, bitcast=True)
        first = (x & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        return first.to(tl.float32), (x >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)

    @triton.jit
    def _half(
        total, total2, words, words2, x, inside, stride: tl.constexpr, lut, level, dtype: tl.constexpr,
        SHUFFLE: tl.constexpr, TWO: tl.constexpr,
    ):  # fmt: skip
        """Add the products of 32 of a thread's 64 weights, of one matrix or of two, to the totals.

        words, total: [rows, runs, 4]; x: [1, runs, 4].
        """
        l0, l1, l2, l3, l4, l5, l6, l7 = _levels(words, lut, level, SHUFFLE)
        m0, m1, m2, m3, m4, m5, m6, m7 = _levels(words2, lut, level, SHUFFLE) if TWO else (0, 0, 0, 0, 0, 0, 0, 0)
        a, b = _pair(tl.load(x, mask=inside, other=0), dtype)
        total += l0 * a
        total += l1 * b
        if TWO:
            total2 += m0 * a
            total2 += m1 * b
        a, b = _pair(tl.load(x + stride, mask=inside, other=0), dtype)
        total += l2 * a
        total += l3 * b
        if TWO:
            total2 += m2 * a
            total2 += m3 * b
        a, b = _pair(tl.load(x + 2 * stride, mask=inside, other=0), dtype)
        total += l4 * a
        total += l5 * b
        if TWO:
            total2 += m4 * a
            total2 += m5 * b
        a, b = _pair(tl.load(x + 3 * stride, mask=inside, other=0), dtype)
        total += l6 * a
        total += l7 * b
        if TWO:
            total2 += m6 * a
            total2 += m7 * b
        return total, total2

    @triton.jit
    def _constant(code, second, shift, code2, block, real, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr):
        """Return the constants of blocks of weights, fp32. NESTED: code is a code of 8 bits, else the constant."""
        if NESTED:
            code = tl.load(code2 + code.to(tl.int32))
            code = code * tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0) + shift
        return code

    @triton.jit
    def _weights(
        codes, absmax, row, rows, start, RUNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
    ):  # fmt: skip
        """Return 64 weights a thread of some rows as words of eight codes, [rows, BLOCKS, 4] twice, and their constants
        as they are stored, [rows, BLOCKS]. start: the first run of 64.
        """
        run = start + tl.arange(0, BLOCKS)
        place = row[:, None] * RUNS + run[None]
        real = (row < rows)[:, None] & (run < RUNS)[None]
        words = codes + (place * 8)[:, :, None] + tl.arange(0, 4)[None, None]
        low, high = tl.load(words, mask=real[:, :, None], other=0), tl.load(words + 4, mask=real[:, :, None], other=0)
        return low, high, tl.load(absmax + place * 64 // BLOCKSIZE, mask=real, other=0)

    @triton.jit
    def _product(
        x, codes, absmax, second, offset, codes2, absmax2, second2, offset2, code2, lut, row, rows,
        dtype: tl.constexpr, K: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
        BLOCKS: tl.constexpr, SHUFFLE: tl.constexpr, OVERLAP: tl.constexpr, TWO: tl.constexpr,
    ):  # fmt: skip
        """Return W x for some rows of W and, if TWO, of a second matrix, fp32. x: pairs in the order of `_place`; row:
        [rows].

        Two share the loads of x, and the weights of both are under way before any is used: loads stay in this order.
        """
        RUNS: tl.constexpr = K // 64
        level = _lane_level(lut, SHUFFLE)
        shift = tl.load(offset) if NESTED else 0.0
        shift2 = tl.load(offset2) if NESTED and TWO else 0.0
        word = tl.arange(0, 4)[None, None]
        result = tl.zeros((row.shape[0], BLOCKS), tl.float32)
        result2 = tl.zeros((row.shape[0], BLOCKS), tl.float32)
        low, high, constant = _weights(codes, absmax, row, rows, 0, RUNS, BLOCKSIZE, BLOCKS)
        low2, high2, constant2 = low, high, constant
        if TWO:
            low2, high2, constant2 = _weights(codes2, absmax2, row, rows, 0, RUNS, BLOCKSIZE, BLOCKS)
        for start in range(0, RUNS, BLOCKS):
            run = start + tl.arange(0, BLOCKS)
            known = (run < RUNS)[None, :, None]
            block = (row[:, None] * RUNS + run[None]) * 64 // BLOCKSIZE
            real = (row < rows)[:, None] & (run < RUNS)[None]
            next_low, next_high, next_constant = low, high, constant
            next_low2, next_high2, next_constant2 = low2, high2, constant2
            if BLOCKS < RUNS:  # on their way while these are used; past the end nothing is loaded
                next_low, next_high, next_constant = _weights(
                    codes, absmax, row, rows, start + BLOCKS, RUNS, BLOCKSIZE, BLOCKS
                )  # fmt: skip
                if TWO:
                    next_low2, next_high2, next_constant2 = _weights(
                        codes2, absmax2, row, rows, start + BLOCKS, RUNS, BLOCKSIZE, BLOCKS
                    )  # fmt: skip
            _wait(OVERLAP)  # every time: it keeps the compiler from putting those loads off to where they are used
            pairs = x + (run * 4)[None, :, None] + word
            total = tl.zeros((row.shape[0], BLOCKS, 4), tl.float32)
            total, total2 = _half(
                total, total, low, low2, pairs, known, RUNS * 4, lut, level, dtype, SHUFFLE, TWO
            )  # fmt: skip
            total, total2 = _half(
                total, total2, high, high2, pairs + RUNS * 16, known, RUNS * 4, lut, level, dtype, SHUFFLE, TWO
            )  # fmt: skip
            # Looked up when the weights are used up: before, the loads of the weights would wait for it.
            result += tl.sum(total, 2) * _constant(constant, second, shift, code2, block, real, NESTED, BLOCKSIZE2)
            if TWO:
                constant2 = _constant(constant2, second2, shift2, code2, block, real, NESTED, BLOCKSIZE2)
                result2 += tl.sum(total2, 2) * constant2
            low, high, constant = next_low, next_high, next_constant
            low2, high2, constant2 = next_low2, next_high2, next_constant2
        return tl.sum(result, 1), tl.sum(result2, 1)

    @triton.jit
    def _adapter(
        y, u, B, bias, row, rows, rank, scale, MEMBERS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
        PARTS_2: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        """Return y + scale B u + bias for some rows. u: [PARTS, MEMBERS, RANK] from this member on; parts are added."""
        if BIAS:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        if RANK > 0:
            j, part = tl.arange(0, RANK), tl.arange(0, PARTS_2)
            inside = (part < PARTS)[:, None] & (j < rank)[None]
            parts = tl.load(u + part[:, None] * (MEMBERS * RANK) + j[None], mask=inside, other=0.0)
            inside = (row < rows)[:, None] & (j < rank)[None]
            b = tl.load(B + row[:, None] * rank + j[None], mask=inside, other=0.0).to(tl.float32)
            y += scale * tl.sum(b * tl.sum(parts, 0)[None], 1)
        return y

    @triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # a rank of 1 would be of another type than one of 0
    def _linear_kernel(
        x, u, residual, out, flat, lut, code2,
        codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
        codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
        codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        MODE: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr,
        PARTS: tl.constexpr, PARTS_2: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
        BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SHUFFLE: tl.constexpr, HALF: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Up to three 4-bit linears with adapters that read one x.

        MODE "stack": out [outputs of all], fp32. "residual": residual + y to out. "swiglu": silu(first) * second to out
        in the order of `_place`, and to flat as it is.
        """
        _begin(OVERLAP)
        program = tl.program_id(0)
        first_outputs = 0
        member = 0
        if MODE == "stack":
            end0 = tl.cdiv(rows0, ROWS)
            end1 = end0 + tl.cdiv(rows1, ROWS)
            if program >= end1:
                program -= end1
                first_outputs = rows0 + rows1
                member = 2
                codes0, absmax0, second0, offset0, bias0, B0 = codes2, absmax2, second2, offset2, bias2, B2
                rows0, rank0, scale0 = rows2, rank2, scale2
            elif program >= end0:
                program -= end0
                first_outputs = rows0
                member = 1
                codes0, absmax0, second0, offset0, bias0, B0 = codes1, absmax1, second1, offset1, bias1, B1
                rows0, rank0, scale0 = rows1, rank1, scale1
        row = program * ROWS + tl.arange(0, ROWS)
        inside = row < rows0
        y, up = _product(
            x, codes0, absmax0, second0, offset0, codes1, absmax1, second1, offset1, code2, lut, row, rows0, HALF, K,
            NESTED, BLOCKSIZE, BLOCKSIZE2, BLOCKS, SHUFFLE, OVERLAP, MODE == "swiglu",
        )  # fmt: skip
        y = _adapter(
            y, u + member * RANK, B0, bias0, row, rows0, rank0, scale0, MEMBERS, RANK, PARTS, PARTS_2, BIAS
        )  # fmt: skip
        if MODE == "stack":
            tl.store(out + first_outputs + row, y, mask=inside)
        elif MODE == "residual":
            y += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row, y.to(HALF), mask=inside)
        else:
            up = _adapter(
                up, u + RANK, B1, bias1, row, rows1, rank1, scale1, MEMBERS, RANK, PARTS, PARTS_2, BIAS
            )  # fmt: skip
            y = (y / (1.0 + tl.exp(-y)) * up).to(HALF)
            tl.store(out + _place(row, OUTPUTS), y, mask=inside)
            tl.store(flat + row, y, mask=inside)

    @triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
    def _norm_kernel(
        x, weight, out, u, A0, A1, A2, rank0, rank1, rank2, eps,
        K: tl.constexpr, RANK: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """RMS norm of x and, a program for each row of the adapters' A, u [members, RANK] = A norm(x)."""
        _begin(OVERLAP)
        program = tl.program_id(0)
        dtype = out.dtype.element_ty
        k = tl.arange(0, BLOCK)
        inside = k < K
        factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        if RANK > 0:
            j = program % RANK
            if program >= 2 * RANK:
                A0, rank0 = A2, rank2
            elif program >= RANK:
                A0, rank0 = A1, rank1
            a = tl.load(A0 + j * K + k, mask=k < tl.where(j < rank0, K, 0), other=0.0).to(tl.float32)
        _wait(OVERLAP)
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        value = (value * tl.rsqrt(tl.sum(value * value) / K + eps)).to(dtype).to(tl.float32)
        value = (value * factor).to(dtype)
        if program == 0:
            tl.store(out + (_place(k, K) if ORDERED else k), value, mask=inside)
        if RANK > 0:
            tl.store(u + program, tl.sum(a * value.to(tl.float32)))

    @triton.jit
    def _inner_kernel(
        x, A, u, rank, K: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
    ):  # fmt: skip
        """u [parts, RANK], whose parts add up to A x: a program for each row of A and each BLOCK of inputs."""
        _begin(OVERLAP)
        j, part = tl.program_id(0), tl.program_id(1)
        k = part * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(A + j * K + k, mask=k < tl.where(j < rank, K, 0), other=0.0).to(tl.float32)
        _wait(OVERLAP)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(u + part * RANK + j, tl.sum(a * value))

    @triton.jit
    def _rotated(x, weight, cos, sin, eps, rows, NORM: tl.constexpr, HALF: tl.constexpr):
        """Return both halves of heads after their norm and rotary embedding, fp32 [heads, HALF]. rows: bool."""
        j = tl.arange(0, HALF)[None]
        first = tl.load(x + j, mask=rows, other=0.0)
        second = tl.load(x + HALF + j, mask=rows, other=0.0)
        if NORM:
            square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
            first = first * inverse * tl.load(weight + j).to(tl.float32)
            second = second * inverse * tl.load(weight + HALF + j).to(tl.float32)
        c, s = tl.load(cos + j).to(tl.float32), tl.load(sin + j).to(tl.float32)
        return first * c - second * s, second * c + first * s

    @triton.jit
    def _attention_kernel(
        qkv, keys, values, position, cos, sin, q_weight, k_weight, mixed, logs, eps, scale, stride,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
        POSITIONS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Attention of one position's heads to a share of the cache, and the new key and value into the cache.

        Shares are as equal as tiles of POSITIONS allow; each leaves its mean of the values [HEADS, SPLITS, 2 HALF] and
        the base-2 logarithm of its sum of weights, -inf where it had nothing. qkv: fp32; keys, values:
        [KV_HEADS, stride, 2 HALF].
        """
        _begin(OVERLAP)
        _wait(OVERLAP)
        kv, split = tl.program_id(0), tl.program_id(1)
        dtype = keys.dtype.element_ty
        SIZE: tl.constexpr = 2 * HALF
        EACH: tl.constexpr = HEADS // KV_HEADS
        here = tl.load(position).to(tl.int32)
        cos += here * SIZE
        sin += here * SIZE
        group = tl.arange(0, GROUP)
        head = kv * EACH + group
        real = (group < EACH)[:, None]
        q1, q2 = _rotated(qkv + head[:, None] * SIZE, q_weight, cos, sin, eps, real, NORM, HALF)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        new = qkv + (HEADS + kv + tl.zeros((1, 1), tl.int32)) * SIZE
        k1, k2 = _rotated(new, k_weight, cos, sin, eps, (tl.arange(0, 1) < 1)[:, None], NORM, HALF)
        k1, k2 = k1.to(dtype), k2.to(dtype)
        j, wide = tl.arange(0, HALF)[None], tl.arange(0, SIZE)[None]
        v = tl.load(qkv + (HEADS + KV_HEADS + kv) * SIZE + wide).to(dtype)
        keys += kv.to(tl.int64) * stride * SIZE
        values += kv.to(tl.int64) * stride * SIZE
        share = tl.cdiv(tl.cdiv(here + 1, SPLITS), POSITIONS) * POSITIONS
        start = split * share
        end = tl.minimum(start + share, here + 1)
        top = tl.full((GROUP,), -float("inf"), tl.float32)
        weight = tl.zeros((GROUP,), tl.float32)
        total = tl.zeros((GROUP, SIZE), tl.float32)
        for first in range(start, end, POSITIONS):
            n = first + tl.arange(0, POSITIONS)
            old, own = (n < here)[:, None], (n == here)[:, None]
            key1 = tl.where(own, k1, tl.load(keys + n[:, None] * SIZE + j, mask=old, other=0.0))
            key2 = tl.where(own, k2, tl.load(keys + n[:, None] * SIZE + HALF + j, mask=old, other=0.0))
            value = tl.where(own, v, tl.load(values + n[:, None] * SIZE + wide, mask=old, other=0.0))
            score = tl.dot(q1, tl.trans(key1)) + tl.dot(q2, tl.trans(key2))
            score = tl.where((n < end)[None], score * (scale * 1.4426950408889634), -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            fade = tl.exp2(top - higher)
            weight = weight * fade + tl.sum(p, 1)
            total = total * fade[:, None] + tl.dot(p.to(dtype), value)
            top = higher
        if (start <= here) & (here < start + share):
            place = here * SIZE
            tl.store(keys + place + j, k1)
            tl.store(keys + place + HALF + j, k2)
            tl.store(values + place + wide, v)
        place = head * SPLITS + split
        used = group < tl.where(start < end, EACH, 0)
        tl.store(mixed + place[:, None] * SIZE + wide, total / weight[:, None], mask=used[:, None])
        tl.store(logs + place, tl.where(start < end, top + tl.log2(weight), -float("inf")), mask=group < EACH)

    @triton.jit
    def _combine_kernel(
        mixed, logs, out, A, u, rank, K: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
        TILE: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Add the shares of a head, and its part of o_proj's u = A x: u [heads, RANK], whose parts add up."""
        _begin(OVERLAP)
        _wait(OVERLAP)
        head = tl.program_id(0)
        dtype = out.dtype.element_ty
        split, wide = tl.arange(0, SPLITS), tl.arange(0, SIZE)
        log = tl.load(logs + head * SPLITS + split)
        weight = tl.exp2(log - tl.max(log, 0))
        weight = weight / tl.sum(weight, 0)
        place = mixed + (head * SPLITS + split)[:, None] * SIZE + wide[None]
        parts = tl.load(place, mask=(weight > 0)[:, None], other=0.0)
        x = tl.sum(parts * weight[:, None], 0).to(dtype)
        tl.store(out + _place(head * SIZE + wide, K), x)
        for start in range(0, RANK, TILE):
            j = start + tl.arange(0, TILE)
            a = tl.load(A + j[:, None] * K + head * SIZE + wide[None], mask=(j < rank)[:, None], other=0.0)
            tl.store(u + head * RANK + j, tl.sum(a.to(tl.float32) * x.to(tl.float32)[None], 1))


INTERPRETED = triton is not None and not isinstance(_linear_kernel, triton.JITFunction)


# ------------------------------------------------------------------------------------------------ what a model has


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(f"no decode kernels: {reason}")


class Member:
    """A 4-bit linear and its adapter as the kernels read them, in the modules' own memory. A, B: None without one."""

    def __init__(self, module: nn.Module, name: str):
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
        self.A = self.B = None
        self.rank, self.scale = 0, 0.0
        if module is not base:
            self._adapter(module, name)

    def _adapter(self, module: nn.Module, name: str) -> None:
        plain = isinstance(module, LoraLinear4bit) and not module.lora_variant and not any(module.lora_bias.values())
        _check(plain, f"the adapter of {name} is no plain LoRA")
        _check(not module.merged, f"the adapter of {name} is merged")
        active = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.lora_A]
        _check(len(active) < 2, f"{name} has {len(active)} active adapters: {', '.join(active)}")
        for adapter in active:
            self.A, self.B = (part[adapter].weight.detach().contiguous() for part in (module.lora_A, module.lora_B))
            self.rank, self.scale = len(self.A), float(module.scaling[adapter])


def _options() -> dict[str, bool]:
    """Return the options of every launch. From Triton 3.10 on it no longer fuses a product with a sum unasked."""
    overlap = LAYOUT.overlap and not INTERPRETED and torch.cuda.is_available()
    overlap = overlap and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAP": overlap, "enable_fp_fusion": True, **({"launch_pdl": True} if overlap else {})}


class Linears:
    """Up to three linears that read one x, as one launch.

    mode: see `_linear_kernel`. parts: into how many sums the launch before splits u = A x. x: what it writes and this
    reads, in the order of `_place`.
    """

    def __init__(self, modules: dict[str, nn.Module], mode: str, dtype: torch.dtype, parts: int = 1):
        self.members = [Member(module, name) for name, module in modules.items()]
        first, adapted = self.members[0], [member for member in self.members if member.rank]
        self.mode, self.parts, self.rank = (
            mode,
            parts,
            triton.next_power_of_2(max(m.rank for m in self.members)) if adapted else 0,
        )
        self.columns, self.rows = first.columns, [member.rows for member in self.members]
        for what in ("kind", "columns"):
            same = len({getattr(member, what) for member in self.members}) == 1
            _check(same, f"{', '.join(modules)} differ in their {'quantisation' if what == 'kind' else 'inputs'}")
        biases = {None if member.bias is None else member.bias.dtype for member in self.members}
        types = {factor.dtype for member in adapted for factor in (member.A, member.B)}
        _check(len(biases) == 1 and len(types) < 2, f"{', '.join(modules)} differ in their biases or adapters' dtypes")
        self.x = torch.zeros(self.columns, dtype=dtype, device=first.codes.device)
        self.u = torch.zeros(parts, len(modules), max(self.rank, 1), dtype=torch.float32, device=self.x.device)
        nothing = adapted[0].A if adapted else self.x
        self.A = [member.A if member.rank else nothing for member in self.members]
        self.ranks = [member.rank for member in self.members]
        arguments = [
            (
                m.codes, m.absmax, m.second, m.offset, self.x if m.bias is None else m.bias,
                m.B if m.rank else nothing, m.rows, m.rank, m.scale,
            )
            for m in self.members
        ]  # fmt: skip
        arguments += [(*arguments[0][:6], 0, 0, 0.0)] * (3 - len(arguments))
        self.arguments = [self.x.view(torch.int32), self.u], [first.lut, first.code2, *sum(arguments, ())]
        nested, blocksize, blocksize2, _ = first.kind
        warps = 2 if self.columns // RUN > 64 else 1  # as long as a row; more would idle at its end
        self.constants = dict(
            MODE=mode, MEMBERS=len(modules), K=self.columns, OUTPUTS=first.rows, RANK=self.rank, PARTS=parts,
            PARTS_2=triton.next_power_of_2(parts), BIAS=None not in biases, NESTED=nested, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2,
            ROWS=LAYOUT.rows, BLOCKS=32 * warps, SHUFFLE=not INTERPRETED,
            HALF=tl.bfloat16 if dtype is torch.bfloat16 else tl.float16, num_warps=warps, **_options(),
        )  # fmt: skip

    def __call__(self, residual: torch.Tensor, out: torch.Tensor, flat: torch.Tensor) -> None:
        rows = self.rows if self.mode == "stack" else self.rows[:1]
        inputs, weights = self.arguments
        grid = (sum(triton.cdiv(n, self.constants["ROWS"]) for n in rows),)
        _linear_kernel[grid](*inputs, residual, out, flat, *weights, **self.constants)


def _norm(x: torch.Tensor, norm: nn.Module, out: torch.Tensor, linears: Linears | None = None) -> None:
    """Write norm(x) to out as it is, or to where `linears` read it, together with their adapters' u."""
    rank = linears.rank if linears else 0
    A, ranks = (linears.A, linears.ranks) if rank else ([x], [0])
    _norm_kernel[(max(1, rank * len(A)),)](
        x, norm.weight, out, linears.u if linears else out, *(A * 3)[:3], *(ranks + [0, 0])[:3],
        norm.variance_epsilon, K=x.numel(), RANK=rank, ORDERED=linears is not None, BLOCK=triton.next_power_of_2(x.numel()),
        num_warps=4 if x.numel() <= 4096 else 8, **_options(),
    )  # fmt: skip


def _check_norm(norm: nn.Module) -> None:
    # Gemma's norms add 1 to the weight, and have no variance_epsilon.
    known = type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")
    _check(known, f"{type(norm).__name__} is unknown")


def _check_layer(layer: nn.Module, cache: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _check_norm(norm)
    _check(type(attention).__name__ in ATTENTIONS, f"{type(attention).__name__} is unknown")
    _check(type(mlp).__name__ in MLPS, f"{type(mlp).__name__} is unknown")
    _check(isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)), f"an MLP with {type(mlp.act_fn).__name__}")
    # Qwen's attention says itself whether it slides, Mistral's reads its config.
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    _check(window is None and type(cache) is StaticLayer, "attention in a sliding window, or no plain static cache")
    _check(cache.is_initialized, "the cache has no tensors yet; see its early_initialization")
    _check(cache.keys.shape[0] == 1, f"a cache of {cache.keys.shape[0]} sequences")
    _check(cache.keys.shape[3] == attention.head_dim, "the cache has other heads than the model")
    _check(attention.head_dim in (32, 64, 128, 256), f"heads of {attention.head_dim}")


class Layer:
    """A decoder layer: its weights, its part of the cache, and its nine launches."""

    def __init__(self, layer: nn.Module, cache: Any, dtype: torch.dtype):
        _check_layer(layer, cache)
        attention, mlp = layer.self_attn, layer.mlp

        def linears(owner: nn.Module, names: str, mode: str, parts: int = 1) -> Linears:
            return Linears({name: getattr(owner, name) for name in names.split()}, mode, dtype, parts)

        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.keys, self.values = cache.keys, cache.values
        _, kv_heads, length, size = cache.keys.shape
        self.qkv = linears(attention, "q_proj k_proj v_proj", "stack")
        heads = self.qkv.rows[0] // size
        self.out = linears(attention, "o_proj", "residual", heads)
        self.gate_up = linears(mlp, "gate_proj up_proj", "swiglu")
        self.down = linears(mlp, "down_proj", "residual", triton.cdiv(self.gate_up.rows[0], CHUNK))
        splits = min(
            triton.next_power_of_2(max(4, LAYOUT.programs // kv_heads)),
            triton.next_power_of_2(triton.cdiv(length, LAYOUT.positions)),
        )
        q_norm, k_norm = (getattr(attention, name, layer.input_layernorm) for name in ("q_norm", "k_norm"))
        self.head_norms = q_norm.weight, k_norm.weight
        self.numbers = q_norm.variance_epsilon, attention.scaling, length
        self.shape = dict(
            HEADS=heads, KV_HEADS=kv_heads, HALF=size // 2, GROUP=max(16, triton.next_power_of_2(heads // kv_heads)), SPLITS=splits,
            POSITIONS=LAYOUT.positions, NORM=hasattr(attention, "q_norm"),
        )  # fmt: skip

    def scratch(self) -> "Scratch":
        heads, splits = self.shape["HEADS"], self.shape["SPLITS"]
        new = functools.partial(torch.zeros, device=self.keys.device, dtype=torch.float32)
        flat = new(self.gate_up.rows[0], dtype=self.keys.dtype)
        return Scratch(new(sum(self.qkv.rows)), new(heads, splits, self.keys.shape[3]), new(heads, splits), flat)

    def __call__(self, hidden: torch.Tensor, position: torch.Tensor, rotary: list, scratch: "Scratch") -> None:
        """Add the layer to hidden, [width], in place. rotary: cos and sin, [positions, head size]."""
        qkv, mixed, logs, flat = scratch
        out, down, shape = self.out, self.down, self.shape
        _norm(hidden, self.norms[0], self.qkv.x, self.qkv)
        self.qkv(hidden, qkv, flat)
        _attention_kernel[(shape["KV_HEADS"], shape["SPLITS"])](
            qkv, self.keys, self.values, position, *rotary, *self.head_norms, mixed, logs, *self.numbers, **shape,
            num_warps=4, **_options(),
        )  # fmt: skip
        _combine_kernel[(shape["HEADS"],)](
            mixed, logs, out.x, out.A[0], out.u, out.ranks[0], K=out.columns, SIZE=mixed.shape[2],
            SPLITS=shape["SPLITS"], RANK=out.rank, TILE=min(max(out.rank, 1), 16), num_warps=4, **_options(),
        )  # fmt: skip
        out(hidden, hidden, flat)
        _norm(hidden, self.norms[1], self.gate_up.x, self.gate_up)
        self.gate_up(hidden, down.x, flat)
        if down.rank:
            _inner_kernel[(down.rank, down.parts)](
                flat, down.A[0], down.u, down.ranks[0], K=down.columns, RANK=down.rank, BLOCK=CHUNK, num_warps=4,
                **_options(),
            )  # fmt: skip
        down(hidden, hidden, flat)


class Scratch(NamedTuple):
    """What layers leave to their own next kernel; one after the other they share it."""

    qkv: torch.Tensor  # fp32 [outputs of q, k and v]
    mixed: torch.Tensor  # fp32 [heads, splits, head size]
    logs: torch.Tensor  # fp32 [heads, splits]
    flat: torch.Tensor  # [MLP width]


class DecodeStep:
    """One token's pass through a 4-bit Qwen2, Qwen3, Llama or Mistral with at most one active LoRA adapter.

    ids: int64 [1, 1]; position: int64 [1] on the model's device, below the cache's length -> logits [1, vocabulary],
    fp32. Attends to positions 0 to `position` of the cache, where it writes the new key and value; the cache's own
    count of tokens is left alone. Nothing is read on the host, so a CUDA graph can hold a call once a first one has
    compiled. Weights are read where the modules have them; which adapter is active is settled here. Raises Unsupported.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, cache: StaticCache):
        _check(triton is not None, "Triton is not installed (Windows: pip install triton-windows)")
        if isinstance(model, PeftModel):
            _check(not model.active_peft_config.is_prompt_learning, "the adapter is a learned prompt")
            model = model.get_base_model()
        _check(type(model).__name__ in MODELS, f"{type(model).__name__} is unknown")
        decoder, dtype, device = model.get_decoder(), model.dtype, model.device
        _check(dtype in (torch.bfloat16, torch.float16), f"the model computes in {dtype}")
        _check_norm(decoder.norm)
        rope = decoder.rotary_emb.rope_type
        _check(rope not in ("dynamic", "longrope"), f"rotary embedding {rope} depends on the length")
        self.embedding, self.head, self.norm = model.get_input_embeddings(), model.get_output_embeddings(), decoder.norm
        _check(len(decoder.layers) == len(cache.layers), "the cache has another number of layers than the model")
        self.layers = [Layer(*pair, dtype) for pair in zip(decoder.layers, cache.layers, strict=True)]
        kinds = {(layer.keys.shape, layer.keys.dtype, layer.keys.device, layer.qkv.x.device) for layer in self.layers}
        _check(
            kinds == {(self.layers[0].keys.shape, dtype, device, device)},
            "layers or the cache differ in shape, dtype or device",
        )
        self.last = torch.zeros(1, 1, model.config.hidden_size, dtype=dtype, device=device)
        with torch.no_grad():
            positions = torch.arange(self.layers[0].keys.shape[2], device=device)[None]
            self.rotary = [part[0].contiguous() for part in decoder.rotary_emb(self.last, positions)]
        _check(self.rotary[0].shape[1] == self.layers[0].keys.shape[3], "rotary embedding of a part of each head")
        _check(INTERPRETED or (device.type == "cuda" and not torch.version.hip), f"the model is on {device}")
        self.scratch = self.layers[0].scratch()

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids).flatten()
        for layer in self.layers:
            layer(hidden, position, self.rotary, self.scratch)
        _norm(hidden, self.norm, self.last)
        return self.head(self.last)[0].float()
