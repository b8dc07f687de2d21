"""Products of heads whose vocabulary is no multiple of 8, against torch's in fp64."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fast_path import loss
from fast_path.decode_step import DecodeStep
from fast_path.head import MULTIPLE, head_gradient, head_product, padded

SIZES = (3, 8, 9, 15, 16, 101, 104, 20_001)


def check(device: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    for vocabulary, tokens, biased in (
        (size, tokens, biased) for size in SIZES for tokens in (1, 5) for biased in (False, True)
    ):
        rows = torch.randn(tokens, 24, device=device).to(dtype)
        weight = torch.randn(vocabulary, 24, device=device).to(dtype)
        bias = torch.randn(vocabulary, device=device).to(dtype) if biased else None
        logits = torch.full((tokens, padded(vocabulary)), 7.0, dtype=dtype, device=device)
        found = head_product(rows, weight, bias, logits[:, :vocabulary])
        exact = rows.double() @ weight.double().t() + (0 if bias is None else bias.double())
        assert found.shape == exact.shape and torch.equal(found, logits[:, :vocabulary])
        assert (logits[:, vocabulary:] == 7).all()  # what is behind a row's last token is nobody's
        assert torch.allclose(found.double(), exact, rtol=tolerance, atol=tolerance * 5)
        back = head_gradient(found, weight).double()
        exact = found.double() @ weight.double()
        assert (back - exact).norm() <= tolerance * exact.norm(), (vocabulary, tokens, biased)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_products_of_any_vocabulary_are_torchs(dtype, tolerance):
    check("cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_products_of_any_vocabulary_are_torchs_on_the_gpu(dtype, tolerance):
    check("cuda", dtype, tolerance)


def test_every_large_product_has_sizes_that_cublas_is_fast_with(monkeypatch):
    """Of the loss: forward and back, rows of logits at whole 16 bytes, and at most a few tokens apart."""
    seen = []

    def noting(function):
        def call(*arguments, **named):
            seen.append([tensor for tensor in (*arguments, *named.values()) if isinstance(tensor, torch.Tensor)])
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(loss, "cross_entropy", lambda *_: None)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, noting(getattr(torch, name)))
    for vocabulary, bias in ((101, None), (20_001, torch.randn(20_001).bfloat16())):
        rows, weight = torch.randn(16, 24).bfloat16(), torch.randn(vocabulary, 24).bfloat16()
        loss.kernel_chunk_loss(rows, weight, bias, torch.zeros(16, dtype=torch.int64), True)
    assert len(seen) == 4
    for tensor in (tensor for call in seen for tensor in call):
        sizes = [*tensor.shape, *(stride for stride in tensor.stride() if stride != 1)]
        assert all(size % MULTIPLE == 0 for size in sizes) and tensor.data_ptr() % 16 == 0, sizes


def test_a_vocabulary_of_whole_eights_has_one_product():
    weight, rows = torch.randn(16, 8), torch.randn(2, 8)
    with mock.patch("torch.nn.functional.linear", side_effect=AssertionError):
        assert torch.equal(head_product(rows, weight, None, torch.empty(2, 16)), rows @ weight.t())


def test_a_decode_step_reads_any_vocabulary():
    """And a head that is not a plain linear computes its product itself."""
    last, head = torch.randn(3, 1, 24), torch.nn.Linear(24, 101)
    for layer in (head, torch.nn.Sequential(head)):
        with torch.no_grad():
            found = DecodeStep._logits(SimpleNamespace(last=last, head=layer))
            assert torch.allclose(found, head(last)[:, 0], atol=1e-5) and found.shape == (3, 101)
