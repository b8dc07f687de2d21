"""Generation from prompts to tokens, through a cache of fixed size.

On a GPU the step of a token and the choice of the next one are CUDA graphs, so the GPU never waits for Python.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from config import counted
from fast_path.attention import hold_rotary_scale, use_grouped_attention
from fast_path.families import steady_positions
from fast_path.layers import plain_linears
from fast_path.nf4 import runs_on
from fast_path.sampling import sample

CHUNK = 2048  # tokens of prompts per forward pass: the widest activation of a 3B model then takes 90 MiB
# The rest of a prompt is padded to this length and replayed as one graph, since a forward pass in Python is slower.
SHORT_CHUNK = 128
PAGE = 256  # cache lengths are multiples of it, so that a slightly longer prompt needs no new graphs
SHORTEST = 1024  # least length of one sequence's cache: 37 MB for a 3B model, 2 % of the bytes that a step reads
# Without cuDNN's attention, which builds a new plan for every length of a prompt.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# ------------------------------------------------------------------------------------------------ status line


class Watch(transformers.StoppingCriteria):
    """Counts the tokens of an answer, notes the times of the first and the last one, and stops on request.

    began: when the user began to wait, if not now, in seconds of time.perf_counter.
    """

    def __init__(self, began: float | None = None) -> None:
        self.start, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self.began = began
        self.tokens, self.stop = 0, False

    def count(self) -> None:
        """Note that a token has arrived, one for each sequence of a batch."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.count()
        return torch.full((len(input_ids),), self.stop, dtype=torch.bool, device=input_ids.device)

    def line(self, cut: bool, limits: str) -> str:
        """Return the status line: tokens, reason of the end, what the user waited for, tokens/s, first token, limits.

        The rate counts the tokens after the first one. cut: whether the answer reached max_new_tokens; limits: text
        that says what limits the speed.
        """
        why = ", stopped" if self.stop else ", cut at max_new_tokens" if cut else ""
        rate = (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else 1 / (self.last - self.start)
        first = f"first token after {self.first - self.start:.2f} s"
        waited = f"{self.last - self.start:.1f} s"
        if self.began is not None:
            waited = f"{self.last - self.began:.1f} s, {self.start - self.began:.1f} of them to start"
        return f"[{counted(self.tokens, 'token')}{why} in {waited} | {rate:.1f} tokens/s | {first} | {limits}]"


# ------------------------------------------------------------------------------------------------ sampling

NEAREST = 256  # scores


def processors(config: GenerationConfig) -> LogitsProcessorList:
    """Return the processors that turn logits into scores, in the order of transformers' `generate`."""
    found: list = []
    if (config.repetition_penalty or 1.0) != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.do_sample:
        if (config.temperature or 1.0) != 1.0:
            found.append(TemperatureLogitsWarper(config.temperature))
        top_k = 50 if config.top_k is None else config.top_k  # the default of `generate`, where 0 means off
        found += [TopKLogitsWarper(top_k)] if top_k else []
        if config.top_p is not None and config.top_p < 1.0:
            found.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            found.append(MinPLogitsWarper(config.min_p))
    return LogitsProcessorList(found)


def end_tokens(config: GenerationConfig) -> list[int]:
    """Return the tokens that end an answer."""
    ends = config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def draw(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    """Return the most likely token of each sequence or, with `sample`, one drawn from the softmax.

    scores: fp32 [batch, vocabulary]. If e is drawn from Exp(1) for each token, p / e is largest at token i with
    probability p_i. torch.multinomial uses the same method, but first makes a check that waits for the GPU, so it
    cannot be captured.
    """
    if not sample:
        return scores.argmax(-1)
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def choose_tokens(config: GenerationConfig, history: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the next token of each sequence, [batch].

    history: the tokens that the repetition penalty counts; logits: fp32 [batch, vocabulary]. transformers' top_p sorts
    the whole vocabulary, which takes a considerable part of a token's time (docs/measurements.md). Without top_k the
    kernels of sampling.py draw without sorting. If top_k <= NEAREST / 2, only the NEAREST largest logits are used; the
    spare half holds logits that tie with the k-th one, which transformers keeps.
    """
    known = processors(config)
    top_k = next((p.top_k for p in known if isinstance(p, TopKLogitsWarper)), None)
    if config.do_sample and top_k is None and runs_on(logits.device):
        alone = (RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper)  # each score changes independently
        scores = LogitsProcessorList(p for p in known if isinstance(p, alone))(history, logits)
        # The seed comes from torch's generator on the device, so manual_seed determines the answer, and each replay of a
        # graph draws new tokens.
        seed = torch.randint(2**62, (1,), device=logits.device)
        return sample(scores, seed, config.top_p, config.min_p)
    nearest = top_k is not None and top_k <= NEAREST // 2
    if not nearest or logits.shape[-1] <= NEAREST:
        return draw(known(history, logits), config.do_sample)
    # The penalty finds tokens by their index, so it comes before topk. The others depend only on the scores.
    penalties = [p for p in known if isinstance(p, RepetitionPenaltyLogitsProcessor)]
    values, tokens = LogitsProcessorList(penalties)(history, logits).topk(NEAREST)
    scores = LogitsProcessorList(p for p in known if p not in penalties)(history, values)
    return tokens.gather(-1, draw(scores, config.do_sample)[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------ cache and attention


class SlotCache(Cache):
    """Keys and values at fixed addresses, [batch, heads, length, head_dim] per layer.

    New ones are written to `slots` [positions], and attention sees the first `end` slots. Every layer has the whole
    length, even one with a sliding window, whose mask limits it to its window. So the cache can go back to any prefix.
    """

    def __init__(self, layers: int, length: int):
        super().__init__(layers=[StaticLayer(max_cache_len=length) for _ in range(layers)])
        self.slots, self.end = None, length

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple:
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys.index_copy_(2, self.slots, keys)
        layer.values.index_copy_(2, self.slots, values)
        return layer.keys[:, :, : self.end], layer.values[:, :, : self.end]

    def take_prefix(self, other: "SlotCache", positions: int) -> None:
        """Copy the keys and values of the first `positions` positions of a shorter cache."""
        for layer, old in zip(self.layers, other.layers, strict=True):
            layer.lazy_initialization(old.keys, old.values)
            layer.keys[:, :, :positions] = old.keys[:, :, :positions]
            layer.values[:, :, :positions] = old.values[:, :, :positions]


def cache_argument(model: PeftModel | PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return the cache as a keyword argument of the model's forward. Its name changes in transformers 5.24."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values": cache}


def attention_windows(config: Any) -> dict[str, int | None]:
    """Map each kind of attention that a model's layers have to its sliding window, None if it sees all positions."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


@contextmanager
def short_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Have a rotary embedding whose scale follows the length rotate as in a text of `steady_positions` or less.

    It would look at the positions in Python, which a graph cannot, or has the frequencies of a longer text before.
    """
    before = {} if steady_positions(model.config) is None else hold_rotary_scale(model, 1)
    try:
        yield
    finally:
        for module, kind in before.items():
            module.rope_type = kind


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the modules with adapters. Callers keep the list, since walking through all modules is slow."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapters_off(layers: list[LoraLayer]) -> bool:
    """Return whether the adapters are switched off, for example within peft's `disable_adapter`."""
    return any(layer.disable_adapters for layer in layers)


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return the length of the lists' common prefix, in tokens."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


# ------------------------------------------------------------------------------------------------ the decoder


class Decoder:
    """Generates tokens after prompts, through a cache of fixed size.

    Each token is computed and chosen on the device; on CUDA this is a graph. The cache of a single sequence is kept
    after an answer, so the next prompt computes only the tokens that differ. Sampling uses torch's default generator,
    so `torch.manual_seed` before a call determines the answer. kernels: whether to use the kernels of decode_step,
    where they support the model and the size of the batch.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, kernels: bool):
        self.model, self.kernels = model, kernels
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device, self.vocabulary = self.base.device, self.base.get_output_embeddings().weight.shape[0]
        use_grouped_attention(self.base)
        self.adapted = lora_layers(model)
        self.windows = attention_windows(self.base.config.get_text_config())
        self.batch = self.length = self.prompts = 0
        self.held: list[int] = []  # the tokens whose keys and values are in the cache; for a single sequence only
        self.off = False  # whether `held` was computed without the adapters
        self.note = ""  # the reason why the kernels of decode_step are not used

    # -------------------------------------------------------------------------------------------- buffers

    def reserve(self, batch: int, length: int) -> None:
        """Make room for `length` positions of `batch` sequences, keeping the contents of a single sequence's cache."""
        if batch == self.batch and length <= self.length:
            return
        grown = 2 * self.length if batch == self.batch else SHORTEST if batch == 1 else 0
        length = -(-max(length, min(grown, length + 16 * PAGE)) // PAGE) * PAGE
        old, kept = getattr(self, "cache", None), len(self.held) if batch == self.batch == 1 else 0
        self.batch = 0  # so that the next call starts afresh if memory runs out below
        self.graphs: dict[Any, Callable] = {}  # the old graphs write to the old buffers
        self.steps: dict[bool, Callable] = {}
        self.captured: list[Callable] = []  # a graph reads tensors that its function refers to, so it must not be freed
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.cache = SlotCache(self.base.config.get_text_config().num_hidden_layers, length)
        if kept:
            self.cache.take_prefix(old, kept)
        zeros = {"dtype": torch.long, "device": self.device}
        self.token = torch.zeros(batch, 1, **zeros)  # the input of the next step
        self.position = torch.zeros(1, **zeros)  # its slot, one for all sequences, since they are padded on the left
        self.starts = torch.zeros(batch, 1, **zeros)  # each sequence's first slot that is not padding
        self.history = torch.zeros(batch, length, **zeros)  # the tokens that the repetition penalty counts
        self.finished = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.logits = torch.zeros(batch, self.vocabulary, device=self.device)
        self.piece = torch.zeros(batch, SHORT_CHUNK, **zeros)
        self.last = torch.zeros(1, **zeros)  # the column of `piece` whose logits are needed
        pinned = self.device.type == "cuda"
        self.posted = [torch.zeros(batch, dtype=torch.long, pin_memory=pinned) for _ in range(2)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self.held, self.batch, self.length = self.held[:kept], batch, length

    def run(self, key: tuple, build: Callable[[], Callable[[], None]]) -> None:
        """Run the function that `build` returns, on CUDA as a graph. It is built at the first call with this key."""
        if key not in self.graphs:
            self.graphs[key] = self._capture(build()) if self.device.type == "cuda" else build()
        self.graphs[key]()

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        state = [self.token, self.position, self.history, self.finished, self.logits]
        before = [tensor.clone() for tensor in state]
        # Blocks belong to a stream, so the warm-up cannot use the memory that earlier forward passes reserved.
        torch.cuda.empty_cache()
        with torch.random.fork_rng([self.device]):  # the warm-up draws random numbers; they must not change an answer
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # compiles kernels, and lets every library allocate its workspace outside of the graph
            torch.cuda.current_stream().wait_stream(stream)
            # cuBLAS keeps 32 MiB per stream on an H100; the workspace that a graph needs is in the graph's pool.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # graphs share this memory; results are kept in the buffers
                function()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.captured.append(function)
        return graph.replay

    # -------------------------------------------------------------------------------------------- forward

    def _mask(self, slots: torch.Tensor, end: int, window: int | None) -> torch.Tensor:
        """Return the attention mask, [batch, 1, positions, end].

        It is 0 where a position sees a slot and the smallest number of the model's dtype elsewhere.
        """
        key, query = torch.arange(end, device=self.device), slots[:, None]
        seen = key <= query
        if window:
            seen = seen & (key > query - window)
        # Padding sees itself. A position that sees nothing would become NaN, and NaN would stay in the cache.
        seen = (seen & (key >= self.starts[:, :, None]) | (key == query))[:, None]
        # Numbers to add, since every layer would convert a bool mask to them again.
        zero = torch.zeros((), dtype=self.base.dtype, device=self.device)
        return zero.where(seen, torch.finfo(self.base.dtype).min)

    def _forward(self, ids: torch.Tensor, slots: torch.Tensor, end: int, last: torch.Tensor) -> None:
        """Process ids [batch, positions] at slots [positions], and write the logits of column `last` to the buffer."""
        masks = {kind: self._mask(slots, end, window) for kind, window in self.windows.items()}
        self.cache.slots, self.cache.end = slots, end
        with sdpa_kernel(BACKENDS):
            output = self.base(
                input_ids=ids,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=(slots - self.starts).clamp_min(0),
                use_cache=True,
                logits_to_keep=last,
                **cache_argument(self.base, self.cache),
            )
        self.logits.copy_(output.logits[:, 0])

    def _short_chunk(self) -> None:
        slots = self.position + torch.arange(SHORT_CHUNK, device=self.device)
        self._forward(self.piece, slots, self.length, self.last)

    def prefill(self, rows: list[list[int]]) -> None:
        """Fill the cache with the prompts, apart from a prefix that it already holds, and compute the logits.

        rows: the tokens of each prompt. The logits are those after its last token.
        """
        longest, off = max(map(len, rows)), adapters_off(self.adapted)
        known = common_prefix(self.held, rows[0][:-1]) if self.batch == 1 and off == self.off else 0
        self.held, self.off = [], off
        # Padding repeats the prompt's first token, which does not change what the repetition penalty counts.
        padded = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows])
        self.starts.copy_(torch.tensor([[longest - len(row)] for row in rows]))
        self.history.copy_(padded[:, :1].expand(-1, self.length))
        self.history[:, :longest] = ids = padded.to(self.device)
        while known < longest:
            size = min(max(1, CHUNK // self.batch), longest - known)
            slots = torch.arange(known, known + size, device=self.device)
            # Capturing takes the time of a few forward passes, so the first prompt of a process is faster without it.
            if self.batch == 1 and size <= SHORT_CHUNK and self.prompts:
                self.position.fill_(known)
                self.piece[:, :size] = ids[:, known:]
                self.last.fill_(size - 1)
                self.run(("chunk", off), lambda: self._short_chunk)
            else:
                last = torch.tensor([size - 1], device=self.device)
                # For the first prompt use bitsandbytes' kernels, since those of Triton may have to be compiled first.
                with nullcontext() if self.prompts else plain_linears(self.base):
                    self._forward(ids[:, known : known + size], slots, known + size, last)
            known += size
        self.position.fill_(longest)
        self.prompts += 1

    def _step_function(self) -> Callable[[], None]:
        """Return the function that computes a step, one token per sequence: from `token` at `position` to `logits`."""
        if self.kernels and not self.off:
            from fast_path import decode_step  # not at the top: only this path needs it, and it needs Triton

            try:
                with plain_linears(self.base):
                    step = decode_step.DecodeStep(self.model, self.cache)
                return lambda: self.logits.copy_(step(self.token, self.position, self.starts))
            except decode_step.Unsupported as error:
                self.note = str(error)
        last = torch.zeros(1, dtype=torch.long, device=self.device)

        def forward() -> None:
            with plain_linears(self.base) if self.batch == 1 else nullcontext():
                self._forward(self.token, self.position, self.length, last)

        return forward

    # -------------------------------------------------------------------------------------------- tokens

    def _choice(self, config: GenerationConfig) -> Callable[[], None]:
        """Return the function that chooses each sequence's next token from the logits.

        A sequence that has ended gets padding.
        """
        ends = torch.tensor(end_tokens(config), dtype=torch.long, device=self.device)
        pad = config.pad_token_id or 0

        def function() -> None:
            tokens = choose_tokens(config, self.history, self.logits)
            tokens = torch.where(self.finished, pad, tokens)
            self.finished |= (tokens[:, None] == ends).any(-1)
            self.token.copy_(tokens[:, None])
            self.history.index_copy_(1, self.position, self.token)

        return function

    def choose(self, config: GenerationConfig, key: str) -> None:
        """Choose the first tokens after the prompts. key: a text that differs whenever the settings of `config` do."""
        if self.prompts == 1:  # the first prompt of a process, as in `prefill`
            return self._choice(config)()
        self.run(("choose", key), lambda: self._choice(config))

    def step(self, config: GenerationConfig, key: str) -> None:
        """Compute the logits after `token`, go to the next position and choose the next tokens.

        This is a single graph, since the GPU pauses between two graphs.
        """

        def build() -> Callable[[], None]:
            if self.off not in self.steps:
                self.steps[self.off] = self._step_function()
            logits, choice = self.steps[self.off], self._choice(config)

            def function() -> None:
                logits()
                self.position.add_(1)
                choice()

            return function

        self.run(("step", self.off, key), build)

    def post(self, number: int) -> None:
        """Start to copy the tokens that were just chosen to the host."""
        self.posted[number % 2].copy_(self.token[:, 0], non_blocking=True)
        if self.events[0]:
            self.events[number % 2].record()

    def fetch(self, number: int) -> list[int]:
        """Return the posted tokens. Waiting for them is the only wait per token."""
        if self.events[0]:
            self.events[number % 2].synchronize()
        return self.posted[number % 2].tolist()

    @torch.no_grad()
    def generate(
        self, rows: list[list[int]], config: GenerationConfig, watch: Watch, streamer: Any = None, batch: int = 1
    ) -> list[list[int]]:
        """Return the tokens after each prompt, up to and including an end token, at most config.max_new_tokens.

        rows: the tokens of each prompt, with the answer at most `steady_positions` of them. batch: the number of
        sequences in the buffers, if larger than the number of rows. If it stays the same, a last, smaller batch draws the
        same tokens as within a larger one, and needs no new graphs.
        """
        with short_rotary(self.base):
            return self._generate(rows, config, watch, streamer, batch)

    def _generate(
        self, rows: list[list[int]], config: GenerationConfig, watch: Watch, streamer: Any, batch: int
    ) -> list[list[int]]:
        count, longest = len(rows), max(map(len, rows))
        self.reserve(max(batch, count), longest + max(config.max_new_tokens, SHORT_CHUNK))
        self.prefill(rows + rows[-1:] * (self.batch - count))
        self.finished.copy_(torch.arange(self.batch) >= count)
        if streamer is not None:
            streamer.put(torch.tensor(rows[:1]))
        choice = {name: value for name, value in config.to_diff_dict().items() if name != "max_new_tokens"}
        ends, key = end_tokens(config), str(sorted(choice.items()))
        answers: list[list[int]] = [[] for _ in rows]
        launched = read = 0
        while not read or not (
            read == config.max_new_tokens or watch.stop or all(answer[-1] in ends for answer in answers)
        ):
            # Launch one token ahead of the one being read, so that the GPU never waits for Python; a token after the
            # end is discarded. Do not launch ahead of the first token, because the step may have to be captured.
            while launched < min(config.max_new_tokens, read + 2 if read else 1):
                (self.step if launched else self.choose)(config, key)
                self.post(launched)
                launched += 1
            tokens = self.fetch(read)
            read += 1
            for answer, token in zip(answers, tokens, strict=False):
                if not answer or answer[-1] not in ends:
                    answer.append(token)
            watch.count()
            if streamer is not None:
                streamer.put(torch.tensor(tokens[:1]))
        if streamer is not None:
            streamer.end()
        self.held = rows[0] + answers[0][:-1] if self.batch == 1 else []
        return answers
