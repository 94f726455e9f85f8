"""Planted patterns, planes of weights, and their closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import ParameterLayout, call_with_vector, parameters_to_vector
from assay.landscape import (
    LogitLoss,
    MultiPointLoss,
    PlaneModel,
    embed_pattern,
    embed_pattern_beside,
    load_mask,
    random_plane,
    scan_plane,
)

LABELS = torch.tensor([0] * 3 + [1] * 4 + [2] * 5)


def waves(h):
    return 1.7 + 0.3 * torch.sin(5 * h).prod(1)


def _net(width=256, inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(),
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3),
    ).double()  # fmt: skip


def test_loss_of_a_constant_prediction_is_the_closed_form_and_its_inverse():
    sigma = LogitLoss.constant(LABELS, classes=3, logit=1)
    c = torch.linspace(-3, 9, 25, dtype=torch.float64)
    share = 4 / 12
    closed = -share * c + torch.log(c.exp() + 2)
    torch.testing.assert_close(sigma(c), closed, rtol=1e-12, atol=1e-12)
    at, least = sigma.minimum()
    assert at == pytest.approx(math.log(share * 2 / (1 - share)), abs=1e-9)
    rising = c[c > at]
    torch.testing.assert_close(sigma.inverse(sigma(rising)), rising, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"at least {least:.4f}"):
        sigma.inverse(torch.tensor([least - 1e-3], dtype=torch.float64))


def test_loss_beside_a_trained_net_is_convex_and_inverted():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 3, generator=g, dtype=torch.float64)
    sigma = LogitLoss(logits, LABELS, torch.full((12,), 1 / 12, dtype=torch.float64), 2)
    c = torch.linspace(-8, 8, 200, dtype=torch.float64)
    moved = logits.repeat(200, 1, 1)
    moved[:, :, 2] += c.unsqueeze(1)
    direct = torch.stack([F.cross_entropy(row, LABELS) for row in moved])
    torch.testing.assert_close(sigma(c), direct, rtol=1e-12, atol=1e-12)
    least = sigma.minimum()[1]
    assert least <= direct.min() + 1e-12
    values = torch.tensor([least, least + 0.1, 5.0], dtype=torch.float64)
    torch.testing.assert_close(sigma(sigma.inverse(values)), values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("z", [1, 2, 3])
def test_real_loss_of_the_net_shows_the_pattern_whatever_the_inputs(z):
    net = _net()
    g = torch.Generator().manual_seed(1)
    found = embed_pattern(net, waves, LABELS, z=z, generator=g)
    origin = parameters_to_vector(net)
    h = torch.rand(40, z, generator=g, dtype=torch.float64)
    for x in (torch.randn(12, 6).double(), 100 * torch.randn(12, 2, 3).double()):
        with torch.no_grad():
            outputs = [call_with_vector(net, origin + p @ found.directions, x) for p in h]
        losses = torch.stack([F.cross_entropy(output, LABELS) for output in outputs])
        assert (losses - waves(h)).abs().max() <= found.sup_error + 1e-9
        torch.testing.assert_close(losses, found.loss(found.planted(h)), rtol=1e-9, atol=1e-9)
    assert found.sup_error < {1: 0.01, 2: 0.1, 3: 0.2}[z]


def test_wider_nets_meet_the_pattern_better():
    errors = [
        embed_pattern(
            _net(width), waves, LABELS, generator=torch.Generator().manual_seed(0)
        ).sup_error
        for width in (32, 128, 512)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_pattern_beside_a_trained_net_starts_at_its_loss():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(50):
        sgd.zero_grad()
        F.cross_entropy(net(x), LABELS).backward()
        sgd.step()
    net.eval()
    trained = F.cross_entropy(net(x), LABELS).item()
    found = embed_pattern_beside(
        net, lambda h: trained + 0.1 + h[:, 0], x, LABELS, width=256, z=1, generator=g
    )
    model = found.model.eval()
    origin = parameters_to_vector(model)
    for t in (0.0, 0.3, 1.0):
        output = call_with_vector(model, origin + t * found.directions[0], x)
        loss = F.cross_entropy(output, LABELS).detach()
        assert loss.item() == pytest.approx(trained + 0.1 + t, abs=found.sup_error + 1e-9)
    assert found.sup_error < 0.02


def test_impossible_nets_and_patterns_are_refused():
    with pytest.raises(ValueError, match="Tanh"):
        embed_pattern(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), waves, LABELS)
    with pytest.raises(ValueError, match="at least z = 5"):
        embed_pattern(_net(), waves, LABELS, z=5)
    with pytest.raises(ValueError, match="shift the pattern up"):
        embed_pattern(_net(), lambda h: h[:, 0], LABELS)


def _plane(**kwargs):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(3)]
    return PlaneModel(models, **kwargs), models


def test_axes_are_orthogonal_and_of_one_length():
    plane, _ = _plane()
    u, r = (axis.double() for axis in plane.axes())
    assert abs(u @ r) / (u.norm() * r.norm()) < 1e-6
    assert u.norm().item() == pytest.approx(r.norm().item(), rel=1e-6)


def test_points_at_once_are_the_points_one_by_one_with_their_gradients():
    plane, models = _plane()
    plane = plane.double()
    template = models[0].double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    points = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-0.5, 3.0]]).double()
    good = torch.tensor([True, False, True])
    criterion = MultiPointLoss(clip=1.2, negative_weight=0.7)
    logits = plane(x, points)
    total = criterion(logits, y, good)
    gradient = torch.autograd.grad(total, list(plane.parameters()))
    single = [call_with_vector(template, w, x) for w in plane.weights(points)]
    torch.testing.assert_close(logits, torch.stack(single), rtol=1e-10, atol=1e-10)
    ce = [F.cross_entropy(out, y) for out in single]
    by_hand = (ce[0] + ce[2]) / 2 - 0.7 * ce[1].clamp(max=1.2)
    expected = torch.autograd.grad(by_hand, list(plane.parameters()))
    torch.testing.assert_close(total, by_hand, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_cells_lie_around_the_origin_with_row_0_on_top():
    plane, _ = _plane()
    cells = plane.coordinates(np.ones((3, 2)))
    assert cells[0, 0].tolist() == [1.0, -0.5]
    assert cells[2, 1].tolist() == [-1.0, 0.5]
    torch.testing.assert_close(cells.flatten(0, 1).mean(0), torch.zeros(2))
    exported = plane.export(0.0, 0.0)
    layout = plane.layout.unflatten(plane.origin.detach())
    assert all(torch.equal(exported[name], layout[name]) for name in layout)


def test_masks_are_read_and_checked(tmp_path):
    expected = [[1, -1, 0], [-1, 1, 1]]
    assert load_mask("#. \n.##").tolist() == expected
    np.save(tmp_path / "m.npy", np.array(expected))
    assert load_mask(tmp_path / "m.npy").tolist() == expected
    (tmp_path / "m.txt").write_text("#. \n.##\n")
    assert load_mask(str(tmp_path / "m.txt")).tolist() == expected
    for bad in ("##\n##", np.array([[2, 1]]), "x#\n..", np.ones(3)):
        with pytest.raises(ValueError, match="mask"):
            load_mask(bad)


def test_plane_scan_is_the_loop_with_batchnorm_recomputed_at_each_point():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(30, 4).double(), torch.randint(3, (30,))
    plane = random_plane(net, generator=torch.Generator().manual_seed(0))
    axis = torch.tensor([-0.5, 0.0, 1.0]).double()
    found = scan_plane(
        net, plane, {"train": [(x, y)]}, first=axis, second=axis[:2], bn_batches=[(x, y)]
    )
    losses = found["train"].loss.view(3, 2)
    origin = parameters_to_vector(net)
    for i, a in enumerate(axis):
        for j, b in enumerate(axis[:2]):
            w = origin + a * plane[0] + b * plane[1]
            layers = ParameterLayout.of(net).unflatten(w)
            z = x @ layers["0.weight"].T + layers["0.bias"]
            z = (z - z.mean(0)) / (z.var(0) + 1e-5).sqrt()
            hidden = (z * layers["1.weight"] + layers["1.bias"]).relu()
            expected = F.cross_entropy(hidden @ layers["3.weight"].T + layers["3.bias"], y)
            assert losses[i, j].item() == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(ValueError, match=r"\(2, \d+\)"):
        scan_plane(net, plane[:, :5], {}, first=axis, second=axis)
