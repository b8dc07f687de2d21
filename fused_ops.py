"""What makes training fast without changing what is learned: dropout masks without state, attention without a mask tensor,
and cross entropy over a frozen head that never holds the logits whole.
"""

import dataclasses
import functools
import logging
import sys
import zlib
from collections.abc import Callable

import bitsandbytes as bnb
import torch
import torch._functorch.config
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config import ConfigError, PerformanceConfig

# ------------------------------------------------------------------------------------------------ stateless dropout


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers, in place (lowbias32 of C. Wellons, "Prospecting for Hash Functions", 2018).

    x: int32, any shape; products wrap. The logical shifts are arithmetic ones with the sign bits masked away.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846CA68B as a signed number
    x ^= (x >> 16) & 0xFFFF
    return x


def int32(number: int) -> int:
    """Return the signed number with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


class DropoutClock:
    """Which sequences of which optimizer step the model is seeing, as device tensors that a captured graph reads anew.

    step: int32 scalar. sequences: int32 [batch], each row's number within the step's window over all micro-batches and
    processes, so that another micro-batch shape, a recompute or a resumed run meets the same masks with no RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Name the optimizer step and the rows of the micro-batch about to run."""
        self.step.fill_(step)
        sequences = sequences.to(torch.int32)
        if (
            self.step.is_cuda and not sequences.is_cuda
        ):  # a copy from pageable memory would wait for the GPU at every micro-step
            sequences = sequences.pin_memory()
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences, non_blocking=True)
        else:
            self.sequences = sequences.to(self.step.device, non_blocking=True)
        self._last = None

    def salted(self, salt: int) -> int:
        """Return the run's seed and a module's salt as one signed 32-bit number."""
        return int32(self.seed * 0x9E3779B1 ^ salt)

    def row_keys(self, salt: int, length: int) -> torch.Tensor:
        """Return a 32-bit key for each position, int32 [batch, length], of the modules that share `salt`."""
        key = mix(self.step ^ self.salted(salt))
        key = mix(key ^ self.sequences)
        position = torch.arange(length, dtype=torch.int32, device=key.device)
        return mix(key[:, None] ^ mix(position)[None])

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs survive, bool [batch, length, features]; the modules that read one x ask in turn for one mask."""
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            feature = torch.arange(features, dtype=torch.int32, device=self.step.device)
            bits = mix(self.row_keys(salt, length)[..., None] ^ (feature * int32(0x9E3779B1)))
            self._last = (asked, ((bits >> 8) & 0xFFFFFF) >= drop_threshold(p))
        return self._last[1]


def drop_threshold(p: float) -> int:
    """Return how many of the 2**24 hash values drop."""
    return round(p * 2**24)


class StatelessDropout(nn.Module):
    """Stands in for peft's nn.Dropout on an adapter's input while training; identity in eval mode. x: [batch, length, features]."""

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.clock.keep(self.salt, x.shape[-2], x.shape[-1], self.p)
        return torch.where(keep, x, 0) * (1 / (1 - self.p))


# Modules that read the same x share a mask, so that one pass over x can serve all of them.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def salt_of(name: str) -> int:
    """Return the number that tells a module's masks, or those of its group of readers, from all others'."""
    parent, _, leaf = name.rpartition(".")
    return zlib.crc32(f"{parent}.{READERS.get(leaf, leaf)}".encode())


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model and return how many were replaced."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt_of(name))
                count += 1
    return count


# ------------------------------------------------------------------------------------------------ attention without a mask

CAUSAL = "sdpa_causal"


