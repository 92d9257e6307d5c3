"""The configuration: what is asked of a conversion. Frozen, valid in itself, JSON in and out.

And the patterns in which it names layers: the end of a name, a glob over the whole name, or `re:` and a regular
expression.
"""

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from hf_reparam.errors import RankError, TargetError

Rank = int | float | Mapping[str, int | float]
"""An int (the rank), a float in (0, 1] (fraction of min(in, out)), or a mapping of name patterns to either."""

FORMS = ("pair", "pivoted")
METRICS = ("svd", "activation", "fisher")
ALLOCATIONS = ("global", "uniform")
SOLVERS = ("exact", "randomized")

_CHOICES = {"form": FORMS, "metric": METRICS, "allocation": ALLOCATIONS, "solver": SOLVERS}
ONE_SIZE = (
    "give exactly one size, such as keep=0.5 for half of the layers' parameters: rank, keep, target_params, speedup, a "
    "plan or a LowRankConfig with one"
)
_SIZES = ("rank", "keep", "target_params", "speedup")
_OF_BUDGETS = ("allocation", "multiple_of", "min_rank", "least_saving", "embeddings", "heads", "verify")


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRankConfig:
    """What is asked of a conversion.

    Give one size; none for `search_plan`, which finds it.

    Args:
        rank: an int; a float in (0, 1] for that fraction of min(in, out); or a mapping of name patterns to either, in
            which the first match decides and layers that none matches stay dense.
        keep: in (0, 1], the share of their weights, biases not counted, that the *targeted* layers together may keep;
            ranks are chosen. At 1.0 nothing is factored.
        target_params: parameters that the *whole* model may have, everything counted: an int, or a float in (0, 1] for
            that share of what it has.
        speedup: at least 1, how many times as fast the *targeted* layers together are to become, on the device where
            they are, with `tokens` tokens in a call. Ranks and forms are chosen by measured times.
        target_modules: patterns of layers to convert: the end of a name ("query"), a glob over the whole name
            ("*.layer.0.*"), or `re:` and a regular expression over it. None for all, except what stays dense by default
            in Transformers models: task heads, poolers and the routers of experts.
        exclude_modules: patterns of layers to leave alone; wins over `target_modules`.
        metric: "svd", "activation" or "fisher". Default: the richest that the calibration supports.
        allocation: "global" (default in the fisher metric): minimise the predicted increase of the loss, with staying
            dense as one of the choices. "uniform" (default otherwise): every layer gets the same share.
        form: "pair" (default with `rank`), or "pivoted" (default otherwise): the same function, fewer parameters.
            With `speedup` the faster one for every layer by default.
        multiple_of: ranks that a budget gives are multiples of this. Default: 8, which suits tensor cores, where
            min(in, out) is 256 or more, and 1 below.
        min_rank: no lower rank is chosen for a budget; layers that would not become smaller at it stay dense.
        least_saving: share of its parameters that a layer has to save, or global allocation leaves it dense; not with
            `speedup`.
        tokens: rows of a call for which `speedup` is meant: batch size times length; 1 for decoding. Default: 1024.
        compiled: whether `speedup` is meant for the model as `torch.compile` makes it run.
        solver: "exact", or "randomized": faster where ranks are small, see `hf_reparam.linalg.factorize.decompose`.
        embeddings: also choose ranks for the input embeddings, with a head that is tied to them, and an untied head.
        heads: also let heads of attentions become narrower where that is predicted to cost less; in the fisher metric
            with global allocation. Neither `embeddings` nor `heads` go with `speedup`.
        verify: measure layers on held-out calibration data, try the plan for a budget beside uniform ones, and take the
            best; not done with `heads` or uniform allocation, nor for a model that is offloaded.
        allow_larger: with `rank`, also convert layers whose product would hold no fewer parameters than the layer.

    Raises:
        RankError: a size, `multiple_of`, `min_rank`, `least_saving` or `tokens` is out of range.
        TargetError: several sizes, an unknown metric, allocation, form or solver, a malformed pattern, a switch that is
            no bool, or options that mean nothing together.

    >>> LowRankConfig(keep=0.6, target_modules="query", metric=None)
    LowRankConfig(keep=0.6, target_modules=['query'])
    """

    rank: Rank | None = None
    keep: float | None = None
    target_params: int | float | None = None
    speedup: float | None = None
    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] = ()
    metric: str | None = None
    allocation: str | None = None
    form: str | None = None
    multiple_of: int | None = None
    min_rank: int = 8
    least_saving: float = 0.1
    tokens: int | None = None
    compiled: bool = False
    solver: str = "exact"
    embeddings: bool = False
    heads: bool = False
    verify: bool = True
    allow_larger: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", as_patterns(self.target_modules, "target_modules"))
        object.__setattr__(self, "exclude_modules", as_patterns(self.exclude_modules, "exclude_modules") or ())
        if isinstance(self.rank, Mapping):
            object.__setattr__(self, "rank", dict(self.rank))
        _check_sizes(self)
        for option, allowed in _CHOICES.items():
            value = getattr(self, option)
            if value not in allowed and not (value is None and option != "solver"):
                raise TargetError(f"{option} must be one of {list(allowed)}, got {value!r}")
        for option in ("multiple_of", "min_rank", "tokens"):
            value = getattr(self, option)
            if not (value is None and option != "min_rank") and (not is_int(value) or value < 1):
                raise RankError(f"{option} must be an int of at least 1, got {value!r}")
        if not is_number(self.least_saving) or not 0 <= self.least_saving < 1:
            raise RankError(f"least_saving must be in [0, 1), a share of a layer, got {self.least_saving!r}")
        for option in ("embeddings", "heads", "verify", "allow_larger", "compiled"):
            if not isinstance(getattr(self, option), bool):
                raise TargetError(f"{option} must be True or False, got {getattr(self, option)!r}")
        _check_together(self)

    def __repr__(self) -> str:  # what is not as by default
        return f"LowRankConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @property
    def sized(self) -> bool:
        """Whether it has a size."""
        return any(getattr(self, size) is not None for size in _SIZES)

    @property
    def stored_form(self) -> str:
        """The form of dense layers, where none was asked for that of the size."""
        return self.form or ("pair" if self.rank is not None else "pivoted")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the options that are not as they are by default."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LowRankConfig":
        """Read the JSON form; TargetError for an unknown option."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise TargetError(f"unknown options {unknown[:3]}; known are {[f.name for f in fields(cls)]}")
        return cls(**data)

    @classmethod
    def asked(cls, config: "LowRankConfig | None", **sizes: Rank | None) -> "LowRankConfig":
        """A configuration with one size, its own or one of rank, keep, target_params and speedup beside it; TargetError
        for none or several."""
        if config is not None and not isinstance(config, cls):
            got = f"{type(config).__name__}{f': for a size write keep={config}' if _is_share(config) else ''}"
            raise TargetError(f"give a LowRankConfig (`convert` also takes a RankPlan), got {got}")
        given = {name: size for name, size in sizes.items() if size is not None}
        if (config is not None and config.sized) + len(given) != 1:
            raise TargetError(ONE_SIZE)
        return cls(**({} if config is None else config.to_dict()) | given)


def _check_sizes(config: LowRankConfig) -> None:
    rank, keep, target = config.rank, config.keep, config.target_params
    if sum(getattr(config, size) is not None for size in _SIZES) > 1:
        raise TargetError("give one of rank, keep, target_params and speedup")
    if config.speedup is not None and not (is_number(config.speedup) and 1 <= config.speedup < math.inf):
        raise RankError(f"speedup must be a number of at least 1, such as 1.5, got {config.speedup!r}")
    ranks: dict[str, Any] = {} if rank is None else {"rank": rank}
    if isinstance(rank, Mapping):
        as_patterns(rank, "rank")
        if not rank:
            raise RankError("rank is an empty mapping; give at least one pattern, such as {'query': 32}")
        ranks = {f"rank[{pattern!r}]": value for pattern, value in rank.items()}
    for where, value in ranks.items():
        if not (is_int(value) and value >= 1) and not _is_share(value):
            raise RankError(
                f"{where} must be an int of at least 1, or a float in (0, 1] for that fraction of min(in, out), got "
                f"{value!r}"
            )
    if keep is not None and not _is_share(keep):
        percent = f": for {keep:g} % give {keep / 100:g}" if isinstance(keep, (int, float)) and 2 <= keep <= 100 else ""
        raise RankError(f"keep must be in (0, 1], the share of the targeted layers' parameters, got {keep!r}{percent}")
    if target is not None and not is_int(target) and not _is_share(target):
        raise RankError(
            "target_params must be an int, the parameters of the whole model, or a float in (0, 1] for that share of "
            f"them, got {target!r}"
        )


def _check_together(config: LowRankConfig) -> None:
    """Refuse options that the others leave without a meaning."""
    if config.rank is not None:
        idle = [option for option in _OF_BUDGETS if option in config.to_dict()]
        if idle:
            raise TargetError(
                f"{idle[0]} goes with a budget (keep, target_params or speedup), and rank is none: leave one out"
            )
    elif config.allow_larger:
        raise TargetError("allow_larger goes with rank: a budget never makes a layer larger")
    if config.speedup is None and (config.tokens is not None or config.compiled):
        raise TargetError("tokens and compiled say for which calls a speedup is meant: they go with speedup")
    if config.speedup is not None and (config.embeddings or config.heads):
        raise TargetError("speedup counts the time of dense layers: leave out embeddings and heads")
    uniform = config.allocation == "uniform" or (config.allocation is None and config.metric in METRICS[:2])
    if "least_saving" in config.to_dict() and (config.speedup is not None or uniform):
        raise TargetError("least_saving goes with global allocation of parameters, not with speedup or uniform shares")
    if config.heads and (config.metric in METRICS[:2] or config.allocation == "uniform"):
        raise TargetError(
            "heads=True compares what heads and layers lose: it needs the fisher metric and global allocation"
        )


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return is_number(value) and 0 < value <= 1


def as_patterns(value: str | Iterable[str] | None, option: str) -> tuple[str, ...] | None:
    """One pattern or several as a tuple; None stays None. TargetError for anything that is no pattern."""
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TargetError(f"{option}: a pattern is a string such as '*.query' or 're:.*query', got {pattern!r}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise TargetError(f"{option}: {pattern!r} is not a regular expression: {error}") from None
    return patterns


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern covers the name: a glob, whose `*` crosses dots, the whole name; other text its end, too.

    >>> [matches(p, "encoder.layer.0.attention.self.query") for p in ("query", "self.query", "*.query", "elf.query")]
    [True, True, True, False]
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def first_match(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first pattern that covers one of a layer's names, or None."""
    return next((pattern for pattern in patterns if any(matches(pattern, name) for name in names)), None)


