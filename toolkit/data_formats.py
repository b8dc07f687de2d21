"""From files to tokens: rows and their columns, chat templates, labels.

    load_rows(data) -> DatasetDict of rows            tokenize_rows(rows, tokenizer, data) -> the same with input_ids

Running text has tokens only. Chats and pairs are samples: they have labels in addition to their tokens.
`train_qlora.prepare_dataset` calls the two functions above, and data_blocks.py makes blocks of what it returns.
"""

import contextlib
import copy
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import DATA_FILES, ConfigError, DataConfig, missing_data
from fast_path.loss import IGNORED
from quantization_utils import asking_hub, cache_problem, hub_problem
from toolkit.chat_templates import CHANGES, changes_words, render_chats
from toolkit.encodings import not_utf8

BUILDERS = DATA_FILES  # by suffix, the builder of datasets that reads such files
# Parts of the errors that datasets raises for files without rows; each format has its own.
NO_ROWS = ("at least one example", "corresponds to no data", "BatchSize must be greater than 0", "No columns to parse")
# Lines of a .txt keep their line breaks, so that they can be joined again. In a .csv NA and None stay words, not nulls.
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"keep_linebreaks": True, "encoding": "utf-8-sig"},
    "csv": {"keep_default_na": False},
    "parquet": {
        "batch_size": 10_000
    },  # rows; else a whole row group is decoded at once, which may repeat one long text
}
DEEPEST = 200  # levels of JSON; of 10,000 pyarrow 26 dies (a segmentation fault), sooner in threads of a small stack
MOST_COLUMNS = 10_000  # of a .csv; datasets needs minutes for ten times as many
AS_SQUARE, NO_BRACKETS = bytes.maketrans(b"{}", b"[]"), bytes(set(range(256)) - set(b'[]{}"\n'))

# ------------------------------------------------------------------------------------------------ rows


def local_files(dataset: str) -> tuple[str, dict[str, list[str]]] | None:
    """Return (builder, files by split) of a local file or folder, or None if `dataset` is a hub id."""
    path = Path(dataset)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ConfigError(f"data.dataset: expected one of {', '.join(BUILDERS)}, got {path}")
        return BUILDERS[path.suffix.lower()], {"train": [str(path)]}
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.suffix.lower() in BUILDERS]
        for odd in [p for p in inside if not (p.is_file() or p.is_dir())][:1]:  # reading a named pipe would never end
            raise ConfigError(f"data.dataset: expected a file, got {odd}, which is {_kind_of(odd)}")
        kinds = sorted({p.suffix.lower() for p in inside})
        if len({BUILDERS[kind] for kind in kinds}) != 1:
            found = f"a mixture of {', '.join(kinds)}" if kinds else "none"
            raise ConfigError(
                f"data.dataset: expected files of one kind ({', '.join(BUILDERS)}) in {path}, got {found}"
            )
        base = glob.escape(str(path))  # datasets finds the splits by the names of files and folders
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        files = {split: [f for f in names if Path(f).suffix.lower() in BUILDERS] for split, names in found.items()}
        return BUILDERS[kinds[0]], {split: names for split, names in files.items() if names}
    if problems := missing_data(dataset):
        raise ConfigError(*problems)
    if os.path.lexists(dataset):
        raise ConfigError(f"data.dataset: expected a file or a folder, got {dataset}, which is {_kind_of(path)}")
    return None


def _kind_of(path: Path) -> str:
    """Return in words what a path is that is no regular file."""
    return "a link to nothing" if path.is_symlink() and not path.exists() else "a pipe, a socket or a device"


