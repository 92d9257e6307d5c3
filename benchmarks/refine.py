"""What `refit` and `refine` give back without labels, at four tenths of the layers' weights.

    pip install -e '.[benchmark]'
    python -m benchmarks.refine --data DATA --models MODELS       about 22 processor minutes; see benchmarks.quality

The Llama, the GPT-2 and MiniLM of benchmarks.quality, converted, refitted and refined by default on all of their
calibration data, without labels; loss above the dense model, or 1 - cosine to its embeddings, on the test data, with
the processor seconds of each step. Writes results/refine.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS, describe
from hf_reparam import LowRankConfig

KEEP = 0.4
TASKS = {"llama": tasks.llama, "gpt2": tasks.gpt2, "minilm": tasks.similarity}
STORED = RESULTS / "refine.json"


def steps(task: tasks.Task) -> dict[str, dict[str, float]]:
    """Step -> what is lost after it, and the seconds that it took."""
    found: dict[str, dict[str, float]] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = {"seconds": time.process_time() - start}
        return result

    calibration = step("calibrate", lambda: hf_reparam.calibrate(task.model, task.batches))
    config = LowRankConfig(keep=KEEP, exclude_modules=task.exclude)
    small = step("convert", lambda: hf_reparam.convert(task.model, config, calibration=calibration))
    found["convert"]["lost"] = task.score(small)["lost"]
    step("refit", lambda: hf_reparam.refit(small, task.model, task.batches, calibration=calibration))
    found["refit"]["lost"] = task.score(small)["lost"]
    print(step("refine", lambda: hf_reparam.refine(small, task.model, task.batches)), flush=True)
    found["refine"]["lost"] = task.score(small)["lost"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", choices=TASKS, action="append", help="this model alone; may be repeated")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.only or TASKS:
        torch.manual_seed(tasks.SEED)
        task = TASKS[name](args.data, args.models)
        result = {"lost": task.lost, "keep": KEEP, "steps": steps(task), "machine": describe(tasks.SEED)}
        print(task.name, json.dumps(result["steps"]), flush=True)
        stored = json.loads(STORED.read_text())["results"] if STORED.exists() else {}
        STORED.write_text(json.dumps({"results": {**stored, task.name: result}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
