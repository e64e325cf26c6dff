"""wandb in a process of its own, which follows a run's metrics.jsonl; what wandb does there cannot reach training.

wandb waits without limit in several places, prints, and ends in tracebacks, or a panic of its service, where a server
answers what it did not expect. So it never runs in the training process: `Follower` starts `python -m
sae.training.follower` and hears from it whether it failed; that process takes its lines from the file, where they all
are. It asks the server for the first step it lacks (offline: 0) and logs from there on: lines that never came
through before a kill are logged again, and none is logged twice.

The pipe    stdin: one line of JSON, the task; at the end one line, the exit code (without it, training was killed: what
            is not uploaded yet is the next start's to log). stdout: at the end one line, DONE or why not.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("sae")
DONE = "done"
FATAL = "Fatal error while uploading data"  # in wandb's own words; it has no other way to tell
START = 10.0  # seconds that wandb may take to begin a run; training does not wait for it
PATIENCE = 10.0  # seconds that training waits at its end for the rest to be taken
IMPATIENT = 60.0  # seconds after that in which other runs of this process wait no more than one
NOT_PASSED_ON = ("WANDB_SERVICE", "WANDB_SILENT")  # the service of another process; without words there is no FATAL
POLL = 1.0  # seconds between looks at the file

_gave_up = -IMPATIENT


class Follower:
    """The training process's hold on the one that talks to wandb. A failure is one warning, whenever it comes."""

    def __init__(self, folder: Path, run_id: str, recipe: dict[str, Any], mode: str):
        self.folder = folder
        self.ended_because = "its process ended"
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sae.training.follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON} | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the training process, which ends this one in order
        )
        self._tell(
            {"folder": str(folder), "id": run_id, "recipe": recipe, "mode": mode, "start": START}
            | {"program": sys.argv[0], "pid": os.getpid()}
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _tell(self, value: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which the listener hears
            self.process.stdin.write(json.dumps(value).encode() + b"\n")

    def _listen(self) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline().decode().strip()
        if said != DONE:
            warn(self.folder, said or self.ended_because)

    def close(self, exit_code: int) -> None:
        """Let it upload the rest, for PATIENCE at most; then it is gone in any case."""
        global _gave_up
        assert self.process.stdin is not None and self.process.stdout is not None
        patience = 1.0 if time.monotonic() - _gave_up < IMPATIENT else PATIENCE
        try:
            self._tell(exit_code)
            self.listener.join(patience)
            if self.listener.is_alive():
                self.ended_because = f"the server has not taken everything after {patience:.0f} s"
                _gave_up = time.monotonic()
        finally:
            self.process.kill()
            self.process.wait()
            self.listener.join()
            self.process.stdin.close()
            self.process.stdout.close()


def warn(folder: Path, why: str) -> None:
    """The one line that a failed wandb costs."""
    logger.warning("wandb: %s: %s. Training does not need it; metrics.jsonl has everything.", folder, why.rstrip("."))


def main() -> None:
    """The process that follows."""
    answer = os.dup(1)  # not inherited by wandb's service, which would hold it open
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    task, ended, exit_code = json.loads(sys.stdin.readline()), threading.Event(), 0

    def wait_for_the_end() -> None:
        nonlocal exit_code
        told = sys.stdin.readline()
        if not told:
            os._exit(1)
        exit_code = int(told)
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    said = DONE
    try:
        with contextlib.redirect_stderr(io.StringIO()) as heard:
            run = _init(task)
            for line in _lines(Path(task["folder"]) / "metrics.jsonl", ended):
                if line["step"] >= run.starting_step:
                    run.log(_figures(line), step=line["step"])
                _refuse_fatal(heard.getvalue())
            run.finish(exit_code)
            _refuse_fatal(heard.getvalue())
    except Exception as error:  # wandb raises its own, the system's and the network's errors alike
        said = " ".join((str(error) or type(error).__name__).split())[:300]
    os.write(answer, said.encode() + b"\n")
    os._exit(0)  # wandb would wait here for its service, which ends by itself


def _refuse_fatal(heard: str) -> None:
    """Raise what wandb only prints before it throws all further figures away."""
    if FATAL in heard:
        raise RuntimeError("the server refuses the figures for good")


def _init(task: dict[str, Any]):
    import wandb

    return wandb.init(
        project="goldengate-sae",
        name=Path(task["folder"]).name,
        dir=task["folder"],
        id=task["id"],
        resume="allow",
        config=task["recipe"],
        mode=None if "WANDB_MODE" in os.environ else task["mode"],
        settings=wandb.Settings(
            init_timeout=task["start"],
            console="off",
            quiet=True,  # else it asks the server for the user's name first, which START does not bound
            program=task["program"],
            x_stats_pid=task["pid"],
            stop_fn=lambda: os.kill(task["pid"], signal.SIGINT),  # the button on wandb's page, as Ctrl-C
        ),
    )


def _lines(path: Path, ended: threading.Event):
    """What stands in the file and what is added to it until training has ended."""
    with path.open("rb") as file:
        last = False
        while not last:
            last = ended.is_set()
            while (line := file.readline()).endswith(b"\n"):
                yield json.loads(line)
            file.seek(-len(line), os.SEEK_CUR)  # begun, not yet whole
            ended.wait(POLL)


def _figures(line: dict[str, Any]) -> dict[str, float]:
    """A line as wandb gets it. JSON has null for what is not finite."""
    figures = {name: float("nan") if value is None else value for name, value in line.items()}
    figures["details/n_training_samples"] = figures.pop("tokens")
    return {name: value for name, value in figures.items() if name not in ("step", "time")}


if __name__ == "__main__":
    main()
