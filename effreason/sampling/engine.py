"""Stage 2: the sampling engine. Prompts in, responses out, each yielded once it is finished.

S slots hold one response each. A compiled chunk of decode steps advances all of them; it ends early
when enough rows have finished for waiting ones to take their place. A prompt is prefilled once,
several at a time, and its keys and values are copied into the slots of its group. The cache grows
by buckets with the longest sequence in it. If the memory is too small for all slots at that length,
there are fewer of them, and the responses that need more wait for those that do not. When nothing
waits any more, the slots are halved as their rows end; the last ones may draft tokens ahead, see
speculation.py. scheduler.py decides all this on the host, slots.py does it on the device.

The key of every sampled token is fold_in(step key, prompt uid, sample, position): a response does
not depend on its slot, its neighbours or the number of devices, except for rounding of float sums.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from effreason.lm import kv_cache, model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.kernels import KERNELS
from effreason.runtime import processes, sharding
from effreason.runtime.errors import UserError
from effreason.sampling import speculation
from effreason.sampling.draws import SamplingParams
from effreason.sampling.repetition import RepetitionStopping
from effreason.sampling.scheduler import CacheLimits, Request, Schedule, check_requests
from effreason.sampling.slots import Programs, Slots, make_programs
from effreason.types import Problem, Response, Rollouts

STREAMS = {"train": 0, "evaluation": 1, "parity": 2}


def step_key(seed: int, stream: str, step: int) -> Key[Array, ""]:
    """Returns the key for all responses of a step. Streams never share a key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[stream]), step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The compiled functions of the engine and its settings; see `make_sampler`."""

    programs: Programs
    limits: CacheLimits
    max_positions: int | None
    repetition: RepetitionStopping | None

    def __call__(self, params: model.Params, requests: Sequence[Request], key: Key[Array, ""],
                 sampling: SamplingParams) -> "Generation":
        """Starts generating. Raises ValueError for a request that cannot be served."""
        return Generation(self, params, requests, key, sampling)


def make_sampler(config: DecoderConfig, mesh: Mesh, *, slots: int, chunk: int,
                 max_positions: int | None = None, min_positions: int | None = None,
                 budget: int | None = None, repetition: RepetitionStopping | None = None,
                 draft_tokens: int = 0, cache_layout: str = "auto") -> Sampler:
    """Builds the engine; but for the trial of a kernel nothing is compiled before its first call.

    Args:
        slots: responses in progress, rounded up to a multiple of the mesh's batch shards.
        chunk: decode steps between two looks at what has finished, at most.
        max_positions: of any sequence, and so of a slot.
        min_positions: of the first cache, a power of two; sizes in between compile when first met.
        budget: positions of all slots together: with longer responses there are fewer slots, and
            some responses have to wait. None = enough for all slots.
        repetition: if responses that repeat themselves are to be stopped.
        draft_tokens: read ahead in each slot when few are in use, at most; 0 = none.
        cache_layout: one of kv_cache.CACHE_LAYOUTS, or auto.

    Raises:
        UserError: if the cache layout does not fit the device or the model."""
    platform, context = mesh.devices.flat[0].platform, mesh.shape["context"]
    layout = kv_cache.resolve_layout(cache_layout, platform, config.head_dim, config.dtype, context)
    if cache_layout == "auto" and layout in KERNELS:
        with jax.set_mesh(mesh):
            passes = kv_cache.passes_trial(
                layout, rows=sharding.batch_shards(mesh), dtype=config.dtype, heads=config.heads,
                kv_heads=config.kv_heads, head_dim=config.head_dim)
            if not all(processes.all_gather("trial of a kernel", lambda: passes)):
                layout = kv_cache.XLA_LAYOUTS[platform]

    programs = make_programs(dataclasses.replace(config, cache_layout=layout), mesh)
    if config.delta is not None and draft_tokens:
        raise UserError("rollout.draft_tokens must be 0 for a model whose layers keep a state, "
                        f"which cannot take back a token, got {draft_tokens}")
    if config.window is not None and draft_tokens >= kv_cache.MOST_READ:
        raise UserError(f"rollout.draft_tokens must be below {kv_cache.MOST_READ} for a model with "
                        f"sliding windows, got {draft_tokens}")
    limits = CacheLimits(
        slots=slots, shards=programs.shards, chunk=chunk, budget=budget,
        positions_held=functools.partial(model.positions_held, config, context=context),
        draft_tokens=draft_tokens, most_positions=speculation.MOST_POSITIONS[platform],
        smallest=smallest_capacity(max_positions) if min_positions is None else min_positions,
        largest=None if max_positions is None else cache_positions(max_positions))
    return Sampler(programs=programs, limits=limits, max_positions=max_positions,
                   repetition=repetition)


class Generation:
    """Responses in progress: an iterator that yields, after each chunk, those that have finished.

    It yields an empty list if none has, so that its consumer can show progress, overlap other work,
    or stop. The next chunk is already running while the consumer works.

    Attributes:
        tokens, finished: tokens drawn and responses finished so far.
        slots, running, waiting: numbers of slots, and of responses in them and before them.
        capacity: cache positions of each slot.
        steps, slot_steps: decode steps so far, and these times the slots, and times the positions
            that each slot reads if tokens are drafted.
        host_seconds: from the end of a chunk to the start of the next, summed.
        compilations: programs compiled for it; 0 once all shapes have been met."""

    def __init__(self, sampler: Sampler, params: model.Params, requests: Sequence[Request],
                 key: Key[Array, ""], sampling: SamplingParams) -> None:
        check_requests(requests, sampler.max_positions)
        self._sampler, self._programs = sampler, sampler.programs
        self._key, self._sampling = key, sampling
        self._compiled_before = self._programs.compilations()

        self._schedule = Schedule(requests, sampling, sampler.limits, sampler.repetition)

        self._state: Slots | None = None
        self._outputs: dict[str, jax.Array] | None = None       # of the running chunk
        self.capacity = self.tokens = self.finished = self.steps = self.slot_steps = 0
        self.host_seconds = 0.0
        with jax.set_mesh(self._programs.mesh):
            self._weights = self._programs.unstack(params) if requests else None
            self._launch()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Response]:
        if self._outputs is None:
            raise StopIteration
        outputs = sharding.to_host(self._outputs)
        chunk_end = time.perf_counter()

        self.steps += int(outputs["steps"])
        self.slot_steps += int(outputs["steps"]) * self.slots * (self._schedule.drafted + 1)
        self.tokens += int(outputs["count"].sum())
        finished = self._schedule.harvest(outputs)
        self.finished += len(finished)
        with jax.set_mesh(self._programs.mesh):     # kernels ask for it; the consumer keeps its own
            self._launch()

        self.host_seconds += time.perf_counter() - chunk_end
        return finished

    @property
    def slots(self) -> int:
        return self._schedule.slots

    @property
    def running(self) -> int:
        return len(self._schedule.running)

    @property
    def waiting(self) -> int:
        return self._schedule.waiting

    @property
    def compilations(self) -> int:
        return self._programs.compilations() - self._compiled_before

    def unfinished(self) -> list[Response]:
        """Returns the responses that have started, with finish None, as prefixes to continue."""
        return self._schedule.unfinished()

    def _launch(self) -> None:
        """Fills free slots, makes room, and starts the next chunk if anything is left to do."""
        programs, schedule = self._programs, self._schedule
        started = schedule.fill()
        if not schedule.running:
            self._outputs = self._state = self._weights = None
            return

        self._make_room(schedule.compact())
        for batch, responses in started:
            if batch.cache is None:
                prompts = sharding.to_device(batch.prompts(), programs.replicated)
                batch.cache = programs.prefill(self._weights, *prompts)
            table = schedule.insert_table(batch, responses)
            table = sharding.to_device(table, programs.replicated)
            self._state = programs.insert(self._state, batch.cache, table, self._key)
            if not batch.waiting:           # freed at once: there may be many long prefixes
                batch.cache = None
        schedule.prefills.drop_started()

        control = sharding.to_device(schedule.control(), programs.replicated)
        settings: dict[str, Any] = dict(sampling=self._sampling, chunk=self._sampler.limits.chunk)
        schedule.choose_draft_length()
        if schedule.drafted:
            texts = sharding.to_device(schedule.texts(), programs.by_rows)
            self._state, self._outputs = programs.speculate(
                self._weights, self._state, control, texts, drafted=schedule.drafted, **settings)
        else:
            self._state, self._outputs = programs.decode(
                self._weights, self._state, control, **settings)

    def _make_room(self, rows: Int[np.ndarray, " kept"] | None) -> None:
        """Creates the cache, or gives it the rows and the capacity that the schedule has chosen."""
        programs, state, capacity = self._programs, self._state, self._schedule.capacity
        if state is None:
            self._state = programs.empty(count=self.slots, capacity=capacity)
        else:
            # Layer by layer, so that the old and the new cache never exist at the same time.
            kept = None if rows is None else sharding.to_device(rows, programs.by_rows)
            lengths, larger = map(programs.cache_lengths, (self.capacity, capacity))
            for index, (length, new_length) in enumerate(zip(lengths, larger, strict=True)):
                if kept is not None:
                    state.cache[index] = programs.compact_cache[index](state.cache[index], kept)
                if new_length > length:
                    state.cache[index] = programs.grow(state.cache[index], positions=new_length)
            if kept is not None:
                without_cache = programs.compact(dataclasses.replace(state, cache=[]), kept)
                self._state = dataclasses.replace(without_cache, cache=state.cache)
        self.capacity = capacity


def smallest_capacity(max_positions: int | None) -> int:
    """Returns the positions of a slot in the first cache, given those of the longest sequence."""
    # A quarter of the largest costs little to read, and avoids compiling the smaller sizes.
    quarter = 1 << max((max_positions or 0) // 4, 1).bit_length() - 1
    return min(max(64, quarter), 2048)


class Generations:
    """Generations one after another, as one: each starts when the one before it is over.

    Attributes:
        tokens, finished, steps, slot_steps, host_seconds, compilations: summed, see Generation."""

    def __init__(self, starts: Sequence[Callable[[], Generation]], requests: int) -> None:
        self._starts, self._requests = iter(starts), requests
        self._started: list[Generation] = []

    def __iter__(self) -> Iterator[list[Response]]:
        for start in self._starts:
            self._started.append(start())
            yield from self._started[-1]

    def __getattr__(self, name: str) -> Any:
        if name not in ("tokens", "finished", "steps", "slot_steps", "host_seconds",
                        "compilations"):
            raise AttributeError(name)
        return sum(getattr(generation, name) for generation in self._started)

    @property
    def running(self) -> int:
        return sum(generation.running for generation in self._started)

    @property
    def waiting(self) -> int:
        return self._requests - self.finished - self.running

    def unfinished(self) -> list[Response]:
        """Returns the responses that have started, with finish None, as prefixes to continue."""
        return [response for generation in self._started for response in generation.unfinished()]


def cache_positions(positions: int) -> int:
    """Rounds up to a multiple that divides evenly for whatever reads or splits the cache."""
    unit = 64 if positions <= 1024 else 512
    return -(-positions // unit) * unit


def collect(problems: Sequence[Problem], responses: Sequence[Response],
            group_size: int) -> Rollouts:
    """Puts finished responses, in any order, into arrays [P, G, ...] padded to the longest.

    Raises ValueError unless every prompt has each of its samples exactly once."""
    shape = len(problems), group_size
    indices = sorted((response.prompt, response.sample) for response in responses)
    if indices != list(np.ndindex(*shape)):
        raise ValueError(f"expected {shape[0]} x {shape[1]} responses, found {len(indices)}")

    longest = max(len(response.tokens) for response in responses)
    tokens = np.zeros((*shape, longest), np.int32)
    logprobs = np.zeros((*shape, longest), np.float32)
    lengths, repeated = np.zeros(shape, np.int32), np.zeros(shape, bool)
    finish = np.full(shape, "", "U10")
    for response in responses:
        at, length = (response.prompt, response.sample), len(response.tokens)
        tokens[at][:length], logprobs[at][:length] = response.tokens, response.logprobs
        lengths[at], finish[at], repeated[at] = length, response.finish, response.repeated

    prompt_lengths = np.array([len(problem.prompt) for problem in problems], np.int32)
    prompts = np.zeros((len(problems), prompt_lengths.max()), np.int32)
    for row, problem in enumerate(problems):
        prompts[row, : prompt_lengths[row]] = problem.prompt
    return Rollouts(prompts=prompts, prompt_lengths=prompt_lengths, tokens=tokens, lengths=lengths,
                    logprobs=logprobs, finish=finish, repeated=repeated)
