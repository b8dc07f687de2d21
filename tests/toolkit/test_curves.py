"""The pictures of runs: what is drawn, and that nothing in a folder's name breaks them."""

import dataclasses
import math
import warnings

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib import font_manager

from config import TrainingConfig
from toolkit import curves
from toolkit.curves import drawable, learning_rates, plot_comparison, plot_training_curves, rates_of, training_losses
from train_qlora import create_scheduler


def logged(losses: list[float], tokens: list[int], every: int, rates: list[float] | None = None) -> list[dict]:
    """Return the rows of metrics of a run with these losses and tokens in its steps, as train_qlora logs them."""
    rows, start = [], 0
    for step in range(1, len(losses) + 1):
        if step % every == 0 or step == len(losses):
            mean = np.average(losses[start:step], weights=tokens[start:step])
            rate = rates[step - 1] if rates else 1e-4
            rows.append({"step": step, "loss": mean, "tokens": sum(tokens[:step]), "learning_rate": rate})
            start = step
    return rows


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, kept."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


# ------------------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("steps, every", [(11, 5), (12, 5), (10, 5), (6, 5), (5, 5), (4, 5), (1, 5), (2, 1)])
def test_every_point_is_a_mean_over_the_steps_since_the_one_before(steps, every):
    random = np.random.default_rng(steps)
    losses, tokens = list(random.normal(3, 1, steps)), [int(n) for n in random.integers(20, 400, steps)]
    found = training_losses(logged(losses, tokens, every))
    ends = [0, *found]
    assert ends[-1] == steps and list(found) == sorted(found)
    for start, end in zip(ends, ends[1:], strict=False):
        assert found[end] == pytest.approx(np.average(losses[start:end], weights=tokens[start:end]))
        assert end - start >= min(every, steps)  # none is over fewer steps than the others


def test_where_a_finished_run_was_continued_no_point_scatters():
    """126 steps, logged every 5 and at the end, then 24 more: the one step of row 126 is a point with the five before."""
    random = np.random.default_rng(0)
    losses, tokens = list(random.normal(3, 1, 150)), [int(n) for n in random.integers(20, 400, 150)]
    rows = logged(losses[:126], tokens[:126], 5)
    later = [row for row in logged(losses, tokens, 5) if row["step"] > 126]
    later[0]["loss"] = float(np.average(losses[126:130], weights=tokens[126:130]))  # of steps 127 to 130
    found = training_losses([*rows, *later])
    assert 125 not in found and {120, 126, 130, 135} <= found.keys()
    assert found[126] == pytest.approx(np.average(losses[120:126], weights=tokens[120:126]))
    few = logged(losses[:17], tokens[:17], 10)  # and where it stopped at 15, then at 17
    few[1:] = [
        few[1] | {"step": 15, "tokens": sum(tokens[:15]), "loss": np.average(losses[10:15], weights=tokens[10:15])},
        few[1],
    ]
    few[2] = few[2] | {"loss": np.average(losses[15:17], weights=tokens[15:17])}
    assert training_losses(few) == pytest.approx({17: np.average(losses[:17], weights=tokens[:17])})
    assert found[130] == pytest.approx(later[0]["loss"])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("every", [1, 4, 10, 50])
def test_the_rate_of_every_step_is_drawn(name, every):
    """The reference is what a torch optimizer's schedule gives step by step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    training = TrainingConfig(lr_scheduler=name, warmup_ratio=0.3, learning_rate=2e-4)
    scheduler, rates = create_scheduler(optimizer, training, 37), []
    for _ in range(37):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates_of(scheduler, 37) == pytest.approx(rates)
    found = learning_rates(logged([1.0] * 37, [9] * 37, every, rates), rates_of(scheduler, 37))
    assert found == pytest.approx(dict(enumerate(rates, 1)))
    assert rates[0] == pytest.approx(2e-4 / math.ceil(0.3 * 37))  # the warm-up is there


def test_an_earlier_schedule_is_drawn_as_it_was_logged():
    before, now = [1e-3] * 10, [5e-4] * 20
    rows = logged([1.0] * 20, [9] * 20, 5, before + now[10:])
    assert learning_rates(rows, now) == {5: 1e-3, 10: 1e-3} | dict.fromkeys(range(11, 21), 5e-4)
    assert learning_rates(rows, ()) == {5: 1e-3, 10: 1e-3, 15: 5e-4, 20: 5e-4}
    stopped = learning_rates(rows[:3], now[:18])  # at a step that is not logged
    assert list(stopped) == [5, 10, *range(11, 19)]


@pytest.mark.parametrize("steps, markers", [(1, True), (2, True), (3, False)])
def test_few_points_are_seen(tmp_path, drawn, steps, markers):
    plot_training_curves(logged([3.0] * steps, [9] * steps, 1), tmp_path / "a.png", [1e-4] * steps)
    for axes in drawn[0].axes:
        assert (axes.lines[0].get_marker() not in ("", "None")) == markers
        assert len(axes.lines[0].get_xdata()) == steps


# ------------------------------------------------------------------------------------------------ names


NAMES = ["_hidden", "$x^2$ and $", "實驗一", "a\nb", "😀", "x" * 50, "same", "same"]


def test_the_legend_has_every_name_and_nothing_warns(tmp_path, drawn):
    rows = logged([3.0] * 7, [9] * 7, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_comparison(NAMES, [rows] * len(NAMES), tmp_path / "compare.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert [texts[i] for i in (0, 1, 3, 5, 6, 7)] == ["_hidden", "$x^2$ and $", "a\\nb", "x" * 50, "same", "same"]
    assert len({line.get_color() for line in drawn[0].axes[0].lines}) == len(NAMES)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_font_is_found_for_what_the_first_one_lacks(monkeypatch):
    own, letter = font_manager.FontProperties().get_name(), "\u1d81"  # of matplotlib's own fonts only STIX has it
    usual = [font for font in font_manager.fontManager.ttflist if "ttf/" in font.fname.replace("\\", "/")]
    comes_with = [font for font in usual if font.name in (own, "STIXGeneral") or font.name.startswith("Last Resort")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", comes_with)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert drawable(["plain", f"a{letter}"]) == ([own, "STIXGeneral"], ["plain", f"a{letter}"])
    assert drawable(["plain"]) == ([own], ["plain"])
    assert drawable(["文a"]) == ([own], ["\\u6587a"])  # and not the boxes of the last resort


@pytest.mark.parametrize("weight", [400, 500, 700])
def test_a_font_is_found_that_matplotlib_has_not_listed_yet(monkeypatch, weight):
    """Or whose only weight is 500, such as that of WenQuanYi Zen Hei, but no bold one."""
    own, letter = font_manager.FontProperties().get_name(), "\u1d81"
    listed = font_manager.fontManager.ttflist
    installed = next(
        font for font in listed if font.name == "STIXGeneral" and (font.style, font.weight) == ("normal", 400)
    )
    fonts = [font for font in listed if font.name == own]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [installed.fname])
    monkeypatch.setattr(
        font_manager.fontManager, "addfont", lambda path: fonts.append(dataclasses.replace(installed, weight=weight))
    )
    found = ([own, "STIXGeneral"], [letter]) if weight < 700 else ([own], ["\\u1d81"])
    assert drawable([letter]) == found


def test_a_user_may_plot_by_history_and_path_alone(tmp_path):
    seen = []
    curves.call_plot(lambda history, path: seen.append((history, path)), [], tmp_path, [1.0])
    curves.call_plot(lambda history, path, schedule=(): seen.append(schedule), [], tmp_path, [1.0])
    assert seen == [([], tmp_path), [1.0]]
