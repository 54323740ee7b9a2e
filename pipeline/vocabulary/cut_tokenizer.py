"""A tokenizer with fewer tokens: what becomes of its ``tokenizer.json``.

Ids are given anew, in their old order. Merges stay whose two parts and whose result stay, but only one for each token,
its derivation: encoding uses no others (:mod:`exporters.merges`), and most of a file are others.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from exporters.merges import derivation_merges
from pipeline.data.token_bytes import byte_tokens, is_byte_level
from pipeline.plumbing.errors import InputError

_POST_PROCESSORS_WITHOUT_IDS = ("ByteLevel",)


def check_can_be_cut(content: Mapping[str, Any]) -> None:
    """Raise InputError unless a ``tokenizer.json`` is of byte pairs that can spell every text by single bytes."""
    model = content["model"]
    lacking = [token for token in byte_tokens(content) if token not in model.get("vocab", {})]
    problem = None
    if model["type"] != "BPE":
        problem = f"it is of type {model['type']}, not BPE"
    elif model.get("dropout"):
        problem = "it joins tokens at random (dropout)"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "it marks where words go on or end (continuing_subword_prefix, end_of_word_suffix)"
    elif not is_byte_level(content) and not model.get("byte_fallback"):
        problem = "it has no fallback to single bytes, so that text would be lost"
    elif lacking:
        problem = f"it has no token for some single bytes ({lacking[0]!r} for one), so that text would be lost"
    else:
        problem = _unknown_post_processor(content.get("post_processor"))
    if problem is not None:
        raise InputError(
            f"vocabulary: the model's tokenizer cannot be cut: {problem}; leave vocabulary out, or take a model whose "
            "tokenizer.json has byte pairs, at byte level or with byte_fallback"
        )


def cut_tokenizer(content: Mapping[str, Any], kept: Collection[int]) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that :func:`check_can_be_cut` passes, with the tokens of the ids ``kept``
    alone. Token number i has the i-th of these ids in ascending order."""
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    cut = {key: copy.deepcopy(value) for key, value in content.items() if key != "model"}
    model = content["model"]
    vocabulary = {token: numbers[index] for token, index in model["vocab"].items() if index in numbers}
    merges = [list(pair) for pair in derivation_merges(model) if {*pair, "".join(pair)} <= vocabulary.keys()]
    cut["model"] = {key: copy.deepcopy(value) for key, value in model.items() if key not in ("vocab", "merges")}
    cut["model"] |= {"vocab": vocabulary, "merges": merges}
    cut["added_tokens"] = [
        {**token, "id": numbers[token["id"]]} for token in cut["added_tokens"] if token["id"] in numbers
    ]
    _renumber_post_processor(cut.get("post_processor"), numbers)
    if cut.get("padding") is not None:
        cut["padding"]["pad_id"] = numbers[cut["padding"]["pad_id"]]
    return cut


def ids_put_around(content: Mapping[str, Any]) -> set[int]:
    """Ids that a ``tokenizer.json`` puts around a text or fills it up with."""
    padding = content.get("padding")
    around = {index for ids in _special_ids(content.get("post_processor")) for index in ids}
    return around | ({padding["pad_id"]} if padding is not None else set())


# --- post-processors: what goes around a text ------------------------------------------------------------------


def _unknown_post_processor(part: Any) -> str | None:
    """What is wrong with a post-processor of which it is not known where it holds ids."""
    if part is None or part["type"] in ("TemplateProcessing", *_POST_PROCESSORS_WITHOUT_IDS):
        return None
    if part["type"] == "Sequence":
        return next((found for inner in part["processors"] if (found := _unknown_post_processor(inner))), None)
    return f"what it puts around a text (post_processor) is of type {part['type']}, not TemplateProcessing"


def _special_ids(part: Any) -> list[list[int]]:
    """The lists of ids in a post-processor, to be read or changed."""
    if part is None or part["type"] in _POST_PROCESSORS_WITHOUT_IDS:
        return []
    if part["type"] == "Sequence":
        return [ids for inner in part["processors"] for ids in _special_ids(inner)]
    return [token["ids"] for token in part["special_tokens"].values()]


def _renumber_post_processor(part: Any, numbers: Mapping[int, int]) -> None:
    for ids in _special_ids(part):
        ids[:] = [numbers[index] for index in ids]
