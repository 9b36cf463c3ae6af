"""Embeddings of audio files: `spknet embed a.wav b.m4a --checkpoint runs/a -o out.npz`.

    out.npz: embeddings (N, D) float32 of unit length; names (N,) as given; seconds (N,); weights_sha256

With --list FILE it takes the utterances of a list, alone or under torchrun, and writes a folder that `spknet evaluate
--embeddings` scores: `spknet embed --list FILE --help`.
"""

from __future__ import annotations

import sys

import numpy as np

from shards.format import atomic_write
from spknet.checkpoints.card import weights_digest
from spknet.errors import run
from spknet.evaluate import embed as listed
from spknet.evaluate.commands import check_file
from spknet.messages import Progress, warn
from spknet.use.commands import Parser, network_of


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word == "--list" or word.startswith("--list=") for word in argv):
        return listed.main(argv)
    parser = Parser("spknet embed", __doc__)
    parser.epilog = "`spknet embed --list FILE --help` tells the options of a list."
    parser.add("files", nargs="+", help="recordings of any format, rate and length")
    parser.add("-o", "--out", required=True, help="npz file to write")
    chosen = parser.parse_args(argv)
    check_file(chosen.out)
    network = network_of(chosen)
    rows, seconds = [], []
    with Progress(len(chosen.files), unit="file") as progress:
        for vector, heard in network.hear(chosen.files):
            rows.append(vector)
            seconds.append(heard.seconds)
            for said in heard.doubts(network.sample_rate):
                warn(f"note: {said}")
            progress.advance()
    arrays = {"embeddings": np.stack(rows), "names": np.array(chosen.files), "seconds": np.array(seconds)}
    with atomic_write(chosen.out) as file:
        np.savez(file, **arrays, weights_sha256=np.array(weights_digest(network.model.state_dict())))
    print(f"{chosen.out}: {len(rows)} recordings, {network.dimensions} dimensions")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
