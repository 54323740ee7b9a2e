"""What an artefact holds besides the weights whose bits an allocation chooses: counted before anything is exported."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from fips_ort.native import library_path
from pipeline.quantization.rest_layers import rest_bits
from pipeline.quantization.rest_sizes import packed_bytes, rest_bytes
from pipeline.recipe.plan import Plan
from pipeline.tasks.base import Task

GRAPH_BYTES = 110_000
"""Bytes of the functions of all ops, which are in every graph (65 kB), README, recipe and versions, at most."""
PARAMETER_BYTES = 1_800
"""Bytes that a parameter of the dense model causes in graph and manifest, at most: Gemma 3 270M has 236, and 359 kB of
graph with 85 kB of manifest."""
LINE_BYTES, PAGE_BYTES = 128, 4096
"""Bytes that align what is stored of a parameter, at most: codes and scales, or a tensor of a mebibyte."""
ARRAY_BYTES = 128
"""Bytes of the header of a ``.npy`` file."""


def unchosen_bytes(task: Task, plan: Plan, chosen: Collection[str]) -> int:
    """Bytes of the artefact without the packed MLPs and without the weights at the paths ``chosen``.

    Library, tokenizer and configuration, golden inputs and outputs, and weights are counted; of graph and manifest it
    is the most that they take.
    """
    recipe, model = task.recipe, task.model
    bits = rest_bits(recipe, model, task.sites)
    open_bits = {path: width for path, width in bits.items() if path in chosen}
    block_size = recipe.quantization.rest.block_size
    weights = rest_bytes(recipe, model, task.sites, plan) - packed_bytes(model, open_bits, block_size)
    golden = task.golden(task.predictor(model), 0.0)
    arrays = [*golden.inputs.values(), *golden.outputs.values()]
    packed = {path for group in plan.groups for site in group.sites for path in site.linear_paths} | bits.keys()
    return (
        weights
        + sum(array.nbytes + ARRAY_BYTES for array in arrays)
        + library_path().stat().st_size
        + _config_bytes(task)
        + GRAPH_BYTES
        + sum(
            PARAMETER_BYTES + _alignment(parameter.numel(), name.rpartition(".")[0] in packed)
            for name, parameter in model.named_parameters()
        )
    )


def _alignment(values: int, is_packed: bool) -> int:
    """Bytes that align a parameter of so many values, at most; packed ones are taken to have 4 bits a value."""
    stored = values // 2 if is_packed else 2 * values
    return PAGE_BYTES if stored >= 1 << 20 else LINE_BYTES


def _config_bytes(task: Task) -> int:
    """Bytes of configuration and tokenizer or image processor."""
    with TemporaryDirectory() as folder:
        task.save_config(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
