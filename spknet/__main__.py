"""`python -m spknet` is the `spknet` command."""

import sys

from spknet.cli import main

sys.exit(main())
