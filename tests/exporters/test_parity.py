import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from packed_samples import Sample, images, sample, write_sample

from exporters.parity import ParityError, check_parity, compare

CASES = [("vit", "1:4"), ("dinov2_swiglu", "bitmap"), ("swin", "2:4")]


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    """One image, then three at a time."""
    first, rest = torch.from_numpy(images(count, seed)).split([1, count - 1])
    return [first, *rest.split(3)]


@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_all_backends_agree(kind: str, pattern: str, tmp_path: Path) -> None:
    exported = sample(kind, pattern)
    write_sample(tmp_path / "artifact", exported)
    parity = check_parity(tmp_path / "artifact", exported.module, batches(9, seed=2))
    assert parity.samples == 9
    assert parity.rounding is None
    for difference in (parity.native_vs_torch, parity.portable_vs_torch, parity.native_vs_portable):
        assert difference.relative < 2e-5
        assert difference.same_predictions == 1.0


def test_whole_matrices_agree_and_are_traced(tmp_path: Path) -> None:
    exported = sample("vit", "dense", has_basis=False)
    write_sample(tmp_path / "artifact", exported)
    parity = check_parity(tmp_path / "artifact", exported.module, batches(9, seed=2))
    assert max(parity.native_vs_torch.relative, parity.portable_vs_torch.relative) < 2e-5
    damaged(exported, "vit.layers.1.mlp.fc2.codes", tmp_path / "damaged")
    with pytest.raises(ParityError, match=r"the first block that differs is vit\.layers\.1\.mlp "):
        check_parity(tmp_path / "damaged", exported.module, batches(4))


def test_rounding_of_int8_activations_is_told_apart_from_errors(tmp_path: Path) -> None:
    exported = sample("vit", "dense", accuracy_level=4)
    write_sample(tmp_path / "artifact", exported)
    parity = check_parity(tmp_path / "artifact", exported.module, batches(9, seed=2))
    assert parity.native_vs_torch.relative < 2e-5
    assert parity.portable_vs_torch.relative < 2e-5
    assert parity.rounding is not None
    assert 1e-4 < parity.rounding.relative < 0.1


def damaged(exported: Sample, initializer: str, folder: Path) -> None:
    """Write the sample's artefact with other bytes in one initializer than its manifest and PyTorch have."""
    write_sample(folder, exported)
    tensor = ir.load(folder / "model.onnx").graph.initializers[initializer].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    path = folder / tensor.location
    data = bytearray(path.read_bytes())
    span = slice(tensor.offset, tensor.offset + tensor.nbytes)
    data[span] = bytes(byte ^ 0xFF for byte in data[span])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("initializer", "path"),
    [
        ("vit.layers.1.mlp.fc1.codes", "vit.layers.1.mlp"),
        ("vit.layers.2.mlp.fc2.codes", "vit.layers.2.mlp"),
        ("shared_bases.group_0.codes", "vit.layers.0.mlp"),
        ("shared_bases.group_1.codes", "vit.layers.2.mlp"),
    ],
)
def test_wrong_weights_are_traced_to_the_first_block(initializer: str, path: str, tmp_path: Path) -> None:
    exported = sample("vit", "1:4")
    damaged(exported, initializer, tmp_path / "artifact")
    with pytest.raises(ParityError, match=f"the first block that differs is {path} ") as caught:
        check_parity(tmp_path / "artifact", exported.module, batches(4))
    assert caught.value.path == path
    assert caught.value.backend == "native"


def test_a_difference_outside_the_mlps_is_told_as_such(tmp_path: Path) -> None:
    exported = sample("vit", "1:4")
    write_sample(tmp_path / "artifact", exported)
    bias = exported.module.classifier.bias
    with torch.no_grad():
        bias += 1.0
    try:
        with pytest.raises(ParityError, match="all MLPs agree, so the difference arises outside them") as caught:
            check_parity(tmp_path / "artifact", exported.module, batches(4))
    finally:
        with torch.no_grad():
            bias -= 1.0
    assert caught.value.path is None


def test_differences_are_relative_to_the_largest_logit() -> None:
    expected = np.array([[1.0, -4.0], [0.5, 0.25]], np.float32)
    actual = np.array([[1.0, -4.0], [0.5, 0.75]], np.float32)
    assert dataclasses.astuple(compare(actual, expected)) == (0.5, 0.125, 0.5)
    assert compare(np.full_like(expected, np.nan), expected).relative == float("inf")
