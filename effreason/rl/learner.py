"""The compiled functions of stages 4 to 6, built once from the configuration."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from effreason.lm import adapters, attention, cudnn, model
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf import peft
from effreason.lm.hf.pretrained import Pretrained, load_weights
from effreason.lm.kernels import unsupported_reason
from effreason.rl import checkpoints, configured_reward, experience, packing, update
from effreason.rl.experience import Batch, Graded, Metrics, Objective, make_experience, measure
from effreason.rl.update import TrainState
from effreason.runtime import processes, sharding
from effreason.runtime.config import Config
from effreason.runtime.config_fields import INT32_MAX
from effreason.runtime.errors import UserError
from effreason.runtime.sharding import Shardings
from effreason.sampling import capacity
from effreason.sampling.draws import SamplingParams
from effreason.sampling.engine import Sampler
from effreason.types import Experience, Packed, Rollouts, Rows

CHEAP_ATTENTION = 0.15  # of the operations of matrix products, for which wider rows are worth it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRollouts:
    """Graded responses on the devices, packed into rows."""

    packed: Packed
    graded: Graded
    packing_efficiency: float       # share of the rows' positions that hold a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The jitted functions of a learner."""

    score: Any                      # see update.make_scorer
    score_reference: Any            # the same, with weights that may be in the hosts' memory
    experience: Any                 # see experience.make_experience
    gradients: Any                  # see update.gradients
    measure: Any                    # see experience.measure
    apply_gradients: Any            # see update.apply_gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a step has learnt from, and its metrics, on the devices."""

    rewards: Float[Array, "P G"]
    advantages: Float[Array, "P G"]
    metrics: Metrics                # of the batch
    updates: list[Metrics]          # of each update


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """The arrays of a step as shapes with shardings, and its functions ready for lowering."""

    state: TrainState
    reference: model.Params
    policy: model.Params                        # what sampler and scorer read
    packed: Packed
    experience: tuple[Experience, ...]
    logprobs: jax.ShapeDtypeStruct              # float32[B, T]
    lower: dict[str, Callable[[], Any]]         # by the name in Programs: () -> jax.stages.Lowered


