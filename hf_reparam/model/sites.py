"""The sites of a model under their names in a plan: which of them a configuration means, and which a plan."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from hf_reparam.config import LowRankConfig, check_used, first_match
from hf_reparam.errors import PlanError, RankError, TargetError, WeightError
from hf_reparam.layers.dense import not_whole
from hf_reparam.model.checks import optional_layers, protected_layers
from hf_reparam.model.config import ReparamConfigMixin, plan_of
from hf_reparam.model.host import layer_name
from hf_reparam.model.naming import find_paths, loading, local_names, low_rank, shapes_may_differ
from hf_reparam.plan import Entry, RankPlan
from hf_reparam.report import BARE, SkippedReport
from hf_reparam.structures import STRUCTURES, Structure
from hf_reparam.structures.structure import Site


@dataclass(frozen=True)
class Found:
    """A site with its structure and its name in a plan."""

    name: str
    structure: Structure
    site: Site


@dataclass(frozen=True)
class Selection:
    """What may be held with fewer parameters, and every other weight of two or more dimensions, with the reason."""

    selected: tuple[Found, ...]
    skipped: tuple[SkippedReport, ...]


def select(model: nn.Module, config: LowRankConfig, asked: Container[str] = ()) -> Selection:
    """The sites that a configuration means, in a model as `opened` shows it.

    Args:
        model, config: patterns, and which structures, are read from the configuration.
        asked: paths of layers that a plan asks for, which brings optional ones in, as a mapping of ranks does.

    Raises:
        TargetError: a pattern matches nothing.
        WeightError: a layer's weights are in parts, partitioned or sharded among processes.
    """
    active = [s for s in STRUCTURES if s.option is None or getattr(config, s.option)]
    found = [(structure, site) for structure in active for site in structure.sites(model)]
    wanted: tuple[str, ...] | None = config.target_modules  # type: ignore[assignment]
    unwanted: tuple[str, ...] = config.exclude_modules  # type: ignore[assignment]
    names = [name for _, site in found for name in (*site.names, *site.aliases)]
    check_used(wanted or (), names, "target_modules")
    check_used(unwanted, names, "exclude_modules")
    asked = config.rank if isinstance(config.rank, Mapping) else asked
    reason_for = _reasons(model, wanted, unwanted, asked)
    selected, skipped = [], []
    for structure, site in found:
        reason = reason_for(structure, site)
        if reason is None:
            if (parts := not_whole(site.module)) is not None:
                raise WeightError(f"{site.name}: {parts}")
            selected.append(Found(layer_name(model, site.name), structure, site))
        elif structure.option is None or site.weights + site.others:  # heads hold numbers in their layers alone
            skipped.append(SkippedReport(site.name, site.kind, site.weights + site.others, reason))
    taken = {name for item in selected for name in item.site.names}
    others = _other_weights(model, {site.module for _, site in found})
    left = [row for row in (*skipped, *others) if row.name not in taken]
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    left.sort(key=lambda row: order.get(row.name, order.get(row.name.rpartition(".")[0], 0)))
    return Selection(tuple(selected), tuple(left))


def _reasons(
    model: nn.Module, wanted: tuple[str, ...] | None, unwanted: tuple[str, ...], asked: Container[str]
) -> Callable[[Structure, Site], str | None]:
    literal = frozenset(wanted or ())  # long lists of names are common, and slow as patterns
    protected = protected_layers(model)
    optional = {name: why for name, why in optional_layers(model).items() if name not in asked}

    def reason_for(structure: Structure, site: Site) -> str | None:
        names = (*site.names, *site.aliases)
        reasons = [protected[name] for name in site.names if name in protected] if structure.option is None else []
        if reasons or site.reason is not None:
            return next(iter(reasons), site.reason)
        if (pattern := first_match(unwanted, names)) is not None:
            return f"excluded by {pattern!r}"
        if structure.option is not None:  # the option asks for it
            return None
        if wanted is not None:
            named = not literal.isdisjoint(names) or first_match(wanted, names) is not None
            return None if named else "not in target_modules"
        stays = site.entry is None and all(name in optional for name in site.names)
        return optional[site.name] if stays else None

    return reason_for


def no_site(selection: Selection) -> TargetError:
    """The error for a model in which nothing can be factored, with the two commonest reasons."""
    reasons = Counter(item.reason for item in selection.skipped).most_common(2)
    why = "; ".join(f"{reason} ({count} weights)" for reason, count in reasons)
    return TargetError(f"the model has no dense layer that can be factored{': ' if why else ''}{why}")


def _other_weights(model: nn.Module, known: Container[nn.Module]) -> Iterator[SkippedReport]:
    """Weights of two or more dimensions in modules that are no sites; what is shared has its parameters once."""
    first: dict[nn.Parameter, str] = {}
    inside = {part for _, layer in low_rank(model) for part in layer.modules()}
    for name, module in model.named_modules():
        if module in known or module in inside:
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2:
                kind = type(module).__name__
                whole = key == "weight"
                reason = f"{kind} is not a dense layer" if whole else f"{BARE} of {kind}, no module of its own"
                path = name if whole else f"{name}.{key}".lstrip(".")
                if (shared := first.setdefault(parameter, path)) != path:
                    reason = f"shares the weights of {shared}"
                yield SkippedReport(path, kind, parameter.numel() if shared == path else 0, reason)


def check_forms(plan: RankPlan) -> None:
    """Raise PlanError for an entry of a form that this version does not know."""
    known = [form for structure in STRUCTURES for form in structure.forms]
    for name, entry in plan.modules.items():
        if entry.form not in known:
            raise PlanError(
                f"{name}: the plan holds it as {entry.form!r}, and this hf_reparam knows {known}: install the "
                "hf_reparam that wrote it"
            )


def fit(
    plan: RankPlan, model: nn.Module, structure: Structure, *, strict: bool, other_heads: bool = False
) -> dict[str, tuple[Found, Entry]]:
    """Name in a plan -> site and entry, for all that a plan says of one structure and that is not so already.

    Args:
        plan: the plan.
        model, structure: a model whose sites of earlier structures are as the plan says.
        strict: names that lead nowhere are errors; otherwise, and while a model is loaded, only such that lead to
            what cannot be held so.
        other_heads: a name whose first component the base model does not have may be one of another head.

    Raises:
        PlanError: a name leads nowhere, or to what cannot be held so, or its rank does not fit.
    """
    entries = plan.of(structure.forms)
    if not entries:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = {path: site for site in structure.sites(model) for path in site.names}
    base: set[str] = set()
    if isinstance(model, PreTrainedModel):
        paths, strict = find_paths(model, entries), strict and not loading()
        base = {child for child, _ in model.base_model.named_children()}
    else:
        paths, other_heads = {layer_name(model, path): path for path in (*modules, *sites)}, False
    protected = protected_layers(model) if structure.option is None else {}
    found: dict[str, tuple[Found, Entry]] = {}
    for name, entry in entries.items():
        path = paths.get(name)
        if path is None:
            if strict and (not other_heads or name.partition(".")[0] in base):
                raise PlanError(f"{name}: the plan names it, and {type(model).__name__} has no such module")
            continue
        site = sites.get(path)
        if site is None:
            kind = type(modules[path]).__name__ if path in modules else "Parameter"
            what = ", not a dense layer" if structure.option is None else f"; of such there are {sorted(sites)[:3]}"
            raise PlanError(f"{name}: the plan holds it as {entry.form!r}, and it is of type {kind}{what}")
        if site.entry == entry:
            continue
        reason = protected.get(path) or site.reason
        if reason is not None:
            stays = "dense" if site.entry is None else "as it is"
            raise PlanError(f"{name}: the plan holds it as {entry.form!r}, and it stays {stays}: {reason}")
        try:
            structure.cost(site, entry)
        except RankError as error:
            if shapes_may_differ():
                continue  # a new layer of another shape than the plan was made for
            another = (
                ". If another size is meant, as for a new head, ignore_mismatched_sizes=True makes a new, dense layer"
            )
            raise PlanError(f"{name}: the plan gives it {error}{another * loading()}") from None
        if site.entry is not None and entry.rank > site.entry.rank:  # which cannot be won back
            raise PlanError(f"{name}: the plan gives it rank {entry.rank}, above the {site.entry.rank} it has already")
        found[name] = (Found(name, structure, site), entry)
    return found


def live_sites(model: nn.Module) -> list[Site]:
    """What a live model holds with fewer parameters. Raises TargetError where its plan has no place for a part."""
    sites = [site for structure in STRUCTURES for site in structure.sites(model) if site.entry is not None]
    for site in sites:
        if site.stray:
            raise TargetError(str(site.reason))
    return sites


def entries_of(model: nn.Module) -> dict[str, Entry]:
    """Name in a plan -> entry, of all that a live model holds with fewer parameters."""
    return {layer_name(model, site.name): site.entry for site in live_sites(model) if site.entry is not None}


def note_plan(model: PreTrainedModel) -> None:
    """Let a model's configuration say what the model has, under the names that it has there."""
    if not isinstance(model.config, ReparamConfigMixin):
        return
    plan = replace(plan_of(model.config), modules=entries_of(model))
    if plan.record is not None and plan.record.errors:
        errors, metrics = local_names(model, plan.record.errors), local_names(model, plan.record.metrics)
        plan = replace(plan, record=replace(plan.record, errors=errors, metrics=metrics))
    model.config.reparam = plan.to_dict()
