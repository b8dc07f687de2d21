"""The processes of one launch: what they tell each other, and what they do when one of them fails.

A process of a launch is called by its rank; the first is rank 0. What one of them meets (an error, a signal, a full GPU)
is told to all at the next exchange, so that all of them take the same way. Started alone, a process is its own only one,
and every function here is a plain call.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from config import ConfigError
from toolkit.startup import announced

T = TypeVar("T")

# Seconds that a process waits for the others.
JOIN = 300  # until all have started: imports from a cold network drive take minutes
SET_UP = 7200  # until the first step is done: one process tokenises the data while the others wait, each one compiles
WRITING = 600  # after something that only the first process does, such as writing a checkpoint
ENDING = 86_400  # until the first process has answered prompts, written the adapter and drawn the curves
# Between two exchanges all do equal work, so a process that is much slower than this one hangs. torchrun gives the
# others 30 s to end before it kills them: together less than a minute.
ANSWER = 20.0
SLOWER = 3.0  # times the seconds that this process itself took, on top of ANSWER
# After an exchange, gradients are on their way within milliseconds. NCCL cannot see that a process has died.
REDUCE = 60
SILENT = 30.0  # without a sign of life from a process that computes layers together with this one
ROLL_CALL = 2.0  # until each process that is alive has said so


class RankFailed(RuntimeError):
    """Another process has ended, does not answer or has failed; the text names it."""


@dataclasses.dataclass
class _Launch:
    """The launch that this process has joined."""

    store: dist.Store
    rank: int
    count: int
    control: Any  # group for exchanges: gloo, which notices a process that has died and can wait for a limited time
    reduce: Any  # group for gradients
    names: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # (machine, process id) by rank
    since: float = dataclasses.field(default_factory=time.monotonic)  # the last exchange
    settled: bool = False  # the first step is done
    lost: bool = False  # some process takes part in no exchange any more
    tied: bool = False  # no process computes a layer without the others: see tie


_launch: _Launch | None = None


# ------------------------------------------------------------------------------------------------ joining


def join() -> None:
    """Join the other processes of the launch; return at once if this process was started alone.

    Raises ConfigError if they do not come, or if a machine has fewer GPUs than processes.
    """
    global _launch
    if _launch is not None or not announced():
        return
    gpu = torch.cuda.is_available()
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN)))
        store = _without_what_has_been(store, rank, count)
        backend = backend_of(gpu)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=JOIN))
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=SET_UP))
        reduce = dist.new_group(backend=backend, timeout=timedelta(seconds=REDUCE))
    except (RuntimeError, ValueError) as error:
        who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} announced processes"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{who} cannot reach the others at {os.environ['MASTER_ADDR']}: {reason}") from None
    _launch = _Launch(store, rank, count, control, reduce)
    _launch.names = gathered((platform.node(), os.getpid()))
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpu and "nccl" in backend and here > cards:
        raise ConfigError(f"{here} processes on {platform.node()}, which has {cards} GPU: use --nproc_per_node {cards}")


def _without_what_has_been(store: dist.Store, rank: int, count: int) -> dist.Store:
    """Return a part of the store that nobody has used: torchrun keeps its store over a restart, with the old addresses.

    Launchers of several machines count restarts differently. So the first process names a new part, each other one says
    there who it is, and takes it once it is greeted; what an earlier first process named greets nobody any more.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + JOIN
    if rank == 0:
        store.set("start", mine)
        part = dist.PrefixStore(mine, store)
        for other in range(1, count):
            try:
                name = part.get(f"here/{other}").decode()
            except RuntimeError:  # of torch, which says a key and no rank
                raise RuntimeError(f"rank {other} has not come within {JOIN} s") from None
            part.set(f"greeted/{name}", "1")
        return part
    while time.monotonic() < end:
        part = dist.PrefixStore(store.get("start").decode(), store)
        part.set(f"here/{rank}", mine)
        if part.check([f"greeted/{mine}"]):
            return part
        time.sleep(0.1)
    raise RuntimeError(f"rank 0 has not answered for {JOIN} s")


def backend_of(gpu: bool) -> str:
    """Return torch's name for what carries tensors: NCCL between GPUs, gloo between CPUs."""
    return "cpu:gloo,cuda:nccl" if gpu and dist.is_nccl_available() else "gloo"  # Windows has no NCCL


