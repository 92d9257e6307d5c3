"""A project that uses the public names; `mypy --strict` has to accept it, and to know what the functions return."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import hf_reparam
from hf_reparam import Calibration, Entry, RankPlan, Report
from hf_reparam.report import RefitReport


def batches() -> Iterator[dict[str, torch.Tensor]]:
    yield {"input": torch.randn(4, 8)}


def work(model: nn.Sequential, out: Path) -> float:
    assert_type(hf_reparam.convert(model, rank=8), nn.Sequential)
    small = hf_reparam.convert(model, keep=0.5, calibration=batches())
    report = hf_reparam.report(small)
    assert_type(small, nn.Sequential)
    assert_type(report, Report)
    moments = hf_reparam.calibrate(model, batches(), metric="activation")
    assert_type(moments, Calibration)
    moments.save(out / "moments.safetensors")
    made = Calibration.load(out / "moments.safetensors")
    assert_type(made, Calibration)
    plan = hf_reparam.make_plan(model, hf_reparam.LowRankConfig(keep=0.5, form="pair"), calibration=made)
    assert_type(plan, RankPlan)
    edited = RankPlan({**plan.modules, "0": Entry(rank=4)}, plan.base_model_type, plan.metric)
    assert_type(hf_reparam.report(hf_reparam.convert(model, edited)), Report)
    assert_type(hf_reparam.convert_folder("a", out / "b", rank={"*.query": 8}), Report)
    assert_type(hf_reparam.search_plan(model, lambda m: float(m is small), 0.1), RankPlan)
    assert_type(hf_reparam.refit(small, model, batches(), calibration=made), RefitReport)
    assert_type(plan.report, Report | None)
    try:
        hf_reparam.merge(small, inplace=True)
    except hf_reparam.ReparamError as error:
        print(error)
    return max(layer.error or 0.0 for layer in report.layers)
