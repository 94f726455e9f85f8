import copy
import io
import pickle

import jaxtyping
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assay.functional import call_with_vector, parameters_to_vector, update_bn
from assay.landscape import (
    BezierCurve,
    CurveEvaluation,
    Evaluation,
    PolyChain,
    evaluate_curve,
    fit_curve,
    linear_barrier,
)

KINDS = (BezierCurve, PolyChain)


def two(make):
    torch.manual_seed(0)
    return make(), make()


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Foreign(nn.Module):
    """What curves have to survive: a tied weight, a sub-module of two names, BatchNorm, dropout,
    a bare parameter, an integer buffer, and a forward pass that looks at its own parameters."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("order", torch.randperm(6))

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)[:, self.order]
        x = self.norm(torch.relu(self.encode(x)))
        x = self.drop(self.again(torch.tanh(self.block(x))))
        return self.head(self.decode(x + self.shift))


def foreign_pair():
    torch.manual_seed(0)
    first = Foreign()
    second = Foreign()
    second.order.copy_(first.order)
    for model in (first, second):
        with torch.no_grad():
            model.shift.normal_()
    return first, second


def classification(n=96, features=6, classes=3):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, features, generator=g)
    y = (x @ torch.randn(features, classes, generator=g)).argmax(1)
    return list(zip(x.split(24), y.split(24), strict=True))


# ------------------------------------------------------------------ the curve itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bends", [3, 4, 6])
def test_ends_are_the_networks_bit_for_bit(kind, bends):
    first, second = two(mlp)
    with torch.no_grad():
        first[0].weight[0, 0] = -0.0
        second[0].weight[0, 0] = 1e300
    curve = kind([first, second], num_bends=bends)
    with torch.no_grad():
        for bend in curve.inner:
            bend.normal_()
    for t, end in ((0, first), (1.0, second)):
        for name, tensor in curve.weights(t).items():
            bits = end.get_parameter(name).view(torch.int64)
            assert torch.equal(tensor.view(torch.int64), bits), name


@given(n=st.integers(3, 12), t=st.floats(0, 1))
def test_bezier_coefficients_are_bernstein_polynomials(n, t):
    curve = BezierCurve([nn.Linear(1, 1), nn.Linear(1, 1)], num_bends=n)
    c = curve.coefficients(torch.tensor(t, dtype=torch.float64))
    expected = [scipy.special.binom(n - 1, j) * t**j * (1 - t) ** (n - 1 - j) for j in range(n)]
    assert c.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(kind=st.sampled_from(KINDS), n=st.integers(3, 12), t=st.floats(0, 1))
def test_coefficients_are_a_partition_of_unity(kind, n, t):
    curve = kind([nn.Linear(1, 1), nn.Linear(1, 1)], num_bends=n)
    c = curve.coefficients(torch.tensor([t], dtype=torch.float64))
    assert c.shape == (1, n)
    assert (c >= 0).all()
    # A chain's coefficients are differences at the scale of n: rounding of n ulp.
    assert c.sum().item() == pytest.approx(1, abs=4 * n * 2**-53)


@pytest.mark.parametrize("bends", [3, 4, 6, 8])
def test_polychain_passes_through_its_points(bends):
    chain = PolyChain(two(mlp), num_bends=bends)
    with torch.no_grad():
        for bend in chain.inner:
            bend.normal_()
    for j in range(1, bends - 1):
        point = chain.point(j / (bends - 1))
        assert torch.allclose(point, chain.inner[j - 1], rtol=0, atol=bends * 2**-50)


@pytest.mark.parametrize("kind", KINDS)
def test_new_curves_are_straight(kind):
    first, second = two(mlp)
    curve = kind([first, second], num_bends=5)
    w0, w1 = parameters_to_vector(first), parameters_to_vector(second)
    for t in (0.1, 0.25, 0.7):
        assert torch.allclose(curve.point(t), torch.lerp(w0, w1, t), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inner_points_are_parameters(kind):
    curve = kind(two(mlp), num_bends=4)
    assert {n: p.shape for n, p in curve.named_parameters()} == {"inner.0": (67,), "inner.1": (67,)}
    assert "ends" in curve.state_dict()


def test_gradients_are_those_of_the_network_times_the_coefficient():
    curve = BezierCurve(two(mlp), num_bends=4).train()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    F.cross_entropy(curve(x, t=0.3), y).backward()
    point = curve.point(0.3).detach().requires_grad_()
    F.cross_entropy(call_with_vector(mlp(), point, x), y).backward()
    c = curve.coefficients(torch.tensor(0.3, dtype=torch.float64))
    for bend, coefficient in zip(curve.inner, c[1:-1], strict=True):
        assert torch.allclose(bend.grad, coefficient * point.grad, rtol=1e-12)


def test_the_tangent_is_the_derivative_in_t():
    curve = BezierCurve(two(mlp))
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    tangent = torch.autograd.functional.jacobian(curve.point, t)
    step = 1e-6
    difference = (curve.point(0.4 + step) - curve.point(0.4 - step)) / (2 * step)
    assert torch.allclose(tangent, difference, atol=1e-8)


def test_l2_is_the_squared_norm_of_the_point():
    curve = BezierCurve(two(mlp)).train()
    for t in (0, 0.3, 1):
        assert curve.l2(t).item() == pytest.approx(curve.point(t).norm().item() ** 2, rel=1e-14)
    curve(torch.randn(2, 4, dtype=torch.float64), t=0.8)
    assert torch.equal(curve.l2(), curve.l2(0.8))


def test_derivatives_of_l2():
    # ‖φ‖² is quadratic in θ: its gradient is 2 c_1 φ, its Hessian 2 c_1² I.
    curve = BezierCurve(two(mlp))
    c = curve.coefficients(torch.tensor(0.3, dtype=torch.float64))[1]
    (gradient,) = torch.autograd.grad(curve.l2(0.3), curve.inner[0], create_graph=True)
    assert torch.allclose(gradient, 2 * c * curve.point(0.3), rtol=1e-12)
    v = torch.randn(67, dtype=torch.float64)
    (product,) = torch.autograd.grad(gradient @ v, curve.inner[0])
    assert torch.allclose(product, 2 * c**2 * v, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_tensors_are_the_same_position(kind):
    curve = kind(two(mlp), num_bends=5)
    for t in (0.0, 0.1, 0.5, 0.8, 1.0):
        tensor = torch.tensor(t, dtype=torch.float64)
        assert torch.allclose(curve.point(t), curve.point(tensor), rtol=0, atol=1e-15)


def test_training_draws_t_uniformly_from_torch_s_generator():
    curve = BezierCurve([nn.Linear(1, 1, bias=False) for _ in range(2)]).train()
    with torch.no_grad():  # φ(t) = t
        curve.ends.copy_(torch.tensor([[0.0], [1.0]]))
        curve.inner[0].fill_(0.5)
        x = torch.ones(1, 1)
        torch.manual_seed(3)
        drawn = torch.cat([curve(x) for _ in range(2000)])
        torch.manual_seed(3)
        expected = torch.rand(2000, dtype=torch.float64)
    assert (drawn.flatten().double() - expected).abs().max() < 1e-6
    # Kolmogorov-Smirnov distance to U(0, 1): below 1.95/√n in all but 0.1 % of samples.
    empirical = torch.arange(1, 2001) / 2000
    assert (drawn.flatten().sort().values - empirical).abs().max() < 1.95 / 2000**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_export_equals_the_curve(kind):
    torch.manual_seed(0)
    curve = kind(foreign_pair(), num_bends=4).eval()
    with torch.no_grad():
        for bend in curve.inner:
            bend.add_(torch.randn_like(bend))
    x = torch.randn(5, 6)
    for t in (0, 0.35, 1):
        model = curve.export(t)
        assert type(model) is Foreign
        assert torch.equal(model.eval()(x), curve(x, t=t))
        assert model.decode.weight is model.encode.weight
        assert model.again is model.block
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    model.head.weight.data.zero_()
    assert curve.weights(1)["head.weight"].abs().sum() > 0


def test_export_keeps_frozen_parameters_frozen():
    first, second = two(mlp)
    first[0].weight.requires_grad_(False)
    assert not BezierCurve([first, second]).export(0.5)[0].weight.requires_grad


def test_the_networks_are_not_touched():
    first, second = foreign_pair()
    before = [copy.deepcopy(m.state_dict()) for m in (first, second)]
    curve = BezierCurve([first, second])
    fit_curve(curve, classification(), epochs=1, lr=0.1)
    for model, state in zip((first, second), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


MODELS = {
    "lstm": (lambda: nn.LSTM(4, 5), (3, 2, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8), (3, 2, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), (3, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2)), (2, 1, 5, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_module(name):
    def output(model, **position):
        result = model(x, **position)
        return result[0] if isinstance(result, tuple) else result

    make, shape = MODELS[name]
    first, second = two(make)
    x = torch.randn(shape)
    curve = BezierCurve([first, second])
    for _ in range(2):  # the second pass would meet leftovers of the first
        output(curve).square().sum().backward()
    assert curve.inner[0].grad.abs().max() > 0
    copied = copy.deepcopy(curve).eval()
    for t, end in ((0, first), (1, second)):
        expected = output(end.eval())
        assert torch.allclose(output(copied, t=t), expected, atol=1e-6)
        assert torch.allclose(output(copied.export(t).eval()), expected, atol=1e-6)


# ------------------------------------------------------------------ conventions of torch


def test_state_dict_deepcopy_and_pickle():
    curve = BezierCurve(foreign_pair())
    fit_curve(curve, classification(), epochs=1, lr=0.1)
    x = torch.randn(5, 6)
    curve.train()(x)  # leaves the graph of φ(t) behind, which must not be copied
    fresh = BezierCurve(foreign_pair())
    fresh.load_state_dict(curve.state_dict())
    copies = fresh, copy.deepcopy(curve), pickle.loads(pickle.dumps(curve))
    expected = curve.eval()(x, t=0.4)
    for other in copies:
        assert torch.equal(other.eval()(x, t=0.4), expected)
    stream = io.BytesIO()
    torch.save(curve.state_dict(), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True).keys() == curve.state_dict().keys()


def test_dtype_moves_with_the_curve():
    curve = BezierCurve(foreign_pair()).to(torch.float64).eval()
    x = torch.randn(5, 6)
    assert curve(x, t=0.4).dtype == torch.float64
    assert curve.export(0.4).norm.running_mean.dtype == torch.float64


def test_autocast_leaves_the_weights_in_their_precision():
    curve = BezierCurve(foreign_pair())
    exact = curve.point(0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(curve.point(0.3), exact)
        assert curve.eval()(torch.randn(5, 6), t=0.3).dtype == torch.bfloat16


@pytest.fixture
def unchecked():
    """Without shape checks at run time, which the compiler cannot trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_compiled_curve_equals_the_eager_one():
    curve = BezierCurve(two(mlp)).train()
    x = torch.randn(3, 4, dtype=torch.float64)
    compiled = torch.compile(curve, backend="aot_eager", fullgraph=True)
    for position in (0.3, 0.6):
        t = torch.tensor(position, dtype=torch.float64)
        assert torch.allclose(compiled(x, t=t), curve(x, t=t), rtol=1e-12)


