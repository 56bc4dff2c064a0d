"""Eight virtual CPU devices, cheap compilation, strict promotion, quiet property tests."""

import functools
import gc
import importlib.metadata
import os
from pathlib import Path

# JAX reads these once, when it is first imported: keep this above every import that may bring JAX
# in. Processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the suite's time is compilation. Programs that run for milliseconds need no optimized
# code: this takes 8.0 s of compilation of a training step to 0.9 s. EFFREASON_TESTS_OPTIMIZED=1
# leaves the code as users get it.
CHEAP_COMPILATION = [
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1"]
# Newer versions have no such flag, and end the process for an unknown one.
if importlib.metadata.version("jax").startswith("0.10."):
    CHEAP_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")

flags = os.environ.get("XLA_FLAGS", "").split()
if not any("xla_force_host_platform_device_count" in flag for flag in flags):
    flags.append("--xla_force_host_platform_device_count=8")
if not os.environ.get("EFFREASON_TESTS_OPTIMIZED"):
    flags += CHEAP_COMPILATION
os.environ["XLA_FLAGS"] = " ".join(flags)

_user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache / "effreason" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402

# No deadline: the first example of a property compiles. The seed is fixed, so that a failure is one
# everybody sees.
hypothesis.settings.register_profile(
    "effreason", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("effreason")

# Neither the package nor a test may promote ranks or dtypes silently, unless it is marked
# `promotes`.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def promoting(function):
    """Lets a function of a library promote."""
    @functools.wraps(function)
    def call(*args, **named):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **named)
    return call


optax.tree.bias_correction = promoting(optax.tree.bias_correction)     # float ** integer count
jax.nn.dot_product_attention = promoting(jax.nn.dot_product_attention)     # bfloat16 to float32


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Allows promotion in a test marked `promotes`, and in the fixtures that are set up for it."""
    if item.get_closest_marker("promotes") is None:
        return (yield)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return (yield)


# By CPU time. They start first, so that all workers end at about the same time.
LONG_FILES = ("test_loop.py", "test_update.py", "test_engine.py", "test_family.py",
              "test_attention.py", "test_processes.py", "test_draws.py")


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first."""
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish():
    """Collects garbage less often: tracing makes many objects that stay, and a seventh of its time
    went into looking through them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


MOST_MAPS = 20_000


def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs between two files once there are many.

    A program takes several memory maps. Linux gives a process 65,530 of them (vm.max_map_count),
    and XLA ends a process that asks for more, without a word."""
    maps = Path("/proc/self/maps")
    if nextitem is None or nextitem.path == item.path or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def cheap():
    """Makes the runs of a file cheap: equal ones share what they compile, pictures are blank."""
    import cheap_runs

    with cheap_runs.cheap_runs():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a model that a few steps change, 16 training and 8 test problems."""
    import small_runs

    return small_runs.write_world(tmp_path_factory.mktemp("world"), train=16, test=8, first=100)
