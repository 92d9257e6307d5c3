"""Derived classes: published, importable, picklable, known to the Auto classes; hostile plans are refused."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import hf_reparam
from hf_reparam import convert
from hf_reparam.errors import CheckpointError, PlanError
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo


def small_bert():
    return convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6)


def test_names_are_importable_and_unique():
    from hf_reparam import ReparamBertConfig, ReparamBertForMaskedLM

    model = small_bert()
    assert type(model) is ReparamBertForMaskedLM
    assert type(model.config) is ReparamBertConfig
    assert ReparamBertForMaskedLM.config_class is ReparamBertConfig
    assert issubclass(ReparamBertForMaskedLM, transformers.BertForMaskedLM)
    assert hf_reparam.ReparamBertForMaskedLM is ReparamBertForMaskedLM


@pytest.mark.parametrize("name", ["ReparamNothing", "Reparam", "ReparamAutoModel", "nonsense", "Reparamtorch"])
def test_unknown_names(name):
    with pytest.raises(AttributeError, match=name):
        getattr(hf_reparam, name)


def test_config_round_trip(tmp_path):
    config = small_bert().config
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "hf_reparam"
    assert data["reparam"]["base_model_type"] == config.model_type == "bert"
    for loaded in (AutoConfig.from_pretrained(tmp_path), hf_reparam.ReparamBertConfig.from_pretrained(tmp_path)):
        assert type(loaded) is type(config)
        assert loaded.reparam == config.reparam
    changed = AutoConfig.from_pretrained(tmp_path, num_labels=7)
    assert changed.num_labels == 7
    assert type(changed) is type(config)


@pytest.mark.slow
def test_from_config_builds_the_same_skeleton_with_random_weights():
    small = small_bert()
    model = AutoModelForMaskedLM.from_config(small.config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    t5 = convert(zoo.BY_BASE["T5ForConditionalGeneration"].build(), rank=6)
    drawn = transformers.AutoModelForSeq2SeqLM.from_config(t5.config)
    factors = [p for n, p in drawn.named_parameters() if n.endswith(("down.weight", "up.weight"))]
    assert len(factors) > 20
    assert all(0 < p.std() < 10 for p in factors)


def test_a_derived_config_without_a_plan_is_the_dense_model():
    model = hf_reparam.ReparamBertModel(hf_reparam.ReparamBertConfig(**zoo.BERT_LIKE))
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


@pytest.mark.slow
def test_submodel_saves_and_loads(tmp_path):
    small = small_bert()
    small.bert.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    expected = {key: value for key, value in small.bert.state_dict().items() if value.numel()}  # without markers
    assert expected.keys() <= loaded.state_dict().keys()  # a pooler is added
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())


def test_a_users_own_model_class():
    class MyConfig(transformers.PreTrainedConfig):
        model_type = "my-net"

    class MyModel(transformers.PreTrainedModel):
        config_class = MyConfig

        def __init__(self, config):
            super().__init__(config)
            self.fc = torch.nn.Linear(32, 32)
            self.post_init()

        def forward(self, x):
            return self.fc(x)

    AutoConfig.register("my-net", MyConfig, exist_ok=True)
    small = convert(MyModel(MyConfig()), rank=4)
    assert type(small).__name__ == "ReparamMyModel"
    assert isinstance(small.fc, LowRankLinear)
    again = type(small)(small.config)
    assert isinstance(again.fc, LowRankLinear)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    small_bert().save_pretrained(place)
    return place


@pytest.fixture
def saved(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "saved")


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["reparam"])
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "encoder.layer.1.output.dense"


def put(name, rank):
    return lambda plan: plan["modules"].update({name: {"rank": rank, "form": "pair"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(LAYER, -4), f"'{LAYER}': rank must be an int of at least 1, got -4"),
        (put(LAYER, 0), "at least 1, got 0"),
        (put(LAYER, 33), f"{LAYER}: the plan gives it rank 33, above min.in, out. = 32"),
        (put(LAYER, 10**12), "above min.in, out. = 32"),
        (
            put("encoder.layer.9.output.dense", 4),
            "encoder.layer.9.output.dense: the plan names it, and .* no such module",
        ),
        (put("embeddings.word_embeddings", 4), "is of type Embedding, not a dense layer"),
        (put("encoder.layer.1", 4), "is of type BertLayer, not a dense layer"),
        (put("cls.predictions.decoder", 4), "output embeddings"),
        (put("__class__.__init__", 4), None),
        (lambda plan: plan.update(format_version=7), "format version 7, and this hf_reparam reads version 1"),
        (lambda plan: plan.update(base_model_type="no-such"), "'no-such', which Transformers .* does not know"),
        (lambda plan: plan.update(base_model_type="hf_reparam"), "does not know"),
        (lambda plan: plan.update(base_model_type=None), "does not know"),
        (lambda plan: plan.clear(), "format_version"),
        (lambda plan: plan.update(base_model_type="roberta"), "tensors of low-rank layers are missing"),
    ],
)
def test_plans_that_do_not_fit(saved, change, message):
    edit(saved, change)
    if message is None:  # a name of an absent head: nothing is looked up by attribute, and the rest loads
        AutoModelForMaskedLM.from_pretrained(saved)
        return
    with pytest.raises((PlanError, CheckpointError), match=message):
        AutoModelForMaskedLM.from_pretrained(saved)


def test_a_head_that_the_class_has_not_leaves_the_plan(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert "cls.predictions.transform.dense" not in model.config.reparam["modules"]
    assert "encoder.layer.0.output.dense" in model.config.reparam["modules"]


def test_converting_a_headless_model_again_changes_what_it_has(saved):
    again = convert(AutoModel.from_pretrained(saved), rank=3)
    modules = again.config.reparam["modules"]
    assert "cls.predictions.transform.dense" not in modules
    assert modules["encoder.layer.0.output.dense"]["rank"] == 3


def test_plan_of_another_family():
    plan = small_bert().config.reparam
    with pytest.raises(PlanError, match="made for model type 'bert', and this is 'gpt2'"):
        hf_reparam.ReparamGPT2Config(reparam=plan)
