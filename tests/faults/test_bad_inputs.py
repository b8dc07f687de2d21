"""Bad inputs through the real entry point: a line each, exit code 2, nothing written and nothing lost."""

import datetime
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import inference_example
import train_qlora
from config import DataConfig
from toolkit import checkpoints, earlier_run
from toolkit.data_files import load_rows

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
    ("--rank", "1.5", "lora.rank: expected an integer >= 1 and <= 16384, got 1.5"),
    ("--rank", ".nan", "lora.rank: expected an integer >= 1"),
    ("--rank", "9" * 5000, "lora.rank: "),
    ("--rank", "[1", "lora.rank: expected an integer >= 1 and <= 16384, got '[1'"),
    ("--rank", "", "lora.rank: "),
    ("--alpha", ".inf", "lora.alpha: expected a number >= 1e-06 and <= 1000000, got "),
    ("--alpha", "-1", "lora.alpha: expected a number >= 1e-06 and <= 1000000, got "),
    ("--lora.dropout", "1", "lora.dropout: expected a number >= 0 and <= 0.999, got 1"),
    ("--learning_rate", "0", "training.learning_rate: expected a number > 0 and <= 100, got 0"),
    ("--learning_rate", "1e400", "training.learning_rate: "),
    ("--learning_rate", "2e-4x", "training.learning_rate: "),
    ("--max_length", "7", "data.max_length: expected an integer >= 8 and <= 1048576, got 7"),
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
def test_config_file(refused, tmp_path, name):
    path = tmp_path / "own.yaml"
    path.write_bytes(CONFIGS[name])
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


