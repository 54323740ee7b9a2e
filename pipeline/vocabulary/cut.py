"""A recipe's ``vocabulary``: the tokens that stay, and the tokenizer that knows them alone."""

import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.data.token_bytes import content_of
from pipeline.models.gguf_tokenizer import TOKENIZER_SAMPLES
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import VocabularySection
from pipeline.vocabulary.cut_tokenizer import check_can_be_cut, cut_tokenizer, ids_put_around
from pipeline.vocabulary.kept import always_kept, most_frequent, written_in

_ADDED = "added_tokens_decoder"
"""Key of ``tokenizer_config.json`` under which older files repeat added tokens, by their ids."""


@dataclass(frozen=True)
class CutVocabulary:
    """Part of a vocabulary. ``kept``: its ids in the full one, int64 [n], ascending: row i of the cut model's tables is
    row ``kept[i]`` of the full model's, which has ``rows`` of them. ``ids``: how many ids the full tokenizer and model
    have. ``tokenizer``: transformers' tokenizer with these tokens alone."""

    kept: Tensor
    rows: int
    ids: int
    tokenizer: Any

    @property
    def new_ids(self) -> Tensor:
        """The id here of each id of the full vocabulary, int64 [ids]; -1 for those that went."""
        numbers = torch.full((self.ids,), -1, dtype=torch.int64)
        numbers[self.kept] = torch.arange(len(self.kept))
        return numbers


def cut_vocabulary(
    section: VocabularySection, tokenizer: Any, rows: int, named: Collection[int], order: Sequence[int]
) -> CutVocabulary:
    """Cut the vocabulary of ``tokenizer`` as a recipe says.

    ``rows``: of the model's table; ``named``: ids that configurations name; ``order``: all ids below ``rows``, the most
    frequent first, which only ``keep`` asks for. Raises InputError for a tokenizer that cannot be cut, and a ``keep``
    that is less than what stays in any case.
    """
    content = content_of(tokenizer)
    check_can_be_cut(content)
    always = always_kept(content, rows, {*named, *ids_put_around(content)})
    added = {token["id"] for token in content["added_tokens"]}
    candidates = (
        set(content["model"]["vocab"].values()) if section.scripts is None else written_in(content, section.scripts)
    )
    candidates = {index for index in candidates - (added - always) if index < rows}
    if section.keep is None:
        kept = always | candidates
    else:
        kept = most_frequent(content, order, always, candidates, section.keep)
    return CutVocabulary(
        kept=torch.tensor(sorted(kept)),
        rows=rows,
        ids=max(rows, 1 + max(tokenizer.get_vocab().values())),
        tokenizer=_reload(tokenizer, cut_tokenizer(content, kept), sorted(kept)),
    )


def _reload(tokenizer: Any, content: dict[str, Any], kept: Sequence[int]) -> Any:
    """Transformers' tokenizer of ``content``, with all else as ``tokenizer`` has it; loaded from a folder, as that of
    an artefact will be. Raises InputError if it does not give texts back."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if _ADDED in config:
            numbers = {str(old): str(new) for new, old in enumerate(kept)}
            config[_ADDED] = {numbers[old]: token for old, token in config[_ADDED].items() if old in numbers}
            path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        cut = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for key in ("is_local", "local_files_only"):  # how it was found; would be saved with it
        cut.init_kwargs.pop(key, None)
    for text in TOKENIZER_SAMPLES:
        expected, found = (each.decode(each(text, add_special_tokens=False)["input_ids"]) for each in (tokenizer, cut))
        if found != expected:
            raise InputError(f"vocabulary: {text!r} comes back as {found!r} from the cut tokenizer, not {expected!r}")
    return cut
