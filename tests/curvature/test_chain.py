"""Sending columns down a chain layer by layer is what autograd does for each column."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from assay.curvature import compute, plan
from assay.curvature.chain import find_chain

FUNCTIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "identity": nn.Identity(),
    "two in a row": nn.Sequential(nn.Tanh(), nn.ReLU()),
}


def linears(model: nn.Module, x: Tensor) -> tuple[Tensor, list]:
    """The output and the edges at the outputs of all linear layers, first to last."""
    edges = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, out: edges.append(get_gradient_edge(out)))
    return model(x), edges


@pytest.mark.parametrize("samples", [(4,), (4, 3)], ids=["matrix", "sequence"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_columns_are_those_of_autograd(name, columns, bias, samples):
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    model = nn.Sequential(
        nn.Linear(5, 6, bias=bias), function, nn.Linear(6, 7, bias=bias), function,
        nn.Linear(7, 2, bias=bias), nn.Tanh(),
    ).double()  # fmt: skip
    output, edges = linears(model, torch.randn(*samples, 5, dtype=torch.float64))
    V = torch.randn(columns, *output.shape, dtype=torch.float64)
    chain = find_chain(output, edges)
    assert chain is not None
    given = V.clone()
    found = list(chain.columns(V))  # kept to the end: no layer may write over another's
    assert torch.equal(V, given)
    assert [place for place, _ in found] == [2, 1, 0]
    for place, reached in found:
        for v, one in zip(V, reached, strict=True):
            (expected,) = torch.autograd.grad(output, [edges[place]], v, retain_graph=True)
            torch.testing.assert_close(one, expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = self.first(x)
        return z + self.second(torch.relu(z))


class AddedInsideTheProduct(Residual):
    def forward(self, x):
        z = self.first(x)
        return torch.addmm(z, self.second(z), torch.eye(4))


class TimesItself(Residual):
    def forward(self, x):
        z = self.second(self.first(x))
        return z @ z.T


class Scaled(Residual):
    def forward(self, x):
        z = self.second(self.first(x))
        return torch.addmm(torch.zeros(4), z, torch.eye(4), alpha=2)


class Softmax(Residual):
    def forward(self, x):
        return self.second(self.first(x).softmax(-1))


@pytest.mark.parametrize("kind", [Residual, AddedInsideTheProduct, TimesItself, Scaled, Softmax])
def test_other_graphs_are_no_chains(kind):
    output, edges = linears(kind(), torch.randn(4, 4))
    assert find_chain(output, edges) is None


def test_a_use_beside_the_chain_is_none():
    first, beside = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    output, other = first(x), beside(x)
    assert find_chain(output, [get_gradient_edge(output), get_gradient_edge(other)]) is None
    assert find_chain(output, [get_gradient_edge(output)]) is not None


@pytest.mark.parametrize("quantity", ["diag_ggn", "kflr"])
def test_the_number_of_columns_at_once_changes_nothing(quantity, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8)).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(8, (4,))

    def found() -> list[Tensor]:
        values = compute(model, nn.CrossEntropyLoss(), x, y, [quantity])[quantity].values()
        return [v if isinstance(v, Tensor) else v.to_dense() for v in values]

    whole = found()
    for rows in (1, 8, 12):  # one, two and three of seven columns
        monkeypatch.setattr(plan, "ROWS_AT_ONCE", rows)
        for one, other in zip(found(), whole, strict=True):
            torch.testing.assert_close(one, other)


def test_frozen_and_unselected_layers_in_between_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    whole = compute(model, nn.CrossEntropyLoss(), x, y, ["diag_ggn"])["diag_ggn"]
    for names in (["0.weight"], ["0.weight", "4.bias"], ["2.bias"], ["4.weight"]):
        some = compute(model, nn.CrossEntropyLoss(), x, y, ["diag_ggn"], params=names)["diag_ggn"]
        assert list(some) == names
        for name in names:
            torch.testing.assert_close(some[name], whole[name])
    model[2].requires_grad_(False)
    rest = compute(model, nn.CrossEntropyLoss(), x, y, ["diag_ggn"])["diag_ggn"]
    for name, value in rest.items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("samples", [(4,), (4, 3)], ids=["matrix", "sequence"])
def test_functions_in_place_change_nothing(samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(*samples, 3, dtype=torch.float64), torch.randint(3, samples[:1])
    whole = compute(model, nn.CrossEntropyLoss(), x, y, ["diag_ggn"])["diag_ggn"]
    model[1] = nn.ReLU(inplace=True)
    again = compute(model, nn.CrossEntropyLoss(), x, y, ["diag_ggn"])["diag_ggn"]
    for name, value in again.items():
        torch.testing.assert_close(value, whole[name])
