"""The Triton kernels of one sequence's products with 4-bit weights. decode_step.py launches them.

A tensor core multiplies W, 16 rows at a time, with x, although x is a single vector: on few multiprocessors the number of
instructions per weight is the limit, and a tensor core needs next to none. What is left is to turn codes into numbers. A
byte holds the codes of two weights, so a table of 256 *pairs* gives both levels at once, as two 16-bit numbers in one
32-bit word, which is what a tensor core reads. docs/fast_path.md counts the instructions.

The table lies in shared memory 32 times, once for each lane of a warp: shared memory has 32 banks, and copy i is in bank i,
so no lane waits for another one. With one copy the lookups of a warp would take 3.4 turns on average instead of one.

Words used here: a member is one of up to three linears that read the same x in one launch; a word holds the codes of eight
consecutive weights of a row; a run is 64 weights of a row, which have one quantisation constant; a piece is eight runs of
each of 8 rows, which a warp multiplies at a time.

Most tensors here have one number per thread, [threads], so that the code says what each lane of a warp does. Lane l loads
from rows l // 4 % 4 and l // 4 % 4 + 4 of a piece: in each half of 256 inputs the 32 weights from 128 (l // 16) + 32 (l % 4)
on. So the eight lanes of a row load 128 consecutive bytes.

A tensor core multiplies a matrix A of 16 rows with a matrix B of 8 columns, and adds up what the four lanes l % 4 have. The
sums of different runs must stay apart, because each run has its own constant, and that is what the columns are for: lane l
passes inputs of column l // 4, which is run l // 4 of the piece, and zeros if its 32 inputs belong to another run.
"""

from fast_path.decode_kernels import find_member, input_place, let_next_kernel_start, wait_for_earlier_kernels
from fast_path.nf4 import levels, tl, triton


def _lookup(byte: int, word: str, to: str) -> str:
    """Return the instructions that look up the pair of a byte of a word. It lies at byte * 128 + lane * 4 in the table.

    dp4a multiplies the four bytes of two words and adds up: a cheap way to take a byte out and to multiply it. ptxas makes
    the addition of the table's place a constant of the load.
    """
    return f"dp4a.u32.u32 p, {word}, {0x80 << 8 * byte}, $11; add.u32 p, p, $10; ld.shared.b32 {to}, [p];"


def _multiplication(dtype: str) -> str:
    """Return the instructions of `_multiply`.

    $0 to $3: sums; $4, $5: a word of either row; $6 to $9: eight inputs; $10: the table; $11: 4 lane; $12 to $15: the sums
    before. Each mma multiplies 16 rows x 16 inputs with 16 inputs x 8 columns.
    """
    pairs = "\n".join(_lookup(i, "$4", f"a{2 * i}") + _lookup(i, "$5", f"a{2 * i + 1}") for i in range(4))
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0, $1, $2, $3}},"
    return f"""{{ .reg .b32 p, a0, a1, a2, a3, a4, a5, a6, a7;
        {pairs}
        {mma} {{a0, a1, a2, a3}}, {{$6, $7}}, {{$12, $13, $14, $15}};
        {mma} {{a4, a5, a6, a7}}, {{$8, $9}}, {{$0, $1, $2, $3}};
    }}"""


MULTIPLY_BF16, MULTIPLY_FP16 = tl.constexpr(_multiplication("bf16")), tl.constexpr(_multiplication("f16"))


