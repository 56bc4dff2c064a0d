"""Checkpoints: what comes back is what was saved, and a failure costs nothing that was saved
before."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import QWEN2, mesh, place, weights

from effreason.lm import model
from effreason.rl import checkpoints, update
from effreason.rl.checkpoints import Checkpoints
from effreason.runtime.errors import UserError

OPTIMIZER = optax.adamw(1e-3)


def state_on(target, step=0):
    """A state with no two leaves alike, and the shapes and shardings to restore it by."""
    targets = update.state_sharding(QWEN2, OPTIMIZER, target)
    initial = update.make_initial_state(OPTIMIZER, targets)
    state = initial(place(QWEN2, weights(QWEN2), target))
    leaves, tree = jax.tree.flatten(state)
    generator = np.random.default_rng(step)
    filled = [jax.device_put((generator.standard_normal(leaf.shape) * 100).astype(leaf.dtype),
                             leaf.sharding) for leaf in leaves]
    abstract = checkpoints.abstract(jax.eval_shape(initial, model.abstract_params(QWEN2)), targets)
    return jax.tree.unflatten(tree, filled), abstract


def assert_bitwise(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def vector(value):
    return {"weights": np.full(4, value, np.float32)}


def abstract_vector(size=4):
    return jax.ShapeDtypeStruct((size,), np.float32,
                                sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


ABSTRACT_VECTOR = {"weights": abstract_vector()}


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("after", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1)],
                         ids=["the same mesh", "another mesh", "one device"])
def test_a_state_comes_back_bit_for_bit_on_its_shardings(tmp_path, after):
    state, _ = state_on(mesh(data=2, fsdp=4), step=5)
    _, abstract = state_on(mesh(**after))
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(5, state, facts={"wall_seconds": 12.5})
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest == 5
        restored, facts = saved.restore(abstract)
    assert facts == {"wall_seconds": 12.5, "state_digest": checkpoints.digest(state)}
    assert_bitwise(restored, state)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(restored.opt_state))
    assert jax.tree.map(lambda leaf: leaf.sharding,
                        restored) == jax.tree.map(lambda leaf: leaf.sharding, abstract)


def test_the_newest_checkpoints_are_kept_and_one_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest is None
        for step in (0, 3, 6, 7):
            saved.save(step, vector(step), facts={"wall_seconds": step})
        saved.save(7, vector(99), facts={"wall_seconds": 99})
        assert saved.latest == 7
        assert steps_in(tmp_path) == [6, 7]
        state, facts = saved.restore(ABSTRACT_VECTOR)
    assert state["weights"][0] == 7 and facts["wall_seconds"] == 7


def test_a_half_written_checkpoint_of_a_crash_is_not_seen(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(1, vector(1), facts={"wall_seconds": 0})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "rest").write_text("half")
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest == 1
        patience = time.monotonic() + 20
        # orbax clears up on a thread of its own
        while half.exists() and time.monotonic() < patience:
            time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_save_that_fails_is_one_clear_error_and_leaves_the_older_ones(tmp_path, monkeypatch,
                                                                        capfd):
    def failing(*args, **kwargs):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write\n 9 bytes: No space [os_error_code='28']")

    with pytest.raises(UserError) as caught, Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 2):
            saved.save(step, vector(step), facts={"wall_seconds": 0})
        monkeypatch.setattr(saved._checkpointer, "save_checkpointables", failing)
        saved.save(3, vector(3), facts={"wall_seconds": 0})
    assert str(caught.value) == (
        f"{tmp_path / '3'}: the checkpoint cannot be written (No space left on device); "
        "the newest complete one is step 2")
    assert steps_in(tmp_path) == [1, 2]
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.restore(ABSTRACT_VECTOR)[0]["weights"][0] == 2
    assert capfd.readouterr() == ("", "")


# Real writes that fail: the system refuses files of more than a few kilobytes, as a full disk
# would.
FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from effreason.rl.checkpoints import Checkpoints
from effreason.runtime.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"weights": np.random.default_rng(0).standard_normal(50_000, np.float32)}
try:
    with Checkpoints(Path(sys.argv[1]), keep=2) as saved:
        saved.save(1, state, facts={"wall_seconds": 0})
        saved.save(2, state, facts={"wall_seconds": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        saved.save(3, state, facts={"wall_seconds": 0})
except UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_clear_error_and_leaves_the_older_ones(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"{tmp_path / '3'}: the checkpoint cannot be written (File too large); "
                           "the newest complete one is step 2\n")
    with Checkpoints(tmp_path, keep=2) as saved:
        state, _ = saved.restore({"weights": abstract_vector(50_000)})
    assert steps_in(tmp_path) == [1, 2]
    np.testing.assert_array_equal(state["weights"],
                                  np.random.default_rng(0).standard_normal(50_000, np.float32))


@pytest.mark.parametrize("damage", ["shape", "missing", "emptied", "metadata"])
def test_a_checkpoint_that_does_not_fit_is_a_clear_error(tmp_path, damage):
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(4, vector(4), facts={"wall_seconds": 0})
    abstract = ABSTRACT_VECTOR
    if damage == "shape":
        abstract = {"weights": abstract_vector(5)}
    elif damage == "missing":
        abstract = ABSTRACT_VECTOR | {"moments": abstract_vector()}
    elif damage == "emptied":
        for path in Path(tmp_path, "4", "state").rglob("d/*"):
            if path.is_file():
                path.write_bytes(b"")
    else:
        path = tmp_path / "4" / "_CHECKPOINT_METADATA"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    with pytest.raises(UserError, match=r"4: the checkpoint cannot be read \(.+\)") as caught:
        with Checkpoints(tmp_path, keep=2) as saved:
            saved.restore(abstract)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning",
                            "ignore:coroutine .* was never awaited")
def test_every_bit_flip_is_found_or_changes_nothing(tmp_path):
    state, abstract = state_on(mesh(data=1))
    with Checkpoints(tmp_path / "whole", keep=2) as saved:
        saved.save(4, state, facts={"alpha": 0.25})
    found, generator = 0, np.random.default_rng(0)
    files = [path for path in (tmp_path / "whole" / "4").rglob("*") if path.is_file()]
    flips = [(path, int(generator.integers(path.stat().st_size)), int(generator.integers(8)))
             for path in files for _ in range(4 if path.stat().st_size > 1 else 0)]
    for path, at, bit in flips:
        content = path.read_bytes()
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:])
        try:
            with Checkpoints(tmp_path / "whole", keep=None) as saved:
                restored, facts = saved.restore(abstract, 4)
            assert facts["alpha"] == 0.25
            assert_bitwise(restored, state)
        except UserError as error:
            found += "changed after being saved (digest" in str(error)
            assert "\n" not in str(error)
        path.write_bytes(content)
    assert found >= 3 and len(flips) > 20


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8])
def test_a_digest_changes_with_every_bit_and_every_place(dtype):
    values = np.random.default_rng(0).integers(-99, 99, (3, 5)).astype(dtype)
    digests, bits = {checkpoints.digest(values)}, 8 * values.itemsize
    for at in range(values.size):
        for bit in range(bits):
            changed = bytearray(values.tobytes())
            changed[at * values.itemsize + bit // 8] ^= 1 << bit % 8
            digests.add(checkpoints.digest(np.frombuffer(changed, dtype).reshape(3, 5)))
    assert len(digests) == 1 + values.size * bits
    exchanged = values[:, [1, 0, 2, 3, 4]]
    assert checkpoints.digest(exchanged) not in digests


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    with Checkpoints(tmp_path, keep=2) as saved:
        with pytest.raises(FloatingPointError, match="^non-finite weights$"):
            saved.save(1, {"weights": np.array([1, value, 3, 4], np.float32)}, facts={"a": 1})
        assert saved.latest is None


def test_what_a_deletion_left_goes_and_the_newest_whole_checkpoint_is_found(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step in (1, 2, 3):
            saved.save(step, vector(step), facts={"a": step})
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    for path in (tmp_path / "3" / "state").rglob("d/*"):
        path.write_bytes(b"")
    with Checkpoints(tmp_path, keep=3) as saved:
        assert saved.newest_whole(ABSTRACT_VECTOR, before=3) == 2
        assert saved.newest_whole(ABSTRACT_VECTOR, before=2) is None
        saved.remove_left_overs()
        assert saved.steps == steps_in(tmp_path) == [2, 3]
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.remove_left_overs()
    assert steps_in(tmp_path) == [3]
