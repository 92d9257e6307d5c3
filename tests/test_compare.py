"""Two models beside each other: what is said of them is what they do."""

import copy
import json

import datasets
import pytest
import torch
from huggingface_hub import repocard
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_reparam import Comparison, LowRankConfig, compare, compare_folders, convert
from hf_reparam.errors import CheckpointError, TargetError
from hf_reparam.files.compare import megabytes
from hf_reparam.files.folder import card_of
from hf_reparam_cli import main
from tests import zoo

TEXTS = ["the cat sat on the mat", "a dog", "rain fell on the town all night", "who is there"] * 3


@pytest.fixture
def words():
    """A tokenizer of single words, which zoo's vocabularies have room for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {
        word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *sorted({w for t in TEXTS for w in t.split()})])
    }
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=64
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize(
    "base", ["BertForMaskedLM", "BertForSequenceClassification", "GPT2LMHeadModel", "T5ForConditionalGeneration"]
)
def test_a_model_beside_itself(base):
    case = zoo.BY_BASE[base]
    model = case.build()
    found = compare(model, copy.deepcopy(model), [case.batch()]).figures
    assert all(
        first == second
        for name, (first, second) in found.items()
        if "ms" not in name and "per second" not in name and first is not None
    )
    distance = next(value for name, (_, value) in found.items() if name.startswith("divergence"))
    assert distance == pytest.approx(0, abs=1e-6)
    assert found["same first choice"] == (None, 1.0)
    assert all(second > 0 for name, (_, second) in found.items() if "ms" in name)


@torch.no_grad()
def test_perplexity_is_that_of_consecutive_blocks(words):
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    small = convert(model, rank=4)
    found = compare(model, small, TEXTS, tokenizer=words, max_length=8, times=False)
    ids = words("\n\n".join(TEXTS), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 8 * 8].view(-1, 8)
    assert found.data == f"{len(blocks)} blocks of 8 tokens"
    column = datasets.Dataset.from_dict({"text": TEXTS})["text"]  # a sequence, and not a list
    same = compare(model, small, column, tokenizer=words, max_length=8, times=False)
    assert same.figures == found.figures
    for column, one in enumerate((model, small)):
        logits = one(blocks).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert found.figures["loss"][column] == pytest.approx(float(loss), rel=1e-5)
        assert found.figures["perplexity"][column] == pytest.approx(float(loss.exp()), rel=1e-5)
    p, q = (one(blocks).logits.log_softmax(-1) for one in (model, small))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found.figures["divergence from dense, nats per token"][1] == pytest.approx(float(expected), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert found.figures["same first choice"][1] == pytest.approx(float(same))


@torch.no_grad()
def test_hidden_states_by_their_cosine_without_padding():
    case = zoo.BY_BASE["BertModel"]
    model, batch = case.build(), case.batch()
    small = convert(model, rank=4)
    batch["attention_mask"][0, -2:] = 0
    found = compare(model, small, [batch], times=False).figures
    mask = batch["attention_mask"].bool()
    one, other = (m(**batch).last_hidden_state[mask] for m in (model, small))
    expected = F.cosine_similarity(one, other, dim=-1).mean()
    assert found["cosine of last hidden state"] == (None, pytest.approx(float(expected), rel=1e-5))


def test_models_are_left_in_their_mode_and_what_a_user_measures_is_shown():
    case = zoo.BY_BASE["BertForSequenceClassification"]
    model = case.build().train()
    small = convert(model, rank=4)
    found = compare(
        model, small, [case.batch()], evaluate=lambda m: {"layers": sum(1 for _ in m.modules())}, times=False
    )
    assert model.training
    assert found.figures["layers"][1] > found.figures["layers"][0]
    assert "| layers |" in found.to_markdown()
    assert json.loads(json.dumps(found.to_dict()))["data"] == "2 examples"


@pytest.mark.slow
def test_bytes_of_quantized_weights_are_those_inside():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    small = copy.deepcopy(net)
    quantize_(small, Int8WeightOnlyConfig())
    found = compare(net, small, [{"input": torch.randn(3, 256)}], times=False).figures["MB in memory"]
    assert found[0] == pytest.approx(256 * 256 * 4 / 1e6)
    assert 256 * 256 / 1e6 < found[1] < 0.3 * found[0]


@pytest.mark.slow
def test_sentence_embeddings(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    small = convert(model, rank=200)
    found = compare(model, small, TEXTS, times=False).figures["cosine of sentence embeddings"][1]
    one, other = (m.encode(TEXTS, convert_to_tensor=True) for m in (model, small))
    assert found == pytest.approx(float(F.cosine_similarity(one, other, dim=-1).mean()), rel=1e-4)
    assert 0.5 < found < 0.9999


def test_what_cannot_be_compared():
    case = zoo.BY_BASE["BertForMaskedLM"]
    with pytest.raises(TargetError, match="predict different things"):
        compare(case.build(), zoo.BY_BASE["BertModel"].build(), [case.batch()], times=False)
    with pytest.raises(TargetError, match="no data"):
        compare(case.build(), case.build(), [], times=False)


def test_a_text_of_one_token_is_no_data(words):
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    with pytest.raises(TargetError, match="no data"):
        compare(model, model, ["dog"], tokenizer=words)


def test_folders_on_the_command_line(tmp_path, words, capsys):
    dense, small, texts = tmp_path / "dense", tmp_path / "small", tmp_path / "texts.txt"
    model = zoo.BY_BASE["GPT2LMHeadModel"].build()
    model.save_pretrained(dense)
    words.save_pretrained(dense)
    convert(model, rank=4).save_pretrained(small)
    texts.write_text("\n".join(TEXTS))
    options = [str(dense), str(small), "--texts", str(texts), "--no-times", "--quiet"]
    assert main(["compare", *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["MB on disk"][0] == pytest.approx((dense / "model.safetensors").stat().st_size / 1e6)
    loaded = [AutoModelForCausalLM.from_pretrained(place) for place in (dense, small)]
    expected = compare(*loaded, TEXTS, tokenizer=AutoTokenizer.from_pretrained(dense), times=False)
    assert figures["perplexity"] == pytest.approx(list(expected.figures["perplexity"]))
    for _ in range(2):
        assert main(["compare", *options, "--card"]) == 0
    card = (small / "README.md").read_text()
    assert card.count("| perplexity |") == card.count("## Beside the dense model") == 1
    with pytest.raises(CheckpointError, match="give a folder"):
        compare_folders(dense, "me/small", texts, card=True)
    assert main(["compare", str(dense), str(small), "--texts", str(tmp_path / "none.txt")]) == 2


def test_what_is_zero_but_for_rounding_has_no_ratio():
    found = Comparison({"lost": (1e-8, 0.08), "loss": (2.0, 3.0)}, "1 example", "cpu")
    lost, loss = (line.split() for line in str(found).splitlines()[2:4])
    assert lost == ["lost", "1e-08", "0.08"]
    assert loss == ["loss", "2", "3", "1.50"]


@torch.no_grad()
@pytest.mark.parametrize(("base", "shift"), [("GPT2LMHeadModel", 1), ("BertForMaskedLM", 0)])
def test_losses_are_means_over_the_labels_that_count(base, shift):
    case = zoo.BY_BASE[base]
    model, small = case.build(), convert(case.build(), rank=4)
    batches = []
    for count in (2, 9, 0):  # labels in a row of 12
        ids = torch.arange(12)[None] + count
        batches.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) >= count, -100)})
    counts = [2 - shift, 9 - shift]
    sums = [float(small(**batch).loss) * count for batch, count in zip(batches, counts, strict=False)]
    _, second = compare(model, small, batches, times=False).figures["loss"]
    assert second == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_a_loss_by_other_labels_than_labels():
    case = zoo.BY_BASE["BertForQuestionAnswering"]
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])}
    batch = {"input_ids": torch.arange(8).reshape(2, 4) + 3, **spans}
    model = case.build()
    first, _ = compare(model, convert(model, rank=4), [batch], times=False).figures["loss"]
    assert first == pytest.approx(float(model.eval()(**batch).loss))


def test_scores_of_one_number_by_their_difference():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[1].bias += 0.5
    found = compare(net, other, [{"input": torch.randn(4, 16)}], times=False).figures
    assert found["mean difference of output"][1] == pytest.approx(0.5)


def test_bytes_on_disk_are_those_of_the_format_that_is_loaded(tmp_path):
    for name, size in (("model.safetensors", 7), ("pytorch_model.bin", 11), ("training_args.bin", 13)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert megabytes(tmp_path) == 7e-6
    (tmp_path / "model.safetensors").unlink()
    assert megabytes(tmp_path) == 11e-6


def test_a_folder_without_a_card_is_read_in_silence(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(repocard.logger, "warning", heard.append)
    assert card_of(tmp_path).text == ""
    assert heard == []


def test_a_card_that_cannot_be_read_is_not_written_over(tmp_path, words):
    case = zoo.BY_BASE["GPT2LMHeadModel"]
    case.build().save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: [\n---\nmine\n")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    with pytest.raises(CheckpointError, match="cannot be read as a model card"):
        compare_folders(tmp_path / "m", tmp_path / "m", tmp_path / "texts.txt", times=False, card=True)
    assert (tmp_path / "m" / "README.md").read_text().endswith("mine\n")


@torch.no_grad()
def test_every_tower_is_compared():
    from tests.usage.test_composites import IDS, PIXELS, clip

    model = clip().eval()
    batch = {"input_ids": IDS, "pixel_values": PIXELS}
    small = convert(model, LowRankConfig(rank=1, target_modules="vision_model.*"))
    found = compare(model, small, [batch], times=False).figures
    assert found["cosine of text embeds"][1] == pytest.approx(1, abs=1e-6)
    assert found["cosine of image embeds"][1] == pytest.approx(
        float(F.cosine_similarity(small(**batch).image_embeds, model(**batch).image_embeds).mean()), abs=1e-5
    )
    assert found["cosine of image embeds"][1] < 0.999


@torch.no_grad()
def test_positions_without_a_label_are_not_compared():
    case = zoo.BY_BASE["BertForTokenClassification"]
    model = case.build(initializer_range=0.3)
    small = convert(model, rank=2)
    ids = case.batch()["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 2:4] = 1
    found = compare(model, small, [{"input_ids": ids, "labels": labels}], times=False).figures
    low, dense = (m(ids).logits[:, 2:4].log_softmax(-1) for m in (small, model))
    expected = (dense.exp() * (dense - low)).sum(-1).mean()
    assert found["divergence from dense, nats per token"][1] == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_both_ends_of_an_answer_are_compared():
    model = zoo.BY_BASE["BertForQuestionAnswering"].build(initializer_range=0.3)
    other = copy.deepcopy(model)
    other.qa_outputs.weight[1].neg_()
    batch = zoo.BY_BASE["BertForQuestionAnswering"].batch()
    found = compare(model, other, [batch], times=False).figures
    ends = [m(**batch).end_logits.argmax(-1) for m in (model, other)]
    assert found["same first choice"][1] == pytest.approx((1 + float((ends[0] == ends[1]).float().mean())) / 2)
    assert found["same first choice"][1] < 1


def test_long_texts_are_several_rows(words):
    model = zoo.BY_BASE["BertModel"].build()
    for length, said in ((4, "18 rows of 12 texts"), (20, "12 examples")):
        found = compare(model, model, TEXTS, tokenizer=words, max_length=length, times=False)
        assert found.data == said


def test_a_model_of_few_positions_is_timed_within_them():
    dense = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=40, eos_token_id=1))
    found = compare(dense, convert(dense, rank=4), [{"input_ids": torch.randint(3, 90, (2, 9))}]).figures
    assert "ms for 1 text of 40 tokens" in found
    assert "tokens per second when generating" in found


def test_a_model_that_wants_more_than_ids_is_timed_with_the_data():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(99, 32), nn.Linear(40, 40)

        def forward(self, input_ids, features):
            return {"logits": self.head(torch.cat([self.table(input_ids).mean(1), features], 1))}

    dense = Both()
    batch = {"input_ids": torch.randint(3, 90, (2, 9)), "features": torch.randn(2, 8)}
    assert "ms for a batch of the data" in compare(dense, convert(dense, rank=4), [batch]).figures


def test_a_time_that_cannot_be_measured_is_left_out(monkeypatch):
    dense = zoo.BY_BASE["GPT2LMHeadModel"].build()
    small = convert(dense, rank=4)
    monkeypatch.setattr(small, "generate", lambda *a, **k: (_ for _ in ()).throw(ValueError("not so")))
    found = compare(dense, small, [{"input_ids": torch.randint(3, 90, (2, 9))}]).figures
    assert "same first choice" in found
    assert "tokens per second when generating" not in found


def test_texts_are_read_alike_whatever_holds_them(words):
    dense = zoo.BY_BASE["GPT2LMHeadModel"].build()
    small = convert(dense, rank=4)
    rows = [{"text": text, "idx": i} for i, text in enumerate(TEXTS)]
    given = [TEXTS, (text for text in TEXTS), rows, datasets.Dataset.from_list(rows)]
    found = [compare(dense, small, data, tokenizer=words, times=False).figures for data in given]
    assert "perplexity" in found[0]
    assert found == [found[0]] * 4


def test_padding_that_a_model_takes_no_mask_for_is_not_counted():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(99, 32), nn.Linear(32, 32)

        def forward(self, input_ids):
            return {"logits": self.head(self.table(input_ids))}

    torch.manual_seed(0)
    dense = Recurrent()
    small, ids = convert(dense, rank=4), torch.randint(3, 90, (4, 9))
    mask = (torch.arange(9) < 5).long().expand(4, 9)
    found = [
        compare(dense, small, [{"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}], times=False).figures
        for pad in (0, 1)
    ]
    assert found[0] == found[1]


def test_a_tokenizer_of_another_model_is_told_of(words):
    class Tall(type(words)):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            return {key: value + 200 for key, value in found.items()} if "return_tensors" in kwargs else found

    dense = zoo.BY_BASE["GPT2LMHeadModel"].build()
    tall = Tall(tokenizer_object=words.backend_tokenizer, unk_token="<unk>", model_max_length=64)
    with pytest.raises(TargetError, match="the data have token id .*: give the tokenizer of this model"):
        compare(dense, convert(dense, rank=4), TEXTS, tokenizer=tall)


def test_data_are_read_once_and_no_further_than_asked():
    net, read = nn.Sequential(nn.Linear(8, 8)), []

    def endless():
        while True:
            read.append(1)
            yield {"input": torch.randn(2, 8)}

    compare(net, convert(net, rank=2), endless(), max_samples=8, times=False)
    assert len(read) == 4
