"""Singular values, Hadamard matrices and rotations."""
