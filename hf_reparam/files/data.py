"""Calibration data in files: texts, or what `calibrate` made of them."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_reparam.calibrate.batches import prepare
from hf_reparam.calibrate.collect import calibrate, size_in_bytes
from hf_reparam.compress.convert import asked_of, selection_of
from hf_reparam.config import LowRankConfig
from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.folder import lines_of
from hf_reparam.layers.processes import is_first, own_share, wait_for_all
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.model.host import opened
from hf_reparam.plan import RankPlan


@dataclass(frozen=True)
class CalibrationData:
    """What a folder's model is calibrated with."""

    known: Any = None  # a Calibration, or where one is stored; None for texts, or for nothing
    texts: list[str] | None = None  # the lines of a text file
    reading: Mapping[str, Any] = field(default_factory=dict)  # how they are read, as for `calibrate`
    max_memory: int | str | None = None  # as for `calibrate`

    @classmethod
    def of(
        cls,
        given: Calibration | str | os.PathLike[str] | None,
        max_length: int | None,
        max_samples: int | None,
        max_memory: int | str | None = None,
    ) -> "CalibrationData":
        """A calibration, where it is stored (a folder or a safetensors file), or a text file, for which the options are
        meant.

        Raises:
            TargetError: options without texts, or a limit that is none.
            CheckpointError: the file cannot be read as text.
        """
        check_size("max_memory", max_memory)
        path = None if given is None or isinstance(given, Calibration) else Path(given)
        if path is not None and not path.is_dir() and path.suffix != ".safetensors":
            return cls(None, lines_of(path), {"max_length": max_length, "max_samples": max_samples}, max_memory)
        if any(option is not None for option in (max_length, max_samples, max_memory)):
            raise TargetError(
                "max_length, max_samples and max_memory say how texts are read: give calibration=FILE of texts "
                "(--calibration FILE)"
            )
        return cls(path or given)

    def calibration(
        self, model: nn.Module, tokenizer: Any, config: LowRankConfig, plan: RankPlan | None, *, folder: Path | None
    ) -> Calibration | None:
        """The calibration for what is asked, or a plan; None without data.

        In a `folder` it stays on disk, and what an earlier run has finished there is not made again.
        """
        if self.texts is None:
            return Calibration.load(self.known) if isinstance(self.known, Path) else self.known
        if folder is not None:
            with suppress(CheckpointError):  # nothing is there, or what a broken run left
                return Calibration.load(folder)
            wait_for_all()
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)
            wait_for_all()
        batches = [batch for batch, _ in prepare(model, self.texts, tokenizer, desc="reading", **self.reading)]
        mine = own_share(batches)  # whole batches, as in one process
        asked = {"metric": config.metric or "fisher", **asked_of(selection_of(opened(model).model, config, plan))}
        return calibrate(model, mine, folder=folder, max_memory=self.max_memory, **asked)


def check_size(option: str, size: int | str | None) -> None:
    """Raise TargetError for a size in bytes that is none; None is one."""
    if size is not None and size_in_bytes(option, size) < 1:
        raise TargetError(f"{option} must be above 0, got {size!r}")
