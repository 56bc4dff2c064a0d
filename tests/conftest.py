"""Eight virtual CPU devices, a compilation cache that outlives the run, and quiet property tests."""

import os
from pathlib import Path

# JAX reads these once, when it is first imported: keep this above every import that may bring JAX in.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
_user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache / "effreason" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# No deadline: the first example of a property compiles. The seed is fixed, so that a failure is one everybody sees.
hypothesis.settings.register_profile("effreason", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("effreason")


@pytest.fixture(scope="module")
def strict():
    """No silent rank or dtype promotion: for the kernels, whose shapes and dtypes are all stated."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
