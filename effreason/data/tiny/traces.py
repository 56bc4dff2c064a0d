"""The supervised traces that make a reasoner overthink.

A step is written `8*7=6;`. At every difficulty, steps are restated (`8*7=6?8*7=6;`) and whole
solutions are repeated after the word `wait`, most often for the problems that need it least. A step
is sometimes wrong; restating it repairs it, and so does repeating the solution. A few traces answer
at once, which is reliable only for easy problems.
"""

import numpy as np

from effreason.data.tiny.tasks import LEVELS, Task, apply

STEP_ERROR = 0.006                  # chance that a step's value is first written wrong
RESTATED = 0.35                     # chance that a step is restated
DIRECT = {"easy": 0.15, "medium": 0.03, "hard": 0.02}           # chance of no thinking at all
REPEAT = {"easy": 0.87, "medium": 0.66, "hard": 0.5}           # chance of another solution
MAX_SOLUTIONS = {"easy": 9, "medium": 5, "hard": 3}
WAIT = "wait;"

assert LEVELS.keys() == DIRECT.keys() == REPEAT.keys() == MAX_SOLUTIONS.keys()


def answer_text(answer: str) -> str:
    """Returns the end of a response: the thinking closed and the answer boxed."""
    return f"</think>\\boxed{{{answer}}}"


def concise(task: Task) -> str:
    """Returns the shortest complete solution, every step once; savings are measured against it."""
    steps, operand = [], task.start % 10
    for (sign, digit), value in zip(task.operations, task.values, strict=True):
        steps.append(f"{operand}{sign}{digit}={value};")
        operand = value
    return "".join(steps) + answer_text(task.answer)


def overthinking(rng: np.random.Generator, task: Task) -> str:
    """Returns a response in the style of the base reasoner, wrong after an unrepaired error."""
    if rng.random() < DIRECT[task.level]:
        return answer_text(task.answer)

    thinking, value = _solution(rng, task)
    for _ in range(MAX_SOLUTIONS[task.level] - 1):
        if rng.random() >= REPEAT[task.level]:
            break
        solution, value = _solution(rng, task)
        thinking += WAIT + solution
    return thinking + answer_text(str(value))


def _solution(rng: np.random.Generator, task: Task) -> tuple[str, int]:
    """Returns the text of a solution and the value it ends with."""
    text, value = [], task.start % 10
    for sign, digit in task.operations:
        correct = written = apply(value, sign, digit)
        if rng.random() < STEP_ERROR:
            written = (correct + int(rng.integers(1, 10))) % 10

        step = f"{value}{sign}{digit}="
        text.append(f"{step}{written}")
        if rng.random() < RESTATED:
            text.append(f"?{step}{correct}")
            written = correct
        text.append(";")
        value = written
    return "".join(text), value
