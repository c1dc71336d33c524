"""The card itself: metadata, sections and the quick start, put together and written.

In: a run folder. Out: `adapter/README.md`, whole or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

from greenloop.card.metadata import metadata
from greenloop.card.run import RunFacts, read_run
from greenloop.card.sections import limits, results, task_link, training, versions
from greenloop.card.text import CHAT_QUICK_START, CITATIONS, EXAMPLE, PLAIN_QUICK_START
from greenloop.files import write_atomically
from greenloop.prompt import get_protocol
from greenloop.recipe import Recipe


def write_card(run_dir: Path, *, hub_id: str = "") -> Path:
    """Write the card of the run's adapter; its path.

    Args:
        run_dir: The run folder.
        hub_id: Where the adapter will be published; the quick start then names it instead of the folder.

    Raises:
        RunError: a file that the card is made of is missing or damaged, or the card cannot be written.
        ConfigError: the recipe cannot be read.
    """
    facts = read_run(run_dir)
    path = run_dir / "adapter" / "README.md"
    write_atomically(path, render_card(facts, hub_id or str((run_dir / "adapter").resolve())))
    return path


def render_card(facts: RunFacts, adapter: str) -> str:
    """The card's whole text; `adapter` is what the quick start loads."""
    base = facts.base_id or str(facts.model.get("spec") or facts.adapter.get("base_model_name_or_path", ""))
    sections = [
        f"# {facts.folder.resolve().name}",
        f"A LoRA adapter for `{base}` that writes Python functions which pass tests. It was trained by reinforcement "
        f"learning (RLOO) on {task_link(facts.environment.get('tasks', {}), facts.recipe.tasks)} with unit tests as "
        "the only judge, by greenloop.",
        "## Results\n\n" + results(facts),
        f"## Quick start\n\n```python\n{quick_start(facts.recipe, adapter)}\n```",
        "## How it was trained\n\n" + training(facts),
        "## Versions\n\n" + versions(facts.environment),
        "## Limits\n\n" + "\n".join(f"* {limit}" for limit in limits(facts)),
        f"## Citations\n\n```bibtex\n{CITATIONS}\n```",
    ]
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def quick_start(recipe: Recipe, adapter: str) -> str:
    """A program that loads the adapter and asks it a coding question as in training, greedily.

    A recipe with a plain-text protocol gets a plain-text question, any other the messages of the `train` protocol.
    """
    limit = recipe.sampling.max_new_tokens
    if not get_protocol(recipe.prompt.protocol).needs_chat_template:
        (message,) = get_protocol("bigcode").compose(EXAMPLE.showing(1), ())
        return PLAIN_QUICK_START.format(
            adapter=json.dumps(adapter), prompt=json.dumps(message["content"]), max_new_tokens=limit
        )
    system, user = get_protocol("train").compose(EXAMPLE, ())
    # No literal fence inside the card's own one.
    question = user["content"].replace("{", "{{").replace("}", "}}").replace("```", "{fence}")
    return CHAT_QUICK_START.format(
        adapter=json.dumps(adapter), question=question, system=json.dumps(system["content"]), max_new_tokens=limit
    )
