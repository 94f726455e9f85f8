"""AMSGrad and AdamNC against scalar recursions, torch's optimisers, and their own theory."""

import copy
import math
import pickle
import subprocess
import sys

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.kernels.adam import AdamUpdate, adam_updates_
from assay.optim import AdamNC, AMSGrad, Box, amsgrad
from assay.optim.projected_adam import Coefficients, Options, _fused_by_torch

STEPS = 30
IMPLEMENTATIONS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "capturable-foreach": {"capturable": True, "foreach": True},
    "differentiable": {"differentiable": True},
}
OPTIONS = {
    "plain": {},
    "eps-0": {"eps": 0.0},
    "weight-decay": {"weight_decay": 0.1},
    "decoupled-maximize": {"weight_decay": 0.1, "decoupled": True, "maximize": True},
    "constant-lr": {"lr_decay": None},
    "beta1-geometric": {"beta1_decay": 0.9},
    "beta1-harmonic": {"beta1_decay": "1/t"},
    "box": {"projection": Box(-0.5, 0.5)},
}
AMSGRAD_OPTIONS = OPTIONS | {
    "corrected": {"bias_correction": "before_max"},
    "corrected-geometric": {"bias_correction": "before_max", "beta1_decay": 0.8},
    "corrected-harmonic": {"bias_correction": "before_max", "beta1_decay": "1/t"},
}


def _gradients(steps, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    # Spread over scales, with exact zeros: where the maximum and eps=0 matter.
    gradients *= torch.rand(steps, 1, generator=generator, dtype=torch.float64) ** 3
    gradients[torch.rand(steps, size, generator=generator) < 0.2] = 0
    gradients[:, 0] = 0
    return gradients.to(dtype)


def _feed(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach().clone()


def _start(size=5, dtype=torch.float64, **options):
    param = nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype))
    # autograd allows in-place changes only of tensors that are no leaves
    return param.clone() if options.get("differentiable") else param


