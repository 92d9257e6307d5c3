"""The families that are tested: their classes, tiny configurations and inputs, dense or low-rank."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from hf_reparam import Entry, LowRankConfig, RankPlan, convert
from hf_reparam.model.auto import register
from hf_reparam.model.classes import model_class
from hf_reparam.model.config import plan_of
from hf_reparam.model.host import layer_name
from hf_reparam.structures.heads import Heads
from tests import zoo

__all__ = ["DENSE", "FAMILIES", "FORMS", "Family"]

DENSE = "dense"
FORMS = (DENSE, *zoo.FORMS, "joint")
"""How layers are stored; "joint" also has heads half as wide where that can be."""
RANK = 8
BATCH, LENGTH = 13, 7  # as the testers of Transformers have them: some tests cut to a batch of 7


def _ids() -> torch.Tensor:
    return torch.randint(3, 90, (BATCH, LENGTH))


def _text(config: Any) -> dict[str, torch.Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[:, -1:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _seq2seq(config: Any) -> dict[str, torch.Tensor]:
    ids = _ids()
    ids[:, -1] = config.eos_token_id  # by which BART finds the end of a text
    ones = torch.ones(BATCH, LENGTH, dtype=torch.long)
    decoder = {"decoder_input_ids": _ids(), "decoder_attention_mask": ones}
    return {"input_ids": ids, "attention_mask": ones, **decoder}


def _image(config: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(BATCH, config.num_channels, config.image_size, config.image_size)}


@dataclass(frozen=True)
class Family:
    """Model classes that share a configuration.

    Args:
        name: for people.
        config: a tiny configuration.
        classes: names of the stock classes, the headless one first.
        inputs: configuration -> what a forward pass takes.
        causal, classifier: names of classes that the tests single out; "" if there is none.
        traits: what the test class says of the family.
        labels: class -> label inputs of one number for each token ("labels") or text, where the tests give none.
    """

    name: str
    config: Callable[[], Any]
    classes: tuple[str, ...]
    inputs: Callable[[Any], dict[str, torch.Tensor]] = _text
    causal: str = ""
    classifier: str = ""
    traits: tuple[tuple[str, Any], ...] = ()
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def stock(self, name: str) -> Any:
        return getattr(transformers, name) if name else None

    def model_class(self, name: str, form: str) -> Any:
        """The class of this name, or the one derived from it."""
        stock = self.stock(name)
        return stock if form == DENSE or stock is None else model_class(stock)

    def config_class(self, form: str) -> Any:
        stock = type(self.config())
        return stock if form == DENSE else register(stock)

    def make_config(self, form: str) -> Any:
        """A fresh configuration; with a plan that makes every layer low-rank that this makes smaller."""
        config = self.config()
        if form == DENSE:
            return config
        return self.config_class(form).from_dict({**config.to_dict(), "reparam": self.plan(form).to_dict()})

    @functools.cache  # noqa: B019  # a handful of families
    def plan(self, form: str) -> RankPlan:
        """The layers that `convert` makes low-rank in any of the classes."""
        entries, base = {}, self.config().model_type
        for name in self.classes:
            model = self.stock(name)(self.config())
            if form == "joint":
                narrow = {layer_name(model, s.name): Entry(s.out_features // 2, "heads") for s in Heads().sites(model)}
                model = convert(model, RankPlan(narrow, base)) if narrow else model
            small = convert(model, LowRankConfig(rank=RANK, form="pivoted" if form == "joint" else form))
            entries |= plan_of(small.config).modules
        return RankPlan(entries, base)


FAMILIES = (
    Family(
        "BERT",
        zoo.bert,
        (
            "BertModel",
            "BertLMHeadModel",
            "BertForMaskedLM",
            "BertForMultipleChoice",
            "BertForNextSentencePrediction",
            "BertForPreTraining",
            "BertForQuestionAnswering",
            "BertForSequenceClassification",
            "BertForTokenClassification",
        ),
        causal="BertLMHeadModel",
        labels=(("BertForPreTraining", ("labels", "next_sentence_label")),),
        classifier="BertForSequenceClassification",
    ),
    Family(
        "GPT-2",
        zoo.gpt2,
        (
            "GPT2Model",
            "GPT2LMHeadModel",
            "GPT2ForQuestionAnswering",
            "GPT2ForSequenceClassification",
            "GPT2ForTokenClassification",
        ),
        causal="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
    ),
    Family(
        "Llama",
        functools.partial(zoo.llama, pad_token_id=0),
        (
            "LlamaModel",
            "LlamaForCausalLM",
            "LlamaForSequenceClassification",
            "LlamaForQuestionAnswering",
            "LlamaForTokenClassification",
        ),
        causal="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
    ),
    Family(
        "T5",
        zoo.t5,
        ("T5Model", "T5ForConditionalGeneration", "T5ForQuestionAnswering"),
        _seq2seq,
        traits=(("is_encoder_decoder", True),),
    ),
    Family(
        "BART",
        zoo.bart,
        ("BartModel", "BartForConditionalGeneration", "BartForSequenceClassification", "BartForQuestionAnswering"),
        _seq2seq,
        traits=(("is_encoder_decoder", True),),
    ),
    Family(
        "ViT",
        functools.partial(zoo.vit, encoder_stride=8),
        ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
        _image,
        classifier="ViTForImageClassification",
        # its input embeddings are a convolution; Transformers' own test of ViT replaces the second, too
        traits=(("test_resize_embeddings", False), ("test_model_get_set_embeddings", None)),
    ),
)
