"""Does the output score order features by how well they steer? Spearman's rho over 50 features, with an interval.

    sae index checkpoints/smollm2-golden-gate --out runs/measure/index --tokens 60k
    python experiments/output_score.py checkpoints/smollm2-golden-gate runs/measure/index --out runs/measure/scores

The rules below were written before the first answer was generated.

Features   50: alive in at least ten documents, density below 1%, with concept words; ten drawn (--seed, 0) from each
           fifth of the eligible features by output score.
Concept    of a feature, from its input side alone: the words that its token stands in, in its 20 strongest documents,
           weighted by activation. Concept words hold at least a tenth of that weight each and a third together, have
           three letters or more and are no stop words. No lens is read for it.
Steering   W_dec[i] · times · recorded maximum is added at the hook at all positions but special tokens, for 1, 1.5 and
           2.5 times; six neutral questions, 28 new tokens, temperature 0.7, seed 0.
Fluency    of an answer, 0 to 1: the share of distinct word pairs × a grade of its perplexity under the unsteered host
           given the question: 1 up to the 95th percentile of unsteered answers, ½ up to three times that, else 0.
Success    at a strength: mean over the six answers of [holds a concept word] · fluency, less the same of the unsteered
           answers (eight seeds), at least 0. A feature's success is that of its best strength.
Read back  a second success that knows no words: [the unsteered host and the SAE, reading question and answer, find the
           feature at a fifth of its maximum or more at some token of the answer] in the place of [holds a word].
Circular   a third, for contrast: [holds one of the feature's 20 top lens tokens], which is what the output score looks
           for.
Rho        Spearman's, ties at their mean rank; 95% percentile interval of 10,000 bootstrap draws of the features.

Primary is the output score of the index (5 × own maximum) against success; everything else is beside it: the paper's
amplitude ("strongest", 10 ×), density, the recorded maximum, the paper's input score (share of the 20 examples whose
token is in the top lens tokens), and success counted with another feature's words as the floor of the measure. Cost:
some minutes of two cores; answers are kept in --out and not generated again. It cannot say: what a judge would call
success (words stand for concepts), what holds for other SAEs or hosts, or for features that detect no word;
six answers a strength make one feature's success coarse (steps of a sixth), and the best of three strengths is
optimistic for all alike.
"""

import argparse
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import SAE, Host, UserError, files, table
from sae.features.index import Index
from sae.features.lens import output_scores
from sae.interventions import Edit, direction_part
from sae.where import Where

QUESTIONS = (
    "What did you do today?",
    "Tell me about yourself.",
    "Give me advice for the weekend.",
    "What do you think about most?",
    "Describe a perfect morning.",
    "What should I read next?",
)
STRENGTHS = (1.0, 1.5, 2.5)
NEW_TOKENS, TEMPERATURE, SEED, UNSTEERED_SEEDS = 28, 0.7, 0, 8
DENSITY, DOCUMENTS, OF_ONE, TOGETHER, FIFTHS, FROM_EACH = 0.01, 10, 0.1, 1 / 3, 5, 10
FIRES = 0.2  # of the recorded maximum
DRAWS = 10_000
_STOP = """
    about above across after again against all almost along already also although always among and another any
    anyone anything are around because been before behind being below beneath beside between beyond both but came
    can cannot come could did does doing done down during each either else even ever every everyone everything few
    for from gave get gets getting give given goes going gone got had has have having her here hers herself him
    himself his how however into its itself just know least less let like made make makes making many may maybe
    might more most much must near neither never new next nor not nothing now off often one once only onto other
    others our ours ourselves out over own per perhaps put quite rather really said same saw say says see seem seems
    seen several shall she should since some something such take taken than that the their theirs them themselves
    then there these they thing things this those though through throughout thus too took toward towards two under
    until upon use used uses using very via was way well went were what when where whether which while who whom
    whose why will with within without would yes yet you your yours yourself
"""


@dataclass(frozen=True)
class Chosen:
    """A feature of the fifty. `fifth` counts from 0, the lowest output scores."""

    feature: int
    fifth: int
    words: list[str]
    lens_tokens: list[int]
    output_score: float
    strongest_score: float
    input_score: float
    density: float
    max_act: float


