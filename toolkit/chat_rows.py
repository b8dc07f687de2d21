"""From the columns of a row to a chat: which columns are read, roles, tool calls, and which turns are learned.

recognise(columns, data) -> (form, columns)          to_chat(row, columns) -> Chat
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from config import ConfigError, DataConfig
from toolkit import strict_json

JSON_CELL = "as JSON"  # the only field of a cell that holds a value of JSON which is no text (data_files.py)
CHATS = (("messages",), ("conversations",))
PAIRS = (("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"))
SAMPLES = {"chat": CHATS, "prompt": PAIRS}
# Columns that are read beside those of a chat or a pair.
BESIDE = ("system", "history", "tools")
# Columns whose values of JSON become text: calls and tools as the chat template writes them.
IN_TEXTS = {*itertools.chain(*CHATS, *PAIRS), "history", "tools"}
# Names of the roles in OpenAI's, ShareGPT's and similar data.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"developer": "system", "function": "tool", "observation": "tool", "tool_response": "tool"}
ROLES |= {"function_call": "assistant", "tool_call": "assistant"}
CALLS = ("function_call", "tool_call")  # roles whose text is a call in JSON
KNOWN = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn that hold the thought before an answer
KEYS = {"role", "from", "content", "value", "weight", "train", "tool_calls", "tool_call_id", "name", *THOUGHTS}
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat as a template takes it. learned: whether each message is learned, which only the assistant's can be."""

    messages: list[Message]
    learned: list[bool]
    tools: list[Any] | None = None


def recognise(columns: Sequence[str], data: DataConfig) -> tuple[str, tuple[str, ...]]:
    """Return the kind of rows with these columns (text, chat or prompt) and the columns to read; raise ConfigError.

    data.format decides. auto looks for the columns of chats, then of pairs, then of text. If data.text_column is not
    the default and exists, it is text.
    """
    asked = data.text_column != DataConfig().text_column
    if asked and data.format == "auto" and data.text_column not in columns:
        raise ConfigError(
            f"data.text_column: no column {data.text_column!r} in {data.dataset}; it has {', '.join(columns)}"
        )
    known = SAMPLES | {"text": ((data.text_column,),)}
    order = list(known) if data.format == "auto" else [data.format]
    if data.format == "auto" and asked:
        order = ["text"]
    for name in order:
        for names in known[name]:
            if set(names) <= set(columns):
                return name, names
    if data.format in SAMPLES:
        wanted = " or ".join(" + ".join(names) for names in SAMPLES[data.format])
        raise ConfigError(
            f"data.format: {data.format} needs the columns {wanted}; {data.dataset} has {', '.join(columns)}"
        )
    hint = "; chats need messages or conversations, pairs prompt + completion or instruction + output"
    if len(columns) == 1 and ";" in columns[0]:
        hint = "; the columns of a .csv are parted by commas, these by semicolons"
    hint = "" if data.format == "text" else hint
    raise ConfigError(
        f"data.text_column: no column {data.text_column!r} in {data.dataset}; it has {', '.join(columns)}{hint}"
    )


def value_of(cell: Any) -> Any:
    """Return what a cell holds: a value of JSON that data_files.py keeps as text, or the cell itself."""
    return json.loads(cell[JSON_CELL]) if isinstance(cell, dict) and cell.keys() == {JSON_CELL} else cell


def to_chat(row: dict[str, Any], columns: tuple[str, ...]) -> Chat:
    """Return a row as a chat; raise a ValueError that says what is wrong with it.

    columns: those that `recognise` found. system, history and tools are read too, where the row has them.
    """
    row = {name: value_of(cell) for name, cell in row.items()}
    if columns in CHATS:
        turns = _turns(row[columns[0]], columns[0])
    else:
        turns = _turns_of_pair(row, columns)
    messages, learned = [], []
    for number, turn in enumerate(turns, 1):
        message, learns = to_message(turn, number)
        messages.append(message)
        learned.append(learns)
    if before := _turns_before(row, columns, messages):
        messages, learned = before + messages, [m["role"] == "assistant" for m in before] + learned
    return Chat(messages, learned, _listed(row.get("tools"), "tools", "tools") or None)


def _parsed(text: str, what: str) -> Any:
    """Return the value that a text of JSON stands for; raise ValueError."""
    try:
        value = strict_json.decode(text)
        strict_json.dumps(value)
        return value
    except ValueError as error:
        raise ValueError(f"expected {what}, got {text[:60]!r} ({error})") from None


def _listed(value: Any, column: str, what: str) -> list[Any]:
    """Return a list that a column holds, or its JSON as text; [] for null or an empty text. Raise ValueError."""
    what = f"a list of {what} in column {column!r}"
    value = _parsed(value, what) if isinstance(value, str) and value.strip() else value
    if value and not isinstance(value, list):
        raise ValueError(f"expected {what}, got {str(value)[:60]!r}")
    return value or []


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    turns = _listed(value, column, "turns")
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected a list of turns in column {column!r}, got {str(turns)[:60]!r}")
    return turns


