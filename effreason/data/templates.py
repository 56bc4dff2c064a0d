"""Chat templates around the user's turn: the checkpoint's own, the paper's, or one from a file."""

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effreason.data.files import one_line
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError
from effreason.runtime.files import check_present
from effreason.types import Problem

USER, ASSISTANT, THINK = "<｜User｜>", "<｜Assistant｜>", "<think>"
# The paper's prompt for the R1 models: BOS, the user's turn, and the start of the assistant's.
R1 = "{{ bos_token }}" + USER + "{{ messages[-1]['content'] }}" + ASSISTANT
NAMED = {"r1": R1, "r1_think": R1 + "{{ '" + THINK + "\\n' }}"}
REQUIRED_TOKENS = {"r1": (USER, ASSISTANT), "r1_think": (USER, ASSISTANT, THINK)}
# Some templates, such as those of Llama 3, write today's date into the prompt. A macro of the same
# name shadows the function of transformers with one date, the fallback of these templates. Jinja
# trims the newline after it.
DATE = "26 Jul 2024"
DATE_FORMATS = {"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26",
                "%-d": "26", "%e": "26", "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00",
                "%S": "00"}
FIXED_DATE = "".join(["{% macro strftime_now(format) %}{{ format",
                      *(f"|replace('{code}', '{value}')" for code, value in DATE_FORMATS.items()),
                      " }}{% endmacro %}\n"])
PROBE, ANSWER = "What is 12+34?", "It is 46."
DISPLAY_LINES, DISPLAY_COLUMNS = 20, 1000


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a problem."""

    name: str                       # r1 | r1_think | the file | "the checkpoint's own"
    text: str                       # Jinja, as transformers renders it
    user_prompt: str                # the user's turn; {problem} is replaced by the problem
    system_prompt: str | None = None                # the turn before it; None = there is none
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # variables of the text

    @property
    def sha256(self) -> str:
        """Hash of all but the name: two runs with the same one have the same prompts."""
        parts = [self.text, self.user_prompt]
        if self.system_prompt is not None or self.arguments:
            parts.append(json.dumps([self.system_prompt, dict(self.arguments)], sort_keys=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """Lines for the log if the template is not used as one might think."""
        notes = [f"data.template_arguments: {self.name} does not read {name}, which changes nothing"
                 for name in self.arguments if not re.search(rf"\b{re.escape(name)}\b", self.text)]
        if self.text.startswith(FIXED_DATE):
            notes.append(f"data.template: {self.name} writes the date; it always gets {DATE}, so "
                         "that prompts stay the same")
        return notes

    def facts(self) -> dict[str, Any]:
        """Returns what a checkpoint stores about it."""
        return {"name": self.name, "user_prompt": self.user_prompt,
                "system_prompt": self.system_prompt, "arguments": dict(self.arguments),
                "text": self.text, "sha256": self.sha256}

    def messages(self, problem_text: str) -> list[dict[str, str]]:
        """Returns the turns of a conversation that asks for a problem's solution."""
        turn = {"role": "user", "content": self.user_prompt.replace("{problem}", problem_text)}
        return [*self.system_turn(), turn]

    def system_turn(self) -> list[dict[str, str]]:
        """Returns the turn before the user's, or nothing."""
        return ([] if self.system_prompt is None
                else [{"role": "system", "content": self.system_prompt}])


def choose(tokenizer: Any, data: DataConfig) -> Template:
    """Returns the template that the configuration names, after a test on a problem.

    Raises UserError if there is none, the tokenizer lacks its special tokens, it is not Jinja, it
    drops the problem or the system prompt, or it begins with two BOS."""
    name, text = _load(tokenizer, data.template)
    # An exported model's template has the fixed date already.
    needs_date = "strftime_now" in text and not text.startswith(FIXED_DATE)
    arguments = data.template_arguments or {}
    options = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if taken := sorted((options - {"tools", "documents"}).intersection(arguments)):
        raise UserError("data.template_arguments must be variables of the template that effreason "
                        f"and transformers do not set themselves, got {taken[0]}")
    template = Template(name, FIXED_DATE + text if needs_date else text, data.user_prompt,
                        data.system_prompt, arguments)

    rendered = render(tokenizer, template, PROBE)
    if data.user_prompt.replace("{problem}", PROBE).strip() not in rendered:
        raise UserError(f"data.template: {template.name} leaves out the user's turn; rendered: "
                        f"{rendered[:200]!r}")
    if data.system_prompt is not None and data.system_prompt.strip() not in rendered:
        raise UserError(f"data.system_prompt: the template {template.name} leaves it out; "
                        f"rendered: {rendered[:200]!r}")
    bos = tokenizer.bos_token_id
    if bos is not None and list(encode(tokenizer, rendered)[:2]) == [bos, bos]:
        raise UserError(f"data.template: {template.name} begins with {tokenizer.bos_token} twice; "
                        f"rendered: {rendered[:200]!r}")
    return template


def render(tokenizer: Any, template: Template, problem_text: str) -> str:
    """Returns one problem in the template, up to the start of the response."""
    return render_all(tokenizer, template, [problem_text])[0]


