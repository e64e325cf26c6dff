"""Search by contrast: which features separate texts with a concept from texts of the same form without; and which few
together lead toward it. ways.py has the other ways.

Features are ranked by shrunk AUROC on half of the texts and reported on the other half (contrast.py). For steering,
those that detect are ordered by what they make the model write: in a trial where there is a host (trial.py), else by
output score × the share of what they promote that belongs to the concept. A query over the index's own documents needs
neither host nor SAE. Not known here: how well a feature steers on other prompts (steering/ measures that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.concept import tokens_of, weights_of, words_of, writes
from sae.features.contrast import Contrast, Pair, Side, auroc, contrast, halves, noise, ranked
from sae.features.index import Index
from sae.features.lens import logit_lens, output_scores
from sae.features.rows import FeatureList, Found, bare, check_n, filled
from sae.features.sides import sides, texts
from sae.features.trial import Tried, can_steer, try_out

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.autoencoder import SAE
    from sae.host import Host

GOALS = ("detect", "steer")
_DENSEST = 0.05  # denser features come after all others
_DETECTS = 0.75  # AUROC on the choosing half from which a feature counts as detecting
_CANDIDATES = 50  # considered for steering when fewer detect
_TRIED = 16  # of these at most that many are tried out
_LEAST = 1e-3  # output score × writes below this orders nothing
_BUDGET = 1.5  # strengths of a set, in maxima
_ALIKE = 0.7  # cosine of decoder rows from which a second feature adds nothing to a set


def find(
    index: Index,
    concept: str | None = None,
    *,
    pos: Sequence[str] | None = None,
    neg: Sequence[str] | None = None,
    by_name: bool = False,
    sae: SAE | None = None,
    host: Host | None = None,
    goal: str = "detect",
    n: int = 10,
    seed: int = 0,
) -> FeatureList:
    """The n features that best separate texts with a concept from texts without, best first.

    concept   looked for in the text and topic of the index's documents, as a phrase, or else all its words; where fewer
              than 8 hold it and there is a host, matched texts are made from its name (templates.py)
    pos, neg  own texts instead, run through `host` and `sae`; without neg the negatives come from the index
    by_name   make the texts from the concept's name in any case
    goal      "detect" orders by shrunk AUROC. "steer" orders those that detect by a trial (trial.py) where
              host and sae are given (no transcoder), else by output score × writes; the index's output scores, or
              where it has none computed for the candidates with host and sae
    seed      of the split into choosing and reporting halves
    Raises UserError for fewer than 8 positives or negatives, and when neither a concept nor texts are given.
    """
    if goal not in GOALS:
        raise UserError(f"find: the goal {goal!r} is not one of {', '.join(GOALS)}. Use one of them.")
    check_n(n)
    if sae is not None:
        index.check(sae)
    positives, negatives, about = sides(index, concept, pos, neg, by_name, sae, host, seed)
    (chosen_p, reported_p), (chosen_n, reported_n) = halves(positives, seed), halves(negatives, seed)
    F = index.facts.n_features
    density = index.stats["density"]
    sparse = density < _DENSEST
    choosing = Pair(chosen_p, chosen_n, F)
    chosen = contrast(choosing)
    order = ranked(sparse, chosen.shrunk, tie_break(index, chosen))
    luck = noise(choosing, sparse, seed=seed)
    if goal == "detect":
        order = order[:n]
    else:
        detecting = order[(chosen.auroc[order] >= _DETECTS) & sparse[order]]
        order = detecting if len(detecting) >= _CANDIDATES else order[:_CANDIDATES]
    weights = weights_of(concept, texts(chosen_p), texts(chosen_n))
    lens, written = _written(index, order, weights, sae, host, needed=goal == "steer")
    trial: list[Tried] | None = None
    by = "shrunk AUROC on the choosing half"
    if goal == "steer":
        product = _product(lens, written, len(order))
        here = ranked(product, chosen.shrunk[order])
        by = "output score × what it promotes of the concept"
        if host is not None and sae is not None and can_steer(sae, host):
            best = torch.cat([here[: _TRIED // 3], torch.arange(len(order))])  # and else those that detect best
            here = torch.tensor(list(dict.fromkeys(best.tolist()))[:_TRIED])
            maxima = index.stats["max_act"] if sae.stats is None else sae.stats.max_act.float().cpu()
            tried = try_out(host, sae, order[here].tolist(), index.facts.hook, maxima, words_of, weights)
            by_trial = ranked(torch.tensor([one.score for one in tried]), product[here], chosen.shrunk[order[here]])
            here, trial = here[by_trial], [tried[i] for i in by_trial.tolist()]
            by = "the concept written in a trial"
        here = here[:n]
        order, written = order[here], None if written is None else written[here]
        lens = None if lens is None else {name: column[here] for name, column in lens.items()}
    reported = contrast(Pair(reported_p, reported_n, F))
    found = []
    for i, feature in enumerate(order.tolist()):
        one = _reported(index, feature, chosen, reported, len(reported_p), len(reported_n))
        one = _said(index, one, lens, i, None if written is None else float(written[i]))
        if trial is not None:
            one = replace(one, tried=trial[i].score, strength=trial[i].times, wrote=trial[i].answers)
        found.append(one)
    return FeatureList(filled(index, found, sae), by, texts=about, noise=luck)


def tie_break(index: Index, chosen: Contrast) -> Float[Tensor, " F"]:
    """Among features of equal AUROC: the difference of means in units of the feature's maximum (methods 5.3)."""
    return chosen.difference / index.stats["max_act"].clamp(min=1e-9)


