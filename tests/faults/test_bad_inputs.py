"""Bad inputs through the real entry point: a line each, exit code 2, nothing written and nothing lost."""

import datetime
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_utils
import train_qlora

ROOT = Path(__file__).resolve().parents[2]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its content; links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    return found


@pytest.fixture
def refused(train, tmp_path, monkeypatch, capfd) -> Callable[..., str]:
    """A function that trains with flags which must be refused and returns the one line that says why."""

    def run(*flags: object, **keywords: Path) -> str:
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        before = listing(tmp_path)
        capfd.readouterr()
        code, _ = train(*flags, **keywords)
        out, err = capfd.readouterr()
        assert code == 2, (code, out, err)
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700, err
        assert "Traceback" not in out and "error" not in out.lower(), out
        assert listing(tmp_path) == before
        return lines[0].removeprefix("error: ")

    return run


# ------------------------------------------------------------------------------------------------ flags

FLAGS = [
    ("--rank", "1.5", "lora.rank: expected an integer >= 1, got 1.5"),
    ("--rank", ".nan", "lora.rank: expected an integer >= 1"),
    ("--rank", "9" * 5000, "lora.rank: "),
    ("--rank", "[1", "lora.rank: expected an integer >= 1, got '[1'"),
    ("--rank", "", "lora.rank: "),
    ("--alpha", ".inf", "lora.alpha: expected a number > 0"),
    ("--alpha", "-1", "lora.alpha: expected a number > 0"),
    ("--lora.dropout", "1", "lora.dropout: expected a number >= 0 and < 1, got 1"),
    ("--learning_rate", "0", "training.learning_rate: expected a number > 0, got 0"),
    ("--learning_rate", "1e400", "training.learning_rate: "),
    ("--learning_rate", "2e-4x", "training.learning_rate: "),
    ("--max_length", "7", "data.max_length: expected an integer >= 8, got 7"),
    ("--batch_size", "0", "training.batch_size: expected an integer >= 1"),
    ("--gradient_accumulation_steps", "-3", "training.gradient_accumulation_steps: "),
    ("--num_epochs", "nan", "training.num_epochs: expected a number > 0"),
    ("--warmup_ratio", "1", "training.warmup_ratio: "),
    ("--max_grad_norm", "0", "training.max_grad_norm: "),
    ("--seed", "4294967296", "training.seed: "),
    ("--save_total_limit", "0", "training.save_total_limit: expected an integer >= 1"),
    ("--save_minutes", "0", "training.save_minutes: "),
    ("--lr_scheduler", "cosinus", "training.lr_scheduler: expected one of cosine, linear, constant"),
    ("--optim", "sgd", "training.optim: expected one of "),
    ("--target_modules", "[]", "lora.target_modules: "),
    ("--target_modules", "[1, 2]", "lora.target_modules: "),
    ("--target_modules", "{q_proj: 1}", "lora.target_modules: "),
    ("--gradient_checkpointing", "sometimes", "training.gradient_checkpointing: "),
    ("--fused_lora", "maybe", "performance.fused_lora: expected one of auto, on, off"),
    ("--validation_fraction", "1", "data.validation_fraction: "),
    ("--packing", "2", "data.packing: "),
    ("--text_column", "", "data.text_column: "),
    ("--output_dir", "  ", "training.output_dir: "),
    ("--top_p", "0", "generation.top_p: "),
    ("--rows", "[" * 10_000, "data.rows: "),
    ("--memory_limit_gib", "8000000", "performance.memory_limit_gib: "),
]


@pytest.mark.parametrize(
    ("flag", "value", "start"), FLAGS, ids=[f"{flag[2:]} {value[:12]}" for flag, value, _ in FLAGS]
)
def test_flag(refused, flag, value, start):
    assert refused(flag, value).startswith(start)


# ------------------------------------------------------------------------------------------------ config files

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

