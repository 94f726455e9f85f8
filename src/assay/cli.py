"""The `assay` command: examine, compare, list, show, run, report, gallery, bench, doctor.

Heavy imports are inside the commands, so that `assay --help` answers at once.
"""

import importlib.util
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from assay.examine import Report
    from assay.lab import Experiment, Result
    from assay.lab.bench import Row

JSON_VERSION = 1
EXIT_CLAIM_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE_FAILED = 3
EXIT_CRASHED = 70  # as sysexits.h has it; Python's own 1 would read as a claim that failed
EXIT_INTERRUPTED = 130

VERDICT_STYLE = {
    "holds": "green",
    "met": "green",
    "fails": "red",
    "missed": "red",
    "inconclusive": "yellow",
    "reported": "cyan",
    "not run": "dim",
}
EXTRAS = {
    "data": ("pyarrow", "PIL", "h5py"),
    "audio": ("librosa", "soundfile"),
    "ecg": ("wfdb", "neurokit2"),
    "music": ("music21", "miditok"),
    "text": ("sentencepiece", "sacrebleu", "transformers"),
    "vision": ("torchvision", "timm"),
    "cluster": ("ray",),
    "tensorboard": ("tensorboard",),
}

app = typer.Typer(
    name="assay",
    help="Sixty deep-learning methods from the literature, each with its evidence.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point of the `assay` command."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_CRASHED)


