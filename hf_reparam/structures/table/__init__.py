"""Tables with a row for each token: input embeddings with what is tied to them, and an untied output head."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_reparam.compat.accelerate import aligned
from hf_reparam.compat.marks import tied_keys
from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.linalg import TableMoments, decompose_table
from hf_reparam.plan import Entry
from hf_reparam.structures.hosts import embeddings_of, hosts
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import (
    CAUTION,
    Built,
    Choices,
    Replacement,
    Site,
    Steps,
    Way,
    choices_of,
    named,
)
from hf_reparam.structures.table.modules import LowRankEmbedding, LowRankTable, low_rank_tables, stock_tables

__all__ = ["Tables"]


@dataclass(frozen=True, kw_only=True)
class TableSite(Site):
    """Modules that hold one table.

    Args:
        host: the Transformers model that they are in.
        members: path in the host -> module, for this one and all that are tied to it.
    """

    host: PreTrainedModel
    members: Mapping[str, nn.Module]


@dataclass(frozen=True)
class Tables:
    """Input embeddings, with a head that is tied to them, and an untied head of Transformers models."""

    forms: tuple[str, ...] = ("table",)
    option: str | None = "embeddings"
    changes_moments: bool = False
    stays_in_memory: bool = True

    def sites(self, model: nn.Module) -> list[Site]:
        """The tables of a Transformers model, or of those in another object."""
        return [site for path, host in hosts(model).items() for site in _sites(f"{path}." if path else "", host)]

    def cost(self, site: Site, entry: Entry | None) -> int:
        """Numbers of the factors; raises RankError for a rank that is not below the width and the tokens."""
        if entry is None:
            return site.weights
        if entry.rank > site.full_rank - 1:
            raise RankError(f"rank {entry.rank}, above the {site.full_rank - 1} that it can have")
        return entry.rank * (site.in_features + site.out_features)

    def ways(
        self, sites: Mapping[str, Site], source: Source, steps: Steps, taken: Mapping[str, Choices]
    ) -> dict[str, list[Way]]:
        """Every rank at which a table is smaller than dense; of tables that calibration saw a gradient of."""
        ways = {}
        for name, site in sites.items():
            seen = source.table_moments(name)
            if seen is None:
                continue
            with named(site.name), aligned(site.module):
                squares = decompose_table(site.module.get_parameter("weight"), seen).squares
            entries = [Entry(rank, self.forms[0]) for rank in steps.up_to(site.full_rank - 1)]
            entries = [entry for entry in entries if self.cost(site, entry) < site.weights]
            costs = [*(self.cost(site, entry) for entry in entries), site.weights]
            ways[name] = [Way(0.0, {name: choices_of(entries, squares * seen.tokens * CAUTION, costs)})]
        return ways

    def sums(self, name: str, site: Site, *, gradients: bool) -> dict[str, Any]:
        """Counts of tokens and moments of gradients, and what a head gets and gives back."""
        return {} if site.entry is not None else {name: TableMoments.zeros(*_shape(site.module))}

    def watch(self, name: str, site: Site, sums: Mapping[str, Any], watcher: Any) -> list[Any]:
        """Hooks on the embeddings, and on a head that is tied to them."""
        return [h for module in set(_members(site).values()) for h in _watch(module, sums.get(name), watcher)]

    def skeleton(self, site: Site, entry: Entry | None) -> Replacement:
        """Modules with factors of their own: what is missing in a file would be taken for tied. Dense ones for None."""
        modules: dict[nn.Module, nn.Module] = {}
        dense: Any = site.module
        for module in set(_members(site).values()):
            if entry is None:
                modules |= stock_tables([module], nn.Parameter(module.up.weight.new_empty(_shape(module))))  # type: ignore[union-attr, operator]
            else:
                sizes = [dense.weight.new_empty(size, entry.rank) for size in _shape(dense)]
                modules |= low_rank_tables([module], *map(nn.Parameter, sizes))
        return Replacement(modules, _ties(site, modules))

    @torch.no_grad()
    def build(self, name: str, site: Site, entry: Entry | None, source: Source) -> Built:
        """Modules that share the best factors in the metric; that share the product for None.

        Raises:
            TargetError: a module that should be tied holds another tensor.
        """
        members = _members(site)
        if entry is None:
            weight = _product(members)
            with ExitStack() as stack:
                for module in members.values():
                    stack.enter_context(aligned(module))
                modules = stock_tables(set(members.values()), weight)
            return Built(Replacement(modules, _ties(site, modules), retie=True))
        dense: Any = site.module
        for path, module in members.items():
            weight = module.get_parameter("weight")
            if weight is not dense.weight and not weight.is_meta:  # in files it cannot be seen
                raise TargetError(f"{path} is tied to {site.name} by the configuration, and holds another tensor")
        with named(site.name), ExitStack() as stack:
            for module in members.values():
                stack.enter_context(aligned(module))
            weight = dense.weight
            found = decompose_table(weight, source.table_moments(name))
            factors = [part.to(weight.device, weight.dtype) for part in found.cut(weight.detach().cpu(), entry.rank)]
            table, up = (nn.Parameter(part.contiguous(), weight.requires_grad) for part in factors)
            modules = low_rank_tables(set(members.values()), table, up)
        metric = "svd" if source.table_moments(name) is None else "fisher"
        return Built(Replacement(modules, _ties(site, modules), retie=True), found.relative_error(entry.rank), metric)


def _watch(module: nn.Module, table: TableMoments | None, watcher: Any) -> list[Any]:
    if table is None:  # of low rank already
        return []
    if isinstance(module, nn.Embedding):
        hooks = watcher.watch(
            module,
            lambda ids: table.add_ids(watcher.real("", ids[..., None])[:, 0]),
            lambda g: table.add_gradients(watcher.real("", g)),
        )
    else:
        hooks = watcher.watch(
            module,
            lambda x: table.add_head(watcher.real("", x), None),
            lambda g: table.add_head(None, watcher.real("", g)),
        )
    return list(hooks)


def _members(site: Site) -> Mapping[str, nn.Module]:
    return site.members if isinstance(site, TableSite) else {}


def _sites(start: str, host: PreTrainedModel) -> Iterator[TableSite]:
    low = {name for name, module in host.named_modules() if isinstance(module, LowRankTable)}
    known: set[str] = set()
    for wanted in embeddings_of(host):
        path = next((name for name, module in host.named_modules() if module is wanted), "")
        if path and path not in known and isinstance(wanted, (nn.Embedding, nn.Linear, LowRankTable)):
            try:
                members = _tied_to(host, path)
            except ValueError:  # ties of tables, of which only some became of low rank
                members = {path: host.get_submodule(path)}
            members |= _sharing(host, members[path])
            known |= set(members)
            yield _site(start, path, host, members)
    for name in sorted(low - known):
        if name not in known:
            members = _sharing(host, host.get_submodule(name))
            known |= set(members)
            why = (
                f"{start}{name} is of low rank, and neither input nor output of the whole {type(host).__name__}, whose "
                "plan has no place for it: merge this part first, hf_reparam.merge(part)"
            )
            yield replace(_site(start, name, host, members), stray=True, reason=why)


def _site(start: str, path: str, host: PreTrainedModel, members: Mapping[str, nn.Module]) -> TableSite:
    module: Any = members[path]
    tokens, width = _shape(module)
    embedding = isinstance(module, (nn.Embedding, LowRankEmbedding))
    bias = getattr(module, "bias", None)
    return TableSite(
        names=tuple(start + name for name in dict.fromkeys([path, *members])),
        module=module,
        kind="Embedding" if embedding else "Linear",
        in_features=tokens if embedding else width,
        out_features=width if embedding else tokens,
        weights=tokens * width,
        others=0 if bias is None else bias.numel(),
        entry=module.entry if isinstance(module, LowRankTable) else None,
        reason=_why_not(members),
        host=host,
        members=members,
    )


def _shape(module: Any) -> tuple[int, int]:
    """(tokens, width)."""
    low = isinstance(module, LowRankTable)
    return (module.out_features, module.in_features) if low else tuple(module.weight.shape)


def _why_not(members: Mapping[str, nn.Module]) -> str | None:
    for path, module in members.items():
        if isinstance(module, LowRankTable):
            return f"{path} is of low rank already: merge the model, and convert the dense one"
        if type(module) not in (nn.Embedding, nn.Linear):
            return f"{path} is a {type(module).__name__}"
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            return f"{path} has max_norm or sparse gradients"
    return None


def _tied_to(model: PreTrainedModel, name: str) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    groups = [{path for path, module in modules.items() if module is modules[name]}]
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            groups.append({_owner(target), _owner(source)})
    found = {name}
    while any(group & found and not group <= found for group in groups):
        found |= {path for group in groups if group & found for path in group}
    return {path: module for path, module in modules.items() if path in found}


def _sharing(model: PreTrainedModel, module: Any) -> dict[str, nn.Module]:
    """What shares the factors of a module, whatever is declared: adapters may have changed what is."""
    if not isinstance(module, LowRankTable):
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    low = {path: m for path, m in modules.items() if isinstance(m, LowRankTable)}
    return {path: m for path, m in low.items() if m.table.weight is module.table.weight}


def _owner(key: str) -> str:
    """The path of the module that a parameter of a table belongs to."""
    return key.removesuffix(".weight").removesuffix(".table").removesuffix(".up")


def _product(members: Mapping[str, nn.Module]) -> nn.Parameter:
    """The dense table of modules that share factors."""
    with ExitStack() as stack:
        for module in members.values():
            stack.enter_context(aligned(module))
        table, up = next(m.factors() for m in members.values() if isinstance(m, LowRankTable))
        if table.is_meta:
            raise WeightError("the embeddings are on the meta device and have no data")
        return nn.Parameter((table.double() @ up.double()).to(table.dtype), table.requires_grad)


def _ties(site: Site, modules: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """What the Transformers models must say is tied, once these modules are in place: tables, or their factors.

    Their classes name tables. Where these became of low rank the objects name factors, until they are dense again.
    """
    host: Any = site.host  # type: ignore[attr-defined]
    attributes = []
    for part in (m for m in host.modules() if isinstance(m, PreTrainedModel)):
        paths = dict(part.named_modules(remove_duplicate=False))
        low = {path: isinstance(modules.get(m, m), LowRankTable) for path, m in paths.items()}
        for attribute, known in tied_keys(part).items():
            if (ties := _renamed(known, low)) != dict(known):
                attributes.append((part, attribute, ties))
    return attributes


def _renamed(keys: Mapping[str, str], low: Mapping[str, bool]) -> dict[str, str]:
    """Tied parameters, target -> source, of tables as they will be: "x.weight", or "x.table.weight", "x.up.weight"."""
    ties: dict[str, str] = {}
    for target, source in keys.items():
        owner, other = _owner(target), _owner(source)
        if not target.endswith(".weight") or owner not in low:
            ties[target] = source
        elif low[owner]:
            ties |= {f"{owner}.{part}.weight": f"{other}.{part}.weight" for part in ("table", "up")}
        else:
            ties[f"{owner}.weight"] = f"{other}.weight"
    return ties
