"""The table of cards against arithmetic, the formula against what torch counts and what was measured, and `--plan --card`."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import train_qlora
from config import ConfigError, load_config
from toolkit import memory
from toolkit.cards import CARDS, RATES_ERROR, Card, Rates, find_card
from toolkit.memory_plan import GIB, model_shape, step_flops, step_seconds

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_rate_is_that_of_the_multiprocessors_at_a_clock_that_exists(card):
    """FLOP per multiprocessor and cycle, summed in fp32: CUDA C++ Programming Guide, throughput of tensor cores."""
    big = {7.5: 1024, 8.0: 2048, 8.6: 1024, 8.9: 1024, 9.0: 4096}
    each = 512 if card.name.startswith("RTX") else big[card.capability]
    assert 1.3 < card.tensor * 1e3 / card.multiprocessors / each < 2.7  # GHz


def test_the_default_rates_are_those_of_the_default_card():
    assert Rates() == find_card("RTX 4060").rates


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 3060", "RTX 3060"),
        ("rtx3060", "RTX 3060"),
        ("3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop"),
        ("RTX 4060Ti (16 GB)", "RTX 4060 Ti 16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_card_is_found_however_its_name_is_written(written, name):
    assert find_card(written).name == name


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("GTX 4060", "RTX 4060"),
        ("T4 16GB", "T4"),
        ("4060 Ti", "RTX 4060 or RTX 4060 Ti 8GB or RTX 4060 Ti 16GB"),
        ("A100", "A100 40GB or A100 80GB"),
    ],
)
def test_an_unknown_card_is_one_line_with_the_names(written, hint, capsys):
    assert train_qlora.main(["--plan", "--card", written]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --card: expected one of RTX 2060, ") and line.endswith(f"did you mean {hint}?")
    assert all(card.name in line for card in CARDS) and repr(written) in line


def test_a_name_like_none_has_no_hint():
    with pytest.raises(ConfigError) as caught:
        find_card("")
    assert str(caught.value).endswith("got ''")


def test_the_flag_goes_with_the_plan(capsys):
    assert train_qlora.main(["--card", "T4"]) == 2
    assert capsys.readouterr().err == "error: --card: goes with --plan\n"


# ------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_flops_are_those_that_torch_counts(random_models, family, checkpointed):
    """Forward and backward of a frozen model in which only the embedding's output wants a gradient, as with adapters."""
    folder, config = str(random_models(family)), load_config((), {"data.max_length": "128"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    ids = torch.randint(0, 4000, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    shape = model_shape(folder)
    layers = shape.layers if checkpointed else 0
    # eager attention computes the whole square, and its backward twice its forward
    attention = 2 * 128 * 128 * shape.query * shape.layers * (4 * (3 + bool(checkpointed)))
    ours = step_flops(shape, config, 2, layers)
    causal = 2 * 128 * 2 * 128 * shape.query * shape.layers * (3.5 + bool(checkpointed))
    assert ours - causal == sum(counted.values()) - attention


def test_a_longer_row_costs_the_square_in_attention_only(qwen_3b):
    shape = model_shape(str(qwen_3b))
    flops = {n: step_flops(shape, load_config((), {"data.max_length": str(n)}), 1, 0) for n in (1024, 2048, 4096)}
    extra = flops[2048] - 2 * flops[1024]
    assert extra == 3.5 * 2 * 2 * 1024**2 * shape.query * shape.layers
    assert flops[4096] - 4 * flops[1024] == 6 * extra


def measured() -> list[tuple[Card, int, int, int, int]]:
    """Return (card, micro-batch, length, checkpointed layers, tokens/s) of the tables and sentences in docs/measurements.md."""
    h100, rows = find_card("H100"), []
    table = MEASUREMENTS.split("## Training speed")[1].split("### Where the time")[0]
    for first, checkpointing, speed in re.findall(
        r"^\| (.*?\d x \d[^|]*) \| (on|off) \| ([\d,]+) \|", table, flags=re.M
    ):
        if "dropout" in first or "compile" in first:
            continue
        batch, length = map(int, re.findall(r"(\d+) x (\d+)", first)[0])
        part = re.match(r"(\d+) multiprocessors", first)
        rows.append((confined(h100, part and int(part[1])), batch, length, 36 * (checkpointing == "on"), number(speed)))
    text = MEASUREMENTS.split("### Which shape")[1].split("###")[0]
    for batch, layers, small, large in re.findall(
        r"(\d+) x 512(?: with (\d+) layers)? ([\d,]+\d) and\s+([\d,]+\d)", text
    ):
        for part, speed in ((24, small), (60, large)):
            rows.append((confined(h100, part), int(batch), 512, int(layers or 0), number(speed)))
    moved = MEASUREMENTS.split("## The move of files")[1].split("## ")[0]
    for batch, layers, speed in ((1, 0, "23,669"), (16, 36, "32,652")):
        assert speed in moved
        rows.append((find_card("H200"), batch, 512, layers, number(speed)))
    return rows


def number(text: str) -> int:
    return int(text.replace(",", ""))


def confined(card: Card, multiprocessors: int | None) -> Card:
    """Return the card with some of its multiprocessors and all of its memory's bandwidth."""
    count = multiprocessors or card.multiprocessors
    return dataclasses.replace(card, tensor=card.tensor * count / card.multiprocessors, multiprocessors=count)


def test_the_estimates_are_within_the_stated_error_of_what_was_measured(qwen_3b):
    shape, rows = model_shape(str(qwen_3b)), measured()
    assert len(rows) >= 18 and {row[0].multiprocessors for row in rows} == {24, 60, 132}
    for card, batch, length, layers, speed in rows:
        config = load_config((), {"data.max_length": str(length)})
        estimate = batch * length / step_seconds(shape, config, card.rates, batch, layers)
        assert estimate == pytest.approx(speed, rel=RATES_ERROR), (card, batch, length, layers)


# ------------------------------------------------------------------------------------------------ --plan --card


def plan(capsys, *flags: object) -> tuple[int, str]:
    code = train_qlora.main(["--plan", *map(str, flags)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "code"), [("RTX 2060", 0), ("RTX 4060", 0), ("RTX 5090", 0), ("T4", 0), ("RTX 3060 Laptop", 3)]
)
def test_what_fits_a_card_is_what_fits_its_memory(card, code, qwen_3b, capsys):
    """The same plan as with the card's memory as a limit; with 16-bit weights the 3B is too large for 5 GiB."""
    bits = ("--load_in_4bit", "false") if code else ()
    found, out = plan(capsys, "--model_name", qwen_3b, "--card", card, *bits)
    limit = find_card(card).free_gib
    total = float(re.search(r"^  total +([\d.]+)$", out, flags=re.M)[1])
    assert (found, total <= limit) == (code, not code)
    assert f"{'fits' if not code else 'does not fit'} in {limit:.2f} GiB\n" in out
    assert ("float16 with a loss scaler" in out) == (card in ("RTX 2060", "T4"))
    _, same = plan(capsys, "--model_name", qwen_3b, "--memory_limit_gib", limit, *bits)
    assert float(re.search(r"^  total +([\d.]+)$", same, flags=re.M)[1]) == pytest.approx(total, rel=0.1)


def test_a_limit_below_the_cards_memory_counts(qwen_3b, capsys):
    assert (
        "fits in 5.00 GiB\n" in plan(capsys, "--model_name", qwen_3b, "--card", "RTX 4090", "--memory_limit_gib", 5)[1]
    )


def test_the_time_of_a_run_is_its_tokens_at_that_speed(tiny_model, corpus, capsys):
    """Three epochs of the blocks that a run would train on, and max_steps instead of them."""
    flags = ("--model_name", tiny_model, "--dataset", corpus, "--max_length", 64, "--card", "T4")
    code, out = plan(capsys, *flags)
    speed = number(re.search(r"estimated, not measured: ([\d,]+) tokens/s", out)[1])
    tokens, steps = map(number, re.search(r"one epoch: ([\d,]+) tokens, ([\d,]+) optimizer steps", out).groups())
    total = re.search(r"the whole run: (\d+) steps \(3 epochs\), about (.*?) of training \(estimated\)", out)
    assert code == 0 and int(total[1]) == 3 * steps
    assert total[2] == memory.duration(3 * tokens / speed)
    code, out = plan(capsys, *flags, "--max_steps", 2 * steps)
    assert (
        f"the whole run: {2 * steps} steps (2 epochs), about {memory.duration(2 * tokens / speed)} of training" in out
    )


def test_the_gpu_at_hand_is_told_without_a_name(qwen_3b, capsys, monkeypatch):
    """With its memory and the rates that it is measured to have; here both are those of an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "measure_rates", lambda device: Rates(650e12, 2.4e12))
    monkeypatch.setattr(memory, "memory_limit", lambda *arguments: 79 * GIB)
    code, out = plan(capsys, "--model_name", qwen_3b)
    assert code == 0 and "no GPU" not in out and "data sheet" not in out and "fits in 79.00 GiB\n" in out
    found = re.search(
        r"estimated, not measured: ([\d,]+) tokens/s, .* per million tokens \(this GPU, measured now: products "
        r"650\.0 TFLOP/s, copies 2,400 GB/s\)\n",
        out,
    )
    assert number(found[1]) == pytest.approx(38765, rel=RATES_ERROR)  # 16 x 512 without checkpointing
    _, other = plan(capsys, "--model_name", qwen_3b, "--card", "RTX 4060")
    assert "card: RTX 4060, not at hand" in other and "fits in 7.00 GiB\n" in other


def test_every_card_keeps_what_driver_and_desktop_take():
    assert find_card("RTX 4060").free_gib == pytest.approx(8188 / 1024 - 1.0)
    assert find_card("H200").free_gib * GIB == pytest.approx(143771 * 2**20 - GIB / 2)