# ---- rules -------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Runs of letters, in small letters; a plural counts as its singular."""
    found = re.findall(r"[^\W\d_]+", text.casefold())
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found]


STOP = frozenset(words_of(_STOP))


def is_content(word: str) -> bool:
    return len(word) >= 3 and word not in STOP


def concept_words(weights: dict[str | None, float]) -> list[str]:
    """Words by their share of a feature's activation; none where too little of it lies on words."""
    total = sum(weights.values())
    shares = {w: a / total for w, a in weights.items() if w is not None and is_content(w) and a >= OF_ONE * total}
    return sorted(shares, key=lambda w: (-shares[w], w)) if sum(shares.values()) >= TOGETHER else []


def distinct_pairs(answer: str) -> float:
    words = answer.casefold().split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def fluency(answer: str, perplexity: float, usual: float) -> float:
    return distinct_pairs(answer) * (1.0 if perplexity <= usual else 0.5 if perplexity <= 3 * usual else 0.0)


def ranks(values: Tensor) -> Tensor:
    """Along the last axis, from 0; ties share their mean rank."""
    ordered, order = values.double().sort(-1)
    left = torch.searchsorted(ordered, ordered)
    right = torch.searchsorted(ordered, ordered, right=True)
    return torch.empty_like(ordered).scatter_(-1, order, (left + right - 1).double() / 2)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Along the last axis; 0 where one side does not vary."""
    x, y = (ranks(v) - ranks(v).mean(-1, keepdim=True) for v in (x, y))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def rho(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Spearman's rho with the 95% percentile interval of a bootstrap over the pairs."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    draws = torch.randint(len(a), (DRAWS, len(a)), generator=torch.Generator().manual_seed(SEED))
    low, high = spearman(a[draws], b[draws]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(spearman(a, b)), "low": low, "high": high}


# ---- choosing ----------------------------------------------------------------------------------------------------


def weights_of(index: Index, feature: int) -> dict[str | None, float]:
    """Activation by the word that the firing token stands in; None is what is no word."""
    weights: dict[str | None, float] = defaultdict(float)
    for example in index.examples(feature, 20):
        text, start, end = "", 0, 0
        for token in index.context(example.position, before=6, after=6):
            if token.firing:
                start, end = len(text), len(text) + len(token.text)
            text += token.text
        under = [m[0] for m in re.finditer(r"[^\W\d_]+", text) if m.start() < end and m.end() > start]
        weights[words_of(under[-1])[0] if under else None] += example.act
    return weights


def choose(host: Host, sae: SAE, index: Index, seed: int) -> tuple[list[Chosen], dict[str, int]]:
    """The fifty, and how many features each condition left."""
    assert sae.stats is not None, "the SAE has recorded maxima"
    stats, lens = index.stats, index.lens
    some = [f for f in range(sae.cfg.d_sae) if len(index.examples(f, DOCUMENTS)) >= DOCUMENTS]
    rare = [f for f in some if float(stats["density"][f]) < DENSITY and math.isfinite(float(lens["output_score"][f]))]
    words = {f: concept_words(weights_of(index, f)) for f in rare}
    eligible = sorted((f for f in rare if words[f]), key=lambda f: (float(lens["output_score"][f]), f))
    draw = random.Random(seed)
    fifths = [eligible[len(eligible) * i // FIFTHS : len(eligible) * (i + 1) // FIFTHS] for i in range(FIFTHS)]
    picked = [(f, i) for i, fifth in enumerate(fifths) for f in sorted(draw.sample(fifth, FROM_EACH))]
    features = [f for f, _ in picked]
    strongest = output_scores(host, sae, features, index.facts.hook, max_act=stats["max_act"], amplitude="strongest")
    chosen = []
    for (f, fifth), score in zip(picked, strongest.score.tolist(), strict=True):
        top = lens["top"][f].tolist()
        tokens = [index.context(e.position, 0, 0)[0].text for e in index.examples(f, 20)]
        promoted = {index.token(token) for token in top}
        chosen.append(
            Chosen(
                feature=f,
                fifth=fifth,
                words=words[f],
                lens_tokens=top,
                output_score=float(lens["output_score"][f]),
                strongest_score=score,
                input_score=sum(token in promoted for token in tokens) / len(tokens),
                density=float(stats["density"][f]),
                max_act=float(sae.stats.max_act[f]),
            )
        )
    counts = {"features": sae.cfg.d_sae, "in ten documents": len(some), "rare": len(rare), "eligible": len(eligible)}
    return chosen, counts


# ---- answers -----------------------------------------------------------------------------------------------------


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, made and written first where it is not there."""
    if not path.exists():
        files.write_json(path, make())
        print(f"wrote {path}", file=sys.stderr)
    return files.read_json(path)


