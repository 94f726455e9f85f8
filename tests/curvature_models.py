"""Models of all kinds with a batch for each, for the tests of the curvature engine."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """Six layers with weights, a skip, BatchNorm, adaptive pooling."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 3, 1)
        self.third = nn.Conv2d(3, 3, 3, padding="same", dilation=2)
        self.head = nn.Linear(3, 5)
        self.activation = activation
        self.norm.running_mean.copy_(torch.randn(3))
        self.norm.running_var.copy_(torch.rand(3) + 0.5)

    def forward(self, x):
        h = self.activation(self.norm(self.stem(x)))
        h = h + self.second(self.activation(self.first(h)))
        h = self.third(h)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class LanguageModel(nn.Module):
    """Tied embedding and output, learned positions, a class token, torch's encoder layer."""

    def __init__(self, batch_first=True, vocabulary=7, width=4):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(5, width)
        self.token = nn.Parameter(torch.randn(width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.0, batch_first=batch_first)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        h = torch.cat([self.token.expand(len(h), 1, -1), h], 1)
        h = self.layer(h) if self.batch_first else self.layer(h.transpose(0, 1)).transpose(0, 1)
        return self.out(h[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **settings):
        super().__init__()
        self.rnn = kind(3, 4, **settings)
        self.head = nn.Linear(self.width(settings), 5)
        self.axis = 1 if settings.get("batch_first") else 0

    @staticmethod
    def width(settings):
        return settings.get("proj_size", 4) * (2 if settings.get("bidirectional") else 1)

    def forward(self, x):
        x = x if self.axis else x.transpose(0, 1)
        return self.head(self.rnn(x)[0].mean(self.axis))


class Double(torch.autograd.Function):
    """Doubles, past every torch function."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Unusual(nn.Module):
    """Parameters where no module's forward uses them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.slope = nn.Parameter(torch.rand(1))
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.mask = nn.Parameter(torch.randn(5, 3))
        self.hidden = nn.Parameter(torch.randn(3))
        self.shift = nn.Parameter(torch.randn(()))
        self.assigned = nn.Parameter(torch.randn(3))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x):
        h = torch.einsum("ni,ij->nj", x * self.scale, self.matrix)
        h = F.prelu(h, self.slope) + Double.apply(self.hidden) / 3
        h = self.normed(h)
        h = torch.where(h > 0, h, self.shift * h)
        extra = torch.zeros_like(h)
        extra[:, 1:] = self.assigned[1:] * h[:, :1]
        extra[:, 0] = self.assigned[0]
        return F.linear(h + extra, self.weight * torch.sigmoid(self.mask))


class Folded(nn.Module):
    """Positions folded into the batch, time first, and as many positions as samples."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 5)

    def forward(self, x):
        n, t, d = x.shape
        if self.mode == "fold":
            h = self.norm(self.first(x.reshape(n * t, d)).tanh()).view(n, t, -1)
        elif self.mode == "time-major-fold":
            h = self.norm(self.first(x.transpose(0, 1).reshape(n * t, d)).tanh())
            h = h.view(t, n, -1).transpose(0, 1)
        else:
            h = self.norm(self.first(x.transpose(0, 1)).tanh()).transpose(0, 1)
        return self.second(h.mean(1))


class Embedded(nn.Module):
    """GPT-2's linear map, an embedding with padding, RMSNorm, a cell in a loop."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.norm = nn.RMSNorm(4)
        self.cell = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = torch.addmm(self.bias, h.view(-1, 4), self.weight).view(h.shape)
        h = self.norm(h)
        state = torch.zeros(len(tokens), 4, dtype=h.dtype)
        for step in h.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, kdim=3)
        self.plain = nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        q = F.pad(x, (0, 1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h, _ = self.attention(q, x, q, attn_mask=mask)
        h, _ = self.plain(h, q, q, need_weights=False)
        return self.head(h.mean(1))


def _convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1, dilation=2, padding_mode="reflect"),
        nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1), nn.GroupNorm(3, 6),
        nn.GELU(), nn.InstanceNorm2d(6, affine=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


def _one_and_three_dimensions():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, dilation=2), nn.SiLU(), nn.Conv1d(4, 4, 2, padding="same"),
        nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 3, 2, padding=1, stride=2), nn.Sigmoid(),
        nn.ConvTranspose3d(3, 2, 2), nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip


def _mlp(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(),
                         nn.Linear(4, 5))  # fmt: skip


SAMPLES = 4
SEQUENCE = (SAMPLES, 5, 3)
CASES = {
    "mlp": (_mlp, (SAMPLES, 3)),
    "relu-mlp": (lambda: _mlp(nn.ReLU), (SAMPLES, 3)),
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 5)),
        (SAMPLES, 3),
    ),
    "convolutions": (_convolutions, (SAMPLES, 4, 11, 11)),
    "convolutions-1d-3d": (_one_and_three_dimensions, (SAMPLES, 2, 12)),
    "residual": (Residual, (SAMPLES, 2, 4, 4)),
    "language-model": (LanguageModel, "tokens"),
    "language-model-time-first": (lambda: LanguageModel(batch_first=False), "tokens"),
    "lstm": (lambda: Recurrent(batch_first=True, num_layers=2), SEQUENCE),
    "lstm-projected": (lambda: Recurrent(proj_size=2), SEQUENCE),
    "gru-bidirectional": (lambda: Recurrent(nn.GRU, bidirectional=True), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, bias=False, batch_first=True), SEQUENCE),
    "unusual": (Unusual, (SAMPLES, 4)),
    "folded": (lambda: Folded("fold"), SEQUENCE),
    "folded-time-major": (lambda: Folded("time-major-fold"), SEQUENCE),
    "time-first": (lambda: Folded("time-first"), SEQUENCE),
    "as-many-positions": (lambda: Folded("time-first"), (SAMPLES, SAMPLES, 3)),
    "embedded": (Embedded, "tokens"),
    "cross-attention": (CrossAttention, SEQUENCE),
}


def make(name, dtype=torch.float64, samples=SAMPLES):
    """A model in evaluation mode, inputs, and class labels."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().to(dtype).eval()
    if shape == "tokens":
        x = torch.randint(0, 6, (samples, 5))
    else:
        x = torch.randn(samples, *shape[1:], dtype=dtype)
    return model, x, torch.randint(5, (samples,))


def rows_by_loop(model, x, y, loss_fn=F.cross_entropy):
    """Each sample's gradient, one sample at a time, with torch's own layers."""
    params = dict(model.named_parameters())
    found = []
    for n in range(len(x)):
        loss = loss_fn(model(x[n : n + 1]), y[n : n + 1])
        found.append(
            torch.autograd.grad(
                loss, list(params.values()), allow_unused=True, materialize_grads=True
            )
        )
    return {name: torch.stack(g) for name, g in zip(params, zip(*found, strict=True), strict=True)}


def ggn_blocks(model, x, y):
    """The dense Gauss-Newton matrix of a mean cross-entropy, block by block, from Jacobians."""
    params = dict(model.named_parameters())
    totals = dict.fromkeys(params, 0.0)
    for n in range(len(x)):
        z = model(x[n : n + 1])[0]
        p = z.detach().softmax(0)
        middle = p.diag() - torch.outer(p, p)
        rows = [
            torch.autograd.grad(
                entry, list(params.values()), retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )
            for entry in z
        ]  # fmt: skip
        for i, name in enumerate(params):
            J = torch.stack([row[i].flatten() for row in rows])
            totals[name] = totals[name] + J.T @ middle @ J / len(x)
    return totals


def largest_error(found, expected):
    """Of two dictionaries of tensors, relative to the largest entry of each."""
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)
        worst = max(
            worst, float(error) if value.abs().max() > 0 else float(found[name].abs().max())
        )
    return worst
