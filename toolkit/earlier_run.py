"""What an output folder holds of an earlier run: whether a new one may go on there, and what inference takes from it.

Imports no torch: a user who edits config.yaml and runs again must not wait for the weights to be told what is wrong.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from config import DATA_FILES, LEAVES, Config, ConfigError, TrainingConfig, flatten, is_hub_id, load_config, shown

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NAMES = ("model.name", "data.dataset")  # what has these may move: its content counts
WINDOW = "training.batch_size x training.gradient_accumulation_steps"  # what counts is their product


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name."""
    return int(CHECKPOINT.fullmatch(folder.name)[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in output_dir, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def settings(config: Config) -> dict[str, Any]:
    """Return every leaf of the configuration as JSON gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config).items()}


# ------------------------------------------------------------------------------------------------ training again


def read_settings(checkpoint: Path) -> tuple[dict[str, Any], int] | None:
    """Return the settings that a checkpoint was made with and the sequences per optimizer step; None if unreadable."""
    try:
        state = dict(json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))["items"])
        return dict(state["config"]["items"]), dict(state["shape"]["items"])["window"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changed_line(key: str, before: Any, now: Any, name: str) -> str:
    """Return what is said of a setting that had another value in the checkpoint of this name."""
    return f"{key}: was {shown(before)} in {name}, is {shown(now)} now"


def changed_settings(before: dict[str, Any], config: Config, windows: tuple[int, int], name: str) -> dict[str, str]:
    """Return a text for each setting that is not what the checkpoint `name` was trained with, and must be to go on.

    before: that checkpoint's settings; a key that it lacks had what is the default today. windows: sequences per
    optimizer step, before and now.
    """
    now, default = settings(config), settings(Config())
    fixed = [key for key in now if not LEAVES[key].field.metadata["resumable"] and key not in NAMES]
    pairs = {key: (before.get(key, default[key]), now[key]) for key in fixed} | {WINDOW: windows}
    return {key: changed_line(key, *pair, name) for key, pair in pairs.items() if pair[0] != pair[1]}


def may_have_moved(before: Any, now: Any) -> bool:
    """Return whether two names of a model or a data set can mean the same content, as far as the disk tells at once.

    Where they can, the content is compared once it is loaded.
    """
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    if is_hub_id(before) and is_hub_id(now):  # the hub renames, as wikitext to Salesforce/wikitext
        return before.split("/")[-1].lower() == now.split("/")[-1].lower()
    return not os.path.exists(before) or not os.path.exists(now) or _sizes(before) == _sizes(now)


def _sizes(path: str) -> list[int]:
    """Return the sizes of the data and weights in a file or folder."""
    top = Path(path)
    files = top.rglob("*") if top.is_dir() else [top]
    return sorted(f.stat().st_size for f in files if f.suffix.lower() in (*DATA_FILES, ".safetensors") and f.is_file())


def other_run(changes: list[str], training: TrainingConfig) -> ConfigError:
    """Return the one line that refuses to go on from a checkpoint: what changed, and what works instead."""
    output_dir = Path(training.output_dir)
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")
    if training.resume != "auto" and not finished and not checkpoints(output_dir):  # the checkpoint is another folder's
        return ConfigError(f"{'; '.join(changes)}; leave training.resume at auto to start at step 0")
    kind = "a finished run" if finished else "an unfinished run"
    remedy = "give another --output_dir, or --overwrite to replace it"
    if training.resume != "auto":  # another folder alone would go on from the same checkpoint
        remedy = "give --overwrite to replace it, or another --output_dir and leave training.resume at auto"
    return ConfigError(f"{'; '.join(changes)}; {output_dir} holds {kind}: {remedy}")


def refuse_other_run(config: Config, overwrite: bool) -> None:
    """Raise a ConfigError where the output folder holds a run that this one would neither go on from nor replace."""
    training, folder = config.training, Path(config.training.resume)
    output_dir, resume = Path(training.output_dir), training.resume
    if overwrite:
        return
    finished = os.path.isfile(output_dir / "adapter_model.safetensors")  # unlike Path's, no error for a name too long
    found = checkpoints(output_dir) if os.path.isdir(output_dir) else []
    own = resume == "auto" or (
        resume != "never" and os.path.abspath(output_dir) == os.path.dirname(os.path.abspath(resume))
    )
    if (finished and not (own and found)) or (found and not own and resume != "never"):
        kind = "a finished run" if finished else "another run"
        # With a checkpoint of another folder --overwrite would start at step 0, which is not what was asked for.
        remedy = ", or --overwrite to replace it" if resume in ("auto", "never") else ""
        raise ConfigError(f"training.output_dir: {output_dir} holds {kind}; give another --output_dir{remedy}")
    window = training.batch_size * training.gradient_accumulation_steps
    for checkpoint in {"auto": found, "never": []}.get(resume, [folder]):
        if (read := read_settings(checkpoint)) is not None:  # a damaged one is skipped when it is loaded, too
            before, now = read[0], settings(config)
            names = [key for key in NAMES if not may_have_moved(before.get(key), now[key])]
            changes = changed_settings(before, config, (read[1], window), checkpoint.name)
            changes |= {key: changed_line(key, before.get(key), now[key], checkpoint.name) for key in names}
            if changes:
                raise other_run(list(changes.values()), training)
            return


# ------------------------------------------------------------------------------------------------ using its adapter


def left_by_run(adapter: Path, name: str) -> list[Path]:
    """Return the file that a run left with its adapter, for a checkpoint in the folder above; perhaps none."""
    folder = adapter.resolve()
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return [place / name for place in places if (place / name).is_file()][:1]


def config_with_adapter(
    adapter: Path | None, given: list[Path], beside: Path, overrides: dict[str, str]
) -> tuple[Config, list[str]]:
    """Return the configuration to use an adapter with, and a line for edits of `beside` that cannot count.

    schema < the run's own config.yaml < `given` (--config) < flags; for generation.*, which no run learns: schema <
    `beside` (the config.yaml beside the script) < `given` < flags. Without a run's own: `given`, else `beside`.
    """
    own = left_by_run(adapter, "config.yaml") if adapter else []
    config = load_config(own + given or [beside], overrides)
    drawn = {name: value for name, value in overrides.items() if name.startswith("generation.")}
    generation = load_config([path for path in (beside, *given) if path.is_file()], drawn).generation
    lines = [] if given or not own else ignored_edits(own[0], beside, overrides)
    return dataclasses.replace(config, generation=generation), lines


def ignored_edits(own: Path, beside: Path, overrides: dict[str, str]) -> list[str]:
    """Return a line that names the settings in which `beside` differs from a run's config.yaml, `own`, if it counts as
    that run's: it names the run's folder and model.
    """
    if not beside.is_file():
        return []
    edited, run = load_config(beside), load_config(own)
    folder = Path(edited.training.output_dir).expanduser().resolve()
    if folder != own.parent.resolve() or edited.model.name != run.model.name:
        return []
    mine, theirs = settings(edited), settings(run)
    # training.* is what the next run will do, and no setting of an adapter that is there
    asked = [key for key in mine if key.split(".")[0] not in ("training", "generation") and key not in overrides]
    differing = [f"{key} {shown(theirs[key])} (not {shown(mine[key])})" for key in asked if mine[key] != theirs[key]]
    if not differing:
        return []
    return [
        f"the adapter is used with the settings of its run, {own}: {', '.join(differing)}; "
        f"your edits in {beside.name} count when you train again"
    ]
