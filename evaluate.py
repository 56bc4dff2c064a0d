"""Evaluates models: python evaluate.py --help"""

import sys

from effreason.cli import evaluate
from effreason.runtime import errors

if __name__ == "__main__":
    with errors.reporting():
        evaluate.run(sys.argv[1:], "evaluate.py")
