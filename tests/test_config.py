"""The schema, config.yaml and the flags say the same, and every mistake is named."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import config
from config import LEAVES, SHORT, Config, ConfigError, load_config, save_config
from tests.refusals import from_flags, problems
from toolkit import startup
from toolkit.flags import build_parser, parse_arguments

ROOT = Path(config.__file__).resolve().parent

# The names and values that users rely on, written down apart from the schema.
PROMISED = """
model:        {name: Qwen/Qwen2.5-3B-Instruct, revision: null, attn_implementation: auto, trust_remote_code: false}
quantization: {load_in_4bit: true, quant_type: nf4, compute_dtype: bfloat16, use_double_quant: true, products: bf16, experts: gpu}
lora:         {rank: 16, alpha: 32.0, dropout: 0.05,
               target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj],
               exclude_modules: null, layers_to_transform: null, train_tokens: null,
               use_rslora: false, use_dora: false, init_adapter: null}
data:         {dataset: Salesforce/wikitext, dataset_config: wikitext-2-raw-v1, train_split: train,
               validation_split: validation, validation_fraction: 0.05, text_column: text, format: auto, rows: auto,
               completion_only: true, max_length: 512, packing: true, max_train_samples: null, max_eval_samples: null,
               template_options: null}
training:     {num_epochs: 3, max_steps: null, batch_size: 1, gradient_accumulation_steps: 16, learning_rate: 2.0e-4,
               lr_scheduler: cosine, warmup_ratio: 0.03, weight_decay: 0.0, max_grad_norm: 0.3,
               optim: paged_adamw_8bit, gradient_checkpointing: true, seed: 42, logging_steps: 10, eval_steps: null,
               save_steps: null, save_minutes: 15, save_total_limit: 2, early_stopping_patience: null, resume: auto,
               output_dir: output_qlora_qwen_3b, report_to: none}
performance:  {auto_fit: true, memory_limit_gib: null, fused_lora: auto, compile: auto, cuda_graphs: auto,
               swap_activations: auto, deterministic: false, shard_base: false}
generation:   {max_new_tokens: 128, temperature: 0.7, top_p: 0.9, top_k: null, repetition_penalty: 1.0, num_beams: 1,
               system_prompt: null}
