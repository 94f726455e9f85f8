"""Namespaces with slow links between them, and the benchmark that trains in them."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from assay.distributed import LinkModel
from assay.distributed.namespaces import (
    ShapedNetwork,
    interface_bytes,
    not_permitted,
    remove_abandoned,
)

REASON = not_permitted()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "network.py"


def ours(pid):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.startswith(f"assay-{pid}-")]


def processes_in(name):
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return listed.stdout.split()


# -- namespaces ----------------------------------------------------------------------------------


def exchanges():
    x, small = torch.full((50_000,), dist.get_rank() + 1.0), torch.zeros(1)
    dist.barrier()
    before, start = interface_bytes(), time.perf_counter()
    dist.all_reduce(x)
    seconds = time.perf_counter() - start
    sent, received = (b - a for a, b in zip(before, interface_bytes(), strict=True))
    trips = []
    for _ in range(5):
        start = time.perf_counter()
        (dist.send, dist.recv)[dist.get_rank()](small, 1 - dist.get_rank())
        (dist.recv, dist.send)[dist.get_rank()](small, 1 - dist.get_rank())
        trips.append(time.perf_counter() - start)
    return x.unique().tolist(), seconds, sent, received, min(trips)


@needs_namespaces
@pytest.mark.processes
def test_an_all_reduce_takes_the_time_of_its_bytes():
    link = LinkModel(bandwidth=10e6, latency=0.02)
    with ShapedNetwork(2, link) as network:
        assert len(ours(os.getpid())) == 3
        results = network.spawn(exchanges)
    for values, seconds, sent, received, trip in results:
        assert values == [3.0]
        # A ring of two sends the 200 kB once each way; headers and the barrier come on top.
        assert 200_000 <= sent <= 225_000
        assert 200_000 <= received <= 225_000
        # Never faster than the link, but for what the bucket (0.6 ms) lets pass at once.
        assert seconds > link.seconds(8 * 200_000) - 0.01
        assert trip > 2 * link.latency
    assert ours(os.getpid()) == []


@needs_namespaces
@pytest.mark.processes
def test_without_a_link_nothing_is_shaped():
    with ShapedNetwork(2) as network:
        values, _, sent, _, trip = network.spawn(exchanges)[0]
    assert values == [3.0]
    assert sent >= 200_000
    assert trip < 0.02  # the latency of the test above


def fails():
    if dist.get_rank() == 1:
        raise ArithmeticError("rank one cannot count")
    time.sleep(60)


@needs_namespaces
@pytest.mark.processes
def test_everything_is_removed_after_an_error():
    with (
        pytest.raises(RuntimeError, match=r"(?s)rank 1 raised.*rank one cannot count"),
        ShapedNetwork(2, LinkModel(1e8)) as network,
    ):
        network.spawn(fails)
    assert ours(os.getpid()) == []


def waits():
    time.sleep(300)


OWNER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_network_bench as this
from assay.distributed import LinkModel
from assay.distributed.namespaces import ShapedNetwork
with ShapedNetwork(2, LinkModel(1e8, 1e-3)) as network:
    print("built", flush=True)
    network.spawn(this.waits)
"""


@needs_namespaces
@pytest.mark.processes
def test_what_a_killed_process_leaves_is_removed_by_the_next():
    command = [sys.executable, "-c", OWNER, str(Path(__file__).parent)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "built\n"
        names = [line.split()[0] for line in ours(owner.pid)]
        assert len(names) == 3
        deadline = time.monotonic() + 60
        while len(inside := [pid for name in names for pid in processes_in(name)]) < 3:
            assert time.monotonic() < deadline  # two ranks and the switch
            time.sleep(0.1)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in inside):  # they end with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    remove_abandoned()
    assert ours(owner.pid) == []


def test_where_they_are_not_permitted_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert not_permitted() in (
        "ip and tc of iproute2 not found",
        f"they are a feature of Linux, and this is {sys.platform}",
    )
    with pytest.raises(PermissionError, match="no network namespaces"), ShapedNetwork(2):
        pass


def test_number_of_ranks():
    with pytest.raises(ValueError, match=r"ranks must be in 1 … 250, got 0"):
        ShapedNetwork(0)


# -- the benchmark -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("network_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["network_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.processes
def test_without_namespaces_steps_are_modelled_and_say_so(bench, monkeypatch):
    monkeypatch.setattr(bench, "not_permitted", lambda: "iproute2 not found")
    training = bench.TRAINING | {"width": 40}
    found = bench.measure(10, [("none", 2, ""), ("natural", 2, "")], 2, training)
    rows = {row["method"]: row for row in bench.rows_of(found, 10, 2)}
    parameters = sum(p.numel() for p in bench.network(40).parameters())
    for row in rows.values():
        assert row["mode"] == "modelled, iproute2 not found"
        least = bench.link_of(10).seconds(8 * row["step_bytes"], round(row["rounds"]))
        assert min(row["all_step_seconds"]) > least
    assert rows["none"]["step_bytes"] == 4 * parameters
    assert rows["natural"]["step_bytes"] < 0.3 * rows["none"]["step_bytes"]


@needs_namespaces
@pytest.mark.processes
def test_training_in_namespaces_counts_at_the_interface(bench):
    training = bench.TRAINING | {"width": 40, "target": 0.3, "every": 5}
    found = bench.measure(100, [("dgc", 2, "target")], 2, training)
    (row,) = bench.rows_of(found, 100, 2)
    assert row["mode"] == "measured"
    assert 50 < found["link"]["Mbit/s forth"] < 105
    assert found["link"]["round trip, ms"] > 2 * 1000 * bench.LATENCY[100]
    assert row["step_bytes"] >= row["payload_bytes"] > 0
    assert row["reached_step"] % 5 == 0
    assert row["trained_seconds"] > 0


def test_expectations_and_times_follow_from_the_rows(bench):
    def row(method, link, seconds, **more):
        rest = {"ranks": 2, "step_bytes": 1_000_000, "rounds": 4}
        return {"method": method, "link": link, "step_seconds": seconds} | rest | more

    rows = bench.merged(
        [row("none", 100, 7.0), row("dgc", 100, 0.3)],
        [
            row("none", 0, 0.1, reached_step=50, trained_seconds=5.0),
            row("dgc", 0, 0.2, reached_step=80, trained_seconds=16.0),
            row("none", 100, 0.2),
        ],
    )
    fp32, dgc = (r for r in rows if r["link"] == 100)
    assert fp32["expected_seconds"] == pytest.approx(0.1 + 0.08 + 4 * bench.LATENCY[100])
    assert fp32["deviation"] == pytest.approx(0.2 / 0.184 - 1)
    assert (fp32["target_seconds"], fp32["target_how"]) == (pytest.approx(10), "steps × time")
    assert fp32["sooner"] == 1
    assert dgc["target_seconds"] is None  # its warm-up's steps take other times
    unshaped = [r for r in rows if r["link"] == 0]
    assert [r["sooner"] for r in unshaped] == [1, pytest.approx(5 / 16)]


def test_help(bench):
    app = bench.typer.Typer()
    app.command()(bench.main)
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert told.exit_code == 0
    assert "--links" in told.output
    assert "powersgd" in told.output
