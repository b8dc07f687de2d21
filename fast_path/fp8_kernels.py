"""The Triton kernels of products in FP8 (e4m3), for fp8.py and fused_linear.py.

Where they cannot run, the torch calls beside their launches compute the same numbers.
"""

import functools

from fast_path.nf4 import lane_level, levels, tl, triton
from fast_path.training_kernels import _gate, _keep, _key, _row_keys


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
    """Return fp32 numbers in e4m3, rounded to the nearest, ties to even; numbers beyond 448 become 448.

    ROUND: round by arithmetic first, because Triton's interpreter loses the carry from the mantissa to the exponent.
    """
    if ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        whole = (bits & 0xFFF00000).to(tl.float32, bitcast=True)
        small = (
            x + 24576.0
        ) - 24576.0  # below the smallest normal number all steps are 2**-9, as fp32's are near 24576
        x = tl.where(tl.abs(x) < 0.015625, small, whole)
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(tl.float8e4nv)


# ---------------------------------------------------------------------------------------------- unpacking by byte permutation
#
# All weights of a quantisation block have one constant, so a block has only 16 different numbers in e4m3: 16 bytes, four
# registers. They are computed once, and `prmt`, which selects four of eight bytes by four 4-bit selectors, looks up four codes
# in one half of that table at a time; the highest bit of a code then selects one of the halves. With loads, tables and stores
# that is about 5 instructions per weight; with a shuffle, a multiplication and a conversion for each weight it was 12 to 14.

_TABLE = """
ld.global.nc.v4.f32 {{l0, l1, l2, l3}}, [{lut}]; ld.global.nc.v4.f32 {{l4, l5, l6, l7}}, [{lut} + 16];
ld.global.nc.v4.f32 {{l8, l9, l10, l11}}, [{lut} + 32]; ld.global.nc.v4.f32 {{l12, l13, l14, l15}}, [{lut} + 48];"""


def _table_in_ptx(name: str, constant: str) -> str:
    """Return PTX that puts the 16 levels times a constant into four registers, {name}0 to {name}3, in e4m3."""
    lines = [f"mul.f32 v{i}, l{i}, {constant};" for i in range(16)]
    for i in range(4):
        low, high = (f"v{4 * i + 1}, v{4 * i}", f"v{4 * i + 3}, v{4 * i + 2}")
        lines.append(f"cvt.rn.satfinite.e4m3x2.f32 low, {low}; cvt.rn.satfinite.e4m3x2.f32 high, {high};")
        lines.append(f"mov.b32 {name}{i}, {{low, high}};")
    return " ".join(lines)


def _look_up_in_ptx(out: tuple[str, str], word: str, table: str, swapped: bool) -> str:
    """Return PTX that looks up the eight codes of a word; out: two registers of four numbers.

    The high half of a byte is the first of its two weights. Swapped: the numbers are in the order of the weights; else in the
    order of the halves, 1, 0, 3, 2 and so on, which takes two instructions less.
    """
    lines = [f"and.b32 low7, {word}, 0x77777777; shr.u32 high7, low7, 16;"]
    if swapped:
        lines.append(f"shr.u32 half, {word}, 5; shl.b32 other, {word}, 3; and.b32 half, half, 0x04040404;")
        lines.append("or.b32 half, half, 0x23012301; and.b32 other, other, 0x40404040; or.b32 half, half, other;")
    else:
        lines.append(f"shr.u32 half, {word}, 1; lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;")
    lines.append("shr.u32 other, half, 16;")
    for target, code, which in ((out[0], "low7", "half"), (out[1], "high7", "other")):
        lines.append(f"prmt.b32 below, {table}0, {table}1, {code}; prmt.b32 above, {table}2, {table}3, {code};")
        lines.append(f"prmt.b32 {target}, below, above, {which};")
    return " ".join(lines)


_REGISTERS = (
    ".reg .f32 l<16>, v<16>; .reg .b16 low, high; .reg .b32 low7, high7, half, other, below, above; .reg .pred inside;"
)


