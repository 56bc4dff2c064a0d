"""Trains a model: python train.py --help"""

import sys

from effreason.cli import main
from effreason.runtime import errors

if __name__ == "__main__":
    errors.prepare()
    sys.exit(main.run("train", sys.argv[1:], "train.py"))
