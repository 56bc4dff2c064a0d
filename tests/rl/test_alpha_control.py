"""Alpha that follows evaluations: its direction, its bounds, and that it settles on its target."""

import pytest

from effreason.rl import alpha_control
from effreason.runtime.config import RewardConfig


def moved(alpha=0.1, *, ratio=1.0, drop=0.0, **settings):
    reward = RewardConfig(alpha=alpha, **settings)
    return alpha_control.next_alpha(alpha, token_ratio=ratio, accuracy_drop=drop, reward=reward)


def test_alpha_follows_the_tokens():
    assert moved(ratio=0.6, target_tokens=0.5) == pytest.approx(0.12)
    assert moved(ratio=0.4, target_tokens=0.5) == pytest.approx(0.08)
    assert moved(ratio=0.5, target_tokens=0.5) == 0.1
    assert moved(ratio=1.0, target_tokens=0.3) == pytest.approx(0.15)  # at most half more at a time


def test_accuracy_goes_first():
    alpha = moved(ratio=1.0, drop=1.5, target_tokens=0.5, max_accuracy_drop=1.0)
    assert alpha == pytest.approx(0.1 / 1.5)
    assert moved(ratio=1.0, drop=1.0, target_tokens=0.5, max_accuracy_drop=1.0) > 0.1
    # no target: as short as accuracy allows
    assert moved(drop=0.5, max_accuracy_drop=1.0) == pytest.approx(0.15)


def test_alpha_stays_within_its_bounds():
    assert moved(0.4, ratio=1.0, target_tokens=0.5) == 0.4
    assert moved(0.01, ratio=0.1, target_tokens=0.5) == 0.01
    assert moved(0.2, drop=9.0, max_accuracy_drop=1.0, alpha_min=0.19) == 0.19


def test_it_settles_at_the_target():
    """A model whose tokens answer to alpha at once, and less and less."""
    alpha = 0.01
    for _ in range(40):
        alpha = moved(alpha, ratio=1 / (1 + 8 * alpha), target_tokens=0.6)
    assert 1 / (1 + 8 * alpha) == pytest.approx(0.6, rel=1e-3)


def test_without_either_alpha_does_not_move():
    assert not alpha_control.is_on(RewardConfig())
    assert alpha_control.is_on(RewardConfig(target_tokens=0.5)) and alpha_control.is_on(
        RewardConfig(max_accuracy_drop=0.0))
