"""Attentions of Transformers whose heads can be made narrower: positions are learned or relative, not rotary."""

from hf_reparam.structures.heads.attention import AttentionType, register_attention

_BERT = AttentionType(
    *("self.query", "self.key", "self.value", "output.dense"),
    holder="self",
    width="attention_head_size",
    size="all_head_size",
)
_BART = AttentionType("q_proj", "k_proj", "v_proj", "out_proj")
_T5 = AttentionType("q", "k", "v", "o", width="key_value_proj_dim", size="inner_dim")
_GPT2 = AttentionType("c_attn", "c_attn", "c_attn", "c_proj", split="split_size")
_ALBERT = AttentionType("query", "key", "value", "dense", width="attention_head_size", size="all_head_size")
_DISTILBERT = AttentionType("q_lin", "k_lin", "v_lin", "out_lin", width="attention_head_size", size="dim")

for _entry, _classes in (
    (_ALBERT, "albert.Albert"),
    (_BERT, "bert.Bert roberta.Roberta xlm_roberta.XLMRoberta camembert.Camembert electra.Electra"),
    (_BART, "bart.Bart mbart.MBart marian.Marian pegasus.Pegasus blenderbot.Blenderbot opt.OPT clip.CLIP"),
    (_DISTILBERT, "distilbert.DistilBertSelf"),
    (_GPT2, "gpt2.GPT2"),
    (_T5, "t5.T5 mt5.MT5 umt5.UMT5"),
):
    for _name in _classes.split():
        _family, _start = _name.split(".")
        register_attention(f"transformers.models.{_family}.modeling_{_family}.{_start}Attention", _entry)
register_attention("hf_reparam.structures.multihead.SplitMultiheadAttention", _BART)
