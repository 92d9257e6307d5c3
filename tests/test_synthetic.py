"""Texts that `refine` learns from beside the data: written by the model itself, or put together of two."""

import pytest
import torch

from hf_reparam import LowRankConfig, convert, refine
from hf_reparam.calibrate.objective import batch_masks
from hf_reparam.calibrate.padding import Part
from hf_reparam.errors import TargetError
from hf_reparam.recover import synthetic as module
from hf_reparam.recover.synthetic import synthetic_parts
from tests import zoo

LENGTHS = (12, 12, 9, 10)


def part_of(left=False, **more):
    """Four texts, padded; the ids of each say whose they are."""
    mask = torch.stack([torch.arange(12) < length for length in LENGTHS])
    mask = mask.flip(1) if left else mask
    ids = (torch.arange(4)[:, None] * 20 + torch.arange(12) + 5) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long(), **more}
    return Part(batch, batch_masks(batch))


def real_tokens(part):
    ids = part.batch["input_ids"]
    masks = part.masks[0] if part.masks else torch.ones_like(ids).bool()
    return [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]


@pytest.mark.parametrize("left", [False, True])
def test_the_beginning_of_one_text_and_the_end_of_another(left, monkeypatch):
    monkeypatch.setattr(module, "_REPLACED", 0)
    model, given = zoo.BY_BASE["BertModel"].build(), part_of(left=left)
    made = [text for part in synthetic_parts(model, [given], 8)(0) for text in real_tokens(part)]
    assert len(made) == 32
    originals = real_tokens(given)
    for text in made:
        owners = [(token - 5) // 20 for token in text]
        assert owners == sorted(owners, key=lambda owner: owner != owners[0])  # one change at most
        first, last = originals[owners[0]], originals[owners[-1]]
        assert text[0] == first[0]
        assert text[-1] == last[-1]
    assert any(text not in originals for text in made)


@pytest.mark.parametrize("left", [False, True])
def test_tokens_of_texts_put_together_are_replaced_by_those_nearest(left, monkeypatch):
    monkeypatch.setattr(module, "_crossed", lambda batch, chance: batch)
    model = zoo.BY_BASE["BertModel"].build()
    turns = torch.arange(99)[:, None] / 100  # of ten nearest five come before a token and five after it
    with torch.no_grad():
        table = model.embeddings.word_embeddings.weight.zero_()
        table[:, :2] = torch.cat([turns.cos(), turns.sin()], 1)
    torch.manual_seed(0)
    ids = torch.randint(20, 80, (64, 40))
    ids[:, 20] = 45  # a separator, which every text has
    mask = torch.arange(40) < torch.tensor([40, 30])[torch.arange(64) % 2][:, None]
    mask = mask.flip(1) if left else mask
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    (made,) = synthetic_parts(model, [Part(batch, batch_masks(batch))], 1)(0)
    changed = made.batch["input_ids"] != ids
    start, length = mask.int().argmax(1, keepdim=True), mask.sum(1, keepdim=True)
    outside = ~mask | (torch.arange(40) <= start) | (torch.arange(40) >= start + length - 1)
    assert not changed[outside | (ids == 45)].any()
    new, old = made.batch["input_ids"][changed], ids[changed]
    assert ((new - old).abs() <= 6).all()
    assert (new != 45).all()
    assert 0.35 < len(new) / int((~outside & (ids != 45)).sum()) < 0.45


def test_for_each_epoch_texts_are_put_together_anew():
    epochs = synthetic_parts(zoo.BY_BASE["BertModel"].build(), [part_of()], 2)
    first, second = epochs(0), epochs(1)
    assert not torch.equal(first[0].batch["input_ids"], second[0].batch["input_ids"])
    again = epochs(0)
    assert all(
        torch.equal(one.batch["input_ids"], other.batch["input_ids"]) for one, other in zip(first, again, strict=True)
    )


def test_a_language_model_writes_on_from_what_it_is_given_until_it_stops():
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # sure of what comes next: 0 to 98, one after the other
    model.generation_config.eos_token_id = 2
    given = part_of()
    (made,) = synthetic_parts(model, [given], 1)(0)
    assert made.batch["input_ids"].shape == given.batch["input_ids"].shape
    assert [(text[0] - 5) // 20 for text in real_tokens(made)] == [0, 1, 2, 3]
    epochs = synthetic_parts(model, [given], 1)
    assert epochs(1) is epochs(0)  # not once for each epoch
    (again,) = epochs(0)
    assert torch.equal(made.batch["input_ids"], again.batch["input_ids"])
    for text in real_tokens(made):
        assert text.index(2) == len(text) - 1 if 2 in text else len(text) == 12


def test_for_a_model_that_cannot_write_texts_are_put_together(monkeypatch):
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()

    asked = []

    def refused(*args, **kwargs):
        asked.append(1)
        raise ValueError("more than ids is needed")

    monkeypatch.setattr(type(model), "generate", refused)
    monkeypatch.setattr(module, "_REPLACED", 0)
    made = synthetic_parts(model, [part_of()], 2)(0)
    given = {token for text in real_tokens(part_of()) for token in text}
    assert (len(made), len(asked)) == (2, 1)
    assert {token for one in made for text in real_tokens(one) for token in text} <= given


def test_the_token_that_every_text_begins_with_begins_what_is_written():
    part = part_of()
    part.batch["input_ids"][:, 0] = 1
    made = synthetic_parts(zoo.BY_BASE["LlamaForCausalLM"].build(), [part], 3)(0)
    assert all(text[0] == 1 for one in made for text in real_tokens(one))


def test_every_step_is_drawn_from_the_models_own_predictions():
    model = zoo.BY_BASE["LlamaForCausalLM"].build()
    torch.manual_seed(0)
    model.lm_head.weight.data.mul_(40)
    model.generation_config.update(top_k=1, repetition_penalty=9.0, num_beams=2)  # a user's taste, no distribution
    part = Part({"input_ids": torch.full((256, 17), 7)})
    made = torch.cat([p.batch["input_ids"] for p in synthetic_parts(model, [part], 8)(0)])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(made[:, 1], minlength=len(expected)) / len(made)
    assert 0.5 * (seen - expected).abs().sum() < 0.1


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("BertModel", {"pixel_values": torch.zeros(4, 3)}),
        ("T5ForConditionalGeneration", {"decoder_input_ids": torch.ones(4, 12).long()}),
    ],
)
def test_none_are_made_of_what_is_no_text_alone(base, more):
    assert synthetic_parts(zoo.BY_BASE[base].build(), [part_of(**more)], 3)(0) == []
    assert synthetic_parts(zoo.BY_BASE[base].build(), [Part({"pixel_values": torch.zeros(4, 3)})], 3)(0) == []


