"""What a model folder says of itself before anything of it is loaded."""

import json
from pathlib import Path

from hf_reparam.errors import CheckpointError

__all__ = ["check_folder"]

_LARGEST_CONFIG = 16 * 2**20  # bytes; a plan of 100000 layers takes 6 MB


def check_folder(folder: Path) -> None:
    """Refuse a configuration that only an attack would be so long for, and an index that leads out of the folder.

    Raises:
        CheckpointError: one of these, or an index that is no list of files.
    """
    config = folder / "config.json"
    if config.is_file() and config.stat().st_size > _LARGEST_CONFIG:
        raise CheckpointError(f"{config} has {config.stat().st_size:,} bytes; at most {_LARGEST_CONFIG:,} are accepted")
    for index in sorted(folder.glob("*.index.json")):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in files if Path(name).name != name or "\\" in name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of weight files: {error!r}") from None
        if outside:
            raise CheckpointError(f"{index} names {outside[0][:80]!r}, which is no file of this folder")
