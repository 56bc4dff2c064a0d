"""Numbers as people read them: one format for tables, reports, model cards and the terminal."""

from collections.abc import Callable

from effreason.evaluation.statistics import Comparison, Interval


def signed(value: float, digits: int = 1) -> str:
    """Formats a number with its sign: "+3.5"; a number that rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def points(change: float) -> str:
    """Formats a change of a share in points: 0.035 -> "+3.5"."""
    return signed(100 * change)


def share(value: float) -> str:
    """Formats a share in per cent, without the sign: 0.579 -> "57.9"."""
    return f"{100 * value:.1f}"


def percent(value: float) -> str:
    """Formats a share: 0.579 -> "57.9 %"."""
    return f"{share(value)} %"


def tokens(count: float) -> str:
    """Formats a mean number of tokens, with a decimal below 1,000: "92.4", "13,173"."""
    return f"{count:,.1f}" if abs(count) < 999.95 else f"{count:,.0f}"


def ratio(value: float) -> str:
    """Formats a ratio of tokens: "0.42"."""
    return f"{value:.2f}"


def interval(bounds: Interval, word: Callable[[float], str]) -> str:
    """Formats an interval: "[+1.2, +5.9]". Args: word, the format of one bound."""
    low, high = bounds
    return f"[{word(low)}, {word(high)}]"


def p_value(value: float) -> str:
    """Formats a p-value: "0.823", "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def aes(score: float | None) -> str:
    """Formats an accuracy-efficiency score: "+0.52"; "-" if the base is never right."""
    return "-" if score is None else signed(score, digits=2)


def problems_needed(count: int) -> str:
    """Formats `Comparison.problems_to_detect`, an estimate good for two digits: "4,800"."""
    return f"{float(f'{count:.2g}'):,.0f}"


def change(comparison: Comparison) -> str:
    """Formats the change of accuracy in points, with its interval: "+3.5 [+1.2, +5.9]"."""
    bounds = interval(comparison.accuracy_change_interval, points)
    return f"{points(comparison.accuracy_change)} {bounds}"


def saved_interval(comparison: Comparison) -> Interval:
    """Returns the interval of the share of tokens saved."""
    low, high = comparison.token_ratio_interval
    return 1.0 - high, 1.0 - low


def saved(comparison: Comparison) -> str:
    """Formats the share of tokens saved, with its interval: "57.9 % [55.1, 60.4]"."""
    bounds = interval(saved_interval(comparison), share)
    return f"{percent(1.0 - comparison.token_ratio)} {bounds}"


def findings(comparison: Comparison) -> str:
    """Puts a comparison into words.

    "57.9 % fewer tokens [55.1, 60.4], accuracy +3.5 points [+1.2, +5.9]"."""
    saving, (low, high), word = 1.0 - comparison.token_ratio, saved_interval(comparison), "fewer"
    if saving < 0:
        saving, low, high, word = -saving, -high, -low, "more"

    return (f"{percent(saving)} {word} tokens {interval((low, high), share)}, "
            f"accuracy {points(comparison.accuracy_change)} points "
            f"{interval(comparison.accuracy_change_interval, points)}")
