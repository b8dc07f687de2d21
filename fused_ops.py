"""What makes training fast without changing what is learned: dropout masks without state, the operators of linear_ops.py in the
model's layers (in generation too), layers compiled once, a micro-batch captured as a graph.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import torch
import torch._dynamo.utils
import torch._functorch.config
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.activations import SiLUActivation

import attention_ops
import linear_ops
from attention_ops import ATTENTIONS, CAUSAL, GROUPED, attend, grouped_attention, rotate
from config import ConfigError, PerformanceConfig
from linear_ops import LINEAR_ARGUMENTS, Packed, dropout_mask, int32, inverse_rms, linear
from nf4_lookup import HAS_TRITON

# ------------------------------------------------------------------------------------------------ stateless dropout


class DropoutClock:
    """Which sequences of which optimizer step the model is seeing, as device tensors that a captured graph reads anew.

    step: int32 scalar. sequences: int32 [batch], each row's number within the step's window over all micro-batches and
    processes, so that another micro-batch shape, a recompute or a resumed run meets the same masks with no RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Name the optimizer step and the rows of the micro-batch about to run."""
        self.step.fill_(step)
        sequences = sequences.to(torch.int32)
        if self.step.is_cuda and not sequences.is_cuda:  # a copy from pageable memory would wait for the GPU
            sequences = sequences.pin_memory()
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences, non_blocking=True)
        else:
            self.sequences = sequences.to(self.step.device, non_blocking=True)
        self._last = None

    def salted(self, salt: int) -> int:
        """Return the run's seed and a module's salt as one signed 32-bit number."""
        return int32(self.seed * 0x9E3779B1 ^ salt)

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs survive, bool [batch, length, features]; modules that read one x ask for one mask."""
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            self._last = (asked, dropout_mask(self.step, self.sequences, self.salted(salt), length, features, p))
        return self._last[1]


class StatelessDropout(nn.Module):
    """Stands in for peft's nn.Dropout on an adapter's input, x: [batch, length, features]; identity in eval mode."""

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.clock.keep(self.salt, x.shape[-2], x.shape[-1], self.p)
        return torch.where(keep, x, 0) * (1 / (1 - self.p))


# Modules that read the same x share a mask, so that one pass over x can serve all of them.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def salt_of(name: str) -> int:
    """Return the number that tells a module's masks, or those of its group of readers, from all others'."""
    parent, _, leaf = name.rpartition(".")
    return zlib.crc32(f"{parent}.{READERS.get(leaf, leaf)}".encode())


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model and return how many were replaced."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt_of(name))
                count += 1
    return count


# ------------------------------------------------------------------------------------------------ fused layers