def _reported(index: Index, feature: int, chosen: Contrast, reported: Contrast, n_pos: int, n_neg: int) -> Found:
    found = bare(index, feature, float(chosen.shrunk[feature] + 0.5))
    return replace(
        found,
        auroc=float(reported.auroc[feature]),
        auroc_choosing=float(chosen.auroc[feature]),
        mean_difference=float(reported.difference[feature]) / max(found.max_act, 1e-9),
        sensitivity=float(reported.sensitivity[feature]),
        specificity=float(reported.specificity[feature]),
        positives=n_pos,
        negatives=n_neg,
    )


def toward(
    index: Index,
    concept: str,
    *,
    by_name: bool = False,
    sae: SAE,
    host: Host | None = None,
    n: int = 4,
    seed: int = 0,
) -> FeatureList:
    """A small set of features with weights that together lead toward a concept.

    Candidates detect it (AUROC of at least 0.75 on the choosing half); they are taken by their detection × what they
    write of it (output score × writes, where the index knows it), each unlike those taken before (decoder cosine below
    0.7). A weight is the feature's mean difference between texts with and without the concept, in units of its maximum;
    `strength` is its share of a budget of 1.5 maxima, which is what one feature alone would begin with. `together` is
    the AUROC of the weighted sum on texts that chose nothing. Raises UserError as `find`, and where nothing detects
    the concept.
    """
    check_n(n)
    index.check(sae)
    positives, negatives, about = sides(index, concept, None, None, by_name, sae, host, seed)
    (chosen_p, reported_p), (chosen_n, reported_n) = halves(positives, seed), halves(negatives, seed)
    F, max_act = index.facts.n_features, index.stats["max_act"].clamp(min=1e-9)
    chosen, reported = contrast(Pair(chosen_p, chosen_n, F)), contrast(Pair(reported_p, reported_n, F))
    order = ranked(index.stats["density"] < _DENSEST, chosen.shrunk, tie_break(index, chosen))[:_CANDIDATES]
    order = order[(chosen.auroc[order] >= _DETECTS) & (chosen.difference[order] > 0)]
    if not len(order):
        raise UserError(f"find: no feature detects {concept!r}. Look at `sae find` alone, or give another SAE.")
    weights = weights_of(concept, texts(chosen_p), texts(chosen_n))
    lens, written = _written(index, order, weights, sae, host, needed=False)
    gain = chosen.shrunk[order] * (0.05 + _product(lens, written, len(order)))
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu()[order], dim=1)
    taken: list[int] = []
    for i in ranked(gain).tolist():
        if len(taken) < n and all(float(rows[i] @ rows[j]) < _ALIKE for j in taken):
            taken.append(i)
    share = (chosen.difference / max_act)[order[taken]]
    share = share / share.sum()
    found = []
    for i, strength in zip(taken, share.tolist(), strict=True):
        one = _reported(index, int(order[i]), chosen, reported, len(reported_p), len(reported_n))
        one = _said(index, one, lens, i, None if written is None else float(written[i]))
        found.append(replace(one, strength=round(_BUDGET * strength, 2)))
    together = _together(index, order[taken].tolist(), share / max_act[order[taken]], reported_p, reported_n)
    by = "detection × what it writes of the concept" if lens and "output_score" in lens else "detection"
    return FeatureList(filled(index, found, sae), by, texts=about, together=together)


