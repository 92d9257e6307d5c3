"""Embeddings of low rank: tied where they were tied, through saving, training and merging."""

import copy
import json

import pytest
import torch
import transformers as tf
from torch import nn

import hf_reparam
from hf_reparam import (
    Calibration,
    Entry,
    LowRankConfig,
    RankPlan,
    calibrate,
    convert,
    convert_folder,
    make_plan,
    merge,
    merge_folder,
)
from hf_reparam.errors import CheckpointError, PlanError, TargetError
from hf_reparam.model.checks import count_parameters
from hf_reparam.structures.table import Tables
from hf_reparam.structures.table.modules import LowRankEmbedding, LowRankHead, LowRankTable, low_rank_table
from tests import zoo

NAMES = {
    "BertForMaskedLM": "embeddings.word_embeddings",
    "BertModel": "embeddings.word_embeddings",
    "AlbertForMaskedLM": "embeddings.word_embeddings",
    "GPT2LMHeadModel": "wte",
    "T5ForConditionalGeneration": "shared",
    "T5EncoderModel": "shared",
    "MarianMTModel": "encoder.embed_tokens",
    "OPTForCausalLM": "decoder.embed_tokens",
    "LlamaForCausalLM": "embed_tokens",
}
MEMBERS = {"BertForMaskedLM": 2, "AlbertForMaskedLM": 2, "GPT2LMHeadModel": 2, "T5ForConditionalGeneration": 4}
MEMBERS |= {"T5EncoderModel": 2, "MarianMTModel": 4, "OPTForCausalLM": 2}


def outputs(model, batch):
    with torch.no_grad():
        return next(v for v in model(**batch).values() if isinstance(v, torch.Tensor))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(
    params=["BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "MarianMTModel", "LlamaForCausalLM"]
)
def family(request):
    case = zoo.BY_BASE[request.param]
    return request.param, case.build(), case.batch()


def plan_of(base, model, rank=12, **more):
    ranks = {NAMES[base]: rank, **more}
    return RankPlan({name: Entry(r, "table") for name, r in ranks.items()}, model.config.model_type)


def tables_of(plan):
    return {name: entry.rank for name, entry in plan.of(("table",)).items()}


def stored_tables(model):
    return tables_of(RankPlan.from_dict(model.config.reparam))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["BertModel", "T5EncoderModel", "MarianMTModel", "OPTForCausalLM"], indirect=True)
def test_it_survives_saving_and_merging(family, tmp_path):
    """What the contract promises, of classes that are not in it."""
    base, model, batch = family
    before = copy.deepcopy(model.state_dict())
    small = convert(model, plan_of(base, model))
    report = hf_reparam.report(small)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    members = [m for m in small.modules() if isinstance(m, LowRankTable)]
    assert len(members) == MEMBERS.get(base, 1)
    assert len({m.table.weight for m in members}) == len({m.up.weight for m in members}) == 1
    expected = outputs(small, batch)
    assert not torch.allclose(expected, outputs(model, batch), atol=1e-3)
    small.save_pretrained(tmp_path)
    again, info = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(outputs(again, batch), expected, 1e-6)  # alignment of memory
    assert len({m.table.weight for m in again.modules() if isinstance(m, LowRankTable)}) == 1
    assert count_parameters(again) == report.parameters_after < report.parameters_before == count_parameters(model)
    stands = hf_reparam.report(again)
    assert (stands.parameters_before, stands.factored_after) == (report.parameters_before, report.factored_after)
    dense = merge(again)
    assert type(dense) is type(model)
    assert list(dense.state_dict()) == list(before)
    close(outputs(dense, batch), expected)
    shared = [len(set(m.parameters())) for m in (dense, model)]
    assert shared[0] == shared[1]
    assert dense.all_tied_weights_keys == model.all_tied_weights_keys
    dense.save_pretrained(tmp_path / "dense")
    close(outputs(type(model).from_pretrained(tmp_path / "dense"), batch), expected)


def test_a_table_of_true_low_rank_loses_nothing(family):
    base, model, batch = family
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(len(table), 5) @ torch.randn(5, table.shape[1]) * 0.1)
    close(outputs(convert(model, plan_of(base, model, 5)), batch), outputs(model, batch))


