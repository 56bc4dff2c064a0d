"""Arithmetic that needs serial steps: the last digit of a chain such as (((63+5)*7-4)*3)%10.

The text is a Python expression, and Python's value of it is the answer. Difficulty is the number of
operations. No operation occurs twice in a chain, so the one just done determines the next one.

Further sets, to evaluate on, have what training never sees: longer chains and other kinds of task.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

LEVELS = {"easy": (1, 2), "medium": (3, 4), "hard": (6, 7)}     # operations, both ends included
# Only factors prime to 10: others lose information, and a chain that reached 0 could be guessed.
OPERATIONS = (*(("+", digit) for digit in range(2, 10)), *(("-", digit) for digit in range(2, 10)),
              ("*", 3), ("*", 7), ("*", 9))
WEIGHTS = np.array([1.0 if sign != "*" else 4.0 for sign, _ in OPERATIONS])
Operations = tuple[tuple[str, int], ...]
HELD_OUT_SHARE = 4                  # one problem in four is never trained on


@dataclasses.dataclass(frozen=True)
class Task:
    """A chain of operations on a number of two digits."""

    start: int
    operations: Operations
    level: str

    @property
    def text(self) -> str:
        """The problem as a Python expression with the minimum of brackets."""
        expression, is_sum = str(self.start), False
        for sign, digit in self.operations:
            if sign == "*" and is_sum:
                expression = f"({expression})"
            is_sum = sign != "*"
            expression = f"{expression}{sign}{digit}"
        return f"({expression})%10"

    @property
    def values(self) -> list[int]:
        """The last digit after each operation; the final one is the answer."""
        value, values = self.start % 10, []
        for sign, digit in self.operations:
            value = apply(value, sign, digit)
            values.append(value)
        return values

    @property
    def answer(self) -> str:
        return str(self.values[-1])


Maker = Callable[[np.random.Generator, str], Task]


def apply(value: int, sign: str, digit: int) -> int:
    """Returns the result of an operation modulo 10, with Python's rule for negative numbers."""
    return {"+": value + digit, "-": value - digit, "*": value * digit}[sign] % 10


def draw(rng: np.random.Generator, level: str, *, held_out: bool) -> Task:
    """Returns a task of a level, from the held-out quarter of all tasks or from the rest."""
    low, high = LEVELS[level]
    while True:
        operations = _operations(rng, low, high)
        # Two digits: a held-out text is new, but needs nothing that no other text has taught.
        task = Task(int(rng.integers(10, 100)), operations, level)
        # A checksum of the text: the same split in pretraining, training and evaluation.
        if (zlib.crc32(task.text.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return task


def _operations(rng: np.random.Generator, low: int, high: int) -> Operations:
    """Returns low to high operations, none twice."""
    indices = rng.choice(len(OPERATIONS), rng.integers(low, high + 1), replace=False,
                         p=WEIGHTS / WEIGHTS.sum())
    return tuple(OPERATIONS[index] for index in indices)


def distinct(seed: int, *, held_out: bool) -> Iterator[Task]:
    """Yields distinct tasks without end, the levels in turn."""
    makers = {level: functools.partial(draw, held_out=held_out) for level in LEVELS}
    return _distinct(np.random.default_rng([seed, held_out]), makers)


@dataclasses.dataclass(frozen=True)
class Bracketed(Task):
    """A chain with brackets around every operation, needed or not."""

    @property
    def text(self) -> str:
        expression = str(self.start)
        for sign, digit in self.operations:
            expression = f"({expression}{sign}{digit})"
        return f"{expression}%10"


def novel(name: str) -> Iterator[Task]:
    """Yields distinct tasks of a set in NOVEL without end; none could be drawn for training."""
    return _distinct(np.random.default_rng(list(name.encode())), NOVEL[name])


def _distinct(rng: np.random.Generator, makers: Mapping[str, Maker]) -> Iterator[Task]:
    """Yields distinct tasks without end, the levels in turn."""
    seen = set()
    while True:
        for level, make in makers.items():
            task = make(rng, level)
            while task.text in seen:
                task = make(rng, level)
            seen.add(task.text)
            yield task


def _long(rng: np.random.Generator, level: str) -> Task:
    count = int(level.split()[0])
    return Task(int(rng.integers(10, 100)), _operations(rng, count, count), level)


def _bracketed(rng: np.random.Generator, level: str) -> Task:
    while True:
        start, operations = int(rng.integers(10, 100)), _operations(rng, 2, 4)
        task = Bracketed(start, operations, level)
        if task.text != Task(start, operations, level).text:
            return task


def _three_digits(rng: np.random.Generator, level: str) -> Task:
    return Task(int(rng.integers(100, 1000)), _operations(rng, 2, 5), level)


def _two_numbers(rng: np.random.Generator, level: str) -> Task:
    start, other = (int(number) for number in rng.integers(10, 100, 2))
    return Task(start, ((str(rng.choice(["+", "-", "*"])), other),), level)


def _even_factor(rng: np.random.Generator, level: str) -> Task:
    operations = list(_operations(rng, 2, 4))
    operations[rng.integers(len(operations))] = ("*", int(rng.choice([2, 4, 6, 8])))
    return Task(int(rng.integers(10, 100)), tuple(operations), level)


# Sets that training never sees: the function that draws a task of each level.
NOVEL: dict[str, dict[str, Maker]] = {
    "tiny_long": dict.fromkeys(("8 operations", "9 operations", "10 operations"), _long),
    "tiny_other": {"brackets": _bracketed, "three digits": _three_digits,
                   "two numbers": _two_numbers, "even factor": _even_factor},
}