def render_all(tokenizer: Any, template: Template, texts: Sequence[str]) -> list[str]:
    """Returns each problem in the template. Raises UserError if it cannot be rendered."""
    return render_messages(tokenizer, template, [template.messages(text) for text in texts])


def render_messages(tokenizer: Any, template: Template,
                    conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """Returns each conversation in the template. Raises UserError if it cannot be rendered."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True,
            chat_template=template.text, **template.arguments)
    except jinja2.TemplateSyntaxError as error:
        line = error.lineno - template.text.startswith(FIXED_DATE)
        raise UserError(f"data.template: {template.name}:{line}: not a Jinja template "
                        f"({error.message})") from None
    except Exception as error:      # a template may do anything: divide by zero, recurse forever
        raise UserError(f"data.template: {template.name} cannot be rendered ({one_line(error)})"
                        ) from None


def encode(tokenizer: Any, rendered: str) -> np.ndarray:
    """Returns int32[S] ids of a rendered prompt, which has its own BOS: no second one is added."""
    return encode_all(tokenizer, [rendered])[0]


def encode_all(tokenizer: Any, rendered: Sequence[str]) -> list[np.ndarray]:
    """Returns the same for many prompts, which the tokenizer encodes in parallel."""
    if not rendered:
        return []
    encoded = tokenizer(list(rendered), add_special_tokens=False)["input_ids"]
    return [np.array(ids, np.int32) for ids in encoded]


def check_rows(tokenizer: Any, problems: Iterable[Problem], rows: int) -> None:
    """Raises UserError if a prompt holds a token beyond the model's vocabulary.

    A tokenizer may have more tokens than the model has rows, as long as no prompt needs them."""
    for problem in problems if len(tokenizer) > rows else ():
        if (largest := int(problem.prompt.max(initial=0))) >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(f"the prompt of {problem.text[:60]!r} holds token {largest}, "
                            f"{token!r}, which the model has no row for: vocab_size is {rows}")


def opens_thinking(rendered: str) -> bool:
    """Returns whether the response begins inside the thinking."""
    return rendered.rstrip().endswith(THINK)


def turn_end_notes(tokenizer: Any, template: Template, eos_ids: Sequence[int]) -> list[str]:
    """Returns a line for the log if the token that ends the assistant's turn is not an EOS token.

    A model that has learnt the template ends its response with that token; if nothing stops it
    there, it writes the next turn, up to the length limit."""
    end = _turn_end(tokenizer, template)
    if end is None or end in eos_ids:
        return []

    token, known = (tokenizer.convert_ids_to_tokens(ids) for ids in (end, list(eos_ids)))
    return [f"note: {template.name} ends the assistant's turn with {token} (id {end}), but the "
            f"model's EOS tokens are {', '.join(map(str, known))} (ids "
            f"{', '.join(map(str, eos_ids))}): a response may run on into another turn; "
            f"--rollout.stop_ids '{token}' ends it there"]


def _turn_end(tokenizer: Any, template: Template) -> int | None:
    """Returns the special token that follows the assistant's words; None if there is none."""
    conversation = [*template.messages(PROBE), {"role": "assistant", "content": ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, chat_template=template.text, **template.arguments)
    except Exception:               # a template may have no place for such a conversation
        return None

    before, found, rest = rendered.partition(ANSWER)
    tokens = encode(tokenizer, rest.strip()).tolist() if found and PROBE in before else []
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def display(rendered: str) -> str:
    r"""Returns a rendered prompt for the log, at most about 20 lines; trailing newlines as \n."""
    text = rendered.rstrip("\n")
    lines = [line if len(line) <= DISPLAY_COLUMNS
             else f"{line[: DISPLAY_COLUMNS - 20]} ... {line[-15:]}" for line in text.split("\n")]
    if len(lines) > DISPLAY_LINES:
        half = (DISPLAY_LINES - 1) // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join(lines) + "\\n" * (len(rendered) - len(text))


def _load(tokenizer: Any, name: str | None) -> tuple[str, str]:
    """Returns name and text of the template."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {"default": own}
    names = ", ".join([*NAMED, *named]) + " or a file"
    if name is None:
        if "default" in named:
            return "the checkpoint's own", named["default"]
        has = f"none called default, only {', '.join(named)}" if named else "no chat template"
        raise UserError(f"data.template must be {names}: the checkpoint has {has}")

    if name in NAMED:
        missing = [token for token in REQUIRED_TOKENS[name]
                   if len(tokenizer.encode(token, add_special_tokens=False)) != 1
                   or tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        if tokenizer.bos_token is None:
            missing.append("a BOS token")
        if missing:
            raise UserError(f"data.template {name} is for DeepSeek-R1 models: the tokenizer has no "
                            f"{', '.join(missing)}")
        return name, NAMED[name]
    if name in named:
        return name, named[name]

    if os.path.lexists(name):
        check_present(Path(name))
    try:
        return name, Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        similar = difflib.get_close_matches(name, [*NAMED, *named], n=1)
        hint = f"did you mean {similar[0]}?" if similar else reason
        raise UserError(f"data.template must be null, {names}, got {name!r} "
                        f"({hint})") from None