def test_calibration_counts_tokens_and_squares(family):
    base, model, batch = family
    moments = calibrate(model, [batch], embeddings=True)
    found = moments.tables[NAMES[base]]
    ids = [batch["input_ids"][batch["attention_mask"].bool()]]
    ids += [batch["decoder_input_ids"].flatten()] if "decoder_input_ids" in batch else []
    if "T5" not in base and "Marian" not in base:
        assert torch.equal(found.counts, torch.bincount(torch.cat(ids), minlength=len(found.counts)).double())
    assert found.counts.sum() == sum(map(len, ids))
    assert found.gradients.trace() > 0
    tied = base in MEMBERS and base != "T5EncoderModel"
    assert bool(found.head_gradients.any()) == bool(found.head_inputs.any()) == tied


@pytest.mark.slow
def test_moments_are_stored_and_merged(tmp_path):
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model, batch = case.build(), case.batch()
    moments = calibrate(model, [batch], embeddings=True)
    moments.save(tmp_path / "moments.safetensors")
    again = Calibration.load(tmp_path / "moments.safetensors")
    twice = again + again
    for key, value in vars(moments.tables["wte"]).items():
        assert torch.equal(getattr(again.tables["wte"], key), value)
        assert torch.equal(getattr(twice.tables["wte"], key), 2 * value)
    assert set(again.layers) == set(moments.layers)
    stored = calibrate(model, [batch], folder=tmp_path / "folder", max_memory="400KB", embeddings=True)
    torch.testing.assert_close(stored.tables["wte"].gradients, moments.tables["wte"].gradients)


@pytest.mark.slow
def test_a_budget_counts_the_whole_model():
    case = zoo.BY_BASE["BertForMaskedLM"]
    model = case.build()
    with torch.no_grad():  # of rank 8, so that a budget finds it
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(len(table), 8) @ torch.randn(8, 32) * 0.01)
    moments = calibrate(model, [case.batch()], embeddings=True)
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, embeddings=True), calibration=moments)
    assert 6 <= tables_of(plan)["embeddings.word_embeddings"] <= 10
    total = 99 * 32 + sum(x.input_sum.numel() * x.gradient_products.shape[0] for x in moments.layers.values())
    small = convert(model, plan, calibration=moments)
    assert count_parameters(model) - count_parameters(small) >= 0.5 * total
    target = count_parameters(model) - 6000
    whole = convert(model, LowRankConfig(target_params=target, min_rank=1, embeddings=True), calibration=moments)
    assert target - 300 < count_parameters(whole) <= target
    assert stored_tables(whole)
    assert not stored_tables(convert(model, LowRankConfig(target_params=target, min_rank=1), calibration=moments))


def test_equal_shares_without_data():
    model = zoo.BY_BASE["BertModel"].build()
    plan = make_plan(model, LowRankConfig(keep=0.5, min_rank=1, embeddings=True))
    assert tables_of(plan) == {"embeddings.word_embeddings": int(0.5 * 99 * 32 / (99 + 32))}
    assert make_plan(model, LowRankConfig(keep=1.0, embeddings=True)).modules == {}


def test_an_untied_head_has_factors_of_its_own(tmp_path):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    model, batch = case.build(), case.batch()
    moments = calibrate(model, [batch], embeddings=True)
    assert not moments.tables["lm_head"].counts.any()
    assert moments.tables["lm_head"].tokens == 12
    small = convert(model, plan_of("LlamaForCausalLM", model, lm_head=9), calibration=moments)
    assert isinstance(small.lm_head, LowRankHead)
    assert small.lm_head.table.weight is not small.model.embed_tokens.table.weight
    small.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(outputs(again, batch), outputs(small, batch), 1e-6)
    headless = tf.AutoModel.from_pretrained(tmp_path)
    assert isinstance(headless.embed_tokens, LowRankEmbedding)
    close(outputs(merge(again), batch), outputs(small, batch))
    of_other_size = {"vocab_size": 40, "ignore_mismatched_sizes": True}
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path, **of_other_size)
    assert (type(other.lm_head), type(other.model.embed_tokens)) == (nn.Linear, nn.Embedding)
    assert other(torch.tensor([[1, 2]])).logits.shape == (1, 2, 40)


def test_heads_and_bases_load_each_other(tmp_path):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    convert(model, plan_of("BertForMaskedLM", model)).save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    head = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert head.cls.predictions.decoder.table.weight is head.bert.embeddings.word_embeddings.table.weight
    batch = zoo.BY_BASE["BertForMaskedLM"].batch()
    mixed = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    close(mixed.bert(**batch).last_hidden_state, base(**batch).last_hidden_state)


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_it_generates_what_the_merged_model_does(base):
    case = zoo.BY_BASE[base]
    model = case.build()
    small = convert(model, plan_of(base, model))
    inputs, options = {"input_ids": case.batch()["input_ids"]}, {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(**inputs, **options), merge(small).generate(**inputs, **options))


