"""The grader: that no answer can hurt the trainer, its workers, statuses, budgets and a function of
one's own."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from grading_cases import HOSTILE, REPOSITORY, boxed, load

from effreason.grading import grader as grading
from effreason.grading import guard, notation, pool
from effreason.grading.exact import exact
from effreason.grading.grader import Budget, Grade, Grader, Reference
from effreason.runtime.errors import UserError


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


# Hostile answers


@pytest.mark.parametrize("unit", ["1,", "x=", "=5", r"\pm", r"\in ", r"\text{a}", "1 aaa ", "(1,",
                                  "{", "x<1 or ", r"\begin{pmatrix}", "½", "5 million", "sqrt(",
                                  r"\frac",])
def test_exact_is_quick_on_long_answers(unit):
    start = time.process_time()
    for reference in ("5", "x=5", "(1,2)"):
        assert exact(unit * (notation.MAX_CHARACTERS // len(unit) - 1) + "5", reference) is not True
    assert time.process_time() - start < 2.0


def test_hostile_answers_cost_little_and_gain_nothing(grader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grades = grader.grade([boxed(text) for text in HOSTILE] + HOSTILE, ["7"] * 2 * len(HOSTILE))
    assert not any(grade.correct for grade in grades)
    assert not {grade.status for grade in grades} & {"error", "hard_kill", "budget"}
    assert list(tmp_path.rglob("*PWNED*")) == list(REPOSITORY.rglob("PWNED")) == []


# What cost the whole time limit of one answer, or of all of them
SLOW = {"soft_timeout", "hard_kill", "budget"}


def test_adversarial_cases(grader):
    cases = load("adversarial.jsonl")
    grades = grader.grade([boxed(case["pred"]) for case in cases], [case["gold"] for case in cases])
    assert not {grade.status for grade in grades} & SLOW
    clear = [(case, grade) for case, grade in zip(cases, grades, strict=True)
             if case["want"] is not None]
    assert [case["name"] for case, grade in clear if grade.correct != case["want"]] == []


def test_hostile_answers_cost_the_others_of_their_batch_nothing(grader):
    honest = [boxed(rf"\frac{{{row}\sqrt{{3}}}}{{2}}") if row % 5 == 0 else boxed(str(row))
              for row in range(250)]
    references = [rf"{row} \sqrt{{0.75}}" if row % 5 == 0 else str(row) for row in range(250)]
    grades = grader.grade(honest + [boxed(text) for text in HOSTILE[4:10]], references + ["7"] * 6)
    statuses = [grade.status for grade in grades]
    assert not set(statuses[:250]) & SLOW and set(statuses[250:]) & SLOW <= {"soft_timeout"}
    assert [grade.correct for grade in grades] == [True] * 250 + [False] * 6


@pytest.mark.parametrize("text", ["9^{9^{9}}", r"2^{10^{9}}", "(10^9)!", "99999!", "((5!)!)!",
                                  "x^{100000}", "(9^9)^(9^9)", "1" * 200, "x+" * 300 + "x",
                                  "(" * 20 + "x" + ")" * 20, "a," * 50])
def test_guard_stops(text):
    assert guard.is_too_large(notation.canonical(text))


@pytest.mark.parametrize("text", ["e^{x^2}", "5!", "n!", r"\frac{10!}{8!}", "2^{2005}", "x^{10}",
    r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", "(x+1)^{n^2}"])
def test_guard_lets_pass(text):
    assert not guard.is_too_large(notation.canonical(text))


# The workers and their supervision

ALGEBRA = (boxed(r"\sqrt{8}"), r"2\sqrt{2}")


def only(grader: Grader, response: str, reference: str) -> Grade:
    return grader.grade([response], [reference])[0]


def processes(grader: Grader) -> list[subprocess.Popen]:
    return [worker.process for worker in grader._pool._living]


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # ended; whoever has adopted it has not looked yet
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def small():
    # Clock time to spare: on a busy machine 0.4 s of processor time may take seconds.
    with Grader(workers=1, cpu_seconds=0.4, wall_seconds=15) as grader:
        assert only(grader, *ALGEBRA).status == "symbolic"
        yield grader


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_statuses(small):
    assert only(small, "nothing", "5") == Grade(False, None, "no_answer", pytest.approx(0, abs=1))
    assert only(small, boxed("5"), "5").status == "exact"
    assert only(small, boxed("6"), "5").correct is False
    assert only(small, boxed("1" * 30_000), "5").status == "too_long"
    assert only(small, boxed("9^{9^{9}}"), "5").status == "guard"
    assert only(small, *ALGEBRA) == Grade(True, r"\sqrt{8}", "cached", pytest.approx(0, abs=1))


def test_the_same_answer_is_asked_once(small):
    grades = small.grade([boxed(r"\sqrt{50}")] * 20, [r"5\sqrt{2}"] * 20)
    assert all(grade.correct and grade.status == "symbolic" for grade in grades)
    assert sum(grade.seconds > 0 for grade in grades) == 1


def test_soft_stop_keeps_the_worker_and_is_not_cached(small):
    (process,) = processes(small)
    for _ in range(2):
        assert only(small, boxed(r"\int e^{x^2}\sin(x^3)\ln(x) dx"), "5").status == "soft_timeout"
    assert processes(small) == [process] and only(small, boxed("x+x"), "2x").correct


def test_a_dead_worker_is_replaced_and_the_answer_still_counts(small):
    (process,) = processes(small)
    os.kill(process.pid, signal.SIGKILL)
    assert only(small, boxed(r"\sqrt{12}"), r"2\sqrt{3}").correct
    assert processes(small) != [process]


def test_a_stuck_worker_is_killed_and_nothing_is_cached(small, monkeypatch):
    (process,) = processes(small)
    with monkeypatch.context() as patch:
        patch.setattr(pool.Worker, "compare", raising(pool.WorkerStuck))
        assert only(small, boxed(r"\sqrt{20}"), r"2\sqrt{5}").status == "hard_kill"
    assert gone(process.pid)
    grade = only(small, boxed(r"\sqrt{20}"), r"2\sqrt{5}")
    assert grade.correct and grade.status == "symbolic"


def raising(error):
    def compare(worker, *pair, **limits):
        raise error

    return compare


@needs_proc
def test_a_worker_that_was_stopped_is_asked_again_in_a_new_process(small):
    (process,) = processes(small)
    os.kill(process.pid, signal.SIGSTOP)
    grade = only(small, boxed(r"\sqrt{125}"), r"5\sqrt{5}")
    assert grade.correct and grade.status == "symbolic"
    assert gone(process.pid) and processes(small) != [process]


def test_the_state_of_a_process(monkeypatch):
    assert pool._state(os.getpid()) in ("R", "S")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert pool._state(process.pid) == pool.STOPPED
        process.kill()
    assert pool._state(process.pid) == ""


def test_a_worker_that_goes_on_in_time_is_kept(small):
    (process,) = processes(small)
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (process.pid, signal.SIGCONT)).start()
    assert only(small, boxed(r"\sqrt{175}"), r"5\sqrt{7}").correct
    assert processes(small) == [process]


def test_a_worker_that_is_stopped_twice_is_the_graders_fault(small, monkeypatch):
    monkeypatch.setattr(pool.Worker, "compare", raising(pool.WorkerStopped))
    grade = only(small, boxed(r"\sqrt{245}"), r"7\sqrt{5}")
    assert grade.status == "error"
    assert grade.reason == "the worker that compared it was stopped, twice"


@pytest.mark.parametrize(("states", "outcome"), [
    ("SSSS", pool.WorkerStuck), ("RRRR", pool.WorkerStuck), ("T", pool.WorkerStopped),
    ("RRT", pool.WorkerStopped), ("RD", None)])
def test_a_busy_host_is_not_a_stuck_worker(small, monkeypatch, states, outcome):
    """The clock alone kills a worker that sleeps; one that waits for a processor gets more."""
    looks, clock = [], [0.0]

    class Poll:
        def poll(self, milliseconds):
            clock[0] += milliseconds / 1000
            return len(looks) == len(states)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pool, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr(pool, "_state", lambda pid: looks.append(1) or states[len(looks) - 1])
    (worker,) = small._pool._living
    with pytest.raises(outcome) if outcome else contextlib.nullcontext():
        worker._wait(Poll(), 1.0)
    assert len(looks) == {"SSSS": 1, "RRRR": pool.PATIENCE, "RRT": 3}.get(states, len(states))


def test_a_killer_answer_is_an_error_not_a_hang(small, monkeypatch):
    monkeypatch.setattr(pool.Worker, "compare", raising(pool.WorkerDied("it ended")))
    grade = only(small, boxed(r"\sqrt{28}"), r"2\sqrt{7}")
    assert (grade.correct, grade.answer, grade.status) == (False, r"\sqrt{28}", "error")


def test_worn_workers_are_replaced(small, monkeypatch):
    monkeypatch.setattr(pool, "MAX_TASKS", 0)
    (process,) = processes(small)
    assert only(small, boxed(r"\sqrt{32}"), r"4\sqrt{2}").correct
    assert gone(process.pid) and processes(small) != [process]


def test_memory_is_bounded(small):
    verdict = small._pool.compare("(10^{9})!", "5", 0.4)        # past the guard
    assert not verdict.correct
    assert only(small, boxed(r"\sqrt{44}"), r"2\sqrt{11}").correct


def test_budget(small, monkeypatch):
    monkeypatch.setattr(small, "step_budget_seconds", 0.0)
    grades = small.grade([boxed(r"\sqrt{45}")] * 3, [r"3\sqrt{5}"] * 3)
    assert [(grade.correct, grade.status) for grade in grades] == [(False, "budget")] * 3
    monkeypatch.undo()
    assert only(small, boxed(r"\sqrt{45}"), r"3\sqrt{5}").correct               # not cached


HARD = boxed(r"\int e^{x^2}\sin(x^3)\ln(x) dx")


def test_slow_answers_do_not_starve_the_others(monkeypatch):
    """The slow ones come first, and at their limits they would use up the budget."""
    monkeypatch.setattr(grading, "FIRST_SECONDS", 0.1)
    slow = [rf"\int e^{{x^2}}\sin(x^{{{power}}})\ln(x) dx" for power in range(3, 15)]
    with Grader(workers=1, cpu_seconds=0.4, step_budget_seconds=2.0) as grader:
        grades = grader.grade([boxed(text) for text in [*slow, r"\sqrt{8}", r"\sqrt{12}"]],
                              ["5"] * 12 + [r"2\sqrt{2}", r"2\sqrt{3}"])
    assert {grade.status for grade in grades[:12]} == {"soft_timeout"}
    assert [(grade.correct, grade.status) for grade in grades[12:]] == [(True, "symbolic")] * 2


def test_a_slow_answer_gets_longer_tries(small, monkeypatch):
    limits, compare = [], pool.Worker.compare

    def compared(worker, *pair, cpu_seconds, wall_seconds):
        limits.append(cpu_seconds)
        if len(limits) < 3:
            return pool.Verdict(False, "soft_timeout", seconds=cpu_seconds)
        return compare(worker, *pair, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds)

    monkeypatch.setattr(pool.Worker, "compare", compared)
    grade = only(small, boxed(r"\sqrt{63}"), r"3\sqrt{7}")
    assert grade.correct and grade.status == "symbolic"
    assert limits == [pytest.approx(30 / 2 / 512), pytest.approx(4 * 30 / 2 / 512), 0.4]


def test_code_that_cannot_be_interrupted_ends_by_its_processor_time(own):
    with Grader(workers=1, function="own_grader:blocks", cpu_seconds=0.2) as grader:
        start = time.process_time()
        assert only(grader, "response", "5").status == "hard_kill"
        assert time.process_time() - start < 5


def test_threads(grader):
    def check(row: int) -> bool:
        grades = grader.grade([boxed(rf"\sqrt{{{row * row * 3}}}")] * 2, [rf"{row}\sqrt{{3}}"] * 2)
        return all(grade.correct for grade in grades)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(2, 26)))


def test_submit_runs_in_the_background(grader):
    future = grader.submit([ALGEBRA[0], boxed("6")], [ALGEBRA[1], "5"])
    assert threading.current_thread() is threading.main_thread()
    assert [grade.correct for grade in future.result(timeout=60)] == [True, False]


def test_grade_wants_lists_of_one_length(grader):
    with pytest.raises(ValueError, match="as many references as responses, got 2 and 1"):
        grader.grade(["a"], ["b", "c"])


def test_submitted_calls_agree_with_one_call_and_use_all_workers(grader, monkeypatch):
    pairs = [(boxed(rf"\sqrt{{{row * row * 11}}}+{row % 7}"), rf"{row}\sqrt{{11}}+{row % 5}")
             for row in range(2, 50)]
    pairs[::5] = [(boxed(str(row)), "5") for row in range(len(pairs[::5]))]
    busy, most, compare = [0], [0], pool.Worker.compare

    def watched(worker, *arguments, **limits):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.002)
        try:
            return compare(worker, *arguments, **limits)
        finally:
            busy[0] -= 1

    monkeypatch.setattr(pool.Worker, "compare", watched)
    budget = grader.budget()
    futures = [grader.submit(*zip(*pairs[start:start + 3], strict=True), budget)
               for start in range(0, len(pairs), 3)]
    concurrent = grader.grade([ALGEBRA[0]], [ALGEBRA[1]])  # another thread grades meanwhile
    submitted = [grade for future in futures for grade in future.result(timeout=60)]
    assert concurrent[0].correct and most[0] == 2
    with Grader() as another:
        once = another.grade(*zip(*pairs, strict=True))
    background, foreground = ([(grade.correct, grade.answer) for grade in grades]
                              for grades in (submitted, once))
    assert background == foreground
    assert 0 < sum(grade.correct for grade in once) < len(once)


def test_later_tries_may_use_half_of_a_budget():
    budget = Budget(10.0)
    budget.spend(4.0, again=True)
    assert not budget.is_used_up(again=True)
    budget.spend(1.0, again=True)
    assert budget.is_used_up(again=True) and not budget.is_used_up(again=False)
    budget.spend(5.0, again=False)
    assert budget.is_used_up(again=False)


def test_calls_that_share_a_budget_end_together(small):
    budget = Budget(1.6)
    start = time.process_time()
    futures = [small.submit([HARD], [rf"\sqrt{{{row}}}"], budget) for row in range(2, 14)]
    grades = [future.result(timeout=60)[0] for future in futures]
    assert {grade.status for grade in grades} == {"soft_timeout"}
    # Half of the budget is for all but the first tries; the last ones may go beyond it.
    assert budget._used_again == pytest.approx(0.8, abs=0.45) and time.process_time() - start < 5


def test_kinds_of_golds(grader):
    references = [Reference("B", "choice", ("river", "bank")), Reference("5", "text"),
                  Reference("5"), "5"]
    grades = grader.grade([boxed("bank"), boxed("5.0"), boxed("5.0"), boxed("5.0")], references)
    assert [grade.correct for grade in grades] == [True, False, True, True]
    with pytest.raises(ValueError, match="kind must be one of math, choice, text, got letter"):
        grader.grade([boxed("B")], [Reference("B", "letter")])


def test_any_of_several_answers_is_right(grader):
    several = '["3", "\\\\frac{1}{2}"]'
    responses = [boxed("3"), boxed("0.5"), boxed("4"), "3", boxed("5")]
    grades = grader.grade(responses, [several] * 4 + ["5"])
    assert [grade.correct for grade in grades] == [True, True, False, False, True]
    assert [grade.answer for grade in grades] == ["3", "0.5", "4", None, "5"]
    assert grader.check_references([several, "5"]) == []


def test_bare_answers(grader):
    grades = grader.grade(["5", "{5", "", r"\boxed{5}", "6"], ["5"] * 5, bare=True)
    assert [grade.correct for grade in grades] == [True, False, False, True, False]
    assert (grades[2].answer, grades[2].status) == (None, "no_answer")


def test_every_grade_says_why(small):
    responses = ["<think>" + boxed("5"), boxed("5"), boxed(r"\sqrt{8}"), boxed("9^{9^{9}}"),
                 boxed("7" * 5000)]
    reasons = [grade.reason for grade in small.grade(responses, ["5", "5", r"2\sqrt{2}", "5", "5"])]
    assert reasons == ["thinking not closed", "decided exactly", "algebra, as before",
                       "too large to compare", "over 4000 characters"]


def test_hostile_text_reaches_the_log_as_json(grader):
    for text in ("\ud800", "\x00", "\x1b[31m5", "\u202e5", "z" + "\u0301" * 3000):
        (grade,) = grader.grade([boxed(text)], [text])
        assert json.loads(json.dumps(grade.answer)) == grade.answer == text.strip()


# A grader of one's own

OWN = """
import os, sys, time
seen = []
def ends(response, answer): return response.rstrip().endswith(answer)
def counts(response, answer): seen.append(response); return len(seen) == 1
def words(response, answer): return "yes"
def blocks(response, answer): return sum(range(1 << 40)) > 0
def fails(response, answer): raise ValueError("no such\\nunit")
def spins(response, answer):
    while True: pass
