"""`convert` and `report` on plain modules and on Transformers models."""

import math

import pytest
import torch
import transformers
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, convert, make_plan, merge
from hf_reparam.calibrate.inputs import same_draws
from hf_reparam.errors import RankError, TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.checks import count_parameters
from hf_reparam.model.config import plan_of
from tests import zoo

OUTPUT = 1e-5  # full rank against dense, float32


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


@pytest.mark.slow
@pytest.mark.parametrize("case", zoo.ALL, ids=lambda c: c.id)
def test_full_rank_is_dense_and_the_input_is_untouched(case):
    model, batch = case.build(), case.batch()
    before, kind, config = snapshot(model), type(model), model.config.to_dict()
    full = convert(model, LowRankConfig(rank=1.0, allow_larger=True))
    for got, expected in zip(zoo.outputs(full, batch), zoo.outputs(model, batch), strict=True):
        torch.testing.assert_close(got, expected, atol=OUTPUT, rtol=OUTPUT)
    assert unchanged(model, before)
    assert type(model) is kind
    assert model.config.to_dict() == config


@pytest.mark.parametrize("case", zoo.DIFFERENT, ids=lambda c: c.id)
def test_converted_model_is_still_its_base_class_and_smaller(case):
    model = case.build()
    small = convert(model, rank=6)
    report = hf_reparam.report(small)
    assert isinstance(small, type(model))
    assert type(small).__name__ == f"Reparam{case.base}"
    assert count_parameters(small) < count_parameters(model)
    assert report.parameters_before == count_parameters(model)
    assert report.parameters_after == count_parameters(small)
    assert report.parameters_before - report.parameters_after == report.factored_before - report.factored_after
    assert len(report.layers) == len(small.config.reparam["modules"])
    assert not torch.equal(zoo.outputs(small, case.batch())[0], zoo.outputs(model, case.batch())[0])


def test_the_error_in_the_report_is_measured():
    net = nn.Sequential(nn.Linear(40, 30).double())
    small = convert(net, rank=7)
    report = hf_reparam.report(small)
    product = small[0].up.weight @ small[0].down.weight
    measured = ((net[0].weight - product).norm() / net[0].weight.norm()).item()
    assert report.layers[0].error == pytest.approx(measured, rel=1e-9)


def test_plain_module():
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    small = convert(net, LowRankConfig(rank=4, exclude_modules="2"))
    assert [type(m) for m in small] == [LowRankLinear, nn.ReLU, nn.Linear]
    assert type(small) is nn.Sequential
    assert isinstance(convert(nn.Linear(32, 32), rank=4), LowRankLinear)


def test_copy_shares_nothing_with_the_original():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    small = convert(model, rank=4)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert small.config is not model.config
    assert small.bert.config is small.config
    assert model.bert.config is model.config


