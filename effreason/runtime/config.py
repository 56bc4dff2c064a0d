"""The configuration: frozen dataclasses, read from YAML files and dotted command-line flags.

Every field is defined once, here: name, type with bound, default, and below it what it means, which
is also its text in `--help`. Nothing here imports jax, so that mistakes show at once.
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

GIB = 2**30                         # bytes

Natural = Annotated[int, Bound(">= 0", lambda n: n >= 0)]
Count = Annotated[int, Bound(">= 1", lambda n: n >= 1)]
GroupSize = Annotated[int, Bound(">= 2", lambda n: n >= 2)]
Seed = Annotated[int, Bound("in [0, 2147483647]", lambda n: 0 <= n < 2**31)]
DataAxis = Annotated[int, Bound("-1 or >= 1", lambda n: n == -1 or n >= 1)]
# The logits are divided by it: closer to 0, rounding decides what is drawn.
Temperature = Annotated[float, Bound(">= 0.001 and finite", lambda x: 0.001 <= x < math.inf)]
GreedyTemperature = Annotated[float, Bound(
    "0, or >= 0.001 and finite", lambda x: x == 0 or 0.001 <= x < math.inf)]
Positive = Annotated[float, Bound("> 0 and finite", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Bound(">= 0 and finite", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Bound("in [0, 1)", lambda x: 0 <= x < 1)]
Share = Annotated[float, Bound("in (0, 1]", lambda x: 0 < x <= 1)]
Closed = Annotated[float, Bound("in [0, 1]", lambda x: 0 <= x <= 1)]
Address = Annotated[str, Bound("host:port, port in [1, 65535]", lambda text: (
    match := re.fullmatch(r"\S+:([0-9]{1,5})", text)) is not None and 1 <= int(match[1]) <= 65535)]
HeartbeatSeconds = Annotated[int, Bound("in [5, 3600]", lambda n: 5 <= n <= 3600)]
Alphas = Annotated[str, Bound("of numbers in [0, 1) with commas between them, 0 among them",
                              lambda text: _is_alphas(text))]
Template = Annotated[str, Bound('holding "{problem}"', lambda text: "{problem}" in text)]
Variables = Annotated[dict, Bound("of variables' names to values that JSON has", lambda table: all(
    isinstance(name, str) and name.isidentifier() for name in table) and files.is_json(table))]


def _is_alphas(text: str) -> bool:
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        return False
    return (all(0 <= alpha < 1 for alpha in alphas) and min(alphas) == 0 < max(alphas)
            and len(set(alphas)) == len(alphas))


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The model."""

    path: str = "tiny"
    """"tiny" = the built-in tiny reasoner; otherwise a Hugging Face directory (config.json,
    safetensors, tokenizer) or the id of a model on the Hugging Face Hub, such as
    deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; null = its main branch. The run records the
    commit."""
    adapter: str | None = None
    """Adapters of peft to start from, a directory with adapter_config.json: with adapter.rank 0
    they are merged into the model, otherwise they are trained further. If model.path is such a
    directory itself, the model is the one that it names. null = the model as it is."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the forward and backward passes; the optimizer keeps the weights in
    float32."""
    attention: Literal["auto", "xla", "blockwise", "splash", "cudnn_packed", "cudnn"] = "auto"
    """Attention kernel for training: splash, on TPUs; cudnn_packed, in bfloat16 on GPUs from Hopper
    on, with jax 0.11.2 or newer; cudnn, on older ones, with one sequence in each row; blockwise, on
    any device with little memory; xla, on any device, for short rows. auto = the fastest one that
    supports the device and the model; cuDNN's must first agree with XLA in a trial."""
    remat: Literal["full", "attention", "none"] = "full"
    """What the backward pass recomputes to save memory: full = every layer; attention = every layer
    except its attention (with cudnn the same as full); none = nothing, for small models. full takes
    about a third more time than none."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The problems to train on."""

    path: str = "tiny"
    """"tiny" = generated arithmetic; a preset, such as gsm8k; the id of a data set on the Hugging
    Face Hub, optionally at a commit, org/name@REVISION; a JSONL, JSON, CSV or Parquet file; or a
    folder of such files, or saved by `datasets`. Several sets: gsm8k,math are merged into one pool;
    gsm8k=0.3,math=0.7 is a mixture with these shares in every step."""
    directory: str | None = None
    """Folder with local copies of the presets, DIRECTORY/PRESET/train.jsonl and test.jsonl, read
    instead of the Hub; docs/data.md lists the names of the folders. null = the Hub."""
    subset: str | None = None
    """Configuration of a Hub data set, or of a folder of data files, that has several; presets set
    their own."""
    split: str | None = None
    """Split of a Hub data set or folder to train on; null = the preset's split, or train."""
    problem_field: str = "problem"
    """Column with the text of the problem, or with messages, of which it is the user's; presets set
    their own columns. A nested entry is a.b or a[0]: reward_model.ground_truth, prompt[1].content.
    """
    answer_field: str = "answer"
    """Column with the reference answer, or a list of answers, any of which is right."""
    choices_field: str | None = None
    """Column with the choices of a multiple-choice problem, a list or an object from letters to
    texts; null = there are none, or the problem's text contains them."""
    level_field: str | None = None
    """Column with the difficulty, for results by level; null = one level for the whole data set."""
    answer_from: Literal["whole", "hashes", "boxed"] = "whole"
    r"""Which part of the answer column holds the final answer: whole = all of it; hashes = the text
    after the last ####; boxed = the contents of the last \boxed{}."""
    answer_kind: Literal["math", "choice", "text"] = "math"
    """How answers are compared: as mathematics, as the letter of a choice, or as text; presets set
    their own."""
    template: str | None = None
    """Chat template: null = the checkpoint's own; r1 = the paper's prompt for DeepSeek-R1 models;
    r1_think = the same, followed by an opening <think>; or a file with a Jinja template, or the
    name of one of several that the checkpoint has."""
    template_arguments: Variables | None = None
    """Variables for the chat template: {enable_thinking: false} = Qwen3 without thinking."""
    system_prompt: str | None = None
    """The system message, before the user's; null = none, so that some templates write their own;
    "" = an empty one."""
    user_prompt: Template = (r"Please reason step by step, and put your final answer within "
                             r"\boxed{}. Question: {problem}")
    """The user's message, before the chat template is applied; {problem} is replaced by the
    problem."""
    max_prompt_tokens: Count = 512
    """Longest prompt; problems with a longer one are left out, and counted."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Whether to drop problems that repeat an earlier one, ignoring case, spaces and LaTeX's
    spacing commands."""
    contaminated: Literal["drop", "keep"] = "drop"
    """Whether to drop training problems that are also in the evaluation sets or data.exclude."""
    exclude: str | None = None
    """More sets whose problems must not be trained on, named as in data.path: math500,aime24."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """Sampling the responses of a step."""

    prompts_per_step: Count = 32
    """Problems in each step."""
    group_size: GroupSize = 8
    """Responses to each problem; correct ones are compared with one another by length."""
    max_new_tokens: Count = 4096
    """Longest response; one that has not ended by then is cut off and counts as wrong."""
    temperature: Temperature = 1.0
    """Sampling temperature; the method assumes 1."""
    top_p: Share = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1 = all tokens, as the
    method assumes."""
    top_k: Count | None = None
    """Sample from the k most likely tokens only; null = from all, as the method assumes."""
    min_p: Closed = 0.0
    """Sample only tokens at least this likely, relative to the most likely one; 0 = from all, as
    the method assumes."""
    stop_ids: str | None = None
    """Tokens that end a response besides the model's EOS tokens, in training, evaluation and the
    exported model: ids, or texts of single tokens, separated by commas, such as <|im_end|> for a
    base model with a chat template. null = none."""
    slots: Count | None = None
    """Responses generated at the same time, rounded up to a multiple of mesh.data x mesh.fsdp; a
    finished one makes room for the next. null = those of a step, or as many as fit into
    rollout.memory_gib: fewer while the responses are longer."""
    memory_gib: Positive | None = None
    """Memory for the keys and values of all slots, in GiB, over all devices; null = what remains
    after weights, optimizer and a reserve of 10%."""
    cache_layout: Literal["auto", "transposed", "sequence_last", "cudnn", "paged"] = "auto"
    """Layout of the cache of keys and values, and the kernel that reads it: cudnn, in bfloat16 on a
    GPU; paged, in bfloat16 on a TPU, if head_dim is a multiple of 128; transposed and
    sequence_last, on any device. auto = the fastest one that supports the device and the model."""
    chunk: Count = 16
    """Tokens to generate in each slot before looking for finished responses."""
    draft_tokens: Natural = 0
    """Speculative decoding, in training and evaluation: tokens to guess ahead in each slot, at
    most, when few responses are left, from what the response, its prompt and the other responses
    to it have said. The tokens are the same with and without, except for rounding; 0 = off."""
    policy: Literal["current", "initial"] = "current"
    """Which model generates the responses: the current one, or the one the run started from."""
    refill_rounds: Natural = 0
    """Rounds in which groups without a learning signal are replaced, one for one, by groups for
    other problems; 0 = off. The signal is the spread of the reward, which includes length: groups
    with only correct responses usually have one."""
    min_reward_spread: NonNegative = 0.0
    """A group has no signal if its highest and lowest reward differ by no more than this."""
    max_truncated: Closed = 0.5
    """Stop before the first update if a larger share of the first responses was cut off: they count
    as wrong, so the run would learn to be short before it learns to be right. 1 = never."""
    max_mismatch: Positive | None = None
    """Stop the run if the log-probs that sampler and trainer give to the sampled tokens differ by
    more than this many nats on average over a step. Also checked on short responses before the
    first step. null = 0.1 in bfloat16, 0.02 in float32."""


