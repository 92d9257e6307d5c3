"""Watching layers: the order in which a pass reaches them, what goes in, and that no hook stays."""

import pytest
import torch
from torch import nn

from hf_reparam.calibrate.watch import inputs_of, order_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.query, self.key, self.twice, self.never = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        return self.last(self.twice(self.twice(self.query(x) + self.key(x))))


@pytest.fixture
def net():
    return Net()


def test_layers_with_one_input_come_together_in_the_order_of_the_pass(net):
    x = torch.randn(2, 4)
    assert order_of(dict(net.named_children()), lambda: net(x)) == [["query", "key"], ["last"]]
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_inputs_and_an_early_end(net):
    x, layers = torch.randn(2, 4), {"query": net.query, "twice": net.twice}
    net.last.forward = None  # never reached
    found = inputs_of(layers, lambda: net(x))
    assert torch.equal(found["query"], x)
    torch.testing.assert_close(found["twice"], (net.query(x) + net.key(x)).detach())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_hooks_leave_when_the_pass_fails(net):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        inputs_of({"last": net.last}, lambda: net(torch.randn(2, 5)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        order_of({"last": net.last}, lambda: net(torch.randn(2, 5)))
    assert not any(m._forward_pre_hooks for m in net.modules())
