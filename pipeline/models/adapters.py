"""Where the MLPs of a transformer are: found by model type and module names, never by shapes.

A new architecture is one entry in ``_LAYOUTS``; a language model also needs one in :mod:`exporters.genai_builder`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pipeline.plumbing.errors import InputError
from pipeline.recipe.plan import MLPSite

Purpose = Literal["image-classification", "text-generation"]
"""What a model is for, under the names that transformers' pipelines and optimum have for it."""


@dataclass(frozen=True)
class _Names:
    first: tuple[str, ...]
    last: str
    activation: str


@dataclass(frozen=True)
class _Layout:
    """Where a kind of model has its MLPs.

    ``blocks``: path of the blocks below the base model, ``*`` standing for each index of a module list. ``names``: of
    the MLPs' children; ``gated``: of models whose configuration asks for SwiGLU. ``output_scale``: path, below a block,
    of the layer scale behind the MLP.
    """

    purpose: Purpose
    blocks: str
    names: _Names
    gated: _Names | None = None
    output_scale: str | None = None

    def names_for(self, config: Any) -> _Names:
        return self.gated if self.gated is not None and config.use_swiglu_ffn else self.names


_PLAIN = _Names(first=("fc1",), last="fc2", activation="activation_fn")
_GATED = _Names(first=("gate_proj", "up_proj"), last="down_proj", activation="act_fn")
_VISION: Purpose = "image-classification"
_LANGUAGE: Purpose = "text-generation"

