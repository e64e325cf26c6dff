"""Known directions, planted among an SAE's trained rows: does the search find each, by texts and by its name alone?

    python experiments/planted.py --json runs/planted/planted.json

A planted feature's direction is the difference of means of 20 sentences with a concept's name and the same sentences
with the others' (DIRECTION). Its rows are appended, so that every trained feature stays a competitor, the concept's
own among them: the decoder row is the unit direction, the encoder row the same at the same scale (an activation is
the length along the direction beyond a floor), the floor the 99th percentile over the other concepts' sentences and
natural text; then the SAE's own TopK decides. Nothing is set by the texts that the search sees: CONTRAST, given as
texts, and the product's templates, which hold the name. Ranked on half of the sentences, as methods 5.3 says.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import SAE, Host, UserError, bundled, files
from sae.autoencoder import FeatureStats
from sae.features.contrast import ENOUGH, auroc
from sae.features.contrast import ranked as best_first
from sae.features.pool import DocumentMaxima, counted, text_blocks, text_maxima
from sae.features.templates import matched
from sae.stats import measure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Read for the directions alone.
DIRECTION = (
    "Yesterday's radio play was about {}, with music from the sixties.",
    "If you ask me, {} deserves a better film.",
    "The teacher drew {} on the blackboard and nobody laughed.",
    "A friend of mine collects stamps that show {}.",
    "It rained, we had no plans, and so we ended up reading about {} for hours.",
    "Nobody at the table had expected a quarrel over {}.",
    "According to the survey, most readers would like to learn more about {}.",
    "She wrote her thesis on {} and never opened it again.",
    "Next on the program: {} as seen by three young painters.",
    "What would the world be without {}? Hard to say.",
    "He whistled, thought of {}, and missed the bus.",
    "I had a strange dream with {} in it.",
    "For the quiz tonight we still need two questions on {}, please.",
    "In chapter four the author returns to {} and tells the whole story.",
    "The word on everybody's lips that summer: {}.",
    "You can't compare everything with {}, you know.",
    "Our guide spoke of {} for so long that the children fell asleep.",
    "The exhibition on {} closes at six o'clock.",
    "My sister sent me a long message about {} at midnight.",
    "They named their band after {}, which was a mistake.",
)
# Given to the search as texts; all of these sentences are others than the product's templates.
CONTRAST = (
    "Let me tell you what I know about {}, it will not take long.",
    "There was a documentary on {} after the evening news.",
    "Only yesterday I changed my mind about {}, after a talk with my brother.",
    "Please write two pages on {} until Monday.",
    "The first song on the album is about {}, the second about the sea.",
    "A stranger on the train began to explain {} to me.",
    "Why does everybody keep asking me about {}? I am a gardener.",
    "The magazine has printed a special issue on {} with many photographs.",
    "We laughed about {} until late at night.",
    "Professor Lind gave up law in order to study {} in the north.",
    "One more remark on {}, and then we can go home.",
    "In the attic they found a box with old drawings of {}, tied with a ribbon.",
    "I would rather not speak of {} at dinner.",
    "The essay compares {} with a long journey.",
    "Her favorite subject was {}, and she could go on for hours.",
    "On page ten you will find a short paragraph about {}.",
    "They argued about {} in front of the whole class.",
    "He closed the book on {} and looked out of the window.",
    "The new podcast on {} has only three listeners so far.",
    "All her poems are about {}, even the early ones.",
)
OUTSIDE = 0.01  # share of other tokens on which a planted row is above its floor
DENSEST = 0.05
SPREAD = 0.05  # of the maximum, added to the standard deviation: a feature that never varies has no infinite effect
OWN = 0.2  # a trained row at least so close (cosine) is the concept's own; five standard deviations of random rows
TIES = ("raw", "mean", "effect", "margin")


@dataclass(frozen=True)
class Sentence:
    text: str
    topic: str
    frame: str


@dataclass(frozen=True)
class Read:
    """The host's unmasked rows of some texts, and of which text and token each is."""

    acts: Float[Tensor, "N d"]
    text: Int[Tensor, " N"]
    token: Int[Tensor, " N"]


