"""The counter-examples: slopes by definition, and their effect on Adam in plain arithmetic."""

import math

import pytest
import torch

from assay.data.counterexamples import (
    PeriodicSlopes,
    RandomSlopes,
    online_experiment,
    stochastic_experiment,
    theorem_1,
    theorem_2,
    theorem_3,
)


@pytest.mark.parametrize("problem", [theorem_1(4.0), theorem_2(7), online_experiment()])
@pytest.mark.parametrize("start", [1, 2, 100])
def test_periodic_slopes_follow_the_definition(problem, start):
    expected = [
        problem.large if t % problem.period == 1 else problem.small
        for t in range(start, start + 250)
    ]
    assert problem.slopes(250, start=start).tolist() == expected


@pytest.mark.parametrize(
    ("problem", "mean"),
    [(theorem_1(4.0), 2 / 3), (theorem_2(10), 0.1), (online_experiment(), 10 / 101)],
)
def test_mean_slope_is_that_of_a_period(problem, mean):
    assert problem.mean_slope == pytest.approx(mean)
    assert problem.slopes(problem.period).mean().item() == pytest.approx(mean)


@pytest.mark.parametrize("problem", [theorem_3(9.0, 0.5), stochastic_experiment()])
def test_random_slopes_have_the_stated_law(problem):
    slopes = problem.slopes(2000, paths=50, generator=torch.Generator().manual_seed(0))
    assert slopes.dtype == torch.float64
    assert set(slopes.unique().tolist()) == {problem.small, problem.large}
    p, n = problem.probability, slopes.numel()
    share = (slopes == problem.large).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
    expected = p * problem.large + (1 - p) * problem.small
    assert problem.mean_slope == pytest.approx(expected)


def test_consecutive_draws_continue_the_paths():
    problem = stochastic_experiment()
    whole = problem.slopes(40, paths=3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [problem.slopes(10, paths=3, generator=generator) for _ in range(4)]
    assert torch.equal(torch.cat(parts), whole)


def test_theorem_3_has_mean_slope_delta():
    assert theorem_3(50.0, 0.02).mean_slope == pytest.approx(0.02)


@pytest.mark.parametrize("C", [3.0, 4.0, 10.0])
def test_adam_moves_up_in_every_period_of_theorem_1(C):
    # β1 = 0, β2 = 1/(1+C²): from the right end, each period ends at the right end again.
    beta2 = 1 / (1 + C**2)
    lr = 0.5 * math.sqrt(1 - beta2)
    x, v = 1.0, 0.0
    for t, slope in enumerate(theorem_1(C).slopes(3000).tolist(), start=1):
        v = beta2 * v + (1 - beta2) * slope**2
        x = min(max(x - lr / math.sqrt(t) * slope / math.sqrt(v), -1.0), 1.0)
        if t % 3 == 0:
            assert x == 1.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: theorem_1(2.0), "C must be more than 2"),
        (lambda: theorem_2(1), "C must be at least 2"),
        (lambda: theorem_3(3.0, 0.0), "delta must lie in"),
        (lambda: PeriodicSlopes(-1.0, 1.0, 3), "small < 0 < large"),
        (lambda: PeriodicSlopes(5.0, -1.0, 1), "period must be at least 2"),
        (lambda: PeriodicSlopes(1.0, -1.0, 3), "mean slope must be positive"),
        (lambda: RandomSlopes(1.0, -1.0, 1.0), "probability must lie in"),
        (lambda: RandomSlopes(1.0, -1.0, 0.1), "mean slope must be positive"),
    ],
)
def test_rejects_other_problems(make, match):
    with pytest.raises(ValueError, match=match):
        make()
