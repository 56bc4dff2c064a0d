"""The host's side of a generation: requests, their order, prefill batches, and who has a slot."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int

from effreason.sampling import speculation
from effreason.sampling.draws import SamplingParams, recorded_logprobs
from effreason.sampling.repetition import RepetitionStopping
from effreason.sampling.slots import INSERT_FIELDS
from effreason.types import FinishReason, Response, padded_length

PREFILL_ROWS = 8                    # prompts prefilled at once, at most
PREFILL_TOKENS = 8192               # padded tokens of them together, at most
MIN_SLOTS_PER_DEVICE = 8            # not halved further: a step costs about the same
REFILL_SHARE = 8                    # one free slot in 8 ends a chunk early if something waits
LEAST_PER_STEP = 1.5                # tokens of a response in a step that reads a draft, to go on;
PAUSE = 8                           # otherwise so many chunks without drafts

Prompt = Sequence[int] | Int[np.ndarray, " S"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One response to generate."""

    prompt: int                     # index of the prompt; requests of one index share its prefill
    tokens: Int[np.ndarray, " S"]   # the prompt
    uid: int                        # with sample and position it makes the key of every token
    sample: int
    max_new_tokens: int
    expected_tokens: float | None = None    # the longest start first; decides nothing but the order
    prefix: Response | None = None  # what was drawn before, to be continued

    @property
    def known(self) -> Int[np.ndarray, " length"]:
        """The prompt and what was drawn before."""
        if self.prefix is None:
            return self.tokens
        return np.concatenate([self.tokens, self.prefix.tokens])

    @property
    def length(self) -> int:
        """The number of known tokens."""
        return len(self.tokens) + (0 if self.prefix is None else len(self.prefix.tokens))


def make_requests(prompts: Sequence[Prompt], samples: int, max_new_tokens: int | Sequence[int], *,
                  uids: Sequence[int] | None = None, vocabulary: int | None = None,
                  expected: Mapping[int, float] = MappingProxyType({})) -> list[Request]:
    """Returns the requests for `samples` responses to each prompt.

    Args:
        max_new_tokens: for all prompts, or one for each.
        uids: in [0, 2**31); None = the indices of the prompts.
        vocabulary: token ids must be below it, if given.
        expected: response tokens by uid, if something is known of it.

    Raises:
        ValueError: for prompts, limits or uids that are not valid."""
    count = len(prompts)
    limits = ([int(max_new_tokens)] * count if isinstance(max_new_tokens, int | np.integer)
              else list(max_new_tokens))
    uids = list(range(count)) if uids is None else list(uids)
    if len(limits) != count or len(uids) != count:
        raise ValueError(f"expected {count} max_new_tokens and uids, as there are prompts, "
                         f"got {len(limits)} and {len(uids)}")
    if samples < 1 or min(limits, default=1) < 1:
        raise ValueError("samples and max_new_tokens must be at least 1, "
                         f"got {samples} and {min(limits, default=1)}")
    if not all(0 <= uid < 2**31 for uid in uids):
        raise ValueError(f"uids must be in [0, 2**31), got {min(uids)} to {max(uids)}")

    requests = []
    for index, (prompt, uid, limit) in enumerate(zip(prompts, uids, limits, strict=True)):
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ValueError(f"prompt {index} must be a list of token ids, "
                             f"got shape {tokens.shape}, {tokens.dtype}")
        if vocabulary is not None and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ValueError(f"prompt {index}: token ids must be in [0, {vocabulary}), "
                             f"got {tokens.min()} to {tokens.max()}")
        tokens = tokens.astype(np.int32)
        requests += [Request(prompt=index, tokens=tokens, uid=uid, sample=sample,
                             max_new_tokens=int(limit), expected_tokens=expected.get(uid))
                     for sample in range(samples)]
    return requests


