"""Products in FP8: the reference against e4m3's own grid, kernels against the reference, layers against fp32."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from fast_path import fp8, fp8_kernels, fused_linear
from fast_path.fused_linear import Masks, Norm
from fast_path.packed_weights import Packed, dequantize, stack_adapters
from tests.fast_path.test_layers import HALF, MASKS, SINGLE, WHOLE, apart, compile_for, packed_weights
from tests.interpreter import interpret


def grid() -> np.ndarray:
    """Return the finite numbers of e4m3, from its definition: 4 bits of exponent, 3 of mantissa, bias 7."""
    exponent, mantissa = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    positive = np.sort(numbers.ravel())[:-1]  # all bits set is NaN
    return np.concatenate([-positive[:0:-1], positive])


def nearest(x: np.ndarray) -> np.ndarray:
    """Return the nearest numbers of e4m3; where two are as near, the one whose last bit is 0."""
    numbers = grid()
    place = np.searchsorted(numbers, x).clip(1, len(numbers) - 1)
    low, high = numbers[place - 1], numbers[place]
    even = (np.abs(place - len(numbers) // 2) % 2) == 0  # zero stands in the middle
    below = (x - low < high - x) | ((x - low == high - x) & ~even)
    return np.where(below, low, high)


def scaled(weight: Packed) -> Packed:
    """Return weights whose products are in FP8."""
    return weight._replace(row_scales=fp8.row_scales(weight))


def some_numbers(device: str = "cpu") -> torch.Tensor:
    """Return rows of several magnitudes, with e4m3's own numbers, what lies between two of them, and zeros."""
    torch.manual_seed(0)
    numbers = torch.tensor(grid(), dtype=torch.float32)
    between = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.stack(
        [numbers[:252], between, between * 1e-9, torch.randn(252), torch.randn(252) * 1e4, torch.zeros(252)]
    )
    rows[:2, 0] = 448.0  # so that the scale is 1
    return rows.to(device)


def test_rows_become_the_nearest_numbers_of_e4m3():
    x = some_numbers()
    found, scales = fp8.quantise_rows(x)
    assert scales[:2].tolist() == [1.0, 1.0] and found.dtype is torch.float8_e4m3fn
    want = nearest((x * (1 / scales)[:, None]).double().numpy())
    assert np.array_equal(found.float().numpy(), want.astype(np.float32))
    assert found[-1].float().abs().max() == 0 and found.float()[:-1].abs().amax(1).tolist() == [448.0] * 5


