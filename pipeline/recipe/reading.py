"""Recipes and their like read from YAML, with ``--set`` overrides and errors that name file, key, value and remedy.

What a recipe can say is in :mod:`pipeline.recipe.schema`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import AtKeyError, Recipe, Section

_Section = TypeVar("_Section", bound=Section)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply ``--set`` overrides (``key.subkey=value``, the value in YAML).

    Entries of lists are addressed by their index, ``quantization.training.0.steps=50``. Raises InputError naming
    the file, key, value and what is allowed.
    """
    content = read_yaml(path, "recipe")
    for override in overrides or []:
        _apply_override(content, override)
    return parse_recipe(content, str(path))


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``kind`` says in errors what it should be. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read the {kind}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot read the {kind}: it is not text in UTF-8") from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a {kind} is a mapping of keys to values")
    return content


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as nested mappings; ``where`` names it in errors. Raises InputError."""
    return parse_section(Recipe, content, where)


def parse_section(kind: type[_Section], content: dict[str, Any], where: str) -> _Section:
    """Validate nested mappings as a section of ``kind``; ``where`` names them in errors. Raises InputError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(_describe_all(where, kind, error.errors())) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML without three traps of PyYAML, which follows YAML 1.1.

    ``2:4`` is text, not 124 in base 60; ``1e-3`` is a number; a key may stand only once in a mapping.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    set_key(content, key, value, f"--set {override}")


def set_key(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put ``value`` at a dotted ``key`` of nested mappings and lists; ``where`` begins errors. Raises InputError."""
    node: Any = content
    parts = key.split(".")
    begin = where
    for depth, part in enumerate(parts):
        where = f"{begin}: {'.'.join(parts[:depth])}"
        last = depth == len(parts) - 1
        if isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        elif isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise InputError(f"{where} is a list of {len(node)}; {part} is none of its indices, which start at 0")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        else:
            raise InputError(f"{where} holds the value {node!r}, not further keys")


def _describe_all(where: str, kind: type[Section], problems: Sequence[Any]) -> str:
    """Say what is wrong, in one line for each key; of several alternatives that a value may follow, by the one that it
    follows furthest."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        by_key.setdefault(_location(kind, problem), []).append(problem)
    lines = []
    for key, group in by_key.items():
        if not any(other[: len(key)] == key for other in by_key if len(other) > len(key)):
            said = "; or ".join(dict.fromkeys(_complaint(problem) for problem in group))
            given = _given(group[0]["input"])
            lines.append(f"{where}: {'.'.join(key) or f'the {kind.__name__.lower()}'}: {given}{said}")
    return "\n".join(lines)


def _location(kind: type[Section], problem: Any) -> tuple[str, ...]:
    """Where a problem is: keys, and indices of lists, from the outermost section, which is of ``kind``."""
    location: tuple[str | int, ...] = problem["loc"]
    if problem["type"] in ("extra_forbidden", "missing", "invalid_key"):
        return (*_keys(kind, location[:-1]), str(location[-1]))
    keys = _keys(kind, location)
    if problem["type"].startswith("union_tag"):
        keys.append(problem["ctx"]["discriminator"].strip("'"))
    elif problem["type"] == "value_error" and isinstance(problem["ctx"]["error"], AtKeyError):
        keys += problem["ctx"]["error"].key.split(".")
    return tuple(keys)


def _keys(kind: type[Section], location: Sequence[str | int]) -> list[str]:
    """The parts of pydantic's ``location`` that are keys or indices; it also names the alternatives that it tried."""
    keys = []
    here: list[Any] = [kind]
    for part in location:
        inside = [annotation for outer in here for annotation in _inside(outer, part)]
        if inside:
            keys.append(str(part))
            here = inside
    return keys


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """What the schema allows at the key or index ``part`` of a value that has this ``annotation``; empty if nothing."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation.model_fields[str(part)].annotation] if part in annotation.model_fields else []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is list:
        return [*arguments] if isinstance(part, int) else []
    if origin is dict:
        return [arguments[1]] if part != "[key]" else []
    if origin is Annotated:
        return _inside(arguments[0], part)
    return [found for argument in arguments for found in _inside(argument, part)]


def _given(value: Any) -> str:
    return "" if isinstance(value, dict) else f"got {value!r}; "


def _complaint(problem: Any) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        return "unknown key; remove or correct it"
    if kind in ("missing", "union_tag_not_found"):
        return "required key is missing"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        return f"got {context['tag']!r}; input should be one of {context['expected_tags']}"
    message: str = problem["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
