"""Downloads against a real server on loopback that breaks off, stalls, refuses and lies."""

import hashlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tools.voxceleb.download import Access, DownloadError, fetch_all, is_verified


class Server:
    """Serves `files` on 127.0.0.1; `script` holds what to do with the next requests for bytes: a status, "drop" or "stall"."""

    def __init__(self, files, *, ranges=True, auth=None, script=(), rate=None, kind="application/zip", size=None):
        self.files, self.ranges, self.auth, self.script = files, ranges, auth, list(script)
        self.rate, self.kind, self.size = rate, kind, size
        self.requests, self.sent, self.lock, self.random = [], 0, threading.Lock(), random.Random(1)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        return Handler

    def answer(self, handler):
        name = handler.path.split("?")[0].rsplit("/", 1)[-1]
        asked = handler.headers.get("Range", "")
        with self.lock:
            self.requests.append((name, asked, handler.headers.get("Authorization"), handler.path))
            is_probe = asked == "bytes=0-0"
            deed = (
                self.script.pop(0) if self.script and not (is_probe and self.script[0] in ("drop", "stall")) else None
            )
        if self.auth and handler.headers.get("Authorization") != self.auth:
            deed = 401
        if name not in self.files:
            deed = deed or 404
        if isinstance(deed, int):
            handler.send_response(deed)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if isinstance(deed, str) and deed.startswith("http"):
            handler.send_response(302)
            handler.send_header("Location", deed)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._send(handler, self.files[name], asked, deed)

    def _send(self, handler, data, asked, deed):
        start, end = 0, len(data)
        total = self.size or len(data)
        if self.ranges and asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            if start >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{total}")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Type", self.kind)
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        if deed in ("drop", "stall"):
            end = self.random.randrange(start, end) if deed == "drop" else (start + end) // 2
        for at in range(start, end, 16384):
            piece = data[at : min(end, at + 16384)]
            try:
                handler.wfile.write(piece)
            except OSError:
                return
            with self.lock:
                self.sent += len(piece)
            time.sleep(len(piece) / self.rate if self.rate else 0)
        if deed == "stall":
            time.sleep(3)
        handler.close_connection = True


def made(**sizes):
    files = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
    return files, {name: hashlib.md5(data).hexdigest() for name, data in files.items()}


def access(server, **options):
    return Access(server.url, **{"first_pause": 0.01, "timeout": 5.0, "retries": 3} | options)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_come_whole_with_receipts_that_md5sum_accepts(tmp_path):
    files, md5s = made(a=300_000, b=1, c=50_000)
    with Server(files) as server:
        fetch_all(md5s, tmp_path, access(server))
        assert {name: (tmp_path / name).read_bytes() for name in files} == files
        assert leftovers(tmp_path) == ["a", "a.md5", "b", "b.md5", "c", "c.md5"]
        subprocess.run(["md5sum", "-c", "--quiet", "a.md5", "b.md5", "c.md5"], cwd=tmp_path, check=True)
        before = len(server.requests)
        fetch_all(md5s, tmp_path, access(server))
        assert len(server.requests) == before, "what is there is not asked for again"


def test_dropped_connections_go_on_at_the_byte_where_they_broke(tmp_path):
    files, md5s = made(a=2_000_000, b=1_000_000)
    with Server(files, script=["drop"] * 12) as server:
        fetch_all(md5s, tmp_path, access(server))
        assert {name: (tmp_path / name).read_bytes() for name in files} == files
        assert any(asked not in ("bytes=0-0", "bytes=0-") for _, asked, _, _ in server.requests)
        assert server.sent < 1.3 * 3_000_000, "bytes that had come were not sent again"


def test_server_without_ranges_begins_anew_and_ends_right(tmp_path):
    files, md5s = made(a=500_000)
    (tmp_path / "a.partial").write_bytes(b"x" * 1000)
    with Server(files, ranges=False, script=["drop"] * 2) as server:
        fetch_all(md5s, tmp_path, access(server, retries=5))
    assert (tmp_path / "a").read_bytes() == files["a"]


