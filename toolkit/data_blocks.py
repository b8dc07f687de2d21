"""From tokenised rows to batches: document boundaries, the held-out part, blocks, packing, padding.

    make_blocks(tokenized, tokenizer, data, seed) -> {"train": Blocks, "validation": Blocks or None}

Running text becomes one stream that is cut in blocks. Chats and pairs are samples: they are cut at data.max_length each,
and share a block without seeing each other.

It takes any DatasetDict with input_ids, so that the tutorial's own prepare_dataset can be put in the place of
`train_qlora.prepare_dataset`.
"""

import dataclasses
import functools
import glob
import itertools
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from config import ConfigError, DataConfig, counted
from fast_path.loss import IGNORED, CausalLMLoss
from toolkit.data_formats import (
    FUNCTION,
    HALF,
    OPTIONS,
    ROW,
    Tokenized,
    content_digest,
    local_files,
    whole_characters,
)

# Wikitext marks an article by " = Title = " and its sections by " = = Title = = ".
WIKITEXT_TITLE = r"^ ?= [^=](.*[^=])? = ?\n?$"


# ------------------------------------------------------------------------------------------------ documents


def is_wikitext(data: DataConfig) -> bool:
    """Return whether the data set, not a folder on its way, is called Wikitext."""
    return "wikitext" in Path(data.dataset).name.lower()


def rows_are_lines(data: DataConfig) -> bool:
    """Return whether a row is a line of a running text (data.rows; auto: Wikitext and .txt)."""
    if data.rows != "auto":
        return data.rows == "lines"
    if is_wikitext(data):
        return True
    local = local_files(data.dataset)
    return local is not None and local[0] == "text"


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token between two documents: <|endoftext|> where the vocabulary has it, else the end of sequence.

    A chat's turn end (<|im_end|>) belongs to chat turns only: after plain text it would teach the model to stop.
    """
    end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise ConfigError("model.name: its tokenizer has neither <|endoftext|> nor an end of sequence token")
    return end


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: [bos] for a Llama, [] for a Qwen."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column's Arrow data, rows in the order of the dataset."""
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    return dataset.data.column(name)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Return each row's tokens, int64 [rows]."""
    return pc.list_value_length(_column(dataset, "input_ids")).to_numpy().astype(np.int64)


def flat_column(dataset: Dataset, name: str) -> tuple[np.ndarray, ...]:
    """Return the numbers of all rows of a column of lists as int32 pieces, memory-mapped where they are int32 on disk."""
    chunks = (chunk.flatten().to_numpy() for chunk in _column(dataset, name).chunks if len(chunk))
    return tuple(chunk.astype(np.int32, copy=False) for chunk in chunks)


def check_rows(dataset: Dataset, split: str) -> None:
    """Raise a ConfigError where a split of prepare_dataset has no lists of token ids, or labels of another length."""
    if "input_ids" not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise ConfigError(f"prepare_dataset: expected a column input_ids in the split {split!r}, got {found}")
    names = [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]
    for name in names:
        kind = dataset.features[name]
        held = getattr(getattr(kind, "feature", None), "dtype", "")
        if "int" not in held and (name != "attention_mask" or not held):  # a mask may be of bool or float
            raise ConfigError(f"prepare_dataset: expected a list of integers in each row of {name}, got {kind}")
    counts = {name: pc.fill_null(pc.list_value_length(_column(dataset, name)), -1).to_numpy() for name in names}
    for name, found in counts.items():
        bad = np.flatnonzero((found != counts["input_ids"]) | (found < 0))
        if len(bad):
            row = bad[0]
            expected = f"{counts['input_ids'][row]:,} {name}, one per token" if name != "input_ids" else "a list of ids"
            got = f"{found[row]:,}" if found[row] >= 0 else "null"
            raise ConfigError(f"prepare_dataset: row {row + 1} of {split}: expected {expected}, got {got}")


def without_pads(dataset: Dataset) -> Dataset:
    """Return the rows without their pads, which an attention mask tells from tokens: by position, never by id."""
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
    return dataset.map(
        strip, batched=True, features=datasets.Features(features), remove_columns="attention_mask", desc="unpad"
    )


