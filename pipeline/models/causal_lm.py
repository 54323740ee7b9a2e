"""A recipe's language model: loaded from the hub, a local folder or a GGUF file, with a tokenizer that was checked."""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optimum.exporters.tasks import TasksManager
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from exporters.causal_lm import MAX_LENGTH
from pipeline.models.adapters import LANGUAGE_PARTS, check_model_type, supported_model_types
from pipeline.models.checkpoint import load_checkpoint_config, load_weights, loading
from pipeline.models.gguf_tokenizer import check_saved_tokenizer, check_tokenizer, read_metadata
from pipeline.models.packaged_gguf import locate_gguf
from pipeline.models.split_gguf import SPLIT_COUNT, joined, part_names
from pipeline.models.weights import check_finite, hash_model
from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import CausalLanguageModel, LanguageModelSection, PackagedGGUFModel

# scaled_dot_product_attention has no soft cap of the scores, which these models need.
_ATTENTION = {"gemma2": "eager"}
# Names of the language model's weights in a model of several modalities, new ones and those of older files, and alone.
_LANGUAGE_PART_WEIGHTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "qwen.tiktoken",
)  # fmt: skip
"""Any of these can hold the vocabulary of a tokenizer."""
_NO_TOKENIZER = "no tokenizer in it; put tokenizer.json and tokenizer_config.json of the model beside its config.json"


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A dense causal language model in evaluation mode, float32, without gradients.

    ``model(input_ids=int64 [B, T]).logits`` is float32 [B, T, vocabulary]. ``source_hash``: SHA-256 of configuration
    and weights, wherever they came from.
    """

    model: nn.Module
    tokenizer: Any
    source_hash: str


def load_tokenizer(section: LanguageModelSection) -> Any:
    """The tokenizer of a recipe's language model. Raises InputError when it is not found, or is rebuilt from a GGUF
    file and does not do what the file says (:func:`check_tokenizer`)."""
    source = _Source.of(section)
    folder = Path(source.path)
    if source.gguf_file is None and folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{source.where}: {_NO_TOKENIZER}")
    tokenizer = source.load(AutoTokenizer.from_pretrained)
    if not tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys():  # made up by transformers
        raise InputError(f"{source.where}: {_NO_TOKENIZER}")
    for key in ("is_local", "local_files_only"):  # how it was found; would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if source.gguf_file is not None:
        check_tokenizer(tokenizer, source.gguf_path())
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            check_saved_tokenizer(tokenizer, Path(saved))
    return tokenizer


def load_language_config(section: LanguageModelSection) -> Any:
    """The configuration of a recipe's language model, its weights unread; of a model that reads images too, that of its
    language model.

    Raises InputError when it is not found, its MLPs are not known, or its weights could not be trained
    (:func:`pipeline.models.checkpoint.load_checkpoint_config`).
    """
    config = _language_part(_load_whole_config(section))
    check_model_type(config.model_type, "text-generation")
    _forget_source(config)
    return config


def notes_on(section: LanguageModelSection) -> tuple[str, ...]:
    """What a user should know of how a recipe's language model was taken, a sentence each."""
    config = _load_whole_config(section)
    if config.model_type not in LANGUAGE_PARTS:
        return ()
    return (
        f"The model's language part was taken ({LANGUAGE_PARTS[config.model_type]} of {config.model_type}); what reads "
        "images was left out.",
    )


