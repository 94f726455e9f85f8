"""Shapes are checked at run time in every test; figures are drawn without a screen."""

import os
import pkgutil
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("ASSAY_OFFLINE", "1")

_SOURCE = Path(__file__).parents[1] / "src" / "assay"
# Numba compiles the kernels and Typer reads the annotations of the command line as they are.
_UNCHECKED = {"kernels", "cli", "__main__"}
_CHECKED = [
    f"assay.{module.name}"
    for module in pkgutil.iter_modules([str(_SOURCE)])
    if module.name not in _UNCHECKED
]
install_import_hook(_CHECKED, "runtime_checks.check")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from browsing import chromium, visits  # noqa: E402

# The same examples every time, and no clock: machines differ in speed, facts do not.
settings.register_profile("assay", deadline=None, derandomize=True, database=None)
settings.load_profile("assay")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Open the page of an address; it may log no error and ask for nothing from outside."""
    with visits(browser) as visit:
        yield visit
