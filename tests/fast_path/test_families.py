"""The table of families: each row matches transformers' classes, and a new Llama-like family needs only one row."""

import importlib
import json
import shutil

import pytest
import torch
import transformers

from config import load_config
from fast_path import families
from fast_path.choice import choose_fast_path
from fast_path.layers import ACTIVATIONS, fuse
from tests.fast_path.test_decode_step import check_case, use_few_programs
from tests.fast_path.test_layers import furthest, gradients, prepared
from tests.interpreter import interpret
from toolkit.model_shape import model_shape

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def small_model(row: families.Family):
    """Return a model of one layer of the row's family, in eval mode, and its configuration."""
    kind = getattr(transformers, row.name + "TextConfig", None) or getattr(transformers, row.name + "Config")
    config = kind(**SIZES, **HEADS)
    return getattr(transformers, row.model)(config).eval(), config


@pytest.mark.parametrize("row", families.FAMILIES, ids=lambda row: row.name)
def test_a_row_says_what_transformers_classes_do(row):
    model, config = small_model(row)
    layer, code = model.model.layers[0], importlib.import_module(type(model).__module__)
    attention, mlp = layer.self_attn, layer.mlp
    assert [type(part).__name__ for part in (layer, attention, mlp)] == [row.layer, row.attention, row.mlp]
    linears = {name for part in (attention, mlp) for name, module in part.named_children() if hasattr(module, "weight")}
    assert linears - {"q_norm", "k_norm"} == {name for group in row.groups for name in group}
    widths = {"": None, "head": HEADS["head_dim"], "all": HEADS["head_dim"] * HEADS["num_attention_heads"]}
    assert getattr(getattr(attention, "q_norm", None), "weight", torch.empty(0)).numel() == (widths[row.qk_norms] or 0)
    assert (getattr(config, "hidden_activation", None) or config.hidden_act) == row.activation
    assert type(getattr(mlp, row.act)) in ACTIVATIONS[row.activation]
    norms = [module for module in layer.children() if type(module).__name__ == row.norm]
    assert len(norms) == row.layer_norms and all(getattr(norm, row.epsilon) > 0 for norm in norms)
    x = torch.randn(3, 64)
    with torch.no_grad():
        norms[0].weight.fill_(0.0)
        assert bool((norms[0](x) == 0).all()) == (row.norm_scale == "weight")
    assert (getattr(config, "attn_logit_softcapping", None) is not None) == row.score_cap
    for owner, factor in ((layer, row.residual_factor), (model.model, row.embedding_factor)):
        factors = {name for name, value in vars(owner).items() if "multiplier" in name or "scale" in name}
        assert factors == ({factor} if factor else set())
    for turn in (8, 6) if row.name == "Phi3" else (8,):  # half of the features that are rotated; the rest is left
        q, angles = torch.randn(1, 4, 5, 16), torch.randn(1, 5, turn)
        both = torch.cat([angles, angles], -1)
        turned, _ = code.apply_rotary_pos_emb(q, q, both.cos(), both.sin())
        number = torch.complex(q[..., :turn], q[..., turn : 2 * turn])
        number = torch.polar(torch.ones_like(angles), angles)[:, None] * number
        assert torch.allclose(turned, torch.cat([number.real, number.imag, q[..., 2 * turn :]], -1), atol=1e-6)


@pytest.mark.parametrize("row", families.FAMILIES, ids=lambda row: row.name)
def test_the_norms_before_attention_and_mlp_are_what_these_two_read(row):
    model, _ = small_model(row)
    layer, outputs, inputs = model.model.layers[0], {}, []
    for name, norm in layer.named_children():
        if type(norm).__name__ == row.norm:
            norm.register_forward_hook(lambda module, args, out, name=name: outputs.setdefault(name, out))
    for part in (layer.self_attn, layer.mlp):
        part.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append([*args, *kwargs.values()][0]), with_kwargs=True
        )
    model(torch.arange(4)[None])
    assert tuple(next((n for n, out in outputs.items() if out is x), "") for x in inputs) == row.norms_before


