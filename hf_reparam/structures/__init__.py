"""Every way to hold a part of a model with fewer parameters, in the order in which they apply."""

from hf_reparam.structures.experts import Experts
from hf_reparam.structures.heads import Heads
from hf_reparam.structures.linear import Linears
from hf_reparam.structures.multihead import changed, close_attentions, open_attentions
from hf_reparam.structures.structure import Structure
from hf_reparam.structures.table import Tables

__all__ = ["STRUCTURES", "Structure", "changed", "close_attentions", "open_attentions"]

STRUCTURES: tuple[Structure, ...] = (Heads(), Tables(), Linears(), Experts())
"""Heads change the shapes of dense layers, and so come first; going back to dense, they come last."""
