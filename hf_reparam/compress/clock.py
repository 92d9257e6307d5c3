"""How long layers take on their device: dense, and of low rank in every form, at some ranks and between them."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_reparam.calibrate.padding import taken_by
from hf_reparam.compat.compiling import without_limit
from hf_reparam.config import FORMS
from hf_reparam.errors import WeightError
from hf_reparam.layers.copies import WorkingCopy, frozen_copy
from hf_reparam.layers.linear import LowRankLinear, PivotedLinear
from hf_reparam.layers.processes import spread
from hf_reparam.layers.surgery import low_rank_like, replace_modules
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.host import called
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry, Speed
from hf_reparam.structures.structure import Site

_RANKS = 12
_ROUNDS, _LEAST_ROUNDS = 7, 3
_LEAST = 1e-2  # seconds that one measurement takes at least
_PATIENCE = 10.0  # seconds of rounds after which three are enough
_MOST_COPIES = 256  # of a layer
_MOST_BYTES = 1 << 28  # of the memory that they share: more than most caches hold
_ALIGNED = 512  # bytes: where weights begin

Curve = tuple[list[int], list[float]]
"""Ranks, and seconds at each."""


@dataclass(frozen=True)
class Clock:
    """Seconds of one call of a layer on its device, of random numbers of its shape and dtype.

    A layer that is called alone, again and again, finds its weights in the cache, in a model those of the other layers.
    With few tokens that is most of its time. So calls take turns among copies, as many as dense ones fill `memory`.

    Args:
        tokens: rows of a call.
        memory: bytes of the targeted layers together; 0 for one copy, which stays in the cache.
        known: measured before: shape, dtype, device and so on -> form -> Curve; filled as it goes.
        compiled: whether layers run as `torch.compile` makes them.
    """

    tokens: int
    memory: int = 0
    known: dict[Any, dict[str, Curve]] = field(default_factory=dict)
    compiled: bool = False

    def seconds(self, site: Site, entry: Entry | None) -> float:
        """Of a dense layer for None; between the ranks that were measured by straight lines."""
        curves = self._curves(site)
        if entry is None:
            return curves["dense"][1][0]
        if entry.rank > site.full_rank - (entry.form == "pivoted" and site.in_features <= site.out_features):
            return math.inf
        return float(numpy.interp(entry.rank, *curves[entry.form]))

    def reached(self, layers: Sequence[tuple[Site, Entry | None]]) -> float:
        """Dense time over low-rank time of some layers, called one after the other, at the very ranks that they get."""
        return spread({"ranks": 1.0}, lambda _: self._reached(layers), desc="timing ranks")["ranks"]

    def _reached(self, layers: Sequence[tuple[Site, Entry | None]]) -> float:
        sites = {self._key(site): site for site, _ in layers}
        inputs = {key: self._rows(site) for key, site in sites.items()}
        calls: dict[torch.device, dict[str, list[tuple[nn.Module, Tensor]]]] = {}
        for site, entry in layers:
            x, dense = inputs[self._key(site)], self.made(site.module)
            small = dense if entry is None else self.made(drawn(site.module, entry))
            on_device = calls.setdefault(x.device, {"dense": [], "small": []})
            on_device["dense"].append((dense, x))
            on_device["small"].append((small, x))
        took = Counter[str]()
        for device, both in calls.items():
            took.update(self.medians({name: partial(_run, some) for name, some in both.items()}, device))
        return took["dense"] / took["small"]

    def _curves(self, site: Site) -> dict[str, Curve]:
        key = self._key(site)
        if key not in self.known:
            if site.module.weight.is_meta:
                raise WeightError(f"{site.name}: it is on the meta device, where there is no time to measure")
            shape = f"{site.in_features} x {site.out_features}"
            found = spread({shape: 1.0}, lambda _: self._measured(site), desc="timing layers")  # by one process for all
            self.known[key] = found[shape]
        return self.known[key]

    def _key(self, site: Site) -> Any:
        """What tells layers apart whose times differ."""
        layer: Any = site.module
        of_layer = (site.in_features, site.out_features, layer.bias is None, layer.weight.dtype, layer.weight.device)
        return (type(layer), *of_layer, self.tokens, self.memory, self.compiled, torch.get_num_threads())

    def _measured(self, site: Site) -> dict[str, Curve]:
        layer, x = site.module, self._rows(site)
        ranks = {form: _grid(site.full_rank - (form == "pivoted")) for form in FORMS}
        copies = min(max(round(self.memory / _bytes(layer)), 1), _MOST_COPIES)
        shared = _numbers(max(min(self.memory, _MOST_BYTES), 2 * _bytes(layer)), layer.get_parameter("weight"))
        calls: dict[Any, Callable[[], None]] = {"dense": self._in_turn(_copied(layer, copies, shared), x)}
        for form, some in ranks.items():
            for rank in some:
                small = drawn(layer, Entry(rank, form))
                calls[form, rank] = self._in_turn(_copied(small, copies, shared), x)
        took = self.medians(calls, x.device)
        curves = {form: (some, _rising([took[form, rank] for rank in some])) for form, some in ranks.items()}
        return curves | {"dense": ([0], [took["dense"]])}

    def _in_turn(self, copies: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
        """Calls the next copy, ready to run."""
        made = [self.made(one) for one in copies]
        if self.compiled:
            with without_limit(), torch.inference_mode():
                _run([(one, x) for one in made])
        return partial(_run_next, cycle(made), x)

    def _rows(self, site: Site) -> Tensor:
        like = site.module.get_parameter("weight")
        shape = (1, self.tokens, site.in_features)
        return torch.randn(shape, device=like.device, generator=_generator(like.device)).to(like.dtype)

    def medians(self, calls: Mapping[Any, Callable[[], Any]], device: torch.device) -> dict[Any, float]:
        """As the function of this name. Layers share their code, which has to be compiled for each of them."""
        with without_limit() if self.compiled else nullcontext():
            return medians(calls, device, patience=_PATIENCE)

    def made(self, module: nn.Module) -> Any:
        """A module as it runs: compiled, or as it is."""
        return torch.compile(module) if self.compiled else module


def _run(layers: Sequence[tuple[nn.Module, Tensor]]) -> None:
    for layer, x in layers:
        layer(x)


def _run_next(layers: Iterator[nn.Module], x: Tensor) -> None:
    next(layers)(x)


def _bytes(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def _generator(device: torch.device) -> torch.Generator:
    """Of numbers that nobody else's depend on."""
    return torch.Generator(device).manual_seed(0)


