"""Narrower heads: exact at full width, first-class below, stock again after a merge."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import (
    Entry,
    LowRankConfig,
    RankPlan,
    calibrate,
    convert,
    convert_folder,
    make_plan,
    merge,
    refit,
)
from hf_reparam.compress.convert import apply
from hf_reparam.errors import CheckpointError, PlanError, TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.linalg.heads import map_rows
from hf_reparam.model.host import layer_name, opened
from hf_reparam.model.sites import select
from hf_reparam.structures.heads import AttentionType, register_attention
from hf_reparam.structures.heads.attention import ROLES, find_attentions
from hf_reparam.structures.heads.narrow import NarrowHeads
from hf_reparam.structures.source import Source
from tests import zoo

FAMILIES = [
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "AlbertForMaskedLM",
    "DistilBertForSequenceClassification",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MarianMTModel",
]
DIFFERENT = ["BertForMaskedLM", "AlbertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"]
"""Separate projections, one attention in every place, fused ones, and with cross attention."""
GENERATING = ["GPT2LMHeadModel", "OPTForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"]
CLOSE = {"atol": 1e-5, "rtol": 0}  # of logits below 1 in size, in float32


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def attentions_by_name(model):
    return {layer_name(model, a.name): a for a in find_attentions(model)}


def widths_of(model, width=None):
    """Every attention with heads of this width; as wide as they are for None."""
    return {name: Entry(width or a.width, "heads") for name, a in attentions_by_name(model).items()}


def heads_of(plan):
    return {name: entry.rank for name, entry in plan.of(("heads",)).items()}


def stored_heads(model):
    return heads_of(RankPlan.from_dict(model.config.reparam))


def head_rows(report):
    return [row for row in report.layers if row.form == "heads"]


def heads_of_layer(model, moments, metric=None, layer="encoder.layer.0.attention"):
    return NarrowHeads(layer, attentions_by_name(model)[layer], Source.of(moments, metric))


def path_of(attention, role):
    """Of the layer of a role; of one of three where a fused layer was split."""
    return f"{attention.name}.{attention.within(role, split=True)}"


def narrowed(model, widths, moments):
    """A copy with narrower heads, the moments of its layers as they are computed, and what the heads lose."""
    work = opened(model)
    made, source = apply(work, RankPlan(widths, None, "fisher"), Source.of(moments, "fisher"))
    return work.model, source.calibration, made.errors


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    case = zoo.BY_BASE[request.param]
    model, batch = case.build(), case.batch()
    with torch.no_grad():  # attention that matters: fresh weights of most families are so small that it hardly does
        for layer in {a.layer(role) for a in find_attentions(model) for role in ROLES}:
            layer.weight *= 0.15 / layer.weight.std()
    return model, batch, calibrate(model, [batch])


def test_every_attention_is_found(family):
    model, _, _ = family
    counts = {"albert": 1, "t5": 6, "bart": 6, "marian": 6}  # one shared; encoder, decoder and cross attentions
    assert len(find_attentions(model)) == counts.get(model.config.model_type, 2)


def test_at_full_width_the_outputs_are_the_dense_ones(family):
    full_width(family, "fisher", "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("family", DIFFERENT, indirect=True)
@pytest.mark.parametrize(("metric", "attention"), [("fisher", "eager"), ("svd", "sdpa"), ("activation", "eager")])
def test_so_they_are_in_every_metric_and_kernel(family, metric, attention):
    full_width(family, metric, attention)


def full_width(family, metric, attention):
    model, batch, moments = family
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    plan = RankPlan(widths_of(model), model.config.model_type, metric)
    full = convert(model, plan, calibration=None if metric == "svd" else moments)
    assert any(not torch.equal(a, b) for a, b in zip(full.parameters(), model.parameters(), strict=False))
    close(logits(full, batch), logits(model, batch))


def numbers(attention, role, width):
    n_in, n_out = attention.shape(role, width)
    return n_in * n_out + (0 if attention.layer(role).bias is None else n_out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["BertForMaskedLM", "DistilBertForSequenceClassification", "OPTForCausalLM", "BartForConditionalGeneration"],
    indirect=True,
)
def test_saved_loaded_merged(family, tmp_path):
    """Half as wide, and of low rank inside: the same logits after a round trip, and from the stock class."""
    model, batch, moments = family
    widths = widths_of(model, 4)
    low = {layer_name(model, path_of(a, "output")): Entry(3, "pivoted") for a in find_attentions(model)}
    plan = RankPlan(widths | low, model.config.model_type, "fisher")
    small = convert(model, plan, calibration=moments)
    report = hf_reparam.report(small)
    expected = logits(small, batch)
    assert not torch.allclose(expected, logits(model, batch), atol=1e-4)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert RankPlan.from_dict(again.config.reparam).modules == widths | low
    dense = merge(again)
    assert type(dense) is type(model)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    close(logits(dense, batch), expected)
    errors = [row.error for row in head_rows(report)]
    assert all(0.0 < error < 1.0 for error in errors)
    names = [layer_name(model, row.name) for row in head_rows(report)]
    assert [again.config.reparam["record"]["errors"][name] for name in names] == pytest.approx(errors, rel=1e-3)
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    attentions = find_attentions(again)
    stock, slim = (sum(numbers(a, role, width) for a in attentions for role in ROLES) for width in (8, 4))
    low_rank = sum(numbers(a, "output", 4) for a in attentions)
    assert report.factored_before == stock - slim + low_rank
    assert sum(row.parameters_before for row in head_rows(report)) == stock - slim
    stands = hf_reparam.report(again)
    assert (stands.factored_before, stands.factored_after) == (report.factored_before, report.factored_after)
    assert [(row.in_features, row.rank) for row in head_rows(stands)] == [(8, 4)] * len(widths)


CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5_LIKE = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
KIN = {
    "XLMRobertaModel": lambda: tf.XLMRobertaConfig(**zoo.BERT_LIKE),
    "CamembertModel": lambda: tf.CamembertConfig(**zoo.BERT_LIKE),
    "ElectraModel": lambda: tf.ElectraConfig(**zoo.BERT_LIKE, embedding_size=24),
    "MBartModel": lambda: zoo.bart_like(tf.MBartConfig),
    "PegasusModel": lambda: zoo.bart_like(tf.PegasusConfig),
    "BlenderbotModel": lambda: zoo.bart_like(tf.BlenderbotConfig),
    "MT5Model": lambda: tf.MT5Config(**T5_LIKE),
    "UMT5Model": lambda: tf.UMT5Config(**T5_LIKE),
    "CLIPTextModel": lambda: tf.CLIPTextConfig(**CLIP, vocab_size=99, max_position_embeddings=64, eos_token_id=2),
    "CLIPVisionModel": lambda: tf.CLIPVisionConfig(**CLIP, image_size=16, patch_size=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KIN)
def test_kin_of_these_families(name, tmp_path):
    """At full width the same outputs; half as wide saved, loaded and merged."""
    torch.manual_seed(0)
    model = getattr(tf, name)(KIN[name]()).eval()
    with torch.no_grad():
        for layer in {a.layer(role) for a in find_attentions(model) for role in ROLES}:
            layer.weight *= 0.15 / layer.weight.std()
    batch = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if "Vision" in name else {"input_ids": torch.randint(3, 90, (2, 7))}
    )
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 90, (2, 5))

    def last(model):
        with torch.no_grad():
            return model(**batch).last_hidden_state

    widths = widths_of(model)
    assert len(widths) == (6 if model.config.is_encoder_decoder else 2)
    moments = calibrate(model, [batch], loss_fn=lambda m, b: m(**b).last_hidden_state[..., :9].square().sum())
    close(last(convert(model, RankPlan(widths, None, "fisher"), calibration=moments)), last(model))
    half = convert(model, RankPlan(widths_of(model, 4), None, "fisher"), calibration=moments)
    assert not torch.allclose(last(half), last(model), atol=1e-3)
    half.save_pretrained(tmp_path)
    assert torch.equal(last(type(half).from_pretrained(tmp_path)), last(half))
    close(last(merge(half)), last(half))


@pytest.mark.parametrize("metric", ["svd", "activation"])
def test_heads_are_compared_with_layers_in_the_fisher_metric_only(metric):
    model, data, _ = bert()
    moments = calibrate(model, data, metric="activation") if metric == "activation" else None
    with pytest.raises(TargetError, match=f"heads=True needs the fisher metric, .*; got '{metric}'"):
        make_plan(model, LowRankConfig(keep=0.4, min_rank=1, allocation="global", heads=True), moments)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["AlbertForMaskedLM", "GPT2LMHeadModel"], indirect=True)
def test_the_model_is_as_before(family):
    model, batch, moments = family
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    widths = {a.name: a.width for a in find_attentions(model)}
    expected = logits(model, batch)
    config = LowRankConfig(keep=0.4, min_rank=1, heads=True)
    small = convert(model, config, calibration=moments)
    assert list(model.modules()) == modules
    assert {a.name: a.width for a in find_attentions(model)} == widths
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batch), expected)
    inplace = convert(copy.deepcopy(model), config, calibration=moments, inplace=True)
    assert all(torch.equal(value, inplace.state_dict()[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("family", DIFFERENT, indirect=True)
def test_moments_of_narrower_layers_are_those_that_would_be_collected(family):
    """At full width the function is the same, so that moments can be collected where they were computed."""
    model, batch, moments = family
    narrow, made, errors = narrowed(model, widths_of(model), moments)
    assert max(errors.values()) < 1e-6  # at full width nothing is lost
    seen = calibrate(narrow, [batch])
    for a in find_attentions(narrow):
        for role in ROLES:
            name = layer_name(narrow, path_of(a, role))
            computed, collected = made.layers[name], seen.layers[name]
            assert computed.tokens == collected.tokens
            for key in ("input_sum", "input_products", "gradient_products"):
                x, y = getattr(computed, key), getattr(collected, key)
                assert (x - y).norm() <= 1e-3 * y.norm() + 1e-9, (name, key)  # float32 passes


def oblique():
    """A BERT whose queries use four of eight directions of a head, and whose keys use four others, as do the values."""
    model, data, _ = bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            inner = layer.attention.self
            for linear in (inner.query, inner.key, inner.value):
                bases = torch.randn(4, 8, 4)
                linear.weight.copy_((bases @ torch.randn(4, 4, 32) * 0.1).flatten(0, 1))
                linear.bias.copy_((bases @ torch.randn(4, 4, 1) * 0.1).flatten())
    return model, data, calibrate(model, data)


@pytest.mark.slow
def test_heads_that_use_half_of_their_width_lose_nothing():
    """Narrower heads are the same function, and their moments those that can be collected there."""
    model, data, moments = oblique()
    plan = RankPlan(widths_of(model, 4), "bert", "fisher")
    torch.testing.assert_close(
        logits(convert(model, plan, calibration=moments), data[0]), logits(model, data[0]), atol=3e-4, rtol=0
    )  # shrinkage leaves P a thousandth off
    narrow, made, errors = narrowed(model, widths_of(model, 4), moments)
    assert max(errors.values()) < 3e-3  # shrinkage
    seen = calibrate(narrow, data)
    names = [name for name in seen.layers if ".attention." in name]
    assert len(names) == 8
    for name in names:
        computed, collected = made.layers[name], seen.layers[name]
        for key in ("input_products", "gradient_products"):
            x, y = getattr(computed, key), getattr(collected, key)
            assert (x - y).norm() <= 1e-2 * y.norm(), (name, key)


@pytest.mark.slow
def test_maps_are_balanced():
    model, _, moments = oblique()
    heads = heads_of_layer(model, moments)
    for width in (3, 8):
        maps = heads.prepare()[1].cut(width)
        for left, right in ((maps.query, maps.key), (maps.output, maps.value)):
            torch.testing.assert_close(left.norm(dim=2), right.norm(dim=2))


@pytest.mark.slow
def test_the_mean_of_keys_does_not_count():
    model, data, _ = oblique()
    found = []
    for shift in (0.0, 3.0):
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.key.bias += shift
        found.append(heads_of_layer(model, calibrate(model, data)).prepare()[0])
    torch.testing.assert_close(found[0].keys, found[1].keys, atol=1e-6, rtol=1e-4)


def test_the_output_bias_takes_the_mean_back():
    model, _, moments = bert()
    heads = heads_of_layer(model, moments)
    maps = heads.prepare()[1].cut(3)
    mean = heads.moments("output").mean()
    narrow = map_rows(mean[:, None], maps.value)[:, 0]
    dense, small = heads.attention.layer("output"), heads.layer("output", maps)
    torch.testing.assert_close(small(narrow.float()), dense(mean.float()), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", DIFFERENT, indirect=True)
def test_the_budget_holds(family):
    model, _, moments = family
    small = convert(model, LowRankConfig(keep=0.3, min_rank=1, heads=True), calibration=moments)
    report = hf_reparam.report(small)
    biases = sum(item.site.others for item in select(model, LowRankConfig()).selected)
    targeted = moments.layers.keys()
    total = sum(layer.input_sum.numel() * layer.gradient_products.shape[0] for layer in moments.layers.values())
    saved = report.parameters_before - report.parameters_after
    assert len(targeted) > 4
    assert saved >= 0.7 * total - biases


@pytest.mark.slow
@pytest.mark.parametrize("base", GENERATING)
def test_generation_reads_a_smaller_cache(base):
    case = zoo.BY_BASE[base]
    model = case.build()
    model.generation_config.eos_token_id = None
    half = convert(model, RankPlan(widths_of(model, 4), model.config.model_type))
    batch = {k: v for k, v in case.batch().items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kept = half.generate(**batch, use_cache=True, **options)
    fresh = half.generate(**batch, use_cache=False, **options)
    for a, b in zip(kept.logits, fresh.logits, strict=True):
        close(a, b)
    assert torch.equal(merge(half).generate(**batch, max_new_tokens=6, do_sample=False), kept.sequences)
    wide = model.generate(**batch, use_cache=True, **options)
    assert cache_numbers(kept.past_key_values) * 2 == cache_numbers(wide.past_key_values)


def cache_numbers(cache):
    caches = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "cross_attention_cache")
        else [cache]
    )
    return sum(layer.keys.numel() + layer.values.numel() for c in caches for layer in c.layers)


@functools.cache
def moments_of_bert():
    return calibrate(zoo.BY_BASE["BertForMaskedLM"].build(), data_of_bert())


def data_of_bert():
    return [{"input_ids": torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(i))} for i in range(6)]


def bert():
    """A model that is always the same, data and their moments, which no test may change."""
    moments = dataclasses.replace(moments_of_bert(), curves={}, probes={}, times={})
    return zoo.BY_BASE["BertForMaskedLM"].build(), data_of_bert(), moments


@pytest.mark.slow
def test_widths_are_chosen_where_they_are_predicted_to_be_better():
    model, _, moments = bert()
    with torch.no_grad():  # heads of which two directions of eight are used
        for layer in model.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.value):
                linear.weight.view(4, 8, 32)[:, 2:] *= 1e-4
                linear.bias.view(4, 8)[:, 2:] *= 1e-4
    moments = calibrate(model, data_of_bert())
    joint, separate = (
        make_plan(model, LowRankConfig(keep=0.4, min_rank=1, heads=joint), calibration=moments)
        for joint in (True, False)
    )
    assert {w <= 4 for w in heads_of(joint).values()} == {True}
    assert heads_of(separate) == {}
    assert make_plan(model, LowRankConfig(keep=0.4, min_rank=1), calibration=moments) == separate
    assert make_plan(model, LowRankConfig(keep=1.0, heads=True), calibration=moments).modules == {}
    stepped = make_plan(model, LowRankConfig(keep=0.4, min_rank=1, multiple_of=4, heads=True), calibration=moments)
    assert set(heads_of(stepped).values()) == {4}
    low = [entry for name, entry in joint.of(("pivoted",)).items() if ".attention." in name]
    assert low
    assert all(entry.rank < 32 for entry in low)


@pytest.mark.slow
def test_an_excluded_projection_keeps_its_heads():
    model, _, moments = bert()
    config = LowRankConfig(keep=0.3, min_rank=1, exclude_modules="layer.0.attention.self.key", heads=True)
    plan = make_plan(model, config, calibration=moments)
    assert set(heads_of(plan)) == {"encoder.layer.1.attention"}


@pytest.mark.slow
def test_a_projection_that_is_used_elsewhere_keeps_its_shape():
    model, _, moments = bert()
    model.elsewhere = model.bert.encoder.layer[0].attention.self.query
    plan = make_plan(model, LowRankConfig(keep=0.3, min_rank=1, heads=True), calibration=moments)
    assert set(heads_of(plan)) == {"encoder.layer.1.attention"}


@pytest.mark.slow
def test_fused_layers_are_excluded_by_their_name():
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model, data = case.build(), [case.batch()]
    moments = calibrate(model, data)
    config = LowRankConfig(keep=0.4, min_rank=1, target_modules=["*attn*"], heads=True)
    small = convert(model, config, calibration=moments)
    names = {n for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert any(name.endswith("c_attn.query") for name in names)
    assert not any("mlp" in name for name in names)


@pytest.mark.slow
def test_a_failure_leaves_the_model_alone(monkeypatch):
    model, data, moments = bert()
    before, expected = list(model.modules()), logits(model, data[0])

    def fails(*_, **__):
        raise WeightError("on purpose")

    config = LowRankConfig(keep=0.3, min_rank=1, heads=True)
    assert heads_of(make_plan(model, config, moments))  # which are made before the layers that fail
    monkeypatch.setattr("hf_reparam.structures.linear.Linears.build", fails)
    for inplace in (True, False):
        with pytest.raises(WeightError, match="on purpose"):
            convert(model, config, calibration=moments, inplace=inplace)
        assert list(model.modules()) == before
        assert torch.equal(logits(model, data[0]), expected)


def test_numbers_that_are_not_finite_are_named():
    model, data, _ = bert()
    moments = calibrate(model, data)
    moments.layers["encoder.layer.1.attention.self.key"].gradient_products[0, 0] = float("nan")
    with pytest.raises(WeightError, match="encoder.layer.1.attention"):
        heads_of_layer(model, moments, layer="encoder.layer.1.attention").prepare()
    with pytest.raises(WeightError, match="encoder.layer.1.attention"):
        convert(model, RankPlan(widths_of(model, 4), "bert", "fisher"), calibration=moments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    model = bert()[0].to(dtype)
    small = convert(model, RankPlan(widths_of(model, 4), "bert"))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert merge(small).dtype == dtype


@pytest.mark.slow
def test_it_trains():
    model, data, moments = bert()
    small = convert(model, LowRankConfig(keep=0.4, min_rank=1, heads=True), calibration=moments).train()
    assert head_rows(hf_reparam.report(small))
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    batch = {**data[0], "labels": data[0]["input_ids"]}
    losses = []
    for _ in range(8):
        loss = small(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    close(logits(merge(small.eval()), data[0]), logits(small, data[0]))


@pytest.mark.slow
def test_refit_takes_the_moments_that_the_heads_were_made_with():
    model, data, _ = bert()
    with torch.no_grad():  # predictions change by more than rounding
        for layer in model.bert.encoder.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 16
    moments = calibrate(model, data)
    config = LowRankConfig(keep=0.3, min_rank=1, heads=True)
    small = convert(model, config, calibration=moments)
    assert head_rows(hf_reparam.report(small))
    with pytest.raises(TargetError, match="give the calibration="):
        refit(small, model, data)
    before = list(model.modules())
    report = refit(small, model, data, calibration=moments)
    assert report.after < report.before
    assert list(model.modules()) == before
    again = convert(model, config, calibration=data)
    refit(again, model, data, calibration=calibrate(model, data))
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[key], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_streaming_gives_the_same_tensors(tmp_path):
    model, data, moments = bert()
    model.save_pretrained(tmp_path / "dense")
    config = LowRankConfig(keep=0.3, min_rank=1, heads=True)
    memory = convert(model, config, calibration=moments)
    report = convert_folder(tmp_path / "dense", tmp_path / "low", config, calibration=moments, stream=True)
    assert len(head_rows(report)) == 2
    streamed = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "low")
    assert stored_heads(streamed) == stored_heads(memory) != {}
    assert all(torch.equal(value, streamed.state_dict()[key]) for key, value in memory.state_dict().items())
    hf_reparam.merge_folder(tmp_path / "low", tmp_path / "merged", stream=True)
    merged = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is tf.BertForMaskedLM
    close(logits(merged, data[0]), logits(memory, data[0]))
    config = LowRankConfig(keep=0.3, min_rank=1)
    separate = convert_folder(tmp_path / "dense", tmp_path / "separate", config, calibration=moments, stream=True)
    assert head_rows(separate) == []


@pytest.mark.slow
def test_another_head_loads_the_base(tmp_path):
    model, data, moments = bert()
    small = convert(model, LowRankConfig(keep=0.3, min_rank=1, heads=True), calibration=moments)
    assert stored_heads(small)
    small.save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = small(**data[0], output_hidden_states=True).hidden_states[-1]
        close(base(**data[0]).last_hidden_state, expected)


@pytest.mark.slow
def test_the_stock_class_refuses(tmp_path):
    """Narrower heads alone, without any factor: the shapes are others."""
    model, _, _ = bert()
    convert(model, RankPlan(widths_of(model, 4), "bert")).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        tf.BertForMaskedLM.from_pretrained(tmp_path)


def heads(width):
    return {"form": "heads", "rank": width}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.0.attention": heads(9)}, "9 wide, above the 8"),
        ({"encoder.layer.0.output": heads(4)}, "is of type BertOutput; of such there are .*encoder.layer.0.attention"),
        ({"encoder.layer.0.attention": heads(0)}, "int of at least 1"),
        ({"encoder.layer.0.attention": heads(True)}, "int of at least 1"),
        ({"encoder.layer.0.attention": heads(10**9)}, "heads 1000000000 wide, above the 8"),
        ({"..": heads(4)}, "module path"),
        ({"encoder.layer.0.attention": 4}, "must be an object"),
    ],
)
def test_tampered_widths_are_refused(tmp_path, change, message):
    model, _, _ = bert()
    convert(model, RankPlan(widths_of(model, 4), "bert")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["reparam"]["modules"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=message):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_another_width_in_the_file_is_refused(tmp_path):
    model, _, _ = bert()
    convert(model, RankPlan(widths_of(model, 4), "bert")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["reparam"]["modules"]["encoder.layer.0.attention"] = heads(3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, CheckpointError), match="do not have the shapes"):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_model_drawn_at_random_has_layers_of_the_familys_size():
    model, _, _ = bert()
    config = convert(model, RankPlan(widths_of(model, 4), "bert")).config
    drawn = tf.AutoModelForMaskedLM.from_config(config)
    for a in find_attentions(drawn):
        assert a.width == 4
        for role in ROLES:
            assert a.layer(role).weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)
            assert not a.layer(role).bias.any()


class Unfinished(tf.BertPreTrainedModel):
    """A model whose class does not call post_init."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = tf.BertModel(config)


