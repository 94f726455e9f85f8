"""The report of an examination: one JSON file, one page."""

import html
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from assay.lab import numerals
from assay.lab.report import embedded, made_with, render_page
from assay.lab.result import Cell, Provenance, Stored, read_document, write_atomically

SCHEMA_VERSION = 1
SUMMARY = 5
TIGHT = 1e-4  # of the value: a narrower interval is shown by its half-width

Status = Literal["done", "not applicable", "failed", "over budget", "not run"]


class MetricRecord(Stored):
    """One figure of a panel; see `assay.examine.Metric`."""

    name: str
    label: str
    value: float
    interval: tuple[float, float] | None = None
    unit: str = ""
    better: Literal["low", "high"] | None = None
    method: str
    reading: str


class FigureRecord(Stored):
    """A figure; files are relative to the report's folder."""

    name: str
    caption: str
    svg: str
    png: str


class TableRecord(Stored):
    """A table of plain values."""

    name: str
    rows: list[dict[str, Cell]]


class FindingRecord(Stored):
    """Something that a reader should know first."""

    text: str
    why: str
    severity: float
    panel: str


class PanelRecord(Stored):
    """What came of one panel."""

    name: str
    title: str
    status: Status
    reason: str = ""
    metrics: list[MetricRecord] = Field(default_factory=list)
    figures: list[FigureRecord] = Field(default_factory=list)
    tables: list[TableRecord] = Field(default_factory=list)
    findings: list[FindingRecord] = Field(default_factory=list)
    reading: str = ""
    method: str = ""
    reference: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    allowed: float = 0.0


class GateRecord(Stored):
    """A gate and how it came out; `failed` is None where it cannot be decided."""

    expression: str
    failed: bool | None
    reason: str = ""


class DataRecord(Stored):
    """The data of the examination."""

    name: str
    task: str
    classes: list[str]
    samples: dict[str, int]
    sizes: dict[str, int | None]
    notes: list[str]


class Report(Stored):
    """The outcome of one examination; what `report.json` holds.

    Args:
        schema_version: of the file's form.
        model: name of the model's class.
        parameters: how many it has.
        data: that it was examined on.
        panels: what came of each.
        gates: how each came out.
        budget: seconds that the user gave.
        seed: of everything random.
        folder: where the files of the figures are; not stored.
        provenance: where, when and with what it was made.

    Example:
        >>> from assay.examine import Report
        >>> sorted(Report.model_json_schema()["required"])
        ['budget', 'data', 'model', 'panels', 'parameters', 'provenance', 'seed']
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    parameters: int
    data: DataRecord
    panels: list[PanelRecord]
    gates: list[GateRecord] = Field(default_factory=list)
    budget: float
    seed: int
    provenance: Provenance
    folder: Path | None = Field(default=None, exclude=True)

    @property
    def findings(self) -> list[FindingRecord]:
        """All findings, the most severe first."""
        found = [finding for panel in self.panels for finding in panel.findings]
        return sorted(found, key=lambda finding: -finding.severity)

    def panel(self, name: str) -> PanelRecord:
        """The panel of a name.

        Args:
            name: of the panel.

        Raises:
            KeyError: if it was not asked for.
        """
        for panel in self.panels:
            if panel.name == name:
                return panel
        raise KeyError(f"the report has no panel {name!r}; it has: {self._names()}")

    def __getitem__(self, name: str) -> float:
        """The value of `"panel.metric"`."""
        panel, _, metric = name.partition(".")
        for entry in self.panel(panel).metrics:
            if entry.name == metric:
                return entry.value
        known = ", ".join(entry.name for entry in self.panel(panel).metrics)
        raise KeyError(f"panel {panel} has no metric {metric!r}; it has: {known or 'none'}")

    def metrics(self) -> dict[str, MetricRecord]:
        """Every metric by `"panel.metric"`."""
        return {f"{p.name}.{m.name}": m for p in self.panels for m in p.metrics}

    def _names(self) -> str:
        return ", ".join(panel.name for panel in self.panels)

    # -- files ---------------------------------------------------------------------------------

    def write(self, folder: Path) -> Path:
        """Write `report.json` and `report.html` atomically; the path of the page.

        Args:
            folder: that holds the figures.
        """
        self.folder = Path(folder)
        write_atomically(self.folder / "report.json", self.model_dump_json(indent=1) + "\n")
        path = self.folder / "report.html"
        write_atomically(path, self.to_html())
        return path

    @classmethod
    def read(cls, path: Path | str) -> "Report":
        """Read a `report.json`, or the one in a folder.

        Args:
            path: of either.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a report of this schema version; the message says why.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        report = read_document(
            cls, path, "report.json", SCHEMA_VERSION, "a report of an examination"
        )
        report.folder = path.parent
        return report

    # -- pages ---------------------------------------------------------------------------------

    def to_html(self) -> str:
        """The report as a self-contained page."""
        return render_page(
            "examination.html.j2",
            script="examination.js",
            package="assay.examine",
            filters={"interval": interval_text},
            report=self,
            findings=self.findings[:SUMMARY],
            figure=self.figure_address,
            when=_when(self.provenance.started),
            made_with=made_with(self.provenance),
        )

    def figure_address(self, figure: FigureRecord) -> str | None:
        """A figure as the address of an image; None if its file is missing.

        Args:
            figure: of one of the panels.
        """
        return None if self.folder is None else embedded(figure.svg, self.folder)

    def _repr_html_(self) -> str:
        """The page, in a frame of its own so that its style stays inside."""
        page = html.escape(self.to_html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40rem;border:0"></iframe>'

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.parameters:,} parameters, on {self.data.name or 'data'}"]
        lines += [f"- {finding.text}" for finding in self.findings[:SUMMARY]]
        return "\n".join(lines)


def interval_text(metric: MetricRecord) -> tuple[str, str]:
    """Value and interval of a metric, as text.

    Args:
        metric: to write.

    Example:
        >>> from assay.examine.report import MetricRecord, interval_text
        >>> metric = MetricRecord(name="a", label="A", value=0.9123, interval=(0.90, 0.93),
        ...                       method="counted", reading="High is good.")
        >>> interval_text(metric)
        ('0.912', '0.900 to 0.930')
    """
    if metric.interval is None:
        return numerals.number(metric.value), ""
    half = (metric.interval[1] - metric.interval[0]) / 2
    if half < TIGHT * abs(metric.value):
        return numerals.number(metric.value), f"± {numerals.number(half, 1)}"
    middle, low, high = numerals.estimate_and_interval(metric.value, metric.interval)
    return middle, f"{low} to {high}"


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M %Z}".strip()