@dataclasses.dataclass(frozen=True)
class RepetitionConfig(Section):
    """Responses that repeat themselves word for word, and would do so until the token limit."""

    stop: bool = False
    """Stop them early; like any response that is cut off they count as wrong, and their length is
    that at the cut."""
    window: Count = 512
    """How many of the latest tokens to examine; a response is stopped if they consist of one
    repeated block."""
    longest_period: Count = 128
    """Longest such block, in tokens; at most half of repetition.window."""
    audit_share: Closed = 0.05
    """Share of the detected responses that are left running; rollout/repetition_recovered is the
    share of those that ended on their own."""


@dataclasses.dataclass(frozen=True)
class GradeConfig(Section):
    """Deciding which responses are correct, on the host."""

    workers: Count = 2
    """Processes that compare answers symbolically."""
    cpu_seconds: Positive = 1.0
    """Processor time for one comparison; an answer that takes longer counts as wrong. Each answer
    gets a short first try, slow ones then longer ones, up to this limit."""
    wall_seconds: Positive = 8.0
    """Clock time for one comparison that only sleeps; after that the process is replaced and the
    answer counts as wrong. Time in which it waits for a processor does not decide."""
    memory_mb: Count = 2048
    """Memory for each process, in MiB."""
    step_budget_seconds: Positive = 30.0
    """Processor time of each worker (with grade.function: clock time) for 512 responses of a step
    or an evaluation; answers not compared by then count as wrong. All but the first tries may
    use half of it."""
    require_eos: bool = True
    """Count a response that was cut off as wrong, even if it contains the right answer."""
    function: str | None = None
    """Your own grader, module:function, used instead of the built-in one: it takes (response,
    reference) and returns true if the response is correct. The run stops if it fails, or reaches
    one of the limits above, on more than 2 % of the responses of a step."""


