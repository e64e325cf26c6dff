"""The rules by which dials are chosen, counted and named (experiments/dial.py, ship.py, sweep.py)."""

import pytest

from experiments import dial, forty, ship, sweep
from sae.steering.scores import Lexicon

BRIDGE = forty.Concept("the Golden Gate Bridge", Lexicon(("golden gate", "bridge"), ("towers",)))


def answers(concept, fluency, texts=None):
    n = len(concept)
    return dial.Answers(texts or ["a bridge"] * n, concept, fluency, [False] * n, [0.0] * n)


def test_an_answer_is_about_a_concept_where_it_is_full_of_it_and_bearable():
    some = answers([2, 2, 1, 0], [1, 0, 2, 2])
    assert some.about == [True, False, False, False]
    assert some.rate == 0.25


def test_settings_are_ordered_by_answers_about_the_concept_then_by_their_fluency():
    plain, smooth, more = answers([2, 0], [1, 2]), answers([2, 0], [2, 2]), answers([2, 2], [1, 1])
    assert plain.order < smooth.order < more.order


def test_an_interval_holds_its_rate_and_repeated_samples_of_a_question_do_not_narrow_it():
    mixed = answers([2, 0, 2, 0, 2, 0, 2, 0] * 5, [1] * 40)
    alike = answers(([2] * 4 + [0] * 4) * 5, [1] * 40)  # the same rate, but a question's four samples agree
    by_mixed, by_alike = (dial.rates(some, BRIDGE, 10)["about"] for some in (mixed, alike))
    for found in (by_mixed, by_alike):
        assert found["low"] < found["value"] == 0.5 < found["high"]
    assert by_alike["low"] < by_mixed["low"]


def test_the_figures_of_a_dial_do_not_take_its_concept_s_place():
    assert not {"concept", "feature", "times", "amount", "share", "choosing"} & set(
        dial.rates(answers([2, 0], [1, 1]), BRIDGE, 2)
    )


def test_an_answer_names_the_golden_gate_only_where_it_does():
    texts = ["A bridge over a river.", "The Golden Gate opens.", "I am begolden gated.", "Bridges."]
    assert dial.rates(answers([2] * 4, [1] * 4, texts), BRIDGE, 2)["named"] == 0.25


def row(concept, feature, auroc):
    return forty.Row(concept, feature, 1.0, auroc, auroc, auroc, 1.0, 1.0, 0.01, 0.0)


def measured(dials=(), tried=()):
    return {
        "dials": [{"concept": name, "feature": f, "about": {"value": about}} for name, f, about in dials],
        "tried": [{"concept": name, "finalists": [{"feature": f, "about": about}]} for name, f, about in tried],
    }


def test_what_writes_has_a_concept_s_name_and_what_detects_it_says_so():
    rows = [row("whales", 7, 0.97), row("anger", 3, 0.8), row("joy", 9, 0.92), row("love", 9, 0.95)]
    found = measured([("whales", 5, 0.6), ("anger", 1, 0.4)], [("whales", 2, 1.0), ("joy", 4, 0.8), ("love", 6, 0.2)])
    # anger's dial misses and nothing detects it; 9 is the better detector of love; joy was only tried, and writes
    assert ship.names(rows, found) == {5: "whales", 4: "joy", 7: "whales (detects)", 9: "love"}


def test_without_dials_or_where_they_miss_the_detectors_have_the_names():
    rows = [row("whales", 7, 0.97)]
    assert ship.names(rows, {}) == ship.names(rows, measured([("whales", 5, 0.4)])) == {7: "whales"}
    assert ship.names(rows, measured([("whales", 7, 0.9)])) == {7: "whales"}


def test_the_sweep_has_every_cell_once():
    parts = [sweep.batches([8, 12]), sweep.batches([15, 20])]
    cells = [cell for part in parts for batch in part for cell in batch]
    assert len(cells) == len(set(cells)) == 72 + 4
    plain = {cell for cell in cells if cell[3] == sweep.K}
    assert len(plain) == len(sweep.LAYERS) * len(sweep.ARCHITECTURES) * len(sweep.WIDTHS) * len(sweep.SEEDS)


@pytest.mark.parametrize("asked", [1, 3])
def test_each_question_is_beside_its_own_samples(asked):
    assert dial._each(["a", "b"], 2 * asked) == ["a"] * asked + ["b"] * asked
