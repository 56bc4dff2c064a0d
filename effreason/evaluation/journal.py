"""Append-only log of responses, so that a killed evaluation resumes where it stopped.

JSON lines: first the facts, which say what the responses were sampled with, then one line for each
response. A signal adds the responses that are not finished, which are continued from there; the
last of several lines on a response counts. Process 0 alone writes, all read. The unfinished
responses of a training step are stored in the same format (runs/unfinished.py).
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Self

import numpy as np
from msgspec import Meta

from effreason.evaluation.responses import check_facts
from effreason.runtime import files, processes, rows
from effreason.runtime.errors import UserError
from effreason.types import FinishReason, Response

SUFFIX = ".journal"
LOGPROBS = ("logprobs", "sampling_logprobs", "model_logprobs")

Int32 = Annotated[int, Meta(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class _Header:
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A response; evaluations need no log-probs, and store none."""

    prompt: Int32
    sample: Int32
    finish: FinishReason | None
    repeated: bool
    tokens: list[Int32]
    logprobs: str = ""              # base64 of float32[3, T'], little-endian, rows as in LOGPROBS


class Journal:
    """The log of one set of an evaluation: a new one, or one to resume.

    Attributes: resumed, the responses that it held, finished or not.
    Args: facts, of the evaluation, see evaluate.Evaluator.facts; vocabulary, of the model.
    Raises: UserError for a file with other facts, and for a damaged one. A last line that a crash
        cut off is dropped."""

    def __init__(self, path: Path, facts: Mapping[str, Any], vocabulary: int) -> None:
        self._path, self._facts, self._vocabulary = path, facts, vocabulary
        self._file: IO[bytes] | None = None
        self.resumed: list[Response] = []
        if processes.broadcast("journal", self._open) and visible_to_all(path):
            self.resumed = self._read()[1]
        # Nobody may read what process 0 has already begun to append.
        processes.all_gather("journal read", lambda: None)

    def add(self, responses: Iterable[Response]) -> None:
        """Appends responses; they are handed to the operating system before this returns."""
        if self._file is not None:
            with files.disk(self._path):
                self._file.write(b"".join(encode(response) for response in responses))
                self._file.flush()

    def add_unfinished(self, responses: Iterable[Response]) -> None:
        """Appends the responses that are not finished; the others are in the file already."""
        self.add(response for response in responses
                 if not response.finish and len(response.tokens))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Removes the file: the graded responses are written."""
        self.close()
        if processes.is_primary():
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> bool:
        """Opens the file to append to it; returns whether it holds responses already."""
        with files.disk(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stored, responses, size = self._read() if self._path.exists() else (None, [], 0)
            self._file = self._path.open("ab")

            if os.fstat(self._file.fileno()).st_size > size:
                self._file.truncate(size)       # a line that a crash cut off
            if stored is None:
                self._file.write(files.json_line({"facts": self._facts}))
                self._file.flush()
        return bool(responses)

    def _read(self) -> tuple[dict[str, Any] | None, list[Response], int]:
        stored, responses, size = read(self._path)
        if stored is not None:
            check_facts(self._path, stored, self._facts)

        check_fit(self._path, responses, prompts=self._facts["problems"],
                  samples=self._facts["evaluation.samples"],
                  max_new_tokens=self._facts["evaluation.max_new_tokens"],
                  vocabulary=self._vocabulary)
        # The last line on a response counts.
        latest = {(response.prompt, response.sample): response for response in responses}
        return stored, list(latest.values()), size


def visible_to_all(path: Path) -> bool:
    """Returns whether process 0 has a file, once every process sees the same one.

    Raises: UserError if this process does not."""
    digest = processes.broadcast(f"the file {path.name}", lambda: files.digest(path))
    if digest is not None and not processes.is_primary() and not processes.appears(
            lambda: files.digest(path) == digest):
        raise UserError(f"{path}: process {processes.index()} does not see the file that process 0 "
                        "has; all hosts must share the disk")
    return digest is not None


def encode(response: Response, *, logprobs: bool = False) -> bytes:
    """Returns a response as one line."""
    line = {"prompt": response.prompt, "sample": response.sample, "finish": response.finish,
            "repeated": response.repeated, "tokens": response.tokens.tolist()}
    if logprobs:
        arrays = np.array([getattr(response, name) for name in LOGPROBS], "<f4")
        line["logprobs"] = base64.b64encode(arrays.tobytes()).decode()
    return (json.dumps(line, separators=(",", ":")) + "\n").encode()


def read(path: Path) -> tuple[dict[str, Any] | None, list[Response], int]:
    """Reads a log, without a last line that a crash cut off.

    Returns: the facts, None if even they were cut off; the response of each line; the bytes of all
        complete lines. Raises: UserError for a damaged line."""
    facts, responses, size = None, list[Response](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):        # the last one, cut off by a crash
                break
            try:
                if facts is None:
                    facts = rows.decode(line, _Header, path.name).facts
                else:
                    responses.append(_decode(line))
            except (UserError, ValueError):
                raise _damaged(path, number) from None
            size += len(line)
    return facts, responses, size


def check_fit(path: Path, responses: Iterable[Response], *, prompts: int, samples: int,
              max_new_tokens: int, vocabulary: int) -> None:
    """Raises UserError if a response of a log cannot be among the expected ones.

    Args: samples, of each prompt; vocabulary, tokens are below it."""
    for number, response in enumerate(responses, start=2):
        if (response.prompt >= prompts or response.sample >= samples
                or len(response.tokens) > max_new_tokens
                or np.any(response.tokens >= vocabulary)):
            raise _damaged(path, number)


def _damaged(path: Path, number: int) -> UserError:
    return UserError(f"{path}: line {number} is damaged; remove the file to generate its responses "
                     "again")


def _decode(line: bytes) -> Response:
    """Parses a response; log-probs that are not stored are 0. Raises: UserError or ValueError."""
    row = rows.decode(line, _Line, "response")
    count = len(row.tokens)
    stored = np.frombuffer(base64.b64decode(row.logprobs, validate=True), "<f4")
    logprobs = (stored if row.logprobs else np.zeros(3 * count, np.float32)).reshape(3, count)
    return Response(prompt=row.prompt, sample=row.sample, tokens=np.array(row.tokens, np.int32),
                    finish=row.finish, repeated=row.repeated,
                    **dict(zip(LOGPROBS, logprobs.astype(np.float32), strict=True)))
