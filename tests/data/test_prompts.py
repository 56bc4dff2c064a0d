"""The problems of a step: a function of seed and step, shares by weight, none twice."""

import collections
import dataclasses

import numpy as np
import pytest

from effreason.data import prompts
from effreason.runtime.errors import UserError


def test_the_fingerprint_is_of_all_that_a_run_depends_on():
    problems = prompts.Problems((numbered(3, "a"), numbered(2, "b", source=1)))
    (first, *rest) = everything = [problem for source in problems.sources
                                   for problem in source.problems]
    mark = prompts.fingerprint(problems)
    assert len(mark) == 64 and mark == prompts.fingerprint(everything) == prompts.fingerprint(
        list(everything))
    assert prompts.fingerprint([]) != mark
    others = [dataclasses.replace(first, **change) for change in (
        {"uid": 9}, {"prompt": np.ones(1, np.int32)}, {"prompt": np.zeros(2, np.int32)},
        {"reference": "2"}, {"kind": "text"}, {"choices": ("1",)})]
    marks = {prompts.fingerprint([other, *rest]) for other in others} | {
        mark, prompts.fingerprint([*rest, first]), prompts.fingerprint(rest)}
    assert len(marks) == len(others) + 3
    same = dataclasses.replace(first, level="other", prompt=first.prompt.astype(np.int64))
    assert prompts.fingerprint([same, *rest]) == mark


def numbered(count, name="", weight=None, source=0):
    return prompts.Source(name, weight, tuple(prompts.Problem(uid=source * 2**26 + number,
                                                              prompt=np.zeros(1, np.int32),
                                                              text=str(number), reference="1",
                                                              level="all")
                                              for number in range(count)))


def uids(*args, **named):
    return [problem.uid for problem in prompts.batch(*args, **named)]


def test_every_epoch_is_a_permutation_and_a_step_a_function_of_seed_and_step():
    problems = prompts.Problems((numbered(50),))
    epoch = [uid for step in range(5) for uid in uids(problems, 10, 3, step)]
    assert sorted(epoch) == list(range(50))
    assert uids(problems, 10, 3, 2) == epoch[20:30]
    assert uids(problems, 10, 3, 7) != epoch[20:30]
    assert uids(problems, 10, 4, 2) != epoch[20:30]


def test_the_order_of_a_single_source_is_that_of_recorded_runs():
    problems = prompts.Problems((numbered(50, "tiny"),))
    for step, epoch, place in ((0, 0, 0), (4, 0, 4), (13, 2, 3)):
        order = np.random.default_rng([7, epoch]).permutation(50)
        assert uids(problems, 10, 7, step) == list(order[place * 10 : place * 10 + 10])


def test_no_problem_comes_twice_in_a_step_at_the_end_of_an_epoch():
    problems = prompts.Problems((numbered(50),))
    for step in range(12):
        assert len(set(uids(problems, 16, 0, step))) == 16
    with pytest.raises(UserError, match="at most the number of problems, 50, got 51"):
        prompts.batch(problems, 51, 0, 0)


def test_sources_without_weights_are_one_pool():
    problems = prompts.Problems((numbered(30), numbered(10, source=1)))
    epoch = [uid for step in range(5) for uid in uids(problems, 8, 0, step)]
    assert len(set(epoch)) == 40


def test_sources_with_weights_have_the_same_number_of_problems_in_every_step():
    problems = prompts.Problems((numbered(30, "a", 3.0), numbered(11, "b", 6.0, 1),
                                 numbered(5, "c", 1.0, 2)))
    counts = [3, 6, 1]                          # weights * 10, exactly
    seen = collections.defaultdict(list)
    for step in range(10):
        chosen = uids(problems, 10, 5, step)
        assert np.bincount(np.array(chosen) >> 26).tolist() == counts and len(set(chosen)) == 10
        for uid in chosen:
            seen[uid >> 26].append(uid)
    assert sorted(seen[0]) == list(range(30))  # 3 a step: an epoch is ten steps
    assert sorted(seen[2][:5]) == sorted(seen[2][5:]) == [2 * 2**26 + number for number in range(5)]
    assert seen[2][:5] != seen[2][5:]
    assert uids(problems, 10, 5, 7) == uids(problems, 10, 5, 7) != uids(problems, 10, 6, 7)


def test_largest_remainders_are_rounded_up_and_the_order_in_a_step_mixes_the_sources():
    problems = prompts.Problems((numbered(99, "a", 0.5), numbered(99, "b", 0.3, 1),
                                 numbered(99, "c", 0.2, 2)))
    step = np.array(uids(problems, 32, 0, 0)) >> 26     # 16, 9.6, 6.4
    assert np.bincount(step).tolist() == [16, 10, 6]
    assert len(set(step[:16])) == len(set(step[16:])) == 3


def test_a_weight_that_gives_no_problem_and_a_source_too_small_for_a_step_are_errors():
    with pytest.raises(UserError,
                       match=r"the weight of b is 0\.08 of the rollout.prompts_per_step = 8"):
        prompts.batch(prompts.Problems((numbered(99, "a", 0.99), numbered(99, "b", 0.01))), 8, 0, 0)
    with pytest.raises(UserError, match="takes 4 problems of b for a step, which has 3"):
        prompts.batch(prompts.Problems((numbered(99, "a", 1.0), numbered(3, "b", 1.0))), 8, 0, 0)


def test_other_problems_come_from_the_same_pool_and_none_twice():
    problems = prompts.Problems((numbered(8, "a", 1.0), numbered(6, "b", 1.0, 1)))
    batch = prompts.batch(problems, 8, 0, 0)
    missing = [problem for problem in batch if problem.uid < 2**26][:3] + [
        problem for problem in batch if problem.uid >= 2**26][:3]
    found = prompts.others(problems, missing, batch, (0, 0, 0))
    # b has 6, 4 taken
    assert [problem is None for problem in found] == [False, False, False, False, False, True]
    uids = [problem.uid for problem in found if problem is not None]
    assert [uid >> 26 for uid in uids] == [0, 0, 0, 1, 1]
    assert len(set(uids)) == 5 and not set(uids) & {problem.uid for problem in batch}
    assert prompts.others(problems, missing, batch, (0, 0, 0)) == found
    pool = prompts.Problems((numbered(50),))
    batch = prompts.batch(pool, 8, 0, 0)
    first, second = ([problem.uid for problem in prompts.others(pool, batch, batch, key)]
                     for key in ((0, 1), (0, 2)))
    assert first != second
