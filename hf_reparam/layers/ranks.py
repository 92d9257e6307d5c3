"""From what a user asks for, a number, a fraction or a mapping of patterns, to one rank for each layer."""

import math
from collections.abc import Mapping, Sequence

from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.patterns import as_patterns, check_used, first_match
from hf_reparam.layers.targets import Skipped, Target
from hf_reparam.plan import LayerSpec

__all__ = ["Rank", "choose_ranks"]

Rank = int | float | Mapping[str, int | float]
"""An int (the rank), a float in (0, 1] (fraction of min(in, out)), or a mapping of name patterns to either."""


def choose_ranks(
    targets: Sequence[Target], rank: Rank, *, form: str = "pair", allow_larger: bool = False
) -> tuple[dict[str, LayerSpec], tuple[Skipped, ...]]:
    """One rank for each target, or the reason why it stays as it is.

    Args:
        targets: the layers.
        rank: see `Rank`. In a mapping the first pattern that matches a layer decides; layers that none matches stay.
        form: "pair" or "pivoted", for all layers.
        allow_larger: also factor layers whose product would hold as many numbers as the layer, or more.

    Returns:
        name -> LayerSpec, and the skipped layers.

    Raises:
        RankError: not an int >= 1 or a float in (0, 1]; above min(in, out) of a layer that a pattern names, or of every
            layer; above the rank that a low-rank layer already has.
        TargetError: a pattern of the mapping matches nothing, or no layer at all would become smaller.
    """
    rules = _rules(rank)
    if isinstance(rank, Mapping):
        check_used(rules, [name for t in targets for name in t.names], "rank")
    specs: dict[str, LayerSpec] = {}
    skipped = []
    for target in targets:
        pattern = first_match(rules, target.names)
        if pattern is None:
            skipped.append(_skip(target, "no pattern of `rank` matches"))
            continue
        explicit = isinstance(rank, Mapping) and target.name == pattern
        spec = LayerSpec(_wanted(target, rules[pattern], explicit=explicit), form)
        reason = _useless(target, spec, allow_larger)
        if reason is None:
            specs[target.name] = spec
        else:
            skipped.append(_skip(target, reason))
    if not specs:
        raise _nothing(targets, skipped, rank, form)
    return specs, tuple(skipped)


def _rules(rank: Rank) -> dict[str, int | float]:
    if not isinstance(rank, Mapping):
        return {"*": _checked(rank, "rank")}
    as_patterns(rank, "rank")
    if not rank:
        raise RankError("rank is an empty mapping; give at least one pattern, such as {'*.query': 32}")
    return {pattern: _checked(value, f"rank[{pattern!r}]") for pattern, value in rank.items()}


def _checked(value: object, where: str) -> int | float:
    allowed = "an int of at least 1, or a float in (0, 1] for that fraction of min(in, out)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RankError(f"{where} must be {allowed}, got {value!r}")
    if isinstance(value, int) and value < 1:
        raise RankError(f"{where} must be {allowed}, got {value}")
    if isinstance(value, float) and not (math.isfinite(value) and 0 < value <= 1):
        raise RankError(f"{where} must be {allowed}, got {value}")
    return value


def _wanted(target: Target, value: int | float, *, explicit: bool) -> int:
    wanted = max(1, round(value * target.full_rank)) if isinstance(value, float) else value
    if explicit and wanted > target.full_rank:
        raise RankError(f"{target.name}: rank {wanted} is above min(in, out) = {target.full_rank} ({_shape(target)})")
    if target.spec is not None and target.spec.rank < wanted <= target.full_rank:
        raise RankError(
            f"{target.name}: it already has rank {target.spec.rank}, and rank {wanted} cannot be won back from its "
            "factors; ask for a lower rank, exclude the layer, or convert the original dense model"
        )
    return wanted


def _useless(target: Target, spec: LayerSpec, allow_larger: bool) -> str | None:
    if target.spec == spec:
        return f"already has rank {spec.rank}"
    if spec.rank > target.full_rank:
        return f"rank {spec.rank} is above min(in, out) = {target.full_rank}"
    if spec.form == "pivoted" and spec.rank == target.in_features:
        return f"in pivoted form its rank must be below its {target.in_features} inputs"
    if not allow_larger and target.parameters_as(spec) >= target.parameters:
        pays = f"{_shape(target)} pays below {_break_even(target, spec.form)}"
        return f"a {'pair' if spec.form == 'pair' else 'pivoted form'} of rank {spec.rank} would not be smaller: {pays}"
    return None


def _break_even(target: Target, form: str) -> int:
    """The smallest rank at which a layer in this form holds at least as many numbers as the dense weight."""
    if form == "pivoted":
        return target.full_rank
    return math.ceil(target.in_features * target.out_features / (target.in_features + target.out_features))


def _skip(target: Target, reason: str) -> Skipped:
    return Skipped(target.name, target.kind, target.parameters, reason)


def _shape(target: Target) -> str:
    return f"{target.in_features} x {target.out_features}"


def _nothing(targets: Sequence[Target], skipped: Sequence[Skipped], rank: Rank, form: str) -> TargetError | RankError:
    if not targets:
        return TargetError("the model has no dense layer that can be factored")
    largest = max(t.full_rank for t in targets)
    if isinstance(rank, int) and rank > largest:
        return RankError(f"rank {rank} is above min(in, out) of every layer; the largest of them is {largest}")
    useful = max(_break_even(t, form) for t in targets) - 1
    return TargetError(
        f"no layer would change: {skipped[0].name}: {skipped[0].reason} (and {len(skipped) - 1} more). The highest "
        f"rank that makes any layer smaller is {useful}; allow_larger=True converts all the same"
    )
