"""Causal attention whose scores are capped with a tanh (Gemma 2), which neither SDPA nor FlashAttention's wrappers compute.

The kernels are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691): no tensor of scores exists in memory. A sliding
window and samples that share a block are limits of their loops, so no mask exists either. Each gradient is summed in the
registers of one program, so the bits are the same each time.
"""

import torch

from fast_path.nf4 import Launch, runs_on, tl, triton


def launches(width: int) -> tuple[Launch, Launch]:
    """Return the layouts for heads of this width: of the forward pass and dq, and of dk and dv.

    block_m: queries per tile; block_k: positions of keys per tile. They fit the 99 KiB of shared memory of an RTX 4060.
    """
    if width <= 64:
        return Launch(block_m=64, block_k=64, warps=4), Launch(block_m=32, block_k=64, warps=4)
    if width <= 128:
        return Launch(block_m=64, block_k=32, warps=4), Launch(block_m=32, block_k=64, warps=8)
    return Launch(block_m=64, block_k=32, warps=8), Launch(block_m=16, block_k=32, warps=4)


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _scores(q, k, m, n, first, length, scale, cap, window, CAPPED: tl.constexpr):
    """Return the scores of a tile in base 2, -inf where a query does not see a key, and 1 - tanh^2 of the cap.

    q: [queries, width] at positions m, or, with k, the other way round: m and first then vary along the columns.
    """
    score = tl.dot(q, tl.trans(k)) * scale
    slope = tl.full(score.shape, 1.0, tl.float32)
    if CAPPED:
        tanh = 1.0 - 2.0 / (tl.exp2(score * (2 * 1.4426950408889634 / cap)) + 1.0)
        slope = 1.0 - tanh * tanh
        score = cap * tanh
    sees = (n <= m) & (n >= first) & (n + window > m) & (m < length)
    return tl.where(sees, score * 1.4426950408889634, -float("inf")), slope


