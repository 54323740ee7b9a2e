"""Resident memory of a session in which 12 nodes read one basis, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

from benchmarks.operands import INT8_ACTIVATIONS
from benchmarks.shapes import Shape
from benchmarks.timing import BoundRun, open_session
from benchmarks.variants import mlp_graph, sparse_mlp
from fips_ort.memory import process_memory

_LAYERS = 6
_ROWS = 16


def measure_shared_basis(folder: Path, name: str, shape: Shape) -> dict[str, int | float | str]:
    """Measure six MLPs with 1:4 projections, all over one basis, which each of them multiplies with twice.

    Returns bytes: ``file_bytes`` of graph and weights, ``activation_bytes`` of the values between the nodes of one MLP
    at 16 rows, ``rss_growth_bytes`` of loading and running the model once in a process that ran a tiny model of the
    same kind before; ``ratio`` of the growth to the sum of the other two.
    """
    model, tiny = folder / "shared.onnx", folder / "tiny.onnx"
    mlp_graph(shape, sparse_mlp(shape, INT8_ACTIVATIONS), _LAYERS, group=_LAYERS).save(model)
    small = Shape(128, 128, shape.gated, sparse_rank=128, graded=(0, 0, 128))
    mlp_graph(small, sparse_mlp(small, INT8_ACTIVATIONS), 1).save(tiny)
    command = [sys.executable, "-m", "benchmarks.memory", str(model), str(tiny)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"measuring memory failed: {child.stderr.strip().splitlines()[-1:]}")
    growth = int(child.stdout)
    file_bytes = sum(path.stat().st_size for path in folder.glob(f"{model.name}*"))
    columns = 3 * shape.model_size + 2 * shape.sparse_rank + (4 if shape.gated else 2) * shape.hidden_size
    activations = 4 * _ROWS * columns
    return {
        "shape": name,
        "basis_nodes": 2 * _LAYERS,
        "rows": _ROWS,
        "file_bytes": file_bytes,
        "activation_bytes": activations,
        "rss_growth_bytes": growth,
        "ratio": growth / (file_bytes + activations),
    }


def _growth(model: Path, tiny: Path) -> int:
    """Bytes by which loading and running ``model`` raises the resident set."""
    BoundRun(open_session(tiny, 1), _ROWS)()
    before = process_memory("VmRSS")
    run = BoundRun(open_session(model, 1), _ROWS)
    run()
    return process_memory("VmRSS") - before


if __name__ == "__main__":
    print(_growth(Path(sys.argv[1]), Path(sys.argv[2])))
