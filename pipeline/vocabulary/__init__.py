"""Cutting a language model's vocabulary: which tokens stay, and tokenizer, model and text with them alone.

:mod:`~pipeline.vocabulary.kept` says which tokens stay, :mod:`~pipeline.vocabulary.cut_tokenizer` what becomes of
``tokenizer.json``, whose content they take as JSON gives it; :mod:`~pipeline.vocabulary.cut` makes both a tokenizer of
transformers, :mod:`~pipeline.vocabulary.cut_model` cuts the model's tables, :mod:`~pipeline.vocabulary.respelled` puts
text beside text, and :mod:`~pipeline.vocabulary.of_recipe` does all this for a recipe.
"""
