"""How a verdict came about."""

import enum

from effreason.runtime.errors import UserError


class Undecided(UserError):
    """The grader is too slow or too broken for its verdicts to mean anything."""


class GradeStatus(enum.StrEnum):
    """How a verdict came about. From `GUARD` on the answer was not compared: it counts as wrong."""

    NO_ANSWER = "no_answer"
    """The response has no box, or its last box is empty or open; wrong."""
    TOO_LONG = "too_long"
    """The answer or the reference has more characters than the grader reads; wrong."""
    EXACT = "exact"
    """Decided in plain Python."""
    SYMBOLIC = "symbolic"
    """Decided by sympy in a worker."""
    CACHED = "cached"
    """Decided by sympy for an earlier response with the same answer and reference."""
    FUNCTION = "function"
    """Decided by the user's own function."""
    GUARD = "guard"
    """The answer is too large for sympy to try."""
    SOFT_TIMEOUT = "soft_timeout"
    """The comparison used up its processor time; the worker lives on."""
    HARD_KILL = "hard_kill"
    """The worker could not be interrupted, or slept for too long, and was killed."""
    MEMORY = "memory"
    """The comparison ran out of memory."""
    BUDGET = "budget"
    """The grading time of the step was over before this answer was tried."""
    ERROR = "error"
    """The comparison failed; `Grade.reason` has the exception."""
