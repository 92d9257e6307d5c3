"""Pictures: what is drawn are the numbers, and what is missing is said."""

import subprocess
import sys

import pytest
from torch import nn

from hf_reparam import Entry, RankPlan, make_plan, plot
from hf_reparam.errors import PlanError, TargetError


def test_spectrum_draws_what_a_rank_leaves_out():
    layers = decompose(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    plan = RankPlan({"0": Entry(3)})
    ax = plot.spectrum(layers, plan=plan)
    for name, line in zip(("0", "1"), ax.lines, strict=True):
        drawn = line.get_ydata()
        assert drawn[0] == pytest.approx(1)
        expected = [layers.layers[name].relative_error(rank) for rank in range(1, len(drawn))]
        assert drawn[1:] == pytest.approx(expected, abs=1e-6)
    (mark,) = ax.collections
    assert mark.get_offsets().tolist()[0] == pytest.approx([3, layers.layers["0"].relative_error(3)])
    assert len(plot.spectrum(layers, ["1"]).lines) == 1
    with pytest.raises(TargetError, match="nothing"):
        plot.spectrum(layers, ["nothing"])


def test_ranks_puts_every_rank_in_its_place():
    specs = {"h.0.a": Entry(2), "h.1.a": Entry(3), "h.10.b": Entry(5), "pooler.dense": Entry(7)}
    ax = plot.ranks(RankPlan(specs))
    rows = [label.get_text() for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    assert rows == ["-", "0", "1", "10"]
    assert columns == ["a", "b", "pooler.dense"]
    shown = {(rows[int(t.get_position()[1])], columns[int(t.get_position()[0])]): t.get_text() for t in ax.texts}
    assert shown == {("0", "a"): "2", ("1", "a"): "3", ("10", "b"): "5", ("-", "pooler.dense"): "7"}
    with pytest.raises(PlanError, match="nothing to draw"):
        plot.ranks(RankPlan())


def test_ranks_of_a_real_plan_and_own_axes():
    from matplotlib import pyplot

    ax = pyplot.subplots()[1]
    plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=0.5)
    assert plot.ranks(plan, ax=ax) is ax


def test_frontier_is_sorted_by_size():
    ax = plot.frontier({"a": {0.8: 3.0, 0.4: 1.0}, "b": {0.5: 2.0}}, score="loss")
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.4, 0.8], [0.5]]
    assert list(ax.lines[0].get_ydata()) == [1.0, 3.0]
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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'hf-reparam[plot]'" in out
