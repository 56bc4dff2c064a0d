"""How a verdict came about."""

import enum

from effreason.runtime.errors import UserError


class Undecided(UserError):
    """The grader is too slow or too broken for its verdicts to mean anything."""


class GradeStatus(enum.StrEnum):
    """How a verdict came about. From `GUARD` on the answer was not compared: it counts as wrong."""

    words: str

    def __new__(cls, value: str, words: str = "") -> "GradeStatus":
        """Makes a member. Args: words, the status for people."""
        member = str.__new__(cls, value)
        member._value_, member.words = value, words
        return member

    NO_ANSWER = "no_answer", "no box"
    """The response has no box, or its last box is empty or open; wrong."""
    TOO_LONG = "too_long", "over 4000 characters"
    """The answer or the reference has more characters than the grader reads; wrong."""
    EXACT = "exact", "decided exactly"
    """Decided in plain Python."""
    SYMBOLIC = "symbolic", "compared by algebra"
    """Decided by sympy in a worker."""
    CACHED = "cached", "algebra, as before"
    """Decided by sympy for an earlier response with the same answer and reference."""
    FUNCTION = "function", "by your function"
    """Decided by the user's own function."""
    GUARD = "guard", "too large to compare"
    """The answer is too large for sympy to try."""
    SOFT_TIMEOUT = "soft_timeout", "out of processor time"
    """The comparison used up its processor time; the worker lives on."""
    HARD_KILL = "hard_kill", "stuck, worker killed"
    """The worker could not be interrupted, or slept for too long, and was killed."""
    MEMORY = "memory", "out of memory"
    """The comparison ran out of memory."""
    BUDGET = "budget", "out of the step's time"
    """The grading time of the step was over before this answer was tried."""
    ERROR = "error", "the comparison failed"
    """The comparison failed; `Grade.reason` has the exception."""
