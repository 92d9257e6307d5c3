"""Low-rank layers, used as the dense layers that they stand for: called, read, written to, offloaded, partitioned."""

import copy

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.nn.parallel import DistributedDataParallel  # noqa: F401  # torch.distributed is imported
from transformers import initialization
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, merge
from hf_reparam.errors import TargetError, WeightError
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.structures.table.modules import LowRankEmbedding, LowRankHead
from tests import zoo

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def low_rank(form, kind=nn.Linear):
    return convert(nn.Sequential(kind(16, 16)), LowRankConfig(rank=4, form=form))[0]


def table():
    return LowRankEmbedding(nn.Parameter(torch.randn(20, 4)), nn.Parameter(torch.randn(16, 4)))


LAYERS = [lambda: low_rank("pair"), lambda: low_rank("pivoted"), lambda: low_rank("pair", Conv1D), table]


def itself(layer):
    layer.weight += 1


def an_entry(layer):
    layer.weight[0] = 0


def its_value(layer):
    layer.weight.data = torch.zeros(layer.weight.shape)


def a_parameter(layer):
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))


def a_tensor(layer):
    layer.weight = torch.zeros(layer.weight.shape)


def freezing(layer):
    layer.weight.requires_grad = False


WRITES = [
    itself,
    an_entry,
    its_value,
    a_parameter,
    a_tensor,
    freezing,
    lambda layer: layer.weight.copy_(torch.ones(layer.weight.shape)),
    lambda layer: layer.weight.zero_(),
    lambda layer: layer.weight.requires_grad_(False),
    lambda layer: layer.weight.data.copy_(torch.ones(layer.weight.shape)),
    lambda layer: layer.weight.data.normal_(std=0.02),
    lambda layer: layer.weight.data.T.mul_(2),
    lambda layer: layer.weight.detach().fill_(1),
    lambda layer: layer.weight[:2].zero_(),
    lambda layer: layer.weight.T.zero_(),
    lambda layer: layer.weight.view(-1).clamp_(0, 1),
    lambda layer: layer.weight.chunk(2)[1].zero_(),
    lambda layer: layer.weight.float().zero_(),
    lambda layer: layer.weight.register_hook(print),
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: nn.init.xavier_uniform_(layer.weight),
    lambda layer: nn.init.zeros_(layer.weight),
    lambda layer: nn.init.orthogonal_(layer.weight),
    lambda layer: torch.add(torch.ones(layer.weight.shape), 1, out=layer.weight),
    lambda layer: torch._foreach_zero_([layer.weight]),
    lambda layer: nn.Parameter(layer.weight.data),
]


