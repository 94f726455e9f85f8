"""Decoded data sets on disk, so that images are decoded once on a machine.

A cache file is a convenience and never a necessity: one that is damaged, stale or cannot be
written is ignored, and the data is decoded from its source again.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import platformdirs

from assay.data.entry import Arrays, Found

# A change of how sources are decoded must change this, so that old files are not read.
VERSION = 1


def root() -> Path:
    """Return the folder in the platform's cache that holds downloads and decoded data."""
    return Path(platformdirs.user_cache_dir("assay")) / "data"


def checksum(arrays: Arrays) -> str:
    """SHA-256 of the inputs as stored, then the labels."""
    digest = hashlib.sha256(np.ascontiguousarray(arrays.x).data)
    digest.update(np.ascontiguousarray(arrays.y).data)
    return digest.hexdigest()


def path_of(name: str, split: str, found: Found) -> Path:
    """Return where the decoded form of a source belongs: its name is the source's own hash."""
    digest = hashlib.sha256(f"{VERSION} {name} {split}".encode())
    for file in found.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not found.files:
        digest.update(repr(found.identity).encode())
    return root() / "decoded" / f"{name}-{split}-{digest.hexdigest()[:24]}.safetensors"


def read(path: Path) -> tuple[Arrays, str] | None:
    """Return the arrays of a cache file and their checksum, or `None` if it cannot be trusted."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        arrays = Arrays(tensors["x"], tensors["y"], metadata["note"])
        found = checksum(arrays)
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    return (arrays, found) if found == metadata.get("checksum") else None


def write(path: Path, arrays: Arrays, digest: str) -> bool:
    """Write a cache file atomically; return whether that was possible."""
    from safetensors.numpy import save

    metadata = {"note": arrays.note, "checksum": digest}
    tensors = {"x": np.ascontiguousarray(arrays.x), "y": np.ascontiguousarray(arrays.y)}
    try:
        write_atomically(path, save(tensors, metadata))
    except OSError:
        return False
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that others see either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
