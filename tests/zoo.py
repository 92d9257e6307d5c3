"""Tiny models of many families from configuration literals, with inputs; random weights, fixed seed, no network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf

FORMS = ("pair", "pivoted")
TEXT = {"vocab_size": 99, "max_position_embeddings": 64}
BERT_LIKE = {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def bert(**kw):
    return tf.BertConfig(**BERT_LIKE, **kw)


def roberta(**kw):
    return tf.RobertaConfig(**BERT_LIKE, **kw)


def distilbert(**kw):
    return tf.DistilBertConfig(
        vocab_size=99, max_position_embeddings=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, **kw
    )


def albert(**kw):
    return tf.AlbertConfig(**{**BERT_LIKE, "num_hidden_layers": 3}, embedding_size=24, **kw)


def gpt2(**kw):
    kw = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **kw}
    return tf.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, **kw)


def mixtral(**kw):
    return tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, **kw)


def llama(**kw):
    return tf.LlamaConfig(**LLAMA_LIKE, **kw)


def qwen2(**kw):
    return tf.Qwen2Config(**LLAMA_LIKE, **kw)


def opt(**kw):
    return tf.OPTConfig(
        **TEXT, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, **kw
    )


def t5(**kw):
    return tf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **kw
    )


def bart_like(kind, **kw):
    return kind(
        **TEXT,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        **kw,
    )


def bart(**kw):
    return bart_like(tf.BartConfig, **kw)


def marian(**kw):
    ids = {"pad_token_id": 98, "eos_token_id": 0, "decoder_start_token_id": 98, "forced_eos_token_id": None}
    return bart_like(tf.MarianConfig, **{**ids, **kw})


def vit(**kw):
    return tf.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        **kw,
    )


@dataclass(frozen=True)
class Case:
    """One model class with its configuration and inputs; `auto` is the Auto class that must load it."""

    base: str
    auto: str
    config: Callable
    options: tuple = ()
    inputs: str = "text"

    @property
    def id(self):
        return "-".join([self.base, *(f"{k}={v}" for k, v in self.options)])

    def build(self, **kw):
        torch.manual_seed(0)
        return getattr(tf, self.base)(self.config(**dict(self.options), **kw)).eval()

    def batch(self):
        return INPUTS[self.inputs]()


def _ids(rows=2, cols=7, seed=1):
    return torch.randint(3, 90, (rows, cols), generator=torch.Generator().manual_seed(seed))


def _text():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


INPUTS = {
    "text": _text,
    "seq2seq": lambda: {**_text(), "decoder_input_ids": _ids(2, 5, seed=2)},
    "choices": lambda: {"input_ids": _ids(4, 7).view(2, 2, 7)},
    "double": lambda: {"input_ids": _ids(4, 7).view(2, 2, 7), "mc_token_ids": torch.tensor([[6, 5], [4, 6]])},
    "image": lambda: {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))},
}

BERT_HEADS = [
    Case("BertModel", "AutoModel", bert),
    Case("BertForPreTraining", "AutoModelForPreTraining", bert),
    Case("BertForMaskedLM", "AutoModelForMaskedLM", bert),
    Case("BertLMHeadModel", "AutoModelForCausalLM", bert, (("is_decoder", True),)),
    Case("BertForNextSentencePrediction", "AutoModelForNextSentencePrediction", bert),
    Case("BertForSequenceClassification", "AutoModelForSequenceClassification", bert, (("num_labels", 3),)),
    Case("BertForTokenClassification", "AutoModelForTokenClassification", bert, (("num_labels", 5),)),
    Case("BertForQuestionAnswering", "AutoModelForQuestionAnswering", bert),
    Case("BertForMultipleChoice", "AutoModelForMultipleChoice", bert, inputs="choices"),
]

GPT2_HEADS = [
    Case("GPT2Model", "AutoModel", gpt2),
    Case("GPT2LMHeadModel", "AutoModelForCausalLM", gpt2),
    Case("GPT2DoubleHeadsModel", "", gpt2, (("num_labels", 1),), inputs="double"),
    Case("GPT2ForSequenceClassification", "AutoModelForSequenceClassification", gpt2, (("num_labels", 3),)),
    Case("GPT2ForTokenClassification", "AutoModelForTokenClassification", gpt2),
    Case("GPT2ForQuestionAnswering", "AutoModelForQuestionAnswering", gpt2),
]

FAMILIES = [
    Case("DistilBertForSequenceClassification", "AutoModelForSequenceClassification", distilbert),
    Case("RobertaForMaskedLM", "AutoModelForMaskedLM", roberta),
    Case("AlbertForMaskedLM", "AutoModelForMaskedLM", albert),
    Case("LlamaForCausalLM", "AutoModelForCausalLM", llama, (("tie_word_embeddings", True),)),
    Case("LlamaForCausalLM", "AutoModelForCausalLM", llama, (("tie_word_embeddings", False),)),
    Case("Qwen2ForCausalLM", "AutoModelForCausalLM", qwen2),
    Case("OPTForCausalLM", "AutoModelForCausalLM", opt),
    Case("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", t5, inputs="seq2seq"),
    Case("T5EncoderModel", "AutoModelForTextEncoding", t5),
    Case("BartForConditionalGeneration", "AutoModelForSeq2SeqLM", bart, inputs="seq2seq"),
    Case("BartForSequenceClassification", "AutoModelForSequenceClassification", bart, (("eos_token_id", 2),), "eos"),
    Case("MarianMTModel", "AutoModelForSeq2SeqLM", marian, inputs="seq2seq"),
    Case("ViTForImageClassification", "AutoModelForImageClassification", vit, (("num_labels", 4),), "image"),
]


def _eos():
    ids = _ids()
    ids[:, -1] = 2
    return {"input_ids": ids}


INPUTS["eos"] = _eos

ALL = BERT_HEADS + GPT2_HEADS + FAMILIES
EXPERTS = Case("MixtralForCausalLM", "AutoModelForCausalLM", mixtral)
BY_BASE = {case.base: case for case in (*ALL, EXPERTS)}
DIFFERENT = [
    BY_BASE[base]
    for base in (
        "BertForMaskedLM",  # a tied head
        "GPT2DoubleHeadsModel",  # Conv1D; no Auto class
        "AlbertForMaskedLM",  # one layer in every place
        "LlamaForCausalLM",  # an untied head
        "T5ForConditionalGeneration",  # encoder and decoder, which share a table
        "BartForConditionalGeneration",
        "ViTForImageClassification",  # no tokens
    )
]
"""One case of each kind that the package tells apart."""


def outputs(model, batch):
    """Every tensor that a forward returns, as a flat list."""
    with torch.no_grad():
        return [t for t in _flat(model(**batch).to_tuple()) if t is not None]


def _flat(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
