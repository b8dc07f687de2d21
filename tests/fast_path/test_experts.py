"""Routed experts in 4 bit: against bitsandbytes' own packing, and against plain transformers and peft on their values."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from config import ConfigError, load_config
from fast_path import attention, compiled, dropout, expert_kernel, expert_store, experts
from fast_path.dropout import own_dropout
from fast_path.families import expert_tensors, router_modules, routers
from fast_path.layers import fuse
from fast_path.loss import CausalLMLoss
from fast_path.model_targets import linear_modules
from quantization_utils import (
    adapter_lines,
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
    set_gradient_checkpointing,
)
from tests.families import build, fresh_model, small_model
from tests.fast_path.test_layers import CAPABILITIES, HALF, SINGLE, WHOLE, compile_for
from tests.interpreter import interpret
from toolkit import merge
from toolkit.base_lines import base_lines

ROOT = Path(__file__).resolve().parent.parent.parent
# Families whose experts have transformers' common layout; the first run in every CI.
FIRST = (
    "qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe",
    "olmoe", "phimoe", "nemotron_h", "aria_text", "afmoe",
)  # fmt: skip
FURTHER = (
    "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v32", "deepseek_v4", "dots1",
    "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe_lite",
    "glm_moe_dsa", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4",
    "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "kolibri1", "laguna",
    "lara_mini", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text", "sarvam_mla",
    "sarvam_moe", "solar_open", "zaya",
)  # fmt: skip
FAMILIES = [*FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in FURTHER)]
# One linear layer of attention, where a family has no o_proj that peft can adapt.
OF_ATTENTION = {
    "deepseek_v4": ["q_a_proj"],
    "inkling2_loop_text": ["q_proj.linear"],
    "inkling2_text": ["q_proj.linear"],
    "inkling_text": ["q_proj"],
    "lfm2_moe": ["q_proj"],
}
IDS = torch.arange(5, 45)[None]


def loaded(family: str, folder: Path, **flags: object):
    """Return the small model of a family as the scripts load it, in fp32."""
    build(family, folder)
    return load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype="float32", **flags), device="cpu")[0]


def packed_modules(model: nn.Module) -> dict[str, experts.PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, experts.PackedExperts)}


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("double", [True, False])
def test_packed_tensors_are_those_of_bitsandbytes(double):
    torch.manual_seed(0)
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.randn(6, 192, 64))
    mine = experts.packed(module.down_proj.data, create_bnb_config(use_double_quant=double))
    replace_parameter_4bit(module, "down_proj", compress_statistics=double, quant_type="nf4")
    theirs = module.parametrizations.down_proj
    assert torch.equal(mine.data, theirs.original)
    assert mine.quant_state.nested is double
    assert torch.equal(experts.unpacked(mine), theirs[0](theirs.original))


def test_small_experts_unpack_to_what_was_packed():
    """Rows that are not whole blocks: bitsandbytes 0.50 gets these wrong on a CPU, which is why a row is a block here."""
    torch.manual_seed(0)
    tensor = torch.randn(4, 64, 32)
    found = experts.unpacked(experts.packed(tensor, create_bnb_config()))
    assert found.shape == tensor.shape and (found - tensor).abs().mean() < 0.08


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_packed_and_the_router_is_not(family, tmp_path):
    model = loaded(family, tmp_path)
    modules = packed_modules(model)
    assert len(modules) == 2
    for module in modules.values():
        for name in expert_tensors(module):
            tensor = module._parameters[name]
            assert isinstance(tensor, bnb.nn.Params4bit) and not tensor.requires_grad
            assert tensor.nbytes * 2 == tensor.quant_state.shape.numel()
    gates = [p for name, p in model.named_parameters() if "gate.weight" in name or "router.weight" in name]
    assert gates and all(p.dtype is torch.float32 for p in gates)
    count = sum(m._parameters[n].quant_state.shape.numel() for m in modules.values() for n in m.packed_names)
    (line,) = [line for line in base_lines(load_config(()), model) if "experts" in line]
    assert line.startswith(f"experts: {count:,} weights in 4 bit; the router stays in 16 bit and frozen")
    trained = prepare_model_for_training(model, create_lora_config(dropout=0.0, target_modules="all-linear"), False)
    names = [name for name, p in trained.named_parameters() if p.requires_grad]
    assert names and not any("gate.lora" in name or "router" in name for name in names)
    adapted = family == "qwen3_moe"  # peft has no old names for gpt-oss
    assert any("experts" in name for name in names) is adapted
    left_out = (
        "adapters: not on the routed experts; --dropout 0 --target_modules q_proj,k_proj,v_proj,o_proj,"
        "experts.gate_up_proj,experts.down_proj adapts them too"
    )
    assert (left_out in adapter_lines(trained)) is not adapted


def test_all_linear_of_some_layers_says_that_experts_are_left_out(tmp_path):
    asked = create_lora_config(dropout=0.0, target_modules="all-linear")
    asked.layers_to_transform = [0]
    lines = adapter_lines(prepare_model_for_training(loaded("qwen3_moe", tmp_path), asked, False))
    assert any("exclude_modules and layers_to_transform, adapts them too" in line for line in lines)


# The linear layers that route, as transformers' classes of these families name them.
ROUTING = {
    "afmoe": {"router.gate"},
    "dbrx": {"router.layer"},
    "deepseek_v3": set(),
    "glm4_moe": set(),
    "hunyuan_v1_moe": {"gate.wg"},
    "jetmoe": {"mlp.router.layer", "experts.router.layer"},
    "llama4_text": {"feed_forward.router"},
    "longcat_flash": {"router.classifier"},
    "phimoe": {"mlp.router"},
    "qwen2_moe": set(),
    "qwen3_next": set(),
    "zaya": {"gate.down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"},
}


@pytest.mark.parametrize("family", ROUTING)
def test_routers_are_found_by_what_they_are(family):
    """Not by a width: here shared experts, and heads of k and v where they can, are as wide as there are experts."""
    with torch.device("meta"):
        config = fresh_model(family).config
        for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            if getattr(config, name, None) and family not in ("dbrx", "zaya"):
                setattr(config, name, 32)
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            if getattr(config, name, None):
                setattr(config, name, 32)
        model = AutoModelForCausalLM.from_config(config)
    found = routers(model)
    assert all(any(name.endswith(f".{end}") for end in ROUTING[family]) for name in found)
    assert all(any(name.endswith(f".{end}") for name in found) for end in ROUTING[family])
    assert router_modules(model) and not set(found) & set(linear_modules(model))
    if family in ("qwen2_moe", "qwen3_next", "deepseek_v3", "glm4_moe", "hunyuan_v1_moe"):  # the trap is set
        wide = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 32]
        assert any("shared" in name for name in wide)


def test_the_routers_of_other_mixtures_are_found_too():
    """In parts of classes that the small models do not have: a Gemma 4 and a Doge with experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 32, "vocab_size": 128}
    gemma = {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 32, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size_per_layer_input": 128}  # fmt: skip
    for kind, facts, name in (
        ("gemma4_text", gemma, "router.proj"),
        ("doge", {"is_moe": True, "num_experts_per_tok": 2}, "mlp.router_gate"),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | facts))
        assert routers(model) == [f"model.layers.0.{name}"], kind


