"""A LowRankLinear is its two Linears, and answers questions about its weight without multiplying them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_reparam.layers.linear import LowRankLinear, PivotedLinear


@pytest.fixture(params=["pair", "pivoted"])
def make(request):
    def build(bias=True, n_in=12, n_out=8, rank=3):
        up = nn.Linear(rank, n_out, bias=bias)
        if request.param == "pair":
            return LowRankLinear(nn.Linear(n_in, rank, bias=False), up)
        return PivotedLinear(nn.Linear(n_in - rank, rank, bias=False), up, order=torch.randperm(n_in))

    return build


def product_of(layer):
    if layer.form == "pair":
        return layer.up.weight @ layer.down.weight
    product = torch.empty(8, 12)
    columns = torch.cat([layer.up.weight, layer.up.weight @ layer.down.weight], 1)
    return product.index_copy(1, layer.order, columns)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_layer_of_the_product(make, bias):
    layer, x = make(bias), torch.randn(2, 5, 12)
    dense = nn.functional.linear(x, product_of(layer), layer.bias)
    torch.testing.assert_close(layer(x), dense, atol=1e-6, rtol=1e-5)


def test_attributes_of_a_dense_layer(make):
    layer = make()
    assert (layer.in_features, layer.out_features, layer.rank) == (12, 8, 3)
    assert layer.bias is layer.up.bias
    assert make(bias=False).bias is None
    assert "in_features=12, out_features=8, rank=3, form=" in repr(layer)


def test_metadata_of_the_weight_multiplies_nothing(make, monkeypatch):
    weight = make().to(torch.bfloat16).weight

    def forbidden(*args, **kwargs):
        raise AssertionError("the product was formed")

    monkeypatch.setattr("hf_reparam.layers.factored._formed", forbidden)
    assert weight.shape == (8, 12)
    assert weight.dtype is torch.bfloat16
    assert weight.device.type == "cpu"
    assert (weight.ndim, weight.dim(), weight.numel(), weight.size(0), weight.size()) == (2, 2, 96, 8, (8, 12))
    assert weight.is_floating_point()
    with pytest.raises(AssertionError, match="product"):
        weight.sum()


def test_arithmetic_on_the_weight_is_the_product_with_gradients(make):
    layer, x = make(bias=False), torch.randn(4, 12)
    product = product_of(layer)
    for value, expected in [
        (layer.weight + 0, product),
        (layer.weight.T + 0, product.T),
        (x @ layer.weight.T, x @ product.T),
        (nn.functional.linear(x, layer.weight), x @ product.T),
        (torch.cat([layer.weight, layer.weight]), torch.cat([product, product])),
        (layer.weight.detach().clone(), product),
        (layer.weight.to(torch.float64), product.double()),
    ]:
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, expected)
    layer.weight.square().sum().backward()
    assert layer.up.weight.grad is not None
    assert layer.down.weight.grad is not None


def test_copies_and_pickles(make):
    layer = make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight + 0, layer.weight + 0)
        assert other.up.weight is not layer.up.weight


def test_state_dict_holds_the_factors_and_ignores_the_marker(make):
    layer, other = make(), make()
    state = layer.state_dict()
    assert sorted(set(state) - {"order"}) == ["down.weight", "up.bias", "up.weight", "weight"]
    assert state["weight"].numel() == 0  # the marker
    other.load_state_dict(state)
    assert torch.equal(other.up.weight, layer.up.weight)
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**state, "weight": torch.ones(8, 12)})


@pytest.mark.slow
def test_compiled_forward_and_weight(make):
    layer, x = make(), torch.randn(3, 12)
    compiled = torch.compile(lambda v: layer(v.to(layer.weight.dtype)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
