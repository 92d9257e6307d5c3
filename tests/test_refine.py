"""`refine`: steps towards the dense model's predictions, judged by batches that took no part in them."""

import pytest
import torch

from hf_reparam import convert, merge, refine
from hf_reparam.errors import TargetError
from hf_reparam.recover import refine as module
from hf_reparam.report import RefineReport
from tests import zoo


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return zoo.BY_BASE["BertForMaskedLM"].build()


def batches(count=10):
    return [
        {"input_ids": torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(i))} for i in range(count)
    ]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_predictions_come_nearer_and_the_rest_stays(dense):
    small = convert(dense, rank=6)
    small.train()
    small.bert.encoder.layer[0].output.dense.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    before, stock = state(small), state(dense)
    report = refine(small, dense, batches(), epochs=2)
    assert isinstance(report, RefineReport)
    assert report.after < report.before
    assert len(report.epochs) == 2
    assert small.training
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == wanted
    assert all(torch.equal(value, stock[name]) for name, value in dense.state_dict().items())
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert "bert.encoder.layer.0.output.dense.up.weight" in changed
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in changed
    assert not any("embeddings.weight" in name for name in changed)
    assert type(merge(small)) is type(dense)


@pytest.mark.slow
def test_the_best_epoch_is_kept(dense, monkeypatch):
    small = convert(dense, rank=6)
    monkeypatch.setattr(module, "_RATES", (3.0,))  # every step makes it worse
    before = state(small)
    report = refine(small, dense, batches(), epochs=2)
    assert min(report.epochs) > report.before == report.after
    assert "none of 2 kept" in str(report)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.slow
def test_the_learning_rate_is_the_one_that_does_best_on_held_out_data(dense, monkeypatch):
    monkeypatch.setattr(module, "_RATES", (3.0, 1e-3, 1e-9))
    assert refine(convert(dense, rank=6), dense, batches(), epochs=1).learning_rate == 1e-3


def test_an_interruption_leaves_the_best_weights(dense, monkeypatch):
    small = convert(dense, rank=6)
    before, calls = state(small), []

    def broken(*args):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return original(*args)

    original = module.divergence
    monkeypatch.setattr(module, "divergence", broken)
    with pytest.raises(KeyboardInterrupt):
        refine(small, dense, batches(), epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.slow
def test_it_is_the_same_twice(dense):
    found = []
    for _ in range(2):
        small = convert(dense, rank=6)
        refine(small, dense, batches(), epochs=1)
        found.append(state(small))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_epochs_are_counted(dense, epochs):
    with pytest.raises(TargetError, match="epochs must be an int of at least 1"):
        refine(convert(dense, rank=6), dense, batches(), epochs=epochs)


def test_what_cannot_be_refined(dense):
    with pytest.raises(TargetError, match="no low-rank layer"):
        refine(dense, dense, batches())
    with pytest.raises(TargetError, match="give at least two"):
        refine(convert(dense, rank=6), dense, batches(1))
