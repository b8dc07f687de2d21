"""The Triton kernels of a decode step besides its products: norms and attention. decode_step.py launches them and describes
the whole step; decode_products.py multiplies with the 4-bit weights and explains the order of x.
"""

from fast_path.decode_products import input_place, let_next_kernel_start, wait_for_earlier_kernels
from fast_path.nf4 import tl, triton


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
def _below(j, COUNT: tl.constexpr, PAD: tl.constexpr):
    """Return which of PAD numbers j from 0 on are below COUNT, so that a power of two can stand for 48 or 96 features.

    It is constant where all are, which the compiler then drops from every mask.
    """
    if COUNT == PAD:
        return tl.full(j.shape, True, tl.int1)
    else:
        return j < COUNT


@triton.jit
def _normed(value, weight, inverse, j, heads, below, NORM: tl.constexpr):
    """Return features j of heads after their norm. inverse: 1 / root mean square; heads: which exist, bool [heads, 1]."""
    if NORM == "all":
        value = value * inverse * tl.load(weight + j, mask=heads & below, other=0.0).to(tl.float32)
    elif NORM == "head":
        value = value * inverse * tl.load(weight + j, mask=below, other=0.0).to(tl.float32)
    return value


@triton.jit
def _partner(j, TURN: tl.constexpr):
    """Return the feature that feature j is rotated with, if the first 2 TURN features of a head are; j for the rest."""
    return tl.where(j < TURN, j + TURN, tl.where(j < 2 * TURN, j - TURN, j))


