"""`python -m tools.lists` is `spknet lists`: training lists for any corpus (shards/make_lists.py)."""

import sys

from shards.make_lists import main

if __name__ == "__main__":
    sys.exit(main())
