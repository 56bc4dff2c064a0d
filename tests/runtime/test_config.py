"""The configuration: what is read, what is refused and in which words."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import yaml

from effreason.runtime import config as configuration
from effreason.runtime import config_parser, errors
from effreason.runtime.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    KLConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
)
from effreason.runtime.config_fields import all_settings, meanings, sections
from effreason.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def from_command_line(argv):
    return configuration.parse(config_parser.parser(Config, "train.py"), argv)[0]


def refused(*argv):
    with pytest.raises(UserError) as caught:
        from_command_line(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_arguments_the_tiny_configuration_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = from_command_line([])
    assert config.model.path == config.data.path == "tiny"
    assert config == configuration.load(ROOT / "configs" / "tiny.yaml")
    assert config.data.user_prompt == "{problem}" and config.model.remat == "none"


@pytest.mark.parametrize("flags", [["--model.path", "org/model"], ["--model.path=org/model"],
                                   ["--evaluation.path", "math500"]])
def test_another_model_or_data_set_is_not_given_the_settings_of_the_tiny_world(flags):
    config = from_command_line([*flags, "--run.seed", "3"])
    assert config.update == UpdateConfig() and config.data.user_prompt == DataConfig().user_prompt
    assert config.run.seed == 3 and config.model.dtype == "bfloat16"
    tiny = from_command_line(["--model.path", "tiny", "--run.seed", "3"])
    assert tiny.data.user_prompt == "{problem}"
    named = from_command_line(["--config", "configs/tiny.yaml", *flags])
    assert named.data.user_prompt == "{problem}"                # a file that is asked for is read


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")),
                         ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path):
    assert isinstance(configuration.load(path), Config)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")),
                         ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["tiny", "r1_distill_1p5b"])
def test_every_recipe_changes_a_configuration_below_it(base, recipe):
    below = ["--config", f"configs/{base}.yaml"]
    config = from_command_line([*below, "--config", f"configs/recipes/{recipe.name}"])
    given = yaml.safe_load(recipe.read_text())
    for section, fields in given.items():
        assert {name: getattr(getattr(config, section), name) for name in fields} == fields
    assert config != from_command_line(below) and config.model == from_command_line(below).model


def test_a_shipped_configuration_is_found_away_from_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "configs/smollm2_gsm8k.yaml"]
    assert from_command_line(argv).run.steps == 10
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "smollm2_gsm8k.yaml", "run: {steps: 7}")
    assert from_command_line(argv).run.steps == 7


@pytest.mark.parametrize("argv", [
    ["--reward.alpha", "0.4", "--config", "FILE"],
    ["--config", "FILE", "--reward.alpha", "0.4"],
    ["--config=FILE", "--reward.alpha=0.4"],
])
def test_flags_override_the_file_wherever_it_stands(tmp_path, argv):
    path = write(tmp_path / "a.yaml",
                 "reward: {alpha: 0.3}\nupdate: {learning_rate: 5e-6, beta1: 0.5}\n")
    config = from_command_line([arg.replace("FILE", path) for arg in argv])
    assert config.reward.alpha == 0.4 and config.update.beta1 == 0.5
    assert config.update.learning_rate == 5e-6 and isinstance(config.update.learning_rate, float)
    # the dataclasses' defaults, not those of configs/tiny.yaml
    assert config.rollout == RolloutConfig()


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    first = write(tmp_path / "a.yaml", "reward: {alpha: 0.3}\nrun: {seed: 3}\n")
    second = write(tmp_path / "b.yaml", "reward:\n  alpha: 0.2\nlog:\n  # nothing here\n")
    config = from_command_line(["--config", first, "--config", second])
    assert config.reward.alpha == 0.2 and config.run.seed == 3


def test_values_of_every_kind_from_flags():
    config = from_command_line([
        "--run.resume", "true", "--run.directory", "007", "--evaluation.max_new_tokens", "null",
        "--kl.form", "none",
        "--update.learning_rate", "1e-5", "--data.user_prompt", "{problem}: think",
        "--mesh.data", "-1",
    ])
    assert config.run == dataclasses.replace(config.run, resume=True, directory="007")
    assert config.evaluation.max_new_tokens is None and config.kl.form == "none"
    assert config.update.learning_rate == 1e-5 and config.data.user_prompt == "{problem}: think"


def test_values_of_every_kind_from_a_file(tmp_path):
    path = write(tmp_path / "a.yaml",
                 "run: {directory: null, resume: false}\nevaluation: {max_new_tokens: 9}\n"
                                      "kl: {form: loss, coefficient: 0}\nmodel: {remat: none}\n")
    config = configuration.load(path)
    assert config.run.directory is None and config.evaluation.max_new_tokens == 9
    assert config.kl == KLConfig(form="loss", coefficient=0) and config.model.remat == "none"


def test_a_mapping_is_what_yaml_says_and_comes_back(tmp_path):
    text = ("{enable_thinking: false, budget: 5, style: '3', title: 'a: b', words: [x, 1.5], "
            "time: 1:30, code: 012, day: 2001-01-01, switch: 'off', power: '1e5', small: 1e-5}")
    expected = {"enable_thinking": False, "budget": 5, "style": "3", "title": "a: b",
                "words": ["x", 1.5], "time": "1:30", "code": "012", "day": "2001-01-01",
                "switch": "off", "power": "1e5", "small": 1e-5}
    config = from_command_line(["--data.template_arguments", text])
    assert config.data.template_arguments == expected
    configuration.save(config, tmp_path / "saved.yaml")
    assert configuration.load(tmp_path / "saved.yaml") == config
    path = write(tmp_path / "a.yaml", f"data:\n  template_arguments: {text}\n")
    assert configuration.load(path).data.template_arguments == expected
    # the whole field is overridden, as any other
    assert from_command_line(["--config", path, "--data.template_arguments", "{a: 1}"]
                             ).data.template_arguments == {"a": 1}
    assert configuration.facts(config)["data.template_arguments"].startswith(
        '{"enable_thinking": false, "budget": 5')


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", "# nothing\n")
    assert configuration.load(path) == Config()


@pytest.mark.parametrize(("argv", "message"), [
    ("--reward.alpha 1.5", "reward.alpha must be in [0, 1), got 1.5"),
    ("--reward.alpha nan", "reward.alpha must be a number in [0, 1), got nan"),
    ("--reward.alpha much", "reward.alpha must be a number in [0, 1), got much"),
    ("--reward.alpah 0.1", "no option --reward.alpah: did you mean --reward.alpha?"),
    ("--reward.al 0.1", "no option --reward.al: did you mean --reward.alpha?"),
    ("--reward.alpha", "reward.alpha must be a number in [0, 1), got nothing"),
    ("stray", "unexpected argument stray"),
    ("--rollout.group_size 1", "rollout.group_size must be >= 2, got 1"),
    ("--update.warmup_updates 10000000000",
     "update.warmup_updates must be at most 2147483647, got 10000000000"),
    ("--rollout.temperature 1e-40", "rollout.temperature must be >= 0.001 and finite, got 1e-40"),
    ("--evaluation.temperature 1e-4",
     "evaluation.temperature must be 0, or >= 0.001 and finite, got 0.0001"),
    ("--run.steps 2.5", "run.steps must be a whole number >= 1, got 2.5"),
    ("--run.resume maybe", "run.resume must be true or false, got maybe"),
    ("--kl.form k2", "kl.form must be one of none, reward, loss, got k2"),
    ("--mesh.data 0", "mesh.data must be -1 or >= 1, got 0"),
    ("--evaluation.max_new_tokens 0", "evaluation.max_new_tokens must be >= 1, got 0"),
    ("--data.user_prompt Solve",
     "data.user_prompt must be text holding \"{problem}\", got 'Solve'"),
    ("--data.template_arguments false", "data.template_arguments must be a mapping of variables' "
     "names to values that JSON has, or null, got false"),
    ("--data.template_arguments {a-b:2}", "data.template_arguments must be a mapping of variables' "
     "names to values that JSON has, or null, got {a-b:2}"),
    ("--data.template_arguments.enable_thinking false", "--data.template_arguments.enable_thinking:"
     " give --data.template_arguments all at once, as '{NAME: VALUE, ...}'"),
    ("--update.updates_per_batch 3",
     "rollout.prompts_per_step * rollout.group_size must be divisible by "
     "update.updates_per_batch, got 16 * 8 and 3"),
    ("--run.resume true",
     "run.directory must name the run to resume when run.resume is true, got null"),
    ("--config", "--config: expected one argument"),
    ("--config nowhere.yaml",
     "cannot read the configuration file nowhere.yaml: No such file or directory"),
])
def test_a_wrong_flag_is_one_line_with_field_bound_and_value(argv, message):
    assert refused(*argv.split()) == message


@pytest.mark.parametrize(("text", "message"), [
    ("reward: {alpha: 1.5}", "reward.alpha must be in [0, 1), got 1.5"),
    ("reward: {alpha: high}", "reward.alpha must be a number in [0, 1), got high"),
    ("reward: {alpah: 0.1}", "no field reward.alpah: did you mean alpha?"),
    ("rewards: {alpha: 0.1}", "no section rewards: did you mean reward?"),
    ("reward: 0.1", "reward must have fields under it, got 0.1"),
    ("- reward", "must hold sections with fields under them, got ['reward']"),
    ("run: {seed: true}", "run.seed must be a whole number in [0, 2147483647], got true"),
    ("run: {directory: 5}", "run.directory must be text, or null, got 5"),
    ("kl: {form: 'off'}", "kl.form must be one of none, reward, loss, got off"),
])
def test_a_wrong_value_in_a_file_names_the_file_too(tmp_path, text, message):
    path = write(tmp_path / "a.yaml", text)
    assert refused("--config", path) == f"{path}: {message}"


@pytest.mark.parametrize("text", [
    "reward:\n  alpha: [1\n", "reward:\n  alpha: 1\n x: 2\n", "reward: !!python/name:os.system 1\n",
])
def test_broken_yaml_names_file_and_line(tmp_path, text):
    path = write(tmp_path / "a.yaml", text)
    assert refused("--config", path).startswith(f"{path} line ")


@pytest.mark.parametrize(("text", "message"), [
    ("reward: {alpha: 0.1, alpha: 0.2}", " line 1: not valid YAML: alpha is there twice"),
    ("run: {steps: 3}\nrun: {seed: 1}", " line 2: not valid YAML: run is there twice"),
    ("run: {steps: 1:30}", ": run.steps must be a whole number >= 1, got 1:30"),
    ("run: {steps: 010}", ": run.steps must be a whole number >= 1, got 010"),
    ("reward: {alpha: 2001-99-99}", ": reward.alpha must be a number in [0, 1), got 2001-99-99"),
    ("reward: {alpha: 0:0.1}", ": reward.alpha must be a number in [0, 1), got 0:0.1"),
    (f"run: {{seed: {'9' * 5000}}}",
     f" line 1: not valid YAML: {'9' * 40}... (5000 characters) cannot be read as int"),
    ("run: {steps: !!int abc}", " line 1: not valid YAML: abc cannot be read as int"),
    ("run: {? [1, 2] : 3}", " line 1: not valid YAML: found unhashable key"),
    ("run:\n\tsteps: 3", " line 2: not valid YAML: found character"),
    ("[" * 3000, ": not valid YAML: nested too deep"),
    ("data:\n  template_arguments: {thinking: off}", " line 2: not valid YAML: off may be false or "
     "a text: write false, or quote it"),
    ("run: {resume: Yes}", " line 1: not valid YAML: Yes may be true or a text: write true, or"),
    ("run: {steps: 1}\n---\nrun: {steps: 2}", " line 2: not valid YAML: but found another doc")])
def test_yaml_has_no_surprises(tmp_path, text, message):
    path = write(tmp_path / "a.yaml", text)
    assert refused("--config", path).startswith(f"{path}{message}")


def test_numbers_of_yaml(tmp_path):
    config = configuration.load(write(tmp_path / "a.yaml", "update: {learning_rate: 3e-4}\n"
                                      "run: {steps: 1_000, directory: 2001-01-01}\n"
                                      "evaluation: {problems: 0}\n"))
    assert (config.update.learning_rate, config.run.steps) == (3e-4, 1000)
    assert config.run.directory == "2001-01-01"


@pytest.mark.parametrize(("flags", "message"), [
    (["--run.steps", "1:30"], "run.steps must be a whole number >= 1, got 1:30"),
    (["--run.steps=010"], "run.steps must be a whole number >= 1, got 010"),
    (["--run.resume", "yes"], "run.resume must be true or false, got yes"),
    (["--data.template_arguments", "{a: on}"], "data.template_arguments must be a mapping of "
     "variables' names to values that JSON has, or null, got {a: on}: on may be true or a text"),
    (["--data.template_arguments={a: 1, a: 2}"], "data.template_arguments must be a mapping of "
     "variables' names to values that JSON has, or null, got {a: 1, a: 2}: a is there twice"),
    (["--run.seed", "9" * 5000], "run.seed must be a whole number in [0, 2147483647], got 999"),
    (["--run.steps", "\udcff"], "run.steps must be a whole number >= 1, got \udcff"),
    (["--run.steps.x", "3"], "no option --run.steps.x: did you mean --run.steps?")])
def test_flags_have_no_surprises(flags, message):
    assert refused(*flags).startswith(message)


def test_a_long_value_is_cut_in_the_error_line(capsys):
    assert errors.report(UserError(f"run.seed must be a number, got {'9' * 5000}, or not")) == 2
    line = capsys.readouterr().err
    assert len(line) < 2020 and line.startswith("error: run.seed must be a number, got 999")
    assert line.endswith("999, or not\n")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\x80\x81")
    assert "not valid YAML" in refused("--config", str(tmp_path / "a.yaml"))
    assert "Is a directory" in refused("--config", str(tmp_path))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RewardConfig(alpha=1.5), "reward.alpha must be in"),
    (lambda: RewardConfig(alpha=float("nan")), "reward.alpha must be in"),
    (lambda: RewardConfig(alpha="0.1"), "reward.alpha must be a number in"),
    (lambda: ModelConfig(dtype="float16"),
     "model.dtype must be one of bfloat16, float32, got 'float16'"),
    (lambda: RunConfig(seed=True), "run.seed must be a whole number"),
    (lambda: AdvantageConfig(whiten=1), "advantage.whiten must be true or false, got 1"),
    (lambda: UpdateConfig(learning_rate=float("inf")),
     "update.learning_rate must be >= 0 and finite, got inf"),
])
def test_construction_checks_too(make, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        make()


@pytest.mark.parametrize("setting", [setting for setting in all_settings(Config)
                                     if setting.type in (int, float)],
                         ids=lambda setting: setting.field)
def test_no_number_is_beyond_what_a_device_computes_with(setting):
    beyond = {int: 2**31, float: 1e39}[setting.type]
    with pytest.raises(ValueError, match=f"{setting.field} must be .*, got "):
        setting.check(beyond)


def test_jsonl_data_without_held_out_problems_needs_no_evaluation():
    Config(data=DataConfig(path="a.jsonl"), evaluation=EvaluationConfig(problems=0))
    Config(data=DataConfig(path="a.jsonl"), evaluation=EvaluationConfig(path="b.jsonl"))


@pytest.mark.parametrize(("flags", "message"), [
    (["--update.objective", "dpo"],
     "kl.form must be 'none' with update.objective dpo, got 'reward'"),
    (["--update.objective", "sft_shortest", "--kl.form", "none", "--update.importance_cap", "2"],
     "update.importance_cap must be null with update.objective sft_shortest, got 2.0"),
    (["--reward.target_tokens", "0.5", "--evaluation.every", "0"],
     "evaluation.every and evaluation.problems must be >= 1 if reward.target_tokens or "),
    (["--reward.max_accuracy_drop", "1", "--reward.alpha", "0.5"],
     "reward.alpha must be between reward.alpha_min, > 0, and reward.alpha_max if "),
    (["--reward.target_tokens", "0.5", "--reward.form", "kimi"],
     "reward.form must be efficient if "),
    (["--update.clip_ratio_high", "0.1"],
     "update.clip_ratio_high must be at least update.clip_ratio, got 0.1 and 0.2"),
    (["--update.dual_clip", "1"], "update.dual_clip must be > 1, got 1"),
    (["--update.aggregation", "constant", "--kl.form", "loss"],
     "kl.form must be none or reward with update.aggregation constant, got loss"),
    (["--advantage.group_std", "true", "--advantage.decouple", "true"],
     "advantage.decouple must be false with advantage.group_std, got true"),
    (["--advantage.whiten", "true", "--advantage.whiten_responses", "true"],
     "advantage.whiten_responses must be false with advantage.whiten, got true"),
    (["--update.objective", "dpo", "--kl.form", "none", "--update.truncated", "mask"],
     "update.truncated must be 'wrong' with update.objective dpo, got 'mask'"),
])
def test_baselines_and_a_moving_alpha_exclude_what_would_bend_them(flags, message):
    with pytest.raises(UserError) as caught:
        from_command_line(flags)
    assert str(caught.value).startswith(message)


def test_every_default_keeps_its_own_bound_and_every_field_has_a_meaning():
    assert meanings(Config).keys() == {setting.field for setting in all_settings(Config)}
    for setting in all_settings(Config):
        setting.check(setting.default)
    assert all(section.__doc__ for section in sections(Config).values())


def test_saved_and_loaded_again_it_is_the_same(tmp_path):
    config = from_command_line(["--update.learning_rate", "5e-6", "--run.directory",
                                              "null"])
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config
    assert list(yaml.safe_load(configuration.to_yaml(config))) == list(sections(Config))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    configuration.save(Config(), path)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        configuration.save(Config(run=RunConfig(seed=5)), path)
    assert configuration.load(path) == Config()


def test_differences_name_the_fields():
    changed = Config(reward=RewardConfig(alpha=0.4), run=RunConfig(directory="runs/a"))
    assert configuration.differences(Config(), Config()) == []
    assert configuration.differences(Config(), changed) == [
        "reward.alpha: 0.1 -> 0.4", "run.directory: null -> 'runs/a'",
    ]


def test_print_config_shows_what_would_run(capsys, tmp_path):
    path = write(tmp_path / "a.yaml", "run: {seed: 3}")
    with pytest.raises(SystemExit) as stop:
        from_command_line(["--print_config", "--config", path, "--reward.alpha",
                                         "0.4"])
    assert stop.value.code == 0
    shown = write(tmp_path / "shown.yaml", capsys.readouterr().out)
    assert configuration.load(shown) == Config(reward=RewardConfig(alpha=0.4),
                                               run=RunConfig(seed=3))
    assert "reward.alpha must be in" in refused("--print_config", "--reward.alpha", "1.5")


def test_the_reference_page_is_current():
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.PAGE.read_text(encoding="utf-8")
    assert written == module.page(), "run python docs/make_configuration.py"
