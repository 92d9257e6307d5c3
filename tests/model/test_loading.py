"""save_pretrained -> a fresh process -> the Auto classes give bit-equal outputs, for every head and family."""

import inspect
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import swa_utils

import hf_reparam
from hf_reparam import LowRankConfig, convert, merge, save
from hf_reparam.errors import CheckpointError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.structures import structure
from tests import zoo
from tests.launch import launch

RANK = 6

FRESH = """
import sys, torch, transformers
from transformers import AutoConfig, AutoModel
import hf_reparam
from pathlib import Path
from tests import zoo
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
results = {}
for folder in map(Path, sys.argv[1:]):
    case = next(case for case in zoo.ALL if case.id == folder.name)
    config = AutoConfig.from_pretrained(folder)
    auto = getattr(transformers, case.auto) if case.auto else getattr(hf_reparam, "Reparam" + case.base)
    model, headless = auto.from_pretrained(folder), AutoModel.from_pretrained(folder)
    results[str(folder)] = {
        "classes": [type(config).__name__, type(model).__name__, config.model_type],
        "outputs": zoo.outputs(model, case.batch()),
        "headless": {k: v for k, v in headless.state_dict().items()},
    }
torch.save(results, Path(sys.argv[1]).parents[1] / "results.pt")
"""


FORMS_OF_CASES = [("pair", case) for case in zoo.ALL] + [("pivoted", zoo.DIFFERENT[0])]


@pytest.fixture(scope="module")
def saved_cases(tmp_path_factory):
    """A folder of every case, by form and case, and the models that were saved."""
    folder, models = tmp_path_factory.mktemp("fresh"), {}
    for form, case in FORMS_OF_CASES:
        models[form, case] = convert(case.build(), LowRankConfig(rank=RANK, form=form))
        models[form, case].save_pretrained(folder / form / case.id)
    return folder, models


@pytest.fixture(scope="module")
def fresh(saved_cases):
    """Load them all in one new process, and bring the outputs back."""
    place, _ = saved_cases
    launch("-c", FRESH, *[str(place / form / case.id) for form, case in FORMS_OF_CASES], processes=1)
    return dict(zip(FORMS_OF_CASES, torch.load(place / "results.pt", weights_only=True).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), FORMS_OF_CASES, ids=lambda value: getattr(value, "id", value))
def test_fresh_process_is_bit_equal(saved_cases, fresh, form, case):
    small, result = saved_cases[1][form, case], fresh[form, case]
    base = small.base_class.config_class
    assert result["classes"] == [f"Reparam{base.__name__}", f"Reparam{case.base}", base.model_type]
    for got, expected in zip(result["outputs"], zoo.outputs(small, case.batch()), strict=True):
        assert torch.equal(got, expected)
    saved = {**small.state_dict(), **small.base_model.state_dict()}
    new = {k for k in result["headless"] if k not in saved}
    # AutoModel adds a pooler that some heads leave out, and the decoder that an encoder alone does not have
    assert all("pooler" in k or (case.base == "T5EncoderModel" and "decoder" in k) for k in new)
    assert len(new) < len(result["headless"])
    assert all(torch.equal(v, saved[k]) for k, v in result["headless"].items() if k in saved)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), FORMS_OF_CASES, ids=lambda value: getattr(value, "id", value))
