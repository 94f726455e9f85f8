import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_moons
from sklearn.svm import LinearSVC
from torch import nn

from assay.analysis import (
    BoundarySamples,
    Classifier,
    ConvAutoencoder,
    DeepDIG,
    DenseAutoencoder,
    bisect_boundary,
    boundary_entropy,
    embedding_linearity,
    embedding_of,
    input_complexity,
    margin,
    nearest_embedding_pairs,
    nearest_neighbour,
    random_pairs,
)
from assay.analysis.decision_boundary import _one_hot_cross_entropy
from assay.functional import fit

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(seed=0, classes=3, inputs=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, classes)).double()


def ends(model, count, inputs=8, seed=1, classes=(0, 1)):
    x = 3 * torch.randn(4000, inputs, dtype=DOUBLE, generator=generator(seed))
    with torch.no_grad():
        predicted = model(x).argmax(1)
    return tuple(x[predicted == label][:count] for label in classes)


# --------------------------------------------------------------------------------- bisection


@given(st.integers(0, 1000), st.sampled_from([1e-2, 1e-4, 1e-8]))
@settings(max_examples=20)
def test_a_linear_model_is_met_on_its_hyperplane(seed, beta):
    # p_s − p_t = tanh(margin/2): |p_s − p_t| < β means a distance below 2 atanh(β)/‖w_s − w_t‖.
    torch.manual_seed(seed)
    model = nn.Linear(8, 2).double()
    a, b = ends(model, 50)
    samples = bisect_boundary(model, a, b, 0, 1, tol=beta)
    w, c = (v[0] - v[1] for v in (model.weight.detach(), model.bias.detach()))
    distance = (samples.x @ w + c).abs() / w.norm()
    assert samples.success.all()
    assert (distance <= 2 * math.atanh(beta) / w.norm() * (1 + 1e-6) + 1e-14).all()
    # On a segment there is one such point: a + τ(b − a) with margin 0.
    tau = (a @ w + c) / ((a - b) @ w)
    exact = torch.lerp(a, b, tau.unsqueeze(1))
    along = (b - a).norm(dim=1) * 2 * math.atanh(beta) / ((a - b) @ w).abs()
    assert ((samples.x - exact).norm(dim=1) <= along * (1 + 1e-6) + 1e-13).all()


@torch.no_grad()
def published_loop(model, x1, x2, s, t, beta, max_iter):
    """One pair after the other, with the halving of inputs instead of positions."""
    for step in range(1, max_iter + 1):
        middle = (x1 + x2) / 2
        p = model(middle.unsqueeze(0)).softmax(1)[0]
        if int(p.argmax()) not in (s, t):
            return BoundarySamples.THIRD_CLASS, step, middle
        if abs(p[s] - p[t]) < beta:
            return BoundarySamples.SUCCESS, step, middle
        x1, x2 = (middle, x2) if p[s] > p[t] else (x1, middle)
    return BoundarySamples.NOT_CONVERGED, max_iter, middle


@pytest.mark.parametrize("max_iter", [4, 60])
@pytest.mark.parametrize("batch_size", [7, 1024])
def test_the_batch_is_the_loop_sample_by_sample(max_iter, batch_size):
    model = mlp()
    a, b = ends(model, 60)
    samples = bisect_boundary(model, a, b, 0, 1, max_iter=max_iter, batch_size=batch_size)
    for i in range(len(samples)):
        status, steps, x = published_loop(model, a[i], b[i], 0, 1, 1e-4, max_iter)
        assert (samples.status[i], samples.iterations[i]) == (status, steps)
        assert torch.allclose(samples.x[i], x, rtol=0, atol=1e-13)
    # Four halvings leave a gap, sixty do not.
    outcomes = {samples.SUCCESS} if max_iter == 60 else {samples.NOT_CONVERGED}
    assert set(samples.status.tolist()) == outcomes | {samples.THIRD_CLASS}


def test_every_status_says_what_is_so():
    model = mlp()
    a, b = ends(model, 200)
    samples = bisect_boundary(model, a, b, 0, 1)
    with torch.no_grad():
        p = model(samples.x).softmax(1)
    assert torch.allclose(samples.p, p, rtol=0, atol=1e-14)
    winner = samples.p.argmax(1)
    assert (samples.gap[samples.success] < 1e-4).all()
    assert (winner[samples.success] <= 1).all()
    third = samples.status == samples.THIRD_CLASS
    assert torch.equal(third, winner == 2)
    assert 0 < third.sum() < 200
    assert sum(samples.counts.values()) == len(samples) == 200
    assert samples.success_rate == samples.counts["success"] / 200
    assert torch.equal(samples.borderline, samples.x[samples.success])


def test_halving_leaves_a_power_of_two_of_the_segment():
    model = mlp(classes=2)
    a, b = ends(model, 50)
    samples = bisect_boundary(model, a, b, 0, 1, max_iter=20)
    low, high = samples.ends()
    share = (high - low).norm(dim=1) / (b - a).norm(dim=1)
    assert torch.allclose(share, 2.0 ** -samples.iterations.double(), rtol=1e-9)
    # The remaining ends still lie on the two sides.
    with torch.no_grad():
        gap = [p[:, 0] - p[:, 1] for p in (model(end).softmax(1) for end in (low, high))]
    assert (gap[0] > 0).all()
    assert (gap[1] < 0).all()


