"""Evaluates models: python evaluate.py --help"""

import sys

from effreason.cli import main
from effreason.runtime import errors

if __name__ == "__main__":
    errors.prepare()
    sys.exit(main.run("evaluate", sys.argv[1:], "evaluate.py"))