@pytest.mark.slow
def test_with_little_data_more_is_learned(monkeypatch):
    monkeypatch.setattr("hf_reparam.recover.refine._RATES", (1.6e-2,))  # between the two that would be chosen
    monkeypatch.setattr("hf_reparam.recover.refine._FIRST", 0)
    torch.manual_seed(0)
    dense = zoo.BY_BASE["BertModel"].build()
    data = [{"input_ids": torch.randint(3, 90, (4, 9))} for _ in range(5)]
    unseen = [{"input_ids": torch.randint(3, 90, (64, 9))}]
    apart = []
    for synthetic in (0, 8):
        small = convert(dense, LowRankConfig(rank=4))
        refine(small, dense, data, epochs=2, synthetic=synthetic)
        with torch.no_grad():
            one, other = (m(**unseen[0]).last_hidden_state for m in (dense, small))
        apart.append(float((one - other).square().sum()))
    assert apart[1] < 0.9 * apart[0]


@pytest.mark.parametrize("synthetic", [-1, 0.5, True])
def test_they_are_counted(synthetic):
    dense = zoo.BY_BASE["BertModel"].build()
    with pytest.raises(TargetError, match="synthetic must be an int of at least 0"):
        refine(convert(dense, rank=4), dense, [zoo._text()], synthetic=synthetic)
