"""Recipes: what is refused, and what the refusal says; overrides; the recipes we ship."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from factored_samples import CONTENT, content, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from places import RECIPES
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.plumbing.errors import InputError
from pipeline.recipe.reading import load_recipe, parse_recipe, parse_section
from pipeline.recipe.schema import LocalTextData, Recipe, Section
from pipeline.sweep.definition import SweepFile

SHIPPED = sorted({*RECIPES.rglob("*.yaml")} - {*(RECIPES / "sweeps").iterdir()})

FULL = content(
    calibration={"samples": 8, "batch_size": 4},
    compression__sparsifier={"algorithm": "gmp", "update_every": 5},
    finetune={"objective": "distill", "steps": 2},
    quantization__basis={"bits": [{"bits": 4, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}], "block_size": 16},
    quantization__training=[
        {"objective": "local", "steps": 2, "batch_tokens": 16},
        {"objective": "task", "steps": 2, "batch_size": 16},
    ],
    quantization__rest={"weights": "float16"},
    export={"accuracy_level": 4},
    evaluation={"batch_size": 4},
)


def refusal(change: Callable[[dict[str, Any]], object], base: dict[str, Any] = FULL) -> list[str]:
    """Lines of the error for a changed recipe, without the file's name."""
    changed = copy.deepcopy(base)
    change(changed)
    with pytest.raises(InputError) as caught:
        parse_recipe(changed, "r.yaml")
    lines = str(caught.value).split("\n")
    assert all(line.startswith("r.yaml: ") for line in lines)
    return [line.removeprefix("r.yaml: ") for line in lines]


