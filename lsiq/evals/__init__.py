"""Evaluation: what is measured on a float model and on its quantised blocks."""