def test_a_class_without_post_init_has_numbers_too():
    model = Unfinished(zoo.bert())
    config = convert(model, RankPlan(widths_of(model, 4), "bert")).config
    drawn = hf_reparam.model.classes.model_class(Unfinished)(config)
    for a in find_attentions(drawn):
        for role in ROLES:
            assert a.layer(role).weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)
            assert not a.layer(role).bias.any()


@pytest.mark.slow
def test_a_converted_model_makes_no_plan():
    model, _, moments = bert()
    half = convert(model, RankPlan(widths_of(model, 4), "bert"))
    with pytest.raises(TargetError, match="converted already"):
        make_plan(half, LowRankConfig(keep=0.3, min_rank=1), calibration=moments)
    lower = convert(half, rank=4)  # but its layers can be factored
    assert stored_heads(lower) == stored_heads(half) == {f"encoder.layer.{i}.attention": 4 for i in range(2)}
    assert len(lower.config.reparam["modules"]) > 2


def test_unknown_attentions_are_named():
    model, _, _ = bert()
    with pytest.raises(PlanError, match="is of type BertLayer; of such there are .*encoder.layer.0.attention"):
        convert(model, RankPlan({"encoder.layer.0": Entry(4, "heads")}, "bert"))
    with pytest.raises(PlanError, match="above the 8"):
        convert(model, RankPlan({"encoder.layer.0.attention": Entry(9, "heads")}, "bert"))


