"""The optimizers that training.optim can name, and the memory that their states need."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from config import TrainingConfig

# ------------------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class OptimizerChoice:
    """One row of the table: a form of AdamW. Its states are the two moments of each weight."""

    kind: type  # the class on a GPU
    state_bytes: int  # bytes per weight, of both moments together
    step_bytes: int = 0  # bytes per weight that exist only during a step
    unpaged: type | None = None  # of a paged optimizer: its class without a GPU, where there is nothing to page from

    @property
    def paged(self) -> bool:
        """Whether the states are managed memory, which moves to main memory when the GPU is full."""
        return self.unpaged is not None

    def saved_bytes(self, weights: int) -> int:
        """Return how many bytes one tensor's states take in a checkpoint.

        bitsandbytes keeps the states of a tensor with fewer than 4,096 weights in 32 bits. 8-bit states come with one
        scale per 256 weights.
        """
        if self.state_bytes == 8 or weights < 4096:
            return 8 * weights
        return self.state_bytes * weights + weights // 16


OPTIMIZERS = {
    "paged_adamw_8bit": OptimizerChoice(bnb.optim.PagedAdamW8bit, 2, unpaged=bnb.optim.AdamW8bit),
    "adamw_8bit": OptimizerChoice(bnb.optim.AdamW8bit, 2),
    "paged_adamw_32bit": OptimizerChoice(bnb.optim.PagedAdamW32bit, 8, unpaged=bnb.optim.AdamW32bit),
    "adamw_torch": OptimizerChoice(torch.optim.AdamW, 8, step_bytes=4),  # a step makes a copy as large as the weights
}

# ------------------------------------------------------------------------------------------------ making one


@functools.cache
def without_waits(kind: type) -> type:
    """Return a subclass of a bitsandbytes optimizer that waits for the GPU once per step.

    The class itself waits after each tensor of the adapter.
    """

    class Optimizer(kind):  # type: ignore[valid-type, misc]
        initialized: bool

        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if len(self.state[parameter]) == 0:
                        self.init_state(group, parameter, number, i)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, number, i)
            if self.is_paged and torch.cuda.is_available():
                torch.cuda.synchronize()  # the CPU must not touch paged states (managed memory) earlier

    Optimizer.__name__ = kind.__name__
    return Optimizer


def create_optimizer(
    parameters: list[nn.Parameter], training: TrainingConfig, device: torch.device, say: Callable[[str], None]
) -> Any:
    """Return AdamW over the adapter's parameters.

    Without a GPU, a paged optimizer keeps its states in main memory, and a message says so.
    """
    choice = OPTIMIZERS[training.optim]
    kind = choice.kind
    if choice.unpaged is not None and device.type != "cuda":
        say(f"training.optim: {training.optim} needs a GPU to page from; here its states stay in main memory")
        kind = choice.unpaged
    if issubclass(kind, bnb.optim.optimizer.Optimizer8bit):  # the base class of all optimizers of bitsandbytes
        kind = without_waits(kind)
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def state_after_a_step(optimizer: Any) -> dict[int, dict[str, Any]]:
    """Return what an optimizer keeps for each of its parameters, by number: a new state, of meta tensors.

    They have a shape and a dtype and no memory. The step and bitsandbytes' tables of 8-bit values are real.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    for group in groups:
        group["params"] = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
    twin = type(optimizer)(groups)
    if not isinstance(twin, bnb.optim.optimizer.Optimizer8bit):
        for parameter in (p for group in groups for p in group["params"]):
            parameter.grad = torch.empty_like(parameter)
        twin.step()
        return twin.state_dict()["state"]
    twin.is_paged, tables = False, dict(twin.name2qmap)  # the twin's own become meta tensors
    for number, group in enumerate(twin.param_groups):
        for i, parameter in enumerate(group["params"]):
            twin.init_state(group, parameter, number, i)
    states = [twin.state[parameter] for group in twin.param_groups for parameter in group["params"]]
    for state in states:
        if "qmap1" in state:
            state |= {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}
    return dict(enumerate(states))
