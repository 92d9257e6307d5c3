"""One progress bar for long work, which names the stage that the work is in."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers.utils.logging import tqdm

T = TypeVar("T")


@dataclass(eq=False)
class _Stage:
    """A part of the work, of so many units, or of an unknown number."""

    name: str
    total: int | None
    unit: str
    done: int = 0


class _Bar:
    """What is on the screen: the innermost stage, after those that it is a part of."""

    def __init__(self) -> None:
        self.stages: list[_Stage] = []
        self.shown: Any = None  # until the first stage begins

    def show(self) -> None:
        """The stages as they are now."""
        *around, now = self.stages
        name = ", ".join([*(f"{stage.name} {stage.done + 1}/{stage.total}" for stage in around), now.name])
        if self.shown is None:
            self.shown = tqdm(total=now.total, desc=name, unit=now.unit)
            return
        self.shown.total, self.shown.unit, self.shown.initial = now.total, now.unit, 0
        self.shown.set_description_str(name, refresh=False)
        self.shown.reset(now.total)
        if now.done:
            self.shown.n = self.shown.initial = now.done  # which tells nothing of the pace
            self.shown.refresh()


_current: ContextVar[_Bar | None] = ContextVar("_current", default=None)


@contextmanager
def one_bar() -> Iterator[_Bar]:
    """Let all stages that begin while the block runs share one bar; within another such block, that block's."""
    if (around := _current.get()) is not None:
        yield around
        return
    bar = _Bar()
    _current.set(bar)
    try:
        yield bar
    finally:
        _current.set(None)
        if bar.shown is not None:
            bar.shown.close()


@contextmanager
def stage(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a stage of the work while the block runs; gives a function that takes how much more of it is done.

    >>> with stage("adding", 3, "number") as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    with one_bar() as bar:
        new = _Stage(name, total, unit)

        def advance(count: int) -> None:
            new.done += count
            if bar.stages[-1:] == [new]:
                bar.shown.update(count)

        bar.stages.append(new)
        bar.show()
        try:
            yield advance
        finally:
            bar.stages.remove(new)
            if bar.stages:
                bar.show()  # nothing, where the bar was closed before: a generator may be forgotten, and end late


def each(items: Collection[T], name: str, unit: str) -> Iterator[T]:
    """The items, one after the other, as a stage of the work. Within `one_bar` alone, which ends it on an error."""
    with stage(name, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)
