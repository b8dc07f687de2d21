"""Shared basis of the Triton kernels: 4-bit codes to numbers, whether Triton is installed, and how kernels are launched.

The level of a 4-bit code is the number that it stands for before scaling; NF4 has a table (`lut`) of 16 levels.
"""

import dataclasses
from inspect import isfunction
from typing import Any

import torch


class Absent:
    """Replaces Triton where it is not installed, so that every module still imports and every name exists.

    Kernels are then plain Python functions that nothing calls: code that would launch one checks HAS_TRITON first.
    """

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):  # names that Python itself looks up, such as __wrapped__ or __file__
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return next((value for value in arguments if isfunction(value)), self)  # a decorator returns its function


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:  # a CPU build of torch, macOS, Windows without triton-windows
    triton = tl = TensorDescriptor = Absent()
    HAS_TRITON = False


@triton.jit
def lane_level(lut, SHUFFLE: tl.constexpr):
    """Return the level that this lane holds for its warp: the level of code lane % 16.

    For Triton it is a scalar, but its value differs from lane to lane.
    """
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            """{
            .reg .u32 lane; .reg .u64 place;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 place, lane, 4, $1;
            ld.global.nc.f32 $0, [place];
            }""",
            "=f,l", [lut.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 0.0


@triton.jit
def levels(words, lut, level, SHUFFLE: tl.constexpr):
    """Return the levels of the eight codes of each word, in the order of the weights: high half of a byte first.

    SHUFFLE: look a code up by a shuffle between lanes, which takes 2 instructions. A shuffle reads 5 bits of its index,
    and lanes 16 to 31 hold the 16 levels a second time, so no bits have to be masked. Otherwise load the level from the
    table, which takes 4 instructions and the computation of an address.
    """
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shr.u32 t, $8, 4;  shfl.sync.idx.b32 $0, $9, t, 31, -1;
            shfl.sync.idx.b32 $1, $9, $8, 31, -1;
            shr.u32 t, $8, 12; shfl.sync.idx.b32 $2, $9, t, 31, -1;
            shr.u32 t, $8, 8;  shfl.sync.idx.b32 $3, $9, t, 31, -1;
            shr.u32 t, $8, 20; shfl.sync.idx.b32 $4, $9, t, 31, -1;
            shr.u32 t, $8, 16; shfl.sync.idx.b32 $5, $9, t, 31, -1;
            shr.u32 t, $8, 28; shfl.sync.idx.b32 $6, $9, t, 31, -1;
            shr.u32 t, $8, 24; shfl.sync.idx.b32 $7, $9, t, 31, -1;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f", [words, level],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(lut + ((words >> 4) & 15)), tl.load(lut + (words & 15)),
            tl.load(lut + ((words >> 12) & 15)), tl.load(lut + ((words >> 8) & 15)),
            tl.load(lut + ((words >> 20) & 15)), tl.load(lut + ((words >> 16) & 15)),
            tl.load(lut + ((words >> 28) & 15)), tl.load(lut + ((words >> 24) & 15)),
        )  # fmt: skip


INTERPRETED = HAS_TRITON and not isinstance(levels, triton.JITFunction)  # kernels run on the CPU
SHUFFLE = not INTERPRETED and not torch.version.hip  # whether `levels` may use NVIDIA's instructions


def runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a device. Some of them contain instructions of NVIDIA's GPUs."""
    return INTERPRETED or (HAS_TRITON and device.type == "cuda" and not torch.version.hip)


def lacks_triton() -> bool:
    """Return whether there is a GPU but no Triton; without a GPU the plan is for a GPU with Triton."""
    return torch.cuda.is_available() and not HAS_TRITON


# ------------------------------------------------------------------------------------------------ launches


@dataclasses.dataclass(frozen=True)
class Launch:
    """The tile and the warps of a kernel's programs, chosen by measurement: tests/benchmarks/tune_kernels.py."""

    block_m: int  # rows per tile; in the kernel that dequantises, quantisation blocks per tile
    block_k: int
    warps: int


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, or 1 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