SPOKEN = {  # language: a text, and how Windows and Unix programs may save it: encoding: what it looks like
    "Traditional Chinese": (
        "今天天氣很好，我們去公園散步。量化是把權重存成較少的位元。",
        {"cp950": "Big5", "big5": "Big5", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}
        | {"utf-32": "UTF-32", "utf-32-le": "UTF-32", "utf-32-be": "UTF-32"},
    ),
    "Simplified Chinese": (
        "今天天气很好，我们去公园散步。量化是把权重存成较少的位。",
        {"gbk": "GBK", "gb18030": "GBK", "gb2312": "GBK", "utf-16": "UTF-16"},
    ),
    "Japanese": (
        "今日はいい天気ですね。量子化とは、重みを少ないビットで保存することです。",
        {"cp932": "Shift-JIS", "shift_jis": "Shift-JIS", "euc_jp": "EUC-JP", "utf-16": "UTF-16"},
    ),
    "Korean": ("양자화는 가중치를 더 적은 비트로 저장하는 것입니다.", {"cp949": "EUC-KR", "euc_kr": "EUC-KR"}),
    "French": ("Le café près de l'école, où j'étudie, m'a plu à Noël.", {"cp1252": "Western", "latin-1": "Western"}),
    "German": ("größer", {"cp1252": "Western", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-32-le": "UTF-32"}),
    "English": ("plain words", {"utf-16-be": "UTF-16", "utf-32-be": "UTF-32", "utf-32-le": "UTF-32"}),
    "Spanish": ("¿Dónde está el niño? ¡Mañana será otro día!", {"latin-1": "Western", "utf-16": "UTF-16"}),
}
SAVED = [(name, codec, looks) for name, (_, codecs) in SPOKEN.items() for codec, looks in codecs.items()]
FORMATS = {
    "a.txt": "some words\n{}\n",
    "a.csv": "text,n\nsome words,1\n{},2\n",
    "a.jsonl": '{{"text": "some words"}}\n{{"text": "{}"}}\n',
    "a.json": '[{{"text": "some words"}},\n{{"text": "{}"}}]\n',
}


@pytest.mark.parametrize(("language", "codec", "looks"), SAVED)
@pytest.mark.parametrize("name", FORMATS)
def test_text_in_another_encoding(tmp_path, name, language, codec, looks):
    path = tmp_path / name
    path.write_bytes(FORMATS[name].format(SPOKEN[language][0]).encode(codec))
    with pytest.raises(config.ConfigError) as caught:
        load_rows(DataConfig(dataset=str(path)))
    line = 1 if looks.startswith("UTF") else FORMATS[name].count("\n", 0, FORMATS[name].index("{}")) + 1
    guess = "Latin-1 or cp1252 (Western)" if looks == "Western" else looks
    said = f"cannot read {path}: line {line} is not UTF-8: it looks like {guess}; save the file as UTF-8"
    assert caught.value.problems == (f"data.dataset: {said}",)
    if path.suffix in (".txt", ".jsonl"):
        with pytest.raises(config.ConfigError) as caught:
            inference_example.read_prompts(path)
        assert caught.value.problems == (f"--prompts: {said}",)


def test_short_text_in_another_encoding(refused, tmp_path):
    """Through the script, and as short as a cell of a table."""
    path = tmp_path / "站名.csv"
    for text, codec, looks in (("臺灣", "cp950", "Big5"), ("台北車站", "big5", "Big5"), ("火车站", "gbk", "GBK")):
        path.write_bytes(f"text,n\n{text},1\n".encode(codec))
        said = f"line 2 is not UTF-8: it looks like {looks}; save the file as UTF-8"
        assert refused("--dataset", path) == f"data.dataset: cannot read {path}: {said}"


def test_the_one_line_of_many_that_is_not_utf8(refused, tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_bytes("一行文字\n".encode() * 500_000 + "最後一行\n".encode("big5"))  # of more than one block
    assert "line 500001 is not UTF-8: it looks like Big5" in refused("--dataset", path)


def test_config_in_another_encoding(refused, tmp_path):
    path = tmp_path / "own.yaml"
    for codec, line, name in (("utf-16", 1, "UTF-16"), ("big5", 2, "Big5")):
        path.write_bytes("data:\n  dataset: 資料/我的文章.txt\n".encode(codec))
        guess = f"it looks like {name}; save the file as UTF-8"
        expected = f"--config: cannot read {path}: line {line} is not UTF-8: {guess}"
        assert refused("--config", path) == expected


@pytest.mark.parametrize("name", [*FORMATS, "a.yaml"])
def test_a_byte_order_mark_is_accepted(tmp_path, name):
    path, text = tmp_path / name, SPOKEN["Traditional Chinese"][0]
    path.write_text(FORMATS.get(name, "generation: {{system_prompt: {}}}").format(text), encoding="utf-8-sig")
    if name == "a.yaml":
        assert config.load_config(path).generation.system_prompt == text
        return
    rows = load_rows(DataConfig(dataset=str(path)))["train"]
    assert [row.strip() for row in rows["text"]] == ["some words", text]
    if path.suffix == ".txt":
        assert inference_example.read_prompts(path) == ["some words", text]


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
    setting = "model.trust_remote_code" if name == "remote code" else "model.name"
    assert refused("--model_name", model).startswith(f"{setting}: ")


def cut(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def changed(model: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Rewrite the first tensor whose name ends so; change: None leaves it out."""
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith(ending))
    tensors = {n: t for n, t in tensors.items() if n != name} | (
        {name: change(tensors[name]).clone()} if change else {}
    )
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
FILE, Q = "model.safetensors of", "layers.0.self_attn.q_proj.weight"
# What is wrong with the weights: (how it is made, what is named, what is said of it).
WEIGHTS = {
    "truncated": (lambda m: cut(m, 100_000), FILE, "is truncated: it has 100,000 of the"),
    "truncated in the header": (lambda m: cut(m, 500), FILE, "is truncated: it has 500 bytes, its header alone needs"),
    "empty": (lambda m: cut(m, 0), FILE, "is empty; fetch this file again"),
    "pointer": (lambda m: (m / "model.safetensors").write_text(POINTER), FILE, "run `git lfs pull` in its folder"),
    "a page": (lambda m: (m / "model.safetensors").write_text("<!DOCTYPE html>"), FILE, "does not begin as a"),
    "no header": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not JSON"), FILE, "its header is not"
    ),
    "no shard": (
        lambda m: indexed(m, {"model.norm.weight": "model-00002-of-00002.safetensors"}),
        "model-00002-of-00002.safetensors of", "is missing, though model.safetensors.index.json names it: fetch it",
    ),
    "no map": (lambda m: indexed(m, "{}"), "model.safetensors.index.json of", "expected JSON with a weight_map"),
    "no tensor": (lambda m: changed(m, Q, None), Q, "lacks 1 weight that its config.json needs"),
    "fewer rows": (lambda m: changed(m, Q, lambda t: t[:-64]), Q, "expected the shape [256, 256], got [192, 256]"),
    "shorter norm": (lambda m: changed(m, "model.norm.weight", lambda t: t[:-8]), "norm.weight", "got [248]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_whole_are_named(refused, model, name):
    make, named, said = WEIGHTS[name]
    make(model)
    line = refused("--model_name", model)
    assert line.startswith("model.name: ") and named in line and said in line, line
    assert "fetch " in line or "git lfs pull" in line


def test_model_that_links_to_itself(refused, tmp_path):
    loop(tmp_path / "model")
    assert refused("--model_name", tmp_path / "model").startswith("model.name: ")


def nothing(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def only(*names: str) -> Callable[[Path], None]:
    """Leave these files of a model's folder, and make those that it has not."""

    def keep(model: Path) -> None:
        for path in model.iterdir():
            if path.name not in names:
                path.unlink()
        for name in names:
            (model / name).touch()

    return keep


def hub_cache(model: Path) -> None:
    for path in list(model.iterdir()):
        (model / "snapshots" / "0123").mkdir(parents=True, exist_ok=True)
        path.rename(model / "snapshots" / "0123" / path.name)


def adapter_alone(model: Path) -> None:
    only()(model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}', encoding="utf-8")


ALL = "has no config.json, tokenizer.json and safetensors weights"
GGUF = "GGUF files cannot be loaded"
NO_MODELS = {  # what is in the folder: (how it is made, what is said, what --plan says, if that is another)
    "nothing": (nothing, f"{ALL} (the folder is empty)", "has no config.json (the folder is empty)"),
    "config alone": (only("config.json"), "has no tokenizer.json and safetensors weights", None),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json", "has no config.json"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer.json", None),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no safetensors weights", None),
    "pickles": (pickled, "has no safetensors weights (pickled weights are not loaded)", None),
    "gguf": (only("qwen2.5-3b-q4_k_m.gguf"), f"{ALL}; {GGUF}", f"has no config.json; {GGUF}"),
    "data": (only("train.jsonl"), f"{ALL}; it looks like data, which belongs to data.dataset", "looks like data"),
    "hub's cache": (hub_cache, "; did you mean ", "; did you mean "),
    "adapter": (
        adapter_alone,
        "holds an adapter, not a model: give it as --adapter, and its base (some/base)",
        "--adapter",
    ),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_folder_that_is_no_model(refused, model, capfd, name):
    make, said, planned = NO_MODELS[name]
    make(model)
    line = refused("--model_name", model)
    assert line.startswith(f"model.name: {model} ") and said in line
    assert refused("--evaluate", "--model_name", model) == line
    assert inference_example.main(["--adapter", "none", "--model_name", str(model)]) == 2
    assert capfd.readouterr().err == f"error: {line}\n"
    if planned:
        assert planned in refused("--plan", "--model_name", model)


@pytest.mark.parametrize("name", ["a.gguf", "nobody/Model-Q4.GGUF"])
def test_gguf_file(refused, model, name):
    (model / "a.gguf").touch()
    for flags in ((), ("--plan",)):
        assert refused("--model_name", model / name if name == "a.gguf" else name, *flags).startswith(
            f"model.name: {GGUF}"
        )


def test_no_model_is_said_before_torch_is_imported(model, tmp_path):
    """By both scripts, of which a Python in which importing torch is fatal runs the first lines."""
    only("train.jsonl")(model)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')", encoding="utf-8")
    for script, *flags in (("train_qlora.py", "--plan"), ("inference_example.py", "--adapter", "none")):
        command = [sys.executable, ROOT / script, *flags, "--model_name", model]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: model.name: {model} has no config.json")
        assert "it looks like data" in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ the hub

ANSWERS = {  # name of the repository: the hub's answer
    "gated": (401, "GatedRepo"),
    "forbidden": (403, "GatedRepo"),
    "missing": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
    "no-revision": (404, "RevisionNotFound"),
    "no-config": (404, "EntryNotFound"),
    "disabled": (403, None),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, by the name of the repository."""

    def do_HEAD(self) -> None:
        code, name = next(answer for repository, answer in ANSWERS.items() if f"/{repository}" in self.path)
        self.send_response(code)
        if name:
            self.send_header("X-Error-Code", name)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CALLS = """
import contextlib, io, json, sys, time
time.sleep = lambda seconds: None  # between the tries of a hub that does not answer
sys.path.insert(0, sys.argv[1])
import inference_example, train_qlora
for script, *argv in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = {"train": train_qlora, "inference": inference_example}[script].main(argv)
    print(json.dumps([code, err.getvalue()]))
"""


def called(tmp_path: Path, calls: list[list], **env: object) -> list[str]:
    """Run commands one after another in one child with this environment; return the line that refuses each."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": tmp_path / "home", **env}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if name not in env:
            environment.pop(name, None)
    words = [[str(word) for word in call] for call in calls]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, ROOT, json.dumps(words)],
        env={name: str(value) for name, value in environment.items()},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls), done.stderr
    for code, err in answers:
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700, (code, err)
    return [err.removeprefix("error: ").rstrip() for _, err in answers]


TINY = ("--config", ROOT / "tiny" / "config.yaml", "--output_dir", "output")


def test_what_the_hub_does_not_give(tmp_path, hub):
    """Gated, missing, without the revision: each its line, of models, tokenizers and data sets alike."""
    models = ["gated", "forbidden", "missing", "private", "no-revision", "no-config", "disabled"]
    calls = [["train", *TINY, "--model_name", f"nobody/{name}", "--revision", "v1/ä"] for name in models]
    calls += [["train", *TINY, "--plan", "--model_name", "nobody/gated"]]
    calls += [["inference", "--adapter", "none", "--model_name", f"nobody/{name}"] for name in ("gated", "missing")]
    data = ["gated", "forbidden", "missing", "private", "disabled"]
    calls += [["train", *TINY, "--dataset", f"nobody/{name}"] for name in data]
    lines = called(tmp_path, calls, HF_ENDPOINT=hub)

    def gated(setting: str, name: str, path: str = "") -> str:
        page = f"{hub}/{path}nobody/{name}"
        log_in = "then log in with `hf auth login` or set HF_TOKEN to a token of that account"
        return f"{setting}: nobody/{name} is gated on the hub: ask for access on {page}, {log_in}"

    def missing(setting: str, kind: str, name: str) -> str:
        hint = "check the spelling (owner/name); for a private one log in with `hf auth login` or set HF_TOKEN"
        return f"{setting}: the hub has no {kind} nobody/{name}, or it is private: {hint}"

    def forbidden(setting: str, local: str) -> str:
        rest = f"give {local}, point HF_HOME at a cache that has it, or try --config tiny/config.yaml"
        return f"{setting}: cannot get nobody/disabled from the hub: {hub} answers 403 Forbidden; {rest}"

    assert lines == [
        gated("model.name", "gated"),
        gated("model.name", "forbidden"),
        missing("model.name", "model", "missing"),
        missing("model.name", "model", "private"),
        "model.revision: the hub has nobody/no-revision, but no branch, tag or commit 'v1/ä' of it",
        "model.name: nobody/no-config on the hub has no config.json: is it in another format, such as GGUF?",
        forbidden("model.name", "a local folder"),
        gated("model.name", "gated"),
        gated("model.name", "gated"),
        missing("model.name", "model", "missing"),
        gated("data.dataset", "gated", "datasets/"),
        gated("data.dataset", "forbidden", "datasets/"),
        missing("data.dataset", "data set", "missing"),
        missing("data.dataset", "data set", "private"),
        forbidden("data.dataset", "a local file or folder"),
    ]


def test_a_hub_that_is_out_of_reach(tmp_path):
    calls = [["train", *TINY, "--model_name", "nobody/some"], ["train", *TINY, "--dataset", "nobody/some"]]
    calls += [["inference", "--adapter", "none", "--model_name", "nobody/some"]]
    nobody = "http://127.0.0.1:1"
    for line, setting in zip(
        called(tmp_path, calls, HF_ENDPOINT=nobody), ("model.name", "data.dataset", "model.name"), strict=True
    ):
        assert line.startswith(f"{setting}: cannot get nobody/some from the hub: no connection to {nobody} (")
        assert all(way in line for way in ("give a local ", "HF_HOME", "tiny/config.yaml"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, hub):
    """Not the data file, whose rows would be kept there, nor the network."""
    (tmp_path / "file").touch()
    home, rows = tmp_path / "file" / "home", tmp_path / "rows.txt"
    rows.write_text("some words of a text\n" * 50, encoding="utf-8")
    local, remote = ["train", *TINY, "--dataset", rows], ["train", *TINY, "--model_name", "nobody/gated"]
    expected = f"HF_HOME: cannot write in {home}: Not a directory; set HF_HOME to a folder that you can write"
    datasets = (
        f"HF_HOME: cannot write in {home / 'datasets'}: Not a directory; set HF_HOME to a folder that you can write"
    )
    assert called(tmp_path, [local, remote], HF_HOME=home, HF_ENDPOINT=hub) == [datasets, expected]
    named = expected.replace("HF_HOME", "HF_DATASETS_CACHE")
    assert called(tmp_path, [local], HF_DATASETS_CACHE=home) == [named]
    if os.path.isdir("/proc"):  # where no folder can be made
        (line,) = called(tmp_path, [local], HF_HOME="/proc/nope/cache")
        assert line.startswith("HF_HOME: cannot write in /proc/nope/cache/datasets: ") and line.endswith(expected[-40:])


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
    assert "is truncated" in line or name != "truncated"


def test_adapter_of_another_base(refused, adapter, random_models):
    assert refused("--evaluate", "--adapter", adapter, "--model_name", random_models("llama")).startswith("--adapter: ")


# ------------------------------------------------------------------------------------------------ runs to go on from


def rewritten(folder: Path, **changes: object) -> None:
    """Change the state of a checkpoint and its checksums with it, as an attacker or another version would."""
    adapter, state = checkpoints.read_checkpoint(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = {key: value for key, value in (state | changes).items() if value is not None}
    checkpoints.write_checkpoint(folder.parent, earlier_run.step_of(folder), adapter, config, state, 9)


def swapped(folder: Path) -> None:
    """An adapter of other shapes, checksums and all."""
    adapter, state = checkpoints.read_checkpoint(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    other = {name: tensor[:1, :1].clone() for name, tensor in adapter.items()}
    checkpoints.write_checkpoint(folder.parent, 2, other, config, state, 9)


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
    for folder in earlier_run.checkpoints(adapter):
        (folder / "training_state.json").write_text("{}", encoding="utf-8")
    assert refused(output_dir=adapter).startswith(f"training.resume: all checkpoints in {adapter} are damaged")


def test_checkpoint_of_another_folder_does_not_go_on_over_a_run(refused, adapter, made):
    expected = f"training.output_dir: {adapter} holds a finished run; choose another --output_dir"
    assert refused("--resume", made / "checkpoint-1", output_dir=adapter) == expected
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds another run" in refused("--resume", made / "checkpoint-1", output_dir=adapter)


@pytest.mark.parametrize("make", [loop, dangling, pipe])
def test_output_dir_that_is_no_folder(refused, tmp_path, make):
    make(tmp_path / "output")
    assert refused(output_dir=tmp_path / "output").startswith("training.output_dir: ")


def test_resume_from_what_is_no_checkpoint(refused, tmp_path, adapter):
    for path in (adapter / "config.yaml", adapter, "x" * 5000):
        assert refused("--resume", path, output_dir=tmp_path / "new").startswith(
            "training.resume: cannot continue from"
        )
