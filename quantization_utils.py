"""4-bit bases and LoRA adapters: the two configurations, loading, preparation, counting; and what the machine can do.

Shared by training and inference.

python quantization_utils.py     checks the installation: it imports what a run imports and trains two layers for a step;
                                 a line for each thing, exit 1 if training cannot run
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# What a run imports; the scripts import all of the project.
MODULES = ("yaml", "config", "torch", "bitsandbytes", "transformers", "peft", "datasets", "accelerate")
MODULES += ("matplotlib.pyplot", "train_qlora", "inference_example")


def import_failures(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Return a line for each module that cannot be imported, with the reason, each reason once."""
    lines, reasons = [], set()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package raises anything: ImportError, OSError of a library, SyntaxError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if reason not in reasons:
                lines.append(f"import {name}: fails: {reason}")
            reasons.add(reason)
    return lines


CANNOT_RUN = "training cannot run here: see the lines above"

if __name__ == "__main__":  # before this file's own imports, of which any may be what is broken
    failures = import_failures(MODULES[:2])
    if not failures:
        with contextlib.suppress(Exception):  # what fails in it fails again below, where it has a name
            importlib.import_module("config").before_heavy_imports()
        failures = import_failures()
    if failures:
        print(*failures, CANNOT_RUN, sep="\n")
        sys.exit(1)

import bitsandbytes as bnb
import numpy as np
import torch
import transformers
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from config import (
    LEAVES,
    Config,
    ConfigError,
    DataConfig,
    LoraSettings,
    ModelConfig,
    PerformanceConfig,
    TrainingConfig,
    flatten,
    is_hub_id,
    missing_model,
)

DEFAULT_TARGETS = LoraSettings().target_modules


# ------------------------------------------------------------------------------------------------ configurations


def bf16_missing() -> bool:
    """Return whether there is a GPU and it has no bfloat16 of its own (compute capability below 8.0: RTX 20, T4)."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def usable_dtype(compute_dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch type of a compute_dtype; float16, with a line, where it is bfloat16 and the GPU has none."""
    dtype = getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    if dtype is torch.bfloat16 and bf16_missing():
        name = torch.cuda.get_device_name()
        _say_once(f"quantization.compute_dtype: {name} has no bfloat16: using float16 with a loss scaler")
        return torch.float16
    return dtype


def slow_bf16() -> bool:
    """Return whether products in bfloat16 crawl here: a CPU without AVX-512, for which torch's oneDNN has none.

    They took 7 to 80 times those in float32 (512 x 512 x 512 and 512 x 1024 x 512, forward and backward, torch 2.13).
    """
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


SLOW_BF16 = "quantization.compute_dtype: bfloat16 is many times slower on a CPU without AVX-512: using float32"


def compute_dtype_of(config: Config) -> torch.dtype:
    """Return the torch type that a run computes in: `usable_dtype`, but float32 where bfloat16 would crawl and no flag
    asks for it; the caller says SLOW_BF16.
    """
    dtype = usable_dtype(config.quantization.compute_dtype)
    crawls = dtype is torch.bfloat16 and slow_bf16() and "quantization.compute_dtype" not in config.flags
    return torch.float32 if crawls else dtype


def replaces_bf16(config: Config) -> bool:
    """Return whether a run computes in float32 in place of the configured bfloat16."""
    return compute_dtype_of(config) is not usable_dtype(config.quantization.compute_dtype)


