"""The plan against what autograd keeps and what the weights take, the fit, and runs that run out of memory."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import train_qlora
from config import ConfigError, ModelConfig, load_config
from fast_path import attention, choice, compiled, dropout, experts, families, micro_step
from fast_path.families import expert_parameters
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from fast_path.layers import fuse
from fast_path.loss import CausalLMLoss
from quantization_utils import (
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
)
from tests.families import build
from toolkit import evaluation, expert_plan, memory, memory_plan
from toolkit.cards import CARDS
from toolkit.expert_plan import expert_shape
from toolkit.memory import savings
from toolkit.memory_plan import COMPILED, FUSED, GIB, PLAIN, MemoryPlan, Rates, fit, plan_memory, step_down
from toolkit.model_shape import adapter_parameters, model_shape


def settings(**flags: object):
    return load_config((), {name.replace("__", "."): str(value) for name, value in flags.items()})


# ------------------------------------------------------------------------------------------------ the plan


def flash_on_cpu(q, k, v, starts, scale, cap, window):
    """Return SDPA's attention in the place of `plain_capped_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def linears_of(folder: str) -> list[str]:
    """Return the names of the linears that get an adapter: all of a layer's."""
    return list(itertools.chain(*model_shape(folder).family.groups))


def saved_by_autograd(
    folder: str, path: str, p: float, layers: int, checkpointed: bool = False, kept: Kept = NOTHING_KEPT
) -> int:
    """Return the bytes that the first layers keep for the backward of 2 x 200 tokens, as autograd's hooks see them."""
    model, _ = load_model_and_tokenizer(folder, create_bnb_config())
    model.config.sliding_window = None if getattr(model.config, "sliding_window", None) is None else 4096  # no mask
    lora = create_lora_config(dropout=p, target_modules=linears_of(folder))
    model = prepare_model_for_training(model, lora, checkpointed)
    attention.use_causal_attention(model.get_base_model())
    clock = dropout.DropoutClock(42, torch.device("cpu"))
    dropout.use_stateless_dropout(model, p, clock)
    loss = CausalLMLoss(model, torch.bfloat16)
    if path != PLAIN:
        fuse(model, clock, p, kernels=False)
    if path == COMPILED:
        torch._dynamo.reset()
        compiled.compile_layers(model, kept)
    model.train()
    loss.decoder.layers = loss.decoder.layers[:layers]
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if {200, 400, 800} & set(
            tensor.shape
        ):  # 800: two experts per token; the rest, weights and copies, does not grow
            alive.append(tensor)
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 4000, (2, 200))
    clock.set(0, torch.tensor([0, 1]))
    torch.set_autocast_enabled("cuda", True)  # what peft asks before it casts an adapter's input to fp32: as on a GPU
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(input_ids=ids, labels=ids)
    finally:
        torch.set_autocast_enabled("cuda", False)
    return sum(seen.values())


# The last keeps its own attention and MLP.
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "smollm3", "olmo2", "gemma2", "gemma3", "phi3", "gemma"])
@pytest.mark.parametrize("path, p", [(path, p) for path in (PLAIN, FUSED, COMPILED) for p in (0.0, 0.05)])
def test_saved_activations_are_what_autograd_keeps(random_models, monkeypatch, kind, path, p):
    folder = str(random_models(kind))
    monkeypatch.setattr(attention, "plain_capped_attention", flash_on_cpu)  # keeps what the kernels of a GPU keep
    found = (saved_by_autograd(folder, path, p, 2) - saved_by_autograd(folder, path, p, 1)) / 400
    if kind == "phi3" and path != COMPILED and not (path == PLAIN and p):
        found -= 2 * 512  # SDPA on a CPU returns its output in the order of q, which o_proj has to copy
    config = settings(lora__dropout=p, lora__target_modules=f"[{', '.join(linears_of(folder))}]")
    planned = memory_plan.saved_bytes(model_shape(folder), config, path)
    assert planned == pytest.approx(found, rel=0.03)


@pytest.mark.compiled
def test_kept_outputs_of_mlps_are_planned_to_the_byte(random_models):
    """Each checkpointed layer keeps its input and a number per norm; of two the last one, or both, its MLP's output and u."""
    folder = str(random_models("olmo2"))
    none, one, both = (saved_by_autograd(folder, COMPILED, 0.0, 2, True, Kept(mlp=kept)) for kept in range(3))
    assert none - saved_by_autograd(folder, COMPILED, 0.0, 1, True) == 400 * (2 * 256 + 4 * 4)
    each = 400 * memory_plan.kept_bytes(model_shape(folder), settings())["MLP"]
    assert one - none == both - one == each == 400 * (256 + 4 + 2 * 16)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_kept_outputs_of_attention_are_planned_to_the_byte(random_models, kind):
    folder = str(random_models(kind))
    none, one, both = (saved_by_autograd(folder, COMPILED, 0.0, 2, True, Kept(attention=kept)) for kept in range(3))
    assert one - none == both - one == 400 * memory_plan.kept_bytes(model_shape(folder), settings())["attention"]


