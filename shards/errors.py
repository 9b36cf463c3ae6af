"""Mistakes of users, and the one way in which a command tells them.

A mistake is anything that the person at the keyboard can put right: a path, a list, an option, a full disk. It is raised as a
UserError whose text says what was found, what was expected and what to do; `run` prints it once, without a traceback.

    if __name__ == "__main__":
        sys.exit(run(main))
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

USAGE = 2  # exit status: something the user gave is wrong
INTERRUPTED = 130  # exit status: Ctrl-C
LONGEST = 2000  # characters of a message: a line of megabytes that is no list need not be shown whole
REMEDIES = {
    errno.ENOSPC: "the disk is full; make room and start the same command again",
    errno.EDQUOT: "the quota is used up; make room and start the same command again",
    errno.EROFS: "it lies on a read-only file system; give another folder",
    errno.EACCES: "permission denied; change its rights or give another path",
    errno.EPERM: "not permitted; change its rights or give another path",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "a folder, where a file is expected",
    errno.ENOTDIR: "a file stands where a folder is expected",
    errno.EEXIST: "it exists already",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
}


class UserError(Exception):
    """Something the user gave or can put right is wrong; the message says what was found, expected and to be done."""


def of_system(error: OSError) -> UserError:
    """The sentence for an error of the operating system: the path, what is wrong with it, what to do."""
    reason = REMEDIES.get(error.errno, error.strerror or type(error).__name__)
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes))]
    return UserError(f"{' -> '.join(paths)}: {reason}" if paths else reason)


def printable(text: str) -> str:
    """A text that may hold names of any bytes, as any terminal can show it: no control characters, not too long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def told(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Decorates a command whose callers need not know of `run`: what is usable without the `spknet` command."""

    @functools.wraps(main)
    def command(argv: list[str] | None = None) -> int:
        return run(main, argv)

    return command


def run(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """The exit status of main(argv); mistakes of the user are printed in one sentence (status 2; Ctrl-C 130)."""
    try:
        status = main(argv) or 0
        if sys.stdout:
            sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: nobody is left to tell
        _drop_output()
        return 1
    except UnicodeDecodeError as error:
        print(f"error: a text file is not UTF-8 ({error}); convert it with iconv", file=sys.stderr)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            _drop_output()
        print(f"error: {printable(str(of_system(error)))}", file=sys.stderr)
    return USAGE


def _drop_output() -> None:
    """What is still to be printed goes nowhere: Python would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
