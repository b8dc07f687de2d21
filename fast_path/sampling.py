"""Sampling with top_p and min_p without sorting the vocabulary: three launches of Triton kernels.

Draw a number e from Exp(1) for each token, and let the token with the largest p / e win, where p is its probability.
In this race each token wins with probability p. If only the tokens that top_p and min_p keep (the nucleus) take part,
each of them wins with its probability within the nucleus.

So the first race runs over all tokens. To check whether the winner is in the nucleus, top_p needs a single sum: the
probabilities of the more likely tokens must add up to less than top_p. If they do not, the winner and all tokens that
are no more likely are outside the nucleus, and the race is repeated among the more likely tokens. With top_p 0.9 that
happens for at most one token in ten.
"""

import torch

from fast_path.nf4 import INTERPRETED, tl, triton

BLOCK = 4096  # scores that a program reads at a time
ROW_BLOCK = 8192  # the same in `_settle_kernel`, where one program reads a whole row
PROGRAMS = 256  # at most this many per launch: about two per multiprocessor of an H100, which has 132

LOG2E = tl.constexpr(1.4426950408889634)
INSTRUCTION = tl.constexpr(not INTERPRETED)


@triton.jit
def _log2(x):
    """Return log2(x) from the GPU's single instruction for it. Its error around x = 1 is at most 2.4e-7.

    A more exact logarithm takes 20 more instructions.
    """
    if INSTRUCTION:
        return tl.extra.cuda.libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def exponentials(seed, group):
    """Return four numbers drawn from Exp(1) for each group of tokens, [groups, 4], between 1.2e-10 and 17."""
    a, b, c, d = tl.randint4x(seed, group)  # Philox: ten rounds yield four numbers
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (group.shape[0], 4)).to(tl.uint32, bitcast=True)
    # u is never 0, and its steps are fine enough: the winner among 150,000 tokens has a u of about 1 / 150,000, and
    # some 29,000 smaller values of u are possible.
    u = (words.to(tl.float32) + 0.5) * 2.0**-32
    # For so small a u, 1 - u would be too coarse in fp32. The series up to u^5 has an error of at most 5e-8.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return tl.where(u < 0.05, series, _log2(tl.maximum(1 - u, 2.0**-24)) * (-1 / LOG2E))


