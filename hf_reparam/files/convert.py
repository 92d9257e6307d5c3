"""From model folder to model folder: what the command line does, for use from Python."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_reparam.compress.convert import asked_for, carry_out
from hf_reparam.compress.merge import merge
from hf_reparam.compress.planning import make_plan
from hf_reparam.config import LowRankConfig, Rank
from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.data import CalibrationData, check_size
from hf_reparam.files.folder import card_of, load, load_tokenizer, locate, model_place, skeleton
from hf_reparam.files.out import check_absent, copy_companions, new_folder, read_plan, write_plan
from hf_reparam.layers.processes import alone, is_first, wait_for_all
from hf_reparam.layers.progress import one_bar
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.model.card import model_card
from hf_reparam.model.summary import report
from hf_reparam.plan import RankPlan
from hf_reparam.recover.refit import refit as refit_factors
from hf_reparam.report import Report

_SHARD = {True: "500MB", False: "50GB"}  # when streaming, one is held in memory at a time


def convert_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: LowRankConfig | RankPlan | None = None,
    *,
    rank: Rank | None = None,
    keep: float | None = None,
    target_params: int | float | None = None,
    speedup: float | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    max_samples: int | None = None,
    max_memory: int | str | None = None,
    refit: bool = False,
    stream: bool = False,
    max_shard_size: int | str | None = None,
    remote_code: bool = False,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Report:
    """Convert a model folder into another; with `stream=True` layer by layer, so that the model need not fit in memory.

    The tensors are those that loading, `convert` and `save_pretrained` would give. Where the model is streamed, ranks
    for a budget are predicted, not measured on held-out data, so they may differ: pass a plan that was made in memory
    to have the same. `out` appears whole or not at all. A streamed run that was broken off goes on where it stopped
    when it is started again with the same arguments on the same files.
    Files beside the weights (tokenizer, pooling and dense modules of sentence-transformers) are copied; tensors that
    the model's class does not load are not, and the report names them. In a distributed run (`accelerate launch`) every
    process has to call this: texts and layers are shared out, and the first process writes.

    Args:
        source: a folder, or a Hub id; one of sentence-transformers may hold the model in a subfolder.
        out: the folder to make.
        config, rank, keep, target_params, speedup: as in `convert`.
        calibration: what `calibrate` returned, a file or folder of it, or a text file, one text a line, read with the
            source's tokenizer.
        max_length, max_samples, max_memory: for texts, as for `calibrate`.
        refit: fit the factors once more on the texts; not with `stream`.
        stream: go from file to file, for models that exceed memory; slower, and not with `speedup`.
        max_shard_size: of the files written, as for `save_pretrained`; "500MB" when streaming, because one is held in
            memory at a time.
        remote_code: also write the file that lets the result load where hf_reparam is not installed.
        force: replace `out` if it exists.
        revision: branch, tag or commit of a Hub id.
        token: for the Hub; by default the one that is stored there.
        dtype: name of the dtype in which the weights are loaded and stored, "bfloat16"; by default their own.
        device: where the model is while it is converted, "cuda"; not with `stream`.

    Returns:
        The report of the conversion. `out` holds a model card made from it, `README.md`.

    Raises:
        CheckpointError: the source or the calibration data cannot be loaded; or `out` exists, is the source, holds it
            or is in it, cannot be written, or is being written by another process.
        ReparamError: as `convert`.

    Cost: as `convert`, and disk space for the result twice. Memory, when streaming: three to four times the largest
    layer in float64, in the metric of calibration data its moments, too, or two shards; at least twice the largest
    tensor.
    """
    folder = _open(source, Path(out), force, revision=revision, token=token)
    place = model_place(folder)
    check_size("max_shard_size", max_shard_size)
    data = CalibrationData.of(calibration, max_length, max_samples, max_memory)
    if refit and data.texts is None:
        raise TargetError("refit needs the calibration texts themselves: give a file of texts as calibration")
    asked, plan = asked_for(config, rank=rank, keep=keep, target_params=target_params, speedup=speedup)
    in_memory = {"device": device is not None, "refit": refit, "speedup": asked.speedup is not None}
    for option, given in in_memory.items():
        if stream and given:
            raise TargetError(f"{option} needs the model in memory: leave stream=True (--stream) out")
    tokenizer = None if data.texts is None else load_tokenizer(place)
    options = [asked.to_dict(), plan and plan.to_dict(), max_memory, max_length, max_samples, dtype]
    same_work = _same_work(folder, data, options) if stream else None
    with _work_folder(Path(out), force, same_work) as work, one_bar():
        model, dropped = load(place, offload_folder=work / "source" if stream else None, dtype=dtype, device=device)
        if not os.path.isdir(source):
            model.config.name_or_path = os.fspath(source)  # the Hub id, not the place in the cache
        moments = work / "moments" if stream or max_memory is not None else None
        known = data.calibration(model, tokenizer, asked, plan, folder=moments)
        if plan is None:
            kept = work / "plan.json"
            plan = read_plan(kept) if kept.exists() else make_plan(model, asked, known)  # of a broken run
            if is_first():
                write_plan(plan, kept)
            asked = LowRankConfig(metric=plan.metric, solver=asked.solver)
        layers = work / "layers" if stream else None
        small = carry_out(model, asked, plan, calibration=known, inplace=not refit, workdir=layers)
        if refit and data.texts is not None:
            refit_factors(small, model, data.texts, calibration=known, tokenizer=tokenizer, **data.reading)
        done = replace(report(small), dropped=dropped)
        if _save(small, folder, work, {"max_shard_size": max_shard_size or _SHARD[stream], "remote_code": remote_code}):
            model_card(small, base_card=card_of(folder), remote_code=remote_code).save(work / "new" / "README.md")
    return done


def merge_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    stream: bool = False,
    max_shard_size: int | str | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Report:
    """Multiply the factors of a converted model's folder out and save the plain dense model.

    Args, Raises, Cost: as `convert_folder`.

    Returns:
        The report of the model before it was merged.
    """
    folder = _open(source, Path(out), force, revision=revision, token=token)
    check_size("max_shard_size", max_shard_size)
    with _work_folder(Path(out), force, _same_work(folder, CalibrationData(), ["merge"]) if stream else None) as work:
        model, dropped = load(model_place(folder), offload_folder=work / "source" if stream else None)
        done = replace(report(model), dropped=dropped)
        dense = merge(model, inplace=True, workdir=work / "layers" if stream else None)
        _save(dense, folder, work, {"max_shard_size": max_shard_size or _SHARD[stream]})
    return done


def inspect_folder(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Report:
    """Report on a folder or Hub id from its configuration alone: low-rank layers, or what could be converted."""
    return report(skeleton(os.fspath(source), revision=revision, token=token))


def _open(source: str | os.PathLike[str], out: Path, force: bool, *, revision: str | None, token: str | None) -> Path:
    """The source's folder, after `out` was judged."""
    if out.name in ("", ".."):
        raise CheckpointError(f"{out} is a place, no name: give the folder to make")
    check_absent(out, force=force)
    folder = locate(os.fspath(source), revision=revision, token=token)
    made, read = out.resolve(), folder.resolve()
    if read.is_relative_to(made):
        raise CheckpointError(f"{out} is the source or holds it; choose another place")
    if made.is_relative_to(read) and (model_place(folder) / "config.json").is_file():
        raise CheckpointError(f"{out} is inside the source, {folder}; choose another place")
    return folder


