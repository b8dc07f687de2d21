"""The products of a decode step through 4-bit weights, for one sequence: matrix times vector, in one Triton kernel.

decode_step.py launches it and describes the whole step; decode_kernels.py has the other kernels of a step.

Words used here: a member is one of up to three linears that read the same x in one launch; a run is 64 consecutive
weights of a row; a slice is four runs, 256 weights of a row; a tile is eight outputs. A warp takes a unit at a time: of a
tile, one slice of its eight rows of gate and of up, or else two consecutive slices of its eight rows. Of these 16 times 256
weights each thread gets the sums of two runs: thread 4 j + t has run t of both slices of row j.
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


def _sums_in_ptx(kind: str, depth: int, both: bool) -> str:
    """Return PTX for the sums of a thread's two runs: $0 and $1. See `_sums`.

    $2 to $17: words of codes, four each of rows A and B of the first slice and of rows A and B of the second; $18: the
    table of pairs of levels; $19 to $34: inputs; $35: whether this thread's number of a row is even; $36: whether the sums
    that it gets are of its own run. kind: bf16 or f16; depth: inputs of an instruction on tensor cores. both: the second
    slice has inputs of its own, in the odd columns.
    """
    sums = [f"{name}{i}" for name in "ab" for i in range(4)]
    looked = [f"{name}{word}{byte}" for name in ("p", "q", "r", "s") for word in range(4) for byte in range(4)]
    product = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    lines = [
        f".reg .b32 t, table, {', '.join(looked)}; .reg .pred even, useful; .reg .f32 {', '.join(sums)}, u, v;",
        # The barrier costs nothing. ptxas would move the loads of the next unit to the end, behind all that they should
        # overlap with; it moves no access of memory across a barrier.
        "bar.warp.sync 0xffffffff; mov.b32 table, $18;",
        *(f"mov.f32 {name}, 0f00000000;" for name in sums),
        "setp.ne.u32 even, $35, 0; setp.ne.u32 useful, $36, 0;",
    ]
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
                right = ", ".join(f"${19 + 4 * word + i}" for i in some)
                lines.append(f"{product} {total}, {{{left}}}, {{{right}}}, {total};")
    for out, number in (("$0", 0), ("$1", 3 if both else 2)):
        lines.append(
            f"selp.f32 u, b{number}, a{number}, even; shfl.sync.bfly.b32 v, u, 4, 31, -1; "
            f"selp.f32 u, a{number}, b{number}, even; selp.f32 {out}, u, v, useful;"
        )
    return "{\n" + "\n".join(lines) + "\n}"


def _inputs_in_ptx() -> str:
    """Return PTX that loads a thread's 16 words of inputs, $0 to $15, or keeps what it has, $16 to $31. See `_inputs`.

    $32: x; $33: whether to load them, the same in all threads of a warp; $34: whether this thread holds inputs.
    """
    lines = [".reg .pred fresh, inside; setp.ne.u32 fresh, $33, 0; setp.ne.u32 inside, $34, 0;"]
    lines += [f"mov.b32 ${i}, ${16 + i};" for i in range(16)]
    lines += ["@!fresh bra.uni KEPT;", *(f"mov.b32 ${i}, 0;" for i in range(16))]
    for word in range(4):
        names = ", ".join(f"${4 * word + i}" for i in range(4))
        lines.append(f"@inside ld.global.v4.b32 {{{names}}}, [$32 + {64 * word}];")
    return "{\n" + "\n".join(lines) + "\nKEPT:\n}"


def _add_in_ptx(halves: int) -> str:
    """Return PTX that adds a warp's sums to those that it keeps in shared memory; $0 is nothing. See `_add_unit`.

    $1, $2: the sums of a thread's two runs; $3: the place of the number that it adds to, if $4. halves: 2 if the two slices
    are of different outputs, whose sums threads of even and of odd t then keep; $5: whether t is odd.
    """
    lines = [".reg .f32 sum, other, kept; .reg .pred writes; mov.u32 $0, 0; setp.ne.u32 writes, $4, 0;"]
    if halves == 2:
        lines.append(".reg .pred odd; setp.ne.u32 odd, $5, 0; selp.f32 other, $1, $2, odd; selp.f32 sum, $2, $1, odd;")
        lines.append("shfl.sync.bfly.b32 other, other, 1, 31, -1; add.f32 sum, sum, other;")
    else:
        lines.append("add.f32 sum, $1, $2; shfl.sync.bfly.b32 other, sum, 1, 31, -1; add.f32 sum, sum, other;")
    lines.append("shfl.sync.bfly.b32 other, sum, 2, 31, -1; add.f32 sum, sum, other;")
    lines.append("@writes ld.shared.f32 kept, [$3]; add.f32 kept, kept, sum; @writes st.shared.f32 [$3], kept;")
    return "{\n" + "\n".join(lines) + "\n}"


SUMS_BF16, SUMS_FP16, SUMS_TURING, BOTH_BF16, BOTH_FP16, BOTH_TURING = (
    tl.constexpr(_sums_in_ptx(kind, depth, both))
    for both in (False, True)
    for kind, depth in (("bf16", 16), ("f16", 16), ("f16", 8))
)
SUMS_FORM = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * 35))
INPUTS, INPUTS_FORM = (
    tl.constexpr(_inputs_in_ptx()),
    tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 16 + ["l", "r", "r"])),
)
ADD_ONE, ADD_TWO = tl.constexpr(_add_in_ptx(1)), tl.constexpr(_add_in_ptx(2))
CODES = tl.constexpr(
    "\n".join(
        f"ld.global.L1::no_allocate.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [${16 + i}];"
        for i in range(4)
    )
)
CODES_FORM = tl.constexpr(",".join(["=r"] * 16 + ["l"] * 4))
TABLE_BYTES = tl.constexpr(256 * 32 * 4)
TABLES_BYTES = tl.constexpr(256 * 33 * 4)
# Behind the tables a program keeps sums: room for 12 tiles of gate and up. Triton's own shared memory, up to 8 KiB, comes on top,
# and CUDA launches no program with more than 48 KiB in all unless it is asked to.
ROOM = 12 * 512


def _fill_in_ptx(room: int = ROOM) -> str:
    """Return PTX that fills the table of pairs of levels, 32 times each, and behind it that of constants; $0: its place.

    $1: the thread, of 256; $2, $3: its pair and its constant; room: bytes behind the tables.
    """
    lines = [
        f".shared .align 128 .b8 nf4_tables[{256 * 33 * 4 + room}]; .reg .b32 row, chunk, place;",
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
            FILL,
            "=&r,r,r,f",
            [thread, tl.load(pairs + thread), constant],
            tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()
        base = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [base], tl.int32, is_pure=False, pack=1)
    return base


@triton.jit
def _codes(codes, codes1, row, rows, slice, slice1, j, t, RUNS: tl.constexpr, COMPILED: tl.constexpr):
    """Load a thread's words of a unit: 16 tensors. Eight threads load the 128 bytes of a row's slice at a time.

    So a thread has words of two rows, an even one and the next one, in `slice` of codes and in slice1 of codes1.
    """
    if COMPILED:
        part = j % 2 * 4 + t  # past the end of a row any codes will do: their inputs are 0
        chunk = tl.minimum(slice * 8 + part, 2 * RUNS - 1) * 4
        chunk1 = tl.minimum(slice1 * 8 + part, 2 * RUNS - 1) * 4
        even = row - row % 2
        first, second = even * (RUNS * 8), tl.minimum(even + 1, rows - 1) * (RUNS * 8)
        return tl.inline_asm_elementwise(
            CODES, CODES_FORM, [
                (codes + first + chunk).to(tl.int64), (codes + second + chunk).to(tl.int64),
                (codes1 + first + chunk1).to(tl.int64), (codes1 + second + chunk1).to(tl.int64),
            ],
            dtype=(
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            ),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return row, row


@triton.jit
def _inputs(inputs, x, fresh, slice, j, t, K: tl.constexpr, BOTH: tl.constexpr, COMPILED: tl.constexpr):
    """Return a thread's inputs of a slice, 16 tensors: with `fresh` they are loaded, otherwise `inputs` are returned.

    BOTH: as in `_sums_in_ptx`; slice: a unit's first one.
    """
    if COMPILED:
        if BOTH:
            own = slice + j % 2
            inside = j // 2 % 2 == t // 2
        else:
            own = slice
            inside = (j % 2 == 0) & (j // 2 % 2 == t // 2)
        inside = inside & (own * 8 + j // 4 * 4 + t < K // 32)
        return tl.inline_asm_elementwise(
            INPUTS, INPUTS_FORM, [
                inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8],
                inputs[9], inputs[10], inputs[11], inputs[12], inputs[13], inputs[14], inputs[15],
                (x + own * 256 + j // 4 * 128 + t * 8).to(tl.int64), fresh.to(tl.int32), inside.to(tl.int32),
            ],
            dtype=(
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            ),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return inputs


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
    words, inputs, codes, codes1, row, x, lut, tables, slice, slice1, j, t, dtype: tl.constexpr, RUNS: tl.constexpr,
    BOTH: tl.constexpr, TURING: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Return the sums of levels times inputs of this thread's two runs, fp32. words: see `_codes`; inputs: see `_inputs`.

    A warp computes them together, on tensor cores. One operand has 16 rows: row j holds the first half of the first slice of
    an even row of W if j is even, and the second half of the same slice if it is odd; rows j + 8 likewise, of the second
    slice. The other operand has eight columns; column 2 t holds the inputs of run t, and zeros elsewhere, so that the four
    runs, which have constants of their own, stay apart. With BOTH, column 2 t + 1 holds the inputs of run t of the second
    slice. Sums of the odd rows of W are computed in the same way. Half of the results are of a half and a run that do not
    belong together; in their place a thread takes the sums of its runs that its neighbour, four threads away, has computed.
    Levels are rounded to 16 bit; products are exact, and added in fp32.
    """
    if COMPILED:
        if BOTH:
            text: tl.constexpr = BOTH_BF16 if dtype == tl.bfloat16 else BOTH_TURING if TURING else BOTH_FP16
        else:
            text: tl.constexpr = SUMS_BF16 if dtype == tl.bfloat16 else SUMS_TURING if TURING else SUMS_FP16
        return tl.inline_asm_elementwise(
            text, SUMS_FORM, [
                words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], words[8], words[9],
                words[10], words[11], words[12], words[13], words[14], words[15], tables + j * 16 + t * 4,
                inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8],
                inputs[9], inputs[10], inputs[11], inputs[12], inputs[13], inputs[14], inputs[15],
                (j % 2 == 0).to(tl.int32), ((j % 2 == 0) == (t < 2)).to(tl.int32),
            ],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        run, run1 = slice * 4 + t, slice1 * 4 + t
        return _plain_sum(codes, row, run, x, lut, RUNS), _plain_sum(codes1, row, run1, x, lut, RUNS)


