"""Downloads against a server on this machine: whole and verified, or not at all."""

import hashlib
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from assay.data import DataUnavailable, cache, catalogue, load
from assay.data.download import download, offline
from assay.data.entry import Remote
from assay.data.progress import track
from dataset_files import idx_bytes

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    """/whole, /half (stops early), /chunks (no length), and what a test puts into `files`."""

    files: ClassVar[dict[str, bytes]] = {}
    log: ClassVar[list[str]] = []

    def do_GET(self):
        self.log.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        content = self.files.get(name, CONTENT)
        if name == "missing":
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        if name != "chunks":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name == "half" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Handler, "files", {})
    monkeypatch.setattr(Handler, "log", [])
    monkeypatch.delenv("ASSAY_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def remote(*urls, content=CONTENT):
    return Remote("file.bin", md5(content), urls)


@pytest.mark.parametrize("address", ["whole", "chunks"])
def test_a_good_file_arrives_whole(server, tmp_path, address):
    path = download(remote(f"{server}/{address}"), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("half", r"interrupted after 512,000 of 1,024,000 bytes"),
        ("missing", "Not Found"),
        ("other", "MD5 is .*, expected"),
    ],
)
def test_a_bad_file_leaves_nothing_and_says_why(server, tmp_path, address, reason):
    Handler.files = {"other": b"something else"}
    with pytest.raises(DataUnavailable, match=rf"file\.bin failed .*/{address}: {reason}") as error:
        download(remote(f"{server}/{address}"), tmp_path / "in")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "in").iterdir()) == []


def test_the_next_address_is_tried(server, tmp_path):
    addresses = [f"{server}/missing", "http://127.0.0.1:9/refused", f"{server}/half"]
    path = download(remote(*addresses, f"{server}/whole"), tmp_path)
    assert path.read_bytes() == CONTENT
    assert Handler.log == ["/missing", "/half", "/whole"]


def test_an_unreachable_home_is_one_line(tmp_path):
    with pytest.raises(DataUnavailable, match=r"127\.0\.0\.1:9/x: .*refused"):
        download(remote("http://127.0.0.1:9/x"), tmp_path)


def test_an_interruption_by_the_user_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr("assay.data.download.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(remote(f"{server}/whole"), tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == []


def test_a_damaged_download_does_not_replace_a_file(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"old")
    with pytest.raises(DataUnavailable):
        download(remote(f"{server}/half"), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"old"


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_offline_follows_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("ASSAY_OFFLINE", value)
    assert offline() is expected


def test_bars_appear_on_a_terminal_only(server, tmp_path, monkeypatch, capfd):
    fetch = partial(download, remote(f"{server}/whole"))
    assert list(track("abc", "decoding", progress=True)) == ["a", "b", "c"]
    fetch(tmp_path / "quiet")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    assert list(track("abc", "decoding", progress=True)) == ["a", "b", "c"]
    fetch(tmp_path / "loud")
    shown = capfd.readouterr().err
    assert "decoding" in shown
    assert "downloading file.bin" in shown
    fetch(tmp_path / "asked", progress=False)
    assert capfd.readouterr().err == ""


@pytest.fixture
def toy(server, monkeypatch):
    """MNIST with ten training and five test images, at home on this machine."""
    entry = catalogue.ENTRIES["mnist"]
    rng = np.random.default_rng(0)
    remotes = {}
    for split, size, prefix in (("train", 10, "train"), ("test", 5, "t10k")):
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        files = {
            f"{prefix}-images-idx3-ubyte.gz": idx_bytes(images),
            f"{prefix}-labels-idx1-ubyte.gz": idx_bytes(np.arange(size, dtype=np.uint8)),
        }
        Handler.files |= files
        remotes[split] = tuple(
            Remote(name, md5(content), (f"{server}/{name}",)) for name, content in files.items()
        )
    about = replace(entry.about, sizes={"train": 10, "test": 5}, home="https://home.example")
    entry = replace(entry, about=about, remotes=remotes)
    monkeypatch.setitem(catalogue.ENTRIES, "mnist", entry)
    return entry


def test_load_downloads_once_and_works_offline_afterwards(toy, monkeypatch):
    train = load("mnist")
    assert train.y.tolist() == list(range(10))
    assert train.source == "IDX files in the cache, from https://home.example"
    assert len(Handler.log) == 2
    monkeypatch.setenv("ASSAY_OFFLINE", "1")
    catalogue._decoded.cache_clear()
    assert load("mnist").checksum == train.checksum
    assert len(Handler.log) == 2
    with pytest.raises(DataUnavailable, match=r"test split of mnist .* ASSAY_OFFLINE"):
        load("mnist", "test")


def test_load_fetches_only_what_is_missing(toy):
    folder = cache.root() / "mnist"
    folder.mkdir(parents=True)
    name = toy.remotes["test"][0].file
    (folder / name).write_bytes(Handler.files[name])
    assert len(load("mnist", "test")) == 5
    assert Handler.log == [f"/{toy.remotes['test'][1].file}"]


def test_load_tells_a_failed_download_in_one_line(toy):
    Handler.files[toy.remotes["train"][1].file] = b"an error page"
    with pytest.raises(DataUnavailable, match=r"MD5 .* put http.* set ASSAY_DATA") as error:
        load("mnist")
    assert "\n" not in str(error.value)
    assert [file.name for file in (cache.root() / "mnist").iterdir()] == [
        toy.remotes["train"][0].file
    ]


def test_load_obeys_download_false(toy):
    with pytest.raises(DataUnavailable, match="download=False forbids"):
        load("mnist", download=False)
    assert Handler.log == []


def test_a_cache_that_cannot_be_written_is_told(toy, tmp_path):
    (tmp_path / "assay").write_bytes(b"")  # a file where the cache folder should be
    with pytest.raises(DataUnavailable, match=r"downloading .* failed"):
        load("mnist")
