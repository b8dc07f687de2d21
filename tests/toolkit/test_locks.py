"""Locks: one holder at a time, nobody's after its death, and a file with its owner where a file system has no locks."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from config import ConfigError
from toolkit import locks
from toolkit.locks import exclusive, fcntl, lock_of

HOLDER = """
import sys, time
from pathlib import Path
from toolkit.locks import exclusive
with exclusive(Path(sys.argv[1]), "held"):
    print(1, flush=True)
    time.sleep(60)
"""
OWNER = "answers.lock-owner"


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / "answers.lock"


def refused(lock: Path) -> str:
    with pytest.raises(ConfigError) as caught, exclusive(lock, "--output: held"):
        pytest.fail("two holders")
    return str(caught.value)


@pytest.fixture
def without_locks(monkeypatch):
    """Locks as on a file system that has none: each attempt ends with the errno in the list that is returned."""
    number = [errno.ENOLCK]

    def flock(*_):
        raise OSError(number[0], os.strerror(number[0]))

    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    return number


def test_one_holds_it_and_nothing_is_left(tmp_path):
    lock = lock_of(tmp_path / "new" / "folder" / "answers.jsonl")
    with exclusive(lock, "--output: held"):
        assert lock.name == ".answers.jsonl.lock"
        assert refused(lock) == "--output: held"
    assert not list(tmp_path.iterdir())
    with exclusive(lock, "--output: held"):
        (lock.parent / "answers.jsonl").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.skipif(fcntl is None, reason="Windows removes no open file")
def test_of_a_process_that_was_killed_it_is_nobodys(lock, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, env={"PYTHONPATH": "."}
    ) as holder:
        assert holder.stdout.readline() == b"1\n"
        assert refused(lock) == "--output: held"
        holder.kill()
    with exclusive(lock, "held"):
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_on_a_file_that_its_holder_removed_it_guards_nothing(lock, monkeypatch):
    """Opened before the holder's end and locked after it, the file has no name any more: the next one is taken."""
    real, times = os.stat, iter(range(9))

    def stat(path, **keywords):
        if path == lock and next(times) == 0:
            os.unlink(path)
        return real(path, **keywords)

    monkeypatch.setattr(os, "stat", stat)
    with exclusive(lock, "held"):
        refused(lock)
    assert next(times) > 1


def test_without_fcntl_it_is_windows_or_none(lock, monkeypatch):
    def locking(descriptor, mode, size):
        raise PermissionError(13, "held by another process")

    monkeypatch.setattr(locks, "fcntl", None)
    with exclusive(lock, "held"):
        pass
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    assert refused(lock) == "--output: held"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.EACCES, errno.EPERM])
def test_file_system_without_locks_gets_an_owner_file_and_a_line(lock, tmp_path, without_locks, number):
    without_locks[0], said = number, []
    with exclusive(lock, "held", said.append):
        (line,) = said
        assert line.startswith(f"{tmp_path}: its file system cannot lock files ({os.strerror(number)}): ")
        owner = json.loads((tmp_path / OWNER).read_text())
        assert (owner["host"], owner["process"]) == (platform.node(), os.getpid())
        problem = refused(lock)
        assert (
            problem.startswith("--output: held (if no process is at work there")
            and f"delete {tmp_path / OWNER}" in problem
        )
        assert (tmp_path / OWNER).exists(), "the one that was refused took it away"
    assert not list(tmp_path.iterdir())


def test_owner_file_of_an_ended_process_is_replaced_and_of_no_other(lock, tmp_path, without_locks):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = {"host": platform.node(), "process": os.getpid(), "started": psutil.Process().create_time()}
    for change in (
        {"process": ended.pid},
        {"started": alive["started"] - 60},
    ):  # the second: its number was given again
        (tmp_path / OWNER).write_text(json.dumps(alive | change))
        with exclusive(lock, "held"):
            assert json.loads((tmp_path / OWNER).read_text()) == alive
    for content in (json.dumps(alive), json.dumps(alive | {"host": "another"}), "", "[" * 10**5, "{}", '{"host": 1}'):
        (tmp_path / OWNER).write_text(content)
        assert refused(lock).startswith("--output: held (")
        assert (tmp_path / OWNER).read_text() == content


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_lock_that_is_a_link_or_a_pipe(lock, tmp_path):
    (tmp_path / "letter").write_text("words")
    lock.symlink_to(tmp_path / "letter")
    with pytest.raises(OSError), exclusive(lock, "held"):
        pytest.fail("a lock on any file")
    lock.unlink()
    os.mkfifo(lock)
    with exclusive(lock, "held"):
        refused(lock)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]
