import math

import pytest
import torch
from torch import nn

from assay.distributed import (
    ErrorFeedback,
    Identity,
    LinkModel,
    NaturalCompressor,
    SimulatedWorkers,
    TopK,
    two_way_sum,
    worker_gradients,
)


def model_and_batch(workers=3, batch=5, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6))
    model = nn.Sequential(*layers).double()
    x = torch.randn(workers, batch, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (workers, batch))
    return model, x, y


def plain_gradient(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("norm", [False, True])
def test_rows_are_the_gradients_of_each_worker(norm):
    model, x, y = model_and_batch(norm=norm)
    gradients, losses = worker_gradients(model, nn.functional.cross_entropy, x, y)
    reference, _, _ = model_and_batch(norm=norm)
    for worker in range(3):
        row = plain_gradient(reference, x[worker], y[worker])
        torch.testing.assert_close(gradients[worker], row, rtol=1e-12, atol=1e-14)
        if worker == 0:  # the running statistics of the first worker are kept
            for kept, expected in zip(model.buffers(), reference.buffers(), strict=True):
                torch.testing.assert_close(kept, expected)
    assert losses.shape == (3,)


def test_workers_may_have_parameters_of_their_own_and_frozen_ones_have_no_gradient():
    model, x, y = model_and_batch()
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = nn.utils.parameters_to_vector(trained).detach()
    own = flat + 0.1 * torch.randn(3, len(flat), dtype=torch.float64)
    gradients, _ = worker_gradients(model, nn.functional.cross_entropy, x, y, parameters=own)
    assert gradients.shape == own.shape
    nn.utils.vector_to_parameters(own[2], trained)
    loss = nn.functional.cross_entropy(model(x[2]), y[2])
    row = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)])
    torch.testing.assert_close(gradients[2], row, rtol=1e-12, atol=1e-14)


def test_without_compression_it_is_one_large_batch():
    model, x, y = model_and_batch()
    group = SimulatedWorkers(model, nn.functional.cross_entropy, 3)
    group.backward(*group.shard(x.flatten(0, 1), y.flatten()))
    expected = plain_gradient(model, x.flatten(0, 1), y.flatten())
    actual = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert group.bits_up == 3 * 64 * len(expected)
    assert group.bits_down == 64 * len(expected)


@pytest.mark.parametrize("integer", [False, True])
def test_two_way_sum_is_unbiased(integer):
    rows = torch.tensor([[1.1, -0.3, 0.0], [0.7, 1.9, 1e-9]], dtype=torch.float64)
    draws = 4000  # entries draw independently, so one call with many copies is many draws
    workers = [NaturalCompressor(integer=integer)] * 2
    g = torch.Generator().manual_seed(0)
    total, _ = two_way_sum(rows.repeat(1, draws), workers, NaturalCompressor(), g)
    sums = total.view(draws, 3)
    error = (sums.mean(0) - rows.sum(0)).abs()
    assert (error <= 5 * sums.std(0) / math.sqrt(draws)).all()
    assert (torch.frexp(sums).mantissa.abs().unique() * 2 % 1 == 0).all()  # powers of two or 0


def test_integer_sum_lets_overflow_be_seen():
    gradients = torch.tensor([[1.0, math.inf], [1.0, 1.0]])
    total, _ = two_way_sum(gradients, [NaturalCompressor(integer=True)] * 2, NaturalCompressor())
    assert total.tolist() == [2.0, math.inf]


def test_memories_are_kept_apart_and_restored():
    model, x, y = model_and_batch()

    def group():
        worker = ErrorFeedback(TopK(0.1))
        g = torch.Generator().manual_seed(0)
        loss = nn.functional.cross_entropy
        return SimulatedWorkers(
            model, loss, 3, worker=worker, master=NaturalCompressor(), generator=g
        )

    one, two = group(), group()
    one.backward(x, y)
    errors = [worker.error for worker in one.workers]
    assert not torch.equal(errors[0], errors[1])
    two.load_state_dict(one.state_dict())
    gradients = []
    for simulated in (one, two):
        simulated.backward(x, y)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert one.bits_up == two.bits_up > 0


def test_sizes_that_do_not_fit_are_refused():
    model, x, y = model_and_batch()
    loss = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="targets must have 3 workers"):
        worker_gradients(model, loss, x, y[:2])
    with pytest.raises(ValueError, match="3 rows, got 2"):
        worker_gradients(model, loss, x, y, parameters=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="2 compressors, got 1"):
        two_way_sum(torch.zeros(2, 3), [Identity()], Identity())
    with pytest.raises(ValueError, match="workers must be at least 1"):
        SimulatedWorkers(model, loss, 0)
    with pytest.raises(ValueError, match="at least 3 entries"):
        SimulatedWorkers(model, loss, 3).shard(x[0, :2], y[0, :2])


def test_a_batch_that_is_not_split_is_told_of_shard():
    model, x, y = model_and_batch()
    group = SimulatedWorkers(model, nn.functional.cross_entropy, 3)
    words = r"{} must be \(3, batch, …\), .* got shape {}: split one batch with \.shard\("
    with pytest.raises(ValueError, match=words.format("inputs", r"\(15, 4\)")):
        group.backward(x.flatten(0, 1), y.flatten())
    with pytest.raises(ValueError, match=words.format("targets", r"\(15,\)")):
        group.backward(x, y.flatten())
    assert all(p.grad is None for p in model.parameters())


def test_link_time_is_latency_and_bits():
    link = LinkModel(bandwidth=1e6, latency=1e-3)
    assert link.seconds(5e6, messages=2) == pytest.approx(5.002)
    # Ring of 4: 6 messages of a quarter.
    assert link.all_reduce(8e6, workers=4) == pytest.approx(6e-3 + 12.0)
    assert link.all_reduce(8e6, workers=1) == 0
    for bad in ({"bandwidth": 0.0}, {"bandwidth": 1.0, "latency": -1.0}):
        with pytest.raises(ValueError, match="must"):
            LinkModel(**bad)
