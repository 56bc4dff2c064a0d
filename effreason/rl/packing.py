"""Stage 6 on the host: packs prompts and responses of very different lengths into rows.

U optimizer updates, M micro-batches of R rows, N positions of a row, B = P * G responses, T
response slots.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from effreason.lm.attention import branch, zigzag
from effreason.types import Packed, Rollouts, Rows

LONG_ROW = 4096         # positions at which attention costs about as much as matrix products
NARROWEST_HALVED = 128  # positions; narrower rows are not halved
FIELDS = ("tokens", "targets", "positions", "segments")     # of a row; 0 at padding


def row_width(longest: int, context: int = 1) -> int:
    """Returns N for sequences of at most `longest` positions.

    The width is rounded up to what attention kernels need, and to a multiple of 2 * context."""
    if longest < LONG_ROW:
        unit = math.lcm(32, 2 * context) if longest <= 1024 else 512 * context
    else:
        unit = 2048 * context       # so that a quarter of the width is a multiple of 512 * context
    return -(-longest // unit) * unit


def shared_width(prompt: int, slots: int, rows: int, *, most: int, shards: int = 1,
                 context: int = 1) -> tuple[int, int]:
    """Returns N and R for rows in which several responses share a prompt.

    As many as fit into `most` positions, if the micro-batch gets no larger by it.

    Args:
        prompt: Tokens of the longest one.
        slots: T.
        rows: R, if a row has room for one of the longest sequences.
        most: At least that.
        shards: Of the rows; R is a multiple of it."""
    width = row_width(prompt + slots, context)
    count = (most - prompt + 1) // (slots + 1)
    for responses in range(count, 1, -1):
        wider = row_width(prompt - 1 + responses * (slots + 1), context)
        fewer = rows * width // wider // shards * shards
        if fewer and width < wider <= most:
            return wider, fewer
    return width, rows


def row_widths(width: int, context: int = 1, sequences_per_row: int | None = None) -> list[int]:
    """Returns the row widths to compile, widest first, each half the previous.

    Rows of 4,096 or more get two narrower widths, because attention cost is quadratic in the row.
    With one sequence per row there are up to four narrower widths, because padding is computed
    too."""
    count = 5 if sequences_per_row == 1 else 3 if width >= LONG_ROW else 1
    widths = [width]
    while (len(widths) < count and widths[-1] >= NARROWEST_HALVED
           and widths[-1] % (4 * context) == 0):
        widths.append(widths[-1] // 2)
    return widths


def room(responses: int, *, rows: int, updates: int = 1) -> tuple[int, int, int]:
    """Returns the updates, micro-batches and rows of each width: a row for every response."""
    return updates, -(-responses // (updates * rows)), rows


def pack(rollouts: Rollouts, *, rows: int, width: int, slots: int, updates: int = 1,
         context: int = 1, sequences_per_row: int | None = None, shares_prompts: bool = False,
         settings: Float[np.ndarray, " P"] | None = None) -> Packed:
    """Packs prompts and responses into rows; response b belongs to optimizer update b % U.

    The arrays have room for the worst case, so that all steps of a run have the same shapes. How
    many micro-batches are in use is data.

    Args:
        rows: R, rows of a micro-batch.
        width: N, at least the longest sequence.
        slots: T.
        updates: U.
        context: Size of the mesh axis; columns are in zig-zag order, which splits causal work
            evenly.
        sequences_per_row: At most; None = any number. Some attention kernels have a limit.
        shares_prompts: Responses of one group in one row share their prompt; not every attention
            can.
        settings: Of the dial, for each prompt's group; None if there is no dial."""
    group_size, lengths = rollouts.tokens.shape[1], rollouts.lengths.reshape(-1)
    prompts = np.repeat(rollouts.prompt_lengths, group_size)
    sizes = prompts + lengths
    shared = Shared(group_size, prompts - 1) if shares_prompts else None
    no_response = len(sizes) * slots
    widths = row_widths(width, context, sequences_per_row)
    shares = [range(update, len(sizes), updates) for update in range(updates)]
    assigned = [assign_rows(sizes, share, widths, rows, sequences_per_row, shared)
                for share in shares]

    shape = room(len(sizes), rows=rows, updates=updates)
    groups: list[Rows] = []
    counts: list[Any] = []
    for group, width in enumerate(widths):
        table: dict[str, Any] = {name: np.zeros((*shape, width), np.int32) for name in FIELDS}
        table["response_index"] = np.full((*shape, width), no_response, np.int32)
        if settings is not None:
            table["settings"] = np.zeros((*shape, width), np.float32)
        flat = {name: array.reshape(updates, -1, width) for name, array in table.items()}
        columns = np.argsort(zigzag(width, context))
        for update in range(updates):
            for row, members in enumerate(assigned[update][group]):
                for name, values in _pack_responses(rollouts, members, width, slots, settings,
                                                    shares_prompts).items():
                    flat[name][update, row, columns] = values

        groups.append(Rows(**table))
        counts.append(np.array([len(bins[group]) // rows for bins in assigned], np.int32))

    return Packed(groups=tuple(groups), counts=tuple(counts))


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the responses of a group share if they are in one row."""

    group_size: int                 # G; response b belongs to group b // G
    positions: Int[np.ndarray, " B"]    # that a row needs only once for all of them


def assign_rows(sizes: Int[np.ndarray, " B"], members: Iterable[int], widths: Sequence[int],
                rows: int, sequences_per_row: int | None = None,
                shared: Shared | None = None) -> list[list[list[int]]]:
    """Decides which sequences share a row.

    Each goes into the first row it fits, longest first, of the narrowest width that holds it. Room
    left in wider rows, which are computed anyway, is filled before narrower rows are opened. If
    the responses of a group share positions, a row that has these positions is tried first.

    Args:
        sizes: Positions of all sequences.
        members: Indices of the sequences to assign.
        widths: Widths of rows, descending.
        rows: R; each width gets a multiple of it.
        shared: None = nothing is shared.

    Returns:
        For each width its rows, each a list of members; rows may be empty."""
    shared = shared or Shared(1, np.zeros_like(sizes))
    waiting = sorted(members, key=lambda member: (-int(sizes[member]), member))
    first: dict[int, int] = {}
    for order, member in enumerate(waiting):
        first.setdefault(member // shared.group_size, order)
    waiting.sort(key=lambda member: first[member // shared.group_size])     # groups stay together
    assigned = []
    for width, narrower in zip(widths, [*widths[1:], 0], strict=True):
        bins: list[list[int]] = []
        room: list[int] = []
        holders: dict[int, list[int]] = {}      # the rows that have what a group shares

        def place(member: int, bins: list[list[int]] = bins, room: list[int] = room,
                  holders: dict[int, list[int]] = holders) -> bool:
            group, size = member // shared.group_size, int(sizes[member])
            needed = size - int(shared.positions[member])
            row = next((index for index in holders.get(group, ()) if room[index] >= needed), None)
            if row is None:
                row = next((index for index, free in enumerate(room) if free >= size), None)
                if row is None:
                    return False
                needed = size
                holders.setdefault(group, []).append(row)
            bins[row].append(member)
            room[row] = 0 if len(bins[row]) == sequences_per_row else room[row] - needed
            return True

        for member in [member for member in waiting if sizes[member] > narrower]:
            if not place(member):
                bins.append([])
                room.append(width)
                place(member)

        spare = -len(bins) % rows
        bins += [[] for _ in range(spare)]
        room += [width] * spare
        waiting = [member for member in waiting if sizes[member] <= narrower and not place(member)]
        assigned.append(bins)
    return assigned


def positions(row: Sequence[int], sizes: Int[np.ndarray, " B"],
              shared: Shared | None = None) -> int:
    """Returns how many positions the members of a row fill."""
    shared, row = shared or Shared(1, np.zeros_like(sizes)), list(row)
    first = list({member // shared.group_size: member for member in row}.values())
    return int(sizes[row].sum() - shared.positions[row].sum() + shared.positions[first].sum())


def flatten(values: Shaped[np.ndarray, "P G T0"], slots: int) -> Shaped[np.ndarray, "B T"]:
    """Flattens values of response tokens to [B, slots], padded with 0 on the right."""
    return np.pad(values.reshape(-1, values.shape[-1]), ((0, 0), (0, slots - values.shape[-1])))


def packing_efficiency(packed: Packed) -> float:
    """Returns the share of the computed positions that hold a token."""
    computed = sum(int(count.sum()) * rows.tokens.shape[2] * rows.tokens.shape[3]
                   for rows, count in zip(packed.groups, packed.counts, strict=True))
    return sum(int((rows.segments > 0).sum()) for rows in packed.groups) / computed


def _pack_responses(rollouts: Rollouts, members: Sequence[int], width: int, slots: int,
                    settings: Float[np.ndarray, " P"] | None,
                    shares_prompts: bool) -> dict[str, np.ndarray]:
    """Packs prompt and response of each member into one row, with the targets' response index."""
    group_size = rollouts.tokens.shape[1]
    by_prompt: dict[int, list[int]] = {}
    for member in members:
        by_prompt.setdefault(member // group_size, []).append(member)

    row = _empty_row(width) | {
        "response_index": np.full(width, rollouts.lengths.size * slots, np.int32)}
    if settings is not None:
        row["settings"] = np.zeros(width, np.float32)
    end = segment = 0

    def add(prompt: int, tokens: Int[np.ndarray, " n"], segment: int, position: int = 0) -> None:
        nonlocal end
        own = _put(row, end, tokens, segment, position)
        end = own.stop
        if settings is not None:
            row["settings"][own] = settings[prompt]

    for prompt, group in by_prompt.items():
        shares = shares_prompts and len(group) > 1
        beginning = rollouts.prompts[prompt, : rollouts.prompt_lengths[prompt]]
        kept = len(beginning) - 1 if shares else 0      # each response has a target of its own
        if kept:                                        # for the last token
            add(prompt, beginning[:kept], segment + 1)
        for number, member in enumerate(group, start=1):
            length = rollouts.lengths.flat[member]
            tokens = np.concatenate([beginning[kept:],
                                     rollouts.tokens[prompt, member % group_size, :length]])
            if kept:
                add(prompt, tokens, branch(segment + 1, number), kept)
            else:
                segment += 1
                add(prompt, tokens, segment)
            # A response token is the target of the position before it.
            row["response_index"][end - 1 - length : end - 1] = member * slots + np.arange(length)
        segment += bool(kept)
    return row


def pack_row(sequences: Iterable[Int[np.ndarray, " n"]],
             width: int) -> dict[str, Int[np.ndarray, " N"]]:
    """Returns tokens, targets, positions and segments of a row: sequences one after another."""
    row, end = _empty_row(width), 0
    for segment, sequence in enumerate(sequences, start=1):
        end = _put(row, end, sequence, segment).stop
    return row


def _empty_row(width: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(width, np.int32) for name in FIELDS}


def _put(row: dict[str, np.ndarray], start: int, tokens: Int[np.ndarray, " n"], segment: int,
         position: int = 0) -> slice:
    """Puts a sequence into a row, and returns its columns.

    Args: position, of its first token."""
    own = slice(start, start + len(tokens))
    row["tokens"][own], row["segments"][own] = tokens, segment
    row["targets"][start : own.stop - 1] = tokens[1:]
    row["positions"][own] = position + np.arange(len(tokens))
    return own
