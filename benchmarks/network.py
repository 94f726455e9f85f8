"""DDP training over links that are really slow: bytes, step time and time to an accuracy.

Two to four network namespaces are joined by virtual cables shaped with `tc`; in each one rank of a
gloo group trains. `assay bench network` shows the ratios that have a target; run as a program this
file measures all methods on all links:

    python benchmarks/network.py --json results/network.json
    python benchmarks/network.py --links 100 --methods dgc --ranks 4

Where namespaces are not permitted it says so, trains over the loopback interface and adds what
`LinkModel` says of the counted bytes; such rows are labelled "modelled".
"""

import contextlib
import functools
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from assay.data import Batches, load
from assay.distributed import (
    CompressionState,
    DensityWarmup,
    DGCState,
    LinkModel,
    NaturalCompressor,
    dgc_hook,
    two_way_compression_hook,
)
from assay.distributed.namespaces import INTERFACE, ShapedNetwork, interface_bytes, not_permitted
from assay.distributed.testing import spawn
from assay.lab import at_most, provenance
from assay.lab.bench import Samples, benchmark

# Fixed before anything was measured: the settings of the experiments on natural compression and
# DGC (MNIST-5k, SGD 0.1 with momentum 0.9, 32 images a worker), on a network of 5.8 M parameters.
TRAINING: dict[str, Any] = {
    "data": "mnist5k",
    "width": 2048,
    "batch": 32,
    "lr": 0.1,
    "momentum": 0.9,
    "epochs": 6,
    "target": 0.92,
    "every": 10,
    "seed": 0,
}
WINDOW = 3  # evaluations whose mean has to reach the target: one alone is luck
LATENCY = {1000: 1e-4, 100: 1e-3, 10: 5e-3}  # Mbit/s: seconds, one way
UNSHAPED = 0  # the link that is as fast as the machine
STEPS = 12
DENSE_STEPS = 10  # of PowerSGD, at the beginning
SKIPPED = 3  # steps that are not timed: buckets are rebuilt, PowerSGD starts
TIMEOUT = 3600.0
TC = shutil.which("tc")


def link_of(megabits: int) -> LinkModel | None:
    """A link by its rate in Mbit/s."""
    if megabits == UNSHAPED:
        return None
    return LinkModel(bandwidth=1e6 * megabits, latency=LATENCY.get(megabits, 1e-3))


def name_of(megabits: int) -> str:
    if megabits == UNSHAPED:
        return "Unshaped"
    rate = f"{megabits // 1000} Gbit/s" if megabits >= 1000 else f"{megabits} Mbit/s"
    return f"{rate}, {1000 * LATENCY.get(megabits, 1e-3):g} ms"


# -- methods -------------------------------------------------------------------------------------


Made = tuple[DistributedDataParallel, Optimizer, Callable[[], None]]  # the last: ends an epoch
Make = Callable[[nn.Module, Mapping], Made]


def _dense(hook: Callable, state: Callable[[], object], **options: Any) -> Make:
    def make(model: nn.Module, training: Mapping) -> Made:
        ddp = DistributedDataParallel(model, **options)
        ddp.register_comm_hook(state(), hook)
        optimizer = torch.optim.SGD(model.parameters(), training["lr"], training["momentum"])
        return ddp, optimizer, lambda: None

    return make


def _power_sgd(start: int) -> Make:
    """PowerSGD after `start` steps without compression.

    It gets one bucket: it starts collectives from callbacks, whose order over several buckets may
    differ between ranks, and gloo then mistakes one message for another.
    """
    state = functools.partial(
        powerSGD_hook.PowerSGDState,
        None,
        matrix_approximation_rank=4,
        start_powerSGD_iter=start,
    )
    return _dense(powerSGD_hook.powerSGD_hook, state, bucket_cap_mb=10_000)


