"""Which modules get adapters, against what peft itself makes of the same settings."""

import dataclasses
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from config import ConfigError, load_config
from fast_path.families import decoder_layers, decoder_of, towers
from fast_path.model_targets import linear_names, resolved_targets
from fast_path.targets import layer_of, select
from quantization_utils import (
    adapter_lines,
    auto_class,
    count_parameters,
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
    quiet_libraries,
)
from toolkit.checkpoints import adapter_settings, targets_text
from toolkit.memory_plan import configured_shape
from toolkit.model_shape import adapter_parameters, shape_of

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fresh(folder):
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def by_peft(model, **settings):
    """Return the names of the modules that peft adapts."""
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).base_model.targeted_module_names


CHOICES = [
    {"target_modules": r".*layers\.[02]\.(self_attn\.(q|v)_proj|mlp\.down_proj)"},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": r"model\.layers\.0\.mlp\..*_proj", "exclude_modules": ["up_proj"]},
    {"target_modules": SEVEN, "exclude_modules": ["o_proj", "model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": SEVEN, "layers_to_transform": [1], "exclude_modules": r".*mlp.*"},
]


@pytest.mark.parametrize("settings", CHOICES)
def test_peft_adapts_the_same_modules_and_the_plan_counts_them(random_models, settings):
    folder = random_models("qwen2")
    expected = by_peft(fresh(folder), **settings)
    prepared = prepare_model_for_training(fresh(folder), create_lora_config(dropout=0.0, **settings), False)
    assert prepared.base_model.targeted_module_names == expected and expected
    saved = adapter_settings(prepared, "base")
    assert saved["target_modules"] == sorted(expected)
    assert saved["exclude_modules"] is saved["layers_to_transform"] is None
    assert f"adapters: on {len(expected)} of " in adapter_lines(prepared)[1]
    if "lm_head" not in str(settings):  # the plan's linear layers are without it
        flags = {f"lora.{key}": value for key, value in settings.items()} | {"model.name": str(folder)}
        config = load_config([], flags | {"lora.dropout": 0.0})
        assert adapter_parameters(configured_shape(config), config) == count_parameters(prepared)[0]


def test_a_saved_adapter_of_a_pattern_is_loaded_by_plain_peft(random_models, tmp_path):
    from peft import PeftModel

    folder = random_models("qwen2")
    torch.manual_seed(0)
    base = fresh(folder)
    weights = base.state_dict()
    asked = create_lora_config(
        dropout=0.0, target_modules=r".*\.[02]\..*(q|up)_proj", exclude_modules=[r"0.mlp.up_proj"]
    )
    model = prepare_model_for_training(base, asked, False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        again = fresh(folder)
        plain = {name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in weights.items()}
        again.load_state_dict(plain)
        loaded = PeftModel.from_pretrained(again, tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"target_modules": "nothing.*"}, r"lora.target_modules: 'nothing\.\*' matches no linear layer; the model's are "
         r"model\.layers\.N\.self_attn\.q_proj, .*"),
        ({"exclude_modules": ["o_proj", "w1"]}, r"lora.exclude_modules: 'w1' is no linear layer of the .*q_proj.*"),
        ({"exclude_modules": ["lm_head"]}, "lora.exclude_modules: 'lm_head' gets no adapter anyway: leave it out"),
        ({"exclude_modules": r".*norm"}, r"lora.exclude_modules: '\.\*norm' is no linear layer of the .*"),
        ({"exclude_modules": r".*proj"}, "lora.exclude_modules: leaves no layer to adapt; the model's are .*"),
        ({"layers_to_transform": [0, 99]}, "lora.layers_to_transform: expected numbers from 0 to 1, got 99"),
        ({"target_modules": ["embed_tokens"], "exclude_modules": ["x"]}, "lora.target_modules: .* matches no linear .*"),
    ],
)  # fmt: skip
def test_what_leaves_nothing_is_named_with_the_models_own_modules(random_models, settings, said):
    model = fresh(random_models("qwen2"))
    with pytest.raises(ConfigError, match=f"^{said}$"):
        resolved_targets(model, create_lora_config(**settings))
    if isinstance(settings.get("target_modules"), str) or "target_modules" not in settings:
        shape = shape_of(model)
        lora = dataclasses.replace(
            load_config().lora, **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        )
        with pytest.raises(ConfigError, match=f"^{said}$"):
            adapter_parameters(shape, dataclasses.replace(load_config(), lora=lora))


