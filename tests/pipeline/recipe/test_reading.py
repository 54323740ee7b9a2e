"""Whatever stands in a YAML file or in ``--set`` is a recipe or ends in one message, never in a traceback."""

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from factored_samples import content
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.plumbing.errors import InputError
from pipeline.recipe.reading import LARGEST_FILE, load_recipe, parse_recipe, read_yaml
from pipeline.recipe.schema import Recipe
from pipeline.sweep.definition import Sweep, load_sweep

REFUSED = [
    ("a: {{ x }}", "a key is a plain value, not a list or mapping"),
    ("? [a, b]\n: 1", "a key is a plain value, not a list or mapping"),
    ("? {a: b}\n: 1", "a key is a plain value, not a list or mapping"),
    ("&a {*a : 1}", "a key is a plain value"),
    ("a: &a [*a]", "an alias refers to what it is in"),
    ("a: &a {b: {c: *a}}", "an alias refers to what it is in"),
    ("a: &a {<<: *a}", "an alias refers to what it is in"),
    ("a: *b", "undefined alias"),
    ("a: 1\na: 2", "key 'a' stands twice"),
    ("a: {b: 1, b: 1}", "key 'b' stands twice"),
    ("a: !!python/object:os.system {}", "values of the type !!python/object:os.system have no place"),
    ("a: !!python/name:os.system", "have no place"),
    ("a: !!set {x}", "values of the type !!set have no place"),
    ("a: !!omap [x: 1]", "values of the type !!omap have no place"),
    ("a: !!pairs [x: 1]", "values of the type !!pairs have no place"),
    ("a: !!binary aGk=", "values of the type !!binary have no place"),
    ("a: !!timestamp 2001-99-99", "values of the type !!timestamp have no place"),
    ("a: !mine x", "values of the type !mine have no place"),
    ("a: !!int x", "'x' is no int"),
    ("a: !!int ''", "'' is no int"),
    ("a: !!float ''", "'' is no float"),
    ("a: !!bool maybe", "'maybe' is no bool"),
    ("a: !!null x", "'x' is no null"),
    ("a: !!map [1]", "expected a mapping node"),
    ("a: !!seq {}", "expected a sequence node"),
    ("<<: 3", "expected a mapping or list of mappings for merging"),
    ("a: " + "9" * 5000, "takes more than 64 bits"),
    ("a: -9223372036854775809", "takes more than 64 bits"),
    ("a: .nan", "'.nan' is not a finite number"),
    ("a: -.inf", "'-.inf' is not a finite number"),
    ("a: 1e999", "'1e999' is not a finite number"),
    ('a: "\\0"', "holds characters that no text has"),
    ('"\\ud800": a', "holds characters that no text has"),
    ("a: \x07", "special characters are not allowed"),
    ("a: " + "[" * 2_000, "nested too deeply"),
    ("a: " + "{b: " * 2_000, "nested too deeply"),
    ("a: 1\n---\nb: 1", "expected a single document"),
    ("%YAML 9.9\n---\na: 1", "incompatible YAML document"),
    (
        "a: &a [" + "1," * 10 + "]\n"
        + "".join(f"{y}: &{y} [{f'*{x},' * 10}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
        "it stands for more than 100,000 values",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaint"), REFUSED, ids=lambda text: text[:24])
def test_what_has_no_place_in_a_recipe_is_refused_where_it_stands(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    begin = time.monotonic()
    for load in (load_recipe, load_sweep):
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: not valid YAML: ")
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("text", "complaint"),
    [case for case in REFUSED if "a: " in case[0][:3] and "\n" not in case[0]],
    ids=lambda text: text[:24],
)
def test_the_same_in_an_override(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content()), encoding="utf-8")
    override = f"data.train={text.removeprefix('a: ')}"
    with pytest.raises(InputError) as caught:
        load_recipe(path, [override])
    assert str(caught.value).startswith(f"--set {override}: the value is not valid YAML: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2026-01-31", {"a": "2026-01-31"}),
        ("a: 2:4", {"a": "2:4"}),
        ("a: 1_000", {"a": 1000}),
        ("a: 9223372036854775807", {"a": 2**63 - 1}),
        ("a: 1e-3", {"a": 1e-3}),
        ("a: !!str 3", {"a": "3"}),
        ("\ufeffa: 1", {"a": 1}),
        ("b: &b {x: 1, y: 2}\nc: {<<: *b, x: 3}", {"b": {"x": 1, "y": 2}, "c": {"x": 3, "y": 2}}),
        ("c: {<<: &b {x: 1, y: 2}, x: 3}\nd: *b", {"c": {"x": 3, "y": 2}, "d": {"x": 1, "y": 2}}),
    ],
)
def test_plain_values(tmp_path: Path, text: str, value: dict[str, Any]) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "r.yaml", "recipe") == value


