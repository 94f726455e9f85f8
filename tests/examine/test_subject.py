"""Models of any kind become one function, misfits are told in one line, nothing stays changed."""

import copy
import math
import pickle
import random
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from assay.examine import Data
from assay.examine.subject import Program, Snapshot, Subject, prepare, untouched_randomness
from assay.lab import UsageError

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 4, generator=G), torch.arange(40) % 3
TOKENS, TAGS = torch.randint(0, 9, (40, 6), generator=G), torch.arange(240).reshape(40, 6) % 5


class Returning(nn.Module):
    """A linear model that wraps what it returns."""

    def __init__(self, wrap, outputs=3):
        super().__init__()
        self.linear = nn.Linear(4, outputs)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def tagger():
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 5))


# -- what fits ---------------------------------------------------------------------------------

Output = namedtuple("Output", ["loss", "logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: {"loss": None, "logits": z},
        lambda z: (z, "state"),
        lambda z: SimpleNamespace(logits=z),
        lambda z: Output(z.sum(), z),
    ],
    ids=["tensor", "mapping", "tuple", "object", "named tuple"],
)
def test_finds_the_logits(wrap):
    model = Returning(wrap)
    sample = prepare(model, (X, Y))
    assert torch.equal(sample.model(X), model.linear(X))
    assert (sample.task, sample.classes) == ("classification", ("0", "1", "2"))


def test_an_adapter_calls_in_another_way():
    model = Returning(lambda z: {"scores": z})
    sample = prepare(model, (X, Y), call=lambda model, x: model(x)["scores"])
    assert torch.equal(sample.model(X), model.linear(X))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: out.sum() * math.nan, "loss of the first 8 train samples is nan"),
        (lambda out, y: out.square().mean(1), r"must be a mean, one number .* got shape \(8,\)"),
        (lambda out, y: 0.5, "got float"),
        (lambda out, y: out @ y, "does not take"),
    ],
)
def test_a_loss_that_is_none_is_refused_at_the_start(loss, message):
    with pytest.raises(UsageError, match=message):
        prepare(nn.Linear(4, 3), {"train": (X, Y)}, loss_fn=loss)


def test_token_logits_are_turned_as_the_loss_wants():
    model = tagger()
    sample = prepare(model, (TOKENS, TAGS))
    assert sample.task == "sequence"
    logits = model(TOKENS)
    assert torch.equal(sample.model(TOKENS), logits.transpose(1, 2))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), TAGS.flatten())
    loss = sample.loss_fn(sample.model(sample.train.x), sample.train.y)
    torch.testing.assert_close(loss, expected)


def test_left_out_tokens_may_be_labelled_so():
    tags = TAGS.clone()
    tags[:, 0] = -100
    assert prepare(tagger(), (TOKENS, tags)).classes == tuple("01234")


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_values_are_shaped_as_the_outputs(shape):
    sample = prepare(nn.Linear(4, 1), (X, torch.ones(shape, dtype=torch.float64)))
    assert (sample.task, sample.classes) == ("regression", ())
    assert sample.train.y.shape == (40, 1)
    assert sample.train.y.dtype == torch.float32
    assert isinstance(sample.loss_fn, nn.MSELoss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_take_the_precision_of_the_model(dtype):
    sample = prepare(nn.Linear(4, 3).to(dtype), (X, Y))
    assert sample.train.x.dtype == sample.model(sample.train.x).dtype == dtype


def test_bytes_become_shares_of_one():
    images = torch.randint(0, 256, (40, 1, 2, 2), dtype=torch.uint8, generator=G)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    sample = prepare(model, (images.numpy(), Y.numpy()))
    assert torch.equal(sample.train.x, images.float() / 255)
    assert sample.notes.count("Inputs of bytes were divided by 255.") == 1


def test_parts_without_parameters_and_models_of_nothing_else():
    assert len(prepare(nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Flatten()), (X, Y)).test)
    assert prepare(nn.Softmax(1), (X[:, :3], Y)).classes == ("0", "1", "2")


def test_the_copy_is_in_evaluation_mode_without_gradients_of_the_training():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    model(X).sum().backward()
    sample = prepare(model, (X, Y))
    assert not any(module.training for module in sample.model.modules())
    assert all(p.grad is None for p in sample.model.parameters())
    assert model.training
    assert all(p.grad is not None for p in model.parameters())


