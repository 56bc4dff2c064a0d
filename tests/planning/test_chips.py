"""Targets by name: what they are, and one line for every mistake."""

import math

import pytest

from effreason.planning import chips
from effreason.runtime.errors import UserError


@pytest.mark.parametrize(("text", "count", "kind"), [
    ("tpu:v5e:4x4", 16, "tpu"), ("tpu:v5p:2x2x4", 16, "tpu"), ("tpu:v6e:4x4", 16, "tpu"),
    ("tpu:v5e:1x1", 1, "tpu"), ("tpu:v5p:8x8x16", 1024, "tpu"), ("gpu:h100:8", 8, "gpu"),
    ("gpu:h200:8", 8, "gpu"), ("gpu:h100:2x8", 16, "gpu"), ("gpu:a100:1", 1, "gpu"),
    ("cpu", 1, "cpu"), ("cpu:8", 8, "cpu")])
def test_targets(text, count, kind):
    target = chips.parse(text)
    assert (target.chips, target.kind, target.text) == (count, kind, text)
    assert target.chip.hbm_bytes > 0 and target.chip.flops > 0


@pytest.mark.parametrize(("text", "message"), [
    ("tpu", "expected cpu or one of tpu:v5e"), ("v5e:4x4", "expected cpu or one of"),
    ("tpu:v9:4x4", "expected cpu or one of"),
    ("gpu:h100", "expected a size after gpu:h100, such as 8 or 2x8"),
    ("tpu:v5e:4by4", "such as 4x4, found '4by4'"), ("tpu:v5e:0x4", "found '0x4'"),
    ("tpu:v5e:2x2x4", "has 2 axes, such as 4x4, found 3"),
    ("tpu:v5p:4x4", "has 3 axes, such as 4x4x4, found 2"),
    ("tpu:v5e:32x32", "at most 256 chips, found 1,024"), ("tpu:v5e:3x4", "must be even"),
    ("gpu:h100:16", "at most 8 GPUs, found 16"), ("gpu:h100:2x2x8", "expected GPUs or NODESxGPUS"),
    ("cpu:none", "number of virtual devices"), ("", "expected cpu or one of")])
def test_mistakes_are_one_line(text, message):
    with pytest.raises(UserError) as error:
        chips.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value) and str(
        error.value).startswith("--chips")


def test_a_group_uses_as_many_torus_axes_as_it_needs():
    v5e, v5p = chips.parse("tpu:v5e:4x4"), chips.parse("tpu:v5p:2x2x4")
    link = v5e.chip.link_bandwidth
    # lines: only 16 chips close to a ring
    assert v5e.bandwidth(4) == link and v5e.bandwidth(16) == 2 * link
    assert chips.parse("tpu:v5e:16x16").bandwidth(16) == 2 * link
    assert v5p.bandwidth(4) == 2 * v5p.chip.link_bandwidth  # the axis of 4 is a ring
    assert v5p.bandwidth(16) == 4 * v5p.chip.link_bandwidth
    assert v5e.bandwidth(1) == math.inf


def test_gpus_of_several_nodes_share_adapters():
    one, two = chips.parse("gpu:h100:8"), chips.parse("gpu:h100:2x8")
    assert one.bandwidth(8) == two.bandwidth(8) == one.chip.link_bandwidth
    assert two.bandwidth(16) == 8 * two.chip.network_bandwidth  # whole nodes: all adapters
    assert two.bandwidth(2, stride=8) == two.chip.network_bandwidth         # one GPU of each
