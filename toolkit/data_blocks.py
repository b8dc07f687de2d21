"""From tokenised rows to batches: document boundaries, the held-out part, blocks, packing, padding.

    make_blocks(tokenized, tokenizer, data, seed) -> {"train": Blocks, "validation": Blocks or None}

Running text becomes one stream of tokens that is cut into blocks. Chats and pairs are samples: each is cut at
data.max_length, and several can share a block without seeing each other.

Any DatasetDict with input_ids will do, so that the tutorial's own prepare_dataset can replace
`train_qlora.prepare_dataset`.
"""

import dataclasses
import functools
import itertools
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from config import ConfigError, DataConfig, Source, counted, sources_of
from fast_path.loss import IGNORED, CausalLMLoss
from toolkit.data_files import SAVED, chosen_files, local_files, scan
from toolkit.data_formats import FUNCTION, HALF, ROW, Tokenized, first_token, whole_characters
from toolkit.text_width import start_of

DRAW = 1  # beside the seed: rows are drawn in another order than the one in which they are held out
# Wikitext marks an article by " = Title = " and its sections by " = = Title = = ".
WIKITEXT_TITLE = r"^ ?= [^=](.*[^=])? = ?\n?$"


# ------------------------------------------------------------------------------------------------ documents


def is_wikitext(data: Source) -> bool:
    """Return whether the name of the data set (not of a folder above it) contains wikitext."""
    return "wikitext" in Path(data.dataset).name.lower()


def rows_are_lines(data: Source) -> bool:
    """Return whether the rows are the lines of a running text: data.rows says so, or is auto for Wikitext or a .txt."""
    if data.rows != "auto":
        return data.rows == "lines"
    if is_wikitext(data):
        return True
    local = local_files(data.dataset)
    return local is not None and local[0] == "text"


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token between two documents: <|endoftext|> if the vocabulary has it, otherwise the end of sequence.

    A chat's turn end (<|im_end|>) belongs to chats only: after plain text it would teach the model to stop there.
    """
    end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise ConfigError("model.name: its tokenizer has neither <|endoftext|> nor an end of sequence token")
    return end


def _column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column's Arrow data, with the rows in the order of the dataset."""
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    return dataset.data.column(name)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Return the number of tokens of each row, int64 [rows]."""
    return pc.list_value_length(_column(dataset, "input_ids")).to_numpy().astype(np.int64)


def flat_column(dataset: Dataset, name: str) -> tuple[np.ndarray, ...]:
    """Return all numbers in a column of lists as int32 arrays; they stay memory-mapped if they are int32 on disk."""
    chunks = (chunk.flatten().to_numpy() for chunk in _column(dataset, name).chunks if len(chunk))
    return tuple(chunk.astype(np.int32, copy=False) for chunk in chunks)


def check_rows(dataset: Dataset, split: str) -> None:
    """Raise a ConfigError if a split of prepare_dataset has no lists of token ids, or labels of another length."""
    if "input_ids" not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise ConfigError(f"prepare_dataset: expected a column input_ids in the split {split!r}, got {found}")
    names = [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]
    for name in names:
        kind = dataset.features[name]
        held = getattr(getattr(kind, "feature", None), "dtype", "")
        if "int" not in held and (name != "attention_mask" or not held):  # a mask may also be of bool or float
            raise ConfigError(f"prepare_dataset: expected a list of integers in each row of {name}, got {kind}")
    counts = {name: pc.fill_null(pc.list_value_length(_column(dataset, name)), -1).to_numpy() for name in names}
    for name, found in counts.items():
        bad = np.flatnonzero((found != counts["input_ids"]) | (found < 0))
        if len(bad):
            row = bad[0]
            expected = f"{counts['input_ids'][row]:,} {name}, one per token" if name != "input_ids" else "a list of ids"
            got = f"{found[row]:,}" if found[row] >= 0 else "null"
            raise ConfigError(f"prepare_dataset: row {row + 1} of {split}: expected {expected}, got {got}")


def check_ids(dataset: Dataset, split: str, vocabulary: int) -> None:
    """Raise a ConfigError if a user's own function returned a token id that the tokenizer does not have.

    A label may also be IGNORED. Any other negative label would be learned, though no token has it.
    """
    for name in ("input_ids", "labels"):
        first_row = 0
        for chunk in _column(dataset, name).chunks if name in dataset.column_names else ():
            ids = chunk.flatten()
            wrong = pc.fill_null(pc.or_(pc.less(ids, 0), pc.greater_equal(ids, vocabulary)), True).to_numpy(False)
            if name == "labels":
                wrong &= ~pc.fill_null(pc.equal(ids, IGNORED), False).to_numpy(False)
            if wrong.any():
                place = int(np.argmax(wrong))
                row = first_row + np.searchsorted(np.cumsum(chunk.value_lengths().to_numpy()), place, side="right") + 1
                allowed = f"0 to {vocabulary - 1:,}" + (f", or {IGNORED}" if name == "labels" else "")
                got = "null" if ids[place].as_py() is None else ids[place]
                raise ConfigError(f"prepare_dataset: row {row} of {split}: expected {name} of {allowed}, got {got}")
            first_row += len(chunk)


def without_pads(dataset: Dataset, split: str) -> Dataset:
    """Return the rows without padding. The attention mask tells where it is; a pad's id may also be a real token's.

    Raises a ConfigError if the mask says that all is padding.
    """
    if "attention_mask" not in dataset.column_names:
        return dataset
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]

    def strip(batch: dict) -> dict:
        masks = batch["attention_mask"]
        return {
            name: [list(itertools.compress(row, mask)) for row, mask in zip(batch[name], masks, strict=True)]
            for name in names
        }

    features = {name: kind for name, kind in dataset.features.items() if name != "attention_mask"}
    features |= {name: datasets.List(datasets.Value("int32")) for name in names}
    found = dataset.map(
        strip, batched=True, features=datasets.Features(features), remove_columns="attention_mask", desc="unpad"
    )
    if row_lengths(dataset).any() and not row_lengths(found).any():
        raise ConfigError(
            f"prepare_dataset: attention_mask of {split}: expected 1 for each token and 0 for padding, got only zeros"
        )
    return found


def numbered(dataset: Dataset) -> Dataset:
    """Return the rows with a column of their numbers, from 0."""
    dataset = dataset.remove_columns(ROW) if ROW in dataset.column_names else dataset
    return dataset.add_column(ROW, np.arange(len(dataset)))


def _flags(column: pa.ChunkedArray, test: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Return the result of a test for each text, bool [rows].

    It works on one chunk after another, since copies of a whole large corpus would need too much memory.
    """
    texts = (pc.fill_null(chunk.cast(pa.string()), "") for chunk in column.chunks)
    return np.concatenate([test(part).to_numpy(zero_copy_only=False).astype(bool) for part in texts])


