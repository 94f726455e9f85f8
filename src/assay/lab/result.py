"""What a run leaves behind: one JSON file, its schema, and how several become one."""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from assay.lab.paper import Claim, Expectation, Kind, OverSeeds, Paper, Verdict

SCHEMA_VERSION = 1

Cell = str | bool | int | float | None


class Stored(BaseModel):
    """A part of a file that Assay writes: no unknown fields, infinities kept."""

    # Diverged runs measure infinities; JSON has none, so they travel as strings.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class Measurement(Stored):
    """One measured figure and the seed it belongs to (None: not of one seed)."""

    value: float
    seed: int | None = None


class ClaimResult(Stored):
    """A claim with everything that was measured for it."""

    id: str
    statement: str
    kind: Kind
    paper: str
    unit: str
    how: str
    discussion: str
    over_seeds: OverSeeds
    bound: tuple[float | None, float | None] | None
    expect: str
    measurements: list[Measurement]
    estimate: float | None
    interval: tuple[float, float] | None
    method: str
    n: int
    verdict: Verdict

    @classmethod
    def of(cls, claim: Claim, measurements: list[Measurement], preset: str) -> "ClaimResult":
        """Judge `claim` by its measurements; a `paper` claim only at the `paper` preset."""
        judged = claim.judge([m.value for m in measurements])
        verdict = judged.verdict
        if claim.kind == "paper" and preset != "paper":
            verdict = "not run"
        bound = None
        if claim.expect is not None:
            low, high = claim.expect.low, claim.expect.high
            bound = (None if low == float("-inf") else low, None if high == float("inf") else high)
        return cls(
            id=claim.id, statement=claim.statement, kind=claim.kind, paper=claim.paper,
            unit=claim.unit, how=claim.how, discussion=claim.discussion,
            over_seeds=claim.over_seeds, bound=bound, expect=str(claim.expect or ""),
            measurements=measurements, estimate=judged.estimate, interval=judged.interval,
            method=judged.method, n=judged.n, verdict=verdict,
        )  # fmt: skip

    def claim(self) -> Claim:
        """The claim as it was when this was measured."""
        expect = None
        if self.bound is not None:
            low, high = self.bound
            expect = Expectation(
                float("-inf") if low is None else low, float("inf") if high is None else high
            )
        return Claim(
            self.id, self.statement, self.paper, expect, self.kind,
            self.unit, self.how, self.over_seeds, self.discussion,
        )  # fmt: skip


class PaperCard(Stored):
    """The card of the paper, as `assay.lab.Paper`."""

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    url: str
    topic: str
    summary: str
    components: tuple[str, ...]

    @classmethod
    def of(cls, paper: Paper) -> "PaperCard":
        """Copy the fields of a `Paper`."""
        return cls(**{name: getattr(paper, name) for name in cls.model_fields})


class DataSource(Stored):
    """A data set that a run has read."""

    name: str
    split: str
    samples: int
    source: str
    checksum: str


class Figure(Stored):
    """A figure; `file` is relative to the result's folder."""

    name: str
    caption: str
    file: str


class Table(Stored):
    """A table of plain values."""

    name: str
    caption: str
    rows: list[dict[str, Cell]]


class Curve(Stored):
    """A learning curve; `file` is a CSV with the columns step, series, value."""

    name: str
    file: str


class Provenance(Stored):
    """Where, when and with what a result was made."""

    assay: str
    commit: str | None
    python: str
    versions: dict[str, str]
    platform: str
    processor: str
    cores: int
    threads: int
    device: str
    precision: str
    started: datetime
    seconds: float


