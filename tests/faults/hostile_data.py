"""Data that a stranger could send: files and folders for data.dataset."""

import csv
import gzip
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.adversary import CODE, Attack, Ground, train

Build = Callable[[Path, Ground], Attack]
FINE = (0, 1, 2)  # the content is odd, but may be text to learn from
CUT = "nested too deeply"
QUICK = ("--max_steps", 1, "--max_eval_samples", 1, "--compute_dtype", "float32", "--gradient_accumulation_steps", 1)
PROSE = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
ESCAPES = "\x1b]52;c;cm0gLXJmIH4=\x07\x1b[2J\x1b[1;1Hall is well\x9b31m\u202e"


def data(
    name: str, content: bytes | str | Callable[[Path], object], says: str = r"data\.", **keywords: object
) -> Build:
    """Return a function that writes a data file, given as its content or as a function that writes it, and trains on it."""
    flags = keywords.pop("flags", ())

    def build(folder: Path, ground: Ground) -> Attack:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        quick = QUICK if keywords.get("codes") == (0,) else ()
        return train("--dataset", path, *quick, *flags, says=says, **keywords)

    return build


def folder_of(make: Callable[[Path], object], says: str = r"data\.", **keywords: object) -> Build:
    """Return a function that fills a folder and trains on it."""

    def build(folder: Path, ground: Ground) -> Attack:
        (folder / "data").mkdir()
        make(folder / "data")
        quick = QUICK if keywords.get("codes") == (0,) else ()
        return train("--dataset", folder / "data", *quick, says=says, **keywords)

    return build


def rows(*items: object) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def chat(content: object, times: int = 30) -> str:
    turns = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": content}]
    return rows(*[{"messages": turns}] * times)


def table(**columns: object) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


class Evil:
    """Runs CODE where it is unpickled."""

    def __reduce__(self) -> tuple:
        return exec, (CODE,)


def repeated(path: Path) -> None:
    """20 GB of text in two megabytes: 20 million rows, each the only entry of a dictionary."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000_000, np.int8)), pa.array(["x" * 1000])).cast(
        pa.dictionary(pa.int8(), pa.string())
    )
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20_000_000, store_schema=False, compression="zstd")


def more_rows_than_bytes(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([""] * 2_000_000)}), path, store_schema=False)


def one_long_row(path: Path) -> None:
    """A gigabyte of one letter in a few kilobytes."""
    pq.write_table(pa.table({"text": ["x" * 2**28]}), path, compression="zstd", use_dictionary=False)


def number(value: int) -> bytes:
    """Return an integer as Thrift's compact protocol writes it, without a sign."""
    return bytes([value & 127 | (128 if value > 127 else 0)]) + (number(value >> 7) if value > 127 else b"")


def element(name: bytes, children: int) -> bytes:
    """Return one group of a parquet schema; a leaf if it has no children."""
    if children:
        return b"\x35\x02\x18" + number(len(name)) + name + b"\x15" + number(2 * children) + b"\0"
    return b"\x15\x02\x25\x02\x18" + number(len(name)) + name + b"\0"


def deep_schema(path: Path) -> None:
    """A footer whose groups stand in each other 200,000 levels deep."""
    groups = element(b"schema", 1) + element(b"g", 1) * 200_000 + element(b"text", 0)
    footer = b"\x15\x02\x19\xfc" + number(200_002) + groups + b"\x16\0\x19\x0c\0"
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")


def lying_footer(path: Path) -> None:
    """A footer that says that it has two thousand million bytes."""
    path.write_bytes(b"PAR1" + b"x" * 100 + struct.pack("<I", 2**31 - 1) + b"PAR1")


def damaged(path: Path) -> None:
    """A sound parquet file with every hundredth byte after the head changed."""
    pq.write_table(pa.table({"text": [f"{PROSE} {i}" for i in range(400)]}), path)
    content, draw = bytearray(path.read_bytes()), random.Random(3)
    for place in range(4, len(content) - 8, 100):
        content[place] = draw.randrange(256)
    path.write_bytes(content)


def not_utf8_inside(path: Path) -> None:
    texts = pa.StringArray.from_buffers(3, *pa.array([b"\xff\xfe\x1b[2J" * 20] * 3).buffers()[1:])
    pq.write_table(pa.table({"text": texts}), path)