@pytest.mark.slow
def test_the_trainer_saves_and_loads_it(tmp_path):
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    small = convert(model, plan_of("GPT2LMHeadModel", model))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (16, 7))]
    options = {"max_steps": 3, "save_steps": 3, "report_to": [], "per_device_train_batch_size": 4, "use_cpu": True}
    tf.Trainer(small, tf.TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert again.lm_head.up.weight is again.transformer.wte.up.weight


@pytest.mark.slow
def test_adapters_leave_the_factors_alone():
    from peft import LoraConfig, get_peft_model

    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model = case.build()
    small = convert(model, plan_of("GPT2LMHeadModel", model))
    adapted = get_peft_model(copy.deepcopy(small), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapters = [name for name, _ in adapted.named_parameters() if "lora" in name]
    assert len(adapters) == 2 * 2 * 4  # A and B in two blocks of four layers
    assert not any("wte" in name or "lm_head" in name for name in adapters)
    changed = outputs(adapted, case.batch())
    merged = adapted.merge_and_unload()
    close(outputs(merged, case.batch()), changed, 1e-4)
    close(outputs(merge(merged), case.batch()), changed, 1e-4)


def test_resizing_is_refused(family):
    base, model, _ = family
    small = convert(model, plan_of(base, model))
    assert small.resize_token_embeddings() is small.get_input_embeddings()
    with pytest.raises(TargetError, match="merge the model, resize"):
        small.resize_token_embeddings(120)
    dense = merge(small)
    dense.resize_token_embeddings(120)
    assert dense.get_input_embeddings().weight.shape[0] == 120


@pytest.mark.slow
def test_streaming_gives_the_same_tensors(tmp_path):
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model, batch = case.build(), case.batch()
    moments = calibrate(model, [batch], embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    memory = convert(model, LowRankConfig(keep=0.2, min_rank=1, embeddings=True), calibration=moments)
    assert stored_tables(memory)
    convert_folder(
        tmp_path / "dense",
        tmp_path / "low",
        LowRankConfig(keep=0.2, min_rank=1, embeddings=True),
        calibration=moments,
        stream=True,
    )
    streamed = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert all(torch.equal(value, streamed.state_dict()[key]) for key, value in memory.state_dict().items())
    merge_folder(tmp_path / "low", tmp_path / "merged", stream=True)
    close(outputs(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch), outputs(memory, batch))


def test_drawn_at_random_it_has_the_familys_size():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    drawn = tf.AutoModelForMaskedLM.from_config(convert(model, plan_of("BertForMaskedLM", model)).config)
    product = drawn.get_input_embeddings().weight + 0
    assert product.std().item() == pytest.approx(drawn.config.initializer_range, rel=0.3)
    assert drawn.cls.predictions.decoder.table.weight is drawn.bert.embeddings.word_embeddings.table.weight


def test_the_stock_class_refuses(tmp_path):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    convert(model, plan_of("BertForMaskedLM", model)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        tf.BertForMaskedLM.from_pretrained(tmp_path)


def test_missing_factors_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    model = zoo.BY_BASE["BertForMaskedLM"].build()
    convert(model, plan_of("BertForMaskedLM", model)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.embeddings.word_embeddings.up.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"word_embeddings\.up\.weight"):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"embeddings.word_embeddings": {"form": "table", "rank": 32}}, "rank 32, above the 31"),
        ({"embeddings.word_embeddings": {"form": "table", "rank": 0}}, "int of at least 1"),
        (
            {"embeddings.position_embeddings": {"form": "table", "rank": 4}},
            "position_embeddings: .* is of type Embedding",
        ),
        ({"embeddings.word_embeddings": {"form": "pair", "rank": 4}}, "as 'pair', and it is of type Embedding"),
        ({"..": {"form": "table", "rank": 4}}, "module path"),
        ({"embeddings.word_embeddings": 4}, "must be an object"),
        ([4], "must be an object"),
    ],
)
def test_tampered_ranks_are_refused(tmp_path, modules, message):
    model = zoo.BY_BASE["BertModel"].build()
    convert(model, plan_of("BertModel", model)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["reparam"]["modules"] = modules
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=message):
        tf.AutoModel.from_pretrained(tmp_path)


