"""The kernels of a batch's decode step through 4-bit weights; decode_step.py says what a step is made of."""

from fast_path.decode_kernels import _begin, _constant, _member, _place, _sum, _wait
from fast_path.nf4 import lane_level, levels, tl, triton


@triton.jit
def _words(
    codes, absmax, row, rows, start, end, WORDS: tl.constexpr, BLOCKSIZE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Return words of some rows, [rows, STEP], and the constants of each eight as they are stored, [rows, STEP / 8]."""
    word, run = start + tl.arange(0, STEP), start // 8 + tl.arange(0, STEP // 8)
    real = (row < rows)[:, None]
    words = tl.load(codes + row[:, None] * WORDS + word[None], mask=real & (word < end)[None], other=0)
    block = (row[:, None] * (WORDS // 8) + run[None]) * 64 // BLOCKSIZE
    return words, tl.load(absmax + block, mask=real & (run * 8 < end)[None], other=0)


@triton.jit
def _dots(total, words, constant, x, lut, level, dtype: tl.constexpr, SHUFFLE: tl.constexpr):
    """Return total + W x for words of W, whose weights are rounded as the dequantised matrix's are.

    words: [rows, STEP]; constant: fp32 [rows, STEP / 8]; x: eight times [STEP, M]; total: fp32 [rows, M].
    """
    wide: tl.constexpr = (words.shape[0], words.shape[1] // 8, 8)
    constant = tl.reshape(tl.broadcast_to(constant[:, :, None], wide), words.shape)
    l0, l1, l2, l3, l4, l5, l6, l7 = levels(words, lut, level, SHUFFLE)
    total = tl.dot((l0 * constant).to(dtype), x[0], total)
    total = tl.dot((l1 * constant).to(dtype), x[1], total)
    total = tl.dot((l2 * constant).to(dtype), x[2], total)
    total = tl.dot((l3 * constant).to(dtype), x[3], total)
    total = tl.dot((l4 * constant).to(dtype), x[4], total)
    total = tl.dot((l5 * constant).to(dtype), x[5], total)
    total = tl.dot((l6 * constant).to(dtype), x[6], total)
    return tl.dot((l7 * constant).to(dtype), x[7], total)


@triton.jit
def _batch_product(
    x, codes, absmax, second, offset, codes2, absmax2, second2, offset2, code2, lut, row, rows, start, end,
    dtype: tl.constexpr, K: tl.constexpr, M: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, STEP: tl.constexpr, SHUFFLE: tl.constexpr, OVERLAP: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Return W x of the words from start to end for some rows of W and, if TWO, of a second matrix, fp32 [rows, M]."""
    WORDS: tl.constexpr = K // 8
    level = lane_level(lut, SHUFFLE)
    shift = tl.load(offset) if NESTED else 0.0
    shift2 = tl.load(offset2) if NESTED and TWO else 0.0
    total = tl.zeros((row.shape[0], M), tl.float32)
    total2 = tl.zeros((row.shape[0], M), tl.float32)
    words, constant = _words(codes, absmax, row, rows, start, end, WORDS, BLOCKSIZE, STEP)
    words2, constant2 = words, constant
    if TWO:
        words2, constant2 = _words(codes2, absmax2, row, rows, start, end, WORDS, BLOCKSIZE, STEP)
    for first in range(start, end, STEP):
        next = first + STEP
        next_words, next_constant = _words(codes, absmax, row, rows, next, end, WORDS, BLOCKSIZE, STEP)
        next_words2, next_constant2 = words2, constant2
        if TWO:
            next_words2, next_constant2 = _words(codes2, absmax2, row, rows, next, end, WORDS, BLOCKSIZE, STEP)
        _wait(OVERLAP)  # every time: it keeps the compiler from putting those loads off to where they are used
        word = first + tl.arange(0, STEP)
        inside = (word < end)[:, None]
        tile = x + word[:, None] * M + tl.arange(0, M)[None]
        slices = (
            tl.load(tile, mask=inside, other=0.0), tl.load(tile + WORDS * M, mask=inside, other=0.0),
            tl.load(tile + 2 * WORDS * M, mask=inside, other=0.0), tl.load(tile + 3 * WORDS * M, mask=inside, other=0.0),
            tl.load(tile + 4 * WORDS * M, mask=inside, other=0.0), tl.load(tile + 5 * WORDS * M, mask=inside, other=0.0),
            tl.load(tile + 6 * WORDS * M, mask=inside, other=0.0), tl.load(tile + 7 * WORDS * M, mask=inside, other=0.0),
        )  # fmt: skip
        run = first // 8 + tl.arange(0, STEP // 8)
        block = (row[:, None] * (WORDS // 8) + run[None]) * 64 // BLOCKSIZE
        real = (row < rows)[:, None] & (run * 8 < end)[None]
        constant = _constant(constant, second, shift, code2, block, real, NESTED, BLOCKSIZE2)
        total = _dots(total, words, constant, slices, lut, level, dtype, SHUFFLE)
        if TWO:
            constant2 = _constant(constant2, second2, shift2, code2, block, real, NESTED, BLOCKSIZE2)
            total2 = _dots(total2, words2, constant2, slices, lut, level, dtype, SHUFFLE)
        words, constant, words2, constant2 = next_words, next_constant, next_words2, next_constant2
    return total, total2


@triton.jit
def _batch_adapter(
    y, u, B, bias, row, rows, rank, scale, split, M: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return y + scale B u, of this split's parts of u, and the first split's + bias; y: [rows, M].

    u: [PARTS, M, MEMBERS, RANK] from this member on.
    """
    if BIAS:
        y += tl.load(bias + row, mask=row < tl.where(split == 0, rows, 0), other=0.0).to(tl.float32)[:, None]
    if RANK > 0:
        j, m = tl.arange(0, RANK), tl.arange(0, M)
        sums = tl.zeros((RANK, M), tl.float32)
        for part in range(split, PARTS, SPLITS):
            place = u + (part * M + m)[None] * (MEMBERS * RANK) + j[:, None]
            sums += tl.load(place, mask=(j < rank)[:, None], other=0.0)
        inside = (row < rows)[:, None] & (j < rank)[None]
        b = tl.load(B + row[:, None] * rank + j[None], mask=inside, other=0.0).to(tl.float32)
        y = tl.dot(b, sums * scale, y, input_precision="tf32x3")  # as good as fp32
    return y


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def _batch_linear_kernel(
    x, u, out, lut, code2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    SWIGLU: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, M: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHUFFLE: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Up to three 4-bit linears with adapters that read one x of M sequences, each weight read once for all.

    SWIGLU: silu(first) * second to out in the order of x. Else: fp32 [SPLITS, M, OUTPUTS] to out, shares of the
    inputs, which the next kernel adds in their order.
    """
    _begin(OVERLAP)
    program, split = tl.program_id(0), tl.program_id(1)
    first_outputs = 0
    member = 0
    if not SWIGLU:
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = _member(
            program, ROWS,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    row, m = program * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    share: tl.constexpr = (K // 8 + STEP * SPLITS - 1) // (STEP * SPLITS) * STEP
    start = split * share
    y, up = _batch_product(
        x, codes0, absmax0, second0, offset0, codes1, absmax1, second1, offset1, code2, lut, row, rows0, start,
        tl.minimum(start + share, K // 8), HALF, K, M, NESTED, BLOCKSIZE, BLOCKSIZE2, STEP, SHUFFLE, OVERLAP, SWIGLU,
    )  # fmt: skip
    y = _batch_adapter(
        y, u + member * RANK, B0, bias0, row, rows0, rank0, scale0, split, M, MEMBERS, RANK, PARTS, SPLITS, BIAS
    )  # fmt: skip
    inside = (row < rows0)[:, None]
    if SWIGLU:
        up = _batch_adapter(
            up, u + RANK, B1, bias1, row, rows1, rank1, scale1, split, M, MEMBERS, RANK, PARTS, SPLITS, BIAS
        )  # fmt: skip
        y = (y / (1.0 + tl.exp(-y)) * up).to(HALF)
        tl.store(out + _place(row[:, None], OUTPUTS, M, m[None]), y, mask=inside)
    else:
        place = (split * M + m)[None] * OUTPUTS + first_outputs + row[:, None]
        tl.store(out + place, y, mask=inside)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def _batch_norm_kernel(
    x, parts, weight, total, out, u, A0, A1, A2, rank0, rank1, rank2, eps,
    K: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Total = x + parts, RMS norm of it and u [M, MEMBERS, RANK] = A norm(total): a program for each sequence and
    member. x, total: [sequences, K]; parts: fp32 [PARTS, M, K].
    """
    _begin(OVERLAP)
    sequence, member = tl.program_id(0), tl.program_id(1)
    dtype = out.dtype.element_ty
    k = tl.arange(0, BLOCK)
    inside = k < K
    factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    value = tl.load(x + sequence * K + k, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        value += _sum(parts + sequence * K + k, inside, PARTS, M * K)
    value = value.to(dtype)
    if member == 0:
        tl.store(total + sequence * K + k, value, mask=inside)
    value = value.to(tl.float32)
    value = (value * tl.rsqrt(tl.sum(value * value) / K + eps)).to(dtype).to(tl.float32)
    value = (value * factor).to(dtype)
    if member == 0:
        tl.store(out + (_place(k, K, M, sequence) if ORDERED else sequence * K + k), value, mask=inside)
    if RANK > 0:
        if member == 2:
            A0, rank0 = A2, rank2
        elif member == 1:
            A0, rank0 = A1, rank1
        for start in range(0, RANK, TILE):
            j = start + tl.arange(0, TILE)
            real = (j < rank0)[:, None] & inside[None]
            a = tl.load(A0 + j[:, None] * K + k[None], mask=real, other=0.0).to(tl.float32)
            place = (sequence * MEMBERS + member) * RANK + j
            tl.store(u + place, tl.sum(a * value.to(tl.float32)[None], 1))


@triton.jit
def _batch_inner_kernel(
    x, A, u, rank, K: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """u [parts, M, RANK], whose parts add up to A x: a program for each BLOCK of inputs. x: in the order above."""
    _begin(OVERLAP)
    part = tl.program_id(0)
    j, m = tl.arange(0, RANK), tl.arange(0, M)
    word = part * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    inside = word < K // 8
    total = tl.zeros((RANK, M), tl.float32)
    _wait(OVERLAP)
    for i in tl.static_range(8):
        a = tl.load(A + j[:, None] * K + word[None] * 8 + i, mask=(j < rank)[:, None] & inside[None], other=0.0)
        value = tl.load(x + (i * (K // 8) + word)[:, None] * M + m[None], mask=inside[:, None], other=0.0)
        total = tl.dot(a.to(tl.float32), value.to(tl.float32), total, input_precision="tf32x3")
    tl.store(u + (part * M + m)[None] * RANK + j[:, None], total)
