"""`effreason preview`: numbers against NumPy and the kernels, the file, the warnings."""

import json

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from effreason.cli import preview
from effreason.rl import advantages, configured_reward, pressure, rewards
from effreason.rl.pressure import Groups
from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError

EFFICIENT = configured_reward.make_reward(RewardConfig())
GROUP = 8


# Three groups, as arrays of one shape: nothing is compiled twice.
three_groups = st.builds(
    lambda correct, lengths: Groups(correct=np.array(correct).reshape(3, GROUP),
                                    lengths=np.array(lengths, np.int32).reshape(3, GROUP)),
    st.lists(st.booleans(), min_size=3 * GROUP, max_size=3 * GROUP),
    st.lists(st.integers(1, 200), min_size=3 * GROUP, max_size=3 * GROUP))
SPLITS = {advantage: pressure.make_split(EFFICIENT, advantage) for advantage in pressure.ADVANTAGES}
kernel, loo = jax.jit(rewards.length_rewards), jax.jit(advantages.leave_one_out)
by_std = jax.jit(advantages.group_std)
white = jax.jit(advantages.whiten)


def random_groups(count=60, seed=0, rate=0.9):
    """Mostly correct; wrong responses are longer."""
    rng = np.random.default_rng(seed)
    correct = rng.random((count, GROUP)) < rate
    lengths = np.exp(rng.normal(5.0, 0.5, (count, GROUP)) + 0.5 * ~correct).astype(np.int32) + 1
    return Groups(correct=correct, lengths=lengths)


def whiten_responses(gains, groups):
    mask, tokens = np.ones_like(groups.correct), groups.lengths.astype(np.float32)
    return np.asarray(white(gains, mask, tokens=tokens)[0])


def found_by(groups, advantage, alphas=(0.05, 0.1, 0.2, 0.4), aggregation="token_mean",
             reward=EFFICIENT):
    reports = pressure.reports(groups, reward, alphas, advantage, aggregation)
    return {report.alpha: report for report in reports}