def check_requests(requests: Sequence[Request], max_positions: int | None) -> None:
    """Raises ValueError for a request that cannot be served."""
    for request in requests:
        name = f"prompt {request.prompt}, sample {request.sample}"
        drawn = len(request.known) - len(request.tokens)
        if not len(request.tokens):
            raise ValueError(f"{name}: the prompt must have at least 1 token, got 0")
        if request.max_new_tokens <= drawn:
            raise ValueError(f"{name}: max_new_tokens must be above the {drawn} drawn already, "
                             f"got {request.max_new_tokens}")
        if (max_positions is not None
                and len(request.tokens) + request.max_new_tokens > max_positions):
            raise ValueError(f"{name}: prompt and max_new_tokens must be at most {max_positions} "
                             f"positions, got {len(request.tokens)} + {request.max_new_tokens}")


def order_requests(requests: Sequence[Request]) -> list[Request]:
    """Sorts by expected length, unknown first, then longest; samples of a prompt stay together."""
    expected: dict[int, list[float]] = collections.defaultdict(list)
    for request in requests:
        expected[request.prompt].append(
            float("inf") if request.expected_tokens is None else request.expected_tokens)

    ranks = {prompt: rank for rank, prompt in enumerate(expected)}
    means = {prompt: sum(tokens) / len(tokens) for prompt, tokens in expected.items()}
    return sorted(requests, key=lambda request: (-means[request.prompt], ranks[request.prompt]))


@dataclasses.dataclass(frozen=True)
class PrefillKey:
    """Tokens to prefill before a response can continue; equal ones are prefilled once."""

    name: tuple[int, ...]   # the prompt; if the response has a prefix, the sample and the length
    known: np.ndarray = dataclasses.field(compare=False)

    @classmethod
    def of(cls, request: Request) -> "PrefillKey":
        own = () if request.prefix is None else (request.sample, request.length)
        return cls((request.prompt, *own), request.known)


@dataclasses.dataclass(kw_only=True)
class PrefillBatch:
    """Prompts of similar length, prefilled together and kept until all their responses start."""

    rows: dict[PrefillKey, int]
    waiting: int                    # responses that will still start from it
    width: int                      # positions of a row
    height: int                     # rows, some of them empty
    cache: Any = None               # on the device, once it is prefilled

    def prompts(self) -> tuple[Int[np.ndarray, "height width"], Int[np.ndarray, " height"]]:
        """Returns the tokens, padded on the right, and how many there are in each row."""
        prompts = np.zeros((self.height, self.width), np.int32)
        lengths = np.zeros(self.height, np.int32)
        for key, row in self.rows.items():
            # The last token is left to the first decode step, which draws from its prediction.
            lengths[row] = len(key.known) - 1
            prompts[row, : lengths[row]] = key.known[:-1]
        return prompts, lengths


class PrefillQueue:
    """Everything to prefill, in the order it is needed, by padded length.

    Args:
        requests: in their order.
        max_width: of a batch.
        max_rows: of a batch."""

    def __init__(self, requests: Sequence[Request], max_width: int | None, max_rows: int) -> None:
        self._max_width, self._max_rows = max_width, max_rows
        self._batches: list[PrefillBatch] = []
        self._waiting: dict[int, dict[PrefillKey, int]]     # responses, by width and key
        self._waiting = collections.defaultdict(dict)
        for request in requests:
            self.add(PrefillKey.of(request))

    def add(self, key: PrefillKey) -> None:
        """Appends a response."""
        waiting = self._waiting[prefill_width(len(key.known), self._max_width)]
        waiting[key] = waiting.get(key, 0) + 1

    def batch_of(self, key: PrefillKey) -> PrefillBatch:
        """Returns the batch that holds a key; a new one takes the next keys of its width, too."""
        for batch in self._batches:
            if key in batch.rows:
                return batch

        width = prefill_width(len(key.known), self._max_width)
        height = prefill_rows(width, self._max_rows)
        waiting = self._waiting[width]
        others = (other for other in waiting if other != key)
        keys = [key, *itertools.islice(others, height - 1)]
        batch = PrefillBatch(rows={key: row for row, key in enumerate(keys)},
                             waiting=sum(waiting.pop(key) for key in keys),
                             width=width, height=height)
        self._batches.append(batch)
        return batch

    def drop_started(self) -> None:
        """Forgets the batches whose responses have all started."""
        self._batches = [batch for batch in self._batches if batch.waiting]


