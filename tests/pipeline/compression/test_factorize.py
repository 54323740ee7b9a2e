"""SVD factors of a group, the factorized MLP, and its way into a model and a file."""

import copy
from pathlib import Path

import pytest
import torch
from factored_samples import dense_recipe, make_group, save_inputs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pipeline.compression.factorize import output_aware_basis, svd_factors
from pipeline.compression.factorized_mlp import dense_columns
from pipeline.compression.factors import (
    factorize_group,
    install,
    load_factors,
    named_factors,
    restore_group,
    save_factors,
)
from pipeline.compression.fit import GroupModule
from pipeline.models.adapters import find_mlps
from pipeline.recipe.plan import make_plan
from qat.factor import Factor

KINDS = ["vit", "dinov2", "dinov2_swiglu"]


def matrix(seed: int, d: int = 12, n: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, n, generator=generator) * torch.logspace(0, -2, d)[:, None]


def moment(seed: int, d: int = 12) -> Tensor:
    """A second moment whose directions differ by orders of magnitude and are not the axes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(200, d, generator=generator) * torch.logspace(0, -2, d).flip(0)
    x = x @ torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return x.T @ x / 200


def weighted_error(W: Tensor, U: Tensor, V: Tensor, H: Tensor) -> float:
    E = (W - U @ V).detach().double()
    return float(torch.trace(E.T @ H.double() @ E))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [12, 13, 18, 24, 25, 40])
def test_exact_at_full_rank_and_beyond(seed: int, weighted: bool, rank: int) -> None:
    W = matrix(seed)
    U, V = svd_factors(W, rank, seed=seed, second_moment=moment(seed) if weighted else None)
    assert U.shape == (12, rank)
    assert V.shape == (rank, 30)
    assert U.dtype == V.dtype == torch.float32
    torch.testing.assert_close(U @ V, W, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_plain_error_is_the_discarded_singular_values(seed: int) -> None:
    W = matrix(seed)
    singular = torch.linalg.svdvals(W.double())
    for rank in (1, 5, 11):
        U, V = svd_factors(W, rank, seed=0)
        assert float((W - U @ V).square().sum()) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_no_alternating_least_squares_does_better(seed: int, weighted: bool) -> None:
    """The optimum of a rank-k factorization, reached from random starts without any SVD."""
    W, H, rank = matrix(seed).double(), moment(seed).double(), 4
    metric = H + 1e-4 * H.diagonal().mean() * torch.eye(12) if weighted else torch.eye(12).double()
    U, V = svd_factors(W.float(), rank, seed=0, second_moment=H.float() if weighted else None)
    ours = weighted_error(W, U, V, metric)
    generator = torch.Generator().manual_seed(seed)
    best = float("inf")
    for _ in range(3):
        A = torch.randn(12, rank, generator=generator, dtype=torch.float64)
        for _ in range(200):
            B = torch.linalg.solve(A.T @ metric @ A, A.T @ metric @ W)
            A = W @ B.T @ torch.linalg.inv(B @ B.T)
        best = min(best, weighted_error(W, A, B, metric))
    assert ours == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [3, 6, 9])
def test_each_start_is_best_in_its_own_norm(seed: int, rank: int) -> None:
    W, H = matrix(seed), moment(seed)
    plain, weighted = svd_factors(W, rank, seed=0), svd_factors(W, rank, seed=0, second_moment=H)
    assert weighted_error(W, *weighted, H) < 0.9 * weighted_error(W, *plain, H)
    eye = torch.eye(12)
    assert weighted_error(W, *plain, eye) < 0.9 * weighted_error(W, *weighted, eye)


@given(
    seed=st.integers(0, 100),
    d=st.integers(1, 10),
    n=st.integers(1, 20),
    rank=st.integers(1, 35),
    weighted=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_rows_of_v_have_equal_rms_and_u_is_scaled_to_one(seed: int, d: int, n: int, rank: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d, n, generator=generator)
    x = torch.randn(50, d, generator=generator)
    U, V = svd_factors(W, rank, seed=seed, second_moment=x.T @ x if weighted else None)
    assert U.shape == (d, rank)
    rms = V.square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, rms[:1].expand_as(rms), rtol=1e-4, atol=0)
    assert float(U.square().mean(dim=0).sqrt().max()) == pytest.approx(1.0, rel=1e-5)
    if rank >= min(d, n):
        torch.testing.assert_close(U @ V, W, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_entries_follow_the_singular_values(weighted: bool) -> None:
    W, H = matrix(0), moment(0)
    U, V = svd_factors(W, 12, seed=0, second_moment=H if weighted else None)
    metric = H if weighted else torch.eye(12)
    energy = torch.einsum("dr,de,er->r", U, metric, U) * V.square().sum(dim=1)
    assert torch.all(energy[1:] <= energy[:-1] * (1 + 1e-3))
    if not weighted:
        torch.testing.assert_close(energy.sqrt(), torch.linalg.svdvals(W), rtol=1e-3, atol=1e-5)


def test_added_columns_carry_weight_and_depend_on_the_seed_only() -> None:
    W = matrix(0)
    U, V = svd_factors(W, 20, seed=3)
    again, other = svd_factors(W, 20, seed=3), svd_factors(W, 20, seed=4)
    assert torch.equal(U, again[0])
    assert torch.equal(V, again[1])
    assert not torch.equal(U[:, 12:], other[0][:, 12:])
    assert float(U[:, 12:].square().mean(dim=0).min()) > 1e-4


# --- output-aware ----------------------------------------------------------------------------------------------


def statistics(seed: int, d: int = 12, n: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(H, S, A, first W, last W, unit): a first matrix with sensitivities S, a last one that reads moment A."""
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(d, n, generator=generator).double() for _ in range(2))
    S = torch.rand(n, generator=generator).double() ** 2
    return moment(seed).double(), S, moment(seed + 50, n).double(), first, last, torch.eye(d).double()