def test_a_half_of_checkpointed_layers_keep_their_mlps_output_where_a_norm_reads_it_and_it_fits(random_models):
    shape = dataclasses.replace(model_shape(str(random_models("gemma3"))), layers=34, hidden=2560)
    config = settings(data__max_length=512)

    def plan(checkpointed=34, shape=shape, config=config, **rest):
        return plan_memory(shape, config, 16, checkpointed, **rest)

    none, full = plan(kept=NOTHING_KEPT), plan()
    assert [found.kept.mlp for found in (none, full, plan(13), plan(1))] == [0, 17, 6, 0]
    assert "17 of these keep their MLP's output" in full.shape and "keep" not in none.shape
    assert full.parts["kept outputs of MLP"] == 17 * 16 * 512 * (2560 + 4 + 2 * 16)
    assert "kept outputs of MLP" not in none.parts and not full.kept.attention
    each = (full.total - none.total) / 17
    for room in (0, 0.5, 1, 3.5, 16.9, 17):
        limit = none.total + room * each + 2
        fitted = plan(limit=limit)
        assert fitted.kept.mlp == int(room) and fitted.total <= limit
    assert plan(limit=none.total - 1).kept == NOTHING_KEPT
    ways = [
        {"path": FUSED},
        {"path": PLAIN},
        {"offload": True},
        {"shape": dataclasses.replace(shape, family=families.UNKNOWN)},
    ]
    assert all(plan(**way).kept == NOTHING_KEPT for way in ways)
    assert plan(kept=Kept(5)).kept == Kept(5) and plan(kept=Kept(99, 99)).kept == Kept(17)
    again = memory.choose_plan(shape, config, 16, None, 80 * GIB, plan(kept=Kept(5)).saved())
    old = {name: value for name, value in plan().saved().items() if "kept" not in name}  # of a version that kept none
    assert again.kept == Kept(5) and memory.choose_plan(shape, config, 16, None, 80 * GIB, old).kept == NOTHING_KEPT
    smaller = step_down(full, 16, compiled=True)
    assert (smaller.kept, smaller.checkpointed, smaller.micro_batch) == (NOTHING_KEPT, 34, 16)


