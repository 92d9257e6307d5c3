"""Sharded models in two processes against the same model in one: outputs, gradients, training, saving."""

import pytest
import transformers
from torch import nn

from hf_reparam import LowRankConfig, convert
from hf_reparam.errors import PlanError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.parallel import factor_entries, factor_rules
from tests import zoo
from tests.launch import launch

SCRIPT = """
import sys, torch, transformers
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import hf_reparam
from tests import zoo

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
dist.init_process_group("gloo")
rank = dist.get_rank()
load = transformers.AutoModelForCausalLM.from_pretrained
ids = zoo.INPUTS["text"]()["input_ids"]

def parts(folder, mode):
    # the model in two processes, and what of the batch is this one's
    if mode == "tensor":
        from transformers.distributed import DistributedConfig

        return load(folder, distributed_config=DistributedConfig(tp_size=2)), ids
    model = load(folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in [*model.model.layers, model]:
        fully_shard(layer, mesh=mesh)
    return model, ids[rank : rank + 1]

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def compare(folder, mode):
    one, (model, mine) = load(folder), parts(folder, mode)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, one)]
    for _ in range(3):
        for m, batch, optimizer in ((model, mine, optimizers[0]), (one, ids, optimizers[1])):
            m(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(mine).logits, one(mine).logits, atol=1e-4, rtol=1e-4)
    if mode == "tensor":
        model.save_pretrained(folder + "-saved")
        dist.barrier()
        again = load(folder + "-saved")
        assert type(again) is type(one)
        torch.testing.assert_close(again(ids).logits, one(ids).logits, atol=1e-4, rtol=1e-4)
    if rank == 0:
        print(folder.rpartition("/")[2], mode, *sharded)
    dist.barrier()

for mode in sys.argv[2:]:
    for form in zoo.FORMS:
        compare(sys.argv[1] + "/" + form, mode)
dist.destroy_process_group()
"""
SUPPORTED = hasattr(transformers.PreTrainedModel, "_expand_parallel_plan")
MODES = [
    pytest.param("tensor", marks=pytest.mark.skipif(not SUPPORTED, reason="Transformers has no hook for it")),
    "fully_shard",
]


@pytest.fixture(scope="module")
def sharded_in_two(tmp_path_factory):
    """Names of the parameters of which each process holds a part, by form and mode; one launch for all."""
    folder = tmp_path_factory.mktemp("parallel")
    model = zoo.BY_BASE["LlamaForCausalLM"].build()
    for form in zoo.FORMS:
        convert(model, LowRankConfig(rank=6, form=form, exclude_modules="*layers.1.self_attn.q_proj")).save_pretrained(
            folder / form
        )
    (folder / "script.py").write_text(SCRIPT)
    printed = launch(folder / "script.py", folder, *(["tensor"] if SUPPORTED else []), "fully_shard")
    return {tuple(line.split()[:2]): set(line.split()[2:]) for line in printed.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one(sharded_in_two, mode, form):
    sharded = sharded_in_two[form, mode]
    row = "down" if form == "pair" else "up"  # what shards where the plan shards inputs
    layer = "model.layers.0."
    assert {f"{layer}self_attn.q_proj.up.weight", f"{layer}mlp.down_proj.{row}.weight"} <= sharded
    assert "model.layers.1.self_attn.q_proj.weight" in sharded
    if mode == "tensor":
        assert f"{layer}self_attn.q_proj.down.weight" not in sharded
        assert f"{layer}self_attn.k_proj.up.weight" in sharded


def low(form):
    return convert(nn.Sequential(nn.Linear(16, 8)), LowRankConfig(rank=2, form=form))[0]


@pytest.mark.parametrize("form", zoo.FORMS)
def test_rules(form):
    layer = low(form)
    assert isinstance(layer, LowRankLinear)
    assert factor_rules({"x": "rowwise"}, "fc", layer) == {"x": "rowwise"}
    assert factor_rules({"fc": "grouped"}, "fc", layer) == {"fc": "grouped"}
    up = {"fc.up.weight": "colwise", "fc.up.bias": "colwise", "fc.up": "colwise"}
    assert list(factor_rules({"fc": "colwise", "x": "rowwise"}, "fc", layer).items()) == [("x", "rowwise"), *up.items()]


@pytest.mark.parametrize("form", zoo.FORMS)
def test_rules_of_factors_are_those_of_their_layer(form):
    """What the plan says of the factors is for servers, and of other layers of the kind."""
    said = {"fc": "colwise", "fc.down.weight": "replicate", "fc.down": "replicate", "fc2.down": "rowwise"}
    up = {"fc.up.weight": "colwise", "fc.up.bias": "colwise", "fc.up": "colwise"}
    assert factor_rules(said, "fc", low(form)) == {"fc2.down": "rowwise", **up}


@pytest.mark.skipif(not SUPPORTED, reason="Transformers makes its plans otherwise")
def test_the_plan_names_factors_before_their_layers():
    converted = convert(zoo.BY_BASE["LlamaForCausalLM"].build(), LowRankConfig(rank=6, form="pair"))
    model = type(converted)(converted.config)
    attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
    expected = {f"{attention}.q_proj.down": "replicate", f"{attention}.q_proj.up": "colwise"}
    expected |= {f"{mlp}.down_proj.down": "rowwise", f"{mlp}.down_proj.up": "replicate"}
    assert expected.items() <= model.tp_plan.items()
    order = list(model.tp_plan)
    assert order.index(f"{attention}.q_proj.down") < order.index(f"{attention}.q_proj")
    model.tp_plan["lm_head.scale"] = "replicate"  # as quantizers do
    assert "lm_head.scale" in model.tp_plan
    assert factor_entries({"fc": "rowwise"}, [("fc", low("pivoted"))]) == {}


def test_packed_inputs():
    packed = {"fc": "packed_rowwise"}
    assert factor_rules(packed, "fc", low("pair")) == {"fc.down.weight": "packed_rowwise", "fc.down": "packed_rowwise"}
    with pytest.raises(PlanError, match="fc: a pivoted layer cannot be sharded in the style 'packed_rowwise'"):
        factor_rules(packed, "fc", low("pivoted"))
