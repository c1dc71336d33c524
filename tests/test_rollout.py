"""A step's groups in parts."""

from itertools import chain

import pytest

from greenloop.rollout import Wanted, in_parts
from greenloop.types import Prompt, Task


def wanted(groups: int, samples: int, prompt_tokens: int = 150) -> list[Wanted]:
    task = Task(task_id="one", statement="Add.", entry_point="f", tests=("assert f(1) == 2",))
    prompt = Prompt(task=task, text="", token_ids=(7,) * prompt_tokens, protocol="train")
    return [Wanted(prompt, samples, seed) for seed in range(groups)]


@pytest.mark.parametrize(
    ("groups", "samples", "new_tokens", "room", "sizes"),
    [
        (8, 8, 1850, 0, [8]),  # nothing is kept
        (8, 8, 1850, 12000, [8]),  # less than 1.5 times the room: what has none is computed again
        (8, 8, 1850, 9000, [4, 4]),
        (8, 8, 1850, 4400, [2, 2, 2, 2]),
        (8, 8, 1850, 4300, [2, 2, 2, 2]),  # with a margin only one has room, and would be too few rows
        (8, 8, 1850, 2300, [2, 2, 2, 2]),
        (8, 8, 1850, 2100, [8]),  # not even one
        (4, 4, 850, 1200, [4]),  # 16 rows are the least
        (5, 4, 850, 1200, [5]),  # also of what is left
        (7, 16, 1850, 4400, [1, 2, 2, 2]),
        (3, 64, 1850, 2300, [1, 1, 1]),
    ],
)
def test_parts_have_room_or_sixteen_rows(groups: int, samples: int, new_tokens: float, room: int, sizes: list[int]):
    everything = wanted(groups, samples)
    parts = in_parts(everything, room, new_tokens)
    assert [len(part) for part in parts] == sizes
    assert list(chain(*parts)) == everything
