"""Trains a model: python train.py --help"""

import sys

from effreason import cli

if __name__ == "__main__":
    sys.exit(cli.train())
