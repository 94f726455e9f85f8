"""Method cards and lists of papers, as Markdown, from experiments and their results."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import reference

from assay.lab import Claim, Experiment, Result, all_experiments
from assay.lab.numerals import bound_text, duration, number
from assay.lab.report import VERDICTS, measured
from assay.lab.result import ClaimResult

NOT_MEASURED = "not measured yet"


def text(plain: str) -> str:
    """Plain text as Markdown that shows it as it is; code in backticks stays code."""
    parts = re.split(r"(`[^`]+`)", plain.strip())
    for index in range(0, len(parts), 2):
        escaped = parts[index].replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        parts[index] = re.sub(r"([\\`*_\[\]])", r"\\\1", escaped)
    for index in range(1, len(parts), 2):
        parts[index] = parts[index].replace("|", "\\|")
    return "".join(parts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.split("\n")) or " " for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def badge(verdict: str, count: int | None = None) -> str:
    """A verdict, coloured; optionally with how many claims have it."""
    label = verdict if count is None else f"{count} {verdict}"
    return f'<span class="verdict {verdict.replace(" ", "-")}">{label}</span>'


def ledger(results: Path) -> dict[str, Result]:
    """The committed `small` results by slug."""
    found = {}
    for path in sorted(results.glob("*-small/result.json")):
        result = Result.read(path)
        found[result.paper.slug] = result
    return found


def verdict_counts(claims: Sequence[ClaimResult]) -> str:
    """How many claims have which verdict."""
    counts = Counter(claim.verdict for claim in claims)
    return " ".join(badge(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict])


def figure_measured(claim: ClaimResult) -> str:
    """What was measured for a claim, with its interval and what both rest on."""
    found = measured(claim)
    if found is None:
        return "–"
    unit = f" {claim.unit}" if claim.unit else ""
    joint = " " if found.interval.startswith("[") else ", "
    interval = f"{joint}{found.interval}" if found.interval else ""
    return text(f"{found.estimate}{unit}{interval}") + f"<br><small>{text(found.basis)}</small>"


def claims_table(claims: Sequence[Claim], result: Result | None) -> str:
    """Claim, paper's figure, bound, measurement, verdict."""
    found = {claim.id: claim for claim in result.claims} if result else {}
    rows = []
    for claim in claims:
        judged = found.get(claim.id)
        rows.append(
            (
                text(claim.statement),
                claim.kind,
                text(claim.paper) or "–",
                bound_text(claim.expect).replace(" ", "\u00a0") or "none",
                figure_measured(judged) if judged else "–",
                badge(judged.verdict if judged else NOT_MEASURED),
            )
        )
    return table(("Claim", "Kind", "Paper", "Bound", "Measured here", "Verdict"), rows)


# -- one page a paper --------------------------------------------------------------------------


