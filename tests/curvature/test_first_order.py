"""Individual gradients and their moments are those of a loop over samples, for any model."""

import gc
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import compute, uses
from assay.curvature import first_order as module
from assay.curvature.plan import Plan
from curvature_models import CASES, largest_error, make, rows_by_loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning"),
]
FIRST = ("grad", "grad_batch", "batch_l2", "second_moment", "variance")
TOKENS = [name for name, (_, shape) in CASES.items() if shape == "tokens"]


def _expected(rows):
    return {
        "grad": {k: r.mean(0) for k, r in rows.items()},
        "grad_batch": rows,
        "batch_l2": {k: r.reshape(len(r), -1).square().sum(1) for k, r in rows.items()},
        "second_moment": {k: r.square().mean(0) for k, r in rows.items()},
        "variance": {k: r.var(0, correction=0) for k, r in rows.items()},
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_loop(name, dtype, tolerance):
    model, x, y = make(name, dtype)
    found = compute(model, nn.CrossEntropyLoss(), x, y, FIRST)
    # The loop is in float64 for both: in float32 it has roundings of its own.
    model, x = model.double(), x if name in TOKENS else x.double()
    expected = _expected(rows_by_loop(model, x, y))
    for quantity in FIRST:
        assert largest_error(found[quantity], expected[quantity]) < tolerance, quantity


@pytest.mark.parametrize("name", CASES)
def test_alone_as_together(name):
    model, x, y = make(name)
    together = compute(model, nn.CrossEntropyLoss(), x, y, FIRST)
    for quantity in FIRST:
        alone = compute(model, nn.CrossEntropyLoss(), x, y, [quantity])
        assert set(alone) == {quantity}
        assert largest_error(alone[quantity], together[quantity]) < 1e-10


def test_hardly_any_model_needs_the_last_resort(monkeypatch):
    opaque = {}
    original = Plan.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        opaque.update({name: s.opaque for name, s in self.sources.items() if s.opaque})

    monkeypatch.setattr(Plan, "__init__", watched)
    for name in CASES:
        model, x, y = make(name)
        opaque.clear()
        compute(model, F.cross_entropy, x, y, ["grad_batch"])
        expected = {"hidden", "assigned"} if name == "unusual" else set()
        assert set(opaque) == expected, name


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunks_do_not_matter(chunk_size, reduction):
    model, x, y = make("residual")
    loss = nn.CrossEntropyLoss(reduction=reduction)
    names = (*FIRST, "diag_ggn", "kflr", "diag_hessian")
    whole = compute(model, loss, x, y, names)
    parts = compute(model, loss, x, y, names, chunk_size=chunk_size)
    for quantity in (*FIRST, "diag_ggn", "diag_hessian"):
        assert largest_error(parts[quantity], whole[quantity]) < 1e-10, quantity
    for name, factors in whole["kflr"].items():
        torch.testing.assert_close(parts["kflr"][name].to_dense(), factors.to_dense())


def test_chunks_of_a_loss_that_ignores_some_targets():
    model, x, y = make("mlp")
    y[1] = 3
    loss = nn.CrossEntropyLoss(ignore_index=3, weight=torch.rand(5, dtype=torch.float64))
    whole = compute(model, loss, x, y, (*FIRST, "diag_ggn"))
    parts = compute(model, loss, x, y, (*FIRST, "diag_ggn"), chunk_size=2)
    mean = {k: g.mean(0) for k, g in whole["grad_batch"].items()}
    assert largest_error(mean, whole["grad"]) < 1e-12
    reference = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(tuple(whole["grad"].values()), reference)
    for quantity in (*FIRST, "diag_ggn"):
        assert largest_error(parts[quantity], whole[quantity]) < 1e-10, quantity


def test_scale_loss_is_what_a_sample_contributes():
    model, x, y = make("mlp")
    own = compute(model, F.cross_entropy, x, y, FIRST)
    scaled = compute(model, F.cross_entropy, x, y, FIRST, scale="loss")
    rows = {k: r / len(x) for k, r in own["grad_batch"].items()}
    assert largest_error(scaled["grad_batch"], rows) < 1e-12
    assert largest_error(scaled["grad"], {k: r.sum(0) for k, r in rows.items()}) < 1e-12
    sums = {k: r.square().sum(0) for k, r in rows.items()}
    assert largest_error(scaled["second_moment"], sums) < 1e-12
    spread = {k: r.var(0, correction=0) for k, r in rows.items()}
    assert largest_error(scaled["variance"], spread) < 1e-10


@pytest.mark.parametrize("loss_fn", [
    lambda z, y: F.cross_entropy(z, y, reduction="none"),
    lambda z, y: F.nll_loss(z.log_softmax(1), y),
    lambda z, y: 0.5 * F.cross_entropy(z, y) + 0.5 * F.cross_entropy(z, y),
])  # fmt: skip
def test_any_loss_that_is_a_mean_over_samples(loss_fn):
    model, x, y = make("mlp")
    rows = rows_by_loop(model, x, y)
    found = compute(model, loss_fn, x, y, ["grad_batch"])
    assert largest_error(found["grad_batch"], rows) < 1e-12


def test_sum_over_samples_has_the_same_individual_gradients():
    model, x, y = make("mlp")
    rows = rows_by_loop(model, x, y)
    for loss_fn in (
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="sum"),
    ):
        found = compute(model, loss_fn, x, y, ["grad", "grad_batch"])
        assert largest_error(found["grad_batch"], rows) < 1e-12
        assert largest_error(found["grad"], {k: r.sum(0) for k, r in rows.items()}) < 1e-12


