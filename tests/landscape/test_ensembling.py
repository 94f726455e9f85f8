import copy
import pickle

import pytest
import torch
from torch import nn

from assay.landscape import FGE


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def ensemble_of(count):
    torch.manual_seed(0)
    model = network()
    ensemble, members = FGE(model), []
    for _ in range(count):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.normal_()
        ensemble.collect()
        members.append(copy.deepcopy(model).eval())
    with torch.no_grad():
        model[0].weight.zero_()  # training goes on: the members must not follow
    return model, ensemble, members


def test_averages_probabilities_not_logits():
    _, ensemble, members = ensemble_of(3)
    x = torch.randn(10, 4)
    probabilities = torch.stack([member(x).softmax(1) for member in members])
    assert torch.equal(ensemble.member_probabilities(x), probabilities)
    assert torch.equal(ensemble.predict_proba(x), probabilities.mean(0))
    of_logits = torch.stack([member(x) for member in members]).mean(0).softmax(1)
    assert (ensemble.predict_proba(x) - of_logits).abs().max() > 0.01
    assert torch.allclose(ensemble.predict_proba(x).sum(1), torch.ones(10))


def test_predicting_leaves_the_model_in_training():
    model, ensemble, _ = ensemble_of(2)
    model.train()
    before = copy.deepcopy(model.state_dict())
    ensemble.predict_proba(torch.randn(5, 4))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nll_of_the_mixture_is_below_the_mean_of_its_members():
    # Jensen: −log of a mean of probabilities is at most the mean of the −log.
    _, ensemble, _ = ensemble_of(4)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    members = ensemble.member_probabilities(x)[:, torch.arange(20), y].log().mean()
    assert ensemble.predict_proba(x)[torch.arange(20), y].log().mean() > members


def test_copies():
    _, ensemble, _ = ensemble_of(2)
    x = torch.randn(5, 4)
    expected = ensemble.predict_proba(x)
    other = FGE(network())
    other.load_state_dict(ensemble.state_dict())
    for copied in (other, copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert len(copied) == 2
        assert torch.equal(copied.predict_proba(x), expected)


def test_an_empty_ensemble_predicts_nothing():
    ensemble = FGE(network())
    assert len(ensemble) == 0
    with pytest.raises(ValueError, match="collect"):
        ensemble.predict_proba(torch.zeros(1, 4))
    with pytest.raises(KeyError):
        ensemble.load_state_dict({})


def test_a_model_that_returns_no_logits_is_refused():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.layer(x)}

    ensemble = FGE(Wrapped())
    ensemble.collect()
    with pytest.raises(TypeError, match=r"FGE needs .* returns dict"):
        ensemble.predict_proba(torch.zeros(1, 4))
    ensemble = FGE(nn.Flatten(0))
    ensemble.collect()
    with pytest.raises(ValueError, match=r"returns shape \(4,\)"):
        ensemble.predict_proba(torch.zeros(1, 4))
