"""Many experiments at once: processes on this machine, or a Ray cluster."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from assay.lab.experiment import find_experiment
from assay.lab.result import Result, merge
from assay.lab.usage import UsageError


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Args:
        slug: of the paper.
        code: exit code of its process: 0 done, 1 an exact claim failed, others an error.
        message: its last line of error, if any.
    """

    slug: str
    code: int
    message: str = ""


def run_processes(slugs: Sequence[str], arguments: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """Run experiments in `jobs` processes at a time, threads shared out between them.

    Args:
        slugs: the papers.
        arguments: further arguments of `assay run` for each.
        jobs: processes at a time.

    Yields:
        An outcome for each, as they end. One that fails does not stop the others.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def run(slug: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "assay", "run", slug, "--quiet", *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        lines = done.stderr.strip().splitlines()
        return Outcome(slug, done.returncode, lines[-1] if done.returncode and lines else "")

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, slug) for slug in slugs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def run_on_ray(
    slugs: Sequence[str],
    address: str,
    *,
    preset: str,
    seeds: int | None,
    overrides: dict[str, str],
    output: Path,
) -> Iterator[Outcome]:
    """Run every experiment × seed as a task of a Ray cluster and merge the seeds.

    Args:
        slugs: the papers.
        address: of the cluster, `"auto"`, or `"local"` for one in this process.
        preset: as `assay run --preset`.
        seeds: how many; None takes each experiment's own number.
        overrides: as `assay run --set`.
        output: folder for the results, one below it a run; must be one that all nodes share.

    Yields:
        An outcome for each experiment.

    Raises:
        UsageError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'assay[cluster]'") from None
    ray.init(address=None if address == "local" else address, log_to_driver=False)
    try:
        task = ray.remote(max_retries=2)(_run_seed)
        pending = {}
        for slug in slugs:
            count = seeds or find_experiment(slug).seeds(preset)
            pending[slug] = [
                task.remote(slug, preset, seed, overrides, str(output)) for seed in range(count)
            ]
        for slug, references in pending.items():
            try:
                parts = [Result.model_validate_json(text) for text in ray.get(references)]
            except ray.exceptions.RayError as error:
                yield Outcome(slug, 70, str(error).strip().splitlines()[-1])
                continue
            result = merge(parts)
            folder = output / f"{slug}-{preset}"
            _adopt_files(result, output / f"{slug}-{preset}-seed{parts[0].seeds[0]}", folder)
            result.write(folder)
            yield Outcome(slug, 1 if result.failed_exact else 0)
    finally:
        ray.shutdown()


def _run_seed(slug: str, preset: str, seed: int, overrides: dict[str, str], output: str) -> str:
    from assay.lab.experiment import run_experiment

    result = run_experiment(
        find_experiment(slug),
        preset=preset,
        overrides=overrides,
        seeds=[seed],
        directory=Path(output) / f"{slug}-{preset}-seed{seed}",
        resume=True,
    )
    return json.dumps(result.model_dump(mode="json"))


def _adopt_files(result: Result, source: Path, folder: Path) -> None:
    for file in [figure.file for figure in result.figures] + [c.file for c in result.curves]:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((source / file).read_bytes())
