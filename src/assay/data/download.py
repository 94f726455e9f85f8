"""Fetching files from a data set's own home: verified, atomic, never half a file."""

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from assay.data.entry import DataUnavailable, Remote
from assay.data.progress import byte_bar

TIMEOUT = 20.0  # seconds without a byte
CHUNK = 1 << 18


def offline() -> bool:
    """Whether the environment forbids downloads (`ASSAY_OFFLINE` set to anything but 0)."""
    return os.environ.get("ASSAY_OFFLINE", "") not in ("", "0")


def download(remote: Remote, folder: Path, progress: bool = True) -> Path:
    """Bring `remote` into `folder` and return its path.

    The addresses are tried in order. The file appears under its name only when it is complete
    and its MD5 is the published one, so an interrupted download leaves nothing behind.

    Raises:
        DataUnavailable: If no address gave the file; the message names each address and reason.
    """
    target = folder / remote.file
    failures = []
    for url in remote.urls:
        try:
            return _fetch(url, target, remote.md5, progress)
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            failures.append(f"{url}: {' '.join(str(reason).split())}")
    raise DataUnavailable(f"downloading {remote.file} failed ({'; '.join(failures)})")


def _fetch(url: str, target: Path, md5: str, progress: bool) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            received, expected, digest = _receive(url, stream, target.name, progress)
            stream.flush()
            os.fsync(stream.fileno())
        if expected is not None and received != expected:
            raise ValueError(f"interrupted after {received:,} of {expected:,} bytes")
        if digest != md5:
            raise ValueError(f"MD5 is {digest}, expected {md5}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _receive(url: str, stream, name: str, progress: bool) -> tuple[int, int | None, str]:
    digest, received = hashlib.md5(usedforsecurity=False), 0
    request = urllib.request.Request(url, headers={"User-Agent": "assay"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        expected = int(length) if length is not None else None
        with byte_bar(f"downloading {name}", expected, progress) as update:
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                update(received)
    return received, expected, digest.hexdigest()
