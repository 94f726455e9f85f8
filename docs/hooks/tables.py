"""Tables of the reference pages, as Markdown, from the code that they describe."""

import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import reference
import typer
from cards import badge, table, text
from packaging.requirements import Requirement
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from assay import data
from assay.cli import app
from assay.data.catalogue import ENTRIES
from assay.examine import Finding, Metric, all_panels, report
from assay.lab import Claim, Judgement, Paper, Result, result
from assay.lab.bench import Row
from assay.lab.numerals import number


def data_sets() -> str:
    """Every data set: what it is, its licence, and its folder under `ASSAY_DATA`."""
    rows = []
    for name in data.names():
        about = data.describe(name)
        sizes = " + ".join(f"{count:,} {split}" for split, count in about.sizes.items())
        shape = "×".join(map(str, about.shape))
        folders = ", ".join(f"`{folder}/`" for folder in ENTRIES[name].folders) or "embedded"
        rows.append(
            (
                f"`{name}`",
                f"[{text(about.title)}]({about.home})",
                f"{shape}, {len(about.classes)} classes",
                sizes,
                text(about.licence),
                folders,
            )
        )
    return table(("Name", "What", "Example", "Size", "Licence", "Folder"), rows)


def dependencies(root: Path) -> str:
    """What pyproject accepts, and the version that the tests have passed with."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("#")[0].partition("==")
        if equals:
            pins[_normal(name)] = version.partition(";")[0].strip()
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    rows = []
    for group, requirements in groups.items():
        for requirement in map(Requirement, requirements):
            if requirement.name != project["name"]:
                accepted = str(requirement.specifier).replace("<", "&lt;") or "any"
                tested = pins.get(_normal(requirement.name), "–")
                rows.append((requirement.name, accepted, tested, group))
    return table(("Package", "Accepted", "Tested", "Part"), rows)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def command_line() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="assay")
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        usage = " ".join(command.collect_usage_pieces(inner))
        records = [parameter.get_help_record(inner) for parameter in command.get_params(inner)]
        rows = [(f"`{o}`", text(" ".join(h.split()))) for o, h in filter(None, records)]
        call = f"```text\nassay {name} {usage}\n```"
        options = table(("Option", "Meaning"), rows)
        parts.append(f"## assay {name}\n\n{text(command.help or '')}\n\n{call}\n\n{options}")
    return "\n\n".join(parts)


def result_fields() -> str:
    """The fields of `result.json`, one table a record."""
    names = ("Measurement", "DataSource", "Figure", "Table", "Curve", "Provenance")
    # A model's fields mean the same as those of the classes it is made from.
    models = {result.ClaimResult: (Claim, Judgement), result.PaperCard: (Paper,)}
    models |= {getattr(result, name): () for name in names}
    parts = [_fields(Result)]
    for model, sources in models.items():
        about = (model.__doc__ or "").strip().partition("\n")[0]
        parts.append(f"### {model.__name__}\n\n{text(about)}\n\n{_fields(model, *sources)}")
    return "\n\n".join(parts)


def report_fields() -> str:
    """The fields of `report.json` of an examination, one table a record."""
    names = ("DataRecord", "PanelRecord", "MetricRecord", "FindingRecord", "FigureRecord",
             "TableRecord", "GateRecord")  # fmt: skip
    sources = {"MetricRecord": (Metric,), "FindingRecord": (Finding,)}
    parts = [_fields(report.Report)]
    for name in names:
        model = getattr(report, name)
        about = (model.__doc__ or "").strip().partition("\n")[0]
        fields = _fields(model, *sources.get(name, ()))
        parts.append(f"### {name}\n\n{text(about)}\n\n{fields}")
    return "\n\n".join(parts)


def panels() -> str:
    """Every panel of an examination: its name, for which tasks, whether it trains."""
    rows = []
    for entry in all_panels():
        about = (entry.function.__doc__ or "").strip().partition("\n")[0]
        tasks = ", ".join(entry.tasks)
        rows.append((f"`{entry.name}`", entry.title, text(about), tasks,
                     "yes" if entry.trains else ""))  # fmt: skip
    return table(("Panel", "Title", "What it tells", "Tasks", "Trains copies"), rows)


def benchmark_fields() -> str:
    """The fields of a row of `assay bench --json`."""
    return _fields(Row)


def _fields(model: type[BaseModel], *sources: type) -> str:
    described = reference.described(*sources, model)
    fields = model.model_fields.items()
    if described:
        rows = [(f"`{n}`", f"`{_type(f)}`", text(described.get(n, ""))) for n, f in fields]
        return table(("Field", "Type", "What"), rows)
    return table(("Field", "Type"), [(f"`{n}`", f"`{_type(f)}`") for n, f in fields])


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(json.dumps(value) for value in typing.get_args(annotation))
    plain = isinstance(annotation, type) and not typing.get_origin(annotation)
    name = annotation.__name__ if plain else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name).replace("|", "or")


def benchmarks(path: Path) -> str:
    """The committed output of `assay bench --json`."""
    if not path.exists():
        return "*Not measured yet: there is no committed table.*"
    rows = []
    for row in map(Row.model_validate, json.loads(path.read_text(encoding="utf-8"))["rows"]):
        low, high = row.ratio_quartiles
        extra = ", ".join(
            f"{key} {number(value) if isinstance(value, float) else value}"
            for key, value in row.extra.items()
        )
        rows.append(
            (
                text(f"{row.family}: {row.name}"),
                f"{number(row.ratio, 3)} ({number(low, 3)}–{number(high, 3)})",
                text(row.target) or "–",
                badge(row.verdict),
                text(f"{row.peer} {row.peer_version}"),
                str(row.threads),
                text(extra) or "–",
            )
        )
    header = ("Benchmark", "Ours / peer (quartiles)", "Target", "", "Peer", "Threads", "Further")
    return table(header, rows)


def network(path: Path) -> str:
    """The committed output of `benchmarks/network.py`."""
    if not path.exists():
        return "*Not measured yet: there is no committed table.*"
    kept = json.loads(path.read_text(encoding="utf-8"))
    training, about = kept["training"], kept["runs"][-1]["provenance"]
    final = {
        (row["ranks"], row["method"]): sum(row["accuracies"][-3:]) / 3
        for row in kept["rows"]
        if row["link"] == 0 and row.get("accuracies")
    }
    parts = [
        f"{kept['parameters']:,} parameters, {training['data']}, {training['batch']} images a rank "
        f"and step, SGD {training['lr']} with momentum {training['momentum']}; target "
        f"{training['target']:.0%}. torch {about['versions']['torch']}, one thread a rank, "
        f"{about['cores']} cores ({text(about['processor'])}), Linux {about['kernel']}, "
        f"{text(about['tc'])}."
    ]
    header = ("Method", "MB a step", "Step, s", "Expected, s", "Off by", "Steps to target",
              "To the target, s", "Sooner than fp32", "Accuracy")  # fmt: skip
    links = dict.fromkeys((row["ranks"], row["link"]) for row in kept["rows"])
    for ranks, link in links:
        chosen = [row for row in kept["rows"] if (row["ranks"], row["link"]) == (ranks, link)]
        verified = kept["links"].get(f"{ranks} × {link}", {})
        checked = ", ".join(f"{key}: {number(value, 3)}" for key, value in verified.items())
        title = f"### {chosen[0]['link_name']}, {ranks} ranks"
        mode = chosen[0]["mode"]
        rows = [_network_row(row, final.get((ranks, row["method"]))) for row in chosen]
        said = f"The link as measured before use: {checked}." if checked else ""
        parts.append(f"{title}\n\n{mode.capitalize()}. {said}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _network_row(row: dict[str, Any], accuracy: float | None) -> tuple[str, ...]:
    def shown(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else number(value, digits)

    deviation, seconds = row.get("deviation"), shown(row.get("target_seconds"))
    if row.get("target_how") == "steps × time":
        seconds += " (steps × time)"
    return (
        text(row["label"]),
        shown(row["step_bytes"] / 1e6 if "step_bytes" in row else None),
        shown(row.get("step_seconds")),
        shown(row.get("expected_seconds")),
        "–" if deviation is None else f"{deviation:+.0%}",
        shown(row.get("target_step"), 4),
        seconds,
        shown(row.get("sooner")),
        "–" if accuracy is None else f"{accuracy:.1%}",
    )
