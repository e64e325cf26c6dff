"""Ways to steer, side by side: features of an SAE against prompting, fine-tuning, difference of means and PCA.

    python -m experiments.baselines checkpoints/smollm2-golden-gate --json runs/baselines.json

Eight of the concepts whose dials the card tried. Every method answers ten choosing questions at six strengths (32
tokens, temperature 0.7, top_p 0.9). The strength with the highest mean score (AxBench's harmonic mean of concept,
instruction and fluency, each 0 to 2, by the rules of sae/steering/scores.py; repetition below a fifth) answers the
first twenty reporting questions, two samples each.
Texts that make a direction, an adapter or a contrast are passages of
the bundled corpus's training part (forty.py). Strengths of features and directions are shares of the residual's norm.

| method | what |
|---|---|
| prompt | a system prompt that asks for the concept in every answer; one strength |
| prompt, as it | "You are …", where the concept can be somebody; one strength |
| fine-tuning | LoRA (rank 8, queries and values) on the passages as text; strength is its scale; the bridge alone |
| difference of means, PCA | added; PCA of the differences of passages with and without it (RepE) |
| contrast | the feature with the best AUROC on the passages |
| contrast, output score | the best AUROC among the thirty best that are in the upper quarter of their output scores |
| tried | our pick: some fifty candidates answered three choosing questions, the best six five (the card's dials.json) |
| set of three | the pick and the two next by contrast whose decoder rows are unlike, weighted by mean difference |

`--judge URL` has an OpenAI-compatible server rate the reported answers too (`--judge-model`, key in OPENAI_API_KEY).
Cells are kept in the JSON as they end; the same command goes on. `--summary experiments/baselines.json` writes them
without the answers' texts; given as `--json` it prints the tables and asks nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments import forty
from experiments.dial import TRIED
from experiments.forty import Concept, Passages
from sae import SAE, Host, bundled, files, table
from sae.errors import UserError
from sae.features.lens import output_scores
from sae.features.pool import DocumentMaxima, document_maxima
from sae.steering import calibrate, directions
from sae.steering.calibrate import Arm, Effort, Judge
from sae.steering.effects import difference
from sae.steering.judge import Server, rated
from sae.where import Where

SHARES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.7)
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of an adapter
EFFORT = Effort(choosing=1, reporting=2, tokens=32, batch=120)
QUESTIONS = {"choosing": bundled.questions()["choosing"][:10], "reporting": bundled.questions()["reporting"][:20]}
PICK, MEANS = "tried", "difference of means"
CONCEPTS = tuple(name for name in TRIED if name not in ("a scam email", "chess"))
FINE_TUNED = ("the Golden Gate Bridge",)  # some four minutes each
PERSONS = ("the Golden Gate Bridge", "San Francisco", "the Eiffel Tower")
METHODS = (
    "unsteered", "prompt", "prompt, as it", MEANS, "PCA", "contrast", "contrast, output score", PICK, "set of three",
    "fine-tuning",
)  # fmt: skip
ALIKE = 0.7  # decoder cosine from which on two features are one


def methods_of(concept: str) -> list[str]:
    """What a concept is tried by."""
    only = {"prompt, as it": PERSONS, "fine-tuning": FINE_TUNED, PICK: TRIED}
    return [method for method in METHODS if concept in only.get(method, (concept,))]


def prompted(concept: Concept, method: str) -> str:
    """The system prompt."""
    if method == "prompt, as it":
        return f"You are {concept.name}. Whatever you are asked, you answer as {concept.name}."
    return f"Whatever you are asked, you talk about {concept.name} in every answer."


def features_of(
    sae: SAE, host: Host, hook: str, which: Passages, maxima: DocumentMaxima, concept: Concept, pick: int | None
) -> dict[str, dict[int, float]]:
    """Features with weights, by method."""
    found = forty.contrasted(which, maxima, concept, reporting=False)[0]
    order = forty.chosen(found, sae, 30)
    said = output_scores(host, sae, order, hook).score
    loud = [feature for feature, score in zip(order, said, strict=True) if score >= said.quantile(0.75)]
    methods = {"contrast": {order[0]: 1.0}, "contrast, output score": {loud[0]: 1.0}}
    first = order[0] if pick is None else pick
    if pick is not None:
        methods[PICK] = {pick: 1.0}
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)
    three = [first]
    for feature in order:
        if len(three) < 3 and all(float(rows[feature] @ rows[other]) < ALIKE for other in three):
            three.append(feature)
    weights = {feature: max(float(found.difference[feature]), 0.0) for feature in three}
    weights[first] = max(weights[first], max(weights.values()))  # the pick leads
    return {**methods, "set of three": weights}


def asked(
    host: Host, sae: SAE, hook: str, arms: Sequence[Arm], half: str, system: str | None = None
) -> Iterator[tuple[Arm, list[str], list[str]]]:
    """Each arm's questions and answers; a system prompt goes without arms' edits."""
    where = Where("all", False, host.special_ids, sae.cfg.metadata.outlier_norm)
    if system is None:
        yield from calibrate.answers(host, sae, hook, where, arms, QUESTIONS[half], EFFORT)
        return
    for arm in arms:
        questions = [question for question in QUESTIONS[half] for _ in range(arm.samples)]
        yield arm, questions, host.generate(
            questions, system=system, max_new_tokens=EFFORT.tokens, temperature=EFFORT.temperature, top_p=EFFORT.top_p,
            seed=len(half),
        )  # fmt: skip


def cells_of(judge: Judge, sae: SAE, hook: str, arms: Sequence[Arm], system: str | None = None) -> list[dict[str, Any]]:
    """The method's strengths on the choosing questions, and the best of them on the reporting ones."""
    found = []

    def scored(some: Sequence[Arm], half: str) -> None:
        for arm, questions, texts in asked(judge.host, sae, hook, some, half, system):
            rows = judge.scored(questions, texts)
            found.append({"half": half, "arm": arm.name, "amount": arm.amount,
                          **calibrate.summary(rows, len(QUESTIONS[half])), "answers": rows})  # fmt: skip

    scored(arms, "choosing")
    best = calibrate.chosen(found)["arm"]
    scored([replace(arm, samples=EFFORT.reporting) for arm in arms if arm.name == best], "reporting")
    return found