def _unpack_in_ptx() -> str:
    """Return PTX by which a warp unpacks 32 runs of 64 weights; $0: nothing, $1: the constant of the lane's own run.

    $2: the levels; $3, $4: the lane's places in the codes and in the result; $5: how many runs there are from its first one on.
    Lane 4 g + q builds the table of run 8 q + g. Then, for s = 0 to 3, it takes 16 weights, number q, of run 8 s + g, with the
    table of lane 4 g + s. So each load and each store of a warp is one piece of memory.
    """
    lines = [_REGISTERS, ".reg .b32 t<4>, r<4>, w<8>, o<4>;", _TABLE.format(lut="$2")]
    for s in range(4):
        lines.append(f"mov.b32 w{2 * s}, 0; mov.b32 w{2 * s + 1}, 0; setp.gt.s32 inside, $5, {8 * s};")
        lines.append(f"@inside ld.global.v2.b32 {{w{2 * s}, w{2 * s + 1}}}, [$3 + {256 * s}];")
    lines.append(_table_in_ptx("t", "$1"))
    for s in range(4):
        lines += [f"shfl.sync.idx.b32 r{i}, t{i}, {s}, 0x1c1f, -1;" for i in range(4)]
        lines += [_look_up_in_ptx((f"o{2 * i}", f"o{2 * i + 1}"), f"w{2 * s + i}", "r", True) for i in range(2)]
        lines.append(f"setp.gt.s32 inside, $5, {8 * s}; @inside st.global.v4.b32 [$4 + {512 * s}], {{o0, o1, o2, o3}};")
    return "{\n" + "\n".join(lines) + "\nmov.b32 $0, 0;\n}"


@functools.cache
def unpack_transposed_in_ptx(runs: int, rows: int) -> str:
    """Return PTX by which a block unpacks `runs` runs of 64 weights of each of 128 rows, transposed; $0: nothing.

    rows: how far apart columns are in the result; as a number in the text it costs no instruction for addresses.

    A thread builds the tables of two rows, $1 and $2 being their constants, reads 16 bytes of four rows, and puts all of it
    into shared memory. Then it takes 32 weights of each of four rows, so that a warp writes 128 bytes of a column at a time.
    $3: the levels; $4 to $7: the rows' codes; $8, $9: where they go in shared memory and whence they are read; $10: where the
    tables go; $11, $12: whence those of the first and the last two rows are read; $13: the place of the first weight in the
    result; $14: 0 if the thread is beyond the weights.
    """
    # Bytes: of 32 rows' codes, of all codes, of 32 rows' tables.
    row, tables, pair = 1024 * runs, 4096 * runs, 512 * runs
    lines = [_REGISTERS, ".reg .b32 w<16>, o<8>, p<4>, c<4>, base, at; setp.ne.s32 inside, $14, 0;"]
    names = [f"t{i}_" for i in range(4)]
    lines.append(".reg .b32 " + ", ".join(f"{name}{i}" for name in names for i in range(4)) + ";")
    lines.append(f".shared .align 16 .b8 kept[{tables + 2048 * runs}]; mov.u32 base, kept;")
    words = ["{" + ", ".join(f"w{4 * i + j}" for j in range(4)) + "}" for i in range(4)]
    table = ["{" + ", ".join(f"{name}{j}" for j in range(4)) + "}" for name in names]
    lines += [f"ld.global.v4.b32 {words[i]}, [${4 + i}];" for i in range(4)]
    lines += [_TABLE.format(lut="$3"), _table_in_ptx(names[0], "$1"), _table_in_ptx(names[1], "$2")]
    lines.append("add.u32 at, base, $10;")
    lines += [f"st.shared.v4.b32 [at + {tables + i * pair}], {table[i]};" for i in range(2)]
    lines.append("add.u32 at, base, $8;")
    lines += [f"st.shared.v4.b32 [at + {i * row}], {words[i]};" for i in range(4)]
    lines.append("bar.sync 0; add.u32 at, base, $9;")
    lines += [f"ld.shared.v4.b32 {words[i]}, [at + {i * row}];" for i in range(4)]
    for i in range(4):
        lines.append(f"add.u32 at, base, ${11 + i // 2}; ld.shared.v4.b32 {table[i]}, [at + {tables + i % 2 * pair}];")
    for word in range(4):
        for i, name in enumerate(names):
            lines.append(_look_up_in_ptx((f"o{i}", f"o{4 + i}"), f"w{4 * i + word}", name, False))
        for side in range(2):
            o = [f"o{4 * side + i}" for i in range(4)]
            for i, order in enumerate(("0x5140", "0x5140", "0x7362", "0x7362")):
                lines.append(f"prmt.b32 p{i}, {o[i % 2 * 2]}, {o[i % 2 * 2 + 1]}, {order};")
            for i in range(4):
                lines.append(f"prmt.b32 c{i}, p{i // 2 * 2}, p{i // 2 * 2 + 1}, {('0x5410', '0x7632')[i % 2]};")
                column = 8 * word + 4 * side + (i ^ 1)
                lines.append(f"@inside st.global.b32 [$13 + {column * rows}], c{i};")
    return "{\n" + "\n".join(lines) + "\nmov.b32 $0, 0;\n}"


