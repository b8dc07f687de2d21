"""Names of models and data sets: hub id or local path, and what is missing there.

It imports no torch, and nothing of the project but config.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from config import ConfigError, DataConfig, sources_of

# Endings of data files, each with the kind of its content; toolkit/data_files.py reads them.
DATA_FILES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DATA_FILES |= {f"{ending}.gz": DATA_FILES[ending] for ending in (".csv", ".tsv", ".json", ".jsonl")}


def data_suffix(name: str) -> str | None:
    """Return the ending of a data file's name as DATA_FILES has it, or None if it is no data file."""
    return next((ending for ending in DATA_FILES if name.lower().endswith(ending)), None)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, `name` or `owner/name`; otherwise it is a local path."""
    return len(name) < 200 and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None


def missing_data(dataset: str, name: str = "data.dataset") -> list[str]:
    """Return a list with one message if `dataset` is the path of a local file or folder that does not exist, else [].

    An address such as s3://... is not checked: a user's own prepare_dataset may read it.
    """
    local = (not is_hub_id(dataset) and "://" not in dataset) or dataset.lower().endswith(tuple(DATA_FILES))
    if not local or os.path.exists(dataset):
        return []
    parts = [part.strip() for part in dataset.split(",")]
    several = len(parts) > 1 and not any(missing_data(part) for part in parts)
    hint = f'; several sources: --dataset "[{", ".join(parts)}]"' if several else ""
    return [f"{name}: no such file or folder: {dataset}{hint}"]


def missing_sources(data: DataConfig) -> list[str]:
    """Return a message for each source that names a local file or folder which does not exist."""
    return [problem for source in sources_of(data) for problem in missing_data(source.dataset, source.name)]


MOST_LAYERS = 1000  # the largest models have 126 (Llama 3.1 405B)
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # names of their number in config.json


def too_many_layers(settings: object) -> list[str]:
    """Return a list with one message if a model's config.json, or a part of it, names more layers than any has, else [].

    transformers would make all of them, or first a list with an entry for each.
    """
    if isinstance(settings, list):
        return next(filter(None, map(too_many_layers, settings)), [])
    if not isinstance(settings, dict):
        return []
    for key in COUNTS:
        if isinstance(settings.get(key), int | float) and settings[key] > MOST_LAYERS:
            return [f"model.name: expected at most {MOST_LAYERS:,} layers, got {key} {settings[key]} in config.json"]
    return too_many_layers([part for part in settings.values() if isinstance(part, dict | list)])


def check_layers(settings: object) -> None:
    """Raise ConfigError with the message of `too_many_layers`, if there is one."""
    if problems := too_many_layers(settings):
        raise ConfigError(*problems)


def _of_config(path: Path) -> list[str]:
    """Return `too_many_layers` of a model's folder; one whose config.json cannot be read is left to transformers."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return too_many_layers(json.loads((path / "config.json").read_text(encoding="utf-8")))
    return []


MODEL_PARTS = ("config.json", "tokenizer.json", "safetensors weights")
# Any of these can be made into a tokenizer; tokenizer_config.json alone cannot.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenization_*.py")


def missing_model(name: str, parts: Sequence[str] = MODEL_PARTS) -> list[str]:
    """Return a list with one message if model.name is a file, no folder or one that lacks one of `parts`, else [].

    So is a config.json with more layers than any model has. The answer needs no torch. A hub id is not checked here.
    """
    path = Path(name)
    if os.path.islink(path) and not os.path.exists(path):
        return [f"model.name: {name} is a link to {os.readlink(path)}, which does not exist"]
    if path.suffix.lower() == ".gguf":
        return [
            f"model.name: GGUF files cannot be loaded, got {name}; give the original model in safetensors (its hub id "
            "or folder)"
        ]
    if path.is_file():
        return [f"model.name: expected a hub id or a model's folder, got the file {name}; its folder is {path.parent}"]
    if not path.is_dir():
        return [] if is_hub_id(name) else [f"model.name: no such folder: {name}"]
    if (path / "adapter_config.json").is_file():
        return [
            f"model.name: {name} holds an adapter, not a model: give it as --adapter, and its base {_base_of(path)}"
            "as model.name"
        ]
    found = {
        "config.json": (path / "config.json").is_file(),
        "tokenizer.json": any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES),
        "safetensors weights": any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file(),
    }
    lacking = [part for part in parts if not found[part]]
    if not lacking:
        return _of_config(path)
    listed = " and ".join(filter(None, [", ".join(lacking[:-1]), lacking[-1]]))
    return [f"model.name: {name} has no {listed}{_found_instead(path, found)}"]


def _base_of(adapter: Path) -> str:
    """Return the base model that an adapter's folder names, in brackets and with a space; an empty text if none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return f"({base}) " if base else ""
    return ""


def _found_instead(path: Path, found: dict[str, bool]) -> str:
    """Return what a folder that lacks a part of a model seems to be, for the message; perhaps an empty text."""
    inside = [child.parent for pattern in ("*/config.json", "snapshots/*/config.json") for child in path.glob(pattern)]
    files = [file.suffix.lower() for file in path.iterdir()]
    if ".gguf" in files:
        return "; GGUF files cannot be loaded: give the original model in safetensors (its hub id or folder)"
    if not any(found.values()) and inside:
        return f"; did you mean {inside[0]}?"
    if not any(found.values()) and set(files) & set(DATA_FILES):
        return "; it looks like data, which belongs to data.dataset"
    if not found["safetensors weights"] and {".bin", ".pt", ".pth"} & set(files):
        return " (pickled weights are not loaded)"
    return "" if files else " (the folder is empty)"
