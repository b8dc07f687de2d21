"""Put the operators of fused_linear.py into a model's layers: attention, MLP and norms, in training and generation."""

import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from fast_path import families
from fast_path.attention import CAPPED, CAUSAL, GROUPED, attend, attend_capped, grouped_attention, rotate
from fast_path.dropout import DropoutClock, modes_kept, salt_of
from fast_path.experts import unpacked_whole
from fast_path.fp8 import fits, row_scales
from fast_path.fused_linear import NOTHING_HANDED, Adapters, Handed, Masks, Norm, inverse_rms, run_linear
from fast_path.norm_after import NormAfter
from fast_path.packed_weights import adapter_columns, fusable, operand_numbers, pieces_each, stack_weights
from fast_path.scratch import scratch_of
from fast_path.sharding import divide, make_whole

# ------------------------------------------------------------------------------------------------ fused layers


def rank_of(adapted: list[nn.Module]) -> int:
    """Return the rank of the adapters of a group's members, 0 without adapters."""
    return len(next(iter(adapted[0].lora_A.values())).weight) if adapted else 0


class Group:
    """Linears that read the same x (the members), as one operator: x [..., columns] -> [..., outputs].

    With swiglu, x is [gate | up], [..., 2 columns], and `activation` that of gate. norm: `norm_of` the RMS norm that the
    operator applies to x first. pieces: unpack the weights in so many pieces, one after the other, where their sizes allow
    it. fp8: in training mode, multiply in FP8, in one piece; evaluations use the numbers that inference does.
    """

    def __init__(
        self, modules: list[nn.Module], salt: int, clock: DropoutClock, p: float, kernels: bool,
        norm: tuple[torch.Tensor, float] | None = None, pieces: int = 1, activation: str = "silu", fp8: bool = False,
    ):  # fmt: skip
        bases = [getattr(module, "base_layer", module) for module in modules]
        adapted = [module for module in modules if hasattr(module, "lora_A")]
        self.leader, self.clock, self.p, self.activation = modules[0], clock, p, activation
        self.recomputed = False  # x is recomputed for the backward pass; `compiled.recompute` says so
        self.members = tuple(modules)
        self.norm, self.epsilon = norm or (None, 0.0)
        self.weight = stack_weights(bases)
        self.row_scales = row_scales(self.weight) if fp8 and fits(self.weight) else None  # products are in FP8
        self.kernels = kernels and self.weight.columns % self.weight.blocksizes[0] == 0
        self.outputs = [base.out_features for base in bases]
        self.pieces = pieces if self.weight.divides_by(pieces) else 1
        self.salt = torch.tensor(clock.salted(salt), dtype=torch.int32, device=bases[0].weight.device)
        extra = adapter_columns(rank_of(adapted), len(adapted))
        self.scratch = scratch_of(self.salt.device)  # kept as long as the model is fused
        self.scratch.reserve(operand_numbers(sum(self.outputs), self.weight.columns, extra, self.pieces))
        biases = [base.bias for base in bases]
        self.bias = torch.cat([bias.detach() for bias in biases]) if all(bias is not None for bias in biases) else None
        self.adapted = adapted
        self.read_adapters()

    def read_adapters(self) -> None:
        """Take the adapters' matrices and their scale from the modules, at the start and after others were put there."""
        self.A = [next(iter(module.lora_A.values())).weight for module in self.adapted]
        self.B = [next(iter(module.lora_B.values())).weight for module in self.adapted]
        self.scale = float(next(iter(self.adapted[0].scaling.values()))) if self.adapted else 0.0

    def adapters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return A and B of the members; empty lists if they have no adapters or their adapters are disabled."""
        return ([], []) if self.A and self.leader.disable_adapters else (self.A, self.B)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(
        self, x: torch.Tensor, swiglu: bool = False, handed: Handed = NOTHING_HANDED, fp8: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y [..., outputs] and u of `linear`. fp8: None means in training mode, where the group has it."""
        *shape, width = x.shape
        A, B = self.adapters()
        p = self.p if self.leader.training else 0.0
        rows, norm = x.reshape(-1, width), None
        if self.norm is not None:
            norm = Norm(self.norm, inverse_rms(rows.detach(), self.epsilon, self.kernels))
        fp8 = self.leader.training if fp8 is None else fp8
        weight = self.weight._replace(row_scales=self.row_scales) if fp8 else self.weight
        y, u = run_linear(
            rows, weight, Adapters(A, B, self.scale),
            Masks(self.clock.step, self.clock.sequences, self.salt, self.clock.length(len(rows)), p),
            bias=self.bias.to(x.dtype) if self.bias is not None else None, norm=norm, swiglu=swiglu, handed=handed,
            kernels=self.kernels, pieces=self.pieces, activation=self.activation,
            over_x=swiglu and self.recomputed,
        )  # fmt: skip
        return y.view(*shape, -1), u


