"""decoder.py against transformers' own generate, on random models; the decoder runs on the CPU without graphs."""

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GenerationConfig,
    Lfm2Config,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
)

import fast_path
from fast_path import decoder as decoder_module
from fast_path import dropout, families, layers
from fast_path.decoder import Decoder, SlotCache, Watch, cache_argument, choose_tokens, processors
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer
from tests.families import small_model
from toolkit import generation
from toolkit.generation import Generator, Traffic, by_length, obstacle, weight_bytes

FAMILIES = ["qwen2", "llama", "mistral", "qwen3", "gemma2"]
torch.manual_seed(3)
LONG, SHORT, MIDDLE = (torch.randint(3, 4000, (n,)).tolist() for n in (40, 5, 23))


@pytest.fixture
def models(random_models: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """A function that loads a family's model, once a test, in fp32, where no two tokens are as good as equal."""

    @functools.cache
    def load(family: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(random_models(family), dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        return model

    return load


def config(new: int = 24, **settings: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, **{"do_sample": False, "pad_token_id": 0, **settings})


def reference(model: torch.nn.Module, ids: list[int], how: GenerationConfig) -> list[int]:
    """The answer of transformers' generate to one prompt."""
    tensor = torch.tensor([ids])
    return model.generate(tensor, attention_mask=torch.ones_like(tensor), generation_config=how)[0, len(ids) :].tolist()


def decode(decoder: Decoder, *rows: list[int], how: GenerationConfig | None = None, **keywords: int) -> list[list[int]]:
    return decoder.generate(list(rows), how or config(), Watch(), **keywords)


# ------------------------------------------------------------------------------------------------ as generate


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generates_alone_in_a_batch_in_chunks_and_from_a_prefix(
    family: str, models: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(family)
    assert obstacle(model) is None
    expected = [reference(model, row, config()) for row in (LONG, SHORT, MIDDLE)]
    decoder = Decoder(model, kernels=False)
    assert decode(decoder, LONG) == expected[:1]
    assert decode(decoder, LONG, SHORT, MIDDLE) == expected
    assert decode(decoder, LONG, SHORT, batch=3) == expected[:2]
    talk = LONG + expected[0] + SHORT
    assert decode(decoder, LONG) == expected[:1]
    assert decoder.held == LONG + expected[0][:-1]
    assert decode(decoder, talk) == [reference(model, talk, config())]
    assert decode(decoder, LONG[:20] + SHORT) == [reference(model, LONG[:20] + SHORT, config())]  # it goes back
    monkeypatch.setattr(decoder_module, "CHUNK", 7)
    monkeypatch.setattr(decoder_module, "SHORT_CHUNK", 3)
    assert decode(Decoder(model, kernels=False), LONG, SHORT, MIDDLE) == expected
    chunked = Decoder(model, kernels=False)
    assert [decode(chunked, row)[0] for row in (LONG, SHORT, MIDDLE)] == expected


HYBRIDS = {  # layers with a state besides keys and values, and models whose positions are biases of attention
    "convolutions": lambda **sizes: Lfm2Config(**sizes, full_attn_idxs=[1], block_dim=64, block_ff_dim=128),
    "recurrent": lambda **sizes: RecurrentGemmaConfig(**sizes, lru_width=64, attention_window_size=16),
    "state space": lambda **sizes: MambaConfig(**sizes),
    "linear attention": lambda **sizes: Qwen3_5TextConfig(
        **sizes, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "alibi": lambda **sizes: BloomConfig(**sizes),
    "rotary or alibi": lambda **sizes: FalconConfig(**sizes, alibi=True),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_with_another_state_uses_its_own_cache(name: str) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS[name](**sizes)).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # far from a tie
    generator, prompt = Generator(model, pytest.fail, fast=False), [5, 6, 7, 8, 9, 10, 11]
    assert obstacle(model) is not None
    how = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=2)
    for row in (prompt, [*prompt[:5], 20], [*prompt, 21, 22]):  # each begins as the one before it
        ids = list(row)
        while len(ids) < len(row) + 24 and (ids == row or ids[-1] != 2):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert generator.generate([row], how, Watch()) == [ids[len(row) :]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layers_of_two_kinds_and_both_kinds_of_masks(implementation: str) -> None:
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(**sizes, **windows, num_attention_heads=4, num_key_value_heads=2),
        attn_implementation=implementation,
    ).eval()
    decoder = Decoder(model, kernels=False)
    assert decoder.windows == {"full_attention": None, "sliding_attention": 6}
    expected = [reference(model, row, config()) for row in (LONG, SHORT, MIDDLE)]
    assert decode(decoder, LONG, SHORT, MIDDLE) == expected
    assert decode(decoder, LONG) == expected[:1]
    decoder.windows["sliding_attention"] = None
    assert decode(decoder, LONG, SHORT, MIDDLE) != expected  # the window counts


@pytest.mark.parametrize(("family", "penalty"), [("llama", 0.4), ("gemma2", 1.8)])  # one never repeats, one always
def test_repetition_penalty_is_generates(family: str, penalty: float, models: Callable) -> None:
    model, how = models(family), config(repetition_penalty=penalty)
    expected = [reference(model, row, how) for row in (LONG, SHORT)]
    assert expected[0] != reference(model, LONG, config())
    decoder = Decoder(model, kernels=False)
    assert decode(decoder, LONG, SHORT, how=how) == expected
    assert decode(decoder, SHORT, how=how) == expected[1:]


def test_end_tokens_end_each_row_and_the_limit_all(models: Callable) -> None:
    model = models("llama")
    whole = [reference(model, row, config()) for row in (LONG, SHORT)]
    decoder = Decoder(model, kernels=False)
    ends = [whole[0][3], whole[1][9]]
    cut = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), 24)] for row in whole]
    assert decode(decoder, LONG, SHORT, how=config(eos_token_id=ends)) == cut
    assert decode(decoder, LONG, how=config(eos_token_id=ends[0])) == cut[:1]
    assert decoder.held == LONG + cut[0][:-1]
    assert decode(decoder, LONG, how=config(1)) == [whole[0][:1]]
    watch = Watch()
    watch.stop = True
    assert decoder.generate([LONG], config(), watch) == [whole[0][:1]]


