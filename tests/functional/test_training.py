"""The training loop does what its few lines say."""

import pytest
import torch
from torch import nn

from assay.functional import evaluate_classifier, fit


def _line():
    return nn.Linear(3, 1, dtype=torch.float64)


def test_one_step_is_the_gradient_step_of_loss_and_penalty():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    y = torch.randn(8, 1, generator=g, dtype=torch.float64)
    model = _line()
    before = model.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = 2 * (model(x) - y).T @ x / 8 + 0.6 * model.weight
    fit(
        model, sgd, [(x, y)], epochs=1, loss_fn=nn.functional.mse_loss,
        penalty=lambda: 0.3 * model.weight.square().sum(),
    )  # fmt: skip
    torch.testing.assert_close(model.weight, before - 0.1 * expected.detach())


def test_epochs_in_two_calls_are_the_epochs_of_one_call():
    x = torch.arange(6.0).reshape(2, 3)
    y = torch.tensor([[1.0], [0.0]])

    def trained(splits):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        seen, history = [], []
        for epochs in splits:
            history = fit(
                model, sgd, [(x, y), (x, y)], epochs=epochs, history=history,
                loss_fn=nn.functional.mse_loss, after_step=seen.append,
            )  # fmt: skip
        return model.weight, history, seen

    weight, history, seen = trained([4])
    again, same_history, same_seen = trained([1, 4])
    assert torch.equal(weight, again)
    assert history == same_history
    assert seen == same_seen == [1, 2, 3, 4, 5, 6, 7, 8]


def test_loss_is_the_mean_over_samples_not_over_batches():
    model = _line()
    x = torch.zeros(5, 3, dtype=torch.float64)
    y = torch.tensor([[0.0], [0.0], [0.0], [0.0], [10.0]], dtype=torch.float64)
    with torch.no_grad():
        model.bias.zero_()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fit(
        model, sgd, [(x[:4], y[:4]), (x[4:], y[4:])], epochs=1, loss_fn=nn.functional.mse_loss
    )
    assert history[0]["loss"] == 20.0


def test_divergence_and_emptiness_are_errors():
    model = _line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    nan = torch.full((2, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="epoch 1"):
        fit(model, sgd, [(nan, nan[:, :1])], epochs=1, loss_fn=nn.functional.mse_loss)
    with pytest.raises(ValueError, match="empty"):
        fit(model, sgd, [], epochs=1)
    with pytest.raises(ValueError, match="epochs"):
        fit(model, sgd, [], epochs=-1)


def test_evaluation_is_a_mean_over_all_samples_and_restores_the_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 4)).train()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 3, generator=g), torch.randint(4, (10,), generator=g)
    found = evaluate_classifier(model, x, y, batch_size=3)
    assert model.training
    logits = model.eval()(x)
    assert found["accuracy"] == (logits.argmax(1) == y).double().mean().item()
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)


def test_a_norm_that_was_put_to_sleep_stays_so():
    """Fine-tuning keeps norms in evaluation mode inside a model in training mode."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].eval()
    evaluate_classifier(model, torch.eye(3), torch.arange(3))
    assert model.training
    assert not model[1].training
