"""How long the command line makes you wait: medians over fresh processes.

    python experiments/bench/startup.py [--sae FOLDER] [--feature 1286=5x] [--times 10] [--json FILE]

Always `sae --help` and `sae train --help`. With an SAE that has an index: `sae find` on a concept asked for
before (its first call here is the stored one's making), on a new concept, and the first output of `sae
steer`.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import save, show


def seconds(command: list[str], *, first_output: bool = False) -> float:
    """Wall clock of a process, or of its first byte on stdout (it is then ended); a failure stops us."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    if first_output:
        seen = process.stdout.read(1)
        took = time.perf_counter() - start
        if seen:
            process.terminate()
        _, errors = process.communicate()
    else:
        _, errors = process.communicate()
        took = time.perf_counter() - start
        seen = process.returncode == 0
    if not seen:
        raise SystemExit(f"{' '.join(command)} failed: {errors.decode()[-500:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sae", help="folder of an SAE with an index")
    parser.add_argument("--concept", default="Golden Gate Bridge")
    parser.add_argument("--new-concept", default="winter", help="one that nobody has asked this index for")
    parser.add_argument("--feature", default="0=2x", help="a dial for sae steer")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json")
    options = parser.parse_args()
    script = Path(sys.executable).with_name("sae")
    sae = [str(script)] if script.exists() else [sys.executable, "-m", "sae"]

    cases = {"sae --help": ([*sae, "--help"], False, options.times)}
    cases["sae train --help"] = ([*sae, "train", "--help"], False, options.times)
    rows = []
    if options.sae:
        fresh = seconds([*sae, "find", options.sae, options.new_concept])
        rows.append({"name": "sae find, new concept", "seconds": fresh, "times": 1})
        seconds([*sae, "find", options.sae, options.concept])
        few = max(1, options.times // 3)
        cases["sae find, stored"] = ([*sae, "find", options.sae, options.concept], False, few)
        words = [options.feature, "Who are you?"]
        cases["sae steer, first token"] = ([*sae, "steer", options.sae, *words], True, few)
    for name, (command, first_output, times) in cases.items():
        took = [seconds(command, first_output=first_output) for _ in range(times + 1)][1:]  # the first warms the disk
        rows.append({"name": name, "seconds": statistics.median(took), "slowest": max(took), "times": times})
    save(options.json, show("start-up", rows))


if __name__ == "__main__":
    main()
