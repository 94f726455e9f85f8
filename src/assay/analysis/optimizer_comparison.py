"""Which optimizer is best for my model? A comparison in which each has been tuned as much."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Setting = dict[str, Any]
Record = Mapping[str, float]
Trainer = Callable[[nn.Module, Optimizer, int], Sequence[Record]]


@dataclass(frozen=True)
class Contender:
    """An optimizer with the settings among which it may be tuned.

    Args:
        name: in the table.
        make: `make(parameters, **setting)` gives the optimizer.
        grid: values by argument; all combinations are tried.

    Raises:
        ValueError: if the grid is empty or an argument has no values.

    Example:
        >>> import torch
        >>> from assay.analysis import Contender
        >>> sgd = Contender("SGD", torch.optim.SGD, {"lr": (0.01, 0.1), "momentum": (0.0, 0.9)})
        >>> len(sgd.settings)
        4
    """

    name: str
    make: Callable[..., Optimizer]
    grid: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        if not self.grid or not all(len(values) for values in self.grid.values()):
            raise ValueError(f"{self.name}: the grid needs values for each argument, {self.grid}")

    @property
    def settings(self) -> list[Setting]:
        """All combinations of the grid."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        optimizer: name of the contender.
        setting: its arguments.
        seed: of initialisation and batches.
        score: last value of the metric; infinitely bad if the training diverged.
        history: records of the training, one an epoch.

    Example:
        >>> from assay.analysis import Trial
        >>> Trial("SGD", {"lr": 0.1}, 0, 0.5, ({"loss": 0.5},)).score
        0.5
    """

    optimizer: str
    setting: Setting
    seed: int
    score: float
    history: tuple[Record, ...]


@dataclass(frozen=True)
class OptimizerComparison:
    """What a comparison found: all trials, of the search and of the winners.

    Args:
        metric: name of the score.
        maximize: whether more is better.
        search: trials of the grid, on the seed for tuning.
        final: trials of each contender's best setting, on other seeds.

    Example:
        >>> from assay.analysis import OptimizerComparison, Trial
        >>> final = (Trial("SGD", {"lr": 0.1}, 1, 0.5, ()), Trial("SGD", {"lr": 0.1}, 2, 0.7, ()))
        >>> found = OptimizerComparison("loss", False, (), final)
        >>> found.table()[0]["loss"]
        0.6
    """

    metric: str
    maximize: bool
    search: tuple[Trial, ...]
    final: tuple[Trial, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row a contender, the best first, with what it was tuned to and over how much.

        `edge` names arguments whose best value is the smallest or largest of the grid (with three
        values or more): a wider grid might do better.
        """
        rows = []
        for name, trials in _by_optimizer(self.final).items():
            scores = [trial.score for trial in trials]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            searched = [t for t in self.search if t.optimizer == name]
            rows.append(
                {
                    "optimizer": name,
                    "setting": _text(trials[0].setting),
                    self.metric: statistics.fmean(scores),
                    "standard deviation": spread if math.isfinite(spread) else math.nan,
                    "seeds": len(scores),
                    "settings tried": len(searched),
                    "diverged": sum(not math.isfinite(t.score) for t in searched),
                    "edge": ", ".join(_edges(trials[0].setting, searched)),
                }
            )
        sign = -1 if self.maximize else 1
        return sorted(rows, key=lambda row: sign * row[self.metric])

    def grid(self) -> list[dict[str, Any]]:
        """One row a trial of the search."""
        return [
            {"optimizer": t.optimizer, "setting": _text(t.setting), self.metric: t.score}
            for t in self.search
        ]

    def curves(self, key: str | None = None) -> dict[str, list[list[float]]]:
        """Learning curves of the final trials: for each contender one list of values a seed.

        Args:
            key: of the records; default the metric.
        """
        key = self.metric if key is None else key
        return {
            name: [[float(record[key]) for record in t.history if key in record] for t in trials]
            for name, trials in _by_optimizer(self.final).items()
        }

    def __str__(self) -> str:
        lines = [f"{'optimizer':<16} {self.metric:>10}      ±   best setting"]
        for row in self.table():
            edge = f"   (at the edge of the grid: {row['edge']})" if row["edge"] else ""
            lines.append(
                f"{row['optimizer']:<16} {row[self.metric]:10.4g} {row['standard deviation']:6.2g}"
                f"   {row['setting']}{edge}"
            )
        lines.append("Searched:")
        for name, trials in _by_optimizer(self.search).items():
            tried = "; ".join(f"{_text(t.setting)}: {t.score:.4g}" for t in trials)
            lines.append(f"{name:<16} {tried}")
        return "\n".join(lines)


