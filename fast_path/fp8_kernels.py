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
def _input(
    tile, up, weight, rms, dtype: tl.constexpr, SWIGLU: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Return what a product reads: x, its norm, or SwiGLU of [gate | up], rounded to dtype as `widen_kernel` does."""
    if NORM:
        unit = tile.to(tl.float32) * rms
        if weight.dtype != tl.float32:
            unit = unit.to(tile.dtype).to(tl.float32)
        tile = (unit * weight.to(tl.float32)).to(dtype)
    if SWIGLU:
        gate = tile.to(tl.float32)
        sigmoid, _ = _gate(gate, ACTIVATION)
        tile = (gate * sigmoid * up.to(tl.float32)).to(dtype)
    return tile


@triton.jit
def row_scale_kernel(
    x, norm, inverse_rms, folded, scales, columns, smallest, SWIGLU: tl.constexpr, NORM: tl.constexpr,
    FOLDED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the scale of each row of what `narrow_kernel` quantises: its largest magnitude / 448, fp32.

    One program per row. It loads BLOCK columns at once, a whole row of most models, so that enough loads are under way:
    memory traffic is the limit. With FOLDED each column is multiplied by its own number of `folded` first.
    """
    row = tl.program_id(0)
    k, place = tl.arange(0, BLOCK), x + row.to(tl.int64) * ((2 if SWIGLU else 1) * columns)
    largest, rms = tl.zeros((BLOCK,), tl.float32), 1.0
    if NORM:
        rms = tl.load(inverse_rms + row)
    for start in range(0, columns, BLOCK):
        within = start + k < columns
        tile = tl.load(place + start + k, mask=within, other=0.0)
        up, weight = tile, tile  # placeholders: nothing reads them if there are none
        if SWIGLU:
            up = tl.load(place + columns + start + k, mask=within, other=0.0)
        if NORM:
            weight = tl.load(norm + start + k, mask=within, other=0.0)
        value = _input(tile, up, weight, rms, x.dtype.element_ty, SWIGLU, NORM, ACTIVATION).to(tl.float32)
        if FOLDED:
            value *= tl.load(folded + start + k, mask=within, other=0.0)
        largest = tl.maximum(largest, tl.abs(value))
    tl.store(scales + row, tl.maximum(tl.max(largest, 0), smallest) * (1.0 / 448.0))


@triton.jit
def _narrow_columns(
    x, A, norm, folded, m, k, rows, end, columns, extra, a_row, a_column, SWIGLU: tl.constexpr, NORM: tl.constexpr,
    FOLDED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Load the tiles that `narrow_kernel` reads for columns k < end: x, or gate and up, the norm's weight, folded, A."""
    inside = (m < rows)[:, None] & (k < end)[None]
    place = x + m.to(tl.int64)[:, None] * ((2 if SWIGLU else 1) * columns) + k[None]
    tile = tl.load(place, mask=inside, other=0.0)
    up, weight, factor, a = tile, tile, tile, tile  # placeholders: nothing reads them if there are none
    if SWIGLU:
        up = tl.load(place + columns, mask=inside, other=0.0)
    if NORM:
        weight = tl.load(norm + k, mask=k < end, other=0.0)[None]
    if FOLDED:
        factor = tl.load(folded + k, mask=k < end, other=0.0)[None]
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)[:, None]
        a = tl.load(A + j * a_row + k[None] * a_column, mask=(j < extra) & (k < end)[None], other=0.0)
    return tile, up, weight, factor, a


@triton.jit
def narrow_kernel(
    x, narrow, dropped, A, sums, norm, inverse_rms, scales, folded, step, sequences, salt, rows, share, length, columns,
    extra, a_row, a_column, threshold, inverse, scale, SWIGLU: tl.constexpr, NORM: tl.constexpr, FOLDED: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write x, its norm, or SwiGLU of [gate | up] in e4m3, and scale dropout(x) A^T from the same pass.

    A is read at A + j a_row + k a_column, so that it may lie transposed. With FOLDED each column of x is multiplied by
    its own number of `folded` before it is quantised, but not for the product with A.

    Grid: dimension 0 takes tiles of BLOCK_M rows, dimension 1 takes shares of `share` columns; a program walks over its
    share in steps of BLOCK_K columns, and loads the next tiles before it works on these. Its part of the product goes to
    sums [shares, rows, extra]. With BLOCK_R = 0 there is no product, and with KEEP dropout(x) is written for one that
    follows.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, columns)
    k = first + tl.arange(0, BLOCK_K)
    row, below = m.to(tl.int64)[:, None], (m < rows)[:, None]
    to_row = tl.div_rn(1.0, tl.load(scales + m, mask=m < rows, other=1.0))[:, None]
    rms = to_row  # a placeholder
    if DROPOUT:
        key = _key(step, salt)
    if NORM:
        rms = tl.load(inverse_rms + m, mask=m < rows, other=0.0)[:, None]
    if BLOCK_R:
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    after = _narrow_columns(
        x, A, norm, folded, m, k, rows, end, columns, extra, a_row, a_column, SWIGLU, NORM, FOLDED, BLOCK_R
    )  # fmt: skip
    for start in range(first, end, BLOCK_K):
        tile, up, weight, factor, a = after
        after = _narrow_columns(
            x, A, norm, folded, m, k + BLOCK_K, rows, end, columns, extra, a_row, a_column, SWIGLU, NORM, FOLDED, BLOCK_R
        )  # fmt: skip
        tile = _input(tile, up, weight, rms, x.dtype.element_ty, SWIGLU, NORM, ACTIVATION)
        inside = below & (k < end)[None]
        value = tile.to(tl.float32)
        if FOLDED:
            value *= factor
        tl.store(narrow + row * columns + k[None], to_e4m3(value * to_row, ROUND), mask=inside)
        if DROPOUT:
            pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
            keep = _keep(key, sequences, m, pairs, length, threshold)
            tile = tl.where(keep, tile.to(tl.float32) * inverse, 0.0).to(tile.dtype)
        if BLOCK_R:
            total = tl.dot(tile, tl.trans(a), total)
        elif KEEP:
            tl.store(dropped + row * columns + k[None], tile, mask=inside)
        k += BLOCK_K
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)[None]
        target = sums + (tl.program_id(1) * rows + row) * extra + j
        tl.store(target, (total * scale).to(sums.dtype.element_ty), mask=below & (j < extra))


