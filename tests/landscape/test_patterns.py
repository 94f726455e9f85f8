"""Planted patterns, planes of weights, and their closed forms."""

import inspect
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


class Custom(nn.Module):
    """Four linear layers, registered in another order than the one they run in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.wide = nn.Linear(64, 3), nn.Linear(8, 64)
        self.first, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(3, 7)

    def forward(self, x):
        hidden = self.middle(self.first(x).relu()).relu()
        return self.last(self.wide(hidden).relu())


class FunctionalTanh(Custom):
    def forward(self, x):
        return self.last(self.wide(self.middle(self.first(x).tanh()).tanh()).tanh())


class Leaky(Custom):
    def forward(self, x):
        hidden = F.leaky_relu(self.middle(F.leaky_relu(self.first(x))))
        return self.last(F.leaky_relu(self.wide(hidden)))


class Residual(Custom):
    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(self.wide(hidden + self.middle(hidden).relu()).relu())


class Reused(Custom):
    def forward(self, x):
        hidden = self.middle(self.middle(self.first(x).relu()).relu()).relu()
        return self.last(self.wide(hidden).relu())


class Scaled(Custom):
    def forward(self, x):
        return 3 * super().forward(x)


class FunctionalDropout(Custom):
    def forward(self, x):
        hidden = self.middle(self.first(x).relu()).relu()
        return self.last(F.dropout(self.wide(hidden).relu(), 0.5, True))


class Logits(Custom):
    def forward(self, x):
        return {"logits": super().forward(x)}


REFUSED = {
    FunctionalTanh: "not Linear, ReLU", Leaky: "not Linear, ReLU", Residual: "not Linear, ReLU",
    Scaled: "not Linear, ReLU", FunctionalDropout: "not Linear, ReLU", Reused: "4 of them in 5",
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
def test_a_forward_pass_that_is_no_such_chain_is_refused_and_keeps_its_weights(make):
    net = make().double().train()
    before = parameters_to_vector(net).clone()
    with pytest.raises(ValueError, match=REFUSED[make]):
        embed_pattern(net, waves, LABELS)
    assert torch.equal(parameters_to_vector(net), before)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_error_is_that_of_the_model_itself_in_its_own_precision(dtype):
    net = Custom().to(dtype)
    unused = net.unused.weight.detach().clone()
    found = embed_pattern(net, waves, LABELS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net.unused.weight, unused)
    origin, g = parameters_to_vector(net), torch.Generator().manual_seed(1)
    h = torch.rand(200, 2, generator=g, dtype=torch.float64)
    x = torch.randn(12, 6, generator=g).to(dtype)
    with torch.no_grad():
        said = [call_with_vector(net, origin + p.to(dtype) @ found.directions, x) for p in h]
    losses = torch.stack([F.cross_entropy(out.double(), LABELS) for out in said])
    real = (losses - waves(h)).abs().max().item()
    # 200 points find a good part of the largest error of 40,000; rounding of h to float16 moves
    # the points themselves by 2⁻¹¹.
    slack = 8 * torch.finfo(dtype).eps
    assert 0.1 * found.sup_error < real <= found.sup_error + slack
    assert found.sup_error < 0.5


def test_inputs_of_another_shape_are_given():
    class Image(Custom):
        def forward(self, x):
            return super().forward(x.view(len(x), 2, 3)[:, :, :].reshape(len(x), 6) / x.shape[3])

    net = Image().double()
    with pytest.raises(ValueError, match="inputs="):
        embed_pattern(net, waves, LABELS)
    images = torch.randn(5, 1, 2, 3, dtype=torch.float64)
    assert embed_pattern(net, waves, LABELS, inputs=images).sup_error < 0.5


def test_a_tied_net_and_one_without_logits_are_refused():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="share a parameter"):
        embed_pattern(tied, waves, LABELS)
    with pytest.raises(TypeError, match="returns dict"):
        embed_pattern(Logits(), waves, LABELS)
    with pytest.raises(TypeError, match="embed_pattern_beside needs"):
        embed_pattern_beside(Logits(), waves, torch.randn(12, 6), LABELS)


@pytest.mark.parametrize(
    ("pattern", "labels", "message"),
    [
        (lambda h: h[:, 0] * math.nan, LABELS, "finite on the unit cube, got nan at h = "),
        (lambda h: h, LABELS, r"one loss a point, \(2112,\) .* got \(2112, 2\)"),
        (lambda h: 1.7, LABELS, "one loss a point.* got float"),
        (waves, LABELS[:0], "labels must hold one class index a sample, at least one"),
        (waves, LABELS.double(), "integers in one dimension, got .* of torch.float64"),
        (waves, LABELS + 1, "from 0 to 2, got .* of 12 that are not, e.g. 3"),
        (waves, LABELS - 1, "from 0 to 2, got .* of 12 that are not, e.g. -1"),
        (waves, LABELS.view(3, 4), r"in one dimension, got shape \(3, 4\)"),
    ],
)
def test_patterns_and_labels_are_checked_before_anything_is_written(pattern, labels, message):
    net = _net()
    before = parameters_to_vector(net).clone()
    with pytest.raises(ValueError, match=message):
        embed_pattern(net, pattern, labels)
    assert torch.equal(parameters_to_vector(net), before)
    trained, x = nn.Linear(6, 3).double(), torch.zeros(12, 6).double()
    with pytest.raises(ValueError, match=message):
        embed_pattern_beside(trained, pattern, x, labels, width=256)


def test_a_pattern_may_be_written_with_numpy():
    def of_arrays(h):
        return 1.7 + 0.3 * np.sin(5 * h.numpy()).prod(1)

    found = [
        embed_pattern(_net(), pattern, LABELS, generator=torch.Generator().manual_seed(0))
        for pattern in (waves, of_arrays)
    ]
    assert found[0].sup_error == pytest.approx(found[1].sup_error, rel=1e-6)


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


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def _normed():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(("make", "shape"), [(_normed, (10, 4)), (Last, (10, 7, 4))])
@pytest.mark.parametrize("training", [True, False])
def test_a_plane_of_models_that_vmap_cannot_run(make, shape, training):
    torch.manual_seed(0)
    models = [make() for _ in range(3)]
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    plane = PlaneModel(models).double().train(training)
    x, y = torch.randn(shape).double(), torch.randint(3, (10,))
    points = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-0.5, 3.0]]).double()
    good = torch.tensor([True, False, True])
    logits = plane(x, points)
    gradient = torch.autograd.grad(MultiPointLoss()(logits, y, good), list(plane.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradient)
    one = make().double()
    single = []
    for weights in plane.weights(points):
        one.load_state_dict({k: v.double() for k, v in before.items()})
        one.train(training)
        single.append(call_with_vector(one, weights, x))
    torch.testing.assert_close(logits, torch.stack(single), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_a_plane_of_models_with_several_outputs_stacks_each():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "name": "two"}

    torch.manual_seed(0)
    models = [Two() for _ in range(3)]
    plane, inner = PlaneModel(models), PlaneModel([model.layer for model in models])
    x, points = torch.randn(5, 4), torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    found = plane(x, points)
    torch.testing.assert_close(found["logits"], inner(x, points))
    assert found["name"] == "two"
    with pytest.raises(ValueError, match="coordinates is empty"):
        plane(x, points[:0])


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
    for missing in (str(tmp_path / "none.npy"), tmp_path / "none.txt"):
        with pytest.raises(FileNotFoundError, match=r"none\.(npy|txt)"):
            load_mask(missing)
    assert load_mask("#.").tolist() == [[1, -1]]


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
    # The set named "train" is the default for the statistics, and one pair is one batch.
    named = scan_plane(net, plane, {"train": (x, y)}, first=axis.tolist(), second=axis[:2].numpy())
    assert torch.equal(named["train"].loss, losses.flatten())
    with pytest.raises(ValueError, match="update_bn=False"):
        scan_plane(net, plane, {"test": (x, y)}, first=axis, second=axis)
    kept = scan_plane(net, plane, {"test": (x, y)}, first=[0.0], second=[0.0], update_bn=False)
    assert kept["test"].loss.item() == pytest.approx(F.cross_entropy(net.eval()(x), y).item())


@pytest.mark.parametrize("axis", [[], [[0.0]], ["a"], [math.nan], 1.0, None, [1j]])
def test_axes_of_a_scan_are_checked(axis):
    net = nn.Linear(2, 3)
    scan = inspect.unwrap(scan_plane)
    with pytest.raises(ValueError, match="second must be a vector of"):
        scan(
            net, random_plane(net), {"train": (torch.ones(2, 2), torch.arange(2))},
            first=[0.0], second=axis,
        )  # fmt: skip


def test_a_plane_of_some_parameters_leaves_the_others() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    net[0].requires_grad_(False)
    sets = {"a": (torch.randn(8, 4).double(), torch.arange(8) % 3)}
    plane = random_plane(net, params=["2.weight"])
    assert plane.shape == (2, 18)
    rows = plane.view(2, 3, 6)
    torch.testing.assert_close(rows.norm(dim=2), net[2].weight.norm(dim=1).expand(2, 3))
    axis = [-1.0, 0.0, 2.0]
    for origin in (None, torch.randn(18, dtype=torch.float64)):
        found = scan_plane(
            net, plane, sets, first=axis, second=[0.5], origin=origin, params=["2.weight"]
        )
        centre = net[2].weight if origin is None else origin.view(3, 6)
        for a, loss in zip(axis, found["a"].loss, strict=True):
            weight = centre + a * rows[0] + 0.5 * rows[1]
            out = F.linear(net[1](net[0](sets["a"][0])), weight, net[2].bias)
            assert loss.item() == pytest.approx(F.cross_entropy(out, sets["a"][1]).item())
    for wrong in ({"origin": torch.zeros(3).double()}, {"params": None}, {"params": ["0.weight"]}):
        arguments = {"params": ["2.weight"]} | wrong
        with pytest.raises(ValueError, match=r"must have shape|is frozen"):
            scan_plane(net, plane, sets, first=axis, second=axis, **arguments)


def test_masks_from_images_and_in_other_sizes(tmp_path):
    from PIL import Image

    grey = np.array([[0, 255, 90], [255, 0, 255]], dtype=np.uint8)
    alpha = np.array([[255, 255, 0], [255, 255, 255]], dtype=np.uint8)
    drawn = np.stack([grey, grey, grey, alpha], axis=2)
    Image.fromarray(drawn).save(tmp_path / "icon.png")
    Image.fromarray(grey).save(tmp_path / "grey.bmp")
    assert load_mask(tmp_path / "icon.png").tolist() == [[1, -1, 0], [-1, 1, -1]]
    assert load_mask(str(tmp_path / "grey.bmp")).tolist() == [[1, -1, 1], [-1, 1, -1]]
    assert load_mask("#.\n.#", size=(4, 2)).tolist() == [[1, -1]] * 2 + [[-1, 1]] * 2
    with pytest.raises(ValueError, match="size must be positive"):
        load_mask("#.", size=(0, 2))
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="a mask in text"):
        load_mask(tmp_path / "noise.bin")


def test_models_of_other_shapes_but_as_many_weights_are_no_plane():
    with pytest.raises(ValueError, match="one architecture"):
        PlaneModel([nn.Linear(2, 3), nn.Linear(8, 1), nn.Linear(2, 3)])


def test_axes_that_are_not_made_orthogonal_have_a_penalty():
    plane, _ = _plane(orthogonal=False)
    u, r = (axis.detach() for axis in plane.axes())
    skewness = plane.skewness()
    by_hand = (u @ r) ** 2 + (u.norm() - r.norm()) ** 2
    assert skewness.item() == pytest.approx(by_hand.item(), rel=1e-6)
    adam = torch.optim.Adam(plane.parameters(), lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        plane.skewness().backward()
        adam.step()
    assert plane.skewness().item() < 1e-4 * skewness.item()
    assert _plane()[0].skewness().item() < 1e-6


def test_a_layer_with_two_names_keeps_its_parameters():
    net = Custom().double()
    net.again = net.middle
    before = [(p, p.detach().clone()) for p in net.parameters()]
    found = embed_pattern(net, waves, LABELS, generator=torch.Generator().manual_seed(0))
    assert found.sup_error < 0.5
    assert all(p is q for p, (q, _) in zip(net.parameters(), before, strict=True))
