"""A model's files of weights: which one is damaged, and which tensor is missing or has another shape.

Only the headers of the files are read, and only after loading failed.
"""

import contextlib
import json
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers.modeling_utils
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from config import ConfigError, counted

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; safetensors refuses more
POINTER = b"version https://git-lfs"  # what stands in place of a large file in a clone without git-lfs
EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<number>\d+)\.(?P<rest>.+)")
OF_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
SHAPES = re.compile(r"expected the shape \[[\d, ]*\], got \[[\d, ]*\]")  # of fast_path/experts.py

# ------------------------------------------------------------------------------------------------ files


def index_of(model_name: str, revision: str | None, **where: Any) -> tuple[Path, dict[str, str]] | None:
    """Return the path of a model's index of weights and what it says, the file of each tensor; None if it has none.

    Raises ConfigError for an index that is no such map, or that names files outside the model's folder.
    """
    path = cached_file(model_name, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False, **where)
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        shards = set(found.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"model.name: {INDEX} of {model_name} is damaged: expected JSON with a weight_map from tensors to files; "
            f"{again(Path(path))}"
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise ConfigError(f"model.name: {INDEX} of {model_name}: expected names of files beside it, got {shard!r}")
    return Path(path), found


def weight_files(model_name: str, revision: str | None) -> list[Path]:
    """Return the paths of a model's files of weights as far as they are named on this machine; they may be missing."""
    if index := index_of(model_name, revision, local_files_only=True):
        return [index[0].with_name(shard) for shard in sorted(set(index[1].values()))]
    quietly = {"_raise_exceptions_for_missing_entries": False, "local_files_only": True}
    path = cached_file(model_name, SINGLE, revision=revision, **quietly)
    return [Path(path)] if path else []


def again(path: Path) -> str:
    """Return what to do about a damaged file. The hub's library does not fetch a file again that is in its cache."""
    cache, real = os.path.realpath(constants.HF_HUB_CACHE), os.path.realpath(path)
    if real.startswith(cache + os.sep):
        return f"delete {real}, and the next run fetches it again"
    return "fetch this file again"


def header_of(path: Path) -> dict[str, Any]:
    """Return the header of a file of weights, the facts of each tensor; raise ValueError that says why it has none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(8, len(POINTER)))
        if start.startswith(POINTER):
            raise ValueError("is a pointer of git-lfs and no weights: run `git lfs pull` in its folder")
        length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
        if 0 < length <= LARGEST_HEADER and size < 8 + length:
            raise ValueError(f"is truncated: it has {size:,} bytes, its header alone needs {8 + length:,}")
        if not 0 < length <= LARGEST_HEADER:
            raise ValueError("is empty" if size == 0 else "is damaged: it does not begin as a safetensors file does")
        file.seek(8)
        text = file.read(length)
    try:
        tensors = {name: facts for name, facts in json.loads(text).items() if name != "__metadata__"}
        needed = 8 + length + max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
        [list(map(int, facts["shape"])) for facts in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError("is damaged: its header is not that of a safetensors file") from None
    if size < needed:
        raise ValueError(f"is truncated: it has {size:,} of the {needed:,} bytes that its header names")
    return tensors


def damage(path: Path) -> str | None:
    """Return the words that say why a file of weights cannot be read and what to do, or None for a sound one."""
    try:
        header_of(path)
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        return f"is damaged ({' '.join(str(error).split())[:200]}); {again(path)}"
    except ValueError as error:
        return str(error) if "git lfs" in str(error) else f"{error}; {again(path)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def damaged_file(model_name: str, revision: str | None) -> ConfigError | None:
    """Return the error about the first of a model's files of weights that cannot be read, or None."""
    local = os.path.isdir(model_name)
    for path in weight_files(model_name, revision):
        found = damage(path) if path.is_file() else None
        if local and not path.exists():  # of a model of the hub it may be there
            found = f"is missing, though {INDEX} names it: fetch it"
        if found:
            return ConfigError(f"model.name: {path.name} of {model_name} {found}")
    return None


# ------------------------------------------------------------------------------------------------ tensors


@contextlib.contextmanager
def naming_tensors(model_name: str, revision: str | None) -> Iterator[None]:
    """Let transformers' `from_pretrained` name the tensor that it cannot load, in a ConfigError, while the context is open.

    Its own error names none: it points to a table in the log. It warns of weights of layers for which the model has no place.
    """
    before = transformers.modeling_utils.log_state_dict_report

    def report(model: Any, *rest: Any, loading_info: Any, **named: Any) -> None:
        if loading_info.conversion_errors or loading_info.mismatched_keys:
            raise tensor_problem(model_name, revision, model, loading_info)
        unread = sorted(filter(OF_LAYER.search, loading_info.unexpected_keys))
        if unread and not loading_info.missing_keys:  # where weights are missing, loading ends in an error
            print(
                f"warning: model.name: {model_name} has weights for which its config.json has no place, such as {unread[0]}: "
                "they are not used",
                file=sys.stderr,
            )
        before(model, *rest, loading_info=loading_info, **named)

    transformers.modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        transformers.modeling_utils.log_state_dict_report = before


def tensor_problem(model_name: str, revision: str | None, model: Any, found: Any) -> ConfigError:
    """Return the error about the first tensor that could not be loaded. found: transformers' LoadStateDictInfo."""
    wrong = {name: f"expected the shape {list(own)}, got {list(got)}" for name, got, own in found.mismatched_keys}
    for name, text in found.conversion_errors.items():
        said = SHAPES.findall(text)
        wrong[name] = said[-1] if said else " ".join(text.partition("\nError: ")[0].splitlines()[-1].split())[:200]
    name = min(wrong)
    if ".experts." in name:
        count = max((getattr(module, "num_experts", 0) for module in model.modules()), default=0)
        headers = [header_of(path) for path in weight_files(model_name, revision) if path.is_file()]
        shapes = {tensor: facts["shape"] for header in headers for tensor, facts in header.items()}
        if odd := odd_expert(shapes, name, count):
            return ConfigError(f"model.name: {model_name} {odd}; fetch its weights again")
    return ConfigError(
        f"model.name: {name} of {model_name} does not fit its config.json: {wrong[name]}; fetch its weights and its "
        "config.json again"
    )


def odd_expert(shapes: dict[str, list[int]], name: str, count: int) -> str | None:
    """Return the words about a tensor of an expert that is missing or has another shape than its neighbours'; else None.

    shapes: of all tensors in the files. name: of the model's tensor that is made of them; count: its experts.
    """
    stored = [(match, shape) for tensor, shape in shapes.items() if (match := EXPERT.fullmatch(tensor))]
    layer = re.search(r"\.\d+\.", name)  # by which the name in the files and the model's, which may differ, agree
    stored = [(match, shape) for match, shape in stored if layer is None or layer[0] in match["layer"]]
    layers, rests = (dict.fromkeys(match[key] for match, _ in stored) for key in ("layer", "rest"))
    wanted = (f"{layer}{number}.{rest}" for layer in layers for number in range(count) for rest in rests)
    if missing := [tensor for tensor in wanted if tensor not in shapes]:
        return f"lacks {counted(len(missing), 'weight')} of experts that its config.json needs, such as {missing[0]}"
    for rest in rests:
        usual = Counter(str(shape) for match, shape in stored if match["rest"] == rest).most_common(1)[0][0]
        for match, shape in stored:
            if match["rest"] == rest and str(shape) != usual:
                return f"has {match[0]} in the shape {shape}, where that of its other experts is {usual}"
    return None
