"""The schema: every setting of config.yaml and of the command line, declared once.

This module imports no torch, so --help and errors appear at once. A flag overrides a config file, and a config file
overrides the schema's default. Every value is checked and converted to its type, then kept in frozen dataclasses.
    load_config(["config.yaml"], {"lora.rank": "8"}) -> Config        config.lora.rank, or config['lora']['rank']
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import math
import operator
import os
import re
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit import spelling
from toolkit.plain_values import MOST_CHARACTERS, MOST_OPTIONS, PlainLoader, brief, is_option, is_text


class ConfigError(ValueError):
    """An error that the user can fix: wrong config, flag, data or adapter. Exit code 2, one line per problem."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Section:
    """Base class of the sections. `config['data']['max_length']`, as the tutorial writes it, reads the attribute."""

    def __getitem__(self, key: str) -> Any:
        if key not in {field.name for field in dataclasses.fields(self)}:
            raise KeyError(key)
        return getattr(self, key)


def knob(default: Any, help: str, *, resumable: bool = False, path: bool = False, **limits: Any) -> Any:
    """Declare one setting of a section.

    limits: at_least, above, below, at_most, zero_or_at_least (numbers), choices and may_be_empty (strings), example
    (how a list is written), pattern (a string may be a regular expression). `path` marks a setting that may name a local file. Such a file is looked up in the current
    folder, then in the folder of the config file. `words` are values of such a setting that are not paths. `home` marks
    a folder that need not exist yet; a leading ~ means the user's home.
    """
    return dataclasses.field(default=default, metadata={"help": help, "resumable": resumable, "path": path, **limits})


def free_knob(default: Any, help: str, **limits: Any) -> Any:
    """Declare a setting that a resumed run may change."""
    return knob(default, help, resumable=True, **limits)


