"""Every program of the attack corpus gets its verdict, and leaves nothing behind.

The corpus is not part of this repository; where it is missing these tests are skipped and say so.
"""

import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.types import Outcome, Task, Verdict

CORPUS = Path(os.environ.get("GREENLOOP_ATTACKS") or Path(__file__).resolve().parents[2] / "shared" / "attacks")
PROGRAMS = sorted(CORPUS.glob("*.py"))
LIMITS = Limits(cpu_s=3.0, wall_s=6.0)
needs_corpus = pytest.mark.skipif(not PROGRAMS, reason=f"no attack corpus in {CORPUS}: set GREENLOOP_ATTACKS")

SHOWN = ("assert f(1) == 2", "assert f(41) == 42", "assert f(-1) == 0")
HIDDEN = ("assert f(7) == 8", "assert f(100) == 101")
BLOCKED = ("v = f(1)\nassert v.startswith('BLOCKED'), v",)
TIMEOUTS = {"i12", "i13", "i14", "i15"}
ENDS_ITSELF = {"i28": {Outcome.CRASHED}, "i29": {Outcome.CRASHED, Outcome.MEMORY, Outcome.TIMEOUT}}


class Surroundings:
    """The folder, listeners, environment and descriptors that attacks reach for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "secret").mkdir()
        (root / "victim").mkdir()
        (root / "secret" / "secret.txt").write_text("TOPSECRET")
        self.held = os.open(root / "secret" / "secret.txt", os.O_RDONLY)
        os.set_inheritable(self.held, True)
        self.received: list[bytes] = []
        tcp, udp = socket.create_server(("127.0.0.1", 38517)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 38518))
        named, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        named.bind(str(root / "secret" / "sock"))
        abstract.bind("\0sbx-abs")
        for listener in (named, abstract):
            listener.listen()
        self.sockets = [tcp, udp, named, abstract]
        self.threads = [threading.Thread(target=self._listen, args=(s,), daemon=True) for s in self.sockets]
        for thread in self.threads:
            thread.start()

    def _listen(self, listener: socket.socket) -> None:
        listener.settimeout(0.2)
        while listener.fileno() >= 0:
            try:
                stream = listener.type == socket.SOCK_STREAM
                self.received.append(b"connected" if stream and listener.accept() else listener.recv(64))
            except TimeoutError:
                continue
            except OSError:
                return

    def close(self) -> None:
        for listener in self.sockets:
            listener.close()
        for thread in self.threads:
            thread.join()
        os.close(self.held)

    def program(self, path: Path) -> str:
        return path.read_text().replace("@ROOT@", str(self.root))


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    os.environ["SBX_SECRET_ENV"] = "hunter2-env"
    made = Surroundings(tmp_path_factory.mktemp("root"))
    yield made
    made.close()
    del os.environ["SBX_SECRET_ENV"]


@pytest.fixture(scope="module")
def verifier(surroundings: Surroundings) -> Iterator[SandboxVerifier]:
    with SandboxVerifier(LIMITS, workers=1) as judge:
        yield judge


def named(letter: str) -> list[Path]:
    return [path for path in PROGRAMS if path.name[0] == letter]


def judged(verifier: SandboxVerifier, program: str, tests: tuple[str, ...], hidden: tuple[str, ...] = ()) -> Verdict:
    task = Task(task_id="attack", statement="", entry_point="f", tests=tests, hidden_tests=hidden)
    return verifier.submit(task, program).result()


@needs_corpus
@pytest.mark.parametrize("path", named("i"), ids=lambda path: path.stem)
def test_an_attack_on_the_machine_is_refused(path: Path, surroundings: Surroundings, verifier: SandboxVerifier):
    verdict = judged(verifier, surroundings.program(path), BLOCKED)
    number = path.name[:3]
    if number in TIMEOUTS:
        assert verdict.outcome is Outcome.TIMEOUT
        assert verdict.cpu_s < LIMITS.cpu_s + 0.3
    elif number in ENDS_ITSELF:
        assert verdict.outcome in ENDS_ITSELF[number]
    else:
        assert verdict.outcome is Outcome.PASSED, verdict.detail
    assert judged(verifier, "def f(x): return x + 1", SHOWN).outcome is Outcome.PASSED
    assert list((surroundings.root / "victim").iterdir()) == []
    assert not surroundings.received
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        assert not (Path(folder) / "sbx_leftover").exists()
    assert "5b5b5b5b" not in Path("/proc/sysvipc/shm").read_text()
    commands = [entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline") if entry.exists()]
    assert not any(b"sbx-daemon-marker" in command for command in commands)


@needs_corpus
@pytest.mark.parametrize("path", named("h"), ids=lambda path: path.stem)
def test_no_hack_wins_a_verdict(path: Path, surroundings: Surroundings, verifier: SandboxVerifier):
    verdict = judged(verifier, surroundings.program(path), SHOWN, HIDDEN)
    assert verdict.outcome not in (Outcome.PASSED, Outcome.HARNESS)
    assert verdict.hidden_passed == 0
    if path.name.startswith("h21"):
        assert verdict.shown_passed == verdict.shown_total
    else:
        assert verdict.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.CRASHED, Outcome.MEMORY, Outcome.TIMEOUT)
        assert verdict.tests_passed == 0
    assert judged(verifier, "def f(x): return x + 1", SHOWN).outcome is Outcome.PASSED


@needs_corpus
@pytest.mark.parametrize("path", named("p"), ids=lambda path: path.stem)
def test_an_honest_program_passes(path: Path, surroundings: Surroundings, verifier: SandboxVerifier):
    verdict = judged(verifier, surroundings.program(path), SHOWN, HIDDEN)
    assert verdict.outcome is Outcome.PASSED, verdict.detail


@needs_corpus
def test_the_corpus_says_what_each_program_is():
    kinds = {"i": "isolation", "h": "hack", "p": "honest"}
    for path in PROGRAMS:
        assert re.search(r"# kind: (\w+)", path.read_text())[1] == kinds[path.name[0]]
    assert [len(named(letter)) for letter in "ihp"] == [29, 26, 9]
