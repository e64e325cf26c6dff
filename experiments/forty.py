"""The forty concepts: does an SAE have a feature for each, on passages in forms that training never saw?

    sae corpus --prompts experiments/forty-unseen.json --out runs/forty --tokens 90k     # once; it is committed
    python -m experiments.forty checkpoints/smollm2-golden-gate

`forty.json` lists the concepts with the names by which an answer is recognised (sae/steering/scores.py). A concept's
feature is chosen on passages of the bundled corpus's training part, by shrunk AUROC among features with a density below
5%: up to 24 passages about it against passages of the same forms about the others that hold none of its names.
The figure is its AUROC on `forty-unseen.jsonl.gz` (20 passages a concept, ten forms that the bundled corpus does not
have), the same way; 95% intervals by bootstrap over the prompts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import SAE, Host, files, table
from sae.activations.harvest import Block, stream
from sae.documents import Document, documents, hashed, part_of
from sae.features.contrast import Contrast, Pair, Side, contrast, ranked
from sae.features.index import IndexedDocument
from sae.features.lens import output_scores
from sae.features.pool import DocumentMaxima, counted, document_maxima
from sae.steering.scores import Lexicon, speaks_of
from sae.text import pack

HERE = Path(__file__).parent
ENOUGH, DENSEST, EACH, DRAWS = 0.9, 0.05, 24, 1000
SHARED = 10  # concepts at least that have passages in a form
FILED_AS = {"a scam email": "scam email"}  # a topic's name in the bundled corpus, where it differs


@dataclass(frozen=True)
class Concept:
    name: str
    lexicon: Lexicon


@dataclass(frozen=True)
class Passages:
    """What is read once for every SAE at a hook: `choosing` come first, `reporting` after them."""

    documents: Sequence[Document]
    n_choosing: int

    def of(self, concept: Concept, reporting: bool) -> tuple[list[int], list[int]]:
        """Numbers of the passages about a concept, and of those about others that hold none of its names."""
        rows = range(self.n_choosing, len(self.documents)) if reporting else range(self.n_choosing)
        own = [i for i in rows if self.documents[i].topic == concept.name]
        forms = {self.documents[i].form for i in own}
        others = [
            i
            for i in rows
            if self.documents[i].topic != concept.name
            and (reporting or self.documents[i].form in forms)
            and not speaks_of(self.documents[i].text, concept.lexicon.names)
        ]
        return own, others


def concepts() -> list[Concept]:
    """The list, in its order."""
    rows = json.loads((HERE / "forty.json").read_text(encoding="utf-8"))
    return [Concept(row["concept"], Lexicon(tuple(row["names"]), tuple(row.get("parts", ())))) for row in rows]


def passages(held_out: float = 0.1) -> Passages:
    """The passages, the same in every run."""
    names = {FILED_AS.get(one.name, one.name): one.name for one in concepts()}
    found: dict[str, list[Document]] = {name: [] for name in names.values()}
    own = [one for one in documents("bundled") if one.topic in names and part_of(one, held_out) == "train"]
    topics: dict[str, set[str]] = {}
    for document in own:
        topics.setdefault(document.form, set()).add(document.topic)
    for document in sorted(own, key=lambda one: hashed("forty", one.text)):
        some = found[names[document.topic]]
        if len(some) < EACH and len(topics[document.form]) >= SHARED:
            some.append(_named(document, names[document.topic]))
    choosing = [document for some in found.values() for document in some]
    reporting = [
        _named(document, names.get(document.topic, document.topic))
        for document in documents(HERE / "forty-unseen.jsonl.gz")
    ]
    return Passages([*choosing, *reporting], len(choosing))


def _named(document: Document, topic: str) -> Document:
    return Document(document.text, document.group, topic, document.form)


def blocks(which: Passages, host: Host, hooks: Sequence[str], limits: Mapping[str, Any]) -> Iterable[Block]:
    """The passages run through the host; a block's `doc` is a passage's number."""
    rows = pack([one.text for one in which.documents], host.tokenizer, 128, special_ids=host.special_ids)
    return stream(host, rows, hooks, outlier_norm=limits)


@dataclass(frozen=True)
class Sums:
    """Of the counted activations at a hook: per passage their sum [n, d] and number [n]; the median norm of all."""

    sums: Tensor
    counts: Tensor
    norm: float


def summed(some: Iterable[Block], hook: str, n: int) -> Sums:
    """One reading of the passages' activations."""
    sums, counts, norms = None, torch.zeros(n, dtype=torch.float64), []
    for block in some:
        own = counted(block, hook)
        x, doc = block.acts[hook][own].double().cpu(), block.doc.cpu().long()[own]
        sums = torch.zeros(n, x.shape[1], dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, doc, x)
        counts += torch.bincount(doc, minlength=n)
        norms.append(x.norm(dim=1))
    assert sums is not None, "there are passages"
    return Sums(sums, counts, float(torch.cat(norms).median()))


