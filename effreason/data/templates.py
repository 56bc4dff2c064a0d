"""The chat template round the user's turn: the checkpoint's own, the paper's, or one from a file."""

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
# The paper's prompt for the R1 models: BOS, the user's turn, and the assistant's up to where the model goes on.
R1 = "{{ bos_token }}" + USER + "{{ messages[-1]['content'] }}" + ASSISTANT
NAMED = {"r1": R1, "r1_think": R1 + "{{ '" + THINK + "\\n' }}"}
NEEDED = {"r1": (USER, ASSISTANT), "r1_think": (USER, ASSISTANT, THINK)}
# Some templates, such as those of Llama 3, write today's date into the prompt. A macro of the same name hides that of
# transformers: one date, the one that these templates have where they cannot ask. The line end behind it is trimmed.
DATE = "26 Jul 2024"
PARTS = {"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26", "%e": "26",
         "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
FIXED_DATE = ("{% macro strftime_now(format) %}{{ format"
              + "".join(f"|replace('{part}', '{value}')" for part, value in PARTS.items()) + " }}{% endmacro %}\n")
PROBE = "What is 12+34?"
SHOWN_LINES, SHOWN_CHARACTERS = 20, 1000


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands round a problem."""

    name: str                       # r1 | r1_think | the file | "the checkpoint's own"
    text: str                       # Jinja, as transformers renders it
    user_prompt: str                # the user's turn; {problem} stands for the problem

    @property
    def sha256(self) -> str:
        """Of all that makes prompts of problems: two runs with the same one have the same prompts."""
        return hashlib.sha256(f"{self.text}\0{self.user_prompt}".encode()).hexdigest()

    @property
    def note(self) -> str | None:
        """A line for people on what is not as the template's author has it."""
        if not self.text.startswith(FIXED_DATE):
            return None
        return f"data.template: {self.name} writes the date; it always gets {DATE}, so that prompts stay the same"

    def facts(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"name": self.name, "user_prompt": self.user_prompt, "text": self.text, "sha256": self.sha256}


def choose(tokenizer: Any, data: DataConfig) -> Template:
    """The template that the configuration names, tried on a problem.

    Raises: UserError where there is none, the tokenizer lacks its special tokens, it is no Jinja, it drops the problem,
        or it begins with two BOS."""
    name, text = _named(tokenizer, data.template)
    # An exported model's template has the date already.
    dated = "strftime_now" in text and not text.startswith(FIXED_DATE)
    template = Template(name, FIXED_DATE + text if dated else text, data.user_prompt)
    rendered = render(tokenizer, template, PROBE)
    if data.user_prompt.replace("{problem}", PROBE).strip() not in rendered:
        raise UserError(f"data.template: {template.name} leaves out the user's turn; rendered: {rendered[:200]!r}")
    bos = tokenizer.bos_token_id
    if bos is not None and list(encode(tokenizer, rendered)[:2]) == [bos, bos]:
        raise UserError(f"data.template: {template.name} begins with {tokenizer.bos_token} twice; rendered: "
                        f"{rendered[:200]!r}")
    return template


def render(tokenizer: Any, template: Template, problem_text: str) -> str:
    """One problem in the template, up to where the model is to go on."""
    return render_all(tokenizer, template, [problem_text])[0]


def render_all(tokenizer: Any, template: Template, texts: Sequence[str]) -> list[str]:
    """Each problem in the template. Raises: UserError for a template that cannot be rendered."""
    import jinja2

    turns = [[{"role": "user", "content": template.user_prompt.replace("{problem}", text)}] for text in texts]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True,
                                             chat_template=template.text)
    except jinja2.TemplateSyntaxError as error:
        line = error.lineno - template.text.startswith(FIXED_DATE)
        raise UserError(f"data.template: {template.name}:{line}: not a Jinja template ({error.message})") from None
    except Exception as error:      # a template may do anything: divide by zero, call itself for ever
        raise UserError(f"data.template: {template.name} cannot be rendered ({one_line(error)})") from None


def encode(tokenizer: Any, rendered: str) -> np.ndarray:
    """int32[S'] ids of a rendered prompt, which holds its own BOS: a second one is what no model was trained on."""
    return encode_all(tokenizer, [rendered])[0]


def encode_all(tokenizer: Any, rendered: Sequence[str]) -> list[np.ndarray]:
    """The same for many prompts at once, which the tokenizer does in parallel."""
    if not rendered:
        return []
    return [np.array(ids, np.int32) for ids in tokenizer(list(rendered), add_special_tokens=False)["input_ids"]]


def opens_thinking(rendered: str) -> bool:
    """The response begins inside the thinking."""
    return rendered.rstrip().endswith(THINK)


def display(rendered: str) -> str:
    r"""A rendered prompt for people to read, at most about 20 lines; line ends at its end are written \n."""
    text = rendered.rstrip("\n")
    lines = [line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 20]} ... {line[-15:]}"
             for line in text.split("\n")]
    if len(lines) > SHOWN_LINES:
        half = (SHOWN_LINES - 1) // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join(lines) + "\\n" * (len(rendered) - len(text))


def _named(tokenizer: Any, name: str | None) -> tuple[str, str]:
    """Name and text of the template."""
    if name is None:
        try:
            return "the checkpoint's own", tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"data.template must be {', '.join(NAMED)} or a file: the checkpoint has no chat template"
                            ) from None
    if name in NAMED:
        unknown = [token for token in NEEDED[name] if len(tokenizer.encode(token, add_special_tokens=False)) != 1
                   or tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        if tokenizer.bos_token is None:
            unknown.append("a BOS token")
        if unknown:
            raise UserError(f"data.template {name} is for DeepSeek-R1 models: the tokenizer has no "
                            f"{', '.join(unknown)}")
        return name, NAMED[name]
    try:
        return name, Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        near = difflib.get_close_matches(name, NAMED, n=1)
        raise UserError(f"data.template must be null, {', '.join(NAMED)} or a file, got {name!r} "
                        + (f"(did you mean {near[0]}?)" if near else f"({reason})")) from None