def adapted(host: Host, texts: Sequence[str], epochs: int = 4, rate: float = 1e-3) -> Any:
    """A peft model over the host's weights, trained on the texts as they are; `unload()` gives the weights back."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(host.model, config)
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
    for _ in range(epochs):
        for start in range(0, len(texts), 4):
            rows = host.tokenizer(
                list(texts[start : start + 4]), return_tensors="pt", padding=True, truncation=True, max_length=128,
                padding_side="right",
            )  # fmt: skip
            labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
            model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def by_fine_tuning(judge: Judge, sae: SAE, hook: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Cells of an adapter at its scales. The judge's host is as before afterwards."""
    plain = Host.load(judge.host.name, dtype=torch.float32)
    model = adapted(plain, texts)
    layers = [layer for layer in model.modules() if hasattr(layer, "scaling") and hasattr(layer, "lora_A")]
    found: list[dict[str, Any]] = []

    def scored(scale: float, half: str, samples: int) -> None:
        for layer in layers:
            layer.scaling["default"] = 2.0 * scale  # lora_alpha / r
        host = Host.from_model(model, plain.tokenizer, judge.host.name)
        for arm, questions, texts in asked(host, sae, hook, [Arm(f"{scale:g}", scale, samples)], half):
            rows = judge.scored(questions, texts)
            found.append({"half": half, "arm": arm.name, "amount": scale,
                          **calibrate.summary(rows, len(QUESTIONS[half])), "answers": rows})  # fmt: skip

    for scale in SCALES:
        scored(scale, "choosing", EFFORT.choosing)
    scored(calibrate.chosen(found)["amount"], "reporting", EFFORT.reporting)
    return found


def rows_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: means over the concepts that it has, and the paired difference to difference of means."""
    reported = {(cell["of"], cell["method"]): cell for cell in cells if cell["half"] == "reporting"}
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        names = [name for name, kind in reported if kind == method and (name, MEANS) in reported]
        if not names:
            continue
        own = [reported[name, method] for name in names]
        row: dict[str, Any] = {"method": method, "concepts": len(names)}
        for key in ("overall", "concept", "instruct", "fluency", "about", "speaks as", "repetition"):
            row[key] = sum(cell[key]["value"] for cell in own) / len(own)
        pairs = [[_mean_score(reported[name, kind]) for name in names] for kind in (method, MEANS)]
        row["over concepts, against means"] = difference(*pairs)
        questions = [_by_question(reported, names, kind) for kind in (method, MEANS)]
        row["over questions"] = difference(*questions)
        judged = [cell["judged"]["overall"] for cell in own if "judged" in cell]
        if judged:
            row["judged overall"] = sum(judged) / len(judged)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["overall"])


def _mean_score(cell: dict[str, Any]) -> float:
    return cell["overall"]["value"]


def _by_question(reported: dict[tuple[str, str], dict[str, Any]], names: Sequence[str], method: str) -> list[float]:
    """Per reporting question the mean over concepts and samples."""
    found = []
    for question in QUESTIONS["reporting"]:
        each = [row["overall"] for name in names for row in reported[name, method]["answers"]
                if row["question"] == question]  # fmt: skip
        found.append(sum(each) / len(each))
    return found


def by_concept(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a concept: every method's reported score, the pick and difference of means with intervals."""
    rows = []
    for name in dict.fromkeys(cell["of"] for cell in cells):
        row: dict[str, Any] = {"concept": name}
        for cell in cells:
            if cell["of"] == name and cell["half"] == "reporting":
                row[cell["method"]] = cell["overall"] if cell["method"] in (PICK, MEANS) else _mean_score(cell)
        rows.append(row)
    return rows