def test_loss_inside_the_model():
    class WithLoss(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, labels):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, x, y = make("mlp")
    inputs = {"x": x, "labels": y}
    found = compute(WithLoss(model), lambda out, _: out["loss"], inputs, None,
                    ["grad_batch", "diag_ggn"])  # fmt: skip
    direct = compute(model, F.cross_entropy, x, y, ["grad_batch", "diag_ggn"])
    for quantity in direct:
        expected = {f"body.{k}": v for k, v in direct[quantity].items()}
        assert largest_error(found[quantity], expected) < 1e-12


def test_folded_output_of_a_language_model():
    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.rnn = nn.RNN(4, 4, batch_first=True)
            self.out = nn.Linear(4, 6)

        def forward(self, tokens):
            return self.out(self.rnn(self.embed(tokens))[0])

    def loss_fn(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    torch.manual_seed(0)
    model = PerToken().double()
    tokens, targets = torch.randint(6, (3, 5)), torch.randint(6, (3, 5))
    found = compute(model, loss_fn, tokens, targets, ["grad_batch", "diag_ggn"])
    rows = rows_by_loop(model, tokens, targets, loss_fn)
    assert largest_error(found["grad_batch"], rows) < 1e-12
    other = compute(
        model, lambda z, y: F.cross_entropy(z.transpose(1, 2), y), tokens, targets, ["diag_ggn"]
    )
    assert largest_error(found["diag_ggn"], other["diag_ggn"]) < 1e-12


def test_time_first_inputs():
    model, x, y = make("lstm-projected")
    found = compute(_TimeFirst(model), F.cross_entropy, x.transpose(0, 1), y, ["grad_batch"],
                    batch_dim=1)  # fmt: skip
    expected = {f"body.{k}": v for k, v in rows_by_loop(model, x, y).items()}
    assert largest_error(found["grad_batch"], expected) < 1e-12


class _TimeFirst(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x.transpose(0, 1))


def test_one_sample():
    for name in CASES:
        model, x, y = make(name, samples=1)
        found = compute(model, F.cross_entropy, x, y, ["grad_batch"])
        assert largest_error(found["grad_batch"], rows_by_loop(model, x, y)) < 1e-10, name


def test_non_contiguous_input():
    model, x, y = make("convolutions")
    found = compute(model, F.cross_entropy, x.mT.contiguous().mT, y, ["grad_batch"])
    assert largest_error(found["grad_batch"], rows_by_loop(model, x, y)) < 1e-12


def test_training_batchnorm_is_refused_by_name():
    model, x, y = make("residual")
    model.train()
    with pytest.raises(ValueError, match=r"norm \(BatchNorm2d\).*\.eval\(\)"):
        compute(model, F.cross_entropy, x, y, ["grad_batch"])
    reference = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    found = compute(model, F.cross_entropy, x, y, ["grad"])
    torch.testing.assert_close(tuple(found["grad"].values()), reference)


def test_functional_batch_statistics_are_refused():
    class Normalising(nn.Linear):
        def forward(self, x):
            return F.batch_norm(super().forward(x), None, None, training=True)

    with pytest.raises(ValueError, match="mixes the samples"):
        compute(Normalising(3, 2), F.cross_entropy, torch.randn(4, 3), torch.zeros(4).long())


@pytest.mark.parametrize("loss_fn", [
    lambda z, y: F.cross_entropy(z, y).square(),
    lambda z, y: (z.mean(0) ** 2).sum(),
])  # fmt: skip
def test_a_loss_that_is_no_mean_is_refused(loss_fn):
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match="not a mean or sum over samples"):
        compute(model, loss_fn, x, y)


