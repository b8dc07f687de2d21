"""Numbers of JSON: what is written of one has all of its digits, or it is refused."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ConfigError, DataConfig
from toolkit import strict_json
from toolkit.chat_rows import value_of
from toolkit.data_files import ROWS, load_rows


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_a_number_keeps_its_digits_or_is_refused(text):
    try:
        written = strict_json.dumps([strict_json.decode(text)])
    except ValueError as error:
        assert "more digits than are kept" in str(error) or "too large" in str(error)
        digits = Decimal(text).normalize().as_tuple().digits
        assert len(digits) > 15 or not 1e-307 < abs(Decimal(text)) < 1e308, text  # 15 digits always fit into a float
    else:
        assert Decimal(written[1:-1]) == Decimal(text)


CALL = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": %s}]}]'


def test_digits_that_would_be_lost_are_refused_only_where_they_are_learned(tmp_path):
    path, long = tmp_path / "a.jsonl", "0.12345678901234567890"
    path.write_text(
        f'{CALL % (chr(123) + chr(34) + "x" + chr(34) + ": 0.5" + chr(125))}, "score": {long}, "n": {"7" * 40}}}\n'
    )
    (row,) = load_rows(DataConfig(dataset=str(path)))["train"]
    assert value_of(row["n"]) == int("7" * 40) and value_of(row["score"]) == pytest.approx(0.123456789)
    path.write_text((CALL % '{"x": 1}' + "}\n") * ROWS + CALL % f'{{"x": {long}}}' + "}\n")
    with pytest.raises(
        ConfigError, match=rf"{path}: row {ROWS + 1}: the number {long} has more digits than are kept; write it"
    ):
        load_rows(DataConfig(dataset=str(path)))


def test_half_of_a_surrogate_pair_is_refused_with_its_place_and_a_whole_pair_is_not():
    """UTF-8 has no half; Python's json reads it without a word, and whoever stores the text fails much later."""
    assert strict_json.decode(r'{"text": "\ud83d\ude00"}') == {"text": "😀"}
    assert strict_json.decode(r'"\ud800"', halves=True) == "\ud800"
    with pytest.raises(ValueError, match=r"^line 3: 'utf-8' codec can't encode character '\\ud800'"):
        strict_json.decode(r'{"text": "a \ud800 b"}', "line 3: ")
    with pytest.raises(ValueError, match=r"^entry 2: .*'\\ud800'"):
        list(strict_json.entries(r'["\ud83d\ude00", {"text": "\ud800"}]'))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_column_of_a_line_that_stops_early_is_its_end(end):
    text = '{"messages": [{"role": "user", "content": "Hi"'
    with pytest.raises(
        ValueError, match=rf"^line 2: no valid JSON: Expecting ',' delimiter \(column {len(text) + 1}\)$"
    ):
        strict_json.decode(text + end, "line 2: ")
    with pytest.raises(ValueError, match=r"\(column 7\)$"):
        strict_json.decode('{"a": x}' + end)
    with pytest.raises(ValueError, match=r"\(line 2, column 3\)$"):
        strict_json.decode('{"a":\n  x}' + end)