def _dgc(epochs: int | None, **settings: Any) -> Make:
    def make(model: nn.Module, training: Mapping) -> Made:
        warmup = None if epochs is None else DensityWarmup(epochs)
        state = DGCState(model, momentum=training["momentum"], warmup=warmup, **settings)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(state, dgc_hook)
        return ddp, torch.optim.SGD(model.parameters(), training["lr"]), state.step_epoch

    return make


# The papers warm DGC up for 4 of 90 or 164 epochs; one of the experiments' 30 is as large a part.
METHODS: dict[str, tuple[str, Make]] = {
    "none": ("fp32, no hook", _dense(default_hooks.allreduce_hook, lambda: None)),
    "fp16": ("fp16", _dense(default_hooks.fp16_compress_hook, lambda: None)),
    "powersgd": ("PowerSGD, rank 4", _power_sgd(DENSE_STEPS)),
    "natural": ("natural compression", _dense(two_way_compression_hook, CompressionState)),
    "dgc": ("DGC, warm-up 1 epoch", _dgc(1)),
    "dgc4": ("DGC, warm-up 4 epochs", _dgc(4)),
    "dgc-natural": ("DGC + natural, warm-up 1 epoch", _dgc(1, values=NaturalCompressor())),
}
# What is timed as a step: without what comes before compression proper.
STEADY = {
    "powersgd": _power_sgd(2),
    "dgc": _dgc(None),
    "dgc-natural": _dgc(None, values=NaturalCompressor()),
}


