"""Benchmarks of single parts on shapes of real models: `python -m lsiq.bench.NAME --help`."""
