"""Plans from a budget are judged on held-out calibration data: layers alone, and the whole beside equal ranks."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForMaskedLM

import hf_reparam
from hf_reparam import Calibration, LowRankConfig, RankPlan, calibrate, convert, make_plan
from hf_reparam.calibrate.objective import divergence, seeds_of
from hf_reparam.compress import probe, verify
from hf_reparam.compress.judge import Judge, few
from hf_reparam.errors import PlanError
from hf_reparam.layers.copies import frozen_copy
from hf_reparam.layers.dense import dense_type
from hf_reparam.linalg.allocate import Options, Way
from hf_reparam.model.host import opened
from hf_reparam.plan import Entry
from tests import zoo


def uneven_bert():
    torch.manual_seed(0)
    model = zoo.BY_BASE["BertForMaskedLM"].build().double()  # divergences down to 1e-6 drown in float32
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight *= 50  # logits that say something
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.intermediate.dense.weight *= 1 + 3 * i
            layer.attention.self.query.weight[8:] *= 0.05
    return model


def batches(count=12):
    return [
        {"input_ids": torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(i))} for i in range(count)
    ]


@pytest.fixture(scope="module")
def model():
    return uneven_bert()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, batches())


CONFIG = LowRankConfig(keep=0.5, min_rank=1)


def held(calibration):
    """The numbers of the batches that are held out."""
    known = [batch["input_ids"].tolist() for batch, _ in calibration.batches]
    return [i for i, batch in enumerate(batches()) if batch["input_ids"].tolist() in known]


@pytest.mark.slow
def test_some_batches_are_held_out_and_counted(model, calibration):
    numbers = held(calibration)
    assert 0 < len(numbers) == len(calibration.batches) < 6
    layer = calibration.layers["encoder.layer.0.output.dense"]
    assert (layer.tokens, layer.held.tokens) == (12 * 72, len(numbers) * 72)
    alone = calibrate(model, [batches()[i] for i in numbers]).layers["encoder.layer.0.output.dense"]
    torch.testing.assert_close(layer.held.input_products, alone.input_products)
    torch.testing.assert_close(layer.held.gradient_products, alone.gradient_products, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("kind", "shift"), [("BertForMaskedLM", 0), ("GPT2LMHeadModel", 1)])
def test_positions_without_a_label_do_not_count(kind, shift):
    torch.manual_seed(0)
    dense, other = (zoo.BY_BASE[kind].build().eval() for _ in range(2))
    (batch,) = batches(1)
    chosen = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(9)) < 0.3
    mask = torch.ones_like(chosen)
    mask[:, 7:] = False  # and padding has a label, which does not count either
    labels = batch["input_ids"].masked_fill(~chosen, -100)
    judge = Judge(dense, [({**batch, "labels": labels}, (mask,))])
    asked = torch.roll(chosen, -shift, 1) & mask
    with torch.no_grad():
        mine, theirs = (m(**batch).logits[asked].log_softmax(-1) for m in (other, dense))
    wanted = (theirs.exp() * (theirs - mine)).sum(-1).mean()
    assert judge(other) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.slow
def test_order_decides_nothing(model, calibration):
    other = calibrate(model, batches()[::-1])
    assert sorted(held(other)) == held(calibration)
    name = "encoder.layer.1.output.dense"
    torch.testing.assert_close(other.layers[name].held.input_products, calibration.layers[name].held.input_products)


def test_one_is_held_out_where_none_would_be(model, calibration):
    others = [batch for i, batch in enumerate(batches()) if i not in held(calibration)]
    assert len(calibrate(model, others[:4]).batches) == 1


def test_one_is_held_out_where_all_would_be(model, calibration):
    candidates = [batch for batch, _ in calibration.batches]
    more = [{"input_ids": batch["input_ids"].roll(i, 1)} for batch in batches() for i in range(1, 5)]
    candidates += [batch for batch in more if sum(seeds_of(batch, ())) % 5 == 0]
    assert len(candidates) > 3
    found = calibrate(model, candidates)
    assert len(found.batches) == 1
    assert sum(layer.fitting().tokens for layer in found.layers.values()) > 0


def test_the_best_plan_is_taken_and_what_is_said_of_it_is_true(model, calibration):
    plan = make_plan(model, CONFIG, calibration)
    judged = plan.report.judgement
    assert judged.unit == "nats per token"
    assert len(judged.measured) == 4
    assert judged.examples == sum(len(batch["input_ids"]) for batch, _ in calibration.batches)
    assert judged.measured[judged.chosen] == min(judged.measured.values())

    numbers = held(calibration)
    fitted = calibrate(model, [batch for i, batch in enumerate(batches()) if i not in numbers])
    fitted = Calibration(fitted.metric, {n: replace(m, held=None) for n, m in fitted.layers.items()})
    fitted.curves.update(calibration.curves)  # the same shrinkage
    small = convert(model, plan, calibration=fitted)
    total = sum(
        float(divergence(small(**batches()[i]), model(**batches()[i]), (), None)) for i in numbers
    )  # of the plan's factors made without these batches
    assert total / (len(numbers) * 72) == pytest.approx(judged.measured[judged.chosen], rel=1e-3)
    assert 0.5 < judged.predicted / judged.measured[judged.chosen] < 2  # all that predictions promise


def test_predictions_count_what_another_plan_loses_beyond_its_parts():
    sizes = [Entry(4), Entry(8), Entry(16)]
    options = Options([*sizes, None], torch.tensor([4.0, 2.0, 1.0, 0.0]), torch.arange(4.0))
    ways = {("a",): [Way(0.0, {"a": options})]}
    plans = {
        "one": ({"a": Entry(8)}, "fisher"),
        "the same": ({"a": Entry(8)}, "fisher"),
        "of another metric": ({"a": Entry(4)}, "activation"),
        "another": ({"a": Entry(4)}, "fisher"),
        "a third": ({"a": Entry(16)}, "fisher"),
    }
    judged = {"one": 5.0, "the same": 5.0, "of another metric": 9.0, "another": 12.0, "a third": 27.0}
    assert verify._predicted("one", plans, judged, ways) == pytest.approx(2.0 * 9)  # between 12 / 4 and 27 / 1
    assert verify._predicted("one", plans, judged | {"another": -1e-9, "a third": float("nan")}, ways) == 2.0
    assert verify._predicted("one", dict(list(plans.items())[:3]), judged, ways) == 2.0


@pytest.mark.slow
def test_report_and_folder_remember_the_judgement(model, calibration, tmp_path):
    small = convert(model, CONFIG, calibration=calibration)
    judged = make_plan(model, CONFIG, calibration).report.judgement
    assert hf_reparam.report(small).judgement == judged
    _, _, told = " ".join(str(hf_reparam.report(small)).split()).partition("when planned: ")
    assert told.startswith(f"{judged.measured[judged.chosen]:.4g} nats per token on 24 held-out examples (predicted")
    assert f" with {judged.chosen}; also tried: " in told
    small.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert hf_reparam.report(loaded).judgement == judged
    assert (
        json.loads((tmp_path / "config.json").read_text())["reparam"]["record"]["judgement"]["chosen"] == judged.chosen
    )


@pytest.fixture(scope="module")
def stored(model, calibration):
    """What a converted model's configuration holds."""
    return convert(model, CONFIG, calibration=calibration).config.reparam


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unit", 3),
        ("unit", "n" * 65),
        ("chosen", "another"),
        ("chosen", []),
        ("predicted", float("nan")),
        ("predicted", "much"),
        ("measured", {}),
        ("measured", {"measured ranks": float("inf")}),
        ("examples", -1),
        ("examples", None),
        ("more", 1),
    ],
)
def test_a_judgement_from_a_file_is_checked(stored, key, value):
    stored = copy.deepcopy(stored)
    stored["record"]["judgement"][key] = value
    with pytest.raises(PlanError, match=r"reparam\.record\.judgement"):
        RankPlan.from_dict(stored)


