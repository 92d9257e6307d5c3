"""The unmodified Trainer on converted models: the loss falls, resuming is exact, two processes agree."""

import itertools
import runpy

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_reparam import LowRankConfig, convert, merge
from hf_reparam.layers.linear import LowRankLinear
from tests import zoo
from tests.launch import launch

GOOD = ["fine", "lovely", "bright", "warm", "superb", "charming"]
BAD = ["awful", "dull", "cold", "broken", "dreadful", "boring"]
SUBJECTS = ["the film", "this book", "a song", "our trip", "the meal"]


@pytest.fixture(scope="module")
def data(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [
        (f"{s} was {w}", label)
        for label, words in enumerate((BAD, GOOD))
        for s, w in itertools.product(SUBJECTS, words)
    ]
    return [{**tokenizer(text, padding="max_length", max_length=12), "labels": label} for text, label in rows]


@pytest.fixture(params=["pair", "pivoted"])
def classifier(request, shallow):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(shallow, num_labels=2)
    return convert(model, LowRankConfig(rank=64, form=request.param))


def arguments(folder, **options):
    defaults = {
        "max_steps": 30,
        "per_device_train_batch_size": 10,
        "learning_rate": 2e-3,
        "logging_steps": 4,
        "seed": 3,
    }
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(folder), **{**defaults, **quiet, "save_strategy": "no", **options})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.slow
@pytest.mark.parametrize(("classifier", "checkpointing"), [("pair", False), ("pivoted", True)], indirect=["classifier"])
def test_loss_falls(tmp_path, data, classifier, checkpointing):
    trainer = Trainer(
        classifier,
        arguments(tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] >= 0.9
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_best_model_is_loaded(tmp_path, data, shallow):
    def trainer(folder, **options):
        torch.manual_seed(0)
        model = convert(AutoModelForSequenceClassification.from_pretrained(shallow, num_labels=2), rank=16)
        steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
        return Trainer(model, arguments(folder, **{**steps, **best, **options}), train_dataset=data, eval_dataset=data)

    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-6)
    best = AutoModelForSequenceClassification.from_pretrained(straight.state.best_model_checkpoint)
    assert type(best) is type(straight.model)
    assert all(torch.equal(v, straight.model.state_dict()[k]) for k, v in best.state_dict().items())
    assert isinstance(best.bert.encoder.layer[0].output.dense, LowRankLinear)


@pytest.mark.slow
def test_trained_saved_loaded_merged(tmp_path, data, classifier):
    trainer = Trainer(classifier, arguments(tmp_path, max_steps=2), train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    batch = transformers.default_data_collator(data[:4])
    labels = batch.pop("labels")
    assert labels.shape == (4,)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    trained = trainer.model.eval()
    expected = zoo.outputs(trained, dict(batch))[0]
    torch.testing.assert_close(zoo.outputs(loaded, dict(batch))[0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(zoo.outputs(merge(loaded), dict(batch))[0], expected, atol=1e-5, rtol=1e-5)


SCRIPT = """
import sys, torch, transformers
from transformers import Trainer, TrainingArguments
from hf_reparam import convert
from tests import zoo
transformers.logging.set_verbosity_error()
folder, per_device = sys.argv[1], int(sys.argv[2])
case = zoo.BY_BASE["BertForSequenceClassification"]
off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
model = convert(case.build(**off), rank=6)
ids = torch.randint(3, 90, (32, 9), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]
args = TrainingArguments(folder, use_cpu=True, max_steps=6, per_device_train_batch_size=per_device,
                         learning_rate=0.5, optim="sgd",
                         report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, seed=3,
                         average_tokens_across_devices=False)  # else the Trainer doubles the loss of stock BERT, too
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
torch.save(trainer.model.state_dict(), f"{folder}/rank{args.process_index}-of-{args.world_size}.pt")
trainer.accelerator.end_training()  # without it, gloo may abort a process that ends
"""


@pytest.mark.slow
def test_two_processes_train_to_the_same_model(tmp_path, monkeypatch):
    """Every step sees all 32 examples, so the order in which samplers draw them does not matter."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch(script, tmp_path, 16, processes=2)
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path), "32"])
    runpy.run_path(str(script), run_name="__main__")
    two = [torch.load(tmp_path / f"rank{r}-of-2.pt") for r in (0, 1)]
    one = torch.load(tmp_path / "rank0-of-1.pt")
    start = convert(zoo.BY_BASE["BertForSequenceClassification"].build(), rank=6).state_dict()
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(value, start[name], atol=1e-3) for name, value in one.items())
