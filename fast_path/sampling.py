"""A token drawn from what top_p and min_p leave of the softmax without sorting the vocabulary: Triton kernels, three
launches.

p / e with e drawn from Exp(1) for each token is largest at a token with its probability: a race. Restricted to the tokens
that top_p and min_p keep, the nucleus, it is won with their probabilities in it. So the race goes over all tokens, and
its winner needs one sum only: the probabilities of the likelier ones must be less than top_p. Else no token as likely as
it or less is in the nucleus, and the race goes on among the likelier ones; with top_p 0.9, once in ten tokens at most.
"""

import torch

from fast_path.nf4 import INTERPRETED, tl, triton

BLOCK = 4096  # scores that a program takes at a time
ROW_BLOCK = 8192  # the same for the program that settles a row by itself
PROGRAMS = 256  # at most: two for each of the 132 multiprocessors of an H100

LOG2E = tl.constexpr(1.4426950408889634)
INSTRUCTION = tl.constexpr(not INTERPRETED)


@triton.jit
def _log2(x):
    """Return log2(x) as the GPU's one instruction gives it, within 2.4e-7 around 1; a more exact one takes 20 more."""
    if INSTRUCTION:
        return tl.extra.cuda.libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def exponentials(seed, group):
    """Return four numbers of Exp(1) for each group of tokens, [groups, 4], within 1.2e-10 and 17."""
    a, b, c, d = tl.randint4x(seed, group)  # Philox: its ten rounds give four numbers
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (group.shape[0], 4)).to(tl.uint32, bitcast=True)
    # Never 0, and fine enough: one of 150,000 tokens wins with a u of which there are some 29,000 smaller ones.
    u = (words.to(tl.float32) + 0.5) * 2.0**-32
    # And there 1 - u would be too coarse: the series to u^5 is 5e-8 off at most.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return tl.where(u < 0.05, series, _log2(tl.maximum(1 - u, 2.0**-24)) * (-1 / LOG2E))


