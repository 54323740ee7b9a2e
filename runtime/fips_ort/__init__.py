"""Packed low-bit and sparse weights for ONNX Runtime: formats, validation and native kernels of ``ai.fips``."""

from fips_ort.native import library_path, register

__all__ = ["library_path", "register"]
