"""Precisions, scales, ranks that are not there, equal singular values, and the same bytes every time."""

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, merge
from tests import zoo
from tests.launch import launch

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def layer(weight, bias=True):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).to(weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return nn.Sequential(linear)


def product(net):
    """up @ down as the layer means it, in float64."""
    up, down = net[0].factors()
    return up.detach().double() @ down.detach().double()


def relative(got, weight):
    """Frobenius error relative to the weight, without squares that overflow or vanish."""
    scale = weight.abs().max()
    return float(((got - weight) / scale).norm() / (weight / scale).norm())


def optimum(weight, rank):
    values = torch.linalg.svdvals(weight.double() / weight.abs().max().double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(d, s) for d in FLOATS[1:] for s in (1e-12, 1.0, 1e12)]
    + [(torch.float64, s) for s in (1e-150, 1e150)]
    + [(torch.float16, s) for s in (1e-3, 1.0, 1e4)],
    ids=str,
)
def test_scales_in_every_precision(dtype, scale, form):
    weight = (torch.randn(40, 60, dtype=torch.float64) * scale).to(dtype)
    small = convert(layer(weight), LowRankConfig(rank=8, form=form))
    eps = torch.finfo(dtype).eps
    got = relative(product(small), weight.double())
    assert got <= optimum(weight, 8) + 8 * eps  # two factors, each rounded once
    assert got >= optimum(weight, 8) * (1 - 1e-6) - 8 * eps
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert relative(merge(small)[0].weight.detach().double(), product(small)) <= eps


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_of_scaled_weights(dtype, scale, form):
    """Layer norms undo the scale of what goes into a layer, not of its weights: outputs stay finite and in type."""
    model = zoo.BY_BASE["LlamaForCausalLM"].build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
    small = convert(model.to(dtype), LowRankConfig(rank=8, form=form))
    report = hf_reparam.report(small)
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
    assert all(0 < row.error < 1 for row in report.layers)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("form", zoo.FORMS)
def test_scales_of_inputs_and_losses(scale, form):
    """The factors do not depend on the unit of the loss; with inputs in another unit they stay finite."""
    net = layer(torch.randn(24, 32))
    x = torch.randn(64, 32) * torch.logspace(0, -2, 32)

    def factored(unit, of_loss):
        data = [{"input": x * unit}]
        moments = calibrate(net, data, loss_fn=lambda m, b: m(**b).square().sum() * of_loss)
        return product(convert(net, LowRankConfig(rank=6, form=form), calibration=moments))

    plain = factored(1.0, 1.0)
    torch.testing.assert_close(factored(1.0, scale), plain, atol=2e-5, rtol=0)
    if 1e-6 <= scale <= 1e6:  # the squares of the outputs are float32
        assert bool(torch.isfinite(factored(scale, 1.0)).all())


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("true_rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_ranks_that_are_not_there(dtype, true_rank, form):
    left, right = torch.randn(40, true_rank, dtype=torch.float64), torch.randn(true_rank, 60, dtype=torch.float64)
    weight = (left @ right).to(dtype)  # rounding adds a little rank
    small = convert(layer(weight), LowRankConfig(rank=8, form=form))
    report = hf_reparam.report(small)
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
    eps = torch.finfo(dtype).eps
    if true_rank:
        assert relative(product(small), weight.double()) <= 8 * eps
    else:
        assert not product(small).any()
    assert report.layers[0].error <= max(8 * eps, 1e-7)  # a root of a difference of squares: float64 ends at 1e-8


SPECTRA = {
    "identity": lambda: torch.eye(48),
    "orthogonal": lambda: torch.linalg.qr(torch.randn(48, 48))[0],
    "one big": lambda: torch.ones(48, 48) + 1e-3 * torch.eye(48),
    "two steps": lambda: torch.diag(torch.cat([torch.full((24,), 3.0), torch.ones(24)])),
    "wide step": lambda: torch.linalg.qr(torch.randn(64, 48))[0].T,
}


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("kind", list(SPECTRA))
def test_equal_singular_values(kind, form):
    weight = SPECTRA[kind]()
    for rank in (1, 7, 12):
        small, again = (convert(layer(weight, bias=False), LowRankConfig(rank=rank, form=form)) for _ in range(2))
        assert relative(product(small), weight.double()) == pytest.approx(optimum(weight, rank), rel=1e-5, abs=1e-6)
        assert all(map(torch.equal, small[0].state_dict().values(), again[0].state_dict().values()))


BYTES = """
import sys, torch
from tests.test_numbers import made
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.save(made(), f"{sys.argv[1]}-{threads}")
"""


def made():
    models = [convert(zoo.BY_BASE["BertForMaskedLM"].build(), LowRankConfig(rank=9, form=form)) for form in zoo.FORMS]
    return {
        f"{form}.{key}": value
        for form, m in zip(zoo.FORMS, models, strict=True)
        for key, value in m.state_dict().items()
    }


@pytest.mark.slow
def test_the_same_bytes_in_every_process_and_nearly_so_on_any_number_of_threads(tmp_path):
    place, mine = tmp_path / "made", made()
    launch("-c", BYTES, place, processes=1)
    alike, near = (torch.load(f"{place}-{threads}") for threads in (1, 2))
    assert mine.keys() == alike.keys() == near.keys()
    for key, value in mine.items():
        assert value.numpy().tobytes() == alike[key].numpy().tobytes()
        torch.testing.assert_close(near[key], value, atol=1e-5, rtol=0)


def test_signs_are_fixed():
    """Of a vector and its negative, the one whose largest entry is positive: however LAPACK chose."""
    for _ in range(5):
        weight = torch.randn(30, 50)
        down, up = (convert(layer(w), rank=6)[0] for w in (weight, -weight))
        assert torch.equal(down.up.weight.abs(), up.up.weight.abs())
        columns = down.up.weight.detach()
        assert bool((columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all())