def sleeps(response, answer): time.sleep(60)
def dies(response, answer): os._exit(3)
def eats(response, answer): return len(bytearray(8 << 30)) > 0
def prints(response, answer): print('{"id": 1}'); return bool(os.environ["OWN_SETTING"])
def one(response): return 1
def half(response, answer): return len(response) / 8
def hinted(response, answer, hint, *, weight=0.25): return weight * (hint in response)
def everything(response, answer, **columns): return "/".join(columns) == response
number = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own in the working directory."""
    (tmp_path / "own_grader.py").write_text(OWN)
    (tmp_path / "broken_grader.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN_SETTING", "1")


def test_a_function_of_ones_own_gets_the_whole_response(own):
    with Grader(workers=1, function="own_grader:ends") as grader:
        grades = grader.grade(["it is 5", "it is 6", "\ud800" * 200_000 + "5", boxed("5")],
                              ["5", Reference("5"), "5", "5"])
        assert [grade.correct for grade in grades] == [True, False, True, False]
        assert [grade.status for grade in grades] == ["function"] * 4
        assert [grade.answer for grade in grades] == [None, None, None, "5"]
        assert grader.check_references(["", "{"]) == []


def test_the_source_of_a_function_includes_its_own_modules_and_nothing_installed(own, tmp_path):
    def source():
        with Grader(workers=1, function="mine:grade") as grader:
            return grader.function_source

    (tmp_path / "mine.py").write_text("import json\nfrom helper import grade\n")
    (tmp_path / "helper.py").write_text("def grade(response, answer): return True\n")
    first = source()
    assert first == source() and len(first) == 12
    (tmp_path / "helper.py").write_text("def grade(response, answer): return None\n")
    changed = source()
    assert changed != first
    (tmp_path / "own_grader.py").write_text("")         # not imported by it
    assert source() == changed
    with Grader(workers=1) as grader:
        assert grader.function_source == ""


def test_verdicts_of_a_function_are_not_kept(own):
    with Grader(workers=1, function="own_grader:counts") as grader:
        assert [only(grader, "same", "5").correct for _ in range(3)] == [True, False, False]


def test_a_function_may_find_a_response_partly_right(own):
    with Grader(workers=1, function="own_grader:half") as grader:
        grades = grader.grade(["", "abcd", "abcdefgh", "abcdefghi"], ["5"] * 4)
    assert [(grade.correct, grade.score) for grade in grades] == [
        (False, 0), (False, 0.5), (True, 1), (False, 0)]
    assert grades[3].reason == "it returned 1.125, expected True, False or a number in [0, 1]"


def test_a_function_gets_the_columns_that_it_names(own):
    with Grader(workers=1, function="own_grader:hinted") as grader:
        grades = grader.grade(["a hint"] * 3, [
            Reference("5", columns='{"hint": "a", "problem": "?"}'),
            Reference("5", columns='{"hint": "a", "weight": 1}'),
            Reference("5", columns='{"x": 1}')])
    assert [grade.score for grade in grades] == [0.25, 1, 0]
    assert grades[2].reason == "it takes hint, which is no column of the data, found x"
    with Grader(workers=1, function="own_grader:everything") as grader:
        assert only(grader, "problem/hint", Reference(
            "5", columns='{"problem": "?", "answer": "5", "hint": "a"}')).correct


@pytest.mark.parametrize(("name", "status", "reason"), [
    ("words", "error", "it returned 'yes', expected True, False or a number in [0, 1]"),
    ("fails", "error", "ValueError: no such unit"),
    ("spins", "soft_timeout", "out of processor time"),
    ("sleeps", "hard_kill", "stuck, worker killed"),
    ("dies", "error", "the worker that compared it ended, twice"),
    ("eats", "memory", "out of memory"),
    ("prints", "function", "by your function"),
])
def test_a_function_cannot_hurt_the_trainer(own, name, status, reason):
    with Grader(workers=1, function=f"own_grader:{name}", cpu_seconds=0.3,
                wall_seconds=2 if name == "sleeps" else 15) as grader:
        grade = only(grader, "response", "5")
        assert (grade.status, grade.reason, grade.correct) == (status, reason, name == "prints")


@pytest.mark.parametrize(("name", "reason"), [
    ("own_grader", "it must have the form module:function"),
    ("own_grader:nope", "own_grader has no nope"),
    ("own_grader:number", "number cannot be called, it is of type int"),
    ("own_grader:one", "one must take two arguments, the response and the answer, and may take "
     "columns of the data by name"),
    ("nowhere.grader:ends", "there is no module nowhere in .* or on Python's path"),
    ("broken_grader:ends", "importing broken_grader failed: ModuleNotFoundError: No "
     "module named 'no_such_module_at_all'"),
])
def test_a_function_that_cannot_be_used_is_told_at_once(own, name, reason):
    with pytest.raises(UserError, match=f"^grade.function {name}: {reason}$"):
        Grader(workers=1, function=name)


def test_check_references(grader):
    assert grader.check_references(["5", r"\frac{1}{2}", "", "  ", "{5", r"x^2", "7" * 30_000,
                                    "(-1,2]", r"\text{east}"]) == [2, 3, 4, 6]


def test_the_cache_is_bounded():
    with Grader(workers=1, cache_size=2) as grader:
        for row in (2, 3, 5):
            assert only(grader, boxed(rf"\sqrt{{{4 * row}}}"), rf"2\sqrt{{{row}}}").correct
        assert len(grader._cache) == 2
        assert only(grader, boxed(r"\sqrt{20}"), r"2\sqrt{5}").status == "cached"
        assert only(grader, boxed(r"\sqrt{8}"), r"2\sqrt{2}").status == "symbolic"


def test_workers_are_shielded(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with Grader(workers=1) as grader:
        (process,) = processes(grader)
        assert only(grader, *ALGEBRA).correct
        assert os.getsid(process.pid) == process.pid  # Ctrl-C in the terminal passes it by
        if Path("/proc/self/environ").exists():
            assert b"SECRET_TOKEN" not in Path(f"/proc/{process.pid}/environ").read_bytes()
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "jaxlib" not in loaded and "numpy" not in loaded
    assert gone(process.pid)
    with pytest.raises(RuntimeError, match="closed"):
        only(grader, boxed(r"\sqrt{8}+1"), r"2\sqrt{2}+1")


PARENT = """
import sys
from effreason.grading.grader import Grader
grader = Grader(workers=2)
assert grader.grade([r"\\\\boxed{\\\\sqrt{8}}"], [r"2\\\\sqrt{2}"])[0].correct
assert not {"jax", "numpy", "sympy"} & set(sys.modules)
print(*[worker.process.pid for worker in grader._pool._living], flush=True)
sys.stdin.read()
"""


def test_workers_die_with_their_parent_and_ignore_the_working_directory(tmp_path):
    for name in ("sympy.py", "json.py", "math_verify.py", "effreason.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the working directory')\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    assert parent.stdout is not None and parent.stdin is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


HUNG_PARENT = """
import sys, threading
from effreason.grading import pool
worker = pool.Worker(memory_mb=512, function=sys.argv[1])
print(worker.process.pid, flush=True)
sys.stdin.read()
"""


# Without a pause the parent is gone before the worker has begun.
@pytest.mark.parametrize("pause", [0.0, 1.0])
@pytest.mark.parametrize("module", ["import time; time.sleep(600)", "while True: pass",
                                    "import subprocess; subprocess.run(['sleep', '600'])"])
def test_a_worker_that_hangs_dies_with_its_parent_too(tmp_path, module, pause):
    (tmp_path / "hangs.py").write_text(module + "\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", HUNG_PARENT, "hangs:grade"], cwd=tmp_path,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with parent:
        pid = int(parent.stdout.readline())
        time.sleep(pause)           # until it hangs in the module, on an idle machine
        parent.kill()
    assert gone(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)      # its child; the worker led a group of its own


def test_without_a_parent_death_signal_the_parent_is_watched(tmp_path):
    """As on macOS."""
    child = ("import os, sys, time; sys.platform = 'darwin'; os.setsid()\n"
             "from effreason.grading import worker\n"
             "worker.WATCH_SECONDS = 0.05; worker.die_with_parent()\n"
             "print(os.getpid(), flush=True); time.sleep(600)")
    parent = ("import subprocess, sys, time\n"
              f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE,
                          env=environment) as running:
        pid = int(running.stdout.readline())
        running.kill()
    assert gone(pid)


def test_workers_that_cannot_start_are_reported(monkeypatch):
    monkeypatch.setattr(pool, "_environment", lambda: {"PYTHONHOME": "/nowhere"})
    with Grader(workers=1) as grader, pytest.raises(UserError,
                                                    match="^grading workers cannot be started: it"):
        only(grader, *ALGEBRA)
