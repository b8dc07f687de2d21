"""Products of frozen 4-bit weights in FP8 (e4m3): quantise, unpack and multiply, with torch calls as the reference.

e4m3 has 4 significant bits and magnitudes from 2**-9 to 448 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022,
arXiv:2209.05433). Every row of an operand has a scale of its own, amax / 448, so a large row costs no other row its bits.
"""

import functools
import sys

import torch

from config import ConfigError
from fast_path import fp8_kernels, hopper_product
from fast_path.nf4 import HAS_TRITON, INTERPRETED, SHUFFLE, TensorDescriptor, multiprocessors, triton
from fast_path.packed_weights import Packed, absmax_of, dequantize, dot_size
from fast_path.scratch import take

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
SMALLEST = 1e-30  # the least amax: rows of zeros, such as the gradients of padding, are divided by its scale
# Hopper's tensor cores add e4m3 products in fewer bits than fp32 has. Exact: their sums are added in fp32 after every 128
# products, which is slower, and the error of a product is the same (docs/measurements.md, "Constants in the code").
EXACT = False
UNPACK_ROWS = {False: 32, True: 128}  # per program; transposed, so that a line of memory is written whole
UNPACK_WARPS = {False: 2, True: 4}
RUN = 64  # weights that a thread unpacks at once, where blocks are multiples of it
RUN_WARPS = 4
TRANSPOSED_RUNS = 4  # of a program; 2 halves it
# Tiles of `product_kernel`: rows, outputs, products that are summed at once, warps, stages, descriptors, groups.
HOPPER = (128, 128, 128, 4, 3, True, 8)
HOPPER_WIDE = (128, 128, 128, 4, 3, True, 32)  # with at least WIDE times as many outputs as products per output
HOPPER_DEEP = (128, 128, 128, 4, 3, False, 8)  # with at least WIDE times as many products per output as outputs
WIDE = 4
OTHERS = (128, 128, 64, 8, 3, False, 8)
MOST_OF_A_CHIP = 100  # multiprocessors; a whole Hopper has 114 or 132
MOST_LOST = 0.16  # the largest share of time that Hopper's own product may lose (`hopper_product.lost`)
ALIGNED = 16  # bytes: rows of both operands must be multiples of it

# ------------------------------------------------------------------------------------------------ where it runs


def obstacle(device: torch.device) -> str | None:
    """Return why products in FP8 cannot run on a device; None if they can. On a CPU the reference runs."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "AMD's GPUs are not supported"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"{name} has no FP8 (compute capability {number}; 8.9 and above have it)"
    return None if HAS_TRITON else "Triton is not installed (Windows: pip install triton-windows)"


def refuse(products: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if quantization.products asks for what a device cannot do. dtype: the compute dtype."""
    if products != "fp8":
        return
    if reason := obstacle(device):
        raise ConfigError(f"quantization.products: fp8 cannot run here, use bf16: {reason}")
    if device.type == "cuda" and dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"quantization.products: fp8 needs quantization.compute_dtype bfloat16 on a GPU, got {name}")


@functools.cache
def torch_multiplies(device: torch.device, outputs: int, inner: int) -> bool:
    """Return whether `torch._scaled_mm` multiplies b, [outputs, inner], on a device; else `product_kernel` does.

    torch's builds for Windows lack it, and on other GPUs than Hopper it takes other kernels, which nobody tried here. On a
    part of a Hopper its products with few outputs are slower than ours (docs/measurements.md, "Constants in the code").
    """
    if device.type != "cuda" or sys.platform == "win32" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return multiprocessors(device) >= MOST_OF_A_CHIP or outputs >= WIDE * inner


