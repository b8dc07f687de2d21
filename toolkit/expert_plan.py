"""Routed experts in the memory plan: their sizes, what they keep for the backward pass, what a product needs for a moment."""

import dataclasses

import torch
from torch import nn
from transformers import PretrainedConfig

from config import Config
from fast_path import families
from fast_path.experts import apart_and_stored, apart_in_16_bit, grouped_gpu, no_experts, not_packed
from fast_path.families import expert_layout, expert_parameters, expert_tensors
from fast_path.nf4 import lacks_triton
from quantization_utils import count_parameters, stored_in_4bit

NESTED_BLOCK = 256  # constants per second-level one
# A token's experts, by its names in transformers' configurations.
EXPERTS_EACH = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """The sizes of a model's routed experts; all 0 for a model without."""

    packed: int = 0  # weights that load in 4 bit
    plain: int = 0  # of another layout, which stay in 16 bit
    of_a_layer: int = 0  # packed weights of the layer with the most
    count: int = 0  # experts of a layer
    each: int = 0  # experts of a token
    hidden: int = 0
    first: int = 0  # outputs of an expert's first product, gate and up
    inner: int = 0  # inputs of its last product
    layers: int = 0  # layers with experts
    unknown: tuple[str, ...] = ()  # classes of the experts that stay in 16 bit
    uneven: tuple[int, ...] = ()  # weights per expert of tensors that are not made of whole blocks

    @property
    def all(self) -> int:
        return self.packed + self.plain

    @property
    def routed(self) -> bool:
        """Whether there are experts, of a known layout or of another."""
        return bool(self.layers or self.unknown)

    def rows_each(self, tokens: int) -> float:
        """Return the rows that an expert's products have in a step of so many tokens, if the router divides them evenly."""
        return tokens * self.each / self.count if self.count else tokens

    @property
    def active(self) -> int:
        """The weights that a token's products read."""
        return self.all * self.each // self.count if self.count else self.all

    def in_16_bit(self) -> "ExpertShape":
        """Return the sizes where no weight is packed."""
        return dataclasses.replace(self, packed=0, plain=self.all, of_a_layer=0)

    def packed_bytes(self, weights: int, double: bool) -> tuple[int, int]:
        """Return the bytes of codes and of constants of packed weights. double: with double quantisation."""
        constants = weights // families.BLOCK
        return weights // 2, constants + constants // NESTED_BLOCK * 4 if double else 4 * constants

    def slots(self, double: bool) -> int:
        """Return the bytes that a GPU holds of experts in main memory: two layers, one that computes and the next."""
        return 2 * sum(self.packed_bytes(self.of_a_layer, double))

    def saved_bytes(self) -> int:
        """Return the bytes per token that a layer without checkpointing keeps: of 16 bit but for indices and the router.

        The first product's output, gate after its activation, and the last product's input before it is weighted; where
        each row belongs and comes back to, and its expert; the router's scores in fp32.
        """
        rows = 2 * (self.first + 2 * self.inner) + 3 * 8
        return self.each * rows + 4 * self.count if self.layers else 0

    def transient_bytes(self, tokens: int, width: int, shared: bool) -> int:
        """Return the bytes that a layer's experts need for a moment of its backward pass, beyond what the layer saved.

        The largest of four moments. When the first product's gradient is computed, nothing is left of what the experts
        saved. width: bytes of a number in the compute dtype; shared: unpacked weights are in memory that weights share.
        """
        if not self.layers:
            return 0
        row, first, last = width * self.each * tokens, self.hidden * self.first, self.hidden * self.inner
        first, last = (0 if shared else self._unpacked(weights, width) for weights in (first, last))
        return max(
            row * (self.hidden + self.inner) + last,  # the last product: gradients of y and x
            row * 2 * self.hidden + width * tokens * self.hidden,  # rows by expert, by token, and their sum
            row * 3 * self.inner,  # the shares: gradients of both factors
            row * (self.first + self.hidden) + first - tokens * self.saved_bytes(),
        )

    def whole_bytes(self, width: int) -> int:
        """Return the bytes of the largest tensor of a layer, unpacked whole: for torch's grouped product, else 0.

        Without a GPU the plan is for one that has this product.
        """
        grouped = self.packed and width == 2 and (not torch.cuda.is_available() or grouped_gpu(torch.device("cuda", 0)))
        return max(self.first, self.inner) * self.hidden * self.count * width if grouped else 0

    def _unpacked(self, weights: int, width: int) -> int:
        """Return the bytes that a product needs for the unpacked weights of a tensor with so many of them per expert.

        As `expert_product` does it: with grouped products all experts, else with Triton none, else one of them; without
        Triton all constants in fp32 too.
        """
        if not self.packed:
            return 0
        constants = weights * self.count // families.BLOCK * 4 if lacks_triton() or width != 2 else 0
        if self.whole_bytes(width):
            return weights * self.count * width + constants
        return weights * width + constants if constants else 0


