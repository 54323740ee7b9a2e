"""Allocation over groups: the best combination, choices of a recipe, and a run whose groups differ."""

import itertools
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_samples import TINY, StoppingProgress, StopRun, no_bench, tiny_recipe

from pipeline.estimate import estimate
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import read_json, write_json
from pipeline.plumbing.integrity import read_sealed, write_sealed
from pipeline.plumbing.progress import Progress
from pipeline.recipe.choices import Choice, choices_of
from pipeline.recipe.reading import parse_recipe
from pipeline.recipe.schema import Recipe
from pipeline.report.schema import Report
from pipeline.run import run
from pipeline.stages.allocate import Measured, load_measured
from pipeline.stages.best_combination import best_combination
from pipeline.tasks.image_classification import ImageClassificationTask

# --- the best combination --------------------------------------------------------------------------------------

ENTRIES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4)


@given(st.lists(ENTRIES, min_size=1, max_size=4), st.integers(0, 60))
def test_best_combination_is_the_best_of_all(groups: list[list[tuple[int, int]]], budget: int) -> None:
    parts = {
        f"group_{index}": [(size, loss / 8) for size, loss in entries] for index, entries in enumerate(groups)
    }
    within = [
        sum(cost for _, cost in combination)
        for combination in itertools.product(*parts.values())
        if sum(size for size, _ in combination) <= budget
    ]
    found = best_combination(parts, budget)
    if not within:
        assert found is None
        return
    assert found is not None
    assert found.keys() == parts.keys()
    chosen = [parts[name][index] for name, index in found.items()]
    assert sum(size for size, _ in chosen) <= budget
    assert sum(cost for _, cost in chosen) == min(within)


def test_many_parts_of_many_sizes_take_seconds_and_lose_next_to_nothing() -> None:
    """76 parts whose sizes have no common measure. The bound of duality, min over l of the sum of each part's least
    cost + l * bytes, less l * budget, is below any combination."""
    draw = np.random.default_rng(0)
    parts = {}
    for number in range(76):
        sizes = np.sort(draw.integers(100_000, 9_000_000, 5))
        parts[f"part_{number}"] = [
            (int(size), float(cost)) for size, cost in zip(sizes, draw.random() * 1e6 / sizes, strict=True)
        ]
    least = sum(min(size for size, _ in choices) for choices in parts.values())
    budget = 2 * least
    begin = time.monotonic()
    found = best_combination(parts, budget)
    seconds = time.monotonic() - begin
    assert found is not None
    chosen = [parts[name][index] for name, index in found.items()]
    assert sum(size for size, _ in chosen) <= budget
    bound = max(
        sum(min(cost + price * size for size, cost in choices) for choices in parts.values()) - price * budget
        for price in np.geomspace(1e-9, 1e-4, 2000)
    )
    assert bound <= sum(cost for _, cost in chosen) <= 1.001 * bound
    assert seconds < 20
    assert best_combination(parts, least - 1) is None
    smallest = best_combination(parts, least)
    assert smallest is not None
    assert sum(parts[name][index][0] for name, index in smallest.items()) == least


# --- recipes ---------------------------------------------------------------------------------------------------


def allocating(**settings: Any) -> Recipe:
    return tiny_recipe(allocate={"target": 3.0, "samples": 16, **settings})


def test_choices_are_all_combinations() -> None:
    graded = [{"bits": 4, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}]
    choices = choices_of(allocating(budgets=[0.6, 0.4], bits=[3, graded]))
    assert choices == [Choice(0.6, None, 3), Choice(0.6, None, graded), Choice(0.4, None, 3), Choice(0.4, None, graded)]
    recipe = choices[3].apply(allocating(bits=[3]))
    assert recipe.compression.budget == 0.4
    assert recipe.compression.sparsity == 0.5
    assert isinstance(recipe.quantization.projections.bits, list)
    assert [grade.bits for grade in recipe.quantization.projections.bits] == [4, 2]
    assert Choice(None, 0.75, None).apply(recipe).compression.target_sparsity == 0.75


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allocate": {"target": 3.0}}, ["allocate", "nothing to choose from"]),
        ({"allocate": {"target": 0.0, "bits": [3]}}, ["allocate.target"]),
        ({"allocate": {"target": 3.0, "bits": []}}, ["allocate.bits"]),
        (
            {
                "allocate": {"target": 3.0, "sparsities": [0.5]},
                "compression": {"groups": 3, "budget": 0.6, "pattern": "1:4"},
            },
            ["allocate.sparsities", "1:4"],
        ),
        (
            {
                "allocate": {"target": 3.0, "bits": [3]},
                "compression": {"method": "dense", "pattern": "dense"},
                "fit": None,
                "quantization": {"projections": {"bits": 3, "block_size": 16}},
            },
            ["allocate", "method dense"],
        ),
        (
            {
                "allocate": {"target": 3.0, "bits": [3]},
                "quantization": {
                    "basis": {"bits": 4, "block_size": 16},
                    "projections": {"bits": "allocate", "block_size": 16},
                    "target_stored_bits": 3.0,
                },
            },
            ["allocate", "take one of them"],
        ),
    ],
)
def test_bad_allocations_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        parse_recipe({**TINY, **changes}, "tiny.yaml")
    assert all(word in str(refused.value) for word in words)