def steered(host: Host, sae: SAE, hook: str, chosen: Sequence[Chosen], times: float) -> list[list[str]]:
    """Answers [features][questions] with each feature added at `times` its maximum, all in one batch."""
    which = torch.tensor([one.feature for one in chosen])
    rows = sae.W_dec.detach()[which].float() * torch.tensor([one.max_act for one in chosen])[:, None] * times
    added = rows.repeat_interleave(len(QUESTIONS), 0).to(host.device)
    where = Where("all", False, host.special_ids)
    part = direction_part(added, added.norm(dim=1), where, by_row=True)
    answers = answer(host, list(QUESTIONS) * len(chosen), SEED, [(hook, Edit((part,)))])
    return [answers[i : i + len(QUESTIONS)] for i in range(0, len(answers), len(QUESTIONS))]


def answer(host: Host, questions: list[str], seed: int, edits: Any = ()) -> list[str]:
    return host.generate(questions, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=seed, edits=edits)


@torch.inference_mode()
def read_back(host: Host, sae: SAE, hook: str, question: str, answers: list[str], features: list[int]) -> Any:
    """Of each answer its tokens, its perplexity given the question, unsteered, and the features' maxima over it."""
    tokens: list[list[int]] = [host.tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in answers]
    width = max(map(len, tokens))
    question_tokens = host.chat_tokens(question).to(host.device)
    perplexities, maxima = [], []
    for start in range(0, len(tokens), 25):
        part = tokens[start : start + 25]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        real = torch.arange(width)[None] < torch.tensor([len(row) for row in part])[:, None]
        whole = torch.cat([question_tokens.expand(len(part), -1), ids.to(host.device)], 1)
        seen: list[Tensor] = []
        logits = host.logits(whole, edits=[(hook, lambda x, at, seen=seen: seen.append(x))], last=width + 1)
        logp = logits[:, :-1].float().log_softmax(-1).gather(2, ids.to(host.device)[..., None])[..., 0].cpu()
        perplexities += ((-logp * real).sum(1) / real.sum(1)).exp().tolist()
        acts = sae.encode(seen[0][:, -width:].float().cpu())[..., features] * real[..., None]
        maxima.append(acts.amax(1))
    return {"tokens": tokens, "perplexity": perplexities, "maxima": torch.cat(maxima).tolist()}


# ---- success -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer and what was read back from it; `fires` [50] by feature."""

    text: str
    words: frozenset[str]
    tokens: frozenset[int]
    fluency: float
    fires: list[bool]


def answers_of(texts: list[list[str]], read: list[dict[str, Any]], usual: float, most: list[float]) -> list[Any]:
    """[i][question] Answers from texts [i][question] and what was read back, by question."""
    return [
        [
            Answer(
                text,
                frozenset(words_of(text)),
                frozenset(read[q]["tokens"][i]),
                fluency(text, read[q]["perplexity"][i], usual),
                [act >= FIRES * m for act, m in zip(read[q]["maxima"][i], most, strict=True)],
            )
            for q, text in enumerate(row)
        ]
        for i, row in enumerate(texts)
    ]


