"""The cache of decoded data: right, or ignored."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.data import cache
from assay.data.entry import Arrays, Found

ARRAYS = Arrays(
    np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4), np.array([1, 0]), "a note"
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "folder" / "toy.safetensors"
    assert cache.write(path, ARRAYS, cache.checksum(ARRAYS))
    return path


def test_round_trip(path):
    arrays, digest = cache.read(path)
    np.testing.assert_array_equal(arrays.x, ARRAYS.x)
    np.testing.assert_array_equal(arrays.y, ARRAYS.y)
    assert arrays.x.dtype == np.uint8
    assert arrays.note == "a note"
    assert digest == cache.checksum(ARRAYS)
    assert os.listdir(path.parent) == [path.name]


def test_any_changed_byte_of_the_arrays_is_noticed(path):
    content = bytearray(path.read_bytes())
    for position in (-1, -17, -40):
        damaged = content.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert cache.read(path) is None


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_shortened_file_is_ignored(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.read(path) is None


def test_a_missing_file_is_ignored(tmp_path):
    assert cache.read(tmp_path / "nothing") is None


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert not cache.write(tmp_path / "file" / "toy.safetensors", ARRAYS, "")


def test_an_interrupted_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    def stop(handle):
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.write_atomically(path, b"new")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_name_follows_the_content_of_the_source(tmp_path):
    def name(content, split="train"):
        file = tmp_path / "source"
        file.write_bytes(content)
        found = Found.at((file,), "a file", lambda progress: ARRAYS)
        return cache.path_of("toy", split, found)

    assert name(b"one") == name(b"one")
    assert len({name(b"one"), name(b"two"), name(b"one", "test")}) == 3


WRITER = """
import sys
from pathlib import Path
import numpy as np
from assay.data import cache
from assay.data.entry import Arrays
arrays = Arrays(np.full(200_000, 7, np.uint8), np.arange(10), "")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    assert cache.write(Path(sys.argv[1]), arrays, cache.checksum(arrays))
"""


@pytest.mark.processes
def test_two_processes_write_while_a_third_reads(tmp_path):
    path = tmp_path / "toy.safetensors"
    source = str(Path(cache.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        while not path.exists():
            assert any(writer.poll() is None for writer in writers)
        reads = [cache.read(path)]
        while any(writer.poll() is None for writer in writers):
            reads.append(cache.read(path))
    finally:
        for writer in writers:
            writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    # No reader ever saw half a file.
    assert all(read is not None and len(read[0].x) == 200_000 for read in reads)
    assert os.listdir(tmp_path) == [path.name]
