"""Rank plans in files: what `hf-reparam plan` writes, and what model folders and runs that can be resumed keep."""

import json
import os
from pathlib import Path

from hf_reparam.errors import CheckpointError
from hf_reparam.plan import RankPlan

__all__ = ["check_absent", "check_new", "read_plan", "write_plan"]


def check_absent(path: str | os.PathLike[str], *, force: bool) -> None:
    """Raise CheckpointError for what exists, unless by force."""
    if Path(path).exists() and not force:
        raise CheckpointError(f"{path} exists; choose another place, or replace it with force (--force)")


def check_new(path: str | os.PathLike[str], *, force: bool) -> None:
    """Raise CheckpointError for a file that exists, unless by force, or whose folder does not."""
    check_absent(path, force=force)
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: give a file in a folder that exists")


def write_plan(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Store a plan as JSON; the file appears whole or not at all."""
    unfinished = Path(f"{os.fspath(path)}~")
    unfinished.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_plan(path: str | os.PathLike[str]) -> RankPlan:
    """A stored plan; CheckpointError for what cannot be read as JSON, PlanError for what is no plan."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a plan: {error}") from None
    return RankPlan.from_dict(data)