CONFIGS = {
    "tabs": b"lora:\n\trank: 8\n",
    "a key twice": b"lora: {rank: 8, rank: 16}\n",
    "a section twice": b"lora: {rank: 8}\nlora: {alpha: 16}\n",
    "a list": b"- lora\n- data\n",
    "a word": b"lora\n",
    "code": b"lora: !!python/object/apply:os.system ['touch executed']\n",
    "code in a key": b"? !!python/object/apply:os.system ['touch executed']\n: 1\n",
    "laughs": b"lora: {rank: 8}\n" + LAUGHS.encode(),
    "nested": b"lora: " + b"[" * 5000,
    "zeros": b"\x00" * 100,
    "utf-16": "lora: {rank: 8}\n".encode("utf-16"),
    "latin-1": "data: {dataset: größer}\n".encode("latin-1"),
    "two documents": b"lora: {rank: 8}\n---\nlora: {rank: 16}\n",
    "a date": b"lora: {rank: 2020-01-01}\n",
    "not a number": b"training: {learning_rate: .nan}\n",
    "a yes": b"lora: {rank: yes}\n",
    "a section of a list": b"lora: [rank, 8]\n",
    "a key of a number": b"lora: {8: rank}\n",
    "an anchor that is not there": b"lora: *lora\n",
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file(refused, tmp_path, capfd, name):
    path = tmp_path / "own.yaml"
    path.write_bytes(CONFIGS[name])
    if name == "laughs":  # its nine letters are nine unknown sections
        assert train_qlora.main(["--config", str(path)]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 10 and all(line.startswith("error: ") and len(line) < 700 for line in lines)
        return
    assert refused("--config", path)
    assert not list(tmp_path.rglob("executed"))


def test_config_that_is_no_file(refused, tmp_path):
    assert refused("--config", tmp_path).startswith("--config: cannot read")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert refused("--config", loop).startswith("--config: ")


# ------------------------------------------------------------------------------------------------ data


def table(**columns: list) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def nested(depth: int) -> str:
    return '{"text": ' + '{"a": ' * depth + "1" + "}" * depth + "}\n"


WORDS = "some words of a text that is long enough " * 20

DATA = {  # name of the file: content
    "nan.jsonl": '{"text": NaN}\n' * 30,
    "numbers.jsonl": '{"text": 1.5}\n' * 30,
    "booleans.jsonl": '{"text": true}\n' * 30,
    "nulls.jsonl": '{"text": null}\n' * 30,
    "mixed.jsonl": f'{{"text": "{WORDS}"}}\n' * 5 + '{"text": 7}\n',
    "nested.jsonl": nested(3),
    "deep.jsonl": nested(200),  # of 10,000 levels the JSON reader of pyarrow 26 dies (segmentation fault)
    "arrays.jsonl": '["a", "b"]\n' * 30,
    "words.jsonl": '"a"\n' * 30,
    "keyless.jsonl": "{}\n" * 30,
    "upper.jsonl": json.dumps({"Text": WORDS}) + "\n",
    "utf16.jsonl": (json.dumps({"text": WORDS}) + "\n").encode("utf-16"),
    "half a line.jsonl": json.dumps({"text": "x" * 3_000_000})[:-2],
    "two on a line.jsonl": (json.dumps({"text": WORDS}) + ",") * 3,
    "list of lists.json": json.dumps([["text"], [WORDS]]),
    "zeros.csv": b"\x00" * 300,
    "utf16.csv": f"text\n{WORDS}\n".encode("utf-16"),
    "picture.txt": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)),
    "byte.txt": b"\xff",
    "zip.parquet": b"PK\x03\x04" + b"\x00" * 100,
    "magic.parquet": b"PAR1" + b"\x00" * 100 + b"PAR1",
    "bytes.parquet": table(text=[b"abc"] * 30),
    "lists.parquet": table(text=[["a", "b"]] * 30),
    "structs.parquet": table(text=[{"a": "b"}] * 30),
    "nan.parquet": table(text=[float("nan")] * 30),
    "dates.parquet": table(text=[datetime.date(2020, 1, 1)] * 30),
    "no columns.parquet": table(),
}


