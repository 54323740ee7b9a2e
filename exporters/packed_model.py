"""A compressed model's MLPs as stored: packed bases, packed projections and where they belong (numpy only).

METHOD: every MLP of a group shares one basis ``U``; each of its linear layers keeps a projection ``V``.
Stored orientation: the basis as ``U.T`` [rank, d]; the projection of a first linear layer (``fc1``, ``gate_proj``,
``up_proj``) as ``V.T`` [n, rank]; the projection of the last one (``fc2``, ``down_proj``) as ``V`` [rank, n].
An MLP without a basis (the dense baseline) stores its own matrices, [out_features, in_features].

Where a block size does not divide the columns of a matrix, its rows are filled up with zeros: n and, of bases and of
matrices that read the model's features, d are then larger here than in the model. The first linears have as many
rows as the last one has columns, so that what it reads is filled up too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.packed_file import PackedReader, PackedWriter
from fips_ort.layout import Layout, padded_to_blocks
from fips_ort.packed import PackedWeight

_FORMAT = "fips-packed-model"
_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A projection, or a whole matrix, and the bias of its linear layer: None, or float32 of as many numbers as the op
    that adds it writes."""

    weight: PackedWeight
    bias: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class PackedMLP:
    """One MLP of the model.

    ``block``: index of the block in the whole model. ``path``: module path of the MLP. ``basis``: key into
    :attr:`PackedModel.bases`, or None. ``first``: child name → projection, the gate before the up projection.
    ``last``: child name and projection. ``activation``: child name of the activation module in the original MLP.
    """

    block: int
    path: str
    basis: str | None
    first: dict[str, PackedLinear]
    last: tuple[str, PackedLinear]
    activation: str

    @property
    def linears(self) -> dict[str, PackedLinear]:
        """Child name → projection of every linear layer, in the order of computation."""
        return {**self.first, self.last[0]: self.last[1]}


@dataclass(frozen=True, slots=True, eq=False)
class PackedModel:
    """All bases and MLPs. Raises ValueError, naming the MLP, if shapes or names do not fit together."""

    bases: dict[str, PackedWeight]
    mlps: list[PackedMLP]

    def __post_init__(self) -> None:
        for mlp in self.mlps:
            if mlp.basis is not None and mlp.basis not in self.bases:
                raise ValueError(f"{mlp.path}: unknown basis {mlp.basis!r}; there are {sorted(self.bases)}")
            _check_shapes(mlp, None if mlp.basis is None else self.bases[mlp.basis].layout)
        paths = [mlp.path for mlp in self.mlps]
        if len(set(paths)) != len(paths):
            raise ValueError(f"an MLP occurs twice in {paths}")
        unused = set(self.bases) - {mlp.basis for mlp in self.mlps}
        if unused:
            raise ValueError(f"bases without an MLP: {sorted(unused)}")

    def weights(self) -> dict[str, PackedWeight]:
        """Every packed weight once, by its name in the model: ``shared_bases.{basis}`` or ``{path}.{child}``."""
        named = {f"{BASES}.{name}": weight for name, weight in self.bases.items()}
        for mlp in self.mlps:
            named.update({f"{mlp.path}.{child}": linear.weight for child, linear in mlp.linears.items()})
        return named


BASES = "shared_bases"
"""Name under which the bases are registered in a model."""


def save_packed_model(packed: PackedModel, path: Path) -> None:
    """Write ``packed`` as one safetensors file. Inverse: :func:`load_packed_model`."""
    writer = PackedWriter()

    def describe(name: str, linear: PackedLinear) -> dict[str, Any]:
        return {"layout": writer.weight(name, linear.weight), "bias": writer.optional(name, "bias", linear.bias)}

    structure = {
        "version": _VERSION,
        "bases": {name: writer.weight(f"{BASES}.{name}", weight) for name, weight in packed.bases.items()},
        "mlps": [
            {
                "block": mlp.block,
                "path": mlp.path,
                "basis": mlp.basis,
                "first": {child: describe(f"{mlp.path}.{child}", linear) for child, linear in mlp.first.items()},
                "last": [mlp.last[0], describe(f"{mlp.path}.{mlp.last[0]}", mlp.last[1])],
                "activation": mlp.activation,
            }
            for mlp in packed.mlps
        ],
    }
    writer.save(path, _FORMAT, structure)


def load_packed_model(path: Path) -> PackedModel:
    """Read what :func:`save_packed_model` wrote. Raises ValueError if the file is of another kind or version."""
    with PackedReader(path, _FORMAT, _VERSION) as reader:

        def linear(name: str, entry: dict[str, Any]) -> PackedLinear:
            return PackedLinear(reader.weight(name, entry["layout"]), reader.optional(name, "bias", entry["bias"]))

        return PackedModel(
            {name: reader.weight(f"{BASES}.{name}", layout) for name, layout in reader.structure["bases"].items()},
            [
                PackedMLP(
                    block=mlp["block"],
                    path=mlp["path"],
                    basis=mlp["basis"],
                    first={child: linear(f"{mlp['path']}.{child}", entry) for child, entry in mlp["first"].items()},
                    last=(mlp["last"][0], linear(f"{mlp['path']}.{mlp['last'][0]}", mlp["last"][1])),
                    activation=mlp["activation"],
                )
                for mlp in reader.structure["mlps"]
            ],
        )


def _check_shapes(mlp: PackedMLP, basis: Layout | None) -> None:
    if len(mlp.first) not in (1, 2):
        raise ValueError(f"{mlp.path}: expected one first linear layer or gate and up, got {list(mlp.first)}")
    widths = {linear.weight.layout.rows for linear in mlp.first.values()}
    last_name, last = mlp.last
    # Without a basis the linears read and write the model's features themselves.
    features = last.weight.layout.rows if basis is None else basis.columns
    for child, linear in mlp.first.items():
        layout = linear.weight.layout
        read = (
            (padded_to_blocks(features, layout.block_size), f"as many as {last_name} writes")
            if basis is None
            else (basis.rows, "the rank of its basis")
        )
        _check_axis(f"{mlp.path}.{child}", "columns", layout.columns, read)
        _check_bias(f"{mlp.path}.{child}", linear, layout.rows)
    if basis is not None:
        _check_axis(f"{mlp.path}.{last_name}", "rows", last.weight.layout.rows, (basis.rows, "the rank of its basis"))
    _check_bias(f"{mlp.path}.{last_name}", last, features)
    if widths != {last.weight.layout.columns}:
        raise ValueError(f"{mlp.path}: widths differ: {sorted(widths)} into {last.weight.layout.columns}")


def _check_axis(name: str, axis: str, actual: int, expected: tuple[int, str]) -> None:
    size, reason = expected
    if actual != size:
        raise ValueError(f"{name}: {actual} {axis}, expected {size}, {reason}")


def _check_bias(name: str, linear: PackedLinear, features: int) -> None:
    bias = linear.bias
    if bias is not None and (bias.shape != (features,) or bias.dtype != np.float32):
        raise ValueError(f"{name}: bias is {bias.dtype} {bias.shape}, expected float32 {(features,)}")
