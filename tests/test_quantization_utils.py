"""Real 4-bit weights, preparation with every dtype pinned, and counts against hand arithmetic."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import config as schema
import quantization_utils
import train_qlora
from config import ConfigError
from fast_path import layers as layers_module
from fast_path.families import known_positions
from quantization_utils import (
    DEFAULT_TARGETS,
    count_parameters,
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    load_tokenizer,
    parameter_line,
    prepare_model_for_training,
    set_gradient_checkpointing,
)
from toolkit import machine
from toolkit.adapters import load_adapter
from toolkit.base_lines import base_lines, check_length, unpacked_line
from toolkit.machine import check_nf4
from toolkit.memory_plan import PLAIN, configured_shape, plan_memory
from toolkit.model_shape import adapter_parameters, model_shape

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(folder, quantised: bool = True, compute_dtype: str = "bfloat16", **arguments):
    """The model alone, on the CPU."""
    bnb_config = create_bnb_config(compute_dtype=compute_dtype, load_in_4bit=quantised)
    return load_model_and_tokenizer(str(folder), bnb_config, compute_dtype=compute_dtype, device="cpu", **arguments)[0]


def linears_4bit(model) -> dict[str, bnb.nn.Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def tokens(length: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 4096, (batch, length), generator=torch.Generator().manual_seed(1))


def no_bf16_gpu(monkeypatch) -> None:
    """Let torch say that there is a GPU of before Ampere; nothing asks it to compute."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GeForce RTX 2060 of this test")


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("use_double_quant", [True, False])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16", "float32"])
def test_bnb_config_says_what_was_asked(quant_type, use_double_quant, compute_dtype):
    made = create_bnb_config(quant_type=quant_type, compute_dtype=compute_dtype, use_double_quant=use_double_quant)
    assert made.load_in_4bit and not made.load_in_8bit
    assert made.bnb_4bit_quant_type == quant_type
    assert made.bnb_4bit_use_double_quant is use_double_quant
    assert made.bnb_4bit_compute_dtype is getattr(torch, compute_dtype)


def test_bnb_config_defaults_are_the_tutorials():
    made = create_bnb_config()
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert made.bnb_4bit_use_double_quant
    assert vars(schema.QuantizationConfig()) == {
        "load_in_4bit": True,
        "quant_type": "nf4",
        "compute_dtype": "bfloat16",
        "use_double_quant": True,
        "products": "bf16",  # of training, which is not transformers' either
        "experts": "gpu",  # where they lie, which transformers' configuration does not say
    }  # the same in config.yaml's schema


def test_without_4bit_there_is_no_bnb_config():
    assert create_bnb_config(load_in_4bit=False) is None


def test_gpu_without_bfloat16_gets_float16_and_one_line(monkeypatch, capsys):
    no_bf16_gpu(monkeypatch)
    assert create_bnb_config().bnb_4bit_compute_dtype is torch.float16
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "RTX 2060" in lines[0] and "float16" in lines[0]
    for _ in range(3):  # a run asks more than once, and says it once
        create_bnb_config()
    assert capsys.readouterr().err == ""
    assert create_bnb_config(compute_dtype="float32").bnb_4bit_compute_dtype is torch.float32
    assert capsys.readouterr().err == ""


