"""A factor's matrix, mask and gain; freezing to codes that reproduce it exactly."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fips_ort.layout import BIT_WIDTHS, BITMAP, DENSE, PATTERNS, Layout, Pattern
from fips_ort.packed import dequantize, unpack
from pipeline.compression.sparsify import MaskSchedule, magnitude_masks
from pipeline.recipe.schema import Sparsifier
from qat.factor import Factor

SEGMENTS = [(0, 128, 0, 0), (0, 0, 128, 0), (0, 0, 0, 128), (0, 64, 0, 64), (64, 0, 64, 0)]


def matrix(seed: int, rows: int = 128, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, rows)[:, None]


def prepared(name: str, segments: tuple[int, int, int, int], axis: int, midrise: bool, seed: int) -> Factor:
    pattern = Pattern.parse(name)
    values = matrix(seed)
    sparsity = 1 - pattern.keep / pattern.of if pattern.is_n_of_m else 0.7
    # Ranked within rows, so that no block is masked altogether.
    ranked = [(values / values.norm(dim=1, keepdim=True)).abs()]
    mask = None if pattern == DENSE else magnitude_masks(ranked, sparsity, pattern, jointly=False)[0]
    factor = Factor(values, mask)
    factor.prepare(Layout(128, 128, 64, segments, axis, midrise, pattern), learned_scales=True)
    return factor


def test_matrix_is_weight_times_gain() -> None:
    values = matrix(0)
    factor = Factor(values)
    torch.testing.assert_close(factor(), values, rtol=1e-6, atol=0)
    torch.testing.assert_close(factor.weight.square().mean(dim=1), torch.ones(128))
    torch.testing.assert_close(factor.gain[:, 0], values.square().mean(dim=1).sqrt())
    assert [name for name, _ in factor.named_parameters()] == ["weight"]


def test_rows_of_zeros_are_allowed() -> None:
    values = torch.zeros(2, 8)
    values[1] = 3.0
    assert torch.equal(Factor(values)(), values)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        Factor(torch.ones(3))


def test_masked_entries_are_zero_and_get_no_gradient() -> None:
    mask = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) < 0.3
    factor = Factor(matrix(0), mask)
    assert torch.equal(factor() != 0, mask)
    factor().sum().backward()
    assert factor.weight.grad is not None
    assert torch.equal(factor.weight.grad != 0, mask)
    torch.testing.assert_close(factor.weight.grad, mask * factor.gain)


def test_the_dense_gradient_reaches_masked_entries() -> None:
    mask = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) < 0.3
    factor = Factor(matrix(0), mask)
    upstream = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    factor.track_dense_gradient = True
    (factor() * upstream).sum().backward()
    assert factor.dense_gradient_source is not None
    assert torch.equal(factor.dense_gradient_source.grad, upstream)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("axis", "midrise"), [(0, False), (0, True), (1, False), (1, True)])
def test_codes_reproduce_the_forward_exactly(
    name: str, segments: tuple[int, int, int, int], axis: int, midrise: bool
) -> None:
    factor = prepared(name, segments, axis, midrise, seed=sum(segments[:2]) + axis)
    goal = matrix(17)
    optimizer = torch.optim.AdamW(factor.parameters(), lr=0.02)
    start = factor().detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        ((factor() - goal) / factor.gain).square().sum().backward()
        assert factor.quantizer is not None
        assert factor.quantizer.log_gain.grad is not None
        optimizer.step()
    assert not torch.equal(factor(), start)
    assert torch.all(factor.quantizer.log_gain != 0)
    packed = factor.freeze()
    assert torch.equal(torch.from_numpy(dequantize(packed)), factor())
    mask = unpack(packed)[2]
    if name == "dense":
        assert mask is None
    else:
        assert np.array_equal(mask, factor.mask.numpy())
        assert torch.all(factor()[~factor.mask] == 0)
        if midrise:
            # No level stands for zero, so exactly the masked entries are zero.
            assert torch.equal(factor() != 0, factor.mask)


def test_masks_may_change_until_frozen() -> None:
    """The forward of a prepared factor follows its mask; RigL's dense gradient still works."""
    factor = prepared("bitmap", (0, 128, 0, 0), 0, True, 0)
    schedule = MaskSchedule([factor], Sparsifier(algorithm="rigl", update_every=1), BITMAP, 0.7, 10)
    for step in range(4):
        schedule.before_step(step)
        factor().square().sum().backward()
        schedule.after_backward(step)
    assert int((factor() == 0).sum()) == round(0.7 * 128 * 128)
    assert torch.equal(torch.from_numpy(dequantize(factor.freeze())), factor())


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_more_bits_less_error(bits: int) -> None:
    values = matrix(0)
    errors = []
    for width in sorted(BIT_WIDTHS):
        factor = Factor(values)
        factor.prepare(Layout.uniform(128, 128, width, 64, midrise=bool(bits % 2)), learned_scales=False)
        errors.append(float(((factor() - values) / factor.gain).square().mean().detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.25
    assert errors[-1] < 1e-3


def test_scales_are_fixed_unless_learned() -> None:
    factor = Factor(matrix(0))
    factor.prepare(Layout.uniform(128, 128, 4, 64), learned_scales=False)
    assert [name for name, parameter in factor.named_parameters() if parameter.requires_grad] == ["weight"]
    factor = prepared("dense", (0, 128, 0, 0), 0, False, 0)
    names = [name for name, parameter in factor.named_parameters() if parameter.requires_grad]
    assert names == ["weight", "quantizer.log_gain"]


def test_unprepared_factors_are_not_frozen() -> None:
    with pytest.raises(ValueError, match="prepare"):
        Factor(matrix(0)).freeze()


@pytest.mark.parametrize("masked", [False, True])
def test_pattern_and_mask_go_together(masked: bool) -> None:
    mask = torch.ones(128, 128, dtype=torch.bool) if masked else None
    pattern = DENSE if masked else BITMAP
    with pytest.raises(ValueError, match=f"pattern {pattern} does not go with {'a' if masked else 'no'} mask"):
        Factor(matrix(0), mask).prepare(Layout.uniform(128, 128, 4, 64, pattern=pattern), learned_scales=False)


def test_a_mask_that_breaks_the_pattern_is_not_frozen() -> None:
    factor = prepared("1:4", (0, 128, 0, 0), 0, False, 0)
    factor.mask[0, :4] = True
    with pytest.raises(ValueError, match="exactly 1 of every 4"):
        factor.freeze()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_permute_reorders_everything(axis: int, masked: bool) -> None:
    mask = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) < 0.3 if masked else None
    factor = Factor(matrix(0), mask)
    weight, before = factor.weight, factor().detach().clone()
    entries = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    factor.permute(entries, axis=axis)
    assert torch.equal(factor(), before.index_select(axis, entries))
    assert factor.weight is weight
    if masked:
        assert torch.equal(factor.mask, mask.index_select(axis, entries))
    torch.testing.assert_close(factor.weight.square().mean(dim=1), torch.ones(128))


def test_prepared_factors_are_not_permuted() -> None:
    with pytest.raises(ValueError, match="before preparing"):
        prepared("dense", (0, 128, 0, 0), 0, False, 0).permute(torch.arange(128), axis=0)


def test_state_restores_a_prepared_factor() -> None:
    trained = prepared("2:4", (0, 64, 0, 64), 1, True, 0)
    with torch.no_grad():
        trained.weight.add_(0.3)
        trained.quantizer.log_gain.normal_(std=0.1)
    other = prepared("2:4", (0, 64, 0, 64), 1, True, 1)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(), trained())
