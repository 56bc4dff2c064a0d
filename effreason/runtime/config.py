"""The configuration: frozen dataclasses, read from YAML and dotted command-line flags.

Every field is written down once, here: name, type with bound, default, and the line under it says what it means.
Nothing here imports jax: mistakes show at once.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jsonargparse
import yaml

from effreason.runtime import config_parser, files
from effreason.runtime.config_fields import Bound, Section, all_settings, written

Natural = Annotated[int, Bound(">= 0", lambda n: n >= 0)]
Count = Annotated[int, Bound(">= 1", lambda n: n >= 1)]
GroupSize = Annotated[int, Bound(">= 2", lambda n: n >= 2)]
Seed = Annotated[int, Bound("in [0, 2147483647]", lambda n: 0 <= n < 2**31)]
DataAxis = Annotated[int, Bound("-1 or >= 1", lambda n: n == -1 or n >= 1)]
Positive = Annotated[float, Bound("> 0 and finite", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Bound(">= 0 and finite", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Bound("in [0, 1)", lambda x: 0 <= x < 1)]
Share = Annotated[float, Bound("in (0, 1]", lambda x: 0 < x <= 1)]
Closed = Annotated[float, Bound("in [0, 1]", lambda x: 0 <= x <= 1)]
Address = Annotated[str, Bound("host:port, port in [1, 65535]", lambda text: (
    match := re.fullmatch(r"\S+:([0-9]{1,5})", text)) is not None and 1 <= int(match[1]) <= 65535)]
HeartbeatSeconds = Annotated[int, Bound("in [5, 3600]", lambda n: 5 <= n <= 3600)]
Template = Annotated[str, Bound('holding "{problem}"', lambda text: "{problem}" in text)]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The model that is trained."""

    path: str = "tiny"
    """"tiny" = the embedded reasoner, else a Hugging Face directory (config.json, safetensors, tokenizer) or the id of
    a model on the Hugging Face Hub, such as deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; null = its main branch. The commit is written into the run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Numbers the forward and backward passes compute in; the weights the optimiser holds are float32."""
    attention: Literal["auto", "xla", "blockwise", "splash", "cudnn"] = "auto"
    """What attends over whole sequences in training: splash, a kernel for TPUs; cudnn, in bfloat16 on a GPU, which
    gives each sequence a row of its own; blockwise, anywhere and in little memory; xla, anywhere, for short rows.
    auto = the best one that fits device and model."""
    remat: Literal["full", "attention", "none"] = "full"
    """What the backward pass computes once more to save memory: each layer in full, all of it but its attention (with
    cudnn the same as full), or none of it, for small models. full costs about a third more time than none."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The problems it is trained on."""

    path: str = "tiny"
    """"tiny" = generated arithmetic; a preset, such as gsm8k; the id of a data set on the Hugging Face Hub, also at a
    commit, org/name@REVISION; a JSONL or Parquet file, or a folder saved by `datasets`. Several: gsm8k,math is one
    pool; gsm8k=0.3,math=0.7 a mixture, with the same number of problems of each in every step."""
    directory: str | None = None
    """Local copies of the presets, DIRECTORY/PRESET/train.jsonl and test.jsonl, read instead of the Hub; null = the Hub
    (docs/data.md has the names of the folders)."""
    subset: str | None = None
    """The configuration of a data set on the Hub that has several; a preset names its own."""
    split: str | None = None
    """The split of a Hub data set or saved folder to train on; null = the preset's, or train."""
    problem_field: str = "problem"
    """Column of the problem's text; a preset names its own columns."""
    answer_field: str = "answer"
    """Column of the reference answer."""
    choices_field: str | None = None
    """Column of the answers to choose from, a list or a table from letter to answer; null = none, or they stand in the
    problem's text already."""
    level_field: str | None = None
    """Column of the difficulty, for results by level; null = all problems of a data set are one level."""
    answer_from: Literal["whole", "hashes", "boxed"] = "whole"
    r"""Where the final answer stands in its column: the whole text, behind the last ####, or in the last \boxed{}."""
    answer_kind: Literal["math", "choice", "text"] = "math"
    """How answers are compared: as mathematics, as the letter of a choice, or as text; a preset names its own."""
    template: str | None = None
    """Chat template: null = the checkpoint's own; r1 = the paper's prompt for DeepSeek-R1 models; r1_think = the same,
    with the thinking opened by <think>; or a file with a Jinja template."""
    user_prompt: Template = (
        r"Please reason step by step, and put your final answer within \boxed{}. Question: {problem}"
    )
    """The user's turn; {problem} stands for the problem. The chat template goes round it."""
    max_prompt_tokens: Count = 512
    """Problems with a longer prompt are left out, and counted."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Problems that repeat an earlier one, up to case, spacing and LaTeX's spacing."""
    contaminated: Literal["drop", "keep"] = "drop"
    """Training problems that are in the evaluation set, or in one of data.exclude."""
    exclude: str | None = None
    """More sets whose problems must not be trained on, as data.path names them: math500,aime24."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """Sampling the responses of a step."""

    prompts_per_step: Count = 32
    """Problems sampled at each step."""
    group_size: GroupSize = 8
    """Responses to each problem; their lengths are compared with one another."""
    max_new_tokens: Count = 4096
    """Longest response; one that has not ended by then is cut off and counts as wrong."""
    temperature: Positive = 1.0
    """Sampling temperature; the method assumes 1."""
    top_p: Share = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1 = all, as the method assumes."""
    top_k: Count | None = None
    """Only this many of the most likely tokens; null = all, as the method assumes."""
    min_p: Closed = 0.0
    """Only tokens at least this likely, relative to the most likely one; 0 = all, as the method assumes."""
    slots: Count | None = None
    """Responses generated at the same time, rounded up to a multiple of mesh.data x mesh.fsdp; a finished one makes
    room for the next. null = as many as rollout.memory_gib holds at their longest, at most those of a step."""
    memory_gib: Positive | None = None
    """Memory for the keys and values of all slots, in GiB on all devices together; null = what the weights, the
    optimiser and a reserve of a tenth leave."""
    cache_layout: Literal["auto", "transposed", "sequence_last", "cudnn", "paged"] = "auto"
    """How keys and values lie in memory, and what reads them: cudnn, in bfloat16 on a GPU; paged, a kernel in bfloat16
    on a TPU, heads of a multiple of 128; the others by XLA anywhere. auto = the best one that fits device and model."""
    chunk: Count = 16
    """Tokens each slot generates, at most, before finished responses are looked for."""
    policy: Literal["current", "initial"] = "current"
    """Whose responses are learnt from: those of the model as it is, or of the model the run started from."""
    refill_rounds: Natural = 0
    """Rounds in which groups without a signal are replaced by groups of other problems, each with as many as are
    missing; 0 = off. What counts is the spread of the reward, length included: groups that are all correct stay."""
    min_reward_spread: NonNegative = 0.0
    """A group whose highest and lowest reward differ by no more than this has no signal."""
    max_mismatch: Positive | None = None
    """Parity gate: the run stops where the log-probs of sampled tokens by the sampler and by the trainer differ by more
    than this, in nats, on the mean over a step's tokens. Measured on short responses before the first step too.
    null = 0.1 in bfloat16, 0.02 in float32."""


