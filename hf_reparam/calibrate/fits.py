"""Whether a calibration is of this model."""

from collections.abc import Iterable, Sequence

from torch import nn

from hf_reparam.errors import WeightError
from hf_reparam.linalg.calibration import shapes_of_layers
from hf_reparam.model.host import hosts, layer_name
from hf_reparam.model.sites import Found
from hf_reparam.structures.source import Source


def check_fit(model: nn.Module, found: Iterable[Found], source: Source) -> None:
    """Raise WeightError for moments of another model than the one that these sites are in.

    Of a Transformers model whole parts may be without data: a head, where its base was calibrated without it, and the
    other way round. A part of which only some layers are known, or layers of another shape, are of another model.
    """
    if source.metric == "svd" or source.calibration is None:
        return
    targeted = [item for item in found if item.site.weights and item.structure.option is None]
    named = {name: item.site for item in targeted for name in item.site.moments(item.name)}
    known = shapes_of_layers(source.calibration.layers)
    if not known:
        return
    for name in named.keys() & known.keys():
        theirs, own = known[name], (named[name].in_features, named[name].out_features)
        if theirs[0] != own[0] or theirs[1] not in (None, own[1]):
            shape = " x ".join(str(size) for size in theirs if size is not None)
            raise WeightError(
                f"{name}: the calibration is of a layer of {shape}, and here it is {own[0]} x {own[1]}: {_OTHER}"
            )
    every = {layer_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)} | named.keys()
    missing, foreign = sorted(named.keys() - known.keys()), sorted(known.keys() - every)
    starts = list(hosts(model))
    if starts and named.keys() & known.keys():
        ours, theirs_parts = ({_part(name, starts) for name in names} for names in (named, known))
        missing = [name for name in missing if _part(name, starts) in theirs_parts]
        foreign = [name for name in foreign if _part(name, starts) in ours]
    if missing or foreign:
        apart = [f"{_example(missing)}, are not in it"] if missing else []
        apart += [f"{_example(foreign)}, are in it and not in the model"] if foreign else []
        raise WeightError(
            f"the calibration does not fit {type(model).__name__}: of the model's {len(named)} layers and its "
            f"{len(known)}, {'; '.join(apart)}: {_OTHER}"
        )


_OTHER = "it is of another model, or of another version of it; calibrate this one"


def _part(name: str, starts: Sequence[str]) -> str:
    """The part of a Transformers model that a layer is in; the layer's own name outside of these."""
    start = next((start for start in starts if name.startswith(start)), None)
    return name if start is None else start + name.removeprefix(start).partition(".")[0]


def _example(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{len(listed)} layers, among them {listed[:2]}"
