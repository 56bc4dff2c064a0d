"""Which reward a configuration names, with what parameters, and what is said of one that cannot be
used."""

import inspect
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effreason.rl import configured_reward, rewards
from effreason.runtime import processes
from effreason.runtime.config import RewardConfig
from effreason.runtime.errors import UserError

CORRECT = np.array([[True, True, False], [True, True, True]])
LENGTHS = np.array([[100, 200, 50], [300, 100, 100]], np.int32)

OWN = '''
import jax.numpy as jnp
import numpy as np


def priced(correct, lengths, *, alpha, price=0.001):
    return correct - alpha * price * lengths


def plain(correct, lengths):
    return correct


def any_name(right, tokens, **options):
    return right * options["value"]


class Table:
    def method(correct, lengths, target):
        return lengths <= target


def on_host(correct, lengths):
    return np.asarray(correct) * 1.0


def branches(correct, lengths):
    return correct if correct.any() else lengths


def of_group(correct, lengths):
    return jnp.mean(correct, axis=-1)


def nothing(correct, lengths):
    pass


def raises(correct, lengths):
    raise KeyError("no such column")


def one(correct):
    return correct


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which is not on Python's path."""
    (tmp_path / "own_reward.py").write_text(OWN)
    (tmp_path / "broken_reward.py").write_text("raise RuntimeError('a line\\nand another')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield
    sys.modules.pop("own_reward", None)


def rewarded(form, parameters=None, alpha=0.2):
    reward = configured_reward.make_reward(RewardConfig(form=form, parameters=parameters))
    return np.asarray(jax.jit(reward)(CORRECT, LENGTHS, np.float32(alpha)))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.4])
def test_the_default_is_the_methods_reward_at_every_alpha(alpha):
    expected = rewards.length_rewards(CORRECT, LENGTHS, alpha=np.float32(alpha))
    np.testing.assert_allclose(rewarded("efficient", alpha=alpha), expected, rtol=1e-6)


def test_alpha_is_an_argument_and_compiles_once():
    reward = jax.jit(configured_reward.make_reward(RewardConfig()))
    found = [np.asarray(reward(CORRECT, LENGTHS, np.float32(alpha))) for alpha in (0.0, 0.1, 0.4)]
    assert reward._cache_size() == 1
    np.testing.assert_array_equal(found[0], CORRECT)
    assert found[1][0, 1] > found[2][0, 1]


@pytest.mark.parametrize(("form", "parameters", "given"), [
    ("kimi", None, {}), ("kimi", "weight=0.5", {"weight": 0.5}),
    ("alp", " scale = 1e-4 ", {"scale": 1e-4}),
    ("l1_max", "target=150,scale=3e-3", {"target": 150, "scale": 3e-3}),
    ("l1_exact", "target=2e2", {"target": 200}),
    ("limit", "limit=150", {"limit": 150}), ("laser", "bonus=1,target=150",
                                             {"target": 150, "bonus": 1}),
    ("soft_overlong", "limit=200, buffer=100", {"limit": 200, "buffer": 100}), ("gr3", None, {}),
    ("shorter_better", "", {}), ("efficient", "eps=1", {"eps": 1, "alpha": np.float32(0.2)}),
])
def test_a_name_is_its_function_with_its_parameters(form, parameters, given):
    reward = RewardConfig(form=form, parameters=parameters)
    configured_reward.check(reward)
    expected = configured_reward.FORMS[form](jnp.asarray(CORRECT), jnp.asarray(LENGTHS), **given)
    np.testing.assert_allclose(rewarded(form, parameters), expected, rtol=1e-6)


def test_every_published_reward_has_a_name():
    public = {function for name, function in vars(rewards).items()
              if inspect.isfunction(function) and not name.startswith("_")}
    assert set(configured_reward.FORMS.values()) == public


def test_the_documentation_names_every_form_with_its_parameters():
    table = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = {row[1].strip("` "): row[3] for line in table.splitlines()
            if line.startswith("| `") and len(row := re.split(r"(?<!\\)\|", line)) > 6}
    assert rows.keys() == configured_reward.FORMS.keys()
    for form, function in configured_reward.FORMS.items():
        documented = dict((text.split("=") + [None])[:2] for text in re.findall("`([^`]+)`",
                                                                                rows[form]))
        taken = {name: each.default for name, each in inspect.signature(function).parameters.items()
                 if each.kind == each.KEYWORD_ONLY and name != "alpha"}
        assert documented.keys() == taken.keys(), form
        for name, default in taken.items():
            assert (documented[name] is None) == (default is inspect.Parameter.empty), (form, name)
            assert documented[name] is None or float(documented[name]) == default, (form, name)


@pytest.mark.parametrize(("form", "parameters", "expected"), [
    ("own_reward:priced", None, CORRECT - 0.2 * 0.001 * LENGTHS),
    ("own_reward:priced", "price=0.01", CORRECT - 0.2 * 0.01 * LENGTHS),
    ("own_reward:plain", None, CORRECT), ("own_reward:any_name", "value=2", 2 * CORRECT),
    ("own_reward:Table.method", "target=100", LENGTHS <= 100),
])
def test_a_function_of_ones_own_is_called_with_parameters_and_with_alpha_where_it_takes_it(
        own, form, parameters, expected):
    with jax.numpy_dtype_promotion("standard"):             # the user's file need not be as strict
        configured_reward.check(RewardConfig(form=form, parameters=parameters))
        found = rewarded(form, parameters)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


NAMES = ("efficient, kimi, l1_exact, l1_max, soft_overlong, limit, laser, alp, gr3, "
         "shorter_better, adaptive_limit, group_max")


@pytest.mark.parametrize(("form", "parameters", "message"), [
    ("kimmi", None, f"reward.form must be one of {NAMES}, or module:function, got 'kimmi'"),
    ("mine:", None, "reward.form mine:: it must have the form module:function"),
    ("kimi", "weight", "reward.parameters must be NAME=VALUE,NAME=VALUE, got 'weight'"),
    ("kimi", "weight=1,", "reward.parameters must be NAME=VALUE,NAME=VALUE, got 'weight=1,'"),
    ("kimi", "weight=1,weight=2",
     "reward.parameters must be NAME=VALUE,NAME=VALUE with each name once, got weight twice"),
    ("kimi", "weight=much", "reward.parameters: weight must be a finite number, got 'much'"),
    ("kimi", "weight=nan", "reward.parameters: weight must be a finite number, got 'nan'"),
    ("kimi", "weight=-1", "reward.parameters: weight must be >= 0, got -1"),
    ("kimi", "target=1", "reward.parameters of kimi must be of weight, got target"),
    ("kimi", "correct=1", "reward.parameters of kimi must be of weight, got correct"),
    ("l1_max", None,
     "reward.parameters must have target=NUMBER: l1_max has no default for it, got null"),
    ("laser", "bonus=1",
     "reward.parameters must have target=NUMBER: laser has no default for it, got bonus=1"),
    ("efficient", "alpha=0.1", "reward.parameters must not hold alpha: it is reward.alpha"),
])
def test_mistakes_are_told_before_anything_else(form, parameters, message):
    for told in (configured_reward.check, configured_reward.make_reward):
        with pytest.raises(UserError) as error:
            told(RewardConfig(form=form, parameters=parameters))
        assert str(error.value) == message


@pytest.mark.parametrize(("form", "parameters", "message"), [
    ("no_such_module:reward", None,
     "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    ("own_reward:nope", None,
     "cannot be imported: AttributeError: module 'own_reward' has no attribute 'nope'"),
    ("broken_reward:reward", None, "cannot be imported: RuntimeError: a line and another"),
    ("own_reward:number", None, "cannot be called, it is of type int"),
    ("own_reward:one", None, "it must take correct and lengths, it takes correct"),
    ("own_reward:of_group", None,
     "must return an array of the shape of its arguments, prompts x responses [3, 4], got [3]"),
    ("own_reward:nothing", None,
     "calling it failed: TypeError: it returned NoneType, expected an array"),
    ("own_reward:raises", None, "calling it failed: KeyError: 'no such column'"),
    ("own_reward:on_host", None, "must be of JAX operations alone, so that it can be compiled; "
     "TracerArrayConversionError: "),
    ("own_reward:branches", None, "must be of JAX operations alone, so that it can be compiled; "
     "TracerBoolConversionError: "),
])
def test_a_function_that_cannot_be_used_is_told_at_once(own, form, parameters, message):
    reward = RewardConfig(form=form, parameters=parameters)
    configured_reward.check(reward)  # nothing of the user's is imported for this
    with pytest.raises(UserError) as error:
        configured_reward.make_reward(reward)
    assert str(error.value).startswith(f"reward.form {form}: {message}")
    assert "\n" not in str(error.value)


def test_the_source_of_a_function_is_compared_between_hosts(own, monkeypatch, tmp_path):
    assert configured_reward.sources(RewardConfig()) == {}
    found = configured_reward.sources(RewardConfig(form="own_reward:plain"))
    assert list(found) == ["the source of reward.form own_reward:plain"]
    sys.modules.pop("own_reward")
    (tmp_path / "own_reward.py").write_text(OWN + "\n")
    other = configured_reward.sources(RewardConfig(form="own_reward:plain"))
    assert other.keys() == found.keys() and other != found

    monkeypatch.setattr(processes, "all_gather", lambda name, make: [make(), other])
    with pytest.raises(UserError, match=r"^the source of reward\.form own_reward:plain: process 1 "
                       r"has \w{12}, process 0 has \w{12}; all must have the same$"):
        processes.check_same(found)
    assert configured_reward.sources(RewardConfig(form="math:isclose")).keys() == {
        "the source of reward.form math:isclose"}


@pytest.mark.parametrize(("form", "parameters", "message"), [
    ("own_reward:priced", "cost=1",
     "reward.parameters of own_reward:priced must be of price, got cost"),
    ("own_reward:plain", "cost=1",
     "reward.parameters of own_reward:plain must be of no name, got cost"),
    ("own_reward:Table.method", None,
     "reward.parameters must have target=NUMBER: own_reward:Table.method has no "
     "default for it, got null"),
])
def test_parameters_of_a_function_of_ones_own_are_those_it_takes(own, form, parameters, message):
    with pytest.raises(UserError) as error:
        configured_reward.make_reward(RewardConfig(form=form, parameters=parameters))
    assert str(error.value) == message
