"""What a run says about its length before it starts."""

import pytest

from effreason.planning import shapes
from effreason.runs import outlook
from effreason.runtime import config as configuration
from effreason.types import Problem

CONFIG = configuration.load(configuration.shipped() / "r1_distill_1p5b_h100.yaml")
PROBLEMS = [Problem(uid=0, prompt=(1,) * 100, text="", reference="", level="all")]


@pytest.mark.parametrize(("kind", "devices", "hosts", "text", "shape"), [
    ("TPU v5 lite", 16, 4, "tpu:v5e", (16,)), ("TPU v5", 8, 2, "tpu:v5p", (8,)),
    ("TPU v6 lite", 4, 1, "tpu:v6e", (4,)), ("NVIDIA H100 80GB HBM3", 16, 2, "gpu:h100", (2, 8)),
    ("NVIDIA A100-SXM4-80GB", 1, 1, "gpu:a100", (1, 1)), ("cpu", 1, 1, "cpu", (1,))])
def test_these_devices_are_a_machine_to_plan_for(kind, devices, hosts, text, shape):
    target = outlook.present(kind, devices, hosts)
    assert (target.text, target.shape, target.chips) == (text, shape, devices)


def test_an_unknown_chip_has_no_outlook():
    assert outlook.present("AMD Instinct MI300X", 8, 1) is None


@pytest.fixture
def on(monkeypatch):
    def put(kind):
        target = outlook.present(kind, 1, 1)
        monkeypatch.setattr(outlook, "present", lambda *machine: target)
    return put


def test_a_long_run_is_announced_with_its_step_and_evaluation(on):
    on("NVIDIA H100 80GB HBM3")
    line = outlook.outlook(CONFIG, shapes.open_decoder(CONFIG), PROBLEMS)
    assert line.startswith("by formula, with 4,000 tokens in a response, a step takes about ")
    assert "h" in line.partition(" and the run ")[2] and line.endswith(" of it evaluation")


def test_what_does_not_fit_is_announced(on):
    on("TPU v5 lite")
    line = outlook.outlook(CONFIG, shapes.open_decoder(CONFIG), PROBLEMS)
    assert line.startswith("warning: by formula unstack does not fit into the memory of TPU v5e")


def test_a_small_model_needs_no_word(on):
    on("cpu")
    tiny = configuration.load(configuration.shipped() / "tiny.yaml")
    assert outlook.outlook(tiny, shapes.open_decoder(tiny), PROBLEMS) is None
