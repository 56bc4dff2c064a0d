"""Trains a model: python train.py --help"""

import sys

from effreason.cli import main

if __name__ == "__main__":
    sys.exit(main.script("train"))