def _console(stderr: bool = False) -> Console:
    # A pipe has no width; tables cut at 80 columns would lose their claims.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 140
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def _fail(message: str, code: int = EXIT_USAGE) -> typer.Exit:
    _console(stderr=True).print(Text(f"assay: {message}"), soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and a conventional exit code."""
    from assay.data import DataUnavailable
    from assay.lab import UsageError

    try:
        yield
    except (UsageError, DataUnavailable, FileNotFoundError) as error:
        raise _fail(str(error)) from None


def _print_json(**document: Any) -> None:
    sys.stdout.write(json.dumps({"schema_version": JSON_VERSION, **document}, indent=1) + "\n")


def _version(show: bool) -> None:
    if show:
        from assay import __version__

        typer.echo(f"assay {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command("list")
def list_papers(
    topic: Annotated[str | None, typer.Option(help="Only papers of this topic.")] = None,
    as_json: Json = False,
) -> None:
    """List the papers with their claims."""
    from assay.lab import UsageError, all_experiments
    from assay.lab.usage import unknown

    with _clear_errors():
        experiments = list(all_experiments())
        topics = sorted({e.paper.topic for e in experiments})
        if topic is not None and topic not in topics:
            raise UsageError(unknown("topic", topic, topics))
        chosen = [e for e in experiments if topic in (None, e.paper.topic)]
    if as_json:
        _print_json(papers=[_describe(e) for e in chosen])
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("paper", "topic", "year", "claims", "title"):
        table.add_column(column, no_wrap=column != "title")
    for experiment in chosen:
        paper = experiment.paper
        count = str(len(experiment.claims))
        table.add_row(paper.slug, paper.topic, str(paper.year), count, paper.title)
    _console().print(table)


def _describe(experiment: "Experiment") -> dict[str, Any]:
    import dataclasses

    from assay.lab.result import ClaimResult, PaperCard

    card = PaperCard.of(experiment.paper).model_dump(mode="json")
    claims = [
        ClaimResult.of(claim, [], "small").model_dump(
            mode="json", include={"id", "statement", "kind", "paper", "unit", "how", "expect"}
        )
        for claim in experiment.claims
    ]
    presets = {name: dataclasses.asdict(config) for name, config in experiment.presets.items()}
    return {**card, "claims": claims, "presets": presets}


@app.command()
def show(slug: Annotated[str, typer.Argument(help="Slug of the paper.")]) -> None:
    """Show a paper: what it gives, its components, its claims, its settings, its newest result."""
    from assay.lab import find_experiment

    with _clear_errors():
        experiment = find_experiment(slug)
    console = _console()
    paper = experiment.paper
    console.print(Text(paper.title, style="bold"))
    console.print(Text(f"{', '.join(paper.authors)} · {paper.year} · {paper.url}", style="dim"))
    console.print()
    console.print(Text(paper.summary))
    if paper.components:
        console.print(Text("\nIn your own code", style="bold"))
        for name in paper.components:
            console.print(Text.assemble("  ", (name, "cyan"), "  ", _summary_of(name)))
    console.print(Text("\nClaims", style="bold"))
    console.print(_claims_table(experiment))
    console.print(Text("\nSettings (change one with --set field=value)", style="bold"))
    console.print(_settings_table(experiment))
    result = _newest_result(slug)
    if result is not None:
        folder, newest = result
        console.print(Text(f"\nNewest result: {folder}", style="bold"))
        console.print(_result_table(newest))
    console.print(Text(f"\nRun it: assay run {slug}", style="dim"))


def _summary_of(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    try:
        thing = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return ""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _claims_table(experiment: "Experiment") -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2), pad_edge=False)
    for column in ("claim", "kind", "statement", "paper", "bound here"):
        table.add_column(column)
    for claim in experiment.claims:
        bound = str(claim.expect or "reported")
        table.add_row(claim.id, claim.kind, claim.statement, claim.paper or "–", bound)
    return table


def _settings_table(experiment: "Experiment") -> Table:
    import dataclasses

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2), pad_edge=False)
    table.add_column("field")
    for preset in experiment.presets:
        table.add_column(preset)
    first = next(iter(experiment.presets.values()))
    for field in dataclasses.fields(first):
        values = [getattr(config, field.name) for config in experiment.presets.values()]
        table.add_row(field.name, *map(str, values))
    seeds = [str(experiment.seeds(preset)) for preset in experiment.presets]
    table.add_row(Text("seeds (--seeds N)", style="dim"), *seeds)
    return table


def _newest_result(slug: str) -> "tuple[Path, Result] | None":
    from assay.lab import Result

    found = []
    for root in (Path("runs"), Path("results")):
        for path in root.glob(f"{slug}-*/result.json"):
            try:
                result = Result.read(path)
            except ValueError:
                continue
            if result.paper.slug == slug:
                found.append((path.parent, result))
    return max(found, key=lambda pair: pair[1].provenance.started, default=None)


def _result_table(result: "Result") -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2), pad_edge=False)
    for column in ("claim", "statement", "paper", "bound", "measured", "verdict"):
        table.add_column(column)
    for claim in result.claims:
        verdict = Text(claim.verdict, style=VERDICT_STYLE[claim.verdict])
        table.add_row(
            claim.id, claim.statement, claim.paper or "–", claim.expect or "–",
            _measured(claim.estimate, claim.interval, claim.n), verdict,
        )  # fmt: skip
    return table


def _measured(estimate: float | None, interval: tuple[float, float] | None, n: int) -> str:
    if estimate is None:
        return "–"
    if interval is None:
        return f"{estimate:.4g}"
    return f"{estimate:.4g} [{interval[0]:.4g}, {interval[1]:.4g}] n={n}"


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Slugs of papers.")] = None,
    preset: Annotated[str, typer.Option(help="smoke, small or paper.")] = "small",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices (processes) a node.", min=1)] = 1,
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="As Fabric: 32-true, bf16-mixed …")] = "32-true",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="field=value, any number of times.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder; a run goes to DIR/SLUG-PRESET.")] = Path(
        "runs"
    ),
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Go on with, or discard, an unfinished run."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run every paper.")] = False,
    jobs: Annotated[int, typer.Option(help="Papers at a time, each in a process.", min=1)] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; auto or local are valid too.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the claims of papers and write a report of each.

    Exit code 0: done. 1: an exact claim failed. 2: wrong usage or data not to be had.
    130: interrupted; --resume goes on.
    """
    from assay.lab import UsageError, find_experiment
    from assay.lab import slugs as all_slugs

    with _clear_errors():
        if everything == bool(slugs):
            raise UsageError("name papers or give --all (assay list shows them)")
        chosen = all_slugs() if everything else list(dict.fromkeys(slugs or []))
        settings = _settings(overrides or [])
        for slug in chosen:  # every mistake is told before anything has run
            find_experiment(slug).config(preset, settings)
    if ray is not None or jobs > 1:
        arguments = _run_arguments(
            preset, seeds, device, precision, overrides or [], output, resume
        )
        codes = _run_many(chosen, arguments, jobs, ray, preset, seeds, settings, output, quiet)
    else:
        codes = [
            _run_one(slug, preset, settings, seeds, output, resume, quiet or as_json,
                     device, devices, nodes, precision)
            for slug in chosen
        ]  # fmt: skip
    if as_json:
        from assay.lab import Result

        folders = [output / f"{slug}-{preset}" for slug in chosen]
        results = [Result.read(f) for f in folders if (f / "result.json").exists()]
        _print_json(results=[result.model_dump(mode="json") for result in results])
    if any(codes):
        raise typer.Exit(max(codes))


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    from assay.lab import UsageError

    settings = {}
    for text in overrides:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise UsageError(f"--set takes field=value, got {text!r}")
        settings[field.strip()] = value.strip()
    return settings


def _run_arguments(
    preset: str, seeds: int | None, device: str, precision: str,
    overrides: Sequence[str], output: Path, resume: bool | None,
) -> list[str]:  # fmt: skip
    arguments = ["--preset", preset, "--device", device, "--precision", precision]
    arguments += ["--output", str(output)]
    if seeds is not None:
        arguments += ["--seeds", str(seeds)]
    for text in overrides:
        arguments += ["--set", text]
    if resume is not None:
        arguments.append("--resume" if resume else "--no-resume")
    return arguments


def _run_one(
    slug: str, preset: str, settings: dict[str, str], seeds: int | None, output: Path,
    resume: bool | None, quiet: bool, device: str, devices: int, nodes: int, precision: str,
) -> int:  # fmt: skip
    from lightning_fabric import Fabric

    from assay.lab import find_experiment, run_experiment
    from assay.lab.report import write_report

    folder = output / f"{slug}-{preset}"
    try:
        chosen: Any = precision  # Fabric checks it
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, precision=chosen)
        if devices * nodes > 1:
            fabric.launch()
    except (ValueError, RuntimeError, OSError) as error:
        raise _fail(str(error).splitlines()[0]) from None
    console = _console()
    with _clear_errors():
        try:
            result = run_experiment(
                find_experiment(slug), preset=preset, overrides=settings, seeds=seeds,
                directory=folder, fabric=fabric, resume=resume, quiet=quiet,
            )  # fmt: skip
        except KeyboardInterrupt:
            again = shlex.join(_without_resume(sys.argv[1:]))
            message = f"interrupted; go on with: assay {again} --resume"
            raise _fail(message, EXIT_INTERRUPTED) from None
    if not fabric.is_global_zero:
        return 0
    report = write_report(folder)
    if not quiet:
        console.print(Text(f"{result.paper.title} · {preset}", style="bold"))
        console.print(_result_table(result))
        console.print(Text(f"report: {report}\n"), soft_wrap=True)
    return EXIT_CLAIM_FAILED if result.failed_exact else 0