def compare_optimizers(
    build: Callable[[], nn.Module],
    contenders: Iterable[Contender],
    train: Trainer,
    *,
    metric: str = "loss",
    maximize: bool = False,
    tuning_seed: int = 0,
    seeds: Sequence[int] = (1, 2, 3),
) -> OptimizerComparison:
    """Tune each optimizer over a grid of the same size, then run the winners on other seeds.

    At one common learning rate a comparison shows whom the rate suits. Here every contender gets as
    many settings, the best of which (by the metric after training, on one seed) is trained again
    from other initialisations, on which nothing has been tuned. Let `train` measure the metric on
    data that it does not train on.

    Args:
        build: makes the model from torch's global generator, which is seeded before.
        contenders: optimizers with their grids, all with as many settings.
        train: `train(model, optimizer, seed)` trains in place and returns records, one an epoch,
            with the metric in the last: `assay.functional.fit` with `evaluate` does. A
            `FloatingPointError` or a score that is not finite counts as a divergence.
        metric: key of the records.
        maximize: whether more is better.
        tuning_seed: seed of the search.
        seeds: seeds of the final trials.

    Returns:
        All trials; `table`, `grid` and `curves` are plain data, `print` shows table and grid.

    Raises:
        ValueError: if there are no contenders, two of one name, grids of different sizes, no seeds,
            or the tuning seed is among them.
        KeyError: if the last record has no such metric.

    Example:
        >>> import torch
        >>> from assay.analysis import Contender, compare_optimizers
        >>> from assay.functional import fit
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> def train(model, optimizer, seed):
        ...     mse = torch.nn.functional.mse_loss
        ...     return fit(model, optimizer, [(x, 3 * x)], epochs=20, loss_fn=mse)
        >>> found = compare_optimizers(
        ...     lambda: torch.nn.Linear(1, 1),
        ...     [Contender("SGD", torch.optim.SGD, {"lr": (0.01, 0.1, 0.5)}),
        ...      Contender("Adam", torch.optim.Adam, {"lr": (0.001, 0.01, 0.1)})],
        ...     train, seeds=(1, 2))
        >>> found.table()[0]["optimizer"], found.table()[0]["setting"]
        ('SGD', 'lr=0.5')

    Reference:
        Choi, Shallue, Nado, Lee, Maddison, Dahl, "On Empirical Comparisons of Optimizers for Deep
        Learning", 2019; Schmidt, Schneider, Hennig, "Descending through a Crowded Valley",
        ICML 2021.
    """
    chosen = list(contenders)
    sizes = {contender.name: len(contender.settings) for contender in chosen}
    if not chosen or len(sizes) < len(chosen):
        raise ValueError(f"contenders must be of different names, got {[c.name for c in chosen]}")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"every contender must get as many settings, got {sizes}")
    if not seeds or tuning_seed in seeds:
        raise ValueError(
            f"seeds must be other than the tuning seed {tuning_seed}, got {tuple(seeds)}"
        )

    def run(contender: Contender, setting: Setting, seed: int) -> Trial:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build()
            optimizer = contender.make(model.parameters(), **setting)
            try:
                history = tuple(train(model, optimizer, seed))
                score = float(history[-1][metric])
            except FloatingPointError:
                history, score = (), math.nan
        if not math.isfinite(score):
            score = -math.inf if maximize else math.inf
        return Trial(contender.name, setting, seed, score, history)

    search, final = [], []
    for contender in chosen:
        trials = [run(contender, setting, tuning_seed) for setting in contender.settings]
        best = (max if maximize else min)(trials, key=lambda trial: trial.score)
        search += trials
        final += [run(contender, best.setting, seed) for seed in seeds]
    return OptimizerComparison(metric, maximize, tuple(search), tuple(final))


def _by_optimizer(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.optimizer, []).append(trial)
    return groups


def _edges(best: Setting, searched: Sequence[Trial]) -> Iterator[str]:
    for argument, value in best.items():
        values = {t.setting[argument] for t in searched}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if len(values) > 2 and numbers and value in (min(values), max(values)):
            yield argument


def _text(setting: Setting) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in setting.items()
    )
