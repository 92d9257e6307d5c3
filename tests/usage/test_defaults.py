"""What a conversion changes when nothing was said about it: no heads, no poolers, no routers, no tiny ranks."""

import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, merge
from hf_reparam.errors import RankError, TargetError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.host import layer_name
from tests import zoo

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def low_rank(model):
    return {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def plan_names(model, plan):
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    names = dict(model.named_modules())
    return {name if name in names else prefix + name for name in plan.modules}


def switch():
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 16}
    config = tf.SwitchTransformersConfig(
        vocab_size=99, **options, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0
    )
    return tf.SwitchTransformersForConditionalGeneration(config).eval()


def clip_vision():
    return tf.CLIPForImageClassification(tf.CLIPConfig(text_config=TOWER, vision_config=TOWER_OF_IMAGES)).eval()


def encoder_decoder():
    encoder, decoder = zoo.bert(), zoo.bert(is_decoder=True, add_cross_attention=True)
    return tf.EncoderDecoderModel(encoder=tf.BertModel(encoder), decoder=tf.BertLMHeadModel(decoder)).eval()


def wrapped():
    return nn.ModuleDict({"model": zoo.BY_BASE["BertForSequenceClassification"].build(), "own": nn.Linear(32, 32)})


TOWER = {**zoo.BERT_LIKE, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
TOWER_OF_IMAGES = {
    key: TOWER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
} | {"image_size": 16, "patch_size": 8}

HEADS = {
    "BertForMaskedLM": {"cls.predictions.transform.dense"},
    "BertForPreTraining": {"cls.predictions.transform.dense", "cls.seq_relationship", "bert.pooler.dense"},
    "BertForSequenceClassification": {"classifier", "bert.pooler.dense"},
    "BertModel": {"pooler.dense"},
    "DistilBertForSequenceClassification": {"classifier", "pre_classifier"},
    "RobertaForMaskedLM": {"lm_head.dense"},
    "AlbertForMaskedLM": {"predictions.dense"},
    "BartForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
    "GPT2ForSequenceClassification": {"score"},
    "GPT2LMHeadModel": set(),
    "T5ForConditionalGeneration": set(),
    "ViTForImageClassification": {"classifier"},
}
MODELS = [(zoo.BY_BASE[base].build, names) for base, names in HEADS.items()] + [
    (switch, {"encoder.block.1.layer.1.mlp.router.classifier", "decoder.block.1.layer.2.mlp.router.classifier"}),
    (clip_vision, {"classifier"}),
    (encoder_decoder, {"encoder.pooler.dense", "decoder.cls.predictions.transform.dense"}),
    (wrapped, {"model.classifier", "model.bert.pooler.dense"}),
]
IDS = [*HEADS, "switch", "clip", "encoder-decoder", "wrapped"]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "optional"), MODELS, ids=IDS)
def test_heads_poolers_and_routers_stay_dense(make, optional):
    model = make()
    report = hf_reparam.report(model)
    assert {item.name for item in report.skipped if "dense unless target_modules names it" in item.reason} == optional
    possible = {row.name for row in report.layers}
    assert possible
    assert not possible & optional
    small = convert(model, LowRankConfig(rank=1, allow_larger=True))
    assert {row.name for row in hf_reparam.report(small).layers} == possible
    planned = make_plan(model, keep=0.5)
    assert not {layer_name(model, name) for name in optional} & set(planned.modules)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rank": 6}, {"rank": {"*": 6}}, {"keep": 0.5}, {"keep": 0.5, "calibrated": True}])
@pytest.mark.parametrize("base", ["BertForSequenceClassification", "BertForMaskedLM", "ViTForImageClassification"])
def test_every_way_to_ask_for_a_size_agrees(base, options):
    case = zoo.BY_BASE[base]
    model, size = case.build(), {key: value for key, value in options.items() if key != "calibrated"}
    data = [case.batch()] if "calibrated" in options else None
    small = convert(model, **size, calibration=data)
    plan = make_plan(model, calibration=data and calibrate(model, data), **size)
    assert low_rank(small)
    assert not low_rank(small) & HEADS[base]
    assert {row.name for row in plan.report.layers} == {row.name for row in hf_reparam.report(small).layers}
    assert {row.name for row in plan.report.layers} == low_rank(small)


@pytest.mark.slow
def test_target_modules_bring_them_in(tmp_path):
    case = zoo.BY_BASE["BertForSequenceClassification"]
    model = tf.BertForSequenceClassification(zoo.bert(num_labels=24)).eval()
    moments = calibrate(model, [case.batch()], target_modules=["*pooler*", "classifier"])
    assert set(moments.layers) == {"pooler.dense", "classifier"}
    for options in ({"rank": 6}, {"keep": 0.6, "calibration": moments}, {"keep": 0.6, "calibration": [case.batch()]}):
        calibration = options.pop("calibration", None)
        config = LowRankConfig(**options, target_modules=["*pooler*", "classifier"])
        small = convert(model, config, calibration=calibration)
        assert low_rank(small) == {"bert.pooler.dense", "classifier"}
        assert all(row.error is not None for row in hf_reparam.report(small).layers)
    small.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**case.batch()).logits, small(**case.batch()).logits, **CLOSE)
    assert low_rank(convert(loaded, rank=4)) == low_rank(convert(model, rank=4)) | {"bert.pooler.dense", "classifier"}


@pytest.mark.slow
def test_a_rank_or_a_plan_that_names_one_brings_it_in():
    model = tf.BertForSequenceClassification(zoo.bert(num_labels=24)).eval()
    assert low_rank(convert(model, rank={"classifier": 4})) == {"classifier"}
    plan = make_plan(model, LowRankConfig(keep=0.6, target_modules=["classifier", "*.query"]))
    assert "classifier" in plan.modules
    assert "classifier" in low_rank(convert(model, plan))