@triton.jit
def _weights(codes, row, rows, k, K: tl.constexpr, PTX: tl.constexpr):
    """Load 32 weights of each thread's row from weight k on, as four words; anything past the end of the matrix."""
    pointer, real = codes + row * (K // 8) + k // 8, (row < rows) & (k < K)
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred real; setp.ne.u32 real, $5, 0;
            @real ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
            }""",
            "=&r,=&r,=&r,=&r,l,r", [pointer.to(tl.int64), real.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(pointer, mask=real, other=0), tl.load(pointer + 1, mask=real, other=0),
            tl.load(pointer + 2, mask=real, other=0), tl.load(pointer + 3, mask=real, other=0),
        )  # fmt: skip


@triton.jit
def _inputs(x, place, real, PTX: tl.constexpr):
    """Load the eight inputs at each thread's place of x, two per word; 0 where not real."""
    pointer = x.to(tl.pointer_type(tl.int32)) + place // 2
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred real; setp.ne.u32 real, $5, 0;
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            @real ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
            }""",
            "=&r,=&r,=&r,=&r,l,r", [pointer.to(tl.int64), real.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(pointer, mask=real, other=0), tl.load(pointer + 1, mask=real, other=0),
            tl.load(pointer + 2, mask=real, other=0), tl.load(pointer + 3, mask=real, other=0),
        )  # fmt: skip


@triton.jit
def _word_of(first, second):
    """Return two 16-bit numbers as one 32-bit word."""
    low, high = first.to(tl.uint16, bitcast=True).to(tl.uint32), second.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | high << 16


@triton.jit
def _numbers(word, HALF: tl.constexpr):
    """Return the two 16-bit numbers of each word, fp32: the inverse of `_word_of`."""
    word = word.to(tl.uint32, bitcast=True)
    low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return low.to(HALF, bitcast=True).to(tl.float32), high.to(HALF, bitcast=True).to(tl.float32)


@triton.jit
def _table(lut, code2, thread, THREADS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr, PTX: tl.constexpr):
    """Write the table to shared memory, and behind it the 256 numbers of code2. Returns its place."""
    if PTX:
        # A variable of PTX, since Triton has no access to shared memory; it exists once per program.
        table = tl.inline_asm_elementwise(
            "{ .shared .align 128 .b8 pairs_of_levels[33792]; mov.u32 $0, pairs_of_levels; }", "=r,r", [thread],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        for i in tl.static_range(2048 // THREADS):  # 16 bytes at a time: four copies of a pair
            part = i * THREADS + thread
            first, second = tl.load(lut + part // 128), tl.load(lut + part // 8 % 16)
            tl.inline_asm_elementwise(
                "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;", "=r,r,r",
                [table + part * 16, _word_of(first.to(HALF), second.to(HALF))], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        if NESTED:
            for i in tl.static_range((255 + THREADS) // THREADS):
                code = (i * THREADS + thread) % 256
                tl.inline_asm_elementwise(
                    "st.shared.f32 [$1 + 32768], $2; mov.u32 $0, 0;", "=r,r,f", [table + code * 4, tl.load(code2 + code)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
        tl.debug_barrier()
        return table
    else:
        return thread


@triton.jit
def _multiply(
    sums, word, word4, x, table, lane, lut, THREADS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Return the sums after adding the products of eight weights of each lane, of its first (word) and second row (word4).

    Lane l has four sums, as the tensor core gives them out: over lanes 4 (l // 4) to 4 (l // 4) + 3, with the inputs of
    column 2 (l % 4) and of the next one, for the first row and for the second.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            MULTIPLY_BF16 if tl.bfloat16 == HALF else MULTIPLY_FP16,
            "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,f,f,f,f",
            [word, word4, x[0], x[1], x[2], x[3], table, lane * 4, sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        first, second = _plain_products(word, x, lut, THREADS, HALF)
        third, fourth = _plain_products(word4, x, lut, THREADS, HALF)
        return sums[0] + first, sums[1] + second, sums[2] + third, sums[3] + fourth


@triton.jit
def _plain_products(word, x, lut, THREADS: tl.constexpr, HALF: tl.constexpr):
    """Return what `_multiply` adds to the sums of one row: the same without NVIDIA's instructions."""
    own = levels(word, lut, 0.0, False)
    total = tl.zeros((THREADS // 32, 8, 8, 4), tl.float32)  # warps, rows, columns, threads of a row
    for i in tl.static_range(4):
        a, b = _numbers(x[i], HALF)
        row = tl.reshape(own[2 * i], (THREADS // 32, 8, 1, 4)), tl.reshape(own[2 * i + 1], (THREADS // 32, 8, 1, 4))
        column = tl.reshape(a, (THREADS // 32, 1, 8, 4)), tl.reshape(b, (THREADS // 32, 1, 8, 4))
        total += row[0] * column[0] + row[1] * column[1]
    first, second = tl.split(tl.reshape(tl.sum(total, 3), (THREADS // 32, 8, 4, 2)))
    return tl.reshape(first, (THREADS,)), tl.reshape(second, (THREADS,))


@triton.jit
def _number(code2, code, table, PTX: tl.constexpr):
    """Return the numbers that 8-bit codes of quantisation constants stand for."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1 + 32768];", "=f,r", [table + code * 4], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(code2 + code)


@triton.jit
def _constants(
    absmax, second, code2, shift, table, row, rows, run, RUNS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Return the quantisation constants of each thread's run of its row and of the next run, fp32; 0 outside."""
    place, real = row * RUNS + run, (row < rows) & (run < RUNS)
    EACH: tl.constexpr = BLOCKSIZE // 64
    if NESTED and EACH == 1 and RUNS % 2 == 0 and BLOCKSIZE2 % 2 == 0:  # two codes in one load
        codes = tl.load((absmax + place).to(tl.pointer_type(tl.uint16)), mask=real, other=0).to(tl.int32)
        factor = tl.load(second + place // BLOCKSIZE2, mask=real, other=0.0)
        offset = tl.where(real, shift, 0.0)
        return (
            _number(code2, codes & 255, table, PTX) * factor + offset,
            _number(code2, codes >> 8, table, PTX) * factor + offset,
        )
    else:
        real1 = (row < rows) & (run + 1 < RUNS)
        block, block1 = place // EACH, (place + 1) // EACH
        constant, constant1 = tl.load(absmax + block, mask=real, other=0), tl.load(absmax + block1, mask=real1, other=0)
        if NESTED:
            factor = tl.load(second + block // BLOCKSIZE2, mask=real, other=0.0)
            factor1 = tl.load(second + block1 // BLOCKSIZE2, mask=real1, other=0.0)
            constant = _number(code2, constant.to(tl.int32), table, PTX) * factor + tl.where(real, shift, 0.0)
            constant1 = _number(code2, constant1.to(tl.int32), table, PTX) * factor1 + tl.where(real1, shift, 0.0)
        return constant, constant1


@triton.jit
def _piece(codes, row, rows, k, K: tl.constexpr, PTX: tl.constexpr):
    """Load a piece: of each thread's row and of row + 4 the 32 weights from k on, then of both those from k + 256 on."""
    return (
        _weights(codes, row, rows, k, K, PTX), _weights(codes, row + 4, rows, k, K, PTX),
        _weights(codes, row, rows, k + 256, K, PTX), _weights(codes, row + 4, rows, k + 256, K, PTX),
    )  # fmt: skip


@triton.jit
def _products(w, x, table, lane, lut, THREADS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr):
    """Return the sums of a piece's runs 2 (l % 4) and 2 (l % 4) + 1, for the first and the second row of each lane.

    Each half of the inputs has sums of its own, and both are multiplied with all inputs. This saves registers, and the
    products of the halves do not wait for each other. Columns 0 to 3 are the runs of the first half.
    """
    zero = tl.zeros((THREADS,), tl.float32)
    near = (zero, zero, zero, zero)
    far = near
    for i in tl.static_range(4):
        near = _multiply(near, w[0][i], w[1][i], x[i], table, lane, lut, THREADS, HALF, PTX)
        far = _multiply(far, w[2][i], w[3][i], x[i], table, lane, lut, THREADS, HALF, PTX)
    first = lane % 4 < 2
    return (
        tl.where(first, near[0], far[0]), tl.where(first, near[1], far[1]),
        tl.where(first, near[2], far[2]), tl.where(first, near[3], far[3]),
    )  # fmt: skip


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
def _scaled(
    total, total4, sums, absmax, second, code2, shift, table, row, rows, run, RUNS: tl.constexpr, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Return the totals of rows `row` and row + 4 after adding a piece's sums times the constants of their runs.

    A constant is applied to the sum of its 64 products, which is one multiplication instead of 64.
    """
    a, b = _constants(
        absmax, second, code2, shift, table, row, rows, run, RUNS, NESTED, BLOCKSIZE, BLOCKSIZE2, PTX
    )  # fmt: skip
    c, d = _constants(
        absmax, second, code2, shift, table, row + 4, rows, run, RUNS, NESTED, BLOCKSIZE, BLOCKSIZE2, PTX
    )  # fmt: skip
    return total + (sums[0] * a + sums[1] * b), total4 + (sums[2] * c + sums[3] * d)


@triton.jit
def _tile_rows(TILES: tl.constexpr):
    """Return the rows of some tiles in the order of `_row_sums`, [8 TILES]."""
    tile, row, second = tl.arange(0, TILES), tl.arange(0, 4), tl.arange(0, 2)
    return tl.reshape(tile[:, None, None] * 8 + row[None, :, None] + second[None, None] * 4, (8 * TILES,))


@triton.jit
def _row_sums(a, a4, b, b4, TILES: tl.constexpr, SHARES: tl.constexpr, TWO: tl.constexpr):
    """Add up the lanes of each row, and the warps that share it: fp32 [8 TILES] of a, and of b (without TWO a again).

    All of it is one reduction, because each one has barriers.
    """
    if TWO:
        both = tl.reshape(tl.join(tl.join(a, a4), tl.join(b, b4)), (TILES, 2 * SHARES, 4, 4, 4))
        return tl.split(tl.reshape(tl.sum(tl.sum(both, 3), 1), (8 * TILES, 2)))
    else:
        one = tl.reshape(tl.join(a, a4), (TILES, 2 * SHARES, 4, 4, 2))
        one = tl.reshape(tl.sum(tl.sum(one, 3), 1), (8 * TILES,))
        return one, one


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
    place = part * CHUNK + tl.arange(0, BLOCK)
    rows = A0 + j[:, None] * K
    real = (j < rank0)[:, None]
    a = tl.load(rows + place[None], mask=real & (place < K)[None], other=0.0)
    factor = tl.load(weight + place, mask=place < K, other=0.0) if NORM else 1.0
    wait_for_earlier_kernels(OVERLAP)
    if program == 0:
        tl.store(count_before, 0)
    products = tl.zeros((TAKE, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for _ in range(CHUNK // BLOCK):
        value = tl.load(hidden + place if NORM else x + input_place(place, K), mask=place < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= factor.to(tl.float32)
        products += a.to(tl.float32) * value[None]
        place += BLOCK
        inside = place < tl.minimum(K, part * CHUNK + CHUNK)
        a = tl.load(rows + place[None], mask=real & inside[None], other=0.0)
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


@triton.jit
def _two_pieces(
    codes0, rows0, codes1, rows1, row, beside, k, K: tl.constexpr, TWO: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Load a `_piece` of each thread's row and, if TWO, of row + beside of the second matrix; else the first twice."""
    w = _piece(codes0, row, rows0, k, K, PTX)
    w1 = w
    if TWO:
        w1 = _piece(codes1, row + beside, rows1, k, K, PTX)
    return w, w1


@triton.jit
def _piece_inputs(x, start, lane, K: tl.constexpr, PTX: tl.constexpr):
    """Load the inputs that a piece is multiplied with: column l // 4 is run l // 4 from input `start` on."""
    first = start + lane // 8 * 128
    real = (lane % 4 // 2 == lane // 4 % 2) & (first + lane % 4 * 32 < K)
    place = first + lane % 4 * 8  # `input_place` of first + lane % 4 * 32
    return (
        _inputs(x, place, real, PTX), _inputs(x, place + 32, real, PTX),
        _inputs(x, place + 64, real, PTX), _inputs(x, place + 96, real, PTX),
    )  # fmt: skip


@triton.jit
def _leave(hidden, out, weight, row, rows, y, y1, MODE: tl.constexpr, OUTPUTS: tl.constexpr, NEXT: tl.constexpr):
    """Write the outputs of some rows, in the way that `linear_kernel` describes for MODE.

    "residual" with NEXT also writes the x of the next product: hidden times the weight of its norm.
    """
    inside = row < rows
    if MODE == "swiglu":
        y = y / (1.0 + tl.exp(-y)) * y1
        tl.store(out + input_place(row, OUTPUTS), y.to(out.dtype.element_ty), mask=inside)
    elif MODE == "stack":
        tl.store(out + row, y, mask=inside)
    else:
        y = (y + tl.load(hidden + row, mask=inside, other=0.0).to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(hidden + row, y, mask=inside)
        if NEXT:
            factor = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + input_place(row, OUTPUTS), (y.to(tl.float32) * factor).to(y.dtype), mask=inside)


@triton.jit
def _finished(total, sums, B, bias, row, rows, rank, RANK: tl.constexpr, BIAS: tl.constexpr):
    """Return W x + bias + B (A x), fp32 [rows]. total: W x; sums: A x, [RANK]."""
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    if RANK > 0:
        j = tl.arange(0, RANK)
        inside = (row < rows)[:, None] & (j < rank)[None]
        b = tl.load(B + row[:, None] * rank + j[None], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(b * sums[None], 1)
    return total


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])  # to Triton a rank of 1 would be of another type than 0
def linear_kernel(
    x, hidden, weight, eps, scale, u, inverse, count, count_before, out, next_weight, lut, code2, A0, A1, A2,
    codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
    codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
    codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
    MODE: tl.constexpr, NORM: tl.constexpr, NEXT: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr,
    RANK: tl.constexpr, ADAPTERS: tl.constexpr, TAKE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, PARTS_2: tl.constexpr, BIAS: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr, LOOP: tl.constexpr, WARPS: tl.constexpr, SHARES: tl.constexpr, TWO: tl.constexpr,
    AHEAD: tl.constexpr, OUTPUTS: tl.constexpr, SHUFFLE: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute up to three 4-bit linears with their adapters on the x of one sequence, in one launch.

    One-dimensional grid. A program has WARPS warps, of which SHARES share the inputs of 8 rows of W, piece by piece; so it
    computes 8 WARPS / SHARES outputs of one member at a time, LOOP times. With TWO it computes as many outputs more from
    the same inputs: of the second matrix in MODE "swiglu", otherwise the next ones. Every weight is read once, for one multiplication and addition, so reading the weights is
    the limit where there are many multiprocessors. Therefore, with AHEAD, a piece is
    loaded while the one before it is multiplied.

    The first ADAPTERS programs compute what the other programs add after their first products: u of the adapters and,
    with NORM, 1 / root mean square. With NORM x is hidden times the norm's weight, so only this factor is missing. If
    an earlier launch has computed them, ADAPTERS is 0.

    MODE says where the outputs go. "stack": to out, fp32 [outputs of all members]. "residual": they are added to
    hidden, and with NEXT hidden times next_weight is written to out. "swiglu": silu(first) * second is written to out.
    lut: the 16 levels, and the number that W x has to be multiplied with because of them.
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
    TILES: tl.constexpr = WARPS // SHARES
    STRIDE: tl.constexpr = 16 * TILES if TWO and not SWIGLU else 8 * TILES  # outputs at a time
    STEP: tl.constexpr = 512 * SHARES
    PIECES: tl.constexpr = (K + STEP - 1) // STEP  # of each warp
    if MODE == "stack":
        program, first_outputs, member, codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0 = find_member(
            program, STRIDE * LOOP,
            codes0, absmax0, second0, offset0, bias0, B0, rows0, rank0, scale0,
            codes1, absmax1, second1, offset1, bias1, B1, rows1, rank1, scale1,
            codes2, absmax2, second2, offset2, bias2, B2, rows2, rank2, scale2,
        )  # fmt: skip
    beside = 0  # the second outputs that a program computes follow so many later
    if TWO and not SWIGLU:
        codes1, absmax1, second1, offset1, bias1, B1 = codes0, absmax0, second0, offset0, bias0, B0
        rows1, rank1, scale1 = rows0, rank0, scale0
        beside = 8 * TILES
    thread = tl.arange(0, 32 * WARPS)
    lane, share = thread % 32, thread // 32 % SHARES
    k = share * 512 + lane // 16 * 128 + lane % 4 * 32
    row = program * (STRIDE * LOOP) + thread // (32 * SHARES) * 8 + lane // 4 % 4
    w, w1 = _two_pieces(codes0, rows0, codes1, rows1, row, beside, k, K, TWO, SHUFFLE)
    table = _table(lut, code2, thread, 32 * WARPS, HALF, NESTED, SHUFFLE)
    shift = tl.load(offset0) if NESTED else 0.0
    shift1 = tl.load(offset1) if NESTED and TWO else 0.0
    unscale = tl.load(lut + 16)
    wait_for_earlier_kernels(OVERLAP)
    HERE: tl.constexpr = ADAPTERS == 0  # the results of `_adapter_program` are in memory already
    root, sums, sums1 = _results(
        u, inverse, 0, member, rank0, scale0, rank1, scale1, NORM and HERE, SWIGLU, MEMBERS, RANK if HERE else 0,
        max(RANK, 1), PARTS, PARTS_2,
    )  # fmt: skip
    if HERE:
        tl.store(count_before, 0, mask=program == 0)
    for i in range(LOOP):
        a, a4 = tl.zeros((32 * WARPS,), tl.float32), tl.zeros((32 * WARPS,), tl.float32)
        b, b4 = a, a4
        for piece in range(PIECES):
            start = (piece * SHARES + share) * 512
            next_w, next_w1 = w, w1
            if AHEAD:
                then, after = row, k + (piece + 1) * STEP
                if piece + 1 == PIECES:
                    then, after = row + STRIDE, k
                next_w, next_w1 = _two_pieces(codes0, rows0, codes1, rows1, then, beside, after, K, TWO, SHUFFLE)
            else:
                w, w1 = _two_pieces(codes0, rows0, codes1, rows1, row, beside, k + piece * STEP, K, TWO, SHUFFLE)
            inputs = _piece_inputs(x, start, lane, K, SHUFFLE)
            # Each run's sums are in two lanes, of which one has them over the run's own weights.
            run = tl.where(lane % 2 == lane // 16, start // 64 + lane % 4 * 2, K // 64)
            a, a4 = _scaled(
                a, a4, _products(w, inputs, table, lane, lut, 32 * WARPS, HALF, SHUFFLE), absmax0, second0, code2, shift,
                table, row, rows0, run, K // 64, NESTED, BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
            )  # fmt: skip
            if TWO:
                b, b4 = _scaled(
                    b, b4, _products(w1, inputs, table, lane, lut, 32 * WARPS, HALF, SHUFFLE), absmax1, second1, code2,
                    shift1, table, row + beside, rows1, run, K // 64, NESTED, BLOCKSIZE, BLOCKSIZE2, SHUFFLE,
                )  # fmt: skip
            w, w1 = next_w, next_w1
        if i == (-1 if HERE else 0):
            root, sums, sums1 = _results(
                u, inverse, _arrivals(count, ADAPTERS, SHUFFLE), member, rank0, scale0, rank1, scale1, NORM, SWIGLU,
                MEMBERS, RANK, max(RANK, 1), PARTS, PARTS_2,
            )  # fmt: skip
        here = (program * LOOP + i) * STRIDE + _tile_rows(TILES)
        y, y1 = _row_sums(a, a4, b, b4, TILES, SHARES, TWO)
        y = _finished(y * (root * unscale), sums, B0, bias0, here, rows0, rank0, RANK, BIAS)
        if TWO:
            y1 = _finished(y1 * (root * unscale), sums1, B1, bias1, here + beside, rows1, rank1, RANK, BIAS)
        _leave(hidden, out + first_outputs, next_weight, here, rows0, y, y1, MODE, OUTPUTS, NEXT)
        if TWO and not SWIGLU:
            _leave(hidden, out + first_outputs, next_weight, here + beside, rows0, y1, y1, MODE, OUTPUTS, NEXT)
        row += STRIDE
