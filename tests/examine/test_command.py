"""`assay examine` and `assay compare` as a user calls them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from assay.cli import _seconds, app
from assay.examine import Panel, panel
from assay.examine.panel import forget
from assay.lab import UsageError

CODE = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)

def wide():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))

class Named(torch.nn.Linear):
    def forward(self, pixels, scale):
        return {"scores": scale * super().forward(pixels)}

def named():
    return Named(4, 3)

def call(model, x):
    return model(pixels=x, scale=2.0)["scores"]

def load():
    torch.manual_seed(1)
    return (torch.randn(40, 4), torch.arange(40) % 3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assay(*arguments):
    return CliRunner().invoke(app, ["examine", *arguments])


CARD = ("--panels", "card", "--budget", "5s", "--quiet")


def test_a_model_of_ones_own(folder):
    done = assay("mine.py:build", "--data", "mine.py:load", *CARD, "--output", "out")
    assert done.exit_code == 0, done.output
    assert "report: out/report.html" in done.output
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["model"] == "Linear"
    assert report["panels"][0]["status"] == "done"
    assert not (folder / "out" / "examination.json").exists()


def test_an_interrupted_examination_goes_on(folder):
    ran = []

    @panel("interrupted", title="Interrupted", order=1)
    def interrupted(model, data, budget):
        ran.append(budget.seconds)
        if len(ran) == 1:
            raise KeyboardInterrupt
        return Panel(metrics=[], reading="", method="")

    command = ("mine.py:build", "--data", "mine.py:load", "--panels", "card,interrupted",
               "--budget", "60s", "--quiet", "--output", "out")  # fmt: skip
    try:
        stopped = assay(*command)
        assert stopped.exit_code == 130, stopped.output
        assert "--resume goes on" in stopped.stderr
        done = assay(*command, "--resume")
    finally:
        forget("interrupted")
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [entry["status"] for entry in report["panels"]] == ["done", "done"]
    assert report["budget"] == 60
    assert all(seconds < 60 for seconds in ran)  # loading and the other panel took some


def test_json_has_a_versioned_schema(folder):
    done = assay("mine.py:build", "--data", "mine.py:load", *CARD, "--json")
    document = json.loads(done.output)
    assert document["schema_version"] == 1
    assert document["report"]["parameters"] == 15


def test_a_model_that_is_called_otherwise_needs_an_adapter(folder):
    refused = assay("mine.py:named", "--data", "mine.py:load", *CARD)
    assert refused.exit_code == 2
    assert "--call" in refused.stderr
    done = assay("mine.py:named", "--data", "mine.py:load", "--call", "mine.py:call", *CARD)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        (["card.parameters > 1000"], 0),
        (["card.parameters > 10"], 3),
        (["card.parameters > 1000", "card.parameters == 15"], 3),
        (["card.parameters >"], 2),
        (["__import__('os').system('touch owned')"], 2),
        (["card.parametres > 1"], 2),
        (["curvature.trace > 1"], 2),  # a panel that was not asked for
    ],
)
def test_gates_decide_the_exit_code(folder, gates, code):
    options = [part for gate in gates for part in ("--fail-if", gate)]
    done = assay("mine.py:build", "--data", "mine.py:load", *CARD, *options)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--demo"),
        (("mine.py:build",), "--data"),
        (("mine.py:build", "--demo"), "brings its own"),
        (("mine.py:build", "--data", "mine.py:load", "--budget", "soon"), "90s, 5m or 1h"),
        (("mine.py:build", "--data", "mine.py:load", "--budget", "0"), "90s, 5m or 1h"),
        (("mine.py:build", "--data", "mine.py:load", "--panels", "cart"), "did you mean card"),
        (("mine.py:build", "--data", "digits"), "does not take the data"),
        (("mine.py:build", "--data", "digts"), "did you mean digits"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, said):
    done = assay(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_time_spans():
    spans = ["90", "90s", "5m", "5 min", "1.5h"]
    assert [_seconds(text) for text in spans] == [90, 90, 300, 300, 5400]
    with pytest.raises(UsageError):
        _seconds("-3s")


def test_two_models_side_by_side(folder):
    for name in ("build", "wide"):
        assay(f"mine.py:{name}", "--data", "mine.py:load", *CARD, "--output", name)
    runner = CliRunner()
    done = runner.invoke(app, ["compare", "build", "wide", "--output", "both.html"])
    assert done.exit_code == 0, done.output
    page = (folder / "both.html").read_text()
    assert "Linear" in page
    assert "Sequential" in page
    said = json.loads(runner.invoke(app, ["compare", "build", "wide", "--json"]).output)
    counts = next(m for m in said["metrics"] if m["metric"] == "card.parameters")
    assert counts["values"] == {"Linear": 15.0, "Sequential": 163.0}
    for arguments, text in {("build",): "two reports", ("build", "nothing"): "nothing"}.items():
        refused = runner.invoke(app, ["compare", *arguments])
        assert refused.exit_code == 2
        assert text in refused.stderr


def test_randomness_of_the_caller_is_left_alone(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    from assay.examine import examine

    data = {"train": (torch.ones(9, 4), torch.arange(9) % 3)}
    model = torch.nn.Linear(4, 3)
    torch.set_rng_state(before)
    examine(model, data, panels=["card"], budget=5, output=folder / "out")
    assert torch.equal(torch.get_rng_state(), before)
