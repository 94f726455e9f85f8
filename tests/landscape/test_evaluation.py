import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import parameters_to_vector, random_direction, vector_to_parameters
from assay.landscape import (
    BezierCurve,
    Evaluation,
    evaluate,
    evaluate_curve,
    evaluate_span,
    fit_curve,
    flatness,
    linear_barrier,
    minibatch_statistics,
    random_plane,
    scan_plane,
)

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


class Wrapped(nn.Module):
    """A net whose logits come in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> object:
        logits = self.net(x)
        if self.kind == "dict":
            return {"logits": logits, "inputs": x.sum(), "hidden": None}
        return SimpleNamespace(logits=logits) if self.kind == "object" else (logits, 2 * logits)


def logits_in(output: object) -> torch.Tensor:
    if isinstance(output, dict | tuple):
        return output["logits"] if isinstance(output, dict) else output[0]
    return output.logits  # type: ignore[attr-defined]


def loss_of(output: object, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_in(output), target)


@pytest.mark.parametrize("kind", ["dict", "tuple", "object"])
def test_outputs_of_any_form_have_the_losses_of_their_logits(kind: str) -> None:
    torch.manual_seed(0)
    first, second = Wrapped(kind), Wrapped(kind)
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    batches = {"train": [(x[:7], y[:7]), (x[7:], y[7:])]}
    curve = BezierCurve([first, second])
    plain = BezierCurve([first.net, second.net])
    found = evaluate_curve(curve, batches, num_points=5, loss_fn=loss_of).sets["train"]
    expected = evaluate_curve(plain, batches, num_points=5).sets["train"]
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert found.accuracy is None
    barriers = [
        linear_barrier(first, second, (x, y), loss_fn=loss_of),
        linear_barrier(first.net, second.net, (x, y)),
    ]
    assert barriers[0] == pytest.approx(barriers[1], rel=1e-12, abs=1e-12)
    plane = random_plane(first, generator=torch.Generator().manual_seed(0))
    scans = [
        scan_plane(model, plane, batches, first=[-1.0, 0.0], second=[0.0, 1.0], loss_fn=loss_fn)
        for model, loss_fn in ((first, loss_of), (first.net, F.cross_entropy))
    ]
    torch.testing.assert_close(scans[0]["train"].loss, scans[1]["train"].loss, rtol=1e-10, atol=0)


def test_one_pair_is_one_batch_wherever_batches_are_taken() -> None:
    torch.manual_seed(0)
    net, other = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    directions = torch.eye(15).double()[:2]
    for pair in ((x, y), [x, y]):
        assert linear_barrier(net, other, pair) == linear_barrier(net, other, [(x, y)])
        found = evaluate(net, [parameters_to_vector(net)], {"all": pair})["all"].loss
        assert found.item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-12)
        assert torch.equal(
            flatness(net, F.cross_entropy, pair, directions).width,
            flatness(net, F.cross_entropy, [(x, y)], directions).width,
        )
        assert len(fit_curve(BezierCurve([net, other]), pair, epochs=1, lr=0.1)) == 1
        with pytest.raises(ValueError, match="at least two mini-batches, got 1"):
            minibatch_statistics(net, F.cross_entropy, pair, directions)
    for bad in ([x, y, y], [(x, y, y)], x, iter([(x, y, y)])):
        with pytest.raises(ValueError, match=r"\(x, y\)"):
            linear_barrier(net, other, bad)
    with pytest.raises(ValueError, match="not an iterator"):
        flatness(net, F.cross_entropy, iter([(x, y)]), directions)


def test_a_pair_serves_for_statistics_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    points = [parameters_to_vector(net)]
    expected = evaluate(net, points, {"all": (x, y)}, bn_batches=[x])["all"].loss
    for statistics in ((x, y), [(x, y)], x.split(5)):
        found = evaluate(net, points, {"all": (x, y)}, bn_batches=statistics)["all"].loss
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert torch.equal(evaluate(net, points, {"train": (x, y)})["train"].loss, expected)
    assert linear_barrier(net, net, (x, y)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("loss_fn", "ignored"),
    [
        (F.cross_entropy, -100),
        (nn.CrossEntropyLoss(ignore_index=2), 2),
        (functools.partial(F.cross_entropy, ignore_index=2), 2),
        (lambda out, y: F.cross_entropy(out, y), -100),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_ignored_targets_count_neither_in_the_loss_nor_in_the_accuracy(
    loss_fn, ignored: int, dense: bool
) -> None:
    torch.manual_seed(0)
    net = (nn.Conv1d(4, 3, 1) if dense else nn.Linear(4, 3)).double()
    x = torch.randn(12, 4, 5).double() if dense else torch.randn(12, 4).double()
    y = torch.randint(2, (12, 5) if dense else (12,))
    y[1:5], y[8:] = ignored, ignored
    batches = {"all": [(x[:8], y[:8]), (x[8:], y[8:])]}  # the second is ignored altogether
    counted = y != ignored
    logits = net(x).detach()
    point = parameters_to_vector(net)
    for found in (
        evaluate(net, [point, point], batches, loss_fn=loss_fn)["all"],
        evaluate_span(net, point[None], torch.ones(2, 1).double(), batches, loss_fn=loss_fn)["all"],
    ):
        expected = F.cross_entropy(logits, y, ignore_index=ignored).item()
        assert found.loss.tolist() == pytest.approx([expected] * 2, rel=1e-10)
        hits = (logits.argmax(1) == y)[counted].double().mean().item()
        assert found.accuracy is not None
        assert found.accuracy.tolist() == pytest.approx([hits] * 2)
    with pytest.raises(ValueError, match=f"ignored .they are {ignored}"):
        evaluate(net, [point], {"all": batches["all"][1:]}, loss_fn=loss_fn)


def test_a_class_of_a_byte_is_not_the_ignored_one() -> None:
    # −100 as a byte is 156.
    net = nn.Linear(2, 200)
    x, y = torch.randn(4, 2), torch.full((4,), 156, dtype=torch.uint8)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target.long())

    found = evaluate(net, [parameters_to_vector(net)], {"all": (x, y)}, loss_fn=loss_fn)["all"]
    assert found.loss.item() == pytest.approx(loss_fn(net(x), y).item(), rel=1e-6)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    net = nn.Linear(2, 3)
    x, y = torch.randn(4, 2), torch.arange(4) % 3
    with pytest.raises(ValueError, match=r"scalar, .* got shape \(4,\)"):
        evaluate(
            net,
            [parameters_to_vector(net)],
            {"all": (x, y)},
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
        )


class Tokens(nn.Module):
    """Logits of every token `(N, T, V)`, as language models give them; tied, with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(
        self, tokens: torch.Tensor, padding: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        hidden = self.layer(self.embedding(tokens), src_key_padding_mask=padding)
        return {"logits": self.head(hidden)}


def of_tokens(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_inputs_of_any_form_at_points_in_a_plane_and_along_directions(form: str) -> None:
    torch.manual_seed(0)
    net = Tokens().double()
    tokens, padding = torch.randint(11, (6, 5)), torch.zeros(6, 5, dtype=torch.bool)
    padding[:3, 3:] = True
    y = torch.randint(11, (6, 5)).masked_fill(padding, -100)
    inputs = {
        "tensor": tokens, "tuple": (tokens, padding),
        "mapping": {"tokens": tokens, "padding": padding},
    }[form]  # fmt: skip
    given = padding if form != "tensor" else None
    plane = random_plane(net, generator=torch.Generator().manual_seed(0))
    start = parameters_to_vector(net)
    points = [start + a * plane[0] for a in (0.0, 0.5)]
    expected = []
    one = copy.deepcopy(net).eval()
    for point in points:
        vector_to_parameters(point, one)
        expected.append(of_tokens(one(tokens, given), y).item())
    sets = {"all": (inputs, y)}
    assert evaluate(net, points, sets, loss_fn=of_tokens)["all"].loss.tolist() == pytest.approx(
        expected, rel=1e-10
    )
    scan = scan_plane(net, plane, sets, first=[0.0, 0.5], second=[0.0], loss_fn=of_tokens)
    assert scan["all"].loss.tolist() == pytest.approx(expected, rel=1e-10)
    name = "layer.linear1.weight"
    along = F.normalize(torch.randn(2, 128), dim=1).double()
    for chunk_size in (64, 1):
        found = flatness(
            net, of_tokens, (inputs, y), along, params=[name], level=1.01, chunk_size=chunk_size
        )
        assert found.loss == pytest.approx(expected[0], rel=1e-10)


def test_classes_may_be_the_second_dimension_or_the_last_but_are_not_guessed() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 4).double()
    last, second = nn.Linear(4, 3).double(), nn.Conv1d(4, 3, 1).double()
    square = nn.Linear(4, 4).double()
    y = torch.randint(3, (6, 4))

    def flat(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def accuracy(net: nn.Module, loss_fn=F.cross_entropy) -> float | None:
        points = [parameters_to_vector(net)]
        found = evaluate(net, points, {"all": (x, y)}, loss_fn=loss_fn)["all"].accuracy
        return None if found is None else found.item()

    def share(predicted: torch.Tensor) -> float:
        return (predicted == y).double().mean().item()

    assert accuracy(last, flat) == pytest.approx(share(last(x).argmax(2)))
    assert accuracy(second) == pytest.approx(share(second(x).argmax(1)))
    assert accuracy(square, flat) is None  # (6, 4, 4): which are the classes?
    assert accuracy(square) == pytest.approx(share(square(x).argmax(1)))  # torch's loss says it


WEIGHTS = torch.tensor([0.2, 5.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1),
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
        functools.partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.1),
        functools.partial(F.cross_entropy, reduction="sum"),
    ],
)
def test_the_mean_does_not_depend_on_how_samples_are_divided_into_batches(loss_fn) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(4, (12,))
    y[:5] = torch.tensor([-100, 1, 3, 3, -100])
    if getattr(loss_fn, "ignore_index", -100) == 1:
        y[y == -100] = 1
    batches = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:5], y[4:5]), (x[5:5], y[5:5]), (x[5:], y[5:])]
    point, line = parameters_to_vector(net), torch.eye(49).double()[:1]
    as_mean = loss_fn
    if isinstance(loss_fn, functools.partial):
        as_mean = functools.partial(loss_fn.func, **(loss_fn.keywords | {"reduction": "mean"}))
    elif isinstance(loss_fn, nn.Module):
        as_mean = nn.CrossEntropyLoss(WEIGHTS, ignore_index=loss_fn.ignore_index)
    expected = as_mean(net(x), y).item()
    basis = torch.ones(2, 1).double()
    for data in (batches, (x, y)):
        losses = [
            evaluate(net, [point], {"a": data}, loss_fn=loss_fn)["a"].loss.item(),
            evaluate_span(net, point[None], basis, {"a": data}, loss_fn=loss_fn)["a"].loss[1],
            flatness(net, loss_fn, data, line).loss,
        ]
        assert losses == pytest.approx([expected] * 3, rel=1e-10)
    nothing = x[2:4], torch.full((2,), getattr(loss_fn, "ignore_index", -100))
    with pytest.raises(ValueError, match="ignored"):
        flatness(net, loss_fn, nothing, line)


