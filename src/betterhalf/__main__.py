"""Entry point of `python -m betterhalf`."""

import sys

from betterhalf.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
