"""A small random model of every class that transformers maps to causal language modelling, and what the toolkit makes of each.

python tests/families.py --table --jobs 2    examine all families, two at a time (about half an hour), and write docs/models.md
python tests/families.py --table gpt2        examine these families alone and renew their rows
python tests/families.py --table --jobs 16 --results FILE    keep every finding in FILE; the same command goes on after a stop
python tests/families.py --known FILE        write docs/models.md from FILE and print KNOWN of tests/test_models.py
python tests/families.py --build gpt2 DIR    write the small model of a family into a folder, to try things with
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

# Before torch and the libraries of Hugging Face are imported: nothing asks the network, and one thread is the fastest here.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import get_keys_to_not_convert

import inference_example
import quantization_utils
import train_qlora
from fast_path.families import routers
from toolkit.expert_plan import expert_shape

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tiny" / "model"

# The most used first: these run in every CI, all others before a change of loading, layers, loss or merge lands.
MOST_USED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
)
MOST_USED += ("opt", "falcon", "starcoder2", "qwen3_moe", "mixtral", "gpt_oss", "granite", "smollm3", "olmo2")

# ------------------------------------------------------------------------------------------------ sizes

# What attributes of a config become, whatever the family. A name that is not here keeps the family's default.
WIDTH, HEADS, HEAD, VOCABULARY, POSITIONS, WINDOW, LAYERS = 64, 4, 16, 4096, 128, 12, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim_model"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "word_embed_proj_dim", "embedding_size"), WIDTH),
    "hidden_size_global": WIDTH,
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "hidden_size_per_layer_input"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "dff", "dim_ff"), 2 * WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 2 * WIDTH),
    **dict.fromkeys(("dense_intermediate_size", "mamba_intermediate", "mamba_d_ssm"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), HEADS // 2),
    **dict.fromkeys(("num_global_key_value_heads", "linear_num_key_heads", "index_n_heads"), HEADS // 2),
    **dict.fromkeys(("linear_num_value_heads", "n_mamba_heads"), HEADS),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 2 * WIDTH // HEAD),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_dim", "kv_channels", "d_head", "dim_head"), HEAD),
    **dict.fromkeys(("global_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "swa_v_head_dim"), HEAD),
    **dict.fromkeys(("attention_head_size", "mamba_d_head", "mamba_head_dim", "rotary_dim"), HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "mamba_dt_rank", "hc_lowrank"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), HEAD),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "context_length"), POSITIONS),
    # shorter than a block of 32 tokens, so that a window that is forgotten changes the loss
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("window_size", "attention_chunk_size", "keep_window_size"), WINDOW),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size", "index_block_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 5.0),
    "query_pre_attn_scalar": HEAD,
    "initializer_range": 0.08,
    # factors that are 1 by default, so that one which is forgotten would not show
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "lm_head_multiplier", "ssm_out_multiplier"), 1.5),
    **dict.fromkeys(("residual_multiplier", "attention_multiplier", "key_multiplier", "attention_in_multiplier"), 0.7),
    **dict.fromkeys(("attention_out_multiplier", "ssm_in_multiplier"), 0.8),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 1.5),
    "is_decoder": True,
    "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip

# Lists with an entry per layer: the small model has each kind that the default has once.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")
BIASES = re.compile(r"^(attention_bias|mlp_bias|qkv_bias|use_bias|bias|use_qkv_bias)$")
DROPOUT = re.compile(r"(dropout|pdrop|dropout_prob|dropout_p|drop_rate)$")


@dataclasses.dataclass(frozen=True)
class Exceptional:
    """How one family differs from what the table of sizes makes of it, and why."""

    why: str
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the text config, or name of a sub-config: dict
    flags: tuple[str, ...] = ()  # of the scripts
    targets: str = ""  # instead of all-linear: [names]
    refuses: dict[str, str] = dataclasses.field(default_factory=dict)  # column: words of the refusal that is right
    impossible: str = ""  # words of the error with which plain transformers or peft refuses to build or train it
    cls: str = ""  # the class that checkpoints have, where it is another than the one for causal language modelling
    of: str = ""  # the family, if this is a variant of one
    derived: str = ""  # a pattern of saved buffers that follow from others or from the configuration


SEVEN = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"
IN_16_BIT = ("--experts", "16bit")  # experts of a layout of their own
MAMBA_TARGETS = "[in_proj, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
EXCEPTIONS: dict[str, Exceptional] = {
    "bamba": Exceptional(
        "its default has no attention layer; peft refuses out_proj", {"attn_layer_indices": [1]}, targets=MAMBA_TARGETS
    ),
    "cohere_compass_text": Exceptional(
        "its rotary angles are by kind of layer",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}},
    ),
    "dbrx": Exceptional(
        "its sizes are in two more configs",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
        IN_16_BIT,
    ),
    "deepseek_v2": Exceptional("experts per token have no default", {"num_experts_per_tok": 2}),
    "diffllama": Exceptional("its attention refuses dropout", {"attention_dropout": 0.0}),
    "doge": Exceptional(  # equal tokens have equal scores in the first layer, and topk may keep either
        "no two scores are equal where its attention stops to see tokens", {"keep_window_size": 20}
    ),
    "dory": Exceptional(
        "layers are counted in three parts",
        {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
         "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "dots1": Exceptional("its experts have no default", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}),
    "falcon_h1": Exceptional("peft refuses out_proj", targets=MAMBA_TARGETS),
    "gemma3n_text": Exceptional(
        "each kind of layer needs one that makes a cache",
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
         "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": [128] * 4},
        impossible="type unsigned char",  # in training it clamps a weight that is in 4 bit
    ),
    "gpt_neo": Exceptional("layers are listed in attention_types", {"attention_types": [[["global", "local"], 1]]}),
    "granitemoehybrid": Exceptional(
        "its default has no attention layer", TWO_KINDS,
        targets="[in_proj, q_proj, k_proj, v_proj, o_proj, input_linear, output_linear]",
    ),
    "jamba": Exceptional(
        "layers follow from periods",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
        targets=MAMBA_TARGETS,
    ),
    "lfm2_moe": Exceptional("its default has no layer types", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": Exceptional("heads fill the inner width", {"num_heads": 8}, targets="[in_proj]"),
    "mpt": Exceptional("dropout of attention is an int", {"attn_config": {"attn_pdrop": 0}}),
    "nemotron": Exceptional("heads have no default", {"num_key_value_heads": 2}),
    "nemotron_h": Exceptional(
        "peft refuses out_proj", targets="[in_proj, q_proj, k_proj, v_proj, o_proj, up_proj, down_proj]"
    ),
    "reformer": Exceptional(
        "positions are a grid that a training block fills",
        {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "local"],
         "local_attn_chunk_length": 8, "max_position_embeddings": 32},
        impossible="does not require grad",  # its reversible layers need a trained embedding
    ),
    "roc_bert": Exceptional(
        "it embeds shape and sound too",
        {"shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    ),
    "blt": Exceptional(
        "it reads bytes in patches", {"encoder_hash_byte_group_vocab": 512}, refuses={"plan": "no memory plan"}
    ),
    "dots3_note": Exceptional(
        "its adapters are as wide as what they join",
        {"vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_bias": False},
         "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16}},
        cls="Dots3NoteForConditionalGeneration",
    ),
    "emu3": Exceptional(
        "a wrapper", {"vocabulary_map": {"<image>": 1}, "vq_config": {"base_channels": 32}},
        cls="Emu3ForConditionalGeneration", impossible="compress_statistics",  # the names of its file are not translated
    ),
    "musicgen": Exceptional("it continues sound", impossible="no attribute 'dropout'"),
    "musicgen_melody": Exceptional("it continues sound", impossible="no attribute 'dropout'"),
    "gemma3n": Exceptional("", impossible="requires the timm library"),
    "gemma4_assistant": Exceptional(
        "it continues another model's states", {"hidden_size_per_layer_input": 0}, impossible="hidden_size_per_layer_input"
    ),
    "gemma4_unified_assistant": Exceptional("it continues another model's states", impossible="shared_kv_states cannot"),
    "llama4": Exceptional(
        "a wrapper; peft cannot adapt its router", flags=IN_16_BIT, targets=SEVEN, cls="Llama4ForConditionalGeneration",
    ),
    "llama4_text": Exceptional("peft cannot adapt its router", {"floor_scale": 8}, IN_16_BIT, SEVEN),
    "jetmoe": Exceptional("experts of a layout of its own", flags=IN_16_BIT),
    "mamba": Exceptional("peft refuses out_proj", targets="[in_proj]", impossible="of batch2 tensor to be"),
    "rwkv": Exceptional(
        "its quantised weights cannot be rescaled, as it does in eval mode",
        refuses=dict.fromkeys(("loss", "gradients", "dropout", "merge"), "attribute 'weight' already exists"),
        impossible="attribute 'weight' already exists",
    ),
    "minimax": Exceptional("its decays follow from the number of heads", derived=r"slope_rate|_decay"),
    "xlnet": Exceptional("its layers read tokens before sequences", refuses={"dropout": "dropout 0"}),
    "phimoe": Exceptional("peft cannot adapt its router", targets=ATTENTION),
    "longcat_flash": Exceptional("its router reads its weight itself", flags=IN_16_BIT, targets="[q_a_proj, q_b_proj, kv_a_proj_with_mqa, o_proj]"),
    "deepseek_v4": Exceptional("no small config runs in plain transformers yet", impossible="The size of tensor a (32)"),
    "mllama": Exceptional("a wrapper", cls="MllamaForConditionalGeneration"),
    "falcon_mamba": Exceptional("peft refuses out_proj", targets="[in_proj]"),
    "phi3": Exceptional("a window is off by default", {"sliding_window": WINDOW}),
    "starcoder2": Exceptional("a window is off by default", {"sliding_window": WINDOW}),
    # variants of a family that take other ways through the code
    "qwen3_moe_attention": Exceptional("experts without an adapter", targets=ATTENTION, of="qwen3_moe"),
    "glm4_moe_attention": Exceptional("experts without an adapter", targets=ATTENTION, of="glm4_moe"),
    "deepseek_v3_attention": Exceptional(
        "experts without an adapter", targets="[q_a_proj, q_b_proj, kv_a_proj_with_mqa, o_proj]", of="deepseek_v3"
    ),
    "falcon_alibi": Exceptional("biases of attention instead of positions", {"alibi": True}, of="falcon"),
    "falcon_new": Exceptional("grouped heads", {"new_decoder_architecture": True}, of="falcon"),
    "qwen2_window": Exceptional(
        "one layer has a window", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        of="qwen2",
    ),
    "phi3_longrope": Exceptional(
        "the rotary scale follows the length",
        {"original_max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64}}, of="phi3",
    ),
    "qwen3_5": Exceptional("a wrapper", cls="Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": Exceptional("a wrapper", cls="Qwen3_5MoeForConditionalGeneration"),
    "mistral3": Exceptional("a wrapper that AutoModelForCausalLM does not know", cls="Mistral3ForConditionalGeneration"),
    "qwen2_5_vl": Exceptional(
        "a wrapper that AutoModelForCausalLM does not know",
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}},
        cls="Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Exceptional("a wrapper that AutoModelForCausalLM does not know", cls="Qwen3VLForConditionalGeneration"),
    "qwen4_exp": Exceptional(
        "a wrapper",
        {"text_config": {
            "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
            "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}},
        cls="Qwen4ExpForConditionalGeneration",
    ),
    "qwen4_exp_text": Exceptional(
        "its index has no default sizes",
        {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
         "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
    "zamba": Exceptional(
        "its shared block is used twice", refuses={"merge": "share one weight"}, sizes={"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
         "attention_hidden_size": 128, "attention_head_dim": 32, "use_mamba_kernels": False},
    ),
    "xlstm": Exceptional("keys are half as wide as values", {"num_heads": 4, "qk_dim_factor": 1.0}),
    "xmod": Exceptional("it needs a language", {"languages": ["en_XX"], "default_language": "en_XX"}),
    "zaya": Exceptional("one expert per token", {"num_experts_per_tok": 1}),
}  # fmt: skip


def drops_out(family: str) -> bool:
    """Return whether the small model of a family gets the dropout of its own that its config allows: half of them do."""
    return zlib.crc32(family.encode()) % 2 == 0


def kinds_of(default: PretrainedConfig) -> dict[str, list[str]]:
    """Return the per-layer lists of a config, shortened: each kind of layer once, and as many entries in every list."""
    found = {name: vars(default).get(name) for name in PER_LAYER}
    kinds = {name: list(dict.fromkeys(value)) for name, value in found.items() if isinstance(value, (list, tuple))}
    count = max([LAYERS, *map(len, kinds.values())])
    return {name: (value * count)[:count] if len(value) > 1 else value * count for name, value in kinds.items()}


def sizes_of(cls: type[PretrainedConfig], dropout: bool, own: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a config of a class small; own: those of EXCEPTIONS, sub-configs as dicts."""
    subs, fields = dict(cls.sub_configs), {field.name: field for field in dataclasses.fields(cls)}
    default = default_of(cls, own)
    sizes: dict[str, Any] = {}
    for name in fields:
        # not getattr, which refuses what differs from layer to layer
        value = vars(default).get(cls.attribute_map.get(name, name))
        if name in subs:
            kind = type(value) if isinstance(value, PretrainedConfig) else subs[name]
            if isinstance(value, PretrainedConfig) and name not in own:
                sizes[name] = sizes_of(kind, dropout, {})
        elif name in SIZES and (value is not None or name.endswith("_token_id") or name == "head_dim"):
            sizes[name] = SIZES[name]
        elif BIASES.match(name):
            sizes[name] = True
        elif DROPOUT.search(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            sizes[name] = 0.1 if dropout else 0.0
    for alias, name in cls.attribute_map.items():  # such as GPT-2's n_layer for num_hidden_layers
        if name in fields and name not in sizes and alias in SIZES and vars(default).get(name) is not None:
            sizes[name] = SIZES[alias]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention gives each head its own k and v
        sizes["num_key_value_heads"] = HEADS
    lists = kinds_of(default)
    layers = next((name for name in ("num_hidden_layers", "n_layer") if name in fields), None)
    if lists and layers:
        sizes |= {layers: len(next(iter(lists.values()))), **{k: v for k, v in lists.items() if k in fields}}
    for name, value in own.items():
        nested = isinstance(value, dict) and name in subs
        kind = type(getattr(default, name)) if nested else None
        sizes[name] = sizes_of(kind, dropout, value) if nested else value
    return sizes


def default_of(cls: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    try:
        return cls()
    except Exception:  # the class's own defaults contradict each other
        return cls(**{name: value for name, value in own.items() if name not in cls.sub_configs})


def families() -> list[str]:
    """Return the names of all families, the most used first."""
    known = [*MOST_USED, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *EXCEPTIONS]
    return list(dict.fromkeys(known))


def fresh_model(family: str) -> PreTrainedModel:
    """Return a random small model of a family as its class initialises it, fp32."""
    odd = EXCEPTIONS.get(family, Exceptional(""))
    cls = CONFIG_MAPPING[odd.of or family]
    config = cls(**sizes_of(cls, drops_out(family), odd.sizes))
    torch.manual_seed(zlib.crc32(family.encode()))
    name = odd.cls or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[odd.of or family]
    return getattr(transformers, name)(config).float()


def small_model(family: str) -> PreTrainedModel:
    """Return a random model of a family whose norms, biases and persistent buffers are not trivial, fp32."""
    model = fresh_model(family)
    unsettle(model, EXCEPTIONS.get(family, Exceptional("")).derived)
    return model.eval()


@torch.no_grad()
def unsettle(model: PreTrainedModel, derived: str = "") -> None:
    """Give a model weights with which each part is felt, and no two tokens are as good as equal.

    derived: a pattern of buffers that stay as they are, since others follow from the same numbers.

    Vectors are where a fresh model is trivial: a norm of ones, a bias of zeros. Buffers likewise, as far as they are
    saved: zeros for the routing biases that a trained MoE has.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    for parameter in model.parameters():
        if id(parameter) in matrices or parameter.ndim == 3:
            nn.init.normal_(parameter, std=1.2 * WIDTH**-0.5)
        elif parameter.ndim == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        free = not derived or not re.search(derived, name)
        if name in saved and free and buffer.is_floating_point() and buffer.numel() <= VOCABULARY:
            buffer.add_(torch.empty_like(buffer).uniform_(-0.3, 0.3))


def build(family: str, folder: Path) -> Path:
    """Write the small model of a family, in bfloat16, and the tiny model's tokenizer into a folder."""
    model = small_model(family).to(torch.bfloat16)
    if broken := [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise ValueError(f"{broken[0]} is not finite")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


# ------------------------------------------------------------------------------------------------ what plain code says

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
# The towers of a model that also sees or hears: text trains its language half alone.
OTHER_SENSES = r".*(vision|visual|audio|image|multi_modal|mm_projector|embed_vision|embed_audio).*"
NEW_TOKENS, LENGTH = 8, 32
PROMPTS = ["The", "What is the matter with thee? I know not what thou sayest, my lord, but I will hear.", "To be"]


@torch.no_grad()
def through_four_bit(model: nn.Module) -> None:
    """Give each tensor of routed experts in transformers' common layout the values that it has in NF4."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if hasattr(module, "is_transposed") else ():
            if parameter.ndim == 3:
                rows = parameter.data.reshape(-1, 64)  # a row per block: see fast_path/experts.py
                codes, state = bnb.functional.quantize_4bit(rows, quant_type="nf4", compress_statistics=True)
                parameter.copy_(bnb.functional.dequantize_4bit(codes, state).view(parameter.shape))


class Plain:
    """The small model of a family in 4 bit with an adapter, by transformers, peft and bitsandbytes alone, in fp32."""

    def __init__(self, family: str, folder: Path):
        self.family, self.folder = family, folder
        torch.manual_seed(1)
        self.odd = EXCEPTIONS.get(family, Exceptional(""))
        targets = self.odd.targets.strip("[]").split(", ") if self.odd.targets else "all-linear"
        base = self.base()
        apart = "|".join([OTHER_SENSES, *map(re.escape, routers(base))])
        config = LoraConfig(**LORA, target_modules=targets, exclude_modules=apart)
        if targets == "all-linear":  # in mixtures peft adds the router, which the toolkit leaves frozen
            convert_peft_config_for_transformers(config, base, None)
            config.target_parameters = {t for t in config.target_parameters or () if t != "gate.weight"} or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most models have no such towers to exclude
            self.model = get_peft_model(base, config).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def base(self) -> PreTrainedModel:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        small = small_model(self.family)
        if kept := routers(small):  # stay in 16 bit, as the head does by default
            names = [*get_keys_to_not_convert(small), *kept]  # of a wrapper, whose text model alone may be loaded
            quantized.llm_int8_skip_modules = [name.removeprefix("language_model.") for name in names]
        known = (self.odd.of or self.family) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        cls = AutoModelForCausalLM if known else getattr(transformers, self.odd.cls)
        model = cls.from_pretrained(self.folder, quantization_config=quantized, dtype=torch.float32, device_map="cpu")
        through_four_bit(model)
        model.generation_config = (
            transformers.GenerationConfig()
        )  # the scripts' answers follow their own settings alone
        return model.eval()

    def logits(self, ids: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        return (model or self.model)(input_ids=ids, use_cache=False).logits.float()

    def loss(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean loss over the tokens of some blocks, each [tokens], with its graph."""
        # padded on the right as in training: MiniMax's sums over parts of a text see where it ends
        logits = [self.logits(F.pad(block, (0, LENGTH - len(block)))[None])[0, : len(block) - 1] for block in blocks]
        return F.cross_entropy(torch.cat(logits), torch.cat([block[1:] for block in blocks]))

    def gradients(self, blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        self.loss(blocks).backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: torch.zeros_like(self.start[name]) if g is None else g for name, g in found.items()}

    @torch.no_grad()
    def answers(self, prompts: list[str], together: bool) -> list[str]:
        """Return the greedy answers, without any cache; together: in one batch, padded on the left."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        texts = []
        for batch in [rows] if together else [[row] for row in rows]:
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            config = transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False, eos_token_id=[0, 2], pad_token_id=0
            )
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
            texts += tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def merged(self, ids: torch.Tensor, adapter: Path) -> tuple[torch.Tensor, float]:
        """Return the logits of the dequantised base with the adapter added in fp32, and how far casting to bf16 moves them."""
        base = self.base()
        if any(isinstance(module, bnb.nn.Linear4bit) for module in base.modules()):  # Falcon has no linear that can be
            base = base.dequantize()
        both, own = PeftModel.from_pretrained(base, adapter), dict(self.model.named_parameters())
        for name, parameter in both.named_parameters():
            if name in self.start:  # peft does not find all that it saved of Laguna
                parameter.copy_(own[name])
        model = both.merge_and_unload(safe_merge=True).eval()
        exact = self.logits(ids, model)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        return exact, (self.logits(ids, model) - exact).abs().max().item()


# ------------------------------------------------------------------------------------------------ what the toolkit does


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one thing that a family was asked for."""

    status: str  # ok, refused (exit 2 with one line), wrong, traceback; impossible: plain transformers and peft cannot
    detail: str = ""
    right: bool = True  # ok, or a refusal that is the right answer, in the right words

    def __str__(self) -> str:
        return self.status + (f": {self.detail}" if self.detail else "")


COLUMNS = ("loss", "gradients", "dropout", "answer", "batch", "merge", "plan")


def in_toolkit(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an error's traceback that are in the toolkit's own files."""
    files = [(frame, Path(frame.filename)) for frame in traceback.extract_tb(error.__traceback__)]
    return [frame for frame, path in files if path.is_relative_to(ROOT) and "tests" not in path.parts]


def shortened(error: BaseException) -> str:
    """Return an error's type, its first line and the place in the toolkit where it arose."""
    own = in_toolkit(error)
    place = f" ({Path(own[-1].filename).name}:{own[-1].name})" if own else ""
    text = re.sub(r"/\S*/(?=(model|adapter|merged)\b)", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:160]}{place}"


class Refused(Exception):
    """A script ended with exit code 2 and one line."""


class Wrong(Exception):
    """A script did something that differs from plain code, or ended in another way than with a result or a refusal."""


def call(main: Callable[[list[str]], int], *argv: object) -> str:
    """Run a script's main and return what it printed on stdout; raise Refused, Wrong, or whatever main raises."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    if code == 2 and len(errors) == 1:
        raise Refused(re.sub(r"/\S*/(?=(model|adapter|merged)\b)", "", errors[0]))
    if code:
        raise Wrong(f"exit {code}: {' | '.join(errors) or err.getvalue()[-200:]}")
    return out.getvalue()


def judged(check: Callable[[], None], words: str = "", impossible: str = "") -> Outcome:
    """Return what came of a check.

    words: of the refusal that would be right here, if one would; impossible: of the error that plain code raises, if so.
    """
    try:
        check()
    except Refused as refusal:
        return Outcome("refused", str(refusal).removeprefix("error: ")[:200], bool(words) and words in str(refusal))
    except Wrong as error:
        return Outcome("wrong", str(error), False)
    except Exception as error:
        if not in_toolkit(error):  # of plain code, or of this file
            return Outcome("impossible", shortened(error), bool(impossible) and impossible in str(error))
        return Outcome("traceback", shortened(error), False)
    return Outcome("ok")


class Examination:
    """Everything that one family is asked for, through the scripts' own main functions, in this process."""

    def __init__(self, family: str, folder: Path):
        self.family, self.folder = family, folder
        self.odd = EXCEPTIONS.get(family, Exceptional(""))
        self.model, self.adapter = folder / "model", folder / "adapter"
        self.run: Any = None
        self.taken: dict[str, torch.Tensor] = {}
        self.blocks: list[torch.Tensor] = []

    def outcomes(self) -> dict[str, Outcome]:
        """Return what came of each of COLUMNS; where plain code cannot train, only of the training, and why."""
        try:
            build(self.family, self.model)
            self.plain = Plain(self.family, self.model)
            self.plain.model.train()
            self.plain.gradients([torch.arange(3, 3 + LENGTH)])
            self.plain.model.eval()
            self.plain.model.save_pretrained(self.adapter, save_embedding_layers=False)
        except Exception as error:
            found = {"plain": Outcome("impossible", shortened(error))}
            if self.model.is_dir():  # what can be loaded may be given to the toolkit: it says in a line that it cannot
                found["loss"] = judged(lambda: self.train("run"), "error: ")
            return found
        refusals = dict(self.odd.refuses)
        if self.plain.model.peft_config["default"].target_parameters:  # experts: peft has no dropout for them
            refusals["dropout"] = "dropout 0"
        found: dict[str, Outcome] = {}
        for column in COLUMNS:
            if column == "gradients" and not self.taken:  # the run of `loss` did not reach its step
                found[column] = found["loss"]
            else:
                found[column] = judged(getattr(self, column), refusals.get(column, ""), self.odd.impossible)
        return found

    def flags(self) -> tuple[object, ...]:
        targets = self.odd.targets or "all-linear"
        return ("--model_name", self.model, "--compute_dtype", "float32", "--target_modules", targets, *self.odd.flags)

    def train(self, output: str, *flags: object) -> None:
        """Take one step on two blocks from the adapter of `plain`, and keep the gradients that the optimizer meets."""
        step = train_qlora.training_step

        def watched(run: Any, number: int, window: Any, *rest: Any) -> Any:
            self.run, self.taken = run, {}
            named = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
            if named.keys() != self.plain.start.keys():
                raise Wrong(f"trains {len(named)} tensors, peft {len(self.plain.start)}")
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(self.plain.start[name])
            run.optimizer.register_step_pre_hook(
                lambda *_: self.taken.update({n: p.grad.clone() for n, p in named.items()})
            )
            self.blocks = [torch.as_tensor(run.blocks["train"][int(i)]) for i in window]
            return step(run, number, window, *rest)

        train_qlora.training_step = watched
        try:
            call(
                train_qlora.main, "--config", ROOT / "tiny" / "config.yaml", *self.flags(), "--dataset",
                self.folder.parent / "plays.txt", "--output_dir", self.folder / output, "--max_length", LENGTH,
                "--rank", LORA["r"], "--alpha", LORA["lora_alpha"], "--max_steps", 1, "--optim", "adamw_torch",
                "--max_grad_norm", 1e9, "--compile", "off", "--validation_fraction", 0.2, *flags,
            )  # fmt: skip
        finally:
            train_qlora.training_step = step

    def loss(self) -> None:
        """The loss at step 0 equals that of plain transformers on the same blocks."""
        self.train("run", "--batch_size", 2, "--gradient_accumulation_steps", 1, "--lora.dropout", 0,
                   "--gradient_checkpointing", "true")  # fmt: skip
        held = self.run.blocks["validation"]
        with torch.no_grad(), self.plain.model.disable_adapter():
            expected = self.plain.loss([torch.as_tensor(held[i]) for i in range(len(held))]).item()
        found = self.run.progress.evaluations[0]["eval_loss"]
        if not abs(found - expected) < 1e-5 * expected:
            raise Wrong(f"loss {found:.6f}, plain {expected:.6f}")

    def gradients(self) -> None:
        """One step's gradients, at batch 2 and with checkpointing, equal plain peft's with all dropout off."""
        apart = distance(self.taken, self.plain.gradients(self.blocks))
        if not apart < 1e-4:
            raise Wrong(f"relative error {apart:.1e}")

    def dropout(self) -> None:
        """With dropout in the adapter, two sequences in one micro-batch learn what they learn one after the other."""
        found = []
        for size, accumulation in ((2, 1), (1, 2)):
            shape = ("--batch_size", size, "--gradient_accumulation_steps", accumulation)
            self.train(f"dropout-{size}", *shape, "--lora.dropout", 0.1, "--gradient_checkpointing", "true")
            found.append(self.taken)
        if not (apart := distance(*found)) < 1e-4:
            raise Wrong(f"one by one differs from both at once by {apart:.1e}")
        if not (felt := distance(found[0], self.plain.gradients(self.blocks))) > 1e-3:
            raise Wrong(f"the dropout changes the gradients by no more than {felt:.1e}")

    def infer(self, *flags: object) -> str:
        return call(inference_example.main, "--adapter", self.adapter, *self.flags()[:4], *flags)

    def answer(self) -> None:
        """One prompt after another gets the answer of peft's generate without a cache."""
        expected = self.plain.answers(PROMPTS[:2], together=False)
        how = ("--mode", "text", "--raw", "--temperature", 0, "--max_new_tokens", NEW_TOKENS)
        found = [self.infer(*how, "--prompt", prompt).removesuffix("\n") for prompt in PROMPTS[:2]]
        if found != expected:
            raise Wrong(f"answers {found}, peft {expected}")

    def batch(self) -> None:
        """Prompts of several lengths in one batch get the answers of peft's generate without a cache."""
        expected = self.plain.answers(PROMPTS, together=True)
        asked, answered = self.folder / "prompts.jsonl", self.folder / "answers.jsonl"
        asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
        how = ("--mode", "text", "--raw", "--temperature", 0, "--max_new_tokens", NEW_TOKENS)
        self.infer(*how, "--prompts", asked, "--output", answered)
        found = [json.loads(line)["completion"] for line in answered.read_text(encoding="utf-8").splitlines()]
        if found != expected:
            raise Wrong(f"answers {found}, peft {expected}")

    def merge(self) -> None:
        """The merged folder is base + adapter, but for what casting the exact sum to bfloat16 costs."""
        folder = self.folder / "merged"
        self.infer("--mode", "merge", "--output", folder)
        ids = self.blocks[0][None] if self.blocks else torch.arange(3, 3 + LENGTH)[None]
        with torch.no_grad():
            exact, cast = self.plain.merged(ids, self.adapter)
            own = self.plain.model.get_base_model()
            model, loaded = type(own).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            apart = (self.plain.logits(ids, model.eval()) - exact).abs().max().item()
        if loaded["missing_keys"]:
            raise Wrong(f"{sorted(loaded['missing_keys'])[0]} is missing")
        if not apart <= 2 * cast:
            raise Wrong(f"logits differ by {apart:.3f}, casting costs {cast:.3f} of {exact.abs().max():.1f}")

    def plan(self) -> None:
        """--plan counts the trainable weights that peft trains."""
        lora = ("--rank", LORA["r"], "--alpha", LORA["lora_alpha"], "--lora.dropout", 0)
        text = call(train_qlora.main, "--config", ROOT / "tiny" / "config.yaml", *self.flags(), *lora, "--plan")
        found = int(re.search(r"trainable ([\d,]+)", text)[1].replace(",", ""))
        expected = sum(p.numel() for p in self.plain.start.values())
        if found != expected:
            raise Wrong(f"trainable {found:,}, the run {expected:,}")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return how far apart two dicts of tensors are, relative to the second."""
    apart = sum((a[name].double() - b[name].double()).square().sum() for name in b)
    return float((apart / sum(y.double().square().sum() for y in b.values())).sqrt())


@contextlib.contextmanager
def same_products() -> Iterator[None]:
    """Have bitsandbytes multiply as on a CPU without AVX512-BF16, where no product of fp32 is computed in bfloat16.

    Such a product changes the likeliest token where logits are random, and the packing for it breaks the backward pass.
    """
    with contextlib.ExitStack() as patched:
        for module in (bnb.functional, bnb.nn.modules):
            patched.enter_context(mock.patch.object(module, "has_avx512bf16", lambda: False))
        yield


def examine(family: str, folder: Path) -> dict[str, Outcome]:
    """Return what came of each of COLUMNS for a family, whose files go into `folder` and are deleted after."""
    texts = (ROOT / "tiny" / "text" / "train.txt").read_text(encoding="utf-8")
    (folder / "plays.txt").write_text(texts[:2500], encoding="utf-8")
    work = folder / family
    work.mkdir()
    try:
        with same_products():
            return Examination(family, work).outcomes()
    finally:
        shutil.rmtree(work)


# ------------------------------------------------------------------------------------------------ the table

TABLE = ROOT / "docs" / "models.md"
HEAD_OF_TABLE = """\
# Which models train, answer and merge

`python tests/families.py --table --jobs 2` writes this page (about half an hour on two cores; with names of families it renews
their rows only). Each row is a small random model of a class that transformers maps to causal language modelling, in 4 bit on a CPU, in
float32, with an adapter on all linear layers: two layers, grouped heads, windows shorter than the text, biases, soft caps,
norms and saved buffers with values of their own, and in half of the rows the dropout that the config allows.

| column | `ok` means |
|---|---|
| loss | the loss before training equals plain transformers' on the same blocks (relative 1e-5) |
| gradients | those of one step of two sequences with checkpointing equal plain peft's with all dropout off (1e-4) |
| dropout | with dropout in the adapter, two sequences at once learn what they learn one after the other |
| answer | greedy answers to one prompt equal peft's `generate` without a cache |
| batch | so do answers to prompts of several lengths in one batch |
| merge | the merged model's logits are as far from base + adapter as twice what rounding the sum to bfloat16 costs, at most |
| plan | `--plan` counts the weights that are trained |

`refused` is one line and exit code 2; `wrong` is another result than plain code's; `traceback` is a crash. `impossible` means that
plain transformers and peft cannot build or train the model; the note has the reason.

"""


def experts_note(family: str) -> list[str]:
    """Return the words about where a family's routed experts load, 4 or 16 bit; [] without such experts."""
    try:
        with torch.device("meta"):
            shape = expert_shape(fresh_model(family))
    except Exception:  # a model that cannot be built has its reason in the row
        return []
    widths = [f"experts in {width} bit" for width, found in ((4, shape.packed), (16, shape.unknown)) if found]
    return [" and ".join(widths)] if widths else []


def row_of(family: str, found: dict[str, Outcome]) -> str:
    """Return a family's row of the table: what came of each column, and the first reason for what is not ok."""
    cells = [found.get(column, Outcome("impossible" if "plain" in found else "")).status for column in COLUMNS]
    odd = EXCEPTIONS.get(family, Exceptional(""))
    notes = (
        experts_note(family)
        + ([" ".join(odd.flags)] if odd.flags else [])
        + ([f"targets {odd.targets}"] if odd.targets else [])
    )
    notes += list(dict.fromkeys(o.detail.replace("|", "/") for o in found.values() if o.status != "ok"))[:2]
    return f"| {family} | {' | '.join(cells)} | {'; '.join(notes)} |"


def rows_of_table() -> dict[str, str]:
    """Return the rows of docs/models.md by family."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.is_file() else []
    start = next((i for i, line in enumerate(lines) if line.startswith("| family |")), len(lines))
    return {line.split("|")[1].strip(): line for line in lines[start + 2 :] if line.startswith("| ")}


def write_rows(rows: dict[str, str]) -> None:
    """Write docs/models.md with these rows, in the order of `families`; a stop while writing leaves the file before."""
    head = f"| family | {' | '.join(COLUMNS)} | note |\n|{'---|' * (len(COLUMNS) + 2)}\n"
    body = "".join(f"{rows[name]}\n" for name in families() if name in rows)
    new = TABLE.with_suffix(".new")
    new.write_text(HEAD_OF_TABLE + head + body, encoding="utf-8")
    new.replace(TABLE)


LONGEST = 300  # seconds for a family: the slowest takes about 60 where nothing else runs


def into_file(family: str, folder: Path) -> None:
    """Examine a family and write what came of it into a file, in a child process."""
    work = folder / f"{family}.work"
    work.mkdir()
    found = {column: dataclasses.asdict(outcome) for column, outcome in examine(family, work).items()}
    (folder / family).write_text(json.dumps(found), encoding="utf-8")


def examined(names: list[str], jobs: int) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """Yield each family and what came of it, `jobs` of them at a time, each in a child that this process forks.

    A child that crashes or takes longer than LONGEST is a fault of its family alone. This process has computed nothing
    before: autograd refuses to run in the child of one that has.
    """
    fork, waiting = multiprocessing.get_context("fork"), list(names)
    at_work: dict[int, tuple[str, Any, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                child = fork.Process(target=into_file, args=(waiting[0], folder))
                child.start()
                at_work[child.sentinel] = (waiting.pop(0), child, time.monotonic() + LONGEST)
            wait(at_work, timeout=5)
            for sentinel, (family, child, until) in list(at_work.items()):
                if child.is_alive() and time.monotonic() < until:
                    continue
                late = child.is_alive()
                child.kill()
                child.join()
                del at_work[sentinel]
                shutil.rmtree(folder / f"{family}.work", ignore_errors=True)
                if (folder / family).is_file():
                    found = json.loads((folder / family).read_text(encoding="utf-8"))
                    yield family, {column: Outcome(**outcome) for column, outcome in found.items()}
                else:
                    why = f"more than {LONGEST} s" if late else f"the process ended with {child.exitcode}"
                    yield family, {column: Outcome("traceback", why, False) for column in COLUMNS}


def read_results(path: Path | None) -> dict[str, dict[str, Outcome]]:
    """Return what a file of results has of each family; its last line may be cut off where the writer was stopped."""
    found: dict[str, dict[str, Outcome]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            found[entry["family"]] = {column: Outcome(**outcome) for column, outcome in entry["found"].items()}
    return found


def write_table(names: list[str], jobs: int, results: Path | None) -> None:
    """Examine families, and as each is done print its row, renew it in docs/models.md and keep it in a file of results.

    names: of the families; if empty, all of which `results` has nothing.
    """
    known = read_results(results)
    rows = rows_of_table() | {family: row_of(family, found) for family, found in known.items()}
    started = time.monotonic()
    for family, found in examined(names or [name for name in families() if name not in known], jobs):
        rows[family] = row_of(family, found)
        print(f"{time.monotonic() - started:4.0f} s {rows[family]}", flush=True)
        if results:
            entry = {"family": family, "found": {column: dataclasses.asdict(o) for column, o in found.items()}}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        write_rows(rows)


def known_lines(results: dict[str, dict[str, Outcome]], kinds: Callable[[str], dict[str, str]]) -> list[str]:
    """Return the entries of KNOWN that results call for. kinds(family): column to kind, as KNOWN has them; a new fault is kind 0."""
    lines = []
    for family in [name for name in families() if name in results]:
        faults: dict[str, list[str]] = {}
        for column, outcome in results[family].items():
            if not outcome.right and column != "plain":
                faults.setdefault(kinds(family).get(column, "0"), []).append(column)
        if faults:
            parts = [f"{kind} {' '.join(faults[kind])}" for kind in sorted(faults, key=int)]
            lines.append(f"    {json.dumps(family)}: {json.dumps(', '.join(parts))},")
    return lines


def print_known(results: Path) -> None:
    """Write docs/models.md from a file of results, and print KNOWN for tests/test_models.py."""
    from tests.test_models import known_faults

    found = read_results(results)
    write_rows(rows_of_table() | {family: row_of(family, outcomes) for family, outcomes in found.items()})
    lines = known_lines(found, known_faults)
    print("KNOWN: dict[str, str] = {", *lines, "}", sep="\n")
    if missing := [name for name in families() if name not in found]:
        print(f"not examined: {', '.join(missing)}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", nargs="*", metavar="FAMILY", help="examine families, all if none is named")
    what.add_argument("--known", type=Path, metavar="FILE", help="results of --table")
    what.add_argument("--build", nargs=2, metavar=("FAMILY", "DIR"), help="write a small model into a folder")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, each in a process")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where --table adds a line of JSON per family")
    chosen = parser.parse_args(argv)
    if chosen.build:
        print(build(chosen.build[0], Path(chosen.build[1])))
    elif chosen.known:
        print_known(chosen.known)
    else:
        write_table(chosen.table, chosen.jobs, chosen.results)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quantization_utils.quiet_libraries()
    main(sys.argv[1:])
