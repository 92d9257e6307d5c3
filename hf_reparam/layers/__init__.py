"""Modules and their surgery: dense types, low-rank layers, copies, offloaded weights. Knows no transformers models."""