def test_gpu_with_bfloat16_keeps_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert create_bnb_config().bnb_4bit_compute_dtype is torch.bfloat16
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "capability, flags, dtype",
    [("AVX2", {}, "float32"), ("AVX2", {"quantization.compute_dtype": "bfloat16"}, "bfloat16"), ("AVX512", {}, "bfloat16")],
)  # fmt: skip
def test_cpu_without_avx512_computes_in_float32_unless_a_flag_says_otherwise(
    tiny_model, monkeypatch, capability, flags, dtype
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = schema.load_config((), {"model.name": str(tiny_model), **flags})
    model, _ = quantization_utils.load_base(config, torch.device("cpu"))
    assert model.dtype is getattr(torch, dtype) is quantization_utils.compute_dtype_of(config)
    assert quantization_utils.replaces_bf16(config) == (dtype == "float32")
    assert all(module.compute_dtype is model.dtype for module in linears_4bit(model).values())


def test_lora_config_defaults_are_the_tutorials():
    made = create_lora_config()
    assert (made.r, made.lora_alpha, made.lora_dropout, made.bias) == (16, 32.0, 0.05, "none")
    assert made.target_modules == {*ATTENTION, "gate_proj", "up_proj", "down_proj"} == set(DEFAULT_TARGETS)
    assert str(made.task_type.value if hasattr(made.task_type, "value") else made.task_type) == "CAUSAL_LM"
    assert not made.use_rslora and not made.use_dora
    assert create_lora_config(target_modules="all-linear").target_modules == "all-linear"
    assert create_lora_config(target_modules=("q_proj",)).target_modules == {"q_proj"}


@pytest.mark.parametrize(
    "rank, alpha, use_rslora", [(8, 16.0, False), (4, 32.0, False), (16, 32.0, True), (9, 6.0, True)]
)
def test_update_is_scaled_by_alpha_over_rank_or_its_root(random_models, rank, alpha, use_rslora):
    model = load(random_models("qwen2"), compute_dtype="float32")
    lora = create_lora_config(rank=rank, alpha=alpha, dropout=0.0, target_modules=["q_proj"], use_rslora=use_rslora)
    layer = prepare_model_for_training(model, lora).base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (rank, 256) and b.shape == (256, rank)
    torch.nn.init.normal_(b)
    x = torch.randn(3, 5, 256)
    with torch.no_grad():
        update = layer(x) - layer.base_layer(x)
        expected = x @ a.t() @ b.t() * (alpha / math.sqrt(rank) if use_rslora else alpha / rank)
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-4)


def test_dora_has_magnitudes_that_leave_the_start_unchanged_and_learn(random_models):
    ids = tokens(12)
    model = load(random_models("qwen2"), compute_dtype="float32")
    with torch.no_grad():
        before = model(ids).logits
    prepared = prepare_model_for_training(model, create_lora_config(use_dora=True, dropout=0.0))
    magnitudes = [p for name, p in prepared.named_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 2 * 7 and all(p.requires_grad and p.dtype is torch.float32 for p in magnitudes)
    torch.testing.assert_close(prepared(ids).logits, before, rtol=1e-4, atol=1e-4)
    prepared(ids).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in magnitudes)


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma2"])
def test_linear_layers_are_packed_and_the_rest_keeps_the_compute_dtype(random_models, family):
    model = load(random_models(family))
    packed = linears_4bit(model)
    assert len(packed) == 2 * 7 and not any("lm_head" in name for name in packed)
    for module in packed.values():
        assert type(module.weight) is bnb.nn.Params4bit and module.weight.dtype is torch.uint8
        assert module.weight.numel() == module.in_features * module.out_features // 2
        assert module.quant_state.quant_type == "nf4" and module.quant_state.nested
        assert module.compute_dtype is torch.bfloat16 and not module.support_avx512bf16_for_cpu
    others = [p for name, p in model.named_parameters() if type(p) is not bnb.nn.Params4bit]
    assert {p.dtype for p in others} == {torch.bfloat16} and {p.device.type for p in model.parameters()} == {"cpu"}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == model.config.tie_word_embeddings


def test_quantised_weights_are_bitsandbytes_own(random_models):
    folder = random_models("llama")
    packed, dense = linears_4bit(load(folder)), dict(load(folder, quantised=False).named_modules())
    for name, module in packed.items():
        expected, state = bnb.functional.quantize_4bit(
            dense[name].weight.data, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(module.weight.data.flatten(), expected.flatten())
        assert torch.equal(module.quant_state.absmax, state.absmax)


@pytest.mark.parametrize("quant_type, use_double_quant", [("fp4", True), ("nf4", False)])
def test_type_and_double_quantisation_reach_the_weights(random_models, quant_type, use_double_quant):
    bnb_config = create_bnb_config(quant_type=quant_type, use_double_quant=use_double_quant)
    model, _ = load_model_and_tokenizer(str(random_models("qwen2")), bnb_config, device="cpu")
    states = [module.quant_state for module in linears_4bit(model).values()]
    assert {s.quant_type for s in states} == {quant_type} and {s.nested for s in states} == {use_double_quant}
    assert {s.absmax.dtype for s in states} == {torch.uint8 if use_double_quant else torch.float32}


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_without_4bit_the_base_stays_whole(random_models, compute_dtype):
    model = load(random_models("qwen2"), quantised=False, compute_dtype=compute_dtype)
    assert not linears_4bit(model)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, compute_dtype)}


