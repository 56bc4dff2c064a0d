"""How many devices a CPU is split into, and what the compilation cache keeps."""

import os
import subprocess
import sys

import pytest

COUNT = """
import os
os.cpu_count = lambda: {cores}
import jax
{before}
from effreason.runtime import sharding
print(sharding.make_mesh({axes}).size)
"""


@pytest.mark.parametrize(("cores", "axes", "environment", "before", "devices"), [
    (4, "data=-1, cpu_devices=2", {}, "", 2),
    (1, "data=-1, cpu_devices=2", {}, "", 1),
    (4, "data=-1", {}, "", 1),
    (4, "data=1, cpu_devices=2", {}, "", 1),
    (4, "data=-1, cpu_devices=2", {"JAX_NUM_CPU_DEVICES": "3"}, "", 3),
    (4, "data=-1, cpu_devices=2", {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, "", 1),
    (4, "data=-1, cpu_devices=2", {}, "jax.devices()", 1)],
    ids=["two", "one core", "not asked for", "a mesh of one", "JAX's variable", "XLA's flag",
         "JAX has started"])
def test_a_cpu_is_split_unless_the_user_has_said_otherwise(cores, axes, environment, before,
                                                           devices):
    others = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    program = COUNT.format(cores=cores, axes=axes, before=before)
    found = subprocess.run([sys.executable, "-c", program], env=others | environment, text=True,
                           capture_output=True, check=True)
    assert int(found.stdout) == devices


def test_the_next_run_finds_every_program_even_a_quick_one(tmp_path):
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    program = ("import jax; from effreason.runtime import sharding; "
               "sharding.use_compilation_cache(); jax.jit(lambda x: x + 1)(1)")
    subprocess.run([sys.executable, "-c", program], check=True,
                   env=others | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)})
    assert any("lambda" in path.name for path in tmp_path.rglob("*-cache"))
