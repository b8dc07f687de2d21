"""The adapters that a command names, and the configuration that all of them share. Imports no torch."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from config import Config, ConfigError, load_config, shown
from toolkit.earlier_run import config_with_adapter, left_by_run
from toolkit.runs import shortest_endings
from toolkit.side_by_side import BASE
from toolkit.template_files import read_template


def find_adapters(given: list[str] | None, paths: list[Path], overrides: dict[str, Any]) -> list[Path]:
    """Return the adapters' folders (--adapter, otherwise training.output_dir); [] for the base alone.

    Raise ConfigError if there is no adapter in one of them.
    """
    if given == ["none"]:
        return []
    names = given or [load_config(paths, overrides).training.output_dir]
    folders = [find_adapter(Path(name).expanduser()) for name in names if name != "none"]
    if len(folders) < len(names):
        raise ConfigError("--adapter: none stands for the base alone, so it goes with no other adapter")
    real = [os.path.realpath(folder) for folder in folders]
    for place, folder in enumerate(real):
        if folder in real[:place]:
            first = folders[real.index(folder)]
            raise ConfigError(f"--adapter: expected different folders, got {first} and {folders[place]}, which are one")
    return folders


def find_adapter(folder: Path) -> Path:
    """Return an adapter's folder; raise ConfigError if there is no adapter in it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not os.path.isfile(folder / name):  # Path's own raise for long names
            there = os.path.isdir(folder)
            what = f"no {name} in {folder}" if there else f"no such folder: {folder}"
            unfinished = sorted(folder.glob("checkpoint-*/adapter_config.json") if there else [], key=os.path.getmtime)
            hint = f"; to use the last checkpoint there: --adapter {unfinished[-1].parent}" if unfinished else ""
            raise ConfigError(
                f"--adapter: {what}; train one with train_qlora.py, or use --adapter none for the base alone{hint}"
            )
    return folder


def names_of(folders: list[Path]) -> list[str]:
    """Return what each adapter is called: its folder, with as many folders above it as tell it from the others."""
    paths = [os.path.abspath(folder) for folder in folders]
    names = [name.replace(os.sep, "/") for name in shortest_endings(paths)] if paths else []
    return [f"./{name}" if name == BASE else name for name in names]


def config_with_adapters(
    folders: list[Path], given: list[Path], beside: Path, overrides: dict[str, Any]
) -> tuple[Config, list[str]]:
    """Return what `config_with_adapter` makes of the first adapter, or of none.

    Raise ConfigError if another adapter was trained on another base, or on another quantisation of it.
    """
    config, lines = config_with_adapter(folders[0] if folders else None, given, beside, overrides)
    for folder in folders[1:]:
        if template_left(folder) != template_left(folders[0]):
            raise ConfigError(
                f"--adapter: expected adapters that were taught with one chat template: the {CHAT_TEMPLATE} that the runs "
                f"left with {folders[0]} and {folder} differ"
            )
        other, more = config_with_adapter(folder, given, beside, overrides)
        lines += [line for line in more if line not in lines]
        for (name, mine), theirs in zip(shared(config).items(), shared(other).values(), strict=True):
            if mine != theirs:
                raise ConfigError(
                    f"--adapter: expected adapters of one base: {name} is {shown(mine)} in {folders[0]} and "
                    f"{shown(theirs)} in {folder}"
                )
    return config, lines


CHAT_TEMPLATE = "chat_template.jinja"  # a run leaves it where the base has no template of its own, or a changed one


def template_left(folder: Path) -> str | None:
    """Return the chat template that a run left with its adapter, or None; raise ConfigError."""
    return next(map(read_template, left_by_run(folder, CHAT_TEMPLATE)), None)


def shared(config: Config) -> dict[str, Any]:
    """Return the settings, by name, that have to be the same for adapters of one base in memory."""
    found = {
        f"quantization.{field.name}": config.quantization[field.name]
        for field in dataclasses.fields(config.quantization)
    }
    if not config.quantization.load_in_4bit:  # the others do nothing then
        found = {name: found[name] for name in ("quantization.load_in_4bit", "quantization.compute_dtype")}
    own = {"model.name": config.model.name, "model.revision": config.model.revision}
    return own | found | {"data.template_options": config.data.template_options or {}}