class Nesting:
    """How deeply the brackets of a JSON text, given in blocks, are nested. Brackets in strings do not count.

    JSON has no line breaks in strings, so each line begins outside of one, whatever came before. The depth counts from
    the lowest level so far: in a text of wrong brackets it is never less than what a reader meets that begins at a line.
    """

    def __init__(self) -> None:
        self.rest, self.inside, self.above = b"", 0, 0  # a backslash at a block's end, within a string, levels above

    def deepest(self, block: bytes) -> int:
        """Return the largest depth in the next block."""
        block = (self.rest + block).replace(rb"\\", b"")
        self.rest = b"\\" if block.endswith(b"\\") else b""
        signs = np.frombuffer(block.replace(rb"\"", b"").translate(AS_SQUARE, NO_BRACKETS), np.uint8)
        quotes = np.cumsum(signs == ord('"'), dtype=np.int64) + self.inside  # up to each sign
        before_line = np.maximum.accumulate(np.where(signs == ord("\n"), quotes, 0))
        inside = (quotes - before_line) & 1
        steps = np.where(inside, 0, (signs == ord("[")).astype(np.int64) - (signs == ord("]")))
        level = np.concatenate([[self.above], self.above + np.cumsum(steps)])
        depth = level - np.minimum(np.minimum.accumulate(level), 0)
        self.inside, self.above = int(inside[-1]) if len(inside) else self.inside, int(depth[-1])
        return int(depth.max())