@pytest.mark.parametrize("quant_type, double", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_unpacked_weights_have_one_set_of_bytes_and_a_scale_per_output_row(quant_type, double):
    weight = scaled(packed_weights((64, 32), 192, quant_type, double, "cpu", torch.float32))
    exact = dequantize(weight, torch.float32)
    torch.testing.assert_close(weight.row_scales * 448, exact.abs().amax(1), rtol=1e-6, atol=0)
    found = fp8.unpack(weight, False, False)
    assert torch.equal(fp8.unpack(weight, True, False).view(torch.uint8), found.t().contiguous().view(torch.uint8))
    want = nearest((exact / weight.row_scales[:, None]).double().numpy())
    same = found.float().numpy() == want  # the kernel divides the constant of a block, which may round once more
    assert same.mean() > 0.999 and np.abs(found.float().numpy() - want).max() <= 32
    assert apart(found.float() * weight.row_scales[:, None], exact) < 0.03


# ------------------------------------------------------------------------------------------------ kernels


def check_fp8_kernels(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare each kernel with the torch calls, with sizes that no tile divides; numbers in e4m3 must be the same."""
    for quant_type, double in (("nf4", True), ("nf4", False), ("fp4", True)):
        weight = scaled(packed_weights((64, 48), 192, quant_type, double, device, dtype))
        for transposed in (False, True):
            found, want = (fp8.unpack(weight, transposed, kernels) for kernels in (True, False))
            assert torch.equal(found.float(), want.float()), (quant_type, double, transposed)
    x = some_numbers(device)[:, :240].to(dtype)
    none = Masks(x, x, x, len(x), 0.0)
    for folded in (None, torch.rand(240, device=device) + 0.1):
        found, want = (fused_linear.narrow(x, x[:0], none, 0.0, False, k, folded=folded) for k in (True, False))
        assert torch.equal(found[1], want[1]) and torch.equal(found[0].float(), want[0].float()), folded is None
    check_narrow(device, dtype, tolerance)
    check_product(device, dtype, tolerance)


def check_narrow(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the pass that quantises: with a norm or SwiGLU before it, dropout, and the adapters' product."""
    torch.manual_seed(1)
    columns, length = 160, 20
    step, salt = (torch.tensor(n, dtype=torch.int32, device=device) for n in (3, -12345))
    sequences = torch.tensor([5, 9], dtype=torch.int32, device=device)
    for swiglu, members, p in ((False, 1, 0.1), (False, 3, 0.0), (False, 9, 0.1), (True, 1, 0.1)):
        masks = Masks(step, sequences, salt, length, p)
        x = torch.randn(2 * length, columns * (2 if swiglu else 1), device=device).to(dtype)
        A = stack_adapters([torch.randn(8, columns, device=device) * 0.1 for _ in range(members)], dtype)
        norm = Norm(torch.rand(columns, device=device).to(dtype), fused_linear.inverse_rms(x, 1e-6, False))
        once = Norm(norm.weight.float() + 1, norm.inverse)  # rounded after its factor alone, as in Gemma
        kinds = [(None, "silu"), (None, "gelu_pytorch_tanh")] if swiglu else [(n, "silu") for n in (None, norm, once)]
        for (norm, activation), share in itertools.product(kinds, (64, 1024)):
            with mock.patch.object(fused_linear, "widen_share", lambda *_, share=share: share):
                found = fused_linear.narrow(x, A, masks, 0.5, swiglu, True, norm, activation)
            want = fused_linear.narrow(x, A, masks, 0.5, swiglu, False, norm, activation)
            case = swiglu, members, p, activation, share
            assert apart(found[1], want[1]) < tolerance and apart(found[2], want[2]) < tolerance, case
            there = (side[0].float() * side[1][:, None] for side in (found, want))
            assert apart(*there) < 0.01, case  # a rounding in 16 bit before may choose the neighbour in e4m3
    folded, B = torch.rand(columns, device=device), torch.randn(columns, 16, device=device).to(dtype)
    x = torch.randn(40, columns, device=device).to(dtype)
    found, want = (fused_linear.narrow(x, B.t(), masks, 0.5, False, k, folded=folded) for k in (True, False))
    assert torch.equal(found[0].float(), want[0].float()) and apart(found[2], want[2]) < tolerance


def check_product(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the product with the torch calls, with and without scales of b, an adapter and a bias."""
    torch.manual_seed(2)
    a, a_scales = fp8.quantise_rows(torch.randn(70, 208, device=device))
    b, b_scales = fp8.quantise_rows(torch.randn(80, 208, device=device))
    u, B, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 16), (80, 16), (80,)))
    tile = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    for scales, adapted, added, exact in itertools.product(
        (b_scales, None), (True, False), (bias, None), (True, False)
    ):
        own = (u, B) if adapted else (None, None)
        found = fp8._product_kernel(a, a_scales, b, scales, dtype, *own, added, exact, tile)
        want = fp8.product(a, a_scales, b, scales, torch.float32, False, *own, added)
        assert apart(found, want) < tolerance, (scales is None, adapted, added is None, exact)


@pytest.mark.triton
def test_kernels_in_tritons_interpreter():
    """In float16, because the interpreter rounds bfloat16 wrongly."""
    interpret("tests.fast_path.test_fp8", "check_fp8_kernels('cpu', torch.float16, 2e-3)")


@pytest.mark.triton
@pytest.mark.parametrize("capability", (89, 90))
def test_kernels_compile_within_the_shared_memory_of_each_card(capability):
    eighth = "*fp8e4nv"
    for transposed in (False, True):
        weights = {"packed": WHOLE, "absmax": "*u8", "scales": SINGLE, "out": eighth}
        weights |= dict.fromkeys(("absmax2", "offset", "code2", "lut"), SINGLE)
        constants = {"NESTED": True, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "ROW_BLOCKS": 172, "TRANSPOSED": transposed}
        constants |= {"ROWS": fp8.UNPACK_ROWS[transposed], "SHUFFLE": True, "ROUND": False}
        unpack = compile_for(
            capability, fp8_kernels.dequantize_e4m3_kernel, weights, constants, fp8.UNPACK_WARPS[transposed]
        )
        assert "cvt.rn.satfinite.e4m3x2.f32" in unpack  # two numbers per instruction, saturated
    pointers = {"x": HALF, "narrow": eighth, "dropped": HALF, "A": HALF, "sums": SINGLE, "norm": HALF, **MASKS}
    pointers |= dict.fromkeys(("inverse_rms", "scales", "folded"), SINGLE)
    for swiglu, norm, folded, columns in ((True, False, False, 16), (False, True, False, 64), (False, False, True, 32)):
        how = {"SWIGLU": swiglu, "NORM": norm, "FOLDED": folded, "ACTIVATION": "silu"}
        own = {name: kind for name, kind in pointers.items() if name in fp8_kernels.row_scale_kernel.arg_names}
        compile_for(capability, fp8_kernels.row_scale_kernel, own | {"smallest": "fp32"}, how | {"BLOCK": 16384}, 8)
        how |= {"DROPOUT": not folded, "KEEP": False, "BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": columns, "ROUND": False}
        compile_for(capability, fp8_kernels.narrow_kernel, pointers, how, 4)
    operands = {"a": eighth, "b": eighth, "a_scales": SINGLE, "b_scales": SINGLE}
    operands |= dict.fromkeys(("u", "B", "bias", "out"), HALF)
    for exact in (True, False):
        tile = fp8.product_tile((capability // 10, capability % 10)).copy()
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        how = {"SCALED": True, "BIAS": True, "EXACT": exact, "BLOCK_R": 64, **tile}
        product = compile_for(capability, fp8_kernels.product_kernel, operands, how, warps, num_stages=stages)
        assert (
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" if capability == 90 else ".e4m3.e4m3"
        ) in product