@triton.jit
def product_kernel(
    a, a_scales, b, b_scales, u, B, bias, out, rows, outputs, inner, extra, SCALED: tl.constexpr, BIAS: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write a_scales (a b^T) b_scales + u B^T + bias, [rows, outputs], for a [rows, inner] and b [outputs, inner] in e4m3.

    One-dimensional grid of tiles; GROUP tiles of rows take one tile of outputs after another, so that both operands
    stay in the L2 cache. EXACT: the sums of 128 products are added in fp32; the tensor cores of Hopper keep fewer bits.
    u B^T, in 16 bit, is added to the tile before it is written (BLOCK_R > 0). DESCRIBED: a and b are descriptors of
    tensors, whose tiles Hopper's copy engine loads, without an address per thread.
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
    total *= tl.load(a_scales + m, mask=m < rows, other=0.0)[:, None]
    if SCALED:
        total *= tl.load(b_scales + n, mask=n < outputs, other=0.0)[None]
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)
        left = tl.load(u + m[:, None] * extra + j[None], mask=(m < rows)[:, None] & (j < extra)[None], other=0.0)
        right = tl.load(B + n[None] * extra + j[:, None], mask=(n < outputs)[None] & (j < extra)[:, None], other=0.0)
        total = tl.dot(left, right, total)
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None]
    inside = (m < rows)[:, None] & (n < outputs)[None]
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None], total.to(out.dtype.element_ty), mask=inside)