def test_stock_class_fails_loudly(saved_cases, form, case):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(transformers, case.base).from_pretrained(saved_cases[0] / form / case.id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "stock"),
    [
        ("BertForMaskedLM", "BertModel"),
        ("BertModel", "BertForSequenceClassification"),
        ("T5ForConditionalGeneration", "T5EncoderModel"),
        ("BartForConditionalGeneration", "BartForCausalLM"),
        ("GPT2LMHeadModel", "GPT2Model"),
    ],
)
def test_other_stock_heads_fail_loudly_too(tmp_path, saved, stock):
    convert(zoo.BY_BASE[saved].build(), rank=RANK).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(transformers, stock).from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "base", "form"),
    [
        ("BertForMaskedLM", "BertModel", "pair"),
        ("GPT2LMHeadModel", "GPT2Model", "pivoted"),
        ("LlamaForCausalLM", "LlamaModel", "pair"),
        ("T5ForConditionalGeneration", "T5Model", "pivoted"),
        ("ViTForImageClassification", "ViTModel", "pair"),
        ("BartForConditionalGeneration", "BartModel", "pivoted"),
    ],
)
def test_head_to_headless_and_back(tmp_path, head, base, form):
    small = convert(zoo.BY_BASE[head].build(), LowRankConfig(rank=RANK, form=form))
    small.save_pretrained(tmp_path / "head")
    headless = getattr(hf_reparam, f"Reparam{base}").from_pretrained(tmp_path / "head")
    headless.save_pretrained(tmp_path / "base")
    again = getattr(hf_reparam, f"Reparam{head}").from_pretrained(tmp_path / "base")
    expected = small.base_model.state_dict()
    shared = [k for k in headless.state_dict() if k in expected]
    assert len(shared) > 10
    assert all(torch.equal(headless.state_dict()[k], expected[k]) for k in shared)
    assert all(torch.equal(again.base_model.state_dict()[k], expected[k]) for k in shared)


@pytest.mark.slow
def test_half_of_a_base_model_leaves_the_other_half_new_as_dense(tmp_path):
    case = zoo.BY_BASE["T5ForConditionalGeneration"]
    convert(case.build(), rank=RANK).save_pretrained(tmp_path / "all")
    hf_reparam.ReparamT5EncoderModel.from_pretrained(tmp_path / "all").save_pretrained(tmp_path / "encoder")
    transformers.T5EncoderModel(case.build().config).save_pretrained(tmp_path / "dense")
    new = {}
    for kind, folder in ((hf_reparam.ReparamT5ForConditionalGeneration, "encoder"), (type(case.build()), "dense")):
        model, info = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        new[folder] = info["missing_keys"]
        assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, torch.nn.Linear) == (folder == "dense")
        assert type(model.decoder.block[0].layer[2].DenseReluDense.wo) is torch.nn.Linear
    assert new["encoder"] == new["dense"]


def test_another_head_gets_the_plan_of_the_base(tmp_path):
    convert(zoo.BY_BASE["BertForMaskedLM"].build(), LowRankConfig(rank=RANK, target_modules="*")).save_pretrained(
        tmp_path
    )
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=4)
    assert type(model).__name__ == "ReparamBertForTokenClassification"
    assert model.classifier.out_features == 4
    assert isinstance(model.bert.encoder.layer[0].output.dense, LowRankLinear)


