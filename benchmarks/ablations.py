"""Choices of calibration that could be made otherwise, one changed at a time, by default options and without training.

    pip install -e '.[benchmark]'
    python -m benchmarks.ablations --data DATA --models MODELS       for the folders see benchmarks.quality

*Draws*: gradients of four draws of labels (of a headless model: of random projections) for each example, in the place
of one. *Labels*: given ones in the place of drawn ones, or drawn ones where they are given. *Two stages*: converted to
half of the cut, merged, calibrated and converted again. *Input-only*: layers of one kind get the same ranks and factors
by the second moment of their inputs alone, without gradients. Writes results/ablations.json.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

import hf_reparam
from benchmarks import tasks
from benchmarks.machine import RESULTS
from hf_reparam import Calibration, LowRankConfig
from hf_reparam.calibrate import collect
from hf_reparam.config import layer_kind

STORED = RESULTS / "ablations.json"
DRAWS = 4
Batches = list[dict[str, Any]]


@contextmanager
def another_draw(number: int) -> Iterator[None]:
    """Other labels or projections than those that the content of an example gives."""
    usual = collect.objective

    def shifted(*given: Any, seeds: Sequence[int], **options: Any) -> torch.Tensor:
        return usual(*given, seeds=[seed + number for seed in seeds], **options)

    with mock.patch.object(collect, "objective", shifted):
        yield


def of_many_draws(model: nn.Module, batches: Batches) -> Calibration:
    """One calibration of several draws for each example, which are held out as those of one."""
    found: list[Calibration] = []
    for number in range(DRAWS):
        with another_draw(number):
            found.append(hf_reparam.calibrate(model, batches))
    whole = found[0]
    for one in found[1:]:
        whole = whole + one
    return replace(whole, batches=found[0].batches)


def other_labels(model: nn.Module, batches: Batches) -> Batches | None:
    """Batches without their labels, or a language model's with its tokens as labels; None for a headless model."""
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]])
        inputs = [torch.cat([start, batch["labels"][:, :-1]], 1) for batch in batches]
        rows = zip(batches, inputs, strict=True)
        return [{"input_features": batch["input_features"], "decoder_input_ids": ids} for batch, ids in rows]
    if "labels" in batches[0]:
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    if model.can_generate():
        return [batch | {"labels": batch["input_ids"]} for batch in batches]
    return None


def without_gradients(calibration: Calibration, kind: str) -> Calibration:
    """The same, where layers of a kind saw no gradient."""
    layers = {
        name: replace(moments, gradient_products=torch.zeros_like(moments.gradient_products), held=None)
        if layer_kind(name) == kind and moments.gradient_products is not None
        else moments
        for name, moments in calibration.layers.items()
    }
    return replace(calibration, layers=layers, curves={}, probes={})


def scores(task: tasks.Task, keep: float) -> dict[str, float]:
    """What is lost by every choice at one size."""
    model, batches = task.model, task.batches
    config = LowRankConfig(keep=keep, exclude_modules=task.exclude)
    lost: dict[str, float] = {}

    def note(name: str, small: nn.Module) -> None:
        lost[name] = task.score(small)["lost"]
        print(f"{task.name:24} keep {keep}  {name:50} {lost[name]:.4f}", flush=True)

    calibration = hf_reparam.calibrate(model, batches)
    plan = hf_reparam.make_plan(model, config, calibration)
    by_plan: Callable[..., nn.Module] = partial(hf_reparam.convert, model, plan)
    note("default", by_plan(calibration=calibration))
    for kind in sorted({layer_kind(name) for name in plan.modules}):
        note(f"input-only {kind}", by_plan(calibration=without_gradients(calibration, kind)))
    note("four draws", hf_reparam.convert(model, config, calibration=of_many_draws(model, batches)))
    relabelled = other_labels(model, batches)
    if relabelled is not None:
        name = "drawn labels" if "labels" in batches[0] else "given labels"
        note(name, hf_reparam.convert(model, config, calibration=hf_reparam.calibrate(model, relabelled)))
    first = hf_reparam.convert(model, replace(config, keep=(1 + keep) / 2), calibration=calibration)
    note("two stages", hf_reparam.convert(hf_reparam.merge(first), config, calibration=batches))
    return lost


TASKS: Mapping[str, Callable[..., tasks.Task]] = {
    "llama": partial(tasks.llama, examples=200),
    "gpt2": partial(tasks.gpt2, examples=200),
    "minilm": partial(tasks.similarity, examples=200),
    "sst2": tasks.sentiment,
    "whisper": partial(tasks.whisper, examples=50),
}


def main() -> None:
    tasks.run(
        __doc__, TASKS, lambda task: {"keep": {str(keep): scores(task, keep) for keep in task.keeps[-2:]}}, STORED
    )


if __name__ == "__main__":
    main()
