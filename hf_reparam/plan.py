"""The rank plan: what is decided. Which parts of a model are held with fewer parameters, how, and of which rank.

With the base configuration it is all that is needed to build the skeleton of a converted model: loading runs no SVD.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_reparam.config import METRICS, as_patterns, check_used, first_match, is_int, is_number
from hf_reparam.errors import PlanError
from hf_reparam.tables import Part, Readable

if TYPE_CHECKING:  # a plan carries its report, and prints it
    from hf_reparam.report import Report

FORMAT_VERSION = 1
"""Version of the `reparam` entry in `config.json`."""

_MAX_MODULES = 100_000  # far above any model's count of dense layers; bounds the work a hostile file can ask for
_MAX_NAME = 512
_NAME = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_FORM = re.compile(r"[a-z_]{1,32}")
_PLAN_KEYS = frozenset({"format_version", "base_model_type", "metric", "modules", "record"})
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """How one part of a model is held.

    Args:
        rank: the inner width r of a product, 1 <= r; for "heads" the width of each head. Whether it fits is checked
            when it is applied.
        form: which structure holds it: "pair" for y = up(down(x)), down (r, in), up (out, r); "pivoted" for
            y = up(x[p] + down(x[rest])), down (r, in - r), up (out, r), r^2 fewer parameters; "table" for embeddings;
            "heads" for narrower heads of an attention; "experts" for the fused experts of a MoE layer.

    Raises:
        PlanError: the rank is not a positive int, or the form is no word.

    >>> Entry(rank=64).to_dict()
    {'form': 'pair', 'rank': 64}
    """

    rank: int
    form: str = "pair"

    def __post_init__(self) -> None:
        if not is_int(self.rank) or self.rank < 1:
            raise PlanError(f"rank must be an int of at least 1, got {_short(self.rank)}")
        if not isinstance(self.form, str) or not _FORM.fullmatch(self.form):
            raise PlanError(f"form must be a word such as 'pair', got {_short(self.form)}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"form": self.form, "rank": self.rank}

    @classmethod
    def from_dict(cls, data: object) -> "Entry":
        """Read the JSON form; PlanError on anything else."""
        if not isinstance(data, Mapping) or set(data) != {"rank", "form"}:
            keys = sorted(map(str, data))[:4] if isinstance(data, Mapping) else _short(data)
            raise PlanError(f"an entry must be an object with 'form' and 'rank' alone, got {keys}")
        return cls(data["rank"], data["form"])


@dataclass(frozen=True)
class Judgement:
    """How far a conversion is from the dense model on held-out calibration data, beside other plans of its size.

    Args:
        unit: of the divergences: "nats per token", "per example" or "per pixel", or "of the squared hidden states" or
            "outputs", the share that the squared difference is.
        chosen: the plan that was taken, the least of `measured`.
        predicted: sum of its layers' errors, each cut alone, scaled by measured / sum of the other plans in its metric;
            None where that is not known.
        measured: plan -> divergence of the whole model.
        examples: how many they were measured on, rows of long texts counted one by one.
    """

    unit: str
    chosen: str
    predicted: float | None
    measured: Mapping[str, float]
    examples: int

    def __post_init__(self) -> None:
        numbers = isinstance(self.measured, Mapping) and all(map(_is_finite, self.measured.values()))
        _check("judgement.measured", numbers, "an object of finite numbers")
        _check("judgement.predicted", self.predicted is None or _is_finite(self.predicted), "a finite number, or null")
        _check("judgement.examples", _is_count(self.examples), "an int of at least 0")
        named = all(map(_is_brief, (self.unit, self.chosen, *self.measured))) and self.chosen in self.measured
        _check("judgement", named, "of short texts for its unit and its plans")

    def __str__(self) -> str:
        judged = f" on {self.examples} held-out example{'s' * (self.examples != 1)}"
        predicted = "" if self.predicted is None else f" (predicted {self.predicted:.4g})"
        others = sorted((value, name) for name, value in self.measured.items() if name != self.chosen)
        tried = f"; also tried: {', '.join(f'{name} {value:.4g}' for value, name in others)}" if others else ""
        return f"{self.measured[self.chosen]:.4g} {self.unit}{judged}{predicted} with {self.chosen}{tried}"

    @property
    def brief(self) -> str:
        """What was measured and predicted, without the other plans."""
        predicted = "" if self.predicted is None else f" (predicted {self.predicted:.4g})"
        return f"held-out divergence {self.measured[self.chosen]:.4g} {self.unit}{predicted}"


@dataclass(frozen=True)
class Speed:
    """How much faster a model became that was asked to be, on the machine where it was planned.

    Args:
        device: "cpu", "cuda" ...
        tokens: of a call.
        asked: dense time over low-rank time of the targeted layers together.
        layers: that, measured.
        model: that of the whole model, measured on held-out calibration data; None without any.
    """

    device: str
    tokens: int
    asked: float
    layers: float
    model: float | None = None

    def __post_init__(self) -> None:
        numbers = (self.asked, self.layers, 0 if self.model is None else self.model)
        known = _is_brief(self.device) and _is_count(self.tokens) and all(map(_is_finite, numbers))
        _check("speed", known, "of a short text, an int and finite numbers")

    def __str__(self) -> str:
        whole = "" if self.model is None else f", the whole model {self.model:.2f} times on held-out data"
        call = f"{self.tokens} token{'s' * (self.tokens != 1)} a call on {self.device}"
        return f"targeted layers {self.layers:.2f} times as fast (asked {self.asked:.2f}) with {call}{whole}"

    @property
    def brief(self) -> str:
        """How much faster the model became; its targeted layers, where it was not measured itself."""
        return f"{self.model:.2f} times as fast" if self.model else f"targeted layers {self.layers:.2f} times as fast"


@dataclass(frozen=True)
class ConversionRecord:
    """Stored in `config.json` beside the plan, for model cards. Not needed to load the model.

    Args:
        base_model: Hub id of the dense model; None if it came from elsewhere.
        calibration_tokens: how many tokens the layers saw; None without calibration data.
        refitted_layers: how many layers were fitted once more after they were factored.
        errors: layer name -> ||W - up @ down|| / ||W|| in the metric's norm, before refitting and fine-tuning; None for
            a layer that was low-rank already when it was converted.
        metrics: layer name -> metric, of layers that were not factored in the plan's: "svd" for one that saw no data,
            "activation" for one to which no gradient came.
        judgement: how the plan did on held-out calibration data; None where it was not tried.
        speed: how much faster it became, where that was asked.

    Raises:
        PlanError: a value of a wrong type or out of range.

    >>> ConversionRecord.from_dict(ConversionRecord(base_model="me/bert", errors={"fc": 0.25}).to_dict()).errors["fc"]
    0.25
    """

    base_model: str | None = None
    calibration_tokens: int | None = None
    refitted_layers: int = 0
    errors: Mapping[str, float | None] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    judgement: Judgement | None = None
    speed: Speed | None = None

    def __post_init__(self) -> None:
        base, tokens, errors, metrics = self.base_model, self.calibration_tokens, self.errors, self.metrics
        _check("base_model", base is None or is_hub_id(base), "a Hub id such as 'google-bert/bert-base-uncased'")
        _check("calibration_tokens", tokens is None or _is_count(tokens), "an int of at least 0, or null")
        _check("refitted_layers", _is_count(self.refitted_layers), "an int of at least 0")
        finite = isinstance(errors, Mapping) and all(e is None or (_is_finite(e) and e >= 0) for e in errors.values())
        _check("errors", finite, "an object of finite numbers of at least 0, or null")
        known = isinstance(metrics, Mapping) and all(value in METRICS for value in metrics.values())
        _check("metrics", known, f"an object of {list(METRICS)}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        known = asdict(replace(self, errors=dict(self.errors), metrics=dict(self.metrics)))  # no mapping else is copied
        known["errors"] = {n: None if error is None else float(f"{error:.4g}") for n, error in self.errors.items()}
        return {name: value for name, value in known.items() if value or name not in ("metrics", "judgement", "speed")}

    @classmethod
    def from_dict(cls, data: object) -> "ConversionRecord":
        """Read the JSON form, believing nothing: PlanError for a wrong type or an unknown key."""
        given: Any = _fields(cls, data, "record")
        for name, kind in {"judgement": Judgement, "speed": Speed}.items():
            if given.get(name) is not None:
                given[name] = kind(**_fields(kind, given[name], f"record.{name}"))
        return cls(**given)


@dataclass(frozen=True, repr=False)
class RankPlan(Readable):
    """What becomes of the parts of one model.

    Args:
        modules: name -> Entry; what it does not name stays dense. Names are relative to the base model
            ("encoder.layer.0.attention.self.query"), names of head modules are relative to the head model, so that one
            plan serves every head; with a dot before them (".feature_extractor") where the base model has a module
            whose name begins alike. Layers of an attention with narrower heads are the narrower ones; of a fused layer
            there are three then, "h.0.attn.c_attn.query" and so on.
        base_model_type: Transformers' `model_type` of the dense model ("bert"), None for a plain `nn.Module`.
        metric: in which the ranks were chosen and the factors are made: "activation" or "fisher"; "svd" for plans that
            were made without data, whose factors are made in the richest metric of the data that `convert` gets.
        record: what is remembered of a conversion that was carried out; no part of the decision, and not compared.
        report: sizes before and after, and why the rest stays dense; of plans from `make_plan` that were not edited.

    Raises:
        PlanError: a name is not a dotted module path, a value is not an Entry, the metric is unknown, or there are more
            than 100000 names.

    >>> plan = RankPlan({"encoder.layer.0.output.dense": Entry(32)}, base_model_type="bert")
    >>> RankPlan.from_dict(plan.to_dict()) == plan
    True
    >>> print(plan.with_ranks({"output.dense": 16}))
    name                          form  rank
    ----------------------------------------
    encoder.layer.0.output.dense  pair  16
    """

    modules: Mapping[str, Entry] = field(default_factory=dict)
    base_model_type: str | None = None
    metric: str = "svd"
    record: ConversionRecord | None = field(default=None, compare=False)
    report: "Report | None" = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_names(self.modules)
        for name, entry in self.modules.items():
            if not isinstance(entry, Entry):
                raise PlanError(f"{name}: give an Entry, such as Entry(rank=8), got {_short(entry)}")
        if self.metric not in METRICS:
            raise PlanError(f"'reparam.metric' must be one of {list(METRICS)}, got {_short(self.metric)}")
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle
        return type(self), (dict(self.modules), self.base_model_type, self.metric, self.record, self.report)

    def with_ranks(self, ranks: Mapping[str, int]) -> "RankPlan":
        """The same with other ranks: pattern -> rank, the first match decides. Forms stay.

        Raises TargetError for a pattern that matches no name of the plan, PlanError for a rank that is no positive int.
        """
        as_patterns(ranks, "with_ranks")
        check_used(ranks, list(self.modules), "with_ranks")
        found = {name: first_match(ranks, [name]) for name in self.modules}
        edited = {n: replace(self.modules[n], rank=ranks[p]) for n, p in found.items() if p is not None}
        return replace(self, modules={**self.modules, **edited}, record=None, report=None)

    def without(self, *patterns: str) -> "RankPlan":
        """The same with these parts left dense; TargetError for a pattern that matches no name of the plan."""
        check_used(as_patterns(patterns, "without") or (), list(self.modules), "without")
        kept = {n: entry for n, entry in self.modules.items() if first_match(patterns, [n]) is None}
        return replace(self, modules=kept, record=None, report=None)

    def of(self, forms: tuple[str, ...]) -> dict[str, Entry]:
        """The entries of these forms."""
        return {name: entry for name, entry in self.modules.items() if entry.form in forms}

    def __repr__(self) -> str:
        ranks = [entry.rank for entry in self.modules.values()]
        shown = f", ranks={min(ranks)}..{max(ranks)}" if ranks else ""
        of = f"base_model_type={self.base_model_type!r}, metric={self.metric!r}"
        return f"RankPlan({of}, modules={len(ranks)}{shown})"

    def parts(self) -> list[Part]:
        """What is printed: the report, or a table of names, forms and ranks."""
        if self.report is not None:
            return self.report.parts()
        return [[["name", "form", "rank"], *([n, e.form, str(e.rank)] for n, e in self.modules.items())]]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what `config.json` holds under `reparam`."""
        known: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "base_model_type": self.base_model_type,
            "metric": self.metric,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
        }
        return known | ({} if self.record is None else {"record": self.record.to_dict()})

    @classmethod
    def from_dict(cls, data: object) -> "RankPlan":
        """Read the JSON form, believing nothing; PlanError for anything that it does not understand."""
        if not isinstance(data, Mapping):
            raise PlanError(f"'reparam' must be an object, got {_short(data)}")
        version = data.get("format_version")
        if not is_int(version):
            raise PlanError(f"'reparam.format_version' must be an int, got {_short(version)}")
        if version != FORMAT_VERSION:
            raise PlanError(
                f"this model was saved in format version {_short(version)}, and this hf_reparam reads version "
                f"{FORMAT_VERSION}: install the hf_reparam that wrote it"
            )
        if unknown := sorted(map(str, set(data) - _PLAN_KEYS)):
            raise PlanError(f"'reparam' has unknown keys {unknown[:3]}; known are {sorted(_PLAN_KEYS)}")
        base, metric = data.get("base_model_type"), data.get("metric", "svd")
        modules: Any = data.get("modules")
        if not (base is None or isinstance(base, str)):
            raise PlanError(f"'reparam.base_model_type' must be a string, got {_short(base)}")
        if not isinstance(modules, Mapping):
            raise PlanError(f"'reparam.modules' must be an object of names, got {_short(modules)}")
        _check_names(modules)
        entries = {}
        for name, entry in modules.items():
            try:
                entries[name] = Entry.from_dict(entry)
            except PlanError as error:
                raise PlanError(f"{_short(name)}: {error}") from None
        record = None if data.get("record") is None else ConversionRecord.from_dict(data["record"])
        return cls(entries, base, metric, record)


