"""LSUV against lsuv, Hessian spectra against curvlinops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.analysis.spectrum import HessianOperator, top_eigenvalues
from assay.optim import lsuv_

pytestmark = pytest.mark.parity

REASON = "not installed: pip install --no-deps -r tests/parity/requirements.txt"


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def variances(net, x):
    found = {}
    handles = [
        layer.register_forward_hook(
            lambda m, i, o, name=name: found.update({name: o.var(correction=0).item()})
        )
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return found


def test_lsuv_leaves_the_variances_that_lsuv_leaves():
    lsuv = pytest.importorskip("lsuv", reason=REASON)
    torch.manual_seed(0)
    ours = convolutions().eval()
    theirs = copy.deepcopy(ours)
    x = 3 + 5 * torch.randn(64, 1, 8, 8)
    said = lsuv_(ours, x, tol=1e-3)
    lsuv.lsuv_with_singlebatch(theirs, x, std_tol=5e-4, verbose=False)
    mine, peer = variances(ours, x), variances(theirs, x)
    assert mine == pytest.approx(said, rel=1e-4)
    # A standard deviation within 5e-4 of 1 is a variance within 1e-3 of 1.
    assert mine == pytest.approx(peer, abs=2.1e-3)
    assert not any(layer.bias.any() for layer in theirs.modules() if isinstance(layer, nn.Linear))
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        if isinstance(one, nn.Conv2d | nn.Linear):
            # Another orthogonal matrix, and so another scale, of the same kind.
            gram = (one.weight.flatten(1) @ one.weight.flatten(1).T).diagonal()
            assert torch.allclose(gram, gram[:1].expand_as(gram), rtol=1e-4)
            assert 0.5 < (one.weight.norm() / other.weight.norm()).item() < 2


def test_top_eigenvalues_are_those_of_curvlinops_operators():
    curvlinops = pytest.importorskip("curvlinops", reason=REASON)
    linalg = pytest.importorskip("scipy.sparse.linalg")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    data = torch.randn(50, 20).double(), torch.arange(50) % 4
    theirs = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [data], check_deterministic=False
    )
    expected = linalg.eigsh(theirs.to_scipy(), k=5, which="LA", tol=1e-10)[0][::-1]
    ours = HessianOperator(net, F.cross_entropy, data)
    found, _ = top_eigenvalues(ours, 5, which="largest", tol=1e-8, generator=torch.Generator())
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