def test_the_cache_grows_and_keeps_its_prefix(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "SHORTEST", 0)
    monkeypatch.setattr(decoder_module, "PAGE", 16)
    monkeypatch.setattr(decoder_module, "SHORT_CHUNK", 8)
    model, ids = models("qwen3"), list(SHORT)
    decoder, lengths = Decoder(model, kernels=False), []
    for _ in range(5):
        answer = decode(decoder, ids)[0]
        assert answer == reference(model, ids, config())
        ids = ids + answer + MIDDLE
        lengths.append(decoder.length)
    assert len(set(lengths)) > 2 and lengths == sorted(lengths)


def test_after_memory_ran_out_the_next_answer_begins_anew(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llama")
    decoder = Decoder(model, kernels=False)
    first = decode(decoder, LONG)[0]
    talk = (LONG + first) * 20  # longer than the cache, which must grow

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotCache, "take_prefix", full)
        with pytest.raises(torch.OutOfMemoryError):
            decode(decoder, talk)
    assert decode(decoder, LONG) == [first]
    assert decode(decoder, talk) == [reference(model, talk, config())]


def test_a_turn_costs_its_own_tokens_only(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("qwen2")
    for fast in (True, False):
        seen: list[int] = []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        monkeypatch.setattr(decoder_module, "SHORT_CHUNK", 1)
        generator = Generator(model, print, fast=fast)
        answer = generator.generate([LONG], config(8), Watch())[0]
        seen.clear()
        generator.generate([LONG + answer + SHORT], config(8), Watch())
        hook.remove()
        assert seen == [1 + len(SHORT)] + [1] * 7  # the last token of the answer was never fed


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_a_prefix_is_generate(family: str, models: Callable) -> None:
    model = models(family)
    generator = Generator(model, print, fast=False)
    first = generator.generate([LONG], config(), Watch())[0]
    assert first == reference(model, LONG, config())
    for ids in (LONG + first + SHORT, LONG[:30], MIDDLE, MIDDLE):
        assert generator.generate([ids], config(), Watch())[0] == reference(model, ids, config())


# ------------------------------------------------------------------------------------------------ sampling


SETTINGS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3}


def test_scores_are_those_of_generates_own_processors(models: Callable) -> None:
    model, how = models("llama"), config(do_sample=True, **SETTINGS)
    own = model._get_logits_processor(how, input_ids_seq_length=len(LONG))
    assert [type(p) for p in processors(how)] == [type(p) for p in own]
    ids, logits = torch.tensor([LONG]), torch.randn(1, 4096)
    assert torch.equal(processors(how)(ids, logits), own(ids, logits))


