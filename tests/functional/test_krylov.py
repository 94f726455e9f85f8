"""Krylov methods against dense eigendecompositions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assay.functional import (
    DenseOperator,
    HessianOperator,
    ScaledOperator,
    SpectralDensity,
    hutchinson_block_draws,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    spectral_density,
    top_eigenvalues,
)


def _symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


@given(st.integers(1, 30), st.integers(0, 1000))
def test_full_lanczos_is_the_eigendecomposition(n, seed):
    A = _symmetric(n, seed)
    found = lanczos(DenseOperator(A), n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found.eigh()[0], torch.linalg.eigvalsh(A), atol=1e-9, rtol=0)
    Q = found.basis
    torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q), dtype=torch.float64), atol=1e-12, rtol=0)


def test_no_ghosts_when_one_eigenvalue_is_far_out():
    A = torch.diag(torch.cat([torch.tensor([1e4]), torch.linspace(0, 1, 199)]).double())
    values, _ = lanczos(DenseOperator(A), 60, generator=torch.Generator().manual_seed(0)).eigh()
    assert (values > 5e3).sum() == 1


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_outermost_eigenvalues_with_their_vectors(which):
    A = _symmetric(300)
    exact = torch.linalg.eigvalsh(A)
    wanted = {
        "magnitude": exact[exact.abs().argsort(descending=True)],
        "largest": exact.flip(0),
        "smallest": exact,
    }[which][:4]
    values, vectors = top_eigenvalues(
        DenseOperator(A), 4, tol=1e-8, which=which, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(values, wanted, atol=1e-6, rtol=0)
    residual = (A @ vectors.T - vectors.T * values).norm(dim=0)
    assert residual.max() < 1e-6 * exact.abs().max()


def test_too_few_products_are_an_error_not_a_wrong_number():
    with pytest.raises(RuntimeError, match="raise max_steps"):
        top_eigenvalues(DenseOperator(_symmetric(300)), 4, tol=1e-10, max_steps=20)


def test_quadrature_has_the_moments_and_mass_of_the_spectrum():
    A = _symmetric(200)
    found = spectral_density(
        DenseOperator(A), probes=40, steps=30, generator=torch.Generator().manual_seed(0)
    )
    x, density = found.grid()
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-8)
    exact = torch.linalg.eigvalsh(A)
    # Hutchinson's variance is 2‖offdiag A²‖²: five standard errors.
    square = A @ A
    spread = (2 * (square.square().sum() - square.diag().square().sum())).sqrt() / 200
    assert abs(found.moment(2) - exact.square().mean()) < 5 * spread / math.sqrt(40)
    share = density[x > 0].sum() / density.sum()
    assert share == pytest.approx((exact > 0).double().mean().item(), abs=0.03)


def test_hutchinson_is_unbiased_and_its_error_is_honest():
    A = _symmetric(50)
    g = torch.Generator().manual_seed(0)
    trace = hutchinson_trace(DenseOperator(A), probes=4000, generator=g)
    assert abs(trace.mean - A.trace()) < 4 * trace.standard_error
    diagonal = hutchinson_diagonal(DenseOperator(A), probes=4000, generator=g)
    z = (diagonal.mean - A.diag()) / diagonal.standard_error
    assert z.abs().max() < 4.5
    assert z.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 50))


def test_what_is_not_finite_is_an_error():
    A = torch.eye(3)
    operator = DenseOperator(A)
    operator.matrix = A * torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(operator, 2)
    with pytest.raises(ValueError, match="zero vector"):
        lanczos(DenseOperator(A), 2, start=torch.zeros(3))
    with pytest.raises(ValueError, match="symmetric"):
        DenseOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_a_scaled_operator_is_dad():
    A, scale = _symmetric(8), torch.arange(1.0, 9.0, dtype=torch.float64)
    v = torch.linspace(-1, 1, 8, dtype=torch.float64)
    expected = scale.diag() @ A @ scale.diag() @ v
    torch.testing.assert_close(ScaledOperator(DenseOperator(A), scale) @ v, expected)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        ScaledOperator(DenseOperator(A), scale[:3])


def test_block_draws_are_unbiased_for_each_block_and_add_up_to_the_trace():
    A = _symmetric(20)
    draws = hutchinson_block_draws(
        DenseOperator(A), [5, 15], probes=2000, generator=torch.Generator().manual_seed(0)
    )
    exact = torch.stack([A.diag()[:5].sum(), A.diag()[5:].sum()])
    error = draws.std(0) / math.sqrt(2000)
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    whole = hutchinson_trace(
        DenseOperator(A), probes=2000, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(draws.sum(1).mean(), whole.mean)
    with pytest.raises(ValueError, match="add up to 20"):
        hutchinson_block_draws(DenseOperator(A), [5, 5])


def test_pooled_probes_are_those_of_one_run():
    A = DenseOperator(_symmetric(12))
    whole = spectral_density(A, probes=3, steps=5, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    parts = [spectral_density(A, probes=1, steps=5, generator=g) for _ in range(3)]
    pooled = SpectralDensity.pooled(parts)
    np.testing.assert_array_equal(pooled.nodes, whole.nodes)
    assert pooled.draws(np.abs).mean() == pytest.approx(whole.draws(np.abs).mean())
    # Different numbers of steps are padded.
    short = spectral_density(A, probes=1, steps=3, generator=g)
    mixed = SpectralDensity.pooled([short, whole])
    assert mixed.moment(1) == pytest.approx((short.moment(1) + 3 * whole.moment(1)) / 4)


def test_products_share_a_gradient_and_leave_batch_norm_and_dropout_alone():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2)
    ).double()
    x, y = torch.randn(12, 3).double(), torch.randint(2, (12,))
    operator = HessianOperator(net, nn.functional.cross_entropy, (x, y))
    vectors = torch.randn(3, operator.numel, dtype=torch.float64)
    alone = [operator @ v for v in vectors]
    before = {name: b.clone() for name, b in net.named_buffers()}
    with operator.hold():
        held = [operator @ v for v in vectors]
    assert all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(alone, held, strict=True)
    )
    assert all(torch.equal(before[name], b) for name, b in net.named_buffers())
    assert operator._held is None
    dense = operator.to_dense()
    values = top_eigenvalues(operator, 2, tol=1e-9)[0]
    expected = torch.linalg.eigvalsh(dense)
    expected = expected[expected.abs().argsort(descending=True)][:2]
    assert torch.allclose(values, expected, rtol=1e-8)


def test_more_steps_extend_the_space():
    """A spectrum that 16 steps do not resolve: products are those of one Krylov space."""
    diagonal = torch.linspace(1, 2, 400, dtype=torch.float64)
    diagonal[-1] = 2.02
    count = [0]

    class Counted(DenseOperator):
        def __matmul__(self, vectors):
            count[0] += 1
            return super().__matmul__(vectors)

    values, vectors = top_eigenvalues(
        Counted(torch.diag(diagonal)), 1, tol=1e-6, generator=torch.Generator().manual_seed(0)
    )
    assert abs(float(values[0]) - 2.02) < 1e-9
    assert abs(float(vectors[0, -1].abs()) - 1) < 1e-4
    assert count[0] < 100
