"""The product of FP8 operands on a Hopper (compute capability 9.0), written in Gluon, the lower level of Triton's language.

`product_kernel` in fp8_kernels.py computes the same on every GPU. Here the warps have roles: one warp asks Hopper's copy engine
for the tiles of the operands, others multiply them. A program stays on its multiprocessor and takes one tile of the result after
another, so the operands of the next tile arrive while this one is scaled and written. There are two forms:

- large tiles: two groups of four warps multiply the same tile, 64 rows each. Operands are read least often; a whole chip runs at
  its power limit, and what it reads takes power.
- tiles in turn: each group multiplies a tile of its own, one while the other scales and writes. On a part of a chip this was
  faster (docs/measurements.md, "Constants in the code").
"""

import sys
from typing import NamedTuple

import torch

from fast_path.nf4 import HAS_TRITON, INTERPRETED, Absent, multiprocessors, triton
from fast_path.packed_weights import dot_size

# Gluon is experimental: its names change from one version of Triton to the next. With these versions the kernel was compiled
# (tests/fast_path/test_hopper_product.py compiles it with the installed one). With others, and with builds that lack Gluon,
# fp8.py takes the other products.
VERSIONS = ("3.6", "3.7", "3.8", "3.9")
HAS_GLUON = HAS_TRITON and not INTERPRETED and not torch.version.hip and sys.platform != "win32"
try:
    if not HAS_GLUON or ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
        raise ImportError
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
    RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
except (ImportError, AttributeError):  # a build without Gluon, or with other names
    HAS_GLUON = False
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = Absent()
    copy_in = copy_out = RENAMED = gl


class Form(NamedTuple):
    """The tiles of the kernel.

    outputs: of a tile, which has ROWS rows. turns: how many tiles a program has under way. stages: the steps whose operands lie
    in shared memory. group: the tiles of rows that take one tile of outputs after another, so that both operands stay in the L2
    cache.
    """

    outputs: int
    turns: int
    stages: int
    group: int


# They use 208 and 224 of the 227 KiB of shared memory: 3 x 48 KiB of operands and 64 of results, and 5 x 32 and 2 x 32.
LARGE = Form(256, 1, 3, 16)
IN_TURN = Form(128, 2, 5, 16)
ROWS, INNER = 128, 128  # INNER: the products that are summed up in a step
ADAPTER_COLUMNS = INNER // 2  # in 16 bit they fit the place of an operand in FP8
# In turn, all adapter columns of a tile wait in places of their own, beside the last step of a and b.
MOST_ADAPTER_COLUMNS = (IN_TURN.stages - 1) * ADAPTER_COLUMNS
MULTIPLY_REGISTERS, COPY_REGISTERS = 240, 24  # of a thread; one that multiplies holds 128 sums