def of_huggingface(path: Path) -> None:
    """Metadata from which datasets makes the features: a class of that name, with its arguments."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "more": {"_type": "os.system", "command": CODE}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pa.table({"text": [PROSE], "more": ["a"]}).replace_schema_metadata(metadata), path)


def of_pandas(path: Path) -> None:
    metadata = {b"pandas": b"[" * 100_000, b"huggingface": b"{" * 100_000}
    pq.write_table(pa.table({"text": [PROSE]}).replace_schema_metadata(metadata), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.txt", "x" * 10**7)


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, target in (("link", "/etc"), ("a.txt", None)):
            member = tarfile.TarInfo(f"../../{name}")
            member.type, member.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
            archive.addfile(member)


def pipe_inside(folder: Path) -> None:
    (folder / "a.txt").write_text(PROSE)
    os.mkfifo(folder / "b.txt")


def loops(folder: Path) -> None:
    (folder / "again").symlink_to(folder)
    (folder / "a.txt").symlink_to("a.txt")


def code_beside(folder: Path) -> None:
    """The script of a data set, which older versions of datasets ran; it has the folder's name."""
    (folder / "a.txt").write_text(PROSE * 30)
    for name in ("data.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(CODE)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n")


def odd_names(folder: Path) -> None:
    for name in (f"train-{ESCAPES[1:20]}.jsonl".replace("/", ""), "validation-\n.jsonl", "test-[*]?.jsonl"):
        (folder / name).write_text(rows(*[{"text": PROSE}] * 20))


def many_columns(path: Path) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[f"c{i}" for i in range(100_000)], ["x"] * 100_000])


def given(make: Callable[[Path], object]) -> Build:
    """Return a function that makes something that is no data and names it as data.dataset."""

    def build(folder: Path, ground: Ground) -> Attack:
        make(folder / "data.txt")
        return train("--dataset", folder / "data.txt", says=r"data\.dataset: ")

    return build


def depth(opening: Iterable[str], levels: int, closing: str = "") -> str:
    return "".join(opening) * levels + "1" + closing * levels + "\n"


def copy_of_rows(folder: Path, ground: Ground) -> Attack:
    """Not hostile at all: what a terminal wrote, with more brackets in its texts than any guard of depth allows."""
    texts = ["\x1b[31m" * 4100, "if(x){" * 4100]
    (folder / "a.jsonl").write_text(rows(*[{"text": text} for text in texts]))
    return train(
        "--dataset", folder / "a.jsonl", *QUICK, "--max_length", 512, codes=(0,), says="adapter, curves and log are in"
    )


def linked(name: str, target: str) -> Callable[[Path], object]:
    """Return a function that puts a link beside a sound file of the same kind."""

    def make(folder: Path) -> None:
        (folder / f"sound{Path(name).suffix}").write_text(f"text\n{PROSE * 9}\n{PROSE * 9}\n")
        (folder.parent / "secret.txt").write_text("the user's own words. " * 20)
        (folder / name).symlink_to(target)

    return make


def holes(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"text\n")
        file.truncate(2**40)


def one_line_zipped(path: Path) -> None:
    """A line of 900 million letters in a megabyte."""
    with gzip.open(path, "wb", 9) as file:
        file.write(b'{"text": "')
        for _ in range(900):
            file.write(b"x" * 10**6)


def chained(folder: Path) -> None:
    """Names that fsspec reads as an address behind an archive, and that glob reads as other files."""
    (folder / "elsewhere.jsonl").write_text("no JSON")
    for name in ("zip:a::elsewhere.jsonl", "[e]*.jsonl", "http:x::y.jsonl"):
        (folder / name).write_text(rows(*[{"text": PROSE}] * 20))
    (folder / "elsewhere.jsonl").unlink()


def saved(change: Callable[[Path], object] = lambda folder: None, **columns: object) -> Callable[[Path], object]:
    """Return a function that writes a folder as Dataset.save_to_disk does, and then changes it."""

    def make(folder: Path) -> None:
        table = pa.table({"text": [f"{PROSE} {i}" for i in range(60)], **{k: [v] * 60 for k, v in columns.items()}})
        datasets.Dataset(table).save_to_disk(folder)
        change(folder)

    return make


