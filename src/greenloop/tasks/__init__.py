"""Task sets: from a spec such as `starter:train`, `mbpp:test` or `my.jsonl` to frozen tasks with a content hash.

`load_tasks` is the door. `greenloop.tasks.check` runs references, `greenloop.tasks.audit` looks for near-duplicates.
Nothing here executes a task's code, and nothing here reads the environment.
"""

from greenloop.tasks.content import content_sha256
from greenloop.tasks.spec import load_tasks

__all__ = ["content_sha256", "load_tasks"]