def test_a_layer_is_the_first_number_in_a_name():
    assert [layer_of(n) for n in ("model.layers.3.mlp.experts.1.w1", "transformer.h.0.attn.c_attn", "lm_head")] == [
        3,
        0,
        None,
    ]
    names = ["a.layers.0.q", "a.layers.1.q", "a.layers.10.q", "head"]
    assert select(names, "all-linear", None, [1], 11) == ["a.layers.1.q"]


def test_the_card_says_in_words_what_is_adapted():
    lora = load_config([], {"lora.target_modules": ".*(q|v)_proj", "lora.exclude_modules": "o_proj"}).lora
    assert targets_text(lora) == r".*(q\|v)_proj, without [o_proj]"
    lora = load_config([], {"lora.target_modules": "all-linear", "lora.layers_to_transform": "0,2"}).lora
    assert targets_text(lora) == "all-linear, in layers [0, 2]"


# ------------------------------------------------------------------------------------------------ mixtures of experts

EXPERTS = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe"]


@pytest.mark.parametrize("family", EXPERTS)
def test_the_seven_default_names_spare_the_experts(family):
    """Default settings, with dropout: attention gets adapters and no routed expert does."""
    from tests.families import small_model

    model = small_model(family)
    if family == "deepseek_v3":  # its attention has other names
        with torch.device("meta"):
            assert {"q_a_proj", "q_b_proj", "o_proj"} <= set(linear_names(model))
    prepared = prepare_model_for_training(model, create_lora_config(), False)
    adapted = prepared.base_model.targeted_module_names
    assert adapted and all("attn" in name or "attention" in name for name in adapted)
    assert not any("experts" in name for name, p in prepared.named_parameters() if p.requires_grad)
    (_, *others, line) = adapter_lines(prepared)
    left = "adapters: not on gate_proj, up_proj, down_proj: the routed experts get adapters only where they are named"
    shared = ", and peft takes dense and shared MLPs of these names for them"
    assert line == left + shared * (family in ("deepseek_v3", "glm4_moe"))
    own = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
    missing = (
        f"adapters: not on q_proj, k_proj, v_proj, which the model does not have; its own are --target_modules {own}"
    )
    assert others == ([missing] if family == "deepseek_v3" else [])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_peft_says_nothing_untrue_about_ranks_that_are_in_effect(family):
    """By their old names gate and up, which are one tensor, get a rank each; by its own name it gets one."""
    from tests.families import small_model

    def ranks(names):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            quiet_libraries()
            asked = create_lora_config(rank=4, alpha=8, dropout=0.0, target_modules=names)
            prepared = prepare_model_for_training(small_model(family), asked, False)
        assert not [one for one in said if issubclass(one.category, RuntimeWarning)]
        found = [m for m in prepared.modules() if getattr(m, "parameter_name", "") in ("gate_up_proj", "down_proj")]
        return {(m.parameter_name, m.r["default"], m.scaling["default"]) for m in found}

    assert ranks("all-linear") == {("gate_up_proj", 8, 2), ("down_proj", 4, 2)}
    assert ranks(["experts.gate_up_proj", "experts.down_proj"]) == {("gate_up_proj", 4, 2), ("down_proj", 4, 2)}


def test_all_linear_without_a_name_of_peft_says_how_to_reach_experts():
    from tests.families import small_model

    prepared = prepare_model_for_training(
        small_model("granitemoe"), create_lora_config(target_modules="all-linear"), False
    )
    (_, line) = adapter_lines(prepared)
    names = re.fullmatch("adapters: not on the routed experts; --dropout 0 --target_modules (.*) adapts them too", line)
    asked = create_lora_config(dropout=0.0, target_modules=names[1].split(","))
    again = prepare_model_for_training(small_model("granitemoe"), asked, False)
    assert any(".experts." in name for name, p in again.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["jetmoe", "dbrx", "llama4_text", "zaya"])
def test_no_setting_adapts_a_router_of_another_layout(family):
    from tests.families import small_model

    for targets in ("all-linear", ".*"):
        asked = create_lora_config(dropout=0.0, target_modules=targets)
        prepared = prepare_model_for_training(small_model(family), asked, False)
        trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
        assert trained and not any("router" in n or ".gate." in n for n in trained)
    assert not {"layer", "router", "fc1"} & set(linear_names(small_model(family)))


