"""Tasks of tiny language models, open, with a text to go with them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from run_samples import language_recipe

from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMTask

WORDS = ("owl", "dog", "cat", "barn", "hill", "river", "waits", "sleeps", "near", "while", "the", "a")


FOREIGN_WORDS = ("the", "there", "other", "für", "Straße", "мир", "мира", "世界", "12")
"""Words of several scripts that the tokenizers of ``vocabulary_samples`` have as tokens."""


def open_multilingual_task(kind: str, folder: Path, tokenizer: Any, **changes: Any) -> CausalLMTask:
    """The task of a model of ``kind`` with a ``tokenizer`` of ``vocabulary_samples``, and a text of
    :data:`FOREIGN_WORDS`; ``changes`` are to the tiny recipe."""
    write_multilingual(kind, folder, tokenizer)
    task = make_task(language_recipe(folder / "model", folder, **changes))
    assert isinstance(task, CausalLMTask)
    task.open_dense(folder)
    return task


def write_multilingual(
    kind: str, folder: Path, tokenizer: Any, words: Sequence[str] = FOREIGN_WORDS, **changes: Any
) -> None:
    """Model, tokenizer, training and test text of :func:`open_multilingual_task`; ``changes`` are to the model's
    configuration."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(words, k=8)) for _ in range(120)]
    (folder / "train.txt").write_text("\n".join(sentences[:80]), encoding="utf-8")
    lines = (json.dumps({"text": sentence}) for sentence in sentences[80:])
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = tiny_language_model(
        kind, initializer_range=0.2, num_hidden_layers=2, layer_types=None, vocab_size=len(tokenizer), **changes
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def open_language_task(kind: str, folder: Path, **changes: Any) -> CausalLMTask:
    """The task of a model of ``kind``, two blocks of random weights; ``changes`` are to the tiny recipe."""
    draw = random.Random(0)
    sentences = [" ".join(draw.sample(WORDS, 8)) for _ in range(60)]
    (folder / "train.txt").write_text("\n".join(sentences[:40]), encoding="utf-8")
    lines = (json.dumps({"text": sentence}) for sentence in sentences[40:])
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = tiny_language_model(kind, initializer_range=0.2, num_hidden_layers=2, layer_types=None)
    model.save_pretrained(folder / "model")
    byte_level_tokenizer().save_pretrained(folder / "model")
    task = make_task(language_recipe(folder / "model", folder, **changes))
    assert isinstance(task, CausalLMTask)
    task.open_dense(folder)
    return task
