"""What Linux's control groups leave a process of main memory: containers, SLURM and systemd limit it so. Imports no torch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

# By the version of control groups: where they are, the files of a group's limit and of what it uses, and the number in
# memory.stat of cached files that nobody has read lately, which the kernel gives up when memory is asked for.
VERSIONS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def free_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that are free in each group of this process that has a limit, and in each one above it.

    root: of the file system. Nothing is yielded on a system without control groups.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # such as 0::/user.slice of version 2 and 4:memory:/job of version 1
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        place, *names = VERSIONS[1 if kinds else 2]
        top = root / place
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such group here, or its limit is "max"
                yield _free(folder, *names)
            if folder == top:
                break


def _free(group: Path, limit: str, used: str, cached: str) -> int:
    """Return the bytes that are free in one group."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    most, taken = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
    return max(0, most - taken + int(stat[cached]))
