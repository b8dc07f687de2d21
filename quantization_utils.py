"""4-bit bases and LoRA adapters: the two configurations, loading, preparation, counting.

Training and inference share this module.

python quantization_utils.py     check the installation: import what a run imports, train two layers for a step, print a
                                 line for each thing; exit code 1 if training cannot run
"""

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the other imports of this file, since any of them may fail
    from toolkit.startup import stop_where_imports_fail

    stop_where_imports_fail()

import bitsandbytes as bnb
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import cached_file

from config import Config, ConfigError, counted
from fast_path import experts as expert_tools
from fast_path.expert_store import keep_in_main_memory
from fast_path.families import decoder_layers
from fast_path.host_rows import keep_rows_in_main_memory, loading_to_main_memory, rows_name_of
from fast_path.model_targets import (
    DEFAULT_TARGETS,
    OLD_NAMES,
    expert_names,
    linear_modules,
    names_without_experts,
    resolved_targets,
)
from fast_path.packed_weights import keep_packing
from fast_path.sharding import is_share
from fast_path.targets import is_pattern
from fast_path.weight_files import damaged_file, index_of, naming_tensors
from toolkit.hub import asking_hub, cache_problem, hub_problem
from toolkit.local_paths import check_layers, is_hub_id, missing_model

# ------------------------------------------------------------------------------------------------ configurations


def bf16_missing() -> bool:
    """Return whether there is a GPU without bfloat16 in hardware (compute capability below 8.0: RTX 20, T4)."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def usable_dtype(compute_dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch type of a compute_dtype; float16, with a message, for bfloat16 on a GPU without it."""
    dtype = getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    if dtype is torch.bfloat16 and bf16_missing():
        name = torch.cuda.get_device_name()
        _say_once(f"quantization.compute_dtype: {name} does not support bfloat16: using float16 with a loss scaler")
        return torch.float16
    return dtype


def slow_bf16() -> bool:
    """Return whether matrix products in bfloat16 are very slow here.

    They are on a CPU without AVX-512, for which oneDNN, the library that torch uses, has no such products
    (docs/measurements.md).
    """
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


SLOW_BF16 = "quantization.compute_dtype: float32, as bfloat16 is slow without AVX-512"


def compute_dtype_of(config: Config) -> torch.dtype:
    """Return the torch type that a run computes in: `usable_dtype`, or float32 where bfloat16 is very slow.

    A flag that asks for bfloat16 is obeyed. The caller prints SLOW_BF16.
    """
    dtype = usable_dtype(config.quantization.compute_dtype)
    slow = dtype is torch.bfloat16 and slow_bf16() and "quantization.compute_dtype" not in config.flags
    return torch.float32 if slow else dtype


def replaces_bf16(config: Config) -> bool:
    """Return whether a run computes in float32 instead of the configured bfloat16."""
    return compute_dtype_of(config) is not usable_dtype(config.quantization.compute_dtype)


