"""What a killed run needs to go on: finished stages and unfinished trainings, on disk."""

import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from assay.functional.training import Record
from assay.lab.result import file_name, write_atomically

T = TypeVar("T")
_PLAIN = (torch.Tensor, str, bytes, int, float, bool, type(None))


class Checkpoints:
    """A folder of checkpoints; every file is written whole or not at all.

    Args:
        folder: made when the first checkpoint is written.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Checkpoints(folder).stage("sum", lambda: 1 + 1)
        2
        >>> Checkpoints(folder).stage("sum", lambda: 1 / 0)  # read from disk
        2
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()
        self._started = time.perf_counter()
        self._before = 0.0

    def identity(self) -> dict[str, Any] | None:
        """What `begin` was given by the run that left these checkpoints; None if there are none."""
        try:
            return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def elapsed(self) -> float:
        """Seconds of work so far, those of earlier, killed runs up to their last checkpoint too."""
        return self._before + time.perf_counter() - self._started

    def count_on(self) -> None:
        """Begin at the time that an earlier, killed run has taken."""
        try:
            self._before = float((self.folder / "elapsed").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self._before = 0.0

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note which run these checkpoints belong to."""
        write_atomically(self.folder / "run.json", json.dumps(identity, indent=1))

    def discard(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def stage(self, name: str, function: Callable[[], T]) -> T:
        """See `assay.lab.Lab.stage`."""
        path = self._claim("stage", name)
        if not path.exists():
            value = function()
            _check_plain(value, name)
            self._save(path, value)
        return torch.load(path, weights_only=True)

    def save_training(
        self,
        name: str,
        parts: Mapping[str, Any],
        shuffler: torch.Generator | None,
        history: list[Record],
    ) -> None:
        """Write the state of a training after an epoch."""
        state = {
            "parts": {key: part.state_dict() for key, part in parts.items()},
            "shuffler": None if shuffler is None else shuffler.get_state(),
            "rng": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "history": [dict(record) for record in history],
        }
        self._save(self._path("fit", name), state)

    def load_training(
        self, name: str, parts: Mapping[str, Any], shuffler: torch.Generator | None
    ) -> list[Record]:
        """Put a training back to where its last checkpoint left it; its history so far."""
        path = self._claim("fit", name)
        if not path.exists():
            return []
        state = torch.load(path, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
        if shuffler is not None:
            shuffler.set_state(state["shuffler"])
        torch.set_rng_state(state["rng"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        return state["history"]

    def _save(self, path: Path, value: object) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        write_atomically(path, buffer.getvalue())
        write_atomically(self.folder / "elapsed", f"{self.elapsed():.3f}")

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{file_name(name)}.pt"

    def _claim(self, kind: str, name: str) -> Path:
        path = self._path(kind, name)
        if path.name in self._used:
            raise ValueError(f"{kind} {name!r} is used twice in one run; its name must be unique")
        self._used.add(path.name)
        return path


def _check_plain(value: object, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, name)
            _check_plain(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, name)
    elif not isinstance(value, _PLAIN) or type(value).__module__ == "numpy":
        raise TypeError(
            f"stage {name!r} returned a {type(value).__name__}; a stage may return tensors, "
            "numbers, strings, None, and lists, tuples and dicts of these"
        )