def drop_empty(dataset: Dataset, data: Source) -> tuple[Dataset, np.ndarray]:
    """Return the rows that have tokens, and for each of them whether a document starts there, bool [rows].

    If rows are documents, each row starts one. If rows are lines, a document starts after a blank line, or at a title
    of Wikitext; without a text column only at the first row.
    """
    kept = row_lengths(dataset) > 0
    text = _column(dataset, data.text_column) if data.text_column in dataset.column_names else None
    if text is not None:
        blank = _flags(text, lambda part: pc.equal(pc.utf8_trim_whitespace(part), ""))
        kept &= ~blank
    if not rows_are_lines(data):
        starts = np.ones(len(dataset), bool)
    elif text is None:
        starts = np.zeros(len(dataset), bool)
    elif is_wikitext(data):
        starts = _flags(text, lambda part: pc.match_substring_regex(part, WIKITEXT_TITLE))
    else:
        starts = np.concatenate([[True], blank[:-1]])  # a row starts a document if the row before it is blank
    if not kept.any():
        raise ConfigError(f"data.dataset: {data.dataset} has no text in column {data.text_column!r}")
    index = np.flatnonzero(kept)
    starts = starts[index].copy()
    starts[0] = True
    return (dataset if len(index) == len(dataset) else dataset.select(index)), starts


def close_documents(dataset: Dataset, starts: np.ndarray, first: list[int], end: list[int]) -> Dataset:
    """Return the rows (input_ids and ROW) with the tokens `first` before and `end` after every document."""
    ends = np.append(starts[1:], True)

    def close(batch: dict, indices: list[int]) -> dict:
        out = []
        for i, ids in zip(indices, batch["input_ids"], strict=True):
            before = first if starts[i] and ids[: len(first)] != first else []
            out.append([*before, *ids, *(end if ends[i] else [])])
        return {"input_ids": out}

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), ROW: datasets.Value("int64")})
    return dataset.select_columns(["input_ids", ROW]).map(
        close, batched=True, with_indices=True, features=features, desc="join"
    )


