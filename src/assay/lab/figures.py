"""Figures in Assay's style, as files that are the same whenever the figure is."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from assay.lab.result import write_atomically

FIGURE_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files, searchable, the reader's fonts
    "svg.hashsalt": "assay",  # the same figure gives the same file
    "figure.dpi": 100,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def subplots(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.6, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure in Assay's style with its axes, as `matplotlib.pyplot.subplots`; sizes in inches.

    Args:
        rows: of axes.
        columns: of axes.
        width: of the whole figure.
        height: of the whole figure.
        kwargs: for `Figure.subplots`.

    Example:
        >>> figure, axes = subplots(1, 2, width=8)
        >>> len(axes)
        2
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **kwargs)


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, atomically.

    Args:
        figure: to write.
        path: the file; its folder is made if need be.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(FIGURE_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Matplotlib ends lines with blanks; committed figures should not.
    write_atomically(path, re.sub(r"[ \t]+\n", "\n", buffer.getvalue()))


def write_png(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, atomically.

    Args:
        figure: to write.
        path: the file; its folder is made if need be.
        dpi: pixels an inch.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(FIGURE_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
