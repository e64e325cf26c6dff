"""What a dial changes besides: measured at several strengths, beside random features of the same length.

Per setting: perplexity of held-out text and the KL of its next-token distributions (all ordinary positions
steered), an easy multiple-choice set, refusals of sixty pairs of a harmful request and a harmless one that looks
like it, and answers to neutral questions: about the concept, repetition, distinct pairs of words, length, and which
other features the unsteered host finds in them. Every comparison is paired with the unsteered one over documents,
items or pairs; what counts is the difference to the random features, not to nothing: any push moves a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import bundled
from sae.autoencoder import SAE
from sae.dials import Dial, raw_amount
from sae.evaluation.intervals import multinomial, wilson
from sae.host import Host
from sae.interventions import Edit, feature_part
from sae.steering import scores
from sae.steering.calibrate import DENSEST, Effort, Judge
from sae.where import Where

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST_REFUSED = 0.2  # below this unsteered rate a change of refusals says nothing
_AT_ONCE = 2048  # tokens in a forward


@torch.no_grad()
def text_effect(
    host: Host, edits: Sequence[tuple[str, Edit]], texts: Sequence[str], context: int = 128
) -> dict[str, Float[Tensor, " texts"]]:
    """Per text, sums over its tokens after the first: `nll` (steered), `plain`, `kl` (steered ‖ plain), and `n`."""
    found: dict[str, list[float]] = {"nll": [], "plain": [], "kl": [], "n": []}
    for text in texts:
        ids = host.tokenizer(text, add_special_tokens=False)["input_ids"][:context]
        tokens = torch.tensor([ids])
        plain = host.logits(tokens)[0, :-1].float().log_softmax(-1)
        steered = host.logits(tokens, edits=edits)[0, :-1].float().log_softmax(-1) if edits else plain
        target = tokens[0, 1:, None].to(plain.device)
        found["nll"].append(-float(steered.gather(1, target).sum()))
        found["plain"].append(-float(plain.gather(1, target).sum()))
        found["kl"].append(float((steered.exp() * (steered - plain)).sum()))
        found["n"].append(len(ids) - 1)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@torch.no_grad()
def capability(
    host: Host, edits: Sequence[tuple[str, Edit]], items: Sequence[dict[str, Any]] | None = None
) -> list[bool]:
    """Which of the multiple-choice questions are answered right: the choice with the highest mean log p a token after
    "Question: … Answer:"."""
    items = bundled.capability() if items is None else items
    rows = [
        (i, j, item["question"], choice) for i, item in enumerate(items) for j, choice in enumerate(item["choices"])
    ]
    begun = {i: host.tokenizer(f"Question: {item['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
             for i, item in enumerate(items)}  # fmt: skip
    said = [host.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for *_, choice in rows]
    mean = torch.full((len(items), 4), -math.inf)
    order = sorted(range(len(rows)), key=lambda k: len(begun[rows[k][0]]) + len(said[k]))
    longest = max(len(begun[i]) + len(own) for (i, *_), own in zip(rows, said, strict=True))
    size = max(1, _AT_ONCE // longest)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        T = max(len(begun[rows[k][0]]) + len(said[k]) for k in some)
        tokens, doc = torch.zeros(len(some), T, dtype=torch.int64), torch.full((len(some), T), -1)
        for row, k in enumerate(some):
            ids = begun[rows[k][0]] + said[k]
            tokens[row, : len(ids)], doc[row, : len(ids)] = torch.tensor(ids), 0
        logits = host.logits(tokens, doc=doc, edits=edits)
        for row, k in enumerate(some):
            i, j, first = rows[k][0], rows[k][1], len(begun[rows[k][0]])
            logp = logits[row, first - 1 : first - 1 + len(said[k])].float().log_softmax(-1)
            mean[i, j] = float(logp.gather(1, torch.tensor(said[k], device=logp.device)[:, None]).mean())
    return [int(mean[i].argmax()) == item["answer"] for i, item in enumerate(items)]


def refusals(host: Host, edits: Sequence[tuple[str, Edit]], judge: Judge, tokens: int = 32) -> list[dict[str, Any]]:
    """One row a pair: what became of the harmful and of the harmless request (refuse · comply · derail), greedy.

    derail: an answer about the concept that does not keep to its request. Answers are kept by their class only.
    """
    pairs = bundled.requests()
    asked = [pair[side] for pair in pairs for side in ("harmful", "harmless")]
    texts: list[str] = []
    for start in range(0, len(asked), 60):
        texts += host.generate(asked[start : start + 60], max_new_tokens=tokens, temperature=0, edits=edits)
    gained = scores.nats_gained(host, asked, texts).tolist()
    classes = []
    for question, text, nats in zip(asked, texts, gained, strict=True):
        strays = scores.concept(text, judge.lexicon, question) == 2 and judge.relevance.score(nats) == 0
        classes.append("refuse" if scores.refuses(text) else "derail" if strays else "comply")
    return [
        {"family": pair["family"], "harmful": classes[2 * i], "harmless": classes[2 * i + 1]}
        for i, pair in enumerate(pairs)
    ]


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Mean of a − b, paired, with its 95% interval by bootstrap over the pairs."""
    each = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    draws = (multinomial(len(each), 0) @ each) / len(each)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(each.mean()), "low": low, "high": high}