@pytest.mark.parametrize(
    "targets, said",
    [
        (["experts.w1", "experts.w9"], "the model has no experts.w1, experts.w9; its own are --target_modules "
         "q_proj,k_proj,v_proj,o_proj, and for its experts, with --dropout 0, experts.gate_up_proj,experts.down_proj"),
        (["experts.gate_up_proj", "experts.w9"], "the model has no experts.w9; .* experts.gate_up_proj,experts.down_proj"),
        (["experts"], "experts is no linear layer but Qwen3MoeExperts; .* experts.gate_up_proj,experts.down_proj"),
        (["q_proj", "mlp"], "mlp is no linear layer but Qwen3MoeSparseMoeBlock; its own are .*"),
        (".*experts.*", r"'\.\*experts\.\*' matches no linear layer; .* named in a list: --target_modules experts\..*"),
    ],
)  # fmt: skip
def test_a_target_that_misses_the_experts_is_told_their_names(targets, said):
    from tests.families import fresh_model

    with torch.device("meta"), pytest.raises(ConfigError, match=f"^lora.target_modules: {said}$"):
        resolved_targets(fresh_model("qwen3_moe"), create_lora_config(dropout=0.0, target_modules=targets))


def test_a_convolution_is_no_expert():
    """The plan calls its weights otherwise, and names that a model lacks are an error as in any other."""
    from tests.families import small_model

    model = small_model("lfm2")
    assert shape_of(model).experts.all == 0 and shape_of(small_model("qwen3_moe")).experts.all > 0
    with pytest.raises(ConfigError, match="the model has no .*; its own are --target_modules q_proj,.*,w2$"):
        prepare_model_for_training(model, create_lora_config(), False)


def test_a_shared_expert_is_no_routed_one():
    from tests.families import small_model

    prepared = prepare_model_for_training(small_model("qwen2_moe"), create_lora_config(), False)
    adapted = prepared.base_model.targeted_module_names
    assert {n.rpartition(".")[2] for n in adapted} == set(SEVEN) and any(
        "shared_expert.down_proj" in n for n in adapted
    )
    assert not any(".experts." in name for name, p in prepared.named_parameters() if p.requires_grad)
    assert len(adapter_lines(prepared)) == 1


def test_experts_that_are_named_get_adapters_without_dropout_and_the_error_says_so():
    from tests.families import small_model

    named = ["q_proj", "gate_proj", "up_proj", "down_proj", "v_proj"]
    with pytest.raises(
        ConfigError, match="these names include the experts.* --dropout 0, or --target_modules q_proj,k_"
    ):
        prepare_model_for_training(small_model("qwen3_moe"), create_lora_config(target_modules=named), False)
    with pytest.raises(ConfigError, match="without DoRA; use --use_dora false, or --target_modules q_proj"):
        asked = create_lora_config(dropout=0.0, target_modules=named, use_dora=True)
        prepare_model_for_training(small_model("qwen3_moe"), asked, False)
    model = prepare_model_for_training(
        small_model("qwen3_moe"), create_lora_config(dropout=0.0, target_modules=named), False
    )
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family, name", [("mixtral", "gate"), ("qwen3_moe", "mlp.gate"), ("hunyuan_v1_moe", "wg")])
def test_a_router_is_never_adapted(family, name):
    from tests.families import small_model

    model = small_model(family)
    with pytest.raises(
        ConfigError, match=f"lora.target_modules: {name} is the router of the experts, which stays frozen"
    ):
        prepare_model_for_training(model, create_lora_config(dropout=0.0, target_modules=["q_proj", name]), False)
    prepared = prepare_model_for_training(model, create_lora_config(dropout=0.0, target_modules="all-linear"), False)
    trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
    assert any("experts" in n for n in trained)
    assert not any(".gate." in n or ".wg." in n for n in trained)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "nemotron_h"])
