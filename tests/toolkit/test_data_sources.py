"""Several sources in data.dataset: what is learned of each, counted with the tokenizer alone, and the loss of each and of all."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_qlora
from config import ConfigError, DataConfig, load_config, sources_of
from fast_path.loss import IGNORED
from quantization_utils import load_tokenizer
from toolkit import checkpoints
from toolkit.data_blocks import SampleBlocks, draw, sample_counts
from toolkit.data_sources import MixedBlocks, apportion, make_blocks, read_sources, show_blocks
from toolkit.file_lines import some
from toolkit.flags import build_parser, parse_arguments

DOCUMENT_END, TURN_END = 0, 2  # <|endoftext|> and <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model) -> Path:
    """A folder with plays.txt (lines in documents), chats.jsonl and notes.csv (a text in column body)."""
    folder = tmp_path_factory.mktemp("sources")
    text = (tiny_model.parent / "text" / "train.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    documents = ["\n".join(lines[i : i + 6]) + "\n" for i in range(0, 240, 6)]
    (folder / "plays.txt").write_text("\n".join(documents), encoding="utf-8")
    pairs = [(lines[300 + 2 * i], lines[301 + 2 * i]) for i in range(40)]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(rows, encoding="utf-8")
    with open(folder / "notes.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *([str(i), lines[500 + i]] for i in range(30))])
    return folder


def mixture(folder: Path, *items, **keys) -> DataConfig:
    """Return the settings with these sources: names of files in the folder, or mappings."""
    found = [{"dataset": item} if isinstance(item, str) else item for item in items]
    found = [item | {"dataset": str(folder / item["dataset"])} for item in found]
    flags = {f"data.{key}": value for key, value in ({"max_length": 64} | keys).items()}
    return load_config((), {"data.dataset": found} | flags).data


ALL = ("plays.txt", "chats.jsonl", {"dataset": "notes.csv", "text_column": "body"})


def blocks_of(data: DataConfig, tokenizer, seed: int = 42) -> dict:
    return make_blocks(read_sources(data, tokenizer), tokenizer, data, seed)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def walked(folder: Path, tokenizer) -> dict[str, tuple[list[int], int]]:
    """Return the sorted tokens of each file, and how many of them are learned, found with the tokenizer alone."""
    found = {}
    text = (folder / "plays.txt").read_text(encoding="utf-8")
    documents = [part for part in re.split(r"(?<=\n)\n", text) if part.strip()]
    tokens = [t for d in documents for line in d.splitlines(keepends=True) for t in ids(tokenizer, line)]
    found["plays.txt"] = sorted(tokens + [DOCUMENT_END] * len(documents)), None
    tokens, learned = [], 0
    for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines():
        chat = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert whole[: len(asked)] == asked
        learned += whole.index(TURN_END, len(asked)) + 1 - len(asked)
        tokens += whole
    found["chats.jsonl"] = sorted(tokens), learned
    with open(folder / "notes.csv", encoding="utf-8", newline="") as file:
        texts = [row["body"] for row in csv.DictReader(file)]
    found["notes.csv"] = sorted(t for text in texts for t in (*ids(tokenizer, text), DOCUMENT_END)), None
    return found


def tokens_of(part) -> list[int]:
    blocks = [part[i] for i in range(len(part))]
    return [int(t) for block in blocks for t in (block if block.ndim == 1 else block[0])]


def learned_in(part) -> int:
    """Return how many tokens a batch of these blocks would predict."""
    blocks = [part[i] for i in range(len(part))]
    return sum(len(block) - 1 if block.ndim == 1 else int((block[1][1:] != IGNORED).sum()) for block in blocks)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("packing", [True, False])
def test_each_token_of_each_source_is_in_one_block(files, tokenizer, packing):
    blocks, expected = blocks_of(mixture(files, *ALL, packing=packing), tokenizer), walked(files, tokenizer)
    train, held = blocks["train"], blocks["validation"]
    assert train.names == held.names == tuple(expected)
    for name, own, other in zip(train.names, train.sources, held.sources, strict=True):
        tokens, learned = expected[name]
        assert sorted(tokens_of(own) + tokens_of(other)) == tokens, name
        assert learned is None or own.supervised + other.supervised == learned
        assert len(other) and other.tokens <= own.tokens, "a part of each source is held out"
    assert sorted(tokens_of(train) + tokens_of(held)) == sorted(t for tokens, _ in expected.values() for t in tokens)
    for part in (train, held):
        assert part.tokens == sum(source.tokens for source in part.sources) == part.positions(range(len(part)))
        assert part.supervised == learned_in(part) == sum(source.supervised for source in part.sources)
        assert len(part) == sum(map(len, part.sources))


def test_one_source_in_a_list_is_that_source(files, tokenizer):
    alone = load_config((), {"data.dataset": str(files / "chats.jsonl"), "data.max_length": 64}).data
    one, whole = blocks_of(mixture(files, "chats.jsonl"), tokenizer), blocks_of(alone, tokenizer)
    assert isinstance(whole["train"], SampleBlocks) and isinstance(one["train"], MixedBlocks)
    for name in ("train", "validation"):
        pairs = [(one[name][i], whole[name][i]) for i in range(len(whole[name]))]
        assert len(one[name]) == len(whole[name]) and all(np.array_equal(a, b) for a, b in pairs)
        assert one[name].template_options == whole[name].template_options


def test_text_is_one_sample_beside_packed_samples(files, tokenizer):
    train = blocks_of(mixture(files, *ALL), tokenizer)["train"]
    block = train[0]
    assert block.shape == (3, 64) and block[1, 0] == IGNORED and np.array_equal(block[2], np.arange(64))
    assert np.array_equal(block[1, 1:], block[0, 1:]) and np.array_equal(block[0], train.sources[0][0])
    counts = sample_counts(train)
    starts = [int((train[i][2] == 0).sum()) for i in range(len(train))]
    assert counts == sorted(starts, reverse=True) and counts[0] > 1
    only_text = blocks_of(mixture(files, "plays.txt", ALL[2]), tokenizer)["train"]
    assert only_text[0].ndim == 1 and sample_counts(only_text) == []


def test_thoughts_are_counted_over_all_sources(files, tokenizer, tmp_path):
    """A source without thoughts does not switch thinking off beside one that has them."""
    thinks = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    thinks.chat_template = tokenizer.chat_template + "{# <think> enable_thinking reasoning_content #}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}]
    (tmp_path / "thoughts.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    data = mixture(Path("/"), str(files / "chats.jsonl"), str(tmp_path / "thoughts.jsonl"))
    rows = read_sources(data, thinks)
    assert rows.notes == ("1 answer with a thought, 40 without: the model learns both",)
    assert [source.template_options for source in rows.sources] == [{}, {}]
    plain = read_sources(mixture(files, "chats.jsonl", "plays.txt"), thinks)
    assert plain.sources[0].template_options == {"enable_thinking": False}


# ------------------------------------------------------------------------------------------------ shares


def test_a_share_of_the_rows_is_drawn_by_the_seed(files, tokenizer):
    expected = [json.loads(line) for line in (files / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in expected
    ]  # of each row
    drawn = {}
    for seed in (1, 1, 2):
        data = mixture(files, {"dataset": "chats.jsonl", "share": 0.25}, "plays.txt", packing=False, max_length=512)
        blocks = blocks_of(data, tokenizer, seed)
        train, held = (
            [texts.index(part.sources[0][i][0].tolist()) for i in range(len(part.sources[0]))]
            for part in (blocks["train"], blocks["validation"])
        )
        assert len(set(train) | set(held)) == len(train) + len(held) == 10 and held
        assert drawn.setdefault(seed, (train, held)) == (train, held)
    assert drawn[1] != drawn[2]


def test_whole_documents_of_a_running_text_are_drawn(files, tokenizer):
    data = mixture(files, {"dataset": "plays.txt", "share": 0.3}, "chats.jsonl", packing=False, validation_fraction=0)
    part = blocks_of(data, tokenizer)["train"].sources[0]
    text = (files / "plays.txt").read_text(encoding="utf-8")
    documents = [doc for doc in re.split(r"(?<=\n)\n", text) if doc.strip()]
    found = tokenizer.decode(tokens_of(part)).split("<|endoftext|>")[:-1]
    assert len(found) == 12 == round(0.3 * len(documents)) and set(found) <= set(documents)
    assert [documents.index(doc) for doc in found] == sorted(documents.index(doc) for doc in found)


def test_what_is_drawn_is_as_near_to_the_share_as_documents_allow():
    starts = np.array([1, 0, 0, 1, 0, 1, 0, 0, 0, 1], bool)  # documents of 3, 2, 4 and 1 rows
    for share in (0.3, 0.5, 0.7, 0.9):
        rows = draw(starts, np.ones(10), share, 7)
        document = np.cumsum(starts)
        assert set(document[rows]).isdisjoint(document[~rows]) and rows.any()
        assert abs(rows.sum() - 10 * share) <= 2  # half of the largest document
    assert draw(np.array([1, 0, 0, 0], bool), np.ones(4), 0.5, 7).tolist() == [True, True, False, False]


def test_a_limit_is_of_all_sources_together(files, tokenizer):
    blocks = blocks_of(mixture(files, *ALL, max_train_samples=50, max_eval_samples=3, packing=False), tokenizer)
    assert blocks["train"].rows <= 50 and [len(part) for part in blocks["validation"].sources] == [1, 1, 1]
    assert apportion(10, [3, 3, 3], "x") == [3, 4, 3] and apportion(3, [100, 1, 1], "x") == [1, 1, 1]
    assert sum(apportion(1001, [900, 90, 13], "x")) == 1001
    with pytest.raises(
        ConfigError, match="data.max_train_samples: expected at least a row for each of 3 sources, got 2"
    ):
        blocks_of(mixture(files, *ALL, max_train_samples=2), tokenizer)


# ------------------------------------------------------------------------------------------------ errors


def said(call, *arguments) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    "value, expected",
    [
        (["a", {"dataset": "b", "share": 2}], "data.dataset[1].share: expected a number > 0 and <= 1, got 2"),
        (["a", {"dataset": "b", "share": 0}], "data.dataset[1].share: expected a number > 0 and <= 1, got 0"),
        (["a", {"dataset": "b", "shares": 1}], "data.dataset[1].shares: unknown key; did you mean share?"),
        (["a", {"dataset": "b", "max_length": 8}], "data.dataset[1].max_length: unknown key"),
        ([{"share": 0.5}], "data.dataset[0].dataset: expected a path or a hub id, got none"),
        ([{"dataset": ["b"]}], "data.dataset[0].dataset: expected non-empty text, got ['b']"),
        (["a", ["b"]], "data.dataset[1]: expected non-empty text, got ['b']"),
        (
            [{"dataset": "b", "format": "x"}],
            "data.dataset[0].format: expected one of auto, text, chat, prompt, got 'x'",
        ),
        (
            [],
            "data.dataset: expected a list such as [a.jsonl, {dataset: b.txt, share: 0.5}], or non-empty text, got []",
        ),
    ],
)
def test_a_wrong_list_is_refused_by_the_place_in_it(value, expected):
    assert said(load_config, (), {"data.dataset": value}) == (expected,)


def test_errors_name_the_source(files, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "clown", "content": "a"}]}\n', encoding="utf-8")
    (tmp_path / "half.jsonl").write_text('{"text": "a"\n', encoding="utf-8")
    bad, half = str(tmp_path / "bad.jsonl"), str(tmp_path / "half.jsonl")
    plays = str(files / "plays.txt")
    for second, beginning in (
        (bad, "data.dataset[1]: row 1: turn 1: expected a role"),
        (half, f"data.dataset[1]: cannot read {half}: line 1"),
        (str(files / "notes.csv"), "data.dataset[1].text_column: no column 'text' in"),
        ({"dataset": str(files / "notes.csv"), "format": "chat"}, "data.dataset[1].format: chat needs the columns"),
        (str(tmp_path / "none.txt"), "data.dataset[1]: no such file or folder"),
        (str(files), "data.dataset[1]: expected files of one kind"),
        ({"dataset": plays, "share": 0.5}, f"data.dataset[1]: {plays} is read by data.dataset[0] too; give it once"),
    ):
        data = load_config((), {"data.dataset": [plays, second]}).data
        (problem,) = said(blocks_of, data, tokenizer)
        assert problem.startswith(beginning), problem
    (tmp_path / "link").symlink_to(files, target_is_directory=True)
    linked = load_config((), {"data.dataset": [plays, str(tmp_path / "link" / "plays.txt")]}).data
    assert "is read by data.dataset[0] too" in said(read_sources, linked, tokenizer)[0]
    (tmp_path / "hard.txt").hardlink_to(plays)
    linked = load_config((), {"data.dataset": [plays, str(tmp_path / "hard.txt")]}).data
    assert f"{tmp_path / 'hard.txt'} is read by data.dataset[0] too" in said(read_sources, linked, tokenizer)[0]


def test_copies_among_sources_are_told(files, tokenizer, tmp_path):
    copy = tmp_path / "copy.txt"
    shutil.copy(files / "plays.txt", copy)
    warning = f"warning: {files / 'plays.txt'} and {copy} have the same content: rows held out of one are learned from"
    data = load_config((), {"data.dataset": [str(files / "plays.txt"), str(copy)]}).data
    (line,) = read_sources(data, tokenizer).notes
    assert line == f"{warning} the other"
    copy.write_text(copy.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    assert read_sources(data, tokenizer).notes == ()


def test_many_sources_are_told_together(tokenizer, tmp_path):
    """The sums of the lines are those of the sources, and no kind of note is lost."""
    names = [tmp_path / f"{i}.csv" for i in range(23)]
    for i, name in enumerate(names):
        column = "odd" if i == 21 else "id"
        name.write_text(
            f"text,{column}\n" + f"number {i} says so and so\nword by word,2\n".replace("so\n", "so,1\n") * 20
        )
    data = load_config((), {"data.dataset": list(map(str, names)), "data.max_length": 64}).data
    blocks = blocks_of(data, tokenizer)
    train, held = blocks["train"], blocks["validation"]
    own = [line for line in train.notes if re.match(r"\d+\.csv: ", line)]
    assert {line.partition(":")[0] for line in own} == {f"{i}.csv" for i in range(20)}
    size, *more = [line.partition(": ")[2] for line in train.notes if line.startswith("3 more sources: ")]
    tokens, count, *others = [
        sum(f(part) for part in parts.sources[20:]) for parts in (train, held) for f in (lambda part: part.tokens, len)
    ]
    rows = sum(part.rows for part in train.sources[20:])
    assert (
        size == f"{rows} rows, {tokens:,} tokens in {count} blocks; held out: {others[0]} tokens in {others[1]} blocks"
    )
    assert {"columns not used: id (2 sources)", "columns not used: odd (1 source)"} < set(more)
    assert some([str(i) for i in range(23)], "more") == [*map(str, range(20)), "and 3 more"]
    assert some(["a"] * 20, "more") == ["a"] * 20


def test_blocks_are_named_with_their_source(files, tokenizer):
    data = mixture(files, *ALL)
    train = blocks_of(data, tokenizer)["train"]
    last = len(train) - 1
    shown = show_blocks(train, np.array([0, last]), tokenizer, data)
    assert (
        shown.startswith("plays.txt: 0 (plays.txt rows 1 to ") and "; notes.csv: " in shown and "notes.csv row" in shown
    )
    (row,) = re.findall(r"notes\.csv rows? ([\d]+)", shown)
    with open(files / "notes.csv", encoding="utf-8", newline="") as file:
        text = [line["body"] for line in csv.DictReader(file)][int(row) - 1]
    assert tokenizer.decode(train[last][0]).split("<|endoftext|>")[0] in text


# ------------------------------------------------------------------------------------------------ from the shell


def test_a_list_on_the_command_line_and_in_a_file(tmp_path, monkeypatch):
    parser, expected = build_parser(""), ("a.jsonl", {"dataset": "b.txt", "share": 0.5})

    def given(*words):
        return load_config((), parse_arguments(parser, words)[1]).data.dataset

    assert given("--dataset", "[a.jsonl, {dataset: b.txt, share: 0.5}]") == expected
    assert given("--dataset", "a.jsonl", "b.txt", "--rank", "8") == ("a.jsonl", "b.txt")
    assert given("--dataset", "a,b.txt") == "a,b.txt" and given("--dataset", "2024") == "2024"
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).touch()
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n  dataset:\n  - a.jsonl\n  - {dataset: b.txt, share: 0.5}\n  - some/hub\n", encoding="utf-8"
    )
    found = load_config(path)
    here = (str(tmp_path / "a.jsonl"), {"dataset": str(tmp_path / "b.txt"), "share": 0.5}, "some/hub")
    assert found.data.dataset == here, "each is looked up beside the file"
    train_qlora.checkpoints.save_config(found, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == found
    own = [(source.name, source.text_column, source.share) for source in sources_of(found.data)]
    assert own == [("data.dataset[0]", "text", 1), ("data.dataset[1]", "text", 0.5), ("data.dataset[2]", "text", 1)]


def as_flag(folder: Path, *items) -> str:
    found = [{"dataset": item} if isinstance(item, str) else item for item in items]
    return json.dumps([item | {"dataset": str(folder / item["dataset"])} for item in found])


FLAGS = ("--compute_dtype", "float32", "--validation_fraction", "0.1", "--logging_steps", 1)


def test_the_loss_of_all_is_that_of_each_by_its_tokens(train, files, capsys):
    """Each source's loss is the one that a run on it alone has before its first step."""
    code, folder = train("--dataset", as_flag(files, *ALL), *FLAGS, output_dir=files / "mixed")
    assert code == 0
    lines = capsys.readouterr().out
    assert train_qlora.main(["--evaluate", "--adapter", str(folder), "--stride", "8"]) == 2  # chats are no running text
    assert train_qlora.main(["--evaluate", "--adapter", str(folder), "--generate", "4", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr()
    assert "works on running text only, got samples and text from 3 sources" in said.err
    assert f"--generate: no prompts from {files / 'plays.txt'}, which is running text" in said.out
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    each = found["sources"]
    assert list(each) == ["plays.txt", "chats.jsonl", "notes.csv"]
    for voice in ("base", "adapter"):
        mean = sum(own["tokens"] * own[voice]["loss"] for own in each.values()) / found["tokens"]
        assert mean == pytest.approx(found[voice]["loss"], rel=1e-9)
    assert sum(own["tokens"] for own in each.values()) == found["tokens"]
    shown = ", ".join(f"{name} {own['base']['loss']:.4f}" for name, own in each.items())
    assert f"step 0: validation loss {found['base']['loss']:.4f} ({shown}) | perplexity" in lines
    for item, (name, own) in zip(ALL, each.items(), strict=True):
        flags = ("--text_column", "body") if isinstance(item, dict) else ()
        code, alone = train("--dataset", files / name, *flags, *FLAGS, "--max_steps", 1, output_dir=files / f"{name}-1")
        assert code == 0
        before = json.loads((alone / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["eval_loss"]
        assert before == pytest.approx(own["base"]["loss"], rel=1e-5), name


def test_two_processes_learn_a_mixture_as_one_does(train, files, tmp_path):
    """torchrun and gloo: packed chats and running text, with a share; the loss of each source too."""
    dataset = as_flag(files, "plays.txt", {"dataset": "chats.jsonl", "share": 0.5})
    flags = ["--dataset", dataset, *FLAGS, "--max_length", 64, "--max_steps", 2, "--optim", "adamw_torch"]
    flags += ["--batch_size", 2, "--gradient_accumulation_steps", 2, "--compile", "off"]
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    root = Path(train_qlora.__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [
        root / "train_qlora.py",
        "--config",
        root / "tiny" / "config.yaml",
        *flags,
        "--output_dir",
        tmp_path / "two",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, argv)], env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    apart, size = (
        np.sqrt(sum((part**2).sum() for part in parts))
        for parts in ([two[name] - one[name] for name in one], one.values())
    )
    assert apart < 1e-4 * size  # as in test_two_processes_learn_what_one_does
    said = [(tmp_path / name / "training_log.txt").read_text(encoding="utf-8") for name in ("one", "two")]
    losses, others = (re.findall(r"(?:loss|\(?plays.txt|chats.jsonl):? (?:loss )?(\d+\.\d+)", text) for text in said)
    assert len(losses) == len(others) > 8
    assert list(map(float, others)) == pytest.approx(list(map(float, losses)), abs=2e-4)


def test_answers_come_from_each_source_of_chats_in_turn(train, files, tmp_path):
    rows = "".join(
        json.dumps({"prompt": f"Say {i}.", "completion": f"{i}"}) + "\n" for i in range(30)
    )  # pairs beside chats
    (tmp_path / "pairs.jsonl").write_text(rows, encoding="utf-8")
    both = as_flag(Path("/"), str(files / "chats.jsonl"), str(tmp_path / "pairs.jsonl"))
    code, folder = train("--dataset", both, *FLAGS, "--max_steps", 1)
    assert code == 0
    assert train_qlora.main(["--evaluate", "--adapter", str(folder), "--generate", "4", "--max_new_tokens", "2"]) == 0
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [Path(row["dataset"]).name for row in answers] == ["chats.jsonl", "pairs.jsonl"] * 2


def test_a_resumed_mixture_is_the_uninterrupted_one(train, files, tmp_path, monkeypatch):
    """Over two epochs, with rows that are drawn; another share is another run."""
    sources = as_flag(files, {"dataset": "chats.jsonl", "share": 0.2}, {"dataset": "notes.csv", "text_column": "body"})
    flags = ("--dataset", sources, "--max_steps", 8, "--save_steps", 1, "--save_total_limit", 9, *FLAGS)
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    read = []
    step = train_qlora.training_step

    def stopping(run, number, numbers, stop):
        read.append({run.blocks["train"][i].tobytes() for i in numbers})
        if number == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(run, number, numbers, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train_qlora, "training_step", stopping)
        assert train(*flags, output_dir=tmp_path / "parts")[0] == 143
        assert train(*flags, output_dir=tmp_path / "parts")[0] == 0
    assert len(read) == 8
    first = next(i for i in range(1, 8) if set.union(*read[:i]) & read[i])  # where the second epoch begins
    assert set.union(*read[first : 2 * first]) == set.union(*read[:first]), "each epoch has the same rows"
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    other = sources.replace("0.2", "0.3")
    assert train(*flags, "--dataset", other, output_dir=tmp_path / "parts")[0] == 2
    assert checkpoints.latest_checkpoint(tmp_path / "parts", print)[0].name == "checkpoint-8"
