"""An earlier run in an output folder: whether a new run may continue it, and what inference uses of it.

This module imports no torch: a user who edits config.yaml and runs again must not have to wait for the weights before
an error is shown.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from config import (
    FROM_ADAPTER,
    FROM_OWN_RUN,
    LEAVES,
    Config,
    ConfigError,
    ModelConfig,
    TrainingConfig,
    brief,
    flatten,
    is_address,
    load_config,
    read_yaml,
    shown,
    sources_of,
)
from toolkit.adapter_config import read_adapter_config, refuse_large
from toolkit.local_paths import data_suffix, is_hub_id
from toolkit.regular_files import not_regular

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FILES = ("adapter_model.safetensors", "adapter_config.json", "training_state.safetensors", "training_state.json")
NAMES = ("model.name", "data.dataset")  # a path may change if its content is the same
ATTENTION = "model.attn_implementation"
WINDOW = "training.batch_size x training.gradient_accumulation_steps"  # only their product must stay the same


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name."""
    return int(CHECKPOINT.fullmatch(folder.name)[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in output_dir, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def settings(config: Config) -> dict[str, Any]:
    """Return every setting by its name, in the form in which JSON reads it back (lists instead of tuples)."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config).items()}


def common_settings(config: Config) -> dict[str, Any]:
    """Return by name what all processes of a launch must have in common, but for what is behind paths."""
    apart = (*NAMES, "training.output_dir")  # machines may reach one folder by different paths; see share_output
    return {name: value for name, value in settings(config).items() if name not in apart}


# ------------------------------------------------------------------------------------------------ training again


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes; raise ValueError for anything else, such as a pipe."""
    found = os.stat(path)
    if not_regular(path) or found.st_size > most:  # a pipe would never end, a device neither
        raise ValueError(f"{path.name} is no file of at most {most:,} bytes")
    return path.read_bytes()


def read_tree(checkpoint: Path) -> tuple[dict[str, str], Any]:
    """Return (checksums by file, the content of training_state.json); raise ValueError if the checkpoint is damaged.

    The larger files only have to exist: their checksums take longer.
    """
    try:
        sums = json.loads(read_file(checkpoint / "checksums.json", 2**16))
        content = read_file(checkpoint / "training_state.json", 2**30)  # a million logged steps take a third of it
        if hashlib.sha256(content).hexdigest() != sums["training_state.json"]:
            raise ValueError("training_state.json does not match its checksum")
        for name in FILES:
            os.stat(checkpoint / name)
            if problem := not_regular(checkpoint / name):
                raise ValueError(f"{name} is {problem}")
        return sums, json.loads(content)
    except (OSError, KeyError, TypeError, RecursionError) as error:  # a RecursionError: thousands of brackets
        raise ValueError(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


def is_shallow(value: Any, levels: int = 6) -> bool:
    """Return whether nothing in a value lies deeper than `levels`, so that it can be compared and shown."""
    if not isinstance(value, (dict, list)):
        return True
    return levels > 0 and all(is_shallow(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def mappings(value: Any, levels: int = 12) -> Any:
    """Return settings with their mappings, which training_state.json keeps as {"items": pairs}; raise ValueError if deeper."""
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {key: mappings(part, levels - 1) for key, part in value["items"]}
    return [mappings(part, levels - 1) for part in value] if isinstance(value, list) else value


def read_settings(checkpoint: Path) -> tuple[dict[str, Any], int] | None:
    """Return a checkpoint's settings and its sequences per optimizer step; None if they cannot be read."""
    try:
        state = dict(read_tree(checkpoint)[1]["items"])
        before, window = mappings(state["config"]), dict(state["shape"]["items"])["window"]
        sound = type(window) is int and is_shallow(before) and all(isinstance(name, str) for name in before)
        return (before, window) if sound else None
    except (ValueError, KeyError, TypeError):
        return None


def changed_line(key: str, before: Any, now: Any, name: str) -> str:
    """Return the message about a setting that had another value in the checkpoint `name`."""
    return f"{key}: was {shown(before)} in {name}, is {shown(now)} now"


def changed_settings(before: dict[str, Any], config: Config, windows: tuple[int, int], name: str) -> dict[str, str]:
    """Return a message for each changed setting that must not change if the run continues from checkpoint `name`.

    before: that checkpoint's settings; a key that it lacks had the value that is the default today. windows: the
    sequences per optimizer step, before and now.
    """
    now, default = settings(config), settings(Config())
    fixed = [key for key in now if not LEAVES[key].field.metadata["resumable"] and key not in NAMES]
    pairs = {key: (before.get(key, default[key]), now[key]) for key in fixed} | {WINDOW: windows}
    if set(pairs[ATTENTION]) == {"auto", "sdpa"}:  # the default before; the model had sdpa, and auto means that too
        del pairs[ATTENTION]
    return {key: changed_line(key, *pair, name) for key, pair in pairs.items() if pair[0] != pair[1]}


def may_have_moved(before: Any, now: Any) -> bool:
    """Return whether two names of a model or a data set may mean the same content, judged by names and file sizes.

    If they may, the content itself is compared after it is loaded. Of several sources each is judged; what they have
    beside their names must be the same.
    """
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(may_have_moved, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        same = before | {"dataset": None} == now | {"dataset": None}
        return same and may_have_moved(before.get("dataset"), now.get("dataset"))
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    if is_hub_id(before) and is_hub_id(now):  # the hub renames repositories: wikitext became Salesforce/wikitext
        return before.split("/")[-1].lower() == now.split("/")[-1].lower()
    return not os.path.exists(before) or not os.path.exists(now) or _sizes(before) == _sizes(now)


def _sizes(path: str) -> list[int]:
    """Return the sizes of a file, or of all files of data and weights in a folder."""
    top = Path(path)
    files = top.rglob("*") if top.is_dir() else [top]
    return sorted(
        f.stat().st_size
        for f in files
        if (data_suffix(f.name) or f.suffix in (".arrow", ".safetensors")) and f.is_file()
    )


def continuing_command(argv: list[str] | None, resume: str) -> str:
    """Return the command that continues this run: the one that started it, without --overwrite and another --resume.

    argv: the arguments of `main`; None means those of the process. resume: the run's training.resume, which may come
    from a file.
    """
    kept: list[str] = []
    words = iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        flag, equals, _ = word.replace("-", "_").partition("=")
        if flag in ("__resume", "__training.resume"):
            None if equals else next(words, None)  # its value
        elif flag != "__overwrite":
            kept.append(word)
    kept += ["--resume", "auto"] if resume != "auto" else []
    if argv is not None:
        return f"train_qlora.main({kept})"
    started = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # python with its own options, and the script
    if "LOCAL_RANK" in os.environ:
        machines, each = (os.environ.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        meet = ["--nnodes", machines, "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:29500"]  # on each machine
        started = ["torchrun", *(meet if machines != "1" else []), "--nproc_per_node", each, sys.argv[0]]
    return subprocess.list2cmdline([*started, *kept]) if os.name == "nt" else shlex.join([*started, *kept])


def continues(output_dir: str, command: str) -> str:
    """Return the end of an error message: the command that continues, if there is a checkpoint to continue from."""
    found = output_dir and checkpoints(Path(output_dir))
    return f"; to continue from the last checkpoint: {command}" if found else ""


def other_run(changes: list[str], training: TrainingConfig) -> ConfigError:
    """Return the error that refuses to continue from a checkpoint: what changed, and what to do instead."""
    output_dir = Path(training.output_dir)
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")
    if training.resume != "auto" and not finished and not checkpoints(output_dir):  # it is in another folder
        return ConfigError(f"{'; '.join(changes)}; set training.resume to auto to start at step 0")
    kind = "a finished run" if finished else "an unfinished run"
    remedy = "choose another --output_dir, or use --overwrite to replace it"
    if training.resume != "auto":  # with another folder alone the run would still continue from that checkpoint
        remedy = "use --overwrite to replace it, or choose another --output_dir and set training.resume to auto"
    return ConfigError(f"{'; '.join(changes)}; {output_dir} holds {kind}: {remedy}")


def all_damaged(output_dir: Path, newest: Path | None = None) -> ConfigError:
    """Return the error about an output folder in which no checkpoint can be read. newest: one whose reason was not said yet."""
    reason = ""
    if newest:
        try:
            read_tree(newest)
            reason = f" ({newest.name}: its training_state.json holds no settings of a run)"
        except ValueError as error:
            reason = f" ({newest.name}: {error})"
    return ConfigError(
        f"training.resume: all checkpoints in {output_dir} are damaged{reason}; use --overwrite to start over"
    )


def begun_since(output_dir: Path, then: float) -> bool:
    """Return whether the run in a folder was begun or continued after a time, in seconds as of files."""
    with contextlib.suppress(OSError):
        return os.stat(output_dir / "config.yaml").st_mtime > then
    return False


def refuse_no_checkpoint(folder: Path) -> None:
    """Raise a ConfigError if training.resume names a folder that is no checkpoint: what is near it instead."""
    if os.path.isfile(folder / "checksums.json"):
        return
    what = "is no checkpoint" if os.path.isdir(folder) else "does not exist"
    near = next(
        (found for place in (folder, folder.parent) if os.path.isdir(place) and (found := checkpoints(place))), []
    )
    those = f", such as {' or '.join(map(str, near))}" if near else ""
    expected = f"expected auto, never or the folder of a checkpoint{those}"
    raise ConfigError(f"training.resume: cannot continue from {folder}: it {what}; {expected}")


def refuse_other_run(config: Config, overwrite: bool) -> None:
    """Raise a ConfigError if the output folder holds a run that this one would neither continue nor replace."""
    training, folder = config.training, Path(config.training.resume)
    output_dir, resume = Path(training.output_dir), training.resume
    if overwrite:
        return
    if resume not in ("auto", "never"):
        refuse_no_checkpoint(folder)
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")  # Path.is_file raises for long names
    found = checkpoints(output_dir) if os.path.isdir(output_dir) else []
    own = resume == "auto" or (
        resume != "never" and os.path.abspath(output_dir) == os.path.dirname(os.path.abspath(resume))
    )
    if (finished or found) and not (own and found):
        kind = "a finished run" if finished else "an unfinished run" if resume == "never" else "another run"
        # If a checkpoint of another folder was asked for, --overwrite is no help: it would start at step 0.
        remedy = ", or use --overwrite to replace it" if resume in ("auto", "never") else ""
        remedy += ", or --resume auto to continue it" if kind == "an unfinished run" else ""
        raise ConfigError(f"training.output_dir: {output_dir} holds {kind}; choose another --output_dir{remedy}")
    window = training.batch_size * training.gradient_accumulation_steps
    candidates = {"auto": found, "never": []}.get(resume, [folder])
    for checkpoint in candidates:
        if (read := read_settings(checkpoint)) is not None:  # a damaged one is skipped later too
            before, now = read[0], settings(config)
            names = [key for key in NAMES if not may_have_moved(before.get(key), now[key])]
            changes = changed_settings(before, config, (read[1], window), checkpoint.name)
            changes |= {key: changed_line(key, before.get(key), now[key], checkpoint.name) for key in names}
            if changes:
                raise other_run(list(changes.values()), training)
            return
    if resume == "auto" and candidates:
        raise all_damaged(output_dir, candidates[0])


# ------------------------------------------------------------------------------------------------ using its adapter


def left_by_run(adapter: Path, name: str) -> list[Path]:
    """Return, as a list of at most one, the file that a run left with its adapter.

    For the adapter of a checkpoint the folder above is searched too.
    """
    folder = adapter.resolve()
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return [place / name for place in places if (place / name).is_file()][:1]


GENERATION = "generation_config.json"
MOST_ENDS = 100


def read_ends(adapter: Path) -> tuple[Path | None, list[int]]:
    """Return the generation_config.json that a run left with its adapter and the end tokens that it names.

    The folder may come from anybody, so nothing else is read from the file. Raise ConfigError if it names no token ids.
    """
    for path in left_by_run(adapter, GENERATION):
        refuse_large(path)
        try:
            if not isinstance(tree := json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("expected names with values")
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--adapter: cannot read {path} as JSON settings: {reason}") from None
        found = tree.get("eos_token_id")
        ends = found if isinstance(found, list) else [] if found is None else [found]
        if len(ends) > MOST_ENDS or not all(type(i) is int and 0 <= i < 2**31 for i in ends):
            raise ConfigError(
                f"--adapter: {path}: eos_token_id: expected at most {MOST_ENDS} token ids, got {brief(found)}"
            )
        return path, ends
    return None, []


def config_with_adapter(
    adapter: Path | None, given: list[Path], beside: Path, overrides: dict[str, Any], evaluate: bool = False
) -> tuple[Config, list[str]]:
    """Return the configuration for using an adapter, and a list with a line about edits of `beside` without effect.

    Each of these overrides the ones before it: schema, the adapter's own config.yaml, `given` (--config), flags. For
    generation.*, which training does not use: schema, `beside` (the config.yaml beside the script), `given`, flags.
    An adapter without its own config.yaml uses `given`, or `beside` if nothing is given, and the base that its
    adapter_config.json names.
    The adapter's folder may come from anybody: config.FROM_ADAPTER says what it may set. evaluate: the data is read too.
    Raises ConfigError.
    """
    own = left_by_run(adapter, "config.yaml") if adapter else []
    recorded = read_adapter_config(adapter).get("base_model_name_or_path") if adapter else None
    user = config = load_config(given or ([] if own else [beside]), overrides)
    mine, lines = False, []
    if adapter and own:
        theirs = read_own(own[0])
        mine = is_own(adapter, theirs)
        may_set = FROM_OWN_RUN if mine else FROM_ADAPTER
        config = load_config(given, overrides, own[0], may_set)
        check_base(config.model, user.model, recorded, own[0], mine)
        if evaluate and not mine:
            config = with_data(config, theirs, own[0], given, beside)
        lines = [] if given else ignored_edits(config, may_set, own[0], beside)
    elif recorded and "model.name" not in overrides and recorded != config.model.name:
        config, lines = with_recorded_base(config, recorded, given)
    if adapter and not mine and "model.name" not in overrides and _inside(config.model.name, adapter):
        raise ConfigError(
            f"model.name: {config.model.name} lies in the adapter's folder; give --model_name {config.model.name} "
            "if this base is meant"
        )
    model = dataclasses.replace(config.model, trust_remote_code=consent(config, user, adapter, given, beside))
    if model.trust_remote_code and model.name != user.model.name:
        lines = [*lines, f"model.trust_remote_code: running the code of {model.name}, the base that {own[0]} names"]
    drawn = {name: value for name, value in overrides.items() if name.startswith("generation.")}
    generation = load_config([path for path in (beside, *given) if path.is_file()], drawn).generation
    return dataclasses.replace(config, generation=generation, model=model), lines


def consent(config: Config, user: Config, adapter: Path | None, given: list[Path], beside: Path) -> bool:
    """Return whether the user has agreed that code which comes with the base runs.

    A flag is meant for this command. A given --config, and the config.yaml beside the script, count for the base that
    they name, and never for one in the adapter's folder. user: the configuration without what the folder says.
    """
    if "model.trust_remote_code" in config.flags:
        return config.model.trust_remote_code
    agreed = user.model if given else load_config(beside).model if beside.is_file() else Config().model
    same = (agreed.name, agreed.revision) == (config.model.name, config.model.revision)
    return agreed.trust_remote_code and same and not (adapter and _inside(agreed.name, adapter))


def read_own(own: Path) -> Config:
    """Return all that the config.yaml in an adapter's folder says; raise ConfigError if it is too large."""
    refuse_large(own)
    return load_config(own)


def is_own(adapter: Path, theirs: Config) -> bool:
    """Return whether a run on this machine left the adapter where it is: its config.yaml has the folder's full path.

    Only texts are compared: a path in a stranger's file may be a link that leads back to the current folder.
    """
    said = theirs.training.output_dir
    folders = {os.path.abspath(adapter), os.path.realpath(adapter)}
    folders |= {os.path.dirname(folder) for folder in folders if CHECKPOINT.fullmatch(os.path.basename(folder))}
    return os.path.normcase(said) in map(os.path.normcase, folders)


def _inside(name: str, folder: Path) -> bool:
    """Return whether a model's name is a path in a folder, or the folder itself."""
    if is_address(name) or not os.path.exists(name):
        return False
    path, top = os.path.realpath(name), os.path.realpath(folder)
    return (
        os.path.commonpath([path, top]) == top if os.path.splitdrive(path)[0] == os.path.splitdrive(top)[0] else False
    )


def with_recorded_base(config: Config, recorded: str, given: list[Path]) -> tuple[Config, list[str]]:
    """Return the configuration with the base that adapter_config.json names, and a list with a line about it.

    A --config that names another one is the user's choice, and so is the config.yaml beside the script where the recorded
    one is a folder that is not on this machine.
    """
    wants = f"adapter_config.json names the base {recorded}"
    if any("name" in (read_yaml(path).get("model") or {}) for path in given):
        return config, [f"warning: {wants}; using {config.model.name}, which --config names"]
    if is_address(recorded):
        raise ConfigError(f"model.name: {wants}, an address; give it as --model_name if it is meant")
    if not (is_hub_id(recorded) or os.path.isdir(recorded)):
        return config, [f"warning: {wants}, which is not here; using {config.model.name} (--model_name changes it)"]
    model = dataclasses.replace(config.model, name=recorded, revision=None)
    return dataclasses.replace(config, model=model), [f"{wants} (--model_name changes it)"]


def check_base(model: ModelConfig, user: ModelConfig, recorded: str | None, own: Path, mine: bool) -> None:
    """Raise ConfigError if the base that an adapter's config.yaml, `own`, names is not one to load without a flag.

    It may lie on another machine, be another base than the one of the adapter's weights, or name a version whose code
    would run. user: without what `own` says. recorded: the base in its adapter_config.json; both are the same where a
    run of ours wrote them. mine: a run on this machine wrote `own` there.
    """
    if model.trust_remote_code and model.revision != user.revision:
        raise ConfigError(
            f"model.revision: {own} names {model.revision}, whose Python code would run; give --revision too if you "
            "trust it"
        )
    if mine or model.name == user.name:
        return
    if is_address(model.name):
        raise ConfigError(f"model.name: {own} names the address {model.name}; give it as --model_name if it is meant")
    if recorded and model.name not in (recorded, os.path.abspath(own.parent / recorded), os.path.abspath(recorded)):
        raise ConfigError(
            f"model.name: {own} names {model.name}, but adapter_config.json beside it {recorded}; give --model_name with "
            "the one that is meant"
        )


def with_data(config: Config, theirs: Config, own: Path, given: list[Path], beside: Path) -> Config:
    """Return the configuration with the data set to evaluate on; raise ConfigError if the user has not named it.

    theirs: what the adapter's config.yaml, `own`, says. It counts if it names what the user's file names.
    """
    if "data.dataset" in config.flags or any("dataset" in (read_yaml(path).get("data") or {}) for path in given):
        return config
    asked, dataset = load_config(given or ([beside] if beside.is_file() else [])).data.dataset, theirs.data.dataset
    if asked != dataset or any(is_address(source.dataset) for source in sources_of(theirs.data)):
        said = shown(dataset) if isinstance(dataset, str) else f'"{shown(dataset)}"'
        raise ConfigError(
            f"data.dataset: which data is read is not decided by a file in an adapter's folder ({own} says {said}, "
            f"and no run on this machine has written it there); give --dataset {said} if you want to use this data"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=dataset))


def ignored_edits(config: Config, may_set: Collection[str], own: Path, beside: Path) -> list[str]:
    """Return a list with a line that names the settings in which `beside` differs from a run's own config.yaml.

    It is empty unless `beside` names the folder and the model of that run, since it then belongs to another run.
    config: what is used; its settings in `may_set` came from the run's config.yaml, unless they are flags.
    """
    if not beside.is_file():
        return []
    edited = load_config(beside)
    folder = Path(edited.training.output_dir).expanduser().resolve()
    if folder != own.parent.resolve() or edited.model.name != config.model.name:
        return []
    mine, theirs = settings(edited), settings(config)
    # training.* is about the next run; it does not matter for an adapter that exists
    asked = [key for key in mine if key in may_set and not key.startswith("training.") and key not in config.flags]
    differing = [f"{key} {shown(theirs[key])} (not {shown(mine[key])})" for key in asked if mine[key] != theirs[key]]
    if not differing:
        return []
    return [
        f"the adapter is used with the settings of its run, {own}: {', '.join(differing)}; "
        f"your edits in {beside.name} take effect when you train again"
    ]
