r"""Rewrites answers in canonical LaTeX, one spelling for one meaning, without reading the
mathematics.

Canonical: braces around every argument, `\frac`, `\cdot`, `\le`, `\text{...}` only around words, no
`$`, no `\left`, no spacing commands, no separators of thousands, plain function names with a
backslash.
"""

import re
import unicodedata
from functools import lru_cache

from effreason.grading import words
from effreason.grading.symbols import RENAMED, SUBSCRIPTS, SUPERSCRIPTS, SYMBOLS, TEXTS

ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1, "_": 1}

TOKEN = re.compile(r"\\\\|\\[a-zA-Z]+|\\.|.", re.DOTALL)
# Function names without backslash, as sympy prints them. Some need a bracket: "sec" may be a unit.
PLAIN_NAME = re.compile(
    r"\\(?:text[a-z]*|mathrm|mathbf|mbox|operatorname)\s*\{[^{}]*\}"
    r"|(?<![\\a-zA-Z])((?:arcsin|arccos|arctan|asin|acos|atan|sinh|cosh|tanh|cot|sec|csc"
    r"|exp|gcd|det)(?=\s*[(^{])|sqrt(?=\s*[({\d])|lcm(?=\s*\()|(?:sin|cos|tan|ln|log|pi|theta|alpha"
    r"|beta|phi|omega|infty|(?i:infinity|inf|oo))(?![a-zA-Z]))")
NAMES = {"asin": r"\arcsin ", "acos": r"\arccos ", "atan": r"\arctan ",
         "lcm": r"\operatorname{lcm}", **dict.fromkeys(("infinity", "inf", "oo"), r"\infty ")}
TEX_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:\{,\}|,\s*\\!\s*|\\!,?|\\,|\\;|\\:|\\ "
                           r"|~|\u2009|\u202f|\xa0)\d{3})+)(?!\d)")
PLAIN_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# Between the elements of a list.
SEPARATORS = re.compile(r"[,;]|\\l(?:and|or)(?![a-zA-Z])")
CONNECTIVES = {**dict.fromkeys("and und et y e и और と 그리고 와 과".split(), r"\land "),
               **dict.fromkeys("or oder ou o или या または 또는".split(), r"\lor ")}
CONNECTIVE = re.compile(
    r"\\text\{[^{}]*\}|(?<![\\\w])(and|or|und|oder|или|и|या|और|または|또는)(?!\w)")
WORDS = re.compile(r"(?:[^\W\d_]|[ .,!?;:'/\-])*")
TWO_LETTERS = re.compile(r"[A-Za-z]{2}|(?![A-Za-z])[^\W\d_]")
# Rewritten in this order before the text is split into tokens.
BEFORE = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\{:\}", ":"), (r"\.\.\.", r"\\dots "), (r"\*\*", "^"), (r"<=", r"\\le "), (r">=", r"\\ge "),
    (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]|\\cr(?![a-zA-Z])", r"\\\\"),     # ends of rows
    (r"(?<![a-zA-Z\\])C(\d)(?!\d)", r"C_\1"),                      # constants of integration
    (r"(?<![a-zA-Z\\\d])(?:(?:US|CA|AU|NZ|HK|C|A|R|S)?\\?\$"
     r"|(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CAD|AUD|Rs|Rp)\b\.?)\s*(?=\d)", ""),
    (r"(?<![\\a-zA-Z])abs\(([^()]*)\)", r"|\1|"),
    (r"\\(?:text|mathrm|operatorname)\s*\{\s*((?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|det"
     r"|(?:gcd|max|min)(?=\s*\}\s*(?:\\left\s*)?(?:\(|\\\{|_)))\s*\}", r"\\\1 "),
    (r"\\(?:text|mathrm)\s*\{\s*lcm\s*\}", r"\\operatorname{lcm}"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\cdot "),
    (r"\\not\s*\\in(?![a-zA-Z])", r"\\notin "), (r"\\not\s*=|(?<!\d)!=", r"\\ne "),
    (r"\{([^{}]{1,50})\\choose(?![a-zA-Z])([^{}]{1,50})\}", r"\\binom{\1}{\2}"),
    (r"^([^{}\\]{1,50})\\choose(?![a-zA-Z])([^{}]{1,50})$", r"\\binom{\1}{\2}"),
    (r"\\(?:[hv]space\*?\s*\{[^{}]*\}|(?:text)?color\s*\{[a-zA-Z!0-9]*\}|tag\s*\{[^{}]*\})", " "),
    (r"(?<![\\^_}\]a-zA-Z])\{\s*\}", " "),
    (r"\\mathbb\s*([A-Z])(?![a-zA-Z])", r"\\mathbb{\1}"))]
