"""A base that was trained with dropout or other randomness of its own computes in training what it does in inference."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel

import config as schema
import train_qlora
from fast_path.dropout import modes_kept, own_dropout_line, train_adapters
from fast_path.families import decoder_layers
from quantization_utils import load_base
from toolkit.base_lines import base_lines
from toolkit.memory_plan import unplanned

SMALL = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_key_value_heads": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1}
# The adapted linears, a configuration with randomness in each place that its family knows, and what the log names.
BASES = {
    "llama": ("q_proj,down_proj", transformers.LlamaConfig(**SMALL, **SIZES, attention_dropout=0.1), "attention_dropout 0.1"),
    "gpt2": (
        "c_attn,c_proj",
        transformers.GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1",
    ),
    "opt": (
        "q_proj,fc2",
        transformers.OPTConfig(
            **SMALL, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64,
            max_position_embeddings=64, attention_dropout=0.1, dropout=0.2, layerdrop=0.3,
        ),
        "dropout 0.2, attention_dropout 0.1, layerdrop 0.3",
    ),
    "falcon": (
        "query_key_value,dense",
        transformers.FalconConfig(
            **SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.1, attention_dropout=0.1
        ),
        "hidden_dropout 0.1, attention_dropout 0.1",
    ),
    "phimoe": (
        "q_proj,v_proj", transformers.PhimoeConfig(**SMALL, **SIZES, **EXPERTS), "router_jitter_noise 0.1, input_jitter_noise 0.1"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """The folders of random models, each with the tiny tokenizer cut to 512 words that it does not need."""

    def make(name: str) -> Path:
        folder, config = tmp_path_factory.mktemp(name), BASES[name][1]
        torch.manual_seed(0)
        config.vocab_size = 4096  # that of the tiny tokenizer
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny_model / file).read_bytes())
        return folder

    return make


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("name", BASES)
def test_gradients_are_those_of_the_base_without_its_own_randomness(folders, name, checkpointed):
    targets, _, said = BASES[name]
    flags = {"model.name": str(folders(name)), "quantization.compute_dtype": "float32", "lora.dropout": 0.0}
    flags |= {"lora.target_modules": targets.split(","), "training.gradient_checkpointing": bool(checkpointed)}
    config = schema.load_config([], flags | {"data.max_length": 16})
    model, _ = load_base(config, torch.device("cpu"))
    assert any(said in line for line in base_lines(config, model))
    learner = train_qlora.build_learner(config, model, unplanned(config, 2, 2), lambda line: None)
    for parameter_name, parameter in learner.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 4000, (2, 16), generator=torch.Generator().manual_seed(1))
    learner.train()
    learner.zero_gradients()
    loss = learner.micro_step(0, torch.arange(2), {"input_ids": ids, "labels": ids})
    found = [parameter.grad.clone() for parameter in learner.parameters]
    learner.zero_gradients()
    learner.model.eval()  # transformers' own switch: no dropout anywhere, no noise, no skipped layer
    logits = learner.model(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    for ours, parameter in zip(found, learner.parameters, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))
        assert parameter.grad.any()


def test_the_adapters_dropout_acts_and_modes_come_back(folders):
    flags = {"model.name": str(folders("llama")), "quantization.compute_dtype": "float32", "lora.dropout": 0.5}
    config = schema.load_config([], flags | {"data.max_length": 16})
    model, _ = load_base(config, torch.device("cpu"))
    learner = train_qlora.build_learner(config, model, unplanned(config, 2, 2), lambda line: None)
    assert isinstance(learner.model, PeftModel)
    base = learner.model.get_base_model()
    train_adapters(learner.model)  # of a fresh model, as in a run without an evaluation before its first step
    assert all(layer.training for layer in decoder_layers(base)), "else layers are neither checkpointed nor compiled"
    assert not base.model.training and not base.model.layers[0].mlp.training
    before = [module.training for module in learner.model.modules()]
    with modes_kept(learner.model):
        learner.model.eval()
    assert [module.training for module in learner.model.modules()] == before
    dropping = [m for name, m in learner.model.named_modules() if "lora_dropout.default" in name]
    assert dropping and all(module.training for module in dropping)


def test_a_base_without_randomness_is_not_spoken_of():
    assert (
        own_dropout_line(
            transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, **SIZES, num_key_value_heads=4))
        )
        == []
    )
