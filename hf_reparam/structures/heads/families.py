"""Attentions of Transformers whose heads can be made narrower: positions are learned or relative, not rotary."""

from hf_reparam.structures.heads.attention import AttentionType, register_attention

_BERT = AttentionType(
    "self.query",
    "self.key",
    "self.value",
    "output.dense",
    holder="self",
    width="attention_head_size",
    size="all_head_size",
)
_BART = AttentionType("q_proj", "k_proj", "v_proj", "out_proj")
_T5 = AttentionType("q", "k", "v", "o", width="key_value_proj_dim", size="inner_dim")
_GPT2 = AttentionType("c_attn", "c_attn", "c_attn", "c_proj", split="split_size")

_ALBERT = AttentionType("query", "key", "value", "dense", width="attention_head_size", size="all_head_size")
_DISTILBERT = AttentionType("q_lin", "k_lin", "v_lin", "out_lin", width="attention_head_size", size="dim")

_CLASSES = {
    ("albert", "AlbertAttention"): _ALBERT,
    ("distilbert", "DistilBertSelfAttention"): _DISTILBERT,
    ("bert", "BertAttention"): _BERT,
    ("roberta", "RobertaAttention"): _BERT,
    ("xlm_roberta", "XLMRobertaAttention"): _BERT,
    ("camembert", "CamembertAttention"): _BERT,
    ("electra", "ElectraAttention"): _BERT,
    ("bart", "BartAttention"): _BART,
    ("mbart", "MBartAttention"): _BART,
    ("marian", "MarianAttention"): _BART,
    ("pegasus", "PegasusAttention"): _BART,
    ("blenderbot", "BlenderbotAttention"): _BART,
    ("opt", "OPTAttention"): _BART,
    ("clip", "CLIPAttention"): _BART,
    ("t5", "T5Attention"): _T5,
    ("mt5", "MT5Attention"): _T5,
    ("umt5", "UMT5Attention"): _T5,
    ("gpt2", "GPT2Attention"): _GPT2,
}


for (_family, _name), _entry in _CLASSES.items():
    register_attention(f"transformers.models.{_family}.modeling_{_family}.{_name}", _entry)
register_attention("hf_reparam.structures.multihead.SplitMultiheadAttention", _BART)
