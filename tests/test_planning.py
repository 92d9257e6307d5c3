"""Plans from a budget: kept, monotone, reviewable, and applied by `convert` as they are."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan, calibrate, convert, make_plan, merge, search_plan
from hf_reparam.errors import PlanError, RankError, TargetError, WeightError
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.structures import source as source_module
from hf_reparam.structures.linear import Linears
from hf_reparam.structures.source import Source
from tests import zoo


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    model = zoo.BY_BASE["BertForMaskedLM"].build().double()  # divergences down to 1e-6 drown in float32
    with torch.no_grad():  # layers of very different weight, so that a global budget has something to find
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.intermediate.dense.weight *= 1 + 3 * i
            layer.attention.self.query.weight[8:] *= 0.05
    data = [{"input_ids": torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(i))} for i in range(12)]
    return model, calibrate(model, data, target_modules="*"), data


def size(spec, weight):
    """Counted here once more: r (in + out), and r^2 fewer with pivots."""
    if spec is None:
        return weight.numel()
    return spec.rank * sum(weight.shape) - (spec.rank**2 if spec.form == "pivoted" else 0)


def weights(model, plan):
    """Weights that the targeted layers hold under a plan, and dense."""
    low = convert(model, plan) if plan.metric == "svd" else None
    total = used = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
            used += size(plan.modules.get(name), narrow(name, module.weight, widths_of(plan)))
    assert low is None or isinstance(low, type(model))
    return used, total


def widths_of(plan):
    return {name: entry.rank for name, entry in plan.of(("heads",)).items()}


def narrow(name, weight, widths):
    """A matrix of the shape that this weight has with 4 heads of the width in a plan."""
    attention, _, layer = name.rpartition(".attention.")
    inner = 4 * widths.get(f"{attention}.attention", 8)
    shapes = {"output.dense": (32, inner)} | {f"self.{role}": (inner, 32) for role in ("query", "key", "value")}
    return torch.empty(shapes.get(layer, weight.shape)) if attention else weight


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_budget_is_kept_and_nearly_used(bert, keep, allocation, form):
    model, moments, _ = bert
    options = {"allocation": allocation, "form": form, "heads": allocation == "global"}
    plan = make_plan(model, LowRankConfig(keep=keep, min_rank=1, **options), calibration=moments)
    assert {entry.form for entry in plan.modules.values()} <= {form, "heads"}
    assert plan.of((form,))
    used, total = weights(model, plan)
    assert used <= keep * total
    if allocation == "global":
        assert used > keep * total - (32 + 48)  # one step of the widest layer


def test_without_data_it_is_plain_svd_with_equal_shares(bert):
    model = bert[0]
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, form="pair"))
    assert plan.metric == "svd"
    assert {
        name.rpartition(".")[2]: spec.rank for name, spec in plan.modules.items() if "self" in name
    } == dict.fromkeys(("query", "key", "value"), 8)
    used, total = weights(model, plan)
    assert used <= 0.5 * total


@pytest.mark.slow
def test_more_budget_is_a_smaller_predicted_and_measured_loss(bert):
    model, moments, data = bert
    dense = [model(**b).logits.log_softmax(-1).detach() for b in data]

    def divergence(small):
        pairs = zip(data, dense, strict=True)
        return sum(float((d.exp() * (d - small(**b).logits.log_softmax(-1))).sum().detach()) for b, d in pairs)

    losses = [
        divergence(convert(model, LowRankConfig(keep=keep, min_rank=1, heads=True), calibration=moments))
        for keep in (0.2, 0.4, 0.6, 0.8)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_fisher_and_global_beat_what_they_refine(bert):
    model, moments, data = bert
    dense = [model(**b).logits.log_softmax(-1).detach() for b in data]

    def divergence(calibration=None, **options):
        small = convert(model, LowRankConfig(keep=0.4, min_rank=1, **options), calibration=calibration)
        pairs = zip(data, dense, strict=True)
        return sum(float((d.exp() * (d - small(**b).logits.log_softmax(-1))).sum().detach()) for b, d in pairs)

    plain = divergence()
    activation = divergence(calibration=moments, metric="activation")
    uniform = divergence(calibration=moments, allocation="uniform")
    shared = divergence(calibration=moments)
    best = divergence(calibration=moments, heads=True)
    assert max(shared, best) < uniform < activation < plain


def test_multiple_of(bert):
    model, moments, _ = bert
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, multiple_of=4, heads=True), calibration=moments)
    assert {entry.rank % 4 for entry in plan.modules.values()} == {0}
    used, total = weights(model, plan)
    assert used <= 0.5 * total


def test_keep_everything_leaves_everything_dense(bert):
    assert make_plan(bert[0], calibration=bert[1], keep=1.0).modules == {}
    assert make_plan(bert[0], keep=1.0).modules == {}


def without_record(reparam):
    return {key: value for key, value in reparam.items() if key != "record"}


def test_plan_is_json_and_convert_applies_it(bert):
    model, moments, _ = bert
    config = LowRankConfig(keep=0.5, min_rank=1, heads=True)
    plan = make_plan(model, config, calibration=moments)
    assert {entry.form for entry in plan.modules.values()} == {"pivoted", "heads"}
    again = RankPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    small = convert(model, again, calibration=moments)
    report = hf_reparam.report(small)
    assert without_record(small.config.reparam) == plan.to_dict()
    assert report.metric == "fisher"
    direct = convert(model, config, calibration=moments)
    for a, b in zip(small.state_dict().values(), direct.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    expected = {(row.name, row.rank, row.form, row.parameters_before, row.parameters_after) for row in report.layers}
    assert {
        (row.name, row.rank, row.form, row.parameters_before, row.parameters_after) for row in plan.report.layers
    } == expected
    assert plan.report.parameters_after == report.parameters_after == small.num_parameters()
    assert {item.reason for item in plan.report.skipped if item.kind == "Linear"} <= {
        "the plan leaves it dense",
        "output embeddings",
        "task head: dense unless target_modules names it",
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("target_params", [13_000, 18_000, 20_000])
def test_target_params_counts_the_whole_model(bert, target_params, form):
    model, moments, _ = bert
    config = LowRankConfig(target_params=target_params, min_rank=1, form=form, heads=True)
    small = convert(model, config, calibration=moments)
    heads = [entry for entry in small.config.reparam["modules"].values() if entry["form"] == "heads"]
    narrower = 3 * 32 * len(heads)  # biases that are saved are not spent again
    assert target_params - 80 - narrower < small.num_parameters() <= target_params


def test_target_params_above_the_model_is_nothing_to_do(bert):
    with pytest.warns(UserWarning, match="nothing was factored"):
        small = convert(bert[0], target_params=10**9)
    assert not any(isinstance(module, LowRankLinear) for module in small.modules())


@pytest.mark.slow
def test_target_params_as_a_share(bert):
    model, moments, _ = bert
    share = make_plan(model, LowRankConfig(target_params=0.75, min_rank=1), calibration=moments)
    count = make_plan(
        model, LowRankConfig(target_params=int(0.75 * model.num_parameters()), min_rank=1), calibration=moments
    )
    assert share == count
    assert share.modules


def counted(monkeypatch, name):
    """How often a function of the source of factors is called, as a list that grows."""
    calls, function = [], getattr(source_module, name)

    def watched(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(source_module, name, watched)
    return calls


def unplanned(moments):
    """The same calibration, with nothing cached."""
    return replace(moments, curves={}, probes={})


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_plans_of_one_calibration_judge_a_weight_once(bert, metric, monkeypatch):
    model, moments, _ = bert
    options = {"min_rank": 1, "metric": metric, "allocation": "global"}
    expected = [make_plan(model, LowRankConfig(keep=k, **options), unplanned(moments)) for k in (0.3, 0.6)]
    calls, fresh = counted(monkeypatch, "curve"), unplanned(moments)
    assert [make_plan(model, LowRankConfig(keep=k, **options), fresh) for k in (0.3, 0.6)] == expected
    metrics = {"activation": 1, "fisher": 2}[metric]  # equal ranks are judged in the activation metric, too
    assert len(calls) == 12 * metrics  # two blocks of six layers
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(2)
        try:
            make_plan(model, LowRankConfig(keep=0.3, **options), fresh)
        finally:
            weight.div_(2)
    assert len(calls) == 13 * metrics  # of the layer that changed


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["svd", "activation", "fisher"])
def test_a_search_gives_the_same_models(bert, metric, monkeypatch):
    model, moments, _ = bert
    config = LowRankConfig(min_rank=1, metric=metric)
    calls, seen = counted(monkeypatch, "decompose"), []

    def evaluate(candidate):
        layers = {n: dense_matrix(m) for n, m in candidate.named_modules() if isinstance(m, LowRankLinear)}
        seen.append((layers, candidate.state_dict()))
        return -float(len(seen) > 4)

    source = None if metric == "svd" else moments
    plan = search_plan(model, evaluate, 0.5, source, config)
    names = {name for layers, _ in seen for name in layers}
    assert len(names) > 0
    assert len(calls) == len(names) or metric == "fisher"  # there layers are cut to be tried, too
    assert len(seen) == 8
    assert [size.score for size in plan.report.tried] == [0.0, *(-float(i > 4) for i in range(2, 9))]
    good = {size.parameters: size.chosen for size in plan.report.tried if size.score == 0}
    assert good == {count: count == plan.report.parameters_after == min(good) for count in good}
    small = convert(model, plan, calibration=source)
    expected = {n: dense_matrix(m) for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    layers, state = next(found for found in seen if {n: sizes(found[1], n) for n in found[0]} == ranks(small))
    for name, product in expected.items():
        torch.testing.assert_close(layers[name], product)
        if (bias := small.get_submodule(name).bias) is not None:
            torch.testing.assert_close(state[f"{name}.up.bias"], bias)


def sizes(state, name):
    return state[f"{name}.up.weight"].shape[1]


def ranks(model):
    return {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def test_a_layers_losses_count_its_tokens(bert):
    """One unit for all layers: what a direction costs over all the tokens that the layer saw, once or twice."""
    model, moments, _ = bert
    (site,) = [site for site in Linears().sites(model.bert) if site.name == "encoder.layer.0.output.dense"]
    sources = (Source.of(m, None) for m in (unplanned(moments), moments + moments))
    once, twice = (Linears().losses(site.name, site, source) for source in sources)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.slow
def test_tolerance_finds_the_smallest_size_that_holds_it(bert):
    model, moments, data = bert
    evaluated, tolerance = [], 0.3

    @torch.no_grad()
    def evaluate(candidate):
        """Minus ten times the relative change of the logits: 0 for the dense model."""
        evaluated.append(candidate)
        pairs = [(candidate(**b).logits, model(**b).logits) for b in data[:2]]
        return -sum(float((a - b).norm() / b.norm()) for a, b in pairs) * 10

    small = convert(
        model,
        search_plan(model, evaluate, tolerance, calibration=moments, config=LowRankConfig(min_rank=1, heads=True)),
        calibration=moments,
    )
    assert len(evaluated) == 8
    assert evaluate(small) >= -tolerance
    used, total = weights(model, RankPlan.from_dict(small.config.reparam))
    kept = used / total
    smaller = LowRankConfig(keep=kept - 2 / 128, min_rank=1, heads=True)
    assert evaluate(convert(model, smaller, calibration=moments)) < -tolerance


@pytest.mark.slow
def test_tolerance_that_every_size_holds_gives_the_smallest(bert):
    model, moments, _ = bert
    small = convert(
        model,
        search_plan(model, lambda m: 1.0, 0, calibration=moments, config=LowRankConfig(min_rank=1, verify=False)),
        calibration=moments,
    )
    plans = []
    for step in range(1, 16):
        with contextlib.suppress(RankError):
            config = LowRankConfig(keep=step / 128, min_rank=1, verify=False)
            plans.append(make_plan(model, config, calibration=moments))
    assert 1 < len(plans) < 15
    assert without_record(small.config.reparam) == plans[0].to_dict()


@pytest.mark.slow
def test_tolerance_that_no_size_holds(bert):
    scores = iter([1.0] + [0.0] * 7)
    with pytest.raises(RankError, match="no size has a score of 0.99 or above; the best had 0:"):
        search_plan(bert[0], lambda m: next(scores), 0.01)
    with pytest.raises(TargetError, match="search_plan finds the size"):
        search_plan(bert[0], len, 0.1, config=LowRankConfig(keep=0.5))
    for wrong in (-1, math.nan, "1", True):
        with pytest.raises(RankError, match="tolerance must be a number"):
            search_plan(bert[0], len, wrong)
    for score, message in (({"loss": 1.0}, r"a dict of \['loss'\]"), ("high", "'high', a str"), (math.nan, "NaN")):
        with pytest.raises(TargetError, match=message):
            search_plan(bert[0], lambda m, score=score: score, 0.1)


@pytest.mark.slow
def test_a_search_leaves_the_model_as_it_was(bert):
    model, moments, _ = bert
    modules, before = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    found = []
    search_plan(model, lambda m: found.append(m) or 0.0, 0.1, moments, LowRankConfig(min_rank=1, heads=True))
    assert found[0] is model
    assert list(model.modules()) == modules
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.slow
def test_pivots_need_more_inputs_than_the_rank(bert):
    model = bert[0]
    plan = RankPlan({"encoder.layer.0.attention.self.query": Entry(32, "pivoted")}, "bert")
    message = r"query: the plan gives it rank 32, above min\(in - 1, out\) = 31"
    with pytest.raises(PlanError, match=message):
        convert(model, plan)
    config = convert(model, rank=4).config
    config.reparam = plan.to_dict()
    with pytest.raises(PlanError, match=message):
        type(convert(model, rank=4))(config)


def test_default_forms(bert):
    model, moments, _ = bert
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, form="pair"), calibration=moments)
    for asked, calibration, form in (
        (LowRankConfig(rank=4), None, "pair"),
        (LowRankConfig(keep=0.5), None, "pivoted"),
        (plan, moments, "pair"),
        (LowRankConfig(rank=4, form="pivoted"), None, "pivoted"),
    ):
        small = convert(model, asked, calibration=calibration)
        assert {m.form for m in small.modules() if isinstance(m, LowRankLinear)} == {form}
        assert {layer["form"] for layer in small.config.reparam["modules"].values()} == {form}


@pytest.mark.slow
def test_calibration_data_may_be_given_directly(bert):
    model, moments, data = bert
    a, b = (
        convert(model, LowRankConfig(keep=0.5, min_rank=1), calibration=data),
        convert(model, LowRankConfig(keep=0.5, min_rank=1), calibration=moments),
    )
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_calibrated_models_save_load_and_merge(tmp_path, base):
    import transformers

    case = zoo.BY_BASE[base]
    model = case.build()
    small = convert(model, LowRankConfig(keep=0.5, min_rank=1), calibration=[case.batch()])
    small.save_pretrained(tmp_path)
    loaded = getattr(transformers, case.auto).from_pretrained(tmp_path)
    assert loaded.config.reparam["metric"] == "fisher"
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in loaded.state_dict().items())
    for a, b in zip(zoo.outputs(loaded, case.batch()), zoo.outputs(small, case.batch()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # equal tensors at other addresses may sum otherwise
    dense = merge(loaded)
    assert type(dense) is type(model)
    for a, b in zip(zoo.outputs(dense, case.batch()), zoo.outputs(small, case.batch()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bias_makes_the_mean_exact():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24).double())
    x = torch.randn(300, 24).double() + 2
    small = convert(net, LowRankConfig(rank=4, metric="activation"), calibration=[{"input": x}])
    assert isinstance(small[0], LowRankLinear)
    torch.testing.assert_close(small(x).mean(0), net(x).mean(0), atol=1e-5, rtol=1e-5)
    plain = convert(net, rank=4)
    error = [(m(x) - net(x)).square().mean().item() for m in (small, plain)]
    assert error[0] < 0.8 * error[1]


def test_a_layer_without_gradient_keeps_its_share(bert):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x)

    data = [{"x": torch.randn(50, 32)}]
    net = Net()
    moments = calibrate(net, data, loss_fn=lambda m, b: m(**b).square().sum())
    for form, rank in (("pair", 8), ("pivoted", 9)):  # 9 (64 - 9) = 495 of 512
        plan = make_plan(net, LowRankConfig(keep=0.5, min_rank=1, form=form), calibration=moments)
        assert plan.modules["idle"].rank == plan.modules["used"].rank == rank


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_narrow_heads_never_grow_and_the_budget_holds(keep, multiple_of, allocation, form):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(2, 64))
    plan = make_plan(
        net, LowRankConfig(keep=keep, min_rank=1, multiple_of=multiple_of, allocation=allocation, form=form)
    )
    used = 0
    for name, module in net.named_children():
        dense, low = module.weight.numel(), size(plan.modules.get(name), module.weight)
        assert name not in plan.modules or low < dense
        used += low
    assert used <= keep * sum(m.weight.numel() for m in net)


def test_uniform_below_the_smallest_size():
    with pytest.raises(RankError, match="below the smallest size"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), LowRankConfig(keep=0.1, min_rank=1))


@pytest.mark.parametrize("keep", [0, -0.5, 1.1, True, "0.5", math.nan])
def test_keep_out_of_range(bert, keep):
    with pytest.raises(RankError, match=r"keep must be in \(0, 1\]"):
        make_plan(bert[0], LowRankConfig(keep=keep, min_rank=1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0.001, "allocation": "global"}, RankError, "below the smallest size"),
        ({"keep": 0.5, "target_modules": "magic"}, TargetError, "matches none"),
        ({"keep": 0.5, "exclude_modules": "magic"}, TargetError, "matches none"),
        ({}, TargetError, "exactly one size"),
        ({"target_params": 3000}, RankError, "parameters lie outside of the targeted layers"),
        ({"target_params": 0.1}, RankError, "parameters lie outside of the targeted layers"),
    ],
)
def test_wrong_options(bert, options, error, message):
    with pytest.raises(error, match=message):
        make_plan(bert[0], LowRankConfig(**options), bert[1])


@pytest.mark.slow
def test_convert_wants_one_size_and_the_moments_of_the_plan(bert):
    model, moments, _ = bert
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, heads=True), calibration=moments)
    for asked, sizes in (
        (None, {}),
        (None, {"rank": 4, "keep": 0.5}),
        (LowRankConfig(min_rank=4), {}),
        (LowRankConfig(rank=4), {"keep": 0.5}),
        (plan, {"rank": 4}),
    ):
        with pytest.raises(TargetError, match="exactly one size, such as keep=0.5"):
            convert(model, asked, **sizes)
    with pytest.raises(TargetError, match="takes a RankPlan\\), got dict"):
        convert(model, plan.to_dict())

    def touched():
        raise AssertionError("calibration began")
        yield

    for wrong in ({"rank": 0}, {"rank": {"nope": 4}}, {"rank": 33}, {"keep": 2}):
        with pytest.raises((RankError, TargetError)):
            convert(model, calibration=touched(), **wrong)
    with pytest.raises(TargetError, match="needs calibration data"):
        convert(model, LowRankConfig(keep=0.5, min_rank=1, metric="fisher"))
    with pytest.raises(TargetError, match="needs calibration data"):
        convert(model, plan)
    other = zoo.BY_BASE["GPT2LMHeadModel"]
    with pytest.raises(PlanError, match=r"attention: the plan names it, and GPT2LMHeadModel has no such module"):
        convert(other.build(), plan, calibration=[other.batch()])
    separate = make_plan(model, LowRankConfig(keep=0.5, min_rank=1), calibration=moments)
    with pytest.raises(PlanError, match="the plan names it, and GPT2LMHeadModel has no such module"):
        convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), separate, calibration=moments)
    with pytest.raises(TargetError, match="convert the dense model, or merge"):
        make_plan(convert(model, rank=4), LowRankConfig(keep=0.5, min_rank=1))
    inputs = calibrate(model, [{"input_ids": zoo._ids()}], metric="activation")
    with pytest.raises(WeightError, match="needs gradients"):
        convert(model, LowRankConfig(rank=4, metric="fisher"), calibration=inputs)


def test_decompositions_are_kept_while_there_is_room(monkeypatch):
    made = []

    def decompose(weight, max_rank=None, **options):
        made.append(max_rank)
        return usual(weight, max_rank=max_rank, **options)

    usual = source_module.decompose
    monkeypatch.setattr(source_module, "decompose", decompose)
    monkeypatch.setattr(source_module, "_ROOM", 8 * 4 * 10)
    source, weight = Source("svd", kept={}), torch.randn(4, 6)
    first = source.decomposition("a", weight, centred=False, max_rank=2)
    assert source.decomposition("a", weight, centred=False, max_rank=3) is first
    assert len(first.singular_values) == 4
    for _ in range(2):
        assert len(source.decomposition("b", weight, centred=False, max_rank=2).singular_values) == 2
    assert made == [None, 2, 2]
