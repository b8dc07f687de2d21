"""The table of optimizers has the names of the schema, and its sizes are those of the optimizers' states."""

import dataclasses

import pytest
import torch

from config import LEAVES, TrainingConfig
from fast_path.optimizers import OPTIMIZERS, create_optimizer

CPU = torch.device("cpu")


def tensors_in(state) -> list[torch.Tensor]:
    """Return all tensors of a nested state_dict."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def stepped(name: str, sizes: list[int]) -> torch.optim.Optimizer:
    """Return an optimizer of this name after one step on a CPU, with parameters of these sizes."""
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = create_optimizer(parameters, dataclasses.replace(TrainingConfig(), optim=name), CPU, lambda line: None)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_the_schema_offers_what_the_table_has():
    assert LEAVES["training.optim"].field.metadata["choices"] == tuple(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [512, 4096, 2**20])
def test_saved_bytes_are_those_of_the_states_in_a_checkpoint(name, size):
    """Sizes are counted in a state_dict. In 8 bit it also has two tables of 256 numbers per tensor: the largest gap."""
    found = sum(tensor.nbytes for tensor in tensors_in(stepped(name, [size]).state_dict()["state"]))
    saved = OPTIMIZERS[name].saved_bytes(size)
    assert found <= saved + 2 * 1024 + 64 and saved <= 1.05 * found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_are_those_of_the_two_moments(name):
    """Those of a large tensor; the scales of 8-bit states and step numbers are less than a tenth of them."""
    states = stepped(name, [2**20]).state_dict()["state"]
    found = sum(tensor.nbytes for tensor in tensors_in(states))
    assert OPTIMIZERS[name].state_bytes * 2**20 <= found < 1.1 * OPTIMIZERS[name].state_bytes * 2**20


def test_paged_optimizers_are_bitsandbytes_paged_ones():
    """According to bitsandbytes' own attribute, not to their names in the table."""
    for choice in OPTIMIZERS.values():
        if choice.kind is not torch.optim.AdamW:
            optimizer = choice.kind([torch.nn.Parameter(torch.zeros(8))])
            assert optimizer.is_paged is choice.paged
            assert choice.unpaged is None or not choice.unpaged([torch.nn.Parameter(torch.zeros(8))]).is_paged


def test_without_a_gpu_a_paged_optimizer_says_that_it_is_not_paged():
    for name, choice in OPTIMIZERS.items():
        lines: list[str] = []
        training = dataclasses.replace(TrainingConfig(), optim=name)
        made = create_optimizer([torch.nn.Parameter(torch.zeros(8))], training, CPU, lines.append)
        assert isinstance(made, choice.unpaged or choice.kind)
        assert [line.split(" needs")[0] for line in lines] == ([f"training.optim: {name}"] if choice.paged else [])
