"""Directories of runs and families as training leaves them, made of seeded random numbers in a second."""

import dataclasses
import json

import numpy as np

from effreason.evaluation import responses, statistics
from effreason.evaluation.responses import EvaluatedResponse
from effreason.runs.report import summary as report
from effreason.runtime import config as configuration
from effreason.runtime.config import Config

LEVELS = {"easy": (2, 88.0), "medium": (4, 92.0), "hard": (7, 104.0)}       # operations, the base's tokens
NEEDED = {"easy": 20, "medium": 32, "hard": 50}                             # tokens that the steps take
ENVIRONMENT = {"effreason": "0.1.0", "git_commit": "a" * 40, "grader": "effreason 0.1.0, sympy 1.14",
               "python": "3.11.9", "jax": "0.10.2", "device": "cpu", "device_count": 1}


def graded_rows(name, *, seed=0, alpha=0.0, progress=0.0, problems=60, samples=1, response=None):
    """Graded rows of a model: `progress` of a training with `alpha` behind it shortens what is not needed."""
    asked = np.random.default_rng([7, *map(ord, name)])
    model = round(1000 * alpha) if progress else 0      # before training all are the base
    rng = np.random.default_rng([8, seed, model, round(100 * progress), *map(ord, name)])
    longer = 1.6 if "long" in name else 1.0
    kept = 1.0 - progress * (0.15 + 0.75 * alpha / (alpha + 0.08))
    rows = []
    for uid in range(problems):
        level = list(LEVELS)[uid % 3]
        operations, base = LEVELS[level]
        digits = asked.integers(1, 10, operations + 1)
        for sample in range(samples):
            luck, right = rng.gamma(4.0, 0.25), rng.random()
            tokens = int(longer * (NEEDED[level] + (base - NEEDED[level]) * kept * luck)) + int(rng.integers(0, 3))
            correct = bool(right < 0.93 + 0.04 * progress - 0.05 * alpha - 0.2 * (longer - 1))
            answer = str(digits.sum() % 10 if correct else (digits.sum() + 1) % 10)
            thinking = "".join(f"{digits[i % operations]}+{digits[i % operations + 1]}={i % 10};"
                               for i in range(max(tokens // 6, 1)))
            rows.append(EvaluatedResponse(**{"set": name, "uid": uid * 17 + 5, "sample": sample, "level": level,
                         "problem": f"({'+'.join(map(str, digits))})%10", "reference_answer": str(digits.sum() % 10),
                         "response": response or f"{thinking}</think>\\boxed{{{answer}}}", "answer": answer,
                         "status": "exact", "correct": correct, "tokens": tokens, "finish": "eos",
                         "first_answer_token": tokens - 8.0 if correct else None}))
    return rows


def metrics_rows(steps, alpha, *, seed=0, evaluated=()):
    rng = np.random.default_rng([3, seed])
    course = 1 - np.exp(-3.0 * np.arange(steps) / max(steps - 1, 1))
    rows = []
    for step in range(steps):
        noise = rng.normal(size=6)
        length = alpha / (alpha + 0.05) * (0.5 + 0.3 * course[step])
        row = {"step": step, "reward/alpha": alpha, "reward/mean": 0.85, "reward/kl": 0.002 * step,
               "reward/groups_with_signal": 0.99, "update/entropy": 0.09 - 0.04 * course[step] + 0.003 * noise[0],
               "update/kl": 0.001 * step, "update/grad_norm": 0.02,
               "rollout/accuracy": min(0.92 + 0.05 * course[step] + 0.015 * noise[1], 1.0),
               "rollout/tokens": 92 - 55 * alpha / (alpha + 0.08) * course[step] + 3 * noise[2],
               "rollout/truncated": max(0.01 * noise[3], 0.0),
               "update_share/accuracy": (1 - length) * 0.9, "update_share/length": length * 0.9, "update_share/kl": 0.04,
               "update_share/normalisation": 0.06, "length_pull/accuracy": 0.6 * (1 - course[step]) + 0.05 * noise[4],
               "length_pull/length": -3.0 * length + 0.2 * noise[5], "length_pull/kl": -0.02, "length_pull/normalisation": 0.01,
               "time/step": 6.0}
        if step in evaluated:
            row |= {"evaluation/accuracy": row["rollout/accuracy"], "evaluation/tokens": row["rollout/tokens"]}
        rows.append(row)
    return rows


def rollout_rows(steps, alpha, *, groups=1, group_size=8, seed=0, response=None):
    rows = []
    for step in range(steps):
        tried = graded_rows("train", seed=1000 * seed + step, alpha=alpha, progress=step / max(steps - 1, 1),
                            problems=groups, samples=group_size, response=response)
        lengths = np.array([row.tokens for row in tried], float)
        rewards = np.array([row.correct for row in tried]) * (1 - alpha / (1 + np.exp(-(lengths - lengths.mean())
                                                                                         / (lengths.std() + 1e-7))))
        for row, reward in zip(tried, rewards, strict=True):
            kept = {key: value for key, value in vars(row).items() if key not in ("set", "first_answer_token")}
            rows.append({"step": step, **kept, "uid": row.uid + step, "reward": float(reward),
                         "advantage": float((reward - rewards.mean()) * group_size / (group_size - 1))})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(directory, *, alpha=0.2, steps=30, sets=("tiny", "tiny_long"), problems=60, seed=0, groups=1, samples=1,
             response=None, model="tiny", objective="policy_gradient"):
    """A finished run; returns its summaries and comparisons by set."""
    directory.mkdir(parents=True)
    config = write_config(directory, alpha=alpha, model=model, seed=seed, steps=steps, objective=objective)
    write_rows(directory / "metrics.jsonl", metrics_rows(steps, alpha, seed=seed, evaluated=(steps // 2,)))
    write_rows(directory / "rollouts.jsonl", rollout_rows(steps, alpha, groups=groups, seed=seed, response=response))
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    outcomes = {}
    files = responses.file_names(sets)
    for step, progress in ((0, 0.0), (steps // 2, 0.7), (steps, 1.0)):
        for name in sets if step in (0, steps) else sets[:1]:
            rows = graded_rows(name, seed=seed, alpha=alpha, progress=progress, problems=problems, samples=samples,
                               response=response)
            responses.write(directory / "evaluations" / f"step{step}" / f"{files[name]}.jsonl", {"set": name}, rows)
            outcomes[step, name] = responses.outcomes(rows)
    results = {name: (statistics.summarize(outcomes[0, name]), statistics.summarize(outcomes[steps, name]),
                      statistics.compare(outcomes[0, name], outcomes[steps, name])) for name in sets}
    (directory / "summary.json").write_text(json.dumps(report.summary(config, results, 181.5)))
    return results


def write_config(directory, *, alpha=0.2, model="tiny", seed=0, steps=30, objective="policy_gradient"):
    config = Config()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=model),
        reward=dataclasses.replace(config.reward, alpha=alpha), kl=dataclasses.replace(config.kl, form="none"),
        update=dataclasses.replace(config.update, objective=objective),
        run=dataclasses.replace(config.run, directory=str(directory), seed=seed, steps=steps))
    configuration.save(config, directory / "config.yaml")
    return config


def make_family(directory, *, alphas=(0.0, 0.05, 0.1, 0.2, 0.4), sets=("tiny", "tiny_long"), problems=60, steps=30,
                response=None, model="tiny"):
    """A finished family with two baselines and three blends; returns family.json as a table."""
    directory.mkdir(parents=True)
    write_config(directory, model=model, steps=steps)
    files = responses.file_names(sets)
    base = {name: graded_rows(name, problems=problems, response=response) for name in sets}
    for name, rows in base.items():
        responses.write(directory / "base" / f"{files[name]}.jsonl", {"set": name}, rows)
    outcomes = {name: responses.outcomes(rows) for name, rows in base.items()}
    points = [_point("base", "base", {name: (statistics.summarize(each), None) for name, each in outcomes.items()},
                     directory="base")]
    for alpha in alphas:
        results = make_run(directory / f"alpha{alpha:g}", alpha=alpha, sets=sets, problems=problems, steps=steps,
                           response=response, model=model)
        points.append(_point(f"α = {alpha:g}", "member", {name: each[1:] for name, each in results.items()},
                             alpha=alpha, directory=f"alpha{alpha:g}", seconds=170.0 + 100 * alpha))
    for name, objective, alpha in (("SFT, shortest", "sft_shortest", 0.03),
                                   ("DPO", "dpo", 0.05)):
        results = make_run(directory / objective, alpha=alpha, sets=sets, problems=problems, steps=steps,
                           model=model, objective=objective)
        points.append(_point(name, "baseline", {name: each[1:] for name, each in results.items()},
                             directory=objective, seconds=120.0))
    for weight in (0.25, 0.5, 0.75):
        results = {}
        for each in sets:
            rows = graded_rows(each, alpha=max(alphas), progress=weight, problems=problems)
            place = f"blend{weight:g}-alpha{max(alphas):g}"
            responses.write(directory / place / f"{files[each]}.jsonl", {"set": each}, rows)
            tried = responses.outcomes(rows)
            results[each] = statistics.summarize(tried), statistics.compare(outcomes[each], tried)
        points.append(_point(f"blend {weight:g}", "blend", results, alpha=max(alphas), weight=weight, directory=place))
    table = {"model": model, "seed": 0, "steps": steps, "sets": list(sets), "environment": ENVIRONMENT,
             "points": points}
    (directory / "family.json").write_text(json.dumps(table))
    return table


def _point(name, kind, results, *, alpha=None, weight=None, directory=None, seconds=None):
    return {"name": name, "kind": kind, "alpha": alpha, "weight": weight, "directory": directory, "seconds": seconds,
            "sets": {each: {"summary": dataclasses.asdict(summary),
                            "comparison": comparison and dataclasses.asdict(comparison)}
                     for each, (summary, comparison) in results.items()}}
