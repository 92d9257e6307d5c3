"""Pictures: what is drawn are the numbers, and what is missing is said."""

import pytest
import torch
from torch import nn

from hf_reparam import Entry, RankPlan, calibrate, convert, make_plan, plot, report
from hf_reparam.errors import PlanError, TargetError
from tests.launch import launch


def left_out(weight):
    """Relative error of rank 0, 1, 2 ... of a plain SVD."""
    squares = torch.linalg.svdvals(weight.double()).square().flip(0).cumsum(0).flip(0)
    return [1.0, *((squares[1:] / squares[0]) ** 0.5).tolist(), 0.0]


def test_spectrum_draws_what_a_rank_leaves_out():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    plan = RankPlan({"0": Entry(3)})
    ax = plot.spectrum(net, plan=plan)
    expected = [left_out(layer.weight.detach()) for layer in net]
    for line, errors in zip(ax.lines, expected, strict=True):
        assert line.get_ydata().tolist() == pytest.approx(errors, abs=1e-6)
    (mark,) = ax.collections
    assert mark.get_offsets().tolist()[0] == pytest.approx([3, expected[0][3]])
    assert len(plot.spectrum(net, names=["1"]).lines) == 1
    with pytest.raises(TargetError, match="nothing"):
        plot.spectrum(net, names=["nothing"])


@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_spectrum_in_a_metric_of_data_is_what_conversion_reports(metric):
    net, loss = nn.Sequential(nn.Linear(8, 8)), lambda m, b: m(**b).square().sum()
    moments = calibrate(net, [{"input": torch.randn(1, 50, 8)}], metric=metric, loss_fn=loss)
    ax = plot.spectrum(net, moments)
    for rank in (1, 3):
        small = convert(net, rank=rank, calibration=moments)
        assert ax.lines[0].get_ydata()[rank] == pytest.approx(report(small).layers[0].error, rel=1e-6)
    assert metric in ax.get_ylabel()


def test_ranks_puts_every_rank_in_its_place():
    specs = {"h.0.a": Entry(2), "h.1.a": Entry(3), "h.10.b": Entry(5), "pooler.dense": Entry(7)}
    wide = {"h.0": Entry(64, "heads"), "wte": Entry(999, "table")}  # no ranks of layers
    ax = plot.ranks(RankPlan({**wide, **specs}))
    rows = [label.get_text() for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    assert rows == ["-", "0", "1", "10"]
    assert columns == ["a", "b", "pooler.dense"]
    shown = {(rows[int(t.get_position()[1])], columns[int(t.get_position()[0])]): t.get_text() for t in ax.texts}
    assert ax.get_title() == "ranks: 2 to 7"
    assert shown == {("0", "a"): "2", ("1", "a"): "3", ("10", "b"): "5", ("-", "pooler.dense"): "7"}
    with pytest.raises(PlanError, match="nothing to draw"):
        plot.ranks(RankPlan(wide))


def test_ranks_of_a_real_plan_and_own_axes():
    from matplotlib import pyplot

    ax = pyplot.subplots()[1]
    plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5)
    assert plot.ranks(plan, ax=ax) is ax


def test_ranks_marks_the_layers_that_stay_dense():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64)) for _ in range(2)])
    plan = make_plan(net, rank={"0.0": 8})
    assert [text.get_text() for text in plot.ranks(plan).texts] == ["8", "dense"]


def test_layers_that_are_named_have_a_colour_each():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
    of_kind, named = plot.spectrum(net), plot.spectrum(net, names=["0.0", "2.0"])
    assert len({line.get_color() for line in of_kind.lines}) == 1
    assert [line.get_label() for line in named.lines] == ["0.0", "2.0"]
    assert len({line.get_color() for line in named.lines}) == 2


def test_frontier_is_sorted_by_size():
    ax = plot.frontier({"a": {0.8: 3.0, 0.4: 1.0}, "b": {0.5: 2.0}}, score="loss")
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.4, 0.8], [0.5]]
    assert list(ax.lines[0].get_ydata()) == [1.0, 3.0]
    assert plot.frontier({"a": {90.9: 1.0}}, size="MB").get_xlabel() == "MB"
    with pytest.raises(TargetError):
        plot.frontier({"a": {}})


@pytest.mark.slow
def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import hf_reparam\n"
        "try: hf_reparam.plot.frontier({'a': {1.0: 1.0}})\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install matplotlib" in launch("-c", code, processes=1)
