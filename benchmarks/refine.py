"""What `refit` and `refine` give back without labels, at four tenths of the layers' weights.

    pip install -e '.[benchmark]'
    python -m benchmarks.refine --data DATA --models MODELS       about 60 processor minutes; see benchmarks.quality

The Llama, the GPT-2 and MiniLM of benchmarks.quality, converted, refitted and refined by default on all of their
calibration data, without labels; loss above the dense model, or 1 - cosine to its embeddings, on the test data and on
data of another kind (GPT-2: WikiText-2 in the place of novels; Llama: novels in the place of TinyStories; MiniLM: SST-2
in the place of STS-B), with the processor seconds of each step. Writes results/refine.json.
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

    def score(name: str, small: Any) -> None:
        found[name] |= {"lost": task.score(small)["lost"], "elsewhere": task.elsewhere(small)}

    calibration = step("calibrate", lambda: hf_reparam.calibrate(task.model, task.batches))
    config = LowRankConfig(keep=KEEP, exclude_modules=task.exclude)
    small = step("convert", lambda: hf_reparam.convert(task.model, config, calibration=calibration))
    score("convert", small)
    step("refit", lambda: hf_reparam.refit(small, task.model, task.batches, calibration=calibration))
    score("refit", small)
    print(step("refine", lambda: hf_reparam.refine(small, task.model, task.batches)), flush=True)
    score("refine", small)
    return found


def main() -> None:
    tasks.run(__doc__, TASKS, lambda task: {"keep": KEEP, "steps": steps(task)}, STORED)


if __name__ == "__main__":
    main()
