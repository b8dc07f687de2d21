"""Attention: rotary embedding in one pass, causal attention without a mask tensor, packed samples that do not see each
other, and attention of one new position over a cache.
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

from config import ConfigError, DataConfig
from fast_path import families, training_kernels
from fast_path.capped_attention import capped_attention, has_kernels, plain_capped_attention
from fast_path.dropout import modes_kept
from fast_path.nf4 import Launch, triton

CAUSAL = "sdpa_causal"  # the name of `attend`, for training
CAPPED = "capped_causal"  # the name of `attend_capped`, for training
GROUPED = "sdpa_grouped"  # the name of `grouped_attention`, for generation
# Grouped-query attention (fewer heads of k and v than of q): torch >= 2.12 needs enable_gqa=True; 2.11 has no such
# argument and accepts fewer heads as it is.
FEWER_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

ROTATE = Launch(block_m=16, block_k=64, warps=4)  # for heads of 128 features; others get tiles of as many elements


class AttentionChoice(NamedTuple):
    """How a model's attention runs in training, stored as `model.config.attention_choice`.

    It is in the config because transformers passes no other object both to a mask function and to an attention
    function. It is a tuple because a config must stay writable as JSON.

    `use_causal_attention` writes `cudnn` and resets `packed`; `keep_samples_apart` writes `packed` and
    `varlen_samples`. Both run before training, and nothing writes the choice later. `attend` reads `cudnn`, and
    `_no_mask` reads the other two.
    """

    cudnn: bool = False  # attention without a mask runs in `cudnn_attention`; if False, in SDPA
    packed: bool = False  # blocks hold samples that must not see each other
    varlen_samples: list[int] | None = None  # how many the fullest blocks hold, for varlen attention; None: use a mask


def choice_of(config: Any) -> AttentionChoice:
    """Return the AttentionChoice stored in a model's config, or the default if none was stored."""
    return getattr(config, "attention_choice", AttentionChoice())


def _no_mask(
    *, kv_length: int, config: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs
) -> torch.Tensor | None:
    """Return None instead of a mask, so that SDPA uses its is_causal path.

    A real mask is needed where the length exceeds a sliding window. Packed samples need a block-diagonal mask, or
    instead of it the starts of the samples, which `attend` reads. transformers passes allow_is_causal_skip=False where
    it found positions that restart. It passes the same in a captured graph, packed or not, so `packed` counts too.
    """
    choice = choice_of(config)
    packed = choice.packed and not allow_is_causal_skip
    slides = local_size is not None and kv_length > local_size and config._attn_implementation != CAPPED
    if not packed and not slides:
        return None
    if packed and not slides and choice.varlen_samples:
        batch, apart = kwargs["batch_size"], kwargs["mask_function"]
        return sample_starts(apart, batch, kv_length, most_samples(choice.varlen_samples, batch), kwargs["device"])
    if not choice.packed and kwargs.get("attention_mask") is None:
        # All sequences have the same window. A mask for each would have other strides in a captured graph than before it,
        # where transformers can see that no positions restart, and the layers would be compiled anew within the capture.
        kwargs["batch_size"] = 1
    kwargs.update(allow_is_causal_skip=allow_is_causal_skip, config=config)
    return sdpa_mask(kv_length=kv_length, local_size=local_size, **kwargs)


def most_samples(samples: Sequence[int], batch: int) -> int:
    """Return how many samples a batch can hold at most, padding included.

    samples: how many the fullest blocks hold, in descending order. Each sequence gets 2 more: the padding that
    `collate` adds is one sample, and a captured step fills an unused sequence with two samples of padding.
    """
    return sum(samples[:batch]) + 2 * batch


def sample_starts(sees: Callable, batch: int, length: int, most: int, device: torch.device) -> torch.Tensor:
    """Return where samples start in a flattened batch (the cu_seqlens of varlen attention), int32 [most + 1].

    Entries after the last sample hold the end of the batch, so they describe empty samples. sees(row, head, query,
    key): transformers' mask function; a sample starts where a token does not see the token before it. The host never
    waits for the GPU here. `most` is how many samples the blocks can hold, not the number of tokens, because an empty
    sample costs memory: the backward pass allocates 128 rows for each (flash_api.cpp of PyTorch), 1 MiB of Qwen2.5-3B.
    """
    row, token = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    starts = (token == 0) | ~sees(row, 0, token, (token - 1).clamp_min(0))
    numbers = torch.arange(1, most + 2, device=device)
    return torch.searchsorted(starts.flatten().cumsum(0), numbers, out_int32=True)