@dataclass(frozen=True)
class Contrast:
    """How every feature tells positive texts from negative ones."""

    auroc: Float[Tensor, " F"]
    n_fired: Int[Tensor, " F"]
    raw: Float[Tensor, " F"]
    """Mean of the positives' maxima less the negatives', as the length of what is added to the reconstruction."""
    mean: Float[Tensor, " F"]
    """The same in units of the feature's maximum."""
    effect: Float[Tensor, " F"]
    """The same in standard deviations."""
    margin: Float[Tensor, " F"]
    """Lowest of the positives less highest of the negatives, in units of the feature's maximum."""


@dataclass(frozen=True)
class Rank:
    """Where a planted feature ended, by each tie-break."""

    concept: str
    kind: str
    auroc: float
    density: float
    ranks: dict[str, int]
    among_others: dict[str, int]
    """Counting only features that are not the concept's own (cosine below OWN)."""
    without_nearest: dict[str, int]
    """Not counting the trained rows that are nearest to a planted one, one for each: as if it had replaced them."""
    winner: int
    """The first by the tie-break `raw`."""
    winner_auroc: float
    winner_cosine: float
    winner_tokens: list[str]
    """Where it fires most strongly in the natural text."""


def sentences(names: Sequence[str], frames: Sequence[str]) -> list[Sentence]:
    return [Sentence(frame.format(name), name, frame) for name in names for frame in frames]


