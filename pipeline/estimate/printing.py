"""What ``fips plan`` prints: a table of the groups, and what the run needs, with a warning if this machine lacks it."""

import shutil
from pathlib import Path

import psutil
from rich.table import Table

from pipeline.estimate import Estimate
from pipeline.estimate.time import Duration, duration, seconds_of_step
from pipeline.estimate.vocabulary import VocabularyEstimate
from pipeline.plumbing.console import table_console
from pipeline.recipe.schema import Allocate, Recipe, TextSection, VocabularySection


def print_estimate(recipe: Recipe, estimated: Estimate) -> None:
    """Print an estimate on standard output; a few steps of training are timed for it."""
    console = table_console()
    sizes = f"{estimated.parameters:,} parameters, {estimated.mlp_parameters:,} in compressed MLPs"
    console.print(f"{recipe.name}: {sizes}")
    console.print(_groups(estimated))
    if recipe.allocate is not None:
        console.print(f"with the largest choices of `allocate`, which has {_allowed(recipe.allocate, estimated)}")
    if estimated.plan.dense_blocks:
        console.print(f"left dense: blocks {list(estimated.plan.dense_blocks)}")
    for rows in estimated.fitted:
        console.print(str(rows))
    if estimated.vocabulary is not None:
        assert recipe.vocabulary is not None
        console.print(_vocabulary(estimated.vocabulary, recipe.vocabulary))
    float16 = 2 * estimated.dense_parameters
    console.print(
        f"weights of the artefact  {estimated.artifact_bytes:,} bytes, "
        f"{100 * estimated.artifact_bytes / float16:.1f} % of {float16:,} in float16 (graph, manifest and native "
        "library come on top)"
    )
    per_sample, samples = estimated.activation_bytes_per_sample, recipe.calibration.samples
    total = f", {per_sample * samples:,} in all" if samples else ""
    sample = f"window of {recipe.data.context} tokens" if isinstance(recipe.data, TextSection) else "image"
    console.print(f"disk for calibration     {per_sample:,} bytes per {sample}{total}")
    when, peak = estimated.peak_memory
    console.print(
        f"memory                   about {peak:,} bytes, most of it to {when}: {estimated.dense_bytes:,} for the "
        f"dense model, {estimated.group_training_bytes:,} to train the largest group"
    )
    if estimated.mapped_bytes:
        console.print(
            f"                         of these, {estimated.mapped_bytes:,} are mapped from the checkpoint: the system "
            f"takes them back where memory is short, so {peak - estimated.mapped_bytes:,} can do"
        )
    lasts = duration(recipe, estimated.plan, estimated.work, seconds_of_step)
    console.print(f"time                     {describe(lasts)}")
    for note in estimated.notes:
        console.print(f"note: {note}", markup=False)
    for shortage in shortages(estimated, samples):
        console.print(f"warning: {shortage}")


def _allowed(allocate: Allocate, estimated: Estimate) -> str:
    if allocate.artifact_bytes is not None:
        return (
            f"{allocate.artifact_bytes:,} bytes for the whole artefact; with the smallest, its weights take "
            f"{estimated.least_bytes:,}"
        )
    left = round(allocate.stored_bits * estimated.mlp_parameters / 8)
    return f"{left:,} bytes for these MLPs at {allocate.stored_bits:g} stored bits per weight"


def _vocabulary(cut: VocabularyEstimate, section: VocabularySection) -> str:
    share = "the text is on the hub and was not read"
    if cut.respelled is not None:
        train, test = (f"{100 * part:.2f} %" for part in cut.respelled)
        share = f"{train} of the training text's tokens and {test} of the test text's are spelled in others"
        if section.keep is not None:
            share += ", where ids decide among tokens that the text has equally often (a run asks the model)"
    return f"vocabulary               {cut.tokens:,} tokens, tokenizer.json {cut.tokenizer_bytes:,} bytes; {share}"


def describe(lasts: Duration) -> str:
    """How long a run takes, in minutes, and what takes them."""
    parts = {
        "the dense model's training": lasts.dense_training,
        "calibration and evaluation": lasts.passes,
        **lasts.training,
        "delivery": lasts.delivery,
    }
    listed = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items() if seconds)
    return (
        f"at least {lasts.least / 60:.1f} minutes here, by steps that were timed ({listed}); expect up to "
        f"{lasts.expected / 60:.1f}"
    )


def shortages(estimated: Estimate, calibration_samples: int | None) -> list[str]:
    """What this machine has less of than the run needs, in plain words."""
    found = []
    when, peak = estimated.peak_memory
    least, there = peak - estimated.mapped_bytes, psutil.virtual_memory().total
    if least > there:
        found.append(
            f"this machine has {there:,} bytes of memory, and the run needs about {least:,} to {when}; "
            "train locally, with smaller groups or a smaller compression.budget"
        )
    disk = estimated.activation_bytes_per_sample * (calibration_samples or 1)
    free = shutil.disk_usage(Path.cwd()).free
    if disk > free:
        found.append(
            f"{free:,} bytes are free on the disk of this folder, and calibration takes {disk:,}; lower "
            "calibration.samples"
        )
    return found


def _groups(estimated: Estimate) -> Table:
    table = Table("group", "blocks", "d", "N", "rank", "MLP bytes", "stored bits/weight", "paper bits/weight", box=None)
    for group in estimated.plan.groups:
        size = estimated.sizes[group.name]
        blocks = ", ".join(str(site.block) for site in group.sites)
        table.add_row(
            group.name,
            blocks,
            str(group.width),
            str(group.columns),
            str(group.rank),
            f"{size.stored:,}",
            f"{8 * size.stored / group.dense_parameters:.2f}",
            f"{size.value_bits / group.dense_parameters:.2f}",
        )
    return table
