"""Agreement between models against hand-made tables, closed forms and other packages."""

import copy
import itertools
import math

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
)
from sklearn.linear_model import LogisticRegression
from torch import nn

from assay.analysis import (
    CorrectnessRecorder,
    accessibility,
    agreement_icc,
    agreement_table,
    bimodality,
    binomial_null,
    class_table,
    extent_at_accuracy,
    extreme_share,
    from_staged,
    log_spaced_steps,
    nested_learning,
    order_correlation,
    total_agreement,
    tp_agreement,
)
from assay.functional import fit

# Three models, four examples.
TABLE = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]).bool()


def _random(extents, models, examples, seed=0, p=0.6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(extents, models, examples, generator=generator) < p


# -- one distribution ------------------------------------------------------------------------------


def test_agreement_of_a_table_made_by_hand():
    expected = torch.tensor([3, 2, 0, 1]).double() / 3
    assert torch.equal(tp_agreement(TABLE), expected)
    # p = 1/2, Var TPa = (9 + 4 + 0 + 1) / 9 / 4 - 1/4 = 5/36, p(1-p)/N = 1/12.
    assert agreement_icc(TABLE).item() == pytest.approx((5 / 36 - 1 / 12) / (1 / 4 * 2 / 3))
    both = torch.stack([TABLE, ~TABLE])
    torch.testing.assert_close(tp_agreement(both)[1], 1 - expected)
    torch.testing.assert_close(accessibility(both), torch.full((4,), 0.5).double())
    assert torch.equal(accessibility(both, extents=[0]), expected)
    predictions = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 4], [0, 1, 2, 5]])
    assert torch.equal(total_agreement(predictions), torch.tensor([3, 2, 3, 1]).double() / 3)


PREDICTIONS = torch.tensor([[[0, 1, 7], [1, 1, 1], [0, 0, 1]]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: tp_agreement(PREDICTIONS),
        lambda: accessibility(PREDICTIONS),
        lambda: agreement_icc(PREDICTIONS),
        lambda: agreement_table(PREDICTIONS),
        lambda: class_table(PREDICTIONS, torch.zeros(3).long()),
        lambda: nested_learning(TABLE[:, :3], PREDICTIONS[0]),
        lambda: extent_at_accuracy(PREDICTIONS, 0.5),
        lambda: CorrectnessRecorder(3, 3).record(1, PREDICTIONS[0]),
    ],
)
def test_class_predictions_are_not_taken_for_correctness(call):
    with pytest.raises(ValueError, match=r"values such as 7; .* take predictions == labels"):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_ones_and_zeros_are_correctness(dtype):
    numbers = TABLE.to(dtype)
    assert torch.equal(tp_agreement(numbers), tp_agreement(TABLE))
    assert torch.equal(agreement_icc(numbers), agreement_icc(TABLE))
    recorder = CorrectnessRecorder(4, 3)
    recorder.record(1, numbers)
    assert torch.equal(recorder.correct[0], TABLE)
    with pytest.raises(ValueError, match="values such as nan"):
        tp_agreement(torch.full((3, 2), math.nan))


@given(st.integers(3, 9), st.integers(1, 30), st.integers(0, 2**31))
def test_total_agreement_is_the_share_of_the_mode_and_bounds_tp_agreement(models, examples, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(4, (models, examples), generator=generator)
    labels = torch.randint(4, (examples,), generator=generator)
    total = total_agreement(predictions)
    mode = stats.mode(predictions.numpy(), axis=0).count / models
    np.testing.assert_allclose(total.numpy(), mode)
    assert bool((total >= tp_agreement(predictions == labels)).all())


def test_bimodality_of_known_distributions():
    two_points = torch.tensor([0.2] * 7 + [0.9] * 3).double()
    assert bimodality(two_points).item() == pytest.approx(1, abs=1e-12)
    uniform = torch.linspace(0, 1, 100_001).double()
    assert bimodality(uniform).item() == pytest.approx(5 / 9, abs=1e-4)
    normal = torch.from_numpy(stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000))
    assert bimodality(normal).item() == pytest.approx(1 / 3, abs=1e-3)
    values = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).double()
    expected = (stats.skew(values, axis=1) ** 2 + 1) / stats.kurtosis(values, axis=1, fisher=False)
    np.testing.assert_allclose(bimodality(values).numpy(), expected)
    assert math.isnan(bimodality(torch.full((5,), 0.1).double()))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("models", [3, 12, 40])