def fusable(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit linear, bare or with one plain LoRA adapter; DoRA and the rest stay peft's."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, bnb.nn.Linear4bit) or getattr(base.weight, "quant_state", None) is None:
        return False
    if module is base:
        return True
    plain = isinstance(module, LoraLinear4bit) and not module.lora_variant and not any(module.lora_bias.values())
    return plain and module.active_adapters == list(module.lora_A) and len(module.lora_A) == 1


def stack_weights(bases: list[bnb.nn.Linear4bit]) -> Packed:
    """Move the packed weights of linears that read one x behind one another, so that one launch dequantises them all.

    The modules keep views of their parts and nothing is held twice.
    """
    states = [base.weight.quant_state for base in bases]
    codes = torch.cat([base.weight.data.view(torch.uint8).flatten() for base in bases])
    absmax, nested, start = torch.cat([state.absmax for state in states]), states[0].nested, 0
    blocksizes = [states[0].blocksize, states[0].state2.blocksize if nested else 1]
    whole = nested and all(len(state.absmax) % blocksizes[1] == 0 for state in states[:-1])
    if whole:
        absmax2 = torch.cat([state.state2.absmax for state in states])
        offset = torch.cat([state.offset.expand_as(state.state2.absmax) for state in states])
        constants = [absmax, absmax2, offset, states[0].state2.code]
    elif nested:  # of tiny layers: second-level blocks would not start where a member starts
        constants = [torch.cat([_first_level(state) for state in states])]
    else:
        constants = [absmax]
    for base, state, part in zip(bases, states, absmax.split([len(s.absmax) for s in states]), strict=True):
        size = base.weight.data.nbytes
        base.weight.data = codes[start : start + size].view(base.weight.dtype).view_as(base.weight)
        start += size
        state.absmax = part
    return Packed(codes, constants, states[0].code, bases[0].in_features, blocksizes, states[0].quant_type)


def _first_level(state: bnb.functional.QuantState) -> torch.Tensor:
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


class Group:
    """Linears that read one x, as one operator: x [..., columns] (or [..., 2 columns], swiglu) -> [..., outputs].

    norm: the RMS norm that x has yet to go through. in_pieces: where they can be, members are unpacked one
    after the other.
    """

    def __init__(
        self, modules: list[nn.Module], salt: int, clock: DropoutClock, p: float, kernels: bool,
        norm: nn.Module | None = None, in_pieces: bool = False,
    ):  # fmt: skip
        bases = [getattr(module, "base_layer", module) for module in modules]
        adapted = [module for module in modules if hasattr(module, "lora_A")]
        self.leader, self.clock, self.p, self.norm = modules[0], clock, p, norm
        self.weight = stack_weights(bases)
        self.kernels = kernels and self.weight.columns % self.weight.blocksizes[0] == 0
        self.outputs = [base.out_features for base in bases]
        can = len(set(self.outputs)) == 1 and self.weight.divides_by(len(modules))
        self.pieces = len(modules) if in_pieces and can else 1
        self.salt = torch.tensor(clock.salted(salt), dtype=torch.int32, device=bases[0].weight.device)
        biases = [base.bias for base in bases]
        self.bias = torch.cat([bias.detach() for bias in biases]) if all(bias is not None for bias in biases) else None
        self.A = [next(iter(module.lora_A.values())).weight for module in adapted]
        self.B = [next(iter(module.lora_B.values())).weight for module in adapted]
        self.scale = float(next(iter(adapted[0].scaling.values()))) if adapted else 0.0

    def adapters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return A and B of the members, empty where they have none or are to run without."""
        return ([], []) if self.A and self.leader.disable_adapters else (self.A, self.B)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(
        self, x: torch.Tensor, hands_B: bool = False, swiglu: bool = False, before_u: torch.Tensor | None = None,
        before_B: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return `linear`'s y and u."""
        *shape, width = x.shape
        A, B = self.adapters()
        p = self.p if self.leader.training else 0.0
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        masks = self.clock.step, self.clock.sequences, self.salt, shape[-1], p
        before, rows = (hands_B, swiglu, before_u, before_B), x.reshape(-1, width)
        norm = []
        if self.norm is not None:
            norm = [self.norm.weight, inverse_rms(rows.detach(), self.norm.variance_epsilon, self.kernels)]
        y, u = linear(rows, A, B, bias, self.scale, norm, *before, *self.weight, *masks, self.kernels, self.pieces)
        return y.view(*shape, -1), u


def _groupable(modules: list[nn.Module]) -> bool:
    """Return whether the modules can share a Group: all 4-bit, of one kind, all or none with adapter and bias."""
    if not all(fusable(module) for module in modules):
        return False
    bases = [getattr(module, "base_layer", module) for module in modules]
    kinds = {
        (
            hasattr(module, "lora_A"), base.bias is None, base.weight.quant_state.nested,
            base.weight.quant_state.quant_type, base.in_features, base.weight.quant_state.blocksize,
        )
        for module, base in zip(modules, bases, strict=True)
    }  # fmt: skip
    return len(kinds) == 1


MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}
# Layers whose norms have attention and the MLP as their only readers, and their norms.
LAYERS = {"Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer"}
NORMS = {"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm"}


