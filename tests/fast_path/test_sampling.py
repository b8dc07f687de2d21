"""The sampling kernels draw from the tokens that transformers' processors keep, in the interpreter and on a GPU."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopPLogitsWarper

from fast_path import sampling
from fast_path.decoder import choose_tokens, processors
from fast_path.nf4 import tl, triton
from fast_path.sampling import layout, sample
from tests.fast_path.test_decode_step import compiled
from tests.fast_path.test_layers import CAPABILITIES, SHARED_LIMIT
from tests.interpreter import interpret

CASES = [(0.05, None), (0.3, None), (0.9, None), (1.0, None), (None, 0.1), (0.7, 0.2), (0.0, None)]  # top_p, min_p
GROUPS = (
    4096  # at most, of a program of the kernel below; in the interpreter, which pays by the program, 16 times as many
)


@triton.jit
def _noise_kernel(seed, out, GROUPS: tl.constexpr):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    numbers = sampling.exponentials(tl.load(seed), group)
    tl.store(out + group[:, None] * 4 + tl.arange(0, 4)[None], numbers)


def noise(seed: torch.Tensor, rows: int, vocabulary: int) -> torch.Tensor:
    """Return the numbers of Exp(1) that the kernels draw for each token, fp64 [rows, vocabulary]."""
    groups = -(-vocabulary // 4)
    each = min(GROUPS if seed.is_cuda else 16 * GROUPS, triton.next_power_of_2(rows * groups))
    programs = -(-rows * groups // each)
    out = torch.empty(programs * each * 4, device=seed.device)
    _noise_kernel[(programs,)](seed, out, each)
    return out[: rows * groups * 4].view(rows, -1)[:, :vocabulary].double()


def winners(scores: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    return (scores.double().softmax(-1) / e).argmax(-1)


def kept(scores: torch.Tensor, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """Return the scores, fp64, that transformers' processors leave."""
    found = LogitsProcessorList([TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else [])
    found += [MinPLogitsWarper(min_p)] if min_p is not None else []
    return found(None, scores.double())


def random_scores(rows: int, vocabulary: int, seed: int, device: str) -> torch.Tensor:
    """Return scores without equal ones within a row; a tenth of them is -inf."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocabulary, generator=generator) * 1.5
    scores[torch.rand(rows, vocabulary, generator=generator) < 0.1] = float("-inf")
    return scores.to(device)


def check_equal(rows: int, vocabulary: int, seeds: int, device: str) -> None:
    """Compare tokens with those of transformers' processors and the same noise; some races must have been repeated."""
    again = 0
    for top_p, min_p in CASES:
        for number in range(seeds):
            scores = random_scores(rows, vocabulary, number, device)
            seed = torch.tensor([number * 2**40 + 17], device=device)
            e = noise(seed, rows, vocabulary)
            want = winners(kept(scores, top_p, min_p), e)
            found = sample(scores, seed, top_p, min_p)
            assert found.dtype is torch.long and torch.equal(found, want), (top_p, min_p, number, found, want)
            first = winners(scores, e)
            # What is left after the first one: the likelier ones.
            second = winners(scores.masked_fill(scores <= scores.gather(1, first[:, None]), float("-inf")), e)
            again += ((want != first) & (want != second)).sum().item()
    assert again > 0  # more than two tries


def check_small() -> None:
    """Compare in the interpreter. A program takes two blocks or one, and the vocabulary ends within a block."""
    sampling.BLOCK, sampling.ROW_BLOCK, sampling.PROGRAMS = 128, 256, 6
    assert layout(3, 500) == (2, 2) and layout(2, 331) == (1, 3)
    check_equal(3, 500, 2, "cpu")
    check_equal(2, 331, 1, "cpu")


def check_choices() -> None:
    """Compare choose_tokens, with the processors before top_p, and check that a seed determines its tokens."""
    sampling.BLOCK, sampling.ROW_BLOCK = 256, 1024
    how = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=0, min_p=0.02, repetition_penalty=1.3)
    logits, history = random_scores(3, 1000, 5, "cpu"), torch.arange(400).view(1, 400).expand(3, -1)
    for number in range(2):
        torch.manual_seed(number)
        found = choose_tokens(how, history, logits)
        torch.manual_seed(number)
        e = noise(torch.randint(2**62, (1,)), 3, 1000)
        assert torch.equal(found, winners(processors(how)(history, logits.double()), e))
        assert not torch.equal(found, choose_tokens(how, history, logits))  # the next draw


def check_edges() -> None:
    """Check that all ties are kept, and that the loop ends for rows of infinities and NaN."""
    sampling.BLOCK, sampling.ROW_BLOCK = 64, 64
    scores = torch.full((15, 50), -1.0)
    scores[:, [3, 20, 41]] = 5.0
    assert set(sample(scores, torch.tensor([1]), 0.1, None).tolist()) == {3, 20, 41}
    scores = torch.full((4, 50), float("-inf"))
    scores[1] = float("nan")
    scores[2, 7], scores[2, 8] = 2.0, float("nan")
    scores[3, 9], scores[3, 10] = float("inf"), 1.0
    found = sample(scores, torch.tensor([1]), 0.5, 0.1).tolist()
    assert all(0 <= token < 50 for token in found) and found[2:] == [7, 9]


