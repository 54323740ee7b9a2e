"""Recipes and their like read from YAML, with ``--set`` overrides and errors that name file, key, value and remedy.

What a recipe can say is in :mod:`pipeline.recipe.schema`.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.plumbing.errors import InputError
from pipeline.recipe.schema import AtKeyError, Recipe, Section

_Section = TypeVar("_Section", bound=Section)

LARGEST_FILE = 1 << 20
"""Bytes of a file that is read as YAML."""
MOST_VALUES = 100_000
"""Values that a YAML text may stand for, aliases counted as often as they are used."""
_LONGEST_VALUE, _MOST_LINES = 200, 20
"""Characters of a value, and lines, that an error shows."""


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
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)  # of a device without an end, too
    except OSError as error:
        raise InputError(f"{path}: cannot read the {kind}: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"{path}: cannot read the {kind}: it has more than {LARGEST_FILE:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot read the {kind}: it is not text in UTF-8") from None
    content = _parse_yaml(text, f"{path}: not valid YAML")
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


_NAMELESS = 'in "<unicode string>", '
"""What PyYAML calls a text whose file it does not know."""


def _parse_yaml(text: str, complaint: str) -> Any:
    """What a YAML text stands for: mappings, lists, text, finite numbers, truth values and None, no two of them one
    object. Raises InputError, which ``complaint`` begins, for everything else."""
    try:
        return _unshared(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        said = " ".join(str(error).split()).replace(_NAMELESS, "at ")
        raise InputError(f"{complaint}: {said}") from None
    except RecursionError:
        raise InputError(f"{complaint}: it is nested too deeply") from None


def _unshared(value: Any) -> Any:
    """A copy in which what YAML aliases share is there as often as it is used, so that one can be changed alone."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML without traps of PyYAML, which follows YAML 1.1.

    ``2:4`` is text, not 124 in base 60; ``1e-3`` is a number; ``2026-01-31`` is text; a key may stand only once in a
    mapping. What has no place in a recipe is refused where it stands, before anything is made of it: other types,
    numbers that are not finite or take more than 64 bits, keys that are no plain values, aliases to what they are in,
    aliases of aliases that stand for millions of values.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        self._count_values(node, {}, set())
        return super().construct_document(node)

    def _count_values(self, node: yaml.Node, counted: dict[int, int], outer: set[int]) -> int:
        """How many values ``node`` stands for. ``counted``: the same of nodes that were seen before, by id. ``outer``:
        ids of the nodes around this one. Raises ConstructorError for what is refused."""
        if id(node) in outer:
            raise _refusal(node, "an alias refers to what it is in")
        if id(node) not in counted:
            if node.tag not in _TAGS:
                raise _refusal(node, f"values of the type {node.tag.replace('tag:yaml.org,2002:', '!!')} have no place")
            total = 1
            if isinstance(node, yaml.ScalarNode):
                _check_scalar(node)
            elif isinstance(node, yaml.SequenceNode):
                total += sum(self._count_values(inner, counted, outer | {id(node)}) for inner in node.value)
            elif isinstance(node, yaml.MappingNode):
                seen = set()
                for key, inner in node.value:
                    if not isinstance(key, yaml.ScalarNode):
                        raise _refusal(key, "a key is a plain value, not a list or mapping (quote text in braces)")
                    if (key.tag, key.value) in seen:
                        raise _refusal(key, f"key {key.value!r} stands twice")
                    seen.add((key.tag, key.value))
                    total += self._count_values(key, counted, outer)
                    total += self._count_values(inner, counted, outer | {id(node)})
            if total > MOST_VALUES:
                raise _refusal(node, f"it stands for more than {MOST_VALUES:,} values")
            counted[id(node)] = total
        return counted[id(node)]


def _refusal(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Raise ConstructorError for a plain value that has its type by force, or that nothing can work with."""
    shown = repr(node.value[:40])
    if node.tag in _FORMS and not _FORMS[node.tag].fullmatch(node.value):
        raise _refusal(node, f"{shown} is no {node.tag.rpartition(':')[2]}")
    if node.tag == _INT and not (len(node.value) < 30 and abs(int(node.value.replace("_", ""))) < 2**63):
        raise _refusal(node, f"the number {shown} takes more than 64 bits")
    if node.tag == _FLOAT and not math.isfinite(float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))):
        raise _refusal(node, f"{shown} is not a finite number")
    if "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _refusal(node, f"{shown} holds characters that no text has")


_STR, _INT, _FLOAT, _BOOL, _NULL, _MERGE, _SEQ, _MAP = _TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "merge", "seq", "map")
)
_FORMS = {
    _INT: re.compile(r"[-+]?(0|[1-9][0-9_]*)"),
    _FLOAT: re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    _BOOL: re.compile(r"yes|no|true|false|on|off", re.IGNORECASE),
    _NULL: re.compile(r"~|null|Null|NULL|"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_BOOL, _NULL, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(f"^(?:{_FORMS[_INT].pattern})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(f"^(?:{_FORMS[_FLOAT].pattern})$"), list("-+.0123456789"))


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as key.subkey=value")
    value = _parse_yaml(text, f"--set {override}: the value is not valid YAML")
    set_key(content, key, value, f"--set {override}")


def set_key(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put ``value`` at a dotted ``key`` of nested mappings and lists; ``where`` begins errors. Raises InputError."""
    node: Any = content
    parts = key.split(".")
    begin = where
    if "" in parts[:-1]:
        raise InputError(f"{where}: {key!r} has an empty part; write it as key.subkey")
    for depth, part in enumerate(parts):
        where = f"{begin}: {'.'.join(parts[:depth])}"
        last = depth == len(parts) - 1
        if isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        elif isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                raise InputError(f"{where} is a list of {len(node)}; {part} is none of its indices, which start at 0")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        else:
            raise InputError(f"{where} holds the value {_shown(node)}, not further keys")


def _describe_all(where: str, kind: type[Section], problems: Sequence[Any]) -> str:
    """Say what is wrong, in one line for each key; of several alternatives that a value may follow, by the one that it
    follows furthest."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        by_key.setdefault(_location(kind, problem), []).append(problem)
    lines = []
    outer = {key[:length] for key in by_key for length in range(len(key))}
    for key, group in by_key.items():
        if key not in outer:
            said = "; or ".join(dict.fromkeys(_complaint(problem) for problem in group))
            given = _given(group[0]["input"])
            lines.append(f"{where}: {'.'.join(key) or f'the {kind.__name__.lower()}'}: {given}{said}")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"{where}: and {len(lines) - _MOST_LINES} more"]
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
    return "" if isinstance(value, dict) else f"got {_shown(value)}; "


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


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
