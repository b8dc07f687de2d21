"""From rows to blocks: no token is lost, added or moved, and documents end where they should."""

import copy
import csv
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_qlora
from config import ConfigError, DataConfig
from fast_path import attention as attention_module
from fast_path import families, micro_step
from fast_path.attention import keep_samples_apart, most_samples, use_causal_attention, varlen_obstacle
from fast_path.loss import CausalLMLoss
from quantization_utils import load_tokenizer
from toolkit import data_formats, evaluation
from toolkit.chat_rows import recognise
from toolkit.data_blocks import (
    collate,
    document_end,
    epoch_order,
    first_token,
    make_blocks,
    pack,
    places_of,
    rows_are_lines,
    sample_counts,
    show_block,
    step_windows,
)
from toolkit.data_files import load_rows
from toolkit.data_formats import IGNORED, tokenize_rows, untrained_chat_tokens
from toolkit.data_sources import windows_of
from train_qlora import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT_END, TURN_END = 0, 2  # <|endoftext|> and <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    """A tokenizer that puts <|im_start|> before a text, as a Llama's puts its bos."""
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|im_start|>"
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return other


def settings(dataset: Path | str, **keys) -> DataConfig:
    return DataConfig(**{"dataset": str(dataset), "max_length": 16, "validation_fraction": 0.0, **keys})


def blocks_of(data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 42) -> dict:
    return make_blocks(tokenize_rows(load_rows(data), tokenizer, data), tokenizer, data, seed)


def stream(part) -> list[int]:
    """Return all tokens of all blocks in order."""
    return np.concatenate([part[i] for i in range(len(part))]).tolist()


