"""A page in the browser: record or drop two recordings and see the verdict; drop several and see their map.

    spknet page runs/a                  http://127.0.0.1:7860, for this machine alone

The page is three files in spknet/use/browser, and nothing is fetched from anywhere else (a Content-Security-Policy says so to
the browser). The server keeps nothing: a recording is written to a temporary folder, embedded and deleted, and the browser
holds its embedding. Uploads are refused by their length before they are read, and cut off where they give none.

    GET  /about                    what the network is, the development histogram and threshold of its card, the limit of uploads
    POST /recording?name=NAME      the bytes of an audio file -> {"vector", "seconds", "rate", "wave", "doubts"} | {"error"}
    POST /scores                   {"recordings": [{"name", "vector", "rate"}]} -> {"verdict" of two} | {"points"}: a map of them
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import sys
import tempfile
import threading

import numpy as np

from shards.recording import Recording
from spknet.errors import UserError, run
from spknet.evaluate.commands import Parser, at_least
from spknet.use import verdict
from spknet.use.audio import Heard
from spknet.use.network import Network, cosine, load

COLUMNS = 600  # of a waveform
MOST = 200  # recordings on a map


class Desk:
    """What the page asks for, without HTTP. folder: where recordings lie while they are embedded."""

    def __init__(self, network: Network, folder: str, limit: int):
        self.network, self.folder, self.limit = network, folder, limit
        self._turn = threading.Lock()  # one recording at a time: memory stays that of one

    def about(self) -> dict:
        card = self.network.card
        return {
            "network": f"{self.network.config.model.name}, {self.network.sample_rate} Hz",
            "uncalibrated": self.network.uncalibrated,
            "histogram": dataclasses.asdict(card.histogram) if card else None,
            "threshold": card.threshold if card else None,
            "limit": self.limit,
        }

    def hear(self, path: str, name: str) -> dict:
        """Embedding, waveform and doubts of a recording. Raises UserError under its own name."""
        try:
            with self._turn:
                vector, heard = next(iter(self.network.hear(path)))
                wave = envelope(path, self.network.sample_rate)
        except UserError as error:
            raise UserError(str(error).replace(path, name)) from None
        heard = Heard(name, heard.rate, heard.seconds, heard.notes)
        return {
            "vector": vector.tolist(),
            "seconds": heard.seconds,
            "rate": heard.rate,
            "wave": wave,
            "doubts": heard.doubts(self.network.sample_rate),
        }

    def scores(self, recordings: list[dict]) -> dict:
        """The verdict of two recordings, or the map of more. Raises UserError for what is no recording of /recording."""
        try:
            vectors = np.array([one["vector"] for one in recordings], np.float32)
            heard = [Heard(str(one["name"]), int(one["rate"]), float("inf"), {}) for one in recordings]
        except (TypeError, KeyError, ValueError):
            raise UserError("expected recordings with name, vector and rate, as /recording gives them") from None
        if vectors.ndim != 2 or vectors.shape[1] != self.network.dimensions or not 2 <= len(vectors) <= MOST:
            raise UserError(f"{vectors.shape} numbers; expected 2 to {MOST} embeddings of {self.network.dimensions}")
        if not np.isfinite(vectors).all():
            raise UserError("an embedding is not finite")
        if len(vectors) > 2:
            return {"points": points(vectors).tolist()}
        # What is to be said of one recording stands beside it already.
        doubts = verdict.doubts(heard[:1], heard[1:], self.network.sample_rate)
        own = [said for one in heard for said in one.doubts(self.network.sample_rate)]
        doubts = [said for said in doubts if said not in own]
        return {"verdict": verdict.judge(cosine(*vectors), self.network.card, None, doubts).to_dict()}


def envelope(path: str, sample_rate: int) -> list[list[float]]:
    """[lowest, highest] in each of COLUMNS parts of a recording, -1 to 1."""
    step = sample_rate // 100
    peaks, left = [], np.empty(0, np.int16)
    for block in Recording(path, sample_rate).blocks():
        left = np.concatenate([left, block])
        whole = left[: len(left) // step * step].reshape(-1, step)
        peaks.append(np.stack([whole.min(axis=1), whole.max(axis=1)], axis=1))
        left = left[len(whole) * step :]
    if len(left):
        peaks.append(np.array([[left.min(), left.max()]]))
    parts = np.array_split(np.concatenate(peaks) / 32768, COLUMNS)
    return [[round(float(part[:, 0].min()), 3), round(float(part[:, 1].max()), 3)] for part in parts if len(part)]


def points(vectors: np.ndarray) -> np.ndarray:
    """(N, 2): unit vectors along the two directions in which they differ most (principal components)."""
    centred = vectors - vectors.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2]


@contextlib.contextmanager
def temporary_folder():
    """A folder that every temporary file of this process goes to, and that goes with the page."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="spknet-page-") as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def port_number(text: str) -> int:
    """argparse type: a port of TCP."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected a port, 0 to 65535")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command line; serves until Ctrl-C."""
    parser = Parser("spknet page", __doc__)
    parser.add("checkpoint", help="run folder, or a file that `spknet.load` takes")
    parser.add("--host", default="127.0.0.1", help="address to listen at; another than this lets others in")
    parser.add("--port", type=port_number, default=7860, help="0: a free one")
    parser.add("--max_mb", type=at_least(1), default=200, help="largest upload, MiB")
    parser.add("--device", default="auto", help="where the network runs: auto, cpu, cuda")
    chosen = parser.parse_args(argv)
    try:
        import uvicorn

        from spknet.use.page_server import application
    except ImportError:
        raise UserError("the page needs starlette and uvicorn: pip install 'spknet[page]'") from None
    network = load(chosen.checkpoint, chosen.device)
    with temporary_folder() as folder, socket.create_server((chosen.host, chosen.port)) as listener:
        port = listener.getsockname()[1]
        desk = Desk(network, folder, chosen.max_mb * 2**20)
        hosts = ["*"] if chosen.host in ("0.0.0.0", "::") else ["127.0.0.1", "localhost", chosen.host]
        print(f"http://{chosen.host}:{port} until Ctrl-C; recordings are deleted once embedded", flush=True)
        if chosen.host not in ("127.0.0.1", "localhost"):
            print(f"warning: whoever reaches {chosen.host} may use this page; there is no password", file=sys.stderr)
        settings = uvicorn.Config(application(desk, hosts), log_level="warning", lifespan="off")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