def create_bnb_config(
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    compute_dtype: str | torch.dtype = "bfloat16",
    use_double_quant: bool = True,
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' 4-bit configuration, or None where the base stays unquantised.

    quant_type: nf4 or fp4. use_double_quant: constants in 8 bit, 0.127 bit a weight instead of 0.5 (QLoRA, arXiv
    2305.14314, section 3).
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
) -> LoraConfig:
    """Return peft's configuration of a causal language model's adapter; target_modules may be the word all-linear."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


# ------------------------------------------------------------------------------------------------ loading


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and, one after the other, those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def cache_problem(error: BaseException) -> ConfigError | None:
    """Return the line on a cache of Hugging Face's that cannot be written, or None where the error is another."""
    folders = {"HF_HOME": constants.HF_HOME, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    folders["HF_DATASETS_CACHE"] = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    for cause in causes(error):
        if not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            continue
        place = os.path.abspath(os.fsdecode(cause.filename or constants.HF_HOME))
        for name, folder in sorted(folders.items(), key=lambda item: -len(item[1])):  # the innermost one
            folder = os.path.abspath(os.path.expanduser(folder))
            # makedirs names the first folder that it cannot make, which may lie above the cache.
            if os.path.commonpath([place, folder]) in (place, folder):
                name = name if name in os.environ else "HF_HOME"
                return ConfigError(
                    f"{name}: cannot write in {folder}: {cause.strerror}; set {name} to a folder that you can write"
                )
    return None


def hub_problem(setting: str, name: str, error: BaseException) -> ConfigError | None:
    """Return the line on what the hub does not give: gated, missing, without that revision or out of reach; or None.

    setting: model.name or data.dataset, whose value `name` is.
    """
    kind, path = ("data set", "datasets/") if setting == "data.dataset" else ("model", "")
    if type(error).__name__ == "DatasetNotFoundError":  # datasets drops what it came from: the same request again
        try:
            get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=10)
        except (OSError, ValueError) as reason:
            error = reason if isinstance(reason, HfHubHTTPError) else error
    found = list(causes(error))

    def first(*types: type[BaseException]) -> Any:
        return next((cause for cause in found if isinstance(cause, types)), None)

    if first(GatedRepoError):
        page = f"{constants.ENDPOINT}/{path}{name}"
        return ConfigError(
            f"{setting}: {name} is gated on the hub: ask for access on {page}, then log in with `hf auth login` or set "
            "HF_TOKEN to a token of that account"
        )
    if revision := first(RevisionNotFoundError):
        asked = re.search(r"/resolve/([^/]+)/", str(revision.response.url))
        asked = f" {unquote(asked[1])!r}" if asked else ""
        return ConfigError(f"model.revision: the hub has {name}, but no branch, tag or commit{asked} of it")
    if first(RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return ConfigError(
            f"{setting}: the hub has no {kind} {name}, or a private one: check the spelling (owner/name); for a private "
            "one log in with `hf auth login` or set HF_TOKEN"
        )
    answer, entry = first(HfHubHTTPError), first(EntryNotFoundError)
    unreachable = first(ConnectionError, TimeoutError, LocalEntryNotFoundError)
    if entry and not unreachable:
        return ConfigError(f"{setting}: {name} on the hub lacks a file: {' '.join(str(entry).split())[:200]}")
    if not (answer or unreachable):
        return None
    why = f"no connection to {constants.ENDPOINT} ({type(found[-1]).__name__})"
    if answer:
        why = f"{constants.ENDPOINT} answers {answer.response.status_code} {answer.response.reason_phrase}"
    if constants.HF_HUB_OFFLINE:
        why = f"HF_HUB_OFFLINE is set and the cache in {constants.HF_HOME} does not have it"
    local = "a local file or folder" if path else "a local folder"
    return ConfigError(
        f"{setting}: cannot get {name} from the hub: {why}; give {local}, point HF_HOME at a cache that has it, or try "
        "--config tiny/config.yaml"
    )


def check_repository(model_name: str, revision: str | None) -> None:
    """Refuse a model of the hub that is out of reach, or is none that transformers reads; a local folder is fine here.

    One request, since every other file would wait as long for a hub that does not answer.
    """
    if os.path.isdir(model_name) or not is_hub_id(model_name):
        return
    if cached_file(model_name, "config.json", revision=revision) is None:
        adapter = cached_file(model_name, "adapter_config.json", revision=revision, **QUIETLY)
        what = "it holds an adapter, whose base belongs here" if adapter else "is it in another format, such as GGUF?"
        raise ConfigError(f"model.name: {model_name} on the hub has no config.json: {what}")


def cannot_load(model_name: str, error: Exception) -> ConfigError:
    """Return the one line that says why a model or tokenizer did not load and what to do."""
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
    if match := re.match(r"(\w+) does not support an attention implementation", text):
        return ConfigError(f"model.attn_implementation: {match[1]} has no sdpa or flash attention here; use eager")
    if "safetensors" in text and "no file named" in text:
        return ConfigError(
            f"model.name: expected safetensors weights in {model_name}, found none (pickled weights are not loaded)"
        )
    return ConfigError(f"model.name: cannot load {model_name}: {type(error).__name__}: {text[:300]}")


QUIETLY = {"_raise_exceptions_for_missing_entries": False}  # None for a file that a model has not
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC}
# What transformers, safetensors and huggingface_hub raise for a name, a file or a network that is not as it should be.
LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError)
LOADING_ERRORS += (StrictDataclassError, SafetensorError, IndexError, ArithmeticError)


