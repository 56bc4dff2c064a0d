"""Turns words into mathematics: seven, negative two, no solution, all real numbers, infinity."""

import re

UNITS = {name: value for value, name in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split())}
TENS = {name: 10 * (index + 2) for index, name in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split())}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
NOT_A_NUMBER = re.compile(r"[^a-z -]")
SAME = {
    name: mathematics for mathematics, names in {
        r"\emptyset": "no solution|no solutions|no real solution|no real solutions|"
        "there is no solution|there are no solutions|there are no real solutions|"
        "empty set|the empty set|has no solution|no solution exists|no solutions exist",
        r"\mathbb{R}": "all real numbers|all reals|the real numbers|the set of all real numbers|"
        "all real number|real numbers|every real number|any real number|"
        "set of all real numbers|all real values",
        r"\infty": "infinity|positive infinity|plus infinity",
        r"-\infty": "negative infinity|minus infinity",
        r"\text{does not exist}": "dne|d.n.e|does not exist|doesn't exist|limit does not exist|"
        "the limit does not exist",
    }.items() for name in names.split("|")
}
PART_NAMES = "half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
PARTS = {name: value for value, name in enumerate(PART_NAMES.split(), start=2)} | {"quarter": 4}
FRACTION = re.compile(rf"(.+)[ -]({'|'.join(PARTS)}|halve)s?")
ARTICLE = re.compile(r"(?:the|an|a)\s+(?=\S{2})", re.IGNORECASE)


def mathematics(text: str) -> str:
    """Returns an answer in words in canonical notation; any other text unchanged."""
    plain = " ".join(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).casefold().split()).rstrip(".")
    if plain in SAME:
        return SAME[plain]
    if fraction := FRACTION.fullmatch(plain):
        top = 1 if fraction[1] == "a" else number(fraction[1])
        return text if top is None else rf"\frac{{{top}}}{{{PARTS.get(fraction[2], 2)}}}"
    value = number(plain)
    return text if value is None else str(value)


def number(words: str) -> int | None:
    """Returns the integer that English words name, None if they name none.

    Units and tens add up to a group below a hundred, "hundred" multiplies the group and a scale
    ends it. Scales must decrease from group to group.
    """
    if NOT_A_NUMBER.search(words) or len(words) > 100:
        return None
    parts = words.replace("-", " ").split()
    sign = -1 if parts[:1] in (["negative"], ["minus"]) else 1
    parts = parts[1:] if sign < 0 else parts
    if not parts:
        return None

    total, group, last = 0, None, 10**12
    below: int | None = None        # the part of the group below a hundred

    for index, part in enumerate(parts):
        if part in UNITS and (
                below is None or (below >= 20 and below % 10 == 0 and 0 < UNITS[part] < 10)):
            below = (below or 0) + UNITS[part]
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


def bare(text: str) -> str:
    """Removes the article before words: an ellipse is ellipse."""
    text = re.sub(r"\\text\{\s*([^{}]*)\}", r"\1", text)
    return ARTICLE.sub("", text, count=1) if ARTICLE.match(text) else text