def output_error(U: Tensor, seed: int) -> float:
    """What is left of both matrices' errors with the best V for U."""
    H, S, A, first, last, unit = statistics(seed)
    H = H + 1e-4 * H.diagonal().mean() * unit
    E = first - U @ torch.linalg.solve(U.T @ H @ U, U.T @ H @ first)
    F = last - U @ torch.linalg.solve(U.T @ U, U.T @ last)
    return float(torch.trace(E.T @ H @ E * S) + torch.trace(F @ A @ F.T))


def grams(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    H, S, A, first, last, _ = statistics(seed)
    return H, (first * S) @ first.T, last @ A @ last.T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [3, 6, 9])
def test_no_descent_finds_a_better_basis(seed: int, rank: int) -> None:
    U = output_aware_basis(*grams(seed), rank, rounds=300)
    torch.testing.assert_close(U.T @ U, torch.eye(rank).double(), rtol=0, atol=1e-10)
    ours = output_error(U, seed)
    H, S, A, first, last, unit = statistics(seed)
    H = H + 1e-4 * H.diagonal().mean() * unit
    Y = U.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([Y], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        E = first - Y @ torch.linalg.solve(Y.T @ H @ Y, Y.T @ H @ first)
        F = last - Y @ torch.linalg.solve(Y.T @ Y, Y.T @ last)
        loss = torch.trace(E.T @ H @ E * S) + torch.trace(F @ A @ F.T)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ours <= output_error(Y.detach(), seed) * 1.02
    W = torch.cat([first, last], dim=1).float()
    for metric in (None, H.float()):
        other, _ = svd_factors(W, rank, seed=0, second_moment=metric)
        assert ours < 0.95 * output_error(other.double(), seed)


def test_rounds_lower_the_error_and_rows_of_v_are_uncorrelated() -> None:
    errors = [output_error(output_aware_basis(*grams(0), 6, rounds=rounds), 0) for rounds in (0, 1, 3, 30)]
    assert errors == sorted(errors, reverse=True)
    H, G, K = grams(0)
    U = output_aware_basis(H, G, K, 6)
    H = H + 1e-4 * H.diagonal().mean() * torch.eye(12)
    P = torch.linalg.solve(U.T @ H @ U, U.T @ H)
    energy = P @ G @ P.T * H.trace() / 12 + U.T @ K @ U
    diagonal = energy.diagonal()
    torch.testing.assert_close(energy, torch.diag(diagonal), rtol=0, atol=1e-8 * float(diagonal[0]))
    assert torch.all(diagonal[1:] <= diagonal[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_output_aware_start_has_the_smallest_output_error(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    group = make_group(model, 16)
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0.5, -1, 32)
    save_inputs(tmp_path, model, group, x)
    errors = []
    for calibration, output_aware in ((tmp_path, True), (tmp_path, False), (None, False)):
        mlps, _ = factorize_group(
            model, group, calibration=calibration, masked=False, seed=0, output_aware=output_aware
        )
        with torch.no_grad():
            pairs = [(mlp(x), model.get_submodule(mlp.site.path)(x)) for mlp in mlps]
        errors.append(sum(float((a - b).square().mean() / b.var()) for a, b in pairs))
    assert errors[0] < 0.8 * min(errors[1:])


@pytest.mark.parametrize("rank", [32, 48])
def test_output_aware_start_is_exact_at_full_rank(tmp_path: Path, rank: int) -> None:
    model = tiny("dinov2_swiglu")
    group = make_group(model, rank)
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    save_inputs(tmp_path, model, group, x)
    mlps, _ = factorize_group(model, group, calibration=tmp_path, masked=True, seed=0, output_aware=True)
    with torch.no_grad():
        for mlp in mlps:
            expected = model.get_submodule(mlp.site.path)(x)
            torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# --- modules ---------------------------------------------------------------------------------------------------


def test_dense_columns_lays_the_model_dimension_along_the_rows() -> None:
    model = tiny("dinov2_swiglu")
    site = make_group(model, 1).sites[0]
    mlp = model.get_submodule(site.path)
    W = dense_columns(mlp, site)
    assert W.shape == (32, 3 * site.hidden)
    assert torch.equal(W[:, : site.hidden], mlp.get_parameter("gate_proj.weight").T)
    assert torch.equal(W[:, site.hidden : 2 * site.hidden], mlp.get_parameter("up_proj.weight").T)
    assert torch.equal(W[:, 2 * site.hidden :], mlp.get_parameter("down_proj.weight"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [32, 48])
@pytest.mark.parametrize("seed", range(2))
def test_equals_the_dense_model_at_full_rank(kind: str, rank: int, seed: int) -> None:
    model = tiny(kind, seed)
    mlps, singular = factorize_group(model, make_group(model, rank), calibration=None, masked=True, seed=seed)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(seed))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    compressed = install(model, mlps)
    with torch.no_grad():
        for mlp in mlps:
            expected = model.get_submodule(mlp.site.path)(x)
            assert float(expected.abs().max()) > 0.5
            torch.testing.assert_close(mlp(x), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        expected = model(pixel_values=pixels).logits
        torch.testing.assert_close(compressed(pixel_values=pixels).logits, expected, rtol=1e-3, atol=1e-4)
    W = torch.cat([dense_columns(model.get_submodule(mlp.site.path), mlp.site) for mlp in mlps], dim=1)
    assert torch.equal(singular, torch.linalg.svdvals(W))


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_kept_and_frozen(kind: str) -> None:
    model = tiny(kind)
    mlps, _ = factorize_group(model, make_group(model, 16), calibration=None, masked=False, seed=0)
    for mlp in mlps:
        dense = model.get_submodule(mlp.site.path)
        assert set(mlp.biases) == {*mlp.site.first, mlp.site.last}
        for name, bias in mlp.biases.items():
            assert torch.equal(bias, dense.get_parameter(f"{name}.bias"))
            assert bias is not dense.get_parameter(f"{name}.bias")
            assert not bias.requires_grad


def test_calibration_weights_the_factorization(tmp_path: Path) -> None:
    model = tiny("vit")
    group = make_group(model, 8)
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(1, -2, 32)
    save_inputs(tmp_path, model, group, x)
    W = torch.cat([dense_columns(model.get_submodule(site.path), site) for site in group.sites], dim=1)
    H = x.T @ x / 300
    errors = []
    for calibration in (tmp_path, None):
        mlps, _ = factorize_group(model, group, calibration=calibration, masked=False, seed=0)
        parts = []
        for mlp in mlps:
            parts += [mlp.projections["fc1"]().T, mlp.projections["fc2"]()]
        errors.append(weighted_error(W, mlps[0].basis().T, torch.cat(parts, dim=1), H))
    assert errors[0] < 0.5 * errors[1]


def test_the_basis_is_one_parameter() -> None:
    model = tiny("vit", layers=3)
    group = make_group(model, 16)
    mlps, _ = factorize_group(model, group, calibration=None, masked=True, seed=0)
    compressed = install(model, mlps)
    factors = [module for module in compressed.modules() if isinstance(module, Factor)]
    assert len(factors) == 1 + 2 * 3
    assert all(compressed.get_submodule(mlp.site.path) is mlp for mlp in mlps)
    assert len({id(mlp.basis.weight) for mlp in mlps}) == 1
    trained = [parameter for parameter in compressed.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(factor.weight) for factor in factors}
    assert sum(parameter.numel() for parameter in trained) == 16 * 32 + 16 * group.columns
    assert {id(p) for p in GroupModule(mlps).parameters() if p.requires_grad} == {id(p) for p in trained}
    # A copy of the whole keeps the sharing.
    twin = copy.deepcopy(compressed)
    assert len({id(twin.get_submodule(mlp.site.path).basis) for mlp in mlps}) == 1
    assert twin.get_submodule(mlps[0].site.path).basis is not mlps[0].basis


def test_install_shares_all_but_the_mlps() -> None:
    model = tiny("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(pixel_values=pixels).logits
    mlps, _ = factorize_group(model, make_group(model, 16), calibration=None, masked=True, seed=0)
    compressed = install(model, mlps)
    own = {id(parameter) for mlp in mlps for parameter in mlp.parameters()}
    dense = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in compressed.parameters()} - own < dense
    with torch.no_grad():
        for mlp in mlps:
            for parameter in mlp.parameters():
                parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    assert not torch.equal(compressed(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_saved_factors_are_restored(tmp_path: Path, kind: str, masked: bool) -> None:
    model = tiny(kind)
    group = make_group(model, 16)
    mlps, _ = factorize_group(model, group, calibration=None, masked=masked, seed=0)
    generator = torch.Generator().manual_seed(0)
    if masked:
        for name, factor in named_factors(mlps).items():
            if factor.mask is not None:
                assert not name.endswith("basis")
                factor.mask.copy_(torch.rand(factor.mask.shape, generator=generator) < 0.3)
    path = tmp_path / "factors.safetensors"
    save_factors(mlps, path)
    restored = restore_group(model, group, path, masked=masked)
    assert restored[0].basis is restored[-1].basis
    expected, actual = named_factors(mlps), named_factors(restored)
    assert list(expected) == list(actual)
    for name, factor in expected.items():
        assert torch.equal(factor(), actual[name]())
        assert (factor.mask is None) == (actual[name].mask is None)
    x = torch.randn(5, 32, generator=generator)
    for before, after in zip(mlps, restored, strict=True):
        assert torch.equal(before(x), after(x))


def test_the_file_holds_the_basis_once(tmp_path: Path) -> None:
    model = tiny("vit")
    mlps, _ = factorize_group(model, make_group(model, 16), calibration=None, masked=True, seed=0)
    save_factors(mlps, tmp_path / "f.safetensors")
    names = set(load_file(tmp_path / "f.safetensors"))
    assert {name for name in names if "basis" in name} == {"group_0.basis/weight", "group_0.basis/gain"}
    assert {name.split("/")[0] for name in names} == {
        "group_0.basis", "block_0.fc1", "block_0.fc2", "block_1.fc1", "block_1.fc2"
    }


def test_factors_of_another_rank_or_name_are_not_loaded(tmp_path: Path) -> None:
    model = tiny("vit")
    mlps, _ = factorize_group(model, make_group(model, 16), calibration=None, masked=True, seed=0)
    save_factors(mlps[:1], tmp_path / "f.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_factors(mlps, tmp_path / "f.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        restore_group(model, make_group(model, 32), tmp_path / "f.safetensors", masked=True)


def test_aliasing_is_found() -> None:
    model = tiny("vit")
    group = make_group(model, 16)

    def fresh() -> list:
        return factorize_group(model, group, calibration=None, masked=True, seed=0)[0]

    mlps = fresh()
    mlps[1].basis = copy.deepcopy(mlps[0].basis)
    with pytest.raises(AssertionError, match="group_0 hold different bases"):
        named_factors(mlps)
    with pytest.raises(AssertionError, match="share one basis"):
        GroupModule(mlps)
    mlps = fresh()
    mlps[1].projections["fc1"] = mlps[0].projections["fc1"]
    with pytest.raises(AssertionError, match=r"block_0.fc1 and block_1.fc1 are one weight"):
        named_factors(mlps)
    mlps = fresh()
    mlps[1].projections["fc2"].weight = mlps[0].projections["fc2"].weight
    with pytest.raises(AssertionError, match=r"block_0.fc2 and block_1.fc2 are one weight"):
        named_factors(mlps)
    mlps = fresh()
    with pytest.raises(AssertionError, match=r"two factors are called block_0.fc1"):
        named_factors([mlps[0], mlps[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_baseline_keeps_its_matrices(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    plan = make_plan(dense_recipe(), find_mlps(model))
    assert len(plan.groups) == 2
    mlps = []
    for group in plan.groups:
        (mlp,), singular = factorize_group(model, group, calibration=None, masked=False, seed=0)
        assert torch.equal(singular, torch.linalg.svdvals(dense_columns(model.get_submodule(mlp.site.path), mlp.site)))
        save_factors([mlp], tmp_path / f"{group.name}.safetensors")
        mlps.append(mlp)
    linears = [*mlps[0].site.first, mlps[0].site.last]
    assert list(named_factors(mlps)) == [f"block_{block}.{name}" for block in (0, 1) for name in linears]
    for mlp in mlps:
        assert mlp.basis is None
        for name in linears:
            weight = model.get_submodule(mlp.site.path).get_parameter(f"{name}.weight")
            torch.testing.assert_close(mlp.projection(name)(), weight, rtol=1e-6, atol=0)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        torch.testing.assert_close(install(model, mlps)(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4)
    for group, mlp in zip(plan.groups, mlps, strict=True):
        (restored,) = restore_group(model, group, tmp_path / f"{group.name}.safetensors", masked=False)
        assert all(torch.equal(restored.projection(name)(), mlp.projection(name)()) for name in linears)
        assert [name for name, _ in GroupModule([restored]).named_parameters() if "projections" in name] == [
            f"mlps.0.projections.{name}.weight" for name in linears
        ]