@pytest.mark.parametrize("name", DATA)
def test_data_file(refused, tmp_path, name):
    content, path = DATA[name], tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused("--dataset", path).startswith("data.")


def loop(path: Path) -> None:
    path.symlink_to(path)


def ring(path: Path) -> None:
    path.symlink_to(path.with_name("b.txt"))
    path.with_name("b.txt").symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing.txt"))


def folder_in_itself(path: Path) -> None:
    path.mkdir()
    (path / "again").symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def one_bad_of_two(path: Path) -> None:
    path.mkdir()
    (path / "a.jsonl").write_text(json.dumps({"text": WORDS}) + "\n", encoding="utf-8")
    (path / "b.jsonl").write_text('{"text": ', encoding="utf-8")


def other_columns(path: Path) -> None:
    path.mkdir()
    (path / "a.jsonl").write_text(json.dumps({"text": WORDS}) + "\n", encoding="utf-8")
    (path / "b.jsonl").write_text(json.dumps({"body": WORDS, "n": 1}) + "\n", encoding="utf-8")


def empty_validation(path: Path) -> None:
    path.mkdir()
    (path / "train.txt").write_text(WORDS + "\n", encoding="utf-8")
    (path / "validation.txt").write_text("", encoding="utf-8")


PLACES = [loop, ring, dangling, folder_in_itself, pipe, one_bad_of_two, other_columns, empty_validation]


@pytest.mark.parametrize("make", PLACES)
def test_data_place(refused, tmp_path, make):
    path = tmp_path / ("data" if make in (folder_in_itself, *PLACES[-3:]) else "a.txt")
    make(path)
    assert refused("--dataset", path).startswith("data.dataset: ")


@pytest.mark.parametrize(
    "name", ["/dev/null", "/dev/zero", "/proc/self/mem", "a\x00b.txt", "x" * 5000, "~nobody-here/a.txt"]
)
def test_data_that_is_no_file(refused, name):
    assert refused("--dataset", name).startswith("data.dataset: ")


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def header(path: Path, change: Callable[[dict], object], size: int | None = None) -> None:
    """Rewrite the header of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    tree = json.loads(content[8 : 8 + length])
    text = json.dumps(change(tree) or tree).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + content[8 + length :])


def first_tensor(tree: dict) -> dict:
    return next(value for name, value in tree.items() if name != "__metadata__")


def indexed(model: Path, weight_map: object, shard: str = "model-00001-of-00002.safetensors") -> None:
    (model / "model.safetensors").rename(model / shard)
    content = weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(content, encoding="utf-8")


def outside(model: Path, name: str) -> None:
    """A sound file of weights beside the folder, which only the names in the index lead to."""
    names = list(load_file(model / "model.safetensors"))
    indexed(model, dict.fromkeys(names, name), "../elsewhere.safetensors")


def configured(model: Path, **changes: object) -> None:
    tree = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(tree | changes), encoding="utf-8")


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def large_tokenizer(model: Path) -> None:
    """Ids that the embedding has no rows for."""
    tree = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["vocab"] = {word: i if i < 300 else i + 100_000 for word, i in tree["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")


MODELS = {
    "index climbs out": lambda m: outside(m, "../elsewhere.safetensors"),
    "index is absolute": lambda m: outside(m, str(m.parent / "elsewhere.safetensors")),
    "index without a map": lambda m: indexed(m, "{}"),
    "index of a list": lambda m: indexed(m, "[]"),
    "index no JSON": lambda m: indexed(m, "{"),
    "index of numbers": lambda m: indexed(m, {"model.norm.weight": 7}),
    "index empty": lambda m: indexed(m, {}),
    "missing shard": lambda m: indexed(m, {"model.norm.weight": "model-00002-of-00002.safetensors"}),
    "header of a huge size": lambda m: header(m / "model.safetensors", lambda t: None, 2**63),
    "header past the end": lambda m: header(m / "model.safetensors", lambda t: None, 10**9),
    "header no JSON": lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not JSON"),
    "header of another type": lambda m: header(m / "model.safetensors", lambda t: first_tensor(t).update(dtype="Q7")),
    "header of other offsets": lambda m: header(
        m / "model.safetensors", lambda t: first_tensor(t).update(data_offsets=[0, 10**12])
    ),
    "header of a negative shape": lambda m: header(
        m / "model.safetensors", lambda t: first_tensor(t).update(shape=[-1, 2])
    ),
    "header of another shape": lambda m: header(
        m / "model.safetensors", lambda t: first_tensor(t).update(shape=[1, 1])
    ),
    "pickle only": pickled,
    "remote code": lambda m: configured(
        m, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    ),
    "no layers": lambda m: configured(m, num_hidden_layers=-1),
    "heads that do not divide": lambda m: configured(m, num_attention_heads=7),
    "hidden size of zero": lambda m: configured(m, hidden_size=0),
    "hidden size of a word": lambda m: configured(m, hidden_size="large"),
    "vocabulary of another size": lambda m: configured(m, vocab_size=100),
    "tokenizer larger than the model": large_tokenizer,
    "activation unknown": lambda m: configured(m, hidden_act="no-such-act"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(refused, model, name):
    MODELS[name](model)
    (model / "code.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    assert refused("--model_name", model).startswith("model.name: ")


def test_model_that_links_to_itself(refused, tmp_path):
    loop(tmp_path / "model")
    assert refused("--model_name", tmp_path / "model").startswith("model.name: ")


# ------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    argv = ["--config", ROOT / "tiny" / "config.yaml", "--dataset", corpus, "--max_length", 32, "--max_steps", 2]
    argv += ["--batch_size", 2, "--compile", "off", "--rank", 4, "--save_steps", 1, "--output_dir", folder]
    assert train_qlora.main([str(word) for word in argv]) == 0
    return folder


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    """A copy of that folder that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def weights(adapter: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(tensors) or tensors, adapter / "adapter_model.safetensors")


