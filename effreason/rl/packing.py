"""Stage 6, on the host: responses of very different lengths as rows of one width, with little padding.

U optimiser updates, M micro-batches of R rows, N positions of a row, B = P * G responses, T response tokens at most.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from effreason.lm.attention import zigzag
from effreason.types import Packed, Rollouts, Rows

LONG = 4096                         # positions of a row whose attention costs about as much as its products
NARROW = 128                        # positions of a row that is not halved any more
FIELDS = ("tokens", "targets", "positions", "segments")     # of a row; 0 in its padding


def row_width(longest: int, context: int = 1) -> int:
    """N for sequences of at most so many positions, rounded up for kernels and for the context axis twice."""
    if longest < LONG:
        unit = math.lcm(32, 2 * context) if longest <= 1024 else 512 * context
    else:
        unit = 2048 * context           # so that its quarter is one, too
    return -(-longest // unit) * unit


def row_widths(width: int, context: int = 1, alone: bool = False) -> list[int]:
    """N, and narrower ones, each half of the one before, widest first.

    Of long rows two more: attention costs the row's square, whatever is in it. Where each sequence has a row of its
    own, up to four more: what it does not fill is computed all the same."""
    widths, most = [width], 5 if alone else 3 if width >= LONG else 1
    while len(widths) < most and widths[-1] >= NARROW and widths[-1] % (4 * context) == 0:
        widths.append(widths[-1] // 2)
    return widths


def pack(rollouts: Rollouts, *, rows: int, width: int, slots: int, updates: int = 1, context: int = 1,
         alone: bool = False) -> Packed:
    """Lays prompts and responses into rows; response b belongs to optimiser update b % U.

    There is room for the worst case, so that all steps of a run have the same shapes; how many micro-batches hold
    something is data.
    Args: rows, R; width, N, of at least the longest sequence; slots, T; updates, U; context, of the mesh: columns are
        in the order that shares causal work out evenly; alone, one sequence a row, for attention that knows lengths but
        no segments."""
    group_size, lengths = rollouts.tokens.shape[1], rollouts.lengths.reshape(-1)
    sizes, none = np.repeat(rollouts.prompt_lengths, group_size) + lengths, lengths.size * slots
    shares = [range(update, len(sizes), updates) for update in range(updates)]
    widths = row_widths(width, context, alone)
    laid = [layout(sizes, share, widths, rows, alone) for share in shares]
    shape = (updates, -(-len(shares[0]) // rows), rows)
    token_index: Any = np.full((lengths.size, slots), math.prod(shape) * sum(widths), np.int32)
    groups: list[Rows] = []
    counts: list[Any] = []
    offset = 0
    for group, width in enumerate(widths):
        table: dict[str, Any] = {name: np.zeros((*shape, width), np.int32) for name in FIELDS} | {
            "response_index": np.full((*shape, width), none, np.int32)}
        flat = {name: array.reshape(updates, -1, width) for name, array in table.items()}
        column = np.argsort(zigzag(width, context))
        for update in range(updates):
            for row, members in enumerate(laid[update][group]):
                for name, values in _row(rollouts, members, width, slots).items():
                    flat[name][update, row, column] = values
        here = np.flatnonzero(table["response_index"] < none)
        token_index.reshape(-1)[table["response_index"].reshape(-1)[here]] = offset + here
        groups.append(Rows(**table))
        counts.append(np.array([len(each[group]) // rows for each in laid], np.int32))
        offset += math.prod(shape) * width
    return Packed(groups=tuple(groups), counts=tuple(counts), token_index=token_index)


def layout(sizes: np.ndarray, members: Iterable[int], widths: Sequence[int], rows: int,
           alone: bool = False) -> list[list[list[int]]]:
    """Which members share a row: for each width its rows, some of them empty, as many as fill micro-batches.

    A member goes to the narrowest width that holds it, the longest first, each where it fits first; but what room is
    left in wider rows, which are computed anyway, is filled before narrower ones are begun.
    Args: sizes int[B], of all sequences; widths, descending; rows, R; alone, one member a row."""
    left = sorted(members, key=lambda member: (-int(sizes[member]), member))
    laid = []
    for width, narrower in zip(widths, [*widths[1:], 0], strict=True):
        bins: list[list[int]] = []
        room: list[int] = []

        def fits(member: int, bins: list[list[int]] = bins, room: list[int] = room) -> bool:
            size = int(sizes[member])
            at = next((index for index, free in enumerate(room) if free >= size), None)
            if at is not None:
                bins[at].append(member)
                room[at] = 0 if alone else room[at] - size
            return at is not None

        for member in [each for each in left if sizes[each] > narrower]:
            if not fits(member):
                bins.append([])
                room.append(width)
                fits(member)
        spare = -len(bins) % rows
        bins += [[] for _ in range(spare)]
        room += [width] * spare
        left = [each for each in left if sizes[each] <= narrower and not fits(each)]
        laid.append(bins)
    return laid


def in_line(values: np.ndarray, slots: int) -> np.ndarray:
    """Values [P, G, T] of response tokens as [B, slots], 0 behind."""
    return np.pad(values.reshape(-1, values.shape[-1]), ((0, 0), (0, slots - values.shape[-1])))


def fill(packed: Packed) -> float:
    """The share of the positions computed on that hold a token."""
    computed = sum(int(count.sum()) * rows.tokens.shape[2] * rows.tokens.shape[3]
                   for rows, count in zip(packed.groups, packed.counts, strict=True))
    return sum(int((rows.segments > 0).sum()) for rows in packed.groups) / computed


def _row(rollouts: Rollouts, members: Sequence[int], width: int, slots: int) -> dict[str, np.ndarray]:
    """One row, in order, with the sources of its targets. Args: members, the responses in it; slots, T."""
    sequences, response_index, end = [], np.full(width, rollouts.lengths.size * slots, np.int32), 0
    for member in members:
        prompt, sample = divmod(member, rollouts.tokens.shape[1])
        start, length = rollouts.prompt_lengths[prompt], rollouts.lengths[prompt, sample]
        sequences.append(np.concatenate([rollouts.prompts[prompt, :start], rollouts.tokens[prompt, sample, :length]]))
        end += len(sequences[-1])
        # A response token is the target of the position before it.
        response_index[end - 1 - length : end - 1] = member * slots + np.arange(length)
    return line(sequences, width) | {"response_index": response_index}


def line(sequences: Iterable[np.ndarray], width: int) -> dict[str, np.ndarray]:
    """Sequences one behind the other: tokens, targets, positions and segments int32[width]."""
    laid = {name: np.zeros(width, np.int32) for name in FIELDS}
    start = 0
    for segment, sequence in enumerate(sequences, start=1):
        end = start + len(sequence)
        laid["tokens"][start:end] = sequence
        laid["targets"][start : end - 1] = sequence[1:]
        laid["positions"][start:end] = np.arange(len(sequence))
        laid["segments"][start:end] = segment
        start = end
    return laid


def one_a_row(sequences: Sequence[np.ndarray]) -> Rows:
    """Sequences int32[...] in a row each, [R, N], to be scored outside of training; their sources say nothing."""
    width = max(map(len, sequences))
    lines = [line([sequence], width) for sequence in sequences]
    table: dict[str, Any] = {name: np.stack([each[name] for each in lines]) for name in lines[0]}
    return Rows(**table, response_index=np.zeros_like(table["tokens"]))