@pytest.mark.parametrize("make", LAYERS)
def test_a_number_that_the_weight_is_multiplied_by_goes_to_the_factors(make):
    layer = make()
    before = layer.weight.clone()
    with torch.no_grad():  # as RWKV does between training and inference
        layer.weight.div_(2)
        torch.testing.assert_close(layer.weight + 0, before / 2)
        layer.weight.mul_(4.0)
    torch.testing.assert_close(layer.weight + 0, before * 2)
    with pytest.raises(WeightError, match="mul_ would be lost"):
        layer.weight.mul_(torch.ones(()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", LAYERS)
def test_writing_into_the_weight_raises(make, grad):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    for write in WRITES:
        with torch.set_grad_enabled(grad), pytest.raises(WeightError, match=r"layer\.up\.weight"):
            write(layer)
    assert all(map(torch.equal, layer.state_dict().values(), before.values()))


@pytest.mark.parametrize("make", LAYERS)
def test_reading_the_weight_goes_on(make):
    layer = make()
    dense = nn.Linear(16, len(layer.weight))
    for copied in (layer.weight, layer.weight.data, layer.weight.detach(), layer.weight[:]):
        dense.weight.data.zero_()
        dense.weight.data.copy_(copied)
        torch.testing.assert_close(dense.weight, layer.weight + 0)
    dense.weight = nn.Parameter(layer.weight.detach().clone())
    assert type(dense.weight) is nn.Parameter
    with torch.no_grad():  # what is computed from it is the caller's own
        out = torch.einsum("bi,oi->ob", torch.randn(3, 16), layer.weight)
        out += 1
        out.T.zero_()
    initialization.normal_(layer.weight)  # as a model's `_init_weights` does: passed over
    initialization.zeros_(layer.weight[:3])
    assert float(layer.weight.norm()) > 0


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize(("kind", "name"), [(nn.Linear, "input"), (Conv1D, "x"), (FalconLinear, "input")])
def test_called_by_keyword_as_the_dense_layer(kind, name, form):
    layer, x = low_rank(form, kind), torch.randn(2, 16)
    torch.testing.assert_close(layer(**{name: x}), layer(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(hidden=x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, value):
            return self.layer(**{name: value})

    compiled = torch.compile(Net(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_embeddings_and_heads_called_by_keyword():
    ids, head = torch.tensor([[1, 2]]), LowRankHead(*(nn.Parameter(torch.randn(n, 4)) for n in (20, 16)), None)
    small = table()
    assert torch.equal(small(input=ids), small(ids))
    assert torch.equal(head(input=small(ids)), head(small(ids)))


@pytest.mark.parametrize("kind", [FalconLinear, EsmFoldLinear])
def test_subclasses_that_compute_what_a_linear_does(kind):
    dense, x = nn.Sequential(kind(32, 48), nn.ReLU(), kind(48, 16, bias=False)), torch.randn(3, 32)
    small = convert(dense, LowRankConfig(rank=1.0, allow_larger=True))
    assert [type(layer) for layer in small] == [LowRankLinear, nn.ReLU, LowRankLinear]
    torch.testing.assert_close(small(x), dense(x), **CLOSE)
    back = merge(small)
    assert [type(layer) for layer in back] == [kind, nn.ReLU, kind]
    torch.testing.assert_close(back(x), dense(x), **CLOSE)


@pytest.mark.slow
def test_falcon(tmp_path):
    config = tf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    dense, batch = tf.FalconForCausalLM(config).eval(), {"input_ids": zoo._ids()}
    small = convert(dense, keep=0.6, calibration=[batch])
    assert sum(isinstance(module, LowRankLinear) for module in small.modules()) == 8
    small.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, small(**batch).logits, **CLOSE)
    torch.testing.assert_close(merge(loaded)(**batch).logits, small(**batch).logits, **CLOSE)


def test_nothing_to_factor_says_why():
    class Own(nn.Linear):
        pass

    net = nn.Sequential(Own(8, 8), Own(8, 8), nn.Embedding(5, 8))
    calls = (lambda: convert(net, rank=2), lambda: make_plan(net, keep=0.5), lambda: convert(net, keep=0.5))
    calls += (lambda: calibrate(net, [{"input": torch.ones(1, 8)}], metric="activation"),)
    for call in calls:
        with pytest.raises(TargetError, match=r"Own is a subclass of a dense type.* \(2 weights\); Embedding is no"):
            call()


def gpt2():
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    return model, convert(model, LowRankConfig(keep=0.5, min_rank=4, embeddings=True))


def bert():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    return model, convert(model, LowRankConfig(keep=0.5, min_rank=4, embeddings=True))


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, "buffers"])
def test_low_rank_models_offloaded(tmp_path, make, offload):
    _, small = make()
    assert any(isinstance(module, LowRankEmbedding) for module in small.modules())
    batch = zoo._text()
    expected = small(**batch).logits
    if offload is disk_offload:
        disk_offload(small, tmp_path, torch.device("cpu"))
    else:
        cpu_offload(small, torch.device("cpu"), offload_buffers=offload == "buffers")
    assert all(parameter.is_meta for parameter in small.parameters())
    torch.testing.assert_close(small(**batch).logits, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, bert])
def test_low_rank_embeddings_on_disk_run_and_merge(tmp_path, make):
    dense, small = make()
    small.save_pretrained(tmp_path / "low")
    batch = zoo._text()
    kind = type(small)
    place = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    on_disk = kind.from_pretrained(tmp_path / "low", **place)
    torch.testing.assert_close(on_disk(**batch).logits, small(**batch).logits, **CLOSE)
    merged = merge(on_disk)
    assert type(merged) is type(dense)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(**batch).logits, small(**batch).logits, **CLOSE)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_parameters_that_are_there_only_while_their_module_runs(make):
    """As DeepSpeed ZeRO-3 has it: brought in before the forward pass of the module that holds them, taken out after."""
    _, small = make()
    batch = zoo._text()
    expected = small(**batch).logits.detach()
    numbers = {parameter: parameter.data for parameter in small.parameters()}
    for module in small.modules():
        own = list(module.parameters(recurse=False))

        def bring(*_, own=own):
            for parameter in own:
                parameter.data = numbers[parameter]

        def take(*_, own=own):
            for parameter in own:
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
        take()
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, expected, **CLOSE)