@pytest.mark.parametrize("family", ["afmoe", "hunyuan_v1_moe", "jetmoe", "zaya"])
def test_a_router_that_is_a_linear_layer_stays_in_16_bit(family, tmp_path):
    model = loaded(family, tmp_path)
    names = routers(model)
    assert names and all(type(model.get_submodule(name)) is nn.Linear for name in names)


def test_without_4_bit_experts_stay_as_they_are(tmp_path):
    build("qwen3_moe", tmp_path)
    model, _ = load_model_and_tokenizer(str(tmp_path), None, compute_dtype="float32", device="cpu")
    assert not packed_modules(model) and model.model.layers[0].mlp.experts.down_proj.ndim == 3


def test_a_model_stored_in_4_bit_computes_in_the_type_that_is_asked_for(tmp_path):
    """bitsandbytes stores its experts in 16 bit; they are packed after loading, and the plain copy has the same logits."""
    build("qwen2_moe", tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=create_bnb_config(), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "stored")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, tmp_path / "stored")
    config = create_bnb_config(compute_dtype="float32")
    model, _ = load_model_and_tokenizer(str(tmp_path / "stored"), config, device="cpu")
    tensors = [m._parameters[name] for m in packed_modules(model).values() for name in m.packed_names]
    assert len(tensors) == 4 and all(tensor.quant_state.dtype is torch.float32 for tensor in tensors)
    with torch.no_grad():
        expected = merge.plain_copy(model)(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_stored_in_4_bit_one_by_one_are_refused(tmp_path):
    """As in the copies of mixtures that transformers 4 wrote in 4 bit; the names are enough."""
    folder = build("qwen3_moe", tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = create_bnb_config().to_dict()
    (folder / "config.json").write_text(json.dumps(settings))
    names = [f"model.layers.0.mlp.experts.0.up_proj.weight{end}" for end in ("", ".quant_state.bitsandbytes__nf4")]
    save_file({name: torch.zeros(4, 1, dtype=torch.uint8) for name in names}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="stores its experts in 4 bit one by one"):
        load_model_and_tokenizer(str(folder), create_bnb_config(), device="cpu")


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "dbrx"])
def test_experts_of_another_layout_are_refused_before_the_weights_are_read(family, train, tmp_path, capfd):
    """In 16 bit they would be QLoRA in name only; the setting that allows it is named."""
    folder = build(family, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    capfd.readouterr()
    code, output = train("--model_name", folder)  # whose default names two of these families do not have
    error = capfd.readouterr().err
    assert code == 2 and not output.exists() and error.count("\n") == 1
    assert re.search(
        r"quantization.experts: expected 16bit, since the experts of .* \(\w+\) .* [\d,]+ of [\d,]+ weights", error
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "afmoe"])
def test_experts_of_any_layout_stay_in_16_bit_where_that_is_asked_for(family, tmp_path):
    build(family, tmp_path)
    config = create_bnb_config(compute_dtype="float32")
    model, _ = load_model_and_tokenizer(str(tmp_path), config, device="cpu", experts="16bit")
    assert not packed_modules(model) and any(isinstance(p, bnb.nn.Params4bit) for p in model.parameters())
    plain = [m._parameters[name] for m in model.modules() for name in expert_tensors(m)]
    assert plain and all(p.ndim == 3 and p.dtype is torch.float32 for p in plain)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in routers(model))
    assert sum("router stays frozen, so its auxiliary loss" in line for line in base_lines(load_config(()), model)) == 1
    (line,) = [line for line in base_lines(load_config(()), model) if "16 bit" in line]
    assert f"{sum(p.numel() for p in plain):,} of" in line


