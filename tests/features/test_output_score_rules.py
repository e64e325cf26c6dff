"""The rules by which experiments/output_score.py counts success, and its rank correlation."""

import pytest
import torch

from experiments.output_score import Answer, concept_words, fluency, ranks, rho, spearman, success, words_of


def test_a_word_is_a_run_of_letters_and_its_plural_is_the_same_word():
    assert words_of("The Bridges' glass; 2 cafés, bus") == ["the", "bridge", "glass", "café", "bus"]


def test_concept_words_hold_a_tenth_each_and_a_third_together_and_are_no_stop_words():
    assert concept_words({"bridge": 5.0, "gate": 2.0, "the": 9.0, None: 2.0, "bay": 1.0}) == ["bridge", "gate"]
    assert concept_words({"bridge": 3.0, None: 7.0}) == []


@pytest.mark.parametrize(("perplexity", "grade"), [(10.0, 1.0), (10.1, 0.5), (30.0, 0.5), (30.1, 0.0)])
def test_fluency_is_distinct_pairs_by_the_grade_of_perplexity(perplexity, grade):
    assert fluency("a b a b a", perplexity, 10.0) == grade * 2 / 4
    assert fluency("one", 1.0, 10.0) == 0.0


def test_ties_share_their_mean_rank_and_rho_is_one_for_one_order():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(spearman(x, x.exp())) == pytest.approx(1)
    assert float(spearman(x, -x)) == pytest.approx(-1)
    assert float(spearman(x, torch.ones(4))) == 0
    # 1 - 6·Σd²/(n(n²-1)) without ties
    assert float(spearman(x, torch.tensor([2.0, 1.0, 4.0, 3.0]))) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_the_interval_of_rho_holds_it_and_is_narrow_for_one_order():
    found = rho(list(range(50)), [float(i**2) for i in range(50)])
    assert found["low"] == pytest.approx(1) and found["value"] == pytest.approx(1)


def test_success_is_that_of_the_best_strength_above_the_unsteered_rate():
    def said(word, fluent):
        return Answer(word, frozenset([word]), frozenset(), fluent, [])

    plain = [said("bridge", 1.0), said("sea", 1.0), said("sea", 1.0), said("sea", 1.0)]
    weak, strong = [said("bridge", 1.0), said("sea", 1.0)], [said("bridge", 1.0), said("bridge", 0.8)]
    found = success({1.0: [weak], 1.5: [strong]}, plain, 0, lambda answer: "bridge" in answer.words)
    assert found[0] == pytest.approx(0.9 - 0.25)
    assert found[1:] == (1.5, strong[0])
    assert success({1.0: [plain[1:]]}, plain, 0, lambda answer: "bridge" in answer.words)[0] == 0
