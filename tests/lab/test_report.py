import base64
import hashlib
import re
import shlex
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

from assay.lab import Claim, Experiment, Result, UsageError, at_most
from assay.lab.report import (
    command_line,
    is_passive,
    measured,
    render_report,
    write_gallery,
    write_report,
)
from assay.lab.result import ClaimResult, Curve, Figure, Measurement, Table
from report_samples import CLAIMS, HOSTILE, PAPER, SVG, hostile, write_result

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements of a page with their texts; asserts that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += " ".join(data.split()) + " "

    def attributes(self, name: str) -> list[str]:
        return [a[name] or "" for _, a in self.elements if name in a]

    def tags(self, *names: str) -> list[dict[str, str | None]]:
        return [a for tag, a in self.elements if tag in names]


def assert_harmless(page: Page) -> None:
    assert len(page.tags("script")) == 1
    assert not page.tags("iframe", "object", "embed", "base", "link")
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert not [a for a in page.attributes("href") if a.lower().startswith("javascript")]


def assert_well_formed(page: Page) -> None:
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    targets = [h[1:] for h in page.attributes("href") if h.startswith("#")]
    targets += " ".join(page.attributes("aria-labelledby")).split()
    assert set(targets) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.tags("main")) == 1
    assert all("alt" in image for image in page.tags("img"))
    assert len(page.tags("caption")) == len(page.tags("table"))
    assert all("scope" in header for header in page.tags("th"))


@pytest.fixture
def folder(tmp_path):
    write_result(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def result(folder):
    return Result.read(folder)


def changed(result: Result, **values: Any) -> Result:
    return result.model_copy(update=values)


def test_a_report_shows_everything_that_was_found(folder, result):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert_well_formed(page)
    assert_harmless(page)
    text = page.text
    for claim in result.claims:
        assert claim.statement in text
        assert claim.paper in text
        assert claim.how in text
    assert {"holds", "fails", "inconclusive", "reported", "not run"} <= {
        c.verdict for c in result.claims
    }
    for expected in (
        PAPER.title, "Ľ. Horváth", "2019", "2 hold", "1 inconclusive", "1 exact claim fails",
        "1.037", "[0.998, 1.094]", "bootstrap interval of the median", "seed 4", "≤ 1.125",
        "Table 1: Ablations.", "0.9491", "Figure 2: time by bandwidth.", "gradient norm",
        "token bucket", "embedded", "workers", "4f1c2a9d", "4 min 44 s", "AMD EPYC", "2.13.0",
        "2026-03-14 15:09:26 UTC", "assay run sample-compression --preset small --seeds 5",
    ):  # fmt: skip
        assert expected in text
    assert PAPER.url in page.attributes("href")


def test_a_discussion_is_shown_unless_the_claim_holds(folder, result):
    text = Page(render_report(result, folder)).text
    assert "Packing costs as much time" in text
    expect = at_most(10)
    holding = Claim("faster", "Fast", expect=expect, discussion="Packing costs as much time")
    values = result.claims[4].measurements
    claim = ClaimResult.of(holding, values, "small")
    assert claim.verdict == "holds"
    text = Page(render_report(changed(result, claims=[claim]), folder)).text
    assert "Packing costs as much time" not in text


def test_the_page_loads_nothing(folder, result):
    page = Page(render_report(result, folder))
    sources = page.attributes("src")
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    svg = base64.b64decode(sources[0].partition(",")[2])
    assert svg == (folder / result.figures[0].file).read_bytes()
    html = render_report(result, folder)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_page_its_own_script_alone(folder, result):
    html = render_report(result, folder)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(html).tags("meta")[1]["content"]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(folder, result):
    series = f'step,series,value\n1,"{HOSTILE.replace(chr(34), chr(34) * 2)}",1.0\n'
    (folder / result.curves[0].file).write_text(series)
    document = hostile(result.model_dump(mode="json"))
    attacked = Result.model_validate(document)
    attacked.write(folder)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert_harmless(page)
    assert_well_formed(page)
    assert "{{7*7}}" in page.text
    assert not [h for h in page.attributes("href") if "pwned" in h]
    index = write_gallery([folder], folder.parent / "site")
    for path in (index, *index.parent.glob("reports/*.html")):
        page = Page(path.read_text(encoding="utf-8"))
        assert_harmless(page)
        assert_well_formed(page)


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "http://[", "file:///etc"]
)
def test_only_a_web_address_becomes_a_link(folder, result, url):
    paper = result.paper.model_copy(update={"url": url})
    page = Page(render_report(changed(result, paper=paper), folder))
    assert url not in page.attributes("href")
    assert url in page.text


