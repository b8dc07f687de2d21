"""The optimizers that training.optim can name, and the memory that their states need."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from config import TrainingConfig
from fast_path.adapter_memory import BLOCK, SMALL, AdapterMemory

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


# Bitsandbytes' names of what a tensor's state holds per weight or per block.
VIEWS = {"state1", "state2", "absmax1", "absmax2"}


class OneUpdate(bnb.optim.optimizer.Optimizer2State):
    """Makes an optimizer of bitsandbytes launch one update for all tensors of an AdapterMemory.

    Its own class launches one per tensor, and waits for the GPU after each. The state of a tensor is a view of the state
    of the whole; in a state_dict it is a tensor of its own, as bitsandbytes has it.
    """

    initialized: bool
    state: Any
    memory: AdapterMemory | None = None
    wholes: dict[nn.Parameter, list[nn.Parameter]] | None = None  # a part of the memory: its tensors

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        if not self.initialized:
            self.check_overrides()
            self.initialized = True
        merged = self.memory.places if self.memory is not None else {}
        for whole in self._wholes():
            self._update(self.param_groups[0], whole, 0, 0)
        for number, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                if parameter not in merged:
                    if len(self.state[parameter]) == 0:
                        self.init_state(group, parameter, number, i)
                    self._update(group, parameter, number, i)
        if self.is_paged and torch.cuda.is_available():
            torch.cuda.synchronize()  # the CPU must not touch paged states (managed memory) earlier

    def _update(self, group: dict, parameter: nn.Parameter, number: int, i: int) -> None:
        self.prefetch_state(parameter)
        self.update_step(group, parameter, number, i)

    def _wholes(self) -> dict[nn.Parameter, list[nn.Parameter]]:
        if self.memory is not None and not self.memory.is_in_place():
            raise RuntimeError("the adapter's tensors or gradients were replaced: change them in place, by copy_")
        if self.wholes is None:
            parts = self.memory.parts if self.memory is not None else []
            self.wholes = {self._joined(tensors, place): tensors for tensors, place in parts}
        return self.wholes

    def _joined(self, tensors: list[nn.Parameter], place: slice) -> nn.Parameter:
        """Return a part of the memory as a parameter, with a state that holds those of its tensors, if they have any."""
        whole = nn.Parameter(self.memory.weights[place])
        whole.grad = self.memory.gradients[place]
        if tensors[0].numel() < SMALL:  # bitsandbytes decides by the size, here that of the whole
            buffers = {name: self.get_state_buffer(whole, dtype=torch.float32) for name in ("state1", "state2")}
            self.state[whole] = {"step": 0} | buffers
        else:
            self.init_state(self.param_groups[0], whole, 0, 0)
        state = self.state[whole]
        for parameter in tensors:
            start, size = self.memory.places[parameter] - place.start, parameter.numel()
            own = dict(state)
            for name in VIEWS & state.keys():
                per = BLOCK if name.startswith("absmax") else 1
                shape = parameter.shape if per == 1 else (-1,)
                own[name] = state[name].view(-1)[start // per : (start + size + per - 1) // per].view(shape)
                if loaded := self.state[parameter]:
                    own[name].copy_(loaded[name])
                    state["step"] = own["step"] = loaded["step"]
            self.state[parameter] = own
        return whole

    def state_dict(self) -> dict:
        kept = self.state
        for whole, tensors in (self.wholes or {}).items():
            for parameter in tensors:
                kept[parameter]["step"] = kept[whole]["step"]
        tensors = [parameter for group in self.param_groups for parameter in group["params"] if parameter in kept]
        self.state = {p: {k: v.clone() if k in VIEWS else v for k, v in kept[p].items()} for p in tensors}
        try:
            return super().state_dict()
        finally:
            self.state = kept

    def load_state_dict(self, state_dict: dict, move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device)
        self.wholes = None  # their states are made of the loaded ones at the next step


@functools.cache
def quick(kind: type) -> type:
    """Return a subclass of a bitsandbytes optimizer with `OneUpdate`."""
    return type(kind.__name__, (OneUpdate, kind), {})


def create_optimizer(
    parameters: list[nn.Parameter], training: TrainingConfig, device: torch.device, say: Callable[[str], None],
    memory: AdapterMemory | None = None,
) -> Any:  # fmt: skip
    """Return AdamW over the adapter's parameters.

    memory: where their weights and gradients lie in one piece. Without a GPU, a paged optimizer keeps its states in main
    memory, and a message says so.
    """
    choice = OPTIMIZERS[training.optim]
    kind = choice.kind
    if choice.unpaged is not None and device.type != "cuda":
        say(f"training.optim: {training.optim} needs a GPU to page from; here its states stay in main memory")
        kind = choice.unpaged
    if issubclass(kind, bnb.optim.optimizer.Optimizer8bit):  # the base class of all optimizers of bitsandbytes
        kind = quick(kind)
    optimizer = kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer.memory = memory
    return optimizer


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
