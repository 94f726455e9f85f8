"""Models that use parameters as users do: several times, in parts, made of others, re-computed."""

import collections
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from assay.curvature import compute, directional_curvature, extend
from assay.functional import GGNOperator, HessianOperator
from curvature_models import largest_error, make

FIRST = ("grad", "grad_batch", "batch_l2", "second_moment", "variance")
SAMPLES = 4


class Twice(nn.Module):
    """A chain in which one layer comes twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.out = nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x):
        return self.out(self.shared(self.shared(x).tanh()))


class LinearTwice(Twice):
    """No activation: the only second derivative is that of the weight with itself."""

    def forward(self, x):
        return self.out(self.shared(self.shared(x)))


class SharedHead(nn.Module):
    """One head on two views of the input, side by side."""

    def __init__(self):
        super().__init__()
        self.head, self.out = nn.Linear(3, 2), nn.Linear(4, 5)

    def forward(self, x):
        return self.out(torch.cat([self.head(x), self.head(2 * x).tanh()], 1))


class Experts(nn.Module):
    """Samples go to one expert or the other; now and then to none of them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))
        self.gate = nn.Linear(3, 2)

    def forward(self, x):
        gate = self.gate(x).softmax(1)
        chosen, out = gate.argmax(1), torch.zeros(len(x), 5, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]) * gate[rows, i : i + 1])
        return out


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out(checkpoint(self.body, x, use_reentrant=False))


class Parts(nn.Module):
    """Heads in a list, a bias in a dictionary, put together before they are used."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ParameterList(torch.randn(rows, 3) for rows in (2, 3))
        self.biases = nn.ParameterDict({"out": torch.randn(5)})

    def forward(self, x):
        return F.linear(x, torch.cat(list(self.heads)), self.biases["out"])


class Contracted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(2, 3, 4)),
            nn.Parameter(torch.randn(4, 5)),
        )
        self.heads = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.einsum("nd,hde,eo,h->no", x, self.first, self.second, self.heads)


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 5))
        self.body = nn.Sequential(normed, nn.Tanh(), orthogonal)

    def forward(self, x):
        return self.body(x)


class Adapted(nn.Module):
    """A low-rank addition to a frozen layer."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out((self.base(x) + x @ self.down.T @ self.up.T).tanh())


class Merged(Adapted):
    """The same with the addition made to the weight."""

    def forward(self, x):
        return self.out(F.linear(x, self.base.weight + self.up @ self.down, self.base.bias).tanh())