def setting(path: str, value: Any, base: dict[str, Any] = FULL) -> list[str]:
    """Lines of the error when the value at a dotted path is replaced."""

    def change(node: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node[parent]
        node[last] = value

    return refusal(change, base)


def sections(node: Any, path: str = "") -> list[str]:
    """Dotted paths of all mappings in a recipe, without the free-form configuration of the model."""
    if isinstance(node, dict):
        inner = [sections(value, f"{path}{key}.") for key, value in node.items() if key != "config"]
        return [path, *(found for part in inner for found in part)]
    if isinstance(node, list):
        return [found for index, value in enumerate(node) for found in sections(value, f"{path}{index}.")]
    return []


# --- shipped recipes and defaults ------------------------------------------------------------------------------


def test_recipes_are_shipped() -> None:
    assert {path.name for path in SHIPPED} >= {"vit-digits.yaml", "vit-base.yaml", "deit-base.yaml", "swin-large.yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_defaults() -> None:
    recipe = parse_recipe(content(), "r.yaml")
    assert recipe.seed == 0
    assert recipe.finetune is None
    assert recipe.compression.initialization == "activation_svd"
    assert recipe.compression.target_sparsity == 0.75
    assert recipe.compression.sparsifier.model_dump() == {
        "algorithm": "gmp", "ranking": "layer", "update_every": 50, "end": 0.75, "initial_sparsity": 0.05,
        "drop_fraction": 0.1, "saliency": "magnitude",
    }
    assert recipe.quantization.training == []
    assert recipe.export.accuracy_level == 0
    assert parse_recipe(FULL, "r.yaml").quantization.training[1].objective == "task"


def test_recipes_do_not_change() -> None:
    recipe = parse_recipe(FULL, "r.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.fit.steps = 3  # type: ignore[misc]
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [("1:4", None, 0.75), ("1:4", 0.75, 0.75), ("2:4", None, 0.5), ("1:8", None, 0.875), ("2:8", 0.75, 0.75),
     ("dense", None, 0.0), ("dense", 0.0, 0.0), ("bitmap", 0.6, 0.6)],
)
def test_patterns_imply_their_sparsity(pattern: str, sparsity: float | None, expected: float) -> None:
    made = content(compression__pattern=pattern, quantization__projections__block_size=64)
    made["compression"].pop("sparsity")
    if sparsity is not None:
        made["compression"]["sparsity"] = sparsity
    assert parse_recipe(made, "r.yaml").compression.target_sparsity == expected


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", sections(FULL))
@pytest.mark.parametrize("key", ["mistake", "hub", "task"])
def test_unknown_keys_at_every_level(section: str, key: str) -> None:
    assert setting(section + key, 7) == [f"{section}{key}: got 7; unknown key; remove or correct it"]


# --- unions of sections ----------------------------------------------------------------------------------------


Found = Iterator[tuple[tuple[str, ...], str, list[type[Section]]]]


def unions(annotation: Any, path: tuple[str, ...] = ()) -> Found:
    """(keys, discriminator, members) of every discriminated union in a schema; ``0`` stands for an index."""
    arguments = list(get_args(annotation))
    for field in [part for part in arguments if isinstance(part, FieldInfo) and part.discriminator]:
        yield path, str(field.discriminator), list(get_args(arguments[0]))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for key, field in annotation.model_fields.items():
            if field.discriminator:
                yield (*path, key), str(field.discriminator), list(get_args(field.annotation))
            yield from unions(field.annotation, (*path, key))
    for argument in arguments:
        yield from unions(argument, (*path, "0") if get_origin(annotation) is list else path)


def members() -> Iterator[Any]:
    """(keys of the union, discriminator, one value of it, section) for every section of every union of a recipe."""
    for path, discriminator, sections in unions(Recipe):
        for section in sections:
            for value in get_args(section.model_fields[discriminator].annotation):
                yield pytest.param(path, discriminator, value, section, id=f"{'.'.join(path)}-{value}")


def test_every_union_is_found() -> None:
    assert {(path, key): len(sections) for path, key, sections in unions(Recipe)} == {
        (("model",), "source"): 5,
        (("data",), "source"): 6,
        (("quantization", "training", "0"), "objective"): 2,
    }
    assert len(list(members())) == 5 + 6 + 3


@pytest.mark.parametrize(("path", "discriminator", "value", "section"), [*members()])
def test_errors_inside_a_union_name_keys_of_the_recipe(
    path: tuple[str, ...], discriminator: str, value: str, section: type[Section]
) -> None:
    """A value that no key can have, at every key of the member in turn and at one that does not exist; the keys that
    are then missing are named too."""
    place = ".".join(path)
    required = {key for key, field in section.model_fields.items() if field.is_required() and key != discriminator}
    for key in {*section.model_fields, "no_such_key"} - {discriminator}:
        lines = setting(place, {discriminator: value, key: object()})
        assert {line.partition(": ")[0] for line in lines} == {f"{place}.{name}" for name in {key} | required}


def test_keys_that_are_called_like_an_alternative() -> None:
    """Axes of a sweep have any name; those of sections of a recipe are names like others."""
    file = {"name": "s", "recipe": "r.yaml", "axes": {"local": {"text": {"fit.steps": 1}, "hub": 3}}}
    with pytest.raises(InputError, match=r"^s\.yaml: axes\.local\.hub: got 3; input should be a valid dictionary$"):
        parse_section(SweepFile, file, "s.yaml")


def test_there_are_sections_at_every_level() -> None:
    assert {"", "model.", "model.training.", "quantization.basis.bits.0.", "quantization.training.1."} <= set(
        sections(FULL)
    )


@pytest.mark.parametrize("path", [
    "name", "model", "data", "compression", "quantization", "quantization.basis", "compression.groups",
    "model.config", "model.training.steps",
    "compression.budget", "fit.steps", "quantization.projections.block_size", "quantization.training.0.steps",
    "quantization.basis.bits.1.fraction", "data.image_size", "model.source", "quantization.training.1.objective",
    "finetune.objective",
])
def test_missing_keys(path: str) -> None:
    def drop(node: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for parent in parents:
            node = node[parent]
        del node[last]

    assert refusal(drop) == [f"{path}: required key is missing"]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("seed", "0", "got '0'; input should be a valid integer"),
        ("seed", -1, "got -1; input should be greater than or equal to 0"),
        ("seed", 2**32, "got 4294967296; input should be less than 4294967296"),
        ("seed", True, "got True; input should be a valid integer"),
        ("name", "../escape", "got '../escape'; string should match pattern"),
        ("name", "", "got ''; string should match pattern"),
        ("fit.steps", 0, "got 0; input should be greater than or equal to 1"),
        ("fit.steps", 2.5, "got 2.5; input should be a valid integer"),
        ("fit.learning_rate", 0.0, "got 0.0; input should be greater than 0"),
        ("fit.learning_rate", float("inf"), "got inf; input should be a finite number"),
        ("fit.weight_decay", float("nan"), "got nan; input should be a finite number"),
        ("fit.learning_rate", "1e-3", "got '1e-3'; input should be a valid number"),
        ("fit", 1, "got 1; input should be a valid dictionary"),
        ("fit", None, "required key is missing: with pattern bitmap, projections become sparse in the fit"),
        ("compression.budget", 2.5, "got 2.5; input should be less than or equal to 2"),
        ("compression.budget", 0.0, "got 0.0; input should be greater than 0"),
        ("compression.sparsity", 1.0, "got 1.0; input should be less than 1"),
        ("compression.pattern", "3:4", "got '3:4'; input should be 'dense', 'bitmap', '1:4', '2:4', '1:8' or '2:8'"),
        ("compression.pattern", 1, "got 1; input should be 'dense', 'bitmap'"),
        ("compression.groups", [], "got []; list should have at least 1 item"),
        ("compression.groups", 0, "got 0; input should be a valid list; or input should be greater than or equal to 1"),
        ("compression.groups", "all", "got 'all'; input should be a valid list; or input should be a valid integer"),
        ("compression.groups.0", 1, None),
        (
            "compression.initialization",
            "random",
            "got 'random'; input should be 'svd', 'activation_svd' or 'output_aware'",
        ),
        ("compression.sparsifier.algorithm", "snip", "got 'snip'; input should be 'gmp', 'rigl' or 'static'"),
        ("compression.sparsifier.end", 1.0, "got 1.0; input should be less than 1"),
        ("quantization.projections.bits", 5, "got 5; input should be 2, 3 or 4"),
        ("quantization.projections.bits", 1, "got 1; input should be 2, 3 or 4"),
        ("quantization.projections.bits", 8, "got 8; input should be 2, 3 or 4"),
        ("quantization.projections.bits", "4", "got '4'; input should be 2, 3 or 4"),
        ("quantization.basis.bits.0.bits", 5, "got 5; input should be 2, 3, 4 or 8"),
        ("quantization.basis.bits.1.bits", 1, "got 1; input should be 2, 3, 4 or 8"),
        ("quantization.basis.bits.1.fraction", 0.0, "got 0.0; input should be greater than 0"),
        ("quantization.basis.block_size", 48, "got 48; input should be 16, 32, 64, 128 or 256"),
        ("quantization.basis.levels", "mid", "got 'mid'; input should be 'midtread' or 'midrise'"),
        ("quantization.rest.linear_bits", 5, "got 5; input should be 2, 3, 4 or 8"),
        ("quantization.training", 3, "got 3; input should be a valid list"),
        ("quantization.training.0.objective", "all", "got 'all'; input should be one of 'local', 'task', 'distill'"),
        ("model.source", "web", "got 'web'; input should be one of 'scratch', 'pretrained', 'packaged_onnx'"),
        ("data.source", "csv", "got 'csv'; input should be one of 'digits', 'image_folder', 'hub'"),
        ("data.test_fraction", 1, "got 1; input should be less than 1"),
        ("export.accuracy_level", 1, "got 1; input should be 0 or 4"),
        ("export.max_shard_size", 10, "got 10; input should be greater than or equal to 4096"),
        ("evaluation.samples", 0, "got 0; input should be greater than or equal to 1"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(path: str, value: Any, complaint: str | None) -> None:
    if complaint is None:
        base = copy.deepcopy(FULL)
        base["compression"]["groups"] = [[0], [1]]
        assert setting(path, value, base) == [f"{path}: got 1; input should be a valid list"]
        return
    lines = setting(path, value)
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: ")
    assert complaint in lines[0]


def test_wrong_block_index_is_named() -> None:
    assert setting("compression.groups", [[0, 1], [2, "3"]]) == [
        "compression.groups.1.1: got '3'; input should be a valid integer"
    ]


@pytest.mark.parametrize(
    ("settings", "key", "complaint"),
    [
        ({"compression__sparsifier": {"drop_fraction": 0.3}}, "compression.sparsifier.drop_fraction",
         "is for algorithm rigl, not gmp; leave it out"),
        ({"compression__sparsifier": {"algorithm": "rigl", "initial_sparsity": 0.2}},
         "compression.sparsifier.initial_sparsity", "is for algorithm gmp, not rigl; leave it out"),
        ({"compression__sparsifier": {"algorithm": "static", "update_every": 5}}, "compression.sparsifier.update_every",
         "is for algorithm gmp or rigl, not static; leave it out"),
        ({"compression__sparsifier": {"algorithm": "static", "end": 0.5}}, "compression.sparsifier.end",
         "is for algorithm gmp or rigl, not static; leave it out"),
        ({"compression__sparsifier": {"initial_sparsity": 0.75}}, "compression.sparsifier.initial_sparsity",
         "got 0.75; sparsity rises from there, so it is below 0.75"),
        ({"compression__pattern": "dense", "compression__sparsity": None, "compression__sparsifier": {"end": 0.5}},
         "compression.sparsifier", "pattern dense keeps every entry; leave it out"),
        ({"quantization__learned_scales": False}, "quantization.learned_scales",
         "without training nothing is learned; leave it out"),
        ({"quantization__rest": {"block_size": 32}}, "quantization.rest.block_size",
         "is for linear_bits and embedding_bits; give one of them, or leave it out"),
        ({"quantization__rest": {"embedding_bits": [{"bits": 3, "tokens": 9}, {"bits": 4}]}},
         "quantization.rest.embedding_bits", "tiers must have falling bits, each once; got [3, 4]"),
        ({"quantization__rest": {"embedding_bits": [{"bits": 4}, {"bits": 3}]}},
         "quantization.rest.embedding_bits.0.tokens", "required key is missing"),
        ({"quantization__rest": {"embedding_bits": [{"bits": 4, "tokens": 9}, {"bits": 3, "tokens": 9}]}},
         "quantization.rest.embedding_bits.1.tokens", "the last tier has all other tokens; leave it out"),
        ({"allocate": {"target": 3.0, "bits": [3, [{"bits": 4, "fraction": 0.5}]]}}, "allocate.bits.1",
         "the fractions of the segments add up to 0.5, not 1"),
    ],
)
def test_keys_without_an_effect_are_refused(settings: dict[str, Any], key: str, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe(**settings)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"sample.yaml: {key}: ")
    assert line.endswith(complaint)


def test_a_fraction_of_text_that_is_not_split_is_refused() -> None:
    section = {"source": "text", "train": "a.txt", "test": "b.txt", "test_fraction": 0.2}
    with pytest.raises(InputError, match=r"data: test_fraction: .*test is given, and nothing is split off train"):
        parse_section(LocalTextData, section, "data")


def test_a_recipe_written_out_in_full_is_accepted() -> None:
    """As it stands in an artefact, with the defaults of keys that have no effect in it."""
    for changes in ({}, {"compression__sparsifier": {"algorithm": "static"}}):
        wanted = recipe(**changes)
        assert parse_recipe(wanted.model_dump(mode="json"), "fips.json") == wanted


@pytest.mark.parametrize(
    ("grades", "complaint"),
    [
        ([(4, 0.5), (2, 0.4)], "the fractions of the segments add up to 0.9, not 1"),
        ([(4, 0.7), (2, 0.7)], "the fractions of the segments add up to 1.4, not 1"),
        ([(2, 0.5), (4, 0.5)], "segments must have falling bits, each once, out of (8, 4, 3, 2); got [2, 4]"),
        ([(4, 0.5), (4, 0.5)], "segments must have falling bits, each once, out of (8, 4, 3, 2); got [4, 4]"),
        ([], "the fractions of the segments add up to 0, not 1"),
    ],
)
def test_grades_must_be_complete(grades: list[tuple[int, float]], complaint: str) -> None:
    value = [{"bits": bits, "fraction": fraction} for bits, fraction in grades]
    assert setting("quantization.projections.bits", value) == [f"quantization.projections: {complaint}"]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "complaint"),
    [
        ("1:4", 0.5, "pattern 1:4 means sparsity 0.75, not 0.5"),
        ("2:4", 0.75, "pattern 2:4 means sparsity 0.5, not 0.75"),
        ("dense", 0.5, "pattern dense means sparsity 0.0, not 0.5"),
        ("bitmap", None, "pattern bitmap needs a sparsity above 0 (for none, use pattern: dense)"),
        ("bitmap", 0.0, "pattern bitmap needs a sparsity above 0 (for none, use pattern: dense)"),
    ],
)
def test_pattern_and_sparsity_must_agree(pattern: str, sparsity: float | None, complaint: str) -> None:
    base = content(compression__pattern=pattern)
    assert setting("compression.sparsity", sparsity, base) == [f"compression: {complaint}"]


def test_group_ranking_is_for_unstructured_sparsity() -> None:
    base = content(compression__pattern="1:4", quantization__projections__block_size=32)
    assert setting("compression.sparsifier.ranking", "group", base) == [
        "compression: sparsifier.ranking: group is for pattern bitmap; pattern 1:4 ranks within each 4 columns, "
        "so take ranking: layer"
    ]


@pytest.mark.parametrize(("pattern", "block", "least"), [("1:4", 16, 32), ("1:8", 32, 64), ("2:8", 16, 32)])
def test_blocks_must_hold_whole_bytes(pattern: str, block: int, least: int) -> None:
    base = content(compression__pattern=pattern)
    base["compression"].pop("sparsity")
    assert setting("quantization.projections.block_size", block, base) == [
        f"quantization.projections: block_size {block} is not a multiple of {least}, as pattern {pattern} needs"
    ]


def test_fit_may_be_left_out_where_nothing_becomes_sparse() -> None:
    made = content(compression__pattern="dense")
    made["compression"].pop("sparsity")
    del made["fit"]
    assert parse_recipe(made, "r.yaml").fit is None


def dense_method() -> dict[str, Any]:
    made = content()
    made["compression"] = {"method": "dense", "pattern": "dense"}
    del made["fit"], made["quantization"]["basis"]
    made.pop("finetune", None)
    return made


def test_dense_method_needs_neither_groups_nor_basis() -> None:
    recipe = parse_recipe(dense_method(), "r.yaml")
    assert recipe.quantization.basis is None
    assert recipe.compression.target_sparsity == 0.0
    assert parse_recipe(recipe.model_dump(mode="json"), "r.yaml") == recipe  # as an artefact's manifest holds it


NO_SUCH_KEY = "method dense does not factorize and has no such key; leave it out"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("compression.groups", 2, NO_SUCH_KEY),
        ("compression.budget", 0.5, NO_SUCH_KEY),
        ("compression.sparsifier", {"algorithm": "rigl"}, NO_SUCH_KEY),
        ("compression.pattern", "1:4", "got '1:4'; method dense keeps every weight: take dense"),
        ("quantization.basis", {"bits": 4, "block_size": 16}, "compression.method dense has no basis; leave it out"),
        ("fit", {"steps": 1}, "trains unquantized factors; compression.method dense has none, leave it out"),
        (
            "finetune",
            {"objective": "task", "steps": 1},
            "trains unquantized factors; compression.method dense has none, leave it out",
        ),
    ],
)
def test_dense_method_refuses_what_it_does_not_know(path: str, value: Any, complaint: str) -> None:
    assert setting(path, value, dense_method()) == [f"{path}: {complaint}"]


