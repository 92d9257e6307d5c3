"""Hugging Face Transformers: the only folder below `convert` and `merge` that imports transformers."""

from hf_reparam.hf import heads, linears

linears.register_all()
heads.register_all()
