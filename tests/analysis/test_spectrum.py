"""Jacobians, Hessian blocks and tangent kernels against dense ones."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.analysis import (
    JacobianOperator,
    block_sharpness,
    mean_square_singular_value,
    ntk,
    ntk_condition_number,
    ntk_drift,
    sharpness,
    singular_values,
)
from assay.analysis.spectrum import HessianOperator, spectral_density, top_eigenvalues


def net(*sizes, activation=nn.Tanh):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Matrix:
    """A matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.shape = matrix, tuple(matrix.shape)
        self.dtype, self.device = matrix.dtype, matrix.device

    @property
    def T(self):
        return Matrix(self.matrix.T)

    def __matmul__(self, vectors):
        return self.matrix @ vectors


# -------------------------------------------------------------------------------------- Jacobian


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (net(5, 7, 3), (1, 5)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).double(), (2, 1, 5, 5)),
        (Recurrent().double(), (1, 4, 3)),
        (Attention().double(), (1, 3, 4)),
    ],
    ids=["mlp", "batchnorm", "lstm", "attention"],
)
def test_products_are_those_of_the_dense_jacobian(model, shape):
    x = torch.randn(shape, dtype=torch.float64)
    J = JacobianOperator(model, x)
    dense = J.to_dense()
    assert dense.shape == J.shape
    buffers = [b.clone() for b in model.buffers()]
    v, u = torch.randn(J.shape[1]).double(), torch.randn(J.shape[0]).double()
    torch.testing.assert_close(J @ v, dense @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(J.T @ u, dense.T @ u, rtol=1e-9, atol=1e-12)
    assert all(map(torch.equal, buffers, model.buffers()))
    step = 1e-6
    if not any(isinstance(m, nn.Dropout) for m in model.modules()):
        moved = model(x + step * v.view(shape)) - model(x - step * v.view(shape))
        torch.testing.assert_close(J @ v, moved.flatten() / (2 * step), rtol=1e-5, atol=1e-7)


def test_jacobian_of_columns_and_bad_vectors():
    J = JacobianOperator(net(4, 3), torch.zeros(1, 4).double())
    torch.testing.assert_close(J @ torch.eye(4).double(), J.to_dense())
    assert J.T.shape == (4, 3)
    assert J.T.T is J
    with pytest.raises(ValueError, match=r"expected a vector \(4,\)"):
        _ = J @ torch.ones(3).double()
    with pytest.raises(TypeError, match="floating"):
        JacobianOperator(nn.Identity(), torch.ones(3, dtype=torch.int64))


def test_an_output_that_ignores_the_input_has_a_zero_jacobian():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(2)

    J = JacobianOperator(Constant(), torch.zeros(3))
    assert not (J.T @ torch.ones(2)).any()
    assert not J.to_dense().any()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25), (40, 1)])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_singular_values_are_those_of_the_svd(shape, which):
    matrix = torch.randn(shape, dtype=torch.float64)
    k = min(3, *shape)
    found = singular_values(
        Matrix(matrix), k, which=which, tol=1e-10, generator=torch.Generator().manual_seed(0)
    )
    expected = torch.linalg.svdvals(matrix)
    expected = expected[:k] if which == "largest" else expected.flip(0)[:k]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.max()))


def test_singular_values_with_multiplicities_and_zeros():
    # Krylov spaces see each distinct value once: the basis has to be begun anew.
    matrix = torch.diag(torch.tensor([2.0, 2, 2, 1, 1, 0, 0], dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    found = singular_values(Matrix(matrix), 7, tol=1e-10, generator=g)
    torch.testing.assert_close(found, matrix.diagonal(), rtol=0, atol=1e-10)


def test_singular_values_of_a_large_matrix_take_few_products():
    matrix = torch.randn(300, 300, dtype=torch.float64)
    matrix += 100 * torch.outer(torch.ones(300), torch.ones(300)) / 300
    found = singular_values(Matrix(matrix), tol=1e-6, max_steps=40, generator=torch.Generator())
    torch.testing.assert_close(found[0], torch.linalg.matrix_norm(matrix, 2), rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="raise max_steps"):
        singular_values(Matrix(matrix), which="smallest", tol=1e-9, max_steps=40)
    with pytest.raises(ValueError, match="k must be in"):
        singular_values(Matrix(matrix), 301)
    with pytest.raises(ValueError, match="which"):
        singular_values(Matrix(matrix), which="middle")


def test_mean_square_is_the_frobenius_norm():
    J = JacobianOperator(net(20, 30), torch.zeros(1, 20).double())
    found = mean_square_singular_value(J, probes=400, generator=torch.Generator().manual_seed(0))
    expected = float(J.to_dense().square().sum() / 20)
    assert abs(float(found.mean) - expected) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.05 * expected
    with pytest.raises(ValueError, match="probes"):
        mean_square_singular_value(J, probes=1)


# --------------------------------------------------------------------------------------- Hessian


@pytest.fixture
def small():
    model = net(6, 5, 3)
    data = torch.randn(40, 6).double(), torch.arange(40) % 3
    H = HessianOperator(model, F.cross_entropy, data)
    return model, data, H, dense_hessian(model, data)


def dense_hessian(model, data):
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector):
        pieces = vector.split([s.numel() for s in shapes])
        tensors = {n: t.view(s) for n, t, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, tensors, data[0]), data[1])

    return torch.func.hessian(loss)(flat)


