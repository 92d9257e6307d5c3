"""A short part of `make census`, that it sees what is broken, and that the page says what the results say."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_reparam
from census import trip
from census.page import page, summary
from census.trip import FAILED, LEFT_OUT, OUTPUTS, TENSORS, travel
from census.workers import read, run_all

ROOT = Path(__file__).parent.parent
CLASSES = [
    "BertForMaskedLM",  # tied weights
    "GPT2LMHeadModel",  # Conv1D
    "T5ForConditionalGeneration",  # encoder and decoder
    "GptOssForCausalLM",  # experts
    "CLIPModel",  # a composite
    "ConvNextForImageClassification",  # vision
    "Wav2Vec2ForCTC",  # audio
    "PatchTSTForPrediction",  # time series
]


def row_of(name="BertForMaskedLM"):
    return travel(getattr(transformers, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_classes_go_there_and_back(name):
    row = row_of(name)
    assert (row["ends"], row["why"]) == (OUTPUTS, "")
    assert row["layers"] >= 8


def spoilt_load(monkeypatch, spoil):
    """Every load gives a model that `spoil` changed."""
    load = trip._load

    def broken(kind, folder):
        loaded = load(kind, folder)
        spoil(loaded)
        return loaded

    monkeypatch.setattr(trip, "_load", broken)


@pytest.mark.slow
def test_a_weight_that_loads_otherwise_is_seen(monkeypatch):
    def spoil(loaded):
        if hasattr(loaded.model, "base_class"):  # the low-rank model
            with torch.no_grad():
                next(loaded.model.parameters()).view(-1)[-1] += 1e-7  # of a token that no input has

    spoilt_load(monkeypatch, spoil)
    row = row_of()
    assert row["ends"] == FAILED
    assert any(why.startswith("load: tensors differ: ") for why in row["why"])


@pytest.mark.slow
def test_outputs_of_equal_tensors_are_compared(monkeypatch):
    def spoil(loaded):
        if hasattr(loaded.model, "base_class"):
            loaded.model.bert.encoder.layer[0].forward = lambda hidden, *args, **kwargs: 2 * hidden

    spoilt_load(monkeypatch, spoil)
    row = row_of()
    assert row["ends"] == FAILED
    assert "load: outputs differ" in row["why"]


@pytest.mark.slow
def test_a_factor_missing_from_the_file_is_seen(monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained

    def broken(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        place = os.path.join(folder, "model.safetensors")
        left = {
            name: t for name, t in load_file(place).items() if not name.endswith("0.attention.self.query.up.weight")
        }
        save_file(left, place, {"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", broken)
    row = row_of()
    assert row["ends"] == FAILED
    assert "query" in row["why"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (lambda model: model.cls.predictions.transform.dense.weight.mul_(1.5), "outputs are not those"),
        (lambda model: setattr(model, "__class__", type("Bert", (type(model),), {})), "a Bert came back"),
        (lambda model: model.bert.add_module("extra", torch.nn.Linear(4, 4)), "names in the file added: bert.extra"),
        (lambda model: model.bert.__delattr__("embeddings"), "merge: "),
    ],
    ids=["numbers", "class", "names", "nothing works"],
)
@torch.no_grad()
def test_a_wrong_merge_is_seen(monkeypatch, spoil, seen):
    merge = hf_reparam.merge

    def broken(model):
        merged = merge(model)
        spoil(merged)
        return merged

    monkeypatch.setattr(hf_reparam, "merge", broken)
    row = row_of()
    assert row["ends"] == FAILED
    assert any(seen in why for why in row["why"]), row["why"]


@pytest.mark.slow
def test_other_names_than_stock_saving_gives_are_seen(monkeypatch):
    merge = hf_reparam.merge

    def broken(model):
        merged = merge(model)
        merged._weight_conversions = []  # as loading a class without conversions leaves it
        return merged

    monkeypatch.setattr(hf_reparam, "merge", broken)
    row = row_of("MixtralForCausalLM")
    assert row["ends"] == FAILED
    assert any(
        "names in the file lost: model.layers.0.block_sparse_moe.experts.0.w1.weight" in why for why in row["why"]
    )


@pytest.mark.slow
def test_a_conversion_that_raises_fails_unless_there_is_nothing_to_convert(monkeypatch):
    def raising(error):
        def convert(*asked, **options):
            raise error

        monkeypatch.setattr(hf_reparam, "convert", convert)
        return row_of()

    assert raising(RuntimeError("broken"))["why"] == ["convert: RuntimeError: broken"]
    assert raising(hf_reparam.errors.TargetError("no layer"))["ends"] == LEFT_OUT


@pytest.mark.slow
def test_a_class_whose_stock_form_is_lost_in_saving_is_left_out(monkeypatch):
    def spoil(loaded):
        with torch.no_grad():
            next(loaded.model.parameters()).add_(1)

    spoilt_load(monkeypatch, spoil)
    row = row_of()
    assert row["ends"] == LEFT_OUT
    assert "tensors differ" in row["why"]


@pytest.mark.slow
def test_outputs_that_do_not_depend_on_the_layers_count_as_none(monkeypatch):
    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", lambda self, input_ids: input_ids * 1.0)
    row = row_of()
    assert (row["ends"], "do not depend" in row["why"]) == (TENSORS, True)


class Dies:
    config_class = None


class Hangs:
    config_class = None


class Works:
    config_class = None


class Raises:
    config_class = None


class Ends:
    config_class = None


def one(kind):
    if kind is Dies:
        os._exit(1)
    if kind is Hangs:
        time.sleep(60)
    while kind is Works:
        pass
    if kind is Raises:
        raise KeyError("census")
    return {"class": kind.__name__, "type": "", "ends": OUTPUTS, "why": ""}


@pytest.mark.slow
def test_classes_that_die_hang_or_raise_are_rows():
    found = [*run_all([Hangs], one, patience=1), *run_all([Dies, Works, Raises, Ends], one, limit=1)]
    rows = {row["class"]: row for row in found}
    assert {name: row["ends"] for name, row in rows.items()} == {
        "Dies": FAILED,
        "Hangs": FAILED,
        "Works": FAILED,
        "Raises": FAILED,
        "Ends": OUTPUTS,
    }
    assert [rows[name]["why"][0] for name in ("Dies", "Hangs", "Works", "Raises")] == [
        "its process died",
        "no end after 1 seconds",
        "more than 1 seconds of processor time",
        "KeyError: 'census'",
    ]


def test_a_broken_run_goes_on(tmp_path):
    place = tmp_path / "rows.jsonl"
    assert read(place) == []
    place.write_text('{"class": "A"}\n{"class": "B"}\n{"cla')
    assert [row["class"] for row in read(place)] == ["A", "B"]


def results():
    return json.loads((ROOT / "benchmarks" / "results" / "census.json").read_text())


def test_the_page_is_the_results():
    data = results()
    assert data["summary"] == summary(data["rows"])
    assert (ROOT / "docs" / "census.md").read_text() == page(data)


def test_every_row_has_an_end_and_a_reason_unless_all_was_equal():
    rows = results()["rows"]
    assert len({row["class"] for row in rows}) == len(rows)
    assert len(rows) * results()["every"] > 1500
    assert {row["ends"] for row in rows} <= {OUTPUTS, TENSORS, LEFT_OUT, FAILED}
    assert [row for row in rows if (row["ends"] == OUTPUTS) == bool(row["why"])] == []
    if results()["machine"]["versions"]["transformers"] == transformers.__version__:
        published = set(transformers._class_to_module)
        assert [row["class"] for row in rows if row["class"] not in published] == []


def test_nothing_failed():
    assert [(row["class"], row["why"]) for row in results()["rows"] if row["ends"] == FAILED] == []
