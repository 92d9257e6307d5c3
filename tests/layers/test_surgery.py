"""Factoring one layer keeps what it was; replacing keeps sharing and copies only what stays."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reparam import convert
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import WorkingCopy
from hf_reparam.layers.dense import dense_matrix
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.layers.surgery import check_copyable, factor, independent_copy, low_rank_like, replace_modules
from hf_reparam.linalg.factorize import decompose
from hf_reparam.plan import Entry

FORMS = ["pair", "pivoted"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [nn.Linear, lambda i, o: nn.Linear(i, o, bias=False), lambda i, o: Conv1D(o, i)])
def test_factor_keeps_dtype_bias_gradients_and_mode(dtype, build, form):
    dense = build(12, 8).to(dtype).eval()
    dense.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    low = factor(dense, Entry(4, form), decompose(dense_matrix(dense)))
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
    assert low.entry == Entry(4, form)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_half_precision_is_rounded_once(dtype, step):
    dense = nn.Linear(64, 48).to(dtype)
    low = factor(dense, Entry(20), decompose(dense_matrix(dense)))
    up, down = decompose(dense_matrix(dense).double()).cut(20)
    torch.testing.assert_close(low.up.weight.double(), up, rtol=step, atol=2**-25)
    torch.testing.assert_close(low.down.weight.double(), down, rtol=step, atol=2**-25)


@pytest.mark.parametrize("form", FORMS)
def test_factor_at_full_rank_is_the_layer(form):
    dense, x = nn.Linear(12, 8).double(), torch.randn(5, 12).double()
    low = factor(dense, Entry(8, form), decompose(dense.weight))
    torch.testing.assert_close(low(x), dense(x), atol=1e-12, rtol=1e-12)


def test_the_mean_goes_into_the_bias():
    dense, mean = nn.Linear(12, 8).double(), torch.randn(12).double()
    for form in FORMS:
        low = factor(dense, Entry(2, form), decompose(dense.weight), mean=mean)
        torch.testing.assert_close(low(mean), dense(mean), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (20, 20)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_pivoted_is_the_same_function_in_fewer_numbers(shape, rank):
    dense, x = nn.Linear(*shape), torch.randn(3, 4, shape[0])
    found = decompose(dense.weight)
    pair, pivoted = (factor(dense, Entry(rank, form), found) for form in FORMS)
    torch.testing.assert_close(pivoted(x), pair(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pivoted.weight + 0, pair.weight + 0, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dense_matrix(pivoted), dense_matrix(pair), atol=1e-6, rtol=1e-5)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (pair, pivoted)]
    assert sizes[0] - sizes[1] == rank**2
    assert pivoted.down.weight.abs().max() <= 1.0501
    assert sorted(pivoted.order.tolist()) == list(range(shape[0]))


def test_low_rank_like_on_meta_allocates_nothing():
    low = low_rank_like(nn.Linear(1 << 20, 1 << 20, device="meta"), Entry(1 << 10))
    assert low.up.weight.is_meta
    assert low.down.weight.is_meta


def test_replace_at_every_path():
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, other)})
    new = nn.Identity()
    replace_modules(net, {shared: new})
    assert net["a"] is net["b"][0] is new
    assert net["b"][1] is other


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4)]
        self.add_module("0", self.layers[0])


@pytest.mark.parametrize("copied", [True, False])
def test_replace_in_lists_beside_the_children(copied):
    net, new = Listed(), nn.Identity()
    model = WorkingCopy(net).model if copied else net
    old = net.layers[0]
    replace_modules(model, {model.layers[0]: new})
    assert model.layers[0] is model.get_submodule("0") is new
    assert (net.layers[0] is net.get_submodule("0") is old) == copied


def test_a_copy_shares_the_new_modules_alone():
    net, new = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    work = WorkingCopy(net).model
    replace_modules(work, {work[0]: new})
    result = independent_copy(work, [new])
    assert result[0] is new
    assert result[1] is not net[1]
    assert result[1].weight is not net[1].weight
    assert torch.equal(result[1].weight, net[1].weight)


def test_copy_never_copies_the_replaced_tensors():
    dense = nn.Linear(4, 4)

    class Uncopyable(torch.Tensor):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Uncopyable))
    net = nn.Sequential(dense, nn.Linear(4, 4))
    check_copyable(net, [dense])
    work, new = WorkingCopy(net).model, nn.Identity()
    replace_modules(work, {work[0]: new})
    assert independent_copy(work, [new])[0] is new
    with pytest.raises(TargetError, match=r"use inplace=True. The copy failed with: copied"):
        independent_copy(net, [])


def test_replacing_the_root():
    root = nn.Linear(32, 32)
    assert isinstance(convert(root, rank=4), LowRankLinear)
    with pytest.raises(TargetError, match="inplace=False"):
        convert(root, rank=4, inplace=True)