def test_attention_that_the_model_lacks_is_named_by_its_key(random_models):
    with pytest.raises(ConfigError) as caught:
        load(random_models("gemma2"), attn_implementation="sdpa")  # Gemma2 has none: its scores are soft-capped
    (problem,) = caught.value.problems
    assert problem.startswith("model.attn_implementation: Gemma2ForCausalLM does not have") and "eager" in problem


def test_auto_takes_what_the_model_has_and_says_what_it_costs(random_models):
    config = schema.load_config([], {})
    found = {family: base_lines(config, load(random_models(family))) for family in ("qwen2", "gemma2")}
    assert found["qwen2"] == []
    assert [line.partition(";")[0] for line in found["gemma2"]] == [
        "attention: eager, since Gemma2ForCausalLM has no sdpa"
    ]


def test_more_checkpointed_layers_than_there_are_is_said(random_models):
    model = load(random_models("qwen2"))
    layers = model.config.num_hidden_layers
    said = [
        base_lines(schema.load_config([], {"training.gradient_checkpointing": str(n)}), model)
        for n in (layers, layers + 1)
    ]
    assert said[0] == []
    assert said[1] == [
        f"warning: training.gradient_checkpointing: {layers + 1} layers are more than the {layers} that the model has: "
        "all are checkpointed"
    ]


SIZES = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
SEEING = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SIZES),
    "gemma3": Gemma3Config(
        text_config=LLAMA_LIKE | {"sliding_window": 16}, vision_config=SEEING | {"image_size": 28, "patch_size": 14}
    ),
    "phi3": Phi3Config(**{key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}, pad_token_id=0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_counts_what_a_run_of_another_family_has(tiny_model, tmp_path, name):
    """Conv1D is packed, FalconLinear is not; adapters stay in the language half of a model that sees."""
    AutoModelForCausalLM.from_config(OTHERS[name]).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    flags = {"model.name": str(tmp_path), "lora.dropout": 0.0}
    if name != "gemma3":  # whose two halves have linears of the seven default names
        with pytest.raises(ConfigError, match="its own are --target_modules ") as caught:
            configured_shape(schema.load_config([], flags))
        own = str(caught.value).rpartition(" ")[2].split(",")
        flags["lora.target_modules"] = own
    config = schema.load_config([], flags | {"quantization.compute_dtype": "float32"})
    shape, model = configured_shape(config), load(tmp_path, compute_dtype="float32")
    assert {n for n, _, _ in shape.linears} == set(linears_4bit(model))
    lines = unpacked_line(model)
    assert ("FalconLinear" in " ".join(lines)) == (name == "falcon")
    prepared = prepare_model_for_training(model, create_lora_config(**config.lora.arguments), False)
    trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
    assert adapter_parameters(shape, config) == count_parameters(prepared)[0] > 0
    assert shape.parameters == count_parameters(prepared)[1] - count_parameters(prepared)[0]
    assert name != "gemma3" or all("language_model" in n for n in trained)


def test_pickled_weights_are_refused(random_models, tmp_path):
    source = random_models("qwen2")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.name.*safetensors") as caught:
        load(tmp_path)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


@pytest.mark.parametrize(
    "family, key, value, words",
    [
        ("llama", "pad_token_id", 99_999, "pad_token_id in its config.json is not below vocab_size"),
        ("llama", "num_hidden_layers", 10**9, "at most 1,000 layers, got num_hidden_layers 1000000000 in config.json"),
        ("qwen2", "num_hidden_layers", 10**9, "at most 1,000 layers, got num_hidden_layers 1000000000 in config.json"),
    ],
)
def test_impossible_numbers_in_config_json_are_one_line(random_models, tmp_path, family, key, value, words):
    """From loading, and from the plan, which builds the model without weights.

    Qwen2's configuration lists the kinds of its layers, a billion of them before anybody could look at the number.
    """
    folder = shutil.copytree(random_models(family), tmp_path / "model")
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {key: value}
    (folder / "config.json").write_text(json.dumps(found), encoding="utf-8")
    for read in (load, model_shape):
        with pytest.raises(ConfigError) as caught:
            read(str(folder))
        (problem,) = caught.value.problems
        assert problem.startswith("model.name: ") and problem.endswith(words), problem


def test_weights_of_layers_without_a_place_are_said(random_models, tmp_path, capsys):
    folder = shutil.copytree(random_models("llama"), tmp_path / "model")
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    load(folder)
    assert "has no place" not in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(found | {"num_hidden_layers": 1}), encoding="utf-8")
    load(folder)
    said = f"warning: model.name: {folder} has weights for which its config.json has no place, such as model.layers.1."
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_folder_is_one_line_that_names_it(random_models, tmp_path, damage):
    for path in random_models("qwen2").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == damage else content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    (problem,) = caught.value.problems
    assert problem.startswith("model.name: ") and str(tmp_path) in problem and "\n" not in problem


