"""`distillation_loss` in the Trainer as it is."""

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_reparam import LowRankConfig, convert, distillation_loss
from hf_reparam.errors import TargetError
from tests import zoo
from tests.usage.test_objectives import segmentation

CASE = zoo.BY_BASE["BertForSequenceClassification"]


@pytest.fixture
def pair():
    dense = CASE.build()
    dense.classifier.weight.data *= 50  # the logits of a model that is sure of something
    return dense, convert(dense, rank=4)


def test_the_formula(pair):
    dense, small = pair
    batch, labels = CASE.batch(), torch.tensor([0, 2])
    with torch.no_grad():
        theirs = dense(**batch).logits
    with distillation_loss(dense, small, temperature=3.0, alpha=0.3) as loss:
        outputs = small(**batch)
        got = loss(outputs, labels)
    log_p, log_q = (theirs / 3).log_softmax(-1), (outputs.logits / 3).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(got, 0.7 * F.cross_entropy(outputs.logits, labels) + 0.3 * 9 * kl)


def test_zero_for_the_teacher_itself_and_no_gradient_into_it(pair):
    dense, small = pair
    twin = copy.deepcopy(dense)
    with distillation_loss(dense, twin, alpha=1.0, hidden=1.0) as loss:
        assert abs(float(loss(twin(**CASE.batch()), None))) < 1e-6
    with distillation_loss(dense, small, alpha=1.0, hidden=1.0) as loss:
        loss(small(**CASE.batch()), None).backward()
    assert all(p.grad is None for p in dense.parameters())
    assert sum(p.grad is not None for p in small.parameters()) == sum(1 for _ in small.parameters())


def test_the_teacher_predicts_without_dropout_and_is_left_as_it_was(pair):
    dense, small = pair
    batch = CASE.batch()
    with distillation_loss(dense, small, alpha=1.0) as loss:
        expected = float(loss(small(**batch), None).detach())
    dense.train()
    dense.bert.pooler.eval()
    with distillation_loss(dense, small, alpha=1.0) as loss:
        assert float(loss(small(**batch), None).detach()) == expected
    assert dense.training
    assert not dense.bert.pooler.training
    assert all(p.requires_grad for p in dense.parameters())


def test_hidden_states_count_real_tokens_alone(pair):
    dense, small = pair
    batch = CASE.batch()

    def hidden_part(changed):
        with distillation_loss(dense, small, alpha=1.0, hidden=1.0) as loss:
            return float(loss(small(**changed), None))

    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert hidden_part(other) == pytest.approx(hidden_part(batch), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "shifted"), [("GPT2LMHeadModel", True), ("BertForMaskedLM", False), ("T5ForConditionalGeneration", False)]
)
def test_labels_of_tokens_give_the_models_own_loss(base, shifted):
    case = zoo.BY_BASE[base]
    dense = case.build()
    small, batch = convert(dense, rank=6), case.batch()
    labels = batch.get("decoder_input_ids", batch["input_ids"]).clone()
    labels[0, :3] = -100
    own = small(**batch, labels=labels).loss
    with distillation_loss(dense, small, alpha=0.0) as loss:
        torch.testing.assert_close(loss(small(**batch), labels), own)
        count = int((labels[:, 1:] if shifted else labels).ne(-100).sum())
        torch.testing.assert_close(loss(small(**batch), labels, num_items_in_batch=2 * count), own / 2)


@pytest.mark.slow
def test_regression_multi_label_and_question_answering():
    batch = CASE.batch()
    for options, labels in (
        ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
        ({"num_labels": 3, "problem_type": "regression"}, torch.tensor([[1.0, 0, -1], [0, 2, 1]])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ):
        dense = BertForSequenceClassification(BertConfig(**zoo.BERT_LIKE, **options)).eval()
        small = convert(dense, LowRankConfig(rank=4, target_modules="*"))
        with distillation_loss(dense, small, alpha=0.0) as loss:
            torch.testing.assert_close(loss(small(**batch), labels), small(**batch, labels=labels).loss)
        with distillation_loss(dense, small, alpha=1.0) as loss:
            apart = float(loss(small(**batch), labels))
            assert apart > 0
        if options.get("problem_type") == "regression":
            squares = (small(**batch).logits - dense(**batch).logits).square().mean() / 2
            assert apart == pytest.approx(float(squares))
    case = zoo.BY_BASE["BertForQuestionAnswering"]
    dense = case.build()
    small, positions = (
        convert(dense, rank=4),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.ones(2).long()},
    )
    with distillation_loss(dense, small, alpha=0.5) as loss:
        outputs = small(**batch, **positions)
        assert float(loss(outputs, None)) > 0.5 * float(outputs.loss)


def test_labels_of_another_shape_than_the_logits_are_not_passed_over():
    model = segmentation()
    with distillation_loss(model, model, alpha=0.5) as loss:
        outputs = model(pixel_values=torch.randn(2, 3, 16, 24))
        with pytest.raises(TargetError, match="labels are not of the logits' shape"):
            loss(outputs, torch.zeros(2, 16, 24).long())


