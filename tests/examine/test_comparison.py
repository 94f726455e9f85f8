"""Examinations side by side: what is called better, and what is said where a figure is missing."""

import pytest
import torch
from torch import nn

from assay.examine import Comparison, Metric, Panel, Report, examine, panel
from assay.examine.comparison import _best
from assay.examine.panel import Picture, forget
from assay.examine.report import MetricRecord
from assay.lab import UsageError
from assay.lab.figures import subplots

DATA = {"train": (torch.randn(30, 4), torch.arange(30) % 3), "name": "made"}


@pytest.fixture(autouse=True)
def width():
    """A panel whose figure is the number of weights, with an interval, and only for big models."""

    @panel("width", title="Width", order=5)
    def width(model, data, budget):
        count = float(sum(p.numel() for p in model.parameters()))
        metrics = [
            Metric("count", "Count", count, "counted", "More is better.", (count - 2, count + 2),
                   better="high"),
            Metric("plain", "Plain", count, "counted", "Neither."),
        ]  # fmt: skip
        if count > 14:
            metrics.append(Metric("extra", "Extra", 1.0, "counted", "Only some have it."))
        return Panel(metrics, "Read it.", "Counted.")

    yield
    forget("width")


def report(model, tmp_path, name):
    return examine(model, DATA, panels=["width"], budget=5, output=tmp_path / name)


def test_better_is_said_only_beyond_the_intervals(tmp_path):
    small, big = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    comparison = Comparison([report(small, tmp_path, "a"), report(big, tmp_path, "b")])
    count, plain, extra = comparison.rows("width")
    assert [cell.best for cell in count.cells] == [False, False]  # 12 ± 2 and 15 ± 2
    assert [cell.best for cell in plain.cells] == [False, False]  # neither direction is better
    assert [cell.missing for cell in extra.cells] == [True, False]
    assert extra.cells[0].value == "not measured"
    wide = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
    again = Comparison([report(small, tmp_path, "c"), report(wide, tmp_path, "d")])
    assert [cell.best for cell in again.rows("width")[0].cells] == [False, True]


def metric(value, half, better):
    return MetricRecord(name="m", label="M", value=value, interval=(value - half, value + half),
                        better=better, method="", reading="")  # fmt: skip


def test_the_best_of_three():
    assert _best([metric(1, 0.1, "low"), metric(2, 0.1, "low"), metric(3, 3, "low")], "low") is None
    assert _best([metric(1, 0.1, "low"), metric(2, 0.1, "low"), None], "low") == 0
    assert (
        _best([metric(1, 0.1, "high"), metric(2, 0.1, "high"), metric(4, 1, "high")], "high") == 2
    )
    assert _best([metric(1, 0.1, "high"), None], "high") is None


def test_nothing_is_better_on_other_samples(tmp_path):
    small, wide = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
    one = report(small, tmp_path, "a")
    other = examine(wide, DATA, panels=["width"], budget=5, seed=1, output=tmp_path / "b")
    comparison = Comparison([one, other])
    assert [cell.best for cell in comparison.rows("width")[0].cells] == [False, False]
    assert any("No figure is called better" in said for said in comparison.warnings)
    assert comparison.rows("width")[0].values == (15.0, 75.0)
    assert comparison.rows("width")[2].intervals == (None, None)


def test_each_figure_keeps_its_own_caption_where_they_differ(tmp_path):
    @panel("width", title="Width", order=5)
    def width(model, data, budget):
        figure, axes = subplots()
        axes.plot([0, 1])
        count = sum(p.numel() for p in model.parameters())
        same = Picture("same", figure, "What both say.")
        return Panel([], "Read it.", "Drawn.", figures=[same, Picture("own", figure, f"{count} x")])

    models = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3, bias=False)}
    pages = [report(model, tmp_path, name) for name, model in models.items()]
    page = Comparison(pages, ["one", "two"]).to_html()
    assert page.count("<figcaption>What both say.</figcaption>") == 1
    assert page.count('<p class="caption">15 x</p>') == page.count('class="caption">12 x</p>') == 1


def test_names_come_from_models_or_folders(tmp_path):
    one, two = report(nn.Linear(4, 3), tmp_path, "a"), report(nn.Linear(4, 3), tmp_path, "b")
    assert Comparison([one, two]).names == ("a", "b")
    assert Comparison([tmp_path / "a", tmp_path / "b" / "report.json"], ["x", "y"]).names == (
        "x",
        "y",
    )
    other = report(nn.Sequential(nn.Linear(4, 3)), tmp_path, "c")
    assert Comparison([one, other]).names == ("Linear", "Sequential")


def test_what_cannot_be_compared_is_said(tmp_path):
    one = report(nn.Linear(4, 3), tmp_path, "a")
    with pytest.raises(UsageError, match="two reports"):
        Comparison([one])
    with pytest.raises(UsageError, match="1 names for 2"):
        Comparison([one, one], ["x"])
    with pytest.raises(FileNotFoundError):
        Comparison([one, tmp_path / "absent"])
    (tmp_path / "report.json").write_text('{"schema_version": 9}')
    with pytest.raises(ValueError, match="schema_version is 9"):
        Comparison([one, tmp_path])
    other = examine(nn.Linear(4, 3), {**DATA, "name": "other"}, panels=["width"], budget=9)
    assert len(Comparison([one, other]).warnings) == 3  # data, budget, nothing better


def test_the_page_escapes_what_a_report_says(tmp_path):
    one = report(nn.Linear(4, 3), tmp_path, "a")
    attack = "<script>alert(1)</script>"
    evil = Report.model_validate({**one.model_dump(), "model": attack})
    page = Comparison([one, evil]).to_html()
    assert attack not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<iframe srcdoc=" in Comparison([one, evil])._repr_html_()
