"""What was forecast against what a run took: memory while training, and time of its steps.

    python experiments/bench/forecast.py --store runs/smollm2/acts --json runs/bench/forecast.json

Each run in a process of its own, by `sae.run.train` on real activations; memory is the most that the process held while
it trained, over what it held before (the host is loaded by then).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sae import files, machine, table

CASES = [
    {"architecture": "topk", "d_sae": 4096},
    {"architecture": "topk", "d_sae": 16384},
    {"architecture": "batchtopk", "d_sae": 4096},
    {"architecture": "matryoshka", "d_sae": 4096},
    {"architecture": "jumprelu", "d_sae": 4096},
    {"architecture": "relu", "d_sae": 4096},
]
CHILD = """
import json, sys, threading, time
from sae import config, trainer
from sae.host import Host
from sae.run import train
host = Host.load("smollm2")
most, stop = [0], threading.Event()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def watch():
    while not stop.wait(0.02):
        most[0] = max(most[0], resident())
fit, took = trainer.fit, []
def measured(*args):
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        return fit(*args)
    finally:
        took.append(time.perf_counter() - began)
        stop.set()
        watcher.join()
trainer.fit = measured
before = resident()
train(config.build(json.loads(sys.argv[1]), "bench"), host=host)
print(json.dumps({"memory": most[0] - before, "seconds": took[0]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/smollm2/acts")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = {
                "activations": {"store": args.store},
                "sae": case,
                "training": {"tokens": args.tokens, "batch": 4096, "save_every": 1e9},
                "evaluation": {"tokens": 1000, "ce_tokens": 0, "every": 0},
                "out": str(Path(folder) / "run"),
            }
            words = [sys.executable, "-c", CHILD, json.dumps(recipe)]
            ended = subprocess.run(words, capture_output=True, text=True, check=True)
        found = json.loads(ended.stdout.splitlines()[-1])
        line = next(line for line in ended.stderr.splitlines() if line.startswith("memory beside the host: "))
        told = re.match(r"memory beside the host: (.*?) of .*copy (.*?)\) · time of the steps: (.*)", line)
        assert told is not None, line
        rows.append(
            {
                **case,
                "memory told": told[1],
                "copy of a checkpoint": told[2],
                "measured (MB)": round(found["memory"] / 1e6),
                "time told": told[3],
                "measured (s)": round(found["seconds"], 1),
            }
        )
        print(table.text(rows[-1:]), flush=True)
    print(machine.describe())
    print(table.text(rows))
    if args.json:
        files.write_json(args.json, {"machine": machine.describe(), "rows": rows})


if __name__ == "__main__":
    main()
