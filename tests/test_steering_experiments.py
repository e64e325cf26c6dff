"""What the steering experiments count, on cases whose answer is known."""

import pytest
import torch

from experiments import agreement, baselines
from experiments.dial_set import loosely_as
from sae.steering.scores import Lexicon


def test_kappa_is_one_for_equal_labels_zero_for_chance_and_weighs_far_misses_more():
    a = torch.tensor([0, 1, 2, 0, 1, 2])
    assert agreement.kappa(a, a, 3) == pytest.approx(1.0)
    both = torch.tensor([[i, j] for i in range(3) for j in range(3)])
    assert agreement.kappa(both[:, 0], both[:, 1], 3) == pytest.approx(0.0)
    near, far = torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 0])
    assert agreement.kappa(a, far, 3) < agreement.kappa(a, near, 3) < 1


def _cell(of, method, overall):
    questions = baselines.QUESTIONS["reporting"]
    figure = {"value": overall, "low": overall, "high": overall}
    names = ("overall", "concept", "instruct", "fluency", "about", "speaks as", "repetition")
    return {
        "of": of, "method": method, "half": "reporting", "arm": "0.3", **{name: figure for name in names},
        "answers": [{"question": question, "overall": overall, "answer": "x"} for question in questions],
    }  # fmt: skip


def test_methods_are_compared_on_the_concepts_that_both_have():
    cells = [_cell("a", "difference of means", 0.2), _cell("b", "difference of means", 0.4), _cell("a", "tried", 0.5),
             _cell("b", "tried", 0.7), _cell("a", "PCA", 0.1), _cell("c", "PCA", 2.0)]  # fmt: skip
    rows = {row["method"]: row for row in baselines.rows_of(cells)}
    assert rows["tried"]["over concepts, against means"]["value"] == pytest.approx(0.3)
    assert rows["tried"]["over questions"]["value"] == pytest.approx(0.3)
    assert rows["PCA"]["concepts"] == 1 and rows["PCA"]["overall"] == pytest.approx(0.1)
    assert baselines.rows_of([baselines.without_texts(cell) for cell in cells]) == baselines.rows_of(cells)
    assert [row["concept"] for row in baselines.by_concept(cells)] == ["a", "b", "c"]


def test_the_loose_pattern_takes_what_the_strict_rule_denies():
    lexicon = Lexicon(("bridge",), ("towers",))
    said = ["I am a climber on the old bridge.", "My two towers shine.", "The bridge is red.", "I am here. A bridge."]
    assert loosely_as([{"answer": text} for text in said], lexicon) == 0.5


def test_a_concept_has_the_methods_that_suit_it():
    assert "prompt, as it" in baselines.methods_of("the Golden Gate Bridge")
    assert "prompt, as it" not in baselines.methods_of("anger")
    assert "fine-tuning" not in baselines.methods_of("anger") and "PCA" in baselines.methods_of("anger")
