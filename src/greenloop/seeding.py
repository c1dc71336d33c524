"""Every random draw has an address, never an order.

In: a root seed and the address of a draw (purpose, step, task, sample). Out: a seed.
Knows nothing of generators, devices or state; resuming a run therefore needs no hidden random state.
"""

import hashlib


def seed_for(root: int, *address: str | int) -> int:
    """63-bit seed, a pure function of its arguments and stable across processes (unlike `hash`).

    >>> seed_for(0, "rollout", 3) == seed_for(0, "rollout", 3) != seed_for(0, "rollout", 4)
    True
    >>> seed_for(0, "a", "b") != seed_for(0, "a/b")
    True
    """
    digest = hashlib.sha256(repr((root, *address)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