def test_models_read_their_own_kind_of_data() -> None:
    text = {"source": "text", "train": "a.txt"}
    assert setting("data", text) == [
        "data.source: text is text; model.source: scratch is an image classifier"
    ]
    language = {"source": "causal_lm", "path": "there"}
    assert setting("model", language) == [
        "data.source: digits is images; model.source: causal_lm is a language model"
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [("quantization.rest.embedding_bits", 4), ("evaluation.stride", 8), ("vocabulary", {"scripts": ["Latin"]})],
)
def test_keys_of_language_models(path: str, value: Any) -> None:
    base = content()
    base["quantization"]["rest"] = {}
    base["evaluation"] = {}
    assert setting(path, value, base) == [f"{path}: is for language models; leave it out"]


def test_target_goes_with_allocation() -> None:
    complaint = ["quantization: target_stored_bits goes with bits: allocate, and only with it"]
    assert setting("quantization.target_stored_bits", 2.5) == complaint
    assert setting("quantization.projections.bits", "allocate") == complaint
    both = content(quantization__projections__bits="allocate", quantization__target_stored_bits=2.5)
    assert parse_recipe(both, "r.yaml").quantization.target_stored_bits == 2.5


def test_all_problems_are_listed() -> None:
    def change(node: dict[str, Any]) -> None:
        node["fit"]["steps"] = 0
        node["compression"]["budget"] = 3
        node["mistake"] = 1

    assert refusal(change) == [
        "compression.budget: got 3; input should be less than or equal to 2",
        "fit.steps: got 0; input should be greater than or equal to 1",
        "mistake: got 1; unknown key; remove or correct it",
    ]