def test_independent_models_have_binomial_agreement_and_no_correlation(p, models):
    examples = 40_000
    correct = _random(1, models, examples, p=p)[0]
    null = binomial_null(p, models)
    counts = torch.bincount(correct.sum(0), minlength=models + 1)
    likely = null * examples >= 5
    statistic = ((counts - null * examples) ** 2 / (null * examples))[likely].sum()
    assert stats.chi2.sf(float(statistic), int(likely.sum()) - 1) > 1e-4
    # The standard error of the ICC of independent raters is √(2 / (X N (N - 1))).
    assert abs(agreement_icc(correct)) < 4 * math.sqrt(2 / (examples * models * (models - 1)))
    support = torch.arange(models + 1).double() / models
    mean = (null * support).sum()
    assert mean.item() == pytest.approx(p)
    assert (null * (support - mean) ** 2).sum().item() == pytest.approx(p * (1 - p) / models)


@given(st.integers(3, 8), st.integers(2, 40), st.integers(0, 2**31))
def test_icc_is_its_definition_and_fleiss_kappa(models, examples, seed):
    correct = _random(1, models, examples, seed)[0]
    p = correct.double().mean().item()
    if p in (0.0, 1.0):
        assert math.isnan(agreement_icc(correct))
        return
    variance = tp_agreement(correct).var(correction=0).item()
    alone = p * (1 - p)
    expected = (variance - alone / models) / (alone * (1 - 1 / models))
    assert agreement_icc(correct).item() == pytest.approx(expected, abs=1e-12)
    # Fleiss' kappa by counting pairs of models one by one.
    pairs = list(itertools.combinations(range(models), 2))
    same = np.mean([(correct[i] == correct[j]).double().mean().item() for i, j in pairs])
    chance = p**2 + (1 - p) ** 2
    assert agreement_icc(correct).item() == pytest.approx((same - chance) / (1 - chance), abs=1e-12)


def test_models_that_share_everything_have_icc_one():
    shared = (torch.arange(10) < 3).expand(4, 7, 10)
    assert torch.equal(agreement_icc(shared), torch.ones(4).double())
    assert torch.equal(extreme_share(tp_agreement(shared)), torch.ones(4).double())


def test_extremes_are_strict_for_any_number_of_models():
    tpa = torch.arange(11).double() / 10
    assert extreme_share(tpa).item() == pytest.approx(2 / 11)  # 0 and 1, not 0.1 and 0.9
    assert extreme_share(tpa, 0.5).item() == pytest.approx(10 / 11)


def test_table_is_made_of_the_functions_and_of_the_null():
    correct = _random(3, 12, 200)
    rows = agreement_table(correct, [1, 10, 100])
    assert [row["extent"] for row in rows] == [1, 10, 100]
    row, tpa = rows[1], tp_agreement(correct[1])
    p = tpa.mean().item()
    assert row["accuracy"] == pytest.approx(p)
    assert row["icc"] == pytest.approx(agreement_icc(correct[1]).item())
    ratio = tpa.var(correction=0).item() / (p * (1 - p) / 12)
    assert row["variance ratio"] == pytest.approx(ratio)
    assert row["extreme share if independent"] == pytest.approx(
        stats.binom.cdf(1, 12, p) + stats.binom.sf(10, 12, p)
    )
    simulated = torch.from_numpy(np.random.default_rng(0).binomial(12, p, 10**6) / 12)
    assert row["bimodality if independent"] == pytest.approx(bimodality(simulated).item(), rel=0.01)
    everything = torch.ones(1, 3, 4, dtype=torch.bool)
    assert agreement_table(everything)[0]["accuracy"] == 1.0


def test_classes_are_told_apart():
    labels = torch.tensor([2, 0, 2, 0, 0])
    correct = (labels == 2).expand(2, 4, 5).clone()
    correct[1, :, 1] = True
    rows = class_table(correct, labels, ["cat", "dog", "cow"])
    assert [(row["class"], row["examples"]) for row in rows] == [("cow", 2), ("cat", 3)]
    assert rows[1]["accessibility"] == pytest.approx(1 / 6)
    assert rows[1]["accuracy"] == pytest.approx(1 / 3)
    assert rows[1]["icc"] == 1.0
    assert class_table(correct, labels)[0]["class"] == "2"
    for wrong, names in ((labels, ["cat", "dog"]), (labels - 1, ["cat", "dog", "cow"])):
        with pytest.raises(ValueError, match=r"names \d classes, the labels are from"):
            class_table(correct, wrong, names)


