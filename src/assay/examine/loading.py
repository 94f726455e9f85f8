"""The user's own code and files: models, data and adapters named on the command line."""

import contextlib
import importlib
import importlib.util
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay import data as named
from assay.data import ImageFolder
from assay.data.image_folder import pixels, read_image
from assay.examine.sources import Data, as_data
from assay.examine.subject import Program
from assay.lab.usage import UsageError, unknown


def load_callable(spec: str, purpose: str) -> Callable:
    """What `FILE.py:NAME` or `package.module:NAME` names.

    The folder of a file is importable while it is read, as for a script.

    Args:
        spec: where it is.
        purpose: what the user gave it as, for the messages.

    Raises:
        UsageError: if there is no such file, module or callable, or reading it fails.

    Example:
        >>> from assay.examine.loading import load_callable
        >>> load_callable("torch.nn:Identity", "model")().__class__.__name__
        'Identity'
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(
            f"{purpose} {spec!r}: give FILE.py:NAME or package.module:NAME, e.g. model.py:build"
        )
    module = _module(place, purpose)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(found).items()
                      if callable(value) and not key.startswith("_")]  # fmt: skip
            said = unknown("callable", name, public or ["none"], of=place)
            raise UsageError(f"{purpose}: {said}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{purpose}: {spec} is not a callable but of type {type(found).__name__}")
    return found


def _module(place: str, purpose: str) -> Any:
    path = Path(place)
    is_file = path.suffix == ".py" or path.exists()
    if is_file and not path.is_file():
        raise UsageError(f"{purpose}: there is no file {place}")
    folder = str(path.resolve().parent) if is_file else str(Path.cwd())
    with _importable(folder):
        try:
            if not is_file:
                return importlib.import_module(place)
            name = f"assay_user_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise UsageError(f"{purpose}: {place} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # what is defined there can be pickled
            spec.loader.exec_module(module)
            return module
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{purpose}: reading {place} fails: {_said(error)}") from error


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_model(spec: str, weights: Path | None = None, device: str = "auto") -> nn.Module:
    """A model from a callable, or from an exported program.

    Args:
        spec: `FILE.py:NAME` or `package.module:NAME`, called without arguments; or a `.pt2` file.
        weights: a state dict as safetensors or as a checkpoint that `torch.load` reads with
            `weights_only=True`; a checkpoint may hold it under `state_dict`, `model` or
            `model_state_dict`.
        device: where to put it; `"auto"` leaves it where it is.

    Raises:
        UsageError: one line on what is wrong: the file, the callable, what it returned, a weight
            that does not fit.
    """
    if spec.endswith(".pt2"):
        model = _program(Path(spec))
    else:
        build = load_callable(spec, "model")
        try:
            model = build()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"model: calling {spec} fails: {_said(error)}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"model: {spec} returned no torch.nn.Module but an object of type "
                f"{type(model).__name__}"
            )
    if weights is not None:
        _load_weights(model, weights)
    if device != "auto":
        try:
            model = model.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r}: {_said(error)}") from error
    return model


def _program(path: Path) -> nn.Module:
    if not path.is_file():
        raise UsageError(f"model: there is no file {path}")
    try:
        return Program(torch.export.load(path))
    except Exception as error:
        raise UsageError(f"model: {path} is not an exported program: {_said(error)}") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"weights: {path} cannot be read: {_said(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"weights: {path} holds no state dict")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UsageError(f"weights: {path} does not fit the model: {lines[0]}{more}") from error


def load_data(spec: str) -> Any:
    """Data from a callable, a file, a folder or a name.

    Args:
        spec: `FILE.py:NAME` or `package.module:NAME`, called without arguments, which returns
            `(train, test)`, a mapping with `train`, `test`, `classes`, or an
            `assay.examine.Data`; an `.npz` file with `x_train`, `y_train` and perhaps `x_test`,
            `y_test`, `classes`; a folder of images `train/CLASS/*.png` (and `test/…`), or
            `CLASS/*.png`; a Hugging Face dataset folder of Parquet or Arrow files; or the name of
            one of Assay's data sets.

    Raises:
        UsageError: one line on what is wrong.
        DataUnavailable: if one of Assay's data sets cannot be had, or a folder holds no images.

    Example:
        >>> from assay.examine.loading import load_data
        >>> load_data("digits").name
        'digits'
    """
    path = Path(spec)
    if spec in named.names():
        return as_data(spec)
    if path.suffix == ".npz":
        return _npz(path)
    if path.is_dir():
        return _folder(path)
    if ":" in spec:
        function = load_callable(spec, "data")
        try:
            return function()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"data: calling {spec} fails: {_said(error)}") from error
    if path.exists():
        raise UsageError(f"data: {spec} is neither a folder nor an .npz file")
    raise UsageError(
        f"data: {unknown('data set', spec, named.names())} "
        "(or FILE.py:NAME, an .npz file, a folder)"
    )


def _npz(path: Path) -> Data:
    if not path.is_file():
        raise UsageError(f"data: there is no file {path}")
    try:
        # Opened here: numpy leaves a damaged archive open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"data: {path} cannot be read: {_said(error)}") from error
    train = _pair(arrays, "x_train", "y_train") or _pair(arrays, "x", "y")
    if train is None:
        raise UsageError(
            f"data: {path} holds {', '.join(arrays) or 'nothing'}; it must hold x_train and "
            "y_train (or x and y), and may hold x_test, y_test and classes"
        )
    classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    return Data(train, _pair(arrays, "x_test", "y_test"), classes, path.stem)


def _pair(arrays: dict[str, np.ndarray], x: str, y: str) -> tuple[Tensor, Tensor] | None:
    if x not in arrays or y not in arrays:
        return None
    for name in (x, y):
        if arrays[name].dtype.kind not in "buif":
            raise UsageError(
                f"data: {name} must hold numbers, got {arrays[name].dtype}; labels are class "
                "indices, whose names are in classes"
            )
    return torch.as_tensor(arrays[x]), torch.as_tensor(arrays[y])


def _folder(path: Path) -> Data:
    tables = {
        split: sorted([*path.rglob(f"{split}*.parquet"), *path.glob(f"{split}*/*.arrow")])
        for split in ("train", "test", "validation")
    }
    if tables["train"]:
        return _tables(path, tables["train"], tables["test"] or tables["validation"])
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / name for name in ("test", "val", "valid", "validation")
                 if (path / name).is_dir()), None)  # fmt: skip
    if train == path:
        test = None
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    if not classes:
        raise UsageError(
            f"data: {path} holds neither train*.parquet nor folders of images, one a class"
        )
    return Data(
        ImageFolder(train, classes),
        ImageFolder(test, classes) if test else None,
        classes,
        path.name,
    )


class TableDataset(torch.utils.data.Dataset):
    """Rows of Parquet or Arrow files with a column of inputs and one of labels.

    Args:
        table: from `pyarrow`.
        source: for the messages.

    Raises:
        UsageError: if there is no such column.
    """

    INPUTS = ("image", "img", "pixel_values", "x", "input", "features")
    LABELS = ("label", "labels", "y", "target", "fine_label")

    def __init__(self, table: Any, source: Path) -> None:
        names = table.column_names
        self.input = next((name for name in self.INPUTS if name in names), None)
        label = next((name for name in self.LABELS if name in names), None)
        if self.input is None or label is None:
            raise UsageError(
                f"data: {source} has the columns {', '.join(names)}; it needs one of "
                f"{', '.join(self.INPUTS)} and one of {', '.join(self.LABELS)}"
            )
        self.table = table
        self.targets = table.column(label).to_numpy()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        import io

        value = self.table.column(self.input)[index].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return pixels(read_image(io.BytesIO(value))), self.targets[index]
        if isinstance(value, str):
            return pixels(read_image(value)), self.targets[index]
        return torch.as_tensor(np.asarray(value, dtype=np.float32)), self.targets[index]


def _tables(folder: Path, train: list[Path], test: list[Path]) -> Data:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise UsageError("dataset folders need pyarrow: pip install 'assay[data]'") from None

    def read(path: Path) -> Any:
        try:
            if path.suffix == ".parquet":
                return parquet.read_table(path, memory_map=True)
            with pyarrow.memory_map(str(path)) as source:
                return ipc.open_stream(source).read_all()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UsageError(f"data: {path} cannot be read: {_said(error)}") from error

    def join(paths: list[Path]) -> TableDataset | None:
        if not paths:
            return None
        return TableDataset(pyarrow.concat_tables([read(path) for path in paths]), paths[0])

    return Data(join(train), join(test), None, folder.name)
