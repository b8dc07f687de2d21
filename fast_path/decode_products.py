"""The products of a decode step through 4-bit weights, for one sequence: matrix times vector, in one Triton kernel.

decode_step.py launches it and describes the whole step; decode_kernels.py has the other kernels of a step.

Words used here: a member is one of up to three linears that read the same x in one launch; a run is 64 consecutive
weights of a row; a slice is four runs, 256 weights of a row. A warp takes a slice of 16 rows at a time. Of these, each
thread gets the sums of one run of two rows: thread 4 j + t has run t of rows j and j + 8.
"""

from fast_path.nf4 import levels, tl, triton

# x lies in another order than the model's. One sequence: of each 128 inputs, eight at a time of each of the four parts of
# 32 lie together, since that is what four threads load at a time. A batch: x is stored as [8, inputs / 8, M], with input
# k at [k % 8, k // 8]. The j-th weights of all words are multiplied with slice j in a matrix product of their own, so
# weights never have to be interleaved. M is 1 for one sequence; for a batch it is the number of sequences rounded up to
# a power of two, at least 16. The additional sequences read zeros.


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
        return k // 128 * 128 + k // 8 % 4 * 32 + k // 32 % 4 * 8 + k % 8


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


# ------------------------------------------------------------------------------------------------ 256 weights of 16 rows


def _sums_in_ptx(kind: str, depth: int) -> str:
    """Return PTX for the sums of a thread's run in two rows: $0 and $1. See `_sums`.

    $2 to $17: words of codes, four each of rows A and B of the first eight rows and of rows A and B of the second; $18: the
    table of pairs of levels; $19: x; $20: whether this thread holds inputs; $21: whether its number of a row is even; $22:
    whether the sums that it gets are of its own run. kind: bf16 or f16; depth: inputs of an instruction on tensor cores.
    """
    sums = [f"{name}{i}" for name in "ab" for i in range(4)]
    looked = [f"{name}{word}{byte}" for name in ("p", "q", "r", "s") for word in range(4) for byte in range(4)]
    inputs = [f"x{word}{i}" for word in range(4) for i in range(4)]
    product = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    lines = [
        f".reg .b32 t, table, {', '.join(looked)}, {', '.join(inputs)}; .reg .pred inside, even, useful; .reg .f32 {', '.join(sums)}, u, v;",
        # The barrier costs nothing. ptxas would move the loads of the next slice to the end, behind all that they should
        # overlap with; it moves no access of memory across a barrier.
        "bar.warp.sync 0xffffffff; mov.b32 table, $18;",
        *(f"mov.f32 {name}, 0f00000000;" for name in sums),
        *(f"mov.b32 {name}, 0;" for name in inputs),
        "setp.ne.u32 inside, $20, 0; setp.ne.u32 even, $21, 0; setp.ne.u32 useful, $22, 0;",
    ]
    for word in range(4):
        names = ", ".join(f"x{word}{i}" for i in range(4))
        lines.append(f"@inside ld.global.v4.b32 {{{names}}}, [$19 + {64 * word}];")
    for word in range(4):
        for place, name in enumerate(("p", "q", "r", "s")):
            for byte in range(4):
                lines.append(f"prmt.b32 t, ${2 + 4 * place + word}, 0, 0x444{byte}; mad.lo.u32 t, t, 128, table;")
                lines.append(f"ld.shared.b32 {name}{word}{byte}, [t];")
        for d, first, second in (("a", "p", "r"), ("b", "q", "s")):
            total = "{" + ", ".join(f"{d}{i}" for i in range(4)) + "}"
            for pair in range(0, 4, depth // 8):
                some = range(pair, pair + depth // 8)
                left = ", ".join(f"{name}{word}{i}" for i in some for name in (first, second))
                right = ", ".join(f"x{word}{i}" for i in some)
                lines.append(f"{product} {total}, {{{left}}}, {{{right}}}, {total};")
    for out, number in (("$0", 0), ("$1", 2)):
        lines.append(
            f"selp.f32 u, b{number}, a{number}, even; shfl.sync.bfly.b32 v, u, 4, 31, -1; "
            f"selp.f32 u, a{number}, b{number}, even; selp.f32 {out}, u, v, useful;"
        )
    return "{\n" + "\n".join(lines) + "\n}"


SUMS_BF16, SUMS_FP16 = tl.constexpr(_sums_in_ptx("bf16", 16)), tl.constexpr(_sums_in_ptx("f16", 16))
SUMS_TURING = tl.constexpr(_sums_in_ptx("f16", 8))
SUMS_FORM = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 17 + ["l"] + ["r"] * 3))
CODES = tl.constexpr(
    "\n".join(
        f"ld.global.L1::no_allocate.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [${16 + i}];"
        for i in range(4)
    )
)
CODES_FORM = tl.constexpr(",".join(["=r"] * 16 + ["l"] * 4))
TABLE_BYTES = tl.constexpr(256 * 32 * 4)