@dataclasses.dataclass(frozen=True)
class RepetitionConfig(Section):
    """Responses that repeat themselves word for word until the token limit."""

    stop: bool = False
    """Stop them; they count as wrong, like any response that was cut off, and their length ends where they are cut."""
    window: Count = 512
    """A response loops when its last tokens, so many, are one block of tokens over and over."""
    longest_period: Count = 128
    """Tokens in that block, at most; half of repetition.window at most."""
    audit_share: Closed = 0.05
    """Share of the loops that are let go on all the same; rollout/repetition_recovered says how many of these ended
    by themselves."""


@dataclasses.dataclass(frozen=True)
class GradeConfig(Section):
    """Deciding which responses are correct, on the host."""

    workers: Count = 2
    """Processes that compare answers symbolically."""
    cpu_seconds: Positive = 1.0
    """Processor time for one comparison; beyond it the answer counts as wrong."""
    wall_seconds: Positive = 8.0
    """Clock time for one comparison; beyond it the worker is replaced and the answer counts as wrong."""
    memory_mb: Count = 2048
    """Memory of one worker, in MiB."""
    step_budget_seconds: Positive = 30.0
    """Clock time for all comparisons of a step, or of 512 responses; what is left over then counts as wrong."""
    require_eos: bool = True
    """A response that was cut off counts as wrong whatever it holds."""
    function: str | None = None
    """A grader of your own, module:function, instead of the built-in ones: (response, answer) -> correct or not."""


