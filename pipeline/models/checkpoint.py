"""Checkpoints of transformers: a local folder or a Hugging Face id, loaded with errors that a user can act on."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from pipeline.plumbing.errors import InputError

CONFIG_ERRORS = (StrictDataclassError, TypeError, ValueError)
"""What transformers raises for settings that a model cannot have."""
_CHECKPOINT_ERRORS = (*CONFIG_ERRORS, LookupError, OSError, RuntimeError, SafetensorError, struct.error)


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Turn every error that a missing or damaged checkpoint causes into InputError, which ``where`` begins."""
    try:
        yield
    except _CHECKPOINT_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: cannot load it from a local folder or the Hugging Face hub: {reason}") from None


def load_weights(load: Callable[..., Any], where: str, kind: str, *, attention: str) -> Any:
    """A model with all its weights, in float32.

    ``load``: transformers' ``from_pretrained`` with all arguments but those that are given here. ``attention``:
    transformers' name of the implementation. ``where`` begins errors, and ``kind`` says in them what the checkpoint
    should hold. Raises InputError naming every weight that is missing or of another shape.
    """
    model, found = load(
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that we can name them
    )
    missing = sorted({*found["missing_keys"], *(str(entry[0]) for entry in found["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{where}: the checkpoint lacks weights of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(missing)}; is it {kind}?"
        )
    return model