def test_server_without_ranges_that_always_breaks_off_is_given_up(tmp_path):
    files, md5s = made(a=500_000)
    with Server(files, ranges=False, script=["drop"] * 200) as server, pytest.raises(DownloadError) as error:
        fetch_all(md5s, tmp_path, access(server, retries=2))
    assert "gave up after 3 tries without a new byte" in str(error.value) and "run the same command again" in str(
        error.value
    )
    assert leftovers(tmp_path) == ["a.partial"]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "refused the user and password (HTTP 401)"),
        (403, "(HTTP 403); ask the data's owners"),
        (404, "no such file"),
    ],
)
def test_refusals_stop_at_once_with_a_clear_word_and_no_secret(tmp_path, status, text):
    files, md5s = made(a=1000, b=1000)
    with Server(files, script=[status] * 9) as server, pytest.raises(DownloadError) as error:
        fetch_all(md5s, tmp_path, access(server, user="me", password="hush-hush"), parallel=1)
    assert text in str(error.value) and "hush" not in str(error.value)
    assert len(server.requests) <= 2 and leftovers(tmp_path) == []


def test_busy_server_is_asked_again_and_a_broken_one_given_up(tmp_path):
    files, md5s = made(a=1000)
    with Server(files, script=[500, 503, 429]) as server:
        fetch_all(md5s, tmp_path, access(server))
    assert (tmp_path / "a").read_bytes() == files["a"]
    with (
        Server(files, script=[500] * 20) as server,
        pytest.raises(DownloadError, match="gave up after 4 tries .* HTTP 500"),
    ):
        fetch_all(md5s, tmp_path / "other", access(server))


def test_stalled_connection_is_left_and_taken_up_again(tmp_path):
    files, md5s = made(a=400_000)
    with Server(files, script=["stall"]) as server:
        fetch_all(md5s, tmp_path, access(server, timeout=0.3))
        assert server.sent < 500_000
    assert (tmp_path / "a").read_bytes() == files["a"]


def test_wrong_md5_is_tried_twice_and_leaves_nothing(tmp_path):
    files, _ = made(a=1000)
    with Server(files) as server, pytest.raises(DownloadError) as error:
        fetch_all({"a": "0" * 32}, tmp_path, access(server))
    assert f"md5 {hashlib.md5(files['a']).hexdigest()} of 1000 bytes, expected {'0' * 32}, twice" in str(error.value)
    assert leftovers(tmp_path) == []


def test_damaged_partial_file_is_fetched_anew(tmp_path):
    files, md5s = made(a=100_000)
    (tmp_path / "a.partial").write_bytes(b"x" * 40_000)
    with Server(files) as server:
        fetch_all(md5s, tmp_path, access(server))
    assert (tmp_path / "a").read_bytes() == files["a"]


@pytest.mark.parametrize("extra", [0, 5])
def test_partial_file_at_least_as_long_as_the_real_one_ends_right(tmp_path, extra):
    files, md5s = made(a=100_000)
    (tmp_path / "a.partial").write_bytes(files["a"] + b"x" * extra)
    with Server(files) as server:
        fetch_all(md5s, tmp_path, access(server))
        assert server.sent < (100 if extra == 0 else 110_000)
    assert (tmp_path / "a").read_bytes() == files["a"]


def test_full_disk_shows_before_anything_is_fetched(tmp_path):
    files, md5s = made(a=1000)
    with (
        Server(files, size=10**15) as server,
        pytest.raises(DownloadError, match="1000000.00 GB are still to come, .* GB are free"),
    ):
        fetch_all(md5s, tmp_path, access(server))
    assert leftovers(tmp_path) == [] and all(asked == "bytes=0-0" for _, asked, _, _ in server.requests)


def test_web_page_in_place_of_a_file_is_told_apart(tmp_path):
    files, md5s = made(a=1000)
    with (
        Server(files, kind="text/html; charset=utf-8") as server,
        pytest.raises(DownloadError, match="a web page came instead"),
    ):
        fetch_all(md5s, tmp_path, access(server))


