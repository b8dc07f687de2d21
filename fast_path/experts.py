"""Routed experts in 4 bit: which layouts are known, packing while weights load, the forward pass, adapters on experts.

transformers keeps the experts of a layer as tensors of three dimensions, and gives most classes of experts one layout
(`use_experts_implementation` in its integrations/moe.py). bitsandbytes packs linear layers alone, and its
`replace_parameter_4bit` unpacks a whole tensor at each use and leaves it to autograd, which would keep it for the
backward pass. Here a product unpacks what it needs and forgets it, forward and backward.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import cached_file

from config import ConfigError
from fast_path.expert_kernel import has_kernel, levels_of, routed_product
from fast_path.families import BLOCK, expert_layout, expert_parameters, expert_tensors, routers
from fast_path.packed_weights import Packed, operands

# ------------------------------------------------------------------------------------------------ packing


def packed(tensor: torch.Tensor, config: BitsAndBytesConfig) -> bnb.nn.Params4bit:
    """Return the tensor [experts, rows, columns] in 4 bit, as one call of bitsandbytes packs all of it.

    Here experts are packed one after the other, since bitsandbytes needs 12 bytes per weight meanwhile on a CPU.
    """
    codes, states = zip(
        *(bnb.functional.quantize_4bit(part.contiguous(), quant_type=config.bnb_4bit_quant_type) for part in tensor),
        strict=True,
    )
    absmax, nested = torch.cat([state.absmax for state in states]), {}
    if config.bnb_4bit_use_double_quant:
        nested["offset"] = absmax.mean()
        absmax, nested["state2"] = bnb.functional.quantize_blockwise(absmax - nested["offset"], blocksize=256)
    state = QuantState(
        absmax, tensor.shape, states[0].code, states[0].blocksize, states[0].quant_type, tensor.dtype, **nested
    )
    return bnb.nn.Params4bit(
        torch.cat(codes),
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
    )


class _Quantize(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            check_shape(model, name, value[0] if isinstance(value, list) else value)
        own = {name: value for name, value in input_dict.items() if _is_packed_by(model, name)}
        result = {}
        for name, value in own.items():
            tensor = packed(value[0] if isinstance(value, list) else value, self.hf_quantizer.quantization_config)
            result[name] = tensor.to("cpu") if self.hf_quantizer.main_memory else tensor
        rest = {name: value for name, value in input_dict.items() if name not in own}
        return result | (super().convert(rest, model=model, **kwargs) if rest else {})


def check_shape(model: nn.Module | None, name: str, value: torch.Tensor) -> None:
    """Raise ValueError if what the files hold has not the shape of the parameter, which transformers packs all the same."""
    module, leaf = get_module_from_name(model, name)
    got = list(value.shape)
    if issubclass(getattr(module, "source_cls", nn.Module), Conv1D):  # stored transposed
        got.reverse()
    if got != (own := list(getattr(module, leaf).shape)):
        raise ValueError(f"expected the shape {own}, got {got}")


def _is_packed_by(model: nn.Module, name: str) -> bool:
    module, leaf = get_module_from_name(model, name)
    return isinstance(module, PackedExperts) and leaf in module.packed_names


class _Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of 4-bit linears, which also packs experts: each tensor as soon as it is read."""

    main_memory = False  # where packed experts go
    packs = True

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        if self.main_memory and _is_packed_by(model, param_name):
            return 0  # of the memory that transformers reserves on the device
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return _is_packed_by(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        plain = self.pre_quantized or not self.packs
        found = [] if plain else expect_packed(model, self.modules_to_not_convert)
        if self.main_memory and not found:
            name = type(model).__name__
            raise own_layout(name) if any(True for _ in expert_parameters(model)) else no_experts(name, "cpu")

    def get_modules_to_not_convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        return [*super().get_modules_to_not_convert(model, *args, **kwargs), *routers(model)]

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)


class _QuantizerToMainMemory(_Quantizer):
    main_memory = True


class _QuantizerOfTheRest(_Quantizer):
    packs = False


