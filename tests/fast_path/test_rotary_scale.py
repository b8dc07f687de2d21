"""Rotary embeddings whose scale follows the length of the text: one sequence must not change another."""

import dataclasses

import pytest
import torch

from config import ConfigError, DataConfig
from fast_path import attention
from fast_path.families import steady_positions
from tests.families import small_model

DATA = DataConfig(max_length=96)


def test_up_to_where_positions_rotate_alike():
    assert steady_positions(small_model("phi3_longrope").config) == 64
    assert steady_positions(small_model("phi3").config) is steady_positions(small_model("qwen2").config) is None
    config = small_model("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert steady_positions(config) == config.max_position_embeddings == 128


@torch.no_grad()
def test_a_short_last_block_is_computed_alike_alone_and_beside_a_full_one():
    ids = torch.randint(3, 4000, (2, 96), generator=torch.Generator().manual_seed(0))
    plain = small_model("phi3_longrope")
    full, alone, together = (
        plain(input_ids=ids).logits,
        plain(input_ids=ids[1:, :40]).logits,
        plain(input_ids=ids).logits,
    )
    assert not torch.allclose(alone[0], together[1, :40], atol=1e-2), "the fault is there in plain transformers"
    model = small_model("phi3_longrope")
    lines = attention.prepare_attention(model, DATA, [])
    assert lines == ["rotary scale: that of 96 tokens, for a shorter last block too"]
    torch.testing.assert_close(model(input_ids=ids[1:, :40]).logits[0], model(input_ids=ids).logits[1, :40])
    torch.testing.assert_close(model(input_ids=ids).logits, full)


@torch.no_grad()
def test_blocks_that_are_short_enough_stay_as_they_are():
    ids = torch.randint(3, 4000, (2, 64), generator=torch.Generator().manual_seed(0))
    plain, model = small_model("phi3_longrope"), small_model("phi3_longrope")
    assert attention.prepare_attention(model, dataclasses.replace(DATA, max_length=64, packing=False), []) == []
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("packing, samples", [(False, []), (True, [3, 2])])
def test_samples_of_different_lengths_are_refused_beyond_it(packing, samples):
    said = (
        "^data.max_length: expected at most 64, got 96: beyond 64 positions the rotary scale of Phi3ForCausalLM follows"
    )
    with pytest.raises(ConfigError, match=said):
        attention.prepare_attention(small_model("phi3_longrope"), dataclasses.replace(DATA, packing=packing), samples)
