"""lora.init_adapter: what a run takes from the adapter that it goes on from, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train_qlora
from config import FROM_ADAPTER, ConfigError, load_config
from quantization_utils import load_base
from toolkit.adapters import start_from_adapter
from toolkit.evaluation import mean_loss
from toolkit.start_adapter import with_start_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes an adapter with peft alone; its B is not zero, so that it changes the model."""

    def make(name: str = "start", dtype: torch.dtype = torch.float32, **settings: object) -> Path:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        own = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(base, LoraConfig(**(own | settings)))
        for name_, parameter in model.named_parameters():
            if "lora_B" in name_:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / WEIGHTS
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"})
        return tmp_path / name

    return make


def config_of(tiny_model: Path, folder: Path, **flags: object) -> object:
    return load_config((), {"model.name": str(tiny_model), "lora.init_adapter": str(folder)} | flags)


# ------------------------------------------------------------------------------------------------ what is taken


def test_rank_alpha_targets_and_kind_come_from_the_adapter(make: Callable, tiny_model: Path) -> None:
    lora = with_start_adapter(config_of(tiny_model, make(use_rslora=True)), True).lora
    assert (lora.rank, lora.alpha, sorted(lora.target_modules)) == (4, 12.0, ["down_proj", "q_proj"])
    assert lora.use_rslora and not lora.use_dora and lora.dropout == 0.05  # dropout belongs to training
    by_pattern = make("pattern", target_modules=r".*layers\.[01]\.self_attn\.v_proj")
    found = with_start_adapter(config_of(tiny_model, by_pattern), True).lora.target_modules
    assert sorted(found) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"target_modules": "all-linear"}, torch.bfloat16),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}}, torch.float16),
        ({"target_modules": r".*\.(k_proj|up_proj)", "layers_to_transform": None}, torch.float32),
        ({"layers_to_transform": [0, 2], "use_rslora": True}, torch.float32),
        ({"use_dora": True}, torch.float32),
    ],
    ids=["plain", "all-linear", "patterns", "regex", "some layers", "dora"],
)
def test_the_model_that_is_trained_is_peft_s_own(
    settings: dict, dtype: torch.dtype, make: Callable, tiny_model: Path
) -> None:
    folder = make(dtype=dtype, **settings)
    flags = {"quantization.load_in_4bit": False, "quantization.compute_dtype": "float32"}
    config = with_start_adapter(config_of(tiny_model, folder, **flags), True)
    base, _ = load_base(config, torch.device("cpu"))
    lines: list[str] = []
    model = start_from_adapter(base, config, 2, lines.append)
    assert len(lines) == 1 and f"starting from the adapter in {folder} (rank 4, alpha 12)" in lines[0]
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model).float(), folder, is_trainable=True
    )
    expected = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys() and all("lora_" in name for name in trained)
    assert all(p.dtype is torch.float32 and torch.equal(p, expected[n]) for n, p in trained.items())
    assert {m.p for n, m in model.named_modules() if n.endswith("lora_dropout.default")} == {0.05}
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(model.eval()(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_starts_where_the_adapter_is_and_compares_base_start_and_end(
    train: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code, first = train("--rank", 4, "--alpha", 8, "--dropout", 0, output_dir=tmp_path / "first")
    assert code == 0
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["eval_loss"] for row in (r for r in rows if "eval_loss" in r))
    capfd.readouterr()
    # A rate of almost nothing: the adapter that is written is the one that it started from.
    flags = ["--init_adapter", first, "--learning_rate", 1e-30, "--dropout", 0]
    code, second = train(*flags, output_dir=tmp_path / "second")
    assert code == 0
    found, expected = load_file(second / WEIGHTS), load_file(first / WEIGHTS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    out = capfd.readouterr().out
    assert f"base: validation loss {before:.4f}" in out and f"step 0: validation loss {after:.4f}" in out
    noted = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()][0]
    assert noted["base_loss"] == before and noted["eval_loss"] == after
    assert "of the base" in out and "at the start" in out and "adapter - start: loss +0.0000" in out
    config = load_config(second / "config.yaml")
    assert (config.lora.rank, config.lora.alpha, config.lora.init_adapter) == (4, 8.0, str(first))
    assert "with the adapter in" in (second / "README.md").read_text(encoding="utf-8")
    # its evaluation needs no folder of the start, and no copy of the adapter names one
    shutil.rmtree(first)
    assert train_qlora.main(["--evaluate", "--adapter", str(second)]) == 0
    assert "lora.init_adapter" not in FROM_ADAPTER


def test_a_resumed_run_ends_as_an_uninterrupted_one(train: Callable, tmp_path: Path) -> None:
    _, first = train("--rank", 4, "--alpha", 8, output_dir=tmp_path / "first")
    flags = ["--init_adapter", first, "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 9]
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint-4")
    assert train(*flags, output_dir=parts)[0] == 0
    found, expected = load_file(parts / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    start = load_file(first / WEIGHTS)
    assert any(not torch.equal(expected[name], start[name]) for name in start)
    state = train_qlora.find_checkpoint(load_config(parts / "config.yaml").training, False, print)[2]
    assert sorted(state["held_out"]) == ["adapter", "base", "start"]
    assert mean_loss(state["held_out"]["start"]) < mean_loss(state["held_out"]["base"])


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"lora.rank": 8}, r"lora.rank: expected 4 as in lora.init_adapter .*, got 8; leave this flag out"),
        ({"lora.alpha": 8.0}, r"lora.alpha: expected 12.0 .* got 8.0"),
        ({"lora.target_modules": ["q_proj"]}, r"lora.target_modules: expected \[.*down_proj.*\] .* got \[q_proj\]"),
        ({"lora.target_modules": "all-linear"}, r"lora.target_modules: .* got all-linear"),
        ({"lora.use_dora": True}, r"lora.use_dora: expected false .* got true"),
    ],
)
def test_a_contradicting_flag_is_refused(flags: dict, problem: str, make: Callable, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{problem}"):
        with_start_adapter(config_of(tiny_model, make(), **flags), True)


def test_an_agreeing_flag_and_other_values_in_a_file_are_not(make: Callable, tiny_model: Path, tmp_path: Path) -> None:
    flags = {"lora.rank": 4, "lora.target_modules": ["down_proj", "q_proj"], "lora.dropout": 0.3}
    assert with_start_adapter(config_of(tiny_model, make(), **flags), True).lora.dropout == 0.3
    (tmp_path / "c.yaml").write_text("lora: {rank: 64, init_adapter: start}\n")  # found beside the file
    config = with_start_adapter(load_config(tmp_path / "c.yaml"), True)
    assert config.lora.rank == 4 and config.lora.init_adapter == str(tmp_path / "start")


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"modules_to_save": ["lm_head"]}, "which has modules_to_save, with which training cannot go on"),
        ({"bias": "all"}, "has bias: all, with which training cannot go on"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "which has layer_replication, with which training cannot go on"),
        ({"peft_type": "IA3"}, "peft_type: expected LORA"),
        ({"r": 10**9}, "r: expected an integer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .* goes with a changed base"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_refused(
    changes: dict, problem: str, make: Callable, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^lora.init_adapter: .*{problem}"):
        with_start_adapter(config_of(tiny_model, edited(make(), **changes)), True)


def test_a_missing_adapter_and_one_in_the_output_folder_are_refused(
    make: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^lora.init_adapter: expected an adapter's folder, got .*nowhere"):
        with_start_adapter(config_of(tiny_model, tmp_path / "nowhere"), True)
    folder = make()
    for name in (folder, shutil.copytree(folder, folder / "checkpoint-2")):
        config = config_of(tiny_model, name, **{"training.output_dir": str(folder)})
        with pytest.raises(ConfigError, match=r"^training.output_dir: .* holds the adapter of lora.init_adapter"):
            with_start_adapter(config, True)
        assert with_start_adapter(config, False).lora.rank == 4  # a plan writes nothing
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"^lora.init_adapter: no adapter_model.safetensors in"):
        with_start_adapter(config_of(tiny_model, folder), True)


def test_weights_go_through_the_checks_of_hostile_adapters(make: Callable, tiny_model: Path) -> None:
    folder = make()
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    config = with_start_adapter(config_of(tiny_model, folder), True)
    base, _ = load_base(config, torch.device("cpu"))
    for changed, problem in (
        (tensors | {name: tensors[name] * float("nan")}, "expected finite numbers"),
        ({key: value for key, value in tensors.items() if key != name}, "only the model has"),
        (tensors | {"odd": torch.zeros(2)}, "only the adapter has odd"),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ConfigError, match=f"^lora.init_adapter: .*{problem}"):
            start_from_adapter(base, config, 0, print)


def test_evaluate_takes_no_start(make: Callable, run_cli: Callable, tmp_path: Path) -> None:
    folder = make()
    done = run_cli("train_qlora.py", "--evaluate", "--init_adapter", folder)
    assert done.returncode == 2 and done.stderr == (
        "error: lora.init_adapter: is for training; --evaluate takes an adapter as --adapter\n"
    )
    done = run_cli("train_qlora.py", "--adapter", folder)
    assert done.returncode == 2 and "to go on from an adapter, use --init_adapter" in done.stderr
    flags = (
        "--config",
        train_qlora.Path(train_qlora.__file__).parent / "tiny" / "config.yaml",
        "--init_adapter",
        folder,
    )
    done = run_cli("train_qlora.py", *flags, "--plan")
    # rank 4 on four q_proj (256 to 256) and down_proj (704 to 256)
    assert done.returncode == 0 and f"trainable {4 * 4 * (256 + 256 + 704 + 256):,}," in done.stdout
    assert not (tmp_path / "output_tiny").exists()