def create_bnb_config(
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    compute_dtype: str | torch.dtype = "bfloat16",
    use_double_quant: bool = True,
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' 4-bit configuration, or None if the base stays unquantised.

    quant_type: nf4 or fp4. use_double_quant: store the quantisation constants in 8 bit, which needs 0.127 bits per
    weight instead of 0.5 (QLoRA, arXiv 2305.14314, section 3).
    """
    if not load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=usable_dtype(compute_dtype),
        bnb_4bit_use_double_quant=use_double_quant,
    )


def create_lora_config(
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    target_modules: list[str] | tuple[str, ...] | str = DEFAULT_TARGETS,
    use_rslora: bool = False,
    use_dora: bool = False,
    exclude_modules: list[str] | tuple[str, ...] | str | None = None,
    layers_to_transform: list[int] | tuple[int, ...] | None = None,
) -> LoraConfig:
    """Return peft's configuration of an adapter for a causal language model.

    target_modules: names, all-linear, or a regular expression. exclude_modules: names or a regular expression.
    """
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        use_dora=use_dora,
        exclude_modules=list(exclude_modules) if isinstance(exclude_modules, tuple) else exclude_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Set here, since the constructor refuses it beside all-linear, which prepare_model_for_training makes a list.
    lora_config.layers_to_transform = None if layers_to_transform is None else list(layers_to_transform)
    return expert_tools.adapting_experts(lora_config)


# ------------------------------------------------------------------------------------------------ loading


def check_repository(model_name: str, revision: str | None) -> None:
    """Raise an error for a model on the hub that cannot be reached or has no config.json. Local folders always pass.

    It makes one request first, since each file that is asked for would wait again if the hub does not answer.
    """
    if os.path.isdir(model_name) or not is_hub_id(model_name):
        return
    with asking_hub(model_name):
        found = cached_file(model_name, "config.json", revision=revision)
    if found is None:
        adapter = cached_file(model_name, "adapter_config.json", revision=revision, **QUIETLY)
        what = "it holds an adapter: give its base instead" if adapter else "is it in another format, such as GGUF?"
        raise ConfigError(f"model.name: {model_name} on the hub has no config.json: {what}")


def cannot_load(model_name: str, error: Exception) -> ConfigError:
    """Return the error that says in one line why a model or tokenizer did not load and what to do."""
    text = " ".join(str(error).split())
    if known := cache_problem(error):
        return known
    if not Path(model_name).exists():
        if not is_hub_id(model_name):
            return ConfigError(f"model.name: no such folder: {model_name}")
        if known := hub_problem("model.name", model_name, error):
            return known
    if problems := missing_model(model_name, ("config.json",)):
        return ConfigError(*problems)
    if "contains custom code" in text:
        return ConfigError(
            f"model.trust_remote_code: {model_name} comes with Python code that it needs, which would run with all your "
            "rights; give --trust_remote_code true if you trust it"
        )
    if match := re.match(r"(\w+) does not support an attention implementation", text):
        return ConfigError(f"model.attn_implementation: {match[1]} does not have the asked one; use auto or eager")
    if "safetensors" in text and "no file named" in text:
        return ConfigError(
            f"model.name: expected safetensors weights in {model_name}, found none (pickled weights are not loaded)"
        )
    text = re.sub("^Padding_idx .*", "pad_token_id in its config.json is not below vocab_size", text)
    return ConfigError(f"model.name: cannot load {model_name}: {type(error).__name__}: {text[:300]}")


QUIETLY = {"_raise_exceptions_for_missing_entries": False}  # return None for a file that the model does not have
# The errors that transformers, safetensors and huggingface_hub raise for a wrong name, a bad file or network trouble.
LOADING_ERRORS: tuple[type[Exception], ...] = (
    OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError, StrictDataclassError,
    SafetensorError, IndexError, ArithmeticError, AssertionError,
)  # fmt: skip


def load_tokenizer(
    model_name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the model's exact tokenizer, with a padding token that is already in the vocabulary.

    A tokenizer.json is used unchanged: a class such as GPT2Tokenizer would lose its pre-tokenizer (the digits of
    SmolLM2).
    """
    if problems := missing_model(model_name, ("tokenizer.json",)):
        raise ConfigError(*problems)
    try:
        check_repository(model_name, revision)
        exact = cached_file(model_name, "tokenizer.json", revision=revision, **QUIETLY)
        cls = AutoTokenizer if exact is None or trust_remote_code else PreTrainedTokenizerFast
        arguments = {"trust_remote_code": trust_remote_code} if cls is AutoTokenizer else {}
        tokenizer = cls.from_pretrained(model_name, revision=revision, **arguments)
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(model_name, error) from None
    except Exception as error:  # the tokenizers library raises a plain Exception for a corrupt tokenizer.json
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.name: cannot read the tokenizer of {model_name}: {text}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # AutoTokenizer makes such a one if files are missing
        raise ConfigError(f"model.name: no tokenizer in {model_name}: expected a tokenizer.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def stored_in_4bit(model_config: PretrainedConfig, model_name: str) -> bool:
    """Return whether the weights are stored in bitsandbytes' 4 bit; raise ConfigError for another quantisation."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return False
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    name = str(getattr(method, "value", method))
    way_out = ": give a copy in 16 bit, such as unsloth/gpt-oss-20b-BF16" if name == "mxfp4" else ""
    if name != "bitsandbytes":
        raise ConfigError(
            f"model.name: {model_name} is quantised with {method}; expected bitsandbytes' 4 bit, or no quantisation{way_out}"
        )
    return True


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model with this configuration.

    A model that also sees or hears, and which the class for causal language models does not know, has a class for such
    models; its language half is trained and answers. Raises ConfigError for an encoder with a decoder.
    """
    # Some families store the number under a name of their own, which the attribute knows.
    check_layers([config.to_dict(), {"num_hidden_layers": getattr(config.get_text_config(), "num_hidden_layers", 0)}])
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model.name: expected a causal language model, got {config.model_type}, which has an encoder"
        )
    return AutoModelForMultimodalLM


def load_model_and_tokenizer(
    model_name: str,
    bnb_config: BitsAndBytesConfig | None = None,
    *,
    compute_dtype: str | torch.dtype = "bfloat16",
    revision: str | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    experts: str = "gpu",
    rows_apart: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer, from the hub or a folder.

    device: by default the first GPU, or the CPU if there is none. bnb_config: None loads the weights in compute_dtype.
    tokenizer: the model's, if it was loaded before; reading Qwen2.5's takes 0.7 s. experts: as in quantization.experts.
    rows_apart: the input embedding waits in main memory, unless the head shares it (fast_path/host_rows.py).
    A model that is stored in 4 bit keeps its own quantisation. Only safetensors weights are loaded. Raises ConfigError.
    """
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    dtype = bnb_config.bnb_4bit_compute_dtype if bnb_config else usable_dtype(compute_dtype)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if problems := missing_model(model_name):
        raise ConfigError(*problems)
    tokenizer = tokenizer or load_tokenizer(model_name, **source)
    try:
        index_of(model_name, revision)  # which may name files anywhere
        model_config = AutoConfig.from_pretrained(model_name, **source)
        apart = experts == "cpu" and torch.device(device).type == "cuda"
        stored = check_storage(model_config, model_name, revision, bnb_config, apart)
        kind = auto_class(model_config)
        table = rows_name_of(kind, model_config, trust_remote_code) if rows_apart else ""
        packs = experts != "16bit"
        with (
            expert_tools.packing_experts(apart, packs),
            loading_to_main_memory(table),
            naming_tensors(model_name, revision),
        ):
            model, loaded = kind.from_pretrained(
                model_name,
                config=model_config,
                quantization_config=None if stored else bnb_config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=None if attn_implementation == "auto" else attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
                **source,
            )
        if stored:
            expert_tools.pack(model, model.hf_quantizer.quantization_config, dtype, packs)
        if apart:
            keep_in_main_memory(model, torch.device(device))
        if table:
            keep_rows_in_main_memory(model, torch.device(device))
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except LOADING_ERRORS as error:
        raise damaged_file(model_name, revision) or cannot_load(model_name, error) from None
    expert_tools.let_sizes_fit(model)
    check_loaded(model, loaded, tokenizer, model_name)
    keep_packing(model)
    for module in model.modules():  # a model stored in 4 bit keeps its quantisation, but not its compute dtype
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    return model, tokenizer


def check_storage(
    model_config: PretrainedConfig, model_name: str, revision: str | None, bnb_config: BitsAndBytesConfig | None,
    apart: bool,
) -> bool:  # fmt: skip
    """Return whether a model is stored in 4 bit, and say so; raise ConfigError if it cannot be loaded as it is asked for.

    apart: whether its experts are to wait in main memory.
    """
    stored = stored_in_4bit(model_config, model_name)
    if stored:
        print(f"{model_name} is stored in 4 bit: keeping its own quantisation", file=sys.stderr)
        expert_tools.check_stored(model_name, revision)
    if apart and stored:
        raise expert_tools.apart_and_stored(model_name)
    if apart and bnb_config is None:
        raise expert_tools.apart_in_16_bit()
    return stored


def check_loaded(
    model: PreTrainedModel, loaded: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model_name: str
) -> None:
    """Raise ConfigError if weights were missing, or if the tokenizer has ids for which the embedding has no row."""
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them at random values
        raise ConfigError(
            f"model.name: {model_name} lacks {counted(len(missing), 'weight')} that its config.json needs, such as {missing[0]}; "
            "fetch its weights again"
        )
    rows, ids = model.get_input_embeddings().weight.shape[0], 1 + max(tokenizer.get_vocab().values())
    if ids > rows:
        raise ConfigError(f"model.name: the tokenizer of {model_name} has {ids:,} ids, its embedding {rows:,} rows")


def load_base(
    config: Config, device: torch.device, quantized: bool = True, tokenizer: PreTrainedTokenizerBase | None = None,
    rows_apart: bool = False,
) -> tuple[PreTrainedModel, Any]:  # fmt: skip
    """Return the configured base model and its tokenizer on the device; quantized=False: unquantised, in bfloat16.

    tokenizer: the model's, if it was loaded before. rows_apart: as in `load_model_and_tokenizer`.
    """
    dtype = compute_dtype_of(config) if quantized else torch.bfloat16
    apart = ("experts", "products")  # of the run, not of the weights
    settings = {k: v for k, v in vars(config.quantization).items() if k not in apart} | {"compute_dtype": dtype}
    return load_model_and_tokenizer(
        config.model.name,
        create_bnb_config(**settings) if quantized else None,
        compute_dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        experts=config.quantization.experts if quantized else "gpu",
        rows_apart=rows_apart,
        **{key: value for key, value in vars(config.model).items() if key != "name"},
    )


def quiet_libraries() -> None:
    """Stop the libraries from printing, and show a question mark for each character that the console does not have."""
    # They are about names that peft still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)\\b")
    # peft 0.21 looks for these among modules, and the experts are parameters: their rank and alpha are in effect.
    unmatched = r"The following (rank|alpha)_pattern keys .* ignored: \['\.\*\\\\\.gate_up_proj'\]"
    warnings.filterwarnings("ignore", unmatched, RuntimeWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it logs each retry; a final failure becomes our own error
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font without the weight 400
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# ------------------------------------------------------------------------------------------------ preparation


def prepare_model_for_training(
    model: PreTrainedModel, lora_config: LoraConfig, use_gradient_checkpointing: bool | int = True
) -> PeftModel:
    """Return the model with a new adapter in fp32; all other weights are frozen and keep their dtype.

    use_gradient_checkpointing: True (all layers), False, or N (the first N). Unlike peft's
    prepare_model_for_kbit_training this casts nothing to fp32: the embedding of Qwen2.5-3B alone would need 0.58 GiB
    more.
    """
    own = resolved_targets(model, lora_config)
    names, model.config.use_cache = own.target_modules, False
    alone = ",".join(names_without_experts(model))
    try:
        peft_model = get_peft_model(model, own)  # freezes the base and makes the adapters in fp32
    except ValueError as error:
        if "ParamWrapper" in str(error):
            missing, way = ("DoRA", "--use_dora false") if "use_dora" in str(error) else ("dropout", "--dropout 0")
            raise ConfigError(
                f"lora.target_modules: these names include the experts, whose adapters peft computes without {missing}; "
                f"use {way}, or --target_modules {alone} without experts"
            ) from None
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:300]}") from None
    if (
        not (own.exclude_modules or own.target_parameters) and names != lora_config.target_modules
    ):  # peft shortens a long list to endings
        own.target_modules = names
    own.asked, own.spare = lora_config, alone  # attributes and no fields: what is saved are the names
    set_gradient_checkpointing(peft_model, use_gradient_checkpointing)
    return peft_model


def with_tokens(
    lora_config: LoraConfig, texts: Collection[str] | None, tokenizer: PreTrainedTokenizerBase
) -> LoraConfig:
    """Return the configuration with the ids of tokens whose embedding rows are trained; raise ConfigError.

    texts: of tokens, as in lora.train_tokens.
    """
    rows = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts or ()}
    for text, ids in rows.items():
        if len(ids) != 1 or tokenizer.decode(ids) != text:
            raise ConfigError(
                f"lora.train_tokens: expected texts that are one token of the tokenizer, got {text!r}, which is {len(ids)}"
            )
    if rows:
        lora_config.trainable_token_indices = sorted({ids[0] for ids in rows.values()})
    return lora_config


def with_checkpointing(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name that also has transformers' switch for checkpointing."""
    return type(cls.__name__, (GradientCheckpointingLayer, cls), {"__module__": cls.__module__})


def set_gradient_checkpointing(model: nn.Module, layers: bool | int) -> int:
    """Checkpoint all decoder layers (True), none (False) or the first N; return how many are checkpointed."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = decoder_layers(base)
    count = len(found) if layers is True else min(int(layers), len(found))
    # Non-reentrant, since the frozen embedding's output needs no gradient. Our dropout has no RNG state to preserve.
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for number, layer in enumerate(found):
        if not hasattr(
            layer, "gradient_checkpointing"
        ):  # GPT, CTRL and some others, which transformers left as they were
            layer.__class__ = with_checkpointing(type(layer))  # type: ignore[arg-type]  # classes can be hashed
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = recompute
    return count


def weight_count(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds; a packed 4-bit one holds two per byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of (trainable, all) parameters; 4-bit weights are counted unpacked, tied weights once."""
    counts = [(weight_count(p), p.requires_grad) for name, p in model.named_parameters() if not is_share(name)]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


def adapter_lines(model: PeftModel) -> list[str]:
    """Return the line about parameters and, where not all layers of the asked names are adapted, one that says so."""
    found = model.peft_config["default"]
    asked, lines = getattr(found, "asked", found), []
    if is_pattern(asked.target_modules) or asked.exclude_modules or asked.layers_to_transform is not None:
        count = sum(".lora_" not in name for name in linear_modules(model.get_base_model()))
        adapted = model.base_model.targeted_module_names
        lines = [f"adapters: on {len(adapted)} of {count} linear layers, such as {adapted[0]}"]
    elif set(asked.target_modules) == set(DEFAULT_TARGETS) != set(found.target_modules):
        lines = default_lines(model, found)
    # peft may have no name for experts that all-linear could mean, or a setting chooses among layers.
    left_out = asked.target_modules == "all-linear" and not found.target_parameters
    if left_out and (names := ",".join(expert_names(model.get_base_model()))):
        some = asked.exclude_modules or asked.layers_to_transform is not None
        without = ", without exclude_modules and layers_to_transform," if some else ""
        flags = f"--dropout 0 --target_modules {found.spare},{names}"
        lines.append(f"adapters: not on the routed experts; {flags}{without} adapts them too")
    return [parameter_line(model), *lines]


def default_lines(model: PeftModel, found: LoraConfig) -> list[str]:
    """Return the lines about the default names that got no adapter in a mixture of experts, by the reason for it."""
    left = [name for name in DEFAULT_TARGETS if name not in found.target_modules]
    lines, experts = [], [name for name in left if name in OLD_NAMES]
    if none := [name for name in left if name not in experts]:
        flags = f"--target_modules {found.spare}"
        lines.append(f"adapters: not on {', '.join(none)}, which the model does not have; its own are {flags}")
    if experts:
        there = {name.rpartition(".")[2] for name in linear_modules(model.get_base_model())}
        dense = ", and peft takes dense and shared MLPs of these names for them" if there & set(experts) else ""
        why = f"the routed experts get adapters only where they are named{dense}"
        lines.append(f"adapters: not on {', '.join(experts)}: {why}")
    return lines


def parameter_line(model: nn.Module) -> str:
    """Return the tutorial's line about trainable and all parameters."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


# ------------------------------------------------------------------------------------------------ installation check


def main() -> int:
    """Check the installation and print one line for each thing that training needs; return 0 if it can run, else 1."""
    from toolkit.machine import check_installation  # not at the top, since toolkit imports this module

    return check_installation()


if __name__ == "__main__":
    sys.exit(main())
