"""Make tokens from prompts in the fastest way that works here, and tell what limits the speed."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextStreamer

from fast_path import families
from fast_path.attention import GROUPED
from fast_path.choice import trains_tokens
from fast_path.decoder import (
    Decoder,
    Watch,
    adapters_off,
    attention_windows,
    cache_argument,
    common_prefix,
    end_tokens,
    lora_layers,
)
from fast_path.dropout import DropoutClock
from fast_path.experts import one_by_one
from fast_path.layers import fuse, groups_of, plain_linears
from fast_path.nf4 import HAS_TRITON
from toolkit.memory import peak_gib
from toolkit.startup import visible

# ------------------------------------------------------------------------------------------------ memory traffic


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a step reads: all, with the 4-bit constants, but an embedding only if tied."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.nbytes for p in model.parameters() if p is not embedding or p is head)
    for p in model.parameters():
        if isinstance(p, bnb.nn.Params4bit) and p.quant_state is not None:
            total += p.quant_state.absmax.nbytes + (p.quant_state.state2.absmax.nbytes if p.quant_state.nested else 0)
    return total


def position_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the keys and values that the cache holds per position of a sequence."""
    config = model.config.get_text_config()
    heads = families.own_value(config, "num_key_value_heads") or families.own_value(config, "num_attention_heads")
    layers = families.own_value(config, "num_hidden_layers")
    return 2 * layers * heads * families.head_width(config) * model.dtype.itemsize


def card_bandwidth(device: torch.device) -> float | None:
    """Return the nominal bandwidth of the GPU's memory in bytes per second; None if torch does not tell it."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    # the clock is in kHz, and there are two transfers per clock
    return 2e3 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8 or None


@dataclasses.dataclass
class Traffic:
    """The bytes that decoding steps read from memory, and the seconds that they needed."""

    weights: int  # bytes per step
    position: int  # bytes per position of a sequence
    device: torch.device
    read: float = 0.0
    seconds: float = 0.0

    def add(self, watch: Watch, rows: int, prompt: int) -> None:
        """Add the steps after the first token of `rows` sequences, whose prompts have `prompt` tokens."""
        steps = watch.tokens - 1
        self.read += steps * (self.weights + rows * self.position * (prompt + steps / 2))
        self.seconds += watch.last - watch.first

    def line(self) -> str:
        """Return a text with the GB/s reached, the share of the GPU's bandwidth if known, and the peak memory."""
        peak = f"peak {peak_gib(self.device):.2f} GiB"
        if not self.seconds:  # an answer of one token has no step after the first one
            return peak
        rate = self.read / self.seconds
        card = card_bandwidth(self.device)
        share = f", {rate / card:.0%} of the card's {card / 1e9:,.0f}" if card else ""
        return f"{rate / 1e9:,.1f} GB/s read{share} | {peak}"