def _scalar_recursion(
    x,
    gradients,
    *,
    lr,
    beta1,
    beta2,
    maximum,
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    bias_correction=False,
    beta1_decay=None,
    lr_decay="sqrt",
    projection=None,
    maximize=False,
):
    """One coordinate in plain Python, written from the paper's algorithm."""
    m = v = highest = 0.0
    remaining = 1.0  # the product of all β1_t
    for t, gradient in enumerate(gradients, start=1):
        alpha = lr / math.sqrt(t) if lr_decay else lr
        b1 = beta1
        if beta1_decay == "1/t":
            b1 = beta1 / t
        elif beta1_decay:
            b1 = beta1 * beta1_decay ** (t - 1)
        b2 = beta2(t)
        g = -gradient if maximize else gradient
        if decoupled:
            x -= alpha * weight_decay * x
        else:
            g += weight_decay * x
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        remaining *= b1
        first, second = m, v
        if bias_correction:
            first, second = m / (1 - remaining), v / (1 - b2**t)
        highest = max(highest, second) if maximum else second
        scale = math.sqrt(highest) + eps
        x -= alpha * first / scale if scale > 0 else 0.0
        if projection:
            x = min(max(x, projection.lower), projection.upper)
    return x


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", AMSGRAD_OPTIONS)
def test_amsgrad_is_the_scalar_recursion(name, how):
    options = AMSGRAD_OPTIONS[name]
    gradients = _gradients(STEPS, 5)
    param = _start(**IMPLEMENTATIONS[how])
    start = param.detach().clone()
    optimizer = AMSGrad([param], lr=0.1, betas=(0.9, 0.99), **options, **IMPLEMENTATIONS[how])
    found = _feed(optimizer, param, gradients)
    expected = [
        _scalar_recursion(x, g, lr=0.1, beta1=0.9, beta2=lambda t: 0.99, maximum=True, **options)
        for x, g in zip(start.tolist(), gradients.T.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_adamnc_is_the_scalar_recursion(name, how):
    options = OPTIONS[name]
    gradients = _gradients(STEPS, 5)
    param = _start(**IMPLEMENTATIONS[how])
    start = param.detach().clone()
    optimizer = AdamNC([param], lr=0.1, beta1=0.9, **options, **IMPLEMENTATIONS[how])
    found = _feed(optimizer, param, gradients)
    expected = [
        _scalar_recursion(
            x, g, lr=0.1, beta1=0.9, beta2=lambda t: 1 - 1 / t, maximum=False, **options
        )
        for x, g in zip(start.tolist(), gradients.T.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_adamnc_follows_a_schedule_of_the_user():
    def schedule(t):
        return 1 - 1 / (t + 1)

    gradients = _gradients(STEPS, 3)
    param = _start(3)
    start = param.tolist()
    found = _feed(AdamNC([param], lr=0.1, schedule=schedule), param, gradients)
    expected = [
        _scalar_recursion(x, g, lr=0.1, beta1=0.9, beta2=schedule, maximum=False)
        for x, g in zip(start, gradients.T.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_without_momentum_adamnc_is_adagrad(how):
    gradients = _gradients(STEPS, 5)
    ours, theirs = _start(), _start()
    found = _feed(
        AdamNC([ours], lr=0.1, beta1=0.0, eps=0.0, **IMPLEMENTATIONS[how]), ours, gradients
    )
    expected = _feed(torch.optim.Adagrad([theirs], lr=0.1, eps=1e-300), theirs, gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_with_growing_gradients_amsgrad_is_torch_adam(how):
    # v/(1 − β2^t) rises as long as squared gradients do: the maximum is then never in the past.
    scales = torch.linspace(1, 3, STEPS, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0]).repeat(STEPS // 2)
    gradients = torch.stack([scales, scales * signs], dim=1)
    ours, theirs = _start(2), _start(2)
    optimizer = AMSGrad(
        [ours],
        lr=0.01,
        betas=(0.9, 0.99),
        bias_correction="before_max",
        lr_decay=None,
        weight_decay=0.01,
        decoupled=True,
        **IMPLEMENTATIONS[how],
    )
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
    found, expected = _feed(optimizer, ours, gradients), _feed(reference, theirs, gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
def test_amsgrad_nears_torchs_when_the_bias_is_gone(options):
    # After t steps torch divides by factors that differ from 1 by at most β^t.
    gradients = _gradients(400, 5) + 1
    ours, theirs = _start(), _start()
    mine = AMSGrad([ours], lr=0.01, betas=(0.5, 0.9), lr_decay=None, **options)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.9), amsgrad=True, **options)
    _feed(mine, ours, gradients[:300])
    _feed(reference, theirs, gradients[:300])
    with torch.no_grad():
        theirs.copy_(ours)
    mine.state[ours] = copy.deepcopy(reference.state[theirs])
    found, expected = _feed(mine, ours, gradients[300:]), _feed(reference, theirs, gradients[300:])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias_correction", [False, "before_max"])
@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), beta2=st.floats(0.5, 0.9999))
def test_second_moment_never_decreases(how, bias_correction, seed, beta2):
    gradients = _gradients(30, 4, seed, torch.float32)
    param = _start(4, torch.float32)
    optimizer = AMSGrad(
        [param], betas=(0.5, beta2), bias_correction=bias_correction, **IMPLEMENTATIONS[how]
    )
    before = torch.zeros(4)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        now = optimizer.state[param]["max_exp_avg_sq"].clone()
        assert (now >= before).all()
        before = now


def test_torchs_effective_second_moment_does_decrease():
    # A gradient that decays: torch divides the maximum by 1 − β2^t, which grows towards 1.
    beta2 = 0.999
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([param], betas=(0.9, beta2), amsgrad=True)
    effective = []
    for t in range(1, 201):
        param.grad = torch.tensor([0.9 ** (t - 1)], dtype=torch.float64)
        optimizer.step()
        effective.append(optimizer.state[param]["max_exp_avg_sq"].item() / (1 - beta2**t))
    assert effective[0] == pytest.approx(1.0, rel=1e-12)
    # v_t = (1 − β2) Σ β2^{t−j} 0.81^{j−1} tends to (1 − β2)/(1 − 0.81) from below.
    assert effective[-1] < 0.03


def _halfspace(normal, offset):
    """Weighted projection onto {x : normal·x ≤ offset}, in closed form."""

    def project(point, scale):
        excess = (normal @ point - offset).clamp(min=0)
        direction = normal / scale
        return point - excess / (normal @ direction) * direction

    return project


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_projection_is_weighted_by_the_second_moment(how):
    normal = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    gradients = _gradients(1, 3) + torch.tensor([-30.0, -4.0, 1.0])
    free, bound = _start(3), _start(3, **IMPLEMENTATIONS[how])
    target = _feed(AMSGrad([free], lr=1.0), free, gradients)
    optimizer = AMSGrad([bound], lr=1.0, projection=_halfspace(normal, 0.1), **IMPLEMENTATIONS[how])
    found = _feed(optimizer, bound, gradients)
    scale = optimizer.state[bound]["max_exp_avg_sq"].detach().sqrt() + 1e-8
    assert normal @ target > 0.1  # the constraint is active
    torch.testing.assert_close(normal @ found, torch.tensor(0.1, dtype=torch.float64))

    def distance(x):
        return (scale * (x - target) ** 2).sum()

    # No feasible point is nearer in the weighted norm; the Euclidean projection is farther.
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = found + 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)
        if normal @ other <= 0.1:
            assert distance(other) >= distance(found)
    euclidean = target - (normal @ target - 0.1) / (normal @ normal) * normal
    assert distance(euclidean) > distance(found) + 1e-3


def test_box_takes_bounds_per_coordinate():
    box = Box(torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 2.0]))
    param = nn.Parameter(torch.tensor([0.5, 0.5]))
    found = _feed(AMSGrad([param], lr=10.0, projection=box), param, torch.tensor([[-1.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_eps_zero_leaves_unseen_coordinates_alone(how):
    param = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = AMSGrad([param], lr=0.1, eps=0.0, betas=(0.0, 0.9), **IMPLEMENTATIONS[how])
    # 1e-30 squared underflows to zero in float32: still no division by zero.
    found = _feed(optimizer, param, torch.tensor([[0.0, 1e-30, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 3.0 - 0.1 / math.sqrt(0.1)]))


@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_a_nan_gradient_is_not_hidden(how):
    param = nn.Parameter(torch.ones(2))
    optimizer = AMSGrad([param], eps=0.0, **IMPLEMENTATIONS[how])
    found = _feed(optimizer, param, torch.tensor([[1.0, math.nan]]))
    assert found.isnan().tolist() == [False, True]
    assert optimizer.state[param]["max_exp_avg_sq"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("decoupled", [False, True])
def test_fused_by_torch_is_the_same_step(decoupled):
    # What runs on other devices; its operator also takes CPU tensors.
    gradients = _gradients(20, 6)
    reference = _start(6)
    mine = AMSGrad([reference], lr=0.1, weight_decay=0.1, decoupled=decoupled)
    expected = _feed(mine, reference, gradients)
    param = _start(6).detach().clone()
    moments = (torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param))
    # The coefficients of the moment come as an argument of their own.
    options = Options(Coefficients, 1e-8, 0.1, decoupled, False, False, False)
    for t, gradient in enumerate(gradients, start=1):
        alpha = 0.1 / math.sqrt(t)
        now = Coefficients(alpha, alpha, 0.9, 0.999, None)
        _fused_by_torch(param, gradient.clone(), moments, now, options)
    torch.testing.assert_close(param, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="eps > 0"):
        _fused_by_torch(param, gradients[0], moments, now, options._replace(eps=0.0))


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "strided": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "channels-last": lambda x: x.reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "scalar": lambda x: x[0, 0].clone(),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_accepts_any_layout(layout):
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    results = []
    for how in ("single", "fused"):
        param = nn.Parameter(LAYOUTS[layout](start.clone()))
        optimizer = AMSGrad([param], lr=0.1, **IMPLEMENTATIONS[how])
        for _ in range(3):
            param.grad = LAYOUTS[layout](gradient).contiguous()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("of_torch", [True, False])
def test_fused_is_the_same_on_several_threads(of_torch, monkeypatch):
    if not of_torch:
        monkeypatch.setattr("assay.kernels.threads._openmp_of_torch", lambda: None)
    size = 5 * (1 << 16) + 5
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for _ in range(2)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            param = tensors[0].clone()
            moments = [torch.zeros(size) for _ in range(3)]
            update = AdamUpdate(
                param,
                tensors[1],
                *moments,
                step_size=0.1,
                beta1=0.9,
                beta2=0.99,
                second_correction=1.0,
                eps=1e-8,
                weight_decay=0.0,
                shrink=1.0,
                maximize=False,
            )
            adam_updates_([update])
            results.append(torch.stack([param, *moments]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_fused_tells_autograd_of_the_change():
    param = nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    param.grad = torch.ones(3)
    AMSGrad([param], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _Tied(nn.Module):
    """Tied weights, BatchNorm and dropout; a model that knows nothing of this library."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.drop(self.norm(self.embed(tokens))))


@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
@pytest.mark.parametrize("kind", [AMSGrad, AdamNC])
def test_trains_a_foreign_model(kind, how):
    torch.manual_seed(0)
    model = _Tied()
    optimizer = kind(model.parameters(), lr=0.3, **IMPLEMENTATIONS[how])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    tokens = torch.arange(11).repeat(4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), (tokens + 1) % 11)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.out.weight is model.embed.weight


def _steps(optimizer, params, gradients):
    for row in gradients:
        for param, gradient in zip(params, row.split([p.numel() for p in params]), strict=True):
            param.grad = gradient.reshape(param.shape).clone()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def _two_groups(kind, **options):
    params = [
        nn.Parameter(torch.linspace(-1, 1, 4).reshape(2, 2)),
        nn.Parameter(torch.linspace(2, 3, 3)),
    ]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "weight_decay": 0.1}]
    return params, kind(groups, lr=0.1, **options)


@pytest.mark.parametrize("kind", [AMSGrad, AdamNC])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "file"])
def test_state_survives(kind, way, tmp_path):
    gradients = _gradients(20, 7, dtype=torch.float32)
    params, optimizer = _two_groups(kind, projection=Box(-2, 2.5), beta1_decay=0.9)
    _steps(optimizer, params, gradients[:10])
    if way == "deepcopy":
        other_params, other = copy.deepcopy((params, optimizer))
    elif way == "pickle":
        other_params, other = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        state = {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}
        if way == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
        other_params, other = _two_groups(kind, projection=Box(-2, 2.5))
        for param, saved in zip(other_params, state["params"], strict=True):
            param.data.copy_(saved)
        other.load_state_dict(copy.deepcopy(state["optimizer"]))
    expected = _steps(optimizer, params, gradients[10:])
    assert torch.equal(_steps(other, other_params, gradients[10:]), expected)


def test_state_survives_a_fresh_process(tmp_path):
    gradients = _gradients(20, 3, dtype=torch.float32)
    param = nn.Parameter(torch.ones(3))
    optimizer = AMSGrad([param], lr=0.1, bias_correction="before_max")
    _feed(optimizer, param, gradients[:10])
    state = {"optimizer": optimizer.state_dict(), "param": param.detach(), "g": gradients[10:]}
    torch.save(state, tmp_path / "state.pt")
    program = """
import sys, torch
from assay.optim import AMSGrad
state = torch.load(sys.argv[1] + "/state.pt")
param = torch.nn.Parameter(state["param"])
optimizer = AMSGrad([param])
optimizer.load_state_dict(state["optimizer"])
for g in state["g"]:
    param.grad = g
    optimizer.step()
torch.save(param.detach(), sys.argv[1] + "/out.pt")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), _feed(optimizer, param, gradients[10:]))


@pytest.mark.parametrize("bias_correction", [False, "before_max"])
def test_loads_a_checkpoint_of_torch(bias_correction):
    gradients = _gradients(10, 4) + 0.1
    theirs = _start(4)
    reference = torch.optim.Adam(
        [theirs], lr=0.02, betas=(0.8, 0.95), amsgrad=True, weight_decay=0.1
    )
    _feed(reference, theirs, gradients)
    ours = nn.Parameter(theirs.detach().clone())
    box = Box(-9, 9)
    optimizer = AMSGrad(
        [ours], lr_decay=None, projection=box, bias_correction=bias_correction, foreach=True
    )
    optimizer.load_state_dict(reference.state_dict())
    group, state = optimizer.param_groups[0], optimizer.state[ours]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.8, 0.95), 0.1)
    assert group["lr_decay"] is None
    assert group["projection"] is box
    assert group["foreach"] is True
    assert state["step"] == 10
    divisor = 1 - 0.95**10 if bias_correction else 1
    expected = reference.state[theirs]["max_exp_avg_sq"] / divisor
    torch.testing.assert_close(state["max_exp_avg_sq"], expected, rtol=1e-14, atol=0)
    # and it continues: never below what torch last divided by
    _feed(optimizer, ours, 0.01 * gradients)
    assert (optimizer.state[ours]["max_exp_avg_sq"] >= expected).all()


def test_loads_a_checkpoint_of_adamw_without_amsgrad():
    theirs = _start(4)
    reference = torch.optim.AdamW([theirs], weight_decay=0.1)
    _feed(reference, theirs, _gradients(5, 4))
    ours = _start(4)
    optimizer = AMSGrad([ours])
    optimizer.load_state_dict(reference.state_dict())
    state = optimizer.state[ours]
    assert torch.equal(state["max_exp_avg_sq"], reference.state[theirs]["exp_avg_sq"])
    assert optimizer.param_groups[0]["decoupled"] is True
    optimizer = AdamNC([_start(4)])
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["beta1"] == 0.9


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_late_checkpoint_of_torch_goes_on_at_its_rate(kind):
    # At step 10,000 a decay as 1/√t would divide the rate by 100. Gradients that grow keep v at its
    # maximum, where AMSGrad is Adam.
    theirs = _start(4)
    reference = kind([theirs], lr=0.02, weight_decay=0.1)
    _feed(reference, theirs, _gradients(1, 4) + 5)
    reference.state[theirs]["step"].fill_(10_000)
    ours = nn.Parameter(theirs.detach().clone())
    optimizer = AMSGrad([ours], bias_correction="before_max")
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.param_groups[0]["lr_decay"] is None
    larger = 50 + _gradients(5, 4)
    before = ours.detach().clone()
    _feed(reference, theirs, larger)
    _feed(optimizer, ours, larger)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert (ours - before).abs().min() > 0.02  # and not five steps of 0.0002
    others = AdamNC([_start(4)])
    others.load_state_dict(reference.state_dict())
    assert others.param_groups[0]["lr_decay"] is None
    own = AMSGrad([_start(4)])
    own.load_state_dict(AMSGrad([_start(4)], lr_decay="sqrt").state_dict())
    assert own.param_groups[0]["lr_decay"] == "sqrt"


@pytest.mark.parametrize("kind", [AMSGrad, AdamNC])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "its state has nothing, its groups have"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"has \['momentum_buffer'\]"),
        (torch.optim.RMSprop, "'square_avg'"),
        (torch.optim.Adagrad, "'sum'"),
        (torch.optim.Adamax, "'exp_inf'"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(kind, other, words):
    param = _start(4)
    reference = other([param])
    _feed(reference, param, _gradients(2, 4))
    optimizer = kind([_start(4)])
    with pytest.raises(
        ValueError, match=f"of {kind.__name__} or of .* another optimizer: .*{words}"
    ):
        optimizer.load_state_dict(reference.state_dict())
    assert not optimizer.state


def test_amsgrad_and_adamnc_do_not_take_each_others_checkpoints():
    for kind, other in ((AMSGrad, AdamNC), (AdamNC, AMSGrad)):
        param = _start(4)
        reference = other([param])
        _feed(reference, param, _gradients(2, 4))
        with pytest.raises(ValueError, match=f"must be of {kind.__name__} or"):
            kind([_start(4)]).load_state_dict(reference.state_dict())


def test_cyclic_schedulers_take_adamnc_without_cycling_its_momentum():
    param = _start(4)
    optimizer = AdamNC([param], lr=0.1)
    with pytest.raises(ValueError, match="momentum or beta1"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=10, cycle_momentum=False
    )
    rates = []
    for gradient in _gradients(9, 4):
        param.grad = gradient
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["beta1"] == 0.9


@pytest.mark.parametrize("kind", [AMSGrad, AdamNC])
def test_differentiates_through_its_steps(kind):
    # d x_3 / d lr by autograd against central differences.
    gradients = _gradients(3, 4) + torch.tensor([0.0, 1.0, 2.0, -1.0])

    def end(lr):
        param = _start(4, differentiable=True)
        optimizer = kind([param], lr=lr, differentiable=True, projection=Box(-0.9, 0.9))
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        return param

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(lr).sum(), lr)
    with torch.no_grad():
        numeric = (end(lr + 1e-6) - end(lr - 1e-6)).sum() / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6)


def test_differentiates_with_respect_to_gradients_that_are_zero():
    param = _start(2, differentiable=True)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = AMSGrad([param], lr=0.1, eps=0.0, differentiable=True)
    param.grad = gradient
    optimizer.step()
    (slope,) = torch.autograd.grad(param.sum(), gradient)
    assert slope.isfinite().all()


# torch's own warnings, on import and while it compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
@pytest.mark.parametrize("kind", [AMSGrad, AdamNC])
@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_compiles(kind, how, monkeypatch):
    # Dynamo cannot trace the type checker of the tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    gradients = _gradients(6, 5)
    eager, compiled = _start(), _start()
    expected = _feed(kind([eager], lr=0.1, **IMPLEMENTATIONS[how]), eager, gradients)
    optimizer = kind([compiled], lr=0.1, **IMPLEMENTATIONS[how])
    step = torch.compile(optimizer.step, backend="eager")
    for gradient in gradients:
        compiled.grad = gradient.clone()
        step()
    torch.testing.assert_close(compiled.detach(), expected, rtol=0, atol=1e-12)


def test_follows_a_scheduler():
    gradients = _gradients(6, 3)
    scheduled, constant = _start(3), _start(3)
    optimizer = AMSGrad([scheduled], lr=0.1, lr_decay=None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    for gradient in gradients:
        scheduled.grad = gradient.clone()
        optimizer.step()
        scheduler.step()
    expected = _feed(AMSGrad([constant], lr=0.1), constant, gradients)
    torch.testing.assert_close(scheduled.detach(), expected, rtol=0, atol=1e-14)


def test_groups_join_late_and_parameters_rest():
    first, second, idle = _start(2), _start(2), _start(2)
    optimizer = AMSGrad([first, idle], lr=0.1)
    _feed(optimizer, first, _gradients(3, 2) + 1)
    optimizer.add_param_group({"params": [second], "lr": 1.0})
    first.grad = None
    _feed(optimizer, second, _gradients(1, 2) + 1)
    assert optimizer.state[first]["step"] == 3
    assert optimizer.state[second]["step"] == 1
    assert torch.equal(idle, _start(2))


def test_closure_and_tensor_lr():
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = AMSGrad([param], lr=torch.tensor(0.5), betas=(0.0, 0.75), eps=0.0, maximize=True)

    def closure():
        optimizer.zero_grad()
        loss = (param * 3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    # m = 3, v = 0.25·9, α = 0.5
    torch.testing.assert_close(param.detach(), torch.tensor([2.0]))


def test_functional_form_is_the_optimizer():
    gradients = _gradients(10, 4)
    param = _start(4)
    expected = _feed(AMSGrad([param], lr=0.1), param, gradients)
    x, step = _start(4).detach().clone(), torch.zeros(())
    m, v, highest = torch.zeros(3, 4, dtype=torch.float64)
    for gradient in gradients:
        amsgrad([x], [gradient], [m], [v], [highest], [step], lr=0.1, beta1=0.9, beta2=0.999)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be a number in \[0, 1\)"),
        ({"betas": (0.9,)}, "must be a pair"),
        ({"bias_correction": True}, "bias_correction must be False or 'before_max', got True"),
        ({"beta1_decay": 1.5}, "beta1_decay must be"),
        ({"beta1_decay": "t"}, "beta1_decay must be"),
        ({"lr_decay": "linear"}, "lr_decay must be None or 'sqrt'"),
        ({"fused": True, "foreach": True}, "exclude each other"),
        ({"fused": True, "capturable": True}, "exclude each other"),
        ({"foreach": True, "differentiable": True}, "exclude each other"),
    ],
)
def test_rejects_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        AMSGrad([_start()], **options)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (AMSGrad, {"projection": 3.0}, "projection must be a Box or a callable"),
        (AdamNC, {"schedule": "1/t²"}, "schedule must be '1/t' or a callable"),
    ],
)
def test_rejects_options_of_the_wrong_kind(kind, options, match):
    with pytest.raises(TypeError, match=match):
        kind([_start()], **options)


def test_a_rejected_group_is_not_kept():
    optimizer = AdamNC([_start()])
    with pytest.raises(ValueError, match="beta1 must be a number"):
        optimizer.add_param_group({"params": [_start()], "beta1": 1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("beta1", [0.9, 0.95])
def test_warns_where_the_theory_ends(beta1):
    with pytest.warns(UserWarning, match="needs β1 < √β2"):
        AMSGrad([_start()], betas=(beta1, 0.81))


def test_rejects_what_it_cannot_step():
    with pytest.raises(ValueError, match=r"complex64; optimise torch.view_as_real"):
        AMSGrad([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        AMSGrad(embedding.parameters()).step()
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="supports float32 and float64"):
        AMSGrad([half], fused=True).step()
    param = _start(2)
    with pytest.raises(ValueError, match=r"schedule must return β2 in \[0, 1\], got 2"):
        _feed(AdamNC([param], schedule=lambda t: 2.0), param, _gradients(1, 2))
    with pytest.raises(ValueError, match=r"parameter's shape \(2,\), got \(1,\)"):
        _feed(AMSGrad([param], projection=lambda x, scale: x[:1]), param, _gradients(1, 2))
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        Box(1.0, 0.0)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AMSGrad([param]).load_state_dict({"state": {}, "param_groups": []})


def test_steps_low_precision_parameters():
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    found = _feed(AMSGrad([param], lr=0.5), param, torch.ones(4, 3, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found < -0.5).all()


def test_no_gradient_no_step():
    param = _start(2)
    AMSGrad([param]).step()
    assert torch.equal(param, _start(2))
