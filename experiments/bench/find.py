"""What finding costs: the index pass beside the bare harvest, its memory at 131,072 features, queries at 65,536.

    python experiments/bench/find.py --json runs/bench/find.json

Needs the store that `sae harvest configs/smollm2.yaml` makes. Four parts:
- pass: rows of the store's text run through the host to the hook, alone and with the index's pass behind (encoding,
  lists, parts written), in turns; the shipped SAE, and larger ones whose rows are activations of tokens. `floor` is the
  share that is left where the encoder's product alone is added, at the rate that it has alone.
- memory: an index over the store in a process of its own, by the largest resident size while it is made less that with
  host and SAE loaded.
- contrast: both halves of 2,000 documents compared for all features, and the noise level, once their maxima are there.
- words: full-text queries, opening included, median and slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from sae import files, machine, table
from sae.activations.harvest import stream
from sae.activations.store import Store
from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.features import gather, words, writing
from sae.features.contrast import Pair, Side, contrast, halves, noise, ranked
from sae.features.index import Index
from sae.features.search import tie_break
from sae.host import Host
from sae.recipe import TextRecipe
from sae.token_rows import Text

HOOK, SHIPPED = "blocks.12.hook_resid_post", "checkpoints/smollm2-golden-gate"
BLOCKS, ROUNDS = 2, 5
QUERIES = ("bridge", "golden gate", "San Francisco bay fog", "sql*", "the of and to", "zzyzx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="runs/smollm2/acts")
    parser.add_argument("--only", default="pass,memory,queries")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.store, *args.child.split(","))))
        return
    print(f"{machine.describe()}, {torch.get_num_threads()} threads")
    rows = []
    if "pass" in args.only:
        rows += passes(args.rounds, args.store)
    if "memory" in args.only:
        rows.append(started(args.store, 131_072, "lens"))
    if "queries" in args.only:
        rows.append(started(args.store, 65_536, "queries"))
    for row in rows:
        print(table.text([{"": name, "value": value} for name, value in row.items()], ["", "value"]), end="\n\n")
    if args.json:
        files.write_json(args.json, rows)


def sae_of_tokens(n_features: int, store: str, k: int = 32) -> SAE:
    """TopK; every row is the centred activation of some token of the store, so that all features fire somewhere."""
    opened = Store.open(store)
    source = opened.source(HOOK)
    slabs = [opened.read([source], slab) for slab in range(0, len(opened.slabs), 4)]
    x = torch.cat([block.acts[HOOK][block.mask].float() for block in slabs])
    sae = SAE(SAEConfig("topk", 576, n_features, k, Metadata(hook_name=HOOK, model_name="smollm2")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        for first in range(0, n_features, 1 << 14):
            which = torch.randint(len(x), (min(1 << 14, n_features - first),), generator=generator)
            rows = x[which] - sae.b_dec
            rows += 0.3 * rows.norm(dim=1, keepdim=True) / 24 * torch.randn(rows.shape, generator=generator)
            sae.W_dec[first : first + len(rows)] = torch.nn.functional.normalize(rows, dim=1)
        sae.encoder.copy_(sae.W_dec)
    return sae.requires_grad_(False)


# ---- the pass beside the bare harvest ----------------------------------------------------------------------


def passes(rounds: int, store: str) -> list[dict]:
    host = Host.load("smollm2")
    packed = list(Text(TextRecipe(), host, "all").rows())[: BLOCKS * rounds]
    found = []
    for sae in (SAE.load(SHIPPED), sae_of_tokens(8192, store), sae_of_tokens(16_384, store)):
        folder = tempfile.mkdtemp()
        work = writing._Work(Path(folder) / "i", {"about": None}, gather.TOP, sae.cfg.d_sae)
        bare, ours, product = [], [], product_seconds(sae)
        for number in range(rounds):
            part = packed[number * BLOCKS : (number + 1) * BLOCKS]
            for which in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                if which == 0:
                    n = sum(len(block) for block in stream(host, part, [HOOK]))
                    bare.append(n / (time.perf_counter() - began))
                else:
                    n = through(work, sae, (writing.Step(block, []) for block in stream(host, part, [HOOK])))
                    ours.append(n / (time.perf_counter() - began))
        files.remove_folder(folder)
        alone = statistics.median(bare)
        found.append({
            "part": "pass", "features": sae.cfg.d_sae, "bare harvest, tokens/s": alone,
            "with the index's pass": statistics.median(ours),
            "share": statistics.median(o / b for o, b in zip(ours, bare, strict=True)),
            "lowest and highest share": f"{min(map(_ratio, ours, bare)):.3f} {max(map(_ratio, ours, bare)):.3f}",
            "floor (product alone)": 1 / (1 + product * alone),
        })  # fmt: skip
    return found


def _ratio(ours: float, bare: float) -> float:
    return ours / bare


def through(work: writing._Work, sae: SAE, steps: Iterable[writing.Step]) -> int:
    """Blocks through the pass, and the part written: what `sae index` does with them."""
    work.n_documents = 10**9  # the documents' texts are no part of this
    before, work.is_read = sum(work.rows), False
    writing._read(work, sae, lambda state: steps, HOOK, None)
    return sum(work.rows) - before


def product_seconds(sae: SAE) -> float:
    """Of one token, in the machine's number format."""
    kind = machine.machine_dtype("cpu")
    x, weights = torch.randn(4096, 576).to(kind), sae.encoder.to(kind)[:8192]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        x @ weights.T
        times.append(time.perf_counter() - began)
    return min(times) / len(x) * sae.cfg.d_sae / len(weights)


