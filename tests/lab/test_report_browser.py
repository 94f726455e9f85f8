"""The pages as a reader has them: opened from disk in a browser, with mouse, keyboard and phone."""

import dataclasses
from pathlib import Path

import pytest

from assay.lab import Result
from assay.lab.report import write_gallery, write_report
from browsing import LEAST_CONTRAST, OVERFLOW
from report_samples import HOSTILE, PAPER, hostile, write_result

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
AMSGRAD = dataclasses.replace(
    PAPER,
    slug="sample-amsgrad",
    title="On the Convergence of Adam and Beyond",
    topic="optim",
    year=2018,
)
DROPOUT = dataclasses.replace(
    PAPER, slug="sample-dropout", title="Dropout as a Bayesian Approximation", topic="uncertainty",
    year=2016,
)  # fmt: skip

FOCUSED = "document.activeElement.closest('th')?.dataset.key ?? document.activeElement.name ?? ''"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of a report, a gallery, and the same of a hostile result."""
    root = tmp_path_factory.mktemp("reports")
    folders = [root / name for name in ("compression", "amsgrad", "dropout")]
    for folder, paper, preset, seeds in zip(
        folders, (PAPER, AMSGRAD, DROPOUT), ("small", "small", "smoke"), (5, 3, 1), strict=True
    ):
        write_result(folder, paper, preset, seeds)
    attacked = root / "attacked"
    result = write_result(attacked)
    Result.model_validate(hostile(result.model_dump(mode="json"))).write(attacked)
    for figure in result.figures:
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' onload='parent.pwned=1'>{HOSTILE}</svg>"
        (attacked / figure.file).write_text(svg)
    found = {
        "report": write_report(folders[0]),
        "gallery": write_gallery(folders, root / "site"),
        "hostile report": write_report(attacked),
        "hostile gallery": write_gallery([attacked], root / "hostile"),
    }
    return {name: Path(path).as_uri() for name, path in found.items()}


@pytest.fixture
def visit(open_page, pages):
    """Open a page by its name here, or by its address."""
    return lambda name, **options: open_page(pages.get(name, name), **options)


def titles(page):
    return page.locator("#results tbody tr:visible a").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "gallery"])
def test_every_text_is_legible(visit, name, scheme):
    page = visit(name, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("e => { e.open = true }")
    contrast, text = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_verdicts_figures_and_curves_are_seen(visit):
    page = visit("report")
    badges = page.locator(".claims .verdict")
    assert badges.all_inner_texts() == [
        "holds", "fails", "holds", "inconclusive", "fails", "reported", "not run",
    ]  # fmt: skip
    for badge in badges.all():
        assert badge.is_visible()
        assert badge.locator("svg").bounding_box()["width"] > 5  # a sign beside the word
    images = page.locator("figure img")
    assert images.count() == 2
    assert images.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 100)")
    assert page.locator("svg.plot:visible").count() == 3
    values = page.get_by_text("seed 4 0.0011")
    assert not values.is_visible()
    page.locator("summary").nth(2).click()
    assert values.is_visible()


def test_the_log_scale_is_switched_by_keyboard(visit):
    page = visit("report")
    button = page.get_by_role("button", name="Logarithmic scale for loss")
    plots = page.locator("figure.panel").first.locator("svg.plot")
    assert [p.is_visible() for p in plots.all()] == [True, False]
    button.focus()
    page.keyboard.press("Enter")
    assert [p.is_visible() for p in plots.all()] == [False, True]
    assert button.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("name", ["report", "gallery", "hostile report", "hostile gallery"])
def test_no_width_makes_the_page_scroll_sideways(visit, name):
    page = visit(name)
    for width in (320, 360, 600, 870, 1070, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate(OVERFLOW) <= 0, width


def test_a_wide_table_scrolls_by_keyboard_in_its_own_frame(visit):
    page = visit("report", viewport={"width": 360, "height": 700})
    frame = page.locator(".scroll").first
    assert frame.evaluate("e => e.scrollWidth > e.clientWidth")
    frame.focus()
    frame.evaluate("e => { e.onscroll = () => { e.dataset.scrolled = 'yes' } }")
    page.keyboard.press("ArrowRight")
    sync_api.expect(frame).to_have_attribute("data-scrolled", "yes")


def test_nothing_hostile_runs(visit):
    for name, title in (("hostile report", "h1"), ("hostile gallery", ".paper")):
        page = visit(name)
        assert page.evaluate("window.pwned") is None
        assert "<script>window.pwned=1</script>" in page.inner_text(title)


def test_the_gallery_filters_and_keeps_its_state_in_the_address(visit):
    page = visit("gallery")
    assert titles(page) == [PAPER.title, AMSGRAD.title, DROPOUT.title]
    assert page.inner_text("#count") == "3 of 3 shown"
    page.get_by_label("Search").fill("adam BEYOND")
    assert titles(page) == [AMSGRAD.title]
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Preset").select_option("smoke")
    assert titles(page) == [DROPOUT.title]
    page.get_by_label("Topic").select_option("optim")
    assert titles(page) == []
    assert page.get_by_text("No result matches.").is_visible()
    page.get_by_label("Preset").select_option("")
    page.get_by_role("combobox", name="Verdict").select_option("not run")
    page.get_by_role("button", name="Year").click()
    address = page.url
    again = visit(address)
    assert titles(again) == [AMSGRAD.title]
    assert again.get_by_label("Topic").input_value() == "optim"
    assert again.locator("th[aria-sort=descending]").get_attribute("data-key") == "year"
    again.evaluate("location.hash = '#verdict=nonsense&sort=nonsense&q=dropout'")
    sync_api.expect(again.locator("#count")).to_have_text("1 of 3 shown")
    assert titles(again) == [DROPOUT.title]
    assert again.get_by_role("combobox", name="Verdict").input_value() == ""


def test_the_keyboard_reaches_and_sorts(visit):
    page = visit("gallery")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
        if reached[-1] == "year":
            break
    assert reached == ["q", "topic", "verdict", "preset", "", "title", "topic", "year"]
    page.keyboard.press("Enter")
    assert titles(page) == [PAPER.title, AMSGRAD.title, DROPOUT.title]
    assert page.locator("th[data-key=year]").first.get_attribute("aria-sort") == "descending"
    assert page.locator("[aria-sort]").count() == 1
    page.keyboard.press("Enter")
    assert titles(page) == [DROPOUT.title, AMSGRAD.title, PAPER.title]
    assert page.evaluate(FOCUSED) == "year"


def test_the_gallery_leads_to_a_report_and_back(visit):
    page = visit("gallery")
    assert page.locator("#results img").first.evaluate("i => i.decode().then(() => i.naturalWidth)")
    page.get_by_role("link", name=AMSGRAD.title).click()
    assert page.inner_text("h1") == AMSGRAD.title
    page.get_by_role("link", name="All results").click()
    assert page.locator("#results").is_visible()


def test_the_pages_are_complete_without_scripts(visit):
    page = visit("gallery", java_script_enabled=False)
    assert len(titles(page)) == 3
    assert not page.locator("#filters").is_visible()
    page = visit("report", java_script_enabled=False)
    assert page.locator("svg.plot:visible").count() == 3
