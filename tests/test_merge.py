"""`merge`: the stock class and configuration again, the product exact, ties true to the tensors."""

import json

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_reparam
from hf_reparam import LowRankConfig, convert, merge
from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo
from tests.launch import launch

PRODUCT = 1e-6  # relative error of a merged weight, float32: one rounding is 6e-8


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("case", zoo.DIFFERENT, ids=lambda c: c.id)
def test_merge_undoes_convert(case, form):
    model, batch = case.build(), case.batch()
    small = convert(model, LowRankConfig(rank=6, form=form))
    dense = merge(small)
    assert type(dense) is type(model)
    assert type(dense.config) is type(model.config)
    expected = {**model.config.to_dict(), "architectures": [case.base]}
    assert dense.config.to_dict() == expected
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
    assert {n: p.requires_grad for n, p in dense.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for a, b in zip(zoo.outputs(dense, batch), zoo.outputs(small, batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name, low in small.named_modules():
        if isinstance(low, LowRankLinear):
            merged = dense.get_submodule(name)
            weight = merged.weight.T if isinstance(merged, Conv1D) else merged.weight
            up, down = low.factors()
            exact = up.double() @ down.double()
            assert ((weight.double() - exact).norm() / exact.norm()).item() <= PRODUCT


def test_merge_of_full_rank_is_the_original():
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    dense = merge(convert(model, LowRankConfig(rank=1.0, allow_larger=True)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_inplace_and_copy():
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6)
    kind = type(small)
    dense = merge(small)
    assert type(small) is kind
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert merge(small, inplace=True) is small
    assert type(small) is transformers.BertForMaskedLM
    net = convert(nn.Sequential(nn.Linear(32, 32).half().eval()), rank=4)
    back = merge(net)
    assert back[0].weight.dtype is torch.float16
    assert not back[0].training


def test_nothing_to_merge():
    with pytest.raises(TargetError, match="BertModel has no low-rank layer"):
        merge(zoo.BY_BASE["BertModel"].build())


@pytest.mark.slow
def test_saved_merge_loads_where_the_package_is_never_imported(tmp_path):
    case = zoo.BY_BASE["BertForMaskedLM"]
    dense = merge(convert(case.build(), rank=6))
    dense.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "reparam" not in config
    assert config["model_type"] == "bert"
    torch.save(case.batch(), tmp_path / "batch.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForMaskedLM as A;"
        "m, info = A.from_pretrained(sys.argv[1], output_loading_info=True);"
        "assert not any(info.values()), info; assert 'hf_reparam' not in sys.modules;"
        "b = torch.load(sys.argv[1] + '/batch.pt'); torch.save(m(**b).logits.detach(), sys.argv[1] + '/logits.pt')"
    )
    launch("-c", code, tmp_path, processes=1)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), zoo.outputs(dense, case.batch())[0])


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration", "MarianMTModel"])
def test_ties_survive(base):
    dense = merge(convert(zoo.BY_BASE[base].build(), rank=6))
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert dense.config.tie_word_embeddings is True


@pytest.mark.parametrize("through", ["convert", "merge"])
def test_tie_word_embeddings_follows_the_tensors(tmp_path, through):
    """An adapter's merge can leave two different tensors under `tie_word_embeddings=True`."""
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    model = case.build() if through == "convert" else convert(case.build(), rank=6)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    result = convert(model, rank=6) if through == "convert" else merge(model)
    assert result.config.tie_word_embeddings is False
    result.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    for a, b in zip(zoo.outputs(loaded, case.batch()), zoo.outputs(result, case.batch()), strict=True):
        assert torch.equal(a, b)


def test_untied_stays_untied():
    model = next(c for c in zoo.FAMILIES if c.options == (("tie_word_embeddings", False),)).build()
    dense = merge(convert(model, rank=6))
    assert dense.config.tie_word_embeddings is False
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight


def test_shared_layers_stay_shared():
    shared = nn.Linear(32, 32)
    net = merge(convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), rank=4))
    assert net["a"] is net["b"][0]
    assert type(net["a"]) is nn.Linear


def test_merge_after_training():
    case = zoo.BY_BASE["BertForSequenceClassification"]
    small = convert(case.build(), rank=6).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    for _ in range(3):
        small(**case.batch(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    small.eval()
    torch.testing.assert_close(
        zoo.outputs(merge(small), case.batch())[0], zoo.outputs(small, case.batch())[0], atol=1e-5, rtol=1e-5
    )
    assert hf_reparam.report(small).layers