def test_verify_false_tries_nothing(model, calibration, monkeypatch):
    monkeypatch.setattr(verify, "Judge", None)
    plan = make_plan(model, replace(CONFIG, verify=False), calibration)
    assert plan.report.judgement is None
    assert plan.modules


@pytest.mark.slow
def test_a_search_tries_layers_and_leaves_plans_to_evaluate(model, calibration, monkeypatch):
    judges = []
    monkeypatch.setattr(verify, "Judge", lambda *args, **kw: judges.append(kw) or Judge(*args, **kw))
    plan = hf_reparam.search_plan(model, lambda m: 1.0, 0, calibration, LowRankConfig(min_rank=1))
    assert plan.report.judgement is None
    assert judges
    assert all(options["alone"] for options in judges)


@pytest.mark.slow
def test_layers_are_tried_once_for_a_calibration(model, calibration, tmp_path, monkeypatch):
    fresh = replace(calibration, curves={}, probes={})
    first = make_plan(model, CONFIG, fresh)
    known = dict(fresh.probes)
    assert len(known) >= 12
    monkeypatch.setattr(probe, "Replacement", None)  # nothing is put in place any more
    assert make_plan(model, CONFIG, fresh) == first
    assert fresh.probes == known
    fresh.save(tmp_path / "seen.safetensors")
    loaded = Calibration.load(tmp_path / "seen.safetensors")
    assert loaded.probes == known
    assert make_plan(model, CONFIG, loaded) == first