COVERED = {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"}
COVERED |= {"eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version"}

# ------------------------------------------------------------------------------------------------ the Generator


WITHOUT_CACHE = "without a cache, with which transformers' answers differ for this kind of model"


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model's step cannot be captured as a CUDA graph, or None if it can."""
    config = model.config.get_text_config()
    if model.config.model_type in families.WRONG_CACHE:
        return WITHOUT_CACHE
    if not model._can_compile_fullgraph or not holds_keys_and_values(model):
        return f"{type(model).__name__} reads its data in Python, or its cache holds more than keys and values"
    missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
    if missing or getattr(config, "alibi", False):
        return f"{type(model).__name__} {f'takes no {min(missing)}' if missing else 'has no positions but ALiBi'}"
    if getattr(config, "attention_chunk_size", None):
        return "the model computes attention in chunks"
    # Classes without a row may look at the length in code of their own, as PhiMoE's does; a graph cannot.
    if families.steady_positions(config) is not None and families.of(model) is families.UNKNOWN:
        return "the rotary frequencies depend on the length of the text"
    if config._attn_implementation not in ("sdpa", GROUPED, "eager"):
        return f"attn_implementation {config._attn_implementation}"
    if trains_tokens(model):
        return "the adapter has rows of the embedding of its own"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model is spread over more than one device"
    return one_by_one(model, model.dtype, model.device) if model.device.type == "cuda" else None


def holds_keys_and_values(model: PreTrainedModel) -> bool:
    """Return whether a model takes a cache that holds the keys and values of its positions, and nothing else.

    Layers with convolutions, linear attention or another recurrent state keep that, which nothing can cut back to an
    earlier position. The first GPT takes none.
    """
    takes = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    kinds = set(attention_windows(model.config.get_text_config()))
    stateful = getattr(model, "_is_stateful", False) or not model._supports_default_dynamic_cache()
    return bool(takes) and not stateful and kinds <= {"full_attention", "sliding_attention"}


def use_own_precision(model: PeftModel) -> None:
    """Convert the adapters to the dtype that the model computes in, as training's fast path does when it reads them.

    peft keeps them in fp32, which would be 120 MB to read per token for a 3B model at rank 16.
    """
    for layer in lora_layers(model):
        for factors in (layer.lora_A, layer.lora_B):
            factors.to(model.dtype)


def by_length(rows: list[list[int]], size: int, window: int) -> list[list[int]]:
    """Return the row numbers in batches of `size`: window after window of the rows, the longest rows first in each.

    The longest come first because the cache made for them is large enough for all the others.
    """
    batches = []
    for start in range(0, len(rows), window):
        order = sorted(range(start, min(start + window, len(rows))), key=lambda i: (-len(rows[i]), i))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


class VisibleStreamer(TextStreamer):
    """Prints an answer while it is made, with control characters made visible."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible(text), stream_end)


class Generator:
    """Answer prompts in the fastest way that works here: with the Decoder, or with transformers' `generate`.

    Both keep the cache of the last prompt and answer, so a prompt that begins with the same tokens computes only the
    rest; a model whose cache holds more than keys and values makes its own cache for each prompt. fast: None uses the
    Decoder on CUDA only. On a CPU `generate` is as fast, since attention over a static cache computes all of its
    positions, used or not.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, say: Callable[[str], None], fast: bool | None = None):
        self.model, self.say = model, say
        self.said: set[str] = set()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        gpu = base.device.type == "cuda"
        self.reason = obstacle(base) if gpu or fast else ""  # on a CPU generate() is usual: no message
        self.decoder = Decoder(model, kernels=gpu and HAS_TRITON) if self.reason is None else None
        self.adapted, self.cache, self.off = lora_layers(model), None, False
        self.cacheless = base.config.model_type in families.WRONG_CACHE
        self.keeps = holds_keys_and_values(base) and not self.cacheless
        self.held: list[int] = []
        self.limit = families.steady_positions(base.config)
        if self.decoder and gpu and isinstance(model, PeftModel):
            use_own_precision(model)
            # Prompts and batches unpack each weight once and multiply once, with the adapters included.
            kernels = HAS_TRITON and base.dtype is not torch.float32
            fuse(model, DropoutClock(0, base.device), 0.0, kernels, pieces=2)
            torch.cuda.empty_cache()  # the packed weights were copied, so the old ones can go
        self.weight_bytes, self.position_bytes = weight_bytes(base), position_bytes(base)
        self.groups = groups_of(model)
        self.decoders: dict[Any, tuple[Decoder | None, int]] = {}  # by the shape of the adapter that they read

    def adapter_changed(self, shape: Any, before: Any) -> None:
        """Note that another adapter is in the LoRA layers: what was computed with the one before is forgotten.

        shape, before: of the adapter now and before; equal where the matrices lie at the same addresses as before. Graphs
        read fixed addresses, so each shape has a decoder of its own, which keeps its graphs.
        """
        self.held, self.cache = [], None
        if shape != before:
            self.decoders[before] = self.decoder, self.weight_bytes
            for group in self.groups:
                group.read_adapters()
            if shape not in self.decoders:
                decoder = Decoder(self.model, self.decoder.kernels) if self.decoder else None
                base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
                self.decoders[shape] = decoder, weight_bytes(base)
            self.decoder, self.weight_bytes = self.decoders[shape]
        if self.decoder:
            self.decoder.held = []

    def traffic(self) -> Traffic:
        """Return a Traffic that counts from zero."""
        return Traffic(self.weight_bytes, self.position_bytes, self.model.device)

    def _say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def generate(
        self, rows: list[list[int]], config: GenerationConfig, watch: Watch, streamer: Any = None, batch: int = 1
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, including an end token; arguments as in `Decoder.generate`."""
        unknown = [f"the fast decoder does not support {name}" for name in sorted(set(config.to_diff_dict()) - COVERED)]
        if self.limit is not None and max(map(len, rows)) + config.max_new_tokens > self.limit:
            unknown.append(f"beyond {self.limit:,} positions the rotary frequencies depend on the length of the text")
        reason = unknown[0] if self.decoder and unknown else self.reason
        reason = WITHOUT_CACHE if self.cacheless else reason
        if reason:
            self._say_once(f"using transformers' generate() to decode: {reason}")
        if self.decoder and not unknown:
            answers = self.decoder.generate(rows, config, watch, streamer, batch)
            if self.decoder.note:
                self._say_once(f"decoding without the decode_step kernels: {self.decoder.note}")
            return answers
        return self._plain(rows, config, watch, streamer)

    def _prefix(self, ids: list[int]) -> DynamicCache:
        """Return the cache of the last prompt and answer, cut to the tokens with which `ids` begins too."""
        off = adapters_off(self.adapted)
        known = common_prefix(self.held, ids[:-1]) if off == self.off else 0
        if known and self.cache is not None:
            self.cache.crop(min(0, known - self.cache.get_seq_length()))
        else:
            self.cache = DynamicCache()  # can be cut, as every layer keeps all positions
        self.held, self.off = [], off
        return self.cache

    def _plain(self, rows: list[list[int]], config: GenerationConfig, watch: Watch, streamer: Any) -> list[list[int]]:
        longest, device, pad = max(map(len, rows)), self.model.device, config.pad_token_id or 0
        one = len(rows) == 1 and (config.num_beams or 1) == 1
        own: dict[str, Any] = {"use_cache": False} if self.cacheless else {}
        if self.keeps:
            # Made without a config, every layer keeps all positions: the model's mask decides what a token sees. Moshi's
            # lets it see what is beyond the window that its own cache keeps.
            own = cache_argument(self.model, self._prefix(rows[0]) if one else DynamicCache())
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        with plain_linears(self.model) if one else nullcontext():
            output = self.model.generate(
                input_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
                stopping_criteria=[watch],
                streamer=streamer,
                **own,
            )
        ends = end_tokens(config)
        answers = output[:, longest:].tolist()  # [batch, new tokens]; shorter answers are padded
        answers = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in answers]
        self.held = rows[0] + answers[0][:-1] if one else []
        return answers
