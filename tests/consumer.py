"""A project that uses the public names; `mypy --strict` has to accept it, and to know what the functions return."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import hf_reparam
from hf_reparam import ConversionReport, Decompositions, LayerSpec, Moments, RankPlan


def batches() -> Iterator[dict[str, torch.Tensor]]:
    yield {"input": torch.randn(4, 8)}


def work(model: nn.Sequential, out: Path) -> float:
    assert_type(hf_reparam.convert(model, rank=8), nn.Sequential)
    small, report = hf_reparam.convert(model, keep=0.5, calibration=batches(), return_report=True)
    assert_type(small, nn.Sequential)
    assert_type(report, ConversionReport)
    moments = hf_reparam.collect_moments(model, batches(), metric="activation")
    assert_type(moments, Moments)
    moments.save(out / "moments.safetensors")
    made = hf_reparam.decompose(model, Moments.load(out / "moments.safetensors"))
    assert_type(made, Decompositions)
    plan = hf_reparam.make_plan(model, made, keep=0.5, form="pair")
    assert_type(plan, RankPlan)
    edited = RankPlan({**plan.modules, "0": LayerSpec(rank=4)}, plan.base_model_type, plan.method)
    assert_type(hf_reparam.summarize(hf_reparam.convert(model, plan=edited)), ConversionReport)
    assert_type(hf_reparam.convert_checkpoint("a", out / "b", rank={"*.query": 8}), ConversionReport)
    try:
        hf_reparam.merge(small, inplace=True)
    except hf_reparam.ReparamError as error:
        print(error)
    return max(layer.error or 0.0 for layer in report.layers)
