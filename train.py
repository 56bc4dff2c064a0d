"""Trains a model: python train.py --help"""

import sys

from effreason.cli import main

if __name__ == "__main__":
    sys.exit(main.run("train", sys.argv[1:], "train.py"))
