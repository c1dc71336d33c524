"""Rows of a data set on the Hugging Face hub, through `datasets`, which caches them.

In: a data set id and one of its configurations. Out: plain rows without the name of their hub split, because
the official splits of our sets follow from the ids. Knows nothing of tasks. `datasets` is imported only when asked.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from greenloop.errors import TaskError


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRows:
    """What the hub gave."""

    rows: tuple[Mapping[str, object], ...]
    source: str
    """The id, the configuration and, where `datasets` tells it, the revision."""


def download(hub_id: str, config: str) -> HubRows:
    """All rows of all splits, from the hub or from the cache of `datasets`.

    Raises:
        TaskError: the data set is neither reachable nor cached.
    """
    import datasets

    try:
        splits = datasets.load_dataset(hub_id, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TaskError(
            f"{hub_id} ({config}) can be had neither from the hub nor from its cache: set GREENLOOP_DATA_DIR to a "
            f"folder that holds its file, or check the network ({type(error).__name__}: {reason})."
        ) from error
    checksums = " ".join(str(url) for split in splits.values() for url in split.info.download_checksums or ())
    revision = re.search(r"@([0-9a-f]{40})/", checksums)
    source = f"{hub_id} ({config})" + (f" at revision {revision.group(1)}" if revision else "")
    return HubRows(rows=tuple(dict(row) for split in splits.values() for row in split), source=source)
