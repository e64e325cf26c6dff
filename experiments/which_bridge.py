"""Which bridge? A dial's feature against passages about other bridges, which the forty concepts do not hold.

    python -m experiments.which_bridge checkpoints/smollm2-golden-gate 2202

Bundled passages about the Golden Gate Bridge against those about five other bridges (also of the training part: this
asks what a feature means, not how well it was learnt). AUROC of the given features, and of the three that tell the two
apart best: chosen on one half of the passages, told on the other.
"""

import argparse
from collections.abc import Sequence

import torch

from experiments import forty
from sae import SAE, Host, table
from sae.documents import documents, hashed
from sae.features.contrast import Pair, Side, contrast
from sae.features.index import IndexedDocument
from sae.features.pool import document_maxima

OTHERS = ("the Brooklyn Bridge", "a wooden footbridge", "a suspension bridge", "the Sydney Harbour Bridge",
          "Tower Bridge in London")  # fmt: skip
OWN, EACH = "the Golden Gate Bridge", 80


def measured(sae: SAE, host: Host, features: Sequence[int]) -> list[dict]:
    """One row a feature."""
    some = sorted(documents("bundled"), key=lambda one: hashed("which bridge", one.text))
    own = [one for one in some if one.topic == OWN and "golden gate" in one.text.lower()][:EACH]
    others = [one for one in some if one.topic in OTHERS and "golden gate" not in one.text.lower()][:EACH]
    hook = sae.cfg.metadata.hook_name
    which = forty.Passages([*own, *others], 0)
    blocks = forty.blocks(which, host, [hook], {hook: sae.cfg.metadata.outlier_norm})
    maxima = document_maxima(sae, blocks, len(which.documents), hook=hook)
    halves = []
    for half in (0, 1):
        sides = []
        for rows in (range(half, len(own), 2), range(len(own) + half, len(which.documents), 2)):
            texts = [IndexedDocument(which.documents[i].text, group=which.documents[i].group) for i in rows]
            sides.append(Side(texts, maxima, torch.tensor(rows, dtype=torch.int64)))
        halves.append(contrast(Pair(*sides, maxima.n_features)))
    best = halves[0].auroc.topk(3).indices.tolist()
    return [
        {"feature": i, "chosen by": "hand" if i in features else "this contrast", "auroc": float(halves[1].auroc[i]),
         "choosing half": float(halves[0].auroc[i])}
        for i in [*features, *(i for i in best if i not in features)]
    ]  # fmt: skip


def told(sae: SAE, host: Host, feature: int) -> str:
    """One line about the feature and the best other."""
    own, best, *_ = measured(sae, host, [feature])
    return f"AUROC of {feature} there {own['auroc']:.2f}, of {best['feature']} {best['auroc']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("features", nargs="+", type=int)
    args = parser.parse_args()
    sae = SAE.load(args.sae)
    print(table.text(measured(sae, Host.load(sae.cfg.metadata.model_name), args.features)))


if __name__ == "__main__":
    main()
