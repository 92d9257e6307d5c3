"""The long work of a conversion, and of the way back: every part made, stored and put in place in a working copy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_reparam.compat.accelerate import aligned, execution_device
from hf_reparam.layers.copies import WorkingCopy
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.offload import build_layers
from hf_reparam.layers.surgery import independent_copy, replace_modules, set_attribute, undone_on_error
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.moments import LayerMoments
from hf_reparam.model.host import mark_offloaded
from hf_reparam.model.retype import retie
from hf_reparam.model.sites import Found, fit
from hf_reparam.plan import Entry, RankPlan
from hf_reparam.structures import STRUCTURES, Structure, changed, close_attentions
from hf_reparam.structures.source import Source
from hf_reparam.structures.structure import Built, Replacement

M = TypeVar("M", bound=nn.Module)


@dataclass
class Made:
    """What was made.

    Args:
        errors: name in a plan -> relative error; None for what was of low rank before.
        metrics: name in a plan -> metric, where it is known.
        modules: all new modules.
        attributes: (module of the working copy, name, value) that were set beside.
        stored: paths of the sites whose modules are in a folder.
        retie: whether Transformers models have to tie their parameters anew.
    """

    errors: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    retie: bool = False

    def put(self, new: Replacement, model: nn.Module) -> None:
        """Put a replacement in place in a working copy."""
        new.install(model)
        self.modules += new.new()
        self.attributes += new.attributes


def build(
    work: WorkingCopy,
    structure: Structure,
    parts: Mapping[str, tuple[Found, Entry | None]],
    source: Source,
    made: Made,
    folder: Path | None,
    *,
    desc: str,
) -> Source:
    """Make all parts of one structure and put them in place in the working copy.

    Args:
        work: the working copy; it is changed.
        structure: the structure.
        parts: name in a plan -> site and entry; None for dense again.
        source: metric and moments.
        made: to be added to.
        folder: where new modules go instead of into memory; those that it holds already are taken from there.
        desc: what the progress bar calls it.

    Returns:
        The source with the moments that new dense layers have.

    Raises:
        WeightError: a weight or its moments are not finite or not there.
        CheckpointError: as `build_layers`.
    """
    place = None if folder is None or structure.stays_in_memory else folder / structure.forms[0]
    shapes: dict[str, Replacement] = {}
    seen: dict[str, Built] = {}

    def make(name: str) -> tuple[nn.ModuleList, float | None]:
        found, entry = parts[name]
        built = structure.build(name, found.site, entry, source)
        if structure.changes_moments:
            seen[name] = replace(built, replacement=Replacement({}))
        if place is None:  # else it is written, and not held
            shapes[name] = built.replacement
        return built.replacement.new(), built.error

    def empty(name: str) -> nn.ModuleList:
        found, entry = parts[name]
        shapes[name] = structure.skeleton(found.site, entry)
        return shapes[name].new()

    devices = {name: execution_device(found.site.module) for name, (found, _) in parts.items()}
    costs = {name: found.structure.effort(name, found.site, source) for name, (found, _) in parts.items()}
    layers = build_layers(
        costs, make, empty, devices, place, made_of=lambda name: _made_of(name, *parts[name], source), desc=desc
    )
    moments: dict[str, Callable[[], LayerMoments]] = {}
    gone: frozenset[str] = frozenset()
    origins: dict[str, str] = {}
    new: list[Replacement] = []
    for name, (modules, error) in layers.items():
        found, entry = parts[name]
        if structure.changes_moments and entry is not None and source.calibration is not None:
            built = seen.get(name) or structure.build(name, found.site, entry, source)
            moments |= built.moments
            gone |= built.gone
            origins |= dict.fromkeys(built.moments, _made_of(name, found, entry, source)) if place is not None else {}
        new.append((shapes.get(name) or structure.skeleton(found.site, entry)).of(modules))
        made.stored += found.site.names[:1] if place is not None else ()
        _note(found, entry, list(modules), error, source, made)
    made.put(Replacement.joined(new), work.model)
    made.retie |= structure.ties
    return source.with_layers(moments, gone, origins)


def _note(
    found: Found, entry: Entry | None, modules: list[nn.Module], error: float | None, source: Source, made: Made
) -> None:
    known = (source.metric_of(name) for name in found.site.moments(found.name))  # any that saw data
    metric = next((m for m in known if m != "svd"), "svd") if found.site.weights else source.metric
    for module in modules:
        if isinstance(module, Factored):
            module.error, module.metric = error, metric
            module.from_rank = None if found.site.entry is None else found.site.entry.rank
    if entry is not None:
        made.errors[found.name] = error
        made.metrics[found.name] = metric


def _made_of(name: str, found: Found, entry: Entry | None, source: Source) -> str:
    """A fingerprint of all that a part comes from: its weights, its moments, metric, solver, entry, version."""
    module = found.site.module
    with aligned(module):
        weights = fingerprint(repr(module), getattr(module, "dense_type", None), module.state_dict())
    how = [source.metric, source.solver, found.site.entry, entry, version("hf-reparam")]
    return fingerprint(weights, source.made_of(name), *how)


def finished(model: M, work: WorkingCopy, made: Made, retype: Callable[[M], None], *, inplace: bool) -> M:
    """Put everything in place, and give every Transformers model its class; all of it, or nothing."""
    result = model if inplace else independent_copy(work.model, made.modules)
    with undone_on_error(result):
        if inplace:
            install(model, work, made)
        retype(result)
        if made.retie:
            retie(result, made.modules)
        mark_offloaded(result, made.stored)
        if not isinstance(result, PreTrainedModel):
            close_attentions(result)
    work.clear()
    return result


def install(model: nn.Module, work: WorkingCopy, made: Made) -> None:
    """Make the original what its working copy has become."""
    replaced: dict[nn.Module, nn.Module] = {}
    for copy, copied in work.originals.items():
        for name, child in copy._modules.items():
            old = copied._modules.get(name)
            if child is not None and old is not None and (work.originals.get(child) is not old or changed(child)):
                replaced[old] = child
    replace_modules(model, replaced)
    for module, name, value in made.attributes:
        original = work.originals.get(module)
        if type(original) is type(module):  # not what is shown in split form, which comes in whole
            set_attribute(original, name, value)


def apply(work: WorkingCopy, plan: RankPlan, source: Source, folder: Path | None = None) -> tuple[Made, Source]:
    """Make all that a plan of known forms names, and put it in place in a working copy.

    Raises:
        PlanError: the plan does not fit.
    """
    made = Made()
    for structure in STRUCTURES:
        parts = fit(plan, work.model, structure, strict=True)
        if parts:
            source = build(work, structure, parts, source, made, folder, desc="factoring")
    return made, source
