"""An ensemble is its members: outputs, gradients, statistics, trainings."""

import copy
import pickle

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import Ensemble, EnsembleBatches, EnsembleLoss, fit, train_many
from assay.functional.ensemble import plain_layers
from assay.models import MLP

# Same arithmetic in another order: some hundred roundings of numbers of order 1.
TOL = {"rtol": 1e-12, "atol": 1e-12}


class Counter(nn.Module):
    """Replaces a buffer by a new tensor in its forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x.flatten(1)) + self.calls


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x.flatten(1)).tanh())


class Branching(nn.Module):
    """What vmap cannot run: control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        out = self.linear(x.flatten(1))
        return out if out.sum() > 0 else -out


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x.squeeze(1))[0][:, -1]


class Attention(nn.Module):
    """Torch's transformer layer: fused as a whole in evaluation, its attention always."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, bias=False, batch_first=True)
        self.embed = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(self.embed(x.squeeze(1)))[:, 0, :3]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


ARCHITECTURES = {
    "chain": lambda: MLP((6, 5, 4, 3)),
    "nested chain": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 3, bias=False))),
    "elementwise only": lambda: nn.Sequential(nn.Flatten(), nn.Tanh()),
    "batch norm": lambda: MLP((6, 5, 3), batch_norm=True),
    "cumulative batch norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None)
    ),
    "convolutional": convolutional,
    "tied": Tied,
    "counter": Counter,
    "recurrent": Recurrent,
    "attention": Attention,
}


def _members(make, count=3):
    torch.manual_seed(0)
    return [make().double() for _ in range(count)]


def _inputs(count=3, batch=7):
    torch.manual_seed(1)
    return torch.randn(count, batch, 1, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_gradients_and_buffers_are_those_of_the_members(name, vectorize):
    models, x = _members(ARCHITECTURES[name]), _inputs()
    ensemble = Ensemble(models, vectorize=vectorize)
    outputs = ensemble(x)
    outputs.square().sum().backward() if outputs.requires_grad else None
    for i, model in enumerate(models):
        expected = model(x[i])
        torch.testing.assert_close(outputs[i], expected, **TOL)
        if expected.requires_grad:
            expected.square().sum().backward()
        stacked = dict(ensemble.stacked.named_parameters())
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[key].grad[i], parameter.grad, **TOL)
        member = ensemble.member(i)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(member.state_dict()[key], value, **TOL)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_broadcast_gives_all_members_the_same_inputs(name, vectorize):
    models, x = _members(ARCHITECTURES[name]), _inputs()[0]
    ensemble = Ensemble(models, vectorize=vectorize)
    outputs = ensemble.broadcast(x)
    for i, model in enumerate(models):
        torch.testing.assert_close(outputs[i], model(x), **TOL)
    predicted = ensemble.predict(x, batch_size=3)
    for i, model in enumerate(models):
        if name != "counter":  # its output depends on the number of calls
            torch.testing.assert_close(predicted[i], model.eval()(x), **TOL)
    assert ensemble.training
    assert not predicted.requires_grad


def test_loop_runs_what_vmap_cannot():
    models, x = _members(Branching), _inputs()
    with pytest.raises(RuntimeError, match="vmap") as error:
        Ensemble(models)(x)
    assert "vectorize=False" in error.value.__notes__[0]
    outputs = Ensemble(models, vectorize=False)(x)
    for i, model in enumerate(models):
        torch.testing.assert_close(outputs[i], model(x[i]), **TOL)


def test_chains_of_linear_layers_are_found_and_hooks_are_not_skipped():
    chain = MLP((6, 5, 3), "tanh", dropout=0.5)
    assert len(plain_layers(chain)) == 5
    assert plain_layers(convolutional()) is None
    assert plain_layers(nn.Sequential(nn.utils.parametrizations.weight_norm(chain[1]))) is None
    models = _members(lambda: MLP((6, 5, 3)))
    ensemble = Ensemble(models)
    ensemble.stacked[1].register_forward_hook(lambda module, args, output: 0 * output)
    expected = models[0][2:](torch.zeros(7, 5).double())
    torch.testing.assert_close(ensemble(_inputs())[0], expected, **TOL)


def test_linear_layers_act_on_the_last_of_several_dimensions():
    models = _members(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    ensemble, x = Ensemble(models), _inputs()
    for i, model in enumerate(models):
        torch.testing.assert_close(ensemble(x)[i], model(x[i]), **TOL)
        torch.testing.assert_close(ensemble.broadcast(x[0])[i], model(x[0]), **TOL)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity()),
        lambda: nn.Sequential(nn.Linear(100, 100), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.LayerNorm(100), nn.Dropout(0.5)),
    ],
)
@pytest.mark.parametrize("vectorize", [True, False])
def test_members_have_dropout_masks_of_their_own(make, vectorize):
    torch.manual_seed(0)
    ensemble = Ensemble([make()] * 2, vectorize=vectorize)
    x = torch.randn(4, 100)
    for outputs in (ensemble.broadcast(x), ensemble(x.expand(2, 4, 100))):
        dropped = outputs == 0
        # Of 400 units half are dropped and half differ, up to 5 standard errors of 10.
        assert abs(int(dropped[0].sum()) - 200) < 50
        assert abs(int((dropped[0] ^ dropped[1]).sum()) - 200) < 50
    assert torch.equal(ensemble.predict(x)[0], ensemble.predict(x)[1])


@pytest.mark.parametrize("name", ["chain", "batch norm", "convolutional", "attention"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
        # Without the decay Adam would blow up the rounding of gradients that are zero (a bias
        # before BatchNorm).
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    ],
)
def test_training_at_once_is_training_one_after_another(name, optimizer):
    models = _members(ARCHITECTURES[name])
    x, y = _inputs(1, 22)[0], torch.arange(22) % 3
    batches = EnsembleBatches(x, y, 5, 3, generator=torch.Generator().manual_seed(0))
    orders = [batches.member(i) for i in range(3)]
    ensemble = Ensemble(models)
    history = fit(
        ensemble, optimizer(ensemble.parameters()), batches, epochs=3, loss_fn=EnsembleLoss()
    )
    losses = []
    for i, model in enumerate(models):
        own = fit(model, optimizer(model.parameters()), orders[i], epochs=3)
        losses.append([record["loss"] for record in own])
        for key, value in ensemble.member(i).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-9, atol=1e-9)
    assert history[0]["step"] == 5
    # The last batch of 2 counts as a whole step there, as 2 of 22 samples here.
    assert history[-1]["loss"] == pytest.approx(sum(run[-1] for run in losses) / 3, rel=0.2)


def test_loss_is_a_mean_with_the_gradient_of_a_sum():
    torch.manual_seed(0)
    outputs = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(3, (4, 5))
    targets[1, 2:] = -100
    for own in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)):
        loss_fn = EnsembleLoss(own)
        expected = torch.stack([own(o, t) for o, t in zip(outputs, targets, strict=True)])
        torch.testing.assert_close(loss_fn.of_members(outputs, targets), expected, **TOL)
        loss = loss_fn(outputs, targets)
        torch.testing.assert_close(loss, expected.mean(), **TOL)
        found = torch.autograd.grad(loss, outputs)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), outputs), **TOL)


def test_a_schedule_and_a_loss_that_vmap_cannot_run_train_the_members_alike():
    def loss_fn(output, target):  # torch selects by a mask for smoothing with weights
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        return nn.functional.cross_entropy(output, target, weight=weight, label_smoothing=0.1)

    def train(model, batches, loss_fn):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=15)
        fit(model, optimizer, batches, epochs=3, loss_fn=loss_fn, step_scheduler=schedule)

    models = _members(ARCHITECTURES["batch norm"])
    batches = EnsembleBatches(_inputs(1, 22)[0], torch.arange(22) % 3, 5, 3)
    orders = [batches.member(i) for i in range(3)]
    ensemble = Ensemble(models)
    train(ensemble, batches, EnsembleLoss(loss_fn))
    for i, model in enumerate(models):
        train(model, orders[i], loss_fn)
        for key, value in ensemble.member(i).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-9, atol=1e-9)


def test_loss_of_dense_targets_and_of_probabilities():
    torch.manual_seed(0)
    outputs, dense = torch.randn(2, 3, 4, 5).double(), torch.randint(4, (2, 3, 5))
    expected = [F.cross_entropy(o, t) for o, t in zip(outputs, dense, strict=True)]
    torch.testing.assert_close(EnsembleLoss().of_members(outputs, dense), torch.stack(expected))
    soft = torch.randn(2, 3, 4, 5).double().softmax(2)
    expected = [F.cross_entropy(o, t) for o, t in zip(outputs, soft, strict=True)]
    torch.testing.assert_close(EnsembleLoss().of_members(outputs, soft), torch.stack(expected))


def test_batches_are_a_permutation_for_each_member_and_repeat_from_a_state():
    x, y = torch.arange(11.0).unsqueeze(1), torch.arange(11)
    batches = EnsembleBatches(x, y, 4, 3, generator=torch.Generator().manual_seed(3))
    state = batches.generator.get_state()
    first = list(batches)
    seen = torch.cat([targets for _, targets in first], dim=1)
    assert torch.equal(seen.sort(dim=1).values, y.expand(3, 11))
    assert len({tuple(row) for row in seen.tolist()}) == 3
    assert all(torch.equal(inputs.squeeze(-1).long(), targets) for inputs, targets in first)
    assert not torch.equal(torch.cat([targets for _, targets in batches], dim=1), seen)
    batches.generator.set_state(state)
    assert torch.equal(torch.cat([targets for _, targets in batches], dim=1), seen)


def test_batches_of_own_examples_and_transforms():
    x, y = torch.arange(10.0).unsqueeze(1), torch.arange(10)
    own = torch.tensor([[0, 0, 1], [7, 8, 9]])
    batches = EnsembleBatches(
        x, y, 2, 2, indices=own, drop_last=True, transform=lambda batch, generator: batch + 100
    )
    ((inputs, targets),) = list(batches)
    assert len(batches) == 1
    assert set(targets[0].tolist()) <= {0, 1}
    assert set(targets[1].tolist()) <= {7, 8, 9}
    assert torch.equal(inputs.squeeze(-1), targets + 100.0)
    ((alone, _),) = list(batches.member(1))
    ((both, _),) = list(batches)
    assert torch.equal(alone, both[1])


def test_survives_copies_and_state_dicts():
    ensemble, x = Ensemble(_members(convolutional)), _inputs()
    ensemble(x)
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(twin.eval()(x), ensemble.eval()(x))
    other = Ensemble([convolutional().double() for _ in range(3)])
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.eval()(x), ensemble(x))
    assert ensemble.float()(x.float()).dtype == torch.float32
    assert ensemble(x[:, :0].float()).shape == (3, 0, 3)
    assert "num_models=3" in repr(ensemble)


def test_members_and_their_originals_are_copies():
    models = _members(Tied)
    before = models[0].encode.weight.detach().clone()
    ensemble = Ensemble(models)
    member = ensemble.member(-3)
    assert member.decode.weight is member.encode.weight
    assert isinstance(member.encode.weight, nn.Parameter)
    with torch.no_grad():
        ensemble.stacked.encode.weight.zero_()
    assert torch.equal(models[0].encode.weight, before)
    assert torch.equal(member.encode.weight, before)
    assert torch.equal(ensemble.member(0).decode.weight, torch.zeros_like(before))


def test_frozen_parameters_stay_frozen():
    model = MLP((6, 5, 3))
    model[1].requires_grad_(False)
    ensemble = Ensemble([model, copy.deepcopy(model)])
    assert [p.requires_grad for p in ensemble.parameters()] == [False, False, True, True]
    assert [p.requires_grad for p in ensemble.member(1).parameters()] == [False, False, True, True]


@pytest.mark.parametrize("name", ["chain", "batch norm"])
def test_compiles(name, monkeypatch):
    # The run-time shape checks of the tests cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ensemble, x = Ensemble(_members(ARCHITECTURES[name])).eval(), _inputs()
    compiled = torch.compile(ensemble, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ensemble(x), **TOL)


def test_train_many_repeats_and_its_models_differ():
    x, y = _inputs(1, 20)[0].float(), torch.arange(20) % 3
    steps = []

    def train():
        return train_many(
            lambda: MLP((6, 5, 3)), 3, x, y, epochs=2, batch_size=8,
            make_optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            generator=torch.Generator().manual_seed(5),
            evaluate=lambda ensemble: {"members": ensemble.num_models},
            after_step=lambda ensemble, step: steps.append((ensemble.num_models, step)),
        )  # fmt: skip

    (one, history), (two, _) = train(), train()
    assert torch.equal(one(x.expand(3, *x.shape)), two(x.expand(3, *x.shape)))
    assert [record["members"] for record in history] == [3, 3]
    assert steps[:6] == [(3, step) for step in range(1, 7)]
    assert not torch.allclose(one.member(0)[1].weight, one.member(1)[1].weight)
    assert not one.training


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "empty"),
        ([nn.Linear(2, 3), nn.Linear(2, 4)], r"'weight': \(3, 2\).* in model 0, \(4, 2\)"),
        ([nn.Linear(2, 3), nn.Linear(2, 3, bias=False)], "'bias'.*nothing in model 1"),
        ([nn.Linear(2, 3), nn.Linear(2, 3).double()], "float64"),
        ([nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())], "'0': ReLU in model 0, Tanh"),
    ],
)
def test_refuses_models_that_differ(models, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(models)


class Scaled(nn.Linear):
    def __init__(self, scale):
        super().__init__(3, 2)
        self.scale = scale

    def forward(self, x):
        return super().forward(x * self.scale)


@pytest.mark.parametrize(
    "models",
    [
        [Scaled(2.0), Scaled(3.0)],
        [Scaled(torch.ones(3)), Scaled(torch.zeros(3))],
        [nn.Sequential(nn.LeakyReLU(0.1)), nn.Sequential(nn.LeakyReLU(0.2))],
        [nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 4)],
        [nn.Conv2d(1, 1, 3, stride=(1, 1)), nn.Conv2d(1, 1, 3, stride=(1, 2))],
    ],
)
def test_refuses_models_that_compute_differently(models):
    with pytest.raises(ValueError, match=r"' of model 1 is another than that of model 0"):
        Ensemble(models)
    assert Ensemble(models[:1] * 2).num_models == 2


def test_attributes_that_hooks_make_are_no_settings():
    models = [model.eval() for model in _members(lambda: nn.utils.spectral_norm(nn.Linear(3, 3)))]
    ensemble, x = Ensemble(models, vectorize=False), torch.randn(5, 3).double()
    for output, model in zip(ensemble.broadcast(x), models, strict=True):
        torch.testing.assert_close(output, model(x), **TOL)


@pytest.mark.parametrize("vectorize", [True, False])
def test_refuses_outputs_that_are_no_tensor(vectorize):
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    ensemble = Ensemble([Named(3, 2) for _ in range(2)], vectorize=vectorize)
    with pytest.raises(TypeError, match="must return a tensor, got dict: wrap"):
        ensemble.broadcast(torch.zeros(5, 3))


def test_refuses_bad_input():
    ensemble = Ensemble([nn.Linear(2, 3), nn.Linear(2, 3)])
    for shape in ((3, 4, 2), (2,)):
        with pytest.raises(ValueError, match=r"\(2, B, ...\).*broadcast"):
            ensemble(torch.zeros(shape))
    with pytest.raises(IndexError, match="2 members"):
        ensemble.member(2)
    x, y = torch.zeros(5, 2), torch.zeros(5).long()
    with pytest.raises(ValueError, match="same number"):
        EnsembleBatches(x, y[:4], 2, 2)
    with pytest.raises(ValueError, match="num_models=0"):
        EnsembleBatches(x, y, 2, 0)
    with pytest.raises(ValueError, match="one row for each of the 2"):
        EnsembleBatches(x, y, 2, 2, indices=torch.zeros(3, 4).long())
    with pytest.raises(ValueError, match="drop_last"):
        EnsembleBatches(x, y, 6, 2, drop_last=True)
    with pytest.raises(ValueError, match="members"):
        EnsembleLoss()(torch.zeros(2, 3, 4), torch.zeros(3, 3).long())
    with pytest.raises(ValueError, match="num_models"):
        train_many(nn.Identity, 0, x, y, epochs=1, batch_size=1, make_optimizer=torch.optim.SGD)
