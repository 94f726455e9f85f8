"""DiagGGN and KFAC make the steps that their formulas say."""

import copy
import gc
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from assay.curvature import compute
from assay.distributed.testing import spawn
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
                {"mc_samples": 0}, {"kl_clip": 0.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(model, LOSS, **bad)
    optimizer = kind(model, LOSS)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(lambda: LOSS(model(x), y))


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
@pytest.mark.parametrize("seed", range(3))
def test_defaults_train(kind, seed):
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = kind(model, LOSS)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.step(_closure(optimizer, model, x[rows], y[rows]))
    assert float((model(x).argmax(1) == y).float().mean()) > 0.85


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.inner, self.layers = nn.Linear(8, 16), nn.TransformerEncoder(layer, 2)
        self.outer = nn.Linear(16, 4)

    def forward(self, x):
        return self.outer(self.layers(self.inner(x)).mean(1))


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_defaults_train_a_transformer_on_few_samples(kind):
    torch.manual_seed(0)
    model, x, y = Transformer(), torch.randn(16, 5, 8), torch.randint(4, (16,))
    optimizer = kind(model, LOSS)
    losses = [optimizer.step(_closure(optimizer, model, x, y)).item() for _ in range(30)]
    assert max(losses) < 1.2 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
@pytest.mark.parametrize("kl_clip", [1e-6, 1e-4, 1e9])
def test_clipped_steps_have_the_length_asked_for(kind, kl_clip):
    def moved(**settings):
        model, x, y = _problem()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = kind(model, LOSS, l2=0.02, mc_samples=None, **settings)
        optimizer.step(_closure(optimizer, model, x, y))
        after = zip(before, model.parameters(), strict=True)
        return torch.cat([(a - p.detach()).flatten() for a, p in after])

    model, x, y = _problem()
    quantity = "diag_ggn" if kind is DiagGGN else "kflr"
    found = compute(model, LOSS, x, y, [quantity])[quantity].values()
    blocks = [
        torch.diag(1 / (c.flatten() + 0.03)) if kind is DiagGGN else c.inv(0.03).to_dense()
        for c in found
    ]
    metric = torch.linalg.inv(torch.block_diag(*blocks))
    whole, step = moved(lr=0.1, damping=0.01), moved(lr=0.1, damping=0.01, kl_clip=kl_clip)
    length = float(whole @ metric @ whole)
    torch.testing.assert_close(step, whole * min(1.0, (kl_clip / length) ** 0.5))
    torch.testing.assert_close(float(step @ metric @ step), min(kl_clip, length))
    # Without a learning rate it is 0.1, and steps are clipped.
    torch.testing.assert_close(moved(kl_clip=kl_clip), step)
    torch.testing.assert_close(moved(), moved(lr=0.1, kl_clip=1e-3))


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_a_learning_rate_of_ones_own_is_not_clipped(kind):
    model, _, _ = _problem()
    assert kind(model, LOSS, lr=0.1).kl_clip is None
    assert kind(model, LOSS).kl_clip == 1e-3
    assert kind(model, LOSS).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
@pytest.mark.parametrize("update_freq", [1, 3])
def test_a_resumed_training_is_the_same_bit_for_bit(kind, update_freq, tmp_path):
    def training(seed):
        model, x, y = _problem()
        draws = torch.Generator().manual_seed(seed)
        groups = [
            {"params": [model[0].weight, model[2].weight], "l2": 0.02},
            {"params": [model[0].bias, model[2].bias], "lr": 0.05, "damping": 0.3},
        ]
        optimizer = kind(
            model, LOSS, lr=0.2, update_freq=update_freq, generator=draws, params=groups
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

        def go(steps):
            for _ in range(steps):
                optimizer.step(_closure(optimizer, model, x, y))
                scheduler.step()

        return model, optimizer, scheduler, draws, go

    model, optimizer, scheduler, draws, go = training(0)
    go(4)
    states = [thing.state_dict() for thing in (model, optimizer, scheduler)]
    torch.save([*states, draws.get_state()], tmp_path / "checkpoint.pt")
    go(5)
    resumed = training(7)
    *states, drawn = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for thing, state in zip(resumed, states, strict=False):
        thing.load_state_dict(state)
    resumed[3].set_state(drawn)
    resumed[4](5)
    for p, q in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_groups_have_settings_of_their_own(kind):
    model, x, y = _problem()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantity = "diag_ggn" if kind is DiagGGN else "kflr"
    found = compute(model, LOSS, x, y, ["grad", quantity])
    groups = [
        {"params": [model[0].weight], "lr": 0.3, "damping": 0.2, "l2": 0.01},
        {"params": [model[2].bias]},
    ]
    optimizer = kind(model, LOSS, lr=0.1, damping=0.5, mc_samples=None, params=groups)
    optimizer.step(_closure(optimizer, model, x, y))
    for name, lr, damping, l2 in (("0.weight", 0.3, 0.2, 0.01), ("2.bias", 0.1, 0.5, 0.0)):
        gradient = found["grad"][name] + l2 * before[name]
        if kind is DiagGGN:
            step = gradient / (found[quantity][name] + damping + l2)
        else:
            step = found[quantity][name].inv(damping + l2).matmul(gradient)
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] - lr * step)
    for name in ("0.bias", "2.weight"):  # of no group
        assert torch.equal(model.get_parameter(name), before[name])
    for bad in ({"lr": -1.0}, {"damping": 0.0}, {"l2": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(model, LOSS, params=[{"params": [model[0].weight], **bad}])


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_parameters_are_frozen_and_trained_on_the_way(kind):
    model, x, y = _problem()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    model[0].requires_grad_(False)
    optimizer = kind(model, LOSS, lr=0.1, update_freq=4)
    kept = [p.clone() for p in first]
    optimizer.step(_closure(optimizer, model, x, y))
    assert all(torch.equal(p, q) for p, q in zip(first, kept, strict=True))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": first})
    optimizer.step(_closure(optimizer, model, x, y))  # before its turn: these have no curvature yet
    assert not any(torch.equal(p, q) for p, q in zip(first, kept, strict=True))
    model[2].requires_grad_(False)
    kept = [p.clone() for p in last]
    for _ in range(4):
        optimizer.step(_closure(optimizer, model, x, y))
    assert all(torch.equal(p, q) for p, q in zip(last, kept, strict=True))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match="not one of the model's"):
        optimizer.step(_closure(optimizer, model, x, y))


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_a_compiled_model_is_that_model(kind):
    (model, x, y), (other, _, _) = _problem(), _problem()
    compiled = torch.compile(other, backend="eager")
    for called in (model, compiled):
        optimizer = kind(called, LOSS, lr=0.1, mc_samples=None)
        optimizer.step(_closure(optimizer, called, x, y))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def _replica(kind, shares):
    model, x, y = _problem()
    parallel = nn.parallel.DistributedDataParallel(model)
    rows = shares[torch.distributed.get_rank()]
    optimizer = kind(parallel, LOSS, lr=0.1, mc_samples=None)
    for _ in range(2):
        optimizer.step(_closure(optimizer, parallel, x[rows], y[rows]))
    return [p.detach() for p in model.parameters()]


@pytest.mark.processes
@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_processes_make_the_steps_of_the_whole_batch(kind):
    model, x, y = _problem()
    optimizer = kind(model, LOSS, lr=0.1, mc_samples=None)
    for _ in range(2):
        optimizer.step(_closure(optimizer, model, x, y))
    first, second = spawn(_replica, 2, kind, [[0, 1, 2, 3], [4, 5, 6, 7]])
    for p, q, whole in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, whole.detach())


@pytest.mark.parametrize("kind", [DiagGGN, KFAC])
def test_old_curvature_does_not_wait_for_the_garbage_collector(kind):
    model, x, y = _problem()
    optimizer = kind(model, LOSS)

    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    optimizer.step(_closure(optimizer, model, x, y))
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(5):
            optimizer.step(_closure(optimizer, model, x, y))
        assert tensors() <= before
    finally:
        gc.enable()
