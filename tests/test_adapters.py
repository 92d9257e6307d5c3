"""`lora_targets`: a LoraConfig for the dense model adapts the same layers of the converted one."""

import pytest
import torch
import transformers as tf

from hf_reparam import Entry, LowRankConfig, RankPlan, convert, lora_targets
from hf_reparam.errors import TargetError
from tests import zoo


def bert():
    return convert(zoo.BY_BASE["BertForSequenceClassification"].build(), rank=6)


def with_a_dense_query():
    return convert(zoo.BY_BASE["BertForSequenceClassification"].build(), rank={"*layer.0*query": 6, "*value": 6})


def gpt2_with_narrower_heads():
    """One attention with narrower heads, whose fused layer is three, and low rank in the other."""
    plan = RankPlan({"h.0.attn": Entry(4, "heads"), "h.1.attn.c_attn": Entry(6, "pair")}, "gpt2")
    return convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), plan)


def test_names_of_low_rank_layers_become_those_of_their_factors():
    assert lora_targets(bert(), ["value", "query"]) == ["query.down", "query.up", "value.down", "value.up"]
    assert lora_targets(bert(), {"output.dense"}) == ["output.dense.down", "output.dense.up"]


def test_layers_that_stayed_dense_go_by_their_names():
    assert lora_targets(bert(), ["classifier"]) == ["classifier"]
    low, dense = (f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1))
    assert lora_targets(with_a_dense_query(), ["query"]) == [dense, "query.down", "query.up"]
    assert lora_targets(with_a_dense_query(), [dense, low]) == [f"{low}.down", f"{low}.up", dense]


def test_a_string_is_a_regular_expression():
    named = "bert.encoder.layer.1.attention.self.key"
    assert lora_targets(bert(), r".*layer\.1.*\.key") == [f"{named}.down", f"{named}.up"]
    assert lora_targets(bert(), "all-linear") == "all-linear"


def test_a_glob_is_refused_as_what_it_is():
    with pytest.raises(TargetError, match=r"'\*.query' is no regular expression"):
        lora_targets(convert(zoo.BY_BASE["BertModel"].build(), rank=4), "*.query")


def test_a_fused_layer_with_narrower_heads_means_its_three():
    found = lora_targets(gpt2_with_narrower_heads(), ["c_attn"])
    assert found == [f"c_attn.{part}" for part in ("down", "key", "query", "up", "value")]


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (bert, ["query", "q_proj"], "no layer of ReparamBertForSequenceClassification is named 'q_proj'"),
        (bert, "query", "no layer of .* is named 'query'"),  # PEFT's rule: a regular expression for whole names
        (
            lambda: convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), LowRankConfig(keep=0.4, embeddings=True)),
            ["wte"],
            "transformer.wte is a LowRankEmbedding, whose factors are no layers that PEFT can adapt",
        ),
    ],
)
def test_what_cannot_be_adapted_is_named(make, targets, message):
    with pytest.raises(TargetError, match=message):
        lora_targets(make(), targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "targets", "parts"),
    [
        (bert, ["query", "value"], {"query.down", "query.up", "value.down", "value.up"}),
        (with_a_dense_query, ["query", "value"], {"query", "query.down", "query.up", "value.down", "value.up"}),
        (bert, r".*\.(query|key)", {"query.down", "query.up", "key.down", "key.up"}),
    ],
)
def test_peft_adapts_these_layers_and_no_others(make, targets, parts):
    import peft

    dense, small = zoo.BY_BASE["BertForSequenceClassification"], make()
    config = {"r": 2, "init_lora_weights": False}
    of_dense = peft.get_peft_model(dense.build(), peft.LoraConfig(target_modules=targets, **config))
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=lora_targets(small, targets), **config))
    names = [{name for name, part in m.named_modules() if hasattr(part, "lora_A")} for m in (of_dense, adapted)]
    assert {name.removesuffix(".down").removesuffix(".up") for name in names[1]} == names[0]
    assert {name.partition(".self.")[2] for name in names[1]} == parts


@pytest.mark.slow
def test_layers_to_transform_are_heeded():
    import peft

    small = bert()
    config = peft.LoraConfig(target_modules=lora_targets(small, ["query"]), layers_to_transform=[1])
    adapted = {name for name, part in peft.get_peft_model(small, config).named_modules() if hasattr(part, "lora_A")}
    assert {name.partition(".attention.")[0] for name in adapted} == {"base_model.model.bert.encoder.layer.1"}


@pytest.mark.slow
@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter"])
def test_transformers_loads_adapters_by_itself(load, tmp_path):
    """From a folder of adapters, whose base is a folder of its own; here with a head of low rank."""
    import peft

    case = zoo.BY_BASE["BertForSequenceClassification"]
    small = convert(case.build(), LowRankConfig(rank=2, target_modules="*"))
    small.save_pretrained(tmp_path / "base")
    auto = tf.AutoModelForSequenceClassification
    config = peft.LoraConfig(target_modules=lora_targets(small, ["query", "classifier"]), init_lora_weights=False)
    adapted = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    if load == "from_pretrained":
        loaded = auto.from_pretrained(tmp_path / "adapter")
    else:
        loaded = auto.from_pretrained(tmp_path / "base")
        loaded.load_adapter(str(tmp_path / "adapter"))
    assert type(loaded) is type(small)
    expected, got = (zoo.outputs(model, case.batch())[0] for model in (adapted, loaded))
    assert not torch.equal(expected, zoo.outputs(small, case.batch())[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_a_model_with_adapters_is_refused():
    import peft

    small = bert()
    peft.get_peft_model(small, peft.LoraConfig(target_modules=lora_targets(small, ["query"])))
    with pytest.raises(TargetError, match="adapter that is not merged"):
        lora_targets(small, ["value"])
