"""What a hurried call gets wrong is one sentence that says what to do."""

import pytest
import torch
import transformers as tf

import hf_reparam
from hf_reparam import LowRankConfig, calibrate, convert, make_plan, plot, search_plan
from hf_reparam.errors import ReparamError
from tests import zoo
from tests.test_cli import run
from tests.usage.test_tasks import words

SMALL = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
BATCHES = [{"input_ids": zoo._ids(4, 8, seed=i)} for i in range(6)]


def bert():
    return zoo.BY_BASE["BertForSequenceClassification"].build()


def labelled(labels):
    return [{**batch, "labels": labels} for batch in BATCHES]


def speech():
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, max_source_positions=50, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def nowhere():
    with torch.device("meta"):
        return bert()


def broken():
    model = bert()
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_plan(bert(), keep=0.5, calibration=["a text"]), "takes a Calibration here, got list: give"),
        (lambda: make_plan(bert(), LowRankConfig(keep=0.5, metric="fisher")), r"give calibration= \(--calibration\)"),
        (lambda: search_plan(bert(), "accuracy", 0.1), "evaluate must be a function model -> number, got 'accuracy'"),
        (lambda: plot.ranks(bert()), r"give a plan, such as make_plan\(model, ...\), got Bert"),
        (lambda: convert(bert(), 0.5), "got float: for a size write keep=0.5"),
        (lambda: convert(bert(), keep=0.01, calibration=BATCHES), r"min_rank= \(now 8\)$"),
        (lambda: convert(bert(), make_plan(bert(), rank=8).with_ranks({"*": 99})), r"above min\(in, out\) = 32$"),
        (lambda: calibrate(bert(), BATCHES, loss_fn=lambda m, b: m(**b).logits), r"returned one of shape \(4, 3\)"),
        (lambda: calibrate(bert(), BATCHES, loss_fn=lambda m, b: 3.0), "scalar tensor, summed over the batch"),
        (lambda: calibrate(bert(), labelled(torch.rand(4, 2))), "loss takes no such labels .*: leave `labels` out"),
        (lambda: calibrate(bert(), labelled(torch.full((4,), 9))), "loss takes no such labels .*: leave `labels` out"),
        (lambda: calibrate(zoo.BY_BASE["T5ForConditionalGeneration"].build(), BATCHES), "has a decoder: give labels"),
        (lambda: calibrate(speech(), 3 * [{"input_features": torch.randn(1, 80, 100)}]), "has a decoder: give labels"),
        (lambda: calibrate(nowhere(), BATCHES), "on the meta device and has no data: load it onto a real device"),
        (lambda: convert(broken(), keep=0.5, calibration=BATCHES), "not finite: look for NaN in the weights"),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(ReparamError, match=words):
        call()


def test_the_tokenizer_of_another_model():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, vocab_size=2))
    with pytest.raises(ReparamError, match=r"gives token id \d+, and GPT2LMHeadModel knows 2: give the tokenizer of"):
        calibrate(model, ["w5 w9"] * 4, tokenizer=words())


def test_a_smaller_vocabulary_is_not_compared():
    large, small = (tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, vocab_size=size)) for size in (99, 50))
    with pytest.raises(ReparamError, match="compare models of one task and one vocabulary"):
        hf_reparam.compare(large, small, [{"input_ids": torch.tensor([[3, 70, 5]])}], times=False)


def test_the_next_step_of_a_plan_can_be_taken_as_it_is_printed(tmp_path, capsys):
    zoo.BY_BASE["GPT2LMHeadModel"].build().save_pretrained(tmp_path / "dense")
    words().save_pretrained(tmp_path / "dense")
    texts, place = tmp_path / "texts.txt", tmp_path / "plan.json"
    texts.write_text("\n".join(["w5 w9 w7"] * 6))
    options = ["--keep", 0.6, "--min-rank", 1, "--calibration", texts, "--out", place, "--quiet"]
    assert run("plan", tmp_path / "dense", *options) == 0
    *_, said = capsys.readouterr().out.split("next: hf-reparam ")
    taken = [str(tmp_path / "small") if word == "OUT" else word for word in said.split()]
    assert run(*taken, "--quiet") == 0


def test_refit_says_on_what_it_was_measured():
    model = bert()
    small = convert(model, LowRankConfig(keep=0.6, min_rank=1), calibration=BATCHES)
    assert "on the texts that chose the fits" in str(hf_reparam.refit(small, model, BATCHES))


def test_layers_that_stay_dense_are_in_the_size():
    small = convert(bert(), LowRankConfig(rank=4, exclude_modules="*query*"))
    (line,) = [line for line in str(hf_reparam.report(small)).splitlines() if line.startswith("with dense ones:")]
    assert line.endswith("2 more that the plan leaves dense")
    whole = hf_reparam.report(small)
    dense = sum(item.parameters for item in whole.skipped if item.name.endswith("query"))
    assert f"{whole.factored_before + dense:,} -> {whole.factored_after + dense:,} parameters" in line