class Learner:
    """Packs graded responses, scores them, and holds the functions of an update.

    Args:
        mesh: may be abstract (used by `effreason plan`).
        longest_prompt: tokens; None = data.max_prompt_tokens.
        tries_kernels: if cuDNN's attention is tried on the mesh before it is chosen.

    Attributes:
        params_sharding: shardings of the weights of a model, without adapters.
        abstract_state: shapes, dtypes and shardings of the state.
        abstract_reference: the same of the reference.
        needs_reference: the loss or the reward reads log-probs by the reference.
        scores_policy: some log-probs by the policy are computed in a pass of their own.
        replicated: the sharding of what every device holds.
        reward: (correct bool[P, G], scores float32[P, G], lengths int32[P, G], alpha float32[])
            -> float32[P, G], jitted.
        init: the state before the first step, for float32 weights, or adapters, that it takes over.
        as_reference: float32 weights -> what score_reference reads; with adapters these are the
            frozen weights of the policy. A run that starts from adapters has these in addition.

    Raises:
        UserError: the mesh cannot split the model or the batch evenly, or the attention does not
            fit them.
    """

    def __init__(self, config: Config, decoder: DecoderConfig, mesh: Mesh,
                 longest_prompt: int | None = None, *, tries_kernels: bool = True) -> None:
        check_divisible(config, decoder, mesh)
        context, slots = mesh.shape["context"], config.rollout.max_new_tokens
        prompt = longest_prompt or config.data.max_prompt_tokens
        width = packing.row_width(prompt + slots, context)
        device = mesh.devices.flat[0]
        base = dataclasses.replace(decoder, attention=choose_attention(
            config, decoder, width, platform=device.platform, context=context,
            capability=cudnn.capability(device),
            passes=lambda kernel: not tries_kernels or _passes_trial(decoder, mesh, kernel)))
        decoder = dataclasses.replace(base, adapter=make_adapter(config))
        check_room(config, width)

        loss = update.LossConfig(
            clip_ratio=config.update.clip_ratio, clip_ratio_high=config.update.clip_ratio_high,
            dual_clip=config.update.dual_clip, surrogate=config.update.surrogate,
            temperature=config.rollout.temperature,
            kl_loss_coefficient=config.kl.coefficient if config.kl.form == "loss" else 0.0,
            kl_penalty=(config.kl.coefficient if config.kl.form == "reward"
                        and not config.advantage.whiten else 0.0),
            importance_cap=config.update.importance_cap,
            vocabulary_tile=config.update.vocabulary_tile)
        schedule = update.make_schedule(
            config.update, config.run.steps * config.update.updates_per_batch)
        optimizer = update.make_optimizer(config.update, schedule)

        targets = update.state_sharding(decoder, optimizer, mesh,
                                        offload=config.update.offload_optimizer)
        weights = sharding.tree_sharding(mesh, model.logical_axes(base))
        frozen: Shardings = {} if decoder.adapter is None else weights
        reference = weights
        if config.kl.offload_reference:
            reference = sharding.offloaded(reference)
        replicated: Shardings = sharding.sharding(mesh)
        packed: Shardings = update.packed_sharding(mesh)
        responses = config.rollout.prompts_per_step * config.rollout.group_size, slots
        batch: Shardings = Batch(experience=packed.groups, rewards=replicated,
                                 advantages=replicated)
        reward = configured_reward.make_reward(config.reward)
        objective = make_objective(config)

        self.decoder, self._trained = decoder, targets.params
        self.params_sharding, self.replicated = weights, replicated
        self._packed_sharding = packed
        self._token_sharding, self._slots = update.token_sharding(mesh, responses[0]), slots
        self.reward = jax.jit(functools.partial(experience.earned, reward),
                              out_shardings=replicated)
        self.init = update.make_initial_state(optimizer, targets)
        self.as_reference = jax.jit(functools.partial(model.in_compute_dtype, base),
                                    out_shardings=reference)
        self._merge = jax.jit(functools.partial(model.merge_adapters, decoder),
                              out_shardings=weights)
        self.programs = Programs(
            score=update.make_scorer(decoder, mesh, loss, responses=responses,
                                     params=update.complete(decoder, targets.params, frozen)),
            score_reference=update.make_scorer(base, mesh, loss, responses=responses,
                                               params=reference),
            experience=jax.jit(functools.partial(
                make_experience, reward=reward, objective=objective,
                keeps_old=config.update.updates_per_batch > 1,
                keeps_sampled=config.update.importance_cap is not None), out_shardings=batch),
            gradients=update.make_gradients(decoder, mesh, loss, targets, frozen,
                                            responses=responses),
            measure=jax.jit(functools.partial(
                measure, reward=reward, objective=objective,
                min_reward_spread=config.rollout.min_reward_spread), out_shardings=replicated),
            apply_gradients=update.make_apply_gradients(optimizer, schedule, mesh, targets))

        self.abstract_state = checkpoints.abstract(jax.eval_shape(
            self.init, update.trainable(decoder, model.abstract_params(decoder))), targets)
        self.abstract_reference = checkpoints.abstract(
            jax.eval_shape(self.as_reference, model.abstract_params(base)), reference)
        self.needs_reference = config.scores_reference
        width, self._rows = row_layout(config, decoder, prompt, context=context,
                                       shards=sharding.batch_shards(mesh))
        self._updates = config.update.updates_per_batch
        self._first_scored = config.first_scored_update
        self.scores_policy = self._first_scored < self._updates
        self._pack = functools.partial(
            packing.pack, rows=self._rows, updates=self._updates, context=context, width=width,
            slots=slots, sequences_per_row=attention.sequences_per_row(decoder.attention),
            shares_prompts=decoder.attention in attention.SEES_BRANCHES
            and not decoder.needs_neighbours)

    def start(self, weights: model.Params, seed: int, stored: model.Params | None = None, *,
              keeps: bool = True) -> TrainState:
        """Returns the state before the first step.

        Args:
            weights: float32, of the model.
            seed: of the adapters.
            stored: adapters to start from, see `adapters.fit`.
            keeps: the weights stay intact; otherwise the state may take them over.
        """
        if self.decoder.adapter is None:
            return self.init(jax.tree.map(lambda weight: weight.copy(), weights) if keeps
                             else weights)
        return self.init(self.initial_adapters(seed, stored))

    def initial_adapters(self, seed: int, stored: model.Params | None = None) -> model.Params:
        """Returns the adapters before the first step, see `start`."""
        decoder, adapter = self.decoder, self.decoder.adapter
        assert adapter is not None

        def initial(key: Key[Array, ""], stored: model.Params | None) -> model.Params:
            made = update.trainable(decoder, model.init(decoder, key))
            return made if stored is None else adapters.fit(adapter, stored, made)

        on_devices = None if stored is None else sharding.to_device(stored, self.replicated)
        return jax.jit(initial, out_shardings=self._trained)(jax.random.key(seed), on_devices)

    def initial_policy(self, reference: model.Params) -> model.Params:
        """Returns the weights before the first step on the devices, without adapters."""
        return (self.merged(reference) if adapters.split(reference)[1]["layers"]
                else jax.device_put(reference, self.params_sharding))

    @property
    def has_dial(self) -> bool:
        """Whether the policy depends on a setting of its dial."""
        return self.decoder.adapter is not None and self.decoder.adapter.has_dial

    def policy(self, state: TrainState, frozen: model.Params | None,
               setting: float | None = None) -> model.Params:
        """Returns the weights that sampler and scorer read.

        Args:
            frozen: see `as_reference`; read only if there are adapters.
            setting: of the dial, for the sampler; the scorer has one for each sequence.
        """
        policy = update.complete(self.decoder, state.params, frozen or {})
        if setting is None:
            return policy
        on_device = sharding.to_device(np.float32(setting), self.replicated)
        return policy | {adapters.SETTING: on_device}

    def merged(self, policy: model.Params) -> model.Params:
        """Returns the weights of a policy without adapters that compute the same."""
        return policy if self.decoder.adapter is None else self._merge(policy)

    def restored(self, state: TrainState, pretrained: Pretrained,
                 setting: float | None = None) -> model.Params:
        """Returns a checkpoint's weights, without adapters; reads the base model if there are.

        Args:
            setting: of the dial; None if there is none.
        """
        if self.decoder.adapter is None:
            return state.params
        frozen = self.as_reference(load_weights(pretrained, self.params_sharding, merged=False))
        return self.merged(self.policy(state, frozen, setting))

    def pack(self, rollouts: Rollouts, correct: np.ndarray, alpha: float | np.ndarray,
             settings: np.ndarray | None = None,
             scores: np.ndarray | None = None) -> PackedRollouts:
        """Packs responses into rows and puts them on the devices.

        Args:
            correct: bool[P, G].
            alpha: of the reward, or float32[P], one for each group.
            settings: of the dial, float32[P]; None if there is no dial.
            scores: float32[P, G], 1 if correct, less if partly right; None = nothing is in part.
        """
        packed = self._pack(rollouts, settings=settings)
        verdicts, worth, ended, lengths, alphas = sharding.to_device(
            (correct, correct.astype(np.float32) if scores is None else scores, rollouts.ended,
             rollouts.lengths, np.asarray(alpha, np.float32)), self.replicated)
        sampled = sharding.to_device(packing.flatten(rollouts.logprobs, self._slots),
                                     self._token_sharding)
        return PackedRollouts(
            packed=sharding.to_device(packed, self._packed_sharding),
            graded=Graded(correct=verdicts, scores=worth, ended=ended, lengths=lengths,
                          alpha=alphas, sampled=sampled),
            packing_efficiency=packing.packing_efficiency(packed))

    def score(self, policy: model.Params, rollouts: PackedRollouts,
              first: int = 0) -> Float[Array, "B T"]:
        """Computes the log-probs of the response tokens by the policy; 0 for padding.

        Args:
            first: the responses of updates before this one are left out; 0.
        """
        return self.programs.score(policy, rollouts.packed,
                                   sharding.to_device(np.int32(first), self.replicated))

    def is_finite(self, policy: model.Params, rollouts: PackedRollouts) -> bool:
        """Whether the policy's log-probs of the first micro-batch are finite numbers."""
        counts = tuple(jnp.minimum(count, 1) for count in rollouts.packed.counts)
        first = dataclasses.replace(
            rollouts, packed=dataclasses.replace(rollouts.packed, counts=counts))
        return bool(sharding.to_host(jnp.isfinite(self.score(policy, first)).all()))

    def score_reference(self, reference: model.Params | None,
                        rollouts: PackedRollouts) -> Float[Array, "B T"] | None:
        """Computes those by the reference; None if neither loss nor reward reads them."""
        if not self.needs_reference or reference is None:
            return None
        first = sharding.to_device(np.int32(0), self.replicated)
        if adapters.split(reference)[1]["layers"]:
            return self.programs.score(reference, rollouts.packed, first)
        return self.programs.score_reference(reference, rollouts.packed, first)

    def measure(self, rollouts: PackedRollouts, old: Float[Array, "B T"],
                reference: Float[Array, "B T"] | None) -> Metrics:
        """Measures responses; see docs/metrics.md.

        Args:
            old: log-probs by the policy.
            reference: log-probs by the reference; None = nothing reads them.
        """
        return self.programs.measure(rollouts.graded, old, reference)

    def update(self, state: TrainState, reference: model.Params | None, rollouts: PackedRollouts, *,
               check: Callable[[Metrics], None] = lambda metrics: None,
               ) -> tuple[TrainState, Learnt]:
        """Makes the step's optimizer updates, one after another; donates the state passed in.

        Args:
            reference: see `as_reference`; None if nothing reads it.
            check: is given the metrics of the batch before any weight changes, and raises what
                keeps them from changing.

        Returns:
            The state, its `step` one higher, and what was learnt.
        """
        packed, old = rollouts.packed, None
        frozen = adapters.split(reference)[0] if reference and self.decoder.adapter else {}
        fixed = self.score_reference(reference, rollouts)
        if self.scores_policy:
            old = self.score(self.policy(state, reference), rollouts, self._first_scored)
        batch = self.programs.experience(rollouts.graded, old, fixed, packed)

        metrics, updates = {}, []
        for number in range(self._updates):
            is_last = number + 1 == self._updates
            index, steps = sharding.to_device((np.int32(number), np.int32(is_last)),
                                              self.replicated)
            grads, update_metrics, found = self.programs.gradients(
                state.params, frozen, batch.experience, packed.counts, old, index)
            if number == 0:
                metrics = self.measure(rollouts, found, fixed)
                check(metrics)
            state, of_optimizer = self.programs.apply_gradients(state, grads, steps)
            updates.append(update_metrics | of_optimizer)
        return state, Learnt(rewards=batch.rewards, advantages=batch.advantages, metrics=metrics,
                             updates=updates)

    def lowered(self, config: Config, *, width: int, micro_batches: int) -> AbstractStep:
        """Prepares the lowering of a step's functions for rows of the widest group.

        Args:
            width: N.
            micro_batches: M, that there is room for.
        """
        def array(dtype: Any, *shape: int) -> Any:
            place = self._packed_sharding.groups if len(shape) == 4 else self.replicated
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        prompts, group_size = config.rollout.prompts_per_step, config.rollout.group_size
        of_tokens = prompts * group_size, config.rollout.max_new_tokens
        of_rows = self._updates, micro_batches, self._rows, width
        integers, floats = array(jnp.int32, *of_rows), array(jnp.float32, *of_rows)
        logprobs: Any = jax.ShapeDtypeStruct(of_tokens, jnp.float32,
                                             sharding=self._token_sharding)
        one = array(jnp.int32)

        rows = Rows(**{field.name: integers for field in dataclasses.fields(Rows)}
                    | {"settings": floats if self.has_dial else None})
        packed = Packed(groups=(rows,), counts=(array(jnp.int32, self._updates),))
        keeps_sampled = config.update.importance_cap is not None
        learnt = Experience(rows=rows, weights=floats, advantages=floats,
                            old_logprobs=floats if self._updates > 1 else None,
                            sampled_logprobs=floats if keeps_sampled else None,
                            reference_logprobs=floats if self.needs_reference else None)
        verdicts = array(jnp.bool_, prompts, group_size)
        graded = Graded(correct=verdicts, ended=verdicts,
                        scores=array(jnp.float32, prompts, group_size), alpha=array(jnp.float32),
                        lengths=array(jnp.int32, prompts, group_size), sampled=logprobs)
        old = logprobs if self.scores_policy else None
        fixed = logprobs if self.needs_reference else None
        state, reference, programs = self.abstract_state, self.abstract_reference, self.programs
        frozen: Any = {} if self.decoder.adapter is None else reference
        policy = update.complete(self.decoder, state.params, frozen)
        return AbstractStep(
            state=state, reference=reference, policy=policy, packed=packed, experience=(learnt,),
            logprobs=logprobs,
            lower={"score": lambda: programs.score.lower(policy, packed, one),
                   "score_reference": lambda: programs.score_reference.lower(
                       reference, packed, one),
                   "experience": lambda: programs.experience.lower(graded, old, fixed, packed),
                   "gradients": lambda: programs.gradients.lower(
                       state.params, frozen, (learnt,), packed.counts, old, one),
                   "apply_gradients": lambda: programs.apply_gradients.lower(
                       state, state.params, one)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The sampler of a run and its learner."""

    sampler: Sampler
    sampling: SamplingParams        # the distribution of the rollouts
    learner: Learner


def make_engine(config: Config, pretrained: Pretrained, mesh: Mesh,
                longest_prompt: int | None = None) -> Engine:
    """Builds everything a training step needs; nothing but a kernel's trial is compiled yet.

    Raises:
        UserError: see Learner.
    """
    settings = config.rollout
    return Engine(
        sampler=capacity.make_configured_sampler(
            config, dataclasses.replace(pretrained.decoder, adapter=make_adapter(config)), mesh,
            capacity.training_weight_bytes(config)),
        sampling=SamplingParams(
            temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
            min_p=settings.min_p, eos_ids=pretrained.eos_ids),
        learner=Learner(config, pretrained.decoder, mesh, longest_prompt))


def make_adapter(config: Config) -> adapters.Adapter | None:
    """Returns the adapters that the configuration asks for, None if all weights are trained."""
    settings = config.adapter
    return adapters.make_adapter(settings.rank, settings.scale, settings.targets,
                                 rank_stabilized=settings.rank_stabilized,
                                 has_dial=config.reward.alphas is not None)


def check_adapters(config: Config, pretrained: Pretrained) -> None:
    """Raises UserError unless the adapters to be trained can hold those of the model, and be
    written."""
    stored, adapter = pretrained.adapters, make_adapter(config)
    if adapter is not None and pretrained.decoder.experts and "gate" in adapter.targets:
        raise UserError("adapter.targets must be attention for a mixture of experts, got "
                        f"{config.adapter.targets}")
    if config.export.adapter:
        peft.check_modules(pretrained.decoder, "export.adapter must be false")
    if stored is None or adapter is None:
        return
    if stored.rank > adapter.rank:
        raise UserError(f"adapter.rank must be at least {stored.rank}, that of the adapters in "
                        f"{stored.directory}, or 0 to merge them and train all weights, got "
                        f"{adapter.rank}")
    if others := [name for name in stored.targets if name not in adapter.targets]:
        raise UserError(f"adapter.targets must include {', '.join(others)}, which the adapters in "
                        f"{stored.directory} are for, or adapter.rank be 0 to merge them, got "
                        f"{config.adapter.targets}")


def make_objective(config: Config) -> Objective:
    """Returns the objective that update.objective names, with its numbers."""
    settings = config.update
    match settings.objective:
        case "sft_shortest":
            return functools.partial(experience.imitation, aggregation=settings.aggregation)
        case "dpo":
            return functools.partial(experience.preference, beta=settings.dpo_beta)
        case _:
            return functools.partial(
                experience.policy_gradient, aggregation=settings.aggregation,
                updates=settings.updates_per_batch, advantage=config.advantage,
                masks_truncated=settings.truncated == "mask", kl_form=config.kl.form,
                kl_coefficient=config.kl.coefficient)


def choose_attention(config: Config, decoder: DecoderConfig, width: int, *, platform: str,
                     context: int, capability: tuple[int, int] | None = None,
                     passes: Callable[[str], bool] = lambda kernel: True) -> str:
    """Returns the attention of the training passes: model.attention, or the best one that fits.

    Args:
        width: positions of a row.
        platform: of a device.
        context: shards of a row.
        capability: compute capability of a GPU.
        passes: whether a kernel that fits has passed its trial; the configured one has none.

    Raises:
        UserError: the configured one does not fit.
    """
    chosen = config.model.attention
    facts: Any = dict(head_dim=decoder.head_dim, dtype=decoder.dtype, length=width, context=context,
                      capability=capability)
    if chosen == "auto":
        return attention.choose_attention(platform, **facts, passes=passes)

    if reason := unsupported_reason(chosen, platform, **facts):
        raise UserError(f"model.attention {chosen} does not fit: {reason}")
    return chosen


def row_layout(config: Config, decoder: DecoderConfig, prompt: int, *, context: int,
               shards: int) -> tuple[int, int]:
    """Returns positions of a row and rows of a micro-batch.

    Rows in which responses share a prompt are wider and fewer, as long as attention costs little.

    Args:
        decoder: with the attention that was chosen.
        prompt: tokens of the longest one.
        shards: of the rows.
    """
    slots, rows = config.rollout.max_new_tokens, config.update.rows_per_micro_batch
    if decoder.attention != "xla" or decoder.needs_neighbours:
        return packing.row_width(prompt + slots, context), rows
    heads = decoder.heads * decoder.head_dim
    layer = decoder.width * (2 * heads + 2 * decoder.kv_heads * decoder.head_dim
                             + 3 * decoder.active_mlp_width)
    # A pair of positions costs 4 operations for each entry of a head, half of the pairs are causal;
    # a position costs 2 for each weight.
    cheap = int(CHEAP_ATTENTION * layer / heads)
    return packing.shared_width(prompt, slots, rows, most=min(attention.XLA_LENGTH, cheap),
                                shards=shards, context=context)


def _passes_trial(decoder: DecoderConfig, mesh: Mesh, kernel: str) -> bool:
    """Returns whether the attention kernel works on the devices of all processes."""
    if not kernel.startswith("cudnn"):
        return True
    with jax.set_mesh(mesh):
        passes = attention.passes_trial(
            kernel, rows=sharding.batch_shards(mesh), heads=decoder.heads,
            kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, dtype=decoder.dtype,
            window=decoder.window)
    return all(processes.all_gather("trial of a kernel", lambda: passes))


def check_divisible(config: Config, decoder: DecoderConfig, mesh: Mesh) -> None:
    """Raises UserError for a batch or an array axis that a mesh axis does not divide."""
    rows, shards = config.update.rows_per_micro_batch, sharding.batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"mesh.data x mesh.fsdp must divide update.rows_per_micro_batch, {rows}, got {shards}")
    check_mesh(decoder, mesh)


def check_room(config: Config, width: int) -> None:
    """Raises UserError if a step has more positions than an int32 can number. Args: width, of a
    row, narrower rows together are no wider."""
    rollout, update = config.rollout, config.update
    positions = 2 * width * math.prod(packing.room(
        rollout.prompts_per_step * rollout.group_size, rows=update.rows_per_micro_batch,
        updates=update.updates_per_batch))
    if positions > INT32_MAX:
        raise UserError(
            f"rollout.prompts_per_step * rollout.group_size ({rollout.prompts_per_step} * "
            f"{rollout.group_size}) rows of {width:,} positions and as many narrower ones must "
            f"have at most {INT32_MAX} positions together, got {positions}")


def check_mesh(decoder: DecoderConfig, mesh: Mesh) -> None:
    """Raises UserError for an axis of the weights that a mesh axis does not divide."""
    split = [("attention heads", decoder.heads, "tensor"),
             ("key/value heads", decoder.kv_heads, "tensor"),
             *([] if decoder.delta is None
               else [("key heads of a state", decoder.delta.key_heads, "tensor")]),
             (("experts", decoder.experts, "tensor") if decoder.experts
              else ("feed-forward width", decoder.mlp_width, "tensor")),
             ("vocabulary", decoder.vocabulary, "tensor"), ("width", decoder.width, "fsdp")]
    for name, size, axis in split:
        if size % mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis} must divide the model's {name}, {size}, got {mesh.shape[axis]}")


def check_model(pretrained: Pretrained, config: Config, mesh: Mesh) -> None:
    """Raises UserError if the model does not fit the mesh, or responses do not fit the model."""
    check_mesh(pretrained.decoder, mesh)
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    if config.data.max_prompt_tokens + longest > pretrained.max_positions:
        raise UserError(
            "data.max_prompt_tokens + rollout.max_new_tokens (or evaluation.max_new_tokens) must "
            f"be at most the model's {pretrained.max_positions} positions, got "
            f"{config.data.max_prompt_tokens} + {longest}")