def test_long_sequences_keep_what_attention_returns_where_it_fits(random_models):
    shape = dataclasses.replace(model_shape(str(random_models("gemma3"))), layers=34)
    assert plan_memory(shape, settings(data__max_length=memory_plan.LONG - 8), 1, 34).kept == Kept(17)
    config = settings(data__max_length=8192)

    def plan(checkpointed=34, shape=shape, **rest):
        return plan_memory(shape, config, 1, checkpointed, **rest)

    none, full = plan(kept=NOTHING_KEPT), plan()
    assert full.kept == Kept(17, 34) and plan(30).kept == Kept(15, 30) and plan(offload=True).kept == NOTHING_KEPT
    assert plan(path=FUSED).kept == NOTHING_KEPT
    eager = settings(data__max_length=8192, model__attn_implementation="eager")
    assert plan_memory(shape, eager, 1, 34).kept == Kept(17)
    assert "34 of these keep their attention's output" in full.shape
    assert "1 of these keeps its attention's output" in plan(kept=Kept(attention=1)).shape
    assert memory.choose_plan(shape, config, 1, None, 80 * GIB, full.saved() | {"checkpointed": 99}).checkpointed == 34
    assert full.parts["kept outputs of attention"] == 34 * 8192 * (2 * shape.query + 4 * shape.heads)
    for limit in range(none.total, full.total, (full.total - none.total) // 20):
        fitted = plan(limit=limit)
        assert fitted.total <= limit and (
            fitted.kept.mlp == 17 or not fitted.kept.attention
        )  # attention's are given up first
    old = {"micro_batch": 1, "checkpointed": 34, "kept": 3}  # of a version that kept outputs of MLPs alone
    assert memory.choose_plan(shape, config, 1, None, 80 * GIB, old).kept == Kept(3)
    assert memory.choose_plan(shape, config, 1, None, 80 * GIB, full.saved()).kept == full.kept
    assert step_down(full, 1, compiled=True).kept == NOTHING_KEPT
    flops = [memory_plan.step_flops(shape, config, 1, 34, kept) for kept in (NOTHING_KEPT, full.kept)]
    forward = 2 * 8192 * shape.query * 34 * 8192  # of attention: 2 x length x width per token and layer
    assert flops[0] - flops[1] == pytest.approx(forward)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("path", [PLAIN, FUSED])
def test_a_mixture_saves_what_is_planned_and_its_packed_experts_weigh_it(family, path, tmp_path):
    """The plan counts seven adapters per layer, of which attention has four."""
    folder = str(build(family, tmp_path))
    found = (saved_by_autograd(folder, path, 0.0, 2) - saved_by_autograd(folder, path, 0.0, 1)) / 400
    shape, config = model_shape(folder), settings(lora__dropout=0)
    assert found <= memory_plan.saved_bytes(shape, config, path) <= 1.12 * found
    model, _ = load_model_and_tokenizer(folder, create_bnb_config())
    packed = [p for p in expert_parameters(model)]
    parts = plan_memory(shape, config, 1, 2).parts
    assert parts["experts, in 4 bit"] == sum(p.nbytes for p in packed) and "experts, not in 4 bit" not in parts
    plain = plan_memory(shape, settings(quantization__load_in_4bit=False), 1, 2).parts
    assert plain["experts, not in 4 bit"] == 2 * sum(p.quant_state.shape.numel() for p in packed)


def test_the_plan_names_experts_that_stay_in_16_bit(tmp_path):
    shape = model_shape(str(build("llama4_text", tmp_path)))
    parts = plan_memory(shape, settings(), 1, 2).parts
    assert shape.experts.packed == 0 and parts["experts, not in 4 bit"] == 2 * shape.experts.plain > 0
    (line,) = memory.expert_facts(shape.experts, settings().quantization)
    assert (
        line
        == f"experts: 0 weights in 4 bit; in 16 bit: {shape.experts.plain:,} of Llama4TextExperts, whose layout is not known"
    )


def test_the_plan_of_qwen3_30b_a3b(qwen_30b):
    """30.5 billion weights, of which a token uses 3.3 billion: the experts need 13.5 GiB in 4 bit."""
    shape = model_shape(str(qwen_30b))
    assert shape.parameters == 30_532_122_624  # the sum of the checkpoint's index
    assert shape.parameters - shape.experts.all + shape.experts.active == 3_353_032_704
    plan = plan_memory(shape, settings(data__max_length=2048), 1, 48)
    assert plan.parts["experts, in 4 bit"] / GIB == pytest.approx(13.5, abs=0.01) and plan.total < 24 * GIB
    apart = settings(data__max_length=2048, quantization__experts="cpu")
    plan = plan_memory(shape, apart, 1, 48)
    assert plan.parts["experts of two layers, in 4 bit"] / GIB == pytest.approx(0.581, abs=0.001)
    assert "experts, in 4 bit" not in plan.parts and plan.total < 8 * GIB
    lines = memory.expert_facts(shape.experts, apart.quantization)
    assert lines[1] == "experts in main memory: 13.93 GiB, pinned; the GPU holds those of two layers at a time"
    assert any(
        name == "quantization.experts cpu"
        for _, name in savings(shape, settings(), plan_memory(shape, settings(), 1, 48))
    )


@pytest.mark.parametrize("experts, least", [("gpu", 24), ("cpu", 6)])
def test_the_cards_that_hold_a_mixture_are_those_whose_own_plan_fits(qwen_30b, capsys, experts, least):
    """The line is the same whatever card is planned for, and names all of a size, though they show different MiB."""
    flags = ["--model_name", str(qwen_30b), "--max_length", "2048", "--experts", experts]
    lines, fits = set(), []
    for card in CARDS:
        if card.sold_gb <= 24:
            code = train_qlora.main(["--plan", "--card", card.name, *flags])
            fits += [card] * (code == 0)
            lines |= set(re.findall(r"^cards that hold this: .*$", capsys.readouterr().out, flags=re.M))
    assert min(card.sold_gb for card in fits) == least
    names = ", ".join(card.name for card in fits if card.sold_gb == least)
    assert lines == {f"cards that hold this: from {least} GB ({names})"}
    assert experts == "cpu" or names == "RTX 3090, RTX 4090, L4, A10"


def test_cards_without_fp8_do_not_hold_a_run_in_fp8(qwen_30b, capsys):
    assert train_qlora.main(["--plan", "--model_name", str(qwen_30b), "--products", "fp8", "--max_length", "512"]) == 0
    out = capsys.readouterr().out
    assert "cards that hold this: from 24 GB (RTX 4090, L4)\n" in out
    assert (
        "that is with products in bf16; fp8 was 1.27 to 1.50 times as fast on an H200" in out
    )  # the estimate leaves it out


def test_a_model_without_a_vocabulary_ends_in_one_line(random_models, tmp_path, capsys):
    config = json.loads((random_models("qwen2") / "config.json").read_text()) | {"vocab_size": 0, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train_qlora.main(["--plan", "--model_name", str(tmp_path)]) == 2
    assert "error: model.name: expected an embedding with weights, got vocab_size 0\n" in capsys.readouterr().err


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, k_proj, v_proj, o_proj, experts.gate_up_proj]"])
def test_savings_with_adapters_on_experts_are_those_of_a_plan_with_the_setting(qwen_30b, targets):
    """Its own count of parameters is peft's, from a model with the smaller adapter."""
    base = {"model__name": qwen_30b, "lora__dropout": 0, "lora__target_modules": targets}
    attention = "[q_proj, k_proj, v_proj, o_proj]"

    def total(**changes):
        config = settings(**base | changes)
        return plan_memory(memory_plan.configured_shape(config), config, 1, 48).total

    config = settings(**base)
    shape = memory_plan.configured_shape(config)
    found = {name: saved for saved, name in savings(shape, config, plan_memory(shape, config, 1, 48))}
    assert found["lora.rank 8"] == total() - total(lora__rank=8) > GIB
    assert found[f"lora.target_modules {attention}"] == total() - total(lora__target_modules=attention) > GIB


def test_savings_of_a_mixture_with_dora_on_attention_are_those_of_its_plan(qwen_30b):
    flags = {"model__name": qwen_30b, "lora__use_dora": True}
    config, half = settings(**flags), settings(**flags, lora__rank=8)
    shape, smaller = memory_plan.configured_shape(config), memory_plan.configured_shape(half)
    plan = plan_memory(shape, config, 1, 48)
    found = {name: saved for saved, name in savings(shape, config, plan)}
    assert found["lora.rank 8"] == plan.total - plan_memory(smaller, half, 1, 48).total > 0


def test_all_linear_of_a_model_without_the_four_names_is_not_told_to_use_them(random_models):
    config = settings(model__name=random_models("phi3"), lora__target_modules="all-linear")
    shape = memory_plan.configured_shape(config)
    assert not any("target_modules" in name for _, name in savings(shape, config, plan_memory(shape, config, 1, 2)))


NO_EXPERTS = "quantization.experts: expected gpu, since .* has no routed experts to which {0} applies, got {0}"
NOT_PACKED = (
    "quantization.load_in_4bit: expected true with experts: cpu, .* got false; a base in 16 bit needs experts: gpu"
)
STORED = "quantization.experts: cpu needs a model in 16 bit, and .* is stored in 4 bit; use gpu"


@pytest.mark.parametrize(
    "family, flags, text",
    [
        ("dense", ["--experts", "cpu"], NO_EXPERTS.format("cpu")),
        ("dense", ["--experts", "16bit"], NO_EXPERTS.format("16bit")),
        ("dense", ["--experts", "cpu", "--load_in_4bit", "false"], NO_EXPERTS.format("cpu")),
        ("mixture", ["--experts", "cpu", "--load_in_4bit", "false"], NOT_PACKED),
        ("stored", ["--experts", "cpu"], STORED),
    ],
)
def test_experts_that_a_model_does_not_have_are_refused_by_plan_and_run_alike(
    tiny_model, tmp_path, corpus, capsys, family, flags, text
):
    folder = tiny_model if family == "dense" else build("qwen3_moe", tmp_path / "model")
    if family == "stored":
        path = folder / "config.json"
        stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    capsys.readouterr()  # the progress bar of writing the model
    found = []
    for command in (["--plan"], ["--output_dir", str(tmp_path / "run")]):
        code = train_qlora.main([*command, "--model_name", str(folder), "--dataset", str(corpus), *flags])
        found.append((code, capsys.readouterr().err))
    assert found[0] == found[1] and found[0][0] == 2
    assert re.fullmatch(f"error: {text}\n", found[0][1])


@pytest.mark.parametrize(
    "flags, weights, trainable",
    [
        ({}, 2.054, 29_933_568),
        ({"quantization__use_double_quant": False}, 2.183, 29_933_568),
        ({"quantization__load_in_4bit": False}, 6.172, 29_933_568),
        ({"lora__target_modules": "[q_proj, k_proj, v_proj, o_proj]"}, 2.054, 7_372_800),
        ({"lora__rank": 8}, 2.054, 14_966_784),
    ],
)
def test_plan_has_the_figures_of_the_3b_model(qwen_3b, flags, weights, trainable):
    shape, config = model_shape(str(qwen_3b)), settings(**flags)
    parts = plan_memory(shape, config, 1, 36).parts
    found = sum(size for name, size in parts.items() if name in WEIGHTS)
    assert found / 1e9 == pytest.approx(weights, abs=0.002)
    assert adapter_parameters(shape, config) == trainable == parts["adapters (fp32)"] // 4


WEIGHTS = ("packed weights", "quantisation constants", "embedding and head", "norms and biases")


@pytest.mark.parametrize("path", [COMPILED, FUSED, PLAIN])
def test_more_takes_more(qwen_3b, path):
    """Each further checkpointed layer saves, each longer or wider step costs, on every path."""
    shape, config = model_shape(str(qwen_3b)), settings()
    by_layers = [plan_memory(shape, config, 4, n, path).total for n in range(1, 37)]
    assert by_layers == sorted(by_layers, reverse=True)
    by_batch = [plan_memory(shape, config, n, 36, path).total for n in (1, 2, 4, 8, 16)]
    assert by_batch == sorted(by_batch)
    lengths = (128, 512, 2048, 8192)
    by_length = [plan_memory(shape, settings(data__max_length=n), 1, 36, path).total for n in lengths]
    assert by_length == sorted(by_length)


def test_plan_is_what_was_measured_on_a_gpu(qwen_3b):
    """Allocated, GiB, on one H100 (tests/benchmarks/bench_memory.py measures anew); slack and context apart."""
    shape, config = model_shape(str(qwen_3b)), settings(lora__dropout=0)
    for (micro_batch, checkpointed), allocated in {(1, 0): 3.51, (16, 0): 19.83}.items():
        parts = plan_memory(shape, config, micro_batch, checkpointed).parts
        planned = sum(parts.values()) - parts["allocator slack"] - parts["CUDA context"]
        assert planned / GIB == pytest.approx(allocated, rel=0.02)


# ------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("limit", [4.0, 6.0, 7.8, 24.0])
def test_fit_is_the_best_of_all_shapes_that_fit(qwen_3b, limit):
    shape, config, rates = model_shape(str(qwen_3b)), settings(), Rates()
    plan = fit(shape, config, 16, limit * GIB, rates)
    assert plan.total <= limit * GIB and 16 % plan.micro_batch == 0

    def speed(micro_batch, checkpointed):
        return micro_batch / memory_plan.step_seconds(shape, config, rates, micro_batch, checkpointed)

    every = itertools.product((1, 2, 4, 8, 16), range(37))
    best = max(speed(*s) for s in every if plan_memory(shape, config, *s, limit=limit * GIB).total <= limit * GIB)
    assert speed(plan.micro_batch, plan.checkpointed) == best


def test_fit_keeps_what_a_flag_says(qwen_3b):
    shape = model_shape(str(qwen_3b))
    config = settings(training__batch_size=2)
    assert fit(shape, config, 32, 24 * GIB, Rates()).micro_batch == 2
    config = settings(training__gradient_checkpointing=36)
    assert fit(shape, config, 16, 24 * GIB, Rates()).checkpointed == 36


def test_a_resumed_run_keeps_its_shape_but_for_a_flag(qwen_3b):
    shape, limit, saved = model_shape(str(qwen_3b)), 24 * GIB, {"micro_batch": 2, "checkpointed": 30}

    def chosen(config, saved):
        plan = memory.choose_plan(shape, config, 16, None, limit, saved)
        return plan.micro_batch, plan.checkpointed

    best = fit(shape, settings(), 16, limit, Rates())
    assert chosen(settings(), saved) == (2, 30) != chosen(settings(), {}) == (best.micro_batch, best.checkpointed)
    assert chosen(settings(training__batch_size=4), saved)[0] == 4
    assert chosen(settings(performance__auto_fit=False), saved) == (1, 36)


def test_stepping_down_ends_at_the_smallest_shape():
    plan, seen = MemoryPlan({}, 4, 0, 8), []
    while plan is not None:
        seen.append((plan.micro_batch, plan.checkpointed))
        plan = step_down(plan, 12, compiled=False)
    assert seen == [(4, 0), (4, 2), (4, 4), (4, 6), (4, 8), (3, 8), (2, 8), (1, 8)]
    last = step_down(MemoryPlan({}, 1, 8, 8), 12, compiled=True)
    assert (last.micro_batch, last.checkpointed, last.offload) == (1, 8, True)
    assert step_down(last, 12, compiled=True) is None


def test_processes_of_unequal_memory_take_the_plan_of_the_smallest(qwen_3b, monkeypatch):
    """Each one has chosen its own; all take that of the first, as JSON brings it, which has to fit the smallest."""
    limits, said = iter([24 * GIB, 8 * GIB]), []

    def exchanged(value):
        return json.loads(json.dumps([value, next(limits) if value == 24 * GIB else None]))

    config = dataclasses.replace(settings(), model=ModelConfig(name=str(qwen_3b)))
    alone = memory.choose_plan(model_shape(str(qwen_3b)), config, 8, None, 8 * GIB, {}, Rates())
    monkeypatch.setattr(memory, "memory_limit", lambda *_: next(limits))
    monkeypatch.setattr(memory, "measure_rates", lambda device: Rates())
    monkeypatch.setattr(memory, "several", lambda: True)
    monkeypatch.setattr(memory, "name_of", "rank {}".format)
    monkeypatch.setattr(memory, "gathered", exchanged)
    accelerator = SimpleNamespace(device=None, num_processes=2)
    plan = memory.plan_run(config, accelerator, 8, {}, said.append)
    assert alone.total <= 8 * GIB and plan == alone
    assert any(line.startswith("memory: rank 1") and "8.00 GiB of at most 24.00" in line for line in said)


def test_main_memory_is_for_what_fits_in_no_other_way(qwen_3b):
    shape, config = model_shape(str(qwen_3b)), settings(data__max_length=8192)
    inside, offloaded = plan_memory(shape, config, 1, 36), plan_memory(shape, config, 1, 36, offload=True)
    states = 34 * 8192 * 2048 * 2  # of 36, two stay
    assert inside.parts["checkpointed hidden states"] - offloaded.parts["checkpointed hidden states"] == states
    between = offloaded.total + GIB // 10
    assert fit(shape, config, 1, between, Rates()).offload
    assert not fit(shape, config, 1, inside.total + GIB / 10, Rates()).offload
    assert not fit(shape, settings(data__max_length=8192, performance__compile="off"), 1, between, Rates()).offload
    assert fit(shape, settings(training__gradient_checkpointing="offload"), 16, 24 * GIB, Rates()).offload
    saved = {"micro_batch": 1, "checkpointed": 36, "offload": True}
    assert memory.choose_plan(shape, config, 16, None, 24 * GIB, saved).offload


LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 131072, "head_dim": 128,
}  # fmt: skip


