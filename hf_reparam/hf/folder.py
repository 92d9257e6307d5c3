"""Model folders: find, load, build a skeleton from, and write one so that it appears whole or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_reparam.errors import CheckpointError, PlanError, ReparamError
from hf_reparam.hf.auto import generated_class
from hf_reparam.hf.configuration import PREFIX, ReparamConfigMixin
from hf_reparam.hf.offload import check_stored
from hf_reparam.hf.processes import is_first
from hf_reparam.hf.remote import FILE
from hf_reparam.hf.untrusted import check_folder

__all__ = ["copy_companions", "load", "load_tokenizer", "locate", "new_folder", "skeleton"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".index.json")
_OWN = ("config.json", "generation_config.json", "README.md", FILE)  # written by the model, or true of the source alone
_OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "onnx/*", "openvino/*", "coreml/*"]


def locate(source: str) -> Path:
    """The folder of a model: itself, or the local snapshot of a Hub id (downloaded, or from the cache when offline).

    Raises:
        CheckpointError: there is no such folder, and no such model on the Hub or in the cache.
    """
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise CheckpointError(f"{source} is a file; give a model folder or a Hub id")
    try:
        return Path(snapshot_download(source, ignore_patterns=_OTHER_FORMATS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder nor a model that the Hub or its cache has: {_line(error)}"
        ) from None


def load(folder: Path, *, offload_folder: Path | None = None) -> PreTrainedModel:
    """Load a model as the class that saved it, with the dtype it was saved in.

    Args:
        folder: of the model.
        offload_folder: leave every weight on disk until it is used: in the model's own files where it is used as it is
            stored, else in this folder. None to load all into memory.

    Raises:
        CheckpointError: not a loadable model folder, or weights are missing, which would leave random layers.
        PlanError: the folder's plan is malformed or does not fit.
    """
    check_folder(folder)
    try:
        kind = _saved_class(AutoConfig.from_pretrained(folder))
        on_disk = {} if offload_folder is None else {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
        with _unsaid("accelerate.big_modeling"):  # that parameters are on disk, as they were asked to be
            model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **on_disk)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{folder}: {len(missing)} weights are missing for {kind.__name__}, among them {missing[:3]}"
            )
        if on_disk:
            check_stored(model)
            model.tie_weights()  # tied weights that were stored twice
    except ReparamError:
        raise
    except Exception as error:  # whatever a tampered folder makes Transformers stumble over
        raise CheckpointError(f"{folder} cannot be loaded: {_line(error)}") from error
    return model


@contextmanager
def _unsaid(logger: str) -> Iterator[None]:
    """Without a logger's warnings."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a padding token.

    Raises:
        CheckpointError: there is none that can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer to read calibration texts with: {_line(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # Transformers makes up an empty one
        raise CheckpointError(f"{folder} has no tokenizer to read calibration texts with: its vocabulary is empty")
    if tokenizer.pad_token is None:  # GPT-2 and Llama; padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(source: str) -> PreTrainedModel:
    """The model of a folder or Hub id on the meta device: every shape, no weight read.

    Raises:
        CheckpointError: no readable configuration.
        PlanError: the plan is malformed or does not fit.
    """
    check_folder(Path(source))
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = _saved_class(config)(config)
    except ReparamError:
        raise
    except Exception as error:  # as in `load`
        raise CheckpointError(f"{source} cannot be read: {_line(error)}") from error
    model.tie_weights()
    return model


def _saved_class(config: PreTrainedConfig) -> Any:
    names = config.architectures or [None]
    name = names[0] if isinstance(names, list) else names
    if name is None:
        return AutoModel._model_mapping[type(config)] if isinstance(config, ReparamConfigMixin) else _headless(config)
    name = str(name)[:80]
    try:
        found = generated_class(name) if name.startswith(PREFIX) else getattr(transformers, name, None)
    except AttributeError:
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"its architecture {name!r} is no class of Transformers {transformers.__version__}; if it is one of yours, "
            "import the module that defines it, and register a configuration of your own with AutoConfig"
        )
    if isinstance(config, ReparamConfigMixin) and not name.startswith(PREFIX):
        raise PlanError(f"config.json has a plan, and its architecture {name!r} is a stock class")
    return found


def _headless(config: PreTrainedConfig) -> Any:
    if type(config) not in AutoModel._model_mapping:
        raise CheckpointError(f"config.json names no architecture, and {type(config).__name__} has no default model")
    return AutoModel._model_mapping[type(config)]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


@contextmanager
def new_folder(out: Path, *, resume: str | None = None) -> Iterator[Path]:
    """A work folder beside `out`; its subfolder `new` takes the place of `out` when the block ends well.

    Args:
        out: the folder to make. In a distributed run the first process makes it.
        resume: a fingerprint of the work. A work folder that a broken run of the same work left is taken up again, and
            this one is left when the block fails, unless for a ReparamError. None for a new one that always vanishes.

    Raises:
        CheckpointError: `out` or its parent cannot be written.
    """
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
    except (OSError, SafetensorError) as error:  # a full disk
        raise CheckpointError(f"{out} cannot be written: {_line(error)}") from error
    finally:
        if done and (is_first() or resume is None):
            shutil.rmtree(work, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and configuration: tokenizer, processor, pooling settings.

    Files that the target has are kept; weights, hidden files and the source's own model card are not copied.
    """
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        unwanted = (
            path.name.endswith(_WEIGHTS) or str(relative) in _OWN or any(p.startswith(".") for p in relative.parts)
        )
        if path.is_file() and not unwanted and not (target / relative).exists():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
