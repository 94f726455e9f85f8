import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from assay.functional import (
    ParameterLayout,
    call_with_vector,
    filter_normalize,
    parameters_to_vector,
    random_direction,
    vector_to_parameters,
)


class Tied(nn.Module):
    """A tied weight, and a sub-module under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.decoder(self.again(self.block(self.encoder(x))))


@pytest.fixture
def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


def test_agrees_with_torch_on_a_plain_model():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5))
    expected = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(parameters_to_vector(model), expected)


def test_tied_parameters_are_counted_once(tied):
    layout = ParameterLayout.of(tied)
    assert layout.names == (
        "scale",
        "encoder.weight",
        "encoder.bias",
        "block.weight",
        "block.bias",
    )
    assert layout.aliases == (("decoder.weight", "encoder.weight"),)
    assert layout.numel == 1 + 20 + 20 == len(parameters_to_vector(tied))


def test_round_trip_keeps_ties(tied):
    other = copy.deepcopy(tied)
    vector = torch.randn(41, dtype=torch.float64)
    vector_to_parameters(vector, other)
    assert torch.equal(parameters_to_vector(other), vector)
    assert other.decoder.weight is other.encoder.weight


def test_unflatten_gives_views_with_leading_dimensions(tied):
    layout = ParameterLayout.of(tied)
    vectors = torch.randn(3, 2, layout.numel)
    tensors = layout.unflatten(vectors, aliases=True)
    assert tensors["scale"].shape == (3, 2)
    assert tensors["decoder.weight"].shape == (3, 2, 4, 4)
    assert tensors["block.weight"].untyped_storage().data_ptr() == vectors.data_ptr()
    for index in ((0, 0), (2, 1)):
        alone = layout.unflatten(vectors[index])
        assert all(torch.equal(tensors[name][index], alone[name]) for name in alone)


def test_flatten_and_unflatten_are_adjoint(tied):
    # <unflatten(v), g> = <v, flatten(g)> for every v: the gradient of the left side is flatten(g).
    layout = ParameterLayout.of(tied)
    vector = parameters_to_vector(tied).requires_grad_()
    g = {name: torch.randn_like(tensor) for name, tensor in tied.named_parameters()}
    sum((layout.unflatten(vector)[name] * g[name]).sum() for name in g).backward()
    assert torch.allclose(vector.grad, layout.flatten(g), rtol=0, atol=1e-15)


def test_call_with_vector_equals_loading_it(tied):
    x = torch.randn(5, 4, dtype=torch.float64)
    vector = torch.randn(41, dtype=torch.float64)
    loaded = copy.deepcopy(tied)
    vector_to_parameters(vector, loaded)
    assert torch.equal(call_with_vector(tied, vector, x), loaded(x))


def test_call_with_vector_leaves_a_module_of_two_names_as_it_was(tied):
    x = torch.randn(5, 4, dtype=torch.float64)
    before = tied(x)
    call_with_vector(tied, torch.zeros(41, dtype=torch.float64), x)
    assert torch.equal(tied(x), before)
    assert isinstance(tied.block.weight, nn.Parameter)


def test_call_with_vector_under_vmap_equals_a_loop(tied):
    x = torch.randn(5, 4, dtype=torch.float64)
    vectors = torch.randn(3, 41, dtype=torch.float64)
    batched = torch.func.vmap(lambda v: call_with_vector(tied, v, x))(vectors)
    looped = torch.stack([call_with_vector(tied, v, x) for v in vectors])
    assert torch.allclose(batched, looped, rtol=1e-13, atol=1e-13)


def test_wrong_tensors_are_named():
    layout = ParameterLayout.of(nn.Linear(3, 2))
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="no tensor named 'bias'"):
        layout.flatten({"weight": weight})
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\), expected \(2, 3\)"):
        layout.flatten({"weight": weight.T, "bias": bias})
    with pytest.raises(ValueError, match=r"'bias' has dtype torch.float64"):
        layout.flatten({"weight": weight, "bias": bias.double()})
    with pytest.raises(ValueError, match=r"'bias' has dtype torch.int64"):
        layout.flatten({"weight": weight, "bias": bias.long()})
    with pytest.raises(ValueError, match="9 entries, expected 8"):
        layout.unflatten(torch.zeros(9))


def test_inconsistent_layouts_are_refused():
    with pytest.raises(ValueError, match="one length"):
        ParameterLayout(("a",), ())
    with pytest.raises(ValueError, match="not in names"):
        ParameterLayout(("a",), (torch.Size([2]),), (("b", "c"),))


def test_layout_pickles(tied):
    layout = ParameterLayout.of(tied)
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_a_module_without_parameters_has_an_empty_vector():
    assert parameters_to_vector(nn.ReLU()).shape == (0,)


def test_random_direction_follows_its_generator():
    model = nn.Linear(3, 2).double()
    first, second = (
        random_direction(model, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.dtype == torch.float64


def test_filter_normalize_gives_each_filter_the_norm_of_the_weights():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5)).double()
    layout = ParameterLayout.of(model)
    d = layout.unflatten(filter_normalize(random_direction(model), model))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(d[name], torch.zeros_like(parameter))
        else:
            for got, weight in zip(d[name], parameter, strict=True):
                assert got.norm().item() == pytest.approx(weight.norm().item(), rel=1e-12)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_filter_normalize_forgets_the_scale_of_the_direction(scale, seed):
    model = nn.Linear(3, 2).double()
    d = random_direction(model, generator=torch.Generator().manual_seed(seed))
    once = filter_normalize(d, model)
    assert torch.allclose(filter_normalize(scale * d, model), once, rtol=1e-12, atol=0)
    assert torch.allclose(filter_normalize(once, model), once, rtol=1e-12, atol=0)


def test_filter_normalize_keeps_a_zero_filter_zero():
    model = nn.Linear(3, 2)
    d = torch.ones(8)
    d[:3] = 0
    normalized = filter_normalize(d, model)
    assert torch.equal(normalized[:3], torch.zeros(3))
    assert torch.isfinite(normalized).all()
