"""Measures the exact stage of grading: answers per second of processor time.

    python -m benchmarks.grading ../shared/grader/pairs.jsonl ../shared/grader/pairs2.jsonl

Each line of a file has a `response` (or `pred`, the answer alone) and a `gold`. Every answer is
canonicalised anew in each round; the references are read once, as in a training step. The best of
the rounds counts, because other work on the machine can only slow one down.
"""

import argparse
import json
import time
from pathlib import Path

from effreason.grading import notation
from effreason.grading.exact import exact
from effreason.grading.extraction import extract_answer


def load(paths: list[Path]) -> list[tuple[str, str]]:
    """Returns the pairs of answer and reference."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [(extract_answer(row["response"]) or "" if "response" in row else row["pred"],
             row["gold"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    pairs, rates = load(arguments.files), []

    for _ in range(arguments.rounds):
        notation.canonical.cache_clear()
        start = time.process_time()
        verdicts = [exact(prediction, reference) for prediction, reference in pairs]
        rates.append(len(pairs) / (time.process_time() - start))

    decided = sum(verdict is not None for verdict in verdicts)
    print(f"{len(pairs)} pairs, {decided} decided exactly, "
          f"{max(rates):,.0f} answers per second of processor time")


if __name__ == "__main__":
    main()
