"""Results as pages: one self-contained report a run, and a gallery over many runs.

A page needs no network and no file beside it (the gallery: its own folder). What a result holds is
shown as text and never trusted: templates escape every string, figures are embedded as images, in
which scripts do not run, and the page's content security policy allows its own script alone.
"""

import base64
import dataclasses
import hashlib
import shlex
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from assay.lab import chart, numerals
from assay.lab.experiment import find_experiment
from assay.lab.result import (
    Cell,
    ClaimResult,
    Provenance,
    Result,
    file_name,
    write_atomically,
)
from assay.lab.usage import UsageError

VERDICTS = ("holds", "fails", "inconclusive", "reported", "not run")
MAX_VALUES = 200  # of one claim that a page lists; result.json has all


# -- a run's report ----------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """Write `report.html` beside the `result.json` of a run.

    Args:
        folder: the run's folder.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: if the folder holds no `result.json`.
        ValueError: if that is not a result, or names a file outside the folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from assay.lab.report import write_report
        >>> write_report(Path(tempfile.mkdtemp()))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: ...
    """
    result = Result.read(folder / "result.json")
    path = folder / "report.html"
    write_atomically(path, render_report(result, folder))
    return path


def render_report(result: Result, folder: Path, gallery: str | None = None) -> str:
    """The report of one run as a self-contained HTML page.

    A figure or curve whose file is missing is replaced by a line that says so.

    Args:
        result: what to show.
        folder: where its figures and curves are.
        gallery: address of the page to link back to, if there is one.

    Raises:
        ValueError: if the result names a file outside `folder`.
    """
    curves, unread = _curves(result, folder)
    return render_page(
        "report.html.j2",
        script="report.js",
        image_source="data:",
        result=result,
        gallery=gallery,
        command=command_line(result),
        seeds_by_count=sorted(result.seeds) == list(range(len(result.seeds))),
        figures=[(figure, embedded(figure.file, folder)) for figure in result.figures],
        panels=chart.arrange(curves, result.seeds),
        unread=unread,
        made_with=made_with(result.provenance),
    )


def command_line(result: Result) -> str:
    """The command that repeats a run.

    Only settings that differ from the preset's are spelled out, if this Assay has the experiment.
    Seeds are 0, 1, …: the command line chooses no others.

    Args:
        result: of the run.
    """
    words = ["assay", "run", result.paper.slug, "--preset", result.preset]
    words += ["--seeds", str(len(result.seeds))]
    if result.provenance.device == "cpu":
        words += ["--device", "cpu"]
    if result.provenance.precision != "32-true":
        words += ["--precision", result.provenance.precision]
    preset = _preset(result)
    for name, value in result.config.items():
        if name not in preset or preset[name] != value:
            words += ["--set", f"{name}={_setting(value)}"]
    return shlex.join(words)


def _preset(result: Result) -> dict[str, Any]:
    """The settings of the result's preset as this Assay has them; empty if it does not."""
    try:
        config = find_experiment(result.paper.slug).config(result.preset)
    except (UsageError, ImportError):
        return {}
    return TypeAdapter(dict).dump_python(dataclasses.asdict(config), mode="json")


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_setting, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _inside(folder: Path, name: str) -> Path:
    """The path of a file that a result names, which may only lie in the result's folder."""
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"file {name!r} of the result lies outside its folder {folder}")
    return path


def embedded(file: str, folder: Path) -> str | None:
    """A figure as the address of an image, in which no script runs; None if its file is missing.

    Args:
        file: SVG or PNG, as the result names it.
        folder: of the result.

    Raises:
        ValueError: if the file lies outside the folder.
    """
    path = _inside(folder, file)
    if not path.is_file():
        return None
    kind = "png" if path.suffix == ".png" else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _curves(
    result: Result, folder: Path
) -> tuple[dict[str, dict[str, chart.Series]], list[tuple[str, str]]]:
    """The curves that can be read, and name and reason of those that cannot."""
    curves, unread = {}, []
    for curve in result.curves:
        path = _inside(folder, curve.file)
        try:
            curves[curve.name] = chart.read_curve(path)
        except FileNotFoundError:
            unread.append((curve.name, f"the file {curve.file} is missing"))
        except (ValueError, OSError) as error:
            unread.append((curve.name, f"the file {curve.file} cannot be read: {error}"))
    return curves, unread


