"""A model's decoder layer, compiled once for all layers, with its checkpoint inside."""

import functools
import inspect
import logging
import zlib
from types import ModuleType

import torch
import torch._dynamo.utils
import torch._functorch.config
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fast_path import attention, dropout, fused_linear, packed_weights
from fast_path.fused_linear import LINEAR_ARGUMENTS


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what the operator behind SwiGLU makes: the backward reads only its u, 32 bytes a token, and recomputing the
    whole pass and product for it took 3 % of a step.
    """
    keep = op is torch.ops.qlora.linear.default and args[LINEAR_ARGUMENTS.index("swiglu")]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_small_products():
    return create_selective_checkpoint_contexts(_policy)


def _run_layer(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """A decoder layer, its checkpoint inside, so that a compiler drops from the recompute what the backward does not
    read.
    """
    forward = type(layer).forward
    if layer.recompute and layer.training and torch.is_grad_enabled():
        return checkpoint(
            forward, layer, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_small_products,
            **kwargs,
        )  # fmt: skip
    return forward(layer, hidden, **kwargs)


@functools.cache
def operators_tag(modules: tuple[ModuleType, ...] = (dropout, fused_linear, packed_weights, attention)) -> str:
    """Return what tells the operators of this version from those of another, by the text of their files."""
    return "qlora " + " ".join(f"{zlib.crc32(inspect.getsource(module).encode()):08x}" for module in modules)


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder layer once for all layers, for training; evaluation, little work, runs as it is."""
    # Where a norm stays in its layer (it is trained, or attention is not ours), its output is a product of what is saved
    # anyway; the partitioner would save it too, since an opaque operator reads it: 4 kB a token and norm of Qwen2.5-3B.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # torch keeps compiled layers on disk and does not look into our operators, whose strides are compiled in: with the
    # layers of another version of this toolkit a run ended in an AssertionError.
    torch.compiler.config.cache_key_tag = operators_tag()
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
    compiled = torch.compile(_run_layer, dynamic=False)

    def run(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        # The embedding's output needs no gradient: the first layer would be compiled anew for it.
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return (compiled if layer.training else _run_layer)(layer, hidden, **kwargs)

    for layer in model.get_base_model().get_decoder().layers:
        layer.recompute = layer.gradient_checkpointing
        layer.gradient_checkpointing = False  # transformers would put its own checkpoint around the compiled layer
        layer.forward = functools.partial(run, layer)


def compiled_in_pieces() -> str | None:
    """Return why torch.compile could not take a layer whole, None if it did or has compiled nothing.

    Pieces compute the same; around a checkpoint they recompute and keep more: 27 % more memory at 16 x 512 tokens.
    """
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(iter(reasons)).splitlines()[0] if reasons else None
