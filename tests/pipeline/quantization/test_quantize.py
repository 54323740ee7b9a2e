"""The QAT stage: segments from a target of stored bits, order of rank entries, coverage, the packed model."""

import copy
import dataclasses
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
from factored_samples import dense_recipe, make_group, n_of_m, planned, recipe, start_quantization, tiny
from torch import nn

from exporters.modules import install_packed
from fips_ort.layout import PATTERNS, Pattern
from fips_ort.packed import dequantize
from pipeline.compression.calibrate import Activations
from pipeline.compression.factorized_mlp import FactorizedMLP
from pipeline.compression.factors import factorize_group, install, named_factors, save_factors
from pipeline.compression.fit import GroupModule
from pipeline.compression.moments import MLPMoments, group_moments
from pipeline.compression.sparsify import MaskSchedule
from pipeline.models.adapters import find_mlps
from pipeline.plumbing.errors import InputError
from pipeline.quantization.freeze import assert_coverage, freeze
from pipeline.quantization.prepare import prepare_factors, restore_prepared
from pipeline.quantization.segments import choose_segments, sort_rank_entries
from pipeline.recipe.plan import GroupPlan, group_size, make_plan
from pipeline.recipe.schema import OneWidth, Recipe, Sparsifier


def recipe_for(pattern: str, **changes: Any) -> Recipe:
    if pattern == "bitmap":
        return recipe(**{"compression__budget": 0.9, **changes})
    return n_of_m(pattern, **{"compression__budget": 0.9, **changes})


def prune(wanted: Recipe, mlps: list[FactorizedMLP], ranking: str = "layer") -> None:
    pattern = Pattern.parse(wanted.compression.pattern)
    if pattern.keep:
        projections = [projection for mlp in mlps for projection in mlp.projections.values()]
        config = Sparsifier(algorithm="static", ranking=ranking)
        MaskSchedule(projections, config, pattern, wanted.compression.target_sparsity, 1).before_step(0)


def sparse_group(
    wanted: Recipe, kind: str = "vit", seed: int = 0, ranking: str = "layer"
) -> tuple[nn.Module, GroupPlan, list[FactorizedMLP]]:
    model, group, mlps = planned(wanted, kind, seed)
    prune(wanted, mlps, ranking)
    return model, group, mlps


def outputs(mlps: list[FactorizedMLP]) -> list[torch.Tensor]:
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [mlp(x) for mlp in mlps]


def chunk_energies(group: GroupPlan, mlps: list[FactorizedMLP], chunk: int) -> np.ndarray:
    U = mlps[0].basis().detach().double().numpy()
    parts = []
    for mlp in mlps:
        parts += [mlp.projections[name]().detach().double().numpy().T for name in mlp.site.first]
        parts.append(mlp.projections[mlp.site.last]().detach().double().numpy())
    V = np.concatenate(parts, axis=1)
    assert V.shape == (group.rank, group.columns)
    return ((U**2).sum(axis=1) * (V**2).sum(axis=1)).reshape(-1, chunk).mean(axis=1)


def stored_bits(group: GroupPlan, mlps: list[FactorizedMLP]) -> float:
    """Stored bits per original weight, counted on the packed bytes themselves."""
    packed = freeze(mlps)
    weights = [*packed.bases.values()]
    for mlp in packed.mlps:
        weights += [linear.weight for linear in (*mlp.first.values(), mlp.last[1])]
    return 8 * sum(weight.nbytes for weight in weights) / group.dense_parameters


def allocated(pattern: str, target: float, basis: Any = "allocate", projections: Any = "allocate") -> Recipe:
    return recipe_for(
        pattern,
        quantization__basis__bits=basis,
        quantization__projections__bits=projections,
        quantization__target_stored_bits=target,
    )