def made_with(provenance: Provenance) -> list[tuple[str, str]]:
    """Name and text of everything that a page says of its provenance.

    Args:
        provenance: of a result.
    """
    return [
        ("Assay", provenance.assay),
        ("Commit", provenance.commit or "not from a checkout"),
        ("Python", provenance.python),
        *provenance.versions.items(),
        ("Platform", provenance.platform),
        ("Processor", f"{provenance.processor}, {provenance.cores} cores"),
        ("Threads", str(provenance.threads)),
        ("Device", provenance.device),
        ("Precision", provenance.precision),
        ("Started", f"{provenance.started:%Y-%m-%d %H:%M:%S %Z}".strip()),
        ("Took", numerals.duration(provenance.seconds)),
    ]


# -- the gallery -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A result in the gallery.

    Args:
        result: what to show.
        report: address of its report.
        thumbnail: address of its first figure, or None.
    """

    result: Result
    report: str
    thumbnail: str | None = None


def write_gallery(folders: Sequence[Path], output: Path) -> Path:
    """Write a static site over several runs: an index, and a report for each beside it.

    Args:
        folders: the runs' folders.
        output: folder of the site; made if need be.

    Returns:
        Path of `output/index.html`.

    Raises:
        FileNotFoundError: if a folder holds no `result.json`.
        ValueError: if there are no folders, or one holds something else than a result.

    Example:
        >>> from pathlib import Path
        >>> from assay.lab.report import write_gallery
        >>> write_gallery([], Path("site"))
        Traceback (most recent call last):
        ...
        ValueError: a gallery needs at least one result
    """
    if not folders:
        raise ValueError("a gallery needs at least one result")
    names: Counter[str] = Counter()
    entries = []
    for folder in folders:
        result = Result.read(folder / "result.json")
        name = file_name(f"{result.paper.slug}-{result.preset}").lower()
        names[name] += 1
        if names[name] > 1:
            name = f"{name}.{names[name]}"
        report = f"reports/{name}.html"
        write_atomically(output / report, render_report(result, folder, gallery="../index.html"))
        entries.append(Entry(result, report, _thumbnail(result, folder, output, name)))
    index = output / "index.html"
    write_atomically(index, render_gallery(entries))
    return index


def render_gallery(entries: Sequence[Entry]) -> str:
    """The gallery's index page: a table to search, filter and sort.

    Args:
        entries: results with the addresses of their reports.
    """
    ordered = sorted(entries, key=lambda e: (e.result.paper.topic, e.result.paper.title.lower()))
    claims = [claim for entry in entries for claim in entry.result.claims]
    return render_page(
        "gallery.html.j2",
        script="gallery.js",
        image_source="'self' file:",
        entries=ordered,
        claims=claims,
        papers=len({entry.result.paper.slug for entry in entries}),
        topics=sorted({entry.result.paper.topic for entry in entries}),
        presets=sorted({entry.result.preset for entry in entries}),
    )


def _thumbnail(result: Result, folder: Path, output: Path, name: str) -> str | None:
    """Copy the first figure into the gallery; None if there is none that is only a picture."""
    for figure in result.figures:
        path = _inside(folder, figure.file)
        if path.is_file() and is_passive(content := path.read_bytes()):
            write_atomically(output / "thumbnails" / f"{name}.svg", content)
            return f"thumbnails/{name}.svg"
    return None


def is_passive(svg: bytes) -> bool:
    """Whether an SVG file has no script, handler or link, so that even opened alone it is harmless.

    Args:
        svg: the file's content.

    Example:
        >>> is_passive(b"<svg><path d='M0 0'/></svg>"), is_passive(b"<svg onload='x()'/>")
        (True, False)
    """
    try:
        elements = list(ElementTree.fromstring(svg).iter())
    except ElementTree.ParseError:
        return False
    return all(
        _local(element.tag) not in ("script", "foreignobject", "iframe", "a", "set", "animate")
        and not any(_is_active(_local(name), value) for name, value in element.attrib.items())
        for element in elements
    )


def _local(name: str) -> str:
    return name.rpartition("}")[2].lower()


def _is_active(attribute: str, value: str) -> bool:
    is_reference = attribute in ("href", "src") and not value.startswith(("#", "data:image/"))
    return attribute.startswith("on") or is_reference


# -- templates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured for a claim, as text.

    Args:
        estimate: the figure.
        interval: its interval, or `""`.
        basis: what both rest on.
    """

    estimate: str
    interval: str
    basis: str