def test_weights_are_unpacked_in_pieces_where_nothing_else_fits(qwen_3b, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    config, shape = settings(), model_shape(str(tmp_path))
    assert memory_plan.pieces_of(shape, config, "compiled") == (1, 4, 8)
    whole, four, eight = (plan_memory(shape, config, 1, 32, rows_apart=True, pieces=n) for n in (1, 4, 8))
    assert eight.total <= 5.6 * GIB < four.total <= 5.62 * GIB < whole.total
    assert four.logit_chunk == eight.logit_chunk == 128
    sizes = [plan.parts["unpacked weights, chunk of logits"] for plan in (whole, four, eight)]
    gate_up, out, logits = 2 * 14336 * (4096 + 64) * 2, 4096 * (4096 + 64) * 2, 128 * 128256 * 2
    assert sizes == [gate_up, gate_up // 4, out] and max(gate_up // 8, logits) < out
    for limit, pieces in ((5.62, 4), (5.6, 8)):
        chosen = fit(shape, config, 16, limit * GIB, Rates())
        assert chosen == plan_memory(shape, config, 1, 32, limit=limit * GIB, rows_apart=True, pieces=pieces)
        assert f"the MLP's weights unpacked in {pieces} pieces" in chosen.table()
        resumed = memory.choose_plan(shape, config, 16, None, 24 * GIB, chosen.saved())
        assert (resumed.pieces, resumed.logit_chunk, resumed.shape) == (pieces, 128, chosen.shape)
    assert fit(shape, config, 16, whole.total + GIB // 10, Rates()).pieces == 1
    others = ({"quantization__products": "fp8"}, {"performance__fused_lora": "off"}, {"quantization__compute_dtype": "float32"},
              {"lora__target_modules": "[gate_proj]"})  # fmt: skip
    for other in others:
        path = memory_plan.expected_path(settings(**other))
        assert memory_plan.pieces_of(shape, settings(**other), path) == (1,)
    assert memory_plan.pieces_of(model_shape(str(qwen_3b)), config, "compiled") == (1,)  # logits need more than a piece
    assert train_qlora.main(["--plan", "--model_name", str(tmp_path), "--memory_limit_gib", "5.6"]) == 0
    assert "the MLP's weights unpacked in 8 pieces\n" in capsys.readouterr().out


def test_a_model_is_cut_in_the_pieces_that_divide_it_and_hold_its_logits(tmp_path):
    for own, taken in (
        ({"lora__target_modules": "[q_proj, v_proj]"}, (1, 4)),  # q, k and v are no single operator
        ({"intermediate_size": 14336 + 128}, (1, 4)),  # blocks of 64 weights: down divides into 2 pieces, not into 4
        ({"intermediate_size": 14336 + 64}, (1,)),
        ({"vocab_size": 140_000}, (1, 4)),  # a chunk of its logits needs more than the largest piece
    ):
        lora = {name: value for name, value in own.items() if "__" in name}
        sizes = LLAMA_8B | {name: value for name, value in own.items() if name not in lora}
        (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
        assert memory_plan.pieces_of(model_shape(str(tmp_path)), settings(**lora), "compiled") == taken, own


def test_savings_are_differences_of_plans(qwen_3b):
    shape, config = model_shape(str(qwen_3b)), settings()
    plan = plan_memory(shape, config, 1, 36)
    found = {name: saved for saved, name in savings(shape, config, plan)}
    half = plan_memory(shape, settings(data__max_length=256), 1, 36)
    assert found["data.max_length 256"] == plan.total - half.total > 0
    assert found["lora.target_modules [q_proj, k_proj, v_proj, o_proj]"] / GIB == pytest.approx(0.168, abs=0.01)
    # spec.md's 0.21 counts 45 MiB of optimizer states too, which are paged here
    assert found["lora.rank 8"] / GIB == pytest.approx(0.112, abs=0.01)  # spec.md: 0.14, likewise


def test_the_longest_length_is_the_last_that_fits(qwen_3b):
    shape, config = dataclasses.replace(model_shape(str(qwen_3b)), positions=None), settings()
    longest = memory_plan.longest_length(shape, config, 7.8 * GIB)
    for length, fits in ((longest, True), (longest + 128, False)):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length))
        assert (plan_memory(shape, other, 1, 36, limit=7.8 * GIB, offload=True).total <= 7.8 * GIB) is fits


def test_no_length_is_longer_than_the_models_positions(qwen_3b, capsys):
    shape = model_shape(str(qwen_3b))
    assert shape.positions == 32768 == memory_plan.longest_length(shape, settings(), 80 * GIB)
    flags = ("--plan", "--model_name", str(qwen_3b), "--memory_limit_gib", "80")
    assert train_qlora.main([*flags]) == 0 and "32,768, all positions that the model supports\n" in (
        out := capsys.readouterr().out
    )
    assert "data.max_length: " not in out
    assert train_qlora.main([*flags, "--max_length", "32769"]) == 0
    line = "warning: data.max_length: 32,769 tokens are more than the 32,768 positions that the model supports\n"
    assert line in capsys.readouterr().out


def test_a_limit_below_the_context_is_refused():
    with pytest.raises(ConfigError, match="memory_limit_gib: expected more than"):
        memory.memory_limit(None, 0.3)


@pytest.mark.parametrize("limit, code", [("8", 0), ("2", 3)])
def test_plan_command_needs_no_weights_and_no_gpu(qwen_3b, capsys, limit, code):
    assert train_qlora.main(["--plan", "--model_name", str(qwen_3b), "--memory_limit_gib", limit]) == code
    out = capsys.readouterr().out
    assert ("does not fit" if code else "fits") in out and "trainable 29,933,568" in out and "119.7 MB" in out
    assert "longest data.max_length that fits" in out
    assert "one epoch: unknown" in out and "would save" in out
    assert re.search(
        r"estimated, not measured: [\d,]+ tokens/s, \d+\.\d min per million tokens \(RTX 4060, by default", out
    )
    assert out.startswith("this machine has no GPU: the plan is that of a run on an NVIDIA GPU\nmemory plan")
    assert re.search(r"^one epoch: unknown: [\w.]+: .+", out, re.M)
    train_qlora.main(["--plan", "--model_name", str(qwen_3b)])
    assert "  of any memory, in the shape as configured; --card NAME" in capsys.readouterr().out.splitlines()[1]


def test_the_plan_of_a_small_model_has_no_zeros(tiny_model, capsys):
    assert train_qlora.main(["--plan", "--model_name", str(tiny_model)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert not any(re.search(r"\b0\.0+ (GiB|MiB|hours|min)", line) for line in said)
    assert sum(" MiB" in line for line in said) >= 2


def test_durations_have_the_unit_that_suits_them():
    assert [memory.duration(s) for s in (0.74, 59.9, 60, 3599, 9000)] == [
        "0.7 s",
        "59.9 s",
        "1.0 min",
        "60.0 min",
        "2.5 hours",
    ]


# ------------------------------------------------------------------------------------------------ out of memory


def run_out(monkeypatch, when):
    """Make forward and backward of a micro-batch run out of memory where when(call number, learner) says so."""
    real, calls = micro_step.Learner.micro_step, itertools.count()

    def run_micro_step(learner, *batch):
        loss = real(learner, *batch)  # late: half of the gradients are there already
        if when(next(calls), learner):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (injected)")
        return loss

    monkeypatch.setattr(micro_step.Learner, "micro_step", run_micro_step)


FP32 = ("--compute_dtype", "float32", "--optim", "adamw_torch")


@pytest.mark.parametrize("call", [0, 1, 3])
def test_more_checkpointing_after_running_out_learns_the_same_bit_for_bit(train, monkeypatch, tmp_path, call):
    code, want = train(*FP32, "--gradient_checkpointing", 1, output_dir=tmp_path / "told")
    assert code == 0
    run_out(monkeypatch, lambda n, learner: n == call)
    code, found = train(*FP32, "--gradient_checkpointing", 0, output_dir=tmp_path / "found")
    assert code == 0
    log = (found / "training_log.txt").read_text(encoding="utf-8")
    assert (
        "out of GPU memory with micro-batch 2, 0 of 4 layers" in log
        and "repeating the step with micro-batch 2, 1 of 4" in log
    )
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (want, found))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_smaller_micro_batch_after_running_out_learns_the_same(train, monkeypatch, tmp_path):
    code, want = train(*FP32, "--batch_size", 1, "--gradient_accumulation_steps", 4, output_dir=tmp_path / "told")
    assert code == 0
    run_out(monkeypatch, lambda n, learner: learner.batch_shape[0] > 1)
    code, found = train(*FP32, output_dir=tmp_path / "found")
    assert code == 0
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (want, found))
    gap = math.sqrt(sum((a[n] - b[n]).square().sum().item() for n in a) / sum(a[n].square().sum().item() for n in a))
    assert gap < 1e-4


def test_an_evaluation_that_runs_out_changes_the_evaluation_only(train, monkeypatch, tmp_path):
    code, want = train(*FP32, output_dir=tmp_path / "told")
    real = CausalLMLoss.sequence_sums

    def sequence_sums(objective, **batch):
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return real(objective, **batch)

    monkeypatch.setattr(CausalLMLoss, "sequence_sums", sequence_sums)
    code, found = train(*FP32, output_dir=tmp_path / "found")
    assert code == 0
    log = (found / "training_log.txt").read_text(encoding="utf-8")
    assert "an evaluation ran out of memory; repeating it with 1 sequence at a time" in log
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (want, found))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_running_out_while_capturing_leaves_no_dropout_in_the_evaluation(train, monkeypatch, tmp_path):
    """The graphs are captured in the first evaluation; their warm-up trains, and may run out of memory half-way."""
    flags = (*FP32, "--lora.dropout", 0.5, "--max_steps", 1)
    code, want = train(*flags, output_dir=tmp_path / "told")
    choose = choice.choose_fast_path
    monkeypatch.setattr(choice, "choose_fast_path", lambda *a: dataclasses.replace(choose(*a), cuda_graphs=True))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    modes = []

    def captured(step, *rest):
        modes.append(step.__self__.model.training)
        raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

    monkeypatch.setattr(micro_step, "Captured", captured)
    seen = []
    real = evaluation.block_losses
    monkeypatch.setattr(evaluation, "block_losses", lambda *a: seen.append(real(*a)) or seen[-1])
    train(*flags, output_dir=tmp_path / "found")
    assert modes[0] and seen
    rows = [json.loads(line) for line in (want / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert evaluation.mean_loss(seen[0]) == pytest.approx(rows[0]["eval_loss"], rel=1e-6)


def test_when_nothing_is_left_the_run_ends_with_three_and_its_checkpoint(train, monkeypatch, tmp_path):
    run_out(monkeypatch, lambda n, learner: n >= 4)  # after two steps of two micro-batches
    code, folder = train(*FP32, "--save_steps", 1, output_dir=tmp_path / "run")
    assert code == 3
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    assert "error: out of GPU memory at a peak of" in log and log.count("would save") == 3
    assert (folder / "checkpoint-2").is_dir()
    monkeypatch.undo()
    assert train(*FP32, output_dir=folder)[0] == 0  # and it goes on from there


# (tokens, hidden, inner, experts, experts of a token): the first product's weights, the sum of rows, the activation
@pytest.mark.parametrize("sizes", [(64, 256, 256, 16, 4), (512, 512, 64, 4, 4), (512, 128, 512, 4, 4)])
def test_experts_need_what_is_planned_in_the_backward_pass(sizes, monkeypatch):
    """What the allocator held at most in a layer's experts, forward and backward, as on a GPU that unpacks a tensor whole."""
    tokens, hidden, inner, count, each = sizes
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_experts=count, num_experts_per_tok=each, moe_intermediate_size=inner,
        )
    ).bfloat16()  # fmt: skip
    planned = expert_shape(model)
    experts.pack(model, create_bnb_config(), torch.bfloat16)
    monkeypatch.setattr(experts, "_grouped", lambda x, sizes: True)
    monkeypatch.setattr(expert_plan, "lacks_triton", lambda: True)  # a CPU's constants are unpacked apart
    module = model.model.layers[0].mlp.experts
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.rand(tokens, count).topk(each).indices
    shares = torch.rand(tokens, each, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        module(x, chosen, shares).backward(torch.ones_like(x))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(sizes))
    needed = tokens * planned.saved_bytes() + planned.transient_bytes(tokens, 2, shared=False)
    assert peak == pytest.approx(needed, rel=0.06)


# ------------------------------------------------------------------------------------------------ several processes

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192,
    "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131_072, "tie_word_embeddings": False,
}  # fmt: skip
ON_TWO = ("--max_length", 2048, "--gradient_checkpointing", "true", "--batch_size", 1, "--card", "A100 80GB")


