"""The report's sums, its folded rows, and what people read: text, Markdown, notebooks."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import Calibration, Comparison, Entry, LowRankConfig, RankPlan, Report
from hf_reparam.plan import Judgement, Speed
from hf_reparam.report import LayerReport, SkippedReport, TriedSize
from tests import zoo


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
    assert "layer.*.fc x2  16 x 16   4     544 -> 288  0.10..0.30" in text
    assert "layer.*.head x2  68          tied" in text


LONG = "model.language_model.layers.{}.block_sparse_moe.shared_expert.intermediate_projection.dense_h_to_4h"
SUBCLASS = "a subclass of Linear with a forward of its own, which nobody has vouched for, and which may be anything"


def of_many(**fields):
    """A model with long names and large numbers, as it is after all that a report can tell of."""
    sizes = {"in_features": 14_336, "out_features": 57_344, "parameters_before": 10**9, "parameters_after": 10**8}
    layers = tuple(LayerReport(LONG.format(i), "LinearLike", rank=8 * i + 8, form="pivoted", **sizes) for i in range(9))
    skipped = tuple(SkippedReport(f"{LONG.format(i)}.other", "Other", 10**7, SUBCLASS) for i in range(9))
    measured = {"measured ranks": 0.125, "predicted ranks": 0.25, "uniform ranks (activation)": 0.375}
    judgement = Judgement("nats per token", "measured ranks", 0.1, measured, 40)
    found = Report("ReparamNetForCausalLM", "fisher", layers, skipped, 10**10, 10**9, judgement=judgement)
    return replace(found, **fields)


def test_lines_have_at_most_100_columns_and_lose_nothing():
    text = str(of_many())
    assert max(map(len, text.splitlines())) <= 100
    headline, layers, left, _ = text.split("\n\n")
    head, _, *rows = layers.splitlines()
    name = "".join(row[: head.index("type")].strip() for row in rows)
    assert name == LONG.format("*") + " x9"
    assert "uniform ranks (activation) 0.375" in " ".join(headline.split())
    why = left.splitlines()[0].index("why")
    assert " ".join(line[why:].strip() for line in left.splitlines()[2:]).split() == SUBCLASS.split()


def test_long_lines_go_on_below_what_follows_their_title():
    lines = str(of_many(dropped=[f"{LONG.format(0)}.{kind}" for kind in ("first", "second")])).splitlines()
    (held,) = [
        i
        for i, line in enumerate(lines)
        if line.startswith("when planned:     0.125 nats per token on 40 held-out examples")
    ]
    assert re.match(r" {18}\S", lines[held + 1])
    (dropped,) = [
        i for i, line in enumerate(lines) if line.startswith("2 tensors of the source are not in the result:")
    ]
    assert re.match(r"model\.language_model", lines[dropped + 1])


def test_layers_that_repeat_are_one_line_with_their_range_of_ranks():
    few = of_many(skipped=())
    (row,) = [line for line in few.layer_table().splitlines() if " x9 " in line]
    assert "ReparamNetForCausalLM: 9 low-rank layers (fisher), pivoted\n" in str(few)
    assert "| LinearLike | 14336 x 57344 | 8..72 | 9,000,000,000 -> 900,000,000 |" in row
    other = replace(few.layers[0], name=LONG.format(9), form="pair")  # another fate, another line
    assert "| 8..72 pivoted |" in replace(few, layers=(*few.layers, other)).layer_table()
    assert "| 8 |" in replace(few, layers=(*few.layers, other)).layer_table()


def test_errors_are_shown_where_there_are_any():
    few = of_many(skipped=())
    errors = [replace(layer, error=0.126 if layer.rank > 8 else 0.001) for layer in few.layers]
    assert "error" not in replace(few, layers=[replace(layer, error=None) for layer in few.layers]).layer_table()
    assert "| <0.01..0.13 |" in replace(few, layers=errors).layer_table()


def test_what_was_measured_of_the_conversion_is_called_so():
    """Refitting, refining and training change the model, and not what was measured before."""
    assert " ".join(str(of_many(refitted_layers=3)).split()).count("when planned") == 2


def test_shared_weights_are_counted_once():
    skipped = hf_reparam.report(zoo.BY_BASE["T5ForConditionalGeneration"].build()).skipped
    told = {item.name: (item.parameters, item.reason) for item in skipped}
    assert told["shared"] == (3168, "Embedding is not a dense layer")
    assert told["encoder.embed_tokens"] == told["decoder.embed_tokens"] == (0, "shares the weights of shared")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"judgement": None}, "10,000,000,000 -> 1,000,000,000 parameters (10.0%)"),
        ({}, "(10.0%); when planned, held-out divergence 0.125 nats per token (predicted 0.1)"),
        ({"speed": Speed("cpu", 64, 1.5, 1.45, 1.25)}, "(predicted 0.1); 1.25 times as fast"),
        ({"judgement": None, "speed": Speed("cpu", 64, 1.5, 1.45)}, "(10.0%); targeted layers 1.45 times as fast"),
    ],
)
def test_the_last_line_sums_up(fields, line):
    last = " ".join(str(of_many(**fields)).rpartition("\n\n")[2].split())
    assert last.startswith("whole model: ")
    assert last.endswith(line)


def test_sizes_that_were_tried_are_told_with_their_scores():
    tried = (TriedSize(0.5, 600, 0.75), TriedSize(0.25), TriedSize(0.75, 700, 0.875, chosen=True))
    text = str(replace(report(), tried=tried))
    assert "keep 0.5    600                0.75\n" in text
    assert "keep 0.25   cannot be reached  -\n" in text
    assert "keep 0.75   700                0.875 (chosen)\n" in text
    assert replace(report(), tried=tried).to_dict()["tried"][2]["chosen"] is True


COMPARED = Comparison({"parameters": (100, 50), "<loss> & more": (0.5, None)}, "8 <texts>", "cpu (1 threads)")
PLAN = RankPlan({f"layer.{i}.fc": Entry(8 + i) for i in range(300)}, "bert", "fisher")


@pytest.mark.parametrize(
    "shown",
    [of_many(), PLAN, LowRankConfig(rank={"fc1": 3, "fc2": 0.5}, form="pivoted"), Calibration("fisher")],
    ids=lambda shown: type(shown).__name__,
)
def test_repr_is_short(shown):
    assert len(repr(shown)) < 300
    assert type(shown).__name__ in repr(shown)


def test_repr_says_what_counts():
    assert repr(PLAN) == "RankPlan(base_model_type='bert', metric='fisher', modules=300, ranks=8..307)"
    config = LowRankConfig(keep=0.5, exclude_modules=["a", "b"])
    assert eval(repr(config)) == config


@pytest.mark.parametrize("shown", [of_many(), PLAN, replace(PLAN, report=of_many()), COMPARED])
def test_notebooks_get_tables(shown):
    html = shown._repr_html_()
    assert html.count("<table>") == html.count("</table>") > 0
    assert html.count("<tr>") == html.count("</tr>") > 2


def test_text_is_escaped_in_notebooks():
    html = COMPARED._repr_html_()
    assert "&lt;loss&gt; &amp; more" in html
    assert "8 &lt;texts&gt;" in html
    layers = [replace(of_many().layers[0], kind="<script>alert(1)</script>")]
    assert "<script" not in replace(of_many(), model="<script>", layers=layers)._repr_html_()


def test_dense_model_lists_what_could_be_converted():
    text = str(report(rank=None))
    assert "Net: 2 dense layers that can be converted" in text
    assert "54% of them in these layers" in text
    assert "->" not in text


def test_markdown_tables():
    lines = report().to_markdown().splitlines()
    assert "| layer.*.fc x2 | 16 x 16 | 4 | 544 -> 288 | 0.10..0.30 |" in lines
    assert "| layer.*.head x2 | 68 | tied |" in lines


def test_bars_in_cells_are_escaped_in_markdown():
    skipped = (SkippedReport("fc", "Linear", 64, "left alone by exclude_modules='re:(query|key)'"),)
    assert "re:(query\\|key)" in Report("Net", "svd", (), skipped, 64, 64).to_markdown()


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


def test_a_plain_module_says_in_which_metric_it_was_made():
    net = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    data = [{"input": torch.randn(16, 48)} for _ in range(4)]
    assert hf_reparam.report(hf_reparam.convert(net, keep=0.5, calibration=data)).metric == "fisher"
    assert hf_reparam.report(hf_reparam.convert(net, keep=0.5)).metric == "svd"
