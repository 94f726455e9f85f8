"""What the documentation shows is true: its code runs, its commands exist, its cards build."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer

from assay.cli import app
from assay.examine.panel import forget
from assay.lab import Experiment, find_experiment, run_experiment, slugs

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    found = []
    for indent, language, content in FENCE.findall(page.read_text(encoding="utf-8")):
        lines = [line.removeprefix(indent) for line in content.splitlines()]
        found.append((language, "\n".join(lines)))
    return found


def shape(output: str) -> str:
    """Printed text without what another machine or version may print differently."""
    return re.sub(r"[\d.]*\d", "#", output).strip()


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for language, content in blocks(ROOT / "docs/tutorial.md"):
            if language == "python":
                exec(compile(content, "tutorial.md", "exec"), names)
                printed = capsys.readouterr().out
            elif language == "text":
                assert shape(printed) == shape(content)
    assert Path(str(names["report"])).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_page_on_examining_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    try:
        with torch.random.fork_rng():
            for language, content in blocks(ROOT / "docs/examine.md"):
                if language == "python":
                    exec(compile(content, "examine.md", "exec"), names)
                    printed = capsys.readouterr().out
                elif language == "text":
                    assert printed == content + "\n"
    finally:
        forget("sparsity")


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/data.md"])
def test_the_code_of_a_page_runs(name, one_process):
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        code = [content for language, content in blocks(ROOT / name) if language == "python"]
        assert code
        for content in code:
            exec(compile(content, name, "exec"), names)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/topics/*.md")), ids=lambda p: p.stem)
def test_the_code_of_a_topic_runs(page, one_process):
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for language, content in blocks(page):
            if language == "python":
                exec(compile(content, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_exist(page):
    group = typer.main.get_command(app)
    context = typer.Context(group)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for language, content in blocks(page):
        for line in content.splitlines() if language == "console" else ():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if words[0] == "make":
                assert set(words[1:]) <= set(targets), line
            elif words[0] == "assay":
                command = group.get_command(context, words[1])
                assert command is not None, line
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                assert {word for word in words if word.startswith("-")} <= known, line
                settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
                for name in (setting.partition("=")[0] for setting in settings):
                    assert hasattr(find_experiment(words[2]).config("small"), name), line


def test_the_paper_in_the_guide_is_one(tmp_path):
    [code] = [c for language, c in blocks(ROOT / "CONTRIBUTING.md") if language == "python"]
    module = type(sys)("assay.experiments.my_method")
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    result = run_experiment(Experiment(module), preset="smoke", directory=tmp_path)
    assert [claim.verdict for claim in result.claims] == ["holds", "inconclusive"]


@pytest.fixture
def cards(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/hooks"))
    import cards

    return cards


@pytest.mark.parametrize("slug", slugs())
def test_a_paper_without_a_result_has_a_card(cards, slug):
    experiment = find_experiment(slug)
    page = cards.card(experiment, None)
    assert "not measured yet" in page
    for claim in experiment.claims:
        assert cards.text(claim.statement) in page


def test_a_card_shows_what_was_measured_and_discusses_what_fails(cards, tmp_path):
    import lab.demo_experiment as module

    experiment = Experiment(module)
    result = run_experiment(experiment, preset="smoke", directory=tmp_path)
    page = cards.card(experiment, result)
    assert page.count('class="verdict holds"') == sum(c.verdict == "holds" for c in result.claims)
    assert "What does not hold here" in page  # one seed is inconclusive
    assert "A note." in page
    assert "It was not run on GPU here." in page


def test_plain_text_stays_plain_in_markdown(cards):
    assert cards.text("a_b * |x| < 2 in `f(*x)`") == r"a\_b \* &#124;x&#124; &lt; 2 in `f(*x)`"