def documents(part) -> list[list[int]]:
    """Return the tokens between document ends."""
    groups = itertools.groupby(stream(part), key=lambda token: token == DOCUMENT_END)
    return [list(tokens) for is_end, tokens in groups if not is_end]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write_txt(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_jsonl(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


PROSE = [
    "Now is the winter of our discontent made glorious summer.",
    "  Leading spaces, and a tail of them   ",
    "Ein Satz auf Deutsch: größer, schöner, 說中文。",
    "NA",  # what pandas takes for a missing value
    "None",
    "two\nlines in one row\n",
    "A longer row, which is to span more than one block of sixteen tokens, so that cuts fall within it and between.",
]


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("length", [8, 16, 33, 512])
def test_packing_keeps_every_token_in_order(tmp_path, tokenizer, length):
    data = settings(write_jsonl(tmp_path / "rows.jsonl", PROSE), max_length=length)
    part = blocks_of(data, tokenizer)["train"]
    expected = [token for text in PROSE for token in (*ids(tokenizer, text), DOCUMENT_END)]
    if len(expected) % length == 1:
        expected.pop()  # a block of one token predicts nothing
    assert stream(part) == expected
    assert [len(part[i]) for i in range(len(part) - 1)] == [length] * (len(part) - 1)
    assert 2 <= len(part[len(part) - 1]) <= length
    assert (part.tokens, part.supervised) == (len(expected), len(expected) - len(part))
    assert (part.rows, part.documents) == (len(PROSE), len(PROSE))


def test_a_large_text_is_packed_as_plain_concatenation_would(corpus, tokenizer):
    part = blocks_of(settings(corpus, max_length=64), tokenizer)["train"]
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    expected = []
    for line, after in zip(lines, [*lines[1:], "\n"], strict=True):
        if line.strip():
            expected += ids(tokenizer, line)
            expected += [DOCUMENT_END] if not after.strip() else []
    assert stream(part) == expected
    assert part.documents == 60


def test_rows_that_run_on_are_joined_as_they_are(tmp_path, tokenizer):
    text = "To be, or not to be,\n  that is the question:\nWhether 'tis nobler"  # no line end at the end
    part = blocks_of(settings(write_txt(tmp_path / "a.txt", text)), tokenizer)["train"]
    assert tokenizer.decode(stream(part)) == text + "<|endoftext|>"


def test_nothing_but_the_document_end_is_inserted(tmp_path, corpus, tokenizer):
    for dataset in (corpus, write_jsonl(tmp_path / "rows.jsonl", PROSE)):
        tokens = stream(blocks_of(settings(dataset), tokenizer)["train"])
        assert TURN_END not in tokens
        assert tokens[-1] == DOCUMENT_END


# ------------------------------------------------------------------------------------------------ where documents end


def test_a_blank_line_of_a_txt_ends_a_document(tmp_path, tokenizer):
    text = "\n\nfirst line\nsecond line\n\n   \n\t\nthird line\r\n\r\nfourth line\n\n"
    part = blocks_of(settings(write_txt(tmp_path / "a.txt", text)), tokenizer)["train"]
    assert [tokenizer.decode(tokens).strip() for tokens in documents(part)] == [
        "first line\nsecond line",
        "third line",
        "fourth line",
    ]
    assert part.documents == 3


def test_rows_are_documents_or_lines(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["one ", "two ", "", "three"])
    assert [tokenizer.decode(d) for d in documents(blocks_of(settings(path), tokenizer)["train"])] == [
        "one ",
        "two ",
        "three",
    ]
    lines = blocks_of(settings(path, rows="lines"), tokenizer)["train"]
    assert [tokenizer.decode(d) for d in documents(lines)] == ["one two ", "three"]
    txt = write_txt(tmp_path / "a.txt", "one\ntwo\n")
    assert len(documents(blocks_of(settings(txt, rows="documents"), tokenizer)["train"])) == 2


@pytest.mark.parametrize(
    ("dataset", "rows", "lines"),
    [
        ("Salesforce/wikitext", "auto", True),
        ("somebody/WikiText-103", "auto", True),
        ("Salesforce/wikitext", "documents", False),
        ("wikimedia/wikipedia", "auto", False),
        ("someone/texts", "lines", True),
        ("someone/texts", "auto", False),
    ],
)
def test_auto_takes_wikitext_for_lines(dataset, rows, lines):
    assert rows_are_lines(DataConfig(dataset=dataset, rows=rows)) is lines


WIKITEXT = [  # as the hub has it: blank lines are empty rows, headings carry spaces
    "",
    " = Robert Boulter = \n",
    "",
    " Robert Boulter is an English actor . \n",
    "",
    " = = Career = = \n",
    "",
    " = = = 2000 – 2005 = = = \n",
    " He had a starring role in 2001 . \n",
    " a = b = c is no heading \n",
    "",
    " = E = mc² = \n",
    "",
    " A second article . \n",
    " = X = \n",
    " A third . \n",
]


def test_wikitext_articles_end_at_titles_and_not_at_sections(tokenizer):
    data = settings("Salesforce/wikitext")
    rows = DatasetDict(train=Dataset.from_dict({"text": WIKITEXT}))
    part = make_blocks(tokenize_rows(rows, tokenizer, data), tokenizer, data, 42)["train"]
    articles = [tokenizer.decode(tokens) for tokens in documents(part)]
    assert articles == ["".join(WIKITEXT[:11]), "".join(WIKITEXT[11:14]), "".join(WIKITEXT[14:])]


def test_a_folder_whose_path_says_wikitext_does_not_change_a_txt(tmp_path, tokenizer):
    folder = tmp_path / "wikitext-project"
    folder.mkdir()
    part = blocks_of(settings(write_txt(folder / "own.txt", "one\n\ntwo\n")), tokenizer)["train"]
    assert part.documents == 2


def test_the_document_end_is_endoftext_or_else_the_end_of_sequence(tokenizer):
    assert tokenizer.eos_token_id == TURN_END
    assert document_end(tokenizer) == DOCUMENT_END
    bare = copy.deepcopy(tokenizer)
    bare.get_vocab = lambda: {"a": 5}
    assert document_end(bare) == TURN_END
    bare.eos_token = None
    with pytest.raises(ConfigError, match="neither"):
        document_end(bare)


def test_a_tokenizer_that_adds_bos_gets_one_at_each_document(tmp_path, with_bos):
    assert (first_token(with_bos), with_bos("a b")["input_ids"][0]) == ([1], 1)
    path = write_jsonl(tmp_path / "rows.jsonl", ["one row", "another row", "a third"])
    tokens = stream(blocks_of(settings(path), with_bos)["train"])
    expected = [[1, *ids(with_bos, text), DOCUMENT_END] for text in ("one row", "another row", "a third")]
    assert tokens == sum(expected, [])
    lines = write_txt(tmp_path / "a.txt", "one\ntwo\n\nthree\n")  # one a document, none a line
    tokens = stream(blocks_of(settings(lines), with_bos)["train"])
    assert [i for i, token in enumerate(tokens) if token == 1] == [0, tokens.index(DOCUMENT_END) + 1]


def test_a_tokenizer_that_adds_no_bos_gets_none(tokenizer):
    assert first_token(tokenizer) == []


# ------------------------------------------------------------------------------------------------ the held-out part


@pytest.fixture(scope="module")
def hundred(tmp_path_factory) -> Path:
    """A .jsonl of 100 rows of about 24 tokens that name their number."""
    path = tmp_path_factory.mktemp("hundred") / "rows.jsonl"
    return write_jsonl(path, [f"row {i}: " + "the quick brown fox jumps over it " * 2 for i in range(100)])


def numbers(part, tokenizer) -> list[int]:
    """Return the numbers of the rows of `hundred` in a part."""
    return [int(tokenizer.decode(d).split()[1].rstrip(":")) for d in documents(part)]


def test_the_held_out_rows_are_picked_by_seed(hundred, tokenizer):
    data = settings(hundred, validation_fraction=0.05)
    first, again, other = (blocks_of(data, tokenizer, seed) for seed in (1, 1, 2))
    held = numbers(first["validation"], tokenizer)
    assert len(held) == 5
    assert sorted(held + numbers(first["train"], tokenizer)) == list(range(100))
    assert numbers(first["train"], tokenizer) == sorted(numbers(first["train"], tokenizer))  # their order is kept
    assert numbers(again["validation"], tokenizer) == held
    assert numbers(other["validation"], tokenizer) != held


def test_documents_are_held_out_whole(corpus, tokenizer):
    parts = blocks_of(settings(corpus, validation_fraction=0.1), tokenizer)
    everything = documents(blocks_of(settings(corpus), tokenizer)["train"])
    held, kept = documents(parts["validation"]), documents(parts["train"])
    assert len(held) == 6
    assert [d for d in everything if d in held] == held
    assert [d for d in everything if d not in held] == kept


def test_the_held_out_part_is_at_least_one_block(hundred, tokenizer):
    data = settings(hundred, validation_fraction=0.001, max_length=256)
    part = blocks_of(data, tokenizer)["validation"]
    assert 256 <= part.tokens < 256 + 2 * 30


def test_unpacked_a_row_is_a_block_so_the_fraction_alone_decides(hundred, tokenizer):
    data = settings(hundred, validation_fraction=0.05, max_length=512, packing=False)
    assert blocks_of(data, tokenizer)["validation"].rows == 5


def test_two_documents_of_which_one_is_too_short_still_hold_out_a_block(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["a", "the quick brown fox jumps " * 60])
    for seed in range(4):
        parts = blocks_of(settings(path, validation_fraction=0.05), tokenizer, seed)
        assert parts["validation"].tokens >= 16
        assert parts["train"].tokens > 4 * parts["validation"].tokens


def test_of_a_single_row_the_last_part_is_held_out(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["the quick brown fox jumps over the lazy dog. " * 40])
    whole = stream(blocks_of(settings(path), tokenizer)["train"])
    for fraction, blocks in ((0.001, 1), (0.2, round(0.2 * -(-len(whole) // 16)))):
        parts = blocks_of(settings(path, validation_fraction=fraction), tokenizer)
        assert stream(parts["train"]) + stream(parts["validation"]) == whole
        assert len(parts["validation"]) == blocks


def test_of_a_single_document_the_last_lines_are_held_out_before_rows_are_limited(tmp_path, tokenizer):
    lines = [f"line {i} of a text without a blank one\n" for i in range(200)]
    path = write_txt(tmp_path / "a.txt", "".join(lines))
    parts = blocks_of(settings(path, validation_fraction=0.1), tokenizer)
    held = tokenizer.decode(stream(parts["validation"]))
    assert held.endswith("line 199 of a text without a blank one\n<|endoftext|>")
    assert parts["train"].tokens > 7 * parts["validation"].tokens
    few = blocks_of(
        settings(path, validation_fraction=0.1, max_train_samples=10, max_eval_samples=5, max_length=16), tokenizer
    )
    assert (few["train"].rows, few["validation"].rows) == (10, 5)
    assert stream(few["train"])[:-1] == ids(tokenizer, "".join(lines[:10]))
    assert "line 0 " not in tokenizer.decode(stream(few["validation"]))
    assert stream(few["validation"])[:16] == stream(parts["validation"])[:16]


def test_a_single_document_too_short_to_split_is_refused(tmp_path, tokenizer):
    path = write_txt(tmp_path / "a.txt", "too short\n")
    with pytest.raises(ConfigError, match="data.dataset.*too short"):
        blocks_of(settings(path, validation_fraction=0.05), tokenizer)
    assert blocks_of(settings(path), tokenizer)["validation"] is None


def test_samples_are_limited_after_the_split(hundred, tokenizer):
    data = settings(hundred, validation_fraction=0.2)
    whole = blocks_of(data, tokenizer)
    few = blocks_of(settings(hundred, validation_fraction=0.2, max_train_samples=7, max_eval_samples=3), tokenizer)
    assert numbers(few["train"], tokenizer) == numbers(whole["train"], tokenizer)[:7]
    assert numbers(few["validation"], tokenizer) == numbers(whole["validation"], tokenizer)[:3]


def test_a_validation_split_is_used_and_an_absent_one_held_out(tmp_path, tokenizer):
    folder = tmp_path / "both"
    folder.mkdir()
    write_txt(folder / "train.txt", "learn this\n\nand this\n")
    write_txt(folder / "validation.txt", "never this one here\n")
    parts = blocks_of(settings(folder, validation_fraction=0.5), tokenizer)
    assert tokenizer.decode(documents(parts["validation"])[0]) == "never this one here\n"
    assert parts["train"].documents == 2
    for absent in ("dev", None):  # too little for a block on each side: half and half
        parts = blocks_of(settings(folder, validation_split=absent, validation_fraction=0.5), tokenizer)
        assert (parts["train"].documents, parts["validation"].documents) == (1, 1)
        assert "never" not in tokenizer.decode(stream(parts["validation"]))


# ------------------------------------------------------------------------------------------------ files


def test_every_file_format_gives_the_same_blocks(tmp_path, tokenizer):
    texts = [text.replace("\n", " ") for text in PROSE]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.json").write_text(json.dumps([{"text": text, "n": 1} for text in texts]), encoding="utf-8")
    with open(tmp_path / "c.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *[[text, i] for i, text in enumerate(texts)]])
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    write_txt(tmp_path / "e.txt", "\n".join(texts))
    streams = [
        stream(blocks_of(settings(tmp_path / name, rows="documents", max_length=512), tokenizer)["train"])
        for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")
    ]
    assert streams[1:] == streams[:1] * 3
    assert streams[0] == [token for text in texts for token in (*ids(tokenizer, text), DOCUMENT_END)]
    lines = stream(blocks_of(settings(tmp_path / "e.txt", rows="documents", max_length=512), tokenizer)["train"])
    assert tokenizer.decode(lines) == "\n<|endoftext|>".join(texts) + "<|endoftext|>"  # a line keeps its end


def test_a_folder_is_read_as_its_files(tmp_path, tokenizer):
    folder = tmp_path / "own data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["first"])
    write_jsonl(folder / "b.jsonl", ["second"])
    (folder / "README.md").write_text("# not data\n", encoding="utf-8")
    (folder / "LICENSE").write_text("not data\n", encoding="utf-8")
    part = blocks_of(settings(folder), tokenizer)["train"]
    assert [tokenizer.decode(d) for d in documents(part)] == ["first", "second"]


@pytest.mark.parametrize("name", ["with space.txt", "one[1].txt", "what?.txt", "a*b.txt", "größer說.txt", "UPPER.TXT"])
def test_names_of_files_are_names_and_not_patterns(tmp_path, tokenizer, name):
    path = write_txt(tmp_path / name, "some text that is here\n")
    assert blocks_of(settings(path), tokenizer)["train"].rows == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "größer\n"),
        ("a.csv", "text\ngrößer\n"),
        ("a.jsonl", '{"text": "größer"}\n'),
        ("a.json", '[{"text": "größer"}]'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    part = blocks_of(settings(tmp_path / name), tokenizer)["train"]
    assert tokenizer.decode(documents(part)[0]).strip() == "größer"


def test_a_text_of_another_column(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["one", "two"], column="body")
    assert blocks_of(settings(path, text_column="body"), tokenizer)["train"].rows == 2


def test_missing_and_empty_rows_are_dropped(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["one", None, "", "  \n", "two"])
    part = blocks_of(settings(path), tokenizer)["train"]
    assert (part.rows, [tokenizer.decode(d) for d in documents(part)]) == (2, ["one", "two"])


@pytest.mark.parametrize("texts", [[None, None], ["", ""], [" ", "\n"]])
def test_rows_without_any_text_are_refused(tmp_path, tokenizer, texts):
    with pytest.raises(ConfigError, match=r"data\.dataset.*no text"):
        blocks_of(settings(write_jsonl(tmp_path / "rows.jsonl", texts)), tokenizer)


@pytest.mark.parametrize("opening", ['{"a":', "[", '{"a":[],"b":', '{"a":"]","b":', '{"a":"\\\\","b":', "[[],"])
def test_json_that_is_too_deep_is_refused_in_one_line(tmp_path, opening):
    for name in ("a.jsonl", "b.json"):
        path = write_txt(tmp_path / name, '{"text": "one", "more": 1}\n' + opening * 50_000 + "1\n")
        with pytest.raises(ConfigError, match=rf"^data\.dataset: cannot read .*{name}: line 2: nested too deeply$"):
            load_rows(settings(path))
    many = write_jsonl(tmp_path / "many.jsonl", ["[{", "}]"] * 5000)
    assert len(load_rows(settings(many))["train"]) == 10_000  # width is no depth


@pytest.mark.parametrize(
    "text", ["[ " * 5000, "\x1b[31m" * 5000, "if(x){ " * 5000, '\\"[' * 5000, "\\" * 5001 + "[" * 5000]
)
def test_brackets_in_a_text_are_no_depth(tmp_path, text):
    rows = load_rows(settings(write_jsonl(tmp_path / "a.jsonl", [text, "two"])))["train"]
    assert rows["text"] == [text, "two"]


def test_reader_that_raises_anything_is_one_line(tmp_path, monkeypatch):
    def load(*_, **__):
        raise ImportError("please install 'teich'\nor not")

    monkeypatch.setattr(datasets.Dataset, "from_file", load)
    path = write_txt(tmp_path / "a.txt", "one\n")
    with pytest.raises(ConfigError, match=r"^data\.dataset: cannot read .*: ImportError: please install 'teich'$"):
        load_rows(settings(path))


def test_tokenising_again_finds_the_cache(tmp_path, tiny_model):
    path = write_jsonl(tmp_path / "rows.jsonl", PROSE)
    data, prints = settings(path), []
    for _ in range(2):
        tokenizer = load_tokenizer(str(tiny_model))
        tokenized = tokenize_rows(load_rows(data), tokenizer, data)
        prints.append(tokenized["train"]._fingerprint)
        tokenizer("a", padding="max_length", truncation=True, max_length=4)  # what an earlier call leaves in it
    assert prints[0] == prints[1]
    changed = write_jsonl(path, [*PROSE, "one row more"])
    assert len(tokenize_rows(load_rows(settings(changed)), tokenizer, data)["train"]) == len(PROSE) + 1


# ----------------------------------------------------------------------------------------------- unpacked rows and pads


def test_unpacked_no_block_spans_two_rows(tmp_path, tokenizer):
    part = blocks_of(settings(write_jsonl(tmp_path / "rows.jsonl", PROSE), packing=False), tokenizer)["train"]
    expected = []
    for text in PROSE:
        row = [*ids(tokenizer, text), DOCUMENT_END]
        expected += [row[i : i + 16] for i in range(0, len(row), 16)]
    if len(expected[-1]) == 1:
        expected.pop()
    assert [part[i].tolist() for i in range(len(part))] == expected


def test_pads_are_unlabelled_by_position_and_not_by_id(tmp_path, tokenizer):
    texts = ["say <|endoftext|> and <|im_end|> in the text <|endoftext|>", "short", "a row of a middle length, this is"]
    part = blocks_of(settings(write_jsonl(tmp_path / "rows.jsonl", texts), packing=False, max_length=64), tokenizer)[
        "train"
    ]
    assert tokenizer.pad_token_id == DOCUMENT_END
    batch = collate([part[i] for i in range(3)], tokenizer.pad_token_id)
    for i, text in enumerate(texts):
        row = [*ids(tokenizer, text), DOCUMENT_END]
        pads = batch["labels"].shape[1] - len(row)
        assert batch["input_ids"][i].tolist() == row + [DOCUMENT_END] * pads
        assert batch["labels"][i].tolist() == row + [IGNORED] * pads
    assert {DOCUMENT_END, TURN_END} <= set(batch["labels"][0].tolist())


def test_packed_text_that_contains_special_tokens_keeps_its_labels(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["one <|endoftext|> two <|im_end|> three"])
    part = blocks_of(settings(path), tokenizer)["train"]
    batch = collate([part[0]], tokenizer.pad_token_id)
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


# ------------------------------------------------------------------------------------------------ steps and epochs


@pytest.mark.parametrize(("blocks", "window"), [(10, 4), (8, 4), (3, 16), (1, 1), (17, 5)])
def test_each_epoch_meets_each_block_once(blocks, window):
    steps = -(-blocks // window)
    seen = list(itertools.islice(step_windows(blocks, window, seed=7, step=0), 3 * steps))
    assert [epoch for epoch, _ in seen] == [epoch for epoch in range(3) for _ in range(steps)]
    orders = []
    for epoch in range(3):
        windows = [numbers for e, numbers in seen if e == epoch]
        orders.append(np.concatenate(windows).tolist())
        assert sorted(orders[-1]) == list(range(blocks))
        assert [len(w) for w in windows[:-1]] == [window] * (steps - 1)
        assert len(windows[-1]) == blocks - window * (steps - 1)
    if blocks > 8:
        assert orders[0] != orders[1] != orders[2]
        assert epoch_order(blocks, 7, 0).tolist() != epoch_order(blocks, 8, 0).tolist()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 11])
def test_steps_go_on_from_anywhere(step):
    whole = list(itertools.islice(step_windows(10, 4, seed=7, step=0), 15))
    rest = list(itertools.islice(step_windows(10, 4, seed=7, step=step), 15 - step))
    for (epoch, numbers), (expected_epoch, expected) in zip(rest, whole[step:], strict=True):
        assert epoch == expected_epoch
        np.testing.assert_array_equal(numbers, expected)


# ------------------------------------------------------------------------------------------ the tutorial's own function


def tutorial_dataset(corpus: Path, tokenizer, data: DataConfig, keep: tuple[str, ...]) -> DatasetDict:
    """What the tutorial tells people to write: unpacked, cut, padded, no labels."""
    dataset = datasets.load_dataset("text", data_files=str(corpus))

    def tokenize(examples):
        return tokenizer(examples["text"], truncation=True, max_length=data["max_length"], padding="max_length")

    tokenized = dataset.map(tokenize, batched=True)
    drop = [name for name in tokenized["train"].column_names if name not in keep]
    return tokenized.remove_columns(drop)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
@pytest.mark.parametrize(("dataset", "rows"), [(None, "auto"), ("a/wikitext", "auto"), ("a/wikitext", "lines")])
def test_the_tutorials_own_dataset_gives_blocks_without_pads(corpus, tokenizer, fraction, dataset, rows):
    """Each row a document, whatever data.dataset names, since that was not read; lines where somebody says so."""
    keys = {"max_length": 29, "rows": rows}
    data = settings(dataset or corpus, validation_fraction=fraction, **keys)
    tokenized = tutorial_dataset(corpus, tokenizer, data, ("text", "input_ids", "attention_mask"))
    parts = make_blocks(tokenized, tokenizer, data, 42)
    whole = stream(make_blocks(tokenized, tokenizer, settings(dataset or corpus, **keys), 42)["train"])
    lines = corpus.read_text(encoding="utf-8").splitlines()
    expected = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        ends = line and (rows == "auto" or not after)  # a blank line is between two documents
        expected += ids(tokenizer, line)[:29] + ([DOCUMENT_END] if ends else [])
    assert whole == expected
    assert (parts["validation"] is None) is (fraction == 0)
    held = parts["validation"].tokens if fraction else 0
    assert 0 <= len(whole) - parts["train"].tokens - held <= 2  # the lonely last token of a part predicts nothing
    assert [len(parts["train"][i]) for i in range(len(parts["train"]) - 1)] == [29] * (len(parts["train"]) - 1)


def test_the_tutorials_dataset_without_its_text_column(corpus, tokenizer):
    data = settings(corpus, max_length=31, rows="documents")
    tokenized = tutorial_dataset(corpus, tokenizer, data, ("input_ids", "attention_mask"))
    lines = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line]
    part = make_blocks(tokenized, tokenizer, data, 42)["train"]
    assert stream(part) == [token for line in lines for token in (*ids(tokenizer, line)[:31], DOCUMENT_END)]


def test_a_tokenizer_that_pads_on_the_left(corpus, tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    data = settings(corpus, max_length=32)
    parts = [
        stream(
            make_blocks(tutorial_dataset(corpus, t, data, ("text", "input_ids", "attention_mask")), t, data, 1)["train"]
        )
        for t in (tokenizer, left)
    ]
    assert parts[0] == parts[1]


def test_a_dataset_of_another_form_is_refused(tokenizer, corpus):
    data = settings(corpus)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
    with pytest.raises(ConfigError, match="prepare_dataset.*split 'train'"):
        make_blocks(DatasetDict(test=rows), tokenizer, data, 1)
    with pytest.raises(ConfigError, match="prepare_dataset.*split 'train'"):
        make_blocks(rows, tokenizer, data, 1)
    with pytest.raises(ConfigError, match="prepare_dataset.*input_ids"):
        make_blocks(DatasetDict(train=Dataset.from_dict({"text": ["a"]})), tokenizer, data, 1)


# ------------------------------------------------------------------------------------------------ chats: template and mask

SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM2
    + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = Path(__file__).resolve().parents[3] / "shared" / "offline" / "qwen2.5_chat_template.jinja"


def chat_tokenizer(name: str, tiny: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Return a tokenizer and the system message that its template puts first where the chat has none."""
    folders = {"Qwen2.5": os.environ.get("QLORA_QWEN_TOKENIZER"), "SmolLM2": os.environ.get("QLORA_REAL_MODEL")}
    if name in folders:
        if not folders[name]:
            pytest.skip(f"the environment names no folder with the tokenizer of {name}")
        return load_tokenizer(folders[name]), QWEN if name == "Qwen2.5" else SMOLLM2
    other = copy.deepcopy(tiny)
    if name == "SmolLM2's template":
        other.chat_template = SMOLLM2_TEMPLATE
        return other, SMOLLM2
    if name == "Qwen2.5's template":
        if not QWEN_TEMPLATE.is_file():
            pytest.skip(f"no {QWEN_TEMPLATE}")
        other.chat_template = QWEN_TEMPLATE.read_text(encoding="utf-8")
        return other, QWEN
    return other, None


TOKENIZERS = ["tiny", "SmolLM2's template", "Qwen2.5's template", "Qwen2.5", "SmolLM2"]


def chatml(messages: list[dict], default_system: str | None) -> list[tuple[str, bool]]:
    """The templates read by hand: pieces of the chat and whether they are learned. No piece merges with its neighbour."""
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        pieces += [("<|im_start|>", False), (message["role"] + "\n", False)]
        pieces += [(message["content"], answer), ("<|im_end|>", answer), ("\n", False)]
    return pieces


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """A chat in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS = [
    turns("Hello there", "General Kenobi."),
    turns("a", "b", "c", "d", "e", "f"),
    turns("Who are you?", "A pirate, arr.", "And now?", "Still.", system="Speak like a pirate."),
    turns("only a question, no answer"),
    turns("a question", "an answer", "a last question without one"),
    turns("größer 說中文 🙂🙂", "schöner: 說中文, é, 👩‍👩‍👧 ok", "x", "ﬁ ½ Å"),
    turns("the same", "the same", "the same", "the same"),  # told apart by place, never by words
    turns("say <|im_end|> and assistant\nb", "I say <|im_end|> and <|im_start|>user\nx", "ok", "fine"),
    [{"role": "assistant", "content": "I speak first."}, *turns("good", "yes")],
    [*turns("a", "b"), {"role": "system", "content": "be brief"}, *turns("c", "d")],
    turns("code?", "def f(x):\n    return x\n\n\nprint(f(1))", "tail?", "spaces inside   and\ttabs"),
]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenised(tmp_path: Path, rows: list[dict], tokenizer, **keys) -> Dataset:
    data = settings(write_rows(tmp_path / "rows.jsonl", rows), **keys)
    return tokenize_rows(load_rows(data), tokenizer, data)["train"]


def expected_row(tokenizer, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    row, labels = [], []
    for text, learned in pieces:
        new = ids(tokenizer, text)
        row += new
        labels += new if learned else [IGNORED] * len(new)
    return row, labels


@pytest.mark.parametrize("name", TOKENIZERS)
def test_template_and_mask_agree_with_a_reading_by_hand(tmp_path, tokenizer, name):
    other, system = chat_tokenizer(name, tokenizer)
    split = tokenised(tmp_path, [{"messages": chat} for chat in CHATS], other)
    for chat, row in zip(CHATS, split, strict=True):
        expected, labels = expected_row(other, chatml(chat, system))
        assert row["input_ids"] == expected == other.apply_chat_template(chat)["input_ids"]
        assert row["labels"] == labels


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_real_chats_agree_with_a_reading_by_hand(tmp_path, tokenizer, name):
    path = os.environ.get("QLORA_CHATS")
    if not path:
        pytest.skip("QLORA_CHATS names no chat.jsonl of ../shared/offline/build_corpus.py")
    other, system = chat_tokenizer(name, tokenizer)
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 400)]
    split = tokenised(tmp_path, rows, other)
    compared = 0
    for chat, row in zip(rows, split, strict=True):
        if all(message["content"].strip() == message["content"] != "" for message in chat["messages"]):
            assert (row["input_ids"], row["labels"]) == expected_row(other, chatml(chat["messages"], system))
            compared += 1
    assert compared > 300


def learned(tokenizer, row: dict) -> list[str]:
    """Return the decoded runs of what is learned."""
    runs = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for answer, run in runs if answer]


def with_template(tokenizer, template: str | None):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


SPACED = turns("  padded question ", "  padded answer \n", "\nq", "\n\na\n")


def test_spaces_around_an_answer_are_learned_where_the_template_keeps_them(tmp_path, tokenizer):
    (row,) = tokenised(tmp_path, [{"messages": SPACED}], tokenizer)
    assert learned(tokenizer, row) == ["  padded answer \n<|im_end|>", "\n\na\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (  # Llama 2: trims, and a space before the end
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}"
            "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
            ["padded answer <|im_end|>", "a <|im_end|>"],
        ),
        (  # Gemma: another name for the role, trims, refuses a system message
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
            "{% endfor %}",
            ["padded answer<|im_end|>", "a<|im_end|>"],
        ),
        (  # Phi: something after the last turn, which is no part of it
            "{% for m in messages %}{{ m.role + '|' + m.content + '<|im_end|>' }}{% endfor %}{{ '<|endoftext|>' }}",
            ["  padded answer \n<|im_end|>", "\n\na\n<|im_end|>"],
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}", ["padded answer", "a"]),
        (None, ["  padded answer \n<|im_end|>", "\n\na\n<|im_end|>"]),
    ],
)
def test_other_templates(tmp_path, tokenizer, template, runs):
    other = with_template(tokenizer, template)
    (row,) = tokenised(tmp_path, [{"messages": SPACED}], other)
    assert [run.lstrip() for run in learned(other, row)] == [run.lstrip() for run in runs]
    if template is not None:
        assert row["input_ids"] == other.apply_chat_template(SPACED)["input_ids"]


def test_without_a_template_a_plain_one_is_used_and_said(tmp_path, tokenizer):
    other = with_template(tokenizer, None)
    data = settings(write_rows(tmp_path / "a.jsonl", [{"messages": turns("hi", "ho", "he", "hu")}]))
    split = tokenize_rows(load_rows(data), other, data)
    text = "User: hi\nAssistant: ho<|im_end|>\nUser: he\nAssistant: hu<|im_end|>\n"
    assert tokenizer.decode(split["train"][0]["input_ids"]) == text
    assert "as it has no chat template" in split.source


@pytest.mark.parametrize(
    ("template", "chat", "problem"),
    [
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
            turns("a", "<think>b</think>c"),
            "turn 2: the chat template leaves out the thought",
        ),
        ("{{ raise_exception('roles must alternate') }}", turns("a", "b"), "roles must alternate"),
    ],
)
def test_a_template_that_hides_the_answers_is_refused(tmp_path, tokenizer, template, chat, problem):
    with pytest.raises(ConfigError, match=rf"data\.dataset: row 1: .*{problem}"):
        tokenised(tmp_path, [{"messages": chat}], with_template(tokenizer, template))


def test_a_template_that_moves_the_turns_about_is_followed(tmp_path, tokenizer):
    other = with_template(tokenizer, "{% for m in messages | reverse %}{{ m.content | upper + eos_token }}{% endfor %}")
    (row,) = tokenised(tmp_path, [{"messages": turns("a", "b", "c", "d")}], other)
    assert learned(other, row) == ["D<|im_end|>", "B<|im_end|>"]


def test_not_only_answers_are_learned_on_request(tmp_path, tokenizer):
    (row,) = tokenised(tmp_path, [{"messages": CHATS[1]}], tokenizer, completion_only=False)
    assert row["labels"] == row["input_ids"]


# ------------------------------------------------------------------------------------------------ formats


def test_the_same_chat_in_every_form_is_the_same_row(tmp_path, tokenizer):
    question, answer = "What is it?\n\nA riddle", "An egg."
    forms = [
        {"messages": turns(question, answer)},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"prompt": question, "completion": answer},
        {"instruction": "What is it?", "input": "A riddle", "output": answer},
        {"instruction": question, "input": "", "output": answer},
        {"instruction": question, "input": None, "output": answer, "text": "the same once more"},
        {"instruction": question, "output": answer, "category": "riddles"},
        {"messages": [*turns(question, answer)], "text": "rendered by somebody", "labels": 3},
    ]
    rows = [tokenised(tmp_path, [form, form], tokenizer)[1] for form in forms]
    assert rows[1:] == rows[:1] * (len(forms) - 1)
    assert learned(tokenizer, rows[0]) == ["An egg.<|im_end|>"]


