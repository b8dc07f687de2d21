"""The summed cross entropy of a batch, of a frozen head without ever holding the logits whole."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fast_path import training_kernels
from fast_path.nf4 import Launch, multiprocessors

CROSS_ENTROPY = Launch(block_m=1, block_k=16384, warps=32)


def chunk_rows(vocabulary: int, free_bytes: int | None = None) -> int:
    """Return how many positions' logits to hold at once; None: 256 MiB of fp32.

    1,024 at most: of 8,192 positions in 16 chunks the two products took 14.5 ms, in 8 no less, in all 0.6 ms less (H100).
    Fewer where they would take a fortieth of free_bytes in 16 bits.
    """
    if free_bytes is None:
        return max(16, 2**26 // vocabulary)
    return max(128, min(1024, free_bytes // (80 * vocabulary)) // 128 * 128)


def _chunk_loss(rows, weight, bias, targets, with_gradient: bool):
    """Return one chunk's summed loss and the gradient of its rows. rows: [chunk, width]; targets: [chunk]."""
    logits = F.linear(rows.to(weight.dtype), weight, bias).float()  # [chunk, vocabulary]
    kept = (targets != -100).float()[:, None]
    index = targets.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    loss = ((log_sum - logits.gather(1, index)) * kept).sum()
    if not with_gradient:
        return loss, None
    one_hot = torch.arange(len(weight), device=weight.device)[None] == index
    logits.sub_(log_sum).exp_().sub_(one_hot.float()).mul_(kept)  # softmax - one-hot, in the logits' own memory
    return loss, (logits.to(weight.dtype) @ weight).to(rows.dtype)


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, chunk_loss):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            part, rows = chunk_loss(hidden[piece], weight, bias, labels[piece], gradient is not None)
            loss += part
            if gradient is not None:
                gradient[piece] = rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
    chunk_loss: Callable = _chunk_loss,
) -> torch.Tensor:
    """Return the summed cross entropy, fp32, of `hidden @ weight.T + bias` against `labels` without holding all logits.

    hidden: [positions, width]; weight: [vocabulary, width], frozen; labels: [positions], -100 where nothing is
    supervised. The gradient of `hidden` is finished in the forward, chunk by chunk (the idea of Liger-Kernel's fused
    linear cross entropy); `weight` and `bias` get none, so an adapter on the head needs another loss. chunk_loss:
    `_chunk_loss`, perhaps compiled, or `kernel_chunk_loss`.
    """
    return _FrozenHeadCrossEntropy.apply(hidden, weight, bias, labels, chunk or chunk_rows(len(weight)), chunk_loss)


@functools.cache
def compiled_chunk_loss() -> Callable:
    """Return `_chunk_loss` to be compiled at its first call. Not at import: torch.compile imports Inductor, for seconds."""
    return torch.compile(_chunk_loss, dynamic=False)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, with_gradient: bool) -> None:
    """Fill in the losses of rows of logits, fp32 [rows], and write the gradient over the logits [rows, vocabulary]."""
    programs = min(len(logits), multiprocessors(logits.device))
    training_kernels.cross_entropy_kernel[(programs,)](
        logits, targets, losses, len(logits), logits.shape[1], GRADIENT=with_gradient, BLOCK=CROSS_ENTROPY.block_k,
        num_warps=CROSS_ENTROPY.warps,
    )  # fmt: skip


def kernel_chunk_loss(rows, weight, bias, targets, with_gradient: bool):
    """Like `_chunk_loss`, with the gradient in the memory of bf16 or fp16 logits.

    Of 512 rows of 151,936 it takes 156 us on an H100 that copies 2.4 TB/s; the compiler's kernel took 222 on one of 3.0, and
    as much memory again.
    """
    logits = F.linear(rows.to(weight.dtype), weight, bias)
    losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    cross_entropy(logits, targets, losses, with_gradient)
    return losses.sum(), (logits @ weight).to(rows.dtype) if with_gradient else None


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each position's next token, [batch, length]; the last position has none (-100)."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


class SummedLoss:
    """The summed cross entropy of a batch, fp32: decoder, then the frozen head chunk by chunk.

    A head with an adapter, or a model that does something to its logits (soft-capping, scaling), takes the model's own.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, dtype: torch.dtype):
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device, self.dtype = next(model.parameters()).device, dtype
        self.decoder, self.head = self.base.get_decoder(), self.base.get_output_embeddings()
        self.options: dict[str, Any] = {}  # of chunked_cross_entropy
        self.chunked = self._head_is_plain()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Return whether the logits are the frozen head's product and nothing else, tried on eight tokens."""
        if type(self.head) is not nn.Linear or self.head.weight.requires_grad:
            return False
        training, probe = self.base.training, torch.arange(1, 9, device=self.device)[None]
        self.base.eval()
        with self.autocast():
            hidden = self.decoder(input_ids=probe, use_cache=False).last_hidden_state
            same = torch.equal(self.head(hidden), self.base(input_ids=probe, use_cache=False).logits)
        self.base.train(training)
        return same

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, **packed: torch.Tensor) -> torch.Tensor:
        """input_ids, labels: [batch, length] on the model's device; labels are not shifted, -100 where unsupervised.

        packed: the position_ids of packed samples, which restart at each, so that attention stays within it.
        """
        targets = shift_labels(labels).flatten()
        with self.autocast():
            if self.chunked:
                hidden = self.decoder(input_ids=input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)
                weight, bias = self.head.weight, self.head.bias
                return chunked_cross_entropy(hidden, weight, targets, bias, **self.options)
            logits = self.base(input_ids=input_ids, use_cache=False, **packed).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