def target_at(
    share: float, pattern: str, group: GroupPlan, basis: Any = "allocate", projections: Any = "allocate"
) -> float:
    """Stored bits at ``share`` of the way from 2 bits everywhere to 8 bits everywhere; numbers are given bits."""
    wanted = allocated(pattern, 9.0)
    two, eight = (0, 0, 0, group.rank), (group.rank, 0, 0, 0)
    fixed = {3: (0, 0, group.rank, 0), 4: (0, group.rank, 0, 0)}
    least, most = (
        group_size(wanted, group, fixed.get(basis, free), fixed.get(projections, free)).stored for free in (two, eight)
    )
    return 8 * (least + share * (most - least)) / group.dense_parameters


# --- segments --------------------------------------------------------------------------------------------------


def test_given_bits_need_no_allocation() -> None:
    _, group, mlps = planned(recipe(quantization__basis__bits=3, quantization__projections__bits=2))
    wanted = recipe(quantization__basis__bits=3, quantization__projections__bits=2)
    assert choose_segments(wanted, group, mlps) == ((0, 0, group.rank, 0), (0, 0, 0, group.rank))


def test_graded_bits_are_cut_in_whole_blocks() -> None:
    grades = [{"bits": 8, "fraction": 0.2}, {"bits": 4, "fraction": 0.3}, {"bits": 2, "fraction": 0.5}]
    wanted = recipe_for("dense", quantization__projections__bits=grades)
    _, group, mlps = planned(wanted)
    assert group.rank == 16
    assert choose_segments(wanted, group, mlps)[1] == (0, 0, 0, 16)
    wide = GroupPlan(0, group.sites, 32, group.columns, 160)
    assert choose_segments(wanted, wide, mlps)[1] == (32, 48, 0, 80)


CHOICES = [("allocate", "allocate"), ("allocate", 3), (4, "allocate")]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("basis", "projections"), CHOICES)
@pytest.mark.parametrize("seed", range(2))
def test_target_is_reached_from_below(pattern: str, basis: Any, projections: Any, seed: int) -> None:
    _, group, mlps = sparse_group(allocated(pattern, 9.0, basis, projections), "vit", seed)
    for share in (0.1, 0.35, 0.6, 0.9):
        target = target_at(share, pattern, group, basis, projections)
        wanted = allocated(pattern, target, basis, projections)
        twins = list(copy.deepcopy(nn.ModuleList(mlps)))
        start_quantization(wanted, group, twins)
        actual = stored_bits(group, twins)
        assert actual <= target
        # One chunk of rank entries by its largest step, 4 bits to 8; bitmaps hold unequal numbers of values.
        chunk = wanted.quantization.projections.block_size
        values = group.width * (basis == "allocate")
        if projections == "allocate":
            values += group.columns * (1 - wanted.compression.target_sparsity) * (1.5 if pattern == "bitmap" else 1)
        slack = 4 * chunk * values / group.dense_parameters + (0.06 if pattern == "bitmap" else 0)
        assert actual > target - slack


