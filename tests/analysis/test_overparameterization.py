"""SGD on two-layer leaky-ReLU nets against autograd, closed traces, a peer and its own proof."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from assay.analysis import (
    TwoLayerLeakyNet,
    compression_bound,
    hard_margin,
    perceptron_step,
    run_perceptron_sgd,
    update_bound,
    update_certificate,
)
from assay.kernels.perceptron import gram_matrix, perceptron_epoch


def separable(n, d, margin, seed):
    """Samples in the unit ball with |x_1| ≥ margin, labelled by its sign; float64."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=g) < 0.5).double() * 2 - 1
    along = margin + (1 - margin) * torch.rand(n, generator=g, dtype=torch.float64)
    across = torch.randn(n, d - 1, generator=g, dtype=torch.float64)
    across *= ((1 - along**2).sqrt() / across.norm(dim=1)).unsqueeze(1)
    x = torch.cat([(along * y).unsqueeze(1), across], dim=1)
    mix, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    return x @ mix, y


def net_of(d, k, alpha, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    return TwoLayerLeakyNet(d, k, alpha, generator=g, **options).double()


def sequence_of(net, x, y, lr, epochs):
    """The reference: step by step in plain torch."""
    made = []
    for _ in range(epochs):
        made += [j for j in range(len(x)) if perceptron_step(net, x[j], y[j], lr)]
    return made


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_step_is_autograd_on_the_hinge_loss(alpha):
    x, y = separable(20, 6, 0.2, seed=1)
    net = net_of(6, 4, alpha, v=0.7)
    for j in range(20):
        twin = copy.deepcopy(net)
        loss = (1 - y[j] * twin(x[j])).clamp_min(0)
        loss.backward()
        assert perceptron_step(net, x[j], y[j], 0.3) == (loss.item() > 0)
        expected = twin.weight.detach() - 0.3 * twin.weight.grad
        torch.testing.assert_close(net.weight.detach(), expected, rtol=0, atol=1e-12)


def test_derivative_at_zero_is_alpha():
    net = net_of(2, 1, 0.25, radius=0.0, v=1.0)
    perceptron_step(net, torch.tensor([1.0, 0.0]).double(), 1.0, lr=1.0)
    assert net.weight.tolist() == [[0.25, 0], [-0.25, 0]]


@settings(max_examples=15)
@given(
    st.integers(1, 40),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.1, 0.8]),
    st.integers(0, 1000),
    st.floats(0.05, 5.0),
)
def test_both_kernels_make_the_steps_of_the_reference(n, k, alpha, seed, lr):
    x, y = separable(n, 5, 0.1, seed)
    reference = net_of(5, k, alpha, seed)
    weights = [reference.weight.detach().clone() for _ in range(2)]
    signs = reference.second_layer.clone()
    made = sequence_of(reference, x, y, lr, epochs=3)
    for weight, gram in zip(weights, (None, x @ x.T), strict=True):
        found = []
        for _ in range(3):
            order = torch.arange(n)
            part, _ = perceptron_epoch(weight, signs, x, y, order, lr=lr, slope=alpha, gram=gram)
            found += part.tolist()
        assert found == made
        torch.testing.assert_close(weight, reference.weight.detach(), rtol=0, atol=1e-11)


def test_gram_matrix_is_only_made_where_it_pays():
    x = torch.zeros(80, 1 << 10)
    assert gram_matrix(x, rows=16).shape == (80, 80)
    assert gram_matrix(x, rows=15) is None
    assert gram_matrix(torch.zeros(81, 10), rows=1 << 12) is None
    assert gram_matrix(x, rows=1 << 20) is None


def test_nearly_linear_net_is_the_perceptron_with_margin():
    # α = 1: N(x) = ⟨p, x⟩ and an update is p += 2kηv² y x.
    x, y = separable(60, 7, 0.15, seed=3)
    net = net_of(7, 6, 1.0, seed=4, v=0.4)
    x = x / x.norm(dim=1).max()
    p = net.second_layer @ net.weight.detach()
    trace, passes = [], 0
    while True:
        before = len(trace)
        for j in range(60):
            if y[j] * (x[j] @ p) < 1:
                p += 12 * 0.3 * net.v**2 * y[j] * x[j]
                trace.append(j)
        passes += 1
        if len(trace) == before:
            break
    result = run_perceptron_sgd(net, x, y, lr=0.3)
    assert result.compression_set.tolist() == trace
    assert result.epochs == passes
    torch.testing.assert_close(net.second_layer @ net.weight.detach(), p, rtol=0, atol=1e-11)


