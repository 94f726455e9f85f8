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
