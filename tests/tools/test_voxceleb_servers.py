"""Servers that echo secrets, answer in no known form, or never end: one sentence, nothing of ours in it, no full disk."""

import base64
import contextlib
import shutil
import socket
import threading
import urllib.parse
from types import SimpleNamespace

import pytest

from tools.voxceleb.access import Access
from tools.voxceleb.download import DownloadError, fetch_all


class Odd:
    """A server on loopback whose every answer is the given bytes; `again`: sent over and over until nobody listens."""

    def __init__(self, answer: bytes, again: bytes = b""):
        self.answer, self.again = answer, again
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.socket.close()

    def serve(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.reply, args=(client,), daemon=True).start()

    def reply(self, client):
        with client, contextlib.suppress(OSError):
            asked = client.recv(65536).decode("latin-1")
            path = asked.split()[1]
            secret = next((line.split()[-1] for line in asked.splitlines() if line.startswith("Authorization")), "")
            client.sendall(self.answer.replace(b"PATH", path.encode()).replace(b"SECRET", secret.encode()))
            while self.again:
                client.sendall(self.again)


KEY, PASSWORD = "k3y/with+odd&signs", "pa ss\u00e9word"
ECHOES = {
    "a reason phrase": b"HTTP/1.1 418 you sent PATH and SECRET\r\nContent-Length: 0\r\n\r\n",
    "a refused redirect": b"HTTP/1.1 302 Found\r\nLocation: gopher://PATH.SECRET/\r\nContent-Length: 0\r\n\r\n",
    "a redirect to ftp": b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1PATH?SECRET\r\nContent-Length: 0\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[PATH\r\nContent-Length: 0\r\n\r\n",
    "a status line that is none": b"PATH SECRET \xff\x1b[31m\r\n\r\n",
    "control characters": b"HTTP/1.1 418 \x1b]0;title\x07 \xe2\x80\xae PATH\r\nContent-Length: 0\r\n\r\n",
    "a redirect in a circle": b"HTTP/1.1 302 Found\r\nLocation: PATH\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("case", ECHOES)
def test_a_server_that_echoes_secrets_or_odd_text_gets_them_into_no_message(tmp_path, case, capsys):
    with Odd(ECHOES[case]) as server:
        asked = Access(server.url, "me", PASSWORD, KEY, timeout=2, retries=0, first_pause=0.01)
        with pytest.raises(DownloadError) as caught:
            fetch_all({"a.zip": "0" * 32}, tmp_path, asked)
    said = str(caught.value) + capsys.readouterr().err
    token = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    for secret in (KEY, PASSWORD, token, urllib.parse.quote(KEY, safe=""), urllib.parse.quote(PASSWORD)):
        assert secret not in said
    assert said.isascii() and not any(ord(c) < 32 and c not in "\r\n" for c in said)


HEADERS = {
    "Retry-After of another script": b"HTTP/1.1 503 busy\r\nRetry-After: \xc2\xb2\r\nContent-Length: 0\r\n\r\n",
    "Retry-After without end": b"HTTP/1.1 503 busy\r\nRetry-After: " + b"9" * 400 + b"\r\nContent-Length: 0\r\n\r\n",
    "Content-Length of letters": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
    "negative Content-Length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    "Content-Range of letters": b"HTTP/1.1 206 Partial\r\nContent-Range: bytes a-b/c\r\nContent-Length: 3\r\n\r\nabc",
    "Content-Range far away": b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 900-902/903\r\nContent-Length: 3\r\n\r\nabc",
    "416 of letters": b"HTTP/1.1 416 no\r\nContent-Range: bytes */x\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"",
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
}


@pytest.mark.parametrize("case", HEADERS)
def test_odd_headers_are_refused_in_one_sentence(tmp_path, case):
    with Odd(HEADERS[case]) as server:
        asked = Access(server.url, timeout=2, retries=1, first_pause=0.01)
        (tmp_path / "a.zip.partial").write_bytes(b"xy")
        with pytest.raises(DownloadError):
            fetch_all({"a.zip": "0" * 32}, tmp_path, asked)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.timeout(60)
def test_a_body_without_an_end_is_cut_off_and_nothing_of_it_kept(tmp_path):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/zip\r\n\r\n"
    with Odd(head, b"x" * 65536) as server:
        asked = Access(server.url, timeout=2, retries=0, first_pause=0.01, largest=3 << 20)
        with pytest.raises(DownloadError, match=r"\d+ bytes came, 3145728 were expected; nothing of it was kept"):
            fetch_all({"a.zip": "0" * 32}, tmp_path, asked)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


def test_a_body_of_unknown_length_leaves_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/zip\r\n\r\n"
    with Odd(head, b"x" * 65536) as server:
        asked = Access(server.url, timeout=2, retries=0, first_pause=0.01)
        with pytest.raises(DownloadError, match="the disk is nearly full and the server tells no length"):
            fetch_all({"a.zip": "0" * 32}, tmp_path, asked)