def test_without_test_data_the_report_says_so():
    sample = prepare(nn.Linear(4, 3), (X, Y), samples=9)
    assert torch.equal(sample.train.index, sample.test.index)
    assert "No test data was given" in sample.notes[0]
    assert prepare(nn.Linear(4, 3), Data((X, Y), (X, Y)), samples=9).notes[0].startswith("Train")


def test_exported_programs(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    shapes = {"input": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(model, (X,), dynamic_shapes=shapes), tmp_path / "m.pt2")
    program = Program(torch.export.load(tmp_path / "m.pt2"))
    sample = prepare(program, (X, Y))
    twin = copy.deepcopy(sample.model).train().eval()
    torch.testing.assert_close(twin(X[:7]), model(X[:7]))
    names = [name.removeprefix("model.graph.") for name, _ in sample.model.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(sample.loss_fn(sample.model(X), Y), [*sample.model.parameters()])
    theirs = torch.autograd.grad(nn.functional.cross_entropy(model(X), Y), [*model.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


# -- what does not -----------------------------------------------------------------------------


def broken(kind):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        if kind == "parameter":
            model[0].bias[1] = torch.nan
        else:
            model[1].running_var[:2] = torch.inf
    return model


LINEAR = nn.Linear(4, 3)
NAN = X.clone()
NAN[3, 2] = torch.nan
MISFITS = {
    "no module": (lambda x: x, (X, Y), "must be a torch.nn.Module, got function"),
    "nan weight": (broken("parameter"), (X, Y), "parameter 0.bias has 1 of 3 entries"),
    "infinite buffer": (broken("buffer"), (X, Y), "buffer 1.running_var has 2 of 3 entries"),
    "shape of inputs": (LINEAR, (X[:, :3], Y), "batch of shape (2, 3), float32): mat1 and mat2"),
    "shape of test inputs": (LINEAR, Data((X, Y), (X[:, :3], Y)), "does not take the data"),
    "kind of inputs": (LINEAR, (TOKENS[:, :4], Y), "(2, 4), int64)"),
    "label too high": (LINEAR, (X, Y + 1), "train labels run from 1 to 3, but the model has 3"),
    "label too low": (LINEAR, Data((X, Y), (X, Y - 1)), "test labels run from -1 to 1"),
    "mapping": (
        Returning(lambda z: {"scores": z, "loss": 0}), (X, Y),
        "returns a dict with the keys scores, loss, which holds no tensor of logits: give an "
        "adapter `call(model, x) -> tensor`",
    ),
    "list": (Returning(lambda z: [z]), (X, Y), "returns a list, which holds no tensor"),
    "few class names": (LINEAR, Data((X, Y), classes=["a", "b"]), "2 class names for a model with"),
    "many class names": (LINEAR, Data((X, Y), classes=list("abcd")), "4 class names for a model"),
    "nan input": (LINEAR, (NAN, Y), "the inputs have entries that are NaN or infinite"),
    "nan target": (LINEAR, (X, NAN[:, 1:]), "train targets have entries that are NaN"),
    "shape of values": (LINEAR, (X, X), "targets of shape (40, 4) do not fit outputs of shape (40"),
    "shape of classes": (LINEAR, (X, Y[:, None]), "targets of shape (2, 1) are class indices"),
    "one output": (nn.Linear(4, 1), (X, Y), "a classifier returns (N, C) with C of at least 2"),
    "scalar": (Returning(lambda z: z.sum()), (X, Y), "the first dimension must be the sample"),
    "batch lost": (Returning(lambda z: z[:1]), (X, Y), "returns (1, 3) for 2 samples"),
    "predictions": (Returning(lambda z: z.argmax(1)), (X, Y), "the model returns int64"),
    "layout of tokens": (
        nn.Sequential(tagger(), nn.Flatten(), nn.Unflatten(1, (5, 6))), (TOKENS, TAGS),
        "must be (N, T, C)",
    ),
    "no token": (tagger(), (TOKENS, torch.full_like(TAGS, -100)), "labels are all -100"),
    "two tasks": (LINEAR, Data((X, Y), (X, X[:, :3])), "for classification, the test data for reg"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_told_in_one_line(name):
    model, data, message = MISFITS[name]
    with pytest.raises(UsageError) as error:
        prepare(model, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(4, 3)
    model.lock = (i for i in range(3))
    with pytest.raises(UsageError, match="cannot be copied, so it cannot be left untouched"):
        prepare(model, (X, Y))


# -- as it was ---------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    model(X).sum().backward()
    model.handles = [
        model[0].register_forward_hook(lambda *args, **kwargs: None, with_kwargs=True),
        model[1].register_forward_pre_hook(lambda *args: None),
        model[3].register_full_backward_hook(lambda *args: None),
    ]
    return model


def replaced(model):
    model[0].weight = nn.Parameter(torch.ones(8, 4))


CHANGES = {
    "parameter 0.weight": lambda m: m[0].weight.data.add_(1),
    "buffer 1.running_mean": lambda m: m[1].running_mean.add_(1),
    "buffer 1.num_batches_tracked": lambda m: m(X),
    "mode of 2": lambda m: m[2].eval(),
    "requires_grad of parameter 0.weight": lambda m: m[0].weight.requires_grad_(False),
    "requires_grad of parameter 0.bias": lambda m: m[0].bias.requires_grad_(True),
    "gradient of parameter 3.weight": lambda m: m[3].weight.grad.add_(1),
    "gradient of parameter 3.bias": lambda m: setattr(m[3].bias, "grad", None),
    "gradient of parameter 0.bias": lambda m: setattr(m[0].bias, "grad", torch.ones(8)),
    "hooks of 0": lambda m: m.handles[0].remove(),
    "hooks of 1": lambda m: m.handles[1].remove(),
    "hooks of 2": lambda m: m[2].register_forward_hook(lambda *args: None),
    "hooks of 3": lambda m: m.handles[2].remove(),
    "parameter 3.weight": lambda m: m.double(),
    "parameter 1.weight": lambda m: m.__setitem__(1, nn.Identity()),
    "parameter 4.weight": lambda m: m.append(nn.Linear(3, 3)),
    "parameter 3.bias": lambda m: setattr(m[3], "bias", None),
    "parameter 0.weight ": replaced,
    "buffer 1.running_var": lambda m: setattr(m[1], "running_var", torch.ones(8) * m[1].weight),
    "requires_grad of buffer 1.running_var": lambda m: m[1].running_var.mul_(m[1].weight),
    "parameter 0.weight  ": lambda m: m[0].weight.data.fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_and_taken_back(change):
    model = network()
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    twin, snapshot = copy.deepcopy(model), Snapshot(model)
    assert snapshot.changes(model) == []
    CHANGES[change](model)
    assert change.strip() in snapshot.changes(model)
    snapshot.restore(model)
    assert snapshot.changes(model) == []
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == tensors
    state = twin.state_dict()
    assert list(state) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.dtype == state[key].dtype
    for p, same, gradient in zip(model.parameters(), twin.parameters(), gradients, strict=True):
        assert p.requires_grad == same.requires_grad
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or torch.equal(p.grad, gradient)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]


def test_hooks_are_put_back_with_what_they_are_called_with():
    seen = []
    model = nn.Linear(4, 3)
    handle = model.register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs),
                                         with_kwargs=True)  # fmt: skip
    snapshot = Snapshot(model)
    handle.remove()
    model.register_forward_hook(lambda *args: seen.append("another"))
    assert snapshot.changes(model) == ["hooks of "]
    snapshot.restore(model)
    model(input=X)
    assert [list(kwargs) for kwargs in seen] == [["input"]]


def test_nan_is_the_same_as_itself():
    model = broken("parameter")
    assert Snapshot(model).changes(model) == []


def test_global_generators_are_put_back():
    def states():
        numpys = pickle.dumps(np.random.get_state())
        return torch.get_rng_state().tolist(), numpys, random.getstate()

    before = states()
    drawn = []
    for _ in range(2):
        with untouched_randomness(2**40 + 7):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
        assert states() == before
    assert drawn[0] == drawn[1]
    with pytest.raises(KeyError), untouched_randomness(1):
        raise KeyError
    assert states() == before


def test_a_subject_shows_the_names_of_the_model():
    model = network()
    assert [name for name, _ in Subject(model).named_parameters()] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]
