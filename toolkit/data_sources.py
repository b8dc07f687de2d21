"""One source of data or several: their rows, the blocks of all, and what belongs to which.

read_sources(data, tokenizer) -> the tokenised rows of a source, or of each
make_blocks(tokenized, tokenizer, data, seed) -> {"train": Blocks, "validation": Blocks or None}

Each source is read, held out and packed on its own, as if it were the only one; then its blocks stand beside the others'.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from config import ConfigError, DataConfig, Source, counted, sources_of
from fast_path.loss import IGNORED
from toolkit import data_blocks
from toolkit.data_blocks import Blocks, SampleBlocks
from toolkit.data_files import Rows, chosen_files, load_rows, local_files
from toolkit.data_formats import Tokenized, naming_source, template_of, tokenize_rows
from toolkit.file_lines import MOST_NAMED, copy_lines, some

# ------------------------------------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """The tokenised rows of several sources. notes: lines for the log about all of them."""

    sources: tuple[Tokenized, ...]
    notes: tuple[str, ...]


def read_sources(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenized | SourceRows:
    """Return the tokenised rows of data.dataset, or of each source where it is a list. Raises ConfigError."""
    sources, loaded, tokenized = sources_of(data), [], []
    if isinstance(data.dataset, str):
        return tokenize_rows(load_rows(sources[0]), tokenizer, data)
    refuse_twice(sources)
    for source in sources:
        with naming_source(source):
            loaded.append((load_rows(source), source))
    template, notes = template_of(loaded, tokenizer, data.template_options)
    notes += copies_of_sources([rows for rows, _ in loaded])
    for rows, source in loaded:
        with naming_source(source):
            tokenized.append(tokenize_rows(rows, tokenizer, source, template))
    return SourceRows(tuple(tokenized), tuple(notes))


def refuse_twice(sources: Sequence[Source]) -> None:
    """Raise ConfigError if two sources read the same: what is held out of one would be trained on in the other."""
    seen: dict[Any, str] = {}
    for source in sources:
        with naming_source(source):
            local = local_files(source.dataset)
            chosen = chosen_files(local[1], source)[0] if local else {}
        files = [os.path.realpath(file) for file in itertools.chain(*chosen.values())]
        for part in files if local else [source.dataset]:
            found = os.stat(part) if local else None  # of a hard link it is the same
            key = (found.st_dev, found.st_ino) if found else (source.dataset, source.dataset_config)
            if seen.setdefault(key, source.name) != source.name:
                raise ConfigError(
                    f"{source.name}: {part} is read by {seen[key]} too; give it once, since "
                    "what is held out of one source would be trained on in the other"
                )


def copies_of_sources(loaded: Sequence[Rows]) -> list[str]:
    """Return a line if files of several sources are copies; those within one source have a line already."""
    files: dict[str, str] = {}
    for rows in loaded:  # parquet of the hub has none
        one_each = {digest: name for name, digest in getattr(rows, "digests", {}).items()}
        files |= {name: digest for digest, name in one_each.items()}
    return list(copy_lines(files))


def source_names(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source in lines of the log: that of its file if no other has it, else all of its path."""
    names = [Path(source.dataset).name for source in sources]
    if len(set(names)) < len(names):
        names = [source.dataset for source in sources]
    if len(set(names)) < len(names):  # configurations of one data set of the hub
        names = [f"{source.dataset} {source.dataset_config}" for source in sources]
    return names


# ------------------------------------------------------------------------------------------------ blocks


