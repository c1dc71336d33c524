"""The attack corpus and what is expected of each program, for the tests and for other users and machines by hand:

    python tests/attack_corpus.py        # judges all of it as whoever runs this; needs the standard library alone

The corpus is not part of this repository: GREENLOOP_ATTACKS names its folder.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from greenloop.sandbox import Limits, SandboxVerifier
from greenloop.types import Outcome, Task, Verdict

CORPUS = Path(os.environ.get("GREENLOOP_ATTACKS") or Path(__file__).resolve().parents[2] / "shared" / "attacks")
PROGRAMS = sorted(CORPUS.glob("*.py"))
LIMITS = Limits(cpu_s=3.0, wall_s=6.0)

SHOWN = ("assert f(1) == 2", "assert f(41) == 42", "assert f(-1) == 0")
HIDDEN = ("assert f(7) == 8", "assert f(100) == 101")
BLOCKED = ("v = f(1)\nassert v.startswith('BLOCKED'), v",)
TIMEOUTS = {"i12", "i13", "i14", "i15"}
ENDS_ITSELF = {"i28": {Outcome.CRASHED}, "i29": {Outcome.CRASHED, Outcome.MEMORY, Outcome.TIMEOUT}}
LOST = {Outcome.FAILED, Outcome.ERROR, Outcome.CRASHED, Outcome.MEMORY, Outcome.TIMEOUT}


class Surroundings:
    """The folder, listeners, environment and descriptors that attacks reach for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "secret").mkdir()
        (root / "victim").mkdir()
        (root / "secret" / "secret.txt").write_text("TOPSECRET")
        os.environ["SBX_SECRET_ENV"] = "hunter2-env"
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

    def damage(self) -> list[str]:
        """What the attacks so far have left or reached; empty if nothing."""
        found = [str(path) for path in (self.root / "victim").iterdir()]
        found += [f"received {data!r}" for data in self.received]
        leftovers = [Path(folder) / "sbx_leftover" for folder in ("/tmp", "/dev/shm", "/var/tmp")]
        found += [str(path) for path in leftovers if path.exists()]
        if "5b5b5b5b" in Path("/proc/sysvipc/shm").read_text():
            found.append("shared memory")
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"sbx-daemon-marker" in entry.read_bytes():
                    found.append("a daemon")
            except OSError:
                continue
        return found

    def close(self) -> None:
        """Stop listening."""
        for listener in self.sockets:
            listener.close()
        for thread in self.threads:
            thread.join()
        os.close(self.held)
        del os.environ["SBX_SECRET_ENV"]


@dataclass(frozen=True, slots=True)
class Attack:
    """One program of the corpus."""

    path: Path

    @property
    def kind(self) -> str:
        """`i` reaches for the machine, `h` for the verdict, `p` is honest."""
        return self.path.name[0]

    def task(self) -> Task:
        """What the program is judged by."""
        tests, hidden = (BLOCKED, ()) if self.kind == "i" else (SHOWN, HIDDEN)
        return Task(task_id=self.path.stem, statement="", entry_point="f", tests=tests, hidden_tests=hidden)

    def judge(self, verifier: SandboxVerifier, root: Path) -> Verdict:
        """Its verdict."""
        return verifier.submit(self.task(), self.path.read_text().replace("@ROOT@", str(root))).result()

    def objection(self, verdict: Verdict) -> str:
        """Why this verdict is not as it must be; empty if it is."""
        number, outcome = self.path.name[:3], verdict.outcome
        if number in TIMEOUTS:
            right = outcome is Outcome.TIMEOUT and verdict.cpu_s < LIMITS.cpu_s + 0.3
        elif number in ENDS_ITSELF:
            right = outcome in ENDS_ITSELF[number]
        elif number == "h21":
            right = outcome is Outcome.FAILED and verdict.shown_passed == 3 and verdict.hidden_passed == 0
        elif self.kind == "h":
            right = outcome in LOST and verdict.tests_passed == 0
        else:
            right = outcome is Outcome.PASSED
        return "" if right else f"{outcome.value} ({verdict.detail})"


ATTACKS = [Attack(path) for path in PROGRAMS]


def main() -> int:
    """Judge everything; exit status 1 if anything is not as it must be."""
    print(f"as uid {os.getuid()}, {len(ATTACKS)} programs of {CORPUS}")
    bad = 0
    with tempfile.TemporaryDirectory() as root, SandboxVerifier(LIMITS, workers=1) as verifier:
        print(verifier.notice)
        surroundings = Surroundings(Path(root))
        for attack in ATTACKS:
            verdict = attack.judge(verifier, surroundings.root)
            objection = attack.objection(verdict) or ", ".join(surroundings.damage())
            bad += bool(objection)
            print(f"{'NOT OK' if objection else 'ok':<6} {attack.path.stem:<28} {verdict.outcome.value} {objection}")
        surroundings.close()
    print(f"{len(ATTACKS) - bad} of {len(ATTACKS)} as expected")
    return int(bad > 0 or not ATTACKS)


if __name__ == "__main__":
    sys.exit(main())
