"""The convex objectives: derivatives by autograd, conjugates in closed form, minimisers."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch.autograd.functional import hessian

from assay.data.convex import (
    ExponentialPenalty,
    LogisticRegression,
    NormPower,
    PNormRegression,
    breast_cancer_logistic,
    diabetes_regression,
    synthetic_logistic,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(n):
    return torch.where(draw(n, seed=9) > 0, 1.0, -1.0)


A, B = draw(12, 3), draw(12, seed=1)
OBJECTIVES = {
    "power 2": NormPower(A, B, 2),
    "power 4": NormPower(A, B, 4),
    "power 2.5": NormPower(draw(3, 3), draw(3, seed=1), 2.5),
    "logistic": LogisticRegression(A, signs(12), 0.1),
    "logistic without ridge": LogisticRegression(A, signs(12)),
    "p-norm": PNormRegression(A, B, 4),
    "p-norm 3": PNormRegression(A, B, 3),
    "cosh": ExponentialPenalty(A, B, "cosh"),
    "exp": ExponentialPenalty(A, B, "exp"),
}
every_objective = pytest.mark.parametrize("f", OBJECTIVES.values(), ids=OBJECTIVES)


def written_out(f, x):
    """The objective by its formula, one point."""
    if isinstance(f, NormPower):
        return (f.A @ x - f.c).norm() ** f.a / f.a
    u = f.A @ x - f.b
    terms = {
        LogisticRegression: lambda: torch.log(1 + torch.exp(-u)),
        PNormRegression: lambda: u.abs() ** getattr(f, "p", 2) / getattr(f, "p", 2),
        ExponentialPenalty: lambda: (
            torch.cosh(u) - 1
            if getattr(f, "penalty", "") == "cosh"
            else torch.exp(u.abs()) - u.abs() - 1
        ),
    }[type(f)]()
    return terms.mean() + f.ridge / 2 * x @ x


@every_objective
def test_value_gradient_and_hessian_are_those_of_the_formula(f):
    points = draw(2, 4, 3, seed=2)
    values, gradients, hessians = f(points), f.gradient(points), f.hessian(points)
    for index in [(i, j) for i in range(2) for j in range(4)]:
        x = points[index].clone().requires_grad_()
        value = written_out(f, x)
        torch.testing.assert_close(values[index], value.detach())
        torch.testing.assert_close(gradients[index], torch.autograd.grad(value, x)[0])
        torch.testing.assert_close(
            hessians[index], hessian(lambda z: written_out(f, z), points[index])
        )


@every_objective
def test_log_determinants_are_those_of_the_hessians(f):
    points = draw(7, 3, seed=3)
    expected = torch.linalg.slogdet(f.hessian(points)).logabsdet
    torch.testing.assert_close(f.hessian_logdet(points), expected)


def test_chunks_do_not_change_the_log_determinants(monkeypatch):
    f, points = OBJECTIVES["logistic"], draw(7, 3, seed=3)
    whole = f.hessian_logdet(points)
    monkeypatch.setattr("assay.data.convex._CHUNK_ELEMENTS", 30)  # two points a chunk
    torch.testing.assert_close(f.hessian_logdet(points), whole)


@every_objective
def test_gradients_are_monotone(f):
    x, y = draw(50, 3, seed=4), draw(50, 3, seed=5)
    inner = ((x - y) * (f.gradient(x) - f.gradient(y))).sum(1)
    assert (inner > 0).all()


# Without a ridge there is none if the classes are separable.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "logistic without ridge"])
def test_minimizer_agrees_with_lbfgs(name):
    f = OBJECTIVES[name]
    found = minimize(
        lambda x: f(torch.from_numpy(x)).item(),
        torch.zeros(3).double().numpy(),
        jac=lambda x: f.gradient(torch.from_numpy(x)).numpy(),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    best = f.minimizer()
    # A gap of eps f* is below what either can see: √eps in the argument.
    assert f(best).item() <= found.fun + 1e-14 * abs(found.fun)
    torch.testing.assert_close(best, torch.from_numpy(found.x), rtol=1e-3, atol=1e-3)


def test_fiftieth_powers_of_large_residuals_stay_finite():
    f = NormPower([[50 / 356.4]], [50.0], 50)
    x = torch.tensor([[100.0], [1000.0]], dtype=torch.float64)
    u = 50 / 356.4 * x[:, 0] - 50
    # d/dx |u|⁵⁰/50 = A u⁴⁹: 10⁷⁵ at 100, as the paper's experiment has it.
    assert -1e76 < f.gradient(x)[0].item() < -1e75
    torch.testing.assert_close(f.gradient(x)[:, 0], 50 / 356.4 * u**49, rtol=1e-12, atol=0.0)
    expected = 2 * math.log(50 / 356.4) + math.log(49) + 48 * u.abs().log()
    torch.testing.assert_close(f.hessian_logdet(x), expected)


def test_derivatives_vanish_at_the_centre_of_a_power():
    f = NormPower(2 * torch.eye(2), [2.0, -4.0], 4)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert f(x).item() == 0
    assert (f.gradient(x) == 0).all()
    assert f.hessian_logdet(x).item() == -math.inf


def test_penalties_do_not_cancel_near_zero():
    u = torch.tensor([[1e-9]], dtype=torch.float64)
    for penalty in ("cosh", "exp"):
        f = ExponentialPenalty([[1.0]], [0.0], penalty)
        assert f.gradient(u).item() == pytest.approx(1e-9)
    assert ExponentialPenalty([[1.0]], [0.0], "cosh")(u).item() == pytest.approx(5e-19)


@pytest.mark.parametrize("ridge", [0.5, 0.05])
def test_smoothness_bounds_every_curvature_and_is_reached_at_zero(ridge):
    f = LogisticRegression(A, signs(12), ridge)
    points = torch.cat([torch.zeros(1, 3).double(), 3 * draw(20, 3, seed=6)])
    top = torch.linalg.eigvalsh(f.hessian(points))[:, -1]
    assert (top <= f.smoothness * (1 + 1e-12)).all()
    assert top[0].item() == pytest.approx(f.smoothness)


@pytest.mark.parametrize(("decay", "kappa"), [(False, 8.5), (True, 82)])
def test_synthetic_losses_have_the_stated_condition(decay, kappa):
    f = synthetic_logistic(1000, 50, 0.05, decay=decay, generator=torch.Generator().manual_seed(0))
    assert f.smoothness / f.ridge == pytest.approx(kappa, rel=0.1)
    same = synthetic_logistic(
        1000, 50, 0.5, decay=decay, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(f.A, same.A)


def test_real_data_are_standardised():
    cancer, diabetes = breast_cancer_logistic(0.1), diabetes_regression(4)
    assert cancer.A.shape == (569, 30)
    assert diabetes.A.shape == (442, 10)
    for rows in (diabetes.A, diabetes.b[:, None], cancer.A.abs()):
        torch.testing.assert_close(
            rows.square().mean(0), torch.ones(rows.shape[1], dtype=torch.float64)
        )
    assert cancer.minimizer().norm() < 5  # the ridge keeps separable classes finite


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NormPower([[1.0]], [1.0], 1.0), "a must be more than 1"),
        (lambda: NormPower([1.0], [1.0], 2.0), "A must be a non-empty finite matrix"),
        (lambda: NormPower([[math.nan]], [1.0], 2.0), "A must be a non-empty finite matrix"),
        (lambda: NormPower([[1.0]], [1.0, 2.0], 2.0), "one entry a row"),
        (lambda: LogisticRegression([[1.0]], [0.0]), "−1 and 1 only"),
        (lambda: LogisticRegression([[1.0]], [1.0], -1.0), "ridge must be at least 0"),
        (lambda: PNormRegression([[1.0]], [1.0], 1.5), "p must be at least 2"),
        (lambda: ExponentialPenalty([[1.0]], [1.0], "sinh"), "penalty must be"),
    ],
)
def test_rejects_what_is_no_such_objective(make, match):
    with pytest.raises(ValueError, match=match):
        make()
