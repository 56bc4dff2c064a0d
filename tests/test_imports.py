"""The import order of the package, read from the source: a file imports only from lines above its own."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "effreason"

# One line imports from the lines above it, never from its own. A package's name stands for the files in it that have
# no line of their own; those may import one another. "" is effreason/__init__.py.
ORDER = [
    ["", "errors"],
    ["runtime.settings", "runtime.arguments", "runtime.stderr_relay"],
    ["runtime.parsers"],
    ["runtime.config"],
    ["runtime.processes"],
    ["runtime.meetings"],
    ["records", "masks", "tiny", "grading"],
    ["runtime.sharding", "runtime.metrics", "runtime.progress", "statistics"],
    ["lm.kernels"],
    ["lm.attention"],
    ["lm.causal"],
    ["lm.model"],
    ["lm.configs", "lm.hub"],
    ["lm.weights"],
    ["lm.hf", "lm.cards"],
    ["sampling"],
    ["problems"],
    ["rewards", "advantages", "preferences", "control", "grades", "prompts", "packing", "logprobs"],
    ["blends", "rollouts", "update", "checkpoints", "runtime.interrupts", "verdicts", "shaping"],
    ["credit", "effects"],
    ["engine", "attempts", "parity", "generation", "unfinished"],
    ["inputs", "graded", "journals", "provenance"],
    ["candidates"],
    ["scores", "previews"],
    ["evaluation", "report", "runtime.plan", "outputs"],
    ["reporting"],
    ["pages"],
    ["completions"],
    ["exports"],
    ["runs", "sessions"],
    ["groups"],
    ["loop", "replays", "planning"],
    ["families"],
    ["tiny.build"],                 # pretrains the tiny reasoner with the pieces of the trainer
    ["cli"],
]
# Their __init__ imports nothing and brings in no other module.
PACKAGES = ["", "runtime", "lm", "sampling", "tiny", "problems", "reporting"]
STAGES = {"prompts", "rollouts", "grades", "rewards", "advantages", "update", "checkpoints"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def line_of(module):
    """The module's own line of ORDER, or that of the nearest package around it: (place, name there)."""
    places = {name: place for place, line in enumerate(ORDER) for name in line}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in places:
            return places[name], name
    return None


@functools.cache
def imports_of(path, lazy=True):
    """Dotted names a file imports, with those inside functions if lazy; `from a import b` is a.b where that is ours."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write the full name"
            ours = node.module.split(".")[0] == PACKAGE.name
            inner = node.module.removeprefix(PACKAGE.name).removeprefix(".")
            for alias in node.names:
                submodule = f"{inner}.{alias.name}".removeprefix(".")
                names.add(f"{PACKAGE.name}.{submodule}" if ours and submodule in MODULES else node.module)
    return frozenset(names)


def ours(path, lazy=True):
    """The modules of this package that a file imports, without the leading `effreason.`."""
    names = {name for name in imports_of(path, lazy) if name.split(".")[0] == PACKAGE.name}
    return {name.removeprefix(PACKAGE.name).removeprefix(".") for name in names}


def others(path, lazy=True):
    """The top-level packages a file imports, beyond this one."""
    return {name.split(".")[0] for name in imports_of(path, lazy)} - {PACKAGE.name}


def needed_by(module, lazy=True):
    """Every module of ours that this one brings in, itself and its packages included."""
    seen, waiting = set(), {module}
    while waiting:
        seen |= waiting
        packages = {name.rpartition(".")[0] for name in waiting}
        waiting = (packages | set().union(*(ours(MODULES[name], lazy) for name in waiting))) - seen
    return seen


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_from_lines_above_it(module):
    if module in PACKAGES:
        assert not imports_of(MODULES[module])
        return
    here = line_of(module)
    assert here is not None, f"effreason/{module.replace('.', '/')}.py has no line in ORDER"
    for imported in sorted(ours(MODULES[module])):
        assert imported in MODULES, f"{module} imports effreason.{imported}, which is not there"
        there = line_of(imported)
        within_a_package = there == here and module.startswith(f"{here[1]}.")
        assert there is not None and (there[0] < here[0] or within_a_package), f"{module} must not import {imported}"


def test_the_stages_never_import_one_another():
    for stage in sorted(STAGES & MODULES.keys()):
        assert not (needed_by(stage) - {stage}) & STAGES, stage


@pytest.mark.parametrize("module", ["rewards", "advantages", "preferences"])
def test_kernels_need_jax_alone(module):
    assert imports_of(MODULES[module]) <= {"jax", "jax.numpy"}


def test_only_the_decoder_imports_flax():
    assert {module for module, path in MODULES.items() if "flax" in others(path)} <= {"lm.model"}


def test_no_file_imports_torch():
    assert not {module for module, path in MODULES.items() if "torch" in others(path)}


@pytest.mark.parametrize(("module", "lazy"), [("runtime.config", True), ("cli", False)])
def test_a_bad_configuration_fails_before_jax_starts(module, lazy):
    for needed in sorted(needed_by(module, lazy)):
        assert not others(MODULES[needed], lazy) & {"jax", "flax", "optax", "orbax", "transformers"}, needed


def test_entry_points_import_nothing_but_this_package():
    for script in ("train.py", "evaluate.py"):
        if (ROOT / script).exists():
            assert others(ROOT / script) <= sys.stdlib_module_names, script