def _without_resume(arguments: Sequence[str]) -> list[str]:
    return [a for a in arguments if a not in ("--resume", "--no-resume")]


def _run_many(
    slugs: Sequence[str], arguments: Sequence[str], jobs: int, ray: str | None, preset: str,
    seeds: int | None, settings: dict[str, str], output: Path, quiet: bool,
) -> list[int]:  # fmt: skip
    from assay.lab.cluster import run_on_ray, run_processes
    from assay.lab.report import write_report

    codes = []
    console = _console(stderr=True)
    with _clear_errors():
        if ray is not None:
            outcomes = run_on_ray(
                slugs, ray, preset=preset, seeds=seeds, overrides=settings, output=output
            )
        else:
            outcomes = run_processes(slugs, arguments, jobs)
        try:
            for outcome in outcomes:
                codes.append(outcome.code)
                if ray is not None and outcome.code <= EXIT_CLAIM_FAILED:
                    write_report(output / f"{outcome.slug}-{preset}")
                if not quiet:
                    state = {0: "done", 1: "an exact claim failed"}.get(outcome.code, "error")
                    console.print(Text(f"{outcome.slug}: {state} {outcome.message}"))
        except KeyboardInterrupt:
            raise _fail("interrupted; --resume goes on", EXIT_INTERRUPTED) from None
    return codes


@app.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs; default: all in runs/.")
    ] = None,
) -> None:
    """Write report.html into folders of runs."""
    from assay.lab.report import write_report

    with _clear_errors():
        for folder in runs or _result_folders([Path("runs")]):
            _echo_path(_checked(write_report, folder))


@app.command()
def gallery(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, or folders of such; default: runs/ and results/."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the site.")] = Path("site/gallery"),
) -> None:
    """Write a static site over many results: sortable, with a filter."""
    from assay.lab.report import write_gallery

    with _clear_errors():
        folders = _result_folders(runs or [Path("results"), Path("runs")])
        _echo_path(_checked(write_gallery, folders, output))


def _echo_path(path: Path) -> None:
    typer.echo(str(path))


