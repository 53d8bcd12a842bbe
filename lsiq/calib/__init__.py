"""Calibration: the corpora, the tokens drawn from them, and the streams they become inside a model."""
