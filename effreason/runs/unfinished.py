"""The responses of a training step that a signal stopped.

A resumed run finishes them, and samples none of them again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effreason.evaluation import journal
from effreason.runtime import files, processes
from effreason.runtime.errors import UserError
from effreason.types import Response

FILE = "unfinished.jsonl"           # in the run directory


class StepLog:
    """Keeps the responses of a step that a signal stops; see rollouts.ResponseLog.

    Args: limits, see journal.check_fit; origin, makes what the responses depend on besides the
        step, JSON values: called only if there are some.
    Raises: UserError for a damaged file, and one of another run."""

    def __init__(self, path: Path, step: int, limits: Mapping[str, int],
                 origin: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._step, self._origin = path, step, origin
        self.resumed = load(path, step, limits, origin)

    def add(self, responses: Sequence[Response]) -> None:
        """Does nothing: all of them are written when a signal comes."""

    def add_unfinished(self, responses: Sequence[Response]) -> None:
        """Writes all responses."""
        save(self._path, self._step, responses, self._origin())

    def remove(self) -> None:
        """Removes the file."""
        if processes.is_primary():
            self._path.unlink(missing_ok=True)


def save(path: Path, step: int, responses: Sequence[Response], origin: Mapping[str, Any]) -> None:
    """Writes the responses of a step, finished or not, completely or not at all. Raises: UserError.

    Process 0 alone writes: all processes have the same responses."""
    if processes.is_primary():
        facts = {"step": step, "responses": len(responses), "origin": origin}
        with files.replacing(path) as partial, partial.open("wb") as file:
            file.write(files.json_line({"facts": facts}))
            file.writelines(journal.encode(response, logprobs=True) for response in responses)


def load(path: Path, step: int, limits: Mapping[str, int],
         origin: Callable[[], Mapping[str, Any]]) -> list[Response]:
    """Returns the saved responses of this step; [] if there is no file, or one of another step.

    Raises: UserError for a damaged file, and one whose responses cannot be this step's."""
    if not journal.visible_to_all(path):
        return []

    facts, responses, size = journal.read(path)
    anew = f"remove it to generate step {step} from its beginning"
    if facts is None or size < path.stat().st_size or facts.get("responses") != len(responses):
        raise UserError(f"{path}: is damaged; {anew}")
    if facts.get("step") != step:
        return []

    stored, expected = facts.get("origin"), origin()
    for name, value in expected.items():
        found = stored.get(name) if isinstance(stored, dict) else None
        if found != value:
            raise UserError(f"{path}: is of another run, its {name} is {found}, expected {value}; "
                            f"{anew}")
    journal.check_fit(path, responses, **limits)
    return responses
