"""Tokenizers that onnxruntime-genai reads otherwise than transformers, or not at all, are refused by name."""

from pathlib import Path
from typing import Any

import pytest
from causal_lm_samples import MAX_LENGTH, tiny_language_model
from language_samples import SPECIAL, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exporters.genai_config import TokenizerError, check_tokenizers, save_causal_lm_config


def save(tokenizer: Any, folder: Path, **changes: Any) -> None:
    save_causal_lm_config(folder, tiny_language_model("llama", **changes), tokenizer, MAX_LENGTH)


def with_token(content: str, **flags: bool) -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(content, **flags)])
    return tokenizer


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"normalized": False}, {"special": True, "rstrip": True}])
@pytest.mark.parametrize("content", ["<x>", "the", "\n\n", "é"])
def test_added_tokens_on_which_both_agree(content: str, flags: dict[str, bool], tmp_path: Path) -> None:
    save(with_token(content, **flags), tmp_path)


@pytest.mark.parametrize(
    ("flag", "place", "found", "expected"),
    [
        # The space before it is a token of its own, or part of the added one.
        ("lstrip", "'a <x> b'", r"\[225, 265, 225, 70\]", r"\[265, 225, 70\]"),
        # Beside a letter it is the added token, or "<", "x", ">".
        ("single_word", "'<x>a'", r"\[265, 69\]", r"\[32, 92, 34, 69\]"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_added_token_that_is_found_elsewhere_is_named(
    flag: str, place: str, found: str, expected: str, special: bool, tmp_path: Path
) -> None:
    tokenizer = with_token("<x>", special=special, **{flag: True})
    message = rf"of {place} than .*{found}, expected {expected}; .*'<x>' has {flag}: true.*set it to false"
    with pytest.raises(TokenizerError, match=message):
        save(tokenizer, tmp_path)


def test_one_token_among_thousands_is_named(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<unused{n}>", lstrip=n == 2999) for n in range(6000)])
    with pytest.raises(TokenizerError, match="'<unused2999>' has lstrip: true"):
        save(tokenizer, tmp_path)


def test_texts_are_compared_without_special_tokens_too(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    save(tokenizer, tmp_path)

    class WithBosAlways:
        """A tokenizer that puts ``<bos>`` before a text also where it was asked not to."""

        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

        def __call__(self, texts: list[str], **_: Any) -> Any:
            return tokenizer(texts)

    with pytest.raises(TokenizerError, match=r"from token 0 on \[56, 76, 73\], expected \[2, 56, 76, 73\]"):
        check_tokenizers(tmp_path, WithBosAlways(), ["The"])


def of_model(model: Any) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


IDS = {token: index for index, token in enumerate([*SPECIAL, "a", "b"])}


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([(token, -float(index)) for token, index in IDS.items()], unk_id=3),
        models.WordPiece(IDS, unk_token="<unk>"),
        models.WordLevel(IDS, unk_token="<unk>"),
    ],
)
def test_kinds_of_tokenizers_that_cannot_be_read_are_named(model: Any, tmp_path: Path) -> None:
    """And onnxruntime-genai does not see them: with a WordPiece, it ended the process once in a few times."""
    kind = type(model).__name__
    with pytest.raises(TokenizerError, match=f"cannot read the tokenizer: it is of type {kind}, not BPE; take a model"):
        save(of_model(model), tmp_path)


def test_normalizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerError, match=r"onnxruntime-genai's tokenizer makes other tokens of .The quick"):
        save(tokenizer, tmp_path)


@pytest.mark.parametrize("end", [None, [], 265, [1, 265], -1])
def test_model_without_an_end_of_text_is_refused(end: Any, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(bos=False).backend_tokenizer)
    with pytest.raises(TokenizerError, match=r"eos_token_id.*set eos_token_id in config\.json or generation_config"):
        save(tokenizer, tmp_path, eos_token_id=end)
    save(tokenizer, tmp_path, eos_token_id=[1, 2])