@pytest.mark.slow
def test_stored_calibration_judges_alike(model, calibration, tmp_path):
    calibration.save(tmp_path / "seen.safetensors")
    loaded = Calibration.load(tmp_path / "seen.safetensors")
    layer = loaded.layers["encoder.layer.0.output.dense"]
    assert layer.fingerprint() == calibration.layers["encoder.layer.0.output.dense"].fingerprint()
    assert layer.held.fingerprint() == calibration.layers["encoder.layer.0.output.dense"].held.fingerprint()
    again, before = make_plan(model, CONFIG, loaded), make_plan(model, CONFIG, calibration)
    assert again == before
    assert again.report.judgement == before.report.judgement
    folder = calibrate(model, batches(), folder=tmp_path / "folder", max_memory="200KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    assert make_plan(model, CONFIG, folder).report.judgement.measured.keys() == again.report.judgement.measured.keys()


def test_inputs_with_dots_in_their_names_are_stored(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, **inputs):
            return self.layer(inputs["front.x"])

    seen = calibrate(Named(), [{"front.x": torch.randn(3, 4)} for _ in range(12)])
    seen.save(tmp_path / "seen.safetensors")
    again = Calibration.load(tmp_path / "seen.safetensors")
    assert again.layers["layer"].fingerprint() == seen.layers["layer"].fingerprint()
    pairs = zip(again.batches, seen.batches, strict=True)
    assert seen.batches
    assert all(torch.equal(one["front.x"], other["front.x"]) for (one, _), (other, _) in pairs)


def test_two_small_batches_are_too_few_to_hold_one_out(model):
    few_batches = calibrate(model, [{"input_ids": batch["input_ids"][:4]} for batch in batches(2)])
    assert few_batches.batches == []
    assert make_plan(model, CONFIG, few_batches).report.judgement is None


@pytest.mark.slow
def test_batches_of_another_head_serve(model, calibration):
    """Labels that the base model does not take are left out; hidden states are compared where there are no logits."""
    labelled = calibrate(model, [{**batch, "labels": batch["input_ids"]} for batch in batches()])
    plan = make_plan(model.bert, CONFIG, labelled)
    assert plan.report.judgement.unit == "of the squared hidden states"
    assert 0 < min(plan.report.judgement.measured.values()) < 1
    other = transformers.BertForSequenceClassification(model.config).double().eval()
    other.bert.load_state_dict(model.bert.state_dict(), strict=False)  # it has a pooler beside
    assert make_plan(other, CONFIG, labelled).report.judgement.unit == "nats per example"


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        "BertForMaskedLM",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
        "AlbertForMaskedLM",
        "BartForConditionalGeneration",
    ],
)
def test_what_was_complete_before_a_layer_is_not_computed_again(base):
    case = zoo.BY_BASE[base]
    model = case.build().double()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 2):
            weight *= 6  # drawn weights are small, and what they do drowns in rounding
    dense = frozen_copy(opened(model).model)
    judge = Judge(dense, [(case.batch(), ())] * 2, alone=True)
    skipped, seen = 0, 0
    for layer in [module for module in dense.modules() if dense_type(type(module))]:
        weight = layer._parameters["weight"]
        layer._parameters["weight"] = nn.Parameter(weight * 0.5, requires_grad=False)
        far = judge(dense)
        seen += far > 1e-6
        assert judge(dense, layer) == pytest.approx(far, rel=1e-5)
        layer._parameters["weight"] = weight
        skipped += judge.passes[0](lambda: sum("forward" in vars(block) for block in dense.modules()), [layer])
    assert seen > 5
    assert skipped > 0
    assert judge(dense) == 0
    assert not any("forward" in vars(block) for block in dense.modules())


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        (range(3, 13), [(8, 3), (8, 5), (8, 7), (8, 9), (8, 11)]),
        (range(103, 113), [(4, 103), (4, 106), (4, 109), (4, 112)]),
        ([60, 61], [(8, 60), (8, 61)]),
    ],
)
def test_few_examples_of_all_lengths(lengths, shapes):
    held = [({"input_ids": torch.full((8, n), n)}, (torch.ones(8, n).bool(),)) for n in lengths]  # of a model without
    chosen = few(held)
    assert [tuple(batch["input_ids"].shape) for batch, _ in chosen] == shapes
    assert all(masks[0].shape == batch["input_ids"].shape for batch, masks in chosen)
    assert len(few([({"x": torch.ones(1, 4)}, ())] * 40)) == 14


