"""Whether a path leads to a file that can be read to its end. Imports no torch."""

import os
from pathlib import Path


def not_regular(path: str | Path) -> str | None:
    """Return what a path is, in words, if it, or what a link leads to, is no regular file that ends; else None.

    Files of /proc and /sys call themselves regular, and some never end. A sparse file may be a terabyte of nothing.
    """
    path = Path(path)
    if path.is_dir():
        return "a folder"
    if not path.is_file():  # reading a named pipe would wait for its other end
        return "a link to nothing" if not path.exists() else "a pipe, a socket or a device"
    real, found = os.path.realpath(path), path.stat()
    if real.startswith(("/proc/", "/sys/")):
        return f"{real}, a file of the system" if real != str(path) else "a file of the system"
    if found.st_size > 2**28 and getattr(found, "st_blocks", found.st_size) * 512 * 100 < found.st_size:
        return "a file that is almost nothing but a hole"
    return None