def _turns_of_pair(row: dict[str, Any], columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a pair as turns. A text in `input` is put below the instruction.

    Prompt and completion may also be lists of turns; then those of the prompt are read and not learned.
    """
    *asked, answer = (row[name] for name in columns)
    for name, value in ((columns[0], asked[0]), (columns[-1], answer)):
        if value is None:
            raise ValueError(f"column {name!r} is empty; fill it in or remove the row")
    if isinstance(asked[0], list):
        before = [turn | {"train": False} for turn in _turns(asked[0], columns[0])]
    else:
        asked = [text for i, text in enumerate(asked) if text or i == 0]
        question = "\n\n".join(asked) if all(isinstance(text, str) for text in asked) else asked
        before = [{"role": "user", "content": question}]
    after = _turns(answer, columns[-1]) if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return before + after


def _turns_before(row: dict[str, Any], columns: tuple[str, ...], messages: list[Message]) -> list[Message]:
    """Return the turns that the columns system and history put before a row's own. Raise ValueError."""
    before = []
    if system := row.get("system"):
        if not isinstance(system, str):
            raise ValueError(f"expected a text in column 'system', got {str(system)[:60]!r}")
        own = next((m["content"] for m in messages[:1] if m["role"] == "system"), None)
        if own not in (None, system):
            raise ValueError("there are two system prompts, one in column 'system' and one in the first turn")
        before = [{"role": "system", "content": system}] if own is None else []
    for pair in _listed(row.get("history"), "history", "pairs") if columns not in CHATS else ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"expected pairs of question and answer in column 'history', got {str(pair)[:60]!r}")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return before


def to_message(turn: dict[str, Any], number: int) -> tuple[Message, bool]:
    """Return a turn as a template takes it, and whether it is learned; raise a ValueError that names its number."""
    named = turn.get("role") or turn.get("from")
    named = named.strip().lower() if isinstance(named, str) else named
    role = ROLES.get(named, named) if isinstance(named, str) else named
    if role not in KNOWN:
        raise ValueError(f"turn {number}: expected a role system, user, assistant or tool, got {role!r}")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    calls = turn.get("tool_calls") or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"turn {number}: tool_calls as JSON")
    if named in CALLS:
        content, calls = "", _parsed(str(content), f"turn {number}: a call in JSON, with name and arguments")
    message: Message = {"role": role, "content": _text_of(content, number, bool(calls) and role == "assistant")}
    if calls:
        message["tool_calls"] = [to_call(call, number) for call in (calls if isinstance(calls, list) else [calls])]
    thought = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    if role != "assistant" and (calls or thought is not None):
        raise ValueError(
            f"turn {number}: expected tool calls and thoughts in turns of the assistant, got them in {role}'s"
        )
    if thought is not None:
        if not isinstance(thought, str):
            raise ValueError(f"turn {number}: expected a text as reasoning_content, got {str(thought)[:60]!r}")
        message["reasoning_content"] = thought
    message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    weight = 1 if turn.get("weight") is None else turn["weight"]
    if weight not in (0, 1):
        raise ValueError(f"turn {number}: expected a weight of 0 or 1, got {str(weight)[:60]}")
    if (train := turn.get("train")) not in (None, 0, 1):  # which true and false are equal to
        raise ValueError(f"turn {number}: expected true or false as train, got {str(train)[:60]!r}")
    return message, role == "assistant" and bool(weight) and (train is None or bool(train))


def _text_of(content: Any, number: int, calls: bool) -> str:
    """Return a turn's text; a list of parts that are texts counts as one text, null beside tool calls as none."""
    if content is None and calls:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        odd = [part.get("type") or "no type" for part in content if not isinstance(part.get("text"), str)]
        if odd:
            raise ValueError(f"turn {number}: expected parts that are texts, got {str(odd[0])[:60]}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"turn {number}: expected a text, got {repr(content)[:60]}")
    return content


def to_call(call: Any, number: int) -> dict[str, Any]:
    """Return a tool call as templates take it: arguments as a mapping, also where the data have them as text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"turn {number}: expected a call with name and arguments, got {str(call)[:60]!r}")
    given = function.get("arguments") or {}
    if isinstance(given, str):
        given = _parsed(given, f"turn {number}: the arguments of a call in JSON")
    try:
        json.dumps(given, allow_nan=False)  # what Parquet holds may be no JSON
    except (ValueError, TypeError):
        raise ValueError(
            f"turn {number}: expected values of JSON as arguments of a call, got {str(given)[:60]}"
        ) from None
    same = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
    return {**same, "type": "function", "function": {"name": function["name"], "arguments": given}}