_LAYOUTS = {
    "vit": _Layout(_VISION, "layers.*", _PLAIN),
    "deit": _Layout(_VISION, "layers.*", _PLAIN),
    "dinov2": _Layout(_VISION, "encoder.layer.*", _PLAIN, gated=_GATED, output_scale="layer_scale2.lambda1"),
    "swin": _Layout(_VISION, "encoder.layers.*.blocks.*", _PLAIN),
    "gemma2": _Layout(_LANGUAGE, "layers.*", _GATED),
    "gemma3_text": _Layout(_LANGUAGE, "layers.*", _GATED),
    "llama": _Layout(_LANGUAGE, "layers.*", _GATED),
    "mistral": _Layout(_LANGUAGE, "layers.*", _GATED),
    "qwen2": _Layout(_LANGUAGE, "layers.*", _GATED),
    "qwen3": _Layout(_LANGUAGE, "layers.*", _GATED),
}
_DESCRIPTIONS = {_VISION: "an image classifier", _LANGUAGE: "a language model"}
_SOURCES = {_VISION: "pretrained", _LANGUAGE: "causal_lm"}
LANGUAGE_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models that read images too and whose language model can be taken out, and the type of that."""


def supported_model_types(purpose: Purpose) -> tuple[str, ...]:
    """The model types of a purpose whose MLPs are known, in alphabetical order."""
    return tuple(sorted(name for name, layout in _LAYOUTS.items() if layout.purpose == purpose))


def check_model_type(model_type: str, purpose: Purpose) -> None:
    """Raise InputError unless models of this type have MLPs we know and are for ``purpose``."""
    supported = f"supported: {', '.join(supported_model_types(purpose))}"
    layout = _LAYOUTS.get(model_type)
    if layout is not None and layout.purpose != purpose:
        raise InputError(
            f"model type {model_type!r} is {_DESCRIPTIONS[layout.purpose]}, not {_DESCRIPTIONS[purpose]} "
            f"({supported}); for it, model.source is {_SOURCES[layout.purpose]}"
        )
    if layout is None:
        raise InputError(f"model type {model_type!r} has no MLPs known to FiPS; {supported}")


def find_mlps(model: nn.Module) -> list[MLPSite]:
    """All MLPs of a transformers model, in execution order. Reads names and shapes only, so the weights may be on
    the meta device.

    Raises InputError when the model type is unknown, a named child is missing, not ``nn.Linear`` or of an
    unfitting shape (all offenders are named), or when two blocks share a module or a weight.
    """
    config: Any = model.config
    if config.model_type not in _LAYOUTS:
        raise InputError(
            f"model type {config.model_type!r} has no MLPs known to FiPS; supported: {', '.join(sorted(_LAYOUTS))}"
        )
    layout = _LAYOUTS[config.model_type]
    prefix = str(model.base_model_prefix)
    root = f"{prefix}." if hasattr(model, prefix) else ""
    names = layout.names_for(config)
    problems: list[str] = []
    sites = []
    for block, path in enumerate(_expand(model, root + layout.blocks)):
        found = _describe(model, f"{path}.mlp", names, problems)
        scale = f"{path}.{layout.output_scale}" if layout.output_scale else None
        if found is None:
            continue
        width, hidden = found
        if scale is not None:
            _check_scale(model, scale, width, problems)
        sites.append(
            MLPSite(
                block=block,
                path=f"{path}.mlp",
                first=names.first,
                last=names.last,
                activation=names.activation,
                width=width,
                hidden=hidden,
                output_scale=scale,
            )
        )
    problems += _aliases(model, sites)
    if problems:
        raise InputError(f"the MLPs of this {config.model_type} model cannot be used: " + "; ".join(problems))
    if not sites:
        raise InputError(f"this {config.model_type} model has no blocks at {root}{layout.blocks}")
    return sites


def _expand(model: nn.Module, pattern: str) -> Iterator[str]:
    """Every path of ``pattern`` in ``model``, in the order of the module lists."""
    head, star, tail = pattern.partition(".*")
    try:
        module = model.get_submodule(head)
    except AttributeError:
        raise InputError(f"the model has no module {head!r}; is it of another version of transformers?") from None
    if not star:
        yield head
        return
    if not isinstance(module, nn.ModuleList):
        raise InputError(f"expected a module list at {head!r}, found {type(module).__name__}")
    for index in range(len(module)):
        yield from _expand(model, f"{head}.{index}{tail}")


def _describe(model: nn.Module, path: str, names: _Names, problems: list[str]) -> tuple[int, int] | None:
    """(width, hidden) of the MLP at ``path``; None, and entries in ``problems``, when it is not as expected."""
    try:
        mlp = model.get_submodule(path)
    except AttributeError:
        problems.append(f"{path} is missing")
        return None
    children = dict(mlp.named_children())
    linears = [*names.first, names.last]
    wrong = [
        f"{path}.{name} is {type(children[name]).__name__ if name in children else 'missing'}, not a Linear"
        for name in linears
        if not isinstance(children.get(name), nn.Linear)
    ]
    if names.activation not in children:
        wrong.append(f"{path}.{names.activation} is missing")
    if wrong:
        problems += wrong
        return None
    shapes = {name: list(mlp.get_parameter(f"{name}.weight").shape) for name in linears}
    width, hidden = shapes[names.last]
    if any(shapes[name] != [hidden, width] for name in names.first):
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        problems.append(f"the shapes in {path} do not fit together: {described}")
        return None
    return width, hidden


def _check_scale(model: nn.Module, path: str, width: int, problems: list[str]) -> None:
    owner, _, name = path.rpartition(".")
    try:
        shape = list(model.get_submodule(owner).get_parameter(name).shape)
    except AttributeError:
        problems.append(f"{path} is missing")
        return
    if shape != [width]:
        problems.append(f"{path} has shape {shape}, not [{width}]")


def _aliases(model: nn.Module, sites: list[MLPSite]) -> list[str]:
    """Modules or weights that appear in more than one place of the MLPs."""
    owner: dict[int, str] = {}
    problems = []
    for site in sites:
        mlp = model.get_submodule(site.path)
        weights = [f"{name}.weight" for name in site.linears]
        parts: list[tuple[str, object]] = [(site.path, mlp)]
        parts += [(f"{site.path}.{name}", mlp.get_parameter(name)) for name in weights]
        for path, part in parts:
            if id(part) in owner:
                problems.append(f"{path} is the same object as {owner[id(part)]}")
            owner.setdefault(id(part), path)
    return problems