@dataclasses.dataclass(frozen=True)
class RewardConfig(Section):
    """The reward of a response. By default 1 - alpha * sigmoid(z) if it is correct, otherwise 0; z
    is its length, standardized over the correct responses to the same problem."""

    alpha: Fraction = 0.1
    """How much a correct response loses for being longer than the other correct ones; 0 = reward
    correctness only."""
    alphas: Alphas | None = None
    """Train a dial: one model for each of these alphas, and for all in between, in a single run;
    each group of a step has one of them. Needs adapter.rank > 0. null = reward.alpha alone."""
    form: str = "efficient"
    """efficient = the method's reward; docs/rewards.md lists published alternatives, such as kimi
    or l1_max; or your own function, module:function, from (correct, lengths) to rewards."""
    parameters: str | None = None
    """Parameters of a form other than efficient, NAME=VALUE,NAME=VALUE; null = its defaults."""
    target_tokens: Share | None = None
    """Adjust alpha after each evaluation to reach this mean response length on the first evaluation
    set, as a share of the base model's: more tokens raise alpha, fewer lower it. null = off."""
    max_accuracy_drop: NonNegative | None = None
    """Adjust alpha after each evaluation to lose at most this much accuracy on that set, in
    percentage points below the base model: alpha is lowered if more is lost; otherwise it is raised
    until target_tokens or alpha_max is reached. null = off."""
    alpha_min: Fraction = 0.01
    """Lowest alpha that this adjustment may choose; greater than 0."""
    alpha_max: Fraction = 0.4
    """Highest alpha that this adjustment may choose."""

    @property
    def dial(self) -> tuple[float, ...]:
        """The alphas of the dial in ascending order; () if there is none."""
        return () if self.alphas is None else tuple(sorted(map(float, self.alphas.split(","))))


