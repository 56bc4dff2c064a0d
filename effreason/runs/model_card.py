"""The model card of an exported directory: base model, measurements, and how to use the model."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from effreason import __version__
from effreason.data.presets import PRESETS
from effreason.data.templates import Template
from effreason.evaluation import wording
from effreason.evaluation.statistics import Summary
from effreason.lm.hf.hub import is_hub_id, public_name
from effreason.lm.hf.pretrained import CARD_FILE
from effreason.runs.session import Inputs
from effreason.runtime.config import Config
from effreason.runtime.progress import duration
from effreason.types import LevelResult

PAPER = "https://arxiv.org/abs/2502.04463"
TAGS = ["effreason", "reasoning", "efficient-reasoning", "reinforcement-learning",
        "arxiv:2502.04463"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a finished run has cost, as it was measured."""

    seconds: float                  # of the whole run
    tokens_per_second: float        # of its sampler, the median step
    device: str
    devices: int


def model_card(config: Config, inputs: Inputs, *, step: int, alpha: float,
               before: Summary | None = None, after: Summary | None = None,
               cost: Cost | None = None) -> str:
    """Returns the text of README.md for the Hugging Face Hub: Markdown after a YAML header.

    Args: step, updates made; alpha, the last one; before and after, the base model and this one on
        the first evaluation set, None = not measured; cost, of the run."""
    revision, template, adapter = inputs.pretrained.revision, inputs.template, config.export.adapter
    base, stored = public_name(inputs.pretrained.base), inputs.pretrained.adapters
    link = f"[{base}](https://huggingface.co/{base}/tree/{revision})" if revision else f"`{base}`"
    header = ModelCardData(
        base_model=base if revision else None,
        base_model_relation=("adapter" if adapter else "finetune") if revision else None,
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation",
        tags=TAGS + ["lora"] * adapter, datasets=_hub_datasets(inputs),
        model_name=f"{base}, alpha {alpha:g}", eval_results=_eval_results(inputs, after),
        **_license(inputs.pretrained.directory)).to_yaml()

    training = {
        "base model": f"{base} at commit {revision}" if revision else base, "alpha": f"{alpha:g}",
        **({"alphas of the dial": ", ".join(f"{one:g}" for one in config.reward.dial)}
           if config.reward.dial else {}),
        "trained on": ", ".join(public_name(source.name) for source in inputs.problems.sources),
        "steps": f"{step:,}", "sampling temperature": f"{config.rollout.temperature:g}",
        "longest training response": f"{config.rollout.max_new_tokens:,} tokens",
        "chat template": f"{template.name}, SHA-256 {template.sha256}", "effreason": __version__}
    if stored is not None:
        training["adapters it started from"] = public_name(str(stored.directory))
    if config.adapter.rank:
        training["adapters"] = f"rank {config.adapter.rank}, {config.adapter.targets}"
    if config.update.objective != "policy_gradient":
        training["objective"] = config.update.objective
    if config.reward.form != "efficient":
        training["reward"] = config.reward.form
    if template.arguments:
        training["arguments of the chat template"] = json.dumps(dict(template.arguments))

    return "\n\n".join([
        f"---\n{header}\n---",
        f"# {base}, taught to reason efficiently (α = {alpha:g})",
        f"{link} after {step:,} steps of reinforcement learning with effreason {__version__}, by "
        f"the method of [Training Language Models to Reason Efficiently]({PAPER}): of the correct "
        "answers to a problem, one that is longer than the others earns a little less. α says how "
        "much less: at 0 only correctness counts, and the larger it is, the shorter the reasoning.",
        *dial_words(config, alpha),
        *_evaluation(next(iter(inputs.held_out), None), before, after),
        *break_even(before, after, cost),
        *_use(config, template, base, _example(inputs)),
        "## Training",
        _table(("", ""), list(training.items())),
    ]) + "\n"


def dial_words(config: Config, alpha: float) -> list[str]:
    """Returns a paragraph on the dial that an alpha was chosen of; none without a dial."""
    trained_at = config.reward.dial
    if not trained_at:
        return []
    words = ", ".join(f"{one:g}" for one in trained_at)
    which = ("one of those it was trained at" if alpha in trained_at else
             "which lies between those it was trained at")
    return [f"α was chosen after the training. One run, a dial, has trained the weights of every α "
            f"from {trained_at[0]:g} to {trained_at[-1]:g}; these are the ones at α = {alpha:g}, "
            f"{which}: {words}."]


def break_even(before: Summary | None, after: Summary | None, cost: Cost | None) -> list[str]:
    """Returns the section on when the run has paid for itself; none if it saved no tokens.

    All figures are measured: no price is assumed."""
    if before is None or after is None or cost is None:
        return []
    saved = before.tokens - after.tokens
    if saved <= 0 or not cost.tokens_per_second > 0:
        return []
    responses = cost.seconds * cost.tokens_per_second / saved
    devices = cost.device if cost.devices == 1 else f"{cost.devices} x {cost.device}"
    return ["## When it pays", (
        f"A response to the problems above has {saved:,.0f} tokens fewer: a million responses save "
        f"{saved:,.0f} times the price of a million output tokens. The run took "
        f"{duration(cost.seconds)} on {devices}, where its sampler made "
        f"{cost.tokens_per_second:,.0f} tokens/s. At that speed it has paid for itself after "
        f"{responses:,.0f} responses: from then on more time was saved than it took.")]


