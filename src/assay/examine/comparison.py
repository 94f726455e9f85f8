"""Two or more examinations side by side."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.examine.report import MetricRecord, PanelRecord, Report, interval_text
from assay.lab.report import render_page
from assay.lab.result import write_atomically
from assay.lab.usage import UsageError


@dataclass(frozen=True)
class Cell:
    """One model's figure in a comparison.

    Args:
        value: as text, or why there is none.
        interval: as text, or `""`.
        best: whether it is better than every other beyond their intervals.
        missing: whether there is no figure.
    """

    value: str
    interval: str = ""
    best: bool = False
    missing: bool = False


@dataclass(frozen=True)
class Row:
    """One metric of all models.

    Args:
        label: what a reader calls it.
        name: `panel.metric`.
        unit: of the values.
        reading: how to read it.
        better: which direction is better, or None.
        values: one a model, None where it was not measured.
        intervals: likewise.
        cells: the same as text.
    """

    label: str
    name: str
    unit: str
    reading: str
    better: str | None
    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    cells: tuple[Cell, ...]


class Comparison:
    """The same panels of several reports, side by side.

    A figure is marked as better only where its interval and all others' do not overlap; figures
    without an interval are exact.

    Args:
        reports: at least two; `Report`s, or paths of `report.json` or its folder.
        names: what to call them; by default the models' classes, or the folders where these are
            equal.

    Raises:
        UsageError: if there are fewer than two, or the names do not fit.
        ValueError: if a file is not a report.

    Example:
        >>> import torch
        >>> from assay.examine import Comparison, examine
        >>> data = {"train": (torch.randn(60, 4), torch.arange(60) % 3)}
        >>> models = torch.nn.Linear(4, 3), torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
        >>> reports = [examine(model, data, panels=["card"], budget=5) for model in models]
        >>> comparison = Comparison(reports)
        >>> comparison.names
        ('Linear', 'Sequential')
        >>> [cell.value for cell in comparison.rows("card")[0].cells]
        ['15', '12']
    """

    def __init__(
        self, reports: Sequence[Report | Path | str], names: Sequence[str] | None = None
    ) -> None:
        if len(reports) < 2:
            raise UsageError(f"a comparison needs two reports or more, got {len(reports)}")
        self.reports = [
            report if isinstance(report, Report) else Report.read(report) for report in reports
        ]
        if names is not None and len(names) != len(reports):
            raise UsageError(f"{len(names)} names for {len(reports)} reports")
        self.names = tuple(names) if names is not None else self._names()

    def _names(self) -> tuple[str, ...]:
        models = tuple(report.model for report in self.reports)
        if len(set(models)) == len(models):
            return models
        folders = tuple(
            report.folder.resolve().name if report.folder else "" for report in self.reports
        )
        if len(set(folders)) == len(folders):
            return folders
        return tuple(f"{model} {i}" for i, model in enumerate(models, 1))

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Name and title of every panel that any report has, in their order."""
        found: dict[str, str] = {}
        for report in self.reports:
            found.update({panel.name: panel.title for panel in report.panels})
        return list(found.items())

    @property
    def warnings(self) -> list[str]:
        """What makes the reports hard to compare."""
        said = []
        if len({report.data.name for report in self.reports}) > 1:
            said.append("The models were examined on different data sets.")
        if len({report.data.task for report in self.reports}) > 1:
            said.append("The models solve different tasks.")
        if len({report.budget for report in self.reports}) > 1:
            said.append("The budgets differ, and with them the sample sizes.")
        if len({report.seed for report in self.reports}) > 1:
            said.append("The seeds differ, so the samples were not the same.")
        if not self.fair:
            said.append("No figure is called better: the samples were not the same.")
        return said

    @property
    def fair(self) -> bool:
        """Whether all were examined on the same samples, so that one may be called better."""
        alike = [(r.data.name, r.data.task, r.data.sizes, r.seed) for r in self.reports]
        return all(entry == alike[0] for entry in alike)

    def rows(self, panel: str) -> list[Row]:
        """Every metric of a panel that any report has.

        Args:
            panel: its name.
        """
        records = [self._panel(report, panel) for report in self.reports]
        metrics: dict[str, MetricRecord] = {}
        for record in records:
            for metric in record.metrics if record else ():
                metrics.setdefault(metric.name, metric)
        rows = []
        for name, first in metrics.items():
            found = [
                next((m for m in record.metrics if m.name == name), None) if record else None
                for record in records
            ]
            best = _best(found, first.better) if self.fair else None
            cells = tuple(
                Cell(*interval_text(metric), best=place == best)
                if metric is not None
                else Cell(_absence(record), missing=True)
                for place, (metric, record) in enumerate(zip(found, records, strict=True))
            )
            rows.append(
                Row(
                    first.label,
                    f"{panel}.{name}",
                    first.unit,
                    first.reading,
                    first.better,
                    tuple(metric and metric.value for metric in found),
                    tuple(metric and metric.interval for metric in found),
                    cells,
                )
            )
        return rows

    def figures(self, panel: str) -> list[list[tuple[str, str] | None]]:
        """Every figure of a panel: a model, its address and caption, or None.

        Args:
            panel: its name.
        """
        found: dict[str, list[tuple[str, str] | None]] = {}
        for place, report in enumerate(self.reports):
            record = self._panel(report, panel)
            for figure in record.figures if record else ():
                row = found.setdefault(figure.name, [None] * len(self.reports))
                row[place] = (report.figure_address(figure), figure.caption)
        return list(found.values())

    def to_html(self) -> str:
        """The comparison as a self-contained page."""
        return render_page(
            "comparison.html.j2",
            script="examination.js",
            package="assay.examine",
            comparison=self,
            reports=self.reports,
            names=self.names,
        )

    def write(self, path: Path | str) -> Path:
        """Write the page atomically; its path.

        Args:
            path: of the page.
        """
        write_atomically(Path(path), self.to_html())
        return Path(path)

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40rem;border:0"></iframe>'

    @staticmethod
    def _panel(report: Report, name: str) -> PanelRecord | None:
        return next((panel for panel in report.panels if panel.name == name), None)


def _absence(record: PanelRecord | None) -> str:
    if record is None:
        return "not asked for"
    return "not measured" if record.status == "done" else record.status


def _best(found: Sequence[MetricRecord | None], better: str | None) -> int | None:
    """The place of the figure that is better than all others beyond their intervals."""
    present = [(place, metric) for place, metric in enumerate(found) if metric is not None]
    if better is None or len(present) < 2:
        return None
    sign = 1 if better == "high" else -1
    spans = {
        place: sorted(sign * end for end in (metric.interval or (metric.value, metric.value)))
        for place, metric in present
    }
    leader = max(spans, key=lambda place: spans[place][0])
    others = [span[1] for place, span in spans.items() if place != leader]
    return leader if all(spans[leader][0] > end for end in others) else None