@dataclasses.dataclass(frozen=True)
class AdvantageConfig(Section):
    """From rewards to advantages: leave-one-out, and published ways to scale it."""

    whiten: bool = False
    """Subtract the batch mean and divide by the batch standard deviation, over tokens, as the
    authors' code does. With update.aggregation sequence_mean this affects length even if alpha is
    0."""
    group_std: bool = False
    """Divide by the standard deviation of the group. Caution: in groups with only correct responses
    this cancels reward.alpha."""
    decouple: bool = False
    """GDPO: divide the advantage of being correct by its own standard deviation in the group, that
    of the rest of the reward by its own, and add reward.alpha times the second to the first. So
    alpha keeps its effect."""
    whiten_responses: bool = False
    """Subtract the mean over the batch's responses and divide by their standard deviation, before
    the KL penalty; whiten does it over tokens, after the penalty."""


@dataclasses.dataclass(frozen=True)
class KLConfig(Section):
    """Staying close to the model the run started from."""

    form: Literal["none", "reward", "loss"] = "reward"
    """reward = a penalty in the reward of each token (k1); loss = a term in the loss (k3, at most
    10 nats for a token, beyond which it has no gradient); none = neither, and the KL divergence is
    not measured, which saves the reference model's memory and a forward pass."""
    coefficient: NonNegative = 0.001
    """Weight of the penalty or term; 0 with the form reward = measure the KL divergence only."""
    offload_reference: bool = False
    """Keep the weights of the reference model in host memory, and copy them to the devices for each
    step."""


