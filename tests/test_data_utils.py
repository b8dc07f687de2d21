"""From rows to blocks: no token is lost, added or moved, and documents end where they should."""

import copy
import csv
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from config import ConfigError, DataConfig
from data_utils import (
    IGNORED,
    collate,
    document_end,
    epoch_order,
    first_token,
    load_rows,
    make_blocks,
    rows_are_lines,
    step_windows,
    tokenize_rows,
)
from quantization_utils import load_tokenizer

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
def test_the_tutorials_own_dataset_gives_blocks_without_pads(corpus, tokenizer, fraction):
    data = settings(corpus, max_length=32, validation_fraction=fraction)
    tokenized = tutorial_dataset(corpus, tokenizer, data, ("text", "input_ids", "attention_mask"))
    parts = make_blocks(tokenized, tokenizer, data, 42)
    whole = stream(make_blocks(tokenized, tokenizer, settings(corpus, max_length=32), 42)["train"])
    lines = corpus.read_text(encoding="utf-8").splitlines()
    expected = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        expected += ids(tokenizer, line)[:32] + ([DOCUMENT_END] if line and not after else [])
    assert whole == expected
    assert (parts["validation"] is None) is (fraction == 0)
    held = parts["validation"].tokens if fraction else 0
    assert parts["train"].tokens + held == len(whole)
    assert [len(parts["train"][i]) for i in range(len(parts["train"]) - 1)] == [32] * (len(parts["train"]) - 1)


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
