"""What can be factored, and the reason for everything that cannot."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hf_reparam.errors import TargetError
from hf_reparam.layers import find_targets
from hf_reparam.layers.surgery import low_rank_like
from hf_reparam.plan import Entry


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))


class Custom(nn.Linear):
    pass


def names(targets):
    return [target.name for target in targets.selected]


def reasons(targets):
    return {item.name: item.reason for item in targets.skipped}


def test_selects_dense_layers_with_their_shapes():
    found = find_targets(nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 2, bias=False)}))
    assert [(t.name, t.in_features, t.out_features, t.dense_parameters) for t in found.selected] == [
        ("a", 3, 5, 20),
        ("b", 5, 2, 10),
    ]
    assert found.skipped == ()


def test_include_and_exclude():
    net = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("query", "key", "value")})
    found = find_targets(net, include=["query", "re:[kv].*"], exclude="value")
    assert names(found) == ["query", "key"]
    assert reasons(found) == {"value": "excluded by 'value'"}
    assert reasons(find_targets(net, include="query")) == {"key": "not included", "value": "not included"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_without_a_match(option):
    with pytest.raises(TargetError, match=f"{option}: 'nope' matches none of the 1 dense layers"):
        find_targets(nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Embedding(3, 5)}), **{option: "nope"})


def test_reasons():
    net = nn.ModuleDict(
        {
            "custom": Custom(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "experts": Experts(),
            "table": nn.Embedding(9, 8),
            "normed": weight_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "head": nn.Linear(8, 9),
            "integers": nn.Linear(8, 8),
            "patched": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
        }
    )
    net["hooked"].register_forward_hook(lambda *args: None)
    net["integers"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    net["patched"].forward = lambda x: x
    net["head"].weight = net["table"].weight
    found = find_targets(net)
    assert names(found) == []
    expected = {
        "custom": "subclass of a dense type",
        "attention.in_proj_weight": "inside nn.MultiheadAttention",
        "attention.out_proj": "inside nn.MultiheadAttention",
        "experts.gate_up": "a bare parameter of Experts",
        "table": "Embedding is no dense layer",
        "normed": "subclass of a dense type",
        "hooked": "hooks",
        "head": "tied",
        "integers": "quantized",
        "patched": "hooks",
    }
    assert set(expected) <= set(reasons(found))
    for name, text in expected.items():
        assert text in reasons(found)[name], name


def test_protected_layers_keep_their_reason_whatever_the_patterns_say():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    found = find_targets(net, include="*", protected={"b": "output embeddings"})
    assert names(found) == ["a"]
    assert reasons(found) == {"b": "output embeddings"}


def test_shared_module_is_one_target_with_all_its_names():
    shared = nn.Linear(4, 4)
    found = find_targets(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), include="b.0")
    assert [target.names for target in found.selected] == [("a", "b.0")]


def test_low_rank_layers_are_targets_and_their_factors_are_not():
    found = find_targets(nn.Sequential(low_rank_like(nn.Linear(8, 8), Entry(2)), nn.Linear(8, 8)))
    assert [(t.name, t.entry and t.entry.rank, t.parameters, t.dense_parameters) for t in found.selected] == [
        ("0", 2, 40, 72),
        ("1", None, 72, 72),
    ]


def test_works_on_meta():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Embedding(3, 8))
    assert names(find_targets(net)) == ["0"]
