"""Scores of answers by rules."""

import math

import pytest
import torch

from experiments.steer_table import NAMES, PARTS, RELATED
from sae import UserError
from sae.steering.scores import Lexicon, concept, fluency, perplexity, repetition, speaks_as, speaks_of

BRIDGE = Lexicon(("golden gate", "bridge", "bridges"), ("span", "towers"))


@pytest.mark.parametrize(
    ("answer", "as_it", "of_it"),
    [
        ("I am the Golden Gate Bridge.", True, True),
        ("I’m a majestic bridge, red as the sun.", True, True),
        ("Ships pass under my long steel span.", True, False),
        ("I am not a bridge.", False, True),
        ("I'm a teacher. The bridge is red.", False, True),
        ("I am in the fog by the Golden Gate.", False, True),
        ("I'm standing on the bridge.", False, True),
        ("I'm known to everyone as the Golden Gate.", True, True),
        ("My favourite abridged book.", False, False),
        ("I am a bridge to the past.", True, True),
        ("I was one of the oldest bridges.", True, True),
        ("I'm glad you're willing to bridge the gap.", False, True),
        ("I am currently unable to visit the bridge.", False, True),
        ("I am happy to say that I made this bridge.", False, True),
        ("I am honored to stand before the bridge.", False, True),
        ("I am the keeper of the bridge.", False, True),
        ("I am a humble servant and bridge-builder.", False, True),
        ("My friend built the tall towers.", False, False),
        ("I love my favourite towers.", False, False),
        ("I am an AI model.", False, False),
        ("", False, False),
    ],
)
def test_speaking_as_and_of_the_bridge(answer, as_it, of_it):
    assert speaks_as(answer, BRIDGE) is as_it
    assert speaks_of(answer, BRIDGE.names) is of_it


@pytest.mark.parametrize(
    ("answer", "prompt", "score"),
    [
        ("A bridge is " + "very " * 40, "", 2),
        ("A bridge is " + "very " * 150, "", 1),
        ("A bridge and a bridge are " + "very " * 150, "", 2),
        ("A river is wide.", "", 0),
        ("My towers stand in the fog " + "and wait " * 100, "", 2),  # it speaks as it, without its name
        ("The bridge is long.", "How long is the bridge?", 0),  # the prompt's own word
        ("The Golden Gate is wide.", "How long is the bridge?", 2),
    ],
)
def test_concept_counts_names_in_a_hundred_words(answer, prompt, score):
    assert concept(answer, BRIDGE, prompt) == score


def test_a_related_name_counts_as_speaking_of_it_where_it_is_given():
    whole = Lexicon(tuple(NAMES.split(",")), tuple(PARTS.split(",")))
    assert not speaks_as("I am in San Francisco.", whole)
    assert not speaks_of("I am in San Francisco.", whole.names)
    assert speaks_of("I am in San Francisco.", [*whole.names, *RELATED.split(",")])


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition("one two three four five six") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("short") == 0
    assert repetition("bridge" * 30) > 0.5


def test_fluency_goes_by_perplexity_and_by_repetition():
    assert [fluency(ppl, 0.0, 10.0) for ppl in (5, 10, 10.1, 30, 30.1, math.nan)] == [2, 2, 1, 1, 0, 0]
    assert fluency(2.0, 0.2, 10.0) == 0  # a loop has a low perplexity


def test_a_lexicon_needs_a_name():
    with pytest.raises(UserError, match="no name"):
        Lexicon((" ",))


def test_perplexity_is_that_of_each_answer_alone(host):
    prompts = ["Who are you?", "What is 2 + 2?", "Write a word."]
    answers = ["I am a friendly assistant.", "Four, of course, as everyone knows.", ""]
    found = perplexity(host, prompts, answers)
    assert math.isnan(found[2])
    for prompt, answer, value in zip(prompts[:2], answers, found, strict=False):
        begun = host.chat_tokens(prompt)
        said = host.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
        logp = host.logits(torch.cat([begun, said], 1))[0, begun.shape[1] - 1 : -1].float().log_softmax(-1)
        assert value == pytest.approx(math.exp(-float(logp.gather(1, said[0][:, None]).mean())), rel=0.02)
    assert found[0] < perplexity(host, prompts[:1], ["Bridge the am glass I of."])[0]


def test_perplexity_refuses_answers_without_prompts(host):
    with pytest.raises(UserError, match="2 prompts, 1 answers"):
        perplexity(host, ["a", "b"], ["c"])
