"""Products agree with the matrices themselves, on graphs of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    ParameterLayout,
    ResidualOperator,
    call_with_vector,
    per_sample_loss,
)

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # float64, a few thousand operations


class Tied(nn.Module):
    """A language model with tied weights, dropout, a norm, and an output in a dictionary."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return {"logits": self.out(self.layer(self.embed(tokens))).mean(1)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


def dict_loss(output, target):
    return F.cross_entropy(output["logits"], target)


def _cases():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=g)
    tokens = torch.randint(5, (6, 4), generator=g)
    sequence = torch.randn(6, 5, 3, generator=g, dtype=torch.float64)
    images = torch.randn(6, 2, 5, 5, generator=g, dtype=torch.float64)
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    convolution = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    return {
        "mlp": (mlp, F.cross_entropy, (x, y)),
        "regression": (mlp, nn.MSELoss(), (x, x)),
        "convolution-train": (convolution, F.cross_entropy, (images, y)),
        "tied-transformer": (Tied().train(), dict_loss, (tokens, y)),
        "lstm": (Recurrent(), F.cross_entropy, (sequence, y)),
    }


@pytest.fixture(params=list(_cases()))
def case(request):
    model, loss_fn, data = _cases()[request.param]
    return model.double(), loss_fn, data


def _dense_hessian(model, loss_fn, data):
    """By differentiating twice, one entry of the gradient at a time."""
    from assay.functional import repeatable

    params = [p for p in model.parameters() if p.requires_grad]
    with repeatable(model):
        loss = loss_fn(model(data[0]), data[1])
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        rows = [
            torch.autograd.grad(
                entry, params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for entry in flat
        ]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def test_hessian_product_is_the_dense_matrix_times_the_vector(case):
    model, loss_fn, data = case
    dense = _dense_hessian(model, loss_fn, data)
    operator = HessianOperator(model, loss_fn, data)
    v = torch.randn(operator.numel, 2, dtype=torch.float64)
    torch.testing.assert_close(operator @ v, dense @ v, **TOLERANCE)


def test_gauss_newton_and_residual_add_up_to_the_hessian(case):
    model, loss_fn, data = case
    hessian, ggn, residual = (
        kind(model, loss_fn, data) for kind in (HessianOperator, GGNOperator, ResidualOperator)
    )
    v = torch.randn(hessian.numel, dtype=torch.float64)
    torch.testing.assert_close(ggn @ v + residual @ v, hessian @ v, **TOLERANCE)
    assert v @ (ggn @ v) >= 0


def test_forward_and_backward_linearisation_agree(case):
    model, loss_fn, (x, y) = case
    operator = GGNOperator(model, loss_fn, (x, y))
    v = list(operator.layout.unflatten(torch.randn(operator.numel, dtype=torch.float64)).values())
    from assay.functional import repeatable

    with repeatable(model):
        forward = operator._linearize_forward(x, v)[1]
    with repeatable(model):
        backward = operator._linearize_backward(x, v)[1]
    torch.testing.assert_close(forward, backward, **TOLERANCE)


def test_gauss_newton_is_the_product_of_its_factors():
    model, loss_fn, (x, y) = _cases()["mlp"]
    model = model.double()
    layout = ParameterLayout.of(model)
    J = torch.func.jacrev(lambda w: call_with_vector(model, w, x))(layout.flatten(model).detach())
    p = model(x).softmax(1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    dense = torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(x)
    torch.testing.assert_close(GGNOperator(model, loss_fn, (x, y)).to_dense(), dense, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_is_the_second_moment_of_the_samples_gradients(reduction):
    model, _, (x, y) = _cases()["regression"]
    model = model.double()
    loss = nn.MSELoss(reduction=reduction)
    operator = EmpiricalFisherOperator(model, loss, (x, y))
    terms = per_sample_loss(loss)(model(x), y)
    whole = terms.mean() if reduction == "mean" else terms.sum()
    torch.testing.assert_close(whole, loss(model(x), y))
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(t, list(model.parameters()),
                                                             retain_graph=True)])
        for t in terms
    ]  # fmt: skip
    G = torch.stack(rows)
    torch.testing.assert_close(operator.to_dense(), G.T @ G / len(x), **TOLERANCE)


def test_batches_of_any_size_give_the_mean_over_all_samples():
    model, loss_fn, (x, y) = _cases()["mlp"]
    model = model.double()
    parts = [(x[:1], y[:1]), (x[1:1], y[1:1]), (x[1:], y[1:])]
    whole = HessianOperator(model, loss_fn, (x, y))
    split = HessianOperator(model, loss_fn, parts)
    v = torch.randn(whole.numel, dtype=torch.float64)
    torch.testing.assert_close(split @ v, whole @ v, **TOLERANCE)
    torch.testing.assert_close(split.gradient(), whole.gradient(), **TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": torch.tensor([1.0, 5.0, 0.2]).double()},
        {"ignore_index": 1},
        {"reduction": "sum"},
        {"weight": torch.tensor([1.0, 5.0, 0.2]).double(), "ignore_index": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, ResidualOperator])
def test_batches_count_as_the_loss_counts(kind, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss_fn = nn.CrossEntropyLoss(**settings)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 1])
    parts = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    whole, split = kind(model, loss_fn, (x, y)), kind(model, loss_fn, parts)
    v = torch.randn(whole.numel, dtype=torch.float64)
    torch.testing.assert_close(split @ v, whole @ v, **TOLERANCE)
    torch.testing.assert_close(split.gradient(), whole.gradient(), **TOLERANCE)


def test_data_without_a_target_that_counts():
    loss_fn = nn.CrossEntropyLoss(ignore_index=1)
    data = torch.randn(2, 4), torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="all targets are ignored"):
        HessianOperator(nn.Linear(4, 3), loss_fn, data).gradient()


def test_nothing_is_left_behind():
    model, loss_fn, data = _cases()["convolution-train"]
    model = model.double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    HessianOperator(model, loss_fn, data) @ torch.ones(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_parts_of_the_parameters_give_the_block():
    model, loss_fn, data = _cases()["mlp"]
    model = model.double()
    block = HessianOperator(model, loss_fn, data, params=["2.weight"]).to_dense()
    whole = _dense_hessian(model, loss_fn, data)
    torch.testing.assert_close(block, whole[16:28, 16:28], **TOLERANCE)


def test_mistakes_are_named():
    model, loss_fn, data = _cases()["mlp"]
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        HessianOperator(model, loss_fn, data, params=["weight"])
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.weight' is frozen"):
        HessianOperator(model, loss_fn, data, params=["0.weight"])
    with pytest.raises(ValueError, match="got shape"):
        HessianOperator(model, loss_fn, data) @ torch.ones(3)
    operator = EmpiricalFisherOperator(model.double(), dict_loss, data)
    with pytest.raises(ValueError, match="reduction"):
        operator @ torch.ones(operator.numel)


class Once(torch.autograd.Function):
    """A square whose backward pass is marked as not differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Marked(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x))


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, ResidualOperator])
def test_what_has_no_second_derivative_is_an_error_and_not_zero(kind):
    operator = kind(Marked(3, 2), F.cross_entropy, (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        operator @ torch.ones(8)