def partitioned(linear):
    """A parameter as ZeRO-3 leaves it in each process."""
    whole = linear.weight.shape
    linear.weight.data = torch.empty(0)
    linear.weight.ds_shape = whole


def flattened(linear):
    """As FSDP with use_orig_params=True leaves it: a part of the flat parameter."""
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[:7])


def stacked(linear):
    """Several matrices in the place of one."""
    linear.weight = nn.Parameter(linear.weight.detach().expand(2, -1, -1).clone())


def sharded(linear):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh, [Shard(0)]))


@pytest.fixture
def _no_processes():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_no_processes")
@pytest.mark.parametrize(
    ("part", "why"),
    [(partitioned, "ZeRO-3"), (flattened, "FSDP"), (stacked, "a matrix is needed"), (sharded, "DTensor")],
)
def test_weights_in_parts_are_refused_by_name(part, why):
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    small = convert(net, rank=4)
    part(net[2])
    part(small[2].up)
    asked = LowRankConfig(keep=0.9, min_rank=1)
    for call in (lambda m: convert(m, rank=2), lambda m: make_plan(m, asked), hf_reparam.report):
        with pytest.raises(WeightError, match=f"2: .*{why}"):
            call(net)
    for call in (hf_reparam.report, merge):
        with pytest.raises(WeightError, match=f"2: .*{why}"):
            call(small)


def test_zero_3_weights_that_are_gathered_are_whole():
    net = nn.Sequential(nn.Linear(16, 16))
    net[0].weight.ds_shape = net[0].weight.shape
    assert isinstance(convert(net, rank=4)[0], LowRankLinear)


def test_flattened_by_fsdp_with_parameters_of_its_own():
    net = nn.Sequential(nn.Linear(16, 16))
    weight = net[0].weight.detach()
    del net[0].weight
    net[0].weight = weight  # a view of the flat parameter, as FSDP sets it
    with pytest.raises(TargetError, match="its weight is not a parameter of its own: FSDP"):
        convert(net, rank=4)


def test_lazy_and_empty_layers_are_left_alone():
    report = hf_reparam.report(nn.Sequential(nn.LazyLinear(4), nn.Linear(8, 0), nn.Linear(8, 8)))
    assert [row.name for row in report.layers] == ["2"]
    assert {item.name: item.reason for item in report.skipped}["1"] == "its weight holds no numbers"


@pytest.mark.slow
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"rank": 8}, {"keep": 0.6}])
def test_a_bias_that_is_not_finite_is_refused(number, options):
    model = zoo.BY_BASE["BertModel"].build()
    model.encoder.layer[1].output.dense.bias.data[3] = number
    for inplace in (False, True):
        with pytest.raises(WeightError, match=r"encoder\.layer\.1\.output\.dense: its bias"):
            convert(model, **options, inplace=inplace)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


class Bare(nn.Module):
    """Experts that nobody has registered."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(32, 32), nn.Parameter(torch.randn(8, 32, 32))


def test_a_model_of_bare_parameters_says_so():
    assert "bare parameters:" in str(hf_reparam.report(Bare()))
    assert "bare parameters:" in hf_reparam.report(convert(Bare(), rank=8)).to_markdown()
    assert "bare parameters:" not in str(hf_reparam.report(zoo.BY_BASE["BertModel"].build()))
