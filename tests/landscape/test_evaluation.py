import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import parameters_to_vector, random_direction, vector_to_parameters
from assay.landscape import Evaluation, evaluate, evaluate_span

MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (11, 4)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        (11, 2, 6, 6),
    ),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), (11, 4)),
}


def task(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double().train()
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(3, (len(range(shape[0])),))
    center = parameters_to_vector(model)
    points = torch.stack([center + random_direction(model) for _ in range(7)])
    return model, points, list(zip(x.split(4), y.split(4), strict=True)), x, y


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_equals_a_loop(name, chunk_size):
    model, points, batches, x, y = task(name)
    before = copy.deepcopy(model.state_dict())
    result = evaluate(model, points, {"all": batches}, chunk_size=chunk_size)["all"]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    one = copy.deepcopy(model).eval()
    for k, point in enumerate(points):
        vector_to_parameters(point, one)
        out = one(x)
        assert result.loss[k].item() == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-12)
        assert result.accuracy[k].item() == pytest.approx((out.argmax(1) == y).double().mean())
        assert result.error[k] == 1 - result.accuracy[k]


def test_recurrent_networks_which_vmap_cannot_run():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model = Last()
    x, y = torch.randn(6, 7, 4), torch.randint(3, (6,))
    center = parameters_to_vector(model)
    points = torch.stack([center, torch.zeros_like(center)])
    loss = evaluate(model, points, {"all": [(x, y)]})["all"].loss
    assert loss[0].item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert loss[1].item() == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)


def test_dense_targets():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4, 5, 5))
    point = parameters_to_vector(model)
    result = evaluate(model, [point, point], {"all": [(x, y)]})["all"]
    expected = (model(x).argmax(1) == y).double().mean().item()
    assert result.accuracy.tolist() == pytest.approx([expected] * 2)


def test_regression_has_no_accuracy():
    model = nn.Linear(2, 1)
    points = parameters_to_vector(model).expand(3, 3)
    batches = {"all": [(torch.randn(5, 2), torch.randn(5, 1))]}
    result = evaluate(model, points, batches, loss_fn=F.mse_loss)["all"]
    assert result.accuracy is None
    with pytest.raises(ValueError, match="no error rate"):
        _ = result.error


def test_points_are_read_lazily():
    model = nn.Linear(2, 1)
    read = []

    def points():
        for k in range(5):
            read.append(k)
            yield torch.full((3,), float(k))

    def loss_fn(output, _):
        seen.append(len(read))
        return output.mean()

    seen: list[int] = []
    evaluate(
        model,
        points(),
        {"all": [(torch.ones(1, 2), torch.ones(1, 1))]},
        loss_fn=loss_fn,
        chunk_size=2,
    )
    assert seen == [2, 2, 4, 4, 5]


def test_bad_arguments_are_refused():
    model = nn.Linear(2, 3)
    point = parameters_to_vector(model)
    batches = [(torch.randn(5, 2), torch.randint(3, (5,)))]
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        evaluate(model, [point], {"all": batches}, chunk_size=0)
    with pytest.raises(ValueError, match="points is empty"):
        evaluate(model, [], {"all": batches})
    with pytest.raises(ValueError, match="no samples"):
        evaluate(model, [point, point], {"all": iter(batches)}, chunk_size=1)
    with pytest.raises(ValueError, match="running statistics"):
        evaluate(nn.BatchNorm1d(2), [torch.ones(4)], {"all": batches})


def test_kept_statistics_run_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)).double()
    model[0].running_mean.fill_(3)
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randint(3, (5,))
    points = torch.randn(4, 13, dtype=torch.float64)
    batches = {"all": [(x, y)]}
    batched = evaluate(model, points, batches, update_bn=False)["all"].loss
    looped = evaluate(model, points, batches, update_bn=False, chunk_size=1)["all"].loss
    assert torch.allclose(batched, looped, rtol=1e-12)
    recomputed = evaluate(model, points, batches, bn_batches=[x])["all"].loss
    assert (recomputed - batched).abs().max() > 0.1


def test_evaluation_is_a_record():
    result = Evaluation(torch.zeros(2).double(), torch.tensor([1.0, 0.5]).double())
    assert result.error.tolist() == [0, 0.5]


class Odd(nn.Module):
    """Two layers at the input, one of them used twice in another net, a bias outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 3, 2)
        self.right = nn.Linear(4, 3, bias=False)
        self.twice = nn.Linear(3, 3)
        self.offset = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.left(x).mean((2, 3)) + self.right(x[:, 0, 0]) + self.offset
        return self.twice(torch.tanh(self.twice(seen)))


@pytest.mark.parametrize("kind", ["odd", "tied", "dropout"])
def test_span_is_the_evaluation_at_each_combination(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "odd":
        net: nn.Module = Odd()
    elif kind == "tied":
        shared = nn.Linear(16, 16)
        net = nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared, nn.Linear(16, 3))
    else:
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    net = net.double()
    numel = sum(p.numel() for p in net.parameters())
    basis = torch.randn(3, numel, dtype=torch.float64)
    coefficients = torch.randn(11, 3, dtype=torch.float64)
    x = torch.randn(10, 1, 4, 4, dtype=torch.float64)
    batches = {"all": [(x[:4], torch.arange(4) % 3), (x[4:], torch.arange(6) % 3)]}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    span = evaluate_span(net, basis, coefficients, batches, chunk_size=4)["all"]
    plain = evaluate(net, coefficients @ basis, batches)["all"]
    torch.testing.assert_close(span.loss, plain.loss, rtol=1e-10, atol=1e-10)
    assert span.accuracy is not None
    assert plain.accuracy is not None
    assert torch.equal(span.accuracy, plain.accuracy)
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