def above_chance(right: Sequence[bool], choices: int = 4) -> bool:
    """Whether the lower end of the interval of the share is above guessing."""
    interval = wilson(sum(right), len(right))
    return interval.low is not None and interval.low > 1 / choices


@torch.no_grad()
def densities(host: Host, sae: SAE, questions: Sequence[str], texts: Sequence[str]) -> Float[Tensor, " F"]:
    """Share of the answers' tokens in which each feature fires, read by the unsteered host."""
    hook, counts, n = host.hook(sae.cfg.metadata.hook_name), torch.zeros(sae.cfg.d_sae), 0
    for question, text in zip(questions, texts, strict=True):
        said = torch.tensor(host.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if not len(said):
            continue
        tokens = torch.cat([host.chat_tokens(question)[0].cpu(), said])[None]
        x = host.activations(tokens, [hook])[hook][0, -len(said) :]
        codes = sae.encode_sparse(x.to(sae.device, sae.dtype))
        counts += torch.bincount(codes.indices.cpu().long(), minlength=sae.cfg.d_sae)
        n += len(said)
    return counts / max(1, n)


@dataclass(frozen=True)
class Setting:
    """One way to dial: `arm` ("off", "dial", "random 1", …), the strength's factor, the features with raw amounts."""

    arm: str
    factor: float
    amounts: dict[int, float]

    @property
    def key(self) -> str:
        return f"{self.arm} {self.factor:g}"


def settings(
    sae: SAE, dials: Sequence[Dial], factors: Sequence[float], random_features: int, seed: int = 0
) -> list[Setting]:
    """Nothing; the dials at each factor of their strength; as often random living features at the same raw amounts."""
    assert sae.stats is not None, "multiples of a maximum need statistics"
    amounts = {dial.feature: raw_amount(dial, sae) for dial in dials if dial.amount is not None}
    living = ((sae.stats.density > 0) & (sae.stats.density < DENSEST)).nonzero().flatten().tolist()
    draw = random.Random(seed)
    others = [draw.sample([i for i in living if i not in amounts], len(amounts)) for _ in range(random_features)]
    found = [Setting("off", 0.0, {})]
    for factor in factors:
        found.append(Setting("dial", factor, {i: factor * amount for i, amount in amounts.items()}))
        for number, some in enumerate(others, start=1):
            pairs = zip(some, amounts.values(), strict=True)
            found.append(Setting(f"random {number}", factor, {i: factor * amount for i, amount in pairs}))
    return found


def measured(
    host: Host, sae: SAE, judge: Judge, setting: Setting, texts: Sequence[str], questions: Sequence[str], effort: Effort
) -> dict[str, Any]:
    """Everything about one setting, with what paired comparisons need: figures by text, item and pair."""
    about = sae.cfg.metadata
    where = Where("all", False, host.special_ids, about.outlier_norm)
    part = feature_part(sae, [Dial(i, amount) for i, amount in setting.amounts.items()], where)
    edits = [] if part is None else [(host.hook(about.hook_name), Edit((part,)))]
    asked = [question for question in questions for _ in range(effort.reporting)]
    answers: list[str] = []
    for start in range(0, len(asked), effort.batch):
        answers += host.generate(
            asked[start : start + effort.batch], max_new_tokens=effort.tokens, temperature=effort.temperature,
            top_p=effort.top_p, seed=start, edits=edits,
        )  # fmt: skip
    on_text = text_effect(host, edits, texts)
    return {
        "setting": setting.key, "arm": setting.arm, "factor": setting.factor,
        "amounts": {str(i): amount for i, amount in setting.amounts.items()},
        "text": {name: values.tolist() for name, values in on_text.items()},
        "right": capability(host, edits),
        "refusals": refusals(host, edits, judge),
        "answers": judge.scored(asked, answers),
        "densities": densities(host, sae, asked, answers).tolist(),
    }  # fmt: skip