def _fill_in_ptx() -> str:
    """Return PTX that fills the table of pairs of levels, 32 times each, and behind it that of constants; $0: its place.

    $1: the thread, of 256; $2, $3: its pair and its constant.
    """
    lines = [
        f".shared .align 128 .b8 nf4_tables[{256 * 33 * 4}]; .reg .b32 row, chunk, place;",
        "mov.u32 $0, nf4_tables; mad.lo.u32 row, $1, 128, $0; mad.lo.u32 place, $1, 4, $0;",
        f"st.shared.b32 [place + {256 * 32 * 4}], $3;",
    ]
    for i in range(8):  # eight threads write to different banks: each begins with another 16 bytes of its row
        lines.append(f"add.u32 chunk, $1, {i}; and.b32 chunk, chunk, 7; mad.lo.u32 chunk, chunk, 16, row;")
        lines.append("st.shared.v4.b32 [chunk], {$2, $2, $2, $2};")
    return "{\n" + "\n".join(lines) + "\n}"


FILL = tl.constexpr(_fill_in_ptx())


@triton.jit
def _tables(pairs, code2, thread, NESTED: tl.constexpr, COMPILED: tl.constexpr):
    """Write the tables into shared memory and return their place: a pair of levels for each byte, and the constants' codes.

    Each of the 32 threads of a warp reads a copy of its own, so that no two ever wait for the same memory bank.
    """
    base = thread
    if COMPILED:
        tl.static_assert(thread.shape[0] == 256)
        constant = tl.load(code2 + thread) if NESTED else thread.to(tl.float32)
        base = tl.inline_asm_elementwise(
            FILL, "=&r,r,r,f", [thread, tl.load(pairs + thread), constant], tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()
        base = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [base], tl.int32, is_pure=False, pack=1)
    return base


