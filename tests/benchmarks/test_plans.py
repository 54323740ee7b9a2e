"""Recipes for widely used models can be planned, at all bits and patterns, and the page has a row for each model."""

import pytest
from places import ROOT

from benchmarks.plans import MODELS, Known, combinations, recipe_for, without_weights
from pipeline.estimate.sizes import least_size
from pipeline.models.adapters import find_mlps
from pipeline.recipe.plan import fitted_rows, make_plan

PAGE = (ROOT / "docs" / "results" / "plans.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("known", MODELS, ids=lambda known: known.name)
def test_every_recipe_can_be_planned(known: Known) -> None:
    sites = known.sites()
    for bits, pattern in combinations(known):
        recipe = recipe_for(known, bits, pattern)
        plan = make_plan(recipe, sites)
        assert plan.dense_blocks == ()
        for group in plan.groups:
            size = least_size(recipe, group)
            # No width costs more than an eighth of a bit for smaller blocks and 2 % for what fills rows up, beyond
            # float16 scales of the recipe's blocks.
            assert 8 * size.stored / group.parameters < (4 + 1) * 1.02 + 16 / known.block_size + 1 / 8
        for rows in fitted_rows(plan):
            assert rows.stored <= 1.02 * rows.length
            assert rows.block_size >= 32
    assert f"| {known.name} |" in PAGE


@pytest.mark.parametrize("name", ["SmolLM2 135M", "DINOv2-g", "Swin-T", "ViT of SigLIP So400m/14"])
def test_widths_are_those_of_the_models(name: str) -> None:
    known = next(known for known in MODELS if known.name == name)
    found = [(site.width, site.hidden, len(site.first)) for site in find_mlps(without_weights(known))]
    assert found == [(site.width, site.hidden, len(site.first)) for site in known.sites()]
