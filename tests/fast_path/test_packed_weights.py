"""4-bit weights whose rows are no whole blocks, against values that are unpacked here by hand."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from fast_path.packed_weights import keep_packing, operands, stack_weights
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from toolkit import merge


def by_hand(parameter: bnb.nn.Params4bit) -> torch.Tensor:
    """Return the values of a packed weight in fp32: the level of each code times the constant of its block of 64."""
    state, codes = parameter.quant_state, parameter.data.view(torch.uint8).flatten()
    absmax = state.absmax.float()
    if state.nested:
        second = state.state2
        scale = second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()]
        absmax = second.code[state.absmax.long()] * scale + state.offset
    numbers = torch.stack([codes >> 4, codes & 15], 1).flatten()[: state.shape.numel()]
    return (state.code[numbers.long()] * absmax.repeat_interleave(64)[: len(numbers)]).view(state.shape)


def linear(inputs: int, outputs: int, quant_type: str = "nf4", double: bool = True) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(inputs, outputs, False, torch.float32, double, quant_type)
    return layer.to("cpu")


# 80, 96, 48 and 4304 (SigLIP's MLP) are those that bitsandbytes 0.50 unpacks wrongly on a CPU with AVX-512.
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("inputs", [48, 72, 80, 96, 65, 33, 128, 4304])
def test_rows_that_are_no_whole_blocks_are_unpacked_rightly(inputs, quant_type, double):
    torch.manual_seed(0)
    layer = linear(inputs, 32, quant_type, double)
    keep_packing(layer)
    weight, x = by_hand(layer.weight), torch.randn(3, inputs, requires_grad=True)
    torch.testing.assert_close(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    if inputs % 2 == 0:  # with an odd number of weights two linears cannot be one tensor
        other = linear(inputs, 64, quant_type, double)
        both, _ = operands(stack_weights([layer, other]), [], [], 1.0, torch.float32, kernels=False)
        torch.testing.assert_close(both, torch.cat([weight, by_hand(other.weight)]))


def test_a_mixture_of_odd_widths_merges_into_what_it_computes_with(tiny_model, tmp_path):
    """Hidden 80, experts 96 and 48 wide: each value of the plain model is the one by hand, and so are its logits."""
    config = Qwen2MoeConfig(
        vocab_size=4096, hidden_size=80, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
        intermediate_size=112, moe_intermediate_size=96, shared_expert_intermediate_size=48, num_experts=4,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    model = load_model_and_tokenizer(str(tmp_path), create_bnb_config(compute_dtype="float32"), device="cpu")[0]
    plain = merge.plain_copy(model)
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, bnb.nn.Params4bit)}
    values, original = (
        dict(plain.named_parameters()),
        dict(Qwen2MoeForCausalLM.from_pretrained(tmp_path).named_parameters()),
    )
    assert sum("experts." in name for name in packed) == 4 and len(packed) == 2 * (4 + 2 + 3 + 1)
    for name, parameter in packed.items():
        right = by_hand(parameter).to(values[name].dtype)
        torch.testing.assert_close(values[name].data, right, msg=name)
        assert (right.float() - original[name].float()).abs().mean() < 0.1 * original[name].float().abs().mean()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = plain.float()(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.std()))


def test_weights_that_bitsandbytes_cannot_repack_are_left_as_they_are(monkeypatch):
    """As on a CPU with AVX512-BF16, where generation repacks weights: it fails where rows are not whole blocks."""
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    layers = [linear(128, 64), linear(96, 64), linear(128, 1)]
    for layer in layers:
        keep_packing(layer, keep=False)
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [True, False, False]
