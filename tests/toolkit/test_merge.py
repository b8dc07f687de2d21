"""Merged models of families that keep more than plain linears, against the live base and adapter."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from config import ConfigError
from fast_path.experts import adapting_experts
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from toolkit import merge

SIZES = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 4, "pad_token_id": 0}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
BASES = {
    "Conv1D": (transformers.GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=4), ["c_attn", "c_fc"]),
    "not in 4 bit": (transformers.FalconConfig(**SIZES), ["query_key_value"]),
    "learned buffers": (transformers.DeepseekV3Config(**WIDE, **ROUTED, **LATENT, **GROUPS), ["q_b_proj", "o_proj"]),
    "experts": (transformers.Qwen3MoeConfig(**WIDE, **ROUTED, num_experts=4, head_dim=16), "all-linear"),
}
IDS = list(range(5, 45))


@pytest.fixture(params=BASES)
def adapted(request, tiny_model, tmp_path):
    """A function that returns a base and its adapter: in 4 bit, or as a plain copy of that."""
    config, targets = BASES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            torch.nn.init.uniform_(buffer, -1, 1)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data *= 10  # so that it matters which ones are chosen
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_model / file).read_bytes())
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": targets, "task_type": "CAUSAL_LM"}

    def make(plain: bool) -> PeftModel:
        bnb_config = create_bnb_config(compute_dtype="float32")
        base, _ = load_model_and_tokenizer(str(tmp_path), bnb_config, compute_dtype="float32", device="cpu")
        both = get_peft_model(merge.plain_copy(base) if plain else base, adapting_experts(LoraConfig(**lora)))
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(both.named_parameters()):
            if parameter.requires_grad:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        return both.eval()

    return make


def test_a_merged_model_is_base_and_adapter_within_rounding(adapted, tmp_path):
    live, both = merge.logits_on(adapted(plain=False), IDS), adapted(plain=True)
    unmerged = merge.logits_on(both, IDS)
    torch.testing.assert_close(unmerged, live, rtol=1e-4, atol=1e-5)
    merged = merge.merge_adapter(both)
    found = merge.logits_on(merged, IDS)
    rounding = merge.moved_by_rounding(merged, IDS, found)
    assert 0 < rounding < 0.05
    assert torch.equal(merge.logits_on(merged, IDS), found)  # the bits are as before
    merge.check_logits(found, live, rounding)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merge.moved(merge.logits_on(again, IDS), found) < 1e-3
    with pytest.raises(ConfigError, match="nothing is written"):
        merge.check_logits(live.roll(1, 0), live, rounding)


def test_forgotten_buffers_are_noticed(adapted, request):
    both = adapted(plain=True)
    expected = merge.logits_on(both, IDS)
    learned = [buffer for name, buffer in both.named_buffers() if name.endswith("e_score_correction_bias")]
    if not learned:
        pytest.skip("this base has none")
    for buffer in learned:
        buffer.zero_()
    with pytest.raises(ConfigError, match="within rounding"):
        merge.check_logits(merge.logits_on(both, IDS), expected, 0.01)
