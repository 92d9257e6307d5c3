"""Tokenizers, processors, gradient checkpointing, torch.compile and adapters see an ordinary model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

import hf_reparam
from benchmarks.demo import embed, load_batch
from hf_reparam import LowRankConfig, convert, merge
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo


def test_processor_is_found_by_the_family(tmp_path):
    convert(zoo.BY_BASE["ViTForImageClassification"].build(), rank=6).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    mapping = IMAGE_PROCESSOR_MAPPING  # AutoImageProcessor itself needs torchvision in older versions
    assert mapping[type(transformers.AutoConfig.from_pretrained(tmp_path))] == mapping[transformers.ViTConfig]


@pytest.mark.slow
def test_tokenizer_of_a_real_folder(tmp_path, minilm, shallow):
    convert(transformers.AutoModel.from_pretrained(shallow), rank=16).save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(minilm) / name, tmp_path / name)
    text = "low-rank models, and their tokenizers"
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(AutoTokenizer.from_pretrained(minilm))
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(minilm)(text)


@pytest.mark.parametrize(
    ("base", "form"),
    [("BertForMaskedLM", "pair"), ("LlamaForCausalLM", "pivoted"), ("T5ForConditionalGeneration", "pair")],
)
def test_gradient_checkpointing(base, form):
    case = zoo.BY_BASE[base]
    small = convert(case.build(), LowRankConfig(rank=6, form=form)).train()
    batch = {**case.batch(), "labels": zoo._ids(2, 5 if "decoder_input_ids" in case.batch() else 7)}

    def gradients():
        small.zero_grad()
        torch.manual_seed(0)  # the same dropout; checkpointing replays it
        small(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in small.named_parameters() if p.grad is not None}

    plain = gradients()
    small.gradient_checkpointing_enable()
    saved = gradients()
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_compile():
    case = zoo.BY_BASE["BertForMaskedLM"]
    small = convert(case.build(), LowRankConfig(rank=6, form="pivoted"))
    expected = zoo.outputs(small, case.batch())
    compiled = torch.compile(small, backend="aot_eager")
    for a, b in zip(zoo.outputs(compiled, case.batch()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_resize_token_embeddings(tmp_path):
    small = convert(zoo.BY_BASE["GPT2LMHeadModel"].build(), rank=6)
    small.resize_token_embeddings(120)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (120, 32)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
def test_lora_on_the_factors_and_merge_refuses_wrapped_ones(tmp_path, form):
    import peft

    case = zoo.BY_BASE["LlamaForCausalLM"]
    small = convert(case.build(), LowRankConfig(rank=6, form=form))
    reference = zoo.outputs(small, case.batch())
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    changed = zoo.outputs(adapted, case.batch())
    assert not torch.allclose(changed[0], reference[0], atol=1e-3)
    with pytest.raises(hf_reparam.errors.WeightError, match="not plain Linears: merge or unload the adapter"):
        merge(adapted)
    back = adapted.merge_and_unload()
    assert {type(m.up) for m in back.modules() if isinstance(m, LowRankLinear)} == {torch.nn.Linear}
    torch.testing.assert_close(zoo.outputs(merge(back), case.batch())[0], changed[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", zoo.FORMS)
def test_int8_on_top_of_the_factors(shallow, form):
    small = convert(
        transformers.AutoModel.from_pretrained(shallow).eval(), LowRankConfig(rank=100, form=form, allow_larger=True)
    )
    quantizer = torch.ao.quantization
    int8 = quantizer.quantize_dynamic(small, {torch.nn.Linear: quantizer.per_channel_dynamic_qconfig})
    layer = int8.encoder.layer[0].output.dense
    assert type(layer.up).__module__ == type(layer.down).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear"
    batch = load_batch(shallow)
    assert (embed(small, batch) * embed(int8, batch)).sum(-1).mean() > 0.999  # pair 0.9998, pivoted 0.9997
