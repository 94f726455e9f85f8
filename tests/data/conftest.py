"""Every test of data sets has a cache, an ASSAY_DATA and a memory of its own."""

import os

import pytest

from assay.data import cache, catalogue

REAL_DATA = os.environ.get("ASSAY_DATA")


@pytest.fixture
def real_data():
    """Return the folder that ASSAY_DATA named before the tests hid it, or `None`."""
    return REAL_DATA


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    monkeypatch.setenv("ASSAY_OFFLINE", "1")
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    catalogue._decoded.cache_clear()
    yield tmp_path
    catalogue._decoded.cache_clear()