def test_a_jump_exhausts_the_floats_and_is_not_called_success():
    class Jump(nn.Module):
        """Surely class 0 left of 1/3 and surely class 1 right of it."""

        def forward(self, x):
            logit = torch.where(x < 1 / 3, 50.0, -50.0)
            return torch.cat([logit, -logit], 1)

    # Between 1/4 and 1/2 the floats of p bits of precision have a spacing of 2^-(p + 1).
    for dtype, halvings in ((torch.float32, 25), (DOUBLE, 54)):
        zero, one = torch.zeros(3, 1, dtype=dtype), torch.ones(3, 1, dtype=dtype)
        samples = bisect_boundary(Jump(), zero, one, 0, 1, max_iter=1000)
        assert (samples.status == samples.NOT_CONVERGED).all()
        assert (samples.iterations == halvings).all()
        low, high = samples.ends()
        assert torch.equal(torch.nextafter(low, high), high)


def test_an_end_that_rounding_puts_in_the_other_class_is_no_error():
    model = nn.Linear(1, 2, bias=False).double()
    model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    a, b = torch.tensor([[-1e-9], [1.0]]).double(), torch.tensor([[-1.0], [1e-9]]).double()
    samples = bisect_boundary(model, a, b, 0, 1, max_iter=40)
    assert samples.success.all()
    assert samples.x.abs().max() < 1e-4
    with pytest.raises(ValueError, match="every input of a"):
        bisect_boundary(model, a, b, 0, 1, tol=1e-10)


def test_half_precision_inputs_and_empty_batches():
    model = nn.Linear(2, 2).bfloat16()
    nn.init.eye_(model.weight), nn.init.zeros_(model.bias)
    a, b = torch.eye(2, dtype=torch.bfloat16).split(1)
    samples = bisect_boundary(model, a, b, 0, 1)
    assert samples.x.dtype == torch.bfloat16
    assert samples.p.dtype == torch.float32
    assert samples.success.all()
    empty = bisect_boundary(model, a[:0], b[:0], 0, 1)
    assert len(empty) == 0
    with pytest.raises(ValueError, match="no pairs"):
        _ = empty.success_rate


def test_inputs_may_be_images_and_not_contiguous():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(100, 4, 4, 3, dtype=DOUBLE).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = model(x).argmax(1)
    count = int(min((predicted == 0).sum(), (predicted == 1).sum()))
    a, b = (x[predicted == label][:count] for label in (0, 1))
    before = a.clone()
    samples = bisect_boundary(model, a, b, 0, 1)
    assert samples.success.all()
    assert samples.x.shape == (count, 3, 4, 4)
    assert torch.equal(a, before)


def test_two_moons_against_the_contour_on_a_dense_grid():
    points, labels = make_moons(400, noise=0.1, random_state=0)
    x, y = torch.tensor(points).float(), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )
    fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), [(x, y)], epochs=150)
    i, j = random_pairs(model, x, y, 0, 1, count=300, generator=generator())
    samples = bisect_boundary(model, x[i], x[j], 0, 1)
    assert samples.success_rate > 0.95

    # The zero level of p_0 − p_1 on a grid of spacing h, as in marching squares: where a vertical
    # or horizontal edge changes sign, the crossing by linear interpolation.
    h = 0.01
    u, v = np.arange(-2, 3, h), np.arange(-1.5, 2, h)
    grid = torch.tensor(np.stack(np.meshgrid(u, v, indexing="ij"), -1)).float()
    with torch.no_grad():
        p = model(grid.reshape(-1, 2)).softmax(1)
    level = (p[:, 0] - p[:, 1]).view(len(u), len(v))
    contour = []
    for dim in (0, 1):
        length = level.shape[dim] - 1
        left, right = level.narrow(dim, 0, length), level.narrow(dim, 1, length)
        crossing = left.sign() != right.sign()
        tau = (left / (left - right))[crossing].unsqueeze(1)
        start, end = grid.narrow(dim, 0, length)[crossing], grid.narrow(dim, 1, length)[crossing]
        contour.append(torch.lerp(start, end, tau))
    distance, _ = nearest_neighbour(samples.borderline, torch.cat(contour))
    # A cell that the contour crosses has a crossing within half its diagonal, and the curve bends
    # little within it.
    assert distance.max() < h


