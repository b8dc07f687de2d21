"""A user's mistakes through the real entry point: exit code 2, a line a problem on stderr, and nothing written."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from config import load_config
from toolkit.local_paths import DATA_FILES, missing_data

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny" / "config.yaml"


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def said(stderr: str) -> list[str]:
    """Return the problems that a script reported; anything else on stderr fails the test."""
    lines = stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), stderr
    assert all(len(line) < 700 for line in lines), stderr
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture
def refused(train, tmp_path, monkeypatch, capfd) -> Callable[..., list[str]]:
    """A function that trains with flags that must be refused and returns the problems; the disk may not change."""

    def run(*flags: object, output_dir: Path | None = None) -> list[str]:
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        before = listing(tmp_path)
        capfd.readouterr()
        code, _ = train(*flags, output_dir=output_dir)
        problems = said(capfd.readouterr().err)
        assert code == 2
        assert listing(tmp_path) == before
        return problems

    return run


# ----------------------------------------------------------------------------------------------- flags and config files


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rnak", "8"], ["--rnak: unknown flag; did you mean --rank?"]),
        (["--rank"], ["argument --lora.rank/--rank: expected one argument"]),
        (["extra"], ["unexpected argument: extra"]),
        (["--rank", "eight"], ["lora.rank: expected an integer >= 1 and <= 16384, got 'eight'"]),
        (["--rank", "0"], ["lora.rank: expected an integer >= 1 and <= 16384, got 0"]),
        (["--seed", "true"], ["training.seed: expected an integer"]),
        (
            ["--rank", "0", "--top_p", "2", "--quant_type", "int8"],
            ["lora.rank", "generation.top_p", "quantization.quant_type: expected one of nf4, fp4"],
        ),
        (["--config", "nowhere.yaml"], ["--config: no such file: nowhere.yaml"]),
        (["--adapter", "somewhere"], ["--adapter: goes with --evaluate"]),
        (["--use_dora", "true", "--fused_lora", "on"], ["performance.fused_lora"]),
    ],
)
def test_flags(refused, flags, expected):
    problems = refused(*flags)
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def test_config_file(refused, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lora: {rnak: 8, rank: x}\ntrainin: {}\n", encoding="utf-8")
    assert [p.split(":")[0] for p in refused("--config", path)] == ["lora.rnak", "lora.rank", "trainin"]
    path.write_bytes("lora: {rank: 8}  # größer\n".encode("utf-16"))
    expected = f"--config: cannot read {path}: line 1 is not UTF-8: it looks like UTF-16; save the file as UTF-8"
    assert refused("--config", path) == [expected]


# ------------------------------------------------------------------------------------------------ data


def table(**columns: list) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


ROWS = "".join(json.dumps({"text": f"row {i} of some text", "n": i}) + "\n" for i in range(50))

DATA = {  # name of the file: content, what is said
    "empty.txt": ("", r"has no (rows|text)"),
    "blank.txt": ("\n  \n\t\n", r"no text"),
    "empty.jsonl": ("", r"has no (rows|text)"),
    "newline.jsonl": ("\n\n", r"has no (rows|text)"),
    "empty.json": ("[]", r"has no (rows|text)"),
    "empty.csv": ("", r"has no (rows|text)"),
    "header.csv": ("text,n\n", r"has no (rows|text)"),
    "empty.parquet": (table(text=pa.array([], pa.string())), r"has no (rows|text)"),
    "blank.jsonl": ('{"text": " "}\n{"text": null}\n', r"no text"),
    "short.txt": ("ab\n", r"too short"),
    "column.jsonl": (
        ROWS.replace('"text"', '"body"'),
        r"data\.text_column: no column 'text' in .*; it has body, n",
    ),
    "column.csv": ("body,n\na,1\n", r"data\.text_column: no column 'text' in .*; it has body, n"),
    "number.jsonl": (
        '{"text": "a"}\n{"text": 5}\n',
        r"data\.text_column: expected text in column 'text', got 5 in row 2",
    ),
    "list.jsonl": ('{"text": ["a", "b"]}\n', r"data\.text_column: expected text in column 'text', got "),
    "dict.jsonl": ('{"text": {"a": "b"}}\n', r"data\.text_column: expected text in column 'text', got "),
    "number.parquet": (
        table(text=[1.5, 2.5]),
        r"data\.text_column: expected text in column 'text', got double|float64",
    ),
    "truncated.json": (json.dumps([{"text": "a"}] * 20)[:-30], r"cannot read"),
    "truncated.jsonl": (ROWS[:-20], r"cannot read"),
    "text.json": ("this is no JSON at all", r"cannot read"),
    "number.json": ("5", r"cannot read"),
    "ragged.csv": ("text,n\na,1\nb,2,3,4,5\n", r"cannot read"),
    "quote.csv": ('text,n\n"never closed,1\nb,2\n', r"cannot read"),
    "garbage.parquet": ("this is no parquet file, whatever its name says", r"cannot read"),
    "latin.txt": ("größer\n".encode("latin-1") * 20, r"cannot read .*(utf-8|UTF)"),
    "latin.csv": ("text\ngrößer\n".encode("latin-1"), r"cannot read .*(utf-8|UTF)"),
    "latin.jsonl": ('{"text": "größer"}\n'.encode("latin-1"), r"latin\.jsonl.* UTF-8"),
    "utf16.txt": ("some text\n".encode("utf-16"), r"cannot read .*(utf-8|UTF)"),
    "letter.docx": ("text", r"expected one of \.txt, \.csv, \.tsv, \.json, \.jsonl, \.parquet, \.csv\.gz"),
    "no_ending": ("text", r"expected one of \.txt"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_file(refused, tmp_path, name):
    content, expected = DATA[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (problem,) = refused("--dataset", path)
    assert problem.startswith("data.")
    assert name in problem or "text_column" in problem or "too short" in problem
    assert re.search(expected, problem)


def test_truncated_parquet(refused, tmp_path):
    path = tmp_path / "rows.parquet"
    table(text=["some text"] * 500)(path)
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = refused("--dataset", path)
    assert problem.startswith(f"data.dataset: cannot read {path}")


MISSING = ["none.txt", "none/", "./none", "/none/of/these", "data\\none.jsonl", "none.parquet", "a/b.CSV", "none.json"]


@pytest.mark.parametrize("name", MISSING)
def test_missing_data(refused, name):
    assert refused("--dataset", name) == [f"data.dataset: no such file or folder: {name}"]


@pytest.mark.parametrize("name", MISSING)
def test_missing_data_is_said_alike_by_who_loads_it(name):
    """From a notebook prepare_dataset may be called without the command line."""
    from config import ConfigError, DataConfig
    from toolkit.data_files import load_rows

    with pytest.raises(ConfigError) as caught:
        load_rows(DataConfig(dataset=name))
    assert list(caught.value.problems) == missing_data(name)


def test_a_plan_needs_no_data_and_an_evaluation_no_output_dir(train, tmp_path):
    from train_qlora import parse

    assert train("--plan", "--dataset", "none.txt")[0] == 0
    (tmp_path / "file").touch()
    parse(["--config", str(TINY), "--evaluate", "--output_dir", str(tmp_path / "file")])


def test_folders_of_data(refused, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert refused("--dataset", folder) == [
        f"data.dataset: expected files of one kind ({', '.join(DATA_FILES)}) in {folder}, got none"
    ]
    (folder / "README.md").write_text("no data", encoding="utf-8")
    assert "got none" in refused("--dataset", folder)[0]
    (folder / "a.txt").write_text("text\n", encoding="utf-8")
    (folder / "b.csv").write_text("text\na\n", encoding="utf-8")
    assert refused("--dataset", folder)[0].endswith(f"in {folder}, got a mixture of .csv, .txt")


def test_data_that_the_hub_does_not_give(refused):
    for name in ("nobody/no-such-data", "wikitext"):
        (problem,) = refused("--dataset", name)
        assert problem.startswith(f"data.dataset: cannot get {name} from the hub")
        assert all(way in problem for way in ("local file or folder", "HF_HOME", "tiny/config.yaml"))


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_model_folder_that_is_not_there(refused):
    for name in ("./none", "/none/of/these", "a/b/c"):
        assert refused("--model_name", name) == [f"model.name: no such folder: {name}"]


def test_model_that_the_hub_does_not_give(refused):
    (problem,) = refused("--model_name", "nobody/no-such-model")
    assert problem.startswith("model.name: cannot get nobody/no-such-model from the hub")
    assert all(way in problem for way in ("local folder", "HF_HOME", "tiny/config.yaml"))


def test_model_that_is_a_file(refused, model):
    (problem,) = refused("--model_name", model / "config.json")
    assert problem.startswith("model.name: ")


def test_model_without_weights(refused, model):
    (model / "model.safetensors").unlink()
    expected = f"model.name: {model} has no safetensors weights"
    assert refused("--model_name", model) == [expected]
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")
    assert refused("--model_name", model) == [f"{expected} (pickled weights are not loaded)"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"not what it says" * 10)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def listed(path: Path) -> None:
    path.write_bytes(b"[]")  # sound JSON of another kind


@pytest.mark.parametrize("damage", [cut, garble, empty, listed])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_model(refused, model, name, damage):
    damage(model / name)
    (problem,) = refused("--model_name", model)
    if name == "model.safetensors":
        what = {cut: "is truncated: it has", empty: "is empty"}.get(
            damage, "is damaged: it does not begin as a safetensors file"
        )
        assert problem.startswith(f"model.name: {name} of {model} {what}") and problem.endswith("fetch this file again")
    else:
        assert problem.startswith("model.name: cannot ")
    assert str(model) in problem


def test_model_of_which_a_part_is_missing(refused, model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weights = {f"layer.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weights}), encoding="utf-8"
    )
    (problem,) = refused("--model_name", model)
    lost = "model-00002-of-00002.safetensors"
    assert problem.startswith(f"model.name: {lost} of {model} is missing, though model.safetensors.index.json names it")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_incomplete_model(refused, model, name):
    (model / name).unlink()
    (problem,) = refused("--model_name", model)
    assert problem.startswith("model.name: ")
    assert str(model) in problem


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unheard-of"},
        {"architectures": ["BertModel"], "model_type": "bert"},  # not a causal language model's weights
        {"hidden_size": 128},  # weights of another shape
        {"num_hidden_layers": 9},  # and only 4 layer_types
        {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5},  # a layer that has no weights
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_model_whose_config_does_not_fit(refused, model, change):
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    (problem,) = refused("--model_name", model)
    assert problem.startswith("model.name: ")
    assert str(model) in problem


def test_planning_for_what_is_not_there(refused, model):
    assert refused("--plan", "--model_name", "./none") == ["model.name: no such folder: ./none"]
    assert refused("--plan", "--model_name", "nobody/no-such-model")[0].startswith("model.name: cannot get")
    assert refused("--plan", "--target_modules", "[query]")[0].startswith("lora.target_modules: ")
    cut(model / "config.json")
    assert refused("--plan", "--model_name", model)[0].startswith(f"model.name: cannot load {model}")


def test_target_modules_that_the_model_has_not(refused):
    (problem,) = refused("--target_modules", "[q_proj, query, c_attn]")
    assert problem == (
        "lora.target_modules: the model has no c_attn, query; its own are "
        "--target_modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    )


@pytest.mark.parametrize("target", ["layers", "act_fn", "norm"])
def test_target_modules_that_are_no_linear_layers(refused, target):
    (problem,) = refused("--target_modules", f"[{target}]")
    assert problem.startswith("lora.target_modules: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the default model may run")
def test_the_default_model_without_a_gpu(refused):
    for flags in ((), ("--evaluate",)):
        (problem,) = refused("--model_name", "Qwen/Qwen2.5-3B-Instruct", *flags)
        assert problem.startswith("model.name: Qwen/Qwen2.5-3B-Instruct needs a GPU")
        assert re.search(r"one optimizer step would take about [\d.]+ (hours|minutes)", problem)
        assert "tiny/config.yaml" in problem
        if torch.version.cuda is None:
            assert "CPU-only" in problem
            assert "--index-url" in problem


# ------------------------------------------------------------------------------------------------ adapters


def test_evaluate_without_an_adapter_there(refused, tmp_path, tiny_model):
    folder = tmp_path / "none"
    assert refused("--evaluate", "--adapter", folder) == [f"--adapter: no adapter_config.json in {folder}"]
    assert refused("--evaluate", "--adapter", tiny_model)[0].startswith("--adapter: no adapter_config.json in")


def test_evaluate_with_nothing_held_out(refused):
    assert refused("--evaluate", "--validation_fraction", 0) == [
        "data.validation_fraction: nothing is held out to evaluate on"
    ]


def test_evaluate_with_an_adapter_that_does_not_fit(refused, train, tmp_path, random_models):
    code, adapter = train("--target_modules", "[q_proj]", output_dir=tmp_path / "finished")
    assert code == 0
    (problem,) = refused("--evaluate", "--adapter", adapter, "--model_name", random_models("mistral"))
    assert problem.startswith(f"--adapter: {adapter} does not fit")
    settings = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    changed = json.dumps(json.loads(settings) | {"r": 9})
    (adapter / "adapter_config.json").write_text(changed, encoding="utf-8")
    (problem,) = refused("--evaluate", "--adapter", adapter)
    rank = json.loads(settings)["r"]
    assert f"lora_A.default.weight is [{rank}, " in problem
    assert problem.endswith("] by adapter_config.json (r: 9) and the model")
    (adapter / "adapter_config.json").write_text(settings, encoding="utf-8")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights[:1000])
    (problem,) = refused("--evaluate", "--adapter", adapter)
    assert problem.startswith(f"--adapter: adapter_model.safetensors of {adapter} is truncated")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    assert "no adapter_model.safetensors" in refused("--evaluate", "--adapter", adapter)[0]
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    assert refused("--evaluate", "--adapter", adapter)[0].startswith("--adapter: ")


# ------------------------------------------------------------------------------------------- output folder and resuming


def test_output_dir_that_cannot_be_one(refused, tmp_path):
    (tmp_path / "file").touch()
    (problem,) = refused(output_dir=tmp_path / "file")
    assert problem == f"training.output_dir: expected a folder, got the file {tmp_path / 'file'}"
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        (problem,) = refused(output_dir=path)
        assert problem.startswith("training.output_dir: ")


def test_output_dir_may_be_the_current_folder(train, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train("--max_steps", 1, output_dir=Path("."))[0] == 0
    assert (tmp_path / "here" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write, root included")
def test_output_dir_in_an_unwritable_place(refused, tmp_path):
    (problem,) = refused(output_dir=Path("/proc/output"))
    assert problem.startswith("training.output_dir: cannot write in /proc")
    if os.getuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        (problem,) = refused(output_dir=locked / "output")
        assert problem.startswith(f"training.output_dir: cannot write in {locked}")


def test_finished_run(refused, train, tmp_path, capfd):
    code, finished = train(output_dir=tmp_path / "finished")
    assert code == 0
    rest = "choose another --output_dir, or use --overwrite to replace it"
    expected = f"training.output_dir: {finished} holds a finished run; {rest}"
    assert refused("--resume", "never", output_dir=finished) == [expected]
    for checkpoint in finished.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert refused(output_dir=finished) == [expected]
    assert train("--overwrite", output_dir=finished) == (0, finished)


CHANGES = {
    "lora.rank: was 16 in checkpoint-2, is 8 now": ("--rank", 8),
    "lora.target_modules: was [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] in checkpoint-2, "
    "is [q_proj] now": ("--target_modules", "q_proj"),
    "training.learning_rate: was 0.004 in checkpoint-2, is 0.001 now": ("--learning_rate", "1e-3"),
    "training.seed: was 42 in checkpoint-2, is 1 now": ("--seed", 1),
    "data.max_length: was 64 in checkpoint-2, is 32 now": ("--max_length", 32),
    "data.max_eval_samples: was null in checkpoint-2, is 5 now": ("--max_eval_samples", 5),
    "data.packing: was true in checkpoint-2, is false now": ("--packing", "false"),
    "training.batch_size x training.gradient_accumulation_steps: was 4 in checkpoint-2, is 8 now": ("--batch-size", 4),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_edited_and_run_again(refused, train, tmp_path, corpus, state):
    """One line, which names what was changed as itself and a remedy that works there: each is followed."""
    code, output = train("--max_steps", 2, output_dir=tmp_path / "run")
    assert code == 0
    if state == "unfinished":
        (output / "adapter_model.safetensors").unlink()
    rest = f"{output} holds {'a' if state == 'finished' else 'an'} {state} run: "
    rest += "choose another --output_dir, or use --overwrite to replace it"
    for line, flags in CHANGES.items():
        assert refused(*flags, output_dir=output) == [f"{line}; {rest}"]
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text(encoding="utf-8").upper() + "more", encoding="utf-8")
    line = f"data.dataset: was {corpus} in checkpoint-2, is {other} now"
    assert refused("--dataset", other, output_dir=output) == [f"{line}; {rest}"]
    two = [line for line in CHANGES if line.startswith("lora")]
    flags = [word for line in two for word in CHANGES[line]]
    assert refused(*flags, "--max_steps", 4, output_dir=output) == [f"{'; '.join(two)}; {rest}"]
    assert train(*flags, "--max_steps", 1, output_dir=tmp_path / "another")[0] == 0
    assert train(*flags, "--max_steps", 1, "--overwrite", output_dir=output)[0] == 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert train(*flags, "--max_steps", 1, output_dir=output)[0] == 0  # and the same again is no other run


def test_home_folder_of_output_dir_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("training: {output_dir: ~/runs/a}\n", encoding="utf-8")
    assert load_config(tmp_path / "own.yaml").training.output_dir == str(tmp_path / "runs" / "a")
    assert load_config((), {"training.output_dir": "~/b"}).training.output_dir == str(tmp_path / "b")


def test_edited_data_is_named_after_it_is_read(refused, train, tmp_path, corpus):
    """A file of the same name and size, whose content only the fingerprint tells apart."""
    data = tmp_path / "data.txt"
    data.write_text(corpus.read_text(encoding="utf-8"), encoding="utf-8")
    assert train("--dataset", data, "--max_steps", 1, output_dir=tmp_path / "run")[0] == 0
    data.write_text(data.read_text(encoding="utf-8").upper(), encoding="utf-8")
    rest = "holds a finished run: choose another --output_dir, or use --overwrite to replace it"
    expected = f"data.dataset: its content has changed since checkpoint-1 was written; {tmp_path / 'run'} {rest}"
    assert refused("--dataset", data, output_dir=tmp_path / "run") == [expected]


def test_edited_and_resumed_from_a_checkpoint_by_name(refused, train, tmp_path):
    """Another --output_dir alone would go on from the same checkpoint: the remedies say what to do with --resume."""
    _, output = train("--max_steps", 2, output_dir=tmp_path / "run")
    flags = ("--rank", 8, "--max_steps", 1)
    changed = "lora.rank: was 16 in checkpoint-2, is 8 now; "
    (problem,) = refused(*flags, "--resume", output / "checkpoint-2", output_dir=output)
    rest = "use --overwrite to replace it, or choose another --output_dir and set training.resume to auto"
    assert problem == f"{changed}{output} holds a finished run: {rest}"
    (problem,) = refused(*flags, "--resume", output / "checkpoint-2", output_dir=tmp_path / "new")
    assert problem == f"{changed}set training.resume to auto to start at step 0"
    assert train(*flags, output_dir=tmp_path / "new")[0] == 0
    expected = f"training.output_dir: {tmp_path / 'new'} holds a finished run; choose another --output_dir"
    assert refused("--resume", output / "checkpoint-2", output_dir=tmp_path / "new") == [expected]
    assert train(*flags, "--overwrite", "--resume", output / "checkpoint-2", output_dir=output)[0] == 0


def test_never_does_not_replace_an_unfinished_run(refused, train, tmp_path):
    _, output = train("--max_steps", 1, output_dir=tmp_path / "run")
    (output / "adapter_model.safetensors").unlink()
    (problem,) = refused("--resume", "never", output_dir=output)
    rest = "choose another --output_dir, or use --overwrite to replace it, or --resume auto to continue it"
    assert problem == f"training.output_dir: {output} holds an unfinished run; {rest}"
    assert (output / "checkpoint-1").is_dir()
    assert train("--max_steps", 1, "--resume", "never", "--overwrite", output_dir=output)[0] == 0


def test_never_in_the_current_folder_does_not_replace_a_finished_run(refused, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--max_steps", 1, output_dir=tmp_path / "here")[0] == 0
    (problem,) = refused("--resume", "never", output_dir=Path("."))
    assert problem.startswith("training.output_dir: . holds a finished run")


def test_an_edit_is_refused_before_torch_is_imported(run_cli, train, tmp_path, corpus):
    """The tutorial's way: the same command, config.yaml edited in between."""
    assert train("--max_steps", 1, output_dir=tmp_path / "run")[0] == 0
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')", encoding="utf-8")
    edited = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8").replace("rank: 16", "rank: 32")
    (tmp_path / "edited.yaml").write_text(edited, encoding="utf-8")
    result = run_cli("train_qlora.py", "--config", tmp_path / "edited.yaml", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and result.stdout == ""
    (problem,) = said(result.stderr)
    assert problem.startswith("lora.rank: was 16 in checkpoint-1, is 32 now; ")


def test_resume_from_a_folder_that_is_no_checkpoint(refused, train, tmp_path):
    (problem,) = refused("--resume", tmp_path / "none")
    expected = "expected auto, never or the folder of a checkpoint"
    assert problem == f"training.resume: cannot continue from {tmp_path / 'none'}: it does not exist; {expected}"
    _, output = train("--max_steps", 1, output_dir=tmp_path / "run")
    near = f"{expected}, such as {output / 'checkpoint-1'}"
    for wrong, what in ((output, "is no checkpoint"), (output / "checkpoint-99", "does not exist")):
        (problem,) = refused("--resume", wrong, output_dir=tmp_path / "new")
        assert problem == f"training.resume: cannot continue from {wrong}: it {what}; {near}"
    cut(output / "checkpoint-1" / "training_state.safetensors")
    (problem,) = refused("--resume", output / "checkpoint-1")
    assert "does not match its checksum" in problem


def test_one_of_a_thing_is_in_the_singular(train, tmp_path, capfd):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the words of a row " * 12}) + "\n", encoding="utf-8")
    flags = ("--max_steps", 1, "--batch_size", 1, "--gradient_accumulation_steps", 1, "--validation_fraction", 0)
    assert train(*flags, "--dataset", tmp_path / "one.jsonl", "--max_length", 256)[0] == 0
    out = capfd.readouterr().out
    assert "data: 1 row, 1 document, " in out and " tokens in 1 block of 256\n" in out
    assert "steps: 1 of 1 sequence; 1 per epoch (" in out
    assert not re.search(r"\b1 (rows|documents|blocks|sequences|optimizer steps|steps|tokens)\b", out)
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert "| training | 1 optimizer step of 1 sequence, " in card


# --------------------------------------------------------------------------------------------------- out of memory


def test_out_of_memory_says_what_was_being_done_and_what_is_left(train, monkeypatch, capfd):
    import train_qlora
    from toolkit import evaluation

    def full(*_, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "block_losses", full)
        assert train("--evaluate")[0] == 3
    assert said(capfd.readouterr().err) == [
        "out of GPU memory while evaluating: CUDA out of memory. Tried to allocate 2 GiB"
    ]
    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "load_base", full)
        assert train()[0] == 3
    assert said(capfd.readouterr().err)[0].startswith("out of GPU memory while loading: ")
    plain = train_qlora.training_step

    def full_at(number: int) -> Callable:
        return lambda run, step, *rest: full() if step == number else plain(run, step, *rest)

    for number, left in ((0, "there is no checkpoint yet"), (1, "checkpoint-1 is intact")):
        monkeypatch.setattr(train_qlora, "training_step", full_at(number))
        assert train("--save_steps", 1, "--overwrite")[0] == 3
        (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("error: ")]
        assert f"; {left}: CUDA out of memory" in line


