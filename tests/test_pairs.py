"""The same function without pivots: values, what is kept, what is stored, and what cannot be changed."""

import pytest
import torch
from torch import nn

from hf_reparam import LowRankConfig, convert, merge, report, to_pairs
from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import PivotedLinear
from tests import zoo


@pytest.mark.parametrize(
    "base", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_the_function_and_all_that_is_known_stay(base, inplace, tmp_path):
    case = zoo.BY_BASE[base]
    small = convert(case.build(), LowRankConfig(keep=0.5, min_rank=1), calibration=[case.batch()]).train()
    before = small.eval()(**case.batch()).logits
    ranks = {row.name: (row.rank, row.error) for row in report(small).layers}
    record = small.config.reparam["record"]
    pairs = to_pairs(small, inplace=inplace)
    assert (pairs is small) == inplace
    assert not any(isinstance(module, PivotedLinear) for module in pairs.modules())
    assert {row.name: (row.rank, row.error) for row in report(pairs).layers} == ranks
    assert {row.form for row in report(pairs).layers} == {"pair"}
    assert pairs.config.reparam["record"] == record
    torch.testing.assert_close(pairs(**case.batch()).logits, before, rtol=1e-4, atol=1e-5)
    if not inplace:
        torch.testing.assert_close(small(**case.batch()).logits, before, rtol=0, atol=0)
        assert not {p.data_ptr() for p in pairs.parameters()} & {p.data_ptr() for p in small.parameters()}
    pairs.save_pretrained(tmp_path)
    again = type(pairs).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**case.batch()).logits, pairs(**case.batch()).logits, rtol=0, atol=0)
    torch.testing.assert_close(merge(again)(**case.batch()).logits, before, rtol=1e-4, atol=1e-5)


def test_trained_factors_modes_and_dtypes_stay():
    model = convert(zoo.BY_BASE["BertModel"].build().to(torch.bfloat16), LowRankConfig(keep=0.5, min_rank=1)).train()
    layer = model.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.up.weight += 1
    layer.down.weight.requires_grad_(False)
    pairs = to_pairs(model)
    new = pairs.encoder.layer[0].output.dense
    assert torch.equal(new.up.weight, layer.up.weight)
    assert (new.down.weight.requires_grad, new.up.weight.requires_grad) == (False, True)
    assert (new.down.weight.dtype, pairs.training) == (torch.bfloat16, True)


def test_plain_modules_layers_and_objects_with_models_inside():
    net = convert(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), LowRankConfig(keep=0.5, min_rank=1))
    x = torch.randn(3, 32)
    torch.testing.assert_close(to_pairs(net)(x), net(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_pairs(net[0])(x), net[0](x), rtol=1e-4, atol=1e-5)
    holder = nn.ModuleDict({"a": convert(zoo.BY_BASE["BertModel"].build(), LowRankConfig(keep=0.5, min_rank=1))})
    pairs = to_pairs(holder)
    assert {entry["form"] for entry in pairs["a"].config.reparam["modules"].values()} == {"pair"}


def test_what_cannot_be_changed():
    with pytest.raises(TargetError, match="no pivoted layer"):
        to_pairs(zoo.BY_BASE["BertModel"].build())
    layer = convert(nn.Linear(32, 32), LowRankConfig(keep=0.5, min_rank=1))
    with pytest.raises(TargetError, match="use inplace=False"):
        to_pairs(layer, inplace=True)