@dataclasses.dataclass(frozen=True)
class UpdateConfig(Section):
    """The objective, and the optimizer (AdamW)."""

    objective: Literal["policy_gradient", "sft_shortest", "dpo"] = "policy_gradient"
    """policy_gradient = the method's; two baselines: sft_shortest = imitate the shortest correct
    response of each group (rejection sampling); dpo = prefer it to the longest correct one. The
    baselines need rollout.policy initial."""
    dpo_beta: Positive = 0.1
    """How strongly dpo pulls towards the reference model; higher = stay closer to it."""
    learning_rate: NonNegative = 5e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall along a line or half a cosine
    towards update.min_learning_rate, which it reaches as the run ends. A resumed run then has to
    keep run.steps."""
    min_learning_rate: NonNegative = 0.0
    """The learning rate at the end of the run with the schedule linear or cosine."""
    beta1: Fraction = 0.9
    """AdamW: decay rate of the running mean of the gradients."""
    beta2: Fraction = 0.95
    """AdamW: decay rate of the running mean of the squared gradients."""
    weight_decay: NonNegative = 0.0
    """AdamW: decoupled weight decay, of all weights but norms and biases."""
    max_grad_norm: Positive = 1.0
    """Scale gradients down to this global norm."""
    warmup_updates: Natural = 6
    """Optimizer updates over which the learning rate rises linearly to its full value."""
    updates_per_batch: Count = 1
    """Optimizer updates for each step; each one uses an equal part of the step's responses."""
    surrogate: Literal["ppo", "gspo", "cispo"] = "ppo"
    """What is done about the ratio of the policy's probabilities to those before the step, which
    is 1 unless updates_per_batch > 1: ppo = clip each token's; gspo = clip that of the whole
    response, the geometric mean over its tokens; cispo = weight each token's gradient by its
    clipped ratio, so that no token is left without a gradient."""
    clip_ratio: Positive = 0.2
    """How far this ratio may move from 1; gspo wants 3e-4 or so. The log of the ratio is clamped to
    +-20."""
    clip_ratio_high: Positive | None = None
    """How far it may move up, if that is more than down (clip-higher); 0.28 is usual; null =
    clip_ratio."""
    dual_clip: Positive | None = None
    """A bound on the ratio of tokens with a negative advantage, greater than 1; 3 is usual; null =
    none."""
    truncated: Literal["wrong", "mask"] = "wrong"
    """Responses that reach rollout.max_new_tokens: wrong = learn from them as from other wrong
    ones; mask = give them no gradient (overlong filtering). Their group's baseline counts them as
    wrong either way."""
    importance_cap: Positive | None = None
    """Truncated importance sampling: weight each token by min(trainer's probability / sampler's
    probability, this), which corrects their numerical differences; 2 is usual; null = off."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How the loss averages: token_mean = over all response tokens of an update; sequence_mean =
    over the tokens of each response, then over the responses; constant = sum over tokens, divided
    by responses * rollout.max_new_tokens (Dr. GRPO), so that the step shrinks as responses do."""
    rows_per_micro_batch: Count = 8
    """Rows in each forward and backward pass, a multiple of mesh.data x mesh.fsdp; more = more
    memory, and the same loss. More are faster while rows have a few hundred positions. With
    thousands, as few as the mesh allows are fastest: the last micro-batch of each width is less
    empty. Sequences are packed into rows as wide as the longest one a run can have; if that width
    is at least 4,096, narrower rows are compiled too."""
    vocabulary_tile: Count = 2048
    """Vocabulary entries whose log-probs are computed at a time, for the response tokens of a
    micro-batch; more = faster, with more memory; at most 4,096 in passes without gradients. If it
    is at least the size of the vocabulary, the backward pass does not recompute the log-probs."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory, and copy it to the devices for each update."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Section):
    """Low-rank adapters (LoRA): train few weights, and keep the model's own frozen."""

    rank: Natural = 0
    """Rank of the adapters; 0 = no adapters, train all weights. With adapters the frozen model is
    also the reference, the optimizer's state is small, and a higher update.learning_rate, 10 times
    or more, is usual."""
    scale: Positive = 32.0
    """lora_alpha: the adapters' product is multiplied by scale / rank."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which weights of each layer have an adapter."""
    rank_stabilized: bool = False
    """Divide the scale by the square root of the rank instead, for high ranks."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Accuracy and response length on held-out problems, before and after training."""

    path: str | None = None
    """Held-out problems, named as in data.path, with the same columns; several sets, gsm8k,math500,
    are measured separately, and the first one is also used during training. null = the test splits
    of data.path, if it names presets that have one, or tiny."""
    split: str | None = None
    """Split of a Hub data set or saved folder to evaluate on; null = the preset's, or test."""
    any_template: bool = False
    """Allow evaluating a trained model on prompts in another format than it was trained on, which
    is otherwise an error."""
    problems: Natural = 600
    """Number of problems, taken from the start of each set; 0 = no evaluation."""
    samples: Count | None = None
    """Responses to each problem, over which accuracy is averaged; null = as in the paper: 1 for
    gsm8k, 3 for math500, 10 for AIME, 1 for other sets."""
    temperature: GreedyTemperature = 1.0
    """Sampling temperature; 0 = greedy."""
    top_p: Share = 1.0
    """Nucleus sampling, see rollout.top_p."""
    top_k: Count | None = None
    """See rollout.top_k."""
    min_p: Closed = 0.0
    """See rollout.min_p."""
    every: Natural = 0
    """Steps between evaluations during training; 0 = only before the first and after the last
    step."""
    max_new_tokens: Count | None = None
    """Longest response; null = rollout.max_new_tokens."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """Saving the run, to resume it and to use the model elsewhere."""

    every: Count = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Number of checkpoints to keep; older ones are deleted."""


