"""The table of cards against arithmetic, the formula against what torch counts and what was measured, and `--plan --card`."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import train_qlora
from config import ConfigError, load_config
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from toolkit import memory
from toolkit.cards import BEST_ERROR, CARDS, RATES_ERROR, Card, Rates, find_card
from toolkit.memory_plan import GIB, configured_shape, step_flops, step_seconds
from toolkit.model_shape import model_shape

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


SOLD = {
    6: "RTX 2060, RTX 3060 Laptop", 10: "RTX 3080", 12: "RTX 3060, RTX 4070, RTX 5070", 32: "RTX 5090", 40: "A100 40GB",
    8: "RTX 2070, RTX 3050, RTX 3070, RTX 4060, RTX 4060 Laptop, RTX 4060 Ti 8GB, RTX 5060",
    16: "RTX 4060 Ti 16GB, RTX 4080, RTX 5080, T4", 24: "RTX 3090, RTX 4090, L4, A10", 48: "A6000, L40S",
    80: "A100 80GB, H100", 141: "H200",
}  # fmt: skip


def test_cards_are_of_the_size_that_they_are_sold_with():
    for size, names in SOLD.items():
        assert ", ".join(card.name for card in CARDS if card.sold_gb == size) == names
    assert sum(names.count(",") + 1 for names in SOLD.values()) == len(CARDS)


def test_the_link_is_what_was_measured_on_an_h200_and_half_of_it_has_half_the_lanes():
    """54.5 GB/s over PCIe 5.0 x16; PCIe doubles with each generation, to a hundredth."""
    assert "5.5 ms per layer at 54.5 GB/s" in MEASUREMENTS
    found = {name: find_card(name).rates.link for name in ("H200", "RTX 5060", "RTX 4090", "RTX 4060", "T4")}
    assert found["H200"] == pytest.approx(54.5e9, rel=0.001)
    for name, times in (("RTX 5060", 2), ("RTX 4090", 2), ("RTX 4060", 4), ("T4", 4)):
        assert found[name] * times == pytest.approx(found["H200"], rel=0.01)


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


def measured() -> list[tuple[Card, int, int, int, int, float]]:
    """Return (card, micro-batch, length, checkpointed layers, tokens/s, stated error) of the tables and sentences in docs/measurements.md."""
    h100, rows = find_card("H100"), []
    tables = MEASUREMENTS.split("## Training speed")[1].split("### Where the time")[0].split("Older code on one H100")
    for card, table in zip((find_card("H200"), h100), tables, strict=True):
        for first, checkpointing, speed in re.findall(
            r"^\| (.*?\d x \d[^|]*) \| (on|off|\d+ of 36 layers) \| ([\d,]+) \|", table, flags=re.M
        ):
            if "dropout" in first or "compile" in first:
                continue
            batch, length = map(int, re.findall(r"(\d+) x (\d+)", first)[0])
            part = re.match(r"(\d+) multiprocessors", first)
            layers = (
                {"on": 36, "off": 0}[checkpointing] if checkpointing in ("on", "off") else int(checkpointing.split()[0])
            )
            error = BEST_ERROR if card is h100 else RATES_ERROR
            rows.append((confined(card, part and int(part[1])), batch, length, layers, number(speed), error))
    text = MEASUREMENTS.split("### Which shape")[1].split("###")[0]
    for batch, layers, small, large in re.findall(
        r"(\d+) x 512(?: with (\d+) layers)? ([\d,]+\d) and\s+([\d,]+\d)", text
    ):
        for part, speed in ((24, small), (60, large)):
            rows.append((confined(h100, part), int(batch), 512, int(layers or 0), number(speed), BEST_ERROR))
    moved = MEASUREMENTS.split("## The move of files")[1].split("## ")[0]
    for batch, layers, speed in ((1, 0, "23,669"), (16, 36, "32,652")):
        assert speed in moved
        rows.append((find_card("H200"), batch, 512, layers, number(speed), BEST_ERROR))
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
    for card, batch, length, layers, speed, error in rows:
        config = load_config((), {"data.max_length": str(length)})
        kept = Kept(attention=layers) if layers == 32 else NOTHING_KEPT  # the one row since layers keep it
        estimate = batch * length / step_seconds(shape, config, card.rates, batch, layers, kept=kept)
        assert estimate == pytest.approx(speed, rel=error), (card, batch, length, layers)


def with_layers(model: Path, layers: int) -> Path:
    """Return a folder with the config.json of a model of other depth."""
    folder = model / str(layers)
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_estimates_of_a_mixture_are_within_the_stated_error_where_that_is_said(qwen_30b):
    """The rows of 12 and 48 layers; those of 4 were measured beside other work."""
    table = MEASUREMENTS.split("### A mixture of experts")[1].split("###")[0]
    rows = re.findall(r"^\| (12|48) \| `experts: (gpu|cpu)` \| ([\d,]+) \|", table, flags=re.M)
    assert len(rows) == 3
    for layers, experts, speed in rows:
        flags = {"model.name": str(with_layers(qwen_30b, int(layers))), "data.max_length": 2048}
        config = load_config((), {**flags, "quantization.experts": experts})
        seconds = step_seconds(configured_shape(config), config, find_card("H200").rates, 1, int(layers))
        assert 2048 / seconds == pytest.approx(number(speed), rel=BEST_ERROR), (layers, experts)


def test_experts_in_16_bit_are_not_unpacked(qwen_30b):
    """The difference is the time of 2.5 bytes per weight of the experts, forward, backward and recomputed."""
    found = []
    for experts in ("gpu", "16bit"):
        config = load_config((), {"model.name": str(qwen_30b), "quantization.experts": experts})
        shape = configured_shape(config)
        found.append(step_seconds(shape, config, Rates(), 1, 48))
    assert found[0] - found[1] == pytest.approx(2.5 * 3 * 48 * 128 * 3 * 768 * 2048 / Rates().bytes)


def test_the_plan_of_a_mixture_does_not_promise_what_only_dense_models_were_measured_for(qwen_30b, qwen_3b, capsys):
    flags = ("--card", "RTX 4090", "--model_name")
    _, out = plan(capsys, *flags, qwen_30b, "--experts", "cpu")
    assert "of mixtures of experts only Qwen3-30B-A3B's shape on an H200 was measured" in out
    assert "  experts come from main memory at 27.3 GB/s (PCIe 4.0 x16, if the slot has it)\n" in out
    assert "measured on an H100 and an H200; no other card was measured" not in out
    _, dense = plan(capsys, *flags, qwen_3b)
    assert "measured on an H100 and an H200; no other card was measured" in dense and "main memory at" not in dense


def test_the_way_from_main_memory_of_a_gpu_at_hand_is_measured_where_it_counts(qwen_3b, monkeypatch):
    shape = model_shape(str(qwen_3b))
    monkeypatch.setattr(memory, "measure_rates", lambda device: Rates(650e12, 2.4e12))
    monkeypatch.setattr(memory, "measure_link", lambda device, away=False: 20e9 if away else 50e9)
    monkeypatch.setattr(memory, "main_memory", lambda: 8 * GIB)
    device, found = torch.device("cuda", 0), []
    ways = [
        ("gpu", 0, "auto"),
        ("cpu", "auto", "auto"),
        ("gpu", "auto", "off"),
        ("gpu", "auto", "auto"),
        ("gpu", 3, "auto"),
    ]
    for experts, swaps, compiles in ways:
        overrides = {
            "quantization.experts": experts,
            "performance.swap_activations": swaps,
            "performance.compile": compiles,
        }
        found.append(memory.rates_here(device, load_config((), overrides), shape))
    rates = 650e12, 2.4e12
    assert found == [Rates(*rates), Rates(*rates, 50e9), Rates(*rates), *[Rates(*rates, 20e9, 8 * GIB)] * 2]

    def refuse(device, away=False):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(memory, "measure_link", refuse)  # no main memory can be pinned: no layer is swapped
    assert memory.rates_here(device, load_config(()), shape) == Rates(*rates)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_copy_from_main_memory_is_slower_than_one_within_the_gpu():
    device = torch.device("cuda", 0)
    assert 1e9 < memory.measure_link(device) < memory.measure_rates(device).bytes
    assert 1e9 < memory.measure_link(device, away=True) < memory.measure_rates(device).bytes


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
    monkeypatch.setattr(memory, "measure_link", lambda device, away=False: 20e9)
    monkeypatch.setattr(memory, "memory_limit", lambda *arguments: 79 * GIB)
    code, out = plan(capsys, "--model_name", qwen_3b)
    assert code == 0 and "no GPU" not in out and "data sheet" not in out and "fits in 79.00 GiB\n" in out
    found = re.search(
        r"estimated, not measured: ([\d,]+) tokens/s, .* per million tokens \(this GPU, measured now: products "
        r"650\.0 TFLOP/s, copies 2,400 GB/s\)\n",
        out,
    )
    assert number(found[1]) == pytest.approx(38765, rel=BEST_ERROR)  # 16 x 512 without checkpointing
    _, other = plan(capsys, "--model_name", qwen_3b, "--card", "RTX 4060")
    assert "card: RTX 4060, not at hand" in other and "fits in 7.00 GiB\n" in other


def test_every_card_keeps_what_driver_and_desktop_take():
    assert find_card("RTX 4060").free_gib == pytest.approx(8188 / 1024 - 1.0)
    assert find_card("H200").free_gib * GIB == pytest.approx(143771 * 2**20 - GIB / 2)
