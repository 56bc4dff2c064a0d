"""The data sets with a short name: their location, their columns, how their answers are read.

A data set whose rows need more than the names of columns has a small function here that returns a
row with the columns problem and answer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

Shape = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A data set of the Hugging Face Hub, or of a local copy."""

    hub: str | None                         # id on the Hub; None = a local copy only
    train: str | None                       # split to train on; None = the set has none
    test: str | None                        # split to evaluate on; None = the set has none
    subsets: tuple[str | None, ...] = (None,)   # configurations, concatenated in this order
    problem: str = "problem"                # column with the text of the problem
    answer: str = "answer"                  # column with the answer
    answer_from: str = "whole"              # whole | hashes | boxed, as data.answer_from
    kind: str = "math"                      # math | choice | text, as data.answer_kind
    choices: str | None = None              # column with the answers to choose from
    level: str | None = None                # column with the difficulty; "level" in a local copy
    folder: str | None = None               # of the local copy, if it is not the preset's name
    samples: int = 1                        # responses to each problem in an evaluation
    shape: Shape | None = None              # applied to each row if naming columns is not enough
    about: str                              # description and licence, for docs/data.md


def olympiad_row(row: dict[str, Any]) -> dict[str, Any]:
    """OlympiadBench: context that questions share has its own column; the answer is a list."""
    answers = row["final_answer"] or ()
    text = "\n".join(part for part in (row.get("context"), row["question"]) if part)
    return {"problem": text, "answer": ", ".join(answers)}


def letter_row(row: dict[str, Any]) -> dict[str, Any]:
    """BIG-Bench Hard: the options are part of the input, the target is "(A)"."""
    return {"problem": row["input"], "answer": row["target"].strip("() ")}


PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(
        hub="openai/gsm8k", subsets=("main",), train="train", test="test", problem="question",
        answer_from="hashes", about="grade-school word problems; 7,473 + 1,319; MIT"),
    "math": Preset(
        hub="hiyouga/math12k", train="train", test="test", folder="math12k", level="level",
        about="competition mathematics (Hendrycks et al.) without MATH-500; 12,000 + 500; MIT"),
    "math500": Preset(
        hub="HuggingFaceH4/MATH-500", train=None, test="test", level="level", samples=3,
        about="the 500 test problems of MATH that most papers report; MIT"),
    "aime24": Preset(
        hub="HuggingFaceH4/aime_2024", train=None, test="train", samples=10,
        about="AIME 2024, I and II; 30; problems (c) MAA"),
    "aime25": Preset(
        hub="math-ai/aime25", train=None, test="test", samples=10,
        about="AIME 2025, I and II; 30; problems (c) MAA"),
    "amc23": Preset(
        hub="math-ai/amc23", train=None, test="test", problem="question",
        about="AMC 12 2023 with numbers as answers; 40; problems (c) MAA"),
    "minerva": Preset(
        hub="math-ai/minervamath", train=None, test="test", problem="question",
        about="undergraduate science of OpenCourseWare (Minerva); 272"),
    "olympiad_bench": Preset(
        hub="Hothan/OlympiadBench", subsets=("OE_TO_maths_en_COMP",), train=None, test="train",
        shape=olympiad_row,
        about="OlympiadBench, open-ended mathematics in English without pictures; 674; Apache-2.0"),
    "deepscaler": Preset(
        hub="agentica-org/DeepScaleR-Preview-Dataset", train="train", test=None,
        about="AIME, AMC, Omni-MATH and STILL, before 2024; 40,315; MIT"),
    "paper": Preset(
        hub="daman1209arora/compression_dataset", train="train", test=None, answer="extracted",
        about="what the paper trained on: of MATH, cn_k12, AIME, AoPS and olympiads (NuminaMath); "
              "3,200"),
    "converted_aime": Preset(
        hub=None, train="train", test="test", samples=10,
        about="the paper's AIME set: 1983 to 2023 + AIME 2024; 919 + 30; local copy only; problems "
              "(c) MAA"),
    "commonsense_qa": Preset(
        hub="tau/commonsense_qa", train="train", test="validation", problem="question",
        answer="answerKey", kind="choice", choices="choices",
        about="everyday questions with five answers; 9,741 + 1,221 (the test split has no "
              "answers); MIT"),
    "logical_deduction": Preset(
        hub="SaylorTwift/bbh", train=None, test="test", kind="choice", shape=letter_row,
        subsets=tuple(f"logical_deduction_{count}_objects" for count in ("three", "five", "seven")),
        about="BIG-Bench Hard, the order of three, five and seven objects; 750; MIT"),
}
