"""A language model with the rows of a cut vocabulary alone, beside the whole one."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pipeline.plumbing.errors import InputError
from pipeline.vocabulary.cut import CutVocabulary

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_UNKNOWN_LISTS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""Keys of a generation configuration that name ids in ways of their own."""


def named_ids(*configs: Any) -> set[int]:
    """Ids of tokens that configurations name, as the end of a text or what fills up a batch; None has none.

    Raises InputError for a generation configuration that names ids where they are not renumbered here.
    """
    return {index for config in configs for _, value in _ids_in(config) for index in _as_list(value)}


def cut_model(model: Any, vocabulary: CutVocabulary) -> Any:
    """A copy of a transformers causal language model whose token table and output layer have the rows of ``vocabulary``
    alone, one table for both where they are tied. All other weights are those of ``model``, not copied; configuration
    and generation configuration have the new ids."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    cut = copy.deepcopy(model, memo)
    kept, new_ids = vocabulary.kept, vocabulary.new_ids
    embedding, head = cut.get_input_embeddings(), cut.get_output_embeddings()
    tied = embedding.weight is head.weight
    embedding.weight = _rows(embedding.weight, kept)
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = _renumbered(embedding.padding_idx, new_ids)
    head.weight = embedding.weight if tied else _rows(head.weight, kept)
    head.out_features = len(kept)
    if head.bias is not None:
        head.bias = _rows(head.bias, kept)
    renumber(cut.config, len(kept), new_ids)
    if getattr(cut, "generation_config", None) is not None:
        renumber(cut.generation_config, None, new_ids)
    return cut


def renumber(config: Any, size: int | None, new_ids: Tensor) -> None:
    """Give a configuration the ids ``new_ids`` of :attr:`CutVocabulary.new_ids` and, unless it is None, the ``size`` of
    the vocabulary."""
    for key, value in list(_ids_in(config)):
        setattr(config, key, _renumbered(value, new_ids))
    if size is not None:
        config.vocab_size = size


def _rows(weight: Tensor, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach()[kept], requires_grad=weight.requires_grad)


def _ids_in(config: Any) -> Iterator[tuple[str, int | list[int]]]:
    """Keys of a configuration that name ids, and these."""
    if config is None:
        return
    for key in _UNKNOWN_LISTS:
        if getattr(config, key, None):
            raise InputError(
                f"vocabulary: generation_config.json: {key}: names tokens by their ids, which are given anew; take the "
                "key out in a copy of the model"
            )
    for key, value in config.to_dict().items():
        if (key.endswith("_token_id") or key in _ID_LISTS) and value is not None:
            yield key, value


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def _renumbered(value: int | list[int], new_ids: Tensor) -> Any:
    """The new ids of ``value``; those that the vocabulary does not have (any more) are left out, None if it is one."""
    found = [int(new_ids[index]) for index in _as_list(value) if 0 <= index < len(new_ids) and new_ids[index] >= 0]
    if isinstance(value, list):
        return found
    return found[0] if found else None
