"""The rank plan: which layers are low-rank, of which rank, in which form. Small, frozen, JSON in and out.

A plan is the hinge between deciding and applying. It can be printed, edited, stored and compared, and together with
the base configuration it is all that is needed to build the skeleton of a converted model: loading runs no SVD.
Whatever comes from disk passes through `RankPlan.from_dict`, which accepts nothing it does not understand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hf_reparam.errors import PlanError
from hf_reparam.record import ConversionRecord

__all__ = ["FORMAT_VERSION", "FORMS", "LayerSpec", "RankPlan", "layer_kind"]

FORMAT_VERSION = 2
"""Newest version of the `reparam` entry in `config.json`: 2 added narrower heads and low-rank embeddings. The oldest
that knows what a plan has is written."""

FORMS = ("pair", "pivoted")
"""How a layer of rank r can be stored."""

_MAX_MODULES = 100_000  # far above any model's count of dense layers; bounds the work a hostile file can ask for
_MAX_NAME = 512
_NAME = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_WIDTH = 1_000_000
_PLAN_KEYS = frozenset(
    {"format_version", "base_model_type", "method", "modules", "head_widths", "embeddings", "record"}
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How one dense layer is stored.

    Args:
        rank: the inner width r of the factors, 1 <= r. Whether it fits the layer is checked when it is applied.
        form: "pair" for y = up(down(x)), down (r, in), up (out, r); "pivoted" for y = up(x[p] + down(x[rest])),
            down (r, in - r), up (out, r), r^2 numbers fewer.

    Raises:
        PlanError: the rank is not a positive int, or the form is unknown.

    >>> LayerSpec(rank=64).to_dict()
    {'rank': 64, 'form': 'pair'}
    """

    rank: int
    form: str = "pair"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise PlanError(f"rank must be an int of at least 1, got {_short(self.rank)}")
        if self.form not in FORMS:
            raise PlanError(f"form must be one of {list(FORMS)}, got {_short(self.form)}")

    def weights(self, n_in: int, n_out: int) -> int:
        """Numbers that a layer of this shape stores, without its bias.

        >>> [spec.weights(16, 8) for spec in (LayerSpec(2), LayerSpec(2, "pivoted"))]
        [48, 44]
        """
        return self.rank * (n_in + n_out - (self.rank if self.form == "pivoted" else 0))

    def limit(self, n_in: int, n_out: int) -> int:
        """The highest rank that a layer of this shape can have in this form: pivots need inputs beside them."""
        return min(n_in - 1 if self.form == "pivoted" else n_in, n_out)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"rank": self.rank, "form": self.form}

    @classmethod
    def from_dict(cls, data: object) -> "LayerSpec":
        """Read the JSON form; PlanError on anything else."""
        if not isinstance(data, Mapping):
            raise PlanError(f"a layer must be an object with 'rank' and 'form', got {_short(data)}")
        unknown = sorted(map(str, set(data) - {"rank", "form"}))
        if unknown:
            raise PlanError(f"unknown keys {unknown[:3]}; a layer has 'rank' and 'form'")
        if "rank" not in data:
            raise PlanError("the key 'rank' is missing")
        return cls(data["rank"], data.get("form", "pair"))


