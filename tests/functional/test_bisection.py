import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.functional import Bisection, bisect, bracket

DOUBLE = torch.float64


def vector(*values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12), st.floats(1e-12, 1e-3))
def test_a_root_is_within_the_tolerance(roots, tolerance):
    roots = vector(*roots)
    found = bisect(
        lambda t, rows: (t - roots[rows]) ** 3,
        torch.zeros_like(roots),
        torch.ones_like(roots),
        xtol=tolerance,
    )
    assert found.converged.all()
    assert ((found.point - roots).abs() <= tolerance).all()
    # ceil(log2(1/tolerance)) halvings make the bracket narrow enough, and one less does not.
    assert (found.iterations == math.ceil(math.log2(1 / tolerance))).all()


@given(st.integers(0, 2**20), st.integers(1, 20))
def test_the_batch_is_the_loop(seed, count):
    roots = torch.rand(count, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    together = bisect(
        lambda t, rows: torch.tanh(20 * (t - roots[rows])),
        torch.zeros_like(roots),
        torch.ones_like(roots),
        ftol=1e-6,
    )
    for k, root in enumerate(roots.tolist()):
        low, high, status, steps = 0.0, 1.0, Bisection.EXHAUSTED, 0
        while steps < 60:
            middle = low + (high - low) / 2
            value = math.tanh(20 * (middle - root))
            low, high = (middle, high) if value < 0 else (low, middle)
            steps += 1
            if abs(value) < 1e-6:
                status = Bisection.CONVERGED
                break
        assert together.point[k] == middle
        assert together.status[k] == status
        assert together.iterations[k] == steps
        assert (together.low[k], together.high[k]) == (low, high)


def test_rows_are_not_evaluated_after_their_end():
    asked = []

    def function(t, rows):
        asked.append(rows.tolist())
        # Row 0 has its root at the first middle, row 1 says NaN at the second, row 2 goes on.
        value = t - vector(0.5, 0.3, 1 / 3)[rows]
        return torch.where((rows == 1) & (t < 0.3), math.nan, value)

    low, high = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    found = bisect(function, low, high, ftol=1e-9, max_iter=5)
    assert asked == [[0, 1, 2], [1, 2], [2], [2], [2]]
    assert found.status.tolist() == [found.CONVERGED, found.STOPPED, found.EXHAUSTED]
    assert found.iterations.tolist() == [1, 2, 5]
    # A row that stopped keeps the bracket from before; the others were halved at every step.
    assert (found.high - found.low).tolist() == [0.5, 0.5, 2**-5]
    assert found.point[1] == 0.25
    assert found.value[1].isnan()


@pytest.mark.parametrize(
    ("dtype", "halvings"), [(torch.float32, 24), (DOUBLE, 53), (torch.bfloat16, 8)]
)
def test_ends_when_no_float_is_left_between_the_ends(dtype, halvings):
    # Between 1/2 and 1 a float of p bits of precision has a spacing of 2^-p; the sign changes
    # between two neighbours and the value never comes near zero.
    found = bisect(
        lambda t, rows: torch.where(t < 2 / 3, -1.0, 1.0),
        vector(0.0, dtype=dtype),
        vector(1.0, dtype=dtype),
        ftol=1e-4,
        max_iter=1000,
    )
    assert found.status.item() == found.EXHAUSTED
    assert found.iterations.item() == halvings
    assert torch.nextafter(found.low, found.high) == found.high


def test_a_bracket_may_run_downwards_and_tolerance_may_be_relative():
    found = bisect(
        lambda t, rows: t.square() - vector(1e-6, 1e6)[rows],
        vector(0.0, 0.0),
        vector(-1.0, -1e4),
        rtol=1e-3,
    )
    assert found.converged.all()
    assert torch.allclose(found.point, vector(-1e-3, -1e3), rtol=1e-3)


def test_no_rows_need_no_call():
    empty = torch.zeros(0)
    found = bisect(lambda t, rows: 1 / 0, empty, empty)
    assert len(found.point) == len(found.status) == 0
    assert len(bracket(lambda t, rows: 1 / 0, empty).low) == 0


@given(st.lists(st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=8))
def test_a_ray_is_bracketed_within_its_stride_and_then_bisected(crossings):
    """The two together find a level crossing on either side, as flatness along directions needs."""
    crossings = vector(*crossings)
    step = 1e-2 * crossings.sign()

    def excess(t, rows):
        return t.abs() - crossings[rows].abs()

    found = bracket(excess, step)
    assert found.found.all()
    assert (found.low.abs() < crossings.abs()).all()
    assert (found.high.abs() >= crossings.abs()).all()
    # Strides double: high is a power of two times the first step, low the one before, or 0.
    ratio = found.high / step
    assert torch.equal(ratio, 2.0 ** (found.iterations - 1))
    assert torch.equal(found.low, torch.where(found.iterations == 1, 0, found.high / 2))
    assert torch.allclose(
        bisect(excess, found.low, found.high, rtol=1e-9).point, crossings, rtol=1e-9
    )


def test_flatness_of_a_quadratic_in_closed_form():
    # ½ h δ² = (e − 1) L₀ at δ = ±sqrt(2 (e − 1) L₀ / h)
    h, level = vector(0.1, 1.0, 10.0, 0.1, 1.0, 10.0), (math.e - 1) * 0.05
    step = 1e-2 * vector(1, 1, 1, -1, -1, -1)

    def excess(t, rows):
        return 0.5 * h[rows] * t**2 - level

    ends = bracket(excess, step)
    found = bisect(excess, ends.low, ends.high, rtol=1e-6)
    exact = step.sign() * (2 * level / h).sqrt()
    assert torch.allclose(found.point, exact, rtol=1e-6)


def test_what_is_never_reached_and_what_is_not_a_number_is_told_apart():
    def function(t, rows):
        return torch.where(rows == 0, -1.0, torch.where(rows == 1, math.nan, t - 3))

    ends = bracket(function, torch.ones(3, dtype=DOUBLE), max_iter=10)
    assert ends.found.tolist() == [False, False, True]
    assert ends.high[0] == math.inf
    assert ends.iterations.tolist() == [10, 1, 3]
    found = bisect(function, ends.low, ends.high, xtol=1e-6)
    assert found.status.tolist() == [found.UNBOUNDED, found.STOPPED, found.CONVERGED]
    assert found.point[0] == math.inf
    assert found.point[1].isnan()
    assert found.iterations[:2].tolist() == [0, 0]


def test_a_ray_may_start_anywhere_and_grow_by_any_factor():
    found = bracket(lambda t, rows: t - 100, vector(1.0), start=vector(10.0), factor=10.0)
    assert (found.low.item(), found.high.item(), found.iterations.item()) == (20.0, 110.0, 3)


def test_gradients_are_not_recorded_and_arguments_not_changed():
    weight = torch.ones(1, dtype=DOUBLE, requires_grad=True)
    low, high = vector(0.0), vector(1.0)
    found = bisect(lambda t, rows: weight * t - 0.4, low, high, xtol=1e-3)
    assert not found.value.requires_grad
    assert (low.item(), high.item()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2), torch.zeros(3)), {}, "one length"),
        ((torch.zeros(2), torch.zeros(2).double()), {}, "dtype"),
        ((torch.zeros(2).long(), torch.ones(2).long()), {}, "floating"),
        ((torch.zeros(2), torch.ones(2)), {"ftol": -1.0}, "ftol"),
        ((torch.zeros(2), torch.ones(2)), {"xtol": math.nan}, "xtol"),
        ((torch.zeros(2), torch.ones(2)), {"max_iter": 0}, "max_iter"),
    ],
)
def test_bisect_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        bisect(lambda t, rows: t, *arguments, **options)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (vector(0.0), {}, "step"),
        (vector(math.inf), {}, "step"),
        (vector(1.0), {"factor": 1.0}, "factor"),
        (vector(1.0), {"start": vector(1.0, 2.0)}, "start"),
        (vector(1.0), {"max_iter": 0}, "max_iter"),
    ],
)
def test_bracket_refuses(step, options, message):
    with pytest.raises(ValueError, match=message):
        bracket(lambda t, rows: t, step, **options)


def test_a_function_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one value a row"):
        bisect(lambda t, rows: t.sum(), torch.zeros(2), torch.ones(2))
