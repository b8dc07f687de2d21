"""The pictures of runs: loss and learning rate of one, the losses of several. Drawing one imports matplotlib."""

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.checkpoints import write_picture
from toolkit.startup import visible
from toolkit.text_width import width, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (12, 4.5)  # inches
LEGEND_LINE = 0.21  # inches, by which each line makes the picture of a comparison higher
WEIGHTS = (400, 500, "normal", "regular", "book", "roman", "medium")  # 500: WenQuanYi Zen Hei has no other one
LOSS = {"xlabel": "optimizer step", "ylabel": "loss per token (nats)"}

# ------------------------------------------------------------------------------------------------ what is drawn


def points(history: list[dict], key: str) -> dict[int, float]:
    """Return the values of one key of metrics by their step."""
    return {row["step"]: row[key] for row in history if key in row}


def training_losses(history: list[dict]) -> dict[int, float]:
    """Return the training losses to draw by their step: each the mean over the steps since the one before.

    A run's last step is logged even if it is soon after the row before, and the run may be continued from there. The mean
    over so few steps scatters more than the others and can look like a change, so the two rows become one point, weighted
    by their tokens.
    """
    rows = [row for row in history if "loss" in row]
    steps = np.diff([row["step"] for row in rows], prepend=0)
    found: dict[int, float] = {}
    first = 0  # the first of the rows that become one point
    for i, row in enumerate(rows):
        if i and steps[i] < steps[i - 1]:
            del found[rows[i - 1]["step"]]
            start = rows[first - 1]["tokens"] if first else 0
            one = rows[first : i + 1]
            tokens = np.diff([other["tokens"] for other in one], prepend=start)
            found[row["step"]] = float(np.average([other["loss"] for other in one], weights=tokens))
        else:
            first, found[row["step"]] = i, row["loss"]
    return found


def learning_rates(history: list[dict], schedule: Sequence[float]) -> dict[int, float]:
    """Return the learning rate of each step as far as it is known: the logged ones, and the schedule between them.

    schedule: the rates of steps 1, 2, ... It is not used before a logged rate that differs from it, since a run that
    continued with another number of steps had another schedule until then.
    """
    logged = points(history, "learning_rate")
    found, start = dict(logged), 0
    for step in [*logged, len(schedule)]:
        known = schedule[start:step]
        if known and math.isclose(logged.get(step, known[-1]), known[-1], rel_tol=1e-6):
            found |= dict(enumerate(known, start + 1)) | {step: logged.get(step, known[-1])}
        start = step
    return dict(sorted(found.items()))


def rates_of(scheduler: Any, steps: int) -> list[float]:
    """Return the learning rate of each of the first steps of a torch LambdaLR."""
    return [scheduler.base_lrs[0] * scheduler.lr_lambdas[0](done) for done in range(steps)]


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (font families, texts) that matplotlib can draw: with other fonts for what its own lacks, such as Chinese.

    Characters that no installed font has are escaped as Python does it.
    """
    from matplotlib import font_manager

    families = [font_manager.FontProperties().get_name()]
    missing = {ord(char) for text in texts for char in text}
    missing -= font_manager.get_font(font_manager.findfont(families[0])).get_charmap().keys()
    if missing:  # matplotlib keeps a list of fonts, which lacks those that were installed since
        listed = {font.fname for font in font_manager.fontManager.ttflist}
        for path in sorted(set(font_manager.findSystemFonts()) - listed):
            with contextlib.suppress(OSError, RuntimeError):
                font_manager.fontManager.addfont(path)
    for font in font_manager.fontManager.ttflist if missing else ():
        usual = font.style == "normal" and font.weight in WEIGHTS
        if not usual or font.name.startswith("Last Resort"):  # matplotlib's own: a box for every character
            continue
        with contextlib.suppress(OSError, RuntimeError):  # a font that matplotlib cannot read
            if held := missing & font_manager.get_font(font.fname).get_charmap().keys():
                families.append(font.name)
                missing -= held
    escaped = {code: chr(code).encode("unicode_escape").decode() for code in missing}
    return families, [visible(text).replace("\n", "\\n").translate(escaped) for text in texts]


# ------------------------------------------------------------------------------------------------ the pictures


def new_figure() -> tuple[Any, "Axes", "Axes"]:
    """Return an empty picture and its two halves."""
    from matplotlib.figure import Figure  # opens no window, keeps no global state; takes a second to import

    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)  # step 0 is in both, also of a single point
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, left, right


def draw(axes: "Axes", values: dict[int, float], **style: Any) -> None:
    """Draw values by their step as a line; markers show one or two, which are no line."""
    if len(values) <= 2:
        style = {"marker": "o", "markersize": 4} | style
    axes.plot(list(values), list(values.values()), **style)


def plot_training_curves(history: list[dict], path: str | Path, schedule: Sequence[float] = ()) -> None:
    """Draw one run: training and validation loss on the left, the learning rate on the right.

    history: rows of metrics.jsonl. path: of the PNG file. schedule: as in `learning_rates`.
    """
    figure, left, right = new_figure()
    draw(left, training_losses(history), label="training", linewidth=1.2)
    draw(left, points(history, "eval_loss"), label="validation", marker="o", markersize=4)
    draw(right, learning_rates(history, schedule), color="tab:green", linewidth=1.2)
    left.set(title="Loss", **LOSS)
    left.legend()
    right.set(xlabel="optimizer step", ylabel="learning rate", title="Learning rate")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    write_picture(figure, Path(path))


def call_plot(plot: Callable, history: list[dict], path: Path, schedule: Sequence[float]) -> None:
    """Call plot_training_curves, or a user's function in its place, which may take the history and the path only."""
    more = {"schedule": schedule} if "schedule" in inspect.signature(plot).parameters else {}
    plot(history, path, **more)


def plot_comparison(labels: Sequence[str], histories: Sequence[list[dict]], path: Path, title: str = "") -> None:
    """Draw the curves of several runs into one picture: training loss on the left, validation loss on the right.

    labels: what the legend calls each run, under its title. histories: rows of metrics.jsonl of each.
    """
    figure, left, right = new_figure()
    for history in histories:
        draw(left, training_losses(history), linewidth=1.2)
        draw(right, points(history, "eval_loss"), linewidth=1.2, marker="o", markersize=3)
    left.set(title="Training", **LOSS)
    right.set(title="Validation", **LOSS)
    families, (title, *labels) = drawable([title, *labels])
    columns = max(1, 120 // (max(map(width, labels)) + 6))
    names = [str(number) for number in range(len(labels))]
    prop = {"family": families}
    place = {"loc": "outside lower center", "ncols": columns, "alignment": "left"}
    legend = figure.legend(left.lines, names, prop=prop, **place)
    heading = wrapped(title, 120, indent="") if title else []
    legend.set_title("\n".join(heading), prop=prop)
    legend.get_title().set_parse_math(False)
    lines = len(heading) + math.ceil(len(labels) / columns)
    figure.set_figheight(SIZE[1] + LEGEND_LINE * lines)
    # Their texts come now, since a legend leaves out a label that begins with _ and reads $...$ as mathematics.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    write_picture(figure, path)
