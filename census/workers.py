"""Each class in a process of its own, which may crash or hang: rows are written as they come."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from census.trip import FAILED

__all__ = ["read", "run_all"]

MEMORY = 16 << 30
"""Address space of a process; a class that needs more is told so by its allocation, not by the machine."""

Row = dict[str, Any]
_fork: Any = multiprocessing.get_context("fork")  # what was imported is there at once


@dataclass
class _Running:
    kind: type[Any]
    process: Any
    connection: Connection
    started: float


def read(path: Path) -> list[Row]:
    """The rows of a file; a line that a broken run did not finish is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_all(
    kinds: Iterable[type[Any]],
    travel: Callable[[type[Any]], Row],
    *,
    processes: int = 2,
    limit: int = 60,
    patience: float = 400,
) -> Iterator[Row]:
    """Rows in the order in which classes end.

    Args:
        kinds: classes.
        travel: class -> row.
        processes: how many at a time.
        limit: seconds of processor time for a class.
        patience: seconds of the clock for a class.
    """
    waiting, running = list(kinds)[::-1], list[_Running]()
    torch.set_num_threads(1)  # a process with more threads does not fork well
    gc.freeze()  # shared memory stays shared
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_start(waiting.pop(), travel, limit))
        wait([one.connection for one in running], timeout=1)
        for one in list(running):
            late = time.monotonic() - one.started > patience
            if one.connection.poll() or late:
                running.remove(one)
                yield _finish(one, limit, patience)


def _start(kind: type[Any], travel: Callable[[type[Any]], Row], limit: int) -> _Running:
    ours, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_child, args=(kind, travel, limit, theirs))
    process.start()
    theirs.close()
    return _Running(kind, process, ours, time.monotonic())


def _child(kind: type[Any], travel: Callable[[type[Any]], Row], limit: int, connection: Connection) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    try:
        row = travel(kind)
    except Exception as error:  # of the census itself, or of a class in a place where none was expected
        row = _row(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    connection.send({**row, "seconds": round(time.process_time(), 1)})


def _finish(one: _Running, limit: int, patience: float) -> Row:
    """The row of a class that ended, one way or the other."""
    try:
        row = one.connection.recv() if one.connection.poll() else _row(one.kind, f"no end after {patience} seconds")
    except EOFError:
        one.process.join()
        slow = one.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row = _row(one.kind, f"more than {limit} seconds of processor time" if slow else "its process died")
    one.process.kill()
    one.process.join()
    one.connection.close()
    return row


def _row(kind: type[Any], why: str) -> Row:
    return {"class": kind.__name__, "type": getattr(kind.config_class, "model_type", ""), "ends": FAILED, "why": [why]}
