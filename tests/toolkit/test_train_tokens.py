"""lora.train_tokens: rows of the embedding that are trained, against the same rows of a plain model."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import train_qlora
from config import Config, ConfigError, PerformanceConfig, load_config
from fast_path.choice import choose_fast_path
from fast_path.loss import CausalLMLoss
from fast_path.token_rows import use_token_rows
from quantization_utils import count_parameters, create_lora_config, prepare_model_for_training, with_tokens
from tests.families import small_model
from toolkit.adapters import load_adapter
from toolkit.checkpoints import targets_text
from toolkit.generation import obstacle
from toolkit.memory_plan import token_rows_bytes
from toolkit.merge import logits_on, merge_adapter
from toolkit.model_shape import adapter_parameters, shape_of

TOKENS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture
def tokenizer(tiny_model):
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


@pytest.fixture(params=["qwen2", "llama"])  # with a tied head, and with one of its own
def folder(request, random_models):
    return random_models(request.param)


def fresh(folder):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()


def prepared(folder, tokenizer):
    lora = with_tokens(create_lora_config(rank=4, dropout=0.0), TOKENS, tokenizer)
    return prepare_model_for_training(fresh(folder), lora, False).eval()


def delta_of(model):
    (found,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    return found


def test_rows_get_the_gradient_that_they_have_in_a_plain_model(folder, tokenizer):
    model, plain = prepared(folder, tokenizer), fresh(folder)
    use_token_rows(model)
    ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
    batch = torch.tensor([[ids[0], 5, 6, ids[1], 7, ids[0], 8, ids[1]], [9, 10, ids[0], 11, 12, 13, 14, ids[1]]])
    objective = CausalLMLoss(model, torch.float32)
    objective.logit_chunk = 3
    assert objective.chunked  # a tied head too
    loss = objective(input_ids=batch, labels=batch)
    loss.backward()
    plain.get_input_embeddings().weight.requires_grad_(True)
    logits = plain(input_ids=batch, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    delta = delta_of(model)
    assert delta.dtype == torch.float32 and delta.shape == (2, plain.config.hidden_size)
    torch.testing.assert_close(delta.grad, plain.get_input_embeddings().weight.grad[sorted(ids)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])  # Gemma multiplies its embeddings by a factor
def test_looked_up_rows_compute_what_peft_computes(family):
    numbers = [9, 4, 77]
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": numbers, "task_type": "CAUSAL_LM"}
    one, other = (get_peft_model(small_model(family), LoraConfig(**lora)).eval() for _ in range(2))
    use_token_rows(other)
    ids = torch.tensor([[4, 5, 9, 9, 77, 0, 4095], [1, 2, 3, 4, 5, 6, 7]])
    found = []
    for model in (one, other):
        with torch.no_grad():
            delta_of(model).copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
        logits = model(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradient = delta_of(model).grad
        with torch.no_grad(), model.disable_adapter():
            found.append((logits, gradient, model(input_ids=ids, use_cache=False).logits))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][2], atol=0.1)


def test_adapters_that_are_off_leave_the_rows_out(folder, tokenizer):
    model, batch = prepared(folder, tokenizer), torch.arange(2, 18).view(2, 8)
    batch[:, 3] = tokenizer.convert_tokens_to_ids(TOKENS[0])
    use_token_rows(model)
    base = CausalLMLoss(fresh(folder), torch.float32).sequence_sums(input_ids=batch, labels=batch)
    objective = CausalLMLoss(model, torch.float32)
    with torch.no_grad():
        delta_of(model).add_(1.0)
    assert not torch.allclose(objective.sequence_sums(input_ids=batch, labels=batch), base, rtol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(objective.sequence_sums(input_ids=batch, labels=batch), base)


def test_the_plan_counts_the_rows_and_what_they_cost(folder, tokenizer):
    model, shape = prepared(folder, tokenizer), shape_of(fresh(folder))
    config = load_config([], {"lora.rank": 4, "lora.dropout": 0.0, "lora.train_tokens": ",".join(TOKENS)})
    assert adapter_parameters(shape, config) == count_parameters(model)[0]
    batch, seen = torch.arange(2, 66).view(2, 32), Sizes()
    use_token_rows(model)
    objective = CausalLMLoss(model, torch.float32)
    objective.logit_chunk = 4
    with seen:
        objective(input_ids=batch, labels=batch).backward()
    table = shape.vocabulary * shape.hidden
    assert 2 * table * seen.sizes.count(table) == token_rows_bytes(shape, config)  # copies; two bytes a number
    assert max(seen.sizes) <= table  # nowhere are the logits of all 64 positions


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of each new tensor."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, given = func(*args, **(kwargs or {})), {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        for x in [out] if torch.is_tensor(out) else out if isinstance(out, tuple) else ():
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.sizes.append(x.numel())
        return out


def test_rows_are_saved_loaded_by_plain_peft_and_merged(folder, tokenizer, tmp_path):
    model = prepared(folder, tokenizer)
    with torch.no_grad():
        delta_of(model).add_(torch.randn(delta_of(model).shape))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    asked = [*tokenizer.convert_tokens_to_ids(list(TOKENS)), 5, 6, 7]
    expected = logits_on(model, asked)
    assert not torch.allclose(expected, logits_on(fresh(folder), asked), atol=0.1)
    assert torch.equal(logits_on(PeftModel.from_pretrained(fresh(folder), tmp_path), asked), expected)
    both = load_adapter(fresh(folder), tmp_path)
    assert torch.equal(logits_on(both, asked), expected)
    assert "rows of the embedding" in (obstacle(both.get_base_model()) or "")
    merged = merge_adapter(both, torch.float32)
    torch.testing.assert_close(logits_on(merged, asked), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_on(again, asked), expected, rtol=1e-4, atol=1e-4)


def test_no_graph_can_hold_them(folder, tokenizer):
    with pytest.raises(ConfigError, match="cuda_graphs: cannot be on here: the rows of lora.train_tokens"):
        choose_fast_path(
            PerformanceConfig(cuda_graphs="on"), prepared(folder, tokenizer), torch.bfloat16, torch.device("cuda")
        )


@pytest.mark.parametrize("text, count", [("hello world", r"\d+"), ("<|nothing|>", r"\d+")])
def test_a_text_that_is_no_single_token_is_named(tokenizer, text, count):
    said = f"lora.train_tokens: expected texts that are one token of the tokenizer, got '.*', which is {count}"
    with pytest.raises(ConfigError, match=said):
        with_tokens(create_lora_config(), [TOKENS[0], text], tokenizer)


def test_how_they_are_written():
    for text in ("<|im_start|>,<|im_end|>", "[<|im_start|>, <|im_end|>]", '["<|im_start|>", "<|im_end|>"]'):
        assert load_config([], {"lora.train_tokens": text}).lora.train_tokens == TOKENS
    assert load_config([], {"lora.train_tokens": "<|im_start|>"}).lora.train_tokens == TOKENS[:1]
    assert Config().lora.train_tokens is None
    with pytest.raises(ConfigError, match="lora.train_tokens: expected null with lora.init_adapter"):
        load_config([], {"lora.train_tokens": "<s>", "lora.init_adapter": "somewhere"})
    lora = load_config([], {"lora.train_tokens": "<s>", "lora.target_modules": "q_proj"}).lora
    assert targets_text(lora) == "q_proj, and the embedding rows of [<s>]"


def test_a_resumed_run_trains_the_rows_to_the_same_bits(tiny_model, tmp_path):
    data = tmp_path / "few.txt"
    data.write_text(
        "\n\n".join(f"{TOKENS[0]}user number {i}{TOKENS[1]} and so on" for i in range(60)), encoding="utf-8"
    )
    flags = ["--model_name", tiny_model, "--dataset", data, "--max_length", 32, "--batch_size", 2, "--save_steps", 1]
    flags += ["--gradient_accumulation_steps", 1, "--rank", 4, "--compute_dtype", "float32", "--optim", "adamw_torch"]
    flags += ["--train_tokens", ",".join(TOKENS), "--learning_rate", 0.01, "--lr_scheduler", "constant"]

    def run(name, *more):
        words = ["--config", train_qlora.__file__.replace("train_qlora.py", "tiny/config.yaml"), *flags, *more]
        assert train_qlora.main([*map(str, words), "--output_dir", str(tmp_path / name)]) == 0
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    whole = run("whole", "--max_steps", 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3")
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()
    assert run("parts", "--max_steps", 3) == whole
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    before = load_file(tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors")[rows]
    assert not torch.equal(load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")[rows], before)
    saved = json.loads((tmp_path / "whole" / "adapter_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    assert saved["trainable_token_indices"] == sorted(tokenizer.convert_tokens_to_ids(list(TOKENS)))
