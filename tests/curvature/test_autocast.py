"""Under autocast quantities are those of float32, as exact as bfloat16 lets them be."""

import pytest
import torch
from torch import Tensor, nn

from assay.curvature import QUANTITIES, KroneckerFactors, compute, extend
from assay.functional import Estimate
from curvature_models import CASES, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
LOSS = nn.CrossEntropyLoss()
# Rounding to bfloat16 loses 2⁻⁹; some ten roundings lie between the input and a gradient, and
# squares double the loss.
TOLERANCE = 20 * 2**-9
NETWORKS = {
    "linear": (lambda: nn.Linear(20, 5), (6, 20)),
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5)), (6, 20)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)),
        (6, 1, 8, 8),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(20, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5)),
        (6, 20),
    ),
}
PAIRS = [(n, q) for n in NETWORKS for q in QUANTITIES if (n, q) != ("layer norm", "kfra")]


def tensors(entries) -> list[Tensor]:
    """All numbers of a quantity, factors apart."""
    found: list[Tensor] = []
    for entry in entries.values():
        if isinstance(entry, KroneckerFactors):
            found += entry.factors
        elif isinstance(entry, Estimate):
            found.append(entry.mean)
        else:
            found.append(entry)
    return found


def error(found, expected) -> float:
    """Norm of the difference over the norm, for all parameters together."""
    one, other = (torch.cat([t.flatten() for t in tensors(e)]) for e in (found, expected))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("network", "quantity"), PAIRS)
def test_values_and_dtypes(network, quantity):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, x, y = build(), torch.randn(shape), torch.randint(5, shape[:1])

    def draws():
        return torch.Generator().manual_seed(0)

    expected = compute(model, LOSS, x, y, [quantity], generator=draws())[quantity]
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(model, LOSS, x, y, [quantity], generator=draws())[quantity]
    assert {t.dtype for t in tensors(found)} == {torch.float32}
    assert error(found, expected) < TOLERANCE
    with extend(model, LOSS, [quantity], generator=draws()) as beside:
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSS(model(x), y)
        loss.backward()
    torch.testing.assert_close(tensors(beside[quantity]), tensors(found))


@pytest.mark.parametrize("quantity", ["variance", "diag_ggn", "kflr"])
@pytest.mark.parametrize("name", CASES)
def test_any_model(name, quantity):
    model, x, y = make(name, torch.float32)
    expected = compute(model, LOSS, x, y, [quantity])[quantity]
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(model, LOSS, x, y, [quantity])[quantity]
    assert {t.dtype for t in tensors(found)} == {torch.float32}
    assert error(found, expected) < 2 * TOLERANCE  # up to six layers and a softmax between
