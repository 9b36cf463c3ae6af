"""A disk of 256 KiB that a test may fill: a tmpfs in a mount namespace of its own, which needs no rights."""

import subprocess
import sys
import textwrap

PREPARE = """
import errno, os, sys
from pathlib import Path
disk = Path(sys.argv[1])
def fill():
    with open(disk / "filling", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
def free():
    (disk / "filling").unlink()
"""


def on_a_small_disk(folder, script):
    """What a script prints that has `disk`, `fill()` and `free()`; it must end with status 0."""
    mount = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder), sys.executable]
    done = subprocess.run([*words, PREPARE + textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