def arrow_of(write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a change of a saved folder: its data file is written anew."""
    return lambda folder: write(folder / "data-00000-of-00001.arrow")


def wild_offsets(path: Path) -> None:
    """Texts whose places lie far outside of the file."""
    offsets = pa.array([0, 2**30, 5], pa.int32()).buffers()[1]  # Arrow itself looks only at the last one
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"short"))
    with pa.ipc.new_stream(path, pa.schema({"text": pa.string()})) as stream:
        stream.write_batch(pa.record_batch([texts], ["text"]))


def packed_arrow(path: Path) -> None:
    """Eight gigabytes in a file of less than a megabyte."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    batch = pa.record_batch([pa.array(["x" * 2**29])], ["text"])
    with pa.ipc.new_stream(path, batch.schema, options=options) as stream:
        for _ in range(16):
            stream.write_batch(batch)


def pictures(path: Path) -> None:
    """A column that datasets takes for pictures, at addresses of another machine."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "messages": {"_type": "Image"}, "a": {"_type": "Audio"}}
    place = pa.array([{"bytes": None, "path": "http://127.0.0.1:9/x.png"}] * 60)
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"text": [f"{PROSE} {i}" for i in range(60)], "messages": place, "a": place})
    table = table.replace_schema_metadata(metadata)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


def extension(name: bytes, content: bytes) -> Callable[[Path], object]:
    """Return a function that writes a column of an extension type, whose class may unpickle its metadata."""

    def write(path: Path) -> None:
        kind = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": content}
        schema = pa.schema([pa.field("text", pa.string()), pa.field("more", pa.binary(), metadata=kind)])
        table = pa.table([[f"{PROSE} {i}" for i in range(60)], [content] * 60], schema=schema)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
            return
        with pa.ipc.new_stream(path, schema) as stream:
            stream.write_table(table)

    return write


def state(**changes: object) -> Callable[[Path], object]:
    """Return a change of a saved folder's state.json."""

    def change(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def wrote(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def wide_and_deep(path: Path) -> None:
    kind = pa.struct({f"k{i}": pa.struct({f"m{j}": pa.list_(pa.int8()) for j in range(200)}) for i in range(200)})
    pq.write_table(pa.table({"text": [PROSE], "more": pa.array([None], kind)}), path)


def calls(arguments: str) -> str:
    """Return a chat with a tool call whose arguments are written like this."""
    turn = f'{{"role": "assistant", "content": "b", "tool_calls": [{{"name": "f", "arguments": {arguments}}}]}}'
    return f'{{"messages": [{{"role": "user", "content": "a"}}, {turn}]}}\n'


ALL = "adapter, curves and log are in"
PICKLED = pickle.dumps(Evil())
INFO = json.dumps({"builder_name": "os.system", "features": {"text": {"_type": "Image"}}, "splits": 5})

ATTACKS: dict[str, Build] = {
    "link to a file of the system": folder_of(linked("a.csv", "/proc/kmsg"), "a.csv, which is /proc/kmsg, a file of"),
    "link to an endless file": folder_of(
        linked("a.csv", "/proc/self/pagemap"), "a.csv, which is /proc/.*pagemap, a file of"
    ),
    "file of the system": given(lambda path: path.symlink_to("/proc/self/environ")),
    "link out of the folder": folder_of(
        linked("a.txt", "../secret.txt"), "warning: a.txt is a link to .*secret.txt, outside of", codes=(0,)
    ),
    "link within the folder": folder_of(linked("a.txt", "sound.txt"), "a.txt and sound.txt, which are one file"),
    "link to a folder": folder_of(linked("a.txt", "/etc"), "not used: a.txt, a link to a folder", codes=(0,)),
    "a terabyte of nothing": data("a.csv", holes, "almost nothing but a hole"),
    "one long line, zipped": data("a.jsonl.gz", one_line_zipped, "bytes when unpacked"),
    "empty lines, zipped": data("a.csv.gz", gzip.compress(b"text\n" + b"\n" * 2**27), "1,000,000 empty lines"),
    "names that look like addresses": folder_of(chained, ALL, codes=(0,)),
    "not a number in a call": data("a.jsonl", calls('{"x": NaN}'), "line 1: NaN is no JSON"),
    "infinity in a call's text": data(
        "a.jsonl", calls(r'"{\"x\": -Infinity}"'), "row 1: .*turn 2: .*-Infinity is no JSON"
    ),
    "number beyond all bounds": data("a.jsonl", calls('{"x": 1e400}'), "line 1: the number 1e400 is too large"),
    "number beyond all bounds in a text": data("a.jsonl", calls(r'"{\"x\": 1e400}"'), "row 1: .*turn 2: .*too large"),
    "name written twice in a call": data("a.jsonl", calls('{"x": 1, "x": 2}'), "line 1: the key 'x' stands twice"),
    "name written twice in a call's text": data(
        "a.jsonl", calls(r'"{\"x\": 1, \"x\": 2}"'), "row 1: .*'x' stands twice"
    ),
    "name written twice in a list": data(
        "a.json", '[{"text": "a"},\n{"text": "b", "text": "c"}]', "entry 2: the key 'text'"
    ),
    "half a million keys and one twice": data(
        "a.jsonl", "{" + "".join(f'"k{i}": 1, ' for i in range(500_000)) + '"k0": 2}\n', "the key 'k0' stands twice"
    ),
    "parquet with pictures elsewhere": data(
        "a.parquet", pictures, ALL, codes=(0,), flags=("--text_column", "text", "--format", "text")
    ),
    "parquet with pictures as chats": data("a.parquet", pictures, "row 1: expected a list of turns"),
    "parquet with a pickled type": data("a.parquet", extension(b"arrow.py_extension_type", PICKLED), ALL, codes=(0,)),
    "parquet with an array type": data(
        "a.parquet", extension(b"datasets.features.features.Array2DExtensionType", PICKLED), "", codes=FINE
    ),
    "parquet of forty thousand columns": data("a.parquet", wide_and_deep, "at most 10,000 columns, got 40,001"),
    "saved folder, sound": folder_of(saved(), ALL, codes=(0,)),
    "saved folder with a strange description": folder_of(saved(wrote("dataset_info.json", INFO)), ALL, codes=(0,)),
    "saved folder with a deep description": folder_of(saved(wrote("dataset_info.json", "[" * 10**6)), ALL, codes=(0,)),
    "saved folder with a deep state": folder_of(
        saved(wrote("state.json", "[" * 10**6)), "state.json: .*nested too deeply"
    ),
    "saved folder of another format": folder_of(
        saved(state(_format_type="os", _format_kwargs={"a": CODE}, _output_all_columns=True)), ALL, codes=(0,)
    ),
    "saved folder with data elsewhere": folder_of(
        saved(state(_data_files=[{"filename": "../../secret.arrow"}])), "expected the names of .arrow files beside it"
    ),
    "saved folder with old indices": folder_of(
        saved(state(_indices_data_files=[{"filename": "x"}])), "_indices_data_files"
    ),
    "saved folder with a link to the system": folder_of(
        saved(lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").symlink_to("/proc/kmsg"))),
        "kmsg",
    ),
    "saved folder with pictures elsewhere": folder_of(saved(arrow_of(pictures)), "row 1: expected a list of turns"),
    "saved folder with a pickled type": folder_of(
        saved(arrow_of(extension(b"arrow.py_extension_type", PICKLED))), ALL, codes=(0,)
    ),
    "saved folder with wild places": folder_of(saved(arrow_of(wild_offsets)), "cannot read .*arrow: .*[Oo]ffset"),
    "saved folder that unpacks without end": folder_of(saved(arrow_of(packed_arrow)), "cannot read .*arrow: "),
    "saved folder of bytes": folder_of(saved(arrow_of(lambda path: path.write_bytes(os.urandom(4096)))), r"\.arrow: "),
    "deep objects": data("a.jsonl", depth('{"a":', 50_000, "}"), CUT),
    "deep lists": data("a.json", depth("[", 200_000, "]"), CUT),
    "depth beside empty lists": data("a.jsonl", depth('{"a":[],"b":', 50_000, "}"), CUT),
    "depth after closing brackets": data(
        "a.jsonl", "]" * 60_000 + "\n" + depth("[[],", 50_000, "]"), "line 1: no valid JSON: Expecting value"
    ),
    "depth after an open quote": data(
        "a.jsonl",
        '{"text": "\n' + depth('{"a":[],"b":', 50_000, "}"),
        "line 1: no valid JSON: Invalid control character",
    ),
    "depth after a backslash": data("a.jsonl", '{"text": "\\\\"}\n' + depth('{"a":"\\\\","b":', 50_000, "}"), CUT),
    "depth in a chat": data("a.jsonl", chat("x") + '{"messages": ' + depth('[{"content":', 30_000)[:-1] + "\n", CUT),
    "depth below the limit": data("a.jsonl", '{"text": "a", "more": ' + depth("[", 190, "]")[:-1] + "}\n"),
    "brackets in texts": copy_of_rows,
    "escapes in a column": data("a.jsonl", rows({ESCAPES: "x"}), r"no column 'text' in .*x1b\]52"),
    "escapes in a row": data("a.jsonl", rows(*[{"text": ESCAPES + PROSE}] * 30), r"first block: .*x1b\]52", codes=(0,)),
    "escapes in a chat": data(
        "a.jsonl", chat(ESCAPES + "Nay."), "first block: ", codes=(0,), flags=("--packing", "false")
    ),
    "escapes in a role": data("a.jsonl", rows({"messages": [{"role": ESCAPES, "content": "x"}]}), r"row 1: .*x1b"),
    "escapes in csv columns": data("a.csv", f"{ESCAPES},b\n1,2\n", r"no column 'text' in .*x1b"),
    "escapes in file names": folder_of(odd_names, "", codes=FINE),
    "turns that are no turns": data("a.jsonl", rows({"messages": [[[]]]}), r"row 1|turns|cannot read"),
    "content of another type": data("a.jsonl", chat({"a": [1] * 1000}), r"turn 2: expected a text"),
    "half a surrogate": data("a.jsonl", '{"text": "\\ud800 ' + PROSE + '"}\n', "", codes=FINE),
    "columns of an agent's trace": data(
        "a.jsonl", rows({"type": "session_meta", "payload": {"id": "x"}, "timestamp": "2020"}), r"data\."
    ),
    "ten thousand keys": data("a.jsonl", rows({f"k{i}": i for i in range(10_000)}), r"data\."),
    "columns that change": data(
        "a.jsonl", rows(*[{"text": "a", "b": v} for v in (1, "x", [], {}, None, {"c": [1]})]), "", codes=FINE
    ),
    "number without an end": data("a.jsonl", '{"text": 1' + "0" * 100_000 + "}\n"),
    "list that does not end": data("a.json", '[{"text": "a"}, ' * 3),
    "not a number": data("a.json", '[{"text": NaN}, {"text": -Infinity}]'),
    "key written twice": data("a.jsonl", '{"text": "a", "text": ["b"]}\n'),
    "zero bytes in csv": data("a.csv", b"text\n" + b"\0" * 10_000 + b"\n", "", codes=FINE),
    "a quote that never closes": data("a.csv", 'text\n"' + "x\n" * 100_000),
    "a hundred thousand columns": data("a.csv", many_columns, "at most 10,000 columns, got 100,000"),
    "formulas": data("a.csv", 'text\n"=cmd|\'/C calc\'!A0"\n"' + PROSE + '"\n', "", codes=FINE),
    "one huge line": data("a.txt", PROSE * 2_000, "", codes=FINE),
    "only line breaks": data("a.txt", "\n" * 300_000),
    "pickle named parquet": data("a.parquet", pickle.dumps(Evil()), "it is not a parquet file"),
    "gzip named parquet": data("a.parquet", gzip.compress(b"\0" * 10**8), "it is not a parquet file"),
    "gzip named jsonl": data("a.jsonl", gzip.compress(rows({"text": "x"}).encode() * 10**5)),
    "zip named txt": data("a.txt", zipped),
    "zip named parquet": data("a.parquet", zipped, "it is not a parquet file"),
    "tar named csv": data("a.csv", tarred),
    "parquet that repeats one row": data("a.parquet", repeated, "20,000,000 rows"),
    "parquet of more rows than bytes": data("a.parquet", more_rows_than_bytes, "2,000,000 rows"),
    "parquet of one long row": data("a.parquet", one_long_row, "bytes when unpacked"),
    "parquet of a deep schema": data("a.parquet", deep_schema, "too deeply nested|ends the process"),
    "parquet with a lying footer": data("a.parquet", lying_footer),
    "parquet, damaged": data("a.parquet", damaged, "", codes=FINE),
    "parquet of no UTF-8": data("a.parquet", not_utf8_inside, "is not UTF-8"),
    "parquet with features of its own": data("a.parquet", of_huggingface, "", codes=FINE),
    "parquet with deep metadata": data("a.parquet", of_pandas, "", codes=FINE),
    "parquet of a strange type": data("a.parquet", table(text=pa.array([[{"a": [1]}]])), r"text_column: expected text"),
    "named pipe": given(os.mkfifo),
    "link to itself": given(lambda path: path.symlink_to(path.name)),
    "device": given(lambda path: path.symlink_to("/dev/zero")),
    "pipe in a folder": folder_of(pipe_inside, r"data\.dataset: expected a file, got .*b\.txt, which is a pipe"),
    "folder of loops": folder_of(loops, r"data\.dataset: "),
    "folder with code": folder_of(code_beside, "", codes=FINE),
}