def test_compression_set_rebuilds_the_net():
    x, y = separable(50, 10, 0.05, seed=5)
    net = net_of(10, 8, 0.2, seed=6)
    other = copy.deepcopy(net)
    g = torch.Generator().manual_seed(7)
    result = run_perceptron_sgd(net, 3 * x, y, order="shuffle", generator=g)
    for j in result.compression_set:
        assert perceptron_step(other, 3 * x[j] * result.scale, y[j], 1.0)
    torch.testing.assert_close(other.weight, net.weight, rtol=0, atol=1e-11)
    assert result.converged
    assert (y * net(3 * x * result.scale)).min() >= 1 - 1e-12
    assert result.history.sum() == result.nonzero_updates
    assert result.history[-1] == 0


@settings(max_examples=30)
@given(
    d=st.integers(2, 20),
    k=st.sampled_from([1, 3, 30]),
    alpha=st.floats(0.05, 1.0),
    lr=st.floats(0.01, 50.0),
    radius=st.floats(0.0, 2.0),
    v=st.one_of(st.none(), st.floats(0.05, 2.0)),
    seed=st.integers(0, 1000),
)
def test_updates_stay_below_bounds_that_nest(d, k, alpha, lr, radius, v, seed):
    x, y = separable(30, d, 0.2, seed)
    net = net_of(d, k, alpha, seed, v=v, radius=radius)
    promised = update_certificate(net, x, y, lr)
    result = run_perceptron_sgd(net, x, y, lr)
    assert result.converged
    assert result.nonzero_updates <= promised.instance * (1 + 1e-12)
    assert promised.instance <= promised.tight * (1 + 1e-9)
    assert promised.tight <= promised.published * (1 + 1e-12)


def test_every_update_obeys_both_inequalities_of_the_proof():
    x, y = separable(40, 8, 0.1, seed=8)
    found = hard_margin(x, y)
    net = net_of(8, 5, 0.3, seed=9)
    lr, k, v = 0.5, 5, net.v
    x = x * found.scale
    steps = 0
    for j in list(range(40)) * 50:
        before = net.alignment(found.w_star), net.weight.square().sum().item()
        if perceptron_step(net, x[j], y[j], lr):
            steps += 1
            after = net.alignment(found.w_star), net.weight.square().sum().item()
            assert after[0] - before[0] >= 2 * k * lr * v * 0.3 - 1e-9
            assert after[1] - before[1] <= 2 * lr + 2 * k * (lr * v) ** 2 + 1e-9
    assert steps > 10


@given(
    st.floats(1, 50), st.floats(0.01, 100), st.integers(1, 500), st.floats(0.05, 1),
    st.floats(0.01, 2), st.floats(0, 3),
)  # fmt: skip
def test_published_bound_is_the_papers_formula(norm, lr, k, alpha, v, radius):
    expected = (
        norm**2 / alpha**2
        + norm**2 / (k * lr * v**2 * alpha**2)
        + math.sqrt(radius * (8 * k**2 * lr**2 * v**2 + 8 * lr * k))
        * norm**1.5
        / (2 * k * (lr * v * alpha) ** 1.5)
        + 2 * radius * norm / (lr * v * alpha)
    )
    found = update_bound(norm, lr=lr, k=k, alpha=alpha, v=v, radius=radius)
    assert found == pytest.approx(expected, rel=1e-10)


def test_bounds_solve_the_equations_they_come_from():
    norm, lr, k, alpha, v, radius = 4.0, 0.7, 9, 0.2, 0.3, 0.5
    a, g = 2 * k * lr * v * alpha, 2 * lr + 2 * k * (lr * v) ** 2
    t = update_bound(norm, lr=lr, k=k, alpha=alpha, v=v, radius=radius, form="tight")
    b, c = norm * math.sqrt(2 * k * g), 4 * k * radius * norm
    assert a * t == pytest.approx(b * math.sqrt(t) + c, rel=1e-12)
    # F_0 = 10.0 puts the equation into its other branch: half the linear term is positive
    for alignment, size in ((-3.0, 1.5), (10.0, 4.0), (5000.0, 500.0)):
        t = update_bound(
            norm, lr=lr, k=k, alpha=alpha, v=v, form="instance", alignment=alignment,
            weight_norm=size,
        )  # fmt: skip
        assert t > 0
        assert alignment + a * t == pytest.approx(
            math.sqrt(2 * k) * norm * math.sqrt(size**2 + g * t), rel=1e-9
        )


