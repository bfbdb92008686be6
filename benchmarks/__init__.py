"""Benchmarks, run as `python -m benchmarks.<name>`; the harness is imbsam_fast.bench.command."""
