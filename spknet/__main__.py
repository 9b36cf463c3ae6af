"""`python -m spknet` is the `spknet` command."""

from spknet.cli import start

start()
