"""Merge a base and its adapter into one plain model."""

import copy
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from config import ConfigError
from toolkit.merged_folder import add_older_keys, write_tokenizer


def plain_copy(model: PreTrainedModel, remote: bool) -> PreTrainedModel:
    """Return an unquantised copy on the CPU, whose weights are the dequantised values with which the model multiplies.

    The copy is made from the model in memory: no 16-bit file is read, so a base stored in 4 bit works too. Weights that
    are on the CPU and not packed are shared with the model.
    """
    model_config = copy.deepcopy(model.config)
    vars(model_config).pop("quantization_config", None)
    with init_empty_weights():  # parameters need no memory yet; buffers (rotary frequencies) are real
        plain = AutoModelForCausalLM.from_config(model_config, dtype=model.dtype, trust_remote_code=remote)
    weights = {}
    for name, p in model.named_parameters():
        packed = isinstance(p, bnb.nn.Params4bit)
        weights[name] = (bnb.functional.dequantize_4bit(p.data, p.quant_state) if packed else p.data).cpu()
    plain.load_state_dict(weights, strict=False, assign=True)  # not strict: tied weights appear under one name only
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def merge_adapter(peft_model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Return the base with the adapter added in fp32 by peft's own merge; each weight is rounded to `dtype` once."""
    base = peft_model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, LoraLayer) and head.get_base_layer().weight is embedding.weight:
        raise ConfigError(
            "--mode merge: the adapter changes the output head, which shares its weight with the embedding"
        )
    for module in [m for m in peft_model.modules() if isinstance(m, LoraLayer)]:
        weight = module.get_base_layer().weight
        weight.data = weight.data.float()
        module.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    plain = peft_model.unload()
    for parameter in plain.parameters():  # not plain.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return plain


def with_ends(model: PreTrainedModel, ends: list[int]) -> None:
    """Have `generate`, and whatever else reads the model's generation_config.json, stop at each of these tokens."""
    model.generation_config = copy.deepcopy(model.generation_config)
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    model.generation_config.eos_token_id = [*own, *(end for end in ends if end not in own)]
    model.generation_config._from_model_config = False  # or transformers would make it anew from config.json


@torch.inference_mode()
def logits_on(model: PeftModel | PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the model's logits, fp32 on the CPU [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


def write_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, revision: str | None = None
) -> list[str]:
    """Write a model that plain transformers loads. The folder gets its name only after all files are written.

    Return what `write_tokenizer` has to say. revision: of a base from the hub.
    """
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(".writing-" + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, max_shard_size="2GB")
        add_older_keys(temporary, model.config)
        lines = write_tokenizer(temporary, tokenizer, revision)
        for path in temporary.iterdir():  # safetensors makes files that only their owner can read
            shutil.copymode(temporary / "config.json", path)
        if folder.is_dir():
            folder.rmdir()  # parse saw that it is empty; this raises an error if it is not any more
        os.rename(temporary, folder)
        return lines
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