def check_frequencies(draws: int, compared: int, device: str) -> None:
    """Check that Pearson's chi-square of many draws with a fixed seed is below its 99.9 % quantile.

    The interpreter is slow, so only the first rows are compared. The frequencies are those of the reference, which has
    the same noise.
    """
    scores = torch.linspace(2, -2, 30)[torch.randperm(30, generator=torch.Generator().manual_seed(0))].to(device)
    left, seed = kept(scores[None], 0.6, None), torch.tensor([7], device=device)
    tokens = winners(left, noise(seed, draws, 30))
    found = sample(scores.expand(compared, -1), seed, 0.6, None)
    assert torch.equal(found, tokens[:compared])
    expected, counts = left.softmax(-1)[0] * draws, torch.bincount(tokens, minlength=30)
    inside = expected > 0
    assert counts[~inside].sum() == 0 and 5 < inside.sum() < 15
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = int(inside.sum()) - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3, counts


def check_noise(device: str) -> None:
    """Compare the distribution of 8 million numbers with Exp(1), and check that small ones have many values."""
    e = noise(torch.tensor([3], device=device), 4, 2**21).flatten().cpu()
    count = e.numel()
    assert e.min() > 0 and e.max() < 17
    for x in (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0):
        p = -torch.expm1(torch.tensor(-x, dtype=torch.double))
        assert ((e < x).sum() - count * p).abs() < 3.5 * (count * p * (1 - p)).sqrt(), x
    small = e[e < 1e-3]
    assert len(small.unique()) > 0.998 * len(small)  # of the 24 bits of 1 - u it would be 0.88
    rows = e.view(4, -1)
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 5e-3


def check_in_the_interpreter() -> None:
    check_noise("cpu")
    check_choices()
    check_small()
    check_edges()
    check_frequencies(20_000, 60, "cpu")


@pytest.mark.triton
@pytest.mark.minutes
def test_in_tritons_interpreter():
    interpret("tests.fast_path.test_sampling", "check_in_the_interpreter()")


@pytest.mark.triton
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_each_card(capability, rows):
    """With Qwen2.5's vocabulary; scores are loaded 16 bytes at a time."""
    types = {"scores": "*fp32", "peaks": "*fp32", "masses": "*fp32", "tokens": "*i32", "seed": "*i64", "chosen": "*i64"}
    types |= {"top_p": "fp32", "min_p": "fp32"}
    steps, splits = layout(rows, 151936)
    assert (steps, splits) == {1: (1, 38), 32: (5, 8)}[rows]
    every = {"VOCABULARY": 151936, "BLOCK": sampling.BLOCK, "SPLITS": splits}
    both = every | {"STEPS": steps}
    sums = {"SPLITS_2": triton.next_power_of_2(splits)}
    done = [
        compiled(capability, sampling._race_kernel, both, 8, **types),
        compiled(capability, sampling._mass_kernel, both | sums, 8, **types),
        compiled(
            capability, sampling._settle_kernel, every | sums | {"BLOCK": sampling.ROW_BLOCK}, 16, **types
        ),
    ]  # fmt: skip
    for kernel in done:
        assert kernel.metadata.shared <= SHARED_LIMIT[capability]
        assert f"sm_{capability}" in kernel.asm["ptx"] and "ld.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels as they run there")
class TestOnTheGpu:
    @pytest.mark.parametrize("rows, vocabulary", [(1, 151936), (32, 151936), (3, 50257)])
    def test_tokens_are_those_of_transformers_processors(self, rows, vocabulary):
        check_equal(rows, vocabulary, 6, "cuda")

    def test_noise_is_exponential_and_frequencies_are_the_probabilities(self):
        check_noise("cuda")
        check_frequencies(20_000, 20_000, "cuda")

    def test_a_graph_draws_anew_at_each_replay_and_a_seed_fixes_what(self):
        how = GenerationConfig(do_sample=True, temperature=1.5, top_p=0.9, top_k=0, repetition_penalty=1.1)
        logits, history = random_scores(4, 151936, 0, "cuda"), torch.zeros(4, 8, dtype=torch.long, device="cuda")
        choose_tokens(how, history, logits)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = choose_tokens(how, history, logits)

        def drawn(seed: int) -> list[list[int]]:
            torch.manual_seed(seed)
            answers = []
            for _ in range(8):
                graph.replay()
                answers.append(tokens.tolist())
            return answers

        first = drawn(1)
        assert len({tuple(answer) for answer in first}) == 8
        assert drawn(1) == first != drawn(2)
