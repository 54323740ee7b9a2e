"""Parts of a GGUF file that was split give the model that the whole file gives."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from language_samples import tiny_gemma, tiny_llama, write_gguf

from pipeline.models.causal_lm import load_language_config, load_language_model, load_tokenizer
from pipeline.models.split_gguf import joined, part_names
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import CausalLanguageModel

INPUT_IDS = torch.arange(20, 60).reshape(2, 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def section(folder: Path, file: str) -> CausalLanguageModel:
    return CausalLanguageModel(source="causal_lm", path=str(folder), gguf_file=file)


def write_parts(folder: Path, model: Any, tensors: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write ``model`` with the gguf library, so many tensors in a part; the names of the parts."""
    folder.mkdir()
    writer = gguf.GGUFWriter
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", lambda *given: writer(*given, split_max_tensors=tensors))
        write_gguf(folder / "tiny.gguf", model)
    return sorted(path.name for path in folder.iterdir())


def test_names_of_parts() -> None:
    names = [f"a-b-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        assert part_names(name) == names
    assert part_names("sub/m-00002-of-00002.gguf") == ["sub/m-00001-of-00002.gguf", "sub/m-00002-of-00002.gguf"]
    for whole in ("m.gguf", "m-00001-of-00001.gguf", "m-1-of-2.gguf", "m-00001-of-00002.bin"):
        assert part_names(whole) == [whole]


@pytest.mark.parametrize("model", [tiny_gemma(), tiny_llama(tie_word_embeddings=False)])
def test_any_part_names_the_model(
    model: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_parts(tmp_path / "parts", model, 3, monkeypatch)
    assert len(names) > 5
    (tmp_path / "whole").mkdir()
    write_gguf(tmp_path / "whole" / "tiny.gguf", model)
    whole = load_language_model(section(tmp_path / "whole", "tiny.gguf"))
    for name in (names[0], names[2], names[-1]):
        loaded = load_language_model(section(tmp_path / "parts", name))
        assert loaded.source_hash == whole.source_hash
        with torch.no_grad():
            assert torch.equal(loaded.model(INPUT_IDS).logits, whole.model(INPUT_IDS).logits)
        assert loaded.tokenizer("in the world")["input_ids"] == whole.tokenizer("in the world")["input_ids"]
    assert [path.name for path in cache.rglob("*.gguf")] == [f"{Path(names[0]).stem}-joined.gguf"]  # made once


def test_parts_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_parts(tmp_path / "parts", tiny_llama(), 3, monkeypatch)
    for absent in (names[1], names[-1]):
        (tmp_path / "parts" / absent).unlink()
    message = rf"{names[0]}: of its {len(names)} parts, {names[1]}, {names[-1]} is not there; download it"
    for load in (load_language_config, load_tokenizer):
        with pytest.raises(InputError, match=message):
            load(section(tmp_path / "parts", names[0]))
    assert not (tmp_path / "cache").exists()


def test_parts_of_different_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_parts(tmp_path / "parts", tiny_llama(), 12, monkeypatch)
    others = write_parts(tmp_path / "others", tiny_llama(num_hidden_layers=1), 6, monkeypatch)
    assert len(names) == len(others) == 2
    (tmp_path / "others" / others[1]).replace(tmp_path / "parts" / names[1])
    with pytest.raises(InputError, match=r"its 2 parts do not belong together: .*split\.tensors\.count says 21"):
        load_language_config(section(tmp_path / "parts", names[0]))
    (tmp_path / "parts" / names[1]).write_bytes(b"GGUF, but no more")
    with pytest.raises(InputError, match=rf"{names[1]}: not a readable GGUF file"):
        load_language_config(section(tmp_path / "parts", names[0]))


def test_part_of_another_name_is_not_taken_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_parts(tmp_path / "parts", tiny_llama(), 12, monkeypatch)
    (tmp_path / "parts" / names[0]).rename(tmp_path / "parts" / "tiny.gguf")
    with pytest.raises(InputError, match=r"tiny\.gguf: it is one of 2 parts of a model \(split\.count\)"):
        load_language_config(section(tmp_path / "parts", "tiny.gguf"))


def test_quantized_tensors_and_alignment_are_kept(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05d}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        if number == 1:  # as llama.cpp has it: all metadata is in the first part, its alignment too
            writer.add_custom_alignment(64)
            writer.add_array("some.words", ["a", "b"])
            writer.add_tensor("plain", values)
        else:
            writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    read = gguf.GGUFReader(joined("m-00002-of-00002.gguf", lambda name: tmp_path / name))
    assert read.alignment == 64
    assert read.fields["some.words"].contents() == ["a", "b"]
    assert "split.count" not in read.fields
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert np.array_equal(tensors["plain"].data, values)
    assert tensors["blocks"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(tensors["blocks"].data, blocks)