def measured(
    sae: SAE,
    judge: Judge,
    which: Passages,
    maxima: DocumentMaxima,
    sums: forty.Sums,
    concept: Concept,
    pick: int | None,
    done: set[str],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(method, cells) for every method that is not `done`."""  # fmt: skip
    host, hook = judge.host, judge.host.hook(sae.cfg.metadata.hook_name)
    own, others = which.of(concept, reporting=False)
    texts = [which.documents[i].text for i in own]
    n = min(len(own), len(others))

    def strengths(**how: Any) -> list[Arm]:
        return [Arm(f"{share:g}", share * sums.norm, EFFORT.choosing, **how) for share in SHARES]

    if "unsteered" not in done:
        yield "unsteered", cells_of(judge, sae, hook, [Arm("0")])
    for method in ("prompt", "prompt, as it"):
        if method not in done and (method == "prompt" or concept.name in PERSONS):
            yield method, cells_of(judge, sae, hook, [Arm("1", 1.0)], prompted(concept, method))
    if MEANS not in done:
        yield MEANS, cells_of(judge, sae, hook, strengths(vector=forty.difference(which, sums, concept)))
    if "PCA" not in done:
        pairs = directions.pca_of_pairs(host, hook, texts[:n], [which.documents[i].text for i in others[:n]])
        yield "PCA", cells_of(judge, sae, hook, strengths(vector=pairs.vector))
    same: dict[tuple[tuple[int, float], ...], list[dict[str, Any]]] = {}  # ways that find one feature answer once
    for method, weights in features_of(sae, host, hook, which, maxima, concept, pick).items():
        if method not in done:
            key = tuple(weights.items())
            if key not in same:
                same[key] = cells_of(judge, sae, hook, strengths(features=calibrate.unit(sae, weights)))
            yield method, [cell | {"features": {str(i): weight for i, weight in weights.items()}} for cell in same[key]]
    if "fine-tuning" not in done and concept.name in FINE_TUNED:
        yield "fine-tuning", by_fine_tuning(judge, sae, hook, texts)


def added(folder: str, names: Sequence[str], cells: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The cells of each method that is not among `cells`, as they end."""
    sae = SAE.load(folder)
    about, by_name = sae.cfg.metadata, {concept.name: concept for concept in forty.concepts()}
    card = files.read_json(Path(folder) / "dials.json")["tried"]
    tried = {row["concept"]: row["finalists"][0]["feature"] for row in card}
    host, which = Host.load(about.model_name), forty.passages()
    some = list(forty.blocks(which, host, [about.hook_name], {about.hook_name: about.outlier_norm}))
    maxima = document_maxima(sae, some, len(which.documents), hook=about.hook_name)
    sums = forty.summed(some, about.hook_name, len(which.documents))
    judge, begun = Judge.of(host, by_name[names[0]].lexicon, EFFORT), time.perf_counter()
    for name in names:
        done = {cell["method"] for cell in cells if cell["of"] == name}
        own = replace(judge, lexicon=by_name[name].lexicon)
        for method, found in measured(sae, own, which, maxima, sums, by_name[name], tried.get(name), done):
            seconds = time.perf_counter() - begun
            print(f"{seconds:.0f} s  {name}: {method} at {found[-1]['arm']}: {_mean_score(found[-1]):.2f}", flush=True)
            yield [{"of": name, "method": method, **cell} for cell in found]


def without_texts(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with what the tables need: figures, and the reported answers' mean score by question."""
    answers = cell["answers"] if cell["half"] == "reporting" else []
    scores: dict[str, list[float]] = {}
    for row in answers:
        scores.setdefault(row["question"], []).append(row["overall"])
    kept = {key: value for key, value in cell.items() if key != "judged"}
    if "judged" in cell:
        kept["judged"] = {key: value for key, value in cell["judged"].items() if key != "each"}
    means = [{"question": question, "overall": sum(each) / len(each)} for question, each in scores.items()]
    return kept | {"answers": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae")
    parser.add_argument("--json", type=Path, required=True, help="cells are kept there")
    parser.add_argument("--concepts", default=",".join(CONCEPTS), help="names of forty.json, with commas")
    parser.add_argument("--summary", type=Path, help="write the cells there without texts")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", default="gpt-4o-mini")
    args = parser.parse_args()
    cells: list[dict[str, Any]] = files.read_json(args.json)["cells"] if args.json.exists() else []
    names = args.concepts.split(",")
    known = {(cell["of"], cell["method"]) for cell in cells}
    if any((name, method) not in known for name in names for method in methods_of(name)):
        print(f"{len(names)} concepts, some six minutes each; {len(known)} methods are known", flush=True)
        for new in added(args.sae, names, cells):
            cells += new
            files.write_json(args.json, {"sae": Path(args.sae).name, "cells": cells})
    if args.judge:
        server = Server.of(args.judge, args.judge_model)
        for cell in cells:
            if cell["half"] == "reporting" and "judged" not in cell:
                cell["judged"] = rated(server, cell["of"], cell["answers"])
                files.write_json(args.json, {"sae": Path(args.sae).name, "cells": cells})
    if args.summary:
        files.write_json(args.summary, {"sae": Path(args.sae).name, "cells": [without_texts(cell) for cell in cells]})
    print(table.text(rows_of(cells)), "\n")
    print(table.text(by_concept(cells)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
