"""Rotary embedding as one pass, causal attention without a mask tensor, packed samples that do not see each other, and
attention of one position over a cache.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config import ConfigError
from fast_path import families, training_kernels
from fast_path.nf4 import Launch, triton

CAUSAL = "sdpa_causal"  # in training
GROUPED = "sdpa_grouped"  # in generation
# Both take fewer heads of k and v than of q; from torch 2.12 on the wrapper wants to be told, 2.11 has no such argument.
FEWER_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

ROTATE = Launch(block_m=16, block_k=64, warps=4)  # of heads 128 wide: of others as many numbers


class AttentionChoice(NamedTuple):
    """How a model's attention runs in training, as `model.config.attention_choice`: the config is all that transformers
    hands both to a mask function and to an attention. A tuple, since a config must stay writable as JSON.

    `use_causal_attention` writes `cudnn`, `keep_samples_apart` the other two, both before training and nobody after it;
    `attend` reads `cudnn`, `_no_mask` the other two.
    """

    cudnn: bool = False  # attention without a mask is `cudnn_attention`'s, else SDPA's
    packed: bool = False  # blocks hold samples that must not see each other
    varlen_samples: list[int] | None = None  # of the fullest blocks, for varlen attention; None: samples take a mask


def choice_of(config: Any) -> AttentionChoice:
    """Return the choice of the model that a config belongs to; the default of one that nothing was chosen for."""
    return getattr(config, "attention_choice", AttentionChoice())


def _no_mask(
    *, kv_length: int, config: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs
) -> torch.Tensor | None:
    """Return no mask, so that SDPA takes its is_causal path; a real one where the length exceeds a sliding window.

    Where transformers found positions that restart (it then allows no skip, as it also does in a captured graph, packed
    or not), a block-diagonal one, or in its place the starts of the samples, which `attend` reads.
    """
    choice = choice_of(config)
    packed = choice.packed and not allow_is_causal_skip
    slides = local_size is not None and kv_length > local_size
    if not packed and not slides:
        return None
    if packed and not slides and choice.varlen_samples:
        batch, apart = kwargs["batch_size"], kwargs["mask_function"]
        return sample_starts(apart, batch, kv_length, most_samples(choice.varlen_samples, batch), kwargs["device"])
    kwargs.update(allow_is_causal_skip=allow_is_causal_skip, config=config)
    return sdpa_mask(kv_length=kv_length, local_size=local_size, **kwargs)


def most_samples(samples: Sequence[int], batch: int) -> int:
    """Return how many samples a batch may hold at most. samples: those of the fullest blocks, in descending order.

    Two more a row: the pads of `collate`, and those of a captured step, which fill a row without a block with two.
    """
    return sum(samples[:batch]) + 2 * batch


def sample_starts(sees: Callable, batch: int, length: int, most: int, device: torch.device) -> torch.Tensor:
    """Return where samples start in a flattened batch, int32 [most + 1], the rest filled with its end: cu_seqlens.

    sees(row, head, query, key): transformers' mask function; a sample starts where a token does not see the one before.
    Nothing waits for the GPU. An empty sample is not free: the backward's buffers have 128 rows for each (flash_api.cpp
    of PyTorch), 1 MiB of Qwen2.5-3B, so `most` is what blocks can hold and not the number of tokens.
    """
    row, token = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    starts = (token == 0) | ~sees(row, 0, token, (token - 1).clamp_min(0))
    numbers = torch.arange(1, most + 2, device=device)
    return torch.searchsorted(starts.flatten().cumsum(0), numbers, out_int32=True)


@torch.library.custom_op("qlora::rotate", mutates_args=())
def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q and k rotated as transformers' apply_rotary_pos_emb does, and v, each [batch, length, its heads, width].

    qkv: [batch, length, (heads + 2 kv_heads) width]; cos, sin: [batch or 1, length, width]. Computed in fp32, rounded
    once. The compiler's kernel for the way back took 3 to 4 times what its bytes take (H100).
    """
    parts = _apart(qkv, heads, kv_heads)
    _rotate(qkv, *parts, cos, sin, back=False)
    return parts


