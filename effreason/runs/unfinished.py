"""The responses of a training step that a signal stopped.

A resumed run finishes them, and samples none of them again.
"""

from collections.abc import Sequence
from pathlib import Path

from effreason.evaluation import journal
from effreason.runtime import files, processes
from effreason.runtime.errors import UserError
from effreason.types import Response

FILE = "unfinished.jsonl"           # in the run directory


class StepLog:
    """Keeps the responses of a step that a signal stops; see rollouts.ResponseLog."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step
        self.resumed = load(path, step)

    def add(self, responses: Sequence[Response]) -> None:
        """Does nothing: all of them are written when a signal comes."""

    def add_unfinished(self, responses: Sequence[Response]) -> None:
        """Writes all responses."""
        save(self._path, self._step, responses)

    def remove(self) -> None:
        """Removes the file."""
        if processes.is_primary():
            self._path.unlink(missing_ok=True)


def save(path: Path, step: int, responses: Sequence[Response]) -> None:
    """Writes the responses of a step, finished or not, completely or not at all. Raises: UserError.

    Process 0 alone writes: all processes have the same responses."""
    if processes.is_primary():
        with files.replacing(path) as partial, partial.open("wb") as file:
            file.write(files.json_line({"facts": {"step": step, "responses": len(responses)}}))
            file.writelines(journal.encode(response, logprobs=True) for response in responses)


def load(path: Path, step: int) -> list[Response]:
    """Returns the saved responses of this step; [] if there is no file, or one of another step.

    Raises: UserError for a damaged file."""
    if not journal.visible_to_all(path):
        return []

    facts, responses, size = journal.read(path)
    if facts is None or size < path.stat().st_size or facts.get("responses") != len(responses):
        raise UserError(f"{path}: is damaged; remove it to generate step {step} from its beginning")
    return responses if facts.get("step") == step else []
