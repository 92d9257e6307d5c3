"""The common test files of the installed Transformers, from its source distribution on the package index.

The distribution carries `tests/test_*_common.py` and `tests/test_*_mixin.py`, and not the modules that these import
from their own package: small ones of this project, in `conformance/stubs`, stand in for them.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

__all__ = ["PACKAGE", "cache", "install"]

PACKAGE = "transformers_common"
"""Name under which the tests are imported: `transformers_common.test_modeling_common`."""

_STUBS = Path(__file__).parent / "stubs"


def cache() -> Path:
    """Folder that holds the package of the installed version, to be put on the module search path."""
    root = os.environ.get("HF_REPARAM_CONFORMANCE") or Path(__file__).parent.parent / ".conformance"
    return Path(root) / f"transformers-{transformers.__version__}"


def install() -> Path:
    """Download the tests unless they are in the cache, put the stubs of now beside them, and return the cache.

    Raises:
        subprocess.CalledProcessError: pip finds no source distribution of the installed version.
    """
    package = cache() / PACKAGE
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
            unpacked = _download(Path(scratch))
            (unpacked / "tests").rename(package)
    shutil.copytree(_STUBS, cache(), dirs_exist_ok=True)
    return cache()


def _download(folder: Path) -> Path:
    """The unpacked source distribution."""
    wanted = f"transformers=={transformers.__version__}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


if __name__ == "__main__":
    print(install())
