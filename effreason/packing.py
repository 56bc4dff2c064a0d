"""Stage 6, on the host: responses of very different lengths as rows of one width, with little padding.

U optimiser updates, M micro-batches of R rows, N positions of a row, B = P * G responses, T response tokens at most,
rounded up.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from effreason.lm.causal import zigzag
from effreason.masks import padded_length
from effreason.records import Packed, Rollouts, Rows

FEWEST = 4                          # micro-batches that there is room for: fewer shapes to compile


def pack(rollouts: Rollouts, *, rows: int, updates: int = 1, context: int = 1, alone: bool = False) -> Packed:
    """Lays prompts and responses into rows; response b belongs to optimiser update b % U.

    The rows are as wide as the longest sequence, rounded up, and each is filled with the longest sequences that still
    fit (first fit, decreasing). There is room for a round number of micro-batches; how many hold something is data.
    Args: rows, R; updates, U; context, of the mesh: columns are in the order that shares causal work out evenly; alone,
        one sequence a row, with widths that halve, for attention that knows lengths but no segments."""
    prompts = [rollouts.prompts[prompt, :length] for prompt, length in enumerate(rollouts.prompt_lengths)]
    lengths = rollouts.lengths.reshape(-1)
    group_size, slots = rollouts.tokens.shape[1], padded_length(rollouts.tokens.shape[2])
    starts = np.repeat(rollouts.prompt_lengths, group_size)
    sizes = starts + lengths
    widest = -(-padded_length(int(sizes.max())) // (2 * context)) * 2 * context
    shares = [np.arange(update, len(sizes), updates) for update in range(updates)]
    widths = _halving(widest, int(sizes.min()), context) if alone else [widest]
    places = np.full((len(sizes), slots), -1, np.int32)
    groups, counts, offset = [], [], 0
    for narrower, width in zip([0, *widths], widths, strict=False):
        laid = [first_fit(sizes, [b for b in share if narrower < sizes[b] <= width], 0 if alone else width)
                for share in shares]
        needed = [-(-len(bins) // rows) for bins in laid]
        shape = (updates, padded_length(max(needed), FEWEST), rows, width)
        table = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segments")}
        table["sources"] = np.full(shape, lengths.size * slots, np.int32)
        flat = {name: array.reshape(updates, -1, width) for name, array in table.items()}
        order = zigzag(width, context)
        column = np.argsort(order)
        for update, bins in enumerate(laid):
            for row, members in enumerate(bins):
                laid_out = _line(rollouts, prompts, members, width, slots, lengths.size * slots)
                for name, values in laid_out.items():
                    flat[name][update, row] = values[order]
                here = np.flatnonzero(laid_out["sources"] < lengths.size * slots)
                places.reshape(-1)[laid_out["sources"][here]] = (
                    offset + (update * flat["tokens"].shape[1] + row) * width + column[here])
        groups.append(Rows(**table))
        counts.append(np.array(needed, np.int32))
        offset += table["tokens"].size
    return Packed(groups=tuple(groups), counts=tuple(counts), places=np.where(places < 0, offset, places))


def first_fit(sizes: np.ndarray, members: Iterable[int], width: int) -> list[list[int]]:
    """Members in bins of at most `width`, each where it fits first, the largest first. Args: width, 0 = one a bin."""
    bins: list[list[int]] = []
    room: list[int] = []
    for member in sorted(members, key=lambda each: (-sizes[each], each)):
        size = int(sizes[member])
        at = next((index for index, left in enumerate(room) if left >= size), None) if width else None
        if at is None:
            bins.append([member])
            room.append(width - size)
        else:
            bins[at].append(member)
            room[at] -= size
    return bins


def in_line(values: np.ndarray, slots: int) -> np.ndarray:
    """Values [P, G, T] of response tokens as [B, slots], 0 behind."""
    return np.pad(values.reshape(-1, values.shape[-1]), ((0, 0), (0, slots - values.shape[-1])))


def fill(packed: Packed) -> float:
    """The share of the positions computed on that hold a token."""
    computed = sum(int(count.sum()) * rows.tokens.shape[2] * rows.tokens.shape[3]
                   for rows, count in zip(packed.groups, packed.counts, strict=True))
    return sum(int((rows.segments > 0).sum()) for rows in packed.groups) / computed


def _halving(widest: int, shortest: int, context: int) -> list[int]:
    """The widest, its half and its quarter, as far as something is that short and the context axis divides them."""
    widths = [widest]
    while len(widths) < 3 and widths[0] % (4 * context) == 0 and widths[0] // 2 >= shortest:
        widths.insert(0, widths[0] // 2)
    return widths


def _line(rollouts: Rollouts, prompts: Sequence[np.ndarray], members: Sequence[int], width: int, slots: int,
          none: int) -> dict[str, np.ndarray]:
    """One row, in order. Args: members, its sequences; slots, T; none, the source of what is no response token."""
    sequences, sources = [], np.full(width, none, np.int32)
    end = 0
    for member in members:
        prompt, sample = divmod(member, rollouts.tokens.shape[1])
        length = int(rollouts.lengths[prompt, sample])
        sequences.append(np.concatenate([prompts[prompt], rollouts.tokens[prompt, sample, :length]]))
        end += len(sequences[-1])
        # A response token is the target of the position before it.
        sources[end - 1 - length : end - 1] = member * slots + np.arange(length)
    return line(sequences, width) | {"sources": sources}


def line(sequences: Iterable[np.ndarray], width: int) -> dict[str, np.ndarray]:
    """Sequences one behind the other: tokens, targets, positions and segments int32[width]."""
    laid = {name: np.zeros(width, np.int32) for name in ("tokens", "targets", "positions", "segments")}
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
    """Sequences int32[...] in a row each, [R, N], to be scored outside of training."""
    width = max(map(len, sequences))
    lines = [line([sequence], width) for sequence in sequences]
    table = {name: np.stack([each[name] for each in lines]) for name in lines[0]}
    return Rows(**table, sources=np.zeros_like(table["tokens"]))
