"""What a structure is: one way to hold a part of a model with fewer parameters.

Conversion, loading, merging and reports are loops over `hf_reparam.structures.STRUCTURES` and know nothing but this
interface.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_reparam.compat.accelerate import aligned
from hf_reparam.errors import RankError, WeightError
from hf_reparam.layers.processes import spread
from hf_reparam.layers.surgery import replace_modules, set_attribute
from hf_reparam.linalg.allocate import Options, Way
from hf_reparam.linalg.moments import LayerMoments
from hf_reparam.plan import Entry
from hf_reparam.structures.source import Source

CAUTION = 1.5  # what narrower heads and tables lose counts for so much more: it meets the errors of other layers


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a model that a structure can hold with fewer parameters, or holds so already.

    Args:
        names: every path at which it hangs; under the first it is reported.
        module: what is there.
        kind: class of what is there in the dense model.
        in_features, out_features: of the dense weight.
        weights: numbers of the dense weight; a budget counts these.
        others: numbers that stay as they are, biases as a rule.
        entry: how it is held now; None while it is dense.
        reason: why it stays dense whatever is asked; None if it need not.
        aliases: other names by which patterns may mean it.
        stray: whether a plan of the whole has no place for it, as `reason` says; it can be merged all the same.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: str
    in_features: int
    out_features: int
    weights: int
    others: int = 0
    entry: Entry | None = None
    reason: str | None = None
    aliases: tuple[str, ...] = ()
    stray: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    def moments(self, name: str) -> list[str]:
        """The names of the LayerMoments that calibration has of it, by its name in a plan."""
        return [name]

    def dense_numbers(self, entry: Entry | None) -> int:
        """Numbers of the dense model that an entry stands for."""
        return self.weights + self.others


@dataclass(frozen=True)
class Replacement:
    """What a site becomes.

    Args:
        modules: old module -> new one, wherever it hangs.
        attributes: (module, name, value) of what is set beside: a number, such as the width of heads, or a module in
            the place of another, or of a parameter; an nn.ParameterList of one stands for that parameter.
    """

    modules: Mapping[nn.Module, nn.Module]
    attributes: Sequence[tuple[nn.Module, str, Any]] = ()

    @classmethod
    def joined(cls, replacements: Sequence["Replacement"]) -> "Replacement":
        """Several as one: to put them in takes one walk through the model."""
        modules = {old: new for one in replacements for old, new in one.modules.items()}
        return cls(modules, [item for one in replacements for item in one.attributes])

    def new(self) -> nn.ModuleList:
        """All that is new, in one module."""
        beside = [value for _, _, value in self.attributes if isinstance(value, nn.Module)]
        return nn.ModuleList([*self.modules.values(), *beside])

    def of(self, new: nn.ModuleList) -> "Replacement":
        """The same places with other new modules, as `new` gives them."""
        held = iter(new)
        modules = {old: next(held) for old in self.modules}
        attributes = [(m, n, next(held) if isinstance(v, nn.Module) else v) for m, n, v in self.attributes]
        return Replacement(modules, attributes)

    def install(self, model: nn.Module) -> None:
        replace_modules(model, self.modules)
        for item in self.attributes:
            set_attribute(*item)


@dataclass(frozen=True)
class Built:
    """A replacement with its numbers.

    Args:
        replacement: the modules.
        error: ||W - W'|| / ||W|| in the norm of the metric; None where it is not known.
        moments: name in a plan -> moments that new dense layers of it have, computed when they are asked for.
        gone: names in a plan of layers that are no more.
    """

    replacement: Replacement
    error: float | None = None
    moments: Mapping[str, Callable[[], LayerMoments]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Steps:
    """Which ranks a site may get: multiples of a number that are not below the least rank.

    Args:
        form: of dense layers.
        multiple_of: the number; None for 8 where a layer's full rank is 256 or more, and 1 below, where steps of 8
            would be coarse.
        min_rank: the least rank.
    """

    form: str
    multiple_of: int | None
    min_rank: int

    def step(self, site: Site) -> int:
        """The difference between two ranks of a site."""
        return self.multiple_of or (8 if site.full_rank >= 256 else 1)

    def least(self, site: Site) -> int:
        """The lowest rank of a site."""
        return math.ceil(self.min_rank / self.step(site)) * self.step(site)

    def up_to(self, site: Site, most: int) -> range:
        """The ranks of a site up to one."""
        return range(self.least(site), most + 1, self.step(site))


class Structure(Protocol):
    """One way to hold a part of a model with fewer parameters. Its sites may be of a subclass of `Site`.

    Attributes:
        forms: what entries of a plan call it; the first is taken where a configuration says nothing.
        option: the field of `LowRankConfig` that asks for it; None if it always applies.
        changes_moments: whether what it builds are dense layers that other structures may take.
        of_rows: whether a site is one module that maps rows of `in_features` numbers, and so can be timed alone.
        stays_in_memory: whether its modules share tensors, and so cannot wait in files.
        ties: whether Transformers models have to tie their parameters anew when its modules came in.
    """

    forms: tuple[str, ...]
    option: str | None = None
    changes_moments: bool = False
    stays_in_memory: bool = False
    of_rows: bool = False
    ties: bool = False

    def sites(self, model: nn.Module) -> list[Any]:
        """Every `Site` where it can stand or stands; reads shapes only, so it works on the meta device."""

    def entry(self, rank: int, form: str) -> Entry:
        """Of this form, or of the first where this structure has no such form."""
        return Entry(rank, form if form in self.forms else self.forms[0])

    def cost(self, site: Any, entry: Entry | None) -> int:
        """Numbers that a site holds so, biases not counted; None for dense.

        Raises:
            RankError: it cannot have this rank.
        """
        if entry is None:
            return int(site.weights)
        pivoted = entry.form == "pivoted"
        most = min(site.in_features - pivoted, site.out_features)
        if entry.rank > most:
            raise RankError(f"rank {entry.rank}, above {'min(in - 1, out)' if pivoted else 'min(in, out)'} = {most}")
        return int(entry.rank * (site.in_features + site.out_features - pivoted * entry.rank))

    def ways(
        self, sites: Mapping[str, Any], source: Source, steps: Steps, taken: Mapping[str, Options]
    ) -> dict[str, list[Way]]:
        """Name -> ways to build what belongs to it, the first as it is in the model; what has no loss is left out.

        Args:
            sites: name in a plan -> targeted site of this structure.
            source: metric and moments.
            steps: the ranks that may be chosen.
            taken: name in a plan -> choices of the dense layers, which a way may offer otherwise.
        """

        def work(name: str) -> Tensor | None:
            with reading(sites[name].name, sites[name].module):
                return self.losses(name, sites[name], source)

        effort = {name: self.effort(name, site, source) for name, site in sites.items()}
        found = spread(effort, work, desc="decomposing")
        known = {name: losses for name, losses in found.items() if losses is not None}
        return {name: [Way(0.0, {name: self.choices(sites[name], lost, steps)})] for name, lost in known.items()}

    def losses(self, name: str, site: Any, source: Source) -> Tensor | None:
        """What dropping each direction costs, (min(in, out),) float64 on the CPU, descending; one unit for all sites.

        None where there is nothing in that unit, as without a gradient in the fisher metric.
        """
        return None

    def choices(self, site: Any, losses: Tensor, steps: Steps) -> Options:
        """Entries at which a site is smaller than dense, by ascending rank, and, last, dense, which loses nothing."""
        entries = [self.entry(rank, steps.form) for rank in steps.up_to(site, site.full_rank - 1)]
        entries = [entry for entry in entries if self.cost(site, entry) < site.weights]
        costs = [float(self.cost(site, entry)) for entry in (*entries, None)]
        kept = losses.cumsum(0)[torch.tensor([entry.rank - 1 for entry in entries], dtype=torch.int64)]
        errors = torch.cat([(losses.sum() - kept).clamp_min(0), torch.zeros(1, dtype=torch.float64)])
        return Options([*entries, None], errors, torch.tensor(costs, dtype=torch.float64))

    def sums(self, name: str, site: Any, *, gradients: bool) -> dict[str, Any]:
        """Name -> empty sums over calibration data: LayerSums, or TableMoments."""
        return {}

    def effort(self, name: str, site: Any, source: Source) -> float:
        """Relative cost of decomposing all of it: products, the eigenproblem, and the roots of moments."""
        n_in, n_out, rank = site.in_features, site.out_features, site.full_rank
        roots = 0.0 if source.metric == "svd" else (n_in**3 + n_out**3) / 3
        return float(rank**2 * (n_in + n_out + 10 * rank) + roots + 1) * len(site.moments(name))

    def watch(self, name: str, site: Any, sums: Mapping[str, Any], watcher: Any) -> None:
        """Put hooks on what is there that add to the sums, with `Watcher.watch`."""
        return

    def skeleton(self, site: Any, entry: Entry | None) -> Replacement:
        """What takes its place, by shape alone, on the device of what is there; dense again for None."""

    def build(self, name: str, site: Any, entry: Entry | None, source: Source) -> Built:
        """As `skeleton`, with its numbers: from the dense weight, or multiplied out for None.

        Raises:
            WeightError: a weight or its moments are not finite or not there; names the site.
        """


def paths_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of a model -> the paths at which it hangs."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


@contextmanager
def reading(name: str, *modules: nn.Module) -> Iterator[None]:
    """Have the weights of modules in memory while the block runs; its WeightErrors begin with the name."""
    try:
        with aligned(*modules):
            yield
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from None
