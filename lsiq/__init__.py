"""lsiq: experiments in post-training quantisation of large language models."""

__version__ = "0.1.0"