def hold_out(starts: np.ndarray, lengths: np.ndarray, fraction: float, least: int, seed: int) -> np.ndarray | None:
    """Return which rows are held out, bool [rows]: documents chosen by the seed, or a single document's last rows.

    They have at least `fraction` of the rows and `least` tokens (or half of all tokens, if that is less). Return None
    if whole documents would give too few tokens, or more than half of them: then a row itself must be cut.
    """
    document = np.cumsum(starts) - 1
    order = np.random.default_rng(seed).permutation(document[-1] + 1)
    if len(order) == 1:
        document = np.arange(len(starts))
        order = document[::-1]
    rows, tokens = np.bincount(document)[order], np.bincount(document, lengths)[order]
    total = tokens.sum()
    enough = (np.cumsum(rows) >= fraction * len(starts)) & (np.cumsum(tokens) >= min(least, total / 2))
    count = min(int(np.argmax(enough)) + 1, len(order) - 1)
    fits = least <= tokens[:count].sum() <= max(fraction, 0.5) * total
    return np.isin(document, order[:count]) if count and (fits or total < 2 * least) else None


def draw(starts: np.ndarray, counts: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which rows are drawn, bool [rows]: documents chosen by the seed, or a single document's first rows.

    They have as nearly `share` of all counts as whole documents can have. starts: whether a document starts at a row.
    counts: how much each row counts.
    """
    document = np.cumsum(starts) - 1
    order = np.random.default_rng((seed, DRAW)).permutation(document[-1] + 1)
    if len(order) == 1:
        document = order = np.arange(len(starts))
    reached = np.cumsum(np.bincount(document, counts)[order])
    return np.isin(document, order[: int(np.argmin(np.abs(reached - share * reached[-1]))) + 1])


# ------------------------------------------------------------------------------------------------ blocks


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stream of tokens that is cut into blocks of `length`; the last block may be shorter.

    Indexing reads memory-mapped Arrow data.
    pieces: int32 arrays that form the stream one after another. rows, documents: how many of them it was made of.
    dataset: the name of the data, which is data.dataset or FUNCTION. source: how the rows were read. template: the chat
    template that was used, if it is not the tokenizer's. template_options: those that chats were rendered with. notes:
    lines that the user should see. origin: the rows whose tokens form the stream.
    """

    pieces: tuple[np.ndarray, ...]
    length: int
    cuts: np.ndarray  # int64 [blocks + 1]: block i is stream[cuts[i]:cuts[i + 1]]
    rows: int
    documents: int
    dataset: str = ""
    source: str = ""
    template: str | None = None
    template_options: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    origin: Dataset | None = None

    def __len__(self) -> int:
        return len(self.cuts) - 1

    @property
    def parts(self) -> Sequence["Blocks"]:
        """The blocks of each source, which are these alone; MixedBlocks has several."""
        return (self,)

    def spans(self, i: int) -> np.ndarray:
        """Return the spans of a block in the stream, int64 [spans, 2]: start and stop."""
        return self.cuts[None, i : i + 2]

    def rows_of(self, blocks: Iterable[int]) -> list[np.ndarray]:
        """Return for each block the numbers (in their split, from 0) of the rows whose tokens it has, int64 [rows]."""
        ends, numbers = np.cumsum(row_lengths(self.origin)), _column(self.origin, ROW).to_numpy()
        found = []
        for i in blocks:
            low, high = np.searchsorted(
                ends, (self.spans(i) - [0, 1]).T, side="right"
            )  # rows of the first and last token
            parts = [numbers[first : last + 1] for first, last in zip(low, high, strict=True)]
            found.append(np.concatenate(parts))
        return found

    def positions(self, blocks: Iterable[int]) -> int:
        """Return how many tokens these blocks hold, learned or only read."""
        return int(sum(np.diff(self.spans(i)).sum() for i in blocks))

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a block's tokens, int64 [tokens]."""
        return self.read(self.cuts[i], self.cuts[i + 1])

    @functools.cached_property
    def _stream(self) -> pa.ChunkedArray:
        return pa.chunked_array(self.pieces)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return stream[start:stop], int64."""
        return self._stream.slice(start, stop - start).to_numpy().astype(np.int64)

    @property
    def shown_dataset(self) -> str:
        """The name of the data in Markdown."""
        return self.dataset if self.dataset == FUNCTION else f"`{self.dataset}`"

    @property
    def tokens(self) -> int:
        """The number of tokens in all blocks."""
        return int(self.cuts[-1] - self.cuts[0])

    @property
    def supervised(self) -> int:
        """The number of tokens that are predicted: all but the first of each block."""
        return self.tokens - len(self)


@dataclasses.dataclass(frozen=True)
class SampleBlocks(Blocks):
    """Samples with labels: one per block, or several if packed. The stream holds all tokens, followed by all labels.

    cuts: int64 [samples, 3], in the order of the blocks: the block, then the sample's start and stop in the tokens.
    """

    packed: bool = True
    learned: int = 0  # number of tokens that are predicted

    def __len__(self) -> int:
        return int(self.cuts[-1, 0]) + 1

    def spans(self, i: int) -> np.ndarray:
        """Return the spans of a block's samples in the tokens, int64 [samples, 2]: start and stop."""
        low, high = np.searchsorted(self.cuts[:, 0], [i, i + 1])
        return self.cuts[low:high, 1:]

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a block's tokens, labels and, if packed, positions within the sample, int64 [2 or 3, tokens]."""
        samples = []
        for start, stop in self.spans(i):
            ids, labels = (self.read(start + offset, stop + offset) for offset in (0, len(self._stream) // 2))
            labels[0] = IGNORED  # no token of the same sample comes before it
            samples.append(np.stack([ids, labels, np.arange(stop - start)]))
        return np.concatenate(samples, 1)[: 3 if self.packed else 2]

    @property
    def tokens(self) -> int:
        return int((self.cuts[:, 2] - self.cuts[:, 1]).sum())

    @property
    def supervised(self) -> int:
        return self.learned


def cut_points(lengths: np.ndarray, length: int, packing: bool) -> np.ndarray:
    """Return where blocks start and end, int64 [blocks + 1]. The last block may be shorter, down to two tokens.

    Packed: a cut after every `length` tokens, across rows. Unpacked: a cut after every `length` tokens of each row and
    at its end, so that no block has tokens of two rows.
    """
    rows = lengths.sum(keepdims=True) if packing else lengths
    ends = np.cumsum(rows)
    starts = [np.arange(end - size, end, length, dtype=np.int64) for end, size in zip(ends, rows, strict=True)]
    cuts = np.append(np.concatenate(starts), ends[-1])
    return cuts[:-1] if len(cuts) > 2 and cuts[-1] - cuts[-2] < 2 else cuts  # one token alone predicts nothing


def _split_tail(blocks: Blocks, fraction: float) -> tuple[Blocks, Blocks]:
    """Return the blocks as (train, held out); the last blocks are held out, at least one."""
    if len(blocks) < 2:
        raise ConfigError(
            f"data.dataset: the text is too short to hold out a block ({counted(blocks.tokens, 'token')}); "
            "give a validation split, a smaller data.max_length, or data.validation_fraction 0"
        )
    count = min(max(1, round(len(blocks) * fraction)), len(blocks) - 1)
    train = dataclasses.replace(blocks, cuts=blocks.cuts[: len(blocks) - count + 1])
    return train, dataclasses.replace(blocks, cuts=blocks.cuts[len(blocks) - count :])


def most_rows(name: str, data: DataConfig) -> int | None:
    """Return how many rows of the part of this name may be used, or None for all."""
    return data.max_train_samples if name == "train" else data.max_eval_samples


def text_blocks(
    dataset: Dataset, starts: np.ndarray, most: int | None, marks: tuple[list[int], list[int]], data: DataConfig
) -> Blocks:
    """Return the blocks of running text, made of its first `most` rows (None: all).

    starts: whether a document starts at a row, bool [rows]. marks: the tokens before and after every document.
    """
    if most is not None and most < len(dataset):
        dataset, starts = dataset.select(range(most)), starts[:most]
    closed = close_documents(dataset, starts, *marks)
    cuts = cut_points(row_lengths(closed), data.max_length, data.packing)
    counts = len(starts), int(starts.sum())
    return Blocks(flat_column(closed, "input_ids"), data.max_length, cuts, *counts, origin=closed)


def make_text_blocks(
    splits: dict[str, Dataset], marks: tuple[list[int], list[int]], data: Source, seed: int
) -> dict[str, Blocks]:
    """Return the blocks of rows that are text, without empty rows.

    If there is no validation split, whole documents are held out, or the last blocks if documents are too few.
    """
    parts = {name: drop_empty(split, data) for name, split in splits.items()}
    for name, (dataset, starts) in parts.items() if data.share < 1 else ():
        rows = draw(starts, np.ones(len(starts)), data.share, seed)
        parts[name] = dataset.select(np.flatnonzero(rows)), starts[rows]
    tail = False
    if "validation" not in parts and data.validation_fraction > 0:
        dataset, starts = parts["train"]
        least = data.max_length if data.packing else 2  # a block; without packing any row with two tokens is one
        out = hold_out(starts, row_lengths(dataset), data.validation_fraction, least, seed)
        tail = out is None
        for name, rows in (("train", ~out), ("validation", out)) if not tail else ():
            parts[name] = dataset.select(np.flatnonzero(rows)), starts[rows]
    blocks = {name: text_blocks(*part, most_rows(name, data), marks, data) for name, part in parts.items()}
    if "validation" not in splits and not tail and data.validation_fraction > 0:
        held, rows = (len(parts[name][0]) for name in ("validation", "train"))
        if held > 2 * data.validation_fraction * (held + rows):
            why = "data.validation_fraction would not fill a block of data.max_length"
            line = f"{held:,} of {counted(held + rows, 'row')} are held out, since {why}"
            blocks["train"] = dataclasses.replace(blocks["train"], notes=(line,))
    if tail:
        blocks["train"], blocks["validation"] = _split_tail(blocks["train"], data.validation_fraction)
    for name, part in blocks.items():
        if part.supervised < 1:
            raise ConfigError(
                f"data.dataset: the {name} part of {data.dataset} has only {counted(part.tokens, 'token')}: "
                "nothing to predict"
            )
    return blocks


# ------------------------------------------------------------------------------------------------ samples


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return the number of the block that each sample is put into, int64 [samples].

    Best fit decreasing: the longest sample first, each into the block where the least room is left over. This needs at
    most about 11/9 of the smallest possible number of blocks (D. S. Johnson 1973).
    sizes: the number of tokens of each sample, none larger than `length`.
    """
    block, count = np.empty(len(sizes), np.int64), 0
    blocks_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms: list[int] = []  # the different amounts of room that blocks have left, ascending
    for i in np.argsort(-sizes, kind="stable"):
        size = int(sizes[i])
        at = bisect_left(rooms, size)
        if at == len(rooms):  # no block has enough room: start a new one
            rooms.append(length)
            blocks_by_room[length].append(count)
            count += 1
        room = rooms[at]
        block[i] = blocks_by_room[room].pop()
        if not blocks_by_room[room]:
            del rooms[at]
        if left := room - size:
            if not blocks_by_room[left]:
                insort(rooms, left)
            blocks_by_room[left].append(block[i])
    return block


def learned_tokens(dataset: Dataset, most: int) -> np.ndarray:
    """Return how many of each row's first `most` tokens are supervised, int64 [rows].

    These are the tokens with a label, except the first token of a row, which nothing predicts.
    """
    counts = []
    for chunk in _column(dataset, "labels").chunks:
        lengths = chunk.value_lengths().to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        seen = np.append(0, np.cumsum(chunk.flatten().to_numpy() != IGNORED))
        counts.append(seen[ends - lengths + np.minimum(lengths, most)] - seen[ends - lengths + np.minimum(lengths, 1)])
    return np.concatenate(counts)


def learnable_rows(dataset: Dataset, name: str, data: DataConfig) -> tuple[np.ndarray, list[str]]:
    """Return the numbers of the rows with a supervised token within data.max_length, and lines for the log.

    The lines tell how many rows are left out, and how many are cut.
    """
    learned, lengths, notes = learned_tokens(dataset, data.max_length), row_lengths(dataset), []
    numbers = _column(dataset, ROW).to_numpy()
    later = learned_tokens(dataset, int(lengths.max())) > 0 if not learned.all() else learned > 0
    within = f"since their first {data.max_length} tokens (data.max_length) hold nothing to train on"
    for reason, rows in ((within, later), ("which hold nothing to train on, such as a chat without an answer", ~later)):
        if len(empty := np.flatnonzero((learned == 0) & rows)):
            named = ", ".join(f"{row + 1:,}" for row in numbers[empty[:5]]) + (", …" if len(empty) > 5 else "")
            which = f"row{'s'[: len(empty) > 1]} {named}"
            notes.append(f"{name}: {len(empty):,} of {len(learned):,} rows are left out, {reason}: {which}")
    if not learned.any():
        raise ConfigError(f"data.dataset: {data.dataset} has nothing to train on; {'; '.join(notes)}")
    if cut := int((lengths > data.max_length).sum()):
        gone = np.maximum(lengths - data.max_length, 0).sum() / lengths.sum()
        notes.append(
            f"{name}: {cut:,} of {len(learned):,} rows are cut at data.max_length: {gone:.1%} of the tokens are lost; "
            "raise data.max_length to keep more"
        )
    return np.flatnonzero(learned), notes


def first_samples(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """Return for each of these samples whether it is the first of its row, bool [samples]."""
    return np.diff(_column(dataset, ROW).to_numpy()[samples], prepend=-1) != 0


def first_rows(dataset: Dataset, samples: np.ndarray, most: int | None) -> np.ndarray:
    """Return those of these samples that belong to the first `most` rows (None: all)."""
    return samples if most is None else samples[np.cumsum(first_samples(dataset, samples)) <= most]


def sample_blocks(dataset: Dataset, name: str, rows: np.ndarray, notes: list[str], data: DataConfig) -> SampleBlocks:
    """Return the blocks of these rows of a part, each row cut at data.max_length."""
    lengths = row_lengths(dataset)
    starts, sizes = (np.cumsum(lengths) - lengths)[rows], np.minimum(lengths[rows], data.max_length)
    block = np.arange(len(rows))
    if data.packing:
        block = pack(sizes, data.max_length)
        notes = [*notes, f"{name}: blocks are {sizes.sum() / (data.max_length * (block.max() + 1)):.1%} full"]
    return SampleBlocks(
        flat_column(dataset, "input_ids") + flat_column(dataset, "labels"),
        data.max_length,
        np.stack([block, starts, starts + sizes], 1)[np.argsort(block, kind="stable")],
        rows=int(first_samples(dataset, rows).sum()),
        documents=len(rows),
        notes=tuple(notes),
        origin=dataset,
        packed=data.packing,
        learned=int(learned_tokens(dataset, data.max_length)[rows].sum()),
    )


def make_sample_blocks(splits: dict[str, Dataset], data: Source, seed: int) -> dict[str, SampleBlocks]:
    """Return the blocks of rows with labels; each row is a sample.

    Rows without a supervised token are left out. If there is no validation split, some rows are held out.
    """
    parts = {name: (split, *learnable_rows(split, name, data)) for name, split in splits.items()}
    for name, (split, rows, notes) in parts.items() if data.share < 1 else ():
        first = first_samples(split, rows)
        parts[name] = split, rows[draw(first, first, data.share, seed)], notes
    if "validation" not in parts and data.validation_fraction > 0:
        split, rows, notes = parts["train"]
        first = first_samples(split, rows)  # all samples of a row are held out, or none
        out = hold_out(first, np.ones(len(rows)), data.validation_fraction, 1, seed) if first.sum() > 1 else None
        if out is None:
            raise ConfigError(
                f"data.dataset: only {counted(int(first.sum()), 'row')} to train on, too few to hold one out; "
                "give a validation split or data.validation_fraction 0"
            )
        parts = {"train": (split, rows[~out], notes), "validation": (split, rows[out], [])}
    return {
        name: sample_blocks(split, name, first_rows(split, rows, most_rows(name, data)), notes, data)
        for name, (split, rows, notes) in parts.items()
    }


def samples_of_ours(splits: dict[str, Dataset]) -> bool:
    """Return whether tokenize_rows made these rows of chats or pairs; their labels then count even if all are set."""
    return all(set(split.column_names) == {"input_ids", "labels", ROW} for split in splits.values())


def masks_labels(splits: dict[str, Dataset]) -> bool:
    """Return whether some label differs from its token (rows have no padding): labels then choose what is supervised.

    Raise ConfigError if only some splits have labels, since all tokens of the others would be supervised.
    """
    labelled = [name for name, split in splits.items() if "labels" in split.column_names]
    streams = [(flat_column(splits[name], "labels"), flat_column(splits[name], "input_ids")) for name in labelled]
    if not any(pa.chunked_array(labels) != pa.chunked_array(ids) for labels, ids in streams if ids):
        return False
    for name in splits.keys() - set(labelled):
        raise ConfigError(
            f"prepare_dataset: expected a column labels in the split {name!r}, like that in {labelled[0]!r}"
        )
    return True


def make_blocks(
    tokenized: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, close: bool = True
) -> dict[str, Blocks | None]:
    """Return the blocks of "train" and "validation": drop useless rows, end documents, hold rows out if needed, cut.

    tokenized: a DatasetDict with input_ids, with or without the text column, attention_mask or a validation split.
    Rows whose labels differ from their tokens are samples; other rows are text. Rows made by tokenize_rows are lines or
    documents as data.rows says; rows of a user's own function are documents unless data.rows is lines.
    close: False leaves running text without the tokens before and after documents.
    """
    if not isinstance(tokenized, DatasetDict) or "train" not in tokenized:
        found = ", ".join(tokenized) if isinstance(tokenized, DatasetDict) else type(tokenized).__name__
        raise ConfigError(f"prepare_dataset: expected a DatasetDict with a split 'train', got {found}")
    splits = {name: split.with_format(None) for name, split in tokenized.items() if name in ("train", "validation")}
    # Made by tokenize_rows, not by a user's own function.
    ours = all(ROW in split.column_names for split in splits.values())
    for name, split in splits.items():
        check_rows(split, name)
        if not ours:
            check_ids(split, name, len(tokenizer))
        splits[name] = without_pads(split, name)
    if not ours:
        data = dataclasses.replace(data, dataset=FUNCTION, rows="lines" if data.rows == "lines" else "documents")
        splits = {name: numbered(split) for name, split in splits.items()}
    [source] = sources_of(data)
    if (ours and samples_of_ours(splits)) or masks_labels(splits):
        how = (
            ""
            if isinstance(tokenized, Tokenized)
            else ", each row a sample whose labels say which tokens are supervised"
        )
        blocks: dict[str, Any] = dict(make_sample_blocks(splits, source, seed))
    else:
        marks = (first_token(tokenizer), [document_end(tokenizer)]) if close else ([], [])
        how = ", each row a line of one running text" if rows_are_lines(source) else ", each row a document"
        blocks = dict(make_text_blocks(splits, marks, source, seed))
    read = tokenized if isinstance(tokenized, Tokenized) else Tokenized
    named: dict[str, Any] = {"dataset": source.dataset, "source": read.source + how, "template": read.template}
    named["template_options"] = read.template_options
    blocks = {name: dataclasses.replace(part, **named) for name, part in blocks.items()}
    blocks["train"] = dataclasses.replace(blocks["train"], notes=(*read.notes, *blocks["train"].notes))
    if unused := sorted(tokenized.keys() - splits.keys()):
        names = f"split{'s'[: len(unused) > 1]} {', '.join(unused)}"
        line = f"not used: the {names} of {FUNCTION}; only train and validation are used"
        blocks["train"] = dataclasses.replace(blocks["train"], notes=(*blocks["train"].notes, line))
    return {"train": blocks["train"], "validation": blocks.get("validation")}


def sample_counts(*parts: Any) -> list[int]:
    """Return how many samples each block of packed samples holds, in descending order; [] if no samples are packed.

    Beside them a block of running text is one sample. parts: Blocks; others, such as None and Windows, count as nothing.
    """
    every = [part for whole in parts for part in getattr(whole, "parts", ())]
    packed = [part for part in every if isinstance(part, SampleBlocks) and part.packed]
    alone = [1] * sum(len(part) for part in every if not isinstance(part, SampleBlocks)) if packed else []
    return sorted((int(count) for part in packed for count in np.bincount(part.cuts[:, 0])), reverse=True) + alone


def show_block(block: np.ndarray, tokenizer: PreTrainedTokenizerBase, most: int = 80) -> str:
    """Return a block's start decoded in one line, with [[ and ]] around supervised tokens.

    Each part is cut to `most` characters, running text to `most` columns. If the block cuts a character, its rest is not shown.
    """
    ids, learned = (block[:40], np.zeros(40, bool)) if block.ndim == 1 else (block[0], block[1] != IGNORED)
    shown = ""
    for marked, text in whole_characters(ids, learned, tokenizer):
        text = text.replace("\n", "\\n") if shown else text.lstrip(HALF).replace("\n", "\\n")
        if block.ndim == 1:
            return start_of(text, most) + " …"
        text = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
        shown += f"[[{text}]]" if marked else text
        if len(shown) > 5 * most:
            return shown + " …"
    return shown


def _training_files(data: Source) -> dict[str, int | None]:
    """Return the files of the training rows, in order, with the number of rows in each; None: all that are left."""
    local = local_files(data.dataset)
    if local is None or local[0] == SAVED:
        return {f"{data.dataset} {data.train_split}": None}
    kind, files = local
    names = chosen_files(files, data)[0]["train"]
    base = data.dataset if Path(data.dataset).is_dir() else Path(data.dataset).parent
    sizes: dict[str, int | None] = {os.path.relpath(name, base): None for name in names}
    # Each file is read alone, since a split does not tell which file a row came from.
    for shown, name in zip(sizes, names[:-1], strict=False):
        sizes[shown] = scan(name, kind).rows
    return sizes


def places_of(numbers: Iterable[int], blocks: Blocks, data: Source) -> list[str]:
    """Return for each training block the files and rows (from 1) that it is made of; a row of a text file is a line.

    If a user's own function made the rows, only their numbers are known and no files.
    """
    files, places = {FUNCTION: None} if blocks.dataset == FUNCTION else _training_files(data), []
    for rows in blocks.rows_of(numbers):
        place, start = [], 0
        for name, size in files.items():
            mine = rows[(rows >= start) & (rows < start + size if size is not None else True)] - start + 1
            start += size or 0
            if len(mine):
                runs = np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1)
                shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
                place.append(f"{name} row{'s'[: len(mine) > 1]} {', '.join(shown)}")
        places.append(", ".join(place))
    return places


def show_blocks(blocks: Blocks, numbers: np.ndarray, tokenizer: PreTrainedTokenizerBase, data: Source) -> str:
    """Return the training blocks of these numbers as text: where each comes from and how it begins."""
    shown = (show_block(blocks[i], tokenizer, 40) for i in numbers)
    try:
        places = places_of(numbers, blocks, data)
    except (ConfigError, OSError, ValueError) as error:  # missing files must not hide what went wrong
        places = [f"its rows are out of reach, {error}" for _ in numbers]
    return ", ".join(f"{i} ({place}: {text})" for i, place, text in zip(numbers, places, shown, strict=True))


# ------------------------------------------------------------------------------------------------ batches


BATCH = ("input_ids", "labels", "position_ids")


def collate(rows: Sequence[np.ndarray], pad: int) -> dict[str, torch.Tensor]:
    """Return input_ids, labels and, for packed samples, position_ids, int64 [batch, longest].

    rows: [tokens], or [2 or 3, tokens] with labels and positions. Padding is added on the right, with the label
    IGNORED. After packed samples the padding is one more sample, which no other sample sees.
    """
    rows = [np.stack([row, row]) if row.ndim == 1 else row for row in rows]
    longest = max(row.shape[1] for row in rows)
    pads = np.stack([np.full(longest, pad), np.full(longest, IGNORED), np.arange(longest)])[: len(rows[0])]
    table = np.stack([np.concatenate([row, pads[:, : longest - row.shape[1]]], 1) for row in rows], 1)
    return {name: torch.from_numpy(numbers) for name, numbers in zip(BATCH[: len(table)], table, strict=True)}


def batches(
    blocks: Blocks, numbers: np.ndarray, size: int, pad: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]]:
    """Yield (batch on the device, supervised tokens of each sequence, places in `numbers`) for the blocks `numbers`."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = collate([blocks[i] for i in part], pad)
        tokens = CausalLMLoss.weights(batch)
        if stream is not None:  # copy while the GPU still works on earlier batches
            with torch.cuda.stream(stream):
                batch = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in batch.values():
                tensor.record_stream(torch.cuda.current_stream(device))
        yield batch, tokens, np.arange(start, start + len(part))


def epoch_order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in an epoch. It depends on seed and epoch alone, so resuming needs no state."""
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def step_windows(blocks: int, sequences_per_step: int, seed: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, numbers of the blocks) for every optimizer step after `step`, without end.

    The last step of an epoch may have fewer blocks than sequences_per_step.
    """
    per_epoch = -(-blocks // sequences_per_step)
    while True:
        epoch, position = divmod(step, per_epoch)
        first = position * sequences_per_step
        yield epoch, epoch_order(blocks, seed, epoch)[first : first + sequences_per_step]
        step += 1