@pytest.mark.parametrize("top_k, nearest", [(50, True), (128, True), (129, False), (0, False)])
def test_tokens_come_from_generates_scores_whichever_are_looked_at(monkeypatch, models: Callable, top_k, nearest):
    """The scores that are drawn from, put back in their places, are those of transformers' own processors, ties kept."""
    model = models("llama")
    how = config(do_sample=True, temperature=0.7, top_k=top_k, top_p=0.9, repetition_penalty=1.3, min_p=0.001)
    ids, logits = torch.tensor([LONG, LONG[::-1]]), torch.randn(2, 4096).bfloat16().float() * 3
    own = model._get_logits_processor(how, input_ids_seq_length=len(LONG))(ids, logits)
    seen = []
    monkeypatch.setattr(decoder_module, "draw", lambda scores, sample: seen.append(scores) or scores.argmax(-1))
    tokens = choose_tokens(how, ids, logits)
    assert torch.equal(tokens, own.argmax(-1))
    assert seen[0].shape[1] == (256 if nearest else 4096)
    finite = own.isfinite()
    assert torch.equal(finite.sum(-1), seen[0].isfinite().sum(-1))
    for row in range(2):
        want = own[row][finite[row]].sort().values
        assert torch.equal(seen[0][row][seen[0][row].isfinite()].sort().values, want)


def test_first_tokens_are_drawn_from_the_softmax_of_the_scores(models: Callable) -> None:
    """Pearson's chi-square of 3,000 draws, at a fixed seed below its 99.9 % quantile (Wilson and Hilferty)."""
    model, draws = models("llama"), 3000
    how = config(1, do_sample=True, temperature=0.7, top_k=12, top_p=0.95)
    logits = model(torch.tensor([SHORT])).logits[:, -1]
    expected = processors(how)(torch.tensor([SHORT]), logits).softmax(-1)[0] * draws
    decoder, batch = Decoder(model, kernels=False), 100
    torch.manual_seed(0)
    tokens = [row[0] for _ in range(draws // batch) for row in decode(decoder, *[SHORT] * batch, how=how)]
    counts = torch.bincount(torch.tensor(tokens), minlength=4096)
    kept = expected > 0
    assert counts[~kept].sum() == 0 and 5 < kept.sum() <= 12
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_seed_fixes_the_answer_and_a_smaller_batch_draws_the_same(models: Callable) -> None:
    decoder, how = Decoder(models("qwen2"), kernels=False), config(do_sample=True, temperature=2.0)

    def answers(seed: int, *rows: list[int], batch: int = 4) -> list[list[int]]:
        torch.manual_seed(seed)
        return decode(decoder, *rows, how=how, batch=batch)

    assert answers(1, LONG, SHORT, MIDDLE) == answers(1, LONG, SHORT, MIDDLE) != answers(2, LONG, SHORT, MIDDLE)
    assert answers(1, LONG, SHORT) == answers(1, LONG, SHORT, MIDDLE)[:2]
    assert answers(1, LONG, batch=1) == answers(1, LONG, batch=1)


# ------------------------------------------------------------------------------------------------ adapters and kernels


def with_adapter(folder: Path, dtype: str = "float32", device: str = "cpu") -> PeftModel:
    """A 4-bit model with an adapter that counts."""
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype=dtype), device=device)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, create_lora_config(rank=8)).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.generation_config = GenerationConfig()
    return peft_model


@pytest.fixture(scope="module")
def adapted(random_models: Callable) -> PeftModel:
    return with_adapter(random_models("qwen2"))


