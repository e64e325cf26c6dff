"""Cost per token over the number of features at fixed k: ours TopK against the floor, from 4k to 1M features.

    python experiments/bench/growth.py [--sizes 4096,16384,65536,262144,1048576] [--json FILE] [--png FILE]

Batches of 4,096 tokens up to 65,536 features, then of 1,024; three steps at a million (twelve rounds elsewhere,
interleaved with the bare product and the copy). A size that stands in the JSON file is not measured again, so an
interrupted run goes on where it was; delete the file to begin anew.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

from contender import measure
from floor import floor, rates
from inputs import activations, normed
from own_step import resolved
from report import save, show, spread
from safetensors.torch import save_file

from sae import files

SIZES = (4096, 16_384, 65_536, 262_144, 1_048_576)
LARGE = 262_144


def plan(F: int) -> dict[str, int]:
    """Batch, rounds and steps of a size: few where a step takes seconds and a process many gigabytes."""
    if F >= 4 * LARGE:
        return {"batch": 1024, "rounds": 1, "steps": 3, "warm_up": 1}
    if F >= LARGE:
        return {"batch": 1024, "rounds": 2, "steps": 4, "warm_up": 1}
    return {"batch": 4096, "rounds": 3, "steps": 4, "warm_up": 2}


def one(F: int, d: int, k: int, acts: Path, dtype: str) -> dict[str, Any]:
    """The row of a size."""
    how = plan(F)
    B = how.pop("batch")
    shape = (B, d, F, k)
    names = [f"product {dtype}", "copy", "ours topk"]  # the large one last: building takes more than waiting
    seconds, answers = measure(
        names,
        acts,
        ",".join(str(n) for n in shape),
        dtype=dtype,
        limit=120.0,
        also=(("memory", 2),),
        **how,
    )
    medians = {name: spread(values)[0] for name, values in seconds.items()}
    found = rates(medians, shape)
    assert found is not None, "product and copy were measured"
    least = floor(shape, answers["ours topk"]["facts"]["nnz"], found)
    return {
        "d_sae": F,
        "batch": B,
        "us_per_token": medians["ours topk"] / B * 1e6,
        "floor_us": least / B * 1e6,
        "product_us": medians[f"product {dtype}"] / B * 1e6,
        "eta": least / medians["ours topk"],
        "memory_mb": answers["ours topk"]["peak_bytes"] / 1e6,
        "memory_allowed_mb": 250 + 0.02 * 8 * d * F / 1e6,
        "steps": len(seconds["ours topk"]),
    }


def plot(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Microseconds a token over features, both logarithmic: measured and floor, with eta at each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [row["d_sae"] for row in rows]
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axis.loglog(sizes, [row["us_per_token"] for row in rows], "o-", label="ours, TopK")
    axis.loglog(sizes, [row["floor_us"] for row in rows], "s--", label="floor at the same run's rates")
    for row in rows:
        place = (row["d_sae"], row["us_per_token"])
        axis.annotate(f"η {row['eta']:.2f}", place, xytext=(-6, 8), textcoords="offset points", ha="right")
    axis.set(xlabel="features (d_sae)", ylabel="µs per token", title=title)
    axis.set_xticks(sizes, [f"{size // 1024}k" if size < 2**20 else f"{size >> 20}M" for size in sizes], minor=False)
    axis.xaxis.minorticks_off()
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default=",".join(str(size) for size in SIZES))
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--json", default="runs/bench/growth.json")
    parser.add_argument("--png", help="also plot what is measured so far (needs the extra `plots`)")
    options = parser.parse_args()
    dtype = resolved(options.dtype)
    facts = {"d": options.d, "k": options.k, "dtype": dtype}
    done = files.read_json(options.json) if Path(options.json).exists() else {"rows": []}
    rows = done["rows"]
    if rows and {key: done[key] for key in facts} != facts:
        raise SystemExit(
            f"{options.json}: holds another run ({done['d']=}, {done['k']=}, {done['dtype']=}). Delete it."
        )
    title = f"cost per token, d = {options.d}, k = {options.k}"
    acts = normed(activations(options.d, 32_768, None)[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acts.safetensors"
        save_file({"train": acts}, path)
        for F in (int(size) for size in options.sizes.split(",")):
            if any(row["d_sae"] == F for row in rows):
                continue
            rows.append(one(F, options.d, options.k, path, dtype))
            rows.sort(key=lambda row: row["d_sae"])
            save(options.json, show(title, rows, facts=facts))
            gc.collect()
    if options.png:
        plot(rows, title, options.png)


if __name__ == "__main__":
    main()
