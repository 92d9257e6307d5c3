"""Refitting brings the predictions nearer to the dense model's, keeps ranks and forms, and keeps nothing that hurts."""

import copy
import sys

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, refit
from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.linalg.moments import SHRINKAGES
from hf_reparam.recover.refit import __name__ as REFIT
from tests import zoo


def data(count=5, rows=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 90, (rows, 9), generator=generator)} for _ in range(count)]


def sharp(base):
    """A model whose layers matter: with fresh weights every prediction is almost the same."""
    model = zoo.BY_BASE[base].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter *= 6
    return model


@torch.no_grad()
def distance(model, dense, batches):
    """Kullback-Leibler divergence from the dense model's predictions."""
    total = 0.0
    for batch in batches:
        p, q = (m(**batch).logits.log_softmax(-1) for m in (dense, model))
        total += float((p.exp() * (p - q)).sum())
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "form"),
    [
        ("BertForMaskedLM", "pair"),
        pytest.param("GPT2LMHeadModel", "pivoted", marks=pytest.mark.slow),
        pytest.param("LlamaForCausalLM", "pair", marks=pytest.mark.slow),
    ],
)
def test_predictions_come_nearer_on_unseen_data(base, form):
    dense, batches = sharp(base), data(20)
    moments = calibrate(dense, batches)
    plan = make_plan(dense, LowRankConfig(keep=0.5, form=form), calibration=moments)
    small = convert(dense, plan, calibration=moments)
    before = distance(small, dense, data(5, seed=1))
    report = refit(small, dense, batches, calibration=moments)
    assert distance(small, dense, data(5, seed=1)) < before
    assert 0 < len(report.layers) <= report.of == len(plan.modules)
    assert report.after < report.before
    assert {n: m.entry for n, m in small.base_model.named_modules() if isinstance(m, LowRankLinear)} == {
        n: s for n, s in plan.modules.items() if not n.startswith("cls")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "share"), [("BertForMaskedLM", 0.8), ("BartForConditionalGeneration", 0.8), ("AlbertForMaskedLM", 1.0)]
)
def test_what_is_complete_is_not_computed_again(base, share, monkeypatch):
    """Also not where a fit is refused, and without a change in any factor; ALBERT's one block runs several times."""
    dense = sharp(base)
    start = convert(dense, rank=4)
    batches = data()
    fitted, calls = [], []
    for room in (0, 1 << 30):
        small, count = copy.deepcopy(start), 0

        def forward(self, x, forward=LowRankLinear.forward):
            nonlocal count
            count += 1
            return forward(self, x)

        monkeypatch.setattr(sys.modules[REFIT], "_ROOM", room)
        with monkeypatch.context() as patch:
            patch.setattr(LowRankLinear, "forward", forward)
            refit(small, dense, batches)
        fitted.append(small.state_dict())
        calls.append(count)
    assert all(torch.equal(value, fitted[1][name]) for name, value in fitted[0].items())
    assert calls[1] <= share * calls[0]
    assert not any("forward" in vars(module) for module in (*start.modules(), *dense.modules()))


def unhooked(*models):
    return not any(m._forward_pre_hooks or m._forward_hooks for model in models for m in model.modules())


@pytest.mark.slow
def test_it_says_what_it_did_and_changes_the_model_alone(tmp_path):
    dense, batches = sharp("BertForMaskedLM"), data()
    original = copy.deepcopy(dense.state_dict())
    moments = calibrate(dense, batches)
    small, other = (convert(dense, keep=0.5, calibration=moments) for _ in range(2))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    report = refit(small, dense, batches, calibration=moments)
    assert str(report).startswith(f"refit:            {len(report.layers)} of {report.of} layers, divergence")
    again = refit(other, dense, iter(batches), calibration=moments)
    assert again == report
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in small.state_dict().items())
    moved = [key for key, value in small.state_dict().items() if not torch.equal(value, before[key])]
    assert {name for name in ranks(small) if any(key.startswith(f"{name}.") for key in moved)} == set(report.layers)
    assert all(key.startswith(tuple(f"{name}." for name in report.layers)) for key in moved)
    assert all(torch.equal(v, original[k]) for k, v in dense.state_dict().items())
    assert unhooked(dense, small)
    assert all(p.grad is None and p.requires_grad for m in (dense, small) for p in m.parameters())
    assert hf_reparam.report(small).refitted_layers == len(report.layers)
    assert f"refitted:         {len(report.layers)} layers" in str(hf_reparam.report(small))
    assert hf_reparam.report(small).to_dict()["refitted_layers"] == len(report.layers)
    small.save_pretrained(tmp_path)
    assert hf_reparam.report(type(small).from_pretrained(tmp_path)).refitted_layers == len(report.layers)