def several() -> bool:
    """Return whether this process works together with others."""
    return _launch is not None and dist.is_initialized()


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks for all."""
    return _launch is None or _launch.rank == 0


def settle(settled: bool = True) -> None:
    """Say that a step of this shape is done: from here on a process that does not answer is noticed within seconds."""
    if _launch is not None:
        _launch.settled = settled


def tie() -> None:
    """Say that the processes compute each layer together: where one fails, the others wait for it within a layer."""
    if _launch is not None and not _launch.tied:
        _launch.tied = True
        threading.Thread(target=_watch_the_others, args=[_launch, _launch.store.clone()], daemon=True).start()


def _watch_the_others(launch: _Launch, store: dist.Store) -> None:
    """Show that this process is alive, and free its main thread from a layer as soon as another process is not."""
    beats = {rank: (b"", time.monotonic()) for rank in range(launch.count) if rank != launch.rank}
    well, number = True, 0
    with contextlib.suppress(RuntimeError):  # the store may go with its process
        while well:
            number += 1
            store.set(f"beat/{launch.rank}", str(number))
            slept = time.monotonic()
            time.sleep(1)
            stopped = time.monotonic() - slept > SILENT / 2  # this process too, such as by Ctrl-Z: all begin anew
            for rank, (last, since) in beats.items():
                beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
                beats[rank] = (beat, since if beat == last and not stopped else time.monotonic())
                if time.monotonic() - beats[rank][1] > SILENT:
                    store.set(f"failed/{rank}", f"has not answered for {SILENT:.0f} s")
                    _end(rank)
                well = well and not (_has_ended(rank) or store.check([f"failed/{rank}"]))
    if "nccl" in backend_of(torch.cuda.is_available()):  # which would wait; gloo notices that a connection is closed
        dist.group.WORLD._get_backend(torch.device("cuda")).abort()


# ------------------------------------------------------------------------------------------------ exchanges


def gathered(value: T, patience: float | None = None) -> list[T]:
    """Return the value of every process, by rank, as JSON reads it back. All must call it; values go over the CPU.

    patience: seconds to wait for the others; None means as long as equal work can take. Raises RankFailed if one of them
    does not answer, and instead of an answer the error of one that has failed (see together).
    """
    if not several():
        return [json.loads(json.dumps(value))]
    values, failures = _exchange(value, None, patience)
    if failures:
        raise _agreed(failures)
    return values


END = "the end of a block"  # exchanged in place of a value
Failure = tuple[str, list[str]]  # (kind, lines) of an error
FULL = "ran out of GPU memory"


def _exchange(value: Any, failure: Failure | None, patience: float | None) -> tuple[list, dict[int, Failure]]:
    """Return the value of every process, and by rank the errors of those that have failed."""
    launch = _launch
    if patience is None:
        patience = ANSWER + SLOWER * (time.monotonic() - launch.since) if launch.settled else SET_UP
    mine = torch.frombuffer(bytearray(json.dumps([value, failure]).encode()), dtype=torch.uint8)
    try:
        sizes = _all_gather(torch.tensor([len(mine)]), patience)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = _all_gather(padded, ANSWER).view(launch.count, -1)
    except RuntimeError as error:
        raise _lost(patience, error) from None
    launch.since = time.monotonic()
    found = [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes.tolist(), strict=True)]
    failures = {rank: failure for rank, (_, failure) in enumerate(found) if failure is not None}
    gone = [rank for rank, (other, _) in enumerate(found) if (other == END) != (value == END)]
    if gone and not failures:  # such as Ctrl-C for one process alone
        launch.lost = True
        raise RankFailed(f"{name_of(gone[0])} is at another place of the program")
    return [value for value, _ in found], failures


def _all_gather(part: torch.Tensor, patience: float) -> torch.Tensor:
    """Return the parts of all processes, one after another. dist.all_gather_object knows no time limit of its own."""
    parts = [torch.zeros_like(part) for _ in range(_launch.count)]
    dist.all_gather(parts, part, group=_launch.control, async_op=True).wait(timedelta(seconds=patience))
    return torch.cat(parts)


def _lost(patience: float, error: Exception) -> RankFailed:
    """Return the error that names the processes which take no part in a roll call. error: of torch, which names none."""
    launch, reason = _launch, " ".join(str(error).split())[:200]
    timed_out = "timed out" in reason.lower()
    launch.lost = True
    _ignore_sigterm()
    silent, said = [rank for rank in range(launch.count) if rank != launch.rank], ""
    with contextlib.suppress(RuntimeError):  # the store may have gone with its process
        launch.store.set(f"alive/{launch.rank}", "1")
        time.sleep(ROLL_CALL)
        silent = [rank for rank in silent if not launch.store.check([f"alive/{rank}"])]
        failed = [rank for rank in silent if launch.store.check([f"failed/{rank}"])]  # see _left_behind
        said = launch.store.get(f"failed/{failed[0]}").decode() if failed else ""
    if not silent:
        return RankFailed(f"the processes cannot reach each other: {reason}")
    if said:
        if failed[0] > 0 or said.startswith(FULL):
            _leave_words_to_the_first()
        return RankFailed(f"{name_of(failed[0])} {said}")
    ended = [rank for rank in silent if _has_ended(rank)]
    for rank in silent if timed_out else ():
        _end(rank)
    if 0 not in (ended or silent):
        _leave_words_to_the_first()
    names = ", ".join(name_of(rank) for rank in ended or silent)
    how = "has ended" if ended or not timed_out else f"has not answered for {patience:.0f} s"
    return RankFailed(f"{names} {how}")


def name_of(rank: int) -> str:
    """Return the rank of a process with its machine and number, to look for it."""
    machine, process = _launch.names[rank] if _launch.names else ("?", 0)
    return f"rank {rank} ({machine}, process {process})"


def _end(rank: int) -> None:
    """Kill a process of this launcher that hangs, as the launcher will do half a minute later: its locks become free."""
    machine, process = _launch.names[rank] if _launch.names else ("", 0)
    with contextlib.suppress(psutil.Error):
        if machine == platform.node() and psutil.Process(process).ppid() == os.getppid():
            psutil.Process(process).kill()


def _has_ended(rank: int) -> bool:
    """Return whether a process of this machine has ended; False for one of another machine."""
    machine, process = _launch.names[rank] if _launch.names else ("", 0)
    if machine != platform.node():
        return False
    try:
        return psutil.Process(process).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def wait_for_gpu() -> None:
    """Wait until this process's GPU has done its work, so that an exchange tells of it too; alone, do nothing."""
    if several() and torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ failing together


