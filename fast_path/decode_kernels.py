"""The kernels of a decode step through 4-bit weights; decode_step.py says what a model's step is made of."""

from fast_path.nf4 import lane_level, levels, tl, triton

# Products read x as the 4-bit words want it: a thread takes 64 inputs, whose 32 pairs lie where 32 threads' loads of
# 16 bytes are consecutive: pair p of the words of half h is at [h, p, run of 64, word], each [2, 4, inputs / 64, 4].
#
# Those of a batch read x as [8, inputs / 8, M]: input k at [k % 8, k // 8]. A word has eight consecutive weights of a
# row, so the j-th weights of its words meet slice j in a product of their own, and no weights have to be interleaved.
# M: 1, or the sequences as a power of two; those that are none read zeros.


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
def _place(k, K: tl.constexpr, M: tl.constexpr = 1, m=0):
    """Return where input k of sequence m of M lies in the order above."""
    if M > 1:
        return (k % 8 * (K // 8) + k // 8) * M + m
    else:
        return ((((k // 32) % 2 * 4 + (k // 2) % 4) * (K // 64) + k // 64) * 4 + (k // 8) % 4) * 2 + k % 2


@triton.jit
def _input(place, K: tl.constexpr):
    """Return which input of one sequence lies at a place of that order."""
    run = place // 8 % (K // 64) * 64 + place // (K // 2) * 32
    return run + place // 2 % 4 * 8 + place // (K // 8) % 4 * 2 + place % 2


@triton.jit
def _pair(x, dtype: tl.constexpr):
    """Return the two numbers of half precision in each 32-bit word, as fp32."""
    x = x.to(tl.uint32, bitcast=True)
    first = (x & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    return first.to(tl.float32), (x >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _issued(COMPILED: tl.constexpr):
    """Return 0, known only when all loads that stand before have been issued.

    ptxas sinks loads for the next pass of a loop to its end, behind all that they should overlap. It keeps them
    before a barrier, and what is computed from the barrier's result behind it.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .pred no; setp.ne.u32 no, 0, 0; bar.red.popc.u32 $0, 0, no; }",
            "=r", [], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return 0


@triton.jit
def _arrivals(count, expected, COMPILED: tl.constexpr):
    """Return 0, once `expected` programs of this kernel have added to the count; what they wrote is there then.

    They have lower numbers than the one that waits, so they run already. The interpreter runs all in their order.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred less; .reg .u32 found;
            AGAIN:
            ld.acquire.gpu.global.u32 found, [$1];
            setp.lt.u32 less, found, $2;
            @less bra AGAIN;
            mov.u32 $0, 0;
            }""",
            "=r,l,r", [count.to(tl.int64), expected], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return 0


@triton.jit
def _inputs(x, piece, RUNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the 32 pairs that a thread's 64 weights meet, eight times [1, BLOCKS, 4] words of two halves each."""
    run = piece * BLOCKS + tl.arange(0, BLOCKS)
    inside = (run < RUNS)[None, :, None]
    x += (run * 4)[None, :, None] + tl.arange(0, 4)[None, None]
    STRIDE: tl.constexpr = RUNS * 4
    return (
        tl.load(x, mask=inside, other=0), tl.load(x + STRIDE, mask=inside, other=0),
        tl.load(x + 2 * STRIDE, mask=inside, other=0), tl.load(x + 3 * STRIDE, mask=inside, other=0),
        tl.load(x + 4 * STRIDE, mask=inside, other=0), tl.load(x + 5 * STRIDE, mask=inside, other=0),
        tl.load(x + 6 * STRIDE, mask=inside, other=0), tl.load(x + 7 * STRIDE, mask=inside, other=0),
    )  # fmt: skip


@triton.jit
def _half(total, words, x0, x1, x2, x3, lut, level, dtype: tl.constexpr, SHUFFLE: tl.constexpr):
    """Add the products of 32 of a thread's 64 weights to the total. words, total: [rows, BLOCKS, 4]."""
    l0, l1, l2, l3, l4, l5, l6, l7 = levels(words, lut, level, SHUFFLE)
    a, b = _pair(x0, dtype)
    total += l0 * a
    total += l1 * b
    a, b = _pair(x1, dtype)
    total += l2 * a
    total += l3 * b
    a, b = _pair(x2, dtype)
    total += l4 * a
    total += l5 * b
    a, b = _pair(x3, dtype)
    total += l6 * a
    total += l7 * b
    return total


@triton.jit
def _constant(code, second, shift, code2, block, real, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr):
    """Return the constants of blocks of weights, fp32. NESTED: code is a code of 8 bits, else the constant."""
    if NESTED:
        code = tl.load(code2 + code.to(tl.int32))
        code = code * tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0) + shift
    return code


@triton.jit
def _places(row, rows, piece, RUNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return which runs of 64 weights of the matrix a piece of some rows has, and whether they exist."""
    run = piece * BLOCKS + tl.arange(0, BLOCKS)
    return row[:, None] * RUNS + run[None], (row < rows)[:, None] & (run < RUNS)[None]


@triton.jit
def _weights(
    codes, absmax, second, row, rows, piece, RUNS: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
):  # fmt: skip
    """Return 64 weights a thread of a piece of some rows as words of eight codes, [rows, BLOCKS, 4] twice, their
    constants as they are stored and those constants' own, [rows, BLOCKS].
    """
    place, real = _places(row, rows, piece, RUNS, BLOCKS)
    words = codes + (place * 8)[:, :, None] + tl.arange(0, 4)[None, None]
    block = place // (BLOCKSIZE // 64)
    constant = tl.load(absmax + block, mask=real, other=0)
    factor = tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0) if NESTED else constant
    # What lies outside is multiplied by a constant or by inputs of 0, whatever it is.
    return tl.load(words, mask=real[:, :, None]), tl.load(words + 4, mask=real[:, :, None]), constant, factor


@triton.jit
def _products(
    low, high, constant, x, lut, level, BLOCKS: tl.constexpr, dtype: tl.constexpr, SHUFFLE: tl.constexpr
):  # fmt: skip
    """Return each thread's share of W x, fp32 [rows, BLOCKS], from what `_weights` and `_inputs` loaded."""
    total = tl.zeros((low.shape[0], BLOCKS, 4), tl.float32)
    total = _half(total, low, x[0], x[1], x[2], x[3], lut, level, dtype, SHUFFLE)
    total = _half(total, high, x[4], x[5], x[6], x[7], lut, level, dtype, SHUFFLE)
    return tl.sum(total, 2) * constant


@triton.jit
def _adapter_sums(
    u, rank, MEMBERS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PARTS_2: tl.constexpr,
):  # fmt: skip
    """Return the adapter's A x and zeros, [WIDTH], from its parts. u: [PARTS, MEMBERS, RANK] from this member on."""
    j, part = tl.arange(0, WIDTH), tl.arange(0, PARTS_2)
    inside = (part < PARTS)[:, None] & (j < rank)[None]
    return tl.sum(tl.load(u + part[:, None] * (MEMBERS * RANK) + j[None], mask=inside, other=0.0), 0)


@triton.jit
def _results(
    u, inverse, zero, member, rank0, scale0, rank1, scale1, NORM: tl.constexpr, SWIGLU: tl.constexpr,
    MEMBERS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr,
):  # fmt: skip
    """Return what `_adapter_program` left: the 1 / root mean square, 1 without NORM, a member's scaled sums A x and,
    with SWIGLU, the second one's, else the same once more. zero: 0, known when all that is there.
    """
    root = tl.full((), 1.0, tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    sums1 = sums
    if NORM:
        root = tl.load(inverse + zero)
    if RANK > 0:
        sums = _adapter_sums(u + zero + member * RANK, rank0, MEMBERS, RANK, WIDTH, PARTS, PARTS_2) * scale0
        sums1 = sums
        if SWIGLU:
            sums1 = _adapter_sums(u + zero + RANK, rank1, MEMBERS, RANK, WIDTH, PARTS, PARTS_2) * scale1
    return root, sums, sums1


@triton.jit
def _adapter_rows(
    B, bias, row, rows, rank, RANK: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Return rows of B and zeros, [rows, WIDTH], and their biases, 0 without."""
    b, offset = tl.zeros((row.shape[0], 1), tl.float32), tl.zeros((row.shape[0],), tl.float32)
    if BIAS:
        offset = tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    if RANK > 0:
        j = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (j < rank)[None]
        b = tl.load(B + row[:, None] * rank + j[None], mask=inside, other=0.0).to(tl.float32)
    return b, offset


@triton.jit
def _two_weights(
    codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, row, half, piece, RUNS: tl.constexpr,
    BLOCKS: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Return `_weights` of some rows and, if TWO, of those `half` further on; else the same once more."""
    w = _weights(codes0, absmax0, second0, row, rows0, piece, RUNS, BLOCKS, NESTED, BLOCKSIZE, BLOCKSIZE2)
    w1 = w
    if TWO:
        w1 = _weights(
            codes1, absmax1, second1, half + row, rows1, piece, RUNS, BLOCKS, NESTED, BLOCKSIZE, BLOCKSIZE2
        )  # fmt: skip
    return w, w1


@triton.jit
def _two_adapters(
    B0, bias0, rows0, rank0, B1, bias1, rows1, rank1, row, half, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Return `_adapter_rows` in the same way."""
    b, bias = _adapter_rows(B0, bias0, row, rows0, rank0, RANK, WIDTH, BIAS)
    b1, bias1_ = b, bias
    if TWO:
        b1, bias1_ = _adapter_rows(B1, bias1, half + row, rows1, rank1, RANK, WIDTH, BIAS)
    return b, bias, b1, bias1_


@triton.jit
def _finished(total, sums, b, bias, RANK: tl.constexpr, BLOCKS: tl.constexpr):
    """Return bias + the sums over all threads of their shares of W x and of B (A x), fp32 [rows]."""
    if RANK > 0:
        if RANK <= BLOCKS:  # one sum of both
            total += b * sums[None]
        else:
            bias += tl.sum(b * sums[None], 1)
    return bias + tl.sum(total, 1)


@triton.jit
def _add(hidden, out, weight, row, rows, y, OUTPUTS: tl.constexpr, NEXT: tl.constexpr):
    """Write rows of hidden and, with NEXT, of the next product's x, hidden times its norm's weight."""
    y = y.to(hidden.dtype.element_ty)
    tl.store(hidden + row, y, mask=row < rows)
    if NEXT:
        factor = tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + _place(row, OUTPUTS), (y.to(tl.float32) * factor).to(y.dtype), mask=row < rows)


@triton.jit
def _leave(
    hidden, out, weight, row, row1, rows, rows1, y, y1, MODE: tl.constexpr, OUTPUTS: tl.constexpr,
    NEXT: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Write the outputs of some rows and, if TWO, of row1, as `_linear_kernel` says."""
    if MODE == "swiglu":
        y = y / (1.0 + tl.exp(-y)) * y1
        tl.store(out + _place(row, OUTPUTS), y.to(out.dtype.element_ty), mask=row < rows)
    elif MODE == "stack":
        tl.store(out + row, y, mask=row < rows)
    else:
        _add(hidden, out, weight, row, rows, y, OUTPUTS, NEXT)
        if TWO:
            _add(hidden, out, weight, row1, rows1, y1, OUTPUTS, NEXT)


@triton.jit
def _member(
    program, EACH: tl.constexpr,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
):  # fmt: skip
    """Return a program's number within its linear, the outputs before that one, which it is, and what it has, where
    the programs of each take EACH of its rows.
    """
    end0 = tl.cdiv(rows0, EACH)
    end1 = end0 + tl.cdiv(rows1, EACH)
    first_outputs = 0
    member = 0
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
    return program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0


@triton.jit
def _adapter_program(
    program, x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1, rank2,
    K: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """u [parts, MEMBERS, RANK], whose parts add up to A x: TAKE rows of A and a CHUNK of inputs; then COUNT adds 1.

    NORM: x is norm(hidden); its 1 / root mean square, times `scale`, is written to `inverse`.
    """
    TILES: tl.constexpr = RANK // TAKE if RANK > 0 else 1
    member, part = program // TILES % MEMBERS, program // (TILES * MEMBERS)
    if member == 2:
        A0, rank0 = A2, rank2
    elif member == 1:
        A0, rank0 = A1, rank1
    j = program % TILES * TAKE + tl.arange(0, TAKE)
    place = part * CHUNK + tl.arange(0, BLOCK)  # of x, whose order A's columns follow
    rows = A0 + j[:, None] * K
    real = (j < rank0)[:, None]
    a = tl.load(rows + (place if NORM else _input(place, K))[None], mask=real & (place < K)[None], other=0.0)
    factor = tl.load(weight + place, mask=place < K, other=0.0) if NORM else 1.0
    _wait(OVERLAP)
    if program == 0:
        tl.store(count_before, 0)
    products = tl.zeros((TAKE, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for _ in range(CHUNK // BLOCK):
        value = tl.load((hidden if NORM else x) + place, mask=place < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= factor.to(tl.float32)
        products += a.to(tl.float32) * value[None]
        place += BLOCK
        inside = place < tl.minimum(K, part * CHUNK + CHUNK)
        a = tl.load(rows + (place if NORM else _input(place, K))[None], mask=real & inside[None], other=0.0)
        if NORM:
            factor = tl.load(weight + place, mask=inside, other=0.0)
    total = tl.sum(products, 1)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        total *= root
        if program == 0:
            tl.store(inverse, root * scale)
    if RANK > 0:
        tl.store(u + (part * MEMBERS + member) * RANK + j, total)
    if COUNT:
        tl.debug_barrier()  # the one thread that adds speaks for all
        tl.atomic_add(count, 1, sem="release")


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def _adapter_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1, rank2,
    K: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The programs of `_adapter_program` ahead of the product that reads what they leave."""
    _begin(OVERLAP)
    _adapter_program(
        tl.program_id(0), x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1,
        rank2, K, MEMBERS, RANK, TAKE, CHUNK, BLOCK, NORM, False, OVERLAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # a rank of 1 would be of another type than one of 0
def _linear_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, out, next_weight, lut, code2, A0, A1, A2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    MODE: tl.constexpr, NORM: tl.constexpr, NEXT: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr,
    OUTPUTS: tl.constexpr, RANK: tl.constexpr, ADAPTERS: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr, LOOP: tl.constexpr,
    BLOCKS: tl.constexpr, TWO: tl.constexpr, SHUFFLE: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Up to three 4-bit linears with adapters that read one x; a program takes LOOP times ROWS rows of one.

    TWO: and as many more with the same inputs, of the second matrix in MODE "swiglu" or of its own second half. Rows
    are taken in pieces of BLOCKS runs of 64 weights; the next piece's weights are loaded while the present one's are
    used. The first ADAPTERS programs compute what the others add after their first products, if it is not there yet: the
    adapters' u and, with NORM, where x is hidden times the norm's weight, the 1 / root mean square that it lacks.
    MODE "stack": out [outputs of all], fp32. "residual": y is added to hidden, and with NEXT hidden times next_weight
    goes to out in the order of `_place`. "swiglu": silu(first) * second to out in that order.
    """
    _begin(OVERLAP)
    program = tl.program_id(0)
    if program < ADAPTERS:
        _adapter_program(
            program, x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1, rank2,
            K, MEMBERS, RANK, TAKE, CHUNK, BLOCK, NORM, True, OVERLAP,
        )  # fmt: skip
        return
    program -= ADAPTERS
    first_outputs = 0
    member = 0
    SWIGLU: tl.constexpr = MODE == "swiglu"
    RUNS: tl.constexpr = K // 64
    PIECES: tl.constexpr = (RUNS + BLOCKS - 1) // BLOCKS
    MORE: tl.constexpr = LOOP * PIECES > 1
    WIDTH: tl.constexpr = RANK if RANK > BLOCKS else BLOCKS
    if MODE == "stack":
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = _member(
            program, ROWS * LOOP,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    half = 0  # where the second rows begin
    if TWO and not SWIGLU:
        codes1, absmax1, second1, offset1, bias1, B1 = codes0, absmax0, second0, offset0, bias0, B0
        rows1, rank1, scale1 = rows0, rank0, scale0
        half = tl.cdiv(rows0, 2)
        rows0 = half
    stride = tl.cdiv(rows0, ROWS * LOOP) * ROWS
    row = program * ROWS + tl.arange(0, ROWS)
    level = lane_level(lut, SHUFFLE)
    shift = tl.load(offset0) if NESTED else 0.0
    shift1 = tl.load(offset1) if NESTED and TWO else 0.0
    w, w1 = _two_weights(
        codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, row, half, 0, RUNS, BLOCKS, NESTED,
        BLOCKSIZE, BLOCKSIZE2, TWO,
    )  # fmt: skip
    b, bias, b1, bias1_ = _two_adapters(
        B0, bias0, rows0, rank0, B1, bias1, rows1, rank1, row, half, RANK, WIDTH, BIAS, TWO
    )  # fmt: skip
    _wait(OVERLAP)
    pairs = x.to(tl.pointer_type(tl.int32))
    inputs = _inputs(pairs, 0, RUNS, BLOCKS)  # stay in registers if there is one piece
    HERE: tl.constexpr = ADAPTERS == 0  # they are there already
    root, sums, sums1 = _results(
        u, inverse, 0, member, rank0, scale0, rank1, scale1, NORM and HERE, SWIGLU, MEMBERS, RANK if HERE else 0,
        WIDTH, PARTS, PARTS_2,
    )  # fmt: skip
    if HERE:
        tl.store(count_before, 0, mask=program == 0)
    for i in range(LOOP):
        next_row = row + stride
        next_b, next_bias, next_b1, next_bias1 = b, bias, b1, bias1_
        if LOOP > 1:  # nothing is loaded past the last row
            next_b, next_bias, next_b1, next_bias1 = _two_adapters(
                B0, bias0, rows0, rank0, B1, bias1, rows1, rank1, next_row, half, RANK, WIDTH, BIAS, TWO
            )  # fmt: skip
        if MODE == "residual":
            bias += tl.load(hidden + row, mask=row < rows0, other=0.0).to(tl.float32)
            if TWO:
                bias1_ += tl.load(hidden + half + row, mask=half + row < rows1, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, BLOCKS), tl.float32)
        total1 = total
        for piece in range(PIECES):
            next_w, next_w1, zero = w, w1, 0
            if MORE:
                then, after = row, piece + 1
                if after == PIECES:
                    then, after = next_row, 0
                next_w, next_w1 = _two_weights(
                    codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, then, half, after, RUNS,
                    BLOCKS, NESTED, BLOCKSIZE, BLOCKSIZE2, TWO,
                )  # fmt: skip
                zero = _issued(SHUFFLE)
                level = (level.to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True)
            if PIECES > 1:
                inputs = _inputs(pairs + zero * 4, piece, RUNS, BLOCKS)
            constant, constant1 = w[2], w1[2]
            if NESTED:
                constant = tl.load(code2 + (constant.to(tl.int32) | zero)) * w[3] + shift
                if TWO:
                    constant1 = tl.load(code2 + (constant1.to(tl.int32) | zero)) * w1[3] + shift1
            total += _products(w[0], w[1], constant, inputs, lut, level, BLOCKS, HALF, SHUFFLE)
            if TWO:
                total1 += _products(w1[0], w1[1], constant1, inputs, lut, level, BLOCKS, HALF, SHUFFLE)
            w, w1 = next_w, next_w1
        if i == (-1 if HERE else 0):
            root, sums, sums1 = _results(
                u, inverse, _arrivals(count, ADAPTERS, SHUFFLE), member, rank0, scale0, rank1, scale1, NORM, SWIGLU,
                MEMBERS, RANK, WIDTH, PARTS, PARTS_2,
            )  # fmt: skip
        y = _finished(total * root, sums, b, bias, RANK, BLOCKS)
        y1 = y
        if TWO:
            y1 = _finished(total1 * root, sums1, b1, bias1_, RANK, BLOCKS)
        _leave(
            hidden, out + first_outputs, next_weight, row, half + row, rows0, rows1, y, y1, MODE, OUTPUTS, NEXT, TWO
        )  # fmt: skip
        row = next_row
        b, bias, b1, bias1_ = next_b, next_bias, next_b1, next_bias1


@triton.jit
def _norm_kernel(
    x, weight, out, eps, K: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """RMS norm of x; FIRST: x times the weight alone, in the order of `_place`, as the first product reads it."""
    _begin(OVERLAP)
    k = tl.arange(0, BLOCK)
    inside = k < K
    factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    _wait(OVERLAP)
    dtype = out.dtype.element_ty
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        tl.store(out + _place(k, K), (value * factor).to(dtype), mask=inside)
    else:
        value = (value * tl.rsqrt(tl.sum(value * value) / K + eps)).to(dtype).to(tl.float32)
        tl.store(out + k, (value * factor).to(dtype), mask=inside)


@triton.jit
def _sum(x, mask, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """Return the sum of PARTS tensors that lie STRIDE apart."""
    total = tl.load(x, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x + part * STRIDE, mask=mask, other=0.0)
    return total


@triton.jit
def _rotated(
    x, weight, c, s, eps, rows, NORM: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Return both halves of heads after their norm and rotary embedding, fp32 [heads, HALF]. rows: bool."""
    j = tl.arange(0, HALF)[None]
    first = _sum(x + j, rows, PARTS, STRIDE)
    second = _sum(x + HALF + j, rows, PARTS, STRIDE)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        first = first * inverse * tl.load(weight + j).to(tl.float32)
        second = second * inverse * tl.load(weight + HALF + j).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def _share(here, begin, SPLITS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return how many positions a program of a sequence's attention takes, a multiple of POSITIONS."""
    return tl.cdiv(tl.cdiv(here + 1 - begin, SPLITS), POSITIONS) * POSITIONS


@triton.jit
def _tile(keys, values, n, here, j, wide, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Return both halves of the keys, and the values, of some positions before this one."""
    old = (n < here)[:, None]
    first = tl.load(keys + n[:, None] * SIZE + j, mask=old, other=0.0)
    second = tl.load(keys + n[:, None] * SIZE + HALF + j, mask=old, other=0.0)
    return first, second, tl.load(values + n[:, None] * SIZE + wide, mask=old, other=0.0)


@triton.jit
def _softened(score, value, top, weight, total):
    """Return the largest score, the sum of weights and that of weighted values with one more tile in them."""
    higher = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, weight * fade + tl.sum(p, 1), total * fade[:, None] + tl.dot(p.to(value.dtype), value)


@triton.jit
def _attention_kernel(
    qkv, keys, values, position, starts, cos, sin, q_weight, k_weight, mixed, logs, eps, scale, stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of one position's heads to a share of the cache, and the new key and value into the cache.

    Shares are as equal as tiles of POSITIONS allow; each leaves its mean of the values [HEADS, SPLITS, 2 HALF] and
    the base-2 logarithm of its sum of weights, -inf where it had nothing. qkv: fp32 [PARTS, M, outputs], whose
    parts add up; keys, values: [KV_HEADS, stride, 2 HALF]. Sequences (M > 1) all begin with another axis, and see
    the cache, and count positions, from their own `starts` on.
    """
    _begin(OVERLAP)
    kv, split = tl.program_id(0), tl.program_id(1)
    dtype = keys.dtype.element_ty
    SIZE: tl.constexpr = 2 * HALF
    EACH: tl.constexpr = HEADS // KV_HEADS
    OUTPUTS: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
    # Before the wait: what earlier steps left.
    here = tl.load(position).to(tl.int32)
    begin = 0
    if M > 1:
        sequence = tl.program_id(2)
        begin = tl.load(starts + sequence).to(tl.int32)
        qkv += sequence * OUTPUTS
        keys += sequence.to(tl.int64) * KV_HEADS * stride * SIZE
        values += sequence.to(tl.int64) * KV_HEADS * stride * SIZE
        mixed += sequence * (HEADS * SPLITS * SIZE)
        logs += sequence * (HEADS * SPLITS)
    j, wide = tl.arange(0, HALF)[None], tl.arange(0, SIZE)[None]
    c = tl.load(cos + (here - begin) * SIZE + j).to(tl.float32)
    s = tl.load(sin + (here - begin) * SIZE + j).to(tl.float32)
    keys += kv.to(tl.int64) * stride * SIZE
    values += kv.to(tl.int64) * stride * SIZE
    share = _share(here, begin, SPLITS, POSITIONS)
    start = begin + split * share
    end = tl.minimum(start + share, here + 1)
    n = start + tl.arange(0, POSITIONS)
    next1, next2, next_value = _tile(keys, values, n, tl.minimum(here, end), j, wide, SIZE, HALF)
    _wait(OVERLAP)
    group = tl.arange(0, GROUP)
    head = kv * EACH + group
    real = (group < EACH)[:, None]
    q1, q2 = _rotated(qkv + head[:, None] * SIZE, q_weight, c, s, eps, real, NORM, HALF, PARTS, M * OUTPUTS)
    q1, q2 = q1.to(dtype), q2.to(dtype)
    new = qkv + (HEADS + kv + tl.zeros((1, 1), tl.int32)) * SIZE
    one = (tl.arange(0, 1) < 1)[:, None]
    k1, k2 = _rotated(new, k_weight, c, s, eps, one, NORM, HALF, PARTS, M * OUTPUTS)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    v = _sum(qkv + (HEADS + KV_HEADS + kv) * SIZE + wide, one, PARTS, M * OUTPUTS).to(dtype)
    top = tl.full((GROUP,), -float("inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    total = tl.zeros((GROUP, SIZE), tl.float32)
    for first in range(start, end, POSITIONS):
        n = first + tl.arange(0, POSITIONS)
        own = (n == here)[:, None]
        key1, key2, value = tl.where(own, k1, next1), tl.where(own, k2, next2), tl.where(own, v, next_value)
        next1, next2, next_value = _tile(
            keys, values, n + POSITIONS, tl.minimum(here, end), j, wide, SIZE, HALF
        )  # fmt: skip
        score = tl.dot(q1, tl.trans(key1)) + tl.dot(q2, tl.trans(key2))
        score = tl.where((n < end)[None], score * (scale * 1.4426950408889634), -float("inf"))
        top, weight, total = _softened(score, value, top, weight, total)
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
    mixed, logs, position, starts, out, A, u, rank, K: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, POSITIONS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the shares of a head of a sequence, and its part of o_proj's u = A x: u [heads, M, RANK], whose parts
    add up.
    """
    _begin(OVERLAP)
    head, sequence = tl.program_id(0), tl.program_id(1)
    dtype = out.dtype.element_ty
    split, wide, j = tl.arange(0, SPLITS), tl.arange(0, SIZE), tl.arange(0, TILE)
    A += head * SIZE + wide[None]
    if RANK > 0:
        a = tl.load(A + j[:, None] * K, mask=(j < rank)[:, None], other=0.0)
    positions = tl.load(position).to(tl.int32)
    begin = 0
    if M > 1:
        begin = tl.load(starts + sequence).to(tl.int32)
        mixed += sequence * (K * SPLITS)
        logs += sequence * (K // SIZE * SPLITS)
        u += sequence * RANK
    used = split * _share(positions, begin, SPLITS, POSITIONS) <= positions - begin
    _wait(OVERLAP)
    place = head * SPLITS + split
    parts = tl.load(mixed + place[:, None] * SIZE + wide[None], mask=used[:, None], other=0.0)
    log = tl.load(logs + place, mask=used, other=-float("inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    x = (tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)).to(dtype)
    tl.store(out + _place(head * SIZE + wide, K, M, sequence), x)
    if RANK > 0:
        for start in range(0, RANK, TILE):
            tl.store(u + head * (M * RANK) + start + j, tl.sum(a.to(tl.float32) * x.to(tl.float32)[None], 1))
            more = start + TILE + j
            a = tl.load(A + more[:, None] * K, mask=(more < tl.minimum(rank, RANK))[:, None], other=0.0)
