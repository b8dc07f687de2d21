"""Memory that a model's unpacked weights and chunks of logits share, one after the other.

The allocator would find memory for each of them, but a smaller tensor that is made meanwhile and stays, such as the
input of the next checkpointed layer, may take a part of it. Then the next unpacked weight does not fit there any more:
a CUDA graph, whose memory is its own, held 0.16 GiB more than it used (docs/measurements.md, "Memory").
"""

import weakref

import torch

MOST = 2


class Scratch:
    """A buffer for each dtype. What `take` returned is overwritten by what is taken next."""

    def __init__(self) -> None:
        self.elements = 0  # the most that is known to be needed
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        self.captured: list[torch.Tensor] = []  # graphs read and write these addresses: they stay

    def reserve(self, elements: int) -> None:
        """Let the buffers have at least this size from their first use on, so that they need not grow."""
        self.elements = max(self.elements, elements)

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a tensor [rows, columns] that holds any values, to be used before the next call.

        What is more than MOST times as large as what was reserved gets memory of its own, such as the logits of a small
        model.
        """
        needed = rows * columns
        if needed > MOST * self.elements:
            return torch.empty(rows, columns, dtype=dtype, device=device)
        buffer = self.buffers.pop(dtype, None)
        if buffer is None or len(buffer) < needed:
            buffer = None  # before the larger one is made
            self.reserve(needed)
            with torch.inference_mode(False):  # or training could not write to what an answer took first
                buffer = torch.empty(self.elements, dtype=dtype, device=device)
        self.buffers[dtype] = buffer
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not any(buffer is other for other in self.captured):
            self.captured.append(buffer)
        return buffer[:needed].view(rows, columns)


_living: weakref.WeakValueDictionary[torch.device, Scratch] = weakref.WeakValueDictionary()


def scratch_of(device: torch.device) -> Scratch:
    """Return the device's Scratch, which lives as long as the caller keeps it."""
    found = _living.get(device)
    if found is None:
        found = _living[device] = Scratch()
    return found


def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `Scratch.take` of the device's Scratch, or a tensor of its own if nobody keeps one."""
    found = _living.get(device)
    return (
        torch.empty(rows, columns, dtype=dtype, device=device)
        if found is None
        else found.take(rows, columns, dtype, device)
    )
