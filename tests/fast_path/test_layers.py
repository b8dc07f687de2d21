"""The fast path computes the same as the plain one: operators, kernels (in the interpreter and on a GPU), layers."""

import dataclasses
import functools
import itertools
import json
import linecache
import math
import os
import types
from pathlib import Path
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_rotary_part

from config import ConfigError, load_config
from fast_path import attention as attention_module
from fast_path import choice, families, fused_linear, micro_step, training_kernels
from fast_path import layers as layers_module
from fast_path import loss as loss_module
from fast_path import packed_weights as packed_weights_module
from fast_path.attention import cudnn_serves, keep_samples_apart, rotate, rotate_launch, use_causal_attention
from fast_path.choice import choose_fast_path
from fast_path.compiled import compile_layers, compiled_in_pieces, operators_tag
from fast_path.dropout import DropoutClock, use_stateless_dropout
from fast_path.kept_outputs import Kept
from fast_path.layers import _fused_mlp, fuse
from fast_path.loss import CROSS_ENTROPY, CausalLMLoss, LogitForm, kernel_chunk_loss
from fast_path.micro_step import inputs_in_main_memory
from fast_path.packed_weights import DEQUANTIZE, adapter_columns, stack_adapters, stack_weights
from quantization_utils import (
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
    set_gradient_checkpointing,
)
from tests.interpreter import interpret
from toolkit.data_blocks import collate
from toolkit.data_formats import IGNORED

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels as they run there")


def prepared(
    folder, *, dtype="float32", p=0.05, checkpointing=False, quant_type="nf4", double=True, dora=False, device="cpu",
    targets=None, asked="auto", **chosen,
):  # fmt: skip
    """Return a peft model with a non-zero adapter, its clock and its loss. asked: model.attn_implementation."""
    config = create_bnb_config(quant_type=quant_type, compute_dtype=dtype, use_double_quant=double)
    attention = "eager" if "gemma2" in str(folder) else "sdpa"
    model, _ = load_model_and_tokenizer(str(folder), config, device=device, attn_implementation=attention)
    targets = targets or ([*itertools.chain(*families.of(model).groups)] if "phi3" in str(folder) else None)
    torch.manual_seed(0)
    chosen |= {"target_modules": targets} if targets else {}
    lora = create_lora_config(rank=8, dropout=p, use_dora=dora, **chosen)
    model = prepare_model_for_training(model, lora, checkpointing)
    use_causal_attention(model.get_base_model(), asked)
    clock = DropoutClock(42, torch.device(device))
    use_stateless_dropout(model, p, clock)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train(), clock, CausalLMLoss(model, getattr(torch, dtype))


def gradients(model, clock, loss, length=24):
    """Return the loss and gradients of a fixed batch with padded labels."""
    ids = torch.randint(0, 4096, (2, length), generator=torch.Generator().manual_seed(5)).to(clock.step.device)
    labels = ids.clone()
    labels[1, 15:] = IGNORED
    clock.set(3, torch.tensor([5, 7]))
    value = loss(ids, labels)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def allowed(folder) -> float:
    """Return how many times as far from fp32 as the plain path a family of this folder's name may be."""
    return 1.05 if Path(folder).name.rstrip("0123456789") in ("qwen", "llama", "mistral") else 1.1


def furthest(a: dict, b: dict) -> float:
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-9)).item() for n in b)


FUSED_FAMILIES = {row.name.lower(): row for row in families.FAMILIES if not (row.plain_attention or row.plain_mlp)}


@pytest.mark.parametrize("kind", FUSED_FAMILIES)
@pytest.mark.parametrize("p, checkpointing", [(0.0, False), (0.05, True)])
def test_fused_layers_learn_what_plain_ones_do(random_models, kind, p, checkpointing):
    folder, row = random_models(kind), FUSED_FAMILIES[kind]
    plain_loss, plain = gradients(*prepared(folder, p=p, checkpointing=checkpointing))
    model, clock, loss = prepared(folder, p=p, checkpointing=checkpointing)
    assert fuse(model, clock, p, kernels=False) == 2 * sum(map(len, row.groups))  # in two layers
    for layer in families.decoder_layers(model.get_base_model()):
        parts = [layer.self_attn, layer.mlp, *(getattr(layer, name) for name in row.norms_before if name)]
        assert all(type(part).__name__.startswith(f"Fused{row.name}") for part in parts)
    fused_loss, fused = gradients(model, clock, loss)
    assert fused_loss == pytest.approx(plain_loss, rel=1e-6)
    assert furthest(fused, plain) < 1e-4  # fp32 rounding


PARTLY = [
    {"targets": ["q_proj", "v_proj"]},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0], "exclude_modules": ["up_proj", "k_proj"]},
    {"targets": r".*\.0\.self_attn\.[qkvo]_proj|.*\.1\.mlp\.down_proj"},
    {"targets": r".*\.0\.(self_attn\.k|mlp\.gate)_proj|.*\.1\.(self_attn\.[qv]|mlp\.up)_proj"},
]