def test_sharegpt_with_a_system_turn(tmp_path, tokenizer):
    rows = [[("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in row]} for row in rows]
    (row,) = tokenised(tmp_path, rows, tokenizer)
    assert (row["input_ids"], row["labels"]) == expected_row(
        tokenizer, chatml(turns("a", "b", "c", "d", system="Be brief."), None)
    )


@pytest.mark.parametrize(
    ("columns", "keys", "expected"),
    [
        (["text"], {}, ("text", ("text",))),
        (["text", "messages"], {}, ("chat", ("messages",))),
        (["text", "messages"], {"format": "text"}, ("text", ("text",))),
        (["body", "messages"], {"text_column": "body"}, ("text", ("body",))),
        (["conversations", "id"], {}, ("chat", ("conversations",))),
        (["instruction", "input", "output", "text"], {}, ("prompt", ("instruction", "input", "output"))),
        (["instruction", "output"], {"format": "prompt"}, ("prompt", ("instruction", "output"))),
        (["prompt", "completion", "messages"], {"format": "prompt"}, ("prompt", ("prompt", "completion"))),
    ],
)
def test_formats_are_recognised_by_their_columns(columns, keys, expected):
    assert recognise(columns, DataConfig(**keys)) == expected


@pytest.mark.parametrize(
    ("columns", "keys", "problem"),
    [
        (["body"], {}, r"data\.text_column: no column 'text' in .*it has body; chats need messages or"),
        (["text"], {"format": "chat"}, r"data\.format: chat needs the columns messages or conversations; .* has text"),
        (["text"], {"format": "prompt"}, r"data\.format: prompt needs the columns prompt \+ completion or instruction"),
        (["id", "output", "instruction"], {"text_column": "body"}, r"data\.text_column: no column 'body' in"),
        (["prompt;completion"], {}, "parted by commas, these by semicolons"),
        (["messages"], {"format": "text"}, r"data\.text_column: no column 'text' in .*it has messages$"),
    ],
)
def test_columns_that_are_not_there_are_named(columns, keys, problem):
    with pytest.raises(ConfigError, match=problem):
        recognise(columns, DataConfig(**keys))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "Hello"}, "expected a list of turns in column 'messages', got 'Hello'"),
        ({"messages": ["Hello"]}, "expected a list of turns"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "turn 1: expected a role .*got 'wizard'"),
        ({"messages": [*turns("a"), {"role": "assistant", "content": None}]}, "turn 2: expected a text, got None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "turn 1: expected parts that are texts, got image",
        ),
        (
            {"messages": [*turns("a"), {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "turn 2: expected a call .*got '1'",
        ),
        ({"prompt": "a", "completion": None}, "column 'completion' is empty"),
        ({"prompt": 5, "completion": "a"}, "turn 1: expected a text"),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_number(tmp_path, tokenizer, row, problem):
    with pytest.raises(ConfigError, match=rf"data\.dataset: row 1: .*{problem}"):
        tokenised(tmp_path, [row], tokenizer)


def test_the_line_on_a_chat_marks_what_is_learned(tmp_path, tokenizer):
    data = settings(write_rows(tmp_path / "a.jsonl", [{"messages": turns("hi\nyou", "ho")}] * 3), max_length=64)
    part = blocks_of(data, tokenizer)["train"]
    assert part.source == "chat, from column messages, through the tokenizer's chat template"
    one = "<|im_start|>user\\nhi\\nyou<|im_end|>\\n<|im_start|>assistant\\n[[ho<|im_end|>]]\\n"
    assert show_block(part[0], tokenizer).startswith(one + one[:12])
    text = blocks_of(settings(write_jsonl(tmp_path / "b.jsonl", PROSE)), tokenizer)["train"]
    assert text.source == "text, from column text, each row a document"
    lines = blocks_of(settings(write_jsonl(tmp_path / "c.jsonl", PROSE), rows="lines"), tokenizer)["train"]
    assert lines.source == "text, from column text, each row a line of one running text"
    assert show_block(text[0], tokenizer).startswith("Now is the winter")


WIDE = "量化是把權重存成較少的位元，表情🙂也算一個字；naïve café。" * 3


def test_a_text_is_shown_in_whole_characters(tokenizer):
    """Wherever a block begins and ends: the tiny vocabulary has three tokens for most of these characters."""
    ids = np.array(tokenizer(WIDE, add_special_tokens=False)["input_ids"])
    assert len(ids) > 1.5 * len(WIDE)
    for start in range(12):
        for stop in range(start + 1, start + 45):
            shown = show_block(ids[start:stop], tokenizer)
            assert shown.endswith(" …") and shown.removesuffix(" …") in WIDE
    assert show_block(ids[:40], tokenizer).startswith("量化是把權重")


@pytest.mark.parametrize("cut", range(6))
def test_marks_of_what_is_learned_stand_between_whole_characters(tokenizer, cut):
    """A character of which a part is learned belongs to the side where it begins."""
    ids = np.array(tokenizer(WIDE[:20], add_special_tokens=False)["input_ids"])
    for first in range(1, len(ids)):
        learned = np.where(
            (np.arange(len(ids)) >= first) & (np.arange(len(ids)) < first + 7), ids, data_formats.IGNORED
        )
        block = np.stack([ids, learned])[:, : len(ids) - cut]
        shown = show_block(block, tokenizer)
        plain = shown.replace("[[", "").replace("]]", "")
        assert WIDE.startswith(plain) and len(plain) >= 18 - cut
        before = tokenizer.decode(ids[:first])
        if first < len(ids) - cut and not before.endswith("\ufffd"):
            assert shown.startswith(f"{before}[[")


def test_a_sample_that_ends_inside_a_character_leaves_the_next_one_alone(tokenizer):
    ids = tokenizer("位元", add_special_tokens=False)["input_ids"]
    begin = tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[:-1]).startswith("位\ufffd")
    labels = [*ids[:-1], *[data_formats.IGNORED] * len(begin)]
    block = np.array([[*ids[:-1], *begin], labels])
    assert show_block(block, tokenizer) == "[[位]]<|im_start|>user"


# ------------------------------------------------------------------------------------------------ rows without a lesson


def test_rows_of_which_nothing_is_learned_are_named_and_left_out(tmp_path, tokenizer):
    long = "word " * 40
    rows = [turns("q", "a"), turns("q"), turns(long, "a"), [], turns("q", "a", long, "b"), turns(long, "x")] * 2
    data = settings(write_rows(tmp_path / "a.jsonl", [{"messages": row} for row in rows]), max_length=32)
    part = blocks_of(data, tokenizer)["train"]
    assert part.rows == 4
    assert part.notes[:2] == (
        "train: 4 of 12 rows are left out, since their first 32 tokens (data.max_length) hold nothing to train on: "
        "rows 3, 6, 9, 12",
        "train: 4 of 12 rows are left out, which hold nothing to train on, such as a chat without an answer: rows 2, 4, 8, 10",
    )
    assert part.notes[2].startswith("train: 6 of 12 rows are cut at data.max_length: ")
    assert part.supervised == sum(int((part[i][1] != IGNORED).sum()) for i in range(len(part)))


def test_where_nothing_is_learned_at_all_the_data_are_refused(train, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns("word " * 40, "a")}] * 3)
    code, folder = train("--dataset", path, "--max_length", 32)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not folder.exists()
    assert line.startswith(f"error: data.dataset: {path} has nothing to train on; train: 3 of 3 rows are left out")
    assert line.endswith("rows 1, 2, 3")


def test_a_run_says_how_many_chats_are_cut(train, tmp_path):
    rows = [turns("q", "a " * 9), turns("q", "a " * 90), turns("q", "a " * 9), turns("a " * 90, "a")] * 4
    path = write_rows(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    code, folder = train("--dataset", path, "--max_steps", 1)
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    assert code == 0
    assert "data: train: 4 of 16 rows are left out, since their first 64 tokens" in log
    assert re.search(r"data: train: 8 of 16 rows are cut at data\.max_length: \d\d\.\d% of the tokens are lost", log)


def test_samples_are_held_out_by_seed_and_limited_after_it(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns(f"number {i}", f"it is {i}")} for i in range(50)])
    data = settings(path, max_length=64, validation_fraction=0.1, packing=False)

    def of(part) -> list[int]:
        return [int(re.search(r"number (\d+)", tokenizer.decode(part[i][0]))[1]) for i in range(len(part))]

    one, again, other = (blocks_of(data, tokenizer, seed) for seed in (1, 1, 2))
    assert len(of(one["validation"])) == 5
    assert sorted(of(one["train"]) + of(one["validation"])) == list(range(50))
    assert of(one["validation"]) == of(again["validation"]) != of(other["validation"])
    few = blocks_of(dataclasses.replace(data, max_train_samples=7, max_eval_samples=2), tokenizer, 1)
    assert (of(few["train"]), of(few["validation"])) == (of(one["train"])[:7], of(one["validation"])[:2])
    single = settings(write_rows(tmp_path / "b.jsonl", [{"messages": turns("a", "b")}]), validation_fraction=0.1)
    with pytest.raises(ConfigError, match="only 1 row to train on, too few to hold one out"):
        blocks_of(single, tokenizer)