class Mirrored(nn.Module):
    """An encoder whose transpose decodes."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 5)

    def forward(self, x):
        return self.out(F.linear(F.linear(x, self.weight).tanh(), self.weight.T))


class Lengths(nn.Module):
    """Packed sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        lengths = 1 + (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(
            x.unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False
        )
        return self.out(self.rnn(packed)[1][0])


KINDS = [
    Twice, LinearTwice, SharedHead, Experts, Checkpointed, Parts, Contracted, Parametrized, Adapted,
    Merged, Mirrored, Lengths,
]  # fmt: skip


def _case(kind):
    torch.manual_seed(1)
    model = kind().double().eval()
    return model, torch.randn(SAMPLES, 3).double(), torch.randint(5, (SAMPLES,))


def _trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rows(model, x, y):
    params = _trained(model)
    found = [
        torch.autograd.grad(
            F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(params.values()),
            allow_unused=True, materialize_grads=True,
        )
        for n in range(len(x))
    ]  # fmt: skip
    return {k: torch.stack(g) for k, g in zip(params, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_that_of_a_loop(kind):
    model, x, y = _case(kind)
    rows = _rows(model, x, y)
    found = compute(model, F.cross_entropy, x, y, FIRST)
    with extend(model, None, ["grad_batch", "variance"]) as beside:
        F.cross_entropy(model(x), y).backward()
    for q in (found, beside, compute(model, F.cross_entropy, x, y, FIRST, chunk_size=3)):
        assert largest_error(q["grad_batch"], rows) < 1e-10
        spread = {k: r.var(0, correction=0) for k, r in rows.items()}
        assert largest_error(q["variance"], spread) < 1e-10
    assert largest_error(found["grad"], {k: r.mean(0) for k, r in rows.items()}) < 1e-10
    norms = {k: r.reshape(len(r), -1).square().sum(1) for k, r in rows.items()}
    assert largest_error(found["batch_l2"], norms) < 1e-10
    moments = {k: r.square().mean(0) for k, r in rows.items()}
    assert largest_error(found["second_moment"], moments) < 1e-10


@pytest.mark.parametrize(
    ("kind", "samples"), [*((kind, SAMPLES) for kind in KINDS), (Twice, 1), (Experts, 1)]
)
def test_diagonals_are_those_of_the_dense_matrices(kind, samples):
    model, x, y = _case(kind)
    x, y = x[:samples], y[:samples]
    names = ["diag_ggn", "diag_hessian", "kfac", "kflr", "diag_ggn_mc", "diag_hessian_mc"]
    found = compute(model, F.cross_entropy, x, y, names)
    for quantity, operator in (("diag_ggn", GGNOperator), ("diag_hessian", HessianOperator)):
        matrix = operator(model, F.cross_entropy, (x, y))
        expected = matrix.layout.unflatten(matrix.to_dense().diagonal())
        largest = max(float(v.abs().max()) for v in expected.values())
        for name, diagonal in expected.items():
            off = (found[quantity][name] - diagonal).abs().max()
            assert float(off) < 1e-10 * largest, (quantity, name)
    assert set(found["kfac"]) == set(found["kflr"]) == set(_trained(model))


@pytest.mark.parametrize("kind", [Twice, Checkpointed, Merged])
def test_the_split_along_the_gradient(kind):
    model, x, y = _case(kind)
    found = directional_curvature(model, F.cross_entropy, (x, y))
    hessian = HessianOperator(model, F.cross_entropy, (x, y)).to_dense()
    ggn = GGNOperator(model, F.cross_entropy, (x, y)).to_dense()
    rows = _rows(model, x, y)
    g = torch.cat([r.mean(0).flatten() for r in rows.values()])
    g = g / g.norm()
    assert found.total == pytest.approx(float(g @ hessian @ g), rel=1e-9, abs=1e-12)
    assert found.gauss_newton == pytest.approx(float(g @ ggn @ g), rel=1e-9, abs=1e-12)


def test_a_gauss_newton_matrix_of_jacobians_agrees_where_layers_are_checkpointed():
    model, x, y = _case(Checkpointed)
    params = list(model.parameters())
    total: torch.Tensor | float = 0.0
    for z in model(x):
        p = z.detach().softmax(0)
        J = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(e, params, retain_graph=True)])
            for e in z
        ])  # fmt: skip
        total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J / len(x)
    torch.testing.assert_close(GGNOperator(model, F.cross_entropy, (x, y)).to_dense(), total)


# -- parameters in the loss ----------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.scale = nn.Linear(3, 5), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.line(x)


LOSSES = {
    "penalty": lambda model: (
        lambda z, y, **how: F.cross_entropy(z, y, **how) + 0.1 * model.line.weight.square().sum()
    ),
    "learned weighting": lambda model: (
        lambda z, y, **how: F.cross_entropy(z, y, **how) * (-model.scale).exp() + model.scale
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_parameters_in_the_loss_need_its_terms(kind):
    torch.manual_seed(0)
    model, x, y = Scaled().double(), torch.randn(4, 3).double(), torch.randint(5, (4,))
    loss_fn = LOSSES[kind](model)
    with pytest.raises(ValueError, match=r"in the loss beside the model's output.*one value a"):
        compute(model, loss_fn, x, y, ["grad_batch"])
    with pytest.raises(ValueError, match="in the loss beside"), extend(model, None, ["variance"]):
        loss_fn(model(x), y).backward()
    expected = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()),
                                   allow_unused=True, materialize_grads=True)  # fmt: skip
    plain = compute(model, loss_fn, x, y, ["grad"])["grad"]
    terms = compute(model, lambda z, y: loss_fn(z, y, reduction="none"), x, y, FIRST)
    for name, gradient in zip(plain, expected, strict=True):
        torch.testing.assert_close(plain[name], gradient)
        torch.testing.assert_close(terms["grad"][name], gradient)
        torch.testing.assert_close(terms["grad_batch"][name].mean(0), gradient)


