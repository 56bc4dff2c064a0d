"""What the compilation cache keeps, and what compilers are told."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from effreason.runtime import sharding


def test_the_next_run_finds_every_program_even_a_quick_one(tmp_path):
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    program = ("import jax; from effreason.runtime import sharding; "
               "sharding.use_compilation_cache(); jax.jit(lambda x: x + 1)(1)")
    subprocess.run([sys.executable, "-c", program], check=True,
                   env=others | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)})
    assert any("lambda" in path.name for path in tmp_path.rglob("*-cache"))


@pytest.mark.parametrize(("kind", "flags", "expected"), [
    ("TPU v5 lite", "--xla_other=1", {sharding.WINDOWS: "1000000"}),
    ("TPU v5 lite", f"--{sharding.WINDOWS}=0", None), ("TPU v5", "", None), ("cpu", "", None)])
def test_a_v5e_gathers_weights_whole_unless_the_user_says_otherwise(kind, flags, expected,
                                                                    monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 2))
    assert sharding.compiler_options(mesh) == expected