def content_digest(files: dict[str, list[str]]) -> str:
    """Return a hash of the files' bytes as a key for datasets' cache, which by itself looks at paths and times only.

    Raise ValueError if a JSON file is nested more than DEEPEST levels deep.
    """
    digest = hashlib.sha256()
    for name in itertools.chain(*files.values()):
        nesting = Nesting() if BUILDERS[Path(name).suffix.lower()] == "json" else None
        with open(name, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                if nesting and nesting.deepest(block) > DEEPEST:
                    raise ValueError(f"nested more than {DEEPEST:,} levels deep")
    return digest.hexdigest()[:32]


def check_encoding(files: dict[str, list[str]]) -> None:
    """Raise ConfigError for a text file that is not UTF-8, and for a .parquet file that is something else.

    Parquet always stores text as UTF-8.
    """
    for name in itertools.chain(*files.values()):
        kind = BUILDERS[Path(name).suffix.lower()]
        problem = not_parquet(name) if kind == "parquet" else not_utf8(name)
        if not problem and kind == "csv":
            with open(name, "rb") as file:
                columns = file.readline().count(b",") + 1
            problem = f"expected at most {MOST_COLUMNS:,} columns, got {columns:,}" if columns > MOST_COLUMNS else None
        if problem:
            raise ConfigError(f"data.dataset: cannot read {name}: {problem}")


def not_parquet(name: str) -> str | None:
    """Return why a .parquet file is not read: it is another kind of file, or repeats one row without end; or None.

    datasets would unpack an archive of this name. A few kilobytes of parquet may hold a row a thousand million times.
    """
    with open(name, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) != b"PAR1":
            return "it is not a parquet file"
    found = pq.read_metadata(name)
    unpacked = sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
    if found.num_rows > size or unpacked > 1000 * size:
        return f"{found.num_rows:,} rows, {unpacked:,} bytes when unpacked, in a file of {size:,} bytes"
    return None


def unreadable(error: Exception, dataset: str, local: bool) -> ConfigError:
    """Return the error that explains in one line why datasets could not load a data set."""
    if known := cache_problem(error) or (None if local else hub_problem("data.dataset", dataset, error)):
        return known
    cause = error.__cause__ or error
    if isinstance(cause, StopIteration) or any(words in str(cause) for words in NO_ROWS):
        return ConfigError(f"data.dataset: {dataset} has no rows")
    kind, lines = type(cause).__name__, str(cause).strip().splitlines()
    return ConfigError(f"data.dataset: cannot read {dataset}: {kind}: {lines[0][:300] if lines else kind}")


def load_rows(data: DataConfig) -> DatasetDict:
    """Return the rows of the splits that `data` names, from the hub or from local files.

    If the validation split does not exist, only the training split is returned. Raises ConfigError.
    """
    local = local_files(data.dataset)
    try:
        if local is None:
            with asking_hub(data.dataset):
                loaded = datasets.load_dataset(data.dataset, data.dataset_config)
        else:
            builder, files = local
            check_encoding(files)
            patterns = {split: [glob.escape(name) for name in names] for split, names in files.items()}
            loaded = datasets.load_dataset(
                builder, content_digest(files), data_files=patterns, **OPTIONS.get(builder, {})
            )
    except ConfigError:
        raise
    except Exception as error:  # the readers of datasets, pandas and pyarrow raise anything about a strange file
        raise unreadable(error, data.dataset, local is not None) from None
    only = next(iter(loaded)) if local is not None and len(loaded) == 1 else data.train_split
    if only not in loaded:
        raise ConfigError(
            f"data.train_split: {data.dataset} has no split {data.train_split!r}; it has {', '.join(loaded)}"
        )
    rows = DatasetDict(train=loaded[only])
    if data.validation_split in loaded and data.validation_split != only:
        rows["validation"] = loaded[data.validation_split]
    for split in rows.values():
        if not len(split):
            raise ConfigError(f"data.dataset: {data.dataset} has no rows")
    return rows


# ------------------------------------------------------------------------------------------------ formats


CHATS = (("messages",), ("conversations",))
PAIRS = (("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"))
SAMPLES = {"chat": CHATS, "prompt": PAIRS}
# Names of the roles in ShareGPT and similar data.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# For a tokenizer without a chat template; an answer ends with the tokenizer's end of sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TOGETHER = 16  # rows that go to the process that renders at once
MARKS = "\ufdd0", "\ufdd1"  # noncharacters: Unicode reserves them for use inside a program, so no text contains them


def recognise(columns: Sequence[str], data: DataConfig) -> tuple[str, tuple[str, ...]]:
    """Return the kind of rows with these columns (text, chat or prompt) and the columns to read; raise ConfigError.

    data.format decides. auto looks for the columns of chats, then of pairs, then of text. If data.text_column is not
    the default and exists, it is text.
    """
    known = SAMPLES | {"text": ((data.text_column,),)}
    order = list(known) if data.format == "auto" else [data.format]
    if data.format == "auto" and data.text_column in columns and data.text_column != DataConfig().text_column:
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
    hint = "" if data.format == "text" else "; chats need messages or conversations, pairs need prompt + completion"
    raise ConfigError(
        f"data.text_column: no column {data.text_column!r} in {data.dataset}; it has {', '.join(columns)}{hint}"
    )


def to_messages(row: dict[str, Any], columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return a row's turns as role and content; raise a ValueError that says what is wrong with them.

    A pair becomes a turn of the user and one of the assistant. A text in `input` is put below the instruction.
    """
    if columns in CHATS:
        turns = row[columns[0]] or []
    else:
        *asked, answer = (row[name] for name in columns)
        asked = [text for i, text in enumerate(asked) if text or i == 0]
        question = "\n\n".join(asked) if all(isinstance(text, str) for text in asked) else asked
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected a list of turns in column {columns[0]!r}, got {str(turns)[:60]!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role") or turn.get("from")
        role = ROLES.get(role, role) if isinstance(role, str) else role
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"turn {number}: expected a role system, user, assistant or tool, got {role!r}")
        if not isinstance(content, str) or turn.get("tool_calls"):
            got = "tool calls" if turn.get("tool_calls") else repr(content)[:60]
            raise ValueError(f"turn {number}: expected a text, got {got}")
        messages.append({"role": role, "content": content})
    return messages


Rendered = tuple[str, list[tuple[int, int]]]  # a chat as the template writes it, spans [start, stop) of the answers


def marked(messages: list[dict[str, str]], trim: bool) -> list[dict[str, str]]:
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


def render(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> Iterator[Rendered]:
    """Yield each chat as the template writes it, and the spans [start, stop) of the assistant's words in it.

    A second rendering, with a mark before and after the assistant's words, shows the spans. Without its marks it must
    equal the first one. Otherwise the template rewrites an answer (such as a `<think>` part), so that its span is not
    known: ValueError.
    """
    template = PLAIN_TEMPLATE if tokenizer.chat_template is None else None
    texts = render_chats(tokenizer, [c for chat in chats for c in (chat, marked(chat, trim=False))], template)
    for chat in chats:
        text, with_marks = next(texts), next(texts)
        answers = sum(message["role"] == "assistant" for message in chat)
        spans = answer_spans(text, with_marks, answers)
        if spans is None:  # many templates trim answers; with marks around them they cannot
            (with_marks,) = render_chats(tokenizer, [marked(chat, trim=True)], template)
            spans = answer_spans(text, with_marks, answers)
        if spans is None:
            raise ValueError(
                "the chat template rewrites an answer of the assistant, so the tokens to train on cannot be found"
            )
        yield text, spans


@contextlib.contextmanager
def naming_row(index: int) -> Iterator[None]:
    """Have a ValueError name the row, by its number from 1."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"data.dataset: row {index + 1}: {error}") from None


def render_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], columns: tuple[str, ...], indices: list[int]
) -> list[tuple[list[dict[str, str]], str, list[tuple[int, int]]]]:
    """Return the messages of each row and what `render` makes of them; raise ConfigError, which names the row."""
    chats, found = [], []
    for index, row in zip(indices, rows, strict=True):
        with naming_row(index):
            chats.append(to_messages(row, columns))
    rendered = render(tokenizer, [chat for chat in chats if chat])
    for index, chat in zip(indices, chats, strict=True):
        with naming_row(index):
            found.append((chat, *(next(rendered) if chat else ("", []))))
    return found


