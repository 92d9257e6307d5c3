"""What goes wrong on the way: either finished, or a clear error, and the user's model and folders are as before."""

import copy
import resource
import signal

import pytest
import torch
import transformers
from torch import nn

import hf_reparam
from benchmarks.faults import ACTIONS, Killer
from hf_reparam import LowRankConfig, calibrate, convert
from hf_reparam.errors import CheckpointError, TargetError, WeightError
from hf_reparam.structures import linear
from tests import zoo
from tests.launch import Started

CASE = zoo.BY_BASE["BertForMaskedLM"]
VIT = zoo.BY_BASE["ViTForImageClassification"]


class Untouched:
    """The model ends as it began: tensors, modes, gradients, hooks and class."""

    def __init__(self, model):
        self.model, self.before = model, copy.deepcopy(model.state_dict())
        self.kind, self.modules = type(model), list(model.modules())
        self.state = [(m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in self.modules]
        self.grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        model = self.model
        assert type(model) is self.kind
        assert list(map(id, model.modules())) == list(map(id, self.modules))
        assert model.state_dict().keys() == self.before.keys()
        assert all(torch.equal(v, self.before[k]) for k, v in model.state_dict().items())
        assert self.state == [(m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        assert self.grads == [(p.requires_grad, p.grad is None) for p in model.parameters()]


def raising():
    yield CASE.batch()
    raise ConnectionError("the data set is gone")


def nan_images():
    return [{"pixel_values": torch.full((2, 3, 16, 16), torch.nan)}]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("case", "data", "error", "message"),
    [
        (CASE, raising, ConnectionError, "the data set is gone"),
        (CASE, lambda: iter([]), TargetError, "the calibration data is empty"),
        (CASE, lambda: [{"no_such_input": torch.ones(1)}], TargetError, r"columns \['no_such_input'\]"),
        (CASE, lambda: [{"input_ids": torch.full((1, 4), 10**6)}], IndexError, "out of range"),
        (VIT, nan_images, WeightError, r"vit\.\S+: the calibration inputs of this layer are not finite"),
        (CASE, lambda: [{"input_ids": torch.zeros(0, 7, dtype=torch.long)}], TargetError, "is empty"),
    ],
    ids=["raises", "nothing", "wrong-key", "wrong-id", "nan", "empty-batch"],
)
def test_calibration_data_that_is_no_good(case, data, error, message, inplace):
    with Untouched(case.build()) as model, pytest.raises(error, match=message):
        convert(model, keep=0.5, calibration=data(), inplace=inplace)


def test_one_empty_batch_among_others_changes_nothing():
    model, batch = CASE.build(), CASE.batch()
    empty = {key: value[:0] for key, value in batch.items()}
    alone, among = (calibrate(model, data, metric="activation") for data in ([batch], [empty, batch, empty]))
    for name, layer in alone.layers.items():
        assert among.layers[name].tokens == layer.tokens
        assert torch.equal(among.layers[name].input_products, layer.input_products)


def test_gradients_that_are_nan():
    def loss(model, batch):
        return model(**batch).logits.sum() * torch.nan

    with Untouched(CASE.build()) as model:
        moments = calibrate(model, [CASE.batch()], loss_fn=loss)
        with pytest.raises(WeightError, match=r"\S+: the calibration gradients of this layer are not finite"):
            convert(model, keep=0.5, calibration=moments)
        small = convert(model, LowRankConfig(keep=0.5, metric="activation"), calibration=moments)  # inputs are good
        assert all(bool(torch.isfinite(t).all()) for t in zoo.outputs(small, CASE.batch()))


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(40, 12), torch.ones(40, 12), torch.eye(12)[:1].repeat(40, 1), 1e-30 * torch.randn(40, 12)],
    ids=["zero", "constant", "one-direction", "tiny"],
)
def test_a_singular_covariance(x, form):
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12, bias=False))
    moments = calibrate(net, [{"input": x}], loss_fn=lambda m, b: m(**b).square().sum())
    for metric in ("activation", "fisher"):
        small = convert(net, LowRankConfig(rank=3, form=form, metric=metric), calibration=moments)
        assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
        assert bool(torch.isfinite(small(torch.randn(5, 12))).all())


