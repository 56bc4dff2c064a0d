"""The supervised traces that make a reasoner overthink.

A step is written `8*7=6;`. Whatever the difficulty, steps are restated (`8*7=6?8*7=6;`) and whole solutions are done
again behind the word `wait`, most often where it is least needed. A step is now and then wrong; restating repairs it,
doing the solution again does too. A few traces answer at once, which is reliable for easy problems only.
"""

import numpy as np

from effreason.data.tiny.tasks import LEVELS, Task, apply

STEP_ERROR = 0.006                  # chance that a step's value is first written wrong
RESTATED = 0.35                     # chance that a step is restated
DIRECT = {"easy": 0.15, "medium": 0.03, "hard": 0.02}           # chance of no thinking at all
AGAIN = {"easy": 0.87, "medium": 0.66, "hard": 0.5}            # chance of doing the solution once more
MOST_PASSES = {"easy": 9, "medium": 5, "hard": 3}
WAIT = "wait;"

assert LEVELS.keys() == DIRECT.keys() == AGAIN.keys() == MOST_PASSES.keys()


def answer_text(answer: str) -> str:
    """What stands behind the thinking."""
    return f"</think>\\boxed{{{answer}}}"


def concise(task: Task) -> str:
    """The necessary work and nothing else: every step once. What savings are measured against."""
    steps, before = [], task.start % 10
    for (sign, digit), value in zip(task.operations, task.values, strict=True):
        steps.append(f"{before}{sign}{digit}={value};")
        before = value
    return "".join(steps) + answer_text(task.answer)


def overthinking(rng: np.random.Generator, task: Task) -> str:
    """A response in the style of the base reasoner. Its answer is wrong where an unrepaired slip made it so."""
    if rng.random() < DIRECT[task.level]:
        return answer_text(task.answer)
    thought, value = _solution(rng, task)
    for _ in range(MOST_PASSES[task.level] - 1):
        if rng.random() >= AGAIN[task.level]:
            break
        again, value = _solution(rng, task)
        thought += WAIT + again
    return thought + answer_text(str(value))


def _solution(rng: np.random.Generator, task: Task) -> tuple[str, int]:
    text, value = [], task.start % 10
    for sign, digit in task.operations:
        right = written = apply(value, sign, digit)
        if rng.random() < STEP_ERROR:
            written = (right + int(rng.integers(1, 10))) % 10
        step = f"{value}{sign}{digit}="
        text.append(f"{step}{written}")
        if rng.random() < RESTATED:
            text.append(f"?{step}{right}")
            written = right
        text.append(";")
        value = written
    return "".join(text), value
