import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from assay.distributed import (
    CompressedReduceScatter,
    CompressionState,
    ErrorFeedback,
    Identity,
    NaturalCompressor,
    NaturalDithering,
    RandomK,
    TopK,
    two_way_compression_hook,
    two_way_sum,
)
from assay.distributed.testing import spawn

pytestmark = pytest.mark.processes
WORLD = 2
CUSTOM_REDUCE_SCATTER = hasattr(fsdp.FSDPModule, "set_custom_reduce_scatter")


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    return model.to(dtype)


def wrap(model, settings):
    # Several buckets, rebuilt after the first backward pass.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005)
    state = None
    if settings is not None:
        state = CompressionState(**settings)
        ddp.register_comm_hook(state, two_way_compression_hook)
    return ddp, state


def steps(ddp, count, dtype=torch.float32, seed=0):
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(seed + dist.get_rank())
    trajectory = []
    for _ in range(count):
        x = torch.randn(16, 20, generator=g).to(dtype)
        y = torch.randint(0, 3, (16,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x).float(), y).backward()
        optimizer.step()
        trajectory.append(nn.utils.parameters_to_vector(ddp.parameters()).detach().clone())
    return torch.stack(trajectory)


SETTINGS = {
    "identity": {"worker": Identity(), "master": Identity()},
    "natural": {},
    "integer": {"worker": NaturalCompressor(integer=True)},
    "mixed": {"worker": NaturalDithering(8), "master": RandomK(0.5)},
    "warm-up": {"warmup_steps": 3},
    "small buckets dense": {"min_numel": 10**6},
}


def train_all():
    """Parameters after each of five steps for every setting, and the bytes sent."""
    results = {"none": (steps(wrap(build(), None)[0], 5), 0)}
    for name, settings in SETTINGS.items():
        ddp, state = wrap(build(), settings)
        results[name] = (steps(ddp, 5), state.bytes_sent)
        assert state.step == 5
    for dtype in (torch.float64, torch.bfloat16):
        results[str(dtype)] = (steps(wrap(build(dtype), {})[0], 3, dtype), 0)
    return results


