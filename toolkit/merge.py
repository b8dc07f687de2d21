"""Merge a base and its adapter into one plain model."""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from config import ConfigError
from fast_path.experts import PackedExperts, unpacked
from fast_path.loss import reading
from toolkit.merged_folder import add_older_keys, write_tokenizer


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return an unquantised copy on the CPU, whose weights are the dequantised values with which the model multiplies.

    The copy is made from the model in memory: no 16-bit file is read, so a base stored in 4 bit works too. Weights that
    are on the CPU and not packed are shared with the model.
    """
    model_config = copy.deepcopy(model.config)
    vars(model_config).pop("quantization_config", None)
    with init_empty_weights():  # parameters need no memory yet; buffers (rotary frequencies) are real
        plain = type(model)._from_config(model_config, dtype=model.dtype)  # what auto classes call
    tensors = dict(persistent_tensors(model))
    found = plain.load_state_dict(tensors, strict=False, assign=True)  # tied weights appear under one name only
    plain.tie_weights()
    absent = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    absent += set(found.missing_keys) & {name for name, _ in plain.named_buffers()}
    if absent or found.unexpected_keys:
        names = ", ".join([*absent, *found.unexpected_keys][:3])
        raise ConfigError(f"--mode merge: {type(model).__name__} cannot be made anew from its configuration: {names}")
    plain.generation_config = model.generation_config
    return plain.eval()


def persistent_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value, unpacked and on the CPU, of each tensor that a model's file holds.

    Among the buffers are numbers that were learned, such as the biases with which DeepSeek's router chooses experts.
    """
    for prefix, module in model.named_modules():
        kept = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        for name, tensor in [*module._parameters.items(), *((name, module._buffers[name]) for name in kept)]:
            if tensor is None:
                continue
            if isinstance(module, PackedExperts) and name in module.packed_names:
                tensor = unpacked(tensor)
            elif isinstance(tensor, bnb.nn.Params4bit):
                tensor = bnb.functional.dequantize_4bit(tensor.data, tensor.quant_state)
                if getattr(module, "source_cls", None) is Conv1D:  # it holds [inputs, outputs]
                    tensor = tensor.T.contiguous()
            yield f"{prefix}.{name}" if prefix else name, tensor.data.cpu()


