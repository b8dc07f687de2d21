"""What a checkpointed layer keeps for its backward pass besides its input, so that less of its forward pass is repeated."""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fast_path.attention import cudnn_attention
from fast_path.capped_attention import capped_attention
from fast_path.fused_linear import LINEAR_ARGUMENTS


class Kept(NamedTuple):
    """How many checkpointed layers keep an output for the backward pass; they are the last ones, which it reaches first."""

    mlp: int = 0  # what the norm after the MLP reads; of families without such a norm nothing reads it
    attention: int = 0  # attention's, and the logarithms that its backward pass reads

    def named(self) -> list[tuple[int, str]]:
        """Return each number with the name of the part whose output it counts."""
        return [(self.mlp, "MLP"), (self.attention, "attention")]

    def at_most(self, other: "Kept") -> "Kept":
        """Return the smaller one of each number."""
        return Kept(*map(min, self, other))

    def without(self, size: int, each: dict[str, int]) -> "Kept":
        """Return what is left where `size` bytes are given up, attention's outputs first: an output of an MLP saves more time."""
        left = {}
        for number, name in reversed(self.named()):
            given = min(number, -(-max(0, size) // each[name]))
            left[name], size = number - given, size - given * each[name]
        return Kept(left["MLP"], left["attention"])


NOTHING_KEPT = Kept()
ATTENTIONS = (
    cudnn_attention._opoverload,
    capped_attention._opoverload,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
)


def is_inverse_rms(op, args: tuple) -> bool:
    """Return whether an operation is a norm's 1 / rms, 4 bytes per token, for which a pass would read the norm's whole input again.

    Those of the heads of q and k are more, and the pass that reads these heads recomputes them on its way.
    """
    return op is torch.ops.aten.rsqrt.default and args[0].dim() < 4


def contexts(keeps_mlp: bool, keeps_attention: bool):
    """Return the contexts of the checkpoint of a layer that keeps what its MLP or its attention returns, or neither.

    Each layer keeps every norm's 1 / rms. Of the MLP the backward pass reads no more than u of its last operator (`linear`
    with swiglu), 32 bytes per token. Recomputing u would repeat the whole pass over the activations and the matrix product,
    which costs much more time than the memory is worth (docs/measurements.md). A norm after it reads its whole output, too, in
    16 bit as codes of 8 bits (`NormAfter`). Since nothing after the operator is marked to be recomputed, the compiler may
    choose between output and codes.
    """
    past = {False: False, True: False}  # that operator, in the forward pass and while recomputing
    swiglu = LINEAR_ARGUMENTS.index("swiglu")

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if keeps_mlp and op is torch.ops.qlora.linear.default and args[swiglu]:
            past[ctx.is_recompute] = True
            return CheckpointPolicy.MUST_SAVE
        if is_inverse_rms(op, args) or (keeps_attention and op in ATTENTIONS):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_SAVE if past[ctx.is_recompute] else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
