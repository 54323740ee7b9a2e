"""``docs/recipes.md`` and messages that list what a recipe can say: all of it, and nothing else."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from places import RECIPES

from fips_ort.layout import BIT_WIDTHS, PATTERNS
from pipeline.models.adapters import _SOURCES
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import (
    Grade,
    ImageModelSection,
    LanguageModelSection,
    ModelSection,
    OneWidth,
    PatternName,
    Recipe,
    Section,
)

PAGE = (RECIPES.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def sections_of(annotation: Any) -> Iterator[type[Section]]:
    """Every section of a schema, from the outermost one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections_of(field.annotation)
    for argument in get_args(annotation):
        yield from sections_of(argument)


def words_of(annotation: Any) -> Iterator[str]:
    """Every word and number that a value can be by choice."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for argument in get_args(annotation):
            yield from words_of(argument)


CODE = "\n".join(re.findall(r"```.*?```|`[^`]+`", PAGE, re.DOTALL))
"""What the page sets as code: a word of its prose names nothing."""
KEYS = sorted({key for section in sections_of(Recipe) for key in section.model_fields})
WORDS = sorted(
    {
        word
        for section in sections_of(Recipe)
        for field in section.model_fields.values()
        for word in words_of(field.annotation)
    }
)


def is_named(word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", CODE) is not None


def test_everything_was_found() -> None:
    assert {"name", "source", "revision", "drop_fraction", "fraction", "max_shard_size"} <= set(KEYS)
    assert {"scratch", "packaged_gguf", "hub_text", "1:4", "2:8", "allocate", "256", "task", "bfloat16"} <= set(WORDS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_documented(key: str) -> None:
    assert is_named(key)


@pytest.mark.parametrize("word", WORDS)
def test_every_choice_is_documented(word: str) -> None:
    assert is_named(word)


def test_number_of_sources() -> None:
    numbers = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    every, language = numbers[len(get_args(get_args(ModelSection)[0]))], numbers[len(get_args(LanguageModelSection))]
    assert f"one of {every} sources; {language} are for language models" in PAGE


@pytest.mark.parametrize("changes", [{}, *EXAMPLES[1:]])
def test_examples_are_valid(changes: dict[str, Any]) -> None:
    recipe = dict(EXAMPLES[0])
    if "vocabulary" in changes or "embedding_bits" in str(changes):  # on top of the example of language models
        changes = next(example for example in EXAMPLES if "data" in example and example is not EXAMPLES[0]) | changes
    for section, keys in changes.items():
        keep = {} if section in ("model", "data") else recipe.get(section, {})
        recipe[section] = keep | keys
    if changes.get("allocate"):
        recipe["quantization"] = recipe["quantization"] | {"basis": {"bits": 4, "block_size": 128}}
    parse_recipe(recipe, "docs/recipes.md")


def test_sources_that_messages_recommend() -> None:
    """A model of the other task is to be read by a source of that task with a ``path``."""
    found = {
        task: [member for member in get_args(union) if source in get_args(member.model_fields["source"].annotation)]
        for (task, source), union in zip(_SOURCES.items(), (ImageModelSection, LanguageModelSection), strict=True)
    }
    assert all(len(members) == 1 and "path" in members[0].model_fields for members in found.values())


def test_patterns_are_those_that_can_be_stored() -> None:
    assert get_args(PatternName) == PATTERNS


def test_bits_are_those_that_can_be_stored() -> None:
    assert sorted(get_args(Grade.model_fields["bits"].annotation)) == sorted(BIT_WIDTHS)
    assert set(get_args(OneWidth)) <= set(BIT_WIDTHS)