@triton.jit
def capped_forward_kernel(
    q, k, v, limits, out, logs, length, heads, groups, scale, cap, window, CAPPED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write attention's output and the base-2 logarithm of each query's sum of weights.

    q, out: [batch, length, heads, WIDTH]; k, v: [batch, length, heads / groups, WIDTH]; limits: int32 [2, batch, length],
    the first position that a query sees but for the window, and the position after the last query that sees a key; logs:
    fp32 [batch, heads, length]. Grid: tiles of BLOCK_M queries, batch times heads.
    """
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)[None]
    inside, wide = (m < length)[:, None], d < WIDTH
    place = (batch.to(tl.int64) * length * heads + head) * WIDTH
    query = tl.load(q + place + m[:, None] * (heads * WIDTH) + d, mask=inside & wide, other=0.0)
    first = tl.load(limits + batch * length + m, mask=m < length, other=0)
    kv = (batch.to(tl.int64) * length * (heads // groups) + head // groups) * WIDTH
    start = tl.maximum(tl.min(tl.where(m < length, first, length), 0), tl.program_id(0) * BLOCK_M - window + 1)
    start = tl.maximum(start, 0) // BLOCK_N * BLOCK_N
    top = tl.full((BLOCK_M,), -1e38, tl.float32)  # finite, since inf - inf would be NaN
    weight = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(start, tl.minimum((tl.program_id(0) + 1) * BLOCK_M, length), BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        at = kv + n[:, None] * (heads // groups * WIDTH) + d
        there = (n < length)[:, None] & wide
        key, value = tl.load(k + at, mask=there, other=0.0), tl.load(v + at, mask=there, other=0.0)
        score, _ = _scores(query, key, m[:, None], n[None], first[:, None], length, scale, cap, window, CAPPED)
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(p, 1)
        total = tl.dot(p.to(value.dtype), value, total * fade[:, None])
        top = higher
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + place + m[:, None] * (heads * WIDTH) + d, result, mask=inside & wide)
    tl.store(logs + tl.program_id(1) * length + m, top + tl.log2(weight), mask=m < length)


@triton.jit
def capped_dq_kernel(
    q, k, v, grad, limits, logs, delta, dq, length, heads, groups, scale, cap, window, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of q, as the forward pass walks. delta: the sum of grad times out of each query, as logs."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)[None]
    inside, wide = (m < length)[:, None], d < WIDTH
    at_m = (batch.to(tl.int64) * length * heads + head) * WIDTH + m[:, None] * (heads * WIDTH) + d
    query = tl.load(q + at_m, mask=inside & wide, other=0.0)
    upstream = tl.load(grad + at_m, mask=inside & wide, other=0.0)
    first = tl.load(limits + batch * length + m, mask=m < length, other=0)
    log = tl.load(logs + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    own = tl.load(delta + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    kv = (batch.to(tl.int64) * length * (heads // groups) + head // groups) * WIDTH
    start = tl.maximum(tl.min(tl.where(m < length, first, length), 0), tl.program_id(0) * BLOCK_M - window + 1)
    start = tl.maximum(start, 0) // BLOCK_N * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(start, tl.minimum((tl.program_id(0) + 1) * BLOCK_M, length), BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        at = kv + n[:, None] * (heads // groups * WIDTH) + d
        there = (n < length)[:, None] & wide
        key, value = tl.load(k + at, mask=there, other=0.0), tl.load(v + at, mask=there, other=0.0)
        score, slope = _scores(query, key, m[:, None], n[None], first[:, None], length, scale, cap, window, CAPPED)
        p = tl.exp2(score - log[:, None])
        d_score = p * (tl.dot(upstream, tl.trans(value)) - own[:, None]) * slope
        total = tl.dot(d_score.to(key.dtype), key, total)
    tl.store(dq + at_m, (total * scale).to(dq.dtype.element_ty), mask=inside & wide)


@triton.jit
def capped_dkv_kernel(
    q, k, v, grad, limits, logs, delta, dk, dv, length, heads, groups, scale, cap, window, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k and v. Grid: tiles of BLOCK_N positions, batch times heads of k and v.

    A program walks over the `groups` heads of q that read its head, and over their queries that see its positions.
    """
    kv_heads = heads // groups
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None]
    inside, wide = (n < length)[:, None], d < WIDTH
    at_n = (batch.to(tl.int64) * length * kv_heads + kv_head) * WIDTH + n[:, None] * (kv_heads * WIDTH) + d
    key, value = tl.load(k + at_n, mask=inside & wide, other=0.0), tl.load(v + at_n, mask=inside & wide, other=0.0)
    last = tl.load(limits + tl.num_programs(1) // kv_heads * length + batch * length + n, mask=n < length, other=0)
    start = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M
    stop = tl.minimum(tl.max(last, 0), (tl.program_id(0) + 1) * BLOCK_N + window)
    d_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        row = (batch.to(tl.int64) * heads + head) * length
        base = (batch.to(tl.int64) * length * heads + head) * WIDTH
        for begin in range(start, stop, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            at = base + m[:, None] * (heads * WIDTH) + d
            there = (m < length)[:, None] & wide
            query, upstream = tl.load(q + at, mask=there, other=0.0), tl.load(grad + at, mask=there, other=0.0)
            first = tl.load(limits + batch * length + m, mask=m < length, other=0)[None]
            log = tl.load(logs + row + m, mask=m < length, other=0.0)[None]
            own = tl.load(delta + row + m, mask=m < length, other=0.0)[None]
            score, slope = _scores(key, query, m[None], n[:, None], first, length, scale, cap, window, CAPPED)
            p = tl.exp2(score - log)
            d_value = tl.dot(p.to(upstream.dtype), upstream, d_value)
            d_score = p * (tl.dot(value, tl.trans(upstream)) - own) * slope
            d_key = tl.dot(d_score.to(query.dtype), query, d_key)
    tl.store(dk + at_n, (d_key * scale).to(dk.dtype.element_ty), mask=inside & wide)
    tl.store(dv + at_n, d_value.to(dv.dtype.element_ty), mask=inside & wide)


# ------------------------------------------------------------------------------------------------ operators


def sample_limits(starts: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Return the first position that each query sees, and the end of its sample, int32 [2, batch, length].

    starts: of `sample_starts`, int32 [samples + 1] in the flattened batch; None: a sample per sequence.
    """
    token = torch.arange(batch * length, device=device)
    begin = token // length * length
    if starts is None:
        return torch.stack([begin - begin, begin - begin + length]).view(2, batch, length).int()
    sample = torch.searchsorted(starts, token.int(), right=True)
    # The padding of a short last block is no sample of its own, but it ends with its sequence.
    return (
        torch.stack([torch.maximum(starts[sample - 1], begin), torch.minimum(starts[sample], begin + length)])
        .sub_(begin)
        .view(2, batch, length)
        .int()
    )


@torch.library.custom_op("qlora::capped_attention", mutates_args=())
def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
    cap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal attention of capped scores, in q's shape, and `capped_forward_kernel`'s logs.

    q: [batch, length, heads, width]; k and v may have fewer heads. starts: of `sample_starts`, or None. cap: 0 for none.
    window: the positions that a query sees, itself included.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    (batch, length, heads, width), launch = q.shape, launches(q.shape[3])[0]
    out, logs = torch.empty_like(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    capped_forward_kernel[(triton.cdiv(length, launch.block_m), batch * heads)](
        q, k, v, sample_limits(starts, batch, length, q.device), out, logs, length, heads, heads // k.shape[2], scale,
        cap, window, **_constants(width, cap, launch),
    )  # fmt: skip
    return out, logs


def _constants(width: int, cap: float, launch: Launch) -> dict:
    block = max(16, triton.next_power_of_2(width))
    tile = {"BLOCK_D": block, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_k}
    return {"CAPPED": cap > 0, "WIDTH": width, **tile, "num_warps": launch.warps, "num_stages": 1}


@capped_attention.register_fake
def _(q, k, v, starts, scale, cap, window):
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("qlora::capped_attention_backward", mutates_args=())
def capped_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, logs: torch.Tensor,
    starts: torch.Tensor | None, scale: float, cap: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    limits = sample_limits(starts, batch, length, q.device)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    numbers = length, heads, heads // kv_heads, scale, cap, window
    first, second = launches(width)
    capped_dq_kernel[(triton.cdiv(length, first.block_m), batch * heads)](
        q, k, v, grad, limits, logs, delta, dq, *numbers, **_constants(width, cap, first)
    )
    capped_dkv_kernel[(triton.cdiv(length, second.block_k), batch * kv_heads)](
        q, k, v, grad, limits, logs, delta, dk, dv, *numbers, **_constants(width, cap, second)
    )
    return dq, dk, dv


@capped_attention_backward.register_fake
def _(grad, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, starts, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx, grad, _):
    q, k, v, out, logs, starts = ctx.saved_tensors
    return *capped_attention_backward(grad, q, k, v, out, logs, starts, *ctx.numbers), None, None, None, None


capped_attention.register_autograd(_backward, setup_context=_setup)


def plain_capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
    cap: float,
    window: int,
) -> torch.Tensor:
    """Return what `capped_attention` does, with all scores in memory.

    q may be the last positions alone, as when a cache holds the others.
    """
    (batch, length), new = k.shape[:2], q.shape[1]
    first = sample_limits(starts, batch, length, q.device)[0, :, None, None, length - new :, None]
    m, n = torch.arange(length - new, length, device=q.device)[:, None], torch.arange(length, device=q.device)[None]
    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))  # [batch, heads of k, groups, new, width]
    scores = (q @ k.transpose(1, 2)[:, :, None].transpose(-1, -2)).float() * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~((n <= m) & (n + window > m) & (n >= first)), -torch.inf)
    mixed = scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)[:, :, None]
    return mixed.flatten(1, 2).transpose(1, 2)


def has_kernels(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return whether `capped_attention` runs for tensors like these."""
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[1] == k.shape[1] and q.shape[3] <= 256
    return half and runs_on(q.device)
