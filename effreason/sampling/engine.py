"""Stage 2: the sampling engine. Prompts in, groups of responses out, each handed over as soon as it is finished.

S slots hold one response each. A compiled chunk of decode steps advances all of them; it ends early when enough rows
have finished for waiting ones to take their place. A prompt is read once, several at a time, and its keys and values
are copied into the slots of its group. The cache grows by buckets with the longest sequence in it; when nothing waits
any more, the slots are halved as their rows end (sampling/slots.py has what happens on the device).

The key of every sampled token is fold_in(step key, prompt uid, sample, position): what a response will be does not
depend on its slot, on its neighbours or on the number of devices, but for the rounding of float sums.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh

from effreason.lm import kv_cache, model
from effreason.runtime import processes, sharding
from effreason.runtime.errors import UserError
from effreason.sampling import slots as device
from effreason.sampling.draws import SamplingParams
from effreason.sampling.repetition import RepetitionStopping
from effreason.sampling.scheduler import (
    PrefillBatch,
    PrefillKey,
    PrefillQueue,
    Request,
    check,
    in_order,
)
from effreason.sampling.scheduler import make_requests as make_requests
from effreason.types import FinishReason, Problem, Response, Rollouts, padded_length

STREAMS = {"train": 0, "evaluation": 1, "parity": 2}
SMALLEST = 8                        # slots on each device that are not halved further: a step costs about the same
REFILL_AT = 8                       # a chunk ends early when one slot in so many is free and something waits


def step_key(seed: int, stream: str, step: int) -> jax.Array:
    """The key under which all responses of a step are drawn. Streams never share a key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)


class Sampler(Protocol):
    """What `make_sampler` makes."""

    def __call__(self, params: model.Params, requests: Sequence[Request], key: jax.Array,
                 sampling: SamplingParams) -> "Generation":
        """Starts generating; see `Generation`."""
        ...


@dataclasses.dataclass(kw_only=True)
class _Running:
    """What the host knows of the response in a slot."""

    request: Request
    source: PrefillKey                  # what was read for it
    length: int                     # tokens in the slot's cache at most
    tokens: list[np.ndarray]
    logprobs: dict[str, list[np.ndarray]]
    generated: int
    repeated: bool = False


