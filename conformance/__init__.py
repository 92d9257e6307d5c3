"""Transformers' own common tests, run over converted models and, beside them, over the stock classes."""