@triton.jit
def _tile(scores, block, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tokens of a block of a row and their scores, [BLOCK / 4, 4]; past the vocabulary -inf."""
    token = block * BLOCK + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None]
    return token, tl.load(scores + token, mask=token < VOCABULARY, other=float("-inf"))


@triton.jit
def _race(
    seed, row, block, token, score, bound, best, winner, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the best of the race and its token, so far and among a block's tokens with scores above a bound."""
    group = row * tl.cdiv(VOCABULARY, 4) + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    race = score * LOG2E - _log2(exponentials(seed, group))  # log2(p / e), but for a constant of the row
    race = tl.where(score > bound, race, float("-inf"))
    value = tl.max(race)
    first = tl.min(tl.where(race == value, token, VOCABULARY))
    return tl.maximum(best, value), tl.where(value > best, first, winner)


@triton.jit
def _parts(pointer, split, SPLITS: tl.constexpr, other):
    return tl.load(pointer + split, mask=split < SPLITS, other=other)


@triton.jit
def _leader(scores, peaks, tokens, row, SPLITS: tl.constexpr, SPLITS_2: tl.constexpr):
    """Return a row's winner of the race over all tokens, its score and the row's largest score."""
    split = tl.arange(0, SPLITS_2)
    largest = tl.max(_parts(peaks + row * (2 * SPLITS), split, SPLITS, float("-inf")), 0)
    best = _parts(peaks + row * (2 * SPLITS) + SPLITS, split, SPLITS, float("-inf"))
    winner = tl.load(tokens + row * SPLITS + tl.argmax(best, 0))
    return winner, tl.load(scores + winner), largest


@triton.jit
def _race_kernel(
    scores, seed, peaks, tokens, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Race among a part of a row. peaks: fp32 [rows, 2, SPLITS], each part's largest score and best of the race."""
    split, row = tl.program_id(0), tl.program_id(1)
    key, lowest = tl.load(seed), float("-inf")
    largest, best, winner = lowest, lowest, 0
    for step in range(STEPS):
        block = split * STEPS + step
        token, score = _tile(scores + row * VOCABULARY, block, VOCABULARY, BLOCK)
        largest = tl.maximum(largest, tl.max(score))
        best, winner = _race(key, row, block, token, score, lowest, best, winner, VOCABULARY, BLOCK)
    tl.store(peaks + row * (2 * SPLITS) + split, largest)
    tl.store(peaks + row * (2 * SPLITS) + SPLITS + split, best)
    tl.store(tokens + row * SPLITS + split, winner)


@triton.jit
def _mass_kernel(
    scores, peaks, tokens, masses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_2: tl.constexpr,
):  # fmt: skip
    """Sum up exp(score - largest) of a part of a row. masses: fp32 [rows, 2, SPLITS], of all its tokens and of those
    likelier than the winner.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    scores += row * VOCABULARY
    winner, bound, largest = _leader(scores, peaks, tokens, row, SPLITS, SPLITS_2)
    total, above = tl.zeros((BLOCK // 4, 4), tl.float32), tl.zeros((BLOCK // 4, 4), tl.float32)
    for step in range(STEPS):
        token, score = _tile(scores, split * STEPS + step, VOCABULARY, BLOCK)
        mass = tl.exp2((score - largest) * LOG2E)
        total += mass
        above += tl.where(score > bound, mass, 0.0)
    tl.store(masses + row * (2 * SPLITS) + split, tl.sum(total))
    tl.store(masses + row * (2 * SPLITS) + SPLITS + split, tl.sum(above))


@triton.jit
def _settle_kernel(
    scores, seed, peaks, tokens, masses, chosen, top_p, min_p, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_2: tl.constexpr,
):  # fmt: skip
    """Write a row's token, int64: the winner, or the first one in the race that top_p and min_p leave."""
    row, split = tl.program_id(0), tl.arange(0, SPLITS_2)
    scores += row * VOCABULARY
    winner, bound, largest = _leader(scores, peaks, tokens, row, SPLITS, SPLITS_2)
    masses += row * (2 * SPLITS)
    limit = top_p * tl.sum(_parts(masses, split, SPLITS, 0.0), 0)
    above = tl.sum(_parts(masses + SPLITS, split, SPLITS, 0.0), 0)
    # The bound rises each time, and the likeliest token always passes; of NaN no comparison holds, and all passes.
    while (bound < largest) & ((above >= limit) | (tl.exp2((bound - largest) * LOG2E) < min_p)):
        key, best = tl.load(seed), float("-inf")
        for block in range(tl.cdiv(VOCABULARY, BLOCK)):
            token, score = _tile(scores, block, VOCABULARY, BLOCK)
            if tl.max(score) > bound:  # most blocks have no token that likely, and cost their loads only
                best, winner = _race(key, row, block, token, score, bound, best, winner, VOCABULARY, BLOCK)
        bound = tl.load(scores + winner)
        total = tl.zeros((BLOCK // 4, 4), tl.float32)
        for block in range(tl.cdiv(VOCABULARY, BLOCK)):
            token, score = _tile(scores, block, VOCABULARY, BLOCK)
            total += tl.where(score > bound, tl.exp2((score - largest) * LOG2E), 0.0)
        above = tl.sum(total)
    tl.store(chosen + row, winner.to(tl.int64))


def layout(rows: int, vocabulary: int) -> tuple[int, int]:
    """Return how many blocks of a row a program takes, and how many programs that makes for a row."""
    blocks = triton.cdiv(vocabulary, BLOCK)
    steps = triton.cdiv(blocks, max(1, PROGRAMS // rows))
    return steps, triton.cdiv(blocks, steps)


def sample(scores: torch.Tensor, seed: torch.Tensor, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """Return a token of each row, [rows], drawn from what top_p and then min_p leave of the softmax of the scores.

    scores: fp32 [rows, vocabulary]; those of -inf are never drawn. seed: int64 [1] on their device. Tokens as likely as
    the last one that top_p keeps are all kept, where transformers' sort decides between them.
    """
    scores = scores.contiguous()
    rows, vocabulary = scores.shape
    steps, splits = layout(rows, vocabulary)
    peaks, masses = (scores.new_empty(rows, 2, splits) for _ in range(2))
    tokens = torch.empty(rows, splits, dtype=torch.int32, device=scores.device)
    chosen = torch.empty(rows, dtype=torch.long, device=scores.device)
    top_p = top_p if top_p is not None and top_p < 1 else 2.0  # 2: all pass, whatever the sums are rounded to
    part = {"VOCABULARY": vocabulary, "BLOCK": BLOCK, "STEPS": steps, "SPLITS": splits, "num_warps": 8}
    row = {"VOCABULARY": vocabulary, "BLOCK": ROW_BLOCK, "SPLITS": splits, "num_warps": 16}
    splits_2 = triton.next_power_of_2(splits)
    _race_kernel[splits, rows](scores, seed, peaks, tokens, **part)
    _mass_kernel[splits, rows](scores, peaks, tokens, masses, SPLITS_2=splits_2, **part)
    _settle_kernel[(rows,)](scores, seed, peaks, tokens, masses, chosen, top_p, min_p or 0.0, SPLITS_2=splits_2, **row)
    return chosen