def not_packed(name: str, classes: Iterable[str], count: int, total: int, uneven: Iterable[int] = ()) -> ConfigError:
    """Return the error about a mixture whose experts would stay in 16 bit though nobody asked for it.

    uneven: the weights per expert of tensors that are in the known layout, but not made of whole blocks.
    """
    why = "have a layout of their own and cannot be packed"
    if sizes := " and ".join(f"{size:,}" for size in uneven):
        why = f"cannot be packed: {sizes} weights per expert are not whole blocks of {BLOCK}"
    return ConfigError(
        f"quantization.experts: expected 16bit, since the experts of {name} ({', '.join(classes)}) {why}: "
        f"{count:,} of {total:,} weights would stay in 16 bit"
    )


def no_experts(name: str, setting: str) -> ConfigError:
    """Return the error about a setting of quantization.experts for a model that routes nothing."""
    return ConfigError(
        f"quantization.experts: expected gpu, since {name} has no routed experts to which {setting} applies, got {setting}"
    )


def own_layout(name: str) -> ConfigError:
    """Return the error about experts in main memory of a model whose experts cannot be packed."""
    return ConfigError(
        f"quantization.experts: expected gpu, since the experts of {name} cannot be packed and cpu is for packed ones, got cpu"
    )


def apart_in_16_bit() -> ConfigError:
    """Return the error about experts in main memory of a base in 16 bit."""
    return ConfigError(
        "quantization.load_in_4bit: expected true with experts: cpu, which keeps experts in 4 bit in main memory, got false; "
        "a base in 16 bit needs experts: gpu"
    )


def apart_and_stored(name: str) -> ConfigError:
    """Return the error about experts in main memory of a model that is stored in 4 bit, whose experts are in 16 bit."""
    return ConfigError(f"quantization.experts: cpu needs a model in 16 bit, and {name} is stored in 4 bit; use gpu")


@contextlib.contextmanager
def packing_experts(main_memory: bool = False, packs: bool = True) -> Iterator[None]:
    """Let transformers' `from_pretrained` pack experts into 4 bit beside linears while the context is open.

    main_memory: each packed tensor goes there at once; `keep_in_main_memory` must follow. packs: False leaves experts in
    16 bit, and the router too.
    """
    before = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    kind = _QuantizerToMainMemory if main_memory else _Quantizer
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = kind if packs else _QuantizerOfTheRest
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before


def expect_packed(model: nn.Module, apart: list[str] | None = None) -> list[nn.Module]:
    """Give the experts of known layouts the class that computes with packed tensors; return these modules.

    apart: names of modules that stay in 16 bit. The tensors themselves are packed by the caller.
    """
    named = [(name, m) for name, m in model.named_modules() if expert_tensors(m) and not isinstance(m, PackedExperts)]
    modules = [module for name, module in named if should_convert_module(name, apart)]
    for module in modules:
        module.packed_names = expert_tensors(module)
        module.__class__ = _packed_class(type(module))  # type: ignore[arg-type]  # classes are hashable
    return modules