def test_rotary_attention_is_no_candidate():
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model = case.build()
    assert find_attentions(model) == []
    with pytest.raises(TargetError, match="heads=True, and there are none here"):
        make_plan(model, LowRankConfig(keep=0.3, min_rank=1, heads=True), calibrate(model, [case.batch()]))
    with pytest.raises(PlanError, match="self_attn: the plan holds it as 'heads', and it is of type LlamaAttention"):
        convert(model, RankPlan({"layers.0.self_attn": Entry(4, "heads")}))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head_dim = 16, 8
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


def test_a_registered_attention_of_a_plain_model(tmp_path):
    register_attention(OwnAttention, AttentionType("q", "k", "v", "o", size="inner"))
    net = nn.Sequential(OwnAttention(), nn.Linear(16, 16))
    x = torch.randn(2, 5, 16)
    for name, layers in (("dense", {}), ("net", {"0.o": Entry(3)})):
        small = convert(net, RankPlan({"0": Entry(4, "heads"), **layers}))
        hf_reparam.save(small, tmp_path / name)
        again = hf_reparam.load(nn.Sequential(OwnAttention(), nn.Linear(16, 16)), tmp_path / name)
        assert torch.equal(again(x), small(x))
        close(merge(again)(x), small(x))
    other = nn.Sequential(nn.Linear(16, 16), OwnAttention())
    with pytest.raises(PlanError, match="0: the plan holds it as 'heads', and it is of type Linear"):
        hf_reparam.load(other, tmp_path / "net")