def runs_on(device: torch.device) -> bool:
    """Return whether this kernel runs on a device."""
    return HAS_GLUON and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def lost(rows: int, outputs: int, programs: int, form: Form) -> float:
    """Return the time that is lost as a share of the time that the product needs if every multiprocessor always works.

    It is lost by partial tiles and while the last tiles are computed. programs: the multiprocessors.
    """
    rounds = -(-(-(-rows // ROWS) * -(-outputs // form.outputs)) // programs)
    return rounds * programs * ROWS * form.outputs / (rows * outputs) - 1


def product(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor | None, dtype: torch.dtype,
    u: torch.Tensor | None, B: torch.Tensor | None, bias: torch.Tensor | None, form: Form,
) -> torch.Tensor:  # fmt: skip
    """Return what `fp8.product` does. u, B: in bfloat16, with a multiple of 8 and at most MOST_ADAPTER_COLUMNS columns."""
    (rows, inner), outputs, extra = a.shape, len(b), 0 if u is None else u.shape[1]
    if extra > MOST_ADAPTER_COLUMNS:  # the kernel would wait for ever
        raise ValueError(f"at most {MOST_ADAPTER_COLUMNS} adapter columns, got {extra}")
    out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    left, right = _described(a, ROWS, INNER, gl.float8e4nv), _described(b, form.outputs, INNER, gl.float8e4nv)
    target = _described(out, ROWS, form.outputs, gl.bfloat16)
    added = (target, target)  # nothing reads them
    if extra:
        sizes = (u, ROWS), (B, form.outputs)
        added = tuple(_described(x, size, ADAPTER_COLUMNS, gl.bfloat16) for x, size in sizes)
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, form.outputs)
    hopper_product_kernel[(min(tiles, multiprocessors(a.device)),)](
        left, right, *added, target, a_scales, a_scales if b_scales is None else b_scales, out if bias is None else bias,
        rows, outputs, inner, extra, SCALED=b_scales is not None, BIAS=bias is not None,
        BLOCK_R=min(dot_size(extra), ADAPTER_COLUMNS) if extra else 0, STAGES=form.stages, GROUP=form.group,
        TURNS=form.turns, MULTIPLY_REGISTERS=MULTIPLY_REGISTERS, COPY_REGISTERS=COPY_REGISTERS, num_warps=warps(form),
    )  # fmt: skip
    return out


def warps(form: Form) -> int:
    """Return the warps that multiply a tile; in turn, as many more multiply the other one."""
    return 8 // form.turns


def _described(x: torch.Tensor, rows: int, columns: int, dtype):
    """Return what the copy engine must know of a tensor to take tiles from it; outside of the tensor there are zeros."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


# ------------------------------------------------------------------------------------------------ the kernel
#
# The operands of STAGES steps lie in shared memory, whose places are used in turn. Each place has two barriers: `full` opens when
# the copy engine has written it, `empty` when it has been multiplied. A barrier tells only odd phases from even ones: waiting for
# the phase before the first one returns at once, and one may wait for a phase only once the phase before it has ended. All roles
# count the same steps.


@gluon.jit
def _tile(number, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Return the place of a tile: GROUP tiles of rows take one tile of outputs after another."""
    first = number // (GROUP * tiles_n) * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    place = number % (GROUP * tiles_n)
    return first + place % size, place // size


@gluon.jit
def _seen_as(memory, descriptor):
    """Return the memory of a tile in FP8 as one of as many bytes, as another descriptor describes it."""
    if RENAMED:
        return memory.reinterpret(descriptor.dtype, descriptor.block_shape, descriptor.layout)
    else:
        return memory._reinterpret(descriptor.dtype, descriptor.block_shape, descriptor.layout)


@gluon.jit
def _copy_step(
    left, right, m, n, k, step, left_tile, right_tile, full, empty, BYTES: gl.constexpr, STAGES: gl.constexpr
):
    """Start the copies of one step, as soon as its place is empty."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    copy_in(left, [m, k], full.index(slot), left_tile)
    copy_in(right, [n, k], full.index(slot), right_tile)


@gluon.jit
def _copy(
    a, b, u, B, a_tiles, b_tiles, full, empty, tiles_m, tiles_n, inner, extra, BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Copy the operands of all tiles of a program, each time followed by those of u B^T. One warp does this."""
    BLOCK_M: gl.constexpr = a.block_shape[0]
    BLOCK_N: gl.constexpr = b.block_shape[0]
    BLOCK_K: gl.constexpr = a.block_shape[1]
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    step = 0
    for number in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _tile(number, tiles_m, tiles_n, GROUP)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        for k in range(0, inner, BLOCK_K):
            slot = step % STAGES
            _copy_step(a, b, m, n, k, step, a_tiles.index(slot), b_tiles.index(slot), full, empty, BYTES, STAGES)
            step += 1
        if BLOCK_R:
            for k in range(0, extra, BLOCK_K // 2):
                slot = step % STAGES
                left, right = _seen_as(a_tiles.index(slot), u), _seen_as(b_tiles.index(slot), B)
                _copy_step(u, B, m, n, k, step, left, right, full, empty, BYTES, STAGES)
                step += 1


@gluon.jit
def _multiply(
    u, B, out, a_scales, b_scales, bias, a_tiles, b_tiles, result, full, empty, turns, tiles_m, tiles_n, rows, outputs, inner,
    extra, SCALED: gl.constexpr, BIAS: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    TURN: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Multiply, scale, add the adapters and the bias, and write; each TURNS-th tile of the program, from its TURN-th one on."""
    BLOCK_M: gl.constexpr = out.block_shape[0]
    BLOCK_N: gl.constexpr = out.block_shape[1]
    BLOCK_K: gl.constexpr = a_tiles.shape[2]
    # What one instruction multiplies: all outputs and 32 bytes of the axis that is summed, which are 16 numbers in 16 bit.
    sums8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    sums16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    steps = gl.cdiv(inner, BLOCK_K)
    if BLOCK_R:
        steps += gl.cdiv(extra, BLOCK_K // 2)
    step, phase = TURN * steps, 0
    for number in range(gl.program_id(0) + TURN * gl.num_programs(0), tiles_m * tiles_n, TURNS * gl.num_programs(0)):
        tile_m, tile_n = _tile(number, tiles_m, tiles_n, GROUP)
        m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, sums8))
        n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, sums8))
        a_scale = gl.load(a_scales + m, mask=m < rows, other=0.0)  # now, so that nothing waits for memory at the end
        if SCALED:
            b_scale = gl.load(b_scales + n, mask=n < outputs, other=0.0)
        total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, sums8)
        if TURNS > 1:  # until the tile before has seen all its copies end, so that no phase is waited for too early
            mbarrier.wait(turns.index(TURN), phase ^ (1 - TURN))
            phase ^= 1
        for k in range(0, inner, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            total = warpgroup_mma(a_tiles.index(slot), b_tiles.index(slot).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))  # the step before is done
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        if TURNS > 1:
            if BLOCK_R:  # copies may end out of order, and the other group waits for the phases that follow these
                for ahead in range(0, gl.cdiv(extra, BLOCK_K // 2)):
                    mbarrier.wait(full.index((step + ahead) % STAGES), (step + ahead) // STAGES & 1)
            mbarrier.arrive(turns.index(1 - TURN))
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        total *= gl.expand_dims(a_scale, 1)
        if SCALED:
            total *= gl.expand_dims(b_scale, 0)
        if BLOCK_R:
            for _ in range(0, extra, BLOCK_K // 2):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                left = _seen_as(a_tiles.index(slot), u).slice(0, BLOCK_R, 1)
                right = _seen_as(b_tiles.index(slot), B).slice(0, BLOCK_R, 1)
                added = warpgroup_mma(left, right.permute((1, 0)), gl.convert_layout(total, sums16))
                total = gl.convert_layout(added, sums8)  # a thread has the same sums in both layouts
                mbarrier.arrive(empty.index(slot))
                step += 1
        step += (TURNS - 1) * steps
        if BIAS:
            total += gl.expand_dims(gl.load(bias + n, mask=n < outputs, other=0.0).to(gl.float32), 0)
        tma.store_wait(0)  # the tile before has been read from `result`
        result.store(total.to(out.dtype))
        fence_async_shared()
        copy_out(out, [tile_m * BLOCK_M, tile_n * BLOCK_N], result)
    tma.store_wait(0)


@gluon.jit
def hopper_product_kernel(
    a, b, u, B, out, a_scales, b_scales, bias, rows, outputs, inner, extra, SCALED: gl.constexpr, BIAS: gl.constexpr,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, TURNS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write a_scales (a b^T) b_scales + u B^T + bias, [rows, outputs]; a, b, u, B and out are descriptors of tensors.

    One-dimensional grid: each program takes every tile whose number it reaches in steps of the number of programs. BLOCK_R: the
    adapter columns that are multiplied at once, 0 without an adapter; extra: all of them. TURNS: the tiles under way.
    """
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, a.block_shape[0], a.block_shape[1]], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, b.block_shape[0], b.block_shape[1]], b.layout)
    results = gl.allocate_shared_memory(out.dtype, [TURNS, out.block_shape[0], out.block_shape[1]], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    tiles_m, tiles_n = gl.cdiv(rows, a.block_shape[0]), gl.cdiv(outputs, b.block_shape[0])
    # The arguments are written out, because a constant that lies in a variable's tuple is none any more.
    if TURNS > 1:
        gl.warp_specialize([
            (_multiply, (
                u, B, out, a_scales, b_scales, bias, a_tiles, b_tiles, results.index(0), full, empty, turns, tiles_m, tiles_n,
                rows, outputs, inner, extra, SCALED, BIAS, BLOCK_R, STAGES, GROUP, 0, TURNS,
            )),
            (_multiply, (
                u, B, out, a_scales, b_scales, bias, a_tiles, b_tiles, results.index(1), full, empty, turns, tiles_m, tiles_n,
                rows, outputs, inner, extra, SCALED, BIAS, BLOCK_R, STAGES, GROUP, 1, TURNS,
            )),
            (_copy, (a, b, u, B, a_tiles, b_tiles, full, empty, tiles_m, tiles_n, inner, extra, BLOCK_R, STAGES, GROUP)),
        ], [4, 1], [MULTIPLY_REGISTERS, COPY_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                u, B, out, a_scales, b_scales, bias, a_tiles, b_tiles, results.index(0), full, empty, turns, tiles_m, tiles_n,
                rows, outputs, inner, extra, SCALED, BIAS, BLOCK_R, STAGES, GROUP, 0, TURNS,
            )),
            (_copy, (a, b, u, B, a_tiles, b_tiles, full, empty, tiles_m, tiles_n, inner, extra, BLOCK_R, STAGES, GROUP)),
        ], [1], [COPY_REGISTERS])  # fmt: skip