class TestRefusals:
    """Arguments that make no sense are named."""

    model = nn.Linear(2, 2)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    a, b = torch.eye(2)[:1], torch.eye(2)[1:]

    @pytest.mark.parametrize(
        ("a", "b", "s", "t", "options", "message"),
        [
            (a, b, 1, 1, {}, "two classes"),
            (a, b, 0, 2, {}, "t must be the index of a class from 0 to 1, got 2"),
            (a, b, -1, 1, {}, "s must be"),
            (b, a, 0, 1, {}, "every input of a must be predicted as class 0; 1 of 1 are not"),
            (a, a, 0, 1, {}, "every input of b"),
            (a, torch.zeros(2, 2), 0, 1, {}, "one shape"),
            (a, b.double(), 0, 1, {}, "dtype"),
            (a.long(), b.long(), 0, 1, {}, "floating"),
            (a * math.nan, b, 0, 1, {}, "finite"),
            (a, b, 0, 1, {"tol": 0.0}, "tol"),
            (a, b, 0, 1, {"max_iter": 0}, "max_iter"),
        ],
    )
    def test_bisection(self, a, b, s, t, options, message):
        with pytest.raises(ValueError, match=message):
            bisect_boundary(self.model, a, b, s, t, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"s": 1}, "two classes"),
            ({"alpha": -1.0}, "alpha"),
            ({"beta": 0.0}, "beta"),
            ({"lr": 0.0}, "lr"),
            ({"steps": 0}, "steps"),
            ({"batch_size": 0}, "batch_size"),
            ({"min_survivors": 0}, "min_survivors"),
            ({"bounds": (1.0, 0.0)}, "bounds"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            DeepDIG(self.model, **{"s": 0, "t": 1, **options})

    @pytest.mark.parametrize(
        ("x", "t", "message"),
        [
            (torch.zeros(0, 2), 1, "no samples"),
            (torch.full((4, 2), -0.5), 1, r"within bounds=\(0.0, 1.0\), got values from -0.5"),
            (torch.full((4, 2), math.inf), 1, "finite"),
            (torch.zeros(4, 2), 5, "index of a class from 0 to 1, got 5"),
        ],
    )
    def test_samples(self, x, t, message):
        with pytest.raises(ValueError, match=message):
            DeepDIG(self.model, 0, t).fit(x)

    def test_labels_are_one_a_sample(self):
        x = torch.rand(200, 2, generator=generator())
        for y in (torch.zeros(40), torch.zeros(200, 1)):
            with pytest.raises(ValueError, match=r"one label a sample, \(200,\), got \("):
                DeepDIG(self.model, 0, 1, steps=1).fit(x, y.long())

    def test_too_few_survivors_are_counted(self):
        x = torch.rand(40, 2, generator=generator()) * torch.tensor([1.0, 0.1])
        dig = DeepDIG(self.model, 0, 1, alpha=0.0, steps=1)
        with pytest.raises(RuntimeError, match=r"samples: 40, predicted 0: \d+, component I: \d"):
            dig.fit(x)

    @pytest.mark.parametrize("favourite", [0, 1])
    def test_a_model_that_never_says_s_is_refused_before_anything_is_trained(self, favourite):
        constant = nn.Linear(2, 3)
        nn.init.zeros_(constant.weight)
        constant.bias.data = F.one_hot(torch.tensor(favourite), 3).float()
        x = torch.rand(40, 2, generator=generator())
        dig = DeepDIG(constant, 1 - favourite, favourite, steps=1)
        message = rf"class {1 - favourite} \(samples: 40, predicted {1 - favourite}: 0; min_surv"
        with pytest.raises(RuntimeError, match=message):
            dig.fit(x)
        assert dig.history == {}
        # The other way round nothing can be known before the attempt.
        with pytest.raises(RuntimeError, match=r"component I left too few .* component I: 0"):
            DeepDIG(constant, favourite, 1 - favourite, steps=1).fit(x)

    def test_nan_is_no_class(self):
        class Hole(nn.Module):
            def forward(self, x):
                hole = (x[:, :1] - 0.5).abs() < self.width
                return torch.where(hole, math.nan, torch.cat([x[:, :1] - 0.5, 0.5 - x[:, :1]], 1))

        model, a, b = Hole(), torch.ones(3, 2), torch.zeros(3, 2)
        y = torch.tensor([0, 0, 0, 1, 1, 1])
        model.width = 0.1
        with pytest.raises(ValueError, match="NaN for 3 of 3 inputs"):
            bisect_boundary(model, a, b, 0, 1)
        with pytest.raises(ValueError, match="NaN"):
            input_complexity(model, torch.cat([a, b]))
        model.width = 1.0
        for call in (
            lambda: bisect_boundary(model, a, b, 0, 1),
            lambda: random_pairs(model, torch.cat([a, b]), y, 0, 1, count=2),
            lambda: DeepDIG(model, 0, 1, steps=1).fit(a),
        ):
            with pytest.raises(ValueError, match="NaN"):
                call()

    def test_integers_have_nothing_between_them(self):
        ids, y = torch.randint(5, (20, 4), generator=generator()), torch.arange(20) % 2
        for call in (
            lambda: DeepDIG(self.model, 0, 1).fit(ids),
            lambda: random_pairs(self.model, ids, y, 0, 1, count=2),
            lambda: nearest_embedding_pairs(self.model, ids, y, 0, 1),
            lambda: input_complexity(self.model, ids),
        ):
            with pytest.raises(ValueError, match=r"floating-point .* torch.int64.*inputs_embeds"):
                call()

    def test_generate_needs_fit(self):
        with pytest.raises(RuntimeError, match="fit"):
            DeepDIG(self.model, 0, 1).generate()

    def test_an_autoencoder_that_leaves_the_bounds_or_the_shape(self):
        x = torch.rand(40, 2, generator=generator())
        with pytest.raises(ValueError, match="leaves bounds"):
            DeepDIG(self.model, 0, 1, _Constant(2.0), steps=5).fit(x)
        with pytest.raises(ValueError, match="keep the shape"):
            DeepDIG(self.model, 0, 1, nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()), steps=5).fit(x)


