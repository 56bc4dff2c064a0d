"""Rows: every sequence is in one of them, whole and in order, whatever the widths, updates and
column order."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from effreason.lm.attention import BRANCH, zigzag
from effreason.rl import packing, update
from effreason.types import Rollouts


def rollouts_of(prompt_lengths, lengths):
    """Tokens that say what they are: 100 p + position in prompts, 1000 (p + 1) + 100 g +
    position in responses."""
    prompt_lengths, lengths = np.array(prompt_lengths, np.int32), np.array(lengths, np.int32)
    prompts, group_size = lengths.shape
    prompt = 100 * np.arange(prompts)[:, None] + np.arange(prompt_lengths.max())
    at = np.arange(lengths.max())
    response = (1000 * (1 + np.arange(prompts)[:, None, None])
                + 100 * np.arange(group_size)[None, :, None] + at)
    return Rollouts(
        prompts=np.where(np.arange(prompt_lengths.max()) < prompt_lengths[:, None], prompt,
                         -1).astype(np.int32),
        prompt_lengths=prompt_lengths, tokens=np.where(at < lengths[..., None], response,
                                                       -1).astype(np.int32),
        lengths=lengths, logprobs=np.zeros((*lengths.shape, lengths.max()), np.float32),
        finish=np.full(lengths.shape, "eos"), repeated=np.zeros(lengths.shape, bool))


def in_row_order(packed, context):
    """Columns back in the order of the row, groups as lists of rows by update: {name: [U, M * R,
    N]}."""
    for rows in packed.groups:
        width = rows.tokens.shape[-1]
        order = zigzag(width, context)
        table = {name: getattr(rows, name).reshape(rows.tokens.shape[0], -1, width)
                 for name in ("tokens", "targets", "positions", "segments", "response_index")}
        yield {name: np.take(array, np.argsort(order), axis=-1) for name, array in table.items()}


def test_two_sequences_share_a_row():
    packed = packing.pack(rollouts_of([2, 3], [[50, 30], [20, 27]]), rows=1, width=64, slots=60)
    (rows,), (count,) = packed.groups, packed.counts
    assert rows.tokens.shape == (1, 4, 1, 64) and count.tolist() == [3]
    # 52 and 32 + 30 in 64 positions, then 23: the longest first, each into the first that fits.
    np.testing.assert_array_equal(rows.segments[0, :3, 0, [0, 51, 52, 63]].T,
                                  [[1, 1, 0, 0], [1, 2, 2, 0], [1, 0, 0, 0]])
    second = {name: getattr(rows, name)[0, 1, 0]
              for name in ("tokens", "targets", "positions", "response_index")}
    assert second["tokens"][:4].tolist() == [0, 1, 1100,
                                             1101] and second["tokens"][32:37].tolist() == [100,
                                                                                            101,
                                                                                            102,
                                                                                            2100,
                                                                                            2101]
    assert second["targets"][:3].tolist() == [1, 1100, 1101]
    assert second["targets"][[31, 61]].tolist() == [0, 0]
    assert second["positions"][[0, 31, 32, 61]].tolist() == [0, 31, 0, 29]
    # T = 60: response b at 60 b
    assert second["response_index"][[0, 1, 30, 31]].tolist() == [4 * 60, 60, 60 + 29, 4 * 60]
    assert not rows.tokens[0, 3].any()
    assert packing.packing_efficiency(packed) == pytest.approx((52 + 32 + 30 + 23) / (3 * 64))


@hypothesis.given(st.lists(st.tuples(st.integers(1, 40),
                                     st.lists(st.integers(0, 90), min_size=4, max_size=4)),
                           min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([1, 2, 4]),
                  st.sampled_from([1, 2, 4]), st.booleans())
def test_every_sequence_is_in_one_row_whole_and_in_order(groups, rows, updates, context,
                                                         one_per_row):
    rollouts = rollouts_of([prompt for prompt, _ in groups],
                           [[max(n, 1) for n in lengths] for _, lengths in groups])
    width, slots = packing.row_width(130, context), 95
    packed = packing.pack(rollouts, rows=rows, width=width, slots=slots, updates=updates,
                          context=context, sequences_per_row=1 if one_per_row else None)
    none, seen = rollouts.lengths.size * slots, []
    for table, counts in zip(in_row_order(packed, context), packed.counts, strict=True):
        for which in range(updates):
            used = counts[which] * rows
            # nothing after the rows that are counted
            assert not table["segments"][which, used:].any()
            for row in range(used):
                segments = table["segments"][which, row]
                for segment in range(1, segments.max() + 1):
                    here = np.flatnonzero(segments == segment)
                    assert (np.diff(here) == 1).all() and not (one_per_row and segment > 1)
                    tokens = table["tokens"][which, row, here]
                    prompt = tokens[0] // 100
                    start = rollouts.prompt_lengths[prompt]
                    sample = (tokens[start] - 1000 * (prompt + 1)) // 100
                    seen.append((prompt, sample))
                    member, length = 4 * prompt + sample, rollouts.lengths[prompt, sample]
                    assert member % updates == which
                    np.testing.assert_array_equal(tokens,
                                                  np.concatenate([rollouts.prompts[prompt, :start],
                                                                  rollouts.tokens[prompt, sample,
                                                                                  :length]]))
                    np.testing.assert_array_equal(table["targets"][which, row, here],
                                                  [*tokens[1:], 0])
                    np.testing.assert_array_equal(table["positions"][which, row, here],
                                                  np.arange(len(tokens)))
                    response_index = np.full(len(tokens), none)
                    response_index[start - 1 : -1] = member * slots + np.arange(length)
                    np.testing.assert_array_equal(table["response_index"][which, row, here],
                                                  response_index)
    assert sorted(seen) == [(prompt, sample) for prompt in range(len(groups))
                            for sample in range(4)]


def test_a_group_shares_its_prompt():
    packed = packing.pack(rollouts_of([5, 1], [[20, 3, 9], [7, 2, 2]]), rows=1, width=64, slots=20,
                          shares_prompts=True)
    (rows,), (count,) = packed.groups, packed.counts
    assert count.tolist() == [1]
    row = {name: getattr(rows, name)[0, 0, 0] for name in (*packing.FIELDS, "response_index")}
    # Four tokens of the prompt, then each response after the last one, longest first. A prompt of
    # one token has nothing to share.
    parts = [4, 21, 10, 4, 8, 3, 3]
    segments = [1, 1 + BRANCH, 1 + 2 * BRANCH, 1 + 3 * BRANCH, 2, 3, 4]
    np.testing.assert_array_equal(row["segments"], np.repeat([*segments, 0], [*parts, 64 - 53]))
    assert row["tokens"][:6].tolist() == [0, 1, 2, 3, 4, 1000]
    assert row["tokens"][25:28].tolist() == [4, 1200, 1201]
    assert row["positions"][[3, 4, 5, 24, 25]].tolist() == [3, 4, 5, 24, 4]
    assert row["targets"][[2, 3, 4, 24, 25]].tolist() == [3, 0, 1000, 0, 1200]
    assert row["response_index"][[3, 4, 23, 24, 25]].tolist() == [120, 0, 19, 120, 40]
    assert packing.packing_efficiency(packed) == 53 / 64


@hypothesis.given(st.lists(st.tuples(st.integers(1, 40),
                                     st.lists(st.integers(1, 90), min_size=4, max_size=4)),
                           min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([1, 2]),
                  st.sampled_from([1, 2]))
def test_every_response_sees_its_own_sequence_and_is_scored_once(groups, rows, updates, context):
    rollouts = rollouts_of([prompt for prompt, _ in groups], [lengths for _, lengths in groups])
    width, slots = packing.row_width(130, context), 95
    settings = dict(rows=rows, width=width, slots=slots, updates=updates, context=context)
    packed = packing.pack(rollouts, **settings, shares_prompts=True)
    scored = []
    for table, counts in zip(in_row_order(packed, context), packed.counts, strict=True):
        for which, row in np.ndindex(table["tokens"].shape[:2]):
            tokens, segments, positions, index = (
                table[name][which, row] for name in ("tokens", "segments", "positions",
                                                     "response_index"))
            assert row < counts[which] * rows or not segments.any()
            for column in np.flatnonzero(index < rollouts.lengths.size * slots):
                member, at = divmod(int(index[column]), slots)
                prompt, sample = divmod(member, 4)
                scored.append((member, at))
                seen = np.flatnonzero((segments[: column + 1] == segments[column])
                                      | (segments[: column + 1] == segments[column] % BRANCH))
                whole = np.concatenate([
                    rollouts.prompts[prompt, : rollouts.prompt_lengths[prompt]],
                    rollouts.tokens[prompt, sample]])
                last = rollouts.prompt_lengths[prompt] + at
                np.testing.assert_array_equal(tokens[seen], whole[:last])
                np.testing.assert_array_equal(positions[seen], np.arange(last))
                assert table["targets"][which, row, column] == whole[last]
                assert member % updates == which
    lengths = rollouts.lengths.reshape(-1)
    assert sorted(scored) == [(member, at) for member, length in enumerate(lengths)
                              for at in range(length)]


def test_shared_prompts_take_fewer_rows():
    settings = dict(rows=2, width=256, slots=100)
    rollouts = rollouts_of([120] * 4, np.random.default_rng(0).integers(10, 30, (4, 8)))
    apart, shared = (packing.pack(rollouts, **settings, shares_prompts=shares).counts[0][0]
                     for shares in (False, True))
    assert (apart, shared) == (16, 4)


def test_positions_of_a_row_count_what_is_shared_once():
    sizes, shared = np.array([30, 40, 50, 60]), packing.Shared(2, np.array([9, 9, 20, 20]))
    assert packing.positions([0, 1, 2], sizes) == 120
    assert packing.positions([2, 0, 1], sizes, shared) == 111
    assert packing.positions([], sizes, shared) == 0


@pytest.mark.parametrize(("context", "one_per_row"), [(1, False), (4, False), (1, True)])
def test_what_was_scattered_to_rows_is_gathered_again(context, one_per_row):
    rollouts = rollouts_of([3, 9, 2], [[70, 5, 1, 33], [8, 8, 90, 2], [4, 60, 31, 12]])
    packed = packing.pack(rollouts, rows=2, width=128, slots=90, updates=2, context=context,
                          sequences_per_row=1 if one_per_row else None)
    assert len(packed.groups) == (2 if one_per_row else 1)
    mask = np.arange(90) < rollouts.lengths.reshape(-1, 1)
    values = np.where(mask, np.random.default_rng(0).standard_normal(mask.shape),
                      0).astype(np.float32)
    laid = [np.asarray(update.scatter_to_rows(jax.numpy.asarray(values), rows))
            for rows in packed.groups]
    assert (all((rows != 0).sum() for rows in laid)
            and sum((rows != 0).sum() for rows in laid) == mask.sum())
    line = jax.numpy.zeros(mask.size)
    for rows, table in zip(laid, packed.groups, strict=True):
        line = update.gather_from_rows(rows, table, line)
    np.testing.assert_array_equal(line.reshape(mask.shape), values)


@pytest.mark.parametrize(("longest", "context", "width"),
                         [(64, 1, 64), (65, 1, 96), (96, 8, 96), (65, 64, 128), (1024, 1, 1024),
                          (1025, 1, 1536), (32_512, 4, 32_768), (32_512, 8, 32_768),
                          (32_512, 16, 32_768), (5_000, 8, 16_384), (4_095, 1, 4_096),
                          (4_097, 1, 6_144)])
def test_the_width_of_rows(longest, context, width):
    assert packing.row_width(longest, context) == width


def test_every_step_of_a_run_has_the_same_shapes():
    settings = dict(rows=2, width=128, slots=100, updates=2)
    few = packing.pack(rollouts_of([1, 1], [[1, 1], [1, 1]]), **settings)
    many = packing.pack(rollouts_of([28, 3], [[100, 90], [70, 99]]), **settings)
    assert jax.tree.map(np.shape, few) == jax.tree.map(np.shape, many)
    assert few.counts[0].tolist() == [1, 1] and many.counts[0].tolist() == [1, 1]
    assert packing.packing_efficiency(few) < 0.05 and packing.packing_efficiency(many) > 0.8


def test_ragged_responses_fill_their_rows():
    lengths = np.random.default_rng(0).exponential(96, (16, 8)).clip(1, 500).astype(int)
    settings = dict(rows=4, width=packing.row_width(520), slots=500)
    assert packing.packing_efficiency(packing.pack(rollouts_of([20] * 16, lengths),
                                                   **settings)) > 0.9
    assert packing.packing_efficiency(packing.pack(rollouts_of([20] * 16, lengths), **settings,
                                                   sequences_per_row=1)) > 0.45


def test_long_rows_come_in_three_widths_and_wide_ones_are_filled_first():
    assert packing.row_widths(32_768) == [32_768, 16_384,
                                          8_192] and packing.row_widths(2_048) == [2_048]
    assert packing.row_widths(320, sequences_per_row=1) == [320, 160, 80]
    assert packing.row_widths(32_768,
                              sequences_per_row=1) == [32_768, 16_384, 8_192, 4_096, 2_048]
    sizes = np.array([30, 12, 11, 9, 7, 5, 3, 3, 2])
    # 30 takes a row of 32 and the second row of the micro-batch is computed with it: 12, 11, 9 fill
    # it, 2 the first. 7 and 5 are then in rows of 8, one more of which takes the 3s.
    assert packing.assign_rows(sizes, range(9), [32, 16, 8], rows=2) == [
        [[0, 8], [1, 2, 3]], [], [[4], [5, 6], [7], []]]
    assert packing.assign_rows(sizes[4:], range(5), [32, 16, 8],
                               rows=2) == [[], [], [[0], [1, 2], [3, 4], []]]
    assert packing.assign_rows(sizes[4:], range(5), [32, 16, 8], rows=2, sequences_per_row=3) == [
        [], [], [[0], [1, 2], [3, 4], []]]
    assert packing.assign_rows(np.ones(5, int), range(5), [8], rows=1, sequences_per_row=2) == [
        [[0, 1], [2, 3], [4]]]
    assert packing.assign_rows(sizes, range(9), [32, 16, 8], rows=2, sequences_per_row=1) == [
        [[0], [1]], [[2], [3]], [[4], [5], [6], [7], [8], []]]


def test_ragged_reasoning_fills_few_wide_rows():
    # 128 responses around 5,000 tokens on 16 rows of 32k: two micro-batches of 0.5M positions in
    # rows of one width.
    sizes = np.random.default_rng(0).exponential(4_700, 128).clip(200, 32_000).astype(int)
    laid = packing.assign_rows(sizes, range(128), packing.row_widths(32_768), rows=16)
    computed = sum(len(bins) * width
                   for bins, width in zip(laid, packing.row_widths(32_768), strict=True))
    assert sizes.sum() < computed < 1.35 * sizes.sum() and len(laid[0]) == 16
    members = sorted(member for bins in laid for row in bins for member in row)
    assert members == list(range(128))
    assert all(sizes[row].sum() <= width
               for bins, width in zip(laid, packing.row_widths(32_768), strict=True)
               for row in bins)


def test_values_are_flattened_and_padded():
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.testing.assert_array_equal(packing.flatten(values, 4),
                                  np.pad(values.reshape(4, 3), ((0, 0), (0, 1))))


@pytest.mark.parametrize(("prompt", "slots", "rows", "most", "shards", "expected"), [
    (64, 256, 4, 1024, 1, (864, 1)),        # 63 + 3 * 257 positions, three responses
    (64, 256, 4, 1024, 2, (608, 2)),        # two rows at least: as many positions as before
    (250, 128, 4, 1024, 1, (1024, 1)),      # 249 + 6 * 129
    (64, 256, 1, 1024, 1, (320, 1)),        # a micro-batch has room for one response
    (64, 256, 4, 500, 1, (320, 4))])        # wider rows would cost too much
def test_rows_of_shared_prompts_are_wide_enough_for_several_responses(prompt, slots, rows, most,
                                                                      shards, expected):
    width, fewer = packing.shared_width(prompt, slots, rows, most=most, shards=shards)
    assert (width, fewer) == expected
    assert width * fewer <= packing.row_width(prompt + slots) * rows