@contextlib.contextmanager
def together(patience: float | None = None) -> Iterator[None]:
    """Let an error of one process end this block on all of them. patience: at its end, as in `gathered`.

    All raise the same ConfigError or OutOfMemoryError, which names the rank. Of another error, which the failing process
    raises as it is, the others get a RankFailed. They notice it at their next exchange, here or within the block.
    """
    mine = None
    try:
        yield
    except Exception as error:
        mine = error
    if mine is None:
        if several() and not _launch.lost:
            gathered(END, patience)
    elif not several() or _launch.lost or getattr(mine, "agreed", False):
        raise mine
    else:
        failure = _described(mine)
        if _launch.tied and failure[0] != "refused":  # the others may be in a layer, and come to no exchange
            raise _left_behind(mine, failure) from None
        try:
            failures = _exchange(None, failure, None)[1]
        except RankFailed as lost:  # nobody is left to be told
            raise (lost if _is_about_others(mine) else mine) from None
        if failure[0] == "memory":
            mine.__traceback__ = None  # its frames hold the tensors of the micro-batch that failed
        raise _agreed(failures, mine) from None


def _left_behind(mine: Exception, failure: Failure) -> Exception:
    """Return the error of a process that leaves a layer: its own one, which it leaves in the store, or who else has failed."""
    if _is_about_others(mine):
        return _lost(ANSWER, mine)
    full, text = failure[0] == "memory", f"has failed: {failure[0]}: {failure[1][0]}"
    with contextlib.suppress(RuntimeError):
        _launch.store.set(f"failed/{_launch.rank}", full_with_others(failure[1][0]) if full else text)
    _launch.lost = True
    if full:
        _leave_words_to_the_first()
    return mine


def full_with_others(reason: str) -> str:
    """Return what is said of a process that runs out of GPU memory in a layer which it computes with others."""
    way = "use --gradient_checkpointing true or a lower --memory_limit_gib"
    return f"{FULL} with a divided base, {way}: {reason}"


