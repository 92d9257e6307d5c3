"""Calibration are sums: any split of the data gives the same, and they survive a file."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.linalg import calibration as calibration_module
from hf_reparam.linalg.calibration import Calibration
from hf_reparam.linalg.moments import LayerSums
from hf_reparam.linalg.sums import Gram


def layer(x, g=None):
    sums = LayerSums(x.shape[1], 3, gradients=g is not None)
    sums.add_inputs(x)
    if g is not None:
        sums.add_gradients(g)
    return sums.take()


def test_sums():
    x, g = torch.randn(50, 4), torch.randn(50, 3)
    m = layer(x, g)
    assert m.tokens == 50
    torch.testing.assert_close(m.mean(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m.input_products, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.gradient_products, g.double().T @ g.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [191, 192, 193, 386])
def test_products_of_wide_inputs_are_whole_and_symmetric(width):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = LayerSums(width, width, gradients=True)
    for part in x.split(4):
        sums.add_inputs(part)
        sums.add_gradients(-part)
    moments = sums.take()
    torch.testing.assert_close(moments.input_products, x.T @ x)
    torch.testing.assert_close(moments.gradient_products, x.T @ x)


def test_sums_that_are_taken_begin_anew():
    x = torch.randn(8, 4)
    sums = LayerSums(4, 4, gradients=True)
    for part in x.split(4):
        sums.add_inputs(part)
        sums.add_gradients(part)
        moments = sums.take()
        assert moments.tokens == 4
        torch.testing.assert_close(moments.input_sum, part.double().sum(0))
        for products in (moments.input_products, moments.gradient_products):
            torch.testing.assert_close(products, part.double().T @ part.double(), rtol=1e-5, atol=1e-5)
    empty = sums.take()
    assert empty.tokens == 0
    assert not empty.input_sum.any()
    assert not empty.input_products.any()


def test_autocast_lowers_no_product():
    x, plain, cast = torch.randn(50, 4), Gram(4), Gram(4)
    plain.add(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x)
    assert torch.equal(plain.take(), cast.take())


def test_products_of_float32_are_summed_in_float64():
    gram = Gram(1)
    gram.add(torch.full((1, 1), 2.0**13))
    for _ in range(100):
        gram.add(torch.ones(1, 1))  # 2^26 + 1 is 2^26 in float32
    assert gram.take().item() == 2**26 + 100


def test_halves_merged_are_the_whole():
    x, g = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    whole = Calibration("fisher", {"a": layer(x, g)})
    halves = Calibration("fisher", {"a": layer(x[:15], g[:15])}) + Calibration("fisher", {"a": layer(x[15:], g[15:])})
    assert halves.layers["a"].tokens == 40
    torch.testing.assert_close(halves.layers["a"].input_products, whole.layers["a"].input_products)
    torch.testing.assert_close(halves.layers["a"].gradient_products, whole.layers["a"].gradient_products)


def test_metrics():
    x, g = torch.randn(400, 4).double() + 3, torch.randn(400, 3).double()
    m = layer(x, g)
    assert m.metric("svd", centred=True).input_root is None
    centred = m.metric("activation", centred=True)
    assert centred.output_root is None
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / 400
    torch.testing.assert_close(centred.input_root @ centred.input_root.T, covariance, rtol=0.02, atol=0.01)
    raw = m.metric("activation", centred=False).input_root
    torch.testing.assert_close(raw @ raw.T, x.T @ x / 400, rtol=0.02, atol=0.02)
    assert m.metric("fisher", centred=True).output_root.shape == (3, 3)


def test_what_cannot_be_done():
    x, g = torch.randn(5, 4), torch.randn(5, 3)
    with pytest.raises(WeightError, match="needs gradients"):
        layer(x).metric("fisher", centred=True)
    with pytest.raises(WeightError, match="without gradients"):
        LayerSums(4, 3, gradients=False).add_gradients(g)
    with pytest.raises(WeightError, match="cannot be merged"):
        layer(x) + layer(x, g)
    with pytest.raises(WeightError, match="cannot be merged"):
        Calibration("fisher", {"a": layer(x, g)}) + Calibration("fisher", {"b": layer(x, g)})
    with pytest.raises(WeightError, match="inputs of this layer are not finite"):
        layer(x * torch.nan).metric("activation", centred=True)
    with pytest.raises(WeightError, match="gradients of this layer are not finite"):
        layer(x, g * torch.inf).metric("fisher", centred=True)


@pytest.mark.parametrize("gradients", [True, False])
def test_file(tmp_path, gradients):
    moments = Calibration("fisher", {"a.b": layer(torch.randn(5, 4), torch.randn(5, 3) if gradients else None)})
    moments.save(tmp_path / "m.safetensors")
    loaded = Calibration.load(tmp_path / "m.safetensors")
    assert loaded.metric == "fisher"
    assert loaded.layers.keys() == moments.layers.keys()
    for key in ("tokens", "input_sum", "input_products", "gradient_products"):
        a, b = getattr(loaded.layers["a.b"], key), getattr(moments.layers["a.b"], key)
        assert a == b if key == "tokens" or b is None else torch.equal(a, b)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Calibration.load(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no moments"):
        Calibration.load(tmp_path / "other.safetensors")
    Calibration("activation", {"a": layer(torch.ones(5, 4))}).save(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    probes = ("no", "[[1, [2], 3]]", "[" * 200_000, f"[[1, {10**400}]]")
    for wrong in (*({"probes": known} for known in probes), {"parts": "x"}, {"parts": "-1"}, {"parts": "+1"}, {}):
        crafted = tensors if wrong else {**tensors, "batch:x.y": torch.ones(1)}
        save_file(crafted, tmp_path / "wrong.safetensors", {**header, **wrong})
        with pytest.raises(CheckpointError, match="holds no moments of this version"):
            Calibration.load(tmp_path / "wrong.safetensors")


def test_layers_are_read_when_they_are_asked_for(tmp_path):
    for number, name in enumerate(("a", "b")):
        Calibration("activation", {name: layer(torch.full((5, 4), 1.0 + number))}).save(
            tmp_path / f"{number}.safetensors"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    moments = Calibration.load(tmp_path)
    assert list(moments.layers) == ["a", "b"]
    assert len(moments.layers) == 2
    assert moments.layers["b"].input_sum.tolist() == [10.0] * 4
    assert moments.layers.get("c") is None
    (tmp_path / "1.safetensors").unlink()
    assert moments.layers["a"].tokens == 5
    with pytest.raises(CheckpointError, match="cannot be read"):
        moments.layers["b"]


def test_folders_that_hold_no_moments(tmp_path):
    with pytest.raises(CheckpointError, match="no .safetensors file in it"):
        Calibration.load(tmp_path)
    Calibration("activation", {"a": layer(torch.ones(5, 4))}).save(tmp_path / "a.safetensors")
    Calibration("fisher", {"b": layer(torch.ones(5, 4), torch.ones(5, 3))}).save(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="several metrics"):
        Calibration.load(tmp_path)


def test_an_older_file_stays_when_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    one = Calibration("activation", {"a": layer(torch.ones(5, 4))})
    one.save(tmp_path / "m.safetensors")
    monkeypatch.setattr(
        calibration_module, "save_file", lambda tensors, path, metadata: (open(path, "w").close(), 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        (one + one).save(tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert Calibration.load(tmp_path / "m.safetensors").layers["a"].tokens == 5


def test_saved_over_itself(tmp_path):
    Calibration("activation", {"a": layer(torch.ones(5, 4))}).save(tmp_path / "m.safetensors")
    stored = Calibration.load(tmp_path / "m.safetensors")
    (stored + stored).save(tmp_path / "m.safetensors")
    assert stored.layers["a"].tokens == 10
    assert stored.layers["a"].input_products[0].tolist() == [10.0] * 4


def test_held_out_batches_may_hold_one_tensor_twice(tmp_path):
    ids, mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    Calibration("activation", {"a": layer(torch.ones(5, 4))}, batches=((batch, (mask,)),)).save(tmp_path / "m")
    stored, masks = Calibration.load(tmp_path / "m").batches[0]
    assert torch.equal(stored["labels"], ids)
    assert torch.equal(masks[0], mask)