def measured(claim: ClaimResult) -> Measured | None:
    """Write a claim's estimate and interval with the digits that they need; None if not measured.

    Args:
        claim: with its measurements.
    """
    if claim.estimate is None:
        return None
    expect = claim.claim().expect
    if claim.interval is None:
        return Measured(numerals.number_beside(claim.estimate, expect, 6), "", claim.method)
    count = numerals.number(claim.n)
    if claim.method == "every value":
        middle, low, high = (
            numerals.number_beside(v, expect, 6) for v in (claim.estimate, *claim.interval)
        )
        span = "all equal" if low == high else f"range {low} to {high}"
        extreme = "largest" if expect is None else "worst"
        return Measured(middle, span, f"the {extreme} of {count} values")
    middle, low, high = numerals.estimate_and_interval(claim.estimate, claim.interval, expect)
    return Measured(middle, f"[{low}, {high}]", f"n = {count}, {claim.method}")


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else numerals.number(value)


def _columns(rows: Sequence[Mapping[str, Cell]]) -> list[tuple[str, bool]]:
    """Name of each column, in order of appearance, and whether it holds numbers alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    cells = {name: [row.get(name) for row in rows] for name in names}
    return [(name, all(_is_number_or_none(c) for c in cells[name])) for name in names]


def _is_number_or_none(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def _counts(claims: Sequence[ClaimResult]) -> dict[str, int]:
    found = Counter(claim.verdict for claim in claims)
    return {verdict: found[verdict] for verdict in VERDICTS}


def _web_address(url: str) -> str | None:
    """The address if a reader may be sent there."""
    try:
        return url if urlsplit(url).scheme in ("http", "https") else None
    except ValueError:
        return None


@cache
def _environment(package: str) -> Environment:
    packages = dict.fromkeys((package, "assay.lab"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=numerals.number,
        bound=lambda claim: numerals.bound_text(claim.claim().expect),
        duration=numerals.duration,
        measured=measured,
        strip=chart.strip,
        draw=chart.draw,
        cell=_cell,
        setting=_setting,
        columns=_columns,
        counts=_counts,
        web_address=_web_address,
    )
    environment.globals.update(chart=chart, verdicts=VERDICTS, max_values=MAX_VALUES)
    return environment


def _asset(environment: Environment, name: str) -> Markup:
    """A style sheet or script of the package, verbatim."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def render_page(
    template: str,
    *,
    script: str,
    image_source: str = "data:",
    package: str = "assay.lab",
    filters: Mapping[str, Callable] | None = None,
    **context: Any,
) -> str:
    """Render a template into a page that needs nothing beside it and runs its own script alone.

    Args:
        template: name of a template; it extends `base.html.j2`.
        script: name of its script, among the templates.
        image_source: where images may come from, as a content security policy says it.
        package: whose folder `templates` holds both; the lab's are found from everywhere.
        filters: further ones for the package's templates.
        context: for the template.
    """
    environment = _environment(package)
    environment.filters.update(filters or {})
    code = _asset(environment, script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        **context,
        style=_asset(environment, "style.css"),
        script=code,
        policy=(
            f"default-src 'none'; img-src {image_source}; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
    )
