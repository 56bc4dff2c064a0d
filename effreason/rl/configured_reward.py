"""The configured reward: the method's, another published one, or a function of the user's."""

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

# (correct bool[P, G], lengths int32[P, G], alpha float32[]) -> float32[P, G]
Reward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# The values of reward.form besides module:function; docs/rewards.md has a line on each.
FORMS: dict[str, Callable[..., jax.Array]] = {
    "efficient": rewards.length_rewards, "kimi": rewards.kimi, "l1_exact": rewards.l1_exact,
    "l1_max": rewards.l1_max, "soft_overlong": rewards.soft_overlong, "limit": rewards.limit,
    "laser": rewards.laser, "alp": rewards.alp, "gr3": rewards.gr3,
    "shorter_better": rewards.shorter_better, "adaptive_limit": rewards.adaptive_limit,
    "group_max": rewards.group_max,
}
TRIAL = (3, 4)          # prompts and responses that a user's function is traced with


def check(reward: RewardConfig) -> None:
    """Raises UserError for an unknown form, or parameters that it does not take.

    Touches no device and imports nothing of the user's: whether module:function exists is checked
    by `make_reward`.
    """
    parameters = _parse(reward.parameters)
    if ":" in reward.form:
        _check_name(reward.form)
    else:
        _check_parameters(_resolve(reward.form), reward.form, parameters)


def make_reward(reward: RewardConfig) -> Reward:
    """Returns the reward as a pure function.

    alpha is an argument, so that one compiled function serves every alpha. A form without alpha
    ignores it.

    Raises:
        UserError: see `check`, or the user's function cannot be imported or traced.
    """
    parameters, function = _parse(reward.parameters), _resolve(reward.form)
    _check_parameters(function, reward.form, parameters)
    shaped = functools.partial(_shaped, function=function, parameters=parameters,
                               takes_alpha=_takes_alpha(function))
    if ":" in reward.form:
        _trace(shaped, reward.form)
    return shaped


def sources(reward: RewardConfig) -> dict[str, str]:
    """Returns a hash of the user's function, under words for people; {} for a published form.

    Raises: UserError if it cannot be imported."""
    if reward.form in FORMS:
        return {}
    _resolve(reward.form)
    return {f"the source of reward.form {reward.form}": functions.source_sha256(reward.form)}


def has_alpha(reward: RewardConfig) -> bool:
    """Returns whether reward.alpha makes a difference to this form."""
    return _takes_alpha(_resolve(reward.form))


def _takes_alpha(function: Callable[..., Any]) -> bool:
    return "alpha" in inspect.signature(function).parameters


def _shaped(correct: jax.Array, lengths: jax.Array, alpha: jax.Array, *,
            function: Callable[..., Any], parameters: dict[str, float],
            takes_alpha: bool) -> jax.Array:
    options = parameters | {"alpha": alpha} if takes_alpha else parameters
    result = function(correct, lengths, **options)
    if not hasattr(result, "shape"):
        raise TypeError(f"it returned {type(result).__name__}, expected an array")
    return jnp.asarray(result).astype(jnp.float32)


def _parse(text: str | None) -> dict[str, float]:
    """Reads NAME=VALUE,NAME=VALUE; whole numbers become int."""
    wanted = "reward.parameters must be NAME=VALUE,NAME=VALUE"
    parameters: dict[str, float] = {}
    for part in [] if text is None or not text.strip() else text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(f"{wanted}, got {text!r}")
        if name in parameters:
            raise UserError(f"{wanted} with each name once, got {name} twice")

        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"reward.parameters: {name} must be a finite number, got {value!r}")
        parameters[name] = int(number) if value.lstrip("+-").isdecimal() else number
    return parameters


def _check_parameters(function: Callable[..., Any], form: str,
                      parameters: dict[str, float]) -> None:
    """Raises UserError unless function(correct, lengths, **parameters) can be called, with alpha
    or without."""
    try:
        signature = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"reward.form {form}: its parameters cannot be read, it must be a Python "
                        "function") from None

    positional = [parameter for parameter in signature if parameter.kind in (
        parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    kinds = {parameter.kind for parameter in signature}
    if len(positional) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise UserError(f"reward.form {form}: it must take correct and lengths, it takes "
                        f"{', '.join(parameter.name for parameter in positional) or 'nothing'}")

    reserved = {parameter.name for parameter in positional[:2]} | {"alpha"}
    options = {parameter.name: parameter for parameter in signature
               if parameter.name not in reserved and parameter.kind in (
                   parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)}
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds
    for name in parameters:
        if name == "alpha":
            raise UserError("reward.parameters must not hold alpha: it is reward.alpha")
        if name in reserved or name not in options and not open_ended:
            raise UserError(f"reward.parameters of {form} must be of "
                            f"{', '.join(options) or 'no name'}, got {name}")
        if form in FORMS and parameters[name] < 0:
            raise UserError(f"reward.parameters: {name} must be >= 0, got {parameters[name]:g}")

    missing = [name for name, option in options.items()
               if option.default is option.empty and name not in parameters]
    if missing:
        pairs = ", ".join(f"{name}={value:g}" for name, value in parameters.items())
        raise UserError(f"reward.parameters must have {missing[0]}=NUMBER: {form} has no default "
                        f"for it, got {pairs or 'null'}")


def _check_name(form: str) -> None:
    try:
        functions.check_name(form)
    except functions.BadFunction as error:
        raise UserError(f"reward.form {form}: {error}") from None


def _resolve(form: str) -> Callable[..., Any]:
    """Returns the function of a form; a module is looked up in the working directory first.

    Raises:
        UserError: the form is unknown, or its function cannot be imported or called.
    """
    if form in FORMS:
        return FORMS[form]
    if ":" not in form:
        raise UserError(f"reward.form must be one of {', '.join(FORMS)}, or module:function, got "
                        f"{form!r}")

    _check_name(form)
    if (directory := os.getcwd()) not in sys.path:
        sys.path.insert(0, directory)
    try:
        function = pkgutil.resolve_name(form)
    except (Exception, SystemExit) as error:            # importing runs the user's code
        raise UserError(f"reward.form {form}: cannot be imported: "
                        f"{functions.describe(error)}") from None
    if not callable(function):
        raise UserError(f"reward.form {form}: cannot be called, it is of type "
                        f"{type(function).__name__}")
    return function


def _trace(reward: Reward, form: str) -> None:
    """Raises UserError unless the function can be traced and keeps the shape of its arguments."""
    arguments = (jax.ShapeDtypeStruct(TRIAL, jnp.bool_), jax.ShapeDtypeStruct(TRIAL, jnp.int32),
                 jax.ShapeDtypeStruct((), jnp.float32))
    try:
        result = jax.eval_shape(reward, *arguments)
    except jax.errors.JAXTypeError as error:            # a tracer, but a number was needed
        reason = f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}"
        raise UserError(f"reward.form {form}: must be of JAX operations alone, so that it can be "
                        f"compiled; {reason}") from None
    except Exception as error:
        raise UserError(
            f"reward.form {form}: calling it failed: {functions.describe(error)}") from None

    if result.shape != TRIAL:
        raise UserError(f"reward.form {form}: must return an array of the shape of its arguments, "
                        f"prompts x responses {list(TRIAL)}, got {list(result.shape)}")
