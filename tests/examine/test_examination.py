"""An examination leaves everything as it was, survives its panels, and goes on after a kill."""

import html
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from assay.examine import (
    Data,
    Finding,
    Metric,
    NotApplicable,
    Panel,
    Picture,
    Report,
    all_panels,
    choose_panels,
    examination,
    examine,
    panel,
)
from assay.examine.panel import forget
from assay.lab import UsageError
from assay.lab.figures import subplots

X = torch.linspace(-1, 1, 160).reshape(40, 4)
Y = torch.arange(40) % 3
DATA = Data((X, Y), name="made")


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def found(value=1.0, name="value", label="Value", **more):
    return Panel([Metric(name, label, value, "set", "Read it.")], "Reading.", "Method.", **more)


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Examinations without an output of their own write here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def define():
    """Registers panels, in the order in which they are defined, and forgets them."""
    names = []

    def register(name, function, **settings):
        names.append(name)
        panel(name, title=name.title(), order=len(names), **settings)(function)

    yield register
    for name in names:
        forget(name)


def run(*names, **settings):
    settings = {"budget": 20.0, **settings}
    return examine(settings.pop("model", network()), settings.pop("data", DATA),
                   panels=names, **settings)  # fmt: skip


# -- as it was ---------------------------------------------------------------------------------


