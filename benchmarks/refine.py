"""What `refit` and `refine` give back without labels, at four tenths of the layers' weights.

    pip install -e '.[benchmark]'
    python -m benchmarks.refine --data DATA --models MODELS       about 22 processor minutes; see benchmarks.quality

The Llama, the GPT-2 and MiniLM of benchmarks.quality, converted, refitted and refined by default on all of their
calibration data, without labels; loss above the dense model, or 1 - cosine to its embeddings, on the test data, with
the processor seconds of each step. Writes results/refine.json.
"""

import time
from collections.abc import Callable
from typing import Any

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS
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
    tasks.run(__doc__, TASKS, lambda task: {"keep": KEEP, "steps": steps(task)}, STORED)


if __name__ == "__main__":
    main()
