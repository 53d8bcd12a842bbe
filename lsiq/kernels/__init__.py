"""Fused paths for the accelerator, each with the plain version that it equals.

`fakequant` and `band` are Triton kernels, `weights` makes a block's rounded weights from its parameters with them,
`choice` says which path a block takes.
"""
