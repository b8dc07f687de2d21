"""Dropout of an adapter's input without random state: the mask is a hash of where in the training an input stands."""

import zlib

import torch
from peft import PeftModel
from torch import nn

from fast_path import families

# ------------------------------------------------------------------------------------------------ masks


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers, in place (lowbias32 of C. Wellons, "Prospecting for Hash Functions", 2018).

    x: int32, any shape; products wrap. The logical shifts are arithmetic ones with the sign bits masked away.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846CA68B as a signed number
    x ^= (x >> 16) & 0xFFFF
    return x


def int32(number: int) -> int:
    """Return the signed number with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def dropout_mask(
    step: torch.Tensor, sequences: torch.Tensor, salt: int | torch.Tensor, length: int, features: int, p: float
) -> torch.Tensor:
    """Return which inputs survive, bool [batch, length, features]: a hash of step, sequence, position and feature.

    Its two halves of 16 bits serve two neighbouring features: even so it is half of a kernel's instructions.
    """
    key = mix(mix(step ^ salt) ^ sequences)
    position = torch.arange(length, dtype=torch.int32, device=step.device)
    key = mix(key[:, None] ^ mix(position)[None])
    pair = torch.arange((features + 1) // 2, dtype=torch.int32, device=step.device)
    bits = mix(key[..., None] ^ (pair * int32(0x9E3779B1)))
    halves = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], -1).flatten(-2)
    return halves[..., :features] >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """Return how many of the 2**16 values of half a hash drop."""
    return round(p * 2**16)


# ------------------------------------------------------------------------------------------------ modules


class DropoutClock:
    """Which sequences of which optimizer step the model is seeing, as device tensors that a captured graph reads anew.

    step: int32 scalar. sequences: int32 [batch], each row's number within the step's window over all micro-batches and
    processes, so that another micro-batch shape, a recompute or a resumed run meets the same masks with no RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Name the optimizer step and the rows of the micro-batch about to run."""
        self.step.fill_(step)
        sequences = sequences.to(torch.int32)
        if self.step.is_cuda and not sequences.is_cuda:  # a copy from pageable memory would wait for the GPU
            sequences = sequences.pin_memory()
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences, non_blocking=True)
        else:
            self.sequences = sequences.to(self.step.device, non_blocking=True)
        self._last = None

    def salted(self, salt: int) -> int:
        """Return the run's seed and a module's salt as one signed 32-bit number."""
        return int32(self.seed * 0x9E3779B1 ^ salt)

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs survive, bool [batch, length, features]; modules that read one x ask for one mask."""
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            self._last = (asked, dropout_mask(self.step, self.sequences, self.salted(salt), length, features, p))
        return self._last[1]


class StatelessDropout(nn.Module):
    """Stands in for peft's nn.Dropout on an adapter's input, x: [batch, length, features]; identity in eval mode."""

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.clock.keep(self.salt, x.shape[-2], x.shape[-1], self.p)
        return torch.where(keep, x, 0) * (1 / (1 - self.p))


def salt_of(name: str, readers: dict[str, str]) -> int:
    """Return the number that tells a module's masks, or those of its group of readers, from all others'.

    readers: the group of each linear that shares its x with others, by the family's row in families.py.
    """
    parent, _, leaf = name.rpartition(".")
    return zlib.crc32(f"{parent}.{readers.get(leaf, leaf)}".encode())


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model and return how many were replaced."""
    count, readers = 0, families.of(model.get_base_model() if isinstance(model, PeftModel) else model).readers
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt_of(name, readers))
                count += 1
    return count
