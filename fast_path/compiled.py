"""The decoder layer, compiled once for all layers, with gradient checkpointing inside the compiled code."""

import functools
import inspect
import logging
import zlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch._dynamo.config
import torch._dynamo.utils
import torch._functorch.config
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from fast_path import (
    attention,
    capped_attention,
    dropout,
    expert_store,
    experts,
    families,
    fused_linear,
    packed_weights,
)
from fast_path.kept_outputs import NOTHING_KEPT, Kept, contexts
from fast_path.layers import groups_of
from fast_path.swapping import Swap, swapped_layers


def _run_layer(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """Run a decoder layer. Its checkpoint is inside this function, so that a compiler sees the recomputation and drops
    the part of it that the backward pass does not read.
    """
    forward = type(layer).forward
    if layer.recompute and layer.training and torch.is_grad_enabled():
        return checkpoint(
            forward, layer, hidden, use_reentrant=False, preserve_rng_state=False,
            context_fn=functools.partial(contexts, layer.keeps_down, layer.keeps_attention), **kwargs,
        )  # fmt: skip
    return forward(layer, hidden, **kwargs)


@functools.cache
def operators_tag(
    modules: tuple[ModuleType, ...] = (
        dropout, fused_linear, packed_weights, attention, capped_attention, experts, expert_store,
    ),
) -> str:  # fmt: skip
    """Return a tag that changes with the text of the operators' files, so that each version has its own."""
    return "qlora " + " ".join(f"{zlib.crc32(inspect.getsource(module).encode()):08x}" for module in modules)


def recompute(layers: Sequence[nn.Module], checkpointed: int, kept: Kept, swapped: int = 0) -> None:
    """Checkpoint the first `checkpointed` of the compiled layers, and no others; the last of them keep what `kept` says.

    swapped: how many of them are swapped instead of recomputed (swapping.py).

    Without a norm after the MLP all keep the outputs of the down projection that are read, since u is all of them then.

    A checkpointed MLP's backward pass writes the gradients of gate and up over their recomputed values, which saves 4 bytes
    per token and feature at the peak. Saved ones belong to autograd, and a compiler would copy them first.
    """
    numbers = swapped_layers(checkpointed, swapped, len(layers))
    end = min(checkpointed, len(layers) - 1)
    swap = Swap(numbers, end, next(layers[0].parameters()).device) if numbers else None
    repeating = [number for number in range(checkpointed) if number not in numbers]
    mlp, attention = (set(repeating[max(0, len(repeating) - n) :]) for n in kept)
    for number, layer in enumerate(layers):
        layer.swap = swap
        layer.recompute = number in repeating
        layer.keeps_down = number in mlp or not layer.recompute or not families.of(layer).norms_after[1]
        layer.keeps_attention = number in attention
        for group in groups_of(layer):
            group.recomputed = layer.recompute


def compile_layers(model: PeftModel, kept: Kept = NOTHING_KEPT, swapped: int = 0) -> None:
    """Compile the decoder layer once for all layers, for training. kept, swapped: as in `recompute`.

    Evaluation runs the layers uncompiled, because it is too little work to pay for another compilation.
    """
    # A norm that is not fused (it is trained, or its attention stays plain) can be recomputed from tensors that are
    # saved anyway. By default the partitioner would save its output too, because a custom operator reads it: 4 kB per
    # token and norm of Qwen2.5-3B.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # torch caches compiled layers on disk. Its cache key does not cover the code of our operators, but the strides of
    # their outputs are compiled in: a run that loaded layers from another version of this toolkit failed with an
    # AssertionError.
    torch.compiler.config.cache_key_tag = operators_tag()
    # Each of a layer's four operators is in FP8 or not (layers.guard); each combination is compiled once.
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
    compiled = torch.compile(_run_layer, dynamic=False)

    def run(layer: nn.Module, number: int, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        # The embedding's output needs no gradient, and the first layer would be compiled a second time for that case.
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        forward = compiled if layer.training else _run_layer
        if layer.swap is None or not (layer.training and torch.is_grad_enabled()):
            return forward(layer, hidden, **kwargs)
        with layer.swap.around(number, layer, hidden, kwargs):
            out = forward(layer, hidden, **kwargs)
        layer.swap.after(number, out)
        return out

    layers = families.decoder_layers(model.get_base_model())
    recompute(layers, sum(layer.gradient_checkpointing for layer in layers), kept, swapped)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = False  # transformers would put its own checkpoint around the compiled layer
        layer.forward = functools.partial(run, layer, number)


def compiled_in_pieces() -> str | None:
    """Return why torch.compile split a layer into pieces; None if it did not, or has compiled nothing yet.

    Pieces compute the same numbers. Around a checkpoint they recompute and save more: 27 % more memory at 16 x 512
    tokens.
    """
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(iter(reasons)).splitlines()[0] if reasons else None
