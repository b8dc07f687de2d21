"""Put an adapter on its base: its files may come from anybody, so each is checked before peft uses it."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from config import Config, ConfigError
from fast_path.experts import adapting_experts
from fast_path.families import own_value
from fast_path.weight_files import damage
from quantization_utils import LOADING_ERRORS, count_parameters, create_lora_config, set_gradient_checkpointing
from toolkit.adapter_config import read_adapter_config, resolve_patterns
from toolkit.start_adapter import WEIGHTS, naming_setting

TYPES = ("F32", "F16", "BF16")
PREFIX = "base_model.model."
MISMATCH = re.compile(  # of torch's load_state_dict: the tensor, its size in the file, its size in the model
    r"size mismatch for (?:base_model\.model\.)?(\S+): .*?torch\.Size\((\[[\d, ]*\])\).*?torch\.Size\((\[[\d, ]*\])\)"
)
LARGEST = 1e6  # bound of an entry of the update of a weight, whose own entries are below 10


def load_adapter(model: PreTrainedModel, folder: str | Path, dropout: float | None = None) -> PeftModel:
    """Return the model with a folder's adapter, in eval mode; raise ConfigError if the two do not fit together.

    dropout: None freezes the adapter; otherwise it is trained, with this dropout, and its weights are fp32.
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"--adapter: no {WEIGHTS} in {folder} (pickled weights are not loaded)")
    if broken := damage(path):
        raise ConfigError(f"--adapter: {WEIGHTS} of {folder} {broken}")
    misfit = f"--adapter: {folder} does not fit {model.name_or_path}"
    try:
        names = check_tensors(path, settings, count_parameters(model)[1])
        modules = [name for name, _ in model.named_modules()]
        adapted = list(dict.fromkeys(n.removeprefix(PREFIX).partition(".lora_")[0] for n in names if ".lora_" in n))
        experts = tuple(f".{name}" for name in settings.get("target_parameters") or ())
        adapted += [name for name, _ in model.named_parameters() if experts and name.endswith(experts)]
        found = resolve_patterns(settings, modules, adapted, f"--adapter: {folder / 'adapter_config.json'}")
        check_replication(found, model, misfit)
        with warnings.catch_warnings(record=True) as said:
            # peft only warns about layers that the file lacks, and ignores those that the model lacks.
            warnings.simplefilter("always", UserWarning)
            own = adapting_experts(LoraConfig(**{key: value for key, value in found.items() if key != "peft_type"}))
            own.lora_dropout, trained = own.lora_dropout if dropout is None else dropout, dropout is not None
            peft_model = PeftModel.from_pretrained(model, str(folder), config=own, is_trainable=trained).eval()
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        said_by_torch = " ".join(str(error).split())
        if sizes := MISMATCH.search(said_by_torch):
            name, found_size, wanted_size = sizes.groups()
            by = f"by adapter_config.json (r: {settings.get('r')}) and the model"
            raise ConfigError(f"{misfit}: {name} is {found_size} in {WEIGHTS}, {wanted_size} {by}") from None
        raise ConfigError(f"{misfit}: {type(error).__name__}: {said_by_torch[:250]}") from None
    odd = names ^ set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    for name in sorted(odd):
        owner = "adapter" if name in names else "model"
        raise ConfigError(f"{misfit}: only the {owner} has {name}")
    if any("missing adapter keys" in str(warning.message) for warning in said):
        put_weights(peft_model, load_file(path))
        name = type(model).__name__
        print(
            f"peft alone loads a part of this adapter only, as it renames weights of {name}; all are loaded here",
            file=sys.stderr,
        )
    return peft_model


@torch.no_grad()
def put_weights(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy an adapter's tensors, named as peft's get_peft_model_state_dict names them, into a model that has them all.

    peft's set_peft_model_state_dict renames them as transformers renames the weights of the base's file, and leaves those
    that are then called otherwise, such as Laguna's, as they happen to be in the model.
    """
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in tensors.items():
        live[name].copy_(tensor)


def start_from_adapter(
    model: PreTrainedModel, config: Config, checkpointed: bool | int, say: Callable[[str], None]
) -> PeftModel | None:
    """Return the model with the adapter of lora.init_adapter, ready for training, or None if a fresh one is asked for.

    checkpointed: as in prepare_model_for_training, which this replaces.
    """
    if config.lora.init_adapter is None:
        return None
    model.config.use_cache = False
    with naming_setting():
        peft_model = load_adapter(model, config.lora.init_adapter, config.lora.dropout)
    set_gradient_checkpointing(peft_model, checkpointed)
    lora, found = config.lora, peft_model.peft_config["default"]
    found.asked = create_lora_config(**lora.arguments)  # as in prepare_model_for_training
    say(
        f"starting from the adapter in {lora.init_adapter} (rank {found.r}, alpha {found.lora_alpha:g}), with a new "
        "optimizer and schedule"
    )
    recorded = found.base_model_name_or_path
    if recorded and os.path.abspath(recorded) != os.path.abspath(config.model.name):
        say(f"warning: {lora.init_adapter} was trained on {recorded}; model.name is {config.model.name}")
    return peft_model


def check_tensors(path: Path, settings: dict[str, Any], weights: int) -> set[str]:
    """Return the names of the tensors in an adapter's file, all of them of finite and sound numbers; raise ConfigError.

    settings: those of read_adapter_config. weights: how many the base has.
    """
    limit = 12 * weights + 2**26  # of a file with three times the base's weights in fp32
    if (size := path.stat().st_size) > limit:
        raise ConfigError(f"--adapter: {path}: expected at most {limit:,} bytes for this base, got {size:,}")
    largest, rank = {"lora_A": 0.0, "lora_B": 0.0}, 0
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            if (kind := file.get_slice(name).get_dtype()) not in TYPES:
                raise ConfigError(f"--adapter: {name} in {path}: expected one of {', '.join(TYPES)}, got {kind}")
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"--adapter: {name} in {path}: expected finite numbers, got infinite ones or NaN")
            rank = max(rank, len(tensor)) if "lora_A" in name or "lora_embedding_A" in name else rank
            for part in largest:
                if part in name and tensor.numel():
                    largest[part] = max(largest[part], tensor.abs().max().item())
    scale = max([settings["lora_alpha"], *settings.get("alpha_pattern", {}).values()])
    if (bound := scale * largest["lora_A"] * largest["lora_B"]) > LARGEST:
        raise ConfigError(
            f"--adapter: {path.parent}: expected lora_alpha and weights of a usual size, got an update of up to {bound:.0e}"
        )
    asked = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    if asked > 8 * rank:  # peft allocates the matrices before it compares; some ranks may be used by no module
        raise ConfigError(f"--adapter: {path.parent}: r: expected the rank of its weights, {rank}, got {asked}")
    return names


def check_replication(settings: dict[str, Any], model: PreTrainedModel, misfit: str) -> None:
    """Raise ConfigError if an adapter's layer_replication names layers that the base lacks, or far too many."""
    pairs, count = settings.get("layer_replication", ()), own_value(model.config.get_text_config(), "num_hidden_layers")
    if any(not start < end <= count for start, end in pairs) or sum(end - start for start, end in pairs) > 4 * count:
        raise ConfigError(
            f"{misfit}: layer_replication: expected pairs [first, end] of its {count} layers, at most 4 times"
        )