class Result(Stored):
    """The whole outcome of one experiment at one preset; what `result.json` holds.

    Args:
        schema_version: of the file's form.
        paper: the paper's card.
        preset: that was run.
        seeds: over which scaled claims were measured.
        config: the experiment's settings.
        claims: every claim with its measurements and its verdict.
        data: the data sets that were read.
        tables: plain tables.
        figures: SVG files beside the result.
        curves: CSV files beside the result.
        notes: paragraphs for the reader.
        provenance: where, when and with what it was made.

    Example:
        >>> from assay.lab import Result
        >>> sorted(Result.model_json_schema()["required"])
        ['claims', 'config', 'paper', 'preset', 'provenance', 'seeds']
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    paper: PaperCard
    preset: str
    seeds: list[int]
    config: dict[str, Any]
    claims: list[ClaimResult]
    data: list[DataSource] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    provenance: Provenance

    @property
    def failed_exact(self) -> list[ClaimResult]:
        """The exact claims that do not hold: an error in Assay or in the paper."""
        return [c for c in self.claims if c.kind == "exact" and c.verdict == "fails"]

    def measurements(self) -> dict[str, list[tuple[int | None, float]]]:
        """Every measured figure by claim: what two runs of one configuration must agree on."""
        return {c.id: [(m.seed, m.value) for m in c.measurements] for c in self.claims}

    def write(self, folder: Path) -> Path:
        """Write `folder/result.json` atomically and return its path."""
        path = folder / "result.json"
        write_atomically(path, self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a `result.json`, or the one in a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a result of this schema version; the message says why.
        """
        return read_document(cls, Path(path), "result.json", SCHEMA_VERSION, "a result of Assay")


Document = TypeVar("Document", bound=Stored)


def read_document(kind: type[Document], path: Path, name: str, version: int, what: str) -> Document:
    """Read a JSON document that Assay has written.

    Args:
        kind: of the document.
        path: of the file, or of a folder that holds it.
        name: of the file in a folder.
        version: of the schema.
        what: the document is, for the message.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is none of this schema version; the message says why.
    """
    path = path / name if path.is_dir() else path
    text = path.read_text(encoding="utf-8")
    try:
        document = json.loads(text)
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != version:
            raise ValueError(f"schema_version is {found!r}, this Assay reads {version}")
        return kind.model_validate_json(text)
    except ValueError as error:  # pydantic's and json's errors are such
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is not {what}: {first}") from error


def merge(results: Iterable[Result]) -> Result:
    """Join results of one experiment at one preset that differ in their seeds.

    Figures, tables and curves are those of the first result.

    Args:
        results: at least one; equal in slug, preset and config.

    Returns:
        A result over all seeds, every claim judged anew.

    Raises:
        ValueError: if there is nothing to merge, the results are of different experiments, or a
            seed occurs twice.

    Example:
        >>> from assay.lab.result import merge
        >>> merge([])
        Traceback (most recent call last):
        ...
        ValueError: no results to merge
    """
    parts = list(results)
    if not parts:
        raise ValueError("no results to merge")
    first = parts[0]
    for part in parts[1:]:
        if (part.paper.slug, part.preset, part.config) != (
            first.paper.slug, first.preset, first.config,
        ):  # fmt: skip
            raise ValueError(
                f"results of different experiments cannot be merged: {first.paper.slug}"
                f" ({first.preset}) and {part.paper.slug} ({part.preset}), or their configs differ"
            )
    seeds = [seed for part in parts for seed in part.seeds]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"a seed occurs in more than one result: {sorted(seeds)}")
    claims = []
    for index, judged in enumerate(first.claims):
        values = [m for part in parts for m in part.claims[index].measurements]
        if judged.kind != "exact":
            # A figure without a seed is not of one seed: every part has measured the same one.
            seeded = [m for m in values if m.seed is not None]
            values = seeded or first.claims[index].measurements
        claims.append(ClaimResult.of(judged.claim(), values, first.preset))
    provenance = first.provenance.model_copy(
        update={"seconds": sum(part.provenance.seconds for part in parts)}
    )
    return first.model_copy(
        update={"seeds": sorted(seeds), "claims": claims, "provenance": provenance}
    )


def write_atomically(path: Path, content: Annotated[str | bytes, "text is UTF-8"]) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part.

    Args:
        path: the file; its folder is made if need be.
        content: text or bytes.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> write_atomically(folder / "deep" / "a.txt", "µ")
        >>> (folder / "deep" / "a.txt").read_text(encoding="utf-8")
        'µ'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_name(name: str) -> str:
    """A name as a file name: letters, digits, dots, dashes; never empty, never hidden.

    Example:
        >>> file_name("training loss / seed 0")
        'training-loss-seed-0'
    """
    cleaned = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")
    if not cleaned:
        raise ValueError(f"{name!r} has no letter or digit to name a file with")
    return cleaned
