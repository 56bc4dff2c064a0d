"""Stage 1: problems in, tokenised prompts out. Which problems a step gets is a pure function of seed and step."""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effreason.errors import UserError
from effreason.records import Problem
from effreason.runtime.config import DataConfig
from effreason.tiny import tasks

logger = logging.getLogger("effreason")

TINY_PROBLEMS = 3000                # the training set of the tiny world
TINY_HELD_OUT = 1500                # and of its held-out problems
ONE_LEVEL = "all"


def load(data: DataConfig, path: str, tokenizer: Any, *, held_out: bool = False,
         limit: int | None = None) -> list[Problem]:
    """The problems of a data set, rendered with the tokenizer's chat template and tokenised.

    Args: data, the field names and the user prompt; path, "tiny", a JSONL or Parquet file, or a folder that
        `datasets` saved; held_out, for "tiny" the part that is never trained on; limit, only the first so many.
    Raises: UserError that names the file and line."""
    rows = _tiny_rows(held_out) if path == "tiny" else _file_rows(Path(path), data)
    problems: list[Problem] = []
    too_long = 0
    for uid, (text, answer, level) in enumerate(rows):
        if len(problems) == limit:
            break
        rendered = render(tokenizer, data.user_prompt.replace("{problem}", text))
        prompt = encode(tokenizer, rendered)
        # A long prompt is left out, never cut: a cut problem has no right answer.
        if len(prompt) > data.max_prompt_tokens:
            too_long += 1
            continue
        problems.append(Problem(uid=uid, prompt=prompt, text=text, answer=answer, level=level,
                                opens_thinking=rendered.rstrip().endswith("<think>")))
    if too_long and problems:
        logger.warning("%s: left out %d problems with prompts of more than data.max_prompt_tokens = %d tokens",
                       path, too_long, data.max_prompt_tokens)
    if not problems:
        raise UserError(f"{path}: no problem has a prompt of at most data.max_prompt_tokens = {data.max_prompt_tokens} "
                        "tokens")
    return problems


def render(tokenizer: Any, user_prompt: str) -> str:
    """One user turn in the chat template, up to where the model is to go on."""
    return tokenizer.apply_chat_template([{"role": "user", "content": user_prompt}], tokenize=False,
                                         add_generation_prompt=True)


def encode(tokenizer: Any, rendered: str) -> np.ndarray:
    """int32[S'] ids of a rendered prompt, which holds its own BOS: a second one is what no model was trained on."""
    return np.array(tokenizer(rendered, add_special_tokens=False)["input_ids"], np.int32)


def batch(problems: Sequence[Problem], size: int, seed: int, step: int) -> list[Problem]:
    """The problems of a training step: each once an epoch, in an order that depends on (seed, epoch) alone.

    An epoch's remainder of fewer than `size` problems is left out, so that no problem comes twice in one step: two
    groups of the same problem would be the same responses. Raises: UserError for fewer than `size` problems."""
    steps = len(problems) // size
    if steps == 0:
        raise UserError(f"rollout.prompts_per_step must be at most the number of problems, {len(problems)}, got {size}")
    epoch, place = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(len(problems))
    return [problems[index] for index in order[place * size : (place + 1) * size]]


def _tiny_rows(held_out: bool) -> Iterator[tuple[str, str, str]]:
    drawn = tasks.distinct(0, held_out=held_out)
    for task in itertools.islice(drawn, TINY_HELD_OUT if held_out else TINY_PROBLEMS):
        yield task.text, task.answer, task.level


def _file_rows(path: Path, data: DataConfig) -> Iterator[tuple[str, str, str]]:
    for place, row in _saved_rows(path) if path.is_dir() or path.suffix == ".parquet" else _jsonl_rows(path):
        level = ONE_LEVEL if data.level_field is None else _text(row, data.level_field, place)
        yield _text(row, data.problem_field, place), _text(row, data.answer_field, place), level


def _saved_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet file or of a folder written by `Dataset.save_to_disk`."""
    import datasets  # half a second: only where it is needed

    try:
        saved = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read by datasets ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(saved, datasets.Dataset):
        raise UserError(f"{path}: expected one data set, found the splits {', '.join(saved)}; name one of their "
                        "folders")
    for number, row in enumerate(saved):
        yield f"{path}:{number}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSONL file, read here and not by `datasets`, which cannot say which line is broken."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if field not in row:
        raise UserError(f"{place}: has no field {field!r}, found {', '.join(row) or 'none'}")
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: field {field!r} must be text or a number, found {type(value).__name__}")
    return str(value)
