"""How long a run will take, by formula, said before it starts; `effreason plan` says more."""

from collections.abc import Sequence

import jax

from effreason.lm.architecture import DecoderConfig
from effreason.planning import chips, plans, shapes
from effreason.planning.chips import Target
from effreason.runtime.config import Config
from effreason.runtime.errors import UserError
from effreason.runtime.progress import duration
from effreason.types import Problem

# Parts of what JAX calls a device, with the chip that plans know it as.
KINDS = {"v5 lite": "tpu:v5e", "v5e": "tpu:v5e", "v6 lite": "tpu:v6e", "v6e": "tpu:v6e",
         "v5": "tpu:v5p", "A100": "gpu:a100", "H100": "gpu:h100", "H200": "gpu:h200"}
SMALL_WEIGHTS = 10_000_000          # with fewer no run is long
LONG_SECONDS = 600.0                # a run that takes less needs no word


def outlook(config: Config, decoder: DecoderConfig, problems: Sequence[Problem],
            mean_tokens: float = 4044.0) -> str | None:
    """Returns a line about a run that takes long, or does not fit; None if it is short.

    Args:
        problems: to train on.
        mean_tokens: of a response, but at most half of rollout.max_new_tokens are assumed; by
            default that of the paper's 7B model on MATH-500 (arXiv 2502.04463).
    """
    target = present(jax.devices()[0].device_kind, jax.device_count(), jax.process_count())
    if target is None or shapes.weight_count(decoder) < SMALL_WEIGHTS:
        return None
    tokens = min(mean_tokens, config.rollout.max_new_tokens / 2)
    prompt = sum(len(problem.prompt) for problem in problems) // max(len(problems), 1)
    try:
        plan = plans.make_plan(config, decoder, target, plans.PlanInputs(
            mean_tokens=tokens, prompt_tokens=max(prompt, 1)), compiled=False)
    except UserError:                   # the run itself says what does not fit
        return None

    too_large = [name for name, function in plan.functions.items()
                 if not plans.fits(function, target)]
    if too_large and target.kind != "cpu":      # how much a CPU may use is not known
        return (f"warning: by formula {too_large[0]} does not fit into the memory of "
                f"{target.chip.name}; effreason plan says what would, docs/out-of-memory.md what "
                "to change")
    if plan.run is None or plan.run.hours * 3600 < LONG_SECONDS:
        return None
    evaluation = duration(plan.run.evaluation_hours * 3600)
    return (f"by formula, with {tokens:,.0f} tokens in a response, a step takes about "
            f"{duration(plan.run.step_seconds)} and the run {duration(plan.run.hours * 3600)}, "
            f"{evaluation} of it evaluation")


def present(kind: str, devices: int, hosts: int) -> Target | None:
    """Returns these devices as a machine to plan for; None for a chip that plans do not know.

    Args:
        kind: of a device, as JAX calls it.
    """
    if kind == "cpu":
        return chips.cpu(devices)
    name = next((name for part, name in KINDS.items() if part in kind), None)
    if name is None:
        return None
    is_gpu = name.startswith("gpu")
    return Target(text=name, kind=name[:3], chip=chips.CHIPS[name],
                  shape=(hosts, devices // hosts) if is_gpu else (devices,))
