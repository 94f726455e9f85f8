"""Magnitude pruning with rewinding, against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.analysis import LotteryTicket
from assay.functional import fit


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))


def data():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 10, generator=g), torch.randint(5, (16,), generator=g))]


def train(net, ticket, epochs=5, **kwargs):
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    fit(net, sgd, data(), epochs=epochs, after_step=ticket.observe, **kwargs)


def weights(net):
    return torch.cat([net[0].weight.detach().flatten(), net[3].weight.detach().flatten()])


def test_a_round_prunes_the_smallest_weights_of_the_whole_net_and_rewinds(net):
    start = {k: v.clone() for k, v in net.state_dict().items()}
    ticket = LotteryTicket(net, fraction=0.3)
    train(net, ticket)
    trained = weights(net)
    found = ticket.prune()
    assert (found.remaining, found.total) == (210, 300)
    smallest = trained.abs().argsort()[:90]
    expected = torch.ones(300, dtype=torch.bool)
    expected[smallest] = False
    assert torch.equal(weights(net) != 0, expected)
    assert found.threshold == trained.abs()[smallest[-1]]
    assert torch.equal(net[0].weight, start["0.weight"] * (net[0].weight != 0))
    for name in ("0.bias", "1.running_mean", "1.weight", "1.num_batches_tracked"):
        assert torch.equal(net.state_dict()[name], start[name])


def test_pruned_weights_stay_zero_and_the_share_compounds(net):
    ticket = LotteryTicket(net, fraction=0.2)
    before = torch.ones(300, dtype=torch.bool)
    for left in (240, 192, 154):
        train(net, ticket)
        assert not weights(net)[~before].any()
        assert ticket.prune().remaining == left
        alive = weights(net) != 0
        assert not alive[~before].any()
        before = alive
    assert ticket.density == pytest.approx(154 / 300)


def test_rewinding_goes_to_the_step_that_was_asked_for(net):
    ticket = LotteryTicket(net, fraction=0.5, rewind_step=3)
    with pytest.raises(RuntimeError, match="step 3 has not been observed"):
        ticket.prune()
    seen = {}

    def observe(step):
        seen[step] = net[0].weight.detach().clone()
        ticket.observe(step)

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    fit(net, sgd, data(), epochs=6, after_step=observe)
    ticket.prune()
    assert torch.equal(net[0].weight, seen[3] * (net[0].weight != 0))
    assert not torch.equal(seen[3], seen[4])
    train(net, ticket)  # a second training passes step 3 again: it is not what is kept
    ticket.rewind()
    assert torch.equal(net[0].weight, seen[3] * (net[0].weight != 0))


def test_masks_become_plain_weights(net):
    names = set(net.state_dict())
    ticket = LotteryTicket(net, fraction=0.5)
    train(net, ticket)
    ticket.prune()
    x = data()[0][0]
    net.eval()
    before = net(x)
    ticket.remove()
    assert set(net.state_dict()) == names
    assert torch.equal(net(x), before)
    assert int((net[0].weight == 0).sum() + (net[3].weight == 0).sum()) == 150


def test_chosen_weights_only(net):
    ticket = LotteryTicket(net, fraction=0.5, params=["3.weight"])
    assert ticket.prune().total == 100
    assert net[0].weight.all()


def test_what_cannot_be_pruned_is_refused(net):
    for kwargs, words in (
        ({"fraction": 1.0}, "fraction"),
        ({"rewind_step": -1}, "rewind_step"),
        ({"params": ["nothing"]}, "no parameter 'nothing'"),
        ({"params": lambda name: False}, "no weights"),
    ):
        with pytest.raises(ValueError, match=words):
            LotteryTicket(net, **kwargs)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="tied"):
        LotteryTicket(tied)
    last = LotteryTicket(nn.Linear(1, 1), fraction=0.9)
    with pytest.raises(RuntimeError, match="nothing is left"):
        last.prune()


def test_a_masked_weight_has_no_gradient(net):
    ticket = LotteryTicket(net, fraction=0.5)
    ticket.prune()
    F.cross_entropy(net(data()[0][0]), data()[0][1]).backward()
    original = net[0].parametrizations.weight.original
    assert not original.grad[net[0].weight == 0].any()
