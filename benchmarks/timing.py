"""Medians of calls that take turns, so that all see the same noise."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["medians"]


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each call over `rounds` rounds, after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(series[warmup:]) for name, series in times.items()}
