"""Gauss-Newton quantities are those of the dense matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import KroneckerFactors, compute
from assay.functional import GGNOperator
from curvature_models import CASES, SAMPLES, ggn_blocks, largest_error, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
]
LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("name", CASES)
def test_diagonal_is_that_of_the_dense_matrix(name):
    model, x, y = make(name)
    found = compute(model, LOSS, x, y, ["diag_ggn"])["diag_ggn"]
    blocks = ggn_blocks(model, x, y)
    shapes = {k: p.shape for k, p in model.named_parameters()}
    expected = {k: block.diagonal().view(shapes[k]) for k, block in blocks.items()}
    assert largest_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_biases_scales_and_odd_parameters_are_exact(name):
    model, x, y = make(name)
    found = compute(model, LOSS, x, y, ["kflr"])["kflr"]
    blocks = ggn_blocks(model, x, y)
    lone = {k: f.to_dense() for k, f in found.items() if f.right is None}
    assert lone
    for k, dense in lone.items():
        torch.testing.assert_close(dense, blocks[k])


def test_kflr_is_exact_for_one_sample():
    for name in ("mlp", "layer-norm"):
        model, x, y = make(name, samples=1)
        found = compute(model, LOSS, x, y, ["kflr"])["kflr"]
        blocks = ggn_blocks(model, x, y)
        dense = {k: f.to_dense() for k, f in found.items()}
        assert largest_error(dense, blocks) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kflr_is_exact_for_a_deep_linear_network_with_squared_error(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    loss = nn.MSELoss(reduction=reduction)
    found = compute(model, loss, x, y, ["kflr"])["kflr"]
    dense = GGNOperator(model, loss, (x, y)).to_dense()
    start = 0
    for name, p in model.named_parameters():
        block = dense[start : start + p.numel(), start : start + p.numel()]
        torch.testing.assert_close(found[name].to_dense(), block)
        start += p.numel()


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
)
def test_diagonals_for_all_losses(loss):
    model, x, y = make("mlp")
    target = y if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(SAMPLES, 5).double()
    found = compute(model, loss, x, target, ["diag_ggn"])["diag_ggn"]
    expected = GGNOperator(model, loss, (x, target)).to_dense().diagonal()
    torch.testing.assert_close(torch.cat([v.flatten() for v in found.values()]), expected)


def test_outputs_with_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 2)).double()
    x, y = torch.randn(3, 2, 6).double(), torch.randint(4, (3, 3))
    found = compute(model, F.cross_entropy, x, y, ["diag_ggn"])["diag_ggn"]
    expected = GGNOperator(model, F.cross_entropy, (x, y)).to_dense().diagonal()
    torch.testing.assert_close(torch.cat([v.flatten() for v in found.values()]), expected)


@pytest.mark.parametrize("quantity", ["diag_ggn_mc", "kfac"])
def test_draws_are_unbiased(quantity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(2, 2).double(), torch.tensor([0, 2])
    exact = {"diag_ggn_mc": "diag_ggn", "kfac": "kflr"}[quantity]
    expected = compute(model, LOSS, x, y, [exact])[exact]
    g = torch.Generator().manual_seed(1)
    # 20 results of 200 draws each: their mean lies within 4 standard errors, 30 entries or so.
    draws = [
        compute(model, LOSS, x, y, [quantity], mc_samples=200, generator=g)[quantity]
        for _ in range(20)
    ]
    for name, value in expected.items():
        if quantity == "kfac":
            stacked, value = torch.stack([d[name].to_dense() for d in draws]), value.to_dense()
        else:
            stacked = torch.stack([d[name] for d in draws])
        error = stacked.std(0) / len(draws) ** 0.5
        assert ((stacked.mean(0) - value).abs() <= 4 * error + 1e-15).all(), name


def test_draws_depend_on_the_generator_alone():
    model, x, y = make("residual")
    names = ["diag_ggn_mc", "kfac"]
    one, two, other = (
        compute(model, LOSS, x, y, names, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    )
    torch.testing.assert_close(one["diag_ggn_mc"], two["diag_ggn_mc"])
    assert not torch.equal(one["diag_ggn_mc"]["head.bias"], other["diag_ggn_mc"]["head.bias"])


def test_kfra_is_kflr_for_one_sample_and_not_below_its_size():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(1, 1, 6, 6).double(), torch.tensor([1])
    found = compute(chain, LOSS, x, y, ["kflr", "kfra"])
    for name in found["kflr"]:
        torch.testing.assert_close(
            found["kfra"][name].to_dense(), found["kflr"][name].to_dense(), msg=name
        )
    with pytest.raises(ValueError, match=r"32 features.*max_features is 20"):
        compute(chain, LOSS, x, y, ["kfra"], max_features=20)
    model, x, y = make("residual")
    with pytest.raises(ValueError, match="chain"):
        compute(model, LOSS, x, y, ["kfra"])
    with pytest.raises(ValueError, match="chunk_size"):
        compute(model, LOSS, x, y, ["kfra"], chunk_size=2)


def test_kfra_of_a_linear_network_is_kflr_for_any_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    found = compute(model, nn.MSELoss(), x, y, ["kflr", "kfra"])
    for name in found["kflr"]:
        torch.testing.assert_close(
            found["kfra"][name].to_dense(), found["kflr"][name].to_dense(), msg=name
        )


def _chain_of(*activations):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), activations[0], nn.Flatten(), nn.Linear(32, 4), *activations,
        nn.Linear(4, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("activations", [
    lambda inplace: [nn.ReLU(inplace=inplace)],
    lambda inplace: [nn.LeakyReLU(0.1, inplace=inplace)],
    lambda inplace: [nn.ELU(inplace=inplace)],
    lambda inplace: [nn.GELU(), nn.ReLU(inplace=inplace)],
    lambda inplace: [nn.Dropout(inplace=inplace).eval(), nn.Hardtanh(inplace=inplace)],
])  # fmt: skip
def test_kfra_does_not_mind_functions_in_place(activations):
    x, y = torch.randn(5, 1, 6, 6).double(), torch.randint(3, (5,))
    expected = compute(_chain_of(*activations(False)), LOSS, x, y, ["kfra"])["kfra"]
    found = compute(_chain_of(*activations(True)), LOSS, x, y, ["kfra"])["kfra"]
    for name, factors in expected.items():
        torch.testing.assert_close(found[name].to_dense(), factors.to_dense())
    alone = compute(_chain_of(*activations(True)), LOSS, x[:1], y[:1], ["kfra", "kflr"])
    for name, factors in alone["kflr"].items():
        torch.testing.assert_close(alone["kfra"][name].to_dense(), factors.to_dense())


def test_kfra_refuses_what_branches_or_changes_a_view_in_place():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.first(x)
            return self.second(h.relu()) + h

    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    with pytest.raises(ValueError, match="chain"):
        compute(Branch(), LOSS, x, y, ["kfra"])
    view = nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 3)
    )  # fmt: skip
    with pytest.raises(ValueError, match="changes a view in place"):
        compute(view, LOSS, x.unsqueeze(1), y, ["kfra"])


def test_kfac_reduce_averages_positions_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(1, 5, 3).double()
    y = torch.tensor([1])

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x).mean(1)

    found = compute(Mean(), LOSS, x, y, ["kflr"], kfac_approx="reduce")["kflr"]
    # A linear network of a mean of positions is that of the mean: the reduced block is exact.
    blocks = ggn_blocks(Mean(), x, y)
    assert largest_error({k: f.to_dense() for k, f in found.items()}, blocks) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 2},
        {"stride": (2, 1), "padding": 1},
        {"dilation": (1, 2), "padding": 2},
        {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
    ],
    ids="-".join,
)
def test_factors_of_a_convolution_are_those_of_its_patches(settings):
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, **settings)
    groups = convolution.groups
    x, y = torch.randn(3, 4, 7, 6).double(), torch.tensor([0, 2, 1])
    hidden = convolution(x.float()).flatten(1).shape[1]
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(hidden, 3)).double()
    found = compute(model, LOSS, x, y, ["kflr"])["kflr"]["0.weight"]

    how = {name: getattr(convolution, name) for name in ("stride", "padding", "dilation")}
    patches = F.unfold(x, 3, **how).unflatten(1, (groups, -1))
    z = convolution(x)
    logits = model[1:](z)
    p = logits.detach().softmax(1)
    # Columns of a root of diag p − ppᵀ, and what they are at the convolution's output.
    root = p.sqrt().diag_embed() - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    columns = [
        torch.autograd.grad(logits, z, column, retain_graph=True)[0] for column in root.unbind(2)
    ]
    V = torch.stack(columns).flatten(3).unflatten(2, (groups, -1))
    positions = V.shape[-1]
    A = torch.einsum("ngit,ngjt->gij", patches, patches) / len(x)
    B = torch.einsum("kngit,kngjt->gij", V, V) / (len(x) * positions)
    assert found.grads_left
    torch.testing.assert_close(found.left, B)
    torch.testing.assert_close(found.right, A)


def test_curvature_on_some_of_the_samples():
    model, x, y = make("residual")
    index = torch.tensor([2, 0])
    found = compute(model, LOSS, x, y, ["grad", "batch_l2", "diag_ggn"], curvature_samples=index)
    some = compute(model, LOSS, x[index], y[index], ["diag_ggn"])
    whole = compute(model, LOSS, x, y, ["grad", "batch_l2"])
    assert largest_error(found["diag_ggn"], some["diag_ggn"]) < 1e-12
    assert largest_error(found["batch_l2"], whole["batch_l2"]) < 1e-12


def test_other_losses_are_refused_and_the_message_says_which_are_known():
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match="CrossEntropyLoss, MSELoss, BCEWithLogitsLoss"):
        compute(model, lambda z, y: F.nll_loss(z.log_softmax(1), y), x, y, ["diag_ggn"])


def test_large_odd_parameters_get_a_diagonal():
    model, x, y = make("unusual")
    small = compute(model, LOSS, x, y, ["kflr"])["kflr"]["matrix"]
    large = compute(model, LOSS, x, y, ["kflr"], max_features=3)["kflr"]["matrix"]
    assert large.left.shape == (1, 12)
    torch.testing.assert_close(large.diagonal(), small.diagonal())


class TestKroneckerFactors:
    def _all(self):
        model, x, y = make("convolutions")
        found = compute(model, LOSS, x, y, ["kflr"])["kflr"]
        model, x, y = make("embedded")
        return [*found.values(), *compute(model, LOSS, x, y, ["kflr"])["kflr"].values()]

    def test_products_are_those_of_the_dense_matrix(self):
        for factors in self._all():
            v = torch.randn(factors.shape, dtype=torch.float64)
            product = (factors.to_dense() @ v.flatten()).view(v.shape)
            torch.testing.assert_close(factors.matmul(v), product)
            torch.testing.assert_close(
                factors.diagonal(), factors.to_dense().diagonal().view(v.shape)
            )

    def test_inverse_of_damped_factors(self):
        damping = 0.3
        B, A = (m @ m.T for m in torch.randn(2, 4, 4, dtype=torch.float64))
        factors = KroneckerFactors((4, 4), B[None], A[None])
        pi = (A.trace() / B.trace()).sqrt()
        eye = torch.eye(4, dtype=torch.float64)
        damped = torch.kron(B + damping**0.5 / pi * eye, A + damping**0.5 * pi * eye)
        torch.testing.assert_close(factors.inv(damping).to_dense(), torch.linalg.inv(damped))
        alone = KroneckerFactors((4,), B[None]).inv(damping)
        torch.testing.assert_close(alone.to_dense(), torch.linalg.inv(B + damping * eye))

    def test_inverse_of_zero_factors_is_finite(self):
        zero = KroneckerFactors((2, 3), torch.zeros(1, 2, 2), torch.zeros(1, 3, 3))
        torch.testing.assert_close(zero.inv(0.25).to_dense(), torch.eye(6) * 4)

    def test_state_dict_round_trip(self):
        for factors in self._all():
            again = KroneckerFactors.from_state_dict(factors.state_dict())
            torch.testing.assert_close(again.to_dense(), factors.to_dense())
            assert again.grads_left == factors.grads_left

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="do not fit"):
            KroneckerFactors((2, 3), torch.eye(2)[None], torch.eye(2)[None])
        singular = KroneckerFactors((2,), torch.full((1, 2, 2), 2.0**66))
        with pytest.raises(ValueError, match=r"float32.*damping is too small"):
            singular.inv(1e-2)
        factors = KroneckerFactors((2,), torch.eye(2)[None])
        with pytest.raises(ValueError, match="damping must be positive"):
            factors.inv(0.0)
        with pytest.raises(ValueError, match="expected shape"):
            factors.matmul(torch.ones(3))