def test_experts_by_their_own_names(family):
    from tests.families import small_model

    asked = create_lora_config(dropout=0.0, target_modules=["q_proj", "experts.down_proj"])
    prepared = prepare_model_for_training(small_model(family), asked, False)
    trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
    layers = {n for n, m in small_model(family).named_modules() if n.endswith(".experts")}
    assert sum("experts.lora_A" in n for n in trained) == len(layers) and any("q_proj" in n for n in trained)
    targets = prepared.peft_config["default"].target_parameters  # where peft knows old names it shortens this one
    assert {name.rpartition(".")[2] for name in targets} == {"down_proj"}
    own, old = (["q_proj", name] for name in ("experts.down_proj", "down_proj"))
    for names in (own, old) if family == "qwen3_moe" else (own,):  # or only the other name would get an adapter
        some = create_lora_config(dropout=0.0, target_modules=names, layers_to_transform=[0])
        with pytest.raises(ConfigError, match="down_proj means the experts of all layers"):
            prepare_model_for_training(small_model(family), some, False)
    with pytest.raises(ConfigError, match="the model has no experts.middle_proj; its own are"):
        asked = create_lora_config(dropout=0.0, target_modules=["experts.middle_proj"])
        prepare_model_for_training(small_model(family), asked, False)


def test_the_error_about_experts_names_a_models_own_other_layers():
    from tests.families import small_model

    said = "or --target_modules q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj without experts$"
    with pytest.raises(ConfigError, match=said):
        prepare_model_for_training(small_model("deepseek_v3"), create_lora_config(target_modules="all-linear"), False)


def test_a_pattern_that_peft_would_take_for_the_experts_is_refused():
    from tests.families import small_model

    asked = create_lora_config(target_modules=r".*(q_a_proj|shared_experts\.down_proj)")
    with pytest.raises(ConfigError, match="peft would adapt the routed experts instead of .*shared_experts.down_proj"):
        prepare_model_for_training(small_model("deepseek_v3"), asked, False)
    only = create_lora_config(target_modules=r".*self_attn\.(q|v)_proj")
    prepared = prepare_model_for_training(small_model("qwen3_moe"), only, False)
    assert all(name.endswith(("q_proj", "v_proj")) for name in prepared.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "family, own", [("phi3", "o_proj,qkv_proj,gate_up_proj,down_proj"), ("gpt_neox", "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"),
                    ("falcon", "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"), ("gpt2", "c_attn,c_proj,c_fc")],
)  # fmt: skip
def test_a_model_of_other_names_gets_its_own_ready_to_paste(family, own):
    from tests.families import small_model

    model = small_model(family)
    with pytest.raises(ConfigError, match=f"its own are --target_modules {own}$"):
        prepare_model_for_training(model, create_lora_config(), False)
    prepare_model_for_training(model, create_lora_config(target_modules=own.split(",")), False)


# ------------------------------------------------------------------------------------------------ models that also see


def test_towers_get_no_adapter_in_4_bit_either(tmp_path):
    """mistral3, which AutoModelForCausalLM does not know: all settings mean its language half."""
    from tests.families import build

    folder = build("mistral3", tmp_path / "model")
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(), device="cpu")
    assert towers(model) == ["model.vision_tower", "model.multi_modal_projector"]
    for targets in ("all-linear", r".*_proj", SEVEN):
        model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(), device="cpu")
        prepared = prepare_model_for_training(model, create_lora_config(target_modules=targets), False)
        adapted = prepared.base_model.targeted_module_names
        assert len(adapted) == 14 and all(".language_model.layers." in name for name in adapted)


def test_the_decoder_of_llama_4_has_no_head():
    from tests.families import small_model

    model = small_model("llama4")
    assert type(model.get_decoder()).__name__ == "Llama4ForCausalLM"
    assert type(decoder_of(model)).__name__ == "Llama4TextModel" and len(decoder_layers(model)) > 1


@pytest.mark.parametrize(
    "config, name",
    [("qwen2", "AutoModelForCausalLM"), ("gemma3", "AutoModelForCausalLM"), ("qwen3_vl", "AutoModelForMultimodalLM")],
)
def test_the_class_that_loads_a_model(config, name):
    assert auto_class(CONFIG_MAPPING[config]()).__name__ == name


def test_a_model_with_an_encoder_is_refused():
    with pytest.raises(
        ConfigError, match="^model.name: expected a causal language model, got florence2, which has an enc"
    ):
        auto_class(CONFIG_MAPPING["florence2"]())