@torch.library.custom_op("qlora::rotate", mutates_args=())
def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, norms: list[torch.Tensor],
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return q and k rotated as transformers' apply_rotary_pos_emb does, and v, each [batch, length, its heads, width].

    qkv: [batch, length, (heads + 2 kv_heads) width]; cos, sin: [batch or 1, length, the features of a head that are
    rotated, its first ones]. norms: [], or the factors of the RMS norms that q and k pass through first, as wide as a
    head or as all of their heads; no gradient flows to them. epsilon: of these norms. Computed in fp32 and rounded once.
    It has a kernel of its own because the kernels that torch.compile makes for the backward pass are several times slower
    than its memory traffic requires (docs/measurements.md).
    """
    parts = _apart(qkv, heads, kv_heads)
    _rotate(qkv, *parts, cos, sin, norms, epsilon)
    return parts


def _apart(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty tensors for q, k and v, each [batch, length, its heads, width]."""
    shape, width = qkv.shape[:-1], qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(*shape, number, width) for number in (heads, kv_heads, kv_heads))
    return q, k, v


def _rotate(qkv, q, k, v, cos, sin, norms, epsilon: float, grad: torch.Tensor | None = None) -> None:
    """Fill q, k and v from qkv; with grad, fill the gradient of qkv from the gradients q, k and v."""
    (*_, heads, width), kv_heads, turned = q.shape, k.shape[-2], cos.shape[-1]
    rows = q.numel() // width // heads * (heads + 2 * kv_heads)
    kind = ("head" if norms[0].numel() == width else "all") if norms else ""
    grid, launch = rotate_launch(rows, heads, kv_heads, width, kind)
    training_kernels.rotate_kernel[grid](
        qkv, q, k, v, cos.contiguous(), sin.contiguous(), *(norms or (qkv, qkv)), qkv if grad is None else grad, rows,
        cos.numel() // turned, epsilon, HEADS=heads, KV_HEADS=kv_heads, HALF=turned // 2, WIDTH=width,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BACK=grad is not None, NORM=kind, num_warps=launch.warps,
    )  # fmt: skip


