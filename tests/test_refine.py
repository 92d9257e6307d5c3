"""`refine`: steps towards the dense model's predictions, judged by batches that took no part in them."""

import math

import pytest
import torch
from torch import nn

from hf_reparam import LowRankConfig, convert, merge, refine, refit
from hf_reparam.calibrate.padding import Part
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.recover import refine as module
from hf_reparam.recover.refit import parts_of
from hf_reparam.recover.synthetic import synthetic_parts
from hf_reparam.report import RefineReport
from tests import zoo
from tests.usage.test_objectives import masked_images


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
    monkeypatch.setattr(module, "_FIRST", 0)
    before = state(small)
    report = refine(small, dense, batches(), epochs=2)
    assert min(report.epochs) > report.before == report.after
    assert "none of 2 kept" in str(report)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rates", "first", "spread"),
    [
        ((6.0, 5.0, 3.0, 1e-3, 1e-9), 2, 0.02),
        ((1e-3, 1e-6, 1e-9), 1, 0.3),  # of a divergence of 1e-6, as with weights of 0.02, these two differ by rounding
    ],
)
def test_the_learning_rate_is_the_one_that_does_best_on_held_out_data(monkeypatch, rates, first, spread):
    torch.manual_seed(0)
    dense = zoo.BY_BASE["BertForMaskedLM"].build(initializer_range=spread)
    monkeypatch.setattr(module, "_RATES", rates)
    monkeypatch.setattr(module, "_FIRST", first)
    assert refine(convert(dense, rank=6), dense, batches(), epochs=1).learning_rate == 1e-3


@pytest.mark.slow
def test_the_rate_falls_to_zero_in_a_straight_line(dense, monkeypatch):
    rates, made = [], module._optimizers

    def watched(parameters, rate):
        found = made(parameters, rate)
        found[0].register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return found

    monkeypatch.setattr(module, "_RATES", (1e-3,))
    monkeypatch.setattr(module, "_FIRST", 0)
    monkeypatch.setattr(module, "_optimizers", watched)
    refine(convert(dense, rank=6), dense, batches(), epochs=1, synthetic=0)
    assert len(rates) >= 40
    assert rates == pytest.approx([rates[0] * (1 - step / len(rates)) for step in range(len(rates))])


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
@pytest.mark.usefixtures("one_rate")
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


@pytest.mark.slow
def test_none_of_the_batches_that_chose_the_fits_of_refit_judge(dense, monkeypatch):
    seen = []

    class Seen:
        def __init__(self, model, dense, judging, *others):
            seen.extend(part.batch["input_ids"] for part in judging)

        def run(self, epochs):
            """Nothing: only the batches are looked at."""

    monkeypatch.setattr(module, "_Refining", Seen)
    data = batches()
    refine(convert(dense, rank=6), dense, data, epochs=1, synthetic=0)
    judge = [i for i, batch in enumerate(data) if any(torch.equal(batch["input_ids"], ids) for ids in seen)]
    assert judge
    assert not set(judge) & set(range(len(data))[:: module.HOLD_OUT])


def test_what_cannot_be_refined(dense):
    with pytest.raises(TargetError, match="no low-rank layer"):
        refine(dense, dense, batches())
    with pytest.raises(TargetError, match="give at least two"):
        refine(convert(dense, rank=6), dense, batches(1))


def test_the_mean_of_the_weights_counts_where_it_is_nearer(dense):
    small = convert(dense, rank=6)
    parts = [Part(batch) for batch in batches(2)]
    work = module._Refining(frozen_copy(small), frozen_copy(dense), parts[:1], parts[1:])
    good = work._state()
    bad = [value + 1 for value in good]
    before = work._judged()
    work._set(bad)
    divergence, kept = work._better(good)
    assert divergence == before
    assert kept is good
    assert all(torch.equal(a, b) for a, b in zip(work._state(), bad, strict=True))
    assert work._better([value + 1 for value in bad])[0] == work._judged()


@pytest.mark.slow
def test_steps_are_relative_to_the_size_of_a_factor(monkeypatch):
    monkeypatch.setattr(module, "_RATES", (2e-3,))
    monkeypatch.setattr(module, "_FIRST", 0)
    dense = zoo.BY_BASE["BertForMaskedLM"].build(initializer_range=0.3)  # with gradients far above Adam's eps
    found = []
    for scale in (1.0, 64.0):
        small = convert(dense, LowRankConfig(rank=6, form="pair"))
        for layer in (m for m in small.modules() if isinstance(m, LowRankLinear)):
            layer.up.weight.data *= scale
            layer.down.weight.data /= scale
        found.append(refine(small, dense, batches(), epochs=1))
    assert found[0].after < found[0].before
    assert found[1].before == pytest.approx(found[0].before, rel=1e-4)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("one_rate")
def test_dense_predictions_are_made_once_where_there_is_room(dense, monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 1)
    original, reports, calls = module.compared, [], []
    for room in (2**30, 0):
        made = []
        monkeypatch.setattr(module, "_CACHE", room)
        monkeypatch.setattr(module, "compared", lambda *given, made=made: made.append(1) or original(*given))
        reports.append(refine(convert(dense, rank=6), dense, batches(), epochs=2, synthetic=1))
        calls.append(len(made))
    assert reports[0] == reports[1]
    # two batches are held out, eight are learned from, and one for each of these is made anew for each epoch
    assert calls == [2 + 8 + 2 * 8, 2 + 2 * (8 + 8)]


