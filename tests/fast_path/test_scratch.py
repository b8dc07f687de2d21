"""Memory that unpacked weights and logits share: the same numbers as with memory of their own, and who keeps it."""

import gc
import weakref

import pytest
import torch

from fast_path import loss, packed_weights, scratch
from fast_path.dropout import DropoutClock, use_stateless_dropout
from fast_path.layers import fuse
from fast_path.loss import CausalLMLoss
from quantization_utils import (
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
)

CPU = torch.device("cpu")


def fused(folder, memory: bool, monkeypatch) -> tuple[list[torch.Tensor], torch.nn.Module]:
    """Return the loss and the gradients of two sequences, twice, and the model. memory: whether memory is shared."""
    with monkeypatch.context() as patch:
        if not memory:
            for module in (packed_weights, loss):
                patch.setattr(module, "take", lambda *shape, dtype=None: torch.empty(shape[:2], dtype=shape[2]))
        model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype="float32"), device="cpu")
        torch.manual_seed(0)
        model = prepare_model_for_training(model, create_lora_config(dropout=0.0), True)
        clock = DropoutClock(0, CPU)
        clock.set(0, torch.arange(2))
        use_stateless_dropout(model, 0.0, clock)
        fuse(model, clock, 0.0, kernels=False)
        objective, ids = CausalLMLoss(model.train(), torch.float32), torch.arange(48).view(2, 24) + 7
        found = []
        for _ in range(2):
            total = objective(ids, ids)
            total.backward()
            found += [total.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        return found, model


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_shared_memory_changes_no_number_and_goes_with_the_model(random_models, family, monkeypatch):
    monkeypatch.setattr(scratch, "_living", weakref.WeakValueDictionary())  # another test's model may live
    own, _ = fused(random_models(family), False, monkeypatch)
    gc.collect()
    shared, model = fused(random_models(family), True, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(own, shared, strict=True))
    held = scratch.scratch_of(CPU)
    (buffer,) = held.buffers.values()
    assert len(buffer) == held.elements == 2 * 512 * (256 + 64)  # gate and up beside their adapters' columns
    del model, held, buffer, _
    gc.collect()
    assert not scratch._living


def test_what_is_taken_is_the_same_memory_until_more_is_needed():
    held = scratch.Scratch()
    held.reserve(100)
    first = held.take(10, 10, torch.float32, CPU)
    assert held.take(5, 4, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert held.take(5, 4, torch.bfloat16, CPU).data_ptr() != first.data_ptr()
    assert held.take(11, 10, torch.float32, CPU).shape == (11, 10) and held.elements == 110
    assert held.take(12, 20, torch.float32, CPU).shape == (12, 20) and held.elements == 110  # of its own


def test_a_graphs_memory_stays_when_more_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device, real=torch.empty: real(size, dtype=dtype))
    held, gpu = scratch.Scratch(), torch.device("cuda", 0)
    held.reserve(4)
    first = held.take(2, 2, torch.float32, gpu)
    held.take(2, 2, torch.float32, gpu)
    held.take(3, 2, torch.float32, gpu)
    assert [len(buffer) for buffer in held.captured] == [4, 6]
    assert held.captured[0].data_ptr() == first.data_ptr()


def test_an_answer_first_does_not_keep_training_from_it():
    held = scratch.Scratch()
    held.reserve(4)
    with torch.inference_mode():
        held.take(2, 2, torch.float32, CPU)
    assert not held.take(2, 2, torch.float32, CPU).fill_(1).is_inference()