# -- two collections -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_correlation_and_interval_agree_with_scipy(method):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 13, 120) / 12  # with ties, as accessibilities have
    b = np.clip(a + rng.normal(0, 0.2, 120), 0, 1)
    function = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}[method]
    found = order_correlation(torch.from_numpy(a), torch.from_numpy(b), method, resamples=2000)
    assert found.estimate == pytest.approx(function(a, b).statistic, abs=1e-12)
    reference = stats.bootstrap(
        (a, b), lambda x, y: function(x, y).statistic, paired=True, vectorized=False,
        n_resamples=2000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    # Ends of an interval of 2,000 resamples scatter by some 5 % of its width.
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.2 * width)
    assert found.high == pytest.approx(reference.high, abs=0.2 * width)
    alone = order_correlation(torch.from_numpy(a), torch.from_numpy(b), method, ci=None)
    assert alone.estimate == found.estimate
    assert math.isnan(alone.low)


def test_interval_covers_the_correlation_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        x = torch.randn(80, generator=generator).double()
        y = 0.8 * x + 0.6 * torch.randn(80, generator=generator).double()
        found = order_correlation(x, y, "pearson", resamples=200, generator=generator)
        covered += found.low <= 0.8 <= found.high
    # 95 % of 200, within 4 standard errors of 3 and the undercoverage of the percentile method.
    assert 171 <= covered <= 200


def test_bootstrap_in_chunks_skips_resamples_without_order(monkeypatch):
    # Of three examples a tie: one resample in nine or more shows a single value.
    a, b = torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor([0.0, 0.1, 1.0]).double()
    whole = order_correlation(a, b, resamples=100)
    monkeypatch.setattr("assay.analysis.learning_order.BOOTSTRAP_CHUNK", 20)
    assert order_correlation(a, b, resamples=100) == whole
    assert whole.low <= whole.estimate <= whole.high


def test_nested_learning_counts():
    weak = torch.tensor([1, 1, 1, 0, 0, 0]).bool().expand(3, 6)
    strong = torch.tensor([1, 1, 0, 1, 0, 0]).bool().repeat(10, 1)
    strong[0] = False  # nine of ten is still learned at 0.9
    found = nested_learning(weak, strong)
    assert (found.share, found.base_rate, found.weak, found.strong) == (2 / 3, 0.5, 3, 3)
    assert nested_learning(weak, strong, threshold=1.0).share == 0
    with pytest.raises(ValueError, match="no example"):
        nested_learning(~weak & weak, strong)


def test_extent_of_an_accuracy():
    correct = (
        torch.stack([torch.arange(10) < k for k in (1, 4, 5, 9)]).unsqueeze(1).expand(4, 3, 10)
    )
    assert [extent_at_accuracy(correct, p) for p in (0.0, 0.44, 0.45, 0.46, 1.0)] == [0, 1, 1, 2, 3]


# -- recording -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(3, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_recorder_gives_back_what_it_was_given(examples, models, extents, seed):
    correct = _random(extents, models, examples, seed)
    recorder = CorrectnessRecorder(examples, models)
    for i in reversed(range(extents)):  # any order
        if i % 2:
            recorder.record(i, correct[i])
        else:
            for model in range(models):
                recorder.record(i, correct[i, model], model=model)
    assert torch.equal(recorder.correct, correct)
    assert recorder.extents == tuple(range(extents))
    twin = CorrectnessRecorder(examples, models)
    twin.load_state_dict(recorder.state_dict())
    assert torch.equal(twin.correct, correct)
    assert recorder.state_dict()["packed"].numel() == extents * models * math.ceil(examples / 8)


