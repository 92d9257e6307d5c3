"""Narrower heads with what others build on a model: the Trainer, compilers, caches, composites."""

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan, calibrate, convert, merge
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.host import layer_name
from hf_reparam.structures.heads.attention import FusedProjections, find_attentions
from tests import zoo
from tests.resume import trains_and_resumes


def widths(model, width):
    """Entries of a plan: every attention with heads of this width."""
    return {layer_name(model, attention.name): Entry(width, "heads") for attention in find_attentions(model)}


def halved(base):
    """Heads half as wide, and low-rank layers in them."""
    case = zoo.BY_BASE[base]
    model = case.build()
    half = convert(model, RankPlan(widths(model, 4), model.config.model_type))
    return convert(half, LowRankConfig(rank=6, form="pivoted")), case.batch()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.slow
def test_the_trainer_saves_and_resumes(tmp_path):
    small, _ = halved("GPT2LMHeadModel")
    trains_and_resumes(small, tmp_path)


@pytest.mark.slow
def test_it_compiles():
    small, batch = halved("GPT2LMHeadModel")
    expected = logits(small, batch)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-6, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_fused_layer_is_three_and_one_again():
    small, batch = halved("GPT2LMHeadModel")
    fused = small.transformer.h[0].attn.c_attn
    assert isinstance(fused, FusedProjections)
    assert all(isinstance(layer, LowRankLinear) for layer in fused.children())
    dense = merge(small)
    assert dense.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
    assert dense.transformer.h[0].attn.split_size == 32
    torch.testing.assert_close(logits(dense, batch), logits(small, batch), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_beams_read_the_smaller_cache():
    small, batch = halved("T5ForConditionalGeneration")
    inputs = {"input_ids": batch["input_ids"]}
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(small.generate(**inputs, **options), merge(small).generate(**inputs, **options))


def test_an_encoder_of_narrower_heads_in_an_encoder_decoder():
    encoder, _ = halved("BertModel")
    decoder = zoo.BY_BASE["BertLMHeadModel"].build(add_cross_attention=True)
    pair = tf.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    ids = torch.randint(3, 90, (2, 5))
    assert pair(input_ids=ids, decoder_input_ids=ids).logits.shape == (2, 5, 99)


def test_cross_attention_of_bert_is_narrowed():
    model = zoo.BY_BASE["BertLMHeadModel"].build(add_cross_attention=True)
    ids, states = torch.randint(3, 90, (2, 5)), torch.randn(2, 4, 32)
    batch = {"input_ids": ids, "encoder_hidden_states": states}
    plan = RankPlan(widths(model, 8), "bert", "fisher")
    assert len(plan.modules) == 4
    full = convert(model, plan, calibration=calibrate(model, [batch]))
    torch.testing.assert_close(logits(full, batch), logits(model, batch), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_report_says_how_wide():
    small, _ = halved("BertForMaskedLM")
    rows = [row for row in hf_reparam.report(small).layers if row.form == "heads"]
    assert [(row.kind, row.in_features, row.rank) for row in rows] == [("BertAttention", 8, 4)] * 2
    assert "4 heads" in str(hf_reparam.report(small))


def test_fused_projections_keep_their_order():
    parts = [nn.Linear(4, 2) for _ in range(3)]
    x = torch.randn(3, 4)
    assert torch.equal(FusedProjections(*parts)(x), torch.cat([part(x) for part in parts], -1))