class _Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value + 0 * x


# --------------------------------------------------------------------- DeepDIG on anyone's model


class SixLayerResidual(nn.Module):
    """Convolution, two residual blocks with BatchNorm, linear: six weighted layers."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, classes)

    @staticmethod
    def block():
        return nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(self.dropout(x.amax((2, 3))))


class SmallTransformer(nn.Module):
    """Rows of the image are the tokens."""

    def __init__(self, classes=3):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.place = nn.Parameter(torch.randn(8, 16) / 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.squeeze(1)) + self.place).mean(1))


class DictOutput(nn.Module):
    """Takes a named argument and standardised pixels, and returns more than logits."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU())
        self.classifier = nn.Linear(24, classes)

    def forward(self, *, pixel_values):
        hidden = self.body(pixel_values)
        return {"hidden": hidden, "scores": self.classifier(hidden)}


def as_classifier(model):
    return Classifier(
        model,
        call=lambda model, x: model(pixel_values=x)["scores"],
        preprocess=lambda x: (x - 0.5) / 0.25,
    )


def stripes(count):
    """Images 8x8 of vertical, horizontal or no stripes, in [0, 1]."""
    g = generator()
    y = torch.randint(3, (count,), generator=g)
    wave = 0.5 + 0.4 * torch.sin(torch.arange(8) * math.pi / 2 + 0.5)
    vertical = wave.expand(8, 8)
    patterns = torch.stack([vertical, vertical.T, torch.full((8, 8), 0.5)])
    noise = 0.1 * torch.randn(count, 8, 8, generator=g)
    return (patterns[y] + noise).clamp(0, 1).unsqueeze(1), y


@pytest.fixture(scope="module")
def trained():
    """Networks of three kinds that tell stripes apart, left in training mode, half frozen."""
    x, y = stripes(200)
    models = {}
    for make in (SixLayerResidual, SmallTransformer, lambda: as_classifier(DictOutput())):
        torch.manual_seed(0)
        model = make()
        fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), [(x, y)], epochs=25)
        models[type(getattr(model, "model", model)).__name__] = model.train()
    return models, x, y


@pytest.mark.parametrize("name", ["SixLayerResidual", "SmallTransformer", "DictOutput"])
def test_deepdig_on_the_users_model(trained, name):
    models, x, y = trained
    model = models[name]
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    frozen = [p.requires_grad for p in model.parameters()]
    model.zero_grad()
    dig = DeepDIG(model, 0, 1, steps=120, batch_size=32).fit(x, y, generator=generator())
    samples = dig.generate()

    # The paper's stages: x″ in s, x′ in t, a sample of the class that the model agrees on.
    model.eval()
    with torch.no_grad():
        back, across = (model(end).argmax(1) for end in samples.pairs)
        origin = model(x[dig.index]).argmax(1)
        p = model(samples.borderline).softmax(1)
    model.train()
    assert (back == 0).all()
    assert (across == 1).all()
    assert (origin == 0).all()
    assert (y[dig.index] == 0).all()
    counts = list(dig.survivors.values())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(samples) == len(dig.index)

    assert samples.counts["success"] >= 0.9 * len(samples)
    assert ((p[:, 0] - p[:, 1]).abs() < 1e-4 + 1e-5).all()  # another batch rounds differently
    assert samples.x.min() >= 0
    assert samples.x.max() <= 1
    # It is close to its sample, not some pattern that fools the model.
    others = nearest_neighbour(x[y == 1], x[y == 0])[0].mean()
    assert (samples.x - x[dig.index]).flatten(1).norm(dim=1).mean() < others

    # The model is as it was: parameters, buffers, modes, gradients.
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    next(model.parameters()).requires_grad_(True)


def test_a_transformer_of_tokens_is_analysed_in_the_space_of_its_embeddings():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config)
    ids = torch.randint(12, (120, 5))
    y = ids[:, 0] % 3
    x = bert.get_input_embeddings()(ids).detach()
    model = Classifier(bert, call=lambda bert, x: bert(inputs_embeds=x))
    fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), [(x, y)], epochs=15)
    assert (model(x).argmax(1) == y).double().mean() > 0.9
    dig = DeepDIG(model, 0, 1, steps=100, batch_size=32, bounds=None)
    samples = dig.fit(x, y, generator=generator()).generate()
    assert samples.success_rate > 0.9
    assert samples.x.shape[1:] == (5, 16)
    with torch.no_grad():
        p = model(samples.borderline).softmax(1)
    assert ((p[:, 0] - p[:, 1]).abs() < 1e-4 + 1e-5).all()  # another batch rounds differently
    assert embedding_of(model)(samples.borderline).shape == (samples.counts["success"], 16)
    for find in (nearest_embedding_pairs, lambda *a: random_pairs(*a, count=5)):
        i, j = find(model, x, y, 0, 1)
        assert (bisect_boundary(model, x[i], x[j], 0, 1).status >= 0).all()


