"""Reading and downloading the official files, against a server in this process."""

import gzip
import hashlib
import http.server
import itertools
import threading

import numpy as np
import pytest

from testtime._core.errors import InputError, RunError
from testtime.streams import fashion_mnist
from testtime.streams.data import labels_of, load_data
from testtime.streams.fashion_mnist import download, locate, read_split, split_files


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0)


PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
LABELS = np.array([2, 0, 1])
CONTENT = {
    name: idx(array)
    for split in ("train", "test")
    for name, array in zip(split_files(split), (PIXELS, LABELS), strict=True)
}


@pytest.fixture
def address(monkeypatch):
    """A server with small stand-ins for the four files, and their checksums in place."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path[1:])
            content = CONTENT.get(self.path[1:])
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    sums = {name: hashlib.md5(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(fashion_mnist, "CHECKSUMS", sums)
    url = f"http://127.0.0.1:{server.server_port}/"
    yield url, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_checks_and_reports_progress(address, tmp_path):
    url, asked = address
    name, calls = split_files("test")[0], []
    options = {"address": url, "on_progress": lambda *call: calls.append(call)}
    path = download(name, tmp_path / "new", **options)
    assert path.read_bytes() == CONTENT[name]
    size = len(CONTENT[name])
    assert calls[-1] == (name, size, size)
    assert all(a[1] < b[1] for a, b in itertools.pairwise(calls))
    download(name, tmp_path / "new", **options)
    assert asked == [name]  # kept, not fetched again


def test_a_wrong_checksum_leaves_nothing(address, tmp_path):
    name = split_files("test")[0]
    with pytest.raises(RunError, match=r"came with MD5 .*, expected 0000"):
        download(name, tmp_path, address=address[0], checksum="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checksum_keeps_the_old_file(address, tmp_path):
    name = split_files("test")[0]
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(RunError):
        download(name, tmp_path, address=address[0], checksum="0" * 32)
    assert (tmp_path / name).read_bytes() == b"old"


def test_a_broken_file_is_replaced(address, tmp_path):
    name = split_files("test")[0]
    (tmp_path / name).write_bytes(b"half")
    assert download(name, tmp_path, address=address[0]).read_bytes() == CONTENT[name]


@pytest.mark.parametrize("path", ["missing/", None])
def test_an_address_that_fails_says_what_to_do(address, tmp_path, path):
    url = address[0] + path if path else "http://127.0.0.1:9/"
    with pytest.raises(RunError, match=r"cannot download .* dataset-fashion-mnist"):
        download(split_files("test")[0], tmp_path, address=url)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_says_what_to_do(address, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*TESTTIME_DATA"):
        download(split_files("test")[0], tmp_path / "file" / "fashion-mnist", address=address[0])


def test_a_connection_that_breaks_leaves_nothing(address, tmp_path, monkeypatch):
    name = split_files("test")[0]
    whole = CONTENT[name]
    monkeypatch.setitem(CONTENT, name, whole[: len(whole) // 2])
    with pytest.raises(RunError, match="not kept"):
        download(name, tmp_path, address=address[0])
    assert list(tmp_path.iterdir()) == []


def test_load_data_downloads_where_nothing_is(address, tmp_path, monkeypatch):
    monkeypatch.setenv("TESTTIME_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", address[0])
    data = load_data("fashion-mnist")
    assert labels_of(data).tolist() == [2, 0, 1]
    assert np.array_equal(data.images[:, 0].numpy(), PIXELS)
    assert locate("test") == tmp_path / "fashion-mnist"
    assert sorted(address[1]) == sorted(split_files("test"))


def test_files_are_looked_for_in_order(tmp_path, monkeypatch):
    debian, cache = tmp_path / "debian", tmp_path / "cache"
    debian.mkdir()
    for name in split_files("train"):
        (debian / name).write_bytes(CONTENT[name])
    monkeypatch.delenv("TESTTIME_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", debian)
    assert locate("train") == debian
    own = cache / "testtime" / "fashion-mnist"
    own.mkdir(parents=True)
    for name in split_files("train"):
        (own / name).write_bytes(CONTENT[name])
    assert locate("train") == own


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        CONTENT["t10k-images-idx3-ubyte.gz"][:-20],
        gzip.compress(b"", mtime=0),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc", mtime=0),
        gzip.compress(b"\0\0\x0d\x01\0\0\0\x01a", mtime=0),
        idx(LABELS),
    ],
)
def test_broken_files_are_refused(tmp_path, content):
    images, labels = split_files("test")
    (tmp_path / labels).write_bytes(CONTENT[labels])
    (tmp_path / images).write_bytes(content)
    with pytest.raises(InputError):
        read_split(tmp_path, "test")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="t10k-images"):
        read_split(tmp_path, "test")