# ------------------------------------------------------------------------------------------------ untrained chat tokens


def embedding_model(rows: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding.from_pretrained(rows))


def test_chat_tokens_that_were_never_trained_are_named(tokenizer, tiny_model):
    rows = torch.randn(len(tokenizer) + 16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert untrained_chat_tokens(embedding_model(rows), tokenizer) == []
    zero, shared, drifted = rows.clone(), rows.clone(), rows.clone()
    zero[1] = 0
    shared[TURN_END] = shared[700]
    # As untrained rows of a trained model: all moved the same way, none by a text.
    drifted[[1, TURN_END, *range(len(tokenizer), len(rows))]] = (1 + 0.2 * torch.randn(18, 64)).bfloat16()
    named = [untrained_chat_tokens(embedding_model(table), tokenizer) for table in (zero, shared, drifted)]
    assert [re.findall(r"<\|\w+\|>", line.split(": ")[1]) for (line,) in named] == [
        ["<|im_start|>"],
        ["<|im_end|>"],
        ["<|im_start|>", "<|im_end|>"],
    ]
    assert untrained_chat_tokens(embedding_model(zero), with_template(tokenizer, None)) == []
    assert untrained_chat_tokens(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer) == []


def test_a_trained_row_near_the_direction_of_unused_rows_is_no_untrained_one(tokenizer):
    """As in Qwen2.5-Coder-0.5B-Instruct: unused rows are one direction, <|im_start|> is trained and has cosine 0.93 to it."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(len(tokenizer) + 16, 64, generator=draw)
    unused, trained = torch.nn.functional.normalize(torch.randn(2, 64, generator=draw), dim=1)
    trained = torch.nn.functional.normalize(trained - (trained @ unused) * unused, dim=0)
    rows[len(tokenizer) :] = unused + 2e-4 * torch.randn(16, 64, generator=draw)
    rows[1] = 1.1 * (0.93 * unused + (1 - 0.93**2) ** 0.5 * trained)
    assert untrained_chat_tokens(embedding_model(rows), tokenizer) == []
    rows[TURN_END] = unused + 2e-4 * torch.randn(64, generator=draw)
    (line,) = untrained_chat_tokens(embedding_model(rows), tokenizer)
    assert line.startswith("warning: <|im_end|>: ") and "--train_tokens '[<|im_end|>]'" in line
    rows[1] = rows[-1]
    (line,) = untrained_chat_tokens(embedding_model(rows), tokenizer)
    assert line.startswith("warning: <|im_start|>, <|im_end|>: ") and "'[<|im_start|>, <|im_end|>]'" in line
    (line,) = untrained_chat_tokens(embedding_model(rows), tokenizer, trained=("<|im_start|>",))
    assert line.startswith("warning: <|im_end|>: ")
    assert untrained_chat_tokens(embedding_model(rows), tokenizer, trained=("<|im_start|>", "<|im_end|>")) == []


@pytest.mark.real_model
@pytest.mark.skipif(not os.environ.get("QLORA_REAL_MODEL"), reason="QLORA_REAL_MODEL names no folder")
def test_real_chat_tokens_are_trained():
    folder = os.environ["QLORA_REAL_MODEL"]
    assert untrained_chat_tokens(AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)) == []


# ------------------------------------------------------------------------------------------------ packed samples


@pytest.mark.parametrize("seed", range(4))
def test_pack_fills_blocks_and_loses_nothing(seed):
    sizes = np.random.default_rng(seed).integers(2, 513, 3000)
    block = pack(sizes, 512)
    fill = np.bincount(block, sizes)
    assert fill.max() <= 512 and sorted(set(block)) == list(range(len(fill)))
    assert sizes.sum() / (512 * len(fill)) > 0.97
    assert pack(np.array([512, 512]), 512).tolist() == [0, 1]
    assert pack(np.array([300, 212, 200, 12, 12]), 512).tolist() == [0, 0, 1, 1, 1]


CHAT_ROWS = [{"messages": chat} for chat in CHATS if any(turn["role"] == "assistant" for turn in chat)]


def test_packed_blocks_hold_the_samples_as_they_are(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", CHAT_ROWS)
    packed, single = (
        blocks_of(settings(path, max_length=64, packing=packing), tokenizer)["train"] for packing in (True, False)
    )
    assert len(single) == single.rows == packed.rows == len(CHAT_ROWS) > len(packed)
    assert (packed.tokens, packed.supervised) == (single.tokens, single.supervised)
    samples = []
    for i in range(len(packed)):
        ids, labels, positions = packed[i]
        starts = np.flatnonzero(positions == 0)
        assert (labels[starts] == IGNORED).all() and len(ids) <= 64
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            assert positions[start:stop].tolist() == list(range(stop - start))
            samples.append((ids[start:stop].tolist(), labels[start:stop].tolist()))
    assert sorted(samples) == sorted(tuple(map(list, single[i].tolist())) for i in range(len(single)))


def test_the_first_token_of_a_sample_is_never_predicted(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", CHAT_ROWS)
    part = blocks_of(settings(path, max_length=64, completion_only=False), tokenizer)["train"]
    assert part.supervised == part.tokens - part.rows
    for i in range(len(part)):
        assert (np.flatnonzero(part[i][1] == IGNORED) == np.flatnonzero(part[i][2] == 0)).all()


def test_a_batch_of_packed_samples_is_padded_with_one_more(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", CHAT_ROWS)
    part = blocks_of(settings(path, max_length=64), tokenizer)["train"]
    batch = collate([part[0], part[len(part) - 1]], tokenizer.pad_token_id)
    size, longest = part[len(part) - 1].shape[1], part[0].shape[1]
    assert batch["position_ids"][1, size:].tolist() == list(range(longest - size))
    assert set(batch["labels"][1, size:].tolist()) == {IGNORED}
    unpacked = blocks_of(settings(path, max_length=64, packing=False), tokenizer)["train"]
    assert list(collate([unpacked[0]], 0)) == ["input_ids", "labels"]


def test_rows_with_labels_of_another_prepare_dataset_are_samples(tmp_path, tokenizer):
    rows = {"input_ids": [[5, 6, 7, 0], [8, 9, 0, 0]], "labels": [[-100, 6, 7, 0], [8, 9, 0, 0]]}
    rows["attention_mask"] = [[1, 1, 1, 0], [1, 1, 0, 0]]
    data = settings("own/data", rows="documents")
    part = make_blocks(DatasetDict(train=Dataset.from_dict(rows)), tokenizer, data, 1)["train"]
    assert part[0].tolist() == [[5, 6, 7, 8, 9], [-100, 6, 7, -100, 9], [0, 1, 2, 0, 1]]
    for other in (settings("own/wikitext"), settings("own/wikitext", rows="lines")):  # a name that says nothing of them
        again = make_blocks(DatasetDict(train=Dataset.from_dict(rows).with_format("torch")), tokenizer, other, 1)[
            "train"
        ]
        assert again[0].tolist() == part[0].tolist() and again.source == part.source
    # A label that masks pads alone, or nothing, says nothing: the rows are text.
    rows["labels"] = [[5, 6, 7, -100], [8, 9, 0, 0]]
    text = make_blocks(DatasetDict(train=Dataset.from_dict(rows)), tokenizer, settings("own/wikitext"), 1)["train"]
    assert stream(text) == [5, 6, 7, DOCUMENT_END, 8, 9, DOCUMENT_END]


def test_rows_of_our_own_reader_stay_what_they_are_when_somebody_filters_them(tmp_path, tokenizer, corpus):
    """Lines stay lines, and samples of which all is learned stay samples; both by the columns that only we make."""
    data = settings(corpus, max_length=32)
    ours = tokenize_rows(load_rows(data), tokenizer, data)
    filtered = ours.filter(lambda row: True)
    assert type(filtered) is DatasetDict
    a, b = (make_blocks(rows, tokenizer, data, 1)["train"] for rows in (ours, filtered))
    assert stream(a) == stream(b) and a.documents == b.documents < a.rows
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns("hi", "ho")}] * 8)
    data = settings(path, completion_only=False, max_length=64)
    ours = tokenize_rows(load_rows(data), tokenizer, data)
    a, b = (make_blocks(rows, tokenizer, data, 1)["train"] for rows in (ours, ours.filter(lambda row: True)))
    assert all((a[i] == b[i]).all() for i in range(len(a))) and len(a[0]) == 3


@pytest.mark.parametrize(
    ("train", "validation", "problem"),
    [
        ({"labels": [[5], [6, 7]]}, None, "row 1 of train: expected 2 labels, one per token, got 1"),
        ({"labels": [[5, 6], None]}, None, "row 2 of train: expected 2 labels, one per token, got null"),
        ({"attention_mask": [[1, 1], [1]]}, None, "row 2 of train: expected 2 attention_mask, one per token, got 1"),
        (
            {"attention_mask": [[0, 0], [0, 0]]},
            None,
            "attention_mask of train: expected 1 for each token and 0 for pad",
        ),
        ({"input_ids": [[5, 6], None]}, None, "row 2 of train: expected a list of ids, got null"),
        ({"input_ids": [[[5, 6]], [[7, 8]]]}, None, "expected a list of integers in each row of input_ids, got List"),
        ({"input_ids": ["a", "b"]}, None, "expected a list of integers in each row of input_ids, got Value"),
        (
            {"labels": [[-100, 6], [6, 7]]},
            {},
            "expected a column labels in the split 'validation', like that in 'train'",
        ),
        (
            {},
            {"labels": [[-100, 6], [6, 7]]},
            "expected a column labels in the split 'train', like that in 'validation'",
        ),
        ({}, {"input_ids": None}, "expected a column input_ids in the split 'validation', got text"),
    ],
)
def test_a_prepare_dataset_that_returns_something_odd_is_refused_in_one_line(tokenizer, train, validation, problem):
    splits = {"train": train} | ({"validation": validation} if validation is not None else {})
    plain = {"input_ids": [[5, 6], [6, 7]], "text": ["a", "b"]}
    filled = {name: {k: v for k, v in (plain | own).items() if v is not None} for name, own in splits.items()}
    tokenized = DatasetDict({name: Dataset.from_dict(columns) for name, columns in filled.items()})
    with pytest.raises(ConfigError, match="^prepare_dataset: ") as caught:
        make_blocks(tokenized, tokenizer, settings("own/data"), 1)
    (line,) = caught.value.problems
    assert problem in line


@pytest.fixture(scope="module")
def models(random_models):
    """Random models in fp32 by family and attention, each ready for samples so many a block."""

    def make(family: str, samples: list[int], attention: str = "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            random_models(family), dtype=torch.float32, attn_implementation=attention
        )
        use_causal_attention(model)
        keep_samples_apart(model, 64, samples)
        return model

    return make


SDPA = [(family, "sdpa") for family in ("qwen2", "llama", "mistral", "qwen3")]


@pytest.mark.parametrize(
    ("family", "attention", "varlen"),
    [
        *((*case, varlen) for case in SDPA for varlen in (False, True)),
        *((f, "eager", False) for f in ("qwen2", "gemma2")),
    ],
)
def test_logits_of_a_packed_sample_are_those_of_the_sample_alone(
    tmp_path, tokenizer, models, varlen_on_cpu, family, attention, varlen
):
    calls = varlen_on_cpu() if varlen else []
    path = write_rows(tmp_path / "a.jsonl", CHAT_ROWS)
    part = blocks_of(settings(path, max_length=64), tokenizer)["train"]
    model = models(family, sample_counts(part), attention).eval()
    calls.clear()
    batch = collate([part[i] for i in range(len(part))], tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for i in range(len(part)):
            starts = np.flatnonzero(part[i][2] == 0)
            for start, stop in itertools.pairwise([*starts, part[i].shape[1]]):
                alone = model(input_ids=batch["input_ids"][i : i + 1, start:stop], use_cache=False).logits
                torch.testing.assert_close(logits[i, start:stop], alone[0], rtol=1e-4, atol=2e-5)
    # Once in each of two layers; a window of 16 positions, shorter than the blocks, takes a mask.
    assert len(calls) == (2 if varlen and family != "mistral" else 0)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_gradients_of_packed_samples_are_the_sum_of_each_alone(
    tmp_path, tokenizer, models, varlen_on_cpu, family, varlen
):
    calls = varlen_on_cpu() if varlen else []
    path = write_rows(tmp_path / "a.jsonl", CHAT_ROWS)
    data = settings(path, max_length=64)
    model = models(family, sample_counts(blocks_of(data, tokenizer)["train"])).train()
    calls.clear()
    head = model.get_output_embeddings().weight.requires_grad_(False)  # so that the chunked loss runs
    sums = []
    for packing in (True, False):
        part = blocks_of(dataclasses.replace(data, packing=packing), tokenizer)["train"]
        loss = CausalLMLoss(model, torch.float32)
        assert loss.chunked and loss.head.weight is head
        total = 0.0
        for numbers in [[*range(len(part))]] if packing else [[i] for i in range(len(part))]:
            value = loss(**collate([part[i] for i in numbers], tokenizer.pad_token_id))
            value.backward()
            total += value.item()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        sums.append((total, gradients))
    (packed, own), (single, alone) = sums
    assert packed == pytest.approx(single, rel=1e-6) and bool(calls) == (varlen and family != "mistral")
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-5 * alone[name].abs().max().item())


def starts_in(positions: np.ndarray, entries: int) -> list[int]:
    """Read cu_seqlens from position_ids [batch, length] in another way: a row starts a sample, and so does a 0."""
    batch, length = positions.shape
    starts = [row * length + i for row in range(batch) for i in range(length) if i == 0 or positions[row, i] == 0]
    return starts + [batch * length] * (entries - len(starts))


@pytest.mark.parametrize("seed", range(4))
def test_the_starts_of_samples_are_read_once_a_forward(models, varlen_on_cpu, seed):
    """Random samples, in blocks filled up by collate, and these by a captured step, which is the most there can be."""
    random, calls = np.random.default_rng(seed), varlen_on_cpu()
    rows, counts = [], []
    for _ in range(3):
        sizes = random.integers(2, 20, random.integers(1, 4))
        positions = np.concatenate([np.arange(size) for size in sizes])
        rows.append(np.stack([random.integers(0, 4096, len(positions))] * 2 + [positions]))
        counts.append(len(sizes))
    model = models("qwen2", sorted(counts, reverse=True))
    batch = collate(rows, 0)
    whole = micro_step.padding("position_ids", 64, torch.device("cpu")).repeat(5, 1)
    whole[:3, : batch["position_ids"].shape[1]] = batch["position_ids"]
    for positions in (batch["position_ids"], whole):
        calls.clear()
        model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
        assert len(calls) == 2 and calls[0] is calls[1]
        entries = most_samples(sorted(counts, reverse=True), len(positions)) + 1
        table = positions.numpy().copy()
        table[:3, 1:][np.diff(table[:3]) != 1] = 0  # a captured step's pads go on from another number
        assert calls[0].tolist() == starts_in(table, entries)
        assert len(set(calls[0].tolist())) <= entries


def test_what_keeps_packed_samples_from_varlen_attention_is_named(random_models, monkeypatch):
    on = {"device": "cuda", "capability": (8, 9), "flash": True}

    def reason(family="qwen2", attention="sdpa", dtype=torch.bfloat16, length=512, config=None, **machine):
        machine = on | machine
        model = AutoModelForCausalLM.from_pretrained(random_models(family), dtype=dtype, attn_implementation=attention)
        use_causal_attention(model, "auto" if family == "gemma2" else attention)  # asked for, eager stays eager
        vars(model.config).update(config or {})
        monkeypatch.setattr(type(model), "device", torch.device(machine["device"]))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: machine["flash"])
        return varlen_obstacle(model, length)

    assert [reason(family) for family in ("qwen2", "llama", "qwen3")] == [None] * 3
    assert reason(dtype=torch.float16) is None
    assert reason(device="cpu") == "there is no CUDA GPU"
    assert reason(capability=(7, 5)) == reason(flash=False) == "this GPU or this build of PyTorch has no FlashAttention"
    assert reason(dtype=torch.float32) == "FlashAttention does not compute in torch.float32"
    assert reason(attention="eager") == "model.attn_implementation eager"
    assert reason("gemma2", "eager", device="cpu") is None  # its own attention, here for capped scores, knows samples
    assert reason("mistral") == "a sliding window of 16 tokens" and reason("mistral", length=16) is None
    assert reason(config={"head_dim": 256}) == "FlashAttention does not train heads 256 wide"
    assert reason(config={"attention_dropout": 0.1}) is None  # the base's own dropout never acts
    monkeypatch.setattr(families, "FAMILIES", [row for row in families.FAMILIES if row.name == "Llama"])
    assert reason() == "Qwen2ForCausalLM has another attention"


def test_running_text_takes_no_mask_and_one_sample_a_block_neither(models, monkeypatch):
    model, masks = models("qwen2", [2]), []
    monkeypatch.setattr(attention_module, "sdpa_mask", lambda **keywords: masks.append(keywords))
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, use_cache=False)
    model(input_ids=tokens, position_ids=torch.arange(8).expand(2, 8), use_cache=False)
    assert not masks
    model(input_ids=tokens, position_ids=torch.arange(4).repeat(2, 2), use_cache=False)
    assert len(masks) == 1


def test_a_model_that_lets_packed_samples_see_each_other_is_refused(random_models, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(random_models("qwen2"), dtype=torch.float32)
    decoder = model.get_decoder()
    forward = type(decoder).forward
    monkeypatch.setattr(type(decoder), "forward", lambda self, position_ids=None, **rest: forward(self, **rest))
    use_causal_attention(model)
    with pytest.raises(ConfigError, match=r"data\.packing: Qwen2ForCausalLM .*set data\.packing false"):
        keep_samples_apart(model, 64, [2])


# ------------------------------------------------------------------------------------------------ the cache


def fingerprint_of(path: Path, tokenizer, **keys) -> str:
    data = settings(path, **keys)
    return tokenize_rows(load_rows(data), tokenizer, data)["train"]._fingerprint


def test_a_file_of_the_same_name_size_and_time_is_read_anew(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ["one", "two"])
    time = path.stat()
    assert tokenizer.decode(stream(blocks_of(settings(path), tokenizer)["train"])).startswith("one")
    write_jsonl(path, ["six", "two"])
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert path.stat().st_size == time.st_size
    assert tokenizer.decode(stream(blocks_of(settings(path), tokenizer)["train"])).startswith("six")


def test_what_makes_other_tokens_or_labels_makes_another_key(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns("a", "b"), "text": "a"}])
    fewer = copy.deepcopy(tokenizer)
    fewer.backend_tokenizer.normalizer = normalizers.Lowercase()
    keys = [
        fingerprint_of(path, tokenizer),
        fingerprint_of(path, tokenizer, completion_only=False),
        fingerprint_of(path, tokenizer, format="text"),
        fingerprint_of(path, with_template(tokenizer, SMOLLM2_TEMPLATE)),
        fingerprint_of(path, fewer),
    ]
    assert len(set(keys)) == len(keys)
    # What is cut afterwards is tokenised once.
    assert fingerprint_of(path, tokenizer, max_length=8, packing=False) == keys[0]


def test_what_an_earlier_call_left_in_the_tokenizer_cuts_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", PROSE)
    expected = stream(blocks_of(settings(path), tokenizer)["train"])
    other = copy.deepcopy(tokenizer)
    other("a", padding="max_length", truncation=True, max_length=4)
    write_jsonl(path, [*PROSE, "more"])
    assert stream(blocks_of(settings(path), other)["train"])[: len(expected)] == expected


def test_a_second_run_tokenises_nothing(tmp_path, tokenizer, monkeypatch):
    for name, row in (("a.jsonl", {"messages": turns("a", "b")}), ("b.jsonl", {"text": "a text"})):
        data = settings(write_rows(tmp_path / name, [row] * 3))
        first = stream_of(blocks_of(data, tokenizer)["train"])
        with monkeypatch.context() as patch:
            for encoder in ("text_encoder", "sample_encoder"):
                patch.setattr(data_formats, encoder, lambda *arguments: None)  # what cannot be called is not called
            assert stream_of(blocks_of(data, tokenizer)["train"]) == first


def stream_of(part) -> list:
    return [part[i].tolist() for i in range(len(part))]


# ------------------------------------------------------------------------------------------------ strided windows


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 16), (32, 8), (512, 256), (16, 1)])
def test_windows_predict_each_token_once_as_perplexities_are_reported(tmp_path, tokenizer, length, stride):
    path = write_txt(tmp_path / "a.txt", "\n\n".join(text.replace("\n", " ") for text in PROSE) + "\n")
    data = settings(path, max_length=length)
    blocks = make_blocks(tokenize_rows(load_rows(data), tokenizer, data), tokenizer, data, 1, close=False)["train"]
    text = stream(blocks)
    assert DOCUMENT_END not in text
    windows, expected, done = windows_of(blocks, stride), [], 0
    for start in range(0, len(text), stride):  # the loop of transformers' page on the perplexity of fixed-length models
        stop = min(start + length, len(text))
        expected.append((text[start:stop], [IGNORED] * (done - start) + text[max(done, start) : stop]))
        done = stop
        if stop == len(text):
            break
    assert [(ids.tolist(), labels.tolist()) for ids, labels in (windows[i] for i in range(len(windows)))] == expected
    batch = collate([windows[i] for i in range(len(windows))], 0)
    assert windows.supervised == int((batch["labels"][:, 1:] != IGNORED).sum())


def test_samples_have_no_windows(tmp_path, tokenizer):
    part = blocks_of(settings(write_rows(tmp_path / "a.jsonl", CHAT_ROWS), max_length=64), tokenizer)["train"]
    with pytest.raises(ConfigError, match="--stride: works on running text only, got chat, from column messages"):
        windows_of(part, 4)


# ------------------------------------------------------------------------------------------------ whole runs


def losses(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows if key in row]


def test_a_run_on_chats_says_what_it_reads(train, chats, capsys):
    code, folder = train("--dataset", chats, "--learning_rate", "5e-3")
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    assert code == 0
    assert "data: read as chat, from column messages, through the tokenizer's chat template" in log
    assert re.search(r"first block: <\|im_start\|>user.*\[\[.*<\|im_end\|>\]\]", log)
    assert re.search(r"train: blocks are \d\d\.\d% full", log)
    if not torch.cuda.is_available():
        assert log.count("packed samples: with a mask: there is no CUDA GPU") == 1
    assert losses(folder, "eval_loss")[-1] < losses(folder, "eval_loss")[0]
    assert main(["--evaluate", "--adapter", str(folder)]) == 0
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    # Another number of blocks together, and so another order of bfloat16's sums.
    assert result["adapter"]["loss"] == pytest.approx(min(losses(folder, "eval_loss")), rel=3e-4)
    capsys.readouterr()
    assert main(["--evaluate", "--adapter", str(folder), "--stride", "16"]) == 2
    assert "--stride: works on running text only, got chat" in capsys.readouterr().err


COMPILED = pytest.param(("--fused_lora", "on", "--compile", "on"), marks=pytest.mark.compiled)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("path", [(), ("--fused_lora", "on"), COMPILED])
def test_packed_and_unpacked_runs_learn_the_same(
    train, tmp_path, chats, tokenizer, monkeypatch, varlen_on_cpu, path, varlen
):
    """The same samples in each step, once packed and once a row each, in fp32 and without dropout."""
    if varlen:
        varlen_on_cpu()
    flags = ["--dataset", chats, "--validation_fraction", 0, "--compute_dtype", "float32", "--dropout", 0]
    flags += ["--optim", "adamw_torch", "--logging_steps", 1, "--warmup_ratio", 0, *path]
    data = settings(chats, max_length=64)
    packed, single = (
        blocks_of(dataclasses.replace(data, packing=packing), tokenizer)["train"].cuts for packing in (True, False)
    )
    number = {start: i for i, start in enumerate(single[:, 1])}
    found = []
    for packing in (True, False):

        def windows(blocks: int, sequences_per_step: int, seed: int, step: int, packing: bool = packing):
            for first in itertools.count(step * 4, 4):
                rows = packed[(packed[:, 0] >= first) & (packed[:, 0] < first + 4)]
                yield 0, np.unique(rows[:, 0]) if packing else np.array([number[start] for start in rows[:, 1]])

        monkeypatch.setattr(train_qlora, "step_windows", windows)
        code, folder = train(*flags, "--packing", packing, output_dir=tmp_path / str(packing))
        assert code == 0
        log = (folder / "training_log.txt").read_text(encoding="utf-8")
        assert ("packed samples: varlen attention" in log) == (packing and varlen)
        found.append((losses(folder), load_file(folder / "adapter_model.safetensors")))
    (packed_losses, adapter), (single_losses, other) = found
    assert packed_losses == pytest.approx(single_losses, rel=1e-5)
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-2, atol=1e-4)


def test_evaluation_tells_how_sure_a_difference_is(train, corpus, capsys):
    _, folder = train("--learning_rate", "1e-2")
    capsys.readouterr()
    for stride, flags in ((None, []), (16, ["--stride", "16"])):
        assert main(["--evaluate", "--adapter", str(folder), *flags]) == 0
        result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        change = result["difference"]["loss"]
        assert change == pytest.approx(result["adapter"]["loss"] - result["base"]["loss"], abs=1e-9)
        assert result["stride"] == stride and 0 < result["difference"]["standard_error"] < abs(change)
        assert re.search(r"adapter - base: loss -\d\.\d{4} ± \d\.\d{4} \(standard error over", capsys.readouterr().out)


def test_the_standard_error_of_a_difference_is_that_of_resampled_blocks():
    random = np.random.default_rng(0)
    tokens = random.integers(20, 64, 400).astype(float)
    before = tokens * random.normal(3, 0.5, 400)  # blocks differ more from each other than by the change
    after = before + tokens * random.normal(-0.1, 0.2, 400)
    tables = [torch.tensor(np.stack([losses, tokens], 1)) for losses in (before, after)]
    mean, error = evaluation.loss_difference(*tables)
    picks = [random.integers(0, 400, 400) for _ in range(4000)]
    resampled = [((after - before)[pick]).sum() / tokens[pick].sum() for pick in picks]
    assert mean == pytest.approx((after - before).sum() / tokens.sum())
    assert error == pytest.approx(np.std(resampled), rel=0.05)
    assert evaluation.loss_difference(tables[0][:1], tables[1][:1])[1] is None
    together = torch.zeros_like(tables[0])  # the same sums by micro-batch, as in an older run's checkpoint
    together[0] = tables[0].sum(0)
    assert evaluation.loss_difference(together, tables[1]) == (pytest.approx(mean), None)


def test_runs_are_compared_in_a_table_and_a_picture(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rank in (4, 8):
        train("--rank", rank, "--logging_steps", 1, output_dir=tmp_path / f"r{rank}")
    capsys.readouterr()
    assert main(["--compare", "r4", "r8"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    table = {line[0]: line[1:] for line in lines[1:-1]}
    assert lines[0] == ["r4", "r8"] and lines[-1] == ["curves are in compare.png"]
    assert next(iter(table)) == "rank" and table["rank"] == ["4", "8"]  # and no other setting
    assert list(table)[1] == "trainable parameters"
    for i, name in enumerate(("r4", "r8")):
        adapter = load_file(tmp_path / name / "adapter_model.safetensors")
        assert table["trainable parameters"][i] == f"{sum(tensor.numel() for tensor in adapter.values()):,}"
        best = min(losses(tmp_path / name, "eval_loss"))
        assert table["validation loss"][i] == f"{best:.4f}"
        assert table["base loss"][i] == f"{losses(tmp_path / name, 'eval_loss')[0]:.4f}"
        assert table["perplexity"][i] == f"{np.exp(best):.3f}"
        assert float(table["peak GiB"][i]) > 0 and float(table["tokens/s"][i].replace(",", "")) > 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert main(["--compare", "r4", "r8", "--output", "elsewhere.png"]) == 0 and (tmp_path / "elsewhere.png").is_file()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--compare", "here"], "--compare: expected two folders or more, got here"),
        (
            ["--compare", "here", "there"],
            "--compare: expected folders of runs, got here, which has no config.yaml",
        ),
        (["--output", "a.png"], "--output: goes with --compare"),
        (["--stride", "16"], "--stride: goes with --evaluate"),
        (["--evaluate", "--stride", "0"], "--stride: expected 1 to data.max_length (512), got 0"),
        (["--evaluate", "--stride", "1024"], "--stride: expected 1 to data.max_length (512), got 1024"),
        (["--evaluate", "--stride", "many"], "argument --stride: invalid int value: 'many'"),
    ],
)
def test_evaluation_and_comparison_refuse_in_one_line(tmp_path, monkeypatch, capsys, flags, problem):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {problem}"]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ where a block is from


def lines_of(place: str) -> list[tuple[str, int]]:
    """Return (file, row) of each row that a place names."""
    found = []
    for name, ranges in re.findall(r"([\w.]+) rows? ((?:\d+(?: to \d+)?(?:, (?=\d))?)+)", place):
        for part in ranges.split(", "):
            first, *last = part.split(" to ")
            found += [(name, row) for row in range(int(first), int((last or [first])[0]) + 1)]
    return found


def test_a_block_of_text_names_the_files_and_lines_that_it_is_made_of(tmp_path, tokenizer):
    """The lines named, joined, hold the block's text; the first and last of them are needed for it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words, lines = iter(range(10_000)), {}
    for name, count in (("a.txt", 40), ("b.txt", 25)):
        texts = ["" if i % 7 == 3 else " ".join(f"w{next(words)}" for _ in range(i % 5 + 1)) for i in range(count)]
        write_txt(folder / name, "\n".join(texts) + "\n")
        lines |= {(name, i + 1): text for i, text in enumerate(texts)}
    data = settings(folder, max_length=48, validation_fraction=0.2)
    train = blocks_of(data, tokenizer)["train"]
    seen = set()
    for i, place in enumerate(places_of(range(len(train)), train, data)):
        named = lines_of(place)
        text = tokenizer.decode(train[i], skip_special_tokens=True)
        for edge in (named[0], named[-1]):
            assert lines[edge]
        joined = "\n".join(lines[row] for row in named)
        assert re.sub(r"\s", "", text) in re.sub(r"\s", "", joined), (i, named)
        shorter = re.sub(r"\s", "", "".join(lines[row] for row in named[1:-1]))
        assert re.sub(r"\s", "", text) not in shorter
        seen |= {name for name, _ in named}
    assert seen == {"a.txt", "b.txt"}


@pytest.mark.parametrize("packing", [True, False])
def test_a_block_of_samples_names_their_rows(tmp_path, tokenizer, packing):
    rows = [{"prompt": f"say {i}", "completion": f"{i} " * (i % 6)} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = settings(tmp_path / "pairs.jsonl", max_length=64, packing=packing, validation_fraction=0.1)
    train = blocks_of(data, tokenizer)["train"]
    for i, place in enumerate(places_of(range(len(train)), train, data)):
        named = {row for _, row in lines_of(place)}
        text = tokenizer.decode(train[i][0], skip_special_tokens=True)
        assert named == {int(n) + 1 for n in re.findall(r"say (\d+)", text)}, (i, text)


@pytest.mark.parametrize(
    "column, value, got",
    [
        ("input_ids", 4096, "4096"),
        ("input_ids", -5, "-5"),
        ("labels", -1, "-1"),
        ("labels", 99999, "99999"),
        ("labels", None, "null"),
    ],
)
def test_an_id_that_the_tokenizer_lacks_is_refused(tokenizer, column, value, got):
    """Of a user's own function; a negative label beside -100 was learned without a word."""
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} for _ in range(4)]
    rows[2][column] = [1, value, 3]
    tokenized = DatasetDict(train=Dataset.from_list(rows))
    data = DataConfig(validation_fraction=0)
    with pytest.raises(
        ConfigError, match=rf"prepare_dataset: row 3 of train: expected {column} of 0 to 4,095.*, got {got}$"
    ):
        make_blocks(tokenized, tokenizer, data, 0)
