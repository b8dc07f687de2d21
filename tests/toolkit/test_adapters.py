"""An adapter's weights put back into a model by their names, against peft's own loading, which loses some."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from tests.families import small_model
from toolkit.adapters import load_adapter, put_weights
from toolkit.checkpoints import adapter_tensors

KINDS = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "tokens, tied": ("gemma", {"target_modules": "all-linear", "trainable_token_indices": [5, 9]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    "renamed": ("laguna", {"target_modules": "all-linear"}),
}


def drawn(family: str, lora: dict, seed: int):
    """Return a small model with an adapter of random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(small_model(family), LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_of_an_adapter_are_put_back(kind):
    one, other = drawn(*KINDS[kind], seed=1), drawn(*KINDS[kind], seed=2)
    put_weights(other, adapter_tensors(one))
    expected, found = trained(one), trained(other)
    assert expected.keys() == found.keys() and len(found) > 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_peft_alone_loses_some_of_an_adapter_whose_weights_it_renames(tmp_path, capsys):
    one, other = drawn(*KINDS["renamed"], seed=1), drawn(*KINDS["renamed"], seed=2)
    set_peft_model_state_dict(other, adapter_tensors(one))
    if all(torch.equal(a, b) for a, b in zip(trained(one).values(), trained(other).values(), strict=True)):
        pytest.skip("this peft loads them all: put_weights may go")
    one.save_pretrained(tmp_path)
    loaded = dict(load_adapter(small_model("laguna"), tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in trained(one).items())
    assert "peft alone loads a part of this adapter only" in capsys.readouterr().err
