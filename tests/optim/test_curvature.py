"""DiagGGN and KFAC make the steps that their formulas say."""

import copy
import pickle

import pytest
import torch
from torch import nn

from assay.curvature import compute
from assay.optim import KFAC, DiagGGN

LOSS = nn.CrossEntropyLoss()


def _problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(8, 4).double(), torch.randint(3, (8,))


def _closure(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_one_step_is_the_formula(kind):
    model, x, y = _problem()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    quantity = "diag_ggn" if kind is DiagGGN else "kflr"
    curvature = compute(model, LOSS, x, y, ["grad", quantity])
    lr, damping, l2 = 0.3, 0.1, 0.02
    optimizer = kind(model, LOSS, lr=lr, damping=damping, l2=l2, mc_samples=None)
    loss = optimizer.step(_closure(optimizer, model, x, y))
    assert loss.requires_grad
    for name, p in model.named_parameters():
        gradient = curvature["grad"][name] + l2 * before[name]
        if kind is DiagGGN:
            direction = gradient / (curvature[quantity][name] + damping + l2)
        else:
            direction = curvature[quantity][name].inv(damping + l2).matmul(gradient)
        torch.testing.assert_close(p.detach(), before[name] - lr * direction)


def test_kfac_solves_a_linear_regression_in_one_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(20, 3).double()
    target = x @ torch.randn(3, 2).double()
    loss_fn = nn.MSELoss()
    optimizer = KFAC(model, loss_fn, lr=1.0, damping=1e-14, mc_samples=None)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) < 1e-10


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_curvature_serves_for_several_steps(kind):
    model, x, y = _problem()
    optimizer = kind(model, LOSS, update_freq=3, mc_samples=None)
    key = "inverse" if kind is DiagGGN else "left"
    first = next(model.parameters())
    kept = []
    for _ in range(4):
        optimizer.step(_closure(optimizer, model, x, y))
        kept.append(optimizer.state[first][key])
    assert kept[0] is kept[1] is kept[2]
    assert not torch.equal(kept[2], kept[3])


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(kind, copied):
    model, x, y = _problem()
    g = torch.Generator().manual_seed(0) if copied is copy.deepcopy else None
    optimizer = kind(model, LOSS, update_freq=2, mc_samples=1 if g else None, generator=g)
    for _ in range(3):
        optimizer.step(_closure(optimizer, model, x, y))
    twin = copied(optimizer)
    assert twin.model is not model
    for o in (optimizer, twin):
        o.step(_closure(o, o.model, x, y))
        o.step(_closure(o, o.model, x, y))
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_state_dict_resumes():
    model, x, y = _problem()
    optimizer = KFAC(model, LOSS, update_freq=2, mc_samples=None)
    for _ in range(3):
        optimizer.step(_closure(optimizer, model, x, y))
    other = copy.deepcopy(model)
    resumed = KFAC(other, LOSS, update_freq=2, mc_samples=None)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, m in ((optimizer, model), (resumed, other)):
        o.step(_closure(o, m, x, y))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_bad_arguments(kind):
    model, x, y = _problem()
    for bad in ({"lr": -1.0}, {"damping": 0.0}, {"l2": -1.0}, {"update_freq": 0},
                {"mc_samples": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(model, LOSS, **bad)
    optimizer = kind(model, LOSS)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(None)
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(lambda: LOSS(model(x), y))
