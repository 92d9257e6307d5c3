"""Narrower heads: queries with keys, and values with outputs, of each head approximated as wholes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import hf_reparam.structures.heads.families  # noqa: F401  # registers them
from hf_reparam.errors import RankError
from hf_reparam.layers.dense import dense_type
from hf_reparam.layers.processes import spread
from hf_reparam.plan import Entry
from hf_reparam.structures.heads.attention import ROLES, Attention, AttentionType, find_attentions, register_attention
from hf_reparam.structures.heads.narrow import NarrowHeads, stock_layers, widened
from hf_reparam.structures.linear import Linears
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import CAUTION, Built, Choices, Replacement, Site, Steps, Way

__all__ = ["AttentionType", "Heads", "register_attention"]

_WIDTHS = 8  # of heads that are tried, in equal steps


@dataclass(frozen=True, kw_only=True)
class HeadsSite(Site):
    """An attention of a registered type; its rank is the width of each head."""

    attention: Attention

    def dense_numbers(self, entry: Entry | None) -> int:
        """Numbers that narrower heads leave out of its dense layers."""
        if entry is None:
            return 0
        a = self.attention
        sizes = {width: sum(_numbers(a, role, width) for role in ROLES) for width in (entry.rank, a.stock_width)}
        return sizes[a.stock_width] - sizes[entry.rank]


@dataclass(frozen=True)
class Heads:
    """Attentions whose heads can be made narrower: see `register_attention`."""

    forms: tuple[str, ...] = ("heads",)
    option: str | None = "heads"
    changes_moments: bool = True
    stays_in_memory: bool = False

    def sites(self, model: nn.Module) -> list[Site]:
        """Every attention of a registered type whose parts are where its entry says."""
        return [_site(model, attention) for attention in find_attentions(model)]

    def cost(self, site: Site, entry: Entry | None) -> int:
        """Nothing beside what its narrower layers cost; raises RankError for a width above its own."""
        if entry is not None and entry.rank > site.out_features:
            raise RankError(f"heads {entry.rank} wide, above the {site.out_features} they have")
        return 0

    def ways(
        self, sites: Mapping[str, Site], source: Source, steps: Steps, taken: Mapping[str, Choices]
    ) -> dict[str, list[Way]]:
        """Its layers as they are, and with heads of every width that is tried."""
        heads = {name: site.attention for name, site in sites.items() if isinstance(site, HeadsSite)}
        parts = {n: [f"{n}.{a.within(role, split=False)}" for role in ROLES] for n, a in heads.items()}
        heads = {name: a for name, a in heads.items() if all(part in taken for part in parts[name])}

        def work(name: str) -> list[tuple[int, float, dict[str, Tensor]]]:
            return NarrowHeads(name, heads[name], source).losses(_widths(heads[name], steps.multiple_of))

        costs = {name: float(a.heads * a.width) ** 3 for name, a in heads.items()}
        ways = {}
        for name, narrow in spread(costs, work, desc="Widths of heads").items() if heads else ():
            a = heads[name]
            ways[name] = [Way(0.0, {part: taken[part] for part in parts[name]})]
            for width, error, losses in narrow:
                layers = {}
                for role in ROLES:
                    path = f"{name}.{a.within(role, split=True)}"
                    layers[path] = Linears().choices(*a.shape(role, width), losses[role], steps)
                ways[name].append(Way(CAUTION * error, layers, {name: Entry(width, self.forms[0])}))
        return ways

    def sums(self, name: str, site: Site, *, gradients: bool) -> dict[str, Any]:
        """None of its own: those of its layers serve."""
        return {}

    def watch(self, name: str, site: Site, sums: Mapping[str, Any], watcher: Any) -> list[Any]:
        """Nothing."""
        return []

    def skeleton(self, site: Site, entry: Entry | None) -> Replacement:
        """Empty dense layers of narrower heads; of stock width for None."""
        attention: Any = site.attention  # type: ignore[attr-defined]
        if entry is None:
            return attention.stock(stock_layers(attention))
        return attention.narrower(attention.empty(entry.rank), entry.rank)

    def build(self, name: str, site: Site, entry: Entry | None, source: Source) -> Built:
        """Dense layers of narrower heads; heads filled up with zeros for None."""
        attention: Any = site.attention  # type: ignore[attr-defined]
        if entry is None:
            return Built(attention.stock(widened(attention)))
        return NarrowHeads(name, attention, source).build(entry.rank)


def _site(model: nn.Module, attention: Attention) -> HeadsSite:
    reason = None
    if not attention.narrowed:
        own = [attention.layer(role) for role in ROLES]
        every = [module for _, module in model.named_modules(remove_duplicate=False)]
        if not all(map(dense_type, own)):
            reason = "a projection is no dense layer"
        elif any(sum(module is layer for module in every) != len(attention.names) for layer in own):
            reason = "a projection hangs elsewhere, too, and cannot change its shape"
    return HeadsSite(
        names=attention.names,
        module=attention.module,
        kind=type(attention.module).__name__,
        in_features=attention.stock_width,
        out_features=attention.stock_width,
        weights=0,
        entry=Entry(attention.width, "heads") if attention.narrowed else None,
        reason=reason,
        attention=attention,
    )


def _numbers(attention: Attention, role: str, width: int) -> int:
    n_in, n_out = attention.shape(role, width)
    bias: Any = attention.layer(role).bias
    return n_in * n_out + (n_out if bias is not None else 0)


def _widths(attention: Attention, multiple_of: int) -> list[int]:
    """Widths in equal steps; the full one only where it splits a fused layer."""
    step = math.ceil(attention.width / _WIDTHS / multiple_of) * multiple_of
    return list(range(step, attention.width + attention.kind.fused, step))
