"""Experiments: found by slug, configured by preset, run to a result."""

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

import assay
from assay.lab.lab import Lab
from assay.lab.paper import Claim, Paper
from assay.lab.provenance import collect
from assay.lab.result import ClaimResult, PaperCard, Result
from assay.lab.usage import UsageError, unknown

# By name: the lab stands below the experiments and only looks for them.
EXPERIMENTS = "assay.experiments"
PRESET_NAMES = ("smoke", "small", "paper")
DEFAULT_SEEDS = {"smoke": 1, "small": 3, "paper": 5}


@dataclass(frozen=True)
class Experiment:
    """A module of `assay.experiments`, read by its conventions.

    Args:
        module: has `PAPER`, `CLAIMS`, `PRESETS` and `run`; optionally `SEEDS`.

    Example:
        >>> from assay.lab import find_experiment
        >>> find_experiment("amsgrad").paper.year
        2018
    """

    module: ModuleType

    @property
    def paper(self) -> Paper:
        """The paper's card."""
        return self.module.PAPER

    @property
    def claims(self) -> Sequence[Claim]:
        """The claims with their bounds."""
        return self.module.CLAIMS

    @property
    def presets(self) -> Mapping[str, Any]:
        """A configuration (frozen dataclass) for each preset."""
        return self.module.PRESETS

    @property
    def run(self) -> Callable[[Lab, Any], None]:
        """Measures the claims."""
        return self.module.run

    def seeds(self, preset: str) -> int:
        """How many seeds a preset takes unless the user says otherwise."""
        return {**DEFAULT_SEEDS, **getattr(self.module, "SEEDS", {})}[preset]

    def config(self, preset: str, overrides: Mapping[str, str] | None = None) -> Any:
        """The preset's configuration with some fields replaced.

        Args:
            preset: `"smoke"`, `"small"` or `"paper"`.
            overrides: field name to new value, as text; tuples are comma-separated.

        Raises:
            UsageError: for an unknown preset or field, or a value that does not fit its type.
        """
        if preset not in self.presets:
            raise UsageError(unknown("preset", preset, self.presets))
        config = self.presets[preset]
        names = [field.name for field in dataclasses.fields(config)]
        hints = typing.get_type_hints(type(config))
        values: dict[str, Any] = {name: getattr(config, name) for name in names}
        for name, text in (overrides or {}).items():
            if name not in values:
                raise UsageError(unknown("field", name, names, of=self.paper.slug))
            usual, value = values[name], _parse(name, text, hints[name])
            if type(usual) is type(value) is int and value < 0 <= usual:
                raise UsageError(f"{name}={text} does not fit: {name} must not be negative")
            values[name] = value
        return type(config)(**values)


