"""Published figures to stand beside one's own: the paper's 7B family, accuracy and mean tokens on three sets.

Source: Arora & Zanette, "Training Language Models to Reason Efficiently", arXiv 2502.04463.
"""

from dataclasses import dataclass

SOURCE = "Arora & Zanette, arXiv 2502.04463"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published operating point."""

    alpha: float | None             # None = the model before training
    accuracy: float                 # share of right answers, 0..1
    tokens: float                   # mean tokens of a response


# By a part of the model's name, then by the preset of problems.
FIGURES: dict[str, dict[str, tuple[Figure, ...]]] = {
    "R1-Distill-Qwen-7B": {
        "gsm8k": (Figure(alpha=None, accuracy=0.926, tokens=1626), Figure(alpha=0.1, accuracy=0.917, tokens=813),
                  Figure(alpha=0.2, accuracy=0.889, tokens=249)),
        "math500": (Figure(alpha=None, accuracy=0.933, tokens=4044), Figure(alpha=0.1, accuracy=0.921, tokens=2824),
                    Figure(alpha=0.2, accuracy=0.883, tokens=1978)),
        "aime24": (Figure(alpha=None, accuracy=0.557, tokens=13173), Figure(alpha=0.1, accuracy=0.513, tokens=10893),
                   Figure(alpha=0.2, accuracy=0.533, tokens=9209)),
    },
}


def figures(model: str, name: str) -> tuple[Figure, ...]:
    """What was published of a model on a set of problems; () where nothing was.

    Args: model, a name or path; name, of the set as evaluation.path has it."""
    return next((sets.get(name, ()) for part, sets in FIGURES.items() if part.lower() in model.lower()), ())
