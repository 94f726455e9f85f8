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
        compute(model, F.cross_entropy, x, y, ["diag_hessian_mc"])