def load_tokenizer(
    model_name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the exact tokenizer with a padding token, which never grows the vocabulary.

    Where there is a tokenizer.json it is taken as it is: tokenizer_class GPT2Tokenizer loses a pre-tokenizer (the
    digits of SmolLM2).
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
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what AutoTokenizer makes where the files are missing
        raise ConfigError(f"model.name: no tokenizer in {model_name}: expected a tokenizer.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def stored_in_4bit(model_config: PretrainedConfig, model_name: str) -> bool:
    """Return whether the weights are stored in bitsandbytes' 4 bit; ConfigError for another quantisation."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return False
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if str(getattr(method, "value", method)) != "bitsandbytes":
        raise ConfigError(f"model.name: {model_name} is stored in {method}; expected bitsandbytes' 4 bit or none")
    print(f"{model_name} is stored in 4 bit: its own quantisation is kept", file=sys.stderr)
    return True


def check_index(model_name: str, revision: str | None) -> None:
    """Refuse an index of weights that names files outside of the model's folder, which transformers would open."""
    name = "model.safetensors.index.json"
    path = cached_file(model_name, name, revision=revision, **QUIETLY)
    shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values() if path is not None else ()
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard:
            raise ConfigError(f"model.name: {name} of {model_name}: expected names of files beside it, got {shard!r}")


def load_model_and_tokenizer(
    model_name: str,
    bnb_config: BitsAndBytesConfig | None = None,
    *,
    compute_dtype: str | torch.dtype = "bfloat16",
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model on `device` (the first GPU, else the CPU) and its tokenizer, from hub or folder.

    bnb_config: None leaves the weights in compute_dtype. A model stored in 4 bit keeps its own quantisation. Weights
    come from safetensors only. Raises ConfigError.
    """
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    dtype = bnb_config.bnb_4bit_compute_dtype if bnb_config else usable_dtype(compute_dtype)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    if problems := missing_model(model_name):
        raise ConfigError(*problems)
    tokenizer = load_tokenizer(model_name, **source)
    try:
        check_index(model_name, revision)
        model_config = AutoConfig.from_pretrained(model_name, **source)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_name,
            config=model_config,
            quantization_config=None if stored_in_4bit(model_config, model_name) else bnb_config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **source,
        )
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(model_name, error) from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them random
        raise ConfigError(
            f"model.name: {model_name} lacks {len(missing)} weights of its config.json, such as {missing[0]}"
        )
    rows, ids = model.get_input_embeddings().weight.shape[0], 1 + max(tokenizer.get_vocab().values())
    if ids > rows:
        raise ConfigError(f"model.name: the tokenizer of {model_name} has {ids:,} ids, its embedding {rows:,} rows")
    keep_packing(model)
    for module in model.modules():  # of a model stored in 4 bit: its quantisation is kept, not its compute type
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    return model, tokenizer


def effective(config: Config, model: nn.Module) -> Config:
    """Return the configuration with the quantisation, and the adapter if there is one, that the model really has.

    They differ where somebody edited create_bnb_config or create_lora_config, and where a base is stored in 4 bit.
    """
    quantized = next((module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)), None)
    found, flags = {"load_in_4bit": quantized is not None}, config.flags
    if quantized is not None:
        state = quantized.weight.quant_state
        found |= {"quant_type": state.quant_type, "use_double_quant": state.nested}
        # A type that this machine replaced, such as bfloat16 on a CPU without AVX-512, stays recorded as configured.
        if quantized.compute_dtype is not compute_dtype_of(config):
            found["compute_dtype"] = str(quantized.compute_dtype).removeprefix("torch.")
            flags |= {"quantization.compute_dtype"}  # asked for as by a flag: compute_dtype_of does not replace it
    quantization, lora = dataclasses.replace(config.quantization, **found), config.lora
    if isinstance(model, PeftModel):
        lora = _effective_lora(config.lora, model)
    return dataclasses.replace(config, quantization=quantization, lora=lora, flags=flags)


def _effective_lora(asked: LoraSettings, model: PeftModel) -> LoraSettings:
    """Return what an adapter's own configuration says of the settings in config.yaml."""
    found = model.peft_config["default"]
    targets = found.target_modules
    created = create_lora_config(**vars(asked)).target_modules
    if isinstance(targets, str):  # a regex, which config.yaml cannot hold: the modules that it chose
        targets = model.base_model.targeted_module_names
    as_asked = created == asked.target_modules == "all-linear" or set(targets) == set(asked.target_modules)
    return dataclasses.replace(
        asked,
        rank=found.r,
        alpha=float(found.lora_alpha),
        dropout=float(found.lora_dropout),
        target_modules=asked.target_modules if as_asked else tuple(sorted(targets)),
        use_rslora=found.use_rslora,
        use_dora=found.use_dora,
    )


def edited_line(config: Config, found: Config) -> list[str]:
    """Return a line that names what a model has otherwise than configured, or none. found: `effective`."""
    asked, has = flatten(config), flatten(found)
    odd = [f"{name} is {has[name]} (configured: {asked[name]})" for name in asked if asked[name] != has[name]]
    who = "create_bnb_config, create_lora_config or a base stored in 4 bit decided"
    return [f"not as configured: {', '.join(odd)}; {who}"] if odd else []


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of a model's rotary embeddings, one a kind of attention; empty without any."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes] if any(not isinstance(rope, dict) for rope in ropes.values()) else list(ropes.values())


def known_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a model is for, None where its configuration has no such number.

    YaRN's recipes leave max_position_embeddings as it was: the positions are then its factor times the original ones. Other
    scalings are in that number already (Llama 3) or not (some linear ones); it is taken as it stands.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    yarn = [rope for rope in rope_parameters(config) if rope.get("rope_type") == "yarn"]
    stretched = [(rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0) for rope in yarn]
    return positions and int(max(positions, *stretched, 0))


def beyond_positions(max_length: int, positions: int | None) -> list[str]:
    """Return a line to say where blocks are longer than the positions that a model is for."""
    if not positions or max_length <= positions:
        return []
    return [f"data.max_length: {max_length:,} tokens are more than the {positions:,} positions that the model is for"]


def check_length(max_length: int, config: PretrainedConfig) -> list[str]:
    """Return beyond_positions; ConfigError where the positions are a table, which has no more rows.

    Rotary embeddings go on, and of packed samples none may be as long as a block.
    """
    positions = known_positions(config)
    if positions and max_length > positions and not rope_parameters(config):
        raise ConfigError(f"data.max_length: expected at most the model's {positions:,} positions, got {max_length:,}")
    return beyond_positions(max_length, positions)


def keep_packing(model: nn.Module, keep: bool = True) -> None:
    """Have bitsandbytes leave its weights as they are packed, or repack them as it would by itself.

    On a CPU with AVX512-BF16 one forward in eval mode repacks them for good: training after it would be wrong, generation
    is quicker (SmolLM2-135M on two cores: 54 ms a token in place of 91).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = not keep and bnb.functional.has_avx512bf16()


def finite_tensors(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; ConfigError for one that is not finite."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # the file is no dict and cannot be iterated
            if not torch.isfinite(file.get_tensor(name)).all():
                raise ConfigError(f"--adapter: {name} in {path}: expected finite numbers, got infinite ones or NaN")
        return set(file.keys())


def load_base(config: Config, device: torch.device, quantized: bool = True) -> tuple[PreTrainedModel, Any]:
    """Return the configured base model and its tokenizer on the device; not quantized: as stored, in bfloat16."""
    dtype = compute_dtype_of(config) if quantized else torch.bfloat16
    settings = vars(config.quantization) | {"compute_dtype": dtype}
    return load_model_and_tokenizer(
        config.model.name,
        create_bnb_config(**settings) if quantized else None,
        compute_dtype=dtype,
        device=device,
        **{key: value for key, value in vars(config.model).items() if key != "name"},
    )


def quiet_libraries() -> None:
    """Leave the console to the scripts, and let one that lacks a character show a question mark instead."""
    # Of names that peft still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)\\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails in the end is reported by us
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Return the model with a folder's adapter attached, in eval mode; ConfigError where they don't belong together."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter: no adapter_config.json in {folder}")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError(f"--adapter: no adapter_model.safetensors in {folder} (pickled weights are not loaded)")
    misfit = f"--adapter: {folder} does not fit {model.name_or_path}"
    try:
        names = finite_tensors(path)
        with warnings.catch_warnings():
            # peft only warns of layers that the file lacks, and says nothing of those that the model lacks.
            warnings.simplefilter("ignore", UserWarning)
            peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        raise ConfigError(f"{misfit}: {type(error).__name__}: {' '.join(str(error).split())[:250]}") from None
    odd = names ^ set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    for name in sorted(name for name in odd if "lora_" in name):
        owner = "adapter" if name in names else "model"
        raise ConfigError(f"{misfit}: only the {owner} has {name}")
    return peft_model


# ------------------------------------------------------------------------------------------------ preparation


def linear_names(model: nn.Module) -> list[str]:
    """Return the distinct last names of the linear layers, the output head left out, in the order of the model."""
    head = model.get_output_embeddings()
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _check_targets(model: nn.Module, targets: set[str] | list[str] | str) -> None:
    if isinstance(targets, str):  # all-linear
        return
    modules = dict(model.named_modules())
    missing = sorted(t for t in targets if not any(name == t or name.endswith("." + t) for name in modules))
    if missing:
        raise ConfigError(
            f"lora.target_modules: the model has no {', '.join(missing)}; "
            f"its linear layers are {', '.join(linear_names(model))}"
        )


def prepare_model_for_training(
    model: PreTrainedModel, lora_config: LoraConfig, use_gradient_checkpointing: bool | int = True
) -> PeftModel:
    """Return the model with a fresh adapter in fp32, everything else frozen in the dtype it was loaded in.

    use_gradient_checkpointing: all layers, none, or the first N. Unlike peft's prepare_model_for_kbit_training nothing
    is cast to fp32: the embedding of Qwen2.5-3B alone would take 0.58 GiB more.
    """
    _check_targets(model, lora_config.target_modules)
    model.config.use_cache = False
    try:
        peft_model = get_peft_model(model, lora_config)  # freezes the base, adapters in fp32
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:300]}") from None
    set_gradient_checkpointing(peft_model, use_gradient_checkpointing)
    return peft_model


def set_gradient_checkpointing(model: nn.Module, layers: bool | int) -> int:
    """Recompute the activations of all decoder layers (True), none (False) or the first N; return how many do."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = base.get_decoder().layers
    count = len(found) if layers is True else min(int(layers), len(found))
    # Non-reentrant, since the frozen embedding's output has no gradient. Stateless dropout needs no RNG state stored.
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for number, layer in enumerate(found):
        if not hasattr(layer, "gradient_checkpointing"):
            kind = type(layer).__name__
            raise ConfigError(f"training.gradient_checkpointing: {kind} of this model cannot recompute; use false")
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = recompute
    return count


def weight_count(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds; a packed 4-bit one holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters, 4-bit weights counted unpacked and tied ones once."""
    counts = [(weight_count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


def parameter_line(model: nn.Module) -> str:
    """Return the tutorial's line about trainable and all parameters."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


# ------------------------------------------------------------------------------------------------ the machine


def no_gpu_reason() -> str:
    """Return why torch sees no GPU: built without CUDA, or built with it and finding no usable card or driver."""
    if torch.version.cuda is None and torch.version.hip is None:
        install = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
        return f"this torch ({torch.__version__}) is CPU-only; for an NVIDIA card: {install}"
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    return f"{built} but finds no usable GPU; see nvidia-smi and the driver"


def refuse_without_gpu(config: Config, device: torch.device) -> None:
    """Refuse the 3B default where there is no GPU, saying why there is none and how long it would take."""
    if device.type == "cuda" or config.model.name != LEAVES["model.name"].field.default:
        return
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(8):
        a @ a
    rate = 8 * 2 * 1024**3 / (time.perf_counter() - start)
    tokens = config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length
    # 6 FLOP a weight and token: forward, recompute, and the backward through frozen weights; 2.77e9 weights in linears.
    hours = 6 * 2.77e9 * tokens / rate / 3600
    raise ConfigError(
        f"model.name: {config.model.name} needs a GPU: {no_gpu_reason()}. On this CPU one optimizer step would take "
        f"about {hours:.1f} hours; try --config tiny/config.yaml"
    )


def device_block(device: torch.device, dtype: torch.dtype, processes: int) -> str:
    """Return the lines that say what a run computes on."""
    gpu = f"GPU: none | CPU threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = f"GPU: {found.name} | {found.total_memory / 2**30:.1f} GiB | {found.multi_processor_count} SMs"
    versions = " | ".join(installed("torch", "transformers", "peft", "bitsandbytes"))
    compute = f"Compute type: {dtype} | processes: {processes}"
    return "\n".join(["=" * 60, f"Device: {device}", gpu, versions, compute, "=" * 60])


def installed(*packages: str) -> list[str]:
    """Return the versions of Python and of packages, a text each."""
    return [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]


# ------------------------------------------------------------------------------------------------ installation check


def check_nf4(device: torch.device) -> float:
    """Return the relative error of an NF4 product in bfloat16 (or float16) against fp32 on the same packed weights."""
    generator = torch.Generator().manual_seed(0)
    dtype = usable_dtype("bfloat16") if device.type == "cuda" else torch.bfloat16
    weight, x = (torch.randn(256, 256, generator=generator) for _ in range(2))
    packed, state = bnb.functional.quantize_4bit(weight.to(device, dtype), quant_type="nf4", compress_statistics=True)
    reference = x @ bnb.functional.dequantize_4bit(packed, state).float().cpu().t()
    product = bnb.matmul_4bit(x.to(device, dtype), packed.t(), quant_state=state).float().cpu()
    return ((product - reference).norm() / reference.norm()).item()


def write_random_model(folder: Path) -> None:
    """Write a random Qwen2 of two layers and its tokenizer, of 512 words, into a folder."""
    words = {f"w{i}": i for i in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(folder)
    # At 256 x rank 16 an adapter matrix is just large enough for bitsandbytes' 8-bit states.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **sizes)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def check_step(device: torch.device, performance: PerformanceConfig) -> tuple[float, float, str]:
    """Train two 4-bit layers for one optimizer step, by the functions of a run; return the loss before and after it,
    and the line on the fast path.
    """
    train, memory, data = map(importlib.import_module, ("train_qlora", "memory_utils", "data_utils"))
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps mapped weights open
        write_random_model(Path(folder))
        config = Config(
            ModelConfig(name=folder), data=DataConfig(max_length=64), training=training, performance=performance
        )
        model, tokenizer = load_base(config, device)
        learner = train.build_learner(config, model, memory.unplanned(config, 2, layers=2), lines.append)
        optimizer = train.create_optimizer(learner.parameters, training, device, lines.append)
        blocks = list(torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0)).numpy())
        batch, tokens, places = next(data.batches(blocks, np.arange(2), 2, tokenizer.pad_token_id, device))
        losses = []
        for step in range(2):
            learner.model.train()
            learner.zero_gradients()
            losses.append(learner.micro_step(step, torch.from_numpy(places), batch).item() / tokens)
            learner.scaler.unscale_(optimizer)
            torch._foreach_mul_([parameter.grad for parameter in learner.parameters], 1 / tokens)
            learner.scaler.step(optimizer)
            learner.scaler.update()
        del model, learner, optimizer
    memory.let_go()
    return *losses, next(line for line in lines if line.startswith("fast path: "))


def step_lines(device: torch.device) -> tuple[list[str], bool]:
    """Return the lines on training two layers, plainly and on the fast path, and whether both learn."""
    off = PerformanceConfig(fused_lora="off", compile="off", cuda_graphs="off")
    # A GPU takes what a run would; a CPU is not made to wait for a compiler, which its runs don't use either.
    fast = PerformanceConfig() if device.type == "cuda" else dataclasses.replace(off, fused_lora="on")
    lines, good = [], True
    for performance in (off, fast):
        name = "plain" if performance is off else "fast path"
        start = time.perf_counter()
        try:
            before, after, path = check_step(device, performance)
            fine = math.isfinite(before) and after < before
            said = path.split(" | ")[0] if performance is fast else "plain"
            verdict = f"{said}, loss {before:.3f} -> {after:.3f} in {time.perf_counter() - start:.1f} s"
            verdict = verdict if fine else f"WRONG: {verdict}, which should fall"
        except Exception as problem:  # whatever a driver, a compiler or a package raises: the line names it
            fine, reason = False, " ".join(str(problem).split())[:300]
            verdict = f"{name} fails: {type(problem).__name__}: {reason}"
        lines.append(f"training step on {device.type}: {verdict}")
        good &= fine
    return lines, good


def _hub_line() -> str:
    if constants.HF_HUB_OFFLINE:
        return "hub: not asked (HF_HUB_OFFLINE is set): models and data come from folders or the cache"
    try:
        get_hf_file_metadata(hf_hub_url("Qwen/Qwen2.5-3B-Instruct", "config.json"), timeout=5)
    except Exception as error:  # any failure has the same meaning here, and the line names it
        return f"hub: not reachable ({type(error).__name__}): models and data come from folders or the cache"
    return "hub: reachable"


def main() -> int:
    """Print a line for each thing that training needs; return 0 if training can run here, else 1."""
    if failures := import_failures():
        print(*failures, CANNOT_RUN, sep="\n")
        return 1
    quiet_libraries()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    print("versions: " + ", ".join(installed(*packages)))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        free, total = torch.cuda.mem_get_info()
        print(f"GPU: {torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free")
        print("bfloat16: " + ("no: float16 with a loss scaler is used" if bf16_missing() else "yes"))
    else:
        print(f"GPU: none: {no_gpu_reason()}")
    try:
        print(f"Triton: {version('triton')}")
    except ModuleNotFoundError:
        print("Triton: not installed: layers are not compiled (Windows: pip install triton-windows)")
    good = True
    for device in devices:
        try:
            error = check_nf4(device)
            fine = error < 0.02  # bfloat16 keeps 8 bits: products of 256 terms measured 0.003
            print(f"NF4 on {device.type}: {'right' if fine else 'WRONG'}, relative error {error:.4f} against fp32")
        except (RuntimeError, OSError, NotImplementedError) as problem:
            fine = False
            print(f"NF4 on {device.type}: fails: {' '.join(str(problem).split())[:200]}")
        lines, learns = step_lines(device)
        print(*lines, sep="\n")
        good &= fine and learns
    print(f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free in {os.getcwd()}")
    print(_hub_line())
    print("training can run here" if good else CANNOT_RUN)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
