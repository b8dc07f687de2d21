"""The Triton kernels of products in FP8 (e4m3), for fp8.py and fused_linear.py.

Where they cannot run, the torch calls beside their launches compute the same numbers.
"""

from fast_path.nf4 import lane_level, levels, tl, triton
from fast_path.training_kernels import _gate, _keep, _key


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
        tile = (gate * sigmoid * up.to(tl.float32)).to(dtype)
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
        key, m = _key(step, salt), tl.program_id(0) + tl.zeros((1,), tl.int32)
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
        value = _input(tile, up, norm, place, columns, rms, dtype, SWIGLU, NORM, ACTIVATION)
        if KEEP:
            kept = value
            if DROPOUT:
                pairs = chunk * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
                keep = tl.reshape(_keep(key, sequences, m, pairs, length, threshold), (BLOCK,))
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
            value = _input(tile, up, norm, place, columns, rms, dtype, SWIGLU, NORM, ACTIVATION)
            if FOLDED:
                value = value.to(tl.float32) * tl.load(folded + place, mask=place < columns, other=0.0)
        tl.store(narrow + row * columns + place, to_e4m3(value.to(tl.float32) * to_row, ROUND), mask=place < columns)


@triton.jit
def thin_kernel(
    x, A, u, rows, columns, extra, a_row, a_column, scale, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write u = scale x A^T, [rows, extra], for a few adapter columns. A is read at A + j a_row + k a_column.

    Each program takes BLOCK_M rows and walks over all columns, so x is read once: memory traffic is the limit.
    """
    m, j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    place, below = x + m.to(tl.int64)[:, None] * columns, (m < rows)[:, None]
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = tl.load(place + k[None], mask=below & (k < columns)[None], other=0.0)
        a = tl.load(
            A + j[None] * a_row + k[:, None] * a_column, mask=(j < extra)[None] & (k < columns)[:, None], other=0.0
        )
        total = tl.dot(tile, a, total)
    target = u + m.to(tl.int64)[:, None] * extra + j[None]
    tl.store(target, (total * scale).to(u.dtype.element_ty), mask=below & (j < extra)[None])


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
