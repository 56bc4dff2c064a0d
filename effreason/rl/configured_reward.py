"""The reward that the configuration names: the method's, another published one, or a function of the user's own."""

import functools
import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effreason.grading import functions
from effreason.rl import rewards
from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError

Reward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Every value of reward.form that is no module:function. docs/rewards.md has a line on each.
FORMS: dict[str, Callable[..., jax.Array]] = {
    "efficient": rewards.length_rewards, "kimi": rewards.kimi, "l1_exact": rewards.l1_exact, "l1_max": rewards.l1_max,
    "soft_overlong": rewards.soft_overlong, "limit": rewards.limit, "laser": rewards.laser, "alp": rewards.alp,
    "gr3": rewards.gr3, "shorter_better": rewards.shorter_better,
}
TRIAL = (3, 4)                      # prompts and responses that a user's function is traced with before it is used


def check(reward: RewardConfig) -> None:
    """Raises UserError for a form that is none, or parameters that it does not take.

    Touches no device and imports nothing of the user's: whether module:function is there, `make_reward` says."""
    parameters = _parse(reward.parameters)
    if ":" not in reward.form:
        _check_parameters(_named(reward.form), reward.form, parameters)
    else:
        _check_name(reward.form)


def make_reward(reward: RewardConfig) -> Reward:
    """The reward as a pure function (correct bool[P, G], lengths int32[P, G], alpha float32[]) -> float32[P, G].

    alpha is an argument, so that what is compiled serves every alpha. A form that has no alpha ignores it.
    Raises: UserError."""
    parameters = _parse(reward.parameters)
    function = _imported(reward.form) if ":" in reward.form else _named(reward.form)
    _check_parameters(function, reward.form, parameters)
    made = functools.partial(_shaped, function=function, parameters=parameters, takes_alpha=_takes_alpha(function))
    if ":" in reward.form:
        _trace(made, reward.form)
    return made


def has_alpha(reward: RewardConfig) -> bool:
    """True: reward.alpha makes a difference to this form."""
    return _takes_alpha(_imported(reward.form) if ":" in reward.form else _named(reward.form))


def _takes_alpha(function: Callable[..., Any]) -> bool:
    return "alpha" in inspect.signature(function).parameters


def _shaped(correct: jax.Array, lengths: jax.Array, alpha: jax.Array, *, function: Callable[..., Any],
            parameters: dict[str, float], takes_alpha: bool) -> jax.Array:
    dial = {"alpha": alpha} if takes_alpha else {}
    result = function(correct, lengths, **parameters, **dial)
    if not hasattr(result, "shape"):
        raise TypeError(f"it returned {type(result).__name__}, expected an array")
    return jnp.asarray(result).astype(jnp.float32)


def _named(form: str) -> Callable[..., jax.Array]:
    if form not in FORMS:
        raise UserError(f"reward.form must be one of {', '.join(FORMS)}, or module:function, got {form!r}")
    return FORMS[form]


def _parse(text: str | None) -> dict[str, float]:
    """NAME=VALUE,NAME=VALUE as a dictionary; whole numbers stay that."""
    wanted = "reward.parameters must be NAME=VALUE,NAME=VALUE"
    found: dict[str, float] = {}
    for part in [] if text is None or not text.strip() else text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(f"{wanted}, got {text!r}")
        if name in found:
            raise UserError(f"{wanted} with each name once, got {name} twice")
        found[name] = _number(name, value)
    return found


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"reward.parameters: {name} must be a finite number, got {text!r}")
    return int(number) if text.lstrip("+-").isdecimal() else number


def _check_parameters(function: Callable[..., Any], form: str, parameters: dict[str, float]) -> None:
    """Raises UserError unless the function can be called with (correct, lengths, **parameters) and alpha."""
    try:
        signature = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"reward.form {form}: its parameters cannot be read, it must be a Python function") from None
    positional = [each for each in signature if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(each.kind == each.VAR_POSITIONAL for each in signature):
        raise UserError(f"reward.form {form}: it must take correct and lengths, it takes "
                        f"{', '.join(each.name for each in positional) or 'nothing'}")
    taken = {each.name for each in positional[:2]} | {"alpha"}
    options = {each.name: each for each in signature
               if each.name not in taken and each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    open_ended = any(each.kind == each.VAR_KEYWORD for each in signature)
    for name in parameters:
        if name == "alpha":
            raise UserError("reward.parameters must not hold alpha: it is reward.alpha")
        if name in taken or name not in options and not open_ended:
            raise UserError(f"reward.parameters of {form} must be of {', '.join(options) or 'no name'}, got {name}")
        if form in FORMS and parameters[name] < 0:
            raise UserError(f"reward.parameters: {name} must be >= 0, got {parameters[name]:g}")
    missing = [name for name, each in options.items() if each.default is each.empty and name not in parameters]
    if missing:
        raise UserError(f"reward.parameters must have {missing[0]}=NUMBER: {form} has no default for it, got "
                        f"{', '.join(f'{name}={value:g}' for name, value in parameters.items()) or 'null'}")


def _check_name(form: str) -> None:
    try:
        functions.check_name(form)
    except functions.BadFunction as error:
        raise UserError(f"reward.form {form}: {error}") from None


def _imported(form: str) -> Callable[..., Any]:
    """The user's function; modules are looked for in the working directory first. Raises: UserError."""
    _check_name(form)
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = pkgutil.resolve_name(form)
    except (Exception, SystemExit) as error:            # importing runs the user's code
        raise UserError(f"reward.form {form}: cannot be imported: {functions.describe(error)}") from None
    if not callable(function):
        raise UserError(f"reward.form {form}: cannot be called, it is of type {type(function).__name__}")
    return function


def _trace(made: Reward, form: str) -> None:
    """Raises UserError unless the function can be traced and returns an array like the one it is given."""
    arguments = (jax.ShapeDtypeStruct(TRIAL, jnp.bool_), jax.ShapeDtypeStruct(TRIAL, jnp.int32),
                 jax.ShapeDtypeStruct((), jnp.float32))
    try:
        result = jax.eval_shape(made, *arguments)
    except jax.errors.JAXTypeError as error:            # a tracer where a number was wanted
        reason = f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}"
        raise UserError(f"reward.form {form}: must be of JAX operations alone, so that it can be compiled; "
                        f"{reason}") from None
    except Exception as error:
        raise UserError(f"reward.form {form}: calling it failed: {functions.describe(error)}") from None
    if result.shape != TRIAL:
        raise UserError(f"reward.form {form}: must return an array of the shape of its arguments, prompts x responses "
                        f"{list(TRIAL)}, got {list(result.shape)}")