def _apart(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tensors for q, k and v."""
    shape, width = qkv.shape[:-1], qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(*shape, number, width) for number in (heads, kv_heads, kv_heads))
    return q, k, v


def _rotate(qkv, q, k, v, cos, sin, back: bool) -> None:
    """Fill q, k and v from qkv, or back the gradient of qkv from theirs."""
    (*_, heads, width), kv_heads = q.shape, k.shape[-2]
    rows, block = qkv.numel() // width, triton.next_power_of_2(width // 2)
    block_m = max(1, ROTATE.block_m * ROTATE.block_k // block)
    training_kernels.rotate_kernel[(triton.cdiv(rows, block_m),)](
        qkv, q, k, v, cos.contiguous(), sin.contiguous(), rows, cos.numel() // width, HEADS=heads, KV_HEADS=kv_heads,
        HALF=width // 2, BLOCK_M=block_m, BLOCK_K=block, BACK=back, num_warps=ROTATE.warps,
    )  # fmt: skip


@rotate.register_fake
def _(qkv, cos, sin, heads, kv_heads):
    return _apart(qkv, heads, kv_heads)


@torch.library.custom_op("qlora::rotate_backward", mutates_args=())
def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of qkv."""
    grad = dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])
    _rotate(grad, dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, back=True)
    return grad


@rotate_backward.register_fake
def _(dq, dk, dv, cos, sin):
    return dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])


rotate.register_autograd(
    lambda ctx, *grads: (rotate_backward(*grads, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]),
)


@torch.library.custom_op("qlora::cudnn_attention", mutates_args=())
def cudnn_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cuDNN's causal attention, like q, and the logarithms of its sums, fp32 [batch, heads, length, 1].

    q: [batch, length, heads, width], k and v perhaps of fewer heads; bfloat16 or float16, without a gap in memory.
    PyTorch keeps cuDNN's graphs by the strides of q, k and v alone, and a compiled layer has others for the output and
    its gradient than the same layer run as it is: whichever came second in a process read its gradient in the wrong
    order (torch 2.11, H100: q, k and v off by 150 %, the loss right). Here every tensor has one order, in every run.
    """
    q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    out, logs, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)
    return out.transpose(1, 2).contiguous(), logs.contiguous()


@cudnn_attention.register_fake
def _(q, k, v, scale):
    batch, length, heads, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        batch, heads, length, 1, dtype=torch.float32
    )


@torch.library.custom_op("qlora::cudnn_attention_backward", mutates_args=())
def cudnn_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, logs: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    grad, q, k, v, out = (x.contiguous().transpose(1, 2) for x in (grad, q, k, v, out))
    seed, length = torch.empty((), dtype=torch.int64, device=q.device), q.shape[2]  # of dropout, which there is not
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, logs, seed, seed, None, None, None, length, length, 0.0, True, scale=scale
    )
    return tuple(x.transpose(1, 2).contiguous() for x in grads)


@cudnn_attention_backward.register_fake
def _(grad, q, k, v, out, logs, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _attention_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale = inputs[3]


cudnn_attention.register_autograd(
    lambda ctx, grad, _: (*cudnn_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None),
    setup_context=_attention_setup,
)


def cudnn_serves(model: nn.Module) -> bool:
    """Return whether `cudnn_attention` is for this model and GPU: those where PyTorch itself prefers cuDNN's kernels.

    Not where a run is to be repeated bit for bit: PyTorch counts them as not deterministic.
    """
    config, device, dtype = model.config, model.device, model.get_input_embeddings().weight.dtype
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        any(families.fused("attention", module) for module in model.modules())
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 128
        and not getattr(config, "attention_dropout", 0.0)
    )


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return cuDNN's or SDPA's attention, or PyTorch's varlen attention where sample_starts stand in the mask's place.

    query: [batch, heads, length, width], key and value perhaps of fewer heads; result: [batch, length, heads, width].
    """
    if attention_mask is None and choice_of(module.config).cudnn:
        return cudnn_attention(*(x.transpose(1, 2) for x in (query, key, value)), scaling)[0], None
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (batch, _, length, _), starts = query.shape, attention_mask
    q, k, v = (x.transpose(1, 2).contiguous().flatten(0, 1) for x in (query, key, value))
    mixed = varlen_attn(q, k, v, starts, starts, length, length, scale=scaling, window_size=(-1, 0), **FEWER_HEADS)
    return mixed.unflatten(0, (batch, length)), None


