"""A base that is divided among processes: each keeps an equal part of every decoder layer's packed weights (FSDP2).

torch's `fully_shard` gathers a layer's weights before the layer runs, forward and backward, and frees them afterwards. It
puts parameters of its own into the places of those that it divides, and these have no quantisation state. So it gets one
tensor per layer, with the bytes of all packed weights, and each packed weight, stacked or not, is a view of the memory into
which FSDP2 gathers. It stays bitsandbytes' parameter, and fused and plain layers read it as ever. FSDP2 frees the memory
by resizing it to nothing, and gathers into the same memory again, so the views stay valid: `_attach` checks that, and that
the bytes are those that were divided. They are stored as float32, since FSDP2 is made for types that can have gradients.
bfloat16 would not do: on a GPU FSDP2 copies with torch._foreach_copy_, which computes bfloat16 in float32, so that every
pair of bytes that reads as NaN, about one in 256, becomes the same NaN. Adapters, constants, norms, embedding and
head are whole in each process.
"""

import contextlib
import functools
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import bitsandbytes as bnb
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers.core_model_loading
import transformers.modeling_utils
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from config import ConfigError
from fast_path.families import decoder_layers, decoder_of
from fast_path.packed_weights import Packed

STORED = torch.float32  # the type under which FSDP2 stores and copies the bytes
SHARE = "packed_share"  # the name of a divided layer's own parameter
ALIGNED = 256  # bytes; tensors start at multiples of it, as in memory that torch allocates
_divided: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the decoder layers whose weights are divided


AnyModel = TypeVar("AnyModel", bound=nn.Module)


class Stacked(Protocol):
    """Several linears whose packed weights are one tensor: a Group of layers.py."""

    weight: Packed


def is_divided(model: nn.Module | None = None) -> bool:
    """Return whether a model's base is divided among processes; None: whether any in this process is.

    Gathering needs all processes, so they must run the same number of forward and backward passes.
    """
    return len(_divided) > 0 if model is None else any(module in _divided for module in model.modules())


def is_share(name: str) -> bool:
    """Return whether a parameter of this name is a divided layer's share, which the packed weights are views of."""
    return name.rpartition(".")[2] == SHARE


def divided_line(model: nn.Module) -> str:
    """Return what the log says about a divided base, after the parts of the fast path; an empty text for another base."""
    if not is_divided(model):
        return ""
    processes = dist.get_world_size()
    return f" | base divided among {processes} processes: each layer is gathered before it runs (FSDP2)"


# ------------------------------------------------------------------------------------------------ loading


@contextlib.contextmanager
def loading_divided(wanted: bool) -> Iterator[None]:
    """Let `from_pretrained` keep this process's part of each packed weight of the decoder layers while the context is open.

    Each weight is cut as soon as it is packed or read, before the next one is read: transformers reads ahead in threads
    unless the environment forbids it, and its warm-up would reserve the memory of the whole model.
    """
    if not wanted:
        yield
        return
    loading, models = transformers.core_model_loading, transformers.modeling_utils
    set_whole, warm_up = loading.set_param_for_module, models.caching_allocator_warmup
    ahead, inside = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"), set[nn.Module]()

    def set_part(model: nn.Module, name: str, value: torch.Tensor, *rest: Any, **named: Any) -> None:
        if isinstance(value, bnb.nn.Params4bit):
            if not inside:
                _divided.update(decoder_layers(model))
                inside.update(module for layer in decoder_layers(model) for module in layer.modules())
            if model.get_submodule(name.rpartition(".")[0]) in inside:
                _cut(value)
        set_whole(model, name, value, *rest, **named)

    loading.set_param_for_module, models.caching_allocator_warmup = set_part, lambda *_: None
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        loading.set_param_for_module, models.caching_allocator_warmup = set_whole, warm_up
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if ahead is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = ahead
    if not inside:
        raise ConfigError("performance.shard_base: expected decoder layers with weights in 4 bit, found none")


def _whole_bytes(parameter: nn.Parameter) -> int:
    return (parameter.quant_state.shape.numel() + 1) // 2


def _cut(parameter: nn.Parameter) -> None:
    """Keep this process's part of a packed weight."""
    codes, processes = parameter.data.view(torch.uint8).flatten(), dist.get_world_size()
    parts = F.pad(codes, (0, -len(codes) % processes)).view(processes, -1)
    parameter.data = parts[dist.get_rank()].clone()


def _gather(parameter: nn.Parameter) -> None:
    """Make a packed weight whole that `_cut` has cut."""
    parts = [torch.empty_like(parameter.data) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, parameter.data)
    codes = torch.cat(parts)[: _whole_bytes(parameter)].clone()  # nothing but the codes in its memory
    parameter.data = codes.view(parameter.quant_storage).view(-1, 1)


