"""Runs that are killed at random moments and gone on with, against the same run unbroken: the SAE's sha256 must agree.

    python experiments/kills.py runs/kills --kills 30 --json runs/kills.json
    python experiments/kills.py runs/kills-live --live --kills 3 --architectures topk --json runs/kills-live.json

The real host, real text, real processes (`python -m sae train`). SIGKILL three times in five, else SIGTERM or Ctrl-C,
at a moment drawn evenly over a start; checkpoints are written all the time, so that many kills meet one. After each
kill every checkpoint is read, and at the end metrics.jsonl must hold the same figures for the same steps.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sae import files, table
from sae.training import checkpoint

RECIPE = """host: {{name: smollm2, hook: blocks.3.hook_resid_post}}
text: {{context: 128, max_tokens: {text}}}
activations: {{store: {store}, min_sequences: 200}}
sae: {{architecture: {architecture}, d_sae: 1024, k: 32}}
training: {{tokens: {tokens}, batch: 1024, save_every: {save_every}}}
evaluation: {{tokens: 1000, ce_tokens: 0, every: 0.1}}
log: {{every: 1}}
out: {out}
"""


def command(recipe: Path, resume: bool) -> subprocess.Popen:
    words = [sys.executable, "-m", "sae", "train", str(recipe), *(["--resume"] if resume else [])]
    # A process that a shell has begun in the background ignores Ctrl-C, and so would its children.
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def sha(run: Path) -> str:
    return hashlib.sha256((run / "sae" / "sae_weights.safetensors").read_bytes()).hexdigest()


def figures(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in line.items() if k != "time"} for line in files.read_lines(run / "metrics.jsonl")]


def chain(recipe: Path, run: Path, kills: int, seed: int, longest: float) -> dict[str, Any]:
    """Kill the run `kills` times, then let it end."""
    draw, met = random.Random(seed), {"kills": 0, "SIGKILL": 0, "SIGTERM": 0, "SIGINT": 0, "in a save": 0, "codes": []}
    while met["kills"] < kills:
        one = command(recipe, resume=(run / "recipe.yaml").exists())
        time.sleep(draw.uniform(0.5, longest))
        if one.poll() is not None:
            assert one.returncode == 0, one.communicate()[1]
            break  # it came to its end before it was killed often enough
        number = draw.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        one.send_signal(number)
        _, told = one.communicate()
        met["kills"] += 1
        met[number.name] += 1
        met["in a save"] += number == signal.SIGKILL and bool(list(run.glob("checkpoints/.tmp-*")))
        if number != signal.SIGKILL:
            met["codes"].append(one.returncode)
            assert "Traceback" not in told or one.returncode < 0, told
        for folder in checkpoint.all_of(run):
            checkpoint.facts_of(folder)
            files.read_safetensors(folder / "training.safetensors")
    one = command(recipe, resume=(run / "recipe.yaml").exists())
    _, told = one.communicate()
    assert one.returncode == 0, told
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--live", action="store_true", help="from the host instead of a store")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--architectures", default="topk,batchtopk,jumprelu")
    parser.add_argument("--tokens", default="6M")
    parser.add_argument("--text", default="60k")
    parser.add_argument("--save-every", default="0.02")
    parser.add_argument("--longest", type=float, default=14.0, help="seconds of a start before it is killed, at most")
    parser.add_argument("--json")
    args = parser.parse_args()
    folder, rows = Path(args.out), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, architecture in enumerate(args.architectures.split(",")):
        runs = {name: folder / f"{architecture}-{name}" for name in ("whole", "killed")}
        for name, run in runs.items():
            facts = {"tokens": args.tokens, "text": args.text, "architecture": architecture, "out": run}
            save_every = 60 if name == "whole" else args.save_every
            store = "none" if args.live else folder / "acts"
            (folder / f"{run.name}.yaml").write_text(RECIPE.format(**facts, store=store, save_every=save_every))
        began = time.monotonic()
        one = command(folder / f"{runs['whole'].name}.yaml", resume=runs["whole"].exists())
        _, told = one.communicate()
        assert one.returncode == 0, told
        whole = time.monotonic() - began
        began = time.monotonic()
        met = chain(folder / f"{runs['killed'].name}.yaml", runs["killed"], args.kills, number, args.longest)
        rows.append(
            {
                "architecture": architecture,
                **met,
                "same sha256": sha(runs["whole"]) == sha(runs["killed"]),
                "same figures": figures(runs["whole"]) == figures(runs["killed"]),
                "unbroken (s)": round(whole),
                "killed (s)": round(time.monotonic() - began),
            }
        )
        print(table.text(rows), flush=True)
    if args.json:
        files.write_json(args.json, rows)
    if not all(one["same sha256"] and one["same figures"] for one in rows):
        raise SystemExit("a killed run ended otherwise than the unbroken one")


if __name__ == "__main__":
    main()
