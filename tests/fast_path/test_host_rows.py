"""The rows of an untied embedding in main memory: where loading puts them, and that nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_qlora
from config import ConfigError, load_config
from fast_path import host_rows
from fast_path.host_rows import as_tensor_of, loading_to_main_memory, pinned_copy, rows_name
from quantization_utils import create_bnb_config, load_base, load_model_and_tokenizer
from toolkit import memory, memory_plan
from toolkit.merge import plain_copy
from toolkit.model_shape import model_shape
from toolkit.resume import fingerprint

TABLE = "model.embed_tokens.weight"


def load(folder, **how):
    return load_model_and_tokenizer(str(folder), create_bnb_config(), **how)[0]


def test_only_an_embedding_that_is_not_tied_has_rows_to_move(random_models):
    assert rows_name(load(random_models("llama"))) == TABLE
    assert rows_name(load(random_models("qwen2"))) == ""


def test_loading_leaves_the_embedding_alone_in_main_memory(random_models):
    """The device `meta`, which holds nothing, stands for the GPU."""
    file = load_file(random_models("llama") / "model.safetensors")
    with loading_to_main_memory(TABLE):
        model = AutoModelForCausalLM.from_pretrained(random_models("llama"), device_map={"": "meta"})
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert places.pop(TABLE) == "cpu" and set(places.values()) == {"meta"}
    assert torch.equal(model.get_input_embeddings().weight, file[TABLE])
    model = AutoModelForCausalLM.from_pretrained(random_models("llama"), device_map={"": "meta"})
    assert model.get_input_embeddings().weight.device.type == "meta"


def test_a_run_with_the_embedding_apart_is_the_same_bit_for_bit(random_models, train, monkeypatch, tmp_path):
    """Trained tokens among its rows, evaluated, stopped after two steps and resumed."""
    flags = ["--model_name", random_models("llama"), "--train_tokens", "[the]", "--save_steps", 2, "--eval_steps", 1]
    code, told = train(*flags, output_dir=tmp_path / "told")
    assert code == 0
    copies, real = [], host_rows.pinned_copy
    monkeypatch.setattr(host_rows, "pinned_copy", lambda *a: copies.append(real(*a)) or copies[-1])
    monkeypatch.setattr(train_qlora, "load_base", lambda *a, **how: load_base(*a, **{**how, "rows_apart": True}))
    folder = tmp_path / "apart"
    assert train(*flags, "--max_steps", 2, output_dir=folder)[0] == 0
    assert train(*flags, output_dir=folder)[0] == 0 and len(copies) == 2
    a, b = (load_file(each / "adapter_model.safetensors") for each in (told, folder))
    assert any("embed_tokens" in name for name in a) and all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [row for row in (each / "metrics.jsonl").read_text().splitlines() if "eval_loss" in row]
        for each in (told, folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_too_little_main_memory_is_said_in_a_line(monkeypatch):
    def refuse(*args, **how):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host_rows, "registered", refuse)
    monkeypatch.setattr(torch, "empty_like", refuse)
    with pytest.raises(ConfigError, match="auto_fit: the input embedding .* does not fit into pinned main memory"):
        pinned_copy(torch.zeros(2**20, dtype=torch.uint8), torch.device("cuda"))


def test_a_gpu_that_reads_other_rows_is_said_in_a_line(random_models, monkeypatch):
    monkeypatch.setattr(host_rows, "as_tensor_of", lambda buffer, device: torch.zeros_like(buffer))
    with pytest.raises(ConfigError, match="auto_fit: this GPU does not read the input embedding from main memory"):
        load(random_models("llama"), rows_apart=True)


def test_the_plan_moves_an_embedding_only_where_nothing_else_fits(random_models):
    shape, config = model_shape(str(random_models("llama"))), load_config([], {"data.max_length": "128"})
    here, apart = (memory_plan.plan_memory(shape, config, 1, 2, rows_apart=way) for way in (False, True))
    assert here.total - apart.total == apart.rows_apart == 2 * shape.rows > 0 and apart.parts["head"] == 2 * shape.rows
    fits = memory_plan.fit(shape, config, 1, here.total, memory_plan.Rates())
    moved = memory_plan.fit(shape, config, 1, apart.total, memory_plan.Rates())
    assert fits.rows_apart == 0 and moved.rows_apart and moved.total <= apart.total
    assert "the embedding in main memory" in moved.shape and moved.saved()["rows_apart"] is True
    resumed = memory.choose_plan(shape, config, 1, None, here.total, moved.saved())
    assert resumed.rows_apart and resumed.shape == moved.shape


# ------------------------------------------------------------------------------------------------ on a GPU


def micro_steps(folder, apart: bool, tokens: str) -> tuple[list[torch.Tensor], dict[str, str], torch.Tensor]:
    """Return losses, gradients and an evaluation's sums of captured steps, the run's fingerprint, and the embedding."""
    config = load_config([], {"model.name": str(folder), "data.max_length": "128", "lora.train_tokens": tokens})
    model, tokenizer = load_base(config, torch.device("cuda"), rows_apart=apart)
    table = dict(plain_copy(model).named_parameters())[TABLE]  # before peft puts its layers into the model
    plan = memory_plan.unplanned(config, 2, 2)
    learner = train_qlora.build_learner(config, model, plan, lambda line: None, tokenizer=tokenizer)
    learner.reshape(2, 2, False)
    learner.train()
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(3):
        ids = torch.randint(4096, (2, 128), generator=generator).cuda()
        found.append(learner.micro_step(step, torch.arange(2), {"input_ids": ids, "labels": ids}).clone())
    found += [parameter.grad.clone() for parameter in learner.parameters]
    learner.eval()
    found.append(learner.evaluation_sums(input_ids=ids, labels=ids).clone())
    assert learner.fast.cuda_graphs == (tokens == "null"), learner.fast.line
    prints = fingerprint(learner.model, tokenizer, {})
    return found, prints, table


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which reads main memory itself")
def test_a_gpu_reads_rows_from_main_memory(random_models):
    before = torch.cuda.memory_allocated()
    values = torch.randn(5000, 256).bfloat16()
    rows = as_tensor_of(pinned_copy(values.flatten().view(torch.uint8), torch.device("cuda")), torch.device("cuda"))
    rows = rows.view(torch.bfloat16).view(values.shape)
    assert torch.cuda.memory_allocated() == before and rows.is_cuda
    ids = torch.tensor([[0, 4999, 7]], device="cuda")
    assert torch.equal(F.embedding(ids, rows).cpu(), values[[0, 4999, 7]][None])
    assert torch.equal(rows.cpu(), values) and torch.equal(rows[3:9].float().cpu(), values[3:9].float())
    for tokens in ("null", "[the]"):
        told, apart = (micro_steps(random_models("llama"), apart, tokens) for apart in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(told[0], apart[0], strict=True))
        assert told[1] == apart[1] and torch.equal(told[2], apart[2])
