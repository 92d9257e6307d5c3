"""What can be factored, and the reason for everything that cannot."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hf_reparam import LowRankConfig
from hf_reparam.errors import TargetError
from hf_reparam.layers.surgery import low_rank_like
from hf_reparam.model.sites import select
from hf_reparam.plan import Entry
from tests import zoo


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))


class Custom(nn.Linear):
    pass


def find(model, **options):
    return select(model, LowRankConfig(**options))


def sites(found):
    return [item.site for item in found.selected]


def names(found):
    return [site.name for site in sites(found)]


def reasons(found):
    return {item.name: item.reason for item in found.skipped}


def test_selects_dense_layers_with_their_shapes():
    found = find(nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 2, bias=False)}))
    assert [(s.name, s.in_features, s.out_features, s.dense_numbers(None)) for s in sites(found)] == [
        ("a", 3, 5, 20),
        ("b", 5, 2, 10),
    ]
    assert found.skipped == ()


def test_target_and_exclude():
    net = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("query", "key", "value")})
    found = find(net, target_modules=["query", "re:[kv].*"], exclude_modules="value")
    assert names(found) == ["query", "key"]
    assert reasons(found) == {"value": "excluded by 'value'"}
    assert reasons(find(net, target_modules="query")) == {
        "key": "not in target_modules",
        "value": "not in target_modules",
    }


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_pattern_without_a_match(option):
    with pytest.raises(TargetError, match=f"{option}: 'nope' matches none of the 1 layers"):
        find(nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Embedding(3, 5)}), **{option: "nope"})


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
    found = find(net)
    assert names(found) == []
    expected = {
        "custom": "subclass of a dense type",
        "attention.in_proj_weight": "inside nn.MultiheadAttention",
        "attention.out_proj": "inside nn.MultiheadAttention",
        "experts.gate_up": "a bare parameter of Experts",
        "table": "Embedding is not a dense layer",
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
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    found = find(model, target_modules="*")
    assert "cls.predictions.transform.dense" in names(found)
    assert "cls.predictions.decoder" not in names(found)
    assert reasons(found)["cls.predictions.decoder"] == "output embeddings"


def test_shared_module_is_one_target_with_all_its_names():
    shared = nn.Linear(4, 4)
    found = find(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), target_modules="b.0")
    assert [site.names for site in sites(found)] == [("a", "b.0")]


def test_low_rank_layers_are_targets_and_their_factors_are_not():
    found = find(nn.Sequential(low_rank_like(nn.Linear(8, 8), Entry(2)), nn.Linear(8, 8)))
    held = [item.structure.cost(item.site, item.site.entry) + item.site.others for item in found.selected]
    assert [(s.name, s.entry, now, s.dense_numbers(s.entry)) for s, now in zip(sites(found), held, strict=True)] == [
        ("0", Entry(2), 40, 72),
        ("1", None, 72, 72),
    ]


def test_works_on_meta():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Embedding(3, 8))
    assert names(find(net)) == ["0"]
