"""Dropout on the inputs of adapters without random state: the mask is a hash of each input's place in the training.

It is the only randomness of a training step: the frozen base computes in training what it computes in inference.
"""

import contextlib
import copy
import zlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig

from config import ConfigError
from fast_path import families

# ------------------------------------------------------------------------------------------------ masks


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers in place and return them (lowbias32 of C. Wellons, "Prospecting for Hash Functions", 2018).

    x: int32, any shape. Products overflow and wrap around, as the hash needs. torch shifts signed numbers
    arithmetically, so each shift is followed by a mask that clears the sign bits; this makes it a logical shift.
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
    """Return which inputs are kept, bool [batch, length, features]: a hash of step, sequence, position and feature.

    One 32-bit hash serves two neighbouring features, with 16 bits for each. This saves hashing, which is still half of
    the instructions of a kernel that makes masks.
    """
    key = mix(mix(step ^ salt) ^ sequences)
    position = torch.arange(length, dtype=torch.int32, device=step.device)
    key = mix(key[:, None] ^ mix(position)[None])
    pair = torch.arange((features + 1) // 2, dtype=torch.int32, device=step.device)
    bits = mix(key[..., None] ^ (pair * int32(0x9E3779B1)))
    halves = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], -1).flatten(-2)
    return halves[..., :features] >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """Return how many of the 2**16 values of half a hash mean that an input is dropped: those below this number."""
    return round(p * 2**16)


# ------------------------------------------------------------------------------------------------ modules


class DropoutClock:
    """Which optimizer step the model is in, and which of its sequences the current micro-batch holds.

    Both are device tensors, so that a captured graph reads their new values at each replay. step: int32 scalar.
    sequences: int32 [batch], the number of each sequence among all sequences of the step, over all micro-batches and
    processes. So another micro-batch shape, a recomputed layer and a resumed run get the same masks without RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Set the optimizer step, and the sequences of the micro-batch that runs next."""
        self.step.fill_(step)
        sequences = sequences.to(torch.int32)
        if self.step.is_cuda and not sequences.is_cuda:  # a copy from memory that is not pinned would wait for the GPU
            sequences = sequences.pin_memory()
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences, non_blocking=True)
        else:
            self.sequences = sequences.to(self.step.device, non_blocking=True)
        self._last = None

    def salted(self, salt: int) -> int:
        """Return the run's seed and a module's salt, combined into one signed 32-bit number."""
        return int32(self.seed * 0x9E3779B1 ^ salt)

    def length(self, rows: int) -> int:
        """Return the tokens per sequence of an input with this many rows: a micro-batch's tokens, one below the other.

        An input with another number of rows, such as the tokens that a router chose, counts as one sequence.
        """
        return rows if rows % len(self.sequences) else rows // len(self.sequences)

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs are kept, bool [batch, length, features].

        The last mask is kept, because linears that read the same x ask for the same mask one after the other.
        """
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            self._last = (asked, dropout_mask(self.step, self.sequences, self.salted(salt), length, features, p))
        return self._last[1]


class StatelessDropout(nn.Module):
    """Replaces peft's nn.Dropout on an adapter's input; the identity in eval mode.

    x: [batch, length, features], or with batch and length in one, as some models have it.
    """

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        rows, features = x.numel() // x.shape[-1], x.shape[-1]
        keep = self.clock.keep(self.salt, self.clock.length(rows), features, self.p).flatten(0, 1)[:rows]
        return torch.where(keep.view(x.shape), x, 0) * (1 / (1 - self.p))


def salt_of(name: str, readers: dict[str, str]) -> int:
    """Return a number that gives a module masks of its own; linears that read the same x share one number.

    readers: the group of each linear that shares its x with others, from the family's row in families.py.
    """
    parent, _, leaf = name.rpartition(".")
    return zlib.crc32(f"{parent}.{readers.get(leaf, leaf)}".encode())


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model by StatelessDropout and return how many were replaced.

    Raises ConfigError for a model whose layers read the tokens before the sequences: the masks follow the sequences.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if p > 0 and getattr(getattr(base, "config", None), "model_type", None) in families.TOKENS_FIRST:
        name = type(base).__name__
        raise ConfigError(
            f"lora.dropout: {name} reads tokens before sequences, for which there is none; use --dropout 0"
        )
    count, readers = 0, families.of(base).readers
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt_of(name, readers))
                count += 1
    return count


# ------------------------------------------------------------------------------------------------ the base's own


def train_adapters(model: PeftModel) -> None:
    """Put the adapters into training mode, and the frozen base into that of inference, but for its decoder layers.

    A base may draw random numbers of its own in training: dropout, skipped layers, noise in a router. They regularise
    weights that are trained, and these are frozen. With them a checkpointed layer would be recomputed with other
    numbers than its forward pass had, so that gradients were wrong, and a resumed run could not draw the same ones.
    The decoder layers stay in training mode, because that is where transformers switches checkpointing on.
    """
    base = model.get_base_model()
    decoder = families.decoder_of(base)
    # It is in this mode, which each step asks for, so no walk through all modules comes first. A fresh PeftModel calls
    # itself in training, around a base that is not.
    if model.training and base.training and not decoder.training:
        return
    layers = families.decoder_layers(base)
    model.train()
    for module in decoder.modules():
        module.training = False
    for layer in layers:
        layer.training = True
        if rates := own_dropout(getattr(layer, "config", None)):  # some layers read it in each forward pass
            layer.config = copy.copy(layer.config)
            vars(layer.config).update(dict.fromkeys(rates, 0.0))
        for name in own_dropout(layer):
            setattr(layer, name, 0.0)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.train()


def own_dropout(owner: nn.Module | PretrainedConfig | None) -> dict[str, float]:
    """Return the rates above 0 of dropout and of random noise that are attributes of a module or of a config."""
    known = {} if owner is None else vars(owner)
    rates = {name: value for name, value in known.items() if "drop" in name or "jitter" in name}
    rates = {name: value for name, value in rates.items() if not name.startswith(("classifier", "summary"))}
    return {name: value for name, value in rates.items() if isinstance(value, float | int) and 0 < value <= 1}


def own_dropout_line(model: nn.Module) -> list[str]:
    """Return a log line with the dropout that the base was trained with and that does not act here; [] without one."""
    rates = ", ".join(f"{name} {value:g}" for name, value in own_dropout(model.config.get_text_config()).items())
    return [f"the base's own {rates} is off: the base is frozen (lora.dropout acts on the adapters)"] if rates else []


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put each module afterwards back into the mode, of training or inference, that it has now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