def card(experiment: Experiment, result: Result | None) -> str:
    """The page of a paper.

    Args:
        experiment: the evidence.
        result: its committed `small` result, or None if it has not been measured yet.
    """
    paper = experiment.paper
    sections = [
        f"# {text(paper.title)}\n\n{text(', '.join(paper.authors))} · {paper.year} · "
        f"[{paper.url.removeprefix('https://')}]({paper.url})\n\n{text(paper.summary)}",
        _components(paper.components),
        _claims(experiment, result),
        _how_to_run(paper.slug),
        _figures(result) if result else "",
        _tables(result) if result else "",
        _settings(experiment),
        _limits(experiment, result),
        _origin(result) if result else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _components(names: Sequence[str]) -> str:
    if not names:
        return ""
    lines = [f"- {reference.link(name)} — {text(reference.summary(name))}" for name in names]
    return "## In your own code\n\n" + "\n".join(lines)


def _claims(experiment: Experiment, result: Result | None) -> str:
    parts = ["## Claims"]
    if result is None:
        parts.append(f"This paper is {NOT_MEASURED}: there is no committed result of it.")
    parts.append(claims_table(experiment.claims, result))
    parts.append("[What kinds, bounds and verdicts mean](../claims.md).")
    hows = [f"    - *{text(c.statement)}*: {text(c.how)}" for c in experiment.claims if c.how]
    if hows:
        parts.append('??? note "How each is measured"\n\n' + "\n".join(hows))
    if result is not None:
        parts.append(_discussions(experiment, result))
    return "\n\n".join(part for part in parts if part)


def _discussions(experiment: Experiment, result: Result) -> str:
    # An explanation is written after the measurement, so the code may know more than the result.
    written = {claim.id: claim.discussion for claim in experiment.claims}
    open_claims = [c for c in result.claims if c.verdict in ("fails", "inconclusive")]
    if not open_claims:
        return ""
    items = []
    for claim in open_claims:
        explanation = text(written.get(claim.id) or claim.discussion) or "Not explained yet."
        items.append(f"{badge(claim.verdict)} **{text(claim.statement)}**\n\n{explanation}")
    return "### What does not hold here\n\n" + "\n\n".join(items)


def _how_to_run(slug: str) -> str:
    return (
        "## Run it\n\n```console\n"
        f"$ assay run {slug}                 # small: minutes on two cores\n"
        f"$ assay run {slug} --preset smoke  # seconds\n"
        f"$ assay run {slug} --preset paper  # the paper's own scale\n```"
    )


def _figures(result: Result) -> str:
    if not result.figures:
        return ""
    items = []
    for figure in result.figures:
        caption = text(figure.caption) or text(figure.name)
        items.append(
            f'<figure markdown="span">\n'
            f"![{caption}]({result.paper.slug}/{figure.file}){{ loading=lazy }}\n"
            f"<figcaption>{caption}</figcaption>\n</figure>"
        )
    return "## Figures\n\n" + "\n\n".join(items)


def _tables(result: Result) -> str:
    items = []
    for entry in result.tables:
        columns = list(dict.fromkeys(key for row in entry.rows for key in row))
        rows = [[_cell(row.get(column)) for column in columns] for row in entry.rows]
        body = table([text(column) for column in columns], rows)
        items.append(f"### {text(entry.name)}\n\n{text(entry.caption)}\n\n{body}")
    return "## Further figures measured\n\n" + "\n\n".join(items) if items else ""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return text(str(value))
    return number(value)


def _settings(experiment: Experiment) -> str:
    presets = experiment.presets
    first = next(iter(presets.values()))
    meaning = reference.described(type(first))
    rows = []
    for field in dataclasses.fields(first):
        values = [_setting(getattr(config, field.name)) for config in presets.values()]
        rows.append([f"`{field.name}`", *values, text(meaning.get(field.name, ""))])
    seeds = [str(experiment.seeds(preset)) for preset in presets]
    rows.append(["seeds (`--seeds`)", *seeds, "for the claims over seeds"])
    body = table(("Setting", *presets, "What"), rows)
    return f"## Settings\n\nChange one with `--set field=value`.\n\n{body}"


def _setting(value: Any) -> str:
    return text(", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _limits(experiment: Experiment, result: Result | None) -> str:
    items = []
    out_of_scale = [text(c.statement) for c in experiment.claims if c.kind == "paper"]
    if out_of_scale:
        items.append(
            "Only `--preset paper` measures, with the data and the hardware it takes: "
            + "; ".join(out_of_scale)
            + "."
        )
    if result is not None:
        items += [text(note) for note in result.notes]
        items += [
            f"Data: {data.name}, {data.split}, {data.samples:,} examples; {text(data.source)}."
            for data in result.data
        ]
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items) if items else ""


def _origin(result: Result) -> str:
    made = result.provenance
    seeds = ", ".join(map(str, result.seeds))
    return (
        f"## Where this was measured\n\nPreset {result.preset}, seeds {seeds}, "
        f"{duration(made.seconds)} on {text(made.processor)} ({made.threads} threads, device "
        f"{made.device}), Assay {made.assay}, torch {made.versions['torch']}, Python "
        f"{made.python}, {made.started:%Y-%m-%d}."
        + (" It was not run on GPU here." if made.device == "cpu" else "")
        + f'\n\n<a href="../gallery/reports/{result.paper.slug}-small.html">The whole report</a>'
        " has every value, the learning curves and the versions."
    )


# -- lists -------------------------------------------------------------------------------------


def papers_index() -> str:
    """All papers, by topic."""
    by_topic: dict[str, list[Experiment]] = {}
    for experiment in all_experiments():
        by_topic.setdefault(experiment.paper.topic, []).append(experiment)
    parts = []
    for topic in sorted(by_topic):
        parts.append(f"## assay.{topic}\n")
        parts += [_entry(experiment, "") for experiment in by_topic[topic]]
        parts.append("")
    return "\n".join(parts)


def papers_of(topic: str, results: dict[str, Result]) -> str:
    """The papers of a topic, with their verdicts."""
    lines = []
    for experiment in all_experiments():
        paper = experiment.paper
        if paper.topic == topic:
            result = results.get(paper.slug)
            verdicts = verdict_counts(result.claims) if result else badge(NOT_MEASURED)
            lines.append(f"{_entry(experiment, '../papers/')} {verdicts}")
    return "\n".join(lines) or "No paper of this topic is in yet."


def _entry(experiment: Experiment, folder: str) -> str:
    paper = experiment.paper
    authors = paper.authors[0] if len(paper.authors) == 1 else f"{paper.authors[0]} et al."
    return (
        f"- [{text(paper.title)}]({folder}{paper.slug}.md) "
        f"({text(authors)}, {paper.year}). {text(paper.summary)}"
    )


def results_gallery(results: dict[str, Result]) -> str:
    """A row a paper with its counts of verdicts, and the total."""
    rows, every = [], []
    for experiment in all_experiments():
        paper = experiment.paper
        result = results.get(paper.slug)
        link = f"[`{paper.slug}`](papers/{paper.slug}.md)"
        if result is None:
            rows.append((link, paper.topic, badge(NOT_MEASURED), "–", "–", "–"))
            continue
        every += result.claims
        made = result.provenance
        seeds, when = str(len(result.seeds)), f"`{made.started:%Y-%m-%d}`"
        counts = verdict_counts(result.claims)
        rows.append((link, paper.topic, counts, seeds, duration(made.seconds), when))
    body = table(("Paper", "Topic", "Verdicts of its claims", "Seeds", "Time", "Measured"), rows)
    if not every:
        return body
    total = f"In all, {len(every)} claims: {verdict_counts(every)}"
    gallery = '<a href="gallery/index.html">The same with thumbnails, filters and full reports</a>'
    return f"{total}\n\n{body}\n\n{gallery}."


def short_claims_table(slug: str, results: Path) -> str:
    """Some claims of one committed result: the first of each kind and verdict."""
    found = ledger(results).get(slug)
    if found is None:
        return f"*The committed result of {slug} is {NOT_MEASURED}.*"
    some: dict[tuple[str, str], Claim] = {}
    for claim in found.claims:
        some.setdefault((claim.kind, claim.verdict), claim.claim())
    return (
        f"{claims_table(list(some.values()), found)}\n\n"
        f"{len(some)} of its {len(found.claims)} claims ([all of them](papers/{slug}.md)): "
        f"{verdict_counts(found.claims)}"
    )
