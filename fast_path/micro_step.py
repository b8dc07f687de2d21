"""The forward and backward pass of a micro-batch: plain, as a CUDA graph, or with layer inputs kept in main memory."""

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

from fast_path import choice, dropout, families
from fast_path.adapter_memory import AdapterMemory
from fast_path.compiled import recompute
from fast_path.expert_store import join_copies
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from fast_path.loss import IGNORED, Objective
from fast_path.swapping import join_swaps

# ------------------------------------------------------------------------------------------------ memory


def let_go() -> None:
    """Return the GPU memory that nothing refers to any more to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_workspaces() -> None:
    """Return the memory that cuBLAS holds for each stream that has used it; a stream that uses it again gets new memory.

    torch has no public name for it, and calls it where Inductor captures graphs. A stream's takes 8 MiB, on Hopper 32.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def inputs_in_main_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Keep saved tensors of this shape in main memory until the backward pass: the inputs of checkpointed layers.

    torch's save_on_cpu would move every saved tensor, including the packed weights. The copies run on the same stream
    as the computation, so nothing has to wait for them, and they are short compared with the layer itself. A CUDA graph
    cannot contain them.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if tensor.shape != shape:
            return tensor.detach()  # not itself: a node and the output it saves would keep both alive
        kept = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor.detach(), non_blocking=True), tensor.device

    def unpack(packed: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# ------------------------------------------------------------------------------------------------ captured micro-step


def padding(name: str, length: int, device: torch.device) -> torch.Tensor:
    """Return the values of a captured step's argument for sequences that the batch does not fill, int64 [length].

    Labels are IGNORED. Positions are those of two samples in one block: with a single sample, transformers leaves out
    the mask whenever it can look at the data. It can during the warm-up but not during the capture, so the two would
    run different code.
    """
    if name == "position_ids":
        return (torch.arange(length, device=device) - 1).clamp_min(0)
    return torch.full((length,), IGNORED if name == "labels" else 0, device=device)


class GradientSums:
    """Adds the gradients of a backward pass to the parameters' gradients, dozens of them per launch.

    Autograd would launch one addition per adapter matrix (504 in a 3B), and each takes longer to launch than to run.
    """

    TOGETHER = 64  # gradients per launch; at rank 16 they need 15 MB while they wait

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
        """Let a backward pass add to the existing gradients. If it fails, only some of them have been added."""
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

    step(input_ids=, labels=, ...) -> a tensor, without host synchronisation. names: the names of its arguments, each
    int64 [batch, length]. Gradients accumulate in the memory of the parameters' .grad. This memory must exist before the
    capture, and its values are wrong after warm-up and capture. All other tensors that the step reads (the dropout
    clock, the weights) are read again at every replay.
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
        forget_workspaces()  # and all else: memory blocks belong to one stream, and the next warm-up could not use these

    def capture(self, pool: Any) -> None:
        """Capture the step; graphs that never run at the same time may share a pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            try:
                self.result = self.step(**self.batch)
            except torch.OutOfMemoryError:
                join_swaps()  # or the end of the capture would raise an error of its own in the place of this one
                raise
            finally:
                join_copies()

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Replay the graph for a batch of at most the captured shape. The next replay overwrites the returned tensor."""
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
    """The model with its adapter; runs the forward and backward pass of a micro-batch."""

    model: PeftModel
    parameters: list[nn.Parameter]  # the adapter's
    objective: Objective
    clock: dropout.DropoutClock
    scaler: torch.amp.GradScaler
    fast: choice.FastPath
    batch_shape: tuple[int, int]  # of a full micro-batch: (sequences, tokens per sequence)
    offload: bool = False  # whether the inputs of checkpointed layers wait for the backward pass in main memory
    captured: Captured | None = None
    captured_evaluation: Captured | None = None

    def __post_init__(self):
        self.memory = AdapterMemory(self.parameters)
        self.sums = GradientSums(self.parameters)

    def micro_step(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradients of a batch's summed loss to the parameters' .grad and return that loss.

        step, sequences: the number of the optimizer step and the numbers of the sequences within it; the dropout masks
        depend on both. With CUDA graphs, a graph of the same computation is replayed, and the results are the same.
        """
        if self.fast.cuda_graphs:
            return self._replay(step, sequences, batch)
        self.clock.set(step, sequences)
        with contextlib.ExitStack() as offloading:
            if self.offload:
                hidden_shape = (*batch["input_ids"].shape, self.model.config.get_text_config().hidden_size)
                offloading.enter_context(inputs_in_main_memory(hidden_shape))
            loss = self.objective(**batch)
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to the parameters' .grad, without host synchronisation."""
        with self.sums.of_backward():
            self.scaler.scale(loss).backward()

    @torch.no_grad()
    def evaluation_sums(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of each sequence of a batch; the model must be in eval mode.

        Where a graph was captured, it is replayed: the sums of the sequences that the batch does not fill are 0.
        """
        if self.fast.cuda_graphs and self.captured is None:
            self._capture(batch)
        return (self.captured_evaluation or self.objective.sequence_sums)(**batch)

    # The methods below are for CUDA graphs, and for changing the shape of a micro-batch when memory runs out.

    def _replay(self, step: int, sequences: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Do the same as micro_step with one CUDA graph, which is captured at the first call."""
        if self.captured is None:  # the first micro-batch of an optimizer step: nothing has been accumulated yet
            self._capture(batch)
        self.clock.set(step, F.pad(sequences, (0, self.batch_shape[0] - len(sequences))))
        return self.captured(**batch)

    def train(self) -> None:
        """Put the model into the mode of a training step."""
        dropout.train_adapters(self.model)

    def eval(self) -> None:
        """Put the model into the mode of an evaluation."""
        self.model.eval()

    def _forward_backward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Run the captured part of a micro-step: everything but the dropout clock, which is set before each replay."""
        loss = self.objective(**batch)
        self.backward(loss)
        return loss.detach()

    @torch.enable_grad()
    def _capture(self, names: Iterable[str]) -> None:
        """Capture the micro-step and the evaluation's sums. Gradients are zero afterwards.

        Both warm-ups run before both captures, so the memory of the warm-ups is free again when the graphs reserve
        theirs. The graphs share one pool.
        """
        forget_workspaces()  # of products before the first step
        self.zero_gradients()  # creates them where they do not exist yet
        pool = torch.cuda.graph_pool_handle()
        self.clock.set(0, torch.arange(self.batch_shape[0]))
        graphs = []
        # The mode is restored also when memory runs out: the evaluation is then repeated without a graph, and would
        # otherwise run with dropout.
        with dropout.modes_kept(self.model):
            for mode, step in ((self.train, self._forward_backward), (self.eval, self.objective.sequence_sums)):
                mode()
                graphs.append(Captured(step, self.clock.step.device, *self.batch_shape, names))
            for mode, graph in zip((self.train, self.eval), graphs, strict=True):
                mode()
                graph.capture(pool)
        self.captured, self.captured_evaluation = graphs
        self.zero_gradients()

    def reshape(
        self, micro_batch: int, checkpointed: int, offload: bool, kept: Kept = NOTHING_KEPT, swapped: int = 0
    ) -> None:
        """Change to this micro-batch and number of checkpointed layers, and free the memory of the graphs.

        kept, swapped: as in `compiled.recompute`.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step that failed may have left copies of swapped layers on their way
        self.captured = self.captured_evaluation = None
        self.batch_shape, self.offload = (micro_batch, self.batch_shape[1]), offload
        # A graph cannot contain copies to main memory.
        self.fast = dataclasses.replace(self.fast, cuda_graphs=self.fast.cuda_graphs and not offload)
        layers = families.decoder_layers(self.model.get_base_model())
        if self.fast.compile:
            recompute(layers, checkpointed, kept, swapped)
        else:
            for number, layer in enumerate(layers):
                layer.gradient_checkpointing = number < checkpointed
        let_go()

    def zero_gradients(self) -> None:
        """Set all gradients to zero in place, since a captured graph adds to their memory."""
        self.memory.zero_gradients()


# ------------------------------------------------------------------------------------------------ the same bits


def be_deterministic() -> None:
    """Let torch use only algorithms that give the same bits each time, and raise where an operator has none.

    warn_only is not enough: FlashAttention's backward pass changes its algorithm only where an error is asked for.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when the first product creates its handle
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that was not written
    import torch._inductor.config as inductor  # takes seconds to import, for this setting alone

    inductor.deterministic = True  # no kernel is chosen by timing
