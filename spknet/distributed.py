"""The former name of spknet.parallel.ranks, for scripts that were written for it."""

from spknet.parallel.ranks import RankError, Ranks, join, meet, ranks

__all__ = ["RankError", "Ranks", "join", "meet", "ranks"]