def check_used(patterns: Iterable[str], names: Sequence[str], option: str) -> None:
    """Raise TargetError for a pattern that covers no name, listing names near to it."""
    known = set(names)
    for pattern in patterns:
        if pattern not in known and not any(matches(pattern, name) for name in names):
            near = _near(pattern, names)
            endings = Counter(name.rpartition(".")[2] for name in known).most_common(8)
            names_end = f"; names end in {', '.join(sorted(end for end, _ in endings))}"
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else names_end
            raise TargetError(
                f"{option}: {pattern!r} matches none of the {len(names)} layers (a pattern covers the end of a "
                f"name, a glob the whole name){hint}"
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    bare = pattern.removeprefix("re:").strip("*.^$\\")
    last = bare.rpartition(".")[2]
    endings = {name.rpartition(".")[2] for name in names}
    if last in endings:
        return [f"*.{last}", *[name for name in names if name.endswith(last)][:2]]
    found = difflib.get_close_matches(bare, names, n=2, cutoff=0.5)
    return [f"*.{end}" for end in difflib.get_close_matches(last, sorted(endings), n=2, cutoff=0.6)] + found


def layer_kind(name: str) -> str:
    """A layer's name with `*` for its numbers, the same for the layers that repeat in a model.

    >>> layer_kind("encoder.layer.11.output.dense")
    'encoder.layer.*.output.dense'
    """
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