def test_file_addresses_work_and_name_what_is_missing(tmp_path):
    files, md5s = made(a=100_000)
    (tmp_path / "from here").mkdir()
    (tmp_path / "from here" / "a").write_bytes(files["a"])
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "a.partial").write_bytes(files["a"][:500])
    there = Access((tmp_path / "from here").as_uri())
    fetch_all(md5s, tmp_path / "to", there)
    assert (tmp_path / "to" / "a").read_bytes() == files["a"]
    with pytest.raises(DownloadError, match="/b: No such file"):
        fetch_all({"b": "0" * 32}, tmp_path / "to", there)


def test_other_file_under_the_name_is_neither_trusted_nor_overwritten(tmp_path):
    files, md5s = made(a=1000)
    (tmp_path / "a").write_bytes(b"mine")
    with Server(files) as server, pytest.raises(DownloadError, match="move it away"):
        fetch_all(md5s, tmp_path, access(server))
    assert (tmp_path / "a").read_bytes() == b"mine"
    (tmp_path / "a").write_bytes(files["a"])
    assert is_verified(tmp_path / "a", md5s["a"]) and (tmp_path / "a.md5").exists()


def test_second_download_of_the_same_file_is_refused(tmp_path):
    files, md5s = made(a=400_000)
    with Server(files, rate=400_000) as server:
        first = threading.Thread(target=fetch_all, args=(md5s, tmp_path, access(server)))
        first.start()
        while not (tmp_path / "a.partial").exists():
            time.sleep(0.01)
        with pytest.raises(DownloadError, match="being written by another download"):
            fetch_all(md5s, tmp_path, access(server))
        first.join()
    assert (tmp_path / "a").read_bytes() == files["a"]


def test_password_follows_no_redirect_to_another_host(tmp_path):
    files, md5s = made(a=1000)
    with Server(files) as other, Server(files) as server:
        elsewhere = f"http://localhost:{other.port}/a"
        server.script = [elsewhere, elsewhere]
        fetch_all(md5s, tmp_path, access(server, user="me", password="hush-hush"))
        assert all(given for _, _, given, _ in server.requests)
        assert len(other.requests) == 2 and not any(given for _, _, given, _ in other.requests)


def test_certificates_are_verified_and_nothing_is_taken_from_https_to_http(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    files, md5s = made(a=1000)
    with Server(files) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
        with pytest.raises(DownloadError, match="the certificate is not valid"):
            fetch_all(md5s, tmp_path, Access(f"https://localhost:{server.port}"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        server.script = [f"http://localhost:{server.port}/a"]
        with pytest.raises(DownloadError, match="localhost redirects from https to http://localhost; refused"):
            fetch_all(md5s, tmp_path, Access(f"https://localhost:{server.port}"))
        fetch_all(md5s, tmp_path, Access(f"https://localhost:{server.port}"))
        assert (tmp_path / "a").read_bytes() == files["a"]


def test_addresses_carry_key_and_name_where_they_belong_and_are_shown_without():
    assert Access("http://h/d/", key="k&1").url("a b") == "http://h/d/a%20b?key=k%261"
    assert Access("http://h/get?key={key}&file={file}", key="K").url("a") == "http://h/get?key=K&file=a"
    assert Access("http://h/{key}/d", key="K").shown("a") == "http://h/KEY/d/a"
    assert Access("http://h/get?key={key}&file={file}", key="K").shown("a") == "http://h/get"
    assert "hush" not in repr(Access("http://h", password="hush", key="hush"))
    with pytest.raises(DownloadError, match="asks for a key"):
        Access("http://h/{key}/{file}").url("a")
    with pytest.raises(DownloadError, match="expected http://, https:// or file://"):
        Access("ftp://h").check()
    with pytest.raises(DownloadError, match="give --user and --password"):
        Access("https://me:hush@h/").check()


def test_wrong_addresses_are_told_soon_and_without_the_key(tmp_path):
    with pytest.raises(DownloadError) as error:
        fetch_all({"a": "0" * 32}, tmp_path, Access("http://127.0.0.1:9/a b/{file}?key={key}", key="hush-hush"))
    assert "not a valid address" in str(error.value) and "hush" not in str(error.value)
    with pytest.raises(DownloadError, match="gave up after 4 tries .* refused"):
        fetch_all({"a": "0" * 32}, tmp_path, Access(f"http://127.0.0.1:{closed_port()}", first_pause=0.01))


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
