"""Calibration belong to a model, errors to a layer: what does not fit is refused, what has no data is told."""

import json
import warnings

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import Calibration, LowRankConfig, calibrate, convert, make_plan, model_card, refit, search_plan
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam_cli import main
from tests import zoo

BERT, GPT2 = zoo.BY_BASE["BertModel"], zoo.BY_BASE["GPT2LMHeadModel"]


def moments_of(case, **shape):
    return calibrate(case.build(**shape), [case.batch()])


def deeper(case, layers):
    config = case.config()
    config.num_hidden_layers = layers
    return type(case.build())(config).eval()


def taken(model, moments):
    """Everything that takes moments."""
    yield lambda: convert(model, keep=0.5, calibration=moments)
    yield lambda: convert(model, rank=4, calibration=moments)
    yield lambda: make_plan(model, calibration=moments, keep=0.5)
    yield lambda: search_plan(model, lambda model: 0.0, 0.1, moments)
    yield lambda: refit(convert(model, rank=4), model, [BERT.batch()] * 2, calibration=moments)


@pytest.mark.parametrize("stored", [True, False])
def test_moments_of_another_architecture(tmp_path, stored):
    moments, model = moments_of(GPT2), BERT.build()
    if stored:
        moments.save(tmp_path / "gpt2.safetensors")
        moments = Calibration.load(tmp_path / "gpt2.safetensors")
    for take in taken(model, moments):
        with pytest.raises(
            WeightError, match=r"does not fit BertModel.*'encoder\.layer.*'h\.0\.attn\.c_attn'.*another model"
        ):
            take()
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


def test_moments_of_a_wider_model():
    moments, model = moments_of(BERT), zoo.tf.BertModel(zoo.tf.BertConfig(**{**zoo.BERT_LIKE, "intermediate_size": 64}))
    for take in taken(model, moments):
        with pytest.raises(
            WeightError, match=r"dense: the calibration is of a layer of \d+ x \d+, and here it is \d+ x \d+"
        ):
            take()


@pytest.mark.parametrize(("theirs", "own"), [(2, 3), (3, 2)])
def test_moments_of_a_deeper_or_shallower_model(theirs, own):
    moments = calibrate(deeper(BERT, theirs), [BERT.batch()])
    with pytest.raises(WeightError, match=r"encoder\.layer\.2"):
        convert(deeper(BERT, own), keep=0.5, calibration=moments)


def test_moments_of_another_plain_module():
    x, two = torch.randn(9, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    moments = calibrate(two, [{"input": x}], metric="activation")
    with pytest.raises(WeightError, match="does not fit Sequential"):
        convert(nn.Sequential(*two, nn.Linear(8, 8)), rank=2, calibration=moments)
    with pytest.raises(WeightError, match="does not fit Sequential"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), calibration=moments, keep=0.5)


def test_moments_of_another_model_on_the_command_line(tmp_path, capsys):
    moments_of(GPT2).save(tmp_path / "gpt2.safetensors")
    BERT.build().save_pretrained(tmp_path / "bert")
    data = str(tmp_path / "gpt2.safetensors")
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "out"), "--keep", "0.5", "--calibration", data]) == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_head_without_data_is_told_in_report_and_card():
    """Calibration of the headless model serve every head; the head has none."""
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    small = convert(model, LowRankConfig(rank=4, target_modules="*"), calibration=moments_of(BERT))
    report = hf_reparam.report(small)
    head = next(row for row in report.layers if row.name == "cls.predictions.transform.dense")
    assert head.metric == "svd"
    assert {row.metric for row in report.layers if row is not head} == {"fisher"}
    assert "no data:          1 layers, by plain SVD: cls.predictions.transform.dense" in str(report)
    assert "(svd)" in report.to_markdown()
    assert report.to_dict()["layers"][-1]["metric"] == "svd"
    card = str(model_card(small))
    assert "| layers that saw no data, by plain SVD | 1, among them cls.predictions.transform.dense |" in card


