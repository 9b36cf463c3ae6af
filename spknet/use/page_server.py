"""The page over HTTP: files, uploads with their limits, scores. What it answers is spknet.use.page.Desk's.

uvicorn.run(application(desk, ["127.0.0.1"]))
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from spknet.errors import UserError

FILES = {"/": "page.html", "/page.js": "page.js", "/recorder.js": "recorder.js"}
KINDS = {".html": "text/html", ".js": "text/javascript"}
# The browser fetches nothing from elsewhere, and shows the page in no other page.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request is not read to its end. status: of HTTP."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status, self.text = status, text


def application(desk, hosts: list[str]) -> Starlette:
    """desk: a spknet.use.page.Desk. hosts: names under which the page may be called; others are refused (DNS rebinding)."""
    posts = [Route("/recording", recording, methods=["POST"]), Route("/scores", scores, methods=["POST"])]
    made = Starlette(
        routes=[*(Route(path, file) for path in FILES), Route("/about", about), *posts],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={Refused: refused, UserError: wrong},
    )
    made.state.desk = desk
    return made


async def refused(_request: Request, error: Refused) -> Response:
    # The rest of the upload is not waited for.
    return JSONResponse({"error": error.text}, error.status, HEADERS | {"Connection": "close"})


async def wrong(_request: Request, error: UserError) -> Response:
    return JSONResponse({"error": str(error)}, 422, HEADERS)


async def file(request: Request) -> Response:
    path = Path(__file__).parent / "browser" / FILES[request.url.path]
    return Response(path.read_bytes(), 200, HEADERS, KINDS[path.suffix])


async def about(request: Request) -> Response:
    return JSONResponse(request.app.state.desk.about(), 200, HEADERS)


async def recording(request: Request) -> Response:
    desk = request.app.state.desk
    name = Path(request.query_params.get("name", "")).name or "recording"
    # The file's own name, which may hold anything, never reaches the disk; its content says what it is.
    with tempfile.NamedTemporaryFile(dir=desk.folder) as out:
        async for part in body(request):
            out.write(part)
        out.flush()
        return JSONResponse(await run_in_threadpool(desk.hear, out.name, name), 200, HEADERS)


async def scores(request: Request) -> Response:
    text = b"".join([part async for part in body(request)])
    try:
        given = json.loads(text)["recordings"]
    except (ValueError, KeyError, TypeError):
        raise UserError("expected JSON with `recordings`") from None
    return JSONResponse(request.app.state.desk.scores(given), 200, HEADERS)


async def body(request: Request):
    """The parts of an upload. Raises Refused for another site's, and for one too long: by its own word, or while it is read."""
    limit = request.app.state.desk.limit
    said = f"larger than {limit / 2**20:.0f} MiB, the limit of an upload; cut it, or start the page with --max_mb"
    origin = request.headers.get("origin")
    if origin and origin.split("://")[-1] != request.headers["host"]:
        raise Refused(403, f"{origin} may not ask here")
    if int(request.headers.get("content-length", 0)) > limit:
        raise Refused(413, said)
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, said)
        yield part
