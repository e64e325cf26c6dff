"""Every layout against the peer that it is of: what loads, how far codes and reconstruction are, what is written back.

    python -m experiments.layouts [--seed 1] [--json FILE] [--md FILE]

The peers' own packages write each kind of SAE that they have (tests/peers/write_*.py, in the environments that
experiments/bench/peers.sh builds) with random weights of this seed, and say what codes and reconstruction they make of
the same activations. All differences are the largest over the largest value, in float32.

loads         our codes (dense, and sparse) and reconstruction less the peer's
saelens, …    the same SAE written in that layout by us, and what that package makes of it, less what we make of it
round trip    loaded, saved here (SAELens's layout and goldengate.json), loaded again; and written in its own layout,
              where we write that, and loaded again; infinite where that says other units
"""

import argparse
import logging
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from sae import files
from sae.autoencoder import SAE
from sae.formats import CHECKPOINTS, layouts
from tests.peers.agree import BAR, difference, differences, expected, in_peer, load, made_of, said

WRITERS = ("saelens", "sparsify", "dictionary_learning", "published", "openmoss")
ORDER = ("saelens", "sparsify", "dictionary_learning", "gemma_scope", "gemma_scope_2", "openmoss")
NAMES = {"gemma_scope": "Gemma Scope 1", "gemma_scope_2": "Gemma Scope 2", "openmoss": "OpenMOSS, Llama Scope"}


def written(sae: SAE, to: str, folder: Path) -> bool:
    """Whether the layout can say the SAE; it is then in `folder`."""
    facts, tensors = sae.facts()
    folder.mkdir(parents=True) if to in facts.said_by() else folder.parent.mkdir(parents=True, exist_ok=True)
    if to in facts.said_by():
        layouts.PAGES[to].write(folder, facts, tensors)
    return folder.exists()


def apart(one: SAE, other: SAE, x: torch.Tensor) -> float:
    """Infinite where one does not say the other's units."""
    (here, its), (there, others) = ((sae.cfg.metadata.units, sae.cfg.metadata.norm_factor) for sae in (one, other))
    if (here, its) != (there, others):
        return float("inf")
    return max(difference(one.encode(x), other.encode(x)), difference(one(x), other(x)))


def measured(cases: list[Path], into: Path) -> list[dict]:
    """A row for each case."""
    saes = {case.name: (load(case), expected(case)[0]["x"]) for case in cases}
    theirs: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for to in CHECKPOINTS:
        there = {name: one for name, one in saes.items() if written(one[0], to, into / to / name)}
        for name, (sae, x, found) in made_of(to, into / to, there).items():
            theirs[name][to] = (difference(found["codes"], sae.encode(x)), difference(found["recon"], sae(x)))
    rows = []
    for case in cases:
        sae, x = saes[case.name]
        layout, _, kind = case.name.partition("-")
        found = differences(case, sae)
        again = [apart(SAE.load(sae.save(into / "ours" / case.name)), sae, x)]
        if layout in theirs[case.name] and layout != "saelens":  # which saving here is
            again.append(apart(SAE.load(into / layout / case.name), sae, x))
        rows.append({
            "layout": layout, "kind": kind, "by": said(case)["by"], "codes": max(found["codes"], found["sparse"]),
            "recon": found["recon"], "units": sae.cfg.metadata.units, "round trip": max(again),
            **{to: theirs[case.name].get(to) for to in CHECKPOINTS},
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line for each layout, then one for each kind."""
    lines = [
        "| layout | kinds | loads: codes · recon | SAELens loads it | sparsify | dictionary_learning | round trip |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        own = [row for row in rows if row["layout"] == layout]
        cells = [f"{worst(own, 'codes')} · {worst(own, 'recon')}"]
        for to in CHECKPOINTS:
            can = [row for row in own if row[to]]
            cells.append(f"{len(can)} of {len(own)}: {figure(max(max(row[to]) for row in can))}" if can else "–")
        name = NAMES.get(layout, layout)
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | {worst(own, 'round trip')} |")
    lines += ["", "| layout | kind | by | units | codes | recon | SAELens loads it: codes · recon | sparsify | "
              "dictionary_learning | round trip |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        cells = [" · ".join(map(figure, row[to])) if row[to] else "–" for to in CHECKPOINTS]
        lines.append(
            f"| {row['layout']} | {row['kind']} | {row['by']} | {row['units']} | {figure(row['codes'])} | "
            f"{figure(row['recon'])} | {' | '.join(cells)} | {figure(row['round trip'])} |"
        )
    return "\n".join(lines)


def worst(rows: list[dict], key: str) -> str:
    return figure(max(row[key] for row in rows))


def figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    options = parser.parse_args()
    logging.getLogger("sae").setLevel(logging.ERROR)  # that no peer's SAE has statistics is known
    with tempfile.TemporaryDirectory() as place:
        for writer in WRITERS:
            in_peer(f"write_{writer}.py", f"{place}/theirs", options.seed)
        cases = sorted(path.parent for path in Path(place, "theirs").glob("*/expected.safetensors"))
        cases.sort(key=lambda case: ORDER.index(case.name.partition("-")[0]))
        rows = measured(cases, Path(place))
    print(table(rows))
    above = [row["kind"] for row in rows if max(row["codes"], row["recon"], row["round trip"]) > BAR]
    print(f"\n{len(rows)} kinds; above {BAR:g}: {', '.join(above) or 'none'}")
    if options.json:
        files.write_json(options.json, {"seed": options.seed, "rows": rows})
    if options.md:
        files.write_text(options.md, table(rows) + "\n")


main()