def test_a_layer_without_a_gradient_is_told():
    """The pooler of a headless model is behind the hidden states that are measured."""
    small = convert(BERT.build(), LowRankConfig(rank=4, target_modules="*"), calibration=[BERT.batch()])
    report = hf_reparam.report(small)
    assert {row.name: row.metric for row in report.layers}["pooler.dense"] == "activation"
    assert "no gradient:      1 layers, in the activation metric: pooler.dense" in str(report)
    assert json.loads(small.config.to_json_string())["reparam"]["record"]["metrics"] == {"pooler.dense": "activation"}


def test_metrics_of_a_model_inside_have_its_own_names():
    whole = nn.ModuleDict({"bert": BERT.build()})
    small = convert(whole, LowRankConfig(rank=4, target_modules="*"), calibration=[BERT.batch()])
    assert small["bert"].config.reparam["record"]["metrics"] == {"pooler.dense": "activation"}


def test_layers_that_were_converted_before_keep_their_metric(tmp_path):
    small = convert(BERT.build(), LowRankConfig(rank=4, target_modules="query"))
    small = convert(small, LowRankConfig(rank=4, target_modules="key"), calibration=[BERT.batch()])
    small.save_pretrained(tmp_path)
    for model in (small, type(small).from_pretrained(tmp_path)):
        found = {row.name: row.metric for row in hf_reparam.report(model).layers if row.rank is not None}
        assert {metric for name, metric in found.items() if name.endswith("query")} == {"svd"}
        assert {metric for name, metric in found.items() if name.endswith("key")} == {"fisher"}


def test_a_plan_made_without_data_takes_what_data_there_is():
    plan = make_plan(BERT.build(), rank=4)
    for calibration in ([BERT.batch()], moments_of(BERT)):
        report = hf_reparam.report(convert(BERT.build(), plan, calibration=calibration))
        assert report.metric == "fisher"
        assert {row.metric for row in report.layers if row.rank is not None} == {"fisher"}


def test_a_search_takes_no_plan():
    with pytest.raises(TargetError, match="give a LowRankConfig without one"):
        search_plan(BERT.build(), lambda model: 0.0, 0.1, None, make_plan(BERT.build(), rank=4))


def test_warnings_name_the_line_that_called_the_package(recwarn):
    convert(BERT.build(), LowRankConfig(rank=4, target_modules="*"), calibration=[BERT.batch()])
    convert(BERT.build(), keep=1.0)
    told = {str(w.message).partition(":")[0]: w.filename for w in recwarn if issubclass(w.category, UserWarning)}
    assert any("saw fewer rows" in text for text in told)
    assert "nothing was factored" in told
    assert set(told.values()) == {__file__}


