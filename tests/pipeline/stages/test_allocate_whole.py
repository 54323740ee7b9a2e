"""Allocation of the bytes of a whole artefact: MLPs, other linear layers and the token table of a language model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from causal_lm_samples import tiny_language_model
from language_samples import byte_level_tokenizer
from run_samples import StoppingProgress, StopRun, language_recipe, quantization_of_language

from fips_ort.manifest import read_manifest
from pipeline.estimate import estimate
from pipeline.evaluation import text_speed
from pipeline.plumbing.errors import InputError, StageError
from pipeline.plumbing.files import read_json
from pipeline.plumbing.integrity import read_sealed
from pipeline.plumbing.progress import Progress
from pipeline.quantization.rest_layers import bits_as_json, bits_from_json, layers_by_input, rest_linears
from pipeline.recipe.schema import Recipe, Tier
from pipeline.report.schema import Report
from pipeline.run import run
from pipeline.stages import allocate
from pipeline.stages.best_combination import best_combination
from pipeline.stages.deliver import _against_target
from pipeline.tasks import make_task

TIERS = [{"bits": 8, "tokens": 40}, {"bits": 3}]
LAYERS = 3
MLP_CHOICES, LINEAR_CHOICES, TABLE_CHOICES = 2, 3, 3
ATTENTION = [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
GROUPS = [f"group_{layer}" for layer in range(LAYERS)]
PARTS = [f"{path}.{first}_proj" for path in ATTENTION for first in "qo"] + ["model.embed_tokens"]
LARGEST_OVERESTIMATE = 150_000


@pytest.fixture(autouse=True, scope="module")
def short_bench() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_speed, "GENERATED_TOKENS", 3)
        patch.setattr(text_speed, "ROUNDS", 1)
        patch.setattr("pipeline.tasks.causal_lm.PROMPT_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with random weights in ``model``, and text."""
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_language_model("gemma3")
    model.save_pretrained(folder / "model")
    byte_level_tokenizer().save_pretrained(folder / "model")
    lines = [f"{number} owls sleep near the {number * 7} rivers in the barn." for number in range(90)]
    (folder / "train.txt").write_text("\n".join(lines[:60]), encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines[60:]), encoding="utf-8")
    return folder