@triton.jit
def _tile(scores, block, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tokens of one block of a row and their scores, [BLOCK / 4, 4] each; past the vocabulary -inf."""
    token = block * BLOCK + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None]
    return token, tl.load(scores + token, mask=token < VOCABULARY, other=float("-inf"))


@triton.jit
def _race(
    seed, row, block, token, score, bound, best, winner, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the race's best value and its token after one more block has joined.

    best, winner: the same two before this block. Only tokens with scores above `bound` take part.
    """
    group = row * tl.cdiv(VOCABULARY, 4) + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    race = score * LOG2E - _log2(exponentials(seed, group))  # log2(p / e) up to a constant per row
    race = tl.where(score > bound, race, float("-inf"))
    value = tl.max(race)
    first = tl.min(tl.where(race == value, token, VOCABULARY))
    return tl.maximum(best, value), tl.where(value > best, first, winner)


@triton.jit
def _parts(pointer, split, SPLITS: tl.constexpr, other):
    return tl.load(pointer + split, mask=split < SPLITS, other=other)


@triton.jit
def _leader(scores, peaks, tokens, row, SPLITS: tl.constexpr, SPLITS_2: tl.constexpr):
    """Return the winner of a row's race over all tokens, the winner's score and the row's largest score."""
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
    """Run the race over all tokens: find the winner and the largest score of each part of a row.

    A row is divided into SPLITS parts. A program takes one part (axis 0) of one row (axis 1), in STEPS tiles of BLOCK
    scores. peaks: fp32 [rows, 2, SPLITS], each part's largest score and its best value of the race; tokens: int32
    [rows, SPLITS], the parts' winners.
    """
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
    """Sum exp(score - largest) over each part of a row: for all tokens, and for those more likely than the winner.

    A program takes one of SPLITS parts (axis 0) of one row (axis 1), in STEPS tiles of BLOCK scores. masses: fp32
    [rows, 2, SPLITS], the two sums of each part.
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
    """Write each row's token to `chosen`, int64 [rows]: the race's winner, or the best in the race that passes.

    A program takes one row. First it only adds up the SPLITS results of the other two kernels. If the winner does not
    pass top_p and min_p, it reads the whole row in tiles of BLOCK scores, twice per new race.
    """
    row, split = tl.program_id(0), tl.arange(0, SPLITS_2)
    scores += row * VOCABULARY
    winner, bound, largest = _leader(scores, peaks, tokens, row, SPLITS, SPLITS_2)
    masses += row * (2 * SPLITS)
    limit = top_p * tl.sum(_parts(masses, split, SPLITS, 0.0), 0)
    above = tl.sum(_parts(masses + SPLITS, split, SPLITS, 0.0), 0)
    # The loop ends: the bound rises in every round, and the most likely token always passes. With NaN no comparison is
    # true, so any token passes.
    while (bound < largest) & ((above >= limit) | (tl.exp2((bound - largest) * LOG2E) < min_p)):
        key, best = tl.load(seed), float("-inf")
        for block in range(tl.cdiv(VOCABULARY, BLOCK)):
            token, score = _tile(scores, block, VOCABULARY, BLOCK)
            if tl.max(score) > bound:  # most blocks have no token this likely, and cost only their loads
                best, winner = _race(key, row, block, token, score, bound, best, winner, VOCABULARY, BLOCK)
        bound = tl.load(scores + winner)
        total = tl.zeros((BLOCK // 4, 4), tl.float32)
        for block in range(tl.cdiv(VOCABULARY, BLOCK)):
            token, score = _tile(scores, block, VOCABULARY, BLOCK)
            total += tl.where(score > bound, tl.exp2((score - largest) * LOG2E), 0.0)
        above = tl.sum(total)
    tl.store(chosen + row, winner.to(tl.int64))


def layout(rows: int, vocabulary: int) -> tuple[int, int]:
    """Return how many blocks of a row one program takes, and how many programs there are per row."""
    blocks = triton.cdiv(vocabulary, BLOCK)
    steps = triton.cdiv(blocks, max(1, PROGRAMS // rows))
    return steps, triton.cdiv(blocks, steps)


def sample(scores: torch.Tensor, seed: torch.Tensor, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """Return one token per row, [rows], drawn from the tokens of the softmax that top_p and then min_p keep.

    scores: fp32 [rows, vocabulary]; a token with -inf is never drawn. seed: int64 [1] on the same device. If several
    tokens are exactly as likely as the last one that top_p keeps, all are kept; in transformers the sort decides which.
    """
    scores = scores.contiguous()
    rows, vocabulary = scores.shape
    steps, splits = layout(rows, vocabulary)
    peaks, masses = (scores.new_empty(rows, 2, splits) for _ in range(2))
    tokens = torch.empty(rows, splits, dtype=torch.int32, device=scores.device)
    chosen = torch.empty(rows, dtype=torch.long, device=scores.device)
    top_p = top_p if top_p is not None and top_p < 1 else 2.0  # with 2 every token passes, however sums are rounded
    part = {"VOCABULARY": vocabulary, "BLOCK": BLOCK, "STEPS": steps, "SPLITS": splits, "num_warps": 8}
    row = {"VOCABULARY": vocabulary, "BLOCK": ROW_BLOCK, "SPLITS": splits, "num_warps": 16}
    splits_2 = triton.next_power_of_2(splits)
    _race_kernel[splits, rows](scores, seed, peaks, tokens, **part)
    _mass_kernel[splits, rows](scores, peaks, tokens, masses, SPLITS_2=splits_2, **part)
    _settle_kernel[(rows,)](scores, seed, peaks, tokens, masses, chosen, top_p, min_p or 0.0, SPLITS_2=splits_2, **row)
    return chosen
