"""Benchmarks of the native kernels: ``python -m benchmarks.kernels``. Not installed; run them from the repository."""
