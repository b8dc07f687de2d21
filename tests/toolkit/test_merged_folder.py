"""The merged folder: keys of config.json for readers of transformers 4, the base's tokenizer files, the same logits there."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from config import ConfigError
from toolkit.merged_folder import add_older_keys, for_older_readers, older_keys, write_tokenizer

DEFAULT = {"rope_theta": 1e6, "rope_type": "default"}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
LONG = {"rope_theta": 1e4, "rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}
LAYERS = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}, "sliding_attention": DEFAULT}
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# name: (family, settings of its own)
MODELS: dict[str, tuple[str, dict]] = {
    "default": ("llama", {"rope_parameters": DEFAULT}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "partial": ("stablelm", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    "by kind of layer": ("gemma3_text", {"rope_parameters": LAYERS, "layer_types": [*LAYERS], "sliding_window": 16}),
    "experts": ("qwen3_moe", {"rope_parameters": DEFAULT} | EXPERTS),
    "older names": ("gpt_neox", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (DEFAULT, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            YARN,
            {
                "rope_theta": 1e6,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        (
            LONG,
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "longrope", **FACTORS},
                "original_max_position_embeddings": 64,
            },
        ),
        (
            LAYERS,
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e6,
            },
        ),
        (None, {}),
    ],
)
def test_the_older_keys_are_those_that_transformers_4_wrote(rope: dict | None, expected: dict) -> None:
    assert older_keys({"rope_parameters": rope}, {}) == expected


def saved(name: str, folder: Path) -> torch.Tensor:
    """Save a random model as transformers 5 does, with the older keys, and return its logits on fixed tokens."""
    family, own = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | own)), attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 if parameter.dim() > 1 else parameter.data
    model.save_pretrained(folder)
    add_older_keys(folder, model.config)
    with torch.no_grad():
        return model(torch.arange(3, 203)[None]).logits


@pytest.mark.parametrize("name", MODELS)
def test_transformers_5_reads_the_same_model_with_the_older_keys(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(model(torch.arange(3, 203)[None]).logits, expected)


OLDER = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__ < "5"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 203)[None]).logits, sys.argv[2])
"""


@pytest.mark.skipif("QLORA_TRANSFORMERS4" not in os.environ, reason="QLORA_TRANSFORMERS4: a python with transformers 4")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_has_the_same_logits(name: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path)
    command = [os.environ["QLORA_TRANSFORMERS4"], "-c", OLDER, tmp_path, tmp_path / "logits.pt"]
    subprocess.run(command, check=True)
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # one of them adds in another order


def test_a_model_that_would_be_read_as_another_is_refused(tmp_path: Path) -> None:
    saved("default", tmp_path)
    other = AutoConfig.for_model("llama", **SIZES, rope_parameters=DEFAULT | {"rope_theta": 5e5})
    with pytest.raises(ConfigError, match=r"rotary settings of llama .* expected .*500000.* got .*1000000"):
        add_older_keys(tmp_path, other)


# ------------------------------------------------------------------------------------------------ the tokenizer


def load(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_the_files_of_the_base_stay_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "merged"
    base.mkdir(), folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text())
    for changes in ({"tokenizer_class": "Qwen2Tokenizer"}, {"model_input_names": ["input_ids"]}):
        (base / "tokenizer_config.json").write_text(json.dumps(settings | changes, indent=3))
        (base / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
        write_tokenizer(folder, load(base))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
    write_tokenizer(
        folder, load(tiny_model)
    )  # transformers 4 would give token_type_ids, which `generate` refuses there
    added = {"model_input_names": ["input_ids", "attention_mask"]}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == settings | added


def test_the_template_that_was_taught_is_the_one_that_is_read(tiny_model: Path, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "merged"
    load(tiny_model).save_pretrained(base)  # as transformers 5 does: the template in a file of its own
    assert json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    tokenizer = load(base)
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    write_tokenizer(folder, tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == tokenizer.chat_template and not (folder / "chat_template.jinja").exists()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in settings


def test_a_class_that_makes_other_tokens_is_named(tiny_model: Path, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "merged"
    base.mkdir(), folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    for model_type, cls in (("llama", "PreTrainedTokenizerFast"), ("gpt2", "GPT2Tokenizer")):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        vocabulary = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True  # GPT2Tokenizer has its own, without
        (base / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        settings = json.loads((tiny_model / "tokenizer_config.json").read_text()) | {"tokenizer_class": cls}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        lines = write_tokenizer(folder, load(base))
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == cls
        if cls == "GPT2Tokenizer":
            assert len(lines) == 1 and "reads it as GPT2Tokenizer, which makes other tokens of some texts" in lines[0]
        else:
            assert lines == []


def test_no_other_file_of_the_user_gets_into_the_folder(
    tiny_model: Path, tmp_path: Path, random_models: Callable
) -> None:
    base, folder = tmp_path / "base", tmp_path / "merged"
    base.mkdir(), folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).symlink_to(tiny_model / name)
    (tmp_path / "private").write_text("secret")
    (base / "merges.txt").symlink_to(tmp_path / "private")
    with pytest.raises(
        ConfigError, match=r"expected a file of the tokenizer, got .*merges.txt, which leads to .*private"
    ):
        write_tokenizer(folder, load(base))


def test_other_settings_of_a_tokenizer_stay() -> None:
    settings = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}, "add_bos_token": False}
    assert for_older_readers(settings) == settings