def test_a_temperature_that_the_loss_divides_by():
    torch.manual_seed(0)
    model, x, y = Scaled().double(), torch.randn(4, 3).double(), torch.randint(5, (4,))

    def loss_fn(z, y):
        return F.cross_entropy(z / model.scale, y)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) / self.model.scale

    expected = compute(Whole(), F.cross_entropy, x, y, ["grad_batch", "diag_ggn"])
    found = compute(model, loss_fn, x, y, ["grad_batch", "diag_ggn"])
    for quantity, entries in expected.items():
        renamed = {name.removeprefix("model."): value for name, value in entries.items()}
        assert largest_error(found[quantity], renamed) < 1e-12


# -- what comes in and what stays ----------------------------------------------------------------


def test_any_mapping_is_keyword_arguments():
    class Inputs(collections.UserDict):  # what tokenizers return
        pass

    model, x, y = make("mlp")

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x)

    found = compute(Keyword(), F.cross_entropy, Inputs(x=x), y, ["variance"], chunk_size=3)
    expected = compute(model, F.cross_entropy, x, y, ["variance"])["variance"]
    renamed = {name.removeprefix("body."): v for name, v in found["variance"].items()}
    assert largest_error(renamed, expected) < 1e-10
    total = directional_curvature(Keyword(), F.cross_entropy, (Inputs(x=x), y)).total
    assert total == pytest.approx(directional_curvature(model, F.cross_entropy, (x, y)).total)


def test_tensors_of_inference_mode():
    model, x, y = make("mlp")
    expected = compute(model, F.cross_entropy, x, y, ["grad_batch", "diag_ggn", "kflr"])
    with torch.inference_mode():
        inference = x.clone()
        inside = compute(model, F.cross_entropy, inference, y.clone(), ["grad_batch", "diag_ggn"])
    after = compute(model, F.cross_entropy, inference, y, ["grad_batch", "diag_ggn", "kflr"])
    for found in (inside, after):
        for quantity in ("grad_batch", "diag_ggn"):
            assert largest_error(found[quantity], expected[quantity]) < 1e-12


@pytest.mark.parametrize("quantity", ["grad_batch", "kfac"])
@pytest.mark.parametrize("kind", [Parametrized, Merged])
def test_nothing_waits_for_the_garbage_collector(kind, quantity):
    model, x, y = _case(kind)
    alive = []

    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    compute(model, F.cross_entropy, x, y, [quantity])
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        handle = model.register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
        for _ in range(3):
            compute(model, F.cross_entropy, x, y, [quantity])
            with extend(model, nn.CrossEntropyLoss(), [quantity]):
                F.cross_entropy(model(x), y).backward()
        handle.remove()
        model.zero_grad()
        assert tensors() <= before
        assert not any(output() is not None for output in alive)
    finally:
        gc.enable()


def test_buffers_that_a_pass_writes_to_carry_no_mark():
    class Remembers(nn.Linear):
        def __init__(self):
            super().__init__(3, 5)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("last", torch.zeros(4, 3))

        def forward(self, x):
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0))
                self.last[:] = x
            return super().forward(x)

    model, x, y = Remembers(), torch.randn(4, 3), torch.randint(5, (4,))
    compute(model, F.cross_entropy, x, y, ["grad_batch"])
    with extend(model, None, ["grad_batch"]):
        F.cross_entropy(model(x), y).backward()
    assert not any(vars(buffer) for buffer in model.buffers())


def test_factors_of_a_layer_that_pieces_use_in_different_ways_are_refused():
    model, x, y = _case(Experts)
    with pytest.raises(ValueError, match=r"differ in form between pieces.*chunk_size"):
        compute(model, F.cross_entropy, x, y, ["kflr"], chunk_size=3)
    assert compute(model, F.cross_entropy, x, y, ["diag_ggn"], chunk_size=3).samples == SAMPLES
