"""Rank-1 features of a hundred concepts, on texts that neither training nor the choice has seen.

    sae corpus --prompts experiments/concepts.json --out runs/concepts --tokens 215k
    sae index checkpoints/smollm2-golden-gate --text runs/concepts/corpus.jsonl.gz --out runs/concepts/index --no-scores
    python experiments/concepts.py checkpoints/smollm2-golden-gate

The concepts were listed (concepts.json) before anything was run; the bundled host wrote passages about each, in forms
that the bundled corpus does not have. For a concept the positives are its passages, the negatives all passages of the
same forms about other concepts that do not hold its words. `chosen`: rank 1 by shrunk AUROC on half of them, AUROC on
the other half (a prompt's passages stay in one half), as `sae find`. `by name`: rank 1 on texts that were made from the
name alone (features/templates.py), AUROC on all of the passages. 95% intervals by bootstrap over the reported texts.
What it cannot say: whether the passages are good ones (a 135M model wrote them), and whether such a feature steers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sae import files
from sae.autoencoder import SAE
from sae.features.concept import matching
from sae.features.contrast import Pair, Side, contrast, halves, noise, ranked
from sae.features.index import Index, IndexedDocument
from sae.features.pool import text_maxima
from sae.features.search import tie_break
from sae.features.templates import matched
from sae.host import Host
from sae.training.log import Progress

ENOUGH, DENSEST, DRAWS = 0.9, 0.05, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("--index", default="runs/concepts/index")
    parser.add_argument("--no-names", action="store_true", help="leave out the search by name alone")
    parser.add_argument("--json", default="runs/concepts/result.json")
    args = parser.parse_args()
    index, known = Index.open(args.index), Index.open(Path(args.sae) / "index")
    sae = SAE.load(args.sae)
    index.check(sae)
    host = None if args.no_names else Host.load(sae.cfg.metadata.model_name)
    concepts = json.loads(Path(__file__).with_name("concepts.json").read_text())[0]["topics"]
    bar, rows = Progress(len(concepts), 0, "concepts", name="concepts"), []
    for concept in concepts:
        rows.append(measured(index, known, sae, host, concept))
        bar.update(1)
    bar.close()
    for line in table(rows, known):
        print(line)
    files.write_json(args.json, rows)


def sides(index: Index, concept: str) -> tuple[Side, Side]:
    """All passages about the concept, and those about others in the same forms that do not hold its words."""
    documents, seen = index.documents, index.maxima.seen
    holding = set(matching(documents, concept))
    own = [i for i, document in enumerate(documents) if document.topic == concept and bool(seen[i])]
    forms = {documents[i].form for i in own}
    others = [i for i, one in enumerate(documents) if one.topic != concept and i not in holding and bool(seen[i])]
    others = [i for i in others if documents[i].form in forms]
    made = [Side([documents[i] for i in rows], index.maxima, torch.tensor(rows)) for rows in (own, others)]
    return made[0], made[1]


def measured(index: Index, known: Index, sae: SAE, host: Host | None, concept: str) -> dict:
    """A row of the table."""
    positives, negatives = sides(index, concept)
    (chosen_p, reported_p), (chosen_n, reported_n) = halves(positives, 0), halves(negatives, 0)
    F, sparse = index.facts.n_features, known.stats["density"] < DENSEST
    choosing = Pair(chosen_p, chosen_n, F)
    chosen = contrast(choosing)
    best = int(ranked(sparse, chosen.shrunk, tie_break(known, chosen))[0])
    reported = contrast(Pair(reported_p, reported_n, F))
    low, high = interval(reported_p, reported_n, best)
    row = {
        "concept": concept, "passages": len(positives), "others": len(negatives), "feature": best,
        "choosing": float(chosen.auroc[best]), "auroc": float(reported.auroc[best]), "low": low, "high": high,
        "sensitivity": float(reported.sensitivity[best]), "specificity": float(reported.specificity[best]),
        "noise": noise(choosing, sparse), "density": float(known.stats["density"][best]),
        "output_score": float(known.lens["output_score"][best]),
    }  # fmt: skip
    if host is not None:
        made = matched(concept)
        texts = [*(one.text for one in made.positives), *(one.text for one in made.negatives)]
        maxima = text_maxima(texts, sae, host, index.facts.hook)
        n = len(made.positives)
        named = [
            Side([IndexedDocument(one.text) for one in group], maxima, rows)
            for group, rows in ((made.positives, torch.arange(n)), (made.negatives, torch.arange(n, len(texts))))
        ]
        by_name = contrast(Pair(named[0], named[1], F))
        feature = int(ranked(sparse, by_name.shrunk, tie_break(known, by_name))[0])
        row |= {"by_name": feature, "by_name_auroc": float(contrast(Pair(positives, negatives, F)).auroc[feature])}
    return row


def interval(positives: Side, negatives: Side, feature: int) -> tuple[float, float]:
    """Percentile bootstrap over the texts of each side."""
    acts = []
    for side in (positives, negatives):
        row, features, value = side.maxima.select(side.rows)
        own = features == feature
        acts.append(torch.zeros(len(side)).index_add_(0, row[own], value[own]))
    above = (acts[0][:, None] > acts[1]).double() + 0.5 * (acts[0][:, None] == acts[1])
    generator = torch.Generator().manual_seed(0)
    found = [
        above[torch.randint(len(above), (len(above),), generator=generator)][
            :, torch.randint(above.shape[1], (above.shape[1],), generator=generator)
        ].mean()
        for _ in range(DRAWS)
    ]
    ends = torch.stack(found).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def table(rows: list[dict], known: Index) -> list[str]:
    good = [row for row in rows if row["auroc"] >= ENOUGH]
    named = [row for row in rows if row.get("by_name_auroc", 0) >= ENOUGH]
    lines = [
        f"rank-1 feature with held-out AUROC of at least {ENOUGH}: {len(good)} of {len(rows)}"
        + (f"; chosen by the name alone: {len(named)}" if "by_name" in rows[0] else ""),
        f"misses: {', '.join(row['concept'] for row in rows if row['auroc'] < ENOUGH) or 'none'}",
        "",
        "| concept | texts | feature | fires on | AUROC held out [95%] | choosing | noise | sens | spec | out | name |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens = " ".join(one.text.strip() for one in known.top_tokens(row["feature"], 4)).replace("|", "\\|")
        name = f"{row['by_name']}: {row['by_name_auroc']:.2f}" if "by_name" in row else ""
        lines.append(
            f"| {row['concept']} | {row['passages']} | {row['feature']} | {tokens} | {row['auroc']:.3f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['choosing']:.3f} | {row['noise']:.2f} | "
            f"{row['sensitivity']:.2f} | {row['specificity']:.2f} | {row['output_score']:.1g} | {name} |"
        )
    return lines


if __name__ == "__main__":
    main()