def natural(n: int) -> list[str]:
    """Passages of the bundled corpus, drawn by seed 0."""
    with gzip.open(bundled.corpus_path(), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    random.Random(0).shuffle(texts)
    return texts[:n]


def halves(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Distinct keys, cut in two by hash."""
    order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return order[: len(order) // 2], order[len(order) // 2 :]


def read(host: Host, sae: SAE, texts: Sequence[str]) -> Read:
    """What the SAE sees of texts."""
    hook, kept = host.hook(sae.cfg.metadata.hook_name), []
    for block in text_blocks(texts, sae, host):
        keep = counted(block, hook)
        kept.append((block.acts[hook][keep].float(), block.doc[keep].long(), block.tokens[keep].long()))
    return Read(*(torch.cat(part) for part in zip(*kept, strict=True)))


def plant(sae: SAE, concepts: Read, mine: Sequence[Bool[Tensor, " N"]], elsewhere: Read) -> SAE:
    """The SAE with a row more for each concept (the top of this page says how); mine[j] are the rows of concept j."""
    assert sae.stats is not None, "the SAE's folder has no statistics"
    directions, biases = [], []
    for rows in mine:
        difference = concepts.acts[rows].double().mean(0) - concepts.acts[~rows].double().mean(0)
        direction = (difference / difference.norm()).float()
        outside = torch.cat([concepts.acts[~rows], elsewhere.acts]) @ direction
        floor = outside.kthvalue(int(len(outside) * (1 - OUTSIDE))).values
        directions.append(direction)
        biases.append(sae.b_dec @ direction - floor)  # the encoder sees x - b_dec
    F = sae.cfg.d_sae
    planted = SAE(replace(sae.cfg, d_sae=F + len(mine)))
    with torch.no_grad():
        planted.W_dec.copy_(torch.cat([sae.W_dec, torch.stack(directions)]))
        planted.encoder.copy_(torch.cat([sae.encoder, torch.stack(directions)]))
        planted.b_enc.copy_(torch.cat([sae.b_enc, torch.stack(biases)]))
        planted.b_dec.copy_(sae.b_dec)
    planted.requires_grad_(False)
    here, there = (measure(planted, seen.acts.split(4096)) for seen in (elsewhere, concepts))
    # The trained rows have statistics of more text than was read here.
    max_act = torch.maximum(here.max_act, there.max_act)
    max_act[:F] = torch.maximum(max_act[:F], sae.stats.max_act)
    density = torch.cat([sae.stats.density, here.density[F:]])
    planted.stats = FeatureStats(max_act, density, here.p999, here.n_tokens)
    return planted


def contrast(sae: SAE, maxima: DocumentMaxima, positives: Sequence[int], negatives: Sequence[int]) -> Contrast:
    """Documents against documents, every feature; never [documents, F]."""
    assert sae.stats is not None
    F, max_act = maxima.n_features, sae.stats.max_act.clamp(min=1e-9)
    sides = [torch.tensor([i for i in side if maxima.seen[i]], dtype=torch.long) for side in (positives, negatives)]
    (_, fp, vp), (_, fn, vn) = (maxima.select(side) for side in sides)
    n, m = (len(side) for side in sides)
    features, values = torch.cat([fp, fn]), torch.cat([vp, vn])
    vp, vn = vp / max_act[fp], vn / max_act[fn]

    def moments(f: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        mean = torch.zeros(F).index_add_(0, f, v) / count
        return mean, (torch.zeros(F).index_add_(0, f, v * v) / count - mean**2).clamp(min=0)

    (a, var_a), (b, var_b) = moments(fp, vp, n), moments(fn, vn, m)
    lowest = torch.full((F,), torch.inf).scatter_reduce(0, fp, vp, "amin")
    lowest[torch.bincount(fp, minlength=F) < n] = 0
    highest = torch.zeros(F).scatter_reduce(0, fn, vn, "amax")
    return Contrast(
        auroc=auroc(features, values, torch.arange(len(features)) < len(fp), n, m, F),
        n_fired=torch.bincount(features, minlength=F),
        raw=(a - b) * max_act * sae.W_dec.norm(dim=1),
        mean=a - b,
        effect=(a - b) / ((var_a + var_b) / 2 + SPREAD**2).sqrt(),
        margin=lowest - highest,
    )


def order(found: Contrast, tie: str, density: Float[Tensor, " F"]) -> list[int]:
    """Features, best first: density below 5 %, shrunk AUROC, tie-break."""
    z = (found.auroc - 0.5) * (found.n_fired / ENOUGH).clamp(max=1)
    return best_first(density < DENSEST, z, getattr(found, tie)).tolist()


def ranks(sae: SAE, host: Host, names: Sequence[str], *, passages: int = 300, progress: bool = False) -> list[Rank]:
    """Plant the concepts, and say where each ends by texts ("contrast") and by its name ("name")."""
    F = sae.cfg.d_sae
    about = sentences(names, DIRECTION)
    seen = read(host, sae, [one.text for one in about])
    elsewhere = read(host, sae, natural(passages))
    planted = plant(
        sae, seen, [torch.tensor([one.topic == name for one in about])[seen.text] for name in names], elsewhere
    )
    assert planted.stats is not None
    cosines = planted.W_dec @ planted.W_dec[F:].T
    nearest = set(cosines[:F].argmax(0).tolist())
    codes = planted.encode_sparse(elsewhere.acts)
    given = sentences(names, CONTRAST)
    given_maxima = text_maxima([one.text for one in given], planted, host)
    choosing = set(halves(CONTRAST)[0])

    def fires_on(feature: int) -> list[str]:
        at = (codes.indices == feature) & (codes.values > 0)
        rows = codes.rows()[at][codes.values[at].argsort(descending=True)]
        return list(dict.fromkeys(host.tokenizer.decode([t]).strip() for t in elsewhere.token[rows].tolist()))[:5]

    def ranked(j: int, kind: str, found: Contrast) -> Rank:
        orders = {tie: order(found, tie, planted.stats.density) for tie in TIES}  # type: ignore[union-attr]
        me, winner = F + j, orders["raw"][0]

        def rank(keep: Bool[Tensor, " F"]) -> dict[str, int]:
            return {tie: [i for i in by if keep[i] or i == me].index(me) + 1 for tie, by in orders.items()}

        not_nearest = torch.tensor([i not in nearest for i in range(len(cosines))])
        return Rank(
            names[j],
            kind,
            float(found.auroc[me]),
            float(planted.stats.density[me]),  # type: ignore[union-attr]
            rank(torch.ones(len(cosines), dtype=torch.bool)),
            rank(cosines[:, j] < OWN),
            rank(not_nearest),
            winner,
            float(found.auroc[winner]),
            float(cosines[winner, j]),
            [f"planted: {names[winner - F]}"] if winner >= F else fires_on(winner),
        )

    found = []
    for j, name in enumerate(names):
        mine, others = (
            [i for i, one in enumerate(given) if (one.topic == name) == own and one.frame in choosing]
            for own in (True, False)
        )
        found.append(ranked(j, "contrast", contrast(planted, given_maxima, mine, others)))
        texts = matched(name)
        filled = [*texts.positives, *texts.negatives]
        half = set(halves([one.template for one in texts.positives])[0])
        maxima = text_maxima([one.text for one in filled], planted, host)
        n = len(texts.positives)
        mine, others = (
            [i for i, one in enumerate(filled) if (i < n) == own and one.template in half] for own in (True, False)
        )
        found.append(ranked(j, "name", contrast(planted, maxima, mine, others)))
        if progress:
            print(f"{name}: {found[-2].ranks['raw']}, {found[-1].ranks['raw']}", file=sys.stderr)
    return found


def firsts(found: Sequence[Rank]) -> str:
    """How many are first, by kind of search, by what counts as competitor, by tie-break."""
    lines = ["| search | competitors | " + " | ".join(TIES) + " |", "|---|---|" + "---|" * len(TIES)]
    for kind in ("contrast", "name"):
        of_kind = [one for one in found if one.kind == kind]
        for label, field in (
            ("all (appended)", "ranks"),
            ("without the trained row nearest to each", "without_nearest"),
            (f"all but the concept's own (cosine {OWN} or more)", "among_others"),
        ):
            counts = [sum(getattr(one, field)[tie] == 1 for one in of_kind) for tie in TIES]
            lines.append(f"| {kind} | {label} | " + " | ".join(f"{n} of {len(of_kind)}" for n in counts) + " |")
    return "\n".join(lines)


def details(found: Sequence[Rank]) -> str:
    """A row a concept: its ranks by `mean` and by `raw`, and who is first by `raw` where it is not."""

    def before(one: Rank) -> str:
        if one.ranks["raw"] == 1:
            return ""
        tokens = ", ".join(f"`{token.replace('|', '').replace('`', '')}`" for token in one.winner_tokens if token)
        return f"{one.winner} (cosine {one.winner_cosine:.2f}, AUROC {one.winner_auroc:.3f}): {tokens}"

    lines = [
        "| concept | by contrast: mean, raw | AUROC | by name: mean, raw | AUROC | first by contrast | first by name |",
        "|---|---|---|---|---|---|---|",
    ]
    for a, b in zip(found[::2], found[1::2], strict=True):
        places = [f"{one.ranks['mean']}, {one.ranks['raw']}" for one in (a, b)]
        cells = [a.concept, places[0], f"{a.auroc:.3f}", places[1], f"{b.auroc:.3f}", before(a), before(b)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", default="checkpoints/smollm2-golden-gate")
    parser.add_argument("--concepts", default="experiments/concepts.json")
    parser.add_argument("--first", type=int, default=0, help="number of the first concept")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    names = files.read_json(given.concepts)[0]["topics"][given.first : given.first + given.count]
    found = ranks(SAE.load(given.sae), Host.load("smollm2"), names, progress=True)
    files.write_json(given.json, [asdict(one) for one in found])
    print(firsts(found), details(found), sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"planted: {error}")
