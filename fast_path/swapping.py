"""Layers whose activations wait in main memory for the backward pass: they are swapped instead of recomputed.

A checkpointed layer repeats most of its forward pass, which costs time on the GPU while the bus to main memory is idle. A
swapped layer copies what it saves to pinned main memory instead, on a stream of its own, while the following layers
compute; it comes back while the layers above it run their backward pass (Rhu et al., "vDNN", 2016, arXiv:1602.08124). So
as many layers need not be recomputed as the bus can carry meanwhile. All numbers are those of layers that keep their
activations on the GPU.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fast_path.expert_store import pinned

# Tensors of fewer bytes stay on the GPU: a layer saves dozens of them, and a copy of each would cost more than it frees.
SMALL = 2**20


def swapped_layers(checkpointed: int, swapped: int, layers: int) -> list[int]:
    """Return the numbers of the swapped ones among the first `checkpointed` layers: spread evenly, the lowest first.

    The last layer of the model is none of them, since the backward pass needs it at once.
    """
    among = min(checkpointed, layers - 1)
    swapped = min(swapped, among)
    return [turn * among // swapped for turn in range(swapped)]


class Waiting(NamedTuple):
    """What autograd holds in the place of a saved tensor: where its memory is, and what of that memory it is.

    turn: that of its layer; place: that of the memory among the layer's.
    """

    turn: int
    place: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


SWAPS: "weakref.WeakSet[Swap]" = weakref.WeakSet()  # all that exist


class NoMainMemory(torch.OutOfMemoryError):
    """Main memory could not be pinned for swapped layers; the run goes on without them, as it does without GPU memory."""


class Swap:
    """Moves what the swapped layers save to main memory, and back. A layer's turn is its place among them.

    The GPU holds the activations of two of them at most: a layer's memory stays until the next swapped layer has saved its
    own, and it comes back while the layers from that next one down run backward. Only streams wait for copies, and the
    memory stays where it is, so that a CUDA graph can hold them; the steps before its capture allocate it.
    """

    def __init__(self, layers: list[int], last: int, device: torch.device):
        """layers: the numbers of the swapped layers, the lowest first; last: that of a layer above them, before whose
        end the last one's copies must have ended."""
        cuda = device.type == "cuda"
        self.device, self.stream = device, torch.cuda.Stream(device) if cuda else None
        SWAPS.add(self)
        self.turns = {number: turn for turn, number in enumerate(layers)}
        self.ends = dict(zip([*layers[1:], last], range(len(layers)), strict=True))  # by the layer that is waited for
        self.copied = [torch.cuda.Event() if cuda else None for _ in layers]
        self.hosts: list[list[torch.Tensor]] = [[] for _ in layers]
        self.sizes: list[list[int]] = [[] for _ in layers]
        self.away = [0 for _ in layers]  # how many of autograd's tensors have left
        self.here: list[list[torch.Tensor]] = [[] for _ in layers]  # what is on its way, as bytes, by place

    # ------------------------------------------------------------------------------------------ forward

    @contextlib.contextmanager
    def around(self, number: int, layer: nn.Module, hidden: torch.Tensor, others: Any) -> Iterator[None]:
        """Run a layer in this context: if it is one of the swapped ones, what it saves leaves the GPU.

        hidden: its input, [batch, length, width]; others: what all layers are given, which stays as weights do.
        """
        if number not in self.turns:
            yield
            return
        turn, firsts = self.turns[number], {hidden.shape[0], hidden.shape[0] * hidden.shape[1]}
        staying = [*layer.parameters(), *layer.buffers(), *tree_leaves(others)]
        places = {place_of(tensor) for tensor in staying if isinstance(tensor, torch.Tensor)}
        if self.here[turn]:  # of a step that failed
            self._end_copies()
        self.sizes[turn], self.here[turn], self.away[turn] = [], [], 0

        def pack(tensor: torch.Tensor) -> torch.Tensor | Waiting:
            leaves = is_activation(tensor, firsts) and place_of(tensor) not in places
            return self._leave(turn, tensor.detach()) if leaves else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        self._note(turn)

    def after(self, number: int, out: torch.Tensor) -> None:
        """Free the layer that waited for the end of this one, and have it fetched when this one's backward pass begins."""
        if number in self.ends:
            turn = self.ends[number]
            self._wait(turn)
            self.here[turn] = []
            out.register_hook(lambda _: self._fetch(turn))

    def _leave(self, turn: int, tensor: torch.Tensor) -> Waiting:
        """Copy the memory of a tensor to main memory, unless another tensor has brought it there already."""
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        places = [place_of(there) for there in self.here[turn]]
        if memory.data_ptr() not in places:
            places.append(memory.data_ptr())
            self.sizes[turn].append(size := memory.nbytes)
            self.here[turn].append(memory)  # which must not be used again before it has been copied
            hosts = self.hosts[turn]
            hosts += [torch.empty(0)] * (len(places) - len(hosts))
            if (before := hosts[len(places) - 1].nbytes) < size:
                if before:
                    self._end_copies()
                hosts[len(places) - 1] = self._host(size)
            with self._beside():
                hosts[len(places) - 1][:size].copy_(memory, non_blocking=True)
        self.away[turn] += 1
        form = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
        return Waiting(turn, places.index(memory.data_ptr()), *form)

    def _host(self, size: int) -> torch.Tensor:
        try:
            return pinned(size, pin=self.stream is not None)
        except RuntimeError as error:
            held = sum(host.nbytes for hosts in self.hosts for host in hosts)
            raise NoMainMemory(
                f"main memory holds {held / 2**30:.2f} GiB of swapped layers, and {size / 2**20:.0f} MiB more cannot be pinned "
                f"({' '.join(str(error).split())[:80]})"
            ) from None

    # ------------------------------------------------------------------------------------------ backward

    def _fetch(self, turn: int) -> None:
        """Begin to bring the memory of a layer back, if any has left."""
        if not self.sizes[turn]:
            return
        self.here[turn] = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in self.sizes[turn]]
        with self._beside():
            for memory, host in zip(self.here[turn], self.hosts[turn], strict=False):
                memory.copy_(host[: memory.nbytes], non_blocking=True)
        self._note(turn)

    def _unpack(self, saved: torch.Tensor | Waiting) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._wait(saved.turn)
        memory = self.here[saved.turn][saved.place].untyped_storage()
        self.away[saved.turn] -= 1
        if not self.away[saved.turn]:  # the backward pass has all of them, and lets go of each as early as it can
            self.here[saved.turn] = []
        empty = torch.empty(0, dtype=saved.dtype, device=self.device)
        return empty.set_(memory, saved.offset, saved.shape, saved.strides)

    # ------------------------------------------------------------------------------------------ streams

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Copy in this context beside the computation, after all that it has been given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _end_copies(self) -> None:
        """Wait until no copy runs, before memory is let go of that one may still use. It never comes to that in a capture."""
        if self.stream is not None:
            self.stream.synchronize()

    def _note(self, turn: int) -> None:
        """Note that the copies of a layer end here. A capture must not wait for a layer without any: nothing of it is captured."""
        if self.stream is not None and self.sizes[turn]:
            self.copied[turn].record(self.stream)

    def _wait(self, turn: int) -> None:
        """Have the computation wait for the copies of a layer."""
        if self.stream is not None and self.sizes[turn]:
            torch.cuda.current_stream(self.device).wait_event(self.copied[turn])


def is_activation(tensor: torch.Tensor, firsts: set[int]) -> bool:
    """Return whether a saved tensor looks like an activation that is worth a copy.

    firsts: the first dimensions that activations have, the batch or all of its tokens.
    """
    return tensor.dim() > 1 and tensor.shape[0] in firsts and tensor.untyped_storage().nbytes() >= SMALL


def join_swaps() -> None:
    """Have the current stream wait for copies that are part of the graph which it is capturing, where a step failed."""
    for swap in SWAPS:
        if swap.stream is not None:
            with torch.cuda.stream(swap.stream):
                captures = torch.cuda.is_current_stream_capturing()
            if captures:
                torch.cuda.current_stream(swap.device).wait_stream(swap.stream)


def place_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr()
