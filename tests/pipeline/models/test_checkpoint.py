"""Folders that are no checkpoint of a whole, unquantized model are refused before anything else, and say why."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_samples import byte_level_tokenizer, tiny_llama, write_gguf
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from pipeline.models.causal_lm import load_language_config, load_language_model, load_tokenizer
from pipeline.models.image_classifier import load_config, load_preprocessing
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import CausalLanguageModel, DigitsData, PretrainedModel

ALREADY = "the weights are already quantized; take the model's original weights"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def section(path: Path) -> CausalLanguageModel:
    return CausalLanguageModel(source="causal_lm", path=str(path))


def change(folder: Path, edit: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    edit(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path) -> str:
    """What the plan says, which reads no weights."""
    with pytest.raises(InputError) as caught:
        load_language_config(section(folder))
    message = str(caught.value)
    assert message.startswith(f"model.path: {folder}: ")
    return message.removeprefix(f"model.path: {folder}: ")


# --- quantized weights -----------------------------------------------------------------------------------------

QUANTIZED = [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),  # of before there was a quant_method
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "torchao", "quant_type": "int4"}}, "torchao"),
    ({"quantization_config": {"quant_method": "of-next-year"}}, "of-next-year"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "{'group_size': 64, 'bits': 4}"),  # MLX
]


@pytest.mark.parametrize(("values", "method"), QUANTIZED)
def test_quantized_weights_are_refused_with_their_method(values: dict[str, Any], method: str, llama: Path) -> None:
    change(llama, lambda config: config.update(values))
    assert refused(llama).startswith(f"config.json: {next(iter(values))}: {method}: {ALREADY}")


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_what_quantizers_leave_beside_weights_tells_too(file: str, llama: Path) -> None:
    (llama / file).write_text('{"bits": 4}', encoding="utf-8")
    assert refused(llama).startswith(f"{file}: {ALREADY}")


def test_key_without_a_value_is_no_quantization(llama: Path) -> None:
    change(llama, lambda config: config.update(quantization_config=None))
    assert load_language_config(section(llama)).model_type == "llama"


def test_scales_beside_weights_are_seen_when_these_are_read(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"it holds model\.layers\.0\.mlp\.up_proj\.weight_scale_inv: {ALREADY}"):
        load_language_model(section(llama))


def test_quantized_image_classifier_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    model = PretrainedModel(source="pretrained", path=str(tmp_path))
    assert load_config(model, 2).model_type == "vit"
    change(tmp_path, lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(InputError, match=f"config.json: quantization_config: bitsandbytes: {ALREADY}"):
        load_config(model, 2)
    with pytest.raises(InputError, match=ALREADY):
        load_preprocessing(model, DigitsData(source="digits", image_size=8))


# --- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_adapter_is_to_be_merged_first(alone: bool, llama: Path) -> None:
    """Beside a whole model too: the model would be taken, and the adapter forgotten."""
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (llama / "adapter_model.safetensors").write_bytes(b"")
    if alone:
        (llama / "config.json").unlink()
        (llama / "model.safetensors").unlink()
    assert refused(llama).startswith(
        "an adapter of org/base (it has adapter_config.json), not a whole model; merge the adapter first"
    )


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [(), ("tokenizer.json", "tokenizer_config.json"), ("model.safetensors",)])
def test_folder_without_a_configuration(kept: tuple[str, ...], llama: Path) -> None:
    for path in llama.iterdir():
        if path.name not in kept:
            path.unlink()
    assert refused(llama) == "no config.json in this folder; give the folder of a whole model"


def test_gguf_file_is_pointed_to_its_key(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    assert refused(tmp_path).endswith("a whole model, and model.gguf_file: tiny.gguf for the GGUF file")
    expected = "a file; give the folder that it is in, and model.gguf_file: tiny.gguf for the GGUF file"
    assert refused(tmp_path / "tiny.gguf") == expected


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": 3}', '{"model_type": null}'])
def test_configuration_without_a_model_type(content: str, llama: Path) -> None:
    (llama / "config.json").write_text(content, encoding="utf-8")
    assert refused(llama).startswith("config.json: model_type is missing; take the model's own config.json")


def test_missing_shards_are_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    tiny_llama().save_pretrained(llama, max_shard_size="20KB")
    shards = sorted(llama.glob("model-*.safetensors"))
    assert len(shards) == 6
    assert load_language_model(section(llama)).model.config.hidden_size == 32
    shards[1].unlink()
    shards[4].unlink()
    assert refused(llama) == (
        "model.safetensors.index.json names 6 files of weights, 2 of them missing: model-00002-of-00006.safetensors, "
        "model-00005-of-00006.safetensors; download the model again"
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_of_shards(content: str, llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert refused(llama).startswith("model.safetensors.index.json: cannot load it")


def test_pickled_weights_are_read_as_tensors_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    loaded = load_language_model(section(llama)).model
    assert torch.equal(loaded.get_parameter("model.norm.weight"), weights["model.norm.weight"])

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"a": Touch()}, llama / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(InputError, match=r"hold more than tensors, which loading would execute; .* safetensors"):
        load_language_model(section(llama))
    assert not (tmp_path / "executed").exists()


# --- code ------------------------------------------------------------------------------------------------------


def test_models_that_bring_code_are_refused_without_a_question(llama: Path) -> None:
    change(llama, lambda config: config.update(model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}))
    (llama / "configuration_mine.py").write_text("raise SystemExit('executed')\n", encoding="utf-8")
    assert "it needs code that comes with it, which is not executed here" in refused(llama)


def test_tokenizers_that_bring_code_are_refused_without_a_question(llama: Path) -> None:
    mine = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    change(llama, lambda config: config.update(mine), "tokenizer_config.json")
    (llama / "tokenization_mine.py").write_text("raise SystemExit('executed')\n", encoding="utf-8")
    with pytest.raises(InputError, match="it needs code that comes with it, which is not executed here"):
        load_tokenizer(section(llama))


@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2", "bart"])
def test_other_kinds_of_models_are_refused(kind: str, llama: Path) -> None:
    change(llama, lambda config: config.update(model_type=kind))
    with pytest.raises(InputError, match=rf"^model type '{kind}' has no MLPs known to FiPS; supported: gemma2, "):
        load_language_config(section(llama))
