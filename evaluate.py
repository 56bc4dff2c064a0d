"""Evaluates models: python evaluate.py --help"""

import sys

from effreason import cli

if __name__ == "__main__":
    sys.exit(cli.evaluate())
