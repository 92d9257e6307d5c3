"""What is written: model folders, with the files that belong to a model, and plans; each whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from hf_reparam.errors import CheckpointError, ReparamError
from hf_reparam.files.folder import OTHER_FOLDERS, one_line, read_json
from hf_reparam.layers.processes import is_first
from hf_reparam.model.remote import FILE
from hf_reparam.plan import RankPlan

_OWN = (  # written by the model, or true of the source alone; weights; what a Trainer left
    *("config.json", "generation_config.json", "README.md", FILE),
    *("model*.safetensors", "model.safetensors.index*.json", "pytorch_model*.bin", "pytorch_model.bin.index*.json"),
    *("tf_model*.h5", "tf_model.h5.index*.json", "flax_model*.msgpack", "flax_model.msgpack.index*.json", "*.ot"),
    *("consolidated*.safetensors", "consolidated*.pth", "*model*.onnx*", "*.gguf", "*.tflite"),
    *("training_args.bin", "optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
)


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
        data = read_json(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a plan: {error}") from None
    return RankPlan.from_dict(data)


@contextmanager
def new_folder(out: Path, *, force: bool, resume: str | None = None) -> Iterator[Path]:
    """A work folder beside `out`; its subfolder `new` takes the place of `out` when the block ends well.

    Raises CheckpointError if `out` exists, unless by force, or cannot be written.

    `resume` is a fingerprint of the work. A work folder that a broken run of the same work left is taken up again, and
    this one is left when the block fails, unless for a ReparamError. None for a new one that always vanishes.
    """
    check_absent(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if resume is None:
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        else:
            work = out.parent / f".{out.name}-{resume}"
            work.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out.parent} cannot be written: {error.strerror or error}") from None
    done = resume is None
    try:
        yield work
        if is_first():
            if out.exists():
                out.rename(work / "old")
            (work / "new").rename(out)
        done = True
    except ReparamError:
        done = True
        raise
    except BrokenPipeError:  # as in `load`
        raise
    except (OSError, SafetensorError) as error:  # a full disk
        raise CheckpointError(f"{out} cannot be written: {one_line(error)}") from error
    finally:
        if done and (is_first() or resume is None):
            shutil.rmtree(work, ignore_errors=True)


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder, by paths relative to it; no hidden ones, and not its card."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [f for f in files if not any(part.startswith(".") for part in f.parts) and f != Path("README.md")]


def copy_companions(source: Path, target: Path, model: Path) -> None:
    """Copy what belongs to a model beside its weights and configuration: tokenizer, pooling and dense modules, voices.

    Files that the target has are kept. Not copied are the model's own weights, in whatever format, what a Trainer
    left, hidden files and the source's model card. `model` is where in the source the model is.
    """
    shards: set[str] = set()
    for index in model.glob("*.index.json"):
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):  # it is another file
            shards |= set(read_json(index)["weight_map"].values())
    for relative in visible_files(source):
        path = source / relative
        own = path.is_relative_to(model) and _is_own(path.relative_to(model), shards)
        if not own and not (target / relative).exists():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _is_own(place: Path, shards: set[str]) -> bool:
    """Whether a file is the model's own or a Trainer's; below the model's folder only known folders are."""
    first, *deeper = place.parts
    known = any(fnmatchcase(first, pattern) for pattern in (OTHER_FOLDERS if deeper else _OWN))
    return known or (not deeper and first in shards)
