"""Runs the command `effreason`: python -m effreason COMMAND ..."""

import sys

from effreason.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