def test_empty_batch_nan_and_bad_names_are_refused():
    model, x, y = make("mlp")
    with pytest.raises(ValueError, match="batch is empty"):
        compute(model, F.cross_entropy, x[:0], y[:0])
    with pytest.raises(ValueError, match="NaN"):
        compute(model, F.cross_entropy, x * float("nan"), y)
    with pytest.raises(ValueError, match="quantities must be some of"):
        compute(model, F.cross_entropy, x, y, ["gradients"])
    with pytest.raises(TypeError, match="must hold a tensor"):
        compute(model, F.cross_entropy, None, y)
    with pytest.raises(ValueError, match="every target is ignored"):
        compute(model, F.cross_entropy, x, torch.full((4,), -100))
    for bad in ({"scale": "x"}, {"mc_samples": 0}, {"chunk_size": 0}, {"kfac_approx": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            compute(model, F.cross_entropy, x, y, **bad)


def test_frozen_and_unused_parameters():
    model, x, y = make("mlp")
    model[0].weight.requires_grad_(False)
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    found = compute(model, F.cross_entropy, x, y, (*FIRST, "diag_ggn", "kfac"))
    assert "0.weight" not in found["grad_batch"]
    assert set(found["grad_batch"]) == {name for name, p in model.named_parameters() if
                                        p.requires_grad}  # fmt: skip
    for quantity in (*FIRST, "diag_ggn"):
        assert found[quantity]["spare"].abs().max() == 0
    with pytest.raises(ValueError, match="frozen"):
        compute(model, F.cross_entropy, x, y, params=["0.weight"])
    assert list(compute(model, F.cross_entropy, x, y, ["grad"], params=["2.bias"])["grad"]) == [
        "2.bias"
    ]


def test_nothing_of_the_users_is_touched():
    model, x, y = make("residual")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        compute(model, F.cross_entropy, x, y, (*FIRST, "kflr", "diag_hessian"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad
    assert not vars(x)
    assert not model._forward_hooks


def test_in_place_changes_of_an_input_cannot_pass():
    class Overwrites(nn.Linear):
        def forward(self, x):
            h = x * 2
            z = h @ self.weight.T
            h.add_(1)
            return z

    with pytest.raises(RuntimeError, match="inplace operation"):  # autograd's own check
        compute(Overwrites(3, 2), F.cross_entropy, torch.randn(4, 3), torch.zeros(4).long())


def test_the_graph_is_not_kept_alive():
    kept = []
    for name in ("residual", "unusual"):
        model, x, y = make(name)
        handle = model.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
        compute(model, F.cross_entropy, x, y, (*FIRST, "kfac", "kflr"))
        handle.remove()
    gc.collect()
    assert [output() for output in kept] == [None, None]


def test_memory_stays_flat_over_many_calls():
    model, x, y = make("mlp")
    names = ("grad_batch", "kfac", "diag_hessian")

    def alive():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    compute(model, F.cross_entropy, x, y, names)
    before = alive()
    for _ in range(500):
        compute(model, F.cross_entropy, x, y, names[:2])
    compute(model, F.cross_entropy, x, y, names)
    assert alive() <= before


RESIDENT = """
import torch, torch.nn.functional as F
from pathlib import Path
from assay.curvature import compute

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10)
)
x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
# A result is 0.4 MB of individual gradients and 0.1 MB of factors.
for call in range(1, 501):
    compute(model, F.cross_entropy, x, y, ("grad_batch", "variance", "diag_ggn", "kfac"))
    if call in (50, 500):
        print(int(Path("/proc/self/statm").read_text().split()[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_resident_memory_stays_flat_over_many_calls():
    # A process of its own: there is no other garbage in it, and type checks keep no traces.
    run = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    early, late = (int(pages) * resource.getpagesize() for pages in run.stdout.split())
    # 9 kB leaked a call, a fortieth of the individual gradients, would be too much.
    assert late - early < 4 << 20


def test_buffers_are_written_again():
    model, x, y = make("convolutions")
    first = compute(model, F.cross_entropy, x, y, (*FIRST, "diag_ggn", "kfac"))
    addresses = {k: v.data_ptr() for k, v in first["grad_batch"].items()}
    y = (y + 1) % 5
    expected = compute(model, F.cross_entropy, x, y, (*FIRST, "diag_ggn", "kflr"))
    again = compute(model, F.cross_entropy, x, y, (*FIRST, "diag_ggn", "kflr"), out=first)
    assert {k: v.data_ptr() for k, v in again["grad_batch"].items()} == addresses
    for quantity in (*FIRST, "diag_ggn"):
        assert largest_error(again[quantity], expected[quantity]) < 1e-12, quantity
    again = compute(model, F.cross_entropy, x, y, ("kflr",), out=expected)
    other = compute(model, F.cross_entropy, x, y, ("kflr",))
    for name, factors in other["kflr"].items():
        torch.testing.assert_close(again["kflr"][name].to_dense(), factors.to_dense())
    smaller = compute(model, F.cross_entropy, x[:2], y[:2], FIRST, out=first)
    assert largest_error(smaller["grad_batch"], rows_by_loop(model, x[:2], y[:2])) < 1e-10


def test_autocast_gives_parameters_dtype():
    model, x, y = make("language-model", torch.float32)
    exact = compute(model, F.cross_entropy, x, y, ["grad_batch", "kflr"])
    with torch.autocast("cpu", torch.bfloat16):
        rough = compute(model, F.cross_entropy, x, y, ["grad_batch", "kflr"])
    for name, rows in rough["grad_batch"].items():
        assert rows.dtype == torch.float32
        error = (rows - exact["grad_batch"][name]).norm() / exact["grad_batch"][name].norm()
        assert error < 0.1, name  # bfloat16 has 8 bits
    assert all(f.left.dtype == torch.float32 for f in rough["kflr"].values())


def test_compiled_and_parallel_wrappers_are_taken_off():
    model, x, y = make("mlp")
    compiled = torch.compile(model, backend="eager")
    found = compute(compiled, F.cross_entropy, x, y, ["grad_batch"])
    assert largest_error(found["grad_batch"], rows_by_loop(model, x, y)) < 1e-12


def test_a_compiled_part_is_seen_through():
    model, x, y = make("mlp")
    outer = nn.Sequential(torch.compile(model[:3], backend="eager"), model[3:])
    found = compute(outer, F.cross_entropy, x, y, ["grad_batch"])
    expected = rows_by_loop(model, x, y)
    assert (
        largest_error(dict(zip(expected, found["grad_batch"].values(), strict=True)), expected)
        < 1e-12
    )


def test_dropout_uses_one_mask_for_all_quantities():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    found = compute(model, F.cross_entropy, x, y, ["grad", "grad_batch"])
    mean = {k: r.mean(0) for k, r in found["grad_batch"].items()}
    assert largest_error(mean, found["grad"]) < 1e-12


def test_packed_sequences_cost_a_pass_a_sample_and_are_right():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(self.rnn(packed)[1][0])

    torch.manual_seed(0)
    model, x, y = Packed().double(), torch.randn(4, 5, 3).double(), torch.randint(5, (4,))
    found = compute(model, F.cross_entropy, x, y, (*FIRST, "diag_ggn"))
    assert largest_error(found["grad_batch"], rows_by_loop(model, x, y)) < 1e-12


def test_a_scale_by_frequency_is_refused():
    model = nn.Sequential(
        nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 2)
    )
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        compute(model, F.cross_entropy, torch.zeros(2, 2).long(), torch.zeros(2).long())


# -- variances do not cancel ---------------------------------------------------------------------


def _close_gradients(kind, dtype=torch.float32):
    """Samples whose gradients are alike up to 1e-5 of their size, and targets far away."""
    torch.manual_seed(0)
    model, shape = {
        "linear": (nn.Linear(3, 2), (3,)),
        "sequence": (nn.Linear(3, 2), (4, 3)),
        "convolution": (nn.Conv1d(3, 2, 2), (3, 5)),
        "norm": (nn.LayerNorm(3), (3,)),
        "shared": (nn.Sequential(*[nn.Linear(3, 3)] * 2), (3,)),
        "recurrent": (_LastOutput(), (4, 3)),
    }[kind]
    x = torch.randn(shape).expand(16, *shape) + 1e-5 * torch.randn(16, *shape)
    y = torch.full_like(model(x), 100.0)
    return model.to(dtype), x.to(dtype), y.to(dtype)


class _LastOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


CLOSE = ["linear", "sequence", "convolution", "norm", "shared", "recurrent"]


@pytest.mark.parametrize("names", [("variance",), FIRST])
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("kind", CLOSE)
def test_a_variance_far_below_the_mean(kind, chunk_size, names):
    model, x, y = _close_gradients(kind)
    found = compute(model, nn.MSELoss(), x, y, names, chunk_size=chunk_size)["variance"]
    exact = compute(model.double(), nn.MSELoss(), x.double(), y.double(), ["grad", "variance"])
    eps = torch.finfo(torch.float32).eps
    for name, variance in exact["variance"].items():
        mean = exact["grad"][name].abs().max()  # of the terms that an entry is the sum of
        # A gradient is off by some eps of its size, thus a deviation by so much: eps |mean|; ten
        # roundings lead to it. The difference of two moments would be off by eps mean².
        slack = 10 * eps * mean * variance.sqrt() + (10 * eps * mean).square()
        assert (found[name] >= 0).all(), name
        assert ((found[name] - variance).abs() <= slack).all(), name
        assert (slack < eps * mean.square()).all(), name


def test_variance_of_a_regression_on_targets_far_away():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    torch.manual_seed(0)
    x, y = torch.ones(64, 1), 1000 + 0.01 * torch.randn(64, 1)
    found = compute(model, nn.MSELoss(), x, y, ["variance"])["variance"]["weight"]
    torch.testing.assert_close(
        found.double(), 4 * y.double().var(0, correction=0, keepdim=True), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [("variance",), FIRST])
def test_equal_gradients_have_no_variance(names, dtype, chunk_size):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    nn.init.zeros_(model.weight)  # so that all outputs are equal, whatever order sums are taken in
    x, y = torch.randn(1, 3).to(dtype), torch.randn(1, 2).to(dtype) + 7
    for samples in (1, 3, 7):
        found = compute(
            model, nn.MSELoss(), x.expand(samples, 3), y.expand(samples, 2), names,
            chunk_size=chunk_size,
        )  # fmt: skip
        assert all(not v.any() for v in found["variance"].values()), samples


@pytest.mark.parametrize("name", CASES)
def test_one_sample_has_no_variance(name):
    model, x, y = make(name, torch.float32, samples=1)
    found = compute(model, F.cross_entropy, x, y, ["variance"])["variance"]
    assert all(not v.any() for v in found.values())


@pytest.mark.parametrize("name", CASES)
def test_both_formulas_agree(name, monkeypatch):
    model, x, y = make(name)
    expected = {k: r.var(0, correction=0) for k, r in rows_by_loop(model, x, y).items()}
    for share in (-1.0, 2.0):  # never and always two passes
        monkeypatch.setattr(module, "CANCELLED", share)
        for names in (["variance"], FIRST):
            found = compute(model, F.cross_entropy, x, y, names)["variance"]
            assert largest_error(found, expected) < 1e-10


def test_two_passes_keep_few_gradients_at_once(monkeypatch):
    monkeypatch.setattr(uses, "SCRATCH", 12)
    monkeypatch.setattr(module, "CANCELLED", 2.0)
    for name in ("mlp", "convolutions", "embedded"):
        model, x, y = make(name)
        expected = {k: r.var(0, correction=0) for k, r in rows_by_loop(model, x, y).items()}
        found = compute(model, F.cross_entropy, x, y, ["variance"])["variance"]
        assert largest_error(found, expected) < 1e-10


def test_squares_that_overflow():
    model = nn.Linear(1, 1, bias=False).half()
    nn.init.zeros_(model.weight)
    x = torch.full((4, 1), 4.0).half()
    y = torch.tensor([[100.0], [102.0], [100.0], [102.0]]).half()
    found = compute(model, nn.MSELoss(), x, y, ["variance"])["variance"]["weight"]
    assert found.item() == 64  # gradients are −808 ± 8
