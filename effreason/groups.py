"""Stages 1 to 3 of a step: problems, groups of responses, verdicts; groups that teach nothing replaced where asked."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effreason.data import prompts
from effreason.evaluation import responses
from effreason.lm import model
from effreason.rl import rollouts as attempts
from effreason.runs import unfinished
from effreason.runs.session import Session
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.sampling import engine as rollouts
from effreason.types import FinishReason, Problem


@dataclasses.dataclass(kw_only=True)
class RunState:
    """What a run knows at a step beside its weights and moments; saved with them."""

    alpha: float
    last_alpha_step: int                     # the last step whose evaluation has moved alpha
    lengths: dict[int, float]       # mean tokens by uid when a problem was sampled last
    seconds: float                  # that the processes before this one took


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """A step's problems and their graded responses."""

    batch: list[Problem]
    tried: attempts.GradedRollouts
    metrics: dict[str, float]       # of refilling, where there was any


def draw(session: Session, config: Config, policy: model.Params, index: int, course: RunState, watch: attempts.OnChunk,
         path: Path) -> Groups:
    """The groups of a step.

    Args: path, of the file for responses of a step that is stopped. Those of a round that refills are not kept: the
        first round, which decides what is missing, is drawn again then, token for token."""
    settings, engine = config.rollout, session.engine
    key = rollouts.step_key(config.run.seed, "train", index)
    attempt = functools.partial(
        attempts.attempt, lambda requests: engine.sampler(policy, requests, key, engine.sampling),
        group_size=settings.group_size, max_new_tokens=settings.max_new_tokens,
        tokenizer=session.inputs.pretrained.tokenizer, grader=session.grader, require_eos=config.grade.require_eos,
        watch=watch, expected=course.lengths)
    batch = prompts.batch(session.inputs.problems, settings.prompts_per_step, config.run.seed, index)
    with jax.transfer_guard("disallow"):
        tried = attempt(batch, drawn=unfinished.load(path, index), keep=functools.partial(unfinished.save, path, index))
        drawn = Groups(batch=batch, tried=tried, metrics={})
        return refill(session, config, drawn, index, course.alpha, attempt) if settings.refill_rounds else drawn


def refill(session: Session, config: Config, drawn: Groups, index: int, alpha: float,
           attempt: Callable[[list[Problem]], attempts.GradedRollouts]) -> Groups:
    """Puts groups of other problems in the place of those without a signal, in so many rounds at most.

    What counts is the spread of the shaped reward: groups that are all correct teach brevity and stay."""
    settings, batch, tried = config.rollout, list(drawn.batch), drawn.tried
    taken, lacking = list(batch), ~has_signal(session, tried, alpha, settings.min_reward_spread)
    for turn in range(settings.refill_rounds):
        places = np.flatnonzero(lacking).tolist()
        others = prompts.others(session.inputs.problems, [batch[place] for place in places], taken,
                                (config.run.seed, index, turn, len(batch)))
        fresh = {place: problem for place, problem in zip(places, others, strict=True) if problem is not None}
        if not fresh:
            break
        taken += fresh.values()
        more = attempt(list(fresh.values()))
        good = np.flatnonzero(has_signal(session, more, alpha, settings.min_reward_spread)).tolist()
        filled = [list(fresh)[row] for row in good]
        tried = attempts.replaced(tried, filled, more, good)
        for place in filled:
            batch[place], lacking[place] = fresh[place], False
    return Groups(batch=batch, tried=tried, metrics={"rollout/asked": len(taken) / len(batch),
                                                     "rollout/lacking": float(lacking.mean())})


def has_signal(session: Session, tried: attempts.GradedRollouts, alpha: float, min_spread: float) -> np.ndarray:
    """Which groups can teach something: bool[P]."""
    learning = session.engine.learning
    given = sharding.to_device((tried.correct, tried.rollouts.lengths, np.float32(alpha)), learning.replicated)
    reward = sharding.to_host(learning.reward(*given))
    spread: np.ndarray = reward.max(axis=-1) - reward.min(axis=-1) > min_spread
    return spread


def engine_metrics(tried: attempts.GradedRollouts, seconds: float) -> dict[str, float]:
    """How well the sampler was used, and which responses repeated themselves."""
    sampled = tried.rollouts

    def total(name: str) -> float:
        return float(sum(getattr(generation, name) for generation in tried.generations))

    metrics = {"rollout/tokens_per_second": total("tokens") / seconds,
               "engine/occupancy": total("tokens") / max(total("slot_steps"), 1),
               "engine/host_share": total("host_seconds") / seconds,
               "engine/compilations": total("compilations")}
    if sampled.repeated.any():
        audited = sampled.repeated & (sampled.finish != FinishReason.REPETITION)
        metrics |= {"rollout/repeated": float(sampled.repeated.mean()),
                    "rollout/repetition_stopped": float((sampled.finish == FinishReason.REPETITION).mean())}
        if audited.any():
            metrics["rollout/repetition_recovered"] = float(sampled.ended[audited].mean())
    return metrics


def describe(groups: Groups, reward: np.ndarray, advantage: np.ndarray, wanted: int) -> list[dict[str, Any]]:
    """So many of the groups for people to read, from places spread over the batch.

    Args: reward, advantage float32[P, G]."""
    found, wanted = [], min(wanted, len(groups.batch))
    for place in [group * len(groups.batch) // wanted for group in range(wanted)]:
        for sample in range(reward.shape[1]):
            graded = responses.graded_response(groups.batch, groups.tried, place, sample)
            found.append(dataclasses.asdict(graded) | {
                "reward": float(reward[place, sample]), "advantage": float(advantage[place, sample])})
    return found