UNPACK, UNPACK_FORM = tl.constexpr(_unpack_in_ptx()), tl.constexpr("=r,f,l,l,l,r")
UNPACK_TRANSPOSED_FORM = tl.constexpr("=r,f,f,l,l,l,l,l,r,r,r,r,r,l,r")


@triton.jit
def _constant(absmax, absmax2, offset, code2, scales, block, row, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr):
    """Return the constants of blocks divided by the scales of their rows."""
    if NESTED:
        constant = tl.load(code2 + tl.load(absmax + block).to(tl.int32))
        second = block // BLOCKSIZE2
        constant = constant * tl.load(absmax2 + second)
        constant += tl.load(offset + second)
    else:
        constant = tl.load(absmax + block)
    reciprocal = tl.inline_asm_elementwise(  # the bits of a division, in fewer instructions
        "rcp.rn.f32 $0, $1;", "=f,f", [tl.load(scales + row)], dtype=tl.float32, is_pure=True, pack=1
    )
    return constant * reciprocal


@triton.jit
def unpack_e4m3_kernel(
    packed, absmax, absmax2, offset, code2, lut, scales, out, runs, NESTED: tl.constexpr, RUNS: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, ROW_RUNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write W / scales in e4m3, [rows, columns], as `dequantize_e4m3_kernel` does, in runs of 64 weights.

    One run per thread; RUNS of them are a quantisation block, ROW_RUNS a row.
    """
    thread = tl.arange(0, THREADS)
    first = tl.program_id(0) * THREADS + thread // 32 * 32
    lane = thread % 32
    own = tl.minimum(first + lane % 4 * 8 + lane // 4, runs - 1)
    constant = _constant(absmax, absmax2, offset, code2, scales, own // RUNS, own // ROW_RUNS, NESTED, BLOCKSIZE2)
    run, part = (first + lane // 4).to(tl.int64), lane % 4
    codes = (packed + run * 8 + part * 2).to(tl.int64)
    place = (out + run * 64 + part * 16).to(tl.int64)
    left = runs - (first + lane // 4)
    tl.inline_asm_elementwise(
        UNPACK, UNPACK_FORM, [constant, lut.to(tl.int64), codes, place, left], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def unpack_e4m3_transposed_kernel(
    packed, absmax, absmax2, offset, code2, lut, scales, out, rows, NESTED: tl.constexpr, RUNS: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, ROW_RUNS: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Write W / scales in e4m3, [columns, rows], as `dequantize_e4m3_kernel` does, with 2 * WIDTH warps and
    PTX from `unpack_transposed_in_ptx`.

    Grid: dimension 0 takes 128 rows, dimension 1 WIDTH (2 or 4) runs of 64 columns. Codes and tables are exchanged in shared
    memory, because rows lie far apart: without it each lane of a load touched a line of its own, which was the limit.
    """
    HALVES: tl.constexpr = 2 * WIDTH  # of runs: 32 weights or 16 bytes
    SPREAD: tl.constexpr = 4 // WIDTH
    thread = tl.arange(0, 32 * HALVES)
    row, run = tl.program_id(0) * 128, tl.program_id(1) * WIDTH
    # The places in shared memory are permuted, so that the eight lanes of each access use all banks.
    quad, half = thread // HALVES, thread % HALVES
    put = (quad * HALVES + (half ^ (quad // SPREAD % HALVES))) * 16
    first = tl.minimum(row + 4 * quad, rows - 4).to(tl.int64)
    codes = packed + (first * ROW_RUNS + tl.minimum(run + half // 2, ROW_RUNS - 1)) * 8 + half % 2 * 4

    own_run, two = thread % WIDTH, thread // WIDTH
    put_table = ((two % 2 * 2 * WIDTH + own_run) * 32 + (two // 2 ^ (own_run * SPREAD + two % 2 * 4))) * 16
    own = tl.minimum(row + 2 * two, rows - 2)
    blocks: tl.constexpr = ROW_RUNS // RUNS
    block = own * blocks + tl.minimum(run + own_run, ROW_RUNS - 1) // RUNS
    constant = _constant(absmax, absmax2, offset, code2, scales, block, own, NESTED, BLOCKSIZE2)
    other = _constant(absmax, absmax2, offset, code2, scales, block + blocks, own + 1, NESTED, BLOCKSIZE2)

    lane, warp = thread % 32, thread // 32
    get = (lane * HALVES + (warp ^ (lane // SPREAD % HALVES))) * 16
    which = warp // 2
    get_first = (which * 32 + (lane ^ which * SPREAD)) * 16
    get_last = ((2 * WIDTH + which) * 32 + (lane ^ (which * SPREAD + 4))) * 16
    inside = (row + 4 * lane < rows) & (run + which < ROW_RUNS)
    place = (out + (run * 64 + warp * 32).to(tl.int64) * rows + row + 4 * lane).to(tl.int64)
    tl.inline_asm_elementwise(
        PTX, UNPACK_TRANSPOSED_FORM, [
            constant, other, lut.to(tl.int64), codes.to(tl.int64), (codes + ROW_RUNS * 8).to(tl.int64),
            (codes + 2 * ROW_RUNS * 8).to(tl.int64), (codes + 3 * ROW_RUNS * 8).to(tl.int64), put, get, put_table,
            get_first, get_last, place, inside.to(tl.int32),
        ], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["packed"])
def dequantize_e4m3_kernel(
    packed, absmax, absmax2, offset, code2, lut, scales, out, rows, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, ROW_BLOCKS: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SHUFFLE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write W / scales in e4m3 from 4-bit codes: [rows, columns], or with TRANSPOSED [columns, rows].

    Grid: dimension 0 takes tiles of ROWS rows, dimension 1 the quantisation blocks of a row. The levels are looked up
    as in `dequantize_kernel`; a transposed tile goes through shared memory, so that whole lines are written.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    block = row * ROW_BLOCKS + tl.program_id(1)
    word = block.to(tl.int64)[:, None] * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None]
    codes = tl.load(packed + word, mask=inside[:, None], other=0)
    level = lane_level(lut, SHUFFLE)
    if NESTED:
        constant = tl.load(code2 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        second = block // BLOCKSIZE2
        constant = constant * tl.load(absmax2 + second, mask=inside, other=0.0)
        constant += tl.load(offset + second, mask=inside, other=0.0)
    else:
        constant = tl.load(absmax + block, mask=inside, other=0.0)
    constant *= tl.div_rn(1.0, tl.load(scales + row, mask=inside, other=1.0))
    w0, w1, w2, w3, w4, w5, w6, w7 = levels(codes, lut, level, SHUFFLE)
    even = tl.interleave(tl.interleave(w0, w4), tl.interleave(w2, w6))
    odd = tl.interleave(tl.interleave(w1, w5), tl.interleave(w3, w7))
    values = to_e4m3(tl.interleave(even, odd) * constant[:, None], ROUND)
    k = tl.program_id(1) * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    if TRANSPOSED:
        tl.store(out + k.to(tl.int64)[:, None] * rows + row[None], tl.trans(values), mask=inside[None])
    else:
        tl.store(out + row.to(tl.int64)[:, None] * (ROW_BLOCKS * BLOCKSIZE) + k[None], values, mask=inside[:, None])


@triton.jit
def _row_part(x, row, k, columns, SWIGLU: tl.constexpr):
    """Load columns k of a row of x; with SWIGLU, x is [gate | up] and both are loaded."""
    place, within = x + row * ((2 if SWIGLU else 1) * columns) + k, k < columns
    tile = tl.load(place, mask=within, other=0.0)
    return tile, tl.load(place + columns, mask=within, other=0.0) if SWIGLU else tile


@triton.jit
def _rounded(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """Return fp32 numbers in 16 bit, two per instruction; one per instruction runs at a quarter of the speed."""
    if dtype == tl.bfloat16 and not ROUND:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(dtype)


@triton.jit
def _input(
    tile,
    up,
    norm,
    k,
    columns,
    rms,
    dtype: tl.constexpr,
    SWIGLU: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Return what a product reads: x, its norm, or SwiGLU of [gate | up], rounded to dtype as `widen_kernel` does."""
    if NORM:
        unit = tile.to(tl.float32) * rms
        if norm.dtype.element_ty != tl.float32:
            unit = unit.to(dtype).to(tl.float32)
        tile = (unit * tl.load(norm + k, mask=k < columns, other=0.0).to(tl.float32)).to(dtype)
    if SWIGLU:
        gate = tile.to(tl.float32)
        sigmoid, _ = _gate(gate, ACTIVATION)
        tile = _rounded(gate * sigmoid * up.to(tl.float32), dtype, ROUND)
    return tile


@triton.jit
def narrow_kernel(
    x, narrow, scales, read, norm, inverse_rms, folded, step, sequences, salt, length, columns, smallest, threshold,
    inverse, SWIGLU: tl.constexpr, NORM: tl.constexpr, FOLDED: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, ACTIVATION: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write x, its norm, or SwiGLU of [gate | up] in e4m3, and the scale of each row: its largest magnitude / 448, fp32.

    One program per row, in CHUNKS chunks of BLOCK columns. The scale must be known before anything is written, so a row
    stays in registers (HELD) and is read once: memory traffic is the limit. Rows that would need too many registers are
    read and computed twice. With FOLDED each column of x is multiplied by its own number of `folded` before it is
    quantised. With KEEP what the product reads, after dropout, is written in 16 bit too, for the adapters' product.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    largest, values, rms = tl.zeros((BLOCK,), tl.float32), (), 1.0
    if NORM:
        rms = tl.load(inverse_rms + row)
    if DROPOUT and KEEP:
        m = tl.program_id(0) + tl.zeros((1,), tl.int32)
        row_keys = _row_keys(_key(step, salt), sequences, m, tl.num_programs(0), length)
    if HELD:  # all loads come first: none may pass a store that might write what it reads
        parts = _row_part(x, row, k, columns, SWIGLU)
        for chunk in tl.static_range(1, CHUNKS):
            parts = parts + _row_part(x, row, chunk * BLOCK + k, columns, SWIGLU)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * BLOCK + k
        if HELD:
            tile, up = parts[2 * chunk], parts[2 * chunk + 1]
        else:
            tile, up = _row_part(x, row, place, columns, SWIGLU)
        value = _input(tile, up, norm, place, columns, rms, dtype, SWIGLU, NORM, ACTIVATION, ROUND)
        if KEEP:
            kept = value
            if DROPOUT:
                pairs = chunk * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
                keep = tl.reshape(_keep(row_keys, pairs, threshold), (BLOCK,))
                kept = tl.where(keep, value.to(tl.float32) * inverse, 0.0).to(value.dtype)
            tl.store(read + row * columns + place, kept, mask=place < columns)
        if FOLDED:
            value = value.to(tl.float32) * tl.load(folded + place, mask=place < columns, other=0.0)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
        if HELD:
            values = values + (value,)  # type: ignore[assignment]
    scale = tl.maximum(tl.max(largest, 0), smallest) * (1.0 / 448.0)
    tl.store(scales + row, scale)
    to_row = tl.div_rn(1.0, scale)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * BLOCK + k
        if HELD:
            value = values[chunk]
        else:
            tile, up = _row_part(x, row, place, columns, SWIGLU)
            value = _input(tile, up, norm, place, columns, rms, dtype, SWIGLU, NORM, ACTIVATION, ROUND)
            if FOLDED:
                value = value.to(tl.float32) * tl.load(folded + place, mask=place < columns, other=0.0)
        tl.store(narrow + row * columns + place, to_e4m3(value.to(tl.float32) * to_row, ROUND), mask=place < columns)


@triton.jit
def thin_kernel(
    x, A, u, norm, inverse_rms, rows, columns, share, extra, a_row, a_column, scale, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write u = scale x A^T, [shares, rows, extra], for a few adapter columns. A is read at A + j a_row + k a_column.

    Grid: dimension 0 takes BLOCK_M rows, dimension 1 a share of `share` columns, over which a program walks. So x is read
    once: memory traffic is the limit. With NORM the norm of x is meant: its factors multiply A's columns, and 1 / rms the
    rows of the result.
    """
    m, j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, columns)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    place, below = x + m.to(tl.int64)[:, None] * columns, (m < rows)[:, None]
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = tl.load(place + k[None], mask=below & (k < end)[None], other=0.0)
        a = tl.load(A + j[None] * a_row + k[:, None] * a_column, mask=(j < extra)[None] & (k < end)[:, None], other=0.0)
        if NORM:
            factor = tl.load(norm + k, mask=k < end, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * factor[:, None]).to(tile.dtype)
        total = tl.dot(tile, a, total)
    if NORM:
        total *= tl.load(inverse_rms + m, mask=m < rows, other=0.0)[:, None]
    target = u + (tl.program_id(1) * rows + m).to(tl.int64)[:, None] * extra + j[None]
    tl.store(target, (total * scale).to(u.dtype.element_ty), mask=below & (j < extra)[None])


@triton.jit
def settle_thin_kernel(sums, u, numbers, shares, BLOCK: tl.constexpr):
    """Write u, the sum of `thin_kernel`'s shares, always in the same order; one-dimensional grid, BLOCK numbers a program."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        total += tl.load(sums + share * numbers + e, mask=e < numbers, other=0.0)
    tl.store(u + e, total.to(u.dtype.element_ty), mask=e < numbers)


@triton.jit
def _adapter_tiles(u, B, m, n, rows, outputs, extra, BLOCK_R: tl.constexpr):
    """Load rows m of u and, transposed, rows n of B."""
    j = tl.arange(0, BLOCK_R)
    left = tl.load(u + m[:, None] * extra + j[None], mask=(m < rows)[:, None] & (j < extra)[None], other=0.0)
    right = tl.load(B + n[None] * extra + j[:, None], mask=(n < outputs)[None] & (j < extra)[:, None], other=0.0)
    return left, right


@triton.jit
def product_kernel(
    a, a_scales, b, b_scales, u, B, bias, out, rows, outputs, inner, extra, SCALED: tl.constexpr, BIAS: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write a_scales (a b^T) b_scales + u B^T + bias, [rows, outputs], for a [rows, inner] and b [outputs, inner] in e4m3.

    One-dimensional grid of tiles; GROUP tiles of rows take one tile of outputs after another, so that both operands
    stay in the L2 cache. EXACT: the sums of 128 products are added in fp32; the tensor cores of Hopper keep fewer bits.
    u B^T, in 16 bit, is added to the tile before it is written (BLOCK_R > 0). DESCRIBED: a, b and out are descriptors of
    tensors, whose tiles Hopper's copy engine loads and writes, without an address per thread.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    first_m, first_n = (first + place % size) * BLOCK_M, (place // size) * BLOCK_N
    m, n, k = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if not DESCRIBED:
        a_place = a + (m % rows).to(tl.int64)[:, None] * inner + k[None]
        b_place = b + (n % outputs).to(tl.int64)[None] * inner + k[:, None]
    a_scale = tl.load(a_scales + m, mask=m < rows, other=0.0)  # loaded now, so that nothing waits for memory at the end
    if SCALED:
        b_scale = tl.load(b_scales + n, mask=n < outputs, other=0.0)
    if BLOCK_R and BLOCK_R <= 32:  # more would leave one program per multiprocessor: they wait in shared memory
        left, right = _adapter_tiles(u, B, m, n, rows, outputs, extra, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        if DESCRIBED:
            x, w = a.load([first_m, start]), b.load([first_n, start]).T
        else:
            x = tl.load(a_place + start, mask=(start + k < inner)[None], other=0.0)
            w = tl.load(b_place + start, mask=(start + k < inner)[:, None], other=0.0)
        if EXACT:
            total = tl.dot(x, w, total, max_num_imprecise_acc=min(BLOCK_K, 128))
        else:
            total = tl.dot(x, w, total)
    total *= a_scale[:, None]
    if SCALED:
        total *= b_scale[None]
    if BLOCK_R > 32:
        left, right = _adapter_tiles(u, B, m, n, rows, outputs, extra, BLOCK_R)
    if BLOCK_R:
        total = tl.dot(left, right, total)
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None]
    if DESCRIBED:
        out.store([first_m, first_n], total.to(out.dtype))
    else:
        inside = (m < rows)[:, None] & (n < outputs)[None]
        tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None], total.to(out.dtype.element_ty), mask=inside)
