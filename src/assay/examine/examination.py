"""Examining a network: every panel in turn, within the budget, and nothing of the model changed."""

import contextlib
import gc
import hashlib
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from assay.examine.budget import Budget
from assay.examine.gates import Gate
from assay.examine.panel import NotApplicable, Panel, Registered, choose_panels
from assay.examine.report import (
    DataRecord,
    FigureRecord,
    FindingRecord,
    MetricRecord,
    PanelRecord,
    Report,
    TableRecord,
)
from assay.examine.sample import Sample
from assay.examine.sources import as_data
from assay.examine.subject import Call, Snapshot, prepare, tensors_of, untouched_randomness
from assay.lab.figures import write_png, write_svg
from assay.lab.lab import derive_seed
from assay.lab.provenance import collect
from assay.lab.result import file_name, write_atomically
from assay.lab.usage import UsageError

OVERRUN = 1.5  # times its allowance: then a panel is stopped
GRACE = 3.0  # seconds on top
STARTED = "examination.json"


class OverBudget(BaseException):
    """Raised inside a panel whose time is up; no panel catches it by accident."""


def examine(
    model: nn.Module,
    data: Any,
    *,
    panels: Sequence[str] | None = None,
    budget: float = 300.0,
    spent: float = 0.0,
    call: Call | None = None,
    loss_fn: Callable | None = None,
    training: bool = True,
    fail_if: Sequence[str] = (),
    samples: int = 4096,
    seed: int = 0,
    output: Path | str | None = None,
    resume: bool | None = None,
    quiet: bool = True,
) -> Report:
    """Report what a trained network is made of.

    The model is not changed: panels work on a copy, and the global generators of torch, numpy and
    Python are put back. A panel that fails is shown as failed and the others go on. What is
    finished is kept in `output`, so that an examination that was killed goes on with `resume=True`.

    Args:
        model: trained, on any device; inputs are moved to it. Not run on GPU here.
        data: `(train, test)` datasets or loaders, an `assay.examine.Data`, a mapping with `train`,
            `test`, `classes`, or the name of one of Assay's data sets. Only the samples that are
            used are read.
        panels: their names; None for all.
        budget: seconds for everything; panels get shares of it and choose their sample sizes
            by it.
        spent: seconds of the budget that are gone already, for example with loading the model.
        call: `(model, x) -> output`, if the model is not called as `model(x)`.
        loss_fn: `(outputs, y) -> mean loss`; default cross-entropy, or the mean squared error
            for targets in floating point.
        training: whether copies may be trained for some panels.
        fail_if: gates, e.g. `"curvature.top_eigenvalue > 100"`; see `assay.examine.Gate`.
        samples: at most so many of each split.
        seed: of everything random.
        output: folder for the report; None for a temporary one.
        resume: go on with an unfinished examination in `output` (True) or discard it (False);
            with None, one that is there is an error.
        quiet: no progress bar.

    Returns:
        The report; `Report.to_html()` is its page.

    Raises:
        UsageError: if model and data do not fit, a panel or gate is unknown, or `output` holds
            another unfinished examination. One line that says what to do.

    Example:
        >>> import torch
        >>> from assay.examine import examine
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> report = examine(torch.nn.Linear(4, 3), {"train": (x, y)}, panels=["card"], budget=5)
        >>> report["card.parameters"]
        15.0
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    if not 0 < budget < math.inf:
        raise UsageError(f"budget must be a positive number of seconds, got {budget}")
    if not 0 <= spent < math.inf:
        raise UsageError(f"spent must be a number of seconds, at least 0, got {spent}")
    clock -= spent
    chosen = choose_panels(panels)
    gates = [Gate(expression) for expression in fail_if]
    for gate in gates:
        gate.check_panels([entry.name for entry in chosen])
    given = as_data(data)
    with untouched_randomness(seed):  # a dataset may transform at random
        sample = prepare(model, given, call=call, loss_fn=loss_fn, samples=samples, seed=seed)
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="assay-examine-"))
    identity = {"sample": _digest(sample), "budget": budget, "seed": seed, "training": training}
    finished = _settle(folder, identity, resume)
    progress = _progress(quiet)
    records = []
    clock -= sum(record.seconds for record in finished.values())  # what a killed one has spent
    with progress:
        for place, entry in enumerate(chosen):
            task = progress.add_task(
                entry.title, total=round(budget), completed=round(time.perf_counter() - clock)
            )
            record = finished.get(entry.name)
            if record is None:
                left = max(0.0, budget - (time.perf_counter() - clock))
                waiting = [other.share for other in chosen[place:] if other.name not in finished
                           and not _unsuitable(other, sample, training)]  # fmt: skip
                allowed = left * entry.share / (sum(waiting) or 1.0)
                record = _run(entry, sample, Budget(allowed, training=training, seed=seed), folder)
                _keep(folder, record)
            records.append(record)
            progress.remove_task(task)
    place = next(sample.model.parameters(), torch.zeros(()))
    report = Report(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        data=DataRecord(
            name=given.name,
            task=sample.task,
            classes=list(sample.classes),
            samples={"train": len(sample.train), "test": len(sample.test)},
            sizes=sample.sizes,
            notes=sample.notes,
        ),
        panels=records,
        budget=budget,
        seed=seed,
        provenance=collect(
            place.device, str(place.dtype).removeprefix("torch."), started,
            time.perf_counter() - clock,
        ),
    )  # fmt: skip
    report.write(folder)
    (folder / STARTED).unlink(missing_ok=True)
    if gates:  # after the report is safe: a gate may ask for a figure that no panel has
        report.gates = [gate.decide(report) for gate in gates]
        report.write(folder)
    return report


# -- one panel ---------------------------------------------------------------------------------


def _unsuitable(entry: Registered, sample: Sample, training: bool) -> str:
    """Why a panel need not be started; empty if it may be."""
    if sample.task not in entry.tasks:
        return f"it makes no sense for {sample.task}"
    return "training was not allowed" if entry.trains and not training else ""


def _run(entry: Registered, sample: Sample, budget: Budget, folder: Path) -> PanelRecord:
    """Run a panel; whatever happens in it becomes a record."""
    record = PanelRecord(name=entry.name, title=entry.title, status="done", allowed=budget.seconds)
    reason = _unsuitable(entry, sample, budget.training)
    if reason:
        return record.model_copy(
            update={"status": "not applicable", "reason": reason, "allowed": 0.0}
        )
    snapshot = Snapshot(sample.model)
    seed = derive_seed("examine", sample.seed, entry.name) % 2**63
    try:
        with untouched_randomness(seed), _stopped_after(OVERRUN * budget.seconds + GRACE):
            found = entry.function(sample.model, sample, budget)
        record = _recorded(record, found, folder)
    except NotApplicable as reason:
        record.status, record.reason = "not applicable", str(reason)
    except OverBudget:
        record.status = "over budget"
        record.reason = (
            f"it was stopped after {budget.spent:.0f} s, having been allowed {budget.seconds:.0f} s"
        )
    except Exception as error:
        record.status = "failed"
        record.reason = f"{type(error).__name__}: {error}".strip()
    changed = snapshot.changes(sample.model)
    if changed:
        snapshot.restore(sample.model)
        if record.status == "done":
            budget.note(f"The panel left {changed[0]} changed; it has been put back.")
    record.notes = budget.notes
    record.seconds = budget.spent
    gc.collect()
    return record


def _recorded(record: PanelRecord, found: Any, folder: Path) -> PanelRecord:
    if not isinstance(found, Panel):
        raise TypeError(f"the panel returned a {type(found).__name__}, not a Panel")
    for kind, things in (("metrics", found.metrics), ("figures", found.figures)):
        names = [thing.name for thing in things]
        if len(set(names)) != len(names):
            raise ValueError(f"the panel has two {kind} of one name: {', '.join(names)}")
    figures = []
    for picture in found.figures:
        stem = f"figures/{record.name}-{file_name(picture.name)}"
        write_svg(picture.figure, folder / f"{stem}.svg")
        write_png(picture.figure, folder / f"{stem}.png")
        figures.append(FigureRecord(name=picture.name, caption=picture.caption,
                                    svg=f"{stem}.svg", png=f"{stem}.png"))  # fmt: skip
    return record.model_copy(
        update={
            "metrics": [
                MetricRecord(
                    name=m.name, label=m.label, value=m.value, interval=m.interval, unit=m.unit,
                    better=m.better, method=m.method, reading=m.reading,
                )
                for m in found.metrics
            ],
            "figures": figures,
            "tables": [
                TableRecord(name=name, rows=[dict(row) for row in rows])
                for name, rows in found.tables.items()
            ],
            "findings": [
                FindingRecord(text=f.text, why=f.why, severity=f.severity, panel=record.name)
                for f in found.findings
            ],
            "reading": found.reading,
            "method": found.method,
            "reference": dict(found.reference),
        }
    )  # fmt: skip


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise `OverBudget` in the block when its time is up.

    By an alarm signal, so in the main thread of a system that has them; elsewhere a panel is
    bounded by its own care alone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise OverBudget

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    # Again every few seconds, where the first was swallowed.
    others, again = signal.setitimer(signal.ITIMER_REAL, seconds, GRACE)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also if the alarm came just before it was switched off
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if others:  # somebody else's alarm goes on
            left = max(0.001, others - (time.monotonic() - began))
            signal.setitimer(signal.ITIMER_REAL, left, again)


# -- what a killed examination leaves ----------------------------------------------------------


def _digest(sample: Sample) -> str:
    """Of the weights and the samples: what an examination is about."""
    digest = hashlib.sha256()
    tensors = dict(tensors_of(sample.model))
    for name in ("train", "test"):
        tensors |= {f"{name} x": sample.split(name).x, f"{name} y": sample.split(name).y}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((name, plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settle(folder: Path, identity: dict[str, Any], resume: bool | None) -> dict[str, PanelRecord]:
    """The finished panels of an unfinished examination in this folder, if it is to go on."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output must be a folder, and {folder} is a file")
    marker = folder / STARTED
    try:
        previous = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        previous = None
    if previous is not None and resume is None:
        raise UsageError(
            f"{folder} holds an unfinished examination: --resume goes on with it, --no-resume "
            "discards it, --output writes elsewhere"
        )
    if previous is not None and resume:
        differing = [key for key in identity if previous.get(key) != identity[key]]
        if differing:
            what = {"sample": "model or data"}
            raise UsageError(
                f"the unfinished examination in {folder} differs in "
                f"{', '.join(what.get(key, key) for key in differing)}: use the same, or "
                "--no-resume to discard it"
            )
        kept = {}
        for path in sorted((folder / "panels").glob("*.json")):
            with contextlib.suppress(ValidationError):
                record = PanelRecord.model_validate_json(path.read_text(encoding="utf-8"))
                if record.status in ("done", "not applicable"):  # others are tried again
                    kept[record.name] = record
        return kept
    for path in (folder / "panels").glob("*.json"):
        path.unlink()
    write_atomically(marker, json.dumps(identity, indent=1))
    return {}


def _keep(folder: Path, record: PanelRecord) -> None:
    write_atomically(folder / "panels" / f"{record.name}.json", record.model_dump_json(indent=1))


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"), TimeRemainingColumn(),
        transient=True, disable=quiet,
    )  # fmt: skip
