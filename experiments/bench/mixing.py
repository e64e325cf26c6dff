"""Effective sequences in a batch (1/Σp²): our windows of a store, our live buffer, SAELens 6.54's mixing buffer.

    python experiments/bench/mixing.py [--json FILE]

A sequence fills its rows with its number; every batch of 4,096 rows is counted. Ours goes through a real store of
planted rows (16 wide, so that only the counting costs). `buffer` is what so many rows of width 576 take in bfloat16
(ours) or float32 (SAELens). SAELens runs in its own environment (peers.sh saelens) with its own `mixing_buffer`, fed as
its ActivationsStore feeds it: `n_batches_in_buffer * context` rows (activations_store.py:845), one batch of
`store_batch_size_prompts` prompts at a time; with its tutorial's settings, and with as many rows as ours.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterable

import torch
from contender import interpreter
from report import save, show
from torch import Tensor

BATCH, BATCHES = 4096, 60
PEER = """
import itertools, json, sys
import torch
from sae_lens.training.mixing_buffer import mixing_buffer
size, context, prompts, batch, n = map(int, sys.argv[1:])
def loader():
    for s in itertools.count(0, prompts):
        yield torch.arange(s, s + prompts).repeat_interleave(context)[:, None]
found = []
for rows in itertools.islice(mixing_buffer(size, batch, loader()), n):
    shares = rows.unique(return_counts=True)[1].double() / len(rows)
    found.append([1 / float(shares.square().sum()), len(shares)])
print(json.dumps(found[n // 3:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json")
    options = parser.parse_args()
    half = 512_000_000 // (576 * 2)
    result = []
    shapes = ((128, half, "512 MB"), (128, 64 * 128, "SAELens's rows"), (256, 64 * 256, "SAELens's rows"))
    for context, capacity, about in shapes:
        result.append(row(f"ours, store, context {context}, {about}", capacity, from_store(context, capacity), 2))
    result.append(row("ours, live, context 128, 512 MB", half, from_live(128, half), 2))
    theirs = ((256, 16, 64 * 256, "its tutorial"), (128, 16, 64 * 128, "the same"), (128, 16, half, "as many rows"))
    for context, prompts, size, about in theirs:
        found = peer(size, context, prompts)
        if found:
            result.append(row(f"SAELens 6.54, context {context}, {about}", size, found, 4))
    save(options.json, show("effective sequences in a batch of 4,096", result))


def row(name: str, capacity: int, found: Iterable[tuple[float, int]], width: int) -> dict[str, object]:
    effective, distinct = zip(*found, strict=True)
    return {
        "name": name,
        "buffer_rows": capacity,
        "buffer_mb": capacity * 576 * width / 1e6,
        "effective": statistics.mean(effective),
        "smallest": min(effective),
        "sequences": statistics.mean(distinct),
    }


def counted(ids: Tensor) -> tuple[float, int]:
    shares = ids.unique(return_counts=True)[1].double() / len(ids)
    return 1 / float(shares.square().sum()), len(shares)


def from_store(context: int, capacity: int) -> list[tuple[float, int]]:
    from sae.activations import windows
    from tests.activations.planted import HOOK, make, text_facts, token_of

    rows = 3 * capacity + BATCHES * BATCH  # several windows
    with tempfile.TemporaryDirectory() as folder:
        store = make(folder + "/acts", rows // context, text=text_facts(context=context, shard_rows=65_536))
        source = windows.StoreSource(store, store.sources)
        stream = windows.windows(source, BATCH, capacity, seed=0)
        # Over two windows and more: batches between two windows draw on more, these are the exception.
        n = max(BATCHES, 2 * capacity // BATCH)
        return [counted(token_of(one.acts[HOOK]) // context) for one in itertools.islice(stream, n)]


def from_live(context: int, capacity: int) -> list[tuple[float, int]]:
    from sae.activations import batches as feed
    from sae.activations.harvest import Block

    def blocks(skip: int):
        for s in itertools.count(skip * 64, 64):
            ids = torch.arange(s, s + 64).repeat_interleave(context)
            zeros = torch.zeros(len(ids), dtype=torch.int32)
            yield Block({"h": ids[:, None].double()}, zeros, zeros, zeros, torch.ones(len(ids), dtype=torch.bool))

    stream = feed.live(blocks, BATCH, capacity, seed=0)
    return [counted(one.acts["h"][:, 0]) for one in itertools.islice(stream, 3 * BATCHES)][BATCHES:]


def peer(size: int, context: int, prompts: int) -> list[tuple[float, int]]:
    try:
        python = interpreter("SAELens")
    except FileNotFoundError as error:
        print(error)
        return []
    words = [str(python), "-c", PEER, *map(str, (size, context, prompts, BATCH, 3 * BATCHES))]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [(effective, n) for effective, n in json.loads(out.splitlines()[-1])]


if __name__ == "__main__":
    main()
