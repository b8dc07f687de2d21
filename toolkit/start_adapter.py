"""An adapter that a run goes on from (lora.init_adapter): what the configuration takes from it. Imports no torch."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from config import Config, ConfigError, shown
from toolkit.adapter_config import read_adapter_config

WEIGHTS = "adapter_model.safetensors"
# What an adapter may have besides matrices A and B. It could be used, but is not trained here.
NOT_TRAINED = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias")


@contextlib.contextmanager
def naming_setting() -> Iterator[None]:
    """Have the errors about an adapter name lora.init_adapter instead of --adapter."""
    try:
        yield
    except ConfigError as error:
        own = [
            f"lora.init_adapter:{p.removeprefix('--adapter:')}" if p.startswith("--adapter:") else p
            for p in error.problems
        ]
        raise ConfigError(*own) from None


def with_start_adapter(config: Config, writes: bool) -> Config:
    """Return the configuration with the rank, alpha, targets and kind of lora.init_adapter, if it is given.

    Raise ConfigError if a flag contradicts them, if the adapter cannot be trained on, or, where the command `writes` into
    training.output_dir, if it lies there.
    """
    if config.lora.init_adapter is None:
        return config
    folder = Path(config.lora.init_adapter)
    with naming_setting():
        if not folder.is_dir():
            raise ConfigError(f"--adapter: expected an adapter's folder, got {folder}, which is none")
        found = read_adapter_config(folder)
        if not (folder / WEIGHTS).is_file():
            raise ConfigError(f"--adapter: no {WEIGHTS} in {folder} (pickled weights are not loaded)")
        for key in NOT_TRAINED:
            if found.get(key):
                what = f"{key}, with which training cannot go on; merge it and train on the merged model"
                raise ConfigError(
                    f"--adapter: expected an adapter of matrices A and B alone, got {folder}, which has {what}"
                )
        if found.get("bias", "none") != "none":
            raise ConfigError(f"--adapter: {folder} has bias: {found['bias']}, with which training cannot go on")
        own = settings_of(found, folder)
    for key, value in own.items():
        if f"lora.{key}" in config.flags and not same(config.lora[key], value):
            raise ConfigError(
                f"lora.{key}: expected {shown(value)} as in lora.init_adapter ({folder}), got {shown(config.lora[key])}; "
                "leave this flag out"
            )
    output, there = os.path.realpath(config.training.output_dir), os.path.realpath(folder)
    if writes and (there == output or os.path.dirname(there) == output):
        raise ConfigError(
            f"training.output_dir: {config.training.output_dir} holds the adapter of lora.init_adapter, which the run "
            "would replace; choose another --output_dir"
        )
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, **own))


def settings_of(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings under `lora` that an adapter has. found: what read_adapter_config returns."""
    targets, chosen = found.get("target_modules"), ("exclude_modules", "layers_to_transform")
    listed = isinstance(targets, list) and not any(key in found for key in chosen)
    if targets != "all-linear":
        targets = tuple(targets) if listed else adapted_modules(folder)
    return {
        "rank": found["r"],
        "alpha": float(found["lora_alpha"]),
        "target_modules": targets,
        **dict.fromkeys(chosen),
        "use_rslora": found.get("use_rslora", False),
        "use_dora": found.get("use_dora", False),
    }


def adapted_modules(folder: Path) -> tuple[str, ...]:
    """Return the names of the modules for which an adapter has weights, in place of a regular expression."""
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            names = [name.partition(".lora_")[0].removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--adapter: cannot read {folder / WEIGHTS}: {' '.join(str(error).split())[:200]}") from None
    return tuple(dict.fromkeys(names))


def same(asked: Any, own: Any) -> bool:
    """Return whether a flag says what the adapter has; the order of target_modules does not matter."""
    return sorted(asked) == sorted(own) if isinstance(asked, tuple) and isinstance(own, tuple) else asked == own
