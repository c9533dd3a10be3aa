"""Benchmarks: what hostler costs beyond its bare limits, raw QEMU and bare Celery, measured side by side in one run.

``python -m tests.benchmarks [NAME..] [--runs N] [--json]``; see docs/benchmarks.md.
"""

BARE_OPTIONS = "BENCHMARK_CELERY_OPTIONS"
"""Environment variable: the JSON file with the bare worker's Celery settings."""

BARE_READY = "bare worker is ready"
"""What the bare worker prints once it consumes."""
