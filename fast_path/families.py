"""Facts about each family of models, one row per family. docs/adding_a_model.md shows how to add one.

A row states facts about transformers' classes, which it identifies by their names. Which fused parts a family gets
follows from these facts alone, in `plain_attention`, `plain_mlp`, `plain_norms` and `plain_decode`: each returns the
reason why a part stays plain, or None. A model without a row (UNKNOWN) keeps its own attention, MLP and norms; its
4-bit linears with an adapter are still fused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from config import ConfigError

if TYPE_CHECKING:  # this file imports no heavy library, since it is read before torch is imported
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one family. The defaults are those of Llama, so a row says how a family differs from it.

    Training uses the same fused layers as generation does for prompts, and for batches that the decode step cannot
    run. The decode step has kernels of its own.
    """

    name: str = ""
    # The names of transformers' classes; "" where no fused part replaces the class.
    model: str = ""
    layer: str = ""
    attention: str = ""
    mlp: str = ""
    norm: str = ""
    # Attention. `qkv` names the linears that make q, k and v; a single name is one matrix for all three. The same holds
    # for `gate_up` below.
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    # q and k pass through the norms q_norm and k_norm: each as wide as one "head", or as "all" heads together; "" if not
    qk_norms: str = ""
    rotates: str = ""  # the attribute of attention that says whether its layer rotates at all; "" where all do
    score_cap: bool = False  # attention scores are capped with a tanh
    # MLP
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "silu"  # of gate, named as in transformers' hidden_act
    act: str = "act_fn"  # the attribute of the MLP that is its activation
    # Norms. All are RMS norms.
    norm_scale: str = "weight"  # the factor that they multiply by; "1 + weight" in Gemma
    epsilon: str = "variance_epsilon"  # the attribute that is the number added to the mean square
    # The norms before attention and before the MLP; "" where there is none, as in OLMo 2, which has them after only.
    norms_before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str, str] = ("", "")  # the norms after attention and after the MLP, before these are added
    # Attributes of the layer and of the decoder: the factors of what attention and MLP add, and of the embedding.
    residual_factor: str = ""
    embedding_factor: str = ""
    shapes_logits: bool = False  # the model scales or caps its head's product (LogitForm of loss.py)

    @property
    def readers(self) -> dict[str, str]:
        """Map each linear that reads the same x as others to the name of its group. A group shares one dropout mask."""
        groups = {"qkv": self.qkv, "gate_up": self.gate_up}
        return {leaf: group for group, leaves in groups.items() if len(leaves) > 1 for leaf in leaves}

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of a layer's linears, grouped as the fused operators compute them."""
        return self.qkv, (self.out,), self.gate_up, (self.down,)

    @property
    def further_norms(self) -> int:
        """The norms of a layer that no operator computes on its way: those after attention and after the MLP."""
        return sum(name != "" for name in self.norms_after)

    @property
    def layer_norms(self) -> int:
        """The norms of a layer, without those of q and k."""
        return sum(name != "" for name in self.norms_before) + self.further_norms

    @property
    def decodes_with_norms_apart(self) -> bool:
        """Whether a decode step for one sequence computes norms in kernels of their own, since its products' kernel cannot."""
        return (
            self.further_norms > 0 or self.activation != "silu" or self.norm_scale != "weight" or self.qk_norms == "all"
        )

    @property
    def plain_attention(self) -> str | None:
        """Return the reason why attention stays plain, or None where it is fused."""
        return None if self.attention else "no row in families.py"

    @property
    def plain_mlp(self) -> str | None:
        """Return the reason why the MLP stays plain, or None where it is fused."""
        return None if self.mlp else "no row in families.py"

    @property
    def plain_norms(self) -> str | None:
        """Return the reason why norms stay plain, or None where the operators that read their output compute them."""
        return None if self.layer and self.norm else "no row in families.py"

    @property
    def plain_decode(self) -> str | None:
        """Return the reason why generation decodes without the kernels of decode_step, or None where it uses them.

        These kernels replace whole layers, so they need every part of a layer to be fused.
        """
        return self.plain_attention or self.plain_mlp or self.plain_norms


def row(prefix: str, **facts: Any) -> Family:
    """Return the row of a family whose classes have the usual names of transformers: prefix, then kind of class."""
    kinds = {"model": "ForCausalLM", "layer": "DecoderLayer", "attention": "Attention", "mlp": "MLP", "norm": "RMSNorm"}
    return Family(**{"name": prefix, **{kind: prefix + suffix for kind, suffix in kinds.items()}, **facts})


AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
OLMO = {"qk_norms": "all", "norms_before": ("", ""), "norms_after": AFTER}
GEMMA = {
    "activation": "gelu_pytorch_tanh",
    "norm_scale": "1 + weight",
    "epsilon": "eps",
    "norms_before": ("input_layernorm", "pre_feedforward_layernorm"),
    "norms_after": AFTER,
}

FAMILIES = (
    row("Llama"),
    row("Mistral"),
    row("Ministral"),
    row("Qwen2"),
    row("Qwen3", qk_norms="head"),
    row("SmolLM3", rotates="use_rope"),
    row("Granite", residual_factor="residual_multiplier", embedding_factor="embedding_multiplier", shapes_logits=True),
    row("Olmo2", **OLMO),
    row("Olmo3", **OLMO),
    row("Gemma2", score_cap=True, shapes_logits=True, **GEMMA),
    row("Gemma3", qk_norms="head", **GEMMA),
    row("Phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",), act="activation_fn"),
)
UNKNOWN = Family()


def of(module: object) -> Family:
    """Return the row that names the class of a model or of one of its parts, or UNKNOWN if no row does."""
    kind = type(module).__name__
    known = (f for f in FAMILIES if kind in (f.model, f.layer, f.attention, f.mlp, f.norm))
    return next(known, UNKNOWN)


def fused(part: str, module: object) -> bool:
    """Return whether a module is its family's `part` and the fast path supports that part.

    part: "attention", "mlp", "layer" (for its norms) or "model" (for the decode step).
    """
    family = of(module)
    plain = {
        "attention": family.plain_attention, "mlp": family.plain_mlp, "layer": family.plain_norms,
        "model": family.plain_decode,
    }  # fmt: skip
    return type(module).__name__ == getattr(family, part) and plain[part] is None


# ------------------------------------------------------------------------------------------------ any model


# What transformers calls the parts of a decoder that read images and sound (GIT's and Phi-4-multimodal's).
OTHER_SENSES = re.compile(r"(^|\.)[^.]*(vision|visual|image|audio|speech)[^.]*")