@pytest.mark.parametrize("name", ["no-such/model", "./no/such/folder", "/nowhere/at/all"])
def test_name_of_nothing_is_one_line(name):
    with pytest.raises(ConfigError) as caught:
        load(name)
    (problem,) = caught.value.problems
    assert problem.startswith("model.name: ") and name in problem


def test_model_stored_in_4bit_keeps_its_bytes(random_models, tmp_path, capsys):
    first = load(random_models("qwen2"))
    first.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((random_models("qwen2") / name).read_bytes())
    capsys.readouterr()
    # Other settings than it is stored with: its own win, with a line.
    model, _ = load_model_and_tokenizer(
        str(tmp_path), create_bnb_config(quant_type="fp4", use_double_quant=False), device="cpu"
    )
    assert len([line for line in capsys.readouterr().err.splitlines() if "4 bit" in line]) == 1
    again, before = linears_4bit(model), linears_4bit(first)
    assert again.keys() == before.keys()
    for name, module in again.items():
        assert type(module.weight) is bnb.nn.Params4bit and not module.support_avx512bf16_for_cpu
        assert torch.equal(module.weight.data, before[name].weight.data)
        assert module.quant_state.quant_type == "nf4"
        assert torch.equal(module.quant_state.absmax, before[name].quant_state.absmax)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, first.eval()(ids).logits)
    assert count_parameters(model)[1] == count_parameters(first)[1]