def _parse(name: str, text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    value: Any = text
    if origin is tuple:
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    elif text.lower() == "none" and origin in (typing.Union, types.UnionType):
        value = None
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        kind = getattr(hint, "__name__", None) if origin is None else str(hint)
        reason = error.errors()[0]["msg"]
        raise UsageError(f"{name}={text} does not fit: {name} is {kind} ({reason})") from None


def slugs() -> list[str]:
    """The slugs of all experiments, sorted; imports none of them.

    Example:
        >>> "amsgrad" in slugs()
        True
    """
    found = pkgutil.iter_modules(importlib.import_module(EXPERIMENTS).__path__)
    return sorted(m.name.replace("_", "-") for m in found if not m.name.startswith("_"))


def find_experiment(slug: str) -> Experiment:
    """The experiment of a paper.

    Args:
        slug: the paper's slug.

    Raises:
        UsageError: if there is none; names the nearest.

    Example:
        >>> len(find_experiment("amsgrad").claims) >= 3
        True
    """
    if slug not in slugs():
        raise UsageError(unknown("paper", slug, slugs()))
    return Experiment(importlib.import_module(f"{EXPERIMENTS}.{slug.replace('-', '_')}"))


def all_experiments() -> Iterator[Experiment]:
    """All experiments, by slug.

    Example:
        >>> [e.paper.slug for e in all_experiments()] == slugs()
        True
    """
    return map(find_experiment, slugs())


def run_experiment(
    experiment: Experiment,
    *,
    preset: str = "small",
    overrides: Mapping[str, str] | None = None,
    seeds: int | Sequence[int] | None = None,
    directory: str | Path,
    fabric: Any = None,
    resume: bool | None = None,
    quiet: bool = True,
) -> Result:
    """Run an experiment and write `directory/result.json`, figures and curves.

    Args:
        experiment: from `find_experiment`.
        preset: `"smoke"`, `"small"` or `"paper"`.
        overrides: config fields to replace, as text.
        seeds: how many (0, 1, …), or which; None takes the experiment's own number.
        directory: the run's folder.
        fabric: device, precision, processes; default one CPU process.
        resume: True goes on with an unfinished run in `directory`, False discards it, None
            refuses to touch it.
        quiet: no progress bars.

    Returns:
        The result, as written.

    Raises:
        UsageError: for a bad preset, field or seed; for an unfinished run in `directory` that
            `resume` does not speak of, or one of another configuration.

    Example:
        >>> import tempfile
        >>> from assay.lab import find_experiment, run_experiment
        >>> run_experiment(find_experiment("amsgrad"), preset="tiny", directory=tempfile.mkdtemp())
        Traceback (most recent call last):
        ...
        assay.lab.usage.UsageError: unknown preset 'tiny'; there are: smoke, small, paper
    """
    config = experiment.config(preset, overrides)
    if seeds is None:
        seeds = experiment.seeds(preset)
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise UsageError(f"seeds must be at least one, distinct and not negative, got {seeds}")
    directory = Path(directory)
    lab = Lab(
        experiment.paper.slug, experiment.claims, preset=preset, seeds=chosen,
        directory=directory, fabric=fabric, quiet=quiet,
    )  # fmt: skip
    config_values = dataclasses.asdict(config)
    identity = {
        "assay": assay.__version__,
        "slug": experiment.paper.slug,
        "preset": preset,
        "seeds": chosen,
        "config": TypeAdapter(dict).dump_python(config_values, mode="json"),
        "precision": str(lab.fabric._precision.precision),
    }
    if lab.is_main:
        _settle_previous_run(lab, identity, resume)
    lab.fabric.barrier()
    when = datetime.now(UTC)
    with lab.open():
        experiment.run(lab, config)
    result = Result(
        paper=PaperCard.of(experiment.paper),
        preset=preset,
        seeds=chosen,
        config=identity["config"],
        claims=[
            ClaimResult.of(claim, lab.measurements[claim.id], preset) for claim in experiment.claims
        ],
        data=lab.datasets,
        tables=lab.tables,
        figures=lab.figures,
        curves=list(lab.curves.values()),
        notes=lab.notes,
        provenance=collect(
            lab.device, str(lab.fabric._precision.precision), when, lab.checkpoints.elapsed()
        ),
    )
    if lab.is_main:
        result.write(directory)
        lab.checkpoints.discard()
    return result


def _settle_previous_run(lab: Lab, identity: dict[str, Any], resume: bool | None) -> None:
    previous = lab.checkpoints.identity()
    if previous is not None and resume is None:
        raise UsageError(
            f"{lab.directory} holds an unfinished run: --resume goes on with it, "
            "--no-resume discards it, --output writes elsewhere"
        )
    if previous is not None and resume and previous != identity:
        differing = [key for key in identity if previous.get(key) != identity[key]]
        raise UsageError(
            f"the unfinished run in {lab.directory} differs in {', '.join(differing)}: "
            "use the same settings, or --no-resume to discard it"
        )
    if resume and previous is not None:
        lab.checkpoints.count_on()
    else:
        lab.checkpoints.discard()
        lab.checkpoints.begin(identity)
