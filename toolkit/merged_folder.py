"""The folder of a merged model, in a form that transformers 4, transformers 5 and converters of such folders read.

transformers 5 writes `rope_parameters` and tokenizers of the class TokenizersBackend, which older readers do not know:
they compute with a rotary base of 10,000 without a warning, or refuse the tokenizer.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from config import ConfigError
from quantization_utils import LOADING_ERRORS, QUIETLY
from toolkit.local_paths import TOKENIZER_FILES

# Names of a tokenizer's files.
FILES = [*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
FILES += ["chat_template.*", "additional_chat_templates/*.jinja"]
# Tokens of this text differ where a class replaces the steps in tokenizer.json by its own: digits, spaces, line breaks,
# capitals, accents (one composed, one not), other scripts.
SAMPLE_TEXT = "A1 in 1984,  x27\r\n\n\tnaïve Straße cafe\u0301 don't WE'LL I'M (2,5) ---\n  \n 漢字とかな 한국어 ٣٤ ไทย ① ﬁ 🙂\u00a0end. "


# ------------------------------------------------------------------------------------------------ config.json


def older_keys(found: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """Return the keys of transformers 4 that say the same as those that transformers 5 has written into a config.json.

    found: the content of the file. aliases: other names of its keys (Qwen3-MoE had num_experts, now num_local_experts).
    Of the rotary settings, `rope_parameters` holds what were keys of their own. A model whose kinds of layers have rotary settings of their own (Gemma 3) has its
    general keys from the layers of full attention.
    """
    keys = {alias: found[key] for alias, key in aliases.items() if key in found and alias not in found}
    keys |= {"torch_dtype": found["dtype"]} if isinstance(found.get("dtype"), str) else {}
    rope = found.get("rope_parameters")
    if not isinstance(rope, dict):
        return keys
    if isinstance(full := rope.get("full_attention"), dict):
        if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
            keys["rope_local_base_freq"] = local["rope_theta"]
        rope = full
    rope, kind = dict(rope), rope.get("rope_type", "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            keys[key] = rope.pop(key)
    if found.get("model_type") == "gpt_neox":
        keys |= {"rotary_emb_base": keys.get("rope_theta"), "rotary_pct": keys.get("partial_rotary_factor")}
    if kind == "longrope":  # Phi-3's class of transformers 4 accepts these keys only
        positions = rope.pop("original_max_position_embeddings", None)
        keys |= {"original_max_position_embeddings": positions} if positions else {}
        del rope["rope_type"]
    scaling = None if kind == "default" else rope | {"type": kind}
    return {**keys, "rope_scaling": scaling}


def add_older_keys(folder: Path, config: PretrainedConfig) -> list[str]:
    """Add older_keys to the config.json in a folder, unless it would then be read as another model; return a line then.

    Raise ConfigError if it is read as another model without them too. config: the model's, in memory. Families with rotary settings of their own are newer than transformers 4 anyway.
    """
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    older = found | older_keys(found, config.attribute_map)
    path.write_text(json.dumps(older, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if "auto_map" in found:  # a class of its own reads it, which this process may have loaded from elsewhere
        return []
    if _read_rope(folder) == _rope(config.to_dict()):
        return []
    path.write_text(text, encoding="utf-8")
    if (read := _read_rope(folder)) != _rope(config.to_dict()):
        raise ConfigError(
            f"--mode merge: the rotary settings of {config.model_type} cannot be written: expected "
            f"{_rope(config.to_dict())} to be read from config.json, got {read}"
        )
    return [f"config.json has no keys for transformers 4, which cannot say the rotary settings of {config.model_type}"]


def _read_rope(folder: Path) -> Any:
    """Return the rotary settings that are read from a folder, or the error."""
    try:
        return _rope(AutoConfig.from_pretrained(folder).to_dict())
    except (KeyError, TypeError, ValueError) as error:
        return error


def _rope(settings: dict[str, Any]) -> Any:
    """Return the rotary settings of a configuration, without the older name of their type."""
    found = settings.get("rope_parameters")
    if not isinstance(found, dict):
        return found
    return {key: _rope({"rope_parameters": value}) for key, value in found.items() if key != "type"}


# ------------------------------------------------------------------------------------------------ the tokenizer


def for_older_readers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json in a form that transformers 4 reads too.

    PreTrainedTokenizerFast uses tokenizer.json unchanged, as the class does that transformers 5 names instead.
    """
    found = dict(settings)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            found.pop(key, None)
    if found.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # Otherwise transformers 4 adds token_type_ids, which its `generate` refuses.
        found.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(special := found.get("extra_special_tokens"), list):  # transformers 4 expects a mapping there
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = special
    return found


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> list[str]:
    """Write the tokenizer: the files of the base as they are, with the chat template that was taught.

    tokenizer_config.json changes only where a reader would otherwise fail, or find another template. Return a list with
    a line if AutoTokenizer makes other tokens of these files than the toolkit. revision: of a base from the hub.
    """
    name = tokenizer.name_or_path
    source = cached_file(name, "tokenizer.json", revision=revision, **QUIETLY)
    if source is None or "auto_map" in tokenizer.init_kwargs:  # a slow tokenizer, or one with code of its own
        tokenizer.save_pretrained(folder)
        return []
    for path in [path for pattern in FILES for path in sorted(Path(source).parent.glob(pattern))]:
        copy_file(path, folder / path.relative_to(Path(source).parent))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = for_older_readers(settings)
    if PreTrainedTokenizerFast.from_pretrained(folder).chat_template != tokenizer.chat_template:
        for template in folder.glob("chat_template.*"):  # it would be read instead
            template.unlink()
        changed["chat_template"] = tokenizer.chat_template
    if changed != settings:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return other_tokens(folder, tokenizer)


def other_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a list with a line if AutoTokenizer cannot read a folder, or reads it as another tokenizer than this one."""
    try:
        read = AutoTokenizer.from_pretrained(folder)
        if read(SAMPLE_TEXT)["input_ids"] == tokenizer(SAMPLE_TEXT)["input_ids"]:
            return []
        problem = f"reads it as {type(read).__name__}, which makes other tokens of some texts than its tokenizer.json"
    except LOADING_ERRORS as error:
        problem = f"cannot read it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return [
        f"AutoTokenizer of transformers {transformers.__version__} {problem}, as it does with the base; "
        "PreTrainedTokenizerFast.from_pretrained reads it exactly"
    ]


def copy_file(path: Path, target: Path) -> None:
    """Copy a file of the base. A link leads to a file of the same kind or into the hub's cache, otherwise ConfigError.

    The folder is made to be shared, so no other file of the user may get into it.
    """
    there = Path(os.path.realpath(path))
    if not there.is_file() or (there.suffix != path.suffix and there.parent.name != "blobs"):
        raise ConfigError(f"--mode merge: expected a file of the tokenizer, got {path}, which leads to {there}")
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(there, target)