@pytest.mark.parametrize("ranking", ["layer", "group"])
@pytest.mark.parametrize("seed", range(3))
def test_bitmaps_are_counted_as_they_are(ranking: str, seed: int) -> None:
    """Ranked over the group, masks leave very unequal numbers of values in the chunks: still no byte too many."""
    _, group, mlps = sparse_group(recipe_for("bitmap"), "dinov2_swiglu", seed, ranking)
    target = target_at(0.3, "bitmap", group)
    wanted = allocated("bitmap", target)
    with torch.no_grad():
        for mlp in mlps:
            for name, projection in mlp.projections.items():
                # The leading chunks, which get the most bits, are kept whole, the others take the losses.
                axis = 0 if name == mlp.site.last else 1
                keep = torch.zeros(group.rank, dtype=torch.bool)
                keep[: group.rank // 4] = True
                shape = [-1, 1] if axis == 0 else [1, -1]
                projection.mask.copy_(keep.reshape(shape).expand_as(projection.mask))
    reverse_chunks(group, mlps, 16)
    segments = start_quantization(wanted, group, mlps)
    assert segments[0] == segments[1]
    assert group.rank - segments[0][3] > 0
    assert stored_bits(group, mlps) <= target


@pytest.mark.parametrize("pattern", PATTERNS)
def test_too_low_a_target_names_the_least(pattern: str) -> None:
    wanted = allocated(pattern, 0.2)
    _, group, mlps = sparse_group(wanted)
    message = r"sample: quantization\.target_stored_bits: 0\.2 .*group 0 takes with 2 bits everywhere, (\d\.\d+); raise"
    with pytest.raises(InputError, match=message) as caught:
        choose_segments(wanted, group, mlps)
    found = re.search(message, str(caught.value))
    assert found is not None
    least = float(found[1])
    segments = choose_segments(allocated(pattern, least), group, mlps)
    assert segments == ((0, 0, 0, group.rank), (0, 0, 0, group.rank))
    with pytest.raises(InputError):
        choose_segments(allocated(pattern, least - 0.002), group, mlps)


def test_more_bits_for_the_target_give_a_smaller_error() -> None:
    errors = []
    for share in (0.02, 0.1, 0.3, 0.7):
        _, group, mlps = sparse_group(recipe_for("1:4"))
        wanted = allocated("1:4", target_at(share, "1:4", group))
        before = outputs(mlps)
        start_quantization(wanted, group, mlps)
        errors.append(sum(float((a - b).square().mean()) for a, b in zip(outputs(mlps), before, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


# --- order of the rank entries ---------------------------------------------------------------------------------


def reverse_chunks(group: GroupPlan, mlps: list[FactorizedMLP], chunk: int) -> None:
    """Turn the rank axis around, chunk by chunk."""
    entries = torch.arange(group.rank).reshape(-1, chunk).flip(0).reshape(-1)
    for name, factor in named_factors(mlps).items():
        factor.permute(entries, axis=0 if name.endswith(("basis", mlps[0].site.last)) else 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_sorting_changes_no_output(pattern: str, kind: str) -> None:
    wanted = recipe_for(pattern)
    _, group, mlps = sparse_group(wanted, kind)
    # A multiple of every m; reversed first, so that there is something to sort.
    chunk = 16
    reverse_chunks(group, mlps, chunk)
    before, energies = outputs(mlps), chunk_energies(group, mlps, chunk)
    assert group.rank == chunk or np.any(np.diff(energies) > 0)
    sort_rank_entries(group, mlps, chunk)
    for old, new in zip(before, outputs(mlps), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    after = chunk_energies(group, mlps, chunk)
    np.testing.assert_allclose(after, np.sort(energies)[::-1], rtol=1e-5)
    parsed = Pattern.parse(pattern)
    if parsed.is_n_of_m:
        for mlp in mlps:
            for projection in mlp.projections.values():
                assert torch.all(projection.mask.reshape(-1, parsed.of).sum(dim=1) == parsed.keep)


def test_most_bits_go_to_the_most_energy() -> None:
    grades = [{"bits": 8, "fraction": 0.5}, {"bits": 2, "fraction": 0.5}]
    wanted = recipe_for("1:4", quantization__projections__bits=grades, quantization__basis__bits=grades)
    _, group, mlps = sparse_group(wanted)
    reverse_chunks(group, mlps, 32)
    energies = chunk_energies(group, mlps, 32)
    assert group.rank == 64
    assert np.argmax(energies) != 0
    strongest = mlps[0].basis()[32 * np.argmax(energies) :][:32].detach()
    segments = start_quantization(wanted, group, mlps)
    assert segments[0][0] == 32
    for factor in named_factors(mlps).values():
        assert factor.quantizer is not None
    unquantized = copy.deepcopy(mlps[0].basis)
    unquantized.quantizer = None
    assert torch.equal(unquantized()[:32], strongest)
    error = (mlps[0].basis()[:32] - strongest).norm() / strongest.norm()
    assert float(error.detach()) < 0.02
    np.testing.assert_allclose(chunk_energies(group, mlps, 32)[0], energies.max(), rtol=0.05)


def test_one_bit_width_needs_no_sorting() -> None:
    wanted = recipe_for("1:4")
    _, group, mlps = sparse_group(wanted)
    weight = mlps[0].basis.weight.detach().clone()
    start_quantization(wanted, group, mlps)
    assert torch.equal(mlps[0].basis.weight, weight)


def test_trained_factors_are_restored_in_the_sorted_order(tmp_path: Any) -> None:
    model, group, mlps = sparse_group(recipe_for("1:4"))
    reverse_chunks(group, mlps, 32)
    wanted = allocated("1:4", target_at(0.3, "1:4", group))
    segments = start_quantization(wanted, group, mlps)
    with torch.no_grad():
        for parameter in GroupModule(mlps).parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_factors(mlps, tmp_path / "f.safetensors")
    restored = restore_prepared(wanted, model, group, segments, tmp_path / "f.safetensors")
    for one, other in zip(outputs(mlps), outputs(restored), strict=True):
        assert torch.equal(one, other)
    assert stored_bits(group, restored) == stored_bits(group, mlps)


# --- start from moments ----------------------------------------------------------------------------------------


def calibrated(model: nn.Module, group: GroupPlan, seed: int = 0) -> tuple[torch.Tensor, dict[int, MLPMoments]]:
    """Correlated inputs [tokens, 32] and the moments of a group's dense MLPs on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1500, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    x = (x + 0.5 * torch.randn(1500, 32, generator=generator)) * torch.logspace(-1, 0.3, 32)
    activations = {}
    for site in group.sites:
        with torch.no_grad():
            y = model.get_submodule(site.path)(x)
        activations[site.block] = Activations(x.numpy(), y.numpy())
    return x, group_moments(model, group, activations)


def output_errors(model: nn.Module, mlps: list[FactorizedMLP], x: torch.Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for mlp in mlps:
            y = model.get_submodule(mlp.site.path)(x)
            total += float((mlp(x) - y).square().mean() / y.square().mean())
    return total


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
@pytest.mark.parametrize("bits", get_args(OneWidth))
def test_gptq_starts_nearer_to_the_dense_outputs(pattern: str, kind: str, bits: int) -> None:
    changes = {"quantization__projections__bits": bits, "compression__budget": 1.0}
    wanted = recipe_for(pattern, **changes, quantization__start="gptq")
    model, group, mlps = sparse_group(wanted, kind)
    x, moments = calibrated(model, group)
    plain = list(copy.deepcopy(nn.ModuleList(mlps)))
    masks = {name: factor.mask.clone() for name, factor in named_factors(mlps).items() if factor.mask is not None}
    start_quantization(recipe_for(pattern, **changes), group, plain)
    with pytest.raises(ValueError, match="needs the moments"):
        prepare_factors(wanted, group, mlps, choose_segments(wanted, group, mlps))
    prepare_factors(wanted, group, mlps, choose_segments(wanted, group, mlps, moments), moments)
    assert output_errors(model, mlps, x) < 0.8 * output_errors(model, plain, x)
    for name, factor in named_factors(mlps).items():
        if factor.mask is not None:
            assert torch.equal(factor.mask, masks[name])
    assert_coverage(install(model, mlps), mlps)
    assert stored_bits(group, mlps) == stored_bits(group, plain)


@pytest.mark.parametrize("rank", [16, 48])
def test_gptq_makes_up_for_any_rank(rank: int) -> None:
    """Below the width, and overcomplete, where least squares for V has no unique solution."""
    wanted = n_of_m("dense", quantization__start="gptq", quantization__projections__bits=3)
    model = tiny("dinov2_swiglu")
    group = make_group(model, rank)
    x, moments = calibrated(model, group)
    errors = []
    for chosen in (wanted, n_of_m("dense", quantization__projections__bits=3)):
        mlps, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
        unquantized = output_errors(model, mlps, x)
        prepare_factors(chosen, group, mlps, choose_segments(chosen, group, mlps), moments)
        errors.append(output_errors(model, mlps, x) - unquantized)
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bits", get_args(OneWidth))
def test_gptq_start_of_the_dense_baseline(bits: int) -> None:
    model = tiny("dinov2_swiglu")
    errors = []
    for start in ("gptq", "nearest"):
        wanted = dense_recipe(
            quantization__projections={"bits": bits, "block_size": 32}, quantization__start=start
        )
        total = 0.0
        for group in make_plan(wanted, find_mlps(model)).groups:
            x, moments = calibrated(model, group)
            mlps, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
            prepare_factors(wanted, group, mlps, choose_segments(wanted, group, mlps), moments)
            total += output_errors(model, mlps, x)
        errors.append(total)
    assert errors[0] < 0.7 * errors[1]


def test_energies_follow_what_goes_through() -> None:
    """A rank entry whose inputs are never there takes no bits, however large its vectors are."""
    wanted = recipe_for("dense", compression__budget=1.0)
    model, group, mlps = sparse_group(wanted)
    _, moments = calibrated(model, group)
    with torch.no_grad():
        for mlp in mlps:
            mlp.projection("fc2").weight[16:] = 0.0
        mlps[0].basis.weight[16:] *= 10.0
        silent = {block: dataclasses.replace(part, input=projected_out(part.input, mlps[0].basis()[16:]))
                  for block, part in moments.items()}
    segments = [
        choose_segments(allocated("dense", target_at(0.4, "dense", group)), group, mlps, known)
        for known in (None, silent)
    ]
    assert segments[0] == segments[1]  # one chunk of the two gets more bits; which, the order says
    first = mlps[0].basis().detach().clone()
    sort_rank_entries(group, mlps, 16, silent)
    assert torch.equal(mlps[0].basis(), first)
    sort_rank_entries(group, mlps, 16)
    assert torch.equal(mlps[0].basis(), first.roll(16, dims=0))


def projected_out(H: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The second moment of inputs from which all ``directions`` [count, d] are removed."""
    inside = torch.linalg.qr(directions.T)[0]
    outside = torch.eye(H.shape[0]) - inside @ inside.T
    return outside @ H @ outside


# --- coverage --------------------------------------------------------------------------------------------------


def test_every_factor_is_covered() -> None:
    wanted = recipe_for("1:4")
    model, group, mlps = sparse_group(wanted)
    start_quantization(wanted, group, mlps)
    assert_coverage(install(model, mlps), mlps)


@pytest.mark.parametrize("name", ["group_0.basis", "block_1.fc2"])
def test_an_unprepared_factor_is_found(name: str) -> None:
    wanted = recipe_for("1:4")
    model, group, mlps = sparse_group(wanted)
    start_quantization(wanted, group, mlps)
    named_factors(mlps)[name].quantizer = None
    with pytest.raises(AssertionError, match=rf"\({name}\): factor is not fake-quantized"):
        assert_coverage(install(model, mlps), mlps)


def test_a_factor_that_would_not_be_packed_is_found() -> None:
    wanted = recipe_for("1:4")
    model, group, mlps = sparse_group(wanted)
    start_quantization(wanted, group, mlps)
    with pytest.raises(AssertionError, match=r"vit\.layers\.1\.mlp\..*not part of the compressed MLPs"):
        assert_coverage(install(model, mlps), mlps[:1])
    with pytest.raises(AssertionError, match="not part of the compressed MLPs"):
        assert_coverage(copy.deepcopy(install(model, mlps)), mlps)


def test_a_factor_that_the_model_does_not_use_is_found() -> None:
    wanted = recipe_for("1:4")
    model, group, mlps = sparse_group(wanted)
    start_quantization(wanted, group, mlps)
    with pytest.raises(AssertionError, match=r"does not use: block_1\.fc1, block_1\.fc2"):
        assert_coverage(install(model, mlps[:1]), mlps)
    with pytest.raises(AssertionError, match=r"does not use: group_0\.basis"):
        assert_coverage(model, mlps)


def test_aliased_factors_are_found() -> None:
    wanted = recipe_for("1:4")
    model, _, mlps = sparse_group(wanted)
    mlps[1].projections["fc1"] = mlps[0].projections["fc1"]
    with pytest.raises(AssertionError, match="are one weight"):
        assert_coverage(install(model, mlps), mlps)
    with pytest.raises(AssertionError, match="are one weight"):
        freeze(mlps)


# --- packed model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_packed_model_is_the_fake_quantized_one(pattern: str, kind: str) -> None:
    wanted = recipe_for(
        pattern, quantization__projections__levels="midrise", quantization__basis__bits=3,
        quantization__projections__bits=2,
    )
    model, group, mlps = sparse_group(wanted, kind)
    start_quantization(wanted, group, mlps)
    packed = freeze(mlps)
    assert list(packed.bases) == ["group_0"]
    U = dequantize(packed.bases["group_0"]).astype(np.float64)
    assert U.shape == (group.rank, 32)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for mlp, site, expected in zip(packed.mlps, group.sites, outputs(mlps), strict=True):
        assert (mlp.block, mlp.path, mlp.activation, mlp.basis) == (site.block, site.path, site.activation, "group_0")
        assert tuple(mlp.first) == site.first
        assert mlp.last[0] == site.last
        t = x.double().numpy() @ U.T
        hidden = [t @ dequantize(linear.weight).T.astype(np.float64) + linear.bias for linear in mlp.first.values()]
        dense = model.get_submodule(site.path)
        activated = dense.get_submodule(site.activation)(torch.from_numpy(hidden[0])).numpy()
        activated = activated * hidden[1] if len(hidden) == 2 else activated
        y = activated @ dequantize(mlp.last[1].weight).T.astype(np.float64) @ U + mlp.last[1].bias
        np.testing.assert_allclose(expected.numpy(), y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
        for name, linear in (*mlp.first.items(), mlp.last):
            assert np.array_equal(linear.bias, dense.get_parameter(f"{name}.bias").detach().numpy())
            assert linear.bias.dtype == np.float32


@pytest.mark.parametrize("pattern", PATTERNS)
def test_promised_bytes_are_the_packed_bytes(pattern: str) -> None:
    wanted = recipe_for(pattern, quantization__basis__bits=3)
    _, group, mlps = sparse_group(wanted)
    segments = start_quantization(wanted, group, mlps)
    promised = 8 * group_size(wanted, group, *segments).stored / group.dense_parameters
    assert stored_bits(group, mlps) == pytest.approx(promised, rel=1e-12)


@pytest.mark.parametrize("bits", get_args(OneWidth))
@pytest.mark.parametrize("kind", ["vit", "dinov2_swiglu"])
def test_the_dense_baseline_is_quantized_and_packed(kind: str, bits: int) -> None:
    wanted = dense_recipe(quantization__projections={"bits": bits, "block_size": 32})
    model = tiny(kind)
    plan = make_plan(wanted, find_mlps(model))
    mlps = []
    for group in plan.groups:
        members, _ = factorize_group(model, group, calibration=None, masked=False, seed=0)
        segments = start_quantization(wanted, group, members)
        assert segments == choose_segments(wanted, group, members)
        promised = 8 * group_size(wanted, group, *segments).stored / group.dense_parameters
        assert promised == bits + 16 / 32
        assert stored_bits(group, members) == promised
        mlps += members
    assert_coverage(install(model, mlps), mlps)
    packed = freeze(mlps)
    assert packed.bases == {}
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    stored = install_packed(model, packed)
    for mlp, entry in zip(mlps, packed.mlps, strict=True):
        assert entry.basis is None
        for name, linear in entry.linears.items():
            weight = model.get_submodule(mlp.site.path).get_parameter(f"{name}.weight").detach()
            values = torch.from_numpy(dequantize(linear.weight))
            assert torch.equal(values, mlp.projection(name)())
            assert float((values - weight).norm() / weight.norm()) < {2: 0.4, 3: 0.25, 4: 0.12}[bits]
        with torch.no_grad():
            torch.testing.assert_close(stored.get_submodule(entry.path)(x), mlp(x), rtol=1e-4, atol=1e-5)
