"""The adapter's weights in one piece of memory and their gradients in another, so that an update takes a few launches.

The adapter of a 3B model has 504 tensors. Bitsandbytes launches an update per tensor, which took 29 ms of a step on the
CPU beside an H200 (2026-11-29), more than a micro-batch of 512 tokens takes on the GPU.
"""

from collections.abc import Sequence

import torch
from torch import nn

BLOCK = 256  # weights that share a scale in bitsandbytes' 8-bit states
SMALL = 4096  # bitsandbytes keeps the states of a tensor with fewer weights in 32 bits (its min_8bit_size)


class AdapterMemory:
    """Moves the adapter's weights into one tensor, of which the parameters become views; the same for their gradients.

    Each tensor starts at a multiple of BLOCK weights, and zeros fill the gaps. AdamW treats every weight by itself, and in
    8 bit every block, so one update of the whole memory gives the bits that updates of the tensors give. Parameters of
    another dtype or device than the first one's stay as they are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        first = parameters[0]
        inside = [p for p in parameters if (p.dtype, p.device) == (first.dtype, first.device)]
        self.parts: list[tuple[list[nn.Parameter], slice]] = []  # large tensors, small ones: parameters and their place
        self.places: dict[nn.Parameter, int] = {}
        total = 0
        for small in (False, True):
            part, start = [p for p in inside if (p.numel() < SMALL) == small], total
            for parameter in part:
                self.places[parameter] = total
                total += -(-parameter.numel() // BLOCK) * BLOCK
            if part:
                self.parts.append((part, slice(start, total)))
        self.others = [p for p in parameters if p not in self.places]
        self.weights = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.gradients: torch.Tensor | None = None
        for parameter in inside:
            self.view(self.weights, parameter).copy_(parameter.detach())
            parameter.data = self.view(self.weights, parameter)
        torch.cuda.empty_cache()  # of the memory in which the weights were: a graph's own memory cannot reuse it

    def view(self, memory: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return the part of a tensor as long as `weights` that belongs to a parameter, in the parameter's shape."""
        start = self.places[parameter]
        return memory[start : start + parameter.numel()].view(parameter.shape)

    def zero_gradients(self) -> None:
        """Set all gradients to zero in their own memory, since a captured graph adds to it; create them at the first call."""
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.weights)
            for parameter in self.places:
                parameter.grad = self.view(self.gradients, parameter)
            for parameter in self.others:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_(self.all_gradients())

    def all_gradients(self) -> list[torch.Tensor]:
        """Return the memory of all gradients in as few tensors as there are."""
        return [self.gradients, *(parameter.grad for parameter in self.others)]

    def clip(self, most: float) -> torch.Tensor:
        """Scale the gradients down to a total norm of at most `most`; return the norm that they had."""
        whole = nn.Parameter(self.weights)  # shares the memory
        whole.grad = self.gradients
        return nn.utils.clip_grad_norm_([whole, *self.others], most)

    def is_in_place(self) -> bool:
        """Return whether every parameter and gradient still lies where it was put."""
        size, gradients = self.weights.element_size(), self.gradients
        if gradients is None:
            return False
        weight, gradient = self.weights.data_ptr(), gradients.data_ptr()
        return all(
            p.data_ptr() == weight + size * place
            and p.grad is not None
            and p.grad.data_ptr() == gradient + size * place
            for p, place in self.places.items()
        )
