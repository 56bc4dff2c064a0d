"""The dial's settings, and which group has which alpha."""

import numpy as np
import pytest

from effreason.rl import advantages, configured_reward, dial, experience
from effreason.runtime.config import RewardConfig

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.4)


def test_the_setting_rises_from_0_to_1():
    settings = [dial.setting(alpha, 0.4) for alpha in ALPHAS]
    assert settings[0] == 0 and settings[-1] == 1 and settings == sorted(set(settings))
    assert settings[2] == 0.25


def test_alphas_take_turns():
    counts = dict.fromkeys(ALPHAS, 0)
    for step in range(10):
        of_step = dial.assign(ALPHAS, 16, step)
        assert of_step.shape == (16,) and set(of_step) == set(ALPHAS)
        for alpha in of_step.tolist():
            counts[alpha] += 1
    assert set(counts.values()) == {32}
    np.testing.assert_array_equal(dial.assign(ALPHAS, 16, 3), dial.assign(ALPHAS, 16, 3))


def test_alphas_are_read_in_order_and_evaluated_in_between():
    assert RewardConfig(alphas="0.4,0,0.1").dial == (0.0, 0.1, 0.4)
    assert RewardConfig().dial == ()
    assert dial.untrained(ALPHAS) == pytest.approx((0.075, 0.15, 0.3))


def test_metrics_are_means_over_the_groups_of_an_alpha():
    correct = np.array([[True, False], [True, True], [False, False]])
    lengths = np.array([[10, 20], [30, 50], [1, 1]])
    assert dial.metrics(np.array([0.0, 0.1, 0.0]), correct, lengths) == {
        "dial/accuracy_at_0": 0.25, "dial/tokens_at_0": 8.0, "dial/accuracy_at_0.1": 1.0,
        "dial/tokens_at_0.1": 40.0}


def test_group_std_takes_alpha_out_of_the_dial():
    # A trap: all groups with alpha > 0 then pull on length alike, so that the settings differ by
    # the dial's scale alone.
    alphas, lengths = np.float32(ALPHAS[1:]), np.array([100, 120, 150, 180, 400], np.int32)
    rewards = experience.rewards_of_groups(
        configured_reward.make_reward(RewardConfig()), np.ones((4, 5), bool),
        np.tile(lengths, (4, 1)), alphas)
    kept = advantages.leave_one_out(rewards)
    kept, removed = np.asarray(kept), np.asarray(advantages.group_std(kept, rewards))
    np.testing.assert_allclose(kept, np.outer(alphas / 0.4, kept[3]), rtol=1e-4)
    np.testing.assert_allclose(removed, np.tile(removed[3], (4, 1)), rtol=1e-3)