def planned(capsys, folder, *flags):
    """Return the exit code of --plan, its table as {part: GiB}, and all that it printed."""
    code = train_qlora.main(["--plan", "--model_name", str(folder), *map(str, flags)])
    out = capsys.readouterr().out
    return code, {name.strip(): float(size) for name, size in re.findall(r"^  (\w.*?) +(\d+\.\d{3})$", out, re.M)}, out


def test_the_plan_of_a_70b_divided_among_two_cards(tmp_path, capsys):
    """Half of the packed weights on each card, and five layers gathered or in gaps; the rest is whole."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    _, whole, said = planned(capsys, tmp_path, *ON_TWO, "--processes", 2)
    assert "performance.shard_base true would save 13.9" in said
    code, parts, said = planned(capsys, tmp_path, *ON_TWO, "--processes", 2, "--shard_base", "true")
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672  # weights: q and o, k and v, the MLP
    assert code == 0 and whole["packed weights"] == pytest.approx(80 * layer / 2 / 2**30, abs=1e-3)
    assert parts["packed weights"] == pytest.approx(whole["packed weights"] / 2, abs=1e-3)
    assert parts["packed weights, gathered"] == pytest.approx(5 * layer / 2 / 2**30, abs=1e-3)
    same = ("quantisation constants", "adapters (fp32)", "gradients (fp32)", "checkpointed hidden states")
    assert [parts[name] for name in same] == [whole[name] for name in same]
    assert "each card receives 34.2 GB per micro-batch, 1.7 s at 20 GB/s" in said


def test_the_plan_of_several_processes_counts_their_tokens_and_refuses_odd_shares(qwen_3b, capsys):
    flags = ("--card", "RTX 3090", "--batch_size", 2, "--gradient_accumulation_steps", 8)
    speeds = []
    for processes in (1, 2):
        _, parts, said = planned(capsys, qwen_3b, *flags, "--processes", processes)
        assert "packed weights, gathered" not in parts
        speeds.append(float(re.search(r"estimated, not measured: ([\d,]+) tokens/s", said)[1].replace(",", "")))
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01)
    for wrong, problem in (
        (("--processes", 3), "expected a multiple of 3 processes, got 16"),
        (("--processes", 0), "--processes: expected a number of processes >= 1, got 0"),
        (("--shard_base", "true"), "performance.shard_base: expected --processes 2 or more beside --plan"),
    ):
        assert train_qlora.main(["--plan", "--model_name", str(qwen_3b), *map(str, (*flags, *wrong))]) == 2
        assert problem in capsys.readouterr().err
    assert train_qlora.main(["--processes", "2"]) == 2
    assert "--processes: goes with --plan" in capsys.readouterr().err
