"""Fused paths for the accelerator, each with the plain version that it equals.

`fakequant` and `band` are the Triton kernels of learned methods, `columns` is that of GPTQ.
"""
