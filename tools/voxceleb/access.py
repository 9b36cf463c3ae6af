"""Who asks for a file, where, and what a server may answer: addresses, secrets, redirects, odd headers.

Names of users, passwords and keys are sent to the host that was asked for and nowhere else: not along a redirect to another host, not
into messages, even where the server echoes them (Access.clean). Certificates are always verified.

    stream, first, total = open_file(Access("https://host/folder", user="me", password=secret), "a.zip", 0)
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

from tqdm import tqdm

from shards.errors import UserError

LONGEST_QUOTE = 200  # characters of a server's own words in a message
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers after which another try makes sense


class DownloadError(UserError):
    """What was found, what was expected, what to do. Never holds a secret."""


class Interrupted(Exception):
    """The connection ended, stalled or answered that it is busy: try again. Its argument says which."""


@dataclass(frozen=True)
class Access:
    """Where files come from and who asks.

    base_url: `https://host/folder`, or with `{file}` (and `{key}`) where the name (and the key) belong.
    """

    base_url: str
    user: str = ""
    password: str = field(default="", repr=False)
    key: str = field(default="", repr=False)
    timeout: float = 60.0  # seconds without a byte
    retries: int = 8  # tries in a row that bring nothing
    first_pause: float = 1.0  # seconds before the second try; each further pause is twice as long
    largest: int = 256 << 30  # bytes of a file, where the server does not say how long it is: a body may have no end

    def url(self, name: str) -> str:
        if "{key}" in self.base_url and not self.key:
            raise DownloadError(f"{self.base_url} asks for a key: give --key, or set VOXCELEB_KEY")
        quoted, key = urllib.parse.quote(name), urllib.parse.quote(self.key, safe="")
        if "{file}" in self.base_url:
            return self.base_url.replace("{file}", quoted).replace("{key}", key)
        url = self.base_url.replace("{key}", key).rstrip("/") + "/" + quoted
        return f"{url}?key={key}" if self.key and "{key}" not in self.base_url else url

    def shown(self, name: str) -> str:
        """The address without its query and without a user, for people."""
        parts = urllib.parse.urlsplit(Access(self.base_url.replace("{key}", "KEY")).url(name))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def clean(self, text: object) -> str:
        """Foreign text for people: printable ASCII, short, and without our secrets in whatever form it echoes them."""
        told = str(text)
        basic = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        for secret in filter(None, (self.key, self.password, basic if self.user or self.password else "", self.user)):
            forms = {secret, *(quote(secret) for quote in (urllib.parse.quote, urllib.parse.quote_plus))}
            forms |= {
                urllib.parse.quote(secret, safe=""),
                repr(secret)[1:-1],
                ascii(secret)[1:-1],
                secret.encode().hex(),
            }
            for form in sorted(forms, key=len, reverse=True):
                told = re.sub(re.escape(form), "***", told, flags=re.IGNORECASE)
        return ascii(told)[1:-1][:LONGEST_QUOTE]

    def check(self) -> None:
        """Raises DownloadError where the address cannot work, warns of a password that travels in the clear."""
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https", "file"):
            raise DownloadError(f"found the address {parts.scheme}:..., expected http://, https:// or file://")
        if "@" in parts.netloc:
            raise DownloadError(
                "the address holds a user or password: give --user and --password (or be asked) instead"
            )
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme == "http" and not local and (self.password or self.key):
            tqdm.write(
                f"{parts.hostname}: the password or key travels unencrypted over http; use https if the host offers it",
                file=sys.stderr,
            )


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url):
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(new_url)
        if new.scheme not in ("http", "https"):
            raise DownloadError(f"{old.hostname} redirects to {ascii(new.scheme)}, expected http or https; refused")
        if old.scheme == "https" and new.scheme != "https":
            raise DownloadError(
                f"{old.hostname} redirects from https to {new.scheme}://{ascii(new.hostname)[1:-1]}; refused"
            )
        redirected = super().redirect_request(request, file, code, message, headers, new_url)
        if redirected and old.netloc == new.netloc and request.has_header("Authorization"):
            redirected.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return redirected


def _number(text: str | None) -> int | None:
    """A number as headers have it; None for anything else (`int` takes `-1`, `1_000` and digits of other scripts)."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


OPENER = urllib.request.build_opener(_SameHostRedirects)


def open_file(access: Access, name: str, start: int, end: int | None = None):
    """(stream, first byte, total bytes or None) of a file from byte `start`. Raises Interrupted or DownloadError."""
    url = access.url(name)
    if url.startswith("file:"):
        return _open_file(access, name, url, start)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "spknet"})
    request.add_header("Range", f"bytes={start}-{'' if end is None else end}")
    if access.user or access.password:
        token = base64.b64encode(f"{access.user}:{access.password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # plain headers follow every redirect
    try:
        answer = OPENER.open(request, timeout=access.timeout)
    except urllib.error.HTTPError as error:
        with error:
            return _refused(access, name, start, error)
    except DownloadError as error:  # a refused redirect, which may name what we sent
        raise DownloadError(access.clean(error)) from None
    except (http.client.InvalidURL, ValueError):  # its text holds the whole address, key and all
        raise DownloadError(
            f"{access.shown(name)}: not a valid address, or a redirect to one; is --base-url right?"
        ) from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if "CERTIFICATE_VERIFY_FAILED" in str(reason):
            raise DownloadError(
                f"{access.shown(name)}: the certificate is not valid ({access.clean(reason)})"
            ) from None
        raise Interrupted(access.clean(reason) or type(error).__name__) from None
    if answer.headers.get_content_type() == "text/html":
        answer.close()
        raise DownloadError(
            f"{access.shown(name)}: a web page came instead of the file: the key or password has run out, or the address is wrong"
        )
    if answer.status != 206:
        return answer, 0, _number(answer.headers.get("Content-Length"))
    spread, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = _number(spread.partition("-")[0])
    return answer, start if not spread else -1 if first is None else first, _number(total)  # -1: nowhere we asked for


def _open_file(access: Access, name: str, url: str, start: int):
    path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise DownloadError(f"{access.shown(name)}: {error.strerror}") from None
    total = os.fstat(file.fileno()).st_size
    start = start if start <= total else 0
    file.seek(start)
    return file, start, total


def _refused(access: Access, name: str, start: int, error: urllib.error.HTTPError):
    where = access.shown(name)
    if error.code in (401, 403):
        given = (
            "key" if access.key else "user and password" if access.user or access.password else "request without a key"
        )
        raise DownloadError(
            f"{where}: the server refused the {given} (HTTP {error.code}); ask the data's owners for a valid one"
        )
    if error.code == 404:
        raise DownloadError(f"{where}: no such file there (HTTP 404); is --base-url right?")
    if error.code == 416 and start:  # nothing lies beyond: the partial file is whole, or longer than the real one
        return None, 0, _number(error.headers.get("Content-Range", "").rpartition("/")[2])
    if error.code in PASSING:
        raise Interrupted(f"HTTP {error.code}", float(_number(error.headers.get("Retry-After")) or 0))
    raise DownloadError(f"{where}: unexpected answer HTTP {error.code} {access.clean(error.reason)}")
