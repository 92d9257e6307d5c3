"""What is remembered of a conversion: where a model came from and how far its factors are from the dense weights."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_reparam.errors import PlanError

__all__ = ["ConversionRecord"]

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_METRICS = ("svd", "activation", "fisher")


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
        def check(name: str, ok: bool, what: str) -> None:
            if not ok:
                raise PlanError(f"'reparam.record.{name}' must be {what}")

        base, tokens, errors, metrics = self.base_model, self.calibration_tokens, self.errors, self.metrics
        check("base_model", base is None or is_hub_id(base), "a Hub id such as 'google-bert/bert-base-uncased'")
        check("calibration_tokens", tokens is None or _is_count(tokens), "an int of at least 0, or null")
        check("refitted_layers", _is_count(self.refitted_layers), "an int of at least 0")
        finite = isinstance(errors, Mapping) and all(map(_is_error, errors.values()))
        check("errors", finite, "an object of finite numbers of at least 0, or null")
        known = isinstance(metrics, Mapping) and all(value in _METRICS for value in metrics.values())
        check("metrics", known, f"an object of {list(_METRICS)}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics" or self.metrics}
        errors = {name: None if error is None else float(f"{error:.4g}") for name, error in self.errors.items()}
        return known | {"errors": errors}

    @classmethod
    def from_dict(cls, data: object) -> "ConversionRecord":
        """Read the JSON form, believing nothing: PlanError for a wrong type or an unknown key."""
        known = sorted(f.name for f in fields(cls))
        if not isinstance(data, Mapping) or not set(data) <= set(known):
            raise PlanError(f"'reparam.record' must be an object of {known}, got {str(data)[:80]!r}")
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
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 0 <= value < math.inf)  # type: ignore[operator]
