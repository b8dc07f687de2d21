"""An update of the whole adapter's memory gives the bits of bitsandbytes' own updates, one tensor after the other."""

import copy

import bitsandbytes as bnb
import pytest
import torch

from fast_path import optimizers
from fast_path.adapter_memory import AdapterMemory

# In weights: no multiple of a block of 256, fewer than the 4,096 below which states have 32 bits, exactly as many, large.
SHAPES = [(70, 61), (5, 7), (4096,), (300, 512), (1,), (64, 64), (10, 450)]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
KINDS = [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, bnb.optim.PagedAdamW8bit]


def parameters_of(device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def made(kind: type, parameters: list, memory: AdapterMemory | None = None):
    optimizer = kind(parameters, lr=1e-2, weight_decay=0.1)
    optimizer.memory = memory
    return optimizer


def learn(optimizer, parameters: list, memory: AdapterMemory | None, steps: range) -> None:
    for step in steps:
        if memory is not None:
            memory.zero_gradients()
        for parameter in parameters:
            gradient = torch.sin(parameter.detach() * (step + 1)) * (step != 2)  # one step of zeros
            if memory is not None:
                parameter.grad.add_(gradient)  # as a captured graph does
            else:
                parameter.grad = gradient
        optimizer.step()


def assert_same(mine: list, theirs: list, states: tuple[dict, dict]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert states[0].keys() == states[1].keys() == set(range(len(SHAPES)))
    for number, state in states[0].items():
        other = optimizers_own(states[1][number])
        state = optimizers_own(state)
        assert state.keys() == other.keys()
        for name, value in state.items():
            same = (
                torch.equal(value.cpu(), other[name].cpu()) if isinstance(value, torch.Tensor) else value == other[name]
            )
            assert same, (number, name)


def optimizers_own(state: dict) -> dict:
    """Return a state without the mapping that newer bitsandbytes puts around quantised ones."""
    inner = next((value for key, value in state.items() if isinstance(value, dict)), {})
    return {key: value for key, value in state.items() if not isinstance(value, dict)} | inner


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_those_of_bitsandbytes(kind, device):
    """Also after a state_dict was saved by one of them and loaded by the other, in both directions."""
    theirs, mine = parameters_of(device), parameters_of(device)
    memory = AdapterMemory(mine)
    reference, quick = made(kind, theirs), made(optimizers.quick(kind), mine, memory)
    learn(reference, theirs, None, range(4))
    learn(quick, mine, memory, range(4))
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (quick, reference)]
    assert_same(mine, theirs, tuple(state["state"] for state in states))
    plain, again = made(kind, theirs), made(optimizers.quick(kind), mine, memory)
    plain.load_state_dict(states[0])
    again.load_state_dict(states[1])
    learn(plain, theirs, None, range(4, 7))
    learn(again, mine, memory, range(4, 7))
    assert_same(mine, theirs, tuple(optimizer.state_dict()["state"] for optimizer in (again, plain)))


def test_a_whole_adapter_is_two_updates(monkeypatch):
    """One for the large tensors and one for those with states in 32 bits."""
    parameters = parameters_of("cpu")
    memory = AdapterMemory(parameters)
    optimizer, updates = made(optimizers.quick(bnb.optim.AdamW8bit), parameters, memory), []
    update = optimizer.update_step
    monkeypatch.setattr(optimizer, "update_step", lambda *args: (updates.append(args[1].numel()), update(*args)))
    learn(optimizer, parameters, memory, range(2))
    assert len(updates) == 4 and sum(updates[:2]) == memory.weights.numel()


def test_clipping_is_torchs_over_all_tensors():
    parameters, others = parameters_of("cpu"), parameters_of("cpu")
    parameters.append(torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))  # another dtype stays by itself
    others.append(torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    memory = AdapterMemory(parameters)
    memory.zero_gradients()
    for mine, other in zip(parameters, others, strict=True):
        other.grad = torch.cos(other.detach())
        mine.grad.copy_(other.grad)
    norm, expected = memory.clip(0.5), torch.nn.utils.clip_grad_norm_(others, 0.5)
    torch.testing.assert_close(norm.double(), expected.double(), rtol=1e-6, atol=0)
    for mine, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_tensors_that_were_replaced_are_noticed():
    parameters = parameters_of("cpu")
    memory = AdapterMemory(parameters)
    optimizer = made(optimizers.quick(bnb.optim.AdamW8bit), parameters, memory)
    learn(optimizer, parameters, memory, range(1))
    parameters[3].data = parameters[3].data.clone()
    with pytest.raises(RuntimeError, match="change them in place"):
        optimizer.step()