@hypothesis.given(three_groups)
def test_whitening_of_responses_is_whitening_of_their_tokens(groups):
    gains = np.asarray(loo(kernel(groups.correct, groups.lengths, alpha=np.float32(0.2))))
    mask = np.arange(200) < groups.lengths.reshape(-1, 1)
    of_tokens = np.asarray(white(np.where(mask, gains.reshape(-1, 1), np.float32(0)), mask)[0])
    expected = of_tokens[:, 0].reshape(gains.shape)
    np.testing.assert_allclose(whiten_responses(gains, groups), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("advantage", pressure.ADVANTAGES)
@hypothesis.given(three_groups, st.sampled_from([0.05, 0.4]))
def test_parts_add_up_to_the_advantages_of_the_kernels(advantage, groups, alpha):
    reward, total, parts = SPLITS[advantage](groups, alpha)
    np.testing.assert_allclose(reward, kernel(groups.correct, groups.lengths,
                                              alpha=np.float32(alpha)), atol=1e-6)
    gains = np.asarray(loo(reward))
    if advantage == "group_std":
        gains = np.asarray(by_std(gains, reward))
    if advantage == "whiten":
        gains = whiten_responses(gains, groups)
    if advantage == "whiten_responses":
        gains = np.asarray(white(gains, np.ones_like(groups.correct))[0])
    if advantage == "decouple":
        right = groups.correct.astype(np.float32)
        gains, rest = (np.asarray(by_std(loo(part), part)) for part in (right, reward - right))
        gains = gains + np.float32(alpha) * rest
    np.testing.assert_allclose(total, gains, atol=2e-3, rtol=2e-3)
    assert parts.keys() == set(advantages.PARTS) and not parts["kl"].any()
    np.testing.assert_allclose(sum(parts.values()), total, atol=2e-3, rtol=2e-3)


def test_a_part_pulls_as_the_loss_weighs_its_tokens():
    groups = random_groups()
    part = np.random.default_rng(1).normal(size=groups.correct.shape).astype(np.float32)
    tokens = groups.lengths.astype(np.float64)
    excess = tokens - tokens.mean(axis=1, keepdims=True)
    expected = {"token_mean": part * excess,
                "sequence_mean": part / tokens * tokens.mean() * excess}
    for aggregation, terms in expected.items():
        np.testing.assert_allclose(pressure.pull(part, groups, aggregation), terms.mean(),
                                   rtol=1e-4)
        among = groups.mixed
        np.testing.assert_allclose(pressure.pull(part, groups, aggregation, among),
                                   terms[among].mean(), rtol=1e-4)
    assert pressure.pull(part, groups, "token_mean", np.zeros(len(part), bool)) is None


def test_what_whitening_subtracts_pulls_only_where_responses_are_averaged_over():
    groups = random_groups()
    by_token = found_by(groups, "whiten")[0.0]
    by_response = found_by(groups, "whiten", aggregation="sequence_mean")[0.0]
    assert abs(by_token.pull_normalisation) < 1e-3 < 0.05 < abs(by_response.pull_normalisation)
    # wrong ones are longer here, so the tokens' mean is below 0
    assert by_response.pull_normalisation < 0
    assert found_by(groups, "loo", aggregation="sequence_mean")[0.0].pull_normalisation == 0


def test_group_std_removes_alpha_and_leave_one_out_keeps_it():
    kept, removed = (found_by(random_groups(), advantage) for advantage in ("loo", "group_std"))
    for alpha in (0.05, 0.1, 0.2, 0.4):
        np.testing.assert_allclose(kept[alpha].size_ratio.all_correct, alpha / 0.1, rtol=1e-3)
        np.testing.assert_allclose(removed[alpha].size_ratio.all_correct, 1.0, rtol=1e-3)
        np.testing.assert_allclose(kept[alpha].pull_length, kept[0.1].pull_length * alpha / 0.1,
                                   rtol=1e-3)


def test_the_control_has_no_pull_of_length_and_signal_in_mixed_groups_alone():
    groups = random_groups()
    for advantage in pressure.ADVANTAGES:
        control = found_by(groups, advantage)[0.0]
        assert control.pull_length == 0
        np.testing.assert_allclose(control.groups_with_signal, groups.mixed.mean())
    control = found_by(groups, "loo")[0.0]
    assert control.size.all_correct == 0 and control.punished == 0 and control.punished_from is None


@pytest.mark.parametrize(("alpha", "fewest"),
                         [(0.05, 8), (0.1, 8), (0.2, 8), (0.4, 7), (0.6, 6), (0.9, 4)])
def test_which_correct_responses_get_a_negative_advantage(alpha, fewest):
    # One long response among equal short ones, with 2 to 8 of the group correct: the worst case.
    correct = np.array([[sample < right for sample in range(GROUP)]
                        for right in range(2, GROUP + 1)])
    groups = Groups(correct=correct,
                    lengths=np.array([[1000] + [10] * (GROUP - 1)] * len(correct), np.int32))
    effect = found_by(groups, "loo", (alpha,))[alpha]
    assert (effect.punished_from, effect.punished) == (fewest, GROUP - fewest + 1)


def test_sizes_and_pulls_by_hand():
    groups = Groups(correct=np.array([[True, True], [True, False], [False, False]]),
                    lengths=np.array([[10, 30], [10, 20], [5, 9]], np.int32))
    effect = found_by(groups, "loo", (0.2,))[0.2]
    # of the two rewards of the first group
    gap = 0.2 * (1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1)))
    np.testing.assert_allclose([effect.size.all_correct, effect.size.mixed], [gap, 0.9], rtol=1e-5)
    np.testing.assert_allclose([effect.pull_within.all_correct, effect.pull_within.mixed],
                               [-10 * gap, -4.5], rtol=1e-5)
    np.testing.assert_allclose(effect.pull, (-10 * gap - 4.5) / 3, rtol=1e-5)
    np.testing.assert_allclose([effect.pull_accuracy, effect.pull_length],
                               [-5 / 3, (0.5 - 10 * gap) / 3], rtol=1e-5)
    np.testing.assert_allclose(effect.groups_with_signal, 2 / 3)


