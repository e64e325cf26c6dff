"""Known directions among trained rows are found, by texts and by their name (experiments/planted.py, eight of them)."""

from pathlib import Path

import pytest

from experiments.planted import OWN, firsts, ranks
from sae import SAE, files

ROOT = Path(__file__).parents[2]
N = 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planted_directions_are_first_by_texts_and_by_name(host):
    names = files.read_json(ROOT / "experiments" / "concepts.json")[0]["topics"][:N]
    found = ranks(SAE.load(ROOT / "checkpoints" / "smollm2-golden-gate"), host, names, passages=100)
    assert [one.concept for one in found] == [name for name in names for _ in range(2)]
    assert "of 8" in firsts(found)
    for one in found:
        assert one.auroc == pytest.approx(1, abs=1e-3), one
        # Trained rows near the direction are the concept's own, and may stand before it; others may not.
        assert one.among_others["raw"] == 1, one
        assert one.ranks["raw"] == 1 or one.winner_cosine >= OWN, one