def test_plan_counts_the_largest_choice() -> None:
    largest = estimate(allocating(budgets=[0.9])).plan.groups
    assert estimate(allocating(budgets=[0.6, 0.9])).plan.groups == largest


def test_a_choice_that_cannot_work_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"compression\.budget: 0\.1 gives group 0 rank"):
        estimate(allocating(budgets=[0.6, 0.1]))


# --- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Report]:
    """A run that chose; its recipe, folder and report. Not to be changed."""
    recipe, folder = allocating(budgets=[0.9, 0.6], bits=[4, 2]), tmp_path_factory.mktemp("allocated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageClassificationTask, "bench", no_bench)
        return recipe, folder, run(recipe, folder, Progress())


def test_the_choice_is_the_best_of_what_was_measured(allocated: tuple[Recipe, Path, Report]) -> None:
    recipe, folder, report = allocated
    work = folder / "work/allocate"
    chosen = read_json(work / "chosen.json")["groups"]
    assert sorted(chosen) == ["group_0", "group_1"]
    total = 0
    for group in report.groups:
        measured = read_sealed(folder / "work/sensitivities" / f"{group.name}.json")
        assert isinstance(measured, list)
        assert [entry["choice"]["budget"] for entry in measured] == [0.9, 0.9, 0.6, 0.6]
        assert chosen[group.name] in measured
        total += chosen[group.name]["stored_bytes"]
        by_choice = {(entry["choice"]["budget"], entry["choice"]["bits"]): entry for entry in measured}
        # More bits and more rank cost less quality and more bytes.
        assert by_choice[0.9, 4]["divergence"] < by_choice[0.9, 2]["divergence"]
        assert by_choice[0.9, 4]["stored_bytes"] > by_choice[0.9, 2]["stored_bytes"]
        assert by_choice[0.9, 4]["stored_bytes"] > by_choice[0.6, 4]["stored_bytes"]
    weights = sum(group.width * group.columns for group in report.groups)
    assert recipe.allocate is not None
    assert 8 * total / weights <= recipe.allocate.target


def test_groups_come_out_as_they_were_chosen(allocated: tuple[Recipe, Path, Report]) -> None:
    recipe, folder, report = allocated
    chosen = read_json(folder / "work/allocate/chosen.json")["groups"]
    for group in report.groups:
        choice = Choice(**chosen[group.name]["choice"])
        assert list(group.projection_bits) == [str(choice.bits)]
        alone = estimate(choice.apply(recipe).model_copy(update={"allocate": None})).plan.groups
        assert group.rank == next(plan.rank for plan in alone if plan.name == group.name)
    assert report.bits_per_weight.stored <= 3.0 + 0.1  # bitmaps of the fit keep other entries in other bytes
    assert report.parity.same_predictions


def test_a_killed_allocation_goes_on(allocated: tuple[Recipe, Path, Report], tmp_path: Path) -> None:
    recipe, folder, _ = allocated
    with pytest.raises(StopRun):
        run(recipe, tmp_path, StoppingProgress("factorize/group_0"))
    expected = read_sealed(folder / "work/sensitivities/group_1.json")
    assert isinstance(expected, list)
    # As if it had been killed after the second choice of the last group.
    work = tmp_path / "work/sensitivities"
    stage = read_json(work / "stage.json")
    (work / "stage.json").unlink()
    write_json(work / "started.json", {"key": stage["key"]})
    write_sealed(work / "group_1.json", [{**expected[0], "divergence": 99.0}, *expected[1:2]])
    with pytest.raises(StopRun):
        run(recipe, tmp_path, StoppingProgress("factorize/group_0"))
    found = read_sealed(work / "group_1.json")
    assert isinstance(found, list)
    assert found[0]["divergence"] == 99.0  # taken, not measured again
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"sha256": "0", "content": []}', b"\xff", None])
def test_damaged_measurements_of_a_killed_allocation_are_made_again(
    tmp_path: Path, content: bytes | None
) -> None:
    """None: one figure is another, in as many bytes."""
    path = tmp_path / "measured.json"
    choices = [Choice(0.5, None, 4), Choice(0.5, None, 2)]
    entries = [asdict(Measured(choice, 100, 0.25)) for choice in choices]
    write_sealed(path, entries[:1])
    assert load_measured(path, choices) == [Measured(choices[0], 100, 0.25)]
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35") if content is None else content)
    assert load_measured(path, choices) == []
    path.unlink()
    assert load_measured(path, choices) == []


def test_a_target_too_low_names_one_that_works(tmp_path: Path) -> None:
    recipe = allocating(target=0.5, budgets=[0.9, 0.6], bits=[4, 2], samples=1)
    with pytest.raises(InputError) as refused:
        run(recipe, tmp_path, Progress())
    found = re.search(r"allocate\.target: 0\.5 is below .* take, (\d\.\d+); raise it", str(refused.value))
    assert found is not None
    enough = float(found[1])
    again = recipe.model_copy(update={"allocate": recipe.allocate.model_copy(update={"target": enough + 1e-3})})  # type: ignore[union-attr]
    with pytest.raises(StopRun):
        run(again, tmp_path, StoppingProgress("factorize/group_0"))