def test_a_setting_is_compiled_once_for_all_alphas():
    traced = []

    def reward(correct, lengths, alpha):
        traced.append(alpha)
        return EFFICIENT(correct, lengths, alpha)

    found_by(random_groups(), "loo", reward=reward)
    assert len(traced) == 1


# The file

def row(uid, sample, correct=True, tokens=10, **more):
    return {"uid": uid, "sample": sample, "correct": correct, "tokens": tokens,
            "finish": "eos"} | more


def written(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_groups_are_what_has_one_step_set_and_uid_whatever_the_order(tmp_path):
    rows = [row(7, sample, correct=sample > 0, tokens=100 * step + sample + 1, step=step, set=name)
            for step in (0, 1) for name in ("a", "b") for sample in (1, 0, 2)]
    saved = preview.read(written(tmp_path / "a.jsonl", [{"facts": {"seed": 0}}, *rows, ""]))
    np.testing.assert_array_equal(saved.groups.lengths, [[1, 2, 3]] * 2 + [[101, 102, 103]] * 2)
    np.testing.assert_array_equal(saved.groups.correct, [[False, True, True]] * 4)
    assert saved.groups.lengths.dtype == np.int32 and saved.left_out == {}


def test_groups_of_another_size_are_left_out_and_counted(tmp_path):
    rows = [row(uid, sample) for uid, size in ((1, 3), (2, 3), (3, 1), (4, 2), (5, 1))
            for sample in range(size)]
    saved = preview.read(written(tmp_path / "a.jsonl", rows))
    assert saved.groups.correct.shape == (2, 3) and saved.left_out == {1: 2, 2: 1}


def test_responses_that_were_cut_off_are_counted(tmp_path):
    rows = [row(1, sample, correct=sample == 0, finish=finish)
            for sample, finish in enumerate(["eos", "length", "repetition"])]
    saved = preview.read(written(tmp_path / "a.jsonl", rows))
    assert (saved.truncated, saved.repeated) == (2, 1)


GOOD = row(1, 0)


@pytest.mark.parametrize(("rows", "message"), [
    ([GOOD, "{\"uid\": 1"], ":2: expected a JSON object, found '{\"uid\": 1\\n'"),
    (["[1]"], ":1: expected a JSON object, found [1]"),
    ([GOOD, {"facts": {}}], ":2: uid must be a whole number, got no uid"),
    ([GOOD | {"correct": 1}], ":1: correct must be true or false, got 1"),
    ([GOOD | {"tokens": 0}], ":1: tokens must be a whole number in [1, 2147483647], got 0"),
    ([GOOD | {"tokens": True}], ":1: tokens must be a whole number in [1, 2147483647], got true"),
    ([GOOD | {"finish": []}], ":1: finish must be a text, got []"),
    ([GOOD, row(1, 1, finish=5)], ":2: finish must be a text, got 5"),
    ([GOOD | {"step": [1]}], ":1: step must be a whole number or null, got [1]"),
    ([GOOD | {"set": {}}], ":1: set must be a text or null, got {}"),
    ([GOOD, row(1, 1), GOOD], ":3: sample 0 of uid 1 is on an earlier line too"),
    ([GOOD, row(2, 0)],
     ": expected several responses to a problem, found 2 problems with at most one each; evaluate "
     "with --evaluation.samples 8"),
    ([],
     ": expected several responses to a problem, found 0 problems with at most one each; evaluate "
     "with --evaluation.samples 8"),
])
def test_a_file_that_cannot_be_read_is_told_with_its_line(tmp_path, rows, message):
    path = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        preview.read(path)
    assert str(error.value) == f"{path}{message}"


# The command

@pytest.fixture
def file(tmp_path):
    groups = random_groups(40)
    rows = [row(uid, sample, bool(groups.correct[uid, sample]), int(groups.lengths[uid, sample]))
            for uid in range(40) for sample in range(GROUP)]
    rows += [row(40, sample, False, 50, finish="length") for sample in range(GROUP)]
    return str(written(tmp_path / "rollouts.jsonl", rows))


def shown(capsys, *argv):
    preview.run(argv, "effreason preview")
    return capsys.readouterr().out


def test_the_command_shows_every_setting_within_80_columns(capsys, file):
    out = shown(capsys, file)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for advantage in pressure.ADVANTAGES[:3]:
        rows = [line.split() for line in lines if line.split()[:1] == [advantage]]
        assert [cells[1] for cells in rows] == ["0", "0.05", "0.1", "0.2", "0.4"] * 2
    text = " ".join(out.split())
    assert ("group_std: removes alpha: all-correct groups have the same advantages at alpha 0.05 "
            "and 0.4") in text
    assert "whiten: with update.aggregation sequence_mean it pulls on length at alpha 0:" in text
    assert "filtering by accuracy (DAPO) would drop" in text and "% of the length signal" in text
    assert "1 group has no correct response: no signal" in text
    assert "8 responses were cut off, 0 of them for repeating themselves" in text


def test_json_has_the_same(capsys, file):
    found = json.loads(shown(capsys, file, "--json", "--alpha", "0.1,0,0.3", "--advantage", "loo"))
    assert [(each["advantage"], each["alpha"]) for each in found["settings"]] == [
        ("loo", 0.0), ("loo", 0.1), ("loo", 0.3)]
    assert found["groups"] == 41 and found["group_size"] == GROUP and found["truncated"] == 8
    assert not any("removes alpha" in text for text in found["warnings"])
    for each in found["settings"]:
        parts = [each[f"pull_{part}"] for part in ("accuracy", "length", "normalisation")]
        np.testing.assert_allclose(sum(parts), each["pull"], atol=1e-6)


def test_a_form_without_alpha_has_one_line_beside_the_control(capsys, file):
    found = json.loads(shown(capsys, file, "--json", "--form", "laser", "--parameters",
                             "target=150",
                             "--advantage", "loo"))["settings"]
    assert [each["alpha"] for each in found] == [0.0, None]
    assert found[1]["size_ratio"]["all_correct"] == 1


def test_a_reward_of_length_alone_has_a_signal_where_all_are_wrong(capsys, tmp_path):
    rows = [row(uid, sample, correct=False, tokens=10 + sample)
            for uid in range(3) for sample in range(4)]
    path = str(written(tmp_path / "a.jsonl", rows))
    found = json.loads(shown(capsys, path, "--json", "--form", "kimi"))
    text = "3 groups have no correct response: what signal they have is of length alone"
    assert text in found["warnings"]
    assert found["settings"][0]["size"] == {"all_correct": None, "mixed": None}
    assert "no signal" in shown(capsys, path)


def test_a_pull_towards_longer_responses_is_told(capsys, tmp_path):
    rows = [row(uid, sample, correct=sample > 0, tokens=10 + 10 * sample)
            for uid in range(3) for sample in range(4)]
    path = str(written(tmp_path / "a.jsonl", rows))
    out = " ".join(shown(capsys, path, "--alpha", "0.05", "--advantage", "loo").split())
    assert "loo pulls towards longer responses" in out
    assert "tokens: correctness outweighs length" in out
    assert "at alpha 0.05 by" in out


@pytest.mark.parametrize(("argv", "message"), [
    (["--alpha", "0.1,1"],
     "--alpha must be numbers in [0, 1) with commas between them, got '1' in '0.1,1'"),
    (["--alpha", "0.1,"],
     "--alpha must be numbers in [0, 1) with commas between them, got '' in '0.1,'"),
    (["--advantage", "loo,grpo"], "--advantage must be of loo, whiten, group_std, "
     "whiten_responses, decouple, got 'grpo'"),
    (["--form", "l1_max"],
     "--parameters must have target=NUMBER: l1_max has no default for it, got null"),
    (["--form", "kimmi"], "--form must be one of efficient, kimi, "),
    (["--aggregation", "mean"], "--aggregation: invalid choice: 'mean'"),
])
def test_mistakes_on_the_command_line(file, argv, message):
    with pytest.raises(UserError) as error:
        preview.run([file, *argv], "effreason preview")
    assert str(error.value).startswith(message)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: No such file or directory"):
        preview.run([str(tmp_path / "nowhere.jsonl")], "effreason preview")