def test_one_logit_is_the_second_of_two():
    torch.manual_seed(0)
    one = nn.Linear(5, 1)
    model = Classifier(one, call=lambda model, x: F.pad(model(x), (1, 0)))
    x = 3 * torch.randn(200, 5)
    y = (one(x) > 0).long().squeeze(1)
    i, j = random_pairs(model, x, y, 0, 1, count=50)
    samples = bisect_boundary(model, x[i], x[j], 0, 1)
    assert samples.success.all()
    # p_1 - p_0 = tanh(z / 2)
    assert one(samples.borderline).abs().max() < 2.001e-4


def test_the_learning_curve_shows_both_stages_and_the_loss_falls(trained):
    models, x, y = trained
    dig = DeepDIG(models["DictOutput"], 0, 1, steps=250, batch_size=16).fit(
        x, y, generator=generator()
    )
    for stage in ("I", "II"):
        assert [record["step"] for record in dig.history[stage]] == [100, 200, 250]
        losses = [record["loss"] for record in dig.history[stage]]
        assert losses[-1] < losses[0]


def test_a_generator_decides_and_the_global_one_is_left_alone(trained):
    models, x, y = trained
    model = models["DictOutput"]

    def found(seed):
        dig = DeepDIG(model, 0, 1, steps=60, batch_size=32, alpha=3.0)
        return dig.fit(x, y, generator=generator(seed)).generate()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = found(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(found(0).x, first.x)
    assert not torch.equal(found(1).x[:1], first.x[:1])


def test_works_inside_no_grad_and_in_double_precision(trained):
    models, x, y = trained
    model = copy.deepcopy(models["DictOutput"])
    model.double()
    with torch.no_grad():
        dig = DeepDIG(model, 1, 2, steps=100, batch_size=32).fit(
            x.double(), y, generator=generator()
        )
    samples = dig.generate()
    assert samples.x.dtype == DOUBLE
    assert samples.success_rate > 0.9


def test_standardised_inputs_have_other_bounds_or_none(trained):
    models, x, y = trained
    model = copy.deepcopy(models["DictOutput"])
    model.preprocess = None
    standardised = (x - 0.5) / 0.25
    for bounds in ((-2.0, 2.0), None):
        dig = DeepDIG(model, 0, 1, steps=120, batch_size=32, bounds=bounds, alpha=2.0)
        samples = dig.fit(standardised, y, generator=generator()).generate()
        assert samples.success_rate > 0.9
        if bounds is not None:
            assert samples.x.abs().max() <= 2


def test_the_users_autoencoder_is_copied_for_each_stage(trained):
    models, x, y = trained
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    before = copy.deepcopy(mine.state_dict())
    dig = DeepDIG(models["DictOutput"], 0, 1, mine, steps=150, batch_size=32)
    dig.fit(x, y, generator=generator())
    assert type(dig.first) is type(dig.second) is nn.Sequential
    assert all(torch.equal(before[key], mine.state_dict()[key]) for key in before)
    assert not torch.equal(dig.first[1].weight, dig.second[1].weight)
    assert dig.generate().success_rate > 0.9


def test_colour_images_get_convolutions():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2, bias=False))
    nn.init.constant_(model[1].weight[0], 0.2)
    nn.init.constant_(model[1].weight[1], -0.2)
    model.append(_Shift())
    x = 0.5 + 0.1 * torch.rand(16, 3, 8, 8, generator=generator())
    dig = DeepDIG(model, 0, 1, steps=30, alpha=4.0, min_survivors=1)
    samples = dig.fit(x, generator=generator()).generate()
    assert isinstance(dig.first, ConvAutoencoder)
    assert samples.x.shape[1:] == (3, 8, 8)


class _Shift(nn.Module):
    def forward(self, z):
        return z - torch.tensor([19.2, -19.2])


def test_a_fitted_deepdig_survives_copying_and_pickling(trained):
    models, x, y = trained
    dig = DeepDIG(models["SmallTransformer"], 0, 1, steps=60, batch_size=32)
    dig.fit(x, y, generator=generator())
    expected = dig.generate()
    for twin in (copy.deepcopy(dig), pickle.loads(pickle.dumps(dig))):
        assert torch.equal(twin.generate().x, expected.x)


# -------------------------------------------------------------------- its loss, in closed form


@given(st.integers(0, 1000), st.floats(0.1, 5.0), st.integers(2, 6))
@settings(max_examples=30)
def test_the_classifiers_term_is_the_papers_where_nothing_saturates(seed, scale, classes):
    z = scale * torch.randn(5, classes, dtype=DOUBLE, generator=generator(seed))
    target = seed % classes
    onehot = F.one_hot(torch.full((5,), target), classes).double()
    paper = F.binary_cross_entropy(z.softmax(1), onehot)
    assert torch.allclose(_one_hot_cross_entropy(z, target), paper, rtol=1e-9, atol=1e-12)