@dataclasses.dataclass(frozen=True)
class ExportConfig(Section):
    """The trained model, in the run's folder model."""

    adapter: bool = False
    """Write the adapters alone, in the format of peft, instead of the model with the adapters
    merged into its weights; needs adapter.rank > 0."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; their product must be the number of devices."""

    data: DataAxis = -1
    """Copies of the model, which share the batch; -1 = all remaining devices."""
    fsdp: Count = 1
    """Number of parts into which weights and optimizer state are split; these devices share the
    batch too."""
    tensor: Count = 1
    """Number of parts into which heads, feed-forward layers and vocabulary are split."""
    context: Count = 1
    """Number of parts into which sequences are split."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Section):
    """Training on several hosts, with one process on each; see docs/multi-host.md."""

    mode: Literal["none", "auto", "manual"] = "none"
    """none = a single process; auto = JAX finds the other processes, in a TPU pod slice, SLURM,
    Open MPI or Kubernetes; manual = as set by the fields below."""
    coordinator_address: Address | None = None
    """manual: host:port of process 0, which all others connect to; null = the environment variable
    JAX_COORDINATOR_ADDRESS."""
    processes: Count | None = None
    """Number of processes; finding another number is an error. null = JAX_NUM_PROCESSES; if that is
    unset and mode is auto, the number that JAX finds."""
    process_id: Natural | None = None
    """manual: number of this process, from 0; null = JAX_PROCESS_ID, so that one file serves all
    hosts."""
    initialization_timeout_seconds: Count = 300
    """Seconds to wait for all processes to start; after that, any that have started exit."""
    heartbeat_timeout_seconds: HeartbeatSeconds = 30
    """Seconds without a heartbeat before a process counts as lost; the others then exit."""


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """What a run writes in addition to metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    wandb: bool = False
    """Send the metrics to Weights & Biases; needs pip install "effreason[wandb]"."""
    wandb_project: str | None = None
    """Project there; null = the environment variable WANDB_PROJECT, or effreason."""
    wandb_group: str | None = None
    """Group of runs there; null = the environment variable WANDB_RUN_GROUP; the runs of a family
    are a group named after its directory."""
    groups_per_step: Natural = 1
    """Problems of each step whose responses are written to rollouts.jsonl, with grades, rewards and
    advantages."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """Directory, seed and length of the run."""

    directory: str | None = None
    """Where the run writes its files; null = runs/<UTC time>-alpha<alpha>-seed<seed>."""
    seed: Seed = 0
    """Determines the order of the problems and every sampled token."""
    steps: Count = 100
    """Steps to train, including those done before a resume."""
    resume: bool = False
    """Continue from the newest checkpoint in run.directory."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections, checked for consistency."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    grade: GradeConfig = GradeConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    update: UpdateConfig = UpdateConfig()
    adapter: AdapterConfig = AdapterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        rollout, update, data = self.rollout, self.update, self.data
        if rollout.prompts_per_step * rollout.group_size % update.updates_per_batch:
            raise ValueError("rollout.prompts_per_step * rollout.group_size must be divisible by "
                             f"update.updates_per_batch, got {rollout.prompts_per_step} * "
                             f"{rollout.group_size} and {update.updates_per_batch}")

        if self.repetition.window < 2 * self.repetition.longest_period:
            raise ValueError("repetition.window must be at least twice repetition.longest_period, "
                             f"got {self.repetition.window} and {self.repetition.longest_period}")

        if data.choices_field is not None and data.answer_kind != "choice":
            raise ValueError("data.answer_kind must be choice if data.choices_field names a "
                             f"column, got {data.answer_kind}")

        if update.min_learning_rate > update.learning_rate:
            raise ValueError("update.min_learning_rate must not be above update.learning_rate, got "
                             f"{update.min_learning_rate:g} and {update.learning_rate:g}")

        if update.clip_ratio_high is not None and update.clip_ratio_high < update.clip_ratio:
            raise ValueError("update.clip_ratio_high must be at least update.clip_ratio, got "
                             f"{update.clip_ratio_high:g} and {update.clip_ratio:g}")

        if update.dual_clip is not None and update.dual_clip <= 1:
            raise ValueError(f"update.dual_clip must be > 1, got {update.dual_clip:g}")

        if update.aggregation == "constant" and self.kl.form == "loss":
            raise ValueError("kl.form must be none or reward with update.aggregation constant, got "
                             "loss")

        for one, other in (("group_std", "decouple"), ("whiten", "whiten_responses")):
            if getattr(self.advantage, one) and getattr(self.advantage, other):
                raise ValueError(f"advantage.{other} must be false with advantage.{one}, got true")

        if self.adapter.rank and self.kl.offload_reference:
            raise ValueError("kl.offload_reference must be false if adapter.rank > 0, got true: "
                             "the reference is the frozen part of the policy")

        if self.export.adapter and not self.adapter.rank:
            raise ValueError("export.adapter must be false if adapter.rank is 0, got true: there "
                             "are no adapters")

        if self.reward.alphas is not None:
            self._check_dial()
        if update.objective != "policy_gradient":
            self._check_baseline()
        if self.reward.target_tokens is not None or self.reward.max_accuracy_drop is not None:
            self._check_control()

        if self.run.resume and self.run.directory is None:
            raise ValueError("run.directory must name the run to resume when run.resume is true, "
                             "got null")

    @property
    def scores_reference(self) -> bool:
        """Whether something reads log-probs by the model before training."""
        return self.kl.form != "none" or self.update.objective == "dpo"

    @property
    def first_scored_update(self) -> int:
        """The first update of a step whose old log-probs are computed before all updates.

        An update that no other comes before computes its own as it computes its gradient, unless
        its advantages depend on those of other responses."""
        whitens_penalty = self.advantage.whiten and self.kl.form == "reward"
        return 0 if whitens_penalty or self.update.objective == "dpo" else 1

    @property
    def keeps_reference(self) -> bool:
        """Whether its weights stay in memory, to score with or to sample from."""
        return (self.scores_reference or self.rollout.policy == "initial"
                or self.adapter.rank > 0)

    def _check_baseline(self) -> None:
        update, condition = self.update, f"with update.objective {self.update.objective}"
        for field, value, required in (
                ("update.updates_per_batch", update.updates_per_batch, 1),
                ("kl.form", self.kl.form, "none"),
                ("advantage.whiten", self.advantage.whiten, False),
                ("advantage.group_std", self.advantage.group_std, False),
                ("advantage.decouple", self.advantage.decouple, False),
                ("advantage.whiten_responses", self.advantage.whiten_responses, False),
                ("update.surrogate", update.surrogate, "ppo"),
                ("update.truncated", update.truncated, "wrong"),
                ("update.importance_cap", update.importance_cap, None),
                ("rollout.refill_rounds", self.rollout.refill_rounds, 0)):
            if value != required:
                raise ValueError(f"{field} must be {written(required)} {condition}, got "
                                 f"{written(value)}")

    def _check_dial(self) -> None:
        for field, value, holds, required in (
                ("adapter.rank", self.adapter.rank, self.adapter.rank > 0, ">= 1"),
                ("update.objective", self.update.objective,
                 self.update.objective == "policy_gradient", "policy_gradient"),
                ("rollout.refill_rounds", self.rollout.refill_rounds,
                 self.rollout.refill_rounds == 0, "0"),
                ("rollout.policy", self.rollout.policy, self.rollout.policy == "current",
                 "current"),
                ("reward.target_tokens", self.reward.target_tokens,
                 self.reward.target_tokens is None, "null"),
                ("reward.max_accuracy_drop", self.reward.max_accuracy_drop,
                 self.reward.max_accuracy_drop is None, "null")):
            if not holds:
                raise ValueError(f"{field} must be {required} with reward.alphas, got "
                                 f"{written(value)}")

        largest = self.reward.dial[-1]
        if self.reward.alpha > largest:
            raise ValueError(f"reward.alpha must be at most {largest:g}, the largest of "
                             f"reward.alphas, got {self.reward.alpha:g}")

    def _check_control(self) -> None:
        reward, evaluation = self.reward, self.evaluation
        condition = "if reward.target_tokens or reward.max_accuracy_drop moves alpha"
        if reward.form != "efficient":
            raise ValueError(f"reward.form must be efficient {condition}, got {reward.form}")

        if evaluation.every == 0 or evaluation.problems == 0:
            raise ValueError(f"evaluation.every and evaluation.problems must be >= 1 {condition}, "
                             f"got {evaluation.every} and {evaluation.problems}")

        if not 0 < reward.alpha_min <= reward.alpha <= reward.alpha_max:
            raise ValueError("reward.alpha must be between reward.alpha_min, > 0, and "
                             f"reward.alpha_max {condition}, got {reward.alpha}, "
                             f"{reward.alpha_min} and {reward.alpha_max}")


