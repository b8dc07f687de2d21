"""Which modules of a model get adapters: what peft would apply to more than language layers is resolved to full names."""

import contextlib
import copy
import re
from collections.abc import Collection, Iterable

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from config import ConfigError, LoraSettings, brief
from fast_path.families import REVERSIBLE, decoder_layers, expert_layout, router_modules, routers, towers
from fast_path.targets import is_pattern, named, select

DEFAULT_TARGETS = LoraSettings().target_modules


def linear_modules(model: nn.Module, head: bool = False) -> list[str]:
    """Return the full names of the linear layers in a model's language half, without routers; head: with the output head."""
    chosen = set(routers(model))
    apart, output = tuple(f"{name}." for name in towers(model)), model.get_output_embeddings()
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    linears = [(name, module) for name, module in linears if name not in chosen]
    return [name for name, module in linears if not f"{name}.".startswith(apart) and (head or module is not output)]


def linear_names(model: nn.Module) -> list[str]:
    """Return the different last names of these layers, in the order of the model."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(model)))


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has routed experts."""
    return bool(router_modules(model))


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of some targets that peft applies to a model's routed experts instead of modules of that name.

    In transformers 5 the experts of a layer are one tensor. peft 0.21 translates the names that they had before, such
    as down_proj, and does so for a dense or shared MLP of the same name too.
    """
    taken = set()
    for leaf in {name.rpartition(".")[2] for name in names} if has_experts(model) else ():
        trial = LoraConfig(target_modules=[leaf])
        with contextlib.suppress(ValueError):  # gate_proj and up_proj are one tensor: peft wants both
            convert_peft_config_for_transformers(trial, model, None)
            if leaf in trial.target_modules:
                continue
        taken.add(leaf)
    return {name for name in names if name.rpartition(".")[2] in taken}


ROUTER = "gate"  # the name by which peft 0.21 means a router that is no linear layer
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)  # by peft
OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # of experts, before transformers 5


def named_experts(model: nn.Module, targets: Collection[str]) -> set[str]:
    """Return those of some targets that are tensors of routed experts by their own names, such as experts.down_proj."""
    modules = list(model.named_modules())
    own = [f".{name}.{tensor}" for name, module in modules for tensor in expert_layout(module)]
    found = {target for target in targets if any(name.endswith(f".{target}") for name in own)}
    return {t for t in found if not any(f".{name}".endswith(f".{t}") for name, _ in modules)} - taken_for_experts(
        model, found
    )


def expert_names(model: nn.Module) -> list[str]:
    """Return the different names by which adapters reach a model's routed experts, such as experts.down_proj."""
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return list(dict.fromkeys(f"{name}.{tensor}" for name, module in named for tensor in expert_layout(module)))


def names_without_experts(model: nn.Module) -> list[str]:
    """Return linear_names without those that peft applies to routed experts: attention's, in most mixtures."""
    names = linear_names(model)
    taken = taken_for_experts(model, names)
    return [name for name in names if name not in taken]


def check_targets(model: nn.Module, targets: Collection[str]) -> None:
    """Raise ConfigError if a model, which may be on the meta device, lacks a target of the adapters."""
    if isinstance(targets, str):  # all-linear or a regular expression
        return
    modules = dict(model.named_modules())

    def meant(target: str, names: Iterable[str]) -> bool:
        return any(f".{name}".endswith(f".{target}") for name in names)

    missing = sorted(t for t in targets if not meant(t, modules))
    missing = sorted(set(missing) - taken_for_experts(model, missing) - named_experts(model, missing))
    if missing:
        raise _no_module(model, missing)
    linears, chosen = linear_modules(model), [*router_modules(model), *routers(model)]
    routing = [t for t in targets if meant(t, chosen) and not meant(t, linears)]
    routing += [t for t in targets if t.rpartition(".")[2] == ROUTER and taken_for_experts(model, [t])]
    if routing:
        raise ConfigError(
            f"lora.target_modules: {routing[0]} is the router of the experts, which stays frozen; leave it out"
        )
    apart = tuple(f"{name}." for name in towers(model))
    for name, module in modules.items():
        odd = [t for t in targets if meant(t, [name])]
        if odd and not isinstance(module, ADAPTABLE) and not f"{name}.".startswith(apart):
            raise ConfigError(
                f"lora.target_modules: {odd[0]} is no linear layer but {type(module).__name__}; {_own(model)}"
            )


