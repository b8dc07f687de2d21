"""Several adapters on one base in memory: each is read once, and swapped in place."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from config import ConfigError
from toolkit.adapters import load_adapter
from toolkit.generation import Generator

Factors = tuple[torch.Tensor, torch.Tensor]  # A [rank, inputs] and B [outputs, rank]
Shape = tuple[int, float]  # rank and scale: adapters of one shape share the memory that the graphs read
PEFT_NAME = "default"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as the set keeps it: A and B of each module of the set, in this order, at one rank and one scale."""

    folder: Path
    base: str | None  # that its adapter_config.json names
    rank: int
    scale: float
    factors: list[torch.Tensor]  # A, B, A, B, …

    @property
    def shape(self) -> Shape:
        return self.rank, self.scale


class AdapterSet:
    """Adapters of one base by name, of which one is active; with it the model answers as with that adapter alone.

    The model has LoRA layers on every module that any of the adapters adapts. Where one has none, its A and B are zeros.
    Adapters of one rank and scale are copied into the same memory, so whatever a CUDA graph has captured stays good.
    """

    def __init__(self, base: PreTrainedModel, folders: dict[str, Path]):
        found = {name: read_factors(base, folder) for name, folder in folders.items()}
        names = sorted(set().union(*(factors for factors, *_ in found.values())))
        self.model = with_layers(base, names)
        modules = dict(self.model.get_base_model().named_modules())
        self.layers: list[LoraLayer] = [modules[name] for name in names]
        dtype = base.dtype if base.device.type == "cuda" else None  # as toolkit.generation.use_own_precision
        self.adapters = {
            name: Adapter(
                folders[name], recorded, rank, scale, stacked(self.layers, names, factors, rank, scale, dtype)
            )
            for name, (factors, rank, scale, recorded) in found.items()
        }
        self.memory: dict[Shape, list[torch.Tensor]] = {}
        self.generator: Generator | None = None
        self.active = next(iter(folders))
        self._put(self.adapters[self.active])

    @torch.no_grad()
    def _put(self, adapter: Adapter) -> None:
        """Copy an adapter into the memory of its shape, and have the layers read that memory."""
        if adapter.shape not in self.memory:
            self.memory[adapter.shape] = [factor.clone() for factor in adapter.factors]
        memory = self.memory[adapter.shape]
        torch._foreach_copy_(memory, adapter.factors)
        if self.layers[0].lora_A[PEFT_NAME].weight.data_ptr() == memory[0].data_ptr():
            return
        for layer, A, B in zip(self.layers, memory[::2], memory[1::2], strict=True):
            layer.lora_A[PEFT_NAME].weight = nn.Parameter(A, requires_grad=False)
            layer.lora_B[PEFT_NAME].weight = nn.Parameter(B, requires_grad=False)
            layer.scaling[PEFT_NAME], layer.r[PEFT_NAME] = adapter.scale, adapter.rank

    def use(self, name: str) -> None:
        """Make an adapter the active one."""
        if name == self.active:
            return
        before, self.active = self.adapters[self.active].shape, name
        self._put(self.adapters[name])
        if self.generator:
            self.generator.adapter_changed(self.adapters[name].shape, before)


def read_factors(
    base: PreTrainedModel, folder: Path
) -> tuple[dict[str, tuple[Factors, float]], int, float, str | None]:
    """Return an adapter's A, B and scale by module, its largest rank, its most usual scale, and the base it names.

    The model is as before afterwards. Raise ConfigError for an adapter that does not fit, or is no plain LoRA.
    """
    model = load_adapter(base, folder)
    found: dict[str, tuple[Factors, float]] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not (isinstance(module, LoraLayer) and is_swappable(module)):
                raise ConfigError(
                    f"--adapter: {folder}: expected plain LoRA on linear layers where several adapters are given, got "
                    f"{type(module).__name__} on {name}; give it alone"
                )
            A, B = (part[PEFT_NAME].weight.detach() for part in (module.lora_A, module.lora_B))
            found[name] = (A, B), float(module.scaling[PEFT_NAME])
    recorded = model.peft_config[PEFT_NAME].base_model_name_or_path
    model.unload()
    vars(base).pop("peft_config", None)  # or peft would warn that the next adapter comes on top
    scales = [scale for _, scale in found.values()]
    return found, max(len(A) for (A, _), _ in found.values()), max(scales, key=scales.count), recorded


def is_swappable(module: LoraLayer) -> bool:
    """Return whether a module's adapter is A and B alone, on a linear layer."""
    plain = not module.lora_variant and not any(module.lora_bias.values()) and PEFT_NAME in module.lora_A
    return plain and isinstance(module.lora_A[PEFT_NAME], nn.Linear) and not hasattr(module, "parameter_name")


def with_layers(base: PreTrainedModel, names: list[str]) -> PeftModel:
    """Return the base with LoRA layers on these modules and on no others; their matrices are still to be put there."""
    endings = tuple(f".{name}" for name in names)  # peft takes a name in a list for an ending too
    more = [name for name, _ in base.named_modules() if name.endswith(endings) and name not in set(names)]
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=names,
        exclude_modules=more or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return get_peft_model(base, config).eval()


def stacked(
    layers: list[LoraLayer], names: list[str], factors: dict[str, tuple[Factors, float]], rank: int, scale: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return A and B of each module at one rank and one scale: with rows and columns of zeros, and B times the rest."""
    found = []
    for name, layer in zip(names, layers, strict=True):
        (A, B), own = factors[name] if name in factors else (zeros(layer), scale)
        missing = rank - len(A)
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B * (own / scale), (0, missing))
        found += [part.to(dtype or part.dtype).contiguous() for part in (A, B)]
    return found


def zeros(layer: LoraLayer) -> Factors:
    """Return an adapter of rank 1 for a layer that changes nothing."""
    A, B = layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight
    return torch.zeros_like(A), torch.zeros_like(B)


def warn_of_other_bases(adapters: dict[Path, str | None], model_name: str, say: Callable[[str], None]) -> None:
    """Say of each adapter that was trained on another base than the one that is used."""
    for folder, recorded in adapters.items():
        if recorded and os.path.abspath(recorded) != os.path.abspath(model_name):
            say(f"warning: {folder} was trained on {recorded}; model.name is {model_name}")
