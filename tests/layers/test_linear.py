"""A LowRankLinear is its two Linears, and answers questions about its weight without multiplying them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

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


@pytest.fixture
def pivoted():
    return PivotedLinear(nn.Linear(9, 3, bias=False), nn.Linear(3, 8), order=torch.randperm(12))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.03)], ids=str
)
def test_many_rows_are_multiplied_as_few_are(pivoted, dtype, tolerance):
    """Many by weights in the order of the inputs, few by inputs in the order of the weights; gradients, too."""
    pivoted.to(dtype)
    x = torch.randn(2, 3, 12, dtype=dtype, requires_grad=True)
    rows = [row[None].detach().requires_grad_() for row in x.flatten(0, 1)]
    assert pivoted._orders_weights(x)
    assert not pivoted._orders_weights(rows[0])
    many, few = pivoted(x), torch.cat([pivoted(row) for row in rows]).view(2, 3, 8)
    torch.testing.assert_close(many, few, atol=tolerance, rtol=tolerance)
    weights = list(pivoted.parameters())
    of_x, *of_weights = torch.autograd.grad(many.square().sum(), [x, *weights])
    of_rows = torch.autograd.grad(few.square().sum(), [*rows, *weights])
    for one, other in zip([of_x.flatten(0, 1), *of_weights], [torch.cat(of_rows[:6]), *of_rows[6:]], strict=True):
        torch.testing.assert_close(one, other, atol=20 * tolerance, rtol=20 * tolerance)


def test_weights_that_are_frozen_are_not_copied_for_a_backward_pass(pivoted):
    x = torch.randn(24, 12, requires_grad=True)
    assert pivoted._orders_weights(x)
    pivoted.requires_grad_(False)
    assert not pivoted._orders_weights(x)
    assert pivoted._orders_weights(x.detach())
    with torch.no_grad():
        assert pivoted._orders_weights(x)


def test_many_rows_under_autocast(pivoted):
    x = torch.randn(24, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = pivoted(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), pivoted(x), atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_rows_of_several_models_at_once(pivoted):
    x = torch.randn(24, 12)
    layers = [pivoted, copy.deepcopy(pivoted)]
    nn.init.normal_(layers[1].down.weight)
    stacked = torch.func.stack_module_state(layers)
    called = torch.func.vmap(lambda state, x: torch.func.functional_call(pivoted, state, (x,)), in_dims=(0, None))
    expected = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(called(stacked, x), expected)


class Doubling(nn.Linear):
    """What an adapter does to a layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubling(linear):
    other = Doubling(9, 3, bias=False)
    other.weight = linear.weight
    return other


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("way", ["class", "hook", "forward", "bias"])
def test_what_is_done_to_a_factor_counts_for_any_number_of_rows(pivoted, rows, way):
    x, plain = torch.randn(rows, 12), pivoted.down
    expected = pivoted.up(x[:, pivoted.order[:3]] + 2 * plain(x[:, pivoted.order[3:]]))
    if way == "bias":
        plain.bias = nn.Parameter(torch.randn(3))
        expected = pivoted.up(x[:, pivoted.order[:3]] + plain(x[:, pivoted.order[3:]]))
    elif way == "class":
        pivoted.down = doubling(plain)
    elif way == "hook":
        plain.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        plain.forward = lambda x: 2 * nn.functional.linear(x, plain.weight)
    torch.testing.assert_close(pivoted(x), expected)


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


def test_a_compiled_layer_is_compiled_once_for_any_number_of_rows(pivoted):
    counter = CompileCounter()
    compiled = torch.compile(pivoted, backend=counter, dynamic=True)
    for rows in (24, 2, 50):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(compiled(x), pivoted(x))
    assert counter.frame_count == 1