def hopper_form(device: torch.device, rows: int, outputs: int, inner: int, extra: int) -> hopper_product.Form | None:
    """Return the form of `hopper_product` for a product with `extra` adapter columns; None: another kernel multiplies.

    It is the fastest where tiles fill all multiprocessors, but on a part of a Hopper not where few outputs are sums of many
    products (docs/measurements.md, "Constants in the code").
    """
    aligned = 0 < extra <= hopper_product.MOST_ADAPTER_COLUMNS and extra % 8 == 0  # the copy engine takes 16 bytes
    if EXACT or rows == 0 or not aligned or not hopper_product.runs_on(device):
        return None
    count, forms = multiprocessors(device), [hopper_product.LARGE, hopper_product.IN_TURN]
    if count < MOST_OF_A_CHIP:
        forms = forms[1:] if inner < WIDE * outputs else []
    return next((form for form in forms if hopper_product.lost(rows, outputs, count, form) <= MOST_LOST), None)


def fits(weight: Packed) -> bool:
    """Return whether the operator of these weights can multiply in FP8: rows of whole blocks, and aligned ones."""
    outputs = weight.codes.numel() * 2 // weight.columns
    return weight.columns % weight.blocksizes[0] == 0 and outputs % ALIGNED == 0 and weight.columns % ALIGNED == 0


# ------------------------------------------------------------------------------------------------ operands


