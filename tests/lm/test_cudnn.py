"""cuDNN's attention without a GPU: what JAX offers for it, and how rows are described to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effreason.lm import cudnn


def test_rows_are_packed_from_the_first_right_version_on(monkeypatch):
    assert cudnn.private_module() is not None
    assert cudnn.can_pack() == (jax.__version_info__ >= (0, 11, 2))
    monkeypatch.setattr(cudnn.importlib, "import_module", lambda name: object())
    assert cudnn.private_module() is None and not cudnn.can_pack()
    with cudnn.described((9, 0)):       # changes nothing
        pass


def test_a_described_gpu_has_its_capability_and_no_longer_afterwards():
    module = cudnn.private_module()
    with cudnn.described((8, 0)):
        assert module.check_compute_capability("8.0") and not module.check_compute_capability("9.0")
        assert module.check_cudnn_version() == cudnn.DESCRIBED_VERSION
    with cudnn.described((9, 0)):
        assert module.check_compute_capability("9.0")
    assert not module.check_compute_capability("8.0")


@pytest.mark.parametrize(("segments", "lengths", "starts"), [
    ([1, 1, 1, 1], [4, -1, -1], [0, -1, -1, -1]),
    ([1, 2, 2, 0], [1, 2, -1], [0, 1, -1, -1]),
    ([1, 2, 3, 3], [1, 1, 2], [0, 1, 2, -1]),
    ([0, 0, 0, 0], [-1, -1, -1], [-1, -1, -1, -1])])
def test_lengths_and_starts_of_the_sequences_in_a_row(segments, lengths, starts):
    computed = cudnn.sequence_bounds(jnp.array([segments, segments], jnp.int32), most=3)
    np.testing.assert_array_equal(computed[0], [lengths] * 2)
    np.testing.assert_array_equal(computed[1], [starts] * 2)