@triton.jit
def _codes(codes, row, row1, codes1, rows, rows1, slice, j, t, RUNS: tl.constexpr, COMPILED: tl.constexpr):
    """Load a thread's words of a slice: 16 tensors. Eight threads load the 128 bytes of a row at a time.

    So a thread has words of two rows, an even one and the next one, and as many of `row1`.
    """
    if COMPILED:
        chunk = slice * 8 + j % 2 * 4 + t
        if RUNS % 4:  # past the end of a row any codes will do: their inputs are 0
            chunk = tl.minimum(chunk, 2 * RUNS - 1)
        even, even1 = row - row % 2, row1 - row1 % 2
        odd, odd1 = tl.minimum(even + 1, rows - 1), tl.minimum(even1 + 1, rows1 - 1)
        return tl.inline_asm_elementwise(
            CODES, CODES_FORM, [
                (codes + even * (RUNS * 8) + chunk * 4).to(tl.int64), (codes + odd * (RUNS * 8) + chunk * 4).to(tl.int64),
                (codes1 + even1 * (RUNS * 8) + chunk * 4).to(tl.int64), (codes1 + odd1 * (RUNS * 8) + chunk * 4).to(tl.int64),
            ],
            dtype=(
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            ),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return row, row1


@triton.jit
def _plain_sum(codes, row, run, x, lut, RUNS: tl.constexpr):
    """Return the sum of a run of a row, as `_sums` does: what the interpreter runs."""
    total = tl.zeros(run.shape, tl.float32)
    inside = run < RUNS
    for word in tl.static_range(8):
        words = tl.load(codes + (row * RUNS + run) * 8 + word, mask=inside, other=0)
        found = levels(words, lut, 0.0, False)
        for j in tl.static_range(8):
            k = run * 64 + word * 8 + j
            total += found[j] * tl.load(x + input_place(k, RUNS * 64), mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _sums(
    words, codes, codes1, row, row1, x, lut, tables, slice, j, t, dtype: tl.constexpr, RUNS: tl.constexpr,
    TURING: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Return the sums of levels times inputs of this thread's run, for its two rows, fp32. words: see `_codes`.

    A warp computes them together, on tensor cores. One operand has 16 rows: row j holds the first half of a slice of an
    even row of W if j is even, and the second half of the same row if it is odd; rows j + 8 likewise. The other operand has
    eight columns; column 2 t holds the inputs of run t, and zeros elsewhere, so that the four runs, which have constants of
    their own, stay apart. Sums of the odd rows of W are computed in the same way. Half of the results are of a half and a
    run that do not belong together; in their place a thread takes the sums of its run that its neighbour, four threads away,
    has computed. Levels are rounded to 16 bit; products are exact, and added in fp32.
    """
    if COMPILED:
        chunk = j // 4 * 4 + t
        inside = (j % 2 == 0) & (j // 2 % 2 == t // 2) & (slice * 8 + chunk < 2 * RUNS)
        return tl.inline_asm_elementwise(
            SUMS_BF16 if dtype == tl.bfloat16 else SUMS_TURING if TURING else SUMS_FP16, SUMS_FORM, [
                words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], words[8], words[9],
                words[10], words[11], words[12], words[13], words[14], words[15], tables + j * 16 + t * 4,
                (x + slice * 256 + j // 4 * 128 + t * 8).to(tl.int64), inside.to(tl.int32), (j % 2 == 0).to(tl.int32),
                ((j % 2 == 0) == (t < 2)).to(tl.int32),
            ],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        run = slice * 4 + t
        return _plain_sum(codes, row, run, x, lut, RUNS), _plain_sum(codes1, row1, run, x, lut, RUNS)


@triton.jit
def _stored_constants(
    absmax, second, row, run, RUNS: tl.constexpr, FACTOR: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr
):  # fmt: skip
    """Load the quantisation constants of a row's runs as they are stored and, with FACTOR, what multiplies them."""
    block = (row * RUNS + tl.minimum(run, RUNS - 1)) // (BLOCKSIZE // 64)
    constant = tl.load(absmax + block)
    return constant, tl.load(second + block // BLOCKSIZE2) if FACTOR else constant


@triton.jit
def _row_factor(
    second, row, rows, RUNS: tl.constexpr, WHOLE: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr
):  # fmt: skip
    """Return what multiplies all stored constants of a row if it is one number for the whole row, otherwise 1."""
    factor = 1.0
    if WHOLE:
        block = tl.minimum(row, rows - 1) * RUNS // (BLOCKSIZE // 64)
        factor = tl.load(second + block // BLOCKSIZE2)
    return factor


@triton.jit
def _constant(stored, tables, code2, NESTED: tl.constexpr, FACTOR: tl.constexpr, COMPILED: tl.constexpr):
    """Return the quantisation constants of runs, fp32, without what is added to all and without `_row_factor`."""
    constant, factor = stored
    if NESTED:
        if COMPILED:
            place = tables + TABLE_BYTES + constant.to(tl.int32) * 4
            constant = tl.inline_asm_elementwise(
                "ld.shared.f32 $0, [$1];", "=f,r", [place], tl.float32, is_pure=True, pack=1
            )
        else:
            constant = tl.load(code2 + constant.to(tl.int32))
    return constant * factor if FACTOR else constant


@triton.jit
def _four_sums(total):
    """Return in each thread the sum over the four threads of its rows."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        shfl.sync.bfly.b32 t, $1, 1, 31, -1; add.f32 $0, $1, t;
        shfl.sync.bfly.b32 t, $0, 2, 31, -1; add.f32 $0, $0, t;
        }""",
        "=&f,f", [total], tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _row_sums(total, total1, WIDE: tl.constexpr):
    """Return the sums of the pairs of rows of each group of WIDE warps: two tensors [8 groups]. total: of all threads."""
    GROUPS: tl.constexpr = total.shape[0] // 32 // WIDE
    runs = tl.sum(tl.reshape(tl.join(total, total1), (GROUPS, WIDE, 8, 4, 2)), 3)
    return tl.split(tl.reshape(tl.sum(runs, 1), (GROUPS * 8, 2)))


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
def _adapter_rows(B, row, rows, rank, share, RANK: tl.constexpr, SHARES: tl.constexpr):
    """Load what a thread takes of rows of an adapter's B: every SHARES-th number, from number `share` on; a tuple."""
    found = ()
    for start in tl.static_range(0, RANK, SHARES):
        inside = (row < rows) & (start + share < rank)
        found = found + (tl.load(B + row * rank + start + share, mask=inside, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit
def _adapter_share(
    b, u, scale, share, RANK: tl.constexpr, SHARES: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Return a thread's share of scale B (A x). b: see `_adapter_rows`; u: [PARTS, STRIDE], whose parts add up to A x."""
    total = tl.zeros(share.shape, tl.float32)
    for start in tl.static_range(0, RANK, SHARES):
        value = tl.zeros(share.shape, tl.float32)
        for part in tl.static_range(PARTS):
            value += tl.load(u + part * STRIDE + start + share, mask=start + share < RANK, other=0.0)
        total += b[start // SHARES].to(tl.float32) * value
    return total * scale


@triton.jit
def _beside(
    total, hidden, bias, row, rows, share, MODE: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Return the total with the bias and, in MODE "residual", hidden added by the first thread of each row."""
    inside = (row < rows) & (share == 0)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    if MODE == "residual":
        total += tl.load(hidden + row, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """Return an MLP's activation of y, as `_gate` of fused_linear.py explains it."""
    z = y
    if ACTIVATION == "gelu_pytorch_tanh":
        z = 1.5957691216057308 * y * (1 + 0.044715 * y * y)
    return y / (1.0 + tl.exp(-z))


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
    hidden, out, weight, row, row1, rows, rows1, y, y1, MODE: tl.constexpr, OUTPUTS: tl.constexpr, NEXT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the rows row and row1 in the way that `linear_kernel` describes for MODE."""
    if MODE == "swiglu":
        y = activated(y, ACTIVATION) * y1
        tl.store(out + input_place(row, OUTPUTS), y.to(out.dtype.element_ty), mask=row < rows)
    elif MODE == "stack":
        tl.store(out + row, y, mask=row < rows)
        tl.store(out + row1, y1, mask=row1 < rows1)
    else:
        _add(hidden, out, weight, row, rows, y, OUTPUTS, NEXT)
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
    k = part * CHUNK + tl.arange(0, BLOCK)
    rows = A0 + j[:, None] * K
    real = (j < rank0)[:, None]
    a = tl.load(rows + k[None], mask=real & (k < K)[None], other=0.0)
    factor = tl.load(weight + k, mask=k < K, other=0.0) if NORM else 1.0
    wait_for_earlier_kernels(OVERLAP)
    if program == 0:
        tl.store(count_before, 0)
    products = tl.zeros((TAKE, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for _ in range(CHUNK // BLOCK):
        value = tl.load(hidden + k if NORM else x + input_place(k, K), mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= factor.to(tl.float32)
        products += a.to(tl.float32) * value[None]
        k += BLOCK
        inside = k < tl.minimum(K, part * CHUNK + CHUNK)
        a = tl.load(rows + k[None], mask=real & inside[None], other=0.0)
        if NORM:
            factor = tl.load(weight + k, mask=inside, other=0.0)
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


@triton.jit
def _rows_of(program, i, stride, first, SWIGLU: tl.constexpr, GROUPS: tl.constexpr):
    """Return the two rows of each of a program's 8 GROUPS pairs in its step i; `first` is the number within them.

    With SWIGLU these are the same row of two matrices, otherwise rows j and j + 8 of 16.
    """
    tile = (program + i * stride) * GROUPS + first // 8
    if SWIGLU:
        row = tile * 8 + first % 8
        return row, row
    else:
        row = tile * 16 + first % 8
        return row, row + 8


@triton.jit
def _loaded(
    codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, row, row1, slice, j, t, RUNS: tl.constexpr,
    FACTOR: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Load a thread's words and stored constants of a slice of two rows. Past the last row the last one is loaded."""
    row, row1 = tl.minimum(row, rows0 - 1), tl.minimum(row1, rows1 - 1)
    words = _codes(codes0, row, row1, codes1, rows0, rows1, slice, j, t, RUNS, COMPILED)
    run = slice * 4 + t
    stored = _stored_constants(absmax0, second0, row, run, RUNS, FACTOR, BLOCKSIZE, BLOCKSIZE2)
    stored1 = _stored_constants(absmax1, second1, row1, run, RUNS, FACTOR, BLOCKSIZE, BLOCKSIZE2)
    return words, stored, stored1


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # to Triton a rank of 1 would be of another type than 0
def linear_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, out, next_weight, pairs, lut, code2, A0, A1, A2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    MODE: tl.constexpr, NORM: tl.constexpr, NEXT: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr,
    OUTPUTS: tl.constexpr, RANK: tl.constexpr, ADAPTERS: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr, LOOP: tl.constexpr,
    SHUFFLE: tl.constexpr, HALF: tl.constexpr, TURING: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute up to three 4-bit linears with their adapters on the x of one sequence, in one launch.

    One-dimensional grid. A program computes LOOP times 16 WARPS / WIDE outputs (rows of W) of one member, or with MODE
    "swiglu" half as many of two members. WIDE warps share the inputs of a row among each other. Every weight is read
    once, for one multiplication and addition, so reading the weights is the limit. Therefore the weights of the next
    slice are loaded while the present ones are used.

    The first ADAPTERS programs compute what the other programs add after their first products: u of the adapters and,
    with NORM, 1 / root mean square. With NORM x is hidden times the norm's weight, so only this factor is missing. If
    an earlier launch has computed them, ADAPTERS is 0.

    MODE says where the outputs go. "stack": to out, fp32 [outputs of all members]. "residual": they are added to
    hidden, and with NEXT hidden times next_weight is written to out in the order of `input_place`. "swiglu":
    activation(first) * second is written to out in that order.
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
    PIECES: tl.constexpr = ((RUNS + 3) // 4 + WIDE - 1) // WIDE
    GROUPS: tl.constexpr = WARPS // WIDE
    EACH: tl.constexpr = (8 if SWIGLU else 16) * GROUPS
    if MODE == "stack":
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = find_member(
            program, EACH * LOOP,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    if not SWIGLU:
        codes1, absmax1, second1, offset1, bias1, B1 = codes0, absmax0, second0, offset0, bias0, B0
        rows1, rank1, scale1 = rows0, rank0, scale0
    stride = tl.cdiv(rows0, EACH * LOOP)
    thread = tl.arange(0, 32 * WARPS)
    j, t, slice = thread // 4 % 8, thread % 4, thread // 32 % WIDE
    own = thread // (32 * WIDE) * 8 + j  # the number of a thread's pair of rows
    SHARES: tl.constexpr = 4 * WIDE  # threads per pair of rows
    share = slice * 4 + t
    WHOLE: tl.constexpr = NESTED and BLOCKSIZE * BLOCKSIZE2 % K == 0  # a row's constants have one factor
    FACTOR: tl.constexpr = NESTED and not WHOLE
    shift = tl.load(offset0) if NESTED else 0.0
    shift1 = tl.load(offset1) if NESTED else 0.0
    row, row1 = _rows_of(program, 0, stride, own, SWIGLU, GROUPS)
    words, stored, stored1 = _loaded(
        codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, row, row1, slice, j, t, RUNS, FACTOR,
        BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
    )  # fmt: skip
    factor = _row_factor(second0, row, rows0, RUNS, WHOLE, BLOCKSIZE, BLOCKSIZE2)
    factor1 = _row_factor(second1, row1, rows1, RUNS, WHOLE, BLOCKSIZE, BLOCKSIZE2)
    b = _adapter_rows(B0, row, rows0, rank0, share, RANK, SHARES)
    b1 = _adapter_rows(B1, row1, rows1, rank1, share, RANK, SHARES)
    tables = _tables(pairs, code2, thread, NESTED, SHUFFLE)
    wait_for_earlier_kernels(OVERLAP)
    if ADAPTERS == 0:
        tl.store(count_before, 0, mask=program == 0)
    ready = 0  # after the first rows it is computed from what is known only when u and the root are in memory
    for i in range(LOOP):
        next_row, next_row1 = _rows_of(program, i + 1, stride, own, SWIGLU, GROUPS)
        next_b, next_b1, next_factor, next_factor1 = b, b1, factor, factor1
        if LOOP > 1:  # loads past the last row are masked
            next_factor = _row_factor(second0, next_row, rows0, RUNS, WHOLE, BLOCKSIZE, BLOCKSIZE2)
            next_factor1 = _row_factor(second1, next_row1, rows1, RUNS, WHOLE, BLOCKSIZE, BLOCKSIZE2)
            next_b = _adapter_rows(B0, next_row, rows0, rank0, share, RANK, SHARES)
            next_b1 = _adapter_rows(B1, next_row1, rows1, rank1, share, RANK, SHARES)
        total = tl.zeros((32 * WARPS,), tl.float32)
        total1, plain, plain1 = total, total, total
        for piece in range(PIECES):
            then, then1, after = row, row1, slice + (piece + 1) * WIDE
            if piece == PIECES - 1:
                then, then1, after = next_row, next_row1, slice
            next_words, next_stored, next_stored1 = words, stored, stored1
            if LOOP * PIECES > 1:
                next_words, next_stored, next_stored1 = _loaded(
                    codes0, absmax0, second0, rows0, codes1, absmax1, second1, rows1, then, then1, after, j, t, RUNS,
                    FACTOR, BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
                )  # fmt: skip
            constant = _constant(stored, tables, code2, NESTED, FACTOR, SHUFFLE)
            constant1 = _constant(stored1, tables, code2, NESTED, FACTOR, SHUFFLE)
            found, found1 = _sums(
                words, codes0, codes1, row, row1, x, lut, tables, slice + piece * WIDE, j, t, HALF, RUNS, TURING, SHUFFLE
            )  # fmt: skip
            total += found * constant
            total1 += found1 * constant1
            plain, plain1 = plain + found, plain1 + found1
            words, stored, stored1 = next_words, next_stored, next_stored1
        total, total1 = total * factor + plain * shift, total1 * factor1 + plain1 * shift1
        if ADAPTERS > 0 and i == 0:
            ready = _arrivals(count, ADAPTERS, SHUFFLE)
        if NORM:
            root = tl.load(inverse + ready)
            total, total1 = total * root, total1 * root
        if RANK > 0:
            own_u = u + ready + member * RANK
            other_u = own_u + RANK if SWIGLU else own_u
            total += _adapter_share(b, own_u, scale0, share, RANK, SHARES, PARTS, MEMBERS * RANK)
            total1 += _adapter_share(b1, other_u, scale1, share, RANK, SHARES, PARTS, MEMBERS * RANK)
        total = _beside(total, hidden, bias0, row, rows0, share, MODE, BIAS)
        total1 = _beside(total1, hidden, bias1, row1, rows1, share, MODE, BIAS)
        if WIDE == 1 and SHUFFLE:  # each warp has rows of its own and waits for no other one
            y, y1 = _four_sums(total), _four_sums(total1)
            out_row, out_row1 = tl.where(t == 0, row, rows0), tl.where(t == 0, row1, rows1)
        else:
            y, y1 = _row_sums(total, total1, WIDE)
            out_row, out_row1 = _rows_of(program, i, stride, tl.arange(0, 8 * GROUPS), SWIGLU, GROUPS)
        _leave(
            hidden, out + first_outputs, next_weight, out_row, out_row1, rows0, rows1, y, y1, MODE, OUTPUTS, NEXT, ACTIVATION
        )  # fmt: skip
        row, row1, b, b1, factor, factor1 = next_row, next_row1, next_b, next_b1, next_factor, next_factor1
