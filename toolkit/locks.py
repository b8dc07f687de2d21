"""Locks on what a command writes, so that a second command does not write the same at the same time. Imports no torch."""

import contextlib
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from config import ConfigError

try:
    import fcntl
except ImportError:  # Windows has msvcrt instead
    fcntl = None
msvcrt = importlib.import_module("msvcrt") if os.name == "nt" else None


def lock_of(path: Path) -> Path:
    """Return the lock file for a file or folder that a command writes: it stands beside it."""
    whole = Path(os.path.abspath(path))
    return whole.with_name(f".{whole.name}.lock")


@contextlib.contextmanager
def exclusive(path: Path, busy: str, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the lock file `path`, making its folder if needed; raise ConfigError(busy) if a live process holds it.

    It is a lock of the operating system, which ends with the process in every case. At the end its file is removed, and
    so are the folders made for it that are still empty. A file system without locks gets an owner file instead, and
    `say` gets a line about it. Raises OSError if the lock file cannot be opened.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_name(path.name + "-owner")
    file, problem = _locked_file(path, busy)
    try:
        if problem:
            _become_owner(owner, busy)
            say(f"{path.parent}: its file system cannot lock files ({problem}): the file {owner.name} is used instead")
    except BaseException:
        file.close()
        raise
    try:
        yield
    finally:
        if os.name == "nt":  # Windows removes no open file; elsewhere remove it while it is locked
            file.close()
        for name in (path, *([owner] if problem else [])):
            with contextlib.suppress(OSError):
                name.unlink()
        file.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def is_held(path: Path) -> bool:
    """Return whether a live process holds the lock file `path`; nothing is changed."""
    owner = path.with_name(path.name + "-owner")
    if owner.exists():
        return not _has_ended(owner)
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # no such file: nobody holds it
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a run that starts just now tries again
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a file system without locks, where a holder has an owner file
        return False
    finally:
        os.close(descriptor)
    return False


def _locked_file(path: Path, busy: str) -> tuple[BinaryIO, str]:
    """Return the open lock file, and why it could not be locked (an empty text if it is locked)."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link could point at any file
    for _ in range(10):  # another process of this launch may hold it for a moment, for its own check
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt is not None:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, ""
        except (BlockingIOError, FileNotFoundError):
            pass  # held, or just deleted by its holder: a lock on a deleted file protects nothing
        except OSError as error:
            if msvcrt is None or not isinstance(error, PermissionError):  # with which Windows says that it is held
                return file, error.strerror or str(error)
        file.close()
        time.sleep(0.05)
    raise ConfigError(busy)


def _become_owner(owner: Path, busy: str) -> None:
    """Write host and process into the owner file; raise ConfigError(busy) unless the process in it has ended."""
    me = {"host": platform.node(), "process": os.getpid(), "started": psutil.Process().create_time()}
    for _ in range(2):
        with contextlib.suppress(FileExistsError), open(owner, "x", encoding="utf-8") as file:
            file.write(json.dumps(me) + "\n")
            return
        if not _has_ended(owner):
            break
        owner.unlink(missing_ok=True)
    raise ConfigError(f"{busy} (if no process is at work there, on any machine, delete {owner})")


def _has_ended(owner: Path) -> bool:
    """Return whether the owner file names a process of this machine that runs no more."""
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        if found["host"] != platform.node():
            return False
        return abs(psutil.Process(int(found["process"])).create_time() - float(found["started"])) > 1
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError, psutil.Error):
        return False
