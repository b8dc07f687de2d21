"""One micro-batch forward and backward: plain, captured as one CUDA graph, or with its inputs in main memory."""

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from fast_path import choice, dropout
from fast_path.loss import IGNORED, Objective

# ------------------------------------------------------------------------------------------------ memory


def let_go() -> None:
    """Give memory that nothing refers to any more back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def inputs_in_main_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Keep in main memory what a backward pass needs in this shape: the inputs of checkpointed layers.

    torch's save_on_cpu would move everything that is saved, packed weights too. The copies run on the stream of the
    computation, where they are short beside the layer itself, so nothing has to wait for them. A CUDA graph cannot
    contain them.
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
    """Return what an argument of a captured step holds in rows without a block, int64 [length].

    Its labels are IGNORED, and its positions are those of two samples. For a row of one sample transformers makes no
    mask as long as it can look at the data, so that the warm-up would run other code than the capture.
    """
    if name == "position_ids":
        return (torch.arange(length, device=device) - 1).clamp_min(0)
    return torch.full((length,), IGNORED if name == "labels" else 0, device=device)


class GradientSums:
    """Adds the gradients of a backward pass to those of the parameters, dozens in one launch.

    Autograd launches one addition for each adapter matrix (504 in a 3B), and each takes longer to launch than to run.
    """

    TOGETHER = 64  # at rank 16 they need 15 MB while they wait

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
        """Let a backward pass add to the gradients that exist. One that fails leaves them half added."""
        self._sums = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self._sums:
            parameter.grad = None  # otherwise autograd would add to it
        try:
            yield
            self._add()
        finally:
            for parameter, total in self._sums.items():
                parameter.grad = total
            self._sums, self._waiting = {}, []


class Captured:
    """A function of a batch as one CUDA graph: one launch per micro-batch instead of thousands.

    step(input_ids=, labels=, ...) -> a scalar, without host synchronisation. names: its arguments, each int64
    [batch, length]. Gradients accumulate in the memory of the parameters' .grad, which must exist before the capture;
    warm-up and capture spoil the values in it. Whatever else the step reads (the dropout clock, the weights) is read again
    at every replay.
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
            for _ in range(2):  # compile, and let every library allocate its workspace outside of the graph
                step(**self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # blocks belong to a stream: the next warm-up could not use what this one reserved

    def capture(self, pool: Any) -> None:
        """Capture the step; graphs that never run at the same time may share a pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = self.step(**self.batch)

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Replay for a batch of at most the captured shape and return the loss, which the next replay overwrites."""
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
    """The model with its adapter, and how one micro-batch runs forward and backward through it."""

    model: PeftModel
    parameters: list[nn.Parameter]  # those of the adapter
    objective: Objective
    clock: dropout.DropoutClock
    scaler: torch.amp.GradScaler
    fast: choice.FastPath
    batch_shape: tuple[int, int]  # of a full micro-batch: (sequences, tokens per sequence)
    offload: bool = False  # whether the inputs of checkpointed layers wait for the backward pass in main memory
    captured: Captured | None = None
    captured_evaluation: Captured | None = None

    def __post_init__(self):
        self.sums = GradientSums(self.parameters)

    def micro_step(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradients of a batch's summed loss to the parameters' .grad and return that loss.

        step, sequences: the optimizer step and the numbers of the sequences in it, which the dropout masks depend on.
        Where CUDA graphs run, a graph of the same computation is replayed; the numbers are the same.
        """
        if self.fast.cuda_graphs:
            return self._replay(step, sequences, batch)
        self.clock.set(step, sequences)
        hidden_shape = (*batch["input_ids"].shape, self.model.config.hidden_size)
        with inputs_in_main_memory(hidden_shape) if self.offload else contextlib.nullcontext():
            loss = self.objective(**batch)
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to the parameters' .grad, without host synchronisation."""
        with self.sums.of_backward():
            self.scaler.scale(loss).backward()

    @torch.no_grad()
    def evaluation_loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return a batch's summed loss, from a captured graph where there is one; the model must be in eval mode."""
        if self.fast.cuda_graphs and self.captured is None:
            self._capture(batch)
        return (self.captured_evaluation or self.objective)(**batch)

    # What follows is for CUDA graphs, and for changing the shape of a micro-batch when memory runs out.

    def _replay(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Do what micro_step does as one CUDA graph, which is captured at the first call."""
        if self.captured is None:  # at an optimizer step's first micro-batch: nothing has been accumulated yet
            self._capture(batch)
        self.clock.set(step, F.pad(sequences, (0, self.batch_shape[0] - len(sequences))))
        return self.captured(**batch)

    def _forward_backward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Do what is captured of a micro-step: all but the dropout clock, which is set before each replay."""
        loss = self.objective(**batch)
        self.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def _loss_alone(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.objective(**batch)

    @torch.enable_grad()
    def _capture(self, names: Iterable[str]) -> None:
        """Capture the micro-step and the evaluation's loss. Gradients are zero afterwards.

        Both warm-ups come first: the memory that they needed is given back before the graphs, which share one pool,
        reserve theirs.
        """
        self.zero_gradients()  # creates them where they do not exist yet
        mode, pool = self.model.get_base_model().training, torch.cuda.graph_pool_handle()
        self.clock.set(0, torch.arange(self.batch_shape[0]))
        graphs = []
        try:
            for training, step in ((True, self._forward_backward), (False, self._loss_alone)):
                self.model.train(training)
                graphs.append(Captured(step, self.clock.step.device, *self.batch_shape, names))
            for training, graph in zip((True, False), graphs, strict=True):
                self.model.train(training)
                graph.capture(pool)
        finally:
            # Also after running out of memory: the evaluation is then repeated without a graph, and must not run with
            # dropout.
            self.model.train(mode)
        self.captured, self.captured_evaluation = graphs
        self.zero_gradients()

    def reshape(self, micro_batch: int, checkpointed: int, offload: bool) -> None:
        """Change to this micro-batch and number of checkpointed layers, and free the memory of the graphs."""
        self.captured = self.captured_evaluation = None
        self.batch_shape, self.offload = (micro_batch, self.batch_shape[1]), offload
        # A graph cannot contain copies to main memory.
        self.fast = dataclasses.replace(self.fast, cuda_graphs=self.fast.cuda_graphs and not offload)
        layers = self.model.get_base_model().get_decoder().layers
        for number, layer in enumerate(layers):
            setattr(layer, "recompute" if self.fast.compile else "gradient_checkpointing", number < checkpointed)
        let_go()

    def zero_gradients(self) -> None:
        """Set all gradients to zero in their own memory, since a captured graph adds to that."""
        if self.parameters[0].grad is None:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([p.grad for p in self.parameters])


# ------------------------------------------------------------------------------------------------ the same bits


def be_deterministic() -> None:
    """Let torch use only algorithms that give the same bits each time, and raise where an operator has none.

    With warn_only FlashAttention's backward pass would stay as it is: it changes for an error, not for a warning.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # is read when the first product creates the handle of cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that was not written
    import torch._inductor.config as inductor  # takes seconds to import, for this setting alone

    inductor.deterministic = True  # no kernel is chosen by a stopwatch
