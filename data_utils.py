"""From rows to blocks: loading, document boundaries, the held-out part, packing, padding.

    load_rows(data) -> DatasetDict of rows            tokenize_rows(rows, tokenizer, data) -> the same with input_ids
    make_blocks(tokenized, tokenizer, data, seed) -> {"train": Blocks, "validation": Blocks or None}

`train_qlora.prepare_dataset` is the first line; what stands in the second takes any DatasetDict with input_ids, so that the
tutorial's own prepare_dataset can be put in its place.
"""

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, get_data_patterns
from transformers import PreTrainedTokenizerBase

from config import ConfigError, DataConfig, missing_data

BUILDERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Wikitext marks an article by " = Title = " and its sections by " = = Title = = ".
WIKITEXT_TITLE = r"^ ?= [^=](.*[^=])? = ?\n?$"
# What datasets says of files that hold no rows, each format in its own way.
NO_ROWS = ("at least one example", "corresponds to no data", "BatchSize must be greater than 0", "No columns to parse")
IGNORED = -100  # the label of a position that is not supervised, PyTorch's default ignore_index


# ------------------------------------------------------------------------------------------------ rows


def local_files(dataset: str) -> tuple[str, dict[str, list[str]]] | None:
    """Return (builder, files by split) of a local file or folder, or None where `dataset` is a hub id."""
    path = Path(dataset)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ConfigError(f"data.dataset: expected one of {', '.join(BUILDERS)}, got {path}")
        return BUILDERS[path.suffix.lower()], {"train": [str(path)]}
    if path.is_dir():
        kinds = sorted({p.suffix.lower() for p in path.rglob("*") if p.suffix.lower() in BUILDERS})
        if len({BUILDERS[kind] for kind in kinds}) != 1:
            found = f"a mixture of {', '.join(kinds)}" if kinds else "none"
            raise ConfigError(
                f"data.dataset: expected files of one kind ({', '.join(BUILDERS)}) in {path}, got {found}"
            )
        base = glob.escape(str(path))  # splits by the names of files and folders, as datasets reads them
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        files = {split: [f for f in names if Path(f).suffix.lower() in BUILDERS] for split, names in found.items()}
        return BUILDERS[kinds[0]], {split: names for split, names in files.items() if names}
    if problems := missing_data(dataset):
        raise ConfigError(*problems)
    return None


def load_rows(data: DataConfig) -> DatasetDict:
    """Return the rows of the splits that data names, from the hub or from local files.

    Where the validation split does not exist, only the training split is returned. Raises ConfigError.
    """
    local = local_files(data.dataset)
    try:
        if local is None:
            loaded = datasets.load_dataset(data.dataset, data.dataset_config)
        else:
            builder, files = local
            # Rows of a .txt that run on are joined as they are; in a .csv the words NA and None are words.
            options = {
                "text": {"keep_linebreaks": True, "encoding": "utf-8-sig"},
                "csv": {"keep_default_na": False},
            }.get(builder, {})
            patterns = {split: [glob.escape(name) for name in names] for split, names in files.items()}
            loaded = datasets.load_dataset(builder, data_files=patterns, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or any(words in str(cause) for words in NO_ROWS):
            raise ConfigError(f"data.dataset: {data.dataset} has no rows") from None
        if local is None and not isinstance(error, ValueError):
            raise ConfigError(
                f"data.dataset: cannot get {data.dataset} from the hub ({type(cause).__name__}); give a local file or folder, "
                "point HF_HOME at a cache that has it, or try --config tiny/config.yaml"
            ) from None
        reason = str(cause).strip().splitlines()[0][:300] if str(cause).strip() else type(cause).__name__
        raise ConfigError(f"data.dataset: cannot read {data.dataset}: {type(cause).__name__}: {reason}") from None
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


def tokenize_rows(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> DatasetDict:
    """Return the rows with a column input_ids of the text column's tokens, no special tokens, nothing cut."""
    if data.format in ("chat", "prompt"):
        raise ConfigError(
            f"data.format: expected text (chat and prompt data are not supported yet), got {data.format!r}"
        )
    column = data.text_column
    for split in rows.values():
        if column not in split.column_names:
            raise ConfigError(
                f"data.text_column: no column {column!r} in {data.dataset}; it has {', '.join(split.column_names)}"
            )
        kind = split.features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
            raise ConfigError(
                f"data.text_column: expected text in column {column!r}, got {getattr(kind, 'dtype', kind)}"
            )

    def encode(batch: dict) -> dict:
        texts = [text or "" for text in batch[column]]
        if tokenizer.is_fast:  # the wrapper around this call costs a third of the tokenizer's speed
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return {"input_ids": [encoding.ids for encoding in encodings]}
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    features = {
        name: datasets.Features({**split.features, "input_ids": datasets.List(datasets.Value("int32"))})
        for name, split in rows.items()
    }
    try:
        return DatasetDict(
            {
                name: split.map(encode, batched=True, features=features[name], desc=f"tokenise {name}")
                for name, split in rows.items()
            }
        )
    except UnicodeDecodeError as error:  # Arrow reads JSON and Parquet without looking at the bytes of a text
        raise ConfigError(f"data.text_column: column {column!r} in {data.dataset} is not UTF-8: {error}") from None


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
    """Return each row's tokens, int64 [rows], without the pads where an attention mask tells them."""
    if "attention_mask" not in dataset.column_names:
        return pc.list_value_length(_column(dataset, "input_ids")).to_numpy().astype(np.int64)
    masks = _column(dataset, "attention_mask")
    ends = np.cumsum(pc.list_value_length(masks).to_numpy().astype(np.int64))
    real = np.append(0, np.cumsum(pc.list_flatten(masks).to_numpy(), dtype=np.int64))
    return np.diff(real[ends], prepend=0)


def drop_empty(dataset: Dataset, data: DataConfig) -> tuple[Dataset, np.ndarray]:
    """Return the rows that have tokens, and for each whether a document starts there, bool [rows].

    Documents: every row starts one. Lines: after a blank line, or at a Wikitext title; without a text column, only the first.
    """
    kept = row_lengths(dataset) > 0
    text = _column(dataset, data.text_column) if data.text_column in dataset.column_names else None
    if text is not None:
        text = text.cast(pa.string()) if pa.types.is_null(text.type) else text  # a column of nothing but nulls
        blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(text, "")), "").to_numpy(zero_copy_only=False)
        kept &= ~blank
    if not rows_are_lines(data):
        starts = np.ones(len(dataset), bool)
    elif text is None:
        starts = np.zeros(len(dataset), bool)
    elif is_wikitext(data):
        starts = (
            pc.match_substring_regex(pc.fill_null(text, ""), WIKITEXT_TITLE).to_numpy(zero_copy_only=False).astype(bool)
        )
    else:
        starts = np.concatenate([[True], blank[:-1]])  # kept rows are not blank, so the row before decides
    if not kept.any():
        raise ConfigError(f"data.dataset: {data.dataset} has no text in column {data.text_column!r}")
    index = np.flatnonzero(kept)
    starts = starts[index].copy()
    starts[0] = True
    return (dataset if len(index) == len(dataset) else dataset.select(index)), starts