@dataclasses.dataclass(frozen=True)
class RewardConfig(Section):
    """The reward of a response; efficient: 1 - alpha * sigmoid(length against the other correct ones) where correct."""

    alpha: Fraction = 0.1
    """The one dial: how much a correct response loses for being longer than its siblings; 0 = correctness only."""
    form: str = "efficient"
    """efficient = the method's; others have been published under the names of docs/rewards.md, such as kimi or l1_max;
    or a function of your own, module:function, (correct, lengths) -> rewards."""
    parameters: str | None = None
    """What a form other than efficient is to be called with, NAME=VALUE,NAME=VALUE; null = its defaults."""
    target_tokens: Share | None = None
    """Tokens on the first set of evaluation.path wanted, as a share of the base model's: after each evaluation alpha is
    raised where there are more, lowered where there are fewer. null = alpha stays."""
    max_accuracy_drop: NonNegative | None = None
    """Points of accuracy on that set that may be lost against the base model: after each evaluation alpha is lowered
    where more are lost, and raised, up to reward.alpha_max or until target_tokens is met, where fewer are.
    null = alpha stays."""
    alpha_min: Fraction = 0.01
    """Least alpha that these two go to; greater than 0."""
    alpha_max: Fraction = 0.4
    """Greatest alpha that these two go to."""


@dataclasses.dataclass(frozen=True)
class AdvantageConfig(Section):
    """From rewards to advantages: leave-one-out, and two options."""

    whiten: bool = False
    """Subtract the batch's mean and divide by its standard deviation, over tokens, as the authors' code does.
    With update.aggregation sequence_mean it pulls on length even at alpha = 0."""
    group_std: bool = False
    """Divide by the group's standard deviation. Beware: where all are correct this takes reward.alpha out again."""


@dataclasses.dataclass(frozen=True)
class KLConfig(Section):
    """Staying close to the model the run started from."""

    form: Literal["none", "reward", "loss"] = "reward"
    """reward = a penalty on each token's reward (k1), loss = a term of the loss (k3), none = neither."""
    coefficient: NonNegative = 0.001
    """Weight of the penalty or term."""
    offload_reference: bool = False
    """Keep the reference's weights in the host's memory, and fetch them for each step's scoring."""


