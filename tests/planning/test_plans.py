"""`effreason plan` on a small model: compiled for virtual devices, by formulas, the search."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effreason.cli import main
from effreason.cli import plan as commands
from effreason.planning import chips, compile, costs, plans, search, shapes, tables, workloads
from effreason.planning.costs import Cost
from effreason.rl import learner, packing
from effreason.runs import session
from effreason.runtime import config as configuration
from effreason.runtime import config_parser, sharding
from effreason.runtime.errors import UserError
from effreason.sampling.scheduler import CacheLimits

SHAPE = {"model_type": "qwen2", "vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
         "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096,
         "tie_word_embeddings": False}
FLAGS = ["--data.path", "tiny", "--data.max_prompt_tokens", "64", "--rollout.max_new_tokens", "192",
         "--rollout.prompts_per_step", "4", "--rollout.group_size", "4", "--rollout.slots", "16",
         "--model.dtype", "float32", "--update.rows_per_micro_batch", "8",
         "--update.updates_per_batch", "2", "--update.vocabulary_tile", "512", "--run.steps", "10"]
MESH = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
INPUTS = plans.PlanInputs(mean_tokens=48, prompt_tokens=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with nothing but config.json: a plan needs no more."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture(scope="module")
def config(model):
    parser = config_parser.parser(configuration.Config, "plan")
    return configuration.parse(parser, ["--model.path", model, *FLAGS])[0]


def on(config, data=1, fsdp=1, tensor=1, context=1, remat="full"):
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat=remat), mesh=dataclasses.replace(
            config.mesh, data=data, fsdp=fsdp, tensor=tensor, context=context))


def planned(config, target, **options):
    decoder = shapes.open_decoder(config)
    return plans.make_plan(config, decoder, chips.parse(target), INPUTS, **options)


@pytest.fixture(scope="module")
def whole(config):
    return planned(on(config, data=2, fsdp=2, tensor=2), "cpu:8")


# Lengths and schedules


@pytest.mark.parametrize(("count", "mean", "most"), [
    (256, 4044, 32000), (64, 100, 4096), (16, 90, 100), (8, 1, 50)])
def test_lengths_have_their_mean_and_their_limit(count, mean, most):
    drawn = workloads.lengths(count, mean, most)
    assert drawn.min() >= 1 and drawn.max() <= most
    assert drawn.mean() == pytest.approx(mean, rel=0.02, abs=1)
    np.testing.assert_array_equal(drawn, workloads.lengths(count, mean, most))


def schedule(lengths, slots, seconds, smallest=1, prompt=0, **limits):
    return workloads.generate(np.array(lengths), prompt_tokens=prompt, smallest=smallest,
                              limits=CacheLimits(slots=slots, **limits), seconds=seconds)[0]


def test_a_schedule_by_hand():
    def one(slots, capacity, live):
        return 1.0

    assert schedule([5, 3, 2], 3, one) == 5
    assert schedule([5, 3, 2], 1, one) == 10
    assert schedule([3, 2, 4], 2, one) == 6             # the third begins when the second has ended

    def each(slots, capacity, live):
        return slots

    assert schedule([1, 9], 2, each) == 2 + 8           # the tail runs in one slot
    assert schedule([1, 9], 2, each, smallest=2) == 18


def test_a_schedule_with_less_memory_by_hand():
    """Room for 4 slots of 64 positions, 2 of 128. Chunks of 3 steps: a response of up to 60 tokens
    runs in a small one."""
    seen = []

    def record(slots, capacity, live):
        seen.append((slots, capacity))
        return 1.0

    limits = dict(smallest=64, largest=128, chunk=3, budget=256)
    seconds, again = workloads.generate(
        np.array([100, 100, 10, 10, 50, 50]), prompt_tokens=0, smallest=4, seconds=record,
        limits=CacheLimits(slots=6, **limits))
    assert seconds == 61 + 39 and again == 0            # when they grow, two are left
    assert list(dict.fromkeys(seen)) == [(4, 64), (2, 96), (2, 128)]

    seconds, again = workloads.generate(
        np.array([100, 100, 100, 60]), prompt_tokens=0, smallest=4, seconds=record,
        limits=CacheLimits(slots=6, **limits))
    # At step 61 three need a larger slot, of which there are two.
    assert seconds == 61 + 39 + 39 and again == 61

    seconds, again = workloads.generate(
        np.array([100, 100, 100, 100, 60, 60]), prompt_tokens=0, smallest=4, seconds=record,
        limits=CacheLimits(slots=6, **limits))
    # All four leave their slots to the short ones.
    assert seconds == 61 + 60 + 39 + 39 and again == 4 * 61


def test_the_live_tokens_of_a_schedule():
    seen = []

    def record(slots, capacity, live):
        seen.append(live)
        return 0.0

    schedule([4, 4, 2], 2, record, prompt=10)
    assert seen == [2 * 12, 11]  # half way of each stretch; the last one alone


def test_packed_rows_hold_all_tokens(config):
    work = workloads.make_workload(config, mean_tokens=48, prompt_tokens=32)
    positions = work.micro_batches * work.rows * work.width * config.update.updates_per_batch
    assert (work.width == 256
            and positions * work.packing_efficiency == pytest.approx(work.tokens + 16 * 32))
    alone = workloads.make_workload(config, mean_tokens=48, prompt_tokens=32,
                                    sequences_per_row=1)
    assert alone.pair_batches <= alone.micro_batches


def test_every_update_has_its_own_micro_batches(config):
    """A step computes what its updates need together, not for each what the largest needs."""
    config = dataclasses.replace(
        config, update=dataclasses.replace(config.update, updates_per_batch=4,
                                           rows_per_micro_batch=1))
    work = workloads.make_workload(config, mean_tokens=100, prompt_tokens=32)
    sizes, widths = work.lengths + 32, packing.row_widths(work.width)
    needed = [sum(len(rows) * width for rows, width in zip(
        packing.assign_rows(sizes, range(update, len(sizes), 4), widths, work.rows), widths,
        strict=True)) for update in range(4)]
    assert max(needed) > min(needed)
    assert work.micro_batches * work.rows * work.width == pytest.approx(sum(needed) / 4)


# Plans by compilation


def test_a_compiled_plan(whole):
    assert list(whole.functions) == list(commands.FUNCTIONS)
    assert whole.all_fit and whole.run is not None and whole.shape == (2, 2, 2, 1)
    for function in whole.functions.values():
        assert function.source == "compiled" and 0 < function.own_bytes < function.hbm_bytes
    # Permutations, of log-probs to the devices of their responses, have cycles of any length.
    sums = [one for one in whole.functions["gradients"].cost.collectives
            if one.bytes and one.kind != "collective-permute"]
    assert {one.group for one in sums} <= {2, 4, 8} and sums
    run = whole.run
    assert run.step_seconds == pytest.approx(run.rollout_seconds + run.score_seconds
                                             + run.update_seconds)
    assert run.hours == pytest.approx(10 * run.step_seconds / 3600 + run.evaluation_hours)
    assert run.chip_hours == pytest.approx(8 * run.hours) and run.money is None


def test_flops_are_those_of_the_shape(whole):
    weights = 2 * 64 * (4 * 16 * 2 + 2 * 16 * 2 + 3 * 256) + 2048 * 64
    per_slot = 2 * weights / 2                          # split over tensor; 16 slots over 4
    attention = 4 * whole.capacity * 4 * 16 * 2 / 2     # XLA attends to the whole cache
    assert whole.functions["decode"].cost.flops == pytest.approx(4 * (per_slot + attention),
                                                                 rel=0.02)


@pytest.mark.parametrize(("mesh", "remat"), [(dict(), "full"), (dict(data=2, fsdp=2), "none"),
                                             (dict(tensor=2), "full"), (dict(context=2), "full")])
def test_formulas_against_compiled_programs(config, mesh, remat):
    setting = on(config, **mesh, remat=remat)
    model = dataclasses.replace(setting.model, attention="xla")
    setting = dataclasses.replace(setting, model=model)
    target = f"cpu:{math.prod(mesh.values())}"
    names = ("decode", "score", "gradients", "apply_gradients") if not mesh else ("gradients",)
    compiled, formula = (planned(setting, target, names=names, compiled=compiles).functions
                         for compiles in (True, False))

    for name in names:
        computed, expected = formula[name], compiled[name]
        sizes = computed.hbm_bytes, expected.hbm_bytes
        assert computed.source == "analytic"
        assert 0.5 < sizes[0] / sizes[1] < 2, (name, *sizes)
        if name in ("score", "gradients"):
            assert computed.cost.flops == pytest.approx(expected.cost.flops, rel=0.05), name


@pytest.mark.parametrize(("updates", "whiten", "calls"),
                         [(1, False, 0), (4, False, 0.75), (1, True, 1), (4, True, 1)])
def test_the_policy_is_scored_for_what_reads_it_before_the_gradients(config, updates, whiten,
                                                                     calls):
    setting = dataclasses.replace(
        config, update=dataclasses.replace(config.update, updates_per_batch=updates),
        advantage=dataclasses.replace(config.advantage, whiten=whiten))
    score = planned(setting, "cpu", names=("score",), compiled=False).functions["score"]
    assert (score.calls, score.per) == (calls, "a step" if calls else "a save")


@pytest.mark.slow
def test_thousands_of_responses_are_split_over_the_chips(config):
    rollout = dataclasses.replace(config.rollout, prompts_per_step=4096)
    many = on(dataclasses.replace(config, rollout=rollout), data=8)
    names = ("score", "score_reference", "experience", "gradients", "apply_gradients")
    compiled, formula = (planned(many, "cpu:8", names=names, compiled=compiles)
                         for compiles in (True, False))

    of_tokens = 4 * 16_384 * 192
    for name in ("score", "experience"):
        computed, expected = formula.functions[name], compiled.functions[name]
        sizes = computed.hbm_bytes, expected.hbm_bytes
        # Whole are in `experience` two of the dozen arrays that it takes, makes and returns.
        assert expected.own_bytes < (2 if name == "score" else 6) * of_tokens, name
        assert 0.5 < sizes[0] / sizes[1] < 2, (name, *sizes)

    few = planned(on(config, data=8), "cpu:8", names=names, compiled=False).functions
    # Other memory: an eighth of 1 - 16 / 16,384 of these arrays more than with 16.
    for plan in (compiled, formula):
        for name, count in (("score", 1), ("score_reference", 2), ("gradients", 1)):
            added = plan.functions[name].other_bytes - few[name].other_bytes
            assert added == pytest.approx(count * of_tokens / 8, rel=0.01), name

    # A chip with a little less than the experience needs: the plan says so.
    needed = max(function.hbm_bytes for function in compiled.functions.values())
    chip = dataclasses.replace(compiled.target.chip, hbm_bytes=needed - 1)
    small = dataclasses.replace(compiled.target, chip=chip)
    assert compiled.all_fit and not dataclasses.replace(compiled, target=small).all_fit
    assert compiled.functions["experience"].hbm_bytes == needed


def test_saving_attention_saves_nothing_of_cudnn(config):
    def gradients(remat, platform):
        model = dataclasses.replace(config.model, dtype="bfloat16")
        setting = on(dataclasses.replace(config, model=model), remat=remat)
        plan = planned(setting, platform, names=("gradients",), compiled=False)
        function = plan.functions["gradients"]
        return function.cost.flops, function.own_bytes

    assert gradients("attention", "gpu:h100:1") == gradients("full", "gpu:h100:1")
    assert gradients("attention", "cpu")[0] < gradients("full", "cpu")[0]
    assert gradients("attention", "cpu")[1] > gradients("full", "cpu")[1]


def test_more_chips_hold_less_each(config):
    plans_by_count = (planned(on(config, fsdp=count), f"cpu:{count}", names=("apply_gradients",))
                      for count in (1, 8))
    one, eight = (plan.functions["apply_gradients"].own_bytes for plan in plans_by_count)
    assert eight < one / 7


def test_what_is_on_the_host_is_not_on_the_chip(config):
    offloaded = dataclasses.replace(
        config, update=dataclasses.replace(config.update, offload_optimizer=True),
        kl=dataclasses.replace(config.kl, offload_reference=True))
    chip, host = (planned(on(setting, fsdp=2), "cpu:2", names=("decode",)).functions["decode"]
                  for setting in (config, offloaded))
    moments_and_reference = (8 + 4) * shapes.weight_count(shapes.open_decoder(config)) / 2
    assert chip.other_bytes - host.other_bytes == pytest.approx(moments_and_reference, rel=0.01)


def test_a_program_that_is_too_large_is_no_traceback():
    message = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
               "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.")
    assert compile.needed_bytes(message) == 20.5 * 2**30
    assert compile.needed_bytes(
        "RESOURCE_EXHAUSTED: Allocation (size=1024) would exceed memory (size=1)") == 1024
    assert compile.needed_bytes("INVALID_ARGUMENT: something else") is None


# The command


def planned_by_command(capsys, argv, code=0):
    """What the command prints on standard output."""
    if code == 1:
        with pytest.raises(SystemExit) as stop:
            main.main(["plan", *argv])
        assert stop.value.code == 1
    else:
        assert main.main(["plan", *argv]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if code != 2 else err


def test_json_and_table(capsys, model):
    argv = ["--model.path", model, *FLAGS, *MESH, "--chips", "cpu:8", "--functions",
            "decode,apply_gradients", "--json", "--price-per-chip-hour", "2"]
    table = json.loads(planned_by_command(capsys, argv))
    assert table["fits"] is True and table["run"] is None
    assert list(table["functions"]) == ["decode", "apply_gradients"]
    for function in table["functions"].values():
        assert function["hbm_bytes"] > 0 and function["seconds"] > 0
        assert function["source"] == "compiled" and function["fits"]
        assert {"flops", "bytes", "collectives", "limit"} <= function.keys()
    assert table["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.fixture
def no_gpu_compiler(monkeypatch):
    monkeypatch.setattr(chips, "has_compiler", lambda kind: kind != "gpu")


def test_rollouts_are_a_range_unless_their_bandwidth_is_given(capsys):
    argv = ["--config", "configs/r1_distill_1p5b.yaml", "--chips", "tpu:v5e:4x4", "--analytic"]
    text = planned_by_command(capsys, argv)
    table = json.loads(planned_by_command(capsys, [*argv, "--json"]))
    low, high = table["step_seconds"]
    fast, slow = table["run"]["rollout_seconds"]
    assert table["run"]["step_seconds"] == [low, high] and high - low == pytest.approx(slow - fast)
    assert 1.3 < slow / fast < 1.5 and isinstance(table["run"]["update_seconds"], float)
    assert f"step      {tables.duration(low)} to {tables.duration(high)}" in text
    assert "decoding at 40% to 60%" in text

    one = json.loads(planned_by_command(capsys, [*argv, "--json", "--memory-efficiency", "0.6"]))
    assert one["step_seconds"] == one["run"]["step_seconds"] == pytest.approx(low)


def test_a_plan_for_gpus_is_by_formula_and_says_so(capsys, no_gpu_compiler):
    argv = ["--config", "configs/r1_distill_1p5b.yaml", "--chips", "gpu:h100:2x8",
            "--price-per-chip-hour", "3"]
    main.main(["plan", *argv])
    text, progress = capsys.readouterr()
    assert "effreason[cuda13]" in progress
    assert "formulas (analytic)" in text and "kWh" in text and "in money" in text
    assert max(map(len, text.splitlines())) <= 80
    table = json.loads(planned_by_command(capsys, [*argv, "--json"]))
    np.testing.assert_allclose(table["run"]["money"], np.multiply(3, table["run"]["chip_hours"]))
    assert {function["source"] for function in table["functions"].values()} == {"analytic"}


def test_what_does_not_fit_ends_with_1(capsys, no_gpu_compiler):
    argv = ["--config", "configs/r1_distill_7b.yaml", "--chips", "gpu:h100:1", "--mesh.fsdp", "1",
            "--mesh.tensor", "1"]
    text = planned_by_command(capsys, argv, code=1)
    assert "DOES NOT FIT" in text and " NO" in text


@pytest.mark.parametrize(("argv", "message"), [
    ([], "--chips must name the machine"),
    (["--chips", "tpu:v5e:4"], "--chips tpu:v5e:4: a TPU v5e slice has 2 axes"),
    (["--chips", "cpu", "--functions", "decode,update"], "--functions must be among unstack"),
    (["--chips", "cpu", "--mean-tokens", "0"], "--mean-tokens must be a number in [1, 288], got 0"),
    (["--chips", "cpu", "--mean-tokens", "nan"],
     "--mean-tokens must be a number in [1, 288], got nan"),
    (["--chips", "cpu", "--price-per-chip-hour", "nan"],
     "--price-per-chip-hour must be a number >= 0 and finite, got"),
    (["--chips", "cpu", "--compute-efficiency", "abc"],
     "--compute-efficiency must be a number in (0, 1], got abc"),
    (["--chips", "cpu", "--watts", "-1"], "--watts must be a number >= 0 and finite, got -1"),
    (["--chips", "cpu", "--compute-efficiency", "1.5"],
     "--compute-efficiency must be a number in (0, 1], got 1.5"),
    (["--chips", "cpu", "--output", "x.yaml"], "--output needs --fit"),
    (["--chips", "cpu", "--fit", "--output", "setup.py"], "setup.py already exists"),
    (["--chips", "gpu:h100:8", "--mesh.fsdp", "3"], "= 6, --chips has 8; --fit finds a mesh"),
    (["--chips", "gpu:h100:8", "--mesh.tensor", "8"], "mesh.tensor must divide the model's"),
    (["--chips", "gpu:h100:1", "--model.attention", "splash"],
     "model.attention splash does not fit: platform is gpu, the splash kernel expects tpu"),
    (["--chips", "gpu:h100:2", "--fit", "--model.attention", "splash"],
     "model.attention splash does not fit"),
    (["--chips", "tpu:v5e:1x1", "--analytic", "--model.attention", "cudnn"],
     "model.attention cudnn does not fit: platform is tpu, the cudnn kernel expects gpu"),
    (["--chips", "gpu:h100:8", "--config", "configs/qwen3_8b.yaml", "--rollout.max_new_tokens",
      "64000"], "must be at most the model's 40960 positions, got 64512"),
    (["--chips", "cpu", "--model.path", "nowhere/at-all", "--evaluation.problems", "0"],
     "nowhere/at-all"),
])
def test_mistakes_are_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    err = planned_by_command(capsys, argv, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_without_libtpu_the_error_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    err = planned_by_command(capsys, ["--chips", "tpu:v5e:4x4"], code=2)
    assert err == (
        "error: --chips tpu:v5e:4x4: needs libtpu, which compiles for TPUs on any Linux machine: "
        'pip install "effreason[tpu]"\n')


def test_a_mistake_is_found_before_jax_is_imported():
    program = ("import sys; from effreason.cli.main import main; code = "
               "main(['plan', '--chips', 'tpu:v5e:5']);"
               "assert not {'jax', 'transformers'} & sys.modules.keys(); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --chips tpu:v5e:5")


GPU_RECIPES = [
    ("r1_distill_1p5b_h100", "gpu:h100:1"), ("r1_distill_1p5b_8xh100", "gpu:h100:8"),
    ("r1_distill_7b_8xh100", "gpu:h100:8"), ("r1_distill_7b_8xh100", "gpu:h200:8"),
    ("r1_distill_1p5b_h200", "gpu:h200:1")]


@pytest.mark.parametrize(("name", "target"), GPU_RECIPES)
def test_the_recipes_for_gpus_are_those_for_tpus_on_another_mesh_and_fit(
        capsys, no_gpu_compiler, name, target):
    size = name.split("_")[2]
    ours, theirs = (configuration.load(f"configs/{recipe}.yaml")
                    for recipe in (name, f"r1_distill_{size}"))
    changed = {line.split(":")[0] for line in configuration.differences(theirs, ours)}
    assert changed <= {"mesh.fsdp", "mesh.tensor", "model.remat", "update.rows_per_micro_batch",
                       "rollout.max_new_tokens"}
    text = planned_by_command(capsys, ["--config", f"configs/{name}.yaml", "--chips", target])
    assert "\nfits: " in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("name", "target", "changes", "fits_whole"), [
    ("r1_distill_7b_lora_h100", "gpu:h100:1", [], False),
    ("r1_distill_7b_lora_h100", "tpu:v5e:2x4", [
        "--mesh.fsdp", "4", "--mesh.tensor", "2", "--update.rows_per_micro_batch", "8"], False),
    ("r1_distill_1p5b_lora_v5e8", "tpu:v5e:2x4", [], True),
    ("qwen3p5_4b_lora_h100", "gpu:h100:1", [], False),
    ("qwen3p5_9b_lora_h100", "gpu:h100:1", [], False),
    ("qwen3p5_9b_lora_v5e16", "tpu:v5e:4x4", [], False),
    ("qwen3_30b_a3b_lora_8xh200", "gpu:h200:8", [], True),
    ("qwen3_30b_a3b_lora_8xh200", "gpu:h100:8", [], False)])
def test_the_recipes_with_adapters_fit(capsys, no_gpu_compiler, name, target, changes, fits_whole):
    arguments = ["--config", f"configs/{name}.yaml", "--chips", target, "--analytic", *changes]
    with_adapters = planned_by_command(capsys, arguments)
    assert "\nfits: " in with_adapters
    whole = planned_by_command(capsys, [*arguments, "--adapter.rank", "0"],
                               code=0 if fits_whole else 1)
    assert ("\nfits: " in whole) == fits_whole

    def memory(text):
        return float(re.search(r"(?:fits|FIT): ([0-9.]+) of", text)[1])

    assert memory(with_adapters) < memory(whole)


def test_recipes_are_found_by_model_and_devices():
    large = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert configuration.recipes(large, 8) == ["configs/r1_distill_7b_8xh100.yaml"]
    assert configuration.recipes(large, 16) == ["configs/r1_distill_7b.yaml"]
    assert configuration.recipes(large, 7) == configuration.recipes("other", 8) == []


def test_a_recipe_for_other_devices_names_those_for_these():
    config = configuration.load("configs/r1_distill_1p5b.yaml")
    with pytest.raises(UserError, match="expected 8, the number of devices; for 8 there is "
                       "configs/r1_distill_1p5b_8xh100.yaml or "
                       "configs/r1_distill_1p5b_lora_v5e8.yaml$"):
        session.make_mesh(config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path="other"))
    with pytest.raises(UserError, match="expected 8, the number of devices$"):
        session.make_mesh(other)


@pytest.mark.parametrize(("name", "target", "rate"), [
    ("r1_distill_1p5b", "tpu:v5e:4x4", 5e-6), ("r1_distill_7b", "tpu:v5p:2x2x4", 2e-6),
    ("qwen3_1p7b", "tpu:v5e:4x4", 5e-6), ("qwen3_8b", "tpu:v5p:2x2x4", 2e-6)])
def test_the_recipes_are_the_papers_and_fit(capsys, name, target, rate):
    config = configuration.load(f"configs/{name}.yaml")
    rollout, update = config.rollout, config.update
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_new_tokens,
            config.run.steps) == (32, 8, 32000, 100)
    assert (update.learning_rate, update.beta1, update.beta2, update.weight_decay,
            update.max_grad_norm, update.warmup_updates, update.updates_per_batch) == (
        rate, 0.9, 0.95, 0.0, 1.0, 6, 2)
    assert (config.kl.form, config.kl.coefficient, rollout.temperature, config.model.dtype) == (
        "reward", 0.001, 1.0, "bfloat16")
    assert (config.data.max_prompt_tokens, config.data.path) == (512, "paper")
    assert (config.evaluation.path, config.evaluation.samples,
            config.evaluation.temperature) == ("math500", 3, 0.6)
    text = planned_by_command(capsys, ["--config", f"configs/{name}.yaml", "--chips", target,
                                       "--analytic"])
    assert "\nfits: " in text and max(map(len, text.splitlines())) <= 80


# The search


def test_meshes_divide_the_model(config):
    decoder = shapes.open_decoder(config)
    meshes = list(search.meshes(decoder, 8))
    assert all(math.prod(mesh) == 8 for mesh in meshes) and len(set(meshes)) == len(meshes)
    assert (8, 1, 1, 1) in meshes and (1, 2, 2, 2) in meshes
    assert not any(mesh[2] > 2 for mesh in meshes)      # two key/value heads


def test_the_search_unrolls_no_deep_model(config):
    decoder = shapes.open_decoder(config)
    target = chips.parse("cpu:4")
    deep = dataclasses.replace(decoder, layers=28)
    def remats(decoder):
        return {candidate.model.remat for candidate in search.candidates(config, decoder, target)}

    assert remats(decoder) == {"full", "attention", "none"}
    assert remats(deep) == {"full", "attention"}


@pytest.mark.slow
def test_the_search_finds_what_fits_into_little_memory(config):
    decoder = shapes.open_decoder(config)
    target = chips.parse("cpu:4")
    tight = dataclasses.replace(target, chip=dataclasses.replace(target.chip, hbm_bytes=12e6))
    as_it_is = plans.make_plan(on(config, data=4), decoder, tight, INPUTS,
                               names=("gradients", "apply_gradients"))
    assert not as_it_is.all_fit
    lines = []
    plan = search.search(config, decoder, tight, INPUTS, log=lines.append)
    assert plan.all_fit and plan.run is not None
    assert plan.functions["gradients"].source == "compiled"
    assert math.prod(plan.shape) == 4 and any("candidates by formula" in line for line in lines)


def test_the_search_for_gpus_needs_no_compiler(capsys, tmp_path, no_gpu_compiler):
    path = tmp_path / "found.yaml"
    text = planned_by_command(capsys, ["--config", "configs/r1_distill_7b.yaml", "--chips",
                                       "gpu:h100:8", "--fit", "--output", str(path)])
    fitting = configuration.load(path)
    mesh = fitting.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == 8
    assert f"mesh: data {mesh.data} x" in text
    assert fitting.update.rows_per_micro_batch % (mesh.data * mesh.fsdp) == 0
    again = planned_by_command(capsys, ["--config", str(path), "--chips", "gpu:h100:8"])
    assert again.splitlines()[1:] == text.splitlines()[1:]


# Shapes, numbers


@pytest.mark.parametrize(("name", "billions"), [
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.777),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.616), ("Qwen/Qwen3-1.7B", 1.721),
    ("Qwen/Qwen3-8B", 8.191)])
def test_the_shipped_shapes_have_as_many_weights_as_their_models(config, name, billions):
    model = dataclasses.replace(config.model, path=name)
    decoder = shapes.open_decoder(dataclasses.replace(config, model=model))
    assert shapes.weight_count(decoder) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (12.345, "12.3"), (2.449e12, "2.45T"),
                                             (999.96e9, "1T"), (310e9, "310G"), (1500, "1.5k"),
                                             (math.inf, "-")])
def test_numbers_with_prefixes(value, text):
    assert tables.scaled(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.2e-5, "12 us"), (0.0167, "16.7 ms"),
                                               (2.454, "2.45 s"), (600, "10 min"), (36000, "10 h")])
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_a_roofline_waits_for_the_slowest():
    target, efficiency = chips.parse("tpu:v5e:4x4"), INPUTS.efficiency
    from effreason.planning.costs import Collective
    from effreason.planning.estimates import roofline

    chip = target.chip
    assert roofline(Cost(flops=chip.flops, bytes=chip.hbm_bandwidth / 10), target,
                    efficiency) == (2.0, "compute")
    assert roofline(Cost(flops=chip.flops / 10, bytes=chip.hbm_bandwidth * 6), target,
                    efficiency)[1] == "memory"
    sent = Collective("all-gather", 16, 1000, 0.7 * 2 * chip.link_bandwidth)
    assert roofline(Cost(collectives=(sent,)), target, efficiency) == (
        pytest.approx(1 + 1000 * chip.latency), "links")
    assert roofline(Cost(host_bytes=chip.host_bandwidth), target, efficiency) == (1.0, "host")


# GPUs and TPUs, without one


def test_programs_for_a_described_gpu(capsys, tmp_path):
    """Compiled and by formula: both kernels are in the programs, and their memory agrees."""
    pytest.importorskip("jax_cuda13_plugin", reason="JAX's plugin compiles for GPUs; "
                        "pip install effreason[cuda13]")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {
        "head_dim": 128, "hidden_size": 512, "max_position_embeddings": 8192}))
    argv = ["--model.path", str(tmp_path), *FLAGS, "--model.dtype", "bfloat16", "--mesh.fsdp", "2",
            "--mesh.tensor", "2", "--rollout.max_new_tokens", "4032", "--chips", "gpu:h100:4",
            "--functions", "decode,score,gradients", "--json"]
    compiled, formula = (json.loads(planned_by_command(capsys, [*argv, *more]))["functions"]
                         for more in ([], ["--analytic"]))
    for name in compiled:
        one, other = compiled[name], formula[name]
        assert one["source"] == "compiled" and other["source"] == "analytic"
        assert one["flops"] == pytest.approx(other["flops"], rel=0.1), name
        assert 0.6 < one["hbm_bytes"] / other["hbm_bytes"] < 1.4, name
    # Only what is live of the cache is read, and nothing of it is copied.
    assert compiled["decode"]["bytes"] < 1.5 * formula["decode"]["bytes"]


def test_a_tpu_slice_of_several_hosts(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; pip install effreason[tpu]")
    model = str(tmp_path)               # heads that Splash and the paged kernel take
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"head_dim": 128}))
    program = f"""