def _is_about_others(error: Exception) -> bool:
    """Return whether an error comes from torch.distributed, such as in the passes of a divided base."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _described(error: Exception) -> Failure:
    if isinstance(error, ConfigError):
        return "refused", list(error.problems)
    if isinstance(error, torch.OutOfMemoryError):
        return "memory", [str(error).splitlines()[0]]
    return type(error).__name__, [(str(error).splitlines() or [""])[0]]


def _agreed(failures: Mapping[int, Failure], mine: Exception | None = None) -> Exception:
    """Return the error that this process raises when some have failed. mine: its own error, if it is one of them."""
    first = min(failures)
    kind, lines = failures[first][0], _lines(failures)
    error: Exception
    if kind == "refused":
        error = ConfigError(*lines)
    elif kind == "memory":
        error = torch.OutOfMemoryError(lines[0])
    else:
        error = mine or RankFailed(f"{name_of(first)} has failed: {kind}: {failures[first][1][0]}")
        _launch.lost = True
    if kind == "refused" or len(failures) == _launch.count or (mine is None and first > 0):
        _leave_words_to_the_first()
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _lines(failures: Mapping[int, Failure]) -> list[str]:
    """Return what the processes say, each topic once. What the first one says needs no rank."""
    lines, topics = [], set()
    for rank, (_, problems) in sorted(failures.items()):
        fresh = [line for line in problems if _topic(line) not in topics]
        topics |= {_topic(line) for line in fresh}
        lines += [f"rank {rank}: {line}" if rank else line for line in fresh]
    return lines


def where(error: Exception) -> str:
    """Return ` on rank N` for an error that together() took over from another process than the first, or nothing."""
    named = re.match(r"(rank \d+): ", str(error))
    return f" on {named[1]}" if named else ""


def _topic(line: str) -> str:
    """Return the setting that a line is about: two processes may measure two numbers and mean the same problem."""
    return line.split(": ")[0]


def _leave_words_to_the_first() -> None:
    """Silence this process's errors unless it is the first, and let no launcher interrupt the way to its exit code."""
    _ignore_sigterm()
    if not is_first():
        sys.stderr = io.StringIO()


def _ignore_sigterm() -> None:
    """Ignore the SIGTERM by which torchrun ends the others as soon as one process has ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------ the same on all


def first_alone(make: Callable[[], T]) -> T:
    """Call make() on the first process and then on all others, which find in the caches what it has prepared."""
    for turn in (True, False) if several() else (True,):
        with together():
            if is_first() == turn or not several():
                made = make()
    return made


def refuse_differences(values: Mapping[str, Any]) -> None:
    """Raise a ConfigError that names each value which is not the same on all processes."""
    everyone = gathered(dict(values))
    first, problems = everyone[0], []
    for rank, other in enumerate(everyone):
        for name in sorted(first.keys() | other.keys()):
            if (mine := first.get(name)) != (theirs := other.get(name)):
                problems.append(
                    f"{name}: expected the same for all processes, got {mine!r} for rank 0 and {theirs!r} for rank {rank}"
                )
    if problems:
        raise ConfigError(*problems)


# ------------------------------------------------------------------------------------------------ tensors


def sum_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in its own memory; return it."""
    if several():
        try:
            dist.all_reduce(tensor, group=_launch.reduce)
        except RuntimeError as error:
            raise _lost(REDUCE, error) from None
    return tensor


def sum_numbers(numbers: Sequence[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the sums of numbers over all processes, fp64, on the device."""
    known = torch.tensor([0.0 if isinstance(n, torch.Tensor) else n for n in numbers], dtype=torch.float64)
    if device.type == "cuda":
        known = known.pin_memory()  # so that the copy is queued and the CPU does not wait for the GPU
    own = known.to(device, non_blocking=True)
    for place, number in enumerate(numbers):
        if isinstance(number, torch.Tensor):
            own[place] = number
    return sum_in_place(own)


@torch.no_grad()
def take_from_first(tensors: Sequence[torch.Tensor]) -> None:
    """Give tensors of all processes the values that the first one has: random numbers of two kinds of GPU differ."""
    if several():
        elements = torch.cat([tensor.flatten() for tensor in tensors])
        gathered(None)  # all are here: one that has failed before would let the others wait for tensors
        dist.broadcast(elements, 0, group=_launch.reduce)
        parts = elements.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