def test_switching_the_adapter_off_takes_another_cache(adapted) -> None:
    expected = reference(adapted, LONG, config())
    with adapted.disable_adapter():
        base = reference(adapted, LONG, config())
    assert base != expected
    for fast in (True, False):
        generator = Generator(adapted, print, fast=fast)
        for _ in range(2):
            assert generator.generate([LONG], config(), Watch())[0] == expected
            with adapted.disable_adapter():
                assert generator.generate([LONG], config(), Watch())[0] == base


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3"])
def test_fused_layers_answer_as_peft_does(family: str, random_models: Callable) -> None:
    """Through the decoder and through generate, with the adapter and without it."""
    model = with_adapter(random_models(family))
    padded = torch.tensor([LONG, [0] * (len(LONG) - len(MIDDLE)) + MIDDLE])
    batch = {"input_ids": padded, "attention_mask": (padded != 0).long()}

    def answers() -> list:
        return [model.generate(**batch, generation_config=how).tolist() for how in (config(), config(num_beams=2))]

    expected = [reference(model, row, config()) for row in (LONG, SHORT, MIDDLE)]
    generated = answers()
    with model.disable_adapter():
        base = reference(model, LONG, config())
    kinds = {module: type(module) for module in model.modules()}
    decoder = Decoder(model, kernels=False)
    layers.fuse(model, dropout.DropoutClock(0, model.device), 0.0, False, pieces=2)
    for layer in model.get_base_model().get_decoder().layers:
        assert type(layer.self_attn).forward is layers._fused_attention and layer.mlp.fused_gate_up.pieces == 2
    assert decode(decoder, LONG, SHORT, MIDDLE) == expected
    assert decode(decoder, LONG) == expected[:1]
    with model.disable_adapter():
        assert decode(decoder, LONG) == [base] != expected[:1]
    assert answers() == generated
    with layers.plain_linears(model):
        assert all(type(module) is kind for module, kind in kinds.items())