def difference(which: Passages, read: Sums, concept: Concept) -> Tensor:
    """Unit difference of means [d] over the choosing passages: the baseline, and a pointer to features that write."""
    own, others = which.of(concept, reporting=False)
    with_it, without = (read.sums[rows].sum(0) / read.counts[rows].sum() for rows in (own, others))
    return ((with_it - without) / (with_it - without).norm()).float()


@dataclass(frozen=True)
class Row:
    """A concept's line of the table."""

    concept: str
    feature: int
    choosing: float
    auroc: float
    low: float
    high: float
    sensitivity: float
    specificity: float
    density: float
    output_score: float


def contrasted(which: Passages, maxima: DocumentMaxima, concept: Concept, reporting: bool) -> tuple[Contrast, Pair]:
    """One concept's two sides, compared."""
    sides = [
        Side([IndexedDocument(which.documents[i].text, group=which.documents[i].group) for i in rows], maxima,
             torch.tensor(rows, dtype=torch.int64))
        for rows in which.of(concept, reporting)
    ]  # fmt: skip
    pair = Pair(sides[0], sides[1], maxima.n_features)
    return contrast(pair), pair


def chosen(found: Contrast, sae: SAE, n: int = 1) -> list[int]:
    """The best features by shrunk AUROC; equal ones by the mean difference in units of the maximum."""
    assert sae.stats is not None, "a trained SAE has statistics"
    density, most = sae.stats.density, sae.stats.max_act
    apart = torch.where(most > 0, found.difference / most.clamp_min(1e-6), 0.0)
    return ranked((density < DENSEST) & (density > 0), found.shrunk, apart)[:n].tolist()


def measured(
    which: Passages, maxima: DocumentMaxima, sae: SAE, host: Host, hook: str, *, intervals: bool = True
) -> list[Row]:
    """The table: every concept's feature and its figures."""
    assert sae.stats is not None, "a trained SAE has statistics"
    rows = []
    for concept in concepts():
        chosen_by = contrasted(which, maxima, concept, reporting=False)[0]
        feature = chosen(chosen_by, sae)[0]
        found, _ = contrasted(which, maxima, concept, reporting=True)
        low, high = interval(which, maxima, concept, feature) if intervals else (math.nan, math.nan)
        rows.append(
            Row(
                concept.name,
                feature,
                float(chosen_by.auroc[feature]),
                float(found.auroc[feature]),
                low,
                high,
                float(found.sensitivity[feature]),
                float(found.specificity[feature]),
                float(sae.stats.density[feature]),
                0.0,
            )  # fmt: skip
        )
    scores = output_scores(host, sae, [row.feature for row in rows], hook).score
    return [Row(**{**vars(row), "output_score": float(score)}) for row, score in zip(rows, scores, strict=True)]


def interval(which: Passages, maxima: DocumentMaxima, concept: Concept, feature: int) -> tuple[float, float]:
    """Percentile bootstrap over the prompts of each side of the reporting passages."""
    sides = which.of(concept, reporting=True)
    acts, groups = [], []
    for rows in sides:
        at, features, value = maxima.select(torch.tensor(rows))
        own = features == feature
        acts.append(torch.zeros(len(rows)).index_add_(0, at[own], value[own]))
        known: dict[str, int] = {}
        groups.append(torch.tensor([known.setdefault(which.documents[i].group, len(known)) for i in rows]))
    won = (acts[0][:, None] > acts[1]).double() + 0.5 * (acts[0][:, None] == acts[1])
    summed = torch.zeros(int(groups[0].max()) + 1, won.shape[1], dtype=torch.float64).index_add_(0, groups[0], won)
    summed = torch.zeros(len(summed), int(groups[1].max()) + 1, dtype=torch.float64).index_add_(1, groups[1], summed)
    sizes = [torch.bincount(group).double() for group in groups]
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        a, b = (torch.randint(len(size), (len(size),), generator=generator) for size in sizes)
        found.append(summed[a][:, b].sum() / (sizes[0][a].sum() * sizes[1][b].sum()))
    ends = torch.stack(found).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def told(rows: Sequence[Row]) -> str:
    """The table as text, with the count that the bar asks for."""
    good = [row for row in rows if row.auroc >= ENOUGH]
    missed = ", ".join(f"{row.concept} ({row.auroc:.2f})" for row in rows if row.auroc < ENOUGH) or "none"
    return f"held-out AUROC of at least {ENOUGH}: {len(good)} of {len(rows)}; misses: {missed}\n\n" + table.text(
        [vars(row) for row in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("--json", help="write the rows there")
    args = parser.parse_args()
    sae = SAE.load(args.sae)
    about: Any = sae.cfg.metadata
    host, which = Host.load(about.model_name), passages()
    limits = {about.hook_name: about.outlier_norm}
    some = blocks(which, host, [about.hook_name], limits)
    maxima = document_maxima(sae, some, len(which.documents), hook=about.hook_name)
    rows = measured(which, maxima, sae, host, about.hook_name)
    print(told(rows))
    if args.json:
        files.write_json(args.json, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