def test_no_class_stands_in_two_rows():
    names = [name for row in families.FAMILIES for name in (row.model, row.layer, row.attention, row.mlp, row.norm)]
    assert len(names) == len(set(names)) and all(names)


def test_the_groups_of_linears_that_share_a_mask_are_those_of_earlier_runs():
    """Their names are part of the masks' hashes, so with other names a resumed run would learn something different."""
    qkv, gate_up = (
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
        dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    )
    for row in (families.UNKNOWN, *families.FAMILIES):
        assert row.readers == ({} if row.name == "Phi3" else qkv | gate_up)


def fast_line(model, **flags) -> str:
    performance = load_config((), {"performance.fused_lora": "on", **flags}).performance
    return choose_fast_path(performance, model, torch.float32, torch.device("cpu")).line


@pytest.mark.parametrize("kind, name", [("gemma2", ""), ("gemma", " | attention plain, MLP plain: Gemma")])
def test_the_line_names_what_a_family_does_not_get(random_models, kind, name):
    """With a row, and without."""
    model, _, _ = prepared(random_models(kind))
    assert fast_line(model).startswith(f"fast path: fused_lora{name} | without")


def test_the_line_gives_a_reason_once(random_models):
    model, _, _ = prepared(random_models("qwen2"))
    auto = {"performance.fused_lora": "auto"}
    assert fast_line(model, **auto) == "fast path: none (no gain on a CPU)"
    off = {f"performance.{name}": "off" for name in ("fused_lora", "compile", "cuda_graphs")}
    assert fast_line(model, **off) == "fast path: none (off)"
    assert fast_line(model) == "fast path: fused_lora | without compile, cuda_graphs: no gain on a CPU"
    one = auto | {"performance.compile": "off"}
    assert fast_line(model, **one) == (
        "fast path: none | without fused_lora, cuda_graphs: no gain on a CPU | without compile: off"
    )


def test_the_line_says_what_a_setting_leaves_plain(random_models):
    model, _, _ = prepared(random_models("qwen2"), targets=["q_proj", "down_proj"])
    assert "| attention plain: its linears differ in their adapters or are not in 4 bit |" in fast_line(model)
    model, _, _ = prepared(random_models("qwen2"))
    assert fast_line(model).startswith("fast path: fused_lora | without compile")
    model.get_base_model().set_attn_implementation("eager")
    assert "| attention plain: model.attn_implementation eager |" in fast_line(model)


def test_the_memory_plan_reads_the_same_row(random_models):
    found = {kind: model_shape(str(random_models(kind))).family for kind in ("llama", "gemma2", "gemma")}
    assert [row.name for row in found.values()] == ["Llama", "Gemma2", ""]


# ------------------------------------------------------------------------------------------------ a new family

CWM = families.row("Cwm")  # the one row; tests/conftest.py has the one line that makes a model of it


def test_a_llama_like_family_is_fused_with_one_row(random_models, monkeypatch):
    folder = random_models("cwm")
    plain_loss, plain = gradients(*prepared(folder, p=0.05))
    model, clock, loss = prepared(folder, p=0.05)
    assert "attention plain, MLP plain: Cwm" in fast_line(model)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, CWM))
    assert "Cwm" not in fast_line(model)
    assert fuse(model, clock, 0.05, kernels=False) == 14  # seven linears in each of two layers
    layer = model.get_base_model().get_decoder().layers[0]
    parts = (layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    assert all(type(part).__name__.startswith("FusedCwm") for part in parts)
    value, found = gradients(model, clock, loss)
    assert value == pytest.approx(plain_loss, rel=1e-6) and furthest(found, plain) < 1e-4  # fp32 rounding


def check_new_row(folder: str) -> None:
    """Decode one token of the new family by decode_step's kernels."""
    families.FAMILIES = (*families.FAMILIES, CWM)
    use_few_programs()
    check_case(folder, {}, [0], 17, "float16", "cpu", steps=1, layers=1)


@pytest.mark.triton
def test_a_llama_like_family_decodes_with_one_row(random_models, tmp_path):
    folder = tmp_path / "cwm"
    shutil.copytree(random_models("cwm"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"layer_types": ["full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    interpret("tests.fast_path.test_families", f"check_new_row({str(folder)!r})")
