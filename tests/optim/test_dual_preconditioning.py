"""Dual preconditioning: conjugates in closed form, rates, the line search, the learned inverse."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assay.data.convex import ExponentialPenalty, NormPower, synthetic_logistic
from assay.optim import (
    Arcsinh,
    Clip,
    Diagonal,
    DualPreconditionedGD,
    GaussianSampler,
    LearnedPreconditioner,
    Normalized,
    Power,
    RadialSampler,
    SignedLog,
    effective_sample_size,
)
from assay.optim.dual_preconditioning import PRECONDITIONERS
from assay.optim.learned_preconditioner import _autograd_logdet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def parameter(values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


# -- the catalogue -------------------------------------------------------------------------------

CATALOGUE = {
    "power": (Power(3.0), lambda n: n**1.5 / 1.5),
    "power, smooth": (Power(4.0, eps=0.7), lambda n: (n**2 + 0.49) ** (2 / 3) * 0.75),
    "normalized": (Normalized(0.5), lambda n: (n**2 + 0.25).sqrt()),
    "clip": (Clip(1.5), lambda n: torch.where(n < 1.5, n**2 / 2, 1.5 * n - 1.125)),
}


@pytest.mark.parametrize(("preconditioner", "p"), CATALOGUE.values(), ids=CATALOGUE)
def test_preconditioner_is_the_gradient_of_its_function_of_the_norm(preconditioner, p):
    g = (2 * draw(6, 3)).requires_grad_()
    (expected,) = torch.autograd.grad(p(g.norm(dim=1)).sum(), g)
    torch.testing.assert_close(preconditioner(g.detach()), expected)


@pytest.mark.parametrize("a", [1.5, 2.0, 4.0, 50.0])
def test_power_inverts_the_gradient_of_a_power(a):
    x = draw(20, 4)
    f = NormPower(torch.eye(4), torch.zeros(4), a)
    torch.testing.assert_close(Power(a)(f.gradient(x)), x)


@pytest.mark.parametrize(("penalty", "inverse"), [("cosh", Arcsinh()), ("exp", SignedLog())])
def test_entrywise_preconditioners_invert_exponential_penalties(penalty, inverse):
    x = 5 * draw(20, 1)
    torch.testing.assert_close(inverse(ExponentialPenalty([[1.0]], [0.0], penalty).gradient(x)), x)


@pytest.mark.parametrize("preconditioner", [*(c[0] for c in CATALOGUE.values()), Power(50)])
def test_norms_neither_overflow_nor_lose_the_direction(preconditioner):
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    for size in (1e-200, 1e200, 1e307):
        step = preconditioner(size * direction)
        assert step.isfinite().all()
        torch.testing.assert_close(step / step.abs().max(), direction / 0.8)
    assert (preconditioner(torch.zeros(2)) == 0).all()
    assert preconditioner(torch.zeros(3, 0)).shape == (3, 0)


@given(st.sampled_from(sorted(PRECONDITIONERS)), st.integers(0, 10_000))
def test_catalogue_is_monotone_odd_and_vanishes_at_zero(name, seed):
    preconditioner = PRECONDITIONERS[name]()
    g, h = 10 * draw(2, 5, seed=seed)
    difference = preconditioner(g) - preconditioner(h)
    assert (difference * (g - h)).sum() >= 0
    torch.testing.assert_close(preconditioner(-g), -preconditioner(g))
    assert (preconditioner(torch.zeros(5)) == 0).all()


# -- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [2.0, 4.0, 50.0])
@pytest.mark.parametrize("s", [0.5, 3.0])
def test_exact_conjugate_of_a_power_needs_one_step(a, s):
    center = draw(3)
    f = NormPower(s * torch.eye(3), s * center, a)
    for start in 20 * draw(20, 3, seed=1):
        x = nn.Parameter(start.clone())
        optimizer = DualPreconditionedGD([x], s ** (-a / (a - 1)), Power(a))
        x.grad = f.gradient(start)
        optimizer.step()
        # A gradient is exact to a few eps; the inverse amplifies no relative error.
        torch.testing.assert_close(x.detach(), center, rtol=0, atol=1e-11)


def test_offset_of_a_preconditioner_is_subtracted():
    # ∇f* of f = ½(x − c)² is y + c: without ∇p(0) = c the step would be c too far.
    x = parameter([7.0, -3.0])
    center = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x.grad = x.detach() - center
    DualPreconditionedGD([x], preconditioner=lambda y: y + center).step()
    torch.testing.assert_close(x.detach(), center)


def test_diagonal_contracts_as_the_dual_condition_number_says():
    hessian = torch.logspace(0, 4, 10, dtype=torch.float64)
    factors = torch.linspace(1, 3, 10, dtype=torch.float64)
    p = Diagonal(factors / hessian)
    x = nn.Parameter(draw(10))
    optimizer = DualPreconditionedGD([x], lr=1 / 3, preconditioner=p)
    before = math.inf
    for _ in range(30):
        x.grad = hessian * x.detach()
        height = (x.grad * p(x.grad)).sum().item() / 2
        assert height <= (1 - 1 / 3) * before * (1 + 1e-12)
        before = height
        optimizer.step()


@pytest.mark.parametrize("per", ["global", "param", "element"])
def test_per_says_what_is_one_vector(per):
    grads = [draw(2, 3), draw(4, seed=1)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    DualPreconditionedGD(params, preconditioner=Power(3.0), per=per).step()
    # ∇p(g) = ‖g‖^(−1/2) g with the norm of that vector
    whole = torch.cat([g.flatten() for g in grads]).norm()
    for p, g in zip(params, grads, strict=True):
        norm = {"global": whole, "param": g.norm(), "element": g.abs()}[per]
        torch.testing.assert_close(p.detach(), -g / norm.sqrt())


def test_groups_have_their_own_steps_and_frozen_parameters_stay():
    a, b, c = parameter([1.0]), parameter([1.0]), parameter([1.0])
    a.grad, b.grad = torch.ones(1).double(), torch.ones(1).double()
    groups = [{"params": [a, c]}, {"params": [b], "lr": 0.1}]
    DualPreconditionedGD(groups, lr=0.5, preconditioner="identity").step()
    assert [a.item(), b.item(), c.item()] == [0.5, 0.9, 1.0]


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_names_mean_the_classes_with_their_defaults(name):
    x = parameter([3.0, -4.0])
    x.grad = torch.tensor([0.3, -2.0], dtype=torch.float64)
    DualPreconditionedGD([x], preconditioner=name).step()
    expected = torch.tensor([3.0, -4.0]).double() - PRECONDITIONERS[name]()(x.grad)
    torch.testing.assert_close(x.detach(), expected)


def quadratic_closure(x, scale=1.0):
    calls = []

    def closure():
        x.grad = None
        loss = scale * x.square().sum() / 2
        loss.backward()
        calls.append(x.detach().clone())
        return loss

    return closure, calls


def test_backtracking_takes_the_first_halving_that_descends():
    # Steps of γ move x to (1 − 8γ) x: γ = 1 and 1/2 overshoot, 1/4 gives −x (no descent), 1/8 is
    # exact.
    x = parameter([1.0, 2.0])
    closure, calls = quadratic_closure(x, scale=8.0)
    optimizer = DualPreconditionedGD([x], 1.0, "identity", line_search="backtracking")
    loss = optimizer.step(closure)
    assert loss.item() == 20.0
    assert (x == 0).all()
    assert len(calls) == 5  # the start, and 1, 1/2, 1/4, 1/8
    optimizer.step(closure)
    assert (x == 0).all()
    assert len(calls) == 6  # at the minimiser there is nothing to try


@pytest.mark.parametrize("line_search", [None, "backtracking"])
def test_ascent_falls_back_to_the_gradient(line_search):
    x = parameter([1.0, 2.0])
    closure, _ = quadratic_closure(x)
    optimizer = DualPreconditionedGD(
        [x], 1.0, lambda g: -g, line_search=line_search, fallback_lr=0.25
    )
    optimizer.step(closure)
    assert x.tolist() == [0.75, 1.5]


def test_without_a_fallback_the_published_step_is_taken():
    x = parameter([1.0])
    x.grad = torch.ones(1).double()
    DualPreconditionedGD([x], 1.0, lambda g: -g).step()
    assert x.item() == 2.0


def test_line_search_leaves_the_parameters_where_nothing_descends():
    x = parameter([1.0])

    def closure():  # a loss that its gradient knows nothing of
        x.grad = torch.ones_like(x)
        return (x - 1).abs().sum().detach()

    DualPreconditionedGD([x], 1.0, "identity", line_search="backtracking", max_halvings=3).step(
        closure
    )
    assert x.item() == 1.0


def test_line_search_steps_over_infinities():
    x = parameter([2.0])

    def closure():
        x.grad = None
        loss = (x - torch.log(x)).sum()  # NaN for x < 0
        loss.backward()
        return loss

    optimizer = DualPreconditionedGD([x], 8.0, "identity", line_search="backtracking")
    for _ in range(60):
        optimizer.step(closure)
    assert x.item() == pytest.approx(1.0, abs=1e-6)


def test_copies_and_checkpoints_take_the_same_steps():
    def fresh():
        x = nn.Parameter(draw(4))
        return x, DualPreconditionedGD([x], 0.3, Normalized(0.1), per="param", fallback_lr=0.5)

    x, optimizer = fresh()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    _, restored = fresh()
    restored.load_state_dict(torch.load(saved, weights_only=True))
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), restored]
    gradient = draw(4, seed=3)
    x.grad = gradient.clone()
    optimizer.step()
    for twin in twins:
        (param,) = twin.param_groups[0]["params"]
        param.grad = gradient.clone()
        twin.step()
        assert torch.equal(param, x)
        assert twin.per == "param"
        assert twin.fallback_lr == 0.5


def test_schedulers_change_the_step():
    x = parameter([1.0])
    optimizer = DualPreconditionedGD([x], 1.0, "identity")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for expected in (0.0, -0.5, -0.75):
        x.grad = torch.ones(1).double()
        optimizer.step()
        schedule.step()
        assert x.item() == expected


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"fallback_lr": -1.0}, ValueError, "fallback_lr must be positive"),
        ({"line_search": "wolfe"}, ValueError, "line_search must be None or 'backtracking'"),
        ({"per": "layer"}, ValueError, "per must be"),
        ({"max_halvings": -1}, ValueError, "max_halvings must be at least 0"),
        ({"preconditioner": "newton"}, ValueError, "preconditioner must be one of 'identity'"),
        ({"preconditioner": 3}, TypeError, "must be a name or callable, got 3"),
    ],
)
def test_rejects_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        DualPreconditionedGD([parameter([1.0])], **options)


def test_rejects_wrong_steps():
    x = parameter([1.0, 2.0])
    with pytest.raises(ValueError, match="needs a closure"):
        DualPreconditionedGD([x], line_search="backtracking").step()
    x.grad = torch.ones(2).double()
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got \(2,\)"):
        DualPreconditionedGD([x], preconditioner=lambda g: g.sum(-1)).step()
    with pytest.raises(ValueError, match="3 entries, the gradient 2"):
        DualPreconditionedGD([x], preconditioner=Diagonal(torch.ones(3))).step()
    x.grad = torch.ones(2).double().to_sparse()
    with pytest.raises(ValueError, match="sparse gradients"):
        DualPreconditionedGD([x]).step()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Power(1.0), "a must be more than 1"),
        (lambda: Power(2.0, eps=-1.0), "eps must be at least 0"),
        (lambda: Normalized(0.0), "eps must be positive"),
        (lambda: Clip(math.inf), "max_norm must be positive"),
        (lambda: Diagonal(torch.tensor([1.0, 0.0])), "vector of positive numbers"),
        (lambda: Diagonal(torch.ones(2, 2)), "vector of positive numbers"),
        (lambda: GaussianSampler(0), "dim must be"),
        (lambda: GaussianSampler(1, scale=0.0), "scale must be positive"),
        (lambda: RadialSampler(2, 2.0, 1.0), "0 < low < high"),
        (lambda: LearnedPreconditioner(0), "dim and hidden widths must be"),
        (lambda: LearnedPreconditioner(2, feature_map="log"), "feature_map must be"),
    ],
)
def test_rejects_wrong_preconditioners(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# -- what is learned -----------------------------------------------------------------------------


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(-500, 500))
def test_effective_sample_size_is_its_formula(log_weights, shift):
    w = [math.exp(v) for v in log_weights]
    expected = sum(w) ** 2 / sum(v * v for v in w)
    shifted = torch.tensor(log_weights, dtype=torch.float64) + shift
    assert effective_sample_size(shifted) == pytest.approx(expected)


def test_effective_sample_size_of_nothing_is_zero():
    assert effective_sample_size(torch.empty(0)) == 0
    assert effective_sample_size(torch.full((3,), -math.inf)) == 0


def test_gaussian_sampler_has_the_density_it_states():
    sampler = GaussianSampler(3, scale=2.0, mean=1.0)
    x, log_density = sampler(50, generator())
    normal = torch.distributions.Normal(torch.tensor(1.0).double(), 2.0)
    torch.testing.assert_close(log_density, normal.log_prob(x).sum(1))


def test_radial_sampler_has_the_density_it_states():
    # Importance weights against a Gaussian integrate to its mass within the shell.
    sampler = RadialSampler(3, low=1e-3, high=10.0, center=0.5)
    n = 40_000
    x, log_density = sampler(n, generator())
    radii = (x - 0.5).norm(dim=1)
    assert radii.min() >= 1e-3 * (1 - 1e-9)
    assert radii.max() <= 10 * (1 + 1e-9)
    target = torch.distributions.Normal(torch.tensor(0.5).double(), 1.0).log_prob(x).sum(1)
    weights = (target - log_density).exp()
    error = weights.std() / math.sqrt(n)
    assert abs(weights.mean() - 1) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("feature_map", [None, "signed_log"])
@pytest.mark.parametrize("given_logdet", [True, False])
def test_weights_make_the_features_uniform(feature_map, given_logdet):
    # f = x⁴/4: the share of weight at features below t is that of a uniform variable.
    f = NormPower([[1.0]], [0.0], 4)
    learned = LearnedPreconditioner(1, (4,), feature_map)
    report = learned.fit(
        f.gradient,
        GaussianSampler(1, scale=1.0),
        hessian_logdet=f.hessian_logdet if given_logdet else None,
        n=4000,
        epochs=1,
        generator=generator(),
    )
    x, log_density = GaussianSampler(1, scale=1.0)(4000, generator())
    y = f.gradient(x)
    features = y if feature_map is None else y.sign() * torch.log1p(y.abs())
    # dG/dx by hand: 3x², times 1/(1 + |y|) for the logarithm
    jacobian = 3 * x[:, 0] ** 2 / (1 if feature_map is None else 1 + y[:, 0].abs())
    weights = jacobian / log_density.exp()
    assert report.ess == pytest.approx((weights.sum() ** 2 / weights.square().sum()).item())
    assert report.exponent == 1.0
    inside = features[:, 0].abs() < 1  # |x| < 1 or so, where the proposal has points enough
    shares = weights * inside / (weights * inside).sum()
    error = 4 / math.sqrt(effective_sample_size(weights[inside].log()))
    for t in (-0.5, 0.0, 0.5):
        assert abs(shares[features[:, 0] < t].sum() - (t + 1) / 2) < error


def test_log_determinants_by_autograd_are_those_of_the_hessian():
    f = synthetic_logistic(40, 6, 0.1, decay=False, generator=generator())
    x = draw(9, 6)
    torch.testing.assert_close(_autograd_logdet(f.gradient)(x), f.hessian_logdet(x))


def test_tempering_stops_at_a_tenth_of_the_sample():
    f = synthetic_logistic(200, 30, 0.05, decay=False, generator=generator())
    reports = {}
    for weights in ("jacobian", "tempered", "uniform"):
        reports[weights] = LearnedPreconditioner(30, (4,)).fit(
            f.gradient,
            GaussianSampler(30, scale=25.0),
            hessian_logdet=f.hessian_logdet,
            n=300,
            epochs=1,
            weights=weights,
            generator=generator(),
        )
    assert reports["jacobian"].ess < 30  # the weights collapse in thirty dimensions
    assert reports["tempered"].ess == pytest.approx(30, rel=1e-3)
    assert reports["tempered"].ess >= 30
    assert 0 < reports["tempered"].exponent < 1
    assert reports["uniform"].ess == pytest.approx(300)
    assert reports["uniform"].exponent == 0


def test_linear_part_alone_inverts_a_quadratic():
    basis = torch.linalg.qr(draw(4, 4)).Q
    hessian = basis @ torch.diag(torch.tensor([1.0, 3.0, 10.0, 30.0]).double()) @ basis.T
    center = draw(4, seed=1)
    learned = LearnedPreconditioner(4, (8,))
    report = learned.fit(
        lambda x: (x - center) @ hessian,
        GaussianSampler(4, scale=5.0),
        n=200,
        epochs=1,
        weights="uniform",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-12),  # leaves the network at zero
        generator=generator(),
    )
    assert report.loss < 1e-20
    x = nn.Parameter(10 * draw(4, seed=2))
    x.grad = (x.detach() - center) @ hessian
    DualPreconditionedGD([x], preconditioner=learned).step()
    torch.testing.assert_close(x.detach(), center, rtol=0, atol=1e-8)


def fitted(**options):
    torch.manual_seed(0)
    f = NormPower([[0.15]], [50.0], 50)
    learned = LearnedPreconditioner(1, (64, 32), "signed_log", **options)
    report = learned.fit(
        f.gradient,
        GaussianSampler(1, scale=200.0, mean=200.0),
        hessian_logdet=f.hessian_logdet,
        n=500,
        epochs=60,
        generator=generator(),
    )
    return f, learned, report


def test_learned_inverse_solves_what_gradient_descent_cannot():
    f, learned, report = fitted()
    x = parameter([100.0])
    x.grad = f.gradient(x.detach())
    assert x.grad.abs() > 1e73
    DualPreconditionedGD([x], preconditioner=learned).step()
    assert abs(x.item() - 50 / 0.15) < 50  # from 233 away
    smallest, largest = report.coverage
    assert smallest < largest
    assert largest > 1e70
    assert report.samples == 500


def test_fitted_network_survives_saving_and_remembers_its_scales():
    f, learned, _ = fitted(skip=False)
    stored = io.BytesIO()
    torch.save(learned.state_dict(), stored)
    stored.seek(0)
    twin = LearnedPreconditioner(1, (64, 32), "signed_log", skip=False)
    twin.load_state_dict(torch.load(stored, weights_only=True))
    g = f.gradient(torch.linspace(0, 500, 11).double()[:, None])
    assert torch.equal(twin(g), learned(g))
    assert learned.label_scale.item() == pytest.approx(200, rel=0.2)  # of π


def test_same_generator_gives_the_same_network():
    networks = [fitted()[1] for _ in range(2)]
    for a, b in zip(*(n.state_dict().values() for n in networks), strict=True):
        assert torch.equal(a, b)


def test_network_takes_float32_gradients_and_batches():
    learned = LearnedPreconditioner(3, (4,), skip=False)
    g = draw(2, 5, 3)
    torch.testing.assert_close(learned(g)[1, 2], learned(g[1, 2]))
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    DualPreconditionedGD([x], preconditioner=learned).step()
    assert x.dtype == torch.float32
    with pytest.raises(ValueError, match="gradients of 3 entries"):
        learned(torch.ones(2).double())


def test_warns_of_a_function_that_is_not_convex():
    learned = LearnedPreconditioner(1, (4,))
    with pytest.warns(UserWarning, match="not monotone on"):
        learned.fit(torch.sin, GaussianSampler(1, scale=5.0), n=50, epochs=1, generator=generator())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"epochs": 0}, "epochs must be an integer"),
        ({"weights": "clipped"}, "weights must be"),
        ({"gradient": lambda x: x.sum(1)}, "gradient must return"),
        ({"gradient": lambda x: x / 0}, "gradient is not finite at 10 of 10 points"),
        ({"gradient": torch.zeros_like, "hessian_logdet": lambda x: x[:, 0] / 0}, "not finite"),
        ({"sampler": GaussianSampler(2)}, r"sampler must return points \(10, 1\)"),
    ],
)
def test_rejects_wrong_training(options, match):
    call = {"gradient": lambda x: 2 * x, "sampler": GaussianSampler(1), "n": 10} | options
    with pytest.raises(ValueError, match=match):
        LearnedPreconditioner(1, (4,)).fit(**call)
