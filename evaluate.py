"""Evaluates models: python evaluate.py --help"""

import sys

from effreason.cli import main

if __name__ == "__main__":
    sys.exit(main.script("evaluate"))