"""
SCRIPTS = ["train_qlora.py", "inference_example.py"]
TAKEN = {
    "train_qlora.py": ("model", "quantization", "lora", "data", "training", "performance", "generation"),
    "inference_example.py": ("model", "quantization", "data.template_options", "performance", "generation"),
}
LAST = {name: short for short, name in SHORT.items()}  # the flag that --help shows


def tree(loaded: Config) -> dict:
    """Return a configuration as YAML would hold it."""
    sections = {name: vars(loaded[name]) for name in config.SECTIONS}
    return {
        name: {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}
        for name, section in sections.items()
    }


def from_yaml(tmp_path: Path, text: str) -> Config:
    """Load a configuration file with this text."""
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# ------------------------------------------------------------------------------------------------ the three agree


def test_schema_is_what_was_promised():
    promised = yaml.safe_load(PROMISED)
    assert tree(Config()) == promised
    assert [leaf.name for leaf in LEAVES.values()] == [f"{s}.{key}" for s, keys in promised.items() for key in keys]


def test_config_yaml_mirrors_the_schema():
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    promised = yaml.safe_load(PROMISED)
    assert load_config(ROOT / "config.yaml") == Config()
    assert [(s, list(keys)) for s, keys in yaml.safe_load(text).items()] == [(s, list(k)) for s, k in promised.items()]


def test_config_yaml_says_why_beside_every_key():
    lines = (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 120
    reasons = {}
    for line in lines:
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            key = line.split(":")[0].strip()
            reasons[key] = line.partition(" # ")[2]
        elif line.startswith("  "):
            reasons[key] += line
    assert list(reasons) == [leaf.key for leaf in LEAVES.values()]
    assert all(len(reason) > 12 for reason in reasons.values())
    for key in ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing"):
        assert "auto_fit may" in reasons[key]
        assert "flag" in reasons[key]


def test_every_leaf_has_its_long_flag_and_a_short_one_where_its_name_is_unique():
    options = {option for action in build_parser("test")._actions for option in action.option_strings}
    keys = [leaf.key for leaf in LEAVES.values()]
    assert {f"--{name}" for name in LEAVES} <= options
    assert {f"--{key}" for key in keys if keys.count(key) == 1} <= options
    assert SHORT["model_name"] == "model.name"
    assert from_flags("--model_name", "a/b") == from_flags("--model.name", "a/b") == from_flags("--name=a/b")


@pytest.mark.parametrize("name", LEAVES)
def test_every_flag_reads_its_default_back(name):
    value = LEAVES[name].field.default
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n...")[0]
    loaded = from_flags(f"--{name}", text.strip())
    assert loaded == Config()
    assert loaded.flags == {name}


# ------------------------------------------------------------------------------------------------ coercion

READ = [
    ("training.learning_rate", "2e-4", 2e-4),  # YAML 1.1 reads it as text
    ("training.learning_rate", "1", 1.0),
    ("training.num_epochs", "0.5", 0.5),
    ("training.max_steps", "null", None),
    ("training.max_steps", "~", None),
    ("training.save_minutes", "null", None),
    ("data.dataset_config", "null", None),
    ("data.validation_split", "null", None),
    ("lora.target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
    ("lora.target_modules", "[q_proj]", ("q_proj",)),
    ("lora.target_modules", "all-linear", "all-linear"),
    ("lora.target_modules", "'.*_proj'", ".*_proj"),
    ("lora.exclude_modules", "'o_proj,lm_head'", ("o_proj", "lm_head")),
    ("lora.exclude_modules", "'.*mlp.*'", ".*mlp.*"),
    ("lora.exclude_modules", "null", None),
    ("lora.layers_to_transform", "[0, 3]", (0, 3)),
    ("lora.layers_to_transform", "'0,3'", (0, 3)),
    ("lora.layers_to_transform", "5", (5,)),
    ("quantization.load_in_4bit", "false", False),
    ("quantization.load_in_4bit", "no", False),
    ("data.packing", "on", True),
    ("performance.compile", "on", "on"),
    ("performance.compile", "off", "off"),
    ("performance.fused_lora", "true", "on"),
    ("performance.cuda_graphs", "false", "off"),
    ("performance.cuda_graphs", "auto", "auto"),
    ("training.gradient_checkpointing", "auto", "auto"),
    ("training.gradient_checkpointing", "false", False),
    ("training.gradient_checkpointing", "12", 12),
    ("training.gradient_checkpointing", "1", 1),  # one layer, not True
    ("training.gradient_checkpointing", "0", 0),
]


@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_a_file_and_a_flag_read_a_value_alike(tmp_path, name, text, expected):
    section, key = name.split(".")
    for loaded in (from_yaml(tmp_path, f"{section}: {{{key}: {text}}}"), from_flags(f"--{name}", text)):
        value = loaded[section][key]
        assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    "text", ["2024", "true", "1e3", "on", "[a]", "a: b", "{", "'quoted'", "# no comment", "5 # five"]
)
def test_a_flag_of_a_text_stays_the_text(text):
    assert from_flags("--output_dir", text).training.output_dir == text
    assert from_flags("--system_prompt", text).generation.system_prompt == text


def test_the_system_prompt_alone_may_be_empty(tmp_path):
    for loaded in (from_yaml(tmp_path, 'generation: {system_prompt: ""}'), from_flags("--system_prompt", "")):
        assert loaded.generation.system_prompt == ""
        save_config(loaded, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == loaded
    assert [name for name, leaf in LEAVES.items() if leaf.expected.startswith("text, which may be empty")] == [
        "generation.system_prompt"
    ]


WRONG = [
    ("lora.rank", "true"),  # a bool is no integer
    ("lora.rank", "8.0"),
    ("lora.rank", "'8'"),
    ("lora.rank", "null"),
    ("lora.rank", "[8]"),
    ("lora.alpha", "false"),
    ("lora.alpha", "much"),
    ("lora.alpha", ".nan"),
    ("lora.alpha", ".inf"),
    ("lora.alpha", "1" + "0" * 400),  # an integer that no float holds
    ("training.learning_rate", "nan"),
    ("training.learning_rate", "inf"),
    ("training.max_steps", "1e3"),
    ("training.seed", "-1"),
    ("data.packing", "1"),
    ("data.packing", "maybe"),
    ("data.packing", "auto"),
    ("performance.compile", "1"),
    ("performance.compile", "fast"),
    ("performance.swap_activations", "off"),
    ("performance.swap_activations", "on"),
    ("training.gradient_checkpointing", "some"),
    ("training.gradient_checkpointing", "1.5"),
    ("training.gradient_checkpointing", "-1"),
    ("training.gradient_checkpointing", "null"),
    ("lora.target_modules", "[]"),
    ("lora.target_modules", "[q_proj, 3]"),
    ("lora.target_modules", "['']"),
    ("lora.target_modules", "null"),
    ("lora.target_modules", "'(q_proj'"),
    ("lora.exclude_modules", "all-linear"),
    ("lora.exclude_modules", "[]"),
    ("lora.layers_to_transform", "[-1]"),
    ("lora.layers_to_transform", "[0, q_proj]"),
    ("lora.layers_to_transform", "-1"),
    ("lora.layers_to_transform", "[]"),
    ("quantization.quant_type", "int4"),
    ("quantization.compute_dtype", "fp16"),
    ("training.optim", "adam"),
    ("training.lr_scheduler", "step"),
    ("data.format", "json"),
    ("data.rows", "paragraphs"),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path, name, text):
    section, key = name.split(".")
    for said in (
        problems(from_yaml, tmp_path, f"{section}: {{{key}: {text}}}"),
        problems(from_flags, f"--{name}", text),
    ):
        assert len(said) == 1
        assert said[0].startswith(f"{name}: expected {LEAVES[name].expected}, got ")


@pytest.mark.parametrize("name", ["training.output_dir", "model.name", "data.dataset", "model.revision"])
def test_a_text_in_a_file_must_be_text_and_not_empty(tmp_path, name):
    section, key = name.split(".")
    for value in ("2024", "[a]" if name != "data.dataset" else "[2024]", "true", "''", "'  '"):
        assert name in problems(from_yaml, tmp_path, f"{section}: {{{key}: {value}}}")[0]


TINY = 1e-12
RANGES = [  # leaf, values inside (the edges among them), values outside (an open edge among them)
    ("lora.rank", [1, 16384], [0, -1, 16385, 10**9]),
    ("lora.alpha", [1e-6, 512.0, 1e6], [0.0, -1.0, 1e-320, 1e38]),
    ("lora.dropout", [0.0, 0.999], [1.0, -TINY, 0.9999999999999999]),
    ("data.max_length", [8, 2**20], [7, 0, 2**20 + 1, 10**30]),
    ("data.validation_fraction", [0.0, 1 - TINY], [1.0, -TINY]),
    ("data.max_train_samples", [1, 10**9], [0, -5, 10**9 + 1]),
    ("data.max_eval_samples", [1, 10**9], [0, 10**400]),
    ("training.num_epochs", [TINY, 1e6], [0.0, -1.0, 1e308]),
    ("training.max_steps", [1, 10**9], [0, 10**9 + 1, 10**400]),
    ("training.batch_size", [1, 2**16], [0, 2**16 + 1]),
    ("training.gradient_accumulation_steps", [1, 2**16], [0, 2**16 + 1]),
    ("training.learning_rate", [TINY, 100.0], [0.0, -2e-4, 100.1, 1e308]),
    ("training.warmup_ratio", [0.0, 1 - TINY], [1.0, -TINY]),
    ("training.weight_decay", [0.0, 100.0], [-TINY, 1e308]),
    ("training.max_grad_norm", [1e-6, 1e9], [0.0, 1e-320, 1e10]),
    ("training.gradient_checkpointing", [0, 10**9], [-1, 10**9 + 1]),
    ("training.seed", [0, 2**32 - 1], [-1, 2**32]),  # numpy's range
    ("training.logging_steps", [1, 10**9], [0, 10**9 + 1]),
    ("training.eval_steps", [1, 10**9], [0, 10**9 + 1]),
    ("training.save_steps", [1, 10**9], [0, 10**9 + 1]),
    ("training.save_minutes", [TINY, 1e6], [0.0, 1e7]),
    ("training.save_total_limit", [1, 10**6], [0, 10**400]),
    ("training.early_stopping_patience", [1, 10**9], [0, 10**9 + 1]),
    ("performance.swap_activations", [0, 10**9], [-1, 10**9 + 1, True]),
    ("performance.memory_limit_gib", [TINY, 141.0], [0.0, 4097.0]),
    ("generation.max_new_tokens", [1, 2**20], [0, 2**20 + 1]),
    ("generation.temperature", [0.0, 0.001, 100.0], [-TINY, 1e-320, 0.0009, 101.0]),
    ("generation.top_p", [1.0, TINY], [0.0, 1 + TINY]),
    ("generation.top_k", [1, 10**9], [0, 10**9 + 1]),
    ("generation.num_beams", [1, 64], [0, 65]),
    ("generation.repetition_penalty", [0.01, 1.3, 100.0], [0.0, 1e-320, 101.0]),
]


@pytest.mark.parametrize(("name", "inside", "outside"), RANGES)
def test_ranges_hold_at_their_edges(name, inside, outside):
    section, key = name.split(".")
    for value in inside:
        assert load_config([], {name: value})[section][key] == value
    for value in outside:
        assert name in problems(load_config, [], {name: value})[0]


@pytest.mark.parametrize("value", ["a\0b", "\x1b[2J", "a\nb", "\udcff"])
def test_a_path_or_a_name_has_no_control_characters(tmp_path, value):
    for name in ("training.output_dir", "model.name", "lora.target_modules"):
        given = [value] if name == "lora.target_modules" else value
        assert problems(load_config, [], {name: given})[0].startswith(f"{name}: expected ")
    if value != "\udcff":
        section = f"training: {{output_dir: {json.dumps(value)}}}"
        assert problems(from_yaml, tmp_path, section)[0].startswith("training.output_dir: expected ")
    assert problems(load_config, [], {"generation.system_prompt": "a\0"})
    assert load_config([], {"generation.system_prompt": "a\n\tb"}).generation.system_prompt == "a\n\tb"


@pytest.mark.parametrize(
    "text",
    ["!!bool 1", '!!int ""', '!!float ""', "!!timestamp soon", "1:30", "0x10", "010", "٣", "1e1_0", "2001-01-01"],
)
@pytest.mark.parametrize("name", ["training.seed", "training.learning_rate", "lora.target_modules"])
def test_a_number_is_written_as_a_plain_number(tmp_path, name, text):
    if (name, text) == ("training.learning_rate", "010"):
        return  # float("010") is 10
    section, key = name.split(".")
    assert problems(from_flags, f"--{name}", text)[0].startswith(f"{name}: expected ")
    assert len(problems(from_yaml, tmp_path, f"{section}: {{{key}: {text}}}")) == 1


@pytest.mark.parametrize("place", ["seed", "target_modules", "unknown"])
def test_a_value_of_many_aliases_is_cut_before_it_is_written_out(tmp_path, place):
    """Nine times as much at each level: of a dozen levels a repr would fill the memory."""
    levels = "".join(f"k{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 3)}]\n" for i in range(1, 7))
    text = f"k0: &b0 [{', '.join('x' * 9)}]\n{levels}training: {{{place}: *b6}}\nlora: *b6\n"
    started = time.perf_counter()
    said = problems(from_yaml, tmp_path, text)
    assert time.perf_counter() - started < 2 and all(len(line) < 500 for line in said) and len(said) >= 8


def test_a_value_that_doubles_forty_times_is_refused_for_its_aliases(tmp_path):
    levels = "".join(f"  k{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40))
    (said,) = problems(from_yaml, tmp_path, f"training:\n  k0: &b0 [x]\n{levels}  seed: *b39\n")
    assert "expected at most 20 aliases" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_config_file_is_not_read_to_its_end(tmp_path):
    (tmp_path / "large.yaml").write_text("# " + "x" * 2**20)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, reason in (("large", "expected at most 1,048,576 bytes"), ("pipe", "expected a file, got a named pipe")):
        path = tmp_path / f"{name}.yaml"
        assert problems(load_config, path) == (f"--config: cannot read {path} as UTF-8 text: {reason}",)
    assert "expected at most" in problems(load_config, "/dev/zero")[0]


def test_a_file_with_nothing_but_unknown_keys_is_forty_lines(tmp_path):
    for text in (
        "".join(f"x{i}: 1\n" for i in range(20_000)),
        "lora:\n" + "".join(f"  x{i}: 1\n" for i in range(20_000)),
    ):
        assert len(problems(from_yaml, tmp_path, text)) == 41


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 中文\n\tstays", None),
        ("\x1b[2J\x1b]52;c;x\x07", r"\x1b[2J\x1b]52;c;x\x07"),
        ("a\rb\x7f\x9b\x00", r"a\rb\x7f\x9b\x00"),
        ("a\u202eb\u2028c", r"a\u202eb\u2028c"),
        ("of Windows\r\n", "of Windows\n"),
    ],
)
def test_control_characters_are_made_visible(text, shown, capsys):
    assert startup.visible(text) == (text if shown is None else shown)
    assert startup.report(ConfigError(f"data: {text}")) == 2
    assert set("\x1b\x07\r\x7f\x9b\0\u202e").isdisjoint(capsys.readouterr().err)


def test_every_number_has_a_tested_range():
    numbers = {name for name, leaf in LEAVES.items() if {int, float} & set(leaf.kinds)}
    assert {name for name, _, _ in RANGES} == numbers


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora: {rnak: 8}", "lora.rnak: unknown key; did you mean rank?"),
        ("trainin: {seed: 1}", "trainin: unknown section; did you mean training?"),
        ("rank: 8", "rank: unknown section; did you mean lora.rank?"),  # the section forgotten
        ("model: {rank: 8}", "model.rank: unknown key; did you mean lora.rank?"),  # the wrong section
        ("training: {learning_rte: 1.0e-4}", "training.learning_rte: unknown key; did you mean learning_rate?"),
        ("lora: 5", "lora: expected keys and values, got 5"),
        ("lora: [rank]", "lora: expected keys and values, got ['rank']"),
        ("3: {a: 1}", "3: unknown section"),
        ("lora: {8: 1}", "lora.8: unknown key"),
    ],
)
def test_an_unknown_name_in_a_file_names_the_nearest(tmp_path, text, said):
    assert problems(from_yaml, tmp_path, text) == (said,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {lr: 1.0e-4}", "training.lr: unknown key; did you mean learning_rate?"),
        ("lora: {r: 8}", "lora.r: unknown key; did you mean rank?"),
        ("training: {lora_alpha: 8}", "training.lora_alpha: unknown key; did you mean lora.alpha?"),
        ("data: {max_seq_length: 8}", "data.max_seq_length: unknown key; did you mean max_length?"),
    ],
)
def test_a_key_by_the_name_that_others_give_it(tmp_path, text, said):
    assert problems(from_yaml, tmp_path, text) == (said,)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("q_proj", ("q_proj",)),
        ("self_attn.q_proj,o_proj", ("self_attn.q_proj", "o_proj")),
        ("all-linear", "all-linear"),
        (r".*layers\.[01]\.self_attn\.(q|v)_proj", r".*layers\.[01]\.self_attn\.(q|v)_proj"),
        ("[qv]_proj", "[qv]_proj"),  # no list of YAML
    ],
)
def test_plain_names_with_commas_are_a_list_in_a_flag(text, names):
    assert from_flags("--target_modules", text).lora.target_modules == names


@pytest.mark.parametrize(
    "text", ["q_proj v_proj", "q_proj,", "q_proj,,v_proj", "all_linear", "q_proj;v_proj", "null", "3"]
)
def test_a_list_is_explained_by_example(tmp_path, text):
    (said,) = problems(from_flags, "--target_modules", text)
    assert said.startswith(
        "lora.target_modules: expected a list of names such as [q_proj, v_proj], or the word all-linear, "
    )
    assert said.endswith("; as a flag: --target_modules '[q_proj, v_proj]' or --target_modules q_proj,v_proj")
    (said,) = problems(from_yaml, tmp_path, f"lora: {{target_modules: '{text}'}}")
    assert "such as [q_proj, v_proj]" in said and "as a flag" not in said


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 sequences"), (1, "1 sequence"), (2, "2 sequences"), (1234, "1,234 sequences")]
)
def test_counts_are_in_the_singular_or_plural(number, text):
    assert config.counted(number, "sequence") == text
    assert config.counted(number, "process", "processes") == text.replace("sequences", "processes").replace(
        "sequence", "process"
    )


def test_all_problems_are_reported_together(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lora: {rnak: 8, alpha: -1}\ntrainin: {}\ndata: {max_length: 7}\n", encoding="utf-8")
    said = problems(load_config, path, {"training.seed": "x", "generation.top_p": "2"})
    names = ["lora.rnak", "lora.alpha", "trainin", "data.max_length", "training.seed", "generation.top_p"]
    assert [problem.split(":")[0] for problem in said] == names


def test_an_unknown_override_names_the_nearest():
    assert problems(load_config, [], {"lora.rnak": 8}) == ("lora.rnak: unknown key; did you mean lora.rank?",)


BROKEN = [
    ("lora: {rank: 8}\nlora: {rank: 9}\n", "line 2, column 1: not valid YAML: the key 'lora' is written twice"),
    ("lora:\n  rank: 8\n  rank: 8\n", "line 3, column 3: not valid YAML: the key 'rank' is written twice"),
    ("- lora\n", "expected sections such as 'model:' and 'training:', got list"),
    ("lora", "expected sections such as 'model:' and 'training:', got str"),
    ("lora: [", "line 1"),
    ("lora:\n\trank: 8\n", "line 2"),
    ("lora: !!python/object/apply:os.getcwd []\n", "not valid YAML"),  # nothing in a file is executed
    ("lora: {rank: *nowhere}\n", "not valid YAML"),
    ("? [lora]\n: {rank: 8}\n", "not valid YAML"),  # a key that is a list
    ("lora: {rank: 8}\n---\nlora: {rank: 9}\n", "not valid YAML"),
    (
        "lora: {rank: !!bool 1}\n",
        "line 1, column 14: not valid YAML: expected a plain value, got the tag 'tag:yaml.org,2002:bool'",
    ),
    ("lora: {rank: !mine 1}\n", "not valid YAML"),
    ("!!timestamp soon: 1\n", "not valid YAML"),
    ("a: &a [1]\nb: [" + "*a, " * 21 + "1]\n", "expected at most 20 aliases"),
    ("lora: {rank: 8\0}\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_a_file_that_is_no_configuration(tmp_path, text, said):
    (problem,) = problems(from_yaml, tmp_path, text)
    assert problem.startswith(f"--config: {tmp_path / 'own.yaml'}")
    assert said in problem


@pytest.mark.parametrize("content", ["lora: {rank: 8}  # größer".encode("latin-1"), "lora: {rank: 8}".encode("utf-16")])
def test_a_file_that_is_not_utf8(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    assert "line 1 is not UTF-8" in problems(load_config, path)[0]


def test_a_file_that_is_not_there(tmp_path):
    assert problems(load_config, tmp_path / "none.yaml") == (f"--config: no such file: {tmp_path / 'none.yaml'}",)
    assert "cannot read" in problems(load_config, tmp_path)[0]  # a folder


@pytest.mark.parametrize("text", ["", "# nothing\n", "lora:\n", "\ufefflora: {rank: 16}\n", "{}"])
def test_a_file_may_be_empty_or_begin_with_a_byte_order_mark(tmp_path, text):
    assert from_yaml(tmp_path, text) == Config()


def test_contradictions_are_refused():
    assert "lora.use_dora" in problems(from_flags, "--use_dora", "true", "--fused_lora", "on")[0]
    assert from_flags("--use_dora", "true").lora.use_dora
    assert "MiB" in problems(from_flags, "--memory_limit_gib", "8192")[0]


# ------------------------------------------------------------------------------------------------ precedence and paths


def test_a_flag_beats_a_file_beats_the_schema(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("lora: {rank: 4, alpha: 8.0}\ntraining: {seed: 1}\n", encoding="utf-8")
    second.write_text("lora: {alpha: 9.0}\ntraining: {seed: 2}\n", encoding="utf-8")
    loaded = load_config([first, second], {"training.seed": "3"})
    assert (loaded.lora.rank, loaded.lora.alpha, loaded.training.seed, loaded.lora.dropout) == (4, 9.0, 3, 0.05)
    assert loaded.flags == {"training.seed"}
    assert from_flags("--rank", "2", "--lora.rank", "3").lora.rank == 3  # the last one counts


def test_sections_read_as_attributes_and_as_keys():
    loaded = Config()
    assert loaded["data"]["max_length"] == loaded.data.max_length == 512
    with pytest.raises(KeyError):
        loaded["data"]["max_len"]
    with pytest.raises(KeyError):
        loaded["data"]["__class__"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.data.max_length = 1


def test_a_relative_path_is_looked_up_here_then_beside_the_file(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "both.txt").touch()
    (there / "both.txt").touch()
    (there / "only.txt").touch()
    path = there / "own.yaml"
    monkeypatch.chdir(here)
    for name, expected in {
        "both.txt": here / "both.txt",
        "only.txt": there / "only.txt",
        "none.txt": "none.txt",
    }.items():
        path.write_text(f"data: {{dataset: {name}}}\n", encoding="utf-8")
        assert load_config("../there/own.yaml").data.dataset == str(expected)
        assert load_config(path, {"data.dataset": name}).data.dataset == str(expected)  # a flag alike
    assert load_config(path, {"model.name": "."}).model.name == str(here)
    assert load_config(path, {"training.output_dir": "both.txt"}).training.output_dir == "both.txt"  # not an input


def test_words_are_not_taken_for_paths(tmp_path, monkeypatch):
    for word in ("auto", "never"):
        (tmp_path / word).mkdir()
    monkeypatch.chdir(tmp_path)
    assert from_flags("--resume", "never").training.resume == "never"
    assert from_flags("--resume", "auto").training.resume == "auto"


@pytest.mark.parametrize("value", ["~nobody-of-that-name/x", "x" * 5000, "https://example.org/a?b", "C:\\data"])
def test_names_that_cannot_be_paths_are_left_as_they_are(value):
    assert load_config([], {"data.dataset": value}).data.dataset == value


def test_save_and_load_give_the_same_configuration(tmp_path, monkeypatch):
    (tmp_path / "data.txt").touch()
    monkeypatch.chdir(tmp_path)
    written = load_config(
        [],
        {
            "data.dataset": "data.txt",
            "lora.target_modules": ["q_proj"],
            "training.gradient_checkpointing": 3,
            "training.learning_rate": 1e-5,
            "performance.compile": "off",
            "training.report_to": "none",
            "generation.system_prompt": "說中文: 'yes', \"no\"\n# not a comment",
            "training.output_dir": "2024",
        },
    )
    save_config(written, tmp_path / "saved.yaml")
    monkeypatch.chdir("/")
    loaded = load_config(tmp_path / "saved.yaml")
    assert loaded == written
    assert Path(loaded.data.dataset).is_absolute()
    assert "說中文" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")


def test_a_saved_path_stands_in_one_line(tmp_path):
    folder = tmp_path / ("a long name with spaces in it " * 5).strip()
    save_config(load_config([], {"training.output_dir": str(folder)}), tmp_path / "saved.yaml")
    assert f"output_dir: {folder}\n" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")


def test_each_leaf_survives_saving_at_another_value(tmp_path):
    for name, leaf in LEAVES.items():
        default, choices = leaf.field.default, leaf.field.metadata.get("choices", ())
        if bool in leaf.kinds and len(leaf.kinds) == 1:
            value = not default
        elif {int, float} & set(leaf.kinds):
            value = next(value for key, inside, _ in RANGES if key == name for value in inside if value != default)
        elif choices:
            value = next(choice for choice in choices if choice != default)
        elif dict in leaf.kinds:
            value = {"enable_thinking": False, "style": "plain: 'a'"}
        else:
            value = (1, 2) if leaf.items is int else "another"
        changed = load_config([], {name: value})
        save_config(changed, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == changed != Config()


# ------------------------------------------------------------------------------------------------ answering at once


def test_importing_config_imports_no_torch(run_cli, tmp_path):
    (tmp_path / "ask.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport config\n"
        f"config.load_config({str(ROOT / 'config.yaml')!r})\n"
        "print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))\n",
        encoding="utf-8",
    )
    assert run_cli(tmp_path / "ask.py", fresh=True).stdout == "set()\n"


def best_time(run_cli, script: str, *flags: str) -> tuple[float, object]:
    """Return the shortest of three runs in seconds, and the last one: a loaded machine must not fail the test."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_cli(script, *flags, fresh=True)
        times.append(time.perf_counter() - start)
    return min(times), result


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(run_cli, script):
    seconds, result = best_time(run_cli, script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert seconds < 1.0
    takes = TAKEN[script]
    for name, leaf in LEAVES.items():
        assert (f"\n  --{LAST[name]} VALUE" in result.stdout) == (leaf.section in takes or name in takes), name
    sections = [section for section in config.SECTIONS if section in {name.partition(".")[0] for name in takes}]
    assert re.findall(r"^(\w+) \(--\1\.KEY", result.stdout, re.MULTILINE) == sections


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_what_the_script_does_and_ten_flags_of_a_normal_day(run_cli, script):
    lines = run_cli(script, "--help", env={"COLUMNS": "100"}).stdout.splitlines()
    assert re.match(r"(Fine-tune|Talk to) a .*\.$", lines[0])
    start, end = lines.index("flags that you need most often:"), lines.index("other flags of this script:")
    assert start < 12 and end < 40
    flags = [line.split()[0] for line in lines[start:end] if line.startswith("  --")]
    assert len(flags) == len(set(flags)) == 10
    assert not any("expected" in line or ">=" in line for line in lines[:end])
    rest = [line.split()[0] for line in lines[end:] if line.startswith("  --")]
    assert rest and not set(rest) & set(flags)


def test_help_says_what_null_means_where_a_value_may_be_null():
    for name, leaf in LEAVES.items():
        if leaf.optional:
            assert "null" in leaf.field.metadata["help"], name
            assert leaf.expected.endswith(", or null")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_answers_at_once(run_cli, script):
    seconds, result = best_time(run_cli, script, "--top_p", "0", "--temperature", "-1", "--adapter", "none")
    assert (result.returncode, result.stdout) == (2, "")
    said = [line.split(":")[:2] for line in result.stderr.splitlines()]
    problems = [["error", " generation.top_p"], ["error", " generation.temperature"]]
    assert said == problems if script == "inference_example.py" else said == [["error", " --adapter"]]
    assert seconds < 1.0


@pytest.mark.parametrize("encoding", ["cp950", "cp437", "ascii"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_console_can_show_help_and_errors(run_cli, script, encoding):
    env = {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"}
    assert run_cli(script, "--help", env=env, fresh=True).returncode == 0
    result = run_cli(script, "--config", "größer/說.yaml", env=env, fresh=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the repository's own files are at hand")
def test_shipped_configurations_load():
    for path in ROOT.glob("**/config.yaml"):
        if not any(part.startswith((".", "output")) for part in path.relative_to(ROOT).parts):
            load_config(path)


def test_a_number_of_thousands_of_digits_is_one_short_line():
    with pytest.raises(ConfigError) as caught:
        load_config((), {"training.seed": int("f" * 5000, 16)})
    assert len(caught.value.problems) == 1 and len(caught.value.problems[0]) < 400
    assert "expected an integer" in caught.value.problems[0] and "5,002 characters" in caught.value.problems[0]


# ------------------------------------------------------------------------------------------------ what is imported when


def test_compiling_waits_for_the_first_call(monkeypatch):
    import torch

    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return lambda *arguments, **keywords: ("compiled", function(*arguments, **keywords))

    monkeypatch.setattr(torch, "compile", compile_now)
    with startup.compiling_later():

        @torch.compile(dynamic=False)
        def double(x):
            return 2 * x

        @torch.compile
        def triple(x):
            return 3 * x

    assert torch.compile is compile_now and compiled == [] and double.__name__ == "double"
    assert [double(4), double(x=5), triple(1)] == [("compiled", 8), ("compiled", 10), ("compiled", 3)]
    assert compiled == [("double", {"dynamic": False}), ("triple", {})]


def test_scripts_import_no_inductor_and_leave_tritons_cache_where_it_is():
    """Inductor's import takes 2 to 5 s, a third of the time to a first token."""
    program = (
        "import os, sys; from toolkit.startup import before_heavy_imports; before_heavy_imports(); import inference_example, train_qlora, torch;"
        "print('torch._inductor.compile_fx' in sys.modules, torch.compile.__module__, os.environ['TRITON_CACHE_DIR'])"
    )
    set_by_inductor = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # in the processes of other tests
    environment = {name: value for name, value in os.environ.items() if name not in set_by_inductor}
    environment |= {"TRITON_HOME": "somewhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "torch", os.path.join("somewhere", ".triton", "cache")], done.stderr[-2000:]


@pytest.mark.parametrize(
    "value",
    ["{chat_template: x}", "{tools: 1}", "{eos_token: x}", "{a-b: 1}", "{1: 2}", "{a: [1]}", "{a: {b: 1}}", "[a]", "x"],
)
def test_an_option_of_a_template_is_a_name_of_its_own_with_a_plain_value(value):
    """What would replace the template or the messages is refused."""
    with pytest.raises(
        ConfigError, match=r"data\.template_options: expected at most 100 names and values such as .*, or null, got"
    ):
        load_config([], {"data.template_options": yaml.safe_load(value)})


def test_options_of_a_template_as_a_flag():
    parser = build_parser("")
    _, overrides = parse_arguments(parser, ["--template_options", "{enable_thinking: false, n: 2}"])
    assert load_config([], overrides).data.template_options == {"enable_thinking": False, "n": 2}


@pytest.mark.parametrize(
    "flag, text, why",
    [
        ("target_modules", "((", r"got '\(\(': missing \), unterminated subpattern at position 1; as a flag"),
        ("exclude_modules", "a[", r"got 'a\[': unterminated character set at position 1; as a flag"),
        ("layers_to_transform", "0,1,0", "got '0,1,0': 0 stands there more than once; as a flag"),
        ("train_tokens", "<a>,<a>", "got '<a>,<a>': '<a>' stands there more than once; as a flag"),
        ("target_modules", "[q_proj, q_proj]", "'q_proj' stands there more than once"),
    ],
)
def test_why_a_value_cannot_be_used_is_said(flag, text, why):
    with pytest.raises(ConfigError, match=rf"lora.{flag}: expected a list of .*{why}"):
        load_config([], {f"lora.{flag}": text})
