"""``python -m graphpart``: the command line."""

import sys

from graphpart.cli import main

if __name__ == "__main__":
    sys.exit(main())