def test_recorder_on_disk_and_recorded_again(tmp_path):
    correct = _random(2, 3, 1000)
    recorder = CorrectnessRecorder(1000, 3)
    recorder.record(5, ~correct[0])
    recorder.record(5, correct[0])
    recorder.record(6.5, correct[1])
    recorder.save(tmp_path / "order.pt")
    assert (tmp_path / "order.pt").stat().st_size < 4000  # 750 bytes of bits and the frame
    loaded = CorrectnessRecorder.load(tmp_path / "order.pt")
    assert torch.equal(loaded.correct, correct)
    assert loaded.extents == (5, 6.5)
    loaded.record(7, correct[0])
    assert recorder.extents == (5, 6.5)
    assert torch.equal(copy.deepcopy(loaded).correct, loaded.correct)


def test_a_recorder_that_is_killed_while_it_saves_keeps_its_last_file(tmp_path, monkeypatch):
    recorder = CorrectnessRecorder(8, 3)
    recorder.record(1, torch.ones(3, 8).bool())
    recorder.save(tmp_path / "order.pt")
    recorder.record(2, torch.zeros(3, 8).bool())

    def killed(state, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("assay.analysis.learning_order.torch.save", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder.save(tmp_path / "order.pt")
    assert CorrectnessRecorder.load(tmp_path / "order.pt").extents == (1,)


def test_recorder_watches_models_that_are_trained_one_after_another():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 40).unsqueeze(1)
    y = (x.squeeze(1) > 0.2).long()
    steps = log_spaced_steps(30, 4)
    recorder = CorrectnessRecorder(40, 3)
    models = [nn.Linear(1, 2) for _ in range(3)]
    for number, model in enumerate(models):
        watch = recorder.callback(lambda model=model: model(x).argmax(1), y, steps, model=number)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if number == 2:
            with pytest.raises(ValueError, match=r"no record of the models \[2\]"):
                _ = recorder.correct
        fit(model, optimizer, [(x, y)], epochs=30, after_step=watch)
    assert recorder.extents == steps
    expected = torch.stack([model(x).argmax(1) == y for model in models])
    assert torch.equal(recorder.correct[-1], expected)


def test_steps_are_log_spaced_and_different():
    assert log_spaced_steps(1000, 4) == (1, 10, 100, 1000)
    assert log_spaced_steps(80, 4, first=10) == (10, 20, 40, 80)
    assert log_spaced_steps(5, 100) == (1, 2, 3, 4, 5)
    assert log_spaced_steps(7, 1) == (7,)


@pytest.mark.parametrize("kind", [AdaBoostClassifier, GradientBoostingClassifier])
def test_staged_estimators_are_read_stage_by_stage(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = np.array(["no", "yes"])[(x.sum(1) > 0).astype(int)]
    fitted = [kind(n_estimators=n, random_state=n).fit(x, y) for n in (4, 6, 5)]
    correct = from_staged(fitted, x, y)
    assert correct.shape == (6, 3, 60)
    np.testing.assert_array_equal(correct[-1, 1].numpy(), fitted[1].predict(x) == y)
    assert torch.equal(correct[3, 0], correct[5, 0])  # it stopped after four rounds
    assert torch.equal(from_staged(fitted, x, y, stages=[2, 6]), correct[[1, 5]])
    assert from_staged(fitted[0], x, y).shape == (4, 1, 60)


def test_staged_estimators_take_what_they_take_elsewhere():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(0, 2, 60)
    expected = from_staged(AdaBoostClassifier(n_estimators=4).fit(x, y), x, y)
    sparse = scipy.sparse.csr_matrix(x)
    fitted = AdaBoostClassifier(n_estimators=4).fit(sparse, y)
    assert torch.equal(from_staged(fitted, sparse, y), expected)
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    fitted = GradientBoostingClassifier(n_estimators=4).fit(frame, y)  # warns of missing names
    expected = from_staged(GradientBoostingClassifier(n_estimators=4).fit(x, y), x, y)
    assert torch.equal(from_staged(fitted, frame, pandas.Series(y)), expected)


def test_staged_estimators_refuse_what_would_be_wrong_everywhere():
    x, y = [[0.0], [1.0], [2.0], [3.0]], np.array([0, 1, 1, 0])
    fitted = AdaBoostClassifier(n_estimators=2).fit(x, y)
    with pytest.raises(ValueError, match=r"one class an example, \(X,\), got shape \(4, 1\)"):
        from_staged(fitted, x, y[:, None])
    with pytest.raises(ValueError, match="y holds none of the classes of AdaBoostClassifier"):
        from_staged(fitted, x, ["no", "yes", "yes", "no"])
    with pytest.raises(TypeError, match="GradientBoostingRegressor has no classes_"):
        from_staged(GradientBoostingRegressor(n_estimators=2).fit(x, y), x, y)
    with pytest.raises(ValueError, match="one or more numbers from 1"):
        from_staged(fitted, x, y, stages=[])


# -- what is refused -------------------------------------------------------------------------------


def test_two_models_are_too_few():
    pair = _random(2, 2, 5)
    for function in (tp_agreement, accessibility, agreement_icc, agreement_table):
        with pytest.raises(ValueError, match="at least 3 models"):
            function(pair)
    with pytest.raises(ValueError, match="at least 3 models"):
        total_agreement(pair[0].long())
    with pytest.raises(ValueError, match="at least 3 models"):
        class_table(pair, torch.zeros(5).long())
    with pytest.raises(ValueError, match="at least 3 models"):
        nested_learning(pair[0], TABLE[:, :1].expand(3, 5))
    for make in (lambda: CorrectnessRecorder(5, 2), lambda: binomial_null(0.5, 2)):
        with pytest.raises(ValueError, match="num_models must be at least 3, got 2"):
            make()


def test_refuses_bad_input():
    a = torch.rand(5).double()
    with pytest.raises(ValueError, match="method"):
        order_correlation(a, a, "kendall")
    with pytest.raises(ValueError, match="b must be finite and differ between examples"):
        order_correlation(a, torch.ones(5).double())
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a must be finite"):
            order_correlation(torch.tensor([0, 1, wrong, 3, 4]).double(), a, "pearson")
    with pytest.raises(ValueError, match=r"of logits take logits.argmax"):
        total_agreement(torch.rand(3, 5))
    with pytest.raises(ValueError, match="three or more"):
        order_correlation(a[:2], a[:2])
    with pytest.raises(ValueError, match="confidence"):
        order_correlation(a, a, confidence=1.0)
    with pytest.raises(ValueError, match="accuracy must be in"):
        binomial_null(1.1, 3)
    with pytest.raises(ValueError, match="margin"):
        extreme_share(a, 0.6)
    with pytest.raises(ValueError, match="at least one extent"):
        accessibility(_random(2, 3, 5), extents=[])
    with pytest.raises(ValueError, match="at least one extent"):
        extent_at_accuracy(_random(2, 3, 5)[:0], 0.5)
    with pytest.raises(ValueError, match="2 extents, got 1"):
        agreement_table(_random(2, 3, 5), [1])
    with pytest.raises(ValueError, match="5 examples, got 4"):
        class_table(_random(2, 3, 5), torch.zeros(4).long())
    with pytest.raises(ValueError, match="same examples"):
        nested_learning(TABLE, TABLE[:, :3])
    with pytest.raises(ValueError, match="threshold"):
        nested_learning(TABLE, TABLE, threshold=0.0)
    with pytest.raises(ValueError, match="first=3"):
        log_spaced_steps(2, 2, first=3)


def test_recorder_refuses_bad_input():
    recorder = CorrectnessRecorder(4, 3)
    with pytest.raises(ValueError, match=r"\(3, 4\), got \(3, 5\)"):
        recorder.record(1, torch.ones(3, 5).bool())
    with pytest.raises(ValueError, match=r"\(4,\), got \(3, 4\)"):
        recorder.record(1, TABLE, model=0)
    with pytest.raises(ValueError, match="from 0 to 2"):
        recorder.record(1, TABLE[0], model=3)
    with pytest.raises(ValueError, match="num_examples 5, not 4"):
        recorder.load_state_dict(CorrectnessRecorder(5, 3).state_dict())
    with pytest.raises(ValueError, match="num_examples"):
        CorrectnessRecorder(0, 3)


def test_staged_refuses_bad_input():
    x, y = np.arange(6.0).reshape(6, 1), np.arange(6) % 2
    with pytest.raises(TypeError, match="LogisticRegression has not"):
        from_staged(LogisticRegression().fit(x, y), x, y)
    with pytest.raises(ValueError, match="at least one"):
        from_staged([], x, y)
    with pytest.raises(ValueError, match="from 1"):
        from_staged(AdaBoostClassifier(n_estimators=2).fit(x, y), x, y, stages=[0])
