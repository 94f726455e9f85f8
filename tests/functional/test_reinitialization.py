"""Weights drawn anew."""

import copy

import pytest
import torch
from torch import nn

from assay.functional import parameters_to_vector, reinitialize


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(3))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x + self.token)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.LSTM(4, 3), nn.MultiheadAttention(4, 2),
        nn.Embedding(5, 4), nn.LayerNorm(4), nn.PReLU(), nn.TransformerEncoderLayer(4, 2, 8),
    )  # fmt: skip


def test_the_same_as_a_network_made_anew():
    """Layers of torch draw the distribution of their constructor: same mean and spread."""
    torch.manual_seed(0)
    reset, made = [], []
    model = nn.Linear(50, 20)
    for seed in range(40):
        reinitialize(model, generator=torch.Generator().manual_seed(seed))
        reset.append(parameters_to_vector(model))
        made.append(parameters_to_vector(nn.Linear(50, 20)))
    a, b = torch.cat(reset), torch.cat(made)
    bound = 50**-0.5
    assert a.abs().max() <= bound
    # 40,800 uniform draws: the standard error of their spread is about 0.2 %.
    assert a.std() == pytest.approx(b.std().item(), rel=0.01)


def test_every_parameter_is_drawn_and_the_seed_decides():
    model = network()
    for p in model.parameters():
        p.data.fill_(7.0)
    first, second, third = (copy.deepcopy(model) for _ in range(3))
    state = torch.get_rng_state()
    for target, seed in ((first, 1), (second, 1), (third, 2)):
        reinitialize(target, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, other = map(parameters_to_vector, (first, second, third))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.isfinite().all()
    assert not (one == 7).any()


def test_frozen_parameters_stay_and_norms_forget():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model(torch.randn(9, 3))
    kept = model[0].weight.clone()
    reinitialize(model)
    assert torch.equal(model[0].weight, kept)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_what_nobody_draws_is_named_and_nothing_changed():
    model = OwnParameter()
    before = parameters_to_vector(model)
    with pytest.raises(ValueError, match="token"):
        reinitialize(model)
    assert torch.equal(parameters_to_vector(model), before)


def test_a_method_of_the_users_counts():
    class Resettable(OwnParameter):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.token)

    model = Resettable()
    reinitialize(model)
    assert torch.equal(model.token, torch.zeros(3))