def test_the_classifiers_term_has_a_gradient_where_the_softmax_is_saturated():
    # For two classes, z = (g, 0) and target 1: log(1 − p_0) = log p_1 = −softplus(g), so the loss
    # is softplus(g) and its slope sigmoid(g): 1 at g = 200, where p_1 = 1e-87 is 0 in float32.
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = _one_hot_cross_entropy(z, 1)
    (slope,) = torch.autograd.grad(loss, z)
    assert loss.item() == 200
    assert torch.equal(slope, torch.tensor([[1.0, -1.0]]))
    # The published form, clamped at 1e-7, has none.
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    clamped = F.binary_cross_entropy(z.softmax(1).clamp(1e-7, 1 - 1e-7), torch.tensor([[0.0, 1.0]]))
    assert torch.autograd.grad(clamped, z)[0].abs().max() == 0


# ----------------------------------------------------------------------------------------- pairs


def test_random_pairs_are_rightly_classified_and_differ():
    model = mlp()
    x = torch.randn(300, 8, dtype=DOUBLE, generator=generator())
    with torch.no_grad():
        predicted = model(x).argmax(1)
    y = predicted.clone()
    y[::3] = (y[::3] + 1) % 3
    i, j = random_pairs(model, x, y, 2, 0, count=500, generator=generator())
    for index, label in ((i, 2), (j, 0)):
        assert (y[index] == label).all()
        assert (predicted[index] == label).all()
        # Every one that is classified rightly has its turn (500 draws from fewer than 100).
        assert len(index.unique()) > 0.9 * ((y == label) & (predicted == label)).sum()
    again = random_pairs(model, x, y, 2, 0, count=500, generator=generator())
    assert torch.equal(i, again[0])
    assert torch.equal(j, again[1])


def test_nearest_pairs_by_brute_force():
    model = mlp()
    x = torch.randn(200, 8, dtype=DOUBLE, generator=generator())
    with torch.no_grad():
        y = model(x).argmax(1)
        hidden = model[1](model[0](x))
    y[:20] = 1 - y[:20].clamp(max=1)
    i, j = nearest_embedding_pairs(model, x, y, 0, 1)
    right = model(x).argmax(1) == y
    of_s, of_t = ((right & (y == label)).nonzero().squeeze(1) for label in (0, 1))
    assert torch.equal(i, of_s)
    for a, b in zip(i, j, strict=True):
        distances = [(hidden[a] - hidden[c]).norm().item() for c in of_t]
        assert of_t[int(np.argmin(distances))] == b


@pytest.mark.parametrize("find", [lambda *a: random_pairs(*a, count=3), nearest_embedding_pairs])
def test_pairs_refuse_what_cannot_be_paired(find):
    model = nn.Linear(2, 2)
    nn.init.eye_(model.weight), nn.init.zeros_(model.bias)
    x, y = torch.eye(2), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="no sample of class 1"):
        find(model, x, y, 0, 1)
    with pytest.raises(ValueError, match="two classes"):
        find(model, x, y, 1, 1)
    with pytest.raises(ValueError, match="one label a sample"):
        find(model, x, y[:1], 0, 1)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7))
def test_nearest_neighbour_is_brute_force_whatever_the_chunks(n, m, chunk):
    a, b = (
        torch.randn(n, 2, 3, generator=generator(n)),
        torch.randn(m, 2, 3, generator=generator(m)),
    )
    distance, index = nearest_neighbour(a, b, chunk_size=chunk)
    brute = (a.unsqueeze(1) - b.unsqueeze(0)).flatten(2).norm(dim=2)
    assert torch.allclose(distance, brute.min(1).values, rtol=1e-5)
    assert torch.allclose(brute.gather(1, index.unsqueeze(1)).squeeze(1), distance, rtol=1e-5)


def test_nearest_neighbour_of_close_points_far_from_the_origin():
    # ‖a‖² + ‖b‖² − 2ab, the fast form of pairwise distances, has no digit left here.
    a = torch.full((1, 64), 1000.0)
    b = torch.cat([a + 1 / 64, a + 1]).repeat(20, 1)
    distance, index = nearest_neighbour(a, b)
    assert distance.item() == math.sqrt(64) / 64
    assert index.item() % 2 == 0


# ------------------------------------------------------------------------------------ embeddings


def test_the_embedding_is_what_enters_the_linear_layer_called_last(trained):
    models, x, _ = trained
    model = models["SmallTransformer"]
    embedded = embedding_of(model, batch_size=64)(x[:100])
    assert embedded.shape == (100, 16)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x[:100])
    assert torch.allclose(model.head(embedded), logits, atol=1e-5)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())

    class Backwards(nn.Module):
        """Registers the layers in the opposite of the order in which it calls them."""

        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(5, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.body(x))

    assert embedding_of(Backwards())(torch.zeros(2, 4)).shape == (2, 5)