@pytest.mark.parametrize(
    ("base", "form"),
    [("BertForMaskedLM", "pair"), ("LlamaForCausalLM", "pivoted"), ("T5ForConditionalGeneration", "pair")],
)
def test_shards(tmp_path, base, form):
    case = zoo.BY_BASE[base]
    small = convert(case.build(), LowRankConfig(rank=RANK, form=form))
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = getattr(transformers, case.auto).from_pretrained(tmp_path)
    for a, b in zip(zoo.outputs(loaded, case.batch()), zoo.outputs(small, case.batch()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("base", "dtype", "form"),
    [
        ("BertForMaskedLM", torch.bfloat16, "pair"),
        ("BertForMaskedLM", torch.float16, "pivoted"),
        ("LlamaForCausalLM", torch.bfloat16, "pivoted"),
        ("T5ForConditionalGeneration", torch.float16, "pair"),  # which keeps a layer in float32
    ],
)
def test_half_precision(tmp_path, base, dtype, form):
    case = zoo.BY_BASE[base]
    small = convert(case.build().to(dtype), LowRankConfig(rank=RANK, form=form))
    small.save_pretrained(tmp_path)
    auto = getattr(transformers, case.auto)
    for loaded in (auto.from_pretrained(tmp_path), auto.from_pretrained(tmp_path, dtype=dtype)):
        got, expected = loaded.state_dict(), small.state_dict()
        assert {k for k in got if not torch.equal(got[k].to(expected[k].dtype), expected[k])} == set()
        assert {v.dtype for k, v in got.items() if k.endswith(".order")} <= {torch.int64}
    assert {p.dtype for p in auto.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("where", ["cpu", "auto", "disk"])
def test_device_map(tmp_path, where, form):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    small = convert(case.build(), LowRankConfig(rank=RANK, form=form))
    small.save_pretrained(tmp_path / "model")
    device_map = where
    if where == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    for a, b in zip(zoo.outputs(loaded, case.batch()), zoo.outputs(small, case.batch()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of pairs and of pivoted layers."""
    place = tmp_path_factory.mktemp("whole")
    for name, config in {
        "pair": LowRankConfig(rank=RANK, target_modules="*"),
        "pivoted": LowRankConfig(rank=RANK, form="pivoted"),
    }.items():
        convert(zoo.BY_BASE["BertForMaskedLM"].build(), config).save_pretrained(place / name)
    return place


@pytest.fixture
def saved(whole, tmp_path):
    return shutil.copytree(whole / "pair", tmp_path / "pair")


LAYER = "bert.encoder.layer.1.output.dense"


def test_missing_factor_is_an_error(saved):
    rewrite(saved, lambda tensors: tensors.pop(f"{LAYER}.up.weight"))
    with pytest.raises(
        CheckpointError, match="1 tensors of low-rank layers are missing.*layer.1.output.dense.up.weight"
    ):
        transformers.AutoModelForMaskedLM.from_pretrained(saved)


@pytest.fixture
def saved_pivoted(whole, tmp_path):
    return shutil.copytree(whole / "pivoted", tmp_path / "pivoted")


def test_missing_order_is_an_error(saved_pivoted):
    rewrite(saved_pivoted, lambda tensors: tensors.pop(f"{LAYER}.order"))
    with pytest.raises(CheckpointError, match=r"1 tensors of low-rank layers are missing.*output.dense.order"):
        transformers.AutoModelForMaskedLM.from_pretrained(saved_pivoted)


@pytest.mark.parametrize("value", [0, -1, 48, 2**62])
def test_an_order_that_is_no_permutation_is_an_error(saved_pivoted, value):
    rewrite(saved_pivoted, lambda tensors: tensors[f"{LAYER}.order"].__setitem__(1, value))
    with pytest.raises(CheckpointError, match=r"layer.1.output.dense.order is no permutation of its 48 inputs"):
        transformers.AutoModelForMaskedLM.from_pretrained(saved_pivoted)


@pytest.mark.slow
def test_factors_that_the_plan_does_not_name_are_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["reparam"]["modules"]["encoder.layer.1.output.dense"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit the plan.*encoder.layer.1.output.dense.weight"):
        transformers.AutoModelForMaskedLM.from_pretrained(saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cls.predictions.transform.dens", "cls2.predictions.transform.dense"])
def test_a_misspelt_layer_of_the_head_is_an_error(saved, name):
    config = json.loads((saved / "config.json").read_text())
    modules = config["reparam"]["modules"]
    modules[name] = modules.pop("cls.predictions.transform.dense")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # by the marker
        transformers.AutoModelForMaskedLM.from_pretrained(saved)


@pytest.mark.slow
def test_another_head_under_the_same_name(saved):
    """Both are `cls`, and only one has a layer to factor."""
    model = transformers.AutoModelForNextSentencePrediction.from_pretrained(saved)
    model.save_pretrained(saved / "again")
    again = transformers.AutoModelForNextSentencePrediction.from_pretrained(saved / "again")
    batch = zoo.BY_BASE["BertForMaskedLM"].batch()
    assert all(map(torch.equal, zoo.outputs(again, batch), zoo.outputs(model, batch)))
    assert "cls.predictions.transform.dense" not in again.config.reparam["modules"]  # its numbers are not in the file


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("base", ["BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_init_weights_leaves_weights_alone(base, form):
    case = zoo.BY_BASE[base]
    small = convert(case.build(), LowRankConfig(rank=RANK, form=form))
    for model in (small, hf_reparam.merge(small)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.init_weights()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("base", ["BertForMaskedLM", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_a_model_drawn_at_random(base, form):
    """Products as large as the weights that the stock class draws, up to chance; pivots that are a permutation."""
    case = zoo.BY_BASE[base]
    small, dense = convert(case.build(), LowRankConfig(rank=RANK, form=form)), case.build()
    fresh = type(small)(small.config)
    for name, layer in fresh.named_modules():
        if isinstance(layer, LowRankLinear):
            expected = dense.get_submodule(name).weight.std().item()
            assert layer.weight.detach().add(0).std() == pytest.approx(expected, rel=0.5)
            assert not torch.equal(layer.up.weight, small.get_submodule(name).up.weight)
    with torch.device("meta"):
        empty = type(small)(small.config)
    empty.to_empty(device="cpu")
    empty.init_weights()
    assert all(bool(torch.isfinite(t).all()) for t in zoo.outputs(empty.eval(), case.batch()))


@pytest.mark.slow
def test_mis_shaped_factor_is_an_error(saved):
    rewrite(saved, lambda tensors: tensors.update({f"{LAYER}.up.weight": torch.zeros(32, 5)}))
    message = rf"1 tensors .*{LAYER}.up.weight: \(32, 5\) in the file, \(32, 6\) in the model.*ignore_mismatched_sizes"
    with pytest.raises(RuntimeError, match=message):
        transformers.AutoModelForMaskedLM.from_pretrained(saved)


def test_unexpected_and_missing_keys_are_reported_by_transformers(saved):
    def change(tensors):
        tensors["stray.weight"] = torch.zeros(2)
        tensors.pop("bert.embeddings.LayerNorm.weight")

    rewrite(saved, change)
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(saved, output_loading_info=True)
    assert info["unexpected_keys"] == {"stray.weight"}
    assert info["missing_keys"] == {"bert.embeddings.LayerNorm.weight"}


@pytest.mark.slow
def test_saving_a_given_state_dict(tmp_path):
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=RANK)
    state = {key: torch.zeros_like(value) for key, value in small.state_dict().items()}
    small.save_pretrained(tmp_path, True, state)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not any(bool(p.any()) for p in loaded.parameters())


def test_derived_classes_show_the_signature_of_their_base():
    derived, base = hf_reparam.ReparamViTModel.__init__, transformers.ViTModel.__init__
    assert inspect.signature(derived) == inspect.signature(base)
    assert "use_mask_token" in inspect.signature(derived).parameters


def test_a_clean_load_reports_nothing(saved):
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_no_dense_weight_is_ever_initialised(saved, monkeypatch):
    drawn = []
    for name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
        original = getattr(torch.nn.init, name)
        monkeypatch.setattr(
            torch.nn.init, name, lambda t, *a, _f=original, **k: drawn.append(t.shape) or _f(t, *a, **k)
        )
    transformers.AutoModelForMaskedLM.from_pretrained(saved)
    assert drawn == []
    transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.from_pretrained(saved))
    assert drawn != []


@pytest.mark.slow
def test_loading_does_not_walk_the_model_once_for_every_layer(tmp_path, monkeypatch):
    walks, counts = [], []
    install = structure.replace_modules
    monkeypatch.setattr(structure, "replace_modules", lambda *args: (walks.append(args), install(*args)))
    for layers in (1, 3):
        config = zoo.BY_BASE["BertModel"].config()
        config.num_hidden_layers = layers
        place = tmp_path / str(layers)
        convert(transformers.BertModel(config), rank=4).save_pretrained(place)
        walks.clear()
        transformers.AutoModel.from_pretrained(place)
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0


def test_an_order_that_was_averaged_is_neither_merged_nor_saved(tmp_path):
    """Means of whole numbers are cut off, those of equal ones too: `AveragedModel(use_buffers=True)` does it."""
    small = convert(zoo.BY_BASE["BertModel"].build(), LowRankConfig(keep=0.5, metric="svd"))
    average = swa_utils.AveragedModel(small, use_buffers=True, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(50):
        average.update_parameters(small)
    averaged = dict(average.module.named_buffers())
    assert not all(torch.equal(v, averaged[n]) for n, v in small.named_buffers() if n.endswith("order"))
    acts = [lambda m: m.save_pretrained(tmp_path / "out"), merge, lambda m: save(nn.Sequential(m), tmp_path / "it")]
    for act in acts:
        with pytest.raises(CheckpointError, match="is no permutation of its .* inputs, as after a cast or an average"):
            act(average.module)