def success(
    by_strength: dict[float, list[list[Answer]]], unsteered: list[Answer], i: int, hit: Callable[[Answer], bool]
) -> tuple[float, float, Answer]:
    """(success, strength, an answer there) of feature i, where `hit` says whether an answer shows the concept."""

    def mean(answers: list[Answer]) -> float:
        return sum(hit(a) * a.fluency for a in answers) / len(answers)

    base = mean(unsteered)
    scores = {times: max(0.0, mean(answers[i]) - base) for times, answers in by_strength.items()}
    times = max(scores, key=lambda t: (scores[t], -t))
    return scores[times], times, max(by_strength[times][i], key=lambda a: (hit(a) * a.fluency, a.fluency))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("index")
    parser.add_argument("--out", required=True, type=Path, help="folder for the answers and figures")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw of features; the report has 0 and 1")
    parser.add_argument("--pool", nargs="*", type=Path, default=[], help="folders of other draws, for rho over all")
    parser.add_argument("--only", choices=("choose", "answer", "read"), help="stop after this part")
    options = parser.parse_args()
    sae, index = SAE.load(options.checkpoint), Index.open(options.index)
    index.check(sae)
    hook, out = index.facts.hook, options.out
    host = Host.load(index.facts.host)

    def choosing() -> Any:
        chosen, counts = choose(host, sae, index, options.seed)
        return {"counts": counts, "chosen": [asdict(one) for one in chosen]}

    made = kept(out / "chosen.json", choosing)
    chosen = [Chosen(**one) for one in made["chosen"]]
    print(made["counts"], Counter(one.fifth for one in chosen))
    if options.only == "choose":
        return
    texts: dict[float, list[list[str]]] = {
        0.0: kept(
            out / "answers-0.json", lambda: [answer(host, list(QUESTIONS), seed) for seed in range(UNSTEERED_SEEDS)]
        )
    }
    for times in STRENGTHS:
        path = out / f"answers-{times:g}.json"
        texts[times] = kept(path, lambda times=times: steered(host, sae, hook, chosen, times))
    if options.only == "answer":
        return
    features, most = [one.feature for one in chosen], [one.max_act for one in chosen]
    read = {
        times: kept(
            out / f"read-{times:g}.json",
            lambda rows=rows: [
                read_back(host, sae, hook, question, [row[q] for row in rows], features)
                for q, question in enumerate(QUESTIONS)
            ],
        )
        for times, rows in texts.items()
    }
    if options.only == "read":
        return
    usual = float(torch.tensor([p for part in read[0.0] for p in part["perplexity"]]).quantile(0.95))
    answers = {times: answers_of(rows, read[times], usual, most) for times, rows in texts.items()}
    unsteered = [one for row in answers.pop(0.0) for one in row]
    report(chosen, answers, unsteered, usual, out)
    if options.pool:
        pool([*options.pool, out])