def test_keys_that_are_not_text() -> None:
    assert refusal(lambda node: node.update({1: 2})) == ["1: got 1; keys should be strings"]


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    key=st.sampled_from([*CONTENT, "quantization.basis", "quantization.training", "compression.groups", "finetune"]),
)
@settings(max_examples=150, deadline=None)
def test_any_value_is_taken_or_refused_with_an_input_error(value: Any, key: str) -> None:
    with contextlib.suppress(InputError):
        recipe = parse_recipe(content(**{key.replace(".", "__"): value}), "r.yaml")
        assert Recipe.model_validate(recipe.model_dump()) == recipe


# --- files -----------------------------------------------------------------------------------------------------


def written(folder: Path, text: str | None = None) -> Path:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(FULL) if text is None else text, encoding="utf-8")
    return path


def test_reads_what_was_written(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path)) == parse_recipe(FULL, "r.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(InputError, match=r"r\.yaml: cannot read the recipe: it is not text in UTF-8"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "!!python/object:os.system {}", "a: \x00"])
def test_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"r\.yaml: not valid YAML: "):
        load_recipe(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- 1\n", "hello", "3"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"r\.yaml: a recipe is a mapping of keys to values"):
        load_recipe(written(tmp_path, text))


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump({**FULL, "seed": -1}))
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: seed: got -1; input should be greater than or equal to 0"


