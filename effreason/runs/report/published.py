"""Published numbers to compare with: the paper's 7B family, accuracy and mean tokens on three sets.

Source: Arora & Zanette, "Training Language Models to Reason Efficiently", arXiv 2502.04463.
"""

from dataclasses import dataclass

SOURCE = "Arora & Zanette, arXiv 2502.04463"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published operating point."""

    alpha: float | None             # None = the model before training
    accuracy: float                 # share of correct answers, 0..1
    tokens: float                   # mean tokens of a response


# By a part of the model's name, then by the preset of problems: alpha, accuracy, tokens.
NUMBERS: dict[str, dict[str, tuple[tuple[float | None, float, float], ...]]] = {
    "R1-Distill-Qwen-7B": {
        "gsm8k": ((None, 0.926, 1626), (0.1, 0.917, 813), (0.2, 0.889, 249)),
        "math500": ((None, 0.933, 4044), (0.1, 0.921, 2824), (0.2, 0.883, 1978)),
        "aime24": ((None, 0.557, 13173), (0.1, 0.513, 10893), (0.2, 0.533, 9209)),
    },
}


def published_points(model: str, set_name: str) -> list[Published]:
    """Returns what was published about a model on a set of problems; [] if nothing was.

    Args: model, a name or path; set_name, as in evaluation.path."""
    for part, sets in NUMBERS.items():
        if part.lower() in model.lower():
            return [Published(alpha=alpha, accuracy=accuracy, tokens=tokens)
                    for alpha, accuracy, tokens in sets.get(set_name, ())]
    return []