def decoder_of(model: Any) -> Any:
    """Return the part of a model that makes the last hidden states of tokens.

    get_decoder of a Llama 4 has a head too, and of a ModernBERT it is the head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is head:
        return model.base_model
    return getattr(decoder, "model", decoder) if any(module is head for module in decoder.children()) else decoder


def decoder_layers(model: Any) -> Any:
    """Return the list of the decoder's layers, which models name layers, h, blocks or otherwise; raise ConfigError.

    model: a causal language model of transformers, also one whose decoder is a part of it, as in models that read images.
    """
    decoder = decoder_of(model)
    parts = [part for name, part in decoder.named_modules() if not OTHER_SENSES.search(name)]
    lists = [part for part in parts if type(part).__name__ == "ModuleList" and len(part)]
    layers = [part for part in lists if all(hasattr(layer, "gradient_checkpointing") for layer in part)] or lists
    if not layers:
        raise ConfigError(f"model.name: expected a decoder with a list of layers, got {type(decoder).__name__}")
    return layers[0]


def expert_parameters(model: Any) -> Iterator[Any]:
    """Yield the parameters of a model's routed experts, which are tensors of three dimensions outside of convolutions.

    In 4 bit too, where they are stored in two dimensions.
    """
    for layer in decoder_layers(model):
        for module in layer.modules():
            if not type(module).__name__.startswith("Conv"):
                for parameter in module.parameters(recurse=False):
                    if len(getattr(getattr(parameter, "quant_state", parameter), "shape", ())) == 3:
                        yield parameter


BLOCK = 64  # weights per quantisation constant in 4 bit


def expert_layout(module: Any) -> list[str]:
    """Return the names of a module's tensors if it is routed experts in the layout that transformers gives most, else [].

    These are the classes with `use_experts_implementation`: a first and a last product per expert, which may be stored
    transposed and have biases.
    """
    if names := getattr(module, "packed_names", None):  # in 4 bit already
        return names
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    tensors = [module._parameters.get(name) for name in names]
    return names if all(t is not None and t.ndim == 3 for t in tensors) else []


def expert_tensors(module: Any) -> list[str]:
    """Return `expert_layout` of experts that 4 bit can hold, or []: an expert must consist of whole quantisation blocks."""
    names = expert_layout(module)
    packed = getattr(module, "packed_names", None)
    return names if packed or all(module._parameters[name][0].numel() % BLOCK == 0 for name in names) else []


# The names of the modules that choose experts, and parts of the names of their classes: "Gating" is JetMoE's.
ROUTER, ROUTER_CLASS = re.compile("gate|router(_gate)?"), re.compile("Router|Gating")


def router_modules(model: Any) -> list[str]:
    """Return the names of the modules that choose experts, whatever the layout of these.

    A router stands beside its experts, or in a module that knows their number (Doge's experts are two embeddings). The
    number of its outputs tells nothing: a shared expert may be as wide as there are experts.
    """
    found = []
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        beside = "experts" in children or any("Expert" in type(child).__name__ for child in children.values())
        for own, child in children.items() if beside or hasattr(parent, "num_experts") else ():
            if ROUTER.fullmatch(own) or ROUTER_CLASS.search(type(child).__name__):
                found.append(f"{name}.{own}" if name else own)
    return found


def routers(model: Any) -> list[str]:
    """Return the names of the linear layers that choose experts; in most families the router is a class of its own."""
    found: dict[str, None] = {}
    for name in router_modules(model):
        for own, module in model.get_submodule(name).named_modules():
            if any(kind.__name__ == "Linear" for kind in type(module).__mro__):  # in 4 bit too
                found[f"{name}.{own}" if own else name] = None
    return list(found)


def towers(model: Any) -> list[str]:
    """Return the names of the parts that see or hear, which training on text never runs; usually [].

    They are those beside the decoder with layers of their own, and those within it that are named so. A part that holds
    the output head is none, nor is one beside the head without a list of layers: they transform what the head reads.
    """
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    modules = dict(model.named_modules())
    path = next(name for name, module in modules.items() if module is decoder).split(".")
    end = next((name for name, module in modules.items() if module is head), "")
    found: dict[str, None] = {}
    for name, module in modules.items():
        parts = name.split(".")
        if module is head or not any(kind.__name__ == "Linear" for kind in type(module).__mro__):  # in 4 bit too
            continue
        if parts[: len(path)] != path:
            depth = next(i for i, part in enumerate(parts) if i >= len(path) or part != path[i])
            found[".".join(parts[: depth + 1])] = None
        elif sense := OTHER_SENSES.search(name, len(".".join(path))):
            found[name[: sense.end()]] = None
    return [part for part in found if not end.startswith(f"{part}.") and not _beside_head(part, end, modules)]


def _beside_head(part: str, head: str, modules: dict[str, Any]) -> bool:
    """Return whether a part has the same parent as the output head and no list of layers."""
    lists = [name for name in modules if type(modules[name]).__name__ == "ModuleList"]
    return part.rpartition(".")[0] == head.rpartition(".")[0] and not any(n.startswith(f"{part}.") for n in lists)


def head_width(config: PretrainedConfig) -> int:
    """Return the features of an attention head; 0 for a model without attention."""
    text = config.get_text_config()
    width, heads = own_value(text, "head_dim"), own_value(text, "num_attention_heads")
    return width or (text.hidden_size // heads if heads else 0)


def own_value(config: PretrainedConfig, name: str) -> int:
    """Return a number of a model's configuration, the largest where it differs by layer; 0 where it has none."""
    try:
        return getattr(config, name, None) or 0
    except RuntimeError:  # transformers' error for a number that each layer has of its own
        return max(getattr(layer, name, None) or 0 for layer in config.per_layer_config)


# Kinds of models whose answers with transformers' cache differ from those without one (5.24, docs/models.md): in all
# texts, and GIT's where a batch has padding; BLT's cache cannot be made. They answer without, so that each token computes
# the whole text again.
WRONG_CACHE = ("blt", "cpmant", "git", "prophetnet")

# Kinds of models whose layers make their gradients themselves, which they can only where the embedding is trained.
REVERSIBLE = ("reformer",)
# Kinds of models whose layers read [tokens, sequences, features]; all others read the sequences first.
TOKENS_FIRST = ("xlnet",)

# ------------------------------------------------------------------------------------------------ positions


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of a model's rotary embeddings, one dict per kind of attention; [] if there are none."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes] if any(not isinstance(rope, dict) for rope in ropes.values()) else list(ropes.values())


def known_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a model supports, or None if its configuration has no such number.

    With YaRN max_position_embeddings is often unchanged, so the positions are its factor times the original ones. With
    other scalings that number already includes them (Llama 3) or does not (some linear ones); it is used unchanged.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    yarn = [rope for rope in rope_parameters(config) if rope.get("rope_type") == "yarn"]
    stretched = [(rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0) for rope in yarn]
    return positions and int(max(positions, *stretched, 0))


def steady_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions rotate alike in texts of any length; beyond them all of a batch rotate as in its longest.

    None means all positions do: only longrope (Phi-3) and dynamic scaling look at the length.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = {"longrope": "original_max_position_embeddings", "dynamic": ""}
    kinds = [(rope, limits[rope["rope_type"]]) for rope in rope_parameters(config) if rope.get("rope_type") in limits]
    return min((limit for rope, key in kinds if (limit := rope.get(key, positions))), default=None)