def prefill_width(tokens: int, max_width: int | None) -> int:
    """Returns the padded length of a prompt."""
    width = max(16, 1 << (tokens - 1).bit_length())
    return width if max_width is None else min(width, max_width)


def prefill_rows(width: int, slots: int) -> int:
    """Returns the rows of a batch, filled or not: rounding must not depend on what else waits."""
    return max(min(slots, PREFILL_ROWS, PREFILL_TOKENS // width), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLimits:
    """How large the cache may become: slots, and positions of each."""

    slots: int                      # at most
    shards: int = 1                 # the slots are split this many ways
    chunk: int = 16                 # decode steps of a chunk, at most
    smallest: int = 64              # positions of a slot, a power of two
    largest: int | None = None      # positions of a slot; None = no limit
    budget: int | None = None       # positions of all slots together; None = enough
    # Positions of keys and values that take as much memory as a slot of some capacity.
    positions_held: Callable[[int], int] = lambda capacity: capacity
    draft_tokens: int = 0           # read ahead in each slot, at most; 0 = none
    most_positions: int = 128       # that a device reads in a step with drafts

    def capacity(self, length: int, width: int = 0) -> int:
        """Returns the positions of a slot for a response to run through the next chunk.

        Args:
            length: tokens in its cache.
            width: of its prefill, if it is yet to start."""
        # One more: a row that has ended keeps writing after its last token until the chunk ends.
        needed = padded_length(max(length + self.chunk + 1, width), self.smallest)
        return needed if self.largest is None else min(needed, self.largest)

    @property
    def least_slots(self) -> int:
        """Slots once the longest responses are in them."""
        return self.slots if self.largest is None else self.slots_of(self.largest)

    @property
    def least_per_shard(self) -> int:
        """Slots of each shard that are not halved further: fewer, if then their drafts are long."""
        if not self.draft_tokens:
            return MIN_SLOTS_PER_DEVICE
        return min(max(self.most_positions // (self.draft_tokens + 1), 1), MIN_SLOTS_PER_DEVICE)

    def slots_of(self, capacity: int) -> int:
        """Returns how many slots of so many positions fit; at least one for each shard."""
        if self.budget is None:
            return self.slots
        fitting = max(self.budget // self.positions_held(capacity) // self.shards, 1) * self.shards
        return min(self.slots, fitting)


@dataclasses.dataclass(kw_only=True)
class Running:
    """The response in a slot, as the host knows it."""

    request: Request
    key: PrefillKey
    length: int                     # tokens in the slot's cache, at most
    generated: int
    tokens: list[np.ndarray]        # one piece for each chunk
    logprobs: dict[str, list[np.ndarray]]
    repeated: bool = False

    @classmethod
    def start(cls, request: Request, sampling: SamplingParams) -> "Running":
        prefix, key = request.prefix, PrefillKey.of(request)
        return cls(request=request, key=key, length=len(key.known) - 1,
                   generated=len(key.known) - len(request.tokens),
                   tokens=[] if prefix is None else [prefix.tokens],
                   logprobs={name: [] if prefix is None else [getattr(prefix, name)]
                             for name in recorded_logprobs(sampling)},
                   repeated=prefix is not None and prefix.repeated)

    def extend(self, outputs: Mapping[str, np.ndarray], slot: int, count: int) -> None:
        """Appends `count` tokens of a chunk."""
        self.tokens.append(outputs["tokens"][:count, slot])
        for name, pieces in self.logprobs.items():
            pieces.append(outputs[name][:count, slot])
        self.length += count
        self.generated += count

    def drawn(self) -> Int[np.ndarray, " T"]:
        """Returns the response so far; the same array until there is more."""
        if len(self.tokens) != 1:
            self.tokens = [np.concatenate([np.zeros(0, np.int32), *self.tokens])]
        return self.tokens[0]

    def response(self, finish: FinishReason | None, length: int | None = None) -> Response:
        """Joins the pieces, cut at `length` if given."""
        def join(pieces: list[np.ndarray], dtype: Any) -> np.ndarray:
            return (np.concatenate(pieces) if pieces else np.zeros(0, dtype))[:length]

        logprobs = {name: join(pieces, np.float32) for name, pieces in self.logprobs.items()}
        for name in ("sampling_logprobs", "model_logprobs"):
            logprobs.setdefault(name, logprobs["logprobs"])
        return Response(prompt=self.request.prompt, sample=self.request.sample, finish=finish,
                        tokens=join(self.tokens, np.int32), repeated=self.repeated, **logprobs)


class Schedule:
    """Which response is in which slot; each device has the same number of consecutive slots.

    All slots have the same capacity, as many positions as the longest response in them needs. If
    the larger slots are too few for all, the responses that need them give up theirs: each waits,
    as a prefix to continue, until all shorter ones have ended. So the slots in use are always as
    many as fit, and a response is prefilled again at most once for each capacity.

    Attributes:
        capacity: positions of a slot.
        drafted: tokens of a draft in this chunk; 0 = none are drafted."""

    def __init__(self, requests: Sequence[Request], sampling: SamplingParams, limits: CacheLimits,
                 repetition: RepetitionStopping | None) -> None:
        self._sampling, self._shards, self._repetition = sampling, limits.shards, repetition
        self._queue = collections.deque(order_requests(requests))
        # For fewer responses a power of two, so that they share programs; a multiple of the shards.
        slots = min(limits.slots, 1 << max(len(requests) - 1, 0).bit_length())
        slots = -(-slots // limits.shards) * limits.shards
        self._limits = dataclasses.replace(limits, slots=slots)
        self.capacity = 0
        self._slots: list[Running | None] = [None] * slots
        self._stopped = np.zeros(slots, bool)       # on the host; the device does not know yet
        # Rows of the device's state that the slots have, local to each device; None: all.
        self._rows: Int[np.ndarray, " S"] | None = None
        self.prefills = PrefillQueue(self._queue, limits.largest, slots)
        # To draft from: the tokens of responses, by prompt.
        self._finished: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        self.drafted = self._pause = 0      # _pause: chunks without drafts that follow
        self._samples = max(collections.Counter(
            request.prompt for request in requests).values(), default=0)

    @property
    def slots(self) -> int:
        """Slots at present: fewer in the tail."""
        return len(self._slots)

    @property
    def running(self) -> list[Running]:
        """The responses in slots."""
        return [response for response in self._slots if response is not None]

    @property
    def waiting(self) -> int:
        """Number of responses that have not started."""
        return len(self._queue)

    def unfinished(self) -> list[Response]:
        """Returns the responses that have started, with finish None, as prefixes to continue."""
        return [*(response.response(None) for response in self.running),
                *(request.prefix for request in self._queue if request.prefix is not None)]

    def fill(self) -> list[tuple[PrefillBatch, list[Running]]]:
        """Makes room and gives free slots to waiting responses; returns those, by the batch with
        their prompts."""
        self._choose_capacity()
        # Dealt out over the devices: they shrink together, when the busiest of them allows it.
        per_shard = len(self._slots) // self._shards
        free = [slot for slot, response in enumerate(self._slots) if response is None]
        free.sort(key=lambda slot: (slot % per_shard, slot))

        queue, self._queue = self._queue, collections.deque()
        started: dict[int, tuple[PrefillBatch, list[Running]]] = {}
        while queue and free:
            request = queue.popleft()
            if self._needed(request) > self.capacity:
                self._queue.append(request)
                continue
            slot, response = free.pop(0), Running.start(request, self._sampling)
            batch = self.prefills.batch_of(response.key)
            batch.waiting -= 1
            self._slots[slot], self._stopped[slot] = response, False
            started.setdefault(id(batch), (batch, []))[1].append(response)
        self._queue += queue
        return list(started.values())

    def _needed(self, response: Request | Running) -> int:
        """Returns the capacity that a response needs in the next chunk."""
        if isinstance(response, Running):
            return self._limits.capacity(response.length)
        width = prefill_width(response.length, self._limits.largest)
        return self._limits.capacity(response.length - 1, width)

    def _choose_capacity(self) -> None:
        """Enlarges the slots if that costs none that are in use, or if nothing else can go on;
        otherwise the responses that have outgrown theirs give them up."""
        while True:
            free = len(self._slots) - len(self.running)
            first: list[Request | Running] = [
                *self.running, *itertools.islice(self._queue, free)]
            larger = [needed for needed in map(self._needed, first) if needed > self.capacity]
            if not larger:
                return
            if self._limits.budget is None:
                self.capacity = max(larger)
                return

            capacity = min(larger)
            per_shard = self._limits.slots_of(capacity) // self._shards
            remaining, shards = len(self.running) + len(self._queue), self._busy_slots()
            outgrown = [[slot for slot, response in shard if self._needed(response) > self.capacity]
                        for shard in shards]
            staying = max(len(shard) - len(leaving)
                          for shard, leaving in zip(shards, outgrown, strict=True))
            costs_nothing = (per_shard * self._shards >= min(len(self._slots), remaining)
                             and max(map(len, shards)) <= per_shard)
            if not costs_nothing and (staying > per_shard or any(
                    self._needed(request) <= self.capacity for request in self._queue)):
                for slot in itertools.chain(*outgrown):
                    self._give_up(slot)
                return

            for shard in shards:        # the longest stay: they would cost most to prefill again
                shard.sort(key=lambda item: -item[1].length)
                for slot, _ in shard[per_shard:]:
                    self._give_up(slot)
            self.capacity = capacity
            self._keep(min(per_shard, len(self._slots) // self._shards))

    def _give_up(self, slot: int) -> None:
        """Puts a response back into the queue, to be continued."""
        response = self._slots[slot]
        assert response is not None
        request = dataclasses.replace(response.request, prefix=response.response(None))
        self._queue.append(request)
        self.prefills.add(PrefillKey.of(request))
        self._slots[slot], self._stopped[slot] = None, True

    def _busy_slots(self) -> list[list[tuple[int, Running]]]:
        """Returns the slots of each shard that hold a response, with the responses."""
        size = len(self._slots) // self._shards
        shards: list[list[tuple[int, Running]]] = [[] for _ in range(self._shards)]
        for slot, response in enumerate(self._slots):
            if response is not None:
                shards[slot // size].append((slot, response))
        return shards

    def insert_table(self, batch: PrefillBatch,
                     started: Sequence[Running]) -> Int[np.ndarray, "8 S"]:
        """Returns the table for `slots.insert` that starts these responses."""
        slots = {id(response): slot for slot, response in enumerate(self._slots)}
        table = np.full((len(INSERT_FIELDS), len(self._slots)), -1, np.int32)
        for column, response in enumerate(started):
            request = response.request
            values = {"slot": slots[id(response)], "row": batch.rows[response.key],
                      "token": response.key.known[-1], "length": response.length,
                      "generated": response.generated, "limit": request.max_new_tokens,
                      "uid": request.uid, "sample": request.sample}
            table[:, column] = [values[name] for name in INSERT_FIELDS]
        return table

    def control(self) -> Int[np.ndarray, " S_plus_1"]:
        """Returns the control of `slots.decode`: when a chunk may end early, rows to give up."""
        running, slots = len(self.running), len(self._slots)
        if self._queue:
            min_active = max(running - max(slots // REFILL_SHARE, 1), 0)
        else:
            half = -(-slots // self._shards // 2)       # of each device
            can_halve = half >= self._limits.least_per_shard
            min_active = min(half * self._shards if can_halve else 0, running - 1)

        control = np.concatenate([[min_active], self._stopped]).astype(np.int32)
        self._stopped = np.zeros(slots, bool)
        return control

    def choose_draft_length(self) -> None:
        """Sets `drafted` for the next chunk: only the last responses are drafted for, as long as
        it pays, and in the longest drafts that the device reads at little cost."""
        self.drafted, self._pause = 0, max(self._pause - 1, 0)
        if self._queue or self._pause or not self._limits.draft_tokens:
            return
        per_shard = len(self._slots) // self._shards
        longest = max(response.length for response in self.running)
        for length in speculation.draft_lengths(self._limits.draft_tokens):
            if (per_shard * (length + 1) <= self._limits.most_positions
                    and longest + length < self.capacity):
                self.drafted = length
                return

    def texts(self) -> Int[np.ndarray, "S W"]:
        """Returns for each slot what its drafts come from."""
        width = speculation.text_width(self.capacity, self._samples)
        texts = np.full((len(self._slots), width), speculation.NOTHING, np.int32)
        drawn = collections.defaultdict(list)
        for running in self.running:
            drawn[running.request.prompt].append(running.drawn())

        for slot, response in enumerate(self._slots):
            if response is not None:
                request, tokens = response.request, response.drawn()
                others = [other for other in drawn[request.prompt] if other is not tokens]
                texts[slot] = speculation.make_text(
                    [*self._finished[request.prompt], *others],
                    np.concatenate([request.tokens, tokens]), width)
        return texts

    def harvest(self, outputs: Mapping[str, np.ndarray]) -> list[Response]:
        """Appends the tokens of a chunk to their responses; returns the finished ones."""
        finished = []
        counts, active = outputs["count"].tolist(), outputs["active"].tolist()
        # Of idle rows too, whose numbers mean nothing: only if this fails each row is looked at.
        all_finite = np.isfinite(outputs["logprobs"]).all()

        for slot, response in enumerate(self._slots):
            if response is None:
                continue
            count = counts[slot]
            if not (all_finite or np.isfinite(outputs["logprobs"][:count, slot]).all()):
                raise FloatingPointError(
                    f"uid {response.request.uid}, sample {response.request.sample}: after "
                    f"{response.generated} tokens of the response the model gives no finite "
                    "log-prob")
            response.extend(outputs, slot, count)

            finish = None
            if not active[slot]:
                is_eos = response.tokens[-1][-1] in self._sampling.eos_ids
                finish = FinishReason.EOS if is_eos else FinishReason.LENGTH
            length = self._repetition_length(response, count)
            if length is not None:
                self._stopped[slot] = finish is None
                finish = FinishReason.REPETITION
            if finish is not None:
                finished.append(response.response(finish, length))
                if self._limits.draft_tokens:
                    self._finished[response.request.prompt].append(finished[-1].tokens)
                self._slots[slot] = None

        tokens = [counts[slot] for slot, response in enumerate(self._slots) if response is not None]
        if self.drafted and tokens and np.mean(tokens) < LEAST_PER_STEP * outputs["steps"]:
            self._pause = PAUSE
        return finished

    def _repetition_length(self, response: Running, count: int) -> int | None:
        """Returns the length to stop a response at because its last `count` tokens repeat."""
        if self._repetition is None or response.repeated or not count:
            return None
        length = self._repetition.stop_length(response.tokens, response.generated, count)
        response.repeated = length is not None
        request = response.request
        is_audited = length is not None and self._repetition.is_audited(request.uid, request.sample)
        return None if is_audited else length

    def compact(self) -> Int[np.ndarray, " kept"] | None:
        """Halves the slots while half of them, on every device, are enough for all responses.

        Returns:
            The rows of the device's state that the slots now have, indices local to each device;
            None if all."""
        kept = len(self._slots) // self._shards
        needed = max(self._limits.least_per_shard, *map(len, self._busy_slots()))
        while not self._queue and needed <= (half := -(-kept // 2)) < kept:
            kept = half
        self._keep(kept)
        rows, self._rows = self._rows, None
        return rows

    def _keep(self, kept: int) -> None:
        """Drops idle slots until each shard has `kept`."""
        size = len(self._slots) // self._shards
        if kept == size:
            return

        slots: list[int] = []
        for shard, busy in enumerate(self._busy_slots()):
            idle = [slot for slot in range(shard * size, (shard + 1) * size)
                    if self._slots[slot] is None]
            slots += [*(slot for slot, _ in busy), *idle][:kept]
        self._slots = [self._slots[slot] for slot in slots]
        self._stopped = self._stopped[slots]
        rows = np.arange(size * self._shards) % size if self._rows is None else self._rows
        self._rows = rows[slots].astype(np.int32)
