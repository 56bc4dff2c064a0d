"""Trains a model: python train.py --help"""

import sys

from effreason.cli import train
from effreason.runtime import errors

if __name__ == "__main__":
    with errors.reporting():
        train.run(sys.argv[1:], "train.py")