def test_bound_does_not_depend_on_the_width():
    bounds = [update_bound(5.0, lr=1.0, k=k, alpha=0.5, radius=0.0) for k in (1, 10, 10**6)]
    assert bounds == pytest.approx([3 * 25 * 4] * 3, rel=1e-12)


@pytest.mark.parametrize("d", [1, 5, 30])
def test_orthonormal_samples_need_an_update_each(d):
    y = torch.ones(d).double()
    y[::2] = -1
    net = net_of(d, 4, 0.5)
    assert hard_margin(torch.eye(d), y).norm == pytest.approx(math.sqrt(d))
    assert run_perceptron_sgd(net, torch.eye(d), y).nonzero_updates >= d


def test_relu_net_gets_stuck_where_the_leaky_net_does_not():
    x, y = torch.eye(8), torch.ones(8)
    stuck = 0
    for seed in range(20):
        result = run_perceptron_sgd(net_of(8, 1, 0.0, seed), x, y, max_epochs=100)
        stuck += result.stuck
        assert result.stuck != result.converged
        assert run_perceptron_sgd(net_of(8, 1, 0.1, seed), x, y).converged
    # all eight samples alive has probability 2^-8
    assert stuck >= 15


def test_hard_margin_agrees_with_a_support_vector_machine():
    x, y = separable(80, 12, 0.1, seed=10)
    found = hard_margin(7 * x, y)
    assert found.scale == pytest.approx(1 / (7 * x.norm(dim=1).max()).item())
    machine = LinearSVC(C=1e6, loss="hinge", fit_intercept=False, tol=1e-10, max_iter=10**6)
    machine.fit((7 * x * found.scale).numpy(), y.numpy())
    theirs = torch.from_numpy(machine.coef_[0])
    theirs /= (y * (7 * x * found.scale @ theirs)).min()
    assert found.norm <= theirs.norm().item() * (1 + 1e-9)
    assert found.norm == pytest.approx(theirs.norm().item(), rel=1e-3)
    assert found.lower == pytest.approx(found.norm, rel=1e-9)
    assert found.slack == pytest.approx(1 / found.norm, rel=1e-9)
    margins = y * (7 * x * found.scale @ found.w_star)
    assert margins.min() >= 1 - 1e-12
    torch.testing.assert_close(margins[found.support], torch.ones_like(margins[found.support]))


def test_hard_margin_of_many_samples_is_that_of_all():
    # More samples than the working set starts with, sorted so that the support comes last.
    x, y = separable(6000, 5, 0.1, seed=11)
    x = x[(x * y.unsqueeze(1)).sum(1).argsort()]
    y = (x @ hard_margin(*separable(6000, 5, 0.1, seed=11)).w_star).sign()
    found = hard_margin(x, y)
    assert (y * (x * found.scale @ found.w_star)).min() >= 1 - 1e-12
    assert found.norm == pytest.approx(found.lower, rel=1e-8)


def test_contradicting_samples_are_named():
    x, y = separable(30, 5, 0.1, seed=12)
    x = torch.cat([x, 2 * x[4:5]])
    y = torch.cat([y, -y[4:5]])
    found = hard_margin(x, y)
    assert not found.separable
    assert found.w_star is None
    assert found.norm == math.inf
    assert found.slack < 1e-7
    with pytest.raises(ValueError, match="not linearly separable"):
        run_perceptron_sgd(net_of(5, 2, 0.5), x, y)
    with pytest.raises(ValueError, match="contradict each other"):
        update_certificate(net_of(5, 2, 0.5), x, y)
    limited = run_perceptron_sgd(net_of(5, 2, 1.0), x, y, max_epochs=5)
    assert (limited.converged, limited.epochs) == (False, 5)


def test_labels_of_opposite_samples_may_be_fitted_by_a_net_only():
    # x and −x with one label are inseparable, and still a leaky net fits them.
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.ones(2)
    assert not hard_margin(x, y).separable
    assert run_perceptron_sgd(net_of(2, 20, 0.1), x, y, max_epochs=500).converged


