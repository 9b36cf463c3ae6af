"""UserError and the wrapper round every command; they lie in shards, which is usable alone."""

from shards.errors import INTERRUPTED, USAGE, UserError, of_system, printable, run

__all__ = ["INTERRUPTED", "USAGE", "UserError", "of_system", "printable", "run"]