@dataclass(frozen=True)
class RankPlan:
    """The low-rank layers of one model.

    Args:
        modules: layer name -> LayerSpec. Names are relative to the base model ("encoder.layer.0.attention.self.query"),
            names of head modules are relative to the head model, so that one plan serves every head; with a dot before
            them (".feature_extractor") where the base model has a module whose name begins alike.
        base_model_type: Transformers' `model_type` of the dense model ("bert"), None for a plain `nn.Module`.
        method: how the factors were made, "svd" for the truncated singular value decomposition of the weight.
        record: what is remembered of a conversion that was carried out; no part of the decision, and not compared.
        head_widths: attention name -> width of each of its heads, for attentions whose queries and keys, and values and
            outputs, are narrower than in the dense model ("encoder.layer.0.attention"). Ranks of its layers are those
            of the narrower layers; a fused layer is three, "h.0.attn.c_attn.query" and so on.

        embeddings: name of the input embeddings -> rank of their table, and of every table that is tied to it.

    Raises:
        PlanError: a name is not a dotted module path, a rank or width is not a positive int, or there are more than
            100000 names.

    >>> plan = RankPlan({"encoder.layer.0.output.dense": LayerSpec(32)}, base_model_type="bert")
    >>> RankPlan.from_dict(plan.to_dict()) == plan
    True
    """

    modules: Mapping[str, LayerSpec] = field(default_factory=dict)
    base_model_type: str | None = None
    method: str = "svd"
    record: ConversionRecord | None = field(default=None, compare=False)
    head_widths: Mapping[str, int] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names in (self.modules, self.head_widths, self.embeddings):
            if len(names) > _MAX_MODULES:
                raise PlanError(f"the plan names {len(names)} modules; at most {_MAX_MODULES} are accepted")
            for name in names:
                if not _is_path(name):
                    raise PlanError(f"{_short(name)} is not a module path like 'encoder.layer.0.output.dense'")
        for what, sizes in (("width of heads", self.head_widths), ("rank of embeddings", self.embeddings)):
            for name, size in sizes.items():
                if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MAX_WIDTH:
                    raise PlanError(f"{name}: the {what} must be an int of at least 1, got {_short(size)}")
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "head_widths", MappingProxyType(dict(self.head_widths)))
        object.__setattr__(self, "embeddings", MappingProxyType(dict(self.embeddings)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle
        widths, tables = dict(self.head_widths), dict(self.embeddings)
        return type(self), (dict(self.modules), self.base_model_type, self.method, self.record, widths, tables)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what `config.json` holds under `reparam`."""
        known = {
            "format_version": 2 if self.head_widths or self.embeddings else 1,
            "base_model_type": self.base_model_type,
            "method": self.method,
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
        }
        later = {"head_widths": dict(self.head_widths), "embeddings": dict(self.embeddings)}
        return (
            known
            | {key: value for key, value in later.items() if value}
            | ({} if self.record is None else {"record": self.record.to_dict()})
        )

    @classmethod
    def from_dict(cls, data: object) -> "RankPlan":
        """Read the JSON form, believing nothing.

        Raises:
            PlanError: a wrong type, an unknown key, an unknown `format_version`, a bad name or a bad layer.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"'reparam' must be an object, got {_short(data)}")
        _check_version(data.get("format_version"))
        unknown = sorted(map(str, set(data) - _PLAN_KEYS))
        if unknown:
            raise PlanError(f"'reparam' has unknown keys {unknown[:3]}; known are {sorted(_PLAN_KEYS)}")
        base, method, modules = data.get("base_model_type"), data.get("method", "svd"), data.get("modules")
        if base is not None and not isinstance(base, str):
            raise PlanError(f"'reparam.base_model_type' must be a string, got {_short(base)}")
        if not isinstance(method, str):
            raise PlanError(f"'reparam.method' must be a string, got {_short(method)}")
        if not isinstance(modules, Mapping):
            raise PlanError(f"'reparam.modules' must be an object of layer names, got {_short(modules)}")
        if len(modules) > _MAX_MODULES:
            raise PlanError(f"'reparam.modules' names {len(modules)} layers; at most {_MAX_MODULES} are accepted")
        layers = {name: _read_layer(name, spec) for name, spec in modules.items()}
        record = None if data.get("record") is None else ConversionRecord.from_dict(data["record"])
        return cls(layers, base, method, record, _read_sizes(data, "head_widths"), _read_sizes(data, "embeddings"))


def layer_kind(name: str) -> str:
    """A layer's name with `*` for its numbers, the same for the layers that repeat in a model.

    >>> layer_kind("encoder.layer.11.output.dense")
    'encoder.layer.*.output.dense'
    """
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _read_layer(name: object, data: object) -> LayerSpec:
    try:
        return LayerSpec.from_dict(data)
    except PlanError as error:
        raise PlanError(f"layer {_short(name)}: {error}") from None


def _read_sizes(data: Mapping[str, Any], key: str) -> Mapping[str, int]:
    """An entry of format 2 and later: name -> int, which the plan checks."""
    sizes = data.get(key, {})
    if not isinstance(sizes, Mapping):
        raise PlanError(f"'reparam.{key}' must be an object of names, got {_short(sizes)}")
    if sizes and data["format_version"] < 2:
        raise PlanError(f"'reparam.{key}' belongs to format version 2")
    return sizes


def _is_path(name: object) -> bool:
    """Whether a value is a module path like "encoder.layer.0"."""
    return isinstance(name, str) and len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int):
        raise PlanError(f"'reparam.format_version' must be an int, got {_short(version)}")
    if not 1 <= version <= FORMAT_VERSION:
        raise PlanError(
            f"this model was saved in format version {_short(version)}, and this hf_reparam reads versions 1 to "
            f"{FORMAT_VERSION}: install the hf_reparam that wrote it (pip install -U hf-reparam)"
        )


def _short(value: object) -> str:
    """A value for an error message: its type, and its beginning."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
