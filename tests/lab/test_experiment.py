"""A run leaves a whole result; a killed one goes on to the same figures."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from assay.lab import Experiment, Result, UsageError, find_experiment, merge, run_experiment
from assay.lab.experiment import slugs

HERE = Path(__file__).parent
RUN = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import demo_experiment
from assay.lab import Experiment, run_experiment
experiment = Experiment(demo_experiment)
run_experiment(experiment, overrides={{"epochs": "20"}}, directory={folder!r}, resume=True)
"""


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(HERE))
    try:
        yield Experiment(importlib.import_module("demo_experiment"))
    finally:
        sys.path.remove(str(HERE))


def test_result_survives_the_disk_and_has_every_claim(experiment, tmp_path):
    result = run_experiment(experiment, directory=tmp_path)
    assert Result.read(tmp_path) == result
    verdicts = {claim.id: claim.verdict for claim in result.claims}
    assert verdicts["bound"] == "holds"
    assert verdicts["noise"] == "holds"
    assert verdicts["scale"] == "not run"
    assert [m.seed for m in result.claims[1].measurements] == [0, 1]
    assert (tmp_path / result.figures[0].file).read_text().startswith("<?xml")
    assert (tmp_path / result.curves[0].file).read_text().startswith("step,series,value\n1,loss,")
    assert {d.samples for d in result.data if d.split == "train"} == {200}
    assert result.data[0].source
    assert not (tmp_path / "checkpoints").exists()


def test_same_run_gives_same_figures_and_another_seed_others(experiment, tmp_path):
    one = run_experiment(experiment, preset="smoke", directory=tmp_path / "1")
    two = run_experiment(experiment, preset="smoke", directory=tmp_path / "2")
    other = run_experiment(experiment, preset="smoke", seeds=[7], directory=tmp_path / "3")
    assert one.measurements() == two.measurements()
    assert one.measurements()["noise"] != other.measurements()["noise"]
    assert (tmp_path / "1/figures/line.svg").read_bytes() == (
        tmp_path / "2/figures/line.svg"
    ).read_bytes()


def test_seeds_run_apart_merge_to_the_run_over_both(experiment, tmp_path):
    whole = run_experiment(experiment, directory=tmp_path / "whole")
    parts = [
        run_experiment(experiment, seeds=[seed], directory=tmp_path / str(seed)) for seed in (0, 1)
    ]
    merged = merge(parts)
    assert [c.verdict for c in merged.claims] == [c.verdict for c in whole.claims]
    assert merged.measurements()["accuracy"] == whole.measurements()["accuracy"]
    with pytest.raises(ValueError, match="more than one result"):
        merge([parts[0], parts[0]])


@pytest.mark.processes
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_figures(experiment, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    undisturbed = run_experiment(
        experiment, overrides={"epochs": "20"}, directory=tmp_path / "whole"
    )
    torch.set_num_threads(threads)
    folder = tmp_path / "killed"
    code = RUN.format(here=str(HERE), folder=str(folder))
    moments = random.Random(0)
    kills = 0
    while not (folder / "result.json").exists():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        if kills < 3:
            before = _checkpoints(folder)
            while process.poll() is None and _checkpoints(folder) == before:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait() == 0
    assert kills == 3
    assert Result.read(folder).measurements() == undisturbed.measurements()


def _checkpoints(folder: Path) -> set[tuple[str, int]]:
    return {(p.name, p.stat().st_mtime_ns) for p in folder.glob("checkpoints/*.pt")}


def test_unfinished_run_is_neither_lost_nor_mixed_with_another(experiment, tmp_path):
    def interrupt(lab, config):
        lab.stage("half", lambda: 1)
        raise KeyboardInterrupt

    class Interrupted(Experiment):
        run = property(lambda self: interrupt)

    with pytest.raises(KeyboardInterrupt):
        run_experiment(Interrupted(experiment.module), directory=tmp_path)
    assert (tmp_path / "checkpoints/stage-half.pt").exists()
    with pytest.raises(UsageError, match="--resume goes on"):
        run_experiment(experiment, directory=tmp_path)
    with pytest.raises(UsageError, match="differs in config"):
        run_experiment(experiment, directory=tmp_path, overrides={"lr": "0.2"}, resume=True)
    run_experiment(experiment, directory=tmp_path, resume=False)
    assert Result.read(tmp_path).config["lr"] == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"epoch": "3"}, "unknown field 'epoch' of demo-experiment; did you mean epochs?"),
        ({"epochs": "many"}, "epochs=many does not fit: epochs is int"),
        ({"widths": "a,b"}, "widths=a,b does not fit"),
    ],
)
def test_wrong_settings_are_told_in_one_line(experiment, override, message):
    with pytest.raises(UsageError) as error:
        experiment.config("small", override)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_settings_take_the_type_of_their_field(experiment):
    overrides = {"epochs": "7", "lr": "1e-3", "widths": "8, 4", "limit": "none"}
    config = experiment.config("small", overrides)
    assert (config.epochs, config.lr, config.widths, config.limit) == (7, 1e-3, (8, 4), None)


def test_unknown_paper_names_the_nearest():
    assert slugs()
    with pytest.raises(UsageError, match="did you mean"):
        find_experiment(slugs()[0] + "x")


def test_a_stage_keeps_what_torch_can_load_and_refuses_the_rest(tmp_path):
    from assay.lab.checkpoint import Checkpoints

    value = {"a": [torch.arange(3), 1.5, None], "b": ("x", True)}
    first = Checkpoints(tmp_path).stage("kept", lambda: value)
    again = Checkpoints(tmp_path).stage("kept", lambda: pytest.fail("ran twice"))
    assert torch.equal(first["a"][0], again["a"][0])
    assert again["b"] == ("x", True)
    with pytest.raises(TypeError, match="stage 'bad' returned a set"):
        Checkpoints(tmp_path).stage("bad", lambda: {1, 2})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.stage("twice", lambda: 1)
    with pytest.raises(ValueError, match="used twice"):
        checkpoints.stage("twice", lambda: 1)


def test_result_of_another_schema_is_refused_with_its_path(tmp_path):
    (tmp_path / "result.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match=r"result\.json is not a result of Assay.*99"):
        Result.read(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is not a result of Assay"):
        Result.read(tmp_path)


def test_measured_figures_keep_all_their_digits(tmp_path):
    from assay.lab import Claim, Lab, at_most

    lab = Lab("demo", [Claim("a", "A", expect=at_most(1))], directory=tmp_path)
    figure = 1.0000000001
    for value in (figure, [figure], torch.tensor(figure, dtype=torch.float64), [torch.tensor(1)]):
        lab.measure("a", value)
    assert [m.value for m in lab.measurements["a"]] == [figure, figure, figure, 1.0]