def _together(index: Index, features: list[int], weights: Tensor, positives: Side, negatives: Side) -> float:
    place = torch.full((index.facts.n_features,), -1, dtype=torch.int64)
    place[features] = torch.arange(len(features))
    sums = []
    for side in (positives, negatives):
        row, feature, value = side.maxima.select(side.rows)
        at = place[feature]
        own = at >= 0
        sums.append(torch.zeros(len(side)).index_add_(0, row[own], weights[at[own]] * value[own]))
    values, positive = torch.cat(sums), torch.arange(sum(map(len, sums))) < len(sums[0])
    fires = values > 0  # weights are positive
    n_pos, n_neg = map(len, sums)
    none = torch.zeros(int(fires.sum()), dtype=torch.int64)  # the sum is one feature, number 0
    return float(auroc(none, values[fires], positive[fires], n_pos, n_neg, 1))


# ---- what a feature writes ---------------------------------------------------------------------------------


def _written(
    index: Index,
    features: Int[Tensor, " n"],
    weights: dict[str, float],
    sae: SAE | None,
    host: Host | None,
    *,
    needed: bool,
) -> tuple[dict[str, Tensor] | None, Float[Tensor, " n"] | None]:
    """The lens and output-score columns of some features (the index's, or computed now where it has none), and how much
    of a concept's words they write (concept.py)."""
    kept = {name: column[features] for name, column in index.lens.items()}
    if "output_score" not in kept and sae is not None and host is not None and sae.d_out == host.d_model:
        now = output_scores(
            host, sae, features, index.facts.hook, top_tokens=kept.get("top"), max_act=index.stats["max_act"]
        )
        if "top" not in kept:
            read = logit_lens(host, sae.W_dec[features])
            kept |= {"top": read.top, "top_values": read.top_values}
        kept |= {"output_score": now.score, "says": now.says, "says_p": now.says_p}
    if needed and "output_score" not in kept:
        raise UserError(
            f"{index.path}: holds no output scores, which order features for steering. Make it with a host "
            "(`sae index`), or give the host and the SAE."
        )
    return (kept, writes(kept, tokens_of(index, weights))) if kept else (None, None)


def _product(lens: dict[str, Tensor] | None, written: Tensor | None, n: int) -> Float[Tensor, " n"]:
    """Output score × writes, where both are known and not next to nothing."""
    if lens is None or written is None or "output_score" not in lens:
        return torch.zeros(n)
    product = lens["output_score"].nan_to_num(0) * written
    return product * (product >= _LEAST)


def _said(index: Index, one: Found, lens: dict[str, Tensor] | None, i: int, written: float | None) -> Found:
    """With what a search has just found out of its effect, which the index may not hold."""
    if lens is None:
        return one
    score = float(lens["output_score"][i]) if "output_score" in lens else math.nan
    top, says = (index.strings(lens[name][i]) if name in lens else [] for name in ("top", "says"))
    return replace(one, output_score=None if math.isnan(score) else score, writes=written, top_tokens=top, says=says)
