"""adapter_config.json of an adapter, which may come from anybody: read, checked, and its patterns turned into names.

This module imports no torch, so that an error is shown at once. peft would trust the file: it imports modules that the
file names, and matches its regular expressions, which may never end.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from config import LEAVES, ConfigError, coerce
from fast_path.targets import match
from toolkit.regular_files import not_regular

NAME = "adapter_config.json"
SIZE = 4 * 2**20  # bytes; a list of all modules of a large model has fewer
MANY = 20_000  # entries of a list; peft compares each of them with each module
PLAIN = re.compile(r"\w[\w.-]*")  # a name, which as a regular expression is quick to match


def _number(name: str) -> Callable[[Any], bool]:
    """Return whether a value is one that this setting of ours allows; a bool is no number."""

    def allowed(value: Any) -> bool:
        try:
            return isinstance(value, (int, float)) and coerce(LEAVES[name], value) is not None
        except ConfigError:
            return False

    return allowed


def _integers(value: Any) -> bool:
    whole = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)
    return whole or (type(value) is int and 0 <= value < 2**31)


def _names(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= MANY and all(isinstance(v, str) and PLAIN.fullmatch(v) for v in value)
    )


def _replication(value: Any) -> bool:
    pairs = isinstance(value, list) and len(value) <= 1000
    return pairs and all(_integers(pair) and isinstance(pair, list) and len(pair) == 2 for pair in value)


def _values(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and len(value) <= MANY and all(map(allowed, value.values()))


RANK, ALPHA = (_number("lora.rank"), "an integer >= 1"), (_number("lora.alpha"), "a number > 0")
NAMES, SWITCH = (_names, "a list of names"), (lambda value: isinstance(value, bool), "true or false")
TEXT = (lambda value: isinstance(value, str) and value.isprintable(), "text")
MODULES = (lambda value: isinstance(value, str) or _names(value), "a regular expression or a list of names")
# What peft gets from the file: what a value must be, as a check and in words. Each but the first three may be null.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "LORA, the one kind that is supported"),
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": (_number("lora.dropout"), "a number >= 0 and < 1"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "rank_pattern": (_values(RANK[0]), "ranks by names of modules"),
    "alpha_pattern": (_values(ALPHA[0]), "numbers > 0 by names of modules"),
    "layers_to_transform": (_integers, "numbers of layers"),
    "layers_pattern": (lambda value: _names([value]) or _names(value), "a name, or a list of names"),
    "layer_replication": (_replication, "at most 1,000 pairs of numbers of layers"),
    "modules_to_save": NAMES,
    "target_parameters": NAMES,
    "trainable_token_indices": (
        lambda value: _integers(value) or (_values(_integers)(value) and _names(list(value))),
        "a list of token ids, or such lists by names of modules",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), SWITCH),
}
REQUIRED = ("peft_type", "r", "lora_alpha")
# Without effect on an adapter whose weights exist. Any other key that asks for something is refused.
NEUTRAL = {"auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config"}
NEUTRAL |= {"megatron_core", "peft_version", "runtime_config", "velora_config"}
# How the weights were made before training. Any other way (pissa, olora, corda, loftq, lora_ga) also changed the base.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return what an adapter's adapter_config.json says, without keys that are null; raise ConfigError.

    Nothing is left that would import a module, change the base or allocate memory before it is compared with weights.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"--adapter: no {NAME} in {folder}")
    refuse_large(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"--adapter: cannot read {path} as JSON: {reason[:200]}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--adapter: {path}: expected an object, got {_shown(found)}")
    problems = [f"--adapter: {path}: {problem}" for problem in _problems(found)]
    if problems:
        raise ConfigError(problems[0])
    return {key: value for key, value in found.items() if key in KEYS and value is not None}


def refuse_large(path: Path) -> None:
    """Raise ConfigError if a file of settings that came with an adapter is too large to be one, or never ends."""
    if problem := not_regular(path):
        raise ConfigError(f"--adapter: expected a file, got {path}, which is {problem}")
    if (size := path.stat().st_size) > SIZE:
        raise ConfigError(f"--adapter: {path}: expected at most {SIZE:,} bytes, got {size:,}")


def _problems(found: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with the content of an adapter_config.json."""
    for key, (allowed, expected) in KEYS.items():
        value = found.get(key)
        if (value is not None or key in REQUIRED) and not allowed(value):
            yield f"{key}: expected {expected}, got {_shown(value)}"
    if found.get("init_lora_weights") not in KEEPS_BASE:
        yield (
            f"init_lora_weights: {_shown(found['init_lora_weights'])} goes with a changed base; let peft convert the "
            "adapter (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if isinstance(found.get("target_modules"), str) and (
        found.get("layers_to_transform"),
        found.get("layers_pattern"),
    ) != (
        None,
        None,
    ):
        yield "layers_to_transform: expected null with target_modules as text"
    for key in found.keys() - KEYS.keys() - NEUTRAL - {"init_lora_weights"}:
        if found[key] is True or (isinstance(found[key], (dict, list)) and found[key]):
            yield f"{_shown(key)}: expected null, since this is not supported, got {_shown(found[key])}"


def _shown(value: Any) -> str:
    """Return a value as JSON writes it, cut to a length that fits into a line."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}… ({len(text):,} characters)"


# ------------------------------------------------------------------------------------------------ patterns


def resolve_patterns(settings: dict[str, Any], modules: list[str], adapted: list[str], where: str) -> dict[str, Any]:
    """Return an adapter's settings with names of modules for each regular expression; raise ConfigError.

    settings: those of read_adapter_config. modules: the names of the base's modules. adapted: those for which the
    adapter has weights.
    """
    found, modules = dict(settings), list(dict.fromkeys([*modules, *adapted]))  # layer_replication adds some
    for key in ("exclude_modules", "target_modules"):
        pattern = found.get(key)
        if not isinstance(pattern, str) or (key == "target_modules" and pattern.lower() == "all-linear"):
            continue
        found[key] = match([("fullmatch", pattern)], modules, f"{where}: {key}")[0]
        if key == "target_modules" and not found[key]:
            raise ConfigError(f"{where}: {key}: {_shown(pattern)} matches no module of the base")
        if key == "target_modules":  # in a list a name also stands for the names that end with it
            more = [
                name for name in modules if name not in found[key] and name.endswith(tuple(f".{n}" for n in found[key]))
            ]
            found |= {"exclude_modules": [*found.get("exclude_modules", ()), *more]} if more else {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = found.get(key, {})
        if patterns and not (len(patterns) <= 100 and all(map(PLAIN.fullmatch, patterns))):
            found[key] = _by_value(patterns, adapted, f"{where}: {key}")
    return found


def _by_value(patterns: dict[str, Any], names: list[str], where: str) -> dict[str, Any]:
    """Return the values by patterns that are lists of names; as in peft the first pattern that matches a name counts."""
    matched = match([("match", rf"(.*\.)?({pattern})$") for pattern in patterns], names, where)
    values: dict[str, Any] = {}
    for value, found in zip(patterns.values(), matched, strict=True):
        for name in found:
            values.setdefault(name, value)
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(re.escape(name))
    return {"|".join(group): value for value, group in groups.items()}
