"""Texts and their tokens, for calibration and evaluation alike."""
