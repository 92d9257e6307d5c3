"""What a part of a model costs: parameters, or time on its device. One budget is spent in either."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_reparam.compress.clock import Clock
from hf_reparam.config import FORMS, LowRankConfig
from hf_reparam.errors import RankError
from hf_reparam.linalg.allocate import Options
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.sites import Found
from hf_reparam.plan import Entry
from hf_reparam.structures.structure import Steps

_TOKENS = 1024  # of a call: 8 texts of 128 tokens


@dataclass(frozen=True)
class Parameters:
    """Numbers that a site holds, biases not counted."""

    form: str  # of dense layers
    least_saving: float  # share of its parameters that a layer has to save, or it stays dense

    def entry(self, item: Found, rank: int) -> Entry:
        """How a site is held at a rank."""
        return item.structure.entry(rank, self.form)

    def cost(self, item: Found, entry: Entry | None) -> float:
        """What it costs so; None for dense, infinite where it cannot be."""
        try:
            return item.structure.cost(item.site, entry)
        except RankError:
            return math.inf

    def priced(self, item: Found | None, options: Options) -> Options:
        """The options that are worth having, by ascending cost, with what they cost; of None for a part of a site."""
        most = (1 - self.least_saving) * float(options.costs[-1])  # dense is the last one
        return options.of([i for i, e in enumerate(options.entries) if e is None or float(options.costs[i]) <= most])

    def measured(self, layers: Sequence[tuple[Found, Entry | None]]) -> float | None:
        """What sites cost together as they are held, of what they cost dense; None where `cost` is exact."""
        return None

    def too_small(self, share: float, least: float, steps: Steps) -> str:
        """What to say where the least ranks cost a higher share of what is dense."""
        multiples = "" if steps.multiple_of is None else f"; multiple_of is {steps.multiple_of}"
        return (
            f"a share of {share:.3g} is below the smallest size: keep at least {math.ceil(1000 * least) / 1000:.3f}, "
            f"or allow lower ranks with min_rank= (now {steps.min_rank}{multiples})"
        )


@dataclass(frozen=True)
class Seconds:
    """Time of one call, as a clock measured it; the faster form is taken at every rank."""

    clock: Clock  # of the model's device
    forms: Sequence[str]  # that may be taken

    def entry(self, item: Found, rank: int) -> Entry:
        return min((Entry(rank, form) for form in self.forms), key=lambda entry: self.cost(item, entry))

    def cost(self, item: Found, entry: Entry | None) -> float:
        return self.clock.seconds(item.site, entry)

    def priced(self, item: Any, options: Options) -> Options:  # no part of a site, which has no time of its own
        faster = [None if entry is None else self.entry(item, entry.rank) for entry in options.entries]
        costs = [self.cost(item, entry) for entry in faster]
        kept: list[int] = []
        least = math.inf
        for i in reversed(range(len(faster))):  # a rank that takes as long as a higher one loses more for nothing
            if costs[i] < least:
                kept.insert(0, i)
                least = costs[i]
        return Options(faster, options.errors, torch.tensor(costs, dtype=torch.float64)).of(kept)

    def measured(self, layers: Sequence[tuple[Found, Entry | None]]) -> float | None:
        return 1 / self.clock.reached([(item.site, entry) for item, entry in layers])

    def too_small(self, share: float, least: float, steps: Steps) -> str:
        return (
            f"speedup={1 / share:.3g} cannot be reached: at the least ranks (min_rank={steps.min_rank}) the layers "
            f"take {least:.3f} of their dense time (tokens={self.clock.tokens}), a speedup of {1 / least:.2f}"
        )


Unit = Parameters | Seconds
"""How costs are counted."""


def unit_of(config: LowRankConfig, found: Sequence[Found], calibration: Calibration | None) -> Unit:
    """In what the size of a configuration is given, of the targeted sites; times are kept in a calibration."""
    if config.speedup is None:
        return Parameters(config.stored_form, config.least_saving)
    memory = sum(
        parameter.nbytes for item in found if item.structure.of_rows for parameter in item.site.module.parameters()
    )
    known = {} if calibration is None else calibration.times
    clock = Clock(config.tokens or _TOKENS, memory, known, config.compiled)
    return Seconds(clock, FORMS if config.form is None else (config.form,))
