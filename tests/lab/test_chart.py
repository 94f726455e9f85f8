import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from assay.lab import Claim, at_most, between
from assay.lab.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_MARKS,
    MAX_POINTS,
    RIGHT,
    STRIP_WIDTH,
    TOP,
    WIDTH,
    Panel,
    arrange,
    draw,
    read_curve,
    strip,
)
from assay.lab.result import ClaimResult, Measurement


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def panel(*values: list[float]) -> Panel:
    lines = {f"line {i}": [(np.arange(len(v)), np.array(v))] for i, v in enumerate(values)}
    return Panel("loss", "step", lines)


def result_of(claim: Claim, values: list[float]) -> ClaimResult:
    return ClaimResult.of(claim, [Measurement(value=v) for v in values], "small")


def test_a_curve_is_read_by_series_in_order_of_steps(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text('step,series,value\n2,adam,0.5\n1,adam,inf\n1,"a, b",3\n')
    curve = read_curve(path)
    assert list(curve) == ["adam", "a, b"]
    assert curve["adam"][0].tolist() == [1, 2]
    assert curve["adam"][1].tolist() == [math.inf, 0.5]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,series,value\n1,adam\n"])
def test_another_file_is_no_curve(tmp_path, text):
    path = tmp_path / "loss.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"loss\.csv"):
        read_curve(path)


def test_what_differs_in_its_seed_is_one_line():
    one = {"adam": (np.arange(2), np.ones(2)), "sgd": (np.arange(2), np.ones(2))}
    panels = arrange({"norm-0": one, "norm-1": one, "bits-1": one, "beta-0.1": one}, [0, 1])
    found = {p.title: {k: len(v) for k, v in p.lines.items()} for p in panels}
    assert found == {
        "norm": {"adam": 2, "sgd": 2},
        "bits-1": {"adam": 1, "sgd": 1},  # not of every seed, so not a seed
        "beta-0.1": {"adam": 1, "sgd": 1},
    }


def test_linear_and_logarithmic_positions():
    floor, ceiling = HEIGHT - BOTTOM, TOP
    drawing = draw(panel([1.0, 10.0, 100.0]), log=True)
    (low, middle, high) = [y for _, y in points(drawing.paths[0][1])]
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert floor > low > high > ceiling
    assert [text for _, text in drawing.y_ticks] == ["1", "2", "5", "10", "20", "50", "100"]
    linear = draw(panel([0.0, 1.0, 2.0]))
    assert [text for _, text in linear.x_ticks] == ["0", "1", "2"]
    assert {x for x, _ in points(linear.paths[0][1])} == {
        LEFT,
        (LEFT + WIDTH - RIGHT) / 2,
        WIDTH - RIGHT,
    }


def test_what_is_not_finite_leaves_a_gap_and_is_counted():
    diverged = panel([1.0, 2.0, math.nan, 3.0, math.inf])
    assert diverged.left_out == 2
    path = draw(diverged).paths[0][1]
    assert path.count("M") == 2
    assert path.endswith("h0")  # a lone point is a dot
    assert diverged.final("line 0") == "∞"


def test_nothing_finite_is_an_empty_drawing():
    drawing = draw(panel([math.nan, math.inf]))
    assert [d for _, d in drawing.paths] == [""]


def test_a_long_line_is_thinned_but_keeps_its_extremes():
    values = np.zeros(100_000)
    values[54_321], values[77_777] = 1.0, -1.0
    drawn = points(draw(panel(list(values))).paths[0][1])
    assert len(drawn) <= MAX_POINTS + 2
    heights = [y for _, y in drawn]
    ordinary = heights[0]
    assert min(heights) < ordinary < max(heights)
    assert drawn[0][0] == LEFT
    assert drawn[-1][0] == WIDTH - RIGHT


@given(nst.arrays(np.float64, st.integers(1, 20), elements=st.floats(allow_subnormal=True)))
def test_any_values_stay_on_the_canvas(values):
    drawn = panel(list(values))
    for log in (False, True) if drawn.suits_log_scale else (False,):
        drawing = draw(drawn, log=log)
        for x, y in points(drawing.paths[0][1]):
            assert LEFT <= x <= WIDTH - RIGHT
            assert TOP <= y <= HEIGHT - BOTTOM
        for y, _ in drawing.y_ticks:
            assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_ticks_of_nearby_values_are_told_apart():
    texts = [text for _, text in draw(panel([0.981121, 0.981129])).y_ticks]
    assert len(set(texts)) == len(texts) >= 3


def test_a_strip_lies_in_its_bound_where_the_claim_holds():
    drawn = strip(result_of(Claim("gap", "Small", expect=between(0, 1)), [0.4, 0.5, 0.6]))
    assert drawn.expected[0] < drawn.interval[0] < drawn.estimate < drawn.interval[1]
    assert drawn.interval[1] < drawn.expected[1]
    assert len(drawn.values) == 3


def test_an_open_bound_reaches_the_end_of_the_strip():
    drawn = strip(result_of(Claim("gap", "Small", expect=at_most(1)), [2.0, 2.1]))
    assert drawn.expected[0] == 0
    assert drawn.expected[1] < drawn.interval[0]
    assert drawn.interval[1] <= STRIP_WIDTH


def test_many_values_are_sampled_over_their_range():
    claim = Claim("gap", "Small", expect=at_most(1), kind="exact")
    drawn = strip(result_of(claim, [k / 1000 for k in range(1000)]))
    assert len(drawn.values) <= MAX_MARKS
    assert max(drawn.values) - min(drawn.values) > 0.6 * STRIP_WIDTH


@pytest.mark.parametrize("values", [[], [math.inf], [math.nan, 1.0]])
def test_there_is_no_strip_without_a_finite_estimate(values):
    assert strip(result_of(Claim("gap", "Small", expect=at_most(1)), values)) is None
