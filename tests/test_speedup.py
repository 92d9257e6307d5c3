"""Ranks and forms chosen by measured times; what a layer has to save, and which ranks are tried by default."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan
from hf_reparam.compress import clock
from hf_reparam.compress.units import Parameters, Seconds
from hf_reparam.config import FORMS
from hf_reparam.errors import PlanError, RankError, TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.linalg.allocate import Options
from hf_reparam.model.sites import Found
from hf_reparam.plan import RankPlan, Speed
from hf_reparam.structures.linear import Linears
from hf_reparam_cli import main
from tests import zoo

OVERHEAD = 400.0  # of every product, in the unit of `work`


def work(module):
    """Multiply-adds of a row, and what every product costs beside."""
    if isinstance(module, LowRankLinear):
        pivoted = module.form == "pivoted"
        rest = module.in_features - module.rank if pivoted else module.in_features
        return module.rank * (rest + module.out_features) + (2 + pivoted) * OVERHEAD
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features + OVERHEAD
    return sum(map(work, module.children()))


def ran(call):
    """The modules that a call runs."""
    if call.func is clock._run:
        return [layer for layer, _ in call.args[0]]
    return [next(call.args[0]) if call.func is clock._run_next else call.func]


@pytest.fixture
def counted(monkeypatch):
    """Times that are computed in the place of measured ones, and of what."""
    seen = []

    def medians(calls, device, **options):
        modules = {key: ran(call) for key, call in calls.items()}
        seen.extend(modules.items())
        return {key: sum(map(work, some)) for key, some in modules.items()}

    monkeypatch.setattr(clock, "medians", medians)
    monkeypatch.setattr(clock, "_MOST_COPIES", 1)  # no time is read: no need to keep weights out of the cache
    return seen


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 32), nn.Linear(32, 8)
    )


def batches(count=10):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * 0.9 ** torch.arange(96)
    return [{"input": torch.randn(16, 96, generator=generator) @ mix} for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [1.25, 2.0, 3.0])
def test_layers_together_take_their_share_of_the_time(counted, asked):
    model, calibration = net(), calibrate(net(), batches())
    plan = make_plan(model, calibration=calibration, speedup=asked)
    assert asked * 0.99 <= plan.report.speed.layers < asked * 1.1
    assert work(net()) / work(convert(model, plan, calibration=calibration)) == pytest.approx(
        plan.report.speed.layers, abs=1e-3
    )
    assert plan.report.speed == Speed("cpu", 1024, asked, plan.report.speed.layers, plan.report.speed.layers)
    assert "3" not in plan.modules  # 32 x 8: two products take longer than one


@pytest.mark.slow
@pytest.mark.parametrize("off", [0.8, 1.25])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_curves_that_are_off_are_set_right_by_the_ranks_that_were_chosen(counted, monkeypatch, off, allocation):
    right = clock.medians

    def medians(calls, device, **options):
        return {key: took * (off if key[0] in FORMS else 1) for key, took in right(calls, device).items()}

    monkeypatch.setattr(clock, "medians", medians)
    plan = make_plan(net(), LowRankConfig(speedup=1.5, allocation=allocation), calibrate(net(), batches()))
    assert plan.report.speed.layers == pytest.approx(1.5, rel=0.06)


@pytest.mark.slow
def test_every_layer_gets_the_faster_form(counted):
    calibration = calibrate(net(), batches())
    plan = make_plan(net(), calibration=calibration, speedup=1.4)
    for name, entry in plan.modules.items():
        layer = net().get_submodule(name)
        pair, pivoted = (work(clock.drawn(layer, hf_reparam.Entry(entry.rank, form))) for form in ("pair", "pivoted"))
        assert entry.form == ("pair" if pair <= pivoted else "pivoted")
    only = make_plan(net(), LowRankConfig(speedup=1.4, form="pivoted"), calibration)
    assert {entry.form for entry in only.modules.values()} == {"pivoted"}


@pytest.mark.slow
def test_times_are_measured_once_for_each_shape_and_number_of_tokens(counted):
    calibration = calibrate(net(), batches())
    curves = lambda: sum(key[0] in FORMS for key, _ in counted)  # noqa: E731
    make_plan(net(), calibration=calibration, speedup=1.5)
    first = curves()
    assert first == 4 * 2 * 12 - sum(12 - len(clock._grid(most)) for most in (96, 95, 96, 95, 32, 31, 8, 7))
    model = net()
    state = torch.get_rng_state()
    make_plan(model, calibration=calibration, speedup=2.0)
    assert curves() == first
    make_plan(model, LowRankConfig(speedup=2.0, tokens=1), calibration)
    assert curves() == 2 * first
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers change


@pytest.mark.parametrize("fit", [4, 2])
def test_a_layer_finds_no_more_of_itself_in_the_cache_than_in_its_model(monkeypatch, fit):
    """Every call reads other weights, of as many bytes as the model's layers hold, or as no cache holds."""
    layers = nn.Sequential(*(nn.Linear(96, 64) for _ in range(4)))
    memory = sum(parameter.nbytes for parameter in layers.parameters())
    monkeypatch.setattr(clock, "_MOST_BYTES", (2 * fit + 1) * memory // 8)
    monkeypatch.setattr(clock, "_ALIGNED", 4)
    turns = {}
    monkeypatch.setattr(clock, "medians", lambda calls, *_, **__: turns.update(calls) or dict.fromkeys(calls, 1.0))
    clock.Clock(1, memory)._curves(Linears().sites(layers)[0])
    for key, weight, places in (("dense", "weight", fit), (("pair", 2), "up.weight", 4)):
        copies = [next(turns[key].args[0]) for _ in range(8)]
        assert copies[:4] == copies[4:], "then again from the first one"
        assert len({copy.get_parameter(weight).data_ptr() for copy in copies}) == places
        turns[key]()


def test_what_is_reached_is_the_time_of_one_layer_after_the_other(monkeypatch):
    """Each reads its own weights, as in the model."""
    seen = {}
    monkeypatch.setattr(clock, "medians", lambda calls, *_, **__: seen.update(calls) or {"dense": 3.0, "small": 2.0})
    layers = nn.Sequential(*(nn.Linear(96, 64) for _ in range(3)))
    entries = [hf_reparam.Entry(4, "pair"), None, hf_reparam.Entry(4, "pair")]
    assert clock.Clock(1).reached(list(zip(Linears().sites(layers), entries, strict=True))) == 1.5
    dense, small = ran(seen["dense"]), ran(seen["small"])
    assert dense == list(layers)
    assert small[1] is dense[1]
    assert [layer.rank for layer in small[::2]] == [4, 4]
    assert small[0].up.weight.data_ptr() != small[2].up.weight.data_ptr()
    seen["small"]()


def test_copies_have_the_layout_and_the_dtypes_of_the_layer():
    layer = nn.Linear(64, 96, dtype=torch.bfloat16)
    layer.weight, layer.bias = nn.Parameter(torch.randn(64, 96).bfloat16().t()), nn.Parameter(torch.randn(96))
    copies = clock._copied(layer, 3, clock._numbers(2 * clock._bytes(layer), layer.weight))
    for one in copies:
        assert one.weight.stride() == layer.weight.stride() == (1, 96)
        assert one.weight.data_ptr() % 64 == 0
        assert one.bias is layer.bias, "of another dtype: its own"
    assert len({one.weight.data_ptr() for one in copies}) == 2
    assert layer.weight.data_ptr() not in {one.weight.data_ptr() for one in copies}


@pytest.mark.slow
def test_inside_inference_mode(counted):
    model = net()
    with torch.inference_mode():
        assert make_plan(model, speedup=1.5).report.speed.layers >= 1.4


def test_long_measurements_are_repeated_less(monkeypatch):
    monkeypatch.setattr(clock, "_LEAST", 0.0)
    calls = []
    clock.medians({"a": lambda: calls.append(0)}, torch.device("cpu"))
    clock.medians({"a": lambda: calls.append(1)}, torch.device("cpu"), patience=0.0)
    assert [calls.count(0), calls.count(1)] == [2 + 7, 2 + 3]


@pytest.mark.slow
def test_compiled_layers_are_timed_as_torch_compile_makes_them(counted, monkeypatch):
    usual, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda layer: compiled.append(layer) or usual(layer, backend="eager"))
    small = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96))
    calibration = calibrate(small, batches())
    eager = make_plan(small, LowRankConfig(speedup=1.25), calibration)
    assert not compiled
    counted.clear()
    plan = make_plan(small, LowRankConfig(speedup=1.25, compiled=True), calibration)
    timed = [module for _, some in counted for module in some]
    assert len(timed) > 20
    assert all(hasattr(module, "_orig_mod") for module in timed), "eager times are not taken for compiled ones"
    assert plan.modules == eager.modules, "the work is the same here"


