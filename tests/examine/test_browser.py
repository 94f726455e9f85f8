"""The pages of examinations as a reader has them."""

import pytest
import torch
from torch import nn

from assay.examine import Comparison, Finding, Metric, Panel, Picture, examine, panel
from assay.examine.panel import forget
from assay.lab.figures import subplots
from browsing import LEAST_CONTRAST, OVERFLOW

pytestmark = pytest.mark.browser
ATTACK = "<img src=x onerror='document.title=1'><script>document.title = 1</script>"


class Net(nn.Linear):
    pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a comparison, and a report whose every text is an attack."""
    root = tmp_path_factory.mktemp("examinations")

    def made(model, data, budget, attack=""):
        figure, axes = subplots()
        axes.plot([0, 1], [0, 1])
        axes.set_title(attack)
        budget.note(f"Half of the samples. {attack}")
        return Panel(
            [
                Metric("long", f"A figure with a long name {attack}", 1234.5, f"On 100. {attack}",
                       f"Low is good, and this sentence is as long as they are. {attack}",
                       (1200.0, 1260.0), "samples", "low"),
                Metric("exact", "An exact one", float("nan"), "Counted.", "Just so."),
            ],
            f"How to read this panel, in a sentence or two. {attack}",
            f"How it was measured. {attack}",
            {f"Somebody (2020) {attack}": "javascript:alert(1)" if attack else "https://a.org"},
            [Picture("line", figure, f"A line. {attack}")],
            {f"Rows {attack}": [{"layer": f"conv{i} {attack}", "width": i / 3} for i in range(20)]},
            [Finding(f"Layer 3 is dead. {attack}", f"No gradient. {attack}", 0.9),
             Finding("Look here.", "It may matter.", 0.5), Finding("Know this.", "Why.", 0.1)],
        )  # fmt: skip

    def raising(model, data, budget):
        raise RuntimeError(f"no good {ATTACK}")

    panel("made", title="Made up", order=1)(made)
    panel("raising", title="Raising", order=2)(raising)
    panel("attacked", title=f"Attacked {ATTACK}", order=3)(
        lambda model, data, budget: made(model, data, budget, ATTACK)
    )
    data = {"train": (torch.randn(30, 4), torch.arange(30) % 3), "name": "made",
            "classes": [ATTACK, "b", "c"]}  # fmt: skip
    found = {}
    for name, names in {"report": ["made", "raising"], "hostile": ["attacked", "raising"]}.items():
        examine(Net(4, 3), data, panels=names, budget=20, output=root / name,
                fail_if=["made.long > 3", "raising.x > 1"] if name == "report" else [])  # fmt: skip
        found[name] = (root / name / "report.html").as_uri()
    two = Comparison([root / "report", root / "report"], ["one", "two"])
    found["comparison"] = two.write(root / "comparison.html").as_uri()
    for name in ("made", "raising", "attacked"):
        forget(name)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_text_is_legible(open_page, pages, name, scheme):
    page = open_page(pages[name], color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("e => { e.open = true }")
    contrast, text = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, text


@pytest.mark.parametrize("name", ["report", "comparison", "hostile"])
def test_a_phone_scrolls_one_way(open_page, pages, name):
    page = open_page(pages[name], viewport={"width": 360, "height": 740})
    assert page.evaluate(OVERFLOW) <= 0


def test_the_summary_comes_first_and_figures_are_seen(open_page, pages):
    page = open_page(pages["report"])
    found = page.locator(".findings .found").all_inner_texts()
    assert [text.split()[0] for text in found] == ["act", "look", "know"]
    image = page.locator("figure img")
    assert image.evaluate("e => e.complete && e.naturalWidth > 0")
    assert page.locator("p.missing", has_text="RuntimeError: no good").is_visible()
    gates = page.locator(".gates li").all_inner_texts()
    assert gates[0].startswith("failed")
    assert gates[1].startswith("undecided")
    page.get_by_role("link", name="Provenance").click()
    assert page.locator("h2:target").inner_text() == "Provenance"


def test_what_a_report_says_is_never_executed(open_page, pages):
    page = open_page(pages["hostile"])
    assert page.title() == "Net on made · Assay"
    assert page.locator("main script, main img[src=x], a[href^=javascript]").count() == 0
    assert page.get_by_text("<script>").count() > 5