def varlen_obstacle(model: nn.Module, length: int) -> str | None:
    """Return why packed samples in blocks of `length` take a mask, None where varlen attention keeps them apart."""
    config, device, dtype = model.config, model.device, model.get_input_embeddings().weight.dtype
    known = any(families.fused("attention", module) for module in model.modules())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) or length
    if config._attn_implementation != CAUSAL:
        return f"model.attn_implementation {config._attn_implementation}"
    if not known:
        return f"{type(model).__name__} has another attention"
    if device.type != "cuda":
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return "this GPU or this build of PyTorch has no FlashAttention"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention does not compute in {dtype}"
    if width % 8 or width > 192:  # wider ones have a backward on some cards only
        return f"FlashAttention does not train heads {width} wide"
    if window < length:
        return f"a sliding window of {window} tokens"
    if getattr(config, "attention_dropout", 0.0):
        return "attention_dropout"
    return None


@torch.no_grad()
def _check_packing(model: nn.Module) -> None:
    """Refuse a model that lets packed samples see each other: a state that runs on, attention without positions."""
    training, decoder = model.training, model.eval().get_decoder()
    samples = torch.arange(1, 17, device=model.device).view(2, 8)  # two rows, as other kernels serve a batch of one
    positions = torch.arange(4, device=model.device).repeat(2, 2)
    others = torch.cat([samples.flip(0)[:, :4], samples[:, 4:]], 1)  # with another sample before the last four tokens
    first, second = (
        decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, 4:]
        for ids in (samples, others)
    )
    model.train(training)
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"data.packing: {type(model).__name__} with model.attn_implementation {model.config._attn_implementation} "
            "does not keep packed samples apart; set data.packing false"
        )


def keep_samples_apart(model: nn.Module, length: int, samples: Sequence[int]) -> str:
    """Have packed samples, whose position_ids restart, not see each other; return the line that says how.

    After use_causal_attention. length: of a block. samples: how many the fullest blocks hold, in descending order, for
    as many blocks as a batch has. Raises ConfigError for a model that lets them see each other all the same.
    """
    obstacle = varlen_obstacle(model, length)
    varlen = None if obstacle else list(samples)
    model.config.attention_choice = choice_of(model.config)._replace(packed=True, varlen_samples=varlen)
    _check_packing(model)
    return f"packed samples: {f'with a mask: {obstacle}' if obstacle else 'varlen attention'}"


def use_causal_attention(model: nn.Module) -> bool:
    """Train without mask tensors: blocks are full and padding is on the right, so causality alone is exact.

    transformers builds a 4-D mask where it cannot look at the data (in a captured graph); this keeps the fast path
    of SDPA. Returns whether the model was switched: only one that runs `sdpa` is.
    """
    model.config.attention_choice = choice_of(model.config)._replace(packed=False)
    plain = model.config._attn_implementation == "sdpa"
    if plain:
        torch.backends.cuda.enable_cudnn_sdp(False)  # what `cudnn_attention` does not take; its docstring says why
        model.config.attention_choice = model.config.attention_choice._replace(cudnn=cudnn_serves(model))
        AttentionInterface.register(CAUSAL, attend)
        AttentionMaskInterface.register(CAUSAL, _no_mask)
        model.set_attn_implementation(CAUSAL)
    return plain


def grouped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """SDPA, with the heads that share a key head as queries of it when there is one position, [batch, heads, 1, width].

    transformers 5.17 copies keys and values for every head instead: eight times a 3B's cache, in each step.
    """
    (batch, heads, positions, width), groups = query.shape, query.shape[1] // key.shape[1]
    if positions > 1 or groups == 1 or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    packed = query.reshape(batch, heads // groups, groups, width)
    mixed = F.scaled_dot_product_attention(packed, key, value, mask, scale=kwargs.get("scaling"))
    return mixed.reshape(batch, 1, heads, -1), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a model that runs `sdpa` to grouped_attention."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)