# ---- in a process of its own -------------------------------------------------------------------------------


def started(store: str, n_features: int, what: str) -> dict:
    command = [sys.executable, __file__, "--store", store, "--child", f"{n_features},{what}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(store: str, n_features: str, what: str) -> dict:
    sae, host = sae_of_tokens(int(n_features), store), Host.load("smollm2")
    opened = Store.open(store)
    source = opened.source(HOOK)
    with tempfile.TemporaryDirectory() as folder:
        with Watch() as watch:
            began = time.perf_counter()
            blocks = (opened.read([source], slab) for slab in range(len(opened.slabs)))
            strings = host.text_of(list(range(len(host.tokenizer))))
            made = writing.build(
                sae, blocks, opened.documents, strings, Path(folder) / "i", hook=HOOK, scores=False,
                host=host if what == "lens" else None,
            )  # fmt: skip
            seconds = time.perf_counter() - began
        if what == "lens":
            return {
                "part": "memory", "features": sae.cfg.d_sae, "tokens": made.facts.n_tokens, "seconds": seconds,
                "GiB above host and SAE": watch.most / 2**30, "GiB with host and SAE": watch.before / 2**30,
            }  # fmt: skip
        return queries(made, seconds)


def queries(index: Index, seconds: float) -> dict:
    documents = index.documents[:2000]
    maxima = index.maxima.of(torch.arange(len(documents)))
    about = torch.tensor([i for i, one in enumerate(documents) if i % 2 and bool(maxima.seen[i])])
    rest = torch.tensor([i for i, one in enumerate(documents) if not i % 2 and bool(maxima.seen[i])])
    positives, negatives = (Side([documents[i] for i in rows.tolist()], maxima, rows) for rows in (about, rest))
    times, sparse = [], index.stats["density"] < 0.05
    for _ in range(5):
        began = time.perf_counter()
        (chosen_p, reported_p), (chosen_n, reported_n) = halves(positives, 0), halves(negatives, 0)
        choosing = Pair(chosen_p, chosen_n, index.facts.n_features)
        chosen = contrast(choosing)
        ranked(sparse, chosen.shrunk, tie_break(index, chosen))
        noise(choosing, sparse)
        contrast(Pair(reported_p, reported_n, index.facts.n_features))
        times.append(time.perf_counter() - began)
    asked = []
    for query in QUERIES * 3:
        began = time.perf_counter()
        words.search(index, query, 10)
        asked.append(time.perf_counter() - began)
    began = time.perf_counter()
    words.rebuild(index)
    built = time.perf_counter() - began
    return {
        "part": "queries", "features": index.facts.n_features, "documents": len(about) + len(rest),
        "entries": len(maxima.features), "contrast, s": statistics.median(times), "slowest contrast": max(times),
        "full text, ms": statistics.median(asked) * 1e3, "slowest full text": max(asked) * 1e3,
        "full text made, s": built, "index, s": seconds,
        "search.sqlite, MB": (index.path / words.FILE).stat().st_size / 1e6,
    }  # fmt: skip


class Watch:
    """The largest resident size inside, above that at the beginning."""

    def __enter__(self) -> Watch:
        self.before, self.most, self.stop = _resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.stop.wait(0.02):
            self.most = max(self.most, _resident() - self.before)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
