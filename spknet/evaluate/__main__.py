"""`python -m spknet.evaluate`: see spknet/evaluate/evaluation.py."""

import sys

from spknet.evaluate.evaluation import main

if __name__ == "__main__":
    sys.exit(main())
