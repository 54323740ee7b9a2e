"""Folders of the repository that tests read."""

from pathlib import Path

SAMPLES = Path(__file__).parent
ROOT = SAMPLES.parents[1]
RECIPES = ROOT / "recipes"
