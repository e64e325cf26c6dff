"""Fifty known directions, planted among an SAE's trained rows: does the search find each, by texts and by its name?

    python experiments/planted.py --texts runs/concepts/corpus.jsonl.gz --json runs/planted/planted.json

`--texts` are JSON lines {topic, form, text}, such as `sae corpus --prompts experiments/concepts.json` writes; their
forms are cut in two. A planted feature's direction is the difference of means of a concept's passages and all other
topics' in the first half of the forms: no text of the search is among these. Rows are appended, so every trained
feature stays a competitor, the concept's own among them. Decoder: the unit direction. Encoder: the same direction,
with a bias so that it is positive on 1 % of the other topics' tokens, and a scale so that its largest activation on
the concept's passages is the trained features' median maximum. The SAE's TopK decides what fires.
By contrast: passages of the other forms against other topics' of the same forms. By name: features/templates.py.
Each is ranked on half of the forms or templates as methods 5.3 says; the rank is of the planted feature.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import SAE, Host, UserError, files
from sae.activations.harvest import stream
from sae.features.lens import logit_lens
from sae.features.pool import DocumentMaxima, text_maxima
from sae.features.search import auroc
from sae.features.templates import Filled, matched
from sae.stats import measure
from sae.text import Document, pack

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

OUTSIDE = 0.01  # share of the other topics' tokens on which a planted row is positive
DENSEST = 0.05


@dataclass(frozen=True)
class Passage:
    topic: str
    form: str
    text: str


@dataclass(frozen=True)
class Read:
    """The host's rows [N, d] of some passages, and of which passage each is."""

    acts: Float[Tensor, "N d"]
    passage: Int[Tensor, " N"]


@dataclass(frozen=True)
class Contrast:
    """How every feature tells positive texts from negative ones; activations in units of its maximum."""

    auroc: Float[Tensor, " F"]
    n_fired: Int[Tensor, " F"]
    mean: Float[Tensor, " F"]
    """Mean of the positives' less the negatives'."""
    effect: Float[Tensor, " F"]
    """The same in standard deviations (pooled)."""
    margin: Float[Tensor, " F"]
    """Lowest of the positives less highest of the negatives."""


def passages(path: str) -> list[Passage]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8")
    with opened as file:
        rows = [json.loads(line) for line in file]
    return [Passage(row["topic"], row["form"], row["text"]) for row in rows]


def halves(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Distinct keys, cut in two by hash."""
    order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return order[: len(order) // 2], order[len(order) // 2 :]


def read(host: Host, sae: SAE, texts: Sequence[Passage]) -> Read:
    """What the SAE sees of passages: their unmasked rows."""
    metadata = sae.cfg.metadata
    hook = host.hook(metadata.hook_name)
    documents = [Document(passage.text, passage.text) for passage in texts]
    rows = pack(documents, host.tokenizer, metadata.context_size or 128, special_ids=host.special_ids)
    limits = None if metadata.outlier_norm is None else {hook: metadata.outlier_norm}
    acts, docs = [], []
    for block in stream(host, rows, [hook], outlier_norm=limits):
        keep = block.mask & (block.doc >= 0)
        acts.append(block.acts[hook][keep].float())
        docs.append(block.doc[keep].long())
    return Read(torch.cat(acts), torch.cat(docs))


def plant(sae: SAE, seen: Read, of_topic: dict[str, Bool[Tensor, " N"]]) -> SAE:
    """The SAE with one row more for each topic; see the top of the page. `of_topic` says which rows are a topic's."""
    assert sae.stats is not None, "the SAE's folder has no statistics"
    typical = float(sae.stats.max_act.median())
    directions, encoders, biases = [], [], []
    for mine in of_topic.values():
        direction = seen.acts[mine].double().mean(0) - seen.acts[~mine].double().mean(0)
        direction = (direction / direction.norm()).float()
        inside, outside = seen.acts[mine] @ direction, seen.acts[~mine] @ direction
        floor = outside.kthvalue(int(len(outside) * (1 - OUTSIDE))).values
        scale = typical / (inside.max() - floor)
        directions.append(direction)
        encoders.append(scale * direction)
        biases.append(scale * (sae.b_dec @ direction - floor))
    planted = SAE(replace(sae.cfg, d_sae=sae.cfg.d_sae + len(of_topic)))
    with torch.no_grad():
        planted.W_dec.copy_(torch.cat([sae.W_dec, torch.stack(directions)]))
        planted.encoder.copy_(torch.cat([sae.encoder, torch.stack(encoders)]))
        planted.b_enc.copy_(torch.cat([sae.b_enc, torch.stack(biases)]))
        planted.b_dec.copy_(sae.b_dec)
    planted.requires_grad_(False)
    planted.stats = measure(planted, seen.acts.split(4096))
    return planted


def contrast(
    maxima: DocumentMaxima, positives: Sequence[int], negatives: Sequence[int], max_act: Float[Tensor, " F"]
) -> Contrast:
    """Statistics of documents against documents."""
    F = maxima.n_features
    sides = [torch.tensor([i for i in side if maxima.seen[i]]) for side in (positives, negatives)]
    (_, fp, vp), (_, fn, vn) = (maxima.select(side) for side in sides)
    n, m = (len(side) for side in sides)
    features, values = torch.cat([fp, fn]), torch.cat([vp, vn])
    vp, vn = vp / max_act[fp], vn / max_act[fn]

    def moments(f: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        mean = torch.zeros(F).index_add_(0, f, v) / count
        return mean, (torch.zeros(F).index_add_(0, f, v * v) / count - mean**2).clamp(min=0)

    (a, va), (b, vb) = moments(fp, vp, n), moments(fn, vn, m)
    lowest = torch.full((F,), torch.inf).scatter_reduce(0, fp, vp, "amin")
    lowest[torch.bincount(fp, minlength=F) < n] = 0
    highest = torch.zeros(F).scatter_reduce(0, fn, vn, "amax")
    return Contrast(
        auroc(features, values, torch.arange(len(features)) < len(fp), n, m, F),
        torch.bincount(features, minlength=F),
        a - b,
        (a - b) / ((va + vb) / 2 + 0.05**2).sqrt(),
        lowest - highest,
    )


def order(found: Contrast, tie: Float[Tensor, " F"], density: Float[Tensor, " F"]) -> Int[Tensor, " F"]:
    """Features, best first: density below 5 %, shrunk AUROC, tie-break."""
    z = (found.auroc - 0.5) * (found.n_fired / 5).clamp(max=1)
    by = torch.arange(len(z))
    for key in (tie, z, (density < DENSEST).float()):
        by = by[key[by].argsort(descending=True, stable=True)]
    return by
