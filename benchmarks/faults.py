"""SIGKILL at random moments: what is left is nothing or the whole result, and the next run finishes the work.

python -m benchmarks.faults             # 50 kills of each of three kinds of work
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tqdm import tqdm

import hf_reparam
import hf_reparam_cli
from benchmarks.machine import write

SEED = 0
tqdm.monitor_interval = 0  # no thread of its own, which may hold a lock while this process forks


def _convert(*more: str) -> Callable[[Path, Path], object]:
    """Convert a folder on the command line, in this process."""
    command = ["--rank", "16", "--quiet", *more]
    return lambda source, out: hf_reparam_cli.main(["convert", str(source), str(out), *command])


def _calibrate(source: Path, out: Path) -> None:
    """Collect moments and store them."""
    model = transformers.AutoModel.from_pretrained(source)
    ids = torch.arange(400).reshape(4, 100) % 90
    hf_reparam.calibrate(model, [{"input_ids": ids}]).save(out)


ACTIONS: dict[str, Callable[[Path, Path], object]] = {
    "convert --stream": _convert("--stream"),
    "convert": _convert(),
    "moments": _calibrate,
}


class Killer:
    """Runs one kind of work in processes that are killed.

    Args:
        folder: for the model and the results.
        name: of the work.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.source, self.out, self.act = folder / "source", folder / "out", ACTIONS[name]
        torch.manual_seed(SEED)
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6}
        transformers.BertModel(transformers.BertConfig(vocab_size=99, **shape)).save_pretrained(self.source)
        self.takes = min(self._whole_run() for _ in range(2))  # other programs may have slowed one down
        self.whole = digest(self.out)

    def run(self, kills: int) -> Counter[str]:
        """Kill it so many times, at moments spread over what it takes; how often `out` was absent, whole or broken.

        After a kill that left nothing the work is started again, and must give the whole result: else it is broken.
        """
        rng, ends = random.Random(SEED), Counter({"absent": 0, "whole": 0, "broken": 0})
        for _ in tqdm(range(kills), desc="Kills", disable=None):
            self._clear()
            self._start(wait=rng.uniform(0, self.takes))
            if self.out.exists():
                ends["whole" if digest(self.out) == self.whole else "broken"] += 1
                continue
            self._start(wait=None)
            finished = self.out.exists() and digest(self.out) == self.whole
            tidy = not any((path / "layers").is_dir() for path in self.out.parent.iterdir())  # work to be taken up
            ends["absent" if finished and tidy else "broken"] += 1
        return ends

    def _clear(self) -> None:
        for path in self.out.parent.iterdir():
            if path != self.source:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _whole_run(self) -> float:
        """Seconds that it takes."""
        self._clear()
        start = time.perf_counter()
        self._start(wait=None)
        return time.perf_counter() - start

    def _start(self, wait: float | None) -> None:
        """Do the work in a process of its own; kill it after so many seconds."""
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            torch.set_num_threads(1)
            try:
                self.act(self.source, self.out)
            finally:
                os._exit(0)
        if wait is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def digest(path: Path) -> str:
    """Of a file, or of all files in a folder and their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind of work (default: 50)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with more threads does not fork well
    results: dict[str, Any] = {}
    for name in ACTIONS:
        with tempfile.TemporaryDirectory() as folder:
            killer = Killer(Path(folder), name)
            results[name] = {"kills": options.kills, "seconds_unharmed": round(killer.takes, 2)}
            results[name] |= killer.run(options.kills)
        print(name, json.dumps(results[name]))
    write("faults", {"killed": results}, SEED)
    return int(any(ends["broken"] or not ends["absent"] for ends in results.values()))  # kills after the end are none


if __name__ == "__main__":
    sys.exit(main())