def merge_adapter(peft_model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Return the base with the adapter added in fp32 by peft's own merge; each weight is rounded to `dtype` once.

    Weights in fp32 hold the rounded values in fp32, so that the model still computes where some layer multiplies them by
    buffers or states that are in fp32; `write_folder` writes them in bfloat16.
    """
    base = peft_model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, LoraLayer) and head.get_base_layer().weight is embedding.weight:
        raise ConfigError(
            "--mode merge: the adapter changes the output head, which shares its weight with the embedding"
        )
    check_shared(peft_model)
    for module in [m for m in peft_model.modules() if isinstance(m, LoraLayer)]:
        weight = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
        own, weight.data = weight.dtype, weight.data.float()
        module.merge(safe_merge=True)
        weight.data = rounded(weight.data, dtype, own)
    for module in [m for m in peft_model.modules() if isinstance(m, TrainableTokensLayer)]:
        module.merge(safe_merge=True)
    plain = peft_model.unload()
    for parameter in plain.parameters():  # not plain.to(dtype), which would round the rotary frequencies too
        parameter.data = rounded(parameter.data, dtype, parameter.dtype)
    return plain


def check_shared(model: PeftModel) -> None:
    """Raise ConfigError if modules with adapters of their own share one weight, as in Zamba's shared block."""
    seen: dict[int, str] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            other = seen.setdefault(id(module.get_base_layer().weight), name)
            if other != name:
                raise ConfigError(
                    f"--mode merge: {other} and {name} share one weight, to which each has an adapter of its own; use the "
                    "adapter without merging"
                )


def rounded(weights: torch.Tensor, dtype: torch.dtype, own: torch.dtype) -> torch.Tensor:
    """Return weights rounded to `dtype`, held in fp32 if that is their own type."""
    weights = weights.to(dtype)
    return weights.float() if own is torch.float32 else weights


def with_ends(model: PreTrainedModel, ends: list[int]) -> None:
    """Have `generate`, and whatever else reads the model's generation_config.json, stop at each of these tokens."""
    model.generation_config = copy.deepcopy(model.generation_config)
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    model.generation_config.eos_token_id = [*own, *(end for end in ends if end not in own)]
    model.generation_config._from_model_config = False  # or transformers would make it anew from config.json


def moved(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far logits are apart, as a share of how much they vary. found, expected: [tokens, vocabulary].

    It is the median of the tokens: where an expert is chosen otherwise by a hair, single tokens differ much.
    """
    varies = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - expected).square().mean(-1).sqrt().median() / varies)


DRAWS = 3  # some models amplify one draw of rounding errors three times as much as another


def moved_by_rounding(merged: PreTrainedModel, ids: list[int], found: torch.Tensor) -> float:
    """Return how far the logits of a model with weights of bfloat16 move if they are rounded otherwise, at most in DRAWS draws.

    Rounding puts a weight off by up to half of the step between two numbers, its square by a twelfth of the step's on
    average. Errors as large, on other weights, come from changing the last bit of one weight in twelve. found: the
    logits without it.
    """
    return max(moved(logits_on_rounded(merged, ids, seed), found) for seed in range(DRAWS))


@torch.inference_mode()
def logits_on_rounded(merged: PreTrainedModel, ids: list[int], seed: int) -> torch.Tensor:
    """Return logits_on with the last bit of one bfloat16 weight in twelve changed; afterwards the bits are as before.

    The last bit of a bfloat16 number is bit 16 of the same number in fp32.
    """

    def change() -> None:
        drawn = torch.Generator().manual_seed(seed)
        for parameter in merged.parameters():
            bits, last = (torch.int32, 2**16) if parameter.dtype is torch.float32 else (torch.int16, 1)
            which = torch.randint(0, 12, parameter.shape, generator=drawn, dtype=torch.int8) == 0
            parameter.data.view(bits).bitwise_xor_(which.to(parameter.device, bits) * last)

    change()
    try:
        return logits_on(merged, ids)
    finally:
        change()


def check_logits(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
    """Raise ConfigError if a merged model's logits differ from those of base and adapter by more than twice `rounding`.

    found, expected: [tokens, vocabulary]. rounding: moved_by_rounding.
    """
    if not (apart := moved(found, expected)) <= 2 * rounding:
        raise ConfigError(
            f"--mode merge: expected the logits of base and adapter within rounding, got a difference of {apart:.1%} of "
            f"how much they vary, where rounding makes {rounding:.1%}; nothing is written. Use the adapter without merging"
        )


@torch.inference_mode()
def logits_on(model: PeftModel | PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the model's logits, fp32 on the CPU [tokens, vocabulary]."""
    with reading(model.get_base_model() if isinstance(model, PeftModel) else model, f"{len(ids)} tokens"):
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


def class_line(model: PreTrainedModel) -> list[str]:
    """Return a line if only a model's own class loads it, as the language half of Llama 3.2 Vision alone; else []."""
    known = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(model.config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if known or getattr(model.config, "auto_map", None):
        return []
    name = type(model).__name__
    return [f"AutoModelForCausalLM does not know this part of a model alone: load it with transformers.{name}"]


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    revision: str | None = None,
    files: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a model in bfloat16 that plain transformers loads. The folder gets its name only after all files are written.

    Return what `write_tokenizer` and `class_line` have to say. revision: of a base from the hub. files: names and texts
    of further files.
    """
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(".writing-" + folder.name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, max_shard_size="2GB")
        lines = add_older_keys(temporary, model.config)
        lines += class_line(model) + write_tokenizer(temporary, tokenizer, revision)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
        for path in temporary.iterdir():  # safetensors makes files that only their owner can read
            shutil.copymode(temporary / "config.json", path)
        if folder.is_dir():
            folder.rmdir()  # parse saw that it is empty; this raises an error if it is not any more
        os.rename(temporary, folder)
        return lines
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