# ----------------------------------------------------------------------------------------------- launchers and trackers


def test_tracker_that_is_unknown_or_not_installed(refused):
    (problem,) = refused("--report_to", "carrier-pigeon")
    assert problem.startswith("training.report_to: expected none or one of ")
    assert "tensorboard" in problem
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`log_with")  # two lines of accelerate's, with a path into site-packages
        (problem,) = refused("--report_to", "comet_ml")
    assert problem == "training.report_to: the package of comet_ml is not installed"


def test_product_of_batch_sizes_that_does_not_divide(monkeypatch):
    from config import ConfigError, TrainingConfig
    from train_qlora import sequences_per_step

    training = TrainingConfig(batch_size=3, gradient_accumulation_steps=5)
    assert sequences_per_step(training, 5) == 15
    with pytest.raises(ConfigError, match=r"expected a multiple of 2 processes, got 15"):
        sequences_per_step(training, 2)


# ------------------------------------------------------------------------------------------ the same as a child process


def child(
    run_cli, tmp_path: Path, *flags: object, env: dict[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Train in a child process that must be refused; nothing may appear in its folder."""
    here = tmp_path / "here"
    here.mkdir()
    result = run_cli(
        "train_qlora.py", "--config", TINY, "--output_dir", "output", *flags, cwd=here, env=env, fresh=fresh
    )
    assert result.returncode == 2, result.stderr
    assert listing(here) == {}
    return result


CHILDREN = {
    "flag": (["--rnak", "8"], "--rnak: unknown flag"),
    "config": (["--config", "nowhere.yaml"], "--config: no such file"),
    "data": (["--dataset", "nowhere.txt"], "data.dataset: no such file or folder: nowhere.txt"),
    "hub data": (["--dataset", "nobody/no-such-data"], "data.dataset: cannot get nobody/no-such-data from the hub"),
    "hub model": (["--model_name", "nobody/no-such-model"], "model.name: cannot get nobody/no-such-model from the hub"),
    "adapter": (["--evaluate", "--adapter", "nowhere"], "--adapter: no adapter_config.json in nowhere"),
    "tracker": (["--report_to", "carrier-pigeon"], "training.report_to: expected none or one of"),
}


@pytest.mark.parametrize("case", CHILDREN)
def test_a_child_says_one_line_and_nothing_else(run_cli, tmp_path, case):
    flags, expected = CHILDREN[case]
    (problem,) = said(child(run_cli, tmp_path, *flags).stderr)
    assert problem.startswith(expected)


def test_what_a_run_cannot_find_is_said_before_torch_is_imported(run_cli, tmp_path):
    """In one go, and by a Python in which importing torch is fatal."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')", encoding="utf-8")
    (tmp_path / "file").touch()
    result = child(
        run_cli,
        tmp_path,
        *("--dataset", "none/of/these", "--output_dir", tmp_path / "file", "--model_name", "./none"),
        env={"PYTHONPATH": str(tmp_path)},
        fresh=True,
    )
    assert said(result.stderr) == [
        "data.dataset: no such file or folder: none/of/these",
        "model.name: no such folder: ./none",
        f"training.output_dir: expected a folder, got the file {tmp_path / 'file'}",
    ]


def test_a_child_says_nothing_else_of_damaged_files(run_cli, tmp_path, model):
    cut(model / "model.safetensors")
    data = tmp_path / "rows.jsonl"
    data.write_text(ROWS[:-20], encoding="utf-8")
    here = tmp_path / "one"
    here.mkdir()
    (problem,) = said(child(run_cli, here, "--model_name", model).stderr)
    assert problem.startswith(f"model.name: model.safetensors of {model} is truncated")
    here = tmp_path / "two"
    here.mkdir()
    (problem,) = said(child(run_cli, here, "--dataset", data).stderr)
    assert problem.startswith(f"data.dataset: cannot read {data}")


def test_a_launch_that_announces_more_processes_than_there_are(run_cli, tmp_path):
    (problem,) = said(child(run_cli, tmp_path, env={"WORLD_SIZE": "2"}).stderr)
    assert "2 processes" in problem
    assert "torchrun --nproc_per_node 2" in problem


def test_a_console_in_cp950_does_not_crash(run_cli, tmp_path):
    path = tmp_path / "größer.txt"
    path.write_text("größer, 說中文 and 😀 in a text\n" * 40, encoding="utf-8")
    flags = ["--dataset", path, "--max_length", 64, "--max_steps", 1, "--output_dir", tmp_path / "output"]
    env = {"PYTHONIOENCODING": "cp950:strict", "PYTHONUTF8": "0"}
    result = run_cli("train_qlora.py", "--config", TINY, *flags, env=env)
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "output" / "training_log.txt").read_text(encoding="utf-8")
    assert "größer, 說中文 and 😀" in log


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("script", ["train_qlora", "inference_example"])
def test_output_that_nobody_reads_ends_without_a_word(script, buffered, monkeypatch, capfd):
    """As in `... | head`."""
    main = importlib.import_module(script).main
    read, write = os.pipe()
    os.close(read)
    answer = ["--adapter", "none", "--max_new_tokens", "2", "--mode", "text", "--prompt", "Hello"]
    with io.TextIOWrapper(os.fdopen(write, "wb", 4096 if buffered else 0), write_through=not buffered) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        code = main(["--config", str(TINY), *(["--plan"] if script == "train_qlora" else answer)])
    said = capfd.readouterr().err
    # A plan is said and done before anyone sees that it went nowhere; an answer is written as it comes.
    assert code == (0 if script == "train_qlora" and buffered else 1) and "rror" not in said and "Broken" not in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_a_disk_has_no_room_for_is_an_error(tmp_path):
    """Of a command that has no checkpoint to go on from."""
    command = [sys.executable, str(ROOT / "train_qlora.py"), "--config", str(TINY), "--plan"]
    for unbuffered, code in (("", 120), ("1", 1)):  # 120: Python's own, where the rest cannot be written as it ends
        with open("/dev/full", "w") as full:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
            )
        assert done.returncode == code and "No space left" in done.stderr and "checkpoint" not in done.stderr
