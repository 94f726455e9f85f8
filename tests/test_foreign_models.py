"""Models that are not Assay's go through curvature, spectra, boundaries and landscape slices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.analysis import DeepDIG
from assay.curvature import compute, directional_curvature
from assay.functional import GGNOperator, HessianOperator, spectral_density
from assay.landscape import random_plane, scan_plane


class Block(nn.Module):
    """A residual block as everyone writes it."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return F.relu(x + self.body(x))


class Residual(nn.Module):
    """Six layers with weights: a stem, two blocks, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class Patches(nn.Module):
    """A small vision transformer: patches, learned positions, pre-norm attention, GELU."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(4, 8)
        self.position = nn.Parameter(0.1 * torch.randn(4, 8))
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        h = self.patch(patches) + self.position
        z = self.norm(h)
        heads = [f(z).unflatten(-1, (2, 4)).transpose(1, 2) for f in
                 (self.query, self.key, self.value)]  # fmt: skip
        h = h + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head((h + self.mlp(h)).mean(1))


class Bert(nn.Module):
    """A randomly initialised BERT with two layers, fed with embeddings; its output is a mapping."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=6, num_labels=3,
        )  # fmt: skip
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, x):
        return self.bert(inputs_embeds=x.flatten(1).unflatten(1, (2, 8)))


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output["logits"]


def loss(output, target):
    return F.cross_entropy(logits_of(output), target)


class Logits(nn.Module):
    """What a user writes around a model whose output is a mapping."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return logits_of(self.model(x))


@pytest.fixture(params=[Residual, Patches, Bert])
def case(request):
    torch.manual_seed(0)
    model = request.param().double().eval()
    g = torch.Generator().manual_seed(1)
    x = torch.rand(9, 1, 4, 4, generator=g, dtype=torch.float64)
    return model, x, torch.arange(9) % 3


def test_every_quantity_of_the_curvature_engine(case):
    model, x, y = case
    wanted = ("grad", "grad_batch", "batch_l2", "variance", "diag_ggn", "kfac", "kflr")
    found = compute(model, loss, x, y, wanted, generator=torch.Generator().manual_seed(0))
    params = {name: p for name, p in model.named_parameters() if name in found["grad"]}
    assert len(params) == len(list(model.parameters()))
    value = loss(model(x), y)
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True,
                                materialize_grads=True)  # fmt: skip
    for (name, _), grad in zip(params.items(), grads, strict=True):
        torch.testing.assert_close(found["grad"][name], grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["grad_batch"][name].mean(0), grad, rtol=1e-9, atol=1e-12)
    ggn = GGNOperator(model, loss, (x, y))
    trace = sum(d.sum() for d in found["diag_ggn"].values())
    draws = [v @ (ggn @ v) for v in torch.eye(ggn.numel, dtype=torch.float64)[::41]]
    diagonal = torch.cat([d.reshape(-1) for d in found["diag_ggn"].values()])
    torch.testing.assert_close(torch.stack(draws), diagonal[::41], rtol=1e-8, atol=1e-12)
    assert trace > 0


def test_directional_curvature_and_spectrum(case):
    model, x, y = case
    found = directional_curvature(model, loss, (x, y))
    hessian = HessianOperator(model, loss, (x, y))
    g = hessian.gradient()
    assert found.total == pytest.approx(float(g @ (hessian @ g) / (g @ g)), rel=1e-8)
    assert found.gauss_newton > 0
    density = spectral_density(
        GGNOperator(model, loss, (x, y)), probes=2, steps=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert density.moment(1) > 0
    assert float(density.nodes.min()) > -1e-9  # the Gauss-Newton matrix has no negative part


def test_boundary_between_two_classes(case):
    model = case[0]
    g = torch.Generator().manual_seed(2)
    inputs = torch.rand(400, 1, 4, 4, generator=g, dtype=torch.float64)
    # Nets with random weights favour one class: move the boundary into the data.
    plain = Logits(model)
    with torch.no_grad():
        shift = plain(inputs).median(0).values
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    with torch.no_grad():
        head.bias -= shift
        said = plain(inputs).argmax(1)
    counts = torch.bincount(said, minlength=3)
    s, t = counts.topk(2).indices.tolist()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    torch.manual_seed(0)
    dig = DeepDIG(plain, s, t, alpha=3.0, steps=300, min_survivors=5).fit(inputs[said == s])
    samples = dig.generate()
    assert samples.success.double().mean() > 0.5
    p = plain(samples.x[samples.success]).softmax(1)
    assert (p[:, s] - p[:, t]).abs().max() < 1e-4
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def test_landscape_slice(case):
    model, x, y = case
    plain = Logits(model)
    axis = torch.tensor([-0.3, 0.0, 0.3], dtype=torch.float64)
    plane = random_plane(plain, generator=torch.Generator().manual_seed(0))
    found = scan_plane(
        plain, plane, {"train": [(x, y)]}, first=axis, second=axis, bn_batches=[(x, y)]
    )["train"].loss.view(3, 3)
    assert found.isfinite().all()
    assert found.unique().numel() == 9
    if isinstance(model, Residual):
        return  # its centre is evaluated with statistics recomputed from these data
    assert found[1, 1].item() == pytest.approx(loss(model(x), y).item(), rel=1e-9)
