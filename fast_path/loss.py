"""The objective that a run minimises: the summed cross entropy of its sequences.

With a frozen head, the logits of a whole batch never exist at once.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from config import ConfigError
from fast_path import families, training_kernels
from fast_path.dropout import modes_kept
from fast_path.head import head_gradient, head_product, padded
from fast_path.nf4 import Launch, multiprocessors
from fast_path.scratch import take
from fast_path.token_rows import TokenRows, trained_rows

IGNORED = -100  # the label of a position that is not supervised; PyTorch's default ignore_index
CROSS_ENTROPY = Launch(block_m=1, block_k=16384, warps=32)

# ------------------------------------------------------------------------------------------------ the objective


class Objective(Protocol):
    """The quantity that a run minimises: for each sequence, the sum of its losses and the weight of that sum.

    Sums and weights are added up over micro-batches and processes and divided once, by `mean`. So an update and an
    evaluation do not depend on how the sequences were divided among micro-batches and processes.
    """

    dtype: torch.dtype  # the dtype in which the model computes

    def __call__(self, *columns: Any, **batch: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of a batch on the model's device: a scalar, fp32, with its gradient."""

    def sequence_sums(self, *columns: Any, **batch: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of each sequence of a batch, fp32 [batch], without gradients."""

    @staticmethod
    def weights(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight of each sequence's sum, such as the number of its supervised tokens, int64 [batch].

        The batch is still in main memory.
        """

    @staticmethod
    def mean(loss_sum: Any, weight: Any) -> Any:
        """Return loss_sum / weight, both numbers or tensors of one element; if the weight is 0, return loss_sum.

        With a loss_sum of 1 the result is the factor by which the gradients of the sum are multiplied.
        """
        return loss_sum / (weight.clamp_min(1) if isinstance(weight, torch.Tensor) else max(weight, 1))


# ------------------------------------------------------------------------------------------------ cross entropy


def default_logit_chunk(vocabulary: int, free_bytes: int | None = None) -> int:
    """Return the number of positions whose logits exist at the same time.

    Without free_bytes: as many as fit into 256 MiB in fp32. With free_bytes: at most 1,024, since larger products are
    no faster, and fewer where the logits in 16 bits would need more than a fortieth of free_bytes.
    """
    if free_bytes is None:
        return max(16, 2**26 // vocabulary)
    return max(128, min(1024, free_bytes // (80 * vocabulary)) // 128 * 128)


class LogitForm(NamedTuple):
    """What a model does to its head's product z before the softmax: cap tanh(scale z / cap), or scale z if cap is 0."""

    scale: float = 1.0
    cap: float = 0.0

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Do so in place and return the tensor: a chunk of a large vocabulary takes a GiB."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits


AS_THEY_ARE = LogitForm()


def _chunk_loss(rows, weight, bias, targets, with_gradient: bool, form: LogitForm = AS_THEY_ARE, trained=None):
    """Return the loss of each position of a chunk, fp32, and the gradients of `rows` and of trained rows of the weight.

    rows: [logit_chunk, width]; targets: [logit_chunk]; trained: their numbers, or None. The second gradient is fp32
    [trained rows, width]; a gradient that is not asked for is None. A cap's gradient is scale (1 - tanh(scale z / cap)^2).
    """
    logits = form.apply_(F.linear(rows.to(weight.dtype), weight, bias).float())  # [logit_chunk, vocabulary]
    capped = form.cap and with_gradient
    slope = (logits / form.cap).square_().neg_().add_(1).mul_(form.scale) if capped else form.scale
    kept = (targets != IGNORED).float()[:, None]
    index = targets.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    losses = ((log_sum - logits.gather(1, index)) * kept)[:, 0]
    if not with_gradient:
        return losses, None, None
    one_hot = torch.arange(len(weight), device=weight.device)[None] == index
    logits.sub_(log_sum).exp_().sub_(one_hot.float()).mul_(kept)  # softmax - one-hot, over the logits
    if form != AS_THEY_ARE:
        logits.mul_(slope)
    gradient = logits.to(weight.dtype)
    return losses, (gradient @ weight).to(rows.dtype), _of_trained(gradient, rows, trained)


def _of_trained(gradient, rows, trained):
    """Return the gradient of the head's trained rows, fp32, from that of a chunk's logits."""
    return None if trained is None else gradient[:, trained].float().T @ rows.float()


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, logit_chunk, chunk_loss, form, values, numbers):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_values = None if values is None else torch.zeros_like(values)
        for start in range(0, len(hidden), logit_chunk):
            piece = slice(start, start + logit_chunk)
            asked = gradient is not None, form, numbers
            part, rows, own = chunk_loss(hidden[piece], weight, bias, labels[piece], *asked)
            loss += part.sum()
            if gradient is not None:
                gradient[piece] = rows
                if own is not None:
                    of_values += own
        ctx.save_for_backward(gradient, of_values)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        gradient, of_values = ctx.saved_tensors
        own = None if of_values is None else of_values * upstream
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None, None, own, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_chunk: int | None = None,
    chunk_loss: Callable = _chunk_loss,
    form: LogitForm = AS_THEY_ARE,
    trained: TokenRows | None = None,
) -> torch.Tensor:
    """Return the summed cross entropy, fp32, of `hidden @ weight.T + bias` against `labels`, chunk by chunk.

    The logits of all positions never exist at once. The gradient of `hidden` is already computed in the forward pass,
    chunk by chunk (the idea of Liger-Kernel's fused linear cross entropy). `weight` and `bias` get no gradient, so an
    adapter on the head needs another loss; only the rows in `trained`, whose values `weight` holds already, get one.
    hidden: [positions, width]; weight: [vocabulary, width], frozen; labels: [positions], IGNORED where unsupervised.
    logit_chunk: the number of positions whose logits exist at the same time; None: default_logit_chunk. chunk_loss:
    `_chunk_loss`, which may be compiled, or `kernel_chunk_loss`. form: what the model does to the product.
    """
    logit_chunk = logit_chunk or default_logit_chunk(len(weight))
    return _FrozenHeadCrossEntropy.apply(
        hidden, weight, bias, labels, logit_chunk, chunk_loss, form, *(trained or (None, None))
    )


@torch.no_grad()
def position_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_chunk: int | None = None,
    chunk_loss: Callable = _chunk_loss,
    form: LogitForm = AS_THEY_ARE,
    trained: TokenRows | None = None,
) -> torch.Tensor:
    """Return the cross entropy of each position, fp32 [positions], 0 where unsupervised, without gradients.

    The arguments are those of chunked_cross_entropy.
    """
    size = logit_chunk or default_logit_chunk(len(weight))
    pieces = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.cat([chunk_loss(rows, weight, bias, targets, False, form)[0] for rows, targets in pieces])


@functools.cache
def compiled_chunk_loss() -> Callable:
    """Return a version of `_chunk_loss` that is compiled at its first call.

    This is a function and not a constant because torch.compile imports Inductor, which would slow down the import of
    this file.
    """
    return torch.compile(_chunk_loss, dynamic=False)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, with_gradient: bool,
    form: LogitForm = AS_THEY_ARE,
) -> None:  # fmt: skip
    """Write each position's loss to `losses`, fp32 [rows], and, if asked, the gradient over the logits.

    logits: the head's product, [rows, vocabulary], whose rows may lie apart; targets: [rows].
    """
    programs = min(len(logits), multiprocessors(logits.device))
    training_kernels.cross_entropy_kernel[(programs,)](
        logits, targets, losses, *logits.shape, logits.stride(0), *form, GRADIENT=with_gradient, SCALED=form.scale != 1,
        CAPPED=form.cap > 0, BLOCK=CROSS_ENTROPY.block_k, num_warps=CROSS_ENTROPY.warps,
    )  # fmt: skip