def test_target_params_counts_heads_among_what_stays():
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    wanted = int(model.num_parameters() * 0.8)
    small = convert(model, target_params=wanted)
    assert wanted - 200 < small.num_parameters() <= wanted
    assert type(small.classifier) is nn.Linear


def weights(n_in, n_out, entry):
    """Numbers in the factors."""
    return entry.rank * (n_in + n_out - (entry.rank if entry.form == "pivoted" else 0))


@pytest.mark.parametrize("multiple_of", [1, 3, 16])
@pytest.mark.parametrize("metric", ["svd", "fisher"])
@pytest.mark.parametrize("form", zoo.FORMS)
def test_no_rank_below_eight(form, metric, multiple_of):
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 2))
    data = [{"input": torch.randn(40, 64)}]
    moments = None
    if metric == "fisher":
        moments = calibrate(net, data, loss_fn=lambda m, b: m(**b).square().sum())
    found = False
    for keep in (0.3, 0.4, 0.6, 0.9):
        try:
            plan = make_plan(net, LowRankConfig(keep=keep, form=form, multiple_of=multiple_of), calibration=moments)
        except RankError:
            continue
        found = True
        assert all(entry.rank >= 8 and entry.rank % multiple_of == 0 for entry in plan.modules.values())
        assert "4" not in plan.modules  # it has two outputs
        held = sum(
            weights(m.in_features, m.out_features, entry) if (entry := plan.modules.get(name)) else m.weight.numel()
            for name, m in net.named_children()
            if isinstance(m, nn.Linear)
        )
        assert held <= keep * sum(m.weight.numel() for m in net if isinstance(m, nn.Linear))
    assert found


def test_the_smallest_size_is_named_and_reached():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    least = (8 * 128 + 64 * 2) / (64 * 64 + 64 * 2)
    with pytest.raises(RankError, match=rf"keep at least {least:.2f}.*min_rank= \(now 8"):
        make_plan(net, LowRankConfig(keep=0.2, form="pair"))
    assert make_plan(net, LowRankConfig(keep=0.273, form="pair")).modules["0"].rank == 8
    assert make_plan(net, LowRankConfig(keep=0.2, form="pair", min_rank=2)).modules["0"].rank < 8
    assert convert(net, rank=3)[0].rank == 3  # asked for
    assert convert(net, LowRankConfig(keep=0.2, min_rank=2))[0].rank < 8


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None])
def test_min_rank_is_an_int_of_at_least_one(wrong):
    with pytest.raises(RankError, match="min_rank must be an int"):
        make_plan(nn.Sequential(nn.Linear(64, 64)), LowRankConfig(keep=0.5, min_rank=wrong))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"target_params": 10**9}])
@pytest.mark.parametrize("base", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_a_loop_over_sizes_may_start_at_all(tmp_path, base, options):
    case = zoo.BY_BASE[base]
    model = case.build()
    with pytest.warns(UserWarning, match="nothing was factored"):
        small = convert(model, **options)
    report = hf_reparam.report(small)
    assert report.parameters_after == report.parameters_before == model.num_parameters()
    assert not low_rank(small)
    small.save_pretrained(tmp_path / "low")
    loaded = getattr(tf, case.auto).from_pretrained(tmp_path / "low")
    assert type(loaded) is type(small)
    assert torch.equal(loaded(**case.batch()).logits, model(**case.batch()).logits)
    back = merge(loaded)
    assert type(back) is type(model)
    back.save_pretrained(tmp_path / "dense")
    assert type(getattr(tf, case.auto).from_pretrained(tmp_path / "dense")) is type(model)
    assert low_rank(convert(loaded, rank=4))


def test_everything_kept_of_a_plain_module():
    net = nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="nothing was factored"):
        same = convert(net, keep=1.0)
    x = torch.randn(2, 64)
    assert torch.equal(same(x), net(x))


def test_a_fresh_head_is_told_and_a_trained_one_is_not(tmp_path):
    zoo.BY_BASE["BertModel"].build().save_pretrained(tmp_path / "body")
    fresh = tf.BertForSequenceClassification.from_pretrained(tmp_path / "body")
    with pytest.warns(UserWarning, match=r"^classifier.weight, classifier.bias: not in the checkpoint"):
        convert(nn.ModuleDict({"inside": fresh})["inside"], rank=8)
    with pytest.warns(UserWarning, match=r"^inside.classifier.weight"):
        convert(nn.ModuleDict({"inside": fresh}), rank=8)
    fresh.save_pretrained(tmp_path / "whole")
    whole = tf.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(whole, rank=8)
        convert(convert(whole, rank=8), rank=8 - 1)
        convert(tf.BertForSequenceClassification(whole.config), rank=8)


def test_a_size_without_data_is_warned_of_unless_it_is_asked_for():
    dense = zoo.BY_BASE["BertModel"].build()
    with pytest.warns(UserWarning, match="a size without calibration data cuts the weights by plain SVDs"):
        convert(dense, LowRankConfig(keep=0.5, min_rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(dense, LowRankConfig(keep=0.5, min_rank=2, metric="svd"))
        convert(dense, rank=4)


def test_a_converted_model_is_refused_before_it_is_calibrated():
    small = convert(zoo.BY_BASE["BertModel"].build(), rank=4)
    with pytest.raises(TargetError, match="the model is converted already"):
        convert(small, keep=0.5, calibration=[{"no such input": 1}])
