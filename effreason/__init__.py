"""effreason: train large reasoning models to reason efficiently (arXiv 2502.04463), in JAX.

The names below may be used in other programs; docs/api.md has an example for each. They are
imported when first used: `import effreason` itself imports neither jax nor anything else.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# The public names, and the modules that define them. __init__.pyi says the same to type checkers.
_MODULES = {
    "Config": "runtime.config",
    "Grader": "grading.grader",
    "Reference": "grading.grader",
    "Response": "types",
    "SamplingParams": "sampling.draws",
    "evaluate_models": "evaluation.evaluate",
    "generate": "sampling.generate",
    "group_std": "rl.advantages",
    "kl_return_to_go": "rl.advantages",
    "leave_one_out": "rl.advantages",
    "length_rewards": "rl.rewards",
    "load_weights": "lm.hf.pretrained",
    "open_pretrained": "lm.hf.pretrained",
    "read_json_lines": "runtime.files",
    "score": "lm.score",
    "train": "loop",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