def test_experts_of_another_layout_are_named_in_the_log(tmp_path):
    build("llama4_text", tmp_path)
    model, _ = load_model_and_tokenizer(str(tmp_path), create_bnb_config(), device="cpu", experts="16bit")
    assert not packed_modules(model)
    (line,) = [line for line in base_lines(load_config(()), model) if "16 bit" in line]
    assert "of Llama4TextExperts" in line


def uneven(folder: Path, **sizes: int) -> Path:
    """Write a Mixtral whose experts are no whole blocks and whose rows are not whole 16 bytes."""
    sizes = {"hidden_size": 72, "intermediate_size": 50, "head_dim": 36} | sizes
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=128, initializer_range=0.08, **sizes,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder)
    return folder


def test_experts_of_uneven_sizes_are_computed_as_transformers_does_it_eagerly(tmp_path):
    """torch's grouped product refuses them. The answer has no row of whole 16 bytes either."""
    folder = uneven(tmp_path)
    plain = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    expected = AutoModelForCausalLM.from_pretrained(folder, **plain)(input_ids=IDS, use_cache=False).logits
    model, _ = load_model_and_tokenizer(str(folder), None, device="cpu")
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected)
    assert experts.one_by_one(model, torch.bfloat16, torch.device("cpu"))
    ours, _ = load_model_and_tokenizer(str(folder), create_bnb_config(), device="cpu", experts="16bit")
    lora = create_lora_config(dropout=0.0, target_modules=["experts.gate_up_proj", "experts.down_proj"])
    adapted = prepare_model_for_training(ours, lora, False)
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(grads) == 4 and all(grad.abs().max() > 0 for grad in grads.values())