SWITCH = ("auto", "on", "off")
MANY = 10**9  # upper bound of counts. A number without an upper bound overflows somewhere late in a run.


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    name: str = knob("Qwen/Qwen2.5-3B-Instruct", "hub id or local folder of a causal language model", path=True)
    revision: str | None = knob(None, "branch, tag or commit on the hub; null means the newest version")
    attn_implementation: str = knob(
        "auto",
        "attention implementation of transformers; auto is sdpa if the model has it, otherwise eager",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    trust_remote_code: bool = knob(
        False, "run Python code that comes with the model; use it only for sources that you trust"
    )


@dataclasses.dataclass(frozen=True)
class QuantizationConfig(Section):
    load_in_4bit: bool = knob(True, "false keeps the base in compute_dtype (LoRA instead of QLoRA)")
    quant_type: str = knob("nf4", "4-bit data type", choices=("nf4", "fp4"))
    compute_dtype: str = knob(
        "bfloat16",
        "data type of the matrix products; float16 is used on a GPU without bfloat16, float32 on a CPU without AVX-512",
        choices=("bfloat16", "float16", "float32"),
    )
    use_double_quant: bool = knob(True, "quantise the quantisation constants too, which saves 0.373 bits per weight")
    products: str = knob("bf16", "arithmetic of training's products with 4-bit weights", choices=("bf16", "fp8"))
    experts: str = free_knob(
        "gpu",
        "the routed experts of a mixture: in 4 bit where they are computed, or in main memory (cpu); or 16bit",
        choices=("gpu", "cpu", "16bit"),
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings(Section):
    rank: int = knob(
        16, "rank r of the adapter's matrices A and B; the update of a weight is B A", at_least=1, at_most=16384
    )
    alpha: float = knob(32.0, "the update B A is multiplied by alpha / rank", at_least=1e-6, at_most=10**6)
    dropout: float = knob(
        0.05, "share of the adapter's inputs that dropout sets to zero during training", at_least=0, at_most=0.999
    )
    target_modules: tuple[str, ...] | str = knob(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "names of the linear layers that get an adapter, the word all-linear for all of them, or a regular expression "
        "that matches their full names",
        choices=("all-linear",),
        example="[q_proj, v_proj]",
        pattern=True,
    )
    exclude_modules: tuple[str, ...] | str | None = knob(
        None,
        "of those layers, names of the ones that get no adapter, or a regular expression for their full names; null: none",
        example="[o_proj]",
        pattern=True,
    )
    layers_to_transform: tuple[int, ...] | None = knob(
        None,
        "numbers of the decoder layers that get adapters, counted from 0; null means all of them",
        example="[0, 1]",
    )
    train_tokens: tuple[str, ...] | None = knob(
        None,
        "texts of tokens whose embedding rows are trained too, such as the tokens of a chat template that a base model "
        "never learned; null means none",
        example="[<|im_start|>, <|im_end|>]",
    )
    use_rslora: bool = knob(False, "rank-stabilised LoRA: multiply the update by alpha / sqrt(rank) instead")
    use_dora: bool = knob(
        False, "weight-decomposed LoRA; slower, since it uses peft's own layers without the fast path"
    )
    init_adapter: str | None = knob(
        None,
        "folder of an adapter to go on from; rank, alpha and targets are then that adapter's; null means a new adapter",
        path=True,
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of create_lora_config, which makes a fresh adapter; of the optional ones those that are given."""
        others = ("init_adapter", "train_tokens")
        return {key: value for key, value in vars(self).items() if key not in others and value is not None}


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    dataset: str | tuple[Any, ...] = knob(
        "Salesforce/wikitext",
        "hub id, or a local .txt, .csv, .tsv, .json, .jsonl or .parquet file, or a folder of them; several sources are "
        "a list",
        path=True,
        sources=True,
        example="[a.jsonl, {dataset: b.txt, share: 0.5}]",
    )
    dataset_config: str | None = knob(
        "wikitext-2-raw-v1",
        "configuration of a hub data set, ignored for local files; null means that the data set has only one",
    )
    train_split: str = knob("train", "split to train on")
    validation_split: str | None = knob(
        "validation",
        "split to evaluate on; if it is null or does not exist, rows of the training split are held out",
    )
    validation_fraction: float = knob(
        0.05,
        "share of the rows to hold out if there is no validation split; the seed chooses them",
        at_least=0,
        below=1,
    )
    text_column: str = knob("text", "column that holds the text")
    format: str = knob(
        "auto", "kind of the rows; auto decides by the names of the columns", choices=("auto", "text", "chat", "prompt")
    )
    rows: str = knob(
        "auto",
        "documents: each row is a text of its own; lines: the rows are the lines of one running text",
        choices=("auto", "documents", "lines"),
    )
    completion_only: bool = knob(True, "chat and prompt data: train on the answers only")
    max_length: int = knob(512, "tokens per sequence", at_least=8, at_most=2**20)
    packing: bool = knob(
        True, "join rows into full blocks of max_length tokens; false: one row per sequence, with padding"
    )
    max_train_samples: int | None = knob(
        None, "train on at most this many rows; null means all rows", at_least=1, at_most=MANY
    )
    max_eval_samples: int | None = knob(
        None, "evaluate on at most this many rows; null means all rows", at_least=1, at_most=MANY
    )
    template_options: dict | None = knob(
        None, "options of the chat template, in training and at inference; null: as the template has them"
    )


# What each source in a list may have of its own; what it lacks is as data.* has it.
OF_A_SOURCE = ("dataset", "dataset_config", "text_column", "format", "share")


@dataclasses.dataclass(frozen=True)
class Source(DataConfig):
    """One source of the data, with the settings that count for it. name: what errors call it, data.dataset[1]."""

    share: float = knob(1.0, "part of the rows that is drawn, by the seed and once for all epochs", above=0, at_most=1)
    name: str = "data.dataset"
    if typing.TYPE_CHECKING:
        dataset: str  # no list


def sources_of(data: DataConfig) -> list[Source]:
    """Return the sources of the data; data.dataset that is no list is the only one."""
    if isinstance(data.dataset, str):
        return [data if isinstance(data, Source) else Source(**vars(data))]
    items = [item if isinstance(item, dict) else {"dataset": item} for item in data.dataset]
    return [Source(**(vars(data) | item | {"name": f"data.dataset[{i}]"})) for i, item in enumerate(items)]


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    num_epochs: float = free_knob(3.0, "passes over the data", above=0, at_most=10**6)
    max_steps: int | None = free_knob(
        None,
        "stop after this many optimizer steps instead of num_epochs; null means that num_epochs decides",
        at_least=1,
        at_most=MANY,
    )
    batch_size: int = free_knob(
        1, "sequences per micro-batch; auto_fit may choose another number", at_least=1, at_most=2**16
    )
    gradient_accumulation_steps: int = free_knob(
        16,
        "micro-batches per optimizer step; auto_fit may change it, but keeps its product with batch_size",
        at_least=1,
        at_most=2**16,
    )
    learning_rate: float = knob(2e-4, "peak learning rate", above=0, at_most=100)
    lr_scheduler: str = knob(
        "cosine", "how the learning rate changes after the warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = knob(
        0.03,
        "share of the steps in which the learning rate rises; step k of these W steps uses k / W of learning_rate",
        at_least=0,
        below=1,
    )
    weight_decay: float = knob(0.0, "decoupled weight decay (AdamW) of the adapter's weights", at_least=0, at_most=100)
    max_grad_norm: float = knob(
        0.3, "a gradient with a larger norm is scaled down to this norm", at_least=1e-6, at_most=10**9
    )
    optim: str = knob(
        "paged_adamw_8bit",
        "optimizer; the paged ones move their states to main memory when the GPU's memory is full",
        choices=("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"),
    )
    gradient_checkpointing: bool | int | str = free_knob(
        True,
        "recompute activations in the backward pass to save memory: true (all layers), false, N (the first N layers), "
        "auto, or offload (all layers, with their inputs kept in main memory); auto_fit may choose fewer layers",
        at_least=0,
        at_most=MANY,
        choices=("auto", "offload"),
    )
    seed: int = knob(
        42,
        "random seed of the data's order, the initial adapter, dropout and the rows held out",
        at_least=0,
        at_most=2**32 - 1,
    )  # numpy's range
    logging_steps: int = free_knob(10, "optimizer steps between two lines of the log", at_least=1, at_most=MANY)
    eval_steps: int | None = free_knob(
        None, "optimizer steps between two evaluations; null means once per epoch", at_least=1, at_most=MANY
    )
    save_steps: int | None = free_knob(
        None,
        "optimizer steps between two checkpoints, in addition to save_minutes; null means no checkpoints by step count",
        at_least=1,
        at_most=MANY,
    )
    save_minutes: float | None = free_knob(
        15.0, "minutes between two checkpoints; null means no checkpoints by time", above=0, at_most=10**6
    )
    save_total_limit: int = free_knob(2, "number of checkpoints to keep", at_least=1, at_most=10**6)
    early_stopping_patience: int | None = free_knob(
        None,
        "stop after this many evaluations in a row without a better loss; null means never",
        at_least=1,
        at_most=MANY,
    )
    resume: str = free_knob(
        "auto",
        "auto: from the last checkpoint in output_dir; never: from the start, with --overwrite where a run is; or a checkpoint's path",
        path=True,
        words=("auto", "never"),
    )
    output_dir: str = free_knob("output_qlora_qwen_3b", "folder for everything that a run writes", home=True)
    report_to: str = free_knob(
        "none", "experiment tracker that accelerate supports, such as tensorboard or wandb; or none"
    )


@dataclasses.dataclass(frozen=True)
class PerformanceConfig(Section):
    auto_fit: bool = free_knob(
        True, "choose the fastest micro-batch and checkpointing that fit the GPU; the training result does not change"
    )
    memory_limit_gib: float | None = free_knob(
        None, "GiB of GPU memory that this process may use; null means all that is free", above=0
    )
    fused_lora: str = free_knob("auto", "compute a 4-bit linear layer and its adapter in one operator", choices=SWITCH)
    compile: str = free_knob("auto", "compile the layers with torch.compile", choices=SWITCH)
    cuda_graphs: str = free_knob("auto", "replay each micro-batch as one CUDA graph", choices=SWITCH)
    swap_activations: int | str = free_knob(
        "auto", "checkpointed layers whose activations wait in main memory", at_least=0, at_most=MANY, choices=("auto",)
    )
    deterministic: bool = free_knob(False, "make runs on a GPU repeatable bit for bit")
    shard_base: bool = free_knob(False, "divide the 4-bit weights of the base among the processes of torchrun")


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Section):
    max_new_tokens: int = free_knob(128, "longest answer, in tokens", at_least=1, at_most=2**20)
    temperature: float = free_knob(
        0.7,
        "how random the choice of tokens is; 0 always chooses the most likely token",
        zero_or_at_least=0.001,
        at_most=100,
    )
    top_p: float = free_knob(
        0.9, "sample from the smallest set of most likely tokens whose probabilities add up to this", above=0, at_most=1
    )
    top_k: int | None = free_knob(
        None, "sample from the k most likely tokens only; null means all tokens", at_least=1, at_most=MANY
    )
    repetition_penalty: float = free_knob(
        1.0, "a number above 1 makes repetition less likely", at_least=0.01, at_most=100
    )
    num_beams: int = free_knob(
        1, "beams of transformers' beam search, which is slower; 1 means none", at_least=1, at_most=64
    )
    system_prompt: str | None = free_knob(
        None, "system message of a chat; null means the one in the chat template, if it has one", may_be_empty=True
    )


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """All sections. `flags` holds the names of the settings given as flags: auto_fit does not change those."""

    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraSettings = LoraSettings()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    performance: PerformanceConfig = PerformanceConfig()
    generation: GenerationConfig = GenerationConfig()
    flags: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)


SECTIONS: dict[str, Any] = {  # the class of each section, by name
    field.name: type(field.default) for field in dataclasses.fields(Config) if field.name != "flags"
}
BOUNDS: dict[str, tuple[str, Any]] = {
    "zero_or_at_least": ("0, or >=", lambda value, limit: value == 0 or value >= limit),
    "at_least": (">=", operator.ge),
    "above": (">", operator.gt),
    "at_most": ("<=", operator.le),
    "below": ("<", operator.lt),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its name (section and key), the types that it allows and its declaration."""

    section: str
    key: str
    kinds: tuple[type, ...]
    items: type  # of a list
    field: dataclasses.Field

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def optional(self) -> bool:
        return types.NoneType in self.kinds

    @property
    def takes_sources(self) -> bool:
        """Whether the value may be a list of sources, which is data.dataset's alone."""
        return tuple in self.kinds and "sources" in self.field.metadata

    @property
    def example(self) -> str:
        """Return how a list is written in YAML; a shell needs quotes around it."""
        return self.field.metadata.get("example", "[a, b]")

    @property
    def expected(self) -> str:
        """Return in words which values are allowed, for errors and --help."""
        limits, words = self.field.metadata, []
        if bool in self.kinds:
            words.append("true or false")
        if int in self.kinds or float in self.kinds:
            bounds = [f"{sign} {limits[key]}" for key, (sign, _) in BOUNDS.items() if key in limits]
            words.append(" ".join(["an integer" if int in self.kinds else "a number", " and ".join(bounds)]).strip())
        if tuple in self.kinds:
            what = "numbers" if self.items is int else "texts" if self.example.startswith("[<") else "names"
            words.append(f"a list {'' if self.takes_sources else f'of {what} '}such as {self.example}")
        if dict in self.kinds:
            words.append(f"at most {MOST_OPTIONS} names and values such as {{enable_thinking: false}}")
        if "choices" in limits:
            words.append(("one of " if len(limits["choices"]) > 1 else "the word ") + ", ".join(limits["choices"]))
        if "pattern" in limits:
            words.append("a regular expression")
        elif str in self.kinds and "choices" not in limits:
            words.append("text, which may be empty" if "may_be_empty" in limits else "non-empty text")
        if self.optional:
            words.append("null")
        return ", or ".join(words)


def leaves(sections: dict[str, Any] = SECTIONS) -> Iterator[Leaf]:
    """Yield every setting of the schema, in the order of config.yaml."""
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for field in (field for field in dataclasses.fields(cls) if field.metadata):
            hint = hints[field.name]
            members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            items = next((typing.get_args(m)[0] for m in members if typing.get_origin(m) is tuple), str)
            kinds = tuple(typing.get_origin(member) or member for member in members)
            yield Leaf(section, field.name, kinds, items, field)


LEAVES: dict[str, Leaf] = {leaf.name: leaf for leaf in leaves()}
_KEYS = [leaf.key for leaf in LEAVES.values()]
SHORT: dict[str, str] = {leaf.key: leaf.name for leaf in LEAVES.values() if _KEYS.count(leaf.key) == 1}
SHORT["model_name"] = "model.name"

# What the config.yaml in an adapter's folder may set: what the adapter was trained on and with. The folder may come from
# anybody, so whatever runs code, reaches a network, writes, or says where, is not in this list and comes from the user:
# from a flag, a given --config, or the config.yaml beside the script. A new setting is in it only after it is added here.
FROM_ADAPTER = frozenset(name for name in LEAVES if name.startswith(("quantization.", "lora.")))
FROM_ADAPTER -= {"lora.init_adapter"}  # another folder, which training would load
FROM_ADAPTER |= {"model.name", "model.revision", "model.attn_implementation", "training.seed"}
FROM_ADAPTER |= {f"data.{key}" for key in ("dataset_config", "train_split", "validation_split", "validation_fraction")}
FROM_ADAPTER |= {f"data.{key}" for key in ("text_column", "format", "rows", "completion_only", "max_length", "packing")}
FROM_ADAPTER |= {f"data.{key}" for key in ("max_train_samples", "max_eval_samples", "template_options")}
FROM_OWN_RUN = FROM_ADAPTER | {"data.dataset", "performance.memory_limit_gib"}  # if the user's own run left it there


def shown(value: Any) -> str:
    """Return a value as it is written in config.yaml, for a message: null, true, [q_proj, v_proj]."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(part)}' for key, part in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Because(ValueError):
    """A value that a leaf does not allow, for a reason that is not in `Leaf.expected`."""


def coerce(leaf: Leaf, value: Any) -> Any:
    """Return `value`, as YAML reads it, as the leaf's type.

    A ConfigError names the setting, which values are allowed and which value was given.
    """
    if isinstance(value, (list, tuple)) and value and leaf.takes_sources:
        return _coerce_sources(leaf, value)
    try:
        return _convert(leaf, value)
    except (ValueError, OverflowError) as error:
        why = f": {error}" if isinstance(error, Because) else ""
        text = isinstance(value, str) and str in leaf.kinds and not {"choices", "pattern"} & leaf.field.metadata.keys()
        more = " without control characters" if text and value.strip() else ""
        raise ConfigError(f"{leaf.name}: expected {leaf.expected}{more}, got {brief(value)}{why}") from None


def _coerce_sources(leaf: Leaf, items: Sequence[Any]) -> tuple[Any, ...]:
    """Return the sources in a list: texts, and mappings with the settings that a source has of its own.

    Raises a ConfigError that names each source by its place in the list, from 0.
    """
    known = {part.key: part for part in leaves({"data": Source}) if part.key in OF_A_SOURCE}
    problems: list[str] = []
    found: list[Any] = []
    for i, item in enumerate(items):
        source, own = f"{leaf.name}[{i}]", {}
        for key, value in item.items() if isinstance(item, dict) else [("dataset", item)]:
            if key not in known:
                problems.append(
                    f"{source}.{spelling.word(key)}: unknown key{spelling.nearest(key, OF_A_SOURCE, SHORT)}"
                )
                continue
            section, word = (source, key) if isinstance(item, dict) else source.split(".")
            kinds = tuple(kind for kind in known[key].kinds if kind is not tuple)  # no list within the list
            with _collecting(problems):
                own[key] = coerce(Leaf(section, word, kinds, str, known[key].field), value)
        if "dataset" not in (item if isinstance(item, dict) else known):
            problems.append(f"{source}.dataset: expected a path or a hub id, got none")
        if own.get("share") == 1:
            del own["share"]
        found.append(own["dataset"] if own.keys() == {"dataset"} else own)
    if problems:
        raise ConfigError(*problems)
    return tuple(found)


def _convert(leaf: Leaf, value: Any) -> Any:
    """Return `value` as the leaf's type; raise ValueError or OverflowError if the leaf does not allow it."""
    kinds, limits = leaf.kinds, leaf.field.metadata
    choices, value = limits.get("choices", ()), _listed(leaf, value)
    if value is None and leaf.optional:
        return None
    if isinstance(value, bool):
        if bool in kinds:
            return value
        if choices == SWITCH:  # YAML 1.1 reads a bare on/off as a boolean
            return "on" if value else "off"
        raise ValueError
    if isinstance(value, dict) and dict in kinds:
        few = len(value) <= MOST_OPTIONS and sum(map(len, map(str, value.values()))) <= MOST_CHARACTERS
        if few and all(is_option(name, of) for name, of in value.items()):
            return value
        raise ValueError
    if isinstance(value, str) and str in kinds:
        free = _is_pattern(value, choices) if "pattern" in limits else not choices
        if value in choices or (free and is_text(value, "may_be_empty" in limits)):
            return value
        raise ValueError
    if isinstance(value, (list, tuple)) and tuple in kinds:
        if not value or not all(_is_item(leaf, item) for item in value):
            raise ValueError
        if again := [item for i, item in enumerate(value) if item in value[:i]]:
            raise Because(f"{brief(again[0])} stands there more than once")
        return tuple(value)
    if isinstance(value, str) and float in kinds and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        value = float(value)  # YAML 1.1 reads 2e-4, which has no decimal point, as a str
    if isinstance(value, (int, float)) and float in kinds:
        value = float(value)
        if not math.isfinite(value):
            raise ValueError
    elif not (isinstance(value, int) and int in kinds):
        raise ValueError
    if not all(holds(value, limits[key]) for key, (_, holds) in BOUNDS.items() if key in limits):
        raise ValueError
    return value


def coerce_flag(leaf: Leaf, text: str) -> Any:
    """Read a flag's text as YAML would, but keep the value of a text setting: `--output_dir 2024` names a folder."""
    verbatim = leaf.kinds in ((str,), (str, types.NoneType)) and leaf.field.metadata.get("choices") != SWITCH
    if verbatim or (leaf.takes_sources and not (text.startswith("[") and text.endswith("]"))):
        return coerce(leaf, None if leaf.optional and text in ("null", "~") else text)
    try:
        value = yaml.load(text, PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text if "pattern" in leaf.field.metadata else None  # such as [qkv]_proj, which is no list of YAML
        if value is None:
            raise ConfigError(f"{leaf.name}: expected {leaf.expected}, got {brief(text)}{_list_hint(leaf)}") from None
    try:
        return coerce(leaf, value)
    except ConfigError as error:
        *others, last = error.problems
        raise ConfigError(*others, f"{last}{_list_hint(leaf)}") from None


def _listed(leaf: Leaf, value: Any) -> Any:
    """Return the list that a text such as `q_proj,v_proj` or a number means; return any other value unchanged.

    A word that is almost one of the leaf's choices, such as all_linear for all-linear, is a typing error and no name.
    """
    if tuple not in leaf.kinds or leaf.takes_sources or not isinstance(value, (str, int)) or isinstance(value, bool):
        return value
    if leaf.items is int:
        numbers = str(value).split(",")
        return [int(n) for n in numbers] if all(re.fullmatch(r" *[0-9]{1,9} *", n) for n in numbers) else value
    names = [name.strip() for name in str(value).split(",")]
    if str not in leaf.kinds:  # texts of tokens
        return names if isinstance(value, str) and all(names) else value
    slip = len(names) == 1 and difflib.get_close_matches(str(value), leaf.field.metadata.get("choices", ()), cutoff=0.8)
    plain = all(re.fullmatch(r"[A-Za-z_][\w.]*", name) and name != "null" for name in names)
    return names if plain and not slip else value


def _is_item(leaf: Leaf, item: Any) -> bool:
    """Return whether this may stand in a leaf's list: a name, or a number of a layer."""
    if leaf.items is int:
        return type(item) is int and 0 <= item < MANY
    return isinstance(item, str) and is_text(item)


def _is_pattern(text: str, choices: Sequence[str]) -> bool:
    """Return whether a text is a regular expression, and neither a name nor one of `choices` with a typing error.

    Raises Because with the reason why Python cannot read one.
    """
    if len(text) > 10_000 or not re.search(r"[][.*+?(){}|\\^$]", text):
        return False
    if difflib.get_close_matches(text, choices, cutoff=0.8):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how future versions of Python may read it
            re.compile(text)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise Because(str(error) or type(error).__name__) from None
    return True


def _list_hint(leaf: Leaf) -> str:
    """Return how to write a list in a shell, for the error about a flag that is a list."""
    if tuple not in leaf.kinds:
        return ""
    if leaf.takes_sources:
        return f"; as a flag: --{leaf.key} '{leaf.example}' or --{leaf.key} a.jsonl b.txt"
    return f"; as a flag: --{leaf.key} '{leaf.example}' or --{leaf.key} {leaf.example[1:-1].replace(' ', '')}"


MOST_BYTES, MOST_PROBLEMS = 2**20, 40


def _config_text(path: Path) -> str:
    """Return the text of a config file; raise OSError or UnicodeDecodeError."""
    if path.is_fifo() and path.parent.name != "fd":  # of a shell's <(...); any other would be waited for without end
        raise OSError("expected a file, got a named pipe")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(f"expected at most {MOST_BYTES:,} bytes")
    return content.decode("utf-8")


def read_yaml(path: Path) -> dict:
    """Return the mapping in a YAML file; an empty file is an empty mapping."""
    try:
        tree = yaml.load(_config_text(path), PlainLoader)  # a SafeLoader executes nothing in the file
    except FileNotFoundError:
        raise ConfigError(f"--config: no such file: {path}") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ConfigError(f"--config: cannot read {path}: line {line} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path} as UTF-8 text: {error}".replace("\n", " ")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise ConfigError(f"--config: {where}: not valid YAML: {reason}".replace("\n", " ")) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config: {path}: expected sections such as 'model:' and 'training:', got {type(tree).__name__}"
        )
    return tree


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a ConfigError in `problems`, so that all of them are reported together."""
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)


def _values(tree: dict, problems: list[str]) -> dict[str, Any]:
    """Return the checked values of a config file's tree by their names; add whatever is wrong to `problems`."""
    values = {}
    for section, body in tree.items():
        if len(problems) > MOST_PROBLEMS:
            break
        if section not in SECTIONS:
            meant = f"; did you mean {SHORT[section]}?" if section in SHORT else ""
            hint = meant or spelling.nearest(section, list(SECTIONS), SHORT)
            problems.append(f"{spelling.word(section)}: unknown section{hint}")
        elif body is not None and not isinstance(body, dict):
            problems.append(f"{section}: expected keys and values, got {brief(body)}")
        else:
            for key, value in itertools.islice((body or {}).items(), len(LEAVES) + MOST_PROBLEMS):
                name = f"{section}.{key}"
                if name in LEAVES:
                    with _collecting(problems):
                        values[name] = coerce(LEAVES[name], value)
                else:
                    own = [leaf.key for leaf in LEAVES.values() if leaf.section == section]
                    usual = key if key in SHORT else spelling.usual(str(key), SHORT)
                    elsewhere = usual in SHORT and usual not in own
                    hint = f"; did you mean {SHORT[usual]}?" if elsewhere else spelling.nearest(key, own, SHORT)
                    problems.append(f"{section}.{spelling.word(key)}: unknown key{hint}")
    return values


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a message for each pair of settings that contradict each other."""
    if config.lora.use_dora and config.performance.fused_lora == "on":
        yield (
            "performance.fused_lora: on cannot be combined with lora.use_dora: true, which needs peft's own layers; "
            "use auto or off"
        )
    pattern = isinstance(config.lora.target_modules, str) and config.lora.target_modules != "all-linear"
    if pattern and config.lora.layers_to_transform is not None:
        yield (
            "lora.layers_to_transform: goes with a list of names or all-linear; a regular expression in "
            "lora.target_modules says itself which layers it means"
        )
    if config.lora.train_tokens and config.lora.init_adapter:
        yield "lora.train_tokens: expected null with lora.init_adapter, whose adapter has no rows of tokens to go on from"
    packed = config.quantization.load_in_4bit and config.quantization.experts == "gpu"
    if config.performance.shard_base and (config.lora.use_dora or not packed):
        yield "performance.shard_base: expected false with use_dora: true, experts: cpu or 16bit, or load_in_4bit: false"
    if config.performance.memory_limit_gib is not None and config.performance.memory_limit_gib > 4096:
        yield f"performance.memory_limit_gib: expected GiB, got {config.performance.memory_limit_gib}; is that MiB?"


def _locate(leaf: Leaf, value: Any, files: Sequence[Path]) -> Any:
    """Return the absolute path of a local file or folder; return any other value, such as a hub id, unchanged.

    It is looked up in the current folder, then in the folders of the config files; of several sources each is. An
    address is not looked up, since that alone would connect to another machine.
    """
    if "home" in leaf.field.metadata:
        return os.path.expanduser(value)
    if isinstance(value, tuple) and leaf.takes_sources:
        return tuple(_locate(leaf, item, files) for item in value)
    if isinstance(value, dict) and leaf.takes_sources:
        return value | {"dataset": _locate(leaf, value["dataset"], files)}
    words = (None, *leaf.field.metadata.get("words", ()))
    if not leaf.field.metadata["path"] or value in words or is_address(value):
        return value
    for folder in (Path.cwd(), *(path.resolve().parent for path in files)):
        try:
            candidate = folder / Path(value).expanduser()
            if os.path.lexists(candidate):  # a link that leads nowhere is a local file too, which is missing
                return os.path.abspath(candidate)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # too long, with a null byte, or of an unknown user: not a local path
            continue
    return value


def load_config(
    paths: Sequence[str | Path] | str | Path = (),
    overrides: dict[str, Any] | None = None,
    adapters: Path | None = None,
    may_set: Collection[str] = (),
) -> Config:
    """Return the configuration: the schema's defaults, replaced by each file in turn, then by `overrides`.

    The keys of `overrides` are names such as lora.rank. A value that is a str is read like the text of a flag. All
    problems are reported together in one ConfigError. adapters: the config.yaml in an adapter's folder, which is read
    before the other files and sets nothing but the settings in `may_set`.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    values: dict[str, Any] = {}
    problems: list[str] = []
    overrides = overrides or {}
    if adapters is not None:
        found = {name: value for name, value in _values(read_yaml(adapters), problems).items() if name in may_set}
        values = {name: _locate(LEAVES[name], value, [adapters]) for name, value in found.items()}
    for path in files:
        for name, value in _values(read_yaml(path), problems).items():
            values[name] = _locate(LEAVES[name], value, [path])
    for name, value in overrides.items():
        if name not in LEAVES:
            problems.append(f"{name}: unknown key{spelling.nearest(name, list(LEAVES), SHORT)}")
            continue
        read = coerce_flag if isinstance(value, str) else coerce
        with _collecting(problems):
            values[name] = _locate(LEAVES[name], read(LEAVES[name], value), files[::-1])
    if len(problems) > MOST_PROBLEMS:
        raise ConfigError(
            *problems[:MOST_PROBLEMS], "--config: more is wrong than the lines above; is it a config file?"
        )
    if problems:
        raise ConfigError(*problems)
    sections = {
        name: cls(**{key.split(".")[1]: value for key, value in values.items() if key.startswith(name + ".")})
        for name, cls in SECTIONS.items()
    }
    config = Config(**sections, flags=frozenset(overrides))
    if problems := list(_contradictions(config)):
        raise ConfigError(*problems)
    return config


def is_address(name: Any) -> bool:
    """Return whether a name leads to another machine: https://..., s3://..., or \\\\server\\share on Windows."""
    return isinstance(name, str) and ("://" in name or name.startswith(("//", "\\\\")))


def flatten(config: Config) -> dict[str, Any]:
    """Return the value of every setting by its name, such as lora.rank."""
    return {leaf.name: config[leaf.section][leaf.key] for leaf in LEAVES.values()}


def save_config(config: Config, path: Path) -> None:
    """Write every value that is in effect, so that `load_config(path)` gives the same configuration in any folder."""
    tree: dict[str, dict] = {}
    for name, value in flatten(config).items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=math.inf), encoding="utf-8")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return `1 sequence`, `2 sequences`, `1,000 sequences`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