def answer_labels(encoding: Any, text: str, spans: list[tuple[int, int]], specials: set[int]) -> np.ndarray:
    """Return the labels of a rendered chat's tokens, int32 [tokens].

    The assistant's words and the token that ends its turn are supervised; all other labels are IGNORED.
    encoding: as the tokenizers library returns it, with offsets in characters of `text`.
    """
    ids = np.array(encoding.ids, np.int32)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    labels = np.full(len(ids), IGNORED, np.int32)
    for start, stop in spans:
        first = np.searchsorted(offsets[:, 1], start, side="right")
        last = end = np.searchsorted(offsets[:, 0], stop, side="left")
        while end < len(ids) and ids[end] not in specials and not text[slice(*offsets[end])].strip():
            end += 1  # some templates put a space before the end token
        last = end + 1 if end < len(ids) and ids[end] in specials else last
        labels[first:last] = ids[first:last]
    return labels


ROW = "row_number"  # column with the row's number in its split, from 0; only tokenize_rows makes it
FUNCTION = "prepare_dataset of train_qlora.py"  # shown as the name of data that a user's own function returned


class Tokenized(DatasetDict):
    """Tokenised rows, with a note of how they were read."""

    source = f"rows of {FUNCTION}"
    template: str | None = None  # PLAIN_TEMPLATE if that was used


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
    tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], completion_only: bool
) -> Callable[[pa.Table, list[int]], pa.Table]:
    """Return a function that turns a batch of chats or pairs into tokens and labels."""
    if not tokenizer.is_fast:
        raise ConfigError(
            "model.name: chat and prompt/completion data need a fast tokenizer (tokenizer.json): the loss mask uses "
            "its character offsets"
        )
    backend, specials = copy.deepcopy(tokenizer.backend_tokenizer), set(tokenizer.added_tokens_decoder)
    backend.post_processor = None  # it would cut the spaces at a token's edges from its offsets

    def encode(batch: dict, indices: list[int]) -> dict:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*map(batch.get, columns), strict=True)]
        chats = []
        for start in range(0, len(rows), TOGETHER):
            part = slice(start, start + TOGETHER)
            chats += [(text, spans) for _, text, spans in render_rows(tokenizer, rows[part], columns, indices[part])]
        encodings = backend.encode_batch([text for text, _ in chats], add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        places, labels = zip(encodings, chats, strict=True), ids
        if completion_only:
            labels = [answer_labels(e, text, spans, specials) for e, (text, spans) in places]
        return {"input_ids": ids, "labels": labels, ROW: indices}

    return encode


def _check_text(split: Dataset, data: DataConfig) -> None:
    kind = split.features[data.text_column]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ConfigError(
            f"data.text_column: expected text in column {data.text_column!r}, got {getattr(kind, 'dtype', kind)}"
        )


def tokenize_rows(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Tokenized:
    """Return the rows with input_ids and their numbers in the split; nothing is cut.

    No special tokens are added to a text. Chats and pairs go through the chat template and get labels too, which are
    IGNORED where a token is not supervised. Rows tokenised before come from datasets' cache, whose key contains the
    rows, the tokenizer, the template, the settings and the source of this file.
    """
    out, identity = Tokenized(), tokenizer
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # an earlier call may have switched it on
        tokenizer.backend_tokenizer.no_padding()
        identity = tokenizer.backend_tokenizer.to_str()
    for name, split in rows.items():
        form, columns = recognise(split.column_names, data)
        settings = (columns, data.completion_only, tokenizer.chat_template, tokenizer.special_tokens_map)
        key = Hasher.hash((split._fingerprint, identity, settings, Path(__file__).read_bytes()))
        out.source = f"{form}, from column{'s'[: len(columns) > 1]} {', '.join(columns)}"
        if form == "text":
            _check_text(split, data)
            split, encode = split.with_format("arrow"), text_encoder(tokenizer, data.text_column)
        else:
            encode = sample_encoder(tokenizer, columns, data.completion_only)
            out.template = PLAIN_TEMPLATE if tokenizer.chat_template is None else None
            own = "the tokenizer's chat template"
            out.source += f", through {'User: … Assistant: …, as it has no chat template' if out.template else own}"
            [(messages, text, _)] = render_rows(
                tokenizer, [split[0]], columns, [0]
            )  # seen even if all rows come from the cache
            out.source += f", which {CHANGES}" if changes_words(messages, text) else ""
        try:
            out[name] = split.map(
                encode,
                batched=True,
                with_indices=True,
                remove_columns=split.column_names,
                new_fingerprint=key,
                desc=f"tokenise {name}",
            ).with_format(None)
        except UnicodeDecodeError as error:  # Arrow does not check the bytes of texts in JSON and Parquet
            read = ", ".join(columns)
            raise ConfigError(f"data.text_column: column {read!r} in {data.dataset} is not UTF-8: {error}") from None
    return out


# ------------------------------------------------------------------------------------------------ untrained tokens


def untrained_chat_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a list with a warning that names the chat template's tokens whose embedding was never trained, or [].

    An embedding was never trained if it is zero, if another token has exactly the same one, or if it points in the same
    direction as the rows beyond the tokenizer's vocabulary, which no text can train (the idea of Land and Bartolo,
    "Fishing for Magikarp", 2024).
    """
    if tokenizer.chat_template is None:
        return []
    try:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [(text, _)] = render(tokenizer, [chat])
    except ValueError as error:  # it may want more than this, such as a system prompt
        return [f"whether the base model knows the tokens of its chat template was not checked: {error}"]
    added = tokenizer.added_tokens_decoder
    chat = sorted(set(tokenizer(text, add_special_tokens=False)["input_ids"]) & set(added))
    rows = model.get_input_embeddings().weight.detach()
    own = rows[chat].float()
    untrained = (own == 0).all(1)
    for i, token in enumerate(chat):  # 64 columns are enough to tell two trained rows apart; all need much memory
        untrained[i] |= (rows[:, :64] == rows[token, :64]).all(1).sum() > 1
    unused = F.normalize(rows[len(tokenizer) :].float(), dim=1)
    if len(unused) > 1:
        center = F.normalize(unused.mean(0), dim=0)
        usual = (unused @ center).mean()
        untrained |= (usual > 0.8) & (F.normalize(own, dim=1) @ center > 0.9 * usual)
    names = [str(added[token]) for token, bad in zip(chat, untrained.tolist(), strict=True) if bad]
    if not names:
        return []
    return [
        f"warning: {', '.join(names)}: the base model never learned these tokens of its chat template; "
        "use the Instruct model, or train on plain text"
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