def test_a_plain_copy_of_packed_experts_of_unaligned_rows_computes(tmp_path):
    """12 x 16 weights are whole blocks, but 12 numbers are no whole 16 bytes: merging computes with such a copy."""
    folder = uneven(tmp_path, hidden_size=12, intermediate_size=16, head_dim=12)
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(), device="cpu")
    assert packed_modules(model)
    with torch.no_grad():
        copied = merge.plain_copy(model)(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, copied, rtol=0.05, atol=0.05)


def test_experts_of_uneven_sizes_are_refused_with_their_reason(train, tmp_path, capfd):
    folder = uneven(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    code, output = train("--model_name", folder)
    assert code == 2 and not output.exists()
    assert (
        "(MixtralExperts) cannot be packed: 3,600 and 7,200 weights per expert are not whole" in capfd.readouterr().err
    )
    code, _ = train("--model_name", folder, "--experts", "16bit", "--plan")
    assert code == 0 and "of MixtralExperts, which are not whole blocks" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------ files of weights


def rewritten(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("missing", ["3.up_proj", "3."])
def test_a_missing_expert_is_named(quantized, missing, tmp_path):
    """Without the last expert of a layer its tensors had one less: in 4 bit transformers loads them all the same."""
    lost = f"model.layers.1.mlp.experts.{missing}"
    folder = rewritten(
        build("qwen3_moe", tmp_path), lambda t: [t.pop(name) for name in list(t) if name.startswith(lost)]
    )
    with pytest.raises(
        ConfigError, match=f"lacks . weights? of experts that .* {re.escape(lost)}.*; fetch its weights"
    ):
        load_model_and_tokenizer(str(folder), create_bnb_config() if quantized else None, device="cpu")


@pytest.mark.parametrize("quantized", [True, False])
def test_an_expert_of_another_shape_is_named(quantized, tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    folder = rewritten(build("qwen3_moe", tmp_path), lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(ConfigError, match=f"has {re.escape(name)} in the shape .* where that of its other experts is"):
        load_model_and_tokenizer(str(folder), create_bnb_config() if quantized else None, device="cpu")


# ------------------------------------------------------------------------------------------------ products


def sorted_rows(counts: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(sum(counts), width, requires_grad=True), torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("shape", [(5, 128, 64), (5, 96, 32), (4, 256, 256)])
def test_a_product_is_the_dense_one_and_so_is_its_gradient(shape, across):
    torch.manual_seed(0)
    parameter = experts.packed(torch.randn(shape), create_bnb_config())
    dense = experts.unpacked(parameter)
    x, offsets = sorted_rows([3, 0, 7, 1, 0][: shape[0]], shape[2] if across else shape[1])
    y = experts.expert_product(x, offsets, *experts.operand(parameter), across)
    numbers = torch.searchsorted(offsets, torch.arange(len(x)), right=True)
    expected = torch.einsum("ri,roi->ro" if across else "ri,rio->ro", x, dense[numbers])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(y)
    (mine,), (plain,) = (torch.autograd.grad(value, x, grad, retain_graph=True) for value in (y, expected))
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(experts.expert_product, (x, offsets, *experts.operand(parameter), across))


def test_a_gpus_ways_to_unpack_give_the_same_experts():
    torch.manual_seed(0)
    parameter = experts.packed(torch.randn(6, 64, 96), create_bnb_config())
    W, dense = experts.operand(parameter), experts.unpacked(parameter)
    torch.testing.assert_close(W.some(torch.tensor([4, 1, 4]), torch.float32), dense[[4, 1, 4]])
    torch.testing.assert_close(torch.stack(list(W.each([0, 5], torch.float32))), dense[[0, 5]])


def check_kernel(device: str, dtype: torch.dtype) -> None:
    """Compare the kernel with products of unpacked experts: experts without rows and with more than a tile, few rows, odd widths."""
    torch.manual_seed(0)
    for shape, counts, double in (
        ((5, 136, 64), [3, 0, 39, 1, 0], True),
        ((3, 72, 64), [18, 0, 2], False),
        ((4, 64, 192), [0, 0, 0, 2], True),
    ):
        with torch.device(device):
            parameter = experts.packed(torch.randn(shape, dtype=dtype), create_bnb_config(use_double_quant=double))
        W, dense = experts.operand(parameter), experts.unpacked(parameter).float()
        theirs = experts._unpacked(W.codes, W.absmax(), W, dtype).float()
        torch.testing.assert_close(dense, theirs, rtol=1e-2, atol=1e-6)  # within a bit of bfloat16
        offsets = torch.tensor(counts, device=device).cumsum(0).int()
        assert W.has_kernel(dtype, torch.device(device))
        for across in (True, False):
            x = torch.randn(sum(counts), shape[2] if across else shape[1], device=device, dtype=dtype)
            numbers = torch.searchsorted(offsets, torch.arange(len(x), device=device), right=True)
            expected = torch.einsum("ri,roi->ro" if across else "ri,rio->ro", x.float(), dense[numbers])
            found = expert_kernel.routed_product(x, offsets, W, across).float()
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
            by_op = experts.expert_product(x, offsets, *W, across).float()  # with torch's grouped product where it is
            torch.testing.assert_close(by_op, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.triton
def test_the_kernel_is_the_product_in_tritons_interpreter():
    interpret("tests.fast_path.test_experts", "check_kernel('cpu', torch.float16)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_is_the_product_on_the_gpu():
    check_kernel("cuda", torch.bfloat16)
    check_kernel("cuda", torch.float16)


@pytest.mark.triton
@pytest.mark.parametrize("capability, rows", [*((c, 16384) for c in CAPABILITIES), (89, 8)])
def test_the_kernel_fits_the_shared_memory_of_each_card(capability, rows):
    """The rows of 2,048 tokens and of an answer's token, with 8 of 128 experts each."""
    pointers = {"x": HALF, "y": HALF, "offsets": WHOLE, "codes": WHOLE, "absmax": "*u8"}
    pointers |= dict.fromkeys(("absmax2", "offset", "code2", "lut"), SINGLE)
    launch = expert_kernel.layout(rows, 128)
    constants = {"NESTED": True, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "EXPERTS": 128, "SHUFFLE": True}
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": expert_kernel.COLUMNS, "BLOCK_K": launch.block_k}
    for across in (True, False):
        compile_for(capability, expert_kernel.expert_kernel, pointers, constants | {"ACROSS": across}, launch.warps)


def test_nothing_unpacked_waits_for_the_backward_pass(tmp_path):
    """What autograd keeps for a layer's experts is smaller than one of its unpacked tensors times the experts of a token."""
    model = loaded("mixtral", tmp_path)
    module = next(iter(packed_modules(model).values()))
    kept: list[int] = []
    x = torch.randn(3, 64, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.is_floating_point()), lambda t: t
    )
    with hooks:
        module(x, torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    packed = {module._parameters[name].numel() for name in module.packed_names}
    assert 0 < sum(kept) < min(packed)


# ------------------------------------------------------------------------------------------------ against plain peft


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_experts_are_plain_pefts_on_the_unpacked_values(family, tmp_path):
    """Logits and the gradients of all adapters; the saved adapter goes onto the plain model with the same logits."""
    build(family, tmp_path)
    model = load_model_and_tokenizer(str(tmp_path), create_bnb_config(compute_dtype="float32"), device="cpu")[0]
    plain = merge.plain_copy(model)
    tensors = sorted({name for module in packed_modules(model).values() for name in module.packed_names})
    torch.manual_seed(1)
    asked = create_lora_config(rank=4, alpha=8, dropout=0.0, target_modules=OF_ATTENTION.get(family, ["o_proj"]))
    asked.target_parameters = tensors
    mine = prepare_model_for_training(model, asked, False).eval()
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(mine.named_parameters()):
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    mine.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(mine(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        with mine.disable_adapter():
            assert (mine(input_ids=IDS, use_cache=False).logits - expected).abs().max() > 1e-2
    found, right = gradients(mine), gradients(theirs)
    on_experts = {name for name in right if ".experts." in name}
    assert len(on_experts) == 2 * 2 * len(packed_modules(model)) and found.keys() == right.keys()
    for name, grad in right.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


# ------------------------------------------------------------------------------------------------ memory


MEASURE = """
    import ctypes, gc, sys, threading, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import torch
    from quantization_utils import create_bnb_config, load_model_and_tokenizer, load_tokenizer

    def anonymous():
        return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in l) * 1024

    tokenizer = load_tokenizer(sys.argv[1])
    load_model_and_tokenizer(sys.argv[2] + "/tiny/model", create_bnb_config(), device="cpu")  # what is imported late
    peak, done, before = [0], [], anonymous()
    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = load_model_and_tokenizer(sys.argv[1], create_bnb_config(), device="cpu", tokenizer=tokenizer)
    done.append(1)
    thread.join()
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
    print(peak[0] - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it reads RssAnon of /proc")
def test_loading_needs_little_more_memory_than_the_packed_weights(tiny_model, tmp_path):
    """A mixture of 8 layers with 24 experts each: 0.30 GB in 16 bit, of which a layer is 0.04 GB."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
        num_experts=24, num_experts_per_tok=4, moe_intermediate_size=512, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    of_experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    rest = 2 * sum(p.numel() for p in model.parameters()) - 2 * of_experts
    del model
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path), str(ROOT)]
    # glibc keeps pieces of its heap that were freed, up to 80 MB here by chance; experts of a real model are larger than the
    # 32 MB from which it returns them at once, as it does here from 64 kB.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | malloc)
    assert done.returncode == 0, done.stderr
    peak, after = map(int, done.stdout.split())
    packed, layer = of_experts * 0.516, 2 * of_experts / 8
    print(
        f"peak {peak / 1e6:.0f} MB, after {after / 1e6:.0f}, packed {packed / 1e6:.0f}, a layer {layer / 1e6:.0f}, rest {rest / 1e6:.0f}"
    )
    assert after < packed + rest + 2e7
    assert peak < packed + rest + 3 * layer < 0.75 * 2 * of_experts


# ------------------------------------------------------------------------------------------------ experts in main memory


@pytest.mark.parametrize(
    "family, layers, checkpointed", [("qwen3_moe", 2, 0), ("deepseek_v3", 4, 4), ("gpt_oss", 5, 2)]
)
def test_fetched_experts_give_the_same_numbers(family, layers, checkpointed, tmp_path):
    """Logits, gradients and a second step, with and without layers that are recomputed, while two layers have a slot."""
    resident, stored = (deep(family, layers, tmp_path / str(n)) for n in range(2))
    for model in (resident, stored):
        model.requires_grad_(False).model.embed_tokens.weight.requires_grad_(True)
        model.train()
        set_gradient_checkpointing(model, checkpointed)
    expert_store.keep_in_main_memory(stored, torch.device("cpu"))
    modules = list(packed_modules(stored).values())
    store = modules[0].store
    assert modules == store.modules
    copies = count_copies(store)
    for step in range(3):
        with torch.no_grad():
            logits = [model(input_ids=IDS, use_cache=False).logits for model in (resident, stored)]
        assert torch.equal(*logits)
        right, found = gradients(resident), gradients(stored)
        assert right.keys() == found.keys() and all(torch.equal(found[name], right[name]) for name in right)
        for slot in store.slots:
            slot.zero_()  # as a graph that is replayed may leave other layers there
        if step == 0:
            copies.clear()
    count = len(modules)  # of a step: up without gradients, up and down with them, less those that are there already
    assert len(copies) / 2 <= 3 * count
    assert sum(len(slot) for slot in store.slots) == 2 * max(len(buffer) for buffer, _ in store.layers)


def test_each_layer_is_there_before_it_is_needed(tmp_path):
    """But for the first layer of a forward pass each copy is foreseen: none waits for a copy that starts when it computes."""
    model = deep("qwen3_moe", 5, tmp_path)
    model.requires_grad_(False).model.embed_tokens.weight.requires_grad_(True)
    expert_store.keep_in_main_memory(model, torch.device("cpu"))
    store = next(iter(packed_modules(model).values())).store
    late: list[int] = []
    expect = store.expect

    def watched(number: int, turns: bool) -> None:
        late.extend([number] if number not in store.holds else [])
        expect(number, turns)

    store.expect = watched
    copies = count_copies(store)
    for checkpointed in (0, 5):
        model.train()
        set_gradient_checkpointing(model, checkpointed)
        gradients(model)
    assert late == [0, 0]
    assert copies == [0, 1, 2, 3, 4, 2, 1, 0] * 2


def count_copies(store: expert_store.ExpertStore) -> list[int]:
    """Return a list to which each copy adds the number of its layer."""
    copies: list[int] = []
    fetch = store._fetch

    def watched(number: int, slot: int) -> None:
        copies.append(number)
        fetch(number, slot)

    store._fetch = watched
    return copies


def deep(family: str, layers: int, folder: Path) -> nn.Module:
    """Return a family's small model with more layers, as the scripts load it, in fp32."""
    model = small_model(family)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    vars(config).update(dict.fromkeys(own_dropout(config), 0.0))
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    torch.manual_seed(0)
    type(model)(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder)
    return load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype="float32"), device="cpu")[0]


def test_stored_experts_merge_into_the_same_plain_model(tmp_path):
    model = deep("qwen3_moe", 2, tmp_path)
    before = {name: tensor.clone() for name, tensor in merge.persistent_tensors(model)}
    expert_store.keep_in_main_memory(model, torch.device("cpu"))
    after = dict(merge.persistent_tensors(model))
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("fetched", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_layers_have_the_same_gradients(fetched, tmp_path):
    """As on a GPU, with checkpointing inside: the layer is compiled whole, and experts are an operator to the compiler."""
    found = []
    for comp in (False, True):
        model = prepare_model_for_training(deep("qwen3_moe", 3, tmp_path), create_lora_config(dropout=0.0), 2)
        if comp and fetched:
            expert_store.keep_in_main_memory(model, torch.device("cpu"))
        generator = torch.Generator().manual_seed(2)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        attention.use_causal_attention(model.get_base_model())
        clock = dropout.DropoutClock(42, torch.device("cpu"))
        loss = CausalLMLoss(model, torch.float32)
        fuse(model, clock, 0.0, kernels=False)
        if comp:
            torch._dynamo.reset()
            compiled.compile_layers(model)
        dropout.train_adapters(model)
        clock.set(0, torch.tensor([0]))
        copies = count_copies(next(iter(packed_modules(model).values())).store) if comp and fetched else []
        loss(input_ids=IDS, labels=IDS).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert compiled.compiled_in_pieces() is None
    if fetched:  # of three layers the last two are there when the backward pass begins
        assert copies == [0, 1, 2, 0]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


def test_a_model_without_such_experts_cannot_keep_them_in_main_memory(tiny_model):
    with (
        experts.packing_experts(main_memory=True),
        pytest.raises(ConfigError, match="has no routed experts to which cpu applies"),
    ):
        AutoModelForCausalLM.from_pretrained(
            tiny_model, quantization_config=create_bnb_config(), device_map={"": "cpu"}
        )


def test_on_a_cpu_the_setting_changes_a_line(tmp_path):
    model = loaded("qwen3_moe", tmp_path)
    config = load_config((), {"quantization.experts": "cpu"})
    assert any(line.startswith("quantization.experts: cpu changes nothing") for line in base_lines(config, model))


@pytest.mark.parametrize(
    "family, targets, message",
    [
        ("qwen3_moe", "[q_proj, experts.middle_proj]", "the model has no experts.middle_proj"),
        ("qwen3_moe", "all-linear", "use --dropout 0, or --target_modules q_proj,k_proj,v_proj,o_proj without experts"),
        ("qwen3_moe", "[q_proj, gate]", "gate is the router of the experts, which stays frozen"),
        ("gpt_oss", "[q_proj, router]", "router is the router of the experts, which stays frozen"),
        ("llama4_text", "[q_proj, router]", "router is the router of the experts, which stays frozen"),
        ("llama4_text", "[experts.down_proj]", "experts that cannot be packed (Llama4TextExperts)"),
        ("jetmoe", "[layer, kv_proj]", "layer is the router of the experts, which stays frozen"),
        ("jetmoe", "[down_proj]", "the model has no down_proj; its own are --target_modules kv_proj\n"),
        ("zaya", "[fc1, q_proj]", "fc1 is the router of the experts, which stays frozen"),
    ],
)
def test_bad_targets_are_named_before_the_weights_are_read(family, targets, message, train, tmp_path, capfd):
    folder = build(family, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    layout = ("--experts", "16bit") if family in ("llama4_text", "jetmoe") else ()
    code, output = train("--model_name", str(folder), "--target_modules", targets, *layout)
    assert code == 2 and not output.exists()
    error = capfd.readouterr().err
    assert "lora.target_modules: " in error and message in error
