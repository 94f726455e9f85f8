import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils

from assay.functional import running_norms, update_bn


def dataset_moments(x):
    """Mean and unbiased variance of each channel over samples and positions."""
    channels = x.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (103, 3)),
        (nn.BatchNorm1d(3), (103, 3, 4)),
        (nn.BatchNorm2d(3), (103, 3, 4, 2)),
        (nn.BatchNorm3d(3), (103, 3, 2, 2, 2)),
    ],
)
def test_equals_the_moments_of_all_the_data(norm, shape):
    torch.manual_seed(0)
    # A drift over the data: the spread between batches is large, which averaging variances misses.
    x = torch.randn(shape, dtype=torch.float64)
    x += torch.linspace(-3, 5, len(x), dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
    norm = norm.double()
    update_bn(norm, x.split(20))  # the last batch has 3 samples
    mean, variance = dataset_moments(x)
    assert torch.allclose(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(norm.running_var, variance, rtol=1e-12)
    assert norm.num_batches_tracked == 6


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_partition_into_batches_does_not_matter(sizes):
    x = torch.randn(sum(sizes), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm1d(2).double()
    update_bn(norm, x.split(sizes))
    assert torch.allclose(norm.running_mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(norm.running_var, x.var(0), rtol=1e-12, atol=1e-12)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    ).double()


def test_one_batch_agrees_with_torch_at_every_depth():
    ours, theirs = small_network(), small_network()
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    update_bn(ours, [x])
    swa_utils.update_bn([x], theirs)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12), name


def test_equal_batches_have_the_mean_of_torch_and_add_the_spread_between_batches():
    ours, theirs = small_network(), small_network()
    batches = torch.randn(5, 16, 1, 8, 8, dtype=torch.float64).unbind()
    update_bn(ours, batches)
    swa_utils.update_bn(batches, theirs)
    for mine, torchs in zip(running_norms(ours), running_norms(theirs), strict=True):
        assert torch.allclose(mine.running_mean, torchs.running_mean, rtol=1e-12, atol=1e-12)
    first = ours[0](torch.cat(batches))
    n, size = first.numel() / 4, first.numel() / 4 / 5
    means = torch.stack([dataset_moments(c)[0] for c in first.chunk(5)])
    pooled = theirs[1].running_var * 5 * (size - 1) + size * ((means - means.mean(0)) ** 2).sum(0)
    assert torch.allclose(ours[1].running_var, pooled / (n - 1), rtol=1e-12)


def test_modes_momenta_and_weights_are_restored():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5))
    model.append(nn.BatchNorm1d(4, momentum=None))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(list(model.parameters()))
    update_bn(model, [(torch.randn(8, 3), torch.zeros(8))])
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[3].momentum) == (0.3, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_and_momenta_are_restored_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5))
    with pytest.raises(RuntimeError):
        update_bn(model, [torch.randn(8, 4), torch.randn(8, 5)])
    assert all(module.training for module in model.modules())
    assert model[0].momentum == 0.3
    assert not model[0]._forward_hooks


def test_dropout_is_off():
    x = torch.randn(64, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).double().train()
    update_bn(model, x.split(16))
    assert torch.allclose(model[1].running_var, x.var(0), rtol=1e-12)


def test_a_norm_that_is_used_twice_pools_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)

        def forward(self, x):
            return self.norm(x), self.norm(3 * x + 1)

    model = Twice().double()
    x = torch.randn(60, 2, dtype=torch.float64)
    update_bn(model, x.split(25))
    both = torch.cat([x, 3 * x + 1])
    assert torch.allclose(model.norm.running_mean, both.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(model.norm.running_var, both.var(0), rtol=1e-12)


def test_instance_norm_averages_over_samples():
    norm = nn.InstanceNorm1d(3, track_running_stats=True).double()
    x = torch.randn(25, 3, 7, dtype=torch.float64)
    update_bn(norm, x.split(10))
    assert torch.allclose(norm.running_mean, x.mean(2).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(norm.running_var, x.var(2).mean(0), rtol=1e-12)
    update_bn(norm, [x[0], x[1], x[2]])  # without a batch dimension
    assert torch.allclose(norm.running_var, x[:3].var(2).mean(0), rtol=1e-12)


class ForeignNorm(nn.Module):
    """Another package's norm: only the attributes are those of torch."""

    def __init__(self):
        super().__init__()
        self.momentum = 0.01
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean(0), self.momentum)
            self.running_var.lerp_(x.var(0), self.momentum)
        return (x - self.running_mean) * self.running_var.rsqrt()


def test_any_norm_with_running_statistics_takes_part():
    norm = ForeignNorm()
    x = torch.randn(50, 2)
    update_bn(norm, x.split(20))
    # float32 statistics of each batch, pooled in float64.
    assert torch.allclose(norm.running_mean, x.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, x.var(0), rtol=1e-5)
    assert norm.momentum == 0.01


def test_diverged_statistics_recover():
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(float("nan"))
    norm.running_var.fill_(float("inf"))
    x = torch.randn(30, 2)
    update_bn(norm, [x])
    assert torch.allclose(norm.running_mean, x.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, x.var(0), rtol=1e-5)


def test_without_running_statistics_nothing_is_read():
    def batches():
        raise AssertionError("read")
        yield

    model = nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    update_bn(model, batches())


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        update_bn(nn.BatchNorm1d(2), [])
    with pytest.raises(TypeError, match="got dict"):
        update_bn(nn.BatchNorm1d(2), [{"x": torch.zeros(3, 2)}])
