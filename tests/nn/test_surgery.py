"""Factoring one layer keeps what it was; replacing keeps sharing and copies only what stays."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reparam.errors import TargetError, WeightError
from hf_reparam.nn import find_targets
from hf_reparam.nn.surgery import factor, low_rank_like, replace_modules


def target(module):
    return find_targets(nn.ModuleDict({"layer": module})).selected[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [nn.Linear, lambda i, o: nn.Linear(i, o, bias=False), lambda i, o: Conv1D(o, i)])
def test_factor_keeps_dtype_bias_gradients_and_mode(dtype, build):
    dense = build(12, 8).to(dtype).eval()
    dense.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    low, error = factor(target(dense), 4)
    assert low.dense_type is type(dense)
    assert not low.training
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert not low.up.weight.requires_grad
    assert not low.down.weight.requires_grad
    assert (low.bias is None) == (dense.bias is None)
    if dense.bias is not None:
        assert torch.equal(low.bias, dense.bias)
        assert low.bias.requires_grad
        assert low.bias is not dense.bias
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert 0 < error < 1


def test_factor_at_full_rank_is_the_layer():
    dense, x = nn.Linear(12, 8).double(), torch.randn(5, 12).double()
    low, error = factor(target(dense), 8)
    assert error < 1e-7
    torch.testing.assert_close(low(x), dense(x), atol=1e-12, rtol=1e-12)


def test_factor_names_the_layer():
    bad = nn.Linear(4, 4)
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match="^layer: 1 of 16 values are NaN"):
        factor(target(bad), 2)
    with pytest.raises(WeightError, match="^layer: .*meta device"):
        factor(target(nn.Linear(4, 4, device="meta")), 2)


def test_low_rank_like_on_meta_allocates_nothing():
    low = low_rank_like(nn.Linear(1 << 20, 1 << 20, device="meta"), 1 << 10)
    assert low.up.weight.is_meta
    assert low.down.weight.is_meta


@pytest.mark.parametrize("inplace", [True, False])
def test_replace_at_every_path(inplace):
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, other)})
    new = nn.Identity()
    result = replace_modules(net, {shared: new}, inplace=inplace)
    assert result["a"] is result["b"][0] is new
    assert (result is net) == inplace
    assert (net["a"] is shared) == (not inplace)
    assert (result["b"][1] is other) == inplace
    assert torch.equal(result["b"][1].weight, other.weight)


def test_copy_never_copies_the_replaced_tensors():
    dense = nn.Linear(4, 4)

    class Uncopyable(torch.Tensor):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Uncopyable))
    net = nn.Sequential(dense, nn.Linear(4, 4))
    assert isinstance(replace_modules(net, {dense: nn.Identity()}, inplace=False)[0], nn.Identity)
    with pytest.raises(AssertionError, match="copied"):
        replace_modules(net, {}, inplace=False)


def test_replacing_the_root():
    root = nn.Linear(4, 4)
    assert isinstance(replace_modules(root, {root: nn.Identity()}, inplace=False), nn.Identity)
    with pytest.raises(TargetError, match="inplace=False"):
        replace_modules(root, {root: nn.Identity()}, inplace=True)
