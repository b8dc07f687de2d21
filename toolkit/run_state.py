"""What a checkpoint of a run holds, and what is saved of a run whose other processes have failed."""

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from config import Config, ConfigError
from toolkit import checkpoints, earlier_run, processes
from toolkit.resume import CONTENTS, Found
from toolkit.startup import launched, launcher_started, report

# `run` is train_qlora's Run, which stands above this module.


def as_of_this_start(config: Config, overwrite: bool) -> tuple[Config, bool]:
    """Return the configuration and whether to overwrite. Raise ConfigError for a folder with a run that is not continued.

    torchrun starts its processes again after a failure, and where a machine joins (--nnodes 1:2). --overwrite and
    training.resume count for the first start: a run that was begun since the launcher started is its own, and goes on.
    """
    launchers = processes.gathered(launcher_started())
    begun = earlier_run.begun_since(Path(config.training.output_dir), min(launchers))
    if processes.gathered(begun)[0]:
        training = dataclasses.replace(config.training, resume="auto")
        config, overwrite = dataclasses.replace(config, training=training), False
    if launched():  # others were refused before
        earlier_run.refuse_other_run(config, overwrite)
    return config, overwrite


def share_output(output_dir: Path) -> None:
    """Raise ConfigError unless all processes of the launch see the folder that the first one has locked."""
    with contextlib.ExitStack() as held:
        name = ""
        if processes.is_first():
            mark = held.enter_context(tempfile.NamedTemporaryFile(dir=output_dir, prefix=checkpoints.TEMPORARY))
            name = Path(mark.name).name
        with processes.together():
            if not os.path.exists(output_dir / processes.gathered(name)[0]):
                problem = "expected one folder that all processes see"
                raise ConfigError(f"training.output_dir: {problem}, got another {output_dir} than that of rank 0")


def refuse_other_start(prints: dict[str, str], found: Found | None) -> None:
    """Raise ConfigError unless all processes start from the same contents and the same checkpoint."""
    start: dict[str, object] = {}
    for name, parts, _ in CONTENTS:
        start[f"{name}: content"] = " ".join(prints[part][:12] for part in parts)
    processes.refuse_differences(start | {"training.resume: checkpoint": found[0].name if found else None})


def state_of(run: Any) -> dict:
    """Return everything but the adapter that a resumed run needs."""
    return {
        "progress": dataclasses.asdict(run.progress),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.learner.scaler.state_dict(),
        "best_adapter": run.best_adapter or {},
        "held_out": run.held_out,
        "config": earlier_run.settings(run.config),
        "effective": earlier_run.settings(run.effective),
        "fingerprint": run.fingerprint,
        "shape": {
            **run.plan.saved(),
            "window": run.sequences_per_step,
            "processes": run.accelerator.num_processes,
        },
    }


def write_state(run: Any) -> None:
    """Write a checkpoint of the last complete step; a full disk is noted in run.unsaved and ends nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged optimizer states are managed memory that the CPU is about to read
    state, adapter = state_of(run), checkpoints.adapter_tensors(run.model)
    peft_config = checkpoints.adapter_settings(run.model, run.config.model.name)
    step, keep = run.progress.step, run.config.training.save_total_limit
    try:
        folder = checkpoints.write_checkpoint(run.output_dir, step, adapter, peft_config, state, keep)
        run.unsaved, line = "", f"checkpoint written to {folder}"
    except OSError as error:  # stopping would save nothing, and the disk may have room at the next one
        run.unsaved = line = f"checkpoint not written ({error}); {checkpoints.last_good(run.output_dir)}"
    run.log.say(f"step {step}: {line}")


def after_failure(run: Any, error: processes.RankFailed, again: str) -> int:
    """Write a checkpoint after another process has failed, say so, and return the exit code.

    Every process has all that a checkpoint holds, as it was after the last complete step. The first process writes it; if
    that is the one that has ended, its lock is free, and another one writes. again: the command that continues the run.
    """
    first = processes.is_first()
    with contextlib.suppress(ConfigError), contextlib.nullcontext() if first else checkpoints.locked(run.output_dir):
        newest = earlier_run.checkpoints(run.output_dir)[:1]
        if run.progress.step and [earlier_run.step_of(folder) for folder in newest] != [run.progress.step]:
            write_state(run)
    line = f"{error}; {checkpoints.last_good(run.output_dir)}; to continue: {again}"
    if first:
        run.log.say(f"error: {line}")
    else:
        report(ConfigError(line))
    return 1
