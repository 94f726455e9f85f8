"""The diagonal of the Hessian is that of the dense matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import compute
from assay.curvature import hessian as module
from assay.functional import HessianOperator
from curvature_models import CASES, largest_error, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
]
# Second derivatives of the others take a dense matrix that is too large for a test.
SMALL = [name for name in CASES if name not in ("convolutions", "language-model-time-first")]


def _dense_diagonal(model, loss_fn, x, y):
    operator = HessianOperator(model, loss_fn, (x, y))
    return operator.layout.unflatten(operator.to_dense().diagonal())


@pytest.mark.parametrize("name", SMALL)
def test_exact(name):
    model, x, y = make(name)
    found = compute(model, F.cross_entropy, x, y, ["diag_hessian"])["diag_hessian"]
    expected = _dense_diagonal(model, F.cross_entropy, x, y)
    scale = max(v.abs().max() for v in expected.values())
    for k, v in expected.items():
        assert (found[k] - v).abs().max() <= 1e-10 * scale, k


def test_signed_roots_and_columns_agree(monkeypatch):
    for name in ("mlp", "residual", "convolutions-1d-3d"):
        model, x, y = make(name)
        used = []
        original = module._signed_roots
        monkeypatch.setattr(
            module, "_signed_roots", lambda p, b, f=original, u=used: (u.append(1), f(p, b))[1]
        )
        columns = module._column_by_column
        monkeypatch.setattr(module, "LARGEST", 10**6)
        roots = compute(model, F.cross_entropy, x, y, ["diag_hessian"])["diag_hessian"]
        monkeypatch.setattr(module, "_bends", lambda *args: None)
        other = compute(model, F.cross_entropy, x, y, ["diag_hessian"])["diag_hessian"]
        monkeypatch.undo()
        assert largest_error(roots, other) < 1e-9
        assert columns is module._column_by_column


def test_relu_networks_have_the_gauss_newton_diagonal():
    model, x, y = make("relu-mlp")
    found = compute(model, F.cross_entropy, x, y, ["diag_hessian", "diag_ggn"])
    assert largest_error(found["diag_hessian"], found["diag_ggn"]) < 1e-12


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")])
def test_other_losses(loss):
    model, x, _ = make("mlp")
    target = torch.rand(len(x), 5).double()
    found = compute(model, loss, x, target, ["diag_hessian"])["diag_hessian"]
    assert largest_error(found, _dense_diagonal(model, loss, x, target)) < 1e-9


def test_a_loss_without_known_curvature_goes_column_by_column():
    model, x, y = make("mlp")

    def loss_fn(z, y):
        return F.nll_loss(z.log_softmax(1), y)

    found = compute(model, loss_fn, x, y, ["diag_hessian"])["diag_hessian"]
    assert largest_error(found, _dense_diagonal(model, F.cross_entropy, x, y)) < 1e-9


def test_estimate_is_unbiased_and_says_how_far_off_it_is():
    for name in ("mlp", "language-model"):
        model, x, y = make(name)
        g = torch.Generator().manual_seed(0)
        found = compute(model, F.cross_entropy, x, y, ["diag_hessian_mc"], mc_samples=400,
                        generator=g)["diag_hessian_mc"]  # fmt: skip
        expected = _dense_diagonal(model, F.cross_entropy, x, y)
        for k, v in expected.items():
            # Five standard errors, for some hundred entries with heavy tails.
            off = (found[k].mean - v).abs()
            assert (off <= 5 * found[k].standard_error + 1e-12).all(), k


def test_costs_are_bounded(monkeypatch):
    model, x, y = make("mlp")
    monkeypatch.setattr(module, "LARGEST", 10)
    with pytest.raises(ValueError, match=r"16 backward passes.*diag_hessian_mc"):
        compute(model, F.cross_entropy, x, y, ["diag_hessian"])
    with pytest.raises(ValueError, match="at least 2"):
        compute(model, F.cross_entropy, x, y, ["diag_hessian_mc"], mc_samples=1)


def test_an_estimate_needs_no_setting():
    model, x, y = make("mlp")

    def found(**settings):
        g = torch.Generator().manual_seed(0)
        names = ["diag_hessian_mc"]
        return compute(model, F.cross_entropy, x, y, names, generator=g, **settings)[names[0]]

    for name, estimate in found().items():
        torch.testing.assert_close(estimate.mean, found(mc_samples=2)[name].mean)
        assert torch.isfinite(estimate.standard_error).all()
        assert (estimate.standard_error > 0).any()


def test_an_estimate_of_a_diagonal_matrix_has_no_error():
    # The Hessian of (1/N) Σ (w ⊙ x_n)² is diagonal: every draw is the diagonal itself.
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = compute(Scale(), nn.MSELoss(), x, 0 * x, ["diag_hessian_mc"], mc_samples=50)
    estimate = found["diag_hessian_mc"]["scale"]
    torch.testing.assert_close(estimate.mean, 2 * x.square().mean(0) / 3)
    assert (estimate.standard_error <= 1e-7 * estimate.mean).all()


@pytest.mark.parametrize("first", [nn.GELU(), nn.Softplus(), nn.Tanh()])
def test_functions_in_place_after_smooth_ones(first):
    if isinstance(first, nn.Tanh):
        second: nn.Module = nn.Flatten()  # tanh needs its output: nothing may change it
    else:
        second = nn.Threshold(0.1, 0.0, inplace=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), first, second, nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    found = compute(model, F.cross_entropy, x, y, ["diag_hessian"])["diag_hessian"]
    assert largest_error(found, _dense_diagonal(model, F.cross_entropy, x, y)) < 1e-9


def test_an_input_that_is_changed_after_a_smooth_function_saw_it():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.first(x)
            out = self.second(h.tanh())
            h.mul_(0)  # tanh has kept its output alone
            return out

    torch.manual_seed(0)
    model, x, y = Late().double(), torch.randn(5, 3).double(), torch.randint(3, (5,))
    found = compute(model, F.cross_entropy, x, y, ["diag_hessian"])["diag_hessian"]
    assert largest_error(found, _dense_diagonal(model, F.cross_entropy, x, y)) < 1e-9
