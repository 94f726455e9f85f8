"""Agreement with BackPACK, curvlinops, Opacus, `torch.func` and Hugging Face models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import compute
from assay.models import MLP, ThreeConvThreeDense
from curvature_models import SAMPLES, largest_error, make, rows_by_loop

pytestmark = [
    pytest.mark.parity,
    # The peers' own: hooks that torch is about to remove, and what they import.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LOSS = nn.CrossEntropyLoss()
RELATIVE = 1e-5  # float32, a few thousand roundings
INSTALL = "pip install --no-deps -r tests/parity/requirements.txt"


def _peer(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: {INSTALL}")


def _nets():
    torch.manual_seed(0)
    mlp = nn.Sequential(*list(MLP((20, 15, 12, 10)).children())[1:])
    return {
        "mlp": (mlp, torch.randn(8, 20)),
        "sigmoid-mlp": (
            nn.Sequential(nn.Linear(20, 9), nn.Sigmoid(), nn.Linear(9, 10)), torch.randn(8, 20),
        ),
        "3c3d": (
            nn.Sequential(*ThreeConvThreeDense().children()), torch.randn(3, 3, 32, 32),
        ),
        "grouped": (
            nn.Sequential(
                nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=1), nn.ReLU(),
                nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(100, 10),
            ),
            torch.randn(4, 4, 10, 10),
        ),
    }  # fmt: skip


def _backpack(net, x, y, *names):
    backpack = _peer("backpack")
    twin = backpack.extend(copy.deepcopy(net))  # it leaves hooks in the modules
    loss_fn = backpack.extend(nn.CrossEntropyLoss())
    for p in twin.parameters():
        p.grad = None
    with backpack.backpack(*(getattr(backpack.extensions, name)() for name in names)):
        loss_fn(twin(x), y).backward()
    return dict(twin.named_parameters())


@pytest.mark.parametrize("name", _nets())
def test_backpack_first_order(name):
    net, x = _nets()[name]
    y = torch.randint(10, (len(x),))
    theirs = _backpack(net, x, y, "BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
    ours = compute(
        net, LOSS, x, y, ["grad_batch", "batch_l2", "second_moment", "variance"], scale="loss"
    )
    pairs = {"grad_batch": "grad_batch", "batch_l2": "batch_l2",
             "second_moment": "sum_grad_squared", "variance": "variance"}  # fmt: skip
    for quantity, field in pairs.items():
        expected = {k: getattr(p, field) for k, p in theirs.items()}
        if name == "grouped" and field == "batch_l2":
            # BackPACK's norms for grouped convolutions are not those of its own gradients.
            rows = theirs["0.weight"].grad_batch.flatten(1)
            expected["0.weight"] = rows.square().sum(1)
        assert largest_error(ours[quantity], expected) < RELATIVE, quantity


@pytest.mark.parametrize("name", _nets())
def test_backpack_exact_diagonal(name):
    net, x = _nets()[name]
    y = torch.randint(10, (len(x),))
    theirs = _backpack(net, x, y, "DiagGGNExact")
    ours = compute(net, LOSS, x, y, ["diag_ggn"])["diag_ggn"]
    assert largest_error(ours, {k: p.diag_ggn_exact for k, p in theirs.items()}) < RELATIVE


@pytest.mark.parametrize("name", ["mlp", "sigmoid-mlp"])
def test_backpack_hessian_diagonal(name):
    net, x = _nets()[name]
    y = torch.randint(10, (len(x),))
    theirs = _backpack(net, x, y, "DiagHessian")
    ours = compute(net, LOSS, x, y, ["diag_hessian"])["diag_hessian"]
    assert largest_error(ours, {k: p.diag_h for k, p in theirs.items()}) < RELATIVE


def test_backpack_kronecker_factors():
    net, x = _nets()["3c3d"]
    y = torch.randint(10, (len(x),))
    theirs = _backpack(net, x, y, "KFLR")
    ours = compute(net, LOSS, x, y, ["kflr"])["kflr"]
    convolutions = {"0", "3", "6"}
    for name, p in theirs.items():
        layer, kind = name.split(".")
        # For a convolution BackPACK takes the block of the bias (positions added before the outer
        # product) where Grosse and Martens, and curvlinops below, take the mean over positions.
        B = ours[f"{layer}.bias" if layer in convolutions else name].left[0]
        assert largest_error({"B": B}, {"B": p.kflr[0]}) < RELATIVE, name
        if kind == "weight":
            A = ours[name].right[0]
            assert largest_error({"A": A}, {"A": p.kflr[1]}) < RELATIVE, name


@pytest.mark.parametrize("name", ["mlp", "sigmoid-mlp"])
def test_backpack_kfra(name):
    net, x = _nets()[name]
    y = torch.randint(10, (len(x),))
    theirs = _backpack(net, x, y, "KFRA")
    ours = compute(net, LOSS, x, y, ["kfra"])["kfra"]
    for key, p in theirs.items():
        assert largest_error({"B": ours[key].left[0]}, {"B": p.kfra[0]}) < RELATIVE, key


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_curvlinops_kfac(name, approx):
    curvlinops = _peer("curvlinops")
    torch.manual_seed(0)
    if name == "mlp":
        net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(),
            nn.Linear(27, 3),
        )  # fmt: skip
        x = torch.randn(6, 2, 5, 5)
    net, x, y = net.double(), x.double(), torch.randint(3, (6,))
    weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
    operator = curvlinops.KFACLinearOperator(
        net, LOSS, weights, [(x, y)], fisher_type="type-2", kfac_approx=approx,
        check_deterministic=False,
    )  # fmt: skip
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    ours = compute(net, LOSS, x, y, ["kflr"], kfac_approx=approx)["kflr"]
    blocks = [f.to_dense() for n, f in ours.items() if n.endswith("weight")]
    torch.testing.assert_close(torch.block_diag(*blocks), dense, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "residual", "lstm"])
def test_curvlinops_diagonals(name):
    curvlinops = _peer("curvlinops")
    model, x, y = make(name)
    params = list(model.parameters())
    ours = compute(model, LOSS, x, y, ["diag_ggn", "diag_hessian"])
    for quantity, kind in (("diag_ggn", "GGNLinearOperator"), ("diag_hessian",
                           "HessianLinearOperator")):  # fmt: skip
        operator = getattr(curvlinops, kind)(
            model, LOSS, params, [(x, y)], check_deterministic=False
        )
        dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
        found = torch.cat([v.flatten() for v in ours[quantity].values()])
        torch.testing.assert_close(found, dense.diagonal(), rtol=1e-8, atol=1e-10)


def test_opacus_individual_gradients():
    opacus = _peer("opacus.grad_sample")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 6), nn.LayerNorm(6), nn.Linear(6, 3),
    )  # fmt: skip
    x, y = torch.randn(5, 2, 5, 5), torch.randint(3, (5,))
    ours = compute(net, LOSS, x, y, ["grad_batch"])["grad_batch"]
    wrapped = opacus.GradSampleModule(net, loss_reduction="mean")
    LOSS(wrapped(x), y).backward()
    expected = {k: p.grad_sample for k, p in net.named_parameters()}
    assert largest_error(ours, expected) < RELATIVE


@pytest.mark.parametrize("name", ["mlp", "layer-norm", "residual", "language-model"])
def test_torch_func_individual_gradients(name):
    model, x, y = make(name)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params, sample, label):
        out = torch.func.functional_call(model, params, (sample.unsqueeze(0),))
        return F.cross_entropy(out, label.unsqueeze(0))

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    assert largest_error(compute(model, LOSS, x, y, ["grad_batch"])["grad_batch"], rows) < 1e-10


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_hugging_face_transformers(kind):
    transformers = _peer("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            vocab_size=20, max_position_embeddings=6, num_labels=3,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=6, num_labels=3,
            pad_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2ForSequenceClassification(config)
    model = model.double().eval()
    ids, y = torch.randint(1, 20, (SAMPLES, 6)), torch.randint(3, (SAMPLES,))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def loss_fn(output, target):
        return F.cross_entropy(output["logits"], target)

    names = ["grad_batch", "batch_l2", "diag_ggn", "kfac", "kflr"]
    found = compute(model, loss_fn, inputs, y, names)
    rows = rows_by_loop(lambda_model(model), ids, y, loss_fn)
    expected = {k.removeprefix("body."): v for k, v in rows.items()}
    assert largest_error(found["grad_batch"], expected) < 1e-8
    inside = compute(model, lambda out, _: out.loss, {**inputs, "labels": y}, None, names)
    for quantity in ("grad_batch", "diag_ggn"):
        assert largest_error(inside[quantity], found[quantity]) < 1e-10
    weight = next(k for k in found["kfac"] if "query.weight" in k or "c_attn.weight" in k)
    assert found["kfac"][weight].right is not None


def lambda_model(body):
    """A model that takes the token ids alone."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, ids):
            return self.body(input_ids=ids, attention_mask=torch.ones_like(ids))

    return Alone()
