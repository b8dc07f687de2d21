"""JSON as RFC 8259 has it, of files that may come from anybody: what Python's json would change in silence is an error.

decode(text) -> value          entries(text) -> (number, value) of each entry of a list
"""

import collections
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _number(text: str) -> float | Decimal:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    short = len(text) < 17 and value  # 15 digits fit, and 0.0 may be a number that is too small
    return value if short or Decimal(text) == Decimal(repr(value)) else Decimal(text)


def _refuse(value: Any) -> Any:
    if isinstance(value, Decimal):
        raise ValueError(f"the number {str(value)[:40]} has more digits than are kept; write it as a text")
    raise TypeError(f"{type(value).__name__} is no JSON")


ENCODER = json.JSONEncoder(default=_refuse)
ROUNDING_ENCODER = json.JSONEncoder(default=float)


def dumps(value: Any, rounded: bool = False) -> str:
    """Return JSON of a value; raise ValueError, unless `rounded`, if a float keeps fewer digits than a number has."""
    return (ROUNDING_ENCODER if rounded else ENCODER).encode(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_number, object_pairs_hook=_object)
HALF = re.compile(r"\\u[dD][89a-fA-F]")
SPACE = re.compile(r"[ \t\n\r]*")


def _storable(value: Any, text: str) -> Any:
    """Return a value; raise UnicodeEncodeError, a ValueError, if a text in it has half of a surrogate pair, as UTF-8 has none."""
    if HALF.search(text):
        json.dumps(value, ensure_ascii=False, default=str).encode()
    return value


def _explained(error: Exception, where: str, line: str = "") -> ValueError:
    """Return the error as a ValueError; line: the text, if it is one line, whose end may lie before a line break."""
    if isinstance(error, RecursionError):
        return ValueError(f"{where}nested too deeply")
    if isinstance(error, json.JSONDecodeError):
        column = min(error.pos, len(line.rstrip())) + 1
        place = f"(column {column})" if line else f"(line {error.lineno}, column {error.colno})"
        return ValueError(f"{where}no valid JSON: {error.msg.removesuffix(' at')} {place}")
    return ValueError(f"{where}{str(error)[:200]}")


def decode(text: str, where: str = "", halves: bool = False) -> Any:
    """Return the value of a text of JSON; raise a ValueError that begins with `where` and names the column.

    A number with more digits than a float keeps is a Decimal.
    NaN, Infinity, numbers that are too large, a key that stands twice in one object, deep nesting and, but with `halves`,
    half of a surrogate pair are refused.
    """
    try:
        value = DECODER.decode(text)
        return value if halves else _storable(value, text)
    except (ValueError, RecursionError) as error:
        raise _explained(error, where, "" if "\n" in text.strip() else text) from None


def entries(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of each entry of a list; raise a ValueError that names the entry."""
    place, number = SPACE.match(text).end() + 1, 0  # behind the opening bracket
    while True:
        number += 1
        try:
            place = SPACE.match(text, place).end()
            if number == 1 and text[place : place + 1] == "]":
                break
            start = place
            value, place = DECODER.raw_decode(text, place)
            _storable(value, text[start:place])
            place = SPACE.match(text, place).end()
            if text[place : place + 1] not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except (ValueError, RecursionError) as error:
            raise _explained(error, f"entry {number}: ") from None
        yield number, value
        if text[place] == "]":
            break
        place += 1
    if text[place + 1 :].strip():
        raise ValueError("expected nothing behind the list")