def test_padding_token_comes_without_growing_anything(random_models, tmp_path):
    for path in random_models("qwen2").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    size = len(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    model, tokenizer = load_model_and_tokenizer(str(tmp_path), create_bnb_config(), device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == size and tokenizer.pad_token_id < size
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 4096


def test_padding_token_of_its_own_is_kept(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_tokenizer_file_wins_over_a_class_that_would_change_it(tiny_model, tmp_path):
    """tokenizer_class GPT2Tokenizer, as in SmolLM2's folder, rebuilds the pre-tokenizer and loses the digits' split."""
    tree = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    model, digits = tree["model"], {"type": "Digits", "individual_digits": True}
    model["vocab"]["16"] = max(model["vocab"].values()) + 1  # a merge that only a lost pre-tokenizer would let happen
    model["merges"].append(["1", "6"] if isinstance(model["merges"][0], list) else "1 6")
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tree["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    from tokenizers import Tokenizer

    text = "In 1603 he wrote 24 plays, and 5 more in 1611."
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert model["vocab"]["16"] not in expected and tokenizer.decode(expected) == text


# ------------------------------------------------------------------------------------------------ the CPU bug


def gradients(folder, ids, evaluate_first: bool):
    """Loss and gradients of one training step in bfloat16, on its own or after an evaluation of the same model."""
    model = load(folder)
    torch.manual_seed(0)
    model = prepare_model_for_training(model, create_lora_config(dropout=0.0), use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # with B at zero the gradients of A would be zero
            torch.nn.init.normal_(parameter, std=0.02)
    if evaluate_first:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.eval()(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_evaluating_first_changes_nothing_about_training(random_models):
    """bitsandbytes repacks weights in the first evaluation on a CPU with AVX512-BF16; gradients after it are wrong."""
    folder, ids = random_models("qwen2"), tokens()
    loss, alone = gradients(folder, ids, evaluate_first=False)
    after, grads = gradients(folder, ids, evaluate_first=True)
    assert after == loss
    assert grads.keys() == alone.keys() and all(torch.equal(grads[name], alone[name]) for name in alone)
    assert all(grad.abs().sum() > 0 for grad in alone.values())


# ------------------------------------------------------------------------------------------------ preparation


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_preparation_pins_every_dtype(random_models, family, compute_dtype):
    model = load(random_models(family), compute_dtype=compute_dtype)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    prepared = prepare_model_for_training(model, create_lora_config())
    assert isinstance(prepared, PeftModel)
    adapters, base = {}, {}
    for name, parameter in prepared.named_parameters():
        (adapters if "lora_" in name else base)[name] = parameter
    assert len(adapters) == 2 * 7 * 2
    assert all(p.requires_grad and p.dtype is torch.float32 for p in adapters.values())
    assert not any(p.requires_grad for p in base.values())
    # Nothing of the base was cast, copied or moved: embedding and norms in the compute dtype, the rest packed.
    assert {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): (p.data_ptr(), p.dtype) for n, p in base.items()
    } == before
    for name, parameter in base.items():
        quantised = "_proj.base_layer.weight" in name
        assert parameter.dtype is (torch.uint8 if quantised else getattr(torch, compute_dtype)), name
        assert (type(parameter) is bnb.nn.Params4bit) == quantised
    assert all(
        not b.is_floating_point() or b.dtype is torch.float32 for _, b in prepared.named_buffers()
    )  # rotary angles
    assert prepared.config.use_cache is False


@pytest.mark.parametrize("asked, expected", [(True, 2), (False, 0), (0, 0), (1, 1), (2, 2), (99, 2)])
def test_first_layers_recompute_and_no_others(random_models, asked, expected):
    model = prepare_model_for_training(load(random_models("qwen2")), create_lora_config(), asked)
    layers = model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [i < expected for i in range(2)]
    assert set_gradient_checkpointing(model, asked) == expected
    runs = [0, 0]
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda module, arguments, i=i: runs.__setitem__(i, runs[i] + 1))
    model.train()(tokens()).logits.float().square().mean().backward()
    assert runs == [2 if i < expected else 1 for i in range(2)]  # once more in the backward
    model.eval()(tokens()).logits.float().square().mean().backward()
    assert runs == [3 if i < expected else 2 for i in range(2)]  # an evaluation recomputes nothing


def test_recomputing_gives_the_same_gradients_without_reentrance(random_models):
    """Reentrant checkpointing would give the first layers no gradient: the frozen embedding's output has none."""
    results = []
    for asked in (False, 1, True):
        torch.manual_seed(0)
        model = prepare_model_for_training(load(random_models("qwen2")), create_lora_config(dropout=0.0), asked)
        model.train()(tokens()).logits.float().square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    assert all(grad.abs().sum() > 0 for grad in results[0].values())
    for other in results[1:]:
        assert all(torch.equal(other[name], grad) for name, grad in results[0].items())


def test_wrong_target_lists_the_linear_layers(random_models):
    with pytest.raises(ConfigError) as caught:
        prepare_model_for_training(
            load(random_models("llama")), create_lora_config(target_modules=["q_proj", "query", "wi"])
        )
    (problem,) = caught.value.problems
    assert problem.startswith("lora.target_modules: ") and "query" in problem and "wi" in problem
    names = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert names in problem and "lm_head" not in problem


def test_target_that_is_no_linear_layer_is_one_line(random_models):
    with pytest.raises(ConfigError) as caught:
        prepare_model_for_training(load(random_models("llama")), create_lora_config(target_modules=["input_layernorm"]))
    (problem,) = caught.value.problems
    assert problem.startswith("lora.target_modules: ") and "\n" not in problem


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("quantised", [True, False])
def test_all_linear_means_all_but_the_head(random_models, family, quantised):
    model = load(random_models(family), quantised=quantised)
    lora = create_lora_config(target_modules="all-linear")
    prepared = prepare_model_for_training(model, lora)
    adapted = {name.rpartition(".")[2] for name, m in prepared.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(DEFAULT_TARGETS)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_adapter_on_the_head_learns_and_comes_back(random_models, tmp_path, family):
    """Tied or not: the head's adapter gets gradients, the embedding stays, and a saved one gives the same logits."""
    model = load(random_models(family), compute_dtype="float32")
    embedding = model.get_input_embeddings().weight.clone()
    prepared = prepare_model_for_training(model, create_lora_config(target_modules=["q_proj", "lm_head"], dropout=0.0))
    head = prepared.get_base_model().get_output_embeddings()
    torch.nn.init.normal_(head.lora_B["default"].weight, std=0.02)
    ids = tokens()
    prepared.train()(ids).logits.square().mean().backward()
    assert head.lora_A["default"].weight.grad.abs().sum() > 0 and head.lora_B["default"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        expected = prepared.eval()(ids).logits
    prepared.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load_adapter(load(random_models(family), compute_dtype="float32"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    assert torch.equal(again.get_base_model().get_input_embeddings().weight, embedding)


# ------------------------------------------------------------------------------------------------ adapters from folders


@pytest.fixture(scope="module")
def adapter(random_models, tmp_path_factory) -> Path:
    """A folder with an adapter of the random Qwen2, B not zero."""
    prepared = prepare_model_for_training(load(random_models("qwen2")), create_lora_config(rank=4))
    for name, parameter in prepared.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    prepared.save_pretrained(folder)
    return folder


def test_adapter_changes_the_model_and_is_in_eval_mode(random_models, adapter):
    ids, model = tokens(), load(random_models("qwen2"))
    with torch.no_grad():
        before = model(ids).logits
        with_adapter = load_adapter(model, adapter)
        assert not with_adapter.training
        assert not torch.equal(with_adapter(ids).logits, before)
        with with_adapter.disable_adapter():
            assert torch.equal(with_adapter(ids).logits, before)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", "pickled"])
def test_incomplete_adapter_is_one_line(random_models, adapter, tmp_path, missing):
    for path in adapter.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    if missing == "pickled":
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="--adapter: no adapter_"):
        load_adapter(load(random_models("qwen2")), tmp_path)


@pytest.mark.parametrize("damage", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapter_is_one_line(random_models, adapter, tmp_path, damage):
    for path in adapter.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == damage else content)
    with pytest.raises(ConfigError) as caught:
        load_adapter(load(random_models("qwen2")), tmp_path)
    (problem,) = caught.value.problems
    assert problem.startswith("--adapter: ") and str(tmp_path) in problem


def test_adapter_of_another_shape_is_refused(tiny_model, random_models, adapter):
    with pytest.raises(ConfigError, match="--adapter: .*does not fit"):
        load_adapter(load(tiny_model), adapter)  # the tiny model's MLP is 704 wide, not 512


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("family, rank", [("qwen2", 16), ("llama", 3), ("qwen3", 8)])
def test_count_against_hand_arithmetic(random_models, family, rank, quantised):
    model = load(random_models(family), quantised=quantised)
    settings = model.config
    hidden, mlp, layers = settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers
    head_size = getattr(settings, "head_dim", None) or hidden // settings.num_attention_heads
    queries, keys = settings.num_attention_heads * head_size, settings.num_key_value_heads * head_size
    shapes = [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    biases = queries + 2 * keys if family == "qwen2" else 0
    norms = 2 * hidden + (2 * head_size if family == "qwen3" else 0)
    layer = sum(a * b for a, b in shapes) + biases + norms
    embedding = settings.vocab_size * hidden
    base = layers * layer + hidden + embedding * (1 if settings.tie_word_embeddings else 2)
    assert count_parameters(model)[1] == base
    trainable = layers * sum(rank * (a + b) for a, b in shapes)
    prepared = prepare_model_for_training(model, create_lora_config(rank=rank))
    assert count_parameters(prepared) == (trainable, base + trainable)


@pytest.mark.parametrize("targets, trainable", [(DEFAULT_TARGETS, 29_933_568), (ATTENTION, 7_372_800)])
def test_figures_of_the_3b_model(qwen_3b, targets, trainable):
    """spec.md's table: 29,933,568 of 3,115,872,256 are 0.9607 %."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(qwen_3b))
        base.tie_weights()
        model = get_peft_model(base, create_lora_config(target_modules=targets))
    assert count_parameters(model) == (trainable, 3_085_938_688 + trainable)
    if trainable == 29_933_568:
        assert (
            parameter_line(model) == "trainable params: 29,933,568 || all params: 3,115,872,256 || trainable%: 0.9607"
        )
    else:
        assert parameter_line(model).endswith("trainable%: 0.2383")


def test_weights_take_the_bytes_that_the_plan_says(random_models):
    """The plan's exact parts against a loaded model's tensors: packed bytes, constants, and what keeps its dtype."""
    model = load(random_models("llama"))
    parts = plan_memory(model_shape(str(random_models("llama"))), schema.load_config([]), 1, 2, PLAIN).parts
    states = [module.quant_state for module in linears_4bit(model).values()]
    assert parts["packed weights"] == sum(m.weight.nbytes for m in linears_4bit(model).values())
    assert parts["quantisation constants"] == sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    others = [p.nbytes for p in model.parameters() if type(p) is not bnb.nn.Params4bit]
    assert parts["embedding and head"] + parts["norms and biases"] == sum(others)


# ------------------------------------------------------------------------------------------------ installation check


def test_installation_check_is_a_line_each_and_exits_0(run_cli):
    done = run_cli("quantization_utils.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    starts = ["versions: ", "GPU: ", "Triton: "]
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        step = f"training step on {device}: "
        starts += [f"NF4 on {device}: right", f"{step}plain, loss 6.", f"{step}fast path: fused_lora"]
    starts += ["disk: ", "hub: "]
    if torch.cuda.is_available():
        starts[2:2] = ["bfloat16: "]
    assert len(lines) == len(starts) + 1 and lines[-1] == "training can run here"
    for line, start in zip(lines, starts, strict=False):
        assert line.startswith(start)
    for name in ("Python", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"):
        assert re.search(rf"\b{name} \d", lines[0])


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("peft.py", "import peft: fails: ImportError: broken on purpose"),
        ("fast_path/loss.py", "import train_qlora: fails: ImportError: broken on purpose"),
        ("yaml.py", "import yaml: fails: ImportError: broken on purpose"),
    ],
)
def test_installation_check_names_a_module_that_a_run_could_not_import(tmp_path, module, named):
    """In a copy of the project, since the folder of the script comes first on sys.path."""
    project = Path(quantization_utils.__file__).parent
    for path in [*project.glob("*.py"), *project.glob("toolkit/*.py"), *project.glob("fast_path/*.py")]:
        copy = tmp_path / path.relative_to(project)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / module).write_text("raise ImportError('broken on purpose')", encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "quantization_utils.py"], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert named in lines and lines[-1] == "training cannot run here: see the lines above"
    assert all(line.startswith("import ") for line in lines[:-1])


def test_installation_check_fails_where_a_step_does(monkeypatch, capsys):
    def fails(*arguments, **keywords):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(layers_module, "fuse", fails)
    assert quantization_utils.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "training step on cpu: fast path fails: RuntimeError: no compiler found" in lines
    assert any(line.startswith("training step on cpu: plain, loss ") for line in lines)
    assert lines[-1] == "training cannot run here: see the lines above"


def test_installation_check_fails_where_nothing_is_learned(monkeypatch):
    monkeypatch.setattr(train_qlora, "create_optimizer", lambda parameters, *rest: torch.optim.SGD(parameters, lr=0.0))
    lines, good = machine.step_lines(torch.device("cpu"))
    assert not good and len(lines) == 2
    assert all(
        re.match(r"training step on cpu: WRONG: .*, loss (\d\.\d+) -> \1 in .*, but the loss should fall", line)
        for line in lines
    )


def test_installation_check_fails_where_the_product_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(machine, "check_nf4", lambda device: 0.5)
    assert quantization_utils.main() == 1
    out = capsys.readouterr().out
    assert "NF4 on cpu: WRONG" in out and "cannot run" in out.splitlines()[-1]


def test_installation_check_fails_where_bitsandbytes_does(monkeypatch, capsys):
    def fails(*arguments, **keywords):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", fails)
    assert quantization_utils.main() == 1
    assert "NF4 on cpu: fails: no kernel image for this device" in capsys.readouterr().out.splitlines()


def test_positions_are_those_of_the_configuration_or_of_yarn():
    def scaled(kind, factor, positions, original=None, config=LlamaConfig, **rest):
        rope = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, **rest}
        return known_positions(config(max_position_embeddings=positions, rope_scaling=rope))

    assert known_positions(Qwen2Config(max_position_embeddings=32768)) == 32768
    assert scaled("yarn", 4.0, 32768, 32768, Qwen2Config) == 131072  # as Qwen2.5's page has it
    assert scaled("yarn", 40, 163840, 4096) == 163840  # DeepSeek-V3
    assert scaled("yarn", None, 32768, 32768) == 32768
    assert scaled("llama3", 32.0, 131072, 8192, low_freq_factor=1.0, high_freq_factor=4.0) == 131072  # Llama-3.2
    assert scaled("linear", 4.0, 4096) == 4096
    assert known_positions(Gemma3TextConfig(max_position_embeddings=8192)) == 8192  # two kinds of attention
    assert known_positions(GPT2Config(n_positions=77)) == 77
    assert known_positions(MambaConfig()) is None


def test_blocks_longer_than_a_table_of_positions_are_refused():
    assert check_length(2048, OPTConfig(max_position_embeddings=2048)) == []
    with pytest.raises(ConfigError, match="data.max_length: expected at most the model's 2,048 positions, got 2,049"):
        check_length(2049, OPTConfig(max_position_embeddings=2048))
    assert (
        len(check_length(2049, Qwen2Config(max_position_embeddings=2048))) == 1 and check_length(9, MambaConfig()) == []
    )


def test_no_gpu_is_told_apart(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only" in machine.no_gpu_reason() and "--index-url" in machine.no_gpu_reason()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in machine.no_gpu_reason() and "CPU-only" not in machine.no_gpu_reason()


def test_nf4_product_is_near_fp32_and_not_by_chance():
    assert 0 < check_nf4(torch.device("cpu")) < 0.01


# ------------------------------------------------------------------------------------------------ the real thing

REAL = os.environ.get("QLORA_REAL_MODEL", "")


@pytest.mark.real_model
@pytest.mark.skipif(not REAL, reason="QLORA_REAL_MODEL names no folder with SmolLM2-135M-Instruct")
def test_real_model_loads_with_its_exact_tokenizer():
    from tokenizers import Tokenizer

    model, tokenizer = load_model_and_tokenizer(REAL, create_bnb_config(), device="cpu")
    text = "In 2024 there were 12345 of them, at 3.14 each; naïve — 中文."
    exact = Tokenizer.from_file(str(Path(REAL) / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == exact
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()] == list(
        "2024" + "12345" + "3" + "14"
    )
    assert tokenizer.pad_token_id is not None and len(tokenizer) <= model.config.vocab_size
    assert len(linears_4bit(model)) == 7 * model.config.num_hidden_layers


@pytest.mark.real_model
@pytest.mark.skipif(not REAL, reason="QLORA_REAL_MODEL names no folder with SmolLM2-135M-Instruct")
def test_real_model_knows_its_english_in_4bit():
    model, tokenizer = load_model_and_tokenizer(REAL, create_bnb_config(), device="cpu")
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model.eval()(ids).logits[0, -1].argmax()).strip() == "Rome"