import sys
from effreason.cli import main
sys.exit(main.main([
    "plan", "--model.path", {model!r}, *{FLAGS!r}, "--model.dtype", "bfloat16", "--mesh.fsdp", "16",
    "--update.rows_per_micro_batch", "16", "--chips", "tpu:v5e:4x4", "--json",
    "--functions", "decode,gradients,apply_gradients"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["fits"] and table["chip_count"] == 16 and table["mesh"]["fsdp"] == 16
    # Of a layer's attention alone, below the diagonal, so many: the kernel's are among them.
    rows, updates = table["row_positions"], table["micro_batches"]
    assert table["functions"]["gradients"]["flops"] > 2 * updates * 11 * 2 * rows**2 / 2 * 4 * 128
    assert 0 < table["functions"]["decode"]["bytes"] < 1e8
    # Nothing of libtpu's own: only the progress.
    assert all(line.startswith("[") for line in done.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "permutes"), [("", False), (f"--{sharding.WINDOWS}=0", True)])
def test_weights_on_a_tpu_are_gathered_whole(config, monkeypatch, flags, permutes):
    """Not by permutes between the products with each shard, unless LIBTPU_INIT_ARGS says so."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; pip install effreason[tpu]")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    setting = on(config, fsdp=8, tensor=2)
    setting = dataclasses.replace(
        setting, model=dataclasses.replace(setting.model, dtype="bfloat16"),
        rollout=dataclasses.replace(setting.rollout, max_new_tokens=960))
    decoder = dataclasses.replace(shapes.open_decoder(setting), width=1536, mlp_width=8960,
                                  dtype=jnp.bfloat16)
    target = chips.parse("tpu:v5e:4x4")
    mesh = compile.target_mesh(setting, target)
    step = learner.Learner(setting, decoder, mesh, tries_kernels=False).lowered(
        setting, width=1024, micro_batches=1)
    with jax.set_mesh(mesh), compile.quiet_stderr(), compile.traceable(target):
        cost = costs.read(step.lower["score"]().compile().as_text())
    shard = 2 * 1536 * 8960 / 16
    sent = sum(one.bytes for one in cost.collectives
               if (one.kind, one.group) == ("collective-permute", 8))
    assert (sent > 2 * 3 * shard) == permutes
    assert permutes or sent < shard
