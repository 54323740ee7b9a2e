"""Tasks of tiny language models, open, with a text to go with them."""

import json
import random
from pathlib import Path
from typing import Any

from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from run_samples import language_recipe

from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMTask

WORDS = ("owl", "dog", "cat", "barn", "hill", "river", "waits", "sleeps", "near", "while", "the", "a")


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
