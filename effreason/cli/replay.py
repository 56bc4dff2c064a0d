"""The command `effreason replay`: generates one response of a training run again.

A response is a function of the weights at its step and of (seed, step, uid, sample), so nothing
else needs to be stored.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from effreason.cli.arguments import Parser
from effreason.data import prompts
from effreason.evaluation.evaluate import make_grader
from effreason.lm import model
from effreason.lm.hf.pretrained import Pretrained, load_weights
from effreason.rl import dial
from effreason.rl.checkpoints import Checkpoints
from effreason.rl.learner import Engine, make_engine
from effreason.runs.session import open_inputs
from effreason.runtime import config as configuration
from effreason.runtime import sharding
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json_lines
from effreason.sampling import engine as rollouts
from effreason.sampling.generate import decode
from effreason.types import Problem, Response


def run(argv: Sequence[str], prog: str) -> None:
    """Generates and prints the response. Raises: UserError, SystemExit(0) after --help."""
    options = _parser(prog).parse_args(argv)
    directory = Path(options.run)
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: expected the directory of a run, found no config.yaml in it")
    config = configuration.load(directory / "config.yaml")
    if options.step < 0:
        raise UserError(f"--step must be >= 0, got {options.step}")
    if not 0 <= options.sample < config.rollout.group_size:
        raise UserError(f"--sample must be in [0, {config.rollout.group_size - 1}], got "
                        f"{options.sample}")

    sharding.use_compilation_cache()

    try:
        mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    except UserError:               # other devices than the run had: split the slots alone
        mesh = sharding.make_mesh(data=-1)

    with jax.set_mesh(mesh), make_grader(config) as grader:
        inputs = open_inputs(config, mesh, grader)
        problem = _problem(inputs.problems, config, options.uid, options.step)
        engine = make_engine(config, inputs.pretrained, mesh)
        step = options.step if config.rollout.policy == "current" else 0
        alpha = _alpha(inputs.problems, config, problem, options.step)
        params = _policy(engine, inputs.pretrained, directory, step,
                         dial.checked_setting(config.reward, alpha, str(directory)))
        response = replay(engine, params, problem, config, options.step, options.sample)

    text = decode(inputs.pretrained.tokenizer, response.tokens, ended=response.ended)
    _show(options, problem, response, text, _as_logged(directory, options, text))


def replay(engine: Engine, params: model.Params, problem: Problem, config: Config, step: int,
           sample: int) -> Response:
    """Generates one response of a training step.

    All slots generate the same response: with another number of rows matrix products round
    differently, and in bfloat16 the responses soon differ.
    Args: params, of the policy after `step` updates."""
    request = rollouts.Request(prompt=0, tokens=problem.prompt, uid=problem.uid, sample=sample,
                               max_new_tokens=config.rollout.max_new_tokens)
    key = rollouts.step_key(config.run.seed, "train", step)
    copies = [request] * (config.rollout.prompts_per_step * config.rollout.group_size)
    generation = engine.sampler(params, copies, key, engine.sampling)
    return next(response for finished in generation for response in finished)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, "Generate one response of a training step again, from the weights of "
                    "that step: those of a checkpoint, or for step 0 those of the model the run "
                    "started from.")
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    parser.add_argument("--step", metavar="S", type=int, required=True,
                        help="training step, counted from 0")
    parser.add_argument("--uid", metavar="U", type=int, required=True,
                        help="uid of the problem, as in rollouts.jsonl")
    parser.add_argument("--sample", metavar="I", type=int, default=0,
                        help="number of the response to it; default 0")
    parser.add_argument("--json", action="store_true",
                        help="print one object with token ids and log-probs")
    return parser


def _problem(problems: prompts.Problems, config: Config, uid: int, step: int) -> Problem:
    batch = prompts.batch(problems, config.rollout.prompts_per_step, config.run.seed, step)
    if config.rollout.refill_rounds:        # any problem may have replaced one of these
        batch = [problem for source in problems.sources for problem in source.problems]
    for problem in batch:
        if problem.uid == uid:
            return problem
    raise UserError(f"--uid must be a problem of step {step}: "
                    f"{', '.join(str(problem.uid) for problem in batch)}; got {uid}")


def _alpha(problems: prompts.Problems, config: Config, problem: Problem,
           step: int) -> float | None:
    """Returns the alpha of a problem's group in a run with a dial; None without one."""
    alphas = config.reward.dial
    if not alphas:
        return None
    batch = prompts.batch(problems, config.rollout.prompts_per_step, config.run.seed, step)
    index = [other.uid for other in batch].index(problem.uid)
    return float(dial.assign(alphas, len(batch), step)[index])


def _policy(engine: Engine, pretrained: Pretrained, directory: Path, step: int,
            setting: float | None) -> model.Params:
    """Returns the weights after `step` updates. Raises: UserError if they are not stored.

    Args: setting, of the dial, None if there is none."""
    if step == 0:
        return load_weights(pretrained, engine.learner.params_sharding)
    with Checkpoints(directory / "checkpoints", keep=None) as saved:
        if step not in saved.steps:
            kept = ", ".join(map(str, [0, *saved.steps]))
            raise UserError(f"--step must be one of {kept}, whose weights are stored in "
                            f"{directory / 'checkpoints'}; got {step}; a run keeps more of them "
                            "with checkpoint.every and checkpoint.keep")
        state, _ = saved.restore(engine.learner.abstract_state, step)
        return engine.learner.restored(state, pretrained, setting)


def _as_logged(directory: Path, options: Any, text: str) -> bool | None:
    """Returns whether the text equals the one in the run's log; None if it was not logged."""
    for row in read_json_lines(directory / "rollouts.jsonl"):
        if (row["step"], row["uid"], row["sample"]) == (options.step, options.uid, options.sample):
            return row["response"] == text
    return None


def _show(options: Any, problem: Problem, response: Response, text: str,
          as_logged: bool | None) -> None:
    if options.json:
        print(json.dumps({
            "step": options.step, "uid": options.uid, "sample": options.sample,
            "finish": response.finish, "as_logged": as_logged, "problem": problem.text,
            "text": text, "tokens": response.tokens.tolist(),
            "logprobs": response.logprobs.tolist()}, ensure_ascii=False))
        return

    comparison = {True: "the same text as in rollouts.jsonl", None: "not in rollouts.jsonl",
                  False: "not the text in rollouts.jsonl: rounding differs between devices and "
                  "numbers of slots"}[as_logged]
    print(f"problem: {problem.text}\n\n{text}\n\n{len(response.tokens)} tokens, finish "
          f"{response.finish}; {comparison}")
