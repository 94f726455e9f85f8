"""The parts of a committed examination that the page about it shows, as Markdown."""

from pathlib import Path

from cards import table, text

from assay.examine import Report
from assay.examine.report import interval_text

FOLDER = Path(__file__).parents[2] / "results" / "examinations" / "resnet20-cifar10"
ADDRESS = "examinations/resnet20-cifar10"  # in the site


def part(name: str) -> str:
    """What matters most (`findings`), or a panel: its figures of both kinds."""
    report = Report.read(FOLDER)
    if name == "findings":
        return "\n".join(
            f"{place}. **{text(finding.text)}** {text(finding.why)}"
            for place, finding in enumerate(report.findings[:5], 1)
        )
    panel = next(panel for panel in report.panels if panel.name == name)
    rows = []
    for metric in panel.metrics:
        value, interval = interval_text(metric)
        unit = f" {text(metric.unit)}" if metric.unit else ""
        rows.append((f"{text(metric.label)} `{metric.name}`", f"{value}{unit}", interval or "–"))
    parts = [table(("Figure", "Value", "Interval"), rows)] if rows else []
    for figure in panel.figures:
        caption = text(figure.caption) or figure.name
        parts.append(
            f'<figure markdown="span">\n![{caption}]({ADDRESS}/{figure.svg}){{ loading=lazy }}\n'
            f"<figcaption>{caption}</figcaption>\n</figure>"
        )
    notes = [f"*{text(note)}*" for note in panel.notes]
    return "\n\n".join(parts + notes)


def figures() -> list[tuple[str, Path]]:
    """Address in the site and file of every figure."""
    report = Report.read(FOLDER)
    return [
        (f"{ADDRESS}/{figure.svg}", FOLDER / figure.svg)
        for panel in report.panels
        for figure in panel.figures
    ]


def write_page(site: Path) -> None:
    """The whole report, as its user sees it."""
    page = site / ADDRESS / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(Report.read(FOLDER).to_html(), encoding="utf-8")
