"""From files to rows: which files a data set has, what each is used for, and every cell as its file has it.

    load_rows(data) -> Rows: a DatasetDict with train and perhaps validation

Cells of .csv and .tsv and strings in JSON stay the text that they are: no reader here guesses a type. Values of JSON
that are no text (turns of a chat, tools, numbers) are kept as JSON, one text per cell, and `chat_rows.value_of` reads them.
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.table import table_cast

from config import ConfigError, Source, counted
from toolkit import strict_json
from toolkit.chat_rows import CHATS, IN_TEXTS, JSON_CELL, recognise
from toolkit.encodings import not_utf8
from toolkit.file_lines import copy_lines, file_lines, link_lines
from toolkit.hub import asking_hub
from toolkit.hub_files import HubFiles, chosen_splits, hub_files, unreadable
from toolkit.local_paths import DATA_FILES, data_suffix, missing_data
from toolkit.regular_files import not_regular

ROWS = 1_000  # that are in the memory at once
MOST_COLUMNS = 10_000  # datasets needs minutes for ten times as many
MOST_EMPTY = 10**6
SAVED = "saved"  # the kind of a folder that Dataset.save_to_disk wrote
BINARY = ("parquet", SAVED)
# Words in the names of files and folders that tell the split, and names of splits that mean the same.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
GUESSED = (
    "warning: datasets reads these .{kind} files of the hub and guesses types: 0042 may become 42, and a date a time; "
    "for the text as it is, download the files and give their folder as data.dataset"
)


class Rows(DatasetDict):
    """Rows by split, with lines for the log that tell which file is used for what, and the keys that turns of chats have.

    counts: the number of rows of each file that is used. digests: of the files that have rows.
    """

    notes: tuple[str, ...] = ()
    keys_of_turns: frozenset[str] = frozenset()
    counts: dict[str, int]
    digests: dict[str, str]


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
        check_regular(path)
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
        raise ConfigError(f"data.dataset: expected a file or a folder, got {dataset}, which is {not_regular(path)}")
    return None


def data_files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder by name, without hidden ones; raise ConfigError if they are of several kinds."""
    inside = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if data_suffix(file.name) and file.name not in METADATA and not hidden and not file.is_dir():
            inside.append(file)
    seen: dict[tuple[int, int], Path] = {}
    for file in inside:
        check_regular(file)
        found = file.stat()
        if (first := seen.setdefault((found.st_dev, found.st_ino), file)) != file:
            raise ConfigError(
                f"data.dataset: expected different files in {folder}, got {first.name} and {file.name}, which are one file: "
                "what is held out of one would be trained on in the other"
            )
    kinds = sorted({data_suffix(p.name) or "" for p in inside})
    if len({DATA_FILES[kind] for kind in kinds}) != 1:
        mixture = f"a mixture of {', '.join(kinds)}" if kinds else "none"
        one_of = ", ".join(DATA_FILES)
        raise ConfigError(f"data.dataset: expected files of one kind ({one_of}) in {folder}, got {mixture}")
    return inside


def check_regular(path: Path) -> None:
    """Raise ConfigError unless a path, or what a link leads to, is a regular file that can be read to its end."""
    if problem := not_regular(path):
        raise ConfigError(f"data.dataset: expected a file, got {path}, which is {problem}")


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


class Unpacked(gzip.GzipFile):
    """A .gz file that raises ValueError if it holds far more than data that compresses: 256 MiB, and 100 times its size."""

    def read1(self, size: int = -1) -> bytes:
        block, most = super().read1(size), max(2**28, 100 * os.path.getsize(str(self.name)))
        if self.tell() > most:
            raise ValueError(f"expected at most {most:,} bytes when unpacked, or 100 times its size, got more")
        return block


def _open_text(name: str, newline: str | None) -> IO[str]:
    if name.lower().endswith(".gz"):
        return io.TextIOWrapper(Unpacked(name), encoding="utf-8-sig", newline=newline)
    return open(name, encoding="utf-8-sig", newline=newline)