# Rewritten when every argument has its braces.
AFTER = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\\setminus "),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])", r"\\cup "),
    (r"(?<![\d.])(\d*\.\d*)\\(?:bar|dot|overline)\s*\{?(\d+)\}?", r"\1\\overline{\2}"),
    (r"(\\(?:max|min|gcd)|\\operatorname\{lcm\})\s*\\\{((?:[^{}\\]|\\[a-z]|\{[^{}]*\})*)\\\}",
     r"\1(\2)"))]
MAX_CHARACTERS = 4_000
MAX_DEPTH = 60                      # of nested arguments; deeper ones are left as they are
MARKDOWN = re.compile(r"""(\*{1,3}|_|`+|'|")((?:(?!\1).)+)\1""", re.DOTALL)
CYCLE = re.compile(r"(\d*)\.(\d{0,9}?)(\d{1,9}?)\3+(?:\.{3}|\\dots)|(\d*)\.\((\d{1,20})\)")
# Commands whose backslash and first letter were read as an escape: a form feed and rac{1}{2}. The
# same without the control character, if no word begins so.
ESCAPED = re.compile(
    r"[\a\b\v\f](?=[a-z])|\t(?=(?:ext|imes|frac|heta)(?![a-z]))|\n(?=eq(?![a-z]))"
    r"|\r(?=(?:ight|ho|angle)(?![a-z]))|(?<![a-zA-Z\\\f\t])(?:(?=rac\{)|(?=ext\{)|(?=imes(?![a-z])))")
LETTER_OF_ESCAPE = {"\a": "a", "\b": "b", "\v": "v", "\f": "f", "\t": "t", "\n": "n", "\r": "r"}
# Words before the answer: = 5, \therefore 5, about 5.
LEAD = re.compile(
    r"(?:=|\\(?:therefore|implies|Rightarrow|Longrightarrow)(?![a-zA-Z])|(?:\\text\{\s*)?"
    r"(?:about|approximately|approx\.?|roughly|around|exactly|only|just)(?=[\s\d}])\s*\}?)\s*(?=\S)",
    re.IGNORECASE)


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """Rewrites an answer in canonical notation; linear in its length."""
    text = mended(text).strip()
    text = TEX_THOUSANDS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    text = _ascii(text).strip()
    if marked := MARKDOWN.fullmatch(text):
        text = marked[2]
    for pattern, replacement in BEFORE:
        text = pattern.sub(replacement, text)
    text = PLAIN_NAME.sub(_with_backslash, text)
    if r"\begin" not in text:  # \\frac is \frac escaped twice, but in a matrix \\ ends a row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)

    tokens = _renamed(TOKEN.findall(text))
    text = _Writer(tokens).write(0, len(tokens))
    text = _join_thousands(re.sub(r"\s+", " ", text)).strip()
    for pattern, replacement in AFTER:
        text = pattern.sub(replacement, text)

    text = words.without_introduction(text)
    text = text[lead.end():] if (lead := LEAD.match(text)) else text
    # 2.7 1828 1828... may be any number: two long blocks are a cycle only right after the point.
    if (cycle := CYCLE.fullmatch(text)) and (cycle[4] is not None or len(cycle[3]) == 1
                                             or not cycle[2] or 3 * cycle[3] in text):
        text = rf"{cycle[1] or cycle[4] or 0}.{cycle[2] or ''}\overline{{{cycle[3] or cycle[5]}}}"
    return CONNECTIVE.sub(_connected, text).rstrip(" .,;:\\").lstrip(" ,;#")


def mended(text: str) -> str:
    r"""Restores commands that lost their backslash to an escape of JSON: \frac, \text, \beta."""
    def command(match: re.Match[str]) -> str:
        lost = "f" if text.startswith("rac", match.end()) else "t"
        return "\\" + LETTER_OF_ESCAPE.get(match[0], lost)

    return ESCAPED.sub(command, text)


def braces_match(text: str) -> bool:
    """Returns whether every brace that groups has its partner."""
    braces = [token for token in TOKEN.findall(text) if token in ("{", "}")]
    return 2 * len(matching(braces)) == len(braces)


def key(text: str) -> str:
    r"""Returns a canonical text without spaces, \text and, of words, case, article and hyphens."""
    if is_word(text):
        return words.bare(text)
    bare = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", words.without_text(text))      # "5 5" is not 55
    if clock := re.fullmatch(r"0?(\d{1,2})(:\d\d(?::\d\d)?)?([ap])\.?m\.?", bare, re.IGNORECASE):
        return clock[1] + (clock[2] or ":00") + clock[3].lower()
    return bare


