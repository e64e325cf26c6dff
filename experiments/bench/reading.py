"""Reading a store: rows/s of shuffled batches against what the fused step consumes, and memory over the store's size.

    python experiments/bench/reading.py [--rows 1000000] [--rounds 5] [--json FILE]
    python experiments/bench/reading.py --memory 10 [--json FILE]     a store of 10 GB (of planted rows)

Rates: batches of 4,096 rows as training gets them (checksums checked, drawn from the windows' buffer, in float32 times
a scale), from one thread that has one core, as in training; the store holds synthetic activations of width 576 and lies
in the page cache. The step is ours (d_sae 16,384, k 32), timed in the same process between the rounds. `copy` is the
limit: the same bytes read with `readinto` and converted.
Memory: the process's peak beyond what it had before the store was opened, for buffers of 64 and 512 MB.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import synthetic
from report import save, show, spread

B, D, F, K = 4096, 576, 16_384, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, help="GB of the store whose reading is watched, instead of rates")
    parser.add_argument("--dtype", default="bfloat16", help="of the store")
    parser.add_argument("--watched", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.watched:
        print(watched(options.watched[0], int(options.watched[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            made(folder, int(options.memory * 1e9 / (2 * D)), options.dtype)
            result = [memory(folder, size) for size in (64, 512)]
            save(options.json, show(f"memory while a store of {options.memory:g} GB is read once", result))
        else:
            made(folder, options.rows, options.dtype)
            save(options.json, rates(folder, options.rounds))


def made(folder: str, rows: int, dtype: str) -> None:
    """A store of synthetic rows, 128 to a sequence."""
    import sae.activations.build as build
    from sae.activations.harvest import Block
    from sae.parallel import Rank
    from sae.places import Place
    from tests.activations.planted import HOOK, Packer, reading_facts, text_facts

    text = text_facts(context=128, shard_rows=65_536)
    wanted = reading_facts((HOOK,), D, dtype=dtype)
    acts = synthetic(D, 65_536, seed=0)

    def forward(part):
        n = part.tokens.numel()
        flat = (getattr(part, name).reshape(-1) for name in ("tokens", "doc", "pos", "mask"))
        yield Block({HOOK: acts[:n]}, *flat)

    place = Place(folder)
    with build.writing(place, Rank()):
        manifest = build.planned(
            place,
            text,
            lambda: build.plan(place, text, lambda note: Packer(rows // 128, note, 128), lambda n: None),
        )
        manifest["readings"].append({"facts": vars(wanted), "shards": None})
        place.write_json(build.MANIFEST, manifest)
        build.run(place, manifest, 0, range(len(manifest["shards"])), forward)
        build.merged(place, 0, Rank())


def opened(folder: str, capacity: int, seed: int = 0):
    from sae.activations import windows
    from sae.activations.batches import normed
    from sae.activations.store import Store

    store = Store.open(folder)
    source = windows.StoreSource(store, store.sources)
    hook = store.sources[0].hook
    return hook, normed(windows.windows(source, B, capacity, seed), {hook: 0.5})


def rates(folder: str, rounds: int) -> dict:
    from sae.activations.batches import buffer_rows

    # Rounds of batches from the middle of a stream: the buffer is full, and is refilled as it is emptied.
    contenders: dict[str, Callable[[], float]] = {}
    for name, capacity in (("ours, 200 MB", buffer_rows(1000, B, 128)), ("ours, 512 MB", 512_000_000 // (2 * D))):
        hook, stream = opened(folder, capacity)
        next(stream)
        contenders[name] = one_core(lambda stream=stream: sum(len(b) for b in itertools.islice(stream, 20)))
    shard = sorted(Path(folder).glob("shard-*.safetensors"))[0]
    contenders["copy"] = one_core(lambda: copied(shard))
    contenders["fused step, d_sae 16,384"] = step(next(opened(folder, 8 * B)[1]).acts[hook])
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            rate = run()
            if number:
                found[name].append(rate)
    from sae.activations.store import Store

    total = Store.open(folder).n_rows
    consumed = spread(found["fused step, d_sae 16,384"])[0]
    result = []
    for name, values in found.items():
        median, low, high = spread(values)
        result.append({"name": name, "rows_per_s": median, "quartile_low": low, "quartile_high": high,
                       "times_step": median / consumed, "GB_per_s": median * D * 2 / 1e9})  # fmt: skip
    return show("shuffled reading, warm cache", result, facts={"store_rows": total})


def one_core(count: Callable[[], int]) -> Callable[[], float]:
    """Rows a second of `count`, run in a thread that computes on one core, as training's reader does."""

    def run() -> float:
        rate = []

        def work() -> None:
            torch.set_num_threads(1)
            start = time.perf_counter()
            n = count()
            rate.append(n / (time.perf_counter() - start))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        torch.set_num_threads(torch.get_num_threads())
        return rate[0]

    return run


def copied(shard: Path) -> int:
    """The same bytes as twenty batches, read and made float32, in order and unchecked."""
    buffer = bytearray(B * D * 2)
    n = 0
    with shard.open("rb") as file:
        while n < 20 * B:
            if file.readinto(buffer) < len(buffer):
                file.seek(0)
                continue
            torch.frombuffer(buffer, dtype=torch.bfloat16).float().mul_(0.5)
            n += B
    return n


def step(batch: torch.Tensor) -> Callable[[], float]:
    """Tokens a second of our fused step on a batch."""
    from own_step import build
    from peer_step import batches

    acts = batch.bfloat16()
    trainer = build("ours topk", acts, (B, D, F, K), "auto")
    stream = batches(acts, B)
    trainer.step(next(stream))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(3):
            trainer.step(next(stream))
        return 3 * B / (time.perf_counter() - start)

    return run


def memory(folder: str, megabytes: int) -> dict:
    out = subprocess.run(
        [sys.executable, __file__, "--watched", folder, str(megabytes * 1_000_000 // (2 * D))],
        capture_output=True, text=True, check=True, env=os.environ,
    ).stdout  # fmt: skip
    rows, peak, read = map(float, out.split()[-3:])
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"name": f"buffer of {megabytes} MB", "store_gb": size / 1e9, "rows_read": rows, "read_gb": read / 1e9,
            "peak_mb": peak / 1e6, "beyond_buffer_mb": peak / 1e6 - megabytes}  # fmt: skip


def watched(folder: str, capacity: int) -> str:
    """Read the store once; rows, bytes by which the process's peak rose, bytes read."""
    from peer_step import reset_peak, resident

    from sae.activations.store import Store

    next(opened(folder, B)[1])  # libraries and their pools
    reset_peak()
    before = resident("VmRSS")
    hook, stream = opened(folder, capacity)
    n, total = 0, Store.open(folder).n_rows
    while n < total:
        n += len(next(stream))
    return f"{n} {resident('VmHWM') - before} {n * D * 2}"


if __name__ == "__main__":
    main()