def network(width: int) -> nn.Module:
    """Return 784-width-width-10; 5.8 M parameters for 2048."""
    torch.manual_seed(0)
    sizes = (784, width, width, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


# -- what every rank does ------------------------------------------------------------------------


class Meter:
    """What collectives send, by their own sizes, and after how many messages one after another."""

    def __init__(self) -> None:
        self.bytes = self.rounds = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count the collectives that hooks start."""
        all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single
        batch = dist.batch_isend_irecv
        n = dist.get_world_size()

        def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += 2 * (n - 1) * tensor.nbytes // n
            self.rounds += 2 * (n - 1)
            return all_reduce(tensor, *args, **kwargs)

        def counted_exchange(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += (n - 1) * tensor.nbytes // n
            self.rounds += 1
            return all_to_all(output, tensor, *args, **kwargs)

        def counted_batch(operations: list[dist.P2POp]) -> Any:
            self.bytes += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
            self.rounds += 1
            return batch(operations)

        with (
            mock.patch.object(dist, "all_reduce", counted_reduce),
            mock.patch.object(dist, "all_to_all_single", counted_exchange),
            mock.patch.object(dist, "batch_isend_irecv", counted_batch),
        ):
            yield


def transfer(megabits: int) -> dict[str, float]:
    """Check a link before it is used: a transfer of about a second, and a message there and back.

    All ranks call it; 0 and 1 measure, others wait.
    """
    rank = dist.get_rank()
    x, byte = torch.zeros(max(1, (megabits or 8000) * 125_000), dtype=torch.uint8), torch.zeros(1)
    send, receive = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
    measured, trips = {}, []
    for direction in ("forth", "back"):
        dist.barrier()
        start = time.perf_counter()
        if rank < 2:
            send(x, 1 - rank)
            receive(byte, 1 - rank)
        measured[f"Mbit/s {direction}"] = 8e-6 * len(x) / (time.perf_counter() - start)
        send, receive = receive, send
    dist.barrier()
    for _ in range(20):
        start = time.perf_counter()
        if rank < 2:
            send(byte, 1 - rank)
            receive(byte, 1 - rank)
        trips.append(time.perf_counter() - start)
    dist.barrier()
    return measured | {"round trip, ms": 1e3 * statistics.median(trips)}


class Run:
    """DDP training of one method on this rank, a measured step at a time."""

    def __init__(self, make: Make, training: Mapping, interface: str | None) -> None:
        self.training, self.interface = training, interface
        self.model, self.optimizer, self.next_epoch = make(network(training["width"]), training)
        self.train, self.test = (load(training["data"], split) for split in ("train", "test"))
        generator = torch.Generator().manual_seed(training["seed"])
        size = training["batch"] * dist.get_world_size()
        self.batches = Batches(
            self.train.x, self.train.y, size, generator=generator, drop_last=True
        )
        self.steps: list[dict[str, float]] = []
        self.accuracies: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """Train on this rank's part of a batch."""
        rank, meter = dist.get_rank(), Meter()
        x, y = (part.chunk(dist.get_world_size())[rank] for part in (x, y))
        counted = self._counted()
        start = time.perf_counter()
        with meter.reading():
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        seconds = time.perf_counter() - start
        sent, received = (b - a for a, b in zip(counted, self._counted(), strict=True))
        self.steps.append(
            {
                "seconds": seconds,
                "sent": sent,
                "received": received,
                "payload": meter.bytes,
                "rounds": meter.rounds,
            }
        )

    def _counted(self) -> tuple[int, int]:
        return (0, 0) if self.interface is None else interface_bytes(self.interface)

    @torch.no_grad()
    def evaluate(self) -> bool:
        """Test accuracy, the same on all ranks; whether the target is reached. Takes no time."""
        hits = (self.model.module(self.test.x).argmax(1) == self.test.y).float()
        self.accuracies.append(hits.mean().item())
        dist.barrier()
        recent = self.accuracies[-WINDOW:]
        return len(recent) == WINDOW and statistics.mean(recent) >= self.training["target"]

    def several(self, count: int) -> None:
        """Take some steps, wherever they lead."""
        batches = itertools.chain.from_iterable(itertools.repeat(self.batches))
        for x, y in itertools.islice(batches, count):
            self.step(x, y)

    def to_target(self, epochs: int, whole: bool) -> int | None:
        """Train for some epochs or, unless `whole`, to the target; the step that reached it."""
        reached = None
        for _ in range(epochs):
            for x, y in self.batches:
                self.step(x, y)
                if len(self.steps) % self.training["every"] == 0 and self.evaluate():
                    reached = reached or len(self.steps)
                    if not whole:
                        return reached
            self.next_epoch()
        return reached


def rank_measures(
    plans: Sequence[tuple[str, int, str]], megabits: int, training: dict, interface: str | None
) -> dict[str, Any]:
    """Everything that is measured on one link; a function for processes.

    Args:
        plans: Method, steps to be timed, and "" for no more, "target" for training until the
            target is reached, "whole" for training all epochs.
        megabits: The link, to be checked.
        training: See `TRAINING`.
        interface: Whose bytes are counted; None if there is none of our own.
    """
    found: dict[str, Any] = {"link": transfer(megabits) if dist.get_world_size() > 1 else {}}
    for method, count, kind in plans:
        record: dict[str, Any] = {}
        if count:
            make = STEADY.get(method, METHODS[method][1])
            run = Run(make, training, interface)
            run.several(count + SKIPPED)
            record["steady"] = run.steps[SKIPPED:]
        if kind:
            run = Run(METHODS[method][1], training, interface)
            record["reached"] = run.to_target(training["epochs"], kind == "whole")
            record["steps"], record["accuracies"] = run.steps, run.accuracies
        found[method] = record
    return found


# -- from steps to rows --------------------------------------------------------------------------


def measure(
    megabits: int, plans: Sequence[tuple[str, int, str]], ranks: int, training: dict
) -> dict[str, Any]:
    """Rank 0's measurements on one link, in namespaces where they are permitted."""
    reason = not_permitted()
    if reason is None:
        with ShapedNetwork(ranks, link_of(megabits)) as shaped:
            job = (rank_measures, plans, megabits, training, INTERFACE)
            return shaped.spawn(*job, timeout=TIMEOUT)[0] | {"mode": "measured"}
    job = (rank_measures, ranks, plans, UNSHAPED, training, None)
    found = spawn(*job, timeout=TIMEOUT)[0]
    for method, _, _ in plans:
        for kind in ("steady", "steps"):
            if kind in found[method]:
                found[method][kind] = modelled(found[method][kind], link_of(megabits))
    return found | {"link": {}, "mode": f"modelled, {reason}"}


def modelled(steps: Sequence[dict], link: LinkModel | None) -> list[dict]:
    """Steps taken over the loopback interface as they would be over a link."""

    def step_over(step: dict) -> dict:
        waiting = link.seconds(8 * step["payload"], step["rounds"]) if link else 0.0
        return step | {"seconds": step["seconds"] + waiting, "sent": step["payload"]}

    return [step_over(step) for step in steps]


def rows_of(found: dict[str, Any], megabits: int, ranks: int) -> list[dict[str, Any]]:
    """One row a method: what the steps of `measure` come to."""
    rows = []
    for method, record in found.items():
        if method not in METHODS:
            continue
        row = {"method": method, "link": megabits, "ranks": ranks, "mode": found["mode"]}
        row |= {"label": METHODS[method][0], "link_name": name_of(megabits)}
        steady, steps = record.get("steady"), record.get("steps")
        if steady:
            middle = {k: statistics.median(step[k] for step in steady) for k in steady[0]}
            row["step_seconds"] = middle["seconds"]
            row["all_step_seconds"] = [round(step["seconds"], 5) for step in steady]
            row["step_bytes"] = max(middle["sent"], middle["received"])
            row["payload_bytes"], row["rounds"] = middle["payload"], middle["rounds"]
        if steps:
            reached = record["reached"]
            until = steps[:reached] if reached else steps
            row["reached_step"] = reached
            row["trained_seconds"] = sum(step["seconds"] for step in until)
            row["trained_bytes"] = sum(step["sent"] for step in until)
            row["accuracies"] = [round(accuracy, 4) for accuracy in record["accuracies"]]
        rows.append(row)
    return rows


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows with those measured anew in the place of the old ones, in the order of the tables."""
    by_key = {(row["ranks"], row["link"], row["method"]): row for row in old}
    for row in new:
        key = (row["ranks"], row["link"], row["method"])
        by_key[key] = by_key.get(key, {}) | row
    names = list(METHODS)
    order = sorted(by_key, key=lambda key: (key[0], -(key[1] or 10**9), names.index(key[2])))
    return derived([by_key[key] for key in order])


def derived(rows: list[dict]) -> list[dict]:
    """Add to rows what takes several of them: the expected step time, and times to the target."""
    by_key = {(row["ranks"], row["link"], row["method"]): row for row in rows}
    for row in rows:
        unshaped = by_key.get((row["ranks"], UNSHAPED, row["method"]), {})
        link, seconds = link_of(row["link"]), row.get("step_seconds")
        if link and seconds and "step_seconds" in unshaped:
            waiting = link.seconds(8 * row["step_bytes"], round(row["rounds"]))
            row["expected_seconds"] = unshaped["step_seconds"] + waiting
            row["deviation"] = seconds / row["expected_seconds"] - 1
        reached, known = row.get("reached_step"), unshaped.get("reached_step")
        constant = not row["method"].startswith("dgc")  # its warm-up's steps take other times
        row["target_step"] = row["target_seconds"] = row["target_how"] = None
        if reached:
            row["target_seconds"], row["target_how"] = row["trained_seconds"], "whole run"
            row["target_step"] = reached
        elif seconds and known and constant:
            dense = by_key.get((row["ranks"], row["link"], "none"), {}).get("step_seconds", seconds)
            first = DENSE_STEPS if row["method"] == "powersgd" else 0
            row["target_seconds"] = (known - first) * seconds + first * dense
            row["target_step"], row["target_how"] = known, "steps × time"
    for row in rows:
        base = by_key.get((row["ranks"], row["link"], "none"), {}).get("target_seconds")
        if base and row["target_seconds"]:
            row["sooner"] = base / row["target_seconds"]
    return rows


# -- as rows of `assay bench` --------------------------------------------------------------------


def parameters_of_25_million() -> list[Tensor]:
    """Return the weights and biases of the network of `benchmarks/deep_gradient_compression.py`."""
    sizes = (1024, 3072, 3072, 3072, 1024)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def exchanges_of_25_million() -> dict[str, list[float]]:
    """Seconds of a DGC step's exchange and of the same gradient's all-reduce, in turn."""
    parameters = parameters_of_25_million()
    torch.manual_seed(dist.get_rank())
    gradients = [torch.randn_like(p) for p in parameters]
    state = DGCState(parameters, warmup=None)
    whole = torch.cat([g.view(-1) for g in gradients])
    seconds: dict[str, list[float]] = {"dgc": [], "fp32": []}
    for _ in range(7):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        for name, call in (
            ("dgc", state.average_gradients),
            ("fp32", lambda: dist.all_reduce(whole)),
        ):
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


@benchmark(
    "a DGC step's exchange vs fp32 all-reduce, 25 M, 2 ranks, 1 Gbit/s", target=at_most(0.25)
)
def dgc_against_all_reduce() -> Samples:
    """Selection, compensation and decoding, and the sending of what little is left to be sent."""
    reason, link = not_permitted(), link_of(1000)
    assert link is not None
    if reason is None:
        with ShapedNetwork(2, link) as shaped:
            seconds = shaped.spawn(exchanges_of_25_million)[0]
        mode = "measured in shaped namespaces"
    else:
        seconds = spawn(exchanges_of_25_million, 2)[0]
        bits = 32 * sum(p.numel() for p in parameters_of_25_million())
        seconds["fp32"] = [link.all_reduce(bits, 2)] * len(seconds["dgc"])
        mode = f"modelled, {reason}"
    return Samples(
        ours=seconds["dgc"],
        peer=seconds["fp32"],
        peer_name="all_reduce",
        peer_version=torch.__version__,
        extra={"mode": mode},
    )


def _time_to_target(method: str) -> Samples:
    """How much sooner than without a hook the target is reached at 100 Mbit/s.

    Steps to the target are counted on a link without a limit, where they are the same; with the
    time of a step of fp32 on the slow link they make its time. DGC runs there from the start.
    """
    known = measure(UNSHAPED, [("none", 0, "target")], 2, TRAINING)
    steps = {"none": known["none"]["reached"]}
    whole = method.startswith("dgc")
    plans = [("none", 4, ""), (method, 0, "target") if whole else (method, 8, "")]
    found = measure(100, plans, 2, TRAINING)
    fp32 = statistics.median(step["seconds"] for step in found["none"]["steady"])
    if whole:
        ours = sum(step["seconds"] for step in found[method]["steps"])
        steps[method] = found[method]["reached"]
    else:
        taken = measure(UNSHAPED, [(method, 0, "target")], 2, TRAINING)
        steps[method] = taken[method]["reached"]
        ours = steps[method] * statistics.median(s["seconds"] for s in found[method]["steady"])
    return Samples(
        ours=[ours],
        peer=[steps["none"] * fp32],
        peer_name="DDP without a hook",
        peer_version=torch.__version__,
        extra={
            "mode": found["mode"],
            "accuracy": TRAINING["target"],
            "steps, ours": float(steps[method]),
            "steps, peer": float(steps["none"]),
        },
    )


@benchmark("time to 92 % on MNIST-5k, natural vs fp32 DDP, 5.8 M, 100 Mbit/s", target=at_most(0.4))
def natural_to_target() -> Samples:
    return _time_to_target("natural")


@benchmark(
    "time to 92 % on MNIST-5k, DGC (warm-up 1 epoch included) vs fp32 DDP, 5.8 M, 100 Mbit/s",
    target=at_most(0.2),
)
def dgc_to_target() -> Samples:
    return _time_to_target("dgc")


# -- as a program --------------------------------------------------------------------------------


def _provenance(started: datetime, seconds: float) -> dict[str, Any]:
    told = provenance.collect(torch.device("cpu"), "32-true", started, seconds)
    tc = subprocess.run(["tc", "-V"], capture_output=True, text=True).stdout if TC else ""
    return told.model_dump(mode="json") | {
        "threads": 1,
        "kernel": platform.release(),
        "tc": tc.strip(),
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    header = f"{'link':<22}{'method':<34}{'MB a step':>10}{'step, s':>9}{'expected':>9}"
    typer.echo(f"{header}{'steps':>7}{'to target, s':>13}{'sooner':>8}{'accuracy':>10}")
    for row in rows:

        def cell(name: str, form: str, scale: float = 1.0, row: dict = row) -> str:
            value = row.get(name)
            return "–" if value is None else format(scale * value, form)

        accuracies = row.get("accuracies", [])
        final = f"{statistics.mean(accuracies[-WINDOW:]):.3f}" if accuracies else "–"
        typer.echo(
            f"{name_of(row['link']):<22}{METHODS[row['method']][0]:<34}"
            f"{cell('step_bytes', '.3f', 1e-6):>10}{cell('step_seconds', '.3f'):>9}"
            f"{cell('expected_seconds', '.3f'):>9}{cell('target_step', 'd', 1):>7}"
            f"{cell('target_seconds', '.1f'):>13}{cell('sooner', '.2f'):>8}{final:>10}"
        )


def main(
    methods: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(METHODS))] = ",".join(
        METHODS
    ),
    links: Annotated[
        str, typer.Option(help="Rates in Mbit/s, comma-separated; 0 is without a limit.")
    ] = "0,1000,100,10",
    ranks: Annotated[int, typer.Option(help="Namespaces, one rank each.", min=2, max=4)] = 2,
    width: Annotated[int, typer.Option(help="Of the two hidden layers.")] = TRAINING["width"],
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = TRAINING["epochs"],
    steps: Annotated[int, typer.Option(help="Steps timed; 0 for none.")] = STEPS,
    train: Annotated[
        str, typer.Option(help='"no", "target": until it is reached, or "whole": all epochs.')
    ] = "target",
    to: Annotated[
        Path | None, typer.Option("--json", help="Where rows are kept; those there stay.")
    ] = None,
) -> None:
    """Measure DDP methods on links of several rates, with latencies of 0.1, 1 and 5 ms."""
    training = TRAINING | {"width": width, "epochs": epochs}
    kept = json.loads(to.read_text(encoding="utf-8")) if to and to.exists() else {}
    if kept and kept["training"] != training:
        raise typer.BadParameter(f"{to} holds rows of other settings: {kept['training']}")
    kept = {"training": training, "parameters": 0, "links": {}, "rows": [], "runs": []} | kept
    kept["parameters"] = sum(p.numel() for p in network(width).parameters())
    reason = not_permitted()
    if reason:
        typer.echo(f"No network namespaces here ({reason}): times are MODELLED.")
    kind = "" if train == "no" else train
    for megabits in map(int, links.split(",")):
        started, clock = datetime.now(UTC), time.monotonic()
        plans = [(method, steps, kind) for method in methods.split(",")]
        found = measure(megabits, plans, ranks, training)
        told = ", ".join(f"{key} {value:.4g}" for key, value in found["link"].items())
        typer.echo(f"{name_of(megabits)}, {found['mode']}. Link as measured: {told or '–'}")
        kept["links"][f"{ranks} × {megabits}"] = found["link"]
        kept["rows"] = merged(kept["rows"], rows_of(found, megabits, ranks))
        about = {"link": megabits, "methods": methods, "ranks": ranks, "steps": steps}
        about |= {"train": train, "provenance": _provenance(started, time.monotonic() - clock)}
        kept["runs"].append(about)
        if to:
            text = json.dumps(kept, indent=1, ensure_ascii=False)
            to.write_text(text + "\n", encoding="utf-8")
    _print(kept["rows"])


if __name__ == "__main__":
    typer.run(main)
