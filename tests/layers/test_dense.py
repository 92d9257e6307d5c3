"""The registry reads a layer as (out, in) and builds it again; users can add types."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_reparam
from hf_reparam import register_dense
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers import dense
from hf_reparam.layers.surgery import low_rank_like
from hf_reparam.plan import Entry


class Scaled(nn.Linear):
    """A dense layer of a user's own: stored transposed, and doubled when called."""

    def __init__(self, n_in, n_out, bias=True, **kw):
        super().__init__(n_in, n_out, bias=bias, **kw)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight.T, self.bias)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(dense, "_registry", dict(dense._registry))


def layers():
    return {"Linear": nn.Linear(6, 4), "no bias": nn.Linear(6, 4, bias=False), "Conv1D": Conv1D(4, 6)}


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
def test_matrix_is_out_by_in(kind):
    layer, x = layers()[kind], torch.randn(3, 6)
    expected = nn.functional.linear(x, dense.dense_matrix(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_build_gives_the_layer_back(kind, dtype):
    original = layers()[kind].to(dtype).eval()
    original.get_parameter("weight").requires_grad_(False)
    low = low_rank_like(original, Entry(4))
    with torch.no_grad():
        low.up.weight.copy_(torch.eye(4))
        low.down.weight.copy_(dense.dense_matrix(original))
        if original.bias is not None:
            low.up.bias.copy_(original.bias)
    built = dense.build_dense(low)
    assert type(built) is type(original)
    assert not built.training
    assert not built.weight.requires_grad
    assert torch.equal(built.weight, original.weight)
    assert (built.bias is None) == (original.bias is None)
    if original.bias is not None:
        assert torch.equal(built.bias, original.bias)
        assert built.bias.requires_grad


def test_a_users_type(registry):
    net = nn.Sequential(Scaled(32, 32))
    with pytest.raises(TargetError, match="no dense layer"):
        hf_reparam.convert(net, rank=4)
    register_dense(
        Scaled, matrix=lambda m: m.weight.T, build=lambda i, o, b, device, dtype: Scaled(i, o, b).to(device, dtype)
    )
    back = hf_reparam.merge(hf_reparam.convert(net, hf_reparam.LowRankConfig(rank=32, allow_larger=True)))
    assert type(back[0]) is Scaled
    torch.testing.assert_close(back[0].weight, net[0].weight, atol=1e-6, rtol=1e-5)


def test_register_wants_a_module_class():
    with pytest.raises(TargetError, match="class of nn.Module"):
        register_dense(torch.relu, matrix=lambda m: m.weight, build=lambda *a: None)


def test_wrapped_or_absent_factors_cannot_be_merged():
    low = low_rank_like(nn.Linear(6, 4), Entry(2))
    low.up = nn.Sequential(low.up)
    with pytest.raises(WeightError, match="not plain Linears"):
        dense.dense_matrix(low)
    with pytest.raises(WeightError, match="meta device"):
        dense.build_dense(low_rank_like(nn.Linear(6, 4, device="meta"), Entry(2)))
