"""The whole path in front of the user, on the bundled model: harvest, train, evaluate, find, steer.

Everything is real: SmolLM2-135M-Instruct, text that it wrote, an SAE trained here and now, a feature that is searched
and chosen by figures. Minutes on two cores. What it makes stays in its folder, so it can be stopped and run again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae import files
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.evaluation import core
from sae.features.rows import FeatureList, Found
from sae.host import Host
from sae.recipe import (
    ActivationsRecipe,
    EvaluationRecipe,
    Recipe,
    SAERecipe,
    TextRecipe,
    TrainingRecipe,
)
from sae.run import evaluate, find, harvest, index, train
from sae.steering import steer
from sae.token_rows import open_host
from sae.training import checkpoint

CONCEPT, QUESTION = "Golden Gate Bridge", "What is your physical form?"
SHIPPED = Path(__file__).parents[1] / "checkpoints" / "smollm2-golden-gate"  # not there where the library is installed
# Strengths tried on the question, weakest first, with each of the best features: the first answer that speaks of the
# bridge is shown.
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
LEXICON = ("golden gate", "bridge")


def demo(out: str | Path = "runs/demo", say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run it, telling `say` what happens; returns fvu, feature, strength, plain, steered, shipped (dial and answer of
    the SAE in checkpoints/, None where that is not there) and seconds by stage."""
    out = Path(out)
    recipe = demo_recipe(out)
    clock = _Clock()
    say(f"1/6  Load the language model: {recipe.host.name}")
    host = open_host(recipe.host)
    clock("load")
    say(f"2/6  Harvest: read {recipe.host.hook} of {host.name} over text that it wrote itself")
    store = harvest(recipe, host=host)
    clock("harvest")
    say(f"3/6  Train: {recipe.sae.d_sae:,} features, {recipe.sae.k} active a token, {recipe.training.tokens:,} tokens")
    sae = _trained(recipe, host)
    clock("train")
    say("4/6  Evaluate on held-out text")
    report = evaluate(sae, host=host, tokens=10_000, ce_tokens=5_000)
    figures = core.headline(report)
    say(_figures(figures))
    clock("evaluate")
    say(f"5/6  Find: index where every feature fires, then look for '{CONCEPT}'")
    index(out / "sae", host=host, store=store.path, scores=False)
    found = find(out / "sae", CONCEPT, goal="steer", n=5, host=host)
    for one in found[:3]:
        say(_found(one))
    clock("find")
    say(f"6/6  Steer: ask '{QUESTION}', then clamp the feature")
    result = _steered(host, sae, found)
    shipped = _of_shipped(host)
    clock("steer")
    say(
        f"\nplain    > {result['plain']}\n\n"
        f"steered  > {result['steered']}   [{result['feature']}={result['strength']}]\n"
    )
    if shipped:
        say(f"shipped  > {shipped['answer']}   [{SHIPPED.name}, trained longer: {shipped['dial']}]\n")
    say(
        "Try next:\n"
        f"  sae find {out / 'sae'} 'San Francisco'\n"
        f"  sae show {out / 'sae'} {result['feature']}\n"
        f"  sae steer {out / 'sae'} {result['feature']}={result['strength']} 'What did you do today?'"
    )
    return {
        "fvu": figures["fvu"]["value"],
        "evaluation": figures,
        **result,
        "shipped": shipped,
        "seconds": clock.stages,
        "tokens_harvested": store.n_rows,
    }


def demo_recipe(out: Path) -> Recipe:
    """Small enough for two slow cores: half of the bundled corpus, a quarter of the training."""
    return Recipe(
        text=TextRecipe(max_tokens=112_000),
        activations=ActivationsRecipe(store=str(out / "acts")),
        sae=SAERecipe(d_sae=4096, k=16),
        training=TrainingRecipe(tokens=1_000_000, save_every=30.0),
        evaluation=EvaluationRecipe(tokens=0),  # evaluation is a stage of its own
        out=str(out),
    )


def _trained(recipe: Recipe, host: Host) -> SAE:
    """Train, go on with an interrupted run, or open a finished one."""
    folder = Path(recipe.out)
    if (folder / "sae" / "cfg.json").exists():
        return SAE.load(folder / "sae")
    return train(recipe, host=host, resume=bool(checkpoint.all_of(folder)))


def _steered(host: Host, sae: SAE, found: FeatureList) -> dict[str, Any]:
    """The plain answer and a steered one: the weakest that speaks of the concept, over the best features."""
    if not found:
        raise UserError(f"demo: no feature detects '{CONCEPT}'. Delete the folder and run the demo again.")
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40}
    plain = host.generate(QUESTION, **sampling)
    tried = []
    for strength in STRENGTHS:
        for one in found[:3]:
            with steer(host, sae, {one.feature: f"{strength:g}x"}):
                answer = host.generate(QUESTION, **sampling)
            tried.append({"feature": one.feature, "strength": f"{strength:g}x", "plain": plain, "steered": answer})
            if _speaks(answer):
                return tried[-1]
    return tried[0]


def _of_shipped(host: Host) -> dict[str, Any] | None:
    """What the SAE in checkpoints/ has the model answer, with the dial that its measured table gives the bridge."""
    path = SHIPPED / "dials.json"  # not there after `make sae` on another kind of machine: other bits, other dials
    if not path.exists():
        return None
    row = next((row for row in files.read_json(path)["dials"] if CONCEPT in row["concept"]), None)
    if row is None:
        return None
    strength = f"{row['times']:.2f}x"
    with steer(host, SAE.load(SHIPPED), {row["feature"]: strength}):
        answer = host.generate(QUESTION, temperature=0, max_new_tokens=40)
    return {"dial": f"{row['feature']}={strength}", "answer": answer}


def _speaks(answer: str) -> bool:
    """Whether a fluent answer is of the bridge: names it, and does not go in circles."""
    words = answer.lower().split()
    distinct = len({tuple(words[i : i + 3]) for i in range(len(words) - 2)}) / max(1, len(words) - 2)
    return any(name in answer.lower() for name in LEXICON) and distinct > 0.6


def _figures(figures: dict[str, Any]) -> str:
    shown = {
        "fvu": "FVU",
        "l0": "L0",
        "dead_frac": "dead",
        "ce_delta": "ΔCE (nats)",
        "recovered_mean": "CE recovered (mean ablation)",
        "recovered_zero": "CE recovered (zero ablation)",
        "kl": "KL",
    }
    lines = []
    for key, name in shown.items():
        figure = figures.get(key)
        if figure and figure.get("value") is not None:
            low, high = figure.get("low"), figure.get("high")
            interval = f"  [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
            lines.append(f"       {name:<30}{figure['value']:.3g}{interval}")
    return "\n".join(lines)


def _found(one: Found) -> str:
    writes = "" if one.tried is None else f" · writes {one.tried:.2f} at {one.strength:g}x"
    lines = [
        f"     feature {one.feature}: AUROC {one.auroc:.2f} · density {one.density:.2%} · max {one.max_act:.0f}{writes}"
    ]
    return "\n".join([*lines, *(f"       {example.marked()}" for example in one.examples[:2])])


class _Clock:
    """Seconds a stage."""

    def __init__(self):
        self.stages: dict[str, float] = {}
        self.last = time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[stage] = round(now - self.last, 1)
        self.last = now