@dataclasses.dataclass(frozen=True)
class MixedBlocks(Blocks):
    """The blocks of several sources, one source after another; some may be running text and others samples.

    names: of each source in lines of the log. shares: of its rows.
    """

    sources: tuple[Any, ...] = ()  # Blocks, or Windows over them
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def parts(self) -> Sequence[Any]:
        return self.sources

    @property
    def first(self) -> np.ndarray:
        """The number of each source's first block, and behind it the number of all blocks, int64 [sources + 1]."""
        return np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, i: int) -> tuple[int, int]:
        """Return the number of a block's source, and its number in this source."""
        source = int(np.searchsorted(self.first, i, side="right")) - 1
        return source, int(i - self.first[source])

    def spans(self, i: int) -> np.ndarray:
        source, number = self.place(i)
        return self.sources[source].spans(number)

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a block as its source has it; beside packed samples, running text is a sample too."""
        source, number = self.place(i)
        block = self.sources[source][number]
        if block.ndim > 1 or not any(isinstance(part, SampleBlocks) and part.packed for part in self.sources):
            return block
        return np.stack([block, np.append(IGNORED, block[1:]), np.arange(len(block))])

    @property
    def shown_dataset(self) -> str:
        shares = map(share_of, self.shares)
        return ", ".join(part.shown_dataset + share for part, share in zip(self.sources, shares, strict=True))

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.sources)

    @property
    def supervised(self) -> int:
        return sum(part.supervised for part in self.sources)


def samples_of(blocks: Blocks) -> list[SampleBlocks]:
    """Return the blocks of those sources that are chats or pairs."""
    return [part for part in blocks.parts if isinstance(part, SampleBlocks)]


def first_samples(blocks: Blocks) -> np.ndarray | None:
    """Return the first block of each source of samples, side by side, int64 [2 or 3, tokens]; None if all is text."""
    found = [part[0] for part in samples_of(blocks)]
    return np.concatenate(found, 1) if found else None


def by_source(blocks: Any) -> Iterator[tuple[str, Any, slice]]:
    """Yield (name, blocks, their numbers) of each source; nothing if there is only one."""
    if isinstance(blocks, MixedBlocks):
        bounds = itertools.starmap(slice, itertools.pairwise(blocks.first.tolist()))
        yield from zip(blocks.names, blocks.sources, bounds, strict=True)


def make_blocks(
    tokenized: DatasetDict | SourceRows,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    seed: int,
    close: bool = True,
) -> dict[str, Blocks | None]:
    """Return the blocks of "train" and "validation" as data_blocks.make_blocks does, of each source where there are several."""
    if not isinstance(tokenized, SourceRows):
        return data_blocks.make_blocks(tokenized, tokenizer, data, seed, close)
    sources = with_limits(sources_of(data), tokenized.sources)
    found = []
    for rows, source in zip(tokenized.sources, sources, strict=True):
        with naming_source(source):
            found.append(data_blocks.make_blocks(rows, tokenizer, source, seed, close))
    lines = [*tokenized.notes, *lines_of_sources(sources, found)]
    return {
        split: mixed([blocks[split] for blocks in found], sources, lines if split == "train" else ())
        for split in ("train", "validation")
    }


def mixed(parts: list[Blocks | None], sources: list[Source], notes: Iterable[str]) -> Blocks | None:
    """Return the blocks of all sources that have some, or None if none has."""
    given = zip(parts, source_names(sources), sources, strict=True)
    if not (own := [(part, name, source.share) for part, name, source in given if part is not None]):
        return None
    blocks, names, shares = zip(*own, strict=True)
    chats = [part for part in blocks if isinstance(part, SampleBlocks)]
    kind = "text" if not chats else "samples" if len(chats) == len(blocks) else "samples and text"
    return MixedBlocks(
        pieces=(),
        length=sources[0].max_length,
        cuts=np.zeros(0, np.int64),
        rows=sum(part.rows for part in blocks),
        documents=sum(part.documents for part in blocks),
        dataset=", ".join(part.dataset + share_of(share) for part, share in zip(blocks, shares, strict=True)),
        source=f"{kind} from {counted(len(blocks), 'source')}",
        template=next((part.template for part in chats if part.template), None),
        template_options=next((part.template_options for part in chats), None),
        notes=tuple(notes),
        sources=blocks,
        names=names,
        shares=shares,
    )


def share_of(share: float) -> str:
    """Return ` (share 0.5)`, or an empty text for a source that is read whole."""
    return f" (share {share})" if share < 1 else ""


def source_lines(train: Sequence[Blocks], validation: Sequence[Blocks], share: str = "") -> Iterator[str]:
    """Yield lines for the log about a source, or about several: rows, tokens and blocks, and how they were read."""
    held, size = (
        f"{counted(sum(part.tokens for part in parts), 'token')} in {counted(sum(map(len, parts)), 'block')}"
        for parts in (validation, train)
    )
    rows = counted(sum(part.rows for part in train), "row")
    yield f"{rows}{share}, {size}; held out: {held if validation else 'nothing'}"
    told = [line for part in train for line in (f"read as {part.source}", *part.notes)]
    told += [line for part in validation for line in part.notes]
    for line, times in collections.Counter(told).items():
        yield f"{line} ({counted(times, 'source')})" if len(train) > 1 else line


def lines_of_sources(sources: list[Source], found: list[dict[str, Blocks | None]]) -> Iterator[str]:
    """Yield lines about each source, and about those after MOST_NAMED together."""
    named = zip(source_names(sources), sources, found, strict=True)
    for name, source, parts in itertools.islice(named, MOST_NAMED):
        held = [parts["validation"]] if parts["validation"] else []
        yield from (f"{name}: {line}" for line in source_lines([parts["train"]], held, share_of(source.share)))
    if rest := found[MOST_NAMED:]:
        held = [parts["validation"] for parts in rest if parts["validation"]]
        name = counted(len(rest), "more source")
        lines = source_lines([parts["train"] for parts in rest], held)
        yield from some([f"{name}: {line}" for line in lines], "more lines about sources")


def rows_in(rows: Tokenized, split: str) -> int:
    """Return how many rows of the data became the samples of a split; a row may become several."""
    return int(data_blocks.first_samples(rows[split], np.arange(len(rows[split]))).sum())


def with_limits(sources: list[Source], tokenized: Sequence[Tokenized]) -> list[Source]:
    """Return the sources, each with its part of data.max_train_samples and data.max_eval_samples: as its rows are of all."""
    train = [rows_in(rows, "train") * source.share for rows, source in zip(tokenized, sources, strict=True)]
    held = [
        rows_in(rows, "validation") * source.share if "validation" in rows else count * source.validation_fraction
        for rows, source, count in zip(tokenized, sources, train, strict=True)
    ]
    for key, sizes in (("max_train_samples", train), ("max_eval_samples", held)):
        if (most := getattr(sources[0], key)) is not None:
            limits: list[dict[str, Any]] = [{key: n} for n in apportion(most, sizes, key)]
            sources = [dataclasses.replace(source, **limit) for source, limit in zip(sources, limits, strict=True)]
    return sources


def apportion(most: int, sizes: Sequence[float], key: str) -> list[int]:
    """Return numbers of at least 1 that add up to `most`, each as its size is of all sizes. Raise ConfigError."""
    if most < len(sizes):
        raise ConfigError(f"data.{key}: expected at least a row for each of {len(sizes)} sources, got {most}")
    reached = np.cumsum([0, *sizes]) / max(sum(sizes), 1e-9) * (most - len(sizes))
    return [int(n) + 1 for n in np.diff(np.round(reached))]


def show_blocks(blocks: Blocks, numbers: np.ndarray, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """Return the training blocks of these numbers as text, as data_blocks.show_blocks does; those of a mixture by source."""
    if not isinstance(blocks, MixedBlocks):
        return data_blocks.show_blocks(blocks, numbers, tokenizer, sources_of(data)[0])
    places, shown = [blocks.place(i) for i in numbers], []
    for k, (name, part, source) in enumerate(zip(blocks.names, blocks.sources, sources_of(data), strict=True)):
        if mine := [number for at, number in places if at == k]:
            shown.append(f"{name}: {data_blocks.show_blocks(part, np.array(mine), tokenizer, source)}")
    return "; ".join(shown)


# ------------------------------------------------------------------------------------------------ windows


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over the whole text of `blocks`, as long as a block, each `stride` tokens after the one before.

    Each window predicts only the tokens that no window before it has predicted.
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
        """The number of tokens predicted: all but the first of the text, or of each window if they do not overlap."""
        return self.blocks.tokens - (len(self) if self.stride == self.blocks.length else 1)


def windows_of(blocks: Blocks, stride: int) -> Windows | MixedBlocks:
    """Return the windows over a part's running text; raise ConfigError for samples, which are not running text."""
    if samples_of(blocks):
        raise ConfigError(f"--stride: works on running text only, got {blocks.source}")
    if isinstance(blocks, MixedBlocks):
        return dataclasses.replace(blocks, sources=tuple(Windows(part, stride) for part in blocks.sources))
    return Windows(blocks, stride)