def check_empty(lines: int) -> None:
    """Raise ValueError if a file has too many empty lines: a few kilobytes of .gz may hold them for minutes."""
    if lines > MOST_EMPTY:
        raise ValueError(f"expected rows, got more than {MOST_EMPTY:,} empty lines")


def _filled_lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    empty = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line
        else:
            check_empty(empty := empty + 1)


def read_csv(name: str) -> Iterator[list[str]]:
    """Yield the names of the columns of a .csv or .tsv, and then the cells of each row as text. Raise ValueError."""
    csv.field_size_limit(2**31 - 1)  # characters in a cell; Python's own limit is 131,072
    with _open_text(name, "") as file:
        reader = csv.reader(file, delimiter="\t" if ".tsv" in name.lower()[-7:] else ",", strict=True)
        try:
            header = [cell or f"unnamed {i}" for i, cell in enumerate(next(reader, ()), 1)]
            if len(header) > MOST_COLUMNS:
                raise ValueError(f"expected at most {MOST_COLUMNS:,} columns, got {len(header):,}")
            for twice in [cell for cell in header if header.count(cell) > 1][:1]:
                raise ValueError(f"two columns have the name {twice!r}")
            yield header
            empty = 0
            for cells in reader:
                if len(cells) == len(header):
                    yield cells
                elif not cells:
                    check_empty(empty := empty + 1)
                else:
                    cause = f"expected {counted(len(header), 'cell')} as in the first line, got {len(cells)}"
                    raise ValueError(f"line {reader.line_num}: {cause}")
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def read_json(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl (an object per line), or of a .json that is a list or a single object. Raise ValueError.

    A text in a list is a row with the column text.
    """
    with _open_text(name, "\n") as file:
        lines = _filled_lines(file)
        number, line = next(lines, (0, ""))
        rows: Iterable[tuple[int, Any]]
        row_name = "entry"
        if line.lstrip().startswith("["):
            file.seek(0)
            rows = strict_json.entries(file.read())
        elif ".json" in name.lower()[-8:] and line.strip() == "{":
            file.seek(0)
            rows = [(1, strict_json.decode(file.read()))]
        else:
            first = [(number, line)] if line else []
            rows = ((n, strict_json.decode(text, f"line {n}: ")) for n, text in itertools.chain(first, lines))
            row_name = "line"
        for number, row in rows:
            if isinstance(row, str) and row_name == "entry":
                row = {"text": row}
            if not isinstance(row, dict):
                raise ValueError(f"{row_name} {number}: expected an object, got {json.dumps(row)[:60]}")
            yield row


def scan(name: str, kind: str) -> Contents:
    """Return what a file holds; raise ValueError or what its reader raises if it cannot be read to its end."""
    if kind == "parquet":
        with open(name, "rb") as file:  # not its name, in which Arrow and fsspec look for addresses
            found = pq.read_metadata(file)
        return Contents(found.num_rows, dict.fromkeys(found.schema.to_arrow_schema().names, True))
    if kind == SAVED:
        with limited_memory(name), pa.OSFile(name) as source, pa.ipc.open_stream(source) as stream:
            rows = unpacked = 0
            for batch in stream:
                batch.validate(full=True)  # its offsets may lead anywhere in the memory
                rows, unpacked = rows + len(batch), unpacked + batch.nbytes
                check_unpacked(name, unpacked)
            return Contents(rows, dict.fromkeys(stream.schema.names, True))
    if kind == "text":
        with open(name, encoding="utf-8-sig") as file:
            return Contents(sum(1 for _ in file), {"text": True})
    if kind == "csv":
        header, *_ = [*itertools.islice(reader := read_csv(name), 1)]
        rows = sum(1 for _ in reader)
        return Contents(rows, dict.fromkeys(header, True) if rows else {})
    return _scan_json(name)


def check_unpacked(name: str, unpacked: int) -> None:
    """Raise ValueError if a binary file has given more bytes than any honest one of its size: what it says may be a lie."""
    if unpacked > (most := max(2**28, 1000 * os.path.getsize(name))):
        raise ValueError(f"expected at most {most:,} bytes when unpacked, or 1,000 times its size, got more")


def _scan_json(name: str) -> Contents:
    rows = 0
    columns: dict[str, bool] = {}
    keys: set[str] = set()
    for row in read_json(name):
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


def digest_of(name: str, kind: str) -> str:
    """Return a hash of a file's bytes, of its kind and of the sources that read it, as a key for what is kept of it.

    Raise ConfigError if it begins unlike a file of its kind.
    """
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in (__file__, strict_json.__file__)))
    digest.update(f"{kind} {data_suffix(name)} ".encode())
    with naming(name):
        if os.path.getsize(name):  # a file of the system may say 0, and then wait without end for more
            if problem := not_parquet(name) if kind == "parquet" else kind != SAVED and not_utf8(name, whole=False):
                raise ValueError(problem)
            with open(name, "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def limited_memory(name: str) -> Iterator[None]:
    """Have allocations fail that no honest file of this size needs: the sizes that a binary file tells may be lies.

    Only Linux keeps to it.
    """
    if sys.platform != "linux":
        yield
        return
    import resource  # Windows has no such module

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limits = [taken + 2**30 + 20 * os.path.getsize(name), *(n for n in (soft, hard) if n != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def footer_crashes(file: IO[bytes], size: int) -> bool:
    """Return whether a footer ends the process that reads it, as a deeply nested schema does in some versions of pyarrow.

    Only a footer of over 100,000 bytes is read in a child, which takes half a second: a smaller one cannot be so deep.
    """
    file.seek(max(0, size - 8))
    if int.from_bytes(file.read(4), "little") < 100_000:
        return False
    read = "import sys; sys.path[:] = sys.argv[2:]; import pyarrow.parquet as pq\ntry: pq.read_metadata(open(sys.argv[1], 'rb'))"
    command = [sys.executable, "-I", "-c", f"{read}\nexcept Exception: pass", os.path.abspath(file.name), *sys.path]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode != 0


def not_parquet(name: str) -> str | None:
    """Return why a .parquet file is not read: it is another kind of file, or repeats one row without end; or None.

    A few kilobytes of parquet may hold a row a thousand million times.
    """
    with open(name, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) != b"PAR1":
            return "it is not a parquet file"
        if footer_crashes(file, size):
            return "reading its footer ends the process that reads it"
        found = pq.read_metadata(file)
    unpacked = sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
    if found.num_rows > size or unpacked > 1000 * size:
        return f"{found.num_rows:,} rows, {unpacked:,} bytes when unpacked, in a file of {size:,} bytes"
    if found.num_columns > MOST_COLUMNS:
        return f"expected at most {MOST_COLUMNS:,} columns, got {found.num_columns:,}"
    return None


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Have what readers raise about a file become a ConfigError that names it."""
    try:
        yield
    except (ValueError, OSError, EOFError, MemoryError, zlib.error, pa.ArrowException) as error:
        known = isinstance(error, ValueError) and not isinstance(error, (UnicodeError, pa.ArrowException))
        lines = str(error).splitlines() or [""]
        cause = lines[0] if known else f"{type(error).__name__}: {lines[0]}"
        raise ConfigError(f"data.dataset: cannot read {name}: {cause[:300]}") from None


def checked(name: str, kind: str) -> Contents:
    """Return what a file holds; raise ConfigError, which names the file and, where it can, the line."""
    with naming(name):
        try:
            return scan(name, kind) if os.path.getsize(name) else Contents(0, {})
        except UnicodeDecodeError as error:
            raise ValueError(str(error) if kind in BINARY else not_utf8(name) or str(error)) from None


# ------------------------------------------------------------------------------------------------ rows


def kept(name: str, make: Callable[[Path], object]) -> Path:
    """Return a file among those that are kept of data read before, and make it if it is not there.

    make: writes the file of the path that it is given. The name is the file's key.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE, "rows", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            make(Path(folder, name))
            os.replace(Path(folder, name), path)  # whole, or not there
    return path


def contents_of(name: str, kind: str, digest: str) -> Contents:
    """Return what a file of this digest holds, which an earlier run may have found; raise ConfigError."""

    def make(path: Path) -> None:
        contents = checked(name, kind)
        path.write_text(json.dumps([contents.rows, contents.columns, sorted(contents.keys)]), encoding="ascii")

    rows, columns, keys = json.loads(kept(f"{digest[:32]}.json", make).read_text(encoding="ascii"))
    return Contents(rows, columns, frozenset(keys))


def _cell(row: dict[str, Any], number: int, column: str, text: bool) -> Any:
    value = row.get(column)
    if text or value is None:
        return value
    becomes_text = column in IN_TEXTS and isinstance(value, (list, dict))
    try:
        return {JSON_CELL: strict_json.dumps(value, rounded=not becomes_text)}
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def tables(name: str, kind: str, columns: dict[str, bool], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of a file of text, csv or json, some at a time, with all columns of a schema."""
    rows: Iterator[Any]
    if kind == "csv":
        header, *_ = [*itertools.islice(rows := read_csv(name), 1)]
    elif kind == "json":
        rows = read_json(name)
    else:
        rows = iter(_open_text(name, None))
    done = 0
    while part := [*itertools.islice(rows, ROWS)]:
        if kind == "csv":
            cells = {
                key: [cell or None for cell in column]
                for key, column in zip(header, zip(*part, strict=True), strict=True)
            }
        elif kind == "json":
            numbered = [*enumerate(part, done + 1)]
            with naming(name):
                cells = {key: [_cell(row, n, key, text) for n, row in numbered] for key, text in columns.items()}
        else:
            cells = {"text": part}
        yield pa.Table.from_pydict({key: cells.get(key, [None] * len(part)) for key in columns}, schema)
        done += len(part)


def _binary_tables(name: str, kind: str) -> Iterator[pa.Table]:
    """Yield the rows of a parquet file or of one that datasets saved, some at a time, without its own metadata.

    Metadata may say that a column holds pictures; datasets would then open the files or addresses that its rows name.
    """
    with open(name, "rb") as file, limited_memory(name):
        batches = pq.ParquetFile(file).iter_batches(10 * ROWS) if kind == "parquet" else pa.ipc.open_stream(file)
        unpacked = 0
        for batch in batches:
            check_unpacked(name, unpacked := unpacked + batch.nbytes)
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def read_files(files: dict[str, str], kind: str, columns: dict[str, bool]) -> Dataset:
    """Return the rows of files of one kind, one file after another.

    files: their names, each with its digest. columns: those of all files, each with whether it holds texts only; other
    values become cells of JSON.
    """
    string = datasets.Value("string")
    features = datasets.Features({name: string if text else {JSON_CELL: string} for name, text in columns.items()})

    def make(path: Path) -> None:
        parts = (
            (tables(name, kind, columns, features.arrow_schema) for name in files)
            if kind not in BINARY
            else (_binary_tables(name, kind) for name in files)
        )
        write_arrow(path, itertools.chain.from_iterable(parts))

    told = json.dumps([kind, list(files.values()), columns])
    key = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    rows = Dataset.from_file(str(kept(f"{key}.arrow", make)))
    rows._fingerprint = key
    return rows


def write_arrow(path: Path, parts: Iterator[pa.Table]) -> None:
    """Write tables one after another; all get the columns of the first one, in its order, and its types."""
    if (first := next(parts, None)) is None:
        raise ValueError("it has no rows")
    features = datasets.Features.from_arrow_schema(first.schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as stream:
        for part in itertools.chain([first], parts):
            stream.write_table(table_cast(part, features.arrow_schema))


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


def plain(split: Dataset) -> Dataset:
    """Return rows without the features that datasets gave them.

    Of a column of pictures it would open the files, or the addresses on any machine, that the rows name.
    """
    return Dataset(split.data.replace_schema_metadata(None), fingerprint=split._fingerprint)


def hub_rows(data: Source) -> Rows:
    """Return the rows of a data set of the hub."""
    with asking_hub(data.dataset, "dataset"):
        found = hub_files(data)
        if isinstance(found, datasets.DatasetBuilder):
            found.download_and_prepare()
        loaded: Any = found.splits if isinstance(found, HubFiles) else found.as_dataset()
    chosen, notes = chosen_splits(loaded, data)
    if not isinstance(found, HubFiles) and not found.config.data_files and data.dataset_config is None:
        name = found.config.name  # out of the hub's reach datasets takes the latest of those that its cache has
        notes += (f"data.dataset_config is null: datasets' cache has {name} of {data.dataset}, which is read",)
    if isinstance(found, HubFiles):
        rows = rows_of_files(
            found.kind, {split: {name: [name] for name in names} for split, names in chosen.items()}, data
        )
        rows.notes = (*found.notes, *notes, *copy_lines(rows.digests))
        return rows
    if (kind := chosen["train"].info.builder_name) in ("csv", "json"):
        notes += (GUESSED.format(kind=kind),)
    rows = Rows({split: plain(part) for split, part in chosen.items()})
    rows.notes = notes
    return rows


def rows_of_files(kind: str, chosen: dict[str, dict[str, list[str]]], data: Source) -> Rows:
    """Return the rows of files of one kind. chosen: for each split the names of what it has, each with its files."""
    parts = [*itertools.chain.from_iterable(files for named in chosen.values() for files in named.values())]
    digests = {file: digest_of(file, kind) for file in parts}
    found = {file: contents_of(file, kind, digest) for file, digest in digests.items()}
    columns = columns_of_all(found, data)
    rows = Rows()
    rows.counts, rows.digests = {}, {}
    for split, named in chosen.items():
        filled = {file: digests[file] for file in itertools.chain(*named.values()) if found[file].rows}
        if not filled:
            raise ConfigError(f"data.dataset: {data.dataset} has no rows for {split}")
        rows[split] = read_files(filled, kind, columns)
        rows.digests |= filled
        rows.counts |= {name: sum(found[file].rows for file in files) for name, files in named.items()}
    rows.keys_of_turns = frozenset().union(*(contents.keys for contents in found.values()))
    return rows


def local_rows(kind: str, splits: dict[str, list[str]], data: Source) -> Rows:
    """Return the rows of local files, with a line on each file of a folder that has more than one."""
    chosen, unused = chosen_files(splits, data)
    parts = {
        split: {name: saved_files(Path(name)) if kind == SAVED else [name] for name in names}
        for split, names in chosen.items()
    }
    rows = rows_of_files(kind, parts, data)
    if len(rows.counts) + len(unused) > 1:
        rows.notes = tuple(file_lines(chosen, unused, rows.counts, Path(data.dataset)))
    rows.notes += tuple(copy_lines(rows.digests, Path(data.dataset)))
    if Path(data.dataset).is_dir():
        files = itertools.chain.from_iterable(files for named in parts.values() for files in named.values())
        rows.notes += tuple(link_lines(files, Path(data.dataset)))
    return rows


def saved_files(folder: Path) -> list[str]:
    """Return the data files that Dataset.save_to_disk wrote; raise ConfigError unless state.json names some, each once.

    Nothing else of what the folder says is used.
    """
    path, state = folder / "state.json", None
    with naming(str(path)):
        check_regular(path)
        if path.stat().st_size > 2**24:
            raise ValueError(f"expected at most {2**24:,} bytes")
        state = strict_json.decode(path.read_text(encoding="utf-8"))
    named = state.get("_data_files") if isinstance(state, dict) else None
    listed = named if isinstance(named, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    sound = all(isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in names)
    if not names or not sound or len(set(names)) < len(names) or any((folder / n).is_symlink() for n in names):
        raise ConfigError(f"data.dataset: {path}: expected the names of .arrow files beside it in _data_files")
    if state.get("_indices_data_files"):
        raise ConfigError(f"data.dataset: {path}: expected no _indices_data_files; save the rows again, flattened")
    return [str(folder / name) for name in names]


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
