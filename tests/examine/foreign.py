"""Networks as other people write them, briefly trained on small data, for tests of the panels.

from examine.foreign import FOREIGN, make

@pytest.mark.parametrize("name", FOREIGN)
def test_it(name):
    model, data, call = make(name)
    report = examine(model, data, call=call, panels=["card"], budget=2)
"""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Splits = dict[str, tuple[Tensor, Tensor]]


class Block(nn.Module):
    """A residual block as everyone writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class ResidualNet(nn.Module):
    """Convolutions, BatchNorm, skip connections; images `(N, 1, 8, 8)`, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
        return self.head(self.dropout(h))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, torch's encoder; images `(N, 1, 8, 8)`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 4, stride=4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, 16))
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(
            16, 2, dim_feedforward=32, dropout=0.1, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.encoder(h)[:, 0])


class SeriesClassifier(nn.Module):
    """A bidirectional LSTM over series `(N, T, 3)`; 2 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.head(states.mean(1))


class Tagger(nn.Module):
    """An LSTM over tokens `(N, T)`, whose logits `(N, T, C)` share weights with its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states)


class TokenTransformer(nn.Module):
    """A causal transformer over tokens `(N, T)` with logits `(N, T, C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.position = nn.Embedding(10, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = places[:, None] < places
        h = self.embedding(tokens) + self.position(places)
        return self.head(self.layer(h, src_mask=mask))


class KeywordModel(nn.Module):
    """Takes a second argument and answers with a mapping: needs an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 3)

    def forward(self, features: Tensor, *, sharpness: float) -> dict[str, Tensor]:
        hidden = torch.tanh(self.norm(self.first(features)))
        return {"hidden": hidden, "scores": sharpness * self.last(hidden)}


def scores(model: nn.Module, x: Tensor) -> Tensor:
    """How `KeywordModel` is called."""
    return model(x, sharpness=2.0)["scores"]


def mlp() -> nn.Module:
    """A regression of two values from five."""
    return nn.Sequential(
        nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2)
    )


def _images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A bright bar: lying, upright or diagonal, in noise."""
    y = torch.arange(n) % 3
    place = torch.randint(1, 7, (n,), generator=generator)
    x = 0.3 * torch.rand(n, 1, 8, 8, generator=generator)
    for i, (kind, k) in enumerate(zip(y.tolist(), place.tolist(), strict=True)):
        if kind == 0:
            x[i, 0, k] += 0.7
        elif kind == 1:
            x[i, 0, :, k] += 0.7
        else:
            x[i, 0] += 0.7 * torch.eye(8).roll(k - 4, 0)
    return x, y


def _values(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin() + x[:, 3]], 1)
    return x, y + 0.1 * torch.randn(n, 2, generator=generator)


def _series(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random walks that drift up or down."""
    y = torch.arange(n) % 2
    steps = 0.3 * torch.randn(n, 12, 3, generator=generator) + 0.15 * (2 * y - 1)[:, None, None]
    return steps.cumsum(1), y


def _tokens(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next token is the present one plus 1 or 2; the last positions of some are padding."""
    steps = torch.randint(1, 3, (n, 11), generator=generator)
    tokens = steps.cumsum(1) % 12
    y = tokens[:, 1:].clone()
    y[::4, -3:] = -100
    return tokens[:, :-1], y


def _features(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=generator)
    x[torch.arange(n), y] += 1.5
    return x, y


FOREIGN: dict[str, tuple[Callable[[], nn.Module], Callable, Callable | None]] = {
    "residual": (ResidualNet, _images, None),
    "vision-transformer": (VisionTransformer, _images, None),
    "regression": (mlp, _values, None),
    "lstm": (SeriesClassifier, _series, None),
    "tagger": (Tagger, _tokens, None),
    "token-transformer": (TokenTransformer, _tokens, None),
    "keyword": (KeywordModel, _features, scores),
}
"""Name → (build the network, `(n, generator) -> (x, y)`, `call` or None)."""

STEPS = 60
TRAIN, TEST = 192, 96


def make(name: str) -> tuple[nn.Module, Splits, Callable | None]:
    """A trained network, its data and how it is called, as `assay.examine.examine` takes them.

    Args:
        name: in `FOREIGN`.
    """
    model, data = _trained(name)
    return copy.deepcopy(model), data, FOREIGN[name][2]


@functools.cache
def _trained(name: str) -> tuple[nn.Module, Splits]:
    build, draw, call = FOREIGN[name]
    generator = torch.Generator().manual_seed(0)
    data = {"train": draw(TRAIN, generator), "test": draw(TEST, generator)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, y = data["train"]
        for _ in range(STEPS):
            batch = torch.randint(0, TRAIN, (48,), generator=generator)
            output = model(x[batch]) if call is None else call(model, x[batch])
            if y.is_floating_point():
                loss = F.mse_loss(output, y[batch])
            else:
                loss = F.cross_entropy(output.flatten(0, -2), y[batch].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), data
