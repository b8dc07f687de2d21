"""Data sets of the hub, from a stand-in on this machine: .csv and .json of it are what was written, as local files are."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for data sets that lie in a folder, as owner/name/file."""

    folder: Path
    asked: list[str]

    def answer(self, code: int, content: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def entry(self, repository: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(repository).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "d" * 40}
        return {
            "type": "file",
            "path": name,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        self.asked.append("/".join(parts))
        api, parts = parts[0] == "api", parts[parts[0] == "api" :]
        repository, (verb, *rest) = self.folder.joinpath(*parts[1:3]), parts[3:] or ["info"]
        path = repository.joinpath(*rest[1:])
        if not api:
            found = path.is_file()
            content = path.read_bytes() if found else b""
            etag = hashlib.sha1(content).hexdigest()
            more = {"ETag": f'"{etag}"'} if found else {"X_Error_Code": "EntryNotFound"}
            self.answer(200 if found else 404, content, "application/octet-stream", **more)
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"]
            there = [repository / name for name in wanted if name and (repository / name).exists()]
            self.answer(200, json.dumps([self.entry(repository, one) for one in there]).encode())
        elif verb == "tree":
            inside = sorted(path.rglob("*") if "recursive=True" in self.path.title() else path.glob("*"))
            self.answer(200, json.dumps([self.entry(repository, one) for one in inside]).encode())
        else:
            told = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": [], "private": False, "tags": []}
            self.answer(200, json.dumps(told).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[str]:
    Hub.folder, Hub.asked = tmp_path / "hub", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import json, sys, time
time.sleep = lambda seconds: None  # between the tries of a hub that does not answer
sys.path.insert(0, sys.argv[1])
from config import ConfigError, DataConfig
from toolkit.chat_rows import value_of
from toolkit.data_files import load_rows, quiet_datasets
quiet_datasets()
for keys in json.loads(sys.argv[2]):
    try:
        rows = load_rows(DataConfig(**({"dataset_config": None} | keys)))
        found = {split: [{k: value_of(v) for k, v in row.items()} for row in part] for split, part in rows.items()}
        print(json.dumps([found, rows.notes]))
    except ConfigError as error:
        print(json.dumps([None, error.problems]))
"""


def read(tmp_path: Path, endpoint: str, calls: list[dict], home: str = "home", offline: bool = False) -> list[Any]:
    """Return (rows by split, notes) of each call, or (None, problems), from one process with caches of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / home)}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", READ, str(ROOT), json.dumps(calls)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls), done.stderr
    return answers


CARD = """---
configs:
- config_name: first
  default: true
  data_files:
  - {split: train, path: "data/part-*.csv"}
  - {split: test, path: data/last.csv}
- config_name: semicolons
  sep: ";"
  data_files: other/semicolons.csv
---
"""
TEXTS = ["0042", "4.50", "True", "NA", "2039-03-20", "null", "words"]


def files(tmp_path: Path) -> None:
    """Fill the hub with a data set of each kind."""
    made = {
        "a/tables/README.md": CARD,
        "a/tables/data/part-1.csv": "text,n\n" + "".join(f"{text},1\n" for text in TEXTS),
        "a/tables/data/part-2.csv": "text,n\n007,\n",
        "a/tables/data/last.csv": "text,n\nlast,1\n",
        "a/tables/other/semicolons.csv": "text;n\n0042;1\n",
        "a/chosen/README.md": CARD.replace("  default: true\n", ""),
        "a/chosen/data/part-1.csv": "text\nword\n",
        "a/chosen/data/last.csv": "text\nlast\n",
        "a/chosen/other/semicolons.csv": "text;n\n0042;1\n",
        "a/tabs/train.tsv": "text\tn\n0042\t1\n",
        "a/tabs/validation.tsv": "text\tn\n0043\t1\n",
        "a/lines/train.jsonl": "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS),
        "a/ragged/train.csv": "text,n\na,1\nb\n",
    }
    for name, content in made.items():
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    zipped = tmp_path / "hub" / "a" / "zipped" / "train.jsonl.gz"
    zipped.parent.mkdir()
    zipped.write_bytes(gzip.compress(b'{"text": "0042", "deep": {"day": "2039-03-20"}}\n'))
    (tmp_path / "hub" / "a" / "typed").mkdir()
    pq.write_table(pa.table({"text": ["0042"], "n": [7]}), tmp_path / "hub" / "a" / "typed" / "train.parquet")


def test_files_of_the_hub_are_read_as_local_ones(tmp_path, hub):
    files(tmp_path)
    names = ["a/tables", "a/tabs", "a/lines", "a/zipped", "a/typed", "a/ragged"]
    calls: list[dict] = [{"dataset": name} for name in names]
    calls += [{"dataset": "a/tables", "dataset_config": "semicolons"}, {"dataset": "a/tables", "train_split": "no"}]
    calls += [{"dataset": "a/tables", "validation_split": "test"}]
    calls += [{"dataset": "a/tables", "dataset_config": "third"}, {"dataset": "a/chosen"}]
    tables, tabs, lines, zipped, typed, ragged, semicolons, no, both, third, chosen = answers = read(
        tmp_path, hub, calls
    )
    rows = [{"text": text, "n": "1"} for text in TEXTS] + [{"text": "007", "n": None}]
    assert tables == [{"train": rows}, ["not used: the split test of a/tables"]]
    assert both == [{"train": rows, "validation": [{"text": "last", "n": "1"}]}, []]
    assert tabs[0] == {"train": [{"text": "0042", "n": "1"}], "validation": [{"text": "0043", "n": "1"}]}
    assert lines == [{"train": [{"text": text, "n": 1} for text in TEXTS]}, []]
    assert zipped == [{"train": [{"text": "0042", "deep": {"day": "2039-03-20"}}]}, []]
    assert typed == [{"train": [{"text": "0042", "n": 7}]}, []]
    assert "train.csv: line 3: expected 2 cells as in the first line, got 1" in ragged[1][0]
    assert semicolons[1][0].startswith("warning: datasets reads these .csv files") and len(semicolons[1]) == 1
    assert no == [None, ["data.train_split: a/tables has no split 'no'; it has train, test"]]

    for answer, name, got in ((third, "a/tables", "'third'"), (chosen, "a/chosen", "null")):
        assert answer == [None, [f"data.dataset_config: expected one of first, semicolons for {name}, got {got}"]]

    Hub.asked.clear()
    shutil.move(tmp_path / "home", tmp_path / "moved")  # a cache may be copied to a machine without a network
    assert read(tmp_path, hub, calls, "moved", offline=True)[:4] == answers[:4] and not Hub.asked
    dead = read(tmp_path, "http://127.0.0.1:1", calls[:2], "moved")
    for found, before, name in zip(dead, answers, names, strict=False):
        note = f"the hub does not give {name} now: its files of an earlier download are read"
        assert found == [before[0], [note, *before[1]]]
    for name in ("part-2.csv", "train.tsv"):
        (lost,) = (tmp_path / "moved").rglob(name)
        lost.unlink()
    tables, tabs = read(tmp_path, hub, calls[:2], "moved", offline=True)
    assert tables[1][0] == "data.dataset_config is null: datasets' cache has semicolons of a/tables, which is read"
    assert tabs[0] is None
    assert tabs[1][0].startswith("data.dataset: cannot get a/tabs from the hub: HF_HUB_OFFLINE is set")
