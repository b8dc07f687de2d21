"""The optimizers by the names that training.optim has for them."""

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from config import TrainingConfig


@functools.cache
def without_waits(kind: type) -> type:
    """Return a bitsandbytes optimizer that waits for the GPU once a step, not after each of 504 tensors."""

    class Optimizer(kind):
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
                torch.cuda.synchronize()  # paged states are managed memory, which the CPU must not touch before

    Optimizer.__name__ = kind.__name__
    return Optimizer


def create_optimizer(
    parameters: list[nn.Parameter], training: TrainingConfig, device: torch.device, say: Callable[[str], None]
) -> Any:
    """Return AdamW over the adapter; without a GPU to page from, a paged one takes its plain form, with a line."""
    name = training.optim
    if name.startswith("paged") and device.type != "cuda":
        say(f"training.optim: {name} needs a GPU to page from; its states stay in memory here")
        name = name.removeprefix("paged_")
    kinds = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "adamw_32bit": bnb.optim.AdamW32bit,
    }
    kind = torch.optim.AdamW if name == "adamw_torch" else without_waits(kinds[name])
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