def pack(model: nn.Module, config: BitsAndBytesConfig, dtype: torch.dtype, packs: bool = True) -> None:
    """Pack the experts of a model that is stored in 4 bit, which bitsandbytes left in 16 bit; the rest gets the dtype.

    transformers reads what is not packed in the type that it is stored in, whatever type was asked for. packs: False leaves
    experts in 16 bit.
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
        elif isinstance(parameter, bnb.nn.Params4bit):
            parameter.quant_state.dtype = dtype  # of what it is unpacked to
    for module in expect_packed(model) if packs else ():
        for name in module.packed_names:
            module._parameters[name] = packed(module._parameters[name].data, config)


ONE_BY_ONE = re.compile(r"\.experts\.\d+\..*\.quant_state\.")


def check_stored(model_name: str, revision: str | None) -> None:
    """Raise ConfigError if a model stored in 4 bit has its experts one by one: transformers 5 reads them in 16 bit only."""
    quietly = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if index := cached_file(model_name, "model.safetensors.index.json", **quietly):
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].keys()
    elif path := cached_file(model_name, "model.safetensors", **quietly):
        with safe_open(path, "pt") as file:
            names = file.keys()
    else:
        return  # loading says what is missing
    if any(map(ONE_BY_ONE.search, names)):
        raise ConfigError(
            f"model.name: {model_name} stores its experts in 4 bit one by one, as transformers 4 did, which transformers 5 "
            "cannot read; give a copy in 16 bit, whose experts are packed while they load"
        )


def let_sizes_fit(model: nn.Module) -> None:
    """Let transformers compute unpacked experts one after the other where torch's grouped product refuses their sizes.

    It wants rows of whole 16 bytes. A plain copy of the model, which merging makes, takes the setting over.
    """
    for module in model.modules():
        shapes = [getattr(t, "quant_state", t).shape for t in map(module._parameters.get, expert_layout(module))]
        if not all(_aligned(shape[1:]) for shape in shapes):
            module.config._experts_implementation = "eager"


def _aligned(sizes: Iterable[int]) -> bool:
    return all(size % 8 == 0 for size in sizes)


def expert_lines(model: nn.Module, routes: bool = False) -> list[str]:
    """Return the log line about a base's routed experts and its router; [] without such experts.

    routes: whether the model routes tokens, though its experts may be in 16 bit.
    """
    count = sum(p.quant_state.shape.numel() for p in expert_parameters(model) if isinstance(p, bnb.nn.Params4bit))
    frozen = "frozen, so its auxiliary loss, which balances experts, is left out"
    if count:
        return [f"experts: {count:,} weights in 4 bit; the router stays in 16 bit and {frozen}"]
    return [f"experts: not in 4 bit; the router stays {frozen}"] if routes else []


# ------------------------------------------------------------------------------------------------ products by expert


class Experts(NamedTuple):
    """A packed tensor of experts, [experts, rows, columns]: what the operator takes. constants: as in `Packed`."""

    codes: torch.Tensor
    constants: list[torch.Tensor]
    shape: list[int]
    blocksizes: list[int]
    quant_type: str

    def absmax(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return the constants of experts, fp32. first, count: of experts whose blocks of constants are whole."""
        blocks = self.constants[0].numel() // self.shape[0]
        start, end = blocks * first, blocks * (self.shape[0] if count is None else first + count)
        absmax = self.constants[0].flatten()[start:end]
        if len(self.constants) == 1:
            return absmax
        absmax2, offset, code2 = self.constants[1:]
        second = absmax2[start // self.blocksizes[1] : -(-end // self.blocksizes[1])]
        return torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, second, code2, self.blocksizes[1], torch.float32
        ) + offset  # fmt: skip

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all experts."""
        if not self.has_kernel(dtype, self.codes.device):
            return _unpacked(self.codes, self.absmax(), self, dtype)
        absmax, *second = self.constants
        if second:
            second[1] = second[1].expand_as(second[0]).contiguous()  # the offset, one per second-level constant
        lut, columns = levels_of(self.quant_type, self.codes.device), self.shape[2]
        rows = Packed(self.codes.flatten(), [absmax, *second], lut, columns, self.blocksizes, self.quant_type)
        return operands(rows, [], [], 1.0, dtype, kernels=True)[0].view(self.shape)

    def has_kernel(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether Triton kernels unpack these experts and multiply by them on a device."""
        return has_kernel(dtype, device, self.shape, self.blocksizes[0])

    def each(self, wanted: list[int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield these experts, one after the other."""
        codes = self.codes.view(self.shape[0], -1)
        blocks = self.constants[0].numel() // self.shape[0]
        whole = len(self.constants) == 1 or blocks % self.blocksizes[1] == 0
        absmax = None if whole else self.absmax().view(self.shape[0], -1)  # tiny experts share a block of constants
        for number in wanted:
            own = self.absmax(number, 1) if absmax is None else absmax[number]
            yield _unpacked(codes[number], own, self, dtype)[0]

    def some(self, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return these experts, [numbers, rows, columns], without looking at their numbers on the host."""
        codes, absmax = (part.view(self.shape[0], -1)[wanted] for part in (self.codes, self.absmax()))
        return _unpacked(codes, absmax.flatten(), self, dtype)


def _unpacked(codes: torch.Tensor, absmax: torch.Tensor, W: Experts, dtype: torch.dtype) -> torch.Tensor:
    # A row per block: on a CPU bitsandbytes 0.50 unpacks rows that are not whole blocks wrongly.
    shape = [codes.numel() * 2 // W.blocksizes[0], W.blocksizes[0]]
    dense = torch.ops.bitsandbytes.dequantize_4bit(codes.flatten(), absmax, W.blocksizes[0], W.quant_type, shape, dtype)
    return dense.view(-1, *W.shape[1:])


def unpacked(parameter: bnb.nn.Params4bit) -> torch.Tensor:
    """Return the values of a packed tensor of experts, in the type that it was packed from."""
    W = operand(parameter)
    constants = [part.to(parameter.device) for part in W.constants]  # small ones are on the GPU, codes may be elsewhere
    return W._replace(constants=constants).dense(parameter.quant_state.dtype)


def operand(parameter: bnb.nn.Params4bit) -> Experts:
    """Return a packed parameter as the operator takes it."""
    state: QuantState = parameter.quant_state
    constants = [state.absmax]
    if state.nested:
        constants += [state.state2.absmax, state.offset, state.state2.code]
    sizes = [state.blocksize, state.state2.blocksize if state.nested else 1]
    return Experts(parameter.data, constants, list(state.shape), sizes, state.quant_type)


GROUPED = (9, 10)  # compute capabilities for which torch has a grouped product; for others it loops, and asks the host


def _grouped(x: torch.Tensor, sizes: list[int]) -> bool:
    """Return whether one product of torch computes all experts: in bfloat16 on some GPUs, with rows of whole 16 bytes."""
    return x.dtype is torch.bfloat16 and _aligned(sizes) and x.is_cuda and grouped_gpu(x.device)


def grouped_gpu(device: torch.device) -> bool:
    """Return whether a GPU computes all experts of a layer in one product."""
    return torch.cuda.get_device_capability(device)[0] in GROUPED


def packed_tensors(model: nn.Module) -> list[Experts]:
    """Return the packed tensors of a model's experts."""
    return [operand(p) for p in expert_parameters(model) if isinstance(p, bnb.nn.Params4bit)]


def unpacked_whole(model: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """Return the weights of the largest tensor of experts that a kernel unpacks whole, into what scratch.py shares; or 0.

    In memory of its own it would leave gaps: a step that was captured held 0.5 GiB more than it used (H200, 16 layers).
    """
    if not (tensors := packed_tensors(model)):
        return 0
    x = torch.empty(0, dtype=dtype, device=device)
    whole = [W.shape for W in tensors if _grouped(x, W.shape[1:]) and W.has_kernel(dtype, device)]
    return max(map(math.prod, whole), default=0)


def one_by_one(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a model's experts are computed one after the other, as their numbers of rows reach the host; else None."""
    loop = "its experts are computed one after the other"
    if not (tensors := packed_tensors(model)):
        plain = [module for module in model.modules() if expert_layout(module)]
        return loop if any(module.config._experts_implementation == "eager" for module in plain) else None
    x = torch.empty(0, dtype=dtype, device=device)
    if all(_grouped(x, W.shape[1:]) for W in tensors):
        return None
    if not all(W.has_kernel(dtype, device) for W in tensors):
        return loop
    adapted = any(isinstance(module, ExpertsLora) for module in model.modules())
    return "the adapters of its experts are computed one after the other" if adapted else None


def products_line(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Return the words for the log about how a model's packed experts are computed; "" without such experts."""
    if not (tensors := packed_tensors(model)):
        return ""
    if all(_grouped(torch.empty(0, dtype=dtype, device=device), W.shape[1:]) for W in tensors):
        return "experts: all of a layer unpacked, one grouped product"
    if all(W.has_kernel(dtype, device) for W in tensors):
        return "experts: unpacked within the kernel of their product"
    return "experts: unpacked and multiplied one after the other"


def grouped_product(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return x times the matrix of each row's expert. x: [rows, in], sorted by expert; weights: [experts, in, out].

    offsets: where the rows of each expert end, int32 [experts].
    """
    if _grouped(x, list(weights.shape[1:])):
        return F.grouped_mm(x, weights, offs=offsets)
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(x.split(counts), weights.unbind(), strict=True)])


@torch.library.custom_op("qlora::expert_product", mutates_args=())
def expert_product(
    x: torch.Tensor, offsets: torch.Tensor, codes: torch.Tensor, constants: list[torch.Tensor], shape: list[int],
    blocksizes: list[int], quant_type: str, across: bool,
) -> torch.Tensor:  # fmt: skip
    """Return x times the packed matrix of each row's expert, as `grouped_product`; across: times its transpose.

    On a GPU with Triton nothing waits for the host: where torch has grouped products all experts are unpacked for one of
    them; elsewhere, and with fewer rows than experts (generation), a kernel unpacks tiles of those that have rows. On a
    CPU the routed experts are unpacked one at a time.
    """
    W = Experts(codes, constants, shape, blocksizes, quant_type)
    grouped, few = _grouped(x, shape[1:]), len(x) < shape[0]
    if W.has_kernel(x.dtype, x.device) and (few or not grouped):
        return routed_product(x, offsets, W, across)

    def turned(w: torch.Tensor) -> torch.Tensor:
        return w.transpose(-2, -1) if across else w

    if x.is_cuda and few:
        wanted = torch.searchsorted(offsets, torch.arange(len(x), device=x.device, dtype=offsets.dtype), right=True)
        return torch.bmm(x[:, None], turned(W.some(wanted, x.dtype)))[:, 0]
    if grouped:
        return F.grouped_mm(x, turned(W.dense(x.dtype)), offs=offsets)
    y, ends = x.new_empty(len(x), shape[1] if across else shape[2]), [0, *offsets.tolist()]
    wanted = [number for number in range(shape[0]) if ends[number] < ends[number + 1]]
    for number, w in zip(wanted, W.each(wanted, x.dtype), strict=True):
        rows = slice(ends[number], ends[number + 1])
        torch.mm(x[rows], turned(w), out=y[rows])
    return y


@expert_product.register_fake
def _(x, offsets, codes, constants, shape, blocksizes, quant_type, across):
    return x.new_empty(len(x), shape[1] if across else shape[2])


def _setup(ctx, inputs, output):
    _, offsets, codes, constants, *ctx.settings = inputs
    ctx.save_for_backward(offsets, codes, *constants)


def _backward(ctx, grad):
    offsets, codes, *constants = ctx.saved_tensors
    *settings, across = ctx.settings
    dx = expert_product(grad.contiguous(), offsets, codes, constants, *settings, not across)
    return dx, None, None, [None] * len(constants), None, None, None, None


expert_product.register_autograd(_backward, setup_context=_setup)

# ------------------------------------------------------------------------------------------------ rows by expert


class _Spread(torch.autograd.Function):
    """Rows [tokens, width] → a copy for each expert of a token, sorted by expert. Its gradient adds in a fixed order."""

    @staticmethod
    def forward(ctx, rows, order, places, each):
        ctx.save_for_backward(order, places)
        ctx.each = each
        return rows[order // each]

    @staticmethod
    def backward(ctx, grad):
        _, places = ctx.saved_tensors
        return grad[places].view(-1, ctx.each, grad.shape[1]).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """The reverse of _Spread: the sum of the rows of each token."""

    @staticmethod
    def forward(ctx, rows, order, places, each):
        ctx.save_for_backward(order, places)
        ctx.each = each
        return rows[places].view(-1, each, rows.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, grad):
        order, _ = ctx.saved_tensors
        return grad[order // ctx.each], None, None, None


# ------------------------------------------------------------------------------------------------ in a model's modules

Factors = tuple[
    torch.Tensor, torch.Tensor, float
]  # of an adapter: A [experts x rank, in], B [out, rank x experts], scale


class PackedExperts(nn.Module):
    """The experts of a layer with packed tensors: transformers' `grouped_mm_experts_forward` for them and for adapters."""

    packed_names: list[str]
    store: Any = None  # the ExpertStore that brings the tensors, if they lie in main memory

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
        adapters: dict[str, list[Factors]] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the mixture of the experts' outputs, [tokens, width]. top_k_index, top_k_weights: [tokens, experts each]."""
        each, first, last = top_k_index.shape[1], *self.packed_names
        dtype = self._parameters[first].quant_state.dtype
        experts = self._parameters[first].quant_state.shape[0]
        numbers, order = torch.sort(top_k_index.flatten(), stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        offsets = torch.searchsorted(numbers, torch.arange(experts, device=order.device), right=True).int()
        adapters = adapters or {}

        def project(x: torch.Tensor, name: str, factor: torch.Tensor | int = 1) -> torch.Tensor:
            y = self.product(x, offsets, name)
            for A, B, scale in adapters.get(name, ()):
                y = y + low_rank(x, A, B, scale, offsets)
            return y + factor * self._parameters[f"{name}_bias"][numbers] if self.has_bias else y

        share = _Spread.apply(top_k_weights.reshape(-1, 1), order, places, 1)
        x = project(_Spread.apply(hidden_states.to(dtype), order, places, each), first)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        if self.has_post_expert_norm:
            x = share * self.post_expert_norm(project(x, last))
        else:
            # An expert's share before its last product instead of after it: the same mixture, on fewer columns, and the
            # gradient of the share needs no output of that product, which a compiled layer then does not compute again.
            x = project((share * x).to(dtype), last, share)
        return _Gather.apply(x, order, places, each).to(hidden_states.dtype)

    def product(self, x: torch.Tensor, offsets: torch.Tensor, name: str) -> torch.Tensor:
        """Return x times the matrices of a tensor, for the expert of each row."""
        W, across = operand(self._parameters[name]), not self.is_transposed
        if self.store is not None:
            turns = torch.is_grad_enabled()
            return torch.ops.qlora.fetched_product(x, offsets, W.codes, W.shape, across, turns)
        return expert_product(x, offsets, *W, across)


@functools.cache
def _packed_class(kind: type) -> type:
    return type("Packed" + kind.__name__, (PackedExperts, kind), {"__module__": kind.__module__})


def low_rank(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, offsets: torch.Tensor) -> torch.Tensor:
    """Return scale B A x with the A and B of each row's expert, in x's type. A, B, scale: Factors."""
    experts, rank = len(offsets), len(A) // len(offsets)
    missing = -rank % 8  # grouped products need rows of whole 16 bytes
    A = F.pad(A.to(x.dtype).view(experts, rank, -1), (0, 0, 0, missing))
    B = F.pad(B.to(x.dtype).view(len(B), rank, experts).permute(2, 1, 0), (0, 0, 0, missing)).contiguous()
    return grouped_product(grouped_product(x, A.transpose(1, 2), offsets) * scale, B, offsets)


class ExpertsLora(ParamWrapper):
    """peft's adapter of a tensor of experts, for a packed one: it hands A and B to the experts, which add their products.

    peft's own adds scale B A to the unpacked tensor instead. Names, shapes and files are peft's.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        parameter = self.get_param()
        if not isinstance(parameter, bnb.nn.Params4bit):
            raise ValueError(f"an adapter on {self.parameter_name} of experts in 4 bit is not supported")
        self._param_ndim = 3
        self.num_experts, *sizes = parameter.quant_state.shape
        return tuple(sizes)

    def forward(self, x: torch.Tensor, *args: Any, adapters: dict[str, list[Factors]] | None = None, **kwargs: Any):
        if not self.disable_adapters:
            active = [name for name in self.active_adapters if name in self.lora_A]
            own = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in active]
            adapters = {**(adapters or {}), self.parameter_name: own}
        return self.base_layer(x, *args, adapters=adapters, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("experts in 4 bit take no merged adapter; --mode merge makes a plain model")


ExpertsLora.__name__ = ParamWrapper.__name__  # by which peft 0.21 recognises one that it may wrap again


def adapting_experts(config: LoraConfig) -> LoraConfig:
    """Let peft put ExpertsLora on packed experts where this configuration targets them; return the configuration."""
    config._register_custom_module({PackedExperts: ExpertsLora})
    return config