def everything(model):
    """All of a model that a user could look at, and the global generators.

    Not Python's: from that the type checker of the tests draws. `killed` looks at it.
    """
    return (
        {key: value.tolist() for key, value in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [(m.training, list(m._forward_hooks), list(m._backward_hooks)) for m in model.modules()],
        torch.get_rng_state().tolist(),
        pickle.dumps(np.random.get_state()),
    )


def vandal(model, data, budget):
    inner = model.model
    inner.train()(data.train.x).sum().backward()
    inner[0].weight.data.zero_()
    inner[3].bias.requires_grad_(False)
    inner[1].register_forward_hook(lambda *_: None)
    inner.double()
    torch.rand(1), np.random.rand(), random.random()
    return found()


class Augmented(torch.utils.data.Dataset):
    """Samples that draw from all three global generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + torch.rand(4) + np.random.rand() + random.random(), int(Y[i])


AUGMENTED = Augmented()


def test_the_users_model_and_generators_are_untouched(define):
    define("vandal", vandal)
    model = network()
    model(X).sum().backward()
    model[0].register_forward_hook(lambda *_: None)
    model[3].weight.requires_grad_(False)
    before = everything(model)

    report = run("vandal", model=model, data=(AUGMENTED, AUGMENTED))
    assert report.panel("vandal").status == "done"
    assert everything(model) == before


def test_the_next_panel_sees_the_original(define):
    model = network()
    seen = {}

    def witness(subject, data, budget):
        seen.update({key: value.clone() for key, value in subject.model.state_dict().items()})
        seen["modes"] = {module.training for module in subject.modules()}
        seen["hooks"] = sum(len(module._forward_hooks) for module in subject.modules())
        seen["grads"] = [p.grad for p in subject.parameters() if p.grad is not None]
        return found()

    define("vandal", vandal)
    define("witness", witness)
    report = run("vandal", "witness", model=model)
    for key, value in model.state_dict().items():
        assert torch.equal(seen[key], value)
        assert seen[key].dtype == value.dtype
    assert (seen["modes"], seen["hooks"], seen["grads"]) == ({False}, 0, [])
    assert any("has been put back" in note for note in report.panel("vandal").notes)
    assert report.panel("witness").notes == []


def test_a_panel_draws_the_same_whatever_ran_before(define):
    def draws(model, data, budget):
        return found(torch.rand(1).item() + np.random.rand() + random.random())

    define("other", draws)
    define("draws", draws)
    alone, after = run("draws"), run("other", "draws")
    assert alone["draws.value"] == after["draws.value"] != after["other.value"]


# -- panels that do not do as they should ------------------------------------------------------


def not_applicable(model, data, budget):
    raise NotApplicable("there is no convolution")


def two_of_one_name(model, data, budget):
    metric = found().metrics[0]
    return Panel([metric, metric], "Reading.", "Method.")


def undrawable(model, data, budget):
    figure, axes = subplots()
    axes.set_title(r"$\frac$")
    return found(figures=[Picture("a", figure, "")])


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (lambda *_: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
        (lambda *_: None, "failed", "TypeError: the panel returned a NoneType, not a Panel"),
        (lambda *_: found("much"), "failed", "much"),
        (two_of_one_name, "failed", "two metrics of one name: value, value"),
        (undrawable, "failed", "ValueError: "),
        (not_applicable, "not applicable", "there is no convolution"),
    ],
)
def test_a_panel_that_fails_is_shown_and_the_others_go_on(define, function, status, reason):
    define("first", function)
    define("second", lambda *_: found())
    report = run("first", "second")
    assert report.panel("first").status == status
    assert reason in report.panel("first").reason
    assert report.panel("first").metrics == []
    assert report["second.value"] == 1.0
    assert reason.partition(":")[0] in html.unescape(report.to_html())


def test_an_interruption_is_not_swallowed(define):
    def interrupted(*_):
        raise KeyboardInterrupt

    define("interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")


def endless(model, data, budget):
    while True:
        time.sleep(0.01)


def stubborn(model, data, budget):
    try:
        endless(model, data, budget)
    except BaseException:
        endless(model, data, budget)


@pytest.mark.parametrize("function", [endless, stubborn])
def test_a_panel_over_budget_is_stopped(define, monkeypatch, function):
    monkeypatch.setattr(examination, "GRACE", 0.5)
    define("slow", function)
    define("after", lambda *_: found())
    handler, others = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 200)
    try:
        report = run("slow", "after", budget=0.3)
        assert 150 < signal.getitimer(signal.ITIMER_REAL)[0] <= 200  # somebody else's alarm
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
    assert report.panel("slow").status == "over budget"
    assert "it was stopped after" in report.panel("slow").reason
    assert report["after.value"] == 1.0


def test_outside_the_main_thread_later_panels_get_what_is_left(define):
    def slow(model, data, budget):
        time.sleep(0.3)
        return found()

    define("slow", slow)
    define("after", lambda *_: found())
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run("slow", "after", budget=0.2)))
    thread.start()
    thread.join()
    (report,) = reports
    assert [entry.status for entry in report.panels] == ["done", "done"]
    assert report.panel("slow").seconds >= 0.3
    assert report.panel("after").allowed == 0


# -- budgets -----------------------------------------------------------------------------------


def test_time_that_is_not_used_goes_to_later_panels(define):
    define("first", lambda *_: found(), share=1.0)
    define("absent", lambda *_: found(), share=100.0, tasks=("regression",))
    define("training", lambda *_: found(), share=100.0, trains=True)
    define("second", lambda *_: found(), share=1.0)
    define("third", lambda *_: found(), share=2.0)
    report = run("first", "absent", "training", "second", "third", budget=400.0, training=False)
    spent = report.provenance.seconds
    for name, share in (("first", 1 / 4), ("second", 1 / 3), ("third", 1)):
        assert share * (400 - spent) <= report.panel(name).allowed <= share * 400
    for name in ("absent", "training"):
        assert report.panel(name).status == "not applicable"
    assert report.panel("absent").reason == "it makes no sense for classification"
    assert report.panel("training").reason == "training was not allowed"


def test_panels_are_told_seed_and_whether_they_may_train(define):
    define("told", lambda model, data, budget: found(budget.seed + 0.5 * budget.training))
    assert run("told", seed=4)["told.value"] == 4.5
    assert run("told", seed=4, training=False)["told.value"] == 4


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_budget_that_is_none(budget):
    with pytest.raises(UsageError, match="budget must be a positive number of seconds"):
        run(budget=budget)


def test_panels_come_in_their_order_and_unknown_ones_are_named(define):
    define("zeroth", lambda *_: found())
    define("next", lambda *_: found())
    assert [entry.name for entry in choose_panels(["next", "zeroth"])] == ["zeroth", "next"]
    orders = [entry.order for entry in all_panels()]
    assert orders == sorted(orders)
    with pytest.raises(UsageError, match="unknown panel 'zerot'; did you mean zeroth"):
        run("zerot")


def test_a_name_belongs_to_one_module():
    with pytest.raises(ValueError, match="name must be an identifier, got 'a-b'"):
        panel("a-b", title="A", order=1)
    register = panel("print", title="Print", order=1)
    try:
        register(print)
        with pytest.raises(ValueError, match="a panel 'print' exists already, in builtins"):
            register(vandal)
    finally:
        forget("print")


# -- gates -------------------------------------------------------------------------------------


def test_gates_of_an_examination(define):
    def broken(*_):
        raise RuntimeError("no")

    define("good", lambda *_: found(3.0))
    define("broken", broken)
    gates = ["good.value > 2", "good.value > 4", "broken.value > 1"]
    report = run("good", "broken", fail_if=gates)
    assert [gate.failed for gate in report.gates] == [True, False, None]
    assert Report.read(report.folder).gates == report.gates


def test_a_wrong_gate_is_told_before_anything_runs(define):
    define("good", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="unknown panel 'god'; did you mean good"):
        run("good", fail_if=["god.value > 2"])
    with pytest.raises(UsageError, match="Call is not allowed"):
        run("good", fail_if=["print() > 2"])


def test_a_gate_on_an_unknown_metric_leaves_the_report(define, tmp_path):
    define("good", lambda *_: found())
    with pytest.raises(UsageError, match="unknown metric 'valu' of panel good; did you mean value"):
        run("good", fail_if=["good.valu > 2"], output=tmp_path)
    assert Report.read(tmp_path)["good.value"] == 1.0
    assert run("good", output=tmp_path)["good.value"] == 1.0  # it is not taken for unfinished


# -- resuming ----------------------------------------------------------------------------------


def in_two_steps(folder, *, sleep):
    """Two panels that note in a file when they begin; the second may never end."""

    def noting(name):
        def function(model, data, budget):
            with open(folder / "began", "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            if name == "second" and sleep:
                time.sleep(600)
            return found(math.nan if name == "first" else data.losses("test").mean().item())

        return function

    for order, name in enumerate(("first", "second")):
        panel(name, title=name, order=order)(noting(name))


def killed(folder):
    """What the process does that is killed, after a look at Python's global generator."""
    panel("vandal", title="Vandal", order=0)(vandal)
    before = random.getstate()
    run("vandal", data=(AUGMENTED, AUGMENTED))
    assert random.getstate() == before
    in_two_steps(folder, sleep=True)
    run("first", "second", budget=500.0, output=folder / "out")


def test_a_killed_examination_goes_on(tmp_path):
    code = (
        "import pathlib, sys; from examine.test_examination import killed; "
        "killed(pathlib.Path(sys.argv[1]))"
    )
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
    )
    began = tmp_path / "began"
    try:
        while not (began.exists() and "second" in began.read_text(encoding="utf-8")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    in_two_steps(tmp_path, sleep=False)
    out = tmp_path / "out"
    settings = {"budget": 500.0, "output": out}
    try:
        with pytest.raises(UsageError, match="holds an unfinished examination: --resume"):
            run("first", "second", **settings)
        other = network()
        other[3].bias.data[0] += 1e-6
        with pytest.raises(UsageError, match="differs in model or data: use the same, or --no-res"):
            run("first", "second", model=other, resume=True, **settings)
        with pytest.raises(UsageError, match="differs in model or data, seed"):
            run("first", "second", data=(X + 1, Y), seed=1, resume=True, **settings)
        report = run("first", "second", resume=True, **settings)
        assert began.read_text(encoding="utf-8").split() == ["first", "second", "second"]
        assert [entry.status for entry in report.panels] == ["done", "done"]
        assert math.isnan(report["first.value"])
        expected = nn.functional.cross_entropy(network().eval()(X), Y).item()
        assert report["second.value"] == pytest.approx(expected, rel=1e-5)
        run("first", "second", **settings)  # finished: it begins anew without being told
        assert began.read_text(encoding="utf-8").split()[3:] == ["first", "second"]
    finally:
        forget("first")
        forget("second")


def test_unfinished_panels_are_tried_again_and_discarded_on_demand(define, tmp_path):
    ran = []

    def first(*_):
        ran.append("first")
        return found()

    def second(*_):
        ran.append("second")
        if len(ran) < 4:
            raise RuntimeError("not yet")
        return found()

    def third(*_):
        ran.append("third")
        if ran.count("third") == 1:
            raise KeyboardInterrupt
        return found()

    for function in (first, second, third):
        define(function.__name__, function)
    names = ("first", "second", "third")
    with pytest.raises(KeyboardInterrupt):
        run(*names, output=tmp_path)
    report = run(*names, output=tmp_path, resume=True)
    assert ran == ["first", "second", "third", "second", "third"]
    assert {entry.status for entry in report.panels} == {"done"}
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        run(*names, output=tmp_path)
    run(*names, output=tmp_path, resume=False)
    assert ran == ["first", "second", "third", "first", "second", "third"]


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="output must be a folder"):
        run(output=tmp_path / "file")


