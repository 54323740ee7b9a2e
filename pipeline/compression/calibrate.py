"""Calibration: inputs and outputs of every compressed MLP of the dense model, on disk, memory-mapped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import create_array
from pipeline.plumbing.progress import Progress
from pipeline.recipe.plan import MLPSite


@dataclass(frozen=True)
class Activations:
    """What one MLP read and wrote, float32 [tokens, d] each, memory-mapped."""

    inputs: np.ndarray
    outputs: np.ndarray

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` tokens drawn at random (with replacement)."""
        rows = torch.randint(self.inputs.shape[0], (count,), generator=generator).sort().values.numpy()
        # Into memory of torch's own: its alignment does not vary, and with it the order of summation in products.
        return torch.tensor(self.inputs[rows]), torch.tensor(self.outputs[rows])


def activation_files(folder: Path, site: MLPSite) -> tuple[Path, Path]:
    return folder / f"block_{site.block:02d}_inputs.npy", folder / f"block_{site.block:02d}_outputs.npy"


def open_activations(folder: Path, site: MLPSite) -> Activations:
    inputs, outputs = activation_files(folder, site)
    return Activations(np.load(inputs, mmap_mode="r"), np.load(outputs, mmap_mode="r"))


def record_activations(
    model: nn.Module,
    sites: Sequence[MLPSite],
    *,
    predict: Callable[[Tensor], object],
    batch_of: Callable[[Sequence[int]], Tensor],
    samples: Sequence[int],
    batch_size: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Run the dense ``model`` by ``predict`` over batches of ``samples`` and write what its MLPs read and wrote.

    Memory: one batch. Disk: tokens × d × 8 bytes per block. Raises InputError if an activation is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maps: dict[int, tuple[np.memmap, np.memmap]] = {}
    captured: dict[int, tuple[Tensor, Tensor]] = {}

    def capture(site: MLPSite):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            captured[site.block] = (arguments[0], output)

        return hook

    handles = [model.get_submodule(site.path).register_forward_hook(capture(site)) for site in sites]
    try:
        with torch.inference_mode(), progress.task("calibrate", len(samples)) as advance:
            start: dict[int, int] = {}
            for first in range(0, len(samples), batch_size):
                indices = samples[first : first + batch_size]
                predict(batch_of(indices))
                for site in sites:
                    arrays = [part.reshape(-1, part.shape[-1]).numpy() for part in captured[site.block]]
                    if site.block not in maps:
                        per_image = arrays[0].shape[0] // len(indices)
                        files = activation_files(folder, site)
                        shape = (per_image * len(samples), site.width)
                        maps[site.block] = create_array(files[0], shape), create_array(files[1], shape)
                    at = start.get(site.block, 0)
                    for target, array in zip(maps[site.block], arrays, strict=True):
                        if not np.isfinite(array).all():
                            raise InputError(
                                f"block {site.block} ({site.path}): NaN or infinite activations on calibration "
                                f"samples {list(indices)[:3]}…; the model does not work on this data"
                            )
                        target[at : at + array.shape[0]] = array
                    start[site.block] = at + arrays[0].shape[0]
                captured.clear()
                advance(len(indices), "")
    finally:
        for handle in handles:
            handle.remove()
    for pair in maps.values():
        for target in pair:
            target.flush()


def second_moment(activations: Sequence[Activations], chunk: int = 65536) -> Tensor:
    """``H = XᵀX / tokens`` over the inputs of several MLPs: float32 [d, d]."""
    total: Tensor | None = None
    tokens = 0
    for part in activations:
        for first in range(0, part.inputs.shape[0], chunk):
            x = torch.from_numpy(part.inputs[first : first + chunk].astype(np.float64))
            moment = x.T @ x
            total = moment if total is None else total + moment
            tokens += x.shape[0]
    assert total is not None
    return (total / tokens).float()