def _example(inputs: Inputs) -> str:
    """Returns a problem of the kind that the model was trained for."""
    held_out = [problem for problems in inputs.held_out.values() for problem in problems[:1]]
    return held_out[0].text if held_out else "What is the sum of the first 100 positive integers?"


def _hub_datasets(inputs: Inputs) -> list[str] | None:
    """Returns the ids of the training data on the Hub."""
    ids = [PRESETS[source.name].hub if source.name in PRESETS else source.name
           for source in inputs.problems.sources]
    return [name for name in ids if name and is_hub_id(name) and not Path(name).exists()] or None


def _license(base: Path) -> dict[str, Any]:
    """Returns the license that the base's own card names; weights trained from it inherit it."""
    if not (base / CARD_FILE).is_file():
        return {}
    try:
        data = ModelCard.load(base / CARD_FILE, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):        # somebody's file, which decides nothing else
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _eval_results(inputs: Inputs, after: Summary | None) -> list[EvalResult] | None:
    """Returns accuracy and tokens for the Hub's table of results; None = not measured."""
    name = next(iter(inputs.held_out), None)
    if name is None or after is None:
        return None
    preset = PRESETS.get(name)
    dataset = preset.hub if preset and preset.hub else public_name(name)
    return [EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=public_name(name),
        dataset_split=preset.test if preset else None, metric_type=kind, metric_name=metric,
        metric_value=round(value, 4))
        for kind, metric, value in (
            ("accuracy", f"accuracy, {after.problems:,} problems", after.accuracy),
            ("tokens", "mean tokens of a response", after.tokens))]


def _evaluation(name: str | None, before: Summary | None, after: Summary | None) -> list[str]:
    """Returns the section with the measurements, as far as there are any."""
    known = after or before
    if known is None:
        return ["## Evaluation", "This model was not evaluated."]

    text = (f"{known.problems:,} held-out problems{f' of {public_name(name)}' if name else ''}, "
            f"{known.samples} sampled response{'s' * (known.samples > 1)} to each. Tokens are the "
            "mean length of a response.")
    if before is None or after is None:
        text += f" Only {'this model' if before is None else 'the base model'} was evaluated."

    levels = list(known.by_level) if len(known.by_level) > 1 else []
    rows = [_row(level, before and before.by_level.get(level), after and after.by_level.get(level))
            for level in levels]
    times = [time for time, summary in (("before", before), ("after", after)) if summary]
    head = ["problems", *(f"accuracy {time}" for time in times),
            *(f"tokens {time}" for time in times), *["tokens saved"] * (len(times) == 2)]
    return ["## Evaluation", text, _table(head, [*rows, _row("all", before, after)])]


def _row(name: str, before: Summary | LevelResult | None,
         after: Summary | LevelResult | None) -> list[str]:
    measured = [result for result in (before, after) if result is not None]
    row = [name, *(wording.percent(result.accuracy) for result in measured),
           *(f"{result.tokens:,.0f}" for result in measured)]
    if before is not None and after is not None:
        row.append(wording.percent(1 - after.tokens / before.tokens if before.tokens else 0.0))
    return row


def _use(config: Config, template: Template, base: str, problem: str) -> list[str]:
    rollout = config.rollout
    kind = [f"This directory holds low-rank adapters (LoRA) for `{base}`, which transformers adds "
            "to that model; it needs the package `peft`."] if config.export.adapter else []
    sampling = f"temperature={rollout.temperature:g}, top_p={rollout.top_p:g}"
    messages = template.messages(problem)
    indent = ",\n            "
    arguments = f"**{dict(template.arguments)!r}, " if template.arguments else ""
    system = ("without a system prompt" if template.system_prompt is None
              else "after the same system prompt")
    served = "" if not template.arguments else (
        " It was used with the arguments above; a server such as vLLM takes them as "
        f"`\"chat_template_kwargs\": {json.dumps(dict(template.arguments))}` in each request.")
    return [
        "## Use", *kind,
        f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")
messages = [{indent.join(map(repr, messages))}]
prompt = tokenizer.apply_chat_template(
    messages, {arguments}add_generation_prompt=True, return_tensors="pt", return_dict=True,
).to(model.device)
output = model.generate(**prompt, do_sample=True, {sampling}, top_k=0,
                        max_new_tokens={rollout.max_new_tokens})
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1]:]))
```""",
        f"Sample rather than decode greedily, best as here ({sampling}): the model was trained on "
        f"responses sampled at temperature {rollout.temperature:g}, of at most "
        f"{rollout.max_new_tokens:,} tokens. Put the question into the user's turn as above, "
        f"{system}; the chat template in this directory is the one of the training.{served}",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; characters that would end a cell are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in line)
                     + " |" for line in lines)
