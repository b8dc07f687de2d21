"""adapter_config.json is read without torch, and its patterns mean what they mean to peft; hostile ones: tests/faults."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from config import ConfigError
from toolkit import adapter_config
from toolkit.adapter_config import match, read_adapter_config
from toolkit.adapters import load_adapter

SOUND = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# What an adapter may be, beyond those that the toolkit trains; peft loads each of them from its own file.
KINDS = {
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|down)_proj"},
    "regex that excludes": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*|.*v_proj"},
    "ranks by regex": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"^model\.layers\.[01]\..*": 2, "q_proj": 6},
    },
    "alphas by regex": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {r".*v_pro.": 2, "layers.0.self_attn.q_proj": 30},
    },
    "ranks by name": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "all linear layers": {"target_modules": "all-linear"},
    "a whole module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_the_one_that_peft_loads(name, random_models, tmp_path):
    folder = random_models("llama") if name in ("a whole module", "some tokens") else random_models("qwen2")
    made = get_peft_model(base(folder), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[name]))
    torch.manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path, save_embedding_layers=False)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(described | KINDS[name])
    )  # peft writes the words all-linear as a list
    ours, theirs = load_adapter(base(folder), tmp_path), PeftModel.from_pretrained(base(folder), str(tmp_path)).eval()
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    scalings = [
        {key: module.scaling for key, module in model.named_modules() if hasattr(module, "scaling")}
        for model in (ours, theirs)
    ]
    assert scalings[0] == scalings[1] and scalings[0]
    ids = torch.arange(3, 20)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_names_that_end_like_a_matched_one_are_not_matched_too():
    settings = {"target_modules": r"model\.layers\.0\.q"}
    names = ["model.layers.0.q", "vision.model.layers.0.q", "model.layers.1.q"]
    found = adapter_config.resolve_patterns(settings, names, [], "here")
    assert found == {"target_modules": ["model.layers.0.q"], "exclude_modules": ["vision.model.layers.0.q"]}


def test_an_expression_that_never_ends_is_stopped_and_named():
    start = time.monotonic()
    with pytest.raises(ConfigError, match="here: expected a regular expression that takes less than 5 s, got"):
        match([("fullmatch", "(a*)*b")], ["a" * 60], "here")
    assert time.monotonic() - start < 10
    with pytest.raises(ConfigError, match="here: not a regular expression"):
        match([("fullmatch", "(")], ["a"], "here")
    assert match([("match", "a"), ("fullmatch", "a|b")], ["ab", "a", "b"], "here") == [["ab", "a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"lora_alpha": "8"}, 'lora_alpha: expected a number > 0, got "8"'),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: expected text, got 5"),
        ({"bias": "some"}, 'bias: expected none, all or lora_only, got "some"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights: "pissa" goes with a changed base'),
        ({"use_qalora": True}, '"use_qalora": expected null, since this is not supported, got true'),
    ],
)
def test_a_wrong_value_is_named(change, line, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SOUND | change))
    with pytest.raises(ConfigError) as raised:
        read_adapter_config(tmp_path)
    assert len(raised.value.problems) == 1
    assert str(raised.value).startswith(f"--adapter: {tmp_path / 'adapter_config.json'}: {line}")


def test_what_peft_writes_is_sound(tmp_path):
    """Each key with its default, those of newer features too."""
    LoraConfig(**{key: value for key, value in SOUND.items() if key != "peft_type"}).save_pretrained(str(tmp_path))
    assert read_adapter_config(tmp_path)["r"] == 4


def test_it_imports_no_torch():
    program = "import sys, toolkit.adapter_config; print({'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(adapter_config.__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
