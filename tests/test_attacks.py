"""Every program of the attack corpus gets its verdict, and leaves nothing behind.

The corpus is not part of this repository; where it is missing these tests are skipped and say so.
"""

import re
from collections.abc import Iterator

import pytest

from attack_corpus import ATTACKS, CORPUS, LIMITS, SHOWN, Attack, Surroundings
from greenloop.sandbox import SandboxVerifier
from greenloop.types import Outcome, Task

needs_corpus = pytest.mark.skipif(not ATTACKS, reason=f"no attack corpus in {CORPUS}: set GREENLOOP_ATTACKS")
AFTER = Task(task_id="after", statement="", entry_point="f", tests=SHOWN)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    made = Surroundings(tmp_path_factory.mktemp("root"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def verifier(surroundings: Surroundings) -> Iterator[SandboxVerifier]:
    with SandboxVerifier(LIMITS, workers=1) as judge:
        yield judge


@needs_corpus
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.path.stem)
def test_a_program_of_the_corpus_gets_its_verdict(
    attack: Attack, surroundings: Surroundings, verifier: SandboxVerifier
):
    assert attack.objection(attack.judge(verifier, surroundings.root)) == ""
    assert surroundings.damage() == []
    assert verifier.submit(AFTER, "def f(x): return x + 1").result().outcome is Outcome.PASSED


@needs_corpus
def test_the_corpus_says_what_each_program_is():
    kinds = {"i": "isolation", "h": "hack", "p": "honest"}
    for attack in ATTACKS:
        assert re.search(r"# kind: (\w+)", attack.path.read_text())[1] == kinds[attack.kind]
    assert [sum(attack.kind == kind for attack in ATTACKS) for kind in "ihp"] == [29, 26, 9]
