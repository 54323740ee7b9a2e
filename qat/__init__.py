"""Quantization-aware training of factors with torchao, and freezing them to the integer codes of fips_ort."""
