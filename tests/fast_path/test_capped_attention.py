"""Attention with a soft cap: its kernels, its plain twin, and a model that has one (Gemma 2)."""

import itertools

import pytest
import torch

from fast_path import capped_attention as module
from fast_path.capped_attention import capped_attention, launches, plain_capped_attention
from fast_path.layers import fuse
from tests.fast_path.test_layers import (
    CAPABILITIES,
    HALF,
    SINGLE,
    WHOLE,
    apart,
    compile_for,
    furthest,
    gpu,
    gradients,
    prepared,
)
from tests.interpreter import interpret


def by_hand(q, k, v, samples, scale, cap, window):
    """Return the attention of each query by a loop over its head and position, in the dtype of q."""
    batch, length, heads, _ = q.shape
    rows = []
    for b, m, h in itertools.product(range(batch), range(length), range(heads)):
        first = max(start for start in samples[b] if start <= m)
        here = slice(max(first, m - window + 1), m + 1)
        key, value = (x[b, here, h // (heads // k.shape[2])] for x in (k, v))
        score = key @ q[b, m, h] * scale
        rows.append((cap * torch.tanh(score / cap) if cap else score).softmax(-1) @ value)
    return torch.stack(rows).view(q.shape)


CASES = [  # length, width, (heads, heads of k), window, cap, where samples start in each sequence
    (37, 64, (4, 2), 37, 2.0, [[0], [0]]),
    (70, 48, (2, 2), 11, 2.0, [[0], [0]]),
    (70, 64, (3, 1), 70, 0.0, [[0, 5, 50], [0, 33]]),
    (66, 32, (4, 2), 20, 3.0, [[0, 40], [0, 1, 64]]),
]


def starts_of(samples, length):
    flat = [row * length + start for row, starts in enumerate(samples) for start in starts]
    return torch.tensor([*flat, *[len(samples) * length] * 3], dtype=torch.int32) if len(flat) > len(samples) else None


def check_case(case, attend, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare an attention and its gradients with `by_hand` in fp64."""
    length, width, (heads, kv_heads), window, cap, samples = case
    torch.manual_seed(0)
    tensors = [torch.randn(2, length, n, width).to(dtype) for n in (heads, kv_heads, kv_heads)]
    exact = [x.double().requires_grad_() for x in tensors]
    want = by_hand(*exact, samples, 0.3, cap, window)
    grad = torch.randn(want.shape).to(dtype)
    wanted = torch.autograd.grad(want, exact, grad.double())
    given = [x.to(device).requires_grad_() for x in tensors]
    starts = starts_of(samples, length)
    found = attend(*given, starts if starts is None else starts.to(device), 0.3, cap, window)
    found = found[0] if isinstance(found, tuple) else found
    grads = torch.autograd.grad(found, given, grad.to(device))
    for a, b in zip((found, *grads), (want, *wanted), strict=True):
        assert apart(a.cpu(), b) < tolerance, case


def check_kernels(device: str, dtype: torch.dtype, tolerance: float) -> None:
    for case in CASES:
        check_case(case, capped_attention, device, dtype, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_plain_twin_is_attention_by_hand(case):
    check_case(case, plain_capped_attention, "cpu", torch.float32, 1e-5)


@pytest.mark.triton
@pytest.mark.minutes
def test_the_kernels_are_attention_by_hand_in_tritons_interpreter():
    interpret("tests.fast_path.test_capped_attention", "check_kernels('cpu', torch.float16, 2e-3)")


def test_a_model_with_capped_scores_learns_what_it_does_with_its_own_attention(random_models):
    """Gemma 2; the window of one of its layers is shorter than the text, and both must be felt."""
    results = []
    for asked in ("eager", "auto"):
        model, clock, loss = prepared(random_models("gemma2"), asked=asked)
        results.append(gradients(model, clock, loss))
        assert (model.config._attn_implementation == "eager") == (asked == "eager")
    (plain_loss, plain), (fused_loss, fused) = results
    assert fused_loss == pytest.approx(plain_loss, rel=1e-6) and furthest(fused, plain) < 1e-4
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": None}):
        model, clock, loss = prepared(random_models("gemma2"))
        for layer in model.get_base_model().model.layers:
            vars(layer.self_attn).update(change)
        assert furthest(gradients(model, clock, loss)[1], plain) > 1e-2, change


def check_model(folder: str) -> None:
    """Compare a model on the kernels with the same in fp32, and with its own eager attention in half precision."""
    _, reference = gradients(*prepared(folder))
    _, plain = gradients(*prepared(folder, dtype="float16", asked="eager"))
    model, clock, loss = prepared(folder, dtype="float16", checkpointing=True)
    fuse(model, clock, 0.05, kernels=False)
    _, fused = gradients(model, clock, loss)
    assert furthest(fused, reference) <= 1.1 * furthest(plain, reference)


@pytest.mark.triton
def test_a_model_learns_on_the_kernels_in_tritons_interpreter(random_models):
    interpret("tests.fast_path.test_capped_attention", f"check_model({str(random_models('gemma2'))!r})")


@gpu
@pytest.mark.gpu
def test_the_kernels_are_attention_by_hand_on_the_gpu():
    check_kernels("cuda", torch.bfloat16, 1e-2)
    check_case((300, 256, (8, 4), 100, 2.0, [[0, 150], [0]]), capped_attention, "cuda", torch.bfloat16, 1e-2)


@pytest.mark.triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_kernels_fit_the_shared_memory_of_each_card(capability, width):
    pointers = dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), HALF) | {"limits": WHOLE}
    pointers |= {"logs": SINGLE, "delta": SINGLE}
    first, second = launches(width)
    kernels = module.capped_forward_kernel, module.capped_dq_kernel, module.capped_dkv_kernel
    for kernel, launch in zip(kernels, (first, first, second), strict=True):
        own = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        constants = {
            "CAPPED": True,
            "WIDTH": width,
            "BLOCK_D": width,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_k,
        }
        compile_for(capability, kernel, own, constants, launch.warps, num_stages=1)
