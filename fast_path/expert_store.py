"""Packed experts that lie in main memory: a GPU holds those of two layers, the one that computes and the next one."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from fast_path.experts import Experts, PackedExperts, expert_product, operand

ALIGNED = 256  # bytes: where a tensor begins within a layer's buffer


class ExpertStore:
    """Holds the packed experts of all layers in one buffer per layer, pinned, and brings them to the device in turn.

    Each layer is one copy, on a stream of its own, into one of two slots: while a layer computes, the next one comes. A
    CUDA graph may hold the copies, since all addresses stay. On a device without streams (tests) copies are made at once.
    """

    def __init__(self, modules: Sequence[PackedExperts], device: torch.device):
        self.modules, self.device = list(modules), device
        cuda = device.type == "cuda"
        self.layers = [self._gather(module, cuda) for module in self.modules]
        size = max(len(buffer) for buffer, _ in self.layers)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.ready = [torch.cuda.Event() if cuda else None for _ in range(2)]
        for number, module in enumerate(self.modules):
            module.store = self
            for name in module.packed_names:
                place = Place(weakref.ref(self), number, name, name == module.packed_names[0])
                PLACES[module._parameters[name].data_ptr()] = place

    def _gather(self, module: PackedExperts, pin: bool) -> tuple[torch.Tensor, dict[str, list[slice]]]:
        """Move a module's codes and constants into one buffer; return it and where each tensor's parts are in it."""
        parts = {name: _parts(module._parameters[name]) for name in module.packed_names}
        places: dict[str, list[slice]] = {}
        end = 0
        for name, tensors in parts.items():
            for tensor in tensors:
                start = -(-end // ALIGNED) * ALIGNED
                end = start + tensor.nbytes
                places.setdefault(name, []).append(slice(start, end))
        buffer = pinned(end, pin)
        for name, tensors in parts.items():
            views = [_view(buffer, place, tensor) for place, tensor in zip(places[name], tensors, strict=True)]
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
            module._parameters[name] = _with_parts(module._parameters[name], views, self.device)
        return buffer, places

    def expect(self, number: int, turns: bool = False) -> None:
        """Bring a layer to the device if it is not there, and start to bring the one that is needed after it.

        Backward passes go down, and their recomputed forward passes too; other forward passes go up, and with gradients
        (turns) they turn round at the last layer.
        """
        following = number - 1 if _goes_down() else number + 1
        if following == len(self.modules):
            following = number - 1 if turns else -1
        if number not in self.holds:
            self._fetch(number, 0)
        if following >= 0 and following not in self.holds:
            self._fetch(following, 1 - self.holds.index(number))

    def tensor(self, number: int, name: str) -> Experts:
        """Return a packed tensor of a layer that was expected, on the device."""
        slot = self.holds.index(number)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        parameter, places = self.modules[number]._parameters[name], self.layers[number][1][name]
        views = [_view(self.slots[slot], p, t) for p, t in zip(places, _parts(parameter), strict=True)]
        here = operand(parameter)
        return here._replace(codes=views[0], constants=[*views[1:], *here.constants[len(views) - 1 :]])

    def _fetch(self, number: int, slot: int) -> None:
        buffer, self.holds[slot] = self.layers[number][0], number
        if self.stream is None:
            self.slots[slot][: len(buffer)].copy_(buffer)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the slot's layer may still be computing
        with torch.cuda.stream(self.stream):
            self.slots[slot][: len(buffer)].copy_(buffer, non_blocking=True)
            self.ready[slot].record(self.stream)


def pinned(size: int, pin: bool = True) -> torch.Tensor:
    """Return a buffer of pinned memory. torch's own allocator would round its size up to a power of two.

    pin: False for a device without such memory (tests): any memory.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if not pin:
        return buffer
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 1)):  # 1: for all contexts
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer


def _parts(parameter: bnb.nn.Params4bit) -> list[torch.Tensor]:
    """Return the tensors that are large: codes, constants and, with double quantisation, their constants."""
    state = parameter.quant_state
    return [parameter.data, state.absmax, *([state.state2.absmax] if state.nested else [])]


def _view(buffer: torch.Tensor, place: slice, like: torch.Tensor) -> torch.Tensor:
    return buffer[place].view(like.dtype).view(like.shape)


def _with_parts(parameter: bnb.nn.Params4bit, parts: list[torch.Tensor], device: torch.device) -> bnb.nn.Params4bit:
    """Return the parameter with other tensors as its large parts; its small ones lie on the device."""
    state = parameter.quant_state
    state.code, state.absmax = state.code.to(device), parts[1]
    if state.nested:
        state.offset, state.state2.code, state.state2.absmax = (
            state.offset.to(device),
            state.state2.code.to(device),
            parts[2],
        )
    return bnb.nn.Params4bit(
        parts[0], quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, bnb_quantized=True,
    )  # fmt: skip


class Place(NamedTuple):
    """Where a packed tensor belongs: the layer's number in its store, and whether the layer's forward pass begins with it."""

    store: weakref.ref[ExpertStore]
    number: int
    name: str
    begins: bool


# By the address of the codes in main memory: to a compiler all layers are the same, and a number would be a constant of it.
PLACES: dict[int, Place] = {}


def _goes_down() -> bool:
    """Return whether this is within autograd's backward pass; torch's checkpoint asks in the same way."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("qlora::fetched_product", mutates_args=())
def fetched_product(
    x: torch.Tensor, offsets: torch.Tensor, codes: torch.Tensor, shape: list[int], across: bool, turns: bool
) -> torch.Tensor:
    """Return `expert_product` with a tensor of a store. codes: its codes in main memory; turns: as in ExpertStore.expect.

    A forward pass fetches its first layer anew: a graph that was replayed may have left other layers in the slots.
    """
    _, number, name, begins = place = PLACES[codes.data_ptr()]
    store = place.store()
    if begins and number == 0 and not _goes_down():
        store.holds = [None, None]
    store.expect(number, turns)
    return expert_product(x, offsets, *store.tensor(number, name), across)


@fetched_product.register_fake
def _(x, offsets, codes, shape, across, turns):
    return x.new_empty(len(x), shape[1] if across else shape[2])


def _setup(ctx, inputs, output):
    _, offsets, codes, *ctx.settings = inputs
    ctx.save_for_backward(offsets, codes)


def _backward(ctx, grad):
    shape, across, _ = ctx.settings
    return fetched_product(grad.contiguous(), *ctx.saved_tensors, shape, not across, False), *[None] * 5


fetched_product.register_autograd(_backward, setup_context=_setup)


def join_copies() -> None:
    """Have the current stream wait for copies that are part of the graph which it is capturing, as a capture must end."""
    for store in {place.store() for place in PLACES.values()}:
        if store is not None and store.stream is not None:
            with torch.cuda.stream(store.stream):
                captures = torch.cuda.is_current_stream_capturing()
            if captures:
                torch.cuda.current_stream(store.device).wait_stream(store.stream)


def keep_in_main_memory(model: nn.Module, device: torch.device) -> None:
    """Move the packed experts of a model into main memory, from where each layer fetches its own."""
    modules = [module for module in model.modules() if isinstance(module, PackedExperts)]
    ExpertStore(modules, device)