class Read(nn.Module):
    """A model whose input has the name of a sum."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.fc(tokens)


def test_an_input_called_tokens(tmp_path):
    model, batches = Read(), [{"tokens": torch.randn(4, 8)} for _ in range(6)]
    known = calibrate(model, batches, metric="activation")
    known.save(tmp_path / "known.safetensors")
    loaded = Calibration.load(tmp_path / "known.safetensors")
    assert loaded.batches
    assert loaded.tokens == known.tokens == 24
    convert(model, rank=2, calibration=loaded)


@pytest.mark.slow
def test_a_card_after_loading_says_the_same(tmp_path):
    small = convert(BERT.build(), LowRankConfig(rank=4, target_modules="*"), calibration=[BERT.batch()])
    small.save_pretrained(tmp_path)
    loaded = zoo.tf.AutoModel.from_pretrained(tmp_path)
    assert str(model_card(loaded)) == str(model_card(small))
    assert "layers without a gradient, by inputs alone" in str(model_card(loaded))


def test_fewer_rows_than_inputs_are_warned_of_once():
    net = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 4))
    with pytest.warns(UserWarning, match=r"1 of 2 layers saw fewer rows .* 2: 20 rows, 30 inputs: give more") as seen:
        calibrate(net, [{"input": torch.randn(10, 8)}] * 2, metric="activation")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(net, [{"input": torch.randn(10, 8)} for _ in range(3)], metric="activation")


def test_errors_of_layers_that_are_converted_again():
    """They are against the low-rank weight, which is not what the record says it states."""
    dense = BERT.build()
    once = convert(dense, rank={"*.query": 8, "*.key": 8})
    first = hf_reparam.report(once)
    twice = convert(once, rank={"*.query": 4, "*.intermediate.dense": 4})
    second = hf_reparam.report(twice)
    rows = {row.name: row for row in second.layers}
    query, fresh = rows["encoder.layer.0.attention.self.query"], rows["encoder.layer.0.intermediate.dense"]
    assert (query.from_rank, query.error) == (8, None)
    assert fresh.from_rank is None
    assert fresh.error > 0
    assert "converted again:  2 layers; how far they are from their dense weights is not known" in str(second)
    record = twice.config.reparam["record"]["errors"]
    assert record[query.name] is None
    key = "encoder.layer.0.attention.self.key"
    kept = next(row.error for row in first.layers if row.name == key)
    assert record[key] == pytest.approx(kept, rel=1e-3)
    assert f"{fresh.error:.3f}" in str(model_card(twice))
    assert hf_reparam.report(twice).layers


def sharp(base="BertForMaskedLM"):
    model = zoo.BY_BASE[base].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter *= 6
    return model


def rows(count=4, **more):
    return [{"input_ids": zoo._ids(16, 9, seed=i), **more} for i in range(count)]


@pytest.mark.slow
def test_refitting_unlabelled_rows():
    dense = sharp("BertForSequenceClassification")
    small = convert(dense, rank=4)
    labelled = refit(small, dense, rows(labels=torch.full((16,), -1)))
    assert labelled == refit(convert(dense, rank=4), dense, rows())


@pytest.mark.slow
def test_refitting_batches_that_begin_with_no_tensor():
    dense = sharp()
    data = [{"return_dict": True, **batch} for batch in rows()]
    assert refit(convert(dense, rank=4), dense, data) == refit(convert(dense, rank=4), dense, rows())


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_refitting_that_is_interrupted(monkeypatch, error):
    dense = sharp()
    small = convert(dense, rank=4)
    before, calls = {k: v.clone() for k, v in small.state_dict().items()}, []
    fit = __import__("hf_reparam.recover.refit", fromlist=["_fit"])._fit

    def breaking(layer, *args):
        fit(layer, *args)
        calls.append(layer)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr("hf_reparam.recover.refit._fit", breaking)
    with pytest.raises(error):
        refit(small, dense, rows())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


class Routed(nn.Module):
    """A shared layer, one that is never reached, and an expert whose rows depend on what came before."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.expert, self.never = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.shared(self.shared(torch.tanh(self.first(x))))
        out = x.clone()
        mine = x[:, 0] > 0
        out[mine] = self.expert(x[mine])
        return out


def test_layers_that_cannot_be_refitted_are_named():
    torch.manual_seed(0)
    dense, data = Routed(), [{"x": torch.randn(40, 8)} for _ in range(5)]
    report = refit(convert(dense, rank=2), dense, data)
    assert report.skipped["shared"] == report.skipped["never"] == "which a pass reaches more than once, or not at all"
    assert report.skipped["expert"] == "which do not get the same tokens in both models"
    assert "not refitted:     2 layers, which a pass reaches more than once, or not at all: shared, never" in str(
        report
    )
    assert "expert" in str(report)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            {"eval_accuracy": 0.5, "eval_loss": 1.0},
            r"gave a dict of \['eval_accuracy', 'eval_loss'\]: return one number",
        ),
        ("good", "gave 'good', a str: return one number"),
        (torch.ones(2), "a Tensor: return one number"),
        (float("nan"), "gave NaN"),
    ],
)
def test_scores_that_are_no_number(score, message):
    net = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(TargetError, match=message):
        convert(net, search_plan(net, lambda model: score, 0.1))


def test_scores_that_are_tensors_of_one_number():
    net = nn.Sequential(nn.Linear(16, 16))
    assert isinstance(convert(net, search_plan(net, lambda model: torch.tensor(0.5), 0.1))[0], LowRankLinear)
