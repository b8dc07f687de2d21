"""From files to rows: which files a data set has, what each is used for, and every cell as its file has it.

    load_rows(data) -> Rows: a DatasetDict with train and perhaps validation

Cells of .csv and .tsv and strings in JSON stay the text that they are: no reader here guesses a type. Values of JSON
that are no text (turns of a chat, tools, numbers) are kept as JSON, one text per cell, and `chat_rows.value_of` reads them.
"""

import csv
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from config import DATA_FILES, ConfigError, Source, counted, data_suffix, missing_data
from quantization_utils import asking_hub, cache_problem, hub_problem
from toolkit.chat_rows import CHATS, JSON_CELL, recognise
from toolkit.encodings import not_utf8

# Parts of the errors that datasets raises for files without rows; each format has its own.
NO_ROWS = ("at least one example", "corresponds to no data", "BatchSize must be greater than 0")
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"keep_linebreaks": True, "encoding": "utf-8-sig"},  # line breaks, so that lines can be joined again
    "parquet": {"batch_size": 10_000},  # rows; else a whole row group is decoded at once, which may repeat a long text
}
MOST_COLUMNS = 10_000  # datasets needs minutes for ten times as many
SAVED = "saved"  # the kind of a folder that Dataset.save_to_disk wrote
# Words in the names of files and folders that tell the split, and names of splits that mean the same.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
MOST_NAMED = 20  # files with a line of their own


class Rows(DatasetDict):
    """Rows by split, with lines for the log that tell which file is used for what, and the keys that turns of chats have."""

    notes: tuple[str, ...] = ()
    keys_of_turns: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds: its number of rows, its columns, each with whether it holds texts (and nulls) only, and the keys of
    the turns in its chats.
    """

    rows: int
    columns: dict[str, bool]
    keys: frozenset[str] = frozenset()


def quiet_datasets() -> None:
    """Keep datasets from logging errors that we report ourselves, and from drawing bars without a terminal."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------ which files


def local_files(dataset: str) -> tuple[str, dict[str, list[str]]] | None:
    """Return (kind, files by split) of a local file or folder, or None if `dataset` is a hub id."""
    path = Path(dataset)
    if path.is_file():
        if (suffix := data_suffix(path.name)) is None:
            raise ConfigError(f"data.dataset: expected one of {', '.join(DATA_FILES)}, got {path}")
        return DATA_FILES[suffix], {"train": [str(path)]}
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return SAVED, _saved_splits(path)
        files = data_files_in(path)
        by_split: dict[str, list[str]] = {}
        for file in files:
            by_split.setdefault(split_named(file.relative_to(path)), []).append(str(file))
        return DATA_FILES[data_suffix(files[0].name) or ""], by_split
    if problems := missing_data(dataset):
        raise ConfigError(*problems)
    if os.path.lexists(dataset):
        raise ConfigError(f"data.dataset: expected a file or a folder, got {dataset}, which is {_kind_of(path)}")
    return None


