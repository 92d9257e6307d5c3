"""Calibration data of every kind give the same moments; several processes give the moments of all their data."""

import datasets
import pytest
import torch
import transformers as tf
from transformers import AutoTokenizer

from hf_reparam import Calibration, calibrate, convert, merge
from hf_reparam.calibrate.batches import prepare
from hf_reparam.errors import TargetError
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo
from tests.launch import launch
from tests.test_calibration import assert_same

TEXTS = ["a short text", "a text that is somewhat longer than the first", "three", "the last one of four texts"] * 12


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = zoo.BY_BASE["BertForSequenceClassification"].build()
    model.resize_token_embeddings(len(tokenizer))
    return model


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    labels = torch.arange(48) % 3
    batches = [dict(tokenizer(TEXTS[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 48, 8)]
    return calibrate(model, [{**b, "labels": labels[8 * i : 8 * i + 8]} for i, b in enumerate(batches)])


@pytest.mark.slow
@pytest.mark.parametrize("torch_format", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_a_dataset_of_examples(model, tokenizer, expected, torch_format, padding):
    rows = {**tokenizer(TEXTS, padding=padding), "label": [i % 3 for i in range(48)], "text": TEXTS}
    data = datasets.Dataset.from_dict(rows)
    if torch_format:
        data = data.with_format("torch")
    assert_same(calibrate(model, data), expected)


@pytest.mark.slow
def test_a_dataset_of_texts(model, tokenizer, expected):
    data = datasets.Dataset.from_dict({"id": list("abcd" * 12), "text": TEXTS, "label": [i % 3 for i in range(48)]})
    assert_same(calibrate(model, data, tokenizer=tokenizer), expected)
    with pytest.raises(TargetError, match="need a tokenizer"):
        calibrate(model, data)


def test_a_data_loader(model, tokenizer, expected):
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=5, collate_fn=lambda r: dict(tokenizer.pad(r, return_tensors="pt"))
    )
    assert_same(calibrate(model, loader), expected)


def test_images_one_by_one():
    case = zoo.BY_BASE["ViTForImageClassification"]
    model, images = case.build(), case.batch()["pixel_values"]
    assert_same(calibrate(model, [{"pixel_values": i} for i in images]), calibrate(model, [case.batch()]))


@pytest.fixture
def dispatched(tmp_path):
    import transformers

    zoo.BY_BASE["LlamaForCausalLM"].build().save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    return model


@pytest.mark.slow
def test_a_dispatched_model(dispatched):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    assert_same(calibrate(dispatched, [case.batch()]), calibrate(case.build(), [case.batch()]))


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("size", [{"rank": 6}, {"keep": 0.5}])
def test_a_dispatched_model_is_converted(dispatched, inplace, size):
    case = zoo.BY_BASE["LlamaForCausalLM"]
    small = convert(dispatched, calibration=[case.batch()], inplace=inplace, **size)
    expected = convert(case.build(), calibration=[case.batch()], **size)
    assert {p.is_meta for m in small.modules() if isinstance(m, LowRankLinear) for p in m.parameters()} == {False}
    for a, b in zip(zoo.outputs(small, case.batch()), zoo.outputs(expected, case.batch()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    merged = merge(small)
    for a, b in zip(zoo.outputs(merged, case.batch()), zoo.outputs(expected, case.batch()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


WORKER = """
import sys, torch
from accelerate import Accelerator
from hf_reparam import calibrate
from tests import zoo
accelerator = Accelerator(cpu=True)
case = zoo.BY_BASE["BertForMaskedLM"]
ids = torch.randint(3, 90, (12, 7), generator=torch.Generator().manual_seed(0))
loader = accelerator.prepare(torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=2))
moments = calibrate(case.build(), loader)
moments.save(f"{sys.argv[1]}/{accelerator.process_index}")
accelerator.end_training()  # without it, gloo may abort a process that ends
"""


@pytest.mark.slow
def test_two_processes_share_the_data(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launch(tmp_path / "worker.py", tmp_path)
    ids = torch.randint(3, 90, (12, 7), generator=torch.Generator().manual_seed(0))
    alone = calibrate(zoo.BY_BASE["BertForMaskedLM"].build(), [{"input_ids": ids}])
    for rank in range(2):
        assert_same(Calibration.load(tmp_path / str(rank)), alone)


def test_texts_are_masked_for_models_that_fill_masks(tokenizer):
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS)]
    shape = {**zoo.BERT_LIKE, "vocab_size": len(tokenizer)}
    plain, seen, classified = (
        [batch for batch, _ in prepare(getattr(tf, kind)(tf.BertConfig(**shape)), texts, tokenizer)]
        for kind in ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")
    )
    words = hidden = 0
    for one, other, third in zip(plain, seen, classified, strict=True):
        masked = other["input_ids"] == tokenizer.mask_token_id
        assert torch.equal(one["input_ids"], third["input_ids"])
        assert torch.equal(one["input_ids"][~masked], other["input_ids"][~masked])
        is_word = ~torch.isin(one["input_ids"], torch.tensor(tokenizer.all_special_ids))
        assert is_word[masked].all()
        words, hidden = words + int(is_word.sum()), hidden + int(masked.sum())
    assert 0.1 < hidden / words < 0.2


def test_what_masks_itself_stays_as_it_is(tokenizer):
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    ids = tokenizer(TEXTS[1])["input_ids"]
    masked = [[*ids[:3], tokenizer.mask_token_id, *ids[4:]]] * 40
    seen = torch.cat([b["input_ids"] for b, _ in prepare(model, [{"input_ids": row} for row in masked], tokenizer)])
    assert torch.equal(seen, torch.tensor(masked))


def test_labels_of_masked_tokens_are_left_out():
    model = zoo.BY_BASE["BertForMaskedLM"].build()
    batches = [
        {"input_ids": torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(i))} for i in range(9)
    ]
    labelled = [{**b, "labels": b["input_ids"].masked_fill(torch.arange(9) > 1, -100)} for b in batches]
    seen = calibrate(model, labelled)
    assert_same(seen, calibrate(model, batches))
    assert not any("labels" in batch for batch, _ in seen.batches)
    own = calibrate(model, labelled, loss_fn=lambda model, batch: model(**batch).loss * 8)
    assert all("labels" in batch for batch, _ in own.batches)
