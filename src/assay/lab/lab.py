"""What an experiment is handed: randomness, data, training, and a place for what it finds."""

import csv
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure as MatplotlibFigure
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from assay.data import Dataset, load, names
from assay.functional.training import Record, fit
from assay.lab.checkpoint import Checkpoints
from assay.lab.figures import subplots, write_svg
from assay.lab.paper import Claim
from assay.lab.result import (
    Cell,
    Curve,
    DataSource,
    Figure,
    Measurement,
    Table,
    file_name,
)
from assay.lab.usage import UsageError, unknown

T = TypeVar("T")


def derive_seed(*key: object) -> int:
    """A 63-bit seed that depends on the key alone, the same on every machine.

    Example:
        >>> derive_seed("init", 0) == derive_seed("init", 0)
        True
        >>> derive_seed("init", 0) == derive_seed("init", 1)
        False
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Lab:
    """One run of one experiment.

    Experiments do not make a Lab; `assay.lab.run_experiment` does.

    Args:
        slug: the paper's slug; part of every derived seed.
        claims: the claims that may be measured.
        preset: name of the preset that runs.
        seeds: the seeds over which scaled claims are measured.
        directory: folder of the run; figures, curves and checkpoints go below it.
        fabric: a `lightning_fabric.Fabric`: device, precision and processes; default one CPU.
        quiet: no progress bars.

    Raises:
        ValueError: if two claims have one id.

    Example:
        >>> import tempfile
        >>> from assay.lab import Claim, Lab, at_most
        >>> claims = [Claim("gap", "Small", expect=at_most(1))]
        >>> lab = Lab("demo", claims, directory=tempfile.mkdtemp())
        >>> lab.measure("gap", 0.5, seed=0)
        >>> lab.measurements["gap"][0].value
        0.5
    """

    def __init__(
        self,
        slug: str,
        claims: Sequence[Claim],
        *,
        preset: str = "small",
        seeds: Sequence[int] = (0,),
        directory: str | Path,
        fabric: Any = None,  # importing Lightning Fabric for its type takes seconds
        quiet: bool = True,
    ) -> None:
        ids = [claim.id for claim in claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"claim ids must be unique, got {ids}")
        self.slug = slug
        self.preset = preset
        self.seeds = tuple(seeds)
        self.directory = Path(directory)
        self.fabric = fabric or _one_cpu()
        self.checkpoints = Checkpoints(self.directory / "checkpoints")
        self.measurements: dict[str, list[Measurement]] = {name: [] for name in ids}
        self.datasets: list[DataSource] = []
        self.tables: list[Table] = []
        self.figures: list[Figure] = []
        self.curves: dict[str, Curve] = {}
        self.notes: list[str] = []
        self._board = _tensorboard(self.directory) if not quiet else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            transient=True,
            disable=quiet or not self.is_main,
        )

    # -- where it runs -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files (rank 0)."""
        return self.fabric.is_global_zero

    # -- randomness ----------------------------------------------------------------------------

    def seed(self, *key: object) -> int:
        """An integer seed for `key`; for scikit-learn and numpy."""
        return derive_seed(self.slug, *key) % 2**32

    def generator(self, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for `key`, independent of what ran before."""
        return torch.Generator(device=device).manual_seed(derive_seed(self.slug, *key))

    @contextmanager
    def seeded(self, *key: object) -> Iterator[None]:
        """Seed torch's global generator inside the block (weight initialisation, dropout)."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(self.slug, *key))
            yield

    # -- data ----------------------------------------------------------------------------------

    def data(
        self, name: str, split: str = "train", *, limit: int | None = None, seed: int = 0
    ) -> Dataset:
        """Load a data set (`assay.data.load`) and record it in the result.

        Args:
            name: of the data set.
            split: `"train"` or `"test"`.
            limit: at most so many samples, a stratified subset.
            seed: which subset.

        Raises:
            UsageError: if there is no data set of that name.
        """
        if name not in names():
            raise UsageError(unknown("data set", name, names()))
        dataset = load(name, split, limit=limit, seed=seed)
        source = DataSource(
            name=name,
            split=split,
            samples=len(dataset),
            source=dataset.source,
            checksum=dataset.checksum,
        )
        if source not in self.datasets:
            self.datasets.append(source)
        return dataset

    # -- work that a killed run does not repeat ------------------------------------------------

    def stage(self, name: str, function: Callable[[], T]) -> T:
        """Run `function` once; a resumed run reads its result from disk.

        What is random inside has to come from `generator`, `seed` or `seeded`. Measurements,
        figures and curves belong outside.

        Args:
            name: unique in the experiment.
            function: returns tensors, numbers, strings, None, or lists, tuples and dicts of these.

        Returns:
            The function's result, as read back from disk.

        Raises:
            TypeError: if the result holds other types.
            ValueError: if the name has been used before in this run.
        """
        return self.checkpoints.stage(name, function)

    def fit(
        self,
        name: str,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        epochs: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        scheduler: LRScheduler | None = None,
        step_scheduler: LRScheduler | None = None,
        penalty: Callable[[], Tensor] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        after_step: Callable[[int], None] | None = None,
        keep: Mapping[str, Any] | None = None,
    ) -> list[Record]:
        """Train `model` in place with `assay.functional.fit`, resumable after every epoch.

        The global generator is seeded by `name`. The epoch's records become the learning
        curve `name`.

        Args:
            name: unique in the experiment.
            model: see `assay.functional.fit`, as are all arguments not named here.
            optimizer: over the model's parameters.
            batches: if it has a `generator`, that one's state is part of the checkpoint.
            epochs: number of epochs.
            loss_fn: `(output, target) -> scalar`.
            scheduler: stepped each epoch.
            step_scheduler: stepped each step.
            penalty: addition to the loss.
            evaluate: additions to the epoch's record.
            after_step: called with the number of steps done so far.
            keep: further objects with `state_dict` and `load_state_dict` that change during
                training and belong to the checkpoint.

        Returns:
            One record an epoch.
        """
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, **(keep or {})}
        for key, part in (("scheduler", scheduler), ("step_scheduler", step_scheduler)):
            if part is not None:
                parts[key] = part
        shuffler = getattr(batches, "generator", None)
        with self.seeded("fit", name):
            wrapped, fabric_optimizer = self.fabric.setup(model, optimizer)
            history = self.checkpoints.load_training(name, parts, shuffler)
            progress = self._progress.add_task(name, total=epochs, completed=len(history))

            def after_epoch(records: list[Record]) -> None:
                self._progress.update(progress, completed=len(records))
                if self.is_main:
                    self.checkpoints.save_training(name, parts, shuffler, records)

            fit(
                wrapped,
                fabric_optimizer,
                _share(batches, self.fabric),
                epochs=epochs,
                loss_fn=loss_fn,
                scheduler=scheduler,
                step_scheduler=step_scheduler,
                penalty=penalty,
                evaluate=evaluate,
                after_step=after_step,
                after_epoch=after_epoch,
                backward=self.fabric.backward,
                history=history,
            )
            self._progress.remove_task(progress)
        model.eval()
        for record in history:
            series = {k: v for k, v in record.items() if k not in ("epoch", "step")}
            self.log(name, int(record["epoch"]), **series)
        return history

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Iterate with a progress bar (none when quiet or not in a terminal)."""
        yield from self._progress.track(iterable, description=description, total=total)

    # -- what was found ------------------------------------------------------------------------

    def measure(
        self, claim: str, value: float | np.ndarray | Tensor | Sequence, *, seed: int | None = None
    ) -> None:
        """Record what was measured for a claim.

        Args:
            claim: id of the claim.
            value: a figure, or several equal in rank (one tensor or sequence).
            seed: the seed that the figure belongs to; None if it belongs to none.

        Raises:
            ValueError: if the paper makes no such claim.
        """
        if claim not in self.measurements:
            known = ", ".join(self.measurements)
            raise ValueError(f"{self.slug} makes no claim {claim!r}; it makes: {known}")
        # Not through torch.as_tensor: it makes float32 of Python's numbers.
        plain = value.tolist() if isinstance(value, Tensor) else value
        values = np.asarray(plain, dtype=np.float64).ravel()
        self.measurements[claim] += [Measurement(value=float(v), seed=seed) for v in values]

    def log(self, curve: str, step: int, **values: float) -> None:
        """Append a point to each series of a learning curve.

        Args:
            curve: name of the curve; one CSV file a curve.
            step: abscissa.
            values: one value a series.
        """
        if not self.is_main:
            return
        path = self.directory / "curves" / f"{file_name(curve)}.csv"
        new = curve not in self.curves
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.curves[curve] = Curve(name=curve, file=f"curves/{path.name}")
        with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(("step", "series", "value"))
            writer.writerows((step, series, repr(float(v))) for series, v in values.items())
        if self._board is not None:
            for series, value in values.items():
                self._board.add_scalar(f"{curve}/{series}", value, step)

    def subplots(
        self,
        rows: int = 1,
        columns: int = 1,
        *,
        width: float = 6.4,
        height: float = 3.6,
        **kwargs: Any,
    ) -> tuple[MatplotlibFigure, Any]:
        """See `assay.lab.figures.subplots`."""
        return subplots(rows, columns, width=width, height=height, **kwargs)

    def figure(self, name: str, figure: MatplotlibFigure, caption: str = "") -> None:
        """Store a matplotlib figure as SVG and show it in the report.

        Args:
            name: becomes the file's name.
            figure: not needed any more afterwards.
            caption: one sentence on what it shows.
        """
        if not self.is_main:
            return
        path = self.directory / "figures" / f"{file_name(name)}.svg"
        write_svg(figure, path)
        self.figures.append(Figure(name=name, caption=caption, file=f"figures/{path.name}"))

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], caption: str = "") -> None:
        """Show a table of plain values in the report.

        Args:
            name: its heading.
            rows: one mapping from column to value a row.
            caption: one sentence on what it shows.
        """
        self.tables.append(Table(name=name, caption=caption, rows=[dict(row) for row in rows]))

    def note(self, text: str) -> None:
        """Tell the reader of the report something; one paragraph."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def open(self) -> Iterator["Lab"]:
        """Show progress while the experiment runs."""
        with self._progress:
            yield self
        if self._board is not None:
            self._board.close()


def _one_cpu() -> Any:
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def _tensorboard(directory: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"))


def _share(batches: Iterable[tuple[Tensor, Tensor]], fabric: Any) -> Iterable:
    """This process's part of every batch, so that N processes train on the same batches as one."""
    return batches if fabric.world_size == 1 else _Shared(batches, fabric)


class _Shared:
    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], fabric: Any) -> None:
        self._batches, self._rank, self._world = batches, fabric.global_rank, fabric.world_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = slice(self._rank, None, self._world)
        for x, y in self._batches:
            yield x[mine], y[mine]
