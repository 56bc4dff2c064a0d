"""Sampling from a model with sliding windows: layers that keep only their window change nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from decoders import OLMO3
from generations import (
    ENDLESS,
    GROUP,
    LIMIT,
    MESHES,
    PROBLEMS,
    assert_same,
    completed,
    long_and_short,
    requests_for,
)

from effreason.lm import kv_cache, model
from effreason.runtime.errors import UserError
from effreason.sampling import scheduler

LENGTH = 16     # of a ring; windows see 5 positions, prompts have up to 20 tokens


@pytest.fixture(autouse=True)
def small_rings(monkeypatch):
    monkeypatch.setattr(kv_cache, "MOST_READ", 9)
    monkeypatch.setattr(kv_cache, "RING_UNIT", 8)
    monkeypatch.setattr(scheduler, "LEAST_PER_STEP", 0.0)   # drafts go on, however few are right


@functools.cache
def without_rings(is_long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "RING_UNIT", 4096)
        return (completed(OLMO3, long_and_short(), sampling=ENDLESS, slots=32, chunk=64,
                          min_positions=256)[0] if is_long
                else completed(OLMO3, requests_for(PROBLEMS, GROUP, LIMIT))[0])


@pytest.mark.parametrize("settings", [
    {}, dict(shape=MESHES["all"]), dict(shape=MESHES["context"], draft_tokens=5)], ids=str)
def test_slots_that_are_refilled(settings):
    settings = settings | dict(shape=tuple(settings.get("shape", {}).items()))
    found, chunks = completed(OLMO3, requests_for(PROBLEMS, GROUP, LIMIT), **settings)
    assert_same(found, without_rings(False))
    assert set(model.cache_lengths(OLMO3, chunks.capacity)) == {LENGTH, chunks.capacity}


def test_slots_that_grow_are_given_up_and_prefilled_again():
    """Limits of 2 to 150 tokens: what is prefilled again is many rings long."""
    found, _ = completed(OLMO3, long_and_short(), sampling=ENDLESS, slots=16, max_positions=170,
                         budget=2 * 192, draft_tokens=8)
    assert_same(found, without_rings(True))


def test_memory_is_counted_as_it_is():
    for positions in (8, 64):
        leaves = jax.tree.leaves(model.empty_cache(OLMO3, 1, positions))
        assert model.cache_bytes(OLMO3, positions) == sum(leaf.nbytes for leaf in leaves)
    # Two of three layers have a window: a slot of 64 positions holds 64 + 2 * 16, 32 on average.
    assert model.positions_held(OLMO3, 64) == 32
    limits = scheduler.CacheLimits(
        slots=100, budget=320, positions_held=functools.partial(model.positions_held, OLMO3))
    assert limits.slots_of(64) == 10
    plain = dataclasses.replace(OLMO3, kinds=OLMO3.kinds[1:])
    assert model.cache_lengths(plain, 64) == [64] * 3


def test_drafts_are_no_longer_than_a_ring_allows():
    with pytest.raises(UserError, match="draft_tokens must be below 9 for a model with sliding"):
        completed(OLMO3, requests_for(PROBLEMS, 1, 1), draft_tokens=9)


def test_the_layers_with_a_window_are_those_of_the_model():
    assert model.cache_lengths(OLMO3, 64) == [LENGTH, 64, LENGTH]
    assert np.all([kind.window in (5, None) for kind in OLMO3.kinds])
