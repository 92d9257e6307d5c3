"""A working copy is the same function over the same memory, and what happens to it does not happen to the original."""

import functools
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn

from hf_reparam.errors import WeightError
from hf_reparam.layers.copies import WorkingCopy, frozen_copy
from hf_reparam.layers.surgery import replace_modules
from tests import zoo


@pytest.mark.parametrize("case", zoo.ALL, ids=lambda c: c.id)
def test_the_same_function_of_the_same_memory(case):
    model, batch = case.build(), case.batch()
    made = WorkingCopy(model).model
    assert type(made) is type(model)
    assert made.config is model.config
    for (name, copy), (other, original) in zip(
        made.named_modules(remove_duplicate=False), model.named_modules(remove_duplicate=False), strict=True
    ):
        assert name == other
        assert copy is not original
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, tensors)(remove_duplicate=False)) for m in (made, model))
        assert ours.keys() == theirs.keys()
        assert all(value is theirs[name] for name, value in ours.items())
    for a, b in zip(zoo.outputs(made, batch), zoo.outputs(model, batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", zoo.DIFFERENT, ids=lambda c: c.id)
def test_what_is_replaced_or_set_in_it_leaves_the_original(case):
    model, batch = case.build(), case.batch()
    modules, before, expected = list(model.modules()), dict(model.state_dict()), zoo.outputs(model, batch)
    made = WorkingCopy(model).model
    for module in made.modules():
        module.training = True
        module.left_here = 1
    first = next(m for m in made.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    replace_modules(made, {first: nn.Identity()})
    first.weight = nn.Parameter(torch.zeros_like(first.weight))
    assert list(model.modules()) == modules
    assert not any(m.training or hasattr(m, "left_here") for m in model.modules())
    assert all(value.data_ptr() == before[key].data_ptr() for key, value in model.state_dict().items())
    for a, b in zip(zoo.outputs(model, batch), expected, strict=True):
        assert torch.equal(a, b)


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    work = WorkingCopy(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))}))
    made = work.model
    assert made["a"] is made["b"][0]
    assert made["a"] is not shared
    assert work.originals[made["a"]] is shared
    assert len(work.originals) == 4
    new = nn.Identity()
    replace_modules(made, {made["a"]: new})
    assert made["a"] is made["b"][0] is new
    work.clear()
    assert not work.originals
    assert work.model is None


class Holder:
    """No module, but it has one."""

    def __init__(self, layer):
        self.layer, self.count = layer, 3


class Pointing(nn.Module):
    """Everything beside the children by which modelling code reaches its layers."""

    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed = [self.fc, (self.other, "text")]
        self.named = OrderedDict(fc=self.fc)
        self.later = defaultdict(list, fc=[self.fc])
        self.bound = self.fc.forward
        self.partial = functools.partial(self.apply_both, layer=2, first=self.fc)
        self.given = functools.partial(self.fc, torch.ones(1, 4))
        self.holder = Holder(self.fc)
        self.plain = {"size": 4, "names": ["a", "b"]}
        self.fc.owner = functools.partial(type(self).apply_both, self)

    def apply_both(self, x, *, layer, first):
        return first(self.other(x)) * layer

    def forward(self, x):
        return self.partial(self.bound(x)) + self.listed[0](x) + self.holder.layer(x) + self.given()


def test_whatever_points_to_a_module_points_to_its_copy():
    model, x = Pointing(), torch.randn(2, 4)
    made = WorkingCopy(model).model
    assert torch.equal(made(x), model(x))
    assert made.listed[0] is made.named["fc"] is made.later["fc"][0] is made.holder.layer is made.fc
    assert made.listed[1] == (made.other, "text")
    assert made.later["new"] == []
    assert made.bound.__self__ is made.fc
    assert made.partial.func.__self__ is made
    assert made.partial.keywords["first"] is made.fc
    assert made.given.func is made.fc
    assert made.fc.owner.args == (made,)
    assert made.plain == model.plain
    assert model.listed[0] is model.named["fc"] is model.holder.layer is model.bound.__self__ is model.fc
    assert model.given.func is model.fc
    assert model.fc.owner.args == (model,)
    made.listed.append(1)
    made.named["x"] = 1
    assert len(model.listed) == 2
    assert list(model.named) == ["fc"]


def test_hooks_of_the_original_run_and_new_ones_are_the_copys():
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda *_: seen.append("original's"))
    made = WorkingCopy(model).model
    made[0].register_forward_hook(lambda *_: seen.append("copy's"))
    made(torch.randn(1, 4))
    assert seen == ["original's", "copy's"]
    seen.clear()
    model(torch.randn(1, 4))
    assert seen == ["original's"]


def test_a_frozen_copy_takes_no_gradient_and_leaves_modes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    model[3].weight = model[0].weight  # tied
    model[2].eval()
    model[0].bias.requires_grad_(False)
    made = frozen_copy(model)
    assert [m.training for m in made.modules()] == [False] * 5
    assert not any(p.requires_grad for p in made.parameters())
    assert made[0].weight is made[3].weight
    x = torch.randn(3, 4, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for m in (model, made) for p in m.parameters())
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert int(model[2].num_batches_tracked) == 0
    with torch.no_grad():  # the memory is the model's
        model[0].weight.zero_()
    assert not made[3].weight.any()


def test_weights_made_in_inference_mode_are_named():
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(WeightError, match=r"0.weight was made inside torch.inference_mode\(\)"):
        frozen_copy(net)
