"""Contenders as waiting processes: one works at a time, rounds interleave A-B-C-A-B-C, each in its own interpreter."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import ROOT

VENVS = {"sparsify": "sparsify", "SAELens": "saelens", "dictionary_learning": "dictionary", "SAEDashboard": "dashboard"}


def interpreter(name: str) -> Path:
    """The contender's python; FileNotFoundError with the command that builds it."""
    family = name.split()[0]
    if family not in VENVS:
        return Path(sys.executable)
    python = ROOT / ".venvs" / VENVS[family] / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{name}: {python} does not exist. Run experiments/bench/peers.sh {VENVS[family]}")
    return python


class Contender:
    """A waiting process of peer_step.py; `ask` makes it work."""

    def __init__(self, name: str, acts: Path, shape: str, dtype: str, log: Path):
        self.name, self.log, self.seconds = name, log, list[float]()
        self.answers: dict[str, Any] = {}
        script = str(Path(__file__).with_name("peer_step.py"))
        self.process = subprocess.Popen(
            [str(interpreter(name)), script, name, "--acts", str(acts), "--shape", shape, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, *words: object) -> dict[str, Any]:
        """One command and its answer; what it says of its last step is kept in `answers`."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.answers |= answer
        return answer

    def round(self, steps: int, limit: float) -> list[float]:
        return self.ask("round", steps, limit)["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    names: list[str],
    acts: Path,
    shape: str,
    *,
    dtype: str,
    rounds: int,
    steps: int,
    limit: float = 30.0,
    warm_up: int = 2,
    also: tuple[tuple[object, ...], ...] = (),
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of every timed step by contender, interleaved, and each contender's answers; `also` are commands after
    the last round, "memory" for ours and the peers, "phases" for ours. A peer that is not built is left out with a
    line."""
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for name in names:
                try:
                    contender = Contender(name, acts, shape, dtype, Path(logs) / name.replace(" ", "-"))
                except FileNotFoundError as error:
                    print(error, file=sys.stderr)
                    continue
                contenders.append(contender)
                contender.round(warm_up, limit)
            for number in range(rounds):
                for contender in contenders:
                    contender.seconds += contender.round(steps, limit)
                    print(f"round {number + 1}/{rounds} {contender.name}", file=sys.stderr)
            for command in also:
                for contender in contenders:
                    family = contender.name.split()[0]
                    if family == "ours" or (command[0] == "memory" and family in VENVS):
                        contender.ask(*command)
        finally:
            for contender in contenders:
                contender.close()
    return {c.name: c.seconds for c in contenders}, {c.name: c.answers for c in contenders}
