"""Plans from a budget: kept, monotone, reviewable, and applied by `convert` as they are."""

import json
import math

import pytest
import torch
from torch import nn

from hf_reparam import (
    LowRankLinear,
    PlanError,
    RankError,
    RankPlan,
    TargetError,
    WeightError,
    collect_moments,
    convert,
    make_plan,
    merge,
)
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
    return model, collect_moments(model, data), data


def weights(model, plan):
    """Weights that the targeted layers hold under a plan, and dense."""
    low = convert(model, plan=plan) if plan.method == "svd" else None
    total = used = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            spec = plan.modules.get(name)
            total += module.weight.numel()
            used += spec.rank * sum(module.weight.shape) if spec else module.weight.numel()
    transform = plan.modules.get("cls.predictions.transform.dense")
    total += 32 * 32
    used += transform.rank * 64 if transform else 32 * 32
    assert low is None or isinstance(low, type(model))
    return used, total


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_budget_is_kept_and_nearly_used(bert, keep, allocation):
    model, moments, _ = bert
    used, total = weights(model, make_plan(model, moments, keep=keep, allocation=allocation))
    assert used <= keep * total
    if allocation == "global":
        assert used > keep * total - (32 + 48)  # one step of the widest layer


def test_without_data_it_is_plain_svd_with_equal_shares(bert):
    model = bert[0]
    plan = make_plan(model, keep=0.5)
    assert plan.method == "svd"
    assert {
        name.rpartition(".")[2]: spec.rank for name, spec in plan.modules.items() if "self" in name
    } == dict.fromkeys(("query", "key", "value"), 8)
    used, total = weights(model, plan)
    assert used <= 0.5 * total


def test_more_budget_is_a_smaller_predicted_and_measured_loss(bert):
    model, moments, data = bert
    dense = [model(**b).logits.log_softmax(-1).detach() for b in data]

    def divergence(small):
        pairs = zip(data, dense, strict=True)
        return sum(float((d.exp() * (d - small(**b).logits.log_softmax(-1))).sum().detach()) for b, d in pairs)

    losses = [divergence(convert(model, keep=keep, calibration=moments)) for keep in (0.2, 0.4, 0.6, 0.8)]
    assert losses == sorted(losses, reverse=True)


def test_fisher_and_global_beat_what_they_refine(bert):
    model, moments, data = bert
    dense = [model(**b).logits.log_softmax(-1).detach() for b in data]

    def divergence(**options):
        small = convert(model, keep=0.4, **options)
        pairs = zip(data, dense, strict=True)
        return sum(float((d.exp() * (d - small(**b).logits.log_softmax(-1))).sum().detach()) for b, d in pairs)

    plain = divergence()
    activation = divergence(calibration=moments, metric="activation")
    uniform = divergence(calibration=moments, allocation="uniform")
    best = divergence(calibration=moments)
    assert best < uniform < activation < plain


def test_multiple_of(bert):
    model, moments, _ = bert
    plan = make_plan(model, moments, keep=0.5, multiple_of=4)
    assert {spec.rank % 4 for spec in plan.modules.values()} == {0}
    used, total = weights(model, plan)
    assert used <= 0.5 * total


def test_keep_everything_leaves_everything_dense(bert):
    assert make_plan(bert[0], bert[1], keep=1.0).modules == {}
    assert make_plan(bert[0], keep=1.0).modules == {}


