"""Cutting a language model's vocabulary: which tokens stay, and tokenizer, model and text with them alone.

:mod:`~pipeline.vocabulary.merges` says how byte-pair encoding makes each token, :mod:`~pipeline.vocabulary.kept` which
tokens stay, :mod:`~pipeline.vocabulary.cut_tokenizer` what becomes of ``tokenizer.json``. These are functions of its
content, a mapping as JSON gives it.
"""