def norm_of(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Return the factor of an RMS norm, [columns], and the number that it adds to the mean square.

    In Gemma the factor is 1 + weight, in fp32, which tells the operators to round after it alone, as Gemma does.
    """
    family = families.of(norm)
    weight = norm.weight.detach().float() + 1 if family.norm_scale == "1 + weight" else norm.weight
    return weight, getattr(norm, family.epsilon)


def _groupable(modules: list[nn.Module]) -> bool:
    """Return whether modules can share a Group: all 4-bit and quantised alike, with adapters and biases alike or without."""
    if not all(fusable(module) for module in modules):
        return False
    bases = [getattr(module, "base_layer", module) for module in modules]
    kinds = {
        (
            # a group has one rank and one scale; rank_pattern and alpha_pattern give a module others
            hasattr(module, "lora_A"), *getattr(module, "r", {}).values(), *getattr(module, "scaling", {}).values(),
            base.bias is None, base.weight.quant_state.nested,
            base.weight.quant_state.quant_type, base.in_features, base.weight.quant_state.blocksize,
        )
        for module, base in zip(modules, bases, strict=True)
    }  # fmt: skip
    return len(kinds) == 1


def _rotated_heads(self, hidden_states, position_embeddings):
    """Return q, k and v, [batch, heads, length, width], from one operator. hidden_states: [batch, length, width]."""
    shape, normed = hidden_states.shape[:-1], hasattr(self, "q_norm")
    qkv = self.fused_qkv(hidden_states)
    if self.fused_qkv.kernels and self.turns and len(self.head_norms) == 2 * normed:
        heads, kv_heads = (size // self.head_dim for size in self.sizes[:2])
        parts = rotate(qkv, *position_embeddings, heads, kv_heads, self.head_norms, self.epsilon)
        return tuple(part.transpose(1, 2) for part in parts)
    q, k, v = qkv.split(self.sizes, -1)
    if normed and self.qk_norms == "all":
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (part.view(*shape, -1, self.head_dim) for part in (q, k, v))
    if normed and self.qk_norms == "head":
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if not self.turns:
        return q, k, v
    apply_rotary = sys.modules[type(self).__module__].apply_rotary_pos_emb
    return *apply_rotary(q, k, *position_embeddings), v.transpose(1, 2).contiguous().transpose(1, 2)


ACTIVATIONS = {"silu": (nn.SiLU, SiLUActivation), "gelu_pytorch_tanh": (GELUTanh,)}  # by their names in families.py
MIXERS = {CAUSAL: attend, CAPPED: attend_capped, GROUPED: grouped_attention}  # by their names in transformers


def _fused_attention(
    self, hidden_states, position_embeddings, attention_mask=None, cache=None, past_key_values=None, **kwargs
):
    """The attention of every family with a row. past_key_values: the cache, up to transformers 5.23."""
    q, k, v = _rotated_heads(self, hidden_states, position_embeddings)
    cache = past_key_values if cache is None else cache
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    mix = MIXERS[self.config._attn_implementation]
    capped = {"softcap": self.attn_logit_softcapping, "sliding_window": self.sliding_window} if self.caps else {}
    mixed, weights = mix(self, q, k, v, attention_mask, scaling=self.scaling, **capped)
    return self.fused_out(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


def _fused_mlp(self, x):
    """down(act(gate) * up): gate and up are one operator, and SwiGLU is the first part of down's operator.

    If both have adapters, down's backward pass also computes dB of gate and up, while it holds their gradients. A
    separate product would read all these gradients again and, for two linears, compute twice the numbers that are needed.
    """
    first, second = self.fused_gate_up, self.fused_down
    handed = first.adapters()[1] if second.adapters()[1] else []
    handing = len(handed) > 0  # torch 2.11's Dynamo cannot trace bool(list): a graph break per layer
    gate_up, u = first.run(x, handed=Handed(hands_B=handing))
    return second.run(gate_up, swiglu=True, handed=Handed(u=u if handing else None, B=handed))[0]


def _fused_linear(self, x, *args, **kwargs):
    return self.fused_alone(x)


def _left_to_the_reader(self, hidden):
    return hidden


def _norm_after(self, hidden):
    if not torch.is_grad_enabled() or hidden.dtype == torch.float32:
        return self.unfused.forward(self, hidden)
    return NormAfter.apply(hidden, *self.factor_and_epsilon)


@functools.cache
def _with_forward(kind: type, forward: Callable) -> type:
    """Return a subclass with another forward. All layers get the same class, so one compilation serves them all."""
    members = {"forward": forward, "unfused": kind, "__module__": kind.__module__}
    return type("Fused" + kind.__name__, (kind,), members)


def _switch(module: nn.Module, forward: Callable, **groups: Group) -> None:
    module.__class__ = _with_forward(type(module), forward)  # type: ignore[arg-type]  # classes are hashable
    for name, group in groups.items():
        setattr(module, "fused_" + name, group)  # not an nn.Module: parameters stay where peft saves them


def _switch_attention(attention: nn.Module, qkv: Group, out: Group) -> None:
    """Give an attention its fused forward, and the facts of its row that this forward reads."""
    family, total = families.of(attention), sum(qkv.outputs)
    q = getattr(attention, family.out).in_features  # as wide as all heads
    attention.sizes = [q, (total - q) // 2, (total - q) // 2]
    attention.turns = bool(getattr(attention, family.rotates)) if family.rotates else True
    attention.qk_norms, attention.caps = family.qk_norms, family.score_cap
    attention.head_norms, attention.epsilon = _head_norms(attention)
    _switch(attention, _fused_attention, qkv=qkv, out=out)


def switch_norm_after(layer: nn.Module) -> None:
    """Give the norm after the MLP, where there is one, a backward pass that reads 8 bits, unless it is trained."""
    family = families.of(layer)
    norm = getattr(layer, family.norms_after[1], None) if families.fused("layer", layer) else None
    if norm is not None and type(norm).__name__ == family.norm and not norm.weight.requires_grad:
        norm.factor_and_epsilon = norm_of(norm)
        _switch(norm, _norm_after)


WIDEST_JOINED = 128  # heads whose norms join the rotary embedding's pass; wider ones were slower (docs/measurements.md)


def _head_norms(attention: nn.Module) -> tuple[list[torch.Tensor], float]:
    """Return the factors of an attention's norms of q and k, and their epsilon; [] if there are none or they are trained."""
    norms = [norm for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None]
    known = all(type(norm).__name__ == families.of(attention).norm for norm in norms)
    if not norms or not known or any(norm.weight.requires_grad for norm in norms):
        return [], 0.0
    if attention.head_dim > WIDEST_JOINED and families.of(attention).qk_norms == "head":
        return [], 0.0
    (q_norm, epsilon), (k_norm, other) = map(norm_of, norms)
    return ([q_norm.detach(), k_norm.detach()], epsilon) if epsilon == other else ([], 0.0)


def _attention_linears(attention: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return the linears before and after the attention itself, in an attention module of a known family."""
    family = families.of(attention)
    return [getattr(attention, name) for name in family.qkv], getattr(attention, family.out)


def _mlp_linears(mlp: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return the linears before and after the activation, in an MLP of a known family."""
    family = families.of(mlp)
    return [getattr(mlp, name) for name in family.gate_up], getattr(mlp, family.down)


def attention_obstacle(attention: nn.Module) -> str | None:
    """Return why an attention module stays plain although its family has a fused attention; None if it is fused."""
    qkv, out = _attention_linears(attention)
    if attention.config._attn_implementation not in MIXERS:
        return f"model.attn_implementation {attention.config._attn_implementation}"
    if hasattr(attention, "q_norm") != bool(families.of(attention).qk_norms):
        return "norms of q and k that families.py does not have"
    return None if _groupable(qkv) and fusable(out) else "its linears differ in their adapters or are not in 4 bit"


def mlp_obstacle(mlp: nn.Module) -> str | None:
    """Return why an MLP stays plain although its family has a fused MLP; None if it is fused."""
    gate_up, down = _mlp_linears(mlp)
    activation = getattr(mlp, families.of(mlp).act)
    if not isinstance(activation, ACTIVATIONS[families.of(mlp).activation]):
        return f"its activation is {type(activation).__name__}"
    return None if _groupable(gate_up) and fusable(down) else "its linears differ in their adapters or are not in 4 bit"


def plain_parts(model: PeftModel) -> dict[str, list[str]]:
    """Return the parts of the decoder layers that `fuse` leaves plain, by reason: the family's name, or a setting.

    Norms are fused into attention and the MLP, so they are named only where both of these are fused and norms are not.
    """
    base = model.get_base_model()
    reasons: dict[str, dict] = {}
    family = families.of(base).name or type(base).__name__.removesuffix("ForCausalLM")
    for layer in families.decoder_layers(base):
        for part, obstacle in (("attention", attention_obstacle), ("MLP", mlp_obstacle)):
            known = [module for module in layer.modules() if families.fused(part.lower(), module)]
            for reason in filter(None, map(obstacle, known)) if known else [family]:
                reasons.setdefault(reason, {})[f"{part} plain"] = None
        if not reasons and not families.fused("layer", layer):
            reasons.setdefault(family, {})["norms plain"] = None
    return {reason: list(parts) for reason, parts in reasons.items()}


def fuse(model: PeftModel, clock: DropoutClock, p: float, kernels: bool, pieces: int = 1, fp8: bool = False) -> int:
    """Fuse the 4-bit linears of the decoder layers and return how many were fused; the parameters stay with peft.

    If an operator applies the RMS norm itself, the norm module becomes the identity. `unfused` remembers a module's
    original class. pieces: into how many gate and up are cut, which are unpacked one after the other; the others as
    `pieces_each` says. fp8: as in Group.
    """
    base, names = model.get_base_model(), {module: name for name, module in model.named_modules()}
    readers = families.of(base).readers
    of_gate_up, of_down, of_qkv = pieces_each(pieces)
    fused: set[nn.Module] = set()

    def group(
        *modules: nn.Module, norm: tuple[torch.Tensor, float] | None = None, pieces: int = 1, activation: str = "silu",
    ) -> Group:  # fmt: skip
        fused.update(modules)
        salt = salt_of(names[modules[0]], readers)
        return Group(list(modules), salt, clock, p, kernels, norm, pieces, activation, fp8)

    def take_norm(layer: nn.Module, name: str) -> tuple[torch.Tensor, float] | None:
        """Return `norm_of` a norm of the layer if its reader's operator can apply it, else None; it becomes the identity.

        So the output of the norm is not written to memory and read back.
        """
        norm = getattr(layer, name, None)
        known = families.fused("layer", layer) and type(norm).__name__ == families.of(layer).norm
        if not known or norm.weight.requires_grad:
            return None
        taken = norm_of(norm)
        _switch(norm, _left_to_the_reader)
        return taken

    for layer in families.decoder_layers(base):
        before = families.of(layer).norms_before
        switch_norm_after(layer)
        make_whole(layer)  # of a divided base: one layer at a time
        for module in list(layer.modules()):
            if families.fused("attention", module) and attention_obstacle(module) is None:
                qkv, out = _attention_linears(module)
                norm = take_norm(layer, before[0])
                _switch_attention(module, group(*qkv, norm=norm, pieces=of_qkv), group(out))
            elif families.fused("mlp", module) and mlp_obstacle(module) is None:
                gate_up, down = _mlp_linears(module)
                both = group(*gate_up, norm=take_norm(layer, before[1]), pieces=of_gate_up)
                second = group(down, pieces=of_down, activation=families.of(module).activation)
                _switch(module, _fused_mlp, gate_up=both, down=second)
        for module in list(layer.modules()):
            if module not in fused and hasattr(module, "lora_A") and fusable(module):
                _switch(module, _fused_linear, alone=group(module))
        divide(layer, groups_of(layer))
    if fused and kernels:
        scratch_of(clock.step.device).reserve(unpacked_whole(base, base.dtype, clock.step.device))
    return len(fused)


def groups_of(model: nn.Module) -> list[Group]:
    """Return the Groups that `fuse` has put into a model. Callers keep the list: walking through all modules is slow."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Group)]


def fuse_for_training(
    model: PeftModel, clock: DropoutClock, p: float, kernels: bool, fp8: bool, pieces: int = 1
) -> list[str]:
    """Fuse a model as `fuse` does and return a line about the linears whose products are in FP8, if there are some."""
    fuse(model, clock, p, kernels, pieces, fp8)
    groups = groups_of(model)
    inside = [group for group in groups if group.row_scales is not None]
    if not inside:
        return []
    count = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    reference = "" if inside[0].kernels else ", computed by the reference, which is slower"
    return [
        f"products in FP8: those of {sum(len(group.outputs) for group in inside)} of {count} linears in 4 bit, in training alone"
        f"{reference}; evaluation and inference use bfloat16"
    ]


MOST_ERROR = 0.1  # of an operator's output that FP8 may change; where it changes more, the operator stays in bfloat16
MOST_PROBED = 1024  # tokens


@torch.no_grad()
def guard(learner: Any, block: np.ndarray, say: Callable[[str], None]) -> Any:
    """Return the learner after taking FP8 away from operators whose output it would change by more than MOST_ERROR.

    Each operator is tried on its real input: a training block goes through the base without its adapter. This depends on
    weights and data alone, so a resumed run decides the same. block: as `Blocks` holds them, [tokens] or [rows, tokens].
    """
    model = learner.model
    groups = [group for group in groups_of(model) if group.row_scales is not None]
    if not groups:
        return learner
    errors: dict[Group, float] = {}

    def probed(group: Group, x: torch.Tensor, swiglu: bool = False, handed: Handed = NOTHING_HANDED):
        y, u = Group.run(group, x, swiglu, handed, fp8=False)
        exact, other = y.flatten(0, -2).float(), Group.run(group, x, swiglu, handed, fp8=True)[0].flatten(0, -2).float()
        change = (other - exact).square().sum(1) / exact.square().sum(1).clamp_min(1e-30)  # of each token
        errors[group] = change.mean().sqrt().item()
        return y, u

    for group in groups:
        group.run = functools.partial(probed, group)  # type: ignore[method-assign]
    ids = torch.from_numpy(np.atleast_2d(block)[0][None, :MOST_PROBED]).to(model.device)
    with modes_kept(model), model.disable_adapter(), learner.objective.autocast():
        model.eval()
        learner.objective.decoder(input_ids=ids, use_cache=False)
    for group in groups:
        del group.run
    names = {module: name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    left = [group for group in groups if not errors[group] <= MOST_ERROR]
    for group in left:
        group.row_scales = None
    found = f"FP8 changes the output of an operator by {statistics.median(errors.values()):.1%} in the median"
    say(f"{found}, by {max(errors.values()):.1%} at most (a training block through the base)")
    if left:
        named = ", ".join(f"{' + '.join(names[part] for part in group.members)} {errors[group]:.0%}" for group in left)
        say(f"in bfloat16 all the same, since FP8 would change more than {MOST_ERROR:.0%} of their output: {named}")
    return learner


# ------------------------------------------------------------------------------------------------ without them for a while


@contextmanager
def plain_linears(model: nn.Module) -> Iterator[None]:
    """Give all fused modules (linears, attention, MLP, norms) their original forward pass while the context is open.

    For one token this is faster: bitsandbytes' matrix-vector product reads the packed weights directly, while the
    fused operator unpacks them first.
    """
    fused = [module for module in model.modules() if hasattr(type(module), "unfused")]
    kinds = [type(module) for module in fused]
    for module in fused:
        module.__class__ = type(module).unfused
    try:
        yield
    finally:
        for module, kind in zip(fused, kinds, strict=True):
            module.__class__ = kind
