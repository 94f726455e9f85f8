"""Where, when and with what a result is made."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

import assay
from assay.lab.result import Provenance

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "lightning-fabric", "numba")


def collect(device: torch.device, precision: str, started: datetime, seconds: float) -> Provenance:
    """Describe this machine, its packages and the work done.

    Args:
        device: that computed.
        precision: as Lightning Fabric names it.
        started: when the work began.
        seconds: that it took.

    Example:
        >>> from datetime import UTC, datetime
        >>> import torch
        >>> collect(torch.device("cpu"), "32-true", datetime.now(UTC), 1.0).device
        'cpu'
    """
    return Provenance(
        assay=assay.__version__,
        commit=_commit(),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in PACKAGES},
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=_device_name(device),
        precision=precision,
        started=started,
        seconds=round(seconds, 3),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of Assay's own checkout, with a mark if the tree differs; None elsewhere."""
    root = Path(assay.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "src"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
