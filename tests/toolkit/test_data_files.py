"""From files to rows: every cell is what Python's own csv and json wrote, and every file is used or named."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from config import ConfigError, DataConfig
from toolkit import data_files
from toolkit.chat_rows import value_of
from toolkit.data_files import load_rows

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"

# What readers that guess a type change: numbers, booleans, dates, words for a missing value.
LOOKS = ["0042", "4.50", "2.00", "1e5", "True", "false", "NA", "None", "null", "NaN", "inf", "-", "2021-03-01", "10:00"]
LOOKS += [
    "2021-03-01 10:00:00",
    "2021-03-01T10:00:00Z",
    "[1]",
    '{"a": 1}',
    " 7 ",
    "+1",
    "0x1f",
    "1,5",
    'a "b"',
    "a\nb",
    "a\r\nb",
]
TEXT = st.one_of(st.sampled_from(LOOKS), st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12))
VALUE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXT
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
OFTEN = tries(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path: Path | str, **keys) -> datasets.Dataset:
    return load_rows(DataConfig(dataset=str(path), **keys))["train"]


def refusal(path: Path | str, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        load_rows(DataConfig(dataset=str(path), **keys))
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def case(name: str) -> Path:
    if not (CASES / name).exists():
        pytest.skip(f"no {CASES / name}")
    return CASES / name


# ------------------------------------------------------------------------------------------------ cells


@OFTEN
@given(
    table=st.lists(st.tuples(TEXT, st.one_of(st.just(""), TEXT)), min_size=1, max_size=20),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from([".csv", ".tsv", ".csv.gz"]),
)
def test_a_cell_of_a_table_is_the_text_that_was_written(tmp_path, table, quoting, ending):
    path = tmp_path / f"a{ending}"
    opened = gzip.open if ending.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        dialect = "excel-tab" if ending == ".tsv" else "excel"
        csv.writer(file, dialect, quoting=quoting).writerows([("text", "n"), *table])
    rows = rows_of(path)
    assert list(zip(rows["text"], rows["n"], strict=True)) == [(text, n or None) for text, n in table]


@OFTEN
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), VALUE), min_size=1, max_size=12), form=st.sampled_from("lgpi")
)
def test_a_value_of_json_is_what_was_written(tmp_path, rows, form):
    """As lines, zipped lines, and as a list, also over several lines; with ASCII only or not."""
    rows = [{"text": "x"} | row for row in rows]
    path = tmp_path / {"l": "a.jsonl", "g": "a.jsonl.gz", "p": "a.json", "i": "a.json"}[form]
    if form in "pi":
        content = json.dumps(rows, indent=1 if form == "i" else None)
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if form == "g" else content.encode())
    found = rows_of(path)
    columns = {name for row in rows for name in row}
    assert set(found.column_names) == columns
    expected = [{name: row.get(name) for name in columns} for row in rows]
    assert [{name: value_of(cell) for name, cell in row.items()} for row in found] == expected


@pytest.mark.parametrize("late", ["0042", "4.50", "True", "2039-03-20", "2039-03-20 00:00:00"])
def test_text_stays_text_beyond_the_first_blocks_of_a_reader(tmp_path, late):
    """pandas infers types per 10,000 rows, Arrow per 10 MB."""
    texts = ["Say a word please, and then another one. " * 30] * 10_001 + [late] * 500
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert (tmp_path / "a.jsonl").stat().st_size > 12_000_000
    for name in ("a.csv", "a.jsonl"):
        assert rows_of(tmp_path / name)["text"][:] == texts


def test_an_empty_cell_is_null_as_in_json(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,b\nc,\nd,""\n', encoding="utf-8")
    assert rows_of(tmp_path / "a.csv")["completion"][:] == ["b", None, None]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "text,n\na,1\nb,2,3\n", "line 3: expected 2 cells as in the first line, got 3"),
        ("a.csv", "text,n\na,1\nb\n", "line 3: expected 2 cells as in the first line, got 1"),
        ("a.csv", "text,text\na,1\n", "two columns have the name 'text'"),
        ("a.csv", 'text\n"a"b\n', "line 2: "),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2: "),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', 'line 2: expected an object, got ["b"]'),
        ("a.jsonl", '{"text": NaN}\n', "line 1: NaN is no JSON"),
        ("a.json", '[{"text": "a"}, 5]', "entry 2: expected an object, got 5"),
        ("a.jsonl.gz", "no gzip", "BadGzipFile"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_its_line(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = refusal(tmp_path / name)
    assert found.startswith(f"data.dataset: cannot read {tmp_path / name}: ") and problem in found


def test_a_single_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=2), encoding="utf-8")
    assert rows_of(tmp_path / "a.json")["text"][:] == ["one"]


def test_a_list_of_texts_is_rows_of_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["one", "two"]), encoding="utf-8")
    assert rows_of(tmp_path / "a.json")["text"][:] == ["one", "two"]


def test_a_key_that_only_some_values_have_is_not_added_to_the_others(tmp_path):
    """Arrow makes one type of all mappings in a column, with null for the keys that a mapping lacks."""
    calls = [{"arguments": {"port": "Husum"}}, {"arguments": {"city": "Kiel"}}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": [call]}) + "\n" for call in calls), encoding="utf-8")
    assert [value_of(row["messages"]) for row in rows_of(path)] == [[call] for call in calls]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet", "a"])
def test_files_that_were_read_before_are_not_parsed_again(tmp_path, monkeypatch, name):
    path, rows = tmp_path / name, datasets.Dataset.from_dict({"text": [f"row {i}\n" for i in range(2500)]})
    if name == "a.txt":
        path.write_text("".join(rows["text"]), encoding="utf-8")
    elif name == "a.csv":
        rows.to_csv(path)
    else:
        {"a": rows.save_to_disk, "a.jsonl": rows.to_json, "a.parquet": rows.to_parquet}[name](path)
    first = rows_of(path)
    assert first["text"][:] == rows["text"][:]

    def again(*_, **__):
        raise AssertionError("read again")

    for reader in ("scan", "tables", "_binary_tables"):
        monkeypatch.setattr(data_files, reader, again)
    second = rows_of(path)
    assert second._fingerprint == first._fingerprint and second["text"][:] == first["text"][:]


def test_the_same_bytes_of_another_kind_are_other_rows(tmp_path):
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("text,more\tless\na,b\tc\n", encoding="utf-8")
    assert rows_of(tmp_path / "a.csv").column_names == ["text", "more\tless"]
    assert rows_of(tmp_path / "a.tsv", text_column="less").column_names == ["text,more", "less"]


# ------------------------------------------------------------------------------------------------ files of a folder


def folder_of(tmp_path: Path, **rows: int) -> Path:
    """Make a folder of .jsonl files, each with so many rows of its own name."""
    for name, count in rows.items():
        path = tmp_path / "data" / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) * 0 + (json.dumps({"text": name}) + "\n") * count, encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("files", "train", "validation", "unused"),
    [
        ({"train_part1": 3, "books": 5, "wiki": 7}, {"train_part1", "books", "wiki"}, set(), {}),
        ({"train": 3, "eval": 2}, {"train"}, {"eval"}, {}),
        ({"train": 3, "validation": 2, "test": 4}, {"train"}, {"validation"}, {"test": "its name says test"}),
        (
            {"my_training_data": 1, "latest_news": 2, "contest": 3},
            {"my_training_data", "latest_news", "contest"},
            set(),
            {},
        ),
        ({"a__train": 1, "a__dev": 2, "b__train": 3}, {"a__train", "b__train"}, {"a__dev"}, {}),
        ({"test": 3}, {"test"}, set(), {}),
        ({"notes": 3, "train_or_test": 2}, {"notes", "train_or_test"}, set(), {}),
    ],
)
def test_every_file_of_a_folder_is_used_or_named(tmp_path, files, train, validation, unused):
    folder = folder_of(tmp_path, **files)
    rows = load_rows(DataConfig(dataset=str(folder)))
    assert sorted(rows["train"]["text"]) == sorted(name for name in train for _ in range(files[name]))
    found = sorted(rows["validation"]["text"]) if "validation" in rows else []
    assert found == sorted(name for name in validation for _ in range(files[name]))
    if len(files) > 1:
        said = [f"{n}: {files[n]} row{'s'[: files[n] > 1]}, for training" for n in train]
        said += [f"{n}: {files[n]} row{'s'[: files[n] > 1]}, for validation" for n in validation]
        said += [f"{n}: not used, since {why}" for n, why in unused.items()]
        expected = [line.replace(":", ".jsonl:", 1).replace("__", "/") for line in said]
        assert sorted(rows.notes) == sorted(expected)


def test_splits_that_the_settings_name_are_used(tmp_path):
    folder = folder_of(tmp_path, train=1, test=2, notes=3)
    rows = load_rows(DataConfig(dataset=str(folder), train_split="test", validation_split="train"))
    assert (rows["train"]["text"][:], rows["validation"]["text"][:]) == (["test"] * 2, ["train"])
    assert "notes.jsonl: not used, since data.train_split is test" in rows.notes
    assert "has no split 'none'" in refusal(folder, train_split="none")


def test_many_files_are_told_by_their_use(tmp_path):
    folder = folder_of(tmp_path, **{f"part{i}": 2 for i in range(30)}, test=1)
    assert load_rows(DataConfig(dataset=str(folder))).notes == (
        "30 files, 60 rows: for training",
        "1 file: not used, since its name says test",
    )


def test_hidden_files_and_folders_are_no_data(tmp_path):
    folder = folder_of(tmp_path, words=2)
    for name in (".git/y.txt", ".ipynb_checkpoints/words.jsonl", "__MACOSX/words.jsonl", ".cache/z.csv", ".hidden.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no data", encoding="utf-8")
    assert rows_of(folder)["text"][:] == ["words"] * 2


def test_a_folder_that_datasets_saved_is_read_as_one(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["2021-03-01", "b"]})
    rows.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one")["text"][:] == ["2021-03-01", "b"]
    both = datasets.DatasetDict(train=rows, validation=rows.select([0]), test=rows.select([1]))
    both.save_to_disk(tmp_path / "dict")
    found = load_rows(DataConfig(dataset=str(tmp_path / "dict")))
    assert (found["train"]["text"][:], found["validation"]["text"][:]) == (["2021-03-01", "b"], ["2021-03-01"])
    assert "test: not used, since its name says test" in found.notes


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_of_other_columns_are_refused_by_file_and_column(tmp_path, kind):
    for name, column in (("books", "text"), ("wiki", "content")):
        table = pa.table({column: ["a", "b"]})
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            getattr(datasets.Dataset(table), {"jsonl": "to_json", "csv": "to_csv"}[kind])(path)
    problem = refusal(tmp_path)
    assert f"got none of the name 'text' in {tmp_path / f'wiki.{kind}'}, which has content" in problem


# ------------------------------------------------------------------------------------------------ inputs that failed


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("csv_number_answers_refused/labels.csv", "completion", ["2", "4"]),
        ("csv_number_answers_refused/small_zero.csv", "completion", None),
        ("json_dates_refused/dates.jsonl", "completion", None),
        ("json_dates_refused/times.jsonl", "text", None),
        ("string_view_refused/view.parquet", "text", None),
    ],
)
def test_inputs_that_were_refused_are_read_as_they_are(name, column, expected):
    path = case(name)
    found = rows_of(path)[column][:]
    if path.suffix == ".jsonl":
        expected = [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.suffix == ".csv" and expected is None:
        with open(path, encoding="utf-8", newline="") as file:
            expected = [row[column] for row in csv.DictReader(file)]
    elif expected is None:
        expected = pq.read_table(path)[column].to_pylist()
    assert found == expected


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("folder_files_ignored/fold", 3, 3),
        ("folder_files_ignored/fold5", 9, None),
        ("folder_files_ignored/fold7", 103, None),
        ("folder_hidden_and_saved/fold6", 3, None),
        ("folder_hidden_and_saved/saved", 5, None),
    ],
)
def test_folders_that_were_misread(name, train, validation):
    found = load_rows(DataConfig(dataset=str(case(name))))
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": train,
        **({"validation": validation} if validation else {}),
    }


# ------------------------------------------------------------------------------------------------ saved, archived, twice


@pytest.mark.parametrize(
    "named",
    [[], [{"filename": "../x.arrow"}], [{"filename": "pipe"}], [{"filename": "data-00000-of-00001.arrow"}] * 2, 5],
)
def test_a_saved_folder_names_files_beside_its_state(tmp_path, named):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "s")
    os.mkfifo(tmp_path / "s" / "pipe")
    path = tmp_path / "s" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"_data_files": named}), encoding="utf-8")
    with pytest.raises(ConfigError, match="expected the names of .arrow files beside it"):
        load_rows(DataConfig(dataset=str(tmp_path / "s")))


def test_a_saved_folder_is_read_as_python_whatever_its_format(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).with_format("arrow").save_to_disk(tmp_path / "s")
    assert load_rows(DataConfig(dataset=str(tmp_path / "s")))["train"][0] == {"prompt": "a", "completion": "b"}


def test_an_archive_of_almost_nothing_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    for block, problem in ((b"\n", "got more than 1,000,000 empty lines"), (b" ", "bytes when unpacked")):
        with gzip.open(path, "wb") as file:
            for _ in range(300):
                file.write(block * 2**20)
        with pytest.raises(ConfigError, match=problem):
            load_rows(DataConfig(dataset=str(path)))


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_that_stands_twice_in_a_folder_is_refused(tmp_path, link):
    """Half of a copy would be held out, and trained on as the other one."""
    (tmp_path / "b.txt").write_text("a line\n" * 9, encoding="utf-8")
    link(tmp_path / "b.txt", tmp_path / "c.txt")
    with pytest.raises(
        ConfigError, match=r"data.dataset: expected different files in .*, got b.txt and c.txt, which are one"
    ):
        load_rows(DataConfig(dataset=str(tmp_path)))


def test_copies_in_a_folder_are_told(tmp_path):
    for name, content in (
        ("a.txt", "a line\n"),
        ("b.txt", "a line\n"),
        ("c.txt", ""),
        ("d.txt", ""),
        ("e.txt", "a line\n"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
    said = (
        "warning: a.txt and b.txt have the same content (and 1 more file like this): rows held out of one are learned"
    )
    assert [line for line in load_rows(DataConfig(dataset=str(tmp_path))).notes if "warning" in line] == [
        f"{said} from the other"
    ]
    (tmp_path / "b.txt").write_text("another line\n", encoding="utf-8")
    (tmp_path / "e.txt").write_text("", encoding="utf-8")
    assert not [line for line in load_rows(DataConfig(dataset=str(tmp_path))).notes if "warning" in line]
