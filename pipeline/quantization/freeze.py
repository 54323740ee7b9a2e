"""The end of training: the integer codes of all factors, as the packed model that is exported."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from exporters.packed_model import PackedLinear, PackedMLP, PackedModel
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import named_factors
from qat.factor import Factor


def assert_coverage(model: nn.Module, mlps: Sequence[FactorizedMLP]) -> None:
    """Assert that every factor of ``model`` is fake-quantized, and that exactly these are the ones that get packed.

    (torchao's ``quantize_`` passes over what it does not know without a word.) Raises AssertionError.
    """
    missing = {id(factor): name for name, factor in named_factors(mlps).items()}
    for path, module in model.named_modules():
        if isinstance(module, Factor):
            name = missing.pop(id(module), None)
            if name is None:
                raise AssertionError(f"{path}: factor is not part of the compressed MLPs")
            if module.quantizer is None:
                raise AssertionError(f"{path} ({name}): factor is not fake-quantized")
    if missing:
        raise AssertionError(f"factors that the model does not use: {', '.join(missing.values())}")


def freeze(mlps: Sequence[FactorizedMLP]) -> PackedModel:
    """Integer codes of all factors: the packed model that export works from."""
    packed = {name: factor.freeze() for name, factor in named_factors(mlps).items()}
    bases = {mlp.group: packed[mlp.basis_name] for mlp in mlps if mlp.basis is not None}

    def linear(mlp: FactorizedMLP, name: str) -> PackedLinear:
        weight = packed[mlp.factor_name(name)]
        bias = mlp.biases[name].detach().numpy() if name in mlp.biases else None
        if bias is not None:
            # As long as what the op writes, which layouts may have filled up with zeros.
            through_basis = name == mlp.site.last and mlp.basis is not None
            written = bases[mlp.group].layout.columns if through_basis else weight.layout.rows
            bias = np.pad(bias, (0, written - len(bias)))
        return PackedLinear(weight, bias)

    return PackedModel(
        bases,
        [
            PackedMLP(
                block=mlp.site.block,
                path=mlp.site.path,
                basis=None if mlp.basis is None else mlp.group,
                first={name: linear(mlp, name) for name in mlp.site.first},
                last=(mlp.site.last, linear(mlp, mlp.site.last)),
                activation=mlp.site.activation,
            )
            for mlp in mlps
        ],
    )