def whole(sources: Path, target: str, **changes: Any) -> Recipe:
    """All MLPs, the attention of all layers and the table are open; nothing is trained."""
    content: dict[str, Any] = {
        "calibration": {"samples": 8, "batch_size": 4},
        "compression": {"groups": 1, "budget": 0.8, "pattern": "dense"},
        "fit": None,
        "quantization": quantization_of_language(training=[]),
        "evaluation": {"samples": 4, "batch_size": 4},
        "allocate": {
            "target": target,
            "bits": [4, 2],
            "linear_bits": [8, 4, 2],
            "embedding_bits": [8, TIERS, 2],
            "samples": 2,
        },
    }
    return language_recipe(sources / "model", sources, **(content | changes))


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Report, int]:
    """A run whose target is about halfway between the smallest and the largest choices: recipe, folder, report, and the
    bytes that a target too small named."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.raises(InputError) as refused:
        run(whole(sources, "700kB"), folder, Progress())
    said = r"allocate\.target: 700kB is below what the smallest choices take, ([\d,]+) bytes"
    named = re.search(said, str(refused.value))
    assert named is not None
    least = int(named[1].replace(",", ""))
    with pytest.raises(StopRun):  # the smallest that works
        run(whole(sources, f"{least}B"), folder, StoppingProgress("factorize/group_0"))
    with pytest.raises(InputError, match=r"below what the smallest choices take"):
        run(whole(sources, f"{least - 1}B"), folder, Progress())
    recipe = whole(sources, f"{least + 9000}B")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "_divergence", lambda *_: pytest.fail("measured for another target already"))
        return recipe, folder, run(recipe, folder, Progress()), least


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = {path.stem: read_sealed(path) for path in (folder / "work/sensitivities").glob("*.json")}
    return {name: entries for name, entries in found.items() if isinstance(entries, list)}


def test_every_choice_of_every_part_is_measured(finished: tuple[Recipe, Path, Report, int]) -> None:
    found = measured(finished[1])
    assert found.keys() == {*GROUPS, *PARTS}
    lengths = {name: len(entries) for name, entries in found.items()}
    assert {lengths[name] for name in GROUPS} == {MLP_CHOICES}
    assert {lengths[name] for name in PARTS[:-1]} == {LINEAR_CHOICES}
    assert lengths[PARTS[-1]] == TABLE_CHOICES
    for path in ATTENTION:  # queries, keys and values are one product
        (first, *_) = found[f"{path}.q_proj"]
        assert first["choice"] == {f"{path}.{name}_proj": 8 for name in "qkv"}
    for name in PARTS:
        # Bytes fall with the bits, and the loss rises: from 8 bits to 2 by orders of magnitude.
        sizes, losses = ([entry[key] for entry in found[name]] for key in ("stored_bytes", "divergence"))
        assert sizes == sorted(sizes, reverse=True)
        assert losses == sorted(losses)
        assert losses[-1] > 20 * losses[0] > 0


def test_the_choice_is_the_best_that_fits(finished: tuple[Recipe, Path, Report, int]) -> None:
    recipe, folder, _, least = finished
    found, chosen = measured(folder), read_json(folder / "work/allocate/chosen.json")
    picked = chosen["groups"] | chosen["rest"]
    assert picked.keys() == found.keys()
    assert all(picked[name] in entries for name, entries in found.items())
    smallest = sum(min(entry["stored_bytes"] for entry in entries) for entries in found.values())
    assert chosen["unchosen_bytes"] == least - smallest
    assert recipe.allocate is not None
    assert recipe.allocate.artifact_bytes is not None
    budget = recipe.allocate.artifact_bytes - chosen["unchosen_bytes"]
    spent = sum(entry["stored_bytes"] for entry in picked.values())
    assert spent <= budget
    best = best_combination(
        {name: [(entry["stored_bytes"], entry["divergence"]) for entry in entries] for name, entries in found.items()},
        budget,
    )
    assert best is not None
    assert {name: found[name][index] for name, index in best.items()} == picked
    # Not one extreme: some parts have gained, others not.
    assert smallest < spent
    assert any(picked[name]["stored_bytes"] < max(e["stored_bytes"] for e in found[name]) for name in found)


def test_the_artefact_has_the_chosen_bits_and_keeps_to_the_target(finished: tuple[Recipe, Path, Report, int]) -> None:
    recipe, folder, report, _ = finished
    chosen = read_json(folder / "work/allocate/chosen.json")
    bits = {path: width for entry in chosen["rest"].values() for path, width in entry["choice"].items()}
    manifest = read_manifest(folder / "artifact")
    weights = {weight.name: weight for weight in manifest.weights}
    for path, width in bits.items():
        segments = dict(zip((8, 4, 3, 2), weights[path].segments, strict=True))
        tokens = weights[path].rows
        wanted = {width: tokens} if isinstance(width, int) else {8: 40, 3: tokens - 40}
        assert {own: rows for own, rows in segments.items() if rows} == wanted
    reported = {weight.name: weight.bits for weight in report.rest_weights}
    assert reported.keys() == bits.keys()
    assert all(reported[path] == {str(width): weights[path].rows} for path, width in bits.items() if width in (8, 4, 2))
    assert recipe.allocate is not None
    assert recipe.allocate.artifact_bytes is not None
    # What was chosen takes what was measured; all else was counted too high, by little.
    picked = chosen["groups"] | chosen["rest"]
    spent = sum(entry["stored_bytes"] for entry in picked.values())
    others = report.bytes.artifact - spent
    assert 0 <= chosen["unchosen_bytes"] - others <= LARGEST_OVERESTIMATE
    assert report.bytes.artifact <= recipe.allocate.artifact_bytes
    assert report.parity.same_predictions


def test_a_killed_measurement_goes_on(
    finished: tuple[Recipe, Path, Report, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder, _, _ = finished
    whole_divergence, calls = allocate._divergence, 0

    def stop_at_the_eighth(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise StopRun
        return whole_divergence(*arguments)

    monkeypatch.setattr(allocate, "_divergence", stop_at_the_eighth)
    with pytest.raises(StopRun):
        run(recipe, tmp_path, Progress())
    with pytest.raises(StopRun):
        run(recipe, tmp_path, StoppingProgress("factorize/group_0"))
    assert calls == 1 + sum(map(len, measured(folder).values()))  # only what was interrupted came twice
    assert measured(tmp_path) == measured(folder)


def test_plan_counts_smallest_and_largest_choices(sources: Path) -> None:
    plain = {"quantization": quantization_of_language(training=[]), "compression": whole(sources, "2MB").compression}

    def alone(bits: int, linear: int, table: Any) -> int:
        rest = {"linear_bits": linear, "embedding_bits": table, "block_size": 16}
        quantization = quantization_of_language(training=[], rest=rest)
        quantization["projections"] = quantization["projections"] | {"bits": bits}
        compression = plain["compression"].model_dump(mode="json")  # type: ignore[union-attr]
        own = whole(sources, "2MB", allocate=None, quantization=quantization, compression=compression)
        return estimate(own).artifact_bytes

    estimated = estimate(whole(sources, "2MB"))
    assert estimated.least_bytes == alone(2, 2, 2)
    assert estimated.rest_bytes - estimate(whole(sources, "2MB", allocate=None)).rest_bytes == (
        alone(2, 8, 8) - alone(2, 4, 4)
    )
    said = rf"allocate\.target: 3kB is below what the weights alone .*{alone(2, 2, 2):,}"
    with pytest.raises(InputError, match=said):
        estimate(whole(sources, "3kB"))
    tiers = [{"bits": 8, "tokens": 10_000}, {"bits": 2}]
    allocation = {"target": "2MB", "embedding_bits": [4, tiers]}
    with pytest.raises(InputError, match=r"allocate\.embedding_bits\.1: the tiers before the last take 10,000 tokens"):
        estimate(whole(sources, "2MB", allocate=allocation))


def test_an_artefact_above_the_target_is_refused_with_a_target_that_works() -> None:
    assert _against_target(999, 1000, "1kB") == "999 bytes, 1 below allocate.target: 1kB"
    assert _against_target(1000, 1000, "1kB") == "1,000 bytes, 0 below allocate.target: 1kB"
    with pytest.raises(StageError, match=r"1,030 bytes, 30 more than allocate\.target: 1kB; .* to 970B"):
        _against_target(1030, 1000, "1kB")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target": 3.0, "linear_bits": [4]}, r"allocate\.linear_bits: target: 3\.0 is stored bits of the MLPs"),
        ({"target": 3.0, "embedding_bits": [4]}, r"allocate\.embedding_bits: target: 3\.0 is stored bits of the MLPs"),
        ({"target": "3XB", "bits": [4]}, r"allocate\.target: got '3XB'; write a number with B, kB, MB"),
        ({"target": 135_000_000, "bits": [4]}, r"allocate\.target: got 135000000; .* with its unit, as in 135MB"),
        ({"target": "1MB", "embedding_bits": [[*TIERS, {"bits": 2}]]}, r"embedding_bits\.0\.1\.tokens: required key"),
        ({"target": "1MB", "linear_bits": []}, r"allocate\.linear_bits: got \[\]"),
        ({"target": "1MB"}, r"allocate: nothing to choose from; give budgets, .* or embedding_bits"),
    ],
)
def test_targets_that_make_no_sense(sources: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        whole(sources, "1MB", allocate=changes)


@pytest.mark.parametrize("key", ["linear_bits", "embedding_bits"])
def test_what_is_chosen_is_stored_as_codes(sources: Path, key: str) -> None:
    rest = {name: 4 for name in ("linear_bits", "embedding_bits") if name != key}
    with pytest.raises(InputError, match=rf"allocate\.{key}: chooses in the place of quantization\.rest\.{key}"):
        whole(
            sources,
            "1MB",
            allocate={"target": "1MB", key: [4]},
            quantization=quantization_of_language(training=[], rest=rest),
        )


def test_layers_that_read_the_same_are_one_part(sources: Path) -> None:
    """Also where the layer behind attention reads as many features as those before it."""
    task = make_task(whole(sources, "1MB"))
    task.open_dense(Path())
    linears = rest_linears(task.model, task.sites)
    layers = layers_by_input(lambda: task.run_dense(task.training_batch([0])), linears)
    assert layers == [
        names for path in ATTENTION for names in (tuple(f"{path}.{name}_proj" for name in "qkv"), (f"{path}.o_proj",))
    ]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_bits_by_path_are_read_as_they_were_written() -> None:
    bits = {"a": 3, "b": [Tier(bits=8, tokens=5), Tier(bits=2)]}
    assert bits_from_json(json.loads(json.dumps(bits_as_json(bits)))) == bits
