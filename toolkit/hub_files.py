"""Files of a data set of the hub, for our own readers: datasets chooses and downloads them, and does not read them.

hub_files(data) -> HubFiles, or the builder of datasets where our readers cannot read the files
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants

from config import ConfigError, Source
from toolkit.hub import cache_problem, hub_problem
from toolkit.local_paths import DATA_FILES, data_suffix

# Parts of the errors that datasets raises for files without rows; each format has its own.
NO_ROWS = ("at least one example", "corresponds to no data", "BatchSize must be greater than 0")
# What datasets says of a data set's configuration that does not exist, or that was not named and is one of several.
CONFIGURATIONS = re.compile(
    r"(?:BuilderConfig (?P<asked>'.*') not found. Available|pick one among .*): \[(?P<names>.*)\]"
)
# What a configuration says beside the settings of its reader.
NO_SETTINGS = {"name", "version", "description", "data_dir", "data_files", "features", "delimiter"}


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """Downloaded files of one kind by split. notes: lines for the log."""

    kind: str
    splits: dict[str, list[str]]
    notes: tuple[str, ...] = ()


def hub_files(data: Source) -> HubFiles | datasets.DatasetBuilder:
    """Return the files of a data set of the hub, or its builder if they are no .csv, .tsv or .json as our readers read it.

    Without the hub it is the files that an earlier call downloaded. Raises what datasets raises.
    """
    try:
        builder = datasets.load_dataset_builder(data.dataset, data.dataset_config)
    except Exception:  # datasets, too, takes what its cache has whatever the hub's answer was
        if found := _recalled(data):
            return found
        raise
    if not builder.config.data_files:  # what datasets' cache has of it, since the hub is out of reach
        return _recalled(data) or builder
    if (kind := own_kind(builder.config)) is None:
        return builder
    splits = datasets.DownloadManager().download(dict(builder.config.data_files))
    _remember(data, found := HubFiles(kind, {str(name): list(files) for name, files in splits.items()}))
    return found


def own_kind(config: datasets.BuilderConfig) -> str | None:
    """Return csv or json if our readers read the files of a configuration as it says, otherwise None."""
    kind = {"CsvConfig": "csv", "JsonConfig": "json"}.get(type(config).__name__)
    urls = [*itertools.chain(*config.data_files.values())]
    suffixes = {data_suffix(url) or "" if url.startswith("hf://datasets/") else "" for url in urls}
    if kind is None or {DATA_FILES.get(suffix) for suffix in suffixes} != {kind}:
        return None
    usual = type(config)()
    settings = {field.name for field in dataclasses.fields(config)} - NO_SETTINGS
    changed = {name: value for name in settings if (value := getattr(config, name)) != getattr(usual, name)}
    told, own = changed.pop("sep", ","), {"\t" if suffix.startswith(".tsv") else "," for suffix in suffixes}
    return kind if not changed and (kind == "json" or own == {told}) else None


def chosen_splits(splits: Mapping[str, Any], data: Source) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what is for training and perhaps validation, and a line on splits that are not used; raise ConfigError."""
    if data.train_split not in splits:
        has = ", ".join(splits)
        raise ConfigError(f"data.train_split: {data.dataset} has no split {data.train_split!r}; it has {has}")
    chosen = {"train": splits[data.train_split]}
    if data.validation_split in splits and data.validation_split != data.train_split:
        chosen["validation"] = splits[data.validation_split]
    if unused := [name for name in splits if name not in (data.train_split, data.validation_split)]:
        return chosen, (f"not used: the split{'s'[: len(unused) > 1]} {', '.join(unused)} of {data.dataset}",)
    return chosen, ()


def unreadable(error: Exception, dataset: str, local: bool) -> ConfigError:
    """Return the error that explains in one line why datasets could not load a data set."""
    if known := cache_problem(error) or (None if local else hub_problem("data.dataset", dataset, error)):
        return known
    cause = error.__cause__ or error
    if not local and (found := CONFIGURATIONS.search(str(error))):
        names = ", ".join(re.findall(r"'([^']*)'", found["names"]))
        got = found["asked"] or "null"
        return ConfigError(f"data.dataset_config: expected one of {names} for {dataset}, got {got}")
    if isinstance(cause, StopIteration) or any(words in str(cause) for words in NO_ROWS):
        return ConfigError(f"data.dataset: {dataset} has no rows")
    kind, lines = type(cause).__name__, str(cause).strip().splitlines()
    return ConfigError(f"data.dataset: cannot read {dataset}: {kind}: {lines[0][:300] if lines else kind}")


# ------------------------------------------------------------------------------------------------ without the hub


def _record(data: Source) -> Path:
    """Return the path where the names of a data set's files are kept, so that a part of them is not taken for all."""
    key = hashlib.sha256(json.dumps([data.dataset, data.dataset_config]).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE, "rows", f"{key}.files.json")


def _remember(data: Source, found: HubFiles) -> None:
    """Keep which files were downloaded, relative to the hub's cache, which may move."""
    home, path = os.path.abspath(constants.HF_HUB_CACHE), _record(data)
    splits = {name: [os.path.relpath(file, home) for file in files] for name, files in found.splits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        Path(folder, path.name).write_text(json.dumps([found.kind, splits]), encoding="utf-8")
        os.replace(Path(folder, path.name), path)


def _recalled(data: Source) -> HubFiles | None:
    """Return the files that an earlier call downloaded, if all are still there."""
    if not (path := _record(data)).is_file():
        return None
    kind, named = json.loads(path.read_text(encoding="utf-8"))
    home = os.path.abspath(constants.HF_HUB_CACHE)
    splits = {name: [os.path.join(home, file) for file in files] for name, files in named.items()}
    if not all(map(os.path.isfile, itertools.chain(*splits.values()))):
        return None
    note = f"the hub does not give {data.dataset} now: its files of an earlier download are read"
    return HubFiles(kind, splits, () if constants.HF_HUB_OFFLINE else (note,))