def _checked(function: Any, *arguments: Any) -> Path:
    from assay.lab import UsageError

    try:
        return function(*arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _result_folders(roots: Sequence[Path]) -> list[Path]:
    from assay.lab import UsageError

    folders = []
    for root in roots:
        inside = [root] if (root / "result.json").exists() else []
        folders += inside or sorted(path.parent for path in root.glob("*/result.json"))
    if not folders:
        raise UsageError(f"no results in {', '.join(map(str, roots))}; assay run makes some")
    return folders


@app.command()
def examine(
    model: Annotated[
        str | None,
        typer.Argument(
            help="FILE.py:NAME or package.module:NAME, called for the model; or a .pt2."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="FILE.py:NAME called for (train, test); an .npz file; a folder of images; a "
            "dataset folder; or a data set's name."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="State dict: safetensors, or a weights-only checkpoint.")
    ] = None,
    call: Annotated[
        str | None, typer.Option(help="FILE.py:NAME of an adapter call(model, x) -> tensor.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="FILE.py:NAME of a loss (outputs, y) -> mean.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    budget: Annotated[str, typer.Option(help="Time for everything, e.g. 90s, 5m, 1h.")] = "5m",
    panels: Annotated[str | None, typer.Option(help="Names with commas; default all.")] = None,
    samples: Annotated[int, typer.Option(help="At most so many of a split.", min=8)] = 4096,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="May copies be trained?")
    ] = True,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Gate, e.g. 'curvature.top_eigenvalue > 100'; any number of times."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (as built), cpu, cuda, mps …")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    demo: Annotated[
        bool, typer.Option("--demo", help="Embedded data, a small network trained on the spot.")
    ] = False,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Go on with, or discard, an unfinished one."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only say where the report is.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report what a trained network is made of.

    Exit code 0: done. 2: wrong usage. 3: a gate failed or cannot be decided. 130: interrupted;
    --resume goes on.
    """
    import time

    from assay.lab import UsageError

    began = time.perf_counter()
    with _clear_errors():
        seconds = _seconds(budget)
        if demo and (model or data):
            raise UsageError("--demo brings its own model and data")
        if not demo and (model is None or data is None):
            raise UsageError("give a model and --data, or --demo (assay examine --help)")
        from assay.examine import choose_panels
        from assay.examine import examine as examine_model
        from assay.examine.loading import load_callable, load_data, load_model

        names = None if panels is None else [name.strip() for name in panels.split(",")]
        choose_panels(names)  # a mistake is told before anything is loaded
        adapter = None if call is None else load_callable(call, "call")
        loss_fn = None if loss is None else load_callable(loss, "loss")
        if demo:
            from assay.examine.demo import demo as make_demo

            examined, given = make_demo(seed)
            examined.to(device if device != "auto" else "cpu")
        else:
            examined = load_model(str(model), weights, device)
            given = load_data(str(data))
        try:
            report = examine_model(
                examined,
                given,
                panels=names,
                budget=seconds,
                spent=time.perf_counter() - began,
                call=adapter,
                loss_fn=loss_fn,
                training=training,
                fail_if=fail_if or (),
                samples=samples,
                seed=seed,
                output=output,
                resume=resume,
                quiet=quiet or as_json,
            )
        except KeyboardInterrupt:
            raise _fail("interrupted; --resume goes on", EXIT_INTERRUPTED) from None
    if as_json:
        _print_json(report=report.model_dump(mode="json"))
    elif not quiet:
        _print_examination(report)
    if not as_json:
        typer.echo(f"report: {output / 'report.html'}")
    undecided = [gate for gate in report.gates if gate.failed is not False]
    for gate in undecided:
        word = "failed" if gate.failed else "cannot be decided"
        said = Text(f"assay: gate {word}: {gate.expression} ({gate.reason})")
        _console(stderr=True).print(said, soft_wrap=True)
    if undecided:
        raise typer.Exit(EXIT_GATE_FAILED)


def _seconds(text: str) -> float:
    """A time span: `90`, `90s`, `5m`, `1.5h`."""
    import re

    from assay.lab import UsageError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--budget takes a time span such as 90s, 5m or 1h, got {text!r}")
    return float(found[1]) * {"m": 60, "min": 60, "h": 3600}.get(found[2], 1)


def _print_examination(report: "Report") -> None:
    console = _console()
    console.print(Text(str(report).partition("\n")[0], style="bold"))
    for finding in report.findings[:5]:
        console.print(Text(f"  • {finding.text}"), soft_wrap=True)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2), pad_edge=False)
    for column in ("panel", "status", "seconds", "figures"):
        table.add_column(column)
    for panel in report.panels:
        said = f"{panel.status}: {panel.reason}" if panel.reason else panel.status
        figures = "  ".join(f"{metric.name} {metric.value:.4g}" for metric in panel.metrics[:3])
        table.add_row(panel.title, said, f"{panel.seconds:.0f}", figures)
    console.print(table)


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Folders of examinations, two or more.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page; default comparison.html, and none with --json."),
    ] = None,
    names: Annotated[str | None, typer.Option(help="What to call them, with commas.")] = None,
    as_json: Json = False,
) -> None:
    """Put examinations of two or more models side by side."""
    from assay.lab import UsageError

    with _clear_errors():
        from assay.examine import Comparison

        called = None if names is None else [name.strip() for name in names.split(",")]
        try:
            comparison = Comparison(reports, called)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if as_json:
        rows = [
            {
                "metric": row.name,
                "label": row.label,
                "better": row.better,
                "values": dict(zip(comparison.names, row.values, strict=True)),
                "intervals": dict(zip(comparison.names, row.intervals, strict=True)),
                "best": next(
                    (n for n, c in zip(comparison.names, row.cells, strict=True) if c.best), None
                ),
            }
            for panel, _ in comparison.panels
            for row in comparison.rows(panel)
        ]
        _print_json(names=list(comparison.names), metrics=rows)
    if output is not None or not as_json:
        page = comparison.write(output or Path("comparison.html"))
        typer.echo(f"comparison: {page}", err=as_json)


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(help="Only benchmarks whose family or name has this in it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of benchmarks; default: the checkout's.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Pairs of measurements.", min=3)] = 11,
    as_json: Json = False,
) -> None:
    """Time Assay against its peers, alternating in one process."""
    import assay
    from assay.lab import UsageError
    from assay.lab.bench import find_benchmarks, measure

    checkout = Path(assay.__file__).resolve().parents[2] / "benchmarks"
    with _clear_errors():
        entries = list(find_benchmarks(folder or checkout))
        chosen = [e for e in entries if name is None or name in e.family or name in e.name]
        if not chosen:
            families = sorted({e.family for e in entries})
            raise UsageError(f"no benchmark has {name!r} in it; there are: {', '.join(families)}")
        rows, skipped = [], []
        for entry in chosen:
            try:
                rows.append(measure(entry, repeats))
                said = f"{rows[-1].ratio:.2f}"
            except ModuleNotFoundError as error:
                said = f"not measured: {error}"
                skipped.append({"family": entry.family, "name": entry.name, "why": str(error)})
            typer.echo(f"{entry.family}: {entry.name}: {said}", err=True)
    if as_json:
        _print_json(rows=[row.model_dump(mode="json") for row in rows], skipped=skipped)
    else:
        _console().print(_bench_table(rows))


def _bench_table(rows: "Sequence[Row]") -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    columns = ("benchmark", "ours / peer", "quartiles", "target", "", "threads", "peer", "further")
    for column in columns:
        table.add_column(column)
    for row in rows:
        low, high = row.ratio_quartiles
        extra = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.extra.items()
        )
        table.add_row(
            f"{row.family}: {row.name}", f"{row.ratio:.3f}", f"{low:.3f}–{high:.3f}", row.target,
            Text(row.verdict, style=VERDICT_STYLE[row.verdict]), str(row.threads),
            f"{row.peer} {row.peer_version}", extra,
        )  # fmt: skip
    return table


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what is installed, where data is, and whether torch computes rightly."""
    checks = _doctor()
    if as_json:
        _print_json(**checks)
    else:
        console = _console()
        for heading, entries in checks.items():
            console.print(Text(heading, style="bold"))
            for key, value in entries.items():
                console.print(Text(f"  {key:<18} {value}"), soft_wrap=True)
    if any(value != "right" for value in checks["computation"].values()):
        raise typer.Exit(EXIT_CLAIM_FAILED)


def _doctor() -> dict[str, dict[str, str]]:
    import platform
    from importlib import metadata

    import torch

    import assay
    from assay import data

    versions = {"assay": assay.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "scikit-learn", "numba", "lightning-fabric"):
        versions[package] = metadata.version(package)
    extras = {}
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        absent = f"missing {', '.join(missing)}: pip install 'assay[{extra}]'"
        extras[extra] = absent if missing else "installed"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "cuda": cuda,
        "ASSAY_DATA": os.environ.get("ASSAY_DATA", "not set"),
    }
    datasets = {name: data.available(name) or "not here" for name in data.names()}
    return {
        "versions": versions,
        "extras": extras,
        "machine": machine,
        "data": datasets,
        "computation": {"torch": _torch_is_sane(), "numba kernels": _kernels_are_sane()},
    }


def _torch_is_sane() -> str:
    import torch

    a = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).requires_grad_()
    (a @ a.T).trace().backward()
    return "right" if a.grad is not None and torch.equal(a.grad, 2 * a.detach()) else "wrong"


def _kernels_are_sane() -> str:
    import torch

    from assay.distributed import natural_round

    powers = torch.tensor([-4.0, 0.0, 0.5, 1.0, 2.0])
    return "right" if torch.equal(natural_round(powers), powers) else "wrong"
