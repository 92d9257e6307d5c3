"""Calibration data in, moments out: reading batches, telling padding, watching layers."""
