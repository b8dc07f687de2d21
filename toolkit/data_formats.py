"""From rows to tokens: chat templates, what is learned of a chat, labels.

    tokenize_rows(rows, tokenizer, data) -> the same with input_ids

Running text has tokens only. Chats and pairs are samples: they have labels in addition to their tokens.
`train_qlora.prepare_dataset` gives it the rows of data_files.py, and data_blocks.py makes blocks of what it returns.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from markupsafe import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import OF_A_SOURCE, ConfigError, DataConfig, Source, counted
from fast_path.loss import IGNORED
from toolkit import chat_rows
from toolkit.chat_rows import BESIDE, JSON_CELL, KEYS, THOUGHTS, Chat, Message, recognise, to_chat, value_of
from toolkit.chat_templates import CHANGES, changes_words, render_chats

# ------------------------------------------------------------------------------------------------ formats


# For a tokenizer without a chat template; an answer ends with the tokenizer's end of sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TOGETHER = 16  # rows that go to the process that renders at once
MARKS = "\ufdd0", "\ufdd1"  # noncharacters: Unicode reserves them for use inside a program, so no text contains them
ARGUMENT = "argument0"  # of a call that shows how a template writes calls
THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: [bos] for Llama, [] for Qwen."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template for a tokenizer without one; a chat begins as the tokenizer begins a text."""
    return ("{{ bos_token }}" if first_token(tokenizer) else "") + PLAIN_TEMPLATE


@dataclasses.dataclass(frozen=True)
class Sample:
    """A chat, or its beginning up to a turn, as the template writes it.

    spans: [start, stop) of what is learned, in characters. ended: whether a span includes the end of its turn; if not,
    the end token that follows it is learned too.
    """

    text: str
    spans: list[tuple[int, int]]
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """The chat template that a tokenizer's chats go through, with its options (data.template_options)."""

    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def plain(self) -> str | None:
        """The template that is used because the tokenizer has none."""
        return plain_template(self.tokenizer) if self.tokenizer.chat_template is None else None

    @functools.cached_property
    def source(self) -> str:
        """The text of all templates that may be used."""
        found = self.plain or self.tokenizer.chat_template
        return found if isinstance(found, str) else json.dumps(found)

    @property
    def thinks(self) -> bool:
        """Whether the template may write or remove thoughts, depending on where a turn stands."""
        return "think" in self.source

    @functools.cached_property
    def writes_before(self) -> bool:
        """Whether the template writes something between its prompt for an answer and the answer, such as a recipient.

        The model has to write it itself at inference, so it is learned.
        """
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKS[0]}]
        try:
            asks, prompt, written = self.render(
                [(chat[:1], {}), (chat[:1], {"add_generation_prompt": True}), (chat, {})]
            )
        except ConfigError:  # it may want more than this, such as a system prompt
            return False
        before = written.split(MARKS[0])[0]
        return asks != prompt and before.startswith(prompt) and bool(before[len(prompt) :].strip())

    def _writes_call(self, content: str | None, arguments: Any) -> bool:
        """Whether the template writes a tool call of this form."""
        call = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": arguments}}
        turns: list[Message] = [{"role": "user", "content": "a"}]
        turns.append({"role": "assistant", "content": content, "tool_calls": [call]})
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
        try:
            (text,) = render_chats(self.tokenizer, [turns], self.plain, each=[self.options | {"tools": tools}])
        except ConfigError:
            return False
        return ARGUMENT in text

    @functools.cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template writes arguments only where they are JSON as a text, as in OpenAI's data."""
        argument = {"at": ARGUMENT}
        return not self._writes_call("", argument) and self._writes_call("", json.dumps(argument))

    @functools.cached_property
    def why_no_calls(self) -> str:
        """Why the template may leave out tool calls, for a message; perhaps an empty text."""
        if not self._writes_call(None, json.dumps({"at": ARGUMENT})):
            return ""
        return " (it writes them only where content is null, and transformers removes a content of null)"

    def render(self, chats: list[tuple[list[Message], dict[str, Any]]]) -> Iterator[str]:
        """Yield chats as the template writes them, each with options of its own: tools, add_generation_prompt."""
        messages, each = [chat for chat, _ in chats], [self.options | own for _, own in chats]
        if any("tool_calls" in message for chat in messages for message in chat) and self.arguments_as_text:
            messages = [[_with_text_arguments(message) for message in chat] for chat in messages]
        return render_chats(self.tokenizer, messages, self.plain, each=each)

    def prepared(self, chat: Chat) -> Chat:
        """Return a chat whose thoughts stand in the answers if the template has no place of its own for them."""
        if "reasoning_content" in self.source:
            return chat
        return dataclasses.replace(chat, messages=[_thought_inside(message) for message in chat.messages])


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = zip(message["tool_calls"], functions, texts, strict=True)
    return message | {"tool_calls": [call | {"function": own | {"arguments": text}} for call, own, text in calls]}


