"""The Triton kernels of a batch's decode step through 4-bit weights, other than those of attention.

decode_step.py launches them and describes the whole step. decode_products.py explains the order of x and its words
(member, run); here a word holds eight consecutive 4-bit weights of a row.
"""

from fast_path.decode_kernels import sum_of_parts
from fast_path.decode_products import (
    activated,
    find_member,
    input_place,
    let_next_kernel_start,
    quantisation_constants,
    wait_for_earlier_kernels,
)
from fast_path.nf4 import lane_level, levels, tl, triton


@triton.jit
def _words(
    codes, absmax, row, rows, start, end, WORDS: tl.constexpr, BLOCKSIZE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Load words of some rows, [rows, STEP], and the constant of each eight words as stored, [rows, STEP / 8]."""
    word, run = start + tl.arange(0, STEP), start // 8 + tl.arange(0, STEP // 8)
    real = (row < rows)[:, None]
    words = tl.load(codes + row[:, None] * WORDS + word[None], mask=real & (word < end)[None], other=0)
    block = (row[:, None] * (WORDS // 8) + run[None]) * 64 // BLOCKSIZE
    return words, tl.load(absmax + block, mask=real & (run * 8 < end)[None], other=0)


@triton.jit
def _dots(total, words, constant, x, lut, level, dtype: tl.constexpr, SHUFFLE: tl.constexpr):
    """Return total + W x for some words of W. The weights are rounded to half precision, as in the dequantised matrix.

    words: [rows, STEP]; constant: fp32 [rows, STEP / 8]; x: eight slices [STEP, M]; total: fp32 [rows, M].
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
    """Return W x for some rows of W and, if TWO, of a second matrix, fp32 [rows, M] each, over words start to end.

    The words of the next STEP are loaded while the present ones are used, because reading them takes long.
    """
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
        # In every pass, since it keeps the compiler from moving these loads to where they are used.
        wait_for_earlier_kernels(OVERLAP)
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
        constant = quantisation_constants(constant, second, shift, code2, block, real, NESTED, BLOCKSIZE2)
        total = _dots(total, words, constant, slices, lut, level, dtype, SHUFFLE)
        if TWO:
            constant2 = quantisation_constants(constant2, second2, shift2, code2, block, real, NESTED, BLOCKSIZE2)
            total2 = _dots(total2, words2, constant2, slices, lut, level, dtype, SHUFFLE)
        words, constant, words2, constant2 = next_words, next_constant, next_words2, next_constant2
    return total, total2


@triton.jit
def _batch_adapter(
    y, u, B, bias, row, rows, rank, scale, split, M: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return y + scale B u for this split's parts of u; the first split also adds the bias. y: [rows, M].

    u: [PARTS, M, MEMBERS, RANK], starting at this member.
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
        y = tl.dot(b, sums * scale, y, input_precision="tf32x3")  # about as exact as fp32
    return y


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def batch_linear_kernel(
    x, u, out, lut, code2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    SWIGLU: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, M: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHUFFLE: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute up to three 4-bit linears with their adapters on the x of M sequences, in one launch.

    Grid: dimension 0 takes tiles of ROWS outputs of one member, dimension 1 takes SPLITS shares of the inputs. A
    program walks over its share in steps of STEP words. Each weight is read once and dequantised once for all
    sequences, so the reading of weights is the limit for few sequences, and the arithmetic for many
    (docs/measurements.md, `GPU_ROWS`).

    With SWIGLU, ACTIVATION(first) * second is written to out in the order of x, and there is one share. Otherwise each share
    writes its sums to out, fp32 [SPLITS, M, OUTPUTS], and the next kernel adds them up. They are always added in the
    same order, so the result does not depend on the order in which programs run.
    """
    let_next_kernel_start(OVERLAP)
    program, split = tl.program_id(0), tl.program_id(1)
    first_outputs = 0
    member = 0
    if not SWIGLU:
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = find_member(
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
        y = (activated(y, ACTIVATION) * up).to(HALF)
        tl.store(out + input_place(row[:, None], OUTPUTS, M, m[None]), y, mask=inside)
    else:
        place = (split * M + m)[None] * OUTPUTS + first_outputs + row[:, None]
        tl.store(out + place, y, mask=inside)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def batch_norm_kernel(
    x, parts, after, weight, total, out, u, A0, A1, A2, rank0, rank1, rank2, after_eps, eps, AFTER: tl.constexpr,
    NORM: tl.constexpr, K: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up the residual (total = x + parts), and write its RMS norm and u = A norm(total) of the next adapters.

    With AFTER, the sum of parts passes through a norm of its own before it is added; `after` is its weight. Without NORM,
    total itself takes the place of its norm.

    Grid: sequences, members. Every program computes the norm of its sequence in one tile of BLOCK numbers, since each
    member's adapter needs it; only the program of member 0 writes total and the norm. It then takes its member's A in
    tiles of TILE rows. Each number of A is read once per sequence, for one multiplication and addition.

    x, total: [sequences, K]; parts: fp32 [PARTS, M, K]; u: [M, MEMBERS, RANK]. With ORDERED the norm is written in the
    order of `input_place`, otherwise as [sequences, K].
    """
    let_next_kernel_start(OVERLAP)
    sequence, member = tl.program_id(0), tl.program_id(1)
    dtype = out.dtype.element_ty
    k = tl.arange(0, BLOCK)
    inside = k < K
    factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32) if NORM else 1.0
    wait_for_earlier_kernels(OVERLAP)
    value = tl.load(x + sequence * K + k, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = sum_of_parts(parts + sequence * K + k, inside, PARTS, M * K)
        if AFTER:
            added = added.to(dtype).to(tl.float32)
            added = added * tl.rsqrt(tl.sum(added * added) / K + after_eps)
            added = (added * tl.load(after + k, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        value += added
    value = value.to(dtype)
    if member == 0:
        tl.store(total + sequence * K + k, value, mask=inside)
    if NORM:
        number = value.to(tl.float32)
        number = number * tl.rsqrt(tl.sum(number * number) / K + eps)
        if weight.dtype.element_ty != tl.float32:  # as Norm of fused_linear.py
            number = number.to(dtype).to(tl.float32)
        value = (number * factor).to(dtype)
    if member == 0:
        tl.store(out + (input_place(k, K, M, sequence) if ORDERED else sequence * K + k), value, mask=inside)
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
def roots_kernel(
    qkv, roots, eps, Q: tl.constexpr, KV: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write 1 / root mean square of all heads of q, and of all of k, to roots [M, 2].

    Grid: sequences, q and k. A program reads all Q or KV numbers of its sequence in one tile of BLOCK: it is little work,
    but each program of the attention kernel would have to do it. qkv: fp32 [PARTS, M, Q + 2 KV], whose parts are added.
    """
    let_next_kernel_start(OVERLAP)
    sequence, which = tl.program_id(0), tl.program_id(1)
    OUTPUTS: tl.constexpr = Q + 2 * KV
    columns = tl.where(which == 0, Q, KV)
    k = tl.arange(0, BLOCK)
    wait_for_earlier_kernels(OVERLAP)
    value = sum_of_parts(qkv + sequence * OUTPUTS + which * Q + k, k < columns, PARTS, M * OUTPUTS)
    tl.store(roots + sequence * 2 + which, tl.rsqrt(tl.sum(value * value) / columns + eps))


@triton.jit
def batch_inner_kernel(
    x, A, u, rank, K: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute u [parts, M, RANK], whose parts add up to A x, for the down projection's adapter.

    One-dimensional grid: each program takes BLOCK inputs, all RANK rows of A and all M sequences. A and x are read
    once, and the inputs are split among programs because the rows of A alone are too few to occupy a GPU. x: in the
    order of `input_place`.
    """
    let_next_kernel_start(OVERLAP)
    part = tl.program_id(0)
    j, m = tl.arange(0, RANK), tl.arange(0, M)
    word = part * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    inside = word < K // 8
    total = tl.zeros((RANK, M), tl.float32)
    wait_for_earlier_kernels(OVERLAP)
    for i in tl.static_range(8):
        a = tl.load(A + j[:, None] * K + word[None] * 8 + i, mask=(j < rank)[:, None] & inside[None], other=0.0)
        value = tl.load(x + (i * (K // 8) + word)[:, None] * M + m[None], mask=inside[:, None], other=0.0)
        total = tl.dot(a.to(tl.float32), value.to(tl.float32), total, input_precision="tf32x3")
    tl.store(u + (part * M + m)[None] * RANK + j[:, None], total)