def kernel_chunk_loss(rows, weight, bias, targets, with_gradient: bool, form: LogitForm = AS_THEY_ARE, trained=None):
    """Do the same as `_chunk_loss` with a Triton kernel that writes the gradient over the logits, in bf16 or fp16.

    The compiled `_chunk_loss` is slower and needs twice the memory.
    """
    logits = take(len(rows), padded(len(weight)), weight.dtype, weight.device)[:, : len(weight)]
    head_product(rows.to(weight.dtype), weight, bias, logits)
    losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    cross_entropy(logits, targets, losses, with_gradient, form)
    if not with_gradient:
        return losses, None, None
    return losses, head_gradient(logits, weight).to(rows.dtype), _of_trained(logits, rows, trained)


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each position's next token, [batch, length]; the last position has none (IGNORED)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


# ------------------------------------------------------------------------------------------------ the next token


def perplexity(mean_loss: float) -> float:
    """Return exp(mean_loss), limited to a finite number, since JSON has no infinity."""
    return math.exp(min(mean_loss, 700.0))


# What a test puts in the place of a head's product: a number so small that its tanh is itself, one so large that its tanh
# is 1 under any cap, and some between, of both signs.
RAMP = torch.tensor([2.0**-20, 2.0**20, *(sign * 2.0**k for sign in (1, -1) for k in range(-3, 9)), 0.0])


@contextlib.contextmanager
def reading(model: nn.Module, what: str) -> Iterator[None]:
    """Raise ConfigError for what a model's own code raises when it reads tokens; what: the tokens, for the error.

    What says that memory is exhausted stays as it is.
    """
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"model.name: {type(model).__name__} cannot read {what}: {text}") from None


