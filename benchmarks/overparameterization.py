"""Sample-by-sample training of two-layer leaky-ReLU nets against plain torch and scikit-learn."""

import copy
import warnings

import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Perceptron

from assay.analysis import TwoLayerLeakyNet, perceptron_step, run_perceptron_sgd
from assay.data import load
from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark

EPOCHS = 10


def _digits(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load("mnist5k", "train")
    chosen = ((data.y == 3) | (data.y == 5)).nonzero().squeeze(1)[:n]
    x = data.x[chosen].flatten(1)
    return x / x.norm(dim=1).max(), (data.y[chosen] == 3).float() * 2 - 1


def _against_eager(k: int) -> Comparison:
    x, y = _digits(200)
    start = TwoLayerLeakyNet(784, k)

    def ours() -> int:
        return run_perceptron_sgd(copy.deepcopy(start), x, y, max_epochs=EPOCHS).nonzero_updates

    def eager() -> int:
        net = copy.deepcopy(start)
        labels = y.tolist()
        return sum(
            perceptron_step(net, sample, label, 1.0)
            for _ in range(EPOCHS)
            for sample, label in zip(x, labels, strict=True)
        )

    return Comparison(
        ours=ours,
        peer=eager,
        peer_name="the same steps in eager torch",
        peer_version=torch.__version__,
        extra={"updates": ours(), "updates of the peer": eager()},
    )


@benchmark("ten epochs, 200 digits, k = 2 vs eager", target=at_most(0.1), threads=1)
def two_units_against_eager() -> Comparison:
    return _against_eager(2)


@benchmark("ten epochs, 200 digits, k = 20 vs eager", target=at_most(0.1), threads=1)
def twenty_units_against_eager() -> Comparison:
    return _against_eager(20)


@benchmark("ten epochs, 200 digits, k = 200 vs eager", threads=1)
def many_units_against_eager() -> Comparison:
    return _against_eager(200)


@benchmark("linear net (k = 1, α = 1) vs scikit-learn's perceptron, 20 epochs", threads=1)
def linear_against_perceptron() -> Comparison:
    x, y = _digits(700)
    start = TwoLayerLeakyNet(784, 1, alpha=1.0)
    inputs, labels = x.numpy(), y.numpy()

    def theirs() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            machine = Perceptron(max_iter=20, tol=None, shuffle=False, fit_intercept=False)
            return machine.fit(inputs, labels)

    return Comparison(
        ours=lambda: run_perceptron_sgd(copy.deepcopy(start), x, y, max_epochs=20),
        peer=theirs,
        peer_name="sklearn.linear_model.Perceptron (no margin, so fewer updates)",
        peer_version=sklearn.__version__,
    )