def test_plan_is_json_and_convert_applies_it(bert):
    model, moments, _ = bert
    plan = make_plan(model, moments, keep=0.5)
    again = RankPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    small, report = convert(model, plan=again, calibration=moments, return_report=True)
    assert small.config.reparam == plan.to_dict()
    assert report.method == "fisher"
    direct = convert(model, keep=0.5, calibration=moments)
    for a, b in zip(small.state_dict().values(), direct.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert {s.reason for s in report.skipped if s.kind == "Linear"} <= {"the plan leaves it dense", "output embeddings"}


def test_calibration_data_may_be_given_directly(bert):
    model, moments, data = bert
    a, b = convert(model, keep=0.5, calibration=data), convert(model, keep=0.5, calibration=moments)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "base", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_calibrated_models_save_load_and_merge(tmp_path, base):
    import transformers

    case = zoo.BY_BASE[base]
    model = case.build()
    small = convert(model, keep=0.5, calibration=[case.batch()])
    small.save_pretrained(tmp_path)
    loaded = getattr(transformers, case.auto).from_pretrained(tmp_path)
    assert loaded.config.reparam["method"] == "fisher"
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
    small = convert(net, rank=4, calibration=[{"input": x}], metric="activation")
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
    moments = collect_moments(net, data, loss_fn=lambda m, b: m(**b).square().sum())
    plan = make_plan(net, moments, keep=0.5)
    assert plan.modules["idle"].rank == plan.modules["used"].rank == 8


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_narrow_heads_never_grow_and_the_budget_holds(keep, multiple_of, allocation):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(2, 64))
    plan = make_plan(net, keep=keep, multiple_of=multiple_of, allocation=allocation)
    used = 0
    for name, module in net.named_children():
        dense, width = module.weight.numel(), sum(module.weight.shape)
        pair = plan.modules[name].rank * width if name in plan.modules else dense
        assert name not in plan.modules or pair < dense
        used += pair
    assert used <= keep * sum(m.weight.numel() for m in net)


def test_uniform_below_the_smallest_size():
    with pytest.raises(RankError, match="below the smallest size"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), keep=0.1)


@pytest.mark.parametrize("keep", [0, -0.5, 1.1, True, "0.5", math.nan])
def test_keep_out_of_range(bert, keep):
    with pytest.raises(RankError, match=r"keep must be in \(0, 1\]"):
        make_plan(bert[0], keep=keep)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0.001, "allocation": "global"}, RankError, "below the smallest size"),
        ({"keep": 0.5, "multiple_of": 0}, RankError, "multiple_of"),
        ({"keep": 0.5, "metric": "magic"}, TargetError, "metric is one of"),
        ({"keep": 0.5, "allocation": "magic"}, TargetError, "allocation of"),
        ({"keep": 0.5, "include": "magic"}, TargetError, "matches none"),
    ],
)
def test_wrong_options(bert, options, error, message):
    with pytest.raises(error, match=message):
        make_plan(bert[0], bert[1], **options)


def test_convert_wants_one_size_and_the_moments_of_the_plan(bert):
    model, moments, _ = bert
    for sizes in ({}, {"rank": 4, "keep": 0.5}):
        with pytest.raises(TargetError, match="exactly one of rank, keep and plan"):
            convert(model, **sizes)
    with pytest.raises(TargetError, match="nothing to convert"):
        convert(model, keep=1.0)

    def touched():
        raise AssertionError("calibration began")
        yield

    for wrong in ({"rank": 0}, {"rank": {"nope": 4}}, {"keep": 2}, {"keep": 0.5, "multiple_of": -1}):
        with pytest.raises((RankError, TargetError)):
            convert(model, calibration=touched(), **wrong)
    with pytest.raises(TargetError, match="needs calibration data"):
        convert(model, keep=0.5, metric="fisher")
    plan = make_plan(model, moments, keep=0.5)
    with pytest.raises(TargetError, match="give the same moments"):
        convert(model, plan=plan)
    with pytest.raises(PlanError, match="cannot be converted here"):
        convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), plan=plan, calibration=moments)
    with pytest.raises(TargetError, match="make plans from the dense model"):
        make_plan(convert(model, rank=4), keep=0.5)
    inputs = collect_moments(model, [{"input_ids": zoo._ids()}], metric="activation")
    with pytest.raises(WeightError, match="needs gradients"):
        convert(model, rank=4, calibration=inputs, metric="fisher")