def test_parameters_are_bit_equal_over_ranks_after_every_step(ran):
    one, two = ran["train_all"]
    for name in one:
        assert torch.equal(one[name][0], two[name][0]), name
        assert one[name][0].isfinite().all()
    plain = one["none"][0]
    for name in ("identity", "small buckets dense"):
        torch.testing.assert_close(one[name][0], plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(one["warm-up"][0][:3], plain[:3], rtol=0, atol=1e-6)
    for name in ("natural", "integer", "mixed"):
        assert not torch.equal(one[name][0][0], plain[0])
    assert not torch.equal(one["warm-up"][0][3], plain[3])
    # 5 steps, d entries, both halves of the exchange, (n − 1) / n of each: 9 bits, and headers.
    d = plain.shape[1]
    ideal = 5 * 2 * d / 2 * 9 / 8
    assert ideal < one["natural"][1] < ideal + 5 * 3 * 2 * 100  # 3 buckets, < 100 bytes a message
    assert one["identity"][1] > 3 * one["natural"][1]


def average(gradient_of_rank, settings, dtype=torch.float32):
    """What the hook makes of one given gradient a rank."""
    d = len(gradient_of_rank[0])
    model = nn.Linear(d, 1, bias=False, dtype=dtype)
    ddp, _ = wrap(model, settings)
    ddp(torch.tensor(gradient_of_rank[dist.get_rank()], dtype=dtype)[None]).sum().backward()
    return model.weight.grad[0]


def special_values():
    rows = [[1.0, math.inf, -0.5, 2.0**-149, 1.0], [3.0, 1.0, 0.5, 0.0, math.nan]]
    half = [[65504.0, 2.0**-24, 48.0], [65504.0, 0.0, 16.0]]
    seen = {}
    for name in ("natural", "integer"):
        seen[name] = average(rows, SETTINGS[name])
    seen["half"] = average(half, {}, torch.float16)
    # Powers of two whose sums are powers of two pass without any rounding.
    powers = [[2.0**-30, -4.0, 0.0, 2.0**-140], [2.0**-30, -4.0, 8.0, 2.0**-140]]
    seen["powers"] = average(powers, {})
    return seen


def test_overflow_is_seen_and_nothing_that_fits_overflows(ran):
    one, two = ran["special_values"]
    for name in one:
        assert torch.equal(one[name].nan_to_num(nan=7.0), two[name].nan_to_num(nan=7.0)), name
    for name in ("natural", "integer"):
        assert one[name][1] == math.inf
        assert one[name][4].isnan()
        assert one[name][[0, 2, 3]].isfinite().all()
    assert one["half"].isfinite().all()
    assert one["half"][0] >= 32768
    assert one["powers"].tolist() == [2.0**-30, -4.0, 4.0, 2.0**-140]


def unbiased_average():
    rows = [[1.1, -0.3, 0.7] * 2000, [0.3, 1.9, -0.7] * 2000]
    return {name: average(rows, SETTINGS[name]) for name in ("natural", "integer")}


def test_average_is_unbiased_and_ranks_draw_different_numbers(ran):
    expected = torch.tensor([0.7, 0.8, 0.0])
    for result in ran["unbiased_average"][0].values():
        columns = result.view(2000, 3)
        error = (columns.mean(0) - expected).abs()
        assert (error < 5 * columns.std(0) / math.sqrt(2000)).all()
        # ±0.7 cancels only when both ranks round alike: chance 0.6² + 0.4² = 0.52 if independent
        # (then 0), and 1 if they drew the same numbers.
        cancelled = (columns[:, 2] == 0).double().mean()
        assert abs(cancelled - 0.52) < 5 * math.sqrt(0.25 / 2000)


def resume():
    """Three steps at once, and the same in two halves with the state saved in between."""
    ddp, state = wrap(build(), {})
    steps(ddp, 2)
    saved, weights = copy.deepcopy(state.state_dict()), copy.deepcopy(ddp.module.state_dict())
    twin = copy.deepcopy(state)
    straight = steps(ddp, 2, seed=50)
    again, fresh = wrap(build(), {})
    again.module.load_state_dict(weights)
    steps(again, 1)  # buckets are rebuilt after the first step
    again.module.load_state_dict(weights)
    fresh.load_state_dict(saved)
    assert twin.state_dict()["step"] == saved["step"] == 2
    resumed = steps(again, 2, seed=50)
    return straight, resumed, state.state_dict()["bytes_sent"], fresh.state_dict()["bytes_sent"]


def test_state_continues_bit_for_bit(ran):
    for straight, resumed, sent, sent_again in ran["resume"]:
        assert torch.equal(straight, resumed)
        assert sent == sent_again


def no_sync_and_errors():
    ddp, state = wrap(build(), {})
    x, y = torch.randn(8, 20), torch.randint(0, 3, (8,))
    with ddp.no_sync():
        nn.functional.cross_entropy(ddp(x), y).backward()
    assert state.step == 0
    nn.functional.cross_entropy(ddp(x), y).backward()
    assert state.step == 1
    messages = []
    for bad in (
        {"worker": ErrorFeedback(TopK(0.1))},
        {"warmup_steps": -1},
        {"min_numel": -5},
        {"master": "natural"},
    ):
        try:
            CompressionState(**bad)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages, nn.utils.parameters_to_vector(p.grad for p in ddp.parameters())


def test_accumulation_without_synchronisation_and_bad_settings(ran):
    (messages, one), (_, two) = ran["no_sync_and_errors"]
    assert torch.equal(one, two)
    for message, expected in zip(messages, ("memory", "warmup_steps", "-5", "str"), strict=True):
        assert expected in message


def shard_with_fsdp(worker):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    scatter = None
    if worker is not None:
        scatter = CompressedReduceScatter(worker)
        model.set_custom_reduce_scatter(scatter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    full = torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()])
    return full, scatter and scatter.bytes_sent


def fsdp2():
    if not CUSTOM_REDUCE_SCATTER:
        return None
    return [shard_with_fsdp(worker) for worker in (None, Identity(), NaturalCompressor())]


@pytest.mark.skipif(not CUSTOM_REDUCE_SCATTER, reason="this torch has no custom reduce-scatter")
def test_fsdp2_reduce_scatter(ran):
    plain, identity, natural = ran["fsdp2"][0]
    torch.testing.assert_close(identity[0], plain[0], rtol=0, atol=1e-6)
    assert natural[0].isfinite().all()
    assert not torch.equal(natural[0], plain[0])
    assert natural[1] < identity[1] / 3


def test_state_needs_a_process_group():
    with pytest.raises(RuntimeError, match="must be initialised"):
        CompressionState()


def gradients_and_average():
    torch.manual_seed(dist.get_rank())
    row = torch.randn(6)
    rows = [torch.empty(6) for _ in range(WORLD)]
    dist.all_gather(rows, row)
    return torch.stack(rows), average([r.tolist() for r in rows], SETTINGS["identity"])


def test_simulation_is_what_processes_do(ran):
    rows, result = ran["gradients_and_average"][0]
    total, _ = two_way_sum(rows, [Identity()] * WORLD, Identity())
    torch.testing.assert_close(result, total / WORLD, rtol=0, atol=1e-6)


PROGRAMS = (
    train_all,
    special_values,
    unbiased_average,
    resume,
    no_sync_and_errors,
    fsdp2,
    gradients_and_average,
)


def everything():
    return {program.__name__: program() for program in PROGRAMS}


@pytest.fixture(scope="module")
def ran():
    """What each program returned, by rank; all ran in one pair of processes, which is quicker."""
    by_rank = spawn(everything, WORLD)
    return {name: [result[name] for result in by_rank] for name in by_rank[0]}