def experts_each(config: PretrainedConfig) -> int:
    """Return the experts of a token; 0 for a model that routes nothing."""
    text = config.get_text_config()
    parts = (text, getattr(text, "ffn_config", None))  # DBRX's
    found = (families.own_value(part, name) for part in parts if part is not None for name in EXPERTS_EACH)
    return next(filter(None, found), 0)


def check_experts(config: Config, model: nn.Module, experts: ExpertShape) -> None:
    """Raise ConfigError where quantization.experts means nothing for a model or cannot be done.

    Also if experts would stay in 16 bit though 4 bit was asked for. Training on a CPU makes the same checks as a plan.
    """
    asked, name = config.quantization, config.model.name
    if asked.experts != "gpu" and not experts.routed:
        raise no_experts(name, asked.experts)
    if asked.experts == "cpu" and stored_in_4bit(model.config, name):
        raise apart_and_stored(name)
    if asked.experts == "cpu" and not asked.load_in_4bit:
        raise apart_in_16_bit()
    if asked.load_in_4bit and asked.experts != "16bit" and experts.unknown and not experts.packed:
        raise not_packed(name, experts.unknown, experts.plain, count_parameters(model)[1], experts.uneven)


def expert_shape(model: nn.Module) -> ExpertShape:
    """Return the sizes of a model's routed experts; the model is not quantised yet and may be on the meta device."""
    each = experts_each(model.config)
    decoder = families.decoder_layers(model)
    known = [[m for m in layer.modules() if expert_tensors(m)] for layer in decoder]
    tensors = [[m._parameters[name] for m in modules for name in expert_tensors(m)] for modules in known]
    sizes = [sum(t.numel() for t in of_layer) for of_layer in tensors]
    packed = sum(sizes)
    apart = [m for layer in decoder for m in layer.modules() if not expert_tensors(m)]
    three = [m for m in apart if any(p.ndim == 3 for p in m.parameters(recurse=False))]
    flat = [m for m in apart if "Expert" in type(m).__name__ and any(p.ndim == 2 for p in m.parameters(recurse=False))]
    three = three if each else []  # such tensors are no experts in a model that routes nothing, as in Zamba or XLNet
    names = tuple(dict.fromkeys(type(m).__name__ for m in three + flat if not type(m).__name__.startswith("Conv")))
    total = sum(p.numel() for p in expert_parameters(model))
    total += sum(p.numel() for m in flat for p in m.parameters(recurse=False) if p.ndim == 2)  # DBRX: all in one matrix
    sizes_apart = sorted({m._parameters[name][0].numel() for m in apart for name in expert_layout(m)})
    uneven = tuple(size for size in sizes_apart if size % families.BLOCK)
    if not packed:
        return ExpertShape(plain=total, unknown=names, uneven=uneven)
    one = next(modules[0] for modules in known if modules)
    first, last = (one._parameters[name] for name in expert_tensors(one))
    out, into = (-1, -2) if one.is_transposed else (-2, -1)
    return ExpertShape(
        packed=packed,
        plain=total - packed,
        of_a_layer=max(sizes),
        count=first.shape[0],
        each=each or first.shape[0],
        hidden=last.shape[out],
        first=first.shape[out],
        inner=last.shape[into],
        layers=sum(size > 0 for size in sizes),
        unknown=names,
        uneven=uneven,
    )
