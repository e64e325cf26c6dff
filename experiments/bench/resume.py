"""From `sae train RUN --resume` to its first step, beside loading the host alone: a stored run and a live one.

    python experiments/bench/resume.py --store runs/smollm2/acts --json runs/bench/resume.json

Each start is a process of its own; "host" is a process that loads the host and ends. Interleaved, medians.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sae import files, machine, table
from sae.training import checkpoint

RECIPE = """host: {{name: smollm2, hook: blocks.15.hook_resid_post}}
activations: {{store: {store}, min_sequences: 200}}
sae: {{d_sae: 4096, k: 32}}
training: {{tokens: 20M, batch: 1024, save_every: 5}}
log: {{every: 1}}
out: {out}
"""
HOST = "from sae.host import Host; Host.load('smollm2')"


def started(run: Path, words: list[str], resumes: bool) -> float:
    """Seconds to the first step after the checkpoint; the run is then stopped."""
    step = checkpoint.steps(run)[-1] if resumes else 0
    began = time.perf_counter()
    one = subprocess.Popen([sys.executable, "-m", "sae", "train", *words], stderr=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or not any(
        line["step"] >= step for line in files.read_lines(run / "metrics.jsonl")[-3:]
    ):
        assert one.poll() is None, f"{run} ended by itself"
        time.sleep(0.02)
    took = time.perf_counter() - began
    if not resumes:  # on to a checkpoint
        while not checkpoint.steps(run):
            time.sleep(0.1)
    one.send_signal(signal.SIGTERM)
    one.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/smollm2/acts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    found: dict[str, list[float]] = {"host alone": [], "store": [], "live": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, store in (("store", Path(args.store).resolve()), ("live", "none")):
            path = Path(folder) / f"{name}.yaml"
            path.write_text(RECIPE.format(store=store, out=Path(folder) / name))
            started(Path(folder) / name, [str(path)], False)
        for _ in range(args.rounds):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", HOST], check=True)
            found["host alone"].append(time.perf_counter() - began)
            for name in ("store", "live"):
                found[name].append(started(Path(folder) / name, [str(Path(folder) / name), "--resume"], True))
    host = statistics.median(found["host alone"])
    rows = [
        {
            "start": name,
            "seconds": round(statistics.median(taken), 1),
            "over the host": round(statistics.median(taken) - host, 1),
        }
        for name, taken in found.items()
    ]
    print(machine.describe())
    print(table.text(rows))
    if args.json:
        files.write_json(args.json, {"machine": machine.describe(), "rows": rows, "seconds": found})


if __name__ == "__main__":
    main()