# -- the report --------------------------------------------------------------------------------

EVIL = "<script>alert('&\"')</script>"


def test_the_report_is_the_same_when_it_is_read(define, tmp_path):
    figure, axes = subplots()
    axes.plot([1, 2])
    finding = Finding("It is so.", "It matters.", 0.5)
    table = {"Rows": [{"layer": "a", "norm": 1.5, "dead": False, "note": None}]}
    pictured = found(math.nan, figures=[Picture("line", figure, "A line.")], findings=[finding],
                     tables=table, reference={"Someone (2020)": "https://example.org"})  # fmt: skip
    define("full", lambda *_: pictured)
    define("infinite", lambda *_: found(-math.inf))
    report = run("full", "infinite", output=tmp_path)
    read = Report.read(tmp_path)
    assert read.model_dump_json() == report.model_dump_json()
    assert math.isnan(read["full.value"])
    assert read["infinite.value"] == -math.inf
    assert read.to_html() == report.to_html() == (tmp_path / "report.html").read_text("utf-8")
    assert [f.text for f in read.findings] == ["It is so."]
    json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    (shown,) = read.panel("full").figures
    assert (tmp_path / shown.svg).exists()
    assert (tmp_path / shown.png).exists()
    assert not (tmp_path / "examination.json").exists()