@pytest.mark.slow
def test_every_compiled_layer_is_compiled(monkeypatch):
    """Layers share their code, of which torch compiles no more than eight by itself; each before it is timed."""
    usual, graphs, timed, before = torch.compile, [], clock.medians, []
    monkeypatch.setattr(
        clock, "medians", lambda *given, **options: before.append(len(graphs)) or timed(*given, **options)
    )

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda layer: usual(layer, backend=backend))
    monkeypatch.setattr(clock, "_LEAST", 0.0)
    torch.compiler.reset()
    (site,) = Linears().sites(nn.Sequential(nn.Linear(96, 96)))
    curves = clock.Clock(4, 3 * clock._bytes(site.module), compiled=True)._curves(site)
    assert before == [len(graphs)]
    assert len(graphs) == sum(len(ranks) for ranks, _ in curves.values()) > 20


def test_speed_of_experts_alone_is_refused():
    model = zoo.BY_BASE["MixtralForCausalLM"].build()
    with pytest.raises(TargetError, match="speedup counts the time of dense layers"):
        make_plan(model, LowRankConfig(speedup=1.5, target_modules="*.experts*"))


def test_what_is_not_calibrated_with_may_be_too_small_for_its_share():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)), nn.Linear(96, 2)

        def forward(self, x):
            return self.body(x), self.other(x.detach())

    model, data = Net(), [{"x": batch["input"]} for batch in batches()]
    calibration = calibrate(model, data, loss_fn=lambda model, batch: model(**batch)[0].square().sum())
    plan = make_plan(model, calibration=calibration, keep=0.5)
    assert set(plan.modules) == {"body.0", "body.1"}
    weights = plan.report.factored_after - 2 * 96  # without biases
    assert weights + 2 * 96 <= 0.5 * (2 * 96 * 96 + 2 * 96) < weights + 5 * 96