def test_an_embedding_by_name_and_through_a_wrapper(trained):
    models, x, _ = trained
    model = models["DictOutput"]
    expected = model.model.body(model.preprocess(x[:10]))
    for layer in ("auto", "model.classifier"):
        assert torch.allclose(embedding_of(model, layer)(x[:10]), expected, atol=1e-6)
    assert embedding_of(models["SixLayerResidual"], "blocks.1")(x[:4]).shape == (4, 6 * 8 * 8)


def test_a_compiled_model_gives_the_same_embedding_and_boundary():
    model = mlp(classes=2)
    compiled = torch.compile(model, backend="eager")
    a, b = ends(model, 20)
    samples, expected = (bisect_boundary(m, a, b, 0, 1) for m in (compiled, model))
    assert torch.equal(samples.status, expected.status)
    assert torch.allclose(samples.x, expected.x, atol=1e-6)
    assert torch.equal(embedding_of(compiled)(a), embedding_of(model)(a))


def test_a_recurrent_model_is_analysed_too():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model = Recurrent()
    x = torch.randn(200, 5, 3)
    y = (x[:, -1, 0] > 0).long()
    fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), [(x, y)], epochs=40)
    dig = DeepDIG(model, 0, 1, steps=100, batch_size=32, bounds=None, alpha=4.0)
    samples = dig.fit(x, y, generator=generator()).generate()
    assert samples.success_rate == 1
    assert samples.x.shape[1:] == (5, 3)


def test_layers_that_do_not_exist_or_are_not_called():
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        embedding_of(nn.Linear(2, 2), "nowhere")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        embedding_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()))
    model = nn.Linear(2, 2)
    model.idle = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="does not call"):
        embedding_of(model, "idle")(torch.zeros(1, 2))
    assert not model.idle._forward_pre_hooks


def test_linearity_agrees_with_scikit_learn():
    g = generator()
    e = torch.randn(300, 5, generator=g) + 2 * torch.tensor([0.0] * 150 + [1.0] * 150).unsqueeze(1)
    positive = torch.arange(300) >= 150
    other = torch.randn(50, 5, generator=g) + 1
    side = torch.rand(50, generator=g) > 0.5
    found = embedding_linearity(e, positive, {"other": (other, side)})
    machine = LinearSVC(C=1.0, dual=False).fit(e.double(), positive)
    for name, points, label in (("train", e, positive), ("other", other, side)):
        score = machine.decision_function(points.double())
        d = np.abs(score) / np.linalg.norm(machine.coef_)
        wrong = machine.predict(points.double()) != label.numpy()
        of = found[name]
        # The two stop at a relative gradient of 1e-4.
        assert of.accuracy == machine.score(points.double(), label)
        assert of.distance == pytest.approx(d.mean(), rel=1e-4)
        assert of.edc1 == of.squashed == pytest.approx((d / (1 + d)).mean(), rel=1e-4)
        assert of.edc2 == pytest.approx((d / (1 + d))[wrong].mean(), rel=1e-3)
        assert of.count == len(points)