@pytest.mark.parametrize(
    "name", ["../secret.svg", "/etc/passwd", "a/../../b", "link/x.svg", "a\0b"]
)
@pytest.mark.parametrize("field", ["figures", "curves"])
def test_a_file_outside_the_folder_is_refused(folder, result, name, field):
    (folder / "link").symlink_to(folder.parent)
    (folder.parent / "x.svg").write_text(SVG)
    entry = (
        Figure(name="f", caption="", file=name)
        if field == "figures"
        else Curve(name="c", file=name)
    )
    changed(result, **{field: [entry]}).write(folder)
    with pytest.raises(ValueError, match="outside its folder"):
        write_report(folder)
    with pytest.raises(ValueError, match="outside its folder"):
        write_gallery([folder], folder.parent / "site")
    assert not (folder / "report.html").exists()


def test_missing_files_are_told_and_the_rest_is_shown(folder, result):
    shutil.rmtree(folder / "figures")
    (folder / result.curves[0].file).unlink()
    (folder / result.curves[1].file).write_text("nonsense")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "figures/error-by-bits.svg of this figure is missing" in page.text
    assert (
        f"{result.curves[0].name} is not shown: the file {result.curves[0].file} is missing"
        in page.text
    )
    assert "cannot be read" in page.text
    assert "gradient norm" in page.text


def test_a_result_with_nothing_in_it_is_a_page(folder, result):
    bare = changed(
        result, claims=[], data=[], tables=[], figures=[], curves=[], notes=[], config={}
    )
    page = Page(render_report(bare, folder))
    assert_well_formed(page)
    assert "Figures" not in page.text


