"""The comparison on a quadratic, where the best of each grid is known."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from assay.analysis import Contender, compare_optimizers
from assay.functional import fit

STEEP = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)  # mean square loss: curvature 5


def build():
    return nn.Linear(1, 1, bias=False)


def train(model, optimizer, seed):
    return fit(model, optimizer, [STEEP], epochs=5, loss_fn=nn.functional.mse_loss)


RATES = (0.001, 0.1, 0.2, 10.0)


def compare(contenders, **kwargs):
    return compare_optimizers(build, contenders, train, seeds=(1, 2), **kwargs)


def test_each_contender_gets_its_best_rate_on_other_seeds():
    found = compare([Contender("SGD", SGD, {"lr": RATES}), Contender("Adam", Adam, {"lr": RATES})])
    rows = {row["optimizer"]: row for row in found.table()}
    # At rate 1/5 gradient descent is done after one step.
    assert rows["SGD"]["setting"] == "lr=0.2"
    assert rows["SGD"]["loss"] < 1e-10
    assert rows["SGD"]["edge"] == ""
    assert found.table()[0]["optimizer"] == "SGD"
    assert {trial.seed for trial in found.search} == {0}
    assert [trial.seed for trial in found.final] == [1, 2, 1, 2]
    assert all(row["settings tried"] == 4 for row in rows.values())


def test_initialisations_and_results_are_those_of_the_seed():
    contender = Contender("SGD", SGD, {"lr": (0.001,)})
    before = torch.get_rng_state()
    one, two = compare([contender]), compare([contender])
    assert one == two
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    start = build().weight.item()
    loss = 2.5 * start**2
    assert one.final[0].history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert one.curves()["SGD"][0][0] == pytest.approx(loss, rel=1e-6)


def test_the_best_at_the_edge_of_the_grid_is_said_to_be():
    found = compare([Contender("SGD", SGD, {"lr": (0.0001, 0.001, 0.01), "momentum": (0.0, 0.5)})])
    assert found.table()[0]["edge"] == "lr"
    assert "edge of the grid: lr" in str(found)
    assert len(found.grid()) == 6
    assert "lr=0.001, momentum=0.5: " in str(found)


def test_a_divergence_is_the_worst_score_and_counted():
    def overflowing(model, optimizer, seed):
        if optimizer.param_groups[0]["lr"] > 1:
            raise FloatingPointError("the training loss became NaN in epoch 1")
        return [{"loss": math.nan if optimizer.param_groups[0]["lr"] > 0.1 else 1.0}]

    contender = Contender("SGD", SGD, {"lr": RATES})
    for maximize, worst in ((False, math.inf), (True, -math.inf)):
        found = compare_optimizers(build, [contender], overflowing, maximize=maximize, seeds=(1,))
        assert [trial.score for trial in found.search] == [1.0, 1.0, worst, worst]
        assert found.table()[0]["diverged"] == 2
        assert found.table()[0]["setting"] == "lr=0.001"


def test_budgets_have_to_be_equal():
    with pytest.raises(ValueError, match=r"as many settings, got \{'SGD': 4, 'Adam': 1\}"):
        compare([Contender("SGD", SGD, {"lr": RATES}), Contender("Adam", Adam, {"lr": (0.1,)})])
    with pytest.raises(ValueError, match="different names"):
        compare([Contender("SGD", SGD, {"lr": RATES})] * 2)
    with pytest.raises(ValueError, match="tuning seed"):
        compare([Contender("SGD", SGD, {"lr": RATES})], tuning_seed=2)
    with pytest.raises(ValueError, match="needs values"):
        Contender("SGD", SGD, {"lr": ()})
    with pytest.raises(KeyError, match="accuracy"):
        compare([Contender("SGD", SGD, {"lr": RATES})], metric="accuracy")
