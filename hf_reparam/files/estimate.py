"""Plans of model folders, and what some sizes would give: `hf-reparam plan`, for use from Python."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hf_reparam.compress.planning import make_plan
from hf_reparam.config import LowRankConfig
from hf_reparam.errors import RankError
from hf_reparam.files.data import CalibrationData
from hf_reparam.files.folder import check_device, load, load_tokenizer, locate, model_place, skeleton
from hf_reparam.layers.progress import each, one_bar
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.checks import count_parameters
from hf_reparam.plan import RankPlan
from hf_reparam.tables import Part, Readable

_KEEPS = (0.8, 0.6, 0.4)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one size would give; None where no plan is as small, or for divergences without held-out data."""

    keep: float
    parameters: int | None = None
    megabytes: float | None = None
    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class Estimates(Readable):
    """What some sizes would give, beside the dense model; `unit` is that of divergences, as in a `Judgement`."""

    model: str
    parameters: int
    megabytes: float
    unit: str | None
    sizes: Sequence[Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    def parts(self) -> list[Part]:
        """What is printed: a table of sizes, and what its losses are."""

        rows = [["size", "parameters", "share", "MB", "predicted", "measured"]]
        for size in (Estimate(1.0, self.parameters, self.megabytes), *self.sizes):
            name = "dense" if size.keep == 1 else f"keep {size.keep:g}"
            known = ["cannot be reached", "", ""]
            if size.parameters is not None:
                known = [f"{size.parameters:,}", f"{size.parameters / self.parameters:.1%}", f"{size.megabytes:,.1f}"]
            losses = ["" if loss is None else f"{loss:.4g}" for loss in (size.predicted, size.measured)]
            rows.append([name, *known, *losses])
        if self.unit is None:
            advice = "Calibration data (--calibration TEXTS.txt) tell what each size is predicted to lose."
            return [self.model, [row[:-2] for row in rows], advice]
        what = f"Predicted and measured: divergence from the dense model on held-out data ({self.unit})."
        return [self.model, rows, what]


def plan_folder(
    source: str | os.PathLike[str],
    config: LowRankConfig,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> RankPlan | Estimates:
    """Plan what would become of a model folder or Hub id, and convert nothing.

    Args:
        source, calibration, max_length, max_samples, revision, token, dtype, device: as in `convert_folder`.
        config: what is asked.

    Returns:
        The plan for the size that the configuration has; without one, what `keep` = 0.8, 0.6 and 0.4 would give.

    Raises:
        ReparamError: as `make_plan` and `convert_folder`.

    Cost: as `calibrate` and `make_plan`, for each size. Without calibration data no weight is read, unless the
    allocation is "global" or a speedup is asked for.
    """
    data, tokenizer = CalibrationData.of(calibration, max_length, max_samples), None
    check_device(device)
    with one_bar():
        if data == CalibrationData() and config.allocation != "global" and config.speedup is None:
            model: Any = skeleton(os.fspath(source), revision=revision, token=token, dtype=dtype)
        else:
            place = model_place(locate(os.fspath(source), revision=revision, token=token))
            model, _ = load(place, dtype=dtype, device=device)
            tokenizer = None if data.texts is None else load_tokenizer(place)
        known = data.calibration(model, tokenizer, config, None, folder=None)
        return make_plan(model, config, known) if config.sized else _estimates(model, config, known)


def _estimates(model: nn.Module, config: LowRankConfig, calibration: Calibration | None) -> Estimates:
    count = count_parameters(model)
    width = next(model.parameters()).element_size() / 1e6
    sizes, unit = [], None
    for keep in each(_KEEPS, "planning", "size"):
        found: list[Any] = []
        with suppress(RankError):  # below the smallest size
            report: Any = make_plan(model, replace(config, keep=keep), calibration).report
            found = [report.parameters_after, report.parameters_after * width]
            if (judged := report.judgement) is not None:
                unit = judged.unit
                found += [judged.predicted, judged.measured[judged.chosen]]
        sizes.append(Estimate(keep, *found))
    return Estimates(type(model).__name__, count, count * width, unit, sizes)