def test_top_eigenvalues_and_density_against_the_dense_hessian(small):
    _, _, H, dense = small
    values = torch.linalg.eigvalsh(dense)
    found, _ = top_eigenvalues(H, 5, which="largest", tol=1e-9, generator=torch.Generator())
    torch.testing.assert_close(found, values.flip(0)[:5], rtol=1e-6, atol=0)
    density = spectral_density(H, probes=4, steps=H.numel, generator=torch.Generator())
    x, y = density.grid(points=20_001)
    assert abs(float(((y[1:] + y[:-1]) / 2 * (x[1:] - x[:-1])).sum()) - 1) < 1e-8


def test_sharpness_says_what_the_eigenvalue_allows(small):
    model, data, _, dense = small
    top = float(torch.linalg.eigvalsh(dense)[-1])
    found = sharpness(model, F.cross_entropy, data, tol=1e-8)
    assert found.lambda_max == pytest.approx(top, rel=1e-6)
    assert found.max_lr == pytest.approx(2 / top, rel=1e-6)
    for share, word in ((0.2, "stable"), (0.8, "close to the edge"), (1.5, "unstable")):
        advice = sharpness(model, F.cross_entropy, data, lr=share * found.max_lr).advice
        assert word in advice
        assert f"{share:g} ×" in advice
    with pytest.raises(ValueError, match="lr"):
        sharpness(model, F.cross_entropy, data, lr=0.0)


def test_a_loss_that_curves_downwards_allows_every_rate():
    line = nn.Linear(1, 1, bias=False)
    found = sharpness(line, lambda out, y: -out.square().mean(), (torch.ones(2, 1), torch.zeros(2)))
    assert found.max_lr == math.inf
    assert "no direction" in found.advice


def test_blocks_are_those_of_the_dense_hessian(small):
    model, data, _, dense = small
    blocks = block_sharpness(model, F.cross_entropy, data, tol=1e-8)
    assert [block.layer for block in blocks] == ["0", "2"]
    start = 0
    for block in blocks:
        rows = slice(start, start + block.numel)
        expected = float(torch.linalg.eigvalsh(dense[rows, rows])[-1])
        assert block.lambda_max == pytest.approx(expected, rel=1e-6)
        start += block.numel


# ---------------------------------------------------------------------------------------- kernel


def dense_ntk(model, x, x2=None):
    model = model.eval()
    params = [p for p in model.parameters() if p.requires_grad]

    def rows(inputs):
        out = model(inputs)
        out = out[:, None] if out.ndim == 1 else out
        grads = [
            torch.autograd.grad(v, params, retain_graph=True, allow_unused=True,
                                materialize_grads=True)
            for v in out.flatten()
        ]  # fmt: skip
        return torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]).view(
            *out.shape, -1
        )

    J = rows(x)
    K = J if x2 is None else rows(x2)
    return torch.einsum("nap,mbp->nmab", J, K)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.again(torch.tanh(self.first(x)))))[:, 0]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (net(5, 7, 3), (6, 5)),
        (Tied().double(), (5, 4)),
        (Recurrent().double(), (3, 4, 3)),
        (Attention().double(), (3, 3, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                       nn.Linear(27, 2)).double(), (4, 1, 5, 5)),
    ],
    ids=["mlp", "tied", "lstm", "attention", "batchnorm"],
)  # fmt: skip
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_kernel_is_that_of_the_jacobian(model, shape, vectorize):
    model.train()
    x = torch.randn(shape, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = ntk(model, x, x[:2], chunk_size=2, vectorize=vectorize)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(found, dense_ntk(model, x, x[:2]), rtol=1e-8, atol=1e-11)


def test_the_kernel_of_some_parameters():
    model, x = net(4, 6, 2), torch.randn(5, 4).double()
    whole = ntk(model, x)
    parts = [
        ntk(model, x, params=lambda name, layer=layer: name.startswith(layer)) for layer in "02"
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(whole, whole.permute(1, 0, 3, 2))
    values = torch.linalg.eigvalsh(whole.permute(0, 2, 1, 3).reshape(10, 10))
    assert ntk_condition_number(whole) == pytest.approx(float(values[-1] / values[0]), rel=1e-6)


def test_a_singular_kernel_has_an_infinite_condition():
    x = torch.randn(1, 3).double().repeat(2, 1)
    assert ntk_condition_number(ntk(net(3, 2), x)) == math.inf


def test_drift_is_zero_at_the_start():
    kernel = torch.randn(3, 3, 2, 2)
    assert ntk_drift(kernel, kernel) == 0
    assert ntk_drift(-kernel, kernel) == pytest.approx(2)
    with pytest.raises(ValueError, match="start is zero"):
        ntk_drift(kernel, torch.zeros(3, 3, 2, 2))


def test_bad_arguments_of_the_kernel():
    model = net(3, 2)
    with pytest.raises(ValueError, match="chunk_size"):
        ntk(model, torch.zeros(2, 3).double(), chunk_size=0)
    with pytest.raises(ValueError, match="expected inputs"):
        ntk(model, torch.zeros(0, 3).double())
    with pytest.raises(ValueError, match="outputs must be"):
        ntk(nn.Sequential(model, nn.Unflatten(1, (2, 1))), torch.zeros(2, 3).double())
