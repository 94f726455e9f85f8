"""Regret, its bound and the step-size monitor, against hand calculations."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.analysis import RegretTracker, StepSizeMonitor, amsgrad_regret_bound
from assay.analysis.regret import effective_second_moment
from assay.optim import AdamNC, AMSGrad, Box


def _play(optimizer, param, slopes, tracker=None):
    for slope in slopes:
        if tracker is not None:
            tracker.update((slope * param).detach(), -slope)
        param.grad = slope.expand_as(param).clone()
        optimizer.step()


def _point(size=1):
    return nn.Parameter(torch.zeros(size, dtype=torch.float64))


def test_bound_is_the_formula():
    steps, lr, beta1, beta2, diameter = 100, 0.3, 0.5, 0.64, 2.0
    root_sum, momentum_sum, gradient_sum = 3.0, 7.0, 11.0
    gamma = 0.5 / 0.8
    expected = (
        4 * 10 / (0.3 * 0.5) * 3
        + 4 / 0.25 * 7
        + 0.3 * math.sqrt(1 + math.log(100)) / (0.25 * (1 - gamma) * 0.6) * 11
    )
    found = amsgrad_regret_bound(
        steps=steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        diameter=diameter,
        root_sum=root_sum,
        momentum_sum=momentum_sum,
        gradient_sum=gradient_sum,
    )
    assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("beta1_decay", [0.9, "1/t"])
def test_tracker_collects_what_the_bound_needs(beta1_decay):
    slopes = torch.tensor([3.0, -1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    param = _point(2)
    optimizer = AMSGrad(
        [param], lr=0.2, betas=(0.5, 0.8), beta1_decay=beta1_decay, projection=Box(-1, 1)
    )
    tracker = RegretTracker(optimizer)
    regret, momentum_sum, v, highest, x = 0.0, 0.0, 0.0, 0.0, 0.0
    for t, slope in enumerate(slopes.tolist(), start=1):
        regret += slope * x - slope * -1.0
        _play(optimizer, param, slopes[t - 1 : t], tracker)
        x = param[0].item()
        v = 0.8 * v + 0.2 * slope**2
        highest = max(highest, v)
        beta1 = 0.5 / t if beta1_decay == "1/t" else 0.5 * 0.9 ** (t - 1)
        momentum_sum += 2 * beta1 * math.sqrt(highest) * math.sqrt(t) / 0.2
    assert tracker.steps == 5
    torch.testing.assert_close(tracker.regret, torch.full((2,), regret, dtype=torch.float64))
    torch.testing.assert_close(tracker.average_regret, tracker.regret / 5)
    expected = amsgrad_regret_bound(
        steps=5,
        lr=0.2,
        beta1=0.5,
        beta2=0.8,
        diameter=2.0,
        root_sum=2 * math.sqrt(highest),
        momentum_sum=momentum_sum,
        gradient_sum=2 * slopes.norm().item(),
    )
    assert tracker.bound(diameter=2.0) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lr=st.floats(0.05, 2.0))
def test_regret_stays_below_the_bound(seed, lr):
    # Linear losses on [−1, 1]; the comparator −1 or +1 that is best in hindsight.
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(60, generator=generator, dtype=torch.float64) + 0.3
    best = -slopes.sum().sign()
    param = _point()
    optimizer = AMSGrad([param], lr=lr, betas=(0.5, 0.9), beta1_decay=0.5, projection=Box(-1, 1))
    tracker = RegretTracker(optimizer)
    for slope in slopes:
        tracker.update((slope * param).item(), (slope * best).item())
        _play(optimizer, param, slope.reshape(1))
    assert tracker.regret <= tracker.bound(diameter=2.0)


def test_regret_of_nothing_is_zero():
    tracker = RegretTracker()
    assert (tracker.regret, tracker.average_regret) == (0.0, 0.0)
    with pytest.raises(RuntimeError, match="at least one step"):
        tracker.bound(diameter=1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"diameter": -1.0}, "diameter must be at least 0"),
        ({"beta1": 0.95}, "γ = β1/√β2 ≥ 1"),
    ],
)
def test_bound_rejects_bad_input(change, match):
    arguments = {"steps": 1, "lr": 1.0, "beta1": 0.0, "beta2": 0.9, "diameter": 1.0}
    sums = {"root_sum": 1.0, "momentum_sum": 0.0, "gradient_sum": 1.0}
    with pytest.raises(ValueError, match=match):
        amsgrad_regret_bound(**{**arguments, **sums, **change})


def test_tracker_rejects_what_has_no_bound():
    with pytest.raises(TypeError, match="must be an AMSGrad"):
        RegretTracker(torch.optim.Adam([_point()]))
    with pytest.raises(ValueError, match="lr_decay=None"):
        RegretTracker(AMSGrad([_point()], lr_decay=None))
    with pytest.raises(ValueError, match="2 groups"):
        RegretTracker(AMSGrad([{"params": [_point()]}, {"params": [_point()]}]))


def _spikes(steps=60, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    gradients[torch.rand(steps, size, generator=generator) < 0.1] *= 30
    return gradients


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AMSGrad(p),
        lambda p: AMSGrad(p, lr_decay=None),
        lambda p: AMSGrad(p, bias_correction="before_max"),
        lambda p: AMSGrad(p, fused=True, weight_decay=0.1),
        lambda p: AdamNC(p),
        lambda p: torch.optim.Adagrad(p),
    ],
)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_steps_of_the_repaired_methods_never_grow(make, seed):
    param = _point(5)
    optimizer = make([param])
    monitor = StepSizeMonitor(optimizer)
    for gradient in _spikes(seed=seed):
        param.grad = gradient.clone()
        optimizer.step()
    report = monitor.report()
    assert report.steps == 59
    assert (report.share, report.ever_share, report.largest_violation) == (0, 0, 0)
    assert report.largest_growth == 1


@pytest.mark.parametrize("kind", [AMSGrad, lambda p: AMSGrad(p, bias_correction="before_max")])
def test_gamma_of_amsgrad_is_non_negative_to_the_last_bit(kind):
    # Rounding is monotone, so not even a tolerance of zero finds a violation.
    param = _point(5)
    optimizer = kind([param])
    monitor = StepSizeMonitor(optimizer, tolerance=0.0)
    for gradient in _spikes():
        param.grad = gradient.clone()
        optimizer.step()
    assert monitor.report().share == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.9)),
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.9)),
        lambda p: torch.optim.NAdam(p, betas=(0.9, 0.9)),
        lambda p: torch.optim.Adam(p, amsgrad=True),  # corrected after the maximum
        lambda p: torch.optim.RMSprop(p, alpha=0.9),
        lambda p: torch.optim.Adamax(p, betas=(0.9, 0.9)),
        lambda p: AdamNC(p, schedule=lambda t: 0.5),
    ],
)
def test_steps_of_the_others_do(make):
    param = _point(5)
    optimizer = make([param])
    monitor = StepSizeMonitor(optimizer)
    for gradient in _spikes():
        param.grad = gradient.clone()
        optimizer.step()
    report = monitor.report()
    assert 0 < report.share < 1
    assert report.largest_violation > 0
    assert report.largest_growth > 1


def test_report_is_the_hand_calculation():
    # β2 = 0.5, no correction, α constant: v = (2, ½) → (1 + ½·g², …)
    param = _point(2)
    optimizer = AdamNC([param], lr=0.1, beta1=0.0, schedule=lambda t: 0.5, lr_decay=None)
    monitor = StepSizeMonitor(optimizer)
    for gradient in ([2.0, 1.0], [1.0, 3.0], [1.0, 3.0]):
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    # coordinate 0: v = 2, 1.5, 1.25 falls twice; coordinate 1: v = 0.5, 4.75, 6.875 rises
    roots = [math.sqrt(v) / 0.1 for v in (2.0, 1.5, 1.25)]
    report = monitor.report()
    assert (report.steps, report.share, report.last_share, report.ever_share) == (2, 0.5, 0.5, 0.5)
    assert report.largest_violation == pytest.approx(roots[0] - roots[1], rel=1e-12)
    assert report.largest_growth == pytest.approx(roots[0] / roots[1], rel=1e-12)
    monitor.close()
    param.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert monitor.report() == report


def test_a_rising_learning_rate_counts():
    param = _point()
    optimizer = AMSGrad([param], lr=0.1, lr_decay=None)
    monitor = StepSizeMonitor(optimizer)
    for lr in (0.0, 0.0, 0.1, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    report = monitor.report()
    assert report.share == pytest.approx(2 / 3)
    assert report.largest_violation == math.inf  # from standing still to moving


def test_monitor_takes_an_unknown_optimizer():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["power"] = p.grad.square()
            return super().step(closure)

    param = _point()
    optimizer = Mine([param], lr=0.1)
    monitor = StepSizeMonitor(optimizer, second_moment=lambda state, group: state["power"])
    for slope in (2.0, 1.0):
        param.grad = torch.full((1,), slope, dtype=torch.float64)
        optimizer.step()
    assert monitor.report().largest_growth == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no second moment under a known name"):
        effective_second_moment({"power": param}, {})
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        StepSizeMonitor([])
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        StepSizeMonitor(optimizer, tolerance=-1.0)


@pytest.mark.parametrize(("momentum", "kept"), [(0.0, "nothing"), (0.9, "momentum_buffer")])
def test_monitor_of_an_optimizer_without_a_second_moment_says_so(momentum, kept):
    param = _point()
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=momentum)
    StepSizeMonitor(optimizer)
    param.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"no second moment under a known name.* has .*{kept}"):
        optimizer.step()


def test_monitored_optimizer_is_still_copied():
    param = _point()
    optimizer = AMSGrad([param])
    StepSizeMonitor(optimizer)
    RegretTracker(optimizer)
    other = copy.deepcopy(optimizer)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
