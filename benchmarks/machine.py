"""What a result needs beside its numbers: the machine, the versions, the command."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "describe", "write"]

RESULTS = Path(__file__).parent / "results"


def describe(seed: int) -> dict[str, Any]:
    """Processor, threads, memory, versions, seed and command line."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()] if info.exists() else []
    model = next((n for line, n in zip(info.read_text().splitlines(), names, strict=True) if "model name" in line), "")
    packages = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "hf-reparam")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "seed": seed,
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem}" + _options(sys.argv[1:]),
    }


def _options(arguments: list[str]) -> str:
    """Command-line options, folders given by their last component."""
    return "".join(f" {Path(a).name.upper() if '/' in a else a}" for a in arguments)


def write(name: str, results: dict[str, Any], seed: int) -> Path:
    """Write results/NAME.json with the machine's description."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": describe(seed), **results}, indent=2) + "\n")
    return path
