"""Ranks from budgets, layers from ranks, and back: planning, convert, merge."""