@pytest.mark.slow
def test_what_no_rank_reaches_is_refused_with_the_highest_speed(counted):
    with pytest.raises(RankError, match=r"speedup=50 cannot be reached: .* a speedup of \d\.\d\d"):
        make_plan(net(), LowRankConfig(speedup=50, min_rank=4), calibrate(net(), batches()))


@pytest.mark.slow
def test_without_calibration_and_without_speedup(counted):
    plan = make_plan(net(), speedup=2)
    assert plan.report.speed.layers >= 2
    assert plan.report.speed.model is None
    assert not make_plan(net(), speedup=1.0).modules
    with pytest.raises(WeightError, match="meta device"):
        make_plan(net().to("meta"), speedup=2)


@pytest.mark.slow
def test_saved_and_read_again(counted, tmp_path, capsys):
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    small = convert(model, LowRankConfig(speedup=1.05, min_rank=1, tokens=7))
    small.save_pretrained(tmp_path)
    speed = hf_reparam.report(small).speed
    assert (speed.asked, speed.tokens, speed.device) == (1.05, 7, "cpu")
    assert hf_reparam.report(AutoModelForSequenceClassification.from_pretrained(tmp_path)).speed == speed
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"speed:            {speed}" in capsys.readouterr().out
    assert str(speed).endswith("with 7 tokens a call on cpu")
    assert str(replace(speed, tokens=1)).endswith("with 1 token a call on cpu")
    stored = json.loads((tmp_path / "config.json").read_text())["reparam"]
    for wrong in ({"asked": "2"}, {"tokens": 1.5}, {"more": 1}, {"device": 3}, {"model": float("nan")}):
        changed = {**stored["record"]["speed"], **wrong}
        with pytest.raises(PlanError, match=r"reparam\.record\.speed"):
            RankPlan.from_dict({**stored, "record": {**stored["record"], "speed": changed}})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"speedup": 0.5}, RankError, "at least 1"),
        ({"speedup": float("inf")}, RankError, "at least 1"),
        ({"speedup": 2, "keep": 0.5}, TargetError, "give one of"),
        ({"tokens": 8, "keep": 0.5}, TargetError, "go with speedup"),
        ({"compiled": True, "keep": 0.5}, TargetError, "go with speedup"),
        ({"speedup": 2, "tokens": 0}, RankError, "tokens must be"),
        ({"speedup": 2, "embeddings": True}, TargetError, "leave out embeddings"),
        ({"keep": 0.5, "least_saving": 1.0}, RankError, "least_saving"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        LowRankConfig(**options)


def test_layers_that_would_save_little_stay_dense():
    entries = [hf_reparam.Entry(4), hf_reparam.Entry(6), hf_reparam.Entry(9), None]
    options = Options(entries, torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([50.0, 90.0, 91.0, 100.0]))
    left = Parameters("pair", 0.1).priced(None, options)
    assert left.entries == [hf_reparam.Entry(4), hf_reparam.Entry(6), None]
    assert (left.errors.tolist(), left.costs.tolist()) == ([3, 2, 0], [50, 90, 100])
    calibration = calibrate(net(), batches())
    for least in (0.1, 0.5):
        plan = make_plan(net(), LowRankConfig(keep=0.6, least_saving=least, verify=False), calibration)
        rows = [(r.in_features * r.out_features, r.parameters_after - r.out_features) for r in plan.report.layers]
        assert min(1 - after / dense for dense, after in rows) >= least


def test_ranks_are_multiples_of_8_in_large_layers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 300), nn.Linear(300, 100))
    ranks = [entry.rank for entry in make_plan(model, keep=0.53).modules.values()]
    assert ranks[0] % 8 == 0
    assert ranks[1] % 8
    fine = make_plan(model, LowRankConfig(keep=0.53, multiple_of=1)).modules["0"].rank
    assert fine > ranks[0]


def test_a_rank_that_takes_as_long_as_a_higher_one_is_left_out():
    class Stepped:
        def seconds(self, site, entry):
            return 9.0 if entry is None else {2: 5.0, 3: 5.0, 4: 7.0, 5: 9.0}[entry.rank]

    entries = [*(hf_reparam.Entry(rank) for rank in (2, 3, 4, 5)), None]
    options = Options(entries, torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), torch.arange(5.0))
    item = Found("fc", Linears(), None)
    left = Seconds(Stepped(), ("pair",)).priced(item, options)
    assert left.entries == [hf_reparam.Entry(3), hf_reparam.Entry(4), None]
    assert (left.errors.tolist(), left.costs.tolist()) == ([3, 2, 0], [5, 7, 9])


@pytest.mark.usefixtures("counted")
def test_a_speedup_that_is_not_reached_is_warned_of(monkeypatch):
    monkeypatch.setattr(clock.Clock, "reached", lambda self, layers: 0.6)
    with pytest.warns(UserWarning, match=r"speedup=1.5 was not reached: targeted layers 0.60 times as fast"):
        make_plan(net(), speedup=1.5)
