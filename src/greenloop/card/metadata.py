"""The hub's metadata of a card: what stands between the `---` lines.

In: what a run says. Out: `ModelCardData`, with a model index of what was measured. What is unknown is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from greenloop.card.run import RunFacts
from greenloop.results import Record, estimate_of
from greenloop.summary import Mode

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_LICENCE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")


def metadata(facts: RunFacts) -> ModelCardData:
    """The hub's metadata; what is unknown is left out."""
    from huggingface_hub import ModelCardData

    base, scores = facts.base_id, list(_eval_results(facts.results))
    hub_data = facts.environment.get("tasks", {}).get("hub_id")
    licence = str(facts.model.get("licence", "")).lower().replace(" ", "-")
    return ModelCardData(
        base_model=base or None,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=licence if _LICENCE.fullmatch(licence) else None,
        datasets=[hub_data] if hub_data else None,
        tags=[*([f"base_model:adapter:{base}"] if base else []), "lora", "rloo", "transformers", "code", "greenloop"],
        model_name=facts.folder.resolve().name if scores else None,
        eval_results=scores or None,
    )


def _eval_results(results: Record) -> Iterator[EvalResult]:
    """One pass@1 a mode, as measured after training; the base model's score stands in its name and arguments."""
    from huggingface_hub import EvalResult

    after, before = results.get("after"), results.get("before")
    if not after:
        return
    tasks, settings = after["tasks"], after["settings"]
    for mode in Mode:
        key = mode.value
        if not after[key]:
            continue
        score = estimate_of(after[key]["pass_at_k"]["1"])
        arguments = {"low_95": round(score.low, 4), "high_95": round(score.high, 4), "protocol": settings["protocol"]}
        name = f"pass@1, {key}"
        if key == "sampled":
            arguments |= {"temperature": settings["temperature"], "samples": settings["samples"]}
        if before and before[key]:
            base_score = round(before[key]["pass_at_k"]["1"]["value"], 4)
            arguments["before_training"] = base_score
            name += f" (before training: {base_score})"
        yield EvalResult(
            task_type="text-generation",
            dataset_type=tasks["hub_id"] or tasks["name"],
            dataset_name=tasks["spec"],
            dataset_split=tasks["spec"].rpartition(":")[2] if ":" in tasks["spec"] else None,
            metric_type="pass@1",
            metric_value=round(score.value, 4),
            metric_name=name,
            metric_args=arguments,
        )
