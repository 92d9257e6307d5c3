"""From model folder to model folder: what the command line does, for use from Python."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_reparam.convert import convert, summarize
from hf_reparam.errors import CheckpointError
from hf_reparam.hf.folder import copy_companions, load, load_tokenizer, locate, new_folder, skeleton
from hf_reparam.linalg import Moments
from hf_reparam.merge import merge
from hf_reparam.nn.ranks import Rank
from hf_reparam.report import ConversionReport

__all__ = ["convert_folder", "inspect_folder", "merge_folder"]


def convert_folder(
    source: str,
    out: str | os.PathLike[str],
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    calibration: str | os.PathLike[str] | None = None,
    form: str | None = None,
    refit: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    force: bool = False,
) -> ConversionReport:
    """Load a model, convert it and save it with its tokenizer; `out` appears whole or not at all.

    Args:
        source: a folder or a Hub id.
        out: the folder to make.
        rank, keep, form, refit, include, exclude: as in `convert`.
        calibration: a text file, one text a line, read with the source's tokenizer, or Moments in a .safetensors file.
        force: replace `out` if it exists.

    Returns:
        The report of the conversion.

    Raises:
        CheckpointError: the source or the calibration data cannot be loaded, or `out` exists, is the source, or cannot
            be written.
        ReparamError: as `convert`.
    """
    folder, target = _open(source, Path(out), force)
    data, tokenizer = _calibration(calibration, folder)
    with new_folder(target) as work:
        model, report = convert(
            load(folder),
            rank=rank,
            keep=keep,
            calibration=data,
            form=form,
            refit=refit,
            tokenizer=tokenizer,
            include=include,
            exclude=exclude,
            inplace=True,
            return_report=True,
        )
        model.save_pretrained(work)
        copy_companions(folder, work)
    return report


def merge_folder(source: str, out: str | os.PathLike[str], *, force: bool = False) -> ConversionReport:
    """Load a converted model, multiply its factors out and save the plain dense model with its tokenizer.

    Args and Raises: as `convert_folder`.

    Returns:
        The report of the model before it was merged.
    """
    folder, target = _open(source, Path(out), force)
    with new_folder(target) as work:
        model = load(folder)
        report = summarize(model)
        merge(model, inplace=True).save_pretrained(work)
        copy_companions(folder, work)
    return report


def inspect_folder(source: str) -> ConversionReport:
    """Report on a folder or Hub id from its configuration alone: low-rank layers, or what could be converted.

    Raises:
        CheckpointError: no readable configuration.
        PlanError: its plan is malformed or does not fit.
    """
    return summarize(skeleton(source))


def _calibration(path: str | os.PathLike[str] | None, folder: Path) -> tuple[Moments | list[str] | None, Any]:
    """Moments, or texts and the tokenizer that reads them."""
    if path is None:
        return None, None
    if Path(path).suffix == ".safetensors":
        return Moments.load(Path(path)), None
    try:
        texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from None
    return texts, load_tokenizer(folder)


def _open(source: str, out: Path, force: bool) -> tuple[Path, Path]:
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; choose another place, or replace it with --force")
    folder = locate(source)
    if out.resolve() == folder.resolve() or folder.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out} is the source or holds it; choose another place")
    return folder, out