def is_hub_id(text: object) -> bool:
    """Whether a text has the form of a model's name on the Hub.

    >>> is_hub_id("gpt2"), is_hub_id("/home/me/gpt2"), is_hub_id("me/../gpt2")
    (True, False, False)
    """
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None and ".." not in text


def _fields(kind: Any, data: object, name: str) -> dict[str, Any]:
    known = {f.name: f for f in fields(kind)}
    needed = {name for name, f in known.items() if f.default is f.default_factory is MISSING}
    if not isinstance(data, Mapping) or not needed <= set(data) <= set(known):
        raise PlanError(f"'reparam.{name}' must be an object of {sorted(known)}, got {str(data)[:80]!r}")
    return dict(data)


def _check(name: str, ok: bool, what: str) -> None:
    if not ok:
        raise PlanError(f"'reparam.record.{name}' must be {what}")


def _is_count(value: object) -> bool:
    return is_int(value) and value >= 0


def _is_finite(value: object) -> bool:
    return is_number(value) and abs(value) <= sys.float_info.max  # an int may be too large for `math.isfinite`


def _is_brief(text: object) -> bool:
    return isinstance(text, str) and len(text) <= 64


def _check_names(modules: Any) -> None:
    if len(modules) > _MAX_MODULES:
        raise PlanError(f"the plan names {len(modules)} modules; at most {_MAX_MODULES} are accepted")
    for name in modules:
        if not (isinstance(name, str) and len(name) <= _MAX_NAME and _NAME.fullmatch(name)):
            raise PlanError(f"{_short(name)} is not a module path like 'encoder.layer.0.output.dense'")


def _short(value: object) -> str:
    """A value for an error message: its type, and its beginning."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