# --- overrides -------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path),
        [
            "seed=7",
            "fit.steps=9",
            "quantization.training.1.steps=3",
            "quantization.basis.bits.0.bits=8",
            "quantization.training.0={objective: local, steps: 5}",
            "compression.groups=[[0, 1], [2]]",
            "compression.groups.1=[3]",
            "compression.groups.0.1=5",
            "compression.sparsifier.algorithm=rigl",
            "evaluation.samples=12",
            "fit.learning_rate=1.0e-2",
            "finetune=null",
        ],
    )
    assert recipe.seed == 7
    assert recipe.fit.steps == 9
    assert recipe.fit.learning_rate == 0.01
    assert [training.steps for training in recipe.quantization.training] == [5, 3]
    assert recipe.quantization.basis.bits[0].bits == 8
    assert recipe.compression.groups == [[0, 5], [3]]
    assert recipe.compression.sparsifier.algorithm == "rigl"
    assert recipe.evaluation.samples == 12
    assert recipe.finetune is None


def test_overrides_make_sections_that_are_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(CONTENT))
    assert load_recipe(path, ["export.accuracy_level=4"]).export.accuracy_level == 4


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "--set seed: write it as key.subkey=value"),
        ("=3", "--set =3: write it as key.subkey=value"),
        (
            "seed=[1",
            "--set seed=[1: the value is not valid YAML: while parsing a flow sequence at line 1, column 1: [1 ^ "
            "expected ',' or ']', but got '<stream end>' at line 1, column 3: [1 ^",
        ),
        ("seed.x=1", "--set seed.x=1: seed holds the value 0, not further keys"),
        ("fit.steps.x.y=1", "--set fit.steps.x.y=1: fit.steps holds the value 4, not further keys"),
        (
            "quantization.training.2.steps=3",
            "--set quantization.training.2.steps=3: quantization.training is a list of 2; 2 is none of its indices, "
            "which start at 0",
        ),
        (
            "quantization.training.2={}",
            "--set quantization.training.2={}: quantization.training is a list of 2; 2 is none of its indices, "
            "which start at 0",
        ),
        (
            "quantization.training.-1.steps=3",
            "--set quantization.training.-1.steps=3: quantization.training is a list of 2; -1 is none of its "
            "indices, which start at 0",
        ),
        (
            "quantization.training.steps=3",
            "--set quantization.training.steps=3: quantization.training is a list of 2; steps is none of its "
            "indices, which start at 0",
        ),
        ("fit.mistake=3", "r.yaml: fit.mistake: got 3; unknown key; remove or correct it"),
        ("fit.=3", "r.yaml: fit.: got 3; unknown key; remove or correct it"),
        ("fit.steps=many", "r.yaml: fit.steps: got 'many'; input should be a valid integer"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, complaint: str) -> None:
    path = written(tmp_path, yaml.safe_dump({**FULL, "seed": 0}))
    with pytest.raises(InputError) as caught:
        load_recipe(path, [override])
    assert str(caught.value).replace(str(tmp_path) + "/", "") == complaint


