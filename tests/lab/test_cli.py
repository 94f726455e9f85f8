"""The command line: exit codes, one clear line for a mistake, JSON that a program can read."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay import cli
from assay.lab import Experiment, Result, experiment
from assay.lab.cluster import Outcome, run_processes

HERE = Path(__file__).parent
runner = CliRunner()


@pytest.fixture(autouse=True)
def demo(monkeypatch, tmp_path):
    """Only the demonstration experiment exists, and the working folder is empty."""
    monkeypatch.syspath_prepend(str(HERE))
    module = importlib.import_module("demo_experiment")
    monkeypatch.setitem(sys.modules, "assay.experiments.demo_experiment", module)
    monkeypatch.setattr(experiment, "slugs", lambda: ["demo-experiment"])
    monkeypatch.setattr("assay.lab.slugs", lambda: ["demo-experiment"])
    monkeypatch.chdir(tmp_path)
    return Experiment(module)


def test_run_writes_result_and_report_and_prints_verdicts(tmp_path):
    done = runner.invoke(cli.app, ["run", "demo-experiment", "--preset", "smoke"])
    assert done.exit_code == 0, done.output
    assert "holds" in done.output
    folder = tmp_path / "runs/demo-experiment-smoke"
    assert (folder / "report.html").exists()
    assert Result.read(folder).preset == "smoke"
    shown = runner.invoke(cli.app, ["show", "demo-experiment"])
    assert "Newest result" in shown.output
    assert "A sine is at most one" in shown.output
    assert runner.invoke(cli.app, ["report"]).exit_code == 0
    gallery = runner.invoke(cli.app, ["gallery", "--output", "site"])
    assert gallery.exit_code == 0
    assert (tmp_path / "site/index.html").exists()


def test_listing_the_papers_waits_for_no_library_that_it_does_not_need():
    code = (
        "import sys; from assay.lab import all_experiments; list(all_experiments());"
        "slow = {'sklearn', 'scipy.stats', 'pandas', 'torch._dynamo', 'lightning_fabric'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_of_assays_own_is_no_failed_claim(monkeypatch, capsys):
    def broken():
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == cli.EXIT_CRASHED
    assert "RuntimeError: a defect" in capsys.readouterr().err


def test_json_is_versioned_and_complete():
    listed = json.loads(runner.invoke(cli.app, ["list", "--json"]).stdout)
    assert listed["schema_version"] == 1
    assert listed["papers"][0]["claims"][0]["expect"] == "≤ 1"
    run = ["run", "demo-experiment", "--preset", "smoke", "--seeds", "2", "--json"]
    results = json.loads(runner.invoke(cli.app, run).stdout)["results"]
    assert results[0]["seeds"] == [0, 1]
    doctor = json.loads(runner.invoke(cli.app, ["doctor", "--json"]).stdout)
    assert doctor["computation"]["torch"] == "right"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "demo-experimant"], "did you mean demo-experiment?"),
        (["run", "demo-experiment", "--preset", "smal"], "did you mean small"),
        (["run", "demo-experiment", "--set", "epoch=1"], "did you mean epochs?"),
        (["run", "demo-experiment", "--set", "epochs"], "field=value"),
        (["run", "demo-experiment", "--set", "epochs=-1"], "must not be negative"),
        (["run", "demo-experiment", "--set", "data=cifar99"], "cifar"),
        (["run", "demo-experiment", "--device", "abacus"], "abacus"),
        (["run"], "--all"),
        (["show", "demo"], "demo-experiment"),
        (["list", "--topic", "optimm"], "did you mean optim?"),
        (["report"], "assay run"),
        (["report", "nowhere"], "nowhere"),
        (["gallery"], "no results"),
        (["bench", "nothing-is-called-so"], "there are:"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, message):
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_failed_exact_claim_is_exit_code_1(demo, monkeypatch):
    def overshoot(lab, config):
        lab.measure("bound", 1.5)

    monkeypatch.setattr(demo.module, "run", overshoot)
    done = runner.invoke(cli.app, ["run", "demo-experiment"])
    assert done.exit_code == 1
    assert "fails" in done.output


def test_interruption_is_exit_code_130_and_says_how_to_go_on(demo, monkeypatch):
    def interrupted(lab, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.module, "run", interrupted)
    done = runner.invoke(cli.app, ["run", "demo-experiment"])
    assert done.exit_code == 130
    assert "--resume" in done.stderr


def test_many_papers_in_processes_one_bad_does_not_stop_the_others(monkeypatch):
    monkeypatch.undo()  # the processes see Assay as installed
    outcomes = list(run_processes(["no-such-paper", "nor-this"], ["--preset", "smoke"], jobs=2))
    assert {o.slug for o in outcomes} == {"no-such-paper", "nor-this"}
    assert all(isinstance(o, Outcome) and o.code == 2 for o in outcomes)
    assert all("unknown paper" in o.message for o in outcomes)
