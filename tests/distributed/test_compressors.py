import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.distributed import (
    Compose,
    Compressor,
    ErrorFeedback,
    Identity,
    NaturalCompressor,
    NaturalDithering,
    RandomDithering,
    RandomK,
    StochasticIntegerRounding,
    TopK,
    natural_round,
)

ALL = [
    Identity(),
    NaturalCompressor(),
    NaturalDithering(4),
    NaturalDithering(3, p=math.inf, norm_compressor=NaturalCompressor()),
    RandomDithering(5, p=1),
    TopK(0.3),
    RandomK(0.3),
    StochasticIntegerRounding(),
    Compose(NaturalCompressor(), RandomK(0.5)),
    Compose(NaturalCompressor(), RandomDithering(4)),
    Compose(NaturalDithering(6), TopK(0.4)),
    ErrorFeedback(TopK(0.3)),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def through(compressor, x, seed=0):
    return compressor.decompress(compressor.compress(x, generator=generator(seed)))


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_protocol_shape_dtype_determinism_and_copies(compressor, dtype):
    x = torch.randn(5, 7, generator=generator()).to(dtype).T  # not contiguous
    assert isinstance(compressor, Compressor)
    compressor = copy.deepcopy(compressor)
    twin = pickle.loads(pickle.dumps(compressor))
    y = through(compressor, x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(y, through(twin, x))


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_empty_and_zero_tensors(compressor):
    assert through(copy.deepcopy(compressor), torch.zeros(0, 3)).shape == (0, 3)
    assert torch.equal(through(copy.deepcopy(compressor), torch.zeros(9)), torch.zeros(9))


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e5m2])
def test_only_real_floating_point_is_compressed(compressor, dtype):
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        compressor.compress(torch.zeros(3, dtype=dtype))


UNBIASED = [c for c in ALL if c.unbiased and math.isfinite(c.omega(6))]


@pytest.mark.parametrize("compressor", UNBIASED, ids=repr)
def test_unbiased_with_the_variance_it_declares(compressor):
    x = torch.tensor([4 / 3, -0.1, 0.01, 3.0, 0.0, -2.5], dtype=torch.float64)
    g, draws = generator(), 500
    y = torch.stack(
        [compressor.decompress(compressor.compress(x, generator=g)) for _ in range(draws)]
    )
    # 5 standard errors for each of six means and for the mean of the squared norm.
    error = (y.mean(0) - x).abs()
    assert (error <= 5 * y.std(0) / math.sqrt(draws) + 1e-12).all()
    squares = y.square().sum(1)
    bound = (1 + compressor.omega(6)) * x.square().sum()
    assert squares.mean() <= bound + 5 * squares.std() / math.sqrt(draws) + 1e-12


def test_natural_rounding_has_the_closed_form_moments_and_reaches_nine_eighths():
    t, draws = 4 / 3, 1_000_000
    y = natural_round(torch.full((draws,), t, dtype=torch.float64), generator())
    variance = (t - 1) * (2 - t)
    assert abs(y.mean() - t) < 5 * math.sqrt(variance / draws)
    # E C^4 = (2 - t) + 16 (t - 1) gives the standard error of the second moment.
    moment = 3 * t - 2
    assert moment / t**2 == pytest.approx(9 / 8, abs=1e-12)
    spread = math.sqrt(((2 - t) + 16 * (t - 1) - moment**2) / draws)
    assert abs(y.square().mean() - moment) < 5 * spread


def test_natural_round_writes_in_place_and_passes_gradients_straight_through():
    x = torch.randn(100, generator=generator(), requires_grad=True)
    (natural_round(x) * torch.arange(100)).sum().backward()
    assert torch.equal(x.grad, torch.arange(100.0))
    y = x.detach().clone()
    expected = natural_round(y, generator(1))
    assert natural_round(y, generator(1), out=y) is y
    assert torch.equal(y, expected)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_natural_round_compiles_to_the_same_numbers():
    compiled = torch.compile(natural_round, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, generator=generator())
    x[:4] = torch.tensor([1e-40, math.nan, -math.inf, -0.0])
    torch.manual_seed(3)
    eager = natural_round(x)
    torch.manual_seed(3)
    assert torch.equal(compiled(x).nan_to_num(), eager.nan_to_num())


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_natural_round_under_vmap_draws_differently_for_each_row(randomness):
    x = torch.full((2, 1000), 1.5)
    y = torch.func.vmap(natural_round, in_dims=1, out_dims=1, randomness=randomness)(x)
    assert y.unique().tolist() == [1.0, 2.0]
    # Rows agree on half the entries: binomial, 6 standard deviations.
    assert abs((y[0] == y[1]).sum() - 500) < 6 * math.sqrt(250)


