"""One bar for the whole of a conversion, which names the stage that it is in."""

import io
import sys

import pytest
import torch
from torch import nn
from tqdm import tqdm

import hf_reparam
from hf_reparam.layers.progress import each, one_bar, stage


@pytest.fixture
def bars(monkeypatch):
    """The bars that are shown, each with what it says, in order."""
    made = {}

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            made[self] = []
            super().__init__(*args, **{**kwargs, "disable": False, "mininterval": 0, "file": io.StringIO()})

        def refresh(self, *args, **kwargs):
            said = self.desc.removesuffix(": ")
            if said not in made[self][-1:]:
                made[self].append(said)
            return super().refresh(*args, **kwargs)

    monkeypatch.setattr(sys.modules["hf_reparam.layers.progress"], "tqdm", Bar)
    return made


def net():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


DATA = [{"input": torch.randn(40, 64, generator=torch.Generator().manual_seed(i))} for i in range(10)]


@pytest.mark.slow
def test_a_conversion_has_one_bar_with_named_stages(bars):
    hf_reparam.convert(net(), keep=0.5, calibration=DATA)
    ((bar, said),) = bars.items()
    outer = [text for text in dict.fromkeys(said) if "," not in text]
    assert outer == ["calibrating", "decomposing", "probing", "judging", "factoring"]
    assert [text for text in said if text.startswith("judging ")] == [f"judging {i}/4, factoring" for i in range(1, 5)]
    assert (bar.n, bar.total, bar.unit) == (2, 2, "layer")


def test_two_conversions_have_two_bars(bars):
    for rank in (4, 8):
        hf_reparam.convert(net(), rank=rank)
    assert list(bars.values()) == [["factoring"], ["factoring"]]


def test_each_learning_rate_that_is_tried_has_its_name(bars):
    dense = net()
    small = hf_reparam.convert(dense, rank=8)
    report = hf_reparam.refine(small, dense, DATA, epochs=2)
    _, (bar, said) = bars.items()
    assert said[:2] == ["reading", "trying a learning rate of 0.004"]
    assert f"trying a learning rate of {report.learning_rate:g}" in said
    assert (said[-1], bar.n) == ("refining", bar.total)


def test_a_comparison_says_when_it_measures_times(bars):
    hf_reparam.compare(net(), net(), DATA)
    assert [said[-2:] for said in bars.values()] == [["comparing", "timing"]]


@pytest.mark.slow
def test_search_says_how_many_sizes_it_has_tried(bars):
    hf_reparam.search_plan(net(), lambda model: 1.0, 0.1, config=hf_reparam.LowRankConfig(min_rank=1))
    (said,) = bars.values()
    assert "searching 3/7, factoring" in said


def test_what_is_done_of_the_outer_stage_is_shown_again_when_the_inner_one_ends(bars):
    with stage("outer", 3, "part") as advance:
        advance(1)
        with stage("inner", 5, "piece") as inner:
            inner(2)
        ((bar, said),) = bars.items()
        assert (bar.n, bar.total, bar.unit) == (1, 3, "part")
        advance(1)
        assert bar.n == 2
    assert said == ["outer", "outer 2/3, inner", "outer"]


def test_an_error_leaves_no_stage_behind(bars):
    def broken():
        with one_bar():
            for _ in each([1, 2], "broken", "item"):
                raise ValueError("no more")

    with pytest.raises(ValueError, match="no more") as caught:
        broken()
    with stage("next", 1, "item") as advance:
        advance(1)
    assert list(bars.values()) == [["broken"], ["next"]]
    del caught  # which holds the generator, that may end as late as this


def test_stages_that_end_after_their_bar_say_nothing(bars):
    with one_bar():
        outer, inner = each([1, 2], "outer", "item"), each([1, 2], "inner", "piece")
        next(outer), next(inner)
    (said,) = bars.values()
    assert said == ["outer", "outer 1/2, inner"]
    inner.close()
    outer.close()
    assert said == ["outer", "outer 1/2, inner"]
