"""Texts in columns of a terminal."""

import unicodedata

import pytest

from toolkit import text_width
from toolkit.text_width import fitted, for_stdout, padded, start_of, width, wrapped

TEXTS = [
    "",
    "one",
    "error: out of GPU memory at a peak of 7.42 GiB with micro-batch 4, 12 of 36 layers checkpointed; no checkpoint yet",
    "data: 中文的資料夾名稱很長,一行裡放不下那麼多字,所以要換行 and then ASCII text again, with words of several lengths",
    "checkpoint written to /home/somebody/a/very/long/path/that/is/longer/than/what/any/line/holds/checkpoint-126 now",
    "e\u0301" * 100,
    "  indented at its start and long enough that it has to be broken somewhere behind the twentieth column",
]


def test_width_counts_columns():
    assert [width(text) for text in ("", "abc", "中文", "ｱ", "Ａ", "e\u0301", "a\u200bb")] == [0, 3, 4, 1, 2, 1, 2]


@pytest.mark.parametrize("columns", [20, 31, 80])
@pytest.mark.parametrize("text", TEXTS)
def test_wrapped_lines_fit_and_keep_every_character(text, columns):
    lines = wrapped(text, columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(line.startswith("  ") for line in lines[1:])
    if width(text) <= columns:
        assert lines == [text]


def test_words_are_broken_only_where_one_is_longer_than_a_line():
    assert wrapped("aa bb cc dd", 6) == ["aa bb", "  cc", "  dd"]
    assert wrapped("aa bbbbbbbbbb", 6) == ["aa", "  bbbb", "  bbbb", "  bb"]


def test_start_and_padding_count_columns():
    assert start_of("中文字", 5) == "中文" and start_of("abc", 5) == "abc" and start_of("中", 1) == ""
    assert padded("中", 4) == "中  " and padded("中", 4, right=True) == "  中"
    assert all(width(padded(text, 200)) == 200 for text in TEXTS)


def test_rows_and_commands_are_never_broken():
    text = "stopped; go on with:\n  python train_qlora.py --dataset a --output_dir b --rank 8"
    assert fitted(text, 20) == "stopped; go on with:\n  python train_qlora.py --dataset a --output_dir b --rank 8"
    assert fitted("a b c\n\nd", 3) == "a b\n  c\n\nd"


def test_only_a_terminal_gets_broken_lines(monkeypatch, capsys):
    line = "word " * 40 + "end"
    assert for_stdout(line) == line
    monkeypatch.setattr(text_width.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert for_stdout(line) == fitted(line, 40) != line


def test_marks_are_of_the_categories_that_need_no_column():
    assert {unicodedata.category(char) for char in "\u0301\u20dd\u200b"} == set(text_width.UNSEEN)