@dataclasses.dataclass(frozen=True)
class UpdateConfig(Section):
    """What is learnt from the responses, and the optimiser (AdamW)."""

    objective: Literal["policy_gradient", "sft_shortest", "dpo"] = "policy_gradient"
    """policy_gradient = the method's; two baselines: sft_shortest = imitate each group's shortest correct response
    (rejection sampling); dpo = prefer it to the longest correct one. Baselines want rollout.policy initial."""
    dpo_beta: Positive = 0.1
    """dpo: how much a preference may move the policy from the reference; more = closer to it."""
    learning_rate: NonNegative = 5e-6
    """Constant after the warm-up."""
    beta1: Fraction = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: Fraction = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    weight_decay: NonNegative = 0.0
    """AdamW: decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    warmup_updates: Natural = 6
    """Optimiser updates over which the learning rate rises, in equal steps, to its full value."""
    updates_per_batch: Count = 1
    """Optimiser updates made from one step's responses, each on its own part of them."""
    clip_ratio: Positive = 0.2
    """PPO clip of the ratio to the policy that sampled; matters only when updates_per_batch > 1."""
    importance_cap: Positive | None = None
    """Truncated importance sampling: each token counts min(trainer's probability / sampler's, this) times, which takes
    out what the two differ by; 2 is usual; null = off."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Loss: mean over all response tokens of an update, or over responses of the mean over each one's tokens."""
    rows_per_micro_batch: Count = 8
    """Rows in one forward and backward pass, a multiple of mesh.data x mesh.fsdp: memory against speed, the loss stays
    the same. A row is as wide as the longest sequence a run can have, and holds as many sequences as fit into it; rows
    of 4,096 positions and more come in halves and quarters too."""
    vocabulary_tile: Count = 2048
    """Entries of the vocabulary whose log-probs are held at a time, for all positions of a micro-batch: memory against
    speed. As many as the vocabulary has, or more: all of them, and the backward pass need not compute them again."""
    offload_optimizer: bool = False
    """Keep the optimiser's moments in the host's memory, and fetch them for each update."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Accuracy and tokens on held-out problems, before and after training."""

    path: str | None = None
    """Held-out problems, named like data.path and with the same columns; several are a list, each measured on its own:
    gsm8k,math500. The first is the one that is evaluated between steps, too.
    null = those of data.path tiny."""
    split: str | None = None
    """The split of a Hub data set or saved folder to evaluate on; null = the preset's, or test."""
    any_template: bool = False
    """Evaluate a trained model on prompts that differ from those of its training, which is an error otherwise."""
    problems: Natural = 600
    """Problems to evaluate on, the first of each set; 0 = no evaluation."""
    samples: Count | None = None
    """Responses to each problem; accuracy is the mean over them. null = as many as the paper has for the set: gsm8k 1,
    math500 3, AIME 10, and 1 for others."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 = greedy."""
    top_p: Share = 1.0
    """Nucleus sampling, as rollout.top_p."""
    top_k: Count | None = None
    """As rollout.top_k."""
    min_p: Closed = 0.0
    """As rollout.min_p."""
    every: Natural = 0
    """Steps between evaluations in training; 0 = only before the first step and after the last."""
    max_new_tokens: Count | None = None
    """Longest response; null = rollout.max_new_tokens."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """Saving the run, to resume it and to use the model elsewhere."""

    every: Count = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints kept."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; the product must be the number of devices."""

    data: DataAxis = -1
    """Copies that share the batch; -1 = all devices the other axes leave."""
    fsdp: Count = 1
    """Shards of weights and optimiser state; they share the batch too."""
    tensor: Count = 1
    """Shards of heads, feed-forward and vocabulary."""
    context: Count = 1
    """Shards of the sequence."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Section):
    """Training on several hosts: one process on each, all with the same configuration (docs/multi-host.md)."""

    mode: Literal["none", "auto", "manual"] = "none"
    """none = this process alone; auto = JAX finds the others, in a TPU pod slice, SLURM, Open MPI or Kubernetes;
    manual = by the fields below."""
    coordinator_address: Address | None = None
    """manual: host:port of process 0, where the others meet; null = JAX_COORDINATOR_ADDRESS."""
    processes: Count | None = None
    """How many processes there are; any other number found is an error. null = JAX_NUM_PROCESSES; in auto without that,
    whatever JAX finds."""
    process_id: Natural | None = None
    """manual: this one among them, from 0; null = JAX_PROCESS_ID, so that one file serves all hosts."""
    initialization_timeout_seconds: Count = 300
    """A process that has not come by then ends the others."""
    heartbeat_timeout_seconds: HeartbeatSeconds = 30
    """A process that has not been heard of for so long is lost, and ends the others."""


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """What a run writes besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    wandb: bool = False
    """Send the metrics to Weights & Biases (needs the extra: pip install "effreason[wandb]")."""
    groups_per_step: Natural = 1
    """Problems of each step whose responses are written to rollouts.jsonl, with grade, reward and advantage."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """One run."""

    directory: str | None = None
    """Where everything is written; null = runs/<UTC time>-alpha<alpha>-seed<seed>."""
    seed: Seed = 0
    """Root of all randomness: order of the problems and every sampled token."""
    steps: Count = 100
    """Steps to train; a resumed run counts from its beginning."""
    resume: bool = False
    """Go on from the newest checkpoint in run.directory."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections, checked against one another."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    grade: GradeConfig = GradeConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        rollout, update = self.rollout, self.update
        if rollout.prompts_per_step * rollout.group_size % update.updates_per_batch:
            raise ValueError(
                "rollout.prompts_per_step * rollout.group_size must be divisible by update.updates_per_batch, got "
                f"{rollout.prompts_per_step} * {rollout.group_size} and {update.updates_per_batch}"
            )
        if self.repetition.window < 2 * self.repetition.longest_period:
            raise ValueError("repetition.window must be at least twice repetition.longest_period, "
                             f"got {self.repetition.window} and {self.repetition.longest_period}")
        if self.data.choices_field is not None and self.data.answer_kind != "choice":
            raise ValueError("data.answer_kind must be choice where data.choices_field names a column, "
                             f"got {self.data.answer_kind}")
        if self.data.path != "tiny" and self.evaluation.path is None and self.evaluation.problems > 0:
            raise ValueError(
                "evaluation.path must name held-out problems, or evaluation.problems must be 0, "
                "when data.path is not tiny, got evaluation.path null and evaluation.problems "
                f"{self.evaluation.problems}"
            )
        if update.objective != "policy_gradient":
            self._check_baseline()
        if self.reward.target_tokens is not None or self.reward.max_accuracy_drop is not None:
            self._check_control()
        if self.run.resume and self.run.directory is None:
            raise ValueError("run.directory must name the run to resume when run.resume is true, got null")

    def _check_baseline(self) -> None:
        wanted = f"with update.objective {self.update.objective}"
        for field, value, right in (("update.updates_per_batch", self.update.updates_per_batch, 1),
                                    ("kl.form", self.kl.form, "none"),
                                    ("advantage.whiten", self.advantage.whiten, False),
                                    ("advantage.group_std", self.advantage.group_std, False),
                                    ("update.importance_cap", self.update.importance_cap, None),
                                    ("rollout.refill_rounds", self.rollout.refill_rounds, 0)):
            if value != right:
                raise ValueError(f"{field} must be {written(right)} {wanted}, got {written(value)}")

    def _check_control(self) -> None:
        reward, wanted = self.reward, "where reward.target_tokens or reward.max_accuracy_drop moves alpha"
        if reward.form != "efficient":
            raise ValueError(f"reward.form must be efficient {wanted}, got {reward.form}")
        if self.evaluation.every == 0 or self.evaluation.problems == 0:
            raise ValueError(f"evaluation.every and evaluation.problems must be >= 1 {wanted}, got "
                             f"{self.evaluation.every} and {self.evaluation.problems}")
        if not 0 < reward.alpha_min <= reward.alpha <= reward.alpha_max:
            raise ValueError(f"reward.alpha must be between reward.alpha_min, > 0, and reward.alpha_max {wanted}, got "
                             f"{reward.alpha}, {reward.alpha_min} and {reward.alpha_max}")