def test_batches_are_split_into_rows():
    ids, mask = torch.arange(21).view(7, 3), torch.ones(7, 3, dtype=torch.bool).tril(2)
    part = Part({"input_ids": ids, "attention_mask": mask}, (mask,))
    pieces = part.pieces(3)
    assert [len(piece.batch["input_ids"]) for piece in pieces] == [3, 2, 2]
    assert torch.equal(torch.cat([piece.batch["input_ids"] for piece in pieces]), ids)
    assert all(torch.equal(piece.masks[0], piece.batch["attention_mask"]) for piece in pieces)
    assert len(part.pieces(100)) == 7
    for whole in (Part({"input_ids": ids, "sizes": torch.ones(4)}), Part({"input_ids": ids}, (mask.repeat(2, 1),))):
        assert whole.pieces(3)[0] is whole


@pytest.mark.parametrize(
    ("values", "chosen", "tried"),
    [
        ({4e-3: 3.0, 2e-3: 2.0, 1e-3: 1.0, 5e-4: 1.5}, 1e-3, 4),
        ({4e-3: 3.0, 2e-3: 4.0, 8e-3: 2.0, 1.6e-2: 2.5}, 8e-3, 4),
        ({4e-3: math.nan, 2e-3: math.nan, 1e-3: 1.0, 5e-4: 2.0}, 1e-3, 4),
        ({4e-3: 1.0, 2e-3: 2.0, 8e-3: math.nan}, 4e-3, 3),
    ],
)
def test_lower_rates_are_tried_while_they_do_better_and_else_higher_ones(values, chosen, tried):
    work, seen = object.__new__(module._Refining), []
    work.lowest, work.best = 1.8, ["as it came"]
    work._set, work.fitting = (lambda state: None), []
    work._run = lambda rate, epochs, advance: seen.append(rate) or iter([(values[rate], [rate])])
    rate, found, state = work._first_epoch([])
    assert (rate, found, state, len(seen)) == (chosen, values[chosen], [chosen], tried)
    assert work.best == ([chosen] if values[chosen] < 1.8 else ["as it came"])


def test_what_is_no_number_is_never_best():
    assert module.RefineReport(1e-3, math.nan, (0.3, math.nan)).after == 0.3
    assert module.RefineReport(1e-3, 0.2, (math.inf,)).after == 0.2
    assert "none of 1 kept" in str(module.RefineReport(1e-3, 0.0, (0.0,)))


def test_matrices_are_left_to_muon_and_the_rest_to_adamw():
    matrix, vector, experts = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (4,), (2, 4, 3)))

    def found(*parameters):
        made = module._optimizers(parameters, 1e-3)
        return [(type(o), [p for group in o.param_groups for p in group["params"]]) for o in made]

    assert found(matrix, vector, experts) == [(torch.optim.Muon, [matrix]), (torch.optim.AdamW, [vector, experts])]
    assert found(matrix) == [(torch.optim.Muon, [matrix])]
    assert found(vector) == [(torch.optim.AdamW, [vector])]


@pytest.mark.slow
@pytest.mark.usefixtures("one_rate")
def test_every_dtype_is_trained_as_well_as_float32():
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        dense = zoo.BY_BASE["BertForMaskedLM"].build(initializer_range=0.3).to(dtype)
        report = refine(convert(dense, rank=6), dense, batches(), epochs=1, synthetic=0)
        found[dtype] = report.after / report.before
    assert found[torch.float32] < 0.7
    assert all(ratio == pytest.approx(found[torch.float32], rel=0.05) for ratio in found.values())


class Wrapped(nn.Module):
    """A module of one's own that passes token ids to a Transformers model."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(32, 3)

    def forward(self, input_ids):
        return {"logits": self.head(self.inner(input_ids).last_hidden_state[:, 0])}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(99, 32), nn.Linear(32, 32)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Wrapped(zoo.BY_BASE["BertModel"].build()), Plain], ids=["wrapped", "plain"])
def test_modules_of_ones_own_that_take_token_ids(make, monkeypatch):
    monkeypatch.setattr(module, "_RATES", (1e-3,))
    monkeypatch.setattr(module, "_FIRST", 0)
    dense = make().eval()
    small = convert(dense, rank=4)
    before = state(small)
    report = refine(small, dense, batches(6), epochs=1)
    changed = any(not torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert changed == (report.after < report.before)


@pytest.mark.slow
@pytest.mark.usefixtures("short_refine")
def test_a_language_model_that_returns_more_than_tokens_writes_texts():
    dense = zoo.BY_BASE["GPT2LMHeadModel"].build()
    dense.generation_config.return_dict_in_generate = True
    texts = synthetic_parts(dense, parts_of(dense, {}, [(batch, ()) for batch in batches(6)]), 1)(0)
    assert sum(len(part.batch["input_ids"]) for part in texts) == 6 * 8
    assert refine(convert(dense, rank=4), dense, batches(6), epochs=1).before > 0


@pytest.mark.usefixtures("short_refine")
def test_a_model_that_draws_is_compared_on_the_same_draws():
    """Masked image modelling draws which patches it sees: a model beside its own copy is no distance away."""
    dense = masked_images()
    small = convert(dense, rank=4)
    data = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(6)]
    before = torch.get_rng_state()
    assert refine(small, frozen_copy(small), data, epochs=1).before == 0
    assert refit(small, dense, data).before == refit(convert(dense, rank=4), dense, data).before
    assert torch.equal(torch.get_rng_state(), before)
