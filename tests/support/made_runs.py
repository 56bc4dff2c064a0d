"""Directories of runs and families as training leaves them, filled with seeded random numbers."""

import dataclasses
import json

import numpy as np

from effreason.evaluation import responses
from effreason.evaluation.responses import EvaluatedResponse
from effreason.runs import directory as runs
from effreason.runs import results
from effreason.runs.results import PointKind, Results, measure
from effreason.runtime import config as configuration
from effreason.runtime.config import Config
from effreason.types import FinishReason

LEVELS = {"easy": (2, 88.0), "medium": (4, 92.0), "hard": (7, 104.0)}   # operations, base's tokens
NEEDED = {"easy": 20, "medium": 32, "hard": 50}                         # tokens that the steps take
ENVIRONMENT = {"effreason": "0.1.0", "git_commit": "a" * 40,
               "grader": "effreason 0.1.0, sympy 1.14",
               "python": "3.11.9", "jax": "0.10.2", "device": "cpu", "device_count": 1}
PROVENANCE = {"origin": {}, "sampling": {}, "environment": ENVIRONMENT}


def graded_responses(name, *, seed=0, alpha=0.0, progress=0.0, problems=60, samples=1,
                     response=None):
    """Responses of a model: `progress` of a training with `alpha` shortens what is not needed."""
    digits_rng = np.random.default_rng([7, *map(ord, name)])
    model = round(1000 * alpha) if progress else 0      # before training all are the base
    rng = np.random.default_rng([8, seed, model, round(100 * progress), *map(ord, name)])
    longer = 1.6 if "long" in name else 1.0
    kept = 1.0 - progress * (0.15 + 0.75 * alpha / (alpha + 0.08))
    rows = []

    for uid in range(problems):
        level = list(LEVELS)[uid % 3]
        operations, base = LEVELS[level]
        digits = digits_rng.integers(1, 10, operations + 1)
        for sample in range(samples):
            luck, right = rng.gamma(4.0, 0.25), rng.random()
            mean = NEEDED[level] + (base - NEEDED[level]) * kept * luck
            tokens = int(longer * mean) + int(rng.integers(0, 3))
            correct = bool(right < 0.93 + 0.04 * progress - 0.05 * alpha - 0.2 * (longer - 1))
            answer = str(digits.sum() % 10 if correct else (digits.sum() + 1) % 10)
            thinking = "".join(
                f"{digits[i % operations]}+{digits[i % operations + 1]}={i % 10};"
                for i in range(max(tokens // 6, 1)))
            rows.append(EvaluatedResponse(
                set=name, uid=uid * 17 + 5, sample=sample, level=level,
                problem=f"({'+'.join(map(str, digits))})%10",
                reference_answer=str(digits.sum() % 10),
                response=response or f"{thinking}</think>\\boxed{{{answer}}}", answer=answer,
                status="exact", correct=correct, tokens=tokens, finish=FinishReason.EOS,
                first_answer_token=tokens - 8.0 if correct else None))
    return rows


def metrics_rows(steps, alpha, *, seed=0, evaluated=()):
    rng = np.random.default_rng([3, seed])
    course = 1 - np.exp(-3.0 * np.arange(steps) / max(steps - 1, 1))
    rows = []
    for step in range(steps):
        noise = rng.normal(size=6)
        length = alpha / (alpha + 0.05) * (0.5 + 0.3 * course[step])
        row = {
            "step": step, "reward/alpha": alpha, "reward/mean": 0.85, "reward/kl": 0.002 * step,
            "reward/groups_with_signal": 0.99, "update/grad_norm": 0.02, "update/kl": 0.001 * step,
            "update/entropy": 0.09 - 0.04 * course[step] + 0.003 * noise[0],
            "rollout/accuracy": min(0.92 + 0.05 * course[step] + 0.015 * noise[1], 1.0),
            "rollout/tokens": 92 - 55 * alpha / (alpha + 0.08) * course[step] + 3 * noise[2],
            "rollout/truncated": max(0.01 * noise[3], 0.0), "time/step": 6.0,
            "update_share/accuracy": (1 - length) * 0.9, "update_share/length": length * 0.9,
            "update_share/kl": 0.04, "update_share/normalisation": 0.06,
            "length_pull/accuracy": 0.6 * (1 - course[step]) + 0.05 * noise[4],
            "length_pull/length": -3.0 * length + 0.2 * noise[5], "length_pull/kl": -0.02,
            "length_pull/normalisation": 0.01}
        if step in evaluated:
            row |= {"evaluation/accuracy": row["rollout/accuracy"],
                    "evaluation/tokens": row["rollout/tokens"]}
        rows.append(row)
    return rows


def rollout_rows(steps, alpha, *, groups=1, group_size=8, seed=0, response=None):
    rows = []
    for step in range(steps):
        rollouts = graded_responses(
            "train", seed=1000 * seed + step, alpha=alpha, progress=step / max(steps - 1, 1),
            problems=groups, samples=group_size, response=response)
        lengths = np.array([row.tokens for row in rollouts], float)
        excess = (lengths - lengths.mean()) / (lengths.std() + 1e-7)
        rewards = np.array([row.correct for row in rollouts]) * (1 - alpha / (1 + np.exp(-excess)))

        for row, reward in zip(rollouts, rewards, strict=True):
            fields = {name: value for name, value in vars(row).items()
                      if name not in ("set", "first_answer_token")}
            advantage = float((reward - rewards.mean()) * group_size / (group_size - 1))
            rows.append({"step": step, **fields, "uid": row.uid + step, "reward": float(reward),
                         "advantage": advantage})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(directory, *, alpha=0.2, steps=30, sets=("tiny", "tiny_long"), problems=60, seed=0,
             groups=1, samples=1, response=None, model="tiny", objective="policy_gradient"):
    """Makes a finished run; returns its results."""
    directory.mkdir(parents=True)
    config = write_config(directory, alpha=alpha, model=model, seed=seed, steps=steps,
                          objective=objective)
    write_rows(directory / "metrics.jsonl",
               metrics_rows(steps, alpha, seed=seed, evaluated=(steps // 2,)))
    write_rows(directory / "rollouts.jsonl",
               rollout_rows(steps, alpha, groups=groups, seed=seed, response=response))
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))

    outcomes = {}
    for step, progress in ((0, 0.0), (steps // 2, 0.7), (steps, 1.0)):
        outcomes[step] = write_evaluation(
            results.evaluations(directory, step), sets if step in (0, steps) else sets[:1],
            seed=seed, alpha=alpha, progress=progress, problems=problems, samples=samples,
            response=response)
    summary = runs.run_results(config, runs.compare(outcomes[0], outcomes[steps]), 181.5, alpha,
                            PROVENANCE)
    results.write(directory / "summary.json", summary)
    return summary


def write_evaluation(directory, sets, **options):
    """Writes graded responses to every set; returns their outcomes by set."""
    files, outcomes = responses.file_names(sets), {}
    for name in sets:
        rows = graded_responses(name, **options)
        responses.write(directory / f"{files[name]}.jsonl", {"set": name}, rows)
        outcomes[name] = responses.outcomes(rows)
    return outcomes


def make_dial(directory, *, alphas=(0.0, 0.1, 0.2, 0.4), between=(0.15, 0.3), steps=20, **options):
    """Makes a finished run with a dial, evaluated also at alphas `between`; returns its results."""
    summary = make_run(directory, alpha=0.2, steps=steps, **options)
    config = configuration.load(directory / "config.yaml")
    configuration.save(dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, rank=4),
        reward=dataclasses.replace(config.reward, alphas=",".join(map(str, alphas)))),
        directory / "config.yaml")
    rows = metrics_rows(steps, 0.2)
    for row in rows:
        row |= {f"dial/{name}_at_{alpha:g}": row[f"rollout/{name}"] * (1 - alpha / 10)
                for alpha in alphas for name in ("tokens", "accuracy")}
    write_rows(directory / "metrics.jsonl", rows)
    for alpha in {*alphas, *between}:
        write_evaluation(results.evaluations(directory, steps) / f"alpha{alpha:g}", ("tiny",),
                         alpha=alpha, progress=1.0, **{name: value for name, value in
                                                       options.items() if name != "sets"})
    return summary


def write_config(directory, *, alpha=0.2, model="tiny", seed=0, steps=30,
                 objective="policy_gradient"):
    config = Config()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=model),
        reward=dataclasses.replace(config.reward, alpha=alpha),
        kl=dataclasses.replace(config.kl, form="none"),
        update=dataclasses.replace(config.update, objective=objective),
        run=dataclasses.replace(config.run, directory=str(directory), seed=seed, steps=steps))
    configuration.save(config, directory / "config.yaml")
    return config


def make_family(directory, *, alphas=(0.0, 0.05, 0.1, 0.2, 0.4), sets=("tiny", "tiny_long"),
                problems=60, steps=30, response=None, model="tiny"):
    """Makes a finished family with two baselines and three blends; returns its results."""
    directory.mkdir(parents=True)
    write_config(directory, model=model, steps=steps)
    base = write_evaluation(directory / "base", sets, problems=problems, response=response)
    points = [results.Point(name="base", kind=PointKind.BASE, directory="base", sets=measure(base))]

    def add_run(name, kind, folder, **options):
        run = make_run(directory / folder, sets=sets, problems=problems, steps=steps, model=model,
                       **options)
        return dataclasses.replace(run.points[1], name=name, kind=kind, directory=folder,
                                   alpha_start=None)

    for alpha in alphas:
        point = add_run(f"α = {alpha:g}", PointKind.MEMBER, f"alpha{alpha:g}", alpha=alpha,
                        response=response)
        points.append(dataclasses.replace(point, seconds=170.0 + 100 * alpha))
    for name, objective, alpha in (("SFT, shortest", "sft_shortest", 0.03), ("DPO", "dpo", 0.05)):
        point = add_run(name, PointKind.BASELINE, objective, alpha=alpha, objective=objective)
        points.append(dataclasses.replace(point, seconds=120.0))
    for weight in (0.25, 0.5, 0.75):
        folder = f"blend{weight:g}-alpha{max(alphas):g}"
        outcomes = write_evaluation(directory / folder, sets, alpha=max(alphas), progress=weight,
                                    problems=problems)
        points.append(results.Point(
            name=f"blend {weight:g}", kind=PointKind.BLEND, alpha=max(alphas), weight=weight,
            directory=folder, sets=measure(base, outcomes)))

    family = Results(model=model, seed=0, steps=steps, points=points, **PROVENANCE)
    results.write(directory / "family.json", family)
    return family
