import copy
import functools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from assay.distributed import (
    Cast,
    Compose,
    DensityWarmup,
    DGCState,
    DGCWorker,
    ErrorFeedback,
    Identity,
    MomentumCorrection,
    NaturalCompressor,
    SampledTopK,
    SimulatedWorkers,
    Threshold,
    TopK,
    dgc_hook,
)
from assay.distributed.testing import spawn
from assay.optim import DGCSGD

WORLD = 2

# ------------------------------------------------------------------------------ one worker's memory


def test_three_steps_of_two_workers_by_hand():
    # m = 1/2, one of four entries sent; numbers worked out by hand from the equations.
    gradients = [
        [[4.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, -2.0]],
        [[0.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]],
        [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 8.0, 0.0]],
    ]
    sent = [
        [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]],
        # u = [0, 3, 0, 0], v = [0, 5, 0, 0]; u = [0, 3.5, 0, 0], v = [0, 4.5, 0, 0]
        [[0.0, 5.0, 0.0, 0.0], [0.0, 4.5, 0.0, 0.0]],
        # both masked at 1: u = [1, 0, 1, 0]; u = [0, 0, 8, 0]
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0]],
    ]
    workers = [MomentumCorrection(TopK(0.25), momentum=0.5) for _ in range(2)]
    for step in range(3):
        for k, worker in enumerate(workers):
            # Ties go to the first of the largest: keep them apart as far as topk needs.
            x = torch.tensor(gradients[step][k], dtype=torch.float64)
            x[0] += 1e-9 if step == 2 and k == 0 else 0
            actual = worker.decompress(worker.compress(x))
            expected = torch.tensor(sent[step][k], dtype=torch.float64)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
    assert workers[0].velocity.tolist() == pytest.approx([0.0, 0.0, 1.0, 0.0])
    assert workers[0].error.tolist() == pytest.approx([0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "compressor",
    [
        TopK(0.1),
        Threshold(2.5),
        Compose(NaturalCompressor(), TopK(0.1)),
        Compose(Cast(torch.float16), TopK(0.1)),
        NaturalCompressor(),
        Identity(),
    ],
    ids=repr,
)
def test_without_masking_everything_sent_adds_up_to_all_velocities(compressor, nesterov):
    g = torch.Generator().manual_seed(0)
    correction = MomentumCorrection(compressor, 0.9, nesterov, mask_momentum=False)
    sent, velocity, velocities = (torch.zeros(300, dtype=torch.float64) for _ in range(3))
    for _ in range(50):
        x = torch.randn(300, generator=g, dtype=torch.float64)
        sent += correction.decompress(correction.compress(x, generator=g))
        velocity = 0.9 * velocity + x
        velocities += x + 0.9 * velocity if nesterov else velocity
    torch.testing.assert_close(sent + correction.error, velocities, rtol=1e-12, atol=1e-10)


def test_without_momentum_it_is_error_feedback():
    g = torch.Generator().manual_seed(0)
    correction, feedback = MomentumCorrection(TopK(0.1), 0.0), ErrorFeedback(TopK(0.1))
    for _ in range(10):
        x = torch.randn(20, 5, generator=g)
        ours, theirs = (c.decompress(c.compress(x)) for c in (correction, feedback))
        assert torch.equal(ours, theirs)


def test_velocities_are_masked_where_they_were_sent_and_nowhere_else():
    g = torch.Generator().manual_seed(0)
    for mask in (True, False):
        correction = MomentumCorrection(TopK(0.1), mask_momentum=mask)
        correction.compress(torch.randn(100, generator=g))
        before = 0.9 * correction.velocity
        x = torch.randn(100, generator=g)
        chosen = correction.decompress(correction.compress(x)) != 0
        assert int(chosen.sum()) == 10
        expected = torch.where(chosen & mask, 0.0, before + x)
        torch.testing.assert_close(correction.velocity, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_of_half_precision_does_not_overflow(dtype):
    correction = MomentumCorrection(TopK(0.5), 0.9)
    x = torch.tensor([60000.0, 50000.0], dtype=dtype)
    for _ in range(20):
        payload = correction.compress(x)
        assert correction.decompress(payload).dtype == dtype
    assert correction.velocity.dtype == correction.error.dtype == torch.float32
    assert correction.error.isfinite().all()


def test_what_is_not_finite_is_seen_and_not_remembered():
    for compressor in (TopK(0.25), Identity(), SampledTopK(0.25)):
        correction = MomentumCorrection(compressor)
        correction.compress(torch.ones(4))
        before = copy.deepcopy(correction.state_dict())
        for bad in (math.nan, math.inf):
            payload = correction.compress(torch.tensor([1.0, bad, 1.0, 1.0]))
            assert not correction.decompress(payload).isfinite().all()
        after = correction.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    # Squares overflow here, the values do not.
    correction.compress(torch.tensor([1e30, 1.0, 1.0, 1.0]))
    assert not torch.equal(correction.velocity, before["velocity"])


def test_zero_gradients_pause_on_request():
    for pause in (False, True):
        correction = MomentumCorrection(TopK(0.25), 0.5, pause_zero=pause)
        correction.compress(torch.tensor([8.0, 4.0, 2.0, 1.0]))
        sent = correction.decompress(correction.compress(torch.zeros(4)))
        assert bool(sent.any()) is not pause
        assert correction.velocity.tolist() == (
            [0.0, 4.0, 2.0, 1.0] if pause else [0.0, 0.0, 1.0, 0.5]
        )


# ---------------------------------------------------------------------------------- a whole worker


def test_density_follows_the_papers_warm_up():
    densities = [DensityWarmup(4)(0.001, epoch) for epoch in range(7)]
    # 25, 6.25, 1.5625, 0.4, 0.1 %; the paper rounds.
    for actual, expected in zip(densities, (0.25, 0.0625, 0.015625, 0.004), strict=False):
        assert actual == pytest.approx(expected, rel=0.02)
    assert densities[4:] == [0.001] * 3
    assert DensityWarmup(0)(0.01, 0) == 0.01


def test_vectors_and_small_tensors_are_sent_whole():
    worker = DGCWorker([(40, 50), (5000,), (3, 4)], density=0.01, momentum=0.5)
    x = torch.randn(5000 + 2000 + 12, generator=torch.Generator().manual_seed(0))
    sent = worker.decompress(worker.compress(x)).split([2000, 5000, 12])
    assert [int((part != 0).sum()) for part in sent] == [20, 5000, 12]
    sent = worker.decompress(worker.compress(torch.zeros_like(x))).split([2000, 5000, 12])
    torch.testing.assert_close(sent[1], 0.5 * x[2000:7000])  # their velocity goes on, unmasked


def test_messages_are_five_hundred_times_smaller():
    worker = DGCWorker([(1000, 1000), (1000,)], density=0.001, values=None)
    payload = worker.compress(torch.randn(1_001_000))
    sparse = worker.bits(payload) - 8 * (4 * 1000 + 3 * 5)
    assert 500 / 1.3 - 1 <= 32e6 / sparse <= 500 / 0.8
    worker = DGCWorker([(1000, 1000)], density=0.001, values=NaturalCompressor(), sparsifier=TopK)
    # 41 bits for each of 1000 entries, and 5 bytes for each of 4 tensors (one is empty).
    assert worker.bits(worker.compress(torch.randn(1_000_000))) == 41_000 + 4 * 5 * 8


def test_clipping_is_what_it_is_for_the_average_of_independent_workers():
    n, limit, d = 16, 0.5, 100_000
    gradients = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    # Scaled so that their average has 3 times the norm allowed.
    gradients *= 3 * limit / gradients.mean(0).norm()
    workers = [
        DGCWorker([(d,)], momentum=0.0, clip_norm=limit, workers=n, density=1.0) for _ in range(n)
    ]
    sent = [w.decompress(w.compress(x)) for w, x in zip(workers, gradients, strict=True)]
    for one in sent:
        assert one.norm() == pytest.approx(limit * math.sqrt(n), rel=1e-5)
    assert torch.stack(sent).mean(0).norm() == pytest.approx(limit, rel=0.02)
    small = gradients[0] / 10
    fresh = DGCWorker([(d,)], momentum=0.0, clip_norm=limit, workers=n)
    assert torch.equal(fresh.decompress(fresh.compress(small)), small)


def test_clipping_sees_the_whole_gradient_before_it_is_accumulated():
    worker = DGCWorker([(2,), (2,)], momentum=0.5, clip_norm=1.0, dense_below=0)
    first = worker.decompress(worker.compress(torch.tensor([3.0, 0.0, 0.0, 4.0])))
    torch.testing.assert_close(first, torch.tensor([0.6, 0.0, 0.0, 0.8]))
    second = worker.decompress(worker.compress(torch.tensor([0.5, 0.0, 0.0, 0.0])))
    torch.testing.assert_close(second, torch.tensor([0.8, 0.0, 0.0, 0.4]))


def test_bad_arguments_are_named():
    for name, bad in (
        ("density", 0.0),
        ("density", 1.5),
        ("momentum", 1.0),
        ("clip_norm", 0.0),
        ("workers", 0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            DGCWorker([(2, 2)], **{name: bad})
    with pytest.raises(ValueError, match="epochs must not be negative"):
        DensityWarmup(-1)
    with pytest.raises(ValueError, match="at least one that needs gradients"):
        DGCState(nn.Linear(2, 2).requires_grad_(False))
    correction = MomentumCorrection(TopK(0.5))
    correction.compress(torch.ones(4))
    with pytest.raises(ValueError, match="4 entries as the tensors before it, got 5"):
        correction.compress(torch.ones(5))
    with pytest.raises(TypeError, match=r"warmup must be None or callable .* got 4: .*Warmup\(4\)"):
        DGCState(nn.Linear(2, 2), warmup=4)


# -------------------------------------------------------------------------------------- one process


def test_momentum_left_in_the_optimiser_warns_once():
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = DGCState(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of other parameters, or with momentum for the weight decay alone: fine.
        other = nn.Parameter(torch.ones(1))
        torch.optim.SGD([other], 0.1, momentum=0.9).step()
        DGCSGD(DGCState(model).parameters.values(), 0.1).step()
        torch.optim.SGD(DGCState(model, momentum=0.0).parameters.values(), 0.0)
    state = DGCState(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="SGD has momentum, and so has DGCState"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    del state


def test_gradient_dropping_keeps_its_momentum_in_the_optimiser_without_a_warning():
    model = nn.Linear(3, 2)
    state = DGCState(model, momentum=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state.attach(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert state.step == 1


def test_state_of_another_model_is_refused():
    state = DGCState(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="other parameters"):
        state.load_state_dict(DGCState(nn.Sequential(nn.Linear(3, 2))).state_dict())
    other = DGCState(nn.Linear(2, 3))
    other.average_gradients()
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 3\), got \(3, 2\)"):
        state.load_state_dict(other.state_dict())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(10, 4, sparse=True)
    state = DGCState(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense, got that of weight"):
        state.average_gradients()


def test_copies_of_model_and_state_belong_together():
    model = nn.Linear(40, 30)
    state = DGCState(model, density=0.01)
    model(torch.ones(1, 40)).sum().backward()
    state.average_gradients()
    twin, same = copy.deepcopy((model, state))
    assert same.parameters["weight"] is twin.weight
    assert copy.deepcopy(state).parameters["weight"] is model.weight
    same.average_gradients()
    assert not torch.equal(
        same.state_dict()["memory"]["weight"]["error"],
        state.state_dict()["memory"]["weight"]["error"],
    )


# ---------------------------------------------------------------------------------- two processes


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def batch(step, rank):
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(16, 20, generator=g), torch.randint(0, 3, (16,), generator=g)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def wrap(model, state=None, **settings):
    # Several buckets, rebuilt after the first backward pass.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005, **settings)
    if state is not None:
        ddp.register_comm_hook(state, dgc_hook)
    return ddp


def train(ddp, optimizer, first, last, seen=()):
    seen = list(seen)
    for step in range(first, last):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        seen.append(flat(ddp))
    return seen


def density_one():
    """Largest difference to DDP and torch's SGD, whole and with a checkpoint in the middle."""
    differences = {}
    for nesterov in (False, True):
        for weight_decay in (0.0, 0.01):
            settings = {
                "momentum": 0.9,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
            }
            ddp = wrap(build())
            plain = train(ddp, torch.optim.SGD(ddp.parameters(), 0.1, **settings), 0, 20)
            model = build()
            state = DGCState(model, density=1.0, nesterov=nesterov)
            ddp = wrap(model, state)
            optimizer = DGCSGD(ddp.parameters(), 0.1, **settings)
            ours = train(ddp, optimizer, 0, 10)
            # Everything new: model, buckets, optimiser and state.
            model = copy.deepcopy(model)
            saved = copy.deepcopy((state.state_dict(), optimizer.state_dict()))
            resumed = DGCState(model, density=1.0, nesterov=nesterov)
            resumed.load_state_dict(saved[0])
            ddp = wrap(model, resumed)
            optimizer = DGCSGD(ddp.parameters(), 0.1, **settings)
            optimizer.load_state_dict(saved[1])
            ours = train(ddp, optimizer, 10, 20, ours)
            difference = (torch.stack(ours) - torch.stack(plain)).abs().max()
            differences[nesterov, weight_decay] = float(difference)
    return differences


SPARSE = {"density": 0.05, "warmup": DensityWarmup(1), "dense_below": 100}


def checkpoint_and_equality_over_ranks():
    """Parameters of a run in one piece, and of one resumed with fresh buckets in the middle."""
    model = build()
    state = DGCState(model, **SPARSE)
    ddp = wrap(model, state)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    straight = train(ddp, optimizer, 0, 5)
    state.step_epoch()
    saved, half = copy.deepcopy(state.state_dict()), copy.deepcopy(model)
    straight = train(ddp, optimizer, 5, 10, straight)
    resumed_state = DGCState(half, **SPARSE)
    resumed_state.load_state_dict(saved)
    resumed = wrap(half, resumed_state, gradient_as_bucket_view=True)
    resumed = train(resumed, torch.optim.SGD(resumed.parameters(), 0.1), 5, 10)
    return {
        "straight": torch.stack(straight),
        "resumed": torch.stack(resumed),
        "bytes": (state.bytes_sent, resumed_state.bytes_sent),
    }


def simulation():
    """Processes (through DDP, and through the optimiser) against workers in one process."""
    results = {}
    for name, settings in {
        "top-k": {"clip_norm": 0.5},
        "nesterov": {"nesterov": True},
        "dropping": {"momentum": 0.0},
        "half": {"values": Cast(torch.float16)},
        "threshold": {"sparsifier": lambda density: Threshold(0.05)},
    }.items():
        state = DGCState(model := build(), density=0.05, warmup=None, **settings)
        ddp = wrap(model, state)
        through_ddp = train(ddp, torch.optim.SGD(ddp.parameters(), 0.1), 0, 6)[-1]

        state = DGCState(model := build(), density=0.05, warmup=None, **settings)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        state.attach(optimizer)
        through_optimizer = train(model, optimizer, 0, 6)[-1]

        model = build()
        shapes = [p.shape for p in model.parameters()]
        worker = DGCWorker(shapes, density=0.05, workers=WORLD, **settings)
        group = SimulatedWorkers(model, nn.functional.cross_entropy, WORLD, worker=worker)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            batches = [batch(step, rank) for rank in range(WORLD)]
            group.backward(*(torch.stack(part) for part in zip(*batches, strict=True)))
            optimizer.step()
        results[name] = through_ddp, through_optimizer, flat(model)
    return results


def gradient_step(rows, dtype=torch.float32, **settings):
    """Average of one given gradient a rank and step, and the state afterwards."""
    d = len(rows[0][0])
    model = nn.Linear(d, 1, bias=False, dtype=dtype)
    state = DGCState(model, warmup=None, dense_below=0, **settings)
    ddp = wrap(model, state)
    seen = []
    for row in rows:
        ddp.zero_grad()
        ddp(row[dist.get_rank()].to(dtype)[None]).sum().backward()
        seen.append(model.weight.grad[0].clone())
    return torch.stack(seen), state


def different_counts():
    """Rank 1 has nothing to send; then both have; thresholds that few entries reach."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=g)
    rows = [[x, torch.zeros_like(x)], [x, x**5]]
    sampled = functools.partial(SampledTopK, sample_ratio=0.001)
    averages, _ = gradient_step(rows, sparsifier=sampled, density=0.001)
    by_threshold, _ = gradient_step(rows, sparsifier=lambda density: Threshold(3.0))
    return averages.to_sparse(), by_threshold.to_sparse()


def not_finite():
    """The second of three steps has a NaN on rank 0 only."""
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randn(50, generator=g) for _ in range(WORLD)] for _ in range(3)]
    kept = [rows[0], rows[2]]
    broken = [rows[0], [rows[1][0].index_fill(0, torch.tensor([3]), math.nan), rows[1][1]], rows[2]]
    (with_nan, state), (without, same) = (gradient_step(r, density=0.1) for r in (broken, kept))
    memory = [s.state_dict()["memory"]["weight"] for s in (state, same)]
    return with_nan, without, memory, (state.skipped, same.skipped)


def loss_scale():
    """Gradients scaled differently from step to step."""
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randn(50, generator=g) for _ in range(WORLD)] for _ in range(3)]
    scales = [8.0, 4.0, 16.0]
    scaled = [[row * s for row in pair] for pair, s in zip(rows, scales, strict=True)]
    remaining = iter(scales)
    plain, _ = gradient_step(rows, density=0.1)
    ours, _ = gradient_step(scaled, density=0.1, loss_scale=lambda: next(remaining))
    half, _ = gradient_step(rows, torch.bfloat16, density=0.1)
    return plain, ours / torch.tensor(scales)[:, None], half


def accumulation():
    """Two backward passes, the first without synchronisation, against one of the sum."""
    results = []
    for accumulate in (True, False):
        state = DGCState(model := build(), **SPARSE)
        ddp = wrap(model, state)
        (x1, y1), (x2, y2) = batch(0, dist.get_rank()), batch(1, dist.get_rank())
        loss = functools.partial(nn.functional.cross_entropy, reduction="sum")
        if accumulate:
            with ddp.no_sync():
                loss(ddp(x1), y1).backward()
            loss(ddp(x2), y2).backward()
        else:
            loss(ddp(torch.cat([x1, x2])), torch.cat([y1, y2])).backward()
        assert state.step == 1
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return results


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(20, 60, bias=False), nn.Linear(20, 60, bias=False)

    def forward(self, x, branch):
        return (self.one, self.two)[branch](x)


def unused():
    """Everything sent for a parameter arrives, whether it was used in that step or not."""
    settings = {"density": 0.05, "momentum": 0.0, "warmup": None, "pause_unused": True}
    state = DGCState(model := Forked(), **settings)
    ddp = wrap(model, state, find_unused_parameters=True)
    arrived, wanted = torch.zeros(60, 20), torch.zeros(60, 20)
    for step in range(6):
        model.zero_grad()
        x, _ = batch(step, dist.get_rank())
        local = torch.zeros_like(wanted)
        branch = step % 2 if step < 4 else dist.get_rank()  # last: used by one rank only
        ddp(x, branch).square().sum().backward()
        if branch == 0:
            local = torch.autograd.grad(model(x, 0).square().sum(), model.one.weight)[0]
        dist.all_reduce(local)
        wanted += local / WORLD
        if model.one.weight.grad is not None:
            arrived += model.one.weight.grad
    left = state.state_dict()["memory"]["one.weight"]["error"].clone()
    dist.all_reduce(left)
    return arrived + left / WORLD, wanted


def wrong_parameters():
    messages = []
    for parameters in (lambda m: m[0], lambda m: [*m.parameters(), nn.Parameter(torch.ones(2))]):
        model = build()
        ddp = wrap(model, DGCState(parameters(model)))
        try:
            ddp(batch(0, 0)[0]).sum().backward()
        except ValueError as error:
            messages.append(str(error))
    return messages


PROGRAMS = (
    density_one,
    checkpoint_and_equality_over_ranks,
    simulation,
    different_counts,
    not_finite,
    loss_scale,
    accumulation,
    unused,
    wrong_parameters,
)


def everything():
    return {program.__name__: program() for program in PROGRAMS}


@pytest.fixture(scope="module")
def ran():
    """What each program returned, by rank; all ran in one pair of processes, which is quicker."""
    by_rank = spawn(everything, WORLD)
    return {name: [result[name] for result in by_rank] for name in by_rank[0]}


@pytest.mark.processes
class TestProcesses:
    def test_density_one_is_ddp_with_momentum_also_after_a_checkpoint(self, ran):
        for differences in ran["density_one"]:
            assert len(differences) == 4
            assert max(differences.values()) <= 1e-6

    def test_sparse_runs_continue_bit_for_bit_and_ranks_agree(self, ran):
        one, two = ran["checkpoint_and_equality_over_ranks"]
        assert torch.equal(one["straight"], two["straight"])
        assert torch.equal(one["straight"][5:], one["resumed"])
        assert one["bytes"][0] == one["bytes"][1] > 0

    def test_processes_do_what_simulated_workers_do(self, ran):
        for result in ran["simulation"]:
            for name, (through_ddp, through_optimizer, simulated) in result.items():
                assert torch.equal(through_ddp, through_optimizer), name
                torch.testing.assert_close(through_ddp, simulated, rtol=0, atol=1e-6)

    def test_ranks_may_send_different_numbers_of_entries(self, ran):
        (one, by_threshold), (two, by_threshold_too) = ran["different_counts"]
        assert torch.equal(one.to_dense(), two.to_dense())
        assert torch.equal(by_threshold.to_dense(), by_threshold_too.to_dense())
        first, second = ((row != 0).sum() for row in one.to_dense())
        assert 320 <= first <= 520  # of one rank only
        assert 640 <= second <= 1040

    def test_a_step_that_is_not_finite_somewhere_is_skipped_everywhere(self, ran):
        for with_nan, without, memory, skipped in ran["not_finite"]:
            assert with_nan[1].isnan().all()
            assert torch.equal(with_nan[[0, 2]], without)
            assert all(torch.equal(memory[0][key], memory[1][key]) for key in memory[0])
            assert skipped == (1, 0)

    def test_memory_does_not_depend_on_the_scale_of_the_loss(self, ran):
        for plain, ours, half in ran["loss_scale"]:
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
            # 8 bits of mantissa; the same entries unless rounding changes their order.
            assert half.dtype == torch.bfloat16
            assert ((half != 0) == (plain != 0)).float().mean() > 0.9

    def test_accumulated_gradients_enter_once(self, ran):
        for accumulated, at_once in ran["accumulation"]:
            torch.testing.assert_close(accumulated, at_once, rtol=1e-5, atol=1e-5)

    def test_nothing_is_lost_of_parameters_that_are_not_always_used(self, ran):
        for found, wanted in ran["unused"]:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)

    def test_state_of_other_parameters_is_refused(self, ran):
        for messages in ran["wrong_parameters"]:
            assert "must hold all parameters" in messages[0]
            assert "that DDP does not: 6" in messages[1]
