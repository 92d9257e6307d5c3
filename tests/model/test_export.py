"""ONNX and the quantizers see Linears where the factors are."""

import numpy
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)

from hf_reparam import LowRankConfig, convert, merge
from hf_reparam.errors import WeightError
from tests import zoo

BASES = ["BertForSequenceClassification", "GPT2LMHeadModel"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), list(zip(BASES, zoo.FORMS, strict=True)))
def test_onnx(tmp_path, base, form):
    import onnxruntime

    case = zoo.BY_BASE[base]
    model = convert(case.build(use_cache=False), LowRankConfig(rank=6, form=form))
    path, batch = tmp_path / "model.onnx", case.batch()
    torch.onnx.export(model, (), path, kwargs=batch, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    inputs = {put.name: batch[put.name].numpy() for put in session.get_inputs()}
    assert inputs.keys() == batch.keys()
    numpy.testing.assert_allclose(session.run(None, inputs)[0], zoo.outputs(model, batch)[0], atol=1e-5)


def stored(model):
    """How a factor of a layer is stored."""
    return type(model.base_model.get_submodule(LAYER[type(model).base_class.__name__]).up.weight).__name__


LAYER = {"BertForSequenceClassification": "encoder.layer.0.output.dense", "GPT2LMHeadModel": "h.0.mlp.c_fc"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("base", BASES)
def test_torchao(base, form, kind):
    from torchao import quantization

    case = zoo.BY_BASE[base]
    small = convert(case.build(), LowRankConfig(rank=8, form=form))
    before = zoo.outputs(small, case.batch())[0]
    quantization.quantize_(small, getattr(quantization, kind)())
    assert stored(small) == "Int8Tensor"
    after = zoo.outputs(small, case.batch())[0]
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()  # int8 steps are 1/127 of the largest weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "weight", "change"),
    [
        (lambda: BitsAndBytesConfig(load_in_8bit=True), "Int8Params", 0.05),
        (lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"]), "Params4bit", 0.15),
        (lambda: torchao_config(), "Int8Tensor", 0.05),
    ],
    ids=["bitsandbytes-8", "bitsandbytes-4", "torchao"],
)
@pytest.mark.parametrize("form", zoo.FORMS)
def test_quantized_while_loading(tmp_path, form, config, weight, change):
    case = zoo.BY_BASE["BertForSequenceClassification"]
    # on CPUs with AVX-512 bf16 four bits, 16 levels, need inputs in multiples of 64 and outputs in multiples of 32
    wide = BertConfig(**{**zoo.BERT_LIKE, "hidden_size": 256, "intermediate_size": 512})
    small = convert(BertForSequenceClassification(wide).eval(), LowRankConfig(rank=64, form=form))
    small.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config(), device_map="cpu"
    )
    assert type(loaded) is type(small)
    assert stored(loaded) == weight
    with torch.no_grad():
        before, after = (m(**case.batch(), output_hidden_states=True).hidden_states[-1] for m in (small, loaded))
    assert 0 < (after.float() - before).norm() < change * before.norm()
    if weight != "Int8Tensor":
        with pytest.raises(WeightError, match="not plain Linears"):
            merge(loaded)


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["query.up", "value.up"]])
@pytest.mark.parametrize("form", zoo.FORMS)
def test_lora_trains_saves_reloads_and_merges(tmp_path, form, targets):
    import peft

    case = zoo.BY_BASE["BertForSequenceClassification"]
    small = convert(case.build(), LowRankConfig(rank=6, form=form))
    small.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = zoo.outputs(adapted, case.batch())[0]
    adapted(**case.batch(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    trained = zoo.outputs(adapted, case.batch())[0]
    assert not torch.allclose(before, trained)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(zoo.outputs(loaded, case.batch())[0], trained, atol=1e-6, rtol=1e-5)
    whole = loaded.merge_and_unload()
    torch.testing.assert_close(zoo.outputs(merge(whole), case.batch())[0], trained, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_lora_by_the_dense_layers_name_says_what_is_wrong():
    import peft

    small = convert(zoo.BY_BASE["BertForSequenceClassification"].build(), rank=6)
    with pytest.raises(ValueError, match=r"Target module LowRankLinear\([\s\S]*is not supported"):
        peft.get_peft_model(small, peft.LoraConfig(target_modules=["query"]))
