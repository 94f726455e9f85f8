"""Every test of data sets has a cache, an ASSAY_DATA and a memory of its own."""

import pytest

from assay.data import cache, catalogue


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    catalogue._decoded.cache_clear()
    yield tmp_path
    catalogue._decoded.cache_clear()