@triton.jit
def _stored_constants(
    absmax, second, row, run, RUNS: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr
):  # fmt: skip
    """Load the quantisation constants of a row's runs as they are stored and, with NESTED, what multiplies them."""
    block = (row * RUNS + tl.minimum(run, RUNS - 1)) // (BLOCKSIZE // 64)
    constant = tl.load(absmax + block)
    return constant, tl.load(second + block // BLOCKSIZE2) if NESTED else constant


@triton.jit
def _constant(stored, shift, tables, code2, NESTED: tl.constexpr, COMPILED: tl.constexpr):
    """Return the quantisation constants of runs, fp32."""
    constant, factor = stored
    if NESTED:
        if COMPILED:
            place = tables + TABLE_BYTES + constant.to(tl.int32) * 4
            constant = tl.inline_asm_elementwise(
                "ld.shared.f32 $0, [$1];", "=f,r", [place], tl.float32, is_pure=True, pack=1
            )
        else:
            constant = tl.load(code2 + constant.to(tl.int32))
    return constant * factor + shift if NESTED else constant


@triton.jit
def _four_sums(total, COMPILED: tl.constexpr):
    """Return in each thread the sum over the four threads of its row."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            shfl.sync.bfly.b32 t, $1, 1, 31, -1; add.f32 $0, $1, t;
            shfl.sync.bfly.b32 t, $0, 2, 31, -1; add.f32 $0, $0, t;
            }""",
            "=&f,f", [total], tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        N: tl.constexpr = total.shape[0]
        return tl.reshape(tl.broadcast_to(tl.sum(tl.reshape(total, (N // 4, 4)), 1)[:, None], (N // 4, 4)), (N,))


# ------------------------------------------------------------------------------------------------ what a program keeps

# For each warp, each tile of a round and each of its outputs (with SwiGLU: of gate, then of up) a program keeps a sum, in
# shared memory behind the tables; in the interpreter, in `sums`. Only its own warp adds to a sum, and the same thread always.


@triton.jit
def _clear(place, tables, sums, t, ROUND: tl.constexpr, HALVES: tl.constexpr, COMPILED: tl.constexpr):
    """Set a warp's sums to 0. place: the number of the sum of its first tile to which a thread adds."""
    for tile in range(ROUND):
        own = place + tile * (8 * HALVES)
        if COMPILED:
            tl.inline_asm_elementwise(
                "{ .reg .pred writes; setp.ne.u32 writes, $2, 0; @writes st.shared.b32 [$1], 0; mov.u32 $0, 0; }", "=r,r,r",
                [tables + TABLES_BYTES + own * 4, (t < HALVES).to(tl.int32)], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.store(sums + own, 0.0, mask=t < HALVES)


@triton.jit
def _add_unit(total, total1, place, tables, sums, t, HALVES: tl.constexpr, COMPILED: tl.constexpr):
    """Add a unit's sums to those that its warp keeps. place: the number of the sum to which a thread adds."""
    if COMPILED:
        tl.inline_asm_elementwise(
            ADD_TWO if HALVES == 2 else ADD_ONE, "=&r,f,f,r,r,r",
            [total, total1, tables + TABLES_BYTES + place * 4, (t < HALVES).to(tl.int32), t % 2],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        if HALVES == 2:
            total = tl.where(t % 2 == 0, _four_sums(total, False), _four_sums(total1, False))
        else:
            total = _four_sums(total + total1, False)
        tl.store(sums + place, tl.load(sums + place) + total, mask=t < HALVES)


@triton.jit
def _kept(
    half, tile, j, t, tables, sums, WARPS: tl.constexpr, ROUND: tl.constexpr, HALVES: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Return a thread's share of what all warps have kept of an output: of every fourth warp, from number t on."""
    total = tl.zeros(t.shape, tl.float32)
    for other in tl.static_range(0, WARPS, 4):
        place = (((other + t) * ROUND + tile) * HALVES + half) * 8 + j
        if COMPILED:
            total += tl.inline_asm_elementwise(
                "ld.shared.f32 $0, [$1];",
                "=f,r",
                [tables + TABLES_BYTES + place * 4],
                tl.float32,
                is_pure=False,
                pack=1,
            )
        else:
            total += tl.load(sums + place)
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
def _adapter_rows(B, row, rows, rank, share, RANK: tl.constexpr, SHARES: tl.constexpr):
    """Load what a thread takes of rows of an adapter's B: every SHARES-th number, from number `share` on; a tuple."""
    found = ()
    for start in tl.static_range(0, RANK, SHARES):
        inside = (row < rows) & (start + share < rank)
        found = found + (tl.load(B + row * rank + start + share, mask=inside, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit
def _fetch_rows(B, row, rows, rank, thread, COMPILED: tl.constexpr):
    """Have the rows of an adapter's B from `row` on, so many, brought into the L2 cache: 128 bytes per thread at most."""
    if COMPILED:
        step: tl.constexpr = 1024 // B.dtype.element_ty.primitive_bitwidth
        last = tl.maximum(rows * rank - 1, 0)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [(B + row * rank + tl.minimum(thread * step, last)).to(tl.int64)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


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
def _add(hidden, out, weight, row, rows, y, OUTPUTS: tl.constexpr, NEXT: tl.constexpr):
    """Write rows of hidden and, with NEXT, of the next product's x: hidden times the weight of its norm."""
    y = y.to(hidden.dtype.element_ty)
    tl.store(hidden + row, y, mask=row < rows)
    if NEXT:
        factor = tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + input_place(row, OUTPUTS), (y.to(tl.float32) * factor).to(y.dtype), mask=row < rows)


@triton.jit
def _leave(
    hidden, out, weight, row, rows, y, y1, MODE: tl.constexpr, OUTPUTS: tl.constexpr, NEXT: tl.constexpr
):  # fmt: skip
    """Write outputs in the way that `linear_kernel` describes for MODE."""
    if MODE == "swiglu":
        y = y / (1.0 + tl.exp(-y)) * y1
        tl.store(out + input_place(row, OUTPUTS), y.to(out.dtype.element_ty), mask=row < rows)
    elif MODE == "stack":
        tl.store(out + row, y, mask=row < rows)
    else:
        _add(hidden, out, weight, row, rows, y, OUTPUTS, NEXT)


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
def _tiles_of(program, programs, rows):
    """Return the first tile and the number of tiles of a member's program; no two programs' differ by more than one."""
    tiles = tl.cdiv(rows, 8)
    least = tiles // programs
    more = tiles - least * programs
    return program * least + tl.minimum(program, more), least + (program < more).to(tl.int32)


@triton.jit
def _first_unit(warp, tiles, SLICES: tl.constexpr, WARPS: tl.constexpr):
    """Return how many units a warp takes of some tiles, and the tile and the number of the slice of its first one.

    Slices follow each other after all tiles, so that a warp loads inputs once for as many tiles as possible.
    """
    each = tl.cdiv(tiles * SLICES, WARPS)
    some = tl.maximum(tiles, 1)
    return each, warp * each % some, warp * each // some


@triton.jit
def _loaded(
    codes0, absmax0, second0, codes1, absmax1, second1, rows, row, unit, j, t, RUNS: tl.constexpr, BOTH: tl.constexpr,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Load a thread's words and stored constants of a unit. Past the last row the last one is loaded."""
    row = tl.minimum(row, rows - 1)
    slice, slice1 = unit, unit
    if BOTH:
        slice, slice1 = 2 * unit, 2 * unit + 1
    words = _codes(codes0, codes1, row, rows, slice, slice1, j, t, RUNS, COMPILED)
    stored = _stored_constants(absmax0, second0, row, slice * 4 + t, RUNS, NESTED, BLOCKSIZE, BLOCKSIZE2)
    stored1 = _stored_constants(absmax1, second1, row, slice1 * 4 + t, RUNS, NESTED, BLOCKSIZE, BLOCKSIZE2)
    return words, stored, stored1


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # to Triton a rank of 1 would be of another type than 0
def linear_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, out, next_weight, sums, pairs, lut, code2, A0, A1, A2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    MODE: tl.constexpr, NORM: tl.constexpr, NEXT: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr,
    OUTPUTS: tl.constexpr, RANK: tl.constexpr, ADAPTERS: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, ROUND: tl.constexpr,
    SHUFFLE: tl.constexpr, HALF: tl.constexpr, TURING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute up to three 4-bit linears with their adapters on the x of one sequence, in one launch.

    One-dimensional grid. A program computes up to TILES tiles, of eight outputs each, of one member (with MODE "swiglu" of
    two), in rounds of up to ROUND tiles. The warps divide the units of a round evenly, wherever a tile ends, and add what
    they have at the end of the round. Every weight is read once, for one multiplication and addition, so reading the weights
    is the limit. Therefore the weights of the next unit are loaded while the present ones are used.

    The first ADAPTERS programs compute what the other programs add after their first round: u of the adapters and, with
    NORM, 1 / root mean square. With NORM x is hidden times the norm's weight, so only this factor is missing. If an earlier
    launch has computed them, ADAPTERS is 0.

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
    HALVES: tl.constexpr = 2 if SWIGLU else 1
    RUNS: tl.constexpr = K // 64
    SLICES: tl.constexpr = (RUNS + 8 // HALVES - 1) // (8 // HALVES)  # units of a tile
    if MODE == "stack":
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = find_member(
            program, 8 * TILES,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    if not SWIGLU:
        codes1, absmax1, second1, offset1 = codes0, absmax0, second0, offset0
    programs = tl.cdiv(rows0, 8 * TILES) if MODE == "stack" else tl.num_programs(0) - ADAPTERS
    begin, mine = _tiles_of(program, programs, rows0)
    thread = tl.arange(0, 32 * WARPS)
    j, t, warp = thread // 4 % 8, thread % 4, thread // 32
    own = (warp * ROUND * HALVES + t % HALVES) * 8 + j  # the sum of its warp's first tile to which a thread adds
    shift = tl.load(offset0) if NESTED else 0.0
    shift1 = tl.load(offset1) if NESTED else 0.0
    tiles = tl.minimum(mine, ROUND)
    each, tile, unit = _first_unit(warp, tiles, SLICES, WARPS)
    row = (begin + tile) * 8 + j
    words, stored, stored1 = _loaded(
        codes0, absmax0, second0, codes1, absmax1, second1, rows0, row, unit, j, t, RUNS, not SWIGLU, NESTED,
        BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
    )  # fmt: skip
    # Registers have room for an adapter's rows of one tile per warp, at most, while the products are computed.
    EARLY: tl.constexpr = (TILES <= WARPS) & (TILES == ROUND)
    if EARLY:
        share = _adapter_rows(B0, (begin + warp) * 8 + j, rows0, rank0, t, RANK, 4)
        share1 = _adapter_rows(B1, (begin + warp) * 8 + j, rows1, rank1, t, RANK, 4) if SWIGLU else share
    elif RANK > 0:
        _fetch_rows(B0, begin * 8, tl.minimum(mine * 8, rows0 - begin * 8), rank0, thread, SHUFFLE)
        if SWIGLU:
            _fetch_rows(B1, begin * 8, tl.minimum(mine * 8, rows1 - begin * 8), rank1, thread, SHUFFLE)
    tables = _tables(pairs, code2, thread, NESTED, SHUFFLE)
    wait_for_earlier_kernels(OVERLAP)
    if ADAPTERS == 0:
        tl.store(count_before, 0, mask=program == 0)
    ready = 0  # after the first round it is computed from what is known only when u and the root are in memory
    no = tl.zeros((32 * WARPS,), tl.int32)
    inputs = (no, no, no, no, no, no, no, no, no, no, no, no, no, no, no, no)
    for round in range((TILES + ROUND - 1) // ROUND):
        _clear(own, tables, sums, t, ROUND, HALVES, SHUFFLE)
        next_tiles = tl.maximum(tl.minimum(mine - (round + 1) * ROUND, ROUND), 0)
        next_each, next_tile, next_unit = _first_unit(warp, next_tiles, SLICES, WARPS)
        for i in range(each):
            last = tile == tiles - 1
            then, after, ahead = tl.where(last, 0, tile + 1), tl.where(last, unit + 1, unit), begin
            if TILES > ROUND:
                end = i == each - 1
                then, after = tl.where(end, next_tile, then), tl.where(end, next_unit, after)
                ahead += tl.where(end, ROUND, 0)
            next_words, next_stored, next_stored1 = _loaded(
                codes0, absmax0, second0, codes1, absmax1, second1, rows0, (ahead + then) * 8 + j, after, j, t, RUNS,
                not SWIGLU, NESTED, BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
            )  # fmt: skip
            row = tl.minimum((begin + tile) * 8 + j, rows0 - 1)
            slice, slice1 = unit, unit
            if not SWIGLU:
                slice, slice1 = 2 * unit, 2 * unit + 1
            constant = _constant(stored, shift, tables, code2, NESTED, SHUFFLE)
            constant1 = _constant(stored1, shift1, tables, code2, NESTED, SHUFFLE)
            inputs = _inputs(inputs, x, (tile == 0) | (i == 0), slice, j, t, K, not SWIGLU, SHUFFLE)
            found, found1 = _sums(
                words, inputs, codes0, codes1, row, x, lut, tables, slice, slice1, j, t, HALF, RUNS, not SWIGLU, TURING,
                SHUFFLE,
            )  # fmt: skip
            _add_unit(
                found * constant, found1 * constant1, own + tile * (8 * HALVES), tables, sums, t, HALVES, SHUFFLE
            )  # fmt: skip
            words, stored, stored1, tile, unit = next_words, next_stored, next_stored1, then, after
        if not EARLY:
            share = _adapter_rows(B0, (begin + warp) * 8 + j, rows0, rank0, t, RANK, 4)
            share1 = _adapter_rows(B1, (begin + warp) * 8 + j, rows1, rank1, t, RANK, 4) if SWIGLU else share
        if ADAPTERS > 0 and round == 0:
            ready = _arrivals(count, ADAPTERS, SHUFFLE)
        tl.debug_barrier()
        for some in tl.static_range(0, ROUND, WARPS):
            own_tile = some + warp
            b, b1, row = share, share1, (begin + own_tile) * 8 + j
            if some + WARPS < ROUND:
                share = _adapter_rows(B0, row + 8 * WARPS, rows0, rank0, t, RANK, 4)
                share1 = _adapter_rows(B1, row + 8 * WARPS, rows1, rank1, t, RANK, 4) if SWIGLU else share
            known = tl.minimum(own_tile, ROUND - 1)
            total = _kept(0, known, j, t, tables, sums, WARPS, ROUND, HALVES, SHUFFLE)
            total1 = _kept(1, known, j, t, tables, sums, WARPS, ROUND, HALVES, SHUFFLE) if SWIGLU else total
            if NORM:
                root = tl.load(inverse + ready)
                total, total1 = total * root, total1 * root
            if RANK > 0:
                own_u = u + ready + member * RANK
                total += _adapter_share(b, own_u, scale0, t, RANK, 4, PARTS, MEMBERS * RANK)
                if SWIGLU:
                    total1 += _adapter_share(b1, own_u + RANK, scale1, t, RANK, 4, PARTS, MEMBERS * RANK)
            y = _four_sums(_beside(total, hidden, bias0, row, rows0, t, MODE, BIAS), SHUFFLE)
            y1 = _four_sums(_beside(total1, hidden, bias1, row, rows1, t, MODE, BIAS), SHUFFLE) if SWIGLU else y
            row = tl.where((t == 0) & (own_tile < tiles), row, rows0)
            _leave(hidden, out + first_outputs, next_weight, row, rows0, y, y1, MODE, OUTPUTS, NEXT)
        if TILES > ROUND:
            tl.debug_barrier()
        begin, tiles, each = begin + ROUND, next_tiles, next_each