def test_gradients_that_are_zero():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    moments = calibrate(net, [{"input": torch.randn(40, 12)}], loss_fn=lambda m, b: 0 * m(**b).sum())
    small = convert(net, LowRankConfig(keep=0.5, min_rank=1), calibration=moments)
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())


def test_a_layer_that_is_never_reached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.used(x)

    net = Net()
    with pytest.warns(UserWarning, match=r"1 layers saw no data and will get plain SVD: \['unused'\]"):
        moments = calibrate(net, [{"x": torch.randn(9, 12)}], loss_fn=lambda m, b: m(**b).square().sum())
    assert moments.layers["unused"].tokens == 0
    calibrated, plain = convert(net, rank=3, calibration=moments), convert(net, rank=3)
    torch.testing.assert_close(calibrated.unused.weight.add(0), plain.unused.weight.add(0))


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 9)])
def test_the_narrowest_layers(shape, form):
    net = nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 24), nn.Linear(24, 24))
    x = torch.randn(5, shape[0])
    small = convert(net, LowRankConfig(rank=1, form=form))
    assert small(x).shape == (5, 24)
    full = convert(net, LowRankConfig(rank=1.0, form="pair", allow_larger=True))
    torch.testing.assert_close(full(x), net(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", zoo.FORMS)
def test_a_zero_weight(form):
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    nn.init.zeros_(net[0].weight)
    small = convert(net, LowRankConfig(rank=3, form=form))
    report = hf_reparam.report(small)
    assert report.layers[0].error == 0
    torch.testing.assert_close(small(torch.randn(5, 12)), small[1](net[0].bias.expand(5, 12)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyboardInterrupt()])
def test_memory_runs_out_in_one_layer(monkeypatch, error, inplace):
    made, factor = [], linear.factor

    def failing(*args, **kwargs):
        made.append(args)
        if len(made) == 7:
            raise error
        return factor(*args, **kwargs)

    monkeypatch.setattr(linear, "factor", failing)
    with Untouched(CASE.build()) as model, pytest.raises(type(error)):
        convert(model, rank=6, inplace=inplace)
    assert len(made) == 7


@pytest.fixture
def dense(tmp_path):
    CASE.build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["memory", "stream"])
def test_a_folder_that_cannot_be_written(dense, stream, capsys):
    from hf_reparam_cli import main

    assert main(["convert", str(dense), "/proc/no_such_place/out", "--rank", "6", *stream]) == 2
    assert "cannot be written" in capsys.readouterr().err


FULL = """
import resource, signal, sys
from hf_reparam_cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name, more in (("memory", []), ("stream", ["--stream"])):
    print(name, main(["convert", sys.argv[1], f"{sys.argv[2]}-{name}", "--rank", "6", "--quiet", *more]))
"""


@pytest.mark.slow
def test_a_disk_that_is_full(dense, tmp_path):
    """Files may not grow above 20 kB; the model has 120."""
    done = Started("-c", FULL, dense, tmp_path / "out").end()
    said = done.printed("err")
    assert done.printed().splitlines() == ["memory 2", "stream 2"], said
    assert said.count("cannot be written") == 2
    assert "Traceback" not in said
    assert list(tmp_path.glob("out*")) == []
    assert transformers.AutoModelForMaskedLM.from_pretrained(dense)


def test_moments_on_a_full_disk(tmp_path):
    moments = calibrate(CASE.build(), [CASE.batch()])
    place = tmp_path / "moments.safetensors"
    moments.save(place)
    good = place.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(CheckpointError, match="cannot be written"):
            moments.save(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert place.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["moments.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ACTIONS))
def test_killed_at_random_moments(tmp_path, name):
    ends = Killer(tmp_path, name).run(kills=3)
    assert ends["broken"] == 0
    assert sum(ends.values()) == 3
    assert ends["absent"] > 0  # kills after the end are none
