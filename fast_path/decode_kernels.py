"""The Triton kernels of a decode step through 4-bit weights. decode_step.py launches them and describes the whole step.

Words used here: a member is one of up to three linears that read the same x in one launch; a run is 64 consecutive
weights of a row, which one thread processes; a piece is BLOCKS runs of a row, which a program processes at a time.
"""

from fast_path.nf4 import lane_level, levels, tl, triton

# x lies in another order than the model's, so that it fits the 4-bit words that it is multiplied with. A word holds
# the codes of eight consecutive weights of a row.
#
# One sequence: x is stored as pairs of inputs, [2, 4, inputs / 64, 4]. Pair p of word w in half h (the first or the
# last four words) of a run is at [h, p, run, w]. A thread loads 16 bytes at a time, the pairs p of four words, and the
# loads of the 32 threads of a warp are consecutive in memory.
#
# A batch: x is stored as [8, inputs / 8, M], with input k at [k % 8, k // 8]. The j-th weights of all words are
# multiplied with slice j in a matrix product of their own, so weights never have to be interleaved. M is 1 for one
# sequence; for a batch it is the number of sequences rounded up to a power of two, at least 16. The additional
# sequences read zeros.


@triton.jit
def let_next_kernel_start(OVERLAP: tl.constexpr):
    """Let the next kernel start as soon as there is room for it. It first loads weights and then waits."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier_kernels(OVERLAP: tl.constexpr):
    """Wait until everything that earlier kernels wrote is in memory. Before this call only weights may be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def input_place(k, K: tl.constexpr, M: tl.constexpr = 1, m=0):
    """Return the place of input k of sequence m of M, in the order described above."""
    if M > 1:
        return (k % 8 * (K // 8) + k // 8) * M + m
    else:
        return ((((k // 32) % 2 * 4 + (k // 2) % 4) * (K // 64) + k // 64) * 4 + (k // 8) % 4) * 2 + k % 2


@triton.jit
def _input(place, K: tl.constexpr):
    """Return the input at a place of x for one sequence: the inverse of `input_place`."""
    run = place // 8 % (K // 64) * 64 + place // (K // 2) * 32
    return run + place // 2 % 4 * 8 + place // (K // 8) % 4 * 2 + place % 2


@triton.jit
def _pair(x, dtype: tl.constexpr):
    """Return the two 16-bit numbers in each 32-bit word, as fp32."""
    x = x.to(tl.uint32, bitcast=True)
    first = (x & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    return first.to(tl.float32), (x >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _issued(COMPILED: tl.constexpr):
    """Return 0, but only after all earlier loads have been issued.

    ptxas moves the loads for the next pass of a loop to the end of the loop, after everything that they should overlap
    with. It does not move them across a barrier, and anything computed from the barrier's result stays after the
    barrier.
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
    """Return 0 once `expected` programs of this kernel have added 1 to the count. What they wrote is in memory then.

    Those programs have lower numbers than the one that waits, so they have started already, and the wait ends. The
    interpreter runs programs one after another in the order of their numbers, so there is nothing to wait for.
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
    """Return the inputs that a piece is multiplied with: eight tensors of words [1, BLOCKS, 4], two inputs per word.

    Each thread gets the 32 pairs of inputs of its run. Past the end of x the inputs are 0.
    """
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
    """Return the total after adding the products of 32 of each run's 64 weights. words, total: [rows, BLOCKS, 4]."""
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
def quantisation_constants(code, second, shift, code2, block, real, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr):
    """Return the quantisation constants of blocks of weights, fp32.

    code: with NESTED (double quantisation) the 8-bit code of the constant, otherwise the constant itself.
    """
    if NESTED:
        code = tl.load(code2 + code.to(tl.int32))
        code = code * tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0) + shift
    return code


@triton.jit
def _places(row, rows, piece, RUNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the numbers of a piece's runs within the matrix, and whether these runs exist, [rows, BLOCKS] each."""
    run = piece * BLOCKS + tl.arange(0, BLOCKS)
    return row[:, None] * RUNS + run[None], (row < rows)[:, None] & (run < RUNS)[None]


@triton.jit
def _weights(
    codes, absmax, second, row, rows, piece, RUNS: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
):  # fmt: skip
    """Load a piece of some rows of a matrix: one run of 64 weights per thread.

    Returns the words of the first and of the second 32 weights of each run, [rows, BLOCKS, 4] each; the quantisation
    constants of the runs as they are stored, [rows, BLOCKS]; and with NESTED the constants that those are multiplied
    by, [rows, BLOCKS], otherwise the former again.
    """
    place, real = _places(row, rows, piece, RUNS, BLOCKS)
    words = codes + (place * 8)[:, :, None] + tl.arange(0, 4)[None, None]
    block = place // (BLOCKSIZE // 64)
    constant = tl.load(absmax + block, mask=real, other=0)
    factor = tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0) if NESTED else constant
    # Words outside of the matrix may hold anything: they are multiplied by a constant of 0 or by inputs of 0.
    return tl.load(words, mask=real[:, :, None]), tl.load(words + 4, mask=real[:, :, None]), constant, factor


@triton.jit
def _products(
    low, high, constant, x, lut, level, BLOCKS: tl.constexpr, dtype: tl.constexpr, SHUFFLE: tl.constexpr
):  # fmt: skip
    """Return each run's part of W x, fp32 [rows, BLOCKS], from what `_weights` and `_inputs` loaded."""
    total = tl.zeros((low.shape[0], BLOCKS, 4), tl.float32)
    total = _half(total, low, x[0], x[1], x[2], x[3], lut, level, dtype, SHUFFLE)
    total = _half(total, high, x[4], x[5], x[6], x[7], lut, level, dtype, SHUFFLE)
    return tl.sum(total, 2) * constant


@triton.jit
def _adapter_sums(
    u, rank, MEMBERS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PARTS_2: tl.constexpr,
):  # fmt: skip
    """Return the adapter's A x, summed over its parts and followed by zeros, [WIDTH].

    u: [PARTS, MEMBERS, RANK], starting at this member.
    """
    j, part = tl.arange(0, WIDTH), tl.arange(0, PARTS_2)
    inside = (part < PARTS)[:, None] & (j < rank)[None]
    return tl.sum(tl.load(u + part[:, None] * (MEMBERS * RANK) + j[None], mask=inside, other=0.0), 0)


@triton.jit
def _results(
    u, inverse, zero, member, rank0, scale0, rank1, scale1, NORM: tl.constexpr, SWIGLU: tl.constexpr,
    MEMBERS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr,
):  # fmt: skip
    """Load the results of `_adapter_program`: 1 / root mean square, and scaled A x of a member and of a second one.

    Without NORM the first is 1. Without SWIGLU there is no second member, and the first one's A x is returned twice.
    zero: 0, computed from something that is known only when the results are in memory; it keeps the loads after that.
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
    """Load rows of B, followed by zeros, [rows, WIDTH], and the biases of these rows, 0 if there are none."""
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
    """Load `_weights` of some rows and, if TWO, of the rows `half` further on; without TWO the first twice."""
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
    """Load `_adapter_rows` of some rows and, if TWO, of the rows `half` further on; without TWO the first twice."""
    b, bias = _adapter_rows(B0, bias0, row, rows0, rank0, RANK, WIDTH, BIAS)
    b1, bias1_ = b, bias
    if TWO:
        b1, bias1_ = _adapter_rows(B1, bias1, half + row, rows1, rank1, RANK, WIDTH, BIAS)
    return b, bias, b1, bias1_


@triton.jit
def _finished(total, sums, b, bias, RANK: tl.constexpr, BLOCKS: tl.constexpr):
    """Return bias + W x + B (A x), fp32 [rows]. total: the runs' parts of W x, [rows, BLOCKS]; sums: A x."""
    if RANK > 0:
        if RANK <= BLOCKS:  # then one reduction adds up both products
            total += b * sums[None]
        else:
            bias += tl.sum(b * sums[None], 1)
    return bias + tl.sum(total, 1)


@triton.jit
def _add(hidden, out, weight, row, rows, y, OUTPUTS: tl.constexpr, NEXT: tl.constexpr):
    """Write rows of hidden and, with NEXT, of the next product's x: hidden times the weight of its norm."""
    y = y.to(hidden.dtype.element_ty)
    tl.store(hidden + row, y, mask=row < rows)
    if NEXT:
        factor = tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + input_place(row, OUTPUTS), (y.to(tl.float32) * factor).to(y.dtype), mask=row < rows)


@triton.jit
def _leave(
    hidden, out, weight, row, row1, rows, rows1, y, y1, MODE: tl.constexpr, OUTPUTS: tl.constexpr,
    NEXT: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Write the outputs of some rows and, if TWO, of row1, in the way that `linear_kernel` describes for MODE."""
    if MODE == "swiglu":
        y = y / (1.0 + tl.exp(-y)) * y1
        tl.store(out + input_place(row, OUTPUTS), y.to(out.dtype.element_ty), mask=row < rows)
    elif MODE == "stack":
        tl.store(out + row, y, mask=row < rows)
    else:
        _add(hidden, out, weight, row, rows, y, OUTPUTS, NEXT)
        if TWO:
            _add(hidden, out, weight, row1, rows1, y1, OUTPUTS, NEXT)


@triton.jit
def find_member(
    program, EACH: tl.constexpr,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
):  # fmt: skip
    """Return the member that a program works on, if each program takes EACH rows of one member.

    Returns the program's number within the member, the number of outputs of the members before it, the member's number,
    and then the member's own arguments.
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
    """Write TAKE numbers of one part of u [parts, MEMBERS, RANK], whose parts add up to A x.

    A part sums over CHUNK inputs, in blocks of BLOCK. With NORM, x is the RMS norm of hidden, and the first program
    writes its 1 / root mean square, times `scale`, to `inverse`. With COUNT, the program adds 1 to `count` at the end,
    for the programs that wait in `_arrivals`. `count_before`, the count of the product before, is set back to 0.
    """
    TILES: tl.constexpr = RANK // TAKE if RANK > 0 else 1
    member, part = program // TILES % MEMBERS, program // (TILES * MEMBERS)
    if member == 2:
        A0, rank0 = A2, rank2
    elif member == 1:
        A0, rank0 = A1, rank1
    j = program % TILES * TAKE + tl.arange(0, TAKE)
    place = part * CHUNK + tl.arange(0, BLOCK)  # in x; the columns of A are loaded in the same order
    rows = A0 + j[:, None] * K
    real = (j < rank0)[:, None]
    a = tl.load(rows + (place if NORM else _input(place, K))[None], mask=real & (place < K)[None], other=0.0)
    factor = tl.load(weight + place, mask=place < K, other=0.0) if NORM else 1.0
    wait_for_earlier_kernels(OVERLAP)
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
        tl.debug_barrier()  # one thread adds 1 for all, so all must have written first
        tl.atomic_add(count, 1, sem="release")


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def adapter_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1, rank2,
    K: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute u = A x of up to three adapters and, with NORM, 1 / root mean square, ahead of the product.

    One-dimensional grid: each program takes TAKE rows of one A and a CHUNK of the inputs, see `_adapter_program`. Each
    number of A is read once, for one multiplication and addition. It is a launch of its own where the programs of the
    product are short, since these would need u before it is ready.
    """
    let_next_kernel_start(OVERLAP)
    _adapter_program(
        tl.program_id(0), x, hidden, weight, eps, scale, u, inverse, count, count_before, A0, A1, A2, rank0, rank1,
        rank2, K, MEMBERS, RANK, TAKE, CHUNK, BLOCK, NORM, False, OVERLAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # to Triton a rank of 1 would be of another type than 0
def linear_kernel(
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
    """Compute up to three 4-bit linears with their adapters on the x of one sequence, in one launch.

    One-dimensional grid. A program computes LOOP times ROWS outputs (rows of W) of one member, in pieces of BLOCKS
    runs. With TWO it computes as many more outputs from the same inputs: of the second matrix in MODE "swiglu",
    otherwise of the second half of the same matrix. Every weight is read once, for one multiplication and addition, so
    reading the weights is the limit. Therefore the weights of the next piece are loaded while the present ones are
    used.

    The first ADAPTERS programs compute what the other programs add after their first products: u of the adapters and,
    with NORM, 1 / root mean square. With NORM x is hidden times the norm's weight, so only this factor is missing. If
    an earlier launch has computed them, ADAPTERS is 0.

    MODE says where the outputs go. "stack": to out, fp32 [outputs of all members]. "residual": they are added to
    hidden, and with NEXT hidden times next_weight is written to out in the order of `input_place`. "swiglu":
    silu(first) * second is written to out in that order.
    """
    let_next_kernel_start(OVERLAP)
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
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = find_member(
            program, ROWS * LOOP,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    half = 0  # the first of the second rows
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
    wait_for_earlier_kernels(OVERLAP)
    pairs = x.to(tl.pointer_type(tl.int32))
    inputs = _inputs(pairs, 0, RUNS, BLOCKS)  # if there is only one piece, they stay in registers
    HERE: tl.constexpr = ADAPTERS == 0  # the results of `_adapter_program` are in memory already
    root, sums, sums1 = _results(
        u, inverse, 0, member, rank0, scale0, rank1, scale1, NORM and HERE, SWIGLU, MEMBERS, RANK if HERE else 0,
        WIDTH, PARTS, PARTS_2,
    )  # fmt: skip
    if HERE:
        tl.store(count_before, 0, mask=program == 0)
    for i in range(LOOP):
        next_row = row + stride
        next_b, next_bias, next_b1, next_bias1 = b, bias, b1, bias1_
        if LOOP > 1:  # loads past the last row are masked
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
def norm_kernel(
    x, weight, out, eps, K: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Write the RMS norm of x; with FIRST, write x times the weight alone, in the order of `input_place`.

    A single program takes all of x in one tile of BLOCK numbers: this is little work, and a step launches this kernel
    only twice. The first launch (FIRST) makes the x of the first product, the second one is the norm before the head;
    all norms in between are part of other kernels.
    """
    let_next_kernel_start(OVERLAP)
    k = tl.arange(0, BLOCK)
    inside = k < K
    factor = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    wait_for_earlier_kernels(OVERLAP)
    dtype = out.dtype.element_ty
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        tl.store(out + input_place(k, K), (value * factor).to(dtype), mask=inside)
    else:
        value = (value * tl.rsqrt(tl.sum(value * value) / K + eps)).to(dtype).to(tl.float32)
        tl.store(out + k, (value * factor).to(dtype), mask=inside)


@triton.jit
def sum_of_parts(x, mask, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """Load PARTS tensors that are STRIDE apart and return their sum."""
    total = tl.load(x, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x + part * STRIDE, mask=mask, other=0.0)
    return total


@triton.jit
def _normed(value, weight, inverse, j, heads, NORM: tl.constexpr):
    """Return features j of heads after their norm. inverse: 1 / root mean square; heads: which exist, bool [heads, 1]."""
    if NORM == "all":
        value = value * inverse * tl.load(weight + j, mask=heads, other=0.0).to(tl.float32)
    elif NORM == "head":
        value = value * inverse * tl.load(weight + j).to(tl.float32)
    return value


@triton.jit
def _partner(j, TURN: tl.constexpr):
    """Return the feature that feature j is rotated with, if the first 2 TURN features of a head are; j for the rest."""
    return tl.where(j < TURN, j + TURN, tl.where(j < 2 * TURN, j - TURN, j))


@triton.jit
def _rotated(
    x, weight, root, c, s, c2, s2, eps, heads, NORM: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Return both halves of heads after their norm and rotary embedding, fp32 [heads, HALF] each.

    c, s, c2, s2: cosine and sine of both halves; heads: which heads exist, bool [heads, 1]; root: 1 / root mean square of
    all heads together, for NORM "all".
    """
    j = tl.arange(0, HALF)[None]
    first = sum_of_parts(x + j, heads, PARTS, STRIDE)
    second = sum_of_parts(x + HALF + j, heads, PARTS, STRIDE)
    inverse = root
    if NORM == "head":
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
    first = _normed(first, weight, inverse, j, heads, NORM)
    second = _normed(second, weight, inverse, HALF + j, heads, NORM)
    if TURN == HALF:
        return first * c - second * s, second * c + first * s
    else:
        p, p2 = _partner(j, TURN), _partner(HALF + j, TURN)
        other = _normed(sum_of_parts(x + p, heads, PARTS, STRIDE), weight, inverse, p, heads, NORM)
        other2 = _normed(sum_of_parts(x + p2, heads, PARTS, STRIDE), weight, inverse, p2, heads, NORM)
        return first * c + other * s, second * c2 + other2 * s2


@triton.jit
def _share(here, begin, SPLITS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return how many positions each program takes of a sequence's attention: a multiple of POSITIONS."""
    return tl.cdiv(tl.cdiv(here + 1 - begin, SPLITS), POSITIONS) * POSITIONS


@triton.jit
def _tile(keys, values, n, here, j, wide, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Load both halves of the keys, and the values, of positions n; from `here` on they are 0."""
    old = (n < here)[:, None]
    first = tl.load(keys + n[:, None] * SIZE + j, mask=old, other=0.0)
    second = tl.load(keys + n[:, None] * SIZE + HALF + j, mask=old, other=0.0)
    return first, second, tl.load(values + n[:, None] * SIZE + wide, mask=old, other=0.0)


@triton.jit
def _softened(score, value, top, weight, total):
    """Return the largest score, the sum of weights and the sum of weighted values after one more tile has been added.

    The weights are powers of 2 of the score minus the largest score so far (online softmax).
    """
    higher = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, weight * fade + tl.sum(p, 1), total * fade[:, None] + tl.dot(p.to(value.dtype), value)


@triton.jit
def _angles(cos, sin, HALF: tl.constexpr, TURN: tl.constexpr):
    """Return the cosine and sine of a position for the first half of a head, and for the second, fp32 [1, HALF] each."""
    j = tl.arange(0, HALF)[None]
    c, s = tl.load(cos + j).to(tl.float32), tl.load(sin + j).to(tl.float32)
    c2, s2 = c, s
    if TURN < HALF:
        c2, s2 = tl.load(cos + HALF + j).to(tl.float32), tl.load(sin + HALF + j).to(tl.float32)
    return c, s, c2, s2


@triton.jit
def _new_token(
    qkv, q_weight, k_weight, roots, c, s, c2, s2, eps, kv, head, real, wide, dtype: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Return both halves of the new token's query heads, both halves of its key, and its value, in the cache's dtype.

    c, s, c2, s2: see `_angles`; head, real: the query heads of head kv, and which of them exist.
    """
    SIZE: tl.constexpr = 2 * HALF
    one = (tl.arange(0, 1) < 1)[:, None]
    new = qkv + (HEADS + kv + tl.zeros((1, 1), tl.int32)) * SIZE
    root, root2 = 1.0, 1.0
    if NORM == "all":
        root, root2 = tl.load(roots), tl.load(roots + 1)
        q_weight += head[:, None] * SIZE
        k_weight += (kv + tl.zeros((1, 1), tl.int32)) * SIZE
    q1, q2 = _rotated(
        qkv + head[:, None] * SIZE, q_weight, root, c, s, c2, s2, eps, real, NORM, HALF, TURN, PARTS, STRIDE
    )  # fmt: skip
    q1, q2 = q1.to(dtype), q2.to(dtype)
    k1, k2 = _rotated(new, k_weight, root2, c, s, c2, s2, eps, one, NORM, HALF, TURN, PARTS, STRIDE)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    v = sum_of_parts(qkv + (HEADS + KV_HEADS + kv) * SIZE + wide, one, PARTS, STRIDE).to(dtype)
    return q1, q2, k1, k2, v


@triton.jit
def _attend(
    keys, values, q1, q2, k1, k2, v, next1, next2, next_value, start, end, here, scale, cap, GROUP: tl.constexpr,
    HALF: tl.constexpr, POSITIONS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return the largest score, the sum of weights and the sum of weighted values over positions start to end.

    next1, next2, next_value: the first tile, which is loaded already; each pass loads the next tile. Position `here` is
    the new token, whose k1, k2 and v are not in the cache yet.
    """
    SIZE: tl.constexpr = 2 * HALF
    j, wide = tl.arange(0, HALF)[None], tl.arange(0, SIZE)[None]
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
        score = (tl.dot(q1, tl.trans(key1)) + tl.dot(q2, tl.trans(key2))) * scale
        if CAPPED:
            score = cap * (1.0 - 2.0 / (tl.exp2(score * (2 * 1.4426950408889634 / cap)) + 1.0))
        score = tl.where((n < end)[None], score * 1.4426950408889634, -float("inf"))
        top, weight, total = _softened(score, value, top, weight, total)
    return top, weight, total


@triton.jit
def attention_kernel(
    qkv, keys, values, position, starts, cos, sin, q_weight, k_weight, roots, mixed, logs, eps, scale, stride,
    cap, window, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, POSITIONS: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, CAPPED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute the attention of a new token to a share of the cache, and write its key and value into the cache.

    Grid: heads of k and v, SPLITS shares of the positions, sequences. A program computes all query heads of its head of
    k and v (GROUP, a power of two that covers them), in tiles of POSITIONS positions. Each key and value is read once
    for all of these heads, with few operations per number, so reading the cache is the limit. There are few heads of k
    and v, so the positions are split as well; otherwise most multiprocessors would have no work. Shares are as equal as
    whole tiles allow.

    Each share writes its mean of the values to mixed [HEADS, SPLITS, 2 HALF] and the base-2 logarithm of its sum of
    weights to logs [HEADS, SPLITS], -inf if it has no positions; `combine_kernel` puts them together. qkv: fp32
    [PARTS, M, outputs], whose parts are added up here; keys, values: [KV_HEADS, stride, 2 HALF]. With several sequences
    (M > 1) mixed, logs, keys and values have one more dimension in front, and each sequence uses the cache, and counts
    positions, from its own `starts` on. window: the last positions that are seen. With CAPPED, scores are capped with cap
    tanh(score / cap).

    NORM: "head" if q and k have norms as wide as a head, "all" if as wide as all heads, then with `roots` [M, 2] from
    `roots_kernel`; otherwise "". The first 2 TURN features of each head are rotated, feature i together with i + TURN. If
    these are not all, the sine of the first TURN has the sign that it is added with, and the rest has sine 0.
    """
    let_next_kernel_start(OVERLAP)
    kv, split = tl.program_id(0), tl.program_id(1)
    dtype = keys.dtype.element_ty
    SIZE: tl.constexpr = 2 * HALF
    EACH: tl.constexpr = HEADS // KV_HEADS
    OUTPUTS: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
    # The loads before the wait read only what earlier steps wrote.
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
        roots += sequence * 2
    j, wide = tl.arange(0, HALF)[None], tl.arange(0, SIZE)[None]
    c, s, c2, s2 = _angles(cos + (here - begin) * SIZE, sin + (here - begin) * SIZE, HALF, TURN)
    keys += kv.to(tl.int64) * stride * SIZE
    values += kv.to(tl.int64) * stride * SIZE
    seen = tl.maximum(begin, here + 1 - window)
    share = _share(here, seen, SPLITS, POSITIONS)
    start = seen + split * share
    end = tl.minimum(start + share, here + 1)
    n = start + tl.arange(0, POSITIONS)
    next1, next2, next_value = _tile(keys, values, n, tl.minimum(here, end), j, wide, SIZE, HALF)
    wait_for_earlier_kernels(OVERLAP)
    group = tl.arange(0, GROUP)
    head = kv * EACH + group
    real = (group < EACH)[:, None]
    q1, q2, k1, k2, v = _new_token(
        qkv, q_weight, k_weight, roots, c, s, c2, s2, eps, kv, head, real, wide, dtype, HEADS, KV_HEADS, HALF, TURN, NORM,
        PARTS, M * OUTPUTS,
    )  # fmt: skip
    top, weight, total = _attend(
        keys, values, q1, q2, k1, k2, v, next1, next2, next_value, start, end, here, scale, cap, GROUP, HALF, POSITIONS,
        CAPPED,
    )  # fmt: skip
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
def combine_kernel(
    mixed, logs, position, starts, out, A, u, rank, window, K: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, POSITIONS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the shares of attention to o_proj's x, and compute each head's part of u = A x for o_proj's adapter.

    Grid: heads, sequences. A program reads the SPLITS means of its head, weighs them by their sums of weights, and
    writes SIZE numbers of x in the order of `input_place`. From these it computes its part of u [heads, M, RANK], whose
    parts add up to A x, in tiles of TILE rows of A. It does so here because it has x in registers. Every number is read
    once, for one multiplication and addition.
    """
    let_next_kernel_start(OVERLAP)
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
    seen = tl.maximum(begin, positions + 1 - window)
    used = split * _share(positions, seen, SPLITS, POSITIONS) <= positions - seen
    wait_for_earlier_kernels(OVERLAP)
    place = head * SPLITS + split
    parts = tl.load(mixed + place[:, None] * SIZE + wide[None], mask=used[:, None], other=0.0)
    log = tl.load(logs + place, mask=used, other=-float("inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    x = (tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)).to(dtype)
    tl.store(out + input_place(head * SIZE + wide, K, M, sequence), x)
    if RANK > 0:
        for start in range(0, RANK, TILE):
            tl.store(u + head * (M * RANK) + start + j, tl.sum(a.to(tl.float32) * x.to(tl.float32)[None], 1))
            more = start + TILE + j
            a = tl.load(A + more[:, None] * K, mask=(more < tl.minimum(rank, RANK))[:, None], other=0.0)
