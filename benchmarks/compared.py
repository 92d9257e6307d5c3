"""`hf_reparam.compare` on real models: dense beside converted, on data that calibration did not see.

    pip install -e '.[benchmark]'
    python -m benchmarks.compared --data DATA --models MODELS        about 20 minutes on 2 cores, most of it for SST-2

DATA and MODELS are those of benchmarks.quality. Each model is calibrated with 200 examples (SST-2: 2,000), converted at
keep 0.6 by default options, and not trained after it. Writes results/compared.json.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS
from hf_reparam import LowRankConfig

STORED = RESULTS / "compared.json"
KEEP, EXAMPLES = 0.6, 200
TASKS: Mapping[str, Callable[..., tasks.Task]] = {
    "minilm": partial(tasks.similarity, examples=EXAMPLES),
    "gpt2": partial(tasks.gpt2, examples=EXAMPLES),
    "llama": partial(tasks.llama, examples=EXAMPLES),
    "sst2": tasks.sentiment,
}


def measure(task: tasks.Task) -> dict[str, Any]:
    """The comparison, and the scores of the task itself."""
    config = LowRankConfig(keep=KEEP, exclude_modules=task.exclude)
    small = hf_reparam.convert(task.model, config, calibration=task.batches)
    found = hf_reparam.compare(task.model, small, **(task.unseen or {}), evaluate=task.score)
    print(f"{task.name}\n{found}\n", flush=True)
    return {"keep": KEEP, **found.to_dict()}


if __name__ == "__main__":
    tasks.run(__doc__, TASKS, measure, STORED)