@pytest.mark.processes
def test_distributed_data_parallel_takes_a_curve():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        curve = BezierCurve(foreign_pair()).train()
        twin = copy.deepcopy(curve)
        parallel = nn.parallel.DistributedDataParallel(curve)
        x = torch.randn(5, 6)
        for model, bare in ((parallel, curve), (twin, twin)):
            torch.manual_seed(1)
            (model(x).sum() + bare.l2()).backward()
        assert torch.allclose(curve.inner[0].grad, twin.inner[0].grad)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ what is refused


def test_mismatched_networks_are_named():
    first, second = mlp(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(4, 8\) in endpoint 1"):
        BezierCurve([first, second])
    with pytest.raises(ValueError, match=r"endpoint 1 has no tensor '2.weight'"):
        BezierCurve([first, first[:2]])
    with pytest.raises(ValueError, match=r"endpoint 1 has a tensor '2.weight'"):
        BezierCurve([first[:2], first])
    with pytest.raises(ValueError, match=r"'0.weight' has dtype torch.float32 in endpoint 1"):
        BezierCurve([first, mlp().float()])


def test_a_tie_that_an_endpoint_does_not_have_is_refused():
    first, second = foreign_pair()
    second.decode.weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(ValueError, match=r"'decode.weight' and 'encode.weight' are one tied"):
        BezierCurve([first, second.state_dict()])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_are_refused(kind):
    models = two(mlp)
    with pytest.raises(ValueError, match="num_bends must be at least 3, got 2"):
        kind(models, num_bends=2)
    with pytest.raises(ValueError, match="two endpoints, got 3"):
        kind([*models, models[0]])
    with pytest.raises(TypeError, match="model="):
        kind([model.state_dict() for model in models])
    curve = kind(models)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got 1.5"):
        curve.weights(1.5)
    with pytest.raises(ValueError, match="t must be a scalar"):
        curve.point(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="needs a position"):
        curve.eval()(torch.zeros(1, 4).double())
    with pytest.raises(ValueError, match="t is missing"):
        curve.l2()


def test_state_dicts_need_the_architecture_only():
    first, second = two(mlp)
    curve = BezierCurve([first.state_dict(), second.state_dict()], model=mlp())
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(curve(x, t=0), first(x))
    assert torch.equal(curve(x, t=1), second(x))


# ------------------------------------------------------------------ curve finding


class Ring(nn.Module):
    """Two parameters w and the loss (‖w‖² − 1)²: all minima lie on the unit circle."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        return (self.w.square().sum() - 1).expand(len(x))


def ring_loss(output, target):
    return (output - target).square().mean()


def test_finds_the_valley_of_a_known_loss():
    # By symmetry θ = (a, a); a minimises the mean loss over t, here by Gauss-Legendre quadrature
    # (a polynomial of degree 8 in t: exact with 5 nodes or more).
    nodes, weights = scipy.special.roots_legendre(8)
    t, weights = (nodes + 1) / 2, weights / 2

    def mean_loss(a):
        u = (1 - t) ** 2 + 2 * t * (1 - t) * a
        v = t**2 + 2 * t * (1 - t) * a
        return weights @ ((u**2 + v**2 - 1) ** 2)

    best = scipy.optimize.minimize_scalar(mean_loss, bounds=(0.5, 2), method="bounded")
    curve = BezierCurve([Ring([1.0, 0.0]), Ring([0.0, 1.0])])
    torch.manual_seed(0)
    batches = [(torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64))] * 50
    fit_curve(curve, batches, epochs=20, lr=0.02, loss_fn=ring_loss)
    found = curve.inner[0].tolist()
    # The mean loss is flat to second order around the optimum: 5 % in θ is its noise at 1 % lr.
    assert found == pytest.approx([best.x, best.x], rel=0.05)
    along = evaluate_curve(curve, {"train": batches[:1]}, num_points=31, loss_fn=ring_loss)
    assert along.sets["train"].loss.max() < 0.02
    straight = linear_barrier(
        Ring([1.0, 0.0]), Ring([0.0, 1.0]), batches[:1], num_points=31, loss_fn=ring_loss
    )
    assert straight == pytest.approx(0.25)  # halfway ‖w‖² = ½


def test_the_penalty_acts_on_the_point_not_on_the_control_points():
    # With loss 0 the mean of ‖φ(t)‖² over t is minimal where ∫ c_1 φ dt = 0: with the moments of
    # Bernstein polynomials (1/10, 2/15, 1/10), θ = −(3/4)(w_0 + w_2); weight decay gives θ = 0.
    # The noise of θ from drawing t is about 0.05 a coordinate at this learning rate.
    ends = [Ring([1.0, 0.0]), Ring([0.0, 1.0])]
    curve = BezierCurve(ends)
    batches = [(torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64))] * 50
    torch.manual_seed(0)
    fit_curve(
        curve, batches, epochs=20, lr=0.005, weight_decay=2.0, loss_fn=lambda out, _: 0 * out.sum()
    )
    assert curve.inner[0].tolist() == pytest.approx([-0.75, -0.75], abs=0.15)


def test_curve_finding_on_a_foreign_model():
    torch.manual_seed(0)
    batches = classification()
    ends = []
    for model in foreign_pair():
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(30):
            for x, y in batches:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                sgd.step()
        ends.append(model.eval())
    curve = BezierCurve(ends)
    order = curve.network.order.clone()
    before = evaluate_curve(curve, {"train": batches}, num_points=9)
    history = fit_curve(curve, batches, epochs=60, lr=0.1, weight_decay=1e-4)
    after = evaluate_curve(curve, {"train": batches}, num_points=9)
    assert len(history) == 60
    assert before.barrier("train") > 0.1
    assert after.barrier("train") < 0.5 * before.barrier("train")
    assert torch.equal(curve.network.order, order)


# ------------------------------------------------------------------ evaluation along the curve


def test_evaluation_recomputes_running_statistics_at_each_point():
    curve = BezierCurve(foreign_pair())
    batches = classification()
    fit_curve(curve, batches, epochs=1, lr=0.1)
    state = copy.deepcopy(curve.state_dict())
    along = evaluate_curve(curve, {"train": batches, "test": batches[:2]}, num_points=3)
    stale = evaluate_curve(curve, {"train": batches}, num_points=3, update_bn=False)
    assert all(torch.equal(value, state[name]) for name, value in curve.state_dict().items())
    for i, t in enumerate((0, 0.5, 1)):
        model = curve.export(t).eval()
        for name, sets, loss_at in (("train", batches, stale), ("train", batches, along)):
            if loss_at is along:
                update_bn(model, batches)
            x, y = (torch.cat(parts) for parts in zip(*sets, strict=True))
            out = model(x)
            evaluation = loss_at.sets[name]
            assert evaluation.loss[i].item() == pytest.approx(F.cross_entropy(out, y).item())
            assert evaluation.accuracy[i] == (out.argmax(1) == y).double().mean()


def test_lengths_and_norms_along_the_curve():
    first, second = two(mlp)
    curve = PolyChain([first, second])
    batches = [(torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,)))]
    along = evaluate_curve(curve, {"train": batches}, num_points=5)
    gap = (parameters_to_vector(first) - parameters_to_vector(second)).norm().item()
    assert along.length == pytest.approx(gap)
    assert along.distances.tolist() == pytest.approx([gap / 4] * 4)
    assert along.squared_norm[0].item() == pytest.approx(parameters_to_vector(first).norm() ** 2)
    assert torch.equal(along.t, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))


def test_the_integral_weighs_by_length():
    values = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    steps = torch.tensor([1.0, 3.0], dtype=torch.float64)
    sets = {"train": Evaluation(values, None)}
    assert CurveEvaluation(t, ones, steps, sets).summary(values)["integral"] == (1 + 3 * 1.5) / 4
    still = CurveEvaluation(t, ones, 0 * steps, sets)
    assert still.summary(values)["integral"] == 1
    assert still.barrier("train") == 1.5


def test_linear_barrier_of_a_network_with_itself_is_zero():
    model = mlp()
    batches = [(torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,)))]
    assert linear_barrier(model, model, batches) == pytest.approx(0, abs=1e-12)


def test_evaluation_refuses_bad_arguments():
    curve = BezierCurve(foreign_pair())
    with pytest.raises(ValueError, match="num_points must be at least 2"):
        evaluate_curve(curve, {"train": classification()}, num_points=1)
    with pytest.raises(ValueError, match="bn_batches="):
        evaluate_curve(curve, {"test": classification()}, num_points=3)