def test_scaling_leaves_everything_but_the_factor():
    x, y = separable(30, 6, 0.2, seed=13)
    one, other = net_of(6, 3, 0.4), net_of(6, 3, 0.4)
    a, b = run_perceptron_sgd(one, x, y), run_perceptron_sgd(other, 4.0 * x, y)
    assert torch.equal(a.compression_set, b.compression_set)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=1e-12)
    assert b.scale == pytest.approx(a.scale / 4)


def test_float32_images_and_no_samples():
    x, y = separable(12, 6, 0.3, seed=14)
    net = TwoLayerLeakyNet(6, 3, 0.4)
    result = run_perceptron_sgd(net, x.float().view(12, 1, 2, 3), y.long())
    assert result.converged
    assert net.weight.dtype == torch.float32
    assert bool((net(x.float()).sign() == y).all())
    empty = run_perceptron_sgd(net, torch.empty(0, 6), torch.empty(0))
    assert (empty.nonzero_updates, empty.converged) == (0, True)


def test_compression_bound_is_the_formula():
    rate = 46 * math.log(1e5 / 0.05) / 1e5
    assert compression_bound(10**5, 46) == pytest.approx(8 * rate, rel=1e-14)
    assert compression_bound(10**5, 46, 0.05, 0.1) == pytest.approx(
        0.1 + math.sqrt(0.4 * rate) + 8 * rate, rel=1e-14
    )
    # where the theorem's condition n ≥ 2c fails its value is vacuous by itself
    assert all(compression_bound(n, n // 2 + 1, 0.99) > 1 for n in (2, 10, 1000))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: TwoLayerLeakyNet(3, 0), "k must be at least 1"),
        (lambda: TwoLayerLeakyNet(3, 1, 1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: TwoLayerLeakyNet(3, 1, v=0.0), "v must be a positive number"),
        (lambda: TwoLayerLeakyNet(3, 1, radius=-1.0), "radius must be"),
        (lambda: TwoLayerLeakyNet(0, 1), "in_features must be"),
        (lambda: hard_margin(torch.empty(0, 2), torch.empty(0)), "at least one sample"),
        (lambda: update_bound(math.inf, lr=1.0, k=1, alpha=0.5, radius=0.0), "not separable"),
        (lambda: update_bound(2.0, lr=1.0, k=1, alpha=0.0, radius=0.0), "alpha must be positive"),
        (lambda: update_bound(2.0, lr=1.0, k=1, alpha=0.5), "needs radius"),
        (lambda: update_bound(2.0, lr=1.0, k=1, alpha=0.5, form="instance"), "needs alignment"),
        (lambda: compression_bound(10, 0), "at least 1"),
        (lambda: compression_bound(10, 1, 1.0), "delta"),
        (lambda: compression_bound(10, 1, val_loss=2.0), "val_loss"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda net: run_perceptron_sgd(net, torch.eye(2), torch.ones(2)),
        lambda net: run_perceptron_sgd(net, torch.eye(2), torch.ones(2), max_epochs=3),
        lambda net: update_certificate(net, torch.eye(2), torch.ones(2)),
        lambda net: perceptron_step(net, torch.eye(2)[0], 1.0, 1.0),
    ],
)
def test_other_nets_are_refused_by_name(call):
    with pytest.raises(TypeError, match="net must be a TwoLayerLeakyNet, got Linear"):
        call(torch.nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"y": torch.tensor([0, 1])}, r"pass 2 \* y - 1"),
        ({"y": torch.ones(3)}, "one label a sample"),
        ({"x": torch.ones(2, 3)}, "must have 2 features"),
        ({"x": torch.zeros(2, 2)}, "not all zero"),
        ({"x": torch.full((2, 2), math.nan)}, "must be finite"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"net": net_of(2, 1, 0.0)}, "alpha is 0"),
        ({"net": TwoLayerLeakyNet(2, 1).half()}, "float16"),
    ],
)
def test_bad_training_input_is_named(change, match):
    good = {"net": net_of(2, 1, 0.5), "x": torch.eye(2), "y": torch.ones(2)}
    with pytest.raises(ValueError, match=match):
        run_perceptron_sgd(**{**good, **change})