def numbered(dataset: Dataset) -> Dataset:
    """Return the rows with their numbers, from 0."""
    dataset = dataset.remove_columns(ROW) if ROW in dataset.column_names else dataset
    return dataset.add_column(ROW, np.arange(len(dataset)))


def _flags(column: pa.ChunkedArray, test: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Return what a test says of each text, bool [rows], a chunk at a time, since its copies would not fit beside a
    large corpus.
    """
    texts = (pc.fill_null(chunk.cast(pa.string()), "") for chunk in column.chunks)
    return np.concatenate([test(part).to_numpy(zero_copy_only=False).astype(bool) for part in texts])


def drop_empty(dataset: Dataset, data: DataConfig) -> tuple[Dataset, np.ndarray]:
    """Return the rows that have tokens, and for each whether a document starts there, bool [rows].

    Documents: every row starts one. Lines: after a blank line, or at a Wikitext title; without a text column, only
    the first.
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
        starts = np.concatenate([[True], blank[:-1]])  # kept rows are not blank, so the row before decides
    if not kept.any():
        raise ConfigError(f"data.dataset: {data.dataset} has no text in column {data.text_column!r}")
    index = np.flatnonzero(kept)
    starts = starts[index].copy()
    starts[0] = True
    return (dataset if len(index) == len(dataset) else dataset.select(index)), starts


def close_documents(dataset: Dataset, starts: np.ndarray, first: list[int], end: list[int]) -> Dataset:
    """Return the rows with the tokenizer's first token before and the document end after every document: input_ids
    and ROW.
    """
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
    """Return which rows are held out, bool [rows]: whole documents picked by seed, or a single document's last rows.

    They hold at least `fraction` of the rows and `least` tokens (half of all where that is less). None where whole
    documents would be too few, or more than half of the tokens: then only a cut within a row will do.
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


# ------------------------------------------------------------------------------------------------ blocks


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A flat stream of tokens cut in blocks of `length`; the last one keeps the tail. Indexing reads memory-mapped
    Arrow data.

    pieces: int32 arrays whose concatenation is the stream. rows, documents: how many went in. dataset: the name of what
    they are from: data.dataset, or FUNCTION. source: what they were read as. template: the chat template that they went through, if it is not the tokenizer's. notes: what the user
    should know of them, a line each. origin: the rows whose tokens make the stream.
    """

    pieces: tuple[np.ndarray, ...]
    length: int
    cuts: np.ndarray  # int64 [blocks + 1]: block i is stream[cuts[i]:cuts[i + 1]]
    rows: int
    documents: int
    dataset: str = ""
    source: str = ""
    template: str | None = None
    notes: tuple[str, ...] = ()
    origin: Dataset | None = None

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def spans(self, i: int) -> np.ndarray:
        """Return where in the stream the tokens of a block are, int64 [spans, 2]: start and stop."""
        return self.cuts[None, i : i + 2]

    def rows_of(self, blocks: Iterable[int]) -> list[np.ndarray]:
        """Return for each block the numbers in their split, from 0, of the rows that it has tokens of, int64 [rows]."""
        ends, numbers = np.cumsum(row_lengths(self.origin)), _column(self.origin, ROW).to_numpy()
        found = []
        for i in blocks:
            low, high = np.searchsorted(ends, (self.spans(i) - [0, 1]).T, side="right")  # of first and last tokens
            parts = [numbers[first : last + 1] for first, last in zip(low, high, strict=True)]
            found.append(np.concatenate(parts))
        return found

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
    def tokens(self) -> int:
        """All tokens of all blocks."""
        return int(self.cuts[-1] - self.cuts[0])

    @property
    def supervised(self) -> int:
        """The tokens that are predicted: all but the first of each block."""
        return self.tokens - len(self)


@dataclasses.dataclass(frozen=True)
class SampleBlocks(Blocks):
    """Samples with labels, several of them in a block if packed, else one. The stream holds all tokens and then all
    labels.

    cuts: int64 [samples, 3], in the order of the blocks: block, and where in the tokens the sample starts and stops.
    """

    packed: bool = True
    learned: int = 0  # tokens that are predicted

    def __len__(self) -> int:
        return int(self.cuts[-1, 0]) + 1

    def spans(self, i: int) -> np.ndarray:
        """Return where in the tokens a block's samples are, int64 [samples, 2]: start and stop."""
        low, high = np.searchsorted(self.cuts[:, 0], [i, i + 1])
        return self.cuts[low:high, 1:]

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a block's tokens, labels and, if packed, positions within the sample, int64 [2 or 3, tokens]."""
        samples = []
        for start, stop in self.spans(i):
            ids, labels = (self.read(start + offset, stop + offset) for offset in (0, len(self._stream) // 2))
            labels[0] = IGNORED  # what comes before it is another sample's, or nothing
            samples.append(np.stack([ids, labels, np.arange(stop - start)]))
        return np.concatenate(samples, 1)[: 3 if self.packed else 2]

    @property
    def tokens(self) -> int:
        return int((self.cuts[:, 2] - self.cuts[:, 1]).sum())

    @property
    def supervised(self) -> int:
        return self.learned


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows `stride` tokens apart over the whole text of `blocks`, of their length; each predicts what none before it
    did.
    """

    blocks: Blocks
    stride: int

    def __len__(self) -> int:
        return max(-(-(self.blocks.tokens - self.blocks.length) // self.stride), 0) + 1

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a window's tokens and labels, int64 [2, tokens]."""
        cuts, length = self.blocks.cuts, self.blocks.length
        start = cuts[0] + i * self.stride
        ids = self.blocks.read(start, min(start + length, cuts[-1]))
        labels = ids.copy()
        labels[: length - self.stride if i else 0] = IGNORED
        return np.stack([ids, labels])

    @property
    def supervised(self) -> int:
        """The tokens that are predicted: all but the first of the text, or of each window where none overlap."""
        return self.blocks.tokens - (len(self) if self.stride == self.blocks.length else 1)


def windows_of(blocks: Blocks, stride: int) -> Windows:
    """Return the windows over a part's running text; ConfigError for samples, which are no text."""
    if isinstance(blocks, SampleBlocks):
        raise ConfigError(f"--stride: expected running text, got {blocks.source}")
    return Windows(blocks, stride)


def cut_points(lengths: np.ndarray, length: int, packing: bool) -> np.ndarray:
    """Return where blocks start and end, int64 [blocks + 1]. The last block keeps the tail, but for one lonely token.

    Packed: every `length` tokens across rows. Unpacked: every `length` tokens within each row, so no block spans two
    rows.
    """
    rows = lengths.sum(keepdims=True) if packing else lengths
    ends = np.cumsum(rows)
    starts = [np.arange(end - size, end, length, dtype=np.int64) for end, size in zip(ends, rows, strict=True)]
    cuts = np.append(np.concatenate(starts), ends[-1])
    return cuts[:-1] if len(cuts) > 2 and cuts[-1] - cuts[-2] < 2 else cuts  # one token predicts nothing


def _split_tail(blocks: Blocks, fraction: float) -> tuple[Blocks, Blocks]:
    """Return the blocks as (train, held out): the last part, at least one block."""
    if len(blocks) < 2:
        raise ConfigError(
            f"data.dataset: {counted(blocks.tokens, 'token')} of text: too short to hold out a block; "
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
    """Return the blocks of running text: its first `most` rows, documents between `marks`.

    starts: whether a document starts at a row, bool [rows].
    """
    if most is not None and most < len(dataset):
        dataset, starts = dataset.select(range(most)), starts[:most]
    closed = close_documents(dataset, starts, *marks)
    cuts = cut_points(row_lengths(closed), data.max_length, data.packing)
    counts = len(starts), int(starts.sum())
    return Blocks(flat_column(closed, "input_ids"), data.max_length, cuts, *counts, origin=closed)


def make_text_blocks(
    splits: dict[str, Dataset], marks: tuple[list[int], list[int]], data: DataConfig, seed: int
) -> dict[str, Blocks]:
    """Return the blocks of rows that are text: empty rows dropped, whole documents held out where needed, or a last
    part.
    """
    parts = {name: drop_empty(split, data) for name, split in splits.items()}
    tail = False
    if "validation" not in parts and data.validation_fraction > 0:
        dataset, starts = parts["train"]
        least = data.max_length if data.packing else 2  # one block; unpacked a row is one
        out = hold_out(starts, row_lengths(dataset), data.validation_fraction, least, seed)
        tail = out is None
        for name, rows in (("train", ~out), ("validation", out)) if not tail else ():
            parts[name] = dataset.select(np.flatnonzero(rows)), starts[rows]
    blocks = {name: text_blocks(*part, most_rows(name, data), marks, data) for name, part in parts.items()}
    if tail:
        blocks["train"], blocks["validation"] = _split_tail(blocks["train"], data.validation_fraction)
    for name, part in blocks.items():
        if part.supervised < 1:
            raise ConfigError(
                f"data.dataset: the {name} part of {data.dataset} has {counted(part.tokens, 'token')}: nothing to predict"
            )
    return blocks


# ------------------------------------------------------------------------------------------------ samples


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return the block that each sample goes to, int64 [samples]: the longest first, each where the least room is left
    over.

    sizes: tokens of each sample, none above `length`. (Best fit decreasing: about 11/9 of the fewest blocks at
    worst, D. S. Johnson 1973.)
    """
    block, count = np.empty(len(sizes), np.int64), 0
    blocks_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms: list[int] = []  # those that some block has, ascending
    for i in np.argsort(-sizes, kind="stable"):
        size = int(sizes[i])
        at = bisect_left(rooms, size)
        if at == len(rooms):  # it fits nowhere: a new block
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
    """Return how many of each row's first `most` tokens are learned, int64 [rows]: those with a label, but never the
    first.
    """
    counts = []
    for chunk in _column(dataset, "labels").chunks:
        lengths = chunk.value_lengths().to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        seen = np.append(0, np.cumsum(chunk.flatten().to_numpy() != IGNORED))
        counts.append(seen[ends - lengths + np.minimum(lengths, most)] - seen[ends - lengths + np.minimum(lengths, 1)])
    return np.concatenate(counts)


def learnable_rows(dataset: Dataset, name: str, data: DataConfig) -> tuple[np.ndarray, list[str]]:
    """Return the numbers of the rows that teach something within data.max_length, and a line on the others and the cut
    ones.
    """
    learned, lengths, notes = learned_tokens(dataset, data.max_length), row_lengths(dataset), []
    empty = np.flatnonzero(learned == 0)
    if len(empty):
        named = ", ".join(f"{row + 1:,}" for row in empty[:5]) + (", …" if len(empty) > 5 else "")
        notes.append(
            f"{name}: {len(empty):,} of {len(learned):,} rows left out, since nothing in their first {data.max_length} tokens "
            f"(data.max_length) is learned: row{'s'[: len(empty) > 1]} {named}"
        )
    if len(empty) == len(learned):
        raise ConfigError(f"data.dataset: {data.dataset}: nothing to learn; {notes[0]}")
    if cut := int((lengths > data.max_length).sum()):
        gone = np.maximum(lengths - data.max_length, 0).sum() / lengths.sum()
        notes.append(
            f"{name}: {cut:,} of {len(learned):,} rows are cut at data.max_length: {gone:.1%} of the tokens are lost; a longer one keeps more"
        )
    return np.flatnonzero(learned), notes


def sample_blocks(dataset: Dataset, name: str, rows: np.ndarray, notes: list[str], data: DataConfig) -> SampleBlocks:
    """Return the blocks of these rows of a part, each cut at data.max_length."""
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
        rows=len(rows),
        documents=len(rows),
        notes=tuple(notes),
        origin=dataset,
        packed=data.packing,
        learned=int(learned_tokens(dataset, data.max_length)[rows].sum()),
    )


def make_sample_blocks(splits: dict[str, Dataset], data: DataConfig, seed: int) -> dict[str, SampleBlocks]:
    """Return the blocks of rows with labels: each row a sample; those that teach nothing left out, some held out where
    needed.
    """
    parts = {name: (split, *learnable_rows(split, name, data)) for name, split in splits.items()}
    if "validation" not in parts and data.validation_fraction > 0:
        split, rows, notes = parts["train"]
        out = hold_out(np.ones(len(rows), bool), np.ones(len(rows)), data.validation_fraction, 1, seed)
        if out is None:
            raise ConfigError(
                f"data.dataset: {len(rows)} row{'s'[: len(rows) > 1]} to learn from: too few to hold one out; "
                "give a validation split or data.validation_fraction 0"
            )
        parts = {"train": (split, rows[~out], notes), "validation": (split, rows[out], [])}
    return {
        name: sample_blocks(split, name, rows[: most_rows(name, data)], notes, data)
        for name, (split, rows, notes) in parts.items()
    }


def samples_of_ours(splits: dict[str, Dataset]) -> bool:
    """Return whether our own reader made these rows of chats or pairs, all of which may be learned (completion_only)."""
    return all(set(split.column_names) == {"input_ids", "labels", ROW} for split in splits.values())


def masks_labels(splits: dict[str, Dataset]) -> bool:
    """Return whether some label of rows without pads differs from its token: then labels say what is learned.

    Raises ConfigError where only some of the splits have labels, so that the others would be learned or measured whole.
    """
    labelled = [name for name, split in splits.items() if "labels" in split.column_names]
    streams = [(flat_column(splits[name], "labels"), flat_column(splits[name], "input_ids")) for name in labelled]
    if not any(pa.chunked_array(labels) != pa.chunked_array(ids) for labels, ids in streams if ids):
        return False
    for name in splits.keys() - set(labelled):
        raise ConfigError(f"prepare_dataset: expected a column labels in the split {name!r}, as {labelled[0]!r} has it")
    return True


def make_blocks(
    tokenized: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int, close: bool = True
) -> dict[str, Blocks | None]:
    """Return the blocks of {"train", "validation"}: rows without use dropped, documents closed, rows held out where
    needed, cut.

    tokenized: a DatasetDict with input_ids, with or without the text column, attention_mask or a validation split.
    Rows with labels are samples; labels that equal the tokens say nothing, so that without a mask rows are text. Rows
    of our own reader are lines or documents as data.rows says; others are documents, but for data.rows: lines.
    close: False leaves running text without document ends.
    """
    if not isinstance(tokenized, DatasetDict) or "train" not in tokenized:
        found = ", ".join(tokenized) if isinstance(tokenized, DatasetDict) else type(tokenized).__name__
        raise ConfigError(f"prepare_dataset: expected a DatasetDict with a split 'train', got {found}")
    splits = {name: split.with_format(None) for name, split in tokenized.items() if name in ("train", "validation")}
    for name, split in splits.items():
        check_rows(split, name)
        splits[name] = without_pads(split)
    ours = all(ROW in split.column_names for split in splits.values())  # and not what somebody made instead
    if not ours:
        data = dataclasses.replace(data, dataset=FUNCTION, rows="lines" if data.rows == "lines" else "documents")
        splits = {name: numbered(split) for name, split in splits.items()}
    if (ours and samples_of_ours(splits)) or masks_labels(splits):
        how = "" if isinstance(tokenized, Tokenized) else ", each a sample whose labels say what is learned"
        blocks = make_sample_blocks(splits, data, seed)
    else:
        marks = (first_token(tokenizer), [document_end(tokenizer)]) if close else ([], [])
        how = ", each a line of a running text" if rows_are_lines(data) else ", each a document"
        blocks = make_text_blocks(splits, marks, data, seed)
    read = tokenized if isinstance(tokenized, Tokenized) else Tokenized
    named = {"dataset": data.dataset, "source": read.source + how, "template": read.template}
    blocks = {name: dataclasses.replace(part, **named) for name, part in blocks.items()}
    if unused := sorted(tokenized.keys() - splits.keys()):
        names = f"split{'s'[: len(unused) > 1]} {', '.join(unused)}"
        line = f"not used: the {names} of {FUNCTION}; only train and validation are"
        blocks["train"] = dataclasses.replace(blocks["train"], notes=(*blocks["train"].notes, line))
    return {"train": blocks["train"], "validation": blocks.get("validation")}


def sample_counts(*parts: Blocks | Windows | None) -> list[int]:
    """Return how many samples each block of packed samples holds, in descending order; nothing where none are packed."""
    packed = [part for part in parts if isinstance(part, SampleBlocks) and part.packed]
    return sorted((int(count) for part in packed for count in np.bincount(part.cuts[:, 0])), reverse=True)


def show_block(block: np.ndarray, tokenizer: PreTrainedTokenizerBase, most: int = 80) -> str:
    """Return a block's start decoded in one line, what is learned between [[ and ]], each part cut to `most`
    characters; what is left of a character that a block cuts is not shown.
    """
    ids, learned = (block[:40], np.zeros(40, bool)) if block.ndim == 1 else (block[0], block[1] != IGNORED)
    shown = ""
    for marked, text in whole_characters(ids, learned, tokenizer):
        text = text.replace("\n", "\\n") if shown else text.lstrip(HALF).replace("\n", "\\n")
        if block.ndim == 1:
            return text + " …"
        text = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
        shown += f"[[{text}]]" if marked else text
        if len(shown) > 5 * most:
            return shown + " …"
    return shown


def _training_files(data: DataConfig) -> dict[str, int | None]:
    """Return what the training rows were read from, in order, with the rows in each; None: all that are left."""
    local = local_files(data.dataset)
    if local is None:
        return {f"{data.dataset} {data.train_split}": None}
    builder, files = local
    names = files.get(data.train_split) or next(iter(files.values()))
    base = data.dataset if Path(data.dataset).is_dir() else Path(data.dataset).parent
    sizes = {os.path.relpath(name, base): None for name in names}
    # Each by itself, since together they are rows of one split.
    for shown, name in zip(sizes, names[:-1], strict=False):
        only = {"train": [glob.escape(name)]}
        digest = content_digest({"train": [name]})
        sizes[shown] = len(datasets.load_dataset(builder, digest, data_files=only, **OPTIONS.get(builder, {}))["train"])
    return sizes


def places_of(numbers: Iterable[int], blocks: Blocks, data: DataConfig) -> list[str]:
    """Return for each training block the files and rows, from 1, that it is made of; of a text file a row is a line.

    Of a user's own function the files are not known, only the rows that it returned.
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


def show_blocks(blocks: Blocks, numbers: np.ndarray, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
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
    """Return input_ids, labels and, of packed samples, position_ids, int64 [batch, longest].

    rows: [tokens], or [2 or 3, tokens] with labels and positions. Pads stand on the right, unlabelled by position
    and not by id; of packed samples they make one more, which nobody sees.
    """
    rows = [np.stack([row, row]) if row.ndim == 1 else row for row in rows]
    longest = max(row.shape[1] for row in rows)
    pads = np.stack([np.full(longest, pad), np.full(longest, IGNORED), np.arange(longest)])[: len(rows[0])]
    table = np.stack([np.concatenate([row, pads[:, : longest - row.shape[1]]], 1) for row in rows], 1)
    return {name: torch.from_numpy(numbers) for name, numbers in zip(BATCH[: len(table)], table, strict=True)}


def batches(
    blocks: Blocks, numbers: np.ndarray, size: int, pad: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], int, np.ndarray]]:
    """Yield (batch on the device, its supervised tokens, positions in `numbers`) for the blocks named by `numbers`."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = collate([blocks[i] for i in part], pad)
        tokens = CausalLMLoss.weight(batch)
        if stream is not None:  # copied while the GPU still works on the batches before this one
            with torch.cuda.stream(stream):
                batch = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in batch.values():
                tensor.record_stream(torch.cuda.current_stream(device))
        yield batch, tokens, np.arange(start, start + len(part))


def epoch_order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in an epoch; a function of the seed and the epoch alone, so resuming needs no
    state.
    """
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def step_windows(blocks: int, window: int, seed: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, numbers of the blocks) of every optimizer step after `step`, without end; an epoch's last window
    may be short.
    """
    per_epoch = -(-blocks // window)
    while True:
        epoch, position = divmod(step, per_epoch)
        yield epoch, epoch_order(blocks, seed, epoch)[position * window : (position + 1) * window]
        step += 1