def test_overrides_do_not_touch_the_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    load_recipe(path, ["seed=3"])
    assert path.read_bytes() == before


def test_repeated_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: a\nfit:\n  steps: 1\n  steps: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.yaml: not valid YAML: key 'steps' stands twice .*line 4"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("compression.pattern=2:4", ("compression", "pattern"), "2:4"),
        ("fit.learning_rate=1e-3", ("fit", "learning_rate"), 1e-3),
        ("fit.learning_rate=.5", ("fit", "learning_rate"), 0.5),
        ("fit.learning_rate=2.5E+0", ("fit", "learning_rate"), 2.5),
        ("export.max_shard_size=2_000_000", ("export", "max_shard_size"), 2_000_000),
    ],
)
def test_plain_values_mean_what_they_look_like(override: str, path: tuple[str, str], value: object) -> None:
    recipe = load_recipe(RECIPES / "dinov2-small-digits.yaml", [override])
    assert recipe.model_dump()[path[0]][path[1]] == value


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({}, "vocabulary: give scripts or keep, or leave vocabulary out"),
        ({"keep": 0}, "vocabulary.keep: "),
        ({"scripts": []}, "vocabulary.scripts: "),
        ({"scripts": ["Elvish"]}, "vocabulary.scripts.0: got 'Elvish'; not Unicode's name of a script, as Latin, "),
        ({"scripts": ["Latin}|."]}, "vocabulary.scripts.0: got 'Latin}|.'; not Unicode's name of a script"),
        ({"script": ["Latin"]}, "vocabulary.script: "),
    ],
)
def test_vocabularies(vocabulary: dict[str, Any], message: str) -> None:
    base = content()
    base |= {"model": {"source": "causal_lm", "path": "there"}, "data": {"source": "text", "train": "a.txt"}}
    found = setting("vocabulary", vocabulary, base)
    assert [line for line in found if line.startswith(message)] == found
    assert found