# ------------------------------------------------------------------------------------------------ dividing


def make_whole(layer: nn.Module) -> None:
    """Make the packed weights of a layer whole, so that they can be stacked; `divide` must follow."""
    if layer in _divided and not hasattr(layer, "packed_places"):
        for parameter in _packed(layer):
            if parameter.data.nbytes < _whole_bytes(parameter):
                _gather(parameter)


def divide(layer: nn.Module, groups: Sequence[Stacked] = ()) -> None:
    """Divide the packed weights of a layer that `make_whole` made whole; do nothing if its base is not divided.

    groups: those that stack weights of the layer.
    """
    if layer not in _divided or hasattr(layer, "packed_places"):
        return
    pieces: list[torch.Tensor] = []
    starts: dict[int, int] = {}  # by the memory that stacked weights share
    places, total = [], 0  # (owner, first byte, shape, dtype)
    for owner in (*groups, *_packed(layer)):
        tensor = owner.data if isinstance(owner, nn.Parameter) else owner.weight.codes
        memory = tensor.untyped_storage().data_ptr()
        if memory not in starts:  # groups come first: their codes are the whole of it
            starts[memory] = total
            codes = tensor.view(torch.uint8).flatten()
            pieces.append(F.pad(codes, (0, -len(codes) % ALIGNED)))
            total += len(pieces[-1])
        first = starts[memory] + tensor.storage_offset() * tensor.element_size()
        places.append((owner, first, tensor.shape, tensor.dtype))
    share = nn.Parameter(torch.cat(pieces).view(STORED), requires_grad=False)
    for owner, *_ in places:
        _put(owner, pieces[0].new_empty(0))
    layer.register_parameter(SHARE, share)
    layer.packed_places, layer.packed_sum = places, _sum_of(share.data)
    _shard(layer)
    if codes.is_cuda:  # a layer's pieces are larger than its share, in whose place nothing else would fit
        torch.cuda.empty_cache()


def _sum_of(codes: torch.Tensor) -> int:
    return int(codes.view(torch.int32).sum(dtype=torch.int64))


def _packed(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if isinstance(parameter, bnb.nn.Params4bit)]


def _put(owner: nn.Parameter | Stacked, codes: torch.Tensor) -> None:
    if isinstance(owner, nn.Parameter):
        owner.data = codes
    else:
        owner.weight = owner.weight._replace(codes=codes)


def _shard(module: nn.Module) -> None:
    """Give a module to FSDP2, which divides nothing in it but the parameters named SHARE."""
    kind, parameters = type(module), list(module.named_parameters())
    device = next(parameter.device for name, parameter in parameters if is_share(name))
    others = {parameter for name, parameter in parameters if not is_share(name)}
    fully_shard(module, mesh=_mesh(device.type), ignored_params=others)
    type(module).__name__, type(module).__module__ = kind.__name__, kind.__module__  # by which families.py knows it


@functools.cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))


def divide_base(model: AnyModel) -> AnyModel:
    """Divide what is left of a base that was loaded so, and return the model: FSDP2 gathers each layer when it runs.

    model: of transformers or peft, fused or not. It cannot run before. Nothing happens if its base is not divided.
    """
    if not is_divided(model):
        return model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in decoder_layers(base):
        make_whole(layer)
        divide(layer)
    decoder: Any = decoder_of(base)
    _shard(decoder)
    decoder._get_fsdp_state()._lazy_init()  # as its first forward pass would; before it no layer can be gathered alone
    for layer in decoder_layers(base):
        _attach(layer)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _attach(layer: Any) -> None:
    """Make the packed weights of a divided layer views of the memory into which FSDP2 gathers its share."""
    layer.unshard()
    whole = getattr(layer, SHARE).data
    if _sum_of(whole) != layer.packed_sum:
        raise RuntimeError(
            f"FSDP2 of torch {torch.__version__} does not gather the bytes that it divided: use --shard_base false"
        )
    memory = whole.view(torch.uint8)
    for owner, first, shape, dtype in layer.packed_places:
        size = shape.numel() * dtype.itemsize
        _put(owner, memory[first : first + size].view(dtype).view(shape))
    layer.reshard()
    if memory.untyped_storage().size():
        raise RuntimeError(f"FSDP2 of torch {torch.__version__} does not free what it gathers: use --shard_base false")


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `named_parameters` does, without the shares; a divided layer is whole while its parameters are yielded."""
    layers = {id(parameter): layer for layer in _divided for parameter in layer.parameters()}
    current: Any = None
    for name, parameter in list(model.named_parameters()):
        if is_share(name):
            continue
        if (layer := layers.get(id(parameter))) is not current:
            if current is not None:
                current.reshard()
            if layer is not None:
                layer.unshard()
            current = layer
        yield name, parameter
    if current is not None:
        current.reshard()
