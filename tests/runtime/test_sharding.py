"""What the compilation cache keeps."""

import os
import subprocess
import sys


def test_the_next_run_finds_every_program_even_a_quick_one(tmp_path):
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    program = ("import jax; from effreason.runtime import sharding; "
               "sharding.use_compilation_cache(); jax.jit(lambda x: x + 1)(1)")
    subprocess.run([sys.executable, "-c", program], check=True,
                   env=others | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)})
    assert any("lambda" in path.name for path in tmp_path.rglob("*-cache"))
