"""The sizes of a model that its memory plan and its speed depend on, read from config.json alone."""

import dataclasses
import re

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from config import Config, ConfigError, LoraSettings
from fast_path import families
from fast_path.families import Family, known_positions
from fast_path.host_rows import rows_name
from fast_path.targets import named, select
from quantization_utils import LOADING_ERRORS, auto_class, cannot_load, stored_in_4bit
from toolkit.expert_plan import ExpertShape, expert_shape
from toolkit.hub import asking_hub
from toolkit.local_paths import missing_model


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the plan needs; config.json is enough to find them."""

    linears: tuple[tuple[str, int, int], ...]  # (name, out_features, in_features) of every layer that is quantised
    towers: tuple[str, ...]  # parts that see or hear, which get no adapters
    plain_linears: tuple[tuple[str, int, int], ...]  # of those that bitsandbytes leaves in 16 bit
    experts: ExpertShape  # the routed experts, tensors of three dimensions
    embedding: int  # parameters of embedding and head, counted once if they are tied
    rows: int  # parameters of an embedding that is not tied, whose rows can wait in main memory; else 0
    other_parameters: int  # norms, biases and plain_linears; like the embedding they are kept in the compute dtype
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    head_norms: bool  # q and k are normalised, as in Qwen3
    positions: int | None  # that the model supports, if its configuration has the number
    capped: bool = False  # the logits are capped with a tanh
    family: Family = families.UNKNOWN  # what the fast path knows about it
    trainable: int | None = (
        None  # as peft counts it, where adapters may be on experts; None: as `adapter_parameters` does
    )
    head: str = ""  # the name of the output head
    processes: int = 1  # each on a card of its own; the plan is that of one card

    @property
    def parameters(self) -> int:
        packed = sum(out * into for _, out, into in self.linears)
        return packed + self.embedding + self.experts.all + self.other_parameters

    def width(self, *names: str) -> int:
        """Return the sum of the output widths of these linears in one layer; a linear that is missing counts 0."""
        total = sum(out for name, out, _ in self.linears if name.rpartition(".")[2] in names)
        return total // self.layers

    @property
    def query(self) -> int:
        heads = next(
            (into for name, _, into in self.linears if name.rpartition(".")[2] == self.family.out), self.hidden
        )
        return self.width("q_proj") or heads

    @property
    def key_value(self) -> int:
        together = self.width(*self.family.qkv) if len(self.family.qkv) == 1 else 0
        return self.width("k_proj", "v_proj") or max(0, together - self.query) or 2 * self.hidden

    @property
    def inner(self) -> int:
        """The width inside the MLP; 0 where a layer has routed experts alone."""
        linears = (*self.linears, *self.plain_linears)
        if self.experts.layers:
            return max((into for name, _, into in linears if not re.search("att(n|ention)", name)), default=0)
        return max((into for _, _, into in linears), default=self.hidden)


def model_skeleton(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Return the model with this hub id or folder on the meta device; only config.json (a few kB) is read, no weights."""
    if problems := missing_model(model_name, ("config.json",)):
        raise ConfigError(*problems)
    try:
        with asking_hub(model_name):
            model_config = AutoConfig.from_pretrained(
                model_name, revision=revision, trust_remote_code=trust_remote_code
            )
        stored_in_4bit(model_config, model_name)  # which refuses another quantisation
        with torch.device("meta"):
            return auto_class(model_config).from_config(model_config, trust_remote_code=trust_remote_code)
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(model_name, error) from None


def model_shape(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the sizes of the model with this hub id or folder."""
    return shape_of(model_skeleton(model_name, revision, trust_remote_code))


def shape_of(model: nn.Module) -> ModelShape:
    """Return the sizes of a model that is not quantised yet; its weights may be on the meta device."""
    model.tie_weights()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    packed: list[tuple[str, int, int]] = []
    plain: list[tuple[str, int, int]] = []
    routers = families.routers(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            out, into = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            # bitsandbytes packs these two classes, not those derived from them.
            kept = name in routers or type(module) not in (nn.Linear, Conv1D)
            (plain if kept else packed).append((name, out, into))
    experts = expert_shape(model)
    embedding = sum(p.numel() for p in {head.weight, table.weight})
    total = sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config()
    if not table.weight.numel():
        raise ConfigError(f"model.name: expected an embedding with weights, got vocab_size {text.vocab_size}")
    if missing := [name for name in ("hidden_size", "num_hidden_layers") if not families.own_value(text, name)]:
        name = type(model).__name__  # BLT has three stacks of layers, each of a width of its own
        raise ConfigError(
            f"model.name: no memory plan for {name}, whose config.json has no {missing[0]}: train on a CPU"
        )
    return ModelShape(
        linears=tuple(packed),
        towers=tuple(families.towers(model)),
        plain_linears=tuple(plain),
        experts=experts,
        embedding=embedding,
        rows=table.weight.numel() if rows_name(model) else 0,
        other_parameters=total - embedding - experts.all - sum(out * into for _, out, into in packed),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        heads=families.own_value(text, "num_attention_heads"),
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        positions=known_positions(model.config),
        capped=bool(getattr(text, "final_logit_softcapping", None)),
        family=families.of(families.decoder_layers(model)[0]),
        head=next((name for name, module in model.named_modules() if module is head), ""),
    )


def adapted(shape: ModelShape, lora: LoraSettings) -> list[tuple[str, int, int]]:
    """Return the linear layers that get an adapter."""
    apart = tuple(f"{name}." for name in shape.towers)
    linears = [linear for linear in (*shape.linears, *shape.plain_linears) if not f"{linear[0]}.".startswith(apart)]
    targets, exclude, layers = lora.target_modules, lora.exclude_modules, lora.layers_to_transform
    names = tuple(name for name, _, _ in linears)
    if isinstance(targets, tuple) and exclude is None and layers is None:  # which may name other modules only
        chosen = named(targets, names, "lora.target_modules")
    else:
        chosen = set(select(names, targets, exclude, layers, shape.layers, shape.head))
    return [linear for linear in linears if linear[0] in chosen]


def adapter_parameters(shape: ModelShape, config: Config) -> int:
    """Return the number of trainable parameters."""
    rows = len(set(config.lora.train_tokens or ())) * shape.hidden
    if shape.trainable is not None:
        return shape.trainable + rows
    chosen = adapted(shape, config.lora)
    dora = sum(out for _, out, _ in chosen) if config.lora.use_dora else 0
    return config.lora.rank * sum(out + into for _, out, into in chosen) + dora + rows