def _numbers(size: int, like: Tensor) -> Tensor:
    """Random numbers that fill `size` bytes, some thousand of them again and again, as small as weights are."""
    some = torch.randn(1 << 16, device=like.device, generator=_generator(like.device)).mul_(0.02).to(like.dtype)
    return some.repeat(size // some.nbytes + 1)[: size // some.itemsize]


def _copied(layer: nn.Module, copies: int, shared: Tensor) -> list[nn.Module]:
    """Copies of a layer whose parameters lie in `shared` one after the other, from its start again at its end."""
    made, start = [WorkingCopy(layer).model for _ in range(copies)], 0
    for module in (module for one in made for module in one.modules()):
        for name, own in module._parameters.items():
            if own is None or own.dtype != shared.dtype:
                continue
            if start + own.numel() > len(shared):
                start = 0
            stride = torch.empty_like(own, device="meta").stride()  # its own, but where it is a part of another tensor
            place = shared.as_strided(own.shape, stride, start)
            module._parameters[name] = nn.Parameter(place, requires_grad=False)
            start += _ALIGNED * math.ceil(own.nbytes / _ALIGNED) // own.itemsize
    return made


def _grid(most: int) -> list[int]:
    """Ranks from low to the highest, closer together where they are low."""
    return sorted({max(1, round(most * (i / _RANKS) ** 1.5)) for i in range(1, _RANKS + 1)})


def _rising(times: list[float]) -> list[float]:
    """Half-way between the lowest rising curve above what was measured, and the highest one below."""
    above = numpy.maximum.accumulate(times)
    below = numpy.minimum.accumulate(times[::-1])[::-1]
    return [float(value) for value in (above + below) / 2]


@torch.no_grad()
def drawn(layer: nn.Module, entry: Entry) -> LowRankLinear:
    """A low-rank layer of random numbers: what memory holds by chance may be slow to compute with."""
    low = low_rank_like(layer, entry)
    for parameter in low.parameters():
        parameter.data = _numbers(parameter.nbytes, parameter).view_as(parameter)
    if isinstance(low, PivotedLinear):
        device = low.order.device
        low.order.copy_(torch.randperm(low.in_features, generator=_generator(device), device=device))
    return low


def speed_of(
    work: nn.Module,
    found: Sequence[Found],
    entries: Mapping[str, Entry],
    clock: Clock,
    asked: float,
    calibration: Calibration | None,
) -> Speed:
    """How much faster a model is with these entries, measured: its layers, and the whole where a batch is held out.

    Numbers are drawn, as if they had been decomposed.
    """
    found = [item for item in found if item.structure.of_rows]
    reached = clock.reached([(item.site, entries.get(item.name)) for item in found])
    small, device = frozen_copy(work), found[0].site.module.get_parameter("weight").device
    whole = None
    if calibration is not None and calibration.batches:
        layers = {item.name: small.get_submodule(item.site.name) for item in found}
        replace_modules(small, {layer: drawn(layer, entries[n]) for n, layer in layers.items() if n in entries})
        models = {"dense": called(frozen_copy(work)), "small": called(small)}
        taken = send_to_device(taken_by(models["dense"], calibration.batches[0][0]), device)
        took = clock.medians({name: partial(clock.made(model), **taken) for name, model in models.items()}, device)
        whole = round(took["dense"] / took["small"], 3)
    return Speed(device.type, clock.tokens, asked, round(reached, 3), whole)


@torch.inference_mode()
def medians(
    calls: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    rounds: int = _ROUNDS,
    *,
    wall: bool = False,
    patience: float = math.inf,
) -> dict[Any, float]:
    """Median seconds of every call, over rounds in which all take their turn, so that all see the same noise.

    On a CPU it is the time of the process, which others that are running do not stretch, unless `wall` is asked for.
    When rounds have taken `patience` seconds of the wall's time, three are enough.
    """
    synchronize = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    now = time.process_time if device.type == "cpu" and not wall else time.perf_counter

    def took(call: Callable[[], Any], times: int) -> float:
        synchronize()
        start = now()
        for _ in range(times):
            call()
        synchronize()
        return (now() - start) / times

    times = {}
    for key, call in calls.items():
        call()  # to warm up
        times[key] = max(1, math.ceil(_LEAST / max(took(call, 1), 1e-9)))
    start = time.monotonic()
    series: dict[Any, list[float]] = {key: [] for key in calls}
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.monotonic() - start > patience:
            break
        for key, call in calls.items():
            series[key].append(took(call, times[key]))
    return {key: statistics.median(values) for key, values in series.items()}