class Prober:
    """Layer "a" is as predicted; "b" loses a hundred times what is predicted of it, at low ranks more."""

    def __init__(self):
        self.found = {"a": None, "b": None}
        self.tried = []

    def measured(self, name, rank):
        self.tried.append((name, rank))
        return (1.0 / rank) * (1 if name == "a" else 2000 / rank)


def test_errors_go_through_what_was_measured():
    entries = [Entry(rank) for rank in range(1, 65)]
    errors = torch.tensor([*(1.0 / entry.rank for entry in entries), 0.0], dtype=torch.float64)
    costs = torch.tensor([*(float(entry.rank) for entry in entries), 100.0], dtype=torch.float64)
    ways = {name: [Way(0.0, {name: Options([*entries, None], errors, costs)})] for name in "ab"}
    plans = iter([{"a": 16, "b": 16}, {"a": 8, "b": 32}])
    prober = Prober()
    found = probe.probed(ways, lambda _: {n: Entry(r) for n, r in next(plans).items()}, {}, prober)
    assert prober.tried == [("a", 16), ("b", 16), ("a", 8), ("b", 32)]

    def error(name, rank):
        return float(found[name][0].sites[name].errors[rank - 1])

    assert error("b", 16) / error("a", 16) == pytest.approx(2000 / 16)
    assert error("b", 32) / error("a", 32) == pytest.approx(2000 / 32)
    for name in "ab":
        falling = found[name][0].sites[name].errors
        assert bool((falling[1:] <= falling[:-1]).all())
        assert falling[-1] == 0