@pytest.mark.parametrize("chosen", PARTLY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_with_some_adapters_or_none_learn_what_plain_ones_do(random_models, chosen, checkpointing):
    results = []
    for fused in (False, True):
        model, clock, loss = prepared(random_models("qwen3"), p=0.05, checkpointing=checkpointing, **chosen)
        if fused:
            assert fuse(model, clock, 0.05, kernels=False)
        results.append(gradients(model, clock, loss))
    (plain_loss, plain), (fused_loss, found) = results
    assert found.keys() == plain.keys() and fused_loss == pytest.approx(plain_loss, rel=1e-6)
    assert furthest(found, plain) < 1e-4


@pytest.mark.compiled
@pytest.mark.parametrize(
    "chosen", [PARTLY[1], *(pytest.param(c, marks=pytest.mark.long) for c in PARTLY[2:-1]), PARTLY[-1]]
)
def test_compiled_layers_with_some_adapters_or_none_learn_what_plain_ones_do(random_models, chosen):
    torch._dynamo.reset()
    plain_loss, plain = gradients(*prepared(random_models("qwen3"), **chosen))
    model, clock, loss = prepared(random_models("qwen3"), checkpointing=1, **chosen)
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    found_loss, found = gradients(model, clock, loss)
    assert found.keys() == plain.keys() and found_loss == pytest.approx(plain_loss, rel=1e-6)
    assert furthest(found, plain) < 1e-4


def test_a_norm_that_is_trained_stays_in_its_layer(random_models):
    results = []
    for fused in (False, True):
        model, clock, loss = prepared(random_models("qwen2"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "input_layernorm" in name)
        if fused:
            fuse(model, clock, 0.05, kernels=False)
        results.append(gradients(model, clock, loss)[1])
    assert sum("layernorm" in name for name in results[0]) == 2 and furthest(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("members, rank, behind_norm", [(1, 16, False), (3, 8, True), (2, 16, True), (0, 0, True)])
def test_the_operator_is_what_it_tells_the_compiler(members, rank, behind_norm):
    """Its results have the shapes and strides it declares and share no memory, and its gradient is registered."""
    weights = packed_weights((64,) * max(1, members), 64, "nf4", True, "cpu", torch.float32)
    x = torch.randn(6, 64, requires_grad=True)
    A, B = ([torch.randn(shape, requires_grad=True) for _ in range(members)] for shape in ((rank, 64), (64, rank)))
    norm = [torch.rand(64), fused_linear.inverse_rms(x.detach(), 1e-6, False)] if behind_norm else []
    masks = (*(torch.tensor(n, dtype=torch.int32) for n in ([3], [1, 2], [7])), 3, 0.1)
    before = norm, False, False, None, []
    torch.library.opcheck(fused_linear.linear, (x, A, B, None, 0.5, *before, *weights, *masks, False, 1, "silu", False))
    if members:
        grad, u = torch.randn(6, 64 * members), torch.randn(6, adapter_columns(rank, members))
        before = norm, False, False, None, []
        tensors = [t.detach() for t in A], [t.detach() for t in B]
        arguments = (grad, x.detach(), u, *tensors, 0.5, *before, *weights, *masks, False, 1, "silu")
        torch.library.opcheck(fused_linear.linear_backward, arguments)


@pytest.mark.parametrize("ranks", [[], [8], [8, 8]])
def test_a_gradient_over_what_was_recomputed_is_the_same_and_is_told_to_the_compiler(ranks):
    """ranks: of the adapters of gate and up; one where these are one linear."""
    weights = packed_weights((32,), 64, "nf4", True, "cpu", torch.float32)
    A, B, x = [torch.randn(16, 64)], [torch.randn(32, 16)], torch.randn(6, 128)
    masks = (*(torch.tensor(n, dtype=torch.int32) for n in ([3], [1, 2], [7])), 3, 0.1)
    u = torch.randn(6, 16) if ranks else None
    arguments = (
        torch.randn(6, 32),
        x,
        torch.randn(6, 16),
        A,
        B,
        0.5,
        [],
        False,
        True,
        u,
        ranks,
        *weights,
        *masks,
        False,
        1,
        "silu",
    )
    wanted = fused_linear.linear_backward(*arguments)
    torch.library.opcheck(fused_linear.linear_backward_over_x, arguments)
    over = x.clone()
    nothing, *sums = fused_linear.linear_backward_over_x(arguments[0], over, *arguments[2:])
    assert not nothing.numel() and not torch.equal(over, x)
    for found, want in zip((over, *sums), wanted, strict=True):
        assert torch.equal(found, want)
    arguments = arguments[0], x, True, *weights, False, 1, "silu"
    torch.library.opcheck(fused_linear.product_backward_over_x, arguments)
    over = x.clone()
    fused_linear.product_backward_over_x(arguments[0], over, *arguments[2:])
    assert torch.equal(over, fused_linear.product_backward(*arguments))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(  # gate and up; down, with SwiGLU; q, k and v
    "outputs, columns, cuts",
    [((512, 512), 128, (1, 2, 4, 8)), ((256,), 512, (1, 2, 4)), ((512, 128, 128), 256, (1, 2))],
)
def test_weights_unpacked_in_pieces_give_the_same(outputs, columns, cuts, adapted, double):
    """More outputs than columns: the backward pass sums products of rows; else it takes pieces across."""
    swiglu, rows = len(outputs) == 1, sum(outputs)
    weights = packed_weights(outputs, columns, "nf4", double, "cpu", torch.float32)
    assert all(map(weights.divides_by, cuts)) and weights.is_tall is not swiglu
    x, bias = torch.randn(6, columns * (1 + swiglu), requires_grad=True), torch.randn(rows)
    A = [torch.randn(8, columns, requires_grad=True) for _ in outputs * adapted]
    B = [torch.randn(size, 8, requires_grad=True) for size in outputs * adapted]
    masks = *(torch.tensor(n, dtype=torch.int32) for n in ([3], [1, 2], [7])), 3, 0.1
    sizes, results, operands = [], [], packed_weights_module.operands

    def noted(*arguments, **named):
        W, stacked = operands(*arguments, **named)
        sizes[-1].append(tuple(W.shape))
        return W, stacked

    for pieces, bias_or_none in itertools.product(cuts, (bias, None)):
        sizes.append([])
        with mock.patch.object(fused_linear, "operands", noted):
            arguments = (x, A, B, bias_or_none, 0.5, [], False, swiglu, None, [], *weights, *masks)
            y, u = fused_linear.linear(*arguments, False, pieces, "silu", False)
            grads = torch.autograd.grad(y.square().sum(), [x, *A, *B])
        results.append([y, u, *grads])
    for found, want in zip(results[2:], (len(cuts) - 1) * results[:2], strict=True):
        assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(found, want, strict=True))
    for pieces, seen in zip(sorted(2 * cuts), sizes, strict=True):
        extra = 64 * adapted
        along = [(rows // pieces, columns + extra)] * pieces
        across = [(rows, columns // pieces)] * (pieces - 1) + [(rows, columns // pieces + extra)]
        assert seen == along + (across if swiglu else along)
        largest = max(math.prod(shape) for shape in seen)
        assert largest == packed_weights_module.operand_numbers(rows, columns, adapter_columns(8, len(A)), pieces)


@pytest.mark.parametrize(
    "outputs, columns, cuts",
    [((1024, 1024), 256, (1, 2, 4, 8)), ((256,), 1024, (1, 2, 4)), ((512, 128, 128), 256, (1, 2))],
)
def test_a_gradient_in_pieces_is_rounded_once(outputs, columns, cuts):
    """In bfloat16 it is as near to fp32 as that of one piece; sums that are rounded between pieces are further away."""
    weights = packed_weights(outputs, columns, "nf4", True, "cpu", torch.bfloat16)
    adapters = fused_linear.Adapters(
        [torch.randn(8, columns) for _ in outputs], [torch.randn(size, 8) for size in outputs], 0.5
    )
    grad = torch.randn(64, sum(outputs)).bfloat16()
    exact, stacked = fused_linear._product_backward(grad.float(), weights, adapters, False, 1)
    errors = {}
    for pieces in cuts:
        wide, other = fused_linear._product_backward(grad, weights, adapters, False, pieces)
        both = columns + len(stacked)
        assert torch.equal(other, stacked.bfloat16())
        errors[pieces] = ((wide - exact)[:, :both].norm() / exact[:, :both].norm()).item()
    assert max(errors.values()) < 1.02 * errors[1] < 0.01
    if weights.is_tall:
        most, none = cuts[-1], fused_linear.Adapters([], [], 0.0)
        parts = (
            fused_linear._product_backward(part, weights.piece(i, most), none, False, 1)[0]
            for i, part in enumerate(grad.chunk(most, 1))
        )
        rounded = functools.reduce(torch.add, parts)
        assert (rounded - exact[:, :columns]).norm() / exact[:, :columns].norm() > 1.2 * errors[most]


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "phi3"]
)  # without biases, with those of q, k and v, with one linear for these
@pytest.mark.parametrize("pieces, of_qkv", [(4, 1), (8, 2)])
def test_layers_with_weights_in_pieces_learn_what_plain_ones_do(random_models, kind, pieces, of_qkv):
    plain_loss, plain = gradients(*prepared(random_models(kind)))
    model, clock, loss = prepared(random_models(kind), checkpointing=True)
    assert fuse(model, clock, 0.05, False, pieces)
    found = [
        [group.pieces for group in layers_module.groups_of(layer)]
        for layer in families.decoder_layers(model.get_base_model())
    ]
    assert found == 2 * [[of_qkv, 1, pieces, pieces // 2]]
    fused_loss, fused = gradients(model, clock, loss)
    assert fused_loss == pytest.approx(plain_loss, rel=1e-6)
    assert furthest(fused, plain) < 1e-4  # fp32 rounding


@pytest.mark.triton
def test_few_rows_share_out_the_columns_of_a_pass():
    for cards, expected in (
        (132, {128: 512, 2048: 512, 4096: 1024, 8192: 2048}),
        (24, {128: 512, 512: 1024, 2048: 2048}),
    ):
        with mock.patch.object(fused_linear, "multiprocessors", lambda device, cards=cards: cards):
            assert {rows: fused_linear.widen_share(rows, 2048, torch.device("cpu")) for rows in expected} == expected
            wide = [fused_linear.widen_share(rows, 11008, torch.device("cpu")) for rows in (1, 128, 512, 1024, 8192)]
            assert wide == sorted(wide) and {share % 512 for share in wide} == {0} and wide[-1] == 2048


@pytest.mark.parametrize("quant_type, double", [("fp4", True), ("nf4", False), ("fp4", False)])
def test_fused_layers_read_every_quantisation(random_models, quant_type, double):
    options = {"quant_type": quant_type, "double": double}
    _, plain = gradients(*prepared(random_models("qwen2"), **options))
    model, clock, loss = prepared(random_models("qwen2"), **options)
    fuse(model, clock, 0.05, kernels=False)
    assert furthest(gradients(model, clock, loss)[1], plain) < 1e-4


def test_a_model_with_another_attention_fuses_its_linears_alone(random_models):
    _, plain = gradients(*prepared(random_models("gemma")))
    model, clock, loss = prepared(random_models("gemma"))
    assert fuse(model, clock, 0.05, kernels=False) == 14
    assert furthest(gradients(model, clock, loss)[1], plain) < 1e-4


def test_dora_keeps_pefts_layers(random_models):
    model, clock, _ = prepared(random_models("qwen2"), dora=True)
    assert fuse(model, clock, 0.05, kernels=False) == 0
    asked = load_config([], {"performance.fused_lora": "on"}).performance
    with pytest.raises(ConfigError, match="performance.fused_lora: cannot be on here: no plain LoRA adapter"):
        choose_fast_path(asked, model, torch.float32, torch.device("cpu"))


def test_evaluation_and_the_base_alone_run_through_the_fused_layers(random_models):
    model, clock, loss = prepared(random_models("qwen2"))
    ids = torch.arange(20)[None]
    model.eval()
    with torch.no_grad():
        want = loss(ids, ids)
        with model.disable_adapter():
            want_base = loss(ids, ids)
        fuse(model, clock, 0.05, kernels=False)
        assert torch.allclose(loss(ids, ids), want, rtol=1e-6)
        with model.disable_adapter():
            assert torch.allclose(loss(ids, ids), want_base, rtol=1e-6)
    assert want != want_base


def test_error_in_bfloat16_is_no_larger_than_pefts(random_models):
    """Both are compared with fp32 on the same dequantised weights."""
    _, reference = gradients(*prepared(random_models("qwen2")))
    _, plain = gradients(*prepared(random_models("qwen2"), dtype="bfloat16"))
    model, clock, loss = prepared(random_models("qwen2"), dtype="bfloat16")
    fuse(model, clock, 0.05, kernels=False)
    _, fused = gradients(model, clock, loss)

    def error(found):
        return sum((found[n] - reference[n]).square().sum() for n in reference).sqrt().item()

    worst = sorted(((found - reference[n]).norm() / reference[n].norm(), n) for n, found in fused.items())[-4:]
    assert error(fused) <= 1.05 * error(plain), worst


@pytest.mark.compiled
def test_torchs_cache_of_compiled_layers_knows_the_operators_version(random_models, tmp_path):
    """A cached layer that expects the strides of another version would end a run."""
    changed = types.ModuleType("changed")
    changed.__file__ = str(tmp_path / "changed.py")
    tags = []
    for text in ("LINE = 64\n", "LINE = 32\n"):
        Path(changed.__file__).write_text(text, encoding="utf-8")
        linecache.clearcache()
        tags.append(operators_tag.__wrapped__((changed,)))
    assert tags[0] != tags[1]
    model, clock, _ = prepared(random_models("qwen2"))
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    assert torch.compiler.config.cache_key_tag == operators_tag()


@pytest.mark.compiled
def test_layers_are_compiled_once_and_never_again(random_models):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    folder = random_models("qwen2")
    _, plain = gradients(*prepared(folder, checkpointing=True))
    model, clock, loss = prepared(folder, checkpointing=True)
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    _, compiled = gradients(model, clock, loss)
    assert counters["stats"]["unique_graphs"] == 1  # for both layers
    assert furthest(compiled, plain) < 1e-4
    model.zero_grad()
    gradients(model, clock, loss)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled_in_pieces() is None


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["smollm3", "olmo2", "gemma2", "phi3"])
def test_layers_of_other_families_are_compiled_whole(random_models, kind):
    """Gemma 2's and SmolLM3's layers are of two kinds, each compiled once; norms after a layer's parts are recomputed."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    folder = random_models(kind)
    _, plain = gradients(*prepared(folder, checkpointing=True))
    model, clock, loss = prepared(folder, checkpointing=True)
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    _, compiled = gradients(model, clock, loss)
    assert compiled_in_pieces() is None and furthest(compiled, plain) < 1e-4
    assert counters["stats"]["unique_graphs"] == (2 if kind in ("smollm3", "gemma2") else 1)


@pytest.mark.compiled
@pytest.mark.parametrize("kind, dtype", [("gemma3", "bfloat16"), ("olmo2", "float32")])
def test_a_layer_that_keeps_its_mlps_output_repeats_one_product_less_and_changes_no_bit(random_models, kind, dtype):
    """A norm reads this output. Layers that are not compiled keep nothing and learn the same, too."""
    found, product = [], F.linear
    for kept in (0, 1):
        torch._dynamo.reset()
        model, clock, loss = prepared(random_models(kind), dtype=dtype, checkpointing=True)
        fuse(model, clock, 0.05, kernels=False)
        if kept == 0:
            uncompiled, _ = gradients(model, clock, loss)
            model.zero_grad()
        compile_layers(model, Kept(mlp=kept))
        layers = families.decoder_layers(model.get_base_model())
        assert [layer.keeps_down for layer in layers] == [False, bool(kept)]
        gradients(model, clock, loss)
        model.zero_grad()
        with mock.patch.object(F, "linear", side_effect=product) as products:
            value, grads = gradients(model, clock, loss)
        found.append((value, grads, products.call_count))
    (without, recomputed, all_products), (value, grads, products) = found
    assert compiled_in_pieces() is None and value == without == pytest.approx(uncompiled, rel=1e-2)
    assert all_products - products == 1 and all(torch.equal(grads[name], recomputed[name]) for name in recomputed)


@pytest.mark.compiled
def test_a_layer_that_keeps_its_attentions_output_changes_no_bit(random_models):
    found = []
    for kept in (0, 1, 2):
        torch._dynamo.reset()
        model, clock, loss = prepared(random_models("qwen3"), dtype="bfloat16", checkpointing=True)
        fuse(model, clock, 0.05, kernels=False)
        compile_layers(model, Kept(attention=kept))
        layers = families.decoder_layers(model.get_base_model())
        assert [layer.keeps_attention for layer in layers] == [kept == 2, kept > 0]
        found.append(gradients(model, clock, loss))
    (value, grads), *others = found
    for other, kept_grads in others:
        assert other == value and all(torch.equal(grads[name], kept_grads[name]) for name in grads)


@pytest.mark.compiled
def test_a_layer_compiled_in_pieces_is_said(train, monkeypatch, tmp_path):
    """Its results do not change, so only the log can show it."""
    whole, flags = _fused_mlp, ("--max_steps", 1, "--fused_lora", "on", "--compile", "on")

    def broken(self, x):
        torch._dynamo.graph_break()
        return whole(self, x)

    for name, forward in (("whole", whole), ("pieces", broken)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(layers_module, "_fused_mlp", forward)
        code, folder = train(*flags, output_dir=tmp_path / name)
        log = (folder / "training_log.txt").read_text(encoding="utf-8")
        assert code == 0 and ("fast path: the layers are compiled in pieces" in log) == (name == "pieces")


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "olmo3"])
def test_the_mask_of_a_window_is_the_same_within_a_captured_graph(random_models, kind, monkeypatch):
    """Where transformers cannot look at positions. With other strides the layers would be compiled within the capture."""
    made, mask_of = [], attention_module.sdpa_mask
    monkeypatch.setattr(attention_module, "sdpa_mask", lambda **given: made.append(mask_of(**given)) or made[-1])
    model, clock, loss = prepared(random_models(kind))
    gradients(model, clock, loss, 48)  # longer than the window of 16
    seen = len(made)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    gradients(model, clock, loss, 48)
    before, within = made[:seen], made[seen:]
    assert seen and all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(before, within, strict=True))
    assert before[0].shape == (1, 1, 48, 48)  # for all sequences


@pytest.mark.compiled
def test_inputs_in_main_memory_change_nothing(random_models):
    from torch._dynamo.utils import counters

    model, clock, loss = prepared(random_models("qwen2"), checkpointing=True)
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    value, inside = gradients(model, clock, loss)
    model.zero_grad()
    graphs, kept = counters["stats"]["unique_graphs"], []
    with inputs_in_main_memory((2, 24, 256)):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(hooks[0](x)) or kept[-1], hooks[1]):
            again, offloaded = gradients(model, clock, loss)
    assert again == value and furthest(offloaded, inside) == 0
    assert sum(isinstance(x, tuple) for x in kept) >= 2  # each layer's input
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["qwen2", pytest.param("phi3", marks=pytest.mark.long)])
def test_first_n_layers_recompute_when_compiled(random_models, kind):
    """There the gradient of gate and up is where these were recomputed; a compiler that saw another reader would copy them."""
    torch._dynamo.reset()
    _, plain = gradients(*prepared(random_models(kind)))
    model, clock, loss = prepared(random_models(kind))
    set_gradient_checkpointing(model, 1)
    fuse(model, clock, 0.05, kernels=False)
    compile_layers(model)
    layers = families.decoder_layers(model.get_base_model())
    assert [layer.recompute for layer in layers] == [True, False]
    made, read, product, backward = [], [], F.linear, fused_linear.swiglu_backward

    def noted_product(*arguments):
        made.append(product(*arguments))  # kept, so that no copy can have its memory
        return made[-1]

    def noted(*arguments):
        read.append((arguments[1].data_ptr(), arguments[-1]))
        return backward(*arguments)

    gradients(model, clock, loss)
    model.zero_grad()
    with mock.patch.object(F, "linear", noted_product), mock.patch.object(fused_linear, "swiglu_backward", noted):
        _, found = gradients(model, clock, loss)
    places = {tensor.data_ptr() for tensor in made}
    assert [over for _, over in read] == [False, True]  # the last layer's were saved
    assert all(place in places for place, _ in read) and furthest(found, plain) < 1e-4


@pytest.mark.parametrize("name, reason", [("cuda_graphs", "no CUDA GPU"), ("compile", "needs fused_lora")])
def test_on_is_refused_where_it_cannot_run(random_models, name, reason):
    model, _, _ = prepared(random_models("qwen2"))
    performance = load_config((), {f"performance.{name}": "on"}).performance
    with pytest.raises(ConfigError, match=reason):
        choose_fast_path(performance, model, torch.float32, torch.device("cpu"))


def test_no_graph_is_captured_of_copies_to_main_memory(random_models):
    model, _, _ = prepared(random_models("qwen2"))
    performance = load_config((), {"performance.compile": "off"}).performance
    fast = choose_fast_path(performance, model, torch.bfloat16, torch.device("cuda"), offload=True)
    assert not fast.cuda_graphs and "without cuda_graphs: no graph can hold the copies to main memory" in fast.line
    performance = load_config((), {"performance.compile": "off", "performance.cuda_graphs": "on"}).performance
    with pytest.raises(ConfigError, match="cuda_graphs: cannot be on here: no graph"):
        choose_fast_path(performance, model, torch.bfloat16, torch.device("cuda"), offload=True)


def test_the_fast_path_trains_from_the_command_line_on_a_cpu_and_resumes_on_the_plain_one(train, corpus, tmp_path):
    flags = ("--dataset", corpus, "--max_length", 32, "--save_steps", 2, "--compute_dtype", "float32")
    code, folder = train(*flags, "--max_steps", 2, "--fused_lora", "on", output_dir=tmp_path / "run")
    assert code == 0
    assert "fast path: fused_lora" in (folder / "training_log.txt").read_text(encoding="utf-8")
    code, folder = train(*flags, "--max_steps", 4, "--fused_lora", "off", output_dir=folder)
    assert code == 0 and (folder / "checkpoint-4").is_dir()
    assert "resuming from" in (folder / "training_log.txt").read_text(encoding="utf-8")


@pytest.mark.real_model
@pytest.mark.skipif(
    "QLORA_REAL_MODEL" not in os.environ, reason="needs QLORA_REAL_MODEL, the folder of SmolLM2-135M-Instruct"
)
def test_fifty_steps_on_a_real_model_follow_the_plain_path(train, corpus, tmp_path):
    """The fused curve is no further from the plain one than the plain one in bfloat16 is from the one in fp32."""
    curves = []
    for fused, dtype in (("off", "float32"), ("off", "bfloat16"), ("on", "bfloat16")):
        flags = ("--model_name", os.environ["QLORA_REAL_MODEL"], "--fused_lora", fused, "--compute_dtype", dtype)
        flags = (*flags, "--max_length", 64, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--max_steps", 50)
        flags = (*flags, "--learning_rate", 5e-4, "--logging_steps", 1, "--max_eval_samples", 4)
        code, folder = train(*flags, output_dir=tmp_path / f"{fused}-{dtype}")
        assert code == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append(torch.tensor([row["loss"] for row in rows if "loss" in row]))
    reference, plain, fused = curves
    noise, gap = (plain - reference).abs().mean().item(), (fused - plain).abs().mean().item()
    print(f"mean distance of the curves: bfloat16 from fp32 {noise:.4f}, fused from plain {gap:.4f}")
    assert gap < 1.5 * noise and (fused - plain)[-10:].abs().mean() < 0.05


class Replayed(micro_step.Captured):
    """A graph without CUDA: it replays by calling the step on the same static tensors, after the same warm-up."""

    def __init__(self, step, device, batch, length, names):
        self.step = step
        self.padding = {name: micro_step.padding(name, length, device) for name in names}
        self.batch = {name: row.repeat(batch, 1) for name, row in self.padding.items()}
        self.graph = self
        for _ in range(2):
            step(**self.batch)

    def capture(self, pool) -> None:
        self.training = torch.is_grad_enabled()
        self.result = torch.zeros(())

    def replay(self) -> None:
        found = self.step(**self.batch)
        self.result = self.result.expand_as(found).clone().copy_(found)


@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_run_learns_what_an_uncaptured_one_does(train, chats, varlen_on_cpu, monkeypatch, tmp_path, packed):
    """Everything but the graph itself is tested: static inputs, a short last micro-batch, masks, and gradients after
    the warm-up. With packed samples the captured run uses varlen attention, the uncaptured one a mask.
    """
    flags = (
        "--compute_dtype",
        "float32",
        "--optim",
        "adamw_torch",
        "--batch_size",
        3,
        "--gradient_accumulation_steps",
        1,
    )
    flags = (*flags, "--max_steps", "null", "--num_epochs", 1, "--max_train_samples", 300)
    if packed:  # a long warm-up: Adam's first full step makes a whole learning rate of a gradient that is all rounding
        flags = (*flags, "--dataset", chats, "--learning_rate", 1e-3, "--warmup_ratio", 0.9)
    _, want = train(*flags, output_dir=tmp_path / "uncaptured")
    choose = choice.choose_fast_path
    monkeypatch.setattr(micro_step, "Captured", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(choice, "choose_fast_path", lambda *args: dataclasses.replace(choose(*args), cuda_graphs=True))
    calls = varlen_on_cpu() if packed else []
    code, found = train(*flags, output_dir=tmp_path / "captured")
    assert code == 0
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (want, found))
    assert furthest(b, a) < 1e-5 and bool(calls) == packed
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (want, found)
    ]
    losses = [[row.get("loss", row.get("eval_loss")) for row in part] for part in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ------------------------------------------------------------------------------------------------ kernels


def packed_weights(
    outputs: tuple[int, ...], columns: int, quant_type: str, double: bool, device: str, dtype: torch.dtype
):
    """Return 4-bit linears of one input width, stacked as a fused group has them."""
    layers = []
    for rows in outputs:
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=quant_type
        )
        layers.append(layer.to(device))
    return stack_weights(layers)


def check_kernels(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare each kernel with the same operator's torch calls in fp32, with sizes that no tile divides."""
    torch.manual_seed(0)
    for double, quant_type, outputs in (
        (True, "nf4", (64, 32)),
        (False, "nf4", (64, 32, 48)),
        (True, "fp4", (256, 24)),
    ):
        weights = packed_weights(outputs, 192 if outputs[0] == 64 else 64, quant_type, double, device, dtype)
        B = [torch.randn(rows, 8, device=device) for rows in outputs]
        A = [torch.randn(8, weights.columns, device=device) for _ in outputs]
        both = (packed_weights_module.operands(weights, A, B, 0.5, dtype, kernels) for kernels in (True, False))
        (found, stacked), (want, wanted) = both
        assert torch.equal(stacked, wanted)
        assert apart(found, want) < tolerance, (double, quant_type)
        assert torch.equal(found[:, : weights.columns], want[:, : weights.columns])  # as bitsandbytes rounds
        behind = weights.columns + 8 * len(outputs)
        assert found.shape[1] % 64 == 0 and not any(side[:, behind:].any() for side in (found, want))
    for outputs, columns, cuts in (
        ((1024, 1024), 64, ((2, 0), (2, 1), (4, 1), (8, 3), (8, 4))),  # gate and up
        ((512, 128, 128), 256, ((2, 0), (2, 1))),  # q, k and v: none of k and v in the first piece
    ):
        weights, rows = packed_weights(outputs, columns, "nf4", True, device, dtype), sum(outputs)
        A, B = (
            [torch.randn(size, device=device) for size in sizes]
            for sizes in ([(8, columns)] * len(outputs), [(n, 8) for n in outputs])
        )
        whole, _ = packed_weights_module.operands(weights, A, B, 0.5, dtype, True)
        for pieces, i in cuts:
            piece = packed_weights_module.Piece(i, pieces)
            found, _ = packed_weights_module.operands(weights, [] if i else A, B, 0.5, dtype, True, piece=piece)
            assert weights.divides_by(pieces)
            assert torch.equal(found, whole[rows // pieces * i : rows // pieces * (i + 1)])
    for double, rows in ((True, 64), (False, 48)):
        weights = packed_weights((rows,), 768, "nf4", double, device, dtype)
        A, B = [torch.randn(8, 768, device=device)], [torch.randn(rows, 8, device=device)]
        whole, stacked = packed_weights_module.operands(weights, A, B, 0.5, dtype, True)
        for pieces, i in ((2, 0), (2, 1), (3, 1), (4, 3)):
            piece = packed_weights_module.Piece(i, pieces, across=True)
            found, other = packed_weights_module.operands(weights, A, B, 0.5, dtype, True, piece=piece)
            end = whole.shape[1] if piece.last else 768 // pieces * (i + 1)
            wanted = whole[:, 768 // pieces * i : end]
            assert torch.equal(other, stacked) and torch.equal(found[:, : wanted.shape[1]], wanted)
            assert not found[:, wanted.shape[1] :].any()
    rows = torch.randn(5, 1500, device=device).to(dtype)
    found, want = (fused_linear.inverse_rms(rows, 1e-6, kernels) for kernels in (True, False))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    step, salt = (torch.tensor(n, dtype=torch.int32, device=device) for n in (3, -12345))
    sequences = torch.tensor([5, 9], dtype=torch.int32, device=device)
    for swiglu, members, p in ((False, 1, 0.1), (False, 3, 0.1), (False, 2, 0.0), (True, 1, 0.1), (True, 1, 0.0)):
        columns, length = 160, 20
        masks = fused_linear.Masks(step, sequences, salt, length, p)
        x = torch.randn(2 * length, columns * (2 if swiglu else 1), device=device).to(dtype)
        A = stack_adapters([torch.randn(8, columns, device=device) * 0.1 for _ in range(members)], dtype)
        norm = fused_linear.Norm(torch.rand(columns, device=device).to(dtype), fused_linear.inverse_rms(x, 1e-6, False))
        once = fused_linear.Norm(norm.weight.float() + 1, norm.inverse)  # rounded after its factor alone, as in Gemma
        kinds = [(None, "silu"), (None, "gelu_pytorch_tanh")] if swiglu else [(x, "silu") for x in (None, norm, once)]
        for (most, share), (norm, activation) in itertools.product(((64, 64), (64, 1024), (0, 64)), kinds):
            # u in the same pass, by one program or more, and after it
            with mock.patch.multiple(fused_linear, MOST_WIDEN_COLUMNS=most, widen_share=lambda *_, share=share: share):
                found = fused_linear.widen(x, A, masks, 0.5, swiglu, True, norm, activation)
            exact = norm and fused_linear.Norm(norm.weight.float(), norm.inverse)
            want = fused_linear.widen(x.float(), A.float(), masks, 0.5, swiglu, False, exact, activation)
            assert all(apart(a, b) < tolerance for a, b in zip(found, want, strict=True)), (swiglu, members, p, most)
            assert apart(found[0][:, columns:], want[0][:, columns:]) < tolerance, (swiglu, members, p, most)
            assert not any(side[0][:, columns + len(A) :].any() for side in (found, want))
        for norm, _ in kinds[: 0 if swiglu else 3]:
            check_widen_backward(torch.randn_like(found[0]), x, A, masks, norm, members, tolerance)


def check_widen_backward(wide, x, A, masks, norm, members: int, tolerance: float) -> None:
    """Compare dx, dA and the members' dB with the torch calls in fp32, with a norm before the operator and without."""
    dB = torch.randn(12 * members, len(A), device=x.device)
    outputs = [16, 12, 8][:members] if members == 3 else [12] * members

    def run(wide, x, A, norm, kernels):
        dx, dA, left = fused_linear.widen_backward(wide, x, A, masks, kernels, norm)
        assert kernels or left is None
        return dx, *fused_linear.settle_gradients(dA.clone(), dB, outputs, 8, left, kernels)

    exact = norm and fused_linear.Norm(norm.weight.float(), norm.inverse)
    want = run(wide.float(), x.float(), A.float(), exact, False)
    for divided in ((), (x.dtype,)):
        with mock.patch.object(fused_linear, "DIVIDED", divided):
            found = run(wide.clone(), x, A, norm, True)
        assert all(apart(a, b) < tolerance for a, b in zip(found, want, strict=True)), (members, masks.p, norm, divided)
        assert torch.equal(found[2], want[2])


def check_cross_entropy(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the kernel with torch's cross entropy in fp64.

    Rows are shorter and longer than a block, some have no label, some logits overflow when exponentiated, and there are
    targets at both ends.
    """
    torch.manual_seed(0)
    cases = (101, 1.0, ()), (20_000, 1.0, ()), (101, 100.0, ()), (101, 3.0, (1.0, 5.0)), (20_000, 1.0, (0.25, 2.0))
    for vocabulary, size, form in (*cases, (101, 3.0, (1 / 6, 0.0)), (101, 100.0, (1.0, 30.0))):
        form = LogitForm(*form)
        rows, weight = torch.randn(6, 24, device=device), torch.randn(vocabulary, 24, device=device) * size
        rows, weight = rows.to(dtype), weight.to(dtype)
        targets = torch.tensor([0, vocabulary - 1, IGNORED, 7, vocabulary // 2, 3], device=device)
        logits = (rows @ weight.t()).double().requires_grad_()
        shaped = form.scale * logits
        shaped = form.cap * torch.tanh(shaped / form.cap) if form.cap else shaped
        want = torch.nn.functional.cross_entropy(shaped, targets, ignore_index=IGNORED, reduction="sum")
        want.backward()
        for with_gradient, programs in itertools.product(
            (False, True), (4, 1)
        ):  # one row after another, or all at once
            with mock.patch.object(loss_module, "multiprocessors", lambda _, programs=programs: programs):
                trained = torch.tensor([7, 3, 90], device=device)
                loss, gradient, own = kernel_chunk_loss(rows, weight, None, targets, with_gradient, form, trained)
            assert abs(loss.sum().item() / want.item() - 1) < 1e-5, (vocabulary, size, form)
        assert apart(gradient, logits.grad.float() @ weight.float()) < tolerance, (vocabulary, size, form)
        assert not gradient[2].any()
        assert apart(own, logits.grad[:, trained].T @ rows.double()) < tolerance, (vocabulary, size)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check_swiglu_backward(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the kernel with its torch twin in fp32.

    There are several shares, and blocks of rows and of columns that are not full. Ranks are no powers of two, or
    differ. Some cases have no adapter here or on gate and up, and one has a larger rank than the kernel supports.
    """
    torch.manual_seed(0)
    columns, length = 160, 20
    step, salt = (torch.tensor(n, dtype=torch.int32, device=device) for n in (3, -12345))
    sequences = torch.tensor([5, 9, 2], dtype=torch.int32, device=device)
    x, wide = torch.randn(3 * length, 2 * columns, device=device), torch.randn(3 * length, columns, device=device)
    cases = (
        (8, 8, 0.1),
        (8, 8, 0.0),
        (5, 12, 0.1),
        (16, 0, 0.1),
        (0, 0, 0.0),
        (40, 20, 0.1),
        (20, 40, 0.0),
        (100, 90, 0.1),
        (130, 200, 0.0),
        (260, 8, 0.1),
    )
    runs = [*itertools.product(cases, (20, 1000), ["silu"]), *((case, 20, "gelu_pytorch_tanh") for case in cases[:2])]
    for number, ((rank, before, p), share, activation) in enumerate(runs):
        members, over = 2 - number % 3 // 2, number % 2 == 1  # one u for both, and the result over x
        masks = fused_linear.Masks(step, sequences, salt, length if number % 3 else 32, p)  # blocks of rows divide 32
        A = x.new_empty(0, columns)
        if rank:
            A = stack_adapters([torch.randn(rank, columns, device=device) * 0.1], dtype)
        du = torch.randn(len(x), len(A), device=device)
        u = torch.randn(len(x), adapter_columns(before, members), device=device) if before else None
        operands = [tensor if tensor is None else tensor.to(dtype) for tensor in (torch.cat([wide, du], 1), x, A, u)]
        exact = [tensor if tensor is None else tensor.float() for tensor in operands]
        with mock.patch.object(fused_linear, "share_rows", lambda *_, share=share: share):
            handed = fused_linear.Before(operands[3], before, members)
            found = fused_linear.swiglu_backward(*operands[:3], masks, handed, True, activation, None, over)
        assert (found[0].data_ptr() == operands[1].data_ptr()) == over
        handed = fused_linear.Before(exact[3], before, members)
        want = fused_linear.swiglu_backward(*exact[:3], masks, handed, False, activation)
        found, want = ((side[0], *fused_linear.apart(side[1], len(A), columns)) for side in (found, want))
        for a, b in zip(found, want, strict=True):
            assert a.shape == b.shape and (not b.numel() or apart(a, b) < tolerance), (rank, before, p, share)


def check_rotate(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the operator and its gradient with RMS norms and apply_rotary_pos_emb in fp32.

    There are few and many heads of k and v, widths that are no power of two, positions for all with angles in `dtype` or per
    sequence with angles in fp32, heads of which only a part is rotated, and norms as wide as a head, as all heads, or none.
    """
    torch.manual_seed(0)
    batch, length = 3, 7
    tables = (1, dtype), (batch, torch.float32)
    cases = itertools.product(((64, 64), (80, 80), (64, 48)), ((6, 2), (3, 3)), tables, ("", "head", "all"))
    for (width, turned), (heads, kv_heads), (rows, angles), kind in cases:
        each = {"": [], "head": [width] * 2, "all": [heads * width, kv_heads * width]}[kind]
        norms = [torch.rand(size, device=device).to(angles) + 0.5 for size in each]  # in Gemma they are in fp32
        qkv = torch.randn(batch, length, (heads + 2 * kv_heads) * width, device=device).to(dtype).requires_grad_()
        turns = torch.rand(rows, length, turned, device=device) * 100  # the halves not the same, as the function has it
        cos, sin = turns.cos().to(angles), turns.sin().to(angles)
        exact = qkv.detach().float().requires_grad_()
        parts = (
            x.unflatten(-1, (-1, width)) for x in exact.split([n * width for n in (heads, kv_heads, kv_heads)], -1)
        )
        q, k, v = parts
        if norms:
            sizes = [(norm.numel() // width, width) if kind == "all" else (width,) for norm in norms]
            q, k = (
                F.rms_norm(x, size, norm.float().view(size), 1e-2)
                for x, size, norm in zip((q, k), sizes, norms, strict=True)
            )
        want = *apply_rotary_part(q, k, cos.float(), sin.float(), unsqueeze_dim=2), v
        found = rotate(qkv, cos, sin, heads, kv_heads, norms, 1e-2)
        grads = [torch.randn(x.shape, device=device).to(dtype) for x in want]
        torch.autograd.backward(want, [grad.float() for grad in grads])
        torch.autograd.backward(found, [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads])
        case = width, turned, heads, rows, angles, kind
        assert all(x.is_contiguous() and apart(x, y) < tolerance for x, y in zip(found, want, strict=True)), case
        assert torch.equal(found[2], v.to(dtype)) and apart(qkv.grad, exact.grad) < tolerance, case
    for own in ([], norms):
        torch.library.opcheck(rotate, (qkv, cos, sin, heads, kv_heads, own, 1e-2))


def check_layers(folder: str, layers: int | None = None, **chosen) -> None:
    """Compare gradients of fused layers with kernels, in half precision, with plain ones in fp32 and with peft's.

    layers: how many to keep, if not all; chosen: which layers and linears have adapters.
    """

    def shortened(**options) -> tuple:
        model, *rest = prepared(folder, **options, **chosen)
        decoder = families.decoder_of(model.get_base_model())
        decoder.layers = decoder.layers[:layers]
        return model, *rest

    _, reference = gradients(*shortened())
    _, plain = gradients(*shortened(dtype="float16"))
    model, clock, loss = shortened(dtype="float16", checkpointing=True)
    fuse(model, clock, 0.05, kernels=True)
    # DIVIDED: in bfloat16's way, which the interpreter lacks; check_widen_backward has float16's too
    large = dataclasses.replace(DEQUANTIZE, block_m=2048)  # a program costs the interpreter as much whatever its size
    with (
        mock.patch.multiple(fused_linear, share_rows=lambda *_: 32, DIVIDED=(torch.float16,)),
        mock.patch.object(packed_weights_module, "DEQUANTIZE", large),
    ):
        _, fused = gradients(model, clock, loss)
    assert fused.keys() == plain.keys() and furthest(fused, reference) <= allowed(folder) * furthest(plain, reference)


@pytest.mark.triton
@pytest.mark.minutes
def test_kernels_in_tritons_interpreter():
    """In float16, because the interpreter rounds bfloat16 wrongly and its tl.dot reads bfloat16 bits as integers."""
    interpret(
        "tests.fast_path.test_layers",
        "check_kernels('cpu', torch.float16, 2e-3); check_swiglu_backward('cpu', torch.float16, 2e-3); "
        "check_cross_entropy('cpu', torch.float16, 2e-3); "
        "check_rotate('cpu', torch.float32, 1e-6); check_rotate('cpu', torch.float16, 1e-3)",
    )


@pytest.mark.triton
@pytest.mark.parametrize(
    "kind",
    ["qwen2", "gemma2", *(pytest.param(k, marks=pytest.mark.long) for k in ("smollm3", "olmo2", "gemma3", "phi3"))],
)
def test_layers_learn_the_same_from_kernels_in_tritons_interpreter(random_models, kind):
    layers = 1 if kind in ("qwen2", "gemma2") else None  # their layers launch the same kernels
    interpret("tests.fast_path.test_layers", f"check_layers({str(random_models(kind))!r}, {layers})")


@pytest.mark.triton
@pytest.mark.minutes
@pytest.mark.parametrize(
    "chosen", [pytest.param(PARTLY[1], marks=pytest.mark.long), PARTLY[-1]]
)  # by layer, within one
def test_layers_with_some_adapters_learn_the_same_from_kernels_in_tritons_interpreter(random_models, chosen):
    interpret("tests.fast_path.test_layers", f"check_layers({str(random_models('qwen2'))!r}, **{chosen!r})")


def signature(kernel, pointers: dict[str, str]) -> dict[str, str]:
    """Return the types of a kernel's arguments: pointers as given, all others 32-bit numbers."""
    names = [name for name in kernel.arg_names if name.upper() != name or name in pointers]
    floats = ("scale", "cap", "inverse", "epsilon")
    return {name: pointers.get(name, "fp32" if name in floats else "i32") for name in names}


# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities). An RTX 4060 is sm_89.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# All kernels are compiled for these: of all 71 compilations Triton 3.9 wrote the same code for sm_86 as for sm_89, and for sm_80
# code that takes as much shared memory. For two more cards it cost CI 3 min of its cores; a test has three kernels of each.
CAPABILITIES = (89, 90)


HALF, SINGLE, WHOLE = "*bf16", "*fp32", "*i32"  # pointers
MASKS = {"step": WHOLE, "sequences": WHOLE, "salt": WHOLE}


def compile_for(capability: int, kernel, pointers: dict[str, str], constants: dict, warps: int, **options) -> str:
    """Return the PTX of a kernel compiled for a card, after checking that it fits the card's shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature(kernel, pointers), **dict.fromkeys(constants, "constexpr")}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, positions)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    assert f"sm_{capability}" in compiled.asm["ptx"]
    return compiled.asm["ptx"]


@pytest.mark.triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_within_the_shared_memory_of_each_card(capability):
    """The kernels of the forward pass, the loss and the rotary embedding."""
    compile_ = functools.partial(compile_for, capability)
    launch = DEQUANTIZE
    weights = {"packed": WHOLE, "absmax": "*u8", "out": HALF, "stacked": HALF}
    weights |= dict.fromkeys(("absmax2", "offset", "code2", "lut", "A0", "A1", "A2", "B0", "B1", "B2"), SINGLE)
    constants = {
        "NESTED": True,
        "BLOCKSIZE": 64,
        "BLOCKSIZE2": 256,
        "ROW_BLOCKS": 172,
        "BLOCKS": launch.block_m,
        "BLOCK_A": 1024,
    }
    for columns, skipped in itertools.product((16, 32, 64, 512), (0, 172)):  # of the adapters; blocks of other pieces
        own = constants | {"ROWS": max(1, 1024 // columns), "BLOCK_R": columns, "SHUFFLE": True}
        own |= {"FIRST": skipped, "SKIPPED": skipped}
        dequantize = compile_(training_kernels.dequantize_kernel, weights, own, launch.warps)
        assert dequantize.count("shfl.sync.idx.b32") == launch.block_m * 64 // launch.warps // 32  # one a weight
    kinds = ((0, 0), (16, 0), (32, 0), (16, 64), (32, 64))
    for swiglu, dropout, (columns, zeros) in itertools.product((True, False), (True, False), kinds):
        switches = {"SWIGLU": swiglu, "NORM": not swiglu, "DROPOUT": dropout, "BLOCK_R": columns, "BLOCK_Z": zeros}
        switches |= {"ACTIVATION": "gelu_pytorch_tanh" if dropout else "silu"}
        tile = {"BLOCK_M": fused_linear.WIDEN.block_m, "BLOCK_K": fused_linear.WIDEN.block_k}
        activations = dict.fromkeys(("x", "wide", "dropped", "A", "u", "norm"), HALF)
        activations |= {"sums": SINGLE, "inverse_rms": SINGLE, **MASKS}
        compile_(training_kernels.widen_kernel, activations, switches | tile, fused_linear.WIDEN.warps, num_stages=1)
    compile_(training_kernels.inverse_rms_kernel, {"x": HALF, "out": SINGLE}, {"BLOCK": 1024}, 4)
    for shares in (1, 37):  # of 18,944 columns, a 7B's
        settle = {"SHARES": shares, "BLOCK_M": 64, "BLOCK_R": 32, "BLOCK_Z": 64}
        compile_(training_kernels.settle_kernel, {"sums": SINGLE, "wide": HALF, "u": HALF}, settle, 4)
    for gradient, scaled, capped in itertools.product((False, True), repeat=3):
        pointers = {"logits": HALF, "targets": "*i64", "losses": SINGLE}
        constants = {"GRADIENT": gradient, "SCALED": scaled, "CAPPED": capped, "BLOCK": CROSS_ENTROPY.block_k}
        compile_(training_kernels.cross_entropy_kernel, pointers, constants, CROSS_ENTROPY.warps)
    rotated = dict.fromkeys(("qkv", "q", "k", "v", "grad"), HALF)
    sizes = (16, 2, 64, 128), (16, 2, 48, 128), (8, 4, 128, 256), (40, 40, 64, 128)
    for back, angles, heads, kind in itertools.product((False, True), (HALF, SINGLE), sizes, ("", "head", "all")):
        launch = rotate_launch(1000 * (heads[0] + 2 * heads[1]), heads[0], heads[1], heads[3], kind)[1]
        constants = dict(zip(("HEADS", "KV_HEADS", "HALF", "WIDTH"), heads, strict=True))
        constants |= {"BLOCK_M": launch.block_m, "BLOCK_K": launch.block_k, "BACK": back, "NORM": kind}
        activations = rotated | dict.fromkeys(("cos", "sin", "q_weight", "k_weight"), angles)
        compile_(training_kernels.rotate_kernel, activations, constants, launch.warps)


@pytest.mark.triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_the_backward_compile_within_the_shared_memory_of_each_card(capability):
    compile_ = functools.partial(compile_for, capability)
    for rank, dropout in ((16, False), (64, False), (16, True), (256, True)):
        backward = fused_linear.MASKED_BACKWARD if dropout else fused_linear.WIDEN_BACKWARD
        tile = {"BLOCK_M": backward.block_m, "BLOCK_K": backward.block_k, "BLOCK_R": rank}
        tile |= {"DROPOUT": dropout, "NORM": True}
        activations = dict.fromkeys(("x", "wide", "out", "dropped", "A", "divided", "du"), HALF)
        activations |= {"inverse_rms": SINGLE, **MASKS}
        compile_(training_kernels.widen_backward_kernel, activations, tile, backward.warps)
    for here, before, dropout in (
        (16, 16, True),
        (16, 16, False),
        (32, 32, False),
        (64, 64, True),
        (128, 128, True),
        (256, 256, True),
        (16, 0, True),
        (0, 0, False),
    ):
        activations = dict.fromkeys(("x", "wide", "grads", "A", "u", "upstream"), HALF) | {"sums": SINGLE, **MASKS}
        for activation, whole in (("silu", True), ("gelu_pytorch_tanh", False)):
            launch = fused_linear.swiglu_launch(max(here, before), dropout, activation, capability // 10 == 9)
            tile = {"BLOCK_M": launch.block_m, "BLOCK_K": launch.block_k, "BLOCK_R": here, "BLOCK_U": before}
            switches = tile | {"DROPOUT": dropout, "ACTIVATION": activation, "WHOLE": whole}
            compile_(training_kernels.swiglu_backward_kernel, activations, switches, launch.warps, num_stages=1)
    pointers = {"dA": SINGLE, "weight": HALF, "dB": SINGLE, "own": SINGLE}
    settle = {"BLOCK": fused_linear.SETTLE_BLOCK}
    compile_(training_kernels.settle_gradients_kernel, pointers, settle, 4)


@pytest.mark.parametrize(
    ("multiprocessors", "rows", "blocks", "shares"),
    [(132, 8192, 172, 3), (60, 2048, 172, 4), (24, 2048, 172, 5), (132, 512, 172, 2), (132, 200, 172, 1)],
)
def test_shares_of_rows_fill_the_last_wave_of_programs(multiprocessors, rows, blocks, shares, monkeypatch):
    """On an H200 4 shares took 0.89 times as long as one with 60 multiprocessors, and 5 took 0.94 times as long with 24."""
    monkeypatch.setattr(fused_linear, "multiprocessors", lambda device: multiprocessors)
    assert -(-rows // fused_linear.share_rows(rows, blocks, 4, torch.device("cpu"))) == shares


@pytest.mark.triton
def test_sm_86_takes_the_code_of_sm_89_and_sm_80_takes_it_too():
    activations = dict.fromkeys(("x", "wide", "dropped", "A", "u", "norm", "grads", "du", "upstream"), HALF)
    activations |= {"sums": SINGLE, "inverse_rms": SINGLE, **MASKS}
    widen = {"SWIGLU": False, "NORM": True, "DROPOUT": True, "BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": 32, "BLOCK_Z": 0}
    widen |= {"ACTIVATION": "silu"}
    swiglu = {
        "DROPOUT": True,
        "BLOCK_M": 16,
        "BLOCK_K": 64,
        "BLOCK_R": 16,
        "BLOCK_U": 16,
        "ACTIVATION": "silu",
        "WHOLE": True,
    }
    heads = {"HEADS": 16, "KV_HEADS": 2, "HALF": 64, "WIDTH": 128, "BLOCK_M": 16, "BLOCK_K": 64, "BACK": True}
    heads |= {"NORM": "head"}
    rotated = dict.fromkeys(("qkv", "q", "k", "v", "cos", "sin", "q_weight", "k_weight", "grad"), HALF)
    for kernel, pointers, constants in (
        (training_kernels.widen_kernel, activations, widen),
        (training_kernels.swiglu_backward_kernel, activations, swiglu),
        (training_kernels.rotate_kernel, rotated, heads),
    ):
        pointers = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        codes = {capability: compile_for(capability, kernel, pointers, constants, 4) for capability in (80, 86, 89)}
        assert codes[86].replace("sm_86", "sm_89") == codes[89]


FEW = [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["down_proj"],
    ["gate_proj", "up_proj"],
    ["up_proj", "down_proj"],
    ["gate_proj", "up_proj", "down_proj"],
]


@pytest.mark.parametrize("targets", FEW)
def test_layers_with_few_adapters_learn_what_plain_ones_do(random_models, targets):
    folder = random_models("qwen2")
    plain_loss, plain = gradients(*prepared(folder, targets=targets))
    model, clock, loss = prepared(folder, targets=targets)
    fuse(model, clock, 0.05, kernels=False)
    fused_loss, fused = gradients(model, clock, loss)
    assert fused_loss == pytest.approx(plain_loss, rel=1e-6)
    assert furthest(fused, plain) < 1e-4


@pytest.mark.parametrize("frozen", ["gate_proj.lora_B", "lora_A", "down_proj.lora"])
def test_frozen_adapters_get_no_gradient_and_the_rest_the_same(random_models, frozen):
    results = []
    for fused in (False, True):
        model, clock, loss = prepared(random_models("qwen2"), checkpointing=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
        if fused:
            fuse(model, clock, 0.05, kernels=False)
        results.append(gradients(model, clock, loss)[1])
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if frozen in name)
    assert furthest(results[1], results[0]) < 1e-4


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_on_the_gpu(dtype):
    check_kernels("cuda", dtype, 1e-2)
    check_swiglu_backward("cuda", dtype, 1e-2)
    check_cross_entropy("cuda", dtype, 1e-2)
    check_rotate("cuda", dtype, 1e-2)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", FUSED_FAMILIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_error_on_the_gpu_is_no_larger_than_pefts(random_models, kind, compiled):
    """The plain one has the model's own attention: Gemma 2's is eager."""
    folder = random_models(kind)
    _, reference = gradients(*prepared(folder, device="cuda"), length=64)
    _, plain = gradients(*prepared(folder, dtype="bfloat16", device="cuda", asked="eager"), length=64)
    model, clock, loss = prepared(folder, dtype="bfloat16", device="cuda", checkpointing=True)
    fuse(model, clock, 0.05, kernels=True)
    if compiled:
        compile_layers(model)
    _, fused = gradients(model, clock, loss, length=64)

    def error(found):
        return sum((found[n] - reference[n]).square().sum() for n in reference).sqrt().item()

    worst = sorted(((found - reference[n]).norm() / reference[n].norm(), n) for n, found in fused.items())[-4:]
    assert error(fused) <= allowed(folder) * error(plain), worst


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "olmo2"])
def test_a_kept_output_on_the_gpu_is_the_recomputed_one(random_models, kind):
    """Compiled, not in a graph, since these models get a mask here in a capture alone; reshaping changes how many keep it."""
    model, clock, loss = prepared(random_models(kind), dtype="bfloat16", device="cuda", checkpointing=True)
    fuse(model, clock, 0.05, kernels=True)
    compile_layers(model, Kept(mlp=1))
    loss.chunk_loss = kernel_chunk_loss
    trained, found = [parameter for parameter in model.parameters() if parameter.requires_grad], []
    scaler, parts = torch.amp.GradScaler("cuda", enabled=False), choice.FastPath(True, True, False, True, "")
    learner = micro_step.Learner(model, trained, loss, clock, scaler, parts, (2, 64))
    learner.train()
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(5)).cuda()
    for kept in ((1, 0), (0, 0), (2, 2), (0, 1)):
        learner.reshape(2, 2, False, Kept(*kept))
        learner.zero_gradients()
        value = learner.micro_step(3, torch.tensor([5, 7]), {"input_ids": ids, "labels": ids}).item()
        found.append((value, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    (want, grads), *others = found
    for value, other in others:
        print(f"kept or recomputed in {kind}: furthest gradients {furthest(other, grads):.1e} (0 is the same bits)")
        assert (
            value == pytest.approx(want, rel=1e-5) and furthest(other, grads) < 1e-2
        )  # fusions may sum in another order


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("chosen, pieces", [*((chosen, 1) for chosen in PARTLY), ({}, 4), ({}, 8)])
def test_captured_layers_with_some_adapters_or_none_err_no_more_than_plain_ones(random_models, chosen, pieces):
    """Compiled and in a graph, in bfloat16, against fp32; the graph's second replay adds to the gradients of the first."""
    folder, ids = random_models("qwen3"), torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(5))
    errors, reference, value = {}, {}, {}
    for path, dtype in (("fp32", "float32"), ("plain", "bfloat16"), ("captured", "bfloat16")):
        model, clock, loss = prepared(folder, dtype=dtype, device="cuda", checkpointing=1, **chosen)
        fast = path == "captured"
        if fast:
            fuse(model, clock, 0.05, kernels=True, pieces=pieces)
            compile_layers(model)
            loss.chunk_loss = kernel_chunk_loss
        parts = choice.FastPath(fast, fast, fast, fast, "")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        learner = micro_step.Learner(model, trained, loss, clock, scaler, parts, (2, 64))
        learner.train()
        batch = {"input_ids": ids.cuda(), "labels": ids.cuda()}
        twice = [learner.micro_step(3, torch.tensor([5, 7]), batch).item() for _ in range(2)]
        assert twice[0] == pytest.approx(twice[1], rel=1e-5)
        found, value[path] = {n: p.grad / 2 for n, p in model.named_parameters() if p.requires_grad}, twice[0]
        reference = reference or found
        assert found.keys() == reference.keys() and (learner.captured is not None) == fast
        errors[path] = sum((found[n] - reference[n]).square().sum() for n in reference).sqrt().item()
    assert errors["captured"] <= 1.05 * errors["plain"] and value["captured"] == pytest.approx(value["fp32"], rel=1e-2)


def packed_blocks() -> tuple[list[np.ndarray], list[int]]:
    """Return blocks of random samples, two of them not full, and the largest number of samples in a block."""
    random, rows = np.random.default_rng(0), []
    for sizes in ([40, 23, 17], [9, 30, 2, 21], [64]):
        ids, positions = random.integers(0, 4096, sum(sizes)), np.concatenate([np.arange(size) for size in sizes])
        rows.append(np.stack([ids, np.where(positions == 0, IGNORED, ids), positions]))
    return rows, [4, 3, 1]


def learned(model, loss, step, *batches) -> tuple[torch.Tensor, dict]:
    """Return the logits of all real tokens, [tokens, vocabulary], and the gradients of the batches' summed loss."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    logits = []
    for batch, real in batches:
        with loss.autocast():
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        logits.append(found.detach()[real].float())
        step(**batch)
    return torch.cat(logits), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def on_device(rows: list[np.ndarray], device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the batch of blocks and a mask of its real tokens, bool [batch, length]."""
    batch = collate(rows, 0)
    real = torch.arange(batch["labels"].shape[1])[None] < torch.tensor([row.shape[1] for row in rows])[:, None]
    return {name: tensor.to(device) for name, tensor in batch.items()}, real.to(device)


def check_packed_path(
    folder: Path, path: str, device: str, dtype: str, ways: tuple[bool, ...] = (False, True)
) -> list[tuple[float, float]]:
    """Return the errors of logits and gradients of packed blocks, with a mask and with varlen attention (`ways`).

    The reference is each sample alone in fp32. path: plain, fused, compiled or captured.
    """
    rows, counts = packed_blocks()
    alone = [part for row in rows for part in np.split(row, np.flatnonzero(row[2] == 0)[1:], axis=1)]
    model, clock, loss = prepared(folder, p=0.0, device=device)

    def step(**batch):
        value = loss(**batch)
        value.backward()
        return value.detach()

    want = learned(model, loss, step, *(on_device([sample], device) for sample in alone))
    errors = []
    for varlen in ways:
        model, clock, loss = prepared(folder, p=0.0, dtype=dtype, device=device, checkpointing=True)
        base = model.get_base_model()
        assert keep_samples_apart(base, 80, counts) == "packed samples: varlen attention"
        if not varlen:
            base.config.attention_choice = base.config.attention_choice._replace(varlen_samples=None)
        if path != "plain":
            fuse(model, clock, 0.0, kernels=device == "cuda")
        if path in ("compiled", "captured"):
            compile_layers(model)
        run, batch = step, on_device(rows, device)
        clock.set(3, torch.arange(len(rows)))
        if path == "captured":  # in a graph with room for more and longer blocks
            learned(model, loss, step, batch)  # makes the gradients that the graph adds to
            clock.set(3, torch.arange(len(rows) + 1))
            run = micro_step.Captured(step, torch.device(device), len(rows) + 1, 96, batch[0])
            run.capture(torch.cuda.graph_pool_handle())
            torch._foreach_zero_([p.grad for p in model.parameters() if p.grad is not None])
            run(**batch[0])
            found = None, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            found = learned(model, loss, step, batch)
        gap = sum((found[1][n] - want[1][n]).square().sum() for n in want[1]).sqrt()
        size = sum(gradient.square().sum() for gradient in want[1].values()).sqrt()
        logits = 0.0 if found[0] is None else ((found[0] - want[0]).norm() / want[0].norm()).item()
        errors.append((logits, (gap / size).item()))
    return errors


@pytest.mark.parametrize("path", ["plain", "fused", "compiled"])
def test_packed_samples_learn_the_same_with_a_mask_and_with_varlen_attention(random_models, varlen_on_cpu, path):
    varlen_on_cpu()
    for errors in check_packed_path(random_models("qwen3"), path, "cpu", "float32"):
        assert max(errors) < 1e-4  # fp32 rounding


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])  # as many heads of k and v as of q, and fewer
@pytest.mark.parametrize("path", ["plain", "fused", "compiled", "captured"])
def test_varlen_attention_on_the_gpu_errs_no_more_than_a_mask(random_models, kind, path):
    """In bfloat16, both against fp32. On a CPU a mask has an error of 0.02; if samples see each other, 0.8 to 0.9."""
    mask, varlen = check_packed_path(random_models(kind), path, "cuda", "bfloat16")
    print(f"{kind} {path}: errors of logits and gradients {mask} with a mask, {varlen} with varlen attention")
    assert varlen[0] <= 1.1 * mask[0] and varlen[1] <= 1.1 * mask[1] and max(varlen) < 0.1


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_packed_samples_of_a_model_with_capped_scores_do_not_see_each_other(random_models, path):
    (errors,) = check_packed_path(random_models("gemma2"), path, "cpu", "float32", (True,))
    assert max(errors) < 1e-4


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("path", ["fused", "compiled", "captured"])
def test_packed_samples_of_a_model_with_capped_scores_on_the_gpu(random_models, path):
    (errors,) = check_packed_path(random_models("gemma2"), path, "cuda", "bfloat16", (True,))
    assert max(errors) < 0.1


@gpu
@pytest.mark.gpu
def test_a_run_on_packed_chats_on_the_gpu_learns_what_it_does_with_a_mask(train, chats, monkeypatch, tmp_path):
    """Compiled and captured, from the command line."""
    curves = []
    for way, reason in (("varlen attention", None), ("with a mask: a test", "a test")):
        if reason:
            monkeypatch.setattr(attention_module, "varlen_obstacle", lambda model, length: "a test")
        flags = ("--dataset", chats, "--compile", "on", "--cuda_graphs", "on", "--dropout", 0, "--logging_steps", 1)
        code, folder = train(*flags, "--learning_rate", 1e-3, output_dir=tmp_path / way[:4])
        assert code == 0 and f"packed samples: {way}" in (folder / "training_log.txt").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curves.append([row.get("loss", row.get("eval_loss")) for row in rows])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)


# ------------------------------------------------------------------------------------------------ cuDNN's attention


@pytest.fixture
def cudnn_on_cpu(monkeypatch) -> list[str]:
    """Let `cudnn_attention` run on a CPU, with SDPA's kernels for CPUs, and return the list of its calls."""
    aten, calls = torch.ops.aten, []
    cpu, cpu_backward = (getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{x}") for x in ("", "_backward"))

    def for_all_heads(q, *others):
        assert all(x.transpose(1, 2).is_contiguous() for x in (q, *others))
        return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in others]

    def forward(q, k, v, bias, want_logs, p, causal, *, scale):
        calls.append("forward")
        assert bias is None and want_logs and causal
        out, logs = cpu(q, *for_all_heads(q, k, v), p, causal, scale=scale)
        return out, logs.unflatten(-1, (-1, 1)), None

    def backward(grad, q, k, v, out, logs, seed, offset, bias, starts, starts_k, most, most_k, p, causal, *, scale):
        calls.append("backward")
        assert causal and most == most_k == q.shape[2] and (bias, starts, starts_k) == (None, None, None)
        wide = for_all_heads(q, k, v)
        for_all_heads(grad, out)
        dq, *others = cpu_backward(grad, q, *wide, out, logs.flatten(-2), p, causal, scale=scale)
        return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in others)

    for name, function in (("", forward), ("_backward", backward)):
        name = f"_scaled_dot_product_cudnn_attention{name}"
        function.default = getattr(aten, name).default  # the compiler's own modules ask for it
        monkeypatch.setattr(aten, name, function)
    monkeypatch.setattr(attention_module, "cudnn_serves", lambda model: True)
    return calls


def run_path(model, clock, path: str, kernels: bool = False) -> None:
    """Put a model on a path: plain, fused or compiled."""
    if path != "plain":
        fuse(model, clock, 0.0, kernels=kernels)
    if path == "compiled":
        compile_layers(model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])  # as many heads of k and v as of q, and fewer
@pytest.mark.parametrize("path", ["plain", "fused", "compiled"])
def test_the_operator_of_cudnns_attention_is_wired_right(random_models, cudnn_on_cpu, monkeypatch, path, kind):
    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "cudnn_serves", lambda model: False)
        model, clock, loss = prepared(random_models(kind), p=0.0)
        want, plain = gradients(model, clock, loss)
    assert not cudnn_on_cpu
    model, clock, loss = prepared(random_models(kind), p=0.0)
    run_path(model, clock, path)
    cudnn_on_cpu.clear()  # CausalLMLoss has tried the model
    value, found = gradients(model, clock, loss)
    layers = len(model.get_base_model().get_decoder().layers)
    assert cudnn_on_cpu == ["forward"] * layers + ["backward"] * layers
    assert value == pytest.approx(want, rel=1e-6) and furthest(found, plain) < 1e-4  # fp32 rounding


@pytest.mark.parametrize(
    "dtype, capability, deterministic, serves",
    [
        ("bfloat16", (9, 0), False, True),
        ("bfloat16", (8, 9), False, False),
        ("bfloat16", (12, 0), False, False),
        ("float32", (9, 0), False, False),
        ("bfloat16", (9, 0), True, False),
    ],
)
def test_cudnns_attention_is_for_hopper_in_half_precision_and_no_deterministic_run(
    random_models, monkeypatch, dtype, capability, deterministic, serves
):
    model, _ = load_model_and_tokenizer(str(random_models("qwen2")), device="cpu", compute_dtype=dtype)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert cudnn_serves(model) is serves


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("first, second", [("plain", "compiled"), ("compiled", "plain"), ("fused", "compiled")])
def test_gradients_of_cudnns_attention_are_right_whichever_path_comes_first(random_models, first, second):
    """In bfloat16 against fp32. With torch's own operator the second path of a process had gradients 150 % off."""
    folder = random_models("qwen3")  # fewer heads of k and v than of q
    _, want = gradients(*prepared(folder, p=0.0, device="cuda"), length=40)
    for path in (first, second):
        model, clock, loss = prepared(folder, p=0.0, dtype="bfloat16", device="cuda")
        if not model.config.attention_choice.cudnn:
            pytest.skip("cuDNN's attention is not for this GPU")
        run_path(model, clock, path, kernels=True)
        assert furthest(gradients(model, clock, loss, length=40)[1], want) < 0.1, path


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"k_proj": 4}}, {"alpha_pattern": {"k_proj": 4, "up_proj": 50}}])
@torch.no_grad()
def test_adapters_of_other_ranks_or_scales_share_no_group(tiny_model, pattern):
    """As in a downloaded adapter: one group would take the first module's rank and scale for all."""
    bits = create_bnb_config(compute_dtype="float32")
    base = load_model_and_tokenizer(str(tiny_model), bits, device="cpu")[0]
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM", **pattern))
    for name, parameter in model.eval().named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.tensor([[5, 9, 33, 120, 77, 8]])
    expected = model(input_ids=ids).logits
    assert fuse(model, DropoutClock(0, torch.device("cpu")), 0.0, False, pieces=2)
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
