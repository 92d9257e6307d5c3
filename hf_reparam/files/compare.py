"""Two model folders beside each other: what `hf-reparam compare` does, for use from Python."""

import os
from dataclasses import replace
from pathlib import Path

from hf_reparam.compress.compare import Comparison, compare
from hf_reparam.errors import CheckpointError
from hf_reparam.files.folder import card_of, lines_of, load, load_tokenizer, locate, model_place
from hf_reparam.model.card import with_comparison

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of which Transformers loads the first that is there


def compare_folders(
    dense: str | os.PathLike[str],
    small: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    max_samples: int | None = None,
    times: bool = True,
    card: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Comparison:
    """As `compare`, of two folders or Hub ids and the lines of a text file; bytes on disk beside.

    Args:
        dense, small: dense, converted, merged or quantized models for the same inputs. The tokenizer is the first's.
        texts: a file, one text a line.
        max_length, max_samples, times: as in `compare`.
        revision, token, dtype, device: as in `convert_folder`, of both models; the revision is the first one's.
        card: whether the table is put into the second folder's README.md, in the place of an earlier one.

    Raises:
        CheckpointError: no such folder, model or file; with `card`, one that is no folder here.
        TargetError: as `compare`.
    """
    if card and not os.path.isdir(small):
        raise CheckpointError(f"the card of {small} cannot be written: give a folder")
    data = lines_of(texts)
    folders = [locate(os.fspath(dense), revision=revision, token=token), locate(os.fspath(small), token=token)]
    places = [model_place(folder) for folder in folders]
    first, second = (load(place, dtype=dtype, device=device)[0] for place in places)
    reading = {"tokenizer": load_tokenizer(places[0]), "max_length": max_length, "max_samples": max_samples}
    found = compare(first, second, data, times=times, **reading)
    stored = {"MB on disk": (megabytes(places[0]), megabytes(places[1]))}
    found = replace(found, figures={**stored, **found.figures})
    if card:
        with_comparison(card_of(Path(small), strict=True), found.to_markdown()).save(Path(small) / "README.md")
    return found


def megabytes(place: Path) -> float:
    """Of the weights in a folder, in the format that is loaded."""
    formats = ([path.stat().st_size for path in place.glob(pattern)] for pattern in _WEIGHTS)
    return sum(next(filter(None, formats), [])) / 1e6
