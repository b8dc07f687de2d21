"""One micro-batch forward and backward: plain, captured as one CUDA graph, or with its inputs in main memory."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from fast_path import choice, dropout
from fast_path.loss import SummedLoss

# ------------------------------------------------------------------------------------------------ memory


def let_go() -> None:
    """Free what nothing refers to any more, for the driver to hand out anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def inputs_in_main_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Have what is saved for a backward in this shape, the inputs of checkpointed layers, wait for it in main memory.

    torch's save_on_cpu would move whatever is saved, packed weights too.
    The copies ride on the stream of the computation: 33 MB a layer of a 3B at 8,192 tokens, about 2 ms where the layer
    takes 12, and nothing has to be waited for. No graph can hold them.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if tensor.shape != shape:
            return tensor.detach()  # not itself: an output saved by its own node would keep both alive
        kept = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor.detach(), non_blocking=True), tensor.device

    def unpack(packed: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# ------------------------------------------------------------------------------------------------ captured micro-step


def padding(name: str, length: int, device: torch.device) -> torch.Tensor:
    """Return what an argument of a captured step holds where no block is, int64 [length]: unlabelled, of two samples.

    Of two, since transformers makes no mask for a row of one while it can look: the warm-up would run other layers.
    """
    if name == "position_ids":
        return (torch.arange(length, device=device) - 1).clamp_min(0)
    return torch.full((length,), -100 if name == "labels" else 0, device=device)


class GradientSums:
    """Adds the gradients of a backward to the parameters', dozens in one launch.

    Autograd launches an addition for each of the 504 matrices of a 3B's adapters, of 2 us, 2 us apart (H100).
    """

    TOGETHER = 64  # at rank 16 they take 15 MB while they wait

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter in self._sums:
            self._waiting.append((self._sums[parameter], parameter.grad))
            parameter.grad = None
        if len(self._waiting) == self.TOGETHER:
            self._add()

    def _add(self) -> None:
        if self._waiting:
            torch._foreach_add_(*zip(*self._waiting, strict=True))
        self._waiting = []

    @contextlib.contextmanager
    def of_backward(self) -> Iterator[None]:
        """Have a backward within add to the gradients that exist; one that fails leaves them half added."""
        self._sums = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self._sums:
            parameter.grad = None  # else autograd would add to it
        try:
            yield
            self._add()
        finally:
            for parameter, total in self._sums.items():
                parameter.grad = total
            self._sums, self._waiting = {}, []


class Captured:
    """A function of a batch as one CUDA graph: what is launched thousands of times a micro-step is launched once.

    step(input_ids=, labels=, ...) -> a scalar, free of host synchronisation; names: its arguments, each int64
    [batch, length]. Gradients accumulate in place in the parameters' .grad, which must exist and hold rubbish after
    warm-up and capture. What else the step reads (the dropout clock, the weights) is read anew at every replay.
    """

    def __init__(
        self, step: Callable[..., torch.Tensor], device: torch.device, batch: int, length: int, names: Iterable[str]
    ):
        self.step = step
        self.padding = {name: padding(name, length, device) for name in names}
        self.batch = {name: row.repeat(batch, 1) for name, row in self.padding.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets every library allocate its workspace outside of the graph
                step(**self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # blocks belong to a stream: the next warm-up could not use what this one reserved

    def capture(self, pool: Any) -> None:
        """Capture the step; graphs that never run at the same time may share a pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = self.step(**self.batch)

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Replay on a batch of up to the captured shape; the rest is padding. The next replay overwrites the result."""
        for name, tensor in batch.items():
            rows, length = tensor.shape
            if tensor.shape != self.batch[name].shape:
                self.batch[name].copy_(self.padding[name])
            self.batch[name][:rows, :length].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result


# ------------------------------------------------------------------------------------------------ the learner


@dataclasses.dataclass
class Learner:
    """The model with its adapter, and how a micro-batch runs forward and backward through it."""

    model: PeftModel
    parameters: list[nn.Parameter]  # those of the adapter
    loss: SummedLoss
    clock: dropout.DropoutClock
    scaler: torch.amp.GradScaler
    fast: choice.FastPath
    shape: tuple[int, int]  # a full micro-batch: (sequences, tokens)
    offload: bool = False  # the inputs of checkpointed layers wait in main memory
    captured: Captured | None = None
    captured_evaluation: Captured | None = None

    def __post_init__(self):
        self.sums = GradientSums(self.parameters)

    def forward_backward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a batch's summed loss to the parameters', return the loss; no host synchronisation."""
        hidden = (*batch["input_ids"].shape, self.model.config.hidden_size)
        with inputs_in_main_memory(hidden) if self.offload else contextlib.nullcontext():
            loss = self.loss(**batch)
        with self.sums.of_backward():
            self.scaler.scale(loss).backward()
        return loss.detach()

    @torch.no_grad()
    def _loss_alone(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(**batch)

    @torch.enable_grad()
    def _capture(self, names: Iterable[str]) -> None:
        """Capture the micro-step and the evaluation's; gradients must not matter, they are zero afterwards.

        Both warm-ups come first: what they took is given back before the graphs, which share one pool, take theirs.
        """
        self.zero_gradients()  # made where they are not there yet
        mode, pool = self.loss.base.training, torch.cuda.graph_pool_handle()
        self.clock.set(0, torch.arange(self.shape[0]))
        graphs = []
        try:
            for training, step in ((True, self.forward_backward), (False, self._loss_alone)):
                self.model.train(training)
                graphs.append(Captured(step, self.clock.step.device, *self.shape, names))
            for training, graph in zip((True, False), graphs, strict=True):
                self.model.train(training)
                graph.capture(pool)
        finally:  # an evaluation that ran out of memory here goes on without a graph, and must not do so with dropout
            self.model.train(mode)
        self.captured, self.captured_evaluation = graphs
        self.zero_gradients()

    def micro_step(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one micro-batch: as the captured graph where there is one, with the same numbers either way."""
        if self.fast.cuda_graphs and self.captured is None:  # at a window's first: nothing is accumulated yet
            self._capture(batch)
        if self.captured is not None:
            sequences = F.pad(sequences, (0, self.shape[0] - len(sequences)))
        self.clock.set(step, sequences)
        return (self.captured or self.forward_backward)(**batch)

    def evaluation_loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return a batch's summed loss, captured too; the model must be in eval mode."""
        if self.fast.cuda_graphs and self.captured is None:
            self._capture(batch)
        return (self.captured_evaluation or self._loss_alone)(**batch)

    def reshape(self, micro_batch: int, checkpointed: int, offload: bool) -> None:
        """Take this micro-batch and number of checkpointed layers from here on, and let go of the graphs' memory."""
        self.captured = self.captured_evaluation = None
        self.shape, self.offload = (micro_batch, self.shape[1]), offload
        # No graph can hold copies to main memory.
        self.fast = dataclasses.replace(self.fast, cuda_graphs=self.fast.cuda_graphs and not offload)
        for number, layer in enumerate(self.loss.decoder.layers):
            setattr(layer, "recompute" if self.fast.compile else "gradient_checkpointing", number < checkpointed)
        let_go()

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in place: a captured graph adds to this memory."""
        if self.parameters[0].grad is None:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([p.grad for p in self.parameters])