@torch.no_grad()
def logit_form(base: PreTrainedModel) -> LogitForm | None:
    """Return what a model does to its head's product, by a test on eight tokens; None if it is no LogitForm.

    In the test the head returns the same numbers for every token, RAMP, and the model what it makes of them. So no name of
    a setting is needed, and the numbers are large enough for a cap to be felt. Raises ConfigError if the test fails.
    """
    decoder, head = families.decoder_of(base), base.get_output_embeddings()
    probe, reads = torch.arange(1, 9, device=base.device)[None], []

    def stand_in(module, inputs, product):
        ramp = RAMP.to(base.device).repeat(-(-product.shape[-1] // len(RAMP)))[: product.shape[-1]]
        reads.append((inputs[0], ramp))
        return ramp.expand(product.shape)

    handle = head.register_forward_hook(stand_in)
    try:
        with modes_kept(base), reading(base, "eight tokens"):
            base.eval()
            logits = base(input_ids=probe, use_cache=False).logits
            hidden = decoder(input_ids=probe, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    if len(reads) != 1:
        return None
    ((read, ramp),) = reads
    if not (torch.equal(read, hidden) and logits.shape[-1] == len(ramp)):
        return None
    found, largest = logits.float(), float(RAMP[1])
    scale, cap = found[0, 0, 0].item() / float(RAMP[0]), found[0, 0, 1].item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # a cap's own rounding
    form = LogitForm(scale, cap if abs(cap) < abs(scale) * largest / 2 else 0.0)
    right = scale > 0 and torch.allclose(form.apply_(ramp.clone()).expand_as(found), found, rtol=1e-5, atol=0)
    return form if right else None


class CausalLMLoss(Objective):
    """Next-token prediction: a batch's cross entropy, summed in fp32; its weight is the number of supervised tokens.

    The decoder runs first, then the frozen head, chunk by chunk, with the model's own scale and soft cap (LogitForm).
    Where the head has an adapter, or the model does something else to its logits, it computes all of them itself.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, dtype: torch.dtype):
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device, self.dtype = next(model.parameters()).device, dtype
        self.decoder, self.head = families.decoder_of(self.base), self.base.get_output_embeddings()
        self.logit_chunk: int | None = None  # these two are arguments of chunked_cross_entropy
        self.chunk_loss: Callable = _chunk_loss
        head = self.head.token_adapter.base_layer if self._shares_rows() else self.head
        known = type(head) is nn.Linear and not head.weight.requires_grad
        with self.autocast():
            self.form = logit_form(self.base) if known else None
        self.chunked = self.form is not None

    @staticmethod
    def weights(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of supervised tokens of each sequence, int64 [batch].

        The first token of a sequence does not count: there is no token before it that could predict it.
        """
        return (batch["labels"][:, 1:] != IGNORED).sum(1)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def _shares_rows(self) -> bool:
        """Return whether the head shares the embedding's trained rows (lora.train_tokens with a tied head)."""
        return isinstance(self.head, TrainableTokensWrapper)

    def _head_weight(self) -> tuple[torch.Tensor, TokenRows | None]:
        """Return the head's weight with the values of its trained rows, without a gradient, and these rows."""
        if not self._shares_rows():
            return self.head.weight, None
        layer = self.head.token_adapter
        weight, rows = layer.base_layer.weight, trained_rows(layer)
        if rows is None:
            return weight, None
        return weight.index_copy(0, rows.numbers, rows.values.detach().to(weight.dtype)), rows

    def _of_positions(self, chunked: Callable, reduction: str, input_ids, labels, packed) -> torch.Tensor:
        """Return the losses of a batch by `chunked`, or by torch with this reduction where all logits are computed."""
        targets = shift_labels(labels).flatten()
        with self.autocast():
            if self.chunked:
                hidden = self.decoder(input_ids=input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)
                weight, rows = self._head_weight()
                bias = None if self._shares_rows() else self.head.bias
                return chunked(hidden, weight, targets, bias, self.logit_chunk, self.chunk_loss, self.form, rows)
            logits = self.base(input_ids=input_ids, use_cache=False, **packed).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction=reduction)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, **packed: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of a batch.

        input_ids, labels: [batch, length] on the model's device; labels are not shifted, and IGNORED where
        unsupervised. packed: the position_ids of packed samples. They start at 0 again for each sample, so that
        attention stays within a sample.
        """
        return self._of_positions(chunked_cross_entropy, "sum", input_ids, labels, packed)

    @torch.no_grad()
    def sequence_sums(self, input_ids: torch.Tensor, labels: torch.Tensor, **packed: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of each sequence of a batch, fp32 [batch], without gradients; arguments as above."""
        losses = self._of_positions(position_losses, "none", input_ids, labels, packed)
        return losses.view(input_ids.shape).sum(1)