def report(
    chosen: list[Chosen], answers: dict[float, list[list[Answer]]], unsteered: list[Answer], usual: float, out: Path
) -> None:
    """Print tables as Markdown and write results.json."""
    n = len(chosen)

    def best(i: int, hit: Callable[[Answer], bool]) -> tuple[float, float, Answer]:
        return success(answers, unsteered, i, hit)

    def holding(words: Sequence[str]) -> Callable[[Answer], bool]:
        return lambda answer: not answer.words.isdisjoint(words)

    def halves(hit: Callable[[int], Callable[[Answer], bool]]) -> dict[str, float]:
        """Rho between success on one half of the questions and on the other: what noise leaves of an order."""
        one, other = (
            [success({t: [row[half] for row in rows] for t, rows in answers.items()}, unsteered, i, hit(i))[0]
             for i in range(n)]
            for half in (slice(0, 3), slice(3, 6))
        )  # fmt: skip
        return rho(one, other)

    by_words = [best(i, holding(one.words)) for i, one in enumerate(chosen)]
    by_reading = [best(i, lambda answer, i=i: answer.fires[i]) for i in range(n)]
    by_lens = [best(i, lambda a, top=one.lens_tokens: not a.tokens.isdisjoint(top)) for i, one in enumerate(chosen)]
    # Another feature's words: those of the feature half the list further, so of another fifth.
    floor = [best(i, holding(chosen[(i + n // 2) % n].words))[0] for i in range(n)]
    successes = {
        "words (primary)": [s for s, _, _ in by_words],
        "read back": [s for s, _, _ in by_reading],
        "lens tokens (circular)": [s for s, _, _ in by_lens],
        "another feature's words (floor)": floor,
    }
    quantities = {
        "output score, 5 × own maximum": [one.output_score for one in chosen],
        "output score, 10 × strongest": [one.strongest_score for one in chosen],
        "input score": [one.input_score for one in chosen],
        "density": [one.density for one in chosen],
        "recorded maximum": [one.max_act for one in chosen],
    }
    rhos = [
        {"quantity": name, **{what: rho(values, found) for what, found in successes.items()}}
        for name, values in quantities.items()
    ]
    rhos.append(
        {
            "quantity": "success by words",
            **{what: rho(successes["words (primary)"], s) for what, s in successes.items()},
        }
    )
    fifths = []
    for fifth in range(FIFTHS):
        own = [i for i, one in enumerate(chosen) if one.fifth == fifth]
        scores = [chosen[i].output_score for i in own]
        row: dict[str, Any] = {"fifth": fifth + 1, "output scores": f"{min(scores):.2g} to {max(scores):.2g}"}
        fifths.append(row | {what: sum(values[i] for i in own) / len(own) for what, values in successes.items()})
    strengths = []
    for times, rows in answers.items():
        alone = [success({times: rows}, unsteered, i, holding(one.words))[0] for i, one in enumerate(chosen)]
        fluent = [sum(a.fluency for a in row) / len(row) for row in rows]
        said = [sum(map(holding(one.words), row)) / len(row) for one, row in zip(chosen, rows, strict=True)]
        by_fifth = [[i for i, one in enumerate(chosen) if one.fifth == fifth] for fifth in range(FIFTHS)]
        strengths.append(
            {
                "strength": f"{times:g}x",
                "fluency": sum(fluent) / n,
                "by fifth": " ".join(f"{sum(fluent[i] for i in own) / len(own):.2f}" for own in by_fifth),
                "answers with a concept word": sum(said) / n,
                "by fifth ": " ".join(f"{sum(said[i] for i in own) / len(own):.2f}" for own in by_fifth),
                "features with success": sum(s > 0 for s in alone),
                "rho at this strength": rho(quantities["output score, 5 × own maximum"], alone),
            }
        )
    features = [
        {
            "feature": one.feature,
            "fifth": one.fifth + 1,
            "concept words": ", ".join(one.words),
            "output score": f"{one.output_score:.2g}",
            "success": by_words[i][0],
            "at": f"{by_words[i][1]:g}x" if by_words[i][0] else "–",
            "read back": by_reading[i][0],
            "lens tokens": by_lens[i][0],
            "an answer there": table.clean(by_words[i][2].text).replace("|", "/")[:70],
        }
        for i, one in enumerate(chosen)
    ]
    facts = {
        "usual perplexity": usual,
        "unsteered fluency": sum(a.fluency for a in unsteered) / len(unsteered),
        "features with success by words": sum(s > 0 for s in successes["words (primary)"]),
        "of them by another feature's words": sum(s > 0 for s in floor),
        "read back": sum(s > 0 for s in successes["read back"]),
        "questions 1 to 3 against 4 to 6, words": halves(lambda i: holding(chosen[i].words)),
        "questions 1 to 3 against 4 to 6, read back": halves(lambda i: lambda answer: answer.fires[i]),
    }
    for rows in (rhos, fifths, strengths, features):
        print("\n" + markdown(rows))
    print(facts)
    files.write_json(
        out / "results.json",
        {"facts": facts, "rho": rhos, "fifths": fifths, "strengths": strengths, "features": features,
         "chosen": [one.feature for one in chosen], "quantities": quantities, "successes": successes},
    )  # fmt: skip


def pool(folders: Sequence[Path]) -> None:
    """The table of rho over the features of several draws; one drawn twice counts as first drawn."""
    quantities: dict[str, list[float]] = defaultdict(list)
    successes: dict[str, list[float]] = defaultdict(list)
    seen: set[int] = set()
    for folder in folders:
        found = files.read_json(folder / "results.json")
        new = [i for i, feature in enumerate(found["chosen"]) if feature not in seen]
        seen |= set(found["chosen"])
        for columns, of in ((quantities, "quantities"), (successes, "successes")):
            for name, values in found[of].items():
                columns[name] += [values[i] for i in new]
    print(f"{len(seen)} features\n\n" + markdown(rho_table(quantities, successes)))


def rho_table(quantities: dict[str, list[float]], successes: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"quantity": name, **{what: rho(values, found) for what, found in successes.items()}}
        for name, values in {**quantities, "success by words": successes["words (primary)"]}.items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['value']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"output_score: {error}")
