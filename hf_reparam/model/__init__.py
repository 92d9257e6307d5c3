"""Hugging Face Transformers: what loads, runs and saves converted models."""

from hf_reparam.model import attention_types, dense_types

dense_types.register_all()
attention_types.register_all()