def _rotated_heads(self, hidden_states, position_embeddings):
    """Return q, k and v, [batch, heads, length, width], from one operator. hidden_states: [batch, length, width]."""
    shape, qkv = hidden_states.shape[:-1], self.fused_qkv
    if qkv.kernels and not hasattr(self, "q_norm"):
        heads, kv_heads = (size // self.head_dim for size in qkv.outputs[:2])
        parts = rotate(qkv(hidden_states), *position_embeddings, heads, kv_heads)
        return tuple(part.transpose(1, 2) for part in parts)
    parts = qkv(hidden_states).split(qkv.outputs, -1)
    q, k, v = (part.view(*shape, -1, self.head_dim) for part in parts)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    apply_rotary = sys.modules[type(self).__module__].apply_rotary_pos_emb
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    return q, k, v.contiguous().transpose(1, 2)  # else the backward would keep all of q, k and v for the sake of v


MIXERS = {CAUSAL: attend, GROUPED: grouped_attention}  # by the name that transformers has for them


def _fused_attention(
    self, hidden_states, position_embeddings, attention_mask=None, cache=None, past_key_values=None, **kwargs
):
    """The attention of Qwen2, Qwen3, Llama and Mistral; past_key_values: the cache, up to transformers 5.23."""
    q, k, v = _rotated_heads(self, hidden_states, position_embeddings)
    cache = past_key_values if cache is None else cache
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    mix = MIXERS[self.config._attn_implementation]
    mixed, weights = mix(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.fused_out(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


def _fused_mlp(self, x):
    """down(silu(gate) * up) with gate and up in one operator and SwiGLU at the head of the other.

    With adapters on both, the backward of the other makes gate's and up's dB while it has their gradients at hand: a
    product of its own read them all once more, and made twice what was wanted.
    """
    first, second = self.fused_gate_up, self.fused_down
    handed = first.adapters()[1] if second.adapters()[1] else []
    handing = len(handed) > 0  # of bool() of a list Dynamo of torch 2.11 knows nothing: it would compile no layer whole
    gate_up, u = first.run(x, hands_B=handing)
    return second.run(gate_up, swiglu=True, before_u=u if handing else None, before_B=handed)[0]


def _fused_linear(self, x, *args, **kwargs):
    return self.fused_alone(x)


def _left_to_the_reader(self, hidden):
    return hidden


@functools.cache
def _with_forward(kind: type, forward: Callable) -> type:
    """Return a subclass with another forward: one class for all layers, so that one compilation serves them."""
    members = {"forward": forward, "unfused": kind, "__module__": kind.__module__}
    return type("Fused" + kind.__name__, (kind,), members)


def _switch(module: nn.Module, forward: Callable, **groups: Group) -> None:
    module.__class__ = _with_forward(type(module), forward)
    for name, group in groups.items():
        setattr(module, "fused_" + name, group)  # no nn.Module: the parameters stay where peft put and saves them


def fuse(model: PeftModel, clock: DropoutClock, p: float, kernels: bool, in_pieces: bool = False) -> int:
    """Give every 4-bit linear of the decoder layers its operator and return how many; peft keeps the parameters.

    Norms that such an operator does on its way hand on what they get; a fused module's class has its own as `unfused`.
    in_pieces: gate and up are unpacked one after the other, 47 MB of a 3B at a time in place of 93.
    """
    names = {module: name for name, module in model.named_modules()}
    fused: set[nn.Module] = set()

    def group(*modules: nn.Module, norm: nn.Module | None = None, in_pieces: bool = False) -> Group:
        fused.update(modules)
        return Group(list(modules), salt_of(names[modules[0]]), clock, p, kernels, norm, in_pieces)

    def take_norm(layer: nn.Module, name: str) -> nn.Module | None:
        """Return a norm of the layer for its reader's operator, which saves its output's way to memory and back."""
        norm = getattr(layer, name, None)
        if type(layer).__name__ not in LAYERS or type(norm).__name__ not in NORMS or norm.weight.requires_grad:
            return None
        _switch(norm, _left_to_the_reader)
        return norm

    for layer in model.get_base_model().get_decoder().layers:
        for module in list(layer.modules()):
            kind = type(module).__name__
            if kind in ATTENTIONS and module.config._attn_implementation in MIXERS:
                qkv = [module.q_proj, module.k_proj, module.v_proj]
                if _groupable(qkv) and fusable(module.o_proj):
                    norm = take_norm(layer, "input_layernorm")
                    _switch(module, _fused_attention, qkv=group(*qkv, norm=norm), out=group(module.o_proj))
            elif kind in MLPS and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
                gate_up = [module.gate_proj, module.up_proj]
                if _groupable(gate_up) and fusable(module.down_proj):
                    both = group(*gate_up, norm=take_norm(layer, "post_attention_layernorm"), in_pieces=in_pieces)
                    _switch(module, _fused_mlp, gate_up=both, down=group(module.down_proj))
        for module in list(layer.modules()):
            if module not in fused and hasattr(module, "lora_A") and fusable(module):
                _switch(module, _fused_linear, alone=group(module))
    return len(fused)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what the operator behind SwiGLU makes: the backward reads only its u, 32 bytes a token, and recomputing the
    whole pass and product for it took 3 % of a step.
    """
    keep = op is torch.ops.qlora.linear.default and args[LINEAR_ARGUMENTS.index("swiglu")]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_small_products():
    return create_selective_checkpoint_contexts(_policy)


def _run_layer(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """A decoder layer, its checkpoint inside, so that a compiler drops from the recompute what the backward does not
    read.
    """
    forward = type(layer).forward
    if layer.recompute and layer.training and torch.is_grad_enabled():
        return checkpoint(
            forward, layer, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_small_products,
            **kwargs,
        )  # fmt: skip
    return forward(layer, hidden, **kwargs)


@functools.cache
def operators_tag(modules: tuple[ModuleType, ...] = (linear_ops, attention_ops)) -> str:
    """Return what tells the operators of this version from those of another, by the text of their files."""
    return "qlora " + " ".join(f"{zlib.crc32(inspect.getsource(module).encode()):08x}" for module in modules)


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder layer once for all layers, for training; evaluation, little work, runs as it is."""
    # Where a norm stays in its layer (it is trained, or attention is not ours), its output is a product of what is saved
    # anyway; the partitioner would save it too, since an opaque operator reads it: 4 kB a token and norm of Qwen2.5-3B.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # torch keeps compiled layers on disk and does not look into our operators, whose strides are compiled in: with the
    # layers of another version of this toolkit a run ended in an AssertionError.
    torch.compiler.config.cache_key_tag = operators_tag()
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
    compiled = torch.compile(_run_layer, dynamic=False)

    def run(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        # The embedding's output needs no gradient: the first layer would be compiled anew for it.
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return (compiled if layer.training else _run_layer)(layer, hidden, **kwargs)

    for layer in model.get_base_model().get_decoder().layers:
        layer.recompute = layer.gradient_checkpointing
        layer.gradient_checkpointing = False  # transformers would put its own checkpoint around the compiled layer
        layer.forward = functools.partial(run, layer)


def compiled_in_pieces() -> str | None:
    """Return why torch.compile could not take a layer whole, None if it did or has compiled nothing.

    Pieces compute the same; around a checkpoint they recompute and keep more: 27 % more memory at 16 x 512 tokens.
    """
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(iter(reasons)).splitlines()[0] if reasons else None


@contextlib.contextmanager
def inputs_in_main_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Have what is saved for a backward in this shape, the inputs of checkpointed layers, wait for it in main memory.

    torch's save_on_cpu would move whatever is saved, packed weights too.
    The copies ride on the stream of the computation: 33 MB a layer of a 3B at 8,192 tokens, about 2 ms where the layer
    takes 12, and nothing has to be waited for. No graph can hold them.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if tensor.shape != shape:
            return tensor.detach()  # not itself: an output saved by its own node would keep both alive
        kept = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor.detach(), non_blocking=True), tensor.device

    def unpack(packed: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# ------------------------------------------------------------------------------------------------ captured micro-step


def padding(name: str, length: int, device: torch.device) -> torch.Tensor:
    """Return what an argument of a captured step holds where no block is, int64 [length]: unlabelled, of two samples.

    Of two, since transformers makes no mask for a row of one while it can look: the warm-up would run other layers.
    """
    if name == "position_ids":
        return (torch.arange(length, device=device) - 1).clamp_min(0)
    return torch.full((length,), -100 if name == "labels" else 0, device=device)


class GradientSums:
    """Adds the gradients of a backward to the parameters', dozens in one launch.

    Autograd launches an addition for each of the 504 matrices of a 3B's adapters, of 2 us, 2 us apart (H100).
    """

    TOGETHER = 64  # at rank 16 they take 15 MB while they wait

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter in self._sums:
            self._waiting.append((self._sums[parameter], parameter.grad))
            parameter.grad = None
        if len(self._waiting) == self.TOGETHER:
            self._add()

    def _add(self) -> None:
        if self._waiting:
            torch._foreach_add_(*zip(*self._waiting, strict=True))
        self._waiting = []

    @contextlib.contextmanager
    def of_backward(self) -> Iterator[None]:
        """Have a backward within add to the gradients that exist; one that fails leaves them half added."""
        self._sums = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self._sums:
            parameter.grad = None  # else autograd would add to it
        try:
            yield
            self._add()
        finally:
            for parameter, total in self._sums.items():
                parameter.grad = total
            self._sums, self._waiting = {}, []


class Captured:
    """A function of a batch as one CUDA graph: what is launched thousands of times a micro-step is launched once.

    step(input_ids=, labels=, ...) -> a scalar, free of host synchronisation; names: its arguments, each int64
    [batch, length]. Gradients accumulate in place in the parameters' .grad, which must exist and hold rubbish after
    warm-up and capture. What else the step reads (the dropout clock, the weights) is read anew at every replay.
    """

    def __init__(
        self, step: Callable[..., torch.Tensor], device: torch.device, batch: int, length: int, names: Iterable[str]
    ):
        self.step = step
        self.padding = {name: padding(name, length, device) for name in names}
        self.batch = {name: row.repeat(batch, 1) for name, row in self.padding.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets every library allocate its workspace outside of the graph
                step(**self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # blocks belong to a stream: the next warm-up could not use what this one reserved

    def capture(self, pool: Any) -> None:
        """Capture the step; graphs that never run at the same time may share a pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = self.step(**self.batch)

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Replay on a batch of up to the captured shape; the rest is padding. The next replay overwrites the result."""
        for name, tensor in batch.items():
            rows, length = tensor.shape
            if tensor.shape != self.batch[name].shape:
                self.batch[name].copy_(self.padding[name])
            self.batch[name][:rows, :length].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result


# ------------------------------------------------------------------------------------------------ optimizer


@functools.cache
def without_waits(kind: type) -> type:
    """Return a bitsandbytes optimizer that waits for the GPU once a step, not after each of 504 tensors."""

    class Optimizer(kind):
        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if len(self.state[parameter]) == 0:
                        self.init_state(group, parameter, number, i)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, number, i)
            if self.is_paged and torch.cuda.is_available():
                torch.cuda.synchronize()  # paged states are managed memory, which the CPU must not touch before

    Optimizer.__name__ = kind.__name__
    return Optimizer


# ------------------------------------------------------------------------------------------------ what runs here


@dataclasses.dataclass(frozen=True)
class FastPath:
    """Which parts of the fast path run, and the line that says so and why the others do not."""

    fused_lora: bool
    compile: bool
    cuda_graphs: bool
    kernels: bool  # the operators' Triton kernels
    line: str


def choose_fast_path(
    performance: PerformanceConfig, model: PeftModel, dtype: torch.dtype, device: torch.device, offload: bool = False
) -> FastPath:
    """Return what of fused_lora, compile and cuda_graphs runs here; ConfigError where `on` asks what cannot.

    offload: the inputs of checkpointed layers are to wait in main memory.
    """
    gpu, runs, reasons = device.type == "cuda", {}, {}
    layers = model.get_base_model().get_decoder().layers
    fusables = any(fusable(module) and hasattr(module, "lora_A") for layer in layers for module in layer.modules())

    def decide(name: str, obstacle: str | None) -> bool:
        wanted = getattr(performance, name)
        if wanted == "on" and obstacle:
            raise ConfigError(f"performance.{name}: cannot be on here: {obstacle}")
        runs[name] = wanted == "on" or (wanted == "auto" and not obstacle and gpu)
        if not runs[name]:
            reasons[name] = "off" if wanted == "off" else obstacle or "gains nothing on a CPU"
        return runs[name]

    fused = decide("fused_lora", None if fusables else "no plain LoRA adapter on a 4-bit linear")
    no_triton = gpu and not HAS_TRITON and "Triton is not installed (Windows: pip install triton-windows)"
    compiled = decide("compile", no_triton or (None if fused else "it needs fused_lora"))
    copies = "no graph can hold the copies to main memory" if offload else None
    graphs = decide("cuda_graphs", copies if gpu else "there is no CUDA GPU")
    kernels = gpu and HAS_TRITON and dtype is not torch.float32  # tl.dot would round fp32 to tf32
    line = "fast path: " + (", ".join(name for name, on in runs.items() if on) or "none")
    line += "".join(f" | without {name}: {reason}" for name, reason in reasons.items())
    return FastPath(fused, compiled, graphs, kernels, line)
