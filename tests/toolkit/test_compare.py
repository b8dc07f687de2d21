"""Finished runs side by side: what the table says, how wide it is, and when it warns."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from config import Config, ConfigError, LoraSettings, save_config
from toolkit import compare
from toolkit.compare import (
    RunSummary,
    check_rows,
    compare_table,
    legend_labels,
    shown_targets,
    warnings,
    without_common_folders,
)
from toolkit.earlier_run import settings
from toolkit.text_width import width

SEVEN = list(LoraSettings().target_modules)


def run(name: str, base: float | None = 6.21, **changes: object) -> RunSummary:
    """A run of 20 steps that learned 4 tokens of 8 each, at 100 tokens/s."""
    rows = [{"step": 0, "eval_loss": base, "perplexity": 9.0}] if base else []
    for step in (10, 20):
        row = {"step": step, "loss": 5.0, "learning_rate": 1e-4, "tokens": 4 * step, "peak_gib": step / 10}
        rows.append(row | {"tokens_per_second": 100.0, "learned_tokens_per_second": 50.0})
        rows.append({"step": step, "eval_loss": 4.0 + step / 100, "perplexity": 55.0})
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return RunSummary(name, settings(Config()) | changes, rows, 315_392, 1_261_568, step=20)


def differing_runs(count: int) -> list[RunSummary]:
    targets = [SEVEN, SEVEN[:4], ["q_proj", "v_proj"]]
    return [
        run(
            f"/home/somebody/runs/實驗_{'abcdefgh'[i]}",
            lora__rank=2 << i,
            lora__target_modules=targets[i % 3],
            training__gradient_accumulation_steps=16 if i else 8,
            training__output_dir=str(i),
        )
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------ the table


def test_three_runs_fit_80_columns():
    table = compare_table(differing_runs(3), 80)
    assert table == (
        "                                實驗_a     實驗_b   實驗_c\n"
        "rank                                 2          4        8\n"
        "target_modules               all seven  attention     q, v\n"
        "gradient_accumulation_steps          8         16       16\n"
        "trainable parameters           315,392    315,392  315,392\n"
        "adapter                         1.3 MB     1.3 MB   1.3 MB\n"
        "steps                               20         20       20\n"
        "base loss                       6.2100     6.2100   6.2100\n"
        "validation loss                 4.1000     4.1000   4.1000\n"
        "best step                           10         10       10\n"
        "perplexity                      55.000     55.000   55.000\n"
        "tokens/s                           100        100      100\n"
        "peak GiB                          2.00       2.00     2.00\n"
        "time                           0.0 min    0.0 min  0.0 min"
    )


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_run_is_in_a_table_as_wide_as_the_terminal(count, columns):
    long = ["_".join(["name"] * 12)] + [f"short{i}" for i in range(count - 1)]
    for names in (long, [f"r{i}" for i in range(count)]):
        runs = [run(name, lora__rank=i + 1, data__dataset=f"/a/{name}.txt") for i, name in enumerate(names)]
        table = compare_table(runs, columns)
        assert max(map(width, table.splitlines())) <= columns
        ranks = [part for line in table.splitlines() if line.startswith("rank ") for part in line.split()[1:]]
        assert ranks == [str(i + 1) for i in range(count)]
        assert len(table.split("\n\n")) == (1 if columns == 200 or count < 7 else 2)
    assert "".join(compare_table(differing_runs(2), 40).split()).count("gradient_accumulation_steps") == 2


def test_a_long_entry_takes_several_lines_and_loses_nothing():
    name = "an_output_folder_with_a_name_of_more_columns_than_a_column_has"
    table = compare_table([run(name), run("b"), run("c")], 80)
    head = table[: table.index("trainable")].splitlines()
    assert len(head) > 1 and "".join(line.split()[0] for line in head) == name
    assert [line.split()[1:] for line in head] == [["b", "c"]] + [[]] * (len(head) - 1)


def test_a_run_of_before_has_one_speed():
    old = run("old")
    for row in old.rows:
        row.pop("learned_tokens_per_second", None)
    assert old.quantities()["tokens/s"] == "100"


def test_times_and_speeds_are_those_of_the_rows():
    rows = [{"step": s, "loss": 1.0, "tokens": t, "peak_gib": 1.0} for s, t in ((10, 600), (20, 1800))]
    rows[0] |= {"tokens_per_second": 20.0, "learned_tokens_per_second": 10.0}  # 60 s, 1,200 computed
    rows[1] |= {"tokens_per_second": 30.0, "learned_tokens_per_second": 10.0}  # 120 s, 3,600 computed
    found = RunSummary("a", settings(Config()), rows, 1, 1).quantities()
    assert found["time"] == "3.0 min" and found["tokens/s"] == f"{4800 / 180:,.0f}"
    assert found["base loss"] == found["validation loss"] == found["best step"] == found["perplexity"] == "-"


@pytest.mark.parametrize(
    "row",
    [
        [1],
        "x",
        {"loss": 1.0},
        {"step": "5"},
        {"step": 1, "eval_loss": 1.0},
        {"step": 10**400},
        {"step": 1, "loss": "x"},
    ],
)
def test_rows_of_another_shape_are_named(row):
    with pytest.raises(ValueError, match="row 2: expected"):
        check_rows([{"step": 0}, row])


def test_the_base_of_a_run_from_an_adapter_is_the_one_it_noted():
    rows = [{"step": 0, "eval_loss": 2.0, "perplexity": 7.4, "base_loss": 3.0}]
    rows += [{"step": 1, "eval_loss": 1.5, "perplexity": 4.5}]
    assert RunSummary("a", settings(Config()), rows, 1, 1).quantities()["base loss"] == "3.0000"


# ------------------------------------------------------------------------------------------------ names


def test_targets_are_given_by_name():
    assert shown_targets(SEVEN[::-1]) == "all seven" and shown_targets(SEVEN[:4]) == "attention"
    assert shown_targets(SEVEN[4:]) == "MLP" and shown_targets(["q_proj", "fc1"]) == "q, fc1"
    assert shown_targets("all-linear") == "all-linear"


@pytest.mark.parametrize(
    "paths, shown",
    [
        (["/a/b/x", "/a/b/y"], ["x", "y"]),
        (["/a/b/x", "/a/c/x"], ["b/x", "c/x"]),
        (["runs/x", "runs/x"], ["x", "x"]),
        (["x", "runs/y"], ["x", "runs/y"]),
        (["/a/x", "a/y"], ["/a/x", "a/y"]),
        (["Qwen/Qwen2.5-3B", "Qwen/Qwen3-4B"], ["Qwen2.5-3B", "Qwen3-4B"]),
    ],
)
def test_common_folders_are_left_out(paths, shown):
    assert without_common_folders(paths) == shown


def labels(*runs: RunSummary) -> list[str]:
    return legend_labels(list(runs))[0]


def test_the_legend_says_what_differs():
    assert legend_labels([run("out/a", lora__rank=4), run("out/b", lora__rank=8)]) == (["a: rank 4", "b: rank 8"], "")
    assert legend_labels([run("a"), run("b")]) == (["a", "b"], "")
    many = {"lora__rank": 3, "training__seed": 1, "data__dataset": "x" * 60, "data__text_column": "y" * 30}
    for label in labels(run("n" * 60), run("b" * 120, **many)):
        assert width(label) <= compare.LABEL and label.endswith(" …")


def test_what_most_runs_share_stands_once_in_the_legend():
    named, common = legend_labels(differing_runs(3))
    assert named == [
        "實驗_a: rank 2, target_modules all seven, gradient_accumulation_steps 8",
        "實驗_b: rank 4, target_modules attention",
        "實驗_c: rank 8, target_modules q, v",
    ]
    assert common == "if nothing else is given: gradient_accumulation_steps 16"


def test_the_legend_has_no_settings_that_are_not_set_or_not_used():
    limited = {"data__max_train_samples": 9}
    assert labels(run("a"), run("b", **limited)) == ["a", "b: max_train_samples 9"]
    found = legend_labels([run("a"), run("b", **limited), run("c", **limited)])
    assert found == (["a: no max_train_samples", "b", "c"], "if nothing else is given: max_train_samples 9")
    steps = {"training__max_steps": 5}  # they replace the epochs
    assert labels(run("a", training__num_epochs=2.0, **steps), run("b", **steps)) == ["a", "b"]
    assert labels(run("a", **steps), run("b")) == ["a: max_steps 5", "b: num_epochs 3.0"]
    assert labels(run("a"), run("b", **steps), run("c", **steps)) == ["a: num_epochs 3.0", "b", "c"]
    assert labels(run("a", training__save_steps=5, generation__top_p=0.5, performance__compile="off"), run("b")) == [
        "a",
        "b",
    ]


def test_paths_are_as_long_as_what_differs():
    def shown(key: str, *values: object) -> list[str]:
        return compare.shown_values(key, [run("a", **{key.replace(".", "__"): value}) for value in values])

    assert shown("data.dataset", "/root/w/text", "/tmp/詩.txt", "/root/w/text") == ["text", "詩.txt", "text"]
    assert shown("data.dataset", "/a/text", "/b/text") == [os.path.join("a", "text"), os.path.join("b", "text")]
    assert shown("model.name", "owner/a", "other/a", "a") == [
        os.path.join("owner", "a"),
        os.path.join("other", "a"),
        "a",
    ]
    assert shown("generation.system_prompt", "yes/no", "no/no") == ["yes/no", "no/no"]  # no path


# ------------------------------------------------------------------------------------------------ unfinished runs


def folder_of(tmp_path: Path, finished: bool, logged: str = "", **training: object) -> Path:
    """A folder as a run with a checkpoint at step 12 leaves it."""
    folder = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
    (folder / "checkpoint-12").mkdir(parents=True)
    for place in [folder] * finished + [folder / "checkpoint-12"]:
        save_file({"lora_A": torch.zeros(4, 8)}, place / "adapter_model.safetensors")
    config = Config(training=dataclasses.replace(Config().training, **training))
    save_config(config, folder / "config.yaml")
    losses = {0: 6.0, 4: 5.0, 8: 5.5, 12: 5.6}
    rows = [{"step": step, "eval_loss": loss, "perplexity": 9.0} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "training_log.txt").write_text(logged, encoding="utf-8")
    return folder


LOGGED = "step 10/20 | loss 1.0 | x\nfirst block: step 9/99 | loss 1\nstep 10/60 | loss 4.0 | lr 1e-3\n"


@pytest.mark.parametrize(
    "finished, logged, training, unfinished",
    [
        (True, "", {"max_steps": 12}, ""),
        (True, LOGGED, {"max_steps": 60}, "step 12 of 60"),  # continued with more steps, then stopped
        (True, LOGGED, {}, "step 12 of 60"),
        (True, LOGGED, {"early_stopping_patience": 2}, ""),
        (True, LOGGED, {"early_stopping_patience": 3}, "step 12 of 60"),
        (True, "", {}, ""),  # a log that somebody deleted
        (False, LOGGED, {}, "step 12 of 60"),
        (False, LOGGED, {"early_stopping_patience": 2}, "step 12 of 60"),
        (False, "", {}, "step 12"),
    ],
)
def test_a_run_that_has_not_finished_is_marked(tmp_path, finished, logged, training, unfinished):
    found = compare.read_run(folder_of(tmp_path, finished, logged, **training))
    assert found.unfinished == unfinished and found.parameters == 32
    assert found.quantities()["steps"] == (unfinished.removeprefix("step ") or "12")
    other = run(str(tmp_path / "other"), 6.0)
    named = [f"warning: {found.name} is not finished ({unfinished})"] if unfinished else []
    assert [line for line in warnings([found, other], []) if "finished" in line] == named
    assert labels(found, other)[0].startswith("run_0" + (f" (not finished: {unfinished})" if unfinished else ""))


def test_a_run_that_was_stopped_before_its_second_evaluation_has_the_loss_of_step_0(tmp_path):
    folder = folder_of(tmp_path, False, LOGGED)
    first = {"step": 0, "eval_loss": 6.2, "perplexity": 492.7}
    lines = [json.dumps(first), *(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for rows, expected in ((lines, ""), (lines[:1], ", and its loss is that of step 0")):
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (line,) = [line for line in warnings([compare.read_run(folder)], []) if "finished" in line]
        assert line.endswith(f"){expected}")


def test_a_folder_without_any_adapter_is_refused(tmp_path):
    folder = folder_of(tmp_path, False)
    (folder / "checkpoint-12").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        compare.read_run(folder)


# ------------------------------------------------------------------------------------------------ warnings


def warned(*runs: RunSummary) -> list[str]:
    return warnings(list(runs), compare.differing(list(runs)))


def test_losses_that_cannot_be_compared_are_named():
    assert warned(run("a"), run("b", 6.211, lora__rank=3), run("c", None)) == []  # the same but for the number format
    (line,) = warned(run("a"), run("b", 5.0, data__dataset="x.txt", data__max_length=64))
    assert line.startswith("warning: the data differ (dataset, max_length)")
    (line,) = warned(run("a"), run("b", 6.0, training__seed=7))  # another held-out part of the same file
    assert line.startswith("warning: the base's loss differs")
    (line,) = warned(run("a"), run("b", 5.0, model__name="other"))
    assert line.startswith("warning: the bases differ")
    assert warned(run("a"), run("b", 6.5, quantization__quant_type="fp4")) == []  # another base, on the same data
    assert warned(run("a"), run("b", data__max_train_samples=10)) == []  # other training data only: the table says it
    assert all(width(line) <= 100 for line in warned(run("a"), run("b", data__rows="lines")))
