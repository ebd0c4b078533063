"""The jobs that people run: `python -m benchmarks`."""
