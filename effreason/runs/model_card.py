"""The model card of an exported directory: where the model comes from, what was measured, and how to use it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from effreason.evaluation.statistics import Summary
from effreason.lm.hf.hub import is_hub_id
from effreason.types import LevelResult

PAPER = "https://arxiv.org/abs/2502.04463"
TAGS = ["effreason", "reasoning", "efficient-reasoning", "reinforcement-learning", "arxiv:2502.04463"]


def model_card(*, base_model: str, base_revision: str | None, alpha: float, data: str, step: int, version: str,
               template: str, template_sha256: str, user_prompt: str, temperature: float, top_p: float,
               max_new_tokens: int, datasets: Sequence[str] = (), evaluation_set: str | None = None,
               before: Summary | None = None, after: Summary | None = None,
               settings: Mapping[str, Any] | None = None) -> str:
    """The text of README.md, as the Hugging Face Hub shows it.

    Args: base_model, as the user named it, and the commit of one on the Hub; data, the problems as the configuration
        names them, and datasets, those of them that are on the Hub; step, updates done; template, the name of the chat
        template, and the hash of its text; user_prompt, the user's turn, where {problem} stands for the problem;
        max_new_tokens, of a training response; before and after, the base model and this one on evaluation_set, None
        where it was not measured; settings, other facts worth a row, by name.
    Returns: Markdown behind a YAML header."""
    on_hub = base_revision is not None and is_hub_id(base_model)
    # A path on the machine of the training says nothing to a reader of the card.
    base = base_model if on_hub else Path(base_model).name or base_model
    header = ModelCardData(
        base_model=base if on_hub else None, base_model_relation="finetune" if on_hub else None,
        library_name="transformers", pipeline_tag="text-generation", tags=TAGS,
        datasets=[each for each in datasets if is_hub_id(each)] or None).to_yaml()
    named = f"[{base}](https://huggingface.co/{base}/tree/{base_revision})" if on_hub else f"`{base}`"
    facts = {"base model": f"{base} at commit {base_revision}" if on_hub else base, "alpha": f"{alpha:g}",
             "trained on": data, "steps": f"{step:,}", "sampling temperature": f"{temperature:g}",
             "longest training response": f"{max_new_tokens:,} tokens",
             "chat template": f"{template}, SHA-256 {template_sha256}", "effreason": version, **(settings or {})}
    return "\n\n".join([
        f"---\n{header}\n---",
        f"# {base}, taught to reason efficiently (α = {alpha:g})",
        f"{named} after {step:,} steps of reinforcement learning with effreason {version}, by the method of "
        f"[Training Language Models to Reason Efficiently]({PAPER}): of the correct answers to a problem, one that is "
        "longer than the others earns a little less. α says how much less: at 0 only correctness counts, and the "
        "larger it is, the shorter the reasoning.",
        *_evaluation(evaluation_set, before, after),
        *_use(user_prompt, temperature, top_p, max_new_tokens),
        "## Training",
        _table(("", ""), [(name, str(value)) for name, value in facts.items()]),
    ]) + "\n"


def _evaluation(name: str | None, before: Summary | None, after: Summary | None) -> list[str]:
    """The section with the measurements, as far as there are any."""
    known = after or before
    if known is None:
        return ["## Evaluation", "This model was not evaluated."]
    text = (f"{known.problems:,} held-out problems{f' of {name}' if name else ''}, {known.samples} sampled "
            f"response{'s' * (known.samples > 1)} to each. Tokens are the mean length of a response.")
    if before is None or after is None:
        text += f" Only {'this model' if before is None else 'the base model'} was evaluated."
    levels = list(known.by_level) if len(known.by_level) > 1 else []
    rows = [_row(level, before and before.by_level.get(level), after and after.by_level.get(level)) for level in levels]
    head = ["problems", *["accuracy before"] * bool(before), *["accuracy after"] * bool(after),
            *["tokens before"] * bool(before), *["tokens after"] * bool(after),
            *["tokens saved"] * bool(before and after)]
    return ["## Evaluation", text, _table(head, [*rows, _row("all", before, after)])]


def _row(name: str, before: Summary | LevelResult | None, after: Summary | LevelResult | None) -> list[str]:
    measured = [each for each in (before, after) if each is not None]
    row = [name, *(f"{100 * each.accuracy:.1f} %" for each in measured), *(f"{each.tokens:,.0f}" for each in measured)]
    if before is not None and after is not None:
        row.append(f"{100 * (1 - after.tokens / before.tokens):.1f} %" if before.tokens else "0.0 %")
    return row


def _use(user_prompt: str, temperature: float, top_p: float, max_new_tokens: int) -> list[str]:
    sampling = f"temperature={temperature:g}, top_p={top_p:g}"
    message = user_prompt.replace("{problem}", "What is the sum of the first 100 positive integers?")
    return [
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory, or its id on the Hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")\n'
        f"messages = [{{\"role\": \"user\", \"content\": {message!r}}}]\n"
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors=\"pt\",\n"
        "                                       return_dict=True).to(model.device)\n"
        f"output = model.generate(**prompt, do_sample=True, {sampling}, top_k=0, max_new_tokens={max_new_tokens})\n"
        "print(tokenizer.decode(output[0, prompt[\"input_ids\"].shape[1]:], skip_special_tokens=True))\n"
        "```",
        f"Sample rather than decode greedily, best as here ({sampling}): the model was trained on responses drawn at "
        f"temperature {temperature:g}, of at most {max_new_tokens:,} tokens. Put the question into the user's turn as "
        "above, without a system prompt; the chat template that comes with the model is the one of its training.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in line) + " |"
                     for line in lines)
