"""Evaluates models: python evaluate.py --help"""

import sys

from effreason.cli import main

if __name__ == "__main__":
    sys.exit(main.run("evaluate", sys.argv[1:], "evaluate.py"))