def is_word(text: str) -> bool:
    r"""Returns whether an answer is words: \text{...} with letters, or four letters in a row."""
    if re.fullmatch(r"(?:\\text\{[^{}]*\}|[^\W\d_]|[' .\-])+", text) is None:
        return False
    if re.match(r"[a-zA-Z]\s*\\text", text):
        return False
    return (r"\text" in text or re.search(r"[A-Za-z]{4}|[^\W\d_a-zA-Z]", text) is not None
            or text.strip().lower() in ("yes", "no"))


def strip_parentheses(text: str) -> str:
    """Removes brackets that only group the whole text: (x+1), {x+1}, ((1)); a tuple keeps its."""
    pairs = matching(text)
    first, last = 0, len(text) - 1

    while first < last and text[first] + text[last] in ("()", "{}") and pairs.get(first) == last:
        begin, end = first + 1, last - 1
        while begin < end and text[begin] == " ":
            begin += 1
        while end > begin and text[end] == " ":
            end -= 1

        # the innermost pair, which may enclose a list
        if text[begin] not in "({" or pairs.get(begin) != end:
            if len(split_top(text[begin:end + 1], SEPARATORS)) > 1:
                break
        first, last = begin, end

    return text[first:last + 1].strip()


def matching(text: str | list[str]) -> dict[int, int]:
    """Maps each opening bracket's index to its closing one's; ] may close (, as in an interval."""
    opening, closing = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
    braces = {"{", r"\{", "}", r"\}"}
    pairs: dict[int, int] = {}
    stack: list[int] = []

    for index, character in enumerate(text):
        if character in opening:
            stack.append(index)
        elif (character in closing and stack
              and (text[stack[-1]] in braces) == (character in braces)):
            pairs[stack.pop()] = index

    return pairs


def split_top(text: str, separators: str | re.Pattern[str]) -> list[str]:
    """Splits at separators outside all brackets."""
    pattern = re.compile(f"[{separators}]") if isinstance(separators, str) else separators
    pairs = matching(text)
    opened, closed = set(pairs), set(pairs.values())
    pieces, begin, index, depth = [], 0, 0, 0

    while index < len(text):
        depth += (index in opened) - (index in closed)
        match = pattern.match(text, index) if depth == 0 else None
        if match and match.end() > index:
            pieces.append(text[begin:index])
            begin = index = match.end()
        else:
            index += 1

    return [piece.strip() for piece in [*pieces, text[begin:]]]


def elements(text: str) -> list[str]:
    """Splits at commas, semicolons, and, or outside all brackets; without empty pieces."""
    return [piece for piece in split_top(text, SEPARATORS) if piece]


def depth(text: str) -> int:
    """Returns how deep brackets are nested."""
    level = deepest = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


