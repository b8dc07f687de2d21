"""train_qlora.py on a CPU with the base's weights unpacked once instead of in every product, for experiments.py --cached.

python tests/benchmarks/cached_weights.py FLAGS OF train_qlora.py

On a CPU most of a QLoRA step unpacks weights, so 300 steps would take hours. The numbers are those of the operators' torch
calls, with one difference: a product in FP8 multiplies the same e4m3 numbers (bfloat16 holds them exactly) with the CPU's
bfloat16 instructions, which round its sums to bfloat16 before the scales multiply them; on a GPU that happens after it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fast_path import fp8, packed_weights

unpacked: dict[tuple, torch.Tensor] = {}
dequantize, unpack = packed_weights.dequantize, fp8.unpack


def cached(kind: object, weight: packed_weights.Packed, make) -> torch.Tensor:
    """Return what was made of the weights the first time. The codes stay where they are while a model is trained."""
    key = kind, weight.codes.data_ptr(), weight.codes.numel()
    if key not in unpacked:
        unpacked[key] = make()
    return unpacked[key]


def dequantize_once(weight, dtype):
    return cached(dtype, weight, lambda: dequantize(weight, dtype))


def unpack_once(weight, transposed: bool, kernels: bool):
    """Return W in e4m3's numbers and bfloat16, [out features, columns] or transposed; both are views of one tensor."""
    W = cached("e4m3", weight, lambda: unpack(weight, False, kernels).bfloat16())
    return W.t() if transposed else W


def product(a, a_scales, b, b_scales, dtype, kernels, u=None, B=None, bias=None):
    """Do `fp8.product` with bfloat16 operands that hold e4m3's numbers."""
    y = (a.bfloat16() @ b.t()).float() * a_scales[:, None]
    y = y if b_scales is None else y * b_scales
    y = y if u is None else y + (u @ B.t()).float()
    return (y if bias is None else y + bias.float()).to(dtype)


packed_weights.dequantize, fp8.unpack, fp8.product = dequantize_once, unpack_once, product

if __name__ == "__main__":
    from train_qlora import main

    sys.exit(main())
