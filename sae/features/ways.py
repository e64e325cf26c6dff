"""Other ways to a feature than contrast: a text, a token, words, likeness, effect. None needs more than a second.

Every way gives a FeatureList whose rows have all scores that the index knows. Only `by_text` runs the host.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features import words
from sae.features.concept import tokens_of, words_of, writes
from sae.features.contrast import ranked
from sae.features.index import Index
from sae.features.pool import counted, entries, reader, strongest, text_blocks
from sae.features.rows import FeatureList, bare, check_n, decoder_cosines, filled

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae.autoencoder import SAE
    from sae.host import Host


def by_text(index: Index, text: str, sae: SAE, host: Host, *, n: int = 10) -> FeatureList:
    """Features that fire on a text, and at which token: by their strength there as a share of their maximum, times the
    logarithm of one over their density, so that what fires everywhere comes last."""
    check_n(n)
    index.check(sae)
    if not text.strip():
        raise UserError("find: the text is empty. Give some words.")
    read, hook, best, tokens = reader(sae), index.facts.hook, [], []
    for block in text_blocks([text], sae, host, hook):
        found = entries(read, block, hook, counted(block, hook), sum(len(one) for one in tokens))
        best.append(found[strongest(found, index.facts.n_features)])
        tokens.append(block.tokens)
    feature, act, row = (torch.cat([getattr(one, name) for one in best]) for name in ("feature", "act", "row"))
    if not len(feature):
        raise UserError(f"find: no position of {text[:40]!r} counts (its first token never does). Give more words.")
    own = ranked(act)  # a text longer than a row is read in pieces
    own = own[torch.tensor(list({int(f): i for i, f in reversed(list(enumerate(feature[own])))}.values()))]
    feature, act, row = feature[own], act[own], row[own]
    max_act, density = index.stats["max_act"][feature], index.stats["density"][feature]
    score = act / torch.maximum(max_act, act) * -density.clamp(min=1e-7).log10()
    where = torch.cat(tokens).tolist()
    found = [
        bare(index, int(feature[i]), float(score[i]), f"{act[i]:.1f} at {index.token(where[row[i]]).strip()!r}")
        for i in ranked(score)[:n].tolist()
    ]
    return FeatureList(filled(index, found, sae), "share of its maximum at that token × log10(1/density)")


def by_token(index: Index, token: str, *, sae: SAE | None = None, n: int = 10) -> FeatureList:
    """Features that fire on a token, in any spelling that differs by case and spaces alone: by the share of their
    activation that it has times the share of its occurrences on which they fire. Raises UserError for a word that is no
    token of the vocabulary."""
    check_n(n)
    ids = token_ids(index, token)
    kept = index.top_token_ids
    feature, place = torch.isin(kept, ids.int()).nonzero(as_tuple=True)
    share, firing = torch.zeros(index.facts.n_features), torch.zeros(index.facts.n_features)
    share.index_add_(0, feature, index.token_shares[feature, place])
    firing.index_add_(0, feature, index.token_firings[feature, place].float())
    occurs = int(index.token_counts[ids].sum())
    if not occurs:
        raise UserError(f"find: the indexed text never holds {token!r}. Index more text, or look for another token.")
    sensitivity = firing / occurs
    score = share * sensitivity
    found = [
        replace(bare(index, f, float(score[f]), f"{share[f]:.0%} of its activation"), sensitivity=float(sensitivity[f]))
        for f in ranked(score)[:n].tolist()
        if score[f] > 0
    ]
    by = f"share of its activation × share of the token's {occurs:,} occurrences on which it fires"
    return FeatureList(filled(index, found, sae), by)


def by_words(index: Index, query: str, *, sae: SAE | None = None, n: int = 10) -> FeatureList:
    """Features by full text: the user's labels first, then tokens, what is promoted, and strongest contexts."""
    check_n(n)
    wanted = set(words_of(query))
    own = {} if sae is None else {f: label for f, label in sae.labels.items() if wanted & set(words_of(label))}
    found = [bare(index, feature, math.inf, "label") for feature in own]
    scored = words.search(index, query, n)
    found += [bare(index, f, score, f"bm25 {score:.1f}") for f, score in scored if f not in own]
    return FeatureList(filled(index, found[:n], sae), "labels, then bm25 over tokens and contexts")


def by_likeness(index: Index, direction: Float[Tensor, " d"], sae: SAE, *, n: int = 10, leave: int = -1) -> FeatureList:
    """Features whose decoder rows have the largest cosine with a direction: of a feature (which `leave` leaves out), or
    of a feature of another SAE at the same hook. Raises UserError for another width."""
    check_n(n)
    if direction.shape != (sae.d_out,):
        raise UserError(
            f"find: the direction has width {direction.shape[-1]:,}, this SAE {sae.d_out:,}. Give one of the same hook."
        )
    cosine = decoder_cosines(sae, direction)
    if leave >= 0:
        cosine[leave] = -2
    found = [bare(index, f, float(cosine[f]), f"cosine {cosine[f]:.2f}") for f in ranked(cosine)[:n].tolist()]
    return FeatureList(filled(index, found, sae), "cosine of decoder rows")


def by_effect(index: Index, query: str, *, sae: SAE | None = None, n: int = 10) -> FeatureList:
    """Features that make the model say a word: by output score × the share of what they promote and make it say that
    belongs to it (without output scores by the share alone). Raises UserError where the index has no logit lens."""
    check_n(n)
    if "top" not in index.lens:
        raise UserError(f"{index.path}: has no logit lens, it was made without a host. Make it again with `sae index`.")
    weights = {word: 1.0 for word in words_of(query)}
    if not weights:
        raise UserError(f"find: {query!r} holds no word to look for. Give a word that is to be said.")
    share = writes(index.lens, tokens_of(index, weights))
    score = share * index.lens["output_score"].nan_to_num(0) if "output_score" in index.lens else share
    found = [
        replace(bare(index, f, float(score[f]), f"{share[f]:.0%} of what it says"), writes=float(share[f]))
        for f in ranked(score, share)[:n].tolist()
        if share[f] > 0
    ]
    by = "share of what it promotes and makes the model say"
    return FeatureList(filled(index, found, sae), f"output score × {by}" if "output_score" in index.lens else by)


def token_ids(index: Index, word: str) -> Int[Tensor, " n"]:
    """The tokens that are a word but for case and spaces. Raises UserError where there is none."""
    wanted = word.strip().casefold() or word
    ids = [i for i, string in enumerate(index.vocab) if (string.strip().casefold() or string) == wanted]
    if not ids:
        raise UserError(
            f"find: {word!r} is no token of this vocabulary (a rarer word is cut into pieces). Look for its pieces, or "
            "use --text."
        )
    return torch.tensor(ids)