def test_linearity_of_a_known_separator():
    # Symmetric about the plane x = 0, so the separator is that plane: d = |x|.
    e = torch.tensor([[-3.0, 1.0], [-3.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
    probe = torch.tensor([[1.0, 9.0], [-1.0, 9.0], [0.5, -9.0]])
    right = torch.tensor([True, True, True])
    found = embedding_linearity(e, e[:, 0] > 0, {"probe": (probe, right)})
    assert found["train"].accuracy == 1
    assert found["train"].edc2 is None
    assert found["train"].distance == pytest.approx(3, rel=1e-6)
    assert found["probe"].accuracy == pytest.approx(2 / 3)
    assert found["probe"].edc1 == pytest.approx((0.5 + 0.5 + 1 / 3) / 3, rel=1e-6)
    assert found["probe"].edc2 == pytest.approx(0.5, rel=1e-6)


def test_linearity_refuses():
    e, label = torch.eye(4), torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match="of one"):
        embedding_linearity(e, label | True)
    with pytest.raises(ValueError, match="all alike"):
        embedding_linearity(torch.zeros(4, 2), label)
    with pytest.raises(ValueError, match="positive"):
        embedding_linearity(e, label.long())
    with pytest.raises(ValueError, match="test: embeddings"):
        embedding_linearity(e, label, {"test": (e[:, :2], label)})


# ------------------------------------------------------------------------------- characteristics


class Comb(nn.Module):
    """The class alternates along the first coordinate with period 1/2."""

    def forward(self, x):
        wave = torch.sin(2 * math.pi * x[:, :1] * 2)
        return torch.cat([wave, -wave], 1)


def test_input_complexity_counts_the_changes_of_class():
    # From 0.05 to 1.05 the sign of sin(4πx) changes at 1/4, 1/2, 3/4 and 1.
    x = torch.tensor([[0.05, 0.0], [1.05, 0.0]])
    complexity = input_complexity(Comb(), x, partners=3, points=200)
    assert torch.allclose(complexity, torch.tensor(4 / 200))
    assert (input_complexity(mlp(), torch.zeros(5, 8, dtype=DOUBLE)) == 0).all()


def test_input_complexity_by_brute_force():
    model = mlp(3)
    x = 3 * torch.randn(6, 8, dtype=DOUBLE, generator=generator())
    found = input_complexity(model, x, partners=4, points=11, samples=5, generator=generator(1))
    offset = torch.randint(1, 6, (5, 4), generator=generator(1))
    for i in range(5):
        changes = 0
        for o in offset[i].tolist():
            tau = torch.linspace(0, 1, 11, dtype=DOUBLE).unsqueeze(1)
            predicted = model(x[i] + tau * (x[(i + o) % 6] - x[i])).argmax(1).tolist()
            changes += sum(a != b for a, b in itertools.pairwise(predicted))
        assert found[i].item() == pytest.approx(changes / 4 / 11)
    # The number of segments in a forward pass does not matter.
    small = input_complexity(
        model, x, partners=4, points=11, samples=5, generator=generator(1), batch_size=1
    )
    assert torch.equal(small, found)


def test_characteristics_of_a_plane_are_its_closed_forms():
    torch.manual_seed(0)
    model = nn.Linear(8, 2).double()
    samples = bisect_boundary(model, *ends(model, 100), 0, 1)
    assert samples.success.all()
    x, p = samples.borderline, samples.p
    # p = (1 ± g)/2: entropy ln 2 − g²/2 − O(g⁴).
    expected = math.log(2) - samples.gap**2 / 2
    torch.testing.assert_close(boundary_entropy(p), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(margin(p), samples.gap, rtol=0, atol=1e-12)
    # A segment changes class once if its ends are on different sides, else never.
    side = p[:, 1] > p[:, 0]
    found = input_complexity(
        model, x, partners=1000, points=10, samples=20, generator=generator(), batch_size=10**5
    )
    others = torch.where(side, (~side).sum(), side.sum()) / (len(x) - 1) / 10
    # The mean of 1,000 draws of 0 or 0.1 has a standard error of at most 0.0016.
    torch.testing.assert_close(found, others[:20].to(found), rtol=0, atol=5 * 0.0016)


def test_input_complexity_refuses():
    for options in ({"partners": 0}, {"points": 1}, {"samples": 0}):
        with pytest.raises(ValueError, match="at least"):
            input_complexity(Comb(), torch.zeros(3, 2), **options)
    with pytest.raises(ValueError, match="two samples"):
        input_complexity(Comb(), torch.zeros(1, 2))


def test_entropy_and_margin_of_known_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3, [1.0, 0.0, 0.0], [0.1, 0.7, 0.2]]).double()
    expected = [math.log(2), math.log(3), 0, -sum(q * math.log(q) for q in (0.1, 0.7, 0.2))]
    assert torch.allclose(boundary_entropy(p), torch.tensor(expected).double(), atol=1e-7)
    assert torch.allclose(margin(p), torch.tensor([0, 0, 1, 0.5]).double(), atol=1e-7)
    with pytest.raises(ValueError, match="two classes"):
        margin(p[:, :1])
    with pytest.raises(ValueError, match=r"take logits.softmax\(1\)"):
        boundary_entropy(torch.tensor([[3.0, -1.0]]))


# ------------------------------------------------------------------------------------ classifier


def test_logits_are_found_in_what_models_return():
    z = torch.zeros(2, 3)

    class Returns(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output

    for output in (z, {"logits": z}, SimpleNamespace(logits=z)):
        assert Classifier(Returns(output))(z) is z
    for output in ((z, z), {"scores": z}, None):
        with pytest.raises(TypeError, match="call="):
            Classifier(Returns(output))(z)
    for output in (z[:, :1], z[0], z.unsqueeze(2)):
        with pytest.raises(ValueError, match=r"\(N, C\)"):
            Classifier(Returns(output))(z)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, 2.0)])
@pytest.mark.parametrize("shape", [(7,), (1, 6, 5), (3, 4)])
def test_dense_autoencoders_keep_shape_and_bounds(bounds, shape):
    torch.manual_seed(0)
    x = 1e4 * torch.randn(9, *shape)
    output = DenseAutoencoder(shape, (5, 4), bounds)(x)
    assert output.shape == x.shape
    assert output.min() >= bounds[0]
    assert output.max() <= bounds[1]
    assert DenseAutoencoder(shape, bounds=None)(x).abs().max() > 10


def test_the_papers_autoencoders():
    dense = [
        tuple(m.weight.shape)
        for m in DenseAutoencoder((1, 28, 28)).modules()
        if hasattr(m, "weight")
    ]
    assert dense == [(100, 784), (50, 100), (784, 50)]
    conv = [m for m in ConvAutoencoder().modules() if hasattr(m, "weight")]
    assert [m.in_channels for m in conv] == [3, 12, 24, 48, 24, 12]
    assert [m.out_channels for m in conv] == [12, 24, 48, 24, 12, 3]
    for bad in ((), (0,)):
        with pytest.raises(ValueError, match="widths"):
            DenseAutoencoder((4,), bad)
        with pytest.raises(ValueError, match="widths"):
            ConvAutoencoder(3, bad)
