"""Winning back what a conversion lost: refitting and distillation."""
