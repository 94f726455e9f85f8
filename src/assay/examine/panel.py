"""What a panel of an examination is: a function of a model, data and a budget."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.figure import Figure
from torch import nn

from assay.examine.budget import Budget
from assay.examine.sample import Sample, Task
from assay.lab.result import Cell
from assay.lab.usage import UsageError, unknown

TASKS: tuple[Task, ...] = ("classification", "regression", "sequence")


class NotApplicable(Exception):
    """Raised by a panel that has nothing to say on this model or data; the message says why."""


@dataclass(frozen=True)
class Metric:
    """One figure of a panel.

    Args:
        name: an identifier; gates call it `panel.name`.
        label: what a reader calls it.
        value: the figure.
        method: how it was measured: estimator, samples, what the interval is.
        reading: one sentence on how to read it.
        interval: lower and upper end, or None if the figure is exact.
        unit: of the value.
        better: which direction is better, if either is.

    Raises:
        ValueError: if the name is not an identifier, or the interval is upside down.

    Example:
        >>> from assay.examine import Metric
        >>> Metric("accuracy", "Accuracy", 0.9, "on 100 test samples", "Share right.").value
        0.9
    """

    name: str
    label: str
    value: float
    method: str
    reading: str
    interval: tuple[float, float] | None = None
    unit: str = ""
    better: Literal["low", "high"] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be an identifier, got {self.name!r}")
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"interval must be (low, high), got {self.interval}")


@dataclass(frozen=True)
class Finding:
    """Something that a reader should know before anything else.

    Args:
        text: what was found, one sentence with its figure.
        why: why it matters and what can be done, one or two sentences.
        severity: from 0 (good to know) to 1 (the network is broken); the report begins with the
            five most severe findings of all panels.

    Raises:
        ValueError: if the severity is not in [0, 1].

    Example:
        >>> from assay.examine import Finding
        >>> Finding("Layer 3 is dead.", "No gradient passes it.", 0.9).severity
        0.9
    """

    text: str
    why: str
    severity: float

    def __post_init__(self) -> None:
        if not 0 <= self.severity <= 1:
            raise ValueError(f"severity must be in [0, 1], got {self.severity}")


@dataclass(frozen=True)
class Picture:
    """A figure of a panel; `name` becomes the file's name.

    Args:
        name: unique in the panel.
        figure: from `assay.lab.figures.subplots`.
        caption: one or two sentences on what it shows.

    Example:
        >>> from assay.examine import Picture
        >>> from assay.lab.figures import subplots
        >>> figure, axes = subplots()
        >>> Picture("losses", figure, "The loss of every sample.").name
        'losses'
    """

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Panel:
    """What a panel found.

    Args:
        metrics: its figures.
        reading: a paragraph on how to read the panel.
        method: a paragraph on how all of it was measured.
        reference: the papers that the method comes from, each with its address.
        figures: to show.
        tables: rows of plain values by heading.
        findings: for the summary.

    Example:
        >>> from assay.examine import Metric, Panel
        >>> layers = Metric("layers", "Layers", 3, "counted", "Depth.")
        >>> Panel([layers], reading="Read it so.", method="It was counted.").tables
        {}
    """

    metrics: Sequence[Metric]
    reading: str
    method: str
    reference: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Picture] = ()
    tables: Mapping[str, Sequence[Mapping[str, Cell]]] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


PanelFunction = Callable[[nn.Module, Sample, Budget], Panel]


@dataclass(frozen=True)
class Registered:
    """A panel function with what an examination must know before it runs.

    Args:
        name: an identifier.
        title: heading in the report.
        function: `(model, data, budget) -> Panel`.
        share: of the time, relative to other panels.
        tasks: kinds of problems that it makes sense for.
        trains: whether it trains copies of the model.
        order: place in the report and in time; the elastic ones come last.
    """

    name: str
    title: str
    function: PanelFunction
    share: float
    tasks: tuple[Task, ...]
    trains: bool
    order: int


_REGISTERED: dict[str, Registered] = {}


def panel(
    name: str,
    *,
    title: str,
    order: int,
    share: float = 1.0,
    tasks: tuple[Task, ...] = TASKS,
    trains: bool = False,
) -> Callable[[PanelFunction], PanelFunction]:
    """Register a function as a panel of every examination.

    Args:
        name: an identifier, unique; gates and `--panels` use it.
        title: heading in the report.
        order: place in the report and in time, 0 first.
        share: of the time, relative to the other panels.
        tasks: `"classification"`, `"regression"`, `"sequence"`: where it makes sense.
        trains: whether it trains copies of the model; the user may forbid that.

    Raises:
        ValueError: if the name is no identifier, or another panel has it.

    Example:
        >>> from assay.examine import Panel, panel
        >>> @panel("nothing", title="Nothing", order=99)
        ... def nothing(model, data, budget):
        ...     return Panel([], reading="Nothing to read.", method="Nothing was done.")
        >>> from assay.examine.panel import forget
        >>> forget("nothing")
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")

    def register(function: PanelFunction) -> PanelFunction:
        taken = _REGISTERED.get(name)
        if taken is not None and taken.function.__module__ != function.__module__:
            raise ValueError(f"a panel {name!r} exists already, in {taken.function.__module__}")
        _REGISTERED[name] = Registered(name, title, function, share, tasks, trains, order)
        return function

    return register


def forget(name: str) -> None:
    """Take a panel off the list; for panels registered in a session or a test.

    Args:
        name: of the panel.
    """
    _REGISTERED.pop(name, None)


def all_panels() -> list[Registered]:
    """Every registered panel, in order; a file in `assay.examine.panels` is found by itself.

    Example:
        >>> from assay.examine import all_panels
        >>> all_panels()[0].name
        'card'
    """
    package = importlib.import_module("assay.examine.panels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_REGISTERED.values(), key=lambda entry: (entry.order, entry.name))


def choose_panels(names: Sequence[str] | None) -> list[Registered]:
    """The panels of these names, in the report's order; None for all.

    Args:
        names: of panels.

    Raises:
        UsageError: if there is no panel of a name.

    Example:
        >>> from assay.examine import choose_panels
        >>> [entry.title for entry in choose_panels(["curvature"])]
        ['Curvature']
    """
    known = {entry.name: entry for entry in all_panels()}
    for name in names or ():
        if name not in known:
            raise UsageError(unknown("panel", name, known))
    return [entry for entry in known.values() if names is None or entry.name in names]