def row_scales(weight: Packed) -> torch.Tensor:
    """Return a scale per output row, fp32 [out features]: the largest weight of the row / 448.

    Every block holds a weight of the magnitude of its constant, so the constants are enough.
    """
    rows = absmax_of(weight).abs().view(-1, weight.columns // weight.blocksizes[0])
    return rows.amax(1).clamp_min(SMALLEST) * (1 / LARGEST)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x in e4m3, and a scale per row, fp32: x is about x8 * scales[:, None]. x: [rows, columns]."""
    x = x.float()
    scales = x.abs().amax(1).clamp_min(SMALLEST) * (1 / LARGEST)
    return (x * (1 / scales)[:, None]).to(E4M3), scales


def unpack(weight: Packed, transposed: bool, kernels: bool) -> torch.Tensor:
    """Return W / its row scales in e4m3: [out features, columns], or transposed [columns, out features].

    The numbers are the same both ways: dx = dy W needs a scale per output row on the axis that is summed over, so it is
    multiplied into dy before dy is quantised (`narrow` in fused_linear.py). The next call overwrites the tensor while a
    fused model lives (scratch.py).
    """
    columns, scales = weight.columns, weight.row_scales
    rows, nested = weight.codes.numel() * 2 // columns, len(weight.constants) > 1
    if not kernels:
        absmax = absmax_of(weight).view(rows, -1) * (1 / scales)[:, None]
        W = dequantize(weight._replace(constants=[absmax.flatten()]), torch.float32).to(E4M3)
        return W.t().contiguous() if transposed else W
    shape = (columns, rows // 2) if transposed else (rows, columns // 2)
    out = take(shape[0], shape[1], torch.bfloat16, weight.codes.device).view(
        E4M3
    )  # in the memory that evaluations unpack into
    absmax, *second = weight.constants
    second = second or [absmax] * 3
    if SHUFFLE and weight.blocksizes[0] % RUN == 0 and weight.codes.data_ptr() % 16 == 0:
        runs, per_block = columns // RUN, weight.blocksizes[0] // RUN
        arguments = weight.codes.view(torch.int32), absmax, *second, weight.lut, scales, out
        how = {"NESTED": nested, "RUNS": per_block, "BLOCKSIZE2": weight.blocksizes[1], "ROW_RUNS": runs}
        if transposed:
            width = TRANSPOSED_RUNS
            text = fp8_kernels.unpack_transposed_in_ptx(width, rows)
            fp8_kernels.unpack_e4m3_transposed_kernel[(triton.cdiv(rows, 128), triton.cdiv(runs, width))](
                *arguments, rows, **how, WIDTH=width, PTX=text, num_warps=2 * width
            )
        else:
            fp8_kernels.unpack_e4m3_kernel[(triton.cdiv(rows * runs, 32 * RUN_WARPS),)](
                *arguments, rows * runs, **how, THREADS=32 * RUN_WARPS, num_warps=RUN_WARPS
            )
        return out
    tile, row_blocks = UNPACK_ROWS[transposed], columns // weight.blocksizes[0]
    fp8_kernels.dequantize_e4m3_kernel[(triton.cdiv(rows, tile), row_blocks)](
        weight.codes.view(torch.int32), absmax, *second, weight.lut, scales, out, rows, NESTED=nested,
        BLOCKSIZE=weight.blocksizes[0], BLOCKSIZE2=weight.blocksizes[1], ROW_BLOCKS=row_blocks, ROWS=tile,
        TRANSPOSED=transposed, SHUFFLE=SHUFFLE, ROUND=INTERPRETED, num_warps=UNPACK_WARPS[transposed],
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------ the product


@functools.cache
def _ones(device: torch.device) -> torch.Tensor:
    return torch.ones(2**18, device=device)


def product(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor | None, dtype: torch.dtype,
    kernels: bool, u: torch.Tensor | None = None, B: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return a_scales (a b^T) b_scales + u B^T + bias, [rows, outputs], in dtype.

    a: e4m3 [rows, inner]; b: e4m3 [outputs, inner]; scales: fp32, one per row of each; b_scales None: all 1. u, B: in
    16 bit or fp32, [rows, adapter columns] and [outputs, adapter columns]. Sums are in fp32.
    """
    if not kernels:
        y = (a.float() @ b.float().t()) * a_scales[:, None]
        y = y if b_scales is None else y * b_scales
        y = y if u is None else y + u.float() @ B.float().t()
        return (y if bias is None else y + bias.float()).to(dtype)
    (rows, inner), outputs = a.shape, len(b)
    form = hopper_form(a.device, rows, outputs, inner, 0 if u is None else u.shape[1])
    if form and dtype is torch.bfloat16:
        return hopper_product.product(a, a_scales, b, b_scales, dtype, u, B, bias, form)
    if u is not None or not torch_multiplies(a.device, outputs, inner):  # torch would read and write y again for u B^T
        return _product_kernel(a, a_scales, b, b_scales, dtype, u, B, bias, EXACT)
    b_scales = _ones(a.device)[:outputs] if b_scales is None else b_scales
    scales = a_scales[:, None], b_scales[None]
    return torch._scaled_mm(a, b.t(), *scales, bias, out_dtype=dtype, use_fast_accum=not EXACT)


def product_tile(capability: tuple[int, int], outputs: int, inner: int) -> dict[str, int]:
    """Return the tile of `product_kernel`. Only Hopper's were timed; the other fits 99 KiB of shared memory."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "DESCRIBED", "GROUP")
    hopper = HOPPER_WIDE if outputs >= WIDE * inner else HOPPER_DEEP if inner >= WIDE * outputs else HOPPER
    return dict(zip(names, hopper if capability[0] == 9 else OTHERS, strict=True))


def _product_kernel(a, a_scales, b, b_scales, dtype, u, B, bias, exact: bool, tile: dict | None = None):
    """Do `product` in one kernel, with the adapters' product in it."""
    (rows, inner), outputs, out = a.shape, len(b), torch.empty(len(a), len(b), dtype=dtype, device=a.device)
    capability = (8, 9) if INTERPRETED else torch.cuda.get_device_capability(a.device)
    tile = tile or product_tile(capability, outputs, inner)
    left, right, target = a, b, out
    if tile["DESCRIBED"]:
        left, right = (
            TensorDescriptor.from_tensor(x, [tile[size], tile["BLOCK_K"]])
            for x, size in ((a, "BLOCK_M"), (b, "BLOCK_N"))
        )
        target = TensorDescriptor.from_tensor(out, [tile["BLOCK_M"], tile["BLOCK_N"]])
    grid = (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)
    fp8_kernels.product_kernel[grid](
        left, a_scales, right, a_scales if b_scales is None else b_scales, out if u is None else u, out if B is None else B,
        out if bias is None else bias, target, rows, outputs, inner, 0 if u is None else u.shape[1],
        SCALED=b_scales is not None, BIAS=bias is not None, EXACT=exact, BLOCK_R=0 if u is None else dot_size(u.shape[1]),
        **tile,
    )  # fmt: skip
    return out