@contextmanager
def _work_folder(out: Path, force: bool, same_work: str | None) -> Iterator[Path]:
    """As `new_folder`, for one run at a time: another may have finished just now."""
    refusal = f"another process is converting into {out}; wait until it has finished, or choose another place"
    with alone(out.parent / f".{out.name}.lock", refusal), new_folder(out, force=force, resume=same_work) as work:
        yield work


def _save(model: Any, source: Path, work: Path, options: dict[str, Any]) -> bool:
    """Write the result into the work folder, by the first process alone; whether this is it."""
    wait_for_all()
    if not is_first():
        return False
    shutil.rmtree(work / "new", ignore_errors=True)  # of a broken run
    place = model_place(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(work / "new" / place.relative_to(source), **options)
    copy_companions(source, work / "new", place)
    return True


def _same_work(source: Path, data: CalibrationData, options: list[Any]) -> str:
    """The same for the same work: source files, calibration data and options."""
    parts: list[Any] = [version("hf-reparam"), options, data.texts]
    parts += map(_stamp, sorted({*_files(source), *_files(model_place(source))}))
    if isinstance(data.known, Calibration):
        parts.append(data.known.fingerprint())
    elif data.known is not None:
        parts += map(_stamp, _files(data.known))
    return fingerprint(parts)[:12]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What changes with a file; the time of its last change of any kind cannot be set back, as a copy's other can."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return path.name, state.st_size, state.st_mtime_ns, state.st_ctime_ns