def close_documents(dataset: Dataset, starts: np.ndarray, first: list[int], end: int) -> Dataset:
    """Return the rows with the tokenizer's first token before and the document end after every document, input_ids alone."""
    ends = np.append(starts[1:], True)

    def close(batch: dict, indices: list[int]) -> dict:
        out = []
        masks = batch.get("attention_mask", [None] * len(indices))
        for i, ids, mask in zip(indices, batch["input_ids"], masks, strict=True):
            if mask is not None:  # a tokenizer that padded: pads go by position, never by id
                ids = [token for token, real in zip(ids, mask, strict=True) if real]
            before = first if starts[i] and ids[: len(first)] != first else []
            out.append([*before, *ids, *([end] if ends[i] else [])])
        return {"input_ids": out}

    wanted = [name for name in ("input_ids", "attention_mask") if name in dataset.column_names]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return dataset.select_columns(wanted).map(
        close, batched=True, with_indices=True, features=features, remove_columns=wanted, desc="join"
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
    """A flat stream of tokens cut in blocks of `length`; the last one keeps the tail. Indexing reads memory-mapped Arrow data.

    pieces: int32 arrays whose concatenation is the stream. rows, documents: how many went in.
    """

    pieces: tuple[np.ndarray, ...]
    length: int
    cuts: np.ndarray  # int64 [blocks + 1]: block i is stream[cuts[i]:cuts[i + 1]]
    rows: int
    documents: int

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return read_stream(self.pieces, self.cuts[i], self.cuts[i + 1])

    @property
    def tokens(self) -> int:
        """All tokens of all blocks."""
        return int(self.cuts[-1] - self.cuts[0])

    @property
    def supervised(self) -> int:
        """The tokens that are predicted: all but the first of each block."""
        return self.tokens - len(self)


def read_stream(pieces: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Return stream[start:stop] of the concatenated pieces, int64."""
    parts, position = [], 0
    for piece in pieces:
        low, high = max(start - position, 0), min(stop - position, len(piece))
        if low < high:
            parts.append(piece[low:high])
        position += len(piece)
        if position >= stop:
            break
    return np.concatenate(parts).astype(np.int64)


def row_stream(dataset: Dataset) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return the tokens of all rows as memory-mapped int32 pieces, and the length of each row, int64 [rows]."""
    column = _column(dataset, "input_ids")
    pieces = tuple(chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks if len(chunk))
    return pieces, pc.list_value_length(column).to_numpy().astype(np.int64)


def cut_points(lengths: np.ndarray, length: int, packing: bool) -> np.ndarray:
    """Return where blocks start and end, int64 [blocks + 1]. No token is lost: the last block keeps the tail.

    Packed: every `length` tokens across rows. Unpacked: every `length` tokens within each row, so no block spans two rows.
    """
    total = int(lengths.sum())
    if packing:
        return np.append(np.arange(0, total, length, dtype=np.int64), total)
    ends = np.cumsum(lengths)
    starts = [np.arange(end - size, end, length, dtype=np.int64) for end, size in zip(ends, lengths, strict=True)]
    return np.append(np.concatenate(starts), total)


def _trim(cuts: np.ndarray) -> np.ndarray:
    """Drop a last block of one token, which predicts nothing."""
    return cuts[:-1] if len(cuts) > 2 and cuts[-1] - cuts[-2] < 2 else cuts


def _blocks(dataset: Dataset, starts: np.ndarray, data: DataConfig) -> Blocks:
    pieces, lengths = row_stream(dataset)
    return Blocks(
        pieces,
        data.max_length,
        _trim(cut_points(lengths, data.max_length, data.packing)),
        len(lengths),
        int(starts.sum()),
    )


def _split_tail(blocks: Blocks, fraction: float) -> tuple[Blocks, Blocks]:
    """Return the blocks as (train, held out): the last part, at least one block."""
    if len(blocks) < 2:
        raise ConfigError(
            f"data.dataset: {blocks.tokens} tokens are too short to hold out a block; "
            "give a validation split, a smaller data.max_length, or data.validation_fraction 0"
        )
    count = min(max(1, round(len(blocks) * fraction)), len(blocks) - 1)
    train = dataclasses.replace(blocks, cuts=blocks.cuts[: len(blocks) - count + 1])
    return train, dataclasses.replace(blocks, cuts=blocks.cuts[len(blocks) - count :])


def _limit(dataset: Dataset, starts: np.ndarray, most: int | None) -> tuple[Dataset, np.ndarray]:
    return (dataset, starts) if most is None or most >= len(starts) else (dataset.select(range(most)), starts[:most])


def make_blocks(
    tokenized: DatasetDict, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int
) -> dict[str, Blocks | None]:
    """Return the blocks of {"train", "validation"}: empty rows dropped, documents closed, rows held out where needed, cut.

    tokenized: a DatasetDict with input_ids, with or without the text column, attention_mask or a validation split.
    """
    if not isinstance(tokenized, DatasetDict) or "train" not in tokenized:
        found = ", ".join(tokenized) if isinstance(tokenized, DatasetDict) else type(tokenized).__name__
        raise ConfigError(f"prepare_dataset: expected a DatasetDict with a split 'train', got {found}")
    if "input_ids" not in tokenized["train"].column_names:
        raise ConfigError(
            f"prepare_dataset: expected a column input_ids, got {', '.join(tokenized['train'].column_names)}"
        )
    first, end = first_token(tokenizer), document_end(tokenizer)
    train, starts = drop_empty(tokenized["train"], data)
    held, held_starts = drop_empty(tokenized["validation"], data) if "validation" in tokenized else (None, None)
    tail = False
    if held is None and data.validation_fraction > 0:
        least = data.max_length if data.packing else 2  # one block; unpacked a row is one
        out = hold_out(starts, row_lengths(train), data.validation_fraction, least, seed)
        tail = out is None
        if out is not None:
            held, held_starts = train.select(np.flatnonzero(out)), starts[out]
            train, starts = train.select(np.flatnonzero(~out)), starts[~out]
    train, starts = _limit(train, starts, data.max_train_samples)
    blocks = {"train": _blocks(close_documents(train, starts, first, end), starts, data), "validation": None}
    if tail:
        blocks["train"], blocks["validation"] = _split_tail(blocks["train"], data.validation_fraction)
    elif held is not None:
        held, held_starts = _limit(held, held_starts, data.max_eval_samples)
        blocks["validation"] = _blocks(close_documents(held, held_starts, first, end), held_starts, data)
    for name, part in blocks.items():
        if part is not None and part.supervised < 1:
            raise ConfigError(
                f"data.dataset: the {name} part of {data.dataset} has {part.tokens} tokens: nothing to predict"
            )
    return blocks


# ------------------------------------------------------------------------------------------------ batches


def collate(rows: Sequence[np.ndarray], pad: int) -> dict[str, torch.Tensor]:
    """Return input_ids and labels, int64 [batch, longest]: pads stand on the right and are unlabelled by position, not by id."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row)
    return {"input_ids": input_ids, "labels": labels}


def epoch_order(blocks: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in an epoch; a function of the seed and the epoch alone, so resuming needs no state."""
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def step_windows(blocks: int, window: int, seed: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, numbers of the blocks) of every optimizer step after `step`, without end; an epoch's last window may be short."""
    per_epoch = -(-blocks // window)
    while True:
        epoch, position = divmod(step, per_epoch)
        yield epoch, epoch_order(blocks, seed, epoch)[position * window : (position + 1) * window]
        step += 1
