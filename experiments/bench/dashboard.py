"""Top 20 examples of the index against SAEDashboard's, on the same SAE, weights and tokens: are they the same?

    python experiments/bench/dashboard.py [--sae checkpoints/smollm2-golden-gate] [--tokens 20000] [--features 300]

SAEDashboard 0.8 runs its own SaeVisRunner in its own environment (peers.sh dashboard; peer_dashboard.py says how it
gets model and SAE), ours is `sae.features.build` on blocks of `harvest.stream`, both in float32 on rows of 128 tokens
of the bundled corpus, documents one after the other and attention through the row, as SAEDashboard reads text.
Common rule: each row is one document; special tokens and the first position of a row count for nobody; positions
whose norm exceeds ten medians neither (their median is of each batch of 16 rows, ours of the first); a
feature's list is the 20 rows with the largest maximum above zero, each with its strongest position. Theirs may hold a
row many times, so it is asked for a long list, of which the first of each row is kept; their margin of five positions
at both ends of a row, in which nothing may stand, is off. Features are drawn (seed 0) among those that fire.
Reported: features whose 20 (row, position) are the same set, the same in order, the largest difference of an activation
(theirs are rounded to four decimals), and every difference with its reason: a near tie is two activations closer than
--tie (relative) in ours.
It cannot say which of two is right: tests/features/test_top_examples.py has brute force for that.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contender import interpreter
from report import save, show
from safetensors.torch import load_file, save_file

from sae import SAE, Host, files
from sae.activations.harvest import OUTLIER_FACTOR, Block, outlier_limits, stream
from sae.documents import documents
from sae.features import build
from sae.features.index import IndexedDocument
from sae.text import Rows, pack

TOP = 20
Place = tuple[int, int]  # row, position


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sae", default="checkpoints/smollm2-golden-gate", type=Path)
    parser.add_argument("--tokens", default=20_000, type=int)
    parser.add_argument("--context", default=128, type=int)
    parser.add_argument("--features", default=300, type=int)
    parser.add_argument("--group", default=600, type=int, help="length of SAEDashboard's list before rows are made one")
    parser.add_argument("--tie", default=1e-5, type=float)
    parser.add_argument("--json")
    options = parser.parse_args()
    python = interpreter("SAEDashboard 0.8")
    host, sae = Host.load("smollm2", dtype="float32"), SAE.load(options.sae)
    hook = host.hook(sae.cfg.metadata.hook_name)
    rows = rows_of(host, options.tokens, options.context)
    with tempfile.TemporaryDirectory(prefix="dashboard-") as temporary:
        work = Path(temporary)
        limits = outlier_limits(host, next(parts(rows)), [hook])
        blocks = list(stream(host, parts(rows), [hook], outlier_norm=limits))
        strings, texts = host.text_of(range(len(host.tokenizer))), [IndexedDocument("")] * len(rows)
        index = build(sae, iter(blocks), texts, strings, work / "index", hook=hook, top=TOP)
        alive = index.stats["max_act"].nonzero().flatten().tolist()
        features = sorted(random.Random(0).sample(alive, min(options.features, len(alive))))
        lists = {f: [(divmod(e.position, options.context), e.act) for e in index.examples(f, TOP)] for f in features}
        group = min(options.group, rows.tokens.numel())
        task = {"hook": hook, "features": features, "group": group, "norm_multiple": OUTLIER_FACTOR}
        theirs, acts = ask(python, work, host, options.sae, rows, {**task, "ignored": sorted(host.special_ids)})
    own = torch.cat([block.acts[hook] for block in blocks])[: len(acts)]
    error = float((own - acts).norm() / own.norm())
    if error > 1e-4:
        raise SystemExit(f"parity failed: activations at {hook} differ by {error:.2e}; nothing was compared.")
    maxima = dense_maxima(sae, blocks, hook, features)
    found = [compare(f, lists[f], theirs[f], maxima, options.tie) for f in features]
    facts = {
        "hook": hook,
        "text_rows": len(rows),
        "tokens": int(rows.mask.sum()),
        "masked_by_norm": int(rows.mask.sum() - torch.cat([block.mask for block in blocks]).sum()),
        "float32_error": error,
        "lists_too_short": sum(one["short"] for one in found),
    }
    full = [one for one in found if not one["short"]]
    result = {
        "name": "index against SAEDashboard 0.8",
        "features": len(full),
        "examples": sum(one["examples"] for one in full),
        "same_set": sum(one["same_set"] for one in full),
        "same_order": sum(one["same_order"] for one in full),
        "largest_relative_difference": max(one["relative"] for one in full),
        "largest_difference": max(one["absolute"] for one in full),
        "differences": sum(len(one["differences"]) for one in full),
        "near_ties": sum(reason == "near tie" for one in full for _, reason in one["differences"]),
    }
    for one in full:
        for what, reason in one["differences"]:
            print(f"feature {one['feature']}: {what}: {reason}")
    save(options.json, show("top examples", [result], facts=facts))


def rows_of(host: Host, n_tokens: int, context: int) -> Rows:
    """Whole rows of text, each a document of its own with attention through all of it."""
    packer = pack(documents("bundled"), host.tokenizer, context, isolate=False, special_ids=host.special_ids,
                  max_tokens=n_tokens)  # fmt: skip
    whole = [(rows, (rows.doc >= 0).all(1)) for rows in packer]  # no padding
    tokens, mask = (torch.cat([getattr(rows, name)[keep] for rows, keep in whole]) for name in ("tokens", "mask"))
    pos = torch.arange(context, dtype=torch.int32).expand_as(tokens)
    doc = torch.arange(len(tokens), dtype=torch.int32)[:, None].expand_as(tokens)
    return Rows(tokens, doc.contiguous(), pos.contiguous(), mask & (pos > 0))


def parts(rows: Rows, size: int = 16) -> Iterator[Rows]:
    return (rows.part(start, start + size) for start in range(0, len(rows), size))


def ask(
    python: Path, work: Path, host: Host, sae: Path, rows: Rows, task: dict[str, Any]
) -> tuple[dict[int, list[tuple[Place, float]]], torch.Tensor]:
    """SAEDashboard's lists, and the activations of its first rows [N, d]."""
    (model,) = (path for path in (files.cache_dir() / "hosts").iterdir() if path.name.startswith("SmolLM2"))
    save_file({"tokens": rows.tokens.contiguous()}, work / "rows.safetensors")
    files.write_json(work / "task.json", task)
    words = [str(Path(__file__).with_name("peer_dashboard.py")), "--model", model, "--sae", sae.resolve(), "--task",
             work / "task.json", "--rows", work / "rows.safetensors", "--out", work / "theirs.json"]  # fmt: skip
    done = subprocess.run([str(word) for word in (python, *words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAEDashboard failed:\n{done.stderr[-3000:]}")
    lists = json.loads((work / "theirs.json").read_text())
    found = {int(f): [((row, pos), act) for row, pos, act in group] for f, group in lists.items()}
    return found, load_file(work / "theirs.safetensors")["acts"].flatten(0, 1)


def dense_maxima(sae: SAE, blocks: list[Block], hook: str, features: list[int]) -> dict[int, dict[Place, float]]:
    """Our own activation of each feature at each place where it fires, to tell what a difference is."""
    found: dict[int, dict[Place, float]] = {feature: {} for feature in features}
    for block in blocks:
        acts = sae.encode(block.acts[hook])[:, features]
        for i, j in acts.nonzero().tolist():
            found[features[j]][(int(block.doc[i]), int(block.pos[i]))] = float(acts[i, j])
    return found


def compare(
    feature: int,
    ours: list[tuple[Place, float]],
    group: list[tuple[Place, float]],
    own_acts: dict[int, dict[Place, float]],
    tie: float,
) -> dict[str, Any]:
    """Ours against the first of each row in SAEDashboard's group, place by place."""
    theirs: list[tuple[Place, float]] = []
    rows = set()
    for place, act in group:
        if act > 0 and place[0] not in rows:
            rows.add(place[0])
            theirs.append((place, act))
    short = len(theirs) < TOP and group[-1][1] > 0  # more may have followed
    theirs = theirs[:TOP]
    of_theirs = dict(theirs)
    shared = [(act, of_theirs[place]) for place, act in ours if place in of_theirs]
    differences = []
    for number in range(max(len(ours), len(theirs))):
        one, other = (rank[number][0] if number < len(rank) else None for rank in (ours, theirs))
        if one != other:
            acts = [own_acts[feature].get(place, 0.0) if place else 0.0 for place in (one, other)]
            near = abs(acts[0] - acts[1]) <= tie * max(acts)
            what = f"place {number + 1} is {one} ({acts[0]:.6g}) here, {other} ({acts[1]:.6g}) there"
            differences.append((what, "near tie" if near else "unexplained"))
    return {
        "feature": feature,
        "short": short,
        "examples": len(ours),
        "same_set": {place for place, _ in ours} == set(of_theirs),
        "same_order": [place for place, _ in ours] == [place for place, _ in theirs],
        "relative": max((abs(a - b) / a for a, b in shared), default=0.0),
        "absolute": max((abs(a - b) for a, b in shared), default=0.0),
        "differences": differences,
    }


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(str(error))