class Generation:
    """Responses on their way: an iterator that yields, after each chunk of decode steps, those that have finished.

    It yields an empty list where none has, so that its consumer can show progress, overlap other work, or stop. The
    next chunk is under way already while the consumer has the floor.

    Attributes: tokens, drawn so far; running, waiting, finished, numbers of responses; slots, and capacity, the cache
        positions of each; steps, decode steps so far; slot_steps, these times the slots there were; host_seconds, from
        the end of a chunk to the start of the next; compilations, programs compiled for it."""

    def __init__(self, programs: device.Programs, params: model.Params, requests: Sequence[Request], key: jax.Array,
                 sampling: SamplingParams, *, slots: int, chunk: int, positions: int | None,
                 smallest: int, repetition: RepetitionStopping | None) -> None:
        self._programs, self._key, self._sampling, self._chunk = programs, key, sampling, chunk
        self._smallest, self._repetition = smallest, repetition
        self._compiled_before = programs.compiled()
        check(requests, positions)
        self._most = None if positions is None else cache_positions(positions)
        self._queue = collections.deque(in_order(requests))
        self._slots: list[_Running | None] = [None] * _slot_count(slots, len(self._queue), programs.shards)
        self._library = PrefillQueue(self._queue, self._most, len(self._slots))
        self._halted = np.zeros(len(self._slots), bool)
        self._state: device.Slots | None = None
        self.capacity = 0
        self._drawn: dict[str, jax.Array] | None = None         # of the chunk under way
        self.tokens = self.finished = self.steps = self.slot_steps = 0
        self.host_seconds = 0.0
        with jax.set_mesh(programs.mesh):
            self._weights = programs.unstack(params) if self._queue else None
            self._launch()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Response]:
        if self._drawn is None:
            raise StopIteration
        drawn = sharding.to_host(self._drawn)
        ready = time.perf_counter()
        finished = self._harvest(drawn)
        with jax.set_mesh(self._programs.mesh):         # kernels ask for it; the consumer keeps its own
            self._launch()
        self.host_seconds += time.perf_counter() - ready
        return finished

    @property
    def slots(self) -> int:
        """Slots there are now: fewer in the tail."""
        return len(self._slots)

    @property
    def running(self) -> int:
        """Responses in slots."""
        return sum(row is not None for row in self._slots)

    @property
    def waiting(self) -> int:
        """Responses that have not started."""
        return len(self._queue)

    @property
    def compilations(self) -> int:
        """Programs compiled since it began; 0 once all shapes have been met."""
        return self._programs.compiled() - self._compiled_before

    def unfinished(self) -> list[Response]:
        """What has been begun, as far as it has come, finish None; a Request takes one up as its prefix."""
        return [*(_response(row, None) for row in self._slots if row is not None),
                *(request.prefix for request in self._queue if request.prefix is not None)]

    def _launch(self) -> None:
        """Fills free slots, makes room, and starts the next chunk; or notes that there is nothing left to do."""
        started = self._refill()
        if not self.running:
            self._drawn = self._state = self._weights = None
            return
        if not self._queue:
            self._shrink()
        self._make_room(started)
        for bank, rows in started:
            if bank.cache is None:
                prompts = sharding.to_device(bank.prompts(), self._programs.replicated)
                bank.cache = self._programs.read(self._weights, prompts)
            fresh = sharding.to_device(self._fresh(bank, rows), self._programs.replicated)
            self._state = self._programs.start(self._state, bank.cache, fresh, self._key)
            if not bank.waiting:        # at once: of long prefixes there may be many
                bank.cache = None
        self._library.forget()
        control = np.concatenate([[self._keep()], self._halted]).astype(np.int32)
        control = sharding.to_device(control, self._programs.replicated)
        self._state, self._drawn = self._programs.advance(self._weights, self._state, control,
                                                          sampling=self._sampling, chunk=self._chunk)
        self._halted = np.zeros(len(self._slots), bool)

    def _keep(self) -> int:
        """The number of active rows at which a chunk stops early: then there is something for the host to do."""
        running, count = self.running, len(self._slots)
        if self._queue:
            return max(running - max(count // REFILL_AT, 1), 0)
        half = -(-count // self._programs.shards // 2)      # of each device
        return min(half * self._programs.shards if half >= SMALLEST else 0, running - 1)

    def _refill(self) -> list[tuple[PrefillBatch, list[int]]]:
        """Gives free slots to waiting responses; returns the slots to start, by the bank that holds their prompts."""
        # Dealt out over the devices: they shrink together, as the busiest of them allows.
        here = len(self._slots) // self._programs.shards
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        free.sort(key=lambda slot: (slot % here, slot))
        started: dict[int, tuple[PrefillBatch, list[int]]] = {}
        for slot in free[: len(self._queue)]:
            request = self._queue.popleft()
            source = PrefillKey.of(request)
            bank, known = self._library.bank_of(source), len(source.known)
            self._slots[slot] = _Running(
                request=request, source=source, length=known - 1, generated=known - len(request.tokens),
                tokens=[] if request.prefix is None else [request.prefix.tokens],
                logprobs={name: [] if request.prefix is None else [getattr(request.prefix, name)]
                          for name in device.logprob_names(self._sampling)},
                repeated=request.prefix is not None and request.prefix.repeated)
            self._halted[slot] = False
            bank.waiting -= 1
            started.setdefault(id(bank), (bank, []))[1].append(slot)
        return list(started.values())

    def _make_room(self, started: list[tuple[PrefillBatch, list[int]]]) -> None:
        """Makes or grows the cache, so that the next chunk and the new prompts fit."""
        longest = max(row.length for row in self._slots if row is not None)
        # One more: a row that has ended stands behind its last token until the others have, and writes there.
        needed = padded_length(max([longest + self._chunk + 1, *(bank.width for bank, _ in started)]), self._smallest)
        if self._most is not None:                      # no sequence gets longer than that
            needed = min(needed, self._most)
        if self._state is None:
            self._state = self._programs.empty(count=len(self._slots), capacity=needed)
        elif needed > self.capacity:
            # Layer by layer: the old and the new cache never stand side by side.
            for index, layer in enumerate(self._state.cache):
                self._state.cache[index] = self._programs.grow(layer, capacity=needed)
        self.capacity = max(needed, self.capacity)

    def _fresh(self, bank: PrefillBatch, rows: list[int]) -> np.ndarray:
        """Where and how the responses in these slots start: see device.FRESH."""
        table = np.full((len(device.FRESH), len(self._slots)), -1, np.int32)
        for index, slot in enumerate(rows):
            row = self._slots[slot]
            assert row is not None
            request, source = row.request, row.source
            values = {"slot": slot, "source": bank.rows[source], "token": source.known[-1], "length": row.length,
                      "generated": row.generated, "limit": request.max_new_tokens, "uid": request.uid,
                      "sample": request.sample}
            table[:, index] = [values[name] for name in device.FRESH]
        return table

    def _harvest(self, drawn: dict[str, np.ndarray]) -> list[Response]:
        """Appends a chunk's tokens to the responses in their slots, and takes out those that are finished."""
        finished = []
        self.steps += int(drawn["steps"])
        self.slot_steps += int(drawn["steps"]) * len(self._slots)
        counts, active = drawn["count"].tolist(), drawn["active"].tolist()
        finite = np.isfinite(drawn["logprobs"]).all()       # of rows that idle too, whose numbers say nothing
        for slot, row in enumerate(self._slots):
            if row is None:
                continue
            count = counts[slot]
            if not (finite or np.isfinite(drawn["logprobs"][:count, slot]).all()):
                raise FloatingPointError(
                    f"uid {row.request.uid}, sample {row.request.sample}: after {row.generated} tokens of the response "
                    "the model gives no finite log-prob")
            row.tokens.append(drawn["tokens"][:count, slot])
            for name, arrays in row.logprobs.items():
                arrays.append(drawn[name][:count, slot])
            row.length += count
            row.generated += count
            self.tokens += count
            finish = None if active[slot] else FinishReason.EOS if row.tokens[-1][-1] in self._sampling.eos_ids else FinishReason.LENGTH
            cut = self._cut(row, count)
            if cut is not None:
                self._halted[slot] = finish is None     # the device does not know yet
                finish = FinishReason.REPETITION
            if finish is not None:
                finished.append(_response(row, finish, cut))
                self._slots[slot] = None
        self.finished += len(finished)
        return finished

    def _cut(self, row: "_Running", count: int) -> int | None:
        """The length to stop a response at because it only repeats itself since then. Args: count, its new tokens."""
        if self._repetition is None or row.repeated or not count:
            return None
        cut = self._repetition.cut(row.tokens, row.generated, count)
        row.repeated = cut is not None
        return None if cut is None or self._repetition.audited(row.request.uid, row.request.sample) else cut

    def _shrink(self) -> None:
        """Halves the slots while half of them, on every device, are enough."""
        shards, here = self._programs.shards, len(self._slots) // self._programs.shards
        busy = [[slot for slot in range(first, first + here) if self._slots[slot] is not None]
                for first in range(0, len(self._slots), here)]
        kept = here
        while (half := -(-kept // 2)) >= SMALLEST and half < kept and max(len(slots) for slots in busy) <= half:
            kept = half
        if kept == here or self._state is None:
            return
        chosen = []
        for shard in range(shards):
            idle = [slot for slot in range(shard * here, (shard + 1) * here) if self._slots[slot] is None]
            chosen.append((busy[shard] + idle)[:kept])
        rows = np.array([[slot - shard * here for slot in slots] for shard, slots in enumerate(chosen)], np.int32)
        kept_rows = sharding.to_device(rows.reshape(-1), self._programs.by_rows)
        layers, alone = self._state.cache, dataclasses.replace(self._state, cache=[])
        for index, layer in enumerate(layers):          # one by one, as in growing
            layers[index] = self._programs.shrink(layer, kept_rows)
        self._state = dataclasses.replace(self._programs.narrow(alone, kept_rows), cache=layers)
        self._slots = [self._slots[slot] for slots in chosen for slot in slots]
        self._halted = np.array([self._halted[slot] for slots in chosen for slot in slots])


def cache_positions(positions: int) -> int:
    """As many positions or a few more: a multiple that divides evenly whatever reads or splits the cache."""
    unit = 64 if positions <= 1024 else 512
    return -(-positions // unit) * unit


def _slot_count(most: int, responses: int, shards: int) -> int:
    """`most`, or for fewer responses a power of two, so that they share programs; a multiple of the shards."""
    count = min(most, 1 << max(responses - 1, 0).bit_length())
    return -(-count // shards) * shards


def _response(row: _Running, finish: FinishReason | None, length: int | None = None) -> Response:
    """A response from the pieces that the chunks have left, cut at a length where one is given."""
    def joined(pieces: list[np.ndarray], dtype: Any) -> np.ndarray:
        return (np.concatenate(pieces) if pieces else np.zeros(0, dtype))[:length]

    logprobs = {name: joined(pieces, np.float32) for name, pieces in row.logprobs.items()}
    alike = {name: logprobs.get(name, logprobs["logprobs"]) for name in ("sampling_logprobs", "model_logprobs")}
    return Response(prompt=row.request.prompt, sample=row.request.sample, tokens=joined(row.tokens, np.int32),
                    finish=finish, repeated=row.repeated, **logprobs | alike)


def make_sampler(config: model.DecoderConfig, mesh: Mesh, *, slots: int, chunk: int, positions: int | None = None,
                 smallest: int | None = None, repetition: RepetitionStopping | None = None,
                 cache_layout: str = "auto") -> Sampler:
    """The engine with its compiled functions.

    Args: slots, responses in flight, rounded up to a multiple of the mesh's batch shards; chunk, decode steps between
        two looks at what has finished, at most; positions, that no sequence exceeds: the largest cache; smallest, a
        power of two, the positions of the first one: sizes between the two are compiled when they are first met;
        repetition, where responses that only repeat themselves are to be stopped; cache_layout, one of attention.CACHE_LAYOUTS, or
        auto.
    Raises: UserError where the cache layout does not fit the device or the model."""
    platform, context = mesh.devices.flat[0].platform, mesh.shape["context"]
    if cache_layout == "auto":
        cache_layout = kv_cache.choose_layout(platform, config.head_dim, config.dtype, context)
        if cache_layout in kv_cache.KERNELS:
            with jax.set_mesh(mesh):
                sizes = dict(heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim)
                works = kv_cache.works(cache_layout, rows=sharding.batch_shards(mesh), dtype=config.dtype, **sizes)
                if not all(processes.all_gather("trial of a kernel", lambda: works)):
                    cache_layout = kv_cache.WITHOUT_KERNEL[platform]
    elif reason := kv_cache.unsupported_reason(cache_layout, platform, config.head_dim, config.dtype, context):
        raise UserError(f"rollout.cache_layout {cache_layout} does not fit: {reason}")
    # A quarter of the largest costs little to read, and spares the smaller sizes their compilation.
    first = smallest or min(max(64, 1 << max((positions or 0) // 4, 1).bit_length() - 1), 2048)
    programs = device.make_programs(dataclasses.replace(config, cache_layout=cache_layout), mesh)

    def sample(params: model.Params, requests: Sequence[Request], key: jax.Array, sampling: SamplingParams) -> Generation:
        return Generation(programs, params, requests, key, sampling, slots=slots, chunk=chunk, positions=positions,
                          smallest=first, repetition=repetition)

    return sample


def collect(problems: Sequence[Problem], responses: Sequence[Response], group_size: int) -> Rollouts:
    """Puts finished responses, in any order, into arrays [P, G, ...] padded to the longest.

    Raises: ValueError unless every prompt has each of its samples exactly once."""
    index = sorted((response.prompt, response.sample) for response in responses)
    if index != [(prompt, sample) for prompt in range(len(problems)) for sample in range(group_size)]:
        raise ValueError(f"expected {len(problems)} x {group_size} responses, found {len(index)}")
    shape = (len(problems), group_size)
    longest = max(len(response.tokens) for response in responses)
    tokens, logprobs = np.zeros((*shape, longest), np.int32), np.zeros((*shape, longest), np.float32)
    lengths, repeated, finish = np.zeros(shape, np.int32), np.zeros(shape, bool), np.full(shape, "", "U10")
    for response in responses:
        at, length = (response.prompt, response.sample), len(response.tokens)
        tokens[at][:length], logprobs[at][:length] = response.tokens, response.logprobs
        lengths[at], finish[at], repeated[at] = length, response.finish, response.repeated
    prompt_lengths = np.array([len(problem.prompt) for problem in problems], np.int32)
    prompts = np.zeros((len(problems), prompt_lengths.max()), np.int32)
    for row, problem in enumerate(problems):
        prompts[row, : prompt_lengths[row]] = problem.prompt
    return Rollouts(prompts=prompts, prompt_lengths=prompt_lengths, tokens=tokens, lengths=lengths, logprobs=logprobs,
                    finish=finish, repeated=repeated)