def load_language_model(section: LanguageModelSection, tokenizer: Any = None) -> LoadedLanguageModel:
    """The dense language model of a recipe and its tokenizer, which is loaded too unless it is given.

    Attention is scaled_dot_product_attention where the model can have it. Raises InputError when the model cannot be
    found or built, lacks weights, or has weights that are not finite.
    """
    source = _Source.of(section)
    config = load_language_config(section)
    options = {} if source.gguf_file is not None else {"key_mapping": _LANGUAGE_PART_WEIGHTS}
    model = load_weights(
        partial(source.load, language_model_class().from_pretrained, config=config, **options),
        source.where,
        "a whole causal language model",
        attention=attention_of(config),
    )
    if source.gguf_file is not None:
        _forget_quantization(model)
    _forget_source(model.config)
    model.config.architectures = [type(model).__name__]  # as it is written when the model is saved
    model.eval().requires_grad_(False)
    check_finite(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(section)
    return LoadedLanguageModel(model, tokenizer, hash_model(model))


def load_generation_config(section: LanguageModelSection) -> Any:
    """What a recipe's language model says of generation, in a file of its own; None if it has none."""
    source = _Source.of(section)
    if source.gguf_file is not None:
        return None
    try:
        return GenerationConfig.from_pretrained(source.path, revision=source.revision or "main")
    except OSError:  # no such file
        return None


def attention_of(config: Any) -> str:
    """Transformers' name of the attention with which a model of this configuration is computed."""
    return _ATTENTION.get(config.model_type, "sdpa")


def longest_text(config: Any) -> int:
    """Tokens, prompt and answer together, for which a model of this configuration is exported."""
    return int(min(MAX_LENGTH, config.max_position_embeddings))


def name_of(section: LanguageModelSection) -> str:
    """How errors name a recipe's language model."""
    if isinstance(section, PackagedGGUFModel):
        return f"model.package: {section.package}, {section.file}"
    return f"model.path: {section.path}" + (f", {section.gguf_file}" if section.gguf_file else "")


def language_model_class() -> Any:
    """The class of causal language models, as optimum resolves the task."""
    return TasksManager.get_model_class_for_task("text-generation")


# --- source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a model is, in transformers' terms; ``where`` names it in errors."""

    path: str
    revision: str | None
    gguf_file: str | None
    where: str

    @classmethod
    def of(cls, section: LanguageModelSection) -> "_Source":
        gguf_file = section.file if isinstance(section, PackagedGGUFModel) else section.gguf_file
        if gguf_file is not None:
            absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
            if absent:
                raise InputError(f"model: GGUF files need {' and '.join(absent)}: pip install 'fips-onnx[gguf]'")
        where = name_of(section)
        if isinstance(section, CausalLanguageModel):
            source = cls(section.path, section.revision, gguf_file, where)
            parts = part_names(gguf_file) if gguf_file is not None else []
            if gguf_file is None or len(parts) == 1:
                return source
            folder = Path(section.path)
            missing = [name for name in parts if folder.is_dir() and not (folder / name).is_file()]
            if missing:
                raise InputError(f"{where}: of its {len(parts)} parts, {', '.join(missing)} is not there; download it")
            path = joined(gguf_file, source.file)
        else:
            path = joined(section.file, partial(locate_gguf, section.package))
        return cls(str(path.parent), None, path.name, where)

    def load(self, load: Callable[..., Any], **options: Any) -> Any:
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        with loading(self.where):
            return load(self.path, revision=self.revision or "main", trust_remote_code=False, **options)

    def gguf_path(self) -> Path:
        """The GGUF file on this machine."""
        assert self.gguf_file is not None
        return self.file(self.gguf_file)

    def file(self, name: str) -> Path:
        """A file of the model on this machine. Raises InputError if the model has none of this name."""
        with loading(f"{self.where}: {name}"):
            return Path(cached_file(self.path, name, revision=self.revision or "main"))


def _load_whole_config(section: LanguageModelSection) -> Any:
    """The configuration as it is in the checkpoint."""
    source = _Source.of(section)
    if source.gguf_file is None:
        return load_checkpoint_config(source.path, source.revision, source.where)
    _check_gguf(source.gguf_path())
    return source.load(AutoConfig.from_pretrained)


def _language_part(config: Any) -> Any:
    """The configuration of the language model in a model of several modalities; any other's is returned as it is.

    Raises InputError for models whose language model cannot be taken out.
    """
    text = config.get_text_config()
    if text is config:
        return config
    if LANGUAGE_PARTS.get(config.model_type) != text.model_type:
        raise InputError(
            f"model type {config.model_type!r} is not for text alone, and its language model of type "
            f"{text.model_type!r} cannot be taken out of it; take a checkpoint of a language model, of type "
            f"{', '.join(supported_model_types('text-generation'))}, or of {' or '.join(LANGUAGE_PARTS)}"
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        of_all = getattr(config, name, None)
        if of_all is not None:
            setattr(text, name, of_all)
    return text


def _forget_source(config: Any) -> None:
    """Take out of a configuration where its model was found, which is no part of the model."""
    config.name_or_path = ""
    if hasattr(config, "_model_name_or_path"):  # of a GGUF file: its title
        del config._model_name_or_path


def _forget_quantization(model: Any) -> None:
    """Make a model whose weights came from GGUF, in float32 by now, one that transformers can save."""
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _check_gguf(gguf: Path) -> None:
    """Raise InputError for scaled rotary embeddings, which transformers leaves out without a word, and for one of
    several parts, which it takes for the whole."""
    metadata, tensors = read_metadata(gguf, ())
    if metadata.get(SPLIT_COUNT, 1) > 1:
        raise InputError(
            f"{gguf.name}: it is one of {metadata[SPLIT_COUNT]} parts of a model ({SPLIT_COUNT}), but not called so; "
            "give all parts their names again, which end like -00001-of-00002.gguf"
        )
    scaled = [key for key, value in metadata.items() if ".rope.scaling." in key and value != "none"]
    scaled += [name for name in tensors if name.startswith("rope_freqs")]
    if scaled:
        raise InputError(
            f"{gguf.name}: its rotary embeddings are scaled ({', '.join(scaled)}), which transformers does not read "
            "from GGUF; take the model's checkpoint in safetensors, without gguf_file"
        )
