"""The Triton kernels of training: for fused_linear.py, packed_weights.py, the loss and the rotary embedding.

Where they cannot run, plain torch calls with the same result run instead.
"""

from fast_path.nf4 import INTERPRETED, lane_level, levels, tl, triton

COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def _mix(x):
    """Hash uint32 numbers as `mix` of dropout.py does; shifts of unsigned numbers are logical already."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _key(step, salt):
    """Return the hash of step and salt, uint32. It is the same for all masks of a module in one step."""
    return _mix((tl.load(step) ^ tl.load(salt)).to(tl.uint32, bitcast=True))


@triton.jit
def _row_keys(key, sequences, m, rows, length):
    """Return the hashes that rows m of a dropout mask start from, uint32; rows from `rows` on get those of the last one."""
    m = tl.minimum(m, rows - 1)
    sequence = tl.load(sequences + m // length).to(tl.uint32, bitcast=True)
    return _mix(_mix(key ^ sequence) ^ _mix((m % length).to(tl.uint32)))


@triton.jit
def _keep(row_keys, pairs, threshold):
    """Return the part of `dropout_mask` that covers a tile, bool [rows, 2 pairs]."""
    bits = _mix(row_keys[:, None] ^ (pairs.to(tl.uint32) * 0x9E3779B1)[None])
    return tl.interleave((bits & 0xFFFF) >= threshold, (bits >> 16) >= threshold)


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + exp(-x)) as a squared reciprocal square root; exact division also scales and branches."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _gate(x, ACTIVATION: tl.constexpr):
    """Return sigmoid(z) and dz / dx; an activation is x sigmoid(z), as `_gate` of fused_linear.py explains."""
    if ACTIVATION == "silu":
        return _sigmoid(x), 1.0
    else:
        square = x * x
        return _sigmoid(1.5957691216057308 * x * (1 + 0.044715 * square)), 1.5957691216057308 * (1 + 0.134145 * square)


# Triton must not learn that `packed` is aligned. Then a thread loads one word of eight codes and writes its eight
# weights as 16 bytes. With aligned loads a thread would load four words, and threads would exchange weights through
# shared memory.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def dequantize_kernel(
    packed, absmax, absmax2, offset, code2, lut, A0, A1, A2, B0, B1, B2, out, stacked, blocks, rows, rows0, rows1,
    stride, before, rank, members, size, extra, behind, scale, programs, b_programs, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, ROW_BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    SKIPPED: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Write [W | scale B | 0] (`out`) from 4-bit codes, and the stacked A of all members (`stacked`), in one launch.

    One-dimensional grid. The first `programs` programs write BLOCKS quantisation blocks of W each. Those from there to
    `b_programs` write the columns after W, scale B and zeros, for ROWS rows each. The others write BLOCK_A numbers of
    A each. before: columns of `out` before B's, 0 if W is left out; behind: those after W's. size: numbers of one
    member's A; extra: rows of `stacked`. ROW_BLOCKS: the blocks that are written of each row, from its block FIRST on;
    SKIPPED: how many more blocks a row of W has.

    It takes 6 instructions per weight; with a gather through shared memory instead of shuffles it took 10.
    """
    program = tl.program_id(0)
    dtype = out.dtype.element_ty
    if program < programs:
        first = program * BLOCKS
        block = first + tl.arange(0, BLOCKS)
        inside = block < blocks
        word = tl.arange(0, BLOCKS)[:, None] * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None]
        if SKIPPED:
            block += FIRST + block // ROW_BLOCKS * SKIPPED
            word += (block - first - tl.arange(0, BLOCKS))[:, None] * (BLOCKSIZE // 8)
        codes = tl.load(packed + first.to(tl.int64) * (BLOCKSIZE // 8) + word, mask=inside[:, None], other=0)
        level = lane_level(lut, SHUFFLE)
        if NESTED:  # one constant per block of 64 weights, itself an 8-bit code
            constant = tl.load(code2 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
            second = block // BLOCKSIZE2
            constant = constant * tl.load(absmax2 + second, mask=inside, other=0.0)
            constant += tl.load(offset + second, mask=inside, other=0.0)
        else:
            constant = tl.load(absmax + block, mask=inside, other=0.0)
        w0, w1, w2, w3, w4, w5, w6, w7 = levels(codes, lut, level, SHUFFLE)
        even = tl.interleave(tl.interleave(w0, w4), tl.interleave(w2, w6))
        odd = tl.interleave(tl.interleave(w1, w5), tl.interleave(w3, w7))
        values = (tl.interleave(even, odd) * constant[:, None]).to(dtype)
        column = first % ROW_BLOCKS + tl.arange(0, BLOCKS)  # in blocks, from the start of the first block's row
        place = out + (first // ROW_BLOCKS).to(tl.int64) * stride + tl.arange(0, BLOCKSIZE)[None]
        place += (column * BLOCKSIZE + column // ROW_BLOCKS * (stride - ROW_BLOCKS * BLOCKSIZE))[:, None]
        tl.store(place, values, mask=inside[:, None])
    elif program < b_programs:  # member i's B is in columns i rank to (i + 1) rank of its rows
        row = ((program - programs) * ROWS + tl.arange(0, ROWS))[:, None]
        j = tl.arange(0, BLOCK_R)[None]
        in0 = (row < rows0) & (j < rank)
        in1 = (row >= rows0) & (row < rows0 + rows1) & (j >= rank) & (j < 2 * rank)
        in2 = (row >= rows0 + rows1) & (row < rows) & (j >= 2 * rank) & (j < 3 * rank)
        b = tl.load(B0 + row * rank + j, mask=in0, other=0.0)
        b += tl.load(B1 + (row - rows0) * rank + j - rank, mask=in1, other=0.0)
        b += tl.load(B2 + (row - rows0 - rows1) * rank + j - 2 * rank, mask=in2, other=0.0)
        target = out + row.to(tl.int64) * stride + before + j
        tl.store(target, (b * scale).to(dtype), mask=(j < behind) & (row < rows))
    else:
        e = (program - b_programs) * BLOCK_A + tl.arange(0, BLOCK_A)
        a = tl.load(A0 + e, mask=e < size, other=0.0)
        a += tl.load(A1 + e - size, mask=(e >= size) & (e < 2 * size) & (e < members * size), other=0.0)
        a += tl.load(A2 + e - 2 * size, mask=(e >= 2 * size) & (e < members * size), other=0.0)
        tl.store(stacked + e, a.to(dtype), mask=e < extra * ((ROW_BLOCKS + SKIPPED) * BLOCKSIZE))


@triton.jit
def inverse_rms_kernel(x, out, columns, epsilon, BLOCK: tl.constexpr):
    """Write 1 / rms of each row of x, fp32.

    One program per row; it walks over the columns in blocks of BLOCK. Each element is read once and used for one
    multiplication and addition, so memory traffic is the limit.
    """
    k, place = tl.arange(0, BLOCK), x + tl.program_id(0).to(tl.int64) * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        tile = tl.load(place + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
        total += tile * tile
    tl.store(out + tl.program_id(0), tl.rsqrt(tl.sum(total, 0) / columns + epsilon))


@triton.jit
def _widen_columns(
    x, A, norm, m, k, rows, end, columns, extra, SWIGLU: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Load the tiles that `widen_kernel` reads for columns k < end: x, or gate and up, the norm's weight, and A."""
    inside = (m < rows)[:, None] & (k < end)[None]
    place = x + m.to(tl.int64)[:, None] * ((2 if SWIGLU else 1) * columns) + k[None]
    tile = tl.load(place, mask=inside, other=0.0)
    up, weight, a = tile, tile, tile  # placeholders: nothing reads them if there are none
    if SWIGLU:
        up = tl.load(place + columns, mask=inside, other=0.0)
    if NORM:
        weight = tl.load(norm + k, mask=k < end, other=0.0)[None]
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)[:, None]
        a = tl.load(A + j * columns + k[None], mask=(j < extra) & (k < end)[None], other=0.0)
    return tile, up, weight, a


@triton.jit
def _settle(total, wide, u, m, rows, columns, stride, extra, scale, BLOCK_R: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Write u after x in the wide operand, zeros after u, and scale u into a tensor of its own."""
    row, below = m.to(tl.int64)[:, None], (m < rows)[:, None]
    j, zero = tl.arange(0, BLOCK_R)[None], tl.arange(0, BLOCK_Z)[None]
    rounded, place = total.to(wide.dtype.element_ty), wide + row * stride + columns
    tl.store(place + j, rounded, mask=below & (j < extra))
    tl.store(place + zero, 0.0, mask=below & (zero >= extra) & (zero < stride - columns))
    tl.store(u + row * extra + j, (rounded.to(tl.float32) * scale).to(rounded.dtype), mask=below & (j < extra))


@triton.jit
def widen_kernel(
    x, wide, dropped, A, sums, u, norm, inverse_rms, step, sequences, salt, rows, share, length, columns, stride,
    extra, threshold, inverse, scale, SWIGLU: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Copy x, its norm, or SwiGLU of [gate | up] into the wide operand; compute u = dropout(x) A^T in the same pass.

    Grid: dimension 0 takes tiles of BLOCK_M rows, dimension 1 takes shares of `share` columns; a program walks over
    its share in steps of BLOCK_K columns. Its part of u goes to sums [shares, rows, extra]. If one share has all
    columns (BLOCK_Z > 0), u itself is written. With BLOCK_R = 0 no u is computed, and dropout(x) is written where
    there is dropout. Without dropout, memory traffic is the limit. u is computed here only for few adapter columns
    (MOST_WIDEN_COLUMNS).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, columns)
    k = first + tl.arange(0, BLOCK_K)
    row = m.to(tl.int64)[:, None]
    if DROPOUT:
        row_keys = _row_keys(_key(step, salt), sequences, m, rows, length)
    if NORM:
        rms = tl.load(inverse_rms + m, mask=m < rows, other=0.0)[:, None]
    if BLOCK_R:
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    after = _widen_columns(x, A, norm, m, k, rows, end, columns, extra, SWIGLU, NORM, BLOCK_R)
    for start in range(first, end, BLOCK_K):
        tile, up, weight, a = after
        after = _widen_columns(x, A, norm, m, k + BLOCK_K, rows, end, columns, extra, SWIGLU, NORM, BLOCK_R)
        if NORM:
            unit = tile.to(tl.float32) * rms
            if norm.dtype.element_ty != tl.float32:
                unit = unit.to(tile.dtype).to(tl.float32)
            tile = (unit * weight.to(tl.float32)).to(wide.dtype.element_ty)
        if SWIGLU:
            gate = tile.to(tl.float32)
            sigmoid, _ = _gate(gate, ACTIVATION)
            tile = (gate * sigmoid * up.to(tl.float32)).to(wide.dtype.element_ty)
        inside = (m < rows)[:, None] & (k < end)[None]
        tl.store(wide + row * stride + k[None], tile, mask=inside)
        if DROPOUT:
            pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
            keep = _keep(row_keys, pairs, threshold)
            tile = tl.where(keep, tile.to(tl.float32) * inverse, 0.0).to(tile.dtype)
        if BLOCK_R:
            total = tl.dot(tile, tl.trans(a), total)
        elif DROPOUT:
            tl.store(dropped + row * columns + k[None], tile, mask=inside)
        k += BLOCK_K
    if BLOCK_Z:
        _settle(total, wide, u, m, rows, columns, stride, extra, scale, BLOCK_R, BLOCK_Z)
    elif BLOCK_R:
        j = tl.arange(0, BLOCK_R)[None]
        target = sums + (tl.program_id(1) * rows + row) * extra + j
        tl.store(target, total, mask=(m < rows)[:, None] & (j < extra))


@triton.jit
def settle_kernel(
    sums, wide, u, rows, columns, stride, extra, scale, SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Add up the shares of u from sums [SHARES, rows, extra] and write u as `_settle` does.

    Each program takes BLOCK_M rows and all adapter columns. One addition per number that is read: memory traffic is
    the limit.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, j = m.to(tl.int64)[:, None], tl.arange(0, BLOCK_R)[None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(sums + (share * rows + row) * extra + j, mask=(m < rows)[:, None] & (j < extra), other=0.0)
    _settle(total, wide, u, m, rows, columns, stride, extra, scale, BLOCK_R, BLOCK_Z)


@triton.jit
def widen_backward_kernel(
    wide, du, x, out, dropped, A, inverse_rms, divided, step, sequences, salt, rows, length, columns, stride, du_stride,
    extra, threshold, inverse, NORM: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write dx + mask (du A) to out, from dx, the first columns of wide, and du, and operands of dA.

    The operands are dropout(x) if there is dropout, and du / rms if there is a norm.

    Grid: dimension 0 takes tiles of BLOCK_M rows, dimension 1 tiles of BLOCK_K columns. Each tile makes one small
    product, du A, over the adapter columns (BLOCK_R). du / rms is written by the programs of the first column tile.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)[:, None]
    inside = (m < rows)[:, None] & (k < columns)[None]
    dtype = wide.dtype.element_ty
    target = row * columns + k[None]
    # All loads come before the product: no load can be moved across the barriers of a product.
    grad = tl.load(wide + row * stride + k[None], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        tile = tl.load(x + target, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(A + j[:, None] * columns + k[None], mask=(j < extra)[:, None] & (k < columns)[None], other=0.0)
    in_du = (m < rows)[:, None] & (j < extra)[None]
    upstream = tl.load(du + row * du_stride + j[None], mask=in_du, other=0.0)
    if NORM:
        once = m < tl.where(tl.program_id(1) == 0, rows, 0)
        rms = tl.load(inverse_rms + m, mask=once, other=0.0)[:, None]
        place = divided + row * extra + j[None]
        tl.store(place, (upstream.to(tl.float32) * rms).to(dtype), mask=once[:, None] & (j < extra)[None])
    back = tl.dot(upstream, a)
    if DROPOUT:
        pairs = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        keep = _keep(_row_keys(_key(step, salt), sequences, m, rows, length), pairs, threshold)
        back = tl.where(keep, back * inverse, 0.0)
        tl.store(dropped + target, tl.where(keep, tile * inverse, 0.0).to(dtype), mask=inside)
    tl.store(out + target, (grad + back).to(dtype), mask=inside)


@triton.jit
def _keep_transposed(
    key, sequences, start, m, end, k, length, threshold, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Return the part of `dropout_mask` that covers columns k of rows m, which begin at `start`, bool [columns, rows].

    WHOLE: the BLOCK_M rows are of one sequence: a division per tile finds it, instead of one per row and thread.
    """
    if WHOLE:
        sequence = tl.load(sequences + start // length).to(tl.uint32, bitcast=True)
        row_keys = _mix(_mix(key ^ sequence) ^ _mix((start % length + tl.arange(0, BLOCK_M)).to(tl.uint32)))
    else:
        row_keys = _row_keys(key, sequences, m, end, length)
    bits = _mix(row_keys[None] ^ ((k // 2).to(tl.uint32) * 0x9E3779B1)[:, None])
    return ((bits >> (k % 2 * 16).to(tl.uint32)[:, None]) & 0xFFFF) >= threshold


@triton.jit
def _placed_as(x, other):
    """Return x, held by the threads that hold `other`, through an instruction that reads both.

    Otherwise Triton gives copies of the inputs to two sets of threads, and each set computes everything from them: it
    takes this for cheaper than to move results.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [x, other], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def _swiglu_rows(
    wide, upstream, x, u, m, end, k, columns, stride, du_stride, extra, u_stride, up_u, rank,
    BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Load the tiles that `swiglu_backward_kernel` reads for rows m < end.

    They are dx, gate and up, [columns, rows], and du, u of gate and u of up, [rows, adapter columns].
    """
    row, below = m.to(tl.int64), m < end
    inside = (k < columns)[:, None] & below[None]
    place = x + (row * (2 * columns))[None] + k[:, None]
    grad = tl.load(wide + (row * stride)[None] + k[:, None], mask=inside, other=0.0)
    gate, up = tl.load(place, mask=inside, other=0.0), tl.load(place + columns, mask=inside, other=0.0)
    du, u_gate, u_up = grad, grad, grad  # placeholders: nothing reads them if there are none
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)[None]
        du = tl.load(upstream + row[:, None] * du_stride + j, mask=below[:, None] & (j < extra), other=0.0)
    if BLOCK_U:
        i = tl.arange(0, BLOCK_U)[None]
        u_gate = tl.load(u + row[:, None] * u_stride + i, mask=below[:, None] & (i < rank), other=0.0)
        u_up = tl.load(u + row[:, None] * u_stride + up_u + i, mask=below[:, None] & (i < rank), other=0.0)
    return grad, gate, up, du, u_gate, u_up


@triton.jit
def _store_sums_of_B(target, sum_gate, sum_up, k, columns, rank, BLOCK_U: tl.constexpr):
    """Write the sums for dB of gate, and of up behind them, each [columns, rank]."""
    i = tl.arange(0, BLOCK_U)[None]
    place, inside = target + k[:, None] * rank + i, (i < rank) & (k < columns)[:, None]
    tl.store(place, sum_gate, mask=inside)
    tl.store(place + columns * rank, sum_up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    wide, upstream, x, grads, A, u, sums, step, sequences, salt, rows, share, length, columns, stride, du_stride, extra,
    u_stride, up_u, rank, threshold, inverse, DROPOUT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of [gate | up], and sums over rows for dA and for dB of gate and up.

    They come from dx, the first columns of wide, and du (`upstream`).

    Grid: dimension 0 takes tiles of BLOCK_K columns, dimension 1 takes shares of `share` rows; a program walks over
    its share in steps of BLOCK_M rows and keeps its sums in registers. Each share writes its own sums, so the result
    does not depend on the order in which programs run. BLOCK_R, BLOCK_U: the sizes of the tiles for `extra` (the
    adapter columns here) and `rank` (the rank of gate and up); 0 where there are none. up_u: the first column of up's u.
    grads may be x, whose numbers are read once, by the program that overwrites them. WHOLE: BLOCK_M divides `length`.

    Tiles lie transposed, [columns, rows]: then a thread's part of the first product, A^T du^T, and of what is computed from
    it, is its part of the first operand of the products for the sums, and nothing is moved in between.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * share
    within = (k < columns)[:, None]
    dtype = wide.dtype.element_ty
    if DROPOUT:
        key = _key(step, salt)
    if BLOCK_R:
        j = tl.arange(0, BLOCK_R)[None]
        a = tl.load(A + j * columns + k[:, None], mask=(j < extra) & within, other=0.0)
        sum_a = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    if BLOCK_U:
        sum_gate = tl.zeros((BLOCK_K, BLOCK_U), tl.float32)
        sum_up = tl.zeros((BLOCK_K, BLOCK_U), tl.float32)
    end = tl.minimum(first + share, rows)
    m = first + tl.arange(0, BLOCK_M)
    after = _swiglu_rows(
        wide, upstream, x, u, m, end, k, columns, stride, du_stride, extra, u_stride, up_u, rank, BLOCK_R, BLOCK_U
    )  # fmt: skip
    for start in range(first, end, BLOCK_M):
        grad, gate, up, du, u_gate, u_up = after
        after = _swiglu_rows(
            wide, upstream, x, u, m + BLOCK_M, end, k, columns, stride, du_stride, extra, u_stride, up_u, rank, BLOCK_R, BLOCK_U
        )  # fmt: skip
        grad, gate, up = grad.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
        if BLOCK_R:
            back = tl.dot(a, tl.trans(du))
            gate, up = _placed_as(gate, back), _placed_as(up, back)
        sigmoid, slope = _gate(gate, ACTIVATION)
        silu = gate * sigmoid
        if BLOCK_R:
            tile = silu * up
            if DROPOUT:
                keep = _keep_transposed(key, sequences, start, m, end, k, length, threshold, WHOLE, BLOCK_M)
                tile = tl.where(keep, tile * inverse, 0.0)
                back = tl.where(keep, back * inverse, 0.0)
            grad += back
            sum_a = tl.dot(tile.to(dtype), du, sum_a)
        d_gate = (grad * up * (sigmoid + silu * (1 - sigmoid) * slope)).to(dtype)
        d_up = (grad * silu).to(dtype)
        if BLOCK_U:
            sum_gate = tl.dot(d_gate, u_gate, sum_gate)
            sum_up = tl.dot(d_up, u_up, sum_up)
        inside = (m < end)[None] & within
        place = grads + (m.to(tl.int64) * (2 * columns))[None] + k[:, None]
        tl.store(place, d_gate, mask=inside)
        tl.store(place + columns, d_up, mask=inside)
        m += BLOCK_M
    sums += tl.program_id(1) * (extra + 2 * rank) * columns
    if BLOCK_R:
        tl.store(sums + j * columns + k[:, None], sum_a, mask=(j < extra) & within)
    if BLOCK_U:
        _store_sums_of_B(sums + extra * columns, sum_gate, sum_up, k, columns, rank, BLOCK_U)


@triton.jit
def settle_gradients_kernel(
    dA, weight, dB, own, scaled, columns, size, rows0, rows1, extra, rank, programs, BLOCK: tl.constexpr
):  # fmt: skip
    """Multiply the columns of dA by the norm's weight in place, and copy each member's own columns of dB to `own`.

    One-dimensional grid, BLOCK numbers per program. The first `programs` programs take dA, `scaled` numbers; the
    others take `own`, `size` numbers. The rows of dB's members end at rows0, rows1 and the last row. At most one
    multiplication per number that is read: memory traffic is the limit.
    """
    program = tl.program_id(0)
    if program < programs:
        e = program * BLOCK + tl.arange(0, BLOCK)
        factor = tl.load(weight + e % columns, mask=e < scaled, other=0.0).to(tl.float32)
        tl.store(dA + e, tl.load(dA + e, mask=e < scaled, other=0.0) * factor, mask=e < scaled)
    else:
        e = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        row = e // rank
        member = (row >= rows0).to(tl.int32) + (row >= rows1).to(tl.int32)
        place = row * extra + member * rank + e % rank
        tl.store(own + e, tl.load(dB + place, mask=e < size, other=0.0), mask=e < size)


@triton.jit
def _formed(x, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Return what a model makes of its head's product x, as LogitForm of loss.py, and the tanh in it."""
    if SCALED:
        x = x * scale
    tanh = x
    if CAPPED:
        tanh = 1.0 - 2.0 / (tl.exp2(x * (2 * 1.4426950408889634 / cap)) + 1.0)
        x = tanh * cap
    return x, tanh


@triton.jit
def _row_cross_entropy(
    logits, target, loss, columns, scale, cap, GRADIENT: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Do `cross_entropy_kernel` for one row.

    Each group of eight neighbouring logits has its own running maximum and sum, so threads exchange nothing before the
    end of the row. The second pass runs backwards, because the logits that were read last are still in the cache.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    kept = target >= 0
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)  # read now: the second pass overwrites it
    at_target = _formed(at_target, scale, cap, SCALED, CAPPED)[0]
    k = tl.arange(0, BLOCK)
    top = tl.full((BLOCK // 8,), -1e38, tl.float32)  # finite, since inf - inf would be NaN
    total = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, columns, BLOCK):
        x = tl.load(logits + start + k, mask=start + k < columns, other=float("-inf")).to(tl.float32)
        x = _formed(x, scale, cap, SCALED, CAPPED)[0]
        if CAPPED:  # which made a number of -inf
            x = tl.where(start + k < columns, x, float("-inf"))
        x = tl.reshape(x, (BLOCK // 8, 8))
        above = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2((top - above) * LOG2E) + tl.sum(tl.exp2((x - above[:, None]) * LOG2E), 1)
        top = above
    largest = tl.max(top, 0)
    log_sum = largest + tl.log(tl.sum(total * tl.exp2((top - largest) * LOG2E), 0))
    tl.store(loss, tl.where(kept, log_sum - at_target, 0.0))
    if GRADIENT:
        for back in range(0, columns, BLOCK):
            column = (columns - 1) // BLOCK * BLOCK - back + k
            x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
            x, tanh = _formed(x, scale, cap, SCALED, CAPPED)
            share = tl.exp2((x - log_sum) * LOG2E) - (column == target).to(tl.float32)
            if SCALED:
                share *= scale
            if CAPPED:
                share *= 1.0 - tanh * tanh
            tl.store(logits + column, tl.where(kept, share, 0.0).to(logits.dtype.element_ty), mask=column < columns)


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, rows, columns, stride, scale, cap, GRADIENT: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss of each row of logits, 0 where the target is -100, and overwrite the logits with their gradient.

    stride: from one row of the logits to the next. SCALED, CAPPED: whether the model multiplies its head's product by
    `scale`, or caps it with cap tanh(x / cap).

    There is one program per multiprocessor, and each takes one row after another, in blocks of BLOCK columns. So few
    rows are in work at the same time, and they fit the L2 cache (300 kB per row for a vocabulary of 151,936), from
    which the second pass reads them.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = logits + stride.to(tl.int64) * row
        _row_cross_entropy(
            place, tl.load(targets + row), losses + row, columns, scale, cap, GRADIENT, SCALED, CAPPED, BLOCK
        )


@triton.jit
def rotated_places(i, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Return which two features of a head numbers i < WIDTH / 2 stand for: those that are rotated together if i < HALF.

    Where only the first 2 HALF features of a head are rotated, the rest is shared out among the further numbers.
    """
    if WIDTH == 2 * HALF:
        return i, i + HALF
    else:
        return tl.where(i < HALF, i, i + HALF), tl.where(i < HALF, i + HALF, i + WIDTH // 2)


@triton.jit
def _tile_of_heads(
    rows, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Return a program's rows of qkv, which of them exist, and how many heads a norm as wide as all of them covers.

    Each head of each token is a row. For such a norm a program has all heads of one token's q, k or v; otherwise it has
    BLOCK_M rows, wherever they lie.
    """
    m = tl.arange(0, BLOCK_M)
    if NORM == "all":
        part = tl.program_id(1)
        number = tl.where(part == 0, HEADS, KV_HEADS)
        first = tl.where(part == 0, 0, HEADS + (part - 1) * KV_HEADS)
        return tl.program_id(0) * (HEADS + 2 * KV_HEADS) + first + m, m < number, number
    else:
        r = tl.program_id(0) * BLOCK_M + m
        return r, r < rows, 1


@triton.jit
def _head_weight(
    q_weight, k_weight, head, at, in_q, in_k, HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Return the factors of the norms of q and k for features `at` of a tile of heads, fp32; anything for v."""
    if NORM == "all":
        place = head[:, None] * WIDTH + at
        q_part = tl.load(q_weight + place, mask=in_q, other=0.0)
        return (q_part + tl.load(k_weight + place - HEADS * WIDTH, mask=in_k, other=0.0)).to(tl.float32)
    else:
        of_q = tl.load(q_weight + at, mask=at < WIDTH, other=0.0)
        return tl.where(in_q, of_q, tl.load(k_weight + at, mask=at < WIDTH, other=0.0)).to(tl.float32)


@triton.jit
def _head_mean(low, high, number, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """Return the mean over what one norm covers, [rows, 1]: a head, or all `number` heads of the tile."""
    total = tl.sum(low + high, 1)
    if NORM == "all":
        return tl.zeros_like(total)[:, None] + tl.sum(total, 0) / (number * WIDTH)
    else:
        return total[:, None] / WIDTH


@triton.jit
def rotate_kernel(
    qkv, q, k, v, cos, sin, q_weight, k_weight, grad, rows, positions, epsilon, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BACK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write normed and rotated q and k, and v from qkv; with BACK, write the gradient of qkv from those of q, k and v.

    A row is one head of one token, WIDTH features, of which the first 2 HALF are rotated. Each program takes BLOCK_M rows
    and all features (BLOCK_K, a power of two, covers half of them). NORM: "head" if each head of q and k passes through
    an RMS norm first, "all" if all heads together do, "" if none does. Every number is read and written once, with a few
    operations in between, so memory traffic is the limit; whole lines of memory are read and written on both sides.
    """
    r, exists, number = _tile_of_heads(rows, HEADS, KV_HEADS, BLOCK_M, NORM)
    token, head = r // (HEADS + 2 * KV_HEADS), r % (HEADS + 2 * KV_HEADS)
    i = tl.arange(0, BLOCK_K)[None]
    inside = exists[:, None] & (i < WIDTH // 2)
    in_q = inside & (head < HEADS)[:, None]
    in_k = inside & ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
    in_v = inside & (head >= HEADS + KV_HEADS)[:, None]
    low_at, high_at = rotated_places(i, HALF, WIDTH)
    long = token.to(tl.int64)
    in_qkv = r.to(tl.int64)[:, None] * WIDTH
    to_q = q + (long * HEADS + head)[:, None] * WIDTH
    to_k = k + (long * KV_HEADS + head - HEADS)[:, None] * WIDTH
    to_v = v + (long * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * WIDTH
    if BACK:
        low = tl.load(to_q + low_at, mask=in_q, other=0.0) + tl.load(to_k + low_at, mask=in_k, other=0.0)
        low = (low + tl.load(to_v + low_at, mask=in_v, other=0.0)).to(tl.float32)
        high = tl.load(to_q + high_at, mask=in_q, other=0.0) + tl.load(to_k + high_at, mask=in_k, other=0.0)
        high = (high + tl.load(to_v + high_at, mask=in_v, other=0.0)).to(tl.float32)
    else:
        low = tl.load(qkv + in_qkv + low_at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(qkv + in_qkv + high_at, mask=inside, other=0.0).to(tl.float32)
    normed = in_q | in_k
    if NORM != "":
        weight_low = _head_weight(q_weight, k_weight, head, low_at, in_q, in_k, HEADS, WIDTH, NORM)
        weight_high = _head_weight(q_weight, k_weight, head, high_at, in_q, in_k, HEADS, WIDTH, NORM)
        x_low, x_high = low, high
        if BACK:
            x_low = tl.load(qkv + in_qkv + low_at, mask=normed, other=0.0).to(tl.float32)
            x_high = tl.load(qkv + in_qkv + high_at, mask=normed, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(_head_mean(x_low * x_low, x_high * x_high, number, WIDTH, NORM) + epsilon)
        x_low, x_high = x_low * inverse, x_high * inverse
        if not BACK:
            low, high = tl.where(normed, x_low * weight_low, low), tl.where(normed, x_high * weight_high, high)
    turned = normed & (i < HALF)
    angle = (token % positions)[:, None] * (2 * HALF) + i
    cos_low = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, mask=turned, other=1.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, mask=turned, other=0.0).to(tl.float32)
    if BACK:
        new_low, new_high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    else:
        new_low, new_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    low, high = tl.where(turned, new_low, low), tl.where(turned, new_high, high)
    dtype = qkv.dtype.element_ty
    if BACK:
        if NORM != "":
            new_low, new_high = low * weight_low, high * weight_high
            share = _head_mean(new_low * x_low, new_high * x_high, number, WIDTH, NORM)
            low = tl.where(normed, (new_low - x_low * share) * inverse, low)
            high = tl.where(normed, (new_high - x_high * share) * inverse, high)
        tl.store(grad + in_qkv + low_at, low.to(dtype), mask=inside)
        tl.store(grad + in_qkv + high_at, high.to(dtype), mask=inside)
    else:
        low, high = low.to(dtype), high.to(dtype)
        tl.store(to_q + low_at, low, mask=in_q)
        tl.store(to_q + high_at, high, mask=in_q)
        tl.store(to_k + low_at, low, mask=in_k)
        tl.store(to_k + high_at, high, mask=in_k)
        tl.store(to_v + low_at, low, mask=in_v)
        tl.store(to_v + high_at, high, mask=in_v)