@pytest.mark.slow
def test_a_fit_that_does_not_help_is_not_kept(monkeypatch):
    dense, batches = sharp("BertForMaskedLM"), data()
    small = convert(dense, keep=0.5, calibration=batches)
    before = copy.deepcopy(small.state_dict())

    def harmful(layer, *_):
        layer.up.weight.mul_(30.0)

    monkeypatch.setattr("hf_reparam.recover.refit._fit", harmful)
    report = refit(small, dense, batches)
    assert report.layers == ()
    assert report.after == report.before
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_least_squares_is_solved():
    """One layer behind a perturbed one, full rank: the solution is that of ordinary least squares."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False)).double()
    small = convert(dense, LowRankConfig(rank={"0": 2, "2": 6}, allow_larger=True))
    batches = [{"input": torch.randn(4000, 6).double()} for _ in range(5)]
    x = torch.cat([b["input"] for b in batches[1:]])  # the first batch is held out
    refit(small, dense, batches)
    seen = small[1](small[0](x)).detach()
    best = torch.linalg.lstsq(seen, dense(x).detach()).solution
    fitted, least = ((out - dense(x)).square().mean().item() for out in (small(x), seen @ best))
    converted = (dense[2](seen) - dense(x)).square().mean().item()
    assert least <= fitted < 1.001 * least < 0.99 * converted


@pytest.mark.slow
def test_padding_does_not_matter():
    dense = sharp("BertForMaskedLM").double()
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in data()]
    padded = [{k: nn.functional.pad(v, (0, 40)) for k, v in b.items()} for b in batches]
    moments = calibrate(dense, batches)
    models = [convert(dense, keep=0.5, calibration=moments) for _ in range(2)]
    reports = [refit(m, dense, b, calibration=moments) for m, b in zip(models, (batches, padded), strict=True)]
    assert reports[0].layers == reports[1].layers != ()
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["BertModel", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_heads_and_no_head(base):
    dense, batches = sharp(base), data()
    moments = calibrate(dense, batches)
    small = convert(dense, LowRankConfig(keep=0.4, min_rank=1, heads=True), calibration=moments)
    report = refit(small, dense, batches, calibration=moments)
    assert report.after < report.before
    assert type(small).__name__ == f"Reparam{base}"


@pytest.mark.slow
def test_shared_layers_keep_their_factors():
    dense = sharp("AlbertForMaskedLM")
    small = convert(dense, rank=4, calibration=data())
    report = refit(small, dense, data())
    shared = {name for name in ranks(small) if "albert_layers" in name}
    assert len(shared) == 6
    assert set(report.skipped) == shared
    assert set(report.skipped.values()) == {"which a pass reaches more than once, or not at all"}
    assert not shared & set(report.layers)


def ranks(model):
    return {name: m.entry for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


@pytest.mark.slow
def test_wrong_arguments():
    dense, batches = sharp("BertForMaskedLM"), data(1)
    with pytest.raises(TargetError, match="1 were given: give at least two"):
        refit(convert(dense, rank=4), dense, batches)
    with pytest.raises(TargetError, match="no low-rank layer"):
        refit(dense, dense, batches)
    with pytest.raises(TargetError, match="the dense model has no Linear of this shape by that name"):
        refit(convert(dense, rank=4), zoo.BY_BASE["GPT2LMHeadModel"].build(), batches)


@pytest.mark.slow
def test_few_data_get_a_higher_shrinkage(monkeypatch):
    dense = sharp("BertForMaskedLM")
    start = convert(dense, LowRankConfig(rank=8, form="pair"), calibration=(moments := calibrate(dense, data(8))))
    fits = []
    for least in (True, False):
        if not least:
            monkeypatch.undo()
        else:
            monkeypatch.setattr(sys.modules[REFIT], "SHRINKAGES", SHRINKAGES[:1])
        small = copy.deepcopy(start)
        fits.append(refit(small, dense, data(10, rows=2), calibration=moments))
    assert fits[1].after < 0.98 * fits[0].after
    assert refit(small, dense, data(10, rows=2), calibration=moments).before == pytest.approx(fits[1].after, rel=1e-4)


@pytest.mark.slow
def test_a_distance_of_your_own_needs_no_logits(monkeypatch):
    dense = sharp("BertForMaskedLM")
    small = convert(dense, LowRankConfig(keep=0.5), calibration=(moments := calibrate(dense, data())))
    monkeypatch.setattr(sys.modules[REFIT], "unit_of", None)
    report = refit(
        small, dense, data(), calibration=moments, distance=lambda a, b: (a.logits - b.logits).square().sum()
    )
    assert report.unit == "per example"
    assert report.after < report.before


def test_a_calibration_of_some_layers_serves_a_model_of_which_these_are_low_rank():
    dense, some = sharp("BertForMaskedLM"), ["query", "key"]
    calibration = calibrate(dense, data(), target_modules=some)
    small = convert(dense, LowRankConfig(rank=4, target_modules=some), calibration=calibration)
    report = refit(small, dense, data(), calibration=calibration)
    assert report.of == 4


def test_what_is_refitted_twice_was_refitted():
    dense = sharp("BertForMaskedLM")
    small = convert(dense, rank=6)
    first = refit(small, dense, data())
    again = refit(small, dense, data(), distance=lambda mine, theirs: 1.0)  # no fit is better
    assert not again.layers
    assert hf_reparam.report(small).refitted_layers == len(first.layers) > 0
