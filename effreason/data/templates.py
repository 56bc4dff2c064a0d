"""Chat templates around the user's turn: the checkpoint's own, the paper's, or one from a file."""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effreason.data.files import one_line
from effreason.runtime.config import DataConfig
from effreason.runtime.errors import UserError

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
PROBE = "What is 12+34?"
DISPLAY_LINES, DISPLAY_COLUMNS = 20, 1000


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a problem."""

    name: str                       # r1 | r1_think | the file | "the checkpoint's own"
    text: str                       # Jinja, as transformers renders it
    user_prompt: str                # the user's turn; {problem} is replaced by the problem

    @property
    def sha256(self) -> str:
        """Hash of text and user prompt: two runs with the same one have the same prompts."""
        return hashlib.sha256(f"{self.text}\0{self.user_prompt}".encode()).hexdigest()

    @property
    def note(self) -> str | None:
        """A line for the log if the template is not used as its author wrote it."""
        if not self.text.startswith(FIXED_DATE):
            return None
        return (f"data.template: {self.name} writes the date; it always gets {DATE}, so that "
                "prompts stay the same")

    def facts(self) -> dict[str, str]:
        """Returns what a checkpoint stores about it."""
        return {"name": self.name, "user_prompt": self.user_prompt, "text": self.text,
                "sha256": self.sha256}


def choose(tokenizer: Any, data: DataConfig) -> Template:
    """Returns the template that the configuration names, after a test on a problem.

    Raises UserError if there is none, the tokenizer lacks its special tokens, it is not Jinja, it
    drops the problem, or it begins with two BOS."""
    name, text = _load(tokenizer, data.template)
    # An exported model's template has the fixed date already.
    needs_date = "strftime_now" in text and not text.startswith(FIXED_DATE)
    template = Template(name, FIXED_DATE + text if needs_date else text, data.user_prompt)

    rendered = render(tokenizer, template, PROBE)
    if data.user_prompt.replace("{problem}", PROBE).strip() not in rendered:
        raise UserError(f"data.template: {template.name} leaves out the user's turn; rendered: "
                        f"{rendered[:200]!r}")
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
    import jinja2

    contents = [template.user_prompt.replace("{problem}", text) for text in texts]
    try:
        return tokenizer.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents], tokenize=False,
            add_generation_prompt=True, chat_template=template.text)
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


def opens_thinking(rendered: str) -> bool:
    """Returns whether the response begins inside the thinking."""
    return rendered.rstrip().endswith(THINK)


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
    if name is None:
        try:
            return "the checkpoint's own", tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"data.template must be {', '.join(NAMED)} or a file: the checkpoint "
                            "has no chat template") from None

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

    try:
        return name, Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        similar = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"did you mean {similar[0]}?" if similar else reason
        raise UserError(f"data.template must be null, {', '.join(NAMED)} or a file, got {name!r} "
                        f"({hint})") from None