def test_inplace():
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model, copied = case.build(), convert(case.build(), rank=4)
    embedding = model.transformer.wte
    assert convert(model, rank=4, inplace=True) is model
    assert type(model) is hf_reparam.ReparamGPT2LMHeadModel
    assert model.transformer.wte is embedding
    for a, b in zip(zoo.outputs(model, case.batch()), zoo.outputs(copied, case.batch()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_config_shared_with_another_model_stays_as_it_was():
    config = zoo.bert()
    one, other = transformers.BertModel(config), transformers.BertModel(config)
    convert(one, rank=4, inplace=True)
    assert type(other.config) is transformers.BertConfig
    assert not hasattr(other.config, "reparam")
    assert one.config is not other.config


@pytest.mark.parametrize("inplace", [True, False])
def test_failure_leaves_the_model_as_it_was(inplace):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = math.inf
    before, kind = snapshot(model), type(model)
    with pytest.raises(WeightError, match="bert.encoder.layer.1.output.dense: 1 of 1536 values"):
        convert(model, rank=4, inplace=inplace)
    assert unchanged(model, before)
    assert type(model) is kind
    assert type(model.config) is transformers.BertConfig


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_mode_and_requires_grad_are_kept(dtype):
    model = zoo.BY_BASE["BertForSequenceClassification"].build().to(dtype)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.bert.encoder.layer[0].train()
    small = convert(model, rank=6)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert {n for n, p in small.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    low = {n: m for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert {m.training for n, m in low.items() if ".layer.0." in n} == {True}
    assert {m.training for n, m in low.items() if ".layer.0." not in n} == {False}


def test_shared_layers_stay_shared():
    model = zoo.BY_BASE["AlbertForMaskedLM"].build()
    small = convert(model, rank=4)
    report = hf_reparam.report(small)
    assert len({name for name in small.config.reparam["modules"] if "albert_layers" in name}) == 6
    assert report.parameters_after == count_parameters(small)
    shared = nn.Linear(32, 32)
    net = convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), rank=4)
    assert net["a"] is net["b"][0]


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_tied_weights_stay_tied(base):
    small = convert(zoo.BY_BASE[base].build(), rank=4)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert small.config.tie_word_embeddings


@pytest.mark.slow
def test_again_at_a_lower_rank():
    model = zoo.BY_BASE["LlamaForCausalLM"].build()
    once = convert(model, rank=8)
    twice = convert(once, rank=4)
    report = hf_reparam.report(twice)
    assert {m.rank for m in twice.modules() if isinstance(m, LowRankLinear)} == {4}
    assert {spec["rank"] for spec in twice.config.reparam["modules"].values()} == {4}
    assert {m.rank for m in once.modules() if isinstance(m, LowRankLinear)} == {8}
    direct = convert(model, rank=4)
    for a, b in zip(zoo.outputs(twice, zoo._text()), zoo.outputs(direct, zoo._text()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # cutting twice is cutting once, up to rounding
    assert report.parameters_before == count_parameters(model)


def test_again_refuses_a_higher_rank():
    once = convert(zoo.BY_BASE["BertModel"].build(), rank=4)
    with pytest.raises(RankError, match="query: it already has rank 4, and rank 5 cannot be won back"):
        convert(once, rank=5)


def test_again_on_other_layers_keeps_the_first():
    model = zoo.BY_BASE["BertModel"].build()
    once = convert(model, rank={"*.query": 4})
    both = convert(once, rank={"*.key": 5})
    ranks = {name.rpartition(".")[2]: spec["rank"] for name, spec in both.config.reparam["modules"].items()}
    assert ranks == {"query": 4, "key": 5}


def test_quantized_and_meta_models_are_refused():
    model = zoo.BY_BASE["BertModel"].build()
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match="BertModel is quantized"):
        convert(model, rank=4)
    with torch.device("meta"):
        empty = transformers.BertModel(zoo.bert())
    with pytest.raises(WeightError, match="meta device"):
        convert(empty, rank=4)


def test_patterns_over_whole_names():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    config = LowRankConfig(rank=4, target_modules=["query", "re:.*\\.key"], exclude_modules="*.layer.1.*")
    small = convert(model, config)
    assert sorted(small.config.reparam["modules"]) == [
        "encoder.layer.0.attention.self.key",
        "encoder.layer.0.attention.self.query",
    ]
    reasons = {s.name: s.reason for s in make_plan(model, config).report.skipped}
    assert reasons["bert.encoder.layer.1.attention.self.query"] == "excluded by '*.layer.1.*'"
    assert reasons["bert.encoder.layer.0.output.dense"] == "not in target_modules"
    assert reasons["cls.predictions.decoder"] == "output embeddings"
    with pytest.raises(TargetError, match=r"target_modules: 'querry' matches none.*did you mean '\*\.query'"):
        convert(model, LowRankConfig(rank=4, target_modules="querry"))


class BareExperts(nn.Module):
    """Fused experts of a class that nobody registered."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 48))


def test_experts_that_are_no_modules_are_reported():
    small = convert(nn.ModuleDict({"fc": nn.Linear(32, 32), "experts": BareExperts()}), rank=4)
    report = hf_reparam.report(small)
    bare = [s for s in report.skipped if "a bare parameter of BareExperts" in s.reason]
    assert sum(s.parameters for s in bare) == 2 * 4 * 32 * 48
    assert report.coverage < 0.5
    assert "bare parameters:  92% of the parameters" in str(hf_reparam.report(merge(small)))


def test_a_report_needs_no_weights():
    with torch.device("meta"):
        model = transformers.BertModel(zoo.bert())
    report = hf_reparam.report(model)
    assert {layer.rank for layer in report.layers} == {None}
    assert report.parameters_before == report.parameters_after == count_parameters(model)


def test_a_converted_model_is_what_its_plan_said():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    made = make_plan(model, rank={"*.query": 4}).report
    report = hf_reparam.report(convert(model, rank={"*.query": 4}))
    assert len(made.layers) == 2
    assert [(x.name, x.rank, x.parameters_after) for x in report.layers] == [
        (x.name, x.rank, x.parameters_after) for x in made.layers
    ]
    assert (report.parameters_before, report.parameters_after) == (made.parameters_before, made.parameters_after)
    assert {s.reason for s in report.skipped if s.name.endswith(".key")} == {"the plan leaves it dense"}
    assert {s.reason for s in made.skipped if s.name.endswith(".key")} == {"no pattern of `rank` matches"}


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("case", zoo.DIFFERENT, ids=lambda c: c.id)
def test_hidden_states_and_attentions_are_recorded(case, inplace):
    model, batch = case.build(attn_implementation="eager"), case.batch()
    dense = model(**batch, output_hidden_states=True, output_attentions=True)
    small = convert(model, LowRankConfig(rank=1.0, allow_larger=True), inplace=inplace)
    out = small(**batch, output_hidden_states=True, output_attentions=True)
    assert list(out) == list(dense)
    for key in dense:
        for a, b in zip(zoo._flat(out[key]), zoo._flat(dense[key]), strict=True):
            torch.testing.assert_close(a, b, atol=OUTPUT, rtol=OUTPUT)


def test_trained_copy_does_not_move_the_original():
    case = zoo.BY_BASE["BertModel"]
    model = case.build()
    before, small = snapshot(model), convert(model, rank=6)
    small(**case.batch()).last_hidden_state.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert {n for n, p in small.named_parameters() if p.grad is None} <= {"pooler.dense.up.bias"} | {
        n for n, _ in small.named_parameters() if n.startswith("pooler")
    }
    assert unchanged(model, before)
    merge(small)


def test_what_was_known_of_layers_that_stay_is_kept():
    case = zoo.BY_BASE["BertForMaskedLM"]
    calibrated = convert(case.build(), keep=0.6, calibration=[case.batch()] * 4)
    again = convert(calibrated, LowRankConfig(rank={"*.layer.0.attention.self.query": 4}))
    plan, before = (plan_of(model.config) for model in (again, calibrated))
    assert plan.metric == "fisher"
    assert plan.record.calibration_tokens == before.record.calibration_tokens > 0
    assert plan.record.metrics == {"encoder.layer.0.attention.self.query": "svd"}


def test_nobody_elses_random_numbers_change(monkeypatch):
    case, seeded = zoo.BY_BASE["GPT2LMHeadModel"], []
    dense, batches = case.build(), [case.batch()] * 4
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    for device in (torch.cuda, torch.xpu, torch.mps):  # none is in use, and nothing would take a seed back
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, seeded.append, raising=False)
    before = torch.get_rng_state()
    merge(convert(dense, keep=0.6, calibration=batches))
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_a_device_that_is_in_use_is_seeded_and_gets_its_own_numbers_back(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))  # whoever has one
    for name, told in {"is_available": True, "device_count": 1, "get_rng_state": "its own"}.items():
        monkeypatch.setattr(torch.mps, name, lambda *_, told=told: told)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: done.append(seed))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, _: done.append(state))
    with same_draws(3):
        assert done == [3]
    assert done == [3, "its own"]


def test_data_for_a_metric_without_data_is_an_error():
    model = zoo.BY_BASE["BertModel"].build()
    with pytest.raises(TargetError, match='metric="svd" looks at the weights alone'):
        convert(model, LowRankConfig(rank=4, metric="svd"), calibration=[zoo.BY_BASE["BertModel"].batch()] * 3)
