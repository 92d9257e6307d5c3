"""The report's sums, its folded rows, and its three renderings."""

import json

from hf_reparam import Report
from hf_reparam.report import LayerReport, SkippedReport


def report(rank=4):
    layers = tuple(
        LayerReport(f"layer.{i}.fc", "Linear", 16, 16, rank, 272, 144 if rank else 272, e, "pair" if rank else None)
        for i, e in enumerate((0.1, 0.3))
    )
    skipped = (SkippedReport("layer.0.head", "Linear", 34, "tied"), SkippedReport("layer.1.head", "Linear", 34, "tied"))
    return Report("Net", "svd", layers, skipped, 1000, 744)


def test_sums_have_their_denominators():
    r = report()
    assert (r.factored_before, r.factored_after, r.coverage) == (544, 288, 0.544)
    assert Report("Net", "svd", (), (), 0, 0).coverage == 0.0


def test_table_folds_repeated_layers():
    text = str(report())
    assert "Net: 2 low-rank layers (svd)" in text
    assert "factored layers:  544 -> 288 parameters (52.9%)" in text
    assert "whole model:      1,000 -> 744 parameters (74.4%)" in text
    assert "layer.*.fc (x2)  Linear  16 x 16   4     544 -> 288  0.100..0.300" in text
    assert "layer.*.head (x2)  68          tied" in text


def test_dense_model_lists_what_could_be_converted():
    text = str(report(rank=None))
    assert "Net: 2 dense layers that can be converted" in text
    assert "54% of them in these layers" in text
    assert "->" not in text


def test_markdown_tables():
    lines = report().to_markdown().splitlines()
    assert "| layer.*.fc (x2) | Linear | 16 x 16 | 4 | 544 -> 288 | 0.100..0.300 |" in lines
    assert "| layer.*.head (x2) | 68 | tied |" in lines


def test_dict_is_json():
    data = json.loads(json.dumps(report().to_dict()))
    assert data["layers"][1] == {
        "name": "layer.1.fc",
        "kind": "Linear",
        "in_features": 16,
        "out_features": 16,
        "rank": 4,
        "parameters_before": 272,
        "parameters_after": 144,
        "error": 0.3,
        "form": "pair",
        "metric": None,
        "from_rank": None,
    }
    assert data["factored_after"] == 288
    assert data["skipped"][0]["reason"] == "tied"