def rotate_launch(rows: int, heads: int, kv_heads: int, width: int, kind: str) -> tuple[tuple[int, ...], Launch]:
    """Return the grid and the layout of the kernel behind `rotate`. rows: heads of all tokens. kind: of the norms.

    Norms as wide as all heads need all heads of a token's q, k or v in one program; a thread then has as much as else.
    """
    block = triton.next_power_of_2(width // 2)
    if kind != "all":
        block_m = max(1, ROTATE.block_m * ROTATE.block_k // block)
        return (triton.cdiv(rows, block_m),), Launch(block_m=block_m, block_k=block, warps=ROTATE.warps)
    block_m = triton.next_power_of_2(max(heads, kv_heads))
    warps = ROTATE.warps * block_m * block // (ROTATE.block_m * ROTATE.block_k)
    return (rows // (heads + 2 * kv_heads), 3), Launch(block_m=block_m, block_k=block, warps=min(max(warps, 1), 16))


@rotate.register_fake
def _(qkv, cos, sin, heads, kv_heads, norms, epsilon):
    return _apart(qkv, heads, kv_heads)


@torch.library.custom_op("qlora::rotate_backward", mutates_args=())
def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    normed: list[torch.Tensor], epsilon: float,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of qkv from those of q, k and v. normed: qkv and the norms, [] without norms."""
    grad = dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])
    qkv, *norms = normed or [grad]
    _rotate(qkv, dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, norms, epsilon, grad)
    return grad


@rotate_backward.register_fake
def _(dq, dk, dv, cos, sin, normed, epsilon):
    return dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])


def _rotate_setup(ctx, inputs, output):
    qkv, cos, sin, _, _, norms, ctx.epsilon = inputs
    ctx.norms = len(norms)
    ctx.save_for_backward(cos, sin, *([qkv, *norms] if norms else []))


def _rotate_backward(ctx, *grads):
    cos, sin, *normed = ctx.saved_tensors
    return rotate_backward(*grads, cos, sin, normed, ctx.epsilon), None, None, None, None, [None] * ctx.norms, None


rotate.register_autograd(_rotate_backward, setup_context=_rotate_setup)


@torch.library.custom_op("qlora::cudnn_attention", mutates_args=())
def cudnn_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cuDNN's causal attention, in q's shape, and its log-sum-exp, fp32 [batch, heads, length, 1].

    q: [batch, length, heads, width]; k and v may have fewer heads; bfloat16 or float16, contiguous.
    Every tensor is made contiguous in this order, because PyTorch caches cuDNN's graphs by the strides of q, k and v
    alone. A compiled layer has other strides for the output and its gradient than the same layer uncompiled, so
    whichever ran second in a process read its gradient in the wrong order (torch 2.11, H100: the gradients of q, k and
    v were wrong by 150 %, the loss was right).
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
    """Return the gradients of q, k and v, contiguous and in their shapes."""
    grad, q, k, v, out = (x.contiguous().transpose(1, 2) for x in (grad, q, k, v, out))
    seed, length = torch.empty((), dtype=torch.int64, device=q.device), q.shape[2]  # seed: not used
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
    """Return whether this model uses `cudnn_attention` on this GPU: only where PyTorch itself prefers cuDNN's kernels.

    A deterministic run does not use it, because PyTorch does not count these kernels as deterministic.
    """
    config, device, dtype = model.config, model.device, model.get_input_embeddings().weight.dtype
    width = families.head_width(config)
    return (
        any(families.fused("attention", module) for module in model.modules())
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 128
    )


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return causal attention, [batch, length, heads, width], and None for the attention weights.

    query: [batch, heads, length, width]; key and value may have fewer heads. attention_mask: None for cuDNN's
    attention or SDPA, a mask for SDPA, or the result of `sample_starts` (1-D) for PyTorch's varlen attention.
    """
    if attention_mask is None and choice_of(module.config).cudnn:
        return cudnn_attention(*(x.transpose(1, 2) for x in (query, key, value)), scaling)[0], None
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (batch, _, length, _), starts = query.shape, attention_mask
    q, k, v = (x.transpose(1, 2).contiguous().flatten(0, 1) for x in (query, key, value))
    mixed = varlen_attn(q, k, v, starts, starts, length, length, scale=scaling, window_size=(-1, 0), **FEWER_HEADS)
    return mixed.unflatten(0, (batch, length)), None


def attend_capped(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor | None,
    scaling: float, softcap: float | None = None, sliding_window: int | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Do what `attend` does for a model that caps its scores. starts: None, or the result of `sample_starts`.

    A sliding window is a number here and no mask.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    numbers = starts, scaling, softcap or 0.0, sliding_window or k.shape[1]
    if has_kernels(q, k):
        return capped_attention(q, k, v, *numbers)[0], None
    return plain_capped_attention(q, k, v, *numbers), None


def varlen_obstacle(model: nn.Module, length: int) -> str | None:
    """Return why packed samples in blocks of `length` tokens need a mask; None where varlen attention works."""
    config, device, dtype = model.config, model.device, model.get_input_embeddings().weight.dtype
    known = any(families.fused("attention", module) for module in model.modules())
    width = families.head_width(config)
    window = getattr(config, "sliding_window", None) or length
    if config._attn_implementation not in (CAUSAL, CAPPED):
        return f"model.attn_implementation {config._attn_implementation}"
    if not known:
        return f"{type(model).__name__} has another attention"
    if config._attn_implementation == CAPPED:
        return None
    if device.type != "cuda":
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return "this GPU or this build of PyTorch has no FlashAttention"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention does not compute in {dtype}"
    if width % 8 or width > 192:  # wider heads have a backward pass on some GPUs only
        return f"FlashAttention does not train heads {width} wide"
    if window < length:
        return f"a sliding window of {window} tokens"
    return None


@torch.no_grad()
def _check_packing(model: nn.Module) -> None:
    """Raise ConfigError if packed samples see each other, for example through a recurrent state that runs across
    samples or in an attention that ignores positions.

    The second sample's hidden states must not change when another sample is put before it.
    """
    decoder = families.decoder_of(model)
    samples = torch.arange(1, 17, device=model.device).view(2, 8)  # 2 sequences: a batch of 1 may run other kernels
    positions = torch.arange(4, device=model.device).repeat(2, 2)
    others = torch.cat([samples.flip(0)[:, :4], samples[:, 4:]], 1)  # another sample before the last 4 tokens
    with modes_kept(model):
        model.eval()
        first, second = (
            decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, 4:]
            for ids in (samples, others)
        )
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"data.packing: {type(model).__name__} with model.attn_implementation {model.config._attn_implementation} "
            "does not keep packed samples apart; set data.packing false"
        )


def keep_samples_apart(model: nn.Module, length: int, samples: Sequence[int]) -> str:
    """Keep packed samples, whose position_ids restart, from seeing each other; return the log line that says how.

    Call it after use_causal_attention. length: the tokens of a block. samples: how many the fullest blocks hold, in
    descending order, for as many blocks as a batch has. Raises ConfigError if samples still see each other.
    """
    obstacle = varlen_obstacle(model, length)
    varlen = None if obstacle else list(samples)
    model.config.attention_choice = choice_of(model.config)._replace(packed=True, varlen_samples=varlen)
    _check_packing(model)
    return f"packed samples: {f'with a mask: {obstacle}' if obstacle else 'varlen attention'}"


def prepare_attention(
    model: nn.Module, data: DataConfig, samples: Sequence[int], asked: str = "auto"
) -> list[str]:  # fmt: skip
    """Set a model's attention up for the sequences of a run and return the log lines about it; raise ConfigError.

    asked: model.attn_implementation. samples: how many the fullest blocks hold, as in keep_samples_apart; empty where blocks hold running text or a row each.
    """
    use_causal_attention(model, asked)
    lines = fix_rotary_scale(model, data.max_length, alike=data.packing and not samples)
    return [*lines, *([keep_samples_apart(model, data.max_length, samples)] if samples else [])]


@torch.no_grad()
def hold_rotary_scale(model: nn.Module, length: int) -> dict[nn.Module, Any]:
    """Have every text rotate as one of `length` tokens; return the modules and their `rope_type` of before.

    For models of which `steady_positions` is not None.
    """
    x, positions = model.get_input_embeddings().weight[:1], torch.tensor([[length - 1]], device=model.device)
    before: dict[nn.Module, Any] = {}
    for module in families.decoder_of(model).modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module(x, positions)  # takes the frequencies of this length
            before[module], module.rope_type = kind, "default"  # and keeps them
        elif isinstance(kind, dict):
            for layer_type in kind:
                module(x, positions, layer_type)
            before[module], module.rope_type = kind, dict.fromkeys(kind, "default")
    return before


def fix_rotary_scale(model: nn.Module, length: int, alike: bool) -> list[str]:
    """Keep one sequence's rotary embedding from depending on the others of its batch.

    Where blocks are longer than `steady_positions`, transformers rotates a whole batch as its longest sequence needs.
    alike: all sequences are blocks of `length` tokens, but for the last; then all rotate as a full block does, which a
    line says. Otherwise raise ConfigError.
    """
    limit = families.steady_positions(model.config)
    if limit is None or length <= limit:
        return []
    name = type(model).__name__
    if not alike:
        raise ConfigError(
            f"data.max_length: expected at most {limit:,}, got {length:,}: beyond {limit:,} positions the rotary scale of "
            f"{name} follows the longest sample of a batch, which would change what it computes for the shorter ones"
        )
    hold_rotary_scale(model, length)
    return [f"rotary scale: that of {length:,} tokens, for a shorter last block too"]


def use_causal_attention(model: nn.Module, asked: str = "auto") -> bool:
    """Train without mask tensors and return whether the model was switched; only one that runs `sdpa` is.

    So is a model of a known family that runs `eager` because its scores are capped, unless that was asked for (`asked`).
    Blocks are full or padded on the right, so causal attention is exact without a mask. transformers would build a 4-D
    mask where it cannot look at the data (in a captured graph), and SDPA would then leave its fast is_causal path.
    """
    model.config.attention_choice = choice_of(model.config)._replace(packed=False)
    known = [module for module in model.modules() if families.fused("attention", module)]
    eager = model.config._attn_implementation == "eager"
    capped = eager and asked == "auto" and any(families.of(module).score_cap for module in known)
    if model.config._attn_implementation != "sdpa" and not capped:
        return False
    torch.backends.cuda.enable_cudnn_sdp(False)  # unsafe under a compiler: see `cudnn_attention`
    model.config.attention_choice = model.config.attention_choice._replace(cudnn=cudnn_serves(model))
    for name, function in ((CAUSAL, attend), (CAPPED, attend_capped)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    if capped:
        model.set_attn_implementation(CAPPED)
    elif known or _does_without_mask(model):
        model.set_attn_implementation(CAUSAL)
    return model.config._attn_implementation in (CAUSAL, CAPPED)


@torch.no_grad()
def _does_without_mask(model: nn.Module) -> bool:
    """Return whether a model of no known family computes the same without a mask, which some of them build upon."""
    ids, outputs = torch.arange(1, 9, device=next(model.parameters()).device)[None], []
    with modes_kept(model):
        model.eval()
        for implementation in ("sdpa", CAUSAL):
            model.set_attn_implementation(implementation)
            try:
                outputs.append(families.decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state.float())
            except (RuntimeError, TypeError, AttributeError, ValueError, LookupError):
                outputs.append(torch.full((), torch.nan))  # the model reads the mask that is not there
        model.set_attn_implementation("sdpa")
    apart, size = (outputs[1] - outputs[0]).norm(), outputs[0].norm()
    return bool(apart <= 0.05 * size)  # other kernels round otherwise; False for NaN


def grouped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return SDPA's attention, [batch, positions, heads, width], without copying keys and values for each query head.

    With one position, query is [batch, heads, 1, width], and the heads that share a key head become several queries of
    that one head. transformers 5.17 copies keys and values for every head instead: eight times the cache of a 3B
    model, in each step.
    """
    (batch, heads, positions, width), groups = query.shape, query.shape[1] // key.shape[1]
    if positions > 1 or groups == 1 or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    packed = query.reshape(batch, heads // groups, groups, width)
    mixed = F.scaled_dot_product_attention(packed, key, value, attention_mask, scale=kwargs.get("scaling"))
    return mixed.reshape(batch, 1, heads, -1), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a model that runs `sdpa` to `grouped_attention`, for generation."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)