def fake_decode_ops(monkeypatch: pytest.MonkeyPatch, step: type) -> None:
    module = types.SimpleNamespace(DecodeStep=step, Unsupported=type("Unsupported", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "fast_path.decode_step", module)
    monkeypatch.setattr(fast_path, "decode_step", module, raising=False)


def test_steps_go_through_decode_ops(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = models("llama"), []

    class Step:
        def __init__(self, given: PreTrainedModel, cache: SlotCache):
            assert given is model and cache.layers[0].keys.shape[1::2] == (4, 64)
            self.cache = cache

        def __call__(self, ids: torch.Tensor, position: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            rows = len(self.cache.layers[0].keys)
            assert ids.shape == starts.shape == (rows, 1) and position.shape == (1,)
            calls.append((rows, int(position)))
            self.cache.slots, self.cache.end = position, int(position) + 1
            mask = (torch.arange(self.cache.end) >= starts)[:, None, None]
            kept = cache_argument(model, self.cache)
            output = model(ids, attention_mask=mask, position_ids=position - starts, **kept)
            return output.logits[:, -1].float()

    fake_decode_ops(monkeypatch, Step)
    expected = [reference(model, row, config()) for row in (LONG, SHORT)]
    decoder = Decoder(model, kernels=True)
    assert decode(decoder, LONG) == expected[:1] and calls == [(1, slot) for slot in range(40, 63)]
    assert decode(decoder, LONG, SHORT) == expected and calls[23:] == [(2, slot) for slot in range(40, 63)]


def test_a_model_that_decode_ops_does_not_know_gets_a_line(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: PreTrainedModel, cache: object) -> None:
        raise sys.modules["fast_path.decode_step"].Unsupported("LlamaForCausalLM: another rotary")

    fake_decode_ops(monkeypatch, refuse)
    lines: list[str] = []
    generator = Generator(models("llama"), lines.append, fast=True)
    generator.decoder.kernels = True
    expected = reference(models("llama"), LONG, config())
    assert [generator.generate([LONG], config(), Watch())[0] for _ in range(2)] == [expected] * 2
    assert lines == ["decoding without the decode_step kernels: LlamaForCausalLM: another rotary"]


# ------------------------------------------------------------------------------------------------ which way


def test_what_the_decoder_does_not_cover_goes_through_generate(models: Callable) -> None:
    lines: list[str] = []
    model = models("llama")
    generator = Generator(model, lines.append, fast=True)
    for how in (config(num_beams=2), config(no_repeat_ngram_size=2)):
        assert generator.generate([LONG], how, Watch())[0] == reference(model, LONG, how)
    assert lines == [
        "using transformers' generate() to decode: the fast decoder does not support num_beams",
        "using transformers' generate() to decode: the fast decoder does not support no_repeat_ngram_size",
    ]
    Generator(model, lines.append).generate([SHORT], config(), Watch())
    assert len(lines) == 2  # a CPU is told nothing


def test_texts_up_to_where_the_rotary_scale_changes_go_through_the_decoder() -> None:
    """Phi-4-mini's longrope. A longer text between two short ones leaves its frequencies in the model."""
    lines: list[str] = []
    model = small_model("phi3_longrope")
    model.generation_config = GenerationConfig()
    assert families.steady_positions(model.config) == 64 and obstacle(model) is None
    generator = Generator(model, lines.append, fast=True)
    for row, how, said in ((LONG, config(24), 0), (LONG, config(25), 1), (LONG[:20], config(24), 1)):
        assert generator.generate([row], how, Watch())[0] == reference(model, row, how)
        assert len(lines) == said
    assert lines == [
        "using transformers' generate() to decode: beyond 64 positions the rotary frequencies depend on the length of the text"
    ]
    held = generator.decoder.held
    assert held == LONG[:20] + reference(model, LONG[:20], config(24))[:-1]  # the decoder's own answer
    assert model.model.rotary_emb.rope_type == "longrope"


def test_obstacles(models: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("gemma")  # no row in families.py
    monkeypatch.setattr(model.config, "rope_parameters", {"rope_type": "dynamic", "factor": 2.0})
    assert "rotary" in obstacle(model)
    monkeypatch.undo()
    model = models("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert "flash_attention_2" in obstacle(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert "Llama" in obstacle(model)


def test_batches_take_every_row_once_the_longest_first() -> None:
    rows = [[0] * n for n in (3, 9, 1, 9, 4, 2, 8)]
    batches = by_length(rows, 2, 4)
    assert batches == [[1, 3], [0, 2], [6, 4], [5]]
    assert sorted(sum(by_length(rows, 3, 100), [])) == list(range(7))


def test_traffic_counts_weights_and_cache(models: Callable, adapted) -> None:
    model = models("llama")
    whole = sum(p.nbytes for p in model.parameters())
    assert weight_bytes(model) == whole - model.model.embed_tokens.weight.nbytes  # it has a head of its own
    assert generation.position_bytes(model) == 2 * 2 * 4 * 64 * 4
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.nbytes == 512 * 256 // 2 and weight_bytes(adapted.get_base_model()) > layer.weight.nbytes
    traffic, watch = Traffic(1000, 10, torch.device("cpu")), Watch()
    watch.tokens, watch.first, watch.last = 11, 1.0, 3.0
    traffic.add(watch, 2, 100)
    assert traffic.read == 10 * (1000 + 2 * 10 * 105) and traffic.seconds == 2.0
    assert traffic.line().startswith("0.0 GB/s read | peak ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_it_is_generates_too(family: str, random_models: Callable) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_models(family), dtype=torch.float32).eval().cuda()
    model.generation_config = GenerationConfig()

    def expected(row: list[int], how: GenerationConfig) -> list[int]:
        ids = torch.tensor([row], device="cuda")
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)[0, len(row) :].tolist()

    decoder = Decoder(model, kernels=False)
    for how in (config(), config(repetition_penalty=0.4)):
        for row in (LONG, SHORT, MIDDLE, LONG + MIDDLE):
            assert decode(decoder, row, how=how) == [expected(row, how)]
    assert decode(decoder, LONG, SHORT, MIDDLE) == [expected(row, config()) for row in (LONG, SHORT, MIDDLE)]
    sampled = config(do_sample=True, temperature=2.0, top_p=0.9, top_k=0)
    answers = []
    for _ in range(3):  # the first time captures, which must not change what is drawn
        torch.manual_seed(5)
        answers.append(decode(decoder, LONG, how=sampled))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the training kernels")
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_the_error_of_a_prompts_graph_is_no_larger_than_pefts(family: str, random_models: Callable) -> None:
    prompts = [LONG, MIDDLE + SHORT, LONG + MIDDLE]
    with torch.no_grad():
        exact, plain = (
            [model(torch.tensor([row], device="cuda")).logits[0, -1].float() for row in prompts]
            for model in (with_adapter(random_models(family), dtype, "cuda") for dtype in ("float32", "bfloat16"))
        )
    generator = Generator(with_adapter(random_models(family), "bfloat16", "cuda"), print)
    generator.generate([SHORT], config(1), Watch())  # a process's first prompt goes through peft's modules
    found = []
    for row in prompts:
        generator.generate([row], config(1), Watch())
        found.append(generator.decoder.logits[0].clone())
    assert any(key[0] == "chunk" for key in generator.decoder.graphs)
    attention = generator.decoder.base.get_decoder().layers[0].self_attn
    assert type(attention).forward is layers._fused_attention
    distance = [sum((a - b).norm() for a, b in zip(side, exact, strict=True)).item() for side in (found, plain)]
    assert distance[0] < 1.2 * distance[1], distance
