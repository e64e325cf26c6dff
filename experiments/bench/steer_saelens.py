"""Clamping one feature our way and SAELens's: the same logits, and how long a forward takes.

    python experiments/bench/steer_saelens.py [--d-sae 8192,65536] [--rounds 15] [--json FILE]

SAELens runs in its own environment (peers.sh): SAETransformerBridge, `use_error_term`, a hook on `hook_sae_acts_post`.
Both run the bundled host in float32 over one prompt with the same jumprelu SAEs (random weights, thresholds that leave
a few dozen features firing), feature 7 clamped at all positions but the first. A round times plain forwards and
forwards with each SAE, ours and theirs in turns; ratios are medians over rounds. `added` is what steering adds to the
same code's plain forward.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from contender import interpreter
from inputs import HOOK
from report import save, show
from safetensors.torch import load_file, save_file
from steer import PROMPT, random_sae

from sae import files
from sae.host import Host
from sae.steering import steer

FEATURE, AMOUNT = 7, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d-sae", default="8192,65536")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forwards", type=int, default=4)
    parser.add_argument("--json")
    options = parser.parse_args()
    host, widths = Host.load("smollm2", "float32"), [int(F) for F in options.d_sae.split(",")]
    tokens = host.chat_tokens(PROMPT)
    work = tempfile.TemporaryDirectory()
    root, handles, folders = Path(work.name), [], []
    x = host.activations(tokens, [HOOK])[HOOK][0, 1:]
    for F in widths:
        sae = random_sae(host, "jumprelu", F)
        assert sae.threshold is not None
        sae.threshold.fill_(float(sae.pre_activations(x).topk(32, dim=-1).values[:, -1].median()))
        folders.append(str(sae.save(root / str(F))))
        handles.append(steer(host, sae, {FEATURE: AMOUNT}, special=True, positions="1:"))
    save_file({"tokens": tokens}, root / "tokens.safetensors")
    (model,) = (path for path in (files.cache_dir() / "hosts").iterdir() if path.name.startswith("SmolLM2"))
    script = str(Path(__file__).with_name("peer_steer.py"))
    words = ["--model", str(model), "--sae", *folders, "--tokens", str(root / "tokens.safetensors")]
    words += ["--feature", str(FEATURE), "--amount", str(AMOUNT), "--out", str(root / "out")]
    peer = subprocess.Popen(
        [str(interpreter("SAELens")), script, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(root / "log").open("w"), text=True,
    )  # fmt: skip

    def answer() -> dict[str, Any]:
        assert peer.stdout is not None
        line = peer.stdout.readline()
        if not line:
            raise RuntimeError((root / "log").read_text()[-2000:])
        return json.loads(line)

    answer()
    theirs = load_file(root / "out")
    taken: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        assert peer.stdin is not None
        peer.stdin.write(f"round {options.forwards}\n")
        peer.stdin.flush()
        told = answer()
        for name, seconds in zip(["their plain", *(f"theirs {F}" for F in widths)], [told["plain"], *told["seconds"]],
                                 strict=True):  # fmt: skip
            taken.setdefault(name, []).append(seconds)
        for name, edits in [("our plain", []), *((f"ours {F}", h.edits) for F, h in zip(widths, handles, strict=True))]:
            start = time.perf_counter()
            for _ in range(options.forwards):
                host.logits(tokens, edits=edits)
            taken.setdefault(name, []).append(time.perf_counter() - start)
    peer.stdin.close()
    peer.wait()

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(taken[a][1:], taken[b][1:], strict=True))

    plain, lines = host.logits(tokens), []
    for i, (F, handle) in enumerate(zip(widths, handles, strict=True)):
        ours = host.logits(tokens, edits=handle.edits)
        size = float((ours - plain).abs().max())
        lines.append(
            {
                "d_sae": F,
                "largest difference of logits": float((ours - theirs[f"logits.{i}"]).abs().max()),
                "largest that steering makes": size,
                "SAELens over ours, a forward": ratio(f"theirs {F}", f"ours {F}"),
                "SAELens's added": ratio(f"theirs {F}", "their plain") - 1,
                "our added": ratio(f"ours {F}", "our plain") - 1,
            }
        )
    facts = {
        "rounds": options.rounds,
        "tokens": tokens.shape[1],
        "bridge over plain transformers": ratio("their plain", "our plain"),
    }
    save(options.json, show("one feature clamped, against SAELens", lines, facts=facts))
    work.cleanup()


if __name__ == "__main__":
    main()