def data_files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder by name, without hidden ones; raise ConfigError if they are of several kinds."""
    inside = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if data_suffix(file.name) and file.name not in METADATA and not hidden and not file.is_dir():
            inside.append(file)
    for odd in [p for p in inside if not p.is_file()][:1]:  # reading a named pipe would never end
        raise ConfigError(f"data.dataset: expected a file, got {odd}, which is {_kind_of(odd)}")
    kinds = sorted({data_suffix(p.name) or "" for p in inside})
    if len({DATA_FILES[kind] for kind in kinds}) != 1:
        found = f"a mixture of {', '.join(kinds)}" if kinds else "none"
        one_of = ", ".join(DATA_FILES)
        raise ConfigError(f"data.dataset: expected files of one kind ({one_of}) in {folder}, got {found}")
    return inside


def _kind_of(path: Path) -> str:
    """Return in words what a path is that is no regular file."""
    return "a link to nothing" if path.is_symlink() and not path.exists() else "a pipe, a socket or a device"


def _saved_splits(folder: Path) -> dict[str, list[str]]:
    """Return the folders that Dataset.save_to_disk or DatasetDict.save_to_disk wrote, by split."""
    if not (folder / "dataset_dict.json").is_file():
        return {"train": [str(folder)]}
    return {p.parent.name: [str(p.parent)] for p in sorted(folder.glob("*/state.json"))} or {"train": []}


def split_named(path: Path) -> str:
    """Return the split that a path within a data folder names, or "" if it names none or several.

    NAME-00000-of-00001 is a part of the split NAME, as on the hub. Otherwise a word such as train or eval counts, in
    the file's name before those of its folders.
    """
    if shard := re.match(r"(.+)-\d{5}-of-\d{5}", path.name):
        return shard[1]
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        if found := [word for word in words if word in itertools.chain(*WORDS.values())]:
            same = any(set(found) <= set(alike) for alike in WORDS.values())
            return found[0] if same else ""
    return ""


def chosen_files(splits: dict[str, list[str]], data: Source) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the files of train and perhaps validation, and for each other file why it is not used.

    Files whose name tells no split are for training. A single split is for training whatever its name is.
    """
    wanted = WORDS["train"] if data.train_split == "train" else (data.train_split,)
    held = WORDS["validation"] if data.validation_split == "validation" else (data.validation_split,)
    if len(splits) == 1:
        wanted = tuple(splits)
    train = sorted(
        file for name in splits if name in wanted or (not name and "train" in wanted) for file in splits[name]
    )
    if not train:
        has = ", ".join(name or "files whose name tells no split" for name in splits)
        raise ConfigError(f"data.train_split: {data.dataset} has no split {data.train_split!r}; it has {has}")
    chosen = {"train": train}
    if validation := sorted(file for name in splits if name in held and name not in wanted for file in splits[name]):
        chosen["validation"] = validation
    used = {*itertools.chain(*chosen.values())}
    reasons = {name: f"its name says {name}" if name else f"data.train_split is {data.train_split}" for name in splits}
    unused = {file: reasons[name] for name, files in splits.items() for file in files if file not in used}
    return chosen, unused


# ------------------------------------------------------------------------------------------------ what is in a file


def _open_text(name: str, newline: str | None) -> IO[str]:
    opened = gzip.open if name.lower().endswith(".gz") else open
    return opened(name, "rt", encoding="utf-8-sig", newline=newline)  # type: ignore[operator]


