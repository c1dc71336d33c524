"""The model card of a trained adapter, from its run folder and nothing else.

In: a run folder (`recipe.toml`, `environment.json`, `adapter/adapter_config.json`, and where they exist `results.json`
and `journal.jsonl`). Out: `adapter/README.md` with the hub's metadata. What the run did not measure, or whose source it
does not know, is left out rather than guessed; no network, no torch.
"""

from greenloop.card.run import RunFacts, read_run
from greenloop.card.write import quick_start, render_card, write_card

__all__ = ["RunFacts", "quick_start", "read_run", "render_card", "write_card"]