def _ascii(text: str) -> str:
    """Writes Unicode mathematics in LaTeX: ½, x², √2, π, full-width digits."""
    if text.isascii():
        return text
    # of zero width
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    text = re.sub("(?:[0-9][\u0304\u0305])+", lambda match: rf"\overline{{{match[0][::2]}}}", text)

    for command, scripts in (("^", SUPERSCRIPTS), ("_", SUBSCRIPTS)):
        for run in sorted(set(re.findall(f"[{''.join(scripts)}]+", text)), key=len, reverse=True):
            script = "".join(scripts[character] for character in run)
            text = text.replace(run, command + "{" + script + "}")

    text = re.sub(r"√(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = "".join(_character(character) for character in text)
    return unicodedata.normalize("NFKC", text)


def _character(character: str) -> str:
    if character in SYMBOLS:
        new = SYMBOLS[character]
        return new + " " if new[-1:].isalpha() else new

    if (unicodedata.category(character) == "No"
            and "⁄" in (parts := unicodedata.normalize("NFKC", character))):
        top, bottom = parts.split("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}" if top and bottom else character
    return character


def _with_backslash(match: re.Match[str]) -> str:
    return NAMES.get(match[1].lower(), f"\\{match[1]} ") if match[1] else match[0]


def _connected(match: re.Match[str]) -> str:
    """Replaces and, or by their signs, except inside \\text{...}."""
    return CONNECTIVES[match[1]] if match[1] else match[0]


def _renamed(tokens: list[str]) -> list[str]:
    result: list[str] = []
    for index, token in enumerate(tokens):
        if token == "." and index and tokens[index - 1] in (r"\left", r"\right"):
            continue

        new = r"\text" if token in TEXTS else RENAMED.get(token, token)
        neighbours = (*result[-1:], *tokens[index + 1:index + 2])
        if not new and "".join(neighbours[-2:]).isdigit() and result:
            new = " "  # 5\square 6 without the square must not become 56
        if new:
            result.extend([new] if len(new) < 3 or new.count("\\") == 1 and new[1:].isalpha()
                          else TOKEN.findall(new))

    return result


class _Writer:
    r"""Puts braces around arguments of \frac, \sqrt, ^ etc., and keeps \text only around words."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.pairs = tokens, matching(tokens)

    def write(self, begin: int, end: int, depth: int = 0) -> str:
        """Writes the tokens from begin to end."""
        if depth > MAX_DEPTH:
            return "".join(self.tokens[begin:end])

        parts: list[str] = []
        while begin < end:
            token = self.tokens[begin]
            if token in ARGUMENTS:
                part, begin = self.command(begin, end, depth)
            elif token == r"\text":
                part, begin = self.words(begin, end, depth)
                part = part if part.startswith("\\") else f" {part} "
            elif token == "{" and begin in self.pairs:
                part = "{" + self.write(begin + 1, self.pairs[begin], depth + 1) + "}"
                begin = self.pairs[begin] + 1
            else:
                part, begin = token, begin + 1
            if part[:1].isalpha() and parts and parts[-1][:1] == "\\" and parts[-1][-1:].isalpha():
                part = f" {part}"           # a renamed command must not merge with the next letter
            parts.append(part)

        return "".join(parts)

    def command(self, index: int, end: int, depth: int) -> tuple[str, int]:
        """Returns a command with its arguments in braces, and the index after them."""
        text = command = self.tokens[index]
        index = self.after_spaces(index + 1)
        if command == r"\sqrt" and self.tokens[index:index + 1] == ["["] and index in self.pairs:
            text += "".join(self.tokens[index:self.pairs[index] + 1])
            index = self.pairs[index] + 1
        for _ in range(ARGUMENTS[command]):
            index = self.after_spaces(index)
            if index >= end or self.tokens[index] in ("}", ")", "]"):
                break
            argument, index = self.argument(command, index, end, depth + 1)
            text += "{" + argument + "}"
        return text, index

    def argument(self, command: str, index: int, end: int, depth: int) -> tuple[str, int]:
        r"""Returns one argument: a group, a command; a whole number for ^, _ and \sqrt (10^-12)."""
        token = self.tokens[index]
        if token in ("{", "(") and index in self.pairs:
            inside = self.write(index + 1, self.pairs[index], depth)
            return inside if token == "{" else f"({inside})", self.pairs[index] + 1
        if depth < MAX_DEPTH and token in ARGUMENTS:
            return self.command(index, end, depth)
        if token == r"\text":
            return self.words(index, end, depth)

        last = index + 1
        if command in ("^", "_", r"\sqrt"):
            last += token in ("-", "+") and last < end and self.tokens[last] not in "{}()[] "
            while self.tokens[last - 1].isdigit() and last < end and self.tokens[last].isdigit():
                last += 1
        return "".join(self.tokens[index:last]), last

    def words(self, index: int, end: int, depth: int) -> tuple[str, int]:
        r"""Returns \text{...} with words in it, the sign of and, or; of others what they hold."""
        begin = self.after_spaces(index + 1)
        close = self.pairs.get(begin) if self.tokens[begin:begin + 1] == ["{"] else None
        if close is None:
            return "", begin

        inside = "".join(self.tokens[begin + 1:close])
        between = inside.strip(" ,")
        if between in CONNECTIVES and (between[1:] or between != inside):
            return CONNECTIVES[between], close + 1
        if WORDS.fullmatch(inside) and TWO_LETTERS.search(inside):
            return rf"\text{{{inside}}}", close + 1
        return self.write(begin + 1, close, depth + 1), close + 1

    def after_spaces(self, index: int) -> int:
        while self.tokens[index:index + 1] == [" "]:
            index += 1
        return index


def _join_thousands(text: str) -> str:
    """Removes the comma of 1,234 outside brackets; inside them it separates two elements."""
    level, levels = 0, []
    for index, character in enumerate(text):
        escaped = index > 0 and text[index - 1] == "\\"
        level += character in "([" or (character == "{" and escaped)
        level -= character in ")]" or (character == "}" and escaped)
        levels.append(level)

    def joined(match: re.Match[str]) -> str:
        return match[0] if levels[match.start()] > 0 else match[0].replace(",", "")

    return PLAIN_THOUSANDS.sub(joined, text)
