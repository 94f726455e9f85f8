"""The part of the site that is made from the code and the results: pages, tables, navigation.

A hand-written page asks for a generated part with a line `<!-- generate: NAME -->`; the names are
the keys of `PARTS`.
"""

import json
import re
from pathlib import Path
from typing import Any

import cards
import examined
import reference
import tables
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from assay.examine import Report
from assay.lab import all_experiments
from assay.lab.report import write_gallery
from assay.lab.result import Result

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^<!-- generate: ([a-z-]+)(?: ([\w.-]+))? -->$", re.MULTILINE)
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

PARTS = {
    "papers": lambda _: cards.papers_index(),
    "results": lambda _: cards.results_gallery(cards.ledger(ROOT / "results")),
    "first-result": lambda slug: cards.short_claims_table(slug, ROOT / "results"),
    "topic-papers": lambda topic: cards.papers_of(topic, cards.ledger(ROOT / "results")),
    "topics": lambda _: reference.topics_index(),
    "reference": lambda name: reference.api(name),
    "data-sets": lambda _: tables.data_sets(),
    "dependencies": lambda _: tables.dependencies(ROOT),
    "command-line": lambda _: tables.command_line(),
    "result-fields": lambda _: tables.result_fields(),
    "report-fields": lambda _: tables.report_fields(),
    "panels": lambda _: tables.panels(),
    "examined": lambda name: examined.part(name),
    "benchmark-fields": lambda _: tables.benchmark_fields(),
    "benchmarks": lambda _: tables.benchmarks(ROOT / "results" / "benchmarks.json"),
    "network": lambda _: tables.network(ROOT / "results" / "network.json"),
}


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    by_topic: dict[str, list[dict[str, str]]] = {}
    for experiment in all_experiments():
        slug = experiment.paper.slug
        by_topic.setdefault(experiment.paper.topic, []).append({slug: f"papers/{slug}.md"})
    sections: dict[str, list[Any]] = {
        "Papers": [{f"assay.{topic}": by_topic[topic]} for topic in sorted(by_topic)],
        "Components": [{f"assay.{name}": page} for name, page in reference.pages().items()],
    }
    for entry in config.nav:
        for title, items in entry.items():
            if title in sections:
                items.extend(item for item in sections[title] if item not in items)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page a paper with its figures, a page a package without one, and the schema."""
    for experiment in all_experiments():
        slug = experiment.paper.slug
        folder = ROOT / "results" / f"{slug}-small"
        result = Result.read(folder) if (folder / "result.json").exists() else None
        _add(files, config, f"papers/{slug}.md", cards.card(experiment, result))
        for figure in result.figures if result else ():
            name = f"papers/{slug}/{figure.file}"
            files.append(File.generated(config, name, abs_src_path=str(folder / figure.file)))
    for name, page in reference.pages().items():
        if files.get_file_from_path(page) is None:
            _add(files, config, page, reference.page(name))
    for address, path in examined.figures():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    for page, source in COPIED.items():
        _add(files, config, page, (ROOT / source).read_text(encoding="utf-8"))
    schema = json.dumps(Result.model_json_schema(), indent=1)
    _add(files, config, "schemas/result-v1.json", schema)
    schema = json.dumps(Report.model_json_schema(), indent=1)
    _add(files, config, "schemas/report-v1.json", schema)
    return files


def _add(files: Files, config: Any, name: str, content: str) -> None:
    files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of a page."""

    def part(match: re.Match[str]) -> str:
        name, argument = match.groups()
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise PluginError(f"{page.file.src_uri} wants {name!r}; there are: {known}")
        return PARTS[name](argument)

    made = MARKER.sub(part, markdown)
    if "<!-- generate:" in made:
        raise PluginError(f"{page.file.src_uri} has a marker that is not alone on its line")
    return made


def on_post_build(config: Any) -> None:
    """Write the full reports beside the pages."""
    examined.write_page(Path(config.site_dir))
    folders = [path.parent for path in sorted((ROOT / "results").glob("*-small/result.json"))]
    if folders:
        write_gallery(folders, Path(config.site_dir) / "gallery")
