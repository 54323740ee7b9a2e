"""Language models in plain ONNX Runtime: inputs of a graph with a key-value cache, and greedy decoding.

Such a graph reads ``input_ids`` int64 [batch, tokens], ``attention_mask`` int64 [batch, past and new tokens] and the
cache ``past_key_values.N.key`` and ``.value`` float32 [batch, heads, past tokens, head size], and returns ``logits``
float32 [batch, kept tokens, vocabulary] and the grown cache as ``present.N.key`` and ``.value``. Zeros in the mask,
where padding stands, may stand anywhere. Kept are the last ``logits_to_keep`` tokens, an input int64 [1] that may be
left out and is 1 then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

_PAST, _PRESENT = "past_key_values.", "present."
LOGITS_TO_KEEP = "logits_to_keep"
OWN_POSITIONS = "rotary/own_positions"
"""The node of an exported graph that looks up the positions of new tokens, of which there are as many as the longest
text has tokens."""
_TOO_LONG = (OWN_POSITIONS, "cos_cache")
"""What ONNX Runtime's error names if a text is longer; the latter in graphs exported by earlier versions."""
PREFILL_TOKENS = 128
"""Tokens of a prompt that are run together. Logits of a whole prompt would take gigabytes: 4 bytes per token and entry
of the vocabulary."""


def complete_inputs(session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Add to ``inputs`` what else the graph of ``session`` reads, for texts without a past: an attention mask of ones,
    an empty cache, and that the logits of all tokens are to be kept. Inputs of graphs that read none of it are returned
    as they are.

    Raises ValueError for token ids that the model does not have, or for no texts (:func:`checked_token_ids`).
    """
    result = dict(inputs)
    if "input_ids" in result:
        result["input_ids"] = checked_token_ids(session, result["input_ids"])
    elif any(value.name == "input_ids" for value in session.get_inputs()):
        raise ValueError("input_ids are missing")
    for value in session.get_inputs():
        if value.name in result:
            continue
        if value.name == "attention_mask":
            result[value.name] = np.ones(result["input_ids"].shape, np.int64)
        elif value.name.startswith(_PAST):
            _, heads, _, size = value.shape
            result[value.name] = np.zeros((len(result["input_ids"]), heads, 0, size), np.float32)
    if "input_ids" in result and _has_logits_to_keep(session):
        result.setdefault(LOGITS_TO_KEEP, np.array([result["input_ids"].shape[1]]))
    return result


def _has_logits_to_keep(session: onnxruntime.InferenceSession) -> bool:
    """Whether the graph may be told so; those that were exported by earlier versions give the logits of all tokens."""
    return any(value.name == LOGITS_TO_KEEP for value in session.get_overridable_initializers())


def checked_token_ids(session: onnxruntime.InferenceSession, input_ids: Any) -> NDArray[np.int64]:
    """``input_ids`` as int64 [batch, tokens].

    ONNX Runtime does not check ids: a packed token table gives zeros for those that it does not have, and takes
    negative ones from its end. Raises ValueError for one outside the vocabulary (the last axis of the logits of
    ``session``, where the graph says how long it is), naming both; for what is not integers [batch, tokens]; and for no
    texts, which some models' graphs do not survive. Texts may be without tokens: feeds to put tokens into later.
    """
    ids = np.asarray(input_ids)
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise ValueError(f"token ids must be integers [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if not len(ids):
        raise ValueError(f"token ids [batch, tokens] of no texts: {list(ids.shape)}")
    vocabulary = next((value.shape[-1] for value in session.get_outputs() if value.name == "logits"), None)
    for worst in (int(ids.min()), int(ids.max())) if ids.size else ():
        if isinstance(vocabulary, int) and not 0 <= worst < vocabulary:
            raise ValueError(f"token id {worst} is not in the model's vocabulary of {vocabulary:,}")
        if worst < 0:
            raise ValueError(f"token id {worst} is negative")
    return ids.astype(np.int64, copy=False)


def prefill_inputs(session: onnxruntime.InferenceSession, input_ids: NDArray[np.int64]) -> dict[str, Any]:
    """All inputs of a graph that reads ``input_ids`` int64 [batch, tokens] as the start of texts. Raises ValueError as
    :func:`complete_inputs` does."""
    return complete_inputs(session, {"input_ids": input_ids})


def greedy_tokens(
    session: onnxruntime.InferenceSession, prompt: Sequence[int], count: int, stop: Collection[int] = ()
) -> list[int]:
    """The ``count`` most likely tokens after ``prompt``, one by one, fewer if one is in ``stop`` (it comes last).

    Raises ValueError for an empty prompt, ids that the model does not have, a negative count, and once the text is
    longer than the model was exported for.
    """
    if not len(prompt):
        raise ValueError("the prompt has no tokens")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    outputs = [value.name for value in session.get_outputs()]
    feeds = prefill_inputs(session, np.asarray(prompt)[None])
    feeds.pop(LOGITS_TO_KEEP, None)
    waiting, seen = feeds["input_ids"][0].tolist(), 0
    generated: list[int] = []
    while len(generated) < count:
        tokens, waiting = waiting[:PREFILL_TOKENS], waiting[PREFILL_TOKENS:]
        seen += len(tokens)
        feeds["input_ids"] = np.array([tokens], np.int64)
        feeds["attention_mask"] = np.ones((1, seen), np.int64)
        try:
            results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        except Exception as error:  # onnxruntime's errors have no public class
            if not any(name in str(error) for name in _TOO_LONG):
                raise
            raise ValueError(f"a text of {seen} tokens is longer than the model was exported for") from error
        for name, cache in results.items():
            if name.startswith(_PRESENT):
                feeds[_PAST + name.removeprefix(_PRESENT)] = cache
        if waiting:
            continue
        token = int(results["logits"][0, -1].argmax())
        generated.append(token)
        if token in stop:
            break
        waiting = [token]
    return generated
