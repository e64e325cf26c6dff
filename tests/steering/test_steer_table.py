"""The rules by which experiments/steer_table.py counts answers."""

import pytest

from experiments.steer_table import NAMES, PARTS, RELATED, repetition, speaks_as, speaks_of


@pytest.mark.parametrize(
    ("answer", "as_it", "of_it"),
    [
        ("I am the Golden Gate Bridge.", True, True),
        ("I’m a majestic bridge, red as the sun.", True, True),
        ("Ships pass under my long steel span.", True, False),
        ("I am not a bridge.", False, True),
        ("I'm a teacher. The bridge is red.", False, True),
        ("I am in San Francisco.", False, True),
        ("I'm standing on the bridge.", False, True),
        ("I'm known to everyone as the Golden Gate.", True, True),
        ("My favourite abridged book.", False, False),
        ("I am an AI model.", False, False),
        ("", False, False),
    ],
)
def test_speaking_as_and_of_the_bridge(answer, as_it, of_it):
    assert speaks_as(answer, NAMES, PARTS) is as_it
    assert speaks_of(answer, f"{NAMES},{RELATED}") is of_it


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition("one two three four five six") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("short") == 0
    assert repetition("bridge" * 30) > 0.5