def _no_module(model: nn.Module, missing: list[str]) -> ConfigError:
    """Return the error about targets that a model lacks, or that are tensors of experts of an unknown layout."""
    for name, module in model.named_modules():
        tensors = [f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p.ndim == 3]
        found = [t for t in missing if any(tensor.endswith(f".{t}") for tensor in tensors)]
        if found and "Expert" in type(module).__name__:
            kind = type(module).__name__
            return ConfigError(
                f"lora.target_modules: {found[0]} is a tensor of experts that cannot be packed ({kind}), which get no adapters "
                f"by that name; {_own(model)}"
            )
    return ConfigError(f"lora.target_modules: the model has no {', '.join(missing)}; {_own(model)}")


def _own(model: nn.Module) -> str:
    """Return the words for an error about the names that a model's own layers and experts have."""
    experts = ",".join(expert_names(model))
    also = f", and for its experts, with --dropout 0, {experts}" if experts else ""
    return f"its own are --target_modules {','.join(linear_names(model))}{also}"


def _check_pattern(model: nn.Module, pattern: str, linears: list[str]) -> None:
    """Raise ConfigError if a regular expression matches no linear layer of a mixture, as one that means experts does."""
    names = ",".join(expert_names(model))
    if names and not named(pattern, linears, "lora.target_modules"):
        raise ConfigError(
            f"lora.target_modules: {brief(pattern)} matches no linear layer; experts are no layers, their adapters are "
            f"named in a list: --target_modules {names} --dropout 0"
        )


def every_target(model: nn.Module) -> set[str]:
    """Return what all-linear means in a mixture: its linear layers and experts, without the router that peft adds."""
    return {*linear_names(model), *taken_for_experts(model, OLD_NAMES)}


def resolved_targets(model: nn.Module, asked: LoraConfig) -> LoraConfig:
    """Return a copy of a configuration in which names stand for what peft would apply to more than language layers.

    Patterns, exclusions and numbers of layers become full names of modules, so that the saved adapter never holds a
    regular expression. Of the seven default names a model with routed experts gets those that mean no expert. Raises
    ConfigError.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in REVERSIBLE:
        name = type(model).__name__
        raise ConfigError(f"model.name: the layers of {name} make gradients only with a trained embedding; use another")
    lora, targets = copy.copy(asked), asked.target_modules
    if set(targets) == set(DEFAULT_TARGETS) and has_experts(model):
        spared = set(targets) & set(names_without_experts(model))
        lora.target_modules = targets = spared or targets
    if (
        targets == "all-linear"
        and has_experts(model)
        and not asked.exclude_modules
        and asked.layers_to_transform is None
    ):
        lora.target_modules = targets = every_target(model)
    check_targets(model, targets)
    if not isinstance(targets, str) and (asked.exclude_modules or asked.layers_to_transform is not None):
        linears = [f".{name}" for name in linear_modules(model)]
        means = named_experts(model, targets) | taken_for_experts(model, targets)
        if means := {t for t in means if not any(name.endswith(f".{t}") for name in linears)}:
            raise ConfigError(
                f"lora.target_modules: {min(means)} means the experts of all layers, which exclude_modules and "
                "layers_to_transform cannot choose among; leave it out, or these settings"
            )
    if not isinstance(targets, str) and (own := named_experts(model, targets)):
        lora.target_parameters = sorted({*(asked.target_parameters or ()), *own})
        lora.target_modules = targets = set(targets) - own
    layers = asked.layers_to_transform
    if not (is_pattern(targets) or asked.exclude_modules or layers is not None):
        endings = tuple(f".{target}" for target in targets)
        apart = [rf"{re.escape(name)}(\..*)?" for name in towers(model)]
        apart += [re.escape(name) for name in routers(model) if targets == "all-linear" or f".{name}".endswith(endings)]
        if apart:
            lora.exclude_modules = "|".join(apart)
        return lora
    layers = [layers] if isinstance(layers, int) else layers
    listed = not isinstance(targets, str)
    wanted, names = tuple(targets) if listed else targets, linear_modules(model, head=listed)
    head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if is_pattern(targets):
        _check_pattern(model, targets, names)
    chosen = select(names, wanted, asked.exclude_modules, layers, len(decoder_layers(model)), head)
    if odd := sorted(taken_for_experts(model, chosen)):
        raise ConfigError(
            f"lora.target_modules: peft would adapt the routed experts instead of {odd[0]}, which has their name; with "
            "a regular expression, exclude_modules or layers_to_transform choose layers of other names, such as attention's"
        )
    lora.target_modules, lora.exclude_modules, lora.layers_to_transform = set(chosen), None, None
    return lora
