"""The RMS norm after the MLP (Gemma, OLMo 2), whose backward pass reads its input in 8 bits."""

from typing import Any

import torch

STEPS = 127  # of a code in each direction


def to_codes(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers [..., columns] in 8 bits, int8 of the same shape, and the largest size of each row, [..., 1].

    A code is proportional to the root of its number, so that a few large numbers of a row take fewer steps from the others:
    the root of the mean square error is 1 % of that of the numbers if the largest is 5 times as large, 3.5 % if it is 50 times.
    """
    most = numbers.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(numbers.dtype).tiny)
    return (numbers.sign() * (numbers.abs() / most).sqrt() * STEPS).round().to(torch.int8), most


def from_codes(codes: torch.Tensor) -> torch.Tensor:
    """Return what `to_codes` stands for in units of (the row's largest size) / STEPS^2, fp32."""
    wide = codes.float()
    return wide * wide.abs()


class NormAfter(torch.autograd.Function):
    """y = factor * x / rms(x), rounded once, of x [..., columns] in 16 bit; no gradient flows to the factor, [columns].

    Its input is what a product wrote, as large as a layer's input, and a checkpointed layer would repeat that product for it.
    But the backward pass only needs it to take the part along x out of the gradient g = factor * dy: with n = x / rms(x),
    dx = (g - n mean(g n)) / rms(x). There an error of n counts in proportion to the cosine of g and n, which was 0.04 where it
    was measured (docs/measurements.md), so that 8 bits of n are enough: tests/fast_path/test_norm_after.py.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        normed = wide * inverse
        ctx.save_for_backward(*to_codes(normed), inverse, factor)
        return (normed * factor.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, most, inverse, factor = ctx.saved_tensors
        g, n, unit = grads[0].float() * factor.float(), from_codes(codes), most / STEPS**2
        dx = inverse * (g - n * ((g * n).mean(-1, keepdim=True) * unit * unit))
        return dx.to(grads[0].dtype), None, None