def _thought_inside(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return rest | {"content": f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"}


def marked(messages: list[Message], trim: bool) -> list[Message]:
    """Return a chat with a mark before and after each answer of the assistant, without the spaces around it if `trim`."""
    before, after = MARKS
    return [
        m | {"content": before + (m["content"].strip() if trim else m["content"]) + after}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


def answer_spans(text: str, with_marks: str, answers: int) -> list[tuple[int, int]] | None:
    """Return where the answers stand in a rendered chat; None if it differs from the one with marks by more than these."""
    pieces = re.split(f"([{''.join(MARKS)}])", with_marks)
    parts, marks = pieces[::2], pieces[1::2]
    if "".join(parts) != text or marks != [*MARKS] * answers:
        return None
    ends = list(itertools.accumulate(map(len, parts)))
    return list(zip(ends[0:-1:2], ends[1::2], strict=True))


def render(template: Template, chats: list[Chat], answers_only: bool = True) -> Iterator[list[Sample]]:
    """Yield the samples of each chat: one, or one for each learned turn if the template writes a turn differently later.

    A second rendering, with a mark before and after the assistant's words, shows what is learned. Without its marks it
    must equal the first one. Otherwise, and for thoughts and tool calls, what the template writes at each turn counts.
    answers_only: False finds no spans, since all tokens are learned.
    """
    simple = answers_only and not template.thinks and not template.writes_before
    by_marks = [simple and not any(_written_apart(c) for c in chat.messages) for chat in chats]
    asked = []
    for chat, by_mark in zip(chats, by_marks, strict=True):
        own = {"tools": chat.tools} if chat.tools else {}
        asked += [(chat.messages, own), *([(marked(chat.messages, trim=False), own)] if by_mark else [])]
    texts = template.render(asked)
    for chat, by_mark in zip(chats, by_marks, strict=True):
        text, spans = next(texts), None
        if not answers_only:
            yield [Sample(text, [])]
            continue
        roles = [message["role"] for message in chat.messages]
        if by_mark:
            with_marks = next(texts)
            spans = answer_spans(text, with_marks, roles.count("assistant"))
            if spans is None:  # many templates trim answers; with marks around them they cannot
                own = {"tools": chat.tools} if chat.tools else {}
                (with_marks,) = template.render([(marked(chat.messages, trim=True), own)])
                spans = answer_spans(text, with_marks, roles.count("assistant"))
        if spans is None:
            yield turn_by_turn(template, chat, text)
            continue
        learned = [learns for learns, role in zip(chat.learned, roles, strict=True) if role == "assistant"]
        yield [Sample(text, [span for span, learns in zip(spans, learned, strict=True) if learns])]


def _written_apart(message: Message) -> bool:
    """Return whether more than its text stands in a turn of the assistant."""
    return "tool_calls" in message or "reasoning_content" in message


REWRITES = "the chat template rewrites an answer of the assistant, so the tokens to train on cannot be found"


def turn_by_turn(template: Template, chat: Chat, text: str) -> list[Sample]:
    """Return what is learned of a chat as the template writes each learned turn when it is the last one.

    A turn begins where the prompt for it ends, as at inference. One sample if the whole chat (`text`) has all turns as
    they were then; otherwise one sample for each turn. Raise ValueError if a turn lacks what the data have.
    """
    turns = [number for number, learns in enumerate(chat.learned) if learns]
    if 0 in turns:
        raise ValueError("the first turn is the assistant's, so that nothing stands before what is learned")
    own = {"tools": chat.tools} if chat.tools else {}
    asked: list[tuple[list[Message], dict[str, Any]]] = []
    for i in turns:
        asked += [(chat.messages[:i], own | {"add_generation_prompt": True}), (chat.messages[: i + 1], own)]
        if bare := without_arguments(chat.messages[i]):
            asked.append(([*chat.messages[:i], bare], own))
    texts = template.render(asked)
    samples = []
    for i in turns:
        prompt, written = next(texts), next(texts)
        start, stop = len(os.path.commonprefix([prompt, written])), len(written.rstrip())
        before = str(chat.messages[i - 1].get("content") or "").strip()
        if start < prompt.rfind(before) + len(before):  # written otherwise before an answer than after it, or at random
            raise ValueError(REWRITES)
        check_written(template, chat.messages[i], written[start:stop], i + 1)
        if without_arguments(chat.messages[i]) and next(texts) == written:
            raise ValueError(NO_ARGUMENTS.format(i + 1))
        samples.append(Sample(written, [(start, stop)], ended=True))
    spans = [sample.spans[0] for sample in samples]
    if all(text.startswith(sample.text[:stop]) for sample, (_, stop) in zip(samples, spans, strict=True)):
        return [Sample(text, spans, ended=True)]
    return samples


NO_ARGUMENTS = (
    "turn {}: the chat template leaves out arguments of a tool call; use a model whose template writes all of them"
)


def without_arguments(message: Message) -> Message | None:
    """Return a turn whose tool calls have lost their arguments; None if they have none."""
    calls = message.get("tool_calls", ())
    if not any(call["function"]["arguments"] for call in calls):
        return None
    bare = [call | {"function": call["function"] | {"arguments": {}}} for call in calls]
    return message | {"tool_calls": bare}


def leaves(value: Any) -> Iterator[Any]:
    """Yield the names and the plain values that arguments consist of, but for nulls."""
    for name, part in value.items() if isinstance(value, dict) else ():
        yield name
        yield from leaves(part)
    for part in value if isinstance(value, list) else ():
        yield from leaves(part)
    if value is not None and not isinstance(value, (dict, list)):
        yield value


def forms(value: Any) -> Iterator[str]:
    """Yield how templates write a plain value: as it is, as JSON (also within a text, or safe for HTML), as Python does."""
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    yield value.strip()
    for ascii_only in (False, True):
        once = json.dumps(value, ensure_ascii=ascii_only)
        yield once[1:-1]
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1][2:-2]
        for mark in "<>&'":
            once = once.replace(mark, f"\\u{ord(mark):04x}")
        yield once[1:-1]
    yield repr(value)[1:-1]
    yield str(escape(value))


def check_written(template: Template, message: Message, written: str, number: int) -> None:
    """Raise ValueError if a template leaves out a part of a learned turn: its text, its thought or its calls."""
    content = message["content"]
    thoughts = [thought.strip() for thought in (*THINK.findall(content), message.get("reasoning_content", ""))]
    if not all(thought in written for thought in thoughts):
        raise ValueError(
            f"turn {number}: the chat template leaves out the thought before the answer; an option in "
            "data.template_options may keep it, or else write each chat as one text, in a column text"
        )
    if not all(part.strip() in written for part in THINK.split(content)[::2]):
        raise ValueError(REWRITES)
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in written:
            why = template.why_no_calls
            raise ValueError(
                f"turn {number}: the chat template leaves out tool calls{why}; use a model whose template has them"
            )
        arguments = leaves(call["function"]["arguments"])
        if not all(any(form in written for form in forms(value)) for value in arguments):
            raise ValueError(NO_ARGUMENTS.format(number))


@contextlib.contextmanager
def naming_row(index: int) -> Iterator[None]:
    """Have a ValueError name the row, by its number from 1."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"data.dataset: row {index + 1}: {error}") from None


@contextlib.contextmanager
def naming_source(data: DataConfig) -> Iterator[None]:
    """Have errors about one of several sources name it: data.dataset[1].text_column instead of data.text_column."""
    try:
        yield
    except ConfigError as error:
        name = data.name if isinstance(data, Source) else "data.dataset"
        problems = []
        for problem in error.problems if name != "data.dataset" else ():
            setting, colon, rest = problem.partition(":")
            own = setting.removeprefix("data.") in OF_A_SOURCE
            about = f"{name}.{setting.removeprefix('data.')}" if own else f"{name}: {setting}"
            about = name if setting == "data.dataset" else about if setting.startswith("data.") else setting
            problems.append(about + colon + rest)
        raise ConfigError(*(problems or error.problems)) from None


def render_rows(
    template: Template,
    rows: list[dict[str, Any]],
    columns: tuple[str, ...],
    indices: list[int],
    answers_only: bool = True,
) -> list[tuple[Chat, list[Sample]]]:
    """Return each row as a chat, and what `render` makes of it; raise ConfigError, which names the row."""
    chats, found = [], []
    for index, row in zip(indices, rows, strict=True):
        with naming_row(index):
            chats.append(template.prepared(to_chat(row, columns)))
    rendered = render(template, [chat for chat in chats if chat.messages], answers_only)
    for index, chat in zip(indices, chats, strict=True):
        with naming_row(index):
            found.append((chat, next(rendered) if chat.messages else [Sample("", [])]))
    return found


def answer_labels(encoding: Any, sample: Sample, specials: set[int]) -> np.ndarray:
    """Return the labels of a sample's tokens, int32 [tokens].

    What the assistant writes and the token that ends its turn are supervised; all other labels are IGNORED.
    encoding: as the tokenizers library returns it, with offsets in characters of the sample's text.
    """
    ids = np.array(encoding.ids, np.int32)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    labels = np.full(len(ids), IGNORED, np.int32)
    for start, stop in sample.spans:
        first = np.searchsorted(offsets[:, 1], start, side="right")
        last = end = np.searchsorted(offsets[:, 0], stop, side="left")
        while (
            not sample.ended
            and end < len(ids)
            and ids[end] not in specials
            and not sample.text[slice(*offsets[end])].strip()
        ):
            end += 1  # some templates put a space before the end token
        last = end + 1 if not sample.ended and end < len(ids) and ids[end] in specials else last
        labels[first:last] = ids[first:last]
    return labels


ROW = "row_number"  # column with the row's number in its split, from 0; only tokenize_rows makes it
FUNCTION = "prepare_dataset of train_qlora.py"  # shown as the name of data that a user's own function returned


class Tokenized(DatasetDict):
    """Tokenised rows, with a note of how they were read.

    template: the plain one if that was used. template_options: those that the chats were rendered with. notes: lines for
    the log.
    """

    source = f"rows of {FUNCTION}"
    template: str | None = None
    template_options: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def text_encoder(tokenizer: PreTrainedTokenizerBase, column: str) -> Callable[[pa.Table, list[int]], pa.Table]:
    """Return a function that adds the tokens to a batch of texts."""

    def encode(batch: pa.Table, indices: list[int]) -> pa.Table:
        texts = pc.fill_null(batch[column].cast(pa.string()), "").to_pylist()
        if tokenizer.is_fast:  # transformers' wrapper around this call would make it a third slower
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
        else:
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        batch = batch.select([column]).append_column("input_ids", pa.array(ids, pa.list_(pa.int32())))
        return batch.append_column(ROW, pa.array(indices, pa.int64()))

    return encode


def sample_encoder(
    template: Template, columns: tuple[str, ...], completion_only: bool
) -> Callable[[dict, list[int]], dict]:
    """Return a function that turns a batch of chats or pairs into tokens and labels."""
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(
            "model.name: chat and prompt/completion data need a fast tokenizer (tokenizer.json): the loss mask uses "
            "its character offsets"
        )
    backend, specials = copy.deepcopy(tokenizer.backend_tokenizer), set(tokenizer.added_tokens_decoder)
    backend.post_processor = None  # it would cut the spaces at a token's edges from its offsets

    def encode(batch: dict, indices: list[int]) -> dict:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        numbers, samples = [], []
        for start in range(0, len(rows), TOGETHER):
            part = slice(start, start + TOGETHER)
            rendered = render_rows(template, rows[part], columns, indices[part], completion_only)
            for index, (_, found) in zip(indices[part], rendered, strict=True):
                samples += found
                numbers += [index] * len(found)
        encodings = backend.encode_batch([sample.text for sample in samples], add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        labels = ids
        if completion_only:
            labels = [answer_labels(e, sample, specials) for e, sample in zip(encodings, samples, strict=True)]
        return {"input_ids": ids, "labels": labels, ROW: numbers}

    return encode


def _check_text(split: Dataset, data: DataConfig) -> None:
    kind = split.features[data.text_column]
    if getattr(kind, "dtype", None) in ("string", "large_string", "null"):
        return
    got = getattr(kind, "dtype", kind)
    if isinstance(kind, dict) and kind.keys() == {JSON_CELL}:
        rows = enumerate(map(value_of, split[data.text_column]), 1)
        number, value = next((i, value) for i, value in rows if not isinstance(value, str | None))
        got = f"{json.dumps(value)[:60]} in row {number}"
    raise ConfigError(f"data.text_column: expected text in column {data.text_column!r}, got {got}")


def thoughts_counted(split: Dataset, columns: tuple[str, ...], read: list[str]) -> tuple[int, int]:
    """Return how many learned turns hold a thought, and how many hold none."""
    counts = [0, 0]
    for index, row in enumerate(split.select_columns(read)):
        with naming_row(index):
            chat = to_chat(row, columns)
        for message, learns in zip(chat.messages, chat.learned, strict=True):
            if learns:
                counts[not (message.get("reasoning_content") or "<think>" in message["content"])] += 1
    return counts[0], counts[1]


def template_of(
    loaded: Sequence[tuple[DatasetDict, DataConfig]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None
) -> tuple[Template, list[str]]:
    """Return the template with its options, and lines for the log.

    Where no learned turn holds a thought, a template that knows enable_thinking is told not to think, so that a prompt
    ends at inference as it does before what is learned. loaded: the rows of each source. options: data.template_options.
    """
    template = Template(tokenizer, dict(options or {}))
    notes: list[str] = []
    thinking = plain = 0
    for rows, data in loaded if template.thinks else ():
        with naming_source(data):
            form, columns = recognise(rows["train"].column_names, data)
            if form != "text":
                found = thoughts_counted(rows["train"], columns, columns_read(rows["train"], form, columns))
                thinking, plain = thinking + found[0], plain + found[1]
    if thinking and plain:
        notes.append(f"{counted(thinking, 'answer')} with a thought, {plain:,} without: the model learns both")
    elif plain and "enable_thinking" in template.source and "enable_thinking" not in template.options:
        template = dataclasses.replace(template, options=template.options | {"enable_thinking": False})
        notes.append("no answer holds a thought: data.template_options gets enable_thinking: false")
    return template, notes


def columns_read(split: Dataset, form: str, columns: tuple[str, ...]) -> list[str]:
    """Return the columns that are read: those of the form, and those beside them."""
    beside = {"text": (), "chat": ("system", "tools"), "prompt": BESIDE}[form]
    return [*columns, *(name for name in beside if name in split.column_names and name not in columns)]


def unused_lines(rows: DatasetDict, template: Template, form: str, columns: tuple[str, ...]) -> Iterator[str]:
    """Yield lines that name the columns and the keys of turns that nothing reads, and where thoughts stand."""
    split = rows["train"]
    read = columns_read(split, form, columns)
    if unused := [name for name in split.column_names if name not in read]:
        yield f"columns not used: {' '.join(', '.join(unused).splitlines())}"
    kind = getattr(split.features[columns[0]], "feature", None)
    keys = {*getattr(rows, "keys_of_turns", ()), *(kind if isinstance(kind, dict) else ())} if form == "chat" else set()
    if unknown := sorted(keys - KEYS):
        yield f"keys of turns not used: {' '.join(', '.join(unknown).splitlines())}"
    if (thoughts := sorted(keys & {*THOUGHTS})) and "reasoning_content" not in template.source:
        yield f"{', '.join(thoughts)} stands as <think>…</think> before the answer: the chat template has no place for it"


def unwritten_lines(template: Template, chat: Chat, samples: list[Sample]) -> Iterator[str]:
    """Yield lines that tell what a chat has and the template does not write, or writes unlike the prompt at inference.

    samples: what `render` made of the chat.
    """
    own = {"tools": chat.tools} if chat.tools else {}
    with contextlib.suppress(ConfigError):  # a template that fails without tools does write them
        if own and [*template.render([(chat.messages, {})])] == [*template.render([(chat.messages, own)])]:
            yield "warning: the chat template does not write tools: column tools is not used"
    turns = [number for number, learns in enumerate(chat.learned) if learns]
    spans = [(sample.text, start) for sample in samples for start, _ in sample.spans]
    for number, (text, start) in zip(turns, spans, strict=True) if turns[:1] != [0] else ():
        (prompt,) = template.render([(chat.messages[:number], own | {"add_generation_prompt": True})])
        if not text.startswith(prompt) or text[len(prompt) : start].strip():
            yield (
                f"warning: at inference the prompt ends with {prompt[-40:]!r}, which does not stand before the answers "
                "that are learned; data.template_options may change it"
            )
            return


def _mapped(split: Dataset, encode: Callable[..., Any], key: str, what: str, data: DataConfig) -> Dataset:
    """Return the rows that a batched function makes of a split's, from datasets' cache if it has them by this key."""
    names = split.column_names
    try:
        made = split.map(encode, batched=True, with_indices=True, remove_columns=names, new_fingerprint=key, desc=what)
    except UnicodeDecodeError as error:  # Arrow does not check the bytes of texts in Parquet
        read = ", ".join(name for name in recognise(names, data)[1])
        raise ConfigError(f"data.text_column: column {read!r} in {data.dataset} is not UTF-8: {error}") from None
    return made.with_format(None)


def tokenize_rows(
    rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: Template | None = None
) -> Tokenized:
    """Return the rows with input_ids and their numbers in the split; nothing is cut.

    No special tokens are added to a text. Chats and pairs go through the chat template and get labels too, which are
    IGNORED where a token is not supervised. Rows tokenised before come from datasets' cache, whose key contains the
    rows, the tokenizer, the template, the settings and the source of the files that read rows.
    template: the one that was chosen by looking at the rows of all sources; None: by these rows alone.
    """
    out, identity = Tokenized(), tokenizer
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # an earlier call may have switched it on
        tokenizer.backend_tokenizer.no_padding()
        identity = tokenizer.backend_tokenizer.to_str()
    template, notes = (template, []) if template else template_of([(rows, data)], tokenizer, data.template_options)
    sources = [Path(file).read_bytes() for file in (__file__, chat_rows.__file__)]
    for name, split in rows.items():
        form, columns = recognise(split.column_names, data)
        read = columns_read(split, form, columns)
        settings = (read, data.completion_only, template.source, template.options, tokenizer.special_tokens_map)
        key = Hasher.hash((split._fingerprint, identity, settings, sources))
        out.source = f"{form}, from column{'s'[: len(read) > 1]} {', '.join(read)}"
        if form == "text":
            _check_text(split, data)
            split, encode = split.with_format("arrow"), text_encoder(tokenizer, data.text_column)
        else:
            encode = sample_encoder(template, columns, data.completion_only)
            out.template, out.template_options = template.plain, template.options
            own = "the tokenizer's chat template"
            out.source += f", through {'User: … Assistant: …, as it has no chat template' if out.template else own}"
            # seen even if all rows come from the cache
            [(chat, samples)] = render_rows(template, [split.select_columns(read)[0]], columns, [0])
            out.source += f", which {CHANGES}" if changes_words(chat.messages, samples[-1].text) else ""
            notes += unwritten_lines(template, chat, samples) if name == "train" else ()
        out[name] = _mapped(split, encode, key, f"tokenise {name}", data)
    form, columns = recognise(rows["train"].column_names, data)
    out.notes = (*getattr(rows, "notes", ()), *unused_lines(rows, template, form, columns), *notes)
    return out


# ------------------------------------------------------------------------------------------------ untrained tokens


def untrained_chat_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: np.ndarray | None = None,
    trained: Collection[str] | None = None,
) -> list[str]:
    """Return a list with a warning that names the chat template's tokens whose embedding was never trained, or [].

    An embedding was never trained if it is zero, if another token has exactly the same one, or if it points in the same
    direction as the rows beyond the tokenizer's vocabulary, which no text can train (the idea of Land and Bartolo,
    "Fishing for Magikarp", 2024). Those rows may be one direction: their cosines with it differ by 2e-6 in
    Qwen2.5-Coder-0.5B-Instruct, where the trained row of <|im_start|> has 0.93. So a row counts only if it is not much
    farther from that direction than they are.
    block: one of the data, int64 [2 or 3, tokens]; its tokens are looked at too, such as those around a tool call.
    trained: texts of tokens that the run trains, as in lora.train_tokens.
    """
    if tokenizer.chat_template is None:
        return []
    try:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (text,) = Template(tokenizer).render([(chat, {})])
    except ValueError as error:  # it may want more than this, such as a system prompt
        return [f"whether the base model knows the tokens of its chat template was not checked: {error}"]
    added = tokenizer.added_tokens_decoder
    ids = {*tokenizer(text, add_special_tokens=False)["input_ids"], *(block[0].tolist() if block is not None else ())}
    chat = sorted(ids & set(added))
    rows = model.get_input_embeddings().weight.detach()
    own = rows[chat].float()
    untrained = (own == 0).all(1)
    for i, token in enumerate(chat):  # 64 columns are enough to tell two trained rows apart; all need much memory
        untrained[i] |= (rows[:, :64] == rows[token, :64]).all(1).sum() > 1
    unused = F.normalize(rows[len(tokenizer) :].float(), dim=1)
    if len(unused) > 1:
        center = F.normalize(unused.mean(0), dim=0)
        usual, found = unused @ center, F.normalize(own, dim=1) @ center
        near = 1 - found <= max(4 * (1 - usual.min()), 1e-4)
        untrained |= (usual.mean() > 0.8) & (found > 0.9 * usual.mean()) & near
    names = [str(added[token]) for token, bad in zip(chat, untrained.tolist(), strict=True) if bad]
    names = [name for name in names if name not in (trained or ())]
    if not names:
        return []
    return [
        f"warning: {', '.join(names)}: the base model never learned these tokens of its chat template; train their "
        f"embedding rows with --train_tokens '[{', '.join(names)}]', or use a model that did, such as its Instruct model"
    ]


HALF = "\ufffd"  # how a tokenizer decodes tokens that hold only a part of a character


def whole_characters(
    ids: np.ndarray, learned: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[bool, str]]:
    """Yield (learned, text) for each run of neighbouring tokens that are all supervised, or all not.

    A character whose tokens belong to two runs is shown with the first one.
    """
    start = 0
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and learned[stop] == learned[start]:
            stop += 1
        text = tokenizer.decode(ids[start:stop])
        whole = text.rstrip(HALF)
        for longer in (
            range(stop + 1, min(stop + 4, len(ids) + 1)) if whole != text else ()
        ):  # a character has at most 4 bytes
            more = tokenizer.decode(ids[start:longer])
            if len(more) == len(whole) + 1 and not more.endswith(HALF):
                stop, whole = longer, more
                break
        yield bool(learned[start]), whole
        start = stop