def test_points_are_taken_in_the_precision_of_the_model() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    sets = {"a": (torch.randn(6, 4), torch.randint(3, (6,)))}
    point = parameters_to_vector(net).double()
    expected = evaluate(net, [point.float()], sets)["a"].loss
    assert torch.equal(evaluate(net, [point], sets)["a"].loss, expected)
    one = torch.ones(1, 1)
    torch.testing.assert_close(evaluate_span(net, point[None], one, sets)["a"].loss, expected)


def test_no_more_outputs_are_held_than_weight_vectors_at_once() -> None:
    alive, most = 0, 0

    class Output(dict):  # of any class that vmap does not see into
        def __init__(self, logits: torch.Tensor) -> None:
            nonlocal alive, most
            super().__init__(logits=logits)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> Output:
            return Output(self.layer(x))

    net, x, y = Net(), torch.randn(4, 2), torch.randint(3, (4,))

    def loss_fn(output: Output, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output["logits"], target)

    axis = torch.linspace(-1, 1, 8)
    scan_plane(
        net, random_plane(net), {"a": (x, y)}, first=axis, second=axis, loss_fn=loss_fn,
        chunk_size=4,
    )  # fmt: skip
    assert most <= 2 * 4 + 1  # one part is made while the last one is let go


def test_a_submodule_with_two_names_keeps_its_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    net = Twice().double()
    before = [(p, p.detach().clone()) for p in net.parameters()]
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    directions = F.normalize(torch.randn(2, 16).double(), dim=1)
    found = flatness(
        net, F.cross_entropy, (x, y), directions, params=["first.weight"], level=1.1, rtol=1e-9
    )
    scan_plane(net, random_plane(net), {"a": (x, y)}, first=[0.0], second=[1.0])
    assert all(p is q for p, (q, _) in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(p, value) for p, value in before)
    assert all(found.right.isfinite())
    with torch.no_grad():
        net.first.weight += found.right[0] * directions[0].view(4, 4)
    assert F.cross_entropy(net(x), y).item() == pytest.approx(1.1 * found.loss, rel=1e-7)


def test_models_that_vmap_cannot_run() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x)
            return out if out.sum().item() > 0 else 2 * out

    torch.manual_seed(0)
    net, data = Flow(), (torch.randn(6, 4), torch.arange(6) % 3)
    line = torch.eye(15)[:2]
    loss = F.cross_entropy(net(data[0]), data[1]).item()
    found = flatness(net, F.cross_entropy, data, line, chunk_size=1)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    statistics = minibatch_statistics(net, F.cross_entropy, [data, data], line, chunk_size=1)
    assert statistics.slope_variance.tolist() == [0.0, 0.0]
    for wrong in (
        lambda: flatness(net, F.cross_entropy, data, line, chunk_size=0),
        lambda: evaluate_span(net, line, torch.ones(1, 2), {"a": data}, chunk_size=0),
    ):
        with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
            wrong()
