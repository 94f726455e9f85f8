"""Quantities beside a backward pass of the user's."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import all_reduce_quantities, compute, extend
from assay.distributed.testing import spawn
from curvature_models import largest_error, make

NAMES = ("grad_batch", "batch_l2", "second_moment", "variance", "diag_ggn", "kflr", "diag_hessian")


@pytest.mark.parametrize("name", ["mlp", "residual", "language-model", "lstm"])
def test_equal_to_compute(name):
    model, x, y = make(name)
    loss_fn = nn.CrossEntropyLoss()
    expected = compute(model, loss_fn, x, y, NAMES)
    with extend(model, loss_fn, NAMES) as found:
        loss_fn(model(x), y).backward()
    for quantity in set(NAMES) - {"kflr"}:
        assert largest_error(found[quantity], expected[quantity]) < 1e-12, quantity
    grads = {k: p.grad for k, p in model.named_parameters()}
    mean = {k: g.mean(0) for k, g in found["grad_batch"].items()}
    assert largest_error(mean, grads) < 1e-10


def test_each_backward_starts_anew():
    model, x, y = make("mlp")
    loss_fn = nn.CrossEntropyLoss()
    with extend(model, loss_fn, ["grad_batch"]) as found:
        for rows in (slice(0, 2), slice(2, 4), slice(0, 4)):
            with torch.no_grad():
                model(x)
            loss_fn(model(x[rows]), y[rows]).backward()
            assert found.samples == rows.stop - rows.start
    assert largest_error(
        found["grad_batch"], compute(model, loss_fn, x, y, ["grad_batch"])["grad_batch"]
    ) < 1e-12  # fmt: skip


def test_a_model_that_is_called_twice():
    model, x, y = make("mlp")
    with extend(model, None, ["grad_batch"]) as found:
        F.cross_entropy(model(x) + model(2 * x), y).backward()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x) + self.body(2 * x)

    expected = compute(Twice(), F.cross_entropy, x, y, ["grad_batch"])["grad_batch"]
    renamed = {k.removeprefix("body."): v for k, v in expected.items()}
    assert largest_error(found["grad_batch"], renamed) < 1e-12
    with extend(model, None, ["grad_batch"]):
        model(x)
        with pytest.raises(ValueError, match="4 and 3 samples"):
            model(x[:3])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_no_graph_is_kept_alive_even_with_create_graph():
    model, x, y = make("residual")
    kept = []
    with extend(model, None, ["variance", "kfac", "diag_ggn"]) as found:
        z = model(x)
        kept.append(weakref.ref(z))
        F.cross_entropy(z, y).backward(create_graph=True)
        del z
    assert not any(v.requires_grad for v in found["variance"].values())
    assert not any(f.left.requires_grad for f in found["kfac"].values())
    for p in model.parameters():
        p.grad = None  # what torch itself keeps
    gc.collect()
    assert kept[0]() is None


def test_hooks_are_gone_after_the_block():
    model, x, _ = make("residual")
    with pytest.raises(RuntimeError, match="stop"), extend(model, None, ["variance"]):
        raise RuntimeError("stop")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model.train()
    with pytest.raises(ValueError, match="norm"), extend(model, None, ["variance"]):
        model(x)


REDUCED = ("grad", "grad_batch", "batch_l2", "second_moment", "variance", "diag_ggn", "kflr",
           "diag_hessian_mc")  # fmt: skip


def _share(rank_rows, loss_fn):
    rows = rank_rows[torch.distributed.get_rank()]
    model, x, y = make("residual")
    parallel = nn.parallel.DistributedDataParallel(model)
    q = compute(parallel, loss_fn, x[rows], y[rows], REDUCED, mc_samples=2)
    reduced = all_reduce_quantities(q)
    with extend(parallel, loss_fn, ["variance", "grad"]) as beside:
        loss_fn(parallel(x[rows]), y[rows]).backward()
    again = all_reduce_quantities(beside)
    dense = {k: f.to_dense() for k, f in reduced["kflr"].items()}
    values = {k: reduced[k] for k in REDUCED[:6]}
    return values, dense, again["variance"], reduced.samples, model.head.bias.grad


@pytest.mark.processes
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_processes_together_have_the_quantities_of_all_samples(loss_fn):
    shares = [[0, 1, 2], [3]]
    results = spawn(_share, 2, shares, loss_fn)
    model, x, y = make("residual")
    whole = compute(model, loss_fn, x, y, REDUCED[:7])
    for rank, (values, dense, variance, samples, _) in enumerate(results):
        assert samples == 4
        for quantity in ("grad", "second_moment", "variance", "diag_ggn"):
            assert largest_error(values[quantity], whole[quantity]) < 1e-9, quantity
        assert largest_error(variance, whole["variance"]) < 1e-9
        local = {k: v[shares[rank]] for k, v in whole["grad_batch"].items()}
        assert largest_error(values["grad_batch"], local) < 1e-9
        for k, f in whole["kflr"].items():
            torch.testing.assert_close(dense[k], f.to_dense())
    torch.testing.assert_close(results[0][4], results[1][4])  # DDP's own hooks ran


def test_variance_over_processes_needs_the_mean():
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match="needs 'grad'"):
        all_reduce_quantities(compute(model, F.cross_entropy, x, y, ["variance"]))


def _spread_out(rows):
    torch.manual_seed(0)
    y = 1000 + 0.01 * torch.randn(6, 1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    own = rows[torch.distributed.get_rank()]
    q = compute(model, nn.MSELoss(), torch.ones(len(own), 1), y[own], ["grad", "variance"])
    return all_reduce_quantities(q)["variance"]["weight"], y


@pytest.mark.processes
def test_the_variance_over_processes_does_not_cancel():
    for found, y in spawn(_spread_out, 2, [[0, 1, 2, 3], [4, 5]]):
        expected = 4 * y.double().var(0, correction=0, keepdim=True)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)


def test_bad_settings():
    model, _, _ = make("mlp")
    for bad in ({"mc_samples": 0}, {"kfac_approx": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))), extend(model, None, ["kfac"], **bad):
            pass