def described(adapter: Path, **changes: object) -> None:
    tree = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(tree | changes), encoding="utf-8")


def poisoned(value: float) -> Callable[[Path], None]:
    return lambda a: weights(a, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(value) and None)


def renamed(tensors: dict) -> dict:
    return {("../../" + name if i == 0 else name): tensor for i, (name, tensor) in enumerate(tensors.items())}


ADAPTERS = {
    "truncated": lambda a: (a / "adapter_model.safetensors").write_bytes(
        (a / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "empty": lambda a: (a / "adapter_model.safetensors").write_bytes(b""),
    "nothing in it": lambda a: save_file({}, a / "adapter_model.safetensors"),
    "not a number": poisoned(float("nan")),
    "infinite": poisoned(float("inf")),
    "another rank in the file": lambda a: described(a, r=8),
    "another rank": lambda a: weights(
        a, lambda t: {n: v[:2].contiguous() if "lora_A" in n else v for n, v in t.items()}
    ),
    "a layer too few": lambda a: weights(a, lambda t: t.pop(next(iter(t))) is None or None),
    "a layer too many": lambda a: weights(
        a, lambda t: t.update({n.replace("layers.0", "layers.9"): v.clone() for n, v in t.items()})
    ),
    "names that climb out": lambda a: weights(a, renamed),
    "config no JSON": lambda a: (a / "adapter_config.json").write_text("{", encoding="utf-8"),
    "config a list": lambda a: (a / "adapter_config.json").write_text("[]", encoding="utf-8"),
    "config empty": lambda a: (a / "adapter_config.json").write_text("{}", encoding="utf-8"),
    "config not UTF-8": lambda a: (a / "adapter_config.json").write_bytes(b"\xff\xfe{}"),
    "another method": lambda a: described(a, peft_type="PROMPT_TUNING", num_virtual_tokens=4),
    "unheard-of method": lambda a: described(a, peft_type="UNHEARD_OF"),
    "a rank of a word": lambda a: described(a, r="four"),
    "a rank of zero": lambda a: described(a, r=0),
    "targets that are not there": lambda a: described(a, target_modules=["query"]),
    "a module to import": lambda a: described(a, megatron_config={"a": 1}, megatron_core="code_of_others"),
    "its config.yaml damaged": lambda a: (a / "config.yaml").write_text("lora: [", encoding="utf-8"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(refused, adapter, tmp_path, monkeypatch, name):
    (tmp_path / "code_of_others.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    ADAPTERS[name](adapter)
    quantized = str(name != "a module to import").lower()  # peft would import it for a base that is not
    flags = ("--evaluate", "--adapter", adapter, "--load_in_4bit", quantized)
    line = refused(*flags)
    print("LINE", line)
    assert line.startswith("--config: " if "yaml" in name else "--adapter: ")


def test_adapter_of_another_base(refused, adapter, random_models):
    assert refused("--evaluate", "--adapter", adapter, "--model_name", random_models("llama")).startswith("--adapter: ")


# ------------------------------------------------------------------------------------------------ runs to go on from


def rewritten(folder: Path, **changes: object) -> None:
    """Change the state of a checkpoint and its checksums with it, as an attacker or another version would."""
    adapter, state = checkpoint_utils.read_checkpoint(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = {key: value for key, value in (state | changes).items() if value is not None}
    checkpoint_utils.write_checkpoint(folder.parent, checkpoint_utils.step_of(folder), adapter, config, state, 9)


def swapped(folder: Path) -> None:
    """An adapter of other shapes, checksums and all."""
    adapter, state = checkpoint_utils.read_checkpoint(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    other = {name: tensor[:1, :1].clone() for name, tensor in adapter.items()}
    checkpoint_utils.write_checkpoint(folder.parent, 2, other, config, state, 9)


CHECKPOINTS = {
    "without its progress": lambda f: rewritten(f, progress=None),
    "without its optimizer": lambda f: rewritten(f, optimizer=None),
    "without its config": lambda f: rewritten(f, config=None),
    "without its shape": lambda f: rewritten(f, shape=None),
    "of another version": lambda f: rewritten(f, progress={"step": 2, "unheard_of": 1}),
    "an optimizer of another model": lambda f: rewritten(f, optimizer={"state": {}, "param_groups": []}),
    "an adapter of another model": swapped,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(refused, adapter, corpus, name):
    CHECKPOINTS[name](adapter / "checkpoint-2")
    flags = ("--max_length", 32, "--gradient_accumulation_steps", 1, "--rank", 4, "--max_steps", 4)
    assert refused(*flags, output_dir=adapter).startswith("training.resume: ")


def test_no_checkpoint_is_sound(refused, adapter, capfd):
    for folder in checkpoint_utils.checkpoints(adapter):
        (folder / "training_state.json").write_text("{}", encoding="utf-8")
    assert refused(output_dir=adapter).startswith(f"training.resume: no checkpoint in {adapter} is sound")


def test_checkpoint_of_another_folder_does_not_go_on_over_a_run(refused, adapter, made):
    expected = f"training.output_dir: {adapter} holds a finished run; give another --output_dir"
    assert refused("--resume", made / "checkpoint-1", output_dir=adapter) == expected
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds another run" in refused("--resume", made / "checkpoint-1", output_dir=adapter)


@pytest.mark.parametrize("make", [loop, dangling, pipe])
def test_output_dir_that_is_no_folder(refused, tmp_path, make):
    make(tmp_path / "output")
    assert refused(output_dir=tmp_path / "output").startswith("training.output_dir: ")


def test_resume_from_what_is_no_checkpoint(refused, tmp_path, adapter):
    for path in (adapter / "config.yaml", adapter, "a\x00b", "x" * 5000):
        assert refused("--resume", path, output_dir=tmp_path / "new").startswith("training.resume: cannot go on from")
