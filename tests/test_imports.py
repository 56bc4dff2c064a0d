"""The import order of the package, read from the source: nine layers and no circle."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "effreason"

# A file imports from its own folder and from the lines above its own. Every file may import
# effreason/__init__.py.
LAYERS = [
    ["runtime"],
    ["types"],
    ["lm", "grading"],
    ["data", "sampling"],
    ["rl"],
    ["evaluation", "planning"],
    ["runs"],
    ["loop"],
    ["cli"],
    ["__main__"],
]
KERNELS = ["rl.rewards", "rl.advantages", "rl.preferences"]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix("__init__")
    .removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layer(module):
    """Returns the index of the module's line in LAYERS; -1 for effreason/__init__.py."""
    folder = module.split(".")[0]
    if not folder:
        return -1

    return next(index for index, line in enumerate(LAYERS) if folder in line)


@functools.cache
def imports_of(path, lazy=True):
    """Returns the dotted names that a file imports, inside functions too if lazy."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))

    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            ours = node.module.split(".")[0] == PACKAGE.name
            inner = node.module.removeprefix(PACKAGE.name).removeprefix(".")
            for alias in node.names:
                submodule = f"{inner}.{alias.name}".removeprefix(".")
                is_module = ours and submodule in MODULES
                names.add(f"{PACKAGE.name}.{submodule}" if is_module else node.module)

    return frozenset(names)


def ours(module, lazy=True):
    """Returns the modules of this package that a module imports, without `effreason.`."""
    names = imports_of(MODULES[module], lazy)
    return {
        name.removeprefix(PACKAGE.name).removeprefix(".")
        for name in names
        if name.split(".")[0] == PACKAGE.name
    }


def others(module, lazy=True):
    """Returns the top-level packages that a module imports, without this one."""
    names = imports_of(MODULES[module], lazy)
    return {name.split(".")[0] for name in names} - {PACKAGE.name}


def needed_by(module, lazy=True):
    """Returns every module of ours that this one brings in, itself and its packages included."""
    seen, waiting = set(), {module}
    while waiting:
        seen |= waiting
        packages = {name.rpartition(".")[0] for name in waiting}
        waiting = packages.union(*(ours(name, lazy) for name in waiting)) - seen
    return seen


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module):
    for imported in sorted(ours(module)):
        assert imported in MODULES, f"{module} imports effreason.{imported}, which does not exist"
        same_folder = module.split(".")[0] == imported.split(".")[0]
        is_below = layer(imported) < layer(module)
        assert same_folder or is_below, f"{module} must not import {imported}"


def test_no_circle():
    waiting = {module: ours(module) & MODULES.keys() for module in MODULES}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these import one another: {sorted(waiting)}"


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_need_jax_alone(module):
    assert imports_of(MODULES[module]) <= {"jax", "jax.numpy", "jaxtyping"}


def test_only_the_decoder_imports_flax():
    assert {module for module in MODULES if "flax" in others(module)} <= {"lm.block", "lm.model"}


def test_no_file_imports_torch():
    assert not {module for module in MODULES if "torch" in others(module)}


def test_grading_imports_no_jax():
    grading = [module for module in MODULES if module.split(".")[0] == "grading"]
    assert not {name for module in grading for name in needed_by(module, lazy=False)
                if "jax" in others(name, lazy=False)}


@pytest.mark.parametrize(("module", "lazy"), [("runtime.config", True), ("cli.main", False),
                                              ("cli.train", False), ("cli.evaluate", False)])
def test_a_bad_configuration_fails_before_jax_starts(module, lazy):
    heavy = {"jax", "flax", "optax", "orbax", "transformers"}
    for needed in sorted(needed_by(module, lazy)):
        assert not others(needed, lazy) & heavy, needed


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_entry_points_import_nothing_but_this_package(script):
    names = {name.split(".")[0] for name in imports_of(ROOT / script)} - {PACKAGE.name}
    assert names <= sys.stdlib_module_names
