"""Distances to decision boundaries against closed forms and brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.analysis import boundary_distance


class Ball(nn.Module):
    """Class 0 inside the sphere of a radius, class 1 outside."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x):
        inside = self.radius**2 - x.flatten(1).square().sum(1)
        return torch.stack([inside, torch.zeros_like(inside)], 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), classes=st.integers(2, 6), size=st.integers(1, 8))
def test_linear_classifier_has_the_closed_form(seed, classes, size):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(size, classes).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).double()
    x = torch.randn(7, size, generator=generator).double()
    found = boundary_distance(model, x)
    logits = model(x).detach()
    k = logits.argmax(1)
    w = model.weight.detach()
    between = (w[k].unsqueeze(1) - w.unsqueeze(0)).norm(dim=2)
    exact = (logits.gather(1, k.unsqueeze(1)) - logits) / between
    exact = exact.nan_to_num(nan=math.inf).amin(1)
    reached = exact < 1e6  # nearly parallel classes meet far away
    torch.testing.assert_close(found.distance[reached], exact[reached], rtol=1e-5, atol=1e-9)
    assert torch.equal(found.predicted, k)


def test_a_sphere_is_as_far_as_its_radius():
    x = torch.tensor([[0.5, 0.0, 0.0], [0.0, 3.0, 0.0], [0.3, -0.4, 1.2]]).double()
    found = boundary_distance(Ball(2.0), x)
    exact = (x.norm(dim=1) - 2).abs()
    torch.testing.assert_close(found.distance, exact, rtol=1e-5, atol=0.0)
    assert found.predicted.tolist() == [0, 1, 0]
    assert found.other.tolist() == [1, 0, 1]


def test_points_are_of_another_class_and_near_the_best_on_a_grid():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    for p in model.parameters():
        p.data *= 2
    x = torch.randn(40, 2).double()
    found = boundary_distance(model, x)
    axis = torch.linspace(-6, 6, 601).double()
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        classes, own = model(grid).argmax(1), model(x).argmax(1)
    spacing = 0.02
    for i in torch.nonzero(found.found).flatten().tolist():
        best = (grid[classes != own[i]] - x[i]).norm(dim=1).min()
        # An upper bound of the distance: never shorter than the grid's best beyond its spacing.
        assert found.distance[i] > best - spacing
        with torch.no_grad():
            lead = model(found.point[i : i + 1])[0]
        assert lead[own[i]] <= lead.max()
    exact = [
        (grid[classes != own[i]] - x[i]).norm(dim=1).min().item()
        for i in torch.nonzero(found.found).flatten().tolist()
    ]
    excess = found.distance[found.found] / torch.tensor(exact).double()
    assert excess.median() < 1.05
    plain = boundary_distance(model, x, refinements=0)
    assert (found.distance <= plain.distance * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_points_are_of_another_class_when_evaluated_again(seed, dtype):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    model = model.eval().to(dtype)
    x = torch.rand(100, 1, 8, 8).to(dtype)
    found = boundary_distance(model, x, batch_size=50)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in found.point.split(50)])
    across = found.found & (found.distance > 0)
    assert across.float().mean() > 0.9
    assert (logits.argmax(1) != found.predicted)[across].all()
    best = logits.amax(1, keepdim=True)
    assert torch.equal(logits.gather(1, found.other.unsqueeze(1))[across], best[across])


def test_a_constant_classifier_has_no_boundary():
    model = nn.Linear(3, 4)
    nn.init.zeros_(model.weight)
    found = boundary_distance(model, torch.randn(5, 3))
    assert not found.found.any()
    assert found.distance.isinf().all()


def test_images_in_batches_and_the_model_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 1, 6, 6)
    whole = boundary_distance(model, x, batch_size=5)
    parts = boundary_distance(model, x, batch_size=2)
    torch.testing.assert_close(whole.distance, parts.distance, rtol=1e-3, atol=1e-5)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_input_on_the_boundary_is_at_distance_zero():
    found = boundary_distance(nn.Identity(), torch.zeros(1, 2))
    assert found.distance.item() == 0


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), {}),
        (torch.full((2, 3), math.nan), {}),
        (torch.zeros(3), {}),
        (torch.zeros(2, 3), {"candidates": 0}),
        (torch.zeros(2, 3), {"overshoot": 0.0}),
        (torch.zeros(2, 3), {"refinements": -1}),
    ],
)
def test_bad_input_is_named(x, options):
    with pytest.raises(ValueError, match="must be"):
        boundary_distance(nn.Identity(), x, **options)


def test_no_inputs():
    found = boundary_distance(nn.Identity(), torch.zeros(0, 3))
    assert found.distance.shape == (0,)