def test_what_cannot_be_of_low_rank_is_named():
    bart, vit = (zoo.BY_BASE[base].build() for base in ("BartForConditionalGeneration", "ViTForImageClassification"))
    asked = LowRankConfig(keep=0.5, min_rank=1, embeddings=True)
    with pytest.raises(TargetError, match="is a BartScaledWordEmbedding"):
        make_plan(bart, asked)
    with pytest.raises(TargetError, match="embeddings=True, and there are none here"):
        make_plan(vit, asked)
    with pytest.raises(TargetError, match="embeddings=True, and there are none here"):
        make_plan(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), asked)
    model = zoo.BY_BASE["BertModel"].build()
    with pytest.raises(PlanError, match="0: the plan holds it as 'table', and it is of type Linear"):
        convert(nn.Sequential(nn.Linear(4, 4)), RankPlan({"0": Entry(2, "table")}))
    small = convert(model, plan_of("BertModel", model))
    for rank in (4, 13):
        with pytest.raises(PlanError, match="stays as it is: embeddings.word_embeddings is of low rank already"):
            convert(small, plan_of("BertModel", model, rank))
    lower = convert(small, rank=4)
    assert stored_tables(lower) == {"embeddings.word_embeddings": 12}


def test_a_table_that_is_not_tied_as_the_configuration_says():
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(TargetError, match="holds another tensor"):
        convert(model, plan_of("GPT2LMHeadModel", model))


def test_tables_of_a_model():
    (t5,) = Tables().sites(zoo.BY_BASE["T5ForConditionalGeneration"].build())
    assert sorted(t5.names) == ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"]
    untied = next(c for c in zoo.FAMILIES if c.options == (("tie_word_embeddings", False),)).build()
    assert [site.names for site in Tables().sites(untied)] == [("model.embed_tokens",), ("lm_head",)]
    assert Tables().sites(nn.Linear(2, 2)) == []


def test_padding_gets_no_gradient():
    small = LowRankEmbedding(nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.randn(4, 2)), padding_idx=0)
    small(torch.tensor([0, 3])).sum().backward()
    assert not small.table.weight.grad[0].any()
    assert small.table.weight.grad[3].any()


@pytest.mark.slow
def test_it_compiles():
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model = case.build()
    small = convert(model, plan_of("GPT2LMHeadModel", model))
    compiled = torch.compile(small, backend="aot_eager")
    close(outputs(compiled, case.batch()), outputs(small, case.batch()))
    torch._dynamo.reset()


@pytest.mark.slow
def test_inplace_is_the_same():
    case = zoo.BY_BASE["T5ForConditionalGeneration"]
    model, batch = case.build(), case.batch()
    copied = convert(model, plan_of("T5ForConditionalGeneration", model))
    inplace = convert(model, plan_of("T5ForConditionalGeneration", model), inplace=True)
    assert inplace is model
    assert all(torch.equal(value, inplace.state_dict()[key]) for key, value in copied.state_dict().items())
    merged = merge(inplace, inplace=True)
    assert type(merged) is tf.T5ForConditionalGeneration
    assert merged.lm_head.weight is merged.shared.weight
    close(outputs(merged, batch), outputs(copied, batch))


def test_report_names_the_table():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    report = hf_reparam.report(convert(model, plan_of("BertForMaskedLM", model)))
    assert [(row.kind, row.in_features, row.out_features, row.rank) for row in report.layers] == [
        ("Embedding", 99, 32, 12)
    ]
    assert report.factored_before == 99 * 32
    assert report.factored_after == 12 * (99 + 32)
    assert not any("word_embeddings" in item.name or "decoder" in item.name for item in report.skipped)
    assert hf_reparam.model_card(convert(model, plan_of("BertForMaskedLM", model)))


def test_a_head_gets_a_bias_of_its_own():
    dense = nn.Linear(4, 9)
    low = low_rank_table(dense, nn.Parameter(torch.ones(9, 2)), nn.Parameter(torch.ones(4, 2)))
    assert torch.equal(low.bias, dense.bias)
    assert low.bias is not dense.bias


def test_a_head_of_low_rank_is_not_resized():
    """Nor is the dense table beside it, which Transformers would do first."""
    model = tf.LlamaForCausalLM(zoo.llama(tie_word_embeddings=False))
    small = convert(model, RankPlan({"lm_head": Entry(8, "table")}, "llama"))
    before = small.get_input_embeddings().weight.shape
    with pytest.raises(TargetError, match="embeddings of low rank cannot be resized"):
        small.resize_token_embeddings(before[0] + 6)
    assert small.get_input_embeddings().weight.shape == before
    assert small.config.vocab_size == before[0]
