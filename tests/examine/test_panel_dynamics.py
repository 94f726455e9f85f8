"""The dynamics panel on tasks whose hard samples are known."""

import math
import time

import pytest
import torch
from torch import nn

from assay.examine import Sample, Split
from assay.examine.budget import Budget
from assay.examine.panel import NotApplicable, all_panels
from assay.examine.panels.dynamics import _agreement, dynamics
from assay.examine.retraining import LEARNING_RATES, Trainee, choose_learning_rate
from assay.examine.sample import task_loss
from assay.examine.subject import Snapshot, Subject, prepare
from examine.foreign import make

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _own_time(monkeypatch):
    """Budgets count the processor's time: a busy machine does not make the panels thinner."""
    monkeypatch.setattr("assay.examine.budget.time.perf_counter", time.process_time)


def clouds(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.4 * torch.randn(n, 3, generator=generator)
    x[torch.arange(n), y] += 2.0
    return x, y


def planted(wrong: int = 12) -> Sample:
    """Three clouds far apart, whose first labels, in train and test, are wrong."""
    splits = []
    for seed in (0, 1):
        x, y = clouds(300, seed)
        y[:wrong] = (y[:wrong] + 1) % 3
        splits.append(Split(x, y, torch.arange(300) + 1000))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
    subject = Subject(model, None, "classification")
    x, y = clouds(300, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return Sample(subject.eval(), splits[0], splits[1], "classification", CLASSES,
                  task_loss("classification"))  # fmt: skip


def metrics(panel) -> dict:
    return {metric.name: metric for metric in panel.metrics}


def test_wrong_labels_are_learned_last_and_named():
    data = planted()
    budget = Budget(5.0)
    panel = dynamics(data.model, data, budget)
    assert budget.spent < 7.5
    found = metrics(panel)
    rows = panel.tables["Train samples learned last"]
    # All samples are watched, so that the twelve last are the twelve planted ones.
    planted_ones = set(range(1000, 1012))
    assert {row["index"] for row in rows} == planted_ones
    assert all(row["copies say"] != row["label"] for row in rows)
    assert any("against the label" in finding.why for finding in panel.findings)
    low, high = found["hard_share"].interval
    assert low < 12 / 300 < high
    assert {row["index"] for row in panel.tables["Test samples learned last"]} == planted_ones
    assert found["agreement"].value > found["agreement_null"].interval[1]
    assert [row["class"] for row in panel.tables["Order of the classes (test)"]]


def test_coins_agree_no_more_than_chance_and_copies_fully():
    data = planted(0)
    coins = torch.rand(5, 2000, generator=torch.Generator().manual_seed(3)) < 0.6
    agreement, null = _agreement(coins, data, Budget(1.0))
    low, high = null.interval
    assert low < agreement.value < high
    assert low < null.value < high
    # The correlation of 5 coins over 2,000 samples has a standard error of about 0.007.
    assert abs(null.value) < 0.005
    assert _agreement(coins[:1].expand(5, -1), data, Budget(1.0))[0].value == pytest.approx(1)
    budget = Budget(1.0)
    assert _agreement(torch.ones(3, 10, dtype=torch.bool), data, budget) == []
    assert "not defined" in budget.notes[0]


@pytest.mark.parametrize("name", ["residual", "lstm", "keyword"])
def test_foreign_networks(name):
    model, splits, call = make(name)
    data = prepare(model, splits, call=call)
    before = Snapshot(data.model)
    budget = Budget(2.0)
    panel = dynamics(data.model, data, budget)
    assert before.changes(data.model) == []
    found = metrics(panel)
    assert "hard_share" in found
    for metric in found.values():
        assert math.isfinite(metric.value)
        low, high = metric.interval
        assert low <= metric.value <= high
    names = [picture.name for picture in panel.figures]
    assert names[:3] == ["curves", "agreement", "classes"]
    assert ("last" in names) == (name == "residual")


def test_parameters_that_nobody_draws_are_named():
    model, splits, call = make("vision-transformer")
    data = prepare(model, splits, call=call)
    with pytest.raises(NotApplicable, match="parameters token, position"):
        dynamics(data.model, data, Budget(2.0))


def test_a_network_that_is_too_slow_is_told_the_cost():
    data = planted()

    class Slow(Budget):
        def timed(self, function):
            return function(), 50.0

    with pytest.raises(NotApplicable, match=r"an epoch of 256 samples takes .* s"):
        dynamics(data.model, data, Slow(2.0))


def test_it_trains_and_comes_last():
    entries = all_panels()
    mine = next(entry for entry in entries if entry.name == "dynamics")
    assert mine.trains
    assert entries[-1].order == mine.order


def test_the_learning_rate_is_the_one_that_goes_lowest():
    """On a loss that is linear in one weight, the largest step goes lowest."""
    model = nn.Linear(1, 1, bias=False)
    split = Split(torch.ones(64, 1), torch.zeros(64, 1), torch.arange(64))
    subject = Subject(model, None, "regression")

    def make_one(lr: float) -> Trainee:
        generator = torch.Generator().manual_seed(0)
        return Trainee(subject, split, lambda out, y: out.mean(), lr=lr, generator=generator)

    assert choose_learning_rate(make_one, 6) == max(LEARNING_RATES)


def test_frozen_parameters_are_not_trained_anew():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    data = planted()
    subject = Subject(model)
    trainee = Trainee(
        subject, data.train, data.loss_fn, lr=1e-2, generator=torch.Generator().manual_seed(0)
    )
    for _ in range(3):
        trainee.step()
    twin = trainee.model.get_submodule("model")
    assert torch.equal(twin[0].weight, model[0].weight)
    assert not torch.equal(twin[2].weight, model[2].weight)
    assert all(p.requires_grad for p in model[2].parameters())