def test_strings_of_the_user_are_never_markup(define):
    figure, _ = subplots()
    define("evil", lambda *_: found(
        label=EVIL, figures=[Picture("a", figure, EVIL)], tables={EVIL: [{EVIL: EVIL}]},
        findings=[Finding(EVIL, EVIL, 1.0)], reference={EVIL: "https://example.org/\"><script>"},
    ))  # fmt: skip
    define("refusing", lambda *_: (_ for _ in ()).throw(NotApplicable(EVIL)))
    define("plain", lambda *_: found())
    data = Data((X, Y), classes=[EVIL, "b", "c"], name=EVIL)
    page = run("evil", "refusing", data=data).to_html()
    assert page.count("<script") == run("plain").to_html().count("<script")
    assert "alert('" not in page
    assert "&lt;script&gt;alert(" in page


def test_in_a_notebook_the_page_has_a_frame_of_its_own(define):
    define("plain", lambda *_: found())
    report = run("plain")
    frame = report._repr_html_()
    page, rest = frame.removeprefix('<iframe srcdoc="').split('"', 1)
    assert frame.startswith('<iframe srcdoc="')
    assert "<" not in page
    assert html.unescape(page) == report.to_html()
    assert rest.endswith("></iframe>")


def test_what_is_no_report_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        Report.read(tmp_path)
    for text in ("", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1}'):
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is not a report of an examination") as error:
            Report.read(tmp_path)
        assert "\n" not in str(error.value)
