"""From what a user asks for, a number, a fraction or a mapping of patterns, to one rank for each layer."""

import math
from collections.abc import Mapping, Sequence

from hf_reparam.errors import RankError, TargetError
from hf_reparam.nn.patterns import as_patterns, check_used, first_match
from hf_reparam.nn.targets import Skipped, Target

__all__ = ["Rank", "choose_ranks"]

Rank = int | float | Mapping[str, int | float]
"""An int (the rank), a float in (0, 1] (fraction of min(in, out)), or a mapping of name patterns to either."""


def choose_ranks(
    targets: Sequence[Target], rank: Rank, *, allow_larger: bool = False
) -> tuple[dict[str, int], tuple[Skipped, ...]]:
    """One rank for each target, or the reason why it stays as it is.

    Args:
        targets: the layers.
        rank: see `Rank`. In a mapping the first pattern that matches a layer decides; layers that none matches stay.
        allow_larger: also factor layers whose pair would hold as many numbers as the layer, or more.

    Returns:
        name -> rank, and the skipped layers.

    Raises:
        RankError: not an int >= 1 or a float in (0, 1]; above min(in, out) of a layer that a pattern names, or of every
            layer; above the rank that a low-rank layer already has.
        TargetError: a pattern of the mapping matches nothing, or no layer at all would become smaller.
    """
    rules = _rules(rank)
    if isinstance(rank, Mapping):
        check_used(rules, [name for t in targets for name in t.names], "rank")
    ranks: dict[str, int] = {}
    skipped = []
    for target in targets:
        pattern = first_match(rules, target.names)
        if pattern is None:
            skipped.append(_skip(target, "no pattern of `rank` matches"))
            continue
        wanted = _wanted(target, rules[pattern], explicit=isinstance(rank, Mapping) and target.name == pattern)
        reason = _useless(target, wanted, allow_larger)
        if reason is None:
            ranks[target.name] = wanted
        else:
            skipped.append(_skip(target, reason))
    if not ranks:
        raise _nothing(targets, skipped, rank)
    return ranks, tuple(skipped)


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
    if target.rank is not None and target.rank < wanted <= target.full_rank:
        raise RankError(
            f"{target.name}: it already has rank {target.rank}, and rank {wanted} cannot be won back from its factors; "
            "ask for a lower rank, exclude the layer, or convert the original dense model"
        )
    return wanted


def _useless(target: Target, wanted: int, allow_larger: bool) -> str | None:
    if target.rank == wanted:
        return f"already has rank {wanted}"
    if wanted > target.full_rank:
        return f"rank {wanted} is above min(in, out) = {target.full_rank}"
    if not allow_larger and target.pair_parameters(wanted) >= target.parameters:
        return f"a pair of rank {wanted} would not be smaller: {_shape(target)} pays below {_break_even(target)}"
    return None


def _break_even(target: Target) -> int:
    """The smallest rank at which a pair holds at least as many numbers as the dense weight."""
    return math.ceil(target.in_features * target.out_features / (target.in_features + target.out_features))


def _skip(target: Target, reason: str) -> Skipped:
    return Skipped(target.name, target.kind, target.parameters, reason)


def _shape(target: Target) -> str:
    return f"{target.in_features} x {target.out_features}"


def _nothing(targets: Sequence[Target], skipped: Sequence[Skipped], rank: Rank) -> TargetError | RankError:
    if not targets:
        return TargetError("the model has no dense layer that can be factored")
    largest = max(t.full_rank for t in targets)
    if isinstance(rank, int) and rank > largest:
        return RankError(f"rank {rank} is above min(in, out) of every layer; the largest of them is {largest}")
    useful = max(_break_even(t) for t in targets) - 1
    return TargetError(
        f"no layer would change: {skipped[0].name}: {skipped[0].reason} (and {len(skipped) - 1} more). The highest "
        f"rank that makes any layer smaller is {useful}; allow_larger=True converts all the same"
    )