def test_there_is_no_report_without_a_result(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result of Assay"):
        write_report(tmp_path)


def test_diverged_figures_are_written_as_such(folder, result):
    claim = Claim("gap", "Small", expect=at_most(1))
    values = [Measurement(value=v, seed=s) for s, v in enumerate((float("inf"), 1.0, float("nan")))]
    judged = ClaimResult.of(claim, values, "small")
    changed(result, claims=[judged]).write(folder)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "∞" in text
    assert "NaN" in text


def test_cells_of_tables(folder, result):
    rows = [{"a": 0.123456, "b": None}, {"a": 12, "c": True, "d": "text"}]
    table = Table(name="T", caption="", rows=rows)
    page = Page(render_report(changed(result, tables=[table], data=[]), folder))
    start = page.text.index("Table 1: T.")
    text = " ".join(page.text[start:].split())
    assert text.startswith("Table 1: T. a b c d 0.1235 – – – 12 – yes text Notes")


@pytest.mark.parametrize(
    ("claim", "values", "expected"),
    [
        (
            CLAIMS[0],
            [1.0, 1.12500001],
            ("1.12500001", "range 1 to 1.12500001", "the worst of 2 values"),
        ),
        (CLAIMS[0], [1.0], ("1", "", "single value")),
        (CLAIMS[0], [1.0, 1.0], ("1", "all equal", "the worst of 2 values")),
        (CLAIMS[2], [0.0], ("0", "", "single value")),
        (CLAIMS[2], [], None),
    ],
)
def test_how_a_measurement_is_written(claim, values, expected):
    found = ClaimResult.of(claim, [Measurement(value=v) for v in values], "small")
    written = measured(found)
    assert expected == (written and (written.estimate, written.interval, written.basis))


def test_a_paper_claim_measured_below_scale_says_so(folder, result):
    values = [Measurement(value=v, seed=s) for s, v in enumerate((0.1, 0.2))]
    claim = ClaimResult.of(CLAIMS[-1], values, "small")
    text = Page(render_report(changed(result, claims=[claim]), folder)).text
    assert "below the paper’s scale" in text
    assert "0.15" in text


def experiment_with(config: Any) -> Experiment:
    module = ModuleType("sample")
    module.PAPER, module.PRESETS = PAPER, {"small": config}
    return Experiment(module)


def test_the_command_names_only_what_differs_from_the_preset(result, monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        data: str = "digits"
        workers: int = 2
        lr: float = 0.05
        sizes: tuple[int, ...] = (64, 16)
        momentum: float | None = 0.9

    experiment = experiment_with(Config())
    monkeypatch.setattr("assay.lab.report.find_experiment", lambda slug: experiment)
    words = shlex.split(command_line(result))
    settings = [word for flag, word in pairwise(words) if flag == "--set"]
    assert settings == ["workers=4", "sizes=64,32", "momentum=none"]
    overrides = dict(setting.split("=") for setting in settings)
    repeated = experiment.config("small", overrides)
    assert repeated == Config(workers=4, sizes=(64, 32), momentum=None)


def test_the_command_of_an_unknown_experiment_names_every_setting(result, monkeypatch):
    def unknown(slug):
        raise UsageError("unknown paper")

    monkeypatch.setattr("assay.lab.report.find_experiment", unknown)
    precise = result.provenance.model_copy(update={"precision": "bf16-mixed"})
    config = {"name": "a b; rm -rf /", "nesterov": True}
    words = shlex.split(command_line(changed(result, provenance=precise, config=config)))
    assert words == [
        "assay", "run", "sample-compression", "--preset", "small", "--seeds", "5",
        "--device", "cpu", "--precision", "bf16-mixed",
        "--set", "name=a b; rm -rf /", "--set", "nesterov=true",
    ]  # fmt: skip


def test_seeds_that_the_command_line_cannot_choose_are_told(folder, result):
    text = Page(render_report(changed(result, seeds=[3, 5]), folder)).text
    assert "run_experiment(…, seeds=[3, 5])" in text
    assert "run_experiment" not in Page(render_report(result, folder)).text


def test_a_gallery_links_a_report_and_a_thumbnail_for_each_run(tmp_path):
    for name in ("first", "second"):
        write_result(tmp_path / name)
    write_result(tmp_path / "smoke", preset="smoke", seeds=1)
    shutil.rmtree(tmp_path / "second" / "figures")
    index = write_gallery([tmp_path / n for n in ("first", "second", "smoke")], tmp_path / "site")
    assert index == tmp_path / "site" / "index.html"
    page = Page(index.read_text(encoding="utf-8"))
    assert_well_formed(page)
    reports = [h for h in page.attributes("href") if h.startswith("reports/")]
    assert sorted(reports) == [
        "reports/sample-compression-small.2.html",
        "reports/sample-compression-small.html",
        "reports/sample-compression-smoke.html",
    ]
    assert len(page.attributes("src")) == 2
    for address in reports + page.attributes("src"):
        assert (tmp_path / "site" / address).is_file()
    report = Page((tmp_path / "site" / reports[0]).read_text(encoding="utf-8"))
    assert "../index.html" in report.attributes("href")
    assert "3 results on 1 paper, 21 claims" in page.text


def test_a_gallery_writes_only_into_its_folder(tmp_path):
    result = write_result(tmp_path / "run")
    paper = result.paper.model_copy(update={"slug": "../../escape"})
    changed(result, paper=paper).write(tmp_path / "run")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    write_gallery([tmp_path / "run"], tmp_path / "a" / "b" / "site")
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert new
    assert all(p.is_relative_to(tmp_path / "a" / "b" / "site") for p in new)


def test_a_gallery_needs_a_result(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_gallery([], tmp_path)


@pytest.mark.parametrize(
    ("content", "passive"),
    [
        (SVG.format(colour="red", label="x").encode(), True),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', False),
        (b'<s:svg xmlns:s="http://www.w3.org/2000/svg"><s:SCRIPT/></s:svg>', False),
        (b'<svg><g onclick="x()"/></svg>', False),
        (
            b'<svg xmlns:xlink="http://www.w3.org/1999/xlink"><use xlink:href="http://x/y"/></svg>',
            False,
        ),
        (b'<svg><use href="#a"/></svg>', True),
        (b'<svg><a href="#a"/></svg>', False),
        (b"<svg><foreignObject/></svg>", False),
        (b"<svg>", False),
        (b"", False),
    ],
)
def test_what_makes_a_picture_active(content, passive):
    assert is_passive(content) is passive


def test_an_active_picture_is_no_thumbnail(tmp_path):
    result = write_result(tmp_path / "run")
    (tmp_path / "run" / result.figures[0].file).write_text("<svg><script>1</script></svg>")
    write_gallery([tmp_path / "run"], tmp_path / "site")
    (thumbnail,) = (tmp_path / "site" / "thumbnails").iterdir()
    assert b"script" not in thumbnail.read_bytes()  # the second figure takes its place