def read_csv(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .csv or .tsv: every cell as its text, and None for an empty cell. Raise ValueError."""
    csv.field_size_limit(2**31 - 1)  # characters in a cell; Python's own limit is 131,072
    with _open_text(name, "") as file:
        reader = csv.reader(file, delimiter="\t" if ".tsv" in name.lower()[-7:] else ",", strict=True)
        try:
            header = [cell or f"unnamed {i}" for i, cell in enumerate(next(reader, ()), 1)]
            if len(header) > MOST_COLUMNS:
                raise ValueError(f"expected at most {MOST_COLUMNS:,} columns, got {len(header):,}")
            for twice in [cell for cell in header if header.count(cell) > 1][:1]:
                raise ValueError(f"two columns have the name {twice!r}")
            for cells in reader:
                if cells and len(cells) != len(header):
                    cause = f"expected {counted(len(header), 'cell')} as in the first line, got {len(cells)}"
                    raise ValueError(f"line {reader.line_num}: {cause}")
                if cells:  # else an empty line
                    yield dict(zip(header, (cell or None for cell in cells), strict=True))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_number)


def _decoded(text: str, where: str) -> Any:
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"{where}nested too deeply") from None
    except json.JSONDecodeError as error:
        line = where or f"line {error.lineno}: "
        raise ValueError(f"{line}{error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}{str(error)[:200]}") from None


def read_json(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl (an object per line), or of a .json that is a list or a single object. Raise ValueError.

    A text in a list is a row with the column text.
    """
    with _open_text(name, "\n") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, line = next(lines, (0, ""))
        rows: Iterable[tuple[int, Any]]
        if line.lstrip().startswith("[") or (".json" in name.lower()[-8:] and line.strip() == "{"):
            file.seek(0)
            found = _decoded(file.read(), "")
            rows = enumerate([found] if isinstance(found, dict) else found, 1)
            row_name = "entry"
        else:
            first = [(number, line)] if line else []
            rows = ((n, _decoded(text, f"line {n}: ")) for n, text in itertools.chain(first, lines))
            row_name = "line"
        for number, row in rows:
            if isinstance(row, str) and row_name == "entry":
                row = {"text": row}
            if not isinstance(row, dict):
                raise ValueError(f"{row_name} {number}: expected an object, got {json.dumps(row)[:60]}")
            yield row


READERS = {"csv": read_csv, "json": read_json}


def scan(name: str, kind: str) -> Contents:
    """Return what a file holds; raise ValueError or what its reader raises if it cannot be read to its end."""
    if kind == "parquet":
        found = pq.read_metadata(name)
        return Contents(found.num_rows, dict.fromkeys(found.schema.to_arrow_schema().names, True))
    if kind == "text":
        with open(name, encoding="utf-8-sig") as file:
            return Contents(sum(1 for _ in file), {"text": True})
    rows = 0
    columns: dict[str, bool] = {}
    keys: set[str] = set()
    for row in READERS[kind](name):
        rows += 1
        for column, value in row.items():
            if isinstance(value, str):
                value.encode()  # half a character, such as "\ud800", is an error here
                columns.setdefault(column, True)
            else:
                columns[column] = value is None and columns.get(column, True)
            if isinstance(value, list) and (column,) in CHATS:
                keys.update(*(turn for turn in value if isinstance(turn, dict)))
        if len(columns) > MOST_COLUMNS:
            raise ValueError(f"expected at most {MOST_COLUMNS:,} columns, got more")
    return Contents(rows, columns, frozenset(keys))


def content_digest(files: Iterable[str]) -> str:
    """Return a hash of the files' bytes and of this file's source, as a key for datasets' cache."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:32]


def check_unpacked(name: str) -> None:
    """Raise ValueError if a .gz holds far more than data that compresses: over 1 GiB, and 100 times its own size."""
    if not name.lower().endswith(".gz"):
        return
    most, unpacked = max(2**30, 100 * os.path.getsize(name)), 0
    with gzip.open(name, "rb") as file:
        while block := file.read(2**22):
            unpacked += len(block)
            if unpacked > most:
                raise ValueError(f"expected at most {most:,} bytes when unpacked, or 100 times its size, got more")


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


def check_files(files: Sequence[str], kind: str) -> dict[str, Contents]:
    """Return what each file holds; raise ConfigError, which names the file and, where it can, the line."""
    found = {}
    for name in files:
        try:
            check_unpacked(name)
            if problem := not_parquet(name) if kind == "parquet" else not_utf8(name):
                raise ValueError(problem)
            found[name] = scan(name, kind)
        except (ValueError, OSError, EOFError, pa.ArrowException) as error:
            known = isinstance(error, ValueError) and not isinstance(error, (UnicodeError, pa.ArrowException))
            lines = str(error).splitlines() or [""]
            cause = lines[0] if known else f"{type(error).__name__}: {lines[0]}"
            raise ConfigError(f"data.dataset: cannot read {name}: {cause[:300]}") from None
    return found


# ------------------------------------------------------------------------------------------------ rows


def _cell(value: Any, text: bool) -> Any:
    return value if text or value is None else {JSON_CELL: json.dumps(value)}


def _generate(files: Sequence[str], kind: str, columns: Sequence[tuple[str, bool]], key: str) -> Iterator[dict]:
    """Yield the rows of files with all columns. key: what the cache of datasets is to know them by."""
    for name in files:
        for row in READERS[kind](name):
            yield {column: _cell(row.get(column), text) for column, text in columns}


def read_files(files: list[str], kind: str, columns: dict[str, bool]) -> Dataset:
    """Return the rows of files of one kind, one file after another.

    columns: those of all files, each with whether it holds texts only; other values become cells of JSON.
    """
    key = content_digest(files)
    if kind in OPTIONS:
        patterns = {"train": [glob.escape(name) for name in files]}
        return datasets.load_dataset(kind, key, data_files=patterns, **OPTIONS[kind])["train"]
    string = datasets.Value("string")
    features = datasets.Features({name: string if text else {JSON_CELL: string} for name, text in columns.items()})
    given = {"files": tuple(files), "kind": kind, "columns": tuple(columns.items()), "key": key}
    return Dataset.from_generator(_generate, features=features, gen_kwargs=given)


def unreadable(error: Exception, dataset: str, local: bool) -> ConfigError:
    """Return the error that explains in one line why datasets could not load a data set."""
    if known := cache_problem(error) or (None if local else hub_problem("data.dataset", dataset, error)):
        return known
    cause = error.__cause__ or error
    if isinstance(cause, StopIteration) or any(words in str(cause) for words in NO_ROWS):
        return ConfigError(f"data.dataset: {dataset} has no rows")
    kind, lines = type(cause).__name__, str(cause).strip().splitlines()
    return ConfigError(f"data.dataset: cannot read {dataset}: {kind}: {lines[0][:300] if lines else kind}")


def load_rows(data: Source) -> Rows:
    """Return the rows of the splits that `data` names, from the hub or from local files.

    If the validation split does not exist, only the training split is returned. Raises ConfigError.
    """
    local = local_files(data.dataset)
    try:
        rows = hub_rows(data) if local is None else local_rows(*local, data)
    except ConfigError:
        raise
    except Exception as error:  # the readers of datasets and pyarrow raise anything about a strange file
        raise unreadable(error, data.dataset, local is not None) from None
    for name, split in rows.items():
        if not len(split):
            raise ConfigError(f"data.dataset: {data.dataset} has no rows")
        if "string_view" in str(split.features):  # Arrow's newer type of text, which datasets cannot write or cut
            rows[name] = split.cast(_without_views(split.features))
    return rows


def _without_views(kind: Any) -> Any:
    """Return features with string instead of string_view."""
    if isinstance(kind, dict):
        return type(kind)({name: _without_views(part) for name, part in kind.items()})
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(kind, feature=_without_views(kind.feature))
    return datasets.Value("string") if kind == datasets.Value("string_view") else kind


def hub_rows(data: Source) -> Rows:
    """Return the rows of a data set of the hub."""
    with asking_hub(data.dataset):
        loaded = datasets.load_dataset(data.dataset, data.dataset_config)
    if data.train_split not in loaded:
        has = ", ".join(loaded)
        raise ConfigError(f"data.train_split: {data.dataset} has no split {data.train_split!r}; it has {has}")
    rows = Rows(train=loaded[data.train_split])
    if data.validation_split in loaded and data.validation_split != data.train_split:
        rows["validation"] = loaded[data.validation_split]
    if unused := [name for name in loaded if name not in (data.train_split, data.validation_split)]:
        rows.notes = (f"not used: the split{'s'[: len(unused) > 1]} {', '.join(unused)} of {data.dataset}",)
    if (kind := rows["train"].info.builder_name) in READERS:
        rows.notes += (
            f"warning: datasets reads the .{kind} files of the hub and guesses types: 0042 may become 42, and a date a time; "
            "for the text as it is, download the files and give their folder as data.dataset",
        )
    return rows


def local_rows(kind: str, splits: dict[str, list[str]], data: Source) -> Rows:
    """Return the rows of local files, with a line on each file of a folder that has more than one."""
    chosen, unused = chosen_files(splits, data)
    names = [*itertools.chain(*chosen.values())]
    if kind == SAVED:
        rows = Rows({split: saved_rows(folders) for split, folders in chosen.items()})
        counts = {folder: len(rows[split]) for split, folders in chosen.items() for folder in folders}
    else:
        found = check_files(names, kind)
        columns = columns_of_all(found, data)
        counts = {name: contents.rows for name, contents in found.items()}
        for split, files in chosen.items():
            if not any(counts[name] for name in files):
                raise ConfigError(f"data.dataset: {data.dataset} has no rows for {split}")
        filled = {split: [name for name in files if counts[name]] for split, files in chosen.items()}
        rows = Rows({split: read_files(files, kind, columns) for split, files in filled.items()})
        rows.keys_of_turns = frozenset().union(*(contents.keys for contents in found.values()))
    if len(names) + len(unused) > 1:
        rows.notes = tuple(file_lines(chosen, unused, counts, Path(data.dataset)))
    return rows


def check_saved(folder: Path) -> None:
    """Raise ConfigError unless the state.json of a saved folder names data files beside it, each once."""
    with open(folder / "state.json", encoding="utf-8") as file:
        state = json.load(file)
    named = state.get("_data_files") if isinstance(state, dict) else None
    listed = named if isinstance(named, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    sound = [isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in names]
    if (
        not names
        or not all(sound)
        or len(set(names)) < len(names)
        or any((folder / str(n)).is_symlink() for n in names)
    ):
        raise ConfigError(
            f"data.dataset: {folder / 'state.json'}: expected the names of .arrow files beside it in _data_files"
        )


def saved_rows(folders: list[str]) -> Dataset:
    """Return the rows that Dataset.save_to_disk wrote. Their files' bytes are the key of the tokenised rows."""
    parts = []
    for folder in folders:
        check_saved(Path(folder))
        part = datasets.load_from_disk(folder).with_format(None)
        part._fingerprint = content_digest(str(p) for p in sorted(Path(folder).glob("*")) if p.is_file())
        parts.append(part)
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def columns_of_all(found: dict[str, Contents], data: Source) -> dict[str, bool]:
    """Return the columns of all files; raise ConfigError if a file has none of a column that is read in the others."""
    columns: dict[str, bool] = {}
    for contents in found.values():
        for name, text in contents.columns.items():
            columns[name] = text and columns.get(name, True)
    if not columns:
        raise ConfigError(f"data.dataset: {data.dataset} has no rows")
    _, needed = recognise(list(columns), data)
    for column in needed:
        for name, contents in found.items():
            if contents.rows and column not in contents.columns:
                has = next(other for other, c in found.items() if column in c.columns)
                raise ConfigError(
                    f"data.dataset: expected files of the same columns in {data.dataset}, got none of the name {column!r} "
                    f"in {name}, which has {', '.join(contents.columns)}; {has} has it"
                )
    return columns


def file_lines(
    chosen: dict[str, list[str]], unused: dict[str, str], counts: dict[str, int], folder: Path
) -> Iterator[str]:
    """Yield a line on each file of a folder: its rows and what they are for. Of many files, a line on each use."""
    uses = {"train": "for training", "validation": "for validation"}
    told = [(name, uses[split]) for split, files in chosen.items() for name in files]
    told += [(name, f"not used, since {reason}") for name, reason in unused.items()]
    if len(told) > MOST_NAMED:
        for use, group in itertools.groupby(told, key=lambda entry: entry[1]):
            names = [name for name, _ in group]
            rows = f", {counted(sum(counts[name] for name in names), 'row')}" if names[0] in counts else ""
            yield f"{counted(len(names), 'file')}{rows}: {use}"
        return
    for name, use in told:
        rows = f"{counted(counts[name], 'row')}, " if name in counts else ""
        yield f"{os.path.relpath(name, folder)}: {rows}{use}"
