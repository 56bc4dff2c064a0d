"""Reads numbers in English words, and knows phrases and words that stand for mathematics."""

import re

ONES = {name: value for value, name in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split())}
TENS = {name: 10 * (index + 2) for index, name in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split())}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that multiply the number before them, in the languages of usual data sets.
MULTIPLES = SCALES | {
    "hundred": 100, "dozen": 12, "score": 20, "gross": 144, "lakh": 10**5, "lac": 10**5,
    "crore": 10**7, "mln": 10**6, "mio": 10**6, "bn": 10**9, "mld": 10**9, "bln": 10**9,
    "tn": 10**12, "trn": 10**12, "millionen": 10**6, "milliarden": 10**9, "millones": 10**6,
    "тысяча": 10**3, "тысячи": 10**3, "тысяч": 10**3, "тыс": 10**3, "млн": 10**6, "млрд": 10**9,
    "百": 100, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "백": 100,
    "천": 10**3, "만": 10**4, "억": 10**8}
# Parts of one: a half, thirds, hundredths, ten-thousandths.
PARTS = {name: value for value, name in enumerate(
    "half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), start=2)}
PARTS |= {"halve": 2, "quarter": 4, "twentieth": 20} | {
    f"{name}th": value for name, value in (ONES | SCALES | {"hundred": 100}).items() if value > 12}
ORDINALS = {"first", *PARTS, *(name[:-1] + "ieth" for name in TENS)}

SAME = {
    name: mathematics for mathematics, names in {
        r"\emptyset": "no solution|no solutions|no real solution|no real solutions|none|"
        "there is no solution|there are no solutions|there are no real solutions|"
        "empty set|the empty set|has no solution|no solution exists|no solutions exist|无解",
        r"\mathbb{R}": "all real numbers|all reals|the real numbers|the set of all real numbers|"
        "all real number|real numbers|every real number|any real number|"
        "set of all real numbers|all real values",
        r"\infty": "infinity|positive infinity|plus infinity",
        r"-\infty": "negative infinity|minus infinity",
        r"\text{does not exist}": "dne|d.n.e|does not exist|doesn't exist|limit does not exist|"
        "the limit does not exist",
    }.items() for name in names.split("|")
}
# What comes before an answer: The answer is 5, Answer: 5, so the final answer is, option B.
INTRODUCTION = re.compile(
    r"(?:(?:so|thus|hence|therefore|and)\b,?\s*)?(?:the\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:(?:answer|result|solution)\b\s*(?:is\s*:?|are\s*:?|equals|=|:)"
    r"|(?:option|choice|answer)\b(?:\s+is\b)?\s*:?(?=\s*[(\[]?[A-Za-z]\b))\s*(?=\S)",
    re.IGNORECASE)
EXCEPT = re.compile(r"(?:the set of )?(?:all )?(?:real numbers?|reals?)(?: values)?(?: of)?\s*x?"
                    r",?\s*(?:except(?: for)?|other than|but|excluding|not equal to)\s*"
                    r"(?:x\s*=\s*)?([^{}]+)", re.IGNORECASE)
ARTICLE = re.compile(r"(?:the|an|a)\s+(?=\S{2})", re.IGNORECASE)
VERDICT = re.compile(r"(yes|no|true|false)\s*[,.;:!]\s*(.+)", re.IGNORECASE | re.DOTALL)
DOUBT = {True: re.compile(r"\b(?:no|false|not|never|but|however|unless|except|only if|or|maybe|"
                          r"\w+n't|cannot|impossible)\b", re.IGNORECASE),
         False: re.compile(r"\b(?:yes|true|but|however|unless|except|only if|or|maybe)\b",
                           re.IGNORECASE)}


def mathematics(text: str) -> str:
    """Returns a phrase such as "no solution" as mathematics; any other text unchanged."""
    if "real" in text and (others := EXCEPT.fullmatch(without_text(text).strip())):
        return rf"\mathbb{{R}}\setminus\{{{others[1].strip()}\}}"
    return SAME.get(" ".join(without_text(text).casefold().split()).rstrip("."), text)


def number(words: str) -> int | None:
    """Returns the integer that English words name, None if they name none.

    Units and tens add up to a group below a hundred, "hundred" multiplies the group and a scale
    ends it. Scales must decrease from group to group.
    """
    parts = words.replace("-", " ").split()
    sign = -1 if parts[:1] in (["negative"], ["minus"]) else 1
    parts = parts[1:] if sign < 0 else parts
    if not parts or len(parts) > 20:
        return None

    total, group, last = 0, None, 10**15
    below: int | None = None        # the part of the group below a hundred

    for index, part in enumerate(parts):
        if part in ONES and (
                below is None or (below >= 20 and below % 10 == 0 and 0 < ONES[part] < 10)):
            below = (below or 0) + ONES[part]
        elif part in TENS and below is None:
            below = TENS[part]
        elif part == "hundred" and group is None and below is not None and 0 < below < 10:
            group, below = 100 * below, None
        elif part in SCALES and SCALES[part] < last and (group or below):
            total, last = total + ((group or 0) + (below or 0)) * SCALES[part], SCALES[part]
            group, below = None, None
        elif part == "and" and 0 < index < len(parts) - 1 and (group or total) and below is None:
            continue
        else:
            return None

    return sign * (total + (group or 0) + (below or 0))


def is_number(word: str) -> bool:
    """Returns whether a word counts, multiplies or divides: six, dozen, lakh, thirds."""
    singular = word.removesuffix("s")
    return any(form in table for form in (word, singular)
               for table in (ONES, TENS, MULTIPLES, ORDINALS))


def without_text(text: str) -> str:
    r"""Removes \text{} but not its words."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)


def bare(text: str) -> str:
    """Returns words without article, marks, spaces, hyphens and case: an ellipse is ellipse."""
    text = ARTICLE.sub("", without_text(text).strip(), count=1)
    return re.sub(r"[\s\-.]", "", text.rstrip(" ,!?;:")).casefold()


def verdict(text: str) -> str:
    """Returns yes for "Yes, it is possible": a clause may repeat a verdict, but not doubt it."""
    match = VERDICT.fullmatch(without_text(text).strip())
    affirms = match is not None and match[1].casefold() in ("yes", "true")
    return match[1] if match and not DOUBT[affirms].search(match[2]) else text


def without_introduction(text: str) -> str:
    """Removes "the answer is", "option" and the like from the front."""
    match = INTRODUCTION.match(text)
    return text[match.end():] if match else text