# The tiny world's learning rate and prompt would ruin any other model: its file is the default for
# nothing else.
MADE_FOR = {"model.path": frozenset({"tiny"}), "data.path": frozenset({"tiny"}),
            "evaluation.path": frozenset({"tiny", "tiny_long", "tiny_other"})}


def shipped() -> Path:
    """Returns the directory of the shipped configurations, installed or in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def parse(parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None,
          default: str = "configs/tiny.yaml") -> tuple[Config, jsonargparse.Namespace]:
    """Reads `[--config FILE] [--section.field VALUE ...]` and the other options of `parser`.

    Args: argv, None = sys.argv; default, the file to read without --config, unless a flag names a
        model or data set that it is not made for.
    Raises: UserError for any mistake; SystemExit(0) after --help and --print_config."""
    config, values = config_parser.parse(Config, parser, argv, shipped().parent / default, MADE_FOR)
    if values.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, values


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a YAML file; fields that it leaves out have their defaults. Raises: UserError."""
    parser = config_parser.parser(Config, "load")
    values = config_parser.read(Config, parser, Path(path), jsonargparse.Namespace())
    return config_parser.build(Config, values)


def recipes(model: str, devices: int) -> list[str]:
    """Returns the shipped configurations of a model for this number of devices."""
    # Read as plain YAML: to check every field of every file takes seconds.
    found = {path.name: yaml.safe_load(path.read_text("utf-8"))
             for path in sorted(shipped().glob("*.yaml"))}
    return [f"configs/{name}" for name, table in found.items()
            if table.get("model", {}).get("path") == model
            and math.prod(dataclasses.astuple(MeshConfig(**table.get("mesh", {})))) == devices]


def to_yaml(config: Config) -> str:
    """Returns the whole configuration as YAML, in the order of the dataclasses."""
    return yaml.dump(dataclasses.asdict(config), Dumper=config_parser.Dumper, sort_keys=False,
                     allow_unicode=True, width=110)


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the configuration as YAML, completely or not at all. Raises: UserError."""
    with files.replacing(Path(path)) as partial:
        partial.write_text(to_yaml(config), encoding="utf-8")


def facts(config: Config) -> dict[str, str]:
    """Returns each field as text, without the host's own: these must agree between processes."""
    return {setting.field: written(getattr(getattr(config, setting.section), setting.name))
            for setting in all_settings(Config) if setting.section != "distributed"}


def differences(a: Config, b: Config) -> list[str]:
    """Returns the fields that differ, each as "field: a -> b"."""
    lines = []
    for setting in all_settings(Config):
        old, new = (getattr(getattr(config, setting.section), setting.name) for config in (a, b))
        if old != new:
            lines.append(f"{setting.field}: {written(old)} -> {written(new)}")
    return lines
