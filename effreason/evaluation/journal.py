"""Finished responses of an evaluation as they come, so that one that was killed goes on where it was.

A file of JSON lines: what the evaluation is made with, then one line for each response, token ids and no log-probs. A
signal adds the responses that were begun, which go on from there; of several lines on a response the last one counts.
Process 0 alone writes, all read.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from effreason.runs.unfinished import digest
from effreason.runtime import processes
from effreason.runtime.errors import UserError
from effreason.runtime.files import disk
from effreason.types import FinishReason, Response

SUFFIX = ".journal"
Check = Callable[[Path, Mapping[str, Any]], None]
Fits = Callable[[Response], bool]


class Journal:
    """The journal of one set of an evaluation: made, or gone on with.

    Attributes: drawn, the responses that were there, finished and begun.
    Args: facts, of the evaluation, for the first line of a new file; check, given those of a file that is there, raises
        UserError where they are of another evaluation; fits, whether a response can be one of this evaluation.
    Raises: UserError for a damaged file; the end of one that a crash cut off is dropped."""

    def __init__(self, path: Path, facts: Mapping[str, Any], check: Check, fits: Fits = lambda response: True) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self.drawn: list[Response] = []
        if processes.broadcast("journal", lambda: self._open(facts, check, fits)) and seen(path):
            self.drawn = _read(path, check, fits)[1]
        # None reads what process 0 has begun to add to already.
        processes.all_gather("journal read", lambda: None)

    def add(self, responses: Sequence[Response]) -> None:
        """Adds responses; they are on their way to the disk when this returns."""
        if self._file is not None and responses:
            with disk(self._path):
                self._file.write(b"".join(_line(each) for each in responses))
                self._file.flush()

    def keep(self, responses: Sequence[Response]) -> None:
        """Adds what was begun; see attempts.attempt. What has finished is there already."""
        self.add([each for each in responses if not each.finish and len(each.tokens)])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Removes the file: what it was for is done."""
        self.close()
        if processes.is_primary():
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, facts: Mapping[str, Any], check: Check, fits: Fits) -> bool:
        """Opens the file to add to it; whether it holds responses already."""
        with disk(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found, drawn, whole = _read(self._path, check, fits) if self._path.exists() else (None, [], 0)
            self._file = self._path.open("ab")
            if os.fstat(self._file.fileno()).st_size > whole:
                self._file.truncate(whole)      # a line that a crash cut off
            if found is None:
                self._file.write((json.dumps({"facts": facts}) + "\n").encode())
                self._file.flush()
        return bool(drawn)


def seen(path: Path) -> bool:
    """Whether process 0 has a file, once this process sees the same one.

    Raises: UserError where this process does not."""
    wanted = processes.broadcast("a file of an evaluation", lambda: digest(path))
    if wanted is not None and not processes.is_primary() and not processes.appears(lambda: digest(path) == wanted):
        raise UserError(f"{path}: process {processes.index()} does not see the file that process 0 has; the disk must "
                        "be one that all hosts share")
    return wanted is not None


def _line(response: Response) -> bytes:
    facts = {"prompt": response.prompt, "sample": response.sample, "finish": response.finish,
             "repeated": response.repeated, "tokens": response.tokens.tolist()}
    return (json.dumps(facts, separators=(",", ":")) + "\n").encode()


def _read(path: Path, check: Check, fits: Fits) -> tuple[dict[str, Any] | None, list[Response], int]:
    """The facts, None where not even they are there; the responses; and the bytes of all whole lines."""
    found: dict[tuple[int, int], Response] = {}
    facts, whole = None, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):        # the last one
                break
            try:
                table = json.loads(line)
                if number == 1:
                    facts = dict(table["facts"].items())
                    check(path, facts)          # before the responses, which fit no other evaluation
                else:
                    response = _response(table)
                    if not fits(response):
                        raise ValueError
                    found[response.prompt, response.sample] = response
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                raise UserError(f"{path}: line {number} is damaged; remove the file to generate its responses again"
                                ) from None
            whole += len(line)
    return facts, list(found.values()), whole


def _response(table: dict[str, Any]) -> Response:
    """Log-probs are 0: nobody asks for those of an evaluation."""
    numbers = [table["prompt"], table["sample"], *table["tokens"]]
    if not all(type(number) is int for number in numbers):
        raise TypeError
    tokens = np.array(table["tokens"], np.int32)
    unknown = np.zeros(len(tokens), np.float32)
    return Response(prompt=table["prompt"], sample=table["sample"], tokens=tokens, logprobs=unknown,
                    sampling_logprobs=unknown, model_logprobs=unknown, finish=FinishReason(table["finish"]) if table["finish"] else None,
                    repeated=bool(table["repeated"]))