# The tiny world's learning rate and prompt would ruin any other model: its file is the default for nothing else.
MADE_FOR = {"model.path": frozenset({"tiny"}), "data.path": frozenset({"tiny"}),
            "evaluation.path": frozenset({"tiny", "tiny_long", "tiny_other"})}


def shipped() -> Path:
    """The directory of the shipped configurations: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def parse(
    parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None, default: str = "configs/tiny.yaml"
) -> tuple[Config, jsonargparse.Namespace]:
    """The configuration and whatever else `parser` takes; see `from_command_line`."""
    config, values = config_parser.parse(Config, parser, argv, shipped().parent / default, MADE_FOR)
    if values.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, values


def from_command_line(argv: Sequence[str] | None = None, default: str = "configs/tiny.yaml") -> Config:
    """The configuration of `[--config FILE] [--section.field VALUE ...]`.

    Args: argv the arguments, None = sys.argv; default the file read when there is no --config, unless a flag names
        another model or data set than it is made for.
    Raises: UserError for any mistake; SystemExit(0) after --help and --print_config."""
    return parse(config_parser.parser(Config, "train.py"), argv, default)[0]


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a YAML file; what it leaves out has its default. Raises: UserError."""
    parser = config_parser.parser(Config, "load")
    return config_parser.build(Config, config_parser.read(Config, parser, Path(path), jsonargparse.Namespace()))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=110)


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the configuration as YAML, completely or not at all. Raises: UserError."""
    with files.replacing(Path(path)) as partial:
        partial.write_text(to_yaml(config), encoding="utf-8")


def facts(config: Config) -> dict[str, str]:
    """Each field as text, but for what is a host's own: with several processes all have the same."""
    return {setting.field: written(getattr(getattr(config, setting.section), setting.name))
            for setting in all_settings(Config) if setting.section != "distributed"}


def differences(a: Config, b: Config) -> list[str]:
    """The fields that differ, each as "field: a -> b"."""
    found = []
    for setting in all_settings(Config):
        old, new = (getattr(getattr(config, setting.section), setting.name) for config in (a, b))
        if old != new:
            found.append(f"{setting.field}: {written(old)} -> {written(new)}")
    return found
