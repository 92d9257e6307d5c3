"""What is remembered of a conversion: where a model came from and how far its factors are from the dense weights."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hf_reparam.errors import PlanError

__all__ = ["ConversionRecord"]

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_KEYS = frozenset({"base_model", "calibration_tokens", "refitted_layers", "errors", "metrics"})
_METRICS = ("svd", "activation", "fisher")


@dataclass(frozen=True)
class ConversionRecord:
    """Stored in `config.json` beside the plan, so that a model card can be written wherever the model is. Not needed
    to load the model.

    Args:
        base_model: Hub id of the dense model; None if it came from elsewhere.
        calibration_tokens: how many tokens the layers saw; None without calibration data.
        refitted_layers: how many layers were fitted once more after they were factored.
        errors: layer name -> ||W - up @ down|| / ||W|| in the metric's norm, before refitting and fine-tuning; None for
            a layer that was low-rank already when it was converted: how far it is from its dense weight is not known.
        metrics: layer name -> metric, of layers that were not factored in the plan's: "svd" for one that saw no data,
            "activation" for one to which no gradient came.

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

    def __post_init__(self) -> None:
        if self.base_model is not None and not is_hub_id(self.base_model):
            raise PlanError("'reparam.record.base_model' must be a Hub id such as 'google-bert/bert-base-uncased'")
        if self.calibration_tokens is not None and not _is_count(self.calibration_tokens):
            raise PlanError("'reparam.record.calibration_tokens' must be an int of at least 0, or null")
        if not _is_count(self.refitted_layers):
            raise PlanError("'reparam.record.refitted_layers' must be an int of at least 0")
        if not isinstance(self.errors, Mapping) or not all(map(_is_error, self.errors.values())):
            raise PlanError("'reparam.record.errors' must be an object of finite numbers of at least 0, or null")
        if not isinstance(self.metrics, Mapping) or not all(value in _METRICS for value in self.metrics.values()):
            raise PlanError(f"'reparam.record.metrics' must be an object of {list(_METRICS)}")
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))
        object.__setattr__(self, "errors", MappingProxyType(dict(self.errors)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle
        errors, metrics = dict(self.errors), dict(self.metrics)
        return type(self), (self.base_model, self.calibration_tokens, self.refitted_layers, errors, metrics)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        errors = {name: None if error is None else float(f"{error:.4g}") for name, error in self.errors.items()}
        known = {
            "base_model": self.base_model,
            "calibration_tokens": self.calibration_tokens,
            "refitted_layers": self.refitted_layers,
            "errors": errors,
        }
        return {**known, "metrics": dict(self.metrics)} if self.metrics else known

    @classmethod
    def from_dict(cls, data: object) -> "ConversionRecord":
        """Read the JSON form, believing nothing.

        Raises:
            PlanError: a wrong type or an unknown key.
        """
        if not isinstance(data, Mapping) or not set(data) <= _KEYS:
            raise PlanError(f"'reparam.record' must be an object of {sorted(_KEYS)}, got {str(data)[:80]!r}")
        return cls(**data)


def is_hub_id(text: object) -> bool:
    """Whether a text has the form of a model's name on the Hub.

    >>> is_hub_id("gpt2"), is_hub_id("/home/me/gpt2"), is_hub_id("me/../gpt2")
    (True, False, False)
    """
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None and ".." not in text


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_error(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
