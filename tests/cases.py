"""Runs the cases of public bug reports: python -m tests.cases ../shared/cases/cases.jsonl [ID ...]

Answers are graded by the real grader. Every other case is the user's own command, in a directory of
its own; what is right is said by CHECKS: the exit code, and what the output must and must not say.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from effreason.grading.grader import Grader, Reference

ROOT = Path(__file__).parent.parent
TINY = ROOT / "effreason/data/tiny/reasoner"
PROMPT = ["--prompt", "(80*9)%10", "--max-new-tokens", "48", "--temperature", "0"]
ONE_STEP = ["--data.user_prompt", "{problem}", "--evaluation.problems", "0", "--run.steps", "1",
            "--rollout.prompts_per_step", "2", "--rollout.group_size", "4",
            "--rollout.max_new_tokens", "96"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, standard output, and both outputs together."""

    code: int
    stdout: str
    output: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a command must do. Every pattern of `says` is somewhere in its output."""

    code: int = 0
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ("Traceback", )

    def wrong(self, outcome: Outcome) -> str | None:
        """Returns what is wrong with the outcome, or None."""
        if outcome.code != self.code:
            return f"exit code {outcome.code}, expected {self.code}: {outcome.output[-300:]}"
        text = " ".join(outcome.output.split())         # a terminal breaks lines anywhere
        missing = [pattern for pattern in self.says if not re.search(pattern, text)]
        present = [pattern for pattern in self.never if re.search(pattern, text)]
        if missing or present:
            return f"missing {missing}, unwanted {present}: {text[-300:]}"
        return None


class Runner:
    """Runs commands of one case in a directory of its own."""

    def __init__(self, files: Path, directory: Path):
        self.files = files
        self.directory = directory

    def shell(self, command: str, *arguments: str | Path) -> Outcome:
        """Runs a line of bash in which "$@" are the arguments."""
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                       "COLUMNS": "200"}
        done = subprocess.run(["bash", "-c", command, "bash", *map(str, arguments)], text=True,
                              cwd=self.directory, env=environment, capture_output=True,
                              timeout=600)
        return Outcome(done.returncode, done.stdout, done.stdout + done.stderr)

    def model(self, name: str) -> Path:
        """Builds a variant of the tiny model."""
        subprocess.run([sys.executable, self.files / "make_models.py", self.directory, name, TINY],
                       check=True)
        return self.directory / name

    def generate(self, model: Path) -> Outcome:
        """Generates one response with the most likely tokens."""
        return self.shell('effreason generate --model "$@"', model, *PROMPT)

    def train(self, *arguments: str | Path) -> Outcome:
        """Trains for one step, or as the arguments say."""
        run = self.directory / "run"
        return self.shell(f'python {ROOT}/train.py "$@"', "--run.directory", run, *ONE_STEP,
                          *arguments)


Check = Callable[[Runner], str | None]


def opens(name: str, *says: str) -> Check:
    """The variant of the tiny model generates what the model itself does."""
    def check(runner: Runner) -> str | None:
        outcome = runner.generate(runner.model(name))
        plain = runner.generate(TINY)
        if outcome.stdout != plain.stdout:
            return f"generates {outcome.output!r}, the model itself {plain.stdout!r}"
        return Expected(says=says).wrong(outcome)
    return check


def refuses(name: str, *says: str) -> Check:
    """The variant of the tiny model ends the command with one line."""
    return lambda runner: Expected(2, ("error: ", *says)).wrong(
        runner.generate(runner.model(name)))


def trains(file: str, *says: str, arguments: tuple[str, ...] = (),
           unwanted: tuple[str, ...] = ()) -> Check:
    """One step is trained on the file."""
    return lambda runner: Expected(0, says, ("Traceback", *unwanted)).wrong(
        runner.train("--data.path", runner.files / file, *arguments))


def cache_folder(runner: Runner) -> str | None:
    """The folder of a model in the cache of the Hub is its snapshot, or its name is said."""
    snapshot = runner.directory / "models--org--name/snapshots/0123abcd"
    shutil.copytree(TINY, snapshot)
    outcome = runner.generate(snapshot.parent.parent)
    if outcome.code == 0:
        return None if outcome.stdout == runner.generate(TINY).stdout else "another response"
    return Expected(2, ("snapshots/0123abcd",)).wrong(outcome)


def template_arguments(runner: Runner) -> str | None:
    """A template sees the arguments that the configuration gives it."""
    template = runner.directory / "template.jinja"
    template.write_text("{% if thinks is defined and not thinks %}{{ raise_exception('quiet') }}"
                        "{% endif %}" + (TINY / "chat_template.jinja").read_text())
    arguments = ("--data.path", "tiny", "--data.template", str(template))
    with_argument = runner.train(*arguments, "--data.template_arguments", "{thinks: false}")
    return (Expected(2, ("quiet",)).wrong(with_argument)
            or Expected().wrong(runner.train(*arguments)))


def special_marks(*says: str) -> Check:
    """A tokenizer whose marks of thinking are special tokens: answers are graded as without."""
    def check(runner: Runner) -> str | None:
        trained = runner.train("--data.path", "tiny", "--model.path", runner.model("think_special"))
        if wrong := Expected(says=says).wrong(trained):
            return wrong
        rows = (runner.directory / "run/rollouts.jsonl").read_text().splitlines()
        finished = [row for row in map(json.loads, rows) if row["finish"] == "eos"]
        unmarked = [row["response"] for row in finished if "</think>" not in row["response"]]
        return f"responses without the mark: {unmarked}" if unmarked or not finished else None
    return check


def no_answers(runner: Runner) -> str | None:
    """A step in which no response has an answer says so once, with the likely cause."""
    outcome = runner.train("--data.path", "tiny", "--rollout.max_new_tokens", "4",
                           "--run.steps", "2", "--rollout.max_truncated", "1")
    said = re.findall(r"warning: none of \d+ responses has an answer .*cut off", outcome.output)
    return Expected().wrong(outcome) or (None if len(said) == 1 else outcome.output[-500:])


def directory_first(runner: Runner) -> str | None:
    """A directory that holds a run is refused before the model and the data are read."""
    data = ("--data.path", "tiny")
    return (Expected().wrong(runner.train(*data))
            or Expected(2, ("holds a run",), ("Traceback", "problems to train on")).wrong(
                runner.train(*data)))


def damaged_checkpoint(runner: Runner) -> str | None:
    """A damaged checkpoint: the run goes on from the one before, or the error names that one."""
    data = ("--data.path", "tiny", "--checkpoint.every", "1", "--checkpoint.keep", "2")
    if wrong := Expected().wrong(runner.train(*data, "--run.steps", "2")):
        return wrong
    state = runner.directory / "run/checkpoints/2/state"
    largest = max((path for path in state.rglob("*") if path.is_file()),
                  key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
    outcome = runner.train(*data, "--run.steps", "3", "--run.resume", "true")
    if outcome.code == 0:
        return Expected(says=("checkpoints/1",)).wrong(outcome)
    return Expected(2, ("checkpoints/2", "checkpoint 1 is whole", "rm -r ")).wrong(outcome)


def closed_output(runner: Runner) -> str | None:
    """A closed standard output is no error of ours."""
    file = runner.directory / "answers.jsonl"
    file.write_text('{"response": "\\\\boxed{5}", "gold": "5"}\n')
    outcome = runner.shell('effreason grade "$@" >&-', file)
    return Expected(code=outcome.code).wrong(outcome) or (
        None if outcome.code == 0 or outcome.output.count("\n") == 1 else outcome.output)


CHECKS: dict[str, Check] = {
    "m1-a1": lambda runner: opens("no_rope_theta")(runner) or Expected().wrong(
        runner.generate(runner.model("llama2_like"))),
    "m2-a1": opens("stale_index_old_shards", "index"),
    "m3-a1": refuses("lfs_pointer", "Git LFS", "git lfs pull|hf download"),
    "m4-a1": refuses("adapter_only", "adapter", "org/base"),
    "m5-a1": special_marks(),
    "m6-a1": opens("tmpl_bom"),
    "m7-a1": opens("tok_beyond_vocab", "42 tokens"),
    "m8-a1": opens("genconfig_eos_beyond", "EOS 45"),
    "m9-a1": refuses("tmpl_list_nodefault", "rag", "tool_use"),
    "m10-a1": template_arguments,
    "m11-a1": opens("rope_type_null"),
    "m12-a1": opens("no_model_prefix"),
    "m13-a1": cache_folder,
    "d1-a1": trains("verl.parquet", "4 problems", arguments=(
        "--data.problem_field", "prompt", "--data.answer_field", "reward_model.ground_truth")),
    "d2-a1": trains("jsonlist_answer.jsonl", "4 problems"),
    "d3-a1": trains("nan.jsonl", "left out 1 .*without an answer"),
    "d4-a1": trains("proof.jsonl", "proof"),
    "d5-a1": trains("null.jsonl", "left out 1 .*without an answer"),
    "d6-a1": trains("level_null.jsonl", "4 problems", arguments=(
        "--data.level_field", "solve_rate")),
    "d7-a1": trains("formfeed.jsonl", r"mended|restored|left out"),
    "d8-a1": trains("ok.jsonl.gz", "4 problems"),
    "d8-a2": trains("hubdir", "problems"),
    "d8-a3": trains("pretty.json", "problems"),
    "d9-a1": trains("decimal.parquet", "4 problems"),
    "d10-a1": trains("dup_conflict.jsonl", "answer"),
    "t1-a1": directory_first,
    "t2-a1": closed_output,
    "t3-a1": no_answers,
    "t4-a1": damaged_checkpoint,
}


def grade(cases: list[dict]) -> dict[str, str | None]:
    """Returns for each case what is wrong with its verdict, or None."""
    inputs = [case["input"] for case in cases]
    with Grader(workers=2) as grader:
        grades = grader.grade([row["response"] for row in inputs],
                              [Reference(row["gold"]) for row in inputs])
    verdicts = ["correct" if each.correct else "wrong" for each in grades]
    return {case["id"]: None if verdict == case["right"] else
            f"{verdict}, expected {case['right']}: {case['input']}"
            for case, verdict in zip(cases, verdicts, strict=True)}


def main(path: str, *ids: str) -> int:
    """Runs the cases of a file, or those with these ids. Returns the exit code."""
    cases = [json.loads(line) for line in Path(path).read_text().splitlines()]
    cases = [case for case in cases if not ids or case["id"] in ids]
    results = grade([case for case in cases if case["kind"] == "grading"])

    for case in cases:
        if case["kind"] != "grading":
            with tempfile.TemporaryDirectory() as directory:
                runner = Runner((Path(path).parent / "files").resolve(), Path(directory))
                results[case["id"]] = CHECKS[case["id"]](runner)
        reason = results[case["id"]]
        print(f"{'FAIL' if reason else 'pass'} {case['id']:8} {reason or case['fault']}",
              flush=True)

    failed = sum(reason is not None for reason in results.values())
    print(f"{len(cases) - failed} of {len(cases)} cases pass")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