def _no_mask(*, kv_length: int, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """Return no mask, so that SDPA takes its is_causal path; a real one where the length exceeds a sliding window."""
    if local_size is None or kv_length <= local_size:
        return None
    return sdpa_mask(kv_length=kv_length, local_size=local_size, **kwargs)


def use_causal_attention(model: nn.Module) -> bool:
    """Train without mask tensors: blocks are full and padding is on the right, so causality alone is exact.

    transformers builds a 4-D mask where it cannot look at the data (in a captured graph); this keeps the fast path of SDPA.
    Returns whether the model was switched: only one that runs `sdpa` is.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(CAUSAL, _no_mask)
    model.set_attn_implementation(CAUSAL)
    return True


# ------------------------------------------------------------------------------------------------ cross entropy, frozen head


def chunk_rows(vocabulary: int, free_bytes: int | None = None) -> int:
    """Return how many positions' logits to hold at once: a tenth of the free memory, at most 512 rows; 256 MiB in fp32 else."""
    if free_bytes is None:
        return max(16, 2**26 // vocabulary)
    return max(128, min(512, free_bytes // 10 // (8 * vocabulary)) // 128 * 128)


def _chunk_loss(rows, weight, bias, targets, with_gradient: bool):
    """Return one chunk's summed loss and the gradient of its rows. rows: [chunk, width]; targets: [chunk]."""
    logits = F.linear(rows.to(weight.dtype), weight, bias).float()  # [chunk, vocabulary]
    kept = (targets != -100).float()[:, None]
    index = targets.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    loss = ((log_sum - logits.gather(1, index)) * kept).sum()
    if not with_gradient:
        return loss, None
    one_hot = torch.arange(len(weight), device=weight.device)[None] == index
    logits.sub_(log_sum).exp_().sub_(one_hot.float()).mul_(kept)  # softmax - one-hot, in the logits' own memory
    return loss, (logits.to(weight.dtype) @ weight).to(rows.dtype)


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, chunk_loss):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            part, rows = chunk_loss(hidden[piece], weight, bias, labels[piece], gradient is not None)
            loss += part
            if gradient is not None:
                gradient[piece] = rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
    chunk_loss: Callable = _chunk_loss,
) -> torch.Tensor:
    """Return the summed cross entropy, fp32, of `hidden @ weight.T + bias` against `labels` without holding all logits.

    hidden: [positions, width]; weight: [vocabulary, width], frozen; labels: [positions], -100 where nothing is supervised.
    The gradient of `hidden` is finished in the forward, chunk by chunk (the idea of Liger-Kernel's fused linear cross entropy);
    `weight` and `bias` get none, so an adapter on the head needs another loss. chunk_loss: `_chunk_loss`, perhaps compiled.
    """
    return _FrozenHeadCrossEntropy.apply(hidden, weight, bias, labels, chunk or chunk_rows(len(weight)), chunk_loss)


compiled_chunk_loss = torch.compile(_chunk_loss, dynamic=False)  # compiles when first called, not here


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each position's next token, [batch, length]; the last position has none (-100)."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


# ------------------------------------------------------------------------------------------------ Triton kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows without triton-windows: the same operators run as a few torch calls
    triton = None

if triton is not None:

    @triton.jit
    def _mix(x):
        """`mix` on uint32, whose shifts are logical."""
        x ^= x >> 16
        x *= 0x7FEB352D
        x ^= x >> 15
        x *= 0x846CA68B
        x ^= x >> 16
        return x

    @triton.jit
    def _keep(step, sequences, salt, rows, columns, length, threshold):
        """The mask of DropoutClock.keep for a tile, bool [rows, columns]."""
        key = _mix((tl.load(step) ^ tl.load(salt)).to(tl.uint32, bitcast=True))
        sequence = tl.load(sequences + rows // length).to(tl.uint32, bitcast=True)
        key = _mix(_mix(key ^ sequence) ^ _mix((rows % length).to(tl.uint32)))
        bits = _mix(key[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B1)[None])
        return (bits >> 8) >= threshold

    @triton.jit
    def _dequantize_kernel(
        packed, absmax, absmax2, offset, code2, lut, B, out, rows, row_blocks, stride, rank, slot, extra, scale, blocksize2, programs,
        NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """Write a run of W's quantisation blocks into [W | scale B]; the programs past the last run write B's columns."""
        program = tl.program_id(0)
        if program < programs:
            block = program * BLOCKS + tl.arange(0, BLOCKS)
            inside = block < rows * row_blocks
            if NESTED:  # one constant a block of 64 weights, itself a code of 8 bits
                constant = tl.load(code2 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
                constant = constant * tl.load(absmax2 + block // blocksize2, mask=inside, other=0.0) + tl.load(offset)
            else:
                constant = tl.load(absmax + block, mask=inside, other=0.0)
            byte = tl.arange(0, BLOCKSIZE // 2)
            codes = tl.load(packed + block[:, None] * (BLOCKSIZE // 2) + byte[None], mask=inside[:, None], other=0)
            high = tl.load(lut + (codes >> 4).to(tl.int32)) * constant[:, None]
            low = tl.load(lut + (codes & 15).to(tl.int32)) * constant[:, None]
            values = tl.interleave(high, low).to(out.dtype.element_ty)  # [BLOCKS, BLOCKSIZE]
            start = (block // row_blocks).to(tl.int64) * stride + (block % row_blocks) * BLOCKSIZE
            tl.store(out + start[:, None] + tl.arange(0, BLOCKSIZE)[None], values, mask=inside[:, None])
        else:
            row = ((program - programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            j = tl.arange(0, BLOCK_R)[None]
            own = (j >= slot) & (j < slot + rank) & (row < rows)
            b = tl.load(B + row * rank + j - slot, mask=own, other=0.0) * scale
            target = out + row * stride + row_blocks * BLOCKSIZE + j
            tl.store(target, b.to(out.dtype.element_ty), mask=(j < extra) & (row < rows))

    @triton.jit
    def _widen_kernel(
        x, out, partial, A0, A1, A2, step, sequences, salt, rows, length, columns, stride, rank, adapter_columns, threshold, inverse,
        per_split, MEMBERS: tl.constexpr, SWIGLU: tl.constexpr, DROPOUT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """Copy x (or SwiGLU of [gate | up]) into the wide operand and sum this split's part of dropout(x) A^T."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        split = tl.program_id(1)
        inside_m = m < rows
        j = tl.arange(0, BLOCK_R)
        sum0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        dtype = out.dtype.element_ty
        for start in range(split * per_split, min((split + 1) * per_split, columns), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = inside_m[:, None] & (k < columns)[None]
            if SWIGLU:
                source = x + m.to(tl.int64)[:, None] * (2 * columns) + k[None]
                gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
                up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
                tile = (gate * tl.sigmoid(gate) * up).to(dtype)
            else:
                tile = tl.load(x + m.to(tl.int64)[:, None] * columns + k[None], mask=inside, other=0.0)
            tl.store(out + m.to(tl.int64)[:, None] * stride + k[None], tile, mask=inside)
            if DROPOUT:
                keep = _keep(step, sequences, salt, m, k, length, threshold)
                tile = tl.where(keep, tile.to(tl.float32) * inverse, 0.0).to(dtype)
            at = j[None] * columns + k[:, None]
            inside_a = (j < rank)[None] & (k < columns)[:, None]
            sum0 = tl.dot(tile, tl.load(A0 + at, mask=inside_a, other=0.0).to(dtype), sum0)
            if MEMBERS > 1:
                sum1 = tl.dot(tile, tl.load(A1 + at, mask=inside_a, other=0.0).to(dtype), sum1)
            if MEMBERS > 2:
                sum2 = tl.dot(tile, tl.load(A2 + at, mask=inside_a, other=0.0).to(dtype), sum2)
        target = partial + (split * rows + m.to(tl.int64)[:, None]) * adapter_columns + j[None]
        inside = inside_m[:, None] & (j < rank)[None]
        tl.store(target, sum0, mask=inside)
        if MEMBERS > 1:
            tl.store(target + rank, sum1, mask=inside)
        if MEMBERS > 2:
            tl.store(target + 2 * rank, sum2, mask=inside)

    @triton.jit
    def _collect_kernel(
        partial, out, u, rows, columns, stride, used, adapter_columns, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
    ):  # fmt: skip
        """Add the splits' parts of u and write it behind x, and alone."""
        m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        j = tl.arange(0, BLOCK_R)
        inside = (m < rows)[:, None] & (j < used)[None]
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in range(SPLITS):
            total += tl.load(partial + (split * rows + m[:, None]) * adapter_columns + j[None], mask=inside, other=0.0)
        inside = (m < rows)[:, None] & (j < adapter_columns)[None]
        total = total.to(out.dtype.element_ty)
        tl.store(out + m[:, None] * stride + columns + j[None], total, mask=inside)
        tl.store(u + m[:, None] * adapter_columns + j[None], total, mask=inside)

    @triton.jit
    def _adapter_backward_kernel(
        wide, x, dx, partial, A0, A1, A2, step, sequences, salt, rows, length, columns, stride, rank, threshold, inverse, per_split,
        MEMBERS: tl.constexpr, SWIGLU: tl.constexpr, DROPOUT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """From [dx | du] make dx + mask (du A) (through SwiGLU where asked) and this split's part of dA = du^T dropout(x)."""
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        split = tl.program_id(1)
        inside_k = k < columns
        j = tl.arange(0, BLOCK_R)
        dtype = dx.dtype.element_ty
        at = j[:, None] * columns + k[None]
        inside_a = (j < rank)[:, None] & inside_k[None]
        a0 = tl.load(A0 + at, mask=inside_a, other=0.0).to(dtype)
        sum0 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        sum1 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        sum2 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        a1 = a0
        a2 = a0
        if MEMBERS > 1:
            a1 = tl.load(A1 + at, mask=inside_a, other=0.0).to(dtype)
        if MEMBERS > 2:
            a2 = tl.load(A2 + at, mask=inside_a, other=0.0).to(dtype)
        for start in range(split * per_split, min((split + 1) * per_split, rows), BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            inside_m = m < rows
            inside = inside_m[:, None] & inside_k[None]
            source = wide + m.to(tl.int64)[:, None] * stride
            grad = tl.load(source + k[None], mask=inside, other=0.0).to(tl.float32)
            inside_j = inside_m[:, None] & (j < rank)[None]
            du0 = tl.load(source + columns + j[None], mask=inside_j, other=0.0)
            du1 = du0
            du2 = du0
            back = tl.dot(du0, a0)
            if MEMBERS > 1:
                du1 = tl.load(source + columns + rank + j[None], mask=inside_j, other=0.0)
                back = tl.dot(du1, a1, back)
            if MEMBERS > 2:
                du2 = tl.load(source + columns + 2 * rank + j[None], mask=inside_j, other=0.0)
                back = tl.dot(du2, a2, back)
            if SWIGLU:
                place = m.to(tl.int64)[:, None] * (2 * columns) + k[None]
                gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
                up = tl.load(x + place + columns, mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                tile = (gate * sigmoid * up).to(dtype).to(tl.float32)
            else:
                place = m.to(tl.int64)[:, None] * columns + k[None]
                tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                keep = _keep(step, sequences, salt, m, k, length, threshold)
                tile = tl.where(keep, tile * inverse, 0.0)
                back = tl.where(keep, back * inverse, 0.0)
            grad += back
            tile = tile.to(dtype)
            sum0 = tl.dot(tl.trans(du0), tile, sum0)
            if MEMBERS > 1:
                sum1 = tl.dot(tl.trans(du1), tile, sum1)
            if MEMBERS > 2:
                sum2 = tl.dot(tl.trans(du2), tile, sum2)
            if SWIGLU:
                tl.store(dx + place, (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)
                tl.store(dx + place + columns, (grad * gate * sigmoid).to(dtype), mask=inside)
            else:
                tl.store(dx + place, grad.to(dtype), mask=inside)
        target = partial + split * MEMBERS * rank * columns + at
        tl.store(target, sum0, mask=inside_a)
        if MEMBERS > 1:
            tl.store(target + rank * columns, sum1, mask=inside_a)
        if MEMBERS > 2:
            tl.store(target + 2 * rank * columns, sum2, mask=inside_a)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is laid on a GPU; chosen by measurement, see tests/benchmarks/tune_kernels.py."""

    block_m: int
    block_k: int
    warps: int
    programs: int  # into how many to cut the work, about

    def split(self, programs: int, size: int, block: int) -> tuple[int, int]:
        """Return (splits of a loop over `size`, elements a split, a multiple of `block`)."""
        splits = max(1, min(triton.cdiv(size, block), self.programs // max(1, programs)))
        per_split = triton.cdiv(triton.cdiv(size, splits), block) * block
        return triton.cdiv(size, per_split), per_split


def widen_launch(rows: int, rank: int, swiglu: bool) -> Launch:
    """Return the layout of the kernel behind `widen`."""
    return Launch(block_m=32 if rows >= 2048 else 16, block_k=128 if rank <= 32 else 64, warps=4, programs=1056)


def backward_launch(rows: int, rank: int, swiglu: bool) -> Launch:
    """Return the layout of the kernel behind `widen_backward`."""
    return Launch(
        block_m=32, block_k=128 if rank <= 16 else 64 if rank <= 32 else 32, warps=4, programs=1056 if swiglu else 528
    )


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())  # tl.dot takes powers of two from 16 on


# ------------------------------------------------------------------------------------------------ operators
#
# Linears that read one x and their rank-r adapters are two operators, each with the gradient of its own arithmetic:
#   widen:    x -> [x | u],  u = dropout(x) A^T            (SwiGLU first, where x is [gate | up])
#   product:  [x | u] -> [x | u] [W | scale B]^T + bias    W dequantised, used and dropped
# The adapter rides in the base product's own reduction, so no pass reads and writes whole activations for y += u B^T, and the
# product's backward yields dx and du at once. As opaque operators they keep a compiler from saving the dequantised W.


def wide(rank: int, members: int) -> int:
    """Return the adapter's columns in the wide operands: a multiple of 16, so that rows stay aligned for the matrix units."""
    return -(-rank * members // 16) * 16


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _mask(step, sequences, salt, length: int, features: int, p: float) -> torch.Tensor:
    """The mask of DropoutClock.keep, bool [rows, features]."""
    key = mix(mix(step ^ salt) ^ sequences)
    position = mix(torch.arange(length, dtype=torch.int32, device=step.device))
    keys = mix(key[:, None] ^ position[None]).flatten()
    feature = torch.arange(features, dtype=torch.int32, device=step.device) * int32(0x9E3779B1)
    return ((mix(keys[:, None] ^ feature[None]) >> 8) & 0xFFFFFF) >= drop_threshold(p)


@torch.library.custom_op("qlora::widen", mutates_args=())
def widen(
    x: torch.Tensor, A: list[torch.Tensor], step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor, length: int, p: float,
    swiglu: bool, kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return ([x | u | 0], [u | 0]), u = dropout(x) A^T of all members. x: [rows, columns], or [rows, 2 columns] with swiglu."""
    rank, columns = A[0].shape
    rows, extra = len(x), wide(rank, len(A))
    if not kernels:
        x = _swiglu(x) if swiglu else x
        dropped = torch.where(_mask(step, sequences, salt, length, columns, p), x, 0) * (1 / (1 - p)) if p > 0 else x
        u = F.pad(dropped @ torch.cat(A).to(x.dtype).t(), (0, extra - rank * len(A)))
        return torch.cat([x, u], 1), u
    out = x.new_empty(rows, columns + extra)
    u = x.new_empty(rows, extra)
    launch = widen_launch(rows, rank, swiglu)
    programs = triton.cdiv(rows, launch.block_m)
    splits, per_split = launch.split(programs, columns, launch.block_k)
    partial = x.new_empty(splits, rows, extra, dtype=torch.float32)
    _widen_kernel[(programs, splits)](
        x, out, partial, A[0], A[min(1, len(A) - 1)], A[-1], step, sequences, salt, rows, length, columns, columns + extra, rank,
        extra, drop_threshold(p), 1 / (1 - p), per_split, MEMBERS=len(A), SWIGLU=swiglu, DROPOUT=p > 0,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=_power(rank), num_warps=launch.warps,
    )  # fmt: skip
    _collect_kernel[(triton.cdiv(rows, 32),)](
        partial,
        out,
        u,
        rows,
        columns,
        columns + extra,
        rank * len(A),
        extra,
        SPLITS=splits,
        BLOCK_M=32,
        BLOCK_R=_power(extra),
    )
    return out, u


@widen.register_fake
def _(x, A, step, sequences, salt, length, p, swiglu, kernels):
    extra = wide(A[0].shape[0], len(A))
    return x.new_empty(x.shape[0], A[0].shape[1] + extra), x.new_empty(x.shape[0], extra)


@torch.library.custom_op("qlora::widen_backward", mutates_args=())
def widen_backward(
    grad: torch.Tensor, x: torch.Tensor, A: list[torch.Tensor], step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor,
    length: int, p: float, swiglu: bool, kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dx, dA of all members [members rank, columns] in fp32) from grad = [dx | du]."""
    rank, columns = A[0].shape
    rows, used = len(x), rank * len(A)
    if not kernels:
        tile = _swiglu(x) if swiglu else x
        du = grad[:, columns : columns + used]
        back = du @ torch.cat(A).to(grad.dtype)
        if p > 0:
            keep, scale = _mask(step, sequences, salt, length, columns, p), 1 / (1 - p)
            tile, back = torch.where(keep, tile, 0) * scale, torch.where(keep, back, 0) * scale
        dx = grad[:, :columns] + back
        dA = (du.t() @ tile).float()
        if swiglu:
            gate, up = x.float().chunk(2, -1)
            sigmoid, dx = torch.sigmoid(gate), dx.float()
            dx = torch.cat([dx * up * sigmoid * (1 + gate * (1 - sigmoid)), dx * gate * sigmoid], 1).to(x.dtype)
        return dx, dA
    dx = torch.empty_like(x)
    launch = backward_launch(rows, rank, swiglu)
    programs = triton.cdiv(columns, launch.block_k)
    splits, per_split = launch.split(programs, rows, launch.block_m)
    partial = x.new_empty(splits, used, columns, dtype=torch.float32)
    _adapter_backward_kernel[(programs, splits)](
        grad, x, dx, partial, A[0], A[min(1, len(A) - 1)], A[-1], step, sequences, salt, rows, length, columns, grad.stride(0), rank,
        drop_threshold(p), 1 / (1 - p), per_split, MEMBERS=len(A), SWIGLU=swiglu, DROPOUT=p > 0,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=_power(rank), num_warps=launch.warps,
    )  # fmt: skip
    return dx, partial.sum(0) if splits > 1 else partial[0]


@widen_backward.register_fake
def _(grad, x, A, step, sequences, salt, length, p, swiglu, kernels):
    rank, columns = A[0].shape
    return torch.empty_like(x), x.new_empty(rank * len(A), columns, dtype=torch.float32)


def _widen_setup(ctx, inputs, output):
    x, A, step, sequences, salt, *ctx.static = inputs
    ctx.members = len(A)
    ctx.save_for_backward(x, step, sequences, salt, *A)
    ctx.set_materialize_grads(False)


def _widen_backward(ctx, grad, _):
    x, step, sequences, salt, *A = ctx.saved_tensors
    dx, dA = widen_backward(grad.contiguous(), x, A, step, sequences, salt, *ctx.static)
    return dx, [part.to(a.dtype) for part, a in zip(dA.chunk(len(A)), A, strict=True)], *[None] * 7


widen.register_autograd(_widen_backward, setup_context=_widen_setup)


def extended_weight(
    packed: list[torch.Tensor], constants: list[torch.Tensor], lut: torch.Tensor, B: list[torch.Tensor], columns: int, scale: float,
    blocksizes: list[int], quant_type: str, dtype: torch.dtype, kernels: bool,
) -> torch.Tensor:  # fmt: skip
    """Return [W | scale B] of all members, [out features, columns + adapter columns], in `dtype`.

    constants: a member's absmax (fp32), or its absmax (uint8), second-level absmax, second-level code and offset.
    """
    nested = len(constants) > len(packed)
    size = 4 if nested else 1
    sizes = [p.numel() * 2 // columns for p in packed]
    rank = B[0].shape[1] if B else 0
    extra = wide(rank, len(B))
    out = torch.empty(sum(sizes), columns + extra, dtype=dtype, device=packed[0].device)
    row = 0
    for i, (codes, n) in enumerate(zip(packed, sizes, strict=True)):
        part, own = out[row : row + n], constants[i * size : (i + 1) * size]
        row += n
        if kernels:
            absmax, absmax2, code2, offset = own if nested else (own[0],) * 4
            row_blocks = columns // blocksizes[0]
            programs, extras = triton.cdiv(n * row_blocks, 64), triton.cdiv(n, 128) if B else 0
            _dequantize_kernel[(programs + extras,)](
                codes, absmax, absmax2, offset, code2, lut, B[i] if B else lut, part, n, row_blocks, out.stride(0), rank, i * rank,
                extra, scale, blocksizes[1], programs, NESTED=nested, BLOCKSIZE=blocksizes[0], BLOCKS=64, ROWS=128,
                BLOCK_R=_power(extra or 1), num_warps=8,
            )  # fmt: skip
            continue
        absmax = own[0]
        if nested:
            absmax = (
                torch.ops.bitsandbytes.dequantize_blockwise(own[0], own[1], own[2], blocksizes[1], torch.float32)
                + own[3]
            )
        W = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, blocksizes[0], quant_type, [n, columns], dtype)
        part[:, :columns] = W
        if B:
            part[:, columns:] = 0
            part[:, columns + i * rank : columns + (i + 1) * rank] = B[i] * scale
    return out


@torch.library.custom_op("qlora::product", mutates_args=())
def product(
    x: torch.Tensor, u: torch.Tensor | None, packed: list[torch.Tensor], constants: list[torch.Tensor], lut: torch.Tensor,
    B: list[torch.Tensor], bias: torch.Tensor | None, columns: int, scale: float, blocksizes: list[int], quant_type: str, kernels: bool,
) -> torch.Tensor:  # fmt: skip
    """Return x [W | scale B]^T + bias, [rows, out features of all members]. x: [rows, columns + adapter columns]; u: its tail."""
    W = extended_weight(packed, constants, lut, B, columns, scale, blocksizes, quant_type, x.dtype, kernels)
    return F.linear(x, W, bias)


@product.register_fake
def _(x, u, packed, constants, lut, B, bias, columns, scale, blocksizes, quant_type, kernels):
    return x.new_empty(x.shape[0], sum(p.numel() * 2 // columns for p in packed))


@torch.library.custom_op("qlora::product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, u: torch.Tensor | None, packed: list[torch.Tensor], constants: list[torch.Tensor], lut: torch.Tensor,
    B: list[torch.Tensor], columns: int, scale: float, blocksizes: list[int], quant_type: str, kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (grad [W | scale B], d(scale B) of all members side by side, [out features, adapter columns])."""
    W = extended_weight(packed, constants, lut, B, columns, scale, blocksizes, quant_type, grad.dtype, kernels)
    return grad @ W, grad.t() @ u if u is not None else grad.new_empty(0)


@product_backward.register_fake
def _(grad, u, packed, constants, lut, B, columns, scale, blocksizes, quant_type, kernels):
    extra = wide(B[0].shape[1], len(B)) if B else 0
    dB = grad.new_empty(grad.shape[1], extra) if u is not None else grad.new_empty(0)
    return grad.new_empty(grad.shape[0], columns + extra), dB


def _product_setup(ctx, inputs, output):
    _, u, packed, constants, lut, B, _, *ctx.static = inputs
    ctx.counts = len(packed), len(constants), len(B)
    ctx.save_for_backward(u, lut, *packed, *constants, *B)


def _product_backward(ctx, grad):
    u, lut, *rest = ctx.saved_tensors
    packed, constants = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts[:2])]
    B = rest[sum(ctx.counts[:2]) :]
    dx, dB = product_backward(grad.contiguous(), u, packed, constants, lut, B, *ctx.static)
    dBs, row = [], 0
    for i, b in enumerate(B):  # the diagonal blocks: member i's rows, member i's columns
        n, rank = b.shape
        dBs.append((dB[row : row + n, i * rank : (i + 1) * rank].to(b.dtype) * ctx.static[1]).contiguous())
        row += n
    return dx, None, [None] * ctx.counts[0], [None] * ctx.counts[1], None, dBs, *[None] * 6


product.register_autograd(_product_backward, setup_context=_product_setup)


# ------------------------------------------------------------------------------------------------ fused layers


def fusable(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit linear, bare or with one plain LoRA adapter; DoRA and the rest stay peft's."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, bnb.nn.Linear4bit) or getattr(base.weight, "quant_state", None) is None:
        return False
    if module is base:
        return True
    plain = isinstance(module, LoraLinear4bit) and not module.lora_variant and not any(module.lora_bias.values())
    return plain and module.active_adapters == list(module.lora_A) and len(module.lora_A) == 1


class Group:
    """Linears that read one x, as one operator: x [..., columns] (or [..., 2 columns] with swiglu) -> [..., all outputs]."""

    def __init__(self, modules: list[nn.Module], salt: int, clock: DropoutClock, p: float, kernels: bool):
        bases = [getattr(module, "base_layer", module) for module in modules]
        states = [base.weight.quant_state for base in bases]
        adapted = [module for module in modules if hasattr(module, "lora_A")]
        self.leader, self.clock, self.p = modules[0], clock, p
        self.kernels = kernels and bases[0].in_features % states[0].blocksize == 0
        self.outputs = [base.out_features for base in bases]
        self.columns = bases[0].in_features
        self.salt = torch.tensor(clock.salted(salt), dtype=torch.int32, device=bases[0].weight.device)
        self.packed = [base.weight.data.view(torch.uint8).flatten() for base in bases]
        self.constants = [tensor for state in states for tensor in _constants(state)]
        self.lut, self.quant_type = states[0].code, states[0].quant_type
        self.blocksizes = [states[0].blocksize, states[0].state2.blocksize if states[0].nested else 1]
        biases = [base.bias for base in bases]
        self.bias = torch.cat([bias.detach() for bias in biases]) if all(bias is not None for bias in biases) else None
        self.A = [next(iter(module.lora_A.values())).weight for module in adapted]
        self.B = [next(iter(module.lora_B.values())).weight for module in adapted]
        self.scale = float(next(iter(adapted[0].scaling.values()))) if adapted else 0.0

    def __call__(self, x: torch.Tensor, swiglu: bool = False) -> torch.Tensor:
        *shape, width = x.shape
        rows, u, B = x.reshape(-1, width), None, self.B
        if B and not self.leader.disable_adapters:
            p = self.p if self.leader.training else 0.0
            rows, u = widen(
                rows, self.A, self.clock.step, self.clock.sequences, self.salt, shape[-1], p, swiglu, self.kernels
            )  # fmt: skip
        else:
            B, rows = [], _swiglu(rows) if swiglu else rows
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        y = product(
            rows, u, self.packed, self.constants, self.lut, B, bias, self.columns, self.scale, self.blocksizes, self.quant_type, self.kernels
        )  # fmt: skip
        return y.view(*shape, -1)


def _constants(state: bnb.functional.QuantState) -> list[torch.Tensor]:
    if not state.nested:
        return [state.absmax]
    return [state.absmax, state.state2.absmax, state.state2.code, state.offset]


def _groupable(modules: list[nn.Module]) -> bool:
    """Return whether the modules can share a Group: all 4-bit, and all or none with an adapter, biased or not, of one kind."""
    if not all(fusable(module) for module in modules):
        return False
    bases = [getattr(module, "base_layer", module) for module in modules]
    kinds = {
        (
            hasattr(module, "lora_A"), base.bias is None, base.weight.quant_state.nested, base.weight.quant_state.quant_type,
            base.in_features, base.weight.quant_state.blocksize,
        )
        for module, base in zip(modules, bases, strict=True)
    }  # fmt: skip
    return len(kinds) == 1


# Attention and MLP classes whose forward is the one below; what is not here keeps its own, with each linear fused alone.
ATTENTIONS = {"Qwen2Attention", "Qwen3Attention", "LlamaAttention", "MistralAttention"}
MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}


def _fused_attention(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    """The attention of Qwen2, Qwen3, Llama and Mistral with q, k and v in one operator. hidden_states: [batch, length, width]."""
    shape = hidden_states.shape[:-1]
    parts = self.fused_qkv(hidden_states).split(self.fused_qkv.outputs, -1)
    q, k, v = (part.view(*shape, -1, self.head_dim) for part in parts)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    v = v.transpose(1, 2).contiguous()  # else the backward would keep all of q, k and v for the sake of v
    mixed, weights = sdpa_attention_forward(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.fused_out(mixed.reshape(*shape, -1)), weights


def _fused_mlp(self, x):
    """down(silu(gate) * up) with gate and up in one operator and SwiGLU at the head of the other."""
    return self.fused_down(self.fused_gate_up(x), swiglu=True)


def _fused_linear(self, x, *args, **kwargs):
    return self.fused_alone(x)


@functools.cache
def _with_forward(kind: type, forward: Callable) -> type:
    """Return a subclass of a module's class with another forward: one class for all layers, so that one compilation serves them."""
    return type("Fused" + kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _switch(module: nn.Module, forward: Callable, **groups: Group) -> None:
    module.__class__ = _with_forward(type(module), forward)
    for name, group in groups.items():
        setattr(module, "fused_" + name, group)  # no nn.Module: the parameters stay where peft put and saves them


def fuse(model: PeftModel, clock: DropoutClock, p: float, kernels: bool) -> int:
    """Give every 4-bit linear of the decoder layers its operator and return how many; peft keeps the parameters."""
    names = {module: name for name, module in model.named_modules()}
    fused: set[nn.Module] = set()

    def group(*modules: nn.Module) -> Group:
        fused.update(modules)
        return Group(list(modules), salt_of(names[modules[0]]), clock, p, kernels)

    for layer in model.get_base_model().get_decoder().layers:
        for module in list(layer.modules()):
            kind = type(module).__name__
            if kind in ATTENTIONS and module.config._attn_implementation == CAUSAL:
                qkv = [module.q_proj, module.k_proj, module.v_proj]
                if _groupable(qkv) and fusable(module.o_proj):
                    _switch(module, _fused_attention, qkv=group(*qkv), out=group(module.o_proj))
            elif kind in MLPS and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
                gate_up = [module.gate_proj, module.up_proj]
                if _groupable(gate_up) and fusable(module.down_proj):
                    _switch(module, _fused_mlp, gate_up=group(*gate_up), down=group(module.down_proj))
        for module in list(layer.modules()):
            if module not in fused and hasattr(module, "lora_A") and fusable(module):
                _switch(module, _fused_linear, alone=group(module))
    return len(fused)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what `widen` makes of [gate | up]: of its outputs the backward reads only u, 32 bytes a token, and the recompute of the
    whole SwiGLU pass for it took 3 % of a step."""
    keep = op is torch.ops.qlora.widen.default and args[7]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_small_products():
    return create_selective_checkpoint_contexts(_policy)


def _run_layer(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """A decoder layer, its checkpoint inside, so that a compiler drops from the recompute what the backward does not read."""
    forward = type(layer).forward
    if layer.recompute and layer.training and torch.is_grad_enabled():
        return checkpoint(
            forward, layer, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_small_products, **kwargs
        )  # fmt: skip
    return forward(layer, hidden, **kwargs)


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder layer once for all layers, for training; evaluation, a fiftieth of the work, runs as it is."""
    # A norm's output is a product of what is saved anyway; the partitioner would save it too, since an opaque operator reads it:
    # 8 kB a token and layer of Qwen2.5-3B.
    torch._functorch.config.ban_recompute_materialized_backward = False
    logging.getLogger("torch._dynamo.variables.higher_order_ops").addFilter(
        lambda record: "context_fn" not in record.getMessage()
    )
    compiled = torch.compile(_run_layer, dynamic=False)

    def run(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        if (
            torch.is_grad_enabled() and not hidden.requires_grad
        ):  # the embedding's output: else the first layer compiles anew
            hidden = hidden.detach().requires_grad_()
        return (compiled if layer.training else _run_layer)(layer, hidden, **kwargs)

    for layer in model.get_base_model().get_decoder().layers:
        layer.recompute, layer.gradient_checkpointing = (
            layer.gradient_checkpointing,
            False,
        )  # ours, not transformers' around it
        layer.forward = functools.partial(run, layer)


# ------------------------------------------------------------------------------------------------ captured micro-step


class CapturedStep:
    """A micro-batch's forward and backward as one CUDA graph: what is launched 10,000 times a step is launched once.

    step(input_ids, labels) -> loss must be free of host synchronisation. Gradients accumulate in place in the parameters' .grad, which
    must exist; the dropout clock's tensors are read anew at every replay.
    """

    def __init__(
        self, step: Callable[..., torch.Tensor], clock: DropoutClock, batch: int, length: int, parameters: list
    ):
        device = clock.step.device
        self.clock, self.shape = clock, (batch, length)
        self.input_ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.labels = torch.full_like(self.input_ids, -100)
        clock.set(0, torch.arange(batch))
        before = [p.grad.clone() for p in parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets every library allocate its workspace outside of the graph
                step(self.input_ids, self.labels)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step(self.input_ids, self.labels)
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad.copy_(grad)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Replay on a batch of up to the captured shape; what is missing is padded and unlabelled. The clock must be set."""
        rows, length = input_ids.shape
        if (rows, length) != self.shape:
            self.input_ids.zero_()
            self.labels.fill_(-100)
        self.input_ids[:rows, :length].copy_(input_ids, non_blocking=True)
        self.labels[:rows, :length].copy_(labels, non_blocking=True)
        self.graph.replay()
        return self.loss


# ------------------------------------------------------------------------------------------------ what runs here


@dataclasses.dataclass(frozen=True)
class FastPath:
    """Which parts of the fast path run, and the line that says so and why the others do not."""

    fused_lora: bool
    compile: bool
    cuda_graphs: bool
    kernels: bool  # the operators' Triton kernels
    line: str


def choose_fast_path(
    performance: PerformanceConfig, model: PeftModel, dtype: torch.dtype, device: torch.device
) -> FastPath:
    """Return what of performance.fused_lora, compile and cuda_graphs runs here; ConfigError where `on` asks what cannot."""
    gpu, runs, reasons = device.type == "cuda", {}, {}
    layers = model.get_base_model().get_decoder().layers
    fusables = any(fusable(module) and hasattr(module, "lora_A") for layer in layers for module in layer.modules())

    def decide(name: str, obstacle: str | None) -> bool:
        wanted = getattr(performance, name)
        if wanted == "on" and obstacle:
            raise ConfigError(f"performance.{name}: cannot be on here: {obstacle}")
        runs[name] = wanted == "on" or (wanted == "auto" and not obstacle and gpu)
        if not runs[name]:
            reasons[name] = "off" if wanted == "off" else obstacle or "gains nothing on a CPU"
        return runs[name]

    fused = decide("fused_lora", None if fusables else "no plain LoRA adapter on a 4-bit linear")
    no_triton = gpu and triton is None and "Triton is not installed (Windows: pip install triton-windows)"
    compiled = decide("compile", no_triton or (None if fused else "it needs fused_lora"))
    graphs = decide("cuda_graphs", None if gpu else "there is no CUDA GPU")
    kernels = gpu and triton is not None and dtype is not torch.float32  # tl.dot would round fp32 to tf32
    line = "fast path: " + (", ".join(name for name, on in runs.items() if on) or "none")
    line += "".join(f" | without {name}: {reason}" for name, reason in reasons.items())
    return FastPath(fused, compiled, graphs, kernels, line)