@triton.jit
def _rotated(
    x, weight, root, c, s, c2, s2, eps, heads, NORM: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return both halves of heads after their norm and rotary embedding, fp32 [heads, PAD] each; behind HALF they are 0.

    c, s, c2, s2: cosine and sine of both halves; heads: which heads exist, bool [heads, 1]; root: 1 / root mean square of
    all heads together, for NORM "all".
    """
    j = tl.arange(0, PAD)[None]
    below = _below(j, HALF, PAD)
    real = heads & below
    first = sum_of_parts(x + j, real, PARTS, STRIDE)
    second = sum_of_parts(x + HALF + j, real, PARTS, STRIDE)
    inverse = root
    if NORM == "head":
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
    first = _normed(first, weight, inverse, j, heads, below, NORM)
    second = _normed(second, weight, inverse, HALF + j, heads, below, NORM)
    if TURN == HALF:
        return first * c - second * s, second * c + first * s
    else:
        p, p2 = _partner(j, TURN), _partner(HALF + j, TURN)
        other = _normed(sum_of_parts(x + p, real, PARTS, STRIDE), weight, inverse, p, heads, below, NORM)
        other2 = _normed(sum_of_parts(x + p2, real, PARTS, STRIDE), weight, inverse, p2, heads, below, NORM)
        return first * c + other * s, second * c2 + other2 * s2


@triton.jit
def _share(here, begin, SPLITS: tl.constexpr, POSITIONS: tl.constexpr):
    """Return how many positions each program takes of a sequence's attention: a multiple of POSITIONS."""
    return tl.cdiv(tl.cdiv(here + 1 - begin, SPLITS), POSITIONS) * POSITIONS


@triton.jit
def _tile(keys, values, n, here, j, wide, SIZE: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr):
    """Load both halves of the keys, and the values, of positions n; from `here` on they are 0."""
    old = (n < here)[:, None]
    half, whole = old & _below(j, HALF, PAD), old & _below(wide, SIZE, 2 * PAD)
    first = tl.load(keys + n[:, None] * SIZE + j, mask=half, other=0.0)
    second = tl.load(keys + n[:, None] * SIZE + HALF + j, mask=half, other=0.0)
    return first, second, tl.load(values + n[:, None] * SIZE + wide, mask=whole, other=0.0)


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
def _angles(cos, sin, HALF: tl.constexpr, TURN: tl.constexpr, PAD: tl.constexpr):
    """Return the cosine and sine of a position for the first half of a head, and for the second, fp32 [1, PAD] each."""
    j = tl.arange(0, PAD)[None]
    below = _below(j, HALF, PAD)
    c = tl.load(cos + j, mask=below, other=0.0).to(tl.float32)
    s = tl.load(sin + j, mask=below, other=0.0).to(tl.float32)
    c2, s2 = c, s
    if TURN < HALF:
        c2 = tl.load(cos + HALF + j, mask=below, other=0.0).to(tl.float32)
        s2 = tl.load(sin + HALF + j, mask=below, other=0.0).to(tl.float32)
    return c, s, c2, s2


@triton.jit
def _new_token(
    qkv, q_weight, k_weight, roots, c, s, c2, s2, eps, kv, head, real, wide, dtype: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr,
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
        qkv + head[:, None] * SIZE, q_weight, root, c, s, c2, s2, eps, real, NORM, HALF, TURN, PARTS, STRIDE, PAD
    )  # fmt: skip
    q1, q2 = q1.to(dtype), q2.to(dtype)
    k1, k2 = _rotated(new, k_weight, root2, c, s, c2, s2, eps, one, NORM, HALF, TURN, PARTS, STRIDE, PAD)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    one = one & _below(wide, SIZE, 2 * PAD)
    v = sum_of_parts(qkv + (HEADS + KV_HEADS + kv) * SIZE + wide, one, PARTS, STRIDE).to(dtype)
    return q1, q2, k1, k2, v


@triton.jit
def _attend(
    keys, values, q1, q2, k1, k2, v, next1, next2, next_value, start, end, here, scale, cap, GROUP: tl.constexpr,
    HALF: tl.constexpr, POSITIONS: tl.constexpr, CAPPED: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return the largest score, the sum of weights and the sum of weighted values over positions start to end.

    next1, next2, next_value: the first tile, which is loaded already; each pass loads the next tile. Position `here` is
    the new token, whose k1, k2 and v are not in the cache yet.
    """
    SIZE: tl.constexpr = 2 * HALF
    j, wide = tl.arange(0, PAD)[None], tl.arange(0, 2 * PAD)[None]
    top = tl.full((GROUP,), -float("inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    total = tl.zeros((GROUP, 2 * PAD), tl.float32)
    for first in range(start, end, POSITIONS):
        n = first + tl.arange(0, POSITIONS)
        own = (n == here)[:, None]
        key1, key2, value = tl.where(own, k1, next1), tl.where(own, k2, next2), tl.where(own, v, next_value)
        next1, next2, next_value = _tile(
            keys, values, n + POSITIONS, tl.minimum(here, end), j, wide, SIZE, HALF, PAD
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
    PARTS: tl.constexpr, CAPPED: tl.constexpr, PAD: tl.constexpr, OVERLAP: tl.constexpr,
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
    these are not all, the sine of the first TURN has the sign that it is added with, and the rest has sine 0. PAD: HALF or
    the next power of two.
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
    j, wide = tl.arange(0, PAD)[None], tl.arange(0, 2 * PAD)[None]
    half, whole = _below(j, HALF, PAD), _below(wide, SIZE, 2 * PAD)
    c, s, c2, s2 = _angles(cos + (here - begin) * SIZE, sin + (here - begin) * SIZE, HALF, TURN, PAD)
    keys += kv.to(tl.int64) * stride * SIZE
    values += kv.to(tl.int64) * stride * SIZE
    seen = tl.maximum(begin, here + 1 - window)
    share = _share(here, seen, SPLITS, POSITIONS)
    start = seen + split * share
    end = tl.minimum(start + share, here + 1)
    n = start + tl.arange(0, POSITIONS)
    next1, next2, next_value = _tile(keys, values, n, tl.minimum(here, end), j, wide, SIZE, HALF, PAD)
    wait_for_earlier_kernels(OVERLAP)
    group = tl.arange(0, GROUP)
    head = kv * EACH + group
    real = (group < EACH)[:, None]
    q1, q2, k1, k2, v = _new_token(
        qkv, q_weight, k_weight, roots, c, s, c2, s2, eps, kv, head, real, wide, dtype, HEADS, KV_HEADS, HALF, TURN, NORM,
        PARTS, M * OUTPUTS, PAD,
    )  # fmt: skip
    top, weight, total = _attend(
        keys, values, q1, q2, k1, k2, v, next1, next2, next_value, start, end, here, scale, cap, GROUP, HALF, POSITIONS,
        CAPPED, PAD,
    )  # fmt: skip
    if (start <= here) & (here < start + share):
        place = here * SIZE
        tl.store(keys + place + j, k1, mask=half)
        tl.store(keys + place + HALF + j, k2, mask=half)
        tl.store(values + place + wide, v, mask=whole)
    place = head * SPLITS + split
    used = group < tl.where(start < end, EACH, 0)
    tl.store(mixed + place[:, None] * SIZE + wide, total / weight[:, None], mask=used[:, None] & whole)
    tl.store(logs + place, tl.where(start < end, top + tl.log2(weight), -float("inf")), mask=group < EACH)


@triton.jit
def combine_kernel(
    mixed, logs, position, starts, out, A, u, rank, window, K: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, POSITIONS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the shares of attention to o_proj's x, and compute each head's part of u = A x for o_proj's adapter.

    Grid: heads, sequences. A program reads the SPLITS means of its head, weighs them by their sums of weights, and
    writes SIZE numbers of x in the order of `input_place`. From these it computes its part of u [heads, M, RANK], whose
    parts add up to A x, in tiles of TILE rows of A. It does so here because it has x in registers. Every number is read
    once, for one multiplication and addition. PAD: SIZE or the next power of two.
    """
    let_next_kernel_start(OVERLAP)
    head, sequence = tl.program_id(0), tl.program_id(1)
    dtype = out.dtype.element_ty
    split, wide, j = tl.arange(0, SPLITS), tl.arange(0, PAD), tl.arange(0, TILE)
    whole = _below(wide, SIZE, PAD)
    A += head * SIZE + wide[None]
    if RANK > 0:
        a = tl.load(A + j[:, None] * K, mask=(j < rank)[:, None] & whole[None], other=0.0)
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
    parts = tl.load(mixed + place[:, None] * SIZE + wide[None], mask=used[:, None] & whole[None], other=0.0)
    log = tl.load(logs + place, mask=used, other=-float("inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    x = (tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)).to(dtype)
    tl.store(out + input_place(head * SIZE + wide, K, M, sequence), x, mask=whole)
    if RANK > 0:
        for start in range(0, RANK, TILE):
            tl.store(u + head * (M * RANK) + start + j, tl.sum(a.to(tl.float32) * x.to(tl.float32)[None], 1))
            more = start + TILE + j
            a = tl.load(A + more[:, None] * K, mask=(more < tl.minimum(rank, RANK))[:, None] & whole[None], other=0.0)