def test_an_override_changes_one_of_the_places_that_share_a_value(tmp_path: Path) -> None:
    text = yaml.safe_dump(content()) + "calibration: &shared {batch_size: 4}\nevaluation: *shared\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", ["evaluation.batch_size=8"])
    assert (recipe.calibration.batch_size, recipe.evaluation.batch_size) == (4, 8)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("a: 1".encode("utf-16"), "it is not text in UTF-8"),
        (b"a: \xed\xa0\x80", "it is not text in UTF-8"),
        (b"#" * (LARGEST_FILE + 1), "it has more than 1,048,576 bytes"),
        (None, "it has more than 1,048,576 bytes"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, data: bytes | None, complaint: str) -> None:
    path = Path("/dev/zero") if data is None else tmp_path / "r.yaml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: cannot read the recipe: {complaint}"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("fit..steps=1", "'fit..steps' has an empty part; write it as key.subkey"),
        (".fit=1", "'.fit' has an empty part; write it as key.subkey"),
        ("quantization.training.²=1", "quantization.training is a list of 1; ² is none of its indices"),
        ("quantization.training.٠.steps=1", "٠ is none of its indices"),
        ("quantization.training.99999999999999999999.steps=1", "99999999999999999999 is none of its indices"),
        (f"quantization.training.{'9' * 5000}=1", "is none of its indices"),
        ("model.config.id2label={0: cat}", "model.config.id2label.0: keys are text here; write it in quotes"),
        ("model.config.deep=[[{null: 1}]]", "model.config.deep.0.0.None: keys are text here"),
        ("fit=" + "[" + "1," * 5000 + "]", "…; input should be a valid dictionary"),
        ("fit={" + ", ".join(f"k{n}: 1" for n in range(5000)) + "}", "and 4981 more"),
    ],
)
def test_odd_overrides(tmp_path: Path, override: str, complaint: str) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(content(quantization__training=[{"objective": "local", "steps": 2}])), encoding="utf-8"
    )
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "r.yaml", [override])
    assert complaint in str(caught.value)
    assert len(str(caught.value).replace(override, "")) < 8000


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({1: [1, 2]}, "axes.1: got 1; input should be a valid string"),
        ({"fit.steps": [1, 1]}, "axes.fit.steps: "),
        ({"a": {1: {}, "1": {}}}, "axes.a: "),
    ],
)
def test_odd_axes(tmp_path: Path, axes: dict[Any, Any], complaint: str) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content()), encoding="utf-8")
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "recipe": "r.yaml", "axes": axes}), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_sweep(path)
    assert complaint in str(caught.value)


# --- anything --------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        "a", "fit", "data", "steps", ": ", "? ", "- ", "[", "]", "{", "}", "&x ", "*x", "<<: ", "!!", "!!python/tuple ",
        "!!set ", "!!int ", "!!binary ", "'", '"', "\\0", "\n", "\n  ", "  ", "---\n", "#", "|", ">", "%", "@", "`",
        "1", "1e999", ".nan", "0x10", "2001-01-01", "12:30:45", "null", "~", "yes", "=", ",", "\ufeff", "\t", "\r",
    ]
)  # fmt: skip
YAML_LIKE = st.text(max_size=60) | st.lists(FRAGMENTS, max_size=25).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.lists(
    st.sampled_from([*content(), "basis", "bits", "training", "config", "steps", "0", "1", "-1", "²", "", "x"]),
    min_size=1,
    max_size=4,
).map(".".join)
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(YAML_LIKE | VALUES.map(yaml.dump) | st.binary(max_size=40))
@QUICK
def test_any_text_is_refused_as_a_recipe_and_as_a_sweep(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for load in (load_recipe, load_sweep):
        with pytest.raises(InputError):
            load(path)


@given(st.tuples(KEYS, YAML_LIKE | VALUES.map(yaml.safe_dump)).map("=".join) | YAML_LIKE)
@example("fit={{x}}")
@QUICK
def test_any_override_gives_a_recipe_or_a_message(tmp_path: Path, override: str) -> None:
    path = tmp_path / "r.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(content()), encoding="utf-8")
    with contextlib.suppress(InputError):
        recipe = load_recipe(path, [override])
        assert isinstance(recipe, Recipe)
        assert parse_recipe(recipe.model_dump(mode="json"), "fips.json") == recipe


@given(key=KEYS, values=st.lists(VALUES, max_size=3))
@QUICK
def test_any_axis_gives_points_or_a_message(tmp_path: Path, key: str, values: list[Any]) -> None:
    recipe, path = tmp_path / "r.yaml", tmp_path / "s.yaml"
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(content()), encoding="utf-8")
    path.write_text(yaml.safe_dump({"name": "s", "recipe": "r.yaml", "axes": {key: values}}), encoding="utf-8")
    with contextlib.suppress(InputError):
        assert isinstance(load_sweep(path), Sweep)