@pytest.mark.slow
def test_trainer_brings_the_student_nearer_and_the_hook_leaves(tmp_path):
    dense = CASE.build()
    dense.classifier.weight.data *= 50  # the logits of a model that is sure of something
    small = convert(dense, LowRankConfig(rank=4, target_modules="*"))
    rows = [{"input_ids": zoo._ids(1, 6, seed=i)[0], "labels": i % 3} for i in range(128)]
    probe = {"input_ids": zoo._ids(16, 6, seed=99)}

    def distance():
        with torch.no_grad():
            return float((dense(**probe).logits.softmax(-1) - small.eval()(**probe).logits.softmax(-1)).square().mean())

    before = distance()
    args = TrainingArguments(
        tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    with distillation_loss(dense, small, alpha=1.0, hidden=0.1) as loss:
        Trainer(small, args, train_dataset=rows, compute_loss_func=loss).train()
    assert distance() < 0.5 * before
    assert not small._forward_pre_hooks
    with pytest.raises(RuntimeError, match="stop"), distillation_loss(dense, small):
        raise RuntimeError("stop")
    assert not small._forward_pre_hooks


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing(tmp_path):
    dense = CASE.build()
    rows = [{"input_ids": zoo._ids(1, 6, seed=i)[0], "labels": i % 3} for i in range(16)]
    results = []
    for size, steps in ((8, 1), (2, 4)):
        small = convert(dense, rank=4)
        args = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        for module in small.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with distillation_loss(dense, small, alpha=0.5) as loss:
            Trainer(small, args, train_dataset=rows, compute_loss_func=loss).train()
        results.append(small.classifier.weight.detach().clone())
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_errors(pair):
    dense, small = pair
    for options in ({"alpha": 1.5}, {"temperature": 0.0}, {"hidden": -1.0}):
        with pytest.raises(TargetError, match="must be in"), distillation_loss(dense, small, **options):
            pass
    with distillation_loss(dense, small) as loss:
        with pytest.raises(TargetError, match="not called inside"):
            loss({}, None)
        with pytest.raises(TargetError, match="no labels"):
            loss(small(**CASE.batch()), None)
    headless = zoo.BY_BASE["BertModel"].build()
    with distillation_loss(headless, headless, alpha=1.0) as loss, pytest.raises(TargetError, match="no logits"):
        loss(headless(**CASE.batch()), None)


def test_hidden_states_are_not_among_the_predictions(pair):
    """The `Trainer` would give them to `compute_metrics` beside the logits."""
    dense, small = pair
    batch, labels = CASE.batch(), torch.tensor([0, 2])
    with distillation_loss(dense, small, hidden=1.0) as loss:
        outputs = small(**batch)
        assert set(outputs) == {"logits"}
        with_states = float(loss(outputs, labels).detach())
        asked = small(**batch, output_hidden_states=True)
        assert set(asked) == {"logits", "hidden_states"}
        assert float(loss(asked, labels).detach()) == with_states
    with distillation_loss(dense, small, hidden=0.0) as loss:
        assert float(loss(small(**batch), labels).detach()) < with_states
    assert set(small(**batch)) == {"logits"}


def test_answers_are_counted_one_by_one_and_taken_for_answers():
    """A `Trainer` counts every label of several for a text, and the class takes float labels for answers."""
    dense = build(num_labels=5)
    small = convert(dense, rank=4)
    batch, labels = CASE.batch(), torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    with distillation_loss(dense, small, alpha=0.0) as loss:
        outputs = small(**batch)
        got = loss(outputs, labels), loss(outputs, labels, num_items_in_batch=labels.ne(-100).sum())
    for value in got:
        torch.testing.assert_close(value, small(**batch, labels=labels).loss)


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForSequenceClassification"])
def test_without_a_label_that_counts_the_loss_is_zero(base):
    dense = zoo.BY_BASE[base].build()
    small, batch = convert(dense, rank=4), zoo.BY_BASE[base].batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels = labels if base.startswith("GPT2") else labels[:, 0]
    with distillation_loss(dense, small) as loss:
        got = loss(small(**batch), labels, num_items_in_batch=7)
    assert float(got.detach()) == 0
    got.backward()


def test_a_masked_language_model_that_generates_predicts_the_tokens_themselves():
    config = transformers.XLMConfig(vocab_size=99, emb_dim=32, n_layers=1, n_heads=2)
    dense = transformers.XLMWithLMHeadModel(config).eval()
    small, ids = convert(dense, rank=4), torch.randint(5, 99, (3, 9))
    labels = torch.where(torch.arange(9) % 3 == 0, ids, -100)
    with distillation_loss(dense, small, alpha=0.0) as loss:
        got = loss(small(input_ids=ids), labels)
    torch.testing.assert_close(got, small(input_ids=ids, labels=labels).loss)


def build(**kw):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=99, **shape, **kw)).eval()
