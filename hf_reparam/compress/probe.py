"""Layers cut alone, and measured: the errors by which ranks are chosen go through what they really do to predictions.

A quadratic model of the loss does not see that attention saturates, nor that errors at many positions add up.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import nn

from hf_reparam.compress.judge import Judge
from hf_reparam.layers.progress import each
from hf_reparam.linalg.allocate import Options, Way
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Replacement

_ROUNDS = 2
_NEAR = 1.15  # a rank within this factor of one that was tried needs no trial
_FAR = math.log(100)  # from the typical ratio: further off is rounding, at nearly full rank
_TINY = 1e-30


@dataclass(frozen=True)
class Prober:
    """Measures what layers lose when each is cut alone."""

    found: Mapping[str, Found]  # name in a plan -> site of a frozen copy of the dense model
    model: nn.Module  # that copy
    judge: Judge  # of it
    source: Source  # from the part of the data that is not held out
    known: dict[Any, float]  # measured before: (judge, metric, name, rank) -> divergence

    def measured(self, name: str, rank: int) -> float:
        """The divergence with one part of this rank."""
        key = (self.judge.fingerprint, self.source.metric, name, rank)
        if key not in self.known:
            item = self.found[name]
            entry = Entry(rank, item.structure.forms[0])
            new = item.structure.build(name, item.site, entry, self.source).replacement
            before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in new.attributes]
            new.install(self.model)
            try:
                self.known[key] = self.judge(self.model, item.site.module)
            finally:
                Replacement({made: old for old, made in new.modules.items()}, before).install(self.model)
        return self.known[key]


def probed(
    ways: Mapping[str, list[Way]],
    chosen: Callable[[Mapping[str, list[Way]]], Mapping[str, Entry]],
    instead: Mapping[str, Entry],
    prober: Prober,
) -> dict[str, list[Way]]:
    """The ways to build every site with errors that go through what was measured of it at the ranks that are chosen.

    Args:
        ways: as predicted; of those of one way and one site.
        chosen: ways -> entries.
        instead: entries at which sites are tried that are left dense.
        prober: measures.
    """
    tried: dict[str, dict[int, float]] = {name: {} for name in ways if name in prober.found}
    current = dict(ways)
    for _ in range(_ROUNDS):
        entries = chosen(current)
        for name in each(tried, "probing", "layer"):
            entry = entries.get(name) or (None if tried[name] else instead.get(name))
            if entry is not None and not any(entry.rank / _NEAR <= r <= entry.rank * _NEAR for r in tried[name]):
                tried[name][entry.rank] = prober.measured(name, entry.rank)
        ratios = {n: _ratios(ways[n][0].sites[n], ranks) for n, ranks in tried.items()}
        logs = [log for known in ratios.values() for log in known.values()]
        typical = statistics.median(logs) if logs else 0.0
        current |= {n: [_through(ways[n][0], n, ratios.get(n, {}), typical)] for n in ways}
    return current


def _ratios(options: Options, measured: Mapping[int, float]) -> dict[int, float]:
    """Rank -> logarithm of what was measured over what was predicted."""
    predicted = {e.rank: float(error) for e, error in zip(options.entries, options.errors, strict=True) if e}
    return {r: math.log(max(m, _TINY) / max(predicted[r], _TINY)) for r, m in measured.items() if r in predicted}


def _through(way: Way, name: str, ratios: Mapping[int, float], typical: float) -> Way:
    """A way of one site with errors multiplied by ratios between those of these ranks; the typical one without any."""
    options = way.sites[name]
    points = sorted((math.log(rank), ratio) for rank, ratio in ratios.items()) or [(0.0, typical)]
    where, values = zip(*points, strict=True)
    ranks = [math.log(entry.rank) for entry in options.entries if entry is not None]
    values = numpy.clip(values, typical - _FAR, typical + _FAR)
    factors = torch.from_numpy(numpy.exp(numpy.interp(ranks, where, values)))
    errors = torch.cat([options.errors[:-1] * factors, options.errors[-1:]])
    errors = errors.flip(0).cummax(0).values.flip(0)
    return replace(way, sites={name: replace(options, errors=errors)})
