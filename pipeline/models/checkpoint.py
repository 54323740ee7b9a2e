"""Checkpoints of transformers: a local folder or a Hugging Face id, loaded with errors that a user can act on."""

import json
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.peft_utils import find_adapter_config_file

from pipeline.plumbing.errors import InputError

CONFIG_ERRORS = (StrictDataclassError, TypeError, ValueError)
"""What transformers raises for settings that a model cannot have."""
_CHECKPOINT_ERRORS = (*CONFIG_ERRORS, LookupError, OSError, RuntimeError, SafetensorError, struct.error)
_REMOTE_CODE = "contains custom code"
"""What transformers' errors say of models that bring code of their own."""
_QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")
"""Keys under which a configuration says that its weights are quantized: transformers' own, one that it had for
compressed-tensors, and MLX's."""
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt leave beside weights that they quantized."""
_SCALES = (".weight_scale", ".weight_scale_inv", ".qweight", ".weight_packed", ".scales", ".weight.absmax", ".SCB")
"""How names of tensors end that only quantized weights have."""
_ALREADY_QUANTIZED = "the weights are already quantized; take the model's original weights (float16, bfloat16, float32)"


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Turn every error that a missing or damaged checkpoint causes into InputError, which ``where`` begins."""
    try:
        yield
    except pickle.UnpicklingError:
        raise InputError(
            f"{where}: its weights hold more than tensors, which loading would execute; take a checkpoint in "
            "safetensors"
        ) from None
    except _CHECKPOINT_ERRORS as error:
        if _REMOTE_CODE in str(error):
            raise InputError(
                f"{where}: auto_map in its configuration: it needs code that comes with it, which is not executed "
                "here; take a model that transformers knows itself"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: cannot load it from a local folder or the Hugging Face hub: {reason}") from None


def load_checkpoint_config(path: str, revision: str | None, where: str) -> Any:
    """The configuration of a checkpoint whose weights could be trained; they are not read.

    ``where`` begins errors. Raises InputError when it is not found, is an adapter, has quantized weights, lacks a
    shard, or needs code of its own.
    """
    folder = Path(path)
    check_no_file(folder, where)
    with loading(where):
        if not folder.is_dir():  # on the hub: what is wrong with the way there is said here
            cached_file(path, CONFIG_NAME, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
        adapter = find_adapter_config_file(path, revision=revision)
    if adapter is not None:
        raise InputError(
            f"{where}: an adapter{_base_of(adapter)} (it has {Path(adapter).name}), not a whole model; merge the "
            "adapter first (merge_and_unload() of peft) and give the folder in which the merged model was saved"
        )
    if folder.is_dir():
        _check_files(folder, where)
    with loading(where):
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    check_original(config, where)
    return config


def check_no_file(path: Path, where: str) -> None:
    """Raise InputError, which ``where`` begins, if ``path``, to be the folder of a checkpoint, is a file."""
    if path.is_file():
        raise InputError(f"{where}: a file; give the folder that it is in{_gguf_hint([path])}")


def check_original(config: Any, where: str) -> None:
    """Raise InputError if a checkpoint's configuration says that its weights are quantized."""
    for part in (config, config.get_text_config()):
        for key in _QUANTIZATIONS:
            found = getattr(part, key, None)
            if found:
                raise InputError(f"{where}: config.json: {key}: {_method_of(found)}: {_ALREADY_QUANTIZED}")


def load_weights(load: Callable[..., Any], where: str, kind: str, *, attention: str) -> Any:
    """A model with all its weights, in float32.

    ``load``: transformers' ``from_pretrained`` with all arguments but those that are given here. ``attention``:
    transformers' name of the implementation. ``where`` begins errors, and ``kind`` says in them what the checkpoint
    should hold. Raises InputError naming every weight that is missing or of another shape, and for weights that have
    scales beside them.
    """
    model, found = load(
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that we can name them
    )
    scales = sorted(name for name in found["unexpected_keys"] if name.endswith(_SCALES))
    if scales:
        raise InputError(f"{where}: it holds {scales[0]}: {_ALREADY_QUANTIZED}")
    missing = sorted({*found["missing_keys"], *(str(entry[0]) for entry in found["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{where}: the checkpoint lacks weights of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(missing)}; is it {kind}?"
        )
    return model


def _check_files(folder: Path, where: str) -> None:
    """Raise InputError for a local folder that is no checkpoint, or an incomplete one."""
    for name in _QUANTIZATION_FILES:
        if (folder / name).is_file():
            raise InputError(f"{where}: {name}: {_ALREADY_QUANTIZED}")
    config = folder / "config.json"
    if not config.is_file():
        hint = _gguf_hint(folder.glob("*.gguf"))
        raise InputError(f"{where}: no config.json in this folder; give the folder of a whole model{hint}")
    with loading(f"{where}: config.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise InputError(
            f"{where}: config.json: model_type is missing; take the model's own config.json, in the form of "
            "transformers"
        )
    _check_shards(folder, where)


def _check_shards(folder: Path, where: str) -> None:
    """Raise InputError naming every file of a local folder's sharded weights that is not there."""
    for whole, name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        index = folder / name
        if (folder / whole).is_file():
            return  # transformers takes it, whatever an index says
        if not index.is_file():
            continue
        with loading(f"{where}: {name}"):
            weights = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            shards = sorted({str(shard) for shard in weights.values()})
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
        if missing:
            raise InputError(
                f"{where}: {name} names {len(shards)} files of weights, {len(missing)} of them missing: "
                f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; download the model again"
            )
        return


def _gguf_hint(files: Iterable[Path]) -> str:
    names = sorted(file.name for file in files if file.suffix == ".gguf")
    return f", and model.gguf_file: {names[0]} for the GGUF file" if names else ""


def _base_of(adapter: str) -> str:
    """`` of MODEL`` if the adapter's configuration says which model it changes."""
    try:
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f" of {base}" if base else ""


def _method_of(quantization: Any) -> str:
    """How weights were quantized, by what a configuration says."""
    if not isinstance(quantization, dict):
        return str(quantization)
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    method = quantization.get("quant_method") or quantization.get("quant_algo")
    return str(getattr(method, "value", method) or quantization)