def test_payload_is_nine_bits_a_float32_and_twelve_a_float64():
    x = torch.randn(1_000_000, generator=generator())
    natural = NaturalCompressor()
    for dtype, most in ((torch.float32, 9.01), (torch.float64, 12.01)):
        payload = natural.compress(x.to(dtype))
        assert natural.bits(payload) == 8 * sum(
            t.numel() * t.element_size() for t in payload.tensors
        )
        assert 8 * len(payload.to_bytes()) / len(x) <= most


def test_integer_rounding_has_no_bound():
    t, draws = 1e-3, 200_000
    y = through(StochasticIntegerRounding(), torch.full((draws,), t, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    # Mean of a Bernoulli(t): then the second moment is t, and t / t² = 1000.
    assert abs(y.mean() - t) < 5 * math.sqrt(t / draws)
    assert StochasticIntegerRounding().omega(1) == math.inf
    for bad in (math.nan, math.inf, 3e9):
        with pytest.raises(ValueError, match="finite and below"):
            StochasticIntegerRounding().compress(torch.tensor([bad]))


@given(st.floats(0.05, 1), st.integers(1, 400))
def test_composition_of_variances(density, d):
    inner, outer = RandomK(density), NaturalCompressor()
    a, b = inner.omega(d), outer.omega(d)
    assert (1 + Compose(outer, inner).omega(d)) == pytest.approx((1 + a) * (1 + b))
    assert Compose(outer, TopK(density)).omega(d) == (math.inf if TopK(density).count(d) < d else b)


def test_compose_with_a_sparsifier_sends_indices_and_compressed_values():
    x = torch.randn(10_000, generator=generator())
    plain, both = TopK(0.01), Compose(NaturalCompressor(), TopK(0.01))
    kept = both.decompress(both.compress(x, generator=generator()))
    assert torch.equal(kept != 0, plain.decompress(plain.compress(x)) != 0)
    # 100 entries of a 32-bit index and 9 bits (13 bytes for 100 signs), against 32 + 32.
    assert both.bits(both.compress(x)) == 100 * 32 + 100 * 8 + 13 * 8
    assert plain.bits(plain.compress(x)) == 100 * 64


def test_top_k_keeps_the_largest_and_random_k_scales():
    x = torch.tensor([1.0, -5.0, 3.0, -4.0, 2.0])
    assert through(TopK(0.4), x).tolist() == [0, -5, 0, -4, 0]
    y = through(RandomK(0.4), torch.ones(5))
    assert y.sum() == 5
    assert (y > 0).sum() == 2
    assert TopK(0.5).compress(torch.tensor([1.0, math.nan])).tensors[1].isnan().all()


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_density_outside_its_range_is_refused(density):
    for kind in (TopK, RandomK):
        with pytest.raises(ValueError, match="density must be in"):
            kind(density)


def test_error_feedback_sends_everything_in_the_end():
    feedback, g = ErrorFeedback(TopK(0.2)), generator()
    gradients = torch.randn(50, 10, generator=g, dtype=torch.float64)
    sent = sum(feedback.decompress(feedback.compress(row)) for row in gradients)
    torch.testing.assert_close(sent + feedback.error, gradients.sum(0), rtol=0, atol=1e-12)
    twin = ErrorFeedback(TopK(0.2))
    twin.load_state_dict(feedback.state_dict())
    x = torch.randn(10, generator=g, dtype=torch.float64)
    assert torch.equal(through(twin, x), through(feedback, x))


def test_error_feedback_forgets_overflow_and_refuses_another_shape():
    feedback = ErrorFeedback(TopK(0.5))
    feedback.compress(torch.tensor([1.0, math.inf, math.nan, 0.5]))
    assert feedback.error.isfinite().all()
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        feedback.compress(torch.ones(3))
    feedback.reset()
    assert through(feedback, torch.tensor([1.0, 2.0])).tolist() == [0.0, 2.0]


def test_combinations_want_compressors():
    for make in (
        lambda: Compose(NaturalCompressor(), 3),
        lambda: ErrorFeedback("topk"),
        lambda: NaturalDithering(2, norm_compressor=0.5),
    ):
        with pytest.raises(TypeError):
            make()
