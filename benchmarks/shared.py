"""Shared by the benchmarks: two Qwen2 shapes, tables in Markdown, progress on stderr, lists as
arguments."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from effreason.lm.architecture import DecoderConfig, alike

QWEN2: dict[str, Any] = dict(norm_eps=1e-6, kinds=alike(theta=1e4), qkv_bias=True,
                             remat="none")
MODELS = {
    "M1": DecoderConfig(vocabulary=32000, width=512, layers=8, heads=8, kv_heads=2,
                              head_dim=64, mlp_width=1408,
                              **QWEN2),
    "M2": DecoderConfig(vocabulary=256, width=128, layers=4, heads=4, kv_heads=2, head_dim=32,
                              mlp_width=384,
                              **QWEN2),
}


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown in columns as wide as they need to be; all but words to the right."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    words = [all(not row[column][:1].isdigit() for row in rows) for column in range(len(headings))]
    words[0] = True

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) if word else cell.rjust(width)
                                 for cell, width,
                                 word in zip(cells, widths, words, strict=True)) + " |"

    print(line(headings))
    print("|" + "|".join("-" * (width + 1) + ("-" if word else ":")
                         for width, word in zip(widths, words, strict=True)) + "|")
    print("\n".join(map(line, rows)) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns an argparse type: names separated by commas, all of them known."""
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(known)}, found {unknown[0]!r}")
        return names
    return parse
